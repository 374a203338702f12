"""A copy of what the pipeline reads, and the project's commands run in it."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

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


def run(home: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """A module of the project, in a copy of the project."""
    environment = os.environ | {"CLUSTR_HOME": str(home), "PYTHONPATH": str(home), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", *arguments]
    return subprocess.run(command, cwd=home, env=environment, capture_output=True, text=True, timeout=900, check=False)


def execute(home: Path, stem: str, profile: str = "smoke") -> subprocess.CompletedProcess[str]:
    """Run one chapter of a home."""
    output = f"_build/{profile}/{stem}.ipynb"
    return run(home, "tools.execute", f"notebooks/{stem}.md", "--profile", profile, "--output", output)
