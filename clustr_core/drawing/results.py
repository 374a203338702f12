"""Tables -> Axes: curves, maps, paths."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.patheffects import withStroke

from clustr_core.drawing.looks import (
    BOUND_LOOKS,
    COLOURS,
    PROTOCOL_LOOKS,
    PROTOCOL_NAMES,
    SANDWICH_LOOKS,
    Look,
    each_group,
    look_of,
    method_name,
)


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


def draw_by_group(axes: Axes, table: pd.DataFrame, x: str, y: str, *, group: str, name: str) -> None:
    """Column ``y`` against ``x``, one line for each value of ``group``, called "``name`` value"."""
    for (value, rows), look in zip(table.groupby(group), BOUND_LOOKS.values(), strict=False):
        axes.plot(
            rows[x], rows[y], color=look.color, linestyle=look.linestyle, marker=look.marker, label=f"{name} {value:g}"
        )
    axes.legend()


def draw_accuracy(axes: Axes, table: pd.DataFrame, x: str, y: str, *, loss: str | None = None) -> None:
    """Accuracy against ``x``, one line a method, with its binomial interval as a band (columns low, high)."""
    if loss is not None:
        table = pd.DataFrame(table[table["loss"] == loss])
    for method, rows in each_group(table, "method"):
        look = look_of(method)
        style = {"color": look.color, "linestyle": look.linestyle, "marker": look.marker, "markersize": 5}
        axes.plot(rows[x], rows[y], label=method_name(method), **style)
        axes.fill_between(rows[x], rows["low"], rows["high"], color=look.color, alpha=0.15, linewidth=0)
    axes.set_ylim(-0.02, 1.02)


def draw_protocols(axes: Axes, table: pd.DataFrame) -> None:
    """Robust accuracy of one method against eps, one line a protocol (column protocol), with its interval as a band."""
    for protocol, rows in each_group(table, "protocol"):
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
    groups = list(each_group(table, "method"))
    for row, (_, rows) in enumerate(groups):
        mine = rows.set_index("column").loc[["paper", "correct"]]
        axes.plot(mine["accuracy"], [row] * 2, color="0.7", linewidth=4, zorder=1)
        for shift, protocol in ((-0.12, "paper"), (0.12, "correct")):
            at, look = mine.loc[protocol], PROTOCOL_LOOKS[protocol]
            axes.plot([at["low"], at["high"]], [row + shift] * 2, color=look.color, linewidth=1.6, zorder=2)
            label = PROTOCOL_NAMES[protocol] if row == 0 else None
            axes.plot(at["accuracy"], row + shift, look.marker, color=look.color, zorder=3, label=label)
    axes.set_yticks(range(len(groups)), [method_name(method) for method, _ in groups])
    axes.set_ylim(len(groups) - 0.5, -0.5)
    axes.set_xlim(-0.03, 1.03)
    axes.grid(visible=False, axis="y")


def draw_sandwich(axes: Axes, table: pd.DataFrame) -> None:
    """`chain.sandwich_curve`: what is certified as an area, what attacks leave as lines above it, up to clean."""
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
    axes.scatter(table["norm"], table["radius"], s=9, alpha=0.5, color=COLOURS[0], linewidth=0, rasterized=True)
    axes.set(xlim=(0, top), ylim=(0, top), aspect="equal", xlabel="smallest adversarial norm found")


def draw_history(axes: Axes, table: pd.DataFrame, y: str) -> None:
    """One column of training histories against the epoch, one line a method."""
    for method, rows in each_group(table.dropna(subset=[y]), "method"):
        look = look_of(method)
        axes.plot(rows["epoch"], rows[y], color=look.color, linestyle=look.linestyle, label=method_name(method))
    axes.set_xlabel("epoch")


def draw_map(axes: Axes, table: pd.DataFrame, class_names: Sequence[str]) -> None:
    """A planar map of embeddings (x, y, label): a colour and a marker for each class, its name above its images."""
    colours = sns.color_palette("colorblind", len(class_names))
    for label, rows in each_group(table, "label"):
        marker = "o^sDvPX<>*"[label % 10]
        axes.scatter(
            rows["x"], rows["y"], s=12, color=[colours[label]], marker=marker, linewidth=0, alpha=0.8, rasterized=True
        )
    for label, rows in each_group(table, "label"):
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
    groups = list(each_group(table, group))
    for rank, (name, rows) in enumerate(groups):
        depth = (rank + 1) / len(groups)
        ordered = np.sort(rows[value].to_numpy())
        shares = np.arange(1, len(ordered) + 1) / len(ordered)
        shade = str(round(0.8 * (1 - depth), 2))
        axes.step(ordered, shares, where="post", color=shade, linewidth=0.8 + 1.6 * depth, label=f"{group} {name}")
    axes.set_ylim(0, 1)


def draw_paths(axes: Axes, table: pd.DataFrame) -> None:
    """The path of an attack for each method: position along the line to the rival, and distance from that line."""
    for method, rows in each_group(table, "method"):
        look = look_of(method)
        axes.plot(
            rows["along"],
            rows["across"],
            color=look.color,
            linestyle=look.linestyle,
            marker=look.marker,
            markersize=3.5,
            label=method_name(method),
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


def draw_progress(axes: Axes, table: pd.DataFrame, x: str, y: str) -> None:
    """One column against another, one line a method."""
    for method, rows in each_group(table, "method"):
        look = look_of(method)
        style = {"color": look.color, "linestyle": look.linestyle, "marker": look.marker, "markersize": 3.5}
        axes.plot(rows[x], rows[y], label=method_name(method), **style)


def draw_ranges(axes: Axes, table: pd.DataFrame, value: str) -> None:
    """One horizontal box a method: quartiles, and whiskers from the 5th to the 95th percentile."""
    groups = list(each_group(table, "method"))
    boxes = axes.boxplot(
        [rows[value].to_numpy() for _, rows in groups],
        orientation="horizontal",
        whis=(5, 95),
        showfliers=False,
        patch_artist=True,
        medianprops={"color": "black"},
        tick_labels=[method_name(method) for method, _ in groups],
    )
    for box, (method, _) in zip(boxes["boxes"], groups, strict=True):
        box.set_facecolor(look_of(method).color)
        box.set_alpha(0.5)
    axes.invert_yaxis()
