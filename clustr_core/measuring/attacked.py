"""Attacks on finished runs: one row for each eps, loss and test image."""

from dataclasses import asdict, replace
from functools import partial
from itertools import product
from pathlib import Path

import pandas as pd
import torch
from torch import Tensor, nn

from clustr_core import data
from clustr_core.attacks.autoattack import autoattack, square
from clustr_core.attacks.cells import cell_walk
from clustr_core.attacks.gradient import pgd
from clustr_core.attacks.paper import paper_pgd, paper_surface
from clustr_core.attacks.result import AttackResult
from clustr_core.attacks.temperature import rescaled
from clustr_core.attacks.transfer import transfer
from clustr_core.measuring.pieces import (
    CHUNK,
    AttackTarget,
    CachedRows,
    Head,
    collected,
    dataset_of,
    drawn_order,
    heads_of,
    kept_at,
    named,
    source_of,
    target_of,
)
from clustr_core.measuring.profile import Profile, Protocol
from clustr_core.training.run import Run


def measure(subject: AttackTarget, protocol: Protocol, dataset: data.Dataset, *, progress: bool = True) -> pd.DataFrame:
    """One attack on one model: one row for each eps, loss and test image.

    Images are attacked in chunks of an order drawn once, each chunk's rows are kept as soon as it is done, so an
    interrupted measurement goes on, one on more images or another grid computes only the chunks that are new, and
    several processes or jobs share them (`compute`).

    Returns:
        columns ``attack norm eps loss steps restarts index label prediction correct adversarial_prediction robust
        gradients``. ``robust`` says that the attack did not succeed; it is false for an image misclassified when clean,
        but for the paper's rule, which does not ask. Predictions are those of the log-domain logits. ``gradients`` are
        the input gradients spent on the image. AutoAttack has no one number of steps: ``steps`` and ``restarts`` are 0.
    """
    title = f"{subject.name} {protocol.attack} {protocol.norm}"
    pieces = measure_pieces(subject, protocol, dataset)
    table = collected(pieces, device=subject.device, title=title, progress=progress)
    return table.sort_values(["eps", "loss", "index"], ignore_index=True)


def measure_pieces(subject: AttackTarget, protocol: Protocol, dataset: data.Dataset) -> list[CachedRows]:
    """All that `measure` needs, for jobs that `compute` a share of it each."""
    chunks = drawn_order(dataset)[: protocol.examples].split(CHUNK)
    test = dataset.test_digest
    return [
        CachedRows(
            _rows_path(subject, protocol, eps, loss, chunk, test),
            partial(attack_rows, subject, dataset, chunk, protocol, eps, loss),
        )
        for eps, loss, chunk in product(protocol.eps, protocol.climbed, chunks)
    ]


def attack_table(
    run: Run,
    protocol: Protocol,
    *,
    head: Head = "own",
    source: Run | None = None,
    dataset: data.Dataset | None = None,
    device: str | torch.device = "cpu",
    progress: bool = True,
) -> pd.DataFrame:
    """`measure` of a run's classifier.

    Args:
        head: "own" for the classifier as its method defines it, "clusters" for clusters fitted afterwards.
        source: for the attack "transfer", the run whose model is climbed.
    """
    subject = target_of(run, head=head, source=source, device=device)
    return measure(subject, protocol, dataset_of(run, dataset), progress=progress)


def attacks_of(
    run: Run,
    profile: Profile,
    *,
    dataset: data.Dataset | None = None,
    device: str | torch.device = "cpu",
    progress: bool = True,
) -> pd.DataFrame:
    """`measure` of a run's `heads_of` under every attack of a profile; the method comes first.

    No attack is transferred from a model to itself.
    """
    dataset = dataset_of(run, dataset)
    attacked = _attacked(run, profile, device)
    tables = [named(each.name, measure(each, protocol, dataset, progress=progress)) for each, protocol in attacked]
    return pd.concat(tables, ignore_index=True)


def attack_pieces(
    run: Run, profile: Profile, *, dataset: data.Dataset | None = None, device: str | torch.device = "cpu"
) -> list[CachedRows]:
    """All that `attacks_of` needs, for jobs that `compute` a share of it each."""
    dataset = dataset_of(run, dataset)
    attacked = _attacked(run, profile, device)
    return [piece for each, protocol in attacked for piece in measure_pieces(each, protocol, dataset)]


def _attacked(run: Run, profile: Profile, device: str | torch.device) -> list[tuple[AttackTarget, Protocol]]:
    """A run's models, each under every attack of a profile."""
    if not profile.attacks:
        raise ValueError(f"profile {profile.name}: expected at least one entry under attacks, got none")
    pairs = []
    for head, protocol in product(heads_of(run), profile.attacks.values()):
        source = source_of(run, profile, protocol.source) if protocol.attack == "transfer" else None
        if protocol.attack != "transfer" or source is not None:
            pairs.append((target_of(run, head=head, source=source, device=device), protocol))
    return pairs


def _rows_path(subject: AttackTarget, protocol: Protocol, eps: float, loss: str, chunk: Tensor, test: str) -> Path:
    """The file of one chunk's rows, under a digest of all that they depend on."""
    asked = replace(protocol, eps=(eps,), losses=(), examples=None, step_size=protocol.step_size_at(eps))
    source = subject.source.identity if subject.source and protocol.attack == "transfer" else None
    what = {**asdict(asked), "loss": loss, "model": subject.identity, "source": source, "chunk": chunk.tolist()}
    return kept_at(subject.tables, "attack", what, test)


def attack_rows(
    subject: AttackTarget, dataset: data.Dataset, indices: Tensor, protocol: Protocol, eps: float, loss: str
) -> pd.DataFrame:
    """The rows of one chunk."""
    model = subject.model
    device = next(iter([*model.parameters(), *model.buffers()])).device
    images = data.to_float(dataset.test_images[indices].to(device))
    labels = dataset.test_labels[indices].to(device)
    sample = data.to_float(dataset.test_images[drawn_order(dataset)[:CHUNK]].to(device))
    result = run_attack(model, images, labels, protocol, eps=eps, loss=loss, sample=sample, source=subject.source)
    with torch.no_grad():
        before, after = model(images).argmax(dim=1), model(result.adversarial).argmax(dim=1)
    settled = protocol.attack == "autoattack"
    columns = {
        "index": indices,
        "label": labels,
        "prediction": before,
        "correct": before == labels,
        "adversarial_prediction": after,
        "robust": ~result.success,
        "gradients": result.gradients,
    }
    return pd.DataFrame(
        {
            "attack": protocol.attack,
            "norm": protocol.norm,
            "eps": eps,
            "loss": loss,
            "steps": 0 if settled else protocol.steps,
            "restarts": 0 if settled else protocol.restarts,
            **{name: column.cpu() for name, column in columns.items()},
        }
    )


def run_attack(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    protocol: Protocol,
    *,
    eps: float,
    loss: str,
    sample: Tensor,
    source: AttackTarget | None = None,
) -> AttackResult:
    """One attack of a protocol on one batch.

    Args:
        sample: clean images from which the temperature of the logits is taken, the same for every batch.
        source: for "transfer", the model that is climbed.
    Raises:
        ValueError: if "transfer" has no source.
    """
    size = {"eps": eps, "step_size": protocol.step_size_at(eps), "steps": protocol.steps, "seed": protocol.seed}
    if protocol.attack == "paper":
        return paper_pgd(paper_surface(model), images, labels, restarts=protocol.restarts, loss=loss, **size)
    if protocol.attack == "cell-walk":
        return cell_walk(model, images, labels, rivals=protocol.restarts, norm=protocol.norm, **size)
    if protocol.attack == "transfer":
        if source is None:
            raise ValueError("source: expected a model to transfer from, got none")
        return transfer(
            source.model, model, images, labels, restarts=protocol.restarts, norm=protocol.norm, loss=loss, **size
        )
    cooled = rescaled(model, sample)
    if protocol.attack == "pgd":
        return pgd(cooled, images, labels, restarts=protocol.restarts, norm=protocol.norm, loss=loss, **size)
    reach = {"norm": protocol.norm, "eps": eps, "seed": protocol.seed}
    if protocol.attack == "square":
        return square(cooled, images, labels, queries=protocol.steps, **reach)
    return autoattack(cooled, images, labels, **reach)
