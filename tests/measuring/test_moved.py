"""What threads and seeds move."""

import pandas as pd
import pytest

from clustr_core.measuring.moved import gap_table, moved_by, moved_table

VALUES = {
    # seed, trained by, measured by: accuracy, check
    (0, 1, 1): (0.50, 1),
    (0, 1, 2): (0.52, 1),
    (0, 2, 2): (0.47, 0),
    (1, 1, 1): (0.60, 1),
    (1, 1, 2): (0.60, 1),
    (1, 2, 2): (0.61, 1),
}


def table():
    rows = []
    for (seed, trained_by, measured_by), (accuracy, check) in VALUES.items():
        about = {"profile": "p", "model": "m", "seed": seed, "trained_by": trained_by, "measured_by": measured_by}
        rows += [
            {**about, "number": "correct attacks", "value": accuracy},
            {**about, "number": "check a", "value": check},
            {**about, "number": "check b", "value": 0},
        ]
    return pd.DataFrame(rows)


def test_what_moves_a_number_is_told_apart():
    found = moved_by(table()).set_index("number")
    accuracy, checks = found.loc["correct attacks"], found.loc["checks"]
    moves = ["value", "by_measuring", "by_training", "by_seed"]
    assert accuracy[moves].tolist() == pytest.approx([55, 2, 3, 10])
    assert checks[moves].tolist() == [2, 0, 1, 0]
    assert (found["seeds"] == 2).all()
    assert (found["profile"] == "p").all()


def test_a_seed_without_all_measurements_counts_where_it_has_one():
    found = moved_by(table().query("not (seed == 1 and trained_by == 2)")).set_index("number")
    assert found.loc["correct attacks", "by_training"] == pytest.approx(3)
    assert found.loc["correct attacks", "seeds"] == 2


def test_the_table_of_a_page_leaves_counts_out():
    found = moved_table(moved_by(table()))
    assert found["number"].tolist() == ["correct attacks"]
    assert found.iloc[0].tolist()[2:] == pytest.approx([55, 2, 3, 10])


def test_what_was_not_tried_moves_nothing_and_is_not_called_unmoved():
    found = moved_by(table().query("trained_by == 1 and measured_by == 1")).set_index("number")
    assert found[["by_measuring", "by_training"]].isna().all(axis=None)
    assert found.loc["correct attacks", "by_seed"] == pytest.approx(10)


def test_the_gap_between_the_protocols_seed_by_seed():
    correct = table()
    both = pd.concat(
        [correct, correct.query("number == 'correct attacks'").assign(number="paper's protocol", value=0.75)]
    )
    found = gap_table(both)
    assert found.to_dict("records") == [{"method": "m", "seed 0": pytest.approx(25), "seed 1": pytest.approx(15)}]
