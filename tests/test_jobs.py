"""The pipeline as jobs: what each asks of a cluster; and a job that is lost is one job run again, from where it was."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from book_copy import ROOT, copy_of_the_book, environment, planned
from disk import contents
from snakemake_executor_plugin_slurm.submit_string import get_submit_command
from snakemake_executor_plugin_slurm.utils import set_gres_string

from clustr_core.measuring.profile import load_profile
from clustr_core.training.recipes import run_key
from clustr_core.training.state import epochs_kept


def epochs_done(checkpoint):
    """How many epochs a checkpoint holds."""
    return epochs_kept(checkpoint)


PROFILE = """\
shared: {dataset: digits, width: 8, train_examples: 400}
methods:
  ce: {epochs: 2}
  pgd-at: {epochs: 8, eps: 0.1, step_size: 0.05, steps: 4}
attacks:
  linf: {norm: linf, eps: [0.05, 0.1, 0.2], steps: 8, restarts: 2, losses: [ce, margin]}
"""


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """A copy of what the pipeline reads."""
    return copy_of_the_book(tmp_path)


# what a cluster is asked for


def jobs_of(home: Path, *config: str) -> list[dict]:
    """Every job of a dry run under the Slurm profile, as the executor plugin is given it."""
    # unlike a real run on a cluster, a dry one would cut threads to a single core
    done = planned(home, "--workflow-profile", "slurm", "-p", "--cores", "64", "--config", *config)
    assert done.returncode == 0, done.stderr[-4000:]
    jobs = []
    for text in re.split(r"^(?:local)?rule ", done.stdout + done.stderr, flags=re.M)[1:]:
        resources = re.search(r"^    resources: (.*)$", text, re.M)
        asked = dict(pair.split("=") for pair in (resources[1].split(", ") if resources else []))
        threads = re.search(r"^    threads: (\d+)$", text, re.M)
        jobs.append(
            {
                "rule": text.partition(":")[0],
                "threads": int(threads[1]) if threads else 1,
                "resources": {name: int(value) for name, value in asked.items() if value.isdecimal()},
                "text": text,
            }
        )
    return jobs


def sbatch(job: dict) -> str:
    """The submission that the executor plugin makes of a job."""
    words = ("run_uuid", "slurm_logfile", "comment_str", "account", "partition", "workdir")

    class Resources(dict):
        __getattr__ = dict.__getitem__

    given = SimpleNamespace(resources=Resources(job["resources"]), threads=job["threads"])
    return get_submit_command(given, dict.fromkeys(words, "")) + set_gres_string(given)


WORK = ("train", "attack", "diagnose", "certify", "sandwich")


def test_each_job_asks_slurm_for_its_gpu_memory_and_time(home: Path) -> None:
    jobs = jobs_of(home, "profile=paper")
    recipes = load_profile(ROOT / "profiles/paper.yaml").recipes
    assert sum(job["rule"] == "train" for job in jobs) == len({run_key(recipe) for recipe in recipes.values()})
    assert {job["rule"] for job in jobs} > set(WORK)
    for job in jobs:
        asked, line = job["resources"], sbatch(job)
        if job["rule"] in WORK:
            assert (asked["gpu"], asked["nodes"], job["threads"]) == (1, 1, 1)
            assert asked["mem_mb"] >= 8000
            assert asked["runtime"] >= 480
            assert "--gpus=1" in line
        elif job["rule"] != "all":
            assert (asked["mem_mb"], asked["runtime"]) == (4000, 60)
        if job["rule"] != "all":
            assert f"-t {asked['runtime']} --mem {asked['mem_mb']} " in line
            assert ("--gpus" in line) == (job["rule"] in WORK)
            assert "--cpus-per-task=1" in line


def test_eight_processes_ask_for_eight_gpus_of_one_machine(home: Path) -> None:
    jobs = jobs_of(home, "profile=paper", "processes=8")
    shared = "-m torch.distributed.run --standalone --nproc_per_node=8 -m clustr_core"
    for job in jobs:
        if job["rule"] in WORK and job["rule"] != "diagnose":
            assert f"{shared} {job['rule']} --profile paper" in job["text"]
            assert (job["resources"]["gpu"], job["resources"]["nodes"], job["threads"]) == (8, 1, 8)
            assert all(word in sbatch(job) for word in ("--gpus=8", "--nodes=1", "--cpus-per-task=8"))
        elif job["rule"] == "diagnose":
            assert shared not in job["text"]
            assert job["resources"]["gpu"] == 1


def test_a_small_profile_asks_for_no_gpu(home: Path) -> None:
    for job in jobs_of(home, "profile=smoke"):
        if job["rule"] in WORK:
            assert job["resources"]["gpu"] == 0
            assert job["resources"]["mem_mb"] == 4000
            assert "--gpus" not in sbatch(job)
            assert "--ntasks=1" in sbatch(job)


# a job that is lost


@pytest.fixture
def start(home: Path) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Start the pipeline, up to two tables of attacks; nothing of it outlives the test."""
    begun: list[subprocess.Popen[str]] = []

    def pipeline(*config: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "snakemake", "--cores", "2", "--config", "profile=lost", *config]
        command += ["--keep-incomplete", "--rerun-incomplete", "--keep-going", "--nolock", "--"]
        command += ["_build/lost/done/attacks-ce", "_build/lost/done/attacks-pgd-at"]
        options = {"cwd": home, "env": os.environ | environment(home), "start_new_session": True, "text": True}
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        begun.append(subprocess.Popen(command, **options, **pipes))
        return begun[-1]

    yield pipeline
    for process in begun:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def said(process: subprocess.Popen[str]) -> tuple[str, dict[str, int]]:
    """All that the pipeline says, and how many jobs of each rule it has begun."""
    text, _ = process.communicate(timeout=120)
    rules = re.findall(r"^(?:local)?rule (\w+):$", text, re.M)
    return text, {name: rules.count(name) for name in rules}


def kill(home: Path, *words: str) -> None:
    """SIGKILL to the job of this home whose command has these words."""
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            command = (folder / "cmdline").read_text().split("\0")
            if (folder / "cwd").resolve() == home and {"clustr_core", *words} <= set(command):
                os.kill(int(folder.name), signal.SIGKILL)
                return
        except (OSError, ProcessLookupError):
            continue
    raise AssertionError(f"no job {words} in {home}")


def wait_until(true, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 60
    while not true():
        assert process.poll() is None, process.stdout.read()
        assert time.monotonic() < deadline
        time.sleep(0.005)


def times(folder: Path) -> dict[str, int]:
    return {str(path): path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


def test_a_lost_training_and_a_lost_attack_go_on_and_nothing_else_runs(home: Path, start) -> None:
    (home / "profiles/lost.yaml").write_text(PROFILE)
    recipes = load_profile(home / "profiles/lost.yaml").recipes
    ce, pgd = (home / "runs" / run_key(recipes[name]) for name in ("ce", "pgd-at"))
    pipeline = start()
    wait_until(lambda: (pgd / "checkpoint.safetensors").exists(), pipeline)
    wait_until(lambda: epochs_done(pgd / "checkpoint.safetensors") >= 2, pipeline)
    kill(home, "train", "pgd-at")
    wait_until(lambda: len(list(ce.glob("tables/*.csv"))) >= 2, pipeline)
    kill(home, "attack", "ce")
    text, rules = said(pipeline)
    assert pipeline.returncode != 0
    assert rules == {"train": 2, "attack": 1}, text
    # lost are the rest of the epoch, and of the chunk
    epoch, before, pieces = epochs_done(pgd / "checkpoint.safetensors"), times(ce), len(list(ce.glob("tables/*.csv")))
    assert 2 <= epoch < 8
    assert 2 <= pieces < 36
    assert not (pgd / "run.json").exists()
    assert not (home / "results").exists()

    pipeline = start()
    text, rules = said(pipeline)
    assert pipeline.returncode == 0, text
    assert rules == {"train": 1, "attack": 2}, text
    assert f"{pgd.name}: going on after epoch {epoch}" in text
    # nothing that was there has been touched, and the pieces that were missing have been made
    assert before.items() <= times(ce).items()
    # cross-entropy is attacked with two heads
    assert [len(list(folder.glob("tables/*.csv"))) for folder in (ce, pgd)] == [36, 18]
    assert {path.name for path in (home / "results/lost").glob("*.csv")} == {"attacks-ce.csv", "attacks-pgd-at.csv"}

    after = contents(home / "runs"), contents(home / "results")
    text, rules = said(start("processes=2"))
    assert "Nothing to be done" in text
    assert rules == {}
    assert (contents(home / "runs"), contents(home / "results")) == after


def test_what_is_done_is_told_by_what_files_say(home: Path, start) -> None:
    """Runs and tables that were copied in any order are kept; those of another question are made anew, whoever wrote
    them."""
    (home / "profiles/lost.yaml").write_text(PROFILE)
    text, _ = said(pipeline := start())
    assert pipeline.returncode == 0, text
    runs, results = contents(home / "runs"), contents(home / "results")

    # as a copy leaves them: runs later than tables, the checkpoints left behind, nothing of the pipeline's own
    shutil.rmtree(home / ".snakemake")
    for run in (home / "runs").glob("*/run.json"):
        run.touch()
    text, rules = said(start())
    assert rules == {}, text
    assert (contents(home / "runs"), contents(home / "results")) == (runs, results)

    # measured by hand under another protocol, and the profile put back: the pipeline had made the table itself
    profile = home / "profiles/lost.yaml"
    profile.write_text(PROFILE.replace("steps: 8", "steps: 2"))
    command = [sys.executable, "-m", "clustr_core", "attack", "--profile", "lost", "--method", "pgd-at"]
    subprocess.run(command, cwd=home, env=os.environ | environment(home), check=True, capture_output=True)
    assert contents(home / "results") != results
    profile.write_text(PROFILE)
    text, rules = said(start())
    assert rules == {"attack": 1}, text
    assert {path: bytes_ for path, bytes_ in contents(home / "results").items() if str(path).endswith(".csv")} == {
        path: bytes_ for path, bytes_ in results.items() if str(path).endswith(".csv")
    }

    # nothing is made anew, and so nothing removed, where a run that is finished is damaged
    kept = contents(home / "results")
    (weights,) = (home / "runs").glob("*-pgd-at-*/model.safetensors")
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    text, rules = said(start())
    assert rules == {}, text
    assert re.search(r"model\.safetensors: expected the file of sha256 \w{10}, as run\.json says, got", text)
    weights.unlink()
    text, rules = said(start())
    assert rules == {}, text
    assert "model.safetensors: expected the weights of a finished run, got none" in text
    assert contents(home / "results") == kept
