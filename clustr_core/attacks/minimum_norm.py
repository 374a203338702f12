"""Minimum-norm L2 attacks: how near to an image the nearest misclassified one is that a search can find."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from clustr_core.attacks.ball import (
    Images,
    as_leaf,
    check_counts,
    check_gradient,
    check_inputs,
    direction,
    project,
    random_point,
    with_gradients,
)
from clustr_core.attacks.losses import AttackLoss, attack_loss, cross_entropy, dlr_loss
from clustr_core.attacks.result import (
    AttackResult,
    Model,
    judged_logits,
    logits_of,
    misclassified,
    prepared,
    warn_unless_logits,
)
from clustr_core.numerics import chunks
from clustr_core.numerics.checks import check_are_tensors, check_logits
from clustr_core.numerics.distances import flat_norm, per_item

# by how much eps shrinks at a misclassified point and grows at any other: the papers' value
GAMMA, LAST_GAMMA = 0.05, 0.001
LAST_SHARE = 0.01
HALVINGS = 16
# how much farther along its segment a point is led that the whole batch does not confirm
STRETCHES = (2.0**-14, 2.0**-12, 2.0**-10, 2.0**-8, 2.0**-6)
# cells of the noise of random directions, in pixels: 1 is isotropic noise, the others are its low frequencies
CELLS = (1, 2, 4, 8, 16)


@dataclass(frozen=True)
class MinimumNorm:
    """The nearest misclassified image that was found, example by example.

    Args:
        adversarial: a misclassified image; where none was found, the clean one.
        norm: L2 distance of ``adversarial`` from the image, from the returned pixels in float64; infinite where none
            was found, and 0 for an example misclassified when clean.
        clean_correct: whether the clean image was classified correctly.
        gradients: how many input gradients were spent on each example.
    """

    adversarial: Images
    norm: Float[Tensor, " batch"]
    clean_correct: Bool[Tensor, " batch"]
    gradients: Int[Tensor, " batch"]


@dataclass(frozen=True)
class SearchState:
    """Where a descent stands before a step, example by example.

    Args:
        eps: the radius that holds the present point.
        norm: how far the present point is from the image.
        broken: whether it is misclassified.
        shortest: the smallest norm of a misclassified point on the path so far; infinite before the first.
        distance: |loss| / ||gradient||: how far the border is, if the loss is linear and 0 there.
        cosine: falls from 1 at the first step towards 0 along half a cosine.
    """

    eps: Float[Tensor, " batch"]
    norm: Float[Tensor, " batch"]
    broken: Bool[Tensor, " batch"]
    shortest: Float[Tensor, " batch"]
    distance: Float[Tensor, " batch"]
    cosine: float


@dataclass(frozen=True)
class SearchRule:
    """What tells one attack of this module from another.

    Args:
        loss: climbed.
        radius: the eps that holds the next point.
        share: the length of the next step, in units of that eps, from `Standing.cosine`.
        onto: whether points are put on the sphere of radius eps, instead of being kept within it.
    """

    loss: AttackLoss
    radius: Callable[[SearchState], Tensor]
    share: Callable[[float], float]
    onto: bool = False


@with_gradients
def fmn(
    model: Model,
    images: Images,
    labels: Int[Tensor, " batch"],
    *,
    steps: int = 100,
    restarts: int = 1,
    loss: str | AttackLoss = "margin",
    seed: int = 0,
) -> MinimumNorm:
    """The fast minimum-norm attack: gradient steps in a ball whose radius looks for the border by itself.

    At a misclassified point eps <- min((1 - gamma) eps, smallest norm so far). At any other
    eps <- (1 + gamma) eps if the border was crossed before, else (1 + 0.05) (norm + |loss| / ||gradient||).
    Then x <- project(x + share eps gradient / ||gradient||), share from 1 to 0.01 and gamma from 0.05 to 0.001 along
    half a cosine. Where the gradient is 0, the point stays.

    Iterates stay in [0, 1], every one is judged, and the smallest misclassified one is kept, across steps and restarts.
    The first run starts at the image and climbs the loss. Each other one sees but two logits, the label's and that of
    one wrong class, from the class that is likeliest on the clean image on: the nearest border need not be that of the
    class whose logit is nearest. It starts at a uniform point of the ball of the smallest norm so far (or of the whole
    cube), drawn for the whole batch, so that an example's fate does not depend on the others'. Weights get no
    gradients.

    What a run finds is tightened: `HALVINGS` bisections of the segment from the image, which ask only for predictions.
    At the end it is judged once more in the whole batch, where rounding may differ; a point that is not confirmed is
    led on along its segment, by at most 2.1 %, and given up if that does not help.

    Args:
        restarts: runs; as many as there are classes head for each wrong class once.
        loss: "margin", which has no saturation and is 0 on the border, as the rule for eps expects; or "ce", or a
            function (logits, labels) -> loss of each example. "dlr" compares three classes, and allows one run only.
        seed: fixes the starts.
    Raises:
        TypeError: if the model returns no tensor.
        ValueError: if a count is not positive, pixels leave [0, 1], a label is not a class, there is one class only,
            logits or input gradients are NaN, or a layer in training mode makes the model depend on chance or on the
            batch.
    Warns:
        UserWarning: if the model returns something else than logits; see `result.not_logits`.
    Source: Pintor et al. 2021, algorithm 1, for L2. Deviations: the bisection; the factor 1 + 0.05 before the border is
        crossed, without which the points come up to a curved border from inside and may never cross it; steps in units
        of eps, where the paper tunes their length to each data set; targeted restarts from random points, where the
        paper starts from other images.
    """
    descent = SearchRule(attack_loss(loss), _fmn_radius, _falling_share)
    return _search(model, images, labels, descent, None, steps, restarts, seed)


@with_gradients
def ddn(
    model: Model,
    images: Images,
    labels: Int[Tensor, " batch"],
    *,
    steps: int = 100,
    restarts: int = 1,
    loss: str | AttackLoss = "ce",
    seed: int = 0,
) -> MinimumNorm:
    """The decoupled direction and norm attack: gradient steps on a sphere that shrinks and grows by 5 %.

    eps <- 0.95 eps at a misclassified point and 1.05 eps at any other, from eps = 1 on, and each point is put on the
    sphere of radius eps around the image, then into [0, 1].

    Args:
        loss: "ce" is the paper's; it loses its gradient where logits lie tens of nats apart, so that such a model needs
            `temperature.rescaled`, a cross-entropy of cooled logits, or "margin".
    The rest, Raises and Warns as in `fmn`.
    Source: Rony et al. 2019, algorithm 1. Deviations: no quantisation of the pixels; the bisection, steps in units of
        eps, and restarts, as in `fmn`, each from eps = 1 or the smallest norm so far, if that is less.
    """
    descent = SearchRule(attack_loss(loss), _ddn_radius, _falling_share, onto=True)
    check_are_tensors(images=images)
    first = torch.ones(len(images), dtype=images.dtype, device=images.device)
    return _search(model, images, labels, descent, first, steps, restarts, seed)


@with_gradients
def pgd_within(
    model: Model,
    images: Images,
    labels: Int[Tensor, " batch"],
    *,
    radius: Float[Tensor, " batch"],
    steps: int = 100,
    restarts: int = 1,
    loss: str | AttackLoss = "margin",
    seed: int = 0,
) -> MinimumNorm:
    """L2 PGD in which each example has a ball of its own, such as the one its certificate vouches for.

    Steps are 2.5 radius / steps long. An example of radius 0 is left alone. A norm may exceed the radius by rounding,
    and then proves nothing against a certificate.

    Args:
        radius: in units of pixels in [0, 1]; on any device and in any floating dtype.
        loss: as in `fmn`; what is said of "ce" in `ddn` holds here too.
    Raises:
        ValueError: as `fmn`, or if there is not one finite radius of at least 0 for each image.
    The rest and Warns as in `fmn`.
    Source: Madry et al. 2018, section 2.1; the bisection at the end as in `fmn`.
    """
    check_inputs(images, labels, norm="l2", eps=1.0, steps=steps, restarts=restarts)
    check_radius(radius, images)
    descent = SearchRule(attack_loss(loss), lambda now: now.eps, lambda cosine: 2.5 / steps)
    return _search(model, images, labels, descent, radius.to(images), steps, restarts, seed)


@with_gradients
def random_search(
    model: Model,
    images: Images,
    labels: Int[Tensor, " batch"],
    *,
    radius: Float[Tensor, " batch"],
    points: int = 1000,
    seed: int = 0,
) -> MinimumNorm:
    """Random directions on the sphere of each example's own radius: a search that owes nothing to gradients.

    A fifth of the directions is uniform; the others are Gaussian noise in cells of 2, 4, 8 and 16 pixels a side, since
    isotropic noise in a high dimension is nearly orthogonal to everything that matters. Points are clipped to [0, 1],
    which never lengthens an offset. The smallest misclassified one is kept, and tightened as in `fmn`. An example of
    radius 0 is left alone.

    Args:
        radius: as in `pgd_within`.
        points: how many directions are tried for each image, `chunks.IMAGES_TRIED` or a batch of images at once.
        seed: fixes the directions, which are drawn for the whole batch.
    Raises:
        ValueError: as `pgd_within`, or if ``points`` is not positive.
    Warns:
        UserWarning: as `fmn`.
    Source: this book; low frequencies as in Guo et al. 2019 (Low Frequency Adversarial Perturbation), in cells here.
    """
    check_inputs(images, labels, norm="l2", eps=1.0)
    check_radius(radius, images)
    check_counts(points=points)
    images, labels = prepared(model, images, labels)
    reach = radius.to(images)
    wrong, _ = _clean(model, images, labels, saturation=False)
    best, shortest = images.clone(), reach.new_zeros(len(images)).masked_fill(~wrong, torch.inf)
    active = (~wrong & (reach > 0)).nonzero().squeeze(1)
    generator = torch.Generator(images.device).manual_seed(seed)
    for noise in _directions(images, points, generator) if len(active) else ():
        found, norms = _try(model, images[active], labels[active], reach[active], noise[:, active])
        _keep(best, shortest, active, found, norms)
    best, shortest = _bisected(model, images, labels, best, shortest)
    return _confirmed(model, images, labels, best, wrong, shortest.isfinite(), torch.zeros_like(labels))


@with_gradients
def tightened(model: Model, images: Images, labels: Int[Tensor, " batch"], result: AttackResult) -> MinimumNorm:
    """What an attack with a fixed eps found, as a minimum norm: drawn in by the bisection of `fmn`, and confirmed.

    Args:
        result: of an attack on these images and labels, though perhaps on a rescaled copy of the model.
    Raises:
        ValueError: if pixels leave [0, 1], a label is not a class, or logits are NaN.
    """
    check_inputs(images, labels, norm="l2", eps=1.0)
    images, labels = prepared(model, images, labels)
    wrong = misclassified(model, images, labels)
    lengths = flat_norm(result.adversarial - images).masked_fill(~result.success, torch.inf)
    points, _ = _bisected(model, images, labels, result.adversarial, lengths)
    return _confirmed(model, images, labels, points, wrong, result.success, result.gradients)


def smallest(first: MinimumNorm, second: MinimumNorm) -> MinimumNorm:
    """The nearer of two findings on the same images, example by example; their gradients are added up."""
    nearer = _mask(second.norm < first.norm)
    return MinimumNorm(
        second.adversarial.where(nearer, first.adversarial),
        first.norm.minimum(second.norm),
        first.clean_correct,
        first.gradients + second.gradients,
    )


def check_radius(radius: Tensor, images: Tensor) -> None:
    """Refuse radii of which there is not one for each image, finite and at least 0.

    Raises:
        ValueError: with what came.
    """
    if radius.shape != images.shape[:1] or not radius.is_floating_point():
        raise ValueError(
            f"radius: expected floating, one for each of {len(images)} images, "
            f"got {radius.dtype} of shape {list(radius.shape)}"
        )
    refused = radius[~((radius >= 0) & radius.isfinite())]
    if len(refused):
        raise ValueError(f"radius: expected finite values of at least 0, got {refused[0].item():.4g}")


def _fmn_radius(now: SearchState) -> Float[Tensor, " batch"]:
    gamma = LAST_GAMMA + (GAMMA - LAST_GAMMA) * now.cosine
    shrunk = (now.eps * (1 - gamma)).minimum(now.shortest)
    grown = torch.where(now.shortest.isfinite(), now.eps * (1 + gamma), (now.norm + now.distance) * (1 + GAMMA))
    return torch.where(now.broken, shrunk, grown)


def _ddn_radius(now: SearchState) -> Float[Tensor, " batch"]:
    return torch.where(now.broken, now.eps * (1 - GAMMA), now.eps * (1 + GAMMA))


def _falling_share(cosine: float) -> float:
    return LAST_SHARE + (1 - LAST_SHARE) * cosine


def _search(
    model: Model,
    images: Images,
    labels: Tensor,
    descent: SearchRule,
    first_eps: Tensor | None,
    steps: int,
    restarts: int,
    seed: int,
) -> MinimumNorm:
    """Restarts of one descent on what is classified correctly, then the bisection; no ``first_eps`` is no bound."""
    check_inputs(images, labels, norm="l2", eps=1.0, steps=steps, restarts=restarts)
    images, labels = prepared(model, images, labels)
    if restarts > 1 and descent.loss is dlr_loss:
        raise ValueError('loss: expected one that two classes suffice for with more than one restart, got "dlr"')
    wrong, rivals = _clean(model, images, labels, saturation=descent.loss is cross_entropy)
    farthest = flat_norm(images.maximum(1 - images))
    widest = farthest if first_eps is None else first_eps.minimum(farthest)
    best, shortest = images.clone(), torch.zeros_like(farthest).masked_fill(~wrong, torch.inf)
    active = (~wrong & (widest > 0)).nonzero().squeeze(1)
    gradients, generator = torch.zeros_like(labels), torch.Generator(images.device).manual_seed(seed)
    for restart in range(restarts if len(active) else 0):
        eps = widest.minimum(shortest)
        run, start = descent, images
        if restart:
            start = random_point(images, eps, "l2", generator)
            run = replace(descent, loss=_towards(descent.loss, rivals[active, (restart - 1) % rivals.shape[1]]))
        on = (model, images[active], labels[active])
        _keep(best, shortest, active, *_bisected(*on, *_one_run(*on, start[active], run, eps[active], steps)))
        gradients[active] += steps
    return _confirmed(model, images, labels, best, wrong, shortest.isfinite(), gradients)


def _one_run(
    model: Model,
    images: Images,
    labels: Tensor,
    start: Images,
    descent: SearchRule,
    eps: Float[Tensor, " batch"],
    steps: int,
) -> tuple[Images, Float[Tensor, " batch"]]:
    """The smallest misclassified point on the path of one descent, and its norm; infinite where there is none."""
    x, farthest = start, flat_norm(images.maximum(1 - images))
    best, shortest = images.clone(), torch.full_like(farthest, torch.inf)
    everyone = torch.arange(len(images), device=images.device)
    for step in range(steps):
        values, gradient, broken = _climb(model, x, labels, descent.loss)
        norm = flat_norm(x - images)
        _keep(best, shortest, everyone, x, norm.masked_fill(~broken, torch.inf))
        # a model's logits may be wider than its images
        distance = values.abs().to(x.dtype) / flat_norm(gradient).clamp_min(torch.finfo(x.dtype).tiny)
        now = SearchState(eps, norm, broken, shortest, distance, (1 + math.cos(math.pi * step / steps)) / 2)
        eps = descent.radius(now).minimum(farthest)
        x = x + per_item(eps * descent.share(now.cosine), x) * direction(gradient, "l2")
        x = _onto_sphere(x, images, eps) if descent.onto else project(x, images, eps, "l2")
    broken = misclassified(model, x, labels)
    _keep(best, shortest, everyone, x, flat_norm(x - images).masked_fill(~broken, torch.inf))
    return best, shortest


def _climb(model: Model, x: Images, labels: Tensor, loss: AttackLoss) -> tuple[Tensor, Images, Tensor]:
    """The loss of each point, its gradient, and whether the point is misclassified."""
    leaf = as_leaf(x)
    logits = logits_of(model, leaf)
    check_logits(logits)
    values = loss(logits, labels)
    (gradient,) = torch.autograd.grad(values.sum(), leaf)
    check_gradient(gradient)
    return values.detach().to(x.dtype), gradient, logits.detach().argmax(dim=1) != labels


def _onto_sphere(points: Images, images: Images, eps: Float[Tensor, " batch"]) -> Images:
    """Onto the sphere of each image's own eps, then into [0, 1]."""
    offsets = points - images
    return (images + per_item(eps, offsets) * direction(offsets, "l2")).clamp(0, 1)


def _directions(
    images: Images, points: int, generator: torch.Generator
) -> Iterator[Float[Tensor, "several batch channel height width"]]:
    """Noise for every image, several times at once: as many points of each of the `CELLS` as come out even."""
    batch, channels, height, width = images.shape
    at_once = max(1, chunks.IMAGES_TRIED // batch)
    for place, cell in enumerate(CELLS):
        left = len(range(place, points, len(CELLS)))
        while left:
            several = min(left, at_once)
            left -= several
            shape = (several, batch, channels, -(-height // cell), -(-width // cell))
            noise = torch.randn(shape, generator=generator, device=images.device, dtype=images.dtype)
            yield noise.repeat_interleave(cell, 3).repeat_interleave(cell, 4)[..., :height, :width]


def _try(
    model: Model,
    images: Images,
    labels: Tensor,
    reach: Float[Tensor, " batch"],
    noise: Float[Tensor, "several batch channel height width"],
) -> tuple[Images, Float[Tensor, " batch"]]:
    """The smallest misclassified point in several directions, and its norm; infinite where there is none."""
    several, flat = len(noise), noise.flatten(0, 1)
    origin = images.repeat(several, 1, 1, 1)
    tried = (origin + per_item(reach.repeat(several), flat) * direction(flat, "l2")).clamp(0, 1)
    broken = misclassified(model, tried, labels.repeat(several))
    norms = flat_norm(tried - origin).masked_fill(~broken, torch.inf).reshape(several, -1)
    norm, which = norms.min(dim=0)
    return tried.reshape(noise.shape)[which, torch.arange(len(images), device=images.device)], norm


def _keep(
    best: Images, shortest: Tensor, active: Int[Tensor, " active"], points: Tensor, norms: Float[Tensor, " active"]
) -> None:
    """Write down, in place, the points that are nearer than what is known."""
    nearer = norms < shortest[active]
    best[active[nearer]] = points[nearer]
    shortest[active[nearer]] = norms[nearer]


def _clean(
    model: Model, images: Images, labels: Tensor, *, saturation: bool
) -> tuple[Bool[Tensor, " batch"], Int[Tensor, "batch rival"]]:
    """What is misclassified when clean, and the wrong classes of each image, the likeliest first."""
    logits = judged_logits(model, images, labels)
    if logits.shape[1] < 2:
        raise ValueError(f"model: expected logits of at least two classes, got {logits.shape[1]}")
    warn_unless_logits(logits, saturation=saturation)
    own = torch.nn.functional.one_hot(labels, logits.shape[1]).bool()
    wrong = logits.argmax(dim=1) != labels
    return wrong, logits.masked_fill(own, -torch.inf).argsort(dim=1, descending=True)[:, :-1]


def _towards(loss: AttackLoss, targets: Int[Tensor, " active"]) -> AttackLoss:
    """The loss between the label and one wrong class of each example, as if there were no other class."""

    def targeted(logits: Tensor, labels: Tensor) -> Tensor:
        return loss(logits.gather(1, torch.stack([labels, targets], dim=1)), torch.zeros_like(labels))

    return targeted


def _bisected(
    model: Model, images: Images, labels: Tensor, points: Images, norms: Float[Tensor, " batch"]
) -> tuple[Images, Float[Tensor, " batch"]]:
    """The misclassified end of what is left of each segment after `HALVINGS` halvings towards the image, and its norm.

    Where the norm is infinite, the point is not misclassified, and stays.
    """
    found = norms.isfinite()
    low, high = torch.zeros_like(norms), torch.ones_like(norms)
    for _ in range(HALVINGS if found.any() else 0):
        middle = (low + high) / 2
        broken = misclassified(model, _along(images, points, middle), labels) | ~found
        low, high = low.where(broken, middle), middle.where(broken & found, high)
    drawn_in = _along(images, points, high)
    return drawn_in, flat_norm(drawn_in - images).masked_fill(~found, torch.inf)


def _confirmed(
    model: Model, images: Images, labels: Tensor, points: Images, wrong: Tensor, found: Tensor, gradients: Tensor
) -> MinimumNorm:
    """What is misclassified in this very batch, measured in float64."""
    found = found & ~wrong
    points = points.where(_mask(found), images)
    if found.any():
        points, found = _led_on(model, images, labels, points, found)
    norm = flat_norm(points.double() - images.double()).masked_fill(~found & ~wrong, torch.inf)
    return MinimumNorm(points, norm, ~wrong, gradients)


def _led_on(
    model: Model, images: Images, labels: Tensor, points: Images, found: Tensor
) -> tuple[Images, Bool[Tensor, " batch"]]:
    """Points led on along their segments until the batch confirms them, and which it confirms; the others go back."""
    for stretch in STRETCHES:
        lost = found & ~misclassified(model, points, labels)
        if not lost.any():
            return points, found
        points = _along(images, points, torch.where(lost, 1 + stretch, 1.0).to(images))
    found = found & misclassified(model, points, labels)
    return points.where(_mask(found), images), found


def _along(images: Images, points: Images, share: Float[Tensor, " batch"]) -> Images:
    """The points at a share of the way from the images, in [0, 1]; at 1 the points themselves, to the last bit."""
    moved = (images + per_item(share, images) * (points - images)).clamp(0, 1)
    return moved.where(_mask(share != 1), points)


def _mask(which: Bool[Tensor, " batch"]) -> Bool[Tensor, "batch 1 1 1"]:
    return which[:, None, None, None]
