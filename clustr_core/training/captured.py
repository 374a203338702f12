"""Updates as CUDA graphs: captured once, then replayed, so that a GPU never waits for Python."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache

import torch
from jaxtyping import Float, Int
from torch import Tensor

from clustr_core.training.recipes import Recipe

Outputs = tuple[Tensor, ...]
Work = Callable[[], Outputs]
# of a generator that the work draws from, what makes of work what repeats it
Recorder = Callable[[torch.Generator], Callable[[Work], Work]]


class Captured:
    """A function of tensors, of which a GPU repeats the recorded work wherever the shapes are those that it recorded.

    A call runs as it would without, and so sets up what PyTorch sets up at a first call, until shapes come again: then
    the work is recorded, on inputs of its own, which later ones are copied into. That call and all later ones of the
    same shapes repeat it; any other still runs as it would without. A function that reads a value off the device cannot
    be recorded.

    Args:
        function: what else it reads and writes must stay where it is from call to call.
        record: makes of work what repeats it.
    """

    def __init__(self, function: Callable[..., Outputs], record: Callable[[Work], Work]) -> None:
        self._function, self._record = function, record
        self._seen: set[tuple[torch.Size, ...]] = set()
        self._inputs: tuple[Tensor, ...] = ()
        self._repeat: Work | None = None

    def __call__(self, *inputs: Tensor) -> Outputs:
        """What the function returns for these inputs."""
        shapes = tuple(each.shape for each in inputs)
        if self._repeat is None and shapes in self._seen:
            self._inputs = tuple(each.clone() for each in inputs)
            self._repeat = self._record(lambda: self._function(*self._inputs))
        self._seen.add(shapes)
        if self._repeat is None or shapes != tuple(each.shape for each in self._inputs):
            return self._function(*inputs)
        for kept, each in zip(self._inputs, inputs, strict=True):
            kept.copy_(each, non_blocking=True)
        return self._repeat()


def recorder(generator: torch.Generator) -> Callable[[Work], Work]:
    """Records work as a CUDA graph, which draws afresh from this generator at each repetition."""

    def record(work: Work) -> Work:
        graph = torch.cuda.CUDAGraph()
        graph.register_generator_state(generator)
        # what an earlier graph held is free now, and no memory can be freed while one is recorded
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        graph.capture_begin()
        try:
            outputs = work()
        except RuntimeError as error:
            with suppress(RuntimeError):
                graph.capture_end()
            short = isinstance(error, torch.OutOfMemoryError)
            wanted = "more memory" if short else "updates that read nothing off the device"
            raise ValueError(f"captured: expected {wanted}; train this method without ({error})") from error
        graph.capture_end()

        def repeat() -> Outputs:
            graph.replay()
            # the next repetition writes over them
            return tuple(each.clone() for each in outputs)

        return repeat

    return record


@contextmanager
def beside_the_default_stream(device: torch.device) -> Iterator[None]:
    """A block whose work is in a stream of its own, the only kind that can be recorded; on a CPU, where it is."""
    if device.type != "cuda":
        yield
        return
    before, own = torch.cuda.current_stream(device), _own_stream(device)
    own.wait_stream(before)
    try:
        with torch.cuda.stream(own):
            yield
    finally:
        before.wait_stream(own)


@cache
def _own_stream(device: torch.device) -> torch.cuda.Stream:
    """One for all epochs: memory that was used in a stream is used again in that stream only."""
    return torch.cuda.Stream(device)


def sent(part: Tensor, device: torch.device) -> Tensor:
    """A part of a batch on its device; on the way to a GPU nobody waits for it."""
    return part.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else part.to(device)


class LateLosses:
    """Tells of losses one call late, so that no batch waits until the one before is done."""

    def __init__(self, tell: Callable[[Tensor, Tensor], None]) -> None:
        self._tell = tell
        self._waiting: tuple[Int[Tensor, " batch"], Tensor, torch.cuda.Event | None] | None = None

    def update(self, indices: Int[Tensor, " batch"], losses: Float[Tensor, " batch"]) -> None:
        """Begin to fetch these losses, and tell those of the call before."""
        before, self._waiting = self._waiting, (indices, *_fetched(losses))
        if before is None:
            return
        indices, losses, arrived = before
        if arrived is not None:
            arrived.synchronize()
        self._tell(indices, losses)


def _fetched(losses: Tensor) -> tuple[Tensor, torch.cuda.Event | None]:
    """A copy that is on its way to the CPU, and the event that it has arrived."""
    if not losses.is_cuda:
        return losses.clone(), None
    here = torch.empty_like(losses, device="cpu", pin_memory=True).copy_(losses, non_blocking=True)
    arrived = torch.cuda.Event()
    arrived.record()
    return here, arrived


def set_rate(optimiser: torch.optim.Optimizer, rate: float) -> None:
    """Give an optimiser this learning rate; one that lies on a device is written to, not replaced."""
    for group in optimiser.param_groups:
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate


def can_be_captured(recipe: Recipe) -> bool:
    """Whether an update reads nothing off the device; orthogonal layers do, where they solve for their weights."""
    return recipe.guarantee != "lipschitz"


def check_captured(device: torch.device, processes: int) -> None:
    """Raises a ValueError unless it is one process on a CUDA device, which alone can record updates."""
    if device.type != "cuda" or processes > 1:
        found = f"{processes} on {device}"
        raise ValueError(f"captured: expected one process on a CUDA device, which alone has graphs, got {found}")
