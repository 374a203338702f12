"""Several processes at one task, started by torchrun; one process is the same with nobody to talk to.

Lightning Fabric joins them (NCCL on GPUs, gloo on CPUs); one process does without.
"""

import logging
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import cache
from typing import Any, TypeVar

import torch
from jaxtyping import Float, Shaped
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from clustr_core.numerics.rounding import float32_by_default, full_precision, repeatable_convolutions, tf32
from clustr_core.storage.gate import brief
from clustr_core.training.recipes import Precision

log = logging.getLogger(__name__)
_Answer = TypeVar("_Answer")
# a process that fails ends the others through torchrun; one that is still attacking may keep them waiting
TIMEOUT = timedelta(days=2)
# what torchrun sets beside WORLD_SIZE, and processes need to find each other
TORCHRUN = ("RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True)
class Processes:
    """All processes at one task, as one of them sees them.

    What has a row for each example is *whole* on every process, or in *parts*: equal ones, in order, padded with first
    rows where the rows do not suffice, so that no part is empty.

    Args:
        device: of this process.
        rank, count: which of how many it is.
        precision: of what `computed` computes.
    """

    device: torch.device
    rank: int = 0
    count: int = 1
    precision: Precision = "32-true"

    @property
    def first(self) -> bool:
        """As `is_first`."""
        return self.rank == 0

    def shard(self, whole: Shaped[Tensor, "row ..."]) -> Shaped[Tensor, "part ..."]:
        """This process's part of what all of them have."""
        if self.count == 1:
            return whole
        size = self._size(len(whole))
        return whole[torch.arange(self.rank * size, (self.rank + 1) * size, device=whole.device) % len(whole)]

    def unpadded_shard(self, part: Shaped[Tensor, "part ..."], total: int) -> Shaped[Tensor, "own ..."]:
        """This process's part of ``total`` rows without its padding: each row is some process's own, once."""
        size = self._size(total)
        return part[: min(max(total - self.rank * size, 0), size)]

    def gathered(self, part: Shaped[Tensor, "part ..."], total: int) -> Shaped[Tensor, "row ..."]:
        """The parts of all, put together; each part's gradient is the sum of those that it has on every process."""
        if self.count == 1:
            return part
        gathered = _Gather.apply(part, self.rank, self.count)
        assert isinstance(gathered, Tensor)
        return gathered[:total]

    @torch.no_grad()
    def add_up(self, tensors: Iterable[Float[Tensor, "..."]]) -> None:
        """Replace tensors by their sums over all processes, in one message."""
        if self.count == 1 or not (several := list(tensors)):
            return
        flat = torch.cat([tensor.flatten() for tensor in several])
        # not Fabric's sum, which waits for everybody first, at every step
        torch.distributed.all_reduce(flat)
        for tensor, total in zip(several, flat.split([tensor.numel() for tensor in several]), strict=True):
            tensor.copy_(total.view_as(tensor))

    def from_first(self, answer: Callable[[], _Answer]) -> _Answer:
        """What the first process answers, which alone is asked. Tensors in it must be on the CPU."""
        if self.count == 1:
            return answer()
        return self._fabric.broadcast(answer() if self.first else None)  # pyright: ignore[reportReturnType]

    def wait(self) -> None:
        """Until every process is here."""
        if self.count > 1:
            self._fabric.barrier()

    @contextmanager
    def in_precision(self) -> Iterator[None]:
        """A block in which float32 is what this precision means, whatever the caller has switched on, and a GPU's
        convolutions repeat bit for bit."""
        precision = tf32(self.device) if self.precision == "tf32" else full_precision(self.device)
        with float32_by_default(), precision, repeatable_convolutions():
            yield

    def computed(self, network: Callable[[Tensor], Tensor], images: Float[Tensor, "part ..."]) -> Float[Tensor, "..."]:
        """What a network makes of images, computed in this precision; under bf16-mixed, too, float32 comes out."""
        if self.precision != "bf16-mixed":
            return network(images)
        # inside another autocast, as `in_precision` is, rounded weights that are kept would outlive their update
        with torch.autocast(self.device.type, torch.bfloat16, cache_enabled=False):
            return network(images).float()

    def prepared(self, network: nn.Module) -> list[Tensor]:
        """Let batch norm see the whole batch; return what is left to `average` after each update.

        PyTorch can do so on GPUs only. On CPUs each process normalises by the statistics of its own part, so that
        training is not what it is in one process, and the running statistics are the processes' average.
        """
        layers = [layer for layer in network.modules() if isinstance(layer, _BatchNorm)]
        if self.count == 1 or not layers:
            return []
        if self.device.type != "cpu":
            nn.SyncBatchNorm.convert_sync_batchnorm(network)
            return []
        if self.first:
            log.warning("batch norm: %d processes on CPUs, each with the statistics of its own rows", self.count)
        return [t for layer in layers for t in (layer.running_mean, layer.running_var) if t is not None]

    def average(self, tensors: list[Tensor]) -> None:
        """Replace tensors by their means over all processes."""
        self.add_up(tensors)
        for tensor in tensors:
            tensor.div_(self.count)

    def _size(self, total: int) -> int:
        return -(-total // self.count)

    @property
    def _fabric(self) -> Any:
        return _fabric(self.device, self.count)


class _Gather(torch.autograd.Function):
    """The parts of all processes; backwards, a part gets the sum of the gradients that it has on each of them.

    Each is the other's gradient, so that a gradient may be part of a loss. Fabric's own gather goes by a function that
    PyTorch has deprecated.
    """

    @staticmethod
    def forward(ctx: Any, part: Tensor, rank: int, count: int) -> Tensor:
        ctx.rank, ctx.count = rank, count
        parts = [torch.empty_like(part, memory_format=torch.contiguous_format) for _ in range(count)]
        torch.distributed.all_gather(parts, part.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return _OwnSum.apply(gradient, ctx.rank, ctx.count), None, None  # pyright: ignore[reportReturnType]


class _OwnSum(torch.autograd.Function):
    """The own part of the sum over all processes; backwards, everybody's gradients together."""

    @staticmethod
    def forward(ctx: Any, whole: Tensor, rank: int, count: int) -> Tensor:
        ctx.rank, ctx.count = rank, count
        total = whole.clone(memory_format=torch.contiguous_format)
        torch.distributed.all_reduce(total)
        return total.chunk(count)[rank]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return _Gather.apply(gradient, ctx.rank, ctx.count), None, None  # pyright: ignore[reportReturnType]


def count() -> int:
    """How many processes torchrun started, or 1.

    Raises:
        ValueError: if the environment holds some of torchrun's variables only, as when they were left there.
    """
    return _launched()[1]


def is_first() -> bool:
    """Whether this is the process that writes and speaks for all."""
    return _rank() == 0


def device_here(name: str | torch.device | None = None) -> torch.device:
    """The device of that name; with several processes on GPUs, this process's own. None is a GPU if there is one.

    Raises:
        ValueError: if there is no device of that name, or several processes are sent to one GPU.
    """
    try:
        device = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if name is None else name)
    except RuntimeError as error:
        raise ValueError(f"device: expected one such as 'cpu' or 'cuda:1', got {brief(name)}") from error
    if count() == 1 or device.type == "cpu":
        return device
    own = int(os.environ["LOCAL_RANK"])
    if device.index not in (None, own):
        raise ValueError(f"device: expected {device.type}, of which each of {count()} processes has one, got {device}")
    return torch.device(device.type, own)


def join(device: str | torch.device | None = None, precision: Precision = "32-true") -> Processes:
    """The processes that torchrun started this one with, who know each other from here on; or this one alone.

    Args:
        device: as `device_here` takes it.
    """
    processes = Processes(device_here(device), _rank(), count(), precision)
    processes.wait()
    return processes


def _rank() -> int:
    return _launched()[0]


def _launched() -> tuple[int, int]:
    """This process's rank, and the number of processes, as torchrun says."""
    said = {name: os.environ.get(name, default) for name, default in (("RANK", "0"), ("WORLD_SIZE", "1"))}
    if not all(value.isdecimal() for value in said.values()) or int(said["RANK"]) >= int(said["WORLD_SIZE"]):
        raise ValueError(f"environment: expected RANK in 0..WORLD_SIZE-1, got {said}; unset both, or use torchrun")
    rank, processes = int(said["RANK"]), int(said["WORLD_SIZE"])
    if processes > 1 and (missing := [name for name in TORCHRUN if name not in os.environ]):
        found = f"WORLD_SIZE={processes} without {', '.join(missing)}"
        raise ValueError(f"environment: expected all that torchrun sets, got {found}; unset WORLD_SIZE and RANK")
    here = {name: os.environ.get(name, "") for name in ("LOCAL_RANK", "LOCAL_WORLD_SIZE")}
    numbers = [int(value) if value.isdecimal() else -1 for value in here.values()]
    if processes > 1 and not 0 <= numbers[0] < numbers[1]:
        raise ValueError(f"environment: expected LOCAL_RANK in 0..LOCAL_WORLD_SIZE-1, got {here}; use torchrun")
    return rank, processes


@cache
def _fabric(device: torch.device, count: int) -> Any:
    """Fabric with the processes joined."""
    from lightning_fabric import Fabric
    from lightning_fabric.plugins.environments.torchelastic import TorchElasticEnvironment
    from lightning_fabric.strategies.ddp import DDPStrategy

    # it greets from every process
    logging.getLogger("lightning_fabric").setLevel(logging.WARNING)
    here = int(os.environ["LOCAL_WORLD_SIZE"])
    fabric = Fabric(
        accelerator=device.type,
        devices=here,
        num_nodes=count // here,
        strategy=DDPStrategy(timeout=TIMEOUT),
        plugins=[TorchElasticEnvironment()],
    )
    fabric.launch()
    return fabric


ALONE = Processes(torch.device("cpu"))
