"""The one place where a device decides which code runs.

Every kernel has a form in plain PyTorch, which its caller passes as the reference. Faster ones for a device are
registered here under the same name, so that no other module ever asks what kind of device a tensor lives on. Those in
Triton are imported when one of them is first wanted, and take float32, bfloat16 and float16: float64 always has the
reference. The environment variable CLUSTR_KERNELS overrides the device:

    auto       the device's own kernel where there is one (the default)
    reference  plain PyTorch everywhere
    triton     Triton on whatever device; on a CPU only under its interpreter (TRITON_INTERPRET=1)
"""

import importlib
import logging
import os
from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from typing import Any, TypeVar

import torch
from torch import Tensor

CHOICES = ("auto", "reference", "triton")
VARIABLE = "CLUSTR_KERNELS"
_KERNELS: dict[tuple[str, str], Callable[..., Any]] = {}
_TRITON_MODULES = ("cluster_logits", "pairwise_radius", "kmeans")
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
        RuntimeError: if it is "triton" and Triton is missing, or asked to compile for a CPU.
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
        _import_triton_kernels()
    return _KERNELS.get((name, first.device.type), reference)


def _require_triton(first: Tensor) -> None:
    if not _import_triton_kernels():
        raise RuntimeError(f"{VARIABLE}: expected Triton to be installed for 'triton', and it is not")
    from triton import knobs

    if not first.is_cuda and not knobs.runtime.interpret:
        raise RuntimeError(
            f"{VARIABLE}: expected a CUDA tensor for 'triton', got one on {first.device}; "
            "there it runs only under its interpreter, with TRITON_INTERPRET=1 set from the start"
        )


@cache
def _import_triton_kernels() -> bool:
    """Import the modules that register Triton's kernels; once, and with a warning where Triton is missing."""
    if find_spec("triton") is None:
        _log.warning("Triton is not installed: plain PyTorch runs in place of the GPU kernels")
        return False
    for module in _TRITON_MODULES:
        importlib.import_module(f"{__name__}.{module}")
    return True
