"""Run it: `make torture`, or `python -m tools.torture --only profiles images --quick`."""

import argparse
import logging
import os
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

from tools.torture import fuzz, images, kills, profiles, released, runs, trouble
from tools.torture.forks import Case, Outcome, attempt

GROUPS: dict[str, Callable[[Path, Path], Iterator[Case]]] = {
    "profiles": profiles.cases,
    "images": images.cases,
    "released": released.cases,
    "runs": runs.cases,
}


OTHERS = ("fuzz", "kills", "troubles")
# under _build
KEPT = Path(__file__).resolve().parents[2] / "_build" / "torture"


def new_book(folder: Path) -> None:
    """An empty book of its own, in which this process works from now on."""
    (folder / "profiles").mkdir(parents=True)
    (folder / "myst.yml").touch()
    os.environ["CLUSTR_HOME"] = str(folder)
    os.environ.pop("CLUSTR_DATA", None)
    os.chdir(folder)


def hostile(names: Sequence[str], folder: Path, *, every: int = 1) -> list[Outcome]:
    """The outcomes of all cases of these groups, or of every so manieth of each."""
    (canaries := folder / "canaries").mkdir(parents=True, exist_ok=True)
    outcomes = []
    for name in names:
        new_book(place := folder / name)
        cases = GROUPS[name](place, canaries)
        outcomes += [attempt(case, place, canaries) for number, case in enumerate(cases) if number % every == 0]
    return outcomes


def unthought_of(folder: Path, *, each: int = fuzz.EACH, seed: int = 0, keep: Path = KEPT) -> list[Outcome]:
    """The outcomes of so many inputs that nobody thought of for each loader.

    Args:
        keep: a folder; where the smallest input that broke a loader goes, with its book.
    """
    (canaries := folder / "canaries").mkdir(parents=True, exist_ok=True)
    outcomes = []
    for name in fuzz.LOADERS:
        new_book(place := folder / f"fuzz-{name.replace(' ', '-')}")
        found = fuzz.searched(name, place, canaries, inputs=each, seed=seed)
        if any(outcome.faults for outcome in found):
            shutil.copytree(place, keep / place.name, dirs_exist_ok=True)
        outcomes += found
    return outcomes


def faults(outcomes: Sequence[Outcome]) -> list[str]:
    """A line for each input with which something was wrong."""
    return [
        f"{each.case.group}: {each.case.name}: {'; '.join(each.faults)} | {each.message[:200]}"
        for each in outcomes
        if each.faults
    ]


def summary(outcomes: Sequence[Outcome]) -> list[str]:
    """How many inputs, and of which faults how many."""
    found = Counter(fault.partition(":")[0].partition(" of ")[0] for each in outcomes for fault in each.faults)
    answers = Counter(each.answer for each in outcomes)
    slowest = max(outcomes, key=lambda each: each.seconds / each.case.seconds)
    largest = max(outcomes, key=lambda each: each.megabytes)
    return [
        f"{len(outcomes)} hostile inputs: {answers['refused']} refused, {answers['accepted']} accepted",
        f"slowest {slowest.seconds:.1f} s ({slowest.case.group}: {slowest.case.name})",
        f"largest {largest.megabytes:.0f} MB ({largest.case.group}: {largest.case.name})",
        f"faults: {', '.join(f'{count} {name}' for name, count in sorted(found.items())) or 'none'}",
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    """Torture, print, and end with 1 if anything was wrong."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="+", choices=[*GROUPS, *OTHERS], default=[*GROUPS, *OTHERS])
    parser.add_argument("--kills", type=int, default=1000)
    parser.add_argument("--troubles", type=int, default=20, help="of each kind")
    parser.add_argument("--each", type=int, default=fuzz.EACH, help="inputs that nobody thought of, for each loader")
    parser.add_argument("--seed", type=int, default=0, help="of the inputs that nobody thought of")
    parser.add_argument("--quick", action="store_true", help="every tenth input, 30 kills, two troubles of each kind")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    logging.disable(logging.INFO)
    start, wrong = time.monotonic(), 0
    with tempfile.TemporaryDirectory(prefix="torture-") as scratch:
        names = [name for name in GROUPS if name in options.only]
        outcomes = hostile(names, Path(scratch), every=10 if options.quick else 1)
        if "fuzz" in options.only:
            each = 10 if options.quick else options.each
            outcomes += unthought_of(Path(scratch), each=each, seed=options.seed)
        if outcomes:
            print("\n".join([*faults(outcomes), *summary(outcomes)]), flush=True)
            wrong += len(faults(outcomes))
        if "kills" in options.only:
            found = kills.tried(Path(scratch, "kills"), 30 if options.quick else options.kills)
            print("\n".join(found.lines()), flush=True)
            wrong += len(found.lost)
        if "troubles" in options.only:
            troubled = trouble.tried(Path(scratch, "troubles"), 2 if options.quick else options.troubles)
            print("\n".join(troubled.lines()), flush=True)
            wrong += len(troubled.wrong)
    print(f"{'nothing' if not wrong else f'{wrong} things'} wrong, {(time.monotonic() - start) / 60:.1f} minutes")
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
