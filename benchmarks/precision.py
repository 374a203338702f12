"""What bfloat16 does to outcomes: in training, in an attack, in a certificate.

    python -m benchmarks.precision      (about five minutes on one core)

Methods of profile quick are trained in float32 and in bf16-mixed, with three seeds. Each model is then attacked twice
by the same PGD, climbing in float32 and in bfloat16 (autocast), and each find is judged in float32. Certificates are
those of embeddings in float64, held against what embeddings in bfloat16 would have certified: an image counts as
promised too much where that is more. Autocast on a CPU rounds as on a GPU, with other kernels. Writes
results/bench/precision.csv.
"""

import argparse
import platform
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pandas as pd
import torch
from torch import Tensor, nn

from clustr_core import data
from clustr_core.attacks.gradient import pgd
from clustr_core.certificates.ladder import certified_radius
from clustr_core.measuring.profile import load_profile
from clustr_core.models.classifiers import ClusterClassifier
from clustr_core.storage.files import home
from clustr_core.storage.tables import write_table
from clustr_core.training.loop import fit
from clustr_core.training.recipes import Precision, Recipe
from tools.telling import told

METHODS = ("ce", "pgd-at", "clustr-cert")
# on a CPU tf32 is float32
PRECISIONS: tuple[Precision, ...] = ("32-true", "bf16-mixed")
SEEDS = (111, 112, 113)
EPS, RADIUS = 0.1, 0.28


class InBfloat16(nn.Module):
    """A model under autocast: convolutions and matrix products in bfloat16, logits in float32."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        """Logits."""
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return self.model(images).float()


def outcomes(recipe: Recipe, images: Tensor, labels: Tensor, steps: int) -> pd.DataFrame:
    """One row for each precision of the attack and the embeddings: clean, robust and certified accuracy of one run.

    Returns:
        columns ``climbed clean robust certified too_much``: shares of the images. ``too_much`` counts the images whose
        radius, from embeddings of this precision, exceeds that of float64.
    """
    with tempfile.TemporaryDirectory() as folder:
        model = fit(recipe, folder=Path(folder), device="cpu", progress=False).model()
    rows = []
    for climbed, surface in (("float32", model), ("bfloat16", InBfloat16(model))):
        size = {"eps": EPS, "step_size": EPS / 4, "steps": steps, "restarts": 2, "loss": "margin"}
        found = pgd(surface, images, labels, **size).adversarial
        with torch.no_grad():
            correct = model(images).argmax(dim=1) == labels
            robust = correct & (model(found).argmax(dim=1) == labels)
        row = {"climbed": climbed, "clean": float(correct.float().mean()), "robust": float(robust.float().mean())}
        rows.append(row | (_certified(model, images, correct, climbed) if recipe.guarantee == "lipschitz" else {}))
    return pd.DataFrame(rows)


def _certified(model: nn.Module, images: Tensor, correct: Tensor, precision: str) -> dict[str, float]:
    assert isinstance(model, ClusterClassifier)
    with torch.no_grad():
        single = model.embed(images)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision == "bfloat16"):
            embeddings = model.embed(images).double()
        clusters = model.clusters.to(torch.float64)
        truth = certified_radius(model.double().embed(images.double()), clusters, bound="exact")
    model.to(single.dtype)
    radius = certified_radius(embeddings, clusters, bound="exact")
    return {
        "certified": float(((truth > RADIUS) & correct).float().mean()),
        "too_much": float((radius > truth + 1e-5).float().mean()),
    }


def precision_table(
    methods: Sequence[str] = METHODS, seeds: Sequence[int] = SEEDS, *, steps: int = 50, epochs: int = 0
):
    """The rows of `outcomes` for each method, precision of training and seed.

    Args:
        epochs: instead of the profile's, if positive.
    """
    profile, dataset = load_profile("quick"), data.load_dataset("digits")
    images, labels = data.to_float(dataset.test_images), dataset.test_labels
    tables = []
    for method in methods:
        for precision in PRECISIONS:
            for seed in seeds:
                recipe = replace(profile.recipes[method], precision=precision, seed=seed)
                if epochs:
                    recipe = replace(recipe, epochs=epochs, milestones=(), snapshots=())
                about = {"method": method, "trained": precision, "seed": seed}
                tables.append(pd.DataFrame({**about, **outcomes(recipe, images, labels, steps)}))
    return pd.concat(tables, ignore_index=True)


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the table, and write it with the environment to results/bench/precision.csv."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args(
        arguments
    )
    torch.set_num_threads(1)
    table = precision_table()
    print(table.to_string(index=False, float_format="%.3f"))
    about = {"eps": EPS, "radius": RADIUS, "threads": 1, "machine": platform.machine(), "torch": torch.__version__}
    write_table(home() / "results/bench" / "precision.csv", table.assign(**about))


if __name__ == "__main__":
    sys.exit(told(main))
