"""k-means for a GPU, which is plain PyTorch: held on a CPU to a loop in float64, and to scikit-learn."""

import pytest
import torch
from kernel_problems import DTYPES, blobs, lloyd
from sklearn.cluster import KMeans

from clustr_core.numerics.kernels import kmeans as module
from clustr_core.numerics.kernels import reference
from clustr_core.numerics.kernels.kmeans import drawn, grouped, kmeans, starts_of


@pytest.mark.parametrize(
    ("sizes", "k", "dim", "steps"),
    [
        ([70, 3, 31], 3, 5, (1, 2, 20)),
        ([40, 40], 1, 33, (1, 2, 20)),
        ([150], 17, 3, (1, 2, 20)),
        ([1, 1, 1], 1, 1, (1, 2, 20)),
        ([1100, 5], 2, 66, (1, 3)),
    ],
)
def test_lloyd_takes_the_steps_of_a_plain_loop(sizes, k, dim, steps):
    z, labels = blobs(sizes, k, dim, offset=10.0)
    starts = torch.stack([z[labels == label][:k] for label in range(len(sizes))])
    for max_iter in steps:
        centroids, slots, inertia = lloyd(z, labels, starts, max_iter)
        means, nearest, total = reference.lloyd(z, labels, starts, max_iter)
        assert torch.equal(slots, nearest)
        torch.testing.assert_close(centroids.double(), means, rtol=1e-6, atol=1e-5)
        torch.testing.assert_close(inertia, total, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("dtype", DTYPES)
def test_kmeans_reaches_the_inertia_of_scikit_learn(dtype):
    z, labels = blobs([60, 45, 80], 2, 6, dtype=dtype)
    centroids, assignments = kmeans(z, labels, 2, 3, 15, 0)
    assert centroids.dtype == dtype
    assert torch.equal(assignments // 2, labels)
    for label in range(3):
        own = z[labels == label].float()
        table = torch.cdist(own, centroids[2 * label : 2 * label + 2].float()).square()
        found = table.gather(1, assignments[labels == label][:, None] - 2 * label).sum().item()
        best = KMeans(2, n_init=3, max_iter=15, random_state=0).fit(own.numpy()).inertia_
        # the rounding of the centroids to the points' dtype adds its square
        assert found == pytest.approx(best, rel=1e-5 + 64 * torch.finfo(dtype).eps ** 2)


def test_more_starts_are_never_worse_and_each_class_keeps_its_own_best():
    z, labels = blobs([40, 33], 3, 2, seed=1)
    (problem,), generator = grouped(z, labels), torch.Generator().manual_seed(0)
    inertias = torch.stack([module.lloyd(problem, starts_of(problem, 3, generator), 8)[2] for _ in range(4)])
    # the best start of one class is not that of the other, or nothing would be tested
    assert inertias.argmin(dim=0).unique().numel() == 2
    centroids, assignments = kmeans(z, labels, 3, 4, 8, 0)
    for label, best in enumerate(inertias.amin(dim=0).tolist()):
        own = labels == label
        assert (z[own] - centroids[assignments[own]]).square().sum().item() == pytest.approx(best, rel=1e-5)


def test_the_same_seed_gives_the_same_bits():
    z, labels = blobs([40, 30], 3, 5)
    first, again, other = (kmeans(z, labels, 3, 2, 5, seed) for seed in (1, 1, 2))
    assert torch.equal(first[0], again[0])
    assert torch.equal(first[1], again[1])
    assert not torch.equal(first[0], other[0])
    strided = kmeans(z.T.contiguous().T, labels, 3, 2, 5, 1)
    assert torch.equal(first[0], strided[0])


def test_a_draw_is_in_proportion_to_the_weights():
    classes = 4000
    places = drawn(torch.tensor([1.0, 0.0, 3.0]).expand(classes, 3), torch.Generator().manual_seed(0))
    shares = torch.bincount(places, minlength=3) / classes
    assert shares[1] == 0
    assert abs(shares[2] - 0.75) < 4 * (0.75 * 0.25 / classes) ** 0.5
    assert drawn(torch.zeros(2, 2), torch.Generator()).tolist() == [0, 0]


@pytest.mark.parametrize("sizes", [[1, 2, 3, 4, 5, 8, 9], [1000, 1], [7, 7, 7], [4, 3, 1000, 513, 512]])
def test_tables_hold_each_point_once_and_are_half_full(sizes):
    z, labels = blobs(sizes, 1, 2, offset=5.0)
    parts = list(grouped(z, labels))
    assert torch.cat([part.classes for part in parts]).sort().values.tolist() == list(range(len(sizes)))
    rows = torch.cat([part.rows[part.filled] for part in parts])
    assert torch.equal(rows.sort().values, torch.arange(len(z)))
    for part in parts:
        assert (part.filled.sum(dim=1) > part.filled.shape[1] / 2).all()
        assert torch.equal(labels[part.rows][part.filled], part.classes.repeat_interleave(part.filled.sum(dim=1)))
        assert not part.points[~part.filled].any()
        found = (part.points + part.origins)[part.filled]
        torch.testing.assert_close(found, z[part.rows[part.filled]], rtol=1e-6, atol=1e-5)


def test_double_precision_is_refused():
    with pytest.raises(TypeError, match=r"points: expected float32, .* got torch.float64"):
        kmeans(torch.zeros(3, 1).double(), torch.tensor([0, 1, 1]), 1, 1, 1, 0)


def test_starts_are_different_points_of_the_class_the_next_far_from_those_there_are():
    g = torch.Generator().manual_seed(0)
    corners = 100 * torch.eye(4).repeat(2, 1)
    z, labels = corners + 0.01 * torch.rand(8, 4, generator=g), torch.arange(2).repeat_interleave(4)
    (problem,) = grouped(z, labels)
    starts = starts_of(problem, 4, g) + problem.origins
    for label in (0, 1):
        found, own = (sorted(map(tuple, each.tolist())) for each in (starts[label], z[labels == label]))
        torch.testing.assert_close(torch.tensor(found), torch.tensor(own))


def test_an_empty_cluster_moves_to_the_farthest_point():
    z = torch.tensor([[0.0], [1.0], [2.0], [9.0], [100.0]])
    labels = torch.tensor([0, 0, 0, 0, 1])
    starts = torch.tensor([[[1.0], [500.0], [600.0]], [[100.0], [300.0], [400.0]]])
    centroids, slots, inertia = lloyd(z, labels, starts, 1)
    assert centroids[0].flatten().tolist() == [3.0, 9.0, 0.0]
    # one point and three clusters: no other point to move to
    assert centroids[1].flatten().tolist() == [100.0, 100.0, 100.0]
    assert slots.tolist() == [2, 2, 0, 1, 0]
    assert inertia.tolist() == [2.0, 0.0]


def test_fewer_distinct_points_than_clusters():
    z, labels = torch.tensor([[0.0], [0.0], [0.0], [1.0], [2.0], [5.0]]), torch.tensor([0, 0, 0, 1, 1, 1])
    centroids, assignments = kmeans(z, labels, 2, 1, 20, 0)
    assert centroids[:2].flatten().tolist() == [0.0, 0.0]
    assert sorted(centroids[2:].flatten().tolist()) == [1.5, 5.0]
    assert torch.equal(assignments // 2, labels)
