"""The paper's evaluation: its scores and its rule against plain rewrites, and what leaving out the rest saves."""

import math
from dataclasses import replace

import pytest
import reference
import torch
import torch.nn.functional as F
from toy_models import SHAPE, SIZE, Centred, Counted, Linear, cluster_model, labelled, lengths, some_images

from clustr_core.attacks.gradient import pgd
from clustr_core.attacks.losses import LOSSES
from clustr_core.attacks.names import PAPER_EPS, PAPER_RESTARTS, PAPER_STEP_SIZE, PAPER_STEPS
from clustr_core.attacks.paper import ScoreModel, paper_pgd, paper_surface
from clustr_core.certificates.linear import linear_radius
from clustr_core.models.classifiers import ClusterClassifier
from clustr_core.models.clusters import Clusters

# scores


def plain_scores(z, clusters, neighbours):
    """sum over the L nearest centroids j of class c of exp(-d_j^2 / 2 sigma_j^2), of one embedding."""
    squares = [reference.squared_distance(z, mu) for mu in clusters.centroids.tolist()]
    nearest = sorted(range(len(squares)), key=squares.__getitem__)[: neighbours or len(squares)]
    scores = [0.0] * clusters.num_classes
    for j in nearest:
        scores[int(clusters.labels[j])] += math.exp(-squares[j] / (2 * float(clusters.variance[j])))
    return scores


@pytest.mark.parametrize("neighbours", [None, 1, 3, 5, 9, 50])
@pytest.mark.parametrize("per_class", [1, 3])
def test_scores_equal_the_loops(neighbours, per_class):
    model = cluster_model(3, per_class, neighbours=neighbours, variance=0.4)
    images = some_images(20, low=0, high=1)
    found = ScoreModel(model)(images)
    expected = [plain_scores(z, model.clusters, neighbours) for z in model.embed(images).tolist()]
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), rtol=1e-9, atol=1e-300)
    assert found.max() <= per_class
    # a class without a vote has nothing at all
    assert torch.equal(found == 0, torch.tensor(expected) == 0)
    assert (found == 0).any() == ((neighbours or 99) < 3 * per_class)
    # of classes with a vote, scores order as the log-domain logits do
    assert torch.equal(found.argmax(dim=1), labelled(model, images))


def test_scores_know_unequal_variances_and_classes():
    centroids = torch.tensor([[0.0], [1.0], [5.0]], dtype=torch.float64)
    variance = torch.tensor([1.0, 4.0, 0.25], dtype=torch.float64)
    clusters = Clusters(centroids, torch.tensor([0, 1, 0]), variance)
    model = ScoreModel(ClusterClassifier(torch.nn.Flatten(), clusters))
    image = torch.full((1, 1, 1, 1), 0.5, dtype=torch.float64)
    expected = [math.exp(-0.25 / 2) + math.exp(-(4.5**2) / 0.5), math.exp(-0.25 / 8)]
    assert model(image)[0].tolist() == pytest.approx(expected)


def test_where_all_scores_underflow_the_answer_is_class_0():
    model = cluster_model(3, 2, variance=1e-6).float()
    images = some_images(dtype=torch.float32)
    scores = ScoreModel(model)(images)
    assert torch.equal(scores, torch.zeros(8, 3))
    assert labelled(ScoreModel(model), images).tolist() == [0] * 8
    assert labelled(model, images).unique().numel() > 1
    result = paper_pgd(ScoreModel(model), images, labelled(model, images), eps=0.01, steps=3)
    assert torch.equal(result.clean_correct, labelled(model, images) == 0)
    assert torch.equal(result.success, labelled(model, images) != 0)


def test_only_cluster_classifiers_are_attacked_on_scores():
    model = cluster_model(3, 1)
    surface, linear = paper_surface(model), Linear()
    assert isinstance(surface, ScoreModel)
    assert surface.model is model
    assert paper_surface(linear) is linear


def test_scores_carry_gradients_to_the_images():
    model = ScoreModel(cluster_model(3, 2, neighbours=3, variance=0.4))
    images = some_images(2).requires_grad_()
    assert torch.autograd.gradcheck(model, images)


# the rule


def released(model, images, labels, *, eps, steps, restarts, step_size, loss, seed):
    """The released rule on the full batch, everything computed anew: kept images, success, and steps of each restart.

    Returns the gradients each example needs in each restart, and whether it then was beyond recall: kept, wrong, and
    with a loss that no right answer can have.
    """
    climb, classes = LOSSES[loss], model(images[:1]).shape[1]
    highest, kept = torch.full((len(images),), -math.inf, dtype=images.dtype), images.clone()
    generator = torch.Generator().manual_seed(seed)
    needed, beyond, ends = [], [], []
    for _ in range(restarts):
        delta = eps * (2 * torch.rand(images.shape, generator=generator, dtype=images.dtype) - 1)
        count = torch.zeros(len(images), dtype=torch.int64)
        for _ in range(steps):
            leaf = delta.clone().requires_grad_()
            outputs = model(images + leaf)
            right = outputs.argmax(dim=1) == labels
            if not right.any():
                break
            (gradient,) = torch.autograd.grad(climb(outputs, labels).sum(), leaf)
            moved = (delta + step_size * gradient.sign()).clamp(-eps, eps)
            moved = torch.maximum(torch.minimum(moved, 1 - images), -images)
            delta[right], count = moved[right], count + right
        with torch.no_grad():
            outputs = model(images + delta)
        values, wrong = climb(outputs, labels), outputs.argmax(dim=1) != labels
        better = values >= highest
        kept[better], highest = (images + delta)[better], torch.maximum(highest, values)
        needed.append(count)
        ends.append(wrong)
        limit = math.log(classes) + 2e-6 if loss == "ce" else 0.0
        kept_is_wrong = model(kept).argmax(dim=1) != labels
        beyond.append(kept_is_wrong & (highest > limit))
    return kept, kept_is_wrong, torch.stack(needed), torch.stack(beyond), torch.stack(ends)


def assert_the_rule(model, images, labels, **options):
    """Our outcome is the rule's, example by example, and each gradient is one that the rule needs."""
    options = {"steps": 12, "restarts": 10, "step_size": 2 / 255, "loss": "ce", "seed": 0} | options
    kept, success, needed, beyond, ends = released(model, images, labels, **options)
    counted = Counted(model)
    result = paper_pgd(counted, images, labels, **options)
    assert torch.equal(result.success, success)
    assert torch.equal(result.success, labelled(model, result.adversarial) != labels)
    assert torch.equal(result.clean_correct, labelled(model, images) == labels)
    open_ = ~beyond[-1]
    torch.testing.assert_close(result.adversarial[open_], kept[open_], rtol=0, atol=1e-12)
    assert (lengths(result.adversarial - images, "linf") <= options["eps"] * (1 + 1e-12)).all()
    # a restart is left out once the example is beyond recall
    left_out = torch.cat([torch.zeros(1, len(images), dtype=torch.bool), beyond[:-1]])
    assert torch.equal(result.gradients, (needed * ~left_out).sum(dim=0))
    assert int(result.gradients.sum()) >= counted.backward_rows
    return result, success, ends, left_out


@pytest.mark.parametrize("loss", ["ce", "margin"])
@pytest.mark.parametrize("eps", [2 / 255, 12 / 255])
def test_the_rule_on_logits(eps, loss):
    model, images = Linear(4), some_images(60, low=0.1, high=0.9)
    labels = labelled(model, images)
    labels[:4] = (labels[:4] + 1) % 4
    result, success, _, left_out = assert_the_rule(model, images, labels, eps=eps, loss=loss, steps=6)
    assert 0.1 < success.double().mean() < 0.95
    assert left_out.any()
    assert (result.gradients[~success] == 60).any()


@pytest.mark.parametrize("neighbours", [None, 3])
@pytest.mark.parametrize("variance", [0.03, 0.3])
def test_the_rule_on_scores(variance, neighbours):
    model = ScoreModel(cluster_model(3, 2, neighbours=neighbours, variance=variance, encoder=Centred(), scale=0.15))
    images = some_images(60)
    _, success, _, _ = assert_the_rule(model, images, labelled(model, images), eps=14 / 255, steps=8)
    assert success.any()
    assert not success.all()


@pytest.mark.parametrize("seed", range(3))
def test_the_rule_on_a_network(seed):
    torch.manual_seed(seed)
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(SIZE, 24), torch.nn.ReLU(), torch.nn.Linear(24, 5))
    model, images = model.double(), some_images(50, low=0, high=1)
    _, success, _, _ = assert_the_rule(model, images, labelled(model, images), eps=0.05, steps=10, seed=seed)
    assert 0 < success.sum() < 50


class Steps(torch.nn.Module):
    """Three classes on a line: below 0.4 narrowly wrong, above 0.6 right, and with a higher loss; no slope anywhere."""

    def forward(self, images):
        x = images.mean(dim=(1, 2, 3))
        narrowly_wrong = torch.tensor([-1.0, -0.9, -11.0], dtype=images.dtype)
        hardly_right = torch.tensor([-0.99, -1.0, -1.0], dtype=images.dtype)
        right = torch.tensor([8.0, -1.0, -1.0], dtype=images.dtype)
        rows = torch.where((x < 0.4)[:, None], narrowly_wrong, torch.where((x > 0.6)[:, None], hardly_right, right))
        return rows + 0 * x[:, None]


def test_a_success_is_overwritten_by_a_failure_of_higher_loss():
    images, labels = torch.full((64, 1, 1, 1), 0.5, dtype=torch.float64), torch.zeros(64, dtype=torch.int64)
    wrong, right = Steps()(torch.tensor([0.3, 0.7]).double().reshape(2, 1, 1, 1))
    zero = torch.tensor([0])
    assert F.cross_entropy(wrong[None], zero) < F.cross_entropy(right[None], zero) < math.log(3)
    result, success, ends, _ = assert_the_rule(Steps(), images, labels, eps=0.3, steps=1, restarts=3)
    # broken in some restart, and yet reported as robust
    lost = ends.any(dim=0) & ~success
    assert lost.sum() > 5
    assert success.any()
    assert (result.adversarial[lost] > 0.6).all()
    correct = pgd(Steps(), images, labels, eps=0.3, step_size=2 / 255, steps=1, restarts=3)
    assert correct.success.sum() > result.success.sum()


def test_an_image_that_was_wrong_when_clean_may_be_reported_robust():
    def model(images):
        # wrong at 0.5 itself and nowhere else
        x = images.mean(dim=(1, 2, 3))
        return torch.stack([(x - 0.5).abs(), torch.full_like(x, 1e-9)], dim=1)

    images, labels = torch.full((4, *SHAPE), 0.5, dtype=torch.float64), torch.zeros(4, dtype=torch.int64)
    result = paper_pgd(model, images, labels, eps=0.1, steps=1, restarts=1)
    assert not result.clean_correct.any()
    assert not result.success.all()


@pytest.mark.parametrize("eps", PAPER_EPS)
def test_the_step_is_two_bytes_at_every_eps(eps):
    images, labels = some_images(4, low=0.45, high=0.55), torch.zeros(4, dtype=torch.int64)

    def slope(x):
        # up which no answer becomes wrong
        return torch.stack([9 + 0 * x.sum(dim=(1, 2, 3)), x.mean(dim=(1, 2, 3))], dim=1)

    noise = torch.rand(images.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    start = eps * (2 * noise - 1)
    result = paper_pgd(slope, images, labels, eps=eps, steps=3, restarts=1)
    torch.testing.assert_close(result.adversarial, images + (start + 3 * 2 / 255).clamp(-eps, eps))
    assert result.gradients.tolist() == [3] * 4
    assert (PAPER_STEP_SIZE, PAPER_STEPS, PAPER_RESTARTS) == (2 / 255, (20, 100), 10)


def test_the_start_is_not_clipped():
    def wrong(images):
        return torch.stack([images.mean(dim=(1, 2, 3)), 2 + images.mean(dim=(1, 2, 3))], dim=1)

    images = torch.zeros(50, *SHAPE)
    result = paper_pgd(wrong, images, torch.zeros(50, dtype=torch.int64), eps=0.1, steps=5)
    # wrong at once: frozen where it began, outside the pixels
    assert result.adversarial.min() < -0.09
    assert result.gradients.sum() == 0


def test_the_defaults_are_the_papers():
    model, images = Linear(), some_images(6)
    labels = labelled(model, images)
    spelled = {"steps": 20, "restarts": 10, "step_size": 2 / 255, "loss": "ce", "seed": 0}
    plain, full = (
        paper_pgd(model, images, labels, eps=8 / 255),
        paper_pgd(model, images, labels, eps=8 / 255, **spelled),
    )
    assert torch.equal(plain.adversarial, full.adversarial)
    other = paper_pgd(model, images, labels, eps=8 / 255, seed=1)
    assert not torch.equal(other.adversarial, plain.adversarial)


def test_no_trace_is_left():
    model, images = Linear(), some_images()
    labels = labelled(model, images)
    before, state = images.clone(), torch.get_rng_state()
    result = paper_pgd(model, images, labels, eps=0.02, steps=3, restarts=2)
    assert torch.equal(images, before)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    assert not result.adversarial.requires_grad


# what it costs


@pytest.fixture(scope="module")
def mostly_broken():
    """A linear model, and images of which 3 in 10 hold out by far and 7 in 10 break within a few steps of 2/255."""
    model, images = Linear(10), some_images(4000, low=0.2, high=0.8)
    labels = labelled(model, images)
    radii = linear_radius(model.weight.detach(), model.bias.detach(), images.flatten(1), labels, norm="linf")
    firm, weak = (radii > 10 / 255).nonzero().squeeze(1), (radii < 2 / 255).nonzero().squeeze(1)
    assert len(firm) >= 12
    chosen = torch.cat([firm[:12], weak[:28]])
    return model, images[chosen], labels[chosen]


def test_ten_restarts_cost_little_more_than_the_examples_that_hold_out(mostly_broken):
    model, images, labels = mostly_broken
    everything = 10 * 100 * len(images)
    options = {"eps": 8 / 255, "step_size": 2 / 255, "steps": 100, "restarts": 10}
    for attack in (paper_pgd, pgd):
        counted = Counted(model)
        result = attack(counted, images, labels, **options)
        robust = (~result.success).double().mean().item()
        assert robust == pytest.approx(0.3, abs=0.02)
        assert int(result.gradients.sum()) == counted.backward_rows
        assert robust * everything <= counted.backward_rows <= 0.35 * everything
        assert (result.gradients[~result.success] == 1000).all()


def test_nothing_is_spent_on_what_no_failure_can_take_back():
    images, labels = torch.full((8, *SHAPE), 0.5), torch.zeros(8, dtype=torch.int64)

    def lost(x):
        return torch.stack([0 * x.mean(dim=(1, 2, 3)), 5 + x.mean(dim=(1, 2, 3))], dim=1)

    calls = []

    def noted(x):
        calls.append(len(x))
        return lost(x)

    result = paper_pgd(noted, images, labels, eps=0.1, steps=20)
    assert result.success.all()
    assert result.gradients.sum() == 0
    # the clean images, one look in the first restart, and those kept
    assert calls == [8, 8, 8]


# bad input


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"eps": 8.0}, r"eps: expected at most 1 in linf for pixels in \[0, 1\] \(8/255, not 8\), got 8"),
        ({"eps": 0.0}, r"eps: expected a positive number, got 0"),
        ({"step_size": -1.0}, r"step_size: expected a positive number, got -1"),
        ({"steps": 2.5}, r"steps: expected a positive whole number, got 2\.5"),
        ({"restarts": 0}, r"restarts: expected a positive whole number, got 0"),
        ({"loss": "cw"}, r"loss: expected one of \['ce', 'dlr', 'margin'\], got 'cw'"),
        ({"labels": torch.tensor([0])}, "labels: expected one for each of 2 images, got 1"),
        ({"labels": torch.tensor([0, 3])}, r"labels: expected classes in 0\.\.2, got 0 to 3"),
        ({"labels": torch.tensor([0.0, 1.0])}, "labels: expected integers, got torch.float32"),
        ({"images": some_images(2) + 0.6}, r"images: expected pixels in \[0, 1\], got values from"),
        ({"model": lambda x: torch.full((2, 3), math.nan)}, "model: expected logits, got NaN"),
        ({"model": lambda x: x}, r"model: expected logits \[2, class\], got shape \[2, 1, 4, 4\]"),
    ],
)
def test_bad_input_is_refused(as_installed, changes, message):
    arguments = {"model": Linear(), "images": some_images(2), "labels": torch.tensor([0, 1]), "eps": 0.1} | changes
    model, images, labels = (arguments.pop(name) for name in ("model", "images", "labels"))
    with pytest.raises(ValueError, match=message):
        paper_pgd(model, images, labels, **arguments)


@pytest.mark.parametrize("steps", [1, 3])
def test_nan_on_the_way_is_no_success(steps):
    def model(images):
        means = images.mean(dim=(1, 2, 3))
        return torch.stack([-means.where(means < 0.55, math.nan), torch.ones_like(means)], dim=1)

    with pytest.raises(ValueError, match="model: expected logits, got NaN"):
        paper_pgd(model, torch.full((8, *SHAPE), 0.5), torch.ones(8).long(), eps=0.2, steps=steps, step_size=0.2)


def test_no_images_are_an_empty_result():
    result = paper_pgd(Linear(), some_images(0), torch.zeros(0).long(), eps=0.1)
    assert result.adversarial.shape == (0, *SHAPE)
    assert result.success.shape == (0,)


def test_scores_follow_a_model_that_has_moved():
    model = cluster_model(3, 1, variance=0.4)
    surface, images = ScoreModel(model), some_images(2)
    before = surface(images)
    moved = replace(model.clusters, variance=model.variance * 2)
    model.variance.copy_(moved.variance)
    assert not torch.equal(surface(images), before)
    assert surface.float()(images.float()).dtype == torch.float32
