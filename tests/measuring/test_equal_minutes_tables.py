"""Tables at equal minutes, of rows made by hand."""

import numpy as np
import pandas as pd
import pytest

from clustr_core.measuring import equal_minutes as tables

RADII = ["0", "0.5", "1.25"]


def rows(head, loss, seeds, curve, *, bounds=("margin",), margin=1.0):
    """Curves that are a little lower for each seed; of several bounds each is better than the last."""
    found = []
    for seed in seeds:
        for step, bound in enumerate(bounds):
            shares = dict(zip(RADII, np.array(curve) - 0.01 * seed + 0.001 * step, strict=True))
            radius = float(np.mean(curve)) - 0.01 * seed + 0.001 * step
            key = {"dataset": "d", "head": head, "loss": loss, "margin": margin, "temperature": 0.1, "seed": seed}
            found.append({**key, "bound": bound, **shares, "mean_radius": radius})
    return found


TABLE = pd.DataFrame(
    rows("linear", "margin", range(3), [0.9, 0.6, 0.2])
    + rows("linear", "emma", range(3), [0.8, 0.5, 0.1])
    + rows("clusters-2", "margin", range(3), [0.9, 0.5, 0.3], bounds=("nearest", "exact"))
    + rows("clusters-2", "annealed", range(3), [0.7, 0.4, 0.1], bounds=("nearest", "exact"))
)
SETTINGS = pd.DataFrame(
    rows("linear", "margin", [1000], [0.5, 0.4, 0.3])
    + rows("linear", "emma", [1000], [0.4, 0.3, 0.2])
    + rows("clusters-2", "margin", [1000], [0.5, 0.4, 0.3], bounds=("nearest", "exact"))
    + rows("clusters-2", "annealed", [1000], [0.6, 0.5, 0.4], bounds=("nearest", "exact"))
)


def test_columns_named_by_a_radius():
    assert tables.radii_of(TABLE) == RADII


def test_the_best_bound_of_each_training():
    best = tables.best_bounds(TABLE)
    assert len(best) == 12
    assert set(best.loc[best["head"] == "clusters-2", "bound"]) == {"exact"}


def test_a_loss_is_chosen_on_images_held_out_and_not_by_the_result():
    """On the test images the margin loss is the better one for clusters."""
    assert tables.chosen_losses(SETTINGS) == {"linear": "margin", "clusters-2": "annealed"}


def test_students_interval():
    mean, half = tables.interval([1.0, 2.0, 3.0])
    assert mean == 2.0
    assert half == pytest.approx(4.302653 / 3**0.5, rel=1e-6)
    with pytest.raises(ValueError, match="values: expected at least two seeds, got 1"):
        tables.interval([1.0])


def test_a_row_for_each_head_and_loss():
    found = tables.heads_table(TABLE, SETTINGS, [0.5])
    assert found["head"].tolist() == ["linear", "linear", "2 clusters", "2 clusters"]
    assert found["chosen"].tolist() == ["yes", "", "", "yes"]
    half = 100 * 0.01 * 4.302653 / 3**0.5
    assert found.loc[0, "clean"] == f"{89.0:.1f} ± {half:.1f}"
    assert found.loc[0, "r = 0.5"] == f"{59.0:.1f} ± {half:.1f}"


def test_the_difference_is_taken_seed_by_seed():
    found = tables.against_linear(TABLE, SETTINGS)
    assert found["head"].unique().tolist() == ["clusters-2"]
    assert found["radius"].tolist() == [0, 0.5, 1.25]
    assert found["gain"].tolist() == pytest.approx([-19.9, -19.9, -9.9])
    # all seeds differ by the same
    assert (found["high"] - found["low"]).abs().max() < 1e-9


def test_a_race_is_ranked_by_its_certified_accuracy():
    race = pd.DataFrame(
        {
            "candidate": ["a", "b", "c"], "minutes": [3, 3, 10], "images": ["held out", "held out", "test"],
            "seed": 0, "epochs": 5, "lipschitz": 1.0,
            "clean": [0.7, 0.5, 0.6], "at_36": [0.3, 0.4, 0.5], "at_72": [0.2, 0.3, 0.4], "at_108": 0.1,
        }
    )  # fmt: skip
    found = tables.race_table(race)
    assert found["candidate"].tolist() == ["c", "b", "a"]
    assert found.loc[0, "36/255"] == 50


def test_a_race_stands_beside_what_others_trained_for_a_day():
    row = {"candidate": "a", "minutes": 30.0, "clean": 0.7, "at_36": 0.5, "at_72": 0.4, "at_108": 0.3}
    race = pd.DataFrame([{**row, "images": "held out"}, {**row, "images": "test"}])
    found = tables.beside_published(race)
    assert found.iloc[0].to_dict() == {
        "kind": "this page, on two CPU cores", "system": "a", "minutes": 30.0, "clean": 0.7, "at_36": 0.5,
        "at_72": 0.4, "at_108": 0.3,
    }  # fmt: skip
    theirs = found.iloc[1:].set_index("system")
    assert theirs["kind"].unique().tolist() == [f"size {size}, on a GPU" for size in ("XS", "S", "M")]
    assert theirs.loc["LOT-XS", ["minutes", "at_36", "at_72", "at_108"]].tolist() == pytest.approx(
        [1577, 0.634, 0.492, 0.361]
    )
    assert theirs[["clean", "at_36"]].notna().all(axis=None)
