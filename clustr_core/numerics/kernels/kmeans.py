"""k-means within each class in Triton: every class at once, the same bits for the same seed.

Two kernels make an iteration. One assigns each point to the nearest of its own class's centroids; the other sums the
points of each cluster, a span of a class's points in each program, with no atomic operation: the spans' sums are then
added in a fixed order. Points are read through an index that lists one class after another, and never copied. Both
take points and centroids from the mean of the class's centroids, so that a class far from the origin loses no digits.
"""

from dataclasses import dataclass
from typing import no_type_check

import torch
import triton
import triton.language as tl
from jaxtyping import Bool, Float, Int
from torch import Tensor

from clustr_core.numerics.kernels import register, tiles
from clustr_core.numerics.kernels.tiles import COLUMNS, ROWS, by_class
from clustr_core.numerics.rounding import HALF_DTYPES

# points summed by one program
SPAN = 1024
SLOTS = 16


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
    moves to the point of its class that is farthest from its centroid, as in scikit-learn. Computed in float32.

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
    problem = grouped(points, labels)
    generator = torch.Generator(points.device).manual_seed(seed)
    centroids, slots, inertia = lloyd(problem, _starts(problem, per_class, generator), max_iter)
    for _ in range(n_init - 1):
        others, other_slots, other_inertia = lloyd(problem, _starts(problem, per_class, generator), max_iter)
        better = other_inertia < inertia
        centroids = torch.where(better[:, None, None], others, centroids)
        slots = torch.where(better[problem.labels], other_slots, slots)
        inertia = inertia.minimum(other_inertia)
    return centroids.flatten(0, 1).to(points.dtype), (problem.labels * per_class + slots).to(labels.dtype)


@dataclass(frozen=True)
class Problem:
    """Points, their classes, and an index that lists the points of one class after another."""

    points: Float[Tensor, "point dim"]
    labels: Int[Tensor, " point"]
    order: Int[Tensor, " point"]
    starts: Int[Tensor, " boundary"]
    largest: int


def grouped(points: Float[Tensor, "point dim"], labels: Int[Tensor, " point"]) -> Problem:
    """The points of one class after another, by their indices."""
    order, starts = by_class(labels, int(labels.max()) + 1)
    return Problem(points.contiguous(), labels.long(), order, starts, int(starts.diff().max()))


def lloyd(
    problem: Problem, centroids: Float[Tensor, "class k dim"], max_iter: int
) -> tuple[Float[Tensor, "class k dim"], Int[Tensor, " point"], Float[Tensor, " class"]]:
    """Centroids, the slot of each point among those of its class, and each class's inertia."""
    slots, distances = _assign(problem, centroids)
    for _ in range(max_iter):
        centroids = _means(problem, centroids, slots, distances)
        previous = slots
        slots, distances = _assign(problem, centroids)
        if torch.equal(slots, previous):
            break
    return centroids, slots, _sum_by_class(problem, distances.double())


def _starts(problem: Problem, per_class: int, generator: torch.Generator) -> Float[Tensor, "class k dim"]:
    """k-means++: each next centroid is a point drawn in proportion to its squared distance to those there are."""
    weights = torch.ones_like(problem.labels, dtype=torch.float32)
    nearest = torch.full_like(weights, torch.inf)
    chosen = []
    for _ in range(per_class):
        chosen.append(problem.points[_draw(problem, weights, generator)].float())
        weights = nearest = nearest.minimum(_assign(problem, chosen[-1][:, None])[1])
    return torch.stack(chosen, dim=1)


def _draw(problem: Problem, weights: Tensor, generator: torch.Generator) -> Int[Tensor, " class"]:
    """One point of each class with probability in proportion to its weight: the first in a race of exponentials.

    Minima, unlike sums, are the same in whatever order they are taken. Where all weights are 0 it is the first point.
    """
    count, num_classes = len(weights), len(problem.starts) - 1
    noise = torch.empty_like(weights).exponential_(generator=generator)
    arrival = torch.where(weights > 0, noise / weights, torch.inf)
    first = arrival.new_full((num_classes,), torch.inf).scatter_reduce_(0, problem.labels, arrival, "amin")
    indices = torch.arange(count, device=weights.device).masked_fill_(arrival != first[problem.labels], count)
    return indices.new_full((num_classes,), count).scatter_reduce_(0, problem.labels, indices, "amin")


def _assign(
    problem: Problem, centroids: Float[Tensor, "class k dim"]
) -> tuple[Int[Tensor, " point"], Float[Tensor, " point"]]:
    """The nearest centroid of each point's class, the first of equals, and the squared distance to it."""
    slots, distances = torch.empty_like(problem.labels), torch.empty_like(problem.labels, dtype=torch.float32)
    num_classes, per_class, dim = centroids.shape
    tiles.launch(
        assign_kernel, (triton.cdiv(problem.largest, ROWS), num_classes), problem.points, problem.order, problem.starts,
        centroids.contiguous(), centroids.mean(dim=1), slots, distances, per_class, dim,
        ROWS=ROWS, SLOTS=SLOTS, DEPTH=32, num_warps=8,
    )  # fmt: skip
    return slots, distances


def _means(
    problem: Problem, centroids: Float[Tensor, "class k dim"], slots: Tensor, distances: Tensor
) -> Float[Tensor, "class k dim"]:
    """The mean of each cluster's points."""
    num_classes, per_class, dim = centroids.shape
    parts = triton.cdiv(problem.largest, SPAN)
    origins = centroids.mean(dim=1)
    sums = centroids.new_empty(num_classes, parts, per_class, dim)
    counts = centroids.new_empty(num_classes, parts, per_class)
    grid = (num_classes * parts, triton.cdiv(per_class, SLOTS), triton.cdiv(dim, COLUMNS))
    tiles.launch(
        sums_kernel, grid, problem.points, problem.order, problem.starts, origins, slots, sums, counts,
        parts, per_class, dim, SLOTS=SLOTS, COLUMNS=COLUMNS, DEPTH=32,
    )  # fmt: skip
    counts = counts.sum(dim=1)
    means = origins[:, None] + sums.sum(dim=1) / counts.clamp_min(1)[:, :, None]
    return _relocated(problem, means, counts == 0, distances)


def _relocated(
    problem: Problem, centroids: Tensor, empty: Bool[Tensor, "class k"], distances: Tensor
) -> Float[Tensor, "class k dim"]:
    """Each empty cluster at the point of its class that is farthest from its centroid, no point taken twice."""
    for label, slot in empty.nonzero().tolist():
        farthest = distances.masked_fill(problem.labels != label, -torch.inf).argmax()
        centroids[label, slot] = problem.points[farthest].float()
        distances = distances.index_fill(0, farthest, -1)
    return centroids


def _sum_by_class(problem: Problem, values: Tensor) -> Float[Tensor, " class"]:
    """One sum for each class, in a fixed order."""
    starts, ends = problem.starts[:-1, None], problem.starts[1:, None]
    at = starts + torch.arange(problem.largest, device=values.device)
    table = values[problem.order[at.clamp_max(len(values) - 1)]]
    return table.masked_fill(at >= ends, 0).sum(dim=1)


@triton.jit
@no_type_check
def assign_kernel(
    points, order, starts, centroids, origins, slots, distances, per_class, dim,
    ROWS: tl.constexpr, SLOTS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """The nearest centroid of ROWS points of one class."""
    label = tl.program_id(1).to(tl.int64)
    positions = tl.load(starts + label) + tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    row_ok = positions < tl.load(starts + label + 1)
    rows = tl.load(order + positions, mask=row_ok, other=0)
    closest = tl.full((ROWS,), float("inf"), tl.float32)
    found = tl.zeros((ROWS,), tl.int64)
    for begin in range(0, per_class, SLOTS):
        slot = begin + tl.arange(0, SLOTS)
        slot_ok = slot < per_class
        products = tl.zeros((ROWS, SLOTS), tl.float32)
        point_squares = tl.zeros((ROWS,), tl.float32)
        centroid_squares = tl.zeros((SLOTS,), tl.float32)
        for start in range(0, dim, DEPTH):
            depth = start + tl.arange(0, DEPTH)
            depth_ok = depth < dim
            origin = tl.load(origins + label * dim + depth, mask=depth_ok, other=0.0)
            ok = row_ok[:, None] & depth_ok[None, :]
            point = tl.load(points + rows[:, None] * dim + depth[None, :], mask=ok, other=0.0).to(tl.float32)
            point -= origin[None, :]
            ok = slot_ok[None, :] & depth_ok[:, None]
            where = centroids + (label * per_class + slot[None, :]) * dim + depth[:, None]
            centroid = tl.load(where, mask=ok, other=0.0) - origin[:, None]
            products = tl.dot(point, centroid, products, input_precision="ieee")
            point_squares += tl.sum(point * point, axis=1)
            centroid_squares += tl.sum(centroid * centroid, axis=0)
        squared = tl.maximum((point_squares[:, None] - products) + (centroid_squares[None, :] - products), 0.0)
        squared = tl.where(slot_ok[None, :], squared, float("inf"))
        low = tl.min(squared, axis=1)
        found = tl.where(low < closest, begin + tl.argmin(squared, axis=1), found)
        closest = tl.minimum(closest, low)
    tl.store(slots + rows, found, mask=row_ok)
    tl.store(distances + rows, closest, mask=row_ok)


@triton.jit
@no_type_check
def sums_kernel(
    points, order, starts, origins, slots, sums, counts, parts, per_class, dim,
    SLOTS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """Sums of z - origin and numbers of points, of SLOTS clusters of a class over one of the class's spans."""
    span = tl.program_id(0).to(tl.int64)
    label, part = span // parts, span % parts
    slot = tl.program_id(1) * SLOTS + tl.arange(0, SLOTS)
    columns = tl.program_id(2) * COLUMNS + tl.arange(0, COLUMNS)
    slot_ok, column_ok = slot < per_class, columns < dim
    begin, end = tl.load(starts + label), tl.load(starts + label + 1)
    length = tl.cdiv(end - begin, parts)
    begin += part * length
    end = tl.minimum(begin + length, end)
    origin = tl.load(origins + label * dim + columns, mask=column_ok, other=0.0)
    total = tl.zeros((SLOTS, COLUMNS), tl.float32)
    count = tl.zeros((SLOTS,), tl.float32)
    for start in range(begin, end, DEPTH):
        positions = start + tl.arange(0, DEPTH)
        row_ok = positions < end
        rows = tl.load(order + positions, mask=row_ok, other=0)
        ok = row_ok[:, None] & column_ok[None, :]
        point = tl.load(points + rows[:, None] * dim + columns[None, :], mask=ok, other=0.0).to(tl.float32)
        point -= origin[None, :]
        # a row beyond the span is a member of no cluster
        member = tl.load(slots + rows, mask=row_ok, other=-1)[None, :] == slot[:, None]
        member = member.to(tl.float32)
        total = tl.dot(member, point, total, input_precision="ieee")
        count += tl.sum(member, axis=1)
    where = sums + (span * per_class + slot[:, None]) * dim + columns[None, :]
    tl.store(where, total, mask=slot_ok[:, None] & column_ok[None, :])
    tl.store(counts + span * per_class + slot, count, mask=slot_ok & (tl.program_id(2) == 0))
