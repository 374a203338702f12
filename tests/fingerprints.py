"""A few numbers of every recipe and kind of measurement, which another behaviour moves and a rounding does not.

``tests/fingerprints.json`` keeps them beside the version of what makes them. Where they move, either the version is
raised and they are recorded anew, ``python -m tests.fingerprints --write``, or the change is mended.
"""

import argparse
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pandas as pd
import torch
from safetensors.torch import load_file

from clustr_core import data
from clustr_core.attacks.losses import margin_loss
from clustr_core.attacks.temperature import rescaled
from clustr_core.measuring import embeddings
from clustr_core.measuring.attacked import attacks_of, run_attack
from clustr_core.measuring.certified import certificates_of, prototype_certificates
from clustr_core.measuring.embeddings import embedding_table, formation_table, geometry_table
from clustr_core.measuring.examination import ablations_of, diagnostics_of
from clustr_core.measuring.profile import Examination, Profile, Protocol, SandwichBudget, SmoothingBudget, load_profile
from clustr_core.measuring.sandwiched import sandwich_of
from clustr_core.measuring.targets import target_of
from clustr_core.measuring.versions import VERSIONS
from clustr_core.storage.files import digest
from clustr_core.training.loop import fit
from clustr_core.training.recipes import METHODS, Recipe, run_folder, training_version
from clustr_core.training.run import Run, load_run

FILE = Path(__file__).with_suffix(".json")
ROOT = Path(__file__).resolve().parents[1]
WEIGHTS = ROOT / "results/published/quick/weights"
# the ten steps of a training; wide enough, and short enough, that another order of sums hardly shows
SHORT = {"width": 8, "train_examples": 160, "batch_size": 32, "epochs": 3, "learning_rate": 3e-3}
PROTOCOLS = {
    "pgd": Protocol(eps=(0.1,), steps=4, losses=("ce", "margin"), restarts=2, examples=48),
    "pgd in l2": Protocol(norm="l2", eps=(0.75,), steps=4, losses=("dlr",), examples=48),
    "paper": Protocol(attack="paper", eps=(0.1,), steps=6, restarts=2, examples=48),
    "cell-walk": Protocol(attack="cell-walk", eps=(0.1,), steps=4, restarts=2, examples=48),
    "transfer": Protocol(attack="transfer", eps=(0.1,), steps=4, examples=48),
    "square": Protocol(attack="square", eps=(0.15,), steps=40, examples=48),
}


@dataclass(frozen=True)
class Fingerprint:
    """What is recorded of one thing.

    Args:
        version: of what makes the numbers, and of the weights they are measured on.
        numbers: by what they are.
    """

    version: str
    numbers: dict[str, float]


@dataclass(frozen=True)
class Tolerance:
    """How far a number may be from the one recorded: a share of it, or so much."""

    share: float
    much: float = 0.0

    def holds(self, recorded: float, found: float) -> bool:
        """Whether both are the same but for rounding."""
        return bool(np.isclose(found, recorded, rtol=self.share, atol=self.much))


# by the beginning of a number's name: without oneDNN, on two threads, on another processor, or with the
# instructions of older ones (ATEN_CPU_CAPABILITY, ONEDNN_MAX_CPU_ISA, MKL_CBWR), no number moved by a quarter of these;
# a learning rate, or a constant of a loss, changed by a tenth moves some number by more than one of them
TOLERANCES = {
    "loss": Tolerance(2e-3), "moved": Tolerance(1e-2), "logit": Tolerance(1e-2),
    "robust": Tolerance(0, 1.01), "gradients": Tolerance(0.03), "movement": Tolerance(1e-3), "margin": Tolerance(2e-3),
    "correct": Tolerance(0, 1.01), "radius": Tolerance(2e-3), "norm": Tolerance(1e-2), "value": Tolerance(0.02, 0.03),
    "distance": Tolerance(2e-3), "purity": Tolerance(1e-2), "silhouette": Tolerance(1e-2),
}  # fmt: skip


def tolerance(name: str) -> Tolerance:
    """That of a number, by the first word of its name."""
    return TOLERANCES[name.split()[0]]


def recipe_of(method: str) -> Recipe:
    """The short training of a method."""
    kind = METHODS[method]
    # Adam divides by gradients that are rounding errors, and batches of clusters follow what that does to their losses
    own = {"per_cluster": 4, "optimiser": "sgd"} if kind.cluster_batches else {}
    own |= {"replays": 2} if kind.persistent_perturbation else {}
    # as near to the image as TRADES starts, the sign of the divergence's gradient is a matter of rounding
    own |= {"start_scale": 0.1} if hasattr(kind, "start_scale") else {}
    own |= {"learning_rate": 1e-2} if kind.guarantee != "lipschitz" and not kind.clustered else {}
    own |= {"width": 16} if kind.guarantee == "lipschitz" else {}
    own |= {"eps": 0.1, "step_size": 0.04} if hasattr(kind, "eps") else {}
    return kind(**SHORT | own, snapshots=(0,))


def training(recipe: Recipe) -> dict[str, float]:
    """The loss of each epoch, how far the weights went, and what the network says of test images."""
    with tempfile.TemporaryDirectory() as folder:
        run = fit(recipe, dataset=digits(), folder=Path(folder), device="cpu", progress=False)
        final, history = load_file(run.path / "model.safetensors"), run.history
        first = load_file(run.path / "snapshots/epoch-0000.safetensors")
        logits = run.model()(data.to_float(digits().test_images[:64])).detach()
    moved = [(final[f"network.{name}"] - tensor).double().square().sum() for name, tensor in first.items()]
    losses = {f"loss of epoch {epoch}": loss for epoch, loss in zip(history["epoch"], history["loss"], strict=True)}
    said = {"logit spread": float(logits.std()), "logit of the label": _own(logits, digits())}
    return {**losses, "moved": float(torch.stack(moved).sum().sqrt()), **said}


def _own(logits: torch.Tensor, dataset: data.Dataset) -> float:
    """The mean share of the label, in (0, 1), whatever the scale of the logits."""
    return float(logits.div(logits.std()).softmax(dim=1).gather(1, dataset.test_labels[:64, None]).mean())


@cache
def digits() -> data.Dataset:
    """The data that everything here is measured on."""
    return data.load_dataset("digits")


# measurements: of the published networks, so that no change of a training moves them


@contextmanager
def published() -> Iterator[dict[str, Run]]:
    """The published runs of profile quick, in a book's root of their own, measured by nobody yet."""
    with tempfile.TemporaryDirectory() as folder, patch.dict(os.environ, {"CLUSTR_HOME": str(ROOT)}):
        recipes = load_profile("quick").recipes
        os.environ["CLUSTR_HOME"] = folder
        runs = {}
        for method, recipe in recipes.items():
            runs[method] = load_run(Path(shutil.copytree(WEIGHTS / method, run_folder(recipe))))
        yield runs


def small_profile(**parts) -> Profile:
    """The published recipes with budgets of seconds."""
    with patch.dict(os.environ, {"CLUSTR_HOME": str(ROOT)}):
        quick = load_profile("quick")
    return replace(
        quick,
        attacks=PROTOCOLS,
        certified_examples=48,
        examination=Examination(eps=0.1, examples=24, steps=6, restarts=1, queries=20),
        sandwich=SandwichBudget(examples=16, steps=10, points=50, apgd_eps=(1.0,)),
        smoothing=SmoothingBudget(examples=16, samples=200, selection_samples=20),
        **parts,
    )


def attacked(method: str, protocol: Protocol, runs: dict[str, Run]) -> dict[str, float]:
    """The rows of an attack, and where it ends."""
    run, dataset = runs[method], digits()
    source = runs["ce"].model() if protocol.attack == "transfer" else None
    profile = replace(small_profile(), attacks={"it": protocol})
    rows = attacks_of(run, profile, dataset=dataset, progress=False)
    found = {"robust": float(rows["robust"].sum()), "gradients": float(rows["gradients"].mean())}
    images, labels = data.to_float(dataset.test_images[:64]), dataset.test_labels[:64]
    target = target_of(run, dataset)
    cooled = rescaled(target.model, images)
    for loss in protocol.climbed:
        options = {"eps": protocol.eps[0], "loss": loss, "cooled": cooled, "source": source}
        # of another seed than the rows, and whether it succeeds or not
        ends = run_attack(target.model, images, labels, replace(protocol, seed=1), **options).adversarial
        with torch.no_grad():
            margin = margin_loss(target.model(ends).log_softmax(dim=1), labels).clamp(-30, 30)
        found |= {f"movement {loss}": float((ends - images).abs().mean()), f"margin {loss}": float(margin.abs().mean())}
    return found


def certified(rows: pd.DataFrame) -> dict[str, float]:
    """Mean radii of each bound."""
    radii = rows.groupby("bound")[["feature_radius", "radius"]].mean()
    found = {f"radius {bound} {column}": float(radii.loc[bound, column]) for bound in radii.index for column in radii}
    return {"correct": float(rows["correct"].sum()), **found}


def sandwiched(rows: pd.DataFrame) -> dict[str, float]:
    """The smallest distances that each attack finds, as far as it finds any."""
    rows = rows[rows["correct"]].replace([np.inf], np.nan)
    norms = rows.groupby("attack")["norm"].median().dropna()
    found = {f"norm {attack}": float(norm) for attack, norm in norms.items()}
    return {"radius": float(rows["radius"].mean()), "gradients": float(rows["gradients"].mean()), **found}


def measurements(runs: dict[str, Run]) -> dict[str, tuple[str, Callable[[], dict[str, float]]]]:
    """Each measurement: the kind that `VERSIONS` knows it by, and how to take it."""
    profile, dataset = small_profile(), digits()
    quiet = {"dataset": dataset}
    table: dict[str, tuple[str, Callable[[], dict[str, float]]]] = {
        f"attack {name} of {method}": ("attack", partial(attacked, method, protocol, runs))
        for name, protocol in PROTOCOLS.items()
        for method in ("clustr", "pgd-at")
        if method == "clustr" or name in ("pgd", "transfer")
    }
    for method in ("clustr", "clustr-cert", "lip-linear", "smoothing"):
        table[f"certificates of {method}"] = ("certificate", partial(of_certificates, runs[method], profile))
    clustr, cert = runs["clustr"], runs["clustr-cert"]
    others: dict[str, tuple[str, Callable[[], dict[str, float]]]] = {
        "certificates of prototypes": ("certificate", lambda: certified(prototype_certificates(profile, dataset))),
        "sandwich": ("sandwich", lambda: sandwiched(sandwich_of(cert, profile, progress=False, **quiet))),
        "diagnostics": ("diagnostics", lambda: by_name(diagnostics_of(clustr, profile, **quiet), "check", "value")),
        "ablations": ("ablation", lambda: by_name(ablations_of(clustr, profile, **quiet), "change", "robust_accuracy")),
        "embedding": ("embedding", lambda: embedded(clustr)),
        "formation": ("formation", formed),
        "geometry": ("geometry", lambda: geometry(clustr)),
    }
    return table | others


def of_certificates(run: Run, profile: Profile) -> dict[str, float]:
    """Those of a run."""
    return certified(certificates_of(run, profile, dataset=digits(), progress=False))


def by_name(rows: pd.DataFrame, name: str, value: str) -> dict[str, float]:
    """One number a row."""
    return {f"value {each}": float(number) for each, number in zip(rows[name], rows[value], strict=True)}


@contextmanager
def no_umap() -> Iterator[None]:
    """UMAP takes longer to compile than everything here to run, and is not ours."""
    with patch.object(embeddings, "umap_map", lambda points, **_: points[:, :2].double().numpy()):
        yield


def embedded(run: Run) -> dict[str, float]:
    """Which clusters test images fall into."""
    with no_umap():
        rows = embedding_table(run, examples=96, dataset=digits())
    means = {f"distance {axis}": float(rows[axis].mean()) for axis in ("x", "y")}
    return {"correct": float(rows["correct"].sum()), **means}


def formed() -> dict[str, float]:
    """Distances at the start and after a short training, whose steps are so small that they hardly move anything."""
    recipe = replace(recipe_of("clustr"), learning_rate=1e-9, epochs=1)
    with tempfile.TemporaryDirectory() as folder, no_umap():
        run = fit(recipe, dataset=digits(), folder=Path(folder), device="cpu", progress=False)
        rows = formation_table(run, examples=96, dataset=digits())
    return {f"distance {name}": float(rows[name].abs().mean()) for name in ("own_distance", "rival_distance", "margin")}


def geometry(run: Run) -> dict[str, float]:
    """All of its columns."""
    row = geometry_table({"clustr": run}, dataset=digits()).iloc[0]
    shares = {"purity": row["purity"], "purity of predictions": row["accuracy"], "silhouette": row["silhouette"]}
    return {name: float(value) for name, value in {**shares, "distance separation": row["separation"]}.items()}


# recorded and found


def all_found(only: str = "") -> dict[str, Fingerprint]:
    """Everything whose name begins so, computed now."""
    found = {}
    for method in METHODS:
        if (name := f"training {method}").startswith(only):
            recipe = recipe_of(method)
            found[name] = Fingerprint(training_version(recipe), training(recipe))
    with published() as runs:
        weights = digest(*(runs[method].weights_sha256 for method in sorted(runs)))[:10]
        for name, (kind, measure) in measurements(runs).items():
            if name.startswith(only):
                found[name] = Fingerprint(f"{VERSIONS[kind]}, weights {weights}", measure())
    return found


def recorded(file: Path = FILE) -> dict[str, Fingerprint]:
    """What the file holds."""
    content = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    return {name: Fingerprint(**entry) for name, entry in content.items()}


def differences(before: Fingerprint, now: Fingerprint) -> list[str]:
    """The numbers that differ by more than rounding, each with both values."""
    names = sorted(before.numbers.keys() | now.numbers.keys())
    values = [(name, before.numbers.get(name, np.nan), now.numbers.get(name, np.nan)) for name in names]
    return [f"{name}: {was:.6g} -> {is_:.6g}" for name, was, is_ in values if not tolerance(name).holds(was, is_)]


def write(found: dict[str, Fingerprint], file: Path = FILE) -> list[str]:
    """Record what is new or of another version; say what may not be, since its version is the one recorded."""
    old, refused, kept = recorded(file), [], {}
    for name, now in found.items():
        before = old.get(name)
        if before is not None and before.version == now.version:
            refused += [f"{name}: {text}" for text in differences(before, now)]
            kept[name] = before
        else:
            kept[name] = Fingerprint(now.version, {key: float(f"{value:.6g}") for key, value in now.numbers.items()})
    if not refused:
        text = json.dumps({name: vars(entry) for name, entry in kept.items()}, indent=1)
        file.write_text(text + "\n", encoding="utf-8")
    return refused


def main() -> int:
    """Record them, where their versions allow it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", required=True, help="record what has a new version")
    parser.parse_args()
    torch.set_num_threads(1)
    refused = write(all_found())
    for text in refused:
        print(text, file=sys.stderr)
    if refused:
        print("nothing recorded: raise TRAINING_VERSION or VERSIONS first, or mend what moved", file=sys.stderr)
    return int(bool(refused))


if __name__ == "__main__":
    sys.exit(main())
