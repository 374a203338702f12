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
from clustr_core.attacks.registry import OWN_ATTACKS, run_own
from clustr_core.attacks.result import AttackResult, predicted
from clustr_core.attacks.temperature import Rescaled
from clustr_core.attacks.transfer import transfer
from clustr_core.measuring.pieces import (
    CachedRows,
    attacked_at_once,
    collected,
    dataset_of,
    image_chunks,
    kept_at,
    named,
)
from clustr_core.measuring.profile import Profile, Protocol
from clustr_core.measuring.targets import AttackTarget, Head, check_unchanged, heads_of, source_of, target_of
from clustr_core.models.classifiers import ClusterClassifier
from clustr_core.training.run import Run


def measure(
    target: AttackTarget, protocol: Protocol, *, source: AttackTarget | None = None, progress: bool = True
) -> pd.DataFrame:
    """One attack on one model: one row for each eps, loss and test image.

    Images are attacked in chunks of an order drawn once, each chunk's rows are kept as soon as it is done, so an
    interrupted measurement goes on, one on more images or another grid computes only the chunks that are new, and
    several processes or jobs share them (`fill_cache`).

    Args:
        source: for the attack "transfer", what is climbed.
    Returns:
        columns ``attack norm eps loss steps restarts index label prediction correct adversarial_prediction robust
        gradients``. ``robust`` says that the attack did not succeed; it is false for an image misclassified when clean,
        but for the paper's rule, which does not ask. Predictions are those of the log-domain logits. ``gradients`` are
        the input gradients spent on the image. AutoAttack has no one number of steps: ``steps`` and ``restarts`` are 0.
    """
    title = f"{target.name} {protocol.attack} {protocol.norm}"
    pieces = measure_pieces(target, protocol, source=source)
    table = collected(pieces, device=target.device, title=title, progress=progress)
    return table.sort_values(["eps", "loss", "index"], ignore_index=True)


def measure_pieces(target: AttackTarget, protocol: Protocol, *, source: AttackTarget | None = None) -> list[CachedRows]:
    """All that `measure` needs, for jobs that compute a share of it each."""
    chunks = image_chunks(target.dataset, protocol.examples, attacked_at_once(target.device))
    source = source if protocol.attack == "transfer" else None
    return [
        CachedRows(
            _rows_path(target, protocol, eps, loss, chunk, source),
            partial(attack_rows, target, chunk, protocol, eps, loss, source),
            len(chunk),
            kind="attack",
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
    dataset = dataset_of(run, dataset)
    climbed = None if source is None else target_of(source, dataset, device=device)
    return measure(target_of(run, dataset, head=head, device=device), protocol, source=climbed, progress=progress)


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

    Raises:
        ValueError: if the run, or one from which attacks are transferred, was replaced meanwhile.
    """
    attacked = attacked_targets(run, profile, dataset_of(run, dataset), device)
    tables = [
        named(target.name, measure(target, protocol, source=source, progress=progress))
        for target, protocol, source in attacked
    ]
    check_unchanged(each for target, _, source in attacked for each in (target, source))
    return pd.concat(tables, ignore_index=True)


def attack_pieces(
    run: Run, profile: Profile, *, dataset: data.Dataset | None = None, device: str | torch.device = "cpu"
) -> list[CachedRows]:
    """All that `attacks_of` needs, for jobs that compute a share of it each."""
    attacked = attacked_targets(run, profile, dataset_of(run, dataset), device)
    return [piece for target, protocol, source in attacked for piece in measure_pieces(target, protocol, source=source)]


def attacked_targets(
    run: Run, profile: Profile, dataset: data.Dataset, device: str | torch.device, *, captured: bool = False
) -> list[tuple[AttackTarget, Protocol, AttackTarget | None]]:
    """A run's models, each under every attack of a profile, with the model that is climbed if it is another.

    Args:
        captured: as `target_of` takes it.
    """
    if not profile.attacks_on(run.recipe.method):
        raise ValueError(
            f"profile {profile.name}: attacks: expected at least one on {run.recipe.method} that is not transferred "
            "from itself, got none"
        )
    on = {"device": device, "captured": captured}
    targets = [target_of(run, dataset, head=head, **on) for head in heads_of(run)]
    methods = {protocol.source for protocol in profile.attacks.values() if protocol.attack == "transfer"}
    others = {method: source_of(run, profile, method, dataset) for method in sorted(methods)}
    sources = {method: target_of(other, dataset, **on) for method, other in others.items() if other is not None}
    return [
        (target, protocol, sources[protocol.source] if protocol.attack == "transfer" else None)
        for target, protocol in product(targets, profile.attacks.values())
        if protocol.attack != "transfer" or protocol.source in sources
    ]


def _rows_path(
    target: AttackTarget, protocol: Protocol, eps: float, loss: str, chunk: Tensor, source: AttackTarget | None
) -> Path:
    """The file of one chunk's rows, under a digest of all that they depend on."""
    asked = replace(protocol, eps=(eps,), losses=(), examples=None, step_size=protocol.step_size_at(eps))
    climbed = None if source is None else source.identity
    what = {**asdict(asked), "loss": loss, "model": target.identity, "source": climbed, "chunk": chunk.tolist()}
    if protocol.attack in OWN_ATTACKS:
        what["version"] = OWN_ATTACKS[protocol.attack].version
    return kept_at(target.tables, "attack", what, target.dataset.test_digest, device=target.device)


def attack_rows(
    target: AttackTarget, indices: Tensor, protocol: Protocol, eps: float, loss: str, source: AttackTarget | None
) -> pd.DataFrame:
    """The rows of one chunk."""
    images, labels, before = target.images(indices), target.labels(indices), target.clean_predictions(indices)
    climbed = None if source is None else source.model
    result = run_attack(
        target.model, images, labels, protocol, eps=eps, loss=loss, cooled=target.cooled, source=climbed
    )
    # the paper's attack sees scores, which underflow where logits do not
    scores = protocol.attack == "paper" and isinstance(target.model, ClusterClassifier)
    after = predicted(target.model, result.adversarial, labels) if scores else result.prediction
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
    cooled: Rescaled,
    source: nn.Module | None = None,
) -> AttackResult:
    """One attack of a protocol on one batch.

    Args:
        cooled: the model at its temperature, the same for every batch; cross-entropy is climbed on it.
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
            source, model, images, labels, restarts=protocol.restarts, norm=protocol.norm, loss=loss, **size
        )
    if protocol.attack == "pgd":
        return pgd(cooled, images, labels, restarts=protocol.restarts, norm=protocol.norm, loss=loss, **size)
    if protocol.attack in OWN_ATTACKS:
        return run_own(protocol.attack, cooled, images, labels, restarts=protocol.restarts, norm=protocol.norm, **size)
    reach = {"norm": protocol.norm, "eps": eps, "seed": protocol.seed}
    if protocol.attack == "square":
        return square(cooled, images, labels, queries=protocol.steps, **reach)
    return autoattack(cooled, images, labels, **reach)
