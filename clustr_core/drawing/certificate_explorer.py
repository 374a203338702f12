"""The data of the widget "certificate-explorer": where it may start, and how bounds and classes are drawn."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.colors import to_hex

from clustr_core.drawing.geometry import CLASS_MARKERS
from clustr_core.drawing.looks import BOUND_LOOKS, CLASS_COLOURS, COLOURS, Look
from clustr_core.drawing.widgets import DASHES
from clustr_core.models.classifiers import Rule
from clustr_core.theory.examples import (
    Configuration,
    hard_radius_soft_rule_example,
    loose_nearest_example,
    loose_pairwise_example,
    only_second_nearest_example,
    planar_example,
)

CLASSES = 4
CENTROIDS = range(2, 9)
# a dash a bound: colour is never the only difference
SOFT_LOOKS = {
    "soft-global": Look(COLOURS[4], ":", "v"),
    "soft-local": Look(COLOURS[3], "-.", "<"),
    "soft-lse": Look(COLOURS[2], "--", ">"),
    "soft-dual": Look(COLOURS[9], "-", "d"),
}
UNSOUND_LOOK = Look(COLOURS[3], "--", "X")
_ABOUT = {
    "triangle": (
        "triangle",
        "Half of how much farther the nearest rival centroid is than the nearest own one. A step can seldom approach "
        "the one and leave the other at full speed, so this bound is never the larger.",
    ),
    "nearest": (
        "nearest",
        "The theorem: the distance to the closest wall between the nearest centroid and any rival. Tight with one "
        "centroid a class.",
    ),
    "pairwise": (
        "pairwise",
        "For each rival the farthest of its walls with the own centroids, since any of them can hold it off; the least "
        "over the rivals.",
    ),
    "exact": (
        "exact",
        "The distance to the nearest point that is closer to a rival than to every own centroid: a point of a wall, or "
        "a corner of two. Nothing that knows only z and L certifies more under the nearest rule.",
    ),
    "soft-global": (
        "soft-global",
        "The margin of the log-scores over the largest rate at which it can shrink, from the largest distance between "
        "centroids of the two classes.",
    ),
    "soft-local": (
        "soft-local",
        "The same with distances to the mean of the own centroids, weighted by their votes at z.",
    ),
    "soft-lse": (
        "soft-lse",
        "The largest step at which the rival's votes, each grown at its own rate, still add up to less.",
    ),
    "soft-dual": (
        "soft-dual",
        "The same at the best weights of the own centroids that are found; every choice of weights is sound.",
    ),
    "second-nearest": (
        "second nearest only",
        "The wall with the nearest rival centroid alone. A farther rival's wall may be closer, so this is no "
        "certificate.",
    ),
    "uncorrected": (
        "nearest, uncorrected",
        'The bound "nearest" without taking off σ² log k. It forgets that the votes of a class add up, so under the '
        "soft rule it is no certificate.",
    ),
}


@dataclass(frozen=True)
class Preset:
    """A configuration that the widget can start from.

    Args:
        configuration: of 2 to 8 centroids in the plane or on a line, which is drawn at second coordinate 0.
        point: which of its embeddings is z.
        centre: of the part of the plane that is seen, which is a square.
        half: half of the square's side.
    """

    title: str
    lesson: str
    configuration: Configuration
    shown: tuple[str, ...]
    centre: tuple[float, float] = (0.0, 0.0)
    half: float = 3.0
    point: int = 0
    rule: Rule = "nearest"


def presets() -> list[Preset]:
    """The plane of chapter 1, and the counterexamples CE1 to CE4 of chapter 2."""
    return [
        Preset(
            "the plane of this chapter",
            "Three classes of two clusters each. Below the two clusters of its class, z is stopped by “nearest” at a "
            "wall behind which lies its own class again; “pairwise” grows past that wall.",
            planar_example(),
            ("nearest", "pairwise", "exact"),
            half=3.6,
            point=4,
        ),
        Preset(
            "CE1: the second nearest is not enough",
            "The wall with the second nearest centroid is far away, and the wall with the third is close. A radius "
            "that looks at the second alone is no certificate: its disc crosses into another class.",
            only_second_nearest_example(),
            ("exact", "second-nearest"),
            half=2.2,
        ),
        Preset(
            "CE2: “nearest” can be loose",
            "z stands between the two clusters of its class. “nearest” counts on the left one, which is a trifle "
            "closer; “pairwise” lets the right one hold the rival off, and doubles the radius. The farther apart the "
            "two, the worse it gets.",
            loose_nearest_example(2.0),
            ("nearest", "pairwise", "exact"),
            centre=(0.6, 0.0),
        ),
        Preset(
            "CE3: “pairwise” can be loose too",
            "Two walls enclose the rival's region in a wedge, and z looks at its tip. Each wall alone is close; "
            "their common corner, which only “exact” knows, is far. The flatter the wedge, the worse it gets.",
            loose_pairwise_example(0.5, 2.0),
            ("pairwise", "exact"),
            centre=(0.0, -1.2),
            half=2.0,
        ),
        Preset(
            "CE4: votes add up",
            "Two rivals at one place have two votes. The radius of the nearest rule forgets that and is unsound for "
            "the soft rule; less σ² log 2 it is sound again. The other cluster of z's class is far to the right.",
            hard_radius_soft_rule_example(),
            ("exact", "soft-dual", "uncorrected"),
            centre=(-0.1, 0.0),
            half=1.4,
            rule="soft",
        ),
    ]


def data(starts: list[Preset] | None = None) -> dict[str, Any]:
    """What the widget reads, as JSON holds it: ``classes``, ``bounds`` and ``presets``.

    Args:
        starts: None takes `presets`.
    Raises:
        ValueError: for no preset, or one whose clusters the widget cannot show: not 2 to 8 of them, not of 2 to 4
            classes, in more than two dimensions, or with unequal variances.
    Source: this book, chapters 1 and 2.
    """
    chosen = presets() if starts is None else starts
    if not chosen:
        raise ValueError("starts: expected at least one preset, got none")
    looks = BOUND_LOOKS | SOFT_LOOKS | {"second-nearest": UNSOUND_LOOK, "uncorrected": UNSOUND_LOOK}
    return {
        "classes": [
            {"color": to_hex(colour), "marker": marker}
            for colour, marker in zip(CLASS_COLOURS[:CLASSES], CLASS_MARKERS[:CLASSES], strict=True)
        ],
        "bounds": {bound: _bound(bound, looks[bound]) for bound in _ABOUT},
        "presets": [_as_json(preset) for preset in chosen],
    }


def _bound(bound: str, look: Look) -> dict[str, str]:
    name, about = _ABOUT[bound]
    assert isinstance(look.linestyle, str)
    dash = DASHES[look.linestyle]
    return {"name": name, "about": about, "color": to_hex(look.color), "dash": dash, "marker": look.marker}


def _as_json(preset: Preset) -> dict[str, Any]:
    clusters = preset.configuration.clusters
    count, dim = clusters.centroids.shape
    if count not in CENTROIDS:
        raise ValueError(f"{preset.title}: expected 2 to 8 centroids, got {count}")
    if not 2 <= clusters.num_classes <= CLASSES:
        raise ValueError(f"{preset.title}: expected 2 to {CLASSES} classes, got {clusters.num_classes}")
    if dim > 2:
        raise ValueError(f"{preset.title}: expected centroids on a line or in the plane, got {dim} dimensions")
    return {
        "title": preset.title,
        "lesson": preset.lesson,
        "rule": preset.rule,
        "z": _in_the_plane(preset.configuration.embeddings.numpy())[preset.point].tolist(),
        "centroids": _in_the_plane(clusters.centroids.numpy()).tolist(),
        "labels": clusters.labels.tolist(),
        "variance": clusters.shared_variance,
        "lipschitz": 1.0,
        "shown": list(preset.shown),
        "centre": list(preset.centre),
        "half": preset.half,
    }


def _in_the_plane(points: np.ndarray) -> np.ndarray:
    """Points of a line get a second coordinate of 0."""
    return np.pad(points, ((0, 0), (0, 2 - points.shape[1])))
