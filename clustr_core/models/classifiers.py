"""From images to logits: the cluster classifier and the linear one."""

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from clustr_core.models.clusters import Clusters, Seen, check_are_clusters
from clustr_core.models.one_lipschitz import orthogonal_linear
from clustr_core.numerics.checks import check_are_tensors
from clustr_core.numerics.chunks import rows_within
from clustr_core.numerics.derivatives import Gradients, gradients_of
from clustr_core.numerics.distances import mean_centroid, squared_distances
from clustr_core.numerics.kernels import dispatch
from clustr_core.numerics.rounding import HALF_DTYPES, full_precision, given_and_working_dtype

Rule = Literal["soft", "nearest"]


def cluster_logits(
    embeddings: Float[Tensor, "batch dim"],
    clusters: Clusters,
    *,
    neighbours: int | None = None,
) -> Float[Tensor, "batch class"]:
    """g_c(z) = logsumexp over the clusters j of class c of -d_j^2 / (2 sigma_j^2).

    The paper's score is exp(g_c), which underflows a few sigma away from every centroid; its logarithm does not,
    and has the same largest class.

    Without gradient, memory does not grow with embeddings times clusters; for the backward pass every vote is kept
    (by the kernel on a GPU it is computed again).

    Args:
        neighbours: let only that many nearest centroids vote (the paper's L); None lets all vote. A class without
            a vote gets a finite logit below that of every class with one.
    Raises:
        ValueError: if ``neighbours`` is not positive, or the embeddings' dimension is not the centroids'.
    Source: Alfarra et al. 2021, section 3, in the log domain.
    """
    check_voters(embeddings, clusters, neighbours)
    dtype, _ = given_and_working_dtype(embeddings, clusters.centroids)
    embeddings, clusters = embeddings.to(dtype), clusters.to(dtype)
    kernel = dispatch("cluster_logits", lambda *_: _plain_logits(embeddings, clusters, neighbours), embeddings)
    return kernel(embeddings, clusters.centroids, clusters.labels, clusters.variance, clusters.num_classes, neighbours)


def _plain_logits(
    embeddings: Float[Tensor, "batch dim"], clusters: Clusters, neighbours: int | None
) -> Float[Tensor, "batch class"]:
    """`cluster_logits` in plain PyTorch; half precision is computed in float32."""
    if embeddings.dtype in HALF_DTYPES:
        return _plain_logits(embeddings.float(), clusters.to(torch.float32), neighbours).to(embeddings.dtype)
    if neighbours is None or neighbours >= len(clusters.centroids):
        if clusters.variance.requires_grad:
            # the gradients by hand are those of embeddings and centroids alone
            return _formula(embeddings, clusters)
        logits: Tensor = _AllVotes.apply(embeddings, clusters.centroids, clusters)  # pyright: ignore[reportAssignmentType]
        return logits
    rows = rows_within(len(clusters.centroids), embeddings.dtype)
    return torch.cat([_few_votes(part, clusters, neighbours) for part in embeddings.split(rows)])


def _formula(embeddings: Float[Tensor, "batch dim"], clusters: Clusters) -> Float[Tensor, "batch class"]:
    """The logits of all votes as the formula says: differentiable in everything, and as often as one likes."""
    exponents = -squared_distances(embeddings, clusters.centroids) / (2 * clusters.variance)
    return clusters.gather_by_class(exponents, -torch.inf).logsumexp(dim=2)


def _few_votes(
    embeddings: Float[Tensor, "batch dim"], clusters: Clusters, neighbours: int
) -> Float[Tensor, "batch class"]:
    distances = squared_distances(embeddings, clusters.centroids)
    exponents = -distances / (2 * clusters.variance)
    votes = torch.zeros_like(exponents, dtype=torch.bool)
    votes.scatter_(1, distances.topk(neighbours, dim=1, largest=False).indices, True)
    own = clusters.gather_by_class(exponents, -torch.inf)
    voting = clusters.gather_by_class(votes, False)
    logits = own.masked_fill(~voting, -torch.inf).logsumexp(dim=2)
    return _place_below(logits, own.amax(dim=2), voting.any(dim=2))


def nearest_logits(embeddings: Float[Tensor, "batch dim"], clusters: Clusters) -> Float[Tensor, "batch class"]:
    """-min_{j in c} d_j^2 / (2 mean sigma^2): the largest class is that of the nearest centroid.

    Two dtypes are promoted; half precision is computed in float32, as in `cluster_logits`.
    """
    check_voters(embeddings, clusters, None)
    dtype, wide = given_and_working_dtype(embeddings, clusters.centroids)
    embeddings, clusters = embeddings.to(wide), clusters.to(wide)
    rows = rows_within(len(clusters.centroids), wide)
    return torch.cat([_nearest_votes(part, clusters) for part in embeddings.split(rows)]).to(dtype)


def _nearest_votes(embeddings: Float[Tensor, "batch dim"], clusters: Clusters) -> Float[Tensor, "batch class"]:
    exponents = -squared_distances(embeddings, clusters.centroids) / (2 * clusters.variance.mean())
    return clusters.gather_by_class(exponents, -torch.inf).amax(dim=2)


class _Votes(NamedTuple):
    """Of a chunk of embeddings: where they are, each vote over its class's highest, that highest (log), their sum."""

    points: Float[Tensor, "batch dim"]
    votes: Float[Tensor, "batch slot class"]
    highest: Float[Tensor, "batch class"]
    total: Float[Tensor, "batch class"]


@dataclass(frozen=True)
class PackedClusters:
    """The clusters as one matrix product wants them: slot by slot (the first of each class, then the second ...).

    Seen from the centroids' mean, in units of the first cluster's sigma, a vote is
    ratio_j (z . mu_j - ||mu_j||^2 / 2 - ||z||^2 / 2) with ratio_j = sigma_1^2 / sigma_j^2: the logarithm of
    exp(-d_j^2 / (2 sigma_j^2)) with no more digits lost than its row's largest exponent has.
    """

    order: Int[Tensor, " slot_class"]
    empty: Bool[Tensor, " slot_class"]
    num_classes: int
    origin: Float[Tensor, " dim"]
    sigma: Float[Tensor, ""]
    ratios: Float[Tensor, " slot_class"]
    weights: Float[Tensor, "slot_class dim"]
    constants: Float[Tensor, " slot_class"]
    shared: bool

    @classmethod
    def of(cls, clusters: Clusters) -> "PackedClusters":
        """Pack clusters."""
        columns, filled = clusters.by_class
        order, empty = columns.T.flatten(), ~filled.T.flatten()
        # in this order from here on, so that the clusters' own order changes no bit
        centroids, variance = clusters.centroids.index_select(0, order), clusters.variance[order]
        sigma, origin = variance[0].sqrt(), mean_centroid(centroids)
        ratios = variance[0] / variance
        shared = clusters.all_alike
        scaled = centroids.sub_(origin).div_(sigma)
        weights = scaled if shared else ratios[:, None] * scaled
        constants = torch.linalg.vecdot(weights, scaled).div_(-2).masked_fill_(empty, -torch.inf)
        return cls(order, empty, len(columns), origin, sigma, ratios, weights, constants, shared)

    def votes(self, embeddings: Tensor) -> _Votes:
        """The votes on some embeddings."""
        points = (embeddings - self.origin).div_(self.sigma)
        squares = points.square().sum(dim=1)
        exponents = torch.addmm(self.constants, points, self.weights.T)
        if not self.shared:
            exponents.addr_(squares, self.ratios, alpha=-0.5)
        votes = exponents.unflatten(1, (-1, self.num_classes))
        highest = votes.amax(dim=1)
        # votes too small to matter would be denormal in the products to come, which are slow
        votes = torch.threshold_(votes.sub_(highest[:, None]).exp_(), torch.finfo(votes.dtype).tiny ** 0.75, 0.0)
        if self.shared:
            highest.sub_(squares[:, None], alpha=0.5)
        return _Votes(points, votes, highest, votes.sum(dim=1))

    def rows(self) -> int:
        """So many embeddings at once that a chunk's votes stay in a core's cache."""
        return rows_within(len(self.order), self.weights.dtype)


class _AllVotes(torch.autograd.Function):
    """`cluster_logits` of all votes, chunk by chunk; the backward pass reuses the votes."""

    @staticmethod
    def forward(ctx: Any, embeddings: Tensor, centroids: Tensor, clusters: Clusters) -> Tensor:
        with full_precision(embeddings.device):
            packed = PackedClusters.of(clusters)
            rows, kept = packed.rows(), []
            logits = embeddings.new_empty(len(embeddings), packed.num_classes)
            for part, out in zip(embeddings.split(rows), logits.split(rows), strict=True):
                points, votes, highest, total = packed.votes(part)
                torch.add(highest, total.log(), out=out)
                if any(ctx.needs_input_grad):
                    kept += [points, votes, total]
        ctx.packed = packed
        # as they are now, whatever is written to them before the backward pass
        ctx.constants = clusters.labels.clone(), clusters.variance.clone()
        ctx.save_for_backward(embeddings, centroids, *kept)
        return logits

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        embeddings, centroids, *kept = ctx.saved_tensors
        of_embeddings, of_centroids = gradients_of(
            lambda points, targets: _formula(points, Clusters(targets, *ctx.constants)),
            (embeddings, centroids),
            (gradient,),
            lambda above: _gradients_of_votes(ctx.packed, kept, above, centroids if ctx.needs_input_grad[1] else None),
        )
        return of_embeddings, of_centroids, None


def _gradients_of_votes(
    packed: PackedClusters, kept: list[Tensor], above: Tensor, centroids: Tensor | None
) -> Gradients:
    """d/dz = sum_j share_j ratio_j (mu_j - z), minus each term for its mu_j; a share is a vote over its total.

    Args:
        centroids: None where their gradient is not wanted.
    """
    of_embeddings = above.new_empty(len(above), packed.weights.shape[1])
    pulls, share_of = torch.zeros_like(packed.weights), torch.zeros_like(packed.ratios)
    rows = packed.rows()
    # one buffer for all chunks: fresh memory costs more than the arithmetic
    buffer = torch.empty_like(kept[1]) if kept else above
    # into units of sigma, as everything here
    scaled = above / packed.sigma
    chunks = zip(kept[::3], kept[1::3], kept[2::3], scaled.split(rows), of_embeddings.split(rows), strict=True)
    with full_precision(above.device):
        for points, votes, total, part, out in chunks:
            shares = torch.mul(votes, (part / total)[:, None], out=buffer[: len(points)]).flatten(1)
            # the shares of a class add up to what comes from above
            own = part.sum(dim=1) if packed.shared else shares @ packed.ratios
            torch.mul(points, own.neg_()[:, None], out=out).addmm_(shares, packed.weights)
            if centroids is not None:
                pulls.addmm_(shares.T, points)
                share_of += shares.sum(dim=0)
    if centroids is None:
        return of_embeddings, None
    moved = packed.ratios[:, None] * pulls - share_of[:, None] * packed.weights
    return of_embeddings, torch.zeros_like(centroids).index_add_(0, packed.order, moved)


def _place_below(logits: Tensor, nearest: Tensor, has_vote: Tensor) -> Tensor:
    """Put each class without a vote below every class with one, yet keep it finite and its gradient alive."""
    lowest = logits.masked_fill(~has_vote, torch.inf).amin(dim=1, keepdim=True)
    below = torch.minimum(nearest, lowest.detach())
    step = 1 + below.detach().abs() * 4 * torch.finfo(logits.dtype).eps
    return torch.where(has_vote, logits, (below - step).clamp_min(torch.finfo(logits.dtype).min))


def check_voters(embeddings: Tensor, clusters: Clusters, neighbours: int | None) -> None:
    """Raises a ValueError unless the embeddings are of the centroids' dimension, and ``neighbours`` is positive, and a
    TypeError unless they are tensors and clusters."""
    check_are_tensors(embeddings=embeddings)
    check_are_clusters(clusters)
    if embeddings.shape[-1] != clusters.centroids.shape[1]:
        raise ValueError(
            f"embeddings: expected dimension {clusters.centroids.shape[1]} as the centroids', "
            f"got {embeddings.shape[-1]}"
        )
    if neighbours is not None and neighbours < 1:
        raise ValueError(f"neighbours: expected a positive number or None, got {neighbours}")


class LinearClassifier(nn.Module):
    """An encoder and a linear head: images in [0, 1] -> logits.

    Args:
        orthonormal: the rows of the head are orthonormal: it is 1-Lipschitz, and each pair of rows sqrt(2) apart.
    """

    def __init__(self, encoder: nn.Module, embedding_dim: int, num_classes: int, *, orthonormal: bool = False) -> None:
        super().__init__()
        self.encoder = encoder
        self.linear = (orthogonal_linear if orthonormal else nn.Linear)(embedding_dim, num_classes)

    def embed(self, images: Float[Tensor, "batch channel height width"]) -> Float[Tensor, "batch dim"]:
        """The encoder's output."""
        return self.encoder(images)

    def forward(self, images: Float[Tensor, "batch channel height width"]) -> Float[Tensor, "batch class"]:
        """Logits of the linear head."""
        return self.linear(self.embed(images))


class ClusterClassifier(nn.Module):
    """An encoder and clusters of its embeddings: images in [0, 1] -> log-domain logits.

    Args:
        rule: "soft" predicts argmax_c g_c(z), all centroids voting (or the ``neighbours`` nearest);
            "nearest" predicts the class of the nearest centroid.
        neighbours: how many centroids vote under the soft rule; None for all.
        learnable: centroids are a parameter, which training moves, and not a buffer.
    Raises:
        TypeError: if ``clusters`` are no `Clusters`.
        ValueError: if ``rule`` is unknown, or ``neighbours`` is given with the nearest rule, where nothing votes.
    """

    centroids: Tensor
    labels: Tensor
    variance: Tensor

    def __init__(
        self,
        encoder: nn.Module,
        clusters: Clusters,
        *,
        rule: Rule = "soft",
        neighbours: int | None = None,
        learnable: bool = False,
    ) -> None:
        super().__init__()
        check_are_clusters(clusters)
        if rule not in ("soft", "nearest"):
            raise ValueError(f'rule: expected "soft" or "nearest", got {rule!r}')
        if rule == "nearest" and neighbours is not None:
            raise ValueError(f'neighbours: expected None with rule="nearest", got {neighbours}')
        if neighbours is not None and neighbours < 1:
            raise ValueError(f"neighbours: expected a positive number or None, got {neighbours}")
        self.encoder = encoder
        self.rule: Rule = rule
        self.neighbours = neighbours
        centroids = clusters.centroids.detach().clone()
        if learnable:
            self.centroids = nn.Parameter(centroids)
        else:
            self.register_buffer("centroids", centroids)
        self.register_buffer("labels", clusters.labels.clone())
        self.register_buffer("variance", clusters.variance.clone())
        self._clusters: Clusters | None = None
        self._seen: Seen | None = None

    @property
    def clusters(self) -> Clusters:
        """The clusters as they are now, on the module's device: made, and checked, again whenever any part was
        replaced or written to (loaded, moved, assigned, changed in place).

        Learnable centroids are written to at every step of training; of these only a replacement counts, so that a step
        waits for no check. They are read afresh at every use in any case.
        """
        learnt = isinstance(self.centroids, nn.Parameter)
        watched = (self.labels, self.variance) if learnt else (self.centroids, self.labels, self.variance)
        known, seen = self._clusters, self._seen
        if known is None or seen is None or known.centroids is not self.centroids or not seen.unchanged(*watched):
            self._clusters, self._seen = Clusters(self.centroids, self.labels, self.variance), Seen(*watched)
            return self._clusters
        return known

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, local_metadata: dict[str, Any], *rest: Any
    ) -> None:
        """Refuse a state with which the clusters would be none, before anything is loaded.

        Raises:
            ValueError: as `Clusters`.
        """
        own = {"centroids": self.centroids, "labels": self.labels, "variance": self.variance}
        given = {name: state_dict[f"{prefix}{name}"] for name in own if f"{prefix}{name}" in state_dict}
        # another shape is PyTorch's to name
        if given and all(isinstance(each, Tensor) and each.shape == own[name].shape for name, each in given.items()):
            if not local_metadata.get("assign_to_params_buffers", False):
                # into what is there it is written, and cast: a float64 may become infinite (labels are not cast unseen)
                given = {
                    name: each.to(own[name].device) if name == "labels" else each.to(own[name])
                    for name, each in given.items()
                }
            Clusters(**own | given)
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *rest)

    def embed(self, images: Float[Tensor, "batch channel height width"]) -> Float[Tensor, "batch dim"]:
        """The encoder's output."""
        return self.encoder(images)

    def forward(self, images: Float[Tensor, "batch channel height width"]) -> Float[Tensor, "batch class"]:
        """Log-domain logits under the model's rule, at least in float32."""
        return self.classify(self.embed(images))

    def classify(self, embeddings: Float[Tensor, "batch dim"]) -> Float[Tensor, "batch class"]:
        """Log-domain logits of embeddings under the model's rule, at least in float32.

        Logits rounded to half precision would tie, and their largest not be the class that `certify` speaks of.
        """
        clusters = self.clusters
        _, wide = given_and_working_dtype(embeddings, clusters.centroids)
        embeddings = embeddings.to(wide)
        if self.rule == "nearest":
            return nearest_logits(embeddings, clusters)
        return cluster_logits(embeddings, clusters, neighbours=self.neighbours)
