"""Which 1-Lipschitz convolution buys the most certified accuracy for a CPU minute: SLL, AOL or Cayley.

    python -m benchmarks.convolutions --dataset folder:data/cifar10-jpeg --minutes 3      (about 15 minutes)

One network, one loss, one budget of CPU time (process time on one thread, one job after the other, in whole epochs);
only the convolution differs, and the learning rate: for each the better of 0.01 and 0.002 after one epoch, so that none
is judged by another's. Writes results/bench/convolutions.csv.
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pandas as pd
import torch

from benchmarks.budget import epochs_within
from clustr_core import data
from clustr_core.certificates.ladder import certified_radius
from clustr_core.certificates.lipschitz import lipschitz_lower_bound, lipschitz_upper_bound
from clustr_core.measuring.pieces import some_test_images
from clustr_core.numerics.distances import squared_distances
from clustr_core.storage.files import home
from clustr_core.storage.tables import write_table
from clustr_core.training.loop import fit
from clustr_core.training.recipes import ClustrCert
from tools.telling import amount, count, told

# encoder and learning rate
KINDS = {"SLL": ("lip-cnn", 1e-2), "AOL": ("lip-cnn-aol", 2e-3), "Cayley": ("lip-cnn-cayley", 1e-2)}
RADII = (36 / 255, 72 / 255, 108 / 255)


def measured(recipe: ClustrCert, dataset: data.Dataset, examples: int) -> dict[str, float]:
    """What one training takes and gives."""
    with tempfile.TemporaryDirectory() as folder:
        start = time.process_time()
        run = fit(recipe, dataset=dataset, folder=Path(folder), device="cpu", progress=False)
        seconds = time.process_time() - start
        model = run.model().double()
    _, images, labels = some_test_images(run, dataset, examples)
    pixels = data.to_float(images)
    lipschitz = lipschitz_upper_bound(model.encoder, run.image_shape)
    with torch.no_grad():
        embeddings = torch.cat([model.embed(part.double()) for part in pixels.split(250)])
    # the rounding of float64, which has no bound for Cayley's convolution, is left out for all alike
    radius = certified_radius(embeddings, model.clusters, bound="exact", lipschitz=lipschitz)
    correct = model.clusters.labels[squared_distances(embeddings, model.centroids).argmin(dim=1)] == labels
    return {
        "cpu_seconds": seconds,
        "clean_accuracy": float(correct.float().mean()),
        **{f"certified_{round(255 * r)}_255": float((correct & (radius >= r)).float().mean()) for r in RADII},
        "lipschitz": lipschitz,
        "lipschitz_lower_bound": lipschitz_lower_bound(model.encoder, pixels[:32].double()),
    }


def comparison(dataset: data.Dataset, *, width: int, minutes: float, examples: int) -> pd.DataFrame:
    """One row for each convolution."""
    rows = []
    for kind, (encoder, rate) in KINDS.items():
        recipe = ClustrCert(
            dataset=dataset.name, encoder=encoder, width=width, epochs=1, batch_size=256, learning_rate=rate,
            schedule="triangle", augmentation="crop-flip", crop_padding=2, margin=0.55, temperature=0.15,
        )  # fmt: skip
        epochs = epochs_within(recipe, dataset, 60 * minutes)
        found = measured(replace(recipe, epochs=epochs), dataset, examples)
        rows.append({"convolution": kind, "epochs": epochs, "learning_rate": rate, **found})
    setting = {"width": width, "minutes": minutes, "examples": examples, "torch": torch.__version__}
    return pd.DataFrame(rows).assign(dataset=dataset.name, **setting)


def main(arguments: Sequence[str] | None = None) -> None:
    """Compare, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dataset", default="folder:data/cifar10-jpeg")
    parser.add_argument("--width", type=count, default=64)
    parser.add_argument("--minutes", type=amount, default=3.0)
    parser.add_argument("--examples", type=count, default=2000)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    table = comparison(
        data.load_dataset(options.dataset), width=options.width, minutes=options.minutes, examples=options.examples
    )
    write_table(home() / "results/bench" / "convolutions.csv", table)
    print(table.to_string(index=False, float_format="%.3f"))


if __name__ == "__main__":
    sys.exit(told(main))
