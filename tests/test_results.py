"""What is published hangs together: figures are drawn from the committed rows, and the rows are of the profiles."""

from pathlib import Path

import pandas as pd
import pytest
from pandas.testing import assert_frame_equal

from clustr_core.attacks.names import PAPER_RESTARTS, PAPER_STEPS
from clustr_core.certificates.names import HARD_BOUNDS
from clustr_core.measuring import study
from clustr_core.measuring.accuracy import (
    best_bound,
    broken_certificates,
    robust_accuracy,
    robust_accuracy_by_loss,
)
from clustr_core.measuring.chain import check_chain, sandwich_curve
from clustr_core.measuring.checks import CHECKS
from clustr_core.measuring.counterexamples import check_sandwich
from clustr_core.measuring.diagnostics import verdict
from clustr_core.measuring.profile import Profile
from clustr_core.measuring.sandwich import ATTACKS
from clustr_core.storage.tables import read_table

ROOT = Path(__file__).resolve().parents[1]
PUBLISHED = study.published_profiles()


def profile_of(name: str) -> Profile:
    return study.read_study(name, published=True).profile


def rows(profile: str, kind: str) -> pd.DataFrame:
    return getattr(study.read_study(profile, published=True), kind)


def pixels_of(profile: str) -> int:
    return study.read_study(profile, published=True).pixels


def sorted_rows(table: pd.DataFrame) -> pd.DataFrame:
    columns = sorted(table.columns)
    keys = ("method", "attack", "profile", "norm", "protocol", "column", "loss", "eps")
    return table[columns].sort_values([name for name in keys if name in columns]).reset_index(drop=True)


def test_quick_is_published() -> None:
    assert "quick" in PUBLISHED


@pytest.mark.parametrize("profile", PUBLISHED)
def test_rows_cover_the_whole_profile(profile: str) -> None:
    """Every method, attack, norm, eps and loss of the profile, on the same images for all methods."""
    wanted = profile_of(profile)
    attacks = rows(profile, "attacks")
    names = [*wanted.attacked, "ce-clusters"]
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
    bounded = certificates.dropna(subset=["lipschitz"])
    assert (bounded["lipschitz_lower_bound"] <= bounded["lipschitz"]).all()


@pytest.mark.parametrize("profile", PUBLISHED)
def test_certificates_are_on_a_ladder_and_1_lipschitz(profile: str) -> None:
    certificates = rows(profile, "certificates")
    keys = ["method", "index"]
    wide = certificates[certificates["bound"].isin(HARD_BOUNDS)].pivot_table(
        index=keys, columns="bound", values="radius"
    )
    for lower, upper in (("triangle", "nearest"), ("nearest", "pairwise")):
        assert (wide[lower] <= wide[upper] * (1 + 1e-6) + 1e-9).all()
    exact = wide.dropna(subset=["exact"])
    assert set(exact.index.unique("method")) == {"clustr-cert", "clustr-lip", "prototypes"}
    assert (exact["pairwise"] <= exact["exact"] * (1 + 1e-6) + 1e-9).all()
    held = certificates[certificates["method"].isin(list(profile_of(profile).lipschitz))]
    assert (held["lipschitz"] <= 1 + 1e-5).all()
    assert (held["lipschitz_lower_bound"] > 0.3).all()


@pytest.mark.parametrize("profile", PUBLISHED)
def test_no_attack_of_the_book_breaks_a_certified_example(profile: str) -> None:
    """Those of chapter 6 at every eps, and those that search for the nearest misclassified image."""
    attacks, certificates = rows(profile, "attacks"), rows(profile, "certificates")
    lipschitz = list(profile_of(profile).lipschitz)
    mine = attacks[attacks["method"].isin(lipschitz)]
    within = mine.merge(best_bound(certificates)[["method", "index", "radius"]], on=["method", "index"])
    reach = within["eps"].where(within["norm"] == "l2", within["eps"] * pixels_of(profile) ** 0.5)
    # there are balls inside certified ones, so that something is checked
    assert (within["correct"] & (reach <= within["radius"])).sum() > 100
    assert broken_certificates(mine, certificates, pixels=pixels_of(profile)).empty
    found = rows(profile, "sandwich")
    for method in lipschitz:
        own = found[found["method"] == method]
        assert set(own["attack"]) == set(ATTACKS)
        check_sandwich(own)
        check_chain(sandwich_curve(own, [0.0, 0.1, 0.25, 0.5, 1.0, 2.0]))
    radii = best_bound(certificates).set_index(["method", "index"])["radius"]
    certified = found[found["correct"]].set_index(["method", "index"])
    # pandas keeps what a sandwich was measured beside: the radii of the table of certificates
    shared = certified.index.intersection(radii.index).unique()
    beside = certified["radius"].groupby(level=[0, 1]).first().loc[shared]
    assert (beside - radii.loc[shared]).abs().max() < 1e-5


@pytest.mark.parametrize("profile", PUBLISHED)
def test_findings_cover_every_method_and_follow_their_thresholds(profile: str) -> None:
    findings = rows(profile, "diagnostics")
    methods = {*profile_of(profile).ordinary, "ce-clusters"}
    assert set(findings["method"]) == methods == set(rows(profile, "ablations")["method"])
    assert (findings["flagged"] == (findings["value"] > findings["threshold"])).all()
    asked = findings.groupby("method")["check"].agg(set)
    for names in asked:
        # the model from which images are transferred has no such check
        assert names | {"black box: transfer"} == set(CHECKS)
    thresholds = findings.groupby("check")["threshold"].agg(["min", "max"])
    assert thresholds.eq(pd.Series({name: check.threshold for name, check in CHECKS.items()}), axis=0).all(axis=None)


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
    return study.protocol_curves(study.read_study(profile, published=True))


def pgd_rows(profile: str) -> pd.DataFrame:
    ordinary = list(profile_of(profile).ordinary)
    found = rows(profile, "attacks")
    return found[(found["attack"] == "pgd") & found["method"].isin(ordinary)]


def certified_curves(name: str) -> pd.DataFrame:
    """Of each study at the radii that were drawn."""
    studies = study.studies_beside(study.read_study(name, published=True)).values()
    return pd.concat([study.certified_curve(each, [*each.certifying, "clustr"], 61) for each in studies])


def summaries(name: str) -> pd.DataFrame:
    studies = study.studies_beside(study.read_study(name, published=True)).values()
    return pd.concat([study.summary(each) for each in studies])


@pytest.mark.parametrize("profile", [name for name in PUBLISHED if (ROOT / "figures/published" / name).is_dir()])
@pytest.mark.parametrize(
    ("label", "derive"),
    [
        ("fig-robust-accuracy", lambda name: robust_accuracy(pgd_rows(name))),
        ("fig-loss-agreement", lambda name: robust_accuracy_by_loss(pgd_rows(name).query("norm == 'linf'"))),
        ("fig-both-protocols", lambda name: curves(name)),
        ("fig-both-protocols-photographs", lambda name: curves("cpu-cifar10").assign(profile="cpu-cifar10")),
        ("fig-protocol-gap", lambda name: summaries(name)),
    ],
)
def test_figures_are_drawn_from_the_rows(profile: str, label: str, derive) -> None:
    drawn = read_table(ROOT / "figures/published" / profile / f"{label}.csv")
    assert_frame_equal(sorted_rows(derive(profile)), sorted_rows(drawn), check_dtype=False, rtol=1e-6)


def test_the_figure_of_widths_is_drawn_from_the_rows() -> None:
    drawn = read_table(ROOT / "figures/published/quick/fig-widths.csv")
    found = study.widths().reset_index(drop=True)
    assert_frame_equal(found[list(drawn)], drawn, check_dtype=False, rtol=1e-6)


def test_the_figure_of_certificates_is_drawn_from_the_rows() -> None:
    drawn = read_table(ROOT / "figures/published/quick/fig-certified-accuracy.csv")
    keys = ["profile", "method", "at"]
    left, right = (table.sort_values(keys).reset_index(drop=True) for table in (certified_curves("quick"), drawn))
    assert_frame_equal(left[sorted(left)], right[sorted(left)], check_dtype=False, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize(("profile", "examples"), [("cpu", 256), ("cpu-cifar10", 256)])
def test_numbers_on_the_page_of_results_are_those_of_the_rows(profile: str, examples: int) -> None:
    page = (ROOT / "results.md").read_text(encoding="utf-8")
    mine = study.read_study(profile, published=True)
    assert set(study.summary(mine)["examples"]) == {examples}
    for line in study.protocol_lines(mine):
        assert line in page


@pytest.mark.parametrize("profile", ["quick", "cpu", "cpu-cifar10"])
def test_certificates_on_the_page_of_results_are_those_of_the_rows(profile: str) -> None:
    page = (ROOT / "results.md").read_text(encoding="utf-8")
    for line in study.certified_lines(study.read_study(profile, published=True)):
        assert line in page
