"""What a fresh process calls, to have its peak memory measured: light, since that process imports it."""

from collections.abc import Callable

import torch


def allocation(count: int) -> Callable[[], torch.Tensor]:
    """A job that holds so many megabytes for a moment."""
    return lambda: torch.zeros(count * 10**6 // 4).add_(1)
