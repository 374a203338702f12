"""What training minimises: the magnet loss, the certificate as a loss, margins, consistency."""

import math
from typing import Any, NamedTuple, get_args

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from clustr_core.models.clusters import Clusters, check_are_clusters
from clustr_core.numerics.checks import check_are_tensors, check_finite, check_positive
from clustr_core.numerics.chunks import rows_within
from clustr_core.numerics.derivatives import Gradients, gradients_of
from clustr_core.numerics.distances import squared_distances
from clustr_core.numerics.rounding import HALF_DTYPES, full_precision
from clustr_core.training.recipes import ANNEALING, CertificateLoss


class MagnetLoss(NamedTuple):
    """The mean loss, the loss of each example, and the variance that scaled the distances."""

    loss: Float[Tensor, ""]
    per_example: Float[Tensor, " batch"]
    variance: Float[Tensor, ""]


def magnet_loss(
    embeddings: Float[Tensor, "batch dim"],
    assignments: Int[Tensor, " batch"],
    labels: Int[Tensor, " batch"],
    *,
    gap: float = 12.5,
) -> MagnetLoss:
    """The stochastic magnet loss of one batch of clusters, rows in any order.

    With mu_c the mean of cluster c within the batch, and sigma^2 = sum_n ||z_n - mu(n)||^2 / (N - 1), both with
    gradient, l_n = max(0, d_own^2 / 2 sigma^2 + gap + logsumexp over the batch's clusters of other classes of
    -d_j^2 / 2 sigma^2).

    Half precision is computed, and returned, in float32.

    Args:
        assignments: the cluster of each row; any integers.
        labels: the class of each row; a cluster holds one class.
        gap: the separation asked for, in nats (the paper's alpha).
    Returns:
        ``loss`` (the mean), ``per_example`` and ``variance``, in that order.
    Raises:
        ValueError: if the shapes differ, a value or its square is not finite, a cluster holds two classes, or there is
            no rival.
    Source: Rippel et al. 2016, equation 5. Deviation from the paper's released code: a logsumexp instead of
        the logarithm of a sum + 1e-8, which caps the loss at 18.4 and stops the gradient of badly wrong examples.
    """
    check_are_tensors(assignments=assignments)
    _check_lengths(embeddings, labels, assignments)
    per_example, variance = magnet_of_slots(embeddings, slots_of(assignments, labels), gap)
    # whatever is not finite makes the variance so: only then look for it
    if not math.isfinite(variance.detach()):
        check_finite(embeddings)
        raise ValueError(f"embeddings: expected values whose squares do not overflow, got {embeddings.abs().max():.4g}")
    return MagnetLoss(per_example.mean(), per_example, variance)


class Slots(NamedTuple):
    """Of what clusters a batch is made: the place of each row's cluster among them, and the class of each of them."""

    own: Int[Tensor, " batch"]
    classes: Int[Tensor, " slot"]


def slots_of(assignments: Int[Tensor, " batch"], labels: Int[Tensor, " batch"]) -> Slots:
    """The clusters of a batch, renumbered 0, 1, 2, ... in their order.

    Raises:
        ValueError: if a cluster holds two classes, or all of them are of one class.
    """
    _, own = assignments.unique(return_inverse=True)
    classes = labels.new_empty(int(own.max()) + 1)
    classes[own] = labels
    if (classes[own] != labels).any():
        raise ValueError("assignments: expected clusters of one class each, got a cluster with two labels")
    if (classes == classes[0]).all():
        raise ValueError("labels: expected at least two classes in a batch, got one, which has no rival")
    return Slots(own, classes)


def magnet_of_slots(
    embeddings: Float[Tensor, "batch dim"], slots: Slots, gap: float
) -> tuple[Float[Tensor, " batch"], Float[Tensor, ""]]:
    """``per_example`` and ``variance`` of `magnet_loss`, for which nothing is read off the device.

    What is not finite makes both so: whoever trains on them looks at the loss.
    """
    wide = embeddings.float() if embeddings.dtype in HALF_DTYPES else embeddings
    return _Magnet.apply(wide, slots.own, slots.classes, gap)  # pyright: ignore[reportReturnType]


class _Magnet(torch.autograd.Function):
    """The losses and the variance of `magnet_loss` by few and small products, and their gradients by hand.

    With r_n = z_n - mu(n), the offset from the own centroid, (d_own^2 - d_j^2) / 2 is
    <r_n + mu(n), mu_j> - ||mu_j||^2 / 2, less the same of the own cluster: tight clusters far apart lose no digits.
    """

    @staticmethod
    def forward(ctx: Any, embeddings: Tensor, own: Tensor, cluster_labels: Tensor, gap: float) -> tuple[Tensor, Tensor]:
        column, finfo = own[:, None], torch.finfo(embeddings.dtype)
        member = embeddings.new_zeros(len(own), len(cluster_labels)).scatter_(1, column, 1.0)
        sizes = member.sum(dim=0)[:, None]
        with full_precision(embeddings.device):
            centroids = (member.T @ embeddings).div_(sizes)
            offsets = torch.addmm(embeddings, member, centroids, alpha=-1)
            centroids.sub_(centroids.mean(dim=0))
            between = centroids @ centroids.T
            between.sub_(between.diagonal() / 2)
            halves = torch.addmm(between.index_select(0, own), offsets, centroids.T)
        halves.sub_(halves.gather(1, column))
        variance = torch.linalg.vector_norm(offsets).square_().div_(max(len(own) - 1, 1))
        # all examples on their centroids (a batch of singletons): any scale is right, a finite one is needed
        precision = variance.clamp_min(finfo.eps**2).reciprocal_()
        same = (cluster_labels == cluster_labels[:, None]).index_select(0, own)
        exponents = (halves * precision).masked_fill_(same, -torch.inf)
        highest = exponents.amax(dim=1, keepdim=True)
        # numbers too small to matter would be denormal in the products to come, which are slow
        shares = torch.threshold_(exponents.sub_(highest).exp_(), finfo.tiny**0.75, 0.0)
        total = shares.sum(dim=1, keepdim=True)
        shares.div_(total)
        per_example = total.log_().add_(highest).add_(gap).clamp_min_(0).squeeze(1)
        ctx.gap = gap
        kept = (member, sizes, centroids, offsets, variance, precision, halves, shares, per_example)
        ctx.save_for_backward(embeddings, own, cluster_labels, *kept)
        return per_example, variance

    @staticmethod
    def backward(ctx: Any, above: Tensor, above_variance: Tensor) -> tuple[Tensor | None, None, None, None]:
        embeddings, own, cluster_labels, *kept = ctx.saved_tensors
        (of_embeddings,) = gradients_of(
            lambda points: _magnet_formula(points, own, cluster_labels, ctx.gap),
            (embeddings,),
            (above, above_variance),
            lambda *above: _magnet_gradient(*kept, *above),
        )
        return of_embeddings, None, None, None


def _magnet_gradient(
    member: Tensor,
    sizes: Tensor,
    centroids: Tensor,
    offsets: Tensor,
    variance: Tensor,
    precision: Tensor,
    halves: Tensor,
    shares: Tensor,
    per_example: Tensor,
    above: Tensor,
    above_variance: Tensor,
) -> Gradients:
    """Through (d_own^2 - d_j^2) / 2 to embeddings and means, and through the variance to the offsets alone."""
    weights = (above * (per_example > 0))[:, None]
    of_precision = (weights * shares * halves).sum() * (variance > torch.finfo(variance.dtype).eps ** 2)
    of_variance = above_variance - precision.square() * of_precision
    flow = (shares - member).mul_(weights * precision)
    pull = of_variance * (2 / max(len(offsets) - 1, 1))
    with full_precision(above.device):
        between = member.T @ flow
        # the offsets of a cluster add up to nothing but the rounding of its mean, which this takes back
        of_centroids = (flow - pull * member).T @ offsets
        of_centroids.addmm_(between.T, centroids).sub_(between.sum(dim=0)[:, None] * centroids).div_(sizes)
        pulls = torch.cat([centroids, of_centroids])
        return ((offsets * pull).addmm_(torch.cat([flow, member], dim=1), pulls),)


def _magnet_formula(embeddings: Tensor, own: Tensor, cluster_labels: Tensor, gap: float) -> tuple[Tensor, Tensor]:
    """The losses and the variance of `magnet_loss` as the formula says, differentiable as often as one likes."""
    member = F.one_hot(own, len(cluster_labels)).to(embeddings.dtype)
    centroids = member.T @ embeddings / member.sum(dim=0)[:, None]
    offsets = embeddings - centroids[own]
    variance = offsets.square().sum() / max(len(own) - 1, 1)
    precision = variance.clamp_min(torch.finfo(embeddings.dtype).eps ** 2).reciprocal()
    # (d_own^2 - d_j^2) / 2 = <r_n, mu_j - mu(n)> - ||mu_j - mu(n)||^2 / 2: nothing of it is far from the origin
    apart = centroids - centroids[own][:, None]
    halves = torch.linalg.vecdot(offsets[:, None], apart) - torch.linalg.vecdot(apart, apart) / 2
    same = (cluster_labels == cluster_labels[:, None])[own]
    rivals = (halves * precision).masked_fill(same, -torch.inf).logsumexp(dim=1)
    return (rivals + gap).clamp_min(0), variance


def full_magnet_loss(
    embeddings: Float[Tensor, "batch dim"],
    labels: Int[Tensor, " batch"],
    clusters: Clusters,
    *,
    gap: float = 12.5,
) -> MagnetLoss:
    """The magnet loss against fixed clusters: the k-means centroids and their sigma^2.

    l_n as in `magnet_loss`, with own = the nearest cluster of the example's own class, and all clusters of other
    classes as rivals. Without gradient, memory does not grow with examples times clusters.

    Raises:
        ValueError: as `magnet_loss`, or if the clusters' variances differ.
    Source: Alfarra et al. 2021, section 3. Deviation from the released code, which masks inside the exponent, so
        that each other cluster of the own class adds exp(0) = 1 to the rivals' sum.
    """
    _check_rows(embeddings, labels)
    _check_classes(labels, clusters)
    variance = embeddings.new_tensor(clusters.shared_variance)
    rows = rows_within(len(clusters.centroids), embeddings.dtype)
    per_example = torch.cat(
        [
            _magnet_of(part, of, clusters, variance, gap)
            for part, of in zip(embeddings.split(rows), labels.split(rows), strict=True)
        ]
    )
    return MagnetLoss(per_example.mean(), per_example, variance)


def _magnet_of(
    embeddings: Float[Tensor, "batch dim"],
    labels: Int[Tensor, " batch"],
    clusters: Clusters,
    variance: Float[Tensor, ""],
    gap: float,
) -> Float[Tensor, " batch"]:
    distances = squared_distances(embeddings, clusters.centroids)
    is_rival = clusters.labels != labels[:, None]
    own_distance = distances.masked_fill(is_rival, torch.inf).amin(dim=1)
    # all examples on their centroids (a batch of singletons): any scale is right, a finite one is needed
    double_variance = 2 * variance.clamp_min(torch.finfo(distances.dtype).eps ** 2)
    rivals = (-distances / double_variance).masked_fill(~is_rival, -torch.inf).logsumexp(dim=1)
    return (own_distance / double_variance + gap + rivals).clamp_min(0)


def certificate_loss(
    embeddings: Float[Tensor, "batch dim"],
    labels: Int[Tensor, " batch"],
    clusters: Clusters,
    *,
    margin: float,
    temperature: float,
    kind: CertificateLoss = "margin",
    annealing: float = ANNEALING,
) -> Float[Tensor, " batch"]:
    """The certificate as a loss: l = tau log(1 + sum_j exp((m - r_j) / tau)) over the rival clusters j of each example.

    r_j = (d_j^2 - d_A^2) / (2 ||mu_j - mu_A||), A the nearest cluster of the example's class, is the signed distance to
    the bisector of A and j, so with a 1-Lipschitz encoder min_j r_j is the certified radius where the example is
    classified correctly. The loss is a smooth, slightly larger max(0, m - min_j r_j); gradients reach embeddings and
    centroids.

    Args:
        margin: m, the radius asked for, in units of the embedding.
        temperature: tau, in the same units.
        kind: "margin" is l. "emma" asks of each rival for the radius that is reached already, from a hundredth of m to
            m, in place of m; that radius carries no gradient. "annealed" is (1 - exp(-l / tau))^gamma l, which turns
            away from examples that have the margin.
        annealing: gamma, at least 1.
    Raises:
        ValueError: if a shape or a label is off, a value is not finite, ``margin`` or ``temperature`` not positive,
            ``annealing`` below 1, or ``kind`` unknown.
    Source: this book, chapter 7; r_j is the certificate of Alfarra et al. 2021, Theorem 1. "emma": Hu et al. 2024, and
        "annealed": Lai et al. 2025, both of logits there; here of the signed radii, to which a cluster head's logits
        -d^2 come down.
    """
    _check_rows(embeddings, labels)
    _check_classes(labels, clusters)
    check_positive(margin=margin, temperature=temperature)
    _check_kind(kind, annealing)
    size = {"margin": margin, "temperature": temperature, "kind": kind, "annealing": annealing}
    return unchecked_certificate_loss(embeddings, labels, clusters, **size)


def unchecked_certificate_loss(
    embeddings: Float[Tensor, "batch dim"],
    labels: Int[Tensor, " batch"],
    clusters: Clusters,
    *,
    margin: float,
    temperature: float,
    kind: CertificateLoss = "margin",
    annealing: float = ANNEALING,
) -> Float[Tensor, " batch"]:
    """`certificate_loss`, for which nothing is read off the device: whoever trains on it looks at the loss."""
    distances = squared_distances(embeddings, clusters.centroids)
    is_rival = clusters.labels != labels[:, None]
    own_distance, own = distances.masked_fill(is_rival, torch.inf).min(dim=1)
    between = squared_distances(clusters.centroids, clusters.centroids)
    # a rival on top of the own cluster has no bisector: any positive length keeps the loss finite
    lengths = between.clamp_min(torch.finfo(distances.dtype).eps).sqrt()[own]
    radii = (distances - own_distance[:, None]) / (2 * lengths)
    short = (_asked(radii, margin, kind) - radii) / temperature
    loss = temperature * _log_one_plus_sum_exp(short.masked_fill(~is_rival, -torch.inf))
    return _annealed(loss, temperature, annealing) if kind == "annealed" else loss


def margin_cross_entropy(
    logits: Float[Tensor, "batch class"],
    labels: Int[Tensor, " batch"],
    weight: Float[Tensor, "class dim"],
    *,
    margin: float,
    temperature: float,
    kind: CertificateLoss = "margin",
    annealing: float = ANNEALING,
) -> Float[Tensor, " batch"]:
    """Cross-entropy of a linear head that must win by a margin, over the classes j other than the label's y.

    tau log(1 + sum_j exp((m ||w_y - w_j|| - (g_y - g_j)) / tau))

    With a 1-Lipschitz encoder (g_y - g_j) / ||w_y - w_j|| is the certified radius against class j.

    Args:
        weight: of the head, one row a class.
        margin: m, the radius asked for, in units of the embedding.
        temperature: tau, in units of the logits.
        kind, annealing: as in `certificate_loss`, of the radii (g_y - g_j) / ||w_y - w_j||.
    Source: Tsuzuku et al. 2018, algorithm 1 (there one constant for all pairs); Leino et al. 2021 (one for each pair);
        Prach and Lampert 2022 (the temperature); Hu et al. 2024 ("emma"; there without a temperature); Lai et al. 2025
        ("annealed"; there on top of "emma").
    """
    check_positive(margin=margin, temperature=temperature)
    _check_kind(kind, annealing)
    own = F.one_hot(labels, logits.shape[1]).bool()
    lengths = (weight[labels][:, None] - weight).square().sum(dim=2).clamp_min(torch.finfo(logits.dtype).tiny).sqrt()
    mine = logits.gather(1, labels[:, None])
    short = (_asked((mine - logits) / lengths, margin, kind) * lengths + logits - mine) / temperature
    loss = temperature * _log_one_plus_sum_exp(short.masked_fill(own, -torch.inf))
    return _annealed(loss, temperature, annealing) if kind == "annealed" else loss


def consistency_loss(
    clean_logits: Float[Tensor, "batch class"], moved_logits: Float[Tensor, "batch class"]
) -> Float[Tensor, " batch"]:
    """H(p(x), softmax(s(x'))): the cross-entropy of a moved image's scores against the clean image's probabilities.

    p = softmax(g) are the cluster probabilities s / sum(s). The moved side takes the raw scores s = exp(g), which
    lie in [0, k], as if they were logits: so does the paper, and training reproduces it.

    Args:
        clean_logits, moved_logits: log-domain logits g of the image and of its perturbed copy.
    Source: Alfarra et al. 2021, ClusTR+QTRADES. Deviation from the released code: the targets p carry no gradient.
    """
    targets = clean_logits.detach().softmax(dim=1)
    return -(targets * moved_logits.exp().log_softmax(dim=1)).sum(dim=1)


def _check_kind(kind: CertificateLoss, annealing: float) -> None:
    if kind not in get_args(CertificateLoss):
        raise ValueError(f"kind: expected one of {get_args(CertificateLoss)}, got {kind!r}")
    if not 1 <= annealing < math.inf:
        raise ValueError(f"annealing: expected a number of at least 1, got {annealing}")


def _asked(radii: Float[Tensor, "batch rival"], margin: float, kind: CertificateLoss) -> Tensor | float:
    """The radius that a loss asks for: the margin, or by "emma" what is reached of it, at least a hundredth."""
    return radii.detach().clamp(margin / 100, margin) if kind == "emma" else margin


def _annealed(loss: Float[Tensor, " batch"], temperature: float, annealing: float) -> Float[Tensor, " batch"]:
    """(1 - p)^gamma of a loss -tau log p, times it."""
    return (-torch.expm1(-loss / temperature)) ** annealing * loss


def _log_one_plus_sum_exp(values: Float[Tensor, "batch column"]) -> Float[Tensor, " batch"]:
    return F.pad(values, (1, 0)).logsumexp(dim=1)


def _check_classes(labels: Tensor, clusters: Clusters) -> None:
    check_are_clusters(clusters)
    if clusters.num_classes < 2:
        raise ValueError("clusters: expected at least two classes, got one")
    if len(labels) and (labels.min() < 0 or labels.max() >= clusters.num_classes):
        raise ValueError(
            f"labels: expected classes in 0..{clusters.num_classes - 1}, got {int(labels.min())} to {int(labels.max())}"
        )


def _check_rows(embeddings: Tensor, labels: Tensor) -> None:
    _check_lengths(embeddings, labels)
    check_finite(embeddings)


def _check_lengths(embeddings: Tensor, labels: Tensor, assignments: Tensor | None = None) -> None:
    check_are_tensors(embeddings=embeddings, labels=labels)
    for name, rows in (("labels", labels), ("assignments", assignments)):
        if rows is not None and len(rows) != len(embeddings):
            raise ValueError(f"{name}: expected one for each of {len(embeddings)} embeddings, got {len(rows)}")
    if not len(embeddings):
        raise ValueError("embeddings: expected at least one row, got none")
