"""Feature radii of the soft rule, from the loosest to the tightest: one shared variance, and every centroid votes.

Everything rests on one inequality. For weights q on the own class c, mu_q = sum_i q_i mu_i and H the entropy, at a
distance rho from z and for every other class B

    g_c >= H(q) - sum_i q_i d_i^2 / 2 sigma^2 + <v, mu_q> / sigma^2 + ...   (Gibbs)
    g_B <= logsumexp_{j in B}(-d_j^2 / 2 sigma^2 + <v, mu_j> / sigma^2) + ...

with the same terms left out, so that c stays ahead of B as long as

    logsumexp_{j in B}(-d_j^2 / 2 sigma^2 + rho ||mu_j - mu_q|| / sigma^2) <= H(q) - sum_i q_i d_i^2 / 2 sigma^2.   (*)
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from clustr_core.certificates.names import SoftBound
from clustr_core.certificates.polyhedron import multipliers
from clustr_core.models.clusters import Clusters
from clustr_core.numerics.chunks import rows_within
from clustr_core.numerics.distances import mean_centroid, squared_distances

# each halves what is left between a safe radius and one too large: 48 of them leave a rounding
BISECTIONS = 48
# of the dual's weights towards those at the point where an attack is expected
REFINEMENTS = 12


def soft_radius(
    embeddings: Float[Tensor, "batch dim"],
    clusters: Clusters,
    predicted: Int[Tensor, " batch"],
    *,
    bound: SoftBound,
    relative: float = 0.0,
) -> Float[Tensor, " batch"]:
    """Feature radius inside which no other class B gets ahead of the predicted class c, min over B.

        soft-global  (g_c - g_B) sigma^2 / max_{i in c, j in B} ||mu_i - mu_j||
        soft-local   (g_c - g_B) sigma^2 / max_{j in B} ||mu_j - mu_q||,  q the votes' shares in class c at z
        soft-lse     the largest rho with (*) at the same q, from below
        soft-dual    the largest rho with (*) at the best q found: every q is sound

    All is computed in float64, for some embeddings at a time.

    Args:
        relative: the share of itself by which a squared distance may be off.
    Raises:
        ValueError: if the variances differ.
    Source: this book, chapter 2.
    """
    clusters = clusters.to(torch.float64)
    between = _Between.of(clusters)
    farthest = _farthest_between(clusters) if bound == "soft-global" else None
    rows = rows_within(between.squares.numel() * between.squares.shape[1], torch.float64)

    def of(part: Tensor, own: Tensor) -> Tensor:
        votes = _Votes(part.double(), clusters, between, own, relative)
        if farthest is not None:
            radii = votes.margins * votes.variance / farthest[own]
        elif bound == "soft-local":
            radii = votes.margins / votes.pulls(votes.shares).amax(dim=2)
        elif bound == "soft-lse":
            radii = votes.reach(votes.shares)
        else:
            radii = _dual(votes)
        # no margin and no way to lose it, where all centroids of two classes coincide, is 0 / 0
        radii = radii.masked_fill(radii.isnan(), 0).masked_fill(votes.is_own_class, torch.inf)
        return radii.amin(dim=1).clamp_min(0)

    return torch.cat([of(*each) for each in zip(embeddings.split(rows), predicted.split(rows), strict=True)])


@dataclass(frozen=True)
class _Between:
    """What all embeddings share: the centroids' Gram matrix, and their squared norms by class."""

    gram: Float[Tensor, "cluster cluster"]
    squares: Float[Tensor, "class slot"]
    rounding: Float[Tensor, ""]

    @classmethod
    def of(cls, clusters: Clusters) -> "_Between":
        # lengths do not change when the origin moves, and are least rounded with it in the middle
        centred = clusters.centroids - mean_centroid(clusters.centroids)
        gram = centred @ centred.T
        squares = gram.diagonal()[clusters.by_class[0]]
        rounding = 8 * (clusters.centroids.shape[1] + 8) * torch.finfo(gram.dtype).eps * squares.amax()
        return cls(gram, squares, rounding)


class _Votes:
    """A batch's log-votes -d^2 / 2 sigma^2, own ones rounded down and rival ones up."""

    def __init__(
        self, embeddings: Tensor, clusters: Clusters, between: _Between, predicted: Tensor, relative: float
    ) -> None:
        columns, self.filled = clusters.by_class
        own_index, self.own_filled = columns[predicted], self.filled[predicted]
        self.variance = clusters.shared_variance
        log_votes = -squared_distances(embeddings, clusters.centroids) / (2 * self.variance)
        own = log_votes.gather(1, own_index) * (1 + relative)
        self.own = own.masked_fill(~self.own_filled, -torch.inf)
        self.rivals = clusters.gather_by_class(log_votes * (1 - relative), -torch.inf)
        self.margins = self.own.logsumexp(dim=1)[:, None] - self.rivals.logsumexp(dim=2)
        self.shares = self.own.softmax(dim=1)[:, None, :]
        classes = torch.arange(clusters.num_classes, device=predicted.device)
        self.is_own_class = classes == predicted[:, None]
        self.squares, self.rounding = between.squares, between.rounding
        rows = between.gram[own_index]
        self.own_rivals = rows[:, :, columns]
        self.own_own = rows.gather(2, own_index[:, None, :].expand(-1, own_index.shape[1], -1))

    def pulls(self, weights: Float[Tensor, "batch one_or_class slot"]) -> Float[Tensor, "batch class slot"]:
        """||mu_j - mu_q|| / sigma^2, rounded up: how fast a rival's vote can gain; 0 where there is no cluster."""
        inner = self._inner(weights)
        own = (weights @ self.own_own * weights).sum(dim=2)[:, :, None]
        lengths = (self.squares - 2 * inner + own + self.rounding).clamp_min(0).sqrt()
        return lengths.masked_fill(~self.filled, 0) / self.variance

    def reach(self, weights: Float[Tensor, "batch one_or_class slot"]) -> Float[Tensor, "batch class"]:
        """The largest rho with (*), from below, for each rival class; 0 if there is none."""
        pulls = self.pulls(weights)
        votes = (weights * self.own.masked_fill(~self.own_filled, 0)[:, None]).sum(dim=2)
        level = votes - torch.special.xlogy(weights, weights).sum(dim=2)
        sizes = self.rivals.masked_fill(~self.filled, 0).abs().amax(dim=2) + level.abs() + 1
        level = level - 64 * torch.finfo(level.dtype).eps * sizes
        gap = level - self.rivals.logsumexp(dim=2)
        # the fastest rival alone cannot do it sooner, and all of them as fast as it not later
        low = (gap / pulls.amax(dim=2)).clamp_min(0)
        singles = (level[:, :, None] - self.rivals) / pulls
        high = singles.masked_fill(~self.filled, torch.inf).amin(dim=2).maximum(low)
        for _ in range(BISECTIONS):
            middle = (low + high) / 2
            fits = (self.rivals + middle[:, :, None] * pulls).logsumexp(dim=2) <= level
            low, high = torch.where(fits, middle, low), torch.where(fits, high, middle)
        return torch.where(gap > 0, low, 0)

    def expected(self, weights: Tensor, radius: Tensor) -> Float[Tensor, "batch class slot"]:
        """The own votes' log-shares where an attack of this radius is expected, along the rivals' mean direction."""
        pulls = self.pulls(weights).clamp_min(torch.finfo(weights.dtype).tiny)
        force = (self.rivals + radius[:, :, None] * pulls).softmax(dim=2) / pulls
        # <mu_q - mu_j, mu_i>, summed over the rivals j with their force
        towards_own = weights @ self.own_own * force.sum(dim=2, keepdim=True)
        towards_rivals = torch.einsum("bcs,bkcs->bck", force, self.own_rivals)
        tilt = (towards_own - towards_rivals) * radius[:, :, None] / self.variance**2
        return (self.own[:, None] - tilt).log_softmax(dim=2)

    def hard_weights(self) -> Float[Tensor, "batch class slot"]:
        """The multipliers of the nearest rule's exact radius to each class's nearest rival, as weights."""
        nearest = self.rivals.argmax(dim=2)[:, :, None]
        to_rival = self.own_rivals.gather(3, nearest[:, None].expand(-1, self.own.shape[1], -1, -1)).squeeze(3)
        to_rival = to_rival.transpose(1, 2)
        square = self.squares.expand(len(nearest), -1, -1).gather(2, nearest)
        gram = self.own_own[:, None] - to_rival[:, :, :, None] - to_rival[:, :, None, :] + square[..., None]
        lengths = gram.diagonal(dim1=2, dim2=3).clamp_min(torch.finfo(gram.dtype).tiny).sqrt()
        offsets = (self.own[:, None] - self.rivals.gather(2, nearest)) * self.variance / lengths
        offsets = offsets.masked_fill(~self.own_filled[:, None], -torch.inf)
        unit = gram / lengths[..., None] / lengths[:, :, None, :]
        found = multipliers(unit.flatten(0, 1), offsets.flatten(0, 1)).unflatten(0, offsets.shape[:2]) / lengths
        total = found.sum(dim=2, keepdim=True)
        return torch.where(total > 0, found / total.where(total > 0, 1), self.shares)

    def _inner(self, weights: Tensor) -> Float[Tensor, "batch class slot"]:
        """<mu_j, mu_q>, with one q for all classes or one for each."""
        return torch.einsum("bck,bkcs->bcs", weights.expand(-1, len(self.filled), -1), self.own_rivals)


def _dual(votes: _Votes) -> Float[Tensor, "batch class"]:
    """The best radius over the weights that are tried: the shares at z, each own cluster alone, the hard rule's, ..."""
    best, weights = votes.reach(votes.shares), votes.shares.expand(-1, len(votes.filled), -1)

    def try_also(trial: Tensor) -> Tensor:
        nonlocal best, weights
        found = votes.reach(trial)
        improved = found > best
        best, weights = torch.where(improved, found, best), torch.where(improved[:, :, None], trial, weights)
        return improved

    slots = votes.own.shape[1]
    for slot, alone in enumerate(torch.eye(slots, dtype=votes.own.dtype, device=votes.own.device)):
        # an empty slot stands for no cluster: the shares again
        try_also(torch.where(votes.own_filled[:, slot, None, None], alone, votes.shares))
    try_also(votes.hard_weights())
    step = torch.ones_like(best)
    for _ in range(REFINEMENTS):
        known = weights.clamp_min(torch.finfo(weights.dtype).tiny).log()
        expected = votes.expected(weights, best.clamp_max(torch.finfo(best.dtype).max))
        trial = torch.lerp(known, expected, step[:, :, None]).softmax(dim=2) * votes.own_filled[:, None]
        step = torch.where(try_also(trial), step, step / 2)
    return best


def _farthest_between(clusters: Clusters) -> Float[Tensor, "class class"]:
    """max ||mu_i - mu_j|| over the clusters of each two classes."""
    between = squared_distances(clusters.centroids, clusters.centroids).sqrt()
    rows = clusters.gather_by_class(between, 0.0).amax(dim=2)
    return clusters.gather_by_class(rows.T, 0.0).amax(dim=2).T
