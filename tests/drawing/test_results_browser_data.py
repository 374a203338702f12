"""The counts that the results browser is given are those of the published rows."""

import json

import pandas as pd
import pytest
from browser_data import without_intervals

from clustr_core.drawing import results_browser
from clustr_core.drawing.looks import LOOKS
from clustr_core.measuring import accuracy, chain, study


@pytest.fixture(scope="module")
def studies() -> dict[str, study.Study]:
    return {name: study.read_study(name, published=True) for name in ("quick", "cpu-cifar10")}


@pytest.fixture(scope="module")
def given(studies: dict[str, study.Study]) -> dict:
    return without_intervals(studies.values())


def curve(
    given: dict, profile: str, what: str, method: str, norm: str = "linf", **more: object
) -> dict[float, tuple[int, int]]:
    """Radius -> how many images hold, and of how many."""
    entry = next(entry for entry in given["studies"] if entry["profile"] == profile)
    asked = {"what": what, "norm": norm, "method": method, "autoattack": False} | more
    (found,) = (
        each
        for each in entry["curves"]
        if all(({"autoattack": False} | each)[name] == value for name, value in asked.items())
    )
    at = found.get("at", entry["grid"])
    n = found["n"] if isinstance(found["n"], list) else [found["n"]] * len(found["kept"])
    return dict(zip(at, zip(found["kept"], n, strict=True), strict=False))


def test_correct_attacks_are_the_worst_case_of_each_image(given: dict, studies: dict[str, study.Study]) -> None:
    rows = studies["cpu-cifar10"].attacks
    mine = rows.query("method == 'clustr' and norm == 'linf' and attack != 'paper' and attack != 'autoattack'")
    found = curve(given, "cpu-cifar10", "correct", "clustr")
    assert sorted(found) == [0, *sorted(mine["eps"].unique())]
    for eps, here in mine.groupby("eps"):
        # every attack of this profile sees the same images
        worst = here.groupby("index")["robust"].all()
        assert found[eps] == (worst.sum(), len(worst))
    clean = mine.drop_duplicates("index")["correct"]
    assert found[0] == (clean.sum(), len(clean))


def test_both_protocols_are_on_the_same_images(given: dict, studies: dict[str, study.Study]) -> None:
    chapter = study.protocol_curves(studies["quick"]).query("method == 'clustr-qtrades'")
    for protocol, rows in chapter.groupby("protocol"):
        found = curve(given, "quick", "both", "clustr-qtrades", part=protocol)
        assert {eps: kept / n for eps, (kept, n) in found.items()} == dict(
            zip(rows["eps"], rows["robust_accuracy"], strict=True)
        )
        assert [n for _, n in found.values()] == list(rows["examples"])


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_with_autoattack_they_are_those_of_the_four_columns(
    given: dict, studies: dict[str, study.Study], norm: str
) -> None:
    columns = study.summary(studies["quick"], norm).query("column == 'correct'").set_index("method")
    eps = studies["quick"].eps(norm)
    more = {"what": "both", "part": "correct"} if norm == "linf" else {"what": "correct"}
    for method in ("pgd-at", "free-clustr", "lip-linear"):
        kept, n = curve(given, "quick", method=method, norm=norm, autoattack=True, **more)[eps]
        assert (kept / n, n) == (columns.loc[method, "accuracy"], columns.loc[method, "examples"])


def test_certificates_are_of_the_best_bound_at_the_radii_of_the_book(
    given: dict, studies: dict[str, study.Study]
) -> None:
    for name, each in studies.items():
        best = accuracy.best_bound(each.certificates).query("method == 'clustr-cert'")
        found = curve(given, name, "certified", "clustr-cert", norm="l2", part="exact")
        for radius in (0.0, *each.radii):
            (at,) = (at for at in found if abs(at - radius) < 1e-9)
            assert found[at] == ((best["correct"] & (best["radius"] >= at)).sum(), len(best))


def test_the_sandwich_has_the_columns_of_the_chain(given: dict, studies: dict[str, study.Study]) -> None:
    rows = studies["cpu-cifar10"].sandwich.query("method == 'lip-linear'")
    grid = next(entry["grid"] for entry in given["studies"] if entry["profile"] == "cpu-cifar10")
    own = studies["cpu-cifar10"].profile.sandwich.apgd_eps
    shares = chain.sandwich_curve(rows, sorted({*grid, *own})).set_index(["column", "at"])["accuracy"]
    for part in ("certified", "worst case", "fmn", "ddn", "apgd", "clean"):
        found = curve(given, "cpu-cifar10", "sandwich", "lip-linear", norm="l2", part=part)
        assert {at: kept / n for at, (kept, n) in found.items()} == {at: shares[part, at] for at in found}
        assert len(found) == len(own if part == "apgd" else grid)


def test_it_is_small_plain_and_drawn_as_in_the_book(given: dict) -> None:
    assert len(json.dumps(given, allow_nan=False, separators=(",", ":"))) < 150_000
    assert list(given["methods"]) == [name for name in study.METHOD_NAMES if name in given["methods"]]
    assert {name: look["marker"] for name, look in given["methods"].items()} == {
        name: LOOKS[name].marker for name in given["methods"]
    }
    used = {each["part"] for entry in given["studies"] for each in entry["curves"]}
    assert used == set(given["parts"])


@pytest.mark.usefixtures("as_installed")
@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"studies": []}, "studies: expected at least one"),
        ({"studies": [None], "shown": "all"}, "shown: expected one of"),
    ],
)
def test_what_cannot_be_shown_is_refused(options: dict, complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        results_browser.data(**options)


def test_a_curve_without_all_images_at_a_radius_keeps_each_number(given: dict, studies: dict[str, study.Study]) -> None:
    """Square runs on fewer digits, and at one eps alone."""
    rows = studies["quick"].attacks.query(
        "method == 'ce' and norm == 'linf' and attack != 'paper' and attack != 'autoattack'"
    )
    seen = pd.DataFrame(rows).groupby(["eps", "attack"])["index"].nunique().groupby("eps").min()
    found = curve(given, "quick", "correct", "ce")
    assert {eps: n for eps, (_, n) in found.items() if eps} == dict(seen)
    assert len(set(seen)) > 1
