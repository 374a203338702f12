"""What could not be seen is refused before anything is drawn; what can be seen in an unusual way is drawn."""

from collections.abc import Callable
from dataclasses import dataclass

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest

from clustr_core.drawing import geometry, results
from clustr_core.drawing.looks import BOUND_LOOKS, LOOKS, house_style
from clustr_core.drawing.panels import (
    Picture,
    ball_on,
    every_method,
    loss_panels,
    panels,
    picture_grid,
    picture_rows,
    robust_panels,
    shared_legend,
)
from clustr_core.measuring.profile import Protocol
from clustr_core.theory.examples import hard_radius_soft_rule_example
from clustr_core.theory.pictures import bisector_picture, second_nearest_line, soft_margin_along

ANSWERS = pd.DataFrame(
    {"name": ["a", "a", "b", "b"], "column": ["reported", "attacked"] * 2, "accuracy": [0.7, 0.0, 0.3, 0.2]}
)
PICTURE = Picture(np.zeros((1, 2, 2)), "3", broken=True)
PLACES = np.array([-1.0, 0.0, 1.0])
GRID = pd.DataFrame({"x": np.repeat(PLACES, 3), "y": np.tile(PLACES, 3)})
GRID = GRID.assign(value=GRID["x"] + GRID["y"], margin=GRID["x"], dx=1.0, dy=0.5)
REGIONS = GRID.assign(nearest_0=-GRID["x"], nearest_1=GRID["x"])
CENTROIDS = np.array([[-1.0, 0.0], [1.0, 0.0]])


def lines(columns: str, **words: tuple[str, ...]) -> pd.DataFrame:
    """Three rows for each combination of two words, every number a place in [0, 1]."""
    groups = [dict(zip(words, pair, strict=True)) for pair in zip(*words.values(), strict=True)]
    return pd.DataFrame(
        [{**group, **dict.fromkeys(columns.split(), 0.2 + 0.3 * n)} for group in groups for n in range(3)]
    )


@dataclass(frozen=True)
class Case:
    """A drawing function, a table that it draws, and the columns of numbers that it reads."""

    draw: Callable[[plt.Axes, pd.DataFrame], object]
    table: pd.DataFrame
    numbers: str
    one_row: bool = True


METHODS = ("ce", "clustr")
GAPS = pd.DataFrame(
    [
        {"method": method, "column": column, "accuracy": 0.5, "low": 0.4, "high": 0.6}
        for method in METHODS
        for column in ("clean", "paper", "correct")
    ]
)
CASES = {
    "distribution": Case(
        lambda ax, t: results.draw_distribution(ax, t, "v", group="g", looks={"nearest": BOUND_LOOKS["nearest"]}),
        lines("v", g=("nearest",)), "v",
    ),
    "by group": Case(
        lambda ax, t: results.draw_by_group(ax, t, "x", "y", group="g", name="g"),
        lines("x y", k=("a",)).assign(g=1), "x y g",
    ),
    "accuracy": Case(
        lambda ax, t: results.draw_accuracy(ax, t, "eps", "acc"), lines("eps acc low high", method=METHODS),
        "eps acc low high",
    ),
    "protocols": Case(
        results.draw_protocols, lines("eps robust_accuracy low high", protocol=("paper", "correct")),
        "eps robust_accuracy low high",
    ),
    "certified": Case(
        results.draw_certified, lines("at certified_accuracy", method=METHODS), "at certified_accuracy"
    ),
    "surface": Case(lambda ax, t: results.draw_surface(ax, t, "x", "y", "value"), GRID, "x y value margin", False),
    "arrows": Case(results.draw_arrows, GRID, "x y dx dy"),
    "by attack": Case(
        results.draw_by_attack, lines("robust_accuracy low high", attack=("Square",)), "robust_accuracy low high"
    ),
    "fates": Case(
        results.draw_fates, lines("reported autoattack", name=("PCL", "MMC")).assign(attacks="yes"),
        "reported autoattack",
    ),
    "gaps": Case(results.draw_protocol_gaps, GAPS, "accuracy low high", False),
    "sandwich": Case(results.draw_sandwich, lines("at accuracy", column=("clean", "certified")), "at accuracy"),
    "tightness": Case(results.draw_tightness, lines("norm radius", method=("ce",)), "norm radius"),
    "gains": Case(
        lambda ax, t: results.draw_gains(ax, t, {"a": "A", "b": "B"}),
        lines("radius gain low high", head=("a", "b")),
        "radius gain low high",
    ),
    "day": Case(results.draw_day, lines("minutes accuracy", kind=("a", "b")), "minutes accuracy"),
    "minutes": Case(results.draw_minutes, lines("minutes accuracy", candidate=("a", "b")), "minutes accuracy"),
    "history": Case(lambda ax, t: results.draw_history(ax, t, "loss"), lines("epoch loss", method=METHODS), "epoch"),
    "map": Case(
        lambda ax, t: results.draw_map(ax, t, ["cat", "dog"]), lines("x y", k=("a", "b")).assign(label=1), "x y label"
    ),
    "shares": Case(lambda ax, t: results.draw_shares(ax, t, "v", "epoch"), lines("v", epoch=(1, 2)), "v"),
    "paths": Case(results.draw_paths, lines("along across", method=METHODS), "along across"),
    "progress": Case(lambda ax, t: results.draw_progress(ax, t, "x", "y"), lines("x y", method=METHODS), "x y"),
    "beside": Case(
        lambda ax, t: results.draw_beside(ax, t, "x", "y"), lines("x y low high", method=METHODS), "x y low high"
    ),
    "ranges": Case(lambda ax, t: results.draw_ranges(ax, t, "v"), lines("v", method=METHODS), "v"),
    "parts": Case(
        results.draw_parts,
        pd.DataFrame({"method": ["ce", "ce", "clustr"], "part": ["a", "b", "a"], "share": [0.5, 0.5, 1.0]}), "share",
    ),
    "growth": Case(
        lambda ax, t: results.draw_growth(ax, t, kinds=["logits"]), lines("size seconds", what=("logits",)),
        "size seconds",
    ),
    "prices": Case(
        results.draw_prices, lines("training_ratio accuracy", method=METHODS), "training_ratio accuracy"
    ),
    "seconds": Case(
        results.draw_seconds,
        lines("seconds", part=("epoch", "attack")).assign(devices=[1, 2, 4] * 2),
        "seconds devices",
    ),
    "reported": Case(results.draw_reported, ANSWERS, "accuracy", False),
    "certain": Case(results.draw_certain, ANSWERS.replace("reported", "certified"), "accuracy", False),
    "regions": Case(
        lambda ax, t: geometry.draw_regions(ax, t, [0, 1], CENTROIDS), REGIONS, "x y nearest_0 nearest_1", False
    ),
    "discs": Case(geometry.draw_discs, lines("x y radius", k=("a",)), "x y radius"),
    "bisector": Case(geometry.draw_bisector, bisector_picture(), "x y", False),
    "ladder": Case(
        lambda ax, t: geometry.draw_ladder(ax, t, "t"), lines("t " + " ".join(BOUND_LOOKS), k=("a",)),
        "t " + " ".join(BOUND_LOOKS),
    ),
    "on a line": Case(geometry.draw_on_a_line, second_nearest_line(), "position claimed certified flip", False),
    "soft margin": Case(
        geometry.draw_soft_margin, soft_margin_along(hard_radius_soft_rule_example(), reach=1.0, points=5),
        "shift margin", False,
    ),
}  # fmt: skip


@pytest.fixture
def axes():
    with plt.rc_context():
        house_style()
        yield plt.subplots()[1]
    plt.close("all")


def marks(axes: plt.Axes) -> int:
    return len(axes.lines) + len(axes.collections) + len(axes.patches) + len(axes.texts)


def test_every_function_that_draws_a_table_is_among_the_cases() -> None:
    drawn = {name for module in (results, geometry) for name in vars(module) if name.startswith("draw_")}
    named = {f"draw_{name.replace(' ', '_')}" for name in CASES} | {"draw_protocol_gaps", "draw_on_a_line"}
    others = {"draw_image", "draw_points", "draw_voronoi", "draw_line"}
    assert drawn - others <= named


@pytest.mark.parametrize("name", CASES)
def test_a_table_is_drawn_and_whatever_has_no_place_is_refused(name: str, axes) -> None:
    case = CASES[name]
    case.draw(axes, case.table)
    assert marks(axes)
    axes.clear()
    before = marks(axes)
    with pytest.raises(ValueError, match=r"expected rows to draw, got none|expected a column"):
        case.draw(axes, case.table[:0])
    for column in case.numbers.split():
        for value in (float("nan"), float("inf")):
            spoiled = case.table.astype({column: float})
            spoiled.loc[spoiled.index[1], column] = value
            with pytest.raises(ValueError, match=rf"{column}: expected (finite|a name).*got {value}.* in row"):
                case.draw(axes, spoiled)
        with pytest.raises(ValueError, match=f"expected a column '{column}'"):
            case.draw(axes, case.table.drop(columns=column))
    assert marks(axes) == before


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.one_row])
def test_one_row_can_be_seen(name: str, axes) -> None:
    """A line of one point needs a marker."""
    case = CASES[name]
    case.draw(axes, case.table[:1])
    seen = [line.get_marker() not in ("", "None", None) or len(line.get_xdata()) > 1 for line in axes.lines]
    assert any(seen) or axes.collections or axes.patches
    axes.figure.canvas.draw()


@pytest.mark.parametrize(
    ("draw", "words"),
    [
        (
            lambda ax: results.draw_by_group(
                ax, pd.DataFrame({"x": range(5), "y": range(5), "g": range(5)}), "x", "y", group="g", name="g"
            ),
            "g: expected at most 4 values, got 5",
        ),
        (
            lambda ax: results.draw_distribution(
                ax, lines("v", g=("other",)), "v", group="g", looks={"nearest": BOUND_LOOKS["nearest"]}
            ),
            r"g: expected rows of each of \['nearest'\], got none of \['nearest'\]",
        ),
        (
            lambda ax: results.draw_protocols(ax, lines("eps robust_accuracy low high", protocol=("own",))),
            r"protocol: expected some of \['paper', 'correct'\], got \['own'\]",
        ),
        (lambda ax: results.draw_sandwich(ax, lines("at accuracy", column=("own",))), r"column: .* got \['own'\]"),
        (lambda ax: results.draw_protocol_gaps(ax, GAPS[:-1]), r"one row of each .* of clustr, got \['paper'\]"),
        (
            lambda ax: results.draw_map(ax, pd.DataFrame({"x": [0.0], "y": [0.0], "label": [2]}), ["cat", "dog"]),
            "label: expected numbers of 2 names, at most 100, got 2 to 2",
        ),
        (
            lambda ax: results.draw_growth(ax, lines("size seconds", what=("own",)), kinds=["logits"]),
            r"what: .* got \['own'\]",
        ),
        (lambda ax: results.draw_growth(ax, lines("size seconds", what=("a",)), kinds=list("abcdefghi")), "at most 8"),
        (
            lambda ax: results.draw_growth(ax, lines("size seconds", what=("a",)).assign(seconds=0.0), kinds=["a"]),
            "expected positive sizes and seconds, got 0",
        ),
        (
            lambda ax: results.draw_parts(ax, pd.DataFrame({"method": ["ce"], "part": ["a"], "share": [-0.1]})),
            "share: .* got -0.1",
        ),
        (lambda ax: results.draw_surface(ax, GRID[:-1], "x", "y", "value"), "full grid, at least 2 x 2, got 8 rows"),
        (lambda ax: results.draw_points(ax, {str(n): (0, 0) for n in range(11)}), "points: expected at most 10"),
        (
            lambda ax: results.draw_history(ax, lines("epoch", method=("ce",)).assign(loss=[1.0, np.nan, 1.0]), "loss"),
            "loss: expected finite numbers, got nan in row 1",
        ),
        (
            lambda ax: results.draw_history(ax, lines("epoch", method=("ce",)).assign(loss=np.nan), "loss"),
            "expected rows to draw, got none",
        ),
        (
            lambda ax: geometry.draw_regions(ax, REGIONS, [*range(7)], np.zeros((7, 2))),
            "labels: expected 2 to 6 classes, which have a colour each, got 7",
        ),
        (lambda ax: geometry.draw_regions(ax, REGIONS, [0, 1], CENTROIDS * np.nan), "centroids: .* finite"),
        (lambda ax: geometry.draw_voronoi(ax, CENTROIDS), "centroids: expected 4 or more"),
        (lambda ax: geometry.draw_discs(ax, lines("x y radius", k=("a",)).assign(radius=-1.0)), "radius: .* got -1"),
        (lambda ax: geometry.draw_bisector(ax, bisector_picture()[1:]), r"got none called \['z'\]"),
        (lambda ax: geometry.draw_ladder(ax, lines("t", k=("a",)), "t", bounds=["own"]), r"bounds: .* got \['own'\]"),
        (lambda ax: results.draw_image(ax, np.zeros((2, 4, 4))), r"1 or 3 channels, got \[2, 4, 4\]"),
        (lambda ax: results.draw_image(ax, np.full((1, 2, 2), np.nan)), "expected finite pixels, got 4"),
        (lambda _: panels(0, height=1), "count: expected at least one panel and column, got 0, 0"),
        (lambda _: picture_grid({}), "columns: expected as many pictures in each, at least one"),
        (lambda _: picture_grid({"a": [PICTURE], "b": []}), "columns: expected as many pictures in each"),
        (lambda _: picture_rows({}), "rows: expected as many pictures in each, at least one"),
        (lambda _: picture_rows({"a": [PICTURE], "b": []}), "rows: expected as many pictures in each"),
        (lambda _: picture_rows({"a": [PICTURE]}, headings=["1", "2"]), "rows: expected as many pictures in each"),
        (lambda ax: ball_on(ax, [0.0], 0.1), "center: expected two coordinates"),
    ],
)  # fmt: skip
def test_what_has_no_look_or_no_place_is_refused(draw, words: str, axes) -> None:
    with pytest.raises(ValueError, match=words):
        draw(axes)
    assert not marks(axes)


def test_regions_of_classes_that_do_not_count_from_zero(axes) -> None:
    grid = REGIONS.rename(columns={"nearest_0": "nearest_2", "nearest_1": "nearest_5"})
    geometry.draw_regions(axes, grid, [2, 5], CENTROIDS)
    assert axes.get_legend_handles_labels()[1] == ["class 2", "class 5"]


def test_a_hundred_classes_are_told_apart(axes) -> None:
    table = pd.DataFrame({"x": np.arange(100.0), "y": 0.0, "label": range(100)})
    results.draw_map(axes, table, [str(n) for n in range(100)])
    looks = {
        (tuple(points.get_facecolor()[0]), points.get_paths()[0].vertices.tobytes()) for points in axes.collections
    }
    assert len(looks) == 100


def test_every_method_has_its_panel() -> None:
    methods = [*list(LOOKS)[:10], "my-method"]
    curves = pd.concat(
        [lines("eps robust_accuracy low high", protocol=("paper", "correct")).assign(method=m) for m in methods]
    )
    figure = every_method(curves, Protocol(attack="paper", eps=(0.1,)))
    shown = [ax for ax in figure.axes if ax.get_visible()]
    assert len(shown) == 11
    assert shown[-1].get_title() == "my-method"
    shared_legend(figure, shown, columns=2)
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["the paper's protocol", "correct attacks"]
    plt.close("all")


def test_each_norm_has_a_panel_for_each_method_with_the_others_behind_it() -> None:
    rows = lines("eps robust_accuracy low high", method=("ce", "clustr", "trades"))
    figure = robust_panels(pd.concat([rows.assign(norm=norm) for norm in ("l2", "linf")]))
    axes = [ax for block in figure.subfigs for ax in block.axes if ax.get_visible()]
    assert len(axes) == 6
    assert all(len(ax.lines) == 4 for ax in axes)
    plt.close("all")


def test_losses_stand_side_by_side_for_each_method() -> None:
    rows = lines("eps robust_accuracy", loss=("ce", "margin", "dlr"))
    figure = loss_panels(pd.concat([rows.assign(method=method) for method in ("ce", "clustr")]))
    assert [len(ax.lines) for ax in figure.axes if ax.get_visible()] == [3, 3]
    assert len(figure.legends[0].get_texts()) == 3
    with pytest.raises(ValueError, match="loss"):
        loss_panels(rows.assign(method="ce", loss="square"))
    plt.close("all")


def test_a_broken_picture_is_framed_and_crossed() -> None:
    figure = picture_grid({"clean": [Picture(PICTURE.image, "3")], "ClusTR+QTRADES": [PICTURE]})
    clean, broken = figure.axes
    assert (clean.get_xlabel(), broken.get_xlabel()) == ("3", "✗ 3")
    assert not clean.spines["left"].get_visible()
    assert broken.spines["left"].get_visible()
    assert broken.get_title() == "ClusTR\n+QTRADES"
    plt.close("all")


def test_a_row_of_pictures_has_its_name_to_the_left() -> None:
    silent = Picture(PICTURE.image, "", broken=True)
    figure = picture_rows({"clustr": [PICTURE, silent], "a row": [silent, silent]}, headings=["left", "right"])
    assert [ax.get_ylabel() for ax in figure.axes] == ["ClusTR", "", "a row", ""]
    assert [ax.get_title() for ax in figure.axes] == ["left", "right", "", ""]
    assert [ax.get_xlabel() for ax in figure.axes] == ["✗ 3", "", "", ""]
    assert all(ax.spines["left"].get_visible() for ax in figure.axes)
    plt.close("all")


def test_rows_of_pictures_are_saved_as_they_were_laid_out(tmp_path) -> None:
    with plt.rc_context():
        house_style()
        figure = picture_rows({"clustr": [PICTURE, PICTURE], "ce": [PICTURE, PICTURE]})
        places = [ax.get_position().bounds for ax in figure.axes]
        for name in ("one.png", "two.png"):
            figure.savefig(tmp_path / name, bbox_inches="tight")
        assert [ax.get_position().bounds for ax in figure.axes] == places
    plt.close("all")
