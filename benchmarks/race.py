"""Which 1-Lipschitz encoder certifies most for so many CPU minutes: successive halving.

    python -m benchmarks.race --dataset folder:data/cifar10-jpeg --minutes 3 10 30 --keep 2 1 --jobs 2

All candidates are trained for the first number of CPU minutes (`benchmarks.budget`), the best for the second, and so
on. Rounds before the last train without a tenth of the training images, and who goes on is decided on those; the last
round trains on all of them. Test images decide nothing. The learning rate rises and falls within each budget, so a
round is a training of its own and goes on from none before it. Adds a row at a time to results/bench/race.csv: killed,
run it again.
"""

import argparse
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from benchmarks.budget import SECONDS_PER_CPU_MINUTE, certified, held_out, trained
from benchmarks.growing import add_rows, asked_of_recipe, done_at, results_of, rows_at
from clustr_core import data
from clustr_core.storage.files import home
from clustr_core.training.recipes import LipschitzMargin, Recipe
from tools.telling import amount, count, told

RADII = [0, 36 / 255, 72 / 255, 108 / 255]
KEY = ["dataset", "candidate", "asked", "minutes", "seed", "images"]
COLUMNS = ["clean", "at_36", "at_72", "at_108"]
_SHARED = {
    "epochs": 1, "batch_size": 256, "learning_rate": 1e-2, "schedule": "triangle", "augmentation": "crop-flip",
    "crop_padding": 2, "margin": 0.55, "temperature": 0.15,
}  # fmt: skip
_SLL, _CPL = {"encoder": "lip-cnn-thin"}, {"encoder": "lip-cnn-cpl"}
_BF16 = {"precision": "bf16-mixed"}
CANDIDATES: dict[str, Recipe] = {
    "SLL 64, PyTorch's Cayley": LipschitzMargin(width=64, **_SHARED | {"encoder": "lip-cnn"}),
    "SLL 64": LipschitzMargin(width=64, **_SHARED | _SLL),
    "SLL 64, bfloat16": LipschitzMargin(width=64, **_SHARED | _SLL | _BF16),
    "CPL 64, bfloat16": LipschitzMargin(width=64, **_SHARED | _CPL | _BF16),
    "CPL 96, bfloat16": LipschitzMargin(width=96, **_SHARED | _CPL | _BF16),
    "CPL 64, bfloat16, annealed": LipschitzMargin(width=64, loss="annealed", **_SHARED | _CPL | _BF16),
    "CPL 64, bfloat16, margin 0.8": LipschitzMargin(width=64, **_SHARED | _CPL | _BF16 | {"margin": 0.8}),
    "CPL 48, bfloat16": LipschitzMargin(width=48, **_SHARED | _CPL | _BF16),
    "CPL 48, bfloat16, margin 0.8": LipschitzMargin(width=48, **_SHARED | _CPL | _BF16 | {"margin": 0.8}),
}


def recipe_of(name: str, dataset: str, seed: int) -> Recipe:
    """A candidate's recipe, but for the epochs that fit."""
    return replace(CANDIDATES[name], dataset=dataset, seed=seed)


def raced(name: str, dataset: str, minutes: float, seed: int, last: bool) -> dict[str, Any]:
    """The row of one training."""
    torch.set_num_threads(1)
    given = data.load_dataset(dataset)
    seen = given if last else held_out(given)
    recipe = recipe_of(name, dataset, seed)
    with tempfile.TemporaryDirectory() as folder:
        run, cost = trained(recipe, seen, Path(folder), minutes * SECONDS_PER_CPU_MINUTE)
        found = certified(run, seen, RADII).set_index("bound")
    best = found.iloc[-1]
    shares = dict(zip(COLUMNS, best.iloc[: len(RADII)].astype(float), strict=True))
    constants = {key: float(best[key]) for key in ("mean_radius", "lipschitz", "lipschitz_lower_bound")}
    where = "test" if last else "held out"
    return {
        "dataset": dataset,
        "candidate": name,
        "asked": asked_of_recipe(recipe),
        "minutes": minutes,
        "seed": seed,
        "images": where,
        **cost,
        **shares,
        **constants,
    }


def score(row: pd.Series) -> float:
    """By what a round decides: the mean of certified accuracy at the three radii."""
    return float(row[COLUMNS[1:]].mean())


def race(dataset: str, minutes: Sequence[float], keep: Sequence[int], seeds: int, jobs: int, path: Path) -> None:
    """All rounds; rows that are there already are not computed again."""
    going = list(CANDIDATES)
    for number, budget in enumerate(minutes):
        last = number == len(minutes) - 1
        images = "test" if last else "held out"
        trainings = [(name, seed) for name in going for seed in range(seeds if last else 1)]
        asked = [
            (dataset, name, asked_of_recipe(recipe_of(name, dataset, seed)), budget, seed, images)
            for name, seed in trainings
        ]
        done = done_at(path, KEY)
        missing = [key for key in asked if key not in done]
        with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
            waiting = [pool.submit(raced, name, dataset, given, seed, last) for _, name, _, given, seed, _ in missing]
            for row in results_of(waiting):
                add_rows(path, pd.DataFrame([row]), KEY)
        if not last:
            of_round = rows_at(path, KEY).set_index(KEY).loc[asked]
            ranked = of_round.apply(score, axis=1).sort_values(ascending=False, kind="stable")
            going = [str(key[1]) for key in ranked.index[: keep[number]]]


def main(arguments: Sequence[str] | None = None) -> None:
    """Race, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dataset", default="folder:data/cifar10-jpeg")
    parser.add_argument("--minutes", type=amount, nargs="+", default=[3.0, 10.0, 30.0])
    parser.add_argument("--keep", type=int, nargs="*", default=[2, 1], help="how many go on after each round")
    parser.add_argument("--seeds", type=count, default=1, help="of the last round")
    parser.add_argument("--jobs", type=count, default=1, help="trainings side by side, a core each")
    options = parser.parse_args(arguments)
    if len(options.keep) != len(options.minutes) - 1:
        parser.error(f"--keep: expected {len(options.minutes) - 1} numbers, one a round but the last")
    path = home() / "results/bench" / "race.csv"
    race(options.dataset, options.minutes, options.keep, options.seeds, options.jobs, path)
    print(rows_at(path, KEY).to_string(index=False, float_format="%.3f"))


if __name__ == "__main__":
    sys.exit(told(main))
