"""Minimum norms: the closed form where there is one, never below it, and what is returned is misclassified indeed."""

import math
import warnings
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from toy_models import SHAPE, SIZE, Counted, Linear, Odd, Rotation, cluster_model, labelled, lengths, some_images

from clustr_core.attacks import minimum_norm
from clustr_core.attacks.gradient import pgd
from clustr_core.attacks.losses import margin_loss
from clustr_core.attacks.minimum_norm import (
    MinimumNorm,
    SearchState,
    _fmn_radius,
    ddn,
    fmn,
    pgd_within,
    random_search,
    smallest,
    tightened,
)
from clustr_core.attacks.result import AttackResult
from clustr_core.attacks.temperature import rescaled
from clustr_core.certificates.ladder import certified_radius
from clustr_core.certificates.linear import linear_radius
from clustr_core.numerics import chunks


def linear_problem(classes=3, count=12, dtype=torch.float64):
    """A linear model, and images whose distance to its borders is known: near no border, and far from the walls."""
    model, images = Linear(classes, dtype=dtype), some_images(60, dtype=dtype)
    labels = labelled(model, images)
    radii = linear_radius(model.weight.detach(), model.bias.detach(), images.flatten(1), labels)
    keep = (radii > 1e-2) & (radii < 0.3)
    assert keep.sum() >= count
    return model, images[keep][:count], labels[keep][:count], radii[keep][:count]


def mlp(seed=0, classes=10, side=8):
    torch.manual_seed(seed)
    width = 48
    layers = (nn.Linear(side * side, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, classes))
    return nn.Sequential(nn.Flatten(), *layers).eval()


def some_noise(count=48, side=8, seed=0):
    return torch.rand(count, 1, side, side, generator=torch.Generator().manual_seed(seed))


def attacks(radius, seed=0):
    """The four of them, with little to spend."""
    return {
        "fmn": lambda *on: fmn(*on, steps=8, restarts=2, seed=seed),
        "ddn": lambda *on: ddn(*on, steps=8, restarts=2, seed=seed),
        "pgd": lambda *on: pgd_within(*on, radius=radius, steps=8, restarts=2, seed=seed),
        "random": lambda *on: random_search(*on, radius=radius, points=24, seed=seed),
    }


ATTACKS = sorted(attacks(None))


def holds(model, images, labels, result):
    """What every minimum-norm attack promises."""
    found = result.norm.isfinite()
    wrong = labelled(model, result.adversarial) != labels
    assert torch.equal(wrong, found)
    assert torch.equal(result.clean_correct, labelled(model, images) == labels)
    assert torch.equal(
        result.norm, torch.where(found, lengths((result.adversarial.double() - images.double()), "l2"), math.inf)
    )
    clean = ~result.clean_correct | ~found
    assert torch.equal(result.adversarial[clean], images[clean])
    assert (result.norm[~result.clean_correct] == 0).all()
    assert (result.gradients[~result.clean_correct] == 0).all()
    assert result.adversarial.dtype == images.dtype
    assert result.norm.dtype == torch.float64
    assert result.adversarial.min() >= 0
    assert result.adversarial.max() <= 1


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(
    ("attack", "loss", "classes"), [(fmn, "margin", 3), (fmn, "ce", 2), (ddn, "ce", 3), (ddn, "margin", 5)]
)
def test_the_closed_form_of_a_linear_model_is_found_and_never_undercut(attack, loss, classes, dtype):
    model, images, labels, radii = linear_problem(classes, dtype=dtype)
    result = attack(model, images, labels, steps=40, restarts=classes, loss=loss)
    ratio = result.norm / radii
    assert (ratio >= 1 - (1e-12 if dtype == torch.float64 else 1e-4)).all()
    assert (ratio <= 1.01).all()
    assert (result.gradients == 40 * classes).all()
    holds(model, images, labels, result)


@pytest.mark.parametrize("attack", [fmn, ddn])
def test_the_exact_certificate_of_nearest_centroids_is_found_and_never_undercut(attack):
    model, images = cluster_model(0, 1, "nearest", classes=5), some_images(40)
    labels = labelled(model, images)
    radii = certified_radius(model.embed(images), model.clusters, bound="exact")
    keep = (radii > 1e-3) & (radii < 0.25)
    assert keep.sum() >= 20
    images, labels, radii = images[keep], labels[keep], radii[keep]
    once, each = (attack(model, images, labels, steps=45, restarts=n, loss="margin").norm / radii for n in (1, 5))
    assert (once >= 1).all()
    assert (each >= 1).all()
    assert (each <= 1.001).all()
    # the class whose logit is nearest is not always that of the nearest border
    assert 1.01 < once.max() < 2


def test_walls_are_known():
    """At the wall one pixel cannot move: the border is then as far as the other pixels make it."""
    model = Linear(2)
    with torch.no_grad():
        model.weight.copy_(torch.stack([torch.zeros(SIZE), torch.ones(SIZE)]))
        model.bias.copy_(torch.tensor([0.0, -0.5 * SIZE]))
    images = torch.full((1, *SHAPE), 0.4, dtype=torch.float64)
    images[0, 0, 0, 0] = 1.0
    # the sum lacks 8 - 15 * 0.4 - 1 = 1, which 15 pixels share
    for attack in (fmn, ddn):
        result = attack(model, images, torch.tensor([0]), steps=100)
        assert result.norm.item() == pytest.approx(math.sqrt(15) / 15, rel=1e-3)
        assert result.adversarial[0, 0, 0, 0] == 1


@pytest.mark.parametrize(("ours", "theirs"), [(fmn, "L2FMNAttack"), (ddn, "DDNAttack")])
def test_no_weaker_than_foolbox(ours, theirs):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import foolbox

        model, images = mlp(), some_noise()
        labels = labelled(model, images)
        reference = foolbox.PyTorchModel(model, bounds=(0, 1), device="cpu")
        attack = getattr(foolbox.attacks, theirs)(steps=50)
        adversarial, _, success = attack(reference, images, labels, epsilons=None)
    assert success.all()
    found = ours(model, images, labels, steps=50).norm
    ratio = found / lengths((adversarial - images).double(), "l2")
    assert ratio.median() <= 1.01
    assert ratio.max() <= 1.25
    assert found.isfinite().all()


def test_fmn_looks_for_the_border_from_both_sides():
    broken, shortest = torch.tensor([True, True, False, False]), torch.tensor([0.99, 0.5, 0.7, math.inf]).double()
    eps, norm, distance = (torch.full((4,), value).double() for value in (1.0, 0.6, 0.2))
    for cosine, gamma in ((1.0, 0.05), (0.0, 0.001)):
        found = _fmn_radius(SearchState(eps, norm, broken, shortest, distance, cosine))
        expected = [min(1 - gamma, 0.99), 0.5, 1 + gamma, 0.8 * 1.05]
        torch.testing.assert_close(found, torch.tensor(expected).double())


def test_ddn_walks_on_spheres():
    seen = []

    def bright(images):
        seen.append(images.detach())
        x = images.mean(dim=(1, 2, 3)) - 0.7
        return torch.stack([torch.zeros_like(x), x], dim=1)

    images = torch.full((1, *SHAPE), 0.5, dtype=torch.float64)
    ddn(bright, images, torch.tensor([0]), steps=25)
    # a look at the clean image, then the path, which begins at it, and its bisection
    walked = lengths(torch.cat(seen[1:27]) - images, "l2")
    assert walked[0] == 0
    expected = [1.05]
    while len(expected) < 25:
        expected.append(expected[-1] * (0.95 if expected[-1] > 0.2 * 4 else 1.05))
    torch.testing.assert_close(walked[1:], torch.tensor(expected).double())


def test_the_last_point_is_judged_too():
    model, images, labels, radii = linear_problem(2)
    assert pgd_within(model, images, labels, radius=1.02 * radii, steps=1).norm.isfinite().all()


def test_a_curved_border_is_crossed():
    """A margin that bends away: the linear estimate from inside is always too short, and alone never gets across."""

    def bent(images):
        x = images.mean(dim=(1, 2, 3)) - 0.2
        return torch.stack([torch.zeros_like(x), torch.log(x / 0.4 + 0.01)], dim=1)

    images = torch.full((1, *SHAPE), 0.3, dtype=torch.float64)
    # log(x / 0.4 + 0.01) = 0 at x = 0.396
    for steps in (6, 100):
        found = fmn(bent, images, torch.tensor([0]), steps=steps)
        assert found.norm.item() == pytest.approx(math.sqrt(SIZE) * (0.596 - 0.3), rel=1e-4)


def test_a_found_point_is_drawn_in_by_bisection():
    model, images, labels, _ = linear_problem()
    found = fmn(model, images, labels)
    far = images + 1.3 * (found.adversarial - images)
    there = labelled(model, far)
    result = AttackResult(far, there != labels, found.clean_correct, found.gradients, there, labels)
    assert result.success.all()
    again = tightened(model, images, labels, result)
    assert (again.norm / found.norm - 1).abs().max() < 1.3 * 2**-15
    holds(model, images, labels, again)


def test_tightened_keeps_what_an_attack_did_not_find():
    model, images, labels, radii = linear_problem()
    labels[0] = (labels[0] + 1) % 3
    result = pgd(model, images, labels, eps=float(radii.median()), step_size=0.05, steps=20, norm="l2")
    found = tightened(model, images, labels, result)
    assert 1 < result.success.sum() < len(images)
    assert torch.equal(found.norm.isfinite(), result.success)
    assert torch.equal(found.gradients, result.gradients)
    holds(model, images, labels, found)


class Moody(nn.Module):
    """A linear model that leans towards class 0 in a batch of more than one size: the verdict depends on the batch."""

    def __init__(self, lean, size):
        super().__init__()
        self.model, self.lean, self.size = Linear(2), lean, size

    def forward(self, images):
        logits = self.model(images)
        lean = self.lean if len(images) == self.size else 0.0
        return logits + lean * torch.tensor([1.0, 0.0], dtype=logits.dtype)


@pytest.mark.parametrize(("lean", "survives"), [(0.0, True), (2e-3, True), (5.0, False)])
def test_what_the_whole_batch_does_not_confirm_is_led_on_or_given_up(lean, survives):
    _, images, labels, radii = linear_problem(2)
    images, radii = images[labels == 0], radii[labels == 0]
    labels = torch.zeros(len(images)).long()
    # the last label is wrong, and so that image no part of the search, which sees one image less than the whole
    labels[-1] = 1
    moody = Moody(lean, len(images))
    result = fmn(moody, images, labels, steps=20)
    assert result.clean_correct.tolist() == [True] * (len(images) - 1) + [False]
    assert result.norm[:-1].isfinite().tolist() == [survives] * (len(images) - 1)
    assert not survives or (result.norm[:-1] <= 1.021 * radii[:-1]).all()
    holds(moody, images, labels, result)


@pytest.mark.parametrize("attack", ATTACKS)
@given(seed=st.integers(0, 10**6), dtype=st.sampled_from([torch.float32, torch.float64]))
@settings(max_examples=8, deadline=None)
def test_what_is_returned_is_in_the_cube_and_misclassified(attack, seed, dtype):
    model, images = Linear(seed=seed, dtype=dtype), some_images(8, seed, low=0, high=1, dtype=dtype)
    images[0] = images[0].round()
    labels = labelled(model, images)
    labels[::5] = (labels[::5] + 1) % 3
    radius = torch.linspace(0, 1, 8, dtype=dtype)
    holds(model, images, labels, attacks(radius, seed)[attack](model, images, labels))


@pytest.mark.parametrize("attack", ATTACKS)
def test_seeds_repeat_and_no_trace_is_left(attack):
    torch.manual_seed(0)
    network = nn.Sequential(nn.Flatten(), nn.Linear(SIZE, SIZE), nn.Tanh()).double()
    model, images = cluster_model(3, 2, encoder=network), some_images(40, low=0.0, high=1.0)
    labels, radius = labelled(model, images), torch.full((40,), 0.7, dtype=torch.float64)
    modes = [part.training for part in model.modules()]
    state, seen = torch.get_rng_state(), []
    watched = model.register_forward_pre_hook(lambda module, inputs: seen[-1].append(inputs[0].detach()))
    for seed in (0, 0, 1):
        seen.append([])
        once = attacks(radius, seed)[attack](model, images, labels)
    watched.remove()
    first, second, other = (torch.cat(parts) for parts in seen)
    assert torch.equal(first, second)
    assert first.shape != other.shape or not torch.equal(first, other)
    assert torch.equal(state, torch.get_rng_state())
    assert once.norm.isfinite().sum() > 3
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    assert [part.training for part in model.modules()] == modes


@pytest.mark.parametrize("attack", ATTACKS)
def test_an_example_does_not_depend_on_what_becomes_of_the_others(attack):
    model, images, labels, radii = linear_problem()
    options = attacks(1.02 * radii)
    together = options[attack](model, images, labels)
    others = labels.clone()
    others[::2] = (others[::2] + 1) % 3
    result = options[attack](model, images, others)
    torch.testing.assert_close(result.norm[1::2], together.norm[1::2])
    assert (result.norm[::2] == 0).all()


def test_restarts_keep_the_smallest():
    model, images = mlp(3), some_noise()
    labels = labelled(model, images)
    for attack in (fmn, ddn):
        found = [attack(model, images, labels, steps=10, restarts=n) for n in (1, 2, 11)]
        for fewer, more in pairwise(found):
            # up to the halvings: the smaller one before them need not be the smaller one after
            assert (more.norm <= fewer.norm * (1 + 1e-2)).all()
        assert found[2].norm.mean() < found[0].norm.mean()
        assert [result.gradients.unique().tolist() for result in found] == [[10], [20], [110]]


def test_gradients_are_counted():
    counted, images = Counted(Linear()), some_images(8)
    labels = labelled(counted, images)
    labels[0] = (labels[0] + 1) % 3
    for attack in (fmn, ddn):
        counted.backward_rows = 0
        result = attack(counted, images, labels, steps=7, restarts=2)
        assert result.gradients.tolist() == [0] + [14] * 7
        assert counted.backward_rows == 14 * 7


def test_where_nothing_can_be_found_the_norm_is_infinite():
    stubborn = nn.Sequential(nn.Flatten(), nn.Linear(SIZE, 2)).double()
    with torch.no_grad():
        stubborn[1].weight.zero_()
        stubborn[1].bias.copy_(torch.tensor([-3.0, 1.0]))
    images, labels = some_images(3), torch.tensor([1, 1, 1])
    for name, attack in attacks(torch.ones(3, dtype=torch.float64)).items():
        result = attack(stubborn, images, labels)
        assert result.norm.tolist() == [math.inf] * 3, name
        assert torch.equal(result.adversarial, images)


def test_the_smallest_on_the_path_is_kept_and_not_the_last():
    # misclassified only between 0.55 and 0.6, while the gradient leads through and out of it, up to 0.75
    images, odd = torch.full((1, *SHAPE), 0.5, dtype=torch.float64), Odd(0.55, 0.6)
    radius = torch.full((1,), 0.25 * math.sqrt(SIZE), dtype=torch.float64)
    result = pgd_within(odd, images, torch.tensor([0]), radius=radius, steps=40)
    assert result.norm.item() == pytest.approx(math.sqrt(SIZE) * 0.05, rel=1e-3)
    assert labelled(odd, images + 0.25).item() == 0


def test_saturated_logits_are_no_refuge():
    model, images = cluster_model(0, 1, variance=1e-4, classes=4), some_images(20, dtype=torch.float64)
    labels = labelled(model, images)
    radii = certified_radius(model.embed(images), model.clusters, bound="exact", rule="soft")
    keep = radii < 0.3
    images, labels, radii = images[keep], labels[keep], radii[keep]
    assert (fmn(model, images, labels).norm / radii).median() <= 1.001
    assert (ddn(rescaled(model, images), images, labels).norm / radii).median() <= 1.001


def test_pgd_within_goes_to_each_border_and_not_beyond():
    model, images, labels, radii = linear_problem(4)
    short = pgd_within(model, images, labels, radius=0.999 * radii, steps=20)
    assert not short.norm.isfinite().any()
    enough = pgd_within(model, images, labels, radius=1.02 * radii, steps=40, restarts=4)
    assert (enough.norm.isfinite()).all()
    assert (enough.norm >= radii).all()
    assert (enough.norm <= 1.021 * radii).all()
    assert (short.gradients == 20).all()


@pytest.mark.parametrize("attack", ["pgd", "random"])
def test_radius_zero_and_misclassified_examples_are_left_alone(attack):
    model, images, labels, radii = linear_problem()
    labels[3] = (labels[3] + 1) % 3
    radius = 1.5 * radii
    radius[:3] = 0
    result = attacks(radius)[attack](model, images, labels)
    assert result.norm[:3].tolist() == [math.inf] * 3
    assert result.norm[3] == 0
    assert (result.gradients[:4] == 0).all()
    nothing = attacks(torch.zeros_like(radius))[attack](model, images, labels)
    assert torch.equal(nothing.norm.isfinite(), torch.arange(12) == 3)


def test_random_directions_stay_on_each_sphere_or_within(monkeypatch):
    monkeypatch.setattr(chunks, "IMAGES_TRIED", 20)
    seen = []

    class Recording(Linear):
        def forward(self, images):
            seen.append(images)
            return super().forward(images)

    model, images = Recording(), some_images(4, low=0, high=1)
    labels = labelled(model, images)
    radius = torch.tensor([0.0, 1e-9, 2e-9, 3e-9], dtype=torch.float64)
    seen.clear()
    random_search(model, images, labels, radius=radius, points=22)
    # a pass over the clean batch, then at most 5 directions of 4 images at once, of which one is left alone
    tried = seen[1:]
    assert sum(map(len, tried)) == 22 * 3
    assert max(map(len, tried)) == 15
    for part in tried:
        offsets = part.reshape(-1, 3, *SHAPE) - images[1:]
        found = offsets.flatten(2).norm(dim=2)
        assert (found <= radius[1:] * (1 + 1e-6)).all()
        assert (found >= 0.5 * radius[1:]).all()
    # the last cells are as large as the image, so that all pixels of a direction move together
    last = tried[-1].reshape(-1, 3, *SHAPE) - images[1:]
    inside = (images[1:] > 1e-6) & (images[1:] < 1 - 1e-6)
    for offsets in last:
        for offset, free in zip(offsets, inside, strict=True):
            assert offset[free].max() - offset[free].min() <= 1e-15


def test_low_frequencies_find_what_isotropic_noise_does_not(monkeypatch):
    """A classifier of brightness: in 1024 dimensions a random direction has almost none."""

    def bright(images):
        x = images.mean(dim=(1, 2, 3)) - 0.5
        return torch.stack([torch.zeros_like(x), x], dim=1)

    images = torch.full((2, 1, 32, 32), 0.49, dtype=torch.float64)
    labels, radius = torch.zeros(2).long(), torch.full((2,), 0.01 * 32 * 2, dtype=torch.float64)
    result = random_search(bright, images, labels, radius=radius, points=200)
    assert result.norm.isfinite().all()
    assert (result.norm >= 0.01 * 32).all()
    monkeypatch.setattr(minimum_norm, "CELLS", (1,))
    assert not random_search(bright, images, labels, radius=radius, points=200).norm.isfinite().any()


def test_the_smaller_of_two_findings():
    def finding(norms, value):
        images = torch.full((3, *SHAPE), value)
        return MinimumNorm(images, torch.tensor(norms).double(), torch.ones(3).bool(), torch.tensor([1, 2, 3]))

    both = smallest(finding([1.0, math.inf, 2.0], 0.25), finding([2.0, 3.0, 2.0], 0.75))
    assert both.norm.tolist() == [1, 3, 2]
    assert both.adversarial[:, 0, 0, 0].tolist() == [0.25, 0.75, 0.25]
    assert both.gradients.tolist() == [2, 4, 6]


@pytest.mark.parametrize("attack", ATTACKS)
def test_no_images_no_findings(attack):
    result = attacks(torch.zeros(0))[attack](Linear(), some_images(0), torch.zeros(0).long())
    assert result.norm.shape == (0,)


# what is refused


def stuck(images):
    """Finite logits whose input gradient is NaN: the root of a square at 0."""
    return Linear()(images) + 0 * (images - images.detach()).square().sum(dim=(1, 2, 3)).sqrt()[:, None]


@pytest.mark.parametrize("attack", ["fmn", "ddn", "pgd"])
def test_a_gradient_of_nan_is_an_error_and_not_robustness(attack):
    images = some_images(4)
    call = attacks(torch.ones(4, dtype=torch.float64))[attack]
    with pytest.raises(ValueError, match="model: expected a finite input gradient, got NaN"):
        call(stuck, images, labelled(stuck, images))


@pytest.mark.parametrize("attack", ATTACKS)
def test_logits_of_nan_are_an_error_at_once_and_on_the_way(attack):
    images = some_images(4)
    labels = labelled(Linear(), images)
    call = attacks(torch.ones(4, dtype=torch.float64))[attack]
    with pytest.raises(ValueError, match="model: expected logits, got NaN"):
        call(lambda x: Linear()(x) * math.nan, images, labels)

    def fragile(x):
        away = (x.detach() - images).abs().sum() if len(x) == 4 else torch.tensor(1.0)
        return Linear()(x) * (math.nan if away > 0 else 1.0)

    with pytest.raises(ValueError, match="model: expected logits, got NaN"):
        call(fragile, images, labels)


@pytest.mark.parametrize("attack", ATTACKS)
def test_probabilities_are_noticed(attack):
    images = some_images(8)
    softmax = nn.Sequential(Linear(), nn.Softmax(dim=1))
    labels = labelled(softmax, images)
    with pytest.warns(UserWarning, match="they look like probabilities"):
        attacks(torch.ones(8, dtype=torch.float64))[attack](softmax, images, labels)


def test_saturation_is_noticed_where_it_does_harm():
    model, images = cluster_model(0, 1, variance=1e-6), some_images(8)
    labels = labelled(model, images)
    with pytest.warns(UserWarning, match="cross-entropy is saturated"):
        ddn(model, images, labels, steps=2)
    fmn(model, images, labels, steps=2)


@pytest.mark.parametrize("attack", ATTACKS)
def test_wrong_images_and_labels_are_refused(as_installed, attack):
    images, labels = some_images(4), torch.zeros(4).long()
    call = attacks(torch.ones(4, dtype=torch.float64))[attack]
    with pytest.raises(ValueError, match=r"images: expected pixels in \[0, 1\]"):
        call(Linear(), 2 * images, labels)
    with pytest.raises(ValueError, match="labels: expected one for each of 4 images, got 3"):
        call(Linear(), images, labels[:3])
    with pytest.raises(ValueError, match=r"labels: expected classes in 0\.\.2, got 7 to 7"):
        call(Linear(), images, labels + 7)
    with pytest.raises(ValueError, match=r"images: expected a floating dtype and shape"):
        call(Linear(), images.flatten(1), labels)


@pytest.mark.parametrize("attack", ["pgd", "random"])
@pytest.mark.parametrize(
    ("radius", "message"),
    [
        (torch.ones(3), "radius: expected floating, one for each of 4 images, got torch.float32 of shape"),
        (torch.ones(4, 1), "radius: expected floating, one for each of 4 images"),
        (torch.ones(4).long(), "radius: expected floating, one for each of 4 images, got torch.int64"),
        (torch.tensor([0.0, -0.25, 1.0, 1.0]), "radius: expected finite values of at least 0, got -0.25"),
        (torch.tensor([0.0, math.inf, 1.0, 1.0]), "radius: expected finite values of at least 0, got inf"),
        (torch.tensor([0.0, 1.0, math.nan, 1.0]), "radius: expected finite values of at least 0, got nan"),
    ],
)
def test_wrong_radii_are_refused(as_installed, attack, radius, message):
    with pytest.raises(ValueError, match=message):
        attacks(radius)[attack](Linear(), some_images(4), torch.zeros(4).long())


def test_wrong_options_are_refused(as_installed):
    on = (Linear(), some_images(2), torch.zeros(2).long())
    with pytest.raises(ValueError, match=r"loss: expected one of \['ce', 'dlr', 'margin'\] or a function, got 'cw'"):
        fmn(*on, loss="cw")
    with pytest.raises(ValueError, match=r'loss: expected one that two classes suffice for .* got "dlr"'):
        fmn(*on, loss="dlr", restarts=2)
    with pytest.raises(ValueError, match="model: expected logits of at least two classes, got 1"):
        fmn(Linear(1), *on[1:])
    for attack in (fmn, ddn, lambda *a, **options: pgd_within(*a, radius=torch.ones(2), **options)):
        with pytest.raises(ValueError, match="steps: expected a positive whole number, got 0"):
            attack(*on, steps=0)
        with pytest.raises(ValueError, match=r"restarts: expected a positive whole number, got 1\.5"):
            attack(*on, restarts=1.5)
    for points in (0, 2.5, True):
        with pytest.raises(ValueError, match=f"points: expected a positive whole number, got {points}"):
            random_search(*on, radius=torch.ones(2), points=points)


def test_rotations_do_not_matter():
    """The border of a rotated model is as far as that of the model."""
    model, images = cluster_model(5, 1, "nearest", encoder=Rotation(2)), some_images(12)
    labels = labelled(model, images)
    exact = certified_radius(model.embed(images), model.clusters, bound="exact")
    keep = exact < 0.25
    found = fmn(model, images[keep], labels[keep], steps=50, restarts=3)
    torch.testing.assert_close(found.norm, exact[keep], rtol=1e-3, atol=0)


def test_other_losses_climb_too():
    model, images, labels, radii = linear_problem()
    ours = fmn(model, images, labels, loss=lambda logits, labels: margin_loss(logits, labels) * 3, steps=40, restarts=3)
    torch.testing.assert_close(ours.norm, radii, rtol=1e-3, atol=0)
    assert (fmn(model, images, labels, loss="dlr").norm < 2 * radii).all()
