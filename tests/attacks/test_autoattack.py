"""AutoAttack and Square: exact radii of linear models, small models and images, seeds, and the authors' own loop."""

import copy
import random
import sys

import numpy as np
import pytest
import torch
from pyautoattack import AutoAttack
from torch import nn

from clustr_core.attacks.autoattack import PARTS, _squares_fit, autoattack, square
from clustr_core.attacks.gradient import pgd

SHAPE = (1, 8, 8)
NORMS = ("linf", "l2")


def linear(classes, shape=SHAPE, seed=0, scale=0.1):
    """A model without parameters, its weights, and its logits as a plain function."""
    pixels = int(np.prod(shape))
    weights = scale * torch.randn(classes, pixels, generator=torch.Generator().manual_seed(seed))
    return (lambda images: (images.flatten(1) - 0.5) @ weights.T), weights


def grey(batch, shape=SHAPE, seed=1):
    """Images far enough from 0 and 1 that a small ball is not cut."""
    return 0.4 + 0.2 * torch.rand(batch, *shape, generator=torch.Generator().manual_seed(seed))


def exact_radius(model, weights, images, labels, norm):
    """min over the rivals of the logit gap over the dual norm of the weights' difference."""
    logits = model(images)
    gaps = logits.gather(1, labels[:, None]) - logits
    differences = weights[labels][:, None] - weights[None]
    lengths = differences.abs().sum(2) if norm == "linf" else differences.norm(dim=2)
    return (gaps / lengths).masked_fill(lengths == 0, torch.inf).amin(1)


def lengths(result, images, norm):
    offsets = (result.adversarial - images).flatten(1)
    return offsets.abs().amax(1) if norm == "linf" else offsets.norm(dim=1)


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 5)).eval()


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize(("part", "classes"), [("apgd-ce", 2), ("fab-t", 2), ("apgd-t", 5), ("fab-t", 5)])
def test_a_gradient_part_meets_the_exact_radius_of_a_linear_model(norm, part, classes):
    # with more than two classes the largest cross-entropy in the ball need not be a mistake: no test of APGD-CE there
    model, weights = linear(classes)
    images = grey(2)
    labels = model(images).argmax(1)
    radii = exact_radius(model, weights, images, labels, norm)
    for image, label, radius in zip(images, labels, radii, strict=True):
        for ratio, broken in ((0.98, False), (1.02, True)):
            eps = ratio * radius.item()
            result = autoattack(model, image[None], label[None], norm=norm, eps=eps, parts=(part,))
            assert result.success.item() is broken


@pytest.mark.parametrize("norm", NORMS)
def test_no_part_breaks_a_linear_model_inside_its_radius_and_all_together_do_outside(norm):
    model, weights = linear(4)
    images = grey(6)
    labels = model(images).argmax(1)
    radius = exact_radius(model, weights, images, labels, norm)
    smallest, largest = 0.98 * radius.min().item(), 1.02 * radius.max().item()
    assert not square(model, images, labels, norm=norm, eps=smallest, queries=200).success.any()
    assert not autoattack(model, images, labels, norm=norm, eps=smallest, parts=PARTS["standard"][:3]).success.any()
    assert autoattack(model, images, labels, norm=norm, eps=largest).success.all()


@pytest.mark.parametrize("norm", NORMS)
def test_square_breaks_a_linear_model_well_outside_its_radius(norm):
    model, weights = linear(3)
    images = grey(8)
    labels = model(images).argmax(1)
    eps = 3 * exact_radius(model, weights, images, labels, norm).max().item()
    result = square(model, images, labels, norm=norm, eps=eps, queries=2000)
    assert result.success.all()
    assert (result.gradients == 0).all()
    assert (lengths(result, images, norm) <= eps * (1 + 1e-5)).all()


@pytest.mark.parametrize("classes", [2, 3, 4])
def test_targets_are_capped_at_the_wrong_classes(classes):
    model, _ = linear(classes)
    images = grey(4)
    labels = model(images).argmax(1)
    parts = [part for part in PARTS["standard"] if part != "apgd-t" or classes >= 4]
    result = autoattack(model, images, labels, norm="linf", eps=0.3, parts=parts)
    assert result.success.all()


@pytest.mark.parametrize(("version", "part", "classes"), [("standard", "apgd-t", 3), ("plus", "apgd-dlr", 2)])
def test_too_few_classes_are_named(version, part, classes):
    model, _ = linear(classes)
    with pytest.raises(ValueError, match=f'parts: "{part}" needs at least {classes + 1} classes, got .* {classes}'):
        autoattack(model, grey(2), torch.tensor([0, 1]), norm="linf", eps=0.1, version=version)


@pytest.mark.parametrize("side", [1, 2, 4, 12, 14, 24])
def test_an_image_on_which_square_cannot_start_is_named(side):
    model, _ = linear(4, (1, side, side))
    images = grey(2, (1, side, side))
    with pytest.raises(ValueError, match=f"tiles of side .* got {side} x {side} pixels"):
        square(model, images, model(images).argmax(1), norm="l2", eps=0.1)


@pytest.mark.parametrize("side", [1, 2, 4, 5, 8, 12])
@pytest.mark.parametrize("norm", NORMS)
def test_small_images(side, norm):
    shape = (3, side, side)
    model, _ = linear(4, shape, scale=1)
    images = grey(3, shape)
    parts = [part for part in PARTS["standard"] if part != "square" or norm == "linf" or _squares_fit(side, side)]
    result = autoattack(model, images, model(images).argmax(1), norm=norm, eps=0.3, parts=parts)
    assert (lengths(result, images, norm) <= 0.3 * (1 + 1e-5)).all()


@pytest.mark.parametrize("norm", NORMS)
def test_results_lie_in_the_ball_and_the_model_says_what_broke(network, norm):
    images = torch.rand(12, *SHAPE, generator=torch.Generator().manual_seed(3)).round(decimals=1)
    labels = network(images).argmax(1)
    eps = 0.04 if norm == "linf" else 0.25
    result = autoattack(network, images, labels, norm=norm, eps=eps, parts=("apgd-ce", "fab-t"))
    assert (lengths(result, images, norm) <= eps * (1 + 1e-5)).all()
    assert result.adversarial.amin() >= 0
    assert result.adversarial.amax() <= 1
    assert torch.equal(network(result.adversarial).argmax(1) != labels, result.success)
    assert result.success.any()
    assert not result.success.all()
    assert torch.equal(result.adversarial[~result.success], images[~result.success])


def test_an_example_wrong_when_clean_is_a_success_with_the_clean_image(network):
    images = grey(4)
    labels = network(images).argmax(1)
    labels[1] = (labels[1] + 1) % 5
    result = autoattack(network, images, labels, norm="linf", eps=1e-4, parts=("apgd-ce", "apgd-t"))
    assert result.success.tolist() == [False, True, False, False]
    assert result.clean_correct.tolist() == [True, False, True, True]
    assert torch.equal(result.adversarial[1], images[1])
    assert result.gradients.tolist() == [5 * 101, 0, 5 * 101, 5 * 101]


def test_all_examples_wrong_when_clean_or_none_at_all(network):
    images = grey(3)
    labels = (network(images).argmax(1) + 1) % 5
    assert autoattack(network, images, labels, norm="linf", eps=0.1).success.all()
    assert len(autoattack(network, images[:0], labels[:0], norm="linf", eps=0.1).success) == 0


def test_global_state_is_left_alone(as_installed, network, capfd):
    images = grey(3)
    labels = network(images).argmax(1)
    before = torch.get_rng_state(), copy.deepcopy(np.random.get_state()), random.getstate(), sys.gettrace()  # noqa: NPY002
    autoattack(network, images, labels, norm="linf", eps=1e-3, parts=("apgd-ce", "fab-t"))
    square(network, images, labels, norm="linf", eps=1e-3, queries=5)
    assert torch.equal(before[0], torch.get_rng_state())
    assert (before[1][1] == np.random.get_state()[1]).all()  # noqa: NPY002
    assert before[2] == random.getstate()
    assert before[3] is sys.gettrace()
    assert all(weight.grad is None and weight.requires_grad for weight in network.parameters())
    assert capfd.readouterr() == ("", "")


def test_the_seed_decides(network):
    images = grey(6)
    labels = network(images).argmax(1)

    def attack(seed):
        torch.rand(seed + 1)
        return square(network, images, labels, norm="linf", eps=0.1, queries=200, seed=seed)

    assert attack(0).success.any()
    assert torch.equal(attack(0).adversarial, attack(0).adversarial)
    assert not torch.equal(attack(0).adversarial, attack(1).adversarial)


def test_logits_that_share_memory_with_the_images():
    images = grey(3)
    labels = images.flatten(1).argmax(1)
    kept = images.clone()
    with pytest.warns(UserWarning, match="they look like scores"):
        result = square(lambda x: x.flatten(1), images, labels, norm="linf", eps=0.2, queries=20)
    assert torch.equal(images, kept)
    assert result.adversarial.isfinite().all()


def test_a_model_without_gradients_is_named_but_square_attacks_it():
    model, _ = linear(4, scale=1)
    steps = lambda images: model((images * 20).round() / 20).detach()  # noqa: E731
    images = grey(3)
    labels = steps(images).argmax(1)
    with pytest.raises(ValueError, match="model: expected logits with a gradient"):
        autoattack(steps, images, labels, norm="linf", eps=0.3)
    assert square(steps, images, labels, norm="linf", eps=0.3, queries=500).success.all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"version": "rand"}, "version: expected one of"),
        ({"parts": ("pgd",)}, "parts: expected different ones of"),
        ({"parts": ()}, "parts: expected different ones of"),
        ({"parts": "square"}, "parts: expected different ones of"),
        ({"parts": ("square", "square")}, "parts: expected different ones of"),
        ({"parts": ("fab",)}, "parts: expected different ones of"),
        ({"eps": 8}, "eps: expected at most"),
        ({"norm": "l1"}, "norm: expected one of"),
    ],
)
def test_wrong_options_are_named(as_installed, network, options, message):
    images = grey(2)
    with pytest.raises(ValueError, match=message):
        autoattack(network, images, torch.tensor([0, 1]), **({"norm": "linf", "eps": 0.1} | options))


def test_wrong_images_and_queries_are_named(network):
    images, labels = grey(2), torch.tensor([0, 1])
    with pytest.raises(ValueError, match=r"images: expected float32, got torch.float64"):
        autoattack(copy.deepcopy(network).double(), images.double(), labels, norm="linf", eps=0.1)
    with pytest.raises(ValueError, match="queries: expected a positive whole number, got 0"):
        square(network, images, labels, norm="linf", eps=0.1, queries=0)


@pytest.mark.parametrize("norm", NORMS)
def test_agrees_with_the_authors_own_loop(network, norm, monkeypatch):
    images = torch.rand(20, *SHAPE, generator=torch.Generator().manual_seed(4))
    labels = network(images).argmax(1)
    labels[0] = (labels[0] + 1) % 5
    eps = 0.02 if norm == "linf" else 0.13
    parts = ("apgd-ce", "apgd-t", "fab-t")
    ours = autoattack(network, images, labels, norm=norm, eps=eps, parts=parts)
    theirs = theirs_on(network, images, labels, norm, eps, parts, monkeypatch)
    assert torch.equal(ours.success, network(theirs).argmax(1) != labels)
    assert 0.2 <= ours.success.float().mean() <= 0.8
    assert (ours.adversarial - theirs).abs().amax() <= 1e-5


@pytest.mark.parametrize("norm", NORMS)
def test_is_not_weaker_than_pgd(network, norm):
    images = torch.rand(40, *SHAPE, generator=torch.Generator().manual_seed(5))
    labels = network(images).argmax(1)
    eps = 0.02 if norm == "linf" else 0.13
    ours = autoattack(network, images, labels, norm=norm, eps=eps, parts=("apgd-ce", "apgd-t"))
    house = pgd(network, images, labels, norm=norm, eps=eps, step_size=eps / 10, steps=40, restarts=3, loss="margin")
    assert ours.success.sum() >= house.success.sum()


@pytest.mark.parametrize("norm", NORMS)
def test_agrees_with_a_second_implementation(norm):
    import torchattacks

    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 4)).eval()
    images = torch.rand(100, *SHAPE, generator=torch.Generator().manual_seed(6))
    labels = model(images).argmax(1)
    name, eps = ("Linf", 0.02) if norm == "linf" else ("L2", 0.13)
    ours = autoattack(model, images, labels, norm=norm, eps=eps, parts=("apgd-ce", "apgd-t"))
    # with the 100 steps of the paper
    options = {"norm": name, "eps": eps, "steps": 100, "seed": 0}
    with torch.random.fork_rng(devices=[]):
        found = torchattacks.APGD(model, loss="ce", **options)(images, labels)
        left = model(found).argmax(1) == labels
        found[left] = torchattacks.APGDT(model, n_classes=4, **options)(images[left], labels[left])
    theirs = model(found).argmax(1) != labels
    assert 0.2 <= ours.success.float().mean() <= 0.8
    assert abs(ours.success.float().mean() - theirs.float().mean()) <= 0.01


@pytest.mark.parametrize("part", PARTS["standard"])
def test_asks_no_more_of_the_model_than_the_authors_own_loop(network, part, monkeypatch):
    """Images that the model sees, and times that it is asked, where nothing is broken; `make bench` times both."""

    class Asked(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = network

        def forward(self, images):
            seen.append(len(images))
            return self.model(images)

    images = grey(6)
    labels = network(images).argmax(1)
    asked = []
    for attack in (ours_on, theirs_on):
        seen = []
        attack(Asked().eval(), images, labels, "linf", 1e-5, (part,), monkeypatch, queries=20)
        asked.append((len(seen), sum(seen)))
    (our_calls, our_images), (their_calls, their_images) = asked
    assert our_calls <= their_calls
    assert our_images <= their_images


def ours_on(model, images, labels, norm, eps, parts, _, queries=None):
    if queries is not None and parts == ("square",):
        return square(model, images, labels, norm=norm, eps=eps, queries=queries).adversarial
    return autoattack(model, images, labels, norm=norm, eps=eps, parts=parts).adversarial


def theirs_on(model, images, labels, norm, eps, parts, monkeypatch, queries=5000):
    """The authors' loop; it ends whatever trace function is set, and leaves gradients on the weights."""
    monkeypatch.setattr(sys, "settrace", lambda _: None)
    frozen = copy.deepcopy(model)
    with torch.random.fork_rng(devices=[]):
        library = AutoAttack(frozen, norm={"linf": "Linf", "l2": "L2"}[norm], eps=eps, seed=0, device="cpu")
        library.attacks_to_run = list(parts)
        library.square.n_queries = queries
        targets = model(images[:1]).shape[1] - 1
        library.apgd_targeted.n_target_classes = library.fab.n_target_classes = targets
        return library.run_standard_evaluation(images, labels)[0]
