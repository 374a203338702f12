"""A copy of what the pipeline reads, and the project's commands run in it."""

import io
import os
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import NamedTuple

import pytest

from tools import execute as executing

ROOT = Path(__file__).resolve().parents[1]
PARTS = (
    "clustr_core", "tools", "notebooks", "profiles", "proofs", "slurm", "myst.yml", "Snakefile", "pyproject.toml"
)  # fmt: skip


class Done(NamedTuple):
    """How a command ended, and what it said."""

    returncode: int
    stdout: str
    stderr: str


def copy_of_the_book(to: Path) -> Path:
    """What the pipeline reads, without the chapters' twins."""
    for part in PARTS:
        if (ROOT / part).is_dir():
            shutil.copytree(ROOT / part, to / part, ignore=shutil.ignore_patterns("__pycache__", "*.ipynb"))
        else:
            shutil.copy(ROOT / part, to / part)
    return to


def run(home: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """A module of the project, in a copy of the project."""
    environment = os.environ | {"CLUSTR_HOME": str(home), "PYTHONPATH": str(home), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", *arguments]
    return subprocess.run(command, cwd=home, env=environment, capture_output=True, text=True, timeout=900, check=False)


def called(main: Callable[[list[str]], int], home: Path, *arguments: str) -> Done:
    """A command of the project in a copy of the project, in this process: what it starts is begun as from a shell."""
    told, said = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(told), redirect_stderr(said):
        # the last three are set by the command itself
        for name in ("CLUSTR_HOME", "PYTHONPATH", "CLUSTR_PROFILE", "JUPYTER_PREFER_ENV_PATH", "MPLBACKEND"):
            patch.setenv(name, str(home))
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.chdir(home)
        with warnings.catch_warnings():
            warnings.simplefilter("default")
            status = main(list(arguments))
    return Done(status, told.getvalue(), said.getvalue())


def execute(home: Path, stem: str, profile: str = "smoke", *given: str) -> Done:
    """Run one chapter of a home, in a kernel of its own."""
    output = f"_build/{profile}/{stem}.ipynb"
    command = (f"notebooks/{stem}.md", "--profile", profile, "--output", output)
    return called(executing.main, home, *command, *given)
