"""Figures show the rows they are given, in looks that can be told apart, and in the same bytes each time."""

from itertools import combinations

import matplotlib.colors
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from disk import contents, files_of_at_most
from matplotlib.patches import Circle

from clustr_core.drawing.geometry import draw_discs, draw_ladder, draw_regions, draw_voronoi
from clustr_core.drawing.looks import BOUND_LOOKS, LOOKS, LOSS_LOOKS, PROTOCOL_LOOKS, house_style, save_figure
from clustr_core.drawing.results import (
    draw_accuracy,
    draw_distribution,
    draw_history,
    draw_image,
    draw_map,
    draw_paths,
    draw_progress,
    draw_ranges,
    draw_shares,
)
from clustr_core.measuring.study import METHOD_NAMES
from clustr_core.storage.files import FIGURES
from clustr_core.storage.provenance import check_sidecar
from clustr_core.training.recipes import METHODS


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("CLUSTR_HOME", str(tmp_path))
    monkeypatch.delenv("CLUSTR_PROFILE", raising=False)
    with plt.rc_context():
        yield tmp_path
    plt.close("all")


@pytest.fixture
def axes():
    house_style()
    return plt.subplots()[1]


TABLE = pd.DataFrame({"x": [0.0, 1.0, 2.0], "y": [0.25, 0.5, 1 / 3]})


def a_figure():
    house_style()
    figure, axes = plt.subplots()
    axes.plot(TABLE["x"], TABLE["y"], label="$r$")
    axes.fill_between(TABLE["x"], TABLE["y"], alpha=0.2)
    axes.legend()
    return figure


def test_a_figure_is_four_files_and_the_same_bytes_each_time(home):
    path = save_figure(a_figure(), "fig-test", TABLE, profile="smoke")
    assert path == home / "figures/smoke/fig-test.csv"
    first = contents(home)
    assert set(first) == {f"figures/smoke/fig-test{suffix}" for suffix in (".csv", ".json", ".png", ".svg")}
    assert check_sidecar(path)["made"].items() > {"profile": "smoke", "device": "cpu", "threads": 1}.items()
    assert first["figures/smoke/fig-test.csv"] == b"x,y\n0,0.25\n1,0.5\n2,0.333333333\n"
    assert first["figures/smoke/fig-test.png"].startswith(b"\x89PNG")
    assert b"<svg" in first["figures/smoke/fig-test.svg"]
    np.random.seed(3)  # noqa: NPY002
    save_figure(a_figure(), "fig-test", TABLE, profile="smoke")
    assert contents(home) == first


@pytest.mark.parametrize(
    ("columns", "methods"),
    [
        ({}, {}),
        ({"method": ["clustr", "ce", "clustr"]}, {"smoke": ["ce", "clustr"]}),
        (
            {"method": ["clustr", "ce", "ce"], "profile": ["cpu", "quick", "quick"]},
            {"cpu": ["clustr"], "quick": ["ce"]},
        ),
        ({"method": ["clustr", None, "ce"]}, {"smoke": ["ce", "clustr"]}),
    ],
)
def test_a_figure_says_whose_runs_it_was_drawn_from(home, columns, methods):
    path = save_figure(a_figure(), "fig-test", TABLE.assign(**columns), profile="smoke")
    assert check_sidecar(path)["made"]["methods"] == methods


def test_where_a_figure_goes(home, monkeypatch):
    assert save_figure(a_figure(), "fig-a", TABLE) == home / "figures/quick/fig-a.csv"
    monkeypatch.setenv("CLUSTR_PROFILE", "cpu")
    assert save_figure(a_figure(), "fig-a", TABLE) == home / "figures/cpu/fig-a.csv"
    monkeypatch.setenv(FIGURES, str(home / "elsewhere"))
    assert save_figure(a_figure(), "fig-a", TABLE) == home / "elsewhere/cpu/fig-a.csv"


@pytest.mark.parametrize("name", ["../elsewhere", "/elsewhere", "a b", "."])
def test_a_figure_goes_nowhere_else(home, monkeypatch, name):
    monkeypatch.setenv("CLUSTR_PROFILE", name)
    with pytest.raises(ValueError, match="profile: expected a name of letters, digits, - and _, got "):
        save_figure(a_figure(), "fig-a", TABLE)
    assert contents(home) == {}


def test_what_is_no_figure_is_refused_and_leaves_nothing(home):
    with pytest.raises(ValueError, match="label: expected a name that begins with \"fig-\", got 'test'"):
        save_figure(a_figure(), "test", TABLE)
    with pytest.raises(ValueError, match="table: expected the rows that fig-test was drawn from, got none"):
        save_figure(a_figure(), "fig-test", TABLE[:0])
    assert contents(home) == {}


def test_no_room_leaves_no_part_of_a_figure(home):
    figure = a_figure()
    with files_of_at_most(6000), pytest.raises(OSError, match="File too large"):
        save_figure(figure, "fig-test", TABLE)
    assert contents(home) == {}


def test_every_method_has_a_look_and_a_name():
    assert set(LOOKS) == set(METHOD_NAMES) == {*METHODS, "ce-clusters", "prototypes"}


@pytest.mark.parametrize(
    "looks", [LOOKS, BOUND_LOOKS, PROTOCOL_LOOKS, LOSS_LOOKS], ids=["methods", "bounds", "protocols", "losses"]
)
def test_series_are_told_apart_without_colour(looks):
    for a, b in combinations(looks.values(), 2):
        # there are only four line styles
        assert a.linestyle != b.linestyle or len(looks) > 4
        assert a.marker != b.marker
        assert matplotlib.colors.to_hex(a.color) != matplotlib.colors.to_hex(b.color)


def accuracies(methods=("ce", "clustr")):
    rows = [
        {"method": m, "loss": loss, "eps": e, "acc": 1 - e, "low": 0.9 - e, "high": 1.1 - e}
        for m in methods
        for loss in ("ce", "margin")
        for e in (0.0, 0.1, 0.2)
    ]
    return pd.DataFrame(rows)


def test_accuracy_curves_are_the_rows_with_their_bands(axes):
    draw_accuracy(axes, accuracies(("clustr", "ce")).query("loss == 'margin'"), "eps", "acc")
    lines = {line.get_label(): line for line in axes.lines}
    assert list(lines) == [METHOD_NAMES["ce"], METHOD_NAMES["clustr"]]
    for method in ("ce", "clustr"):
        line = lines[METHOD_NAMES[method]]
        assert line.get_xdata().tolist() == [0.0, 0.1, 0.2]
        assert line.get_ydata().tolist() == pytest.approx([1, 0.9, 0.8])
        assert line.get_linestyle() == LOOKS[method].linestyle
        assert line.get_marker() == LOOKS[method].marker
    assert len(axes.collections) == 2
    band = axes.collections[0].get_paths()[0].vertices
    assert band[:, 1].min() == pytest.approx(0.7)
    assert band[:, 1].max() == pytest.approx(1.1)


def test_progress_and_history_are_the_rows(axes):
    table = pd.DataFrame(
        {"method": ["ce"] * 2 + ["clustr"] * 2, "epoch": [1, 2, 1, 2], "magnet": [np.nan] * 2 + [3, 2]}
    )
    draw_history(axes, table, "magnet")
    assert [line.get_label() for line in axes.lines] == [METHOD_NAMES["clustr"]]
    assert axes.lines[0].get_ydata().tolist() == [3, 2]
    assert axes.get_xlabel() == "epoch"
    draw_progress(axes, table.assign(loss=[4, 3, 2, 1]), "epoch", "loss")
    assert [line.get_ydata().tolist() for line in axes.lines[1:]] == [[4, 3], [2, 1]]


def test_shares_rise_to_one(axes):
    table = pd.DataFrame({"epoch": [0] * 4 + [9] * 2, "margin": [3.0, 1.0, 2.0, 2.0, 5.0, -1.0]})
    draw_shares(axes, table, "margin", "epoch")
    first, last = axes.lines
    assert first.get_xdata().tolist() == [1, 2, 2, 3]
    assert first.get_ydata().tolist() == [0.25, 0.5, 0.75, 1]
    assert last.get_xdata().tolist() == [-1, 5]
    assert [line.get_label() for line in axes.lines] == ["epoch 0", "epoch 9"]
    assert first.get_linewidth() < last.get_linewidth()
    assert float(first.get_color()) > float(last.get_color())


def test_a_distribution_is_a_staircase(axes):
    table = pd.DataFrame({"bound": ["nearest"] * 2 + ["exact"], "radius": [2.0, 1.0, 4.0]})
    draw_distribution(axes, table, "radius", group="bound", looks={"nearest": BOUND_LOOKS["nearest"]})
    (curve,) = axes.lines
    assert curve.get_xdata().tolist() == [1, 2]
    assert curve.get_ydata().tolist() == [0.5, 1]


def test_discs_have_the_radii_of_their_rows(axes):
    points = pd.DataFrame({"x": [0.0, 2.0], "y": [1.0, 3.0], "radius": [0.5, 0.25]})
    draw_discs(axes, points)
    circles = [patch for patch in axes.patches if isinstance(patch, Circle)]
    assert [(c.center, c.radius) for c in circles] == [((0.0, 1.0), 0.5), ((2.0, 3.0), 0.25)]


def test_ladders_have_one_line_a_bound(axes):
    table = pd.DataFrame({"t": [0.0, 1.0]} | {bound: [0.0, i] for i, bound in enumerate(BOUND_LOOKS)})
    draw_ladder(axes, table, "t")
    assert {line.get_label(): line.get_ydata()[1] for line in axes.lines} == {b: i for i, b in enumerate(BOUND_LOOKS)}


def test_a_map_names_each_class_above_its_images(axes):
    table = pd.DataFrame({"label": [1, 1, 1, 0], "x": [0.0, 1.0, 5.0, 9.0], "y": [0.0, 2.0, 3.0, 9.0]})
    draw_map(axes, table, ["cat", "dog"])
    names = {text.get_text(): text.xy for text in axes.texts}
    assert {name: x for name, (x, _) in names.items()} == {"dog": 1.0, "cat": 9.0}
    assert 2 < names["dog"][1] <= 3
    assert sum(len(points.get_offsets()) for points in axes.collections) == 4


def test_a_path_begins_and_ends_at_its_rows(axes):
    table = pd.DataFrame({"method": ["ce"] * 2, "along": [0.1, 0.7], "across": [0.3, 0.2]})
    draw_paths(axes, table)
    assert axes.lines[0].get_xydata().tolist() == [[0.1, 0.3], [0.7, 0.2]]


def test_images_in_bytes_and_in_floats_look_the_same(axes):
    grey, colour = np.arange(16, dtype=np.uint8).reshape(1, 4, 4), np.zeros((3, 4, 5), dtype=np.uint8)
    for image, shape in ((grey, (4, 4)), (grey / 255, (4, 4)), (colour, (4, 5, 3))):
        draw_image(axes, image, "title")
        assert axes.images[-1].get_array().shape == shape
    assert axes.images[0].get_clim() == (0, 255)
    assert axes.images[1].get_clim() == (0, 1)
    assert axes.get_title() == "title"


def test_ranges_are_boxes_named_by_method(axes):
    table = pd.DataFrame({"method": ["clustr"] * 5 + ["ce"] * 5, "radius": [1, 2, 3, 4, 5, 2, 4, 6, 8, 10]})
    draw_ranges(axes, table, "radius")
    assert [text.get_text() for text in axes.get_yticklabels()] == [METHOD_NAMES["ce"], METHOD_NAMES["clustr"]]
    assert axes.yaxis_inverted()


def test_regions_of_a_planar_classifier(axes):
    x, y = (a.ravel() for a in np.meshgrid(np.linspace(-1, 1, 21), np.linspace(-1, 1, 21)))
    grid = pd.DataFrame({"x": x, "y": y, "nearest_0": -((x + 0.5) ** 2), "nearest_1": -((x - 0.5) ** 2)})
    centroids = np.array([[-0.5, 0.0], [0.5, 0.0]])
    draw_regions(axes, grid, [0, 1], centroids)
    assert axes.get_xlim() == (-1, 1)
    assert axes.get_legend_handles_labels()[1] == ["class 0", "class 1"]
    corners = np.array([[-1, -1], [1, -1], [1, 1], [-1, 1]]) * 2.0
    draw_voronoi(axes, np.vstack([centroids, corners]))
    assert axes.get_xlim() == (-1, 1)
