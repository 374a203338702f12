"""The sandwich of robustness: certified <= worst case over all attacks <= each attack <= clean, example by example."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from clustr_core import data
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
from clustr_core.measuring.accuracy import best_bound, binomial_interval
from clustr_core.measuring.certified import CertifiedRun, certificate_rows
from clustr_core.measuring.pieces import (
    CHUNK,
    AttackTarget,
    CachedRows,
    by_image,
    cached_chunks,
    collected,
    dataset_of,
    drawn_order,
    named,
    target_of,
)
from clustr_core.measuring.profile import Profile, SandwichBudget
from clustr_core.storage.files import written_whole
from clustr_core.training.run import Run

# the last two search only inside the certified balls, so that a curve of theirs alone says nothing beyond them
ATTACKS = ("fmn", "ddn", "apgd", "pgd", "random")
WITHIN = ("pgd", "random")
CERTIFIED, WORST, CLEAN = "certified", "worst case", "clean"
# in units of pixels, L2. A certificate speaks of the real model: the rounding of an image's pixels in float32 (3e-6 for
# 3072 of them) and that inside the encoder move the border that is found.
ROUNDING = 1e-5


class CertificateBroken(RuntimeError):
    """A misclassified image lies inside a certified ball, or a curve is above one that bounds it."""


@dataclass(frozen=True)
class Counterexample:
    """A misclassified image inside a ball that was certified.

    Args:
        index, label: of the clean image in its test set.
        radius, norm: the certified radius, and the L2 distance of the two images, in units of pixels.
    """

    image: Float[Tensor, "channel height width"]
    adversarial: Float[Tensor, "channel height width"]
    label: int
    index: int
    radius: float
    norm: float
    attack: str


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
        temperature: of the logits under cross-entropy; None takes that of `attacks.rescaled` on these images.
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
        raise _kept(_counterexample(task, findings, int(broken.index[0])), folder)
    return rows


def violations(rows: pd.DataFrame, *, tolerance: float = ROUNDING) -> pd.DataFrame:
    """The rows that break a certificate, those first that lie deepest inside their ball.

    norm < radius - tolerance, strictly, for an example classified correctly. A certified ball is open: a misclassified
    image on its sphere is no contradiction, nor is one that is inside by no more than ``tolerance``: so much rounding
    may explain.

    Args:
        rows: of `sandwich_rows`.
        tolerance: in units of pixels, L2.
    Raises:
        ValueError: if the tolerance is not a number of at least 0, or a norm or radius is NaN.
    """
    if not 0 <= tolerance < float("inf"):
        raise ValueError(f"tolerance: expected a finite number of at least 0, got {tolerance}")
    if rows[["norm", "radius"]].isna().to_numpy().any():
        raise ValueError("rows: expected numbers as norm and radius, got NaN")
    broken = rows.loc[rows["correct"] & (rows["norm"] < rows["radius"] - tolerance)]
    return broken.iloc[(broken["norm"] - broken["radius"]).argsort(kind="stable")]


def check_sandwich(rows: pd.DataFrame, *, tolerance: float = ROUNDING) -> None:
    """Refuse a table in which an attack broke a certificate.

    Args:
        rows, tolerance: as in `violations`.
    Raises:
        CertificateBroken: names attack, index, radius and norm of the worst row.
        ValueError: as `violations`.
    """
    broken = violations(rows, tolerance=tolerance)
    if len(broken):
        worst = broken.iloc[0]
        raise CertificateBroken(_complaint(worst["attack"], int(worst["index"]), worst["radius"], worst["norm"]))


def save_counterexample(path: Path, found: Counterexample) -> None:
    """Write a counterexample as safetensors, whole or not at all.

    Raises:
        OSError: as the file system says.
    """
    tensors = {
        "image": found.image.detach().cpu().contiguous(),
        "adversarial": found.adversarial.detach().cpu().contiguous(),
        "label": torch.tensor(found.label),
        "index": torch.tensor(found.index),
        "radius": torch.tensor(found.radius, dtype=torch.float64),
        "norm": torch.tensor(found.norm, dtype=torch.float64),
    }
    with written_whole(path) as temporary:
        save_file(tensors, temporary, metadata={"attack": found.attack})


def load_counterexample(path: Path) -> Counterexample:
    """Read what `save_counterexample` wrote."""
    with safe_open(path, framework="pt") as file:
        image, adversarial = file.get_tensor("image"), file.get_tensor("adversarial")
        label, index, radius, norm = (file.get_tensor(name).item() for name in ("label", "index", "radius", "norm"))
        return Counterexample(image, adversarial, label, index, radius, norm, file.metadata()["attack"])


def sandwich_curve(rows: pd.DataFrame, radii: Sequence[float], *, tolerance: float = ROUNDING) -> pd.DataFrame:
    """Accuracies against the radius, from what is certified up to what is clean, with 95 % intervals.

    At radius r an example counts if it is classified correctly and, in the column

        certified    its certified radius is at least r
        worst case   no attack found a misclassified image nearer than r
        <attack>     that attack found none nearer than r
        clean        always

    which is robust accuracy in the open ball, as the certificate is. A norm that is short of the radius by no more than
    ``tolerance`` (see `violations`) counts as the radius, so that the columns are in order at every r. The attacks
    `WITHIN` the certified balls are in the worst case and have no column of their own.

    Args:
        rows: of `sandwich_rows`, of one model, in one or several batches.
        radii: in units of pixels, L2, each at least 0.
    Returns:
        columns ``column at accuracy low high examples``; each column name at every radius.
    Raises:
        CertificateBroken: as `check_sandwich`.
        ValueError: if a radius is negative or named twice, or the attacks have not seen the same examples, once each.
    """
    if not all(0 <= r < float("inf") for r in radii) or len(set(radii)) != len(radii):
        raise ValueError(f"radii: expected different finite numbers of at least 0, got {list(radii)}")
    check_sandwich(rows, tolerance=tolerance)
    reach = _reach(rows)
    parts = []
    for r in radii:
        for column, holds in (reach >= r).sum().items():
            low, high = binomial_interval(holds, len(reach))
            parts.append((column, r, holds / len(reach), low, high, len(reach)))
    return pd.DataFrame(parts, columns=["column", "at", "accuracy", "low", "high", "examples"])


def check_chain(curve: pd.DataFrame) -> None:
    """Refuse a curve that is not certified <= worst case <= each attack <= clean at each of its radii.

    Args:
        curve: of `sandwich_curve`.
    Raises:
        CertificateBroken: names two columns, the first radius at which they are out of order, and both accuracies.
        ValueError: if a column has no value at one of the radii.
    """
    table = curve.pivot(index="at", columns="column", values="accuracy")
    attacks = [name for name in table if name not in (CERTIFIED, WORST, CLEAN)]
    pairs = [(CERTIFIED, WORST), (WORST, CLEAN), *((WORST, name) for name in attacks)]
    missing = {CERTIFIED, WORST, CLEAN} - set(table)
    if missing or table.isna().to_numpy().any():
        raise ValueError(f"curve: expected every column at every radius, got gaps in {sorted(missing) or list(table)}")
    for lower, upper in [*pairs, *((name, CLEAN) for name in attacks)]:
        above = table.loc[table[lower] > table[upper]]
        if len(above):
            low, high = above[lower].iloc[0], above[upper].iloc[0]
            raise CertificateBroken(
                f"at radius {above.index[0]:.6g}: expected {lower} <= {upper}, got {low:.6g} > {high:.6g}"
            )


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


def _findings(task: _Task, attacks: Sequence[str]) -> list[tuple[str, MinimumNorm]]:
    if isinstance(attacks, str) or not attacks or len(set(attacks)) != len(attacks) or not set(attacks) <= set(ATTACKS):
        raise ValueError(f"attacks: expected different ones of {ATTACKS}, got {attacks!r}")
    chosen = [name for name in attacks if name != "apgd" or task.budget.apgd_eps]
    if not chosen:
        raise ValueError('attacks: expected apgd_eps in the budget for "apgd" alone, got none')
    return [(name, _attacked(task, name)) for name in chosen]


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


def _kept(found: Counterexample, folder: Path) -> CertificateBroken:
    """The error to raise, once the counterexample is on the disk; a full disk must not hide a broken certificate."""
    path = folder / f"counterexample-{found.attack}-{found.index}.safetensors"
    complaint = _complaint(found.attack, found.index, found.radius, found.norm)
    try:
        save_counterexample(path, found)
    except OSError as error:
        return CertificateBroken(f"{complaint}; it could not be kept: {error}")
    return CertificateBroken(f"{complaint}; both images are kept in {path}")


def _complaint(attack: str, index: int, radius: float, norm: float) -> str:
    return (
        f"{attack}: expected no misclassified image nearer to example {index} than its certified radius {radius:.9g}, "
        f"got one at L2 distance {norm:.9g}"
    )


def _reach(rows: pd.DataFrame) -> pd.DataFrame:
    """Up to which distance each example holds, a column each of the curve; -infinity for a misclassified one."""
    if rows.empty or rows.duplicated(["attack", "index"]).any():
        raise ValueError("rows: expected each attack and index once, and at least one")
    norms = rows.pivot(index="index", columns="attack", values="norm")
    facts = rows[["index", "label", "correct", "radius"]].drop_duplicates().set_index("index").loc[norms.index]
    if norms.isna().to_numpy().any() or len(facts) != len(norms):
        raise ValueError("rows: expected every attack on the same examples, with one label and one radius each")
    norms = norms.clip(lower=facts["radius"], axis=0)
    alone = {name: norms[name] for name in ATTACKS if name in norms and name not in WITHIN}
    reach = pd.DataFrame({CERTIFIED: facts["radius"], WORST: norms.min(axis=1), **alone, CLEAN: float("inf")})
    return reach.where(facts["correct"], float("-inf"))


def sandwich_of(run: Run, profile: Profile, **options) -> pd.DataFrame:
    """`sandwich_table` of a run with the budget of a profile; the method comes first."""
    return named(run.recipe.method, sandwich_table(run, _sandwich_budget(profile), **options))


def _sandwich_budget(profile: Profile) -> SandwichBudget:
    if profile.sandwich is None:
        raise ValueError(f"profile {profile.name}: expected an entry sandwich, got none")
    return profile.sandwich


def sandwich_table(
    run: Run,
    budget: SandwichBudget,
    *,
    dataset: data.Dataset | None = None,
    device: str | torch.device = "cpu",
    progress: bool = True,
) -> pd.DataFrame:
    """What the attacks that search for the nearest misclassified image find, beside what is certified.

    Certificates are computed in float64, attacks run on the model in float32.

    Returns:
        the columns of `sandwich.sandwich_rows`: one row for each attack and image.
    Raises:
        CertificateBroken: if an attack breaks a certificate; the example is kept in the run's ``counterexamples/``.
        ValueError: if the run is of a method that certifies nothing.
    """
    dataset = dataset_of(run, dataset)
    pieces = _sandwich_pieces(run, budget, dataset, device)
    table = collected(pieces, device=device, title=f"{run.recipe.method} sandwich", progress=progress)
    return by_image(table, "attack")


def sandwich_pieces(
    run: Run, profile: Profile, *, dataset: data.Dataset | None = None, device: str | torch.device = "cpu"
) -> list[CachedRows]:
    """All that `sandwich_of` needs, for jobs that `compute` a share of it each."""
    return _sandwich_pieces(run, _sandwich_budget(profile), dataset_of(run, dataset), device)


def _sandwich_pieces(
    run: Run, budget: SandwichBudget, dataset: data.Dataset, device: str | torch.device
) -> list[CachedRows]:
    """The chunks of `sandwich_table`."""
    if run.recipe.guarantee != "lipschitz":
        raise ValueError(f"run: expected a method on a 1-Lipschitz encoder, got {run.recipe.method}")
    what = asdict(replace(budget, examples=None))
    rows = partial(_sandwich_rows, CertifiedRun(run, dataset, device), target_of(run, device=device), budget)
    return cached_chunks(run, dataset, "sandwich", budget.examples, what, rows)


def _sandwich_rows(
    certified: CertifiedRun, subject: AttackTarget, budget: SandwichBudget, indices: Tensor
) -> pd.DataFrame:
    """One row for each attack and image: the attacks see the model in float32."""
    run, dataset, model = certified.run, certified.dataset, subject.model
    table = certificate_rows(certified, indices).assign(method=run.recipe.method)
    radii = torch.tensor(best_bound(table).set_index("index").loc[indices.tolist(), "radius"].tolist())
    sample = data.to_float(dataset.test_images[drawn_order(dataset)[:CHUNK]].to(subject.device))
    pixels = data.to_float(dataset.test_images[indices].to(subject.device))
    return measure_sandwich(
        model, pixels, dataset.test_labels[indices].to(subject.device), radii.to(pixels), budget, indices=indices,
        folder=run.path / "counterexamples", temperature=rescaled(model, sample).temperature,
    )  # fmt: skip
