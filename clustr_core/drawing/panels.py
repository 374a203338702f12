"""Figures of several panels, and what their panels share."""

from collections.abc import Sequence

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from clustr_core.drawing.checks import check_rows
from clustr_core.drawing.looks import each_group
from clustr_core.drawing.results import draw_protocols
from clustr_core.measuring.profile import Protocol
from clustr_core.measuring.study import method_name


def row_of_panels(
    count: int, *, width: float, height: float, margin: float = 0.0, sharex: bool = False, sharey: bool = True
) -> tuple[Figure, list[Axes]]:
    """Panels side by side.

    Args:
        width: of each panel, in inches.
        margin: of the figure, beside its panels.
    Raises:
        ValueError: if there is no panel.
    """
    if count < 1:
        raise ValueError(f"count: expected at least one panel, got {count}")
    size = (margin + width * count, height)
    figure, axes = plt.subplots(1, count, figsize=size, sharex=sharex, sharey=sharey, squeeze=False)
    return figure, list(axes[0])


def shared_legend(figure: Figure, axes: Sequence[Axes], *, columns: int) -> None:
    """One legend below the panels, each name once."""
    handles = {name: handle for ax in axes for handle, name in zip(*ax.get_legend_handles_labels(), strict=True)}
    figure.legend(list(handles.values()), list(handles), fontsize=9, loc="outside lower center", ncol=columns)


def every_method(curves: pd.DataFrame, protocol: Protocol) -> Figure:
    """A panel for each method, in three columns: `accuracy.both_protocols`, and how far the steps of ``protocol`` reach
    in all as a dotted line."""
    check_rows(curves, "eps", words=("method",))
    groups = list(each_group(curves, "method"))
    rows = -(-len(groups) // 3)
    figure, axes = plt.subplots(rows, 3, figsize=(10.6, 0.5 + 2.5 * rows), sharex=True, sharey=True, squeeze=False)
    for ax, (method, mine) in zip(axes.flat, groups, strict=False):
        draw_protocols(ax, mine)
        ax.set_title(method_name(method), fontsize=10.5)
        ax.axvline(protocol.steps * protocol.step_size_at(1.0), color="0.5", linestyle=":", linewidth=1.2)
        ax.set_xlim(0, 1.03 * curves["eps"].max())
    for ax in axes.flat[len(groups) :]:
        ax.set_visible(False)
    for ax in axes[-1]:
        ax.set_xlabel("$L_\\infty$ radius eps")
    for ax in axes[:, 0]:
        ax.set_ylabel("robust accuracy")
    axes[0, 0].legend(fontsize=8.5, loc="upper right")
    return figure


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
