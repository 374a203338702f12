"""The layers that move no two inputs apart: the bound against each layer unrolled to a matrix, whatever its weights."""

import copy
import math
import warnings

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

from clustr_core.certificates.convolution import convolution_norm
from clustr_core.certificates.lipschitz import lipschitz_lower_bound, lipschitz_upper_bound
from clustr_core.models.classifiers import LinearClassifier
from clustr_core.models.encoders import build_encoder
from clustr_core.models.one_lipschitz import (
    AOLConv2d,
    AOLLinear,
    CayleyConv2d,
    CPLConv2d,
    MaxMin,
    OrthogonalPointwise,
    PadChannels,
    SLLConv2d,
    SLLLinear,
    fold_parametrizations,
    orthogonal_linear,
    thin_orthogonal_linear,
)

# a layer and the shape of what it is given; the largest has 8 x 8 places and 16 channels
LAYERS = {
    "sll": (lambda: SLLConv2d(3), (3, 5, 6)),
    "sll 8 x 8 x 16": (lambda: SLLConv2d(16), (16, 8, 8)),
    "sll 1 x 1": (lambda: SLLConv2d(4, 1, inner=7), (4, 4, 3)),
    "sll 5 x 5, few rows": (lambda: SLLConv2d(3, 5, inner=2), (3, 6, 5)),
    "sll 5 x 5, smaller image": (lambda: SLLConv2d(2, 5, inner=3), (2, 3, 2)),
    "sll 3 x 3, one row": (lambda: SLLConv2d(2, 3, inner=1), (2, 4, 4)),
    "sll, more rows": (lambda: SLLConv2d(2, 3, inner=9), (2, 4, 5)),
    "sll dense": (lambda: SLLLinear(12), (12, 1, 1)),
    "sll dense, more rows": (lambda: SLLLinear(6, inner=20), (6, 1, 1)),
    "sll dense, few rows": (lambda: SLLLinear(9, inner=2), (9, 1, 1)),
    "aol": (lambda: AOLConv2d(4, 4), (4, 6, 5)),
    "aol 8 x 8 x 16": (lambda: AOLConv2d(16, 16), (16, 8, 8)),
    "aol, fewer channels": (lambda: AOLConv2d(5, 2, 5), (5, 4, 4)),
    "aol, more channels": (lambda: AOLConv2d(2, 6, 3), (2, 5, 5)),
    "aol 1 x 1": (lambda: AOLConv2d(3, 4, 1), (3, 3, 3)),
    "aol 5 x 5, smaller image": (lambda: AOLConv2d(2, 2, 5), (2, 2, 3)),
    "aol dense": (lambda: AOLLinear(20, 6), (5, 2, 2)),
    "aol dense, more rows": (lambda: AOLLinear(6, 9), (6, 1, 1)),
    "cayley": (lambda: CayleyConv2d(3), (3, 5, 6)),
    "cayley 8 x 8 x 16": (lambda: CayleyConv2d(16), (16, 8, 8)),
    "cayley 5 x 5, smaller image": (lambda: CayleyConv2d(2, 5), (2, 3, 4)),
    "cayley 1 x 1": (lambda: CayleyConv2d(4, 1), (4, 4, 4)),
    "pointwise": (lambda: OrthogonalPointwise(4, 4), (4, 3, 3)),
    "pointwise, fewer": (lambda: OrthogonalPointwise(16, 5), (16, 3, 4)),
    "pointwise, more": (lambda: OrthogonalPointwise(3, 7), (3, 4, 4)),
    "orthogonal": (lambda: orthogonal_linear(12, 12), (3, 2, 2)),
    "orthogonal, fewer": (lambda: orthogonal_linear(16, 5), (4, 2, 2)),
    "orthogonal, more": (lambda: orthogonal_linear(5, 12, bias=False), (5, 1, 1)),
    "thin": (lambda: thin_orthogonal_linear(12, 12), (3, 2, 2)),
    "thin, fewer": (lambda: thin_orthogonal_linear(16, 5), (4, 2, 2)),
    "thin, a little fewer": (lambda: thin_orthogonal_linear(12, 9), (3, 2, 2)),
    "thin, more": (lambda: thin_orthogonal_linear(5, 12, bias=False), (5, 1, 1)),
    "thin pointwise": (lambda: OrthogonalPointwise(16, 5, thin=True), (16, 3, 4)),
    "maxmin": (MaxMin, (4, 3, 3)),
    "pad": (lambda: PadChannels(7), (3, 4, 4)),
}
LEARNT = {name: parts for name, parts in LAYERS.items() if name not in ("maxmin", "pad")}
DENSE = (SLLLinear, AOLLinear, nn.Linear)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def model_of(name, seed=0, dtype=torch.float64):
    """A layer behind a reshape if it takes vectors, as part of a chain, and the shape of its images."""
    make, shape = LAYERS[name]
    torch.manual_seed(seed)
    # made in its dtype: what an orthogonal weight starts from is a buffer, and orthogonal to that precision only
    torch.set_default_dtype(dtype)
    try:
        layer = make()
    finally:
        torch.set_default_dtype(torch.float32)
    return nn.Sequential(*([nn.Flatten()] if isinstance(layer, DENSE) else []), layer).eval(), shape


def images_of(shape, count=3, seed=1, dtype=torch.float64):
    return torch.randn(count, *shape, generator=seeded(seed), dtype=torch.float64).to(dtype)


# weights: as they come, and as training might leave them


def as_made(layer, g):
    """As they are initialised."""


def random(layer, g):
    for p in layer.parameters():
        p.copy_(torch.randn(p.shape, generator=g, dtype=torch.float64))


def large(layer, g):
    random(layer, g)
    for p in layer.parameters():
        p.mul_(30)
    scales(layer, lambda s: s.div_(30))


def huge_scales(layer, g):
    random(layer, g)
    scales(layer, lambda s: s.mul_(8))


def vanishing_rows(layer, g):
    random(layer, g)
    for p in layer.parameters():
        if p.dim() > 1:
            p[0].mul_(1e-9)
            p[1:2].mul_(1e-3)


def equal_rows(layer, g):
    """All rows alike: the overlaps are as large as they can be."""
    random(layer, g)
    for p in layer.parameters():
        if p.dim() > 1:
            p.copy_(p[:1].expand_as(p))


def positive(layer, g):
    random(layer, g)
    for p in layer.parameters():
        p.abs_()


def all_active(layer, g):
    """Every ReLU inside lets through: the layer moves as far as it can."""
    random(layer, g)
    for name, p in layer.named_parameters():
        if name.endswith("bias"):
            p.fill_(1e3)


def scales(layer, change):
    for name, p in layer.named_parameters():
        if name.endswith("log_scale"):
            change(p)


WEIGHTS = [as_made, random, large, vanishing_rows, equal_rows, positive, huge_scales, all_active]


def matters(name, change):
    """Whether weights make a difference to a layer; the largest layers are given a few only."""
    if name not in LEARNT:
        return change is as_made
    if change in (huge_scales, all_active) and "sll" not in name:
        return False
    return "8 x 8" not in name or change in (random, all_active)


def cases(weights=WEIGHTS):
    return [
        pytest.param(name, change, id=f"{name}, {change.__name__}")
        for name in LAYERS
        for change in weights
        if matters(name, change)
    ]


def weighted(name, weights, seed=0, dtype=torch.float64):
    model, shape = model_of(name, seed, dtype)
    with torch.no_grad():
        weights(model, seeded(seed))
    return model, shape


def stretched(name, steps=25, seed=0):
    """A layer trained, in large steps, to move two images as far apart as it can."""
    model, shape = weighted(name, random, seed)
    a, b = images_of(shape, 16, seed + 1), images_of(shape, 16, seed + 2)
    optimiser = torch.optim.Adam(model.parameters(), lr=0.3)
    for _ in range(steps):
        optimiser.zero_grad()
        (-gains(model, a, b).log().mean()).backward()
        optimiser.step()
    return model, shape


def gains(model, a, b):
    """By how much a model stretches each difference, less what rounding may have added to it."""
    found, other = model(a), model(b)
    noise = 8 * torch.finfo(a.dtype).eps * found.detach().flatten(1).norm(dim=1)
    return ((found - other).flatten(1).norm(dim=1) - noise) / (a - b).flatten(1).norm(dim=1)


def unrolled(model, image):
    """The matrix of a model at an image: its whole Jacobian there."""
    jacobian = torch.func.jacrev(lambda x: model(x[None])[0].flatten())(image)
    return jacobian.detach().flatten(1)


def largest_singular_value(model, images):
    return max(float(torch.linalg.matrix_norm(unrolled(model, image), ord=2)) for image in images)


def check_bound(model, shape, count=2):
    """The bound is above the layer's matrix at every image, above all pairs, and that of a 1-Lipschitz layer."""
    bound = lipschitz_upper_bound(model, shape)
    matrices = [unrolled(model, image) for image in images_of(shape, count)]
    assert max(float(torch.linalg.matrix_norm(matrix, ord=2)) for matrix in matrices) <= bound
    assert bound <= 1 + 1e-5
    check_pairs(model, images_of(shape, 64), matrices[0], bound)
    return bound


@torch.no_grad()
def check_pairs(model, a, matrix, bound):
    """Pairs at random, near and far; and from the first image along the direction in which its matrix is longest."""
    for scale in (1e-3, 1.0, 1e3):
        b = a + scale * torch.randn(a.shape, generator=seeded(4), dtype=a.dtype)
        assert gains(model, a, b).max() <= bound
    worst = torch.ones(matrix.shape[1], dtype=a.dtype)
    for _ in range(50):
        worst = matrix.T @ (matrix @ worst)
        worst /= worst.norm()
    for scale in (1e-4, 1.0, 1e2):
        for towards in (worst, -worst):
            assert gains(model, a[:1], a[:1] + scale * towards.reshape(1, *a.shape[1:])).max() <= bound


@pytest.mark.parametrize(("name", "weights"), cases())
def test_the_bound_is_above_the_unrolled_matrix(name, weights):
    model, shape = weighted(name, weights)
    check_bound(model, shape, count=1 if "8 x 8" in name else 2)


@pytest.mark.parametrize("name", LEARNT)
def test_and_after_training_to_stretch(name):
    model, shape = stretched(name, steps=2 if "8 x 8" in name else 15)
    bound = check_bound(model, shape, count=1 if "8 x 8" in name else 2)
    # it got somewhere: the layer is nearly as long as it may be
    found = largest_singular_value(model, images_of(shape, 1))
    assert found > (0.5 if "aol" in name else 0.9) * bound


@given(st.sampled_from(sorted(LEARNT)), st.sampled_from(WEIGHTS), st.integers(0, 10**6))
@settings(max_examples=20, deadline=None)
def test_and_for_any_seed(name, weights, seed):
    model, shape = weighted("sll" if "8 x 8" in name else name, weights, seed)
    check_bound(model, LAYERS["sll"][1] if "8 x 8" in name else shape, count=1)


@pytest.mark.parametrize(("name", "weights"), cases([as_made, vanishing_rows, equal_rows, huge_scales]))
def test_the_bound_of_a_layer_in_single_precision(name, weights):
    """Its step and its weights carry rounding, and the bound is of those that it really uses."""
    model, shape = weighted(name, weights, dtype=torch.float32)
    bound = lipschitz_upper_bound(model, shape)
    assert bound <= 1 + 1e-5
    frozen = exactly(model)
    assert largest_singular_value(frozen, images_of(shape, 1)) <= bound
    a, b = (images_of(shape, 64, seed, torch.float32) for seed in (3, 4))
    with torch.no_grad():
        assert gains(model, a, b).max() <= bound + 1e-4


def exactly(model):
    """The float32 model's own numbers, in float64: what it computes but for rounding."""
    frozen = copy.deepcopy(fold_parametrizations(model))
    for layer in frozen.modules():
        for name in ("step", "effective_weight"):
            if hasattr(layer, name):
                value = getattr(layer, name)().detach().double()
                setattr(layer, name, lambda value=value: value)
        if isinstance(layer, CayleyConv2d):
            real = layer.blocks
            layer.blocks = lambda *size, real=real: real(*size).detach().to(torch.complex128)
    biases = {name: p.detach().double() for name, p in frozen.named_parameters()}
    for name, p in frozen.named_parameters():
        if not any(isinstance(m, CayleyConv2d) for m in frozen.modules()) or name.endswith("bias"):
            p.data = biases[name]
    return frozen


# layers that lose no length


@pytest.mark.parametrize("weights", [as_made, random, large, equal_rows])
@pytest.mark.parametrize(
    "name",
    ["cayley", "cayley 8 x 8 x 16", "cayley 5 x 5, smaller image", "cayley 1 x 1", "pointwise", "pointwise, more",
     "orthogonal", "orthogonal, more", "thin", "thin, more", "pad"],
)  # fmt: skip
def test_an_isometry_keeps_every_distance(name, weights):
    model, shape = weighted(name, weights)
    a, b = images_of(shape, 32, 5), images_of(shape, 32, 6)
    with torch.no_grad():
        assert gains(model, a, b).tolist() == pytest.approx([1] * 32, rel=1e-9)
    matrix = unrolled(model, a[0])
    torch.testing.assert_close(matrix.T @ matrix, torch.eye(matrix.shape[1]).double(), rtol=0, atol=1e-9)


@pytest.mark.parametrize("weights", [as_made, random, large])
@pytest.mark.parametrize("name", ["pointwise, fewer", "orthogonal, fewer", "thin, fewer", "thin, a little fewer"])
def test_fewer_dimensions_are_a_projection(name, weights):
    model, shape = weighted(name, weights)
    matrix = unrolled(model, images_of(shape)[0])
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(len(matrix)).double(), rtol=0, atol=1e-9)


def test_a_cayley_convolution_wraps_around():
    """Moved images become moved images, which zero padding would not give, and its blocks are those of its matrix."""
    model, shape = weighted("cayley", random)
    images = images_of(shape)
    moved = images.roll((2, 3), dims=(2, 3))
    torch.testing.assert_close(model(moved), model(images).roll((2, 3), dims=(2, 3)))
    layer = model[0]
    impulse = torch.zeros(3, *shape, dtype=torch.float64)
    impulse[torch.arange(3), torch.arange(3), 0, 0] = 1
    kernels = (model(impulse) - layer.bias[:, None, None]).permute(1, 0, 2, 3)
    blocks = torch.fft.rfft2(kernels).permute(2, 3, 0, 1)
    torch.testing.assert_close(blocks, layer.blocks(5, 6), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(blocks @ blocks.mH, torch.eye(3).to(blocks).expand_as(blocks), rtol=0, atol=1e-9)


@given(st.integers(0, 10**6), st.integers(1, 4), st.sampled_from([(), (3,), (2, 3)]))
@settings(max_examples=40, deadline=None)
def test_maxmin_sorts_pairs_and_keeps_the_norm(seed, half, rest):
    x, y = torch.randn(2, 5, 2 * half, *rest, generator=seeded(seed), dtype=torch.float64)
    found = MaxMin()(x)
    pairs = torch.stack([x[:, :half], x[:, half:]])
    assert torch.equal(found[:, :half], pairs.amax(dim=0))
    assert torch.equal(found[:, half:], pairs.amin(dim=0))
    torch.testing.assert_close(found.flatten(1).norm(dim=1), x.flatten(1).norm(dim=1))
    assert (found - MaxMin()(y)).norm() <= (x - y).norm() * (1 + 1e-12)
    x.requires_grad_()
    (gradient,) = torch.autograd.grad((MaxMin()(x) * y).sum(), x)
    assert gradient.norm().item() == pytest.approx(y.norm().item())


def test_padding_puts_zeros_behind_and_pools_nothing():
    images = images_of((3, 4, 4))
    found = PadChannels(5)(images)
    assert torch.equal(found[:, :3], images)
    assert (found[:, 3:] == 0).all()
    assert found.shape == (3, 5, 4, 4)
    assert torch.equal(PadChannels(3)(images), images)


# what each layer computes, written out


def zero_padded_matrix(weight, shape):
    """The convolution's matrix, one column for each pixel."""
    basis = torch.eye(math.prod(shape), dtype=torch.float64).reshape(-1, *shape)
    return F.conv2d(basis, weight, padding=weight.shape[2] // 2).flatten(1).T


@pytest.mark.parametrize("weights", [random, huge_scales, equal_rows, all_active])
@pytest.mark.parametrize("name", ["sll", "sll 5 x 5, few rows", "sll, more rows", "sll 5 x 5, smaller image"])
def test_an_sll_convolution_is_its_formula_on_matrices(name, weights):
    """t is at most that of the matrix itself, whose row sums a border cuts short."""
    model, shape = weighted(name, weights)
    (layer,) = model
    matrix, places = zero_padded_matrix(layer.weight.detach(), shape), math.prod(shape[1:])
    bias, step, scale = (
        v.detach().repeat_interleave(places) for v in (layer.bias, layer.step(), layer.log_scale.exp())
    )
    x = images_of(shape).flatten(1)
    expected = x - ((x @ matrix.T + bias).relu() * step) @ matrix
    torch.testing.assert_close(model(x.reshape(-1, *shape)).flatten(1), expected, rtol=1e-8, atol=1e-8)
    allowed = 2 * scale / ((matrix @ matrix.T).abs() @ scale)
    assert (step <= allowed * (1 + 1e-9)).all()
    # in the middle of a large image nothing is cut, and t is what the formula says
    if name == "sll":
        middle = torch.zeros(layer.weight.shape[0], 5, 6, dtype=torch.bool)
        middle[:, 2:3, 2:4] = True
        torch.testing.assert_close(step[middle.flatten()], allowed[middle.flatten()])


@given(st.sampled_from([(3, (5, 6), 3), (16, (8, 8), 3), (2, (3, 2), 5)]), st.integers(0, 10**6), st.booleans())
@settings(max_examples=20, deadline=None)
def test_a_cpl_convolution_is_its_formula_and_the_bound_is_of_its_estimate(sizes, seed, trained):
    """Power iteration is from below, so the layer may stretch: the bound says by how much, and less with every step."""
    (channels, size, kernel), shape = sizes, (sizes[0], *sizes[1])
    torch.manual_seed(seed)
    layer = CPLConv2d(channels, size, kernel).double()
    with torch.no_grad():
        layer.weight.mul_(3.0)
        layer.bias.normal_(generator=seeded(seed))
    x = images_of(shape, seed=seed)
    for _ in range(20 if trained else 0):
        layer.train()(x)
    matrix = zero_padded_matrix(layer.weight.detach(), shape)
    torus = [side + kernel - 1 for side in size]
    squared = circular_norm(layer.weight.detach(), *torus) ** 2
    step = float(layer.eval().step()[0].detach())
    assert step >= 2 / squared * (1 - 1e-6)
    bias = layer.bias.detach().repeat_interleave(math.prod(size))
    expected = x.flatten(1) - ((x.flatten(1) @ matrix.T + bias).relu() * step) @ matrix
    torch.testing.assert_close(layer(x).flatten(1), expected)
    bound = lipschitz_upper_bound(nn.Sequential(layer), shape)
    assert bound == pytest.approx(max(1.0, step * squared - 1))
    assert largest_singular_value(nn.Sequential(layer), images_of(shape, 2)) <= bound
    assert bound < 1.01
    # evaluation moves no state, and a loaded layer is the same one
    again = CPLConv2d(channels, size, kernel).double()
    again.load_state_dict(layer.state_dict())
    assert torch.equal(again.eval()(x), layer(x))


def test_gradients_of_a_cpl_convolution_pass_two_training_steps():
    layer = CPLConv2d(3, (5, 5)).double()
    before = layer.step().detach()
    optimiser = torch.optim.SGD(layer.parameters(), lr=0.1)
    for _ in range(2):
        x = images_of((3, 5, 5))
        # twice in one graph, as when an adversary has looked first
        loss = layer(layer(x)).square().sum()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    # weights that were changed in place are settled anew, and a copy in another dtype on its own
    evaluated = layer.eval().step().detach()
    with torch.no_grad():
        layer.weight.mul_(2)
    torch.testing.assert_close(layer.step(), evaluated / 4)
    torch.testing.assert_close(copy.deepcopy(layer).float().step().double(), layer.step(), rtol=1e-5, atol=0)
    assert layer.step().isfinite().all()
    assert not torch.allclose(layer.step(), before)
    torch.testing.assert_close(layer.vectors.norm(dim=(1, 2)), torch.ones(len(layer.vectors)).double())


def test_a_dense_sll_layer_is_its_formula():
    model, shape = weighted("sll dense, more rows", random)
    layer = model[1]
    weight, scale = layer.weight.detach(), layer.log_scale.detach().exp()
    step = [
        2 / math.fsum(abs(float(weight[i] @ weight[j])) * float(scale[j] / scale[i]) for j in range(20))
        for i in range(20)
    ]
    assert layer.step().tolist() == pytest.approx(step)
    x = images_of(shape).flatten(1)
    expected = x - ((x @ weight.T + layer.bias).relu() * torch.tensor(step)) @ weight
    torch.testing.assert_close(model(x.reshape(-1, *shape)), expected)


@pytest.mark.parametrize("name", ["aol", "aol, fewer channels", "aol, more channels", "aol 5 x 5, smaller image"])
def test_an_aol_convolution_scales_columns_by_no_more_than_it_may(name):
    model, shape = weighted(name, random)
    (layer,) = model
    matrix, places = zero_padded_matrix(layer.weight.detach(), shape), math.prod(shape[1:])
    scale = (layer.effective_weight() / layer.weight)[0, :, 0, 0].detach()
    torch.testing.assert_close(layer.effective_weight(), layer.weight * scale[:, None, None])
    allowed = (matrix.T @ matrix).abs().sum(dim=1).rsqrt()
    assert (scale.repeat_interleave(places) <= allowed * (1 + 1e-9)).all()
    x = images_of(shape).flatten(1)
    expected = (x * scale.repeat_interleave(places)) @ matrix.T
    found = model(x.reshape(-1, *shape)) - layer.bias[:, None, None]
    torch.testing.assert_close(found.flatten(1), expected)


def test_a_dense_aol_layer_scales_rows():
    model, shape = weighted("aol dense", random)
    layer = model[1]
    weight = layer.weight.detach()
    scale = [math.fsum(abs(float(row @ other)) for other in weight) ** -0.5 for row in weight]
    torch.testing.assert_close(layer.effective_weight(), torch.tensor(scale)[:, None] * weight)
    x = images_of(shape)
    torch.testing.assert_close(model(x), x.flatten(1) @ layer.effective_weight().T + layer.bias)


# a layer that is not what it says


class Eager(SLLConv2d):
    def step(self):
        return 3 * super().step()


class EagerDense(SLLLinear):
    def step(self):
        return 3 * super().step()


class Unscaled(AOLConv2d):
    def effective_weight(self):
        return self.weight / self.weight.flatten(1).norm(dim=1)[:, None, None, None]


class UnscaledDense(AOLLinear):
    def effective_weight(self):
        return self.weight / self.weight.norm(dim=1, keepdim=True)


class Stretched(CayleyConv2d):
    def blocks(self, height, width):
        return 1.2 * super().blocks(height, width)


TAMPERED = {
    "sll": (lambda: Eager(3), (3, 5, 6)),
    "sll dense": (lambda: EagerDense(8), (8, 1, 1)),
    "aol": (lambda: Unscaled(4, 4), (4, 5, 5)),
    "aol dense": (lambda: UnscaledDense(4, 9), (4, 1, 1)),
    "cayley": (lambda: Stretched(3), (3, 4, 4)),
}


@pytest.mark.parametrize("name", TAMPERED)
def test_soundness_is_computed_and_not_believed(name):
    make, shape = TAMPERED[name]
    torch.manual_seed(0)
    layer = make().double()
    model = nn.Sequential(*([nn.Flatten()] if isinstance(layer, DENSE) else []), layer)
    with torch.no_grad():
        all_active(model, seeded(0))
    truth = largest_singular_value(model, images_of(shape, 2))
    bound = lipschitz_upper_bound(model, shape)
    assert 1 + 1e-3 < truth <= bound
    with pytest.raises(AssertionError):
        check_bound(model, shape)


@pytest.mark.parametrize(
    ("name", "method", "factor"), [("sll", "step", 3), ("aol", "effective_weight", 2), ("cayley", "blocks", 1.2)]
)
def test_a_method_replaced_on_the_layer_itself_counts(name, method, factor, monkeypatch):
    model, shape = weighted(name, all_active if name == "sll" else random)
    before = lipschitz_upper_bound(model, shape)
    real = getattr(model[0], method)
    monkeypatch.setattr(model[0], method, lambda *size: factor * real(*size))
    after = lipschitz_upper_bound(model, shape)
    assert after >= largest_singular_value(model, images_of(shape, 2))
    if name == "sll":
        assert after > 1 + 1e-3
    else:
        assert after == pytest.approx(factor * before)


@pytest.mark.parametrize("name", ["pointwise", "orthogonal"])
def test_an_orthogonal_weight_that_is_none_counts(name):
    model, shape = weighted(name, random)
    fold_parametrizations(model)
    linear = model[0].linear if name == "pointwise" else model[1]
    with torch.no_grad():
        linear.weight[0] *= 1.5
    assert lipschitz_upper_bound(model, shape) == pytest.approx(1.5)
    assert largest_singular_value(model, images_of(shape, 1)) == pytest.approx(1.5)


def test_a_layer_that_computes_something_else_is_refused():
    class Doubled(SLLConv2d):
        def forward(self, images):
            return 2 * super().forward(images)

    class Halves(MaxMin):
        def forward(self, x):
            return 2 * super().forward(x)

    for layer in (Doubled(2), Halves()):
        with pytest.raises(TypeError, match=f"no Lipschitz bound is known for the layer {type(layer).__name__}"):
            lipschitz_upper_bound(nn.Sequential(layer), (2, 4, 4))


def circular_norm(weight, height, width=None):
    """The norm of the convolution that wraps around: by the FFT at the image's own size."""
    blocks = torch.fft.fft2(weight, s=(height, width or height)).permute(2, 3, 0, 1)
    return float(torch.linalg.matrix_norm(blocks, ord=2).max())


def alternating(channels=1):
    """(-1, 1, -1) along each row: its symbol is largest at the highest frequency, which an odd size does not have."""
    weight = torch.zeros(channels, channels, 3, 3, dtype=torch.float64)
    for c in range(channels):
        weight[c, c, 1] = torch.tensor([-1.0, 1.0, -1.0])
    return weight


@pytest.mark.parametrize("size", [3, 5, 7])
def test_the_fft_at_the_images_own_size_would_be_too_small(size):
    weight = alternating()
    truth = float(torch.linalg.matrix_norm(zero_padded_matrix(weight, (1, size, size)), ord=2))
    assert truth == pytest.approx(1 + 2 * math.cos(math.pi / (size + 1)))
    assert circular_norm(weight, size) == pytest.approx(1 + 2 * math.cos(math.pi / size))
    assert circular_norm(weight, size) < truth
    # what is used instead: a torus of size + 2 padding
    bound = convolution_norm(weight, (size, size), (1, 1))
    assert bound == pytest.approx(circular_norm(weight, size + 2))
    assert truth < bound


def test_a_layer_that_only_the_small_fft_would_pass_is_caught():
    class Circular(AOLConv2d):
        """Scaled by the norm of the convolution that wraps around."""

        def effective_weight(self):
            return self.weight / circular_norm(self.weight.detach(), 3)

    layer = Circular(2, 2).double()
    with torch.no_grad():
        layer.weight.copy_(alternating(2))
    model = nn.Sequential(layer)
    assert circular_norm(layer.effective_weight().detach(), 3) == pytest.approx(1)
    truth = largest_singular_value(model, images_of((2, 3, 3), 1))
    assert 1.2 < truth <= lipschitz_upper_bound(model, (2, 3, 3))


# whole encoders

ENCODERS = {
    "lip-mlp": ((1, 8, 8), 8),
    "lip-mlp, colour": ((3, 4, 6), 6),
    "lip-cnn": ((1, 8, 8), 16),
    "lip-cnn, colour": ((3, 8, 8), 48),
    "lip-cnn-aol": ((1, 8, 8), 16),
    "lip-cnn-cayley": ((1, 8, 8), 16),
    "lip-mlp-thin": ((1, 8, 8), 8),
    "lip-cnn-thin, colour": ((3, 8, 8), 48),
}


YOUNGER = ["lip-mlp-thin", "lip-cnn-thin", "lip-cnn-cpl"]


def encoder_of(name, dtype=torch.float32):
    shape, width = ENCODERS[name]
    torch.manual_seed(0)
    return build_encoder(name.partition(",")[0], shape, width=width).to(dtype), shape


def trained(name, steps=12, dtype=torch.float64):
    """An encoder after a few steps, of a size that is large for it, that drive embeddings apart."""
    encoder, shape = encoder_of(name, dtype)
    images = torch.rand(24, *shape, generator=seeded(1), dtype=torch.float64).to(dtype)
    start = encoder(images).detach()
    optimiser = torch.optim.Adam(encoder.parameters(), lr=0.002 if "aol" in name else 0.2)
    for _ in range(steps):
        optimiser.zero_grad()
        (-torch.pdist(encoder(images)).mean()).backward()
        optimiser.step()
    assert (encoder(images) - start).norm(dim=1).min() > 0.02
    return encoder.eval(), shape


@pytest.mark.parametrize("name", ENCODERS)
def test_an_encoder_is_bounded_after_training(name):
    encoder, shape = trained(name)
    bound = lipschitz_upper_bound(encoder, shape)
    assert bound <= 1 + 1e-5
    fold_parametrizations(encoder)
    assert lipschitz_upper_bound(encoder, shape) == pytest.approx(bound, rel=1e-12)
    images = torch.rand(48, *shape, generator=seeded(2), dtype=torch.float64)
    lower = lipschitz_lower_bound(encoder, images[:8], iterations=30)
    assert 0.1 < lower <= bound
    matrix = unrolled(encoder, images[0])
    assert 0.95 * float(torch.linalg.matrix_norm(matrix, ord=2)) <= lower
    assert largest_singular_value(encoder, images[:2]) <= bound
    check_pairs(encoder, images, matrix, bound)
    with torch.no_grad():
        far = images.round()
        assert gains(encoder, images, far).max() <= bound
        assert encoder(images).shape == (48, encoder.embedding_dim)


@pytest.mark.parametrize("name", ENCODERS)
def test_an_encoder_in_single_precision_is_bounded_as_trained(name):
    encoder, shape = trained(name, dtype=torch.float32)
    bound = lipschitz_upper_bound(encoder, shape)
    assert bound <= 1 + 1e-5
    fold_parametrizations(encoder)
    images = torch.rand(16, *shape, generator=seeded(2))
    # power iteration's own rounding
    assert lipschitz_lower_bound(encoder, images) <= bound + 1e-5
    assert lipschitz_upper_bound(encoder.double(), shape) <= 1 + 1e-5


@pytest.mark.parametrize("name", ENCODERS)
def test_an_encoder_whose_layers_were_tampered_with_shows_it(name):
    encoder, shape = trained(name, steps=2)
    fold_parametrizations(encoder)
    before, tampered = lipschitz_upper_bound(encoder, shape), 0
    for layer in encoder.modules():
        if isinstance(layer, nn.Linear):
            with torch.no_grad():
                layer.weight *= 1.1
            tampered += 1
    assert tampered >= 2
    assert lipschitz_upper_bound(encoder, shape) == pytest.approx(before * 1.1**tampered)


@pytest.mark.parametrize("name", ["lip-mlp", "lip-cnn", "lip-cnn-aol", "lip-cnn-cayley", *YOUNGER])
def test_an_encoder_knows_its_dimension_and_its_shapes(name):
    for shape, width in (((1, 8, 8), 16), ((3, 16, 8), 48)):
        encoder = build_encoder(name, shape, width=width)
        assert encoder(torch.rand(2, *shape)).shape == (2, encoder.embedding_dim)
    with pytest.raises(ValueError, match="width: expected an even number, since MaxMin sorts pairs, got 17"):
        build_encoder(name, (1, 8, 8), width=17)
    with pytest.raises(ValueError, match="width: expected at least 1, got 0"):
        build_encoder(name, (1, 8, 8), width=0)
    if not name.startswith("lip-mlp"):
        for shape, width in (((1, 28, 28), 16), ((1, 8, 12), 16), ((3, 8, 8), 2), ((1, 8, 8), 18)):
            with pytest.raises(
                ValueError, match=r"image_shape, width: expected sides that are multiples of 8, a width"
            ):
                build_encoder(name, shape, width=width)


# bake


@pytest.mark.parametrize("name", ENCODERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_baking_changes_no_value(name, dtype):
    encoder, shape = trained(name, steps=2, dtype=dtype)
    images = torch.rand(8, *shape, generator=seeded(3), dtype=torch.float64).to(dtype)
    assert any(parametrize.is_parametrized(layer) for layer in encoder.modules())
    with torch.no_grad():
        before = encoder(images)
        assert fold_parametrizations(encoder) is encoder
        after = encoder(images)
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(after, before, rtol=100 * eps, atol=100 * eps)
    assert not any(parametrize.is_parametrized(layer) for layer in encoder.modules())
    # twice is once
    with torch.no_grad():
        assert torch.equal(fold_parametrizations(encoder)(images), after)


def test_baking_reaches_the_head_and_leaves_ordinary_layers_alone():
    torch.manual_seed(0)
    model = LinearClassifier(nn.Flatten(), 16, 4, orthonormal=True)
    head = model.linear.weight.detach().clone()
    fold_parametrizations(model)
    assert torch.equal(model.linear.weight, head)
    assert isinstance(model.linear.weight, nn.Parameter)
    assert set(model.state_dict()) == {"linear.weight", "linear.bias"}
    plain = nn.Sequential(SLLConv2d(2), nn.Conv2d(2, 2, 3), nn.BatchNorm2d(2))
    before = copy.deepcopy(plain.state_dict())
    assert all(torch.equal(before[name], value) for name, value in fold_parametrizations(plain).state_dict().items())


class Doubled(nn.Module):
    def forward(self, weight):
        return 2 * weight


class Product(nn.Module):
    """Two originals."""

    def forward(self, one, other):
        return one * other

    def right_inverse(self, weight):
        return weight.clone(), torch.ones_like(weight)


def twice_parametrized(layer):
    """Weight and bias, the weight by two functions, one after the other."""
    parametrize.register_parametrization(parametrizations.orthogonal(layer), "weight", Doubled())
    return parametrize.register_parametrization(layer, "bias", Product())


def of_a_buffer(layer):
    layer.register_buffer("shift", torch.ones(4))
    layer.register_forward_hook(lambda layer, given, found: found + layer.shift)
    return parametrize.register_parametrization(layer, "shift", Doubled())


def pruned(layer):
    return prune.l1_unstructured(layer, "weight", amount=0.5)


def with_weight_norm_by_hook(layer):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return nn.utils.weight_norm(layer)


PARAMETRIZED = {
    "cayley": lambda layer: parametrizations.orthogonal(layer, orthogonal_map="cayley"),
    "householder": lambda layer: parametrizations.orthogonal(layer, orthogonal_map="householder"),
    "exponential": lambda layer: parametrizations.orthogonal(layer, orthogonal_map="matrix_exp"),
    "spectral norm": parametrizations.spectral_norm,
    "weight norm": parametrizations.weight_norm,
    "several": twice_parametrized,
    "buffer": of_a_buffer,
}
HOOKED = {
    "spectral norm by a hook": nn.utils.spectral_norm,
    "pruned": pruned,
    "weight norm by a hook": with_weight_norm_by_hook,
}


@pytest.mark.parametrize("which", ["copy", "original"])
@pytest.mark.parametrize("name", [*PARAMETRIZED, *HOOKED])
def test_folding_leaves_a_copy_as_it_is(name, which):
    """Whichever of the two is folded, and whatever makes the weight."""
    torch.manual_seed(0)
    net = nn.Sequential((PARAMETRIZED | HOOKED)[name](nn.Linear(6, 4)), nn.ReLU()).eval()
    x = torch.randn(3, 6)
    with torch.no_grad():
        before = net(x)
    # a weight that a hook has made is no leaf
    if name in HOOKED and not net[0].weight.is_leaf:
        net[0].weight = net[0].weight.detach()
    other = copy.deepcopy(net)
    folded, kept = (other, net) if which == "copy" else (net, other)
    state = {key: value.clone() for key, value in kept.state_dict().items()}
    assert fold_parametrizations(folded) is folded
    torch.testing.assert_close(folded(x), before, rtol=1e-5, atol=1e-6)
    assert torch.equal(kept(x), before)
    assert list(kept.state_dict()) == list(state)
    assert all(torch.equal(kept.state_dict()[key], value) for key, value in state.items())
    assert parametrize.is_parametrized(kept[0]) == (name in PARAMETRIZED)
    if name in PARAMETRIZED:
        assert type(folded[0]) is nn.Linear
        assert not any("parametrizations" in key for key in folded.state_dict())
        # the copy can be trained and folded as ever
        kept(x).sum().backward()
        torch.testing.assert_close(fold_parametrizations(kept)(x), before, rtol=1e-5, atol=1e-6)


def test_folding_one_of_two_networks_that_share_their_weights_leaves_the_other():
    torch.manual_seed(0)
    one, other = (parametrizations.orthogonal(nn.Linear(4, 4)) for _ in range(2))
    other.load_state_dict(one.state_dict(), assign=True)
    other.parametrizations.weight.original = one.parametrizations.weight.original
    x = torch.randn(3, 4)
    with torch.no_grad():
        before = other(x)
    fold_parametrizations(one)
    assert torch.equal(other(x), before)
    # two layers of one network
    tied = nn.Sequential(*(nn.utils.parametrizations.orthogonal(nn.Linear(4, 4, bias=False)) for _ in range(2)))
    tied[1].parametrizations.weight.original = tied[0].parametrizations.weight.original
    before = tied(x).detach()
    torch.testing.assert_close(fold_parametrizations(tied)(x), before)


def test_folding_keeps_what_takes_a_gradient_and_what_does_not():
    torch.manual_seed(0)
    frozen, free = (parametrizations.orthogonal(nn.Linear(4, 4)) for _ in range(2))
    frozen.requires_grad_(False)
    fold_parametrizations(nn.Sequential(frozen, free))
    assert not frozen.weight.requires_grad
    assert free.weight.requires_grad
    assert free.weight.is_leaf


def test_an_orthonormal_head_has_orthonormal_rows():
    torch.manual_seed(0)
    model = LinearClassifier(nn.Flatten(), 12, 5, orthonormal=True)
    rows = model.linear.weight
    torch.testing.assert_close(rows @ rows.T, torch.eye(5), rtol=0, atol=1e-6)
    apart = torch.pdist(rows)
    assert apart.tolist() == pytest.approx([2**0.5] * 10, rel=1e-6)
    assert not parametrize.is_parametrized(LinearClassifier(nn.Flatten(), 12, 5).linear)


# what is refused


@pytest.mark.parametrize(
    "kind", [lambda k: SLLConv2d(2, k), lambda k: AOLConv2d(2, 2, k), lambda k: CayleyConv2d(2, k)]
)
@pytest.mark.parametrize("kernel_size", [0, 2, 4, -1])
def test_kernels_have_a_middle(kind, kernel_size):
    with pytest.raises(ValueError, match=f"kernel_size: expected an odd number, got {kernel_size}"):
        kind(kernel_size)


def test_channels_that_do_not_fit_are_named():
    with pytest.raises(ValueError, match="x: expected an even number of channels, got 3"):
        MaxMin()(torch.zeros(2, 3))
    with pytest.raises(ValueError, match="images: expected at most 2 channels, got 3"):
        PadChannels(2)(torch.zeros(1, 3, 2, 2))


SLL = {"convolution": (SLLConv2d, (4, 5, 5)), "vector": (SLLLinear, (4, 1, 1))}


@pytest.mark.parametrize("log_scale", [0.0, 5.0, 90.0, 800.0, -90.0, -800.0])
@pytest.mark.parametrize("length", [0.0, 1e-42, 1e-30, 1e-22, 1e-19, 1e-15, 1e-10, 1e-6])
@pytest.mark.parametrize("rows", ["one", "all"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("kind", SLL)
def test_rows_of_zeros_or_nearly_so_are_safe(kind, dtype, rows, length, log_scale):
    """Nothing overflows, forward or backward, and the layer is 1-Lipschitz, whatever the scales."""
    torch.manual_seed(0)
    make, shape = SLL[kind]
    layer = make(4).to(dtype).eval()
    which = slice(None) if rows == "all" else slice(1, 2)
    with torch.no_grad():
        layer.weight[which] = length * torch.randn_like(layer.weight[which])
        layer.bias.copy_(torch.rand_like(layer.bias))
        layer.log_scale[1] = log_scale
    x = torch.rand(3, *(shape if kind == "convolution" else shape[:1]), dtype=torch.float64).to(dtype).requires_grad_()
    moved = layer(x)
    moved.sum().backward()
    assert layer.step().isfinite().all()
    assert moved.isfinite().all()
    for tensor in (x, *layer.parameters()):
        assert tensor.grad is not None
        assert tensor.grad.isfinite().all()
    chain = layer if kind == "convolution" else nn.Sequential(nn.Flatten(), layer)
    assert 1 <= lipschitz_upper_bound(chain, shape) <= 1 + (1e-5 if dtype != torch.bfloat16 else 0.1)
    if length == 0 and rows == "all":
        assert torch.equal(moved, x)


@pytest.mark.parametrize("kind", SLL)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_an_ordinary_row_keeps_its_step_bit_by_bit(kind, dtype):
    torch.manual_seed(0)
    layer = SLL[kind][0](4).to(dtype)
    for scale in (1e-5, 1e-2, 1.0, 100.0):
        with torch.no_grad():
            layer.weight.copy_(scale * torch.randn_like(layer.weight))
            layer.log_scale.copy_(5 * torch.randn_like(layer.log_scale))
        if kind == "convolution":
            overlap = F.conv2d(layer.weight, layer.weight, padding=2).abs().sum(dim=(2, 3))
        else:
            overlap = (layer.weight @ layer.weight.T).abs()
        q = layer.log_scale.exp()
        assert torch.equal(layer.step(), 2 * q / (overlap @ q))


@pytest.mark.parametrize("layer", [SLLConv2d(4), SLLLinear(4)], ids=["convolution", "vector"])
def test_a_row_of_zeros_moves_nothing_whatever_its_bias(layer):
    with torch.no_grad():
        layer.weight[0] = 0
        layer.bias[0] = 1e6
    x = torch.rand(2, 4, 3, 3) if isinstance(layer, SLLConv2d) else torch.rand(2, 4)
    found = layer(x)
    assert found.isfinite().all()
    with torch.no_grad():
        layer.bias[0] = -1.0
    torch.testing.assert_close(found, layer(x))
