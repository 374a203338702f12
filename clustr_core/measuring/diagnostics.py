"""Checks that tell masking from robustness: is the robust accuracy that an evaluation reports that of the model?"""

import math
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.overrides import TorchFunctionMode

from clustr_core.attacks.autoattack import square
from clustr_core.attacks.ball import Images, check_gradient, check_inputs, project
from clustr_core.attacks.gradient import pgd
from clustr_core.attacks.losses import cross_entropy, margin_loss
from clustr_core.attacks.names import PAPER_STEP_SIZE
from clustr_core.attacks.paper import paper_pgd
from clustr_core.attacks.result import AttackResult, Model, misclassified
from clustr_core.attacks.temperature import rescaled
from clustr_core.attacks.transfer import transfer
from clustr_core.numerics.distances import per_item

# from every image in [0, 1] a ball of this L-inf radius reaches plain grey
GREY_EPS = 0.5
UNDERFLOW = 1e-10
# the classes that AutoAttack's targeted DLR loss needs
CLASSES_WANTED = 4
# what a check that speaks is about
Kind = Literal["witness", "gradients", "objective", "outputs", "forward"]


@dataclass(frozen=True)
class Check:
    """What a check asks, and from which value on it speaks.

    Args:
        threshold: a value above it flags.
        kind: a "witness" holds images in the ball that are misclassified though the evaluation calls them robust, which
            proves that the number is too high. The others are symptoms, by their cause: no "gradients"; an "objective"
            that is not that of the model; "outputs" that the losses were not made for; a "forward" pass that draws or
            optimises.
        source: where the check and its threshold come from.
        meaning: what the value is.
    """

    threshold: float
    kind: Kind
    source: str
    meaning: str


@dataclass(frozen=True)
class Finding:
    """One check's answer.

    Args:
        value: in the units that ``meaning`` names; accuracies and shares in [0, 1].
        flagged: whether ``value`` is above ``threshold``: it speaks of masking.
    """

    check: str
    value: float
    threshold: float
    flagged: bool
    source: str
    meaning: str


# Accuracies are compared with one threshold: above what the honest evaluations of the toy show (0), at most half of
# what one of the masked ones does, and several images of 64, so that chance does not speak. It was fixed before other
# models were judged.
MATERIAL = 0.05
_TOY = "threshold: separates honest from masked evaluations of the toy"
CHECKS: dict[str, Check] = {
    "zero gradients": Check(
        0.0, "gradients", "Athalye et al. 2018; threshold: the code of Croce and Hein 2020, any",
        "share of images whose input gradient of cross-entropy on the surface is exactly zero",
    ),
    "underflowing gradients": Check(
        MATERIAL, "gradients", f"this book; {_TOY}",
        "share of images whose largest input gradient of cross-entropy on the surface is below 1e-10",
    ),
    "loss disagreement": Check(
        MATERIAL, "witness", f"Carlini et al. 2019; {_TOY}",
        "robust accuracy under cross-entropy on the surface, minus the lowest under margin, and under both on logits",
    ),
    "grey ball": Check(
        MATERIAL, "objective", f"Athalye et al. 2018; {_TOY}",
        "share of images called robust at eps = 0.5, where plain grey, within reach of every image, is misclassified",
    ),
    "loss curves": Check(
        MATERIAL, "objective", f"Carlini et al. 2019; {_TOY}",
        "the loss disagreement at its largest as eps grows",
    ),
    "black box: Square": Check(
        0.002, "witness", "Athalye et al. 2018; threshold: the code of Croce and Hein 2020",
        "robust accuracy as reported, minus that under the Square attack, which sees no gradient",
    ),
    "black box: transfer": Check(
        0.002, "witness", "Athalye et al. 2018; threshold: as for Square",
        "robust accuracy as reported, minus that under images made for another model",
    ),
    "budget": Check(
        MATERIAL, "witness", "Carlini et al. 2019; threshold: 5 points of accuracy, the toy does not tell",
        "robust accuracy as reported, minus that with 5 times the steps and twice the restarts",
    ),
    "wrong hill": Check(
        MATERIAL, "objective", f"this book; {_TOY}",
        "share of images that the attack leaves with a higher loss on the surface and yet classified more surely",
    ),
    "slices": Check(
        MATERIAL, "witness", f"this book; {_TOY}",
        "share of images called robust though the plane of the attack's and a random direction holds a misclassified "
        "image within the ball",
    ),
    "randomised": Check(
        1e-4, "forward", "Croce and Hein 2020, their code's check and threshold",
        "largest L2 difference of normalised outputs between five passes",
    ),
    "gradients in forward": Check(
        0.0, "forward", "Croce and Hein 2020, their code's check and threshold",
        "how often the forward pass itself asks for gradients: a dynamic defence",
    ),
    "no logits": Check(
        0.0, "outputs", "the code of Croce and Hein 2020, for probabilities; this book, for scores",
        "1 if no output is negative: they look like probabilities or scores",
    ),
    "too few classes": Check(
        0.0, "outputs", "the code of Croce and Hein 2020",
        "classes that AutoAttack's targeted DLR loss lacks: it needs four",
    ),
    "ablation": Check(
        MATERIAL, "witness", f"this book; {_TOY}",
        "largest drop of robust accuracy when one ingredient of the released rule is put right",
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Evaluation:
    """An evaluation to be judged: the released rule (L-inf), climbing cross-entropy on a surface, on some images.

    Args:
        surface: what the attack climbs, such as `paper.paper_surface` of the model.
        model: the same classifier's log-domain logits.
        eps: radius of the ball, in units of pixels in [0, 1].
        steps, restarts: the evaluation's budget.
        step_size: None is the released 2/255 where that many steps of it lead from the centre to the ball's border,
            else 2.5 eps / steps: what is judged is a surface and a rule, not a step far too short for the ball.
    Raises:
        ValueError: as `attacks.pgd`; or if surface and model differ in their classes, or there is no image.
    """

    surface: Model
    model: Model
    images: Images
    labels: Int[Tensor, " batch"]
    eps: float
    steps: int = 20
    restarts: int = 2
    step_size: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        """Check sizes, pixels, labels and outputs."""
        given = 1.0 if self.step_size is None else self.step_size
        check_inputs(
            self.images, self.labels, norm="linf", eps=self.eps, step_size=given, steps=self.steps,
            restarts=self.restarts,
        )  # fmt: skip
        if not len(self.images):
            raise ValueError("images: expected at least one, got none")
        misclassified(self.model, self.images[:1], self.labels[:1])
        misclassified(self.surface, self.images[:1], self.labels[:1])
        theirs, ours = (_outputs(model, self.images[:1]).shape[1] for model in (self.surface, self.model))
        if theirs != ours:
            raise ValueError(f"surface: expected the model's {ours} classes, got {theirs}")

    @property
    def step(self) -> float:
        """The step that is taken, in units of pixels."""
        if self.step_size is not None:
            return self.step_size
        return PAPER_STEP_SIZE if self.steps * PAPER_STEP_SIZE >= self.eps else 2.5 * self.eps / self.steps

    @cached_property
    def logits(self) -> Model:
        """The model at a temperature at which cross-entropy has a gradient."""
        return rescaled(self.model, self.images)

    @cached_property
    def attacked(self) -> AttackResult:
        """What the evaluation's attack did."""
        return self.released()

    @property
    def robust(self) -> Bool[Tensor, " batch"]:
        """Which images the evaluation calls robust."""
        return ~self.attacked.success

    @property
    def robust_accuracy(self) -> float:
        """The number that the evaluation reports."""
        return _share(self.robust)

    def released(self, surface: Model | None = None, **changed) -> AttackResult:
        """The evaluation's attack, on another surface or with other options of `paper.paper_pgd`."""
        options = {"eps": self.eps, "steps": self.steps, "step_size": self.step, "restarts": self.restarts}
        on = self.surface if surface is None else surface
        return paper_pgd(on, self.images, self.labels, seed=self.seed, **{**options, **changed})

    def pgd(self, surface: Model, loss: str, eps: float, *, step_size: float | None = None) -> AttackResult:
        """`attacks.pgd` with the evaluation's steps and restarts; the step is 2.5 eps / steps unless given."""
        step_size = 2.5 * eps / self.steps if step_size is None else step_size
        with warnings.catch_warnings():
            # that surfaces are no logits is a finding here, and reported as one
            warnings.filterwarnings("ignore", message="model: expected logits", category=UserWarning)
            return pgd(
                surface, self.images, self.labels, eps=eps, step_size=step_size, steps=self.steps,
                restarts=self.restarts, loss=loss, seed=self.seed,
            )  # fmt: skip


def input_gradients(evaluation: Evaluation) -> Float[Tensor, " batch"]:
    """The largest entry of each clean image's input gradient of cross-entropy on the surface, in nats a unit."""
    leaf = evaluation.images.detach().clone().requires_grad_()
    outputs = evaluation.surface(leaf)
    if not outputs.requires_grad:
        raise ValueError("surface: expected outputs with a gradient, got none, and nothing to climb")
    (gradient,) = torch.autograd.grad(cross_entropy(outputs, evaluation.labels).sum(), leaf)
    check_gradient(gradient)
    return gradient.flatten(1).abs().amax(dim=1)


def zero_gradients(evaluation: Evaluation) -> Finding:
    """Share of images without any gradient to climb."""
    return _finding("zero gradients", _share(input_gradients(evaluation) == 0))


def underflowing_gradients(evaluation: Evaluation) -> Finding:
    """Share of images whose gradient is zero or about to be."""
    return _finding("underflowing gradients", _share(input_gradients(evaluation) < UNDERFLOW))


def loss_table(evaluation: Evaluation, eps: Sequence[float]) -> pd.DataFrame:
    """Robust accuracy under losses that should agree, on the surface and on cooled logits, at each eps.

    The same correct attack throughout (any success kept, steps of 2.5 eps / steps, the evaluation's steps and
    restarts), so that nothing but what is climbed differs, and no step is too short for a large ball.

    Returns:
        columns ``eps surface loss robust_accuracy``; ``surface`` is "evaluation" or "logits".
    """
    surfaces = {"evaluation": evaluation.surface, "logits": evaluation.logits}
    rows = [
        {"eps": size, "surface": name, "loss": loss, "robust_accuracy": accuracy}
        for size in eps
        for name, surface in surfaces.items()
        for loss in ("ce", "margin")
        for accuracy in [_share(~evaluation.pgd(surface, loss, size).success)]
    ]
    return pd.DataFrame(rows)


def loss_disagreement(evaluation: Evaluation) -> Finding:
    """How much cross-entropy on the surface leaves standing that margin, or the logits, would not."""
    return _finding("loss disagreement", _largest_gap(loss_table(evaluation, [evaluation.eps])))


def loss_curves(evaluation: Evaluation) -> Finding:
    """The same at 2 eps and 4 eps: robust accuracy must fall as fast under every loss."""
    grid = sorted({min(factor * evaluation.eps, GREY_EPS) for factor in (2, 4)})
    return _finding("loss curves", _largest_gap(loss_table(evaluation, grid)))


def grey_ball(evaluation: Evaluation) -> Finding:
    """Share of images that cross-entropy on the surface leaves standing at eps = 0.5 although grey is another class.

    At this eps every image can become the one grey image, which has one class: nothing else is robust, whatever the
    model. The step is 2.5 eps / steps: 20 of the released 2/255 would not cross this ball on any surface, so they
    would raise a false alarm about every model.
    """
    standing = ~evaluation.pgd(evaluation.surface, "ce", GREY_EPS).success
    grey = torch.full_like(evaluation.images[:1], 0.5)
    refuted = _outputs(evaluation.model, grey).argmax(dim=1) != evaluation.labels
    return _finding("grey ball", _share(standing & refuted))


def square_gap(evaluation: Evaluation, *, queries: int = 300) -> Finding:
    """What the evaluation leaves standing, less what the Square attack on the model's logits does.

    Args:
        queries: for each image.
    """
    result = square(
        evaluation.logits, evaluation.images, evaluation.labels, norm="linf", eps=evaluation.eps, queries=queries,
        seed=evaluation.seed,
    )  # fmt: skip
    return _finding("black box: Square", evaluation.robust_accuracy - _share(~result.success))


def transfer_gap(evaluation: Evaluation, source: Model) -> Finding:
    """What the evaluation leaves standing, less what images made for another model do.

    Args:
        source: another model of the same classes.
    """
    result = transfer(
        source, evaluation.model, evaluation.images, evaluation.labels, eps=evaluation.eps,
        step_size=2.5 * evaluation.eps / evaluation.steps, steps=evaluation.steps, restarts=evaluation.restarts,
        seed=evaluation.seed,
    )  # fmt: skip
    return _finding("black box: transfer", evaluation.robust_accuracy - _share(~result.success))


def budget(evaluation: Evaluation) -> Finding:
    """What the same rule breaks with 5 times the steps, of the same size, and twice the restarts."""
    more = evaluation.released(steps=5 * evaluation.steps, restarts=2 * evaluation.restarts)
    return _finding("budget", evaluation.robust_accuracy - _share(~more.success))


def wrong_hill(evaluation: Evaluation) -> Finding:
    """Share of images whose loss on the surface rises along the attack while the log-margin falls."""
    before, after = evaluation.images, evaluation.attacked.adversarial
    labels = evaluation.labels
    climbed = _loss(evaluation.surface, after, labels) > _loss(evaluation.surface, before, labels)
    margins = [margin_loss(_outputs(evaluation.model, images), labels) for images in (before, after)]
    return _finding("wrong hill", _share(climbed & (margins[1] < margins[0])))


def slices(evaluation: Evaluation, *, points: int = 9) -> Finding:
    """Share of images called robust though a slice of their ball, as in `on_slice`, holds a misclassified image.

    Args:
        points: of the slice's grid, along each axis.
    Raises:
        ValueError: if the grid has fewer than two points along an axis.
    """
    refuted = torch.zeros_like(evaluation.robust)
    axes = slice_axes(evaluation)
    for a, b in _grid(points):
        moved = on_slice(evaluation, axes, a, b)
        refuted |= _outputs(evaluation.model, moved).argmax(dim=1) != evaluation.labels
    return _finding("slices", _share(evaluation.robust & refuted))


def slice_table(evaluation: Evaluation, *, points: int = 21) -> pd.DataFrame:
    """What the attack climbs and what decides, on a slice through each image's ball: to be drawn.

    Returns:
        columns ``index a b loss margin``: cross-entropy on the surface, and the model's log-margin, in nats, which is
        positive where the image is misclassified; the rows with b = 0 run along the attack's direction.
    Raises:
        ValueError: as `slices`.
    """
    tables, axes = [], slice_axes(evaluation)
    for a, b in _grid(points):
        moved = on_slice(evaluation, axes, a, b)
        loss = _loss(evaluation.surface, moved, evaluation.labels)
        margin = margin_loss(_outputs(evaluation.model, moved), evaluation.labels)
        tables.append(pd.DataFrame({"a": a, "b": b, "loss": loss.cpu(), "margin": margin.cpu()}))
    return pd.concat(tables).rename_axis("index").reset_index().sort_values(["index", "a", "b"], ignore_index=True)


def slice_axes(evaluation: Evaluation) -> tuple[Images, Images]:
    """Each image's direction of attack, scaled to largest entry 1 (0 where it did not move), and random signs."""
    offsets = evaluation.attacked.adversarial - evaluation.images
    largest = per_item(offsets.flatten(1).abs().amax(dim=1), offsets)
    generator = torch.Generator(offsets.device).manual_seed(evaluation.seed)
    random = torch.randint(2, offsets.shape, generator=generator, device=offsets.device)
    return offsets / largest.where(largest > 0, 1), 2 * random.to(offsets) - 1


def on_slice(evaluation: Evaluation, axes: tuple[Images, Images], a: float, b: float) -> Images:
    """x + eps (a u + b v), projected into the ball and into [0, 1]; u is the attack's direction, v the random one."""
    attack, random = axes
    moved = evaluation.images + evaluation.eps * (a * attack + b * random)
    return project(moved, evaluation.images, evaluation.eps, "linf")


def randomised(evaluation: Evaluation, *, passes: int = 5) -> Finding:
    """Whether the surface gives other outputs each time; judged on outputs scaled to L2 norm 1.

    Source: the check in the code of Croce and Hein 2020. Deviation: the global random state is put back.
    """
    with _random_state_kept():
        outputs = [_outputs(evaluation.surface, evaluation.images) for _ in range(passes)]
    unit = [found / (found.norm(dim=1, keepdim=True) + 1e-10) for found in outputs]
    differences = [(a - b).norm(dim=1).amax().item() for i, a in enumerate(unit) for b in unit[:i]]
    return _finding("randomised", max(differences, default=0.0))


def gradients_in_forward(evaluation: Evaluation) -> Finding:
    """How often the surface's forward pass asks for gradients, as defences do that optimise at test time.

    Source: the check in the code of Croce and Hein 2020. Deviation: torch's functions are counted, not any of that
        name.
    """
    with _GradientCalls() as calls:
        evaluation.surface(evaluation.images)
    return _finding("gradients in forward", float(calls.count))


def no_logits(evaluation: Evaluation) -> Finding:
    """Whether the surface's outputs look like probabilities or scores: none is negative.

    A class's scores sum to more than 1 where several of its clusters vote, so neither 1 nor a sum of 1 is asked for.
    Saturated logits, of which `verdicts.not_logits` warns too, show in the gradients.
    """
    outputs = _outputs(evaluation.surface, evaluation.images)
    return _finding("no logits", float((outputs >= 0).all()))


def too_few_classes(evaluation: Evaluation) -> Finding:
    """How many classes AutoAttack's losses lack; without them its strongest attack cannot run."""
    classes = _outputs(evaluation.surface, evaluation.images[:1]).shape[1]
    return _finding("too few classes", float(max(CLASSES_WANTED - classes, 0)))


def ablation_table(evaluation: Evaluation) -> pd.DataFrame:
    """The released rule, put right one ingredient at a time, and all at once.

    surface: cooled log-domain logits. bookkeeping: any success is kept, and the start is clipped (`attacks.pgd`).
    steps: 100 of 2.5 eps / 100. target: margin in place of cross-entropy.

    Returns:
        columns ``change robust_accuracy drop``, in that order of changes, "released" first and "all" last; ``drop`` is
        from "released".
    """
    e, many = evaluation, 100
    fine = {"steps": many, "step_size": 2.5 * e.eps / many}
    everything = Evaluation(e.logits, e.model, e.images, e.labels, e.eps, restarts=e.restarts, seed=e.seed, **fine)
    results = {
        "released": e.attacked,
        "surface": e.released(e.logits),
        "bookkeeping": e.pgd(e.surface, "ce", e.eps, step_size=e.step),
        "steps": e.released(**fine),
        "target": e.released(loss="margin"),
        "all": everything.pgd(e.logits, "margin", e.eps),
    }
    rows = [{"change": name, "robust_accuracy": _share(~result.success)} for name, result in results.items()]
    table = pd.DataFrame(rows)
    return table.assign(drop=e.robust_accuracy - table["robust_accuracy"])


def ablation(evaluation: Evaluation) -> Finding:
    """The largest drop in `ablation_table` that one change makes."""
    table = ablation_table(evaluation)
    return _finding("ablation", float(table.loc[~table["change"].isin(["released", "all"]), "drop"].max()))


def examine(
    surface: Model,
    model: Model,
    images: Images,
    labels: Int[Tensor, " batch"],
    *,
    eps: float,
    source: Model | None = None,
    steps: int = 20,
    restarts: int = 2,
    step_size: float | None = None,
    queries: int = 300,
    seed: int = 0,
) -> pd.DataFrame:
    """All checks on one evaluation; the global random state is left as it was.

    Args:
        source: another model, for the transfer; without it that one row is absent.
        queries: for Square.
        surface, model, images, labels, eps, steps, restarts, step_size, seed: as in `Evaluation`.
    Returns:
        columns ``check value threshold flagged source meaning``, one row for each of `CHECKS`, in that order.
    """
    with _random_state_kept():
        torch.manual_seed(seed)
        evaluation = Evaluation(surface, model, images, labels, eps, steps, restarts, step_size, seed)
        findings = [
            zero_gradients(evaluation),
            underflowing_gradients(evaluation),
            loss_disagreement(evaluation),
            grey_ball(evaluation),
            loss_curves(evaluation),
            square_gap(evaluation, queries=queries),
            *([transfer_gap(evaluation, source)] if source is not None else []),
            budget(evaluation),
            wrong_hill(evaluation),
            slices(evaluation),
            randomised(evaluation),
            gradients_in_forward(evaluation),
            no_logits(evaluation),
            too_few_classes(evaluation),
            ablation(evaluation),
        ]
    return pd.DataFrame(findings)


def verdict(table: pd.DataFrame) -> bool:
    """Whether the battery as a whole flags the evaluation: one witness decides, else it takes symptoms of two kinds.

    Symptoms of one kind have one cause: a sure network's gradients may underflow in float32 without any attack failing.

    Args:
        table: of `examine`.
    Raises:
        ValueError: if the table holds a check that is not in `CHECKS`.
    """
    if unknown := sorted(set(table["check"]) - set(CHECKS)):
        raise ValueError(f"table: expected checks of {sorted(CHECKS)}, got {unknown}")
    kinds = {CHECKS[check].kind for check in table.loc[table["flagged"], "check"]}
    return "witness" in kinds or len(kinds) >= 2


def _finding(check: str, value: float) -> Finding:
    rule = CHECKS[check]
    if math.isnan(value):
        raise ValueError(f"{check}: expected a number, got NaN")
    return Finding(check, value, rule.threshold, value > rule.threshold, rule.source, rule.meaning)


def _largest_gap(table: pd.DataFrame) -> float:
    """What cross-entropy on the evaluation's surface leaves standing beyond the lowest loss; at the worst eps."""
    own = table.query("surface == 'evaluation' and loss == 'ce'").set_index("eps")["robust_accuracy"]
    return max(own - table.groupby("eps")["robust_accuracy"].min())


class _GradientCalls(TorchFunctionMode):
    """Counts the calls of torch's functions that compute gradients."""

    watched = (torch.autograd.grad, torch.autograd.backward, Tensor.backward)

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.count += func in self.watched
        return func(*args, **(kwargs or {}))


def _grid(points: int) -> list[tuple[float, float]]:
    """The square [-1, 1]^2, in rows."""
    if points < 2:
        raise ValueError(f"points: expected at least 2 along each axis, got {points}")
    line = torch.linspace(-1, 1, points, dtype=torch.float64).tolist()
    return [(a, b) for a in line for b in line]


def _outputs(model: Model, images: Images) -> Float[Tensor, "batch class"]:
    with torch.no_grad():
        return model(images)


def _loss(surface: Model, images: Images, labels: Tensor) -> Float[Tensor, " batch"]:
    return cross_entropy(_outputs(surface, images), labels)


def _share(which: Bool[Tensor, " batch"]) -> float:
    return which.double().mean().item()


@contextmanager
def _random_state_kept() -> Iterator[None]:
    """For surfaces that draw: the global generators of the CPU and of every GPU are put back."""
    gpus = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    with torch.random.fork_rng(devices=list(gpus)):
        yield
