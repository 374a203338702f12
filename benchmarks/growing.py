"""Tables that grow a training at a time, whoever else adds to them: killed calls go on, two at once lose nothing."""

from argparse import ArgumentParser
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, as_completed
from pathlib import Path
from typing import Any

import pandas as pd

from clustr_core.measuring.profile import Profile, load_profile
from clustr_core.measuring.study import as_far_as_published
from clustr_core.measuring.versions import VERSIONS
from clustr_core.storage.files import alone, seal_of
from clustr_core.storage.gate import listed
from clustr_core.storage.tables import read_table, write_table
from clustr_core.training.recipes import Recipe, run_key, training_version

# `asked` is a digest of what decides a row: rows of what a recipe, a profile or a version said before are other rows.
# These columns of keys are no numbers, though one may look like it
TEXT = ("asked", "profile", "method", "dataset", "candidate", "head", "loss")


def profile_of(parser: ArgumentParser, name: str) -> Profile:
    """The profile that --profile names; ends the call, with a line, where there is none."""
    try:
        return load_profile(name)
    except (OSError, ValueError) as error:
        parser.error(f"--profile: {error}")


def asked_of_profile(profile: Profile) -> str:
    """What decides all rows of a profile, in ten digits: its file, and what trains and measures."""
    versions = {method: training_version(recipe) for method, recipe in profile.recipes.items()}
    return seal_of({"profile": profile.sha256, "training": versions, "measured": VERSIONS})[:10]


def asked_of_recipe(recipe: Recipe) -> str:
    """What decides the certificates of a training, in ten digits: its recipe, and what trains and certifies."""
    return seal_of({"run": run_key(recipe), "certified": VERSIONS["certificate"]})[:10]


def results_of(waiting: Sequence[Future]) -> Iterator[Any]:
    """What jobs give, as each ends. An error of one is raised when all have ended: the others' rows are kept."""
    errors = []
    for finished in as_completed(waiting):
        if error := finished.exception():
            errors.append(error)
        else:
            yield finished.result()
    if errors:
        raise errors[0]


def check_published(parser: ArgumentParser, profile: Profile) -> None:
    """Ends the call, with a line, where no rows of a profile are published."""
    try:
        as_far_as_published(profile.name)
    except (OSError, ValueError) as error:
        parser.error(f"--profile: expected one of which rows are published, for they are counted, too: {error}")


def rows_at(path: Path, key: Sequence[str]) -> pd.DataFrame:
    """The rows that are there; none, with the columns of the key, where there is no table.

    Args:
        key: the columns that say what was asked: all that decides a row.
    Raises:
        ValueError: if the table lacks one of them.
    """
    if not path.exists():
        return pd.DataFrame(columns=list(key))
    found = read_table(path, as_text=TEXT)
    if lacking := [name for name in key if name not in found]:
        raise ValueError(f"{path}: expected the columns [{listed(list(key))}], got none called {listed(lacking)}")
    return found


def done_at(path: Path, key: Sequence[str]) -> set[tuple]:
    """What was asked of the rows that are there."""
    return set(rows_at(path, key)[list(key)].itertuples(index=False, name=None))


def add_rows(path: Path, rows: pd.DataFrame, key: Sequence[str], *, within: Sequence[str] = ()) -> pd.DataFrame:
    """Put rows in the place of those that were asked the same, and give the table as it is then, sorted by its key.

    Args:
        within: more columns by which rows are sorted.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with alone(path.parent):
        there = rows_at(path, key)
        asked = set(rows[list(key)].itertuples(index=False, name=None))
        others = there[[one not in asked for one in there[list(key)].itertuples(index=False, name=None)]]
        table = pd.concat([others, rows], ignore_index=True) if len(others) else rows
        table = table.sort_values(by=[*key, *within], kind="stable", ignore_index=True)
        write_table(path, table)
    return table
