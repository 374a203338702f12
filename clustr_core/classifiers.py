"""From images to logits: the cluster classifier and the linear one."""

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from clustr_core.clusters import Clusters
from clustr_core.distances import squared_distances
from clustr_core.one_lipschitz import orthogonal_linear

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

    Args:
        neighbours: let only that many nearest centroids vote (the paper's L); None lets all vote. A class without
            a vote gets a finite logit below that of every class with one.
    Raises:
        ValueError: if ``neighbours`` is not positive, or the embeddings' dimension is not the centroids'.
    Source: Alfarra et al. 2021, section 3, in the log domain.
    """
    _check(embeddings, clusters, neighbours)
    distances = squared_distances(embeddings, clusters.centroids)
    exponents = -distances / (2 * clusters.variance)
    if neighbours is None or neighbours >= len(clusters.centroids):
        return clusters.gather_by_class(exponents, -torch.inf).logsumexp(dim=2)
    votes = torch.zeros_like(exponents, dtype=torch.bool)
    votes.scatter_(1, distances.topk(neighbours, dim=1, largest=False).indices, True)
    own = clusters.gather_by_class(exponents, -torch.inf)
    voting = clusters.gather_by_class(votes, False)
    logits = own.masked_fill(~voting, -torch.inf).logsumexp(dim=2)
    return _place_below(logits, own.amax(dim=2), voting.any(dim=2))


def nearest_logits(embeddings: Float[Tensor, "batch dim"], clusters: Clusters) -> Float[Tensor, "batch class"]:
    """-min_{j in c} d_j^2 / (2 mean sigma^2): the largest class is that of the nearest centroid."""
    _check(embeddings, clusters, None)
    exponents = -squared_distances(embeddings, clusters.centroids) / (2 * clusters.variance.mean())
    return clusters.gather_by_class(exponents, -torch.inf).amax(dim=2)


def _place_below(logits: Tensor, nearest: Tensor, has_vote: Tensor) -> Tensor:
    """Put each class without a vote below every class with one, yet keep it finite and its gradient alive."""
    lowest = logits.masked_fill(~has_vote, torch.inf).amin(dim=1, keepdim=True)
    below = torch.minimum(nearest, lowest.detach())
    step = 1 + below.detach().abs() * 4 * torch.finfo(logits.dtype).eps
    return torch.where(has_vote, logits, (below - step).clamp_min(torch.finfo(logits.dtype).min))


def _check(embeddings: Tensor, clusters: Clusters, neighbours: int | None) -> None:
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
        self._parts: tuple[Tensor, Tensor, Tensor] | tuple[()] = ()

    @property
    def clusters(self) -> Clusters:
        """The clusters, on the module's device; rebuilt (and checked) only after the module has moved."""
        parts = (self.centroids, self.labels, self.variance)
        # learnable centroids stay one parameter when the module moves, so the others have to tell
        if self._clusters is None or any(mine is not theirs for mine, theirs in zip(parts, self._parts, strict=True)):
            self._parts = parts
            self._clusters = Clusters(self.centroids, self.labels, self.variance)
        return self._clusters

    def embed(self, images: Float[Tensor, "batch channel height width"]) -> Float[Tensor, "batch dim"]:
        """The encoder's output."""
        return self.encoder(images)

    def forward(self, images: Float[Tensor, "batch channel height width"]) -> Float[Tensor, "batch class"]:
        """Log-domain logits under the model's rule."""
        embeddings = self.embed(images)
        if self.rule == "nearest":
            return nearest_logits(embeddings, self.clusters)
        return cluster_logits(embeddings, self.clusters, neighbours=self.neighbours)
