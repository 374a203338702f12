"""Triton's kernels under its interpreter on the CPU, held to the float64 references.

tests/test_kernels.py runs this file in a process of its own: the interpreter is chosen when Triton is imported.
"""

import os

import pytest
import torch
from kernel_problems import (
    DTYPES,
    SHAPES,
    assert_gradients,
    assert_logits,
    assert_radius,
    between_of,
    blobs,
    draw,
)

from benchmarks import kernels as benchmark
from clustr_core.certificates.ladder import certified_radius
from clustr_core.models import classifiers
from clustr_core.models.clusters import Clusters, fit_clusters
from clustr_core.numerics import chunks, kernels
from clustr_core.numerics.kernels import dispatch, reference, tiles

if os.environ.get("TRITON_INTERPRET") != "1":
    raise RuntimeError("run this file with TRITON_INTERPRET=1, as tests/test_kernels.py does")

from clustr_core.numerics.kernels.cluster_logits import cluster_logits
from clustr_core.numerics.kernels.kmeans import kmeans
from clustr_core.numerics.kernels.pairwise_radius import pairwise_radius

# the interpreter is NumPy, which warns where a GPU quietly gives the infinity or NaN that the kernels expect
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton", "ignore::RuntimeWarning:numpy")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_logits_and_their_gradients(shape, dtype):
    z, mu, labels, variance = draw(*SHAPES[shape], dtype=dtype)
    classes, leaves = int(labels.max()) + 1, (z.requires_grad_(), mu.requires_grad_())
    logits = cluster_logits(*leaves, labels, variance, classes)
    assert logits.dtype == dtype
    wanted = reference.cluster_logits(*leaves, labels, variance, classes)
    assert_logits(logits, wanted, z, mu, variance)
    assert_gradients(logits, wanted, leaves)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("neighbours", [1, 2, 3, 9, 10, 11])
def test_neighbours(neighbours, dtype):
    z, mu, labels, variance = draw(*SHAPES["unequal-unsorted"], dtype=dtype)
    if neighbours < 10:
        # rounding may decide which of two nearly equal distances is the last to have a vote
        distances = torch.cdist(z.double(), mu.double()).square().sort(dim=1).values
        apart = distances[:, neighbours] - distances[:, neighbours - 1]
        z = z[apart > 1e-4 * distances[:, neighbours]]
        assert len(z) > 50
    leaves = z.requires_grad_(), mu.requires_grad_()
    logits = cluster_logits(*leaves, labels, variance, 5, neighbours)
    wanted = reference.cluster_logits(*leaves, labels, variance, 5, min(neighbours, 10))
    assert logits.isfinite().all()
    assert_logits(logits, wanted, z, mu, variance)
    assert_gradients(logits, wanted, leaves)


def test_a_class_without_a_vote_is_below_all_others_and_pulled_by_its_nearest_cluster_alone():
    z, labels = torch.tensor([[0.0, 0.0]], requires_grad=True), torch.tensor([0, 1, 1, 1])
    # two clusters of class 1 lie on top of each other: together they have the gradient of one
    mu = torch.tensor([[1.0, 0.0], [0.0, 3.0], [0.0, 3.0], [0.0, -4.0]], requires_grad=True)
    logits = cluster_logits(z, mu, labels, torch.ones(4), 2, 1)
    torch.testing.assert_close(logits, torch.tensor([[-0.5, -5.5]]))
    to_z, to_mu = torch.autograd.grad(logits[0, 1], (z, mu))
    torch.testing.assert_close(to_z, torch.tensor([[0.0, 3.0]]))
    torch.testing.assert_close(to_mu[1:], torch.tensor([[0.0, -1.5], [0.0, -1.5], [0.0, 0.0]]))
    assert not to_mu[0].any()


def test_a_voteless_class_with_a_higher_exponent_goes_just_below_the_lowest_vote():
    z, labels = torch.tensor([[0.0]], requires_grad=True), torch.tensor([0, 1])
    mu, variance = torch.tensor([[1.0], [2.0]], requires_grad=True), torch.tensor([0.1, 10.0])
    logits = cluster_logits(z, mu, labels, variance, 2, 1)
    torch.testing.assert_close(logits, torch.tensor([[-5.0, -6.0]]))
    assert not torch.autograd.grad(logits[0, 1], z)[0].any()


def test_the_reference_has_the_gradient_of_its_differences():
    z, mu, labels, variance = draw(4, 3, [0, 1, 0, 2, 1])
    z, mu = z.double().requires_grad_(), mu.double().requires_grad_()
    for neighbours in (None, 2):
        assert torch.autograd.gradcheck(
            lambda z, mu, top=neighbours: reference.cluster_logits(z, mu, labels, variance, 3, top), (z, mu)
        )


@pytest.mark.parametrize("neighbours", [None, 3])
@pytest.mark.parametrize("dtype", DTYPES)
def test_memory_layout_does_not_matter(neighbours, dtype):
    z, mu, labels, _ = draw(6, 10, [0, 2, 1, 2], dtype=dtype)
    variance, weight = torch.tensor(7.0).expand(4), torch.tensor(1.0, dtype=dtype).expand(6, 3)
    wide_z, wide_mu = z.repeat_interleave(2, dim=1)[:, ::2], mu.T.contiguous().T
    assert not wide_z.is_contiguous()
    assert not wide_mu.is_contiguous()
    results = []
    for points, centroids in ((z, mu), (wide_z, wide_mu)):
        leaves = points.requires_grad_(), centroids.requires_grad_()
        logits = cluster_logits(*leaves, labels, variance, 3, neighbours)
        results.append((logits, *torch.autograd.grad(logits, leaves, weight)))
    for plain, strided in zip(*results, strict=True):
        assert torch.equal(plain, strided)


@pytest.mark.parametrize("neighbours", [None, 3])
def test_chunks_of_rows_give_what_the_whole_gives(neighbours, monkeypatch):
    z, mu, labels, variance = draw(150, 4, [0, 1, 0, 2, 1])
    leaves, weight = (z.requires_grad_(), mu.requires_grad_()), torch.ones(150, 3)
    whole = cluster_logits(*leaves, labels, variance, 3, neighbours)
    to_z, to_mu = torch.autograd.grad(whole, leaves, weight)
    monkeypatch.setattr(chunks, "KERNEL_TABLE_BYTES", 1)
    assert [rows.stop for rows in tiles.row_chunks(150, 5)] == [64, 128, 150]
    chunked = cluster_logits(*leaves, labels, variance, 3, neighbours)
    assert torch.equal(whole, chunked)
    again = torch.autograd.grad(chunked, leaves, weight)
    assert torch.equal(to_z, again[0])
    torch.testing.assert_close(to_mu, again[1])


@pytest.mark.parametrize("scale", [1e-18, 1e-8, 1e8, 5e17])
@pytest.mark.parametrize("neighbours", [None, 2])
def test_extreme_scales(scale, neighbours):
    z, mu, labels, variance = draw(9, 6, [0, 1, 2, 1], scale=scale)
    z, mu = z.requires_grad_(), mu.requires_grad_()
    logits = cluster_logits(z, mu, labels, variance, 3, neighbours)
    assert_logits(logits, reference.cluster_logits(z, mu, labels, variance, 3, neighbours), z, mu, variance)
    assert all(found.isfinite().all() for found in torch.autograd.grad(logits.sum(), (z, mu)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_distance_that_overflows_is_a_logit_of_minus_infinity_and_never_nan(dtype):
    z = torch.tensor([[0.0, 0.0], [3e19, 0.0], [-3e38, 3e38]], dtype=dtype, requires_grad=True)
    mu = torch.tensor([[0.5, 0.0], [-0.5, 0.0]], dtype=dtype)
    logits = cluster_logits(z, mu, torch.tensor([0, 1]), torch.ones(2), 2)
    assert logits[0].tolist() == [-0.125, -0.125]
    assert logits[1:].isneginf().all()
    assert not torch.autograd.grad(logits.sum(), z)[0].isnan().any()


def test_overflowing_products_are_no_nan_either():
    mu = torch.tensor([[1e25], [-1e25], [0.0]])
    logits = cluster_logits(torch.tensor([[1e25], [0.0]]), mu, torch.tensor([0, 1, 2]), torch.ones(3), 3)
    assert logits.tolist() == [[-torch.inf] * 3, [-torch.inf, -torch.inf, 0.0]]


@pytest.mark.parametrize("neighbours", [None, 1])
def test_nan_is_not_hidden(neighbours):
    z, mu, labels, variance = draw(3, 4, [0, 1, 1])
    z[1, 2] = torch.nan
    assert cluster_logits(z, mu, labels, variance, 2, neighbours).isnan().any(dim=1).tolist() == [False, True, False]


def test_an_empty_batch():
    z, mu, labels, variance = draw(0, 4, [0, 1, 1])
    z.requires_grad_()
    logits = cluster_logits(z, mu, labels, variance, 2)
    assert logits.shape == (0, 2)
    assert torch.autograd.grad(logits.sum(), z)[0].shape == (0, 4)
    assert pairwise_radius(z.detach(), mu, labels, torch.zeros(0).long(), torch.cdist(mu, mu), 0.0, 0.0).shape == (0,)


def test_only_the_gradient_that_is_asked_for():
    z, mu, labels, variance = draw(3, 4, [0, 1, 1])
    for leaf in (z, mu):
        leaf.requires_grad_()
        logits = cluster_logits(z, mu, labels, variance, 2)
        assert torch.autograd.grad(logits.sum(), leaf)[0].any()
        leaf.requires_grad_(False)
    with pytest.raises(ValueError, match="variance: expected one without gradient"):
        cluster_logits(z, mu, labels, variance.requires_grad_(), 2)


def test_mixed_precision_is_promoted():
    z, mu, labels, variance = draw(3, 4, [0, 1, 1])
    half = z.bfloat16().requires_grad_()
    logits = cluster_logits(half, mu, labels, variance, 2)
    assert logits.dtype == torch.float32
    assert torch.equal(logits, cluster_logits(half.float(), mu, labels, variance, 2))
    assert torch.autograd.grad(logits.sum(), half)[0].dtype == torch.bfloat16


def test_other_dtypes_are_refused():
    z, mu, labels, variance = draw(3, 4, [0, 1, 1])
    with pytest.raises(TypeError, match=r"expected float32, bfloat16 or float16, got torch.float64"):
        cluster_logits(z, mu.double(), labels, variance, 2)
    with pytest.raises(TypeError, match=r"centroids: expected float32, .* got torch.float64"):
        pairwise_radius(z, mu.double(), labels, labels, torch.cdist(mu, mu), 0.0, 0.0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("corrected", [False, True])
def test_radius_is_sound_and_within_rounding_of_the_exact_one(shape, dtype, corrected):
    z, mu, labels, _ = draw(*SHAPES[shape], dtype=dtype)
    predicted = labels[torch.cdist(z.double(), mu.double()).argmin(dim=1)]
    correction = torch.linspace(0, 0.3, len(mu)) if corrected else 0.0
    relative = (z.shape[1] + 8) * torch.finfo(torch.float32).eps / 2
    found = pairwise_radius(z, mu, labels, predicted, between_of(mu), relative, correction)
    assert found.dtype == dtype
    exact = assert_radius(found, z, mu, labels, predicted, relative, correction)
    assert (exact > 0).any()


def test_radius_where_classes_are_never_predicted_and_predictions_are_wrong():
    z, mu, labels, _ = draw(*SHAPES["unequal-unsorted"])
    relative = 40 * torch.finfo(torch.float32).eps
    for predicted in (torch.full((65,), 3), torch.tensor([4, 0]).repeat(33)[:65]):
        found = pairwise_radius(z, mu, labels, predicted, between_of(mu), relative, 0.0)
        assert_radius(found, z, mu, labels, predicted, relative)


def test_radius_by_hand_and_the_own_cluster_on_top_of_a_rival():
    mu, labels = torch.tensor([[0.0], [4.0], [4.0]]), torch.tensor([0, 0, 1])
    z = torch.tensor([[1.0], [5.0]])
    found = pairwise_radius(z, mu, labels, torch.tensor([0, 0]), between_of(mu), 0.0, 0.0)
    # the second own cluster says nothing against the rival; the first is nearer for z = 1 only
    torch.testing.assert_close(found, torch.tensor([1.0, 0.0]))
    only = pairwise_radius(z, mu[1:], labels[1:], torch.tensor([0, 0]), between_of(mu[1:]), 0.0, 0.0)
    assert only.tolist() == [0.0, 0.0]


@pytest.mark.parametrize("scale", [1e-10, 1e8, 1e17])
def test_radius_at_extreme_scales(scale):
    z, mu, labels, _ = draw(9, 6, [0, 1, 2, 1], scale=scale)
    predicted = labels[torch.cdist(z, mu).argmin(dim=1)]
    relative = 14 * torch.finfo(torch.float32).eps / 2
    found = pairwise_radius(z, mu, labels, predicted, between_of(mu), relative, 0.0)
    assert_radius(found, z, mu, labels, predicted, relative)


def test_radius_is_zero_where_a_square_overflows_or_nothing_is_a_number():
    mu, labels = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 1e25]]), torch.tensor([0, 1, 1])
    z = torch.tensor([[1e25, 0.0], [torch.nan, 0.0], [3e38, 3e38], [-3e38, 0.0]])
    for relative in (0.0, 1e-6):
        found = pairwise_radius(z, mu, labels, torch.zeros(4).long(), between_of(mu), relative, 0.0)
        assert found.tolist() == [0.0] * 4


def test_radius_is_zero_where_only_the_square_of_a_rival_or_of_one_own_cluster_overflows():
    # 1e20: the square overflows, and a small multiple of the length times the length does not
    mu, z = torch.tensor([[0.0], [1e20], [-1e20]]), torch.tensor([[1.0]])
    found = pairwise_radius(z, mu, torch.tensor([0, 1, 1]), torch.tensor([0]), between_of(mu), 1e-6, 0.0)
    assert found.tolist() == [0.0]
    # the product with two of the own clusters overflows; by the third alone the radius would be positive
    mu, z = torch.tensor([[3e28], [-3e28], [1e11], [-1e11]]), torch.tensor([[1e11]])
    labels, zero = torch.tensor([0, 0, 0, 1]), torch.tensor([0])
    assert pairwise_radius(z, mu, labels, zero, between_of(mu), 1e-6, 0.0).tolist() == [0.0]
    assert pairwise_radius(z, mu[2:], labels[2:], zero, between_of(mu[2:]), 1e-6, 0.0) > 9e10


def test_radius_in_chunks_and_strided(monkeypatch):
    z, mu, labels, _ = draw(150, 4, [0, 1, 0, 2, 1])
    predicted, between = labels[torch.cdist(z, mu).argmin(dim=1)], between_of(mu)
    whole = pairwise_radius(z, mu, labels, predicted, between, 1e-6, 0.0)
    monkeypatch.setattr(chunks, "KERNEL_TABLE_BYTES", 1)
    assert torch.equal(whole, pairwise_radius(z, mu, labels, predicted, between, 1e-6, 0.0))
    strided = pairwise_radius(z.T.contiguous().T, mu.T.contiguous().T, labels, predicted, between.T, 1e-6, 0.0)
    torch.testing.assert_close(whole, strided)


def test_rivals_split_among_programs_give_the_same(monkeypatch):
    z, mu, labels, _ = draw(*SHAPES["two-tiles-of-clusters"])
    predicted = torch.tensor([0, 2, 1])
    split = pairwise_radius(z, mu, labels, predicted, between_of(mu), 1e-6, 0.0)
    monkeypatch.setattr("clustr_core.numerics.kernels.pairwise_radius.PROGRAMS", 1)
    assert torch.equal(split, pairwise_radius(z, mu, labels, predicted, between_of(mu), 1e-6, 0.0))


@pytest.fixture
def on_triton(monkeypatch):
    monkeypatch.setenv(kernels.VARIABLE, "triton")


def test_fit_clusters_runs_on_the_kernel(on_triton):
    z, labels = blobs([30, 50], 2, 4)
    clusters, assignments = fit_clusters(z, labels.int(), per_class=2, n_init=3, seed=1)
    centroids, slots = kmeans(z, labels, 2, 3, 20, 1)
    assert torch.equal(clusters.centroids, centroids)
    assert torch.equal(assignments, slots.int())
    assert clusters.labels.tolist() == [0, 0, 1, 1]
    with pytest.raises(ValueError, match=r"class 0 has 30 examples, fewer than per_class=40"):
        fit_clusters(z, labels, per_class=40)


def test_double_precision_always_has_plain_pytorch(on_triton):
    z, labels = blobs([30, 50], 2, 4)
    assert dispatch("kmeans", print, z) is kmeans
    assert dispatch("kmeans", print, z.double()) is print
    clusters, _ = fit_clusters(z.double(), labels, per_class=2)
    assert classifiers.cluster_logits(z.double(), clusters).dtype == torch.float64


def test_the_package_and_the_kernels_agree():
    z, mu, labels, variance = draw(12, 7, [0, 1, 2, 1])
    clusters = Clusters(mu, labels, variance)
    fields = (clusters.centroids, clusters.labels, clusters.variance, clusters.num_classes)
    for neighbours in (None, 2):
        plain = classifiers.cluster_logits(z, clusters, neighbours=neighbours)
        torch.testing.assert_close(cluster_logits(z, *fields, neighbours), plain, rtol=1e-5, atol=1e-5)
    relative = 15 * torch.finfo(torch.float32).eps / 2
    predicted = labels[torch.cdist(z, mu).argmin(dim=1)]
    found = pairwise_radius(z, mu, labels, predicted, between_of(mu), relative, 0.0) * (1 - relative)
    # each takes off a bound on its own rounding
    torch.testing.assert_close(found, certified_radius(z, clusters, bound="pairwise"), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_benchmark_compares_like_with_like(dtype):
    sizes = {"examples": 24, "classes": 4, "per_class": 5, "dim": 16}
    compared = list(benchmark.cases("cpu", dtype=dtype, **sizes))
    assert len(compared) == (6 if dtype == torch.float32 else 5)
    for case in compared:
        ours = case.ours()
        # in half precision the plain form rounds every step: compared is what it computes, in float32
        arguments = (a.float() if isinstance(a, torch.Tensor) and a.dtype == dtype else a for a in case.arguments)
        plain = case.plain(*arguments)
        for found, wanted in zip(*(v if isinstance(v, tuple) else (v,) for v in (ours, plain)), strict=True):
            size = 64 * torch.finfo(dtype).eps
            torch.testing.assert_close(found, wanted, rtol=size, atol=size, check_dtype=False)


def test_logits_and_certificates_take_the_kernels(monkeypatch):
    """What the package returns through the kernels is what it returns without them, gradients included."""
    z, mu, labels, variance = draw(*SHAPES["unequal-unsorted"], dtype=torch.float32)
    clusters = Clusters(mu, labels, variance.mean().expand(len(mu)).clone())
    found = {}
    for choice in ("reference", "triton"):
        monkeypatch.setenv(kernels.VARIABLE, choice)
        leaf = z.clone().requires_grad_()
        logits = classifiers.cluster_logits(leaf, clusters)
        (gradient,) = torch.autograd.grad(logits.square().sum(), leaf)
        radii = [certified_radius(z, clusters), certified_radius(z, clusters, rule="soft")]
        found[choice] = [logits.detach(), gradient, *radii]
    for plain, kernel in zip(found["reference"], found["triton"], strict=True):
        torch.testing.assert_close(kernel, plain, rtol=2e-4, atol=2e-4)
    assert (found["triton"][2] > 0).any()


def test_of_centroids_that_coincide_only_so_many_vote():
    """A certificate counts on it: with two voters, one of them ours, three rivals in one place have one vote."""
    centroids, labels = torch.tensor([[0.0], [2.0], [2.0], [2.0]]), torch.tensor([0, 1, 1, 1])
    z = torch.tensor([[0.5], [0.99]])
    logits = cluster_logits(z, centroids, labels, torch.ones(4), 2, 2)
    assert logits.argmax(dim=1).tolist() == [0, 0]
    torch.testing.assert_close(logits[:, 1], -(2 - z.squeeze(1)).square() / 2)


@pytest.mark.parametrize("neighbours", [None, 2])
def test_second_derivatives_are_those_of_the_reference(neighbours):
    z, mu, labels, variance = draw(7, 5, [2, 0, 0, 1, 0])
    seconds = []
    for kernel, dtype in ((cluster_logits, torch.float32), (reference.cluster_logits, torch.float64)):
        leaves = z.to(dtype).requires_grad_(), mu.to(dtype).requires_grad_()
        logits = kernel(*leaves, labels, variance, 3, neighbours)
        firsts = torch.autograd.grad(logits.sin().sum(), leaves, create_graph=True)
        penalty = sum(first.square().sum() for first in firsts)
        assert penalty.requires_grad
        seconds.append(torch.autograd.grad(penalty, leaves))
    for mine, theirs in zip(*seconds, strict=True):
        assert theirs.abs().max() > 1e-3
        torch.testing.assert_close(mine.double(), theirs, rtol=1e-4, atol=1e-4 * theirs.abs().max().item())
