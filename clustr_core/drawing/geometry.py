"""The plane: cells, discs, bisectors and the ladder on a line."""

from collections.abc import Sequence

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.patches import Circle
from scipy.spatial import Voronoi, voronoi_plot_2d

from clustr_core.drawing.checks import check_grid, check_known, check_rows
from clustr_core.drawing.looks import BOUND_LOOKS, CLASS_COLOURS

CLASS_MARKERS = "o^sDPX"


def draw_regions(
    axes: Axes,
    grid: pd.DataFrame,
    labels: Sequence[int] | np.ndarray,
    centroids: np.ndarray,
    *,
    rule: str = "nearest",
    border: str = "-",
) -> None:
    """Regions of a planar classifier, a line around each, and the centroids, one marker a class.

    Args:
        grid: x, y of a full grid and one column ``rule``_c of logits for each class c.
        border: line style of the regions' borders.
    Raises:
        ValueError: for fewer than two classes or more than there are colours, a label for each centroid missing, or
            centroids that are not finite points of the plane; and as `check_grid`.
    """
    classes, most = np.unique(labels), len(CLASS_COLOURS)
    if not 2 <= len(classes) <= most:
        raise ValueError(f"labels: expected 2 to {most} classes, which have a colour each, got {len(classes)}")
    _check_points(centroids, "centroids")
    if len(labels) != len(centroids):
        raise ValueError(f"labels: expected one for each of {len(centroids)} centroids, got {len(labels)}")
    check_grid(grid, "x", "y", *(f"{rule}_{c}" for c in classes))
    logits = np.stack([grid.pivot(index="y", columns="x", values=f"{rule}_{c}").to_numpy() for c in classes])
    x, y = np.unique(grid["x"]), np.unique(grid["y"])
    for n, (c, colour, marker) in enumerate(zip(classes, CLASS_COLOURS, CLASS_MARKERS, strict=False)):
        lead = logits[n] - np.delete(logits, n, axis=0).max(axis=0)
        axes.contourf(x, y, lead, levels=[0, np.inf], colors=[colour], alpha=0.18)
        axes.contour(x, y, lead, levels=[0], colors="0.2", linewidths=1.1, linestyles=border)
        mine = np.asarray(labels) == c
        axes.scatter(
            *centroids[mine].T, color=colour, marker=marker, s=75, edgecolor="black", zorder=3, label=f"class {c}"
        )
    _plane(axes, (x[0], x[-1]), (y[0], y[-1]))


def draw_voronoi(axes: Axes, centroids: np.ndarray, **look) -> None:
    """Edges of the centroids' Voronoi cells; the axes keep their limits.

    Raises:
        ValueError: for fewer than four centroids, which the algorithm needs, or some that are not finite points.
    """
    _check_points(centroids, "centroids", least=4)
    limits = axes.get_xlim(), axes.get_ylim()
    before = len(axes.collections)
    voronoi_plot_2d(Voronoi(centroids), axes, show_points=False, show_vertices=False)
    for edges in axes.collections[before:]:
        edges.set(**{"linestyle": ":", "linewidth": 1.1, "color": "0.35", "alpha": 1.0} | look)
    _plane(axes, *limits)


def _check_points(points: np.ndarray, name: str, *, least: int = 1) -> None:
    if points.ndim != 2 or points.shape[1] != 2 or len(points) < least or not np.isfinite(points).all():
        raise ValueError(f"{name}: expected {least} or more finite points of the plane, got {points.tolist()}")


def _plane(axes: Axes, xlim: tuple[float, float], ylim: tuple[float, float]) -> None:
    axes.set(aspect="equal", xlim=xlim, ylim=ylim, xlabel="first coordinate", ylabel="second coordinate")
    axes.grid(False)


def draw_discs(axes: Axes, points: pd.DataFrame, *, radius: str = "radius", **look) -> None:
    """Certified balls of planar points: columns x, y and ``radius``.

    Raises:
        ValueError: for a negative radius; and as `check_rows`.
    """
    check_rows(points, "x", "y", radius)
    if (least := float(np.min(points[radius]))) < 0:
        raise ValueError(f"{radius}: expected radii of at least 0, got {least:g}")
    style = {"facecolor": "none", "edgecolor": "black", "linewidth": 0.9} | look
    for x, y, r in points[["x", "y", radius]].itertuples(index=False):
        axes.add_patch(Circle((x, y), r, **style))
    axes.plot(points["x"], points["y"], "k.", markersize=3)


def draw_bisector(axes: Axes, table: pd.DataFrame) -> None:
    """One pair of centroids, their bisector, z with its two discs, and the shortest step to the bisector.

    Args:
        table: as `clustr_core.theory.pictures.bisector_picture` makes it.
    Raises:
        ValueError: if a point is missing; and as `check_rows`.
    """
    check_rows(table, "x", "y", words=("point",))
    if missing := {"own", "rival", "z", "crossing"} - set(table["point"]):
        raise ValueError(f"table: expected the points own, rival, z and crossing, got none called {sorted(missing)}")
    at = {name: np.array([x, y]) for name, x, y in table[["point", "x", "y"]].itertuples(index=False)}
    axis = at["rival"] - at["own"]
    along = np.array([-axis[1], axis[0]]) / np.linalg.norm(axis)
    line = np.array([(at["own"] + at["rival"]) / 2 + t * along for t in (-4, 6)])
    axes.plot(*line.T, color="0.2", linewidth=1.4)
    for end, name in (("own", "$d_i$"), ("rival", "$d_j$")):
        axes.plot(*np.array([at["z"], at[end]]).T, color="0.5", linewidth=0.9)
        x, y = 0.4 * at["z"] + 0.6 * at[end] + 0.07
        axes.text(x, y, name, color="0.3")
    for bound in ("triangle", "nearest"):
        look = BOUND_LOOKS[bound]
        disc = {"edgecolor": look.color, "linestyle": look.linestyle, "linewidth": 2.0, "label": bound}
        draw_discs(axes, table.query("point == 'z'"), radius=bound, **disc)
    step = {"arrowstyle": "->", "linewidth": 1.5, "shrinkA": 0, "shrinkB": 0, "color": "black"}
    axes.annotate("", tuple(at["crossing"]), tuple(at["z"]), arrowprops=step)
    for name, offset, text in (
        ("z", (-0.14, 0.05), "$z$"),
        ("crossing", (0.07, 0.0), "$z+v^*$"),
        ("own", (0.12, -0.05), r"$\mu_i$, own"),
        ("rival", (0.12, -0.05), r"$\mu_j$, rival"),
    ):
        x, y = at[name] + offset
        axes.text(x, y, text)
    axes.text(1.95, -0.35, "bisector")
    axes.scatter(*at["own"], color=CLASS_COLOURS[0], marker="o", s=75, edgecolor="black", zorder=3)
    axes.scatter(*at["rival"], color=CLASS_COLOURS[1], marker="^", s=75, edgecolor="black", zorder=3)
    _plane(axes, (-0.6, 4.1), (-0.5, 2.75))
    axes.legend(loc="upper right")


def draw_ladder(
    axes: Axes, table: pd.DataFrame, x: str, *, bounds: Sequence[str] = tuple(BOUND_LOOKS), every: int = 0
) -> None:
    """Radii against column ``x``, one line a bound; ``every`` puts a marker on each n-th point.

    Raises:
        ValueError: for a bound without a look; and as `check_rows`.
    """
    check_known(pd.DataFrame({"bounds": list(bounds)}), "bounds", BOUND_LOOKS)
    check_rows(table, x, *bounds)
    every = every or int(len(table) == 1)  # a line of one point would not be seen
    for bound in bounds:
        look = BOUND_LOOKS[bound]
        axes.plot(
            table[x],
            table[bound],
            color=look.color,
            linestyle=look.linestyle,
            marker=look.marker if every else None,
            markevery=every or None,
            markersize=4.5,
            linewidth=1.8,
            zorder=2 if look.linestyle == "-" else 3,
            label=bound,
        )
    axes.legend()


def draw_on_a_line(axes: Axes, table: pd.DataFrame) -> None:
    """CE1: centroids on a line, z, the interval the unsound formula claims, and the one that is certified.

    Args:
        table: as `clustr_core.theory.pictures.second_nearest_line` makes it.
    Raises:
        ValueError: if a point is missing; and as `check_rows`.
    """
    check_rows(table, "position", "claimed", "certified", "flip", words=("point",))
    if missing := {*"ABCz"} - set(table["point"]):
        raise ValueError(f"table: expected the points A, B, C and z, got none called {sorted(missing)}")
    at = dict(zip(table["point"], table["position"].astype(float), strict=True))
    claimed, certified, flip = (float(table[name].iloc[0]) for name in ("claimed", "certified", "flip"))
    bars = ((1.0, claimed, "claimed from B alone", "//"), (0.5, certified, "certified over all rivals", ""))
    for height, reach, name, hatch in bars:
        axes.barh(height, 2 * reach, 0.28, at["z"] - reach, color="0.88", edgecolor="black", hatch=hatch)
        axes.text(at["z"] + reach + 0.06, height, name, va="center", fontsize="small")
    axes.axvline(at["z"] - flip, color="black", linestyle="--", linewidth=1.2)
    axes.text(at["z"] - flip - 0.06, 1.42, "class C from here on", ha="right", fontsize="small")
    axes.axhline(0, color="0.4", linewidth=0.9)
    for name, colour, marker in zip("ABC", CLASS_COLOURS, "o^s", strict=False):
        axes.scatter(at[name], 0, color=colour, marker=marker, s=80, edgecolor="black", zorder=3)
        axes.text(at[name], -0.27, name, ha="center")
    axes.plot(at["z"], 0, "k.", markersize=9)
    axes.text(at["z"], -0.27, "z", ha="center")
    axes.set(xlim=(-2, 3.2), ylim=(-0.5, 1.65), xlabel="embedding", yticks=[])
    axes.spines["left"].set_visible(False)
    axes.grid(False)


def draw_soft_margin(axes: Axes, table: pd.DataFrame) -> None:
    """CE4: the soft rule's margin against the shift of z, and the radius claimed under either rule.

    Args:
        table: as `clustr_core.theory.pictures.soft_margin_along` makes it.
    Raises:
        ValueError: for fewer than two rows; and as `check_rows`.
    """
    check_rows(table, "shift", "margin", "nearest_rule_radius", "soft_rule_radius", "flip")
    if len(table) < 2:
        raise ValueError(f"table: expected two or more shifts, got {len(table)}")
    axes.plot(table["shift"], table["margin"], color="black")
    axes.axhline(0, color="0.4", linewidth=0.9)
    margin = table["margin"].to_numpy(dtype=float)
    low, high = margin.min(), margin.max()
    bars = (("nearest_rule_radius", "nearest rule", "//", 0.80), ("soft_rule_radius", "corrected", "", 0.92))
    for column, name, hatch, share in bars:
        radius, height = float(table[column].iloc[0]), low + share * (high - low)
        axes.barh(height, 2 * radius, 0.07 * (high - low), -radius, color="0.88", edgecolor="black", hatch=hatch)
        axes.text(-radius - 0.02, height, name, va="center", ha="right", fontsize="small")
    axes.axvline(-table["flip"].iloc[0], color="black", linestyle="--", linewidth=1.2)
    axes.set(xlabel="shift of z", ylabel="soft margin, nats", xlim=(table["shift"].min(), table["shift"].max()))
