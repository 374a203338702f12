"""What the Triton kernels share: tiles of inner products and squared distances, chunks of rows, how one is launched.

Kernels carry ``no_type_check`` since Triton compiles their source, which a checking wrapper would hide from it.
"""

from collections.abc import Iterator
from typing import Any, no_type_check

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int
from torch import Tensor
from triton import knobs

from clustr_core.numerics import chunks
from clustr_core.numerics.rounding import HALF_DTYPES

ROWS = 64
COLUMNS = 64


def row_chunks(count: int, width: int) -> Iterator[slice]:
    """Slices of ``count`` rows, so that a float32 table of ``width`` columns has at most `KERNEL_TABLE_BYTES`."""
    rows = max(ROWS, chunks.KERNEL_TABLE_BYTES // (4 * width))
    return (slice(start, min(start + rows, count)) for start in range(0, count, rows))


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **constants: Any) -> None:
    """Run a kernel on the device of its first argument, which need not be the current one."""
    with torch.cuda.device_of(arguments[0]):
        kernel[grid](*arguments, **constants)


def operand(
    points: Float[Tensor, "point dim"], origin: Float[Tensor, " dim"]
) -> tuple[Float[Tensor, "point dim"], Float[Tensor, " point"]]:
    """What tiles of distances multiply, and the squared norm of each row.

    d^2 = |z|^2 - 2 <z, mu> + |mu|^2 loses digits as the norms exceed the distance. So float32 rows are taken from an
    origin among the centroids. Rows of half precision stay as they are: a product of two has all its digits in
    float32, where they are summed, while their difference to the origin would have to be rounded.
    """
    points = (points if points.dtype in HALF_DTYPES else points - origin).contiguous()
    return points, torch.linalg.vector_norm(points, dim=1, dtype=torch.float32).square()


def product_constants(dtype: torch.dtype) -> dict[str, Any]:
    """How the tiles of `inner_products` are multiplied: float32 is never rounded to TF32."""
    # Triton's interpreter multiplies the bits of bfloat16 as integers
    return {"DEPTH": 64 if dtype in HALF_DTYPES else 32, "WIDEN": knobs.runtime.interpret}


def by_class(labels: Int[Tensor, " item"], num_classes: int) -> tuple[Int[Tensor, " item"], Int[Tensor, " boundary"]]:
    """The items' indices, those of one class after another, and where each class starts (and the last one ends)."""
    ordered, order = labels.sort(stable=True)
    return order, torch.searchsorted(ordered, torch.arange(num_classes + 1, device=labels.device, dtype=labels.dtype))


@triton.jit
@no_type_check
def inner_products(
    left, right, rows, columns, row_ok, column_ok, dim,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """A tile of <left[row], right[column]>, summed in float32; row and column indices are int64."""
    products = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    for start in range(0, dim, DEPTH):
        depth = start + tl.arange(0, DEPTH)
        depth_ok = depth < dim
        a = tl.load(left + rows[:, None] * dim + depth[None, :], mask=row_ok[:, None] & depth_ok[None, :], other=0.0)
        b = tl.load(
            right + columns[None, :] * dim + depth[:, None], mask=column_ok[None, :] & depth_ok[:, None], other=0.0
        )
        if WIDEN:
            a, b = a.to(tl.float32), b.to(tl.float32)
        products = tl.dot(a, b, products, input_precision="ieee")
    return products


@triton.jit
@no_type_check
def distances_from(products, row_squares, column_squares):
    """(|z|^2 - <z, mu>) + (|mu|^2 - <z, mu>): infinite, and not NaN, where one of the squares has overflowed."""
    distances = (row_squares[:, None] - products) + (column_squares[None, :] - products)
    overflow = (row_squares[:, None] == float("inf")) | (column_squares[None, :] == float("inf"))
    return tl.where(overflow, float("inf"), tl.maximum(distances, 0.0, propagate_nan=tl.PropagateNan.ALL))
