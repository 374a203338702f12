"""Images made for another model."""

import torch
from jaxtyping import Int
from torch import Tensor

from clustr_core.attacks.ball import Images, check_inputs, pgd_endpoint, random_point, with_gradients
from clustr_core.attacks.losses import attack_loss
from clustr_core.attacks.names import Norm
from clustr_core.attacks.result import AttackResult, Model, logits_of, predicted, prepared, warn_unless_logits
from clustr_core.numerics.checks import check_evaluating, check_logits


@with_gradients
def transfer(
    source: Model,
    model: Model,
    images: Images,
    labels: Int[Tensor, " batch"],
    *,
    eps: float,
    step_size: float,
    steps: int,
    restarts: int = 1,
    norm: Norm = "linf",
    loss: str = "margin",
    seed: int = 0,
) -> AttackResult:
    """PGD on another model, judged by this one: its successes owe nothing to this model's gradients.

    Args:
        source: the model that is climbed, all the way: being wrong itself does not stop it.
        eps, step_size, steps, restarts, norm, loss, seed: as in `pgd`.
    Raises:
        ValueError: as `pgd`; if the source's logits are NaN.
    Warns:
        UserWarning: if the source returns something else than logits; see `result.not_logits`.
    Source: Papernot et al. 2016; as a check on masked gradients, Athalye et al. 2018.
    """
    check_inputs(images, labels, norm=norm, eps=eps, step_size=step_size, steps=steps, restarts=restarts)
    check_evaluating(source, "source")
    climb = attack_loss(loss)
    images, goals = prepared(model, images, labels)
    with torch.no_grad():
        warn_unless_logits(logits_of(source, images, "source"), "source", saturation=loss == "ce")
    result = AttackResult.before(images, goals, predicted(model, images, goals))
    generator = torch.Generator(images.device).manual_seed(seed)
    for _ in range(restarts):
        start = random_point(images, eps, norm, generator)
        active = (~result.success).nonzero().squeeze(1)
        if not len(active):
            break
        aims = goals[active]
        x = pgd_endpoint(
            lambda moved, aims=aims: climb(_logits_of_source(source, moved), aims),
            images[active], start[active], eps=eps, step_size=step_size, steps=steps, norm=norm,
        )  # fmt: skip
        result.gradients[active] += steps
        prediction = predicted(model, x, aims)
        result.note(active, x, prediction, prediction != aims)
    return result


def _logits_of_source(source: Model, images: Images) -> Tensor:
    logits = logits_of(source, images, "source")
    check_logits(logits, "source")
    return logits
