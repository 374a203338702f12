"""Checks that tell masking from robustness: what each asks of an evaluation, and from which value on it speaks."""

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Concatenate, Literal, ParamSpec

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor
from torch.overrides import TorchFunctionMode

from clustr_core.attacks.autoattack import square
from clustr_core.attacks.ball import check_gradient
from clustr_core.attacks.losses import cross_entropy, margin_loss
from clustr_core.attacks.result import Model
from clustr_core.attacks.transfer import transfer
from clustr_core.measuring.evaluation import Evaluation, outputs_of, random_state_kept, share
from clustr_core.measuring.slices import on_slice, slice_axes, square_grid

# from every image in [0, 1] a ball of this L-inf radius reaches plain grey
GREY_EPS = 0.5
UNDERFLOW = 1e-10
# the classes that AutoAttack's targeted DLR loss needs
CLASSES_WANTED = 4
# what a check that speaks is about
Kind = Literal["witness", "gradients", "objective", "outputs", "forward", "indicator"]
_Options = ParamSpec("_Options")

# Accuracies are compared with one threshold: above what the honest evaluations of the toy show (0), at most half of
# what one of the masked ones does, and several images of 64, so that chance does not speak. It was fixed before other
# models were judged.
MATERIAL = 0.05
_TOY = "threshold: separates honest from masked evaluations of the toy"


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


@dataclass(frozen=True)
class Check:
    """What a check asks, and from which value on it speaks.

    Args:
        ask: the check itself, of an evaluation and its own options.
        threshold: a value above it flags.
        kind: a "witness" holds images in the ball that are misclassified though the evaluation calls them robust, which
            proves that the number is too high. The others are symptoms, by their cause: no "gradients"; an "objective"
            that is not that of the model; "outputs" that the losses were not made for; a "forward" pass that draws or
            optimises. An "indicator" of others is printed, and takes no part in the battery's verdict: how often it
            speaks of honest evaluations is measured (`power`).
        source: where the check and its threshold come from.
        meaning: what the value is.
    """

    ask: Callable[..., Finding]
    threshold: float
    kind: Kind
    source: str
    meaning: str


# by name, in the order in which they are asked; `check` adds to it
CHECKS: dict[str, Check] = {}


def check(
    name: str, *, threshold: float, kind: Kind, source: str, meaning: str
) -> Callable[
    [Callable[Concatenate[Evaluation, _Options], float]], Callable[Concatenate[Evaluation, _Options], Finding]
]:
    """Register a function of an evaluation as a check: its value becomes a `Finding`.

    Args:
        threshold, kind, source, meaning: as in `Check`.
    Raises:
        ValueError: if there is a check of that name; when asked, if the value is NaN.
    """
    if name in CHECKS:
        raise ValueError(f"name: expected one that no check has, got {name!r}")

    def registered(
        measured: Callable[Concatenate[Evaluation, _Options], float],
    ) -> Callable[Concatenate[Evaluation, _Options], Finding]:
        @functools.wraps(measured)
        def ask(evaluation: Evaluation, *args: _Options.args, **options: _Options.kwargs) -> Finding:
            value = measured(evaluation, *args, **options)
            if math.isnan(value):
                raise ValueError(f"{name}: expected a number, got NaN")
            return Finding(name, value, threshold, value > threshold, source, meaning)

        # its hints would promise what the function computes, and not what the check answers
        ask.__annotations__ = {}
        CHECKS[name] = Check(ask, threshold, kind, source, meaning)
        return ask

    return registered


def input_gradients(evaluation: Evaluation) -> Float[Tensor, " batch"]:
    """The largest entry of each clean image's input gradient of cross-entropy on the surface, in nats a unit."""
    leaf = evaluation.images.detach().clone().requires_grad_()
    outputs = evaluation.surface(leaf)
    if not outputs.requires_grad:
        raise ValueError("surface: expected outputs with a gradient, got none, and nothing to climb")
    (gradient,) = torch.autograd.grad(cross_entropy(outputs, evaluation.labels).sum(), leaf)
    check_gradient(gradient)
    return gradient.flatten(1).abs().amax(dim=1)


@check(
    "zero gradients", threshold=0.0, kind="gradients",
    source="Athalye et al. 2018; threshold: the code of Croce and Hein 2020, any",
    meaning="share of images whose input gradient of cross-entropy on the surface is exactly zero",
)  # fmt: skip
def zero_gradients(evaluation: Evaluation) -> float:
    """Share of images without any gradient to climb."""
    return share(input_gradients(evaluation) == 0)


@check(
    "underflowing gradients", threshold=MATERIAL, kind="gradients",
    source=f"this book; {_TOY}",
    meaning="share of images whose largest input gradient of cross-entropy on the surface is below 1e-10",
)  # fmt: skip
def underflowing_gradients(evaluation: Evaluation) -> float:
    """Share of images whose gradient is zero or about to be."""
    return share(input_gradients(evaluation) < UNDERFLOW)


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
        for accuracy in [share(~evaluation.pgd(surface, loss, size).success)]
    ]
    return pd.DataFrame(rows)


@check(
    "loss disagreement", threshold=MATERIAL, kind="witness",
    source=f"Carlini et al. 2019; {_TOY}",
    meaning="robust accuracy under cross-entropy on the surface, minus the lowest under margin, and under both on "
    "logits",
)  # fmt: skip
def loss_disagreement(evaluation: Evaluation) -> float:
    """How much cross-entropy on the surface leaves standing that margin, or the logits, would not."""
    return _largest_gap(loss_table(evaluation, [evaluation.eps]))


@check(
    "grey ball", threshold=MATERIAL, kind="objective",
    source=f"Athalye et al. 2018; {_TOY}",
    meaning="share of images called robust at eps = 0.5, where plain grey, within reach of every image, is "
    "misclassified",
)  # fmt: skip
def grey_ball(evaluation: Evaluation) -> float:
    """Share of images that cross-entropy on the surface leaves standing at eps = 0.5 although grey is another class.

    At this eps every image can become the one grey image, which has one class: nothing else is robust, whatever the
    model. The step is 2.5 eps / steps: 20 of the released 2/255 would not cross this ball on any surface, so they
    would raise a false alarm about every model.
    """
    standing = ~evaluation.pgd(evaluation.surface, "ce", GREY_EPS).success
    grey = torch.full_like(evaluation.images[:1], 0.5)
    refuted = outputs_of(evaluation.model, grey).argmax(dim=1) != evaluation.labels
    return share(standing & refuted)


@check(
    "loss curves", threshold=MATERIAL, kind="objective",
    source=f"Carlini et al. 2019; {_TOY}",
    meaning="the loss disagreement at its largest as eps grows",
)  # fmt: skip
def loss_curves(evaluation: Evaluation) -> float:
    """The same at 2 eps and 4 eps: robust accuracy must fall as fast under every loss."""
    grid = sorted({min(factor * evaluation.eps, GREY_EPS) for factor in (2, 4)})
    return _largest_gap(loss_table(evaluation, grid))


@check(
    "black box: Square", threshold=0.002, kind="witness",
    source="Athalye et al. 2018; threshold: the code of Croce and Hein 2020",
    meaning="robust accuracy as reported, minus that under the Square attack, which sees no gradient",
)  # fmt: skip
def square_gap(evaluation: Evaluation, *, queries: int = 300) -> float:
    """What the evaluation leaves standing, less what the Square attack on the model's logits does.

    Args:
        queries: for each image.
    """
    result = square(
        evaluation.logits, evaluation.images, evaluation.labels, norm="linf", eps=evaluation.eps, queries=queries,
        seed=evaluation.seed,
    )  # fmt: skip
    return evaluation.robust_accuracy - share(~result.success)


@check(
    "black box: transfer", threshold=0.002, kind="witness",
    source="Athalye et al. 2018; threshold: as for Square",
    meaning="robust accuracy as reported, minus that under images made for another model",
)  # fmt: skip
def transfer_gap(evaluation: Evaluation, source: Model) -> float:
    """What the evaluation leaves standing, less what images made for another model do.

    Args:
        source: another model of the same classes.
    """
    result = transfer(
        source, evaluation.model, evaluation.images, evaluation.labels, eps=evaluation.eps,
        step_size=2.5 * evaluation.eps / evaluation.steps, steps=evaluation.steps, restarts=evaluation.restarts,
        seed=evaluation.seed,
    )  # fmt: skip
    return evaluation.robust_accuracy - share(~result.success)


@check(
    "budget", threshold=MATERIAL, kind="witness",
    source="Carlini et al. 2019; threshold: 5 points of accuracy, the toy does not tell",
    meaning="robust accuracy as reported, minus that with 5 times the steps and twice the restarts",
)  # fmt: skip
def budget(evaluation: Evaluation) -> float:
    """What the same rule breaks with 5 times the steps, of the same size, and twice the restarts."""
    more = evaluation.released(steps=5 * evaluation.steps, restarts=2 * evaluation.restarts)
    return evaluation.robust_accuracy - share(~more.success)


@check(
    "wrong hill", threshold=MATERIAL, kind="objective",
    source=f"this book; {_TOY}",
    meaning="share of images that the attack leaves with a higher loss on the surface and yet classified more surely",
)  # fmt: skip
def wrong_hill(evaluation: Evaluation) -> float:
    """Share of images whose loss on the surface rises along the attack while the log-margin falls."""
    before, after = evaluation.images, evaluation.attacked.adversarial
    labels = evaluation.labels
    losses = [cross_entropy(outputs_of(evaluation.surface, images), labels) for images in (before, after)]
    margins = [margin_loss(outputs_of(evaluation.model, images), labels) for images in (before, after)]
    return share((losses[1] > losses[0]) & (margins[1] < margins[0]))


@check(
    "slices", threshold=MATERIAL, kind="witness",
    source=f"this book; {_TOY}",
    meaning="share of images called robust though the plane of the attack's and a random direction holds a "
    "misclassified image within the ball",
)  # fmt: skip
def slices(evaluation: Evaluation, *, points: int = 9) -> float:
    """Share of images called robust though a slice of their ball, as in `on_slice`, holds a misclassified image.

    Args:
        points: of the slice's grid, along each axis.
    Raises:
        ValueError: if the grid has fewer than two points along an axis.
    """
    refuted = torch.zeros_like(evaluation.robust)
    axes = slice_axes(evaluation)
    for a, b in square_grid(points):
        moved = on_slice(evaluation, axes, a, b)
        refuted |= outputs_of(evaluation.model, moved).argmax(dim=1) != evaluation.labels
    return share(evaluation.robust & refuted)


@check(
    "randomised", threshold=1e-4, kind="forward",
    source="Croce and Hein 2020, their code's check and threshold",
    meaning="largest L2 difference of normalised outputs between five passes",
)  # fmt: skip
def randomised(evaluation: Evaluation, *, passes: int = 5) -> float:
    """Whether the surface gives other outputs each time; judged on outputs scaled to L2 norm 1.

    Source: the check in the code of Croce and Hein 2020. Deviation: the global random state is put back.
    """
    with random_state_kept():
        outputs = [outputs_of(evaluation.surface, evaluation.images) for _ in range(passes)]
    unit = [found / (found.norm(dim=1, keepdim=True) + 1e-10) for found in outputs]
    differences = [(a - b).norm(dim=1).amax().item() for i, a in enumerate(unit) for b in unit[:i]]
    return max(differences, default=0.0)


@check(
    "gradients in forward", threshold=0.0, kind="forward",
    source="Croce and Hein 2020, their code's check and threshold",
    meaning="how often the forward pass itself asks for gradients: a dynamic defence",
)  # fmt: skip
def gradients_in_forward(evaluation: Evaluation) -> float:
    """How often the surface's forward pass asks for gradients, as defences do that optimise at test time.

    Source: the check in the code of Croce and Hein 2020. Deviation: torch's functions are counted, not any of that
        name.
    """
    with _GradientCalls() as calls:
        evaluation.surface(evaluation.images)
    return float(calls.count)


@check(
    "no logits", threshold=0.0, kind="outputs",
    source="the code of Croce and Hein 2020, for probabilities; this book, for scores",
    meaning="1 if no output is negative: they look like probabilities or scores",
)  # fmt: skip
def no_logits(evaluation: Evaluation) -> float:
    """Whether the surface's outputs look like probabilities or scores: none is negative.

    A class's scores sum to more than 1 where several of its clusters vote, so neither 1 nor a sum of 1 is asked for.
    Saturated logits, of which `result.not_logits` warns too, show in the gradients.
    """
    outputs = outputs_of(evaluation.surface, evaluation.images)
    return float((outputs >= 0).all())


@check(
    "too few classes", threshold=0.0, kind="outputs",
    source="the code of Croce and Hein 2020",
    meaning="classes that AutoAttack's targeted DLR loss lacks: it needs four",
)  # fmt: skip
def too_few_classes(evaluation: Evaluation) -> float:
    """How many classes AutoAttack's losses lack; without them its strongest attack cannot run."""
    classes = outputs_of(evaluation.surface, evaluation.images[:1]).shape[1]
    return float(max(CLASSES_WANTED - classes, 0))


@check(
    "ablation", threshold=MATERIAL, kind="witness",
    source=f"this book; {_TOY}",
    meaning="largest drop of robust accuracy when one ingredient of the released rule is put right",
)  # fmt: skip
def ablation(evaluation: Evaluation) -> float:
    """The largest drop in `Evaluation.ablations` that one change makes."""
    table = evaluation.ablations
    return float(table.loc[~table["change"].isin(["released", "all"]), "drop"].max())


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
