"""What clusters can promise: heads, losses and certificates at equal CPU minutes, over several seeds.

    python -m benchmarks.heads --dataset mnist5k --seconds 20 --seeds 3 --jobs 2      (about 40 minutes)
    python -m benchmarks.heads --dataset folder:data/cifar10-jpeg --epochs 4 --losses margin --jobs 2

One encoder, one budget of process time for every training (`benchmarks.budget`), or where few epochs fit, so that a
whole one more or less would decide, one number of epochs: nearly all of their cost is the encoder's. A head is linear,
or has one, two or four clusters a class; a loss is that of `losses.certificate_loss`: margin, emma or annealed. For
each pair of them the margin and the temperature are those of the largest mean certified radius on training images held
out, under one seed that is not used again; then all training images are trained on, once a seed, and the whole curve is
taken on the test images. Adds a training at a time to results/bench/heads-settings.csv and heads.csv: killed, run it
again.
"""

import argparse
import itertools
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from benchmarks.budget import certified, held_out, trained
from benchmarks.growing import add_rows, asked_of_recipe, done_at, results_of, rows_at
from clustr_core import data
from clustr_core.measuring.equal_minutes import TRAINING
from clustr_core.storage.files import home
from clustr_core.training.recipes import ClustrCert, LipschitzMargin, Recipe
from tools.telling import amount, count, told

LOSSES = ("margin", "emma", "annealed")
_SHARED = {
    "encoder": "lip-mlp-thin", "width": 256, "epochs": 1, "batch_size": 128, "learning_rate": 1e-2,
    "schedule": "triangle",
}  # fmt: skip
HEADS: dict[str, Recipe] = {
    "linear": LipschitzMargin(**_SHARED),
    **{f"clusters-{count}": ClustrCert(per_class=count, **_SHARED) for count in (1, 2, 4)},
}
# what is different for photographs: the encoder that certifies most for its minutes (`benchmarks.race`)
PHOTOGRAPHS = "folder:data/cifar10-jpeg"
_OF_PHOTOGRAPHS = {
    "encoder": "lip-cnn-cpl", "width": 48, "precision": "bf16-mixed", "batch_size": 256, "augmentation": "crop-flip",
    "crop_padding": 2,
}  # fmt: skip
# margins in pixels of [0, 1], and temperatures as shares of them
MARGINS = {"mnist5k": (1.0, 2.0), "digits": (0.25, 0.5, 1.0), PHOTOGRAPHS: (0.4, 0.8)}
SHARES = (1 / 8,)
# of 41 radii; of photographs each second one is a multiple of 36/255
LARGEST = {"mnist5k": 4.0, "digits": 1.6, PHOTOGRAPHS: 40 * 18 / 255}
SETTING_SEED = 1000
KEY = [*TRAINING, "asked", "seconds"]
Key = tuple[str, str, str, float, float, int]


def recipe_of(key: Key, epochs: int = 1) -> Recipe:
    """The recipe of a training, but for the epochs where as many as fit are trained."""
    dataset, head, loss, margin, temperature, seed = key
    changes = {
        "epochs": epochs,
        "dataset": dataset,
        "loss": loss,
        "margin": margin,
        "temperature": temperature,
        "seed": seed,
    }
    return replace(HEADS[head], **changes, **(_OF_PHOTOGRAPHS if dataset == PHOTOGRAPHS else {}))


def curves(key: Key, seconds: float, epochs: int = 1) -> pd.DataFrame:
    """One training: a row a bound, with the accuracy that it certifies at each radius.

    Args:
        seconds: the budget; 0 where the epochs are given.
    """
    torch.set_num_threads(1)
    recipe = recipe_of(key, epochs)
    given = data.load_dataset(recipe.dataset)
    seen = held_out(given) if recipe.seed == SETTING_SEED else given
    with tempfile.TemporaryDirectory() as folder:
        run, cost = trained(recipe, seen, Path(folder), seconds or None)
        found = certified(run, seen, np.linspace(0, LARGEST[recipe.dataset], 41).round(6))
    return found.assign(**dict(zip(KEY, asked_at(key, seconds, epochs), strict=True)), **cost)


def asked_at(key: Key, seconds: float, epochs: int = 1) -> tuple:
    """What a training's rows are known by."""
    return *key, asked_of_recipe(recipe_of(key, epochs)), seconds


def best_settings(table: pd.DataFrame) -> dict[tuple[str, str], tuple[float, float]]:
    """Margin and temperature of the largest mean radius, by the best bound, for each head and loss."""
    best = table.groupby(["head", "loss", "margin", "temperature"])["mean_radius"].max()
    chosen = best.groupby(["head", "loss"]).idxmax()
    return {(str(head), str(loss)): (margin, temperature) for head, loss, margin, temperature in chosen}


def computed(keys: Sequence[Key], seconds: float, jobs: int, path: Path, epochs: int = 1) -> pd.DataFrame:
    """The rows of all trainings; those that are there already are not computed again."""
    asked, done = {asked_at(key, seconds, epochs): key for key in keys}, done_at(path, KEY)
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        waiting = [pool.submit(curves, key, seconds, epochs) for at, key in asked.items() if at not in done]
        for rows in results_of(waiting):
            order = [*KEY, *(name for name in rows if name not in KEY)]
            add_rows(path, rows[order], KEY, within=["bound"])
    found = rows_at(path, KEY)
    return found[found[KEY].apply(tuple, axis=1).isin(asked.keys())]


def main(arguments: Sequence[str] | None = None) -> None:
    """Choose settings, train every seed, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dataset", choices=sorted(MARGINS), default="mnist5k")
    parser.add_argument("--heads", choices=[*HEADS], nargs="+", default=[*HEADS])
    parser.add_argument("--losses", choices=LOSSES, nargs="+", default=[*LOSSES])
    parser.add_argument("--seconds", type=amount, default=20.0, help="process time of each training")
    parser.add_argument("--epochs", type=count, help="of each training, in place of a time")
    parser.add_argument("--seeds", type=count, default=3)
    parser.add_argument("--jobs", type=count, default=1, help="trainings side by side, a core each")
    options = parser.parse_args(arguments)
    budget = {"seconds": options.seconds} if options.epochs is None else {"seconds": 0.0, "epochs": options.epochs}
    compute = partial(computed, **budget, jobs=options.jobs)
    pairs, bench = [*itertools.product(options.heads, options.losses)], home() / "results/bench"
    sizes = [(margin, margin * share) for margin in MARGINS[options.dataset] for share in SHARES]
    asked = [(options.dataset, *pair, *size, SETTING_SEED) for pair in pairs for size in sizes]
    chosen = best_settings(compute(asked, path=bench / "heads-settings.csv"))
    asked = [(options.dataset, *pair, *chosen[pair], seed) for pair in pairs for seed in range(options.seeds)]
    table = compute(asked, path=bench / "heads.csv")
    print(table.groupby(["head", "loss", "bound"])["mean_radius"].agg(["mean", "std"]).to_string(float_format="%.4f"))


if __name__ == "__main__":
    sys.exit(told(main))
