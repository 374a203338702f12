"""AutoAttack and the Square attack, as their authors published them, behind the contract of `attacks`."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Literal, get_args

import torch
from jaxtyping import Float, Int
from pyautoattack import AutoAttack
from pyautoattack.square import SquareAttack
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from clustr_core.attacks.ball import Ball, Images, check_counts, check_inputs, project, with_gradients
from clustr_core.attacks.names import Norm
from clustr_core.attacks.result import AttackResult, Model, judged_logits, logits_of, predicted, prepared
from clustr_core.numerics.checks import check_logits

Version = Literal["standard", "plus"]
Logits = Float[Tensor, "batch class"]

PARTS: dict[str, tuple[str, ...]] = {
    "standard": ("apgd-ce", "apgd-t", "fab-t", "square"),
    "plus": ("apgd-ce", "apgd-dlr", "fab", "square", "apgd-t", "fab-t"),
}
# the DLR loss divides by the gap to the third logit, its targeted form by the gap to the third and fourth
CLASSES_NEEDED = {"apgd-dlr": 3, "apgd-t": 4}
LIBRARY_NORM: dict[str, Literal["Linf", "L2"]] = {"linf": "Linf", "l2": "L2"}


@with_gradients
def autoattack(
    model: Model,
    images: Images,
    labels: Int[Tensor, " batch"],
    *,
    norm: Norm,
    eps: float,
    version: Version = "standard",
    parts: Sequence[str] | None = None,
    seed: int = 0,
) -> AttackResult:
    """AutoAttack: each part attacks what the parts before it left unbroken; success is the model's own verdict.

    "standard" is APGD on cross-entropy (100 steps), APGD on the targeted DLR loss and targeted FAB (100 steps for each
    of the 9 likeliest wrong classes, or of all of them where there are fewer), and Square (5000 queries).

    Where the DLR loss starts from a zero gradient, the authors' code says so as a warning of the logger "auto-attack".
    The draws of a part are shared out over its batch, so that an example's fate depends on the examples beside it: the
    same batches, in the same order, repeat a measurement. The global random state is left as it was, and weights get no
    gradients. The library sees float32 logits, whatever the model's are. An example that no part breaks keeps its clean
    image. ``gradients`` counts the input gradients of the parts an example went through: exact for an unbroken
    one; for a broken one, those spent until the part that broke it ended. Square spends none.

    Args:
        eps: radius of the ball, in units of pixels in [0, 1].
        version: "standard", or "plus" (5 restarts, and the untargeted APGD-DLR and FAB as well).
        parts: a subset of the version's parts, run in the order given; None for all, in the version's order.
        seed: every part starts from it.
    Raises:
        TypeError: if the model returns no tensor.
        ValueError: if a size is not positive, pixels leave [0, 1] or are not float32, a label is not a class, logits
            are not finite (a mask of -inf is not either), a version or part is unknown, there are too few classes or
            pixels for one of the parts, or a layer in training mode makes the model depend on chance or on the batch.
        RuntimeError: if a part returned an image outside the ball.
    Warns:
        UserWarning: if the model returns something else than logits; see `result.not_logits`.
    Source: Croce and Hein 2020 (ICML), the authors' code, with the number of target classes capped at C - 1; Square:
        Andriushchenko et al. 2020; FAB: Croce and Hein 2020.
    """
    chosen = _chosen_parts(version, parts)
    check_inputs(images, labels, norm=norm, eps=eps)
    return _run(model, images, labels, Ball(eps, norm), version, chosen, seed)


@with_gradients
def square(
    model: Model,
    images: Images,
    labels: Int[Tensor, " batch"],
    *,
    norm: Norm,
    eps: float,
    queries: int = 5000,
    seed: int = 0,
) -> AttackResult:
    """The Square attack alone: random search on the margin; the model is asked for logits, never for gradients.

    Args:
        queries: how often each image may be tried. The squares shrink as in AutoAttack, on a schedule meant for 10000
            queries, whatever this number is.
    Raises and the rest as in `autoattack`.
    Source: Andriushchenko et al. 2020, in the form AutoAttack uses.
    """
    check_inputs(images, labels, norm=norm, eps=eps)
    check_counts(queries=queries)
    return _run(model, images, labels, Ball(eps, norm), "standard", ("square",), seed, queries)


def _run(
    model: Model,
    images: Images,
    labels: Tensor,
    ball: Ball,
    version: Version,
    parts: Sequence[str],
    seed: int,
    queries: int | None = None,
) -> AttackResult:
    _check_pixels(parts, images, ball.norm)
    images, labels = prepared(model, images, labels)
    logits = judged_logits(model, images, labels, warn=True)
    check_logits(logits, masks=False)
    _check_classes(parts, logits.shape[1])
    result = AttackResult.before(images, labels, logits.argmax(dim=1))
    counted = _Counted(model, logits.shape[1])
    library = _library(counted, images, ball, version, seed, queries)
    with _random_state_kept(), torch.no_grad():
        for part in parts:
            _one_part(library, part, counted, model, images, labels, result, ball)
    return result


def _one_part(
    library: AutoAttack,
    part: str,
    counted: "_Counted",
    model: Model,
    images: Images,
    labels: Tensor,
    result: AttackResult,
    ball: Ball,
) -> None:
    """One part on the examples still unbroken; successes are written into the result."""
    active = (~result.success).nonzero().squeeze(1)
    if not len(active):
        return
    origin, goal, before = images[active], labels[active], counted.gradients
    found = _inside(_perturb(library, part, origin.clone(), goal), origin, ball, part)
    prediction = predicted(model, found, goal)
    broken = prediction != goal
    result.gradients[active] += counted.gradients - before
    result.note(active[broken], found[broken], prediction[broken], broken[broken])


def _perturb(library: AutoAttack, part: str, images: Images, labels: Tensor) -> Images:
    if part == "square":
        return library.square.perturb(images, labels)
    if part == "apgd-t":
        return library.apgd_targeted.perturb(images, labels)
    if part in ("apgd-ce", "apgd-dlr"):
        library.apgd.loss = part.removeprefix("apgd-")
        return library.apgd.perturb(images, labels)
    library.fab.targeted = part == "fab-t"
    if library.fab.targeted:
        library.fab.n_restarts = 1
    return library.fab.perturb(images, labels)


def _inside(points: Tensor, images: Images, ball: Ball, part: str) -> Images:
    """Take off what rounding left outside the ball or [0, 1]; more than rounding is an error."""
    points = points.detach()
    inside = project(points, images, ball.eps, ball.norm)
    moved = (inside - points).abs().amax()
    # written so that NaN fails too
    if not moved <= 1e-6 + 1e-4 * ball.eps:
        got = f"one outside by {moved:.3g}" if moved.isfinite() else "NaN, as logits lead to that are not finite"
        raise RuntimeError(f"{part}: expected images within {ball.eps} ({ball.norm}) and [0, 1], got {got}")
    return inside


def _library(
    counted: "_Counted", images: Images, ball: Ball, version: Version, seed: int, queries: int | None
) -> AutoAttack:
    """The authors' object, with the parameters of the version and no more targets than there are wrong classes."""
    norm, device = LIBRARY_NORM[ball.norm], images.device
    library = AutoAttack(counted, norm=norm, eps=float(ball.eps), seed=seed, version=version, device=device)
    for part in (library.apgd_targeted, library.fab):
        part.n_target_classes = min(part.n_target_classes, counted.classes - 1)
    # with all the parameters that the version gave it
    library.square.__class__ = _Square
    if queries is not None:
        library.square.n_queries = int(queries)
    return library


class _Square(SquareAttack):
    """The authors' Square, which may ask about no image at all, as it does where the margins left are exactly 0."""

    def normalize(self, x: Tensor) -> Tensor:
        """Each image over its L2 norm."""
        return x / (self.lp_norm(x) + 1e-12)

    def lp_norm(self, x: Tensor) -> Tensor:
        """L2 norm of each image."""
        return (x**2).flatten(1).sum(-1).sqrt().view(-1, 1, 1, 1)


class _Counted(nn.Module):
    """The model as the attacks see it: one node of the graph, whose backward reaches the images only and is counted.

    Logits are handed out in float32, in which the library computes, and as a copy, since Square writes into them.
    """

    def __init__(self, model: Model, classes: int) -> None:
        super().__init__()
        # in a tuple, so that it is no submodule: the library's mode switches stay here
        self.inner = (model,)
        self.classes = classes
        self.gradients = 0

    def forward(self, images: Tensor) -> Tensor:
        if not len(images):
            # not every model takes a batch of none
            return images.new_zeros(0, self.classes)
        if torch.is_grad_enabled() and images.requires_grad:
            logits: Tensor = _InputGradient.apply(images, self)  # pyright: ignore[reportAssignmentType]
            return logits
        return logits_of(self.inner[0], images).to(torch.float32, copy=True)


class _InputGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, images: Tensor, counted: _Counted) -> Tensor:
        with torch.enable_grad():
            leaf = images.detach().requires_grad_()
            logits = logits_of(counted.inner[0], leaf)
        if not logits.requires_grad:
            raise ValueError('model: expected logits with a gradient, got none; only the part "square" needs none')
        ctx.leaf, ctx.logits, ctx.counted = leaf, logits, counted
        return logits.detach().to(torch.float32, copy=True)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:
        ctx.counted.gradients += 1
        # kept, because untargeted FAB goes back through the same logits once for each class
        above = gradient.to(ctx.logits.dtype)
        (towards_images,) = torch.autograd.grad(ctx.logits, ctx.leaf, above, retain_graph=True)
        # an infinite one may come from the library's own loss, on an image that it has broken already
        if towards_images.isnan().any() and gradient.isfinite().all():
            raise ValueError("model: expected a finite input gradient, got NaN")
        # the library asks for views that only rows in order have; a network with channels last answers otherwise
        return towards_images.contiguous(), None


@contextmanager
def _random_state_kept() -> Iterator[None]:
    """The attacks seed the global generators of the CPU and of every GPU: put all of them back."""
    gpus = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    with torch.random.fork_rng(devices=list(gpus)):
        yield


def _chosen_parts(version: str, parts: Sequence[str] | None) -> tuple[str, ...]:
    if version not in get_args(Version):
        raise ValueError(f"version: expected one of {get_args(Version)}, got {version!r}")
    known = PARTS[version]
    if parts is None:
        return known
    if isinstance(parts, str) or not parts or len(set(parts)) != len(parts) or not set(parts) <= set(known):
        raise ValueError(f'parts: expected different ones of {known} for version "{version}", got {parts!r}')
    return tuple(parts)


def _check_pixels(parts: Sequence[str], images: Images, norm: Norm) -> None:
    if images.dtype != torch.float32:
        raise ValueError(f"images: expected float32, got {images.dtype}")
    if "square" in parts and norm == "l2" and not _squares_fit(*images.shape[2:]):
        height, width = images.shape[2:]
        raise ValueError(
            'parts: "square" in l2 starts from tiles of side height // 5, which have to fit into the image, '
            f"got {height} x {width} pixels"
        )


def _check_classes(parts: Sequence[str], classes: int) -> None:
    for part in parts:
        needed = CLASSES_NEEDED.get(part, 2)
        if classes < needed:
            raise ValueError(f'parts: "{part}" needs at least {needed} classes, got a model of {classes}')


def _squares_fit(height: int, width: int) -> bool:
    """Whether Square's first tiling stays in the image: it begins at half of what 5 tiles leave of the height."""
    side = height // 5
    offset = (height - 5 * side) // 2
    return side == 1 or (side > 1 and all(offset + n // side * side <= n for n in (height, width)))
