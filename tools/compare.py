"""Regenerated rows beside the published ones: `make figures` ends with this.

    python -m tools.compare --profile quick

Another processor sums in another order, and training magnifies that, so a difference is no failure: what is asked is
whether the accuracies still lie within the published 95 % intervals. The exit status is 0 either way.
"""

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import pandas as pd

from clustr_core.measuring.accuracy import best_bound, certified_accuracy, robust_accuracy
from clustr_core.measuring.profile import load_profile
from clustr_core.measuring.study import with_intervals
from clustr_core.storage.files import home
from clustr_core.storage.tables import read_table

# where certified accuracies are compared, L2, in pixels of [0, 1]
RADII = [0.0, 0.14, 0.28, 0.5]


def accuracies(path: Path) -> pd.DataFrame | None:
    """The accuracies that a table of rows stands for, one a row: ``at value low high``; None for other tables."""
    table = read_table(path)
    if path.name.startswith("attacks-"):
        found = robust_accuracy(pd.DataFrame(table[table["attack"] != "paper"]))
        at = found["method"] + " " + found["norm"] + " " + found["eps"].map("{:.4g}".format)
        return pd.DataFrame({"at": at, "value": found["robust_accuracy"], "low": found["low"], "high": found["high"]})
    if path.name.startswith("certificates-"):
        found = certified_accuracy(best_bound(table), RADII)
        at = found["method"] + " certified at " + found["at"].map("{:.4g}".format)
        return pd.DataFrame(
            {"at": at, "value": found["certified_accuracy"], "low": found["low"], "high": found["high"]}
        )
    return None


def compare(regenerated: Path, published: Path) -> Iterator[str]:
    """One line for each table: identical, within the published intervals, outside (named), or only differing."""
    for path in sorted(regenerated.glob("*.csv")):
        other = published / path.name
        if not other.exists():
            yield f"{path.name}: not published"
        elif path.read_bytes() == other.read_bytes():
            yield f"{path.name}: identical"
        elif (theirs := accuracies(other)) is None:
            yield f"{path.name}: differs"
        else:
            yield f"{path.name}: {_verdict(accuracies(path), theirs)}"


def _verdict(mine: pd.DataFrame | None, theirs: pd.DataFrame) -> str:
    assert mine is not None
    both = theirs.merge(mine[["at", "value"]], on="at", suffixes=("", "_mine"))
    outside = pd.DataFrame(both[(both["value_mine"] < both["low"]) | (both["value_mine"] > both["high"])])
    if not len(outside):
        largest = (both["value_mine"] - both["value"]).abs().max()
        return f"within the published intervals (largest difference {100 * largest:.1f} points)"
    cells = zip(outside["at"], outside["value_mine"], with_intervals(outside, "value"), strict=True)
    named = [f"{at}: {100 * mine:.1f} instead of {published}" for at, mine, published in cells]
    return "outside the published intervals: " + "; ".join(named)


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; always 0: a difference is no failure."""
    parser = argparse.ArgumentParser(prog="python -m tools.compare", description="Regenerated rows beside published.")
    parser.add_argument("--profile", default="quick")
    profile = load_profile(parser.parse_args(arguments).profile).name
    results = home() / "results"
    lines = list(compare(results / profile, results / "published" / profile))
    print(f"results/{profile}/ beside results/published/{profile}/")
    print("\n".join(f"  {line}" for line in lines) or "  no rows")
    return 0


if __name__ == "__main__":
    sys.exit(main())
