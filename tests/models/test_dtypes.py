"""Embeddings and clusters of any two floating dtypes: promoted, or refused where clusters are made."""

import itertools

import pytest
import torch
from torch import nn

from clustr_core.attacks.gradient import pgd
from clustr_core.attacks.minimum_norm import ddn, fmn
from clustr_core.certificates.ladder import certified_radius, certify
from clustr_core.models.classifiers import ClusterClassifier, cluster_logits, nearest_logits
from clustr_core.models.clusters import Clusters, fit_clusters
from clustr_core.numerics.distances import squared_distances
from clustr_core.training.losses import certificate_loss, full_magnet_loss

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
PAIRS = list(itertools.product(DTYPES, DTYPES))
RULES = {"soft": {}, "few": {"neighbours": 2}, "nearest": {"rule": "nearest"}}
HARD, SOFT = ("triangle", "nearest", "pairwise", "exact"), ("soft-global", "soft-local", "soft-lse", "soft-dual")


def draw(of_embeddings, of_clusters, count=60):
    """Points of the unit square, and clusters there."""
    g = torch.Generator().manual_seed(5)
    clusters = Clusters(torch.rand(6, 2, generator=g), torch.arange(6) % 3, torch.full((6,), 0.25))
    return torch.rand(count, 2, generator=g).to(of_embeddings), clusters.to(of_clusters)


def eps_of(*dtypes):
    return max(torch.finfo(dtype).eps for dtype in dtypes)


@pytest.mark.parametrize(("one", "other"), PAIRS)
def test_distances_are_at_least_in_float32(one, other):
    z, clusters = draw(one, other)
    found = squared_distances(z, clusters.centroids)
    assert found.dtype == torch.promote_types(torch.promote_types(one, other), torch.float32)
    exact = squared_distances(z.double(), clusters.centroids.double())
    torch.testing.assert_close(found.double(), exact, rtol=4 * torch.finfo(found.dtype).eps, atol=1e-12)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(("one", "other"), PAIRS)
def test_logits_are_promoted(one, other, rule):
    z, clusters = draw(one, other)
    head = nearest_logits if rule == "nearest" else lambda z, c: cluster_logits(z, c, **RULES[rule])
    found, exact = head(z, clusters), head(z.double(), clusters.to(torch.float64))
    assert found.dtype == torch.promote_types(one, other)
    torch.testing.assert_close(found.double(), exact, rtol=0, atol=16 * torch.finfo(found.dtype).eps)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(("one", "other"), PAIRS)
def test_a_model_predicts_the_class_that_its_certificate_speaks_of(one, other, rule):
    """Rounded to half precision, logits would tie: the class would change inside the ball."""
    z, clusters = draw(one, other, count=600)
    model = ClusterClassifier(nn.Flatten(), clusters, **RULES[rule]).eval()
    images = z[:, None, None]
    logits = model(images)
    assert logits.dtype == torch.promote_types(torch.promote_types(one, other), torch.float32)
    exact = ClusterClassifier(nn.Flatten(), clusters.to(torch.float64), **RULES[rule]).eval()
    radius = certify(model, images, lipschitz=1.0).radius
    assert radius.dtype == torch.promote_types(one, other)
    sure = radius > 0
    assert sure.sum() > 200
    assert torch.equal(logits.argmax(dim=1)[sure], exact(images.double()).argmax(dim=1)[sure])
    # nothing within the ball is of another class, in exact arithmetic
    for angle in torch.arange(8) * torch.pi / 4:
        step = radius.double()[:, None] * torch.stack([angle.cos(), angle.sin()]).double()
        moved = (z.double() + 0.999 * step)[:, None, None]
        assert torch.equal(exact(moved).argmax(dim=1)[sure], logits.argmax(dim=1)[sure])


@pytest.mark.parametrize("bound", [*HARD, *SOFT])
@pytest.mark.parametrize(("one", "other"), PAIRS)
def test_radii_are_those_of_float64_rounded_down(one, other, bound):
    z, clusters = draw(one, other)
    rule = "soft" if bound in SOFT else "nearest"
    found = certified_radius(z, clusters, bound=bound, rule=rule)
    exact = certified_radius(z.double(), clusters.to(torch.float64), bound=bound, rule=rule)
    assert found.dtype == torch.promote_types(one, other)
    assert (found.double() <= exact * (1 + 1e-9) + 1e-9).all()
    torch.testing.assert_close(found.double(), exact, rtol=2 * eps_of(found.dtype), atol=1e-4)


@pytest.mark.parametrize(("one", "other"), PAIRS)
def test_losses_against_clusters_are_promoted(one, other):
    z, clusters = draw(one, other)
    labels = torch.arange(len(z)) % 3
    for loss in (
        lambda z, c: full_magnet_loss(z, labels, c, gap=1.0).per_example,
        lambda z, c: certificate_loss(z, labels, c, margin=0.2, temperature=0.1),
    ):
        found, exact = loss(z, clusters), loss(z.double(), clusters.to(torch.float64))
        assert found.dtype == torch.promote_types(torch.promote_types(one, other), torch.float32)
        torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(("of_encoder", "of_clusters"), [*itertools.permutations(DTYPES[:3], 2)])
def test_attacks_on_models_of_two_dtypes(of_encoder, of_clusters, rule):
    _, clusters = draw(of_encoder, of_clusters)
    encoder = nn.Sequential(nn.Flatten(), nn.Linear(2, 2)).to(of_encoder)
    model = ClusterClassifier(encoder, clusters, **RULES[rule]).eval()
    images = torch.rand(6, 1, 1, 2, generator=torch.Generator().manual_seed(0)).to(of_encoder)
    labels = model(images).argmax(dim=1)
    assert pgd(model, images, labels, eps=0.1, step_size=0.05, steps=2).adversarial.dtype == of_encoder
    for attack in (fmn, ddn):
        assert attack(model, images, labels, steps=3).adversarial.dtype == of_encoder


@pytest.mark.parametrize("dtype", DTYPES)
def test_k_means_of_any_dtype(dtype):
    g = torch.Generator().manual_seed(2)
    labels = torch.arange(90) % 3
    z = (torch.randn(90, 4, generator=g) + 8 * labels[:, None]).to(dtype)
    clusters, assignments = fit_clusters(z, labels, per_class=2)
    assert clusters.centroids.dtype == clusters.variance.dtype == dtype
    assert torch.equal(clusters.labels[assignments], labels)
    wide, same = fit_clusters(z.double(), labels, per_class=2)
    assert torch.equal(assignments, same)
    torch.testing.assert_close(clusters.centroids.double(), wide.centroids, rtol=eps_of(dtype), atol=eps_of(dtype))
    torch.testing.assert_close(clusters.variance.double(), wide.variance, rtol=4 * eps_of(dtype), atol=0)


def test_a_variance_that_half_precision_cannot_hold_is_named():
    z = torch.tensor([[0.0], [2e3], [0.0], [2e3]]).half()
    with pytest.raises(ValueError, match="variance: expected positive finite values"):
        fit_clusters(z, torch.tensor([0, 0, 1, 1]), per_class=1)


@pytest.mark.parametrize(("one", "other"), [pair for pair in PAIRS if pair[0] != pair[1]])
def test_clusters_of_two_dtypes_are_refused(one, other):
    parts = torch.rand(2, 3).to(one), torch.arange(2), torch.ones(2, dtype=other)
    with pytest.raises(ValueError, match=rf"variance: expected the centroids' dtype {one}, got {other}"):
        Clusters(*parts)
    model = ClusterClassifier(nn.Flatten(), Clusters(*parts[:2], torch.ones(2, dtype=one)))
    model.centroids = model.centroids.to(other)
    with pytest.raises(ValueError, match="variance: expected the centroids' dtype"):
        model(torch.rand(2, 1, 1, 3))


@pytest.mark.parametrize("name", ["labels", "variance"])
def test_clusters_on_two_devices_are_refused(name):
    parts = {"centroids": torch.rand(2, 3), "labels": torch.arange(2), "variance": torch.ones(2)}
    with pytest.raises(ValueError, match=f"{name}: expected the centroids' device cpu, got meta"):
        Clusters(**parts | {name: parts[name].to("meta")})
