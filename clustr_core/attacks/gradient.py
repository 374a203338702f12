"""FGSM and PGD on any model that maps images in [0, 1] to logits."""

from collections.abc import Callable

import torch
from jaxtyping import Int
from torch import Tensor

from clustr_core.attacks.ball import Images, check_gradient, check_inputs, direction, project, random_point
from clustr_core.attacks.losses import AttackLoss, attack_loss
from clustr_core.attacks.names import Norm
from clustr_core.attacks.result import AttackResult, Model, check_logits, misclassified

# (images, which of the batch they are, restart) -> logits, and the values to be increased
Ascend = Callable[[Images, Int[Tensor, " active"], int], tuple[Tensor, Tensor]]


def pgd(
    model: Model,
    images: Images,
    labels: Int[Tensor, " batch"],
    *,
    eps: float,
    step_size: float,
    steps: int,
    restarts: int = 1,
    norm: Norm = "linf",
    loss: str | AttackLoss = "ce",
    random_start: bool = True,
    seed: int = 0,
) -> AttackResult:
    """Projected gradient descent: x <- project(x + step_size * direction of the loss's gradient), untargeted.

    The direction is the gradient's sign ("linf") or the gradient over its L2 norm ("l2"). Every iterate is judged: a
    success is kept, and its example leaves the batch, so that no gradient is spent on an example already broken.
    Iterates stay in the eps-ball and in [0, 1]. Weights get no gradients; the model's mode is left as it is, and
    should be evaluation.

    Args:
        eps: radius of the ball, in units of pixels in [0, 1].
        step_size: length of a step in ``norm``, in the same units.
        restarts: independent runs, each only on what is still unbroken.
        loss: "ce", "margin", "dlr", or a function (logits, labels) -> loss of each example, to be increased.
        random_start: begin uniformly in the ball (drawn for the whole batch, so that an example's fate does not depend
            on the others'); else at the image.
        seed: fixes the starts.
    Raises:
        ValueError: if a size is not positive, pixels leave [0, 1], a label is not a class, or logits or input gradients
            are NaN.
    Warns:
        UserWarning: if the model returns something else than logits; see `verdicts.not_logits`.
    Source: Madry et al. 2018, section 2.1; the restarts and the kept success as in Carlini et al. 2019.
    """
    check_inputs(images, labels, norm=norm, eps=eps, step_size=step_size, steps=steps, restarts=restarts)
    climb, images, goals = attack_loss(loss), images.detach(), labels.to(images.device)
    success = misclassified(model, images, goals, warn=True)

    def ascend(x: Images, which: Tensor, restart: int) -> tuple[Tensor, Tensor]:
        logits = model(x)
        return logits, climb(logits, goals[which])

    return restarted_search(
        model, ascend, images, goals, success, eps, step_size, steps, restarts, norm, random_start, seed
    )


def fgsm(
    model: Model,
    images: Images,
    labels: Int[Tensor, " batch"],
    *,
    eps: float,
    norm: Norm = "linf",
    loss: str | AttackLoss = "ce",
) -> AttackResult:
    """The fast gradient (sign) method: one step of length eps from the image itself.

    Args and Raises as in `pgd`.
    Source: Goodfellow et al. 2015; for "l2" the gradient over its norm.
    """
    return pgd(model, images, labels, eps=eps, step_size=eps, steps=1, norm=norm, loss=loss, random_start=False)


def restarted_search(
    model: Model,
    ascend: Ascend,
    images: Images,
    labels: Tensor,
    success: Tensor,
    eps: float,
    step_size: float,
    steps: int,
    restarts: int,
    norm: Norm,
    random_start: bool,
    seed: int,
) -> AttackResult:
    """Restarts of projected ascent, each on what is still unbroken; ``success`` says what is broken when clean."""
    result = AttackResult(images.clone(), success, ~success, torch.zeros_like(labels))
    generator = torch.Generator(images.device).manual_seed(seed)
    for restart in range(restarts):
        start = random_point(images, eps, norm, generator) if random_start else images
        active = (~success).nonzero().squeeze(1)
        if not len(active):
            break
        _one_run(model, ascend, restart, images, labels, start, active, result, eps, step_size, steps, norm)
    return result


def _one_run(
    model: Model,
    ascend: Ascend,
    restart: int,
    images: Images,
    labels: Tensor,
    start: Images,
    active: Int[Tensor, " active"],
    result: AttackResult,
    eps: float,
    step_size: float,
    steps: int,
    norm: Norm,
) -> None:
    """One start on the examples still unbroken; successes are written into the result as they are found."""
    x = start[active]
    for _ in range(steps):
        x = x.detach().requires_grad_()
        logits, values = ascend(x, active, restart)
        broken = logits.detach().argmax(dim=1) != labels[active]
        if broken.any():
            check_logits(logits[broken])
            _keep(result, active[broken], x[broken])
            if broken.all():
                return
        (gradient,) = torch.autograd.grad(values[~broken].sum(), x)
        check_gradient(gradient)
        x = x.detach()
        if broken.any():
            x, gradient, active = x[~broken], gradient[~broken], active[~broken]
        result.gradients[active] += 1
        x = project(x.add(direction(gradient, norm), alpha=step_size), images[active], eps, norm)
    broken = misclassified(model, x, labels[active])
    result.adversarial[active] = x
    _keep(result, active[broken], x[broken])


def _keep(result: AttackResult, where: Tensor, broken: Images) -> None:
    result.adversarial[where] = broken.detach()
    result.success[where] = True
