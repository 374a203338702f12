"""Trainings of other lengths: what they are, what they are asked, and what is refused before any."""

from dataclasses import replace

import pandas as pd
import pytest

from benchmarks import budgets, growing, repeat, seeds
from clustr_core.measuring.profile import load_profile
from clustr_core.measuring.versions import VERSIONS
from clustr_core.training.recipes import AdversarialTraining

PROFILE = """
shared: {dataset: digits, encoder: small-cnn, width: 8, train_examples: 200, learning_rate: 1.0e-2, seed: 111}
methods:
  ce: {epochs: %d}
  pgd-at: {epochs: 2, milestones: [1], eps: 0.1, step_size: 0.05, steps: 2, snapshots: [0, 2]}
attacks:
  paper: {attack: paper, eps: [0.1, 0.2], steps: 2, restarts: 2, examples: 32}
  transfer: {attack: transfer, norm: linf, eps: [0.1], steps: 2, examples: 32, source: ce}
  l2: {norm: l2, eps: [0.1], steps: 2, examples: 32}
examination: {eps: 0.1, examples: 8, steps: 5, restarts: 1, queries: 10}
"""


@pytest.fixture
def home(tmp_path, monkeypatch):
    (tmp_path / "profiles").mkdir()
    (tmp_path / "profiles/own.yaml").write_text(PROFILE % 1, encoding="utf-8")
    monkeypatch.setenv("CLUSTR_HOME", str(tmp_path))
    return tmp_path


def test_milestones_move_with_the_length_and_snapshots_are_left_out(home):
    recipe = load_profile("own").recipes["pgd-at"]
    longer = budgets.of_epochs(recipe, 9)
    assert (longer.epochs, longer.milestones, longer.snapshots) == (9, (4,), ())
    assert budgets.of_epochs(recipe, 1).milestones == (0,)
    assert budgets.of_epochs(recipe, 2) is recipe


def test_what_is_asked_knows_the_source_of_a_transfer(home):
    before = budgets.about(load_profile("own"), "pgd-at", 3)
    assert before[::2] == ("own", "pgd-at", 111)
    assert budgets.about(load_profile("own"), "pgd-at", 4)[1] != before[1]
    (home / "profiles/own.yaml").write_text(PROFILE % 2, encoding="utf-8")
    assert budgets.about(load_profile("own"), "pgd-at", 3)[1] != before[1]


def test_rows_of_another_version_are_other_rows(home, monkeypatch):
    profile = load_profile("own")
    asked = {growing.asked_of_profile(profile)}
    monkeypatch.setattr(AdversarialTraining, "version", 2)
    asked.add(growing.asked_of_profile(profile))
    monkeypatch.setitem(VERSIONS, "attack", VERSIONS["attack"] + 1)
    asked.add(growing.asked_of_profile(profile))
    recipe = profile.recipes["pgd-at"]
    asked |= {growing.asked_of_recipe(each) for each in (recipe, replace(recipe, width=recipe.width * 2))}
    monkeypatch.setitem(VERSIONS, "certificate", VERSIONS["certificate"] + 1)
    assert len(asked | {growing.asked_of_recipe(recipe)}) == 6


def test_a_longer_training_is_measured_once_and_added(home, capsys):
    for _ in range(2):
        budgets.main(["--profile", "own", "--trainings", "pgd-at=3"])
    table = growing.rows_at(home / "results/bench/budgets.csv", budgets.KEY)
    assert table["number"].tolist() == ["clean", "paper's protocol", "correct attacks"]
    assert (table["images"] == 32).all()
    assert set(table[["method", "epochs"]].itertuples(index=False, name=None)) == {("pgd-at", 3)}
    # the other run is the source, and of the profile's own length nothing was trained
    assert sorted(path.name.rsplit("-", 1)[0] for path in (home / "runs").iterdir()) == ["digits-ce", "digits-pgd-at"]
    assert isinstance(table, pd.DataFrame)
    assert "correct attacks" in capsys.readouterr().out


def test_an_eps_that_is_a_fraction_is_found_among_the_rows(home):
    (home / "profiles/own.yaml").write_text(PROFILE.replace("[0.1", "[8/255").replace(" 0.1", " 8/255") % 1)
    assert load_profile("own").examination.eps == 8 / 255
    repeat.main(["--profile", "own", "--methods", "pgd-at", "--seeds", "1", "--threads", "1"])
    table = growing.rows_at(home / "results/bench/repeat.csv", repeat.KEY)
    assert {"clean", "paper's protocol", "correct attacks"} <= set(table["number"])


@pytest.mark.parametrize(
    ("main", "given", "message"),
    [
        (budgets.main, ["--trainings", "pgd-at=0"], "expected METHOD=EPOCHS, epochs from 1 to 10,000, got 'pgd-at=0'"),
        (budgets.main, ["--trainings", "pgd-at"], "expected METHOD=EPOCHS"),
        (budgets.main, ["--trainings", "clustr=3"], "expected methods out of ['ce', 'pgd-at'], got ['clustr']"),
        (budgets.main, ["--trainings", "pgd-at=3", "ce=1"], "--profile: expected one of which rows are published"),
        (budgets.main, ["--profile", "none", "--trainings", "ce=3"], "--profile: "),
        (seeds.main, ["--methods", "ce", "--seeds", "110", "111"], "--profile: expected one of which rows are"),
        (seeds.main, ["--profile", "none"], "--profile: "),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused_in_a_line_before_any_training(home, capsys, main, given, message):
    with pytest.raises(SystemExit):
        main(["--profile", "own", *given])
    said = capsys.readouterr().err.splitlines()[-1]
    assert message in said
    assert not (home / "runs").exists()
