"""The hard ladder in feature space: triangle, nearest, pairwise, exact, from one matrix product."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from clustr_core.certificates.names import HardBound
from clustr_core.certificates.polyhedron import least_norm
from clustr_core.models.classifiers import Rule, cluster_logits
from clustr_core.models.clusters import Clusters
from clustr_core.numerics.chunks import rows_within
from clustr_core.numerics.distances import mean_centroid, squared_distances
from clustr_core.numerics.rounding import relative_rounding


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


def frame_of(clusters: Clusters, relative: float, neighbours: int | None, *, votes: bool) -> _Frame:
    """What the clusters give to all chunks."""
    origin = mean_centroid(clusters.centroids)
    centroids = clusters.centroids - origin
    correction = _vote_correction(clusters, neighbours) if votes else torch.zeros_like(centroids[:, 0])
    return _Frame(origin, centroids, centroids.norm(dim=1), _inverse_lengths(clusters), correction, relative / 2)


def _inverse_lengths(clusters: Clusters) -> Float[Tensor, "cluster cluster"]:
    """1 / ||mu_i - mu_j|| of clusters of different classes, rounded down but for the last rounding to their dtype.

    From one product in float64, where rounding only makes a length longer; from differences where that would show.
    """
    wide = clusters.centroids.double()
    wide = wide - mean_centroid(wide)
    squares, norms = wide.square().sum(dim=1), wide.norm(dim=1)
    relative = relative_rounding(wide)
    table = torch.empty(len(wide), len(wide), dtype=clusters.centroids.dtype, device=wide.device)
    rows = rows_within(len(wide), wide.dtype)
    parts = (each.split(rows) for each in (wide, squares, norms, clusters.labels, table))
    for part, square, norm, label, out in zip(*parts, strict=True):
        reach = (norms + norm[:, None]) ** 2
        longest = torch.addmm(squares, part, wide.T, alpha=-2) + square[:, None] + 2 * relative * reach
        near = (longest < 1e-3 * reach) & (label[:, None] != clusters.labels)
        if near.any():
            longest = longest.where(~near, squared_distances(part, wide) * (1 + 2 * relative))
        out.copy_(longest.clamp_min(0).rsqrt())
    return table


def pairwise_by_kernel(
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


def hard_feature_radius(
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
    up = halves.gather(1, own)
    # before what is rounded up may overflow
    closest = up.argmin(dim=1, keepdim=True)
    # own clusters rounded up, rivals down, so that every difference is at most (d_j^2 - d_i^2) / 2
    up = up + frame.slack * (size + frame.norms[own]) ** 2 + frame.underflow
    taken_off = frame.slack * frame.norms.square() + frame.correction + frame.underflow
    down = halves.addr_(size.squeeze(1), frame.norms, alpha=-2 * frame.slack).sub_(taken_off)
    down = down.sub_(frame.slack * size.square()).scatter_(1, own, torch.inf)
    nearest, highest = own.gather(1, closest), up.gather(1, closest)
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
