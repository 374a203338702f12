"""The paper's evaluation, reproduced by name. Every departure from good practice stands here, and nowhere else."""

import math
from collections.abc import Callable
from functools import partial

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from clustr_core.attacks.ball import Ball, Images, Walk, as_leaf, check_gradient, check_inputs, with_gradients
from clustr_core.attacks.losses import LOSSES
from clustr_core.attacks.names import PAPER_RESTARTS, PAPER_STEP_SIZE, PAPER_STEPS
from clustr_core.attacks.result import AttackResult, Model, Watch, logits_of, predicted, prepared
from clustr_core.models.classifiers import ClusterClassifier
from clustr_core.numerics.checks import check_logits
from clustr_core.numerics.distances import squared_distances


class ScoreModel(nn.Module):
    """A cluster classifier that returns the paper's raw scores s_c in place of logits.

    s_c(z) = sum over the L nearest centroids j of class c of exp(-d_j^2 / 2 sigma_j^2), in [0, k].

    Departure from good practice: attacks then take these scores as if they were logits. Their softmax cannot tell a
    sure prediction from an unsure one (a score of 1 against nine of 0 reads as 23 %), and its gradient leads away from
    the own centroids rather than towards a rival's. Where all scores underflow, argmax answers class 0.

    Args:
        model: a cluster classifier; its ``neighbours`` is L, None lets all vote (the released code reads L only where
            its flag ``normalize_probs`` is set).
    Source: Alfarra et al. 2021, and the released evaluation.
    """

    def __init__(self, model: ClusterClassifier) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Float[Tensor, "batch channel height width"]) -> Float[Tensor, "batch class"]:
        """Raw scores."""
        clusters, votes = self.model.clusters, self.model.neighbours
        distances = squared_distances(self.model.embed(images), clusters.centroids)
        scores = (-distances / (2 * clusters.variance)).exp()
        if votes is not None and votes < scores.shape[1]:
            nearest = distances.topk(votes, dim=1, largest=False).indices
            scores = scores * torch.zeros_like(scores).scatter_(1, nearest, 1)
        return clusters.gather_by_class(scores, 0.0).sum(dim=2)


def paper_surface(model: nn.Module) -> nn.Module:
    """What the paper's attack is given: raw scores for a cluster classifier, logits for any other model."""
    return ScoreModel(model) if isinstance(model, ClusterClassifier) else model


@with_gradients
def paper_pgd(
    model: Model,
    images: Images,
    labels: Int[Tensor, " batch"],
    *,
    eps: float,
    steps: int = PAPER_STEPS[0],
    restarts: int = PAPER_RESTARTS,
    step_size: float = PAPER_STEP_SIZE,
    loss: str = "ce",
    seed: int = 0,
    watch: Watch | None = None,
) -> AttackResult:
    """The released attack's rule, L-infinity, on whatever the model returns.

    Departures from good practice, each as released:

    - the step is 2/255 at every eps: at eps = 2/255 it jumps across the ball, and 20 steps cannot cross one of 25.5/255
      twice;
    - the random start is uniform in the ball and not clipped, so an image that is wrong at once may lie outside
      [0, 1];
    - of the restarts the one with the highest loss is kept, right or wrong (`paper_restart_rule`), so a success can be
      overwritten by a failure whose loss is higher;
    - whether the example was right when clean is not asked: only the image that was kept is judged.

    Within a restart an image that is wrong stays where it is, as released. What the released code computes without need
    is left out with the same outcome: the gradient of an image that is wrong, and every further restart of an
    example that no failure can take back. A failure's cross-entropy is at most log C (its label has the largest of C
    probabilities), its margin at most 0: above that a success stays. What is left to spend is the unbroken examples'
    share where the others break at once and for good (0.35 of all at 30 % robust accuracy, at the paper's 8/255 on
    CIFAR-10). It is more where breaking takes most of the steps, as in a ball that they can hardly cross, and on
    scores, whose successes often stay below log C: these the released rule itself has to attack again.

    Args:
        eps: radius of the ball, in pixels of [0, 1]; the paper's are `PAPER_EPS`.
        steps, restarts: the paper's are 20 or 100, and 10; with others it is a reduced protocol, and to be called so.
        step_size, loss: for ablations; the paper's are 2/255 and "ce".
        watch: told of each pass (`result.Watch`); the first one of a restart may lie outside [0, 1].
    Returns:
        ``success`` is that of the image kept; ``gradients`` those really spent.
    Raises:
        ValueError: as `gradient.pgd`.
    Source: the released code of Alfarra et al. 2021 (its evaluation follows Wong et al. 2020).
    """
    check_inputs(images, labels, norm="linf", eps=eps, step_size=step_size, steps=steps, restarts=restarts)
    if loss not in LOSSES:
        raise ValueError(f"loss: expected one of {sorted(LOSSES)}, got {loss!r}")
    ball, walk = Ball(eps, "linf"), Walk(step_size, steps, restarts, seed)
    images, labels = prepared(model, images, labels)
    clean = predicted(model, images, labels)
    kept, spent = images.clone(), torch.zeros_like(labels)
    highest = torch.full((len(images),), -math.inf, dtype=torch.float64, device=images.device)
    settled = torch.zeros_like(labels, dtype=torch.bool)
    generator = torch.Generator(images.device).manual_seed(seed)
    for restart in range(restarts):
        noise = torch.rand(images.shape, generator=generator, device=images.device, dtype=images.dtype)
        active = (~settled).nonzero().squeeze(1)
        if not len(active):
            break
        x = images[active] + eps * (2 * noise[active] - 1)
        told = None if watch is None else partial(watch, restart)
        outputs = _one_run(model, x, images, labels, active, spent, ball, walk, loss, told)
        check_logits(outputs)
        values = LOSSES[loss](outputs, labels[active])
        better = paper_restart_rule(values, highest[active])
        kept[active[better]], highest[active[better]] = x[better], values[better].double()
        wrong = outputs.argmax(dim=1) != labels[active]
        settled[active[better]] = (wrong & (values > _ceiling(loss, outputs.shape[1])))[better]
    prediction = predicted(model, kept, labels)
    return AttackResult(kept, prediction != labels, clean == labels, spent, prediction, clean)


def paper_restart_rule(losses: Float[Tensor, " active"], highest: Float[Tensor, " active"]) -> Bool[Tensor, " active"]:
    """Which examples keep the image of the restart that has just ended: those whose loss is highest so far, or equal.

    Departure from good practice: whether either image is misclassified is not asked, so a failure of higher loss takes
    the place of a success. A correct rule keeps any success, and stops there (`gradient.pgd`).

    Args:
        losses: of the images at which the restart ended.
        highest: of the images kept from the restarts before; -infinity before the first.
    Source: the code that Alfarra et al. 2021 released (utils/attacks.py, ``external_attack_pgd``), as that of Wong et
        al. 2020 (fast_adversarial, ``attack_pgd``):
        ``max_delta[all_loss >= max_loss] = delta.detach()[all_loss >= max_loss]``.
        There the highest loss begins at 0, which a cross-entropy never falls below.
    """
    return losses >= highest


def _one_run(
    model: Model,
    x: Float[Tensor, "active channel height width"],
    images: Images,
    labels: Tensor,
    active: Tensor,
    spent: Tensor,
    ball: Ball,
    walk: Walk,
    loss: str,
    told: Callable[[Tensor, Tensor], None] | None,
) -> Tensor:
    """One restart, moving ``x`` in place; what the model returns at its end."""
    moving, eps = torch.arange(len(x), device=x.device), float(ball.eps)
    outputs = torch.empty(0)
    for _ in range(walk.steps):
        leaf = as_leaf(x[moving])
        found = logits_of(model, leaf)
        outputs = outputs if outputs.numel() else found.new_empty(len(x), found.shape[1])
        outputs[moving] = found.detach()
        if told is not None:
            told(active[moving], found.detach())
        goals = labels[active[moving]]
        right = found.detach().argmax(dim=1) == goals
        if not right.any():
            return outputs
        (gradient,) = torch.autograd.grad(LOSSES[loss](found, goals)[right].sum(), leaf)
        check_gradient(gradient)
        moving = moving[right]
        spent[active[moving]] += 1
        origin = images[active[moving]]
        moved = leaf.detach()[right] + walk.step_size * gradient[right].sign()
        x[moving] = (origin + (moved - origin).clamp(-eps, eps)).clamp(0, 1)
    with torch.no_grad():
        outputs[moving] = logits_of(model, x[moving])
    if told is not None:
        told(active[moving], outputs[moving])
    return outputs


def _ceiling(loss: str, num_classes: int) -> float:
    """The highest loss of an example that is classified correctly, with room for rounding."""
    return math.log(num_classes) + 2e-6 if loss == "ce" else 0.0
