import pytest
import reference
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from clustr_core.models.clusters import Clusters, fit_clusters


def blobs(seed=0, classes=3, per_class=2, size=20, dim=4, dtype=torch.float64):
    """Well separated blobs: what k-means must find is known."""
    g = torch.Generator().manual_seed(seed)
    centres = 20 * torch.randn(classes * per_class, dim, generator=g, dtype=dtype)
    z = centres.repeat_interleave(size, dim=0) + 0.1 * torch.randn(len(centres) * size, dim, generator=g, dtype=dtype)
    labels = torch.arange(classes).repeat_interleave(per_class * size)
    order = torch.randperm(len(z), generator=g)
    return z[order], labels[order], centres


def make(**changes):
    fields = {
        "centroids": torch.randn(4, 3, generator=torch.Generator().manual_seed(0)),
        "labels": torch.tensor([0, 1, 1, 0]),
        "variance": torch.full((4,), 2.0),
    }
    return Clusters(**(fields | changes))


def test_fit_finds_separated_blobs():
    z, labels, centres = blobs()
    clusters, assignments = fit_clusters(z, labels, per_class=2, n_init=5)
    assert clusters.labels.tolist() == [0, 0, 1, 1, 2, 2]
    assert torch.equal(clusters.labels[assignments], labels)
    nearest = torch.cdist(centres, clusters.centroids).argmin(dim=1)
    assert sorted(nearest.tolist()) == list(range(6))
    means = torch.stack([z[assignments == j].mean(dim=0) for j in range(6)])
    torch.testing.assert_close(clusters.centroids, means)


@given(st.integers(0, 10**6), st.integers(1, 3), st.integers(2, 4))
@settings(max_examples=20, deadline=None)
def test_variance_matches_the_loops_and_assignment_is_the_nearest_of_the_class(seed, per_class, classes):
    g = torch.Generator().manual_seed(seed)
    labels = torch.arange(classes).repeat_interleave(7)
    z = torch.randn(len(labels), 3, generator=g, dtype=torch.float64)
    clusters, assignments = fit_clusters(z, labels, per_class=per_class, seed=seed)
    expected = reference.shared_variance(z.tolist(), assignments.tolist(), clusters.centroids.tolist())
    assert clusters.shared_variance == pytest.approx(expected, rel=1e-12)
    for point, label, given_cluster in zip(z.tolist(), labels.tolist(), assignments.tolist(), strict=True):
        d2 = reference.squared_distances([point], clusters.centroids.tolist())[0]
        own = [j for j in range(len(d2)) if int(clusters.labels[j]) == label]
        assert given_cluster in own
        assert d2[given_cluster] == pytest.approx(min(d2[j] for j in own))


def test_same_seed_same_clusters_and_dtype_follows():
    z, labels, _ = blobs(dtype=torch.float32)
    first, a = fit_clusters(z, labels, per_class=2, seed=7)
    again, b = fit_clusters(z, labels, per_class=2, seed=7)
    assert torch.equal(first.centroids, again.centroids)
    assert torch.equal(a, b)
    assert first.centroids.dtype == first.variance.dtype == torch.float32


def test_embeddings_with_a_graph_are_taken_without_it():
    z, labels, _ = blobs()
    clusters, _ = fit_clusters(z.requires_grad_(), labels, per_class=1)
    assert not clusters.centroids.requires_grad
    assert not clusters.variance.requires_grad


def test_fewer_distinct_points_than_clusters():
    z = torch.tensor([[0.0], [0.0], [0.0], [1.0], [2.0], [5.0]], dtype=torch.float64)
    clusters, assignments = fit_clusters(z, torch.tensor([0, 0, 0, 1, 1, 1]), per_class=2)
    assert clusters.centroids[:2].tolist() == [[0.0], [0.0]]
    assert sorted(clusters.centroids[2:].flatten().tolist()) == [1.5, 5.0]
    assert torch.equal(clusters.labels[assignments], torch.tensor([0, 0, 0, 1, 1, 1]))


def test_points_without_any_spread_have_no_variance():
    with pytest.raises(ValueError, match=r"variance: expected positive finite values, got minimum 0"):
        fit_clusters(torch.tensor([[0.0], [0.0], [1.0], [1.0]]), torch.tensor([0, 0, 1, 1]), per_class=1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"per_class": 0}, r"per_class: expected a whole number, at least 1, got 0"),
        ({"per_class": 50}, r"class 0 has 40 examples, fewer than per_class=50"),
    ],
)
def test_fit_refuses(changes, message):
    z, labels, _ = blobs()
    with pytest.raises(ValueError, match=message):
        fit_clusters(z, labels, **changes)


def test_fit_refuses_labels_of_another_length(as_installed):
    z, labels, _ = blobs()
    with pytest.raises(ValueError, match=r"labels: expected one for each of 120 embeddings, got 119"):
        fit_clusters(z, labels[1:], per_class=2)


def test_fit_names_the_class_that_is_too_small():
    z, labels, _ = blobs()
    keep = (labels != 1) | (torch.cumsum(labels == 1, 0) <= 1)
    with pytest.raises(ValueError, match=r"class 1 has 1 examples, fewer than per_class=2"):
        fit_clusters(z[keep], labels[keep], per_class=2)


def test_fit_refuses_nan_and_counts_rows():
    z, labels, _ = blobs()
    z[3, 1] = torch.nan
    z[5] = torch.inf
    with pytest.raises(ValueError, match=r"embeddings: expected finite values.*2 of 120 rows"):
        fit_clusters(z, labels, per_class=2)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"centroids": torch.full((4, 3), torch.nan)}, "centroids: expected finite"),
        ({"centroids": torch.zeros(0, 3), "labels": torch.zeros(0).long(), "variance": torch.ones(0)}, "centroids"),
        ({"variance": torch.tensor([1.0, 1.0, 0.0, 1.0])}, "variance: expected positive finite"),
        ({"variance": torch.tensor([1.0, 1.0, torch.inf, 1.0])}, "variance: expected positive finite"),
        ({"centroids": torch.zeros(4)}, r"centroids: expected shape \[cluster, dim\], got \[4\]"),
        ({"centroids": torch.zeros(4, 3).long()}, "centroids: expected a floating dtype, got torch.int64"),
        ({"labels": torch.tensor([0, 1, 1])}, r"labels: expected one entry for each of 4 centroids, got shape \[3\]"),
        ({"variance": torch.ones(5)}, r"variance: expected one entry for each of 4 centroids, got shape \[5\]"),
        ({"labels": torch.tensor([0.0, 1.0, 1.0, 0.0])}, "labels: expected class indices"),
        ({"labels": torch.tensor([0, -1, 1, 0])}, "labels: expected class indices"),
        ({"labels": torch.tensor([0, 2, 2, 0])}, r"labels: expected a cluster for every class, got none for \[1\]"),
    ],
)
def test_clusters_refuse(changes, message, as_installed):
    with pytest.raises(ValueError, match=message):
        make(**changes)


def test_gather_by_class_with_classes_of_different_size():
    clusters = Clusters(torch.randn(5, 2), torch.tensor([1, 0, 1, 2, 1]), torch.ones(5))
    values = torch.arange(10.0).reshape(2, 5)
    gathered = clusters.gather_by_class(values, -1.0)
    assert gathered[0].tolist() == [[1, -1, -1], [0, 2, 4], [3, -1, -1]]
    assert gathered[1].tolist() == [[6, -1, -1], [5, 7, 9], [8, -1, -1]]


def test_shared_variance_refuses_different_values():
    with pytest.raises(ValueError, match=r"expected one shared variance, got values from 1 to 2"):
        _ = make(variance=torch.tensor([1.0, 1.0, 2.0, 1.0])).shared_variance
    assert make().shared_variance == 2.0


def test_to_casts_what_floats():
    moved = make().to(torch.float64)
    assert moved.centroids.dtype == moved.variance.dtype == torch.float64
    assert moved.labels.dtype == torch.int64


@pytest.mark.parametrize("labels", [torch.tensor([-1, 0, 0, 1]), torch.tensor([0.0, 0, 1, 1])])
def test_fit_refuses_labels_that_are_no_classes(as_installed, labels):
    with pytest.raises(ValueError, match=r"labels: expected class indices 0, 1, 2, \.\.\., got"):
        fit_clusters(torch.randn(4, 2), labels, per_class=1)
