"""The one place where a device decides which code runs.

Every kernel has a reference in plain PyTorch. Faster ones for a device are registered here under the same
name, so that no other module ever asks what kind of device a tensor lives on.
"""

from collections.abc import Callable
from typing import Any

from torch import Tensor

_KERNELS: dict[tuple[str, str], Callable[..., Any]] = {}


def register(name: str, device_type: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorator: make a function the kernel ``name`` for tensors on ``device_type`` ("cpu", "cuda")."""

    def add(function: Callable[..., Any]) -> Callable[..., Any]:
        _KERNELS[name, device_type] = function
        return function

    return add


def dispatch(name: str, reference: Callable[..., Any], first: Tensor) -> Callable[..., Any]:
    """The kernel ``name`` for the device of ``first``, or ``reference`` where the device has none of its own."""
    return _KERNELS.get((name, first.device.type), reference)
