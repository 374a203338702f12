"""An attack of one's own, in one's own file: a profile names it, and its rows stand beside those of ours."""

import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import torch
from jaxtyping import Int
from torch import Tensor, nn

from clustr_core.attacks.ball import Ball, Eps, Images, Walk, check_within, one_each, with_gradients
from clustr_core.attacks.names import ATTACKS
from clustr_core.attacks.result import AttackResult, Model, logits_of, predicted, prepared
from clustr_core.numerics.checks import check_evaluating, check_version, is_name

_Attack = TypeVar("_Attack", bound=Callable[..., Images])
KEYWORDS = ("norm", "eps", "step_size", "steps", "restarts", "seed")


@dataclass(frozen=True)
class OwnAttack:
    """A registered attack: what is called, and the version of what it does."""

    attack: Callable[..., Images]
    version: int


OWN_ATTACKS: dict[str, OwnAttack] = {}


def register_attack(name: str, *, version: int = 1) -> Callable[[_Attack], _Attack]:
    """A decorator: a profile may then name the attack, and it is measured, kept and tabled like ours.

    The function is called as ``attack(model, images, labels, *, norm, eps, step_size, steps, restarts, seed)``, with
    copies, and returns a point for each image; ``eps`` and ``step_size`` are numbers, or tensors of one each where the
    caller of `run_own` gives such. ``model`` gives logits at its temperature, with gradients. `run_own` judges the
    points, so that nothing has to be counted or kept. The module must have been imported before a profile that
    names the attack is read: the profile lists it under ``plugins``.

    Args:
        name: lower case, such as "my-attack".
        version: raise it when the attack finds other points than before: rows are kept under name and version alone.
    Raises:
        ValueError: if the name is no such name, or taken; if the function does not take those keywords. An attack may
            be registered again, as when a cell of a notebook is run twice: the last one counts.
    """
    if not is_name(name):
        raise ValueError(f"name: expected one such as 'my-attack', got {name!r}")
    if name in ATTACKS and name not in OWN_ATTACKS:
        raise ValueError(f"name: expected a free one, got {name!r}, which is an attack of the package")
    check_version(version)

    def register(attack: _Attack) -> _Attack:
        call = f"attack(model, images, labels, *, {', '.join(KEYWORDS)})"
        try:
            inspect.signature(attack).bind(None, None, None, **dict.fromkeys(KEYWORDS))
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"attack: expected a function that can be called as {call}, got {attack!r}: {error}"
            ) from error
        OWN_ATTACKS[name] = OwnAttack(attack, version)
        ATTACKS[name] = (name,)
        return attack

    return register


@with_gradients
def run_own(
    name: str,
    model: Model,
    images: Images,
    labels: Int[Tensor, " batch"],
    *,
    norm: str,
    eps: Eps,
    step_size: Eps,
    steps: int,
    restarts: int = 1,
    seed: int = 0,
) -> AttackResult:
    """Run a registered attack, and judge what it returns: a point counts if it lies in the ball and is misclassified.

    Returns:
        a result in which ``gradients`` counts, for every image, the backward calls that the attack made through the
        model, also after the image was broken (`gradient.pgd` stops counting there).
    Raises:
        ValueError: if the name is not registered; if the attack returns another shape or dtype, values that are not
            finite, or a point outside the ball or outside [0, 1]; if the model answers the clean images otherwise
            after it; and as `gradient.pgd`.
    """
    if name not in OWN_ATTACKS:
        raise ValueError(f"name: expected one of {sorted(OWN_ATTACKS)}, got {name!r}")
    eps, step_size = one_each(images, eps=eps, step_size=step_size)
    ball = Ball(eps, norm)  # pyright: ignore[reportArgumentType]
    Walk(step_size, steps, restarts, seed)
    check_within(images, labels, ball)
    images, labels = prepared(model, images, labels)
    result = AttackResult.before(images, labels, predicted(model, images, labels, warn=True))
    counted = _Counted(model)
    walk = {"norm": norm, "eps": eps, "step_size": step_size, "steps": steps, "restarts": restarts, "seed": seed}
    if not len(images):
        return result
    points = OWN_ATTACKS[name].attack(counted, images.clone(), labels.clone(), **walk)
    _check_points(name, points, images, ball)
    points = points.detach()
    check_evaluating(model)
    if not torch.equal(predicted(model, images, labels), result.clean_prediction):
        raise ValueError(f"{name}: expected the model as it was, got one that answers the clean images otherwise")
    correct = result.clean_correct.nonzero().squeeze(1)
    if len(correct):
        reached = predicted(model, points[correct], labels[correct])
        result.note(correct, points[correct], reached, reached != labels[correct])
    result.gradients.fill_(counted.backwards)
    return result


class _Counted(nn.Module):
    """The model, which counts how often a gradient passes through it."""

    def __init__(self, model: Model) -> None:
        super().__init__()
        self.inner = (model,)  # in a tuple, so that it is no submodule
        self.backwards = 0

    def forward(self, images: Images) -> Tensor:
        """Logits."""
        logits = logits_of(self.inner[0], images)
        if logits.requires_grad:
            logits.register_hook(self._count)
        return logits

    def _count(self, gradient: Tensor) -> None:
        self.backwards += 1


def _check_points(name: str, points: object, images: Images, ball: Ball) -> None:
    if not isinstance(points, Tensor) or points.shape != images.shape or points.dtype != images.dtype:
        got = f"{list(points.shape)} of {points.dtype}" if isinstance(points, Tensor) else type(points).__name__
        raise ValueError(f"{name}: expected a point for each image, {list(images.shape)} of {images.dtype}, got {got}")
    points = points.detach()
    if not points.isfinite().all():
        raise ValueError(f"{name}: expected finite points, got NaN or infinity")
    if float(points.min()) < 0 or float(points.max()) > 1:
        raise ValueError(f"{name}: expected pixels in [0, 1], got {float(points.min()):g} to {float(points.max()):g}")
    moved = (points - images).flatten(1).double()
    lengths = moved.abs().amax(dim=1) if ball.norm == "linf" else moved.norm(dim=1)
    # what a projection leaves by rounding: some units of each pixel, and of the sum of their squares
    unit = torch.finfo(points.dtype).eps
    rounding = 4 * unit * (1.0 if ball.norm == "linf" else math.sqrt(moved.shape[1]))
    allowed = torch.as_tensor(ball.eps).to(lengths) * (1 + 1e-5) + rounding
    if (lengths > allowed).any():
        worst = int((lengths - allowed).argmax())
        raise ValueError(
            f"{name}: expected points within eps of their images in {ball.norm}, got one {float(lengths[worst]):g} away"
        )
