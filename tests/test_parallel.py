"""Two processes are one: the same batches, clusters, losses, tables; what is lost is done again, and nothing else."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import several
import torch
from safetensors.torch import load_file

from clustr_core import data, evaluation, parallel, records, training
from clustr_core.parallel import Processes

ROOT = Path(__file__).resolve().parents[1]
# sums of float32 taken in another order, through some 30 steps; larger than any difference seen by a factor of 20
LOSS, WEIGHTS = 1e-5, 1e-4


def launch(folder: Path, *tasks: str, count: int = 2) -> subprocess.CompletedProcess[str]:
    """Processes of their own, as torchrun starts them."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={count}"]
    command += [str(ROOT / "tests/several.py"), str(folder), *tasks]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "CLUSTR_HOME": str(folder / "home")}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)


def told(folder: Path, task: str) -> list[dict]:
    """What each of two processes said."""
    return [records.read_json(folder / f"{task}-{rank}.json") for rank in (0, 1)]


@pytest.fixture(scope="module")
def two(tmp_path_factory) -> Path:
    """All that two processes do when nobody dies."""
    folder = tmp_path_factory.mktemp("two")
    done = launch(folder, "gather", "train")
    assert done.returncode == 0, done.stderr[-4000:]
    (folder / "stderr").write_text(done.stderr)
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
    ours, theirs = (training.load_run(folder / name, expected=several.RECIPES[name]) for folder in (one, two))
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
    assert records.read_json(two / name / "run.json")["processes"] == 2
    assert records.read_json(one / name / "run.json")["processes"] == 1
