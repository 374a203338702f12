"""What every attack shares: the model's verdict on an image, and what an attack returns."""

import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from clustr_core.attacks.ball import Images

Model = nn.Module | Callable[[Images], Tensor]


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


def not_logits(outputs: Float[Tensor, "batch class"], *, saturation: bool = True) -> str | None:
    """What gives away that a model's outputs are no logits; None if nothing does.

    Probabilities: all in [0, 1], rows summing to one. Scores: all in [0, 1], or none negative and most rows with a
    class at 0 (logits of a network may be positive throughout, but not with their floor at 0). Saturation: for more
    than half of the rows, float cross-entropy at the predicted class is exactly 0, and with it every gradient of it;
    looked for only if asked, since it does no harm to a margin.
    """
    if outputs.numel() < 10:
        return None
    within = bool(((outputs >= 0) & (outputs <= 1)).all())
    if within and ((outputs.sum(dim=1) - 1).abs() < 1e-4).all():
        return "all outputs lie in [0, 1] and each row sums to one: they look like probabilities; take their logarithm"
    if within and outputs.any():
        return "all outputs lie in [0, 1]: they look like scores; take their logarithm"
    if bool((outputs >= 0).all()) and (outputs.amin(dim=1) < 1e-3).float().mean() > 0.5 and outputs.any():
        return "no output is negative and most rows reach down to 0: they look like scores; take their logarithm"
    certain = outputs.softmax(dim=1).amax(dim=1) == 1
    if saturation and certain.float().mean() > 0.5:
        share = 100 * certain.float().mean().item()
        return f"cross-entropy is saturated: softmax rounds to 1 for {share:.0f} % of the images; see attacks.rescaled"
    return None


def warn_unless_logits(outputs: Float[Tensor, "batch class"], name: str = "model", *, saturation: bool = True) -> None:
    """Say how it was noticed, if a model's outputs do not look like logits."""
    if reason := not_logits(outputs, saturation=saturation):
        warnings.warn(f"{name}: expected logits, but {reason}", UserWarning, stacklevel=4)


def misclassified(model: Model, images: Images, labels: Tensor, *, warn: bool = False) -> Bool[Tensor, " batch"]:
    """Whether each image is misclassified, after checking what the model returns."""
    with torch.no_grad():
        logits = model(images)
    if logits.dim() != 2 or len(logits) != len(images):
        raise ValueError(f"model: expected logits [{len(images)}, class], got shape {list(logits.shape)}")
    check_logits(logits)
    if warn:
        warn_unless_logits(logits)
    if len(labels) and (labels.min() < 0 or labels.max() >= logits.shape[1]):
        low, high = int(labels.min()), int(labels.max())
        raise ValueError(f"labels: expected classes in 0..{logits.shape[1] - 1}, got {low} to {high}")
    return logits.argmax(dim=1) != labels


def check_logits(logits: Tensor, name: str = "model") -> None:
    """Refuse NaN, which argmax would call the largest, and rows without a finite largest logit, which rank nothing."""
    if logits.isnan().any():
        raise ValueError(f"{name}: expected logits, got NaN")
    if logits.numel() and not logits.amax(dim=1).isfinite().all():
        raise ValueError(f"{name}: expected a finite largest logit in each row, got an infinite one")
