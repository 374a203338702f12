"""What the battery is worth, as a picture: which check speaks of which evaluation."""

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from clustr_core.drawing.checks import check_rows
from clustr_core.drawing.looks import COLOURS, PAGE
from clustr_core.measuring.study import in_order, method_name

SHORT = {"ce": "cross-entropy", "ce-clusters": "clusters after", "pgd-at": "PGD training", "fast-at": "fast training"}
KINDS = {"protocol": "the paper's protocol", "correct": "", "failure": "failures made on purpose"}
HIT, ALARM = COLOURS[0], COLOURS[3]


def power_figure(spoken: pd.DataFrame, rates: pd.DataFrame) -> Figure:
    """Left a row each check and a column each evaluation, the darker the more often it speaks; right its rates.

    Args:
        spoken: of `power.by_evaluation`.
        rates: of `power.rates`; the checks are drawn in its order, by their hits.
    Raises:
        ValueError: as `check_rows`.
    """
    check_rows(spoken, "share", "broken", words=("check", "evaluation", "kind"))
    check_rows(rates, "share", "low", "high", words=("check", "truth"))
    hits = pd.DataFrame(rates[rates["truth"] == "broken"]).sort_values("share", ascending=False, kind="stable")
    order = list(hits["check"])
    size = (PAGE, 0.27 * len(order) + 2.2)
    figure, (left, right) = plt.subplots(1, 2, figsize=size, width_ratios=(2.6, 1), sharey=True)
    _draw_spoken(left, spoken, order)
    _draw_rates(right, rates, order)
    return figure


def _columns(spoken: pd.DataFrame) -> list[tuple[str, str]]:
    """(kind, evaluation) in the order of the columns: the paper's protocol on each network, PGD, failures."""
    there = spoken[["kind", "evaluation"]].drop_duplicates()
    found: list[tuple[str, str]] = []
    for kind in KINDS:
        names = list(there.loc[there["kind"] == kind, "evaluation"])
        if kind == "protocol":
            by_method = {name.removesuffix(", paper's"): name for name in names}
            names = [by_method[method] for method in in_order(by_method)]
        found += [(kind, name) for name in names]
    return found


def _draw_spoken(axes: Axes, spoken: pd.DataFrame, order: list[str]) -> None:
    columns = _columns(spoken)
    wide = spoken.pivot(index="check", columns="evaluation", values="share").loc[order, [name for _, name in columns]]
    axes.imshow(wide.to_numpy(dtype=float), cmap="Greys", vmin=0, vmax=1.25, aspect="auto")
    broken = spoken.groupby("evaluation")["broken"].first()
    labels = []
    for kind, name in columns:
        method = name.removesuffix(", paper's")
        label = SHORT.get(method, method_name(method)) if kind == "protocol" else name
        labels.append(f"{label} ({100 * broken[name]:.0f} %)")
    axes.set_xticks(range(len(columns)), labels, rotation=60, ha="right", rotation_mode="anchor", fontsize="small")
    axes.set_yticks(range(len(order)), order)
    places = np.arange(len(columns))
    for kind, title in KINDS.items():
        where = places[[each == kind for each, _ in columns]]
        if len(where):
            axes.axvline(where[-1] + 0.5, color="white", linewidth=3)
            axes.text(where.mean(), -0.8, title, ha="center", va="bottom", fontsize="small")
    axes.grid(visible=False)
    axes.tick_params(length=0)


def _draw_rates(axes: Axes, rates: pd.DataFrame, order: list[str]) -> None:
    for truth, colour, marker, shift, name in (
        ("broken", HIT, "o", -0.16, "of broken ones"), ("honest", ALARM, "s", 0.16, "of honest ones")
    ):  # fmt: skip
        rows = rates[rates["truth"] == truth].set_index("check").loc[order]
        heights = np.arange(len(order)) + shift
        axes.hlines(heights, rows["low"], rows["high"], color=colour, linewidth=1.2)
        axes.plot(rows["share"], heights, marker, color=colour, markersize=4, label=name)
    axes.set(xlim=(-0.03, 1.03), xlabel="speaks, share")
    axes.set_ylim(len(order) - 0.5, -0.5)
    axes.legend(loc="lower right", fontsize="small")
    axes.tick_params(labelleft=False)
