import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook

from clustr_core.certificates.convolution import convolution_norm
from clustr_core.certificates.lipschitz import lipschitz_lower_bound, lipschitz_upper_bound
from clustr_core.models.encoders import Normalize, ResidualBlock, ResNet18, SmallCNN, build_encoder


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def randomise(module, seed=0):
    """Weights, and batch-norm statistics far from 0 and 1, as after training."""
    g = seeded(seed)
    for layer in module.modules():
        if isinstance(layer, nn.modules.batchnorm._BatchNorm):
            assert layer.running_mean is not None
            assert layer.running_var is not None
            layer.running_mean.copy_(torch.randn(layer.num_features, generator=g))
            layer.running_var.copy_(0.05 + 3 * torch.rand(layer.num_features, generator=g))
            if layer.affine:
                layer.weight.data = torch.randn(layer.num_features, generator=g).to(layer.weight)
                layer.bias.data = torch.randn(layer.num_features, generator=g).to(layer.bias)
    return module.eval().double()


def dense_norm(function, shape):
    """The operator norm of a linear function of images, from its whole matrix."""
    size = math.prod(shape)
    basis = torch.eye(size, dtype=torch.float64).reshape(size, *shape)
    zero = function(torch.zeros(1, *shape, dtype=torch.float64))
    columns = (function(basis) - zero).flatten(1).detach()
    return float(torch.linalg.matrix_norm(columns, ord=2))


CONVOLUTIONS = [
    {"kernel_size": 3, "padding": 1},
    {"kernel_size": 3, "padding": 0},
    {"kernel_size": 3, "padding": 1, "stride": 2},
    {"kernel_size": 1, "stride": 2},
    {"kernel_size": 5, "padding": 2},
    {"kernel_size": (3, 1), "padding": (1, 0)},
    {"kernel_size": 3, "padding": 2, "dilation": 2},
    {"kernel_size": 3, "padding": 1, "groups": 2},
    {"kernel_size": 3, "padding": 1, "groups": 4, "stride": 2},
    {"kernel_size": 3, "padding": 2, "dilation": 2, "groups": 2, "stride": 2},
    {"kernel_size": 5, "padding": 0, "stride": 3},
]


@pytest.mark.parametrize("options", CONVOLUTIONS, ids=str)
@pytest.mark.parametrize("size", [(6, 6), (5, 8)])
def test_a_convolution_is_bounded_by_its_whole_matrix_and_closely(options, size):
    torch.manual_seed(0)
    conv = nn.Conv2d(4, 8, **options).double()
    truth = dense_norm(conv, (4, *size))
    bound = lipschitz_upper_bound(nn.Sequential(conv), (4, *size))
    assert truth <= bound
    # images this small feel the difference between a torus and zero padding, and a stride drops outputs
    loose = 1.35 * (1 if conv.stride == (1, 1) else math.prod(conv.stride))
    assert bound <= loose * truth


@given(st.integers(0, 10**6), st.integers(1, 3), st.integers(1, 4), st.integers(0, 2), st.integers(3, 7))
@settings(max_examples=30, deadline=None)
def test_convolution_norm_is_never_below_the_dense_norm(seed, inputs, kernel, padding, size):
    weight = torch.randn(2, inputs, kernel, kernel, generator=seeded(seed), dtype=torch.float64)
    if kernel > size + 2 * padding:
        return
    truth = dense_norm(lambda x: F.conv2d(x, weight, padding=padding), (inputs, size, size))
    bound = convolution_norm(weight, (size, size), (padding, padding))
    assert bound >= truth * (1 - 1e-12)
    # the whole kernel summed up, channel by channel, is an older and looser bound
    assert bound <= float(weight.abs().sum()) + 1e-9


def test_a_convolution_on_a_large_image_is_nearly_exact():
    weight = torch.randn(2, 2, 3, 3, generator=seeded(), dtype=torch.float64)
    truth = dense_norm(lambda x: F.conv2d(x, weight, padding=1), (2, 20, 20))
    assert truth <= convolution_norm(weight, (20, 20), (1, 1)) <= 1.02 * truth


def test_linear_layers_are_exact_and_multiply():
    torch.manual_seed(0)
    layers = nn.Linear(12, 7).double(), nn.Linear(7, 5).double()
    norms = [float(torch.linalg.matrix_norm(layer.weight.detach(), ord=2)) for layer in layers]
    one = nn.Sequential(nn.Flatten(), layers[0])
    assert lipschitz_upper_bound(one, (3, 2, 2)) == pytest.approx(norms[0], rel=1e-8)
    assert lipschitz_upper_bound(one, (3, 2, 2)) >= norms[0]
    two = nn.Sequential(nn.Flatten(), layers[0], nn.ReLU(), layers[1])
    assert lipschitz_upper_bound(two, (3, 2, 2)) == pytest.approx(norms[0] * norms[1], rel=1e-8)
    images = torch.rand(4, 3, 2, 2, generator=seeded(), dtype=torch.float64)
    assert lipschitz_lower_bound(one, images, iterations=200) == pytest.approx(norms[0], rel=1e-6)


def test_normalisation_counts_its_smallest_deviation():
    layer = Normalize([0.5, 0.5], [0.25, 0.1]).double()
    assert lipschitz_upper_bound(layer, (2, 3, 3)) == pytest.approx(10, rel=1e-6)
    torch.manual_seed(0)
    conv = nn.Conv2d(2, 3, 3, padding=1).double()
    both = nn.Sequential(layer, conv)
    truth = dense_norm(both, (2, 5, 5))
    merged = lipschitz_upper_bound(both, (2, 5, 5))
    assert truth <= merged
    assert merged < 10 * lipschitz_upper_bound(nn.Sequential(conv), (2, 5, 5))


def test_batch_norm_counts_its_statistics():
    norm = randomise(nn.BatchNorm2d(3))
    truth = dense_norm(norm, (3, 4, 4))
    assert lipschitz_upper_bound(norm, (3, 4, 4)) == pytest.approx(truth, rel=1e-8)
    torch.manual_seed(0)
    merged = nn.Sequential(nn.Conv2d(2, 3, 3, padding=1).double(), norm)
    truth = dense_norm(merged, (2, 6, 6))
    bound = lipschitz_upper_bound(merged, (2, 6, 6))
    assert truth <= bound <= 1.2 * truth
    norm.running_var.mul_(0.01)  # pyright: ignore[reportOptionalMemberAccess]
    assert lipschitz_upper_bound(merged, (2, 6, 6)) > 5 * bound


def test_a_residual_block_adds_its_shortcut():
    torch.manual_seed(0)
    identity = randomise(ResidualBlock(4, 4, 1))
    for conv in (identity.conv1, identity.conv2):
        conv.weight.data.zero_()
    assert lipschitz_upper_bound(identity, (4, 5, 5)) == pytest.approx(1, rel=1e-6)
    for stride, inputs in ((1, 4), (2, 4), (1, 3)):
        block = randomise(ResidualBlock(inputs, 4, stride))
        images = torch.rand(6, inputs, 6, 6, generator=seeded(), dtype=torch.float64)
        assert 0 < lipschitz_lower_bound(block, images) <= lipschitz_upper_bound(block, (inputs, 6, 6))


@pytest.mark.parametrize(
    ("pool", "expected"),
    [
        (nn.AdaptiveAvgPool2d(1), 1 / 6),
        (nn.AvgPool2d(2), 1 / 2),
        (nn.AvgPool2d(3, stride=2, padding=1), None),
        (nn.MaxPool2d(2), 1.0),
        (nn.MaxPool2d(3, stride=2), 2.0),
    ],
    ids=str,
)
def test_pooling(pool, expected):
    bound = lipschitz_upper_bound(nn.Sequential(pool), (2, 6, 6))
    if expected is not None:
        assert bound == pytest.approx(expected, rel=1e-6)
    if not isinstance(pool, nn.MaxPool2d):
        truth = dense_norm(pool, (2, 6, 6))
        assert truth <= bound <= 2.2 * truth
    else:
        a, b = torch.randn(2, 500, 2, 6, 6, generator=seeded(), dtype=torch.float64)
        assert (pool(a) - pool(b)).flatten(1).norm(dim=1).div((a - b).flatten(1).norm(dim=1)).max() <= bound


def test_overlapping_max_pooling_can_stretch_that_much():
    """One peak that is in four windows: a bound of 1 would be wrong."""
    image = torch.zeros(1, 1, 5, 5, dtype=torch.float64)
    peak = image.clone()
    peak[0, 0, 2, 2] = 1
    pool = nn.MaxPool2d(3, stride=2)
    assert float((pool(peak) - pool(image)).norm()) == 2
    assert lipschitz_upper_bound(nn.Sequential(pool), (1, 5, 5)) >= 2


def encoders():
    torch.manual_seed(0)
    plain = SmallCNN((1, 8, 8), width=4, embedding_dim=6)
    resnet = ResNet18(width=4, mean=[0.4, 0.5, 0.6], std=[0.2, 0.25, 0.3])
    return {
        "small-cnn": (plain.eval().double(), (1, 8, 8)),
        "resnet18": (resnet.eval().double(), (3, 16, 16)),
        "resnet18, trained statistics": (randomise(ResNet18(width=4, mean=[0.5] * 3, std=[0.2] * 3)), (3, 16, 16)),
    }


@pytest.mark.parametrize("name", ["small-cnn", "resnet18", "resnet18, trained statistics"])
def test_lower_is_below_upper_and_pairs_lie_below_both(name):
    encoder, shape = encoders()[name]
    upper = lipschitz_upper_bound(encoder, shape)
    a = torch.rand(64, *shape, generator=seeded(1), dtype=torch.float64)
    lower = lipschitz_lower_bound(encoder, a[:8])
    assert 0 < lower <= upper < math.inf
    with torch.no_grad():
        for scale in (1e-3, 1.0):
            b = a + scale * torch.randn(a.shape, generator=seeded(2), dtype=torch.float64)
            gain = (encoder(a) - encoder(b)).norm(dim=1) / (a - b).flatten(1).norm(dim=1)
            assert gain.max() <= upper


def test_the_lower_bound_is_a_gain_that_exists():
    """Power iteration reports the norm of a Jacobian, here against the whole of it."""
    encoder, shape = encoders()["small-cnn"]
    image = torch.rand(1, *shape, generator=seeded(), dtype=torch.float64)
    jacobian = torch.func.jacrev(lambda x: encoder(x)[0])(image).flatten(1).detach()
    truth = float(torch.linalg.matrix_norm(jacobian, ord=2))
    found = lipschitz_lower_bound(encoder, image, iterations=100)
    assert found <= truth * (1 + 1e-9)
    assert found == pytest.approx(truth, rel=1e-3)
    # more images can only raise it, and the same seed repeats it
    more = torch.cat([image, torch.rand(3, *shape, generator=seeded(3), dtype=torch.float64)])
    assert lipschitz_lower_bound(encoder, more) == lipschitz_lower_bound(encoder, more)


def test_single_precision_encoders_are_bounded_in_double():
    torch.manual_seed(0)
    encoder = build_encoder("small-cnn", (1, 8, 8), width=4).eval()
    assert lipschitz_upper_bound(encoder, (1, 8, 8)) == lipschitz_upper_bound(encoder.double(), (1, 8, 8))


def test_training_mode_is_refused():
    encoder, shape = encoders()["resnet18"]
    with pytest.raises(ValueError, match=r"evaluation mode, got BatchNorm2d \"bn1\" in training mode"):
        lipschitz_upper_bound(encoder.train(), shape)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("name", ["small-cnn", "lip-mlp", "lip-cnn"])
def test_weights_that_are_not_finite_are_refused_by_name(name, bad):
    """A maximum in Python drops a NaN: max(1.0, nan) is 1."""
    torch.manual_seed(0)
    encoder = build_encoder(name, (1, 8, 8), width=16).eval()
    where, weight = next((where, weight) for where, weight in encoder.named_parameters() if weight.dim() > 1)
    with torch.no_grad():
        weight[0, 0] = bad
    with pytest.raises(ValueError, match=f"encoder: expected finite weights, got NaN or infinity in {where}"):
        lipschitz_upper_bound(encoder, (1, 8, 8))


class Doubled(nn.ReLU):
    """A subclass that does something else than its parent."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return 2 * input


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (nn.Softmax(dim=1), "no Lipschitz bound is known for the layer Softmax"),
        (nn.GELU(), "no Lipschitz bound is known for the layer GELU"),
        (Doubled(), "no Lipschitz bound is known for the layer Doubled"),
        (nn.Conv2d(2, 2, 3, padding=1, padding_mode="circular"), "expected zero padding given in pixels, got circular"),
        (nn.Conv2d(2, 2, 3, padding="same"), "expected zero padding given in pixels"),
        (nn.AdaptiveAvgPool2d(2), "adaptive pooling to 1 x 1, got 2"),
        (nn.AvgPool2d(2, ceil_mode=True), "average pooling with its plain divisor"),
        (nn.MaxPool2d(2, dilation=2), "max pooling without dilation, got 2"),
        (nn.BatchNorm2d(2, track_running_stats=False), "batch norm with running statistics"),
    ],
    ids=str,
)
def test_a_layer_without_a_bound_is_refused(layer, message):
    with pytest.raises(TypeError, match=message):
        lipschitz_upper_bound(nn.Sequential(layer).eval(), (2, 6, 6))


class Louder(nn.Conv2d):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return 10 * super().forward(input)


class LouderInside(nn.Conv2d):
    def _conv_forward(self, input, weight, bias):
        return 10 * super()._conv_forward(input, weight, bias)


class Brighter(Normalize):
    def forward(self, images):
        return 10 * super().forward(images)


class Wilder(nn.BatchNorm2d):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return 10 * super().forward(input)


def plain_parts():
    torch.manual_seed(0)
    return {
        "normalize": Normalize([0.5, 0.5], [0.2, 0.3]),
        "conv": nn.Conv2d(2, 2, 3, padding=1),
        "norm": nn.BatchNorm2d(2),
    }


@pytest.mark.parametrize(
    ("place", "layer"),
    [
        ("normalize", Brighter([0.5, 0.5], [0.2, 0.3])),
        ("conv", Louder(2, 2, 3, padding=1)),
        ("conv", LouderInside(2, 2, 3, padding=1)),
        ("norm", Wilder(2)),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else value,
)
def test_a_layer_that_computes_something_else_is_refused_among_its_neighbours_too(place, layer):
    """Neighbours are merged before their norm is taken: none may slip through on the way."""
    chain = nn.Sequential(*(plain_parts() | {place: layer}).values()).eval()
    with pytest.raises(TypeError, match=f"no Lipschitz bound is known for the layer {type(layer).__name__}"):
        lipschitz_upper_bound(chain, (2, 6, 6))


@pytest.mark.parametrize("place", ["normalize", "conv", "norm"])
@pytest.mark.parametrize("way", ["attribute", "call", "hook", "pre-hook"])
def test_a_layer_that_was_changed_in_place_is_refused(place, way):
    parts = plain_parts()
    chain, layer = nn.Sequential(*parts.values()).eval(), parts[place]
    assert lipschitz_upper_bound(chain, (2, 6, 6)) > 0
    if way == "attribute":
        real = layer.forward
        layer.forward = lambda images: 10 * real(images)
    elif way == "call":
        own = layer._call_impl
        layer._call_impl = lambda images: 10 * own(images)
    elif way == "hook":
        layer.register_forward_hook(lambda module, inputs, output: 10 * output)
    else:
        layer.register_forward_pre_hook(lambda module, inputs: (10 * inputs[0],))
    with pytest.raises(TypeError, match=f"no Lipschitz bound is known for the layer {type(layer).__name__}"):
        lipschitz_upper_bound(chain, (2, 6, 6))


@pytest.mark.parametrize("register", [register_module_forward_hook, register_module_forward_pre_hook])
def test_a_hook_on_all_modules_is_one_on_each(register):
    chain = nn.Sequential(nn.Flatten(), nn.Linear(4, 2)).eval()
    handle = register(lambda *_: None)
    try:
        with pytest.raises(TypeError, match="no Lipschitz bound is known for the layer Sequential"):
            lipschitz_upper_bound(chain, (1, 2, 2))
    finally:
        handle.remove()
    assert lipschitz_upper_bound(chain, (1, 2, 2)) > 0


class Called(nn.Linear):
    def __call__(self, images):
        return 10 * super().__call__(images)


def test_a_layer_that_is_called_in_another_way_is_refused():
    with pytest.raises(TypeError, match="no Lipschitz bound is known for the layer Called"):
        lipschitz_upper_bound(nn.Sequential(nn.Flatten(), Called(4, 2)).eval(), (1, 2, 2))


@pytest.mark.parametrize("name", ["small-cnn", "lip-mlp", "lip-cnn"])
def test_an_encoder_that_was_changed_in_place_is_refused(name):
    torch.manual_seed(0)
    encoder = build_encoder(name, (1, 8, 8), width=16).eval()
    before = lipschitz_upper_bound(encoder, (1, 8, 8))
    # of the chain inside it
    handle = encoder.layers.register_forward_hook(lambda module, inputs, output: 10 * output)
    with pytest.raises(TypeError, match="no Lipschitz bound is known for the layer Sequential"):
        lipschitz_upper_bound(encoder, (1, 8, 8))
    handle.remove()
    assert lipschitz_upper_bound(encoder, (1, 8, 8)) == before


def test_one_layer_at_two_sizes_is_refused():
    conv = nn.Conv2d(1, 1, 3, stride=2, padding=1)
    with pytest.raises(TypeError, match="one Conv2d is used at two sizes"):
        lipschitz_upper_bound(nn.Sequential(conv, conv), (1, 8, 8))


def test_a_lower_bound_needs_images_and_iterations():
    encoder, shape = encoders()["small-cnn"]
    images = torch.rand(2, *shape, dtype=torch.float64)
    with pytest.raises(ValueError, match="at least one of each, got 0 and 20"):
        lipschitz_lower_bound(encoder, images[:0])
    with pytest.raises(ValueError, match="at least one of each, got 2 and 0"):
        lipschitz_lower_bound(encoder, images, iterations=0)
