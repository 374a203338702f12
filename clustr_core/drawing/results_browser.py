"""What the results browser shows: how many images hold at each radius, of every data set, method and evaluation."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal, get_args

import numpy as np
import pandas as pd

from clustr_core.attacks.names import Norm
from clustr_core.drawing import widgets
from clustr_core.drawing.looks import COLOURS, PROTOCOL_LOOKS, PROTOCOL_NAMES, SANDWICH_LOOKS, Look, look_of
from clustr_core.measuring.accuracy import both_protocols, robust_accuracy, robust_accuracy_by_loss
from clustr_core.measuring.study import Study, certified_curve, in_order, sandwich_curve, where

View = Literal["correct", "paper", "both", "alone", "certified", "sandwich"]
# those that are ticked at first: no defence, the best rival, the paper's, and what certifies
CHOSEN = (
    "ce",
    "pgd-at",
    "clustr",
    "clustr-qtrades",
    "free-clustr",
    "clustr-cert",
    "lip-linear",
    "smoothing",
    "prototypes",
)
NAMES = {"folder:data/cifar10-jpeg": "CIFAR-10 (JPEG copy)", "mnist5k": "MNIST-5k"}
ATTACK_LOOKS = {
    "pgd, ce": Look(COLOURS[0], "-", "o"),
    "pgd, margin": Look(COLOURS[9], "--", "s"),
    "pgd, dlr": Look(COLOURS[4], "-.", "D"),
    "cell-walk, cells": Look(COLOURS[2], "-", "P"),
    "transfer, margin": Look(COLOURS[5], ":", "v"),
    "square, margin": Look(COLOURS[7], ":", "X"),
    "autoattack, standard": Look("black", "-", "*"),
    "paper, ce": PROTOCOL_LOOKS["paper"],
}
PART_LOOKS: dict[str, Look] = PROTOCOL_LOOKS | ATTACK_LOOKS | SANDWICH_LOOKS
PART_NAMES = {
    **PROTOCOL_NAMES,
    "pgd, ce": "PGD on cross-entropy",
    "pgd, margin": "PGD on the margin",
    "pgd, dlr": "PGD on DLR",
    "cell-walk, cells": "walk to the nearest rival cells",
    "transfer, margin": "transfer from cross-entropy",
    "square, margin": "Square",
    "autoattack, standard": "AutoAttack",
    "paper, ce": "the paper's protocol",
    "clean": "clean",
    "apgd": "APGD",
    "ddn": "DDN",
    "fmn": "FMN",
    "worst case": "worst case over all attacks",
    "certified": "certified",
}
# what stands below the views
INTERVALS = "Bands and brackets: exact (Clopper-Pearson) 95 % intervals, over images."
CORRECT = (
    "An image counts if no attack breaks it: {}. AutoAttack, where it was run, is on fewer images and counts only if "
    "ticked. At eps 0: clean accuracy. "
)
PAPER = (
    "What the released evaluation reports, in L∞ alone; for clusters it is too high, as chapter 6 shows. At eps 0: "
    "clean accuracy. "
)
BOTH = (
    "The same images in two evaluations. Filled marks: correct attacks. Open marks, thin line: the paper's protocol. "
    "Shaded: the gap between them, which is no robustness."
)
ALONE = "Each attack on its own, on the images that it was given; a single mark was run at one eps. "
CERTIFIED = "Images that are classified correctly and certified at radius r, by the best bound of each method. "
SANDWICH = (
    "Grey: certified, no attack can break it. Hatched: between what is certified and what the attacks left unbroken; "
    "the truth lies there. APGD is run up to the last radius of its grid."
)
# a curve against the radius has so many points, or as many as put the radii of the book on it
LEAST_POINTS, MOST_POINTS = 51, 201
# paper and ink of the widgets' two themes, and what tells a line from the paper (WCAG 2.2, 1.4.11)
Theme = Literal["light", "dark"]
THEMES: dict[Theme, tuple[str, str]] = {"light": ("#ffffff", "#1b1b1b"), "dark": ("#17191c", "#ececec")}
LEAST_CONTRAST = 3.0


def data(
    studies: Iterable[Study],
    *,
    shown: View = "correct",
    norm: Norm = "linf",
    methods: Sequence[str] = CHOSEN,
    method: str = "clustr-qtrades",
) -> dict[str, Any]:
    """The counts behind the book's curves of accuracy, for `widgets.save_widget`; the page computes their intervals.

    A curve is of one method in one norm. ``what`` and ``part`` say which: "correct" (all attacks but the paper's, each
    image's worst case), "paper", "both" (part "paper" or "correct", on the same images), "alone" (part: attack and
    loss), "certified" (part: the bound) and "sandwich" (part: a column of `chain.sandwich_curve`). Where AutoAttack was
    run, which is on fewer images, "correct" and "both" come without it and with it (``autoattack``). ``kept`` of ``n``
    images hold at each radius ``at``, or at those of the study's ``grid`` where a curve has none of its own.

    Args:
        studies: shown in this order.
        shown, norm, methods: what the page shows at first, of which methods.
        method: the one that is shown first where a view is of one; where it has none, the view's first.
    Returns:
        ``{studies, methods, parts, start}``, as plain values of JSON.
    Raises:
        ValueError: if there is no study, or ``shown`` is unknown; and as the tables that are asked for.
    """
    shown_studies = list(studies)
    if not shown_studies:
        raise ValueError("studies: expected at least one, got none")
    if shown not in get_args(View):
        raise ValueError(f"shown: expected one of {get_args(View)}, got {shown!r}")
    entries = [_entry(study) for study in shown_studies]
    curves = [curve for entry in entries for curve in entry["curves"]]
    return {
        "studies": entries,
        "methods": _legible(widgets.looks(in_order({curve["method"] for curve in curves}))),
        "parts": _parts([curve["part"] for curve in curves]),
        "start": {"shown": shown, "norm": norm, "methods": list(methods), "method": method},
    }


def _entry(study: Study) -> dict[str, Any]:
    """One study: its curves, and what its radii are measured in."""
    points = _points(study)
    certified = certified_curve(study, _certified_methods(study), points)
    curves = _in_book_order([*_attacked(study), *_certified(certified), *_sandwiches(study, points)])
    return {
        "profile": study.name,
        "data": NAMES.get(study.dataset, study.data),
        "pixels": study.pixels,
        "photographs": study.photographs,
        "radii": [float(radius) for radius in study.radii],
        "grid": sorted(float(radius) for radius in certified["at"].unique()),
        "notes": _notes(study, curves),
        "curves": curves,
    }


def _in_book_order(curves: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """By method, and those of a method by part, in the order in which the book shows them."""
    methods = in_order({curve["method"] for curve in curves})
    parts = _ordered([curve["part"] for curve in curves])
    return sorted(curves, key=lambda curve: (methods.index(curve["method"]), parts.index(curve["part"])))


def _points(study: Study) -> int:
    """How many points from 0 to twice the last radius put all radii on the curve."""
    last = 2 * study.radii[-1]
    for points in range(LEAST_POINTS, MOST_POINTS):
        places = [radius / last * (points - 1) for radius in study.radii]
        if all(abs(place - round(place)) < 1e-6 for place in places):
            return points
    return LEAST_POINTS


def _certified_methods(study: Study) -> list[str]:
    """Whatever certifies, and the ordinary methods whose own clusters do."""
    clustered = [name for name, recipe in study.profile.ordinary.items() if recipe.clustered]
    return in_order({*study.certifying, *clustered})


def _attacked(study: Study) -> Iterator[dict[str, Any]]:
    """Every curve of attacks against eps."""
    rows = study.attacks
    paper = where(rows, rows["attack"] == "paper")
    if len(paper):
        yield from _curves(robust_accuracy(paper), "paper", part="paper")
    without = where(rows, rows["attack"] != "autoattack")
    norms = set(rows.loc[rows["attack"] == "autoattack", "norm"])
    variants = [(without, {}), (where(rows, rows["norm"].isin(list(norms))), {"autoattack": True})]
    for counted, more in variants[: 1 + bool(norms)]:
        correct = where(counted, counted["attack"] != "paper")
        yield from _curves(robust_accuracy(correct), "correct", part="correct", **more)
        if len(paper) and (not more or "linf" in norms):
            for part, table in both_protocols(counted).groupby("protocol"):
                yield from _curves(table, "both", part=str(part), **more)
    alone = robust_accuracy_by_loss(rows).assign(part=lambda table: table["attack"] + ", " + table["loss"])
    for part, table in alone.groupby("part"):
        yield from _curves(table, "alone", part=str(part))


def _curves(table: pd.DataFrame, what: View, **more: Any) -> Iterator[dict[str, Any]]:
    """A curve for each method and norm of a table of `accuracy.robust_accuracy`."""
    for norm, there in table.sort_values("eps").groupby("norm"):
        for method, rows in there.groupby("method"):
            named = {"what": what, "norm": norm, "method": method, **more}
            yield named | {"at": [float(eps) for eps in rows["eps"]]} | _counts(rows, "robust_accuracy")


def _certified(table: pd.DataFrame) -> Iterator[dict[str, Any]]:
    """A curve for each method, of its best bound, on the grid."""
    for method, rows in table.sort_values("at").groupby("method"):
        named = {"what": "certified", "norm": "l2", "method": method, "part": str(rows["bound"].iloc[0])}
        yield named | _counts(rows, "certified_accuracy")


def _sandwiches(study: Study, points: int) -> Iterator[dict[str, Any]]:
    """Of each method that is searched for counterexamples a curve for each column: APGD at its own radii, else on the
    grid."""
    for method in study.lipschitz:
        curve = sandwich_curve(study, method, points).sort_values("at")
        for column in SANDWICH_LOOKS:
            if len(rows := where(curve, curve["column"] == column)):
                named = {"what": "sandwich", "norm": "l2", "method": method, "part": column}
                places = {"at": [float(radius) for radius in rows["at"]]} if column == "apgd" else {}
                yield named | places | _counts(rows, "accuracy")


def _counts(rows: pd.DataFrame, share: str) -> dict[str, Any]:
    """How many images hold, and of how many; one number where that is the same at every radius."""
    n = [int(examples) for examples in rows["examples"]]
    kept = [round(value * count) for value, count in zip(rows[share], n, strict=True)]
    return {"kept": kept, "n": n[0] if len(set(n)) == 1 else n}


def _ordered(parts: Sequence[str]) -> list[str]:
    """Evaluations, attacks and columns, each once: the known ones as listed here, then the others."""
    return [part for part in PART_LOOKS if part in parts] + sorted(set(parts) - set(PART_LOOKS))


def _parts(parts: Sequence[str]) -> dict[str, dict[str, str]]:
    """How each evaluation, attack or column is called and drawn where curves are of one method."""
    looks = {part: PART_LOOKS.get(part) or look_of(part) for part in _ordered(parts)}
    return _legible({part: widgets.drawn(PART_NAMES.get(part, part), look) for part, look in looks.items()})


def _notes(study: Study, curves: Sequence[Mapping[str, Any]]) -> dict[str, dict[Norm, str]]:
    """What stands below each view, in each norm."""
    root = f"√{study.pixels}"
    inside = f"The L∞ ball of radius r lies in the L₂ ball of radius r {root}, whose certificate counts here. "
    against = {norm: _attacks_in_words(curves, norm, study.amount) for norm in get_args(Norm)}
    return {
        "correct": {norm: CORRECT.format(attacks) + INTERVALS for norm, attacks in against.items()},
        "paper": {"linf": PAPER + INTERVALS},
        "both": {"linf": BOTH},
        "alone": dict.fromkeys(against, ALONE + INTERVALS),
        "certified": {"l2": CERTIFIED + INTERVALS, "linf": CERTIFIED + inside + INTERVALS},
        "sandwich": {"l2": SANDWICH},
    }


def _attacks_in_words(curves: Iterable[Mapping[str, Any]], norm: Norm, amount: Callable[[float], str]) -> str:
    """Which attacks an image must withstand in a norm: those at every eps, and those at some alone; not AutoAttack."""
    grids: dict[str, set[float]] = {}
    for curve in curves:
        if (
            curve["what"] == "alone"
            and curve["norm"] == norm
            and not curve["part"].startswith(("paper,", "autoattack,"))
        ):
            grids.setdefault(curve["part"], set()).update(curve["at"])
    most = max(map(len, grids.values()), default=0)
    always, sometimes = (
        [PART_NAMES.get(part, part) for part, at in grids.items() if (len(at) == most) == every]
        for every in (True, False)
    )
    radii = sorted({eps for at in grids.values() if len(at) < most for eps in at})
    more = f"; at eps {', '.join(map(amount, radii))} also {', '.join(sometimes)}" if sometimes else ""
    return ", ".join(always) + more


# ---- colours on light and on dark paper


def _legible(looks: Mapping[str, Mapping[str, str]]) -> dict[str, dict[str, str]]:
    """Looks with their colour on light paper and, as ``dark``, on dark."""
    return {
        name: {**look, "color": _standing_out(look["color"], "light"), "dark": _standing_out(look["color"], "dark")}
        for name, look in looks.items()
    }


def _standing_out(color: str, theme: Theme) -> str:
    """A colour moved towards the ink until it stands out from the paper; greys are mirrored for dark paper."""
    from matplotlib.colors import to_hex, to_rgb

    paper, ink = (np.array(to_rgb(each)) for each in THEMES[theme])
    start = np.array(to_rgb(color))
    if theme == "dark" and np.ptp(start) == 0:
        start = 1 - start
    moved = [start + share * (ink - start) for share in np.linspace(0, 1, 11)]
    return to_hex(next(each for each in moved if _contrast(each, paper) >= LEAST_CONTRAST))


def _contrast(one: np.ndarray, other: np.ndarray) -> float:
    """The contrast ratio of two colours.

    Source: Web Content Accessibility Guidelines 2.2, "contrast ratio" and "relative luminance".
    """
    linear = [np.where(each <= 0.04045, each / 12.92, ((each + 0.055) / 1.055) ** 2.4) for each in (one, other)]
    low, high = sorted(float(each @ [0.2126, 0.7152, 0.0722]) for each in linear)
    return (high + 0.05) / (low + 0.05)
