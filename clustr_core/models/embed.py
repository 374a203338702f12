"""A data set through a network: embeddings, predictions."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor, nn

from clustr_core import data
from clustr_core.numerics.chunks import IMAGES_EMBEDDED, IMAGES_PREDICTED


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Evaluation mode inside the block; each submodule's own mode afterwards."""
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for part, mode in modes:
            part.training = mode


def embed_all(
    encoder: nn.Module,
    images: UInt8[Tensor, "batch channel height width"],
    *,
    batch_size: int = IMAGES_EMBEDDED,
    passed: Callable[[nn.Module, Tensor], Tensor] | None = None,
) -> Float[Tensor, "batch dim"]:
    """Embeddings of byte images, in evaluation mode and without a graph, on the encoder's device.

    Args:
        passed: passes a batch through the encoder, as in another precision; None calls it.
    """
    device, passed = next(encoder.parameters()).device, passed or nn.Module.__call__
    with evaluating(encoder), torch.no_grad():
        return torch.cat([passed(encoder, data.to_float(part.to(device))) for part in images.split(batch_size)])


def predictions(model: nn.Module, images: Tensor, device: str | torch.device = "cpu") -> Int[Tensor, " batch"]:
    """Predicted classes of byte images, on the CPU."""
    with torch.no_grad():
        return torch.cat(
            [model(data.to_float(part.to(device))).argmax(dim=1).cpu() for part in images.split(IMAGES_PREDICTED)]
        )
