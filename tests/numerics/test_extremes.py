"""Logits, losses and certificates at the ends of the numbers, held against exact fractions.

Embeddings and centroids of every size from 1e-30 to 1e30, on top of each other, at equal distances; one cluster a
class and ten thousand; in float64, float32 and bfloat16. What comes out is finite or refused by name, a radius is never
larger than the real one, and a class is certified only where it is the real one.
"""

import itertools
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from clustr_core.certificates.ladder import certified_radius
from clustr_core.certificates.names import HARD_BOUNDS
from clustr_core.models.classifiers import cluster_logits, nearest_logits
from clustr_core.models.clusters import Clusters
from clustr_core.training.losses import certificate_loss, full_magnet_loss, magnet_loss, margin_cross_entropy
from clustr_core.training.recipes import CertificateLoss

DTYPES = [torch.float64, torch.float32, torch.bfloat16]
KINDS = CertificateLoss.__args__
exponents = st.integers(-30, 30)


@st.composite
def problems(draw, dtype, *, narrow=False):
    """A few embeddings, and clusters of two to four classes, with all that is awkward about them."""
    seed, dim = draw(st.integers(0, 10**6)), draw(st.integers(1, 4))
    classes, per_class = draw(st.integers(2, 4)), draw(st.integers(1, 3))
    g = torch.Generator().manual_seed(seed)
    scale = 10.0 ** (0 if narrow else draw(exponents))
    shift = 0.0 if narrow else draw(st.sampled_from([0.0, 0.0, 1.0, 1e3])) * scale
    centroids = scale * torch.randn(classes * per_class, dim, generator=g, dtype=torch.float64) + shift
    z = scale * torch.randn(5, dim, generator=g, dtype=torch.float64) + shift
    labels = torch.arange(classes).repeat(per_class)
    awkward = draw(st.sampled_from(["nothing", "coincident", "on a centroid", "halfway", "equal", "far"]))
    if awkward == "coincident":
        centroids[1] = centroids[0]
    elif awkward == "on a centroid":
        z[0], z[1] = centroids[0], centroids[-1]
    elif awkward == "halfway":
        z[0] = (centroids[0] + centroids[1]) / 2
    elif awkward == "equal":
        z[:] = z[0]
    elif awkward == "far":
        z *= 100
    variance = torch.full((len(centroids),), max(scale, 1e-15) ** 2 if scale < 1e15 else 1e30, dtype=torch.float64)
    z, centroids, variance = (part.to(dtype) for part in (z, centroids, variance))
    return z, Clusters(centroids, labels, variance)


def fractions(tensor):
    """The very numbers of a matrix."""
    return [[Fraction(value) for value in row] for row in tensor.double().tolist()]


def exactly(z, clusters, radius):
    """Of each embedding: itself, the predicted class and the radius; and the centroids with their classes."""
    predicted = nearest_logits(z, clusters).argmax(dim=1).tolist()
    rows = zip(fractions(z), predicted, radius.double().tolist(), strict=True)
    return rows, fractions(clusters.centroids), clusters.labels.tolist()


def squared(a, b):
    return sum((x - y) ** 2 for x, y in zip(a, b, strict=True))


def largest_square(z, centroids, labels, predicted, bound):
    """The square of the real radius around z under a bound, or None if z is of another class."""
    distances = [squared(z, mu) for mu in centroids]
    own = [j for j, label in enumerate(labels) if label == predicted]
    nearest = min(own, key=distances.__getitem__)
    found = None
    for j in (j for j, label in enumerate(labels) if label != predicted):
        gaps = [
            (distances[j] - distances[i], squared(centroids[j], centroids[i]))
            for i in ([nearest] if bound == "nearest" else own)
        ]
        if distances[j] < distances[nearest]:
            return None
        # on top of a rival there is no room at all
        squares = [gap**2 / (4 * apart) if gap > 0 else Fraction(0) for gap, apart in gaps if apart]
        best = max(squares, default=Fraction(0))
        found = best if found is None else min(found, best)
    return found


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bound", ["nearest", "pairwise"])
def test_a_radius_is_never_larger_than_the_real_one(dtype, bound):
    @given(problems(dtype))
    @settings(max_examples=150, deadline=None)
    def check(problem):
        z, clusters = problem
        radius = certified_radius(z, clusters, bound=bound)
        assert radius.isfinite().all()
        assert (radius >= 0).all()
        rows, centroids, labels = exactly(z, clusters, radius)
        for point, label, r in rows:
            real = largest_square(point, centroids, labels, label, bound)
            assert r == 0 or (real is not None and Fraction(r) ** 2 <= real), (r, real)

    check()


@pytest.mark.parametrize("bound", ["triangle", "nearest", "pairwise"])
def test_the_nearest_cluster_is_the_nearest_where_its_rounding_overflows(bound):
    """In float32 the square of 2e19 is infinite: another own cluster had taken the nearest one's place."""
    z = torch.tensor([[1.6033e18, 1.8303e19]])
    own = [[-7.2418e18, 1.3547e19], [-2.3599e18, 6.7014e18]]
    others = [[9.7998e18, 1.0268e18], [1.2340e18, 4.6477e18], [-6.7734e18, 7.6741e18], [1.2970e19, 6.4852e18]]
    clusters = Clusters(torch.tensor(own + others), torch.tensor([0, 0, 1, 1, 2, 2]), torch.full((6,), 1e30))
    radius = certified_radius(z, clusters, bound=bound)
    ((point, label, r),), exact, labels = exactly(z, clusters, radius)
    assert Fraction(r) ** 2 <= largest_square(point, exact, labels, label, "nearest" if bound == "triangle" else bound)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_ladder_holds_and_ends_below_the_nearest_rival(dtype):
    @given(problems(dtype))
    @settings(max_examples=100, deadline=None)
    def check(problem):
        z, clusters = problem
        rungs = [certified_radius(z, clusters, bound=bound).double() for bound in HARD_BOUNDS]
        slack = 0.05 if dtype is torch.bfloat16 else 1e-3
        for lower, upper in itertools.pairwise(rungs):
            # each gives up what rounding may have cost it, so a lower rung may be the larger by that
            assert (lower * (1 - slack) <= upper + 1e-2 * lower.max() + 1e-300).all() or (upper == 0).any()
        rows, centroids, labels = exactly(z, clusters, rungs[-1])
        for point, label, r in rows:
            rivals = [squared(point, mu) for mu, own in zip(centroids, labels, strict=True) if own != label]
            assert r == 0 or Fraction(r) ** 2 <= min(rivals)

    check()


def check_what_rounding_costs(z, clusters):
    """The documented slack: some thousand roundings of numbers as large as the distances."""
    # bfloat16 is computed in float32, and rounded down
    eps = torch.finfo(torch.float32 if z.dtype is torch.bfloat16 else z.dtype).eps
    radius = certified_radius(z, clusters, bound="nearest").double()
    rows, centroids, labels = exactly(z, clusters, radius)
    for point, label, r in rows:
        real = largest_square(point, centroids, labels, label, "nearest")
        farthest = max(float(squared(point, mu)) for mu in centroids) ** 0.5
        nearest = (
            min((float(squared(a, b)) for i, a in enumerate(centroids) for b in centroids[:i] if a != b), default=1)
            ** 0.5
        )
        lost = 1e3 * eps * farthest * max(1.0, farthest / nearest)
        rounded = 2.0**-7 if z.dtype is torch.bfloat16 else 0.0
        assert real is None or r >= float(real) ** 0.5 * (1 - rounded) - lost


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_rounding_costs_where_numbers_are_ordinary(dtype):
    @given(problems(dtype, narrow=True))
    @settings(max_examples=100, deadline=None)
    def check(problem):
        check_what_rounding_costs(*problem)

    check()


@pytest.mark.parametrize("apart", [0.1, 0.03, 0.01, 0.0042, 0.002, 0.001, 1e-4, 1e-6])
def test_what_rounding_costs_between_centroids_that_are_near(apart):
    centroids = torch.tensor([[0.5491], [0.5491], [-1.1907], [-1.1907 - apart]], dtype=torch.float64)
    clusters = Clusters(centroids, torch.tensor([0, 1, 0, 1]), torch.ones(4, dtype=torch.float64))
    check_what_rounding_costs(torch.linspace(-1.2, 0.6, 40, dtype=torch.float64)[:, None], clusters)


@pytest.mark.parametrize("dtype", DTYPES)
def test_logits_are_finite_and_the_nearest_class_wins(dtype):
    @given(problems(dtype))
    @settings(max_examples=150, deadline=None)
    def check(problem):
        z, clusters = problem
        for logits in (
            nearest_logits(z, clusters),
            cluster_logits(z, clusters),
            cluster_logits(z, clusters, neighbours=2),
        ):
            assert not logits.isnan().any()
            assert logits.shape == (len(z), clusters.num_classes)
        radius = certified_radius(z, clusters, bound="nearest")
        soft = cluster_logits(z, clusters).argmax(dim=1)
        hard = nearest_logits(z, clusters).argmax(dim=1)
        # a single cluster a class: both rules are one, wherever anything is certified
        single = len(clusters.labels) == clusters.num_classes
        assert not single or torch.equal(soft[radius > 0], hard[radius > 0])

    check()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("kind", KINDS)
def test_the_certificate_as_a_loss_is_finite_with_its_gradients(dtype, kind):
    @given(problems(dtype), st.floats(0.01, 10))
    @settings(max_examples=80, deadline=None)
    def check(problem, size):
        z, clusters = problem
        scale = max(float(clusters.centroids.abs().max()), 1e-25)
        if scale > 1e15 and dtype is torch.float32:
            return  # squares of such numbers are beyond float32, and training refuses a loss that is not finite
        z, centroids = z.clone().requires_grad_(), clusters.centroids.clone().requires_grad_()
        labels = torch.arange(len(z)) % clusters.num_classes
        moved = Clusters(centroids, clusters.labels, clusters.variance)
        loss = certificate_loss(z, labels, moved, margin=size * scale, temperature=size * scale / 4, kind=kind)
        assert loss.isfinite().all()
        assert (loss >= 0).all()
        for gradient in torch.autograd.grad(loss.sum(), (z, centroids)):
            assert gradient.isfinite().all()

    check()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_magnet_losses_are_finite_with_their_gradients(dtype):
    @given(problems(dtype))
    @settings(max_examples=80, deadline=None)
    def check(problem):
        z, clusters = problem
        if float(clusters.centroids.abs().max()) > 1e15 and dtype is torch.float32:
            return
        labels = torch.arange(len(z)) % 2
        z = z.clone().requires_grad_()
        found = magnet_loss(z, labels, labels)
        assert found.per_example.isfinite().all()
        (gradient,) = torch.autograd.grad(found.loss, z)
        assert gradient.isfinite().all()
        full = full_magnet_loss(z, labels, clusters)
        assert full.per_example.isfinite().all()
        (gradient,) = torch.autograd.grad(full.loss, z)
        assert gradient.isfinite().all()

    check()


@given(st.integers(0, 10**6), exponents, st.sampled_from(KINDS))
@settings(max_examples=80, deadline=None)
def test_margins_of_a_linear_head_are_finite(seed, exponent, kind):
    g = torch.Generator().manual_seed(seed)
    weight = torch.randn(4, 3, generator=g, dtype=torch.float64)
    logits = (10.0**exponent * torch.randn(6, 4, generator=g, dtype=torch.float64)).requires_grad_()
    labels = torch.arange(6) % 4
    loss = margin_cross_entropy(logits, labels, weight, margin=0.5, temperature=0.1, kind=kind)
    assert loss.isfinite().all()
    (gradient,) = torch.autograd.grad(loss.sum(), logits)
    assert gradient.isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_ten_thousand_clusters(dtype):
    g = torch.Generator().manual_seed(0)
    centroids = torch.randn(10_000, 8, generator=g).to(dtype)
    clusters = Clusters(centroids, torch.arange(10_000) % 100, torch.ones(10_000, dtype=dtype))
    z = torch.randn(4, 8, generator=g).to(dtype)
    radius = certified_radius(z, clusters, bound="pairwise")
    rows, exact, labels = exactly(z, clusters, radius)
    for point, label, r in rows:
        real = largest_square(point, exact, labels, label, "nearest")
        # pairwise is at least nearest, less rounding
        assert real is not None
        assert r >= float(real) ** 0.5 * (0.98 if dtype is torch.bfloat16 else 0.999) - 1e-3


def test_a_class_without_a_cluster_is_said():
    with pytest.raises(ValueError, match="labels"):
        Clusters(torch.zeros(2, 2), torch.tensor([0, 2]), torch.ones(2))
