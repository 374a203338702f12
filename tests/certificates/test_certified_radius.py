import copy
import math

import pytest
import reference
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from clustr_core.certificates import hard, ladder, linear
from clustr_core.certificates.ladder import certified_radius, certify
from clustr_core.certificates.linear import linear_radius, margin_radius
from clustr_core.certificates.soft import _Between
from clustr_core.models.classifiers import ClusterClassifier, LinearClassifier, cluster_logits, nearest_logits
from clustr_core.models.clusters import Clusters
from clustr_core.models.encoders import build_encoder
from clustr_core.numerics import chunks
from clustr_core.theory import oracle
from clustr_core.theory.examples import (
    hard_radius_soft_rule_example,
    loose_nearest_example,
    only_second_nearest_example,
    random_configuration,
)
from clustr_core.theory.oracle import exact_nearest_rule_distance
from clustr_core.theory.search import logits_of

BOUNDS = ("triangle", "nearest", "pairwise")
SEEDS = st.integers(0, 10**6)


def draw(seed, classes=3, per_class=2, dim=3, points=8, variance=0.3, spread=0.5):
    drawn = random_configuration(
        classes=classes, per_class=per_class, dim=dim, points=points, seed=seed, variance=variance, spread=spread
    )
    return drawn.embeddings, drawn.clusters


def by_loops(z, clusters, **options):
    parts = clusters.centroids.tolist(), clusters.labels.tolist()
    return [reference.certified_radius(point, *parts, **options) for point in z.tolist()]


@pytest.mark.parametrize("bound", BOUNDS)
@given(SEEDS, st.integers(2, 4), st.integers(1, 3), st.floats(0.01, 100))
@settings(max_examples=25, deadline=None)
def test_the_radius_is_that_of_the_loops(bound, seed, classes, per_class, lipschitz):
    z, clusters = draw(seed, classes, per_class)
    expected = by_loops(z, clusters, bound=bound, lipschitz=lipschitz)
    got = certified_radius(z, clusters, bound=bound, lipschitz=lipschitz)
    assert got.tolist() == pytest.approx(expected, rel=1e-11, abs=1e-12 / lipschitz)


@pytest.mark.parametrize("bound", BOUNDS)
@pytest.mark.parametrize("neighbours", [None, 1, 2, 3, 5])
def test_the_corrected_radius_is_that_of_the_loops(bound, neighbours):
    z, clusters = draw(11, classes=3, per_class=3, points=40)
    k = 3
    votes = k if neighbours is None else max(1, min(k, neighbours - 1))
    correction = [0.3 * math.log(votes)] * len(clusters.centroids)
    predicted = cluster_logits(z, clusters, neighbours=neighbours).argmax(dim=1).tolist()
    parts = clusters.centroids.tolist(), clusters.labels.tolist()
    expected = [
        reference.certified_radius(point, *parts, bound=bound, predicted=c, correction=correction)
        for point, c in zip(z.tolist(), predicted, strict=True)
    ]
    got = certified_radius(z, clusters, bound=bound, rule="soft", neighbours=neighbours)
    assert got.tolist() == pytest.approx(expected, rel=1e-11, abs=1e-12)
    assert sum(r > 0 for r in expected) > 5


def test_classes_of_different_size():
    g = torch.Generator().manual_seed(0)
    labels = torch.tensor([2, 0, 1, 1, 0, 1])
    clusters = Clusters(torch.randn(6, 3, generator=g).double(), labels, torch.full((6,), 0.2).double())
    z = clusters.centroids + 0.3 * torch.randn(6, 3, generator=g).double()
    sizes = torch.bincount(labels)[labels].tolist()
    for bound in BOUNDS:
        assert certified_radius(z, clusters, bound=bound).tolist() == pytest.approx(by_loops(z, clusters, bound=bound))
        parts = clusters.centroids.tolist(), labels.tolist()
        predicted = cluster_logits(z, clusters).argmax(dim=1).tolist()
        correction = [0.2 * math.log(size) for size in sizes]
        expected = [
            reference.certified_radius(p, *parts, bound=bound, predicted=c, correction=correction)
            for p, c in zip(z.tolist(), predicted, strict=True)
        ]
        assert certified_radius(z, clusters, bound=bound, rule="soft").tolist() == pytest.approx(expected, abs=1e-7)


@given(SEEDS, st.integers(2, 4), st.integers(1, 4), st.integers(1, 5))
@settings(max_examples=40, deadline=None)
def test_the_ladder_rises_to_the_truth(seed, classes, per_class, dim):
    z, clusters = draw(seed, classes, per_class, dim, points=5)
    table = oracle.ladder(z, clusters)
    for lower, upper in zip((*BOUNDS,), (*BOUNDS[1:], "exact"), strict=True):
        assert (table[lower] <= table[upper] * (1 + 1e-9) + 1e-12).all()
    if per_class == 1:
        assert table["nearest"].to_numpy() == pytest.approx(table["exact"].to_numpy(), rel=1e-8, abs=1e-10)


@pytest.mark.parametrize("bound", BOUNDS)
@given(SEEDS, st.floats(0.01, 100))
@settings(max_examples=25, deadline=None)
def test_order_rigid_motion_and_scale(bound, seed, scale):
    z, clusters = draw(seed)
    g = torch.Generator().manual_seed(seed)
    order = torch.randperm(6, generator=g)
    rotation = torch.linalg.qr(torch.randn(3, 3, generator=g, dtype=torch.float64))[0]
    shift = torch.randn(3, generator=g, dtype=torch.float64)

    def move(points):
        return scale * (points @ rotation.T + shift)

    moved = Clusters(move(clusters.centroids)[order], clusters.labels[order], clusters.variance[order] * scale**2)
    for rule in ("nearest", "soft"):
        before = certified_radius(z, clusters, bound=bound, rule=rule)
        after = certified_radius(move(z), moved, bound=bound, rule=rule)
        torch.testing.assert_close(after, scale * before, rtol=1e-7, atol=1e-9 * scale)


@pytest.mark.parametrize(
    ("rule", "neighbours"), [("nearest", None), ("soft", None), ("soft", 2), ("soft", 3), ("soft", 4)]
)
@given(SEEDS, st.integers(1, 3), st.floats(0.05, 1.0))
@settings(max_examples=12, deadline=None)
def test_no_class_changes_inside_the_radius(rule, neighbours, seed, per_class, variance):
    """Steps in all directions of the plane and towards every centroid, to just inside the radius."""
    z, clusters = draw(seed, classes=3, per_class=per_class, dim=2, points=6, variance=variance, spread=0.3)
    radius = certified_radius(z, clusters, rule=rule, neighbours=neighbours)
    angles = torch.arange(180, dtype=torch.float64) * (2 * math.pi / 180)
    around = torch.stack([angles.cos(), angles.sin()], dim=1)
    logits = logits_of(lambda x: x, clusters, rule=rule, neighbours=neighbours)
    for point, r in zip(z, radius, strict=True):
        aimed = (clusters.centroids[:, None] - clusters.centroids).flatten(0, 1)
        aimed = aimed[aimed.norm(dim=1) > 0]
        rays = torch.cat([around, aimed / aimed.norm(dim=1, keepdim=True)])
        own = logits(point[None]).argmax()
        for share in (0.5, 1 - 1e-12):
            assert (logits(point + share * r * rays).argmax(dim=1) == own).all()


def test_a_naive_radius_would_be_caught_by_that_test():
    """The nearest rule's radius on the soft rule (CE4), and on few voters: both flip inside."""
    example = hard_radius_soft_rule_example()
    wrong = float(certified_radius(example.embeddings, example.clusters, rule="nearest"))
    moved = example.embeddings - 0.9 * wrong
    assert cluster_logits(example.embeddings, example.clusters).argmax() == 0
    assert cluster_logits(moved, example.clusters).argmax() == 1
    assert cluster_logits(moved, example.clusters, neighbours=3).argmax() == 1


def test_the_radius_is_reached():
    z, clusters = draw(3, per_class=1, points=20)
    radius = certified_radius(z, clusters, bound="nearest")
    _, target = exact_nearest_rule_distance(z, clusters)
    assert (radius > 0).all()
    beyond = z + (target - z) * (1 + 1e-7)
    changed = nearest_logits(beyond, clusters).argmax(dim=1) != nearest_logits(z, clusters).argmax(dim=1)
    assert changed.all()
    assert ((target - z).norm(dim=1) / radius).max() < 1 + 1e-9


def test_counterexamples():
    ce1 = only_second_nearest_example()
    assert float(certified_radius(ce1.embeddings, ce1.clusters, bound="nearest")) == pytest.approx(0.3)
    ce2 = loose_nearest_example(2.0)
    for bound, expected in zip(BOUNDS, (1.01, 1.01, 2.01), strict=True):
        assert float(certified_radius(ce2.embeddings, ce2.clusters, bound=bound)) == pytest.approx(expected)
    ce4 = hard_radius_soft_rule_example()
    assert float(certified_radius(ce4.embeddings, ce4.clusters, bound="nearest")) == pytest.approx(0.45)
    expected = 0.45 - math.log(2) / 2.1
    assert float(certified_radius(ce4.embeddings, ce4.clusters, rule="soft")) == pytest.approx(expected)


@pytest.mark.parametrize("offset", [0.0, 30.0, 1000.0])
@pytest.mark.parametrize("dim", [1, 2, 64])
def test_single_precision_never_exceeds_the_truth(dim, offset):
    """On a line through two centroids the truth is exact, and rounding would be caught as often as not."""
    worst, best = 0.0, math.inf
    for seed in range(20):
        g = torch.Generator().manual_seed(seed)
        centroids = (torch.randn(4, dim, generator=g) + offset).float()
        clusters = Clusters(centroids, torch.tensor([0, 0, 1, 2]), torch.full((4,), 0.1))
        z = (centroids[torch.randint(4, (20,), generator=g)] + 0.3 * torch.randn(20, dim, generator=g)).float()
        doubled = clusters.to(torch.float64)
        truth = exact_nearest_rule_distance(z.double(), doubled)[0]
        radius = certified_radius(z, clusters).double()
        soft = certified_radius(z, clusters, rule="soft").double()
        # the float64 slack is below 1e-12 of the truth, far below a float32 rounding
        soft_truth = certified_radius(z.double(), doubled, rule="soft")
        assert (radius <= truth * (1 + 1e-12)).all()
        assert (soft <= soft_truth * (1 + 1e-11) + 1e-12).all()
        positive = truth > 0.05
        worst = max(worst, float((radius / truth)[positive].max()))
        best = min(best, float((radius / certified_radius(z.double(), doubled))[positive].min()))
    assert worst < 1
    assert best > 0.99


def test_without_the_rounding_slack_single_precision_is_unsound(monkeypatch):
    """So the test above can fail."""
    for module in (hard, ladder, linear):
        monkeypatch.setattr(module, "relative_rounding", lambda embeddings: 0.0)
    with pytest.raises(AssertionError):
        test_single_precision_never_exceeds_the_truth(64, 30.0)


@pytest.mark.parametrize("bound", BOUNDS)
def test_squares_that_underflow_certify_nothing_wrong(bound):
    """d^2 near the smallest number that float32 has: its rounding is a large part of it."""
    for scale in (1e-23, 1e-22, 3e-22, 1e-20, 1e-17, 1e-14, 1e-10):
        clusters = Clusters(torch.tensor([[0.0], [scale]]), torch.tensor([0, 1]), torch.ones(2))
        z = torch.linspace(0.01, 0.49, 49)[:, None] * scale
        truth = float(clusters.centroids[1]) / 2 - z.double().squeeze(1)
        radius = certified_radius(z, clusters, bound=bound).double()
        assert (radius <= truth).all()
    assert (radius[:40] > 0.9 * truth[:40]).all()


def test_coincident_centroids():
    ones = torch.ones(3, dtype=torch.float64)
    on_a_rival = Clusters(torch.tensor([[0.0], [0.0], [4.0]], dtype=torch.float64), torch.tensor([0, 1, 1]), ones)
    z = torch.tensor([[-1.0]], dtype=torch.float64)
    for bound in ("nearest", "pairwise"):
        assert float(certified_radius(z, on_a_rival, bound=bound)) == 0
    # the other own centroid still holds off the rival that the first coincides with
    held = Clusters(torch.tensor([[0.0], [-2.0], [0.0]], dtype=torch.float64), torch.tensor([0, 0, 1]), ones)
    assert float(certified_radius(torch.tensor([[-1.5]]).double(), held)) == pytest.approx(0.5)
    twins = Clusters(torch.tensor([[0.0], [0.0], [4.0]], dtype=torch.float64), torch.tensor([0, 0, 1]), ones)
    assert float(certified_radius(torch.tensor([[1.0]]).double(), twins)) == pytest.approx(1.0)


@pytest.mark.parametrize("bound", BOUNDS)
def test_an_embedding_on_top_of_its_centroid_and_of_a_rival(bound):
    """0 / 0 must become 0, not NaN."""
    clusters = Clusters(torch.tensor([[0.0], [0.0], [4.0]]), torch.tensor([0, 1, 0]), torch.ones(3))
    assert certified_radius(torch.tensor([[0.0]]), clusters, bound=bound).tolist() == [0]


def test_an_embedding_on_the_border_has_radius_zero():
    clusters = Clusters(torch.tensor([[0.0], [2.0]]), torch.tensor([0, 1]), torch.ones(2))
    for bound in BOUNDS:
        assert float(certified_radius(torch.tensor([[1.0]]), clusters, bound=bound)) == 0


def test_a_huge_lipschitz_constant_leaves_nothing_and_a_small_one_stretches():
    z, clusters = draw(0)
    base = certified_radius(z, clusters)
    torch.testing.assert_close(certified_radius(z, clusters, lipschitz=1e30), base / 1e30)
    torch.testing.assert_close(certified_radius(z, clusters, lipschitz=0.5), base * 2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bound": "second"}, r"bound: expected one of .*'pairwise'.*got 'second'"),
        ({"rule": "hard"}, r"rule: expected one of .*got 'hard'"),
        ({"neighbours": 0}, r"neighbours: expected a positive number or None, got 0"),
        ({"lipschitz": 0.0}, r"lipschitz: expected a positive finite number, got 0"),
        ({"lipschitz": -1.0}, r"lipschitz: expected a positive finite number, got -1"),
        ({"lipschitz": math.inf}, r"lipschitz: expected a positive finite number, got inf"),
        ({"lipschitz": math.nan}, r"lipschitz: expected a positive finite number, got nan"),
    ],
)
def test_bad_options_are_named(options, message, as_installed):
    z, clusters = draw(0)
    with pytest.raises(ValueError, match=message):
        certified_radius(z, clusters, **options)


def test_bad_embeddings_and_clusters_are_named():
    z, clusters = draw(0)
    z[2, 1] = math.nan
    with pytest.raises(ValueError, match="embeddings: expected finite values"):
        certified_radius(z, clusters)
    z, clusters = draw(0)
    one_class = Clusters(clusters.centroids, torch.zeros(6).long(), clusters.variance)
    with pytest.raises(ValueError, match="at least two classes"):
        certified_radius(z, one_class)
    unequal = Clusters(clusters.centroids, clusters.labels, torch.linspace(1, 2, 6, dtype=torch.float64))
    for options in ({"rule": "soft"}, {"rule": "soft", "neighbours": 3}):
        with pytest.raises(ValueError, match="one shared variance, got values from 1 to 2"):
            certified_radius(z, unequal, **options)
    # the nearest rule never looks at the variance
    assert torch.equal(certified_radius(z, unequal), certified_radius(z, clusters))


def model_and_images(rule="nearest", neighbours=None):
    _, clusters = draw(5, dim=4, points=6)
    linear = nn.Linear(4, 4, bias=False).double()
    linear.weight.data = 2 * torch.linalg.qr(torch.randn(4, 4, generator=torch.Generator().manual_seed(0)).double())[0]
    encoder = nn.Sequential(nn.Flatten(), linear)
    images = torch.rand(6, 1, 2, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return ClusterClassifier(encoder, clusters, rule=rule, neighbours=neighbours), images


@pytest.mark.parametrize(("rule", "neighbours"), [("nearest", None), ("soft", None), ("soft", 3)])
def test_certify_takes_rule_neighbours_and_constant_from_the_model(rule, neighbours):
    model, images = model_and_images(rule, neighbours)
    expected = certified_radius(
        model.embed(images), model.clusters, lipschitz=2.0, rule=rule, neighbours=neighbours, bound="exact"
    )
    exact, best = certify(model, images, bound="exact"), certify(model, images)
    torch.testing.assert_close(exact.radius, expected, rtol=1e-8, atol=0)
    assert (best.radius >= expected * (1 - 1e-8)).all()
    assert torch.equal(best.prediction, model(images).argmax(dim=1))
    assert exact.lipschitz == pytest.approx(2.0)
    assert 0 < exact.rounding < 1e-10
    voting = rule == "soft" and neighbours is None
    assert (exact.bound, best.bound) == ("exact", "max(exact, soft-dual)" if voting else "exact")
    assert not best.radius.requires_grad
    given_constant = certify(model, images, lipschitz=4.0, bound="nearest").radius
    halved = certified_radius(
        model.embed(images), model.clusters, lipschitz=4.0, rule=rule, neighbours=neighbours, bound="nearest"
    )
    torch.testing.assert_close(given_constant, halved)


def test_certify_refuses_what_has_no_certificate(as_installed):
    model, images = model_and_images()
    with pytest.raises(ValueError, match=r"images: expected pixels in \[0, 1\], got .* to 1.5"):
        certify(
            model,
            images.clone().index_put_(
                (torch.tensor(0), torch.tensor(0), torch.tensor(0), torch.tensor(0)), torch.tensor(1.5).double()
            ),
        )
    with pytest.raises(ValueError, match="images: expected pixels"):
        certify(model, images * math.nan)
    with pytest.raises(TypeError, match="expected a ClusterClassifier, got LinearClassifier"):
        certify(LinearClassifier(nn.Flatten(), 4, 3), images)  # pyright: ignore[reportArgumentType]
    strange = ClusterClassifier(nn.Sequential(nn.Flatten(), nn.Softmax(dim=1)), model.clusters, rule="nearest")
    with pytest.raises(TypeError, match="no Lipschitz bound is known for the layer Softmax"):
        certify(strange, images)


def test_prototypes_on_raw_pixels_are_certified_as_they_are():
    """A reshape is an isometry, and moves no number: L is 1 and nothing is lost to rounding."""
    g = torch.Generator().manual_seed(0)
    images = torch.rand(12, 1, 2, 2, generator=g, dtype=torch.float64)
    labels = torch.tensor([0, 0, 1, 2])
    clusters = Clusters(torch.rand(4, 4, generator=g, dtype=torch.float64), labels, torch.ones(4).double())
    model = ClusterClassifier(nn.Flatten(), clusters, rule="nearest")
    truth, nearest = exact_nearest_rule_distance(images.flatten(1), clusters)
    for bound in (*BOUNDS, "exact", None):
        radius = certify(model, images, bound=bound).radius
        expected = certified_radius(images.flatten(1), clusters, bound=bound or "exact")
        torch.testing.assert_close(radius, expected, rtol=1e-8, atol=0)
        assert (radius <= truth).all()
    torch.testing.assert_close(radius, truth, rtol=1e-7, atol=1e-9)
    # straight to the border: on this side of it, and on the other
    own = model(images).argmax(dim=1)
    for share, changed in ((1 - 1e-7, False), (1 + 1e-7, True)):
        moved = images.flatten(1) + share * (nearest - images.flatten(1)) * (radius / truth)[:, None]
        assert ((nearest_logits(moved, clusters).argmax(dim=1) != own) == changed).all()


# the linear head


def linear_head(seed, classes=4, dim=5, points=8, dtype=torch.float64, offset=0.0):
    g = torch.Generator().manual_seed(seed)
    linear = nn.Linear(dim, classes, dtype=dtype)
    with torch.no_grad():
        linear.weight.copy_(torch.randn(classes, dim, generator=g))
        linear.bias.copy_(torch.randn(classes, generator=g))
    return linear, (offset + torch.randn(points, dim, generator=g)).to(dtype)


def closed_form(linear, z, lipschitz=1.0):
    """min_j (g_c - g_j) / (L ||w_c - w_j||) by loops, of the head's own numbers in double precision."""
    rows, bias = linear.weight.detach().double().tolist(), linear.bias.detach().double().tolist()
    radii, classes = [], []
    for point in z.double().tolist():
        g = [math.fsum(a * b for a, b in zip(row, point, strict=True)) + b0 for row, b0 in zip(rows, bias, strict=True)]
        c = max(range(len(g)), key=g.__getitem__)
        lengths = [math.sqrt(reference.squared_distance(rows[c], row)) for row in rows]
        radii.append(min((g[c] - g[j]) / (lipschitz * lengths[j]) for j in range(len(g)) if j != c))
        classes.append(c)
    return torch.tensor(radii, dtype=torch.float64), torch.tensor(classes)


@given(SEEDS, st.integers(2, 6), st.integers(1, 8), st.floats(0.05, 20))
@settings(max_examples=40, deadline=None)
def test_the_margin_radius_is_the_closed_form(seed, classes, dim, lipschitz):
    linear, z = linear_head(seed, classes, dim)
    expected, predicted = closed_form(linear, z, lipschitz)
    found = margin_radius(z, linear, lipschitz=lipschitz)
    assert not found.requires_grad
    assert (found <= expected).all()
    shortest = torch.pdist(linear.weight.detach()).min().item()
    assert found.tolist() == pytest.approx(expected.tolist(), rel=1e-10, abs=1e-12 / shortest / lipschitz)
    # of the class that the head predicts, the distance of the linear classifier
    weight, bias = linear.weight.detach(), linear.bias.detach()
    torch.testing.assert_close(linear_radius(weight, bias, z, predicted), expected * lipschitz, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("offset", [0.0, 30.0, 1000.0])
@pytest.mark.parametrize("dim", [1, 2, 64])
def test_the_margin_radius_in_single_precision_never_exceeds_the_truth(dim, offset):
    worst, best = 0.0, 0.0
    for seed in range(20):
        linear, z = linear_head(seed, 4, dim, points=30, dtype=torch.float32, offset=offset)
        if torch.pdist(linear.weight.detach()).min() < 0.1:
            continue
        truth, _ = closed_form(linear, z)
        radius = margin_radius(z, linear).double()
        assert (radius <= truth).all()
        positive = truth > 0.5
        worst = max(worst, float((radius / truth)[positive].max()))
        best = max(best, float((radius / truth)[positive].min()))
    assert worst < 1
    assert best > 0.99


def test_without_its_slack_the_margin_radius_is_unsound(monkeypatch):
    """So the test above can fail."""
    for module in (hard, ladder, linear):
        monkeypatch.setattr(module, "relative_rounding", lambda embeddings: 0.0)
    with pytest.raises(AssertionError):
        test_the_margin_radius_in_single_precision_never_exceeds_the_truth(64, 30.0)


@given(SEEDS, st.integers(2, 5), st.integers(2, 6))
@settings(max_examples=40, deadline=None)
def test_straight_at_every_border_the_class_changes_just_beyond_the_radius(seed, classes, dim):
    linear, z = linear_head(seed, classes, dim)
    radius, own = margin_radius(z, linear), linear(z).argmax(dim=1)
    towards = linear.weight.detach() - linear.weight.detach()[own][:, None]
    lengths = towards.norm(dim=2, keepdim=True)
    steps = towards / lengths.masked_fill(lengths == 0, 1)
    for share, changes in ((1.0, False), (1 + 1e-6, True)):
        moved = z[:, None] + share * radius[:, None, None] * steps
        changed = (linear(moved).argmax(dim=2) != own[:, None]).any(dim=1)
        # a radius of next to nothing is lost in rounding
        assert (changed == changes)[radius > 1e-4].all()


def test_an_orthonormal_head_asks_for_the_margin_over_root_two():
    torch.manual_seed(0)
    model = LinearClassifier(nn.Flatten(), 12, 5, orthonormal=True).double()
    z = torch.randn(20, 12, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    top = model.linear(z).detach().topk(2, dim=1).values
    expected = (top[:, 0] - top[:, 1]) / 2**0.5
    torch.testing.assert_close(margin_radius(z, model.linear), expected, rtol=1e-5, atol=1e-6)


def test_the_margin_radius_pays_for_rounding_and_constant():
    linear, z = linear_head(3)
    whole = margin_radius(z, linear)
    for error in (0.0, 1e-3, 0.05, 100.0):
        found = margin_radius(z, linear, embedding_error=error, lipschitz=2.0)
        torch.testing.assert_close(found, (whole - 2 * error).clamp_min(0) / 2)
    assert (margin_radius(z, linear, embedding_error=100.0) == 0).all()
    # a tie: nothing is certified, and nothing negative
    with torch.no_grad():
        linear.bias.zero_()
    assert margin_radius(torch.zeros_like(z), linear).tolist() == [0.0] * len(z)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lipschitz": 0.0}, "lipschitz: expected a positive finite number, got 0"),
        ({"lipschitz": math.nan}, "lipschitz: expected a positive finite number, got nan"),
        ({"embedding_error": -1.0}, "embedding_error: expected 0 or a positive finite number, got -1"),
        ({"embedding_error": math.inf}, "embedding_error: expected 0 or a positive finite number, got inf"),
    ],
)
def test_what_the_margin_radius_refuses(options, message, as_installed):
    linear, z = linear_head(0)
    with pytest.raises(ValueError, match=message):
        margin_radius(z, linear, **options)
    with pytest.raises(ValueError, match="head: expected at least two classes, got 1"):
        margin_radius(z, nn.Linear(5, 1).double())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_certified_in_single_and_rounded_down(dtype):
    g = torch.Generator().manual_seed(0)
    clusters = Clusters(torch.randn(6, 5, generator=g).to(dtype), torch.arange(6) % 3, torch.ones(6).to(dtype))
    z = torch.randn(200, 5, generator=g).to(dtype)
    radius = certified_radius(z, clusters, bound="exact")
    truth = certified_radius(z.double(), clusters.to(torch.float64), bound="exact")
    assert radius.dtype == dtype
    assert (radius.double() <= truth).all()
    # logits of so few digits may tie: then they name another class than the one that is nearest
    named = nearest_logits(z, clusters).argmax(dim=1)
    same = named == nearest_logits(z.double(), clusters.to(torch.float64)).argmax(dim=1)
    assert (radius.double() >= 0.98 * truth - 1e-5)[same].all()
    assert (radius == 0)[~same].all()
    assert same.float().mean() > 0.95


def test_a_table_of_embeddings_and_clusters_is_never_whole(monkeypatch):
    """Every product that a certificate makes is of one chunk."""
    z, clusters = torch.randn(500, 8), Clusters(torch.randn(40, 8), torch.arange(40) % 4, torch.ones(40))
    sizes, product = [], torch.addmm
    expected = {bound: certified_radius(z, clusters, bound=bound) for bound in BOUNDS}

    def noted(*arguments, **options):
        sizes.append(product(*arguments, **options).numel())
        return product(*arguments, **options)

    monkeypatch.setattr(chunks, "TABLE_BYTES", 4 * 40 * 50)
    monkeypatch.setattr(torch, "addmm", noted)
    for bound in BOUNDS:
        torch.testing.assert_close(certified_radius(z, clusters, bound=bound), expected[bound], rtol=1e-5, atol=1e-6)
    assert len(sizes) >= 10 * len(BOUNDS)
    assert max(sizes) <= 50 * 40


@pytest.mark.parametrize("bound", [*BOUNDS, "exact"])
def test_neither_autocast_nor_a_coarser_product_touches_a_certificate(bound, monkeypatch):
    g = torch.Generator().manual_seed(0)
    z, clusters = (
        torch.randn(200, 32, generator=g),
        Clusters(torch.randn(12, 32, generator=g), torch.arange(12) % 4, torch.ones(12)),
    )
    expected, seen, product = certified_radius(z, clusters, bound=bound), set(), torch.addmm

    def noted(*arguments, **options):
        seen.add(torch.get_float32_matmul_precision())
        return product(*arguments, **options)

    monkeypatch.setattr(torch, "addmm", noted)
    torch.set_float32_matmul_precision("medium")
    try:
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(certified_radius(z, clusters, bound=bound), expected)
        assert (seen, torch.get_float32_matmul_precision()) == ({"highest"}, "medium")
    finally:
        torch.set_float32_matmul_precision("highest")


def test_a_model_is_certified_alike_inside_autocast():
    torch.manual_seed(0)
    encoder = nn.Sequential(nn.Flatten(), nn.Linear(16, 8))
    clusters = Clusters(torch.randn(6, 8), torch.arange(6) % 3, torch.ones(6))
    images = torch.rand(20, 1, 4, 4)
    for model in (ClusterClassifier(encoder, clusters), ClusterClassifier(encoder, clusters, learnable=True)):
        expected = certify(model.eval(), images, lipschitz=1.0).radius
        assert (expected > 0).any()
        assert not expected.requires_grad
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(certify(model, images, lipschitz=1.0).radius, expected)


def test_a_lipschitz_network_is_certified_alike_inside_autocast():
    """Its own bound and its rounding are computed inside `certify`, and no more coarsely there."""
    torch.manual_seed(0)
    encoder = build_encoder("lip-cnn", (1, 8, 8), width=16).eval()
    clusters = Clusters(torch.randn(6, encoder.embedding_dim), torch.arange(6) % 3, torch.ones(6))
    model, images = ClusterClassifier(encoder, clusters, rule="nearest"), torch.rand(4, 1, 8, 8)
    expected = certify(model, images).radius
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(certify(model, images).radius, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_margin_radius_is_the_same_inside_autocast(dtype):
    torch.manual_seed(0)
    head, z = nn.Linear(32, 5).to(dtype), torch.randn(100, 32).to(dtype)
    expected = margin_radius(z, head)
    assert expected.dtype == dtype
    truth = margin_radius(z.double(), copy.deepcopy(head).double())
    assert (expected.double() <= truth).all()
    assert (expected > 0).sum() > 90
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(margin_radius(z, head), expected)


@pytest.mark.parametrize("bound", [*BOUNDS, "exact", "soft-global", "soft-dual"])
def test_half_precision_is_certified_alike_inside_autocast(bound):
    g = torch.Generator().manual_seed(0)
    clusters = Clusters(torch.randn(6, 5, generator=g).half(), torch.arange(6) % 3, torch.ones(6).half())
    z = torch.randn(50, 5, generator=g).half()
    expected = certified_radius(z, clusters, bound=bound)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(certified_radius(z, clusters, bound=bound), expected)


@pytest.mark.parametrize("bound", [*BOUNDS, "exact", "soft-global", "soft-dual"])
@pytest.mark.parametrize(
    ("of_embeddings", "of_centroids", "answered"),
    [
        (torch.bfloat16, torch.float64, torch.float64),
        (torch.float64, torch.float32, torch.float64),
        (torch.float32, torch.float64, torch.float64),
        (torch.bfloat16, torch.float16, torch.float32),
    ],
)
def test_two_precisions_are_certified_in_the_wider(bound, of_embeddings, of_centroids, answered):
    """Centroids that only the wider tells apart, and one radius that the narrower would overstate."""
    near = {torch.float64: 9984.0006, torch.float32: 9985.0, torch.float16: 9992.0}[of_centroids]
    centroids = torch.tensor([[9984.0], [near], [9728.0]], dtype=torch.float64).to(of_centroids)
    clusters = Clusters(centroids, torch.tensor([0, 1, 2]), torch.ones(3).to(of_centroids))
    z = torch.tensor([[9984.0]]).to(of_embeddings)
    radius = certified_radius(z, clusters, bound=bound)
    assert radius.dtype == answered
    assert 0 < float(radius) <= float(centroids[1] - centroids[0]) / 2


def test_embeddings_of_another_dimension_are_refused():
    clusters = Clusters(torch.randn(4, 5), torch.arange(4) % 2, torch.ones(4))
    with pytest.raises(ValueError, match="embeddings: expected dimension 5 as the centroids', got 3"):
        certified_radius(torch.randn(7, 3), clusters)


@pytest.mark.parametrize("bound", ["soft-global", "soft-local", "soft-lse", "soft-dual"])
def test_where_all_centroids_of_two_classes_coincide_there_is_nothing_to_certify(bound):
    for places in ([0.0, 0.0, 3.0], [0.0, 0.0, 0.0]):
        centroids = torch.tensor(places)[:, None].expand(3, 2).contiguous()
        clusters = Clusters(centroids, torch.arange(3), torch.ones(3))
        assert certified_radius(torch.zeros(1, 2), clusters, bound=bound, rule="soft").tolist() == [0.0]


@pytest.mark.parametrize("bound", ["soft-global", "soft-local", "soft-lse", "soft-dual"])
def test_soft_radii_are_rounded_down_among_the_smallest_numbers(bound):
    g = torch.Generator().manual_seed(0)
    centroids = torch.randn(6, 3, generator=g)
    clusters = Clusters(centroids * 1e-22, torch.arange(6) % 3, torch.full((6,), 1e-44))
    z = 1e-22 * (centroids[torch.arange(40) % 6] + 0.1 * torch.randn(40, 3, generator=g))
    options = {"bound": bound, "rule": "soft", "lipschitz": 1e20}
    truth = certified_radius(z.double(), clusters.to(torch.float64), **options)
    assert (certified_radius(z, clusters, **options).double() <= truth).all()


def test_soft_bounds_multiply_the_centroids_with_each_other_once(monkeypatch):
    clusters = Clusters(torch.randn(40, 8), torch.arange(40) % 4, torch.ones(40))
    z, made, of = torch.randn(300, 8), [], _Between.of
    monkeypatch.setattr(_Between, "of", lambda given: made.append(given) or of(given))
    expected = certified_radius(z, clusters, bound="soft-lse", rule="soft")
    monkeypatch.setattr(chunks, "TABLE_BYTES", 8 * 40 * 10 * 20)
    torch.testing.assert_close(certified_radius(z, clusters, bound="soft-lse", rule="soft"), expected)
    assert len(made) == 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("lipschitz", [1.5e7, 2e4, 1.0, 1e-3])
def test_half_precision_is_rounded_down_among_the_smallest_and_the_largest(dtype, lipschitz):
    g = torch.Generator().manual_seed(1)
    clusters = Clusters((100 * torch.randn(8, 32, generator=g)).to(dtype), torch.arange(8) % 4, torch.ones(8).to(dtype))
    z = (100 * torch.randn(100, 32, generator=g)).to(dtype)
    truth = certified_radius(z.double(), clusters.to(torch.float64), bound="pairwise", lipschitz=lipschitz)
    radius = certified_radius(z, clusters, bound="pairwise", lipschitz=lipschitz)
    assert radius.isfinite().all()
    assert (radius.double() <= truth).all()


def test_centroids_that_nearly_coincide_far_from_each_others_middle():
    """The rival that decides is near the own centroid in a large spread: the length between them keeps its digits."""
    centroids = torch.tensor([[1, 0], [1 + 1e-8, 0], [0, 1], [0, -1]], dtype=torch.float64)
    clusters = Clusters(centroids, torch.tensor([0, 1, 0, 1]), torch.ones(4).double())
    z = torch.tensor([[0.5, 0.0]]).double()
    assert float(certified_radius(z, clusters)) == pytest.approx(math.sqrt(0.125), rel=1e-6)


@pytest.mark.parametrize("pixels", [1, 9, 64])
def test_in_the_norm_of_the_largest_pixel_the_radius_over_the_root_of_their_number_is_tight(pixels):
    """The identity and two centroids one vector of ones apart: no Lipschitz constant of 1 allows a larger promise."""
    generator = torch.Generator().manual_seed(pixels)
    first = torch.randn(pixels, generator=generator, dtype=torch.float64)
    clusters = Clusters(torch.stack([first, first + 2]), torch.tensor([0, 1]), torch.ones(2, dtype=torch.float64))
    z = first + 0.3 * torch.randn(50, pixels, generator=generator, dtype=torch.float64)
    z = z[nearest_logits(z, clusters).argmax(dim=1) == 0]
    promised = certified_radius(z, clusters, bound="nearest") / pixels**0.5
    for factor, moved in ((1 - 1e-9, 0), (1 + 1e-9, 1)):
        assert (nearest_logits(z + factor * promised[:, None], clusters).argmax(dim=1) == moved).all()
