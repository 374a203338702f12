"""A quarter of an hour on a GPU, used well: stages under limits of their own, each result kept as soon as it is there.

    python -m tools.gpu --into DIR [--stages tests kernels steps leg] [--minutes 14] [--profile gpu] [--half] [--toy]

tests    what is marked ``gpu``
kernels  the GPU kernels beside plain PyTorch, eager and compiled: kernels.csv
steps    epochs of the headline methods, captured as CUDA graphs and not, and attacks, beside bare loops: gpu-steps.csv
leg      as much of a profile as fits into what is left: `clustr leg`, whose pack in DIR/leg the next leg goes on from

A stage that fails or runs out of time takes nothing from the others; DIR holds what each said (STAGE.log) and made.
What is left of one that runs out of time is killed; a leg that is asked to end packs first. ``--toy`` tries all of it
on a CPU: the tests are skipped, kernels compiled and not timed, steps tiny, the leg is profile smoke's. ``--captured``
lets the leg train by CUDA graphs; take it once `steps` has shown on such a card that they are right and faster.
"""

import argparse
import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from clustr_core.storage.files import copy_whole, home, written_whole
from tools.telling import told

STAGES = ("tests", "kernels", "steps", "leg")
# of the minutes that are left when it begins, at most this share; the last stage has all of it
SHARES = {"tests": 0.15, "kernels": 0.2, "steps": 0.25, "leg": 1.0}
# what a stage leaves in results/bench
MADE = {"kernels": "kernels.csv", "steps": "gpu-steps.csv"}
# of `clustr leg`
FLAGS = ("--half", "--captured")
# tests that share the card
AT_ONCE = 6
_MARKED = re.compile(r"^(@|pytestmark = )pytest\.mark\.gpu$", re.MULTILINE)
# seconds: what a leg needs beyond its minutes, to import, to finish a piece and to pack
ROOM = 20.0
# seconds that a stage has to end once it is asked to
GRACE = 10.0


@dataclass(frozen=True)
class Done:
    """What became of a stage: "done", "failed" or "out of time"."""

    stage: str
    verdict: str
    seconds: float


def command(stage: str, seconds: float, into: Path, profile: str, flags: Sequence[str], *, toy: bool) -> list[str]:
    """What a stage runs; the leg with these flags."""
    if stage == "tests":
        # other versions than those of the constraints may warn of what is to come
        options = ["-q", "-m", "gpu", "-n", str(AT_ONCE), "-p", "no:cacheprovider", "-o", "filterwarnings=default"]
        return ["-m", "pytest", *options, *map(str, marked_files())]
    if stage == "kernels":
        return ["-m", "benchmarks.kernels", *(["--compile"] if toy else [])]
    if stage == "steps":
        return ["-m", "benchmarks.gpu_steps", *(["--toy"] if toy else [])]
    device = "cpu" if toy else "cuda"
    minutes = max(seconds - ROOM, 0.5 * seconds) / 60
    leg = ["--profile", "smoke" if toy else profile, "--minutes", f"{minutes:.2f}", "--into", str(into / "leg")]
    return ["-m", "clustr_core", "leg", *leg, "--device", device, *flags]


def marked_files() -> list[Path]:
    """The files that hold the tests marked ``gpu``: to collect all others takes half a minute."""
    tests = Path(__file__).resolve().parents[1] / "tests"
    return [path for path in sorted(tests.rglob("test_*.py")) if _MARKED.search(path.read_text(encoding="utf-8"))]


def run(stage: str, seconds: float, into: Path, asked: Sequence[str], *, made: Path | None = None) -> Done:
    """Run a stage for at most so many seconds, and keep what it says and makes."""
    begun, verdict = time.time(), "out of time"
    with written_whole(into / f"{stage}.log") as temporary, temporary.open("w", encoding="utf-8") as log:
        stage_of = {"stdout": log, "stderr": subprocess.STDOUT, "start_new_session": True}
        process = subprocess.Popen([sys.executable, *asked], cwd=home().resolve(), **stage_of)
        try:
            verdict = "failed" if process.wait(seconds) else "done"
        except subprocess.TimeoutExpired:
            _end(process)
    if made is not None and made.exists() and made.stat().st_mtime >= begun:
        copy_whole(made, into / made.name)
    return Done(stage, verdict, time.time() - begun)


def _end(process: subprocess.Popen) -> None:
    """Ask a process to end, and kill it and all that it began."""
    process.send_signal(signal.SIGINT)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(GRACE)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; 1 unless every stage is done."""
    parser = argparse.ArgumentParser(prog="python -m tools.gpu", description="A quarter of an hour on a GPU.")
    parser.add_argument("--into", type=Path, required=True, help="folder for what is made")
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=STAGES)
    parser.add_argument("--minutes", type=float, default=14.0, help="for all stages together (14)")
    parser.add_argument("--profile", default="gpu")
    for flag in FLAGS:
        parser.add_argument(flag, dest="flags", action="append_const", const=flag, default=[], help="as `clustr leg`")
    parser.add_argument("--toy", action="store_true", help="on a CPU, at toy size")
    options = parser.parse_args(arguments)
    if not options.minutes > 0:
        parser.error(f"--minutes: expected a positive number, got {options.minutes:g}")
    if not options.toy and not _has_gpu():
        print("gpu: expected a CUDA device, found none; --toy tries the stages on a CPU", file=sys.stderr)
        return 2
    options.into.mkdir(parents=True, exist_ok=True)
    into, end, found = options.into.resolve(), time.monotonic() + 60 * options.minutes, []
    for place, stage in enumerate(options.stages):
        left, last = end - time.monotonic(), place == len(options.stages) - 1
        seconds = left * (1 if last else SHARES[stage])
        asked = command(stage, seconds, into, options.profile, options.flags, toy=options.toy)
        made = home() / "results/bench" / MADE[stage] if stage in MADE and not options.toy else None
        done = run(stage, seconds, into, asked, made=made)
        print(f"{done.stage:8} {done.verdict:12} {done.seconds:6.1f} s", flush=True)
        found.append(done)
    return int(any(done.verdict != "done" for done in found))


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


if __name__ == "__main__":
    sys.exit(told(main))
