"""Attacks: as strong as the closed form where there is one, inside the ball always, and not a gradient wasted."""

import math
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from toy_models import (
    NORMS,
    SHAPE,
    SIZE,
    Centred,
    Counted,
    Linear,
    Odd,
    Rotation,
    cluster_model,
    labelled,
    lengths,
    some_images,
)

from clustr_core.attacks import names
from clustr_core.attacks.autoattack import autoattack
from clustr_core.attacks.ball import pgd_path, random_point
from clustr_core.attacks.cells import cell_walk
from clustr_core.attacks.gradient import fgsm, pgd
from clustr_core.attacks.losses import LOSSES, cross_entropy, margin_loss
from clustr_core.attacks.paper import paper_pgd
from clustr_core.attacks.temperature import SANE_GAP, Rescaled, rescaled
from clustr_core.attacks.transfer import transfer
from clustr_core.certificates.ladder import certified_radius
from clustr_core.certificates.linear import linear_radius
from clustr_core.models.classifiers import ClusterClassifier, LinearClassifier
from clustr_core.models.clusters import Clusters
from clustr_core.theory.oracle import exact_nearest_rule_distance


def fallen(model, images, labels, radii, **options):
    """Whether each image falls to an attack within its own eps."""
    return pgd(model, images, labels, eps=radii, step_size=radii / 8, **options).success


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize(
    ("classes", "loss", "ratio"),
    [(2, "ce", 1.001), (2, "margin", 1.001), (4, "margin", 1.2), (4, "ce", 2.0), (4, "dlr", 1.2)],
)
def test_pgd_finds_the_closed_form_distance_of_a_linear_model(classes, loss, ratio, norm):
    model, images = Linear(classes), some_images(40)
    labels = labelled(model, images)
    radii = linear_radius(model.weight.detach(), model.bias.detach(), images.flatten(1), labels, norm=norm)
    # away from the border itself, and from the walls at 0 and 1, which the closed form does not know
    keep = (radii > 1e-3) & (radii * ratio < 0.35)
    images, labels, radii = images[keep][:12], labels[keep][:12], radii[keep][:12]
    assert len(images) == 12
    options = {"steps": 40, "norm": norm, "loss": loss, "restarts": classes}
    assert fallen(model, images, labels, radii * ratio, **options).all()
    assert not fallen(model, images, labels, radii * 0.999, **options).any()


@given(st.sampled_from(NORMS), st.sampled_from(sorted(LOSSES)), st.floats(1e-4, 1), st.floats(0.01, 3), st.data())
@settings(max_examples=40, deadline=None)
def test_pgd_never_leaves_the_ball_or_the_pixel_range(norm, loss, eps, relative_step, data):
    seed, dtype = data.draw(st.integers(0, 10**6)), data.draw(st.sampled_from([torch.float32, torch.float64]))
    model = Linear(seed=seed, dtype=dtype)
    images = some_images(4, seed, low=0, high=1).to(dtype)
    images[0] = images[0].round()
    labels = torch.arange(4) % 3
    options = {"eps": eps, "step_size": eps * relative_step, "steps": 4, "norm": norm}
    result = pgd(model, images, labels, **options, loss=loss, restarts=2, seed=seed)
    start = random_point(images, eps, norm, torch.Generator().manual_seed(seed))
    path = pgd_path(lambda x: LOSSES[loss](model(x), labels), images, start, **options)
    slack = 4 * torch.finfo(dtype).eps
    for points in (result.adversarial, *path):
        assert points.min() >= 0
        assert points.max() <= 1
        assert (lengths(points - images, norm) <= eps * (1 + slack) + slack).all()
    assert torch.equal(result.success, labelled(model, result.adversarial) != labels)


def test_a_success_at_one_step_only_is_kept():
    model, images = Odd(0.65, 0.75), torch.full((1, 1, 1, 1), 0.5)
    options = {"eps": 0.5, "step_size": 0.1, "steps": 4}
    path = list(pgd_path(lambda x: model(x)[:, 1], images, images, **options))
    assert [labelled(model, x).item() for x in path] == [0, 0, 1, 0, 0]
    result = pgd(model, images, torch.tensor([0]), **options, random_start=False)
    assert result.success.tolist() == [True]
    assert result.adversarial.item() == pytest.approx(0.7)
    assert result.gradients.tolist() == [2]


def test_a_success_at_the_last_step_counts():
    model, images = Odd(0.75, 0.85), torch.full((1, 1, 1, 1), 0.5)
    result = pgd(model, images, torch.tensor([0]), eps=0.5, step_size=0.1, steps=3, random_start=False)
    assert result.success.tolist() == [True]
    assert result.gradients.tolist() == [3]


def test_a_success_of_one_restart_survives_the_next_ones():
    model, images = Odd(0.1, 0.4), torch.full((32, 1, 1, 1), 0.5)
    labels = torch.zeros(32, dtype=torch.int64)
    options = {"eps": 0.45, "step_size": 1e-3, "steps": 1}
    rates = [int(pgd(model, images, labels, **options, restarts=n).success.sum()) for n in (1, 2, 6)]
    assert 0 < rates[0] < rates[1] < rates[2]
    result = pgd(model, images, labels, **options, restarts=6)
    assert torch.equal(labelled(model, result.adversarial) == 1, result.success)


def first_breaks(model, images, labels, **options):
    """For each image, how many steps from itself it takes to break it; None if they do not."""
    path = pgd_path(lambda x: LOSSES["ce"](model(x), labels), images, images, **options)
    broken = torch.stack([labelled(model, x) != labels for x in path])
    return [next((t for t, b in enumerate(column) if b), None) for column in broken.T.tolist()]


def test_no_gradient_is_spent_on_an_example_already_broken():
    model, images = Linear(), some_images(24)
    labels = labelled(model, images)
    labels[:3] = (labels[:3] + 1) % 3
    options = {"eps": 0.05, "step_size": 0.006, "steps": 10}
    breaks = first_breaks(model, images, labels, **options)
    assert breaks.count(0) == 3
    assert breaks.count(None) > 0
    assert len(set(breaks)) > 4
    model.sizes.clear()
    result = pgd(model, images, labels, **options, random_start=False)
    assert result.gradients.tolist() == [10 if t is None else t for t in breaks]
    assert result.success.tolist() == [t is not None for t in breaks]
    # at each step the model sees what was not known to be broken: 0 steps are known at the start, then t - 1
    expected = [sum(b is None or (b >= t and b > 0) for b in breaks) for t in range(10)]
    assert model.sizes == expected


def test_nothing_is_left_to_do_where_all_are_broken():
    model, images = Linear(), some_images(5)
    labels = (labelled(model, images) + 1) % 3
    result = pgd(model, images, labels, eps=0.1, step_size=0.1, steps=10, restarts=5)
    assert model.sizes == []
    assert result.success.all()
    assert not result.clean_correct.any()
    assert result.gradients.tolist() == [0] * 5
    assert torch.equal(result.adversarial, images)


def test_misclassified_images_are_successes_as_they_are():
    model, images = Linear(), some_images(8)
    labels = labelled(model, images)
    labels[::2] = (labels[::2] + 1) % 3
    result = pgd(model, images, labels, eps=1e-4, step_size=1e-4, steps=3)
    assert result.clean_correct.tolist() == result.success.logical_not().tolist() == [False, True] * 4
    assert result.gradients.tolist() == [0, 3] * 4
    assert torch.equal(result.adversarial[::2], images[::2])
    assert not torch.equal(result.adversarial[1::2], images[1::2])


def test_restarts_run_on_the_unbroken_only():
    model, images = Linear(), some_images(40)
    labels = labelled(model, images)
    options = {"eps": 0.03, "step_size": 0.01, "steps": 3}
    once = pgd(model, images, labels, **options)
    unbroken = int((~once.success).sum())
    assert 0 < unbroken < 40
    model.sizes.clear()
    twice = pgd(model, images, labels, **options, restarts=2)
    assert model.sizes[0] == 40
    assert model.sizes[3] == unbroken
    assert torch.equal(twice.adversarial[once.success], once.adversarial[once.success])
    assert torch.equal(twice.gradients[once.success], once.gradients[once.success])
    assert (twice.gradients[~once.success] > 3).all()


@pytest.mark.parametrize("training", [True, False])
def test_weights_get_no_gradients_and_modes_stay(training):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3)).double()
    model.train(training)
    model[2].eval()
    pgd(model, some_images(), torch.arange(8) % 3, eps=0.1, step_size=0.05, steps=3)
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    assert [part.training for part in model.modules()] == [training, training, training, False, training, training]


def test_gradients_of_the_weights_that_were_there_stay_as_they_were():
    model = Linear()
    model.weight.grad = torch.full_like(model.weight, 7.0)
    pgd(model, some_images(), torch.arange(8) % 3, eps=0.1, step_size=0.05, steps=3)
    assert (model.weight.grad == 7).all()


@pytest.mark.parametrize("norm", NORMS)
def test_the_result_carries_no_graph_and_the_images_are_untouched(norm):
    images = some_images().requires_grad_()
    before = images.detach().clone()
    result = pgd(Linear(), images, torch.arange(8) % 3, eps=0.1, step_size=0.05, steps=3, norm=norm)
    assert not result.adversarial.requires_grad
    assert torch.equal(images.detach(), before)
    assert images.grad is None


@pytest.mark.parametrize("norm", NORMS)
def test_an_examples_fate_depends_on_the_seed_and_not_on_the_others(norm):
    model, images = Linear(), some_images(10)
    labels = labelled(model, images)
    options = {"eps": 0.06, "step_size": 0.015, "steps": 3, "restarts": 3, "norm": norm}
    plain = pgd(model, images, labels, **options)
    others = images.clone()
    others[::2] = some_images(5, seed=2)
    other_labels = labels.clone()
    other_labels[::2] = 0
    mixed = pgd(model, others, other_labels, **options)
    torch.testing.assert_close(mixed.adversarial[1::2], plain.adversarial[1::2])
    assert torch.equal(mixed.gradients[1::2], plain.gradients[1::2])
    again, other_seed = pgd(model, images, labels, **options), pgd(model, images, labels, **options, seed=1)
    assert torch.equal(again.adversarial, plain.adversarial)
    assert not torch.equal(other_seed.adversarial, plain.adversarial)


def test_an_attack_leaves_the_global_random_state_alone():
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    pgd(Linear(), some_images(), torch.arange(8) % 3, eps=0.1, step_size=0.05, steps=2)
    assert torch.rand(1) == expected


@pytest.mark.parametrize("norm", NORMS)
def test_fgsm_is_one_step_of_length_eps_from_the_image(norm):
    model, images = Linear(), some_images()
    labels = labelled(model, images)
    result = fgsm(model, images, labels, eps=0.02, norm=norm, loss="margin")
    leaf = images.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(LOSSES["margin"](model(leaf), labels).sum(), leaf)
    norms = gradient.flatten(1).norm(dim=1)[:, None, None, None]
    expected = images + 0.02 * (gradient.sign() if norm == "linf" else gradient / norms)
    torch.testing.assert_close(result.adversarial, expected)
    assert result.gradients.tolist() == [1] * 8


def test_a_loss_may_be_a_function_of_logits_and_labels():
    model, images = Linear(), some_images()
    labels = labelled(model, images)
    options = {"eps": 0.05, "step_size": 0.01, "steps": 5}
    ours = pgd(model, images, labels, **options, loss=lambda logits, y: LOSSES["margin"](logits, y) * 3)
    assert torch.equal(ours.adversarial, pgd(model, images, labels, **options, loss="margin").adversarial)


@pytest.mark.parametrize("norm", NORMS)
def test_zero_gradients_move_nothing_and_make_no_nan(norm):
    def flat(x):
        return x.flatten(1).sum(dim=1, keepdim=True) * torch.zeros(1, 3, dtype=x.dtype)

    images, labels = some_images(), torch.zeros(8, dtype=torch.int64)
    result = pgd(flat, images, labels, eps=0.1, step_size=0.05, steps=3, norm=norm, random_start=False)
    assert torch.equal(result.adversarial, images)
    assert not result.success.any()


@pytest.mark.parametrize("norm", NORMS)
def test_a_model_may_be_a_plain_function(norm):
    def model(images):
        return torch.stack([images.mean(dim=(1, 2, 3)), 1 - images.mean(dim=(1, 2, 3))], dim=1)

    result = pgd(model, torch.full((2, *SHAPE), 0.55), torch.tensor([0, 0]), eps=0.3, step_size=0.2, steps=5, norm=norm)
    assert result.success.tolist() == [True, True]


def test_no_images_are_an_empty_result():
    result = pgd(Linear(), some_images(0), torch.zeros(0).long(), eps=0.1, step_size=0.1, steps=2)
    assert result.adversarial.shape == (0, *SHAPE)
    assert result.success.shape == (0,)


def certified_images(model, **options):
    """Images, the classes the model predicts and their radii; those with hardly any radius are left out."""
    images = some_images(12, seed=5, low=0.2, high=0.8)
    radii = certified_radius(model.embed(images), model.clusters, **options)
    keep = radii > 1e-2
    assert keep.sum() >= 4
    return images[keep], labelled(model, images[keep]), radii[keep]


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize(
    ("rule", "neighbours", "per_class"),
    [("nearest", None, 1), ("nearest", None, 2), ("soft", None, 1), ("soft", None, 2), ("soft", 3, 2)],
)
def test_no_attack_succeeds_inside_a_certified_radius(rule, neighbours, per_class, loss):
    model = cluster_model(3, per_class, rule, neighbours)
    images, labels, radii = certified_images(model, rule=rule, neighbours=neighbours)
    options = {"steps": 15, "norm": "l2", "loss": loss}
    assert not fallen(model, images, labels, 0.999 * radii, **options).any()
    assert not fallen(model, images, labels, 0.999 * radii / 4, **options | {"norm": "linf"}).any()


def test_the_certificate_of_one_cluster_a_class_is_where_attacks_begin_to_succeed():
    model = cluster_model(3, 1, "nearest", None)
    images, labels, radii = certified_images(model)
    walls = torch.minimum(images, 1 - images).flatten(1).amin(dim=1)
    free = radii < walls
    assert free.any()
    options = {"steps": 40, "restarts": 4, "norm": "l2", "loss": "margin"}
    assert fallen(model, images[free], labels[free], 1.01 * radii[free], **options).all()


@pytest.mark.parametrize("name", ["eps", "step_size", "steps", "restarts"])
@pytest.mark.parametrize("value", [0, -1, math.nan, math.inf])
def test_sizes_without_meaning_are_refused(as_installed, name, value):
    options = {"eps": 0.1, "step_size": 0.1, "steps": 2, "restarts": 1} | {name: value}
    for attack in (pgd, walk, carried):
        with pytest.raises(ValueError, match=f"{name}: expected a positive .*number, got {value}"):
            attack(Linear(), some_images(2), torch.tensor([0, 1]), **options)


def walk(model, images, labels, *, restarts, **options):
    return cell_walk(cluster_model(0, 1), images, labels, rivals=restarts, **options)


def carried(model, images, labels, **options):
    return transfer(Linear(seed=1), model, images, labels, **options)


@pytest.mark.parametrize("attack", [pgd, walk, carried])
def test_eps_in_bytes_and_broken_counts_are_refused(as_installed, attack):
    options = {"eps": 0.1, "step_size": 0.1, "steps": 2, "restarts": 1}
    for changes, message in (
        ({"eps": 8}, r"eps: expected at most 1 in linf for pixels in \[0, 1\] \(8/255, not 8\), got 8"),
        ({"eps": "8/255"}, "eps: expected a positive number, got '8/255'"),
        ({"eps": True}, "eps: expected a positive number, got True"),
        ({"eps": 4.1, "norm": "l2"}, r"eps: expected at most 4 in l2 .* got 4\.1"),
        ({"steps": 2.5}, r"steps: expected a positive whole number, got 2\.5"),
        ({"restarts": 1.5}, r"restarts: expected a positive whole number, got 1\.5"),
        ({"steps": True}, "steps: expected a positive whole number, got True"),
    ):
        with pytest.raises(ValueError, match=message):
            attack(Linear(), some_images(2), torch.tensor([0, 1]), **options | changes)
    for images in (255 * some_images(2), -some_images(2)):
        with pytest.raises(ValueError, match=r"images: expected pixels in \[0, 1\], got values from"):
            attack(Linear(), images, torch.tensor([0, 1]), **options)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"labels": torch.tensor([0, 3])}, r"labels: expected classes in 0\.\.2, got 0 to 3"),
        ({"labels": torch.tensor([0, -1])}, r"labels: expected classes in 0\.\.2, got -1 to 0"),
        ({"labels": torch.tensor([0])}, "labels: expected one for each of 2 images, got 1"),
        ({"labels": torch.tensor([0.0, 1.0])}, "labels: expected integers, got torch.float32"),
        ({"labels": torch.eye(2).long()}, r"labels: expected one for each of 2 images, got shape \[2, 2\]"),
        ({"images": some_images(2).byte()}, "images: expected a floating dtype and shape .*, got torch.uint8 of shape"),
        ({"images": some_images(2).flatten(1)}, r"images: expected .*, got torch.float64 of shape \[2, 16\]"),
        ({"images": some_images(2) + 0.6}, r"images: expected pixels in \[0, 1\], got values from 0\.9\d+ to 1\.\d+"),
        ({"images": some_images(2) - 0.6}, r"images: expected pixels in \[0, 1\]"),
        ({"images": torch.full((2, *SHAPE), math.nan).double()}, r"images: expected pixels in \[0, 1\]"),
        ({"norm": "l1"}, r"norm: expected one of \('linf', 'l2'\), got 'l1'"),
        ({"loss": "cw"}, r"loss: expected one of \['ce', 'dlr', 'margin'\] or a function, got 'cw'"),
        ({"eps": 8.0}, r"eps: expected at most 1 in linf for pixels in \[0, 1\] \(8/255, not 8\), got 8"),
        ({"model": lambda x: torch.full((2, 3), math.nan)}, "model: expected logits, got NaN"),
        ({"model": lambda x: x.flatten(1)[:1]}, r"model: expected logits \[2, class\], got shape \[1, 16\]"),
        ({"model": lambda x: x}, r"model: expected logits \[2, class\], got shape \[2, 1, 4, 4\]"),
    ],
)
def test_bad_input_is_refused(as_installed, changes, message):
    arguments = {"model": Linear(), "images": some_images(2), "labels": torch.tensor([0, 1])}
    arguments |= {"eps": 0.1, "step_size": 0.1, "steps": 2} | changes
    model, images, labels = (arguments.pop(name) for name in ("model", "images", "labels"))
    with pytest.raises(ValueError, match=message):
        pgd(model, images, labels, **arguments)


@pytest.mark.parametrize("label", [0, 1])
@pytest.mark.parametrize("where", [0, 1], ids=["own", "rival"])
@pytest.mark.parametrize("steps", [1, 3])
def test_nan_logits_on_the_way_are_no_success(label, where, steps):
    def model(images):
        means = images.mean(dim=(1, 2, 3))
        logits = [1 - 0.1 * means, torch.zeros_like(means)]
        logits[where] = logits[where].where(means < 0.55, math.nan)
        return torch.stack([logits[label], logits[1 - label]], dim=1)

    image = torch.full((1, *SHAPE), 0.5)
    with pytest.raises(ValueError, match="model: expected logits, got NaN"):
        pgd(model, image, torch.tensor([label]), eps=0.2, step_size=0.2, steps=steps, random_start=False)


# cooled logits


def far_apart(nats, dtype=torch.float64):
    """A cluster model whose two largest logits lie that many nats apart, at the median of some images; the images."""
    model, images = cluster_model(3, 1, variance=1.0).to(dtype), some_images(31, dtype=dtype)
    with torch.no_grad():
        top = model(images).topk(2, dim=1).values
    model.variance *= float((top[:, 0] - top[:, 1]).median()) / nats
    return model, images


def some_median(model, images):
    """Which image has the median gap."""
    with torch.no_grad():
        top = model(images).topk(2, dim=1).values
    return (top[:, 0] - top[:, 1]).argsort()[len(images) // 2 : len(images) // 2 + 1]


@pytest.mark.parametrize("nats", [5.01, 30.0, 300.0])
def test_cooling_keeps_predictions_and_brings_the_median_gap_down(nats):
    model, images = far_apart(nats)
    cooled = rescaled(model, images)
    with torch.no_grad():
        before, after = model(images), cooled(images)
    assert cooled.temperature == pytest.approx(nats / SANE_GAP)
    torch.testing.assert_close(after, before / cooled.temperature)
    assert torch.equal(after.argsort(dim=1), before.argsort(dim=1))
    top = after.topk(2, dim=1).values
    assert (top[:, 0] - top[:, 1]).median().item() == pytest.approx(SANE_GAP)


@pytest.mark.parametrize("nats", [1e-6, 1.0, 4.99])
def test_logits_close_enough_are_left_alone(nats):
    model, images = far_apart(nats)
    cooled = rescaled(model, images)
    assert cooled.temperature == 1
    assert torch.equal(cooled(images), model(images))


def test_the_temperature_is_of_the_images_alone_and_the_model_stays_as_it_is():
    model, images = far_apart(40.0)
    before = model.variance.clone()
    # a model that is wrong about everything is cooled like one that is right: no label is asked for
    turned = lambda x: model(x).roll(1, dims=1)  # noqa: E731
    assert rescaled(turned, images).temperature == pytest.approx(rescaled(model, images).temperature)
    assert torch.equal(model.variance, before)
    assert all(p.grad is None for p in rescaled(Linear(), images).parameters())


def test_cooled_cross_entropy_has_a_gradient_again():
    model, images = far_apart(30.0, torch.float32)
    images = images[some_median(model, images)].expand(8, *SHAPE).contiguous()
    labels = labelled(model, images)
    slopes = []
    for each in (model, rescaled(model, images)):
        logits = each(images).detach().requires_grad_()
        loss = cross_entropy(logits, labels)
        (slope,) = torch.autograd.grad(loss.sum(), logits)
        slopes.append((loss.detach(), slope.gather(1, labels[:, None])))
    assert (slopes[0][0] == 0).all()
    assert (slopes[0][1] == 0).all()
    assert (slopes[1][0] > 1e-3).all()
    assert (slopes[1][1] < -1e-3).all()


def test_cross_entropy_breaks_nothing_on_far_logits_and_much_on_cooled_ones():
    model, images = far_apart(3000.0, torch.float32)
    labels = labelled(model, images)
    radii = certified_radius(model.embed(images), model.clusters)
    options = {"eps": 1.3 * radii.median().item(), "step_size": 0.2 * radii.median().item(), "steps": 15, "norm": "l2"}
    with pytest.warns(UserWarning, match="cross-entropy is saturated"):
        raw = pgd(model, images, labels, **options, random_start=False)
    cooled = pgd(rescaled(model, images), images, labels, **options, random_start=False)
    assert raw.success.sum() <= 3
    assert cooled.success.sum() >= 12


@pytest.mark.parametrize("temperature", [0.0, -1.0, math.nan])
def test_a_temperature_is_positive(temperature):
    with pytest.raises(ValueError, match=f"temperature: expected a positive number, got {temperature}"):
        Rescaled(Linear(), temperature)


# the walk between cells


def walked(model, images, labels, radii, ratio, **options):
    """Whether each image falls to a walk within that share of its own radius."""
    found = []
    for x, y, radius in zip(images, labels, radii.tolist(), strict=True):
        eps = ratio * radius
        result = cell_walk(model, x[None], y[None], eps=eps, step_size=eps / 5, steps=25, **options)
        assert lengths(result.adversarial - x, options["norm"]) <= eps * (1 + 1e-12)
        found.append(result.success.item())
    return torch.tensor(found)


def inside_the_walls(model, radii_of, most=6):
    """Images whose ball, and a little more, meets no wall at 0 or 1."""
    images = some_images(60, seed=5, low=0.3, high=0.7)
    radii = radii_of(images)
    keep = ((radii > 0.01) & (1.1 * radii < 0.3)).nonzero().squeeze(1)[:most]
    assert len(keep) == most
    return images[keep], labelled(model, images[keep]), radii[keep]


@pytest.mark.parametrize("seed", [3, 4])
def test_a_walk_finds_the_exact_distance_of_one_cluster_a_class(seed):
    model = cluster_model(seed, 1, "nearest", classes=4, encoder=Centred())
    images, labels, radii = inside_the_walls(
        model, lambda x: certified_radius(model.embed(x), model.clusters, bound="pairwise")
    )
    # the first rival is the nearest one, so a single restart does it
    assert not walked(model, images, labels, radii, 0.98, norm="l2", rivals=1).any()
    assert walked(model, images, labels, radii, 1.02, norm="l2", rivals=1).all()


def test_a_walk_finds_the_exact_distance_in_linf_too():
    model = cluster_model(4, 1, "nearest", classes=4, encoder=Centred())
    centroids = model.centroids

    def radii_of(x):
        z = model.embed(x)
        own = model.labels[torch.cdist(z, centroids).argmin(dim=1)]
        squares = torch.cdist(z, centroids).square()
        gaps = squares - squares.gather(1, own[:, None])
        across = 2 * (centroids[own][:, None] - centroids).abs().sum(dim=2)
        return (gaps / across).masked_fill(across == 0, math.inf).amin(dim=1)

    images, labels, radii = inside_the_walls(model, radii_of)
    assert not walked(model, images, labels, radii, 0.98, norm="linf", rivals=3).any()
    assert walked(model, images, labels, radii, 1.02, norm="linf", rivals=3).all()


@pytest.mark.parametrize("seed", [3, 6])
def test_a_walk_comes_close_to_the_exact_distance_of_several_clusters_a_class(seed):
    model = cluster_model(seed, 3, "nearest", encoder=Centred())
    images, labels, radii = inside_the_walls(
        model, lambda x: exact_nearest_rule_distance(model.embed(x), model.clusters)[0]
    )
    assert not walked(model, images, labels, radii, 0.98, norm="l2", rivals=6).any()
    assert walked(model, images, labels, radii, 1.05, norm="l2", rivals=6).all()


@pytest.mark.parametrize("norm", NORMS)
def test_a_walk_finds_the_closed_form_distance_of_a_linear_head(norm):
    torch.manual_seed(2)
    model = LinearClassifier(Centred(), SIZE, 4).double()
    weight, bias = model.linear.weight.detach(), model.linear.bias.detach()

    def radii_of(x):
        return linear_radius(weight, bias, model.embed(x), labelled(model, x), norm=norm)

    images, labels, radii = inside_the_walls(model, radii_of)
    assert not walked(model, images, labels, radii, 0.98, norm=norm, rivals=3).any()
    assert walked(model, images, labels, radii, 1.02, norm=norm, rivals=3).all()
    if norm == "l2":
        assert walked(model, images, labels, radii, 1.02, norm=norm, rivals=1).all()


def two_rivals(kind, normals, distances, sizes):
    """A model of class 0 with two rivals beyond hyperplanes with these unit normals, at these distances of an image.

    ``sizes``: how far apart the centroids, or the weights, are: a far rival has a large gap at a small distance.
    """
    image = torch.full((1, *SHAPE), 0.5, dtype=torch.float64)
    if kind == "linear":
        model = LinearClassifier(Centred(), SIZE, 3).double()
        with torch.no_grad():
            model.linear.weight.zero_()
            model.linear.weight[1:] = torch.stack([n * size for n, size in zip(normals, sizes, strict=True)])
            model.linear.bias.zero_()
            model.linear.bias[1:] = torch.tensor([-d * size for d, size in zip(distances, sizes, strict=True)])
        return model, image
    # the own centroid o with <o, n> = d - size / 2 for either normal, which are orthogonal; the image lies at 0
    own = sum((d - size / 2) * n for n, d, size in zip(normals, distances, sizes, strict=True))
    centroids = torch.stack([own, *(own + size * n for n, size in zip(normals, sizes, strict=True))])
    clusters = Clusters(centroids, torch.arange(3), torch.ones(3, dtype=torch.float64))
    return ClusterClassifier(Centred(), clusters), image


@pytest.mark.parametrize("kind", ["clusters", "linear"])
def test_the_first_rival_is_the_one_at_the_smallest_distance(kind):
    axes = torch.eye(SIZE, dtype=torch.float64)
    # the second has by far the smaller gap of the logits
    model, image = two_rivals(kind, axes[:2], (0.10, 0.14), (1.0, 0.3))
    label = torch.tensor([0])
    gaps = -model(image)[0, 1:] + model(image)[0, 0]
    assert gaps[0] > 2 * gaps[1] > 0
    options = {"step_size": 0.02, "steps": 20, "norm": "l2"}
    assert not cell_walk(model, image, label, eps=0.099, rivals=2, **options).success.any()
    result = cell_walk(model, image, label, eps=0.12, rivals=1, **options)
    assert result.success.all()
    assert labelled(model, result.adversarial).tolist() == [1]


@pytest.mark.parametrize("kind", ["clusters", "linear"])
def test_each_restart_heads_for_its_own_rival(kind):
    # the first rival lies along one pixel; the second, farther in L2, along all others, and so nearer in L-infinity
    along = torch.eye(SIZE, dtype=torch.float64)[0]
    across = (1 - along) / math.sqrt(SIZE - 1)
    model, image = two_rivals(kind, torch.stack([along, across]), (0.10, 0.14), (0.5, 0.5))
    label, eps = torch.tensor([0]), 1.1 * 0.14 / math.sqrt(SIZE - 1)
    assert eps < 0.05
    options = {"eps": eps, "step_size": eps / 4, "steps": 20}
    first, both = (cell_walk(model, image, label, rivals=n, **options) for n in (1, 2))
    assert not first.success.any()
    assert both.success.all()
    assert labelled(model, both.adversarial).tolist() == [2]


def test_a_walk_is_not_stopped_by_saturated_logits():
    model, images = far_apart(3000.0, torch.float32)
    labels = labelled(model, images)
    radii = certified_radius(model.embed(images), model.clusters)
    eps = 1.5 * radii.median().item()
    result = cell_walk(model, images, labels, eps=eps, step_size=eps / 5, steps=15, norm="l2")
    assert result.success.sum() >= 12
    assert not (result.success & (radii > eps)).any()


@pytest.mark.parametrize(("per_class", "rivals", "runs"), [(1, 1, 1), (1, 2, 2), (1, 50, 2), (2, 50, 4), (2, 3, 3)])
def test_a_walk_heads_for_no_more_cells_than_there_are(per_class, rivals, runs):
    model, images = cluster_model(3, per_class), some_images()
    labels = labelled(model, images)
    result = cell_walk(model, images, labels, eps=1e-6, step_size=1e-6, steps=4, rivals=rivals)
    assert not result.success.any()
    assert result.gradients.tolist() == [4 * runs] * 8


def test_how_often_an_image_walks_does_not_depend_on_those_beside_it():
    """Class 0 has three clusters and so two rivals, class 1 has one and so four, whoever is in the batch."""
    images = some_images(40, low=0.0, high=1.0)
    centroids = 0.3 * torch.randn(5, SIZE, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    clusters = Clusters(centroids, torch.tensor([0, 0, 0, 1, 2]), torch.full((5,), 0.05, dtype=torch.float64))
    model = ClusterClassifier(Rotation(0), clusters)
    labels = labelled(model, images)
    options = {"eps": 0.02, "step_size": 0.01, "steps": 3, "rivals": 9}
    together = cell_walk(model, images, labels, **options)
    assert set(labels.tolist()) == {0, 1, 2}
    assert together.gradients[~together.success].unique().tolist() == [3 * 4]
    alone = cell_walk(model, images[labels == 0], labels[labels == 0], **options)
    assert alone.gradients[~alone.success].unique().tolist() == [3 * 4]


@pytest.mark.parametrize("rivals", [1, 9])
def test_a_walk_on_a_linear_head_heads_for_the_other_classes(rivals):
    torch.manual_seed(0)
    model, images = LinearClassifier(Centred(), SIZE, 4).double(), some_images()
    result = cell_walk(model, images, labelled(model, images), eps=1e-6, step_size=1e-6, steps=4, rivals=rivals)
    assert result.gradients.tolist() == [4 * min(rivals, 3)] * 8


@pytest.mark.parametrize("norm", NORMS)
def test_a_walk_keeps_the_rules_of_attacks(norm):
    torch.manual_seed(0)
    model = cluster_model(3, 2, encoder=nn.Sequential(nn.Flatten(), nn.Linear(SIZE, SIZE), nn.Tanh()).double())
    counted, images = Counted(model), some_images(40, low=0.0, high=1.0)
    labels = labelled(model, images)
    labels[::7] = (labels[::7] + 1) % 3
    modes = [part.training for part in model.modules()]
    eps = 0.03 if norm == "linf" else 0.12
    options = {"eps": eps, "step_size": eps / 3, "steps": 6, "rivals": 3, "norm": norm}
    torch.manual_seed(1)
    result = cell_walk(model, images, labels, **options)
    torch.manual_seed(2)
    again, other = cell_walk(model, images, labels, **options), cell_walk(model, images, labels, **options, seed=1)
    assert torch.equal(again.adversarial, result.adversarial)
    assert torch.equal(again.gradients, result.gradients)
    assert not torch.equal(other.adversarial, result.adversarial)
    assert result.adversarial.min() >= 0
    assert result.adversarial.max() <= 1
    assert (lengths(result.adversarial - images, norm) <= eps * (1 + 1e-12)).all()
    assert torch.equal(result.success, labelled(model, result.adversarial) != labels)
    assert result.success[::7].all()
    assert torch.equal(result.adversarial[::7], images[::7])
    assert result.gradients[::7].sum() == 0
    assert 6 < result.success.sum() < 40
    assert (result.gradients[~result.success] == 18).all()
    assert (result.gradients[result.success] < 18).all()
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    assert [part.training for part in model.modules()] == modes
    assert counted.backward_rows == 0


def test_a_walk_survives_an_own_centroid_on_top_of_a_rival():
    model, images = cluster_model(3, 1, "nearest"), some_images()
    labels = labelled(model, images)
    model.centroids[1] = model.centroids[0]
    result = cell_walk(model, images, labels, eps=0.05, step_size=0.02, steps=3)
    assert result.adversarial.isfinite().all()


def test_a_walk_of_no_images_is_empty():
    result = cell_walk(cluster_model(3, 1), some_images(0), torch.zeros(0).long(), eps=0.1, step_size=0.1, steps=2)
    assert result.success.shape == (0,)


@pytest.mark.parametrize("model", [Linear(), nn.Flatten(), lambda x: x.flatten(1)], ids=["module", "layer", "function"])
def test_a_walk_needs_clusters_or_a_linear_head(as_installed, model):
    with pytest.raises(TypeError, match="model: expected a ClusterClassifier or a LinearClassifier, got "):
        cell_walk(model, some_images(2), torch.tensor([0, 1]), eps=0.1, step_size=0.1, steps=2)


# transfer


def test_transfer_is_judged_by_the_target_only():
    source, model, images = Linear(seed=0), Linear(seed=7), some_images(40)
    labels = labelled(model, images)
    eps, step_size, steps = 0.08, 0.02, 6
    result = transfer(source, model, images, labels, eps=eps, step_size=step_size, steps=steps, seed=3)
    # a plain rewrite: up the source's margin all the way, whatever the source says of its own
    x = random_point(images, eps, "linf", torch.Generator().manual_seed(3))
    for _ in range(steps):
        leaf = x.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(margin_loss(source(leaf), labels).sum(), leaf)
        x = (x + step_size * gradient.sign()).clamp(images - eps, images + eps).clamp(0, 1)
    torch.testing.assert_close(result.adversarial, x)
    assert torch.equal(result.success, labelled(model, x) != labels)
    wrong = labelled(source, x) != labels
    assert (wrong & ~result.success).any()
    assert result.success.any()
    assert result.clean_correct.all()


def test_the_source_never_stops_early():
    # the source is wrong about every image, and about every point of its ball
    source, model, images = Linear(seed=0), Linear(seed=7), some_images(20)
    labels = labelled(model, images)
    hostile = Counted(lambda x: source(x) - 100 * nn.functional.one_hot(labels, 3))
    result = transfer(hostile, model, images, labels, eps=0.02, step_size=0.005, steps=5, loss="margin")
    assert hostile.backward_rows == 5 * 20
    assert result.gradients.tolist() == [5] * 20
    assert (result.adversarial != images).flatten(1).any(dim=1).all()


def test_transfer_runs_again_on_what_is_left_and_counts_it():
    source, model, images = Linear(seed=0), Linear(seed=7), some_images(40)
    labels = labelled(model, images)
    labels[0] = (labels[0] + 1) % 3
    options = {"eps": 0.12, "step_size": 0.1, "steps": 2}
    once, thrice = (transfer(source, model, images, labels, **options, restarts=n) for n in (1, 3))
    assert once.success[0]
    assert once.gradients.tolist() == [0] + [2] * 39
    assert torch.equal(thrice.adversarial[once.success], once.adversarial[once.success])
    assert torch.equal(thrice.gradients[once.success], once.gradients[once.success])
    assert 1 < once.success.sum() < 40
    assert (thrice.gradients[~thrice.success] == 6).all()
    assert torch.equal(thrice.success, labelled(model, thrice.adversarial) != labels)
    assert not thrice.clean_correct[0]


def test_transfer_from_the_model_itself_is_pgd_judged_at_the_end():
    model, images = Linear(), some_images(60)
    labels = labelled(model, images)
    options = {"eps": 0.015, "step_size": 0.004, "steps": 10, "loss": "margin"}
    carried_over, own = transfer(model, model, images, labels, **options), pgd(model, images, labels, **options)
    # on a linear model the last point of a climb is the best one, so nothing found on the way is lost again
    assert (carried_over.success == own.success).double().mean() >= 0.95
    assert 0.2 < own.success.double().mean() < 0.8


@pytest.mark.parametrize("norm", NORMS)
def test_transfer_stays_in_the_ball_and_leaves_no_trace(norm):
    source, model, images = Linear(seed=0), Linear(seed=7), some_images(20, low=0.0, high=1.0)
    labels = labelled(model, images)
    options = {"eps": 0.2, "step_size": 0.15, "steps": 3, "restarts": 2, "norm": norm}
    result = transfer(source, model, images, labels, **options)
    assert result.adversarial.min() >= 0
    assert result.adversarial.max() <= 1
    assert (lengths(result.adversarial - images, norm) <= 0.2 + 1e-12).all()
    for each in (source, model):
        assert all(p.grad is None and p.requires_grad for p in each.parameters())
    # nothing of the target is differentiated
    assert model.sizes == []
    again = transfer(source, model, images, labels, **options)
    assert torch.equal(again.adversarial, result.adversarial)


def stuck(images):
    """Finite logits whose input gradient is NaN: the root of a square at 0."""
    logits = Linear()(images)
    return logits + 0 * (images - images.detach()).square().sum(dim=(1, 2, 3)).sqrt()[:, None]


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("attack", ["pgd", "transfer", "paper", "autoattack"])
def test_a_gradient_of_nan_is_an_error_and_not_robustness(attack, norm):
    images = some_images(4)
    labels = labelled(stuck, images)
    options = {"eps": 0.1, "norm": norm}
    calls = {
        "pgd": lambda: pgd(stuck, images, labels, step_size=0.1, steps=2, **options),
        "transfer": lambda: transfer(stuck, Linear(), images, labels, step_size=0.1, steps=2, **options),
        "paper": lambda: paper_pgd(stuck, images, labels, eps=0.1),
        "autoattack": lambda: autoattack(
            lambda x: stuck(x.double()).float(), images.float(), labels, parts=["apgd-ce"], **options
        ),
    }
    with pytest.raises(ValueError, match="model: expected a finite input gradient, got NaN"):
        calls[attack]()


def test_transfer_says_when_the_source_has_lost_its_way():
    """A gradient of NaN would leave NaN for an image, and this model would be blamed for its logits."""
    images = some_images(2)
    options = {"eps": 0.1, "step_size": 0.1, "steps": 1}
    with pytest.raises(ValueError, match="source: expected logits, got NaN"):
        transfer(lambda x: x.flatten(1)[:, :3] * math.nan, Linear(), images, torch.tensor([0, 1]), **options)


def test_transfer_refuses_an_unknown_loss():
    with pytest.raises(ValueError, match=r"loss: expected one of \['ce', 'dlr', 'margin'\] or a function, got 'cw'"):
        transfer(Linear(), Linear(), some_images(2), torch.tensor([0, 1]), eps=0.1, step_size=0.1, steps=1, loss="cw")


@pytest.mark.parametrize("norm", NORMS)
def test_each_image_may_have_a_ball_of_its_own(norm):
    model, images = Linear(2), some_images(12)
    labels = labelled(model, images)
    radii = linear_radius(model.weight.detach(), model.bias.detach(), images.flatten(1), labels, norm=norm)
    beyond = torch.arange(12) % 2 == 0
    eps = radii * (1 + 0.01 * (2 * beyond.to(radii) - 1))
    found = pgd(model, images, labels, eps=eps, step_size=eps / 8, steps=40, norm=norm, loss="margin")
    assert torch.equal(found.success, beyond)
    assert (lengths(found.adversarial - images, norm) <= eps * (1 + 1e-5)).all()

    def each(length):
        return torch.full((12,), length, dtype=torch.float64)

    # one of each is the same as one for all
    climb = partial(pgd, steps=5, restarts=2, loss="margin")
    for attack, sizes in ((climb, {"eps": 0.05, "step_size": 0.01}), (fgsm, {"eps": 0.05})):
        one = attack(model, images, labels, norm=norm, **sizes)
        every = attack(model, images, labels, norm=norm, **{name: each(size) for name, size in sizes.items()})
        assert torch.allclose(one.adversarial, every.adversarial, atol=1e-7)
        assert torch.equal(one.success, every.success)
        assert torch.equal(one.gradients, every.gradients)


@pytest.mark.parametrize(
    ("eps", "message"),
    [
        (torch.full((3,), 0.1), r"eps: expected a number, or one for each of 4 images, got shape \[3\]"),
        (torch.tensor([0.1, 0.1, 0.0, 0.1]), "eps: expected positive numbers, got 0.0 for example 2"),
        (torch.tensor([0.1, 0.1, 0.1, math.nan]), "eps: expected positive numbers, got nan for example 3"),
        (torch.tensor([0.1, 8.0, 0.1, 0.1]), "eps: expected at most 1 in linf"),
        ("0.1", "eps: expected a positive number, got '0.1'"),
        ([0.1] * 4, "eps: expected a positive number"),
    ],
)
def test_balls_that_are_none_are_named(as_installed, eps, message):
    model, images = Linear(), some_images(4)
    with pytest.raises(ValueError, match=message):
        pgd(model, images, labelled(model, images), eps=eps, step_size=0.01, steps=2)


def test_a_length_may_be_a_tensor_of_one_number(as_installed):
    model, images = Linear(), some_images(4)
    labels = labelled(model, images)
    plain = pgd(model, images, labels, eps=0.125, step_size=0.0625, steps=3)
    for attack in (pgd, paper_pgd):
        tensors = attack(model, images, labels, eps=torch.tensor(0.125), step_size=torch.tensor(0.0625), steps=3)
        numbers = attack(model, images, labels, eps=0.125, step_size=0.0625, steps=3)
        assert torch.equal(tensors.adversarial, numbers.adversarial)
    assert plain.gradients.any()


@pytest.mark.parametrize("attack", [paper_pgd, partial(autoattack, norm="linf")])
def test_other_attacks_say_that_their_ball_is_one_for_all(as_installed, attack):
    model, images = Linear(), some_images(4)
    with pytest.raises(ValueError, match=r"eps: expected one number for all images, got shape \[4\]"):
        attack(model, images, labelled(model, images), eps=torch.full((4,), 0.1))


def test_losses_are_known_by_name_without_pytorch():
    assert tuple(LOSSES) == names.LOSSES
