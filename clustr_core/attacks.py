"""FGSM and PGD on any model that maps images in [0, 1] to logits."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from clustr_core.distances import flat_norm, per_item
from clustr_core.losses import cross_entropy, margin_loss

Norm = Literal["linf", "l2"]
Images = Float[Tensor, "batch channel height width"]
Objective = Callable[[Images], Float[Tensor, " batch"]]
AttackLoss = Callable[[Float[Tensor, "batch class"], Int[Tensor, " batch"]], Float[Tensor, " batch"]]

LOSSES: dict[str, AttackLoss] = {"ce": cross_entropy, "margin": margin_loss}


@dataclass(frozen=True)
class AttackResult:
    """What an attack did, example by example.

    Args:
        adversarial: the first misclassified image found; else the last one tried.
        success: whether ``adversarial`` is misclassified; an example misclassified when clean is a success, with
            the clean image.
        clean_correct: whether the clean image was classified correctly.
        gradients: how many input gradients were spent on each example.
    """

    adversarial: Images
    success: Bool[Tensor, " batch"]
    clean_correct: Bool[Tensor, " batch"]
    gradients: Int[Tensor, " batch"]


def pgd(
    model: nn.Module | Callable[[Images], Tensor],
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
        loss: "ce", "margin", or a function (logits, labels) -> loss of each example, to be increased.
        random_start: begin uniformly in the ball (drawn for the whole batch, so that an example's fate does not depend
            on the others'); else at the image.
        seed: fixes the starts.
    Raises:
        ValueError: if a size is not positive, pixels leave [0, 1], a label is not a class, or logits are NaN.
    Source: Madry et al. 2018, section 2.1; the restarts and the kept success as in Carlini et al. 2019.
    """
    _check(images, labels, eps=eps, step_size=step_size, steps=steps, restarts=restarts, norm=norm)
    climb = _attack_loss(loss)
    images, labels = images.detach(), labels.to(images.device)
    adversarial = images.clone()
    success = _judge(model, images, labels)
    result = AttackResult(adversarial, success, ~success, torch.zeros_like(labels))
    generator = torch.Generator(images.device).manual_seed(seed)
    for _ in range(restarts):
        start = random_point(images, eps, norm, generator) if random_start else images
        active = (~success).nonzero().squeeze(1)
        if not len(active):
            break
        _one_run(model, climb, images, labels, start, active, result, eps, step_size, steps, norm)
    return result


def fgsm(
    model: nn.Module | Callable[[Images], Tensor],
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


def iterates(
    objective: Objective,
    images: Images,
    start: Images,
    *,
    eps: float,
    step_size: float,
    steps: int,
    norm: Norm = "linf",
) -> Iterator[Images]:
    """The path of projected gradient ascent on an objective: ``start``, then the point after each step.

    Nothing is judged or dropped: this is the inner maximisation of adversarial training, and what a picture of an
    attack's path shows.

    Args:
        objective: images -> one value each, to be increased.
    """
    _check(images, None, eps=eps, step_size=step_size, steps=steps, restarts=1, norm=norm)
    x = start.detach()
    yield x
    for _ in range(steps):
        leaf = x.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(objective(leaf).sum(), leaf)
        x = project(x.add(direction(gradient, norm), alpha=step_size), images, eps, norm)
        yield x


def maximise(
    objective: Objective,
    images: Images,
    start: Images,
    *,
    eps: float,
    step_size: float,
    steps: int,
    norm: Norm = "linf",
) -> Images:
    """The last of `iterates`."""
    *_, last = iterates(objective, images, start, eps=eps, step_size=step_size, steps=steps, norm=norm)
    return last


def random_point(images: Images, eps: float, norm: Norm, generator: torch.Generator) -> Images:
    """A uniform point of the eps-ball around each image, then clipped to [0, 1]."""
    shape, device, dtype = images.shape, images.device, images.dtype
    if norm == "linf":
        noise = torch.rand(shape, generator=generator, device=device, dtype=dtype) * 2 - 1
    else:
        noise = direction(torch.randn(shape, generator=generator, device=device, dtype=dtype), norm)
        lengths = torch.rand(len(images), generator=generator, device=device, dtype=dtype)
        noise = noise * per_item(lengths ** (1 / math.prod(shape[1:])), noise)
    return project(images + eps * noise, images, eps, norm)


def direction(gradient: Images, norm: Norm) -> Images:
    """The unit step that increases a linear function most: the sign, or the gradient over its norm (0 stays 0)."""
    if norm == "linf":
        return gradient.sign()
    largest = per_item(gradient.flatten(1).abs().amax(dim=1), gradient)
    # scaled first, so that squares of tiny gradients do not underflow
    scaled = gradient / largest.where(largest > 0, 1)
    return scaled / per_item(flat_norm(scaled), scaled).clamp_min(torch.finfo(gradient.dtype).tiny)


def project(points: Images, images: Images, eps: float, norm: Norm) -> Images:
    """Into the eps-ball around the images, then into [0, 1], which leads no point out of the ball."""
    offsets = points - images
    if norm == "linf":
        offsets.clamp_(-eps, eps)
    else:
        offsets *= per_item(eps / flat_norm(offsets).clamp_min(eps), offsets)
    return offsets.add_(images).clamp_(0, 1)


def _one_run(
    model: Callable[[Images], Tensor],
    climb: AttackLoss,
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
    x, origin, goal = start[active], images[active], labels[active]
    for _ in range(steps):
        x = x.detach().requires_grad_()
        logits = model(x)
        broken = logits.detach().argmax(dim=1) != goal
        if broken.any():
            _check_logits(logits[broken])
            _keep(result, active[broken], x[broken])
            if broken.all():
                return
        (gradient,) = torch.autograd.grad(climb(logits, goal)[~broken].sum(), x)
        x = x.detach()
        if broken.any():
            rest = ~broken
            x, gradient, origin, goal, active = (
                x[rest],
                gradient[rest],
                origin[rest],
                goal[rest],
                active[rest],
            )
        result.gradients[active] += 1
        x = project(x.add(direction(gradient, norm), alpha=step_size), origin, eps, norm)
    broken = _judge(model, x, goal)
    result.adversarial[active] = x
    _keep(result, active[broken], x[broken])


def _keep(result: AttackResult, where: Tensor, broken: Images) -> None:
    result.adversarial[where] = broken.detach()
    result.success[where] = True


def _judge(model: Callable[[Images], Tensor], images: Images, labels: Tensor) -> Bool[Tensor, " batch"]:
    """Whether each image is misclassified, after checking what the model returns."""
    with torch.no_grad():
        logits = model(images)
    if logits.dim() != 2 or len(logits) != len(images):
        raise ValueError(f"model: expected logits [{len(images)}, class], got shape {list(logits.shape)}")
    _check_logits(logits)
    if len(labels) and (labels.min() < 0 or labels.max() >= logits.shape[1]):
        low, high = int(labels.min()), int(labels.max())
        raise ValueError(f"labels: expected classes in 0..{logits.shape[1] - 1}, got {low} to {high}")
    return logits.argmax(dim=1) != labels


def _check_logits(logits: Tensor) -> None:
    # argmax would call NaN the largest
    if logits.isnan().any():
        raise ValueError("model: expected logits, got NaN")


def _attack_loss(loss: str | AttackLoss) -> AttackLoss:
    if not isinstance(loss, str):
        return loss
    if loss not in LOSSES:
        raise ValueError(f"loss: expected one of {sorted(LOSSES)} or a function, got {loss!r}")
    return LOSSES[loss]


def _check(
    images: Tensor,
    labels: Tensor | None,
    *,
    eps: float,
    step_size: float,
    steps: int,
    restarts: int,
    norm: str,
) -> None:
    for name, value in (("eps", eps), ("step_size", step_size), ("steps", steps), ("restarts", restarts)):
        if not (value > 0 and math.isfinite(value)):
            raise ValueError(f"{name}: expected a positive number, got {value}")
    if norm not in get_args(Norm):
        raise ValueError(f"norm: expected one of {get_args(Norm)}, got {norm!r}")
    if labels is not None and len(labels) != len(images):
        raise ValueError(f"labels: expected one for each of {len(images)} images, got {len(labels)}")
    if not ((images >= 0) & (images <= 1)).all():
        low, high = images.min().item(), images.max().item()
        raise ValueError(f"images: expected pixels in [0, 1], got values from {low:.4g} to {high:.4g}")
