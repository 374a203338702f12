"""What a dtype keeps: full precision inside autocast and TF32, the rounding of sums, rounding down."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from jaxtyping import Float
from torch import Tensor

# too coarse for distances: what comes in them is computed in float32
HALF_DTYPES = (torch.bfloat16, torch.float16)


@contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """Matrix products in the full precision of their dtype inside the block: no autocast, no TF32, no bfloat16."""
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        torch.set_float32_matmul_precision(precision)


def relative_rounding(embeddings: Tensor) -> float:
    """Bound on the relative error of a squared distance: one rounding for each of dim terms, and a few more."""
    return (embeddings.shape[1] + 16) * torch.finfo(embeddings.dtype).eps / 2


def given_and_working_dtype(one: Tensor, other: Tensor) -> tuple[torch.dtype, torch.dtype]:
    """Of an answer from both, the wider of the two; and of its computation, at least float32."""
    dtype = torch.promote_types(one.dtype, other.dtype)
    return dtype, torch.float32 if dtype in HALF_DTYPES else dtype


def rounded_down(radius: Float[Tensor, " batch"], dtype: torch.dtype) -> Float[Tensor, " batch"]:
    """The largest numbers of a dtype that exceed none of these, which are not negative."""
    rounded = radius.to(dtype)
    # the bits of positive numbers are ordered as they are
    bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize]
    return (rounded.view(bits) - (rounded.to(radius.dtype) > radius).to(bits)).view(dtype)
