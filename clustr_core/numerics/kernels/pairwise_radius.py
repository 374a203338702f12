"""The "pairwise" certificate in Triton: min over rivals of max over own clusters, never a table of them.

A program holds a tile of rows and rival clusters: once the inner products of a tile are there, it walks through the own
clusters of each row and keeps the best, so that the min and the max happen in registers. Rows are taken in the order of
their predicted class, so that those of a tile read the same lines of ``between``.
"""

from typing import no_type_check

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int
from torch import Tensor

from clustr_core.numerics.kernels import register, tiles
from clustr_core.numerics.kernels.tiles import ROWS, by_class, inner_products, padded, product_constants, row_chunks
from clustr_core.numerics.rounding import HALF_DTYPES

# rivals in a tile: twice as many, and the walk through the own clusters no longer fits in registers
COLUMNS = 32
# so many programs fill any device: with fewer row tiles than this, the rivals are split among several
PROGRAMS = 512


@register("pairwise_radius", "cuda")
@torch.no_grad()
def pairwise_radius(
    embeddings: Float[Tensor, "batch dim"],
    centroids: Float[Tensor, "cluster dim"],
    labels: Int[Tensor, " cluster"],
    predicted: Int[Tensor, " batch"],
    between: Float[Tensor, "cluster cluster"],
    relative: float,
    correction: Float[Tensor, " cluster"] | float,
) -> Float[Tensor, " batch"]:
    """min_j max_i (q_j - q_i - relative (s_j + s_i) - tiny - correction_j) / ||mu_j - mu_i||, never below 0.

    j runs over the clusters of other classes than the predicted one, i over its own. With everything taken from the
    mean of the centroids, q_j = ||mu_j||^2 / 2 - <z, mu_j>, so that q_j - q_i = (d_j^2 - d_i^2) / 2, and
    s_j = (||z|| + ||mu_j||)^2. With u the unit roundoff, the computed q_j is within (dim + 6) u s_j / 2 of the true
    one, in whatever order its sums are taken: relative >= (dim + 8) u leaves room for the roundings of the numerator,
    and that of the quotient is the caller's. An own cluster on top of a rival decides nothing and is skipped; where
    none is left, or a square has overflowed, the radius is 0.

    Computed in float32, to which half precision is converted, and returned in the embeddings' dtype.

    Args:
        labels: the class of each cluster, in any order; every class has one.
        predicted: the class of each embedding that is certified.
        between: ||mu_i - mu_j||.
        relative: what rounding may do to q_j, as a fraction of s_j.
        correction: taken off the gap of each rival.
    Raises:
        TypeError: if the inputs are neither float32 nor of half precision.
    Source: this book, Proposition 2.
    """
    for name, tensor in (("embeddings", embeddings), ("centroids", centroids)):
        if tensor.dtype not in (torch.float32, *HALF_DTYPES):
            raise TypeError(f"{name}: expected float32, bfloat16 or float16, got {tensor.dtype}")
    info = torch.finfo(torch.float32)
    origin = centroids.float().mean(dim=0)
    targets = padded(centroids.float() - origin)
    lengths = torch.linalg.vector_norm(targets, dim=1)
    order, starts = by_class(labels, int(labels.max()) + 1)
    sizes = starts.diff()
    between = between.float()
    inverse = between.reciprocal().masked_fill_(between.square() <= info.tiny / info.eps, 0).contiguous()
    taken_off = torch.as_tensor(correction, dtype=torch.float32, device=labels.device).expand(len(labels)) + info.tiny
    width, slots = targets.shape[1], int(sizes.max())
    radius = torch.empty_like(predicted, dtype=torch.float32)
    of_a_kind = predicted.argsort(stable=True)
    for chunk in row_chunks(len(predicted), max(width, slots)):
        rows = of_a_kind[chunk]
        points = padded(embeddings[rows].float() - origin)
        norms = torch.linalg.vector_norm(points, dim=1)
        classes = predicted[rows]
        own_clusters = (order, starts[classes], sizes[classes])
        row_tiles = triton.cdiv(len(rows), ROWS)
        own = points.new_empty(slots, len(rows))
        tiles.launch(
            own_kernel, (row_tiles, slots), points, norms, targets, lengths, *own_clusters, own, len(rows), width,
            relative, ROWS=ROWS, DEPTH=16, num_warps=8,
        )  # fmt: skip
        splits = min(triton.cdiv(len(targets), COLUMNS), triton.cdiv(PROGRAMS, row_tiles))
        parts = points.new_empty(splits, len(rows))
        tiles.launch(
            radius_kernel, (row_tiles, splits), points, norms, targets, lengths, labels, classes, taken_off, inverse,
            *own_clusters, own, parts, len(rows), len(targets), width, relative,
            ROWS=ROWS, COLUMNS=COLUMNS, **product_constants(points.dtype, "ieee"),
        )  # fmt: skip
        radius[rows] = parts.amin(dim=0)
    return radius.to(embeddings.dtype)


@triton.jit
@no_type_check
def own_kernel(
    points, norms, centroids, lengths, order, first, size, own, count, width, relative,
    ROWS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """q_i + relative s_i of the own cluster in one slot of each row's class."""
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    slot = tl.program_id(1).to(tl.int64)
    row_ok = rows < count
    filled = slot < tl.load(size + rows, mask=row_ok, other=0)
    clusters = tl.load(order + tl.load(first + rows, mask=row_ok, other=0) + slot, mask=filled, other=0)
    terms = tl.zeros((ROWS, DEPTH), tl.float32)
    present = tl.minimum(rows, count - 1)
    for start in range(0, width, DEPTH):
        depth = start + tl.arange(0, DEPTH)
        point = tl.load(points + present[:, None] * width + depth[None, :])
        terms += point * tl.load(centroids + clusters[:, None] * width + depth[None, :])
    length = tl.load(lengths + clusters, mask=filled, other=0.0)
    reach = tl.load(norms + rows, mask=row_ok, other=0.0) + length
    # the square first: where it overflows, so must its multiple
    found = length * length / 2 - tl.sum(terms, axis=1) + relative * (reach * reach)
    tl.store(own + slot * count + rows, found, mask=row_ok)


@triton.jit
@no_type_check
def radius_kernel(
    points, norms, centroids, lengths, labels, predicted, taken_off, inverse, order, first, size, own, radius,
    count, clusters, width, relative,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, PRECISION: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """The smallest radius of each row against every rival in this program's share of the clusters."""
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    split = tl.program_id(1)
    row_ok = rows < count
    present = tl.minimum(rows, count - 1)
    norm = tl.load(norms + present)
    label = tl.load(predicted + rows, mask=row_ok, other=0)
    begin = tl.load(first + rows, mask=row_ok, other=0)
    slots = tl.load(size + rows, mask=row_ok, other=0)
    smallest = tl.full((ROWS,), float("inf"), tl.float32)
    for start in range(split * COLUMNS, clusters, tl.num_programs(1) * COLUMNS):
        columns = (start + tl.arange(0, COLUMNS)).to(tl.int64)
        column_ok = columns < clusters
        products = inner_products(
            points, centroids, present, tl.minimum(columns, clusters - 1), width,
            ROWS, COLUMNS, DEPTH, PRECISION, WIDEN,
        )  # fmt: skip
        length = tl.load(lengths + columns, mask=column_ok, other=0.0)
        reach = norm[:, None] + length[None, :]
        off = tl.load(taken_off + columns, mask=column_ok, other=0.0)
        gaps = (length * length / 2)[None, :] - products - relative * (reach * reach) - off[None, :]
        best = tl.full((ROWS, COLUMNS), float("-inf"), tl.float32)
        for slot in range(tl.max(slots, axis=0)):
            filled = slot < slots
            mine = tl.load(order + begin + slot, mask=filled, other=0)
            offset = tl.load(own + tl.cast(slot, tl.int64) * count + rows, mask=filled, other=0.0)
            usable = filled[:, None] & column_ok[None, :]
            scale = tl.load(inverse + mine[:, None] * clusters + columns[None, :], mask=usable, other=0.0)
            found = tl.where(scale > 0, (gaps - offset[:, None]) * scale, float("-inf"))
            best = tl.maximum(best, found, propagate_nan=tl.PropagateNan.ALL)
        # a NaN compares as false: where a square has overflowed nothing is known
        best = tl.where(best > 0, best, 0.0)
        rival = column_ok[None, :] & (tl.load(labels + columns, mask=column_ok, other=0)[None, :] != label[:, None])
        smallest = tl.minimum(smallest, tl.min(tl.where(rival, best, float("inf")), axis=1))
    tl.store(radius + split.to(tl.int64) * count + rows, smallest, mask=row_ok)
