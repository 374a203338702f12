"""Were the rivals trained for long enough? Methods of a profile at other numbers of epochs, all else as it says.

    python -m benchmarks.budgets --profile cpu-cifar10 --trainings pgd-at=16 trades=10 fast-at=15

Each method is trained for its epochs, its milestones moved in proportion, and attacked as the profile says at the eps
of its examination; of the profile's own epochs the published rows are counted. Adds a training at a time to
results/bench/budgets.csv; runs and measured pieces are kept as always: killed, run it again.
"""

import argparse
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context

import pandas as pd
import torch

from benchmarks.growing import add_rows, check_published, done_at, profile_of, results_of, rows_at
from benchmarks.seeds import at_one_eps, attacked_anew, of_method
from clustr_core.measuring.profile import Profile, load_profile
from clustr_core.measuring.seeds import counted
from clustr_core.measuring.study import as_far_as_published
from clustr_core.measuring.written import asked_of, sources_of
from clustr_core.storage.files import home, seal_of
from clustr_core.training.recipes import Recipe
from tools.telling import count, told

# `asked` is the digest of what decides the rows: recipes, attacks, versions. Rows of other ones are other rows
KEY = ["profile", "asked", "method", "epochs", "seed"]


def of_epochs(recipe: Recipe, epochs: int) -> Recipe:
    """A recipe of another length, its milestones moved in proportion, without snapshots; what it starts from stays."""
    if epochs == recipe.epochs:
        return recipe
    milestones = tuple(m * epochs // recipe.epochs for m in recipe.milestones)
    return replace(recipe, epochs=epochs, milestones=milestones, snapshots=())


def of_length(profile: Profile, method: str, epochs: int) -> Profile:
    """A profile with a method of another length, asked at one eps."""
    recipes = {**profile.recipes, method: of_epochs(profile.recipes[method], epochs)}
    return replace(profile, recipes=recipes, attacks=at_one_eps(profile))


def about(profile: Profile, method: str, epochs: int) -> tuple:
    """The key of a training."""
    seen = of_length(profile, method, epochs)
    sources = [each["run"] for each in sources_of(seen, "attacks").values()]
    asked = seal_of({**asked_of(seen, "attacks", method), "sources": sources})[:10]
    return profile.name, asked, method, epochs, seen.recipes[method].seed


def rows_of(name: str, method: str, epochs: int) -> pd.DataFrame:
    """The counts of one training."""
    torch.set_num_threads(1)
    profile = load_profile(name)
    if epochs == profile.recipes[method].epochs:
        attacks = of_method(as_far_as_published(name).attacks, method)
    else:
        _, attacks = attacked_anew(of_length(profile, method, epochs), method)
    rows = counted(attacks, pd.DataFrame(), eps=profile.examination.eps, radii=[])
    return rows.assign(**dict(zip(KEY, about(profile, method, epochs), strict=True)))


def training(text: str) -> tuple[str, int]:
    """METHOD=EPOCHS."""
    method, _, epochs = text.partition("=")
    if not epochs.isdecimal() or not 1 <= int(epochs) <= 10_000:
        raise argparse.ArgumentTypeError(f"expected METHOD=EPOCHS, epochs from 1 to 10,000, got {text[:80]!r}")
    return method, int(epochs)


def main(arguments: Sequence[str] | None = None) -> None:
    """Train, attack, write."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--profile", default="cpu-cifar10")
    parser.add_argument("--trainings", nargs="+", type=training, required=True, metavar="METHOD=EPOCHS")
    parser.add_argument("--jobs", type=count, default=1, help="trainings side by side, a thread each")
    options = parser.parse_args(arguments)
    profile = profile_of(parser, options.profile)
    if profile.examination is None:
        parser.error(f"--profile: expected one with an examination, whose eps is asked, got {profile.name}")
    if unknown := sorted({method for method, _ in options.trainings} - set(profile.attacked)):
        parser.error(f"--trainings: expected methods out of {sorted(profile.attacked)}, got {unknown}")
    path = home() / "results/bench" / "budgets.csv"
    done = done_at(path, KEY)
    missing = [each for each in options.trainings if about(profile, *each) not in done]
    if any(epochs == profile.recipes[method].epochs for method, epochs in missing):
        check_published(parser, profile)
    with ProcessPoolExecutor(options.jobs, mp_context=get_context("spawn"), max_tasks_per_child=1) as pool:
        waiting = [pool.submit(rows_of, options.profile, *each) for each in missing]
        for rows in results_of(waiting):
            add_rows(path, pd.DataFrame(rows[[*KEY, "model", "number", "holds", "images"]]), KEY)
    print(rows_at(path, KEY).to_string(index=False))


if __name__ == "__main__":
    sys.exit(told(main))
