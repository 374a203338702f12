"""Searches for the smallest flip of maps with a known Lipschitz constant."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from clustr_core.certificates.ladder import certified_radius
from clustr_core.certificates.names import HARD_BOUNDS, SOFT_BOUNDS, HardBound
from clustr_core.models.classifiers import Rule, cluster_logits, nearest_logits
from clustr_core.models.clusters import Clusters
from clustr_core.numerics.distances import flat_norm, squared_distances
from clustr_core.theory.examples import random_configuration
from clustr_core.theory.oracle import exact_nearest_rule_distance

Encode = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Isometry:
    """f(x) = L (Q x + b), Q with orthonormal rows: every feature direction is reached at the full rate L."""

    rows: Float[Tensor, "dim input"]
    shift: Float[Tensor, " dim"]
    lipschitz: float

    def __call__(self, x: Float[Tensor, "batch input"]) -> Float[Tensor, "batch dim"]:
        """Features."""
        return self.lipschitz * (x @ self.rows.T + self.shift)


@dataclass(frozen=True)
class Folding:
    """f(x) = L (P |Q x + b| + s), P orthogonal, Q with orthonormal rows: not linear, and L-Lipschitz."""

    inner: Isometry
    outer: Float[Tensor, "dim dim"]
    shift: Float[Tensor, " dim"]

    @property
    def lipschitz(self) -> float:
        """The constant of the inner map: folding does not stretch."""
        return self.inner.lipschitz

    def __call__(self, x: Float[Tensor, "batch input"]) -> Float[Tensor, "batch dim"]:
        """Features."""
        return self.inner(x).abs() @ self.outer.T + self.shift


@dataclass(frozen=True)
class ExtremalMap:
    """f(x) = z + L <u, x - x0> (p - z) / ||p - z||, ||u|| = 1: no L-Lipschitz map gets from z to p any sooner."""

    embedding: Float[Tensor, " dim"]
    target: Float[Tensor, " dim"]
    start: Float[Tensor, " input"]
    direction: Float[Tensor, " input"]
    lipschitz: float

    def __call__(self, x: Float[Tensor, "batch input"]) -> Float[Tensor, "batch dim"]:
        """Features, all on the line through z and p."""
        along = self.target - self.embedding
        amount = self.lipschitz * ((x - self.start) @ self.direction)
        return self.embedding + amount[:, None] * along / along.norm()


def isometry_to(
    embedding: Float[Tensor, " dim"], start: Float[Tensor, " input"], *, lipschitz: float, seed: int
) -> Isometry:
    """A random `Isometry` with f(start) = embedding."""
    rows = _orthogonal(len(start), seed)[: len(embedding)]
    return Isometry(rows, embedding / lipschitz - rows @ start, lipschitz)


def folding_to(
    embedding: Float[Tensor, " dim"], start: Float[Tensor, " input"], *, lipschitz: float, seed: int
) -> Folding:
    """A random `Folding` with f(start) = embedding, folding near ``start``."""
    generator = torch.Generator().manual_seed(seed)
    hinge = torch.randn(len(embedding), generator=generator, dtype=torch.float64)
    inner = isometry_to(hinge, start, lipschitz=lipschitz, seed=seed + 1)
    outer = _orthogonal(len(embedding), seed + 2)
    return Folding(inner, outer, embedding - outer @ hinge.abs())


def extremal_map(
    embedding: Float[Tensor, " dim"],
    target: Float[Tensor, " dim"],
    start: Float[Tensor, " input"],
    *,
    lipschitz: float,
    seed: int,
) -> ExtremalMap:
    """The map that takes ``start`` to ``embedding`` and heads for ``target`` along a random input direction.

    Raises:
        ValueError: if the target is the embedding itself, which leaves no direction.
    Source: chapter 1, eq-extremal.
    """
    if torch.equal(embedding, target):
        raise ValueError("target: expected a point other than the embedding, got the embedding")
    direction = random_directions(len(start), 1, seed=seed)[0]
    return ExtremalMap(embedding, target, start, direction, lipschitz)


def _orthogonal(size: int, seed: int) -> Float[Tensor, "size size"]:
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64))[0]


def random_directions(size: int, count: int, *, seed: int) -> Float[Tensor, "count size"]:
    """Unit vectors, uniform on the sphere."""
    generator = torch.Generator().manual_seed(seed)
    normal = torch.randn(count, size, generator=generator, dtype=torch.float64)
    return normal / flat_norm(normal)[:, None]


def geometric_directions(encode: Isometry | ExtremalMap, start: Tensor, clusters: Clusters) -> Float[Tensor, "n input"]:
    """Input directions to every bisecting hyperplane and to the nearest rival region, pulled back through the map.

    On an `Isometry` one of these is the shortest way to another class under the nearest rule.
    """
    z = encode(start[None])
    own = clusters.labels == clusters.labels[squared_distances(z, clusters.centroids).argmin()]
    normals = (clusters.centroids[~own][:, None] - clusters.centroids[own]).flatten(0, 1)
    steps = torch.cat([normals, exact_nearest_rule_distance(z, clusters)[1] - z])
    if isinstance(encode, Isometry):
        back = steps @ encode.rows
    else:
        back = (steps @ (encode.target - encode.embedding))[:, None] * encode.direction
    return _unit(back)


def gradient_directions(
    logits: Encode, start: Float[Tensor, " input"], *, restarts: int, steps: int, scale: float, seed: int
) -> Float[Tensor, "n input"]:
    """Where Newton steps on the margin end up: x <- x + margin grad / ||grad||^2, towards each rival class.

    Args:
        logits: one column a class; differentiable.
        restarts: random starting points for each class, uniform in direction, at distance ``scale``.
    Source: Moosavi-Dezfooli et al. 2016 (DeepFool), with restarts, one run for each rival class.
    """
    clean = logits(start[None])[0]
    own = int(clean.argmax())
    rivals = torch.tensor([c for c in range(len(clean)) if c != own]).repeat(restarts)[:, None]
    x = start + scale * random_directions(len(start), len(rivals), seed=seed)
    for _ in range(steps):
        x = x.detach().requires_grad_(True)
        values = logits(x)
        margin = values[:, own] - values.gather(1, rivals).squeeze(1)
        (slope,) = torch.autograd.grad(margin.sum(), x)
        x = x - (margin / slope.square().sum(dim=1).clamp_min(1e-12))[:, None] * slope
    return _unit(x.detach() - start)


def _unit(vectors: Tensor) -> Tensor:
    lengths = flat_norm(vectors)
    return vectors[lengths > 0] / lengths[lengths > 0][:, None]


# inputs at a time, on the way outwards
SCANNED = 2048


def smallest_flip(
    logits: Encode,
    start: Float[Tensor, " input"],
    directions: Float[Tensor, "n input"],
    *,
    reach: float,
    scan: int = 64,
    passes: int = 8,
) -> float:
    """The smallest input norm at which the class was seen to change along any direction; infinity if none was.

    All rays are scanned at ``scan`` lengths up to ``reach``; then those that change in the first cell in which any does
    are scanned again within that cell, and so on. The end that flips is kept, so the returned norm is one that really
    changes the class.
    """
    rays, low, high, smallest = directions, 0.0, reach, math.inf
    with torch.no_grad():
        own = logits(start[None]).argmax()
        for _ in range(passes):
            lengths = torch.linspace(low, high, scan + 1, dtype=torch.float64)[1:]
            # outwards, a few lengths at a time: beyond the first change nothing counts
            for part in lengths.split(max(1, SCANNED // max(1, len(rays)))):
                inputs = start + part[:, None, None] * rays
                flipped = (logits(inputs.flatten(0, 1)).argmax(dim=1) != own).reshape(len(part), len(rays))
                if flipped.any():
                    break
            else:
                break
            cell = int(flipped.any(dim=1).int().argmax())
            rays, smallest = rays[flipped[cell]], float(part[cell])
            low, high = smallest - (high - low) / scan, smallest
    return smallest


def logits_of(encode: Encode, clusters: Clusters, *, rule: Rule, neighbours: int | None = None) -> Encode:
    """Inputs -> logits under ``rule``, through ``encode``."""
    if rule == "nearest":
        return lambda x: nearest_logits(encode(x), clusters)
    return lambda x: cluster_logits(encode(x), clusters, neighbours=neighbours)


def search_table(
    *,
    configurations: int,
    per_class: Sequence[int],
    seed: int,
    dim: int = 6,
    input_dim: int = 12,
    classes: int = 4,
    directions: int = 200,
    lipschitz: float = 2.0,
) -> pd.DataFrame:
    """Attack random maps of known Lipschitz constant with everything at hand, and note the smallest flip.

    Three maps for each configuration: an isometry, a folding and the extremal map. Three rules: nearest, soft, and
    soft with three voters. One row for each (configuration, map, rule, bound), with the certified radius, the
    smallest flip, and their ratio, which a sound certificate keeps at 1 or above (NaN where the radius is 0).

    Args:
        configurations: drawn anew for each entry of ``per_class``.
        directions: random ones, besides those from gradients and from geometry.
    """
    rows = []
    for k in per_class:
        for index, (z, clusters) in enumerate(_single_points(configurations, classes, k, dim, seed)):
            start = torch.zeros(input_dim, dtype=torch.float64)
            for name, encode in _maps_to(z, clusters, start, lipschitz, seed + index).items():
                for rule, neighbours in _RULES:
                    flip = _attack(encode, start, clusters, rule, neighbours, directions, seed + index)
                    radii = _radii_at(encode, start, clusters, rule, neighbours)
                    rows += [(index, k, name, rule, neighbours or 0, bound, r, flip) for bound, r in radii.items()]
    columns = ["configuration", "per_class", "map", "rule", "neighbours", "bound", "radius", "flip"]
    table = pd.DataFrame(rows, columns=columns)
    return table.assign(ratio=table["flip"] / table["radius"].where(table["radius"] > 0))


def _maps_to(
    z: Tensor, clusters: Clusters, start: Tensor, lipschitz: float, seed: int
) -> dict[str, Isometry | Folding | ExtremalMap]:
    target = exact_nearest_rule_distance(z, clusters)[1][0]
    return {
        "isometry": isometry_to(z[0], start, lipschitz=lipschitz, seed=seed),
        "folding": folding_to(z[0], start, lipschitz=lipschitz, seed=seed),
        "extremal": extremal_map(z[0], target, start, lipschitz=lipschitz, seed=seed),
    }


def _radii_at(
    encode: Isometry | Folding | ExtremalMap, start: Tensor, clusters: Clusters, rule: Rule, neighbours: int | None
) -> dict[HardBound, float]:
    """Radii of the embedding that the map computes, which differs by rounding from the one it was asked for."""
    options = {"lipschitz": encode.lipschitz, "rule": rule, "neighbours": neighbours}
    z = encode(start[None])
    return {bound: float(certified_radius(z, clusters, bound=bound, **options)) for bound in HARD_BOUNDS}


_RULES: tuple[tuple[Rule, int | None], ...] = (("nearest", None), ("soft", None), ("soft", 3))


def _single_points(
    configurations: int, classes: int, per_class: int, dim: int, seed: int
) -> Iterator[tuple[Tensor, Clusters]]:
    for index in range(configurations):
        drawn = random_configuration(
            classes=classes, per_class=per_class, dim=dim, points=1, seed=seed + index, spread=0.4, variance=0.2
        )
        yield drawn.embeddings, drawn.clusters


def _attack(
    encode: Isometry | Folding | ExtremalMap,
    start: Tensor,
    clusters: Clusters,
    rule: Rule,
    neighbours: int | None,
    directions: int,
    seed: int,
) -> float:
    """Random, gradient and (where the map can be inverted) geometric directions together."""
    logits = logits_of(encode, clusters, rule=rule, neighbours=neighbours)
    reach = 4 * float(clusters.centroids.norm(dim=1).max()) / encode.lipschitz
    tried = [
        random_directions(len(start), directions, seed=seed),
        gradient_directions(logits, start, restarts=8, steps=12, scale=0.02 * reach, seed=seed),
    ]
    if not isinstance(encode, Folding):
        tried.append(geometric_directions(encode, start, clusters))
    return smallest_flip(logits, start, torch.cat(tried), reach=reach)


def tightness_table(
    *, configurations: int, per_class: Sequence[int], lipschitz: Sequence[float], seed: int, dim: int = 6
) -> pd.DataFrame:
    """How near the extremal map comes to each radius: (flip - radius) / radius over random configurations.

    Columns: per_class, lipschitz, the configuration's radii ("nearest", "pairwise", "exact"), and "flip", the input
    norm at which the extremal map changes its class.
    """
    rows = []
    for k in per_class:
        for constant in lipschitz:
            for index, (z, clusters) in enumerate(_single_points(configurations, 4, k, dim, seed)):
                start = random_directions(2 * dim, 1, seed=seed + index)[0]
                distance, target = exact_nearest_rule_distance(z, clusters)
                encode = extremal_map(z[0], target[0], start, lipschitz=constant, seed=seed + index)
                logits = logits_of(encode, clusters, rule="nearest")
                reach = 2 * float(distance) / constant
                flip = smallest_flip(logits, start, encode.direction[None], reach=reach)
                radii = [float(certified_radius(z, clusters, bound=b, lipschitz=constant)) for b in HARD_BOUNDS[1:]]
                rows.append((k, constant, index, *radii, flip))
    columns = ["per_class", "lipschitz", "configuration", "nearest", "pairwise", "exact", "flip"]
    return pd.DataFrame(rows, columns=columns)


def soft_tightness_table(*, configurations: int, seed: int, per_class: int = 3, rays: int = 720) -> pd.DataFrame:
    """The soft rule's bounds against the truth in the plane: one row for each bound and configuration.

    Columns: ``bound`` (also "exact", with its correction), ``configuration``, ``radius``, and ``flip``, the least
    length at which the class was seen to change along rays half a degree apart.
    """
    angles = torch.arange(rays, dtype=torch.float64) * (2 * math.pi / rays)
    circle = torch.stack([angles.cos(), angles.sin()], dim=1)
    rows = []
    for index, (z, clusters) in enumerate(_single_points(configurations, 3, per_class, 2, seed)):
        logits = logits_of(lambda x: x, clusters, rule="soft")
        flip = smallest_flip(logits, z[0], circle, reach=4 * float(clusters.centroids.norm(dim=1).max()))
        for bound in ("exact", *SOFT_BOUNDS):
            rows.append((bound, index, float(certified_radius(z, clusters, bound=bound, rule="soft")), flip))
    return pd.DataFrame(rows, columns=["bound", "configuration", "radius", "flip"])
