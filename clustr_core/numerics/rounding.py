"""What a dtype keeps: full precision inside autocast and TF32, the rounding of sums, rounding down."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

# too coarse for distances: what comes in them is computed in float32
HALF_DTYPES = (torch.bfloat16, torch.float16)


@contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """Products and convolutions in the full precision of their dtype inside the block: no autocast, TF32 or bfloat16.

    Whichever switches of PyTorch allow less, the old ones (``set_float32_matmul_precision``, ``allow_tf32``) or the
    new ones (``fp32_precision``), all are afterwards what they were, after an exception too.
    """
    with _legacy_full_precision(), _fp32_full_precision(), torch.autocast(device.type, enabled=False):
        yield


@contextmanager
def float32_by_default() -> Iterator[None]:
    """What is made without a dtype inside the block is float32, whatever the caller has made the default."""
    kept = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        yield
    finally:
        torch.set_default_dtype(kept)


@contextmanager
def tf32(device: torch.device) -> Iterator[None]:
    """Float32 products and convolutions of a GPU in TF32 inside the block, and no autocast, whatever was switched.

    All switches are afterwards what they were. On a CPU this is `full_precision`.
    """
    backends: Any = torch.backends
    with full_precision(device), _fp32_kept():
        for switch, parents in _fp32_switches():
            if backends.cudnn in parents:
                switch.fp32_precision = "tf32"
        yield


@contextmanager
def repeatable_convolutions(*, fastest: bool = False) -> Iterator[None]:
    """A GPU's convolutions by algorithms that give the same bits at each call inside the block; a CPU's always do.

    Args:
        fastest: time the algorithms at the first convolution of each shape, and take the fastest; else cuDNN guesses.
    """
    cudnn: Any = torch.backends.cudnn
    kept = cudnn.deterministic, cudnn.benchmark
    cudnn.deterministic, cudnn.benchmark = True, fastest
    try:
        yield
    finally:
        cudnn.deterministic, cudnn.benchmark = kept


@contextmanager
def _legacy_full_precision() -> Iterator[None]:
    """The old switches at full precision, where they can be read: PyTorch refuses once a new one contradicts them."""
    cudnn = torch.backends.cudnn
    kept: list[tuple[Callable[[Any], None], Any]] = []
    switches: list[tuple[Callable[[], Any], Callable[[Any], None], Any]] = [
        (torch.get_float32_matmul_precision, torch.set_float32_matmul_precision, "highest"),
        (lambda: cudnn.allow_tf32, lambda allow: setattr(cudnn, "allow_tf32", allow), False),
    ]
    # an old switch also writes the new ones behind it, so these are put back last
    with _fp32_kept():
        try:
            for read, write, full in switches:
                with suppress(RuntimeError):
                    kept.append((write, read()))
                    write(full)
            yield
        finally:
            for write, value in reversed(kept):
                write(value)


@contextmanager
def _fp32_full_precision() -> Iterator[None]:
    """The new switches at full precision: each operation's own, which goes before those of its backend and of all."""
    with _fp32_kept():
        for switch, _ in _fp32_switches():
            if switch.fp32_precision in _COARSE:
                switch.fp32_precision = "ieee"
        yield


@contextmanager
def _fp32_kept() -> Iterator[None]:
    kept = [(switch, _own_precision(switch, parents)) for switch, parents in _fp32_switches()]
    try:
        yield
    finally:
        for switch, value in kept:
            switch.fp32_precision = value


_COARSE = ("tf32", "bf16")


def _fp32_switches() -> list[tuple[Any, tuple[Any, ...]]]:
    """The new switch of each operation, and those that it follows while it has no value of its own."""
    everything: Any = torch.backends
    cuda, mkldnn = everything.cudnn, everything.mkldnn
    of_cuda = [(switch, (everything, cuda)) for switch in (everything.cuda.matmul, cuda.conv, cuda.rnn)]
    return of_cuda + [(switch, (everything,)) for switch in (mkldnn.matmul, mkldnn.conv, mkldnn.rnn)]


def _own_precision(switch: Any, parents: tuple[Any, ...]) -> str:
    """A switch's own value, "none" where it follows a parent. It reads as its parent's then: only a change tells."""
    value = switch.fp32_precision
    for i, parent in enumerate(parents):
        if parent.fp32_precision != value or value == "none":
            continue
        own, other = _own_precision(parent, parents[:i]), "tf32" if value == "ieee" else "ieee"
        parent.fp32_precision = other
        follows = switch.fp32_precision != value
        parent.fp32_precision = own
        if follows:
            return "none"
    return value


def relative_rounding(embeddings: Tensor) -> float:
    """Bound on the relative error of a squared distance: one rounding for each of dim terms, and a few more."""
    return (embeddings.shape[1] + 16) * torch.finfo(embeddings.dtype).eps / 2


def working_dtype(one: torch.dtype, other: torch.dtype) -> torch.dtype:
    """What is computed in from both: the wider of the two, and at least float32."""
    dtype = torch.promote_types(one, other)
    return torch.float32 if dtype in HALF_DTYPES else dtype


def given_and_working_dtype(one: Tensor, other: Tensor) -> tuple[torch.dtype, torch.dtype]:
    """Of an answer from both, the wider of the two; and of its computation, at least float32."""
    return torch.promote_types(one.dtype, other.dtype), working_dtype(one.dtype, other.dtype)


def rounded_down(radius: Float[Tensor, " batch"], dtype: torch.dtype) -> Float[Tensor, " batch"]:
    """The largest numbers of a dtype that exceed none of these, which are not negative."""
    rounded = radius.to(dtype)
    # the bits of positive numbers are ordered as they are
    bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize]
    return (rounded.view(bits) - (rounded.to(radius.dtype) > radius).to(bits)).view(dtype)
