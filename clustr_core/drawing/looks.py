"""What everything looks like: colours, line styles and markers; figures saved with their tables."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl
import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure

from clustr_core.measuring.written import write_rows
from clustr_core.storage.files import figure_folder, written_whole
from clustr_core.storage.provenance import environment


@dataclass(frozen=True)
class Look:
    """How one series is drawn."""

    color: str
    linestyle: str | tuple[int, tuple[int, ...]]
    marker: str


COLOURS = sns.color_palette("colorblind").as_hex()
CLASS_COLOURS = [COLOURS[c] for c in (0, 1, 2, 4, 8, 9)]
# by family: no defence in grey, an adversary without clusters in blue to pink, clusters in orange, green and red; what
# certifies, which is drawn apart from the rest, in black for the book's own and in colours for its rivals
LOOKS = {
    "ce": Look(COLOURS[7], ":", "s"),
    "ce-clusters": Look("0.25", ":", "v"),
    "pgd-at": Look(COLOURS[0], "-", "o"),
    "trades": Look(COLOURS[9], "-", "P"),
    "free-at": Look(COLOURS[4], "--", "X"),
    "fast-at": Look(COLOURS[6], "-.", "<"),
    "clustr": Look(COLOURS[1], "--", "^"),
    "clustr-qtrades": Look(COLOURS[2], "-.", "D"),
    "free-clustr": Look(COLOURS[3], "-", "*"),
    "clustr-cert": Look("black", "-", "p"),
    "clustr-lip": Look("#762a83", "--", "h"),
    "lip-linear": Look("#08519c", "-.", "d"),
    "smoothing": Look("#006d5b", ":", ">"),
    "prototypes": Look("0.55", "--", "8"),
}
BOUND_LOOKS = {
    "triangle": Look(COLOURS[7], ":", "s"),
    "nearest": Look(COLOURS[1], "--", "^"),
    "pairwise": Look(COLOURS[0], "-", "o"),
    "exact": Look("black", "-.", "D"),
}


def look_of(method: str) -> Look:
    """How a method is drawn; a method of one's own gets a colour and a marker by its name, the same everywhere."""
    if method in LOOKS:
        return LOOKS[method]
    number = sum(map(ord, method))
    return Look(COLOURS[number % len(COLOURS)], (0, (3, 1, 1, 1, 1, 1)), "1234+x"[number % 6])


SANDWICH_LOOKS = {
    "clean": Look("0.55", ":", ""),
    # run at a grid of radii: a mark at each
    "apgd": Look(COLOURS[2], "", "D"),
    "ddn": Look(COLOURS[1], "--", "^"),
    "fmn": Look(COLOURS[0], ":", "s"),
    "worst case": Look(COLOURS[3], "--", ""),
    "certified": Look("black", "-", ""),
}
SANDWICH_NAMES = {name: name for name in SANDWICH_LOOKS} | {"apgd": "APGD", "ddn": "DDN", "fmn": "FMN"}
LOSS_LOOKS = {
    "ce": Look(COLOURS[7], ":", "s"),
    "margin": Look(COLOURS[0], "-", "o"),
    "dlr": Look(COLOURS[1], "--", "^"),
}
LOSS_NAMES = {"ce": "climbing cross-entropy", "margin": "climbing the margin", "dlr": "climbing DLR"}
# two evaluations of the same models
PROTOCOL_LOOKS = {
    "paper": Look(COLOURS[1], "--", "^"),
    "correct": Look(COLOURS[0], "-", "o"),
}
PROTOCOL_NAMES = {"paper": "the paper's protocol", "correct": "correct attacks"}


# inches: a page's column is 727 pixels wide, 97 an inch, so that 8 points are 11 pixels there
PAGE = 7.5


def house_style() -> None:
    """Set the book's look for every figure that follows; the same table then gives the same bytes."""
    sns.set_theme(context="paper", style="ticks", palette="colorblind", rc={"axes.grid": True, "grid.alpha": 0.3})
    mpl.rcParams.update(
        {
            "font.size": 9,
            "axes.titlesize": 9.5,
            "axes.labelsize": 9,
            "xtick.labelsize": 8.5,
            "ytick.labelsize": 8.5,
            "legend.fontsize": 8.5,
            "legend.title_fontsize": 8.5,
            "figure.labelsize": 9,
            "figure.figsize": (PAGE, 4),
            "figure.dpi": 140,
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
    """Write figures/<profile>/<label>.svg, .png, .csv, the table that it was drawn from, and .json, its sidecar.

    Args:
        profile: None takes ``$CLUSTR_PROFILE``, or "quick". A headless run sets it, and `FIGURES`.
    Returns:
        the path of the table; its siblings have the same stem.
    Raises:
        ValueError: if the label does not begin with "fig-", or the table is empty.
    """
    if not label.startswith("fig-"):
        raise ValueError(f'label: expected a name that begins with "fig-", got {label!r}')
    if table.empty:
        raise ValueError(f"table: expected the rows that {label} was drawn from, got none")
    folder = figure_folder(profile)
    stem, profile = folder / label, folder.name
    # laid out once for both files and the page
    figure.draw_without_rendering()
    figure.set_layout_engine("none")
    for suffix, undated in ((".svg", {"Date": None}), (".png", {"Software": None})):
        # a fixed salt: the same table gives the same bytes
        with written_whole(stem.with_suffix(suffix)) as temporary, mpl.rc_context({"svg.hashsalt": label}):
            figure.savefig(temporary, format=suffix[1:], metadata=undated, bbox_inches="tight")
    drawn_from = stem.with_suffix(".csv")
    write_rows(drawn_from, table, environment() | {"profile": profile, "methods": _methods(table, profile)})
    return drawn_from


def _methods(table: pd.DataFrame, profile: str) -> dict[str, list[str]]:
    """Whose runs are in a table, by the profile that trained them: the columns method and profile say so."""
    if "method" not in table:
        return {}
    profiles = table["profile"] if "profile" in table else pd.Series(profile, index=table.index)
    return {str(name): sorted(set(rows["method"].dropna())) for name, rows in table.groupby(profiles, sort=False)}


def each_group(table: pd.DataFrame, column: str) -> Iterator[tuple[Any, pd.DataFrame]]:
    """The rows of each value of a column, in order of appearance; methods always in the same order, ours first."""
    groups = [(name, pd.DataFrame(rows)) for name, rows in table.groupby(column, sort=False)]
    order = {name: place for place, name in enumerate(LOOKS)}
    if column == "method":
        groups.sort(key=lambda group: (order.get(str(group[0]), len(order)), str(group[0])))
    return iter(groups)
