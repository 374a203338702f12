"""A walk from cell to cell of the embedding: the attack that knows of clusters."""

from collections.abc import Callable

import torch
from jaxtyping import Int
from torch import Tensor, nn

from clustr_core.attacks.ball import Ball, Images, Walk, check_inputs, with_gradients
from clustr_core.attacks.gradient import restarted_search
from clustr_core.attacks.names import Norm
from clustr_core.attacks.result import AttackResult, logits_of, predicted, prepared
from clustr_core.models.classifiers import ClusterClassifier, LinearClassifier
from clustr_core.numerics.distances import squared_distances


@with_gradients
def cell_walk(
    model: nn.Module,
    images: Images,
    labels: Int[Tensor, " batch"],
    *,
    eps: float,
    step_size: float,
    steps: int,
    rivals: int = 3,
    norm: Norm = "linf",
    seed: int = 0,
) -> AttackResult:
    """PGD in the geometry of the embeddings: walk towards the nearest cells of other classes, one after the other.

    The r-th restart heads for the cell j that is r-th nearest to the clean embedding, and climbs the signed feature
    distance past its bisector, (min over own clusters i of d_i^2 - d_j^2) / (2 ||mu_j - mu_A||), A the nearest own
    cluster of the clean image. Nothing is exponentiated, so nothing can saturate. For a linear head the cell of class c
    is a half-space, and the distance (g_c - g_y) / ||w_c - w_y||.

    Args:
        model: a `ClusterClassifier` or a `LinearClassifier`.
        rivals: how many cells to head for, each from its own random start; at most as many as the class with the
            fewest clusters has; an image with fewer rivals heads for its last one again.
        eps, step_size, steps, norm, seed: as in `pgd`.
    Raises:
        TypeError: if the model has neither clusters nor a linear head.
        ValueError: as `pgd`.
    Source: this book; an adaptive attack in the sense of Tramer et al. 2020.
    """
    check_inputs(images, labels, norm=norm, eps=eps, step_size=step_size, steps=steps, restarts=rivals)
    if not isinstance(model, ClusterClassifier | LinearClassifier):
        raise TypeError(f"model: expected a ClusterClassifier or a LinearClassifier, got {type(model).__name__}")
    images, goals = prepared(model, images, labels)
    clean = predicted(model, images, goals)
    progress, cells = _progress(model, images, goals)

    def ascend(x: Images, which: Tensor, restart: int) -> tuple[Tensor, Tensor]:
        return logits_of(model, x), progress(model.embed(x), which, restart)

    ball, walk = Ball(eps, norm), Walk(step_size, steps, min(rivals, cells), seed)
    return restarted_search(model, ascend, images, goals, clean, ball, walk)


def _progress(
    model: ClusterClassifier | LinearClassifier, images: Images, labels: Tensor
) -> tuple[Callable[[Tensor, Tensor, int], Tensor], int]:
    """How far embeddings lie past the bisector to their r-th nearest rival cell, and how many rivals there are."""
    with torch.no_grad():
        embeddings = model.embed(images)
    if isinstance(model, ClusterClassifier):
        return _past_bisector(model, embeddings, labels)
    return _past_hyperplane(model, embeddings, labels)


def _past_bisector(
    model: ClusterClassifier, embeddings: Tensor, labels: Tensor
) -> tuple[Callable[[Tensor, Tensor, int], Tensor], int]:
    centroids = model.centroids
    own = model.labels == labels[:, None]
    distances = squared_distances(embeddings, centroids)
    nearest_distance, nearest = distances.masked_fill(~own, torch.inf).min(dim=1)
    lengths = 2 * squared_distances(centroids, centroids).sqrt()[nearest]
    # an own centroid on top of a rival gives no direction; any positive length keeps the order
    lengths = lengths.clamp_min(torch.finfo(lengths.dtype).tiny)
    order = ((distances - nearest_distance[:, None]) / lengths).masked_fill(own, torch.inf).argsort(dim=1)

    rivals = (~own).sum(dim=1)

    def progress(moved: Tensor, which: Tensor, restart: int) -> Tensor:
        target = order[which, (rivals[which] - 1).clamp_max(restart)][:, None]
        found = squared_distances(moved, centroids)
        back = found.masked_fill(~own[which], torch.inf).amin(dim=1)
        ahead, length = found.gather(1, target), lengths[which].gather(1, target)
        return (back - ahead.squeeze(1)) / length.squeeze(1)

    return progress, len(centroids) - int(model.labels.bincount().min())


def _past_hyperplane(
    model: LinearClassifier, embeddings: Tensor, labels: Tensor
) -> tuple[Callable[[Tensor, Tensor, int], Tensor], int]:
    weight = model.linear.weight.detach()
    lengths = squared_distances(weight, weight).sqrt()[labels].clamp_min(torch.finfo(weight.dtype).tiny)
    with torch.no_grad():
        logits = model.linear(embeddings)
    gaps = (logits.gather(1, labels[:, None]) - logits) / lengths
    order = gaps.scatter(1, labels[:, None], torch.inf).argsort(dim=1)

    def progress(moved: Tensor, which: Tensor, restart: int) -> Tensor:
        found, target = model.linear(moved), order[which, restart][:, None]
        ahead = found.gather(1, target) - found.gather(1, labels[which][:, None])
        return (ahead / lengths[which].gather(1, target)).squeeze(1)

    return progress, logits.shape[1] - 1
