"""What is published hangs together: figures are drawn from the committed rows, and the rows are of the profiles."""

from pathlib import Path

import pandas as pd
import pytest
from pandas.testing import assert_frame_equal

from clustr_core.accuracy import both_protocols, four_columns, robust_accuracy, robust_accuracy_by_loss
from clustr_core.diagnostics import CHECKS, verdict
from clustr_core.paper import PAPER_RESTARTS, PAPER_STEPS
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
    keys = ("method", "attack", "profile", "norm", "protocol", "column", "loss", "eps")
    return table[columns].sort_values([name for name in keys if name in columns]).reset_index(drop=True)


def test_quick_is_published() -> None:
    assert "quick" in PUBLISHED


@pytest.mark.parametrize("profile", PUBLISHED)
def test_rows_cover_the_whole_profile(profile: str) -> None:
    """Every method, attack, norm, eps and loss of the profile, on the same images for all methods."""
    wanted = load_profile(ROOT / "profiles" / f"{profile}.yaml")
    attacks = rows(profile, "attacks")
    names = [*wanted.recipes, "ce-clusters"]
    found = attacks.groupby(["method", "attack", "norm", "eps", "loss"])["index"].agg(lambda s: tuple(sorted(s)))
    expected = {
        (method, protocol.attack, protocol.norm, round(eps, 6), loss)
        for method in names
        for protocol in wanted.attacks.values()
        for eps in protocol.eps
        for loss in protocol.climbed
        if protocol.attack != "transfer" or method not in ("ce", "ce-clusters")
    }
    assert {(m, a, n, round(e, 6), o) for m, a, n, e, o in found.index} == expected
    assert found.groupby(["attack", "norm", "eps"]).nunique().eq(1).all()
    budget = attacks.groupby(["attack", "norm"])[["steps", "restarts"]].agg(["min", "max"])
    for protocol in wanted.attacks.values():
        steps, restarts = (0, 0) if protocol.attack == "autoattack" else (protocol.steps, protocol.restarts)
        assert budget.loc[(protocol.attack, protocol.norm)].tolist() == [steps, steps, restarts, restarts]


@pytest.mark.parametrize("profile", PUBLISHED)
def test_the_papers_protocol_is_the_papers(profile: str) -> None:
    """Whatever is called the paper's protocol has its steps and restarts."""
    papers = rows(profile, "attacks").query("attack == 'paper'")
    assert set(papers["steps"]) <= set(PAPER_STEPS)
    assert set(papers["restarts"]) == {PAPER_RESTARTS}


@pytest.mark.parametrize("profile", PUBLISHED)
def test_rows_are_possible(profile: str) -> None:
    """Nothing robust that is wrong when clean; robust means unchanged; certified never exceeds what attacks found."""
    attacks, certificates = rows(profile, "attacks").query("attack != 'paper'"), rows(profile, "certificates")
    assert not (attacks["robust"] & ~attacks["correct"]).any()
    # an image on a border may be judged the other way in a batch of another size: one rounding, one row in ten thousand
    assert ((attacks["adversarial_prediction"] == attacks["label"]) == attacks["robust"]).mean() > 0.9999
    best = certificates[certificates["bound"] == "pairwise"]
    clusters = best[best["method"].isin(["clustr", "clustr-qtrades", "free-clustr"])]
    broken = attacks[(attacks["norm"] == "l2") & attacks["correct"] & ~attacks["robust"]]
    smallest = broken.groupby(["method", "index"])["eps"].min().rename("broken_at").reset_index()
    both = clusters.merge(smallest, on=["method", "index"])
    assert len(both)
    assert (both["radius"] <= both["broken_at"]).all()
    assert (certificates["lipschitz_lower_bound"] <= certificates["lipschitz"]).all()


@pytest.mark.parametrize("profile", PUBLISHED)
def test_findings_cover_every_method_and_follow_their_thresholds(profile: str) -> None:
    findings = rows(profile, "diagnostics")
    methods = {*load_profile(ROOT / "profiles" / f"{profile}.yaml").recipes, "ce-clusters"}
    assert set(findings["method"]) == methods == set(rows(profile, "ablations")["method"])
    assert (findings["flagged"] == (findings["value"] > findings["threshold"])).all()
    assert (
        findings.groupby("check")["threshold"]
        .agg(["min", "max"])
        .eq(pd.Series({name: check.threshold for name, check in CHECKS.items()}), axis=0)
        .all(axis=None)
    )


@pytest.mark.parametrize("profile", PUBLISHED)
def test_the_battery_flags_scores_and_passes_adversarial_training(profile: str) -> None:
    verdicts = rows(profile, "diagnostics").groupby("method").apply(verdict, include_groups=False)
    assert verdicts[["ce-clusters", "clustr", "clustr-qtrades"]].all()
    assert not verdicts[["pgd-at", "trades", "fast-at", "free-at"]].any()


def test_the_papers_protocol_spends_gradients_on_little_but_what_stays_unbroken() -> None:
    """At 30 % robust accuracy at most 0.35 of what recomputing every example in every restart would spend."""
    papers = rows("cpu-cifar10", "attacks").query("attack == 'paper' and method in ['pgd-at', 'trades', 'fast-at']")
    at = papers[(papers["eps"] - 8 / 255).abs() < 1e-6]
    spent = at["gradients"].mean() / (20 * 10)
    assert 0.2 < at["robust"].mean() < 0.4
    assert spent <= at["robust"].mean() + 0.05


def curves(profile: str) -> pd.DataFrame:
    return both_protocols(rows(profile, "attacks").query("attack != 'autoattack'"))


def columns_of(profile: str) -> pd.DataFrame:
    """The four columns at the eps of AutoAttack."""
    at = load_profile(ROOT / "profiles" / f"{profile}.yaml").attacks["autoattack"].eps[0]
    return four_columns(rows(profile, "attacks"), rows(profile, "certificates"), eps=at).assign(profile=profile)


def pgd_rows(profile: str) -> pd.DataFrame:
    return rows(profile, "attacks").query("attack == 'pgd' and method != 'ce-clusters'")


@pytest.mark.parametrize("profile", [name for name in PUBLISHED if (ROOT / "figures" / name).is_dir()])
@pytest.mark.parametrize(
    ("label", "derive"),
    [
        ("fig-robust-accuracy", lambda name: robust_accuracy(pgd_rows(name))),
        ("fig-loss-agreement", lambda name: robust_accuracy_by_loss(pgd_rows(name).query("norm == 'linf'"))),
        ("fig-both-protocols", lambda name: curves(name)),
        ("fig-both-protocols-photographs", lambda name: curves("cpu-cifar10").assign(profile="cpu-cifar10")),
        ("fig-protocol-gap", lambda name: pd.concat(columns_of(study) for study in {name, "cpu", "cpu-cifar10"})),
    ],
)
def test_figures_are_drawn_from_the_rows(profile: str, label: str, derive) -> None:
    drawn = read_table(ROOT / "figures" / profile / f"{label}.csv")
    assert_frame_equal(sorted_rows(derive(profile)), sorted_rows(drawn), check_dtype=False, rtol=1e-6)


@pytest.mark.parametrize(("profile", "examples"), [("cpu", 256), ("cpu-cifar10", 256)])
def test_numbers_on_the_first_page_are_those_of_the_rows(profile: str, examples: int) -> None:
    page = (ROOT / "index.md").read_text()
    found = columns_of(profile).set_index(["method", "column"])
    assert set(found["examples"]) == {examples}
    for method in found.index.unique("method"):
        three = [found.loc[(method, name)] for name in ("clean", "paper", "correct")]
        cells = [f"{100 * r.accuracy:.1f} [{100 * r.low:.1f}, {100 * r.high:.1f}]" for r in three]
        assert f"| {METHOD_NAMES[method]} | {' | '.join(cells)} |" in page
