"""The ladder of certified radii: how far an input may move before the predicted class can change."""

from dataclasses import dataclass
from typing import get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor

from clustr_core.certificates.hard import frame_of, hard_feature_radius, pairwise_by_kernel
from clustr_core.certificates.lipschitz import (
    check_constants,
    check_evaluation_mode,
    check_finite_weights,
    computes,
    input_shapes,
    upper_bound,
)
from clustr_core.certificates.names import HARD_BOUNDS, SOFT_BOUNDS, Bound, HardBound, SoftBound
from clustr_core.certificates.rounding import rounding_bound
from clustr_core.certificates.soft import soft_radius
from clustr_core.models.classifiers import ClusterClassifier, Rule, check_voters, cluster_logits, nearest_logits
from clustr_core.models.clusters import Clusters
from clustr_core.numerics.checks import check_finite, check_images
from clustr_core.numerics.chunks import rows_within
from clustr_core.numerics.distances import squared_distances
from clustr_core.numerics.kernels import dispatch
from clustr_core.numerics.rounding import (
    HALF_DTYPES,
    full_precision,
    given_and_working_dtype,
    relative_rounding,
    rounded_down,
)


@torch.no_grad()
def certified_radius(
    embeddings: Float[Tensor, "batch dim"],
    clusters: Clusters,
    *,
    bound: Bound = "pairwise",
    lipschitz: float = 1.0,
    rule: Rule = "nearest",
    neighbours: int | None = None,
    embedding_error: float = 0.0,
) -> Float[Tensor, " batch"]:
    """L2 radius, in input units, inside which the class that ``rule`` predicts cannot change.

    With c the predicted class, A its nearest centroid and L the encoder's Lipschitz constant, over rival clusters j:

        triangle  min_j (d_j - d_A) / (2 L)
        nearest   min_j (d_j^2 - d_A^2) / (2 L ||mu_j - mu_A||)
        pairwise  min_j max_{i in c} (d_j^2 - d_i^2) / (2 L ||mu_j - mu_i||)
        exact     min_j dist(z, {p : d_j(p) <= d_i(p) for all i in c}) / L

    triangle <= nearest <= pairwise <= exact, and each is sound; no certificate that knows only z and L exceeds "exact".
    The soft rule has bounds of its own, "soft-global" to "soft-dual": see `soft.soft_radius`.

    Negative radii become 0, and no gradient goes through: `losses.certificate_loss` is for that. The radius is lowered
    by a bound on the rounding of this computation, in the inputs' dtype, the wider of two (half precision is computed
    in float32 and rounded down, and gives 0 where its own logits name another class); for the rounding inside the
    encoder there is ``embedding_error``. Embeddings are taken in chunks: beyond them, the centroids and their mutual
    distances, and the answer, memory does not grow with the batch.

    Args:
        lipschitz: an upper bound on the encoder's L2 Lipschitz constant, for pixels in [0, 1].
        rule: "nearest" certifies the class of the nearest centroid. "soft" certifies argmax_c g_c(z); for the bounds of
            the nearest rule, sigma^2 log k is then subtracted from each (d_j^2 - d_i^2) / 2, k the size of the rival's
            class. The bounds "soft-..." are always of the soft rule.
        neighbours: only that many nearest centroids vote: sigma^2 log max(1, min(k, neighbours - 1)) is subtracted.
        embedding_error: how far an embedding may be from the exact one (`rounding.embedding_error`). Twice that is
            taken off the feature radius: once for the image, once for what it is moved to.
    Raises:
        ValueError: for fewer than two classes, an embedding that is not finite or not of the centroids' dimension,
            ``lipschitz`` not positive, ``embedding_error`` negative, an unknown ``bound`` or ``rule``, unequal
            variances where the rule needs one sigma^2, or ``neighbours`` with a bound "soft-...", which needs every
            vote.
    Source: Alfarra et al. 2021, Theorem 1 ("nearest"); "triangle" is folklore; "pairwise", "exact" and the soft rule's
        are this book's (chapters 1 and 2).
    """
    _check(embeddings, clusters, bound, rule, neighbours)
    check_constants(lipschitz, embedding_error)
    dtype, wide = given_and_working_dtype(embeddings, clusters.centroids)
    given = embeddings, clusters
    embeddings, clusters = embeddings.to(wide), clusters.to(wide)
    relative = relative_rounding(embeddings)
    with full_precision(embeddings.device):
        if bound in SOFT_BOUNDS:
            # the class that is predicted in the embeddings' own dtype; the bound in float64
            predicted = cluster_logits(embeddings, clusters).argmax(dim=1)
            soft: SoftBound = bound  # pyright: ignore[reportAssignmentType]
            parts = [soft_radius(embeddings, clusters, predicted, bound=soft, relative=relative)]
        else:
            frame = frame_of(clusters, relative, neighbours, votes=rule == "soft" or neighbours is not None)
            kernel = dispatch("pairwise_radius", None, embeddings) if bound == "pairwise" else None
            if kernel:
                parts = [pairwise_by_kernel(kernel, embeddings, clusters, frame, relative, rule, neighbours)]
            else:
                hard: HardBound = bound  # pyright: ignore[reportAssignmentType]
                chunks = embeddings.split(rows_within(len(clusters.centroids), wide))
                # once for all chunks: fresh memory for each costs as much as the arithmetic
                tables = embeddings.new_empty(3, len(chunks[0]), len(clusters.centroids))
                parts = [hard_feature_radius(part, clusters, frame, hard, rule, neighbours, tables) for part in chunks]
    radii = torch.cat(parts).double() * (1 - relative) - 2 * embedding_error
    if dtype in HALF_DTYPES:
        # logits of so few digits may tie, and name another class than the one that is certified
        named, real = (_predicted(*pair, rule, neighbours) for pair in (given, (embeddings, clusters)))
        radii = radii.masked_fill(named != real, 0)
    return rounded_down(radii.clamp_min(0) / lipschitz, dtype)


def _predicted(embeddings: Tensor, clusters: Clusters, rule: Rule, neighbours: int | None) -> Tensor:
    """The class that a rule predicts in the embeddings' dtype."""
    if rule == "nearest":
        return nearest_logits(embeddings, clusters).argmax(dim=1)
    return cluster_logits(embeddings, clusters, neighbours=neighbours).argmax(dim=1)


@dataclass(frozen=True, eq=False)
class Certificate:
    """What `certify` says of each image: no image nearer than ``radius`` is of another class than ``prediction``.

    Args:
        prediction: class of each image.
        radius: L2, in pixels of [0, 1], of the open ball around each image.
        bound: the bound that gave it; "max(exact, soft-dual)" where each image has the larger of the two.
        lipschitz: the encoder's Lipschitz constant that was used.
        rounding: how far a computed embedding may be from the exact one; twice that was taken off each radius, before
            it was divided by ``lipschitz``.
    """

    prediction: Int[Tensor, " batch"]
    radius: Float[Tensor, " batch"]
    bound: str
    lipschitz: float
    rounding: float


def certify(
    model: ClusterClassifier,
    images: Float[Tensor, "batch channel height width"],
    *,
    bound: Bound | None = None,
    lipschitz: float | None = None,
) -> Certificate:
    """`certified_radius` of a whole model: its rule, its neighbours, and a sound Lipschitz bound of its encoder.

    The rounding inside the encoder (`rounding.embedding_error`) is taken off. In float32 that can exceed every radius,
    as for the book's convolutional encoders. In float64 (``model.double()``, ``images.double()``) it is next to
    nothing, so that is how the book certifies. An encoder whose rounding has no known bound is refused: a certificate
    of real numbers, which says nothing about rounding, is `certified_radius` of its embeddings.

    Args:
        bound: None picks the largest that is valid for the model: "exact", and of the soft rule with all centroids
            voting the larger of "soft-dual" and the corrected "exact", image by image.
        lipschitz: the encoder's bound where it is known already, since computing it may take seconds;
            None computes `lipschitz_upper_bound`.
    Raises:
        ValueError: if pixels leave [0, 1], a layer in training mode depends on the whole batch or on chance, or as
            `certified_radius` and `lipschitz_upper_bound`.
        TypeError: if the model computes something else than a `ClusterClassifier`, or its encoder uses a layer at two
            sizes or has one without a Lipschitz bound or without a bound on its rounding (`register_lipschitz` gives a
            layer of one's own both).
    """
    if not isinstance(model, ClusterClassifier):
        raise TypeError(f"model: expected a ClusterClassifier, got {type(model).__name__}, which has no certificate")
    _check_model(model)
    check_images(images)
    channels, height, width = images.shape[1:]
    with torch.no_grad(), full_precision(images.device):
        shapes = input_shapes(model.encoder, (channels, height, width), like=images)
        if lipschitz is None:
            lipschitz = upper_bound(model.encoder, shapes)
        error = rounding_bound(model.encoder, (channels, height, width), shapes)
        embeddings = model.embed(images)
        prediction = model.classify(embeddings).argmax(dim=1)
    options = {"lipschitz": lipschitz, "embedding_error": error, "rule": model.rule, "neighbours": model.neighbours}
    bounds: list[Bound] = [bound] if bound is not None else _best_bounds(model)
    radii = [certified_radius(embeddings, model.clusters, bound=each, **options) for each in bounds]
    name = bounds[0] if len(bounds) == 1 else f"max({', '.join(bounds)})"
    return Certificate(prediction, torch.stack(radii).amax(dim=0), name, float(lipschitz), error)


def _check_model(model: ClusterClassifier) -> None:
    """Refuse a model that does not compute what is certified: by training mode, or by something put in its place."""
    parts = ("embed", "classify")
    own = any(
        getattr(type(model), part) is not getattr(ClusterClassifier, part) or part in vars(model) for part in parts
    )
    if own or not computes(model, ClusterClassifier):
        raise TypeError(
            f"model: expected one that computes what ClusterClassifier does, got {type(model).__name__} with a "
            "forward, an embed or a classify of its own, or a hook, which no certificate sees"
        )
    check_evaluation_mode(model)
    check_finite_weights(model.encoder)


def _best_bounds(model: ClusterClassifier) -> list[Bound]:
    """Those of which the largest is the best that is valid for the model."""
    return ["exact", "soft-dual"] if model.rule == "soft" and model.neighbours is None else ["exact"]


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


def _check(embeddings: Tensor, clusters: Clusters, bound: str, rule: str, neighbours: int | None) -> None:
    if bound not in (*HARD_BOUNDS, *SOFT_BOUNDS):
        raise ValueError(f"bound: expected one of {(*HARD_BOUNDS, *SOFT_BOUNDS)}, got {bound!r}")
    if bound in SOFT_BOUNDS and neighbours is not None:
        raise ValueError(
            f"neighbours: expected None with bound {bound!r}, for which every centroid votes, got {neighbours}; "
            'with fewer votes the soft rule jumps, and bound="exact" has the correction that keeps it sound'
        )
    if rule not in get_args(Rule):
        raise ValueError(f"rule: expected one of {get_args(Rule)}, got {rule!r}")
    check_voters(embeddings, clusters, neighbours)
    votes = bound in SOFT_BOUNDS or rule == "soft" or neighbours is not None
    if votes and (clusters.variance != clusters.variance[0]).any():
        # however little they differ: the quadratic terms then no longer cancel
        low, high = clusters.variance.min().item(), clusters.variance.max().item()
        raise ValueError(f"clusters: expected one shared variance, got values from {low:.9g} to {high:.9g}")
    if clusters.num_classes < 2:
        raise ValueError("clusters: expected at least two classes, got one, which nothing can be told apart from")
    check_finite(embeddings)
