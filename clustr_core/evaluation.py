"""Measurements of finished runs: per-example tables, cached beside the run, and the curves drawn from them.

Every table is a set of rows, one for each example and measurement; everything the book says is derived from rows.
"""

import json
from dataclasses import asdict
from pathlib import Path

import pandas as pd
import torch
from jaxtyping import Int
from scipy.stats import binomtest
from torch import Tensor, nn
from tqdm.auto import tqdm

from clustr_core import data, records
from clustr_core.attacks import pgd
from clustr_core.certify import Bound, certified_radius
from clustr_core.lipschitz import lipschitz_lower_bound, lipschitz_upper_bound
from clustr_core.recipes import EVALUATION_CODE, Protocol, code_digest
from clustr_core.training import Run, embed_all

BOUNDS: tuple[Bound, ...] = ("triangle", "nearest", "pairwise")
BATCH = 256


def attack_table(
    run: Run,
    protocol: Protocol,
    *,
    dataset: data.Dataset | None = None,
    device: str | torch.device = "cpu",
    progress: bool = True,
) -> pd.DataFrame:
    """PGD on a run's classifier: one row for each eps, loss and test image.

    Each (eps, loss) is cached beside the run as soon as it is done, so an interrupted measurement goes on.

    Returns:
        columns ``norm eps loss steps restarts index label prediction correct adversarial_prediction robust``.
        ``robust`` says that the attack did not succeed; it is false for an image misclassified when clean.
    """
    pieces = [(eps, loss) for eps in protocol.eps for loss in protocol.losses]
    paths = [_cache_path(run, "attack", _piece(protocol, eps, loss)) for eps, loss in pieces]
    todo = [item for item in zip(pieces, paths, strict=True) if not item[1].exists()]
    if todo:
        model = run.model(device)
        indices, images, labels = some_test_images(run, dataset, protocol.examples)
        for (eps, loss), path in tqdm(todo, f"attack {run.recipe.method} {protocol.norm}", disable=not progress):
            records.write_table(path, _attack_rows(model, indices, images, labels, protocol, eps, loss))
    return pd.concat([records.read_table(path) for path in paths], ignore_index=True)


def certificate_table(
    run: Run,
    *,
    examples: int | None = None,
    dataset: data.Dataset | None = None,
    device: str | torch.device = "cpu",
) -> pd.DataFrame:
    """Certified radii of a run's cluster classifier: one row for each bound and test image.

    Returns:
        columns ``bound index label prediction correct feature_radius radius lipschitz lipschitz_lower_bound``:
        ``feature_radius`` in the embedding space, ``radius`` = feature_radius / lipschitz in pixels of [0, 1].
    """
    path = _cache_path(run, "certificate", {"examples": examples, "bounds": BOUNDS})
    if not path.exists():
        records.write_table(path, _certificate_rows(run, examples, dataset, device))
    return records.read_table(path)


def robust_accuracy(table: pd.DataFrame) -> pd.DataFrame:
    """Robust accuracy against eps, worst case over the losses of each example, with its 95 % interval.

    Args:
        table: of `attack_table`, for one or several methods (column ``method``) and norms.
    Returns:
        columns ``[method] norm eps robust_accuracy low high examples``; eps = 0 is the clean accuracy.
    """
    keys = [name for name in ("method", "norm") if name in table]
    clean = table.drop_duplicates([*keys, "index"]).assign(eps=0.0, robust=lambda t: t["correct"])
    worst = pd.concat([clean, table]).groupby([*keys, "eps", "index"], sort=True)["robust"].all()
    return _proportions(worst.reset_index(), [*keys, "eps"], "robust", "robust_accuracy")


def robust_accuracy_by_loss(table: pd.DataFrame) -> pd.DataFrame:
    """`robust_accuracy` of each attack loss on its own: losses that should agree, and where they do not."""
    keys = [name for name in ("method", "norm") if name in table]
    return _proportions(table, [*keys, "loss", "eps"], "robust", "robust_accuracy")


def certified_accuracy(table: pd.DataFrame, radii: list[float], *, column: str = "radius") -> pd.DataFrame:
    """Share of test images that are classified correctly and certified at each radius, with its 95 % interval.

    Args:
        table: of `certificate_table`.
        column: "radius" (input units) or "feature_radius".
    """
    keys = [name for name in ("method", "bound") if name in table]
    parts = [table.assign(at=r, certified=table["correct"] & (table[column] >= r)) for r in radii]
    return _proportions(pd.concat(parts), [*keys, "at"], "certified", "certified_accuracy")


def binomial_interval(successes: int, trials: int, *, confidence: float = 0.95) -> tuple[float, float]:
    """The exact (Clopper-Pearson) interval of a proportion.

    Raises:
        ValueError: if there is no trial.
    Source: Clopper and Pearson 1934, through scipy.
    """
    if trials < 1:
        raise ValueError(f"trials: expected at least one, got {trials}")
    found = binomtest(int(successes), int(trials)).proportion_ci(confidence_level=confidence, method="exact")
    return float(found.low), float(found.high)


def some_test_images(
    run: Run, dataset: data.Dataset | None, examples: int | None
) -> tuple[Int[Tensor, " batch"], Tensor, Int[Tensor, " batch"]]:
    """The first ``examples`` test images in an order drawn once for all methods: indices, bytes, labels."""
    dataset = dataset or data.load(run.recipe.dataset)
    order = torch.randperm(len(dataset.test_labels), generator=torch.Generator().manual_seed(0))
    indices = order[:examples].sort().values
    return indices, dataset.test_images[indices], dataset.test_labels[indices]


def predictions(model: nn.Module, images: Tensor, device: str | torch.device = "cpu") -> Int[Tensor, " batch"]:
    """Predicted classes of byte images, on the CPU."""
    with torch.no_grad():
        return torch.cat([model(data.to_float(part.to(device))).argmax(dim=1).cpu() for part in images.split(BATCH)])


def _attack_rows(
    model: nn.Module,
    indices: Tensor,
    images: Tensor,
    labels: Tensor,
    protocol: Protocol,
    eps: float,
    loss: str,
) -> pd.DataFrame:
    device = next(iter([*model.parameters(), *model.buffers()])).device
    found = []
    for part, goal in zip(images.split(BATCH), labels.split(BATCH), strict=True):
        result = pgd(
            model,
            data.to_float(part.to(device)),
            goal.to(device),
            eps=eps,
            step_size=protocol.step_size_at(eps),
            steps=protocol.steps,
            restarts=protocol.restarts,
            norm=protocol.norm,
            loss=loss,
            seed=protocol.seed,
        )
        with torch.no_grad():
            after = model(result.adversarial).argmax(dim=1)
        found.append(torch.stack([after, (~result.success).long()]).cpu())
    after, robust = torch.cat(found, dim=1)
    before = predictions(model, images, device)
    return pd.DataFrame(
        {
            "norm": protocol.norm,
            "eps": eps,
            "loss": loss,
            "steps": protocol.steps,
            "restarts": protocol.restarts,
            "index": indices,
            "label": labels,
            "prediction": before,
            "correct": before == labels,
            "adversarial_prediction": after,
            "robust": robust.bool(),
        }
    )


def _certificate_rows(
    run: Run, examples: int | None, dataset: data.Dataset | None, device: str | torch.device
) -> pd.DataFrame:
    model = run.cluster_model(device)
    indices, images, labels = some_test_images(run, dataset, examples)
    upper = lipschitz_upper_bound(model.encoder, run.image_shape)
    lower = lipschitz_lower_bound(model.encoder, data.to_float(images[:64].to(device)))
    embeddings = embed_all(model.encoder, images)
    predicted = predictions(model, images, device)
    rows = {
        "index": indices,
        "label": labels,
        "prediction": predicted,
        "correct": predicted == labels,
    }
    tables = []
    for bound in BOUNDS:
        radius = certified_radius(embeddings, model.clusters, bound=bound, rule="soft", neighbours=model.neighbours)
        tables.append(pd.DataFrame({"bound": bound, **rows, "feature_radius": radius.double().cpu()}))
    table = pd.concat(tables, ignore_index=True)
    return table.assign(radius=table["feature_radius"] / upper, lipschitz=upper, lipschitz_lower_bound=lower)


def _proportions(table: pd.DataFrame, keys: list[str], column: str, name: str) -> pd.DataFrame:
    counts = table.groupby(keys, sort=True)[column].agg(["sum", "count"]).reset_index()
    intervals = [binomial_interval(s, n) for s, n in zip(counts["sum"], counts["count"], strict=True)]
    counts[name] = counts["sum"] / counts["count"]
    counts[["low", "high"]] = intervals
    counts["examples"] = counts["count"]
    return counts.drop(columns=["sum", "count"])


def _piece(protocol: Protocol, eps: float, loss: str) -> dict:
    """What one cached measurement depends on."""
    return {**asdict(protocol), "eps": eps, "losses": loss, "step_size": protocol.step_size_at(eps)}


def _cache_path(run: Run, kind: str, what: dict) -> Path:
    key = records.digest(json.dumps(what, sort_keys=True), code_digest(EVALUATION_CODE))
    return run.path / "tables" / f"{kind}-{key[:12]}.csv"
