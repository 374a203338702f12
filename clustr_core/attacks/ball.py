"""Projected gradient ascent in a ball around an image: what adversarial training and attacks share."""

import math
import numbers
from collections.abc import Callable, Iterator
from typing import get_args

import torch
from jaxtyping import Float
from torch import Tensor

from clustr_core.attacks.names import Norm
from clustr_core.numerics.distances import flat_norm, per_item

Images = Float[Tensor, "batch channel height width"]
# one radius for all images, or one for each
Eps = float | Float[Tensor, " batch"]
Objective = Callable[[Images], Float[Tensor, " batch"]]


def pgd_path(
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
    check_inputs(images, norm=norm, eps=eps, step_size=step_size, steps=steps)
    x = start.detach()
    yield x
    for _ in range(steps):
        leaf = x.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(objective(leaf).sum(), leaf)
        check_gradient(gradient)
        x = project(x.add(direction(gradient, norm), alpha=step_size), images, eps, norm)
        yield x


def pgd_endpoint(
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
    *_, last = pgd_path(objective, images, start, eps=eps, step_size=step_size, steps=steps, norm=norm)
    return last


def random_point(images: Images, eps: Eps, norm: Norm, generator: torch.Generator) -> Images:
    """A uniform point of the eps-ball around each image, then clipped to [0, 1]."""
    shape, device, dtype = images.shape, images.device, images.dtype
    if norm == "linf":
        noise = torch.rand(shape, generator=generator, device=device, dtype=dtype) * 2 - 1
    else:
        noise = direction(torch.randn(shape, generator=generator, device=device, dtype=dtype), norm)
        lengths = torch.rand(len(images), generator=generator, device=device, dtype=dtype)
        noise = noise * per_item(lengths ** (1 / math.prod(shape[1:])), noise)
    return project(images + _each(eps, noise) * noise, images, eps, norm)


def direction(gradient: Images, norm: Norm) -> Images:
    """The unit step that increases a linear function most: the sign, or the gradient over its norm (0 stays 0)."""
    if norm == "linf":
        return gradient.sign()
    largest = per_item(gradient.flatten(1).abs().amax(dim=1), gradient)
    # scaled first, so that squares of tiny gradients do not underflow
    scaled = gradient / largest.where(largest > 0, 1)
    return scaled / per_item(flat_norm(scaled), scaled).clamp_min(torch.finfo(gradient.dtype).tiny)


def project(points: Images, images: Images, eps: Eps, norm: Norm) -> Images:
    """Into the eps-ball around the images, then into [0, 1], which leads no point out of the ball."""
    offsets = points - images
    if norm == "linf":
        reach = _each(eps, offsets)
        offsets.clamp_(-reach, reach)  # pyright: ignore[reportCallIssue, reportArgumentType]
    else:
        lengths = flat_norm(offsets).clamp_min(torch.finfo(offsets.dtype).tiny)
        offsets *= per_item((eps / lengths).clamp_max(1), offsets)
    return offsets.add_(images).clamp_(0, 1)


def _each(eps: Eps, like: Images) -> float | Tensor:
    return per_item(eps, like) if isinstance(eps, Tensor) else eps


def check_gradient(gradient: Tensor) -> None:
    """Refuse an input gradient that is not finite: the sign of NaN is 0, and an attack would stand still unnoticed.

    Raises:
        ValueError: if there is NaN or infinity.
    """
    # one pass over the gradient is enough but where its sum overflows
    if not (math.isfinite(gradient.sum()) or gradient.isfinite().all()):
        raise ValueError("model: expected a finite input gradient, got NaN or infinity")


def check_inputs(
    images: Tensor,
    labels: Tensor | None = None,
    *,
    norm: str,
    eps: float,
    step_size: float = 1.0,
    steps: int = 1,
    restarts: int = 1,
) -> None:
    """What every attack asks of its arguments.

    Raises:
        ValueError: if a length is not positive, a count not an integer above 0, ``eps`` larger than the cube of images,
            ``norm`` unknown, images are not floating of shape [batch, channel, height, width], labels are not one
            integer an image, or a pixel is outside [0, 1].
    """
    if norm not in get_args(Norm):
        raise ValueError(f"norm: expected one of {get_args(Norm)}, got {norm!r}")
    for name, length in (("eps", eps), ("step_size", step_size)):
        if isinstance(length, bool | str) or not (length > 0 and math.isfinite(length)):
            raise ValueError(f"{name}: expected a positive number, got {length!r}")
    for name, count in (("steps", steps), ("restarts", restarts)):
        if isinstance(count, bool) or not isinstance(count, numbers.Integral) or count < 1:
            raise ValueError(f"{name}: expected a positive whole number, got {count}")
    if images.dim() != 4 or not images.is_floating_point():
        raise ValueError(
            "images: expected a floating dtype and shape [batch, channel, height, width], "
            f"got {images.dtype} of shape {list(images.shape)}"
        )
    largest = 1.0 if norm == "linf" else math.sqrt(math.prod(images.shape[1:]))
    if eps > largest:
        raise ValueError(
            f"eps: expected at most {largest:.4g} in {norm} for pixels in [0, 1] (8/255, not 8), got {eps}"
        )
    if labels is not None and labels.shape != images.shape[:1]:
        got = len(labels) if labels.dim() == 1 else f"shape {list(labels.shape)}"
        raise ValueError(f"labels: expected one for each of {len(images)} images, got {got}")
    if labels is not None and (labels.is_floating_point() or labels.is_complex()):
        raise ValueError(f"labels: expected integers, got {labels.dtype}")
    if not ((images >= 0) & (images <= 1)).all():
        low, high = images.min().item(), images.max().item()
        raise ValueError(f"images: expected pixels in [0, 1], got values from {low:.4g} to {high:.4g}")
