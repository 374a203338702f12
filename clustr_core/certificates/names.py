"""What the certificates are called, each rung after the one that it dominates; read without PyTorch."""

from typing import Literal, get_args

HardBound = Literal["triangle", "nearest", "pairwise", "exact"]
SoftBound = Literal["soft-global", "soft-local", "soft-lse", "soft-dual"]
Bound = HardBound | SoftBound
HARD_BOUNDS: tuple[HardBound, ...] = get_args(HardBound)
SOFT_BOUNDS: tuple[SoftBound, ...] = get_args(SoftBound)
