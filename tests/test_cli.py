"""The commands, as a reader types them."""

import os
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch
from disk import contents, files_of_at_most

from clustr_core import cli
from clustr_core.recipes import METHODS, load_profile, run_folder

PROFILE = """\
shared: {dataset: digits, width: 4, train_examples: 150}
methods:
  ce: {epochs: 2}
  clustr: {warm_start: ce, epochs: 2, per_cluster: 4}
attacks:
  linf: {norm: linf, eps: [0.05, 0.1], steps: 2, examples: 20}
certified_examples: 20
"""


@pytest.fixture(autouse=True)
def home(tiny_book):
    """Every test here works in a book of its own."""
    return tiny_book


def clustr(*arguments, method="ce", profile="tiny"):
    """A command's status, on the CPU."""
    return cli.main([*arguments, "--profile", profile, "--method", method, "--device", "cpu"])


def recipe(method="ce"):
    return load_profile("tiny").recipes[method]


def test_train_attack_certify(home, capsys):
    assert clustr("train", method="clustr") == 0
    out = capsys.readouterr().out
    assert f"runs/{run_folder(recipe('clustr')).name}: 2 epochs" in out
    assert "variance" in out
    assert {path.name for path in (home / "runs").iterdir()} == {run_folder(recipe(m)).name for m in ("ce", "clustr")}
    assert clustr("attack", method="clustr") == 0
    out = capsys.readouterr().out
    assert "robust_accuracy" in out
    assert "wrote results/tiny/attacks-clustr.csv (80 rows)" in out
    attacks = pd.read_csv(home / "results/tiny/attacks-clustr.csv")
    assert attacks["method"].unique().tolist() == ["clustr"]
    assert clustr("certify", method="clustr") == 0
    assert "wrote results/tiny/certificates-clustr.csv (60 rows)" in capsys.readouterr().out
    assert set(pd.read_csv(home / "results/tiny/certificates-clustr.csv")["bound"]) == {
        "triangle",
        "nearest",
        "pairwise",
    }


def test_a_second_time_nothing_is_trained(home, capsys):
    assert clustr("train") == 0
    first, before = capsys.readouterr().out, contents(home / "runs")
    assert clustr("train") == 0
    assert capsys.readouterr().out == first
    assert contents(home / "runs") == before


def test_changed_fields_are_another_run_whose_tables_lie_beside_it(home, capsys):
    assert clustr("attack", "--set", "epochs=1", "--set", "learning_rate=1/100", "--set", "snapshots=[0, 1]") == 0
    changed = cli.override(recipe(), {"epochs": 1, "learning_rate": 0.01, "snapshots": (0, 1)})
    assert (run_folder(changed) / "attacks-ce.csv").exists()
    assert not (home / "results").exists()
    assert not run_folder(recipe()).exists()


def test_a_table_may_go_elsewhere(home):
    assert clustr("certify", "--output", str(home / "mine/table.csv")) == 0
    assert len(pd.read_csv(home / "mine/table.csv")) == 60
    assert not (home / "results").exists()


def test_threads_are_set():
    before = torch.get_num_threads()
    try:
        assert clustr("train", "--threads", "2") == 0
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("command", [[], ["train"], ["attack"], ["certify"]])
def test_help_teaches(command, capsys):
    with pytest.raises(SystemExit) as caught:
        cli.main([*command, "--help"])
    assert caught.value.code == 0
    # lines may break inside a name
    out = "".join(capsys.readouterr().out.split())
    for word in (
        ("--profile", "--method", "--set", ", ".join(METHODS))
        if command
        else (
            "clustr train   --profile quick --method clustr",
            "make figures",
            "train",
            "attack",
            "certify",
        )
    ):
        assert "".join(word.split()) in out


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["draw"],
        ["train"],
        ["train", "--method", "ce", "--epochs", "3"],
        ["train", "--method", "ce", "--output", "x"],
    ],
)
def test_what_the_parser_refuses(arguments, capsys):
    with pytest.raises(SystemExit) as caught:
        cli.main(arguments)
    assert caught.value.code == 2
    assert "usage: clustr" in capsys.readouterr().err


def refused(capsys, *arguments, command="train", **options):
    """The one line on stderr of a command that ends with status 2."""
    assert clustr(command, *arguments, **options) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("clustr: ")
    assert captured.err.count("\n") == 1
    return captured.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--set", "epochs"], "--set: expected NAME=VALUE, got 'epochs'"),
        (["--set", "epoch=3"], "ce: unknown key ['epoch'], expected some of"),
        (["--set", "epochs=0"], "epochs: expected a positive number, got 0"),
        (["--set", "epochs=many"], "ce: epochs: expected a number or a fraction, got 'many'"),
        (["--set", "milestones=[1,"], "--set: expected YAML after milestones=, got '[1,'"),
        (["--set", "milestones=3"], "ce: milestones: expected a list, got 3"),
        (["--set", "dataset=imagenet"], "name: expected one of"),
        (["--set", "dataset=folder:/none/such"], "folder: expected a directory at /none/such"),
        (["--set", "encoder=vgg"], "encoder: expected one of"),
        (["--device", "abacus"], "--device: expected one that works here, such as cpu, got 'abacus'"),
        (["--threads", "0"], "--threads: expected at least 1, got 0"),
    ],
)
def test_bad_input_is_one_line_and_status_2(home, capsys, arguments, message):
    # --device cpu comes first, so that a test may give another
    assert cli.main(["train", "--profile", "tiny", "--method", "ce", "--device", "cpu", *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith(f"clustr: {message}")
    assert captured.err.count("\n") == 1
    assert not (home / "results").exists()
    assert not list(home.rglob("run.json"))


def test_a_method_or_profile_that_is_not_there(capsys):
    assert "expected one of ['ce', 'clustr'] in tiny, got 'pgd-at'" in refused(capsys, method="pgd-at")
    assert "profile: expected one of ['tiny'] or a YAML file, got huge" in refused(capsys, profile="huge")


@pytest.mark.parametrize("command", ["train", "attack", "certify"])
def test_a_profile_that_is_no_yaml_is_one_line(home, capsys, command):
    (home / "profiles/tiny.yaml").write_text("methods:\n  ce: {epochs: [\n  clustr:\n")
    assert "tiny.yaml: expected YAML, got " in refused(capsys, command=command)


def test_damaged_runs_are_one_line(home, capsys):
    assert clustr("train") == 0
    capsys.readouterr()
    folder = run_folder(recipe())
    (folder / "run.json").write_text("{")
    assert "run.json: expected JSON" in refused(capsys)
    (folder / "run.json").unlink()
    (folder / "checkpoint.safetensors").write_bytes(b"half")
    assert "checkpoint.safetensors: expected a checkpoint" in refused(capsys)


def test_a_full_disk_is_one_line_and_leaves_nothing(home, capsys):
    with files_of_at_most(5000):
        message = refused(capsys)
    assert "File too large" in message
    assert "checkpoint.safetensors" in message
    assert contents(home / "runs") == {}


def test_the_installed_command(home):
    command = [sys.executable, "-m", "clustr_core.cli", "train", "--profile", "tiny", "--method", "none"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 2
    assert done.stderr == "clustr: method: expected one of ['ce', 'clustr'] in tiny, got 'none'\n"


def test_two_fresh_smoke_runs_give_identical_tables(tmp_path, monkeypatch):
    """Every method of profile smoke, trained, certified and attacked from nothing, twice."""
    found = []
    for name in ("one", "two"):
        root = tmp_path / name
        (root / "profiles").mkdir(parents=True)
        lines = (Path(__file__).parents[1] / "profiles/smoke.yaml").read_text().splitlines(keepends=True)
        # AutoAttack costs more than all else together, and is repeated in tests of its own
        kept = [line for line in lines if not line.startswith("  autoattack:")]
        assert len(kept) == len(lines) - 1
        (root / "profiles/smoke.yaml").write_text("".join(kept))
        monkeypatch.setenv("CLUSTR_HOME", str(root))
        for method in load_profile("smoke").recipes:
            assert clustr("attack", method=method, profile="smoke") == 0
            assert clustr("certify", method=method, profile="smoke") == 0
        found.append({path.name: path.read_bytes() for path in (root / "results/smoke").iterdir()})
    assert len(found[0]) == 2 * len(METHODS)
    assert found[0] == found[1]
