"""Squared L2 distances and norms, and what matrix products of them need: the ground floor."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from jaxtyping import Float
from torch import Tensor

# too coarse for distances: what comes in them is computed in float32
HALVES = (torch.bfloat16, torch.float16)
# the largest table of a chunk of embeddings, in bytes: the few that are held at once fit into a core's cache
CHUNK_BYTES = 2**22


def squared_distances(
    points: Float[Tensor, "point dim"], centroids: Float[Tensor, "cluster dim"]
) -> Float[Tensor, "point cluster"]:
    """d_j^2 = ||z - mu_j||^2 from the differences themselves.

    The expansion ||z||^2 - 2<z, mu> + ||mu||^2 is one matrix product and faster, but it cancels: a small distance
    between points far from the origin loses up to all of its digits. Where many distances are needed, logits and
    certificates do take it, from the centroids' `middle`, and account for what is lost.
    """
    distances = torch.cdist(points, centroids, compute_mode="donot_use_mm_for_euclid_dist")
    return distances.square()


def middle(centroids: Float[Tensor, "cluster dim"]) -> Float[Tensor, " dim"]:
    """The centroids' mean, which does not overflow where they do not."""
    return centroids.new_full((len(centroids),), 1 / len(centroids)) @ centroids


def rows_within(width: int, dtype: torch.dtype) -> int:
    """How many rows of ``width`` numbers fit into `CHUNK_BYTES`; at least one."""
    return max(1, CHUNK_BYTES // (width * dtype.itemsize))


def check_finite(embeddings: Float[Tensor, "batch dim"]) -> None:
    """Raises a ValueError unless every number is finite."""
    # two numbers tell of all; each alone, since autocast refuses to stack some dtypes
    if embeddings.numel() and not all(bool(each.isfinite()) for each in embeddings.detach().aminmax()):
        raise ValueError("embeddings: expected finite values, got NaN or infinity")


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


def flat_norm(batch: Float[Tensor, "batch ..."]) -> Float[Tensor, " batch"]:
    """L2 norm of each item of a batch, over all of its other dimensions."""
    return batch.flatten(1).norm(dim=1)


def per_item(values: Float[Tensor, " batch"], like: Float[Tensor, "batch ..."]) -> Float[Tensor, "batch ..."]:
    """Reshape one value per item so that it broadcasts against ``like``."""
    return values.reshape(-1, *[1] * (like.dim() - 1))
