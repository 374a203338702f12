"""The ladder of certified radii: how far an input may move before the predicted class can change."""

import math
from typing import Literal, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor

from clustr_core.ascent import Norm
from clustr_core.classifiers import ClusterClassifier, Rule, cluster_logits
from clustr_core.clusters import Clusters
from clustr_core.distances import squared_distances
from clustr_core.lipschitz import check_evaluation_mode, lipschitz_upper_bound

Bound = Literal["triangle", "nearest", "pairwise"]


def certified_radius(
    embeddings: Float[Tensor, "batch dim"],
    clusters: Clusters,
    *,
    bound: Bound = "pairwise",
    lipschitz: float = 1.0,
    rule: Rule = "nearest",
    neighbours: int | None = None,
) -> Float[Tensor, " batch"]:
    """L2 radius, in input units, inside which the class that ``rule`` predicts cannot change.

    With c the predicted class, A its nearest centroid and L the encoder's Lipschitz constant, over rival clusters j:

        triangle  min_j (d_j - d_A) / (2 L)
        nearest   min_j (d_j^2 - d_A^2) / (2 L ||mu_j - mu_A||)
        pairwise  min_j max_{i in c} (d_j^2 - d_i^2) / (2 L ||mu_j - mu_i||)

    triangle <= nearest <= pairwise, and each is sound. Negative radii become 0. The radius is lowered by a bound on
    the rounding of this computation, in the inputs' dtype; the rounding inside the encoder is not in it.

    Args:
        lipschitz: an upper bound on the encoder's L2 Lipschitz constant, for pixels in [0, 1].
        rule: "nearest" certifies the class of the nearest centroid. "soft" certifies argmax_c g_c(z), for which
            sigma^2 log k is subtracted from each (d_j^2 - d_i^2) / 2, k the size of the rival's class.
        neighbours: only that many nearest centroids vote: sigma^2 log max(1, min(k, neighbours - 1)) is subtracted.
    Raises:
        ValueError: for fewer than two classes, an embedding that is not finite, ``lipschitz`` not positive, an
            unknown ``bound`` or ``rule``, or unequal variances where the rule needs one sigma^2.
    Source: Alfarra et al. 2021, Theorem 1 ("nearest"); "triangle" is folklore; "pairwise" and the soft corrections
        are this book's (chapters 1 and 2).
    """
    _check(embeddings, clusters, bound, lipschitz, rule, neighbours)
    distances = squared_distances(embeddings, clusters.centroids)
    predicted = _predicted_class(embeddings, distances, clusters, rule, neighbours)
    own, is_own = _own_clusters(distances, predicted, clusters, only_nearest=bound != "pairwise")
    own_distances = distances.gather(1, own)[:, :, None]
    rival_distances = distances[:, None, :]
    relative = _relative_rounding(embeddings)
    tiny = torch.finfo(embeddings.dtype).tiny
    # squares of less than that lose digits to underflow, which no relative bound covers
    gaps = (rival_distances - own_distances) / 2 - relative * (rival_distances + own_distances) / 2 - tiny
    if rule == "soft" or neighbours is not None:
        gaps = gaps - _vote_correction(clusters, neighbours)
    if bound == "triangle":
        lengths = own_distances.sqrt() + rival_distances.sqrt()
    else:
        lengths = squared_distances(clusters.centroids, clusters.centroids).sqrt()[own]
    # an own centroid on top of a rival decides nothing: it is skipped, and if none is left the radius is 0
    usable = is_own[:, :, None] & (lengths.square() > tiny / torch.finfo(embeddings.dtype).eps)
    radii = (gaps / lengths.where(usable, 1)).masked_fill(~usable, -torch.inf).amax(dim=1)
    is_rival = clusters.labels != predicted[:, None]
    # where a square has overflowed nothing is known
    feature_radius = radii.masked_fill(~is_rival, torch.inf).amin(dim=1).clamp_min(0).nan_to_num(nan=0)
    return feature_radius * (1 - relative) / lipschitz


def certify(
    model: ClusterClassifier,
    images: Float[Tensor, "batch channel height width"],
    *,
    bound: Bound | None = None,
    lipschitz: float | None = None,
) -> Float[Tensor, " batch"]:
    """`certified_radius` of a whole model: its rule, its neighbours, and a sound Lipschitz bound of its encoder.

    Args:
        bound: None picks the largest bound that is valid for the model ("pairwise").
        lipschitz: the encoder's bound where it is known already, since computing it may take seconds;
            None computes `lipschitz_upper_bound`.
    Raises:
        ValueError: if pixels leave [0, 1], or as `certified_radius` and `lipschitz_upper_bound`.
        TypeError: if the model is no `ClusterClassifier` or its encoder has a layer without a bound.
    """
    if not isinstance(model, ClusterClassifier):
        raise TypeError(f"model: expected a ClusterClassifier, got {type(model).__name__}, which has no certificate")
    check_evaluation_mode(model.encoder)
    if not ((images >= 0) & (images <= 1)).all():
        raise ValueError(f"images: expected pixels in [0, 1], got {images.min():.4g} to {images.max():.4g}")
    if lipschitz is None:
        channels, height, width = images.shape[1:]
        lipschitz = lipschitz_upper_bound(model.encoder, (channels, height, width))
    with torch.no_grad():
        embeddings = model.embed(images)
    return certified_radius(
        embeddings,
        model.clusters,
        bound=bound or "pairwise",
        lipschitz=lipschitz,
        rule=model.rule,
        neighbours=model.neighbours,
    )


def radius_from_magnet_loss(
    losses: Float[Tensor, " batch"],
    embeddings: Float[Tensor, "batch dim"],
    labels: Int[Tensor, " batch"],
    clusters: Clusters,
    *,
    gap: float,
    lipschitz: float = 1.0,
) -> Float[Tensor, " batch"]:
    """What a magnet loss alone guarantees: r >= sigma^2 (gap - l) / (L max_j ||mu_j - mu_A||), j over the rivals.

    The loss bounds each rival's distance, d_j^2 - d_A^2 >= 2 sigma^2 (gap - l), A the nearest cluster of the label; so
    an example with l < gap is classified correctly, and its "nearest" radius is at least this. Never negative.

    Args:
        losses: of `losses.full_magnet_loss` against these clusters, with the same ``gap``.
    Source: this book, chapter 3.
    """
    distances = squared_distances(embeddings, clusters.centroids)
    is_rival = clusters.labels != labels[:, None]
    nearest = distances.masked_fill(is_rival, torch.inf).argmin(dim=1)
    between = squared_distances(clusters.centroids, clusters.centroids).sqrt()[nearest]
    farthest = between.masked_fill(~is_rival, 0).amax(dim=1)
    return (clusters.shared_variance * (gap - losses)).clamp_min(0) / (lipschitz * farthest)


def linear_radius(
    weight: Float[Tensor, "class dim"],
    bias: Float[Tensor, " class"],
    points: Float[Tensor, "batch dim"],
    labels: Int[Tensor, " batch"],
    *,
    norm: Norm = "l2",
) -> Float[Tensor, " batch"]:
    """The exact distance of each point to a linear classifier's nearest other class; 0 where it is misclassified.

    min_j (w_y - w_j) . x + b_y - b_j over the dual norm of w_y - w_j: L2 for "l2", L1 for "linf". The space has no
    walls: where pixels end at 0 and 1, the distance can only be larger.
    """
    logits = points @ weight.T + bias
    margins = logits.gather(1, labels[:, None]) - logits
    lengths = (weight[labels][:, None] - weight).norm(p=2 if norm == "l2" else 1, dim=2)
    own = torch.nn.functional.one_hot(labels, len(weight)).bool()
    return (margins / lengths.masked_fill(own, 1)).masked_fill(own, torch.inf).amin(dim=1).clamp_min(0)


def _predicted_class(
    embeddings: Tensor, distances: Tensor, clusters: Clusters, rule: Rule, neighbours: int | None
) -> Int[Tensor, " batch"]:
    if rule == "soft":
        return cluster_logits(embeddings, clusters, neighbours=neighbours).argmax(dim=1)
    return clusters.labels[distances.argmin(dim=1)]


def _own_clusters(
    distances: Tensor, predicted: Tensor, clusters: Clusters, only_nearest: bool
) -> tuple[Int[Tensor, "batch slot"], Tensor]:
    """Indices of the predicted class's clusters, and which are real; only the nearest of them if asked."""
    columns, filled = clusters.by_class
    own, is_own = columns[predicted], filled[predicted]
    if not only_nearest:
        return own, is_own
    nearest = distances.gather(1, own).masked_fill(~is_own, torch.inf).argmin(dim=1, keepdim=True)
    return own.gather(1, nearest), is_own.gather(1, nearest)


def _vote_correction(clusters: Clusters, neighbours: int | None) -> Float[Tensor, " cluster"]:
    """sigma^2 times the log of how many clusters of each cluster's class can vote at once against us."""
    voters = torch.bincount(clusters.labels)[clusters.labels]
    if neighbours is not None:
        voters = voters.clamp_max(max(neighbours - 1, 1))
    return clusters.shared_variance * voters.to(clusters.centroids).log()


def _relative_rounding(embeddings: Tensor) -> float:
    """Bound on the relative error of a squared distance: one rounding for each of dim terms, and a few more."""
    return (embeddings.shape[1] + 8) * torch.finfo(embeddings.dtype).eps / 2


def _check(
    embeddings: Tensor, clusters: Clusters, bound: str, lipschitz: float, rule: str, neighbours: int | None
) -> None:
    if bound not in get_args(Bound):
        raise ValueError(f"bound: expected one of {get_args(Bound)}, got {bound!r}")
    if rule not in get_args(Rule):
        raise ValueError(f"rule: expected one of {get_args(Rule)}, got {rule!r}")
    if neighbours is not None and neighbours < 1:
        raise ValueError(f"neighbours: expected a positive number or None, got {neighbours}")
    if not (lipschitz > 0 and math.isfinite(lipschitz)):
        raise ValueError(f"lipschitz: expected a positive finite number, got {lipschitz}")
    if clusters.num_classes < 2:
        raise ValueError("clusters: expected at least two classes, got one, which nothing can be told apart from")
    if not embeddings.isfinite().all():
        raise ValueError("embeddings: expected finite values, got NaN or infinity")
