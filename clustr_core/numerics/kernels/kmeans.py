"""k-means within each class on a GPU: all classes of a size at once, in plain PyTorch, the same bits for the same seed.

The points of a class are one row of a table, padded to the largest class, so that distances and sums are batched
products; classes of very different sizes go into tables of their own. At these sizes an iteration is a microsecond of
arithmetic between launches, so that a kernel of its own cannot win: an earlier one in Triton was slower than plain
PyTorch on an H100. This form has not been timed on a GPU.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from clustr_core.numerics.groups import table_by_class
from clustr_core.numerics.kernels import register
from clustr_core.numerics.rounding import HALF_DTYPES, full_precision


@register("kmeans", "cuda")
@torch.no_grad()
def kmeans(
    points: Float[Tensor, "point dim"],
    labels: Int[Tensor, " point"],
    per_class: int,
    n_init: int,
    max_iter: int,
    seed: int,
) -> tuple[Float[Tensor, "cluster dim"], Int[Tensor, " point"]]:
    """Centroids, those of class c at c * per_class, ..., (c + 1) * per_class - 1, and the cluster of each point.

    Lloyd's iterations from k-means++ starts; of ``n_init`` starts each class keeps the one with the least inertia
    sum_n ||z_n - mu(n)||^2. A start ends early once no assignment changes. A cluster that has lost all of its points
    moves to the point of its class that is farthest from its centroid, as in scikit-learn. Computed in float32, without
    TF32 whatever the caller has switched on.

    Args:
        labels: the class of each point; every class has at least ``per_class`` points.
        n_init: number of starts.
        max_iter: Lloyd iterations of each start.
        seed: fixes the starts, on one kind of device: a CPU draws other random numbers.
    Raises:
        TypeError: if the points are neither float32 nor of half precision.
    Source: Lloyd 1982; Arthur and Vassilvitskii 2007 (the starts: one draw a centroid, where scikit-learn tries several
        and keeps the best).
    """
    if points.dtype not in (torch.float32, *HALF_DTYPES):
        raise TypeError(f"points: expected float32, bfloat16 or float16, got {points.dtype}")
    generator = torch.Generator(points.device).manual_seed(seed)
    centroids = points.new_empty(int(labels.max()) + 1, per_class, points.shape[1], dtype=torch.float32)
    assignments = torch.empty_like(labels)
    with full_precision(points.device):
        for problem in grouped(points, labels):
            found, slots = _best_of(problem, per_class, n_init, max_iter, generator)
            centroids[problem.classes] = found
            assignments[problem.rows[problem.filled]] = (problem.classes[:, None] * per_class + slots)[
                problem.filled
            ].to(labels.dtype)
    return centroids.flatten(0, 1).to(points.dtype), assignments


@dataclass(frozen=True)
class Problem:
    """Classes of about one size: their points from the mean of each class, in rows that are filled up with zeros."""

    classes: Int[Tensor, " class"]
    points: Float[Tensor, "class point dim"]
    squares: Float[Tensor, "class point"]
    filled: Bool[Tensor, "class point"]
    origins: Float[Tensor, "class 1 dim"]
    rows: Int[Tensor, "class point"]


def grouped(points: Float[Tensor, "point dim"], labels: Int[Tensor, " point"]) -> Iterator[Problem]:
    """The points by class, in tables that are at least half full; every class has a point."""
    sizes = torch.bincount(labels)
    # sizes of one exponent: 1, 2, 3 to 4, 5 to 8, ...
    exponents = (sizes - 1).double().frexp().exponent
    for exponent in exponents.unique().tolist():
        classes = (exponents == exponent).nonzero().squeeze(1)
        rows, filled = table_by_class(labels, classes)
        table = points[rows].float().masked_fill(~filled[..., None], 0)
        origins = table.sum(dim=1, keepdim=True) / sizes[classes, None, None]
        table = (table - origins).masked_fill(~filled[..., None], 0)
        yield Problem(classes, table, table.square().sum(dim=2), filled, origins, rows)


def _best_of(
    problem: Problem, per_class: int, n_init: int, max_iter: int, generator: torch.Generator
) -> tuple[Float[Tensor, "class k dim"], Int[Tensor, "class point"]]:
    """Of several starts, each class's with the least inertia."""
    centroids, slots, inertia = lloyd(problem, starts_of(problem, per_class, generator), max_iter)
    for _ in range(n_init - 1):
        others, other_slots, other_inertia = lloyd(problem, starts_of(problem, per_class, generator), max_iter)
        better = (other_inertia < inertia)[:, None]
        centroids = torch.where(better[..., None], others, centroids)
        slots = torch.where(better, other_slots, slots)
        inertia = inertia.minimum(other_inertia)
    return centroids + problem.origins, slots


def lloyd(
    problem: Problem, centroids: Float[Tensor, "class k dim"], max_iter: int
) -> tuple[Float[Tensor, "class k dim"], Int[Tensor, "class point"], Float[Tensor, " class"]]:
    """Centroids (from the mean of their class, as those that are given), each point's slot, each class's inertia."""
    slots, distances = _nearest(problem, centroids)
    for _ in range(max_iter):
        centroids = _means(problem, slots, distances, centroids.shape[1])
        previous = slots
        slots, distances = _nearest(problem, centroids)
        if torch.equal(slots, previous):
            break
    return centroids, slots, distances.double().sum(dim=1)


def starts_of(problem: Problem, per_class: int, generator: torch.Generator) -> Float[Tensor, "class k dim"]:
    """k-means++: each next centroid is a point drawn in proportion to its squared distance to those there are."""
    weights, nearest = problem.filled.float(), torch.full_like(problem.squares, torch.inf)
    chosen = []
    for _ in range(per_class):
        chosen.append(_at(problem, drawn(weights, generator)[:, None]))
        weights = nearest = nearest.minimum(_nearest(problem, chosen[-1])[1])
    return torch.cat(chosen, dim=1)


def drawn(weights: Float[Tensor, "class point"], generator: torch.Generator) -> Int[Tensor, " class"]:
    """One point of each class with probability in proportion to its weight: the first in a race of exponentials.

    Minima, unlike sums, are the same in whatever order they are taken. Where all weights are 0 it is the first point.
    """
    noise = torch.empty_like(weights).exponential_(generator=generator)
    return torch.where(weights > 0, noise / weights, torch.inf).argmin(dim=1)


def _at(problem: Problem, places: Int[Tensor, "class k"]) -> Float[Tensor, "class k dim"]:
    return problem.points.gather(1, places[..., None].expand(-1, -1, problem.points.shape[2]))


def _nearest(
    problem: Problem, centroids: Float[Tensor, "class k dim"]
) -> tuple[Int[Tensor, "class point"], Float[Tensor, "class point"]]:
    """The nearest centroid of each point's class, the first of equals, and the squared distance: 0 in the padding."""
    products = problem.points @ centroids.mT
    squared = (problem.squares[..., None] - products) + (centroids.square().sum(dim=2)[:, None] - products)
    slots = squared.argmin(dim=2)
    distances = squared.gather(2, slots[..., None]).squeeze(2).clamp_min(0)
    return slots.masked_fill(~problem.filled, 0), distances.masked_fill(~problem.filled, 0)


def _means(
    problem: Problem, slots: Int[Tensor, "class point"], distances: Float[Tensor, "class point"], per_class: int
) -> Float[Tensor, "class k dim"]:
    """The mean of each cluster's points; an empty cluster moves to its class's farthest point, no point taken twice."""
    member = torch.nn.functional.one_hot(slots, per_class).float() * problem.filled[..., None]
    counts = member.sum(dim=1)
    means = (member.mT @ problem.points) / counts.clamp_min(1)[..., None]
    empty = counts == 0
    if not empty.any():
        return means
    farthest = distances.masked_fill(~problem.filled, -1).sort(dim=1, descending=True, stable=True).indices
    # a class with fewer points than clusters has some of them on its last point
    turn = (empty.cumsum(dim=1) - 1).clamp_min(0).minimum(problem.filled.sum(dim=1, keepdim=True) - 1)
    return torch.where(empty[..., None], _at(problem, farthest.gather(1, turn)), means)
