"""Legs: cut, killed and carried to other machines, they leave the tables of one uninterrupted run; nothing is mixed."""

import errno
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from unittest.mock import Mock

import pandas as pd
import pytest
import torch
from disk import contents
from safetensors.torch import load_file

from clustr_core import data
from clustr_core.attacks.gradient import pgd
from clustr_core.attacks.registry import OWN_ATTACKS, OwnAttack
from clustr_core.cli import main
from clustr_core.measuring import leg as leg_module
from clustr_core.measuring.counterexamples import load_counterexample
from clustr_core.measuring.leg import Clock, TimeIsUp, early_attacks, plan, run_leg, steps_left, tables_left
from clustr_core.measuring.profile import load_profile
from clustr_core.measuring.versions import VERSIONS
from clustr_core.measuring.written import is_current, is_written, made_by, write_rows
from clustr_core.storage.files import alone, digest, read_json, seal_of, write_json
from clustr_core.storage.pack import INDEX, Bounds, Member, pack, read_index, unpack
from clustr_core.storage.provenance import check_sidecar
from clustr_core.storage.tensors import read_tensors, write_tensors
from clustr_core.training.loop import fit
from clustr_core.training.recipes import run_folder
from clustr_core.training.run import SNAPSHOT, load_run, round_to_half
from clustr_core.training.state import epochs_kept

ROOT = Path(__file__).resolve().parents[2]
PROFILE = """\
shared: {dataset: digits, width: 4, train_examples: 150}
methods:
  clustr-cert: {encoder: lip-mlp, width: 8, epochs: 2, learning_rate: 0.02, per_class: 1}
  ce: {epochs: 3}
  clustr: {warm_start: ce, epochs: 3, per_cluster: 4}
  smoothing: {epochs: 1}
attacks:
  linf: {norm: linf, eps: [0.05], steps: 2, examples: 130, losses: [ce]}
  paper: {attack: paper, eps: [0.05, 0.1], steps: 2, restarts: 2, examples: 130}
  transfer: {attack: transfer, eps: [0.1], steps: 2, examples: 130}
certified_examples: 130
examination: {eps: 0.1, examples: 2, steps: 1, restarts: 1, queries: 1}
sandwich: {examples: 3, steps: 2, points: 2}
smoothing: {examples: 4, samples: 20, selection_samples: 5}
"""
BOUNDS = Bounds(40_000)


@pytest.fixture
def home(tmp_path, monkeypatch):
    """Goes to a machine that has the profile, and nothing else."""

    def machine(name: str) -> Path:
        place = tmp_path / name
        (place / "profiles").mkdir(parents=True, exist_ok=True)
        (place / "profiles/tiny.yaml").write_text(PROFILE, encoding="utf-8")
        monkeypatch.setenv("CLUSTR_HOME", str(place))
        return place

    return machine


def leg(folder, readings=None, profile=None, **options):
    """A leg that ends after so many readings of its clock, wherever it is then; None for one that ends by itself."""
    ticks = itertools.count()
    clock = Clock(1e9) if readings is None else Clock(readings, lambda: float(next(ticks)))
    return run_leg(profile or load_profile("tiny"), folder, clock, BOUNDS, progress=False, **options)


def tables(place: Path) -> dict[str, bytes]:
    found = contents(place / "results/tiny")
    return {name: content for name, content in found.items() if name.endswith(".csv")}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The tables of one leg that nothing interrupts, and its pack."""
    place = tmp_path_factory.mktemp("whole")
    (place / "profiles").mkdir()
    (place / "profiles/tiny.yaml").write_text(PROFILE, encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CLUSTR_HOME", str(place))
        done = leg(place / "pack")
        assert done.left == ()
    return place


# the plan


def test_headline_methods_come_first_and_each_begins_with_what_decides():
    steps = plan(load_profile(ROOT / "profiles/gpu.yaml"))
    trained = [step.method for step in steps if step.kind == "train"]
    assert trained[:4] == ["ce", "clustr", "clustr-qtrades", "fast-at"]
    assert len(trained) == len(set(trained)) == 12
    clustr = [step for step in steps if step.method == "clustr"]
    first = clustr[1].attacks["paper"]
    assert (clustr[0].kind, first.eps, first.steps, first.restarts) == ("train", (8 / 255,), 100, 1)
    decided = [list(step.attacks)[-1] for step in clustr[1:5]]
    assert decided == ["paper", "transfer", "linf", "autoattack"]
    assert [step.kind for step in clustr[-3:]] == ["certificates", "diagnostics", "attacks"]
    assert dict(clustr[-1].attacks) == load_profile(ROOT / "profiles/gpu.yaml").attacks
    # all headline methods have the rows that decide before one of them has others, and those before its costly ones
    others = next(n for n, step in enumerate(steps) if "l2" in step.attacks)
    assert {step.method for step in steps[:others] if list(step.attacks)[-1:] == ["autoattack"]} == set(trained[:4])
    costly = next(n for n, step in enumerate(steps) if step.kind == "diagnostics")
    assert [step.method for step in steps[:costly] if step.kind == "train"] == trained[:4]
    assert {step.method for step in steps[costly:] if step.kind == "train"} == set(trained[4:])
    # what certifies does so before it is attacked
    assert [step.kind for step in steps if step.method == "clustr-cert"][:3] == ["train", "certificates", "attacks"]
    assert (steps[-1].method, steps[-1].kind) == ("prototypes", "certificates")


@pytest.mark.parametrize("name", ["smoke", "quick", "cpu", "cpu-cifar10", "gpu", "paper"])
def test_a_plan_ends_with_every_table_of_its_profile(name):
    profile = load_profile(ROOT / f"profiles/{name}.yaml")
    found = {(kind, step.method) for step in plan(profile) for kind in step.tables}
    assert found == {(kind, method) for kind, methods in profile.measured.items() for method in methods}
    for method in profile.attacked:
        last = [step for step in plan(profile) if (step.method, step.kind) == (method, "attacks")][-1]
        assert dict(last.attacks) == profile.attacks


def test_a_profile_without_the_papers_protocol_has_one_unit_of_attacks():
    profile = load_profile(ROOT / "profiles/gpu.yaml")
    profile = replace(profile, attacks={"linf": profile.attacks["linf"]})
    assert early_attacks(profile) == profile.attacks
    assert sum(step.kind == "attacks" for step in plan(profile)) == len(profile.attacked)


def test_a_clock_begins_nothing_that_would_not_be_done():
    times = iter([0, 0, 0, 30, 30, 30, 70, 70, 70])
    clock = Clock(100, lambda: float(next(times)))
    clock.begin("epoch")
    clock.begin("epoch")
    assert clock.rates == {"epoch": 30}
    with pytest.raises(TimeIsUp):
        # the last one took 40, and 30 are left
        clock.begin("epoch")
    assert clock.rates == {"epoch": 40}


def test_a_clock_knows_work_by_its_amount_and_keeps_a_reserve():
    now = [0.0]
    clock = Clock(100, lambda: now[0])
    clock.begin("attack", 10)
    now[0] = 20
    clock.end()
    # two seconds for each unit, and 80 are left
    with pytest.raises(TimeIsUp):
        clock.begin("attack", 41)
    clock.begin("attack", 39)
    now[0] = 91
    # of work that is new a tenth of the leg is expected
    with pytest.raises(TimeIsUp):
        clock.begin("other")
    now[0], clock.reserve = 85, 10
    with pytest.raises(TimeIsUp):
        clock.begin("other")


# the rows


def test_legs_that_are_cut_and_carried_give_the_tables_of_one_run(whole, home, tmp_path):
    folder, number, epochs = tmp_path / "pack", 0, []
    readings = itertools.cycle([60, 25, 140])
    while True:
        place = home(f"machine-{number}")
        done = leg(folder, next(readings))
        assert max(path.stat().st_size for path in folder.iterdir()) <= BOUNDS.size
        assert done.packed.left_out == ()
        epochs += [epochs_kept(path) for path in place.glob("runs/*/checkpoint.safetensors")]
        number += 1
        if not done.left:
            break
        assert number < 40
    assert number >= 3
    # some were cut inside a training
    assert {1, 2} & set(epochs)
    assert tables(place) == tables(whole)
    assert not list(place.glob("results/tiny/partial/*"))
    # a further leg finds nothing to do
    before = contents(place)
    again = leg(folder, 60)
    assert (again.written, again.left) == ((), ())
    assert contents(place) == before


def test_early_rows_stand_apart_with_what_was_asked(home, tmp_path):
    place = home("here")
    for readings in itertools.count(30, 10):
        leg(tmp_path / "pack", readings)
        if found := list(place.glob("results/tiny/partial/attacks-ce.csv")):
            break
    rows, made = pd.read_csv(found[0]), check_sidecar(found[0])["made"]
    paper = rows.query("attack == 'paper'")
    assert (set(paper["restarts"]), set(paper["eps"])) == ({1}, {0.05})
    assert made["protocol"]["paper"]["restarts"] == 1
    assert set(made["protocol"]) <= {"linf", "paper", "transfer"}
    assert not (place / "results/tiny/attacks-ce.csv").exists()
    assert "attacks-ce" in tables_left(load_profile("tiny"))


def killed(place: Path, folder: Path, reached) -> None:
    """A leg in a process of its own, which SIGKILL ends as soon as it has reached something."""
    command = [
        sys.executable,
        "-m",
        "clustr_core.cli",
        "leg",
        "--profile",
        "tiny",
        "--minutes",
        "5",
        "--into",
        str(folder),
    ]
    environment = os.environ | {"CLUSTR_HOME": str(place), "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen([*command, "--pack", "40kB", "--device", "cpu"], env=environment, stderr=subprocess.PIPE)
    deadline = time.monotonic() + 60
    while not reached():
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL


def test_a_killed_leg_goes_on_here_and_elsewhere(whole, home, tmp_path):
    here, folder = home("here"), tmp_path / "pack"
    killed(here, folder, lambda: len(list(here.glob("runs/*-ce-*/tables/attack-*.csv"))) >= 2)
    carried = shutil.copytree(folder, tmp_path / "carried")
    # here nothing is lost but the piece that was being computed
    before = contents(here / "runs")
    assert leg(folder).left == ()
    pieces = {name: content for name, content in before.items() if name.endswith(".csv") and "/." not in name}
    assert pieces.items() <= contents(here / "runs").items()
    assert tables(here) == tables(whole)
    # elsewhere it goes on from what was packed last
    there = home("there")
    assert leg(carried).left == ()
    assert tables(there) == tables(whole)


def test_what_has_gone_further_here_is_kept(home, tmp_path):
    place, folder = home("here"), tmp_path / "pack"
    recipe = load_profile("tiny").recipes["ce"]
    checkpoint = run_folder(recipe) / "checkpoint.safetensors"

    def train(epochs):
        def stop():
            if checkpoint.exists() and epochs_kept(checkpoint) >= epochs:
                raise TimeIsUp

        with pytest.raises(TimeIsUp):
            fit(recipe, progress=False, before_epoch=stop)

    train(1)
    leg(folder, 1)
    train(2)
    further = checkpoint.read_bytes()
    leg(folder, 1)
    assert checkpoint.read_bytes() == further
    home("there")
    leg(folder, 1)
    there = run_folder(recipe) / "checkpoint.safetensors"
    assert there.read_bytes() == further
    assert there.is_relative_to(tmp_path / "there")
    assert not list(place.glob("runs/.unpacked"))


def test_methods_whose_rows_are_published_are_left_out(whole, home, tmp_path):
    place = home("here")
    published = place / "results/published/tiny"
    published.mkdir(parents=True)
    for path in (whole / "results/tiny").glob("*-ce.*"):
        shutil.copy(path, published)
    profile = load_profile("tiny")
    assert "ce" not in {step.method for step in steps_left(profile)}
    assert tables_left(profile)[0] == "attacks-clustr"
    # rows of another protocol are not those of this profile
    changed = replace(profile, attacks={"linf": profile.attacks["linf"]})
    assert {step.method for step in steps_left(changed)} >= {"ce"}
    done = leg(tmp_path / "pack", 80)
    assert done.left[0] == "attacks-clustr"
    # its tables stand beside the new ones
    for path in published.iterdir():
        assert (place / "results/tiny" / path.name).read_bytes() == path.read_bytes()
    # what others start from is trained all the same
    assert (run_folder(profile.recipes["ce"]) / "run.json").exists()


# half precision


def test_rows_are_measured_on_the_weights_that_travel_and_say_so(home, tmp_path):
    place, folder = home("here"), tmp_path / "pack"
    certified = replace(load_profile("tiny"), attacks={}, examination=None, sandwich=None)
    leg(folder, half=True, profile=certified)
    recipes, dtypes = load_profile("tiny").recipes, {}
    for method, recipe in recipes.items():
        run = load_run(run_folder(recipe))
        weights = load_file(run.path / "model.safetensors")
        dtypes[method] = {
            weights[name].dtype for name in weights if name.startswith("network.") and weights[name].dim() > 1
        }
        assert {weights[name].dtype for name in ("clusters.centroids", "clusters.variance")} == {torch.float32}
        expected = "float32" if method == "clustr-cert" else "float16"
        assert run.weights_dtype == read_json(run.path / "run.json")["weights_dtype"] == expected
        made = check_sidecar(place / f"results/tiny/certificates-{method}.csv")["made"]
        assert (made["weights_dtype"], made["weights_sha256"]) == (expected, run.weights_sha256)
        # what is attacked is what the file holds
        state = run.model().state_dict()
        for name, tensor in state.items():
            if f"network.{name}" in weights and method != "clustr-cert":
                assert torch.equal(tensor, weights[f"network.{name}"].to(tensor.dtype))
    assert dtypes == {name: {torch.float32 if name == "clustr-cert" else torch.float16} for name in recipes}
    # the next machine measures the same weights, or none
    home("there")
    assert leg(folder, half=True, profile=certified).written == ()
    with pytest.raises(ValueError, match=r"half precision \(--half\) False, got one of True in"):
        leg(folder)
    home("here")
    with pytest.raises(
        ValueError, match=r"half: expected float32 weights with half=False, got a finished run with float16"
    ):
        leg(tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_a_run_in_full_precision_is_not_taken_for_one_in_half(home):
    home("here")
    recipe = load_profile("tiny").recipes["smoothing"]
    run = fit(recipe, progress=False)
    before = contents(run.path)
    with pytest.raises(
        ValueError, match=r"half: expected float16 weights with half=True, got .* float32 in .*smoothing"
    ):
        fit(recipe, half=True, progress=False)
    assert contents(run.path) == before


def test_weights_beyond_half_precision_are_refused_by_name():
    network = torch.nn.Sequential(torch.nn.Linear(2, 2))
    network[0].weight.data[0, 0] = 7e4
    with pytest.raises(
        ValueError, match=r"half: expected weights of at most 65504 in size, got a larger one in 0\.weight"
    ):
        round_to_half(network)


# bad input


@pytest.fixture
def refused(home, tmp_path, capsys):
    """What the command says of bad input; nothing may have been done or lost."""

    def command(*arguments, folder=tmp_path / "pack", place="elsewhere", profile="tiny"):
        where = home(place)
        before = contents(where), contents(folder) if folder.is_dir() else None
        given = ["--profile", profile, "--into", str(folder), "--device", "cpu", *arguments]
        assert main(["leg", *(given if "--minutes" in arguments else ["--minutes", "1", *given])]) == 2
        assert (contents(where), contents(folder) if folder.is_dir() else None) == before
        return capsys.readouterr().err

    return command


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--minutes", "0"), "--minutes: expected a positive number, got 0"),
        (("--minutes", "-3"), "--minutes: expected a positive number, got -3"),
        (("--minutes", "nan"), "--minutes: expected a positive number, got nan"),
        (("--pack", "5kB"), "--pack: expected at least 32kB, got 5000 bytes"),
        (("--pack", "much"), "--pack: expected a size such as 15MB, 500kB or 16MiB, got 'much'"),
        (("--files", "1"), "--files: expected at least 2, the index and a part, got 1"),
        (("--captured",), "captured: expected one process on a CUDA device, which alone has graphs, got 1 on cpu"),
        (("--device", "cuda:77"), "--device: expected one that works here, such as cpu, got 'cuda:77'"),
    ],
)
def test_an_argument_without_meaning_is_named_before_any_work(refused, arguments, message):
    said = refused(*arguments)
    assert said.startswith(f"clustr: {message}")
    assert said.count("\n") == 1


def test_without_a_folder_the_pack_lies_under_the_profiles_name(home):
    place = home("here")
    assert main(["leg", "--profile", "tiny", "--minutes", "0.0001", "--device", "cpu"]) == 0
    assert read_index(place / "legs/tiny")["profile"]["name"] == "tiny"


@pytest.fixture
def carried(whole, tmp_path):
    """A pack that came from elsewhere."""
    return shutil.copytree(whole / "pack", tmp_path / "pack")


def test_a_pack_of_another_profile_text_or_version_is_refused(carried, refused, home, monkeypatch):
    place = home("elsewhere")
    shutil.copy(place / "profiles/tiny.yaml", place / "profiles/other.yaml")
    said = refused(profile="other")
    assert "clustr: --into: expected a leg of profile {'name': 'other'}, got one of {'name': 'tiny'} in" in said
    monkeypatch.setattr(sys.modules[__name__], "PROFILE", PROFILE.replace("epochs: 3", "epochs: 4"))
    assert "clustr: --into: expected a leg of profile {'sha256': " in refused()
    monkeypatch.undo()
    monkeypatch.setitem(VERSIONS, "attack", 99)
    home("elsewhere")
    assert "--into: expected a leg of measurement versions {'attack': 99}, got one of {'attack': 1} in" in refused()


def test_a_pack_of_another_training_is_refused(carried, refused, monkeypatch):
    monkeypatch.setattr(leg_module, "training_version", lambda recipe: "99")
    assert "--into: expected a leg of training versions {'clustr-cert': '99', " in refused()


@pytest.mark.parametrize("how", ["missing", "damaged", "index", "foreign"])
def test_a_pack_that_is_not_whole_is_refused(carried, refused, how):
    path = sorted(carried.glob("*.part"))[1]
    if how == "missing":
        path.unlink()
        message = f"--into: expected part 2 of {len(read_index(carried)['parts'])}, {path.name}, in {carried}, got no"
    elif how == "damaged":
        path.write_bytes(b"x" + path.read_bytes()[1:])
        message = f"--into: expected part 2 of {len(read_index(carried)['parts'])}, {path.name}, of 40000 bytes"
    elif how == "index":
        (carried / INDEX).unlink()
        message = f"--into: expected an empty folder or one with {INDEX}, got 0001-"
    else:
        shutil.rmtree(carried)
        carried.mkdir()
        (carried / "notes.txt").touch()
        message = f"--into: expected an empty folder or one with {INDEX}, got notes.txt alone in {carried}"
    assert message in refused()


def test_another_training_of_the_same_run_is_refused(carried, whole, home, refused):
    place = home("elsewhere")
    run = run_folder(load_profile("tiny").recipes["ce"])
    shutil.copytree(whole / "runs" / run.name, run)
    weights = run / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    record = read_json(run / "run.json") | {"weights_sha256": digest(weights.read_bytes())}
    del record["sha256"]
    write_json(run / "run.json", record | {"sha256": seal_of(record)})
    said = refused()
    assert f"clustr: --into: expected the run {run.name} with the weights " in said
    assert str(place) in said


def test_a_leg_from_the_shell_says_what_it_did_and_what_is_left(whole, carried, home, capsys):
    home("there")
    given = ["--profile", "tiny", "--into", str(carried), "--device", "cpu", "--pack", "40kB"]
    assert main(["leg", "--minutes", "1", *given]) == 0
    out = capsys.readouterr().out
    assert f"{carried}: {len(list(carried.iterdir()))} files, " in out
    assert "left for later legs: nothing" in out
    (carried.parent / "there/results/tiny/sandwich-clustr-cert.csv").unlink()
    assert main(["leg", "--minutes", "1", *given, "--files", "2"]) == 0
    out = capsys.readouterr().out
    assert "did not fit, and stays here: " in out
    assert len(list(carried.iterdir())) == 2


FAILING = """\
shared: {dataset: digits, width: 4, train_examples: 150}
methods:
  ce: {epochs: 1}
  pgd-at: {epochs: 1, steps: 1, optimiser: sgd, learning_rate: 1.0e+3}
certified_examples: 10
"""


def test_a_method_that_fails_takes_nothing_from_the_others(home, tmp_path):
    place = home("here")
    (place / "profiles/tiny.yaml").write_text(FAILING, encoding="utf-8")
    with pytest.raises(ValueError, match=r"^pgd-at: "):
        leg(tmp_path / "pack")
    assert {path.stem for path in (place / "results/tiny").glob("*.csv")} == {
        "certificates-ce",
        "certificates-prototypes",
    }
    assert tables_left(load_profile("tiny")) == ["certificates-pgd-at"]


def test_rows_of_other_weights_than_those_here_are_not_done(home, tmp_path):
    place = home("here")
    (place / "profiles/tiny.yaml").write_text(FAILING.replace("  pgd-at", "  # pgd-at"), encoding="utf-8")
    profile = load_profile("tiny")
    leg(tmp_path / "pack")
    assert tables_left(profile) == []
    weights = run_folder(profile.recipes["ce"]) / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4] + bytes(4))
    assert tables_left(profile) == ["certificates-ce"]


# two legs at one time, and what is damaged or outdated


def test_a_folder_in_which_another_leg_is_at_work_is_refused(carried, refused):
    with alone(carried):
        assert f"--into: expected a folder in which no other leg is at work, got {carried}" in refused()


def test_a_pack_that_another_machine_has_written_meanwhile_is_not_replaced(home, tmp_path, monkeypatch):
    place, folder = home("here"), tmp_path / "pack"
    theirs = {"parts": [], "profile": {"name": "tiny"}}

    def prepared(*args, **options):
        real(*args, **options)
        # as a leg elsewhere would, on a file system without locks
        ends.append(lambda: write_json(folder / INDEX, theirs))

    real, ends = leg_module._prepare, []
    monkeypatch.setattr(leg_module, "_prepare", prepared)
    monkeypatch.setattr(leg_module, "steps_left", lambda profile: [ends.pop()() for _ in list(ends)] and [])
    with pytest.raises(ValueError, match="got one that another leg has written since in"):
        leg(folder)
    assert read_json(folder / INDEX) == theirs
    assert not list(place.glob("runs/.unpacked"))


@pytest.mark.parametrize("where", ["runs/*-ce-*/tables/attack-*.csv", "results/tiny/certificates-ce.csv"])
def test_what_is_damaged_here_gives_way_to_what_travelled(whole, carried, home, where):
    place = home("here")
    shutil.copytree(whole / "runs", place / "runs")
    shutil.copytree(whole / "results", place / "results")
    path = min(place.glob(where))
    good = path.read_bytes()
    path.write_bytes(good[:60] + bytes([good[60] ^ 1]) + good[61:])
    assert leg(carried).left == ()
    assert path.read_bytes() == good


def test_a_table_of_ones_own_is_not_replaced(whole, home, tmp_path):
    shutil.copytree(whole, home("there"), dirs_exist_ok=True)
    leg(tmp_path / "pack")
    path = home("here") / "results/tiny/certificates-ce.csv"
    path.parent.mkdir(parents=True)
    path.write_text("my own,table\n", encoding="utf-8")
    before = contents(path.parents[2])
    with pytest.raises(ValueError, match=r"expected no table without a sidecar in the place of the book's, got .*-ce"):
        leg(tmp_path / "pack")
    assert contents(path.parents[2]) == before
    place = home("published")
    shutil.copytree(whole / "results/tiny", place / "results/published/tiny")
    (place / "results/tiny").mkdir()
    (mine := place / "results/tiny/attacks-ce.csv").write_text("my own,table\n", encoding="utf-8")
    with pytest.raises(ValueError, match="expected no table without a sidecar"):
        leg(tmp_path / "another")
    assert mine.read_text(encoding="utf-8") == "my own,table\n"


def test_a_table_of_another_protocol_gives_way_to_the_published_one(whole, home, tmp_path):
    place = home("here")
    for folder in ("results/published/tiny", "results/tiny"):
        shutil.copytree(whole / "results/tiny", place / folder)
    for kind in ("csv", "json"):
        (place / f"results/tiny/certificates-ce.{kind}").unlink()
    profile = load_profile("tiny")
    old = replace(profile, certified_examples=3)
    write_rows(
        place / "results/tiny/certificates-ce.csv", pd.DataFrame({"x": [1]}), made_by(old, "certificates", "cpu")
    )
    assert leg(tmp_path / "pack").left == ()
    assert tables(place) == tables(whole)


@pytest.mark.parametrize("kind", ["fifo", "folder", "link"])
def test_what_is_no_file_does_not_travel_and_holds_nothing_up(whole, home, tmp_path, kind):
    place = home("here")
    shutil.copytree(whole / "runs", place / "runs")
    (tables_of_run,) = place.glob("runs/*-ce-*/tables")
    odd = tables_of_run / "y.csv"
    {"fifo": os.mkfifo, "folder": Path.mkdir, "link": lambda path: path.symlink_to("/none")}[kind](odd)
    assert leg(tmp_path / "pack").left == ()
    unpack(tmp_path / "pack", tmp_path / "again")
    found = contents(tmp_path / "again")
    assert not [name for name in found if name.endswith("/y.csv")]
    assert len([name for name in found if "-ce-" in name]) > 5


def test_a_published_table_is_never_taken_without_its_sidecar(whole, home, tmp_path, monkeypatch):
    place = home("here")
    shutil.copytree(whole / "results/tiny", place / "results/published/tiny")

    def killed(source, path):
        real(source, path)
        raise KeyboardInterrupt

    real = leg_module.copy_whole
    monkeypatch.setattr(leg_module, "copy_whole", killed)
    with pytest.raises(KeyboardInterrupt):
        leg(tmp_path / "pack")
    monkeypatch.undo()
    home("here")
    assert tables(place) == {}
    leg(tmp_path / "pack")
    assert tables(place) == tables(whole)


def test_a_pack_does_not_lie_where_a_leg_works(home, refused):
    place = home("elsewhere")
    (place / "runs").mkdir()
    for folder in (place / "runs", place / "results/tiny/pack"):
        said = refused(folder=folder)
        assert said.startswith(f"clustr: --into: expected a folder outside of {place}/r")


@pytest.mark.parametrize("kind", ["tables", "snapshots", "counterexamples"])
def test_a_link_in_the_place_of_a_runs_folder_leads_nowhere(whole, home, tmp_path, kind):
    """What it leads to does not travel, and nothing is written there."""
    place, outside = home("here"), tmp_path / "keys"
    outside.mkdir()
    (outside / "secret.csv").write_text("mine", encoding="utf-8")
    shutil.copytree(whole / "runs", place / "runs")
    (run,) = place.glob("runs/*-ce-*")
    shutil.rmtree(run / kind, ignore_errors=True)
    (run / kind).symlink_to(outside)
    if kind == "tables":
        with pytest.raises(
            ValueError, match="tables: expected a folder, got a link, which may lead outside of the book"
        ):
            leg(tmp_path / "pack")
    else:
        leg(tmp_path / "pack")
    unpack(tmp_path / "pack", tmp_path / "again")
    assert not [name for name in contents(tmp_path / "again") if "secret" in name]
    assert contents(outside) == {"secret.csv": b"mine"}


def test_rows_of_another_source_of_transfer_are_not_done(whole, home):
    place = home("here")
    shutil.copytree(whole / "results", place / "results")
    profile = load_profile("tiny")
    assert tables_left(profile) == []
    changed = replace(profile.recipes["ce"], epochs=2)
    recipes = profile.recipes | {"ce": changed}
    left = tables_left(replace(profile, recipes=recipes))
    assert "attacks-clustr-cert" in left
    assert "certificates-clustr-cert" not in left


def test_a_damaged_snapshot_gives_way_to_the_one_that_travelled(home, tmp_path):
    place, folder = home("here"), tmp_path / "pack"
    recipe = replace(load_profile("tiny").recipes["ce"], snapshots=(1, 3))
    profile = replace(load_profile("tiny"), recipes={"ce": recipe})
    leg(folder, profile=profile)
    path = min(place.glob("runs/*/snapshots/*"))
    good = path.read_bytes()
    path.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    leg(folder, profile=profile)
    assert path.read_bytes() == good


def test_rows_of_another_data_set_are_not_done(whole, home):
    """Of prototypes no run says on which data they were."""
    place = home("here")
    shutil.copytree(whole / "results", place / "results")
    profile = load_profile("tiny")
    recipes = {name: replace(each, dataset="mnist5k", warm_start=None) for name, each in profile.recipes.items()}
    assert "certificates-prototypes" in tables_left(replace(profile, recipes=recipes))


def test_runs_and_results_may_lie_on_two_disks(whole, carried, home, monkeypatch):
    place, real = home("here"), Path.replace

    def other_disk(path, target):
        if ".unpacked" in path.parts:
            raise OSError(errno.EXDEV, "Invalid cross-device link")
        return real(path, target)

    monkeypatch.setattr(Path, "replace", other_disk)
    assert leg(carried).left == ()
    assert tables(place) == tables(whole)


@pytest.mark.parametrize("name", ["certificates-ce", "partial/attacks-ce"])
def test_a_table_that_is_outdated_here_gives_way_to_the_one_that_travelled(whole, home, tmp_path, name):
    """Else the pack would be written again without it, and a finished table lost."""
    home("there")
    folder, profile = tmp_path / "pack", load_profile("tiny")
    table = run_folder(profile.recipes["ce"]).parents[1] / f"results/tiny/{name}.csv"
    for readings in itertools.count(30, 10):
        leg(folder, readings)
        if table.exists():
            break
    good = table.read_bytes()
    place = home("here")
    outdated = place / f"results/tiny/{name}.csv"
    attacks = {"linf": replace(profile.attacks["linf"], steps=1)}
    old = replace(profile, certified_examples=3, attacks=attacks)
    outdated.parent.mkdir(parents=True)
    write_rows(outdated, pd.DataFrame({"x": [1]}), made_by(old, Path(name).name.partition("-")[0], "cpu"))
    # ends before anything is measured
    leg(folder, 0)
    assert outdated.read_bytes() == good
    unpack(folder, tmp_path / "again")
    assert contents(tmp_path / "again")[f"results/tiny/{name}.csv"] == good


@pytest.mark.parametrize(
    "name",
    [
        "runs/{run}/tables/deep/x.csv", "runs/{run}/x.sh", "runs/{run}/.x/y.csv", "runs/other/run.json",
        "results/tiny/x.csv", "results/tiny/deep/x.csv", "results/other/x.csv", "notebooks/x.ipynb",
    ],
)  # fmt: skip
def test_a_pack_with_anything_else_is_refused_and_nothing_is_moved(home, tmp_path, name):
    place = home("here")
    profile = load_profile("tiny")
    leg(tmp_path / "pack", 0)
    name = name.format(run=run_folder(profile.recipes["ce"]).name)
    content = tmp_path / "x"
    content.write_text("x", encoding="utf-8")
    facts = {key: value for key, value in read_index(tmp_path / "pack").items() if key not in ("parts", "left_out")}
    pack(tmp_path / "pack", [[Member(name, content)]], BOUNDS, facts)
    before = contents(place)
    with pytest.raises(ValueError, match=f"expected a pack of runs and tables, got one with {name}"):
        leg(tmp_path / "pack", 0)
    assert contents(place) == before


def test_a_link_in_the_place_of_the_partial_tables_is_refused(carried, home, tmp_path):
    place = home("here")
    (place / "results/tiny").mkdir(parents=True)
    (tmp_path / "outside").mkdir()
    (place / "results/tiny/partial").symlink_to(tmp_path / "outside")
    with pytest.raises(ValueError, match="partial: expected a folder, got a link, which may lead outside of the book"):
        leg(carried, 0)
    assert contents(tmp_path / "outside") == {}


def test_prototypes_of_another_number_are_not_done(whole, home):
    """Of prototypes no run says how many a class has."""
    place = home("here")
    shutil.copytree(whole / "results", place / "results")
    profile = load_profile("tiny")
    recipes = {name: replace(each, per_class=5, warm_start=None) for name, each in profile.recipes.items()}
    assert "certificates-prototypes" not in tables_left(profile)
    assert "certificates-prototypes" in tables_left(replace(profile, recipes=recipes))


def test_rows_without_a_source_that_there_is_today_are_not_done(home):
    """As a diagnosis before the profile had a model to transfer from, and one after it has none any more."""
    home("here")
    tiny = load_profile("tiny")
    profile = replace(tiny, attacks={"linf": tiny.attacks["linf"]})
    alone = replace(profile, recipes={name: each for name, each in profile.recipes.items() if name != "ce"})
    for now, then in ((profile, alone), (alone, profile)):
        made = json.loads(json.dumps(made_by(then, "diagnostics", "cpu") | {"method": "clustr"}))
        assert is_current(made, then, "diagnostics", "clustr")
        assert not is_current(made, now, "diagnostics", "clustr")


def test_rows_of_another_version_of_an_attack_of_ones_own_are_not_done(home, monkeypatch):
    home("here")
    profile = replace(load_profile("tiny"), attacks={"mine": load_profile("tiny").attacks["linf"]})
    monkeypatch.setitem(OWN_ATTACKS, "pgd", OwnAttack(pgd, 1))
    made = json.loads(json.dumps(made_by(profile, "attacks", "cpu") | {"method": "ce"}))
    assert is_current(made, profile, "attacks", "ce")
    monkeypatch.setitem(OWN_ATTACKS, "pgd", OwnAttack(pgd, 2))
    assert not is_current(made, profile, "attacks", "ce")


@pytest.mark.parametrize("same", [True, False])
def test_snapshots_are_those_of_the_training_that_is_taken(home, tmp_path, same):
    """A run that was begun here gives way to the finished one, and its snapshots, if it is another training."""
    there, folder = home("there"), tmp_path / "pack"
    recipe = replace(load_profile("tiny").recipes["ce"], snapshots=(0, 1, 3))
    profile = replace(load_profile("tiny"), recipes={"ce": recipe}, attacks={}, examination=None)
    leg(folder, profile=profile)
    theirs = contents(there / "runs")
    home("here")
    digits = data.load_dataset("digits")
    epochs = itertools.count()

    def stops():
        if next(epochs) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit(recipe, dataset=digits, before_epoch=stops, progress=False)
    mine = run_folder(recipe)
    if not same:
        state, facts = read_tensors(mine / "checkpoint.safetensors", "a checkpoint")
        facts["history"][0]["loss"] += 1
        write_tensors(mine / "checkpoint.safetensors", "a checkpoint", state, facts)
        path = mine / "snapshots/epoch-0001.safetensors"
        assert path.exists()
        tensors, said = read_tensors(path, SNAPSHOT)
        write_tensors(path, SNAPSHOT, {name: 2 * each for name, each in tensors.items()}, said)
    leg(folder, profile=profile)
    found = contents(mine.parent)
    snapshots = {name: content for name, content in theirs.items() if "/snapshots/" in name}
    assert len(snapshots) == 3
    assert {name: content for name, content in found.items() if "/snapshots/" in name} == snapshots


@pytest.mark.parametrize("finished", [True, False])
def test_a_training_on_other_data_does_not_give_way(home, tmp_path, finished):
    """It would be lost, and the leg could not go on with the one from there."""
    home("there")
    profile = load_profile("tiny")
    leg(tmp_path / "pack", 1000 if finished else 12)
    home("here")
    recipe, digits = profile.recipes["ce"], data.load_dataset("digits")
    other = replace(digits, train_images=255 - digits.train_images)
    with pytest.raises(KeyboardInterrupt):
        fit(recipe, dataset=other, before_epoch=Mock(side_effect=[None, KeyboardInterrupt]), progress=False)
    before = contents(run_folder(recipe))
    with pytest.raises(ValueError, match=r"--into: expected of the run \S+ one on the training data .* got one on"):
        leg(tmp_path / "pack")
    assert contents(run_folder(recipe)) == before


def test_what_is_no_counterexample_is_named(tmp_path):
    path = tmp_path / "counterexample-fmn-1.safetensors"
    write_tensors(path, "a counterexample", {"image": torch.zeros(1)}, {})
    with pytest.raises(ValueError, match=f"{path}: expected a counterexample, got tensors called"):
        load_counterexample(path)


@pytest.mark.parametrize("how", ["junk", "of another recipe", "no weights", "a folder alone", "a folder in its place"])
def test_a_run_that_could_not_be_loaded_is_refused_before_anything_is_moved(home, tmp_path, how):
    place, profile, unpacked = home("here"), load_profile("tiny"), tmp_path / "unpacked"
    mine = run_folder(profile.recipes["ce"])
    leg(tmp_path / "pack", 12)
    (mine / "snapshots").mkdir(exist_ok=True)
    (mine / "snapshots/x").write_text("x", encoding="utf-8")
    theirs = unpacked / "runs" / mine.name
    theirs.mkdir(parents=True)
    if how == "of another recipe":
        facts = {"epoch": 10**9, "recipe": {"method": "nonsense"}, "history": []}
        write_tensors(theirs / "checkpoint.safetensors", "a checkpoint", {"x": torch.zeros(1)}, facts)
    elif how == "no weights":
        (theirs / "history.csv").write_text("epoch,loss\n1,0.5\n", encoding="utf-8")
    elif how == "junk":
        (theirs / "run.json").write_text("junk", encoding="utf-8")
    elif how == "a folder in its place":
        (theirs / "run.json").mkdir()
    expected = "of runs and tables, got one with" if "folder" in how else "of runs that are whole, got "
    before = contents(place)
    with pytest.raises(ValueError, match=f"--into: expected a pack {expected}"):
        leg_module._restore(unpacked, place, profile)
    assert contents(place) == before


@pytest.mark.parametrize("lost", ["tables", "run.json"])
def test_a_pack_is_not_replaced_by_one_that_lacks_what_was_there(carried, home, monkeypatch, lost):
    home("here")

    def moved(profile):
        # not before the leg has seen it
        if len(calls := [*seen, 1]) == 2:
            gone = run_folder(profile.recipes["ce"]) / lost
            gone.rename(gone.with_name(f"{lost}-moved"))
        seen[:] = calls
        return []

    before, seen = contents(carried), []
    monkeypatch.setattr(leg_module, "steps_left", moved)
    with pytest.raises(ValueError, match=r"expected the file that this leg has seen there, got none: .* stays"):
        leg(carried)
    assert contents(carried) == before


def test_a_table_of_other_columns_is_not_done(whole, home):
    place = home("here")
    shutil.copytree(whole / "results", place / "results")
    profile, table = load_profile("tiny"), place / "results/tiny/certificates-prototypes.csv"
    made = check_sidecar(table)["made"]
    assert is_written(table.parent, profile, "certificates", "prototypes")
    write_rows(table, pd.DataFrame({"a": [1]}), made)
    assert not is_written(table.parent, profile, "certificates", "prototypes")
