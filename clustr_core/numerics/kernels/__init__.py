"""The one place where a device decides which code runs.

Every kernel has a form in plain PyTorch, which its caller passes as the reference. Faster ones for a device are
registered here under the same name, so that no other module ever asks what kind of device a tensor lives on. They are
imported when one of them is first wanted, and take float32, bfloat16 and float16: float64 always has the reference.
Those in Triton are left out where Triton is missing or older than `OLDEST_TRITON`. The environment variable
CLUSTR_KERNELS overrides the device:

    auto       the device's own kernel where there is one that was measured to be faster (the default)
    reference  plain PyTorch everywhere
    triton     Triton on whatever device; on a CPU only under its interpreter (TRITON_INTERPRET=1)
"""

import csv
import importlib
import logging
import math
import os
from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

CHOICES = ("auto", "reference", "triton")
VARIABLE = "CLUSTR_KERNELS"
_KERNELS: dict[tuple[str, str], Callable[..., Any]] = {}
# the first one with all that the kernels use; of torch 2.11
OLDEST_TRITON = (3, 6)
# the compute capability of the oldest GPU for which they are compiled, and looked at
OLDEST_CAPABILITY = (8, 0)
_TRITON_MODULES = ("cluster_logits", "pairwise_radius")
# what `benchmarks.kernels` measured on GPUs, in its own columns; so far an older version of the kernels, on an H100
MEASURED = Path(__file__).with_name("measured.csv")
_log = logging.getLogger(__name__)
_Reference = TypeVar("_Reference", bound=Callable[..., Any] | None)


def register(name: str, device_type: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorator: make a function the kernel ``name`` for tensors on ``device_type`` ("cpu", "cuda")."""

    def add(function: Callable[..., Any]) -> Callable[..., Any]:
        _KERNELS[name, device_type] = function
        return function

    return add


def dispatch(name: str, reference: _Reference, first: Tensor) -> Callable[..., Any] | _Reference:
    """The kernel ``name`` for the device and dtype of ``first``, or ``reference`` where there is none.

    Args:
        reference: plain PyTorch, called as the kernel is; or None, for a caller that asks whether there is one.

    Raises:
        ValueError: if CLUSTR_KERNELS is none of `CHOICES`.
        RuntimeError: if it is "triton" and Triton is missing or too old, or asked to compile for a CPU.
    """
    choice = os.environ.get(VARIABLE, "auto")
    if choice not in CHOICES:
        raise ValueError(f"{VARIABLE}: expected one of {CHOICES}, got {choice!r}")
    if choice == "reference" or first.dtype == torch.float64:
        return reference
    if choice == "triton":
        _require_triton(first)
        return _KERNELS.get((name, "cuda"), reference)
    if first.is_cuda:
        _import_kernels()
    kernel = _KERNELS.get((name, first.device.type))
    if kernel is None or (name in _TRITON_MODULES and first.numel() < crossover(name, first)):
        return reference
    return kernel


def crossover(name: str, first: Tensor) -> float:
    """From how many numbers in ``first`` on a kernel in Triton is used on its GPU: the fewest at which it was measured
    to be faster than plain PyTorch, eager and compiled, and slower at no size above; infinite where it never was."""
    if not first.is_cuda or _lacking_capability(first):
        return math.inf
    capability = _version(torch.cuda.get_device_capability(first.device))
    return _crossovers().get((name, str(first.dtype).removeprefix("torch."), capability), math.inf)


@cache
def _crossovers() -> dict[tuple[str, str, str], float]:
    """By kernel, dtype and compute capability."""
    faster: dict[tuple[str, str, str], dict[bool, list[int]]] = {}
    with MEASURED.open(encoding="utf-8", newline="") as rows:
        for row in csv.DictReader(rows):
            key = row["kernel"].partition(",")[0].removesuffix(" with gradients"), row["dtype"], row["capability"]
            plain = min((float(row[way]) for way in ("eager_ms", "compiled_ms") if row[way]), default=0.0)
            sizes = faster.setdefault(key, {True: [], False: []})
            sizes[float(row["ours_ms"]) < plain].append(int(row["elements"]))
    return {
        key: min((size for size in sizes[True] if size > max(sizes[False], default=0)), default=math.inf)
        for key, sizes in faster.items()
    }


def _require_triton(first: Tensor) -> None:
    if lacking := _import_kernels():
        raise RuntimeError(f"{VARIABLE}: 'triton' needs Triton {_version(OLDEST_TRITON)} or newer, and {lacking}")
    from triton import knobs

    if not first.is_cuda and not knobs.runtime.interpret:
        raise RuntimeError(
            f"{VARIABLE}: expected a CUDA tensor for 'triton', got one on {first.device}; "
            "there it runs only under its interpreter, with TRITON_INTERPRET=1 set from the start"
        )
    if lacking := _lacking_capability(first):
        raise RuntimeError(f"{VARIABLE}: 'triton' needs {lacking}")


def _lacking_capability(first: Tensor) -> str:
    """Why the kernels in Triton are not for a tensor's GPU; "" where they are, and for a CPU."""
    if not first.is_cuda or (found := torch.cuda.get_device_capability(first.device)) >= OLDEST_CAPABILITY:
        return ""
    name = torch.cuda.get_device_name(first.device)
    return f"compute capability {_version(OLDEST_CAPABILITY)} or newer, and {name} has {_version(found)}"


@cache
def _import_kernels() -> str:
    """Import the modules that register kernels, once; why those in Triton are left out, with a warning, or ""."""
    importlib.import_module(f"{__name__}.kmeans")
    if lacking := _lacking_triton():
        _log.warning("plain PyTorch runs in place of the GPU kernels: %s", lacking)
        return lacking
    for module in _TRITON_MODULES:
        importlib.import_module(f"{__name__}.{module}")
    return ""


def _lacking_triton() -> str:
    """What keeps the kernels in Triton from being imported; "" where nothing does."""
    if find_spec("triton") is None:
        return "Triton is not installed"
    found = triton_version()
    if tuple(int(part) for part in found.split(".")[:2]) < OLDEST_TRITON:
        return f"Triton {found} is installed, older than {_version(OLDEST_TRITON)}"
    return ""


def triton_version() -> str:
    """Of the Triton that would be imported, under whatever name it was installed."""
    import triton

    return triton.__version__


def _version(parts: tuple[int, ...]) -> str:
    return ".".join(map(str, parts))
