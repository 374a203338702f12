"""What is published hangs together: figures are drawn from the committed rows, and the rows are of the profiles."""

from pathlib import Path

import pandas as pd
import pytest
from pandas.testing import assert_frame_equal

from clustr_core.accuracy import robust_accuracy, robust_accuracy_by_loss
from clustr_core.plotting import METHOD_NAMES
from clustr_core.recipes import load_profile
from clustr_core.records import read_table

ROOT = Path(__file__).resolve().parents[1]
PUBLISHED = sorted(path.name for path in (ROOT / "results").iterdir() if path.is_dir())


def rows(profile: str, kind: str) -> pd.DataFrame:
    methods = load_profile(ROOT / "profiles" / f"{profile}.yaml").recipes
    tables = [read_table(ROOT / "results" / profile / f"{kind}-{method}.csv") for method in methods]
    return pd.concat(tables, ignore_index=True)


def sorted_rows(table: pd.DataFrame) -> pd.DataFrame:
    columns = sorted(table.columns)
    keys = [name for name in ("method", "norm", "loss", "eps") if name in columns]
    return table[columns].sort_values(keys).reset_index(drop=True)


def test_quick_is_published() -> None:
    assert "quick" in PUBLISHED


@pytest.mark.parametrize("profile", PUBLISHED)
def test_rows_cover_the_whole_profile(profile: str) -> None:
    """Every method, norm, eps and loss of the profile, on the same images for all methods."""
    wanted = load_profile(ROOT / "profiles" / f"{profile}.yaml")
    attacks = rows(profile, "attacks")
    found = attacks.groupby(["method", "norm", "eps", "loss"])["index"].agg(lambda s: tuple(sorted(s)))
    expected = {
        (method, protocol.norm, eps, loss)
        for method in wanted.recipes
        for protocol in wanted.attacks.values()
        for eps in protocol.eps
        for loss in protocol.losses
    }
    assert {(m, n, round(e, 6), o) for m, n, e, o in found.index} == {(m, n, round(e, 6), o) for m, n, e, o in expected}
    assert found.groupby("norm").nunique().eq(1).all()
    budget = attacks.groupby("norm")[["steps", "restarts"]].agg(["min", "max"])
    for protocol in wanted.attacks.values():
        assert budget.loc[protocol.norm].tolist() == [protocol.steps] * 2 + [protocol.restarts] * 2


@pytest.mark.parametrize("profile", PUBLISHED)
def test_rows_are_possible(profile: str) -> None:
    """Nothing robust that is wrong when clean; robust means unchanged; certified never exceeds what PGD found."""
    attacks, certificates = rows(profile, "attacks"), rows(profile, "certificates")
    assert not (attacks["robust"] & ~attacks["correct"]).any()
    assert ((attacks["adversarial_prediction"] == attacks["label"]) == attacks["robust"]).all()
    best = certificates[certificates["bound"] == "pairwise"]
    clusters = best[best["method"].isin(["clustr", "clustr-qtrades"])]
    broken = attacks[(attacks["norm"] == "l2") & attacks["correct"] & ~attacks["robust"]]
    smallest = broken.groupby(["method", "index"])["eps"].min().rename("broken_at").reset_index()
    both = clusters.merge(smallest, on=["method", "index"])
    assert len(both)
    assert (both["radius"] <= both["broken_at"]).all()
    assert (certificates["lipschitz_lower_bound"] <= certificates["lipschitz"]).all()


@pytest.mark.parametrize("profile", [name for name in PUBLISHED if (ROOT / "figures" / name).is_dir()])
@pytest.mark.parametrize(
    ("label", "derive"),
    [
        ("fig-robust-accuracy", robust_accuracy),
        ("fig-loss-agreement", lambda table: robust_accuracy_by_loss(table[table["norm"] == "linf"])),
    ],
)
def test_figures_are_drawn_from_the_rows(profile: str, label: str, derive) -> None:
    drawn = read_table(ROOT / "figures" / profile / f"{label}.csv")
    assert_frame_equal(sorted_rows(derive(rows(profile, "attacks"))), sorted_rows(drawn), check_dtype=False, rtol=1e-6)


def test_numbers_on_the_first_page_are_those_of_the_rows() -> None:
    page = (ROOT / "index.md").read_text()
    curves = robust_accuracy(rows("cpu-cifar10", "attacks"))
    linf = curves[curves["norm"] == "linf"]
    for method in load_profile(ROOT / "profiles" / "cpu-cifar10.yaml").recipes:
        mine = linf[linf["method"] == method]
        clean, robust = mine[mine["eps"] == 0].iloc[0], mine[(mine["eps"] - 8 / 255).abs() < 1e-6].iloc[0]
        cells = [f"{100 * r.robust_accuracy:.1f} [{100 * r.low:.1f}, {100 * r.high:.1f}]" for r in (clean, robust)]
        assert f"| {METHOD_NAMES[method]} | {cells[0]} | {cells[1]} |" in page
    assert linf["examples"].unique().tolist() == [256]
