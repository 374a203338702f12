"""The tables behind the figures of chapters 1 and 2."""

import math
from collections.abc import Sequence

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float

from clustr_core.certificates.ladder import certified_radius
from clustr_core.models.classifiers import Rule, cluster_logits, nearest_logits
from clustr_core.models.clusters import Clusters
from clustr_core.theory.examples import (
    Configuration,
    loose_nearest_example,
    loose_pairwise_example,
    only_second_nearest_example,
    random_configuration,
)
from clustr_core.theory.oracle import exact_nearest_rule_distance, ladder, second_nearest_radius_unsound
from clustr_core.theory.search import logits_of, smallest_flip


def logit_grid(clusters: Clusters, *, low: float, high: float, resolution: int) -> pd.DataFrame:
    """Both rules' logits on a square grid in the plane: columns x, y, nearest_0, nearest_1, ..., soft_0, soft_1, ..."""
    ticks = torch.linspace(low, high, resolution, dtype=torch.float64)
    points = torch.cartesian_prod(ticks, ticks)
    columns = {"x": points[:, 0].numpy(), "y": points[:, 1].numpy()}
    for name, logits in (("nearest", nearest_logits(points, clusters)), ("soft", cluster_logits(points, clusters))):
        columns |= {f"{name}_{c}": column.numpy() for c, column in enumerate(logits.T)}
    return pd.DataFrame(columns)


def predictions(grid: pd.DataFrame, rule: Rule) -> np.ndarray:
    """The class that ``rule`` predicts in each row of a `logit_grid`."""
    return grid.filter(regex=f"^{rule}_").to_numpy().argmax(axis=1)


def bisector_picture() -> pd.DataFrame:
    """The proof in one picture: an embedding z, its centroid, a rival, and where the bisector is reached first.

    Columns: point ("z", "own", "rival", "crossing"), x, y, and z's two radii, repeated in each row.
    """
    pair = Configuration(
        torch.tensor([[0.5, 1.9]], dtype=torch.float64),
        Clusters(
            torch.tensor([[0.0, 0.0], [3.2, 0.8]], dtype=torch.float64),
            torch.tensor([0, 1]),
            torch.ones(2, dtype=torch.float64),
        ),
    )
    z, clusters = pair.embeddings, pair.clusters
    crossing = exact_nearest_rule_distance(z, clusters)[1]
    places = torch.cat([z, clusters.centroids, crossing]).numpy()
    table = pd.DataFrame({"point": ["z", "own", "rival", "crossing"], "x": places[:, 0], "y": places[:, 1]})
    radii = {bound: float(certified_radius(z, clusters, bound=bound)) for bound in ("triangle", "nearest")}
    return table.assign(**radii)


def planar_radii(configuration: Configuration) -> pd.DataFrame:
    """Each planar point with its class and its ladder of radii: x, y, prediction, triangle, ..., exact."""
    points, clusters = configuration.embeddings, configuration.clusters
    predicted = nearest_logits(points, clusters).argmax(dim=1)
    head = pd.DataFrame({"x": points[:, 0].numpy(), "y": points[:, 1].numpy(), "prediction": predicted.numpy()})
    return pd.concat([head, ladder(points, clusters)], axis=1)


def planar_flips(
    configuration: Configuration, *, directions: int, reach: float, rule: Rule = "nearest"
) -> Float[np.ndarray, " batch"]:
    """The smallest step that changes each planar point's class, over evenly spread directions."""
    angles = torch.arange(directions, dtype=torch.float64) * (2 * math.pi / directions)
    rays = torch.stack([angles.cos(), angles.sin()], dim=1)
    logits = logits_of(lambda x: x, configuration.clusters, rule=rule)
    return np.array([smallest_flip(logits, point, rays, reach=reach, scan=512) for point in configuration.embeddings])


def radii_along(clusters: Clusters, *, begin: Sequence[float], end: Sequence[float], points: int) -> pd.DataFrame:
    """The ladder on a straight walk: "position" is the length walked, "prediction" the class there."""
    first, last = (torch.tensor(list(p), dtype=torch.float64) for p in (begin, end))
    share = torch.linspace(0, 1, points, dtype=torch.float64)[:, None]
    walk = first + share * (last - first)
    position = (share.squeeze(1) * (last - first).norm()).numpy()
    predicted = nearest_logits(walk, clusters).argmax(dim=1).numpy()
    return pd.DataFrame({"position": position, "prediction": predicted}).join(ladder(walk, clusters))


def loose_nearest_table(gaps: Sequence[float], *, offset: float = 0.01) -> pd.DataFrame:
    """CE2 as a family: the ladder for each gap between the near cluster and the rival, and pairwise / nearest."""
    return _family(gaps, "gap", [loose_nearest_example(gap, offset) for gap in gaps], "pairwise", "nearest")


def loose_pairwise_table(depths: Sequence[float], *, height: float = 40.0) -> pd.DataFrame:
    """CE3 as a family: the ladder for each depth, and exact / pairwise."""
    return _family(depths, "depth", [loose_pairwise_example(d, height) for d in depths], "exact", "pairwise")


def _family(values: Sequence[float], name: str, members: list[Configuration], upper: str, lower: str) -> pd.DataFrame:
    table = pd.concat([ladder(member.embeddings, member.clusters) for member in members], ignore_index=True)
    table.insert(0, name, list(values))
    return table.assign(ratio=table[upper] / table[lower])


def random_ladders(
    *, per_class: Sequence[int], dims: Sequence[int], configurations: int, points: int, seed: int, classes: int = 10
) -> pd.DataFrame:
    """The ladder on random configurations: columns dim, per_class, configuration, triangle, ..., exact."""
    rows = []
    for dim in dims:
        for k in per_class:
            for index in range(configurations):
                drawn = random_configuration(classes=classes, per_class=k, dim=dim, points=points, seed=seed + index)
                table = ladder(drawn.embeddings, drawn.clusters)
                rows.append(table.assign(dim=dim, per_class=k, configuration=index))
    return pd.concat(rows, ignore_index=True)


def unsound_share(
    *, classes: Sequence[int], dims: Sequence[int], configurations: int, points: int, seed: int
) -> pd.DataFrame:
    """How often looking at the second nearest centroid alone promises more than the truth (one cluster a class).

    Columns: dim, classes, points, unsound (their share) and overclaim (mean ratio of promise to truth where unsound).
    """
    rows = []
    for dim in dims:
        for count in classes:
            promised, truth = [], []
            for index in range(configurations):
                drawn = random_configuration(classes=count, per_class=1, dim=dim, points=points, seed=seed + index)
                promised.append(second_nearest_radius_unsound(drawn.embeddings, drawn.clusters))
                # with one cluster a class "nearest" is the truth, proved in chapter 1
                truth.append(certified_radius(drawn.embeddings, drawn.clusters, bound="nearest"))
            excess = torch.cat(promised) / torch.cat(truth)
            wrong = excess > 1 + 1e-9
            overclaim = float(excess[wrong].mean()) if wrong.any() else 1.0
            rows.append((dim, count, len(excess), float(wrong.double().mean()), overclaim))
    return pd.DataFrame(rows, columns=["dim", "classes", "points", "unsound", "overclaim"])


def soft_margin_along(configuration: Configuration, *, reach: float, points: int) -> pd.DataFrame:
    """The soft rule's margin g_0 - g_1 (nats) when a one-dimensional embedding moves by "shift".

    Repeated in each row: the shift at which the soft rule flips, and the radius "pairwise" claims under either rule.
    """
    z, clusters = configuration.embeddings, configuration.clusters
    shifts = torch.linspace(-reach, reach, points, dtype=torch.float64)
    logits = cluster_logits(z[0] + shifts[:, None], clusters)
    return pd.DataFrame({"shift": shifts.numpy(), "margin": (logits[:, 0] - logits[:, 1]).numpy()}).assign(
        flip=flip_along_line(configuration, reach=reach, rule="soft"),
        nearest_rule_radius=float(certified_radius(z, clusters, rule="nearest")),
        soft_rule_radius=float(certified_radius(z, clusters, rule="soft")),
    )


def flip_along_line(configuration: Configuration, *, reach: float, rule: Rule) -> float:
    """The smallest shift of a one-dimensional embedding that changes the class under ``rule``."""
    both_ways = torch.tensor([[-1.0], [1.0]], dtype=torch.float64)
    logits = logits_of(lambda x: x, configuration.clusters, rule=rule)
    return smallest_flip(logits, configuration.embeddings[0], both_ways, reach=reach, scan=1024)


def second_nearest_line() -> pd.DataFrame:
    """CE1 as rows to draw: z and the three centroids ("position"), with z's claimed, certified and true radius."""
    example = only_second_nearest_example()
    z, clusters = example.embeddings, example.clusters
    positions = [float(z), *clusters.centroids.flatten().tolist()]
    return pd.DataFrame({"point": ["z", "A", "B", "C"], "position": positions}).assign(
        claimed=float(second_nearest_radius_unsound(z, clusters)),
        certified=float(certified_radius(z, clusters, bound="nearest")),
        flip=flip_along_line(example, reach=2.0, rule="nearest"),
    )


def gain_by_dimension(ladders: pd.DataFrame, *, threshold: float = 1.01) -> pd.DataFrame:
    """For each (dim, per_class): share of points where pairwise > threshold * nearest, and the largest ratio.

    Args:
        ladders: as `random_ladders` makes it.
    """
    ratios = ladders.assign(ratio=ladders["pairwise"] / ladders["nearest"].where(ladders["nearest"] > 0))
    rows = []
    for dim, per_class in ratios[["dim", "per_class"]].drop_duplicates().itertuples(index=False):
        ratio = ratios.query(f"dim == {dim} and per_class == {per_class}")["ratio"].dropna().to_numpy(dtype=float)
        rows.append((dim, per_class, len(ratio), float((ratio > threshold).mean()), float(ratio.max())))
    return pd.DataFrame(rows, columns=["dim", "per_class", "points", "share", "largest"])


def stack_panels(**tables: pd.DataFrame) -> pd.DataFrame:
    """One table for a figure of several panels: a first column "panel" says which rows belong to which."""
    stacked = pd.concat([table.assign(panel=name) for name, table in tables.items()], ignore_index=True)
    stacked.insert(0, "panel", stacked.pop("panel"))
    return stacked
