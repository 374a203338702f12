"""The ladder of certified radii: how far an input may move before the predicted class can change."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from clustr_core import rounding
from clustr_core.ascent import Norm
from clustr_core.classifiers import ClusterClassifier, Rule, check_voters, cluster_logits
from clustr_core.clusters import Clusters
from clustr_core.distances import HALVES, check_finite, full_precision, middle, rows_within, squared_distances
from clustr_core.dual import least_norm
from clustr_core.kernels import dispatch
from clustr_core.lipschitz import check_evaluation_mode, lipschitz_upper_bound
from clustr_core.soft_bounds import SoftBound, soft_radius

HardBound = Literal["triangle", "nearest", "pairwise", "exact"]
Bound = HardBound | SoftBound
HARD_BOUNDS: tuple[HardBound, ...] = get_args(HardBound)
SOFT_BOUNDS: tuple[SoftBound, ...] = get_args(SoftBound)


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
    The soft rule has bounds of its own, "soft-global" to "soft-dual": see `soft_bounds.soft_radius`.

    Negative radii become 0, and no gradient goes through: `losses.certificate_loss` is for that. The radius is lowered
    by a bound on the rounding of this computation, in the inputs' dtype, the wider of two (half precision is computed
    in float32, and rounded down); for the rounding inside the encoder there is ``embedding_error``. Embeddings are
    taken in chunks: beyond them, the centroids and their mutual distances, and the answer, memory does not grow with
    the batch.

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
    _check_encoder(lipschitz, embedding_error)
    dtype, wide = _dtypes(embeddings, clusters.centroids)
    embeddings, clusters = embeddings.to(wide), clusters.to(wide)
    relative = _relative_rounding(embeddings)
    with full_precision(embeddings.device):
        if bound in SOFT_BOUNDS:
            # the class that is predicted in the embeddings' own dtype; the bound in float64
            predicted = cluster_logits(embeddings, clusters).argmax(dim=1)
            soft: SoftBound = bound  # pyright: ignore[reportAssignmentType]
            parts = [soft_radius(embeddings, clusters, predicted, bound=soft, relative=relative)]
        else:
            frame = _frame_of(clusters, relative, neighbours, votes=rule == "soft" or neighbours is not None)
            kernel = dispatch("pairwise_radius", None, embeddings) if bound == "pairwise" else None
            if kernel:
                parts = [_by_kernel(kernel, embeddings, clusters, frame, relative, rule, neighbours)]
            else:
                hard: HardBound = bound  # pyright: ignore[reportAssignmentType]
                chunks = embeddings.split(rows_within(len(clusters.centroids), wide))
                # once for all chunks: fresh memory for each costs as much as the arithmetic
                tables = embeddings.new_empty(3, len(chunks[0]), len(clusters.centroids))
                parts = [_hard_feature_radius(part, clusters, frame, hard, rule, neighbours, tables) for part in chunks]
    radii = torch.cat(parts).double() * (1 - relative) - 2 * embedding_error
    return _rounded_down(radii.clamp_min(0) / lipschitz, dtype)


def certify(
    model: ClusterClassifier,
    images: Float[Tensor, "batch channel height width"],
    *,
    bound: Bound | None = None,
    lipschitz: float | None = None,
) -> Float[Tensor, " batch"]:
    """`certified_radius` of a whole model: its rule, its neighbours, and a sound Lipschitz bound of its encoder.

    Where the rounding inside the encoder is bounded (`rounding.embedding_error`: 1-Lipschitz encoders, chains of dense
    layers), it is taken off too. In float32 that bound can exceed every radius, as for the book's convolutional
    encoder. In float64 (``model.double()``, ``images.double()``) it is next to nothing, so that is how the book
    certifies. Of other encoders the certificate is one of real numbers, and says nothing about rounding.

    Args:
        bound: None picks the largest that is valid for the model: "exact", and of the soft rule with all centroids
            voting the larger of "soft-dual" and the corrected "exact", image by image.
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
    if images.dim() != 4:
        raise ValueError(f"images: expected shape [batch, channel, height, width], got {list(images.shape)}")
    channels, height, width = images.shape[1:]
    with torch.no_grad(), full_precision(images.device):
        if lipschitz is None:
            lipschitz = lipschitz_upper_bound(model.encoder, (channels, height, width))
        try:
            error = rounding.embedding_error(model.encoder, (channels, height, width))
        except TypeError:  # an encoder whose rounding nothing is known of
            error = 0.0
        embeddings = model.embed(images)
    options = {"lipschitz": lipschitz, "embedding_error": error, "rule": model.rule, "neighbours": model.neighbours}
    if bound is not None:
        return certified_radius(embeddings, model.clusters, bound=bound, **options)
    radius = certified_radius(embeddings, model.clusters, bound="exact", **options)
    if model.rule == "soft" and model.neighbours is None:
        radius = radius.maximum(certified_radius(embeddings, model.clusters, bound="soft-dual", **options))
    return radius


def margin_radius(
    embeddings: Float[Tensor, "batch dim"],
    head: nn.Linear,
    *,
    lipschitz: float = 1.0,
    embedding_error: float = 0.0,
) -> Float[Tensor, " batch"]:
    """L2 radius of a linear head on a Lipschitz encoder: min_j (g_c - g_j) / (L ||w_c - w_j||), c the predicted class.

    Lowered, as `certified_radius` is, by bounds on the rounding of the logits and of the embeddings; half precision is
    computed in float32, and rounded down.

    Raises:
        ValueError: for fewer than two classes, an embedding that is not finite, ``lipschitz`` not positive or
            ``embedding_error`` negative.
    Source: Tsuzuku et al. 2018; Leino et al. 2021, definition 2 (a constant for each pair of classes).
    """
    _check_encoder(lipschitz, embedding_error)
    if head.out_features < 2:
        raise ValueError(f"head: expected at least two classes, got {head.out_features}")
    check_finite(embeddings)
    weight = head.weight.detach()
    bias = head.bias.detach() if head.bias is not None else weight.new_zeros(head.out_features)
    dtype, wide = _dtypes(embeddings, weight)
    embeddings, weight, bias = embeddings.to(wide), weight.to(wide), bias.to(wide)
    with full_precision(embeddings.device):
        predicted = (embeddings @ weight.T + bias).argmax(dim=1)
        radius = linear_radius(weight, bias, embeddings, predicted)
    size = weight.norm(dim=1).amax() * embeddings.norm(dim=1) + bias.abs().amax()
    shortest = squared_distances(weight, weight).fill_diagonal_(torch.inf).amin().sqrt()
    slack = 4 * _relative_rounding(embeddings) * size / shortest
    # two equal rows tell nothing apart
    radii = (radius - slack).double() - 2 * embedding_error
    return _rounded_down(radii.nan_to_num(nan=0.0).clamp_min(0) / lipschitz, dtype)


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


@dataclass(frozen=True)
class _Frame:
    """What all chunks share: the centroids, seen from their mean, and what rounding is taken off.

    With z and mu_j seen from there, q_j = ||mu_j||^2 / 2 - z . mu_j is (d_j^2 - ||z||^2) / 2: differences of q are all
    that a radius needs, and all q are one matrix product. Computed, in whatever order it is summed, a q is within
    ``slack`` (||z|| + ||mu_j||)^2 of the true one: half a rounding for each of dim terms, and a few for the rest.

    Args:
        inverse_lengths: at most 1 / ||mu_i - mu_j||.
        correction: what the votes of a rival's class take off its q.
    """

    origin: Float[Tensor, " dim"]
    centroids: Float[Tensor, "cluster dim"]
    norms: Float[Tensor, " cluster"]
    inverse_lengths: Float[Tensor, "cluster cluster"]
    correction: Float[Tensor, " cluster"]
    slack: float

    @property
    def underflow(self) -> float:
        """What products below the smallest number may have lost, which no relative bound covers."""
        return self.centroids.shape[1] * torch.finfo(self.centroids.dtype).tiny


def _frame_of(clusters: Clusters, relative: float, neighbours: int | None, *, votes: bool) -> _Frame:
    origin = middle(clusters.centroids)
    centroids = clusters.centroids - origin
    correction = _vote_correction(clusters, neighbours) if votes else torch.zeros_like(centroids[:, 0])
    return _Frame(origin, centroids, centroids.norm(dim=1), _inverse_lengths(clusters), correction, relative / 2)


def _inverse_lengths(clusters: Clusters) -> Float[Tensor, "cluster cluster"]:
    """1 / ||mu_i - mu_j|| of clusters of different classes, rounded down but for the last rounding to their dtype.

    From one product in float64, where rounding only makes a length longer; from differences where that would show.
    """
    wide = clusters.centroids.double()
    wide = wide - middle(wide)
    squares, norms = wide.square().sum(dim=1), wide.norm(dim=1)
    relative = _relative_rounding(wide)
    table = torch.empty(len(wide), len(wide), dtype=clusters.centroids.dtype, device=wide.device)
    rows = rows_within(len(wide), wide.dtype)
    parts = (each.split(rows) for each in (wide, squares, norms, clusters.labels, table))
    for part, square, norm, label, out in zip(*parts, strict=True):
        reach = (norms + norm[:, None]) ** 2
        longest = torch.addmm(squares, part, wide.T, alpha=-2) + square[:, None] + 2 * relative * reach
        near = (longest < 1e-6 * reach) & (label[:, None] != clusters.labels)
        if near.any():
            longest = longest.where(~near, squared_distances(part, wide) * (1 + 2 * relative))
        out.copy_(longest.clamp_min(0).rsqrt())
    return table


def _by_kernel(
    kernel: Callable[..., Tensor],
    embeddings: Tensor,
    clusters: Clusters,
    frame: _Frame,
    relative: float,
    rule: Rule,
    neighbours: int | None,
) -> Float[Tensor, " batch"]:
    """The "pairwise" radius of all embeddings at once, by a kernel that streams; see `kernels.pairwise_radius`."""
    votes = neighbours if rule == "soft" else 1
    predicted = cluster_logits(embeddings, clusters, neighbours=votes).argmax(dim=1)
    lengths = frame.inverse_lengths.reciprocal()
    return kernel(embeddings, clusters.centroids, clusters.labels, predicted, lengths, relative, frame.correction)


def _hard_feature_radius(
    embeddings: Float[Tensor, "batch dim"],
    clusters: Clusters,
    frame: _Frame,
    bound: HardBound,
    rule: Rule,
    neighbours: int | None,
    tables: Float[Tensor, "three chunk cluster"],
) -> Float[Tensor, " batch"]:
    """min over rivals of the largest radius that one own cluster certifies against it; "exact" of all together.

    Args:
        tables: memory to work in.
    """
    halves, lower, reach = tables[:, : len(embeddings)]
    centred = embeddings - frame.origin
    size = centred.norm(dim=1, keepdim=True)
    torch.addmm(frame.norms.square() / 2, centred, frame.centroids.T, alpha=-1, out=halves)
    if rule == "soft":
        predicted = cluster_logits(embeddings, clusters, neighbours=neighbours).argmax(dim=1)
    else:
        predicted = clusters.labels[halves.min(dim=1).indices]
    own = _own_clusters(clusters, predicted)
    # own clusters rounded up, rivals down, so that every difference is at most (d_j^2 - d_i^2) / 2
    up = halves.gather(1, own) + frame.slack * (size + frame.norms[own]) ** 2 + frame.underflow
    taken_off = frame.slack * frame.norms.square() + frame.correction + frame.underflow
    down = halves.addr_(size.squeeze(1), frame.norms, alpha=-2 * frame.slack).sub_(taken_off)
    down = down.sub_(frame.slack * size.square()).scatter_(1, own, torch.inf)
    nearest, highest = own.gather(1, up.argmin(dim=1, keepdim=True)), up.amin(dim=1, keepdim=True)
    if bound == "triangle":
        # nothing cancels in a sum of distances, and there is no product to be had for it
        lengths = squared_distances(embeddings, clusters.centroids).sqrt()
        radii = (down - highest) / (lengths + lengths.gather(1, nearest))
        return _or_nothing(radii.scatter_(1, own, torch.inf).amin(dim=1))
    torch.index_select(frame.inverse_lengths, 0, nearest.squeeze(1), out=lower)
    lower.mul_(torch.sub(down, highest, out=reach))
    if bound == "nearest":
        return _or_nothing(lower.amin(dim=1))

    def pairwise(rows: Tensor, rival: Tensor) -> Tensor:
        gaps = down[rows, rival][:, None] - up[rows]
        return _or_nothing((gaps * frame.inverse_lengths[own[rows], rival[:, None]]).amax(dim=1))

    def exact(rows: Tensor, rival: Tensor) -> Tensor:
        normals = frame.centroids[rival][:, None].double() - frame.centroids[own[rows]].double()
        gaps = down[rows, rival][:, None].double() - up[rows].double()
        together = least_norm(normals, gaps.nan_to_num(nan=0.0)).to(lower)
        return pairwise(rows, rival).maximum(_or_nothing(together))

    return _least(lower, pairwise if bound == "pairwise" else exact)


def _least(
    lower: Float[Tensor, "batch cluster"], radius: Callable[[Tensor, Tensor], Tensor]
) -> Float[Tensor, " batch"]:
    """The least radius over the rivals, which are tried in the order of a lower bound, as long as that is lower.

    Args:
        lower: of each rival's radius; infinity for no rival. It is used up.
        radius: (rows, a rival for each) -> the radius against it.
    """
    best = torch.full_like(lower[:, 0], torch.inf)
    rows, tried = torch.arange(len(lower), device=lower.device), lower
    while len(rows):
        rival = tried.min(dim=1).indices
        best[rows] = best[rows].minimum(radius(rows, rival))
        tried.scatter_(1, rival[:, None], torch.inf)
        # not "lower < best": what is not a number has to be tried
        left = (~(tried.amin(dim=1) >= best[rows]) & (best[rows] > 0)).nonzero().squeeze(1)
        rows, tried = rows[left], tried[left]
    return best


def _or_nothing(radius: Float[Tensor, " batch"]) -> Float[Tensor, " batch"]:
    """No radius is negative; where a square has overflowed nothing is known."""
    return radius.nan_to_num(nan=0.0, posinf=0.0).clamp_min(0)


def _own_clusters(clusters: Clusters, predicted: Int[Tensor, " batch"]) -> Int[Tensor, "batch slot"]:
    """Indices of the predicted class's clusters; the first of them again where the class has fewer than others."""
    columns, filled = clusters.by_class
    return columns.where(filled, columns[:, :1])[predicted]


def _vote_correction(clusters: Clusters, neighbours: int | None) -> Float[Tensor, " cluster"]:
    """sigma^2 times the log of how many clusters of each cluster's class can vote at once against us."""
    voters = torch.bincount(clusters.labels)[clusters.labels]
    if neighbours is not None:
        voters = voters.clamp_max(max(neighbours - 1, 1))
    return clusters.shared_variance * voters.to(clusters.centroids).log()


def _relative_rounding(embeddings: Tensor) -> float:
    """Bound on the relative error of a squared distance: one rounding for each of dim terms, and a few more."""
    return (embeddings.shape[1] + 16) * torch.finfo(embeddings.dtype).eps / 2


def _dtypes(one: Tensor, other: Tensor) -> tuple[torch.dtype, torch.dtype]:
    """Of an answer from both, the wider of the two; and of its computation, at least float32."""
    dtype = torch.promote_types(one.dtype, other.dtype)
    return dtype, torch.float32 if dtype in HALVES else dtype


def _rounded_down(radius: Float[Tensor, " batch"], dtype: torch.dtype) -> Float[Tensor, " batch"]:
    """The largest numbers of a dtype that exceed none of these, which are not negative."""
    rounded = radius.to(dtype)
    # the bits of positive numbers are ordered as they are
    bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize]
    return (rounded.view(bits) - (rounded.to(radius.dtype) > radius).to(bits)).view(dtype)


def _check_encoder(lipschitz: float, embedding_error: float) -> None:
    if not (lipschitz > 0 and math.isfinite(lipschitz)):
        raise ValueError(f"lipschitz: expected a positive finite number, got {lipschitz}")
    if not (embedding_error >= 0 and math.isfinite(embedding_error)):
        raise ValueError(f"embedding_error: expected 0 or a positive finite number, got {embedding_error}")


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
