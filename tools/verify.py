"""Do the published numbers hold? Three levels, each with a verdict; the exit status is 1 if one of them fails.

    python -m tools.verify [--level claims tables models] [--share 50] [--seed N]
    python -m tools.verify --page    prints the tables of index.md as the published rows give them, to be pasted

claims   seconds, no PyTorch: every published table is the one that its sidecar describes, and each measured number
         of index.md, README.md and the chapters agrees with the cell that it names: see `tools.claims`.
tables   a random share of profile quick's rows is computed again from the published weights: the same on the machine
         that published them; elsewhere what differs is listed, and fails only where many differ.
models   everything of profile quick anew, in a scratch copy of the book; published accuracies must lie within the
         intervals (as long as `make figures`).
"""

import argparse
import os
import random
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd

from clustr_core.measuring.study import published_profiles, read_study
from clustr_core.storage.files import home
from clustr_core.storage.provenance import check_sidecar, processor
from clustr_core.storage.tables import read_table
from tools import claims, compare

if TYPE_CHECKING:
    from clustr_core.training.run import Run

LEVELS = ("claims", "tables", "models")
# on another processor so much of a share may differ before that is called a failure
TOLERATED = 0.05


def tables(root: Path, *, share: int, seed: int) -> list[str]:
    """Rows of a random share of profile quick, computed again from the published weights, beside the published."""
    from clustr_core.measuring.attacked import attack_pieces
    from clustr_core.measuring.certified import certificate_pieces
    from clustr_core.measuring.profile import load_profile
    from clustr_core.measuring.sandwiched import sandwich_pieces
    from clustr_core.training.recipes import run_folder
    from clustr_core.training.run import load_run

    faults, drawn = [], random.Random(seed)
    published = root / "results/published/quick"
    with tempfile.TemporaryDirectory() as scratch, _home_at(scratch):
        shutil.copytree(root / "profiles", Path(scratch, "profiles"))
        book, runs = load_profile("quick"), {}
        for method, recipe in book.recipes.items():
            shutil.copytree(published / "weights" / method, run_folder(recipe))
            runs[method] = load_run(run_folder(recipe), expected=recipe)
        if faults := list(_other_weights(published, {method: run.weights_sha256 for method, run in runs.items()})):
            return faults
        for method, run in runs.items():
            for kind, pieces in (
                ("attacks", attack_pieces(run, book) if method in book.attacked else []),
                ("certificates", certificate_pieces(run, book)),
                ("sandwich", sandwich_pieces(run, book) if method in book.lipschitz else []),
            ):
                if not pieces:
                    continue
                path = published / f"{kind}-{method}.csv"
                names = _names(run) if kind == "attacks" else [method]
                chosen = drawn.sample(range(len(pieces)), -(-len(pieces) // share))
                again = [pieces[n].rows().assign(method=names[n * len(names) // len(pieces)]) for n in chosen]
                same_machine = check_sidecar(path)["made"].get("processor") == processor()
                faults += _differing(path, pd.concat(again), same_machine=same_machine)
    return faults


@contextmanager
def _home_at(folder: str) -> Iterator[None]:
    """The book's root elsewhere, for as long as the block."""
    before = os.environ.get("CLUSTR_HOME")
    os.environ["CLUSTR_HOME"] = folder
    try:
        yield
    finally:
        os.environ.pop("CLUSTR_HOME")
        if before is not None:
            os.environ["CLUSTR_HOME"] = before


def _other_weights(published: Path, weights: Mapping[str, str]) -> Iterator[str]:
    """Tables that were measured on other weights than those that lie beside them."""
    for path in sorted(published.glob("*.csv")):
        made = check_sidecar(path)["made"]
        if (found := weights.get(made.get("method", ""))) and made.get("weights_sha256") != found:
            yield f"{path.name}: expected rows of the published weights of {made['method']}, got of others"


def _names(run: "Run") -> list[str]:
    """What the rows of a run's heads are called, in the order of their pieces."""
    from clustr_core.measuring.targets import heads_of, name_of

    return [name_of(run, head) for head in heads_of(run)]


def _differing(path: Path, again: pd.DataFrame, *, same_machine: bool) -> list[str]:
    """Which of the published rows came out otherwise."""
    published = read_table(path)
    keys = [name for name in ("method", "attack", "norm", "eps", "loss", "bound", "index") if name in again]
    if "eps" in keys:
        again, published = (table.assign(eps=table["eps"].round(9)) for table in (again, published))
    values = [name for name in ("prediction", "robust", "correct") if name in again]
    numbers = [name for name in ("radius", "norm") if name in again and again[name].dtype.kind == "f"]
    both = published.merge(again, on=[key for key in keys if key not in numbers], suffixes=("", "_again"))
    if len(both) != len(again):
        return [f"{path.name}: {len(again)} rows were computed again, and only {len(both)} of them are published"]
    wrong = pd.Series(data=False, index=both.index)
    for name in values:
        wrong |= both[name].astype(str) != both[f"{name}_again"].astype(str)
    for name in numbers:
        finite = both[name].replace(float("inf"), 1e9), both[f"{name}_again"].replace(float("inf"), 1e9)
        wrong |= (finite[0] - finite[1]).abs() > (1e-6 if same_machine else 1e-3) * (1 + finite[0].abs())
    if not wrong.any():
        return []
    listed = sorted(set(both.loc[wrong, "index"]))
    shown = ", ".join(map(str, listed[:10])) + ", ..." * (len(listed) > 10)
    line = f"{path.name}: {int(wrong.sum())} of {len(both)} rows differ (images {shown})"
    if not same_machine and wrong.mean() <= TOLERATED:
        print(f"  {line}: another processor")
        return []
    return [line]


def models(root: Path) -> list[str]:
    """Published accuracies outside the intervals of a whole new run of profile quick, in a scratch copy."""
    with tempfile.TemporaryDirectory() as scratch:
        copy = Path(scratch, "book")
        left_out = shutil.ignore_patterns(".*", "runs", "data", "_build", "quick", "__pycache__")
        shutil.copytree(root, copy, ignore=left_out)
        command = [sys.executable, "-m", "snakemake", "--cores", "all", "--config", "profile=quick", "--quiet", "rules"]
        environment = os.environ | {"CLUSTR_HOME": str(copy), "PYTHONPATH": str(copy)}
        done = subprocess.run(command, cwd=copy, env=environment, capture_output=True, encoding="utf-8", check=False)
        if done.returncode:
            return [f"profile quick could not be run: {done.stderr[-1000:]}"]
        lines = compare.compare(copy / "results/quick", root / "results/published/quick")
        return [line for line in lines if "outside" in line or "not published" in line]


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; 1 if a level fails."""
    parser = argparse.ArgumentParser(prog="python -m tools.verify", description="Do the published numbers hold?")
    parser.add_argument("--level", nargs="+", choices=LEVELS, default=["claims", "tables"])
    parser.add_argument("--share", type=int, default=50, help="one in so many pieces of each table (50)")
    parser.add_argument("--seed", type=int, default=None, help="of the draw; printed")
    parser.add_argument("--page", action="store_true", help="print the tables of index.md instead")
    options = parser.parse_args(arguments)
    if options.page:
        for study in (read_study(name, published=True) for name in published_profiles()):
            for kind in ("protocols", "certificates"):
                print(f"rows: {kind}({study.name})", *claims.table_lines(study, kind), "", sep="\n")
        return 0
    root, failed = home().resolve(), False
    seed = random.SystemRandom().randrange(10**6) if options.seed is None else options.seed
    for level in options.level:
        faults = {
            "claims": lambda: claims.faults(root),
            "tables": lambda: tables(root, share=options.share, seed=seed),
            "models": lambda: models(root),
        }[level]()
        print("\n".join(f"  {fault}" for fault in faults), end="\n" * bool(faults))
        drawn = f" (one piece in {options.share}, seed {seed})" if level == "tables" else ""
        print(f"{level}: {'FAILED' if faults else 'hold'}{drawn}")
        failed |= bool(faults)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
