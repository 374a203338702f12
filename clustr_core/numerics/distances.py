"""Squared L2 distances and norms, and what matrix products of them need: the ground floor."""

import torch
from jaxtyping import Float
from torch import Tensor

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


def mean_centroid(centroids: Float[Tensor, "cluster dim"]) -> Float[Tensor, " dim"]:
    """The centroids' mean, which does not overflow where they do not."""
    return centroids.new_full((len(centroids),), 1 / len(centroids)) @ centroids


def rows_within(width: int, dtype: torch.dtype) -> int:
    """How many rows of ``width`` numbers fit into `CHUNK_BYTES`; at least one."""
    return max(1, CHUNK_BYTES // (width * dtype.itemsize))


def flat_norm(batch: Float[Tensor, "batch ..."]) -> Float[Tensor, " batch"]:
    """L2 norm of each item of a batch, over all of its other dimensions."""
    return batch.flatten(1).norm(dim=1)


def per_item(values: Float[Tensor, " batch"], like: Float[Tensor, "batch ..."]) -> Float[Tensor, "batch ..."]:
    """Reshape one value per item so that it broadcasts against ``like``."""
    return values.reshape(-1, *[1] * (like.dim() - 1))
