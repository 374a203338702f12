"""Randomised smoothing on models whose smoothed classifier is known: half-spaces, constants, coins, fixed votes."""

import math

import pytest
import torch
from scipy.stats import binom, binomtest, norm
from torch import nn

from clustr_core.certificates.smoothing import ABSTAIN, certify_smoothed, largest_radius, predict_smoothed

NOISE = 0.25


class HalfSpace(nn.Module):
    """Class 1 where w . (x - 1/2) > offset: the smoothed classifier is the model itself, and its radius the distance.

    The border may lie anywhere: P(class 1) = Phi(signed distance / noise).
    """

    weight: torch.Tensor

    def __init__(self, offset=0.0, seed=0):
        super().__init__()
        weight = torch.randn(1, 4, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        self.register_buffer("weight", weight)
        self.offset = offset

    def signed_distance(self, images):
        return ((images - 0.5) * self.weight).sum(dim=(1, 2, 3)).sub(self.offset) / self.weight.norm()

    def forward(self, images):
        distance = self.signed_distance(images)
        return torch.stack([-distance, distance], dim=1)


class Voting(nn.Module):
    """Gives the n-th copy that it sees the n-th of some classes, over and over, and keeps the copies."""

    def __init__(self, votes, classes=3):
        super().__init__()
        self.votes, self.classes, self.seen = votes, classes, []

    def forward(self, images):
        first = sum(map(len, self.seen))
        self.seen.append(images.clone())
        votes = [self.votes[n % len(self.votes)] for n in range(first, first + len(images))]
        return nn.functional.one_hot(torch.tensor(votes), self.classes).to(images)


def some_images(count, seed=0, dtype=torch.float64):
    return torch.rand(count, 1, 4, 4, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def at_distance(model, distances):
    """Images at signed distances from a half-space's border, all of them inside the cube."""
    images = some_images(len(distances), seed=3) * 0.2 + 0.4
    move = distances - model.signed_distance(images)
    images = images + move.reshape(-1, 1, 1, 1) * model.weight / model.weight.norm()
    assert ((images >= 0) & (images <= 1)).all()
    return images


def test_the_radius_exceeds_the_distance_as_often_as_it_may_and_no_more():
    """The bound of a two-sided interval would be too large half as often, that of no interval more than twice."""
    model, failure_prob = HalfSpace(), 0.2
    images = at_distance(model, torch.linspace(0.05, 0.4, 1000, dtype=torch.float64))
    found = certify_smoothed(model, images, noise=NOISE, samples=400, failure_prob=failure_prob)
    assert (found.predictions[found.predictions != ABSTAIN] == 1).all()
    too_large = int((found.radius > model.signed_distance(images)).sum())
    assert 0.7 * failure_prob * 1000 < too_large < binom.ppf(0.999, 1000, failure_prob)


def test_at_the_usual_level_no_radius_of_many_is_too_large():
    for offset in (0.0, 0.3):
        model = HalfSpace(offset)
        images = some_images(200)
        found = certify_smoothed(model, images, noise=NOISE, samples=200, failure_prob=1e-4)
        truth = model.signed_distance(images)
        sure = found.predictions != ABSTAIN
        assert sure.any()
        assert (found.radius <= truth.abs()).all()
        assert (found.predictions[sure] == (truth[sure] > 0)).all()


def test_the_radius_rises_to_the_distance_with_the_samples():
    model = HalfSpace()
    images = at_distance(model, torch.tensor([0.1, 0.2, 0.3, -0.25], dtype=torch.float64))
    shares = []
    for samples in (200, 2_000, 20_000):
        found = certify_smoothed(model, images, noise=NOISE, samples=samples, batch_size=2_000)
        assert found.predictions.tolist() == [1, 1, 1, 0]
        shares.append(found.radius / model.signed_distance(images).abs())
    assert (shares[0] < shares[2]).all()
    assert (shares[2] < 1).all()
    # the error of the bound is one of the probability: what it costs of a small radius is a larger share
    assert shares[2][0] > 0.9
    assert shares[2][1:].min() > 0.96


def test_a_constant_model_reaches_the_largest_radius():
    images = some_images(2)
    found = certify_smoothed(Voting([2]), images, noise=NOISE, samples=300)
    assert found.predictions.tolist() == [2, 2]
    assert found.counts.tolist() == [300, 300]
    assert found.radius.dtype == torch.float64
    assert found.radius.tolist() == pytest.approx([largest_radius(NOISE, 300)] * 2, rel=1e-14)


@pytest.mark.parametrize(("samples", "failure_prob"), [(10, 0.001), (100, 0.001), (1_000, 0.05), (100_000, 0.001)])
def test_the_largest_radius_is_that_of_the_formula(samples, failure_prob):
    expected = 0.5 * norm.ppf(failure_prob ** (1 / samples))
    assert largest_radius(0.5, samples, failure_prob) == pytest.approx(expected, rel=1e-9)


def test_too_few_samples_certify_nothing_even_if_all_agree():
    assert largest_radius(NOISE, 9, 0.001) == 0
    assert largest_radius(NOISE, 10, 0.001) > 0
    found = certify_smoothed(Voting([1]), some_images(1), noise=NOISE, samples=9)
    assert (found.predictions.tolist(), found.radius.tolist(), found.counts.tolist()) == ([ABSTAIN], [0], [9])


def test_a_coin_flip_abstains():
    model = HalfSpace()
    images = at_distance(model, torch.zeros(50, dtype=torch.float64))
    found = certify_smoothed(model, images, noise=NOISE, samples=500)
    assert (found.predictions == ABSTAIN).all()
    assert (found.radius == 0).all()
    assert (predict_smoothed(model, images, noise=NOISE, samples=500) == ABSTAIN).all()


@pytest.mark.parametrize("count", [0, 1, 25, 32, 33, 34, 40, 50])
def test_the_bound_is_that_of_the_exact_interval(count):
    """10 copies select class 0; then ``count`` of 50 fall into it."""
    votes = [0] * (10 + count) + [1] * (50 - count)
    found = certify_smoothed(Voting(votes), some_images(1), noise=2.0, samples=50, selection_samples=10, batch_size=7)
    interval = binomtest(count, 50, alternative="greater").proportion_ci(confidence_level=0.999, method="exact")
    assert found.counts.tolist() == [count]
    assert found.radius.tolist() == pytest.approx([max(0.0, 2 * norm.ppf(interval.low))], rel=1e-8)
    assert found.predictions.tolist() == [0 if interval.low > 0.5 else ABSTAIN]


@pytest.mark.parametrize("count", [50, 60, 65, 66, 67, 68, 70, 90, 100])
def test_the_class_is_told_when_the_test_rejects_a_fair_coin(count):
    """The third class takes no part in the test."""
    votes = [1] * count + [2] * (100 - count) + [0] * 5
    got = predict_smoothed(Voting(votes), some_images(1), noise=NOISE, samples=105, failure_prob=0.001)
    assert got.tolist() == [1 if binomtest(count, 100).pvalue <= 0.001 else ABSTAIN]
    assert (got.tolist() == [1]) == (count >= 67)


def test_the_class_that_is_told_is_the_larger_half_spaces():
    model = HalfSpace(0.2)
    images = some_images(100)
    got = predict_smoothed(model, images, noise=NOISE, samples=200)
    truth = model.signed_distance(images)
    assert (got[truth.abs() > 0.15] == (truth > 0)[truth.abs() > 0.15]).all()
    assert (got != ABSTAIN).sum() > 50


def test_the_copies_are_fresh_normal_and_not_clipped():
    model, images = Voting([0]), some_images(3, dtype=torch.float32)
    certify_smoothed(model, images, noise=0.5, samples=900, selection_samples=100, batch_size=250)
    assert [len(batch) for batch in model.seen] == [100, 250, 250, 250, 150] * 3
    copies = torch.cat(model.seen).reshape(3, 1000, 16)
    assert copies.dtype == torch.float32
    assert copies.min() < 0
    assert copies.max() > 1
    z = (copies - images.reshape(3, 1, 16)) / 0.5
    # 48,000 standard normal numbers, no two of which are the same draw
    assert abs(float(z.mean())) < 4 / math.sqrt(48_000)
    assert abs(float(z.square().mean()) - 1) < 4 * math.sqrt(2 / 48_000)
    assert abs(float((z.abs() < float(norm.ppf(0.75))).double().mean()) - 0.5) < 2 / math.sqrt(48_000)
    assert len(torch.unique(z.flatten(0, 1)[:, 0])) > 2_990


def test_an_images_answer_does_not_depend_on_the_others():
    """Bit for bit: alone, among others and in another order, under its own index."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(32, 3)).eval()
    images = some_images(12, dtype=torch.float32)
    model[3].bias.data = -model(images).mean(dim=0).detach()
    options = {"noise": NOISE, "samples": 300, "batch_size": 64}
    together = certify_smoothed(model, images, **options)
    told = predict_smoothed(model, images, **options)
    assert len(together.counts.unique()) > 6
    order = torch.randperm(12, generator=torch.Generator().manual_seed(1))
    for chosen in (order, order[:5], torch.tensor([7])):
        found = certify_smoothed(model, images[chosen], indices=chosen, **options)
        for name in ("predictions", "radius", "counts"):
            assert torch.equal(getattr(found, name), getattr(together, name)[chosen])
        assert torch.equal(predict_smoothed(model, images[chosen], indices=chosen, **options), told[chosen])
    assert not together.radius.requires_grad
    torch.manual_seed(5)
    assert torch.equal(certify_smoothed(model, images, **options).counts, together.counts)


def test_seeds_and_indices_draw_apart():
    def copies(seed, index):
        model = Voting([0])
        image, indices = torch.full((1, 1, 4, 4), 0.5), torch.tensor([index])
        certify_smoothed(model, image, noise=1.0, samples=8, selection_samples=8, seed=seed, indices=indices)
        return torch.cat(model.seen)

    drawn = torch.stack([copies(seed, index) for seed, index in [(0, 0), (0, 1), (1, 0), (1, 1), (2, 0)]])
    assert len(torch.unique(drawn.flatten(1), dim=0)) == 5
    assert len(torch.unique(drawn.flatten(0, 1).flatten(1), dim=0)) == 5 * 16


@pytest.mark.parametrize("certifies", [certify_smoothed, predict_smoothed])
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"noise": 0.0}, "noise: expected a positive finite number, got 0"),
        ({"noise": math.nan}, "noise: expected a positive finite number, got nan"),
        ({"noise": math.inf}, "noise: expected a positive finite number, got inf"),
        ({"samples": 0}, "samples: expected a positive whole number, got 0"),
        ({"samples": 10.5}, r"samples: expected a positive whole number, got 10\.5"),
        ({"batch_size": 0}, "batch_size: expected a positive whole number, got 0"),
        ({"failure_prob": 0.0}, "failure_prob: expected a number between 0 and 1, got 0"),
        ({"failure_prob": 1.0}, "failure_prob: expected a number between 0 and 1, got 1"),
        ({"seed": -1}, "seed: expected a whole number of at least 0, got -1"),
        ({"indices": torch.arange(3)}, r"indices: expected one for each of 2 images, got shape \[3\]"),
        ({"indices": torch.tensor([0, -1])}, "indices: expected whole numbers of at least 0, got negative"),
        ({"indices": torch.tensor([0.0, 1.0])}, "indices: expected whole numbers .* or non-integer ones"),
    ],
)
def test_bad_options_are_named(certifies, options, message, as_installed):
    with pytest.raises(ValueError, match=message):
        certifies(Voting([0]), some_images(2), **{"noise": NOISE, "samples": 20, **options})


def test_no_copy_to_select_with_is_refused():
    with pytest.raises(ValueError, match="selection_samples: expected a positive whole number, got 0"):
        certify_smoothed(Voting([0]), some_images(1), noise=NOISE, samples=20, selection_samples=0)
    for options, name in (((0.0, 10, 0.1), "noise"), ((1.0, 0, 0.1), "samples"), ((1.0, 10, 1.5), "failure_prob")):
        with pytest.raises(ValueError, match=f"{name}: expected"):
            largest_radius(*options)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (some_images(2) + 1, r"images: expected pixels in \[0, 1\], got 1\.\d+ to 1\.\d+"),
        (some_images(2) * math.nan, r"images: expected pixels in \[0, 1\]"),
        (some_images(2)[0], r"images: expected one at least, .*got torch.float64 of shape \[1, 4, 4\]"),
        (some_images(0), r"images: expected one at least, .* of shape \[0, 1, 4, 4\]"),
        ((some_images(2) * 255).byte(), "images: expected one at least, a floating dtype .*got torch.uint8"),
    ],
)
def test_bad_images_are_named(images, message, as_installed):
    with pytest.raises(ValueError, match=message):
        certify_smoothed(Voting([0]), images, noise=NOISE, samples=20)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (lambda x: x.flatten(1) * math.nan, "model: expected logits, got NaN"),
        (lambda x: x.flatten(1) / 0, "model: expected a finite largest logit in each row"),
        (lambda x: x, r"model: expected logits \[20, class\] of two classes at least, got shape \[20, 1, 4, 4\]"),
        (lambda x: x.flatten(1)[:, :1], r"model: expected logits .*, got shape \[20, 1\]"),
        (lambda x: x.flatten(1)[:3], r"model: expected logits .*, got shape \[3, 16\]"),
    ],
)
def test_what_is_no_logits_is_refused(model, message):
    with pytest.raises(ValueError, match=message):
        predict_smoothed(model, some_images(2), noise=NOISE, samples=20)
