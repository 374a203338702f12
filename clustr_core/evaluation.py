"""Measurements of finished runs: tables with one row for each example, cached beside the run."""

import json
from dataclasses import asdict
from pathlib import Path

import pandas as pd
import torch
from jaxtyping import Int
from torch import Tensor, nn
from tqdm.auto import tqdm

from clustr_core import data, records
from clustr_core.attacks import pgd
from clustr_core.certify import Bound, certified_radius
from clustr_core.lipschitz import lipschitz_lower_bound, lipschitz_upper_bound
from clustr_core.recipes import ATTACK_CODE, CERTIFICATE_CODE, Profile, Protocol, code_digest
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
    dataset = dataset_of(run, dataset)
    paths = [cache_path(run, dataset, "attack", _piece(protocol, eps, loss), ATTACK_CODE) for eps, loss in pieces]
    todo = [item for item in zip(pieces, paths, strict=True) if not item[1].exists()]
    if todo:
        model = run.model(device)
        indices, images, labels = some_test_images(run, dataset, protocol.examples)
        for (eps, loss), path in tqdm(todo, f"attack {run.recipe.method} {protocol.norm}", disable=not progress):
            records.write_table(path, _attack_rows(model, indices, images, labels, protocol, eps, loss))
    return pd.concat([records.read_table(path) for path in paths], ignore_index=True)


def attacks_of(run: Run, profile: Profile, **options) -> pd.DataFrame:
    """`attack_table` of a run under every attack of a profile; the method comes first."""
    tables = [attack_table(run, protocol, **options) for protocol in profile.attacks.values()]
    if not tables:
        raise ValueError(f"profile {profile.name}: expected at least one entry under attacks, got none")
    return _named(run, pd.concat(tables, ignore_index=True))


def certificates_of(run: Run, profile: Profile, **options) -> pd.DataFrame:
    """`certificate_table` of a run on as many images as a profile says; the method comes first."""
    return _named(run, certificate_table(run, examples=profile.certified_examples, **options))


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
    dataset = dataset_of(run, dataset)
    path = cache_path(run, dataset, "certificate", {"examples": examples, "bounds": BOUNDS}, CERTIFICATE_CODE)
    if not path.exists():
        records.write_table(path, _certificate_rows(run, examples, dataset, device))
    return records.read_table(path)


def dataset_of(run: Run, dataset: data.Dataset | None) -> data.Dataset:
    """The run's dataset, loaded unless given.

    Raises:
        ValueError: if it is another one, or its training images are no longer those that the run saw.
    """
    dataset = dataset or data.load(run.recipe.dataset)
    if dataset.name != run.recipe.dataset:
        raise ValueError(f"dataset: expected {run.recipe.dataset!r} as in the run, got {dataset.name!r}")
    seen = dataset.train_images[: run.recipe.train_examples]
    if records.digest(seen.numpy().tobytes()) != run.train_images_sha256:
        raise ValueError(
            f"dataset: expected the images that {run.path.name} was trained on; {dataset.name} has changed"
        )
    return dataset


def cache_path(run: Run, dataset: data.Dataset, kind: str, what: dict, code: tuple[str, ...]) -> Path:
    """Where a measurement is kept: beside its run, under a digest of the question, the test set and the code."""
    test = records.digest(dataset.test_images.numpy().tobytes(), dataset.test_labels.numpy().tobytes())
    key = records.digest(json.dumps(what, sort_keys=True), test, code_digest(code))
    return run.path / "tables" / f"{kind}-{key[:12]}.csv"


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


def _named(run: Run, table: pd.DataFrame) -> pd.DataFrame:
    table.insert(0, "method", run.recipe.method)
    return table


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


def _piece(protocol: Protocol, eps: float, loss: str) -> dict:
    """What one cached measurement depends on."""
    return {**asdict(protocol), "eps": eps, "losses": loss, "step_size": protocol.step_size_at(eps)}
