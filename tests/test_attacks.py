"""Attacks: as strong as the closed form where there is one, inside the ball always, and not a gradient wasted."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from clustr_core.ascent import direction, iterates, maximise, project, random_point
from clustr_core.attacks import LOSSES, fgsm, pgd
from clustr_core.certify import certified_radius, linear_radius
from clustr_core.classifiers import ClusterClassifier
from clustr_core.clusters import Clusters

SHAPE = (1, 4, 4)
NORMS = ("linf", "l2")


class Linear(nn.Module):
    """A linear classifier of 4 x 4 images that notes the size of every batch it sees with gradients on."""

    def __init__(self, classes=3, seed=0, dtype=torch.float64):
        super().__init__()
        g = torch.Generator().manual_seed(seed)
        self.weight = nn.Parameter(torch.randn(classes, math.prod(SHAPE), generator=g, dtype=dtype))
        # the middle of the image space lies on every border
        self.bias = nn.Parameter(-0.5 * self.weight.detach().sum(dim=1))
        self.sizes = []

    def forward(self, images):
        if torch.is_grad_enabled():
            self.sizes.append(len(images))
        return images.flatten(1) @ self.weight.T + self.bias


class Odd(nn.Module):
    """Logits [0, v(x)] with v > 0 only for pixels in a window, though the gradient always points up."""

    def __init__(self, low, high):
        super().__init__()
        self.low, self.high = low, high

    def forward(self, images):
        x = images.mean(dim=(1, 2, 3))
        inside = (x > self.low) & (x < self.high)
        value = x - x.detach() + torch.where(inside, 1.0, -1.0)
        return torch.stack([torch.zeros_like(value), value], dim=1)


def some_images(count=8, seed=1, low=0.35, high=0.65):
    g = torch.Generator().manual_seed(seed)
    return low + (high - low) * torch.rand(count, *SHAPE, generator=g, dtype=torch.float64)


def labelled(model, images):
    with torch.no_grad():
        return model(images).argmax(dim=1)


def lengths(offsets, norm):
    return offsets.flatten(1).norm(p=math.inf if norm == "linf" else 2, dim=1)


def one_by_one(model, images, labels, radii, **options):
    """Whether each image falls to an attack within its own eps."""
    found = []
    for x, y, eps in zip(images, labels, radii.tolist(), strict=True):
        found.append(pgd(model, x[None], y[None], eps=eps, step_size=eps / 8, **options).success.item())
    return torch.tensor(found)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize(
    ("classes", "loss", "ratio"), [(2, "ce", 1.001), (2, "margin", 1.001), (4, "margin", 1.2), (4, "ce", 2.0)]
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
    assert one_by_one(model, images, labels, radii * ratio, **options).all()
    assert not one_by_one(model, images, labels, radii * 0.999, **options).any()


@given(st.sampled_from(NORMS), st.sampled_from(sorted(LOSSES)), st.floats(1e-4, 3), st.floats(0.01, 3), st.data())
@settings(max_examples=60, deadline=None)
def test_pgd_never_leaves_the_ball_or_the_pixel_range(norm, loss, eps, relative_step, data):
    seed, dtype = data.draw(st.integers(0, 10**6)), data.draw(st.sampled_from([torch.float32, torch.float64]))
    model = Linear(seed=seed, dtype=dtype)
    images = some_images(4, seed, low=0, high=1).to(dtype)
    images[0] = images[0].round()
    labels = torch.arange(4) % 3
    options = {"eps": eps, "step_size": eps * relative_step, "steps": 4, "norm": norm}
    result = pgd(model, images, labels, **options, loss=loss, restarts=2, seed=seed)
    start = random_point(images, eps, norm, torch.Generator().manual_seed(seed))
    path = iterates(lambda x: LOSSES[loss](model(x), labels), images, start, **options)
    slack = 4 * torch.finfo(dtype).eps
    for points in (result.adversarial, *path):
        assert points.min() >= 0
        assert points.max() <= 1
        assert (lengths(points - images, norm) <= eps * (1 + slack) + slack).all()
    assert torch.equal(result.success, labelled(model, result.adversarial) != labels)


def test_a_success_at_one_step_only_is_kept():
    model, images = Odd(0.65, 0.75), torch.full((1, 1, 1, 1), 0.5)
    options = {"eps": 0.5, "step_size": 0.1, "steps": 4}
    path = list(iterates(lambda x: model(x)[:, 1], images, images, **options))
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
    path = iterates(lambda x: LOSSES["ce"](model(x), labels), images, images, **options)
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
def test_random_points_fill_the_ball(norm):
    images = torch.full((2000, 1, 2, 2), 0.5, dtype=torch.float64)
    offsets = random_point(images, 0.2, norm, torch.Generator().manual_seed(0)) - images
    radii = lengths(offsets, norm) / 0.2
    assert radii.max() <= 1 + 1e-12
    # uniform in a ball of dimension 4: P(radius <= r) = r^4
    assert (radii**4).mean().item() == pytest.approx(0.5, abs=0.03)
    torch.testing.assert_close(offsets.mean(dim=0), torch.zeros(1, 2, 2, dtype=torch.float64), atol=0.01, rtol=0)


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
def test_iterates_climb_and_end_where_maximise_does(norm):
    model, images = Linear(), some_images()
    labels = labelled(model, images)

    def objective(x):
        return LOSSES["ce"](model(x), labels)

    options = {"eps": 0.2, "step_size": 0.03, "steps": 5, "norm": norm}
    path = list(iterates(objective, images, images, **options))
    assert len(path) == 6
    assert torch.equal(path[0], images)
    values = torch.stack([objective(x) for x in path])
    assert (values.diff(dim=0) > 0).all()
    torch.testing.assert_close(lengths(path[1] - images, norm), torch.full((8,), 0.03, dtype=torch.float64))
    assert torch.equal(maximise(objective, images, images, **options), path[-1])
    assert not path[-1].requires_grad
    assert model.weight.grad is None


@pytest.mark.parametrize("norm", NORMS)
def test_zero_gradients_move_nothing_and_make_no_nan(norm):
    def flat(x):
        return x.flatten(1).sum(dim=1, keepdim=True) * torch.zeros(1, 3, dtype=x.dtype)

    images, labels = some_images(), torch.zeros(8, dtype=torch.int64)
    result = pgd(flat, images, labels, eps=0.1, step_size=0.05, steps=3, norm=norm, random_start=False)
    assert torch.equal(result.adversarial, images)
    assert not result.success.any()


@pytest.mark.parametrize("scale", [1e-300, 1e-160, 1.0, 1e160])
def test_an_l2_direction_has_length_one_at_any_scale(scale):
    gradient = torch.randn(3, *SHAPE, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    torch.testing.assert_close(lengths(direction(gradient * scale, "l2"), "l2"), torch.ones(3, dtype=torch.float64))


def test_projection_keeps_what_is_inside_and_shortens_the_rest():
    images = torch.full((2, 1, 1, 2), 0.5)
    points = images + torch.tensor([[[[0.03, 0.04]]], [[[0.3, 0.4]]]])
    expected = images + torch.tensor([[[[0.03, 0.04]]], [[[0.06, 0.08]]]])
    torch.testing.assert_close(project(points, images, 0.1, "l2"), expected)
    clamped = torch.tensor([[[[0.53, 0.54]]], [[[0.6, 0.6]]]])
    torch.testing.assert_close(project(points, images, 0.1, "linf"), clamped)


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


class Rotation(nn.Module):
    """An orthogonal map of the pixels, about the middle of the image space: its Lipschitz constant is 1."""

    def __init__(self, seed):
        super().__init__()
        g = torch.Generator().manual_seed(seed)
        size = math.prod(SHAPE)
        self.register_buffer("matrix", torch.linalg.qr(torch.randn(size, size, generator=g, dtype=torch.float64))[0])

    def forward(self, images):
        return (images - 0.5).flatten(1) @ self.matrix


def cluster_model(seed, per_class, rule, neighbours):
    """Three classes of clusters near the middle of the image space."""
    g = torch.Generator().manual_seed(seed)
    centroids = 0.3 * torch.randn(3 * per_class, math.prod(SHAPE), generator=g, dtype=torch.float64)
    labels = torch.arange(3).repeat_interleave(per_class)
    clusters = Clusters(centroids, labels, torch.full((3 * per_class,), 0.05, dtype=torch.float64))
    return ClusterClassifier(Rotation(seed), clusters, rule=rule, neighbours=neighbours)


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
    assert not one_by_one(model, images, labels, 0.999 * radii, **options).any()
    assert not one_by_one(model, images, labels, 0.999 * radii / 4, **options | {"norm": "linf"}).any()


def test_the_certificate_of_one_cluster_a_class_is_where_attacks_begin_to_succeed():
    model = cluster_model(3, 1, "nearest", None)
    images, labels, radii = certified_images(model)
    walls = torch.minimum(images, 1 - images).flatten(1).amin(dim=1)
    free = radii < walls
    assert free.any()
    options = {"steps": 40, "restarts": 4, "norm": "l2", "loss": "margin"}
    assert one_by_one(model, images[free], labels[free], 1.01 * radii[free], **options).all()


@pytest.mark.parametrize("name", ["eps", "step_size", "steps", "restarts"])
@pytest.mark.parametrize("value", [0, -1, math.nan, math.inf])
def test_sizes_without_meaning_are_refused(as_installed, name, value):
    options = {"eps": 0.1, "step_size": 0.1, "steps": 2, "restarts": 1} | {name: value}
    with pytest.raises(ValueError, match=f"{name}: expected a positive number, got {value}"):
        pgd(Linear(), some_images(2), torch.tensor([0, 1]), **options)
    del options["restarts"]
    if name != "restarts":
        with pytest.raises(ValueError, match=f"{name}: expected a positive number"):
            maximise(lambda x: x.sum(), some_images(2), some_images(2), **options)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"labels": torch.tensor([0, 3])}, r"labels: expected classes in 0\.\.2, got 0 to 3"),
        ({"labels": torch.tensor([0, -1])}, r"labels: expected classes in 0\.\.2, got -1 to 0"),
        ({"labels": torch.tensor([0])}, "labels: expected one for each of 2 images, got 1"),
        ({"images": some_images(2) + 0.6}, r"images: expected pixels in \[0, 1\], got values from 0\.9\d+ to 1\.\d+"),
        ({"images": some_images(2) - 0.6}, r"images: expected pixels in \[0, 1\]"),
        ({"images": torch.full((2, *SHAPE), math.nan).double()}, r"images: expected pixels in \[0, 1\]"),
        ({"norm": "l1"}, r"norm: expected one of \('linf', 'l2'\), got 'l1'"),
        ({"loss": "dlr"}, r"loss: expected one of \['ce', 'margin'\] or a function, got 'dlr'"),
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
