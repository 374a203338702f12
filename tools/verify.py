"""Do the published numbers hold? Three levels, each with a verdict; the exit status is 1 if one of them fails.

    python -m tools.verify [--level claims tables models] [--share 50] [--seed N] [--methods ce clustr]
    python -m tools.verify --page    prints the tables of results.md as the published rows give them, to be pasted

claims   seconds, no PyTorch: every published table is the one that its sidecar describes, and each measured number
         of the pages, README.md and the chapters agrees with the cell that it names: see `tools.claims`.
tables   a random share of profile quick's rows is computed again from the published weights: the same on the machine
         that published them; elsewhere what differs is listed, and fails only where many rows do: `tools.recomputed`.
models   everything of profile quick anew, in a scratch copy of the book; published accuracies must lie within the
         intervals (as long as `make figures`).

`--methods` limits the last two to the tables of some methods.
"""

import argparse
import os
import random
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from clustr_core.measuring.profile import load_profile
from clustr_core.measuring.study import published_profiles, read_study
from clustr_core.storage.files import home
from tools import claims, compare
from tools.telling import count, told

LEVELS = ("claims", "tables", "models")
PROFILE = "quick"


def models(root: Path, *, methods: Sequence[str] = ()) -> list[str]:
    """Published accuracies outside the intervals of a whole new run of profile quick, in a scratch copy.

    Args:
        methods: train and measure these alone, and run no chapter; empty for everything.
    Raises:
        ValueError: if the profile has no such method.
    """
    book = load_profile(root / "profiles" / f"{PROFILE}.yaml")
    if unknown := sorted(set(methods) - set(book.recipes)):
        raise ValueError(f"methods: expected some of {', '.join(book.recipes)}, got {', '.join(unknown)}")
    published = root / "results/published" / PROFILE
    tables = [path.name for path in sorted(published.glob("*.csv"))]
    names = [name for name in tables if not methods or name.partition("-")[2].removesuffix(".csv") in methods]
    with tempfile.TemporaryDirectory() as scratch:
        copy = Path(scratch, "book")
        shutil.copytree(root, copy, ignore=_not_copied(root))
        # the pipeline's marks; one command writes diagnostics and ablations
        wanted = [name.removesuffix(".csv") for name in names if methods and not name.startswith("ablations")]
        targets = [f"_build/{PROFILE}/done/{name}" for name in wanted]
        command = [sys.executable, "-m", "snakemake", *targets, "--cores", "all", "--config", f"profile={PROFILE}"]
        environment = os.environ | {"CLUSTR_HOME": str(copy), "PYTHONPATH": str(copy)}
        print(f"  {', '.join(methods) or 'everything'} of profile {PROFILE} is trained and measured anew", flush=True)
        done = subprocess.run(command, cwd=copy, env=environment, capture_output=True, encoding="utf-8", check=False)
        if done.returncode:
            return [f"profile {PROFILE} could not be run: {done.stderr[-2000:]}"]
        found = [each for each in compare.compare(copy / "results" / PROFILE, published) if each.table in names]
    print("\n".join(f"  {each}" for each in found))
    return [str(each) for each in found if each.verdict not in ("identical", "within", "differs")]


def _not_copied(root: Path) -> Callable[[str, list[str]], list[str]]:
    """What a copy of the book does without: what was made here, and environments; never a folder of the package."""
    made = {root / name for name in ("runs", "data", "_build", f"results/{PROFILE}", f"figures/{PROFILE}", "logs")}

    def left_out(folder: str, names: list[str]) -> list[str]:
        return [name for name in names if name.startswith(".") or name == "__pycache__" or Path(folder, name) in made]

    return left_out


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; 1 if a level fails."""
    parser = argparse.ArgumentParser(prog="python -m tools.verify", description="Do the published numbers hold?")
    parser.add_argument("--level", nargs="+", choices=LEVELS, default=["claims", "tables"])
    parser.add_argument("--share", type=count, default=50, help="one in so many pieces of each table (50)")
    parser.add_argument("--seed", type=int, default=None, help="of the draw; printed")
    parser.add_argument("--methods", nargs="+", default=[], help="recompute the tables of these alone")
    parser.add_argument("--page", action="store_true", help="print the tables of results.md instead")
    options = parser.parse_args(arguments)
    if options.page:
        for study in (read_study(name, published=True) for name in published_profiles()):
            for kind in ("protocols", "certificates"):
                print(f"rows: {kind}({study.name})", *claims.table_lines(study, kind), "", sep="\n")
        return 0
    root, failed = home().resolve(), False
    seed = random.SystemRandom().randrange(10**6) if options.seed is None else options.seed
    for level in options.level:
        try:
            faults = _faults(level, root, options.methods, share=options.share, seed=seed)
        except (ValueError, OSError) as error:
            faults = [str(error)]
        print("\n".join(f"  {fault}" for fault in faults), end="\n" * bool(faults))
        drawn = f" (one piece in {options.share}, seed {seed})" if level == "tables" else ""
        print(f"{level}: {'FAILED' if faults else 'hold'}{drawn}", flush=True)
        failed |= bool(faults)
    return int(failed)


def _faults(level: str, root: Path, methods: Sequence[str], *, share: int, seed: int) -> list[str]:
    if level == "claims":
        return claims.faults(root)
    if level == "models":
        return models(root, methods=methods)
    from tools import recomputed

    return recomputed.tables(root, share=share, seed=seed, methods=methods)


if __name__ == "__main__":
    sys.exit(told(main))
