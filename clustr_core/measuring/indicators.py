"""Published tests of an attack: six indicators of its failure, and an adversarial image that is known to be there.

Each is a `checks.Check` of an evaluation. Sources: the indicators are those of Pintor et al. 2022, as their code
computes them for one image and one run, here as shares of images over all restarts; the test of binarisation is that of
Zimmermann et al. 2022, as their code does it. Deviations are said where they are.
"""

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from clustr_core.attacks.ball import Images, pgd_path, project, random_point
from clustr_core.attacks.losses import cross_entropy
from clustr_core.attacks.paper import ScoreModel
from clustr_core.attacks.result import Model
from clustr_core.attacks.temperature import Rescaled
from clustr_core.measuring.checks import MATERIAL, check, input_gradients
from clustr_core.measuring.evaluation import Evaluation, outputs_of, share

_PINTOR = "Pintor et al. 2022"
_TOY = "threshold: above the honest evaluations of the toy"
# of the loss, from its lowest to its highest, within the last steps
STILL_CLIMBING, LAST_STEPS = 0.05, 10
# of the noise beside an image, and how much of its loss it may change on average
NOISE, UNSTABLE = 4 / 255, 0.25
# what separates the inner points from the border, as a share of eps; how near to the planted point the new border lies
GAP, CLOSENESS = 0.05, 0.999
# points that are embedded at once
CHUNK = 128


@check(
    "unavailable gradients", threshold=0.0, kind="indicator",
    source=f"{_PINTOR}, indicator 1; threshold: their code, any",
    meaning="share of images without an input gradient of cross-entropy on the surface: zero, or none at all",
)  # fmt: skip
def unavailable_gradients(evaluation: Evaluation) -> float:
    """Share of images without a gradient to climb; all of them where the surface has none."""
    leaf = evaluation.images.detach().clone().requires_grad_()
    if not evaluation.surface(leaf).requires_grad:
        return 1.0
    return share(input_gradients(evaluation) == 0)


@check(
    "unstable predictions", threshold=UNSTABLE, kind="indicator",
    source=f"{_PINTOR}, indicator 2; {_TOY}",
    meaning="mean relative change of the loss on the surface under small noise, at most 1",
)  # fmt: skip
def unstable_predictions(evaluation: Evaluation, *, draws: int = 100) -> float:
    """How much uniform noise of up to 4/255 changes the loss that is climbed, relative to it.

    Args:
        draws: of the noise, for each image.
    """
    images, labels = evaluation.images, evaluation.labels
    generator = torch.Generator(images.device).manual_seed(evaluation.seed)

    def loss(points: Images) -> Float[Tensor, " batch"]:
        return cross_entropy(outputs_of(evaluation.surface, points), labels).double()

    before = loss(images)
    scale, changes = before.abs().where(before != 0, 1), torch.zeros_like(before)
    for _ in range(draws):
        noise = torch.rand(images.shape, generator=generator, device=images.device, dtype=images.dtype) * 2 - 1
        changes += (loss(images + NOISE * noise) - before).abs() / scale
    return min(float(changes.mean() / draws), 1.0)


@check(
    "silent success", threshold=MATERIAL, kind="indicator",
    source=f"{_PINTOR}, indicator 3; threshold: as for accuracies",
    meaning="share of images called robust that were misclassified on the attack's own way",
)  # fmt: skip
def silent_success(evaluation: Evaluation) -> float:
    """Share of images called robust though the attack passed a misclassified one, within the ball and the cube.

    The first point of a restart does not count: the released rule starts outside [0, 1].
    """
    passed = torch.zeros(len(evaluation.labels), dtype=torch.bool)
    for _, wrong in evaluation.path.runs:
        passed |= wrong[1:].any(dim=0)
    return share(evaluation.robust.cpu() & passed)


@check(
    "incomplete optimisation", threshold=MATERIAL, kind="indicator",
    source=f"{_PINTOR}, indicator 4; threshold: as for accuracies",
    meaning="share of images called robust whose loss still rose in the last ten steps, by more than 5 % of its range",
)  # fmt: skip
def incomplete_optimisation(evaluation: Evaluation) -> float:
    """Share of images called robust at which the attack had not arrived, by its highest loss so far in the last restart
    that saw them.

    Deviation: their code asks it of images that are broken, too.
    """
    climbing = torch.zeros(len(evaluation.labels), dtype=torch.bool)
    for losses, _ in evaluation.path.runs:
        seen = ~losses[0].isnan()
        climbing[seen] = _still_climbing(losses[:, seen])
    return share(evaluation.robust.cpu() & climbing)


def _still_climbing(losses: Float[Tensor, "step batch"]) -> Bool[Tensor, " batch"]:
    """Whether the highest loss so far rises by more than a share of the losses' range within the last steps."""
    # an image that left the run early keeps its last loss
    filled = losses.clone()
    for step in range(1, len(filled)):
        filled[step] = filled[step].where(~filled[step].isnan(), filled[step - 1])
    span = filled.amax(dim=0) - filled.amin(dim=0)
    highest = filled.cummax(dim=0).values[-LAST_STEPS:]
    return (highest[-1] - highest[0]) > STILL_CLIMBING * span


@check(
    "transfer failure", threshold=MATERIAL, kind="indicator",
    source=f"{_PINTOR}, indicator 5; threshold: as for accuracies",
    meaning="share of images whose attacked point the surface misclassifies and the model does not",
)  # fmt: skip
def transfer_failure(evaluation: Evaluation) -> float:
    """Share of images that are broken on what was climbed, and not on the model.

    Deviation: their code counts every class that differs between the two.
    """
    reached, labels = evaluation.attacked.adversarial, evaluation.labels
    wrong = [outputs_of(model, reached).argmax(dim=1) != labels for model in (evaluation.surface, evaluation.model)]
    return share(wrong[0] & ~wrong[1])


@check(
    "unconstrained failure", threshold=MATERIAL, kind="indicator",
    source=f"{_PINTOR}, indicator 6; threshold: as for accuracies",
    meaning="share of images that the same steps do not break when no ball holds them, only [0, 1]",
)  # fmt: skip
def unconstrained_failure(evaluation: Evaluation) -> float:
    """Share of images, right when clean, that the evaluation's steps on its surface never break without a ball.

    Deviation: from the image itself, and once, whatever the evaluation's restarts.
    """
    labels = evaluation.labels
    walk = {"eps": 1.0, "step_size": evaluation.step, "steps": evaluation.steps}
    broken = torch.zeros_like(evaluation.robust)
    for points in pgd_path(
        lambda x: cross_entropy(evaluation.surface(x), labels), evaluation.images, evaluation.images, **walk
    ):
        broken |= outputs_of(evaluation.model, points).argmax(dim=1) != labels
    return share(~broken)


@check(
    "binarisation", threshold=0.05, kind="indicator",
    source="Zimmermann et al. 2022; threshold: theirs, 95 % found",
    meaning="share of images at which the attack misses an adversarial image that was planted, and noise misses too",
)  # fmt: skip
def binarisation(evaluation: Evaluation, *, inner: int = 999, draws: int = 200, count: int = 32) -> float:
    """Share of images at which the evaluation's attack does not find what is there: see `planted`.

    Args:
        inner, draws: as in `planted`.
        count: images that are tried, the first ones.
    Returns:
        0 where nothing can be planted: by a model without an embedding, or at no image.
    """
    missed = [float(not is_found(each)) for each in planted(evaluation, inner=inner, draws=draws, count=count)]
    return float(np.mean(missed)) if missed else 0.0


def planted(evaluation: Evaluation, *, inner: int = 999, draws: int = 200, count: int = 32) -> Iterator[Evaluation]:
    """The evaluation, one image at a time, of a model with an adversarial image in each ball by construction.

    The last layer is replaced by a linear one with two classes: it tells ``inner`` random points of the ball of radius
    0.95 eps, and the image, from one random corner of the ball of radius eps; its border is moved next to that corner,
    and its outputs have the range of the surface's. What finds no point of the second class is no attack.

    What is climbed is the surface's embedding under that layer: what the surface does before its last layer (rounding,
    noise, a preprocessing without gradient) stays, and what it makes of it (scores, a temperature) is replaced.

    Args:
        inner: random points beside the image.
        draws: of random corners, and of random points of the ball.
        count: images that are tried, the first ones.
    Yields:
        the evaluations of those images at which a linear layer tells the points apart, and none of the random points is
        of the second class: where noise is enough, nothing is asked. (Zimmermann et al. count these, and print the
        success of noise beside.)
    """
    embed, climbed = embedding_of(evaluation.model), embedding_of(evaluation.surface)
    if embed is None or climbed is None:
        return
    generator = torch.Generator(evaluation.images.device).manual_seed(evaluation.seed)
    for index in range(min(count, len(evaluation.images))):
        image = evaluation.images[index : index + 1]
        near = random_point(image.expand(inner, -1, -1, -1), (1 - GAP) * evaluation.eps, "linf", generator)
        corner, *others = _corners(image, evaluation.eps, 1 + draws, generator).split([1, draws])
        points = torch.cat([image, near, corner])
        head = _binary_head(_in_chunks(embed, points), _in_chunks(evaluation.surface, points))
        if head is None:
            continue
        binary = nn.Sequential(_Called(embed), head).eval()
        noise = random_point(image.expand(draws, -1, -1, -1), evaluation.eps, "linf", generator)
        if (_in_chunks(binary, torch.cat([*others, noise])).argmax(dim=1) == 1).any():
            continue
        label = torch.zeros(1, dtype=torch.int64, device=image.device)
        surface = nn.Sequential(_Called(climbed), head).eval()
        yield replace(evaluation, surface=surface, model=binary, images=image, labels=label)


def is_found(evaluation: Evaluation) -> bool:
    """Whether the attack of an evaluation of `planted` ends at a point of the second class, by its model."""
    return bool((outputs_of(evaluation.model, evaluation.attacked.adversarial).argmax(dim=1) == 1).item())


def _in_chunks(model: Model, points: Images) -> Tensor:
    return torch.cat([outputs_of(model, part) for part in points.split(CHUNK)])


def _corners(image: Tensor, eps: float, count: int, generator: torch.Generator) -> Images:
    images = image.expand(count, -1, -1, -1)
    signs = torch.randint(2, images.shape, generator=generator, device=image.device)
    return project(images + eps * (2 * signs.to(image) - 1), images, eps, "linf")


def embedding_of(model: Model) -> Model | None:
    """What a model's last layer is given: its embedding, or what its last linear layer receives; None without both."""
    while isinstance(model, Rescaled | ScoreModel):
        model = model.model
    if hasattr(model, "embed"):
        own: Model = getattr(model, "embed")  # noqa: B009
        return own
    linear = [each for each in model.modules() if isinstance(each, nn.Linear)] if isinstance(model, nn.Module) else []
    return _before(model, linear[-1]) if linear else None


def _before(model: Model, layer: nn.Module) -> Model:
    def embed(images: Images) -> Tensor:
        received: list[Tensor] = []
        hook = layer.register_forward_pre_hook(lambda _, given: received.append(given[0]))
        try:
            model(images)
        finally:
            hook.remove()
        return received[-1].flatten(1)

    return embed


class _Called(nn.Module):
    """A function as a module."""

    def __init__(self, function: Model) -> None:
        super().__init__()
        self.function = (function,)  # in a tuple, so that it is no submodule

    def forward(self, images: Images) -> Tensor:
        """What the function returns, a row each."""
        return self.function[0](images).flatten(1)


def _binary_head(features: Tensor, outputs: Tensor) -> nn.Linear | None:
    """Tells the last of some embeddings from the others, from next to it on; None if no plane does.

    Args:
        features: the last is the planted point's.
        outputs: what the surface says of the same points, for the range of what the head says.
    """
    from sklearn.linear_model import LogisticRegression

    given = features.flatten(1).double()
    # in units of their spread: what is fitted is a plane, and planes do not depend on units
    centre, scale = given.mean(dim=0), given.std(dim=0).clamp_min(torch.finfo(features.dtype).tiny)
    labels = np.r_[np.zeros(len(given) - 1), 1]
    fitted = LogisticRegression(C=1e6, max_iter=1000).fit(((given - centre) / scale).cpu().numpy(), labels)
    normal = torch.as_tensor(fitted.coef_[0]).to(given) / scale
    heights = given @ normal
    highest, planted_at = float(heights[:-1].max()), float(heights[-1])
    if not planted_at > highest:
        return None
    border = highest + CLOSENESS * (planted_at - highest)
    signed = heights - border
    spread, wanted = float(signed.max() - signed.min()), float(outputs.max() - outputs.min())
    factor = wanted / (2 * spread) if wanted > 0 else 1.0
    head = nn.Linear(given.shape[1], 2).to(given.device, torch.float64)
    with torch.no_grad():
        head.weight.copy_(torch.stack([-normal, normal]) * factor)
        head.bias.copy_(torch.tensor([border, -border]) * factor)
    return head.to(features.dtype).requires_grad_(False)
