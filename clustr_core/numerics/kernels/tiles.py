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
# a multiple of every DEPTH
WIDTH = 64


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
) -> tuple[Float[Tensor, "point width"], Float[Tensor, " point"]]:
    """What tiles of distances multiply, as `inner_products` takes it, and the squared norm of each row.

    d^2 = |z|^2 - 2 <z, mu> + |mu|^2 loses digits as the norms exceed the distance. So float32 rows are taken from an
    origin among the centroids. Rows of half precision stay as they are: a product of two has all its digits in
    float32, where they are summed, while their difference to the origin would have to be rounded.
    """
    points = padded(points if points.dtype in HALF_DTYPES else points - origin)
    return points, torch.linalg.vector_norm(points, dim=1, dtype=torch.float32).square()


def padded(points: Float[Tensor, "point dim"]) -> Float[Tensor, "point width"]:
    """Rows of a width that `inner_products` walks through without a remainder, filled up with zeros."""
    return torch.nn.functional.pad(points, (0, -points.shape[1] % WIDTH)).contiguous()


def product_constants(dtype: torch.dtype, precision: str = "tf32x3") -> dict[str, Any]:
    """How the tiles of `inner_products` are multiplied.

    Args:
        precision: of float32. "tf32x3" is three products of tensor cores, of each number's leading digits and of the
            rest, and loses less than sums in float32 do; but no bound on how those cores round a sum is published, so a
            certificate takes "ieee".
    """
    depth, precision = (64, "ieee") if dtype in HALF_DTYPES else (16 if precision == "tf32x3" else 32, precision)
    # Triton's interpreter multiplies the bits of bfloat16 as integers
    return {"DEPTH": depth, "PRECISION": precision, "WIDEN": knobs.runtime.interpret}


def by_class(labels: Int[Tensor, " item"], num_classes: int) -> tuple[Int[Tensor, " item"], Int[Tensor, " boundary"]]:
    """The items' indices, those of one class after another, and where each class starts (and the last one ends)."""
    ordered, order = labels.sort(stable=True)
    return order, torch.searchsorted(ordered, torch.arange(num_classes + 1, device=labels.device, dtype=labels.dtype))


@triton.jit
@no_type_check
def inner_products(
    left, right, rows, columns, width,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, PRECISION: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """A tile of <left[row], right[column]>, summed in float32.

    Row and column indices are int64 and all exist (a caller clamps those beyond the end, and stores nothing there);
    ``width`` is a multiple of DEPTH. With no mask in the loop, what is read goes straight to the tensor cores.
    """
    depth = tl.arange(0, DEPTH)
    a = left + rows[:, None] * width + depth[None, :]
    b = right + columns[None, :] * width + depth[:, None]
    products = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    for _ in range(0, width, DEPTH):
        x, y = tl.load(a), tl.load(b)
        if WIDEN:
            x, y = x.to(tl.float32), y.to(tl.float32)
        products = tl.dot(x, y, products, input_precision=PRECISION)
        a += DEPTH
        b += DEPTH
    return products


@triton.jit
@no_type_check
def distances_from(products, row_squares, column_squares):
    """(|z|^2 - <z, mu>) + (|mu|^2 - <z, mu>): infinite, and not NaN, where one of the squares has overflowed."""
    distances = (row_squares[:, None] - products) + (column_squares[None, :] - products)
    overflow = (row_squares[:, None] == float("inf")) | (column_squares[None, :] == float("inf"))
    return tl.where(overflow, float("inf"), tl.maximum(distances, 0.0, propagate_nan=tl.PropagateNan.ALL))
