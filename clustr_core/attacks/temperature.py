"""Logits cooled so far that float32 cross-entropy has a gradient."""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from clustr_core.attacks.ball import Images
from clustr_core.attacks.result import Model, logits_of
from clustr_core.numerics.checks import check_evaluating, check_images

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
        return logits_of(self.model, images) / self.temperature


def rescaled(model: Model, images: Images) -> Rescaled:
    """The model with its logits cooled so far that the median gap between the two largest is at most `SANE_GAP`.

    Cluster logits lie tens of nats apart, where float32 cross-entropy rounds to 0 and loses its gradient. The gap is
    that of the two largest logits and not the margin of the label, which is negative on a model that is mostly wrong;
    logits closer than that are left alone.

    Raises:
        TypeError: if the model returns no tensor.
        ValueError: if pixels leave [0, 1], there is one class only, or the model is not evaluating.
    """
    check_images(images)
    check_evaluating(model)
    with torch.no_grad():
        logits = logits_of(model, images.clone(memory_format=torch.contiguous_format))
    if logits.shape[1] < 2:
        raise ValueError(f"model: expected logits of at least two classes, got {logits.shape[1]}")
    top = logits.topk(2, dim=1).values
    return Rescaled(model, max(1.0, float((top[:, 0] - top[:, 1]).median()) / SANE_GAP))
