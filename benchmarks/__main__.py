"""Everything that is timed, in one run on one machine: `make bench`.

    python -m benchmarks [--only SUITE ...] [--quick] [--threads N] [--output FOLDER]

Prints every row beside its target, and writes bench.csv, growth.csv, step-parts.csv, methods-cost.csv, layouts.csv and
predicted.csv to results/bench/ (a quarter of an hour on two cores; nothing else should be running). With --only, the
other suites' rows of bench.csv stay. --quick shows in a minute that every suite runs, at sizes that say nothing about
speed.
"""

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

import pandas as pd
import torch

from benchmarks import attacking, certifying, growth, steps, whole
from benchmarks.harness import Effort, Row, machine
from clustr_core.storage.files import alone, home
from clustr_core.storage.tables import read_table, write_table
from tools.telling import count, told

SUITES: dict[str, Callable[[Effort], list[Row]]] = {
    "certificates": certifying.certificates,
    "logits": certifying.logits,
    "magnet": certifying.magnet,
    "kmeans": certifying.kmeans,
    "pgd": attacking.pgd_overhead,
    "evaluation": attacking.evaluation,
    "libraries": attacking.libraries,
    "autoattack": attacking.whole_autoattack,
    "embeddings": steps.embeddings,
    "augmentation": steps.augmentation,
    "sampler": steps.sampler,
    "imports": whole.imports,
    "chapters": whole.chapters,
}
TABLES: dict[str, Callable[[Effort], pd.DataFrame]] = {
    "growth": growth.growth,
    "step-parts": steps.step_parts,
    "methods-cost": steps.methods_cost,
    "layouts": growth.layouts,
    "predicted": growth.predictions,
}
COLUMNS = ["suite", "name", "measured", "unit", "compared", "setting", "target", "met", "rounds"]


def rows_of(suites: Sequence[str], effort: Effort) -> pd.DataFrame:
    """The rows of some suites, each printed as it is there."""
    rows = []
    for suite in suites:
        for row in SUITES[suite](effort):
            target = "" if row.target != row.target else f" (<= {row.target:g}: {row.met or 'not measured'})"
            print(f"{row.suite}: {row.name}: {row.measured:.3g} {row.unit}{target}", flush=True)
            rows.append(asdict(row) | {"met": row.met})
    return pd.DataFrame(rows, columns=COLUMNS)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what was asked for."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--only", nargs="+", choices=[*SUITES, *TABLES], metavar="SUITE", help=", ".join([*SUITES, *TABLES])
    )
    parser.add_argument("--quick", action="store_true", help="tiny sizes; writes nothing but to --output")
    parser.add_argument("--threads", type=count, default=os.cpu_count(), help="CPU threads (default: all)")
    parser.add_argument("--output", type=Path, help="folder of the tables (default: results/bench/)")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    effort = Effort(rounds=2, seconds=1.0, quick=True) if options.quick else Effort()
    folder = options.output or (None if options.quick else home() / "results/bench")
    asked = options.only or [*SUITES, *TABLES]
    about = machine()
    suites = [name for name in SUITES if name in asked]
    if folder:
        _check_ours(folder, [*(["bench"] if suites else []), *(name for name in TABLES if name in asked)])
    if suites:
        table = rows_of(suites, effort).assign(**about)
        if folder:
            folder.mkdir(parents=True, exist_ok=True)
            with alone(folder):
                write_table(folder / "bench.csv", _with_others(table, folder / "bench.csv"))
    for name in TABLES:
        if name in asked:
            found = TABLES[name](effort)
            print(f"\n{name}\n{found.to_string(index=False, float_format='%.3g')}", flush=True)
            if folder:
                # what a table says of itself, such as its threads, is truer than what is said of the whole run
                told = {key: value for key, value in about.items() if key not in found}
                write_table(folder / f"{name}.csv", found.assign(**told))
    return 0


def _check_ours(folder: Path, names: Sequence[str]) -> None:
    """Refuse tables that no earlier call has written, before others take their places."""
    for path in (folder / f"{name}.csv" for name in names):
        if path.exists() and not {"system", "torch"} <= {*read_table(path)}:
            raise ValueError(f"--output: expected no table, or one of an earlier call, got another in {path}")


def _with_others(table: pd.DataFrame, path: Path) -> pd.DataFrame:
    """The table, and the rows of other suites that lie there already, in the order of the suites."""
    if path.exists():
        before = read_table(path)
        table = pd.concat([table, before[~before["suite"].isin(table["suite"])]], ignore_index=True)
    order = {suite: n for n, suite in enumerate(SUITES)}
    return table.sort_values("suite", key=lambda suite: suite.map(order), kind="stable", ignore_index=True)


if __name__ == "__main__":
    sys.exit(told(main))
