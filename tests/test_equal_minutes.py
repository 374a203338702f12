"""Comparisons at equal CPU minutes: budgets, images held out, the race of encoders, heads and losses."""

from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import integrate

from benchmarks import budget, growing, heads, race
from clustr_core import data
from clustr_core.certificates.names import HARD_BOUNDS
from clustr_core.storage.tables import read_table, write_table
from clustr_core.training.recipes import LipschitzMargin
from clustr_core.training.run import Run


@pytest.fixture
def few(digits: data.Dataset) -> data.Dataset:
    return replace(
        digits,
        train_images=digits.train_images[:300],
        train_labels=digits.train_labels[:300],
        test_images=digits.test_images[:60],
        test_labels=digits.test_labels[:60],
    )


SMALL = LipschitzMargin(encoder="lip-mlp-thin", width=16, epochs=1, schedule="triangle", learning_rate=0.01)


def test_images_are_held_out_once_and_no_test_image_is_seen(digits):
    found = budget.held_out(digits)
    count = len(digits.train_labels)
    assert len(found.test_labels) == round(budget.HELD_OUT * count) == count - len(found.train_labels)
    both = torch.cat([found.train_images, found.test_images]).flatten(1)
    before = digits.train_images.flatten(1)
    assert sorted(map(tuple, both.tolist())) == sorted(map(tuple, before.tolist()))
    shares = torch.bincount(found.test_labels) / torch.bincount(digits.train_labels)
    assert (shares - budget.HELD_OUT).abs().max() < 0.01
    assert torch.equal(budget.held_out(digits).test_images, found.test_images)


def test_twice_the_time_is_about_twice_the_epochs(few, monkeypatch):
    """Of a clock that a training moves on by a fixed time and by one for each image of each epoch."""
    clock = [0.0]

    def fit(recipe, *, dataset, **_):
        clock[0] += 5.0 + recipe.epochs * 0.01 * len(dataset.train_labels)

    monkeypatch.setattr(budget, "fit", fit)
    monkeypatch.setattr(budget.time, "process_time", lambda: clock[0])
    assert [budget.epochs_within(SMALL, few, seconds) for seconds in (0.1, 30, 60)] == [1, 10, 20]


def test_certified_accuracy_falls_from_clean_to_nothing(few, tmp_path):
    run, cost = budget.trained(SMALL, few, tmp_path, seconds=0.5)
    assert isinstance(run, Run)
    assert cost["epochs"] == run.recipe.epochs >= 1
    assert cost["cpu_seconds"] > 0
    radii = [0.0, 0.05, 0.2, 0.8, 50.0]
    (row,) = budget.certified(run, few, radii).to_dict("records")
    curve = [row[f"{radius:.6g}"] for radius in radii]
    assert curve == sorted(curve, reverse=True)
    assert curve[-1] == 0 < curve[0]
    assert row["bound"] == "margin"
    assert row["lipschitz_lower_bound"] <= row["lipschitz"] < 1 + 1e-5
    # the mean radius is the area under the curve
    fine = np.linspace(0, 4, 401)
    (wide,) = budget.certified(run, few, fine).to_dict("records")
    area = integrate.trapezoid([wide[f"{radius:.6g}"] for radius in fine], fine)
    assert row["mean_radius"] == pytest.approx(area, abs=0.01)


def test_the_best_half_goes_on_and_what_is_known_is_not_computed_again(tmp_path, monkeypatch):
    asked = []

    def raced(name, dataset, minutes, seed, last):
        asked.append((name, minutes, seed, last))
        share = {"a": 0.1, "b": 0.4, "c": 0.3}[name]
        images = "test" if last else "held out"
        return {
            "dataset": dataset,
            "candidate": name,
            "asked": race.asked_of_recipe(race.recipe_of(name, dataset, seed)),
            "minutes": minutes,
            "seed": seed,
            "images": images,
            **dict.fromkeys(race.COLUMNS, share),
        }

    some = race.CANDIDATES["SLL 64"]
    monkeypatch.setattr(race, "CANDIDATES", {name: replace(some, margin=n) for n, name in enumerate("abc", start=1)})
    monkeypatch.setattr(race, "raced", raced)
    monkeypatch.setattr(race, "ProcessPoolExecutor", InPlace)
    path = tmp_path / "race.csv"
    for _ in range(2):
        race.race("digits", [1.0, 2.0, 4.0], [2, 1], seeds=2, jobs=1, path=path)
    first = [(name, 1.0, 0, False) for name in "abc"]
    then = [("b", 2.0, 0, False), ("c", 2.0, 0, False)]
    assert asked == [*first, *then, ("b", 4.0, 0, True), ("b", 4.0, 1, True)]
    assert len(read_table(path)) == len(asked)
    # of other images nothing is there yet
    race.race("mnist5k", [1.0], [], seeds=1, jobs=1, path=path)
    assert asked[-3:] == [(name, 1.0, 0, True) for name in "abc"]
    # and of another recipe of that name
    monkeypatch.setitem(race.CANDIDATES, "b", replace(some, margin=7))
    race.race("mnist5k", [1.0], [], seeds=1, jobs=1, path=path)
    assert asked[-2:] == [("c", 1.0, 0, True), ("b", 1.0, 0, True)]


class InPlace:
    """A pool of no process."""

    def __init__(self, *_, **__):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *_):
        return None

    def submit(self, function, *arguments):
        done = Future()
        done.set_result(function(*arguments))
        return done


@pytest.mark.parametrize("name", ["SLL 64", "CPL 64, bfloat16"])
def test_a_candidate_is_trained_and_certified(few, name, monkeypatch):
    monkeypatch.setattr(race.data, "load_dataset", lambda _: few)
    monkeypatch.setitem(race.CANDIDATES, name, replace(race.CANDIDATES[name], width=16, batch_size=64))
    row = race.raced(name, "digits", 0.005, 3, last=False)
    assert row["images"] == "held out"
    assert row["clean"] >= row["at_36"] >= row["at_72"] >= row["at_108"]
    assert row["lipschitz_lower_bound"] <= row["lipschitz"] < 1.5
    assert race.score(pd.Series(row)) == pytest.approx((row["at_36"] + row["at_72"] + row["at_108"]) / 3)


@pytest.mark.parametrize(("head", "bounds"), [("linear", ["margin"]), ("clusters-2", [*HARD_BOUNDS])])
def test_heads_give_a_curve_for_each_bound(few, head, bounds, monkeypatch):
    monkeypatch.setattr(heads.data, "load_dataset", lambda _: few)
    monkeypatch.setitem(heads.HEADS, head, replace(heads.HEADS[head], width=16))
    found = heads.curves(("digits", head, "annealed", 0.5, 0.1, 2), seconds=0.3)
    assert found["bound"].tolist() == bounds
    assert (found["mean_radius"].diff().dropna() >= -1e-9).all()
    curve = found[[f"{radius:.6g}" for radius in np.linspace(0, heads.LARGEST["digits"], 41).round(6)]]
    assert (curve.diff(axis=1).iloc[:, 1:] <= 0).all(axis=None)


def test_a_setting_is_chosen_by_the_mean_radius_of_its_best_bound(tmp_path, monkeypatch):
    rows = pd.DataFrame(
        [
            ("linear", "margin", 1.0, 0.1, "margin", 0.5),
            ("linear", "margin", 2.0, 0.1, "margin", 0.7),
            ("clusters-2", "emma", 1.0, 0.1, "nearest", 0.6),
            ("clusters-2", "emma", 1.0, 0.1, "exact", 0.9),
            ("clusters-2", "emma", 2.0, 0.1, "nearest", 0.8),
            ("clusters-2", "emma", 2.0, 0.1, "exact", 0.8),
        ],
        columns=["head", "loss", "margin", "temperature", "bound", "mean_radius"],
    )
    assert heads.best_settings(rows) == {("linear", "margin"): (2.0, 0.1), ("clusters-2", "emma"): (1.0, 0.1)}


def test_heads_go_on_where_they_stopped(tmp_path, monkeypatch):
    keys = [("digits", head, "margin", 0.5, 0.1, seed) for head in ("linear", "clusters-2") for seed in range(2)]
    asked = []

    def curves(key, seconds, epochs):
        asked.append(key)
        return pd.DataFrame(
            [
                {
                    **dict(zip(heads.KEY, heads.asked_at(key, seconds, epochs), strict=True)),
                    "bound": "margin",
                    "mean_radius": 0.5,
                }
            ]
        )

    monkeypatch.setattr(heads, "curves", curves)
    monkeypatch.setattr(heads, "ProcessPoolExecutor", InPlace)
    path = tmp_path / "heads.csv"
    assert len(heads.computed(keys[:3], 1.0, 1, path)) == 3
    write_table(path, read_table(path))
    assert len(heads.computed(keys, 1.0, 1, path)) == 4
    assert asked == keys
    # of another budget none, nor of another number of epochs
    assert len(heads.computed(keys[:1], 2.0, 1, path)) == 1
    assert len(heads.computed(keys[:1], 1.0, 1, path, epochs=3)) == 1
    assert asked == [*keys, keys[0], keys[0]]


def test_heads_on_photographs_have_an_encoder_for_them_and_the_epochs_that_are_asked(few, monkeypatch):
    key = (heads.PHOTOGRAPHS, "clusters-2", "margin", 0.8, 0.1, 0)
    recipe = heads.recipe_of(key, 4)
    assert (recipe.encoder, recipe.width, recipe.epochs, recipe.precision) == ("lip-cnn-cpl", 48, 4, "bf16-mixed")
    assert {f"{radius / 255:.6g}" for radius in (36, 72, 108)} <= {
        f"{radius:.6g}" for radius in np.linspace(0, heads.LARGEST[heads.PHOTOGRAPHS], 41).round(6)
    }
    monkeypatch.setattr(heads.data, "load_dataset", lambda _: few)
    monkeypatch.setitem(heads.HEADS, "linear", replace(heads.HEADS["linear"], width=16))
    found = heads.curves(("digits", "linear", "margin", 0.5, 0.1, 2), 0.0, 3)
    assert found[["epochs", "seconds"]].values.tolist() == [[3, 0]]


def test_two_that_add_to_a_table_lose_nothing(tmp_path):
    path, one = tmp_path / "bench/t.csv", pd.DataFrame([{"asked": "a", "seed": 1, "value": 0.5}])
    growing.add_rows(path, one, ["asked", "seed"])
    # by another process, since this one has read the table
    growing.add_rows(path, one.assign(seed=0), ["asked", "seed"])
    found = growing.add_rows(path, one.assign(value=0.7), ["asked", "seed"])
    assert found.to_dict("list") == {"asked": ["a", "a"], "seed": [0, 1], "value": [0.5, 0.7]}
    pd.testing.assert_frame_equal(read_table(path), found)


def test_what_was_asked_stays_the_text_that_it_is(tmp_path):
    path, key = tmp_path / "t.csv", ["profile", "asked", "seed"]
    for n, asked in enumerate(("597e853869", "0981764736", "6934110079", "null", "nan", "true")):
        growing.add_rows(path, pd.DataFrame([{"profile": "null", "asked": asked, "seed": 1, "value": 0.5}]), key)
        assert ("null", asked, 1) in growing.done_at(path, key)
        assert len(growing.rows_at(path, key)) == n + 1


def test_an_error_of_one_job_comes_after_the_others_results():
    with ThreadPoolExecutor(1) as pool:
        found = growing.results_of([pool.submit(int, text) for text in ("1", "none", "3")])
        assert {next(found), next(found)} == {1, 3}
        with pytest.raises(ValueError, match="none"):
            next(found)


def test_a_table_that_does_not_say_what_was_asked_is_not_added_to(tmp_path):
    path = tmp_path / "t.csv"
    write_table(path, pd.DataFrame([{"seed": 1, "value": 0.5}]))
    with pytest.raises(ValueError, match=r"t\.csv: expected the columns \[asked, seed\], got none called asked"):
        growing.rows_at(path, ["asked", "seed"])
    assert growing.done_at(tmp_path / "none.csv", ["asked"]) == set()
