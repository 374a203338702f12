"""What holds for every attack: a caller's mode, strides, narrow logits, and one clear error for what is no model."""

import re
import warnings
from dataclasses import dataclass, fields

import pytest
import torch
from torch import Tensor, nn

from clustr_core.attacks import autoattack as adapter
from clustr_core.attacks.autoattack import PARTS, autoattack, square
from clustr_core.attacks.ball import pgd_endpoint
from clustr_core.attacks.cells import cell_walk
from clustr_core.attacks.gradient import fgsm, pgd
from clustr_core.attacks.losses import margin_loss
from clustr_core.attacks.minimum_norm import MinimumNorm, ddn, fmn, pgd_within, random_search, tightened
from clustr_core.attacks.paper import paper_pgd
from clustr_core.attacks.result import AttackResult
from clustr_core.attacks.temperature import rescaled
from clustr_core.attacks.transfer import transfer
from clustr_core.models.classifiers import ClusterClassifier, LinearClassifier
from clustr_core.models.clusters import Clusters

SHAPE, CLASSES = (3, 8, 8), 5
WALK = {"step_size": 0.02, "steps": 3}
QUERIES = 20


def autoattack_parts(model, images, labels, norm):
    return autoattack(model, images, labels, norm=norm, eps=0.05, parts=PARTS["standard"][:3])


def tightened_pgd(model, images, labels):
    return tightened(model, images, labels, pgd(model, images, labels, eps=0.3, norm="l2", **WALK))


def half_radius(images):
    return torch.full((len(images),), 0.5)


ATTACKS = {
    "pgd": lambda m, x, y: pgd(m, x, y, eps=0.05, restarts=2, **WALK),
    "pgd l2": lambda m, x, y: pgd(m, x, y, eps=0.3, norm="l2", loss="margin", **WALK),
    "fgsm": lambda m, x, y: fgsm(m, x, y, eps=0.05),
    "cell-walk": lambda m, x, y: cell_walk(m, x, y, eps=0.05, **WALK),
    "transfer": lambda m, x, y: transfer(m, m, x, y, eps=0.05, **WALK),
    "autoattack": lambda m, x, y: autoattack_parts(m, x, y, "linf"),
    "autoattack l2": lambda m, x, y: autoattack_parts(m, x, y, "l2"),
    "square": lambda m, x, y: square(m, x, y, norm="linf", eps=0.05, queries=QUERIES),
    "square l2": lambda m, x, y: square(m, x, y, norm="l2", eps=0.5, queries=QUERIES),
    "fmn": lambda m, x, y: fmn(m, x, y, steps=5, restarts=2),
    "ddn": lambda m, x, y: ddn(m, x, y, steps=5),
    "pgd within": lambda m, x, y: pgd_within(m, x, y, radius=half_radius(x), steps=5),
    "random": lambda m, x, y: random_search(m, x, y, radius=half_radius(x), points=10),
    "tightened": tightened_pgd,
    "rescaled": lambda m, x, y: pgd(rescaled(m, x), x, y, eps=0.05, **WALK),
    "paper": lambda m, x, y: paper_pgd(m, x, y, eps=0.05, restarts=2, steps=3),
}  # fmt: skip
LIBRARIES = [name for name in ATTACKS if name.startswith(("autoattack", "square"))]
# a walk asks for an embedding too
ANY_MODEL = [name for name in ATTACKS if name != "cell-walk"]


class Convolutions(nn.Module):
    """A small encoder; with ``layer``, a layer of it whose output may depend on its mode."""

    def __init__(self, layer=None):
        super().__init__()
        self.convolution = nn.Conv2d(3, 8, 3, stride=2)
        self.layer = layer or nn.Tanh()

    def forward(self, images):
        return self.layer(self.convolution(images)).flatten(1)


def classifier(layer=None, seed=0):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LinearClassifier(Convolutions(layer), 72, CLASSES)


def some_images(count=6):
    return torch.rand(count, *SHAPE, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def problem():
    """A network, images of bytes, and labels of which one is wrong when clean."""
    model, images = classifier().eval(), some_images()
    with torch.no_grad():
        labels = model(images).argmax(dim=1)
    labels[0] = (labels[0] + 1) % CLASSES
    return model, images, labels


@pytest.fixture(autouse=True)
def short_library(monkeypatch):
    """AutoAttack's parts with few steps: what is tested here is how they are reached."""
    library = adapter._library

    def shortened(*given):
        made = library(*given)
        made.apgd.n_iter = made.apgd_targeted.n_iter = made.fab.n_iter = 6
        made.apgd.n_restarts = 1
        return made

    monkeypatch.setattr(adapter, "_library", shortened)


def attacked(name, model, images, labels):
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="(model|source): expected logits, but", category=UserWarning)
        return ATTACKS[name](model, images, labels)


def same(ours, theirs):
    assert type(ours) is type(theirs)
    for field in fields(ours):
        assert torch.equal(getattr(ours, field.name), getattr(theirs, field.name)), field.name


# modes of the caller


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("name", ATTACKS)
def test_a_caller_may_have_switched_gradients_off(name, mode, problem):
    model, images, labels = problem
    outside = attacked(name, model, images, labels)
    with mode():
        inside = attacked(name, model, images.clone(), labels.clone())
        assert not torch.is_grad_enabled()
    same(inside, outside)
    assert not any(getattr(inside, field.name).is_inference() for field in fields(inside))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_so_may_the_caller_of_a_path(mode, problem):
    model, images, labels = problem
    size = {"eps": 0.05, **WALK}
    outside = pgd_endpoint(lambda x: margin_loss(model(x), labels), images, images, **size)
    with mode():
        start = images.clone()
        inside = pgd_endpoint(lambda x: margin_loss(model(x), labels), start, start, **size)
    assert torch.equal(inside, outside)


@pytest.mark.parametrize("name", ATTACKS)
def test_clusters_first_used_in_inference_mode(name, problem):
    _, images, labels = problem
    encoder = Convolutions().eval()
    with torch.no_grad():
        clusters = Clusters(encoder(some_images(10)), torch.arange(CLASSES).repeat(2), torch.full((10,), 0.5))
    model = ClusterClassifier(encoder, clusters).eval()
    with torch.inference_mode():
        inside = attacked(name, model, images, labels)
    same(inside, attacked(name, model, images, labels))


# strides


def channels_last(images):
    return images.contiguous(memory_format=torch.channels_last)


def permuted(images):
    return images.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)


def every_second(images):
    return torch.stack([images, 1 - images], dim=4)[..., 0]


def transposed(images):
    return images.transpose(2, 3).contiguous().transpose(2, 3)


@pytest.mark.parametrize("lay_out", [channels_last, permuted, every_second, transposed])
@pytest.mark.parametrize("name", ATTACKS)
def test_strides_change_nothing(name, lay_out, problem):
    model, images, labels = problem
    odd = lay_out(images)
    assert torch.equal(odd, images)
    assert not odd.is_contiguous()
    same(attacked(name, model, odd, torch.stack([labels, labels], dim=1)[:, 0]), attacked(name, model, images, labels))


@pytest.mark.parametrize("name", ATTACKS)
def test_expanded_images(name, problem):
    model, images, labels = problem
    expanded, several = images[:1].expand(4, *SHAPE), labels[1:2].expand(4)
    same(attacked(name, model, expanded, several), attacked(name, model, expanded.contiguous(), several.contiguous()))


@pytest.mark.parametrize("name", ATTACKS)
def test_a_network_with_channels_last(name, problem):
    model, images, labels = problem
    attacked(name, model.to(memory_format=torch.channels_last), images, labels)


# narrow logits


class Mixed(nn.Module):
    """Logits of a precision of their own, as autocast gives them."""

    def __init__(self, model, dtype):
        super().__init__()
        self.model, self.dtype = model, dtype

    def forward(self, images):
        return self.model(images).to(self.dtype)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("name", ANY_MODEL)
def test_logits_of_any_precision(name, dtype, problem):
    model, images, labels = problem
    mixed = Mixed(model, dtype)
    found = attacked(name, mixed, images, labels)
    with torch.no_grad():
        prediction = mixed(found.adversarial).argmax(dim=1)
    success = found.success if isinstance(found, AttackResult) else found.norm.isfinite()
    assert torch.equal(success, prediction != labels)
    assert success.any()


@pytest.mark.parametrize("name", ATTACKS)
def test_a_model_under_autocast(name, problem):
    model, images, labels = problem
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = attacked(name, model, images, labels)
    assert found.adversarial.dtype == torch.float32


@pytest.mark.parametrize("name", LIBRARIES)
def test_libraries_see_float32(name, problem, monkeypatch):
    model, images, labels = problem
    seen, forward = set(), adapter._Counted.forward
    monkeypatch.setattr(adapter._Counted, "forward", lambda self, x: note(forward(self, x)))

    def note(logits):
        seen.add(logits.dtype)
        return logits

    attacked(name, Mixed(model, torch.bfloat16), images, labels)
    assert seen == {torch.float32}


@pytest.mark.parametrize("name", ANY_MODEL)
def test_a_collapsed_model(name):
    """Every logit is 0 everywhere: class 0 is predicted, and no image changes that; no batch of none is asked about."""

    def collapsed(images):
        assert len(images)
        return images.flatten(1) @ torch.zeros(images[0].numel(), CLASSES)

    images, labels = some_images(3), torch.tensor([0, 0, 1])
    found = attacked(name, collapsed, images, labels)
    success = found.success if isinstance(found, AttackResult) else found.norm.isfinite()
    assert success.tolist() == [False, False, True]


# what comes with the result


@pytest.mark.parametrize("name", ATTACKS)
def test_predictions_come_with_the_result(name, problem):
    """Of a minimum norm there are none: it is judged in the whole batch, by the caller's model."""
    model, images, labels = problem
    found = attacked(name, model, images, labels)
    if isinstance(found, MinimumNorm):
        assert not hasattr(found, "prediction")
        return
    with torch.no_grad():
        assert torch.equal(found.clean_prediction, model(images).argmax(dim=1))
        assert torch.equal(found.prediction, model(found.adversarial).argmax(dim=1))
    assert torch.equal(found.success, found.prediction != labels)
    assert torch.equal(found.clean_correct, found.clean_prediction == labels)


# what is refused before work is done


@dataclass
class Calls:
    """A model that counts how often it is asked."""

    model: nn.Module
    count: int = 0

    def __call__(self, images: Tensor) -> Tensor:
        self.count += 1
        return self.model(images)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda g: (g, g), TypeError, "expected a tensor of logits [6, class], got a tuple of 2 (shape [6, 5], "),
        (lambda g: {"logits": g}, TypeError, "expected a tensor of logits [6, class], got a dict with the keys ['log"),
        (lambda g: None, TypeError, "expected a tensor of logits [6, class], got a NoneType"),
        (lambda g: g[1:], ValueError, "model: expected logits [6, class], got shape [5, 5]"),
        (lambda g: g[:, :, None], ValueError, "model: expected logits [6, class], got shape [6, 5, 1]"),
        (lambda g: g[:, :3], ValueError, "labels: expected classes in 0..2, got "),
        (lambda g: g * torch.nan, ValueError, "expected logits, got NaN"),
        (lambda g: g + torch.inf, ValueError, "expected a finite largest logit in each row, got an infinite one"),
    ],
    ids=["tuple", "dict", "none", "rows", "dimensions", "classes", "nan", "inf"],
)  # fmt: skip
@pytest.mark.parametrize("name", ANY_MODEL)
def test_what_is_no_logits_is_named(as_installed, name, change, error, message, problem):
    model, images, labels = problem
    labels[1] = CLASSES - 1
    calls = Calls(lambda x: change(model(x)))
    message = message.replace("model: ", "")
    with pytest.raises(error, match=f"^(model|source|labels): .*{re.escape(message.removeprefix('labels: '))}"):
        attacked(name, calls, images, labels)
    assert calls.count <= 2


@pytest.mark.parametrize("name", ANY_MODEL)
def test_an_example_of_nan_is_named_and_the_others_can_go_on(as_installed, name, problem):
    model, images, labels = problem
    odd = images[4].sum()

    def one_nan(x):
        logits = model(x)
        return torch.where((x.flatten(1).sum(dim=1) == odd)[:, None], torch.nan, logits)

    with pytest.raises(ValueError, match=r"expected logits, got NaN for example 4$"):
        attacked(name, one_nan, images, labels)
    keep = torch.arange(len(images)) != 4
    assert attacked(name, one_nan, images[keep], labels[keep]).adversarial.isfinite().all()


@pytest.mark.parametrize("name", ANY_MODEL)
def test_a_constant_model_is_broken_nowhere(name, problem):
    """Its gradient is 0: the attack ends, nothing it returns is another class, and no point leaves the cube."""
    model, images, _ = problem
    labels = torch.full((len(images),), 2)
    fixed = torch.tensor([0.0, 1.0, 3.0, -1.0, 0.5])

    def constant(x):
        return fixed + 0 * model(x)

    found = attacked(name, constant, images, labels)
    assert found.adversarial.isfinite().all()
    assert ((found.adversarial >= 0) & (found.adversarial <= 1)).all()
    assert (constant(found.adversarial).argmax(dim=1) == labels).all()
    # and every image is misclassified from the start where the label is another
    wrong = attacked(name, constant, images, labels - 1)
    assert (constant(wrong.adversarial).argmax(dim=1) != labels - 1).all()


@pytest.mark.parametrize("name", ANY_MODEL)
def test_saturated_logits_end_in_finite_points(name, problem):
    """Logits of 10^4 apart: the gradient of cross-entropy underflows, and that is no error."""
    model, images, _ = problem

    def saturated(x):
        return 1e4 * model(x)

    labels = saturated(images).argmax(dim=1)
    found = attacked(name, saturated, images, labels)
    assert found.adversarial.isfinite().all()
    # the paper's protocol may begin outside the cube, and stays where the gradient is 0
    assert name == "paper" or ((found.adversarial >= 0) & (found.adversarial <= 1)).all()


@pytest.mark.parametrize("name", ANY_MODEL)
def test_masked_classes_are_attacked_around_or_named(name, problem):
    model, images, _ = problem
    mask = torch.tensor([0.0, 0.0, 0.0, -torch.inf, -torch.inf])
    labels = (model(images) + mask).argmax(dim=1)
    if name in LIBRARIES:
        with pytest.raises(ValueError, match=r"^model: expected finite logits, got -inf .* for the classes \[3, 4\]; "):
            attacked(name, lambda x: model(x) + mask, images, labels)
    else:
        found = attacked(name, lambda x: model(x) + mask, images, labels)
        assert found.adversarial.isfinite().all()


@pytest.mark.parametrize(
    ("pixel", "written"),
    [(1.0000001, "0.01 to 1.0000001"), (1.25, "0.01 to 1.25"), (-1e-9, "-1e-09 to 0.5"), (float("nan"), "NaN")],
)
@pytest.mark.parametrize("name", ATTACKS)
def test_a_pixel_outside_is_shown_with_the_digits_that_matter(name, pixel, written, problem):
    model, _, labels = problem
    images = torch.full((6, *SHAPE), 0.5)
    images[0, 0, 0, 0], images[1, 1, 1, 1] = pixel, 0.01
    with pytest.raises(ValueError, match=rf"^images: expected pixels in \[0, 1\], got .*{re.escape(written)}$"):
        attacked(name, model, images, labels)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (torch.zeros(5, dtype=torch.int64), "labels: expected one for each of 6 images, got 5"),
        (torch.zeros(6, 1, dtype=torch.int64), r"labels: expected one for each of 6 images, got shape \[6, 1\]"),
        (torch.zeros(6), r"labels: expected integers, got torch\.float32"),
        (torch.zeros(6, dtype=torch.bool), r"labels: expected integers, got torch\.bool"),
        (torch.tensor([0, 1, 2, 3, 4, 5]), r"labels: expected classes in 0\.\.4, got 0 to 5"),
        (torch.tensor([0, 1, 2, 3, 4, -1]), r"labels: expected classes in 0\.\.4, got -1 to 4"),
    ],
)
@pytest.mark.parametrize("name", ATTACKS)
def test_labels_that_are_none_are_named(as_installed, name, labels, message, problem):
    model, images, _ = problem
    with pytest.raises(ValueError, match=f"^{message}$"):
        attacked(name, model, images, labels)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32])
@pytest.mark.parametrize("name", ATTACKS)
def test_labels_in_any_integers(as_installed, name, dtype, problem):
    model, images, labels = problem
    same(attacked(name, model, images, labels.to(dtype)), attacked(name, model, images, labels))


# modes of the model


@pytest.mark.parametrize(
    "layer",
    [nn.Dropout(0.1), nn.BatchNorm2d(8), nn.RReLU(), nn.AlphaDropout(0.5),
     nn.InstanceNorm2d(8, track_running_stats=True)],
    ids=lambda layer: type(layer).__name__,
)  # fmt: skip
@pytest.mark.parametrize("name", ATTACKS)
def test_a_layer_whose_output_depends_on_its_mode_is_named(name, layer, problem):
    _, images, labels = problem
    model = classifier(layer).train()
    where = rf'{type(layer).__name__} "encoder\.layer" in training mode, .*; call (model|source)\.eval\(\) first'
    for count in (6, 1):
        with pytest.raises(ValueError, match=f"^(model|source): expected evaluation mode, got {where}"):
            attacked(name, model, images[:count], labels[:count])
    attacked(name, model.eval(), images, labels)
    assert not model.training


@pytest.mark.parametrize(
    "layer",
    [nn.Tanh(), nn.Dropout(0.0), nn.GroupNorm(2, 8), nn.InstanceNorm2d(8),
     nn.BatchNorm2d(8, track_running_stats=False)],
    ids=lambda layer: type(layer).__name__,
)  # fmt: skip
@pytest.mark.parametrize("name", ["pgd", "square"])
def test_other_layers_may_be_in_training_mode(name, layer, problem):
    _, images, labels = problem
    model = classifier(layer)
    trained = attacked(name, model.train(), images, labels)
    assert model.training
    same(trained, attacked(name, model.eval(), images, labels))


class OwnDropout(nn.Module):
    """A layer that PyTorch does not know, with the functional dropout."""

    def forward(self, x):
        return nn.functional.dropout(x, 0.5, training=self.training)


def spectral():
    return nn.utils.parametrizations.spectral_norm(nn.Conv2d(8, 8, 1))


@pytest.mark.parametrize("layer", [OwnDropout, spectral, lambda: nn.utils.spectral_norm(nn.Conv2d(8, 8, 1))])
def test_layers_of_ones_own_that_ask_for_their_mode_are_found(layer, problem):
    _, images, labels = problem
    model = classifier(layer())
    with pytest.raises(ValueError, match=r'^model: expected evaluation mode, got \w+ "encoder\.layer'):
        pgd(model.train(), images, labels, eps=0.05, **WALK)
    pgd(model.eval(), images, labels, eps=0.05, **WALK)
