"""Numbers of one recipe at several seeds: counts of images, and what they are together."""

import pandas as pd
import pytest

from clustr_core.measuring.accuracy import binomial_interval
from clustr_core.measuring.seeds import budgets_table, counted, pooled, seeds_table


def attacked(robust: dict[str, list[bool]], *, eps=0.1, method="ce") -> pd.DataFrame:
    """Rows of some attacks on four images, of which the last is misclassified."""
    return pd.DataFrame(
        [
            {
                "method": method, "norm": "linf", "eps": eps, "attack": attack, "loss": "ce", "index": index,
                "correct": index < 3, "robust": holds,
            }
            for attack, each in robust.items()
            for index, holds in enumerate(each)
        ]
    )  # fmt: skip


def certified(radii: list[float], bound: str, method="clustr-cert") -> pd.DataFrame:
    rows = [{"index": index, "correct": index < 3, "radius": radius} for index, radius in enumerate(radii)]
    return pd.DataFrame(rows).assign(method=method, bound=bound)


def test_images_are_counted_under_both_protocols_and_certified():
    here = attacked({"paper": [True, True, True, False], "pgd": [True, True, False, False], "walk": [True, False] * 2})
    # at another eps, which is not asked for
    rows = pd.concat([here, attacked({"paper": [False] * 4, "pgd": [False] * 4}, eps=0.2)])
    # the exact certificate counts, and the fourth image is misclassified
    bounds = pd.concat([certified([0.1] * 4, "nearest"), certified([0.5, 1.0, 0.2, 2.0], "exact")])
    found = counted(rows, bounds, eps=0.1, radii=[0.5, 1.58]).set_index(["model", "number"])
    assert (found["images"] == 4).all()
    assert found["holds"].to_dict() == {
        ("ce", "clean"): 3,
        ("ce", "paper's protocol"): 3,
        ("ce", "correct attacks"): 1,
        ("clustr-cert", "certified at 0.5"): 2,
        ("clustr-cert", "certified at 1.58"): 0,
    }


def test_without_a_promise_nothing_is_certified():
    rows = attacked({"paper": [True] * 4, "pgd": [True] * 4})
    assert len(counted(rows, certified([], "exact"), eps=0.1, radii=[0.5])) == 3
    with pytest.raises(ValueError, match="expected the attack 'paper' and another one at one eps"):
        counted(rows, certified([], "exact"), eps=0.3, radii=[0.5])


def test_seeds_are_pooled_and_their_spread_stands_beside():
    about = {"profile": "p", "model": "ce", "number": "clean", "images": 10}
    table = pd.DataFrame([{**about, "seed": seed, "holds": holds} for seed, holds in ((1, 4), (2, 9), (3, 5))])
    row = pooled(table).iloc[0]
    assert row[["profile", "model", "number", "seeds"]].tolist() == ["p", "ce", "clean", 3]
    assert row[["mean", "least", "most"]].tolist() == pytest.approx([60, 40, 90])
    assert row[["low", "high"]].tolist() == pytest.approx([100 * each for each in binomial_interval(18, 30)])


def test_the_table_of_a_page_has_a_row_a_method():
    rows = [("clustr-cert", "certified at 1.58", 5), ("ce", "clean", 4), ("clustr-cert", "clean", 7)]
    about = {"profile": "p", "seed": 1, "images": 10}
    table = pd.DataFrame([{**about, "model": m, "number": n, "holds": h} for m, n, h in rows])
    found = seeds_table(table, ["clean", "certified at 1.58"])
    assert list(found) == ["method", "seeds", "clean", "certified at 1.58"]
    assert found["method"].tolist() == ["cross-entropy", "ClusTR-cert"]
    assert found["seeds"].tolist() == [1, 1]
    assert found["clean"].tolist() == [
        "40.0\u00a0[12.2,\u00a073.8], 40.0 to 40.0",
        "70.0\u00a0[34.8,\u00a093.3], 70.0 to 70.0",
    ]
    assert found["certified at 1.58"].tolist() == ["–", "50.0\u00a0[18.7,\u00a081.3], 50.0 to 50.0"]


def test_longer_trainings_stand_below_shorter_ones():
    rows = [
        ("pgd-at", 16, "clean", 6),
        ("pgd-at", 8, "clean", 5),
        ("ce", 8, "clean", 7),
        ("ce", 8, "correct attacks", 0),
    ]
    rows += [("pgd-at", 8, "correct attacks", 2), ("pgd-at", 16, "correct attacks", 3), ("ce", 8, "certified", 1)]
    table = pd.DataFrame([{"model": m, "epochs": e, "number": n, "holds": h, "images": 10} for m, e, n, h in rows])
    found = budgets_table(table, ["clean", "correct attacks"])
    assert list(found) == ["method", "epochs", "clean", "correct attacks"]
    assert found["method"].tolist() == ["cross-entropy", "PGD adversarial training", "PGD adversarial training"]
    assert found["epochs"].tolist() == [8, 8, 16]
    assert [said.split("\u00a0")[0] for said in found["correct attacks"]] == ["0.0", "20.0", "30.0"]
    assert found["clean"].iloc[2] == "60.0\u00a0[26.2,\u00a087.8]"
