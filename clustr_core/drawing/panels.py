"""Figures of several panels, and what their panels share."""

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from clustr_core.drawing.checks import check_known, check_rows
from clustr_core.drawing.looks import LOSS_LOOKS, LOSS_NAMES, PAGE, each_group
from clustr_core.drawing.results import (
    draw_accuracy,
    draw_image,
    draw_line,
    draw_protocols,
    eps_in_bytes,
    in_per_cent,
)
from clustr_core.measuring.profile import Protocol
from clustr_core.measuring.study import method_name

BROKEN = "#b2182b"
NORMS = {"linf": "$L_\\infty$", "l2": "$L_2$"}


def panels(
    count: int, *, height: float, columns: int | None = None, sharex: bool = False, sharey: bool = True
) -> tuple[Figure, list[Axes]]:
    """Panels side by side, in rows that fill the page's width.

    Args:
        height: of each row, in inches.
        columns: panels a row; None puts all in one.
    Raises:
        ValueError: if there is no panel, or no column.
    """
    columns = count if columns is None else columns
    if count < 1 or columns < 1:
        raise ValueError(f"count: expected at least one panel and column, got {count}, {columns}")
    rows = -(-count // columns)
    figure, axes = plt.subplots(
        rows, columns, figsize=(PAGE, height * rows), sharex=sharex, sharey=sharey, squeeze=False
    )
    for ax in axes.flat[count:]:
        ax.set_visible(False)
    for ax in axes.flat[max(count - columns, 0) : count]:
        ax.tick_params(labelbottom=True)
    return figure, list(axes.flat[:count])


def shared_legend(
    figure: Figure, axes: Sequence[Axes], *, columns: int, side: Literal["lower", "upper"] = "lower"
) -> None:
    """One legend below the panels, or above them, each name once."""
    handles = {name: handle for ax in axes for handle, name in zip(*ax.get_legend_handles_labels(), strict=True)}
    loc = "outside upper center" if side == "upper" else "outside lower center"
    figure.legend(list(handles.values()), list(handles), loc=loc, ncol=columns)


def every_method(curves: pd.DataFrame, protocol: Protocol, *, in_bytes: bool = False) -> Figure:
    """A panel for each method: `accuracy.both_protocols`, and as a dotted line how far the steps of ``protocol`` reach.

    Args:
        in_bytes: write eps as 8/255, for photographs.
    """
    check_rows(curves, "eps", words=("method",))
    groups = list(each_group(curves, "method"))
    figure, axes = panels(len(groups), height=1.75, columns=3, sharex=True)
    for ax, (method, mine) in zip(axes, groups, strict=True):
        draw_protocols(ax, mine)
        ax.set_title(method_name(method))
        ax.axvline(protocol.steps * protocol.step_size_at(1.0), color="0.5", linestyle=":", linewidth=1.2)
        ax.set_xlim(0, 1.03 * float(curves["eps"].to_numpy(dtype=float).max()))
        if in_bytes:
            eps_in_bytes(ax)
    figure.supxlabel("$L_\\infty$ eps" if in_bytes else "$L_\\infty$ eps (pixels in [0, 1])")
    figure.supylabel("robust accuracy, %")
    shared_legend(figure, axes[:1], columns=2, side="upper")
    return figure


def robust_panels(curves: pd.DataFrame) -> Figure:
    """`accuracy.robust_accuracy`, a block for each norm and in it a panel for each method, with all others in grey."""
    check_rows(curves, "eps", "robust_accuracy", "low", "high", words=("method", "norm"))
    norms = sorted(set(curves["norm"]), reverse=True)
    figure = plt.figure(figsize=(PAGE, 3.9 * len(norms)))
    blocks = figure.subfigures(len(norms), 1, squeeze=False)[:, 0]
    for block, norm in zip(blocks, norms, strict=True):
        rows = pd.DataFrame(curves[curves["norm"] == norm])
        groups = list(each_group(rows, "method"))
        axes = block.subplots(-(-len(groups) // 4), 4, sharex=True, sharey=True, squeeze=False)
        for ax in axes.flat[len(groups) :]:
            ax.set_visible(False)
        for ax, (method, mine) in zip(axes.flat, groups, strict=False):
            for _, other in groups:
                ax.plot(other["eps"], other["robust_accuracy"], color="0.82", linewidth=0.9, zorder=1)
            draw_accuracy(ax, mine, "eps", "robust_accuracy")
            ax.set_title(method_name(method))
        block.supxlabel(f"{NORMS[norm]} eps (pixels in [0, 1])")
        block.supylabel("robust accuracy, %")
    return figure


def loss_panels(by_loss: pd.DataFrame) -> Figure:
    """`accuracy.robust_accuracy_by_loss`: a panel for each method, a line for each loss."""
    check_rows(by_loss, "eps", "robust_accuracy", words=("method", "loss"))
    check_known(by_loss, "loss", LOSS_LOOKS)
    groups = list(each_group(by_loss, "method"))
    figure, axes = panels(len(groups), height=1.75, columns=4, sharex=True)
    for ax, (method, mine) in zip(axes, groups, strict=True):
        for loss, rows in each_group(mine, "loss"):
            draw_line(ax, rows["eps"], rows["robust_accuracy"], LOSS_LOOKS[loss], label=LOSS_NAMES[loss])
        in_per_cent(ax)
        ax.set_title(method_name(method))
    figure.supxlabel("$L_\\infty$ eps (pixels in [0, 1])")
    figure.supylabel("robust accuracy, %")
    shared_legend(figure, axes[:1], columns=3, side="upper")
    return figure


@dataclass(frozen=True)
class Picture:
    """One image, [channel, height, width], what is written below it, and whether an attack broke it."""

    image: np.ndarray
    text: str
    broken: bool = False


def picture_grid(columns: Mapping[str, Sequence[Picture]]) -> Figure:
    """Pictures under each other, a column each heading; a broken one has a dark frame and a cross before its text.

    Raises:
        ValueError: if there is no picture, or the columns are not of one length.
    """
    lengths = {len(pictures) for pictures in columns.values()}
    if len(lengths) != 1 or 0 in lengths:
        raise ValueError(f"columns: expected as many pictures in each, at least one, got {sorted(lengths)}")
    figure, axes = panels(len(columns) * max(lengths), height=PAGE / len(columns) + 0.25, columns=len(columns))
    for place, ax in enumerate(axes):
        row, column = divmod(place, len(columns))
        heading, pictures = list(columns.items())[column]
        _draw_picture(ax, pictures[row])
        ax.set_title(_wrapped(heading) if row == 0 else "")
    return figure


def picture_rows(rows: Mapping[str, Sequence[Picture]], *, headings: Sequence[str] | None = None) -> Figure:
    """Pictures side by side, a row each name, which stands to its left; a broken one has a dark frame.

    Args:
        headings: over the columns, if any.
    Raises:
        ValueError: if there is no picture, or the rows, or the headings, are not of one length.
    """
    lengths = {len(pictures) for pictures in rows.values()} | ({len(headings)} if headings else set())
    if len(lengths) != 1 or 0 in lengths:
        raise ValueError(f"rows: expected as many pictures in each, at least one, got {sorted(lengths)}")
    (columns,) = lengths
    # in inches: what the names and a line of text take up, and what lies between two pictures
    names, line_height, gap = 2.1, 0.22, 0.08
    side = (PAGE - names) / columns - gap
    lines = [line_height * any(picture.text for picture in pictures) for pictures in rows.values()]
    head = line_height * bool(headings)
    height = head + sum(lines) + (side + gap) * len(rows)
    figure = plt.figure(figsize=(PAGE, height))
    # laid out by hand: constrained layout takes seconds for a hundred pictures. Set, not asked for at birth, for saving
    # a figure that was born without a layout gives it the default one
    figure.set_layout_engine("none")
    axes, top = [], height - head
    for below in lines:
        lefts = [names + (side + gap) * place for place in range(columns)]
        boxes = [(left / PAGE, (top - side) / height, side / PAGE, side / height) for left in lefts]
        axes.append([figure.add_axes(box) for box in boxes])
        top -= side + gap + below
    for line, (name, pictures) in zip(axes, rows.items(), strict=True):
        for ax, picture in zip(line, pictures, strict=True):
            _draw_picture(ax, picture)
        line[0].set_ylabel(method_name(name), rotation=0, ha="right", va="center")
    for ax, heading in zip(axes[0], headings or (), strict=False):
        ax.set_title(heading)
    return figure


def _draw_picture(ax: Axes, shown: Picture) -> None:
    draw_image(ax, shown.image)
    ax.set_axis_on()
    ax.set(xticks=[], yticks=[])
    ax.grid(visible=False)
    for spine in ax.spines.values():
        spine.set(visible=shown.broken, linewidth=2, color=BROKEN)
    cross = "✗ " * (shown.broken and bool(shown.text))
    ax.set_xlabel(f"{cross}{shown.text}", color=BROKEN if shown.broken else "black", labelpad=3)


def _wrapped(heading: str) -> str:
    return "\n".join(textwrap.wrap(heading.replace("+", " +"), 11, break_long_words=False))


def ball_on(axes: Axes, center: Sequence[float], eps: float) -> None:
    """A point of the plane, and its L-infinity ball as a dashed square.

    Raises:
        ValueError: if the point has not two coordinates.
    """
    if len(center) != 2:
        raise ValueError(f"center: expected two coordinates, got {list(center)}")
    corner = (center[0] - eps, center[1] - eps)
    axes.add_patch(Rectangle(corner, 2 * eps, 2 * eps, fill=False, edgecolor="white", linestyle="--"))
    axes.plot(*center, "o", color="white", markeredgecolor="black", zorder=5)
