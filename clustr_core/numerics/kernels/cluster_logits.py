"""Cluster logits in Triton: distances to per-class logsumexp in one pass, with gradients, in bounded memory.

Without ``neighbours`` a program holds a tile of rows and classes, and walks through the clusters of its classes: first
each class's first cluster, then each one's second, and so on, so that classes may differ in size. Where a table of
distances cannot be avoided (to find the nearest centroids, and in the backward pass) rows are taken in chunks, whose
tables fit in `chunks.KERNEL_TABLE_BYTES`. Nothing but the inputs is kept for the backward pass, which computes the
distances again; second derivatives are those of the reference in float64. No sum depends on the order in which programs
run, so the same inputs give the same bits.
"""

from dataclasses import dataclass
from typing import no_type_check

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int
from torch import Tensor

from clustr_core.numerics.derivatives import Gradients, gradients_of
from clustr_core.numerics.kernels import reference, register, tiles
from clustr_core.numerics.kernels.tiles import (
    COLUMNS,
    ROWS,
    by_class,
    distances_from,
    inner_products,
    operand,
    product_constants,
    row_chunks,
)
from clustr_core.numerics.rounding import HALF_DTYPES

# rows summed by one program for the gradient of a centroid
SPAN = 1024


@register("cluster_logits", "cuda")
def cluster_logits(
    embeddings: Float[Tensor, "batch dim"],
    centroids: Float[Tensor, "cluster dim"],
    labels: Int[Tensor, " cluster"],
    variance: Float[Tensor, " cluster"],
    num_classes: int,
    neighbours: int | None = None,
) -> Float[Tensor, "batch class"]:
    """g_c(z) = logsumexp over the clusters j of class c of -d_j^2 / (2 sigma_j^2), differentiable in z and mu.

    Computed in float32 and returned in the inputs' dtype. A logit is -inf where |z - m|^2 or |mu_j - m|^2 overflows,
    m the mean of the centroids (the origin, for inputs of half precision).

    Args:
        labels: the class of each cluster, in 0..C-1, in any order.
        num_classes: C.
        neighbours: let only that many nearest centroids vote (of those that are equally near, some); a class without a
            vote gets a finite logit below that of every class with one. None lets all vote.
    Raises:
        ValueError: if ``variance`` requires a gradient, which it would not get.
        TypeError: if the inputs are neither float32 nor of half precision.
    Source: Alfarra et al. 2021, section 3, in the log domain.
    """
    if variance.requires_grad:
        raise ValueError("variance: expected one without gradient, which this kernel does not compute; detach it")
    dtype = torch.promote_types(embeddings.dtype, centroids.dtype)
    if dtype not in (torch.float32, *HALF_DTYPES):
        raise TypeError(f"embeddings, centroids: expected float32, bfloat16 or float16, got {dtype}")
    if neighbours is not None and neighbours >= len(centroids):
        neighbours = None
    return _ClusterLogits.apply(
        embeddings.to(dtype), centroids.to(dtype), labels, variance.float().contiguous(), num_classes, neighbours
    )


class _ClusterLogits(torch.autograd.Function):
    @staticmethod
    def forward(ctx, embeddings, centroids, labels, variance, num_classes, neighbours):
        ctx.save_for_backward(embeddings, centroids, labels, variance)
        ctx.num_classes, ctx.neighbours = num_classes, neighbours
        targets = _targets(centroids, labels, variance, num_classes)
        logits = embeddings.new_empty(len(embeddings), num_classes, dtype=torch.float32)
        dim, count = embeddings.shape[1], len(centroids)
        for rows in row_chunks(len(embeddings), dim if neighbours is None else max(dim, count)):
            if neighbours is None:
                _stream(embeddings[rows], targets, logits[rows])
            else:
                distances = _distances(embeddings[rows], targets)
                found = _votes(distances, _voting(distances, neighbours), targets)
                logits[rows] = _placed(*found, embeddings.dtype)
        return logits.to(embeddings.dtype)

    @staticmethod
    def backward(ctx, gradient):
        embeddings, centroids, labels, variance = ctx.saved_tensors

        def formula(points, targets):
            logits = reference.cluster_logits(points, targets, labels, variance, ctx.num_classes, ctx.neighbours)
            return logits.to(embeddings.dtype)

        gradients = gradients_of(formula, (embeddings, centroids), (gradient,), lambda above: _gradients(ctx, above))
        return *gradients, None, None, None, None


def _gradients(ctx, above: Tensor) -> Gradients:
    embeddings, centroids, labels, variance = ctx.saved_tensors
    targets = _targets(centroids, labels, variance, ctx.num_classes)
    centred = (centroids.float() - targets.origin).contiguous()
    pulls = torch.empty_like(embeddings) if ctx.needs_input_grad[0] else None
    total = torch.zeros_like(centred) if ctx.needs_input_grad[1] else None
    for rows in row_chunks(len(embeddings), max(centroids.shape)):
        weights = _weights(embeddings[rows], targets, above[rows].float(), ctx.neighbours)
        points = (embeddings[rows].float() - targets.origin).contiguous()
        if pulls is not None:
            pulls[rows] = _pull(weights, centred, points, embeddings.dtype, span=len(centroids))
        if total is not None:
            total += _pull(weights.T, points, centred, embeddings.dtype, span=SPAN)
    return pulls, None if total is None else total.to(centroids.dtype)


@dataclass(frozen=True)
class _Targets:
    """The centroids as the kernels want them, and the order in which those of a class follow each other."""

    origin: Float[Tensor, " dim"]
    operand: Float[Tensor, "cluster width"]
    squares: Float[Tensor, " cluster"]
    labels: Int[Tensor, " cluster"]
    variance: Float[Tensor, " cluster"]
    order: Int[Tensor, " cluster"]
    starts: Int[Tensor, " boundary"]

    @property
    def num_classes(self) -> int:
        return len(self.starts) - 1


def _targets(centroids: Tensor, labels: Tensor, variance: Tensor, num_classes: int) -> _Targets:
    origin = centroids.float().mean(dim=0)
    return _Targets(origin, *operand(centroids, origin), labels, variance, *by_class(labels, num_classes))


def _stream(embeddings: Tensor, targets: _Targets, logits: Tensor) -> None:
    """Write the logits of some rows, every cluster voting."""
    points, squares = operand(embeddings, targets.origin)
    # three products a tile take registers: in float32 more classes would not fit
    single = points.dtype == torch.float32
    classes = 16 if targets.num_classes <= 16 else 32 if single else 64
    grid = (triton.cdiv(len(points), ROWS), triton.cdiv(targets.num_classes, classes))
    tiles.launch(
        stream_kernel, grid, points, squares, targets.operand, targets.squares, targets.variance, targets.order,
        targets.starts, logits, len(points), targets.num_classes, points.shape[1],
        ROWS=ROWS, CLASSES=classes, num_warps=4 if single else 8, **product_constants(points.dtype),
    )  # fmt: skip


def _distances(embeddings: Tensor, targets: _Targets) -> Tensor:
    """d_j^2 of some rows."""
    points, squares = operand(embeddings, targets.origin)
    distances = squares.new_empty(len(points), len(targets.operand))
    grid = (triton.cdiv(distances.shape[0], ROWS), triton.cdiv(distances.shape[1], COLUMNS))
    tiles.launch(
        distances_kernel, grid, points, squares, targets.operand, targets.squares, distances,
        *distances.shape, points.shape[1], ROWS=ROWS, COLUMNS=COLUMNS, num_warps=8, **product_constants(points.dtype),
    )  # fmt: skip
    return distances


def _voting(distances: Tensor, neighbours: int | None) -> Tensor:
    """Which clusters have a vote in each row: 1, or 0; a NaN votes, so that it is seen."""
    if neighbours is None:
        return torch.ones_like(distances, dtype=torch.int8)
    voting = distances.isnan().to(torch.int8)
    return voting.scatter_(1, distances.topk(neighbours, dim=1, largest=False).indices, 1)


def _votes(distances: Tensor, voting: Tensor, targets: _Targets) -> tuple[Tensor, Tensor, Tensor]:
    """The logsumexp of each class's votes, and, where it has none, its largest exponent and how many attain it."""
    logits, nearest, ties = distances.new_empty(3, len(distances), targets.num_classes)
    grid = (triton.cdiv(len(distances), ROWS), triton.cdiv(targets.num_classes, 16))
    tiles.launch(
        votes_kernel, grid, distances, voting, targets.variance, targets.order, targets.starts,
        logits, nearest, ties, *distances.shape, targets.num_classes, ROWS=ROWS, CLASSES=16,
    )  # fmt: skip
    return logits, nearest, ties


def _placed(logits: Tensor, nearest: Tensor, ties: Tensor, dtype: torch.dtype) -> Tensor:
    """Put each class without a vote below every class with one in ``dtype``, yet keep it finite."""
    has_vote = ties == 0
    lowest = logits.masked_fill(~has_vote, torch.inf).amin(dim=1, keepdim=True)
    below = torch.minimum(nearest, lowest.detach())
    step = 1 + below.detach().abs() * 4 * torch.finfo(dtype).eps
    return torch.where(has_vote, logits, (below - step).clamp_min(torch.finfo(dtype).min))


def _weights(embeddings: Tensor, targets: _Targets, gradient: Tensor, neighbours: int | None) -> Tensor:
    """How strongly each centroid pulls each row: d loss / d z = sum_j weight_j (mu_j - z)."""
    distances = _distances(embeddings, targets)
    voting = _voting(distances, neighbours)
    logits, nearest, ties = _votes(distances, voting, targets)
    to_logits, to_nearest = gradient.contiguous(), nearest
    if neighbours is not None:
        with torch.enable_grad():
            leaves = (logits.requires_grad_(), nearest.requires_grad_())
            to_logits, to_nearest = torch.autograd.grad(_placed(*leaves, ties, embeddings.dtype), leaves, gradient)
        to_nearest = to_nearest / ties.clamp_min(1)
    weights = torch.empty_like(distances)
    grid = (triton.cdiv(distances.shape[0], ROWS // 2), triton.cdiv(distances.shape[1], COLUMNS))
    tiles.launch(
        weights_kernel, grid, distances, voting, targets.variance, targets.labels, logits, to_logits, nearest,
        to_nearest, weights, *distances.shape, targets.num_classes,
        ROWS=ROWS // 2, COLUMNS=COLUMNS, SOME_VOTE=neighbours is not None,
    )  # fmt: skip
    return weights


def _pull(weights: Tensor, sources: Tensor, points: Tensor, dtype: torch.dtype, *, span: int) -> Tensor:
    """sum_s weight[r, s] (sources[s] - points[r]), the sum split among programs that take ``span`` sources each.

    Inputs of half precision lose nothing that they had when their weights are rounded to TF32.
    """
    product = {"DEPTH": 32, "PRECISION": "tf32"} if dtype in HALF_DTYPES else {"DEPTH": 16, "PRECISION": "tf32x3"}
    parts = triton.cdiv(len(sources), span)
    pulls = points.new_empty(parts, *points.shape)
    grid = (triton.cdiv(points.shape[0], ROWS), triton.cdiv(points.shape[1], COLUMNS), parts)
    tiles.launch(
        pull_kernel, grid, weights, sources, points, pulls, len(points), len(sources), points.shape[1],
        *weights.stride(), span, ROWS=ROWS, COLUMNS=COLUMNS, num_warps=8, **product,
    )  # fmt: skip
    return pulls.sum(dim=0)


@triton.jit
@no_type_check
def stream_kernel(
    points, point_squares, centroids, centroid_squares, variance, order, starts, logits, count, num_classes, width,
    ROWS: tl.constexpr, CLASSES: tl.constexpr, DEPTH: tl.constexpr, PRECISION: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """Logits of ROWS rows and CLASSES classes, a running logsumexp over the clusters of each."""
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    classes = tl.program_id(1) * CLASSES + tl.arange(0, CLASSES)
    row_ok, class_ok = rows < count, classes < num_classes
    present = tl.minimum(rows, count - 1)
    point_square = tl.load(point_squares + present)
    first = tl.load(starts + classes, mask=class_ok, other=0)
    size = tl.load(starts + classes + 1, mask=class_ok, other=0) - first
    highest = tl.full((ROWS, CLASSES), float("-inf"), tl.float32)
    total = tl.zeros((ROWS, CLASSES), tl.float32)
    for slot in range(tl.max(size, axis=0)):
        filled = slot < size
        columns = tl.load(order + first + slot, mask=filled, other=0)
        products = inner_products(points, centroids, present, columns, width, ROWS, CLASSES, DEPTH, PRECISION, WIDEN)
        square, sigma2 = tl.load(centroid_squares + columns), tl.load(variance + columns)
        exponents = exponents_of(distances_from(products, point_square, square), sigma2)
        highest, total = add_exponents(highest, total, exponents, filled[None, :])
    where = logits + rows[:, None] * num_classes + classes[None, :]
    tl.store(where, highest + tl.log(total), mask=row_ok[:, None] & class_ok[None, :])


@triton.jit
@no_type_check
def exponents_of(distances, variance):
    """-d^2 / (2 sigma^2)."""
    return -distances / (2 * variance)[None, :]


@triton.jit
@no_type_check
def add_exponents(highest, total, exponents, voting):
    """Running logsumexp: highest + log(total) takes in the exponents that vote, with one exponential for each."""
    # equal infinities differ by nothing
    factor = tl.exp(-tl.abs(tl.where(exponents == highest, 0.0, exponents - highest)))
    grown = tl.where(exponents > highest, total * factor + 1, total + factor)
    raised = tl.maximum(highest, exponents)
    return tl.where(voting, raised, highest), tl.where(voting, grown, total)


@triton.jit
@no_type_check
def distances_kernel(
    points, point_squares, centroids, centroid_squares, distances, count, clusters, width,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, PRECISION: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """A tile of squared distances."""
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    columns = tl.program_id(1).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)
    row_ok, column_ok = rows < count, columns < clusters
    products = inner_products(
        points, centroids, tl.minimum(rows, count - 1), tl.minimum(columns, clusters - 1), width,
        ROWS, COLUMNS, DEPTH, PRECISION, WIDEN,
    )  # fmt: skip
    found = distances_from(
        products,
        tl.load(point_squares + rows, mask=row_ok, other=0.0),
        tl.load(centroid_squares + columns, mask=column_ok, other=0.0),
    )
    where = distances + rows[:, None] * clusters + columns[None, :]
    tl.store(where, found, mask=row_ok[:, None] & column_ok[None, :])


@triton.jit
@no_type_check
def votes_kernel(
    distances, votes, variance, order, starts, logits, nearest, ties, count, clusters, num_classes,
    ROWS: tl.constexpr, CLASSES: tl.constexpr,
):  # fmt: skip
    """logsumexp over the clusters that have a vote; ties is 0 where a class has one."""
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    classes = tl.program_id(1) * CLASSES + tl.arange(0, CLASSES)
    row_ok, class_ok = rows < count, classes < num_classes
    first = tl.load(starts + classes, mask=class_ok, other=0)
    size = tl.load(starts + classes + 1, mask=class_ok, other=0) - first
    highest = tl.full((ROWS, CLASSES), float("-inf"), tl.float32)
    total = tl.zeros((ROWS, CLASSES), tl.float32)
    largest = tl.full((ROWS, CLASSES), float("-inf"), tl.float32)
    attained = tl.zeros((ROWS, CLASSES), tl.float32)
    for slot in range(tl.max(size, axis=0)):
        filled = slot < size
        columns = tl.load(order + first + slot, mask=filled, other=0)
        ok = row_ok[:, None] & filled[None, :]
        here = rows[:, None] * clusters + columns[None, :]
        distance = tl.load(distances + here, mask=ok, other=float("inf"))
        exponents = exponents_of(distance, tl.load(variance + columns, mask=filled, other=1.0))
        voting = tl.load(votes + here, mask=ok, other=0) != 0
        highest, total = add_exponents(highest, total, exponents, voting)
        again = tl.where(exponents == largest, attained + 1, attained)
        attained = tl.where(filled[None, :], tl.where(exponents > largest, 1.0, again), attained)
        largest = tl.where(filled[None, :], tl.maximum(largest, exponents), largest)
    where = rows[:, None] * num_classes + classes[None, :]
    ok = row_ok[:, None] & class_ok[None, :]
    tl.store(logits + where, highest + tl.log(total), mask=ok)
    tl.store(nearest + where, largest, mask=ok)
    tl.store(ties + where, tl.where(total > 0, 0.0, attained), mask=ok)


@triton.jit
@no_type_check
def weights_kernel(
    distances, votes, variance, labels, logits, to_logits, nearest, to_nearest, weights,
    count, clusters, num_classes, ROWS: tl.constexpr, COLUMNS: tl.constexpr, SOME_VOTE: tl.constexpr,
):  # fmt: skip
    """A tile of d loss / d exponent, over sigma^2: through the logsumexp, or a voteless class's nearest clusters."""
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    columns = tl.program_id(1).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)
    row_ok, column_ok = rows < count, columns < clusters
    ok = row_ok[:, None] & column_ok[None, :]
    sigma2 = tl.load(variance + columns, mask=column_ok, other=1.0)
    here = rows[:, None] * clusters + columns[None, :]
    distance = tl.load(distances + here, mask=ok, other=0.0)
    exponents = exponents_of(distance, sigma2)
    at = rows[:, None] * num_classes + tl.load(labels + columns, mask=column_ok, other=0)[None, :]
    logit = tl.load(logits + at, mask=ok, other=0.0)
    # where every exponent has overflowed, none has a gradient
    share = tl.where(exponents == float("-inf"), 0.0, tl.exp(exponents - logit))
    weight = tl.load(to_logits + at, mask=ok, other=0.0) * share
    if SOME_VOTE:
        weight = tl.where(tl.load(votes + here, mask=ok, other=0) != 0, weight, 0.0)
        alone = tl.load(to_nearest + at, mask=ok, other=0.0)
        weight += tl.where(exponents == tl.load(nearest + at, mask=ok, other=0.0), alone, 0.0)
    tl.store(weights + here, weight / sigma2[None, :], mask=ok)


@triton.jit
@no_type_check
def pull_kernel(
    weights, sources, points, pulls, count, source_count, dim, row_stride, source_stride, span,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A tile of sum_s weight[r, s] (sources[s] - points[r]) over the sources of one part."""
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    part = tl.program_id(2).to(tl.int64)
    row_ok, column_ok = rows < count, columns < dim
    pulled = tl.zeros((ROWS, COLUMNS), tl.float32)
    weight_sum = tl.zeros((ROWS,), tl.float32)
    for start in range(part * span, tl.minimum((part + 1) * span, source_count), DEPTH):
        items = start + tl.arange(0, DEPTH)
        item_ok = items < source_count
        weight = tl.load(
            weights + rows[:, None] * row_stride + items[None, :] * source_stride,
            mask=row_ok[:, None] & item_ok[None, :], other=0.0,
        )  # fmt: skip
        source = tl.load(
            sources + items[:, None] * dim + columns[None, :], mask=item_ok[:, None] & column_ok[None, :], other=0.0
        )
        pulled = tl.dot(weight, source, pulled, input_precision=PRECISION)
        weight_sum += tl.sum(weight, axis=1)
    ok = row_ok[:, None] & column_ok[None, :]
    here = rows[:, None] * dim + columns[None, :]
    point = tl.load(points + here, mask=ok, other=0.0)
    tl.store(pulls + part * count * dim + here, pulled - weight_sum[:, None] * point, mask=ok)
