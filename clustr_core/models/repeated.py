"""Passes through a network as CUDA graphs, so that a GPU under attack never waits for Python."""

from bisect import bisect_left
from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from clustr_core.numerics.rounding import repeatable_convolutions

Images = Float[Tensor, "batch channel height width"]
Network = Callable[[Tensor], Tensor]
# what a recording is of: shape, dtype and device of its input
Key = tuple[tuple[int, ...], torch.dtype, torch.device]
# of a network and an example of its input, what repeats its passes: outputs and what a gradient needs lie where the
# last call's lay
Record = Callable[[Network, Tensor], Network]
# how many images a recorded pass has: the last as many as an attack is given at one time on a GPU
SLOTS = (16, 64, 128, 256, 384, 512, 768, 1024)


class Repeated(nn.Module):
    """A frozen network whose passes, and whose gradients in its inputs, a GPU repeats from a recording.

    A batch is padded to the next size of `SLOTS`, since an attack loses examples as it breaks them; each of these sizes
    is recorded when it first comes. Larger batches pass as they would without. The network has to treat
    every image alone, as one in evaluation mode does, and its weights and mode to stay as they are.

    Deviation from the network itself: a gradient can be taken of its gradients nowhere.

    Args:
        network: images -> one row each.
        record: `torch.cuda.make_graphed_callables`, or what keeps values as it does.
    """

    def __init__(self, network: nn.Module, record: Record | None = None) -> None:
        super().__init__()
        self.network = network
        self._record = record or recorded
        self._passes: dict[Key, Network] = {}
        # of the pass that was repeated last and whose gradient was not taken yet
        self._latest: dict[Key, object] = {}

    def forward(self, images: Images) -> Float[Tensor, "batch dim"]:
        """What the network returns."""
        if not 0 < len(images) <= SLOTS[-1]:
            return self.network(images)
        return _Pass.apply(images, self)  # pyright: ignore[reportReturnType]

    def repeat(self, images: Tensor) -> tuple[Tensor, Tensor, object]:
        """The padded input and its output, both good until the next repetition, and a token, the latest until then."""
        slots = SLOTS[bisect_left(SLOTS, len(images))]
        padded = images.new_zeros(slots, *images.shape[1:])
        padded[: len(images)] = images
        key, token = _key(padded), object()
        with torch.enable_grad():
            padded.requires_grad_()
            if key not in self._passes:
                self._passes[key] = self._record(self.network, padded)
            outputs = self._passes[key](padded)
        self._latest[key] = token
        return padded, outputs, token

    def is_latest(self, padded: Tensor, token: object) -> bool:
        """Whether nothing has been repeated since over the values that its gradient needs; they are then used up."""
        return self._latest.pop(_key(padded), None) is token


def _key(padded: Tensor) -> Key:
    return tuple(padded.shape), padded.dtype, padded.device


class _Pass(torch.autograd.Function):
    """One pass, whose gradient is right whatever was repeated since: if need be it passes again."""

    @staticmethod
    def forward(ctx: Any, images: Tensor, repeated: Repeated) -> Tensor:
        padded, outputs, token = repeated.repeat(images)
        ctx.repeated, ctx.token, ctx.made = repeated, token, (padded, outputs)
        ctx.save_for_backward(images)
        # the next repetition writes over them
        return outputs.detach()[: len(images)].clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (images,) = ctx.saved_tensors
        padded, outputs = ctx.made
        if not ctx.repeated.is_latest(padded, ctx.token):
            padded, outputs, token = ctx.repeated.repeat(images)
            ctx.repeated.is_latest(padded, token)
        above = outputs.new_zeros(outputs.shape)
        above[: len(images)] = gradient
        (of_inputs,) = torch.autograd.grad(outputs, padded, above)
        return of_inputs[: len(images)].clone(), None


def recorded(network: Network, example: Tensor) -> Network:
    """Record a pass and its gradient as CUDA graphs, by the fastest convolutions that cuDNN finds for this size.

    Raises:
        ValueError: if the example is not on a CUDA device, or the pass reads a value off it.
    """
    if not example.is_cuda:
        raise ValueError(f"captured: expected images on a CUDA device, which alone has graphs, got {example.device}")
    try:
        # a function, not a module: the weights are frozen, and the module stays as it is
        with repeatable_convolutions(fastest=True):
            graphed: Any = torch.cuda.make_graphed_callables(
                lambda images: network(images), (example.detach().requires_grad_(),)
            )
        return graphed
    except RuntimeError as error:
        wanted = (
            "more memory" if isinstance(error, torch.OutOfMemoryError) else "passes that read nothing off the device"
        )
        raise ValueError(f"captured: expected {wanted}; attack this model without ({error})") from error
