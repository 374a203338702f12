"""The tables of index.md, from the committed rows: `python -m tools.first_page` prints them, ready to be pasted.

The tests hold the page to the same functions.
"""

from pathlib import Path

import pandas as pd

from clustr_core.drawing.looks import METHOD_NAMES
from clustr_core.measuring.accuracy import best_bound, certified_accuracy, summary_table
from clustr_core.measuring.profile import Profile, load_profile
from clustr_core.storage.tables import read_table

ROOT = Path(__file__).resolve().parents[1]
PIXELS = {"digits": 64, "mnist5k": 784, "folder:data/cifar10-jpeg": 3072}
CERTIFYING = ("clustr-cert", "clustr-lip", "lip-linear", "smoothing", "prototypes")


def profile_of(name: str) -> Profile:
    """A profile of the book."""
    return load_profile(ROOT / "profiles" / f"{name}.yaml")


def rows(profile: str, kind: str) -> pd.DataFrame:
    """The committed rows of a kind of measurement, of all methods of the profile that have it."""
    wanted = profile_of(profile)
    methods = {
        "attacks": [*wanted.attacked],
        "certificates": [*wanted.recipes, "prototypes"],
        "sandwich": [*wanted.lipschitz],
    }.get(kind, [*wanted.ordinary])
    tables = [read_table(ROOT / "results/published" / profile / f"{kind}-{method}.csv") for method in methods]
    return pd.concat(tables, ignore_index=True)


def pixels_of(profile: str) -> int:
    """Pixels of an image, channels counted one by one."""
    return PIXELS[next(iter(profile_of(profile).recipes.values())).dataset]


def radii_of(profile: str) -> list[float]:
    """The three L2 radii at which chapter 7 shows the profile's certificates; the chapter's own are the digits'."""
    return profile_of(profile).chapters.get("07-certified", {}).get("radii", [0.14, 0.28, 0.5])


def columns_of(profile: str) -> pd.DataFrame:
    """The four columns in L-infinity, at the eps of AutoAttack."""
    at = profile_of(profile).attacks["autoattack"].eps[0]
    found = summary_table(rows(profile, "attacks"), rows(profile, "certificates"), eps=at, pixels=pixels_of(profile))
    return found.assign(profile=profile)


def protocol_lines(profile: str) -> list[str]:
    """The lines of a table of protocols: clean, the paper's, correct attacks, and what is certified of it."""
    found = columns_of(profile).set_index(["method", "column"])
    names = [name for name in METHOD_NAMES if name in found.index.unique("method")]
    return [_line(METHOD_NAMES[name], found.loc[name], ("clean", "paper", "correct", "certified")) for name in names]


def certified_lines(profile: str) -> list[str]:
    """The lines of a table of certificates: clean, and certified at each of `radii_of`."""
    radii = radii_of(profile)
    best = best_bound(rows(profile, "certificates"))
    found = certified_accuracy(best, [0.0, *radii]).set_index(["method", "at"])
    found = found.rename(columns={"certified_accuracy": "accuracy"})
    return [_line(METHOD_NAMES[name], found.loc[name], (0.0, *radii)) for name in CERTIFYING]


def _line(name: str, cells: pd.DataFrame, columns: tuple) -> str:
    shown = [_cell(cells.loc[column]) if column in cells.index else "–" for column in columns]
    return f"| {name} | {' | '.join(shown)} |"


def _cell(row: pd.Series) -> str:
    return f"{100 * row['accuracy']:.1f} [{100 * row['low']:.1f}, {100 * row['high']:.1f}]"


if __name__ == "__main__":
    for name in ("cpu-cifar10", "cpu", "quick"):
        print(name, *protocol_lines(name), *certified_lines(name), "", sep="\n")
