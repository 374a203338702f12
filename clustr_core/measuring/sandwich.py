"""The sandwich of robustness: what attacks find nearest to each image, beside the radius that is certified for it."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from clustr_core.attacks.autoattack import CLASSES_NEEDED, autoattack
from clustr_core.attacks.ball import Images, check_inputs
from clustr_core.attacks.losses import AttackLoss, cross_entropy
from clustr_core.attacks.minimum_norm import (
    MinimumNorm,
    check_radius,
    ddn,
    fmn,
    pgd_within,
    random_search,
    smallest,
    tightened,
)
from clustr_core.attacks.result import AttackResult, Model, predicted
from clustr_core.attacks.temperature import Rescaled, rescaled
from clustr_core.measuring.counterexamples import ROUNDING, Counterexample, kept_counterexample, violations
from clustr_core.measuring.profile import SandwichBudget

# the last two search only inside the certified balls, so that a curve of theirs alone says nothing beyond them
ATTACKS = ("fmn", "ddn", "apgd", "pgd", "random")
WITHIN = ("pgd", "random")


@dataclass(frozen=True)
class _Task:
    """The arguments of a sandwich, checked."""

    model: Model
    images: Images
    labels: Int[Tensor, " batch"]
    radius: Float[Tensor, " batch"]
    prediction: Int[Tensor, " batch"]
    indices: Int[Tensor, " batch"]
    budget: SandwichBudget
    cooled: Rescaled
    seed: int

    @property
    def correct(self) -> Bool[Tensor, " batch"]:
        """Which images are classified correctly when clean."""
        return self.prediction == self.labels

    @property
    def loss(self) -> AttackLoss:
        """Cross-entropy of the logits over the temperature: it has a gradient, and verdicts stay the model's own."""
        return lambda logits, labels: cross_entropy(logits / self.cooled.temperature, labels)


def sandwich_rows(
    model: Model,
    images: Images,
    labels: Int[Tensor, " batch"],
    radius: Float[Tensor, " batch"],
    budget: SandwichBudget,
    *,
    indices: Int[Tensor, " batch"],
    attacks: Sequence[str] = ATTACKS,
    temperature: float | None = None,
    seed: int = 0,
) -> pd.DataFrame:
    """What each attack finds around each image, beside what is certified; nothing is compared here.

    "fmn" and "ddn" are the minimum-norm attacks; "apgd" is AutoAttack's APGD on cross-entropy and, with four classes or
    more, on the targeted DLR loss, at one eps after the other on what is left; "pgd" climbs cross-entropy and margin
    inside each certified ball; "random" tries directions on its sphere. Whatever they find is drawn in by a bisection
    of its segment (`minimum_norm.tightened`), and misclassified by ``model`` in the batch as it is given.

    Args:
        radius: certified L2 radius of each image, in units of pixels; that of a misclassified image is taken as 0.
        indices: what the images are called in the table.
        attacks: which of `ATTACKS`; "apgd" needs float32 images, and is left out where the budget has no ``apgd_eps``.
        temperature: of the logits under cross-entropy; None takes that of `temperature.rescaled` on these images.
        seed: of every attack.
    Returns:
        one row for each attack and image, columns ``attack index label correct radius norm gradients``: ``norm`` is the
        smallest L2 distance of a misclassified image that the attack found, infinite if it found none, and 0 for an
        image misclassified when clean.
    Raises:
        ValueError: as the attacks; if an attack is unknown, the temperature is not positive, or ``radius`` or
            ``indices`` are not one an image.
    """
    task = _task(model, images, labels, radius, budget, indices, temperature, seed)
    return _table(task, _findings(task, attacks))


def measure_sandwich(
    model: Model,
    images: Images,
    labels: Int[Tensor, " batch"],
    radius: Float[Tensor, " batch"],
    budget: SandwichBudget,
    *,
    indices: Int[Tensor, " batch"],
    folder: Path,
    attacks: Sequence[str] = ATTACKS,
    temperature: float | None = None,
    seed: int = 0,
    tolerance: float = ROUNDING,
) -> pd.DataFrame:
    """`sandwich_rows`, refused if a certificate is broken; the worst counterexample is kept before that is said.

    Args:
        folder: where ``counterexample-<attack>-<index>.safetensors`` would be written.
        tolerance: as in `check_sandwich`.
    Raises:
        CertificateBroken: as `check_sandwich`, and names the file.
        ValueError: as `sandwich_rows`.
    """
    task = _task(model, images, labels, radius, budget, indices, temperature, seed)
    findings = _findings(task, attacks)
    rows = _table(task, findings)
    broken = violations(rows, tolerance=tolerance)
    if len(broken):
        raise kept_counterexample(_counterexample(task, findings, int(broken.index[0])), folder)
    return rows


def _task(
    model: Model,
    images: Images,
    labels: Tensor,
    radius: Tensor,
    budget: SandwichBudget,
    indices: Tensor,
    temperature: float | None,
    seed: int,
) -> _Task:
    check_inputs(images, labels, norm="l2", eps=1.0)
    check_radius(radius, images)
    if indices.shape != images.shape[:1]:
        raise ValueError(f"indices: expected one for each of {len(images)} images, got shape {list(indices.shape)}")
    images, labels = images.detach(), labels.to(images.device)
    prediction = predicted(model, images, labels)
    certified = radius.to(images.device).masked_fill(prediction != labels, 0)
    cooled = rescaled(model, images) if temperature is None else Rescaled(model, temperature)
    return _Task(model, images, labels, certified, prediction, indices, budget, cooled, seed)


def chosen_attacks(budget: SandwichBudget, attacks: Sequence[str] = ATTACKS) -> tuple[str, ...]:
    """Those of ``attacks`` that a budget pays for: "apgd" is left out where it has no ``apgd_eps``.

    Raises:
        ValueError: if an attack is unknown or named twice, or if none is left.
    """
    if isinstance(attacks, str) or not attacks or len(set(attacks)) != len(attacks) or not set(attacks) <= set(ATTACKS):
        raise ValueError(f"attacks: expected different ones of {ATTACKS}, got {attacks!r}")
    chosen = tuple(name for name in attacks if name != "apgd" or budget.apgd_eps)
    if not chosen:
        raise ValueError('attacks: expected apgd_eps in the budget for "apgd" alone, got none')
    return chosen


def _findings(task: _Task, attacks: Sequence[str]) -> list[tuple[str, MinimumNorm]]:
    return [(name, _attacked(task, name)) for name in chosen_attacks(task.budget, attacks)]


def _attacked(task: _Task, attack: str) -> MinimumNorm:
    if attack == "apgd":
        return _apgd(task)
    on, budget = (task.model, task.images, task.labels), task.budget
    if attack == "random":
        return random_search(*on, radius=task.radius, points=budget.points, seed=task.seed)
    steps, restarts, seed = budget.steps, budget.restarts, task.seed
    if attack == "fmn":
        return fmn(*on, steps=steps, restarts=restarts, seed=seed)
    if attack == "ddn":
        return ddn(*on, steps=steps, restarts=restarts, loss=task.loss, seed=seed)
    size = {"radius": task.radius, "steps": steps, "restarts": restarts, "seed": seed}
    return smallest(pgd_within(*on, loss=task.loss, **size), pgd_within(*on, loss="margin", **size))


def _apgd(task: _Task) -> MinimumNorm:
    """APGD at one eps after the other, each on what the smaller ones left unbroken."""
    with torch.no_grad():
        classes = task.model(task.images[:1]).shape[1]
    parts = [part for part in ("apgd-ce", "apgd-t") if classes >= CLASSES_NEEDED.get(part, 2)]
    result = AttackResult.before(task.images, task.labels, task.prediction)
    for eps in sorted(task.budget.apgd_eps):
        left = (~result.success).nonzero().squeeze(1)
        if not len(left):
            break
        images, labels = task.images[left], task.labels[left]
        found = autoattack(task.cooled, images, labels, norm="l2", eps=eps, parts=parts, seed=task.seed)
        result.note(left, found.adversarial, found.prediction, found.success)
        result.gradients[left] += found.gradients
    return tightened(task.model, task.images, task.labels, result)


def _table(task: _Task, findings: Sequence[tuple[str, MinimumNorm]]) -> pd.DataFrame:
    examples = {"index": task.indices, "label": task.labels, "correct": task.correct, "radius": task.radius.double()}
    tables = []
    for attack, found in findings:
        columns = {**examples, "norm": found.norm, "gradients": found.gradients}
        tables.append(pd.DataFrame({"attack": attack, **{name: value.cpu() for name, value in columns.items()}}))
    return pd.concat(tables, ignore_index=True)


def _counterexample(task: _Task, findings: Sequence[tuple[str, MinimumNorm]], row: int) -> Counterexample:
    """The example of a row of `_table`."""
    attack, found = findings[row // len(task.images)]
    n = row % len(task.images)
    label, index, radius, norm = (
        values[n].item() for values in (task.labels, task.indices, task.radius.double(), found.norm)
    )
    return Counterexample(task.images[n], found.adversarial[n], int(label), int(index), radius, norm, attack)
