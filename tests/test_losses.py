"""Losses against plain loops, their gradients, and what must not change them."""

import math

import pytest
import reference
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from clustr_core.certify import certified_radius, radius_from_magnet_loss
from clustr_core.clusters import Clusters, fit_clusters
from clustr_core.losses import (
    consistency_loss,
    cross_entropy,
    dlr_loss,
    full_magnet_loss,
    kl_divergence,
    magnet_loss,
    margin_loss,
)

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
