"""Regenerated rows beside the published ones: `make figures` ends with this.

    python -m tools.compare --profile quick

Another processor sums in another order, and training magnifies that, so a difference is no failure: what is asked is
whether the accuracies still lie within the published 95 % intervals. The exit status is 0 either way.
"""

import argparse
import math
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import pandas as pd

from clustr_core.measuring.accuracy import best_bound, binomial_interval, certified_accuracy, robust_accuracy
from clustr_core.measuring.profile import load_profile
from clustr_core.measuring.study import with_interval
from clustr_core.storage.files import home
from clustr_core.storage.gate import TABLE_LIMIT, read_bytes
from clustr_core.storage.provenance import read_checked

# where certified accuracies are compared, L2, in pixels of [0, 1]
RADII = [0.0, 0.14, 0.28, 0.5]
VERDICTS = ("identical", "within", "outside", "differs", "not comparable", "not published", "not regenerated")


class Comparison(NamedTuple):
    """One table: one of `VERDICTS`, and the same in words."""

    table: str
    verdict: str
    words: str

    def __str__(self) -> str:
        return f"{self.table}: {self.words}"


def accuracies(path: Path) -> pd.DataFrame | None:
    """The accuracies that a table of rows stands for, one a row: ``at value low high``; None for other tables."""
    table = read_checked(path)
    if path.name.startswith("attacks-"):
        parts = {"": table.query("attack != 'paper'"), " paper's protocol": table.query("attack == 'paper'")}
        found = pd.concat(robust_accuracy(rows).assign(by=by) for by, rows in parts.items() if len(rows))
        at = found["method"] + found["by"] + " " + found["norm"] + " " + found["eps"].map("{:.4g}".format)
        return pd.DataFrame({"at": at, "value": found["robust_accuracy"], "low": found["low"], "high": found["high"]})
    if path.name.startswith("certificates-"):
        found = certified_accuracy(best_bound(table), RADII)
        at = found["method"] + " certified at " + found["at"].map("{:.4g}".format)
        return pd.DataFrame(
            {"at": at, "value": found["certified_accuracy"], "low": found["low"], "high": found["high"]}
        )
    if path.name.startswith("sandwich-"):
        return pd.DataFrame(_left_by_attacks(table), columns=["at", "value", "low", "high"])
    return None


def _left_by_attacks(table: pd.DataFrame) -> Iterator[tuple[str, float, float, float]]:
    """What no attack of a sandwich broke below each radius."""
    images = table.groupby(["method", "index"]).agg(correct=("correct", "first"), norm=("norm", "min")).reset_index()
    for method, rows in images.groupby("method"):
        for radius in RADII:
            kept = int((rows["correct"] & (rows["norm"] >= radius)).to_numpy().sum())
            yield f"{method} left at {radius:.4g}", kept / len(rows), *binomial_interval(kept, len(rows))


def compare(regenerated: Path, published: Path) -> Iterator[Comparison]:
    """Each table of either folder: identical, within the published intervals, outside (named), or what else it is."""
    names = {path.name for folder in (regenerated, published) for path in folder.glob("*.csv")}
    for name in sorted(names):
        mine, theirs = regenerated / name, published / name
        if not theirs.exists():
            yield Comparison(name, "not published", "not published")
        elif not mine.exists():
            yield Comparison(name, "not regenerated", "published, and not regenerated")
        else:
            yield Comparison(name, *_verdict(mine, theirs))


def _verdict(mine: Path, theirs: Path) -> tuple[str, str]:
    try:
        if read_bytes(mine, limit=TABLE_LIMIT) == read_bytes(theirs, limit=TABLE_LIMIT):
            return "identical", "identical"
        if (published := accuracies(theirs)) is not None and (found := accuracies(mine)) is not None:
            return _beside(found, published)
        return "differs", f"differs in {_differing(read_checked(mine), read_checked(theirs))}"
    except Exception as error:  # of many kinds, for what is no table of rows
        return "not comparable", f"cannot be compared ({type(error).__name__}: {error})"


def _beside(found: pd.DataFrame, theirs: pd.DataFrame) -> tuple[str, str]:
    """Accuracies beside the published intervals; those outside are named, as are those that are not there."""
    both = theirs.merge(found[["at", "value"]], on="at", how="left", suffixes=("", "_mine"))
    inside = both["value_mine"].between(both["low"], both["high"]).to_numpy()
    if inside.all():
        largest = (both["value_mine"] - both["value"]).abs().max()
        return "within", f"within the published intervals (largest difference {100 * largest:.1f} points)"
    columns = ["at", "value_mine", "value", "low", "high"]
    named = [
        f"{at}: missing" if math.isnan(mine) else f"{at}: {100 * mine:.1f} instead of {with_interval(*shares)}"
        for at, mine, *shares in both.loc[~inside, columns].itertuples(index=False)
    ]
    return "outside", "outside the published intervals: " + "; ".join(named)


def _differing(mine: pd.DataFrame, theirs: pd.DataFrame) -> str:
    """Of a table without intervals: how many rows differ, and which checks give another verdict."""
    if list(mine) != list(theirs) or len(mine) != len(theirs):
        return f"its shape: {len(mine)} rows of {', '.join(mine)}"
    differing = ((mine != theirs) & ~(mine.isna() & theirs.isna())).any(axis=1)
    words = f"{int(differing.sum())} of {len(mine)} rows"
    if "flagged" not in mine:
        return words
    turned = theirs.loc[mine["flagged"] != theirs["flagged"], ["method", "check"]]
    names = [f"{method} {check}" for method, check in turned.itertuples(index=False)]
    return f"{words}; {'other verdicts: ' + '; '.join(names) if names else 'every verdict is the same'}"


def report(results: Path, profile: str) -> Iterator[str]:
    """What `make figures` ends with: every table of a profile, then how many there are of each kind."""
    mine, theirs = results / profile, results / "published" / profile
    if not any(theirs.glob("*.csv")):
        yield f"results/{profile}/: profile {profile} was never published, so there is nothing to compare it with"
        return
    found = list(compare(mine, theirs))
    yield f"results/{profile}/ beside results/published/{profile}/"
    yield from (f"  {each}" for each in found)
    counts = Counter(each.verdict for each in found)
    said = {"within": "within the published intervals", "outside": "outside them"}
    yield f"{len(found)} tables: " + ", ".join(
        f"{counts[each]} {said.get(each, each)}" for each in VERDICTS if counts[each]
    )
    if counts["identical"] < len(found):
        yield "Another processor or version rounds differently, and training magnifies it: a difference is no failure."


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; 0 whatever differs, which is no failure; 1 with the reason on stderr if nothing can be compared."""
    parser = argparse.ArgumentParser(prog="python -m tools.compare", description="Regenerated rows beside published.")
    parser.add_argument("--profile", default="quick", help="a profile, or the path of one (quick)")
    options = parser.parse_args(arguments)
    try:
        print("\n".join(report(home() / "results", load_profile(options.profile).name)))
    except (ValueError, OSError) as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
