"""Squared L2 distances and norms: the ground floor."""

import torch
from jaxtyping import Float
from torch import Tensor


def squared_distances(
    points: Float[Tensor, "point dim"], centroids: Float[Tensor, "cluster dim"]
) -> Float[Tensor, "point cluster"]:
    """d_j^2 = ||z - mu_j||^2 from the differences themselves.

    The expansion ||z||^2 - 2<z, mu> + ||mu||^2 is one matrix product and faster, but it cancels: a small distance
    between points far from the origin loses up to all of its digits, and a certificate is made of exactly these.
    """
    distances = torch.cdist(points, centroids, compute_mode="donot_use_mm_for_euclid_dist")
    return distances.square()


def flat_norm(batch: Float[Tensor, "batch ..."]) -> Float[Tensor, " batch"]:
    """L2 norm of each item of a batch, over all of its other dimensions."""
    return batch.flatten(1).norm(dim=1)


def per_item(values: Float[Tensor, " batch"], like: Float[Tensor, "batch ..."]) -> Float[Tensor, "batch ..."]:
    """Reshape one value per item so that it broadcasts against ``like``."""
    return values.reshape(-1, *[1] * (like.dim() - 1))
