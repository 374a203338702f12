"""The kernels on a real device: they agree with the references, and never hold a table of examples x clusters."""

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
    lloyd,
)

from clustr_core.certificates.ladder import certified_radius
from clustr_core.models.classifiers import cluster_logits
from clustr_core.models.clusters import Clusters, fit_clusters
from clustr_core.numerics import kernels
from clustr_core.numerics.kernels import dispatch, reference

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def on_triton(monkeypatch):
    """Whether or not they are the faster ones there."""
    monkeypatch.setenv(kernels.VARIABLE, "triton")


def fails(*_):
    raise AssertionError("the reference ran")


def kernel(name, first):
    return dispatch(name, fails, first)


def on_device(*tensors):
    return tuple(tensor.cuda() for tensor in tensors)


@pytest.mark.parametrize("neighbours", [None, 2])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [*SHAPES, "large"])
def test_logits_and_their_gradients(shape, dtype, neighbours):
    size = SHAPES.get(shape, (3000, 512, [j % 100 for j in range(1000)]))
    z, mu, labels, variance = on_device(*draw(*size, dtype=dtype))
    if neighbours is not None:
        distances = torch.cdist(z.double(), mu.double()).square().sort(dim=1).values
        z = z[distances[:, neighbours] - distances[:, neighbours - 1] > 1e-4 * distances[:, neighbours]]
    classes, leaves = int(labels.max()) + 1, (z.requires_grad_(), mu.requires_grad_())
    logits = kernel("cluster_logits", z)(*leaves, labels, variance, classes, neighbours)
    # the reference holds examples x classes x clusters: only some rows of the large problem
    rows = slice(0, 64)
    wanted = reference.cluster_logits(z[rows], mu, labels, variance, classes, neighbours)
    assert_logits(logits[rows], wanted, z[rows], mu, variance)
    assert_gradients(logits[rows], wanted, leaves)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [*SHAPES, "large"])
def test_radius(shape, dtype):
    z, mu, labels, _ = on_device(*draw(*SHAPES.get(shape, (500, 512, [j % 20 for j in range(200)])), dtype=dtype))
    predicted = labels[torch.cdist(z.double(), mu.double()).argmin(dim=1)]
    relative = (z.shape[1] + 8) * torch.finfo(torch.float32).eps / 2
    found = kernel("pairwise_radius", z)(z, mu, labels, predicted, between_of(mu), relative, 0.0)
    assert_radius(found, z, mu, labels, predicted, relative)


@pytest.mark.parametrize("dtype", DTYPES)
def test_kmeans_takes_the_steps_of_a_plain_loop(dtype):
    z, labels = on_device(*blobs([900, 3000, 17], 3, 48, dtype=dtype))
    starts = torch.stack([z[labels == label][:3].float() for label in range(3)])
    centroids, slots, inertia = lloyd(z, labels, starts, 20)
    means, nearest, total = reference.lloyd(z, labels, starts, 20)
    assert torch.equal(slots, nearest)
    torch.testing.assert_close(centroids.double(), means, rtol=2e-5, atol=2e-5)
    torch.testing.assert_close(inertia, total, rtol=1e-5, atol=1e-3)


def test_the_same_inputs_give_the_same_bits():
    z, labels = on_device(*blobs([900, 3000], 3, 48))
    first, again = (kernel("kmeans", z)(z, labels, 3, 2, 20, 5) for _ in range(2))
    assert torch.equal(first[0], again[0])
    assert torch.equal(first[1], again[1])
    leaves = (z.requires_grad_(), first[0].requires_grad_())
    fields = (torch.arange(6, device="cuda") // 3, torch.full((6,), 48.0, device="cuda"), 2)
    for neighbours in (None, 2):
        results = []
        for _ in range(2):
            logits = kernel("cluster_logits", z)(*leaves, *fields, neighbours)
            results.append((logits, *torch.autograd.grad(logits[:, 0].sum(), leaves)))
        assert all(torch.equal(*pair) for pair in zip(*results, strict=True))


def extra_bytes(call):
    """Memory beyond what is there before the call, after one that warms up."""
    call()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


@pytest.mark.parametrize("neighbours", [None, 20])
def test_memory_does_not_grow_with_examples_times_clusters(neighbours):
    n, clusters, dim, classes = 200_000, 4000, 64, 100
    table = 4 * n * clusters
    g = torch.Generator("cuda").manual_seed(0)
    z = torch.randn(n, dim, generator=g, device="cuda", requires_grad=True)
    mu = torch.randn(clusters, dim, generator=g, device="cuda", requires_grad=True)
    labels, variance = torch.arange(clusters, device="cuda") % classes, torch.ones(clusters, device="cuda")

    def forward():
        return kernel("cluster_logits", z)(z, mu, labels, variance, classes, neighbours)

    def backward():
        torch.autograd.grad(forward().sum(), (z, mu))

    predicted, between = torch.arange(n, device="cuda") % classes, between_of(mu.detach())

    def radius():
        kernel("pairwise_radius", z)(z.detach(), mu.detach(), labels, predicted, between, 1e-5, 0.0)

    for call in (forward, backward, radius):
        assert extra_bytes(call) < table / 2


def test_the_package_on_the_device_agrees_with_the_cpu(monkeypatch):
    monkeypatch.delenv(kernels.VARIABLE, raising=False)
    z, labels = blobs([300, 500, 400], 2, 32)
    clusters, assignments = fit_clusters(z.cuda(), labels.cuda(), per_class=2, n_init=10)
    here, _ = fit_clusters(z, labels, per_class=2, n_init=10)
    assert clusters.centroids.is_cuda
    assert torch.equal(clusters.labels[assignments].cpu(), labels)
    assert clusters.shared_variance == pytest.approx(here.shared_variance, rel=1e-4)
    there = Clusters(here.centroids.cuda(), here.labels.cuda(), here.variance.cuda())
    for neighbours in (None, 3):
        found = cluster_logits(z.cuda(), there, neighbours=neighbours).cpu()
        torch.testing.assert_close(found, cluster_logits(z, here, neighbours=neighbours), rtol=1e-4, atol=1e-4)
    exact = certified_radius(z.double(), here.to(torch.float64))
    found = certified_radius(z.cuda(), there).cpu()
    torch.testing.assert_close(found.double(), exact, rtol=1e-3, atol=1e-3)


def test_the_override_holds_on_the_device(monkeypatch):
    z = torch.ones(2, 2, device="cuda")
    assert kernel("kmeans", z) is not fails
    assert dispatch("kmeans", fails, z.double()) is fails
    monkeypatch.setenv(kernels.VARIABLE, "reference")
    assert dispatch("kmeans", fails, z) is fails
