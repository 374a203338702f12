"""A layer of one's own: it is bounded, certified or refused as the package's layers are."""

import math
import types
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from torch import nn

import clustr_core as cc
from clustr_core.certificates.lipschitz import OWN_LAYERS
from clustr_core.certificates.rounding import embedding_error
from clustr_core.measuring.certified import certificate_table
from clustr_core.models import encoders
from clustr_core.training.recipes import Clustr

ROOT = Path(__file__).resolve().parents[2]
# the example of CONTRIBUTING.md
MY_LAYER = '''\
import math

import torch

import clustr_core as cc


class Scale(torch.nn.Module):
    """A learnt factor."""

    def __init__(self):
        super().__init__()
        self.factor = torch.nn.Parameter(torch.tensor(0.5))

    def forward(self, x):
        return self.factor * x


def rounding(layer, shape, dtype, size):  # one product a number, which may underflow
    limits = torch.finfo(dtype)
    return limits.eps * abs(float(layer.factor)) * size + limits.tiny * math.sqrt(math.prod(shape))


@cc.register_lipschitz(Scale, rounding=rounding)
def lipschitz(layer, shape):
    return abs(float(layer.factor))
'''


@pytest.fixture(autouse=True)
def forgotten():
    """Layers of a test are forgotten after it."""
    with patch.dict(OWN_LAYERS):
        yield


@pytest.fixture
def mine():
    """The example, executed."""
    module = types.ModuleType("my_layer")
    exec(MY_LAYER, vars(module))
    return module


def model_of(*layers, dtype=torch.float64):
    """A classifier on layers of 1 x 4 x 4 pixels, and images."""
    torch.manual_seed(0)
    encoder = nn.Sequential(*layers, nn.Flatten()).to(dtype).eval()
    images = torch.rand(40, 1, 4, 4, dtype=dtype)
    clusters = cc.Clusters(torch.rand(6, 16, dtype=dtype), torch.arange(6) % 3, torch.ones(6, dtype=dtype))
    return cc.ClusterClassifier(encoder, clusters, rule="nearest"), images


def test_contributing_shows_this_layer_in_at_most_twenty_lines():
    assert len([line for line in MY_LAYER.splitlines() if line]) <= 20
    assert f"```python\n{MY_LAYER}```" in (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("factor", [0.5, -3.0, 0.1])
def test_the_example_is_certified_like_a_layer_of_the_package(mine, factor):
    layer = mine.Scale()
    layer.factor.data.fill_(factor)
    model, images = model_of(layer, nn.Dropout(0.5))
    found = cc.certify(model, images)
    assert found.lipschitz == pytest.approx(abs(factor))
    assert found.lipschitz == cc.lipschitz_upper_bound(model.encoder, (1, 4, 4)) >= abs(factor)
    expected = cc.certified_radius(images.flatten(1) * factor, model.clusters, bound="exact", lipschitz=abs(factor))
    torch.testing.assert_close(found.radius, expected, rtol=1e-6, atol=1e-9)
    assert torch.equal(found.prediction, model(images).argmax(dim=1))
    assert (found.radius > 0).all()
    # its rounding is counted, and is more than happens in single precision
    single, images = model_of(layer, dtype=torch.float32)
    with torch.no_grad():
        wrong = single.encoder(images).double() - images.double().flatten(1) * layer.factor.double()
    error = embedding_error(single.encoder, (1, 4, 4))
    assert wrong.norm(dim=1).max() <= error
    assert (wrong.norm(dim=1).max() > 0) == (factor != 0.5)
    assert 0 < error < 1e-5 * max(1, abs(factor))


class Shifted(nn.Module):
    """x + 3: what it makes of a blank image counts where the next layer rounds."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + 3


def test_a_shift_makes_what_follows_round_more():
    cc.register_lipschitz(Shifted, rounding=lambda layer, shape, dtype, size: 0.0)(lambda layer, shape: 1.0)
    conv = nn.Conv2d(1, 1, 3, padding=1)
    plain, shifted = (embedding_error(nn.Sequential(*layers, conv).eval(), (1, 4, 4)) for layers in ([], [Shifted()]))
    # of images in [0, 1] the norm is at most 4, and 3 everywhere has the norm 12
    assert 3 < shifted / plain < 4.1
    given = []
    cc.register_lipschitz(Shifted, rounding=lambda *arguments: given.append(arguments[1:]) or 0.0)(lambda *_: 1.0)
    embedding_error(nn.Sequential(Shifted()).eval(), (1, 4, 4))
    assert given == [((1, 4, 4), torch.float32, 0.0), ((1, 4, 4), torch.float32, 4.0)]


def test_without_a_rounding_it_is_bounded_and_not_certified():
    cc.register_lipschitz(Shifted)(lambda layer, shape: 1.0)
    model, images = model_of(Shifted())
    assert cc.lipschitz_upper_bound(model.encoder, (1, 4, 4)) == pytest.approx(1)
    for given in ({}, {"lipschitz": 1.0}):
        with pytest.raises(TypeError, match=r"no bound on the rounding of the layer Shifted is known.* as rounding="):
            cc.certify(model, images, **given)


@pytest.mark.usefixtures("as_installed")
@pytest.mark.parametrize("version", [0, 1.0, "1", True])
def test_a_version_is_a_count(version):
    with pytest.raises(ValueError, match="version: expected an integer above 0, got"):
        cc.register_lipschitz(Shifted, version=version)


def test_certificates_are_of_the_rules_version(digits, tmp_path, monkeypatch):
    """A corrected rule gives other rows, once its version says so; one that an image disproves gives none."""
    monkeypatch.setenv("CLUSTR_HOME", str(tmp_path))
    monkeypatch.setattr(encoders, "ENCODERS", dict(encoders.ENCODERS))

    @cc.register_encoder("shifted-net")
    def net(image_shape, width, dataset):
        encoder = nn.Sequential(nn.Flatten(), nn.Linear(64, width), Shifted())
        encoder.embedding_dim = width
        return encoder

    def constant(factor, **options):
        cc.register_lipschitz(Shifted, **options)(lambda layer, shape: factor)
        return certificate_table(run, examples=4, dataset=digits, progress=False)["lipschitz"].unique().item()

    recipe = Clustr(encoder="shifted-net", width=16, train_examples=200, epochs=1)
    run = cc.fit(recipe, dataset=digits, progress=False)
    true = constant(1.0)
    assert constant(3.0) == true
    assert constant(3.0, version=2) == pytest.approx(3 * true)
    with pytest.raises(ValueError, match=r"encoder: expected a Lipschitz constant of at most .*, got .* at an image"):
        constant(1e-3, version=3)


class Deeper(Shifted):
    """The same, and another class."""


def nothing(layer):
    return layer


def hooked(layer):
    layer.register_forward_hook(lambda module, inputs, output: 2 * output)
    return layer


def replaced(layer):
    layer.forward = lambda x: 2 * x
    return layer


@pytest.mark.parametrize(("kind", "change"), [(Deeper, nothing), (Shifted, hooked), (Shifted, replaced)])
def test_a_layer_that_may_compute_something_else_is_refused(kind, change):
    cc.register_lipschitz(Shifted, rounding=lambda *_: 0.0)(lambda layer, shape: 1.0)
    model, images = model_of(change(kind()))
    with pytest.raises(TypeError, match=f"no Lipschitz bound is known for the layer {kind.__name__}; register_lipsch"):
        cc.lipschitz_upper_bound(model.encoder, (1, 4, 4))
    with pytest.raises(TypeError, match=f"no bound on the rounding of the layer {kind.__name__} is known"):
        cc.certify(model, images, lipschitz=1.0)


def test_a_layer_in_training_mode_is_refused():
    cc.register_lipschitz(Shifted, rounding=lambda *_: 0.0)(lambda layer, shape: 1.0)
    model, images = model_of(Shifted())
    model.encoder[0].train()
    for given in ({}, {"lipschitz": 1.0}):
        with pytest.raises(ValueError, match="expected evaluation mode, got Shifted in training mode"):
            cc.certify(model, images, **given)
    with pytest.raises(ValueError, match="expected evaluation mode, got Shifted in training mode"):
        cc.lipschitz_upper_bound(model.encoder, (1, 4, 4))


@pytest.mark.parametrize("bound", [-1.0, math.inf, math.nan])
def test_a_bound_that_is_none_is_refused(bound):
    cc.register_lipschitz(Shifted, rounding=lambda *_: 0.0)(lambda layer, shape: bound)
    model, images = model_of(Shifted())
    with pytest.raises(ValueError, match="Shifted: expected a finite Lipschitz bound of at least 0, got"):
        cc.certify(model, images)
    cc.register_lipschitz(Shifted, rounding=lambda *_: bound)(lambda layer, shape: 1.0)
    with pytest.raises(ValueError, match="Shifted: expected a finite bound on its rounding of at least 0, got"):
        cc.certify(model, images)


class Padded(nn.Conv2d):
    """A subclass that computes what its parent does."""


def test_what_cannot_be_registered_is_named(as_installed):
    for layer in (nn.Conv2d, Padded):
        with pytest.raises(ValueError, match=f"one without a rule, got {layer.__name__}, which has that of Conv2d"):
            cc.register_lipschitz(layer)
    for layer in (3, Shifted(), int):
        with pytest.raises(TypeError, match=r"layer: expected a subclass of nn\.Module, got"):
            cc.register_lipschitz(layer)  # pyright: ignore[reportArgumentType]


class Noting(nn.Module):
    """Notes how coarsely a product might be computed while it runs, and while its rules do."""

    def __init__(self):
        super().__init__()
        self.seen = set()

    def note(self, *_) -> float:
        self.seen.add((torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32))
        return 1.0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.note()
        return x


@pytest.mark.parametrize(
    "call",
    [
        lambda model, images: cc.certify(model, images),
        lambda model, images: cc.certify(model, images, lipschitz=1.0),
        lambda model, images: cc.lipschitz_upper_bound(model.encoder, (1, 4, 4)),
        lambda model, images: embedding_error(model.encoder, (1, 4, 4)),
    ],
    ids=["certify", "certify, given L", "lipschitz", "rounding"],
)
def test_no_part_of_a_certificate_is_computed_in_tf32(call):
    layer = Noting()
    cc.register_lipschitz(Noting, rounding=Noting.note)(Noting.note)
    model, images = model_of(layer, dtype=torch.float32)
    kept = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("medium")
    torch.backends.cudnn.allow_tf32 = True
    try:
        call(model, images)
        assert layer.seen == {("highest", False)}
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(kept[0])
        torch.backends.cudnn.allow_tf32 = kept[1]
