"""Losses against plain loops, their gradients, and what must not change them."""

import math
from typing import get_args

import pytest
import reference
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from clustr_core.attacks.losses import cross_entropy, dlr_loss, kl_divergence, margin_loss
from clustr_core.certificates.ladder import certified_radius, radius_from_magnet_loss
from clustr_core.certificates.linear import linear_radius
from clustr_core.models.classifiers import cluster_logits, nearest_logits
from clustr_core.models.clusters import Clusters, fit_clusters
from clustr_core.numerics import chunks
from clustr_core.training.losses import (
    certificate_loss,
    consistency_loss,
    full_magnet_loss,
    magnet_loss,
    margin_cross_entropy,
)
from clustr_core.training.recipes import CertificateLoss

seeds = st.integers(0, 10**6)


def batch(seed=0, clusters=4, per_cluster=3, dim=3, spread=1.0):
    """Embeddings, assignments (odd numbers, out of order) and labels of a batch of clusters of two or more classes."""
    g = torch.Generator().manual_seed(seed)
    own = torch.arange(clusters).repeat_interleave(per_cluster)
    own = own[torch.randperm(len(own), generator=g)]
    z = 2 * torch.randn(clusters, dim, generator=g, dtype=torch.float64)[own]
    z = z + spread * torch.randn(len(own), dim, generator=g, dtype=torch.float64)
    return z, 17 - 5 * own, own % max(clusters // 2, 2)


def fixed(seed=0, classes=3, per_class=2, dim=3, size=12):
    """Embeddings, labels and the clusters fitted to them."""
    g = torch.Generator().manual_seed(seed)
    labels = torch.arange(classes).repeat(size // classes + per_class)
    z = 3 * torch.randn(classes, dim, generator=g, dtype=torch.float64)[labels]
    z = z + torch.randn(len(labels), dim, generator=g, dtype=torch.float64)
    clusters, _ = fit_clusters(z, labels, per_class=per_class, seed=seed)
    return z, labels, clusters


def rotation(dim, seed):
    g = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(dim, dim, generator=g, dtype=torch.float64))[0]


@given(seeds, st.integers(2, 6), st.integers(2, 4), st.sampled_from([0.0, 1.0, 12.5]))
@settings(max_examples=40, deadline=None)
def test_magnet_loss_equals_the_loops(seed, clusters, per_cluster, gap):
    z, assignments, labels = batch(seed, clusters, per_cluster)
    found = magnet_loss(z, assignments, labels, gap=gap)
    loss, per_example, variance = reference.magnet_loss(z.tolist(), assignments.tolist(), labels.tolist(), gap)
    assert found.loss.item() == pytest.approx(loss, rel=1e-12, abs=1e-12)
    assert found.per_example.tolist() == pytest.approx(per_example, rel=1e-11, abs=1e-11)
    assert found.variance.item() == pytest.approx(variance, rel=1e-12)
    assert found == (found.loss, found.per_example, found.variance)


@given(seeds, st.integers(2, 4), st.integers(1, 3), st.sampled_from([0.0, 1.0, 12.5]))
@settings(max_examples=40, deadline=None)
def test_full_magnet_loss_equals_the_loops(seed, classes, per_class, gap):
    z, labels, clusters = fixed(seed, classes, per_class)
    found = full_magnet_loss(z, labels, clusters, gap=gap)
    expected = reference.full_magnet_loss(
        z.tolist(), labels.tolist(), clusters.centroids.tolist(), clusters.labels.tolist(), found.variance.item(), gap
    )
    assert found.per_example.tolist() == pytest.approx(expected, rel=1e-11, abs=1e-11)
    assert found.loss.item() == pytest.approx(math.fsum(expected) / len(expected), rel=1e-12)
    assert found.variance.item() == pytest.approx(clusters.shared_variance)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("gap", [2.0, 12.5])
def test_magnet_loss_gradient_goes_through_means_and_variance(seed, gap):
    z, assignments, labels = batch(seed)
    assert torch.autograd.gradcheck(lambda e: tuple(magnet_loss(e, assignments, labels, gap=gap)), z.requires_grad_())


def test_full_magnet_loss_gradient():
    z, labels, clusters = fixed()
    assert torch.autograd.gradcheck(lambda e: full_magnet_loss(e, labels, clusters).per_example, z.requires_grad_())


@given(seeds)
@settings(max_examples=20, deadline=None)
def test_rows_may_come_in_any_order_and_cluster_numbers_mean_nothing(seed):
    z, assignments, labels = batch(seed)
    order = torch.randperm(len(z), generator=torch.Generator().manual_seed(seed))
    plain = magnet_loss(z, assignments, labels)
    moved = magnet_loss(z[order], 1000 - assignments[order], labels[order])
    torch.testing.assert_close(moved.per_example, plain.per_example[order])
    torch.testing.assert_close(moved.loss, plain.loss)


@given(seeds, st.floats(1e-3, 1e3))
@settings(max_examples=20, deadline=None)
def test_scale_shift_and_rotation_change_nothing_but_the_variance(seed, scale):
    z, assignments, labels = batch(seed)
    moved = scale * z @ rotation(z.shape[1], seed) + 5 * scale
    plain, found = magnet_loss(z, assignments, labels), magnet_loss(moved, assignments, labels)
    torch.testing.assert_close(found.per_example, plain.per_example, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(found.variance, scale**2 * plain.variance, rtol=1e-8, atol=0)


def test_tight_clusters_far_apart_keep_the_digits_of_their_gradient():
    """In float32, where a mean is rounded by a good part of the distance to it."""
    g = torch.Generator().manual_seed(0)
    assignments = torch.arange(48) % 12
    rows = 100 * torch.randn(12, 16, generator=g)[assignments] + 1e-3 * torch.randn(48, 16, generator=g)
    gradients = []
    for z in (rows, rows.double()):
        leaf = z.clone().requires_grad_()
        found = magnet_loss(leaf, assignments, assignments % 4, gap=1e12)
        # the variance alone: where the hinge is open, the loss is the gap and little else
        (gradient,) = torch.autograd.grad(found.variance, leaf)
        gradients.append(gradient.double())
    single, double = gradients
    assert (single - double).norm() <= 1e-2 * double.norm()
    # its part along the clusters' own means, of which the variance knows nothing
    means = torch.zeros(12, 16, dtype=torch.float64).index_add(0, assignments, single) / 4
    assert means.norm() <= 1e-5 * single.norm()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("each", [1, 4])
def test_half_precision_is_computed_in_float32(dtype, each):
    g = torch.Generator().manual_seed(0)
    assignments = torch.arange(12 * each) % 12
    z = (100 * torch.randn(12 * each, 16, generator=g)).to(dtype)
    found = magnet_loss(z, assignments, assignments % 4)
    expected = magnet_loss(z.float(), assignments, assignments % 4)
    assert found.loss.isfinite()
    assert torch.equal(found.per_example, expected.per_example)


def test_squares_that_overflow_are_named():
    assignments = torch.arange(24) % 6
    z = 3e18 * torch.randn(24, 16, generator=torch.Generator().manual_seed(0))
    with pytest.raises(ValueError, match="embeddings: expected values whose squares do not overflow, got"):
        magnet_loss(z, assignments, assignments % 3)


def test_magnet_loss_inside_autocast_is_that_outside():
    assignments = torch.arange(24) % 6
    z = torch.randn(24, 16, generator=torch.Generator().manual_seed(0)).requires_grad_()
    found = []
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            loss = magnet_loss(z, assignments, assignments % 3).loss
            found.append((loss.detach(), *torch.autograd.grad(loss, z)))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_the_gap_is_added_where_the_hinge_is_open():
    z, assignments, labels = batch()
    small, large = (magnet_loss(z, assignments, labels, gap=gap).per_example for gap in (10.0, 12.5))
    assert (small > 0).all()
    torch.testing.assert_close(large - small, torch.full_like(small, 2.5))


def test_well_separated_clusters_cost_nothing():
    z, assignments, labels = batch(spread=1e-3)
    assert magnet_loss(z, assignments, labels).per_example.tolist() == [0.0] * len(z)


def test_a_badly_wrong_example_keeps_its_gradient():
    z, assignments, labels = batch(clusters=2, per_cluster=6, spread=0.01)
    z[0] = z[assignments != assignments[0]].mean(dim=0)
    z.requires_grad_()
    loss = magnet_loss(z, assignments, labels, gap=100.0).per_example[0]
    (gradient,) = torch.autograd.grad(loss, z)
    assert loss > 100
    assert gradient.norm() > 1e-2


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("apart", [0.0, 1e-6, 1.0, 1e3])
def test_a_batch_of_singletons_is_finite_with_a_finite_gradient(dtype, apart):
    z = (apart * torch.eye(4, dtype=dtype)).requires_grad_()
    found = magnet_loss(z, torch.arange(4), torch.tensor([0, 0, 1, 1]))
    found.loss.backward()
    assert found.per_example.isfinite().all()
    assert z.grad is not None
    assert z.grad.isfinite().all()
    assert found.variance == 0


def test_full_magnet_loss_does_not_count_other_clusters_of_the_own_class():
    clusters = Clusters(torch.tensor([[0.0], [9.0], [4.0]]), torch.tensor([0, 0, 1]), torch.full((3,), 1.0))
    found = full_magnet_loss(torch.tensor([[1.0]]), torch.tensor([0]), clusters, gap=5.0)
    assert found.per_example.item() == pytest.approx(1 / 2 + 5 - 9 / 2)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"embeddings": torch.full((4, 2), torch.nan)}, "embeddings: expected finite values"),
        ({"embeddings": torch.full((4, 2), torch.inf)}, "embeddings: expected finite values"),
        ({"labels": torch.tensor([0, 1])}, "labels: expected one for each of 4 embeddings, got 2"),
        ({"assignments": torch.tensor([0, 1])}, "assignments: expected one for each of 4 embeddings, got 2"),
        ({"labels": torch.tensor([1, 1, 1, 1])}, "labels: expected at least two classes in a batch"),
        ({"labels": torch.tensor([0, 1, 1, 0])}, "assignments: expected clusters of one class each"),
        (
            {"embeddings": torch.zeros(0, 2), "labels": torch.zeros(0).long(), "assignments": torch.zeros(0).long()},
            "embeddings: expected at least one row",
        ),
    ],
)
def test_magnet_loss_refuses(as_installed, changes, message):
    arguments = {
        "embeddings": torch.randn(4, 2, generator=torch.Generator().manual_seed(0)),
        "assignments": torch.tensor([0, 0, 1, 1]),
        "labels": torch.tensor([0, 0, 1, 1]),
    }
    with pytest.raises(ValueError, match=message):
        magnet_loss(**(arguments | changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"embeddings": torch.full((3, 2), torch.nan)}, "embeddings: expected finite values"),
        ({"labels": torch.tensor([0, 1])}, "labels: expected one for each of 3 embeddings, got 2"),
        ({"labels": torch.tensor([0, 1, 2])}, r"labels: expected classes in 0\.\.1, got 0 to 2"),
        ({"labels": torch.tensor([0, 1, -1])}, r"labels: expected classes in 0\.\.1, got -1 to 1"),
        (
            {
                "clusters": Clusters(torch.zeros(1, 2), torch.tensor([0]), torch.ones(1)),
                "labels": torch.zeros(3).long(),
            },
            "clusters: expected at least two classes, got one",
        ),
        (
            {"clusters": Clusters(torch.eye(2), torch.tensor([0, 1]), torch.tensor([1.0, 2.0]))},
            "clusters: expected one shared variance",
        ),
    ],
)
def test_full_magnet_loss_refuses(as_installed, changes, message):
    arguments = {
        "embeddings": torch.zeros(3, 2),
        "labels": torch.tensor([0, 1, 1]),
        "clusters": Clusters(torch.eye(2), torch.tensor([0, 1]), torch.ones(2)),
    }
    with pytest.raises(ValueError, match=message):
        full_magnet_loss(**(arguments | changes))


@given(seeds, st.integers(2, 5))
@settings(max_examples=30, deadline=None)
def test_consistency_equals_the_loops(seed, classes):
    g = torch.Generator().manual_seed(seed)
    clean, moved = -3 * torch.rand(2, 4, classes, generator=g, dtype=torch.float64)
    found = consistency_loss(clean, moved)
    for ours, g_clean, g_moved in zip(found.tolist(), clean.tolist(), moved.tolist(), strict=True):
        scores_clean, scores = [math.exp(v) for v in g_clean], [math.exp(v) for v in g_moved]
        probs = [s / math.fsum(scores_clean) for s in scores_clean]
        expected = -math.fsum(p * (s - reference.logsumexp(scores)) for p, s in zip(probs, scores, strict=True))
        assert ours == pytest.approx(expected, rel=1e-12)


def test_consistency_targets_carry_no_gradient():
    clean, moved = (torch.randn(3, 4, dtype=torch.float64).requires_grad_() for _ in range(2))
    consistency_loss(clean, moved).sum().backward()
    assert clean.grad is None
    assert torch.autograd.gradcheck(lambda m: consistency_loss(clean, m), moved)


def test_consistency_is_finite_where_every_score_underflows():
    far = torch.full((2, 3), -1e6).requires_grad_()
    loss = consistency_loss(far, far)
    loss.sum().backward()
    torch.testing.assert_close(loss.detach(), torch.full((2,), math.log(3)))
    assert far.grad is not None
    assert far.grad.isfinite().all()


@given(seeds, st.integers(2, 6))
@settings(max_examples=30, deadline=None)
def test_margin_loss_is_positive_exactly_where_the_prediction_is_wrong(seed, classes):
    g = torch.Generator().manual_seed(seed)
    logits = torch.randn(8, classes, generator=g, dtype=torch.float64)
    labels = torch.randint(classes, (8,), generator=g)
    found = margin_loss(logits, labels)
    assert torch.equal(found > 0, logits.argmax(dim=1) != labels)
    for ours, row, label in zip(found.tolist(), logits.tolist(), labels.tolist(), strict=True):
        assert ours == pytest.approx(max(v for c, v in enumerate(row) if c != label) - row[label])


def test_cross_entropy_equals_the_loops():
    logits = torch.randn(5, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    labels = torch.tensor([0, 2, 1, 1, 0])
    expected = [reference.logsumexp(row) - row[y] for row, y in zip(logits.tolist(), labels.tolist(), strict=True)]
    assert cross_entropy(logits, labels).tolist() == pytest.approx(expected)


@given(seeds, st.integers(3, 6), st.floats(1e-3, 1e3), st.floats(-50, 50))
@settings(max_examples=30, deadline=None)
def test_dlr_loss_equals_the_loops_and_knows_neither_scale_nor_shift(seed, classes, scale, shift):
    g = torch.Generator().manual_seed(seed)
    logits = torch.randn(8, classes, generator=g, dtype=torch.float64)
    labels = torch.randint(classes, (8,), generator=g)
    found = dlr_loss(logits, labels)
    assert torch.equal(found > 0, logits.argmax(dim=1) != labels)
    for ours, row, label in zip(found.tolist(), logits.tolist(), labels.tolist(), strict=True):
        first, _, third = sorted(row, reverse=True)[:3]
        rival = max(v for c, v in enumerate(row) if c != label)
        assert ours == pytest.approx(-(row[label] - rival) / (first - third), rel=1e-9)
    torch.testing.assert_close(dlr_loss(scale * logits + shift, labels), found, rtol=1e-6, atol=1e-6)


def test_dlr_loss_of_a_right_answer_lies_in_minus_one_to_nought():
    logits = torch.tensor([[3.0, 1.0, 0.0], [3.0, 3.0, 0.0], [3.0, 0.0, 0.0], [3.0, 2.0, -7.0]])
    assert dlr_loss(logits, torch.zeros(4).long()).tolist() == pytest.approx([-2 / 3, 0, -1, -0.1])
    # of a wrong one without bound: the label may lie far below the third
    assert dlr_loss(torch.tensor([[3.0, 2.0, 1.0, -96.0]]), torch.tensor([3])).item() == pytest.approx(99 / 2)


def test_dlr_loss_gradient_goes_through_both_gaps():
    logits = torch.tensor([[3.0, 1.0, 0.0, -1.0], [0.0, 2.0, 5.0, 1.0]], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda g: dlr_loss(g, torch.tensor([0, 1])), logits)


def test_dlr_loss_of_equal_logits_is_finite_with_a_finite_gradient_in_sign():
    logits = torch.zeros(2, 3, requires_grad=True)
    loss = dlr_loss(logits, torch.tensor([0, 1]))
    assert loss.tolist() == [0, 0]
    (gradient,) = torch.autograd.grad(loss.sum(), logits)
    assert not gradient.isnan().any()


def test_dlr_loss_needs_three_classes():
    with pytest.raises(ValueError, match="logits: expected at least three classes for the DLR loss, got 2"):
        dlr_loss(torch.zeros(1, 2), torch.tensor([0]))


@given(seeds, st.integers(2, 6))
@settings(max_examples=30, deadline=None)
def test_kl_divergence_equals_the_loops_and_torchs_own(seed, classes):
    g = torch.Generator().manual_seed(seed)
    clean, moved = 3 * torch.randn(2, 4, classes, generator=g, dtype=torch.float64)
    found = kl_divergence(clean, moved)
    assert (found >= -1e-12).all()
    categorical = torch.distributions.Categorical
    theirs = torch.distributions.kl_divergence(categorical(logits=clean), categorical(logits=moved))
    torch.testing.assert_close(found, theirs, rtol=1e-9, atol=1e-12)
    for ours, p, q in zip(found.tolist(), clean.tolist(), moved.tolist(), strict=True):
        p, q = ([v - reference.logsumexp(row) for v in row] for row in (p, q))
        assert ours == pytest.approx(math.fsum(math.exp(a) * (a - b) for a, b in zip(p, q, strict=True)), abs=1e-12)


def test_kl_divergence_is_zero_at_equality_and_not_symmetric():
    g = torch.Generator().manual_seed(0)
    one, other = torch.randn(2, 4, 3, generator=g, dtype=torch.float64)
    assert kl_divergence(one, one + 7).abs().max() < 1e-14
    assert (kl_divergence(one, other) - kl_divergence(other, one)).abs().max() > 0.1


def test_kl_divergence_carries_gradients_on_both_sides():
    g = torch.Generator().manual_seed(0)
    clean, moved = (torch.randn(3, 4, generator=g, dtype=torch.float64).requires_grad_() for _ in range(2))
    assert torch.autograd.gradcheck(kl_divergence, (clean, moved))
    gradients = torch.autograd.grad(kl_divergence(clean, moved).sum(), (clean, moved))
    assert all(gradient.abs().max() > 1e-3 for gradient in gradients)


def test_kl_divergence_is_finite_where_a_probability_underflows():
    clean, moved = torch.tensor([[0.0, -1e4]]), torch.tensor([[-1e4, 0.0]])
    assert kl_divergence(clean, moved).item() == pytest.approx(1e4)


@given(seeds, st.integers(2, 4), st.integers(1, 3), st.floats(0.1, 12.5), st.floats(0.5, 4))
@settings(max_examples=60, deadline=None)
def test_a_magnet_loss_below_the_gap_certifies_a_radius(seed, classes, per_class, gap, lipschitz):
    z, labels, clusters = fixed(seed, classes, per_class)
    losses = full_magnet_loss(z, labels, clusters, gap=gap).per_example
    promised = radius_from_magnet_loss(losses, z, labels, clusters, gap=gap, lipschitz=lipschitz)
    radius = certified_radius(z, clusters, bound="nearest", lipschitz=lipschitz)
    predicted = clusters.labels[torch.cdist(z, clusters.centroids).argmin(dim=1)]
    assert torch.equal(predicted[promised > 1e-9], labels[promised > 1e-9])
    assert (radius >= promised - 1e-9)[predicted == labels].all()
    assert (promised[losses >= gap] == 0).all()


def test_the_promised_radius_is_reached_by_one_cluster_a_class():
    clusters = Clusters(torch.tensor([[0.0], [4.0]]), torch.tensor([0, 1]), torch.full((2,), 0.5))
    z, labels = torch.tensor([[0.5], [1.0]]), torch.tensor([0, 0])
    losses = full_magnet_loss(z, labels, clusters, gap=20.0).per_example
    assert (losses > 0).all()
    torch.testing.assert_close(radius_from_magnet_loss(losses, z, labels, clusters, gap=20.0), torch.tensor([1.5, 1.0]))
    torch.testing.assert_close(certified_radius(z, clusters), torch.tensor([1.5, 1.0]))


# the certificate as a loss


def nearest_radii(z, labels, clusters):
    """min_j r_j of each example, by loops: negative where it is on the wrong side."""
    rows = zip(z.tolist(), labels.tolist(), strict=True)
    centroids, classes = clusters.centroids.tolist(), clusters.labels.tolist()
    radii = []
    for point, label in rows:
        d2 = [reference.squared_distance(point, mu) for mu in centroids]
        own = min((j for j, c in enumerate(classes) if c == label), key=d2.__getitem__)
        to_own = [math.sqrt(reference.squared_distance(mu, centroids[own])) for mu in centroids]
        radii.append(min((d2[j] - d2[own]) / (2 * to_own[j]) for j, c in enumerate(classes) if c != label))
    return torch.tensor(radii, dtype=torch.float64)


kinds = st.sampled_from(get_args(CertificateLoss))


@given(seeds, st.integers(2, 4), st.integers(1, 3), st.floats(0.05, 5), st.floats(1e-3, 5), kinds, st.floats(1, 6))
@settings(max_examples=60, deadline=None)
def test_certificate_loss_equals_the_loops(seed, classes, per_class, margin, temperature, kind, annealing):
    z, labels, clusters = fixed(seed, classes, per_class)
    size = {"margin": margin, "temperature": temperature, "kind": kind, "annealing": annealing}
    found = certificate_loss(z, labels, clusters, **size)
    parts = clusters.centroids.tolist(), clusters.labels.tolist()
    expected = reference.certificate_loss(z.tolist(), labels.tolist(), *parts, margin, temperature, kind, annealing)
    assert found.tolist() == pytest.approx(expected, rel=1e-11, abs=1e-11)
    # each class of its own number of clusters
    order = torch.arange(len(clusters.labels)) != 0
    if per_class > 1:
        fewer = Clusters(clusters.centroids[order], clusters.labels[order], clusters.variance[order])
        found = certificate_loss(z, labels, fewer, margin=margin, temperature=temperature)
        parts = fewer.centroids.tolist(), fewer.labels.tolist()
        expected = reference.certificate_loss(z.tolist(), labels.tolist(), *parts, margin, temperature)
        assert found.tolist() == pytest.approx(expected, rel=1e-11, abs=1e-11)


@given(seeds, st.integers(2, 4), st.integers(1, 3), st.floats(0.1, 5))
@settings(max_examples=40, deadline=None)
def test_certificate_loss_is_a_smooth_hinge_on_the_certified_radius(seed, classes, per_class, margin):
    z, labels, clusters = fixed(seed, classes, per_class)
    radii = nearest_radii(z, labels, clusters)
    hinge = (margin - radii).clamp_min(0)
    right = clusters.labels[torch.cdist(z, clusters.centroids).argmin(dim=1)] == labels
    certified = certified_radius(z, clusters, bound="nearest")
    torch.testing.assert_close(radii[right], certified[right], rtol=1e-9, atol=1e-9)
    assert (radii[~right] <= 1e-9).all()
    rivals = per_class * (classes - 1)
    for temperature in (1.0, 0.1, 1e-2, 1e-6):
        loss = certificate_loss(z, labels, clusters, margin=margin, temperature=temperature)
        # above the hinge, by no more than the logarithm of its terms
        assert (loss >= hinge - 1e-12).all()
        assert (loss <= hinge + temperature * math.log(1 + rivals) + 1e-12).all()
    torch.testing.assert_close(loss, hinge, rtol=0, atol=1e-5)


def test_a_certificate_loss_below_the_temperature_certifies_something():
    """l < tau log(1 + e^{(m - r) / tau}) says that no rival is nearer than r; so small a loss is a promise."""
    z, labels, clusters = fixed(3)
    loss = certificate_loss(z, labels, clusters, margin=1.0, temperature=0.5)
    promised = 1.0 - 0.5 * torch.expm1(loss / 0.5).log()
    radius = certified_radius(z, clusters, bound="nearest")
    right = clusters.labels[torch.cdist(z, clusters.centroids).argmin(dim=1)] == labels
    assert (promised > 0).sum() > 3
    assert right[promised > 0].all()
    assert (radius >= promised - 1e-9)[promised > 0].all()


@pytest.mark.parametrize("temperature", [0.05, 0.5, 3.0])
def test_certificate_loss_gradient_reaches_embeddings_and_centroids(temperature):
    z, labels, clusters = fixed(1)

    def loss(embeddings, centroids):
        moved = Clusters(centroids, clusters.labels, clusters.variance)
        return certificate_loss(embeddings, labels, moved, margin=1.0, temperature=temperature)

    arguments = z.requires_grad_(), clusters.centroids.clone().requires_grad_()
    assert torch.autograd.gradcheck(loss, arguments)
    gradients = torch.autograd.grad(loss(*arguments).sum(), arguments)
    assert all(gradient.norm() > 1e-2 for gradient in gradients)


def test_the_other_losses_are_flat_where_the_margin_loss_still_pulls():
    """One cluster a class on a line: the signed radius is the place itself."""
    clusters = Clusters(torch.tensor([[1.0], [-1.0]]).double(), torch.tensor([0, 1]), torch.ones(2).double())
    z = torch.tensor([[-0.6], [-0.2], [0.1], [0.4], [0.9], [1.4], [2.5]]).double().requires_grad_()
    size, labels = {"margin": 1.0, "temperature": 0.1}, torch.zeros(7).long()

    def pull(kind):
        (gradient,) = torch.autograd.grad(certificate_loss(z, labels, clusters, kind=kind, **size).sum(), z)
        return gradient[:, 0]

    # EMMA asks for what is reached: a hundredth of the margin behind the bisector, nothing before it but a half's pull
    torch.testing.assert_close(pull("emma")[2:5], torch.full((3,), -0.5).double())
    torch.testing.assert_close(pull("emma")[5:], pull("margin")[5:])
    missing = torch.tensor([0.61, 0.21]).double() / 0.1
    torch.testing.assert_close(pull("emma")[:2], -missing.sigmoid())
    # annealing leaves alone what has the margin, and pulls at the rest as the margin loss does
    assert (pull("annealed")[5:].abs() < 0.05 * pull("margin")[5:].abs()).all()
    torch.testing.assert_close(pull("annealed")[:3], pull("margin")[:3], rtol=2e-2, atol=0)


@given(seeds, kinds, st.floats(1, 6))
@settings(max_examples=40, deadline=None)
def test_one_cluster_a_class_has_the_losses_of_its_linear_head(seed, kind, annealing):
    """With w = mu and b = -||mu||^2 / 2, and all centroids equally far apart, radii differ from margins by a scale."""
    z, labels, _ = fixed(seed, 3, 1)
    centroids = torch.eye(z.shape[1], dtype=z.dtype)[:3]
    clusters = Clusters(centroids, torch.arange(3), torch.ones(3, dtype=z.dtype))
    logits = z @ centroids.T - centroids.square().sum(dim=1) / 2
    size = {"margin": 0.7, "kind": kind, "annealing": annealing}
    by_clusters = certificate_loss(z, labels, clusters, temperature=0.3, **size)
    by_head = margin_cross_entropy(logits, labels, centroids, temperature=0.3 * 2**0.5, **size)
    torch.testing.assert_close(by_head, by_clusters * 2**0.5)


def test_the_variance_has_no_part_in_the_certificate():
    z, labels, clusters = fixed(2)
    other = Clusters(clusters.centroids, clusters.labels, torch.linspace(1, 9, 6, dtype=torch.float64))
    size = {"margin": 1.0, "temperature": 0.1}
    assert torch.equal(certificate_loss(z, labels, clusters, **size), certificate_loss(z, labels, other, **size))


@given(seeds, st.floats(0.01, 100))
@settings(max_examples=25, deadline=None)
def test_certificate_loss_knows_neither_place_nor_direction_nor_order(seed, scale):
    z, labels, clusters = fixed(seed)
    g = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(clusters.labels), generator=g)
    turn, shift = rotation(z.shape[1], seed), 5 * torch.randn(z.shape[1], generator=g, dtype=torch.float64)
    plain = certificate_loss(z, labels, clusters, margin=0.7, temperature=0.3)
    moved = Clusters((clusters.centroids @ turn + shift)[order], clusters.labels[order], clusters.variance[order])
    torch.testing.assert_close(certificate_loss(z @ turn + shift, labels, moved, margin=0.7, temperature=0.3), plain)
    # in the units of the embedding: all lengths together
    wider = Clusters(scale * clusters.centroids, clusters.labels, clusters.variance)
    found = certificate_loss(scale * z, labels, wider, margin=0.7 * scale, temperature=0.3 * scale)
    torch.testing.assert_close(found, scale * plain, rtol=1e-9, atol=1e-12)


def test_more_margin_costs_more_and_moving_home_costs_less():
    z, labels, clusters = fixed(4)
    small, large = (certificate_loss(z, labels, clusters, margin=m, temperature=0.3) for m in (0.5, 1.5))
    assert (small < large).all()
    assert (large - small <= 1.0 + 1e-12).all()
    home = clusters.centroids[torch.tensor([(clusters.labels == c).nonzero()[0, 0] for c in labels])]
    assert certificate_loss(home, labels, clusters, margin=0.5, temperature=0.3).mean() < small.mean()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_rival_on_top_of_the_own_centroid_keeps_the_loss_finite(dtype):
    centroids = torch.tensor([[0.0, 0.0], [0.0, 0.0], [3.0, 0.0]], dtype=dtype, requires_grad=True)
    clusters = Clusters(centroids, torch.tensor([0, 1, 2]), torch.ones(3, dtype=dtype))
    z = torch.tensor([[0.0, 0.0], [0.5, 0.1], [3.0, 0.0]], dtype=dtype, requires_grad=True)
    loss = certificate_loss(z, torch.tensor([0, 1, 2]), clusters, margin=1.0, temperature=0.1)
    assert loss.isfinite().all()
    # nothing lies between the two: the whole margin is missing
    assert (loss[:2] > 1).all()
    for gradient in torch.autograd.grad(loss.sum(), (z, centroids)):
        assert gradient.isfinite().all()


def test_certificate_loss_far_away_does_not_overflow():
    clusters = Clusters(torch.tensor([[0.0], [2.0]]), torch.tensor([0, 1]), torch.ones(2))
    z = torch.tensor([[1e4], [-1e4]], requires_grad=True)
    loss = certificate_loss(z, torch.tensor([0, 0]), clusters, margin=0.5, temperature=1e-3)
    # squares of 1e4 have lost some digits
    assert loss.tolist() == pytest.approx([1e4 - 1 + 0.5, 0.0], rel=3e-4, abs=1e-6)
    (gradient,) = torch.autograd.grad(loss.sum(), z)
    torch.testing.assert_close(gradient, torch.tensor([[1.0], [0.0]]), rtol=1e-3, atol=1e-6)


SIZE = {"margin": 1.0, "temperature": 0.5}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"embeddings": torch.full((3, 2), torch.nan)}, "embeddings: expected finite values"),
        ({"embeddings": torch.zeros(0, 2), "labels": torch.zeros(0).long()}, "embeddings: expected at least one row"),
        ({"labels": torch.tensor([0, 1])}, "labels: expected one for each of 3 embeddings, got 2"),
        ({"labels": torch.tensor([0, 1, 2])}, r"labels: expected classes in 0\.\.1, got 0 to 2"),
        ({"labels": torch.tensor([0, -1, 1])}, r"labels: expected classes in 0\.\.1, got -1 to 1"),
        (
            {
                "clusters": Clusters(torch.zeros(1, 2), torch.tensor([0]), torch.ones(1)),
                "labels": torch.zeros(3).long(),
            },
            "clusters: expected at least two classes, got one",
        ),
        *(
            ({name: value}, f"{name}: expected a positive number, got {value}")
            for name in ("margin", "temperature")
            for value in (0.0, -1.0, math.inf, math.nan)
        ),
        ({"kind": "hinge"}, r"kind: expected one of \('margin', 'emma', 'annealed'\), got 'hinge'"),
        *(
            ({"annealing": value}, f"annealing: expected a number of at least 1, got {value}")
            for value in (0.5, math.nan)
        ),
    ],
)
def test_certificate_loss_refuses(as_installed, changes, message):
    arguments = {
        "embeddings": torch.zeros(3, 2),
        "labels": torch.tensor([0, 1, 1]),
        "clusters": Clusters(torch.eye(2), torch.tensor([0, 1]), torch.ones(2)),
    }
    with pytest.raises(ValueError, match=message):
        certificate_loss(**(arguments | SIZE | changes))


def head(seed, classes, dim=4, points=6):
    """Embeddings, a linear head, its logits and labels."""
    g = torch.Generator().manual_seed(seed)
    z, weight = torch.randn(points, dim, generator=g).double(), torch.randn(classes, dim, generator=g).double()
    bias, labels = torch.randn(classes, generator=g).double(), torch.randint(classes, (points,), generator=g)
    return z, weight, bias, z @ weight.T + bias, labels


@given(seeds, st.integers(2, 6), st.floats(0.05, 5), st.floats(1e-3, 5), kinds, st.floats(1, 6))
@settings(max_examples=60, deadline=None)
def test_margin_cross_entropy_equals_the_loops(seed, classes, margin, temperature, kind, annealing):
    _, weight, _, logits, labels = head(seed, classes)
    size = {"margin": margin, "temperature": temperature, "kind": kind, "annealing": annealing}
    found = margin_cross_entropy(logits, labels, weight, **size)
    rows = logits.tolist(), labels.tolist(), weight.tolist()
    expected = reference.margin_cross_entropy(*rows, margin, temperature, kind, annealing)
    assert found.tolist() == pytest.approx(expected, rel=1e-11, abs=1e-11)


@given(seeds, st.integers(2, 6), st.floats(0.1, 5))
@settings(max_examples=40, deadline=None)
def test_margin_cross_entropy_is_a_smooth_hinge_on_the_margins(seed, classes, margin):
    z, weight, bias, logits, labels = head(seed, classes)
    lengths = (weight[labels][:, None] - weight).norm(dim=2)
    missing = margin * lengths + logits - logits.gather(1, labels[:, None])
    own = torch.nn.functional.one_hot(labels, classes).bool()
    hinge = missing.masked_fill(own, -torch.inf).amax(dim=1).clamp_min(0)
    for temperature in (1.0, 1e-2, 1e-6):
        loss = margin_cross_entropy(logits, labels, weight, margin=margin, temperature=temperature)
        assert (loss >= hinge - 1e-12).all()
        assert (loss <= hinge + temperature * math.log(classes) + 1e-12).all()
    torch.testing.assert_close(loss, hinge, rtol=0, atol=1e-5)
    # none is missing exactly where the certified radius is the margin at least
    certified = linear_radius(weight, bias, z, labels)
    assert torch.equal(hinge == 0, certified >= margin)


def test_without_a_margin_it_is_cross_entropy_of_cooled_logits():
    _, weight, _, logits, labels = head(0, 4)
    found = margin_cross_entropy(logits, labels, weight, margin=1e-300, temperature=0.7)
    torch.testing.assert_close(found, 0.7 * cross_entropy(logits / 0.7, labels))


@given(seeds, st.floats(-50, 50))
@settings(max_examples=25, deadline=None)
def test_margin_cross_entropy_knows_differences_alone(seed, shift):
    z, weight, bias, logits, labels = head(seed, 4)
    plain = margin_cross_entropy(logits, labels, weight, **SIZE)
    torch.testing.assert_close(margin_cross_entropy(logits + shift, labels, weight, **SIZE), plain)
    turn, g = rotation(4, seed), torch.Generator().manual_seed(seed)
    # a turn of the embedding space and of the head, a shift of all its rows
    moved = weight @ turn + torch.randn(4, generator=g, dtype=torch.float64)
    torch.testing.assert_close(margin_cross_entropy((z @ turn) @ moved.T + bias, labels, moved, **SIZE), plain)
    order = torch.randperm(4, generator=g)
    permuted = margin_cross_entropy(logits[:, order], order.argsort()[labels], weight[order], **SIZE)
    torch.testing.assert_close(permuted, plain)


def test_margin_cross_entropy_gradient_reaches_logits_and_head():
    _, weight, _, logits, labels = head(1, 4)
    arguments = logits.requires_grad_(), weight.requires_grad_()
    assert torch.autograd.gradcheck(lambda g, w: margin_cross_entropy(g, labels, w, **SIZE), arguments)
    gradients = torch.autograd.grad(margin_cross_entropy(logits, labels, weight, **SIZE).sum(), arguments)
    assert all(gradient.norm() > 1e-2 for gradient in gradients)


def test_equal_rows_of_a_head_keep_the_loss_finite():
    weight = torch.zeros(3, 2, requires_grad=True)
    logits = torch.zeros(2, 3, requires_grad=True)
    loss = margin_cross_entropy(logits, torch.tensor([0, 2]), weight, **SIZE)
    assert loss.tolist() == pytest.approx([0.5 * math.log(3)] * 2)
    for gradient in torch.autograd.grad(loss.sum(), (logits, weight)):
        assert gradient.isfinite().all()


@pytest.mark.parametrize("name", ["margin", "temperature"])
@pytest.mark.parametrize("value", [0.0, -1.0, math.inf, math.nan])
def test_margin_cross_entropy_refuses(as_installed, name, value):
    _, weight, _, logits, labels = head(0, 3)
    with pytest.raises(ValueError, match=f"{name}: expected a positive number, got {value}"):
        margin_cross_entropy(logits, labels, weight, **(SIZE | {name: value}))


class LargestTensor(TorchDispatchMode):
    """The numbers in the largest tensor that is made inside the block."""

    def __init__(self):
        super().__init__()
        self.size = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        tensors = [each for each in (made if isinstance(made, tuple) else (made,)) if isinstance(each, torch.Tensor)]
        self.size = max([self.size, *(each.numel() for each in tensors)])
        return made


CHUNKED = {
    "full_magnet_loss": lambda z, clusters, labels: full_magnet_loss(z, labels, clusters).per_example,
    "cluster_logits": lambda z, clusters, _: cluster_logits(z, clusters),
    "few voters": lambda z, clusters, _: cluster_logits(z, clusters, neighbours=3),
    "nearest_logits": lambda z, clusters, _: nearest_logits(z, clusters),
}


@pytest.mark.parametrize("name", CHUNKED)
def test_no_table_of_examples_and_clusters_is_whole(name, monkeypatch):
    """Without gradient, the largest tensor is one of a chunk; and chunks change nothing."""
    g = torch.Generator().manual_seed(0)
    clusters = Clusters(torch.randn(40, 3, generator=g), torch.arange(40) % 4, torch.ones(40))
    z, labels = torch.randn(2000, 3, generator=g), torch.arange(2000) % 4
    expected = CHUNKED[name](z, clusters, labels)
    monkeypatch.setattr(chunks, "TABLE_BYTES", 4 * 40 * 100)
    with torch.no_grad(), LargestTensor() as largest:
        found = CHUNKED[name](z, clusters, labels)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-5)
    # the embeddings and logits of all, or 100 embeddings with 40 clusters
    assert largest.size <= max(2000 * 4, 100 * 40)
