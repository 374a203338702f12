"""Configurations of clusters: the counterexamples CE1 to CE4, the plane of chapter 1, random ones."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from clustr_core.models.clusters import Clusters


@dataclass(frozen=True)
class Configuration:
    """Embeddings and the clusters they are classified by."""

    embeddings: Float[Tensor, "batch dim"]
    clusters: Clusters


def planar_example() -> Configuration:
    """The picture of chapter 1: three classes of two clusters each in the plane, and eight points among them."""
    centroids = [[-2.0, -0.2], [0.2, 1.7], [-0.8, -1.9], [1.7, -1.4], [2.2, 0.9], [1.1, 0.0]]
    points = [
        [-2.1, 0.1],
        [-0.95, 1.1],
        [0.3, 2.3],
        [-1.3, -2.0],
        [0.55, -2.3],
        [2.1, -1.7],
        [1.7, 0.4],
        [2.1, 1.45],
    ]
    clusters = Clusters(
        torch.tensor(centroids, dtype=torch.float64),
        torch.tensor([0, 0, 1, 1, 2, 2]),
        torch.full((6,), 0.8, dtype=torch.float64),
    )
    return Configuration(torch.tensor(points, dtype=torch.float64), clusters)


def random_configuration(
    *, classes: int, per_class: int, dim: int, points: int, seed: int, spread: float = 0.5, variance: float = 1.0
) -> Configuration:
    """Standard normal centroids, and points drawn around randomly chosen ones of them.

    Args:
        spread: standard deviation of a point around its centroid, per coordinate, where centroids have 1.
        variance: sigma^2 of the clusters, which only the soft rule looks at.
    Raises:
        ValueError: if there are fewer than two classes, or a size is below one.
    """
    sizes = {"classes": (classes, 2), "per_class": (per_class, 1), "dim": (dim, 1), "points": (points, 1)}
    for name, (size, least) in sizes.items():
        if size < least:
            raise ValueError(f"{name}: expected at least {least}, got {size}")
    generator = torch.Generator().manual_seed(seed)
    count = classes * per_class
    centroids = torch.randn(count, dim, generator=generator, dtype=torch.float64)
    home = torch.randint(count, (points,), generator=generator)
    noise = torch.randn(points, dim, generator=generator, dtype=torch.float64)
    labels = torch.arange(classes).repeat_interleave(per_class)
    clusters = Clusters(centroids, labels, torch.full((count,), variance, dtype=torch.float64))
    return Configuration(centroids[home] + spread * noise, clusters)


def only_second_nearest_example() -> Configuration:
    """CE1: z = 0 between A = 1, B = 3/2 and C = -8/5 of three classes; looking at B alone promises 5/4."""
    return _on_a_line(0.0, [1.0, 1.5, -1.6], [0, 1, 2])


def loose_nearest_example(gap: float, offset: float = 0.01) -> Configuration:
    """CE2: z = -offset, one class at -1 and 1, the rival at 1 + gap.

    "nearest" is gap / 2 + offset, "pairwise" and the truth gap / 2 + 1 + offset: the ratio has no bound.

    Raises:
        ValueError: if ``gap`` or ``offset`` is not positive.
    """
    _check_positive(gap=gap, offset=offset)
    return _on_a_line(-offset, [-1.0, 1.0, 1.0 + gap], [0, 0, 1])


def loose_pairwise_example(depth: float, height: float = 40.0) -> Configuration:
    """CE3: one class at (-1, -depth) and (1, -depth), the rival at the origin, z = (0, -height).

    The truth exceeds "pairwise" by the factor sqrt(1 + depth^2) / depth, whatever the height.

    Raises:
        ValueError: unless 2 height depth > 1 + depth^2 and both are positive: else z belongs to the rival.
    """
    _check_positive(depth=depth, height=height)
    if not 2 * height * depth > 1 + depth**2:
        raise ValueError(f"height: expected more than {(1 + depth**2) / (2 * depth):.6g}, got {height}")
    clusters = Clusters(
        torch.tensor([[-1.0, -depth], [1.0, -depth], [0.0, 0.0]], dtype=torch.float64),
        torch.tensor([0, 0, 1]),
        torch.ones(3, dtype=torch.float64),
    )
    return Configuration(torch.tensor([[0.0, -height]], dtype=torch.float64), clusters)


def hard_radius_soft_rule_example() -> Configuration:
    """CE4: sigma = 1, one class at 1 and 100, both rivals at -1.1, z = 0.4; here the soft rule needs its own radius."""
    return _on_a_line(0.4, [1.0, 100.0, -1.1, -1.1], [0, 0, 1, 1])


def _on_a_line(z: float, centroids: list[float], labels: list[int]) -> Configuration:
    clusters = Clusters(
        torch.tensor(centroids, dtype=torch.float64)[:, None],
        torch.tensor(labels),
        torch.ones(len(centroids), dtype=torch.float64),
    )
    return Configuration(torch.tensor([[z]], dtype=torch.float64), clusters)


def _check_positive(**values: float) -> None:
    for name, value in values.items():
        if not value > 0:
            raise ValueError(f"{name}: expected a positive number, got {value}")
