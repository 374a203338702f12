"""Attacks on any model that maps images in [0, 1] to logits: FGSM, PGD, a walk between cells, transfer, AutoAttack."""

from collections.abc import Callable

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from clustr_core.ascent import Images, Norm, check_gradient, check_inputs, direction, maximise, project, random_point
from clustr_core.autoattack import autoattack, square
from clustr_core.classifiers import ClusterClassifier, LinearClassifier
from clustr_core.distances import squared_distances
from clustr_core.losses import cross_entropy, dlr_loss, margin_loss
from clustr_core.verdicts import AttackResult, Model, check_logits, judge, warn_unless_logits

__all__ = [
    "LOSSES", "AttackResult", "Model", "Norm", "Rescaled", "attack_loss", "autoattack", "cell_walk", "fgsm", "pgd",
    "rescaled", "square", "transfer",
]  # fmt: skip

AttackLoss = Callable[[Float[Tensor, "batch class"], Int[Tensor, " batch"]], Float[Tensor, " batch"]]
# (images, which of the batch they are, restart) -> logits, and the values to be increased
Ascend = Callable[[Images, Int[Tensor, " active"], int], tuple[Tensor, Tensor]]

LOSSES: dict[str, AttackLoss] = {"ce": cross_entropy, "margin": margin_loss, "dlr": dlr_loss}
# a gap between the two largest logits at which float32 cross-entropy still has a gradient: 1 - p is about e^-5
SANE_GAP = 5.0


class Rescaled(nn.Module):
    """A model whose logits are divided by one positive temperature: the same predictions, another cross-entropy.

    Raises:
        ValueError: if the temperature is not positive.
    """

    def __init__(self, model: Model, temperature: float) -> None:
        super().__init__()
        if not temperature > 0:
            raise ValueError(f"temperature: expected a positive number, got {temperature}")
        self.model = model
        self.temperature = temperature

    def forward(self, images: Float[Tensor, "batch channel height width"]) -> Float[Tensor, "batch class"]:
        """Logits over temperature."""
        return self.model(images) / self.temperature


def rescaled(model: Model, images: Images) -> Rescaled:
    """The model with its logits cooled so far that the median gap between the two largest is at most `SANE_GAP`.

    Cluster logits lie tens of nats apart, where float32 cross-entropy rounds to 0 and loses its gradient. The gap is
    that of the two largest logits and not the margin of the label, which is negative on a model that is mostly wrong;
    logits closer than that are left alone.
    """
    with torch.no_grad():
        top = model(images).topk(2, dim=1).values
    return Rescaled(model, max(1.0, float((top[:, 0] - top[:, 1]).median()) / SANE_GAP))


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
    success = judge(model, images, goals, warn=True)

    def ascend(x: Images, which: Tensor, restart: int) -> tuple[Tensor, Tensor]:
        logits = model(x)
        return logits, climb(logits, goals[which])

    return _search(model, ascend, images, goals, success, eps, step_size, steps, restarts, norm, random_start, seed)


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


def cell_walk(
    model: nn.Module,
    images: Images,
    labels: Int[Tensor, " batch"],
    *,
    eps: float,
    step_size: float,
    steps: int,
    rivals: int = 3,
    norm: Norm = "linf",
    seed: int = 0,
) -> AttackResult:
    """PGD in the geometry of the embeddings: walk towards the nearest cells of other classes, one after the other.

    The r-th restart heads for the cell j that is r-th nearest to the clean embedding, and climbs the signed feature
    distance past its bisector, (min over own clusters i of d_i^2 - d_j^2) / (2 ||mu_j - mu_A||), A the nearest own
    cluster of the clean image. Nothing is exponentiated, so nothing can saturate. For a linear head the cell of class c
    is a half-space, and the distance (g_c - g_y) / ||w_c - w_y||.

    Args:
        model: a `ClusterClassifier` or a `LinearClassifier`.
        rivals: how many cells to head for, each from its own random start; at most as many as the class with the
            fewest clusters has; an image with fewer rivals heads for its last one again.
        eps, step_size, steps, norm, seed: as in `pgd`.
    Raises:
        TypeError: if the model has neither clusters nor a linear head.
        ValueError: as `pgd`.
    Source: this book; an adaptive attack in the sense of Tramer et al. 2020.
    """
    check_inputs(images, labels, norm=norm, eps=eps, step_size=step_size, steps=steps, restarts=rivals)
    if not isinstance(model, ClusterClassifier | LinearClassifier):
        raise TypeError(f"model: expected a ClusterClassifier or a LinearClassifier, got {type(model).__name__}")
    images, goals = images.detach(), labels.to(images.device)
    success = judge(model, images, goals)
    progress, cells = _progress(model, images, goals)

    def ascend(x: Images, which: Tensor, restart: int) -> tuple[Tensor, Tensor]:
        return model(x), progress(model.embed(x), which, restart)

    return _search(model, ascend, images, goals, success, eps, step_size, steps, min(rivals, cells), norm, True, seed)


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
        UserWarning: if the source returns something else than logits; see `verdicts.not_logits`.
    Source: Papernot et al. 2016; as a check on masked gradients, Athalye et al. 2018.
    """
    check_inputs(images, labels, norm=norm, eps=eps, step_size=step_size, steps=steps, restarts=restarts)
    climb, images, goals = attack_loss(loss), images.detach(), labels.to(images.device)
    with torch.no_grad():
        warn_unless_logits(source(images), "source", saturation=loss == "ce")
    broken = judge(model, images, goals)
    result = AttackResult(images.clone(), broken, ~broken, torch.zeros_like(goals))
    generator = torch.Generator(images.device).manual_seed(seed)
    for _ in range(restarts):
        start = random_point(images, eps, norm, generator)
        active = (~result.success).nonzero().squeeze(1)
        if not len(active):
            break
        aims = goals[active]
        x = maximise(
            lambda moved, aims=aims: climb(_logits_of_source(source, moved), aims),
            images[active], start[active], eps=eps, step_size=step_size, steps=steps, norm=norm,
        )  # fmt: skip
        result.gradients[active] += steps
        result.adversarial[active] = x
        result.success[active] = judge(model, x, aims)
    return result


def _logits_of_source(source: Model, images: Images) -> Tensor:
    logits = source(images)
    check_logits(logits, "source")
    return logits


def _search(
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
    broken = judge(model, x, labels[active])
    result.adversarial[active] = x
    _keep(result, active[broken], x[broken])


def _progress(
    model: ClusterClassifier | LinearClassifier, images: Images, labels: Tensor
) -> tuple[Callable[[Tensor, Tensor, int], Tensor], int]:
    """How far embeddings lie past the bisector to their r-th nearest rival cell, and how many rivals there are."""
    with torch.no_grad():
        embeddings = model.embed(images)
    if isinstance(model, ClusterClassifier):
        return _past_bisector(model, embeddings, labels)
    return _past_hyperplane(model, embeddings, labels)


def _past_bisector(
    model: ClusterClassifier, embeddings: Tensor, labels: Tensor
) -> tuple[Callable[[Tensor, Tensor, int], Tensor], int]:
    centroids = model.centroids
    own = model.labels == labels[:, None]
    distances = squared_distances(embeddings, centroids)
    nearest_distance, nearest = distances.masked_fill(~own, torch.inf).min(dim=1)
    lengths = 2 * squared_distances(centroids, centroids).sqrt()[nearest]
    # an own centroid on top of a rival gives no direction; any positive length keeps the order
    lengths = lengths.clamp_min(torch.finfo(lengths.dtype).tiny)
    order = ((distances - nearest_distance[:, None]) / lengths).masked_fill(own, torch.inf).argsort(dim=1)

    rivals = (~own).sum(dim=1)

    def progress(moved: Tensor, which: Tensor, restart: int) -> Tensor:
        target = order[which, (rivals[which] - 1).clamp_max(restart)][:, None]
        found = squared_distances(moved, centroids)
        back = found.masked_fill(~own[which], torch.inf).amin(dim=1)
        ahead, length = found.gather(1, target), lengths[which].gather(1, target)
        return (back - ahead.squeeze(1)) / length.squeeze(1)

    return progress, len(centroids) - int(model.labels.bincount().min())


def _past_hyperplane(
    model: LinearClassifier, embeddings: Tensor, labels: Tensor
) -> tuple[Callable[[Tensor, Tensor, int], Tensor], int]:
    weight = model.linear.weight.detach()
    lengths = squared_distances(weight, weight).sqrt()[labels].clamp_min(torch.finfo(weight.dtype).tiny)
    with torch.no_grad():
        logits = model.linear(embeddings)
    gaps = (logits.gather(1, labels[:, None]) - logits) / lengths
    order = gaps.scatter(1, labels[:, None], torch.inf).argsort(dim=1)

    def progress(moved: Tensor, which: Tensor, restart: int) -> Tensor:
        found, target = model.linear(moved), order[which, restart][:, None]
        ahead = found.gather(1, target) - found.gather(1, labels[which][:, None])
        return (ahead / lengths[which].gather(1, target)).squeeze(1)

    return progress, logits.shape[1] - 1


def _keep(result: AttackResult, where: Tensor, broken: Images) -> None:
    result.adversarial[where] = broken.detach()
    result.success[where] = True


def attack_loss(loss: str | AttackLoss) -> AttackLoss:
    """The loss of a name in `LOSSES`; a function is returned as it is.

    Raises:
        ValueError: if there is no such name.
    """
    if not isinstance(loss, str):
        return loss
    if loss not in LOSSES:
        raise ValueError(f"loss: expected one of {sorted(LOSSES)} or a function, got {loss!r}")
    return LOSSES[loss]
