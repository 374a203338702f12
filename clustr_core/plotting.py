"""Tables -> Axes. Every series has a colour, a line style and a marker, so that grey and colour-blind eyes can tell."""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Circle
from matplotlib.patheffects import withStroke
from scipy.spatial import Voronoi, voronoi_plot_2d

from clustr_core import records


@dataclass(frozen=True)
class Look:
    """How one series is drawn."""

    color: str
    linestyle: str
    marker: str


_COLOURS = sns.color_palette("colorblind").as_hex()
CLASS_COLOURS = [_COLOURS[c] for c in (0, 1, 2, 4, 8, 9)]
# by family: no defence in grey, an adversary without clusters in blue to pink, clusters in orange, green and red; what
# certifies, which is drawn apart from the rest, in black for the book's own and in colours for its rivals
LOOKS = {
    "ce": Look(_COLOURS[7], ":", "s"),
    "ce-clusters": Look("0.25", ":", "v"),
    "pgd-at": Look(_COLOURS[0], "-", "o"),
    "trades": Look(_COLOURS[9], "-", "P"),
    "free-at": Look(_COLOURS[4], "--", "X"),
    "fast-at": Look(_COLOURS[6], "-.", "<"),
    "clustr": Look(_COLOURS[1], "--", "^"),
    "clustr-qtrades": Look(_COLOURS[2], "-.", "D"),
    "free-clustr": Look(_COLOURS[3], "-", "*"),
    "clustr-cert": Look("black", "-", "p"),
    "clustr-lip": Look(_COLOURS[5], "--", "h"),
    "lip-linear": Look("#08519c", "-.", "d"),
    "smoothing": Look("#006d5b", ":", ">"),
    "prototypes": Look("0.55", "--", "8"),
}
BOUND_LOOKS = {
    "triangle": Look(_COLOURS[7], ":", "s"),
    "nearest": Look(_COLOURS[1], "--", "^"),
    "pairwise": Look(_COLOURS[0], "-", "o"),
    "exact": Look("black", "-.", "D"),
}
METHOD_NAMES = {
    "ce": "cross-entropy",
    "ce-clusters": "cross-entropy, clusters fitted after",
    "pgd-at": "PGD adversarial training",
    "trades": "TRADES",
    "free-at": "free adversarial training",
    "fast-at": "fast adversarial training",
    "clustr": "ClusTR",
    "clustr-qtrades": "ClusTR+QTRADES",
    "free-clustr": "free ClusTR",
    "clustr-cert": "ClusTR-cert",
    "clustr-lip": "ClusTR-lip",
    "lip-linear": "1-Lipschitz linear head",
    "smoothing": "randomised smoothing",
    "prototypes": "prototypes on raw pixels",
}
SANDWICH_LOOKS = {
    "clean": Look("0.55", ":", ""),
    "apgd": Look(_COLOURS[2], "-.", "D"),
    "ddn": Look(_COLOURS[1], "--", "^"),
    "fmn": Look(_COLOURS[0], ":", "s"),
    "worst case": Look(_COLOURS[3], "--", ""),
    "certified": Look("black", "-", ""),
}
# two evaluations of the same models
PROTOCOL_LOOKS = {
    "paper": Look(_COLOURS[1], "--", "^"),
    "correct": Look(_COLOURS[0], "-", "o"),
}
PROTOCOL_NAMES = {"paper": "the paper's protocol", "correct": "correct attacks"}


def house_style() -> None:
    """Set the book's look for every figure that follows; the same table then gives the same bytes."""
    sns.set_theme(context="notebook", style="ticks", palette="colorblind", rc={"axes.grid": True, "grid.alpha": 0.3})
    mpl.rcParams.update(
        {
            "figure.dpi": 110,
            "savefig.dpi": 160,
            "figure.constrained_layout.use": True,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "legend.frameon": False,
            "svg.fonttype": "none",
            "font.family": ["DejaVu Sans"],
        }
    )


def save_figure(figure: Figure, label: str, table: pd.DataFrame, *, profile: str | None = None) -> Path:
    """Write figures/<profile>/<label>.svg, .png and .csv, the table that it was drawn from.

    Args:
        profile: None takes ``$CLUSTR_PROFILE``, which a headless run sets, or "quick".
    Returns:
        the path of the table; its siblings have the same stem.
    Raises:
        ValueError: if the label does not begin with "fig-", or the table is empty.
    """
    if not label.startswith("fig-"):
        raise ValueError(f'label: expected a name that begins with "fig-", got {label!r}')
    if table.empty:
        raise ValueError(f"table: expected the rows that {label} was drawn from, got none")
    profile = profile or os.environ.get("CLUSTR_PROFILE", "quick")
    stem = records.home() / "figures" / profile / label
    for suffix, undated in ((".svg", {"Date": None}), (".png", {"Software": None})):
        # a fixed salt: the same table gives the same bytes
        with records.written_whole(stem.with_suffix(suffix)) as temporary, mpl.rc_context({"svg.hashsalt": label}):
            figure.savefig(temporary, format=suffix[1:], metadata=undated, bbox_inches="tight")
    records.write_table(stem.with_suffix(".csv"), table)
    return stem.with_suffix(".csv")


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
    """
    classes = np.unique(labels)
    logits = np.stack([grid.pivot(index="y", columns="x", values=f"{rule}_{c}").to_numpy() for c in classes])
    x, y = np.unique(grid["x"]), np.unique(grid["y"])
    for c, colour, marker in zip(classes, CLASS_COLOURS, "o^sDPX", strict=False):
        lead = logits[c] - np.delete(logits, c, axis=0).max(axis=0)
        axes.contourf(x, y, lead, levels=[0, np.inf], colors=[colour], alpha=0.18)
        axes.contour(x, y, lead, levels=[0], colors="0.2", linewidths=1.1, linestyles=border)
        mine = np.asarray(labels) == c
        axes.scatter(
            *centroids[mine].T, color=colour, marker=marker, s=75, edgecolor="black", zorder=3, label=f"class {c}"
        )
    _plane(axes, (x[0], x[-1]), (y[0], y[-1]))


def draw_voronoi(axes: Axes, centroids: np.ndarray, **look) -> None:
    """Edges of the centroids' Voronoi cells; the axes keep their limits."""
    limits = axes.get_xlim(), axes.get_ylim()
    before = len(axes.collections)
    voronoi_plot_2d(Voronoi(centroids), axes, show_points=False, show_vertices=False)
    for edges in axes.collections[before:]:
        edges.set(**{"linestyle": ":", "linewidth": 1.1, "color": "0.35", "alpha": 1.0} | look)
    _plane(axes, *limits)


def _plane(axes: Axes, xlim: tuple[float, float], ylim: tuple[float, float]) -> None:
    axes.set(aspect="equal", xlim=xlim, ylim=ylim, xlabel="first coordinate", ylabel="second coordinate")
    axes.grid(False)


def draw_discs(axes: Axes, points: pd.DataFrame, *, radius: str = "radius", **look) -> None:
    """Certified balls of planar points: columns x, y and ``radius``."""
    style = {"facecolor": "none", "edgecolor": "black", "linewidth": 0.9} | look
    for x, y, r in points[["x", "y", radius]].itertuples(index=False):
        axes.add_patch(Circle((x, y), r, **style))
    axes.plot(points["x"], points["y"], "k.", markersize=3)


def draw_bisector(axes: Axes, table: pd.DataFrame) -> None:
    """One pair of centroids, their bisector, z with its two discs, and the shortest step to the bisector.

    Args:
        table: as `clustr_core.theory.bisector_picture` makes it.
    """
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
    """Radii against column ``x``, one line a bound; ``every`` puts a marker on each n-th point."""
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


def draw_distribution(axes: Axes, table: pd.DataFrame, value: str, *, group: str, looks: dict[str, Look]) -> None:
    """Share of rows whose ``value`` is at most the abscissa, one staircase for each entry of ``group``."""
    for name, look in looks.items():
        values = np.sort(table.loc[table[group] == name, value].dropna())
        share = np.arange(1, len(values) + 1) / len(values)
        every = max(len(values) // 8, 1)
        axes.plot(
            values,
            share,
            color=look.color,
            linestyle=look.linestyle,
            marker=look.marker,
            markevery=every,
            zorder=2 if look.linestyle == "-" else 3,
            label=name,
        )


def draw_on_a_line(axes: Axes, table: pd.DataFrame) -> None:
    """CE1: centroids on a line, z, the interval the unsound formula claims, and the one that is certified.

    Args:
        table: as `clustr_core.theory.second_nearest_line` makes it.
    """
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


def draw_by_group(axes: Axes, table: pd.DataFrame, x: str, y: str, *, group: str, name: str) -> None:
    """Column ``y`` against ``x``, one line for each value of ``group``, called "``name`` value"."""
    for (value, rows), look in zip(table.groupby(group), BOUND_LOOKS.values(), strict=False):
        axes.plot(
            rows[x], rows[y], color=look.color, linestyle=look.linestyle, marker=look.marker, label=f"{name} {value:g}"
        )
    axes.legend()


def draw_soft_margin(axes: Axes, table: pd.DataFrame) -> None:
    """CE4: the soft rule's margin against the shift of z, and the radius claimed under either rule.

    Args:
        table: as `clustr_core.theory.soft_margin_along` makes it.
    """
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


def draw_accuracy(axes: Axes, table: pd.DataFrame, x: str, y: str, *, loss: str | None = None) -> None:
    """Accuracy against ``x``, one line a method, with its binomial interval as a band (columns low, high)."""
    if loss is not None:
        table = pd.DataFrame(table[table["loss"] == loss])
    for method, rows in _groups(table, "method"):
        look = LOOKS[method]
        style = {"color": look.color, "linestyle": look.linestyle, "marker": look.marker, "markersize": 5}
        axes.plot(rows[x], rows[y], label=METHOD_NAMES[method], **style)
        axes.fill_between(rows[x], rows["low"], rows["high"], color=look.color, alpha=0.15, linewidth=0)
    axes.set_ylim(-0.02, 1.02)


def draw_protocols(axes: Axes, table: pd.DataFrame) -> None:
    """Robust accuracy of one method against eps, one line a protocol (column protocol), with its interval as a band."""
    for protocol, rows in _groups(table, "protocol"):
        look = PROTOCOL_LOOKS[protocol]
        style = {"color": look.color, "linestyle": look.linestyle, "marker": look.marker, "markersize": 4}
        axes.plot(rows["eps"], rows["robust_accuracy"], label=PROTOCOL_NAMES[protocol], **style)
        axes.fill_between(rows["eps"], rows["low"], rows["high"], color=look.color, alpha=0.15, linewidth=0)
    axes.set_ylim(-0.02, 1.02)


def draw_surface(axes: Axes, table: pd.DataFrame, x: str, y: str, value: str, *, lost: bool = True) -> Any:
    """A column on a grid as filled contours, with the border where the label is lost (margin 0) as a black line."""
    grid = table.pivot(index=y, columns=x, values=value)
    filled = axes.contourf(grid.columns, grid.index, grid.to_numpy(), levels=14, cmap="cividis")
    border = table.pivot(index=y, columns=x, values="margin").to_numpy()
    if lost and border.min() < 0 < border.max():
        axes.contour(grid.columns, grid.index, border, levels=[0.0], colors="white", linewidths=4)
        axes.contour(grid.columns, grid.index, border, levels=[0.0], colors="black", linewidths=1.8)
    axes.grid(visible=False)
    return filled


def draw_arrows(axes: Axes, table: pd.DataFrame, *, every: int = 2) -> None:
    """Directions of a field (columns x y dx dy), all of one length, on every n-th row and column of its grid."""
    kept = [set(sorted(table[name].unique())[::every]) for name in ("x", "y")]
    rows = pd.DataFrame(table[table["x"].isin(list(kept[0])) & table["y"].isin(list(kept[1]))])
    length = np.hypot(rows["dx"].to_numpy(), rows["dy"].to_numpy())
    unit = np.where(length > 0, length, 1)
    look = {"color": "white", "pivot": "mid", "scale": 26, "width": 0.005, "headwidth": 4}
    axes.quiver(rows["x"], rows["y"], rows["dx"] / unit, rows["dy"] / unit, **look)


def draw_protocol_gaps(axes: Axes, table: pd.DataFrame) -> None:
    """`accuracy.four_columns`: each method in both protocols, two marks on one row, with intervals, joined by a bar."""
    groups = list(_groups(table, "method"))
    for row, (_, rows) in enumerate(groups):
        mine = rows.set_index("column").loc[["paper", "correct"]]
        axes.plot(mine["accuracy"], [row] * 2, color="0.7", linewidth=4, zorder=1)
        for shift, protocol in ((-0.12, "paper"), (0.12, "correct")):
            at, look = mine.loc[protocol], PROTOCOL_LOOKS[protocol]
            axes.plot([at["low"], at["high"]], [row + shift] * 2, color=look.color, linewidth=1.6, zorder=2)
            label = PROTOCOL_NAMES[protocol] if row == 0 else None
            axes.plot(at["accuracy"], row + shift, look.marker, color=look.color, zorder=3, label=label)
    axes.set_yticks(range(len(groups)), [METHOD_NAMES[method] for method, _ in groups])
    axes.set_ylim(len(groups) - 0.5, -0.5)
    axes.set_xlim(-0.03, 1.03)
    axes.grid(visible=False, axis="y")


def draw_sandwich(axes: Axes, table: pd.DataFrame) -> None:
    """`sandwich.sandwich_curve`: what is certified as an area, what attacks leave as lines above it, up to clean."""
    for column, look in SANDWICH_LOOKS.items():
        rows = table.loc[table["column"] == column]
        if column == "certified":
            axes.fill_between(rows["at"], rows["accuracy"], color="0.85", linewidth=0)
        every = max(len(rows) // 6, 1)
        style = {"color": look.color, "linestyle": look.linestyle, "marker": look.marker or None, "markersize": 4.5}
        if len(rows):
            axes.plot(rows["at"], rows["accuracy"], markevery=every, label=column, **style)
    axes.set(ylim=(-0.02, 1.02), xlabel="$L_2$ radius")


def draw_tightness(axes: Axes, table: pd.DataFrame) -> None:
    """Certified radius (``radius``) against the smallest adversarial norm found (``norm``), one dot an image, and the
    diagonal that no dot may cross."""
    top = 1.05 * table["norm"].to_numpy(dtype=float).max()
    axes.fill_between([0, top], [0, top], top, color="0.92", linewidth=0, zorder=0)
    axes.plot([0, top], [0, top], color="black", linewidth=1.2)
    axes.scatter(table["norm"], table["radius"], s=9, alpha=0.5, color=_COLOURS[0], linewidth=0, rasterized=True)
    axes.set(xlim=(0, top), ylim=(0, top), aspect="equal", xlabel="smallest adversarial norm found")


def draw_history(axes: Axes, table: pd.DataFrame, y: str) -> None:
    """One column of training histories against the epoch, one line a method."""
    for method, rows in _groups(table.dropna(subset=[y]), "method"):
        look = LOOKS[method]
        axes.plot(rows["epoch"], rows[y], color=look.color, linestyle=look.linestyle, label=METHOD_NAMES[method])
    axes.set_xlabel("epoch")


def draw_map(axes: Axes, table: pd.DataFrame, class_names: Sequence[str]) -> None:
    """A planar map of embeddings (x, y, label): a colour and a marker for each class, its name above its images."""
    colours = sns.color_palette("colorblind", len(class_names))
    for label, rows in _groups(table, "label"):
        marker = "o^sDvPX<>*"[label % 10]
        axes.scatter(
            rows["x"], rows["y"], s=12, color=[colours[label]], marker=marker, linewidth=0, alpha=0.8, rasterized=True
        )
    for label, rows in _groups(table, "label"):
        above = (np.median(rows["x"]), np.quantile(rows["y"], 0.9))
        text = axes.annotate(
            str(class_names[label]), above, xytext=(0, 4), textcoords="offset points", ha="center", fontsize=9
        )
        text.set_path_effects([withStroke(linewidth=2.5, foreground="white")])
    axes.margins(0.1)
    axes.set_xticks([])
    axes.set_yticks([])
    axes.grid(False)
    sns.despine(ax=axes, top=False, right=False)
    for spine in axes.spines.values():
        spine.set(color="0.75", linewidth=0.8)


def draw_shares(axes: Axes, table: pd.DataFrame, value: str, group: str) -> None:
    """Share of examples at or below each value, one curve a group, from light and thin to dark and thick."""
    groups = list(_groups(table, group))
    for rank, (name, rows) in enumerate(groups):
        depth = (rank + 1) / len(groups)
        ordered = np.sort(rows[value].to_numpy())
        shares = np.arange(1, len(ordered) + 1) / len(ordered)
        shade = str(round(0.8 * (1 - depth), 2))
        axes.step(ordered, shares, where="post", color=shade, linewidth=0.8 + 1.6 * depth, label=f"{group} {name}")
    axes.set_ylim(0, 1)


def draw_paths(axes: Axes, table: pd.DataFrame) -> None:
    """The path of an attack for each method: position along the line to the rival, and distance from that line."""
    for method, rows in _groups(table, "method"):
        look = LOOKS[method]
        axes.plot(
            rows["along"],
            rows["across"],
            color=look.color,
            linestyle=look.linestyle,
            marker=look.marker,
            markersize=3.5,
            label=METHOD_NAMES[method],
        )
        axes.plot(rows["along"].iloc[0], rows["across"].iloc[0], marker="o", markersize=10, color=look.color, alpha=0.4)
    axes.axvline(0.5, color="0.3", linewidth=1)
    axes.plot([0, 1], [0, 0], "k", marker="x", linestyle="none", markersize=8)


def draw_image(axes: Axes, image: np.ndarray, title: str = "") -> None:
    """One image, [channel, height, width] in bytes or in [0, 1], without axes."""
    grey = image.shape[0] == 1
    top = 255 if image.dtype == np.uint8 else 1
    axes.imshow(image[0] if grey else image.transpose(1, 2, 0), cmap="gray" if grey else None, vmin=0, vmax=top)
    axes.set_title(title, fontsize=9)
    axes.axis("off")


def _groups(table: pd.DataFrame, column: str) -> Iterator[tuple[Any, pd.DataFrame]]:
    """The rows of each value of a column, in order of appearance; methods always in the same order."""
    groups = [(name, pd.DataFrame(rows)) for name, rows in table.groupby(column, sort=False)]
    return iter(sorted(groups, key=lambda group: list(LOOKS).index(str(group[0]))) if column == "method" else groups)


def draw_progress(axes: Axes, table: pd.DataFrame, x: str, y: str) -> None:
    """One column against another, one line a method."""
    for method, rows in _groups(table, "method"):
        look = LOOKS[method]
        style = {"color": look.color, "linestyle": look.linestyle, "marker": look.marker, "markersize": 3.5}
        axes.plot(rows[x], rows[y], label=METHOD_NAMES[method], **style)


def draw_ranges(axes: Axes, table: pd.DataFrame, value: str) -> None:
    """One horizontal box a method: quartiles, and whiskers from the 5th to the 95th percentile."""
    groups = list(_groups(table, "method"))
    boxes = axes.boxplot(
        [rows[value].to_numpy() for _, rows in groups],
        orientation="horizontal",
        whis=(5, 95),
        showfliers=False,
        patch_artist=True,
        medianprops={"color": "black"},
        tick_labels=[METHOD_NAMES[method] for method, _ in groups],
    )
    for box, (method, _) in zip(boxes["boxes"], groups, strict=True):
        box.set_facecolor(LOOKS[method].color)
        box.set_alpha(0.5)
    axes.invert_yaxis()
