"""Suites about the book as a whole: what importing the package takes, and what a chapter takes."""

import subprocess
import sys
from functools import partial
from pathlib import Path

from benchmarks.harness import Effort, Row, interleaved, seconds
from clustr_core.measuring.profile import load_profile
from clustr_core.training.recipes import run_folder

CONTRACT = (
    "numerics.distances", "models.clusters", "training.sampling", "training.losses", "models.encoders",
    "models.classifiers", "certificates.lipschitz", "certificates.ladder", "attacks.gradient", "models.official",
    "data",
)  # fmt: skip
ROOT = Path(__file__).resolve().parents[1]


def imports(effort: Effort) -> list[Row]:
    """Importing all modules that others call, beside importing PyTorch, in fresh processes."""
    ours = "import " + ", ".join(f"clustr_core.{module}" for module in CONTRACT)
    effort = Effort(effort.pick(9, 1), 60.0, effort.quick)
    calls = {"torch": partial(_python, "import torch"), "ours": partial(_python, ours)}
    times = interleaved(calls, effort)
    setting = f"{len(CONTRACT)} modules; {times.median('torch'):.2f} s for PyTorch"
    compared = "import of clustr_core / import of torch"
    return [Row("imports", "import", times.ratio("ours", "torch"), "ratio", compared, setting, 1.15, times.rounds)]


def chapters(effort: Effort) -> list[Row]:
    """Every chapter whose runs are finished, executed as the pipeline does."""
    profile = "quick"
    finished = all((run_folder(recipe) / "run.json").exists() for recipe in load_profile(profile).recipes.values())
    rows = []
    sources = sorted((ROOT / "notebooks").glob("[0-9]*.md"))
    for source in sources[: effort.pick(len(sources), 0)]:
        command = ["-m", "tools.execute", f"notebooks/{source.name}", "--profile", profile]
        output = f"_build/bench/{source.stem}.ipynb"
        taken = seconds(partial(_python, *command, "--output", output)) if finished else float("nan")
        setting = f"profile {profile}, " + ("runs finished" if finished else "runs missing: make figures")
        rows.append(Row("chapters", source.stem, taken, "s", "executing a chapter", setting, 20.0))
    return rows


def _python(*arguments: str) -> None:
    command = [sys.executable, *(["-c"] if not arguments[0].startswith("-") else []), *arguments]
    subprocess.run(command, check=True, capture_output=True, cwd=ROOT)
