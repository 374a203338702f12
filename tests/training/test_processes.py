"""Two processes are one: the same batches, clusters, losses, tables; what is lost is done again, and nothing else."""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import several
import torch
from book_copy import called, run
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from clustr_core.cli import main
from clustr_core.models.encoders import build_encoder
from clustr_core.storage.files import read_json, write_json
from clustr_core.training.processes import ALONE, TORCHRUN, Processes, count, device_here, is_first, join
from clustr_core.training.recipes import Clustr
from clustr_core.training.run import load_run

ROOT = Path(__file__).resolve().parents[2]
# sums of float32 taken in another order, through some 30 steps; larger than any difference seen by a factor of 20
LOSS, WEIGHTS = 1e-5, 1e-4


@pytest.fixture(scope="module")
def launch() -> Iterator[Callable[..., list[int]]]:
    """Has two processes do tasks in a folder: how they end. They are forked from one that has loaded PyTorch."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(ROOT / "tests/training/several.py")]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(command, env=environment, text=True, **pipes) as server:

        def ended(folder: Path, *tasks: str) -> list[int]:
            print(json.dumps([str(folder), tasks]), file=server.stdin, flush=True)
            return json.loads(server.stdout.readline())

        yield ended


def said(folder: Path) -> str:
    """All that the processes of a folder printed."""
    return (folder / "output").read_text()


def told(folder: Path, task: str) -> list[dict]:
    """What each of two processes found."""
    return [read_json(folder / f"{task}-{rank}.json") for rank in (0, 1)]


@pytest.fixture(scope="module")
def two(launch, tmp_path_factory) -> Path:
    """All that two processes do when nobody dies."""
    folder = tmp_path_factory.mktemp("two")
    assert launch(folder, "gather", "train") == [0, 0], said(folder)
    return folder


@pytest.fixture(scope="module")
def one(tmp_path_factory) -> Path:
    """The same in this process."""
    folder = tmp_path_factory.mktemp("one")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CLUSTR_HOME", str(folder / "home"))
        for name, recipe in (several.RECIPES | {"bf16": several.BF16}).items():
            several.fit(recipe, folder / name)
    return folder


@pytest.mark.parametrize("name", several.RECIPES)
def test_two_processes_train_as_one(name, one, two):
    ours, theirs = (load_run(folder / name, expected=several.RECIPES[name]) for folder in (one, two))
    # loss, magnet, and of each epoch's clusters the variance and which examples they made the batches of
    assert theirs.history.columns.tolist() == ours.history.columns.tolist()
    for column in ours.history:
        assert theirs.history[column].tolist() == pytest.approx(ours.history[column].tolist(), rel=LOSS), column
    # Adam makes full steps of gradients that are nothing but rounding: that of the last bias under the magnet loss,
    # which does not see where all embeddings lie together
    if "adam" not in name:
        first, second = (load_file(folder / name / "model.safetensors") for folder in (one, two))
        for key, tensor in first.items():
            torch.testing.assert_close(second[key], tensor, rtol=WEIGHTS, atol=WEIGHTS)
    assert read_json(two / name / "run.json")["processes"] == 2
    assert read_json(one / name / "run.json")["processes"] == 1


def test_bfloat16_is_shared_like_float32(one, two):
    losses = [load_run(folder / "bf16").history["loss"].tolist() for folder in (one, two)]
    # a unit of bfloat16 is 1/256 of a number, and here another sum decides how some are rounded
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)
    plain = load_run(one / "pgd-at").history["loss"].tolist()
    assert losses[0] != plain
    assert losses[0] == pytest.approx(plain, rel=1e-2)


def test_both_processes_hold_the_same_at_the_end(two):
    first, second = told(two, "train")
    assert first == second
    for name, recipe in {**several.RECIPES, "long": several.LONG}.items():
        # one sampler of clusters an epoch, whose random state and losses are part of what is compared
        expected = recipe.epochs if isinstance(recipe, Clustr) else 0
        assert first[f"{name} samplers"] == expected
    assert first["clustr"] != first["clustr, adam"]


def test_batch_norm_on_cpus_says_what_it_is(two):
    expected = "batch norm: 2 processes on CPUs, each with the statistics of its own rows"
    assert said(two).count(expected) == 1
    run = load_run(two / "batch-norm")
    assert run.history["loss"].map(math.isfinite).all()


def test_batch_norm_on_gpus_sees_the_whole_batch():
    """As far as it goes without one: the layers are PyTorch's synchronised ones, with the weights they had."""
    network = build_encoder("resnet18", (1, 8, 8), width=2)
    before = dict(network.named_parameters())
    assert Processes(torch.device("cuda", 0), 0, 2).prepared(network) == []
    kinds = {type(layer) for layer in network.modules() if isinstance(layer, torch.nn.modules.batchnorm._BatchNorm)}
    assert kinds == {torch.nn.SyncBatchNorm}
    assert all(after is before[name] for name, after in network.named_parameters())


def test_each_row_is_some_process_own_once(two):
    first, second = told(two, "gather")
    # of one row, of two, of five: what a process computes, and what of it counts
    assert first["parts"] == {"1": [[0], [0]], "2": [[0], [0]], "5": [[0, 1, 2], [0, 1, 2]]}
    assert second["parts"] == {"1": [[0], []], "2": [[1], [1]], "5": [[3, 4, 0], [3, 4]]}
    assert first["word"] == second["word"] == "said by 0"


@given(total=st.integers(1, 40), count=st.integers(1, 9))
def test_parts_together_are_the_whole(total, count):
    rows = torch.arange(total)
    processes = [Processes(torch.device("cpu"), rank, count) for rank in range(count)]
    parts = [each.shard(rows) for each in processes]
    assert len({len(part) for part in parts}) == 1
    assert all(len(part) for part in parts)
    assert torch.equal(torch.cat(parts)[:total], rows)
    unpadded = [each.unpadded_shard(part, total) for each, part in zip(processes, parts, strict=True)]
    assert torch.equal(torch.cat(unpadded), rows)


@pytest.mark.parametrize("penalty", [False, True])
def test_the_gradient_through_a_gathered_batch_is_that_of_one_process(two, penalty):
    """Double precision, so that a factor, a lost row or a row counted twice could not hide; and the gradient's own."""
    expected = several.magnet_gradient(ALONE, penalty=penalty)
    assert expected.norm() > 0.1
    for process in told(two, "gather"):
        torch.testing.assert_close(
            torch.tensor(process["gradients"][str(penalty)], dtype=torch.float64), expected, rtol=1e-12, atol=1e-13
        )


def test_one_process_asks_nobody_and_loads_nothing():
    code = """
import sys
from clustr_core.measuring import attacked, certified
from clustr_core.training import loop
from clustr_core.training.processes import join
rows = __import__("torch").arange(3.0)
alone = join("cpu")
assert alone.shard(rows) is alone.gathered(rows, 3) is rows and alone.first and alone.count == 1
assert alone.from_first(lambda: 7) == 7
print(any(name.startswith("lightning") for name in sys.modules))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout == "False\n"


def test_several_processes_do_not_share_a_gpu(monkeypatch):
    for name in (*TORCHRUN, "WORLD_SIZE"):
        monkeypatch.setenv(name, "2" if "WORLD_SIZE" in name else "1")
    assert device_here("cpu") == torch.device("cpu")
    assert device_here("cuda") == device_here("cuda:1") == torch.device("cuda", 1)
    with pytest.raises(ValueError, match="device: expected cuda, of which each of 2 processes has one, got cuda:0"):
        device_here("cuda:0")


# measurements


@pytest.fixture(scope="module")
def measured(launch, one, tmp_path_factory) -> Path:
    """The runs of one process, measured by two; the second died during the first attacks."""
    folder = tmp_path_factory.mktemp("measured")
    for name in several.MEASURED:
        shutil.copytree(one / name, folder / name)
    first, second = launch(folder, "lose-an-attack")
    assert second == -signal.SIGKILL
    assert first
    left = {path: path.stat().st_mtime_ns for path in folder.rglob("tables/*.csv")}
    assert left
    assert launch(folder, "measure") == [0, 0], said(folder)
    # what the lost process and the one that waited for it had made is there still, and untouched
    assert left.items() <= {path: path.stat().st_mtime_ns for path in folder.rglob("tables/*.csv")}.items()
    write_json(folder / "left.json", {"left": sorted(map(str, left))})
    return folder


def test_two_processes_measure_as_one_and_nothing_twice(one, measured, monkeypatch):
    first, second = told(measured, "measure")
    alone = several.tables(one)
    assert set(alone["tables"]) == {
        *(f"certificates-{name}" for name in several.MEASURED),
        *(f"attacks-{name}" for name in several.MEASURED if name != "smoothing"),
        "sandwich-clustr-cert",
        "sandwich-lip-linear",
    }
    assert first["tables"] == second["tables"] == alone["tables"]
    left = read_json(measured / "left.json")["left"]
    made = [*left, *first["made"], *second["made"]]
    assert len(made) == len(set(made)) == len(alone["made"])
    assert {Path(path).name for path in made} == {Path(path).name for path in alone["made"]}
    assert abs(len(first["made"]) - len(second["made"])) <= len(alone["tables"]) * 2


def test_a_lost_process_ends_the_training_and_two_others_go_on(launch, two, tmp_path):
    first, second = launch(tmp_path, "lose-a-training")
    assert second == -signal.SIGKILL
    assert first
    assert not (tmp_path / "lost/run.json").exists()
    assert launch(tmp_path, "resume") == [0, 0], said(tmp_path)
    assert [process["epochs"] for process in told(tmp_path, "resume")] == [4, 4]
    for name in ("model.safetensors", "history.csv", "checkpoint.safetensors"):
        assert (tmp_path / "lost" / name).read_bytes() == (two / "long" / name).read_bytes(), name


def test_of_several_processes_at_the_command_line_one_speaks_and_writes(tmp_path):
    (tmp_path / "profiles").mkdir()
    (tmp_path / "profiles/tiny.yaml").write_text(
        "shared: {dataset: digits, width: 4, train_examples: 150}\n"
        "methods:\n  ce: {epochs: 1}\n"
        "attacks:\n  linf: {norm: linf, eps: [0.1], steps: 2, examples: 20}\n"
    )
    command = ["attack", "--profile", "tiny", "--method", "ce", "--device", "cpu"]
    two = ["torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m", "clustr_core.cli"]
    spoken, tables = [], []
    for number, begin in enumerate((lambda home: run(home, *two, *command), lambda home: called(main, home, *command))):
        home = shutil.copytree(tmp_path / "profiles", tmp_path / str(number) / "profiles").parent
        done = begin(home)
        assert done.returncode == 0, done.stderr[-4000:]
        spoken.append(done.stdout)
        tables.append((home / "results/tiny/attacks-ce.csv").read_bytes())
    # before it, Gloo of older versions of PyTorch says that it is connected
    assert spoken[0].endswith(spoken[1])
    assert spoken[0].count("wrote results/tiny/attacks-ce.csv (80 rows)") == 1
    assert tables[0] == tables[1]


@pytest.mark.parametrize(
    ("left", "said"),
    [
        (
            {"WORLD_SIZE": "2", "RANK": "1"},
            "WORLD_SIZE=2 without LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR, MAS",
        ),
        ({"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0"}, "WORLD_SIZE=2 without LOCAL_WORLD_SIZE, MASTER_ADDR"),
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE=2 without RANK, LOCAL_RANK"),
        ({"RANK": "1"}, r"expected RANK in 0\.\.WORLD_SIZE-1, got .*'RANK': '1', 'WORLD_SIZE': '1'"),
        ({"RANK": "1", "WORLD_SIZE": "1"}, r"expected RANK in 0\.\.WORLD_SIZE-1"),
        ({"RANK": "one", "WORLD_SIZE": "2"}, r"expected RANK in 0\.\.WORLD_SIZE-1"),
    ],
)
def test_variables_of_torchrun_that_were_left_behind_are_refused(left, said, tmp_path, monkeypatch):
    for name in (*TORCHRUN, "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in left.items():
        monkeypatch.setenv(name, value)
    for ask in (count, is_first, join, lambda: several.fit(several.START, tmp_path / "run")):
        with pytest.raises(ValueError, match=f"environment: .*{said}"):
            ask()
    assert not (tmp_path / "run").exists()


def test_the_shell_says_so_in_one_line(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    done = run(tmp_path, "clustr_core.cli", "train", "--method", "ce")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("clustr: environment: expected all that torchrun sets, got WORLD_SIZE=2 without ")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("left", [{}, {"RANK": "0"}, {"RANK": "0", "WORLD_SIZE": "1"}, {"WORLD_SIZE": "1"}])
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_one_process_is_alone_whatever_else_is_left(left, precision, monkeypatch):
    for name, value in left.items():
        monkeypatch.setenv(name, value)
    processes = join("cpu", precision)
    assert (processes.rank, processes.count, count(), is_first()) == (0, 1, 1, True)
    assert processes.computed(lambda x: x @ x, torch.ones(2, 2)).tolist() == [[2, 2], [2, 2]]


def test_rounded_weights_are_those_of_the_last_update():
    # an autocast inside another keeps what it has rounded until the outer one ends
    processes, weights = join("cpu", "bf16-mixed"), torch.nn.Linear(2, 1, bias=False)
    with processes.in_precision():
        for value in (1.0, 2.0):
            with torch.no_grad():
                weights.weight.fill_(value)
            assert processes.computed(weights, torch.ones(1, 2)).item() == 2 * value


def test_a_training_in_one_process_repeats_its_convolutions():
    with join("cpu").in_precision():
        assert torch.backends.cudnn.deterministic
    assert not torch.backends.cudnn.deterministic
