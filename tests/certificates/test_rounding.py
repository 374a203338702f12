"""How far rounding carries an embedding: the bound against float64, image by image, and what a certificate pays."""

import copy
import math

import pytest
import torch
from torch import nn

from clustr_core.certificates import rounding
from clustr_core.certificates.ladder import certified_radius, certify
from clustr_core.certificates.lipschitz import lipschitz_upper_bound
from clustr_core.certificates.rounding import embedding_error
from clustr_core.models.classifiers import ClusterClassifier
from clustr_core.models.clusters import Clusters
from clustr_core.models.encoders import LipschitzNet, Normalize, ResidualBlock, build_encoder
from clustr_core.models.one_lipschitz import (
    AOLLinear,
    MaxMin,
    OrthogonalPointwise,
    SLLConv2d,
    SLLLinear,
    fold_parametrizations,
)
from clustr_core.training.recipes import CERTIFIABLE, ONE_LIPSCHITZ

ENCODERS = {
    "lip-mlp": ("lip-mlp", (1, 8, 8), 16),
    "lip-mlp, colour": ("lip-mlp", (3, 5, 4), 6),
    "lip-cnn": ("lip-cnn", (1, 8, 8), 16),
    "lip-cnn, colour": ("lip-cnn", (3, 8, 8), 48),
    "lip-cnn-aol": ("lip-cnn-aol", (1, 8, 8), 16),
}
KINDS = {"as made": (1, 0), "small": (0.1, 1), "random": (1, 1), "large": (10, 1), "huge": (300, 3)}


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def encoder_of(name, *, scale=1.0, noise=0.0, dtype=torch.float32):
    """A baked encoder; every weight and bias is moved and scaled, so that nothing is orthogonal any more."""
    kind, shape, width = ENCODERS[name]
    torch.manual_seed(0)
    encoder = fold_parametrizations(build_encoder(kind, shape, width=width)).eval()
    g = seeded(1)
    with torch.no_grad():
        for part, p in encoder.named_parameters():
            p.add_(
                noise * p.abs().mean() * torch.randn(p.shape, generator=g)
                + 0.1 * noise * torch.rand(p.shape, generator=g)
            )
            # the logarithm of a scale is one already
            p.mul_(1 if part.endswith("log_scale") else scale)
    return encoder.to(dtype), shape


def images_of(shape, dtype=torch.float32):
    """At random, black, white, half, and of random corners of the pixels' cube."""
    g = seeded(2)
    random = torch.rand(30, *shape, generator=g, dtype=torch.float64)
    corners = torch.rand(30, *shape, generator=g, dtype=torch.float64).round()
    plain = torch.tensor([0.0, 1.0, 0.5, 1 / 3]).double()[:, None, None, None].expand(4, *shape)
    return torch.cat([random, corners, plain]).to(dtype)


def exact(encoder):
    """The encoder's own numbers in float64: the function that it means, whose rounding is 2^29 times smaller."""
    wide = copy.deepcopy(encoder)
    for layer, mine in zip(wide.modules(), encoder.modules(), strict=True):
        for name in ("step", "effective_weight"):
            if hasattr(mine, name):
                value = getattr(mine, name)().detach().double()
                setattr(layer, name, lambda value=value: value)
    return wide.double()


def wrong_by(encoder, images):
    """||fl(f(x)) - f(x)|| of each image."""
    with torch.no_grad():
        return (encoder(images).double() - exact(encoder)(images.double())).norm(dim=1)


@pytest.mark.parametrize(("scale", "noise"), KINDS.values(), ids=KINDS.keys())
@pytest.mark.parametrize("name", ENCODERS)
def test_no_image_is_wrong_by_more(name, scale, noise):
    encoder, shape = encoder_of(name, scale=scale, noise=noise)
    error, found = embedding_error(encoder, shape), wrong_by(encoder, images_of(shape))
    assert 0 < found.max() <= error < math.inf
    # and none of images far from what training sees: one bright pixel, one dark
    spots = torch.eye(math.prod(shape)).reshape(-1, *shape)[:40]
    assert wrong_by(encoder, spots).max() <= error
    assert wrong_by(encoder, 1 - spots).max() <= error


@pytest.mark.parametrize("name", ENCODERS)
def test_and_of_the_worst_image_that_can_be_found(name):
    """Images altered, bit by bit, towards larger errors."""
    encoder, shape = encoder_of(name, noise=1.0)
    images = images_of(shape)
    best, g = wrong_by(encoder, images), seeded(3)
    start = best.mean()
    for _ in range(8):
        tried = (images + 0.2 * torch.randn(images.shape, generator=g)).clamp(0, 1)
        found = wrong_by(encoder, tried)
        better = found > best
        images[better], best[better] = tried[better], found[better]
    assert best.mean() > start
    assert best.max() <= embedding_error(encoder, shape)


@pytest.mark.parametrize("name", ENCODERS)
def test_each_dtype_pays_its_own_rounding(name):
    encoder, shape = encoder_of(name)
    single, double = (
        embedding_error(copy.deepcopy(encoder).to(dtype), shape) for dtype in (torch.float32, torch.float64)
    )
    assert 0 < double < 1e-8
    assert single / double == pytest.approx(2**29, rel=0.02)
    assert embedding_error(encoder.double(), shape) == double


def test_float64_is_next_to_nothing_at_the_books_sizes():
    for kind, shape, width in (("lip-mlp", (1, 8, 8), 64), ("lip-mlp", (1, 28, 28), 128), ("lip-cnn", (1, 16, 16), 16)):
        encoder = fold_parametrizations(build_encoder(kind, shape, width=width)).double()
        assert 0 < embedding_error(encoder, shape) < 1e-8


def test_it_is_the_formula_layer_by_layer():
    """Two dense layers by hand: |W| in place of W, gamma_n of the dot products, and what the first layer hands on."""
    encoder, shape = encoder_of("lip-mlp", noise=1.0)
    u = 2.0**-24

    def gamma(n):
        return n * u / (1 - n * u)

    size, error = 0.5 * 8, gamma(2) * 0.5 * 8
    for layer in encoder.layers:
        if isinstance(layer, nn.Linear):
            weight, bias = layer.weight.detach().double(), layer.bias.detach().double()
            norm, absolute = (float(torch.linalg.svdvals(w)[0]) for w in (weight, weight.abs()))
            local = gamma(weight.shape[1] + 1) * (absolute * (size + error) + float(bias.norm()))
            size, error = norm * size + float(bias.norm()), norm * error + local
    assert embedding_error(encoder, shape) == pytest.approx(error, rel=1e-6)


def test_layers_that_only_move_numbers_cost_nothing():
    assert embedding_error(nn.Flatten(), (3, 4, 4)) == 0
    chain = LipschitzNet([nn.PixelUnshuffle(2), MaxMin(), nn.ReLU(), nn.Identity(), nn.Flatten()], 48)
    assert embedding_error(chain, (3, 4, 4)) == 0


def trained(encoder, scale=1.0):
    """Weights, and batch-norm statistics far from 0 and 1, as after training."""
    g = seeded(5)
    for layer in encoder.modules():
        if isinstance(layer, nn.modules.batchnorm._BatchNorm):
            layer.running_mean.copy_(3 * torch.randn(layer.num_features, generator=g))
            layer.running_var.copy_(0.05 + 3 * torch.rand(layer.num_features, generator=g))
            layer.weight.data = torch.randn(layer.num_features, generator=g)
            layer.bias.data = torch.randn(layer.num_features, generator=g)
        elif isinstance(layer, nn.Conv2d | nn.Linear):
            layer.weight.data.mul_(scale)
    return encoder.eval()


ORDINARY = {
    "small-cnn": lambda: build_encoder("small-cnn", (3, 8, 8), width=4),
    "resnet18": lambda: build_encoder("resnet18", (3, 8, 8), width=8),
    "normalised": lambda: nn.Sequential(Normalize([0.5] * 3, [0.2, 0.1, 0.3]), nn.Conv2d(3, 4, 3, padding=1)),
    "late": lambda: nn.Sequential(nn.Conv2d(3, 3, 1), Normalize([0.5] * 3, [0.2, 0.1, 0.3]), nn.Conv2d(3, 4, 3)),
    "strided": lambda: nn.Sequential(nn.Conv2d(3, 6, 3, stride=2, padding=2, dilation=2, groups=3), nn.BatchNorm2d(6)),
    "block": lambda: nn.Sequential(ResidualBlock(3, 5, 2), ResidualBlock(5, 5, 1)),
    "alone": lambda: nn.Sequential(nn.BatchNorm2d(3), nn.ReLU(), nn.BatchNorm2d(3)),
    "average": lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.AvgPool2d(3, stride=2, padding=1)),
    "global": lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1)),
    "average of pixels": lambda: nn.AvgPool2d(3, stride=1),
    "maximum": lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.MaxPool2d(3, stride=2), nn.Conv2d(4, 3, 2)),
    "dense": lambda: nn.Sequential(nn.Flatten(), nn.Linear(192, 20), nn.BatchNorm1d(20), AOLLinear(20, 9)),
    "chains in chains": lambda: nn.Sequential(
        nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()), nn.Sequential(nn.Flatten())
    ),
}


@pytest.mark.parametrize("scale", [1.0, 30.0])
@pytest.mark.parametrize("name", ORDINARY)
def test_no_image_is_wrong_by_more_in_an_ordinary_encoder(name, scale):
    torch.manual_seed(0)
    encoder, images = trained(ORDINARY[name](), scale), images_of((3, 8, 8))
    with torch.no_grad():
        found = (encoder(images).double() - exact(encoder)(images.double())).flatten(1).norm(dim=1).max()
    error = embedding_error(encoder, (3, 8, 8))
    assert 0 < found <= error < math.inf
    if any(True for _ in encoder.parameters()):
        assert embedding_error(copy.deepcopy(encoder).double(), (3, 8, 8)) == pytest.approx(error / 2**29, rel=0.05)


def test_a_normalisation_behind_other_layers_is_not_given_pixels():
    """What it returns is as large as what it is given, and the next layer rounds as much."""
    torch.manual_seed(0)
    mix = fold_parametrizations(OrthogonalPointwise(1, 1))
    mix.linear.weight.data.fill_(1000.0)
    last = nn.Linear(64, 64)
    encoder = nn.Sequential(mix, Normalize([0.5], [1.0]), nn.Flatten(), last)
    absolute = float(torch.linalg.matrix_norm(last.weight.detach().double().abs(), ord=2))
    assert embedding_error(encoder, (1, 8, 8)) >= 65 * 2.0**-24 * absolute * 999 * 8


def test_the_bound_would_fail_without_its_parts(monkeypatch):
    """So the tests above can fail: a thousandth of it is less than what happens."""
    real = rounding._gamma
    monkeypatch.setattr(rounding, "_gamma", lambda terms, like: real(terms, like) / 1000)
    with pytest.raises(AssertionError):
        test_no_image_is_wrong_by_more("lip-mlp", 1, 1)


class Doubled(nn.ReLU):
    """A subclass of a layer that costs nothing, which this one does not."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return 2 * input


class Changed(SLLConv2d):
    def forward(self, images):
        return 2 * super().forward(images)


@pytest.mark.parametrize(
    ("encoder", "layer"),
    [
        (lambda: fold_parametrizations(build_encoder("lip-cnn-cayley", (3, 8, 8), width=48)), "CayleyConv2d"),
        (lambda: LipschitzNet([nn.Flatten(), SLLLinear(192)], 192), "SLLLinear"),
        (lambda: LipschitzNet([nn.Flatten(), nn.Linear(192, 3), nn.Tanh()], 3), "Tanh"),
        (lambda: nn.Sequential(nn.Flatten(), nn.Linear(192, 3), nn.GELU()), "GELU"),
        (lambda: LipschitzNet([Doubled(), nn.Flatten()], 192), "Doubled"),
        (lambda: LipschitzNet([Changed(3), nn.Flatten()], 192), "Changed"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_layer_without_a_bound_is_refused(encoder, layer):
    with pytest.raises(TypeError, match=f"encoder: no bound on the rounding of the layer {layer} is known"):
        embedding_error(encoder(), (3, 8, 8))


@pytest.mark.parametrize("name", ONE_LIPSCHITZ)
def test_the_encoders_that_certify_are_those_whose_rounding_is_bounded(name):
    encoder = fold_parametrizations(build_encoder(name, (1, 8, 8), width=16))
    if name in CERTIFIABLE:
        assert embedding_error(encoder, (1, 8, 8)) > 0
    else:
        with pytest.raises(TypeError, match="no bound on the rounding"):
            embedding_error(encoder, (1, 8, 8))


# what a certificate pays


def classifier(name="lip-mlp", dtype=torch.float32, rule="nearest"):
    encoder, shape = encoder_of(name, dtype=dtype)
    images = images_of(shape, dtype)
    with torch.no_grad():
        embeddings = encoder(images)
    labels = torch.tensor([0, 0, 1, 2, 2])
    clusters = Clusters(embeddings[:5].clone(), labels, torch.full((5,), 0.1, dtype=dtype))
    return ClusterClassifier(encoder, clusters, rule=rule).eval(), images, shape


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", ["lip-mlp", "lip-cnn"])
@pytest.mark.parametrize(
    ("rule", "bound"), [("nearest", "nearest"), ("nearest", "exact"), ("soft", "exact"), ("soft", "soft-dual")]
)
def test_certify_takes_off_the_rounding_of_two_embeddings(dtype, name, rule, bound):
    model, images, shape = classifier(name, dtype, rule)
    error, lipschitz = embedding_error(model.encoder, shape), lipschitz_upper_bound(model.encoder, shape)
    whole = certified_radius(model.embed(images).detach(), model.clusters, bound=bound, rule=rule, lipschitz=1.0)
    expected = ((whole.double() - 2 * error) / lipschitz).clamp_min(0)
    found = certify(model, images, bound=bound).radius
    assert found.dtype == dtype
    torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=1e-6 if dtype == torch.float32 else 1e-12)
    assert (found > 0).sum() > 10
    # it is some of the radius in single precision, and nothing to speak of in double
    lost = (whole.double() / lipschitz - found.double())[found > 0]
    assert lost.max() < (1 if dtype == torch.float32 else 1e-8)
    if dtype == torch.float32:
        assert lost.min() > error


@pytest.mark.parametrize("name", ["lip-mlp", "lip-cnn"])
def test_the_class_that_certify_picks_its_bound_for_pays_too(name):
    model, images, shape = classifier(name)
    given = {"embedding_error": embedding_error(model.encoder, shape)}
    given["lipschitz"] = lipschitz_upper_bound(model.encoder, shape)
    embeddings = model.embed(images).detach()
    expected = certified_radius(embeddings, model.clusters, bound="exact", **given)
    assert torch.equal(certify(model, images).radius, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", ["small-cnn", "resnet18"])
def test_an_ordinary_encoder_pays_too(name, dtype):
    torch.manual_seed(0)
    encoder = build_encoder(name, (1, 8, 8), width=8).to(dtype).eval()
    images = images_of((1, 8, 8), dtype)
    with torch.no_grad():
        embeddings = encoder(images)
    clusters = Clusters(embeddings[:3].clone(), torch.arange(3), torch.full((3,), 0.1, dtype=dtype))
    found = certify(ClusterClassifier(encoder, clusters, rule="nearest"), images, bound="nearest", lipschitz=2.0)
    error = embedding_error(encoder, (1, 8, 8))
    assert found.rounding == error > 0
    whole = certified_radius(embeddings, clusters, bound="nearest", lipschitz=2.0)
    paid = certified_radius(embeddings, clusters, bound="nearest", lipschitz=2.0, embedding_error=error)
    assert torch.equal(found.radius, paid)
    assert (found.radius <= whole).all()
    if dtype == torch.float64:
        torch.testing.assert_close(found.radius, whole, rtol=0, atol=1e-5)


class Confused(nn.ReLU):
    """A layer with a fault of its own."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return input + "1"  # pyright: ignore[reportOperatorIssue]


def twice():
    conv = nn.Conv2d(1, 1, 3, stride=2, padding=1)
    return nn.Sequential(conv, conv)


@pytest.mark.parametrize(
    ("encoder", "words"),
    [
        (lambda: nn.Tanh(), "no bound on the rounding of the layer Tanh is known"),
        (lambda: nn.Sequential(nn.ReLU(), nn.GELU()), "no bound on the rounding of the layer GELU is known"),
        (lambda: nn.Sequential(nn.Conv2d(1, 1, 1), Doubled()), "no bound on the rounding of the layer Doubled is"),
        (lambda: build_encoder("lip-cnn-cayley", (1, 8, 8), width=16), "no bound on the rounding of the layer Cayley"),
        (lambda: nn.Sequential(nn.Flatten(), SLLLinear(64)), "no bound on the rounding of the layer SLLLinear is"),
        (lambda: nn.Conv2d(1, 1, 3, padding=1, padding_mode="circular"), "expected zero padding given in pixels"),
        (lambda: nn.Conv2d(1, 1, 3, padding="same"), "expected zero padding given in pixels"),
        (lambda: nn.BatchNorm2d(1, track_running_stats=False), "batch norm with running statistics, got one without"),
        (lambda: nn.AvgPool2d(2, ceil_mode=True), "average pooling with its plain divisor"),
        (lambda: nn.AdaptiveAvgPool2d(2), "adaptive pooling to 1 x 1, got 2"),
        (lambda: nn.MaxPool2d(2, dilation=2), "max pooling without dilation"),
        (twice, "one Conv2d is used at two sizes"),
        (lambda: Confused(), "unsupported operand"),
    ],
)
def test_what_has_no_bound_on_its_rounding_is_refused_and_not_certified_with_none(encoder, words):
    """With a Lipschitz constant as well, which says nothing about rounding."""
    torch.manual_seed(0)
    encoder = nn.Sequential(encoder(), nn.Flatten()).eval()
    images = torch.rand(3, 1, 8, 8)
    dim = 64 if isinstance(encoder[0], Confused) else encoder(images).shape[1]
    model = ClusterClassifier(encoder, Clusters(torch.randn(3, dim), torch.arange(3), torch.ones(3)), rule="nearest")
    with pytest.raises(TypeError, match=words):
        certify(model, images, lipschitz=1.0)


# what evaluation mode means


DROPOUTS = [nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout]


def with_layer(layer):
    """A classifier with a layer behind its convolution, or where it takes vectors behind these, and images."""
    torch.manual_seed(0)
    behind = [nn.Flatten(), layer] if isinstance(layer, nn.Dropout1d) else [layer, nn.Flatten()]
    encoder = nn.Sequential(nn.Conv2d(1, 2, 3, padding=1), *behind, nn.Linear(128, 5)).double().eval()
    images, centroids = torch.rand(6, 1, 8, 8).double(), torch.randn(3, 5).double()
    return ClusterClassifier(encoder, Clusters(centroids, torch.arange(3), torch.ones(3).double())), images


@pytest.mark.parametrize("kind", DROPOUTS)
def test_dropout_that_is_off_is_the_identity(kind):
    layer = kind(0.5)
    model, images = with_layer(layer)
    plain, _ = with_layer(nn.Identity())
    found, expected = certify(model, images), certify(plain, images)
    assert (found.lipschitz, found.rounding) == (expected.lipschitz, expected.rounding)
    assert torch.equal(found.radius, expected.radius)
    assert (found.radius > 0).any()
    layer.train().p = 0.0  # it drops nothing then
    assert torch.equal(certify(model, images).radius, expected.radius)


@pytest.mark.parametrize(
    ("layer", "words"),
    [
        *[(kind(0.5), kind.__name__) for kind in DROPOUTS],
        (nn.RReLU(), "RReLU"),
        (nn.MultiheadAttention(4, 2, dropout=0.1), "MultiheadAttention"),
        (nn.BatchNorm2d(2), "BatchNorm2d"),
        (nn.SyncBatchNorm(2), "SyncBatchNorm"),
        (nn.utils.parametrizations.spectral_norm(nn.Conv2d(2, 2, 1)), "_SpectralNorm"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
@pytest.mark.parametrize("deep", [False, True])
def test_a_layer_that_is_no_function_of_one_image_is_refused(layer, words, deep):
    """Whatever constant is given, and wherever it stands."""
    model, images = with_layer(nn.Sequential(nn.Identity(), nn.Sequential(layer)) if deep else layer)
    layer.train()
    for call in (
        lambda: certify(model, images),
        lambda: certify(model, images, lipschitz=1.0),
        lambda: lipschitz_upper_bound(model.encoder, (1, 8, 8)),
        lambda: embedding_error(model.encoder, (1, 8, 8)),
    ):
        with pytest.raises(
            ValueError, match=f'encoder: expected evaluation mode, got {words} "[^"]*" in training mode'
        ):
            call()


def test_a_chain_of_dense_layers_pays_as_well():
    torch.manual_seed(0)
    encoder = nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, 4))
    images = images_of((1, 8, 8))
    error, lipschitz = embedding_error(encoder, (1, 8, 8)), lipschitz_upper_bound(encoder, (1, 8, 8))
    assert 0 < wrong_by(encoder, images).max() <= error
    clusters = Clusters(encoder(images[:3]).detach(), torch.arange(3), torch.full((3,), 0.1))
    found = certify(ClusterClassifier(encoder, clusters, rule="nearest"), images, bound="nearest").radius
    whole = certified_radius(encoder(images).detach(), clusters, bound="nearest")
    assert found.tolist() == pytest.approx(((whole - 2 * error).clamp_min(0) / lipschitz).tolist(), rel=1e-5, abs=1e-7)
    assert (found > 0).any()


@pytest.mark.parametrize("bound", ["triangle", "nearest", "pairwise", "exact"])
def test_twice_the_error_is_taken_off_the_feature_radius(bound):
    model, images, _ = classifier(dtype=torch.float64)
    embeddings = model.embed(images).detach()

    def radius(**options):
        return certified_radius(embeddings, model.clusters, bound=bound, **options)

    whole = radius()
    for error in (0.0, 1e-3, 0.05, 10.0):
        torch.testing.assert_close(radius(embedding_error=error), (whole - 2 * error).clamp_min(0), rtol=0, atol=1e-15)
        # of the feature radius: before it is divided
        torch.testing.assert_close(radius(embedding_error=error, lipschitz=4.0), (whole - 2 * error).clamp_min(0) / 4)
    assert (radius(embedding_error=10.0) == 0).all()


@pytest.mark.parametrize("error", [-1e-9, math.inf, math.nan])
def test_an_error_that_is_none_is_refused(error, as_installed):
    model, images, _ = classifier()
    with pytest.raises(ValueError, match="embedding_error: expected 0 or a positive finite number, got"):
        certified_radius(model.embed(images).detach(), model.clusters, embedding_error=error)


def test_a_class_cannot_change_by_rounding_inside_the_radius():
    """On the segment to the border between two centroids, in float32, and with the error of rounding laid on top.

    The embedding is the pixels themselves, to which each evaluation may add an error of length E in any direction.
    """
    g = seeded(4)
    centroids = torch.tensor([[0.25, 0.5], [0.75, 0.5]], dtype=torch.float64)
    clusters = Clusters(centroids, torch.arange(2), torch.ones(2, dtype=torch.float64))
    error = 0.02
    images = torch.rand(200, 2, generator=g, dtype=torch.float64)

    def evaluated(points, worst):
        """An embedding as a rounded computation may return it: moved along the line of the centroids."""
        return points + error * torch.tensor([worst, 0.0], dtype=torch.float64)

    for first in (-1.0, 1.0):
        seen = evaluated(images, first)
        radius = certified_radius(seen, clusters, embedding_error=error)
        own = seen[:, 0] > 0.5
        assert (radius > 0).any()
        for second in (-1.0, 1.0):
            towards = torch.where(own, -1.0, 1.0).double()[:, None] * torch.tensor([1.0, 0.0]).double()
            moved = evaluated(images + radius[:, None] * (1 - 1e-9) * towards, second)
            certified = radius > 0
            assert ((moved[:, 0] > 0.5) == own)[certified].all()
    # half of it would not do
    seen = evaluated(images, 1.0)
    half = certified_radius(seen, clusters, embedding_error=error / 2)
    moved = evaluated(images - half[:, None] * torch.tensor([1.0, 0.0]).double(), -1.0)
    assert ((moved[:, 0] <= 0.5) & (seen[:, 0] > 0.5) & (half > 0)).any()


@pytest.mark.parametrize("shape", [(1, 64, 1), (3, 32, 2)])
def test_a_linear_layer_pays_for_every_place_that_it_is_applied_at(shape):
    """Its input is not flattened: it mixes the last axis, at each place of the others."""
    size = shape[-1]
    torch.manual_seed(0)
    layer = nn.Linear(size, size)
    with torch.no_grad():
        layer.bias.fill_(333.3)
    encoder = nn.Sequential(layer, nn.Flatten()).eval()
    images = images_of(shape)
    far = (encoder(images).double() - exact(encoder)(images.double())).norm(dim=1).amax().item()
    assert 0 < far <= embedding_error(encoder, shape)
