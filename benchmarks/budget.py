"""What trainings of equal cost are compared by: epochs that fit, images held out, certified accuracy.

A CPU minute is a wall minute on two cores. Here it is two minutes of process time on one thread, so that other work on
the machine does not count, and two trainings may run side by side.
"""

import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from benchmarks import energy
from clustr_core import data
from clustr_core.measuring.certified import certificate_table
from clustr_core.training.loop import fit
from clustr_core.training.recipes import Recipe
from clustr_core.training.run import Run

SECONDS_PER_CPU_MINUTE = 120
# images at least, from which the time of an epoch is told
_TIMED = 4000
# of the training images, on which settings are chosen
HELD_OUT = 0.1


def epochs_within(recipe: Recipe, dataset: data.Dataset, seconds: float) -> int:
    """How many epochs fit into so much CPU time, from what two more of a tenth of the images take; at least one."""
    count = len(dataset.train_labels)
    chosen = dataset.training_indices(min(count, max(count // 10, _TIMED)), seed=0)
    share = replace(dataset, train_images=dataset.train_images[chosen], train_labels=dataset.train_labels[chosen])
    # the first of them also pays for what a process does once
    _, few, more = (_process_time(replace(recipe, epochs=epochs), share) for epochs in (1, 1, 3))
    return max(1, round(seconds / ((more - few) / 2 * count / len(chosen))))


def _process_time(recipe: Recipe, dataset: data.Dataset) -> float:
    with tempfile.TemporaryDirectory() as folder:
        start = time.process_time()
        fit(recipe, dataset=dataset, folder=Path(folder), device="cpu", progress=False)
        return time.process_time() - start


def held_out(dataset: data.Dataset) -> data.Dataset:
    """The training images alone, a share of each class in place of the test images, always the same."""
    count = len(dataset.train_labels)
    chosen = dataset.training_indices(round(HELD_OUT * count), seed=0)
    rest = torch.ones(count, dtype=torch.bool)
    rest[chosen] = False
    images, labels = dataset.train_images, dataset.train_labels
    return replace(
        dataset,
        train_images=images[rest],
        train_labels=labels[rest],
        test_images=images[chosen],
        test_labels=labels[chosen],
    )


def trained(recipe: Recipe, dataset: data.Dataset, folder: Path, seconds: float | None) -> tuple[Run, dict[str, Any]]:
    """A run of as many epochs as fit, or of the recipe's, and what it took; joules of all that ran beside it, too
    (`energy`)."""
    if seconds is not None:
        recipe = replace(recipe, epochs=epochs_within(recipe, dataset, seconds))
    start = time.process_time()
    with energy.measured() as taken:
        run = fit(recipe, dataset=dataset, folder=folder, device="cpu", progress=False)
    return run, {"epochs": recipe.epochs, "cpu_seconds": time.process_time() - start, "joules": taken.joules}


def certified(run: Run, dataset: data.Dataset, radii: np.ndarray | list[float]) -> pd.DataFrame:
    """Certified accuracy on all test images: one row a bound, one column a radius, which its name gives in full.

    In float64, less all rounding, over the proven Lipschitz constant of the trained weights.
    """
    rows = certificate_table(run, dataset=dataset, progress=False)
    shares = {
        bound: [float((some["correct"] & (some["radius"] >= radius)).mean()) for radius in radii]
        for bound, some in rows.groupby("bound", sort=False)
    }
    found = pd.DataFrame.from_dict(shares, orient="index", columns=[f"{radius:.6g}" for radius in radii])
    area = {bound: float((some["correct"] * some["radius"]).mean()) for bound, some in rows.groupby("bound")}
    constants = rows[["lipschitz", "lipschitz_lower_bound"]].iloc[0].to_dict()
    return found.assign(mean_radius=pd.Series(area), **constants).rename_axis("bound").reset_index()
