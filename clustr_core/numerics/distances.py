"""Squared L2 distances and norms, and what matrix products of them need: the ground floor."""

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from clustr_core.numerics.chunks import rows_within
from clustr_core.numerics.derivatives import Gradients, gradients_of
from clustr_core.numerics.rounding import working_dtype


def squared_distances(
    points: Float[Tensor, "point dim"], centroids: Float[Tensor, "cluster dim"]
) -> Float[Tensor, "point cluster"]:
    """d_j^2 = ||z - mu_j||^2 from the differences themselves.

    The expansion ||z||^2 - 2<z, mu> + ||mu||^2 is one matrix product and faster, but it cancels: a small distance
    between points far from the origin loses up to all of its digits. Where many distances are needed, logits and
    certificates do take it, from the `mean_centroid`, and account for what is lost. Differentiable any number of times.
    Two dtypes are promoted, and half precision, which `torch.cdist` refuses, is computed and returned in float32.
    """
    dtype = working_dtype(points.dtype, centroids.dtype)
    squares: Tensor = _SquaredDistances.apply(points.to(dtype), centroids.to(dtype))  # pyright: ignore[reportAssignmentType]
    return squares


def nearest_points(
    queries: Float[Tensor, "query dim"], gallery: Float[Tensor, "point dim"], *, count: int
) -> tuple[Float[Tensor, "query count"], Int[Tensor, "query count"]]:
    """Squared distances and indices of the ``count`` points that are nearest to each query, nearest first.

    Raises:
        ValueError: if ``count`` is not in 1..gallery.
    """
    if not 1 <= count <= len(gallery):
        raise ValueError(f"count: expected 1 to {len(gallery)} neighbours, got {count}")
    some = queries.split(rows_within(len(gallery), queries.dtype))
    found = [squared_distances(part, gallery).topk(count, dim=1, largest=False) for part in some]
    return torch.cat([each.values for each in found]), torch.cat([each.indices for each in found])


class _SquaredDistances(torch.autograd.Function):
    """`torch.cdist`, squared, whose second derivative is right where a point lies on a centroid (PyTorch says 0)."""

    @staticmethod
    def forward(ctx: Any, points: Tensor, centroids: Tensor) -> Tensor:
        distances = torch.cdist(points, centroids, compute_mode="donot_use_mm_for_euclid_dist")
        ctx.save_for_backward(points, centroids, distances)
        return distances.square()

    @staticmethod
    def backward(ctx: Any, above: Tensor) -> Gradients:
        points, centroids, distances = ctx.saved_tensors

        def by_hand(above: Tensor) -> Gradients:
            back, of_distances = torch.ops.aten._cdist_backward, above * (2 * distances)
            one, other = of_distances.contiguous(), of_distances.mT.contiguous()
            return (
                back(one, points, centroids, 2.0, distances) if ctx.needs_input_grad[0] else None,
                back(other, centroids, points, 2.0, distances.mT.contiguous()) if ctx.needs_input_grad[1] else None,
            )

        return gradients_of(_expanded_distances, (points, centroids), (above,), by_hand)


def _expanded_distances(points: Tensor, centroids: Tensor) -> Tensor:
    """||z||^2 - 2<z, mu> + ||mu||^2, from the centroids' mean: whose derivatives need no large table."""
    origin = mean_centroid(centroids.detach())
    points, centroids = points - origin, centroids - origin
    squares = torch.linalg.vecdot(points, points)[:, None] + torch.linalg.vecdot(centroids, centroids)
    return squares - 2 * points @ centroids.T


def mean_centroid(centroids: Float[Tensor, "cluster dim"]) -> Float[Tensor, " dim"]:
    """The centroids' mean, which does not overflow where they do not."""
    return centroids.new_full((len(centroids),), 1 / len(centroids)) @ centroids


def flat_norm(batch: Float[Tensor, "batch ..."]) -> Float[Tensor, " batch"]:
    """L2 norm of each item of a batch, over all of its other dimensions."""
    return batch.flatten(1).norm(dim=1)


def per_item(values: Float[Tensor, " batch"], like: Float[Tensor, "batch ..."]) -> Float[Tensor, "batch ..."]:
    """Reshape one value per item so that it broadcasts against ``like``."""
    return values.reshape(-1, *[1] * (like.dim() - 1))
