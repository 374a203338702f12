"""Gradients of logits and losses are differentiable again: penalties and Hessians are those of the formula."""

import pytest
import torch
import torch.nn.functional as F

from clustr_core.models.classifiers import cluster_logits, nearest_logits
from clustr_core.models.clusters import Clusters
from clustr_core.numerics.distances import squared_distances
from clustr_core.training.losses import (
    certificate_loss,
    full_magnet_loss,
    magnet_loss,
)

# three classes of two, three and one clusters, in no order
LABELS = torch.tensor([1, 0, 1, 2, 0, 1])
ROWS = torch.tensor([0, 1, 2, 0, 2, 1, 0, 1])


def draw(dtype=torch.float64, shared=False):
    """Embeddings, of which the first two lie on a centroid each; centroids; variances."""
    g = torch.Generator().manual_seed(3)
    centroids = torch.randn(6, 4, generator=g, dtype=torch.float64)
    z = 1.5 * torch.randn(8, 4, generator=g, dtype=torch.float64)
    z[:2] = centroids[:2]
    variance = torch.ones(6, dtype=torch.float64) if shared else 0.5 + torch.rand(6, generator=g, dtype=torch.float64)
    return z.to(dtype), centroids.to(dtype), variance.to(dtype)


def plain_distances(z, mu):
    return (z[:, None] - mu).square().sum(dim=2)


def plain_logits(z, mu, variance, neighbours=None):
    """g_c(z) by the book; a class without a vote follows its nearest cluster, below the lowest vote."""
    distances = plain_distances(z, mu)
    exponents = -distances / (2 * variance)
    votes = torch.zeros_like(exponents, dtype=torch.bool)
    votes.scatter_(1, distances.topk(neighbours or len(mu), dim=1, largest=False).indices, True)
    rows = []
    for row, voting in zip(exponents, votes, strict=True):
        own = [row[(c == LABELS) & voting] for c in range(3)]
        lowest = min(each.logsumexp(dim=0).item() for each in own if len(each))
        nearest = [row[c == LABELS].max() for c in range(3)]
        below = [each - 1 if each.item() < lowest else 0 * each + lowest - 1 for each in nearest]
        rows.append(torch.stack([own[c].logsumexp(dim=0) if len(own[c]) else below[c] for c in range(3)]))
    return torch.stack(rows)


def plain_nearest(z, mu, variance):
    exponents = -plain_distances(z, mu) / (2 * variance.mean())
    return torch.stack([exponents[:, c == LABELS].amax(dim=1) for c in range(3)], dim=1)


def logits_of(neighbours):
    return (
        lambda z, mu, variance: cluster_logits(z, Clusters(mu, LABELS, variance), neighbours=neighbours),
        lambda z, mu, variance: plain_logits(z, mu, variance, neighbours),
    )


ASSIGNMENTS = torch.tensor([7, 3, 9, 7, 5, 3, 7, 3])
CLASSES = torch.tensor([0, 1, 2, 0, 0, 1, 0, 1])


def plain_magnet(z, mu, variance):
    """The stochastic magnet loss by the book; ``mu`` and ``variance`` have no part in it."""
    means = {a: z[a == ASSIGNMENTS].mean(dim=0) for a in ASSIGNMENTS.tolist()}
    own = torch.stack([(z[i] - means[a]).square().sum() for i, a in enumerate(ASSIGNMENTS.tolist())])
    sigma2 = own.sum() / (len(z) - 1)
    label_of = dict(zip(ASSIGNMENTS.tolist(), CLASSES.tolist(), strict=True))
    losses = []
    for i, label in enumerate(CLASSES.tolist()):
        rivals = [-(z[i] - mean).square().sum() / (2 * sigma2) for a, mean in means.items() if label_of[a] != label]
        losses.append(F.relu(own[i] / (2 * sigma2) + 1.0 + torch.stack(rivals).logsumexp(dim=0)))
    return torch.cat([torch.stack(losses), sigma2[None]])


def our_magnet(z, mu, variance):
    found = magnet_loss(z, ASSIGNMENTS, CLASSES, gap=1.0)
    return torch.cat([found.per_example, found.variance[None]])


def plain_full_magnet(z, mu, variance):
    exponents = plain_distances(z, mu) / (2 * variance[0])
    losses = [
        F.relu(row[of == LABELS].min() + 1.0 + (-row[of != LABELS]).logsumexp(dim=0))
        for row, of in zip(exponents, ROWS, strict=True)
    ]
    return torch.stack(losses)


def plain_certificate(z, mu, variance):
    losses = []
    for row, of in zip(plain_distances(z, mu), ROWS, strict=True):
        own = int(row.masked_fill(of != LABELS, torch.inf).argmin())
        radii = [(row[j] - row[own]) / (2 * (mu[j] - mu[own]).norm()) for j in range(6) if LABELS[j] != of]
        losses.append(0.7 * torch.stack([(0.9 - r) / 0.7 for r in radii]).exp().sum().log1p())
    return torch.stack(losses)


PAIRS = {
    "distances": (lambda z, mu, variance: squared_distances(z, mu), lambda z, mu, variance: plain_distances(z, mu)),
    "all votes": logits_of(None),
    "one vote": logits_of(1),
    "three votes": logits_of(3),
    "as many votes as clusters": logits_of(6),
    "nearest": (lambda z, mu, variance: nearest_logits(z, Clusters(mu, LABELS, variance)), plain_nearest),
    "magnet": (our_magnet, plain_magnet),
    "full magnet": (
        lambda z, mu, variance: full_magnet_loss(z, ROWS, Clusters(mu, LABELS, variance), gap=1.0).per_example,
        plain_full_magnet,
    ),
    "certificate": (
        lambda z, mu, variance: certificate_loss(
            z, ROWS, Clusters(mu, LABELS, variance), margin=0.9, temperature=0.7
        ),
        plain_certificate,
    ),
}  # fmt: skip


def second_order(function, leaves, count):
    """The first gradients of a random combination of the outputs, and the Hessian times a random vector."""
    g = torch.Generator().manual_seed(11)
    outputs = function(*leaves)
    weight = torch.randn(outputs.shape, generator=g, dtype=torch.float64).to(outputs)
    wanted = leaves[:count]
    first = torch.autograd.grad(outputs, wanted, weight, create_graph=True, materialize_grads=True)
    directions = [torch.randn(each.shape, generator=g, dtype=torch.float64).to(each) for each in wanted]
    return first, torch.autograd.grad(first, wanted, directions, materialize_grads=True)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("name", PAIRS)
def test_hessians_are_those_of_the_formula(name, count, dtype):
    ours, plain = PAIRS[name]
    shared = name == "full magnet"
    leaves = [each.requires_grad_(i < count) for i, each in enumerate(draw(dtype, shared))]
    exact = [each.requires_grad_(i < count) for i, each in enumerate(draw(shared=shared))]
    found, wanted = second_order(ours, leaves, count), second_order(plain, exact, count)
    tight = dtype == torch.float64
    for mine, theirs in zip((*found[0], *found[1]), (*wanted[0], *wanted[1]), strict=True):
        assert mine.dtype == dtype
        size = theirs.abs().max().item()
        torch.testing.assert_close(mine.double(), theirs, rtol=0, atol=(1e-9 if tight else 2e-5) * max(size, 1e-3))


@pytest.mark.parametrize("name", PAIRS)
def test_gradgradcheck(name):
    ours, _ = PAIRS[name]
    z, mu, variance = draw(shared=name == "full magnet")
    # off the centroids: a nearest one that ties with itself has no derivative to both sides
    z = z + 0.05
    inputs = (z.requires_grad_(), mu.requires_grad_())
    assert torch.autograd.gradgradcheck(lambda *given: ours(*given, variance), inputs)


@pytest.mark.parametrize("name", ["all votes", "three votes", "magnet", "distances"])
def test_third_derivatives_are_those_of_the_formula(name):
    ours, plain = PAIRS[name]
    results = []
    for function in (ours, plain):
        z, mu, variance = draw()
        z.requires_grad_()
        (first,) = torch.autograd.grad(function(z, mu, variance).square().sum(), z, create_graph=True)
        (second,) = torch.autograd.grad(first.square().sum(), z, create_graph=True)
        results.append(torch.autograd.grad(second.sin().sum(), z)[0])
    assert results[1].abs().max() > 1e-2
    torch.testing.assert_close(*results, rtol=1e-8, atol=1e-8 * results[1].abs().max().item())


@pytest.mark.parametrize("name", PAIRS)
def test_the_first_gradient_has_the_same_bits_whether_or_not_it_is_differentiated_again(name):
    ours, _ = PAIRS[name]
    gradients = []
    for again in (False, True):
        z, mu, variance = draw(torch.float32, shared=name == "full magnet")
        inputs = (z.requires_grad_(), mu.requires_grad_())
        outputs = ours(*inputs, variance)
        gradients.append(
            torch.autograd.grad(outputs.square().sum(), inputs, create_graph=again, materialize_grads=True)
        )
    assert all(torch.equal(one, other) for one, other in zip(*gradients, strict=True))


def test_a_gradient_penalty_trains_what_lies_before_the_logits():
    """The penalty's gradient reaches an encoder's weights, as the formula has it."""
    z, mu, variance = draw()
    results = []
    for head in (PAIRS["all votes"][0], PAIRS["all votes"][1]):
        weight = torch.eye(4, dtype=torch.float64).mul(0.8).requires_grad_()
        x = z.clone().requires_grad_()
        loss = F.cross_entropy(head(torch.tanh(x @ weight), mu, variance), ROWS)
        (slope,) = torch.autograd.grad(loss, x, create_graph=True)
        results.append(torch.autograd.grad(loss + slope.square().sum(), weight)[0])
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("neighbours", [None, 3])
def test_the_variance_has_its_gradient_whoever_votes(neighbours):
    results = []
    for head in logits_of(neighbours):
        z, mu, variance = draw()
        (found,) = torch.autograd.grad(head(z, mu, variance.requires_grad_()).square().sum(), variance)
        results.append(found)
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("rows", [torch.arange(5), torch.tensor([4, 1, 3, 0, 2])])
def test_a_batch_of_singletons_has_the_same_second_derivatives_in_any_order(rows):
    """No offset from the own centroid: the scale is the smallest there is, and nothing is infinite."""
    z = torch.randn(5, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)[rows].requires_grad_()
    loss = magnet_loss(z, rows, (torch.arange(5) % 2)[rows], gap=1.0).variance
    (first,) = torch.autograd.grad(loss, z, create_graph=True)
    assert not first.any()
    (second,) = torch.autograd.grad(first.sum(), z)
    assert second.isfinite().all()


@pytest.mark.parametrize("part", ["centroids", "labels", "variance"])
@pytest.mark.parametrize("neighbours", [None, 3])
def test_what_is_written_to_between_the_passes_is_taken_as_it_was_or_refused(part, neighbours):
    seconds = []
    for written in (False, True):
        z, mu, variance = draw()
        clusters = Clusters(mu, LABELS.clone(), variance)
        outputs = cluster_logits(z.requires_grad_(), clusters, neighbours=neighbours)
        (first,) = torch.autograd.grad(outputs.square().sum(), z, create_graph=True, retain_graph=True)
        if written:
            getattr(clusters, part).copy_(getattr(clusters, part).roll(1, dims=0))
        try:
            seconds.append(torch.autograd.grad(first.square().sum(), z)[0])
        except RuntimeError as error:
            refusal = str(error)
    assert torch.equal(*seconds) if len(seconds) == 2 else "modified by an inplace operation" in refusal


@pytest.mark.parametrize("name", PAIRS)
def test_transforms_of_functions_are_right_or_refused(name):
    """`torch.func` either works or says that it does not; no derivative is 0 in silence."""
    ours, plain = PAIRS[name]
    z, mu, variance = draw(shared=name == "full magnet")
    z = z + 0.05
    try:
        found = torch.func.jacrev(torch.func.jacrev(lambda z: ours(z, mu, variance).sum()))(z)
    except (RuntimeError, NotImplementedError):
        return
    torch.testing.assert_close(found, torch.autograd.functional.hessian(lambda z: plain(z, mu, variance).sum(), z))
