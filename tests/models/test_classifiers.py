import copy
import math

import pytest
import reference
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from clustr_core.certificates.ladder import certified_radius, certify
from clustr_core.models.classifiers import ClusterClassifier, LinearClassifier, cluster_logits, nearest_logits
from clustr_core.models.clusters import Clusters
from clustr_core.models.encoders import build_encoder
from clustr_core.numerics import chunks


def draw(seed, classes=3, per_class=2, dim=4, points=6, equal=True):
    g = torch.Generator().manual_seed(seed)
    count = classes * per_class
    labels = torch.arange(classes).repeat(per_class)
    variance = torch.full((count,), 0.7) if equal else 0.5 + torch.rand(count, generator=g)
    clusters = Clusters(torch.randn(count, dim, generator=g).double(), labels, variance.double())
    return torch.randn(points, dim, generator=g).double() * 2, clusters


@given(st.integers(0, 10**6), st.integers(2, 4), st.integers(1, 3), st.booleans())
@settings(max_examples=40, deadline=None)
def test_logits_match_the_loops(seed, classes, per_class, equal):
    z, clusters = draw(seed, classes, per_class, equal=equal)
    parts = clusters.centroids.tolist(), clusters.labels.tolist(), clusters.variance.tolist()
    expected = torch.tensor([reference.cluster_logits(p, *parts) for p in z.tolist()], dtype=torch.float64)
    torch.testing.assert_close(cluster_logits(z, clusters), expected, rtol=1e-12, atol=1e-12)


@given(st.integers(0, 10**6), st.integers(2, 4), st.integers(1, 3), st.integers(1, 9))
@settings(max_examples=60, deadline=None)
def test_few_voters_match_the_loops_and_the_rest_stay_below(seed, classes, per_class, neighbours):
    z, clusters = draw(seed, classes, per_class)
    logits = cluster_logits(z, clusters, neighbours=neighbours)
    parts = clusters.centroids.tolist(), clusters.labels.tolist(), clusters.variance.tolist()
    for point, got in zip(z.tolist(), logits.tolist(), strict=True):
        expected = reference.cluster_logits(point, *parts, neighbours=neighbours)
        voting = [c for c, value in enumerate(expected) if value > -math.inf]
        assert [got[c] for c in voting] == pytest.approx([expected[c] for c in voting], rel=1e-12)
        silent = [got[c] for c in range(classes) if c not in voting]
        assert all(math.isfinite(value) and value < min(got[c] for c in voting) for value in silent)


def test_logits_stay_finite_where_the_scores_underflow():
    z, clusters = draw(0)
    far = (z * 1e6).float()
    logits = cluster_logits(far, clusters.to(torch.float32))
    assert logits.isfinite().all()
    assert (logits.exp() == 0).all()
    for neighbours in (1, 2, 3):
        assert cluster_logits(far, clusters.to(torch.float32), neighbours=neighbours).isfinite().all()


@pytest.mark.parametrize("neighbours", [None, 3])
def test_logits_gradient(neighbours):
    z, clusters = draw(1)
    voting = cluster_logits(z, clusters, neighbours=neighbours).detach()
    if neighbours:
        # a class without a vote follows its own centroid but not the detached floor: compare classes with a vote
        parts = clusters.centroids.tolist(), clusters.labels.tolist(), clusters.variance.tolist()
        rows = [reference.cluster_logits(p, *parts, neighbours=neighbours) for p in z.tolist()]
        mask = torch.tensor(rows).isfinite()
    else:
        mask = torch.ones_like(voting, dtype=torch.bool)
    assert torch.autograd.gradcheck(
        lambda x: cluster_logits(x, clusters, neighbours=neighbours)[mask], (z.requires_grad_(),)
    )


def test_nearest_logits_pick_the_nearest_centroid():
    z, clusters = draw(2, points=200)
    nearest = torch.tensor(
        [
            min(range(6), key=row.__getitem__)
            for row in reference.squared_distances(z.tolist(), clusters.centroids.tolist())
        ]
    )
    assert torch.equal(nearest_logits(z, clusters).argmax(dim=1), clusters.labels[nearest])
    assert torch.equal(cluster_logits(z, clusters, neighbours=1).argmax(dim=1), clusters.labels[nearest])
    assert torch.equal(cluster_logits(z, clusters, neighbours=2).argmax(dim=1), clusters.labels[nearest])


@given(st.integers(0, 10**6))
@settings(max_examples=25, deadline=None)
def test_logits_do_not_depend_on_the_order_of_centroids_or_on_a_rigid_motion(seed):
    z, clusters = draw(seed)
    g = torch.Generator().manual_seed(seed)
    order = torch.randperm(6, generator=g)
    rotation = torch.linalg.qr(torch.randn(4, 4, generator=g, dtype=torch.float64))[0]
    shift = torch.randn(4, generator=g, dtype=torch.float64)
    moved = Clusters((clusters.centroids @ rotation.T + shift)[order], clusters.labels[order], clusters.variance[order])
    for neighbours in (None, 3):
        torch.testing.assert_close(
            cluster_logits(z @ rotation.T + shift, moved, neighbours=neighbours),
            cluster_logits(z, clusters, neighbours=neighbours),
            rtol=1e-9,
            atol=1e-9,
        )


def test_bad_input_is_named(as_installed):
    z, clusters = draw(0)
    with pytest.raises(ValueError, match=r"embeddings: expected dimension 4 as the centroids', got 3"):
        cluster_logits(z[:, :3], clusters)
    with pytest.raises(ValueError, match=r"embeddings: expected dimension 4"):
        nearest_logits(z[:, :3], clusters)
    with pytest.raises(ValueError, match=r"neighbours: expected a positive number or None, got 0"):
        cluster_logits(z, clusters, neighbours=0)
    with pytest.raises(ValueError, match=r'rule: expected "soft" or "nearest", got \'hard\''):
        ClusterClassifier(nn.Flatten(), clusters, rule="hard")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match=r'neighbours: expected None with rule="nearest", got 3'):
        ClusterClassifier(nn.Flatten(), clusters, rule="nearest", neighbours=3)
    with pytest.raises(ValueError, match=r"neighbours: expected a positive number or None, got -1"):
        ClusterClassifier(nn.Flatten(), clusters, neighbours=-1)


def test_classifier_agrees_with_the_functions_and_survives_a_round_trip():
    z, clusters = draw(3)
    images = z.reshape(6, 1, 2, 2)
    soft = ClusterClassifier(nn.Flatten(), clusters, neighbours=4)
    hard = ClusterClassifier(nn.Flatten(), clusters, rule="nearest")
    assert torch.equal(soft(images), cluster_logits(z, clusters, neighbours=4))
    assert torch.equal(hard(images), nearest_logits(z, clusters))
    assert torch.equal(soft.embed(images), z)
    other = ClusterClassifier(nn.Flatten(), draw(4)[1], neighbours=4)
    assert not torch.equal(other(images), soft(images))
    other.load_state_dict(soft.state_dict())
    assert torch.equal(other(images), soft(images))
    assert soft.float().clusters.centroids.dtype == torch.float32


def test_linear_classifier():
    torch.manual_seed(0)
    model = LinearClassifier(nn.Flatten(), 4, 3).double()
    images = draw(5)[0].reshape(6, 1, 2, 2)
    expected = model.embed(images) @ model.linear.weight.T + model.linear.bias
    torch.testing.assert_close(model(images), expected)


@pytest.mark.parametrize("rule", ["nearest", "soft"])
def test_learnable_centroids_are_a_parameter_and_all_else_stays(rule):
    z, clusters = draw(6)
    images = z.reshape(6, 1, 2, 2)
    fixed = ClusterClassifier(nn.Flatten(), clusters, rule=rule)
    learnable = ClusterClassifier(nn.Flatten(), clusters, rule=rule, learnable=True)
    assert [name for name, _ in learnable.named_parameters()] == ["centroids"]
    assert not list(fixed.parameters())
    assert set(learnable.state_dict()) == set(fixed.state_dict()) == {"centroids", "labels", "variance"}
    assert torch.equal(learnable(images), fixed(images))
    # the given clusters are copied: training does not reach them
    learnable(images).square().sum().backward()
    assert learnable.centroids.grad is not None
    assert learnable.centroids.grad.norm() > 1e-3
    assert not clusters.centroids.requires_grad
    before = clusters.centroids.clone()
    with torch.no_grad():
        learnable.centroids.add_(1.0)
    assert torch.equal(clusters.centroids, before)
    # a step of the optimiser is seen at once
    torch.testing.assert_close(learnable.clusters.centroids.detach(), before + 1)
    fixed.load_state_dict(learnable.state_dict())
    assert torch.equal(fixed(images), learnable(images))


@pytest.mark.parametrize("learnable", [False, True])
def test_clusters_move_with_the_module_even_once_they_were_asked_for(learnable):
    _, clusters = draw(7)
    model = ClusterClassifier(nn.Flatten(), clusters, learnable=learnable)
    assert model.clusters is model.clusters
    for dtype in (torch.float32, torch.float64):
        model.to(dtype)
        found = model.clusters
        assert found.centroids.dtype == found.variance.dtype == dtype
        assert found.labels.dtype == torch.int64
    copied = copy.deepcopy(model)
    assert copied.clusters.centroids is copied.centroids
    assert copied.clusters.centroids is not model.clusters.centroids


def test_an_orthonormal_head_moves_no_two_embeddings_apart():
    torch.manual_seed(0)
    model = LinearClassifier(nn.Flatten(), 4, 3, orthonormal=True).double()
    images = draw(5, points=20)[0].reshape(-1, 1, 2, 2)
    z, logits = model.embed(images), model(images)
    apart, moved = torch.pdist(z), torch.pdist(logits)
    assert (moved <= apart * (1 + 1e-6)).all()
    assert set(dict(model.named_parameters())) == {"linear.bias", "linear.parametrizations.weight.original"}


@pytest.mark.parametrize("equal", [True, False])
def test_logits_gradient_reaches_embeddings_and_centroids(equal):
    z, clusters = draw(3, classes=3, per_class=3, points=7, equal=equal)
    some = torch.tensor([0, 1, 2, 3, 4, 6])

    def logits(embeddings, centroids):
        # two classes of two clusters and one class of two, of which one is empty in the third slot
        return cluster_logits(embeddings, Clusters(centroids, clusters.labels[some], clusters.variance[some]))

    inputs = (z.requires_grad_(), clusters.centroids[some].requires_grad_())
    assert torch.autograd.gradcheck(logits, inputs)
    (alone,) = torch.autograd.grad(logits(z, inputs[1].detach()).sum(), z)
    both, _ = torch.autograd.grad(logits(*inputs).sum(), inputs)
    assert torch.equal(alone, both)


def test_chunks_of_logits_change_nothing(monkeypatch):
    z, clusters = draw(4, points=23)
    z.requires_grad_()
    whole = cluster_logits(z, clusters)
    (gradient,) = torch.autograd.grad(whole.square().sum(), z)
    monkeypatch.setattr(chunks, "TABLE_BYTES", 8 * 6 * 5)
    parts = cluster_logits(z, clusters)
    torch.testing.assert_close(parts, whole, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(torch.autograd.grad(parts.square().sum(), z)[0], gradient, rtol=1e-12, atol=1e-12)
    assert torch.equal(cluster_logits(z.detach(), clusters), parts.detach())


def test_logits_of_no_embeddings_are_empty():
    z, clusters = draw(5, points=1)
    none = z[:0].requires_grad_()
    logits = cluster_logits(none, clusters)
    assert logits.shape == (0, 3)
    assert torch.autograd.grad(logits.sum(), none)[0].shape == none.shape


def test_logits_are_finite_where_they_can_be_represented():
    """d^2 overflows float32 here, d^2 / 2 sigma^2 does not; and a place far from the origin costs no digits."""
    centroids = torch.tensor([[0.0, 1.0], [2.0, 0.0], [0.0, -3.0]])
    huge = Clusters(1e20 * centroids, torch.arange(3), torch.full((3,), 1e38))
    logits = cluster_logits(1e20 * torch.tensor([[1.0, 1.0]]), huge)
    torch.testing.assert_close(logits, -100 * torch.tensor([[0.5, 1.0, 8.5]]))
    far = Clusters(centroids + 4096, torch.arange(3), torch.ones(3))
    near = Clusters(centroids, torch.arange(3), torch.ones(3))
    z = torch.tensor([[0.25, 0.5], [1.0, -0.125]])
    torch.testing.assert_close(cluster_logits(z + 4096, far), cluster_logits(z, near), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("neighbours", [None, 3])
def test_logits_inside_autocast_are_those_outside(neighbours):
    z, clusters = draw(6, points=40)
    z, clusters = z.float().requires_grad_(), clusters.to(torch.float32)
    found = []
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            logits = cluster_logits(z, clusters, neighbours=neighbours)
            found.append((logits.detach(), *torch.autograd.grad(logits.sum(), z)))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_half_precision_is_computed_in_float32():
    z, clusters = draw(7, points=40)
    coarse = z.bfloat16()
    logits = cluster_logits(coarse, clusters.to(torch.bfloat16))
    assert logits.dtype == torch.bfloat16
    expected = cluster_logits(coarse.float(), clusters.to(torch.bfloat16).to(torch.float32))
    assert torch.equal(logits, expected.bfloat16())
    # an embedding from autocast beside centroids in float32
    mixed = cluster_logits(coarse, clusters.to(torch.float32))
    assert torch.equal(mixed, cluster_logits(coarse.float(), clusters.to(torch.float32)))


SQUARE = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])


def square_model(labels, **options):
    """Four corners of a square, seen by an encoder that changes nothing."""
    clusters = Clusters(SQUARE, torch.tensor(labels), torch.ones(4))
    return ClusterClassifier(torch.nn.Flatten(), clusters, **options).eval()


SWAPPED = torch.tensor([0, 0, 1, 1])


def load(model):
    model.load_state_dict(square_model(SWAPPED.tolist()).state_dict())


def load_in_place_of(model):
    model.load_state_dict(square_model(SWAPPED.tolist()).state_dict(), assign=True)


def load_labels_alone(model):
    model.load_state_dict({"labels": SWAPPED}, strict=False)


def assign(model):
    model.labels = SWAPPED.clone()


def assign_narrow_labels(model):
    """Again and again, so that a new tensor would lie where an old one lay."""
    for labels in ([1, 0, 1, 0], [0, 1, 0, 1], [1, 1, 0, 0], [0, 0, 1, 1]):
        model.labels = torch.tensor(labels, dtype=torch.int32)
        model(torch.zeros(1, 1, 1, 2, dtype=model.centroids.dtype))


def assign_centroids(model):
    moved = SQUARE[[0, 2, 1, 3]]
    model.centroids = torch.nn.Parameter(moved) if isinstance(model.centroids, torch.nn.Parameter) else moved


def write(model):
    model.labels.copy_(SWAPPED)


def write_item(model):
    model.labels[1], model.labels[2] = 0, 1


def write_behind_the_count(model):
    model.labels.data.copy_(SWAPPED)


def write_through_numpy(model):
    model.labels.numpy()[:] = SWAPPED.numpy()


def write_in_inference_mode(model):
    with torch.inference_mode():
        model.labels = SWAPPED.flip(0).clone()
        model(torch.zeros(1, 1, 1, 2))
        model.labels.copy_(SWAPPED)


def move_centroids(model):
    with torch.no_grad():
        model.centroids[[1, 2]] = model.centroids[[2, 1]].clone()


def move_data(model):
    model.centroids.data = SQUARE[[0, 2, 1, 3]]


def cast_and_write(model):
    model.to(torch.float64)
    model(torch.zeros(1, 1, 1, 2))
    model.to(torch.float32).labels.copy_(SWAPPED)


CHANGES = [
    load, load_in_place_of, load_labels_alone, assign, assign_narrow_labels, assign_centroids, write, write_item,
    write_behind_the_count, write_through_numpy, write_in_inference_mode, move_centroids, move_data, cast_and_write,
]  # fmt: skip
KINDS = [{"rule": "nearest"}, {"rule": "soft"}, {"rule": "soft", "neighbours": 2}]


@pytest.mark.parametrize("learnable", [False, True])
@pytest.mark.parametrize("kind", KINDS, ids=["nearest", "soft", "few"])
@pytest.mark.parametrize("change", CHANGES)
def test_whatever_changes_the_clusters_changes_predictions_and_certificates(change, kind, learnable):
    """No certified ball holds another class, and the changed model is the one that was built so."""
    model, wanted = square_model([0, 1, 0, 1], **kind, learnable=learnable), square_model([0, 0, 1, 1], **kind)
    images = torch.rand(100, 1, 1, 2, generator=torch.Generator().manual_seed(0))
    model(images)
    certify(model, images, lipschitz=1.0)
    change(model)
    predicted = model(images).argmax(dim=1)
    assert torch.equal(predicted, wanted(images).argmax(dim=1))
    radius = certify(model, images, lipschitz=1.0).radius
    assert (radius > 0).any() == (certify(wanted, images, lipschitz=1.0).radius > 0).any()
    for direction in torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0], [0.0, -1.0]]):
        moved = images + 0.99 * radius[:, None, None, None] * direction
        assert torch.equal(model(moved).argmax(dim=1), predicted)


@pytest.mark.parametrize("kind", KINDS, ids=["nearest", "soft", "few"])
@pytest.mark.parametrize("how", ["load", "assign", "write", "data"])
def test_another_variance_changes_the_soft_rule_and_its_certificates(how, kind):
    images = torch.rand(100, 1, 1, 2, generator=torch.Generator().manual_seed(0))
    model, wanted = square_model([0, 0, 0, 1], **kind), square_model([0, 0, 0, 1], **kind)
    wanted.variance = torch.full((4,), 0.2)
    before = model(images), certify(model, images, lipschitz=1.0).radius
    {
        "load": lambda: model.load_state_dict(wanted.state_dict()),
        "assign": lambda: setattr(model, "variance", torch.full((4,), 0.2)),
        "write": lambda: model.variance.fill_(0.2),
        "data": lambda: model.variance.data.fill_(0.2),
    }[how]()
    after = model(images), certify(model, images, lipschitz=1.0).radius
    assert not torch.equal(before[0], after[0])
    assert torch.equal(after[0], wanted(images))
    assert torch.equal(after[1], certify(wanted, images, lipschitz=1.0).radius)
    if kind["rule"] == "soft" and "neighbours" not in kind:
        assert not torch.equal(before[1], after[1])


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize(
    ("part", "value", "words"),
    [
        ("labels", torch.tensor([0, 0, 2, 2]), "labels: expected a cluster for every class"),
        ("labels", torch.tensor([0.0, 0.5, 1, 1]), "labels: expected class indices"),
        ("centroids", SQUARE / 0, "centroids: expected finite"),
        ("centroids", 1e300 * (1 + SQUARE.double()), "centroids: expected finite|variance: expected the centroids' d"),
        ("variance", -torch.ones(4), "variance: expected positive"),
    ],
)
def test_a_part_of_a_state_is_checked_with_the_rest_of_the_model(part, value, words, assign, as_installed):
    model, images = square_model([0, 1, 0, 1]), torch.rand(20, 1, 1, 2)
    before = model(images)
    with pytest.raises(ValueError, match=words):
        nn.Sequential(model).load_state_dict({f"0.{part}": value}, strict=False, assign=assign)
    assert torch.equal(model(images), before)


def test_labels_that_are_spoilt_in_place_are_refused():
    model, images = square_model([0, 1, 0, 1]), torch.rand(20, 1, 1, 2)
    model(images)
    model.labels.numpy()[0] = -1
    for use in (lambda: model(images), lambda: certify(model, images, lipschitz=1.0)):
        with pytest.raises(ValueError, match="labels: expected class indices"):
            use()


@pytest.mark.parametrize(
    ("part", "value", "words"),
    [
        ("labels", torch.tensor([0, 0, 2, 2]), "labels: expected a cluster for every class"),
        ("labels", torch.tensor([0, 0, -1, 1]), "labels: expected class indices"),
        ("centroids", SQUARE / 0, "centroids: expected finite"),
        ("variance", torch.zeros(4), "variance: expected positive"),
    ],
)
def test_a_state_without_clusters_is_refused_and_the_old_one_stays(part, value, words):
    model, images = square_model([0, 1, 0, 1]), torch.rand(20, 1, 1, 2)
    before = model(images)
    with pytest.raises(ValueError, match=words):
        model.load_state_dict(model.state_dict() | {part: value})
    assert torch.equal(model(images), before)
    setattr(model, part, value)
    with pytest.raises(ValueError, match=words):
        model(images)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32])
def test_labels_of_any_integer_dtype_are_the_same_labels(dtype, as_installed):
    """uint8 once wrapped around, and changed radii in silence."""
    labels = torch.tensor([0, 0, 1, 2])
    z = torch.rand(50, 2, generator=torch.Generator().manual_seed(1))
    narrow, wide = (Clusters(SQUARE, each, torch.ones(4)) for each in (labels.to(dtype), labels))
    assert narrow.labels.dtype == torch.int64
    assert torch.equal(certified_radius(z, narrow), certified_radius(z, wide))
    assert torch.equal(cluster_logits(z, narrow), cluster_logits(z, wide))
    with pytest.raises(ValueError, match="labels: expected class indices"):
        Clusters(SQUARE, labels.bool(), torch.ones(4))


def test_a_resnet_sees_one_channel_in_the_layout_that_is_safe_to_train_in() -> None:
    """Strides of one channel may be those of channels last too, in which PyTorch writes past its memory."""
    encoder = build_encoder("resnet18", (1, 8, 8), width=8)
    images = torch.rand(6, 64).as_strided((6, 1, 8, 8), (64, 1, 8, 1))
    seen = []
    encoder.conv1.register_forward_pre_hook(lambda module, given: seen.append(given[0].stride()))
    embeddings = encoder(images.requires_grad_())
    assert seen == [(64, 64, 8, 1)]
    embeddings.sum().backward()
    torch.testing.assert_close(embeddings, encoder(images.detach().clone(memory_format=torch.contiguous_format)))
