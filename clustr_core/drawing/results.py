"""Tables -> Axes: curves, maps, paths. Every function refuses a table of which something could not be seen."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.patheffects import withStroke
from matplotlib.ticker import PercentFormatter

from clustr_core.drawing.checks import check_grid, check_known, check_rows
from clustr_core.drawing.looks import (
    BOUND_LOOKS,
    COLOURS,
    PROTOCOL_LOOKS,
    PROTOCOL_NAMES,
    SANDWICH_LOOKS,
    SANDWICH_NAMES,
    Look,
    each_group,
    look_of,
)
from clustr_core.measuring.study import method_name

CLASS_MARKERS = "o^sDPvX<>*"
REPORT_NAMES = {
    "reported": "in the paper's protocol",
    "attacked": "left by correct attacks",
    "certified": "certified: no attack can break it",
}
# where an axis of times is marked
TIMES = {"1 ms": 1e-3, "0.1 s": 0.1, "10 s": 10, "10 min": 600, "10 h": 36000}


def draw_distribution(axes: Axes, table: pd.DataFrame, value: str, *, group: str, looks: dict[str, Look]) -> None:
    """Share of rows whose ``value`` is at most the abscissa, one staircase for each entry of ``looks``.

    Raises:
        ValueError: if a group of ``looks`` has no rows; and as `check_rows`.
    """
    check_rows(table, value, words=(group,))
    if missing := [name for name in looks if name not in set(table[group])]:
        raise ValueError(f"{group}: expected rows of each of {list(looks)}, got none of {missing}")
    for name, look in looks.items():
        values = np.sort(table.loc[table[group] == name, value])
        share = np.arange(1, len(values) + 1) / len(values)
        style = _style(look, len(values), zorder=2 if look.linestyle == "-" else 3)
        axes.plot(values, share, markevery=max(len(values) // 8, 1), label=name, **style)


def draw_by_group(axes: Axes, table: pd.DataFrame, x: str, y: str, *, group: str, name: str) -> None:
    """Column ``y`` against ``x``, one line for each value of ``group``, called "``name`` value".

    Raises:
        ValueError: for more groups than there are looks; and as `check_rows`.
    """
    check_rows(table, x, y, group)
    looks = list(BOUND_LOOKS.values())
    groups = list(table.groupby(group))
    if len(groups) > len(looks):
        raise ValueError(f"{group}: expected at most {len(looks)} values, got {len(groups)}")
    for (value, rows), look in zip(groups, looks, strict=False):
        axes.plot(rows[x], rows[y], label=f"{name} {value:g}", **_style(look, len(rows)))
    axes.legend()


def draw_line(axes: Axes, x: Any, y: Any, look: Look, **more: Any) -> None:
    """One line in its look, with a marker where it is a single point."""
    axes.plot(x, y, **_style(look, len(x), **more))


def in_per_cent(axes: Axes) -> None:
    """Shares from 0 to 1, written from 0 to 100."""
    axes.set_ylim(-0.02, 1.02)
    _written_in_per_cent(axes.yaxis)


def eps_in_bytes(axes: Axes) -> None:
    """Write the radii of photographs in steps of a byte: 8/255."""
    top = 255 * axes.get_xlim()[1]
    step = next((size for size in (2, 4, 8, 16, 32, 64) if top / size <= 4), 128)
    marks = range(0, int(top) + 1, step)
    axes.set_xticks([mark / 255 for mark in marks], ["0", *(f"{mark}/255" for mark in marks[1:])])


def draw_accuracy(axes: Axes, table: pd.DataFrame, x: str, y: str) -> None:
    """Accuracy against ``x``, one line a method, with its binomial interval as a band (columns low, high)."""
    check_rows(table, x, y, "low", "high", words=("method",))
    for method, rows in each_group(table, "method"):
        look = look_of(method)
        draw_line(axes, rows[x], rows[y], look, label=method_name(method))
        axes.fill_between(rows[x], rows["low"], rows["high"], color=look.color, alpha=0.15, linewidth=0)
    in_per_cent(axes)


def draw_protocols(axes: Axes, table: pd.DataFrame) -> None:
    """Robust accuracy of one method against eps, one line a protocol (column protocol), with its interval as a band.

    Raises:
        ValueError: for another protocol than those of `PROTOCOL_LOOKS`; and as `check_rows`.
    """
    check_rows(table, "eps", "robust_accuracy", "low", "high", words=("protocol",))
    check_known(table, "protocol", PROTOCOL_LOOKS)
    for protocol, rows in each_group(table, "protocol"):
        look, name = PROTOCOL_LOOKS[protocol], PROTOCOL_NAMES[protocol]
        draw_line(axes, rows["eps"], rows["robust_accuracy"], look, label=name)
        axes.fill_between(rows["eps"], rows["low"], rows["high"], color=look.color, alpha=0.15, linewidth=0)
    in_per_cent(axes)


def draw_certified(axes: Axes, table: pd.DataFrame) -> None:
    """`accuracy.certified_accuracy` against the radius, one line a method; a mark where only radius 0 is certified."""
    check_rows(table, "at", "certified_accuracy", words=("method",))
    for method, rows in each_group(table, "method"):
        reached = rows[(rows["at"] == 0) | (rows["certified_accuracy"] > 0)]
        kept = reached if len(reached) == 1 else rows
        every = max((len(kept) - 1) // 6, 1)
        more = {"markevery": every, "label": method_name(method), "clip_on": False}
        alone = {"linestyle": "none"} if len(kept) == 1 else {}
        draw_line(axes, kept["at"], kept["certified_accuracy"], look_of(method), **more, **alone)
    top = float(table["at"].to_numpy(dtype=float).max())
    in_per_cent(axes)
    axes.set(xlabel="$L_2$ radius (pixels in [0, 1])", xlim=(0, top) if top > 0 else None)


def draw_surface(axes: Axes, table: pd.DataFrame, x: str, y: str, value: str, *, lost: bool = True) -> Any:
    """A column on a grid as filled contours, with the border where the label is lost (margin 0) as a black line.

    Raises:
        ValueError: as `check_grid`.
    """
    check_grid(table, x, y, value, *(("margin",) if lost else ()))
    grid = table.pivot(index=y, columns=x, values=value)
    filled = axes.contourf(grid.columns, grid.index, grid.to_numpy(), levels=14, cmap="cividis")
    if lost:
        border = table.pivot(index=y, columns=x, values="margin").to_numpy()
        if border.min() < 0 < border.max():
            for colour, width in (("white", 4), ("black", 1.8)):
                axes.contour(grid.columns, grid.index, border, levels=[0.0], colors=colour, linewidths=width)
    axes.grid(visible=False)
    return filled


def draw_arrows(axes: Axes, table: pd.DataFrame, *, every: int = 2) -> None:
    """Directions of a field (columns x y dx dy), all of one length, on every n-th row and column of its grid."""
    check_rows(table, "x", "y", "dx", "dy")
    kept = [set(sorted(table[name].unique())[::every]) for name in ("x", "y")]
    rows = pd.DataFrame(table[table["x"].isin(list(kept[0])) & table["y"].isin(list(kept[1]))])
    length = np.hypot(rows["dx"].to_numpy(), rows["dy"].to_numpy())
    unit = np.where(length > 0, length, 1)
    look = {"color": "white", "pivot": "mid", "scale": 26, "width": 0.005, "headwidth": 4}
    axes.quiver(rows["x"], rows["y"], rows["dx"] / unit, rows["dy"] / unit, **look)


def draw_points(axes: Axes, points: Mapping[str, tuple[float, float]]) -> None:
    """Named places on a surface, white with a black edge, a marker each.

    Raises:
        ValueError: for more places than markers.
    """
    if len(points) > len(CLASS_MARKERS):
        raise ValueError(f"points: expected at most {len(CLASS_MARKERS)}, got {len(points)}")
    look = {"color": "white", "markeredgecolor": "black", "markersize": 8, "linestyle": "none"}
    for (name, place), marker in zip(points.items(), CLASS_MARKERS, strict=False):
        axes.plot(*place, marker, label=name, **look)


def draw_fates(axes: Axes, table: pd.DataFrame) -> None:
    """`study.kin_table`: of each defence what was reported and what AutoAttack leaves, two marks on one row.

    Raises:
        ValueError: as `check_rows`.
    """
    check_rows(table, "reported", "autoattack", words=("name", "attacks"))
    trained = table["attacks"] == "yes"
    ends = table[["autoattack", "reported"]].to_numpy()
    for row, pair in enumerate(ends):
        axes.plot(pair, [row] * 2, color="0.7", linewidth=4, zorder=1)
    groups = {"not trained on attacks, or in one step": ~trained, "trained on attacks": trained}
    for (label, which), look in zip(groups.items(), (PROTOCOL_LOOKS["paper"], PROTOCOL_LOOKS["correct"]), strict=True):
        rows, style = np.flatnonzero(which), {"marker": look.marker, "linestyle": "", "color": look.color, "zorder": 3}
        axes.plot(ends[rows, 1], rows, **style, markerfacecolor="white", markeredgewidth=1.6)
        axes.plot(ends[rows, 0], rows, **style, label=label)
    axes.set_yticks(range(len(table)), table["name"])
    axes.set_ylim(len(table) - 0.5, -0.5)
    axes.set(xlim=(-3, 100), xlabel="robust accuracy, %")
    axes.grid(visible=False, axis="y")


def draw_protocol_gaps(axes: Axes, table: pd.DataFrame) -> None:
    """`accuracy.summary_table`: each method in both protocols, two marks on one row, with intervals, joined by a bar.

    Raises:
        ValueError: for a method without exactly one row of each protocol; and as `check_rows`.
    """
    check_rows(table, "accuracy", "low", "high", words=("method", "column"))
    groups = list(each_group(table, "method"))
    for method, rows in groups:
        if (found := sorted(rows.loc[rows["column"].isin(PROTOCOL_LOOKS), "column"])) != sorted(PROTOCOL_LOOKS):
            raise ValueError(f"table: expected one row of each of {sorted(PROTOCOL_LOOKS)} of {method}, got {found}")
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
    _written_in_per_cent(axes.xaxis)
    axes.grid(visible=False, axis="y")


def draw_by_attack(axes: Axes, table: pd.DataFrame) -> None:
    """`study.by_attack`: a row each attack, with its interval; the paper's protocol apart from the others.

    Raises:
        ValueError: as `check_rows`.
    """
    check_rows(table, "robust_accuracy", "low", "high", words=("attack",))
    for row, at in enumerate(table.to_dict("records")):
        look = PROTOCOL_LOOKS["paper" if str(at["attack"]).startswith("paper") else "correct"]
        axes.plot([at["low"], at["high"]], [row, row], color=look.color, linewidth=1.6)
        axes.plot(at["robust_accuracy"], row, look.marker, color=look.color)
        _beside_mark(axes, f"{100 * at['robust_accuracy']:.1f}", (at["high"], row), 5, "left")
    axes.set_yticks(range(len(table)), table["attack"])
    axes.set_ylim(len(table) - 0.5, -0.5)
    _written_in_per_cent(axes.xaxis)
    axes.grid(visible=False, axis="y")


def draw_reported(axes: Axes, table: pd.DataFrame) -> None:
    """`study.answer_table`, part "attacked": what was reported and what correct attacks leave, a row each model."""
    looks = {"reported": PROTOCOL_LOOKS["paper"], "attacked": PROTOCOL_LOOKS["correct"]}
    for row, shares in enumerate(_draw_pairs(axes, table, looks)):
        order = sorted(shares.values())
        for share, offset, side in ((order[1], 9, "left"), (order[0], -9, "right")):
            _beside_mark(axes, f"{100 * share:.1f} %", (share, row), offset, side)


def draw_certain(axes: Axes, table: pd.DataFrame) -> None:
    """`study.answer_table`, part "certified": what is certified, as a bar, and what attacks leave, a row each model."""
    looks = {"certified": Look("black", "-", "s"), "attacked": PROTOCOL_LOOKS["correct"]}
    for row, shares in enumerate(_draw_pairs(axes, table, looks)):
        axes.barh(row, shares["certified"], 0.5, color="0.8", zorder=0)
        text = f"{100 * shares['certified']:.1f} / {100 * shares['attacked']:.1f} %"
        _beside_mark(axes, text, (shares["attacked"], row), 9, "left")


def _draw_pairs(axes: Axes, table: pd.DataFrame, looks: Mapping[str, Look]) -> list[dict[str, float]]:
    """Two marks joined by a line, a row each ``name``; what they are at."""
    check_rows(table, "accuracy", words=("name", "column"))
    groups = list(table.groupby("name", sort=False))
    found = []
    for row, (_, rows) in enumerate(groups):
        shares = {str(key): float(share) for key, share in zip(rows["column"], rows["accuracy"], strict=True)}
        axes.plot(list(shares.values()), [row] * 2, color="0.7", linewidth=3, zorder=1)
        for column, look in looks.items():
            style = {"color": look.color, "markersize": 7, "zorder": 3, "clip_on": False}
            axes.plot(shares[column], row, look.marker, label=REPORT_NAMES[column] if row == 0 else None, **style)
        found.append(shares)
    axes.set_yticks(range(len(groups)), [str(name) for name, _ in groups])
    axes.set(ylim=(len(groups) - 0.5, -0.5), xlim=(-0.12, 1.0))
    axes.set_xticks([0, 0.2, 0.4, 0.6, 0.8, 1])
    _written_in_per_cent(axes.xaxis)
    axes.grid(visible=False, axis="y")
    return found


def _beside_mark(axes: Axes, text: str, at: tuple[float, float], offset: float, side: str) -> None:
    place = {"xytext": (offset, 0), "textcoords": "offset points", "va": "center", "ha": side}
    axes.annotate(text, at, fontsize="small", **place)


def draw_sandwich(axes: Axes, table: pd.DataFrame) -> None:
    """`chain.sandwich_curve`: what is certified as an area, what attacks leave as lines above it, up to clean.

    Raises:
        ValueError: for a column without a look; and as `check_rows`.
    """
    check_rows(table, "at", "accuracy", words=("column",))
    check_known(table, "column", SANDWICH_LOOKS)
    for column, look in SANDWICH_LOOKS.items():
        rows = table.loc[table["column"] == column]
        if column == "certified":
            axes.fill_between(rows["at"], rows["accuracy"], color="0.85", linewidth=0)
        if len(rows):
            every = 1 if column == "apgd" else max(len(rows) // 6, 1)
            draw_line(axes, rows["at"], rows["accuracy"], look, markevery=every, label=SANDWICH_NAMES[column])
    in_per_cent(axes)
    top = float(table.loc[table["column"] == "certified", "at"].max())
    axes.set(xlabel="$L_2$ radius (pixels in [0, 1])", xlim=(0, top) if top > 0 else None)


def draw_tightness(axes: Axes, table: pd.DataFrame) -> None:
    """Certified radius (``radius``) against the smallest adversarial norm found (``norm``), one dot an image, and the
    diagonal that no dot may cross. A norm that is infinite, where no attack found anything, has no place: leave it out.
    """
    check_rows(table, "norm", "radius")
    top = 1.05 * float(table[["norm", "radius"]].to_numpy(dtype=float).max()) or 1.0
    axes.fill_between([0, top], [0, top], top, color="0.92", linewidth=0, zorder=0)
    axes.plot([0, top], [0, top], color="black", linewidth=1.2)
    axes.scatter(table["norm"], table["radius"], s=9, alpha=0.5, color=COLOURS[0], linewidth=0, rasterized=True)
    axes.set(xlim=(0, top), ylim=(0, top), aspect="equal", xlabel="smallest $L_2$ perturbation found")


def draw_gains(axes: Axes, table: pd.DataFrame, names: Mapping[str, str]) -> None:
    """Points by which each ``head`` is ahead (``gain``, with its interval ``low`` to ``high``) against the radius.

    Args:
        names: what each head is called, in the order of the legend.
    """
    check_rows(table, "radius", "gain", "low", "high", words=("head",))
    check_known(table, "head", names)
    axes.axhline(0, color="black", linewidth=1.0)
    for number, (head, name) in enumerate(names.items()):
        rows = table[table["head"] == head]
        if rows.empty:
            continue
        line = ("-", "--", "-.", ":")[number % 4]
        axes.plot(rows["radius"], rows["gain"], label=name, color=COLOURS[number], linestyle=line)
        axes.fill_between(rows["radius"], rows["low"], rows["high"], color=COLOURS[number], alpha=0.18, linewidth=0)
    axes.set_xlabel("$L_2$ radius (pixels in [0, 1])")


def draw_minutes(axes: Axes, table: pd.DataFrame) -> None:
    """Certified accuracy (``accuracy``, 0 to 1) against CPU minutes of training, one line a ``candidate``."""
    check_rows(table, "minutes", "accuracy", words=("candidate",))
    for number, (candidate, rows) in enumerate(each_group(table, "candidate")):
        colour, marker = COLOURS[number % len(COLOURS)], CLASS_MARKERS[number % len(CLASS_MARKERS)]
        axes.plot(rows["minutes"], rows["accuracy"], "--", label=str(candidate), color=colour, marker=marker)
    budgets = sorted(set(table["minutes"]))
    axes.set(xlabel="CPU minutes of training", xscale="log")
    axes.set_xticks(budgets, labels=[f"{minutes:g}" for minutes in budgets])
    axes.minorticks_off()
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, symbol=""))


def draw_day(axes: Axes, table: pd.DataFrame) -> None:
    """Certified accuracy (``accuracy``, 0 to 1) against ``minutes`` of training, on a logarithmic axis: a mark for each
    system, of the colour and form of its ``kind``."""
    check_rows(table, "minutes", "accuracy", words=("kind",))
    for number, (kind, rows) in enumerate(each_group(table, "kind")):
        colour, marker = COLOURS[number % len(COLOURS)], CLASS_MARKERS[number % len(CLASS_MARKERS)]
        axes.scatter(rows["minutes"], rows["accuracy"], label=str(kind), color=colour, marker=marker, s=26, zorder=3)
    decades = np.log10(table["minutes"].to_numpy(dtype=float))
    ticks = [10.0**power for power in range(math.floor(decades.min()), math.floor(decades.max()) + 2)]
    axes.set(xlabel="minutes of training", xscale="log", xlim=(ticks[0] / 1.4, ticks[-1] * 1.4))
    axes.set_xticks(ticks, labels=[f"{tick:,g}" for tick in ticks])
    axes.minorticks_off()
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, symbol=""))


def draw_history(axes: Axes, table: pd.DataFrame, y: str) -> None:
    """One column of training histories against the epoch, one line for each method that has such a column.

    Raises:
        ValueError: if no method has it, or one has gaps in it; and as `check_rows`.
    """
    check_rows(table, "epoch", words=("method",))
    check_rows(table.assign(**{y: 0.0}) if y in table else table, y)
    told = table.groupby("method")[y].transform(lambda values: values.notna().any())
    check_rows(pd.DataFrame(table[told]), y)
    for method, rows in each_group(pd.DataFrame(table[told]), "method"):
        look = look_of(method)
        marker = look.marker if len(rows) == 1 else None
        style = {"color": look.color, "linestyle": look.linestyle, "marker": marker}
        axes.plot(rows["epoch"], rows[y], label=method_name(method), **style)
    axes.set_xlabel("epoch")


def draw_map(axes: Axes, table: pd.DataFrame, class_names: Sequence[str]) -> None:
    """A planar map of embeddings (x, y, label): a colour and a marker for each class, its name above its images.

    There are ten colours and ten markers; from the eleventh class on they are paired anew, up to a hundred classes.

    Raises:
        ValueError: for a label without a name, or more than a hundred classes; and as `check_rows`.
    """
    check_rows(table, "x", "y", "label")
    most = len(CLASS_MARKERS) * len(COLOURS)
    if not set(table["label"]) <= set(range(min(len(class_names), most))):
        limits = f"{table['label'].min()} to {table['label'].max()}"
        raise ValueError(f"label: expected numbers of {len(class_names)} names, at most {most}, got {limits}")
    colours = sns.color_palette("colorblind", len(COLOURS))
    for label, rows in each_group(table, "label"):
        marker = CLASS_MARKERS[(label + label // len(COLOURS)) % len(CLASS_MARKERS)]
        style = {"color": [colours[label % len(COLOURS)]], "marker": marker}
        axes.scatter(rows["x"], rows["y"], s=12, linewidth=0, alpha=0.8, rasterized=True, **style)
    for label, rows in each_group(table, "label"):
        above = (np.median(rows["x"]), np.quantile(rows["y"], 0.9))
        style = {"xytext": (0, 4), "textcoords": "offset points", "ha": "center"}
        text = axes.annotate(str(class_names[label]), above, **style)
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
    check_rows(table, value, words=(group,))
    groups = list(each_group(table, group))
    for rank, (name, rows) in enumerate(groups):
        depth = (rank + 1) / len(groups)
        ordered = np.sort(rows[value].to_numpy())
        shares = np.arange(1, len(ordered) + 1) / len(ordered)
        shade = str(round(0.8 * (1 - depth), 2))
        style = {"color": shade, "linewidth": 0.8 + 1.6 * depth, "marker": "o" if len(ordered) == 1 else None}
        axes.step(ordered, shares, where="post", label=f"{group} {name}", **style)
    axes.set_ylim(0, 1)


def draw_paths(axes: Axes, table: pd.DataFrame) -> None:
    """The path of an attack for each method: position along the line to the rival, and distance from that line."""
    check_rows(table, "along", "across", words=("method",))
    for method, rows in each_group(table, "method"):
        look = look_of(method)
        style = _style(look, len(rows), markersize=3.5)
        axes.plot(rows["along"], rows["across"], label=method_name(method), **style)
        axes.plot(rows["along"].iloc[0], rows["across"].iloc[0], marker="o", markersize=10, color=look.color, alpha=0.4)
    axes.axvline(0.5, color="0.3", linewidth=1)
    axes.plot([0, 1], [0, 0], "k", marker="x", linestyle="none", markersize=8)


def draw_image(axes: Axes, image: np.ndarray, title: str = "") -> None:
    """One image, [channel, height, width] in bytes or in [0, 1], without axes.

    Raises:
        ValueError: for another shape than one or three channels, or a pixel that is NaN or infinite.
    """
    if image.ndim != 3 or image.shape[0] not in (1, 3) or 0 in image.shape:
        raise ValueError(f"image: expected [channel, height, width] of 1 or 3 channels, got {list(image.shape)}")
    if not np.isfinite(image).all():
        raise ValueError(f"image: expected finite pixels, got {int((~np.isfinite(image)).sum())} that are not")
    grey = image.shape[0] == 1
    top = 255 if image.dtype == np.uint8 else 1
    axes.imshow(image[0] if grey else image.transpose(1, 2, 0), cmap="gray" if grey else None, vmin=0, vmax=top)
    axes.set_title(title)
    axes.axis("off")


def draw_progress(axes: Axes, table: pd.DataFrame, x: str, y: str) -> None:
    """One column against another, one line a method."""
    check_rows(table, x, y, words=("method",))
    for method, rows in each_group(table, "method"):
        draw_line(axes, rows[x], rows[y], look_of(method), label=method_name(method), markersize=3.5)


def draw_ranges(axes: Axes, table: pd.DataFrame, value: str) -> None:
    """One horizontal box a method: quartiles, and whiskers from the 5th to the 95th percentile."""
    check_rows(table, value, words=("method",))
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


def draw_beside(axes: Axes, table: pd.DataFrame, x: str, y: str) -> None:
    """One share against another, a mark each method, with the interval of the second (columns low, high)."""
    check_rows(table, x, y, "low", "high", words=("method",))
    for method, rows in each_group(table, "method"):
        look = look_of(method)
        axes.vlines(rows[x], rows["low"], rows["high"], color=look.color, linewidth=1.4)
        style = {"marker": look.marker, "color": look.color, "markersize": 7, "linestyle": "none"}
        axes.plot(rows[x], rows[y], label=method_name(method), **style)
    _written_in_per_cent(axes.xaxis)
    _written_in_per_cent(axes.yaxis)


def draw_parts(axes: Axes, table: pd.DataFrame) -> None:
    """Stacked bars, one a method (columns method part share): from dark to light, every second one hatched.

    Raises:
        ValueError: for a share below 0, or a part that a method has twice; and as `check_rows`.
    """
    check_rows(table, "share", words=("method", "part"))
    least, twice = float(np.min(table["share"])), int(table.duplicated(["method", "part"]).sum())
    if least < 0 or twice:
        raise ValueError(f"share: expected one of at least 0 for each part, got {least:g}, and {twice} parts again")
    parts, methods = list(dict.fromkeys(table["part"])), list(dict.fromkeys(table["method"]))
    shares = table.pivot(index="method", columns="part", values="share").fillna(0.0).loc[methods, parts]
    starts = shares.cumsum(axis=1) - shares
    hatches = ("", "//", "", "..", "", "\\\\", "")
    for n, part in enumerate(parts):
        look = {"color": _shade(n, len(parts)), "edgecolor": "white", "hatch": hatches[n % len(hatches)]}
        axes.barh([method_name(method) for method in methods], shares[part], left=starts[part], label=part, **look)
    axes.set(xlabel="share of a step's time", xlim=(0, 1))
    axes.invert_yaxis()


def draw_growth(axes: Axes, table: pd.DataFrame, *, kinds: Sequence[str]) -> None:
    """Seconds against a size (columns what size seconds) on logarithmic axes, one line for each kind of work.

    Args:
        kinds: all kinds of the figure, so that each looks the same in every panel.
    Raises:
        ValueError: for a size or time that is not positive, a kind that is not of ``kinds``, or more kinds than
            markers; and as `check_rows`.
    """
    check_rows(table, "size", "seconds", words=("what",))
    check_known(table, "what", kinds)
    markers, styles = "osD^vP*X", ("-", "--", "-.", ":")
    if len(kinds) > len(markers):
        raise ValueError(f"kinds: expected at most {len(markers)}, got {len(kinds)}")
    if (least := table[["size", "seconds"]].to_numpy(dtype=float).min()) <= 0:
        raise ValueError(f"table: expected positive sizes and seconds, got {least:g}")
    for what, rows in table.groupby("what", sort=False):
        n, rows = list(kinds).index(str(what)), rows.sort_values("size")
        colour = colormaps["cividis"](n / len(kinds))
        style = {"marker": markers[n], "linestyle": styles[n % len(styles)], "color": colour}
        axes.plot(rows["size"], rows["seconds"], label=what, **style)
    sizes = sorted(set(table["size"]))
    axes.set(xscale="log", yscale="log")
    axes.set_xticks(sizes, [f"{size:,}" for size in sizes])
    axes.xaxis.set_minor_formatter("")


def draw_prices(axes: Axes, table: pd.DataFrame) -> None:
    """Accuracy against what a training costs beside cross-entropy's (``training_ratio``), one mark a method."""
    check_rows(table, "training_ratio", "accuracy", words=("method",))
    for method, rows in each_group(table, "method"):
        look = look_of(method)
        style = {"marker": look.marker, "color": look.color, "markersize": 9, "linestyle": "none"}
        axes.plot(rows["training_ratio"], rows["accuracy"], label=method_name(method), **style)
    _written_in_per_cent(axes.yaxis)
    axes.set(xlabel="training time / cross-entropy's", ylim=(-0.03, max(0.65, table["accuracy"].max() + 0.03)))


def draw_seconds(axes: Axes, table: pd.DataFrame) -> None:
    """The least time of each part of a study (columns part devices seconds) on a logarithmic axis, a mark each number
    of GPUs.

    Raises:
        ValueError: for seconds that are not positive, or more numbers of devices than markers; and as `check_rows`.
    """
    check_rows(table, "seconds", "devices", words=("part",))
    counts, least = sorted(set(table["devices"])), float(np.min(table["seconds"]))
    if least <= 0 or len(counts) > len(CLASS_MARKERS):
        raise ValueError(f"table: expected positive seconds of at most ten numbers of devices, got {least:g}, {counts}")
    for n, devices in enumerate(counts):
        rows = table[table["devices"] == devices]
        style = {"color": "black" if n == 0 else str(0.55 + 0.3 * (n - 1) / len(counts)), "markersize": 7}
        name = f"{devices} GPU{'s' * (devices > 1)}"
        axes.plot(rows["seconds"], rows["part"], "os^DvPX<>*"[n], label=name, linestyle="none", **style)
    marks = {name: size for name, size in TIMES.items() if least / 10 < size < 10 * float(np.max(table["seconds"]))}
    axes.set(xscale="log", xlabel="least time")
    axes.set_xticks(list(marks.values()), list(marks))
    axes.xaxis.set_minor_formatter("")
    axes.grid(axis="y", alpha=0.3)


def _written_in_per_cent(axis: Axis) -> None:
    axis.set_major_formatter(PercentFormatter(1.0, decimals=0, symbol=""))


def _style(look: Look, count: int, **more: Any) -> dict[str, Any]:
    """A line's colour, style and marker; a line of one row, which would not be seen, is given one."""
    marker = look.marker or ("o" if count == 1 else None)
    return {"color": look.color, "linestyle": look.linestyle, "marker": marker, **more}


def _shade(place: int, count: int) -> Any:
    """The colour of one of several in an order, from dark to light."""
    return colormaps["cividis"](place / max(count - 1, 1))
