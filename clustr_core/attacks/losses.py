"""What attacks climb, and what training minimises of logits: cross-entropy, margin, DLR, divergence."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor


def cross_entropy(logits: Float[Tensor, "batch class"], labels: Int[Tensor, " batch"]) -> Float[Tensor, " batch"]:
    """-log softmax(logits)[label] of each example."""
    return F.cross_entropy(logits, labels, reduction="none")


def margin_loss(logits: Float[Tensor, "batch class"], labels: Int[Tensor, " batch"]) -> Float[Tensor, " batch"]:
    """max_{c != label} logits_c - logits_label of each example: positive exactly where the prediction is wrong.

    Source: Carlini and Wagner 2017 (untargeted, without a floor).
    """
    own = F.one_hot(labels, logits.shape[1]).bool()
    return logits.masked_fill(own, -torch.inf).amax(dim=1) - logits.gather(1, labels[:, None]).squeeze(1)


def dlr_loss(logits: Float[Tensor, "batch class"], labels: Int[Tensor, " batch"]) -> Float[Tensor, " batch"]:
    """The difference of logits ratio -(g_y - max_{c != y} g_c) / (g_(1) - g_(3)), sorted downwards; scale-free.

    Raises:
        ValueError: with fewer than three classes.
    Source: Croce and Hein 2020, equation 6.
    """
    if logits.shape[1] < 3:
        raise ValueError(f"logits: expected at least three classes for the DLR loss, got {logits.shape[1]}")
    top = logits.topk(3, dim=1).values
    spread = (top[:, 0] - top[:, 2]).clamp_min(torch.finfo(logits.dtype).tiny)
    return margin_loss(logits, labels) / spread


def kl_divergence(
    clean_logits: Float[Tensor, "batch class"], moved_logits: Float[Tensor, "batch class"]
) -> Float[Tensor, " batch"]:
    """KL(softmax(clean) || softmax(moved)) of each example, in nats; both sides carry gradients."""
    clean, moved = clean_logits.log_softmax(dim=1), moved_logits.log_softmax(dim=1)
    return F.kl_div(moved, clean, reduction="none", log_target=True).sum(dim=1)


AttackLoss = Callable[[Float[Tensor, "batch class"], Int[Tensor, " batch"]], Float[Tensor, " batch"]]
LOSSES: dict[str, AttackLoss] = {"ce": cross_entropy, "margin": margin_loss, "dlr": dlr_loss}


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
