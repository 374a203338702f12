"""Projected gradient ascent in a ball around an image: what adversarial training and attacks share."""

import math
import numbers
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import wraps
from typing import ParamSpec, TypeVar, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from clustr_core.attacks.names import Norm
from clustr_core.numerics.checks import check_image_shape, check_images, check_labels, check_positive
from clustr_core.numerics.distances import flat_norm, per_item

Images = Float[Tensor, "batch channel height width"]
# one radius for all images, or one for each
Eps = float | Float[Tensor, " batch"]
Objective = Callable[[Images], Float[Tensor, " batch"]]
_Given = ParamSpec("_Given")
_Result = TypeVar("_Result")


@dataclass(frozen=True)
class Ball:
    """Where an attack may look: at most ``eps`` from the image in ``norm``, and in [0, 1].

    Raises:
        ValueError: if ``norm`` is unknown, or ``eps`` not positive.
    """

    eps: Eps
    norm: Norm

    def __post_init__(self) -> None:
        """Check both."""
        if self.norm not in get_args(Norm):
            raise ValueError(f"norm: expected one of {get_args(Norm)}, got {self.norm!r}")
        check_positive(eps=self.eps)

    def check_fits(self, images: Images) -> None:
        """Raises a ValueError if ``eps`` exceeds the distance of any two images, as 8 in place of 8/255 does."""
        largest = 1.0 if self.norm == "linf" else math.sqrt(math.prod(images.shape[1:]))
        eps = max(self.eps.flatten().tolist(), default=0) if isinstance(self.eps, Tensor) else self.eps
        if eps > largest:
            raise ValueError(
                f"eps: expected at most {largest:.4g} in {self.norm} for pixels in [0, 1] (8/255, not 8), got {eps}"
            )

    def of(self, which: Tensor) -> "Ball":
        """That of some of the images, by their indices or a mask."""
        return replace(self, eps=_some(self.eps, which))


@dataclass(frozen=True)
class Walk:
    """How an attack moves: ``steps`` of ``step_size`` from a start, ``restarts`` times, the starts drawn from ``seed``.

    Raises:
        ValueError: if ``step_size`` is not positive, or a count no whole number above 0.
    """

    step_size: Eps
    steps: int
    restarts: int
    seed: int

    def __post_init__(self) -> None:
        """Check the length and the counts."""
        check_positive(step_size=self.step_size)
        check_counts(steps=self.steps, restarts=self.restarts)

    def of(self, which: Tensor) -> "Walk":
        """That of some of the images, by their indices or a mask."""
        return replace(self, step_size=_some(self.step_size, which))


def _some(length: Eps, which: Tensor) -> float | Float[Tensor, " some"]:
    return length[which] if isinstance(length, Tensor) and length.dim() else length


def with_gradients(attack: Callable[_Given, _Result]) -> Callable[_Given, _Result]:
    """An attack that has the gradients it needs, also where its caller has switched them off."""

    @wraps(attack)
    def enabled(*args: _Given.args, **kwargs: _Given.kwargs) -> _Result:
        with torch.inference_mode(False), torch.enable_grad():
            return attack(*args, **kwargs)

    return enabled


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
    yield start.detach()
    for x, gradient in _ascent(objective, images, start, Ball(eps, norm), Walk(step_size, steps, 1, seed=0)):
        check_gradient(gradient)
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
    """The last point of `pgd_path`."""
    *_, last = pgd_path(objective, images, start, eps=eps, step_size=step_size, steps=steps, norm=norm)
    return last


def unchecked_endpoint(objective: Objective, images: Images, start: Images, ball: Ball, walk: Walk) -> Images:
    """The last point of `pgd_path` for which nothing is read off the device: whoever trains on it looks at the loss.

    A gradient that is not finite makes all of it NaN.
    """
    last, spoilt = start.detach(), images.new_zeros(())
    for point, gradient in _ascent(objective, images, start, ball, walk):
        last, spoilt = point, spoilt + 0 * gradient.sum()
    return last + spoilt


def _ascent(
    objective: Objective, images: Images, start: Images, ball: Ball, walk: Walk
) -> Iterator[tuple[Images, Images]]:
    """The point after each step of a walk, and the gradient that led to it."""
    x = start.detach()
    for _ in range(walk.steps):
        _, gradient = _input_gradient(objective, x)
        x = moved(x, gradient, images, ball, walk)
        yield x, gradient


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


def moved(points: Images, gradient: Images, images: Images, ball: Ball, walk: Walk) -> Images:
    """One step of projected ascent from some points."""
    towards = direction(gradient, ball.norm)
    if isinstance(walk.step_size, Tensor):
        further = points + per_item(walk.step_size, towards) * towards
    else:
        further = points.add(towards, alpha=walk.step_size)
    return project(further, images, ball.eps, ball.norm)


def _each(eps: Eps, like: Images) -> float | Tensor:
    return per_item(eps, like) if isinstance(eps, Tensor) else eps


def input_gradient(objective: Objective, points: Images) -> tuple[Float[Tensor, " batch"], Images]:
    """The objective at some points, and its gradient there.

    Raises:
        ValueError: if the gradient is not finite.
    """
    values, gradient = _input_gradient(objective, points)
    check_gradient(gradient)
    return values, gradient


@with_gradients
def _input_gradient(objective: Objective, points: Images) -> tuple[Float[Tensor, " batch"], Images]:
    leaf = as_leaf(points)
    values = objective(leaf)
    (gradient,) = torch.autograd.grad(values.sum(), leaf)
    return values.detach(), gradient


def as_leaf(points: Images) -> Images:
    """Points that a gradient can be taken at; those made in inference mode are copied, as they cannot."""
    points = points.clone() if points.is_inference() else points.detach()
    return points.requires_grad_()


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
    norm: Norm,
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
    for name, length in (("eps", eps), ("step_size", step_size)):
        if isinstance(length, Tensor) and length.dim():
            raise ValueError(f"{name}: expected one number for all images, got shape {list(length.shape)}")
    Walk(step_size, steps, restarts, seed=0)
    check_within(images, labels, Ball(eps, norm))


def check_within(images: Tensor, labels: Tensor | None, ball: Ball) -> None:
    """The part of `check_inputs` that is of images and labels."""
    check_image_shape(images)
    ball.check_fits(images)
    if labels is not None:
        check_labels(labels, len(images))
    check_images(images)


def one_each(images: Tensor, **lengths: Eps) -> list[Eps]:
    """Lengths of which each is one for all images, or one for each in their dtype and on their device.

    Raises:
        ValueError: if a tensor is neither.
    """
    for name, length in lengths.items():
        if isinstance(length, Tensor) and length.shape not in {(), images.shape[:1]}:
            raise ValueError(
                f"{name}: expected a number, or one for each of {len(images)} images, got shape {list(length.shape)}"
            )
    return [each.detach().to(images) if isinstance(each, Tensor) and each.dim() else each for each in lengths.values()]


def check_counts(**counts: int) -> None:
    """Raises a ValueError unless every count is a whole number above 0."""
    for name, count in counts.items():
        if isinstance(count, bool) or not isinstance(count, numbers.Integral) or count < 1:
            raise ValueError(f"{name}: expected a positive whole number, got {count}")
