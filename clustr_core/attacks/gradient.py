"""FGSM and PGD on any model that maps images in [0, 1] to logits."""

from collections.abc import Callable

import torch
from jaxtyping import Int
from torch import Tensor

from clustr_core.attacks.ball import (
    Ball,
    Eps,
    Images,
    Walk,
    as_leaf,
    check_gradient,
    check_within,
    moved,
    one_each,
    random_point,
    with_gradients,
)
from clustr_core.attacks.losses import AttackLoss, attack_loss
from clustr_core.attacks.names import Norm
from clustr_core.attacks.result import AttackResult, Model, Watch, judged_logits, logits_of, predicted, prepared
from clustr_core.numerics.checks import check_logits

# (images, which of the batch they are, restart) -> logits, and the values to be increased
Ascend = Callable[[Images, Int[Tensor, " active"], int], tuple[Tensor, Tensor]]


@with_gradients
def pgd(
    model: Model,
    images: Images,
    labels: Int[Tensor, " batch"],
    *,
    eps: Eps,
    step_size: Eps,
    steps: int,
    restarts: int = 1,
    norm: Norm = "linf",
    loss: str | AttackLoss = "ce",
    random_start: bool = True,
    seed: int = 0,
    watch: Watch | None = None,
) -> AttackResult:
    """Projected gradient descent: x <- project(x + step_size * direction of the loss's gradient), untargeted.

    The direction is the gradient's sign ("linf") or the gradient over its L2 norm ("l2"). Every iterate is judged: a
    success is kept, and its example leaves the batch, so that no gradient is spent on an example already broken.
    Iterates stay in the eps-ball, up to rounding, and in [0, 1]. Weights get no gradients. Callers may have switched
    gradients off, and images may have any strides: neither changes a verdict.

    Args:
        eps: radius of the ball, in units of pixels in [0, 1]: a number, or one an image.
        step_size: length of a step in ``norm``, in the same units, and a number or one an image as well.
        restarts: independent runs, each only on what is still unbroken.
        loss: "ce", "margin", "dlr", or a function (logits, labels) -> loss of each example, to be increased.
        random_start: begin uniformly in the ball (drawn for the whole batch, so that an example's fate does not depend
            on the others'); else at the image.
        seed: fixes the starts.
        watch: told of each pass (`result.Watch`); the last one of a restart is where it ended.
    Raises:
        TypeError: if the model returns no tensor.
        ValueError: if a size is not positive, pixels leave [0, 1], a label is not a class, logits or input gradients
            are NaN, or a layer in training mode makes the model depend on chance or on the batch.
    Warns:
        UserWarning: if the model returns something else than logits; see `result.not_logits`.
    Source: Madry et al. 2018, section 2.1; the restarts and the kept success as in Carlini et al. 2019.
    """
    eps, step_size = one_each(images, eps=eps, step_size=step_size)
    climb, ball, walk = attack_loss(loss), Ball(eps, norm), Walk(step_size, steps, restarts, seed)
    check_within(images, labels, ball)
    images, goals = prepared(model, images, labels)
    clean = predicted(model, images, goals, warn=True)

    def ascend(x: Images, which: Tensor, restart: int) -> tuple[Tensor, Tensor]:
        logits = logits_of(model, x)
        return logits, climb(logits, goals[which])

    return restarted_search(model, ascend, images, goals, clean, ball, walk, random_start=random_start, watch=watch)


def fgsm(
    model: Model,
    images: Images,
    labels: Int[Tensor, " batch"],
    *,
    eps: Eps,
    norm: Norm = "linf",
    loss: str | AttackLoss = "ce",
) -> AttackResult:
    """The fast gradient (sign) method: one step of length eps from the image itself.

    Args, Raises and Warns as in `pgd`.
    Source: Goodfellow et al. 2015; for "l2" the gradient over its norm.
    """
    return pgd(model, images, labels, eps=eps, step_size=eps, steps=1, norm=norm, loss=loss, random_start=False)


def restarted_search(
    model: Model,
    ascend: Ascend,
    images: Images,
    labels: Int[Tensor, " batch"],
    clean_prediction: Int[Tensor, " batch"],
    ball: Ball,
    walk: Walk,
    *,
    random_start: bool = True,
    watch: Watch | None = None,
) -> AttackResult:
    """Restarts of projected ascent, each on what is still unbroken."""
    result = AttackResult.before(images, labels, clean_prediction)
    generator = torch.Generator(images.device).manual_seed(walk.seed)
    for restart in range(walk.restarts):
        start = random_point(images, ball.eps, ball.norm, generator) if random_start else images
        active = (~result.success).nonzero().squeeze(1)
        if not len(active):
            break
        _one_run(model, ascend, restart, images, labels, start, active, result, ball, walk, watch)
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
    ball: Ball,
    walk: Walk,
    watch: Watch | None,
) -> None:
    """One start on the examples still unbroken; successes are written into the result as they are found."""
    x, ball, walk = start[active], ball.of(active), walk.of(active)
    for _ in range(walk.steps):
        x = as_leaf(x)
        logits, values = ascend(x, active, restart)
        if watch is not None:
            watch(restart, active, logits.detach())
        prediction = logits.detach().argmax(dim=1)
        broken = prediction != labels[active]
        if broken.any():
            check_logits(logits[broken])
            result.note(active[broken], x[broken], prediction[broken], broken[broken])
            if broken.all():
                return
        (gradient,) = torch.autograd.grad(values[~broken].sum(), x)
        check_gradient(gradient)
        x = x.detach()
        if broken.any():
            left = ~broken
            x, gradient, active, ball, walk = x[left], gradient[left], active[left], ball.of(left), walk.of(left)
        result.gradients[active] += 1
        x = moved(x, gradient, images[active], ball, walk)
    logits = judged_logits(model, x, labels[active])
    if watch is not None:
        watch(restart, active, logits)
    prediction = logits.argmax(dim=1)
    result.note(active, x, prediction, prediction != labels[active])
