"""Published rows of profile quick, computed again from the published weights. Level *tables* of `tools.verify`.

Of each table of rows a random share of the pieces in which it was measured; of the tables that are measured at once
(diagnostics, ablations, prototypes) a random share of the tables. On the machine that published them every digit must
be the same; elsewhere what differs is listed with how near the border it lies, and is a fault only where many rows do.
At the end it is said which of three holds: every digit is the published one; some digits are others, and no verdict is;
some verdicts are others. What another order of sums moves, and what another seed does, is measured by
`benchmarks.repeat`.
"""

import os
import random
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from clustr_core.measuring.profile import Profile, load_profile
from clustr_core.storage.provenance import check_sidecar, environment
from clustr_core.storage.tables import read_table, write_table
from clustr_core.training.recipes import run_folder

if TYPE_CHECKING:
    from clustr_core.measuring.pieces import CachedRows
    from clustr_core.training.run import Run

PROFILE = "quick"
# on another machine so much of a table's share may differ before that is called a fault
TOLERATED = 0.05
# ... and numbers may differ by so much of 1 + their size
CLOSE = 1e-3
KEYS = ("method", "attack", "norm", "eps", "loss", "bound", "check", "change", "index")
# what a row decides; elsewhere the rest (an attack's path, its count of gradients) may be another
VERDICTS = ("label", "prediction", "correct", "robust", "flagged")
NUMBERS = ("feature_radius", "radius", "lipschitz", "lipschitz_lower_bound", "norm", "value", "robust_accuracy", "drop")
LISTED = 10


@dataclass
class Tally:
    """Of all rows that were computed again, in how many digits differ, and in how many verdicts do."""

    rows: int = 0
    digits: int = 0
    verdicts: int = 0
    elsewhere: set[str] = field(default_factory=set)

    def add(self, rows: int, digits: int, verdicts: int, elsewhere: Sequence[str] = ()) -> None:
        """Add the rows of a table; ``elsewhere`` as the function of that name gives it."""
        self.rows, self.digits, self.verdicts = self.rows + rows, self.digits + digits, self.verdicts + verdicts
        self.elsewhere |= set(elsewhere)

    def words(self) -> str:
        """Which of the three holds."""
        where = f"on another machine ({'; '.join(sorted(self.elsewhere))})" if self.elsewhere else "on this machine"
        if not self.rows:
            return "nothing was compared"
        if not self.digits:
            return f"every digit of {self.rows} rows is the published one, {where}"
        some = f"digits differ in {self.digits} of {self.rows} rows"
        if not self.verdicts:
            return f"{some}, {where}, and no verdict does"
        return f"{some} and verdicts in {self.verdicts} ({100 * self.verdicts / self.rows:.1f} %), {where}"


def tables(root: Path, *, share: int, seed: int, methods: Sequence[str] = ()) -> list[str]:
    """What differs between the published rows and a random share of them, computed again; prints what was compared.

    Args:
        share: one in so many pieces of each table, at least one.
        seed: of the draw.
        methods: whose tables; empty for all.
    Raises:
        ValueError: if ``share`` is not positive, or the profile has no such method.
    """
    if share < 1:
        raise ValueError(f"share: expected at least 1, got {share}")
    published = root / "results/published" / PROFILE
    with tempfile.TemporaryDirectory() as scratch, _home_at(scratch), _one_thread():
        shutil.copytree(root / "profiles", Path(scratch, "profiles"))
        book = load_profile(PROFILE)
        if unknown := sorted(set(methods) - {*book.recipes, "prototypes"}):
            raise ValueError(
                f"methods: expected some of {', '.join(book.recipes)}, prototypes, got {', '.join(unknown)}"
            )
        runs = _restored(published, book)
        if faults := list(_other_weights(published, {method: run.weights_sha256 for method, run in runs.items()})):
            return faults
        wanted = {method: run for method, run in runs.items() if not methods or method in methods}
        with_prototypes = not methods or "prototypes" in methods
        tally = Tally()
        for name, again in _drawn(wanted, book, share, random.Random(seed), prototypes=with_prototypes):
            written = Path(scratch, name)
            write_table(written, again)
            faults += compared(published / name, read_table(written), tally)
    print(f"  {tally.words()}", flush=True)
    return faults


def _restored(published: Path, book: Profile) -> dict[str, "Run"]:
    """The published runs, where the package looks for them."""
    from clustr_core.training.run import load_run

    runs = {}
    for method, recipe in book.recipes.items():
        shutil.copytree(published / "weights" / method, run_folder(recipe))
        runs[method] = load_run(run_folder(recipe), expected=recipe)
    return runs


def _drawn(
    runs: Mapping[str, "Run"], book: Profile, share: int, draw: random.Random, *, prototypes: bool
) -> Iterator[tuple[str, pd.DataFrame]]:
    """The names of tables, and some of their rows, computed again."""
    from clustr_core.measuring.certified import prototype_certificates
    from clustr_core.measuring.examination import ablations_of, diagnostics_of

    for method, run in runs.items():
        for kind, pieces, names in _measurements(run, book):
            chosen = draw.sample(range(len(pieces)), -(-len(pieces) // share))
            rows = [pieces[n].rows().assign(method=names[n * len(names) // len(pieces)]) for n in chosen]
            yield f"{kind}-{method}.csv", pd.concat(rows, ignore_index=True)
    examined = [method for method in runs if method in book.ordinary]
    for method in draw.sample(examined, -(-len(examined) // share)):
        yield f"diagnostics-{method}.csv", diagnostics_of(runs[method], book)
        yield f"ablations-{method}.csv", ablations_of(runs[method], book)
    if prototypes:
        yield "certificates-prototypes.csv", prototype_certificates(book)


def _measurements(run: "Run", book: Profile) -> Iterator[tuple[str, "list[CachedRows]", list[str]]]:
    """The kinds of rows that a run has, their pieces, and what each head's rows are called, in the pieces' order."""
    from clustr_core.measuring.attacked import attack_pieces
    from clustr_core.measuring.certified import certificate_pieces
    from clustr_core.measuring.sandwiched import sandwich_pieces
    from clustr_core.measuring.targets import heads_of, name_of

    method = run.recipe.method
    if method in book.attacked:
        yield "attacks", attack_pieces(run, book), [name_of(run, head) for head in heads_of(run)]
    yield "certificates", certificate_pieces(run, book), [method]
    if method in book.lipschitz:
        yield "sandwich", sandwich_pieces(run, book), [method]


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


@contextmanager
def _one_thread() -> Iterator[None]:
    """One thread, as each job of the pipeline has: another number of threads sums in another order."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _other_weights(published: Path, weights: Mapping[str, str]) -> Iterator[str]:
    """Tables that were measured on other weights than those that lie beside them."""
    for path in sorted(published.glob("*.csv")):
        made = check_sidecar(path)["made"]
        if (found := weights.get(made.get("method", ""))) and made.get("weights_sha256") != found:
            yield f"{path.name}: expected rows of the published weights of {made['method']}, got of others"


def elsewhere(made: Mapping[str, Any]) -> list[str]:
    """In what this machine differs from the one that made a table, as far as that may move a number."""
    here = environment("cpu")
    pairs = {"processor": (made.get("processor"), here["processor"]), "threads": (made.get("threads"), 1)}
    for name in ("torch", "numpy"):
        pairs[name] = ((made.get("versions") or {}).get(name), here["versions"][name])
    return [f"{name} {there}, here {now}" for name, (there, now) in pairs.items() if there != now]


def compared(path: Path, again: pd.DataFrame, tally: Tally | None = None) -> list[str]:
    """Which of the published rows came out otherwise, one line a row; prints what was compared, and what is tolerated.

    Args:
        path: of the published table.
        again: some of its rows, computed again, as `read_table` reads them.
        tally: to which these rows are added.
    """
    tally = tally or Tally()
    published, other = read_table(path), elsewhere(check_sidecar(path)["made"])
    keys = [name for name in KEYS if name in again and (name == "eps" or again[name].dtype.kind != "f")]
    both = published.merge(again, on=keys, suffixes=("", "_again"))
    if len(both) != len(again):
        tally.add(len(again), len(again), len(again))
        return [f"{path.name}: {len(again)} rows were computed again, and {len(both)} of them are published"]
    columns = [name for name in again if name not in keys and (not other or name in VERDICTS + NUMBERS)]
    changed = pd.DataFrame({name: ~_same(both, name, exact=not other) for name in columns})
    wrong = changed.to_numpy().any(axis=1)
    count = int(wrong.sum())
    other_digits = pd.DataFrame({name: ~_same(both, name, exact=True) for name in again if name not in keys})
    other_verdicts = other_digits[[name for name in VERDICTS if name in other_digits]]
    digits, verdicts = (int(part.to_numpy().any(axis=1).sum()) for part in (other_digits, other_verdicts))
    tally.add(len(both), digits, verdicts, other)
    where = f"on another machine ({'; '.join(other)})" if other else "on this machine"
    print(f"  {path.name}: {len(both)} rows computed again {where}, {count} differ", flush=True)
    if not count:
        return []
    lines = [_told(row, changed.loc[n], published, keys) for n, row in both.loc[wrong].head(LISTED).iterrows()]
    lines += [f"... and {count - LISTED} more"] * (count > LISTED)
    if other and count <= TOLERATED * len(both):
        print("\n".join(f"    {line}" for line in lines), flush=True)
        return []
    return [f"{path.name}: {count} of {len(both)} rows differ", *(f"  {line}" for line in lines)]


def _same(both: pd.DataFrame, name: str, *, exact: bool) -> pd.Series:
    """Where a column and its second version agree: in every printed digit, or, of numbers, nearly."""
    published, again = pd.Series(both[name]), pd.Series(both[f"{name}_again"])
    equal = (published == again) | (published.isna() & again.isna())
    if exact or published.dtype.kind != "f":
        return equal
    return equal | ((published - again).abs() <= CLOSE * (1 + published.abs()))


def _told(row: pd.Series, changed: pd.Series, published: pd.DataFrame, keys: Sequence[str]) -> str:
    """One row that came out otherwise: what it is, what changed, and how near the border it lies."""
    what = ", ".join(f"{name} {row[name]}" for name in keys)
    parts = [f"{name} {row[name]}, now {row[f'{name}_again']}" for name, turned in changed.items() if turned]
    return f"{what}: {'; '.join(parts)}{_how_near(row, published)}"


def _how_near(row: pd.Series, published: pd.DataFrame) -> str:
    """Of an attacked image the eps between which it falls; of a certified one its feature radius beside the median."""
    if "robust" in published:
        rows = _alike(row, published, ("method", "attack", "norm", "loss", "index"))
        robust = rows["robust"].to_numpy(dtype=bool)
        kept, lost = rows.loc[robust, "eps"].max(), rows.loc[~robust, "eps"].min()
        return f" (published: robust up to eps {kept:g}, broken from {lost:g})"
    if "feature_radius" in published:
        median = pd.Series(_alike(row, published, ("method", "bound"))["feature_radius"]).median()
        return f" (feature radius {row['feature_radius']:g}, median {median:g})"
    return ""


def _alike(row: pd.Series, table: pd.DataFrame, names: Sequence[str]) -> pd.DataFrame:
    """The rows of a table that have the same values as one row."""
    for name in names:
        table = table.loc[(table[name] == row[name]).to_numpy(dtype=bool)]
    return table
