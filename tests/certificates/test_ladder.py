"""The complete ladder: in order, sound against search, and exact where the theory says so, on random configurations.

`make test-long` draws twenty times as many.
"""

import math
import os
from itertools import pairwise

import pytest
import torch

from clustr_core.certificates.ladder import certified_radius, certify
from clustr_core.certificates.names import HARD_BOUNDS, SOFT_BOUNDS
from clustr_core.certificates.polyhedron import least_norm
from clustr_core.models.classifiers import ClusterClassifier, cluster_logits
from clustr_core.models.clusters import Clusters
from clustr_core.numerics import chunks
from clustr_core.theory.examples import hard_radius_soft_rule_example, random_configuration
from clustr_core.theory.oracle import exact_nearest_rule_distance

POINTS = 10
CONFIGURATIONS = int(os.environ.get("CLUSTR_TEST_CONFIGURATIONS", "500")) // POINTS
SEEDS = range(CONFIGURATIONS)


def draw(seed, **changes):
    """Classes, clusters a class, dimension, variance and spread all drawn from the seed."""
    g = torch.Generator().manual_seed(seed)
    classes, per_class, dim = (
        int(torch.randint(low, high, (1,), generator=g)) for low, high in ((2, 5), (1, 5), (1, 6))
    )
    variance, spread = (0.05 + torch.rand(2, generator=g)).tolist()
    options = {"classes": classes, "per_class": per_class, "dim": dim, "points": POINTS, "seed": seed}
    drawn = random_configuration(**options | {"variance": variance, "spread": spread} | changes)
    return drawn.embeddings, drawn.clusters


def radii(z, clusters, bounds, **options):
    return [certified_radius(z, clusters, bound=bound, **options) for bound in bounds]


def directions(count, dim, seed):
    rays = torch.randn(count, dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return rays / rays.norm(dim=1, keepdim=True)


def kept(z, clusters, radius, *, seed, count=128, steps=12):
    """Whether the soft rule's class survives at all points tried within a radius: random rays, and gradient ascent."""
    dim = z.shape[1]
    rays = torch.cat([directions(count, dim, seed), -torch.eye(dim).double(), torch.eye(dim).double()])
    scales = torch.tensor([0.5, 0.9, 1.0], dtype=torch.float64)
    points = z[:, None, None] + radius[:, None, None, None] * scales[:, None, None] * rays
    label = cluster_logits(z, clusters).argmax(dim=1)
    found = cluster_logits(points.flatten(0, 2), clusters).argmax(dim=1).reshape(len(z), -1)
    survives = (found == label[:, None]).all(dim=1)
    # from the best of the rays, along the gradient of the margin, staying on the sphere
    moved = z + radius[:, None] * directions(len(z), dim, seed + 1)
    for _ in range(steps):
        leaf = moved.detach().requires_grad_()
        logits = cluster_logits(leaf, clusters)
        own = torch.nn.functional.one_hot(label, logits.shape[1]).bool()
        margin = logits.masked_fill(own, -torch.inf).amax(dim=1) - logits[own]
        (slope,) = torch.autograd.grad(margin.sum(), leaf)
        survives &= margin.detach() <= 0
        ahead = (moved - z) / radius.clamp_min(1e-12)[:, None] + slope / slope.norm(dim=1, keepdim=True).clamp_min(
            1e-12
        )
        moved = z + radius[:, None] * ahead / ahead.norm(dim=1, keepdim=True).clamp_min(1e-12)
    return survives


def test_the_nearest_rules_ladder_rises_to_the_oracles_distance():
    for seed in SEEDS:
        z, clusters = draw(seed)
        truth, _ = exact_nearest_rule_distance(z, clusters)
        ladder = [*radii(z, clusters, HARD_BOUNDS), truth]
        for lower, upper in pairwise(ladder):
            assert (lower <= upper * (1 + 1e-12) + 1e-14).all(), seed
        torch.testing.assert_close(ladder[-2], truth, rtol=1e-9, atol=1e-12)


def test_the_soft_rules_ladder_rises_and_no_search_gets_below_it():
    for seed in SEEDS:
        z, clusters = draw(seed)
        found = radii(z, clusters, SOFT_BOUNDS)
        corrected = certified_radius(z, clusters, bound="exact", rule="soft")
        for lower, upper in pairwise(found):
            # lengths between near centroids are rounded up by the Gram matrix's rounding, a square root of it
            assert (lower <= upper * (1 + 1e-7) + 1e-9).all(), seed
        best = found[-1].maximum(corrected)
        assert kept(z, clusters, best * (1 - 1e-9), seed=seed).all(), seed


def test_a_radius_too_large_would_be_caught_by_that_search():
    caught, tried = 0, 0
    for seed in range(20):
        z, clusters = draw(seed, dim=2)
        radius = certified_radius(z, clusters, bound="soft-dual")
        caught += int((~kept(z, clusters, 1.3 * radius, seed=seed) & (radius > 0.01)).sum())
        tried += int((radius > 0.01).sum())
    assert caught > 0.8 * tried > 50


def test_with_one_cluster_a_class_all_bounds_but_the_triangle_are_one():
    """k = 1: the soft rule is the nearest rule, and each of its bounds the theorem's radius, which is exact."""
    for seed in range(30):
        z, clusters = draw(seed, per_class=1)
        nearest = certified_radius(z, clusters, bound="nearest")
        for bound in (*HARD_BOUNDS[2:], *SOFT_BOUNDS):
            torch.testing.assert_close(certified_radius(z, clusters, bound=bound), nearest, rtol=1e-9, atol=1e-9)


def test_against_one_rival_centroid_the_dual_is_exact():
    """One rival centroid: Gibbs' inequality is an equality at the best weights, which are nearly always found."""
    ratios = []
    for seed in range(30):
        z, several = draw(seed, classes=2, dim=2)
        first = several.labels == 0
        rival = (~first).nonzero()[0]
        chosen = torch.cat([first.nonzero().squeeze(1), rival])
        clusters = Clusters(several.centroids[chosen], several.labels[chosen], several.variance[chosen])
        radius = certified_radius(z, clusters, bound="soft-dual")
        # where the own clusters surround the rival it may never win, and the best radius is infinite
        ours = (cluster_logits(z, clusters).argmax(dim=1) == 0) & (radius > 0.05) & (radius < 10)
        angles = torch.linspace(0, 2 * math.pi, 1441, dtype=torch.float64)[:-1]
        rim = torch.stack([angles.cos(), angles.sin()], dim=1)
        for factor in (1 - 1e-9, 1.002, 1.1):
            reached = z[ours, None] + factor * radius[ours, None, None] * rim
            flipped = (cluster_logits(reached.flatten(0, 1), clusters).argmax(dim=1) == 1).reshape(-1, 1440)
            ratios.append((factor, flipped.any(dim=1)))
    share = {
        f: torch.cat([hit for factor, hit in ratios if factor == f]).double().mean() for f in (1 - 1e-9, 1.002, 1.1)
    }
    assert share[1 - 1e-9] == 0
    assert share[1.002] > 0.95
    assert share[1.1] > 0.97


def test_the_soft_rule_needs_a_radius_of_its_own():
    """CE4: the theorem's formula gives 0.45, and the soft rule flips at 0.12."""
    example = hard_radius_soft_rule_example()
    z, clusters = example.embeddings, example.clusters
    assert certified_radius(z, clusters, bound="nearest").item() == pytest.approx(0.45)
    flip = 0.12
    for bound in (*HARD_BOUNDS, *SOFT_BOUNDS):
        assert certified_radius(z, clusters, bound=bound, rule="soft").item() < flip
    assert certified_radius(z, clusters, bound="soft-dual").item() > 0.9 * flip - 0.01


def test_any_multipliers_are_sound_and_ours_are_the_best():
    g = torch.Generator().manual_seed(0)
    for count, dim in ((1, 3), (2, 2), (3, 1), (4, 6), (10, 3), (10, 20)):
        normals = torch.randn(60, count, dim, generator=g, dtype=torch.float64)
        inside = 3 * torch.randn(60, dim, generator=g, dtype=torch.float64)
        offsets = (normals @ inside[:, :, None]).squeeze(2) - torch.rand(60, count, generator=g, dtype=torch.float64)
        bound = least_norm(normals, offsets)
        assert (bound <= inside.norm(dim=1)).all()
        tried = torch.rand(60, 500, count, generator=g, dtype=torch.float64) ** 4
        values = (tried * offsets[:, None]).sum(dim=2) / (tried @ normals).norm(dim=2)
        assert (values.amax(dim=1) <= bound * (1 + 1e-10) + 1e-10).all()


def test_constraints_that_are_not_there_bind_nothing():
    normals = torch.tensor([[[3.0, 4.0], [0.0, 0.0]], [[0.0, 0.0], [0.0, 0.0]]]).double()
    offsets = torch.tensor([[10.0, 99.0], [1.0, 1.0]]).double()
    bound = least_norm(normals, offsets)
    assert bound[0].item() == pytest.approx(2.0)
    assert bound[1].item() == -math.inf


@pytest.mark.parametrize("bound", [*HARD_BOUNDS, *SOFT_BOUNDS])
def test_chunks_change_nothing(bound, monkeypatch):
    z, clusters = draw(3, classes=4, per_class=3, dim=5, points=50)
    whole = certified_radius(z, clusters, bound=bound)
    monkeypatch.setattr(chunks, "TABLE_BYTES", 1)
    torch.testing.assert_close(certified_radius(z, clusters, bound=bound), whole, rtol=1e-12, atol=1e-14)
    assert certified_radius(z[:0], clusters, bound=bound).shape == (0,)


@pytest.mark.parametrize("bound", [*HARD_BOUNDS, *SOFT_BOUNDS])
def test_single_precision_gives_less_and_not_much_less(bound):
    for seed in range(20):
        z, clusters = draw(seed)
        single = z.float(), clusters.to(torch.float32)
        same = single[0].double(), single[1].to(torch.float64)
        rough, fine = certified_radius(*single, bound=bound), certified_radius(*same, bound=bound)
        assert rough.dtype == torch.float32
        assert (rough <= fine * (1 + 1e-12)).all()
        assert (fine - rough <= 1e-4 * (1 + fine)).all()


@pytest.mark.parametrize("bound", [*HARD_BOUNDS, *SOFT_BOUNDS])
def test_classes_of_different_sizes_and_coinciding_centroids(bound):
    z, clusters = draw(7, classes=3, per_class=3, dim=2, points=40)
    some = torch.tensor([0, 1, 2, 3, 6])
    uneven = Clusters(clusters.centroids[some], clusters.labels[some], clusters.variance[some])
    radius = certified_radius(z, uneven, bound=bound, rule="soft")
    assert (radius > 0).any()
    assert kept(z, uneven, radius * (1 - 1e-9), seed=0).all()
    doubled = Clusters(uneven.centroids[[0, 0, 2, 3, 3]], uneven.labels, uneven.variance)
    radius = certified_radius(z, doubled, bound=bound, rule="soft")
    assert radius.isfinite().all()
    assert kept(z, doubled, radius * (1 - 1e-9), seed=0).all()


@pytest.mark.parametrize("bound", SOFT_BOUNDS)
def test_a_soft_bound_refuses_what_it_does_not_cover(bound, as_installed):
    z, clusters = draw(0, per_class=2)
    with pytest.raises(ValueError, match=f"neighbours: expected None with bound '{bound}', for which every centroid"):
        certified_radius(z, clusters, bound=bound, neighbours=3)
    unequal = Clusters(
        clusters.centroids, clusters.labels, clusters.variance * (1 + torch.arange(len(clusters.labels)))
    )
    with pytest.raises(ValueError, match="clusters: expected one shared variance"):
        certified_radius(z, unequal, bound=bound)
    model = ClusterClassifier(torch.nn.Flatten(), clusters, neighbours=3)
    images = torch.rand(2, 1, 1, clusters.centroids.shape[1]).double()
    with pytest.raises(ValueError, match="neighbours: expected None"):
        certify(model, images, bound=bound)


@pytest.mark.parametrize("rule", ["soft", "nearest"])
def test_certify_picks_the_best_valid_bound(rule):
    _, clusters = draw(5, classes=3, per_class=3, dim=4)
    model = ClusterClassifier(torch.nn.Flatten(), clusters, rule=rule)
    images = torch.rand(30, 1, 2, 2, generator=torch.Generator().manual_seed(0)).double()
    best = certify(model, images).radius
    valid = HARD_BOUNDS if rule == "nearest" else (*HARD_BOUNDS, *SOFT_BOUNDS)
    every = torch.stack([certify(model, images, bound=bound).radius for bound in valid])
    torch.testing.assert_close(best, every.amax(dim=0))
