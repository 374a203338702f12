"""The exact distance to another class, by a solver that knows nothing of the certificates."""

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from scipy.optimize import nnls
from torch import Tensor, nn

from clustr_core.certificates.ladder import certified_radius
from clustr_core.certificates.names import HARD_BOUNDS
from clustr_core.models.clusters import Clusters
from clustr_core.numerics.distances import flat_norm, squared_distances


def exact_nearest_rule_distance(
    embeddings: Float[Tensor, "batch dim"], clusters: Clusters
) -> tuple[Float[Tensor, " batch"], Float[Tensor, "batch dim"]]:
    """The oracle of these chapters: how far the nearest point of another class's region is, and that point.

    min over rivals j of dist(z, {p : d_j(p) <= d_i(p) for all i in c}), c the class of the nearest centroid. With
    v = p - z each constraint is <v, mu_j - mu_i> >= (d_j^2 - d_i^2) / 2: a least-distance program, solved by
    non-negative least squares. Rivals whose "pairwise" radius is above the best distance so far are not looked at.

    It is the truth that certificates are compared with, up to the solver's rounding, and not a certificate itself.

    Source: Lawson and Hanson 1974, chapter 23 (least distance programming).
    """
    distances = squared_distances(embeddings, clusters.centroids)
    predicted = clusters.labels[distances.argmin(dim=1)]
    found = [
        _nearest_rival_point(z, squares, clusters, int(c))
        for z, squares, c in zip(embeddings, distances, predicted, strict=True)
    ]
    steps = torch.stack([embeddings.new_tensor(step) for step in found])
    return flat_norm(steps), embeddings + steps


def _nearest_rival_point(z: Tensor, squares: Tensor, clusters: Clusters, predicted: int) -> np.ndarray:
    """The shortest step from z into a rival's region."""
    own = (clusters.labels == predicted).numpy()
    centroids, squared = clusters.centroids.numpy(), squares.numpy()
    best, shortest = np.inf, np.full(len(z), np.inf)
    normals = centroids[~own][:, None] - centroids[own]
    gaps = (squared[~own][:, None] - squared[own]) / 2
    lengths = np.linalg.norm(normals, axis=2)
    lower = np.divide(gaps, lengths, out=np.zeros_like(gaps), where=lengths > 0).max(axis=1)
    for j in lower.argsort():
        if lower[j] >= best:
            break
        step = least_distance(normals[j], gaps[j])
        if (length := float(np.linalg.norm(step))) < best:
            best, shortest = length, step
    return shortest


def least_distance(normals: Float[np.ndarray, "k dim"], gaps: Float[np.ndarray, " k"]) -> Float[np.ndarray, " dim"]:
    """The shortest v with <v, N_i> >= g_i for all i.

    With u >= 0 the minimiser of ||E u - f||, E = [N^T; g^T], f = (0, ..., 0, 1), and residual r = E u - f, it is
    v = -r_{1..m} / r_{m+1}.

    Raises:
        ValueError: if no v meets the constraints.
    Source: Lawson and Hanson 1974, chapter 23.
    """
    scale = np.abs(gaps).max()
    if scale == 0:
        return np.zeros(normals.shape[1])
    # the solution scales with the gaps: rescaled, its last residual keeps all of its digits
    lengths = np.linalg.norm(normals, axis=1)
    unit = max(scale / lengths.max(), np.finfo(float).tiny)
    stacked = np.vstack([normals.T * unit, gaps[None]]) / scale
    target = np.zeros(len(stacked))
    target[-1] = 1.0
    weights, _ = nnls(stacked, target)
    residual = stacked @ weights - target
    if -residual[-1] < 1e-12:
        raise ValueError("normals, gaps: expected constraints that some v meets, got none")
    return -residual[:-1] / residual[-1] * unit


def second_nearest_radius_unsound(
    embeddings: Float[Tensor, "batch dim"], clusters: Clusters
) -> Float[Tensor, " batch"]:
    """UNSOUND: (d_B^2 - d_A^2) / (2 ||mu_B - mu_A||) with B only the nearest rival of the nearest centroid A.

    A farther rival can be reached sooner, since its bisector with A may be closer. It is here to be refuted.
    """
    distances = squared_distances(embeddings, clusters.centroids)
    near, own = distances.min(dim=1)
    is_rival = clusters.labels != clusters.labels[own][:, None]
    far, rival = distances.masked_fill(~is_rival, torch.inf).min(dim=1)
    return (far - near) / (2 * flat_norm(clusters.centroids[rival] - clusters.centroids[own]))


def ladder(embeddings: Float[Tensor, "batch dim"], clusters: Clusters) -> pd.DataFrame:
    """One row for each embedding: the bounds of the nearest rule in feature units, and the "oracle"'s distance."""
    columns = {bound: certified_radius(embeddings, clusters, bound=bound).numpy() for bound in HARD_BOUNDS}
    return pd.DataFrame(columns | {"oracle": exact_nearest_rule_distance(embeddings, clusters)[0].numpy()})


def layer_matrix(layer: nn.Module, image: Tensor) -> Float[Tensor, "out in"]:
    """The Jacobian of a layer at one image, as a matrix, by automatic differentiation: what bounds are held to.

    Args:
        image: without a batch dimension, of the shape that the layer takes.
    """
    jacobian = torch.autograd.functional.jacobian(lambda x: layer(x[None])[0].flatten(), image)
    assert isinstance(jacobian, Tensor)
    return jacobian.reshape(-1, image.numel())
