"""A copy of what the pipeline reads, and the project's commands run in it."""

import gc
import io
import os
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable
from contextlib import chdir, redirect_stderr, redirect_stdout
from pathlib import Path
from subprocess import CompletedProcess
from unittest.mock import patch

from tools import execute as executing

ROOT = Path(__file__).resolve().parents[1]
PARTS = (
    "clustr_core", "tools", "notebooks", "profiles", "proofs", "slurm", "myst.yml", "Snakefile", "pyproject.toml"
)  # fmt: skip


def copy_of_the_book(to: Path) -> Path:
    """What the pipeline reads, without the chapters' twins."""
    for part in PARTS:
        if (ROOT / part).is_dir():
            shutil.copytree(ROOT / part, to / part, ignore=shutil.ignore_patterns("__pycache__", "*.ipynb"))
        else:
            shutil.copy(ROOT / part, to / part)
    return to


def environment(home: Path) -> dict[str, str]:
    """What a command of the project finds in a copy of the project, or in a folder that has none of its code."""
    where = home if (home / "clustr_core").exists() else ROOT
    return {"CLUSTR_HOME": str(home), "PYTHONPATH": str(where), "OMP_NUM_THREADS": "1"}


def run(home: Path, *arguments: str) -> CompletedProcess[str]:
    """A module of the project, in a copy of the project."""
    command = [sys.executable, "-m", *arguments]
    options = {"cwd": home, "env": os.environ | environment(home)}
    return subprocess.run(command, **options, capture_output=True, text=True, timeout=900, check=False)


def called(main: Callable[[list[str]], int], home: Path, *arguments: str) -> CompletedProcess[str]:
    """A command of the project in a copy of the project, in this process, whose environment stays as it was."""
    told, said = io.StringIO(), io.StringIO()
    with (
        patch.dict(os.environ, environment(home)),
        patch.object(sys, "path", [*sys.path]),
        chdir(home),
        warnings.catch_warnings(action="default"),
        redirect_stdout(told),
        redirect_stderr(said),
    ):
        status = main(list(arguments))
    return CompletedProcess(arguments, status, told.getvalue(), said.getvalue())


def planned(home: Path, *arguments: str) -> CompletedProcess[str]:
    """A dry run of the pipeline in a copy of the project."""
    return called(_snakemake, home, "-n", *arguments)


def _snakemake(arguments: list[str]) -> int:
    # loaded where it is wanted: it takes two seconds
    from snakemake import cli

    try:
        cli.main(arguments)
    except SystemExit as end:
        return int(end.code or 0)
    finally:
        # its temporary folders, which it leaves to the collector: else another test is told of them
        gc.collect()
    return 0


def execute(home: Path, stem: str, profile: str = "smoke", *given: str) -> CompletedProcess[str]:
    """Run one chapter of a home, in a kernel of its own."""
    output = f"_build/{profile}/{stem}.ipynb"
    command = (f"notebooks/{stem}.md", "--profile", profile, "--output", output)
    return called(executing.main, home, *command, *given)
