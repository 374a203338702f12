"""One check of each kind of value."""

import math

from jaxtyping import Float
from torch import Tensor


def check_finite(embeddings: Float[Tensor, "batch dim"]) -> None:
    """Raises a ValueError unless every number is finite."""
    # two numbers tell of all; each alone, since autocast refuses to stack some dtypes
    if embeddings.numel() and not all(bool(each.isfinite()) for each in embeddings.detach().aminmax()):
        raise ValueError("embeddings: expected finite values, got NaN or infinity")


def check_positive(**lengths: float) -> None:
    """Raises a ValueError unless every number is positive and finite."""
    for name, length in lengths.items():
        if not (length > 0 and math.isfinite(length)):
            raise ValueError(f"{name}: expected a positive number, got {length}")
