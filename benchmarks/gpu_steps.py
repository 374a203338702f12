"""Training steps and attacks on a GPU beside the barest loops that PyTorch allows, in turn in one run.

.venv/bin/python -m benchmarks.gpu_steps         on a CUDA device: writes results/bench/gpu-steps.csv
.venv/bin/python -m benchmarks.gpu_steps --toy   anywhere: the same at toy size, in which no time means anything

The bare training loop is cross-entropy on a ResNet-18 and batches at hand, in bf16 with channels last, a fused
optimiser and ``torch.compile(mode="reduce-overhead")``; the bare attack is a forward pass and an input gradient,
compiled alike. Ours is `loop.train_epoch` with all that an epoch has (sampling, augmentation, history), its updates
captured or not, and `pgd` with all that an attack has (checks, verdicts, kept successes). Epochs are timed on fewer
images and scaled up to 50,000, so what is done once an epoch (recording, a batch that is not recorded) counts too much.
"""

import argparse
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.harness import Effort, interleaved
from benchmarks.steps import drawn_dataset
from clustr_core.attacks.gradient import pgd
from clustr_core.data import Dataset
from clustr_core.measuring.profile import load_profile
from clustr_core.models.encoders import build_encoder
from clustr_core.models.repeated import Repeated
from clustr_core.numerics.rounding import full_precision
from clustr_core.storage.files import home
from clustr_core.storage.tables import write_table
from clustr_core.training.captured import recorder
from clustr_core.training.checks import images_in_a_batch
from clustr_core.training.loop import train_epoch
from clustr_core.training.processes import join
from clustr_core.training.recipes import Precision, Recipe
from clustr_core.training.state import State, new_state
from tools.telling import told

# seconds of an epoch on an H100 that are aimed at, and how many times the bare loop's step cross-entropy's may take
EPOCHS = {"ce": None, "clustr": 2.0, "clustr-qtrades": 4.5, "pgd-at": 10.0, "fast-at": 3.0}
STEP_RATIO, ATTACK_RATIO = 1.15, 1.05
EXAMPLES = 50_000


@dataclass(frozen=True)
class Size:
    """How large a run is."""

    device: str
    width: int = 64
    batch: int = 128
    batches: int = 60
    steps: int = 20
    images: tuple[int, ...] = (128, 1000)
    rounds: int = 3


TOY = Size("cpu", width=8, batch=6, batches=2, steps=2, images=(4,), rounds=1)


def finished(call: Callable[[], object], device: str) -> None:
    """A call, until the device is done with it."""
    call()
    if device == "cuda":
        torch.cuda.synchronize()


def compiled(function: Callable, size: Size) -> Callable:
    """As fast as PyTorch makes it; at toy size as it is, since compiling takes longer than all the rest."""
    compiling = {"mode": "reduce-overhead", "dynamic": False}
    return torch.compile(function, **compiling) if size.device == "cuda" else function


def bare_steps(size: Size) -> Callable[[], object]:
    """So many steps of the bare training loop, on one batch at hand."""
    network = _network(size).train()
    options = {"lr": 1e-3, "fused": size.device == "cuda"}
    optimiser = torch.optim.SGD(network.parameters(), momentum=0.9, weight_decay=5e-4, **options)
    images, labels = _batch(size, size.batch)
    forward = compiled(network, size)

    def steps() -> None:
        for _ in range(size.batches):
            with torch.autocast(size.device, torch.bfloat16):
                loss = F.cross_entropy(forward(images), labels)
            optimiser.zero_grad(set_to_none=True)
            loss.backward()
            optimiser.step()

    return steps


def _network(size: Size) -> nn.Module:
    torch.manual_seed(0)
    encoder = build_encoder("resnet18", (3, 32, 32), width=size.width)
    network = nn.Sequential(encoder, nn.Linear(8 * size.width, 10)).to(size.device)
    # on a CPU a gradient in this layout writes past its memory (`encoders.to_channels_last_frozen`)
    return network.to(memory_format=torch.channels_last) if size.device == "cuda" else network  # pyright: ignore[reportCallIssue]


def _batch(size: Size, count: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(count, 3, 32, 32, generator=generator).to(size.device)
    return images, torch.randint(10, (count,), generator=generator).to(size.device)


class Epochs:
    """A recipe's epochs on random images, their updates captured or not."""

    def __init__(self, recipe: Recipe, size: Size, precision: Precision, *, captured: bool) -> None:
        self.recipe = replace(recipe, warm_start=None, precision=precision, width=size.width, batch_size=size.batch)
        if self.recipe.cluster_batches:
            # random embeddings make small clusters; the paper's batches have 12 of 20
            self.recipe = replace(self.recipe, per_class=2, **({} if size.device == "cuda" else {"per_cluster": 2}))
        drawn = drawn_dataset(self.recipe, max(size.batch * size.batches, 80))
        self.images, self.labels = drawn.train_images.to(size.device), drawn.train_labels.to(size.device)
        self.processes = join(size.device, precision)
        self.state = self._state(drawn, recorder if captured else None)

    def _state(self, drawn: Dataset, record: Any) -> State:
        return new_state(self.recipe, drawn, self.images, self.labels, None, self.processes, record)

    def __call__(self) -> None:
        """One epoch."""
        with self.processes.in_precision():
            train_epoch(self.recipe, self.state, self.images, self.labels)

    @property
    def examples(self) -> int:
        """Of an epoch."""
        return len(self.images)


def trainings(size: Size) -> Iterator[dict[str, Any]]:
    """Each method's epoch, captured and not, beside the bare loop's steps."""
    recipes = load_profile("gpu").recipes
    bare_epochs = bare_steps(size)
    for method, seconds_aimed_at in EPOCHS.items():
        aim, of = (STEP_RATIO, "ratio") if method == "ce" else (seconds_aimed_at, "seconds")
        for precision, captured in ways_to_train(method, size):
            ours = Epochs(recipes[method], size, precision, captured=captured)
            taken = _in_turn({"ours": ours, "bare": bare_epochs}, size)
            epoch = taken["ours"] * EXAMPLES / ours.examples
            bare_epoch = taken["bare"] * EXAMPLES / (size.batch * size.batches)
            yield {
                "what": f"epoch of {method}", "precision": precision, "captured": captured,
                "images": images_in_a_batch(ours.recipe),
                "seconds": epoch, "bare_seconds": bare_epoch, "ratio": epoch / bare_epoch,
                "target": aim if precision == "bf16-mixed" else None, "of": of,
            }  # fmt: skip


def ways_to_train(method: str, size: Size) -> list[tuple[Precision, bool]]:
    """Precisions, and whether updates are captured: of what is cheap every one, of the rest what a leg would take."""
    precisions: tuple[Precision, ...] = ("bf16-mixed", "tf32", "32-true") if method == "ce" else ("bf16-mixed", "tf32")
    if size.device != "cuda":
        return [(precision, False) for precision in precisions]
    plain = [("bf16-mixed", False)] if method in ("ce", "clustr") else []
    return [*plain, *((precision, True) for precision in precisions)]


def attacks(size: Size) -> Iterator[dict[str, Any]]:
    """`pgd`, its passes captured and not, beside as many bare forward passes and input gradients."""
    network = _network(size).eval().requires_grad_(False)
    for count in size.images:
        images, _ = _batch(size, count)
        labels = network(images).argmax(dim=1)
        forward = compiled(network, size)

        def bare(images: Tensor = images, labels: Tensor = labels, forward: Callable = forward) -> None:
            for _ in range(size.steps):
                leaf = images.detach().requires_grad_()
                torch.autograd.grad(F.cross_entropy(forward(leaf), labels, reduction="sum"), leaf)

        # so near that none of them is broken
        options = {"eps": 1e-6, "step_size": 1e-7, "steps": size.steps}
        modes = {False: network, True: Repeated(network).eval()} if size.device == "cuda" else {False: network}
        for captured, attacked in modes.items():
            with full_precision(torch.device(size.device)):
                taken = _in_turn({"ours": partial(pgd, attacked, images, labels, **options), "bare": bare}, size)
            yield {
                "what": f"pgd, {size.steps} steps", "precision": "32-true", "captured": captured, "images": count,
                "seconds": taken["ours"], "bare_seconds": taken["bare"], "ratio": taken["ours"] / taken["bare"],
                "target": ATTACK_RATIO, "of": "ratio",
            }  # fmt: skip


def _in_turn(ways: dict[str, Callable[[], object]], size: Size) -> dict[str, float]:
    """Median seconds of each way, after a call that compiles and warms up."""
    times = interleaved({way: partial(finished, call, size.device) for way, call in ways.items()}, Effort(size.rounds))
    return {way: times.median(way) for way in ways}


def main() -> int:
    """Command line: what was measured, and the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--toy", action="store_true", help="on a CPU, at toy size; writes nothing")
    options = parser.parse_args()
    if not options.toy and not torch.cuda.is_available():
        print("benchmarks.gpu_steps: expected a CUDA device, found none; --toy needs none", file=sys.stderr)
        return 2
    size = TOY if options.toy else Size("cuda")
    about = {"device": "cpu" if options.toy else torch.cuda.get_device_name(), "torch": torch.__version__}
    rows = []
    for measured in (trainings, attacks):
        for row in measured(size):
            rows.append(row | {"width": size.width} | about)
            print(f"{row['what']:24} {row['precision']:11} captured {row['captured']!s:6} {row['images']:5} images "
                  f"{row['seconds']:9.3f} s  {row['ratio']:6.2f} x bare", flush=True)  # fmt: skip
            if not options.toy:
                # after each, so that what is killed has lost one
                write_table(home() / "results/bench" / "gpu-steps.csv", pd.DataFrame(rows))
    return 0


if __name__ == "__main__":
    sys.exit(told(main))
