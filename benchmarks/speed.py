"""Speed beside the plain alternative, each pair timed in turn in one run, on one core: only ratios are quoted.

.venv/bin/python -m benchmarks.speed
"""

import argparse
import platform
import time
from collections.abc import Callable
from statistics import median

import numpy as np
import pandas as pd
import torch
from PIL import Image
from pyautoattack import AutoAttack
from torch import nn
from torchvision import transforms

from clustr_core import records
from clustr_core.attacks import autoattack, pgd
from clustr_core.clusters import Clusters
from clustr_core.data import random_crop_flip, to_float
from clustr_core.encoders import build_encoder
from clustr_core.sampling import ClusterBatches

TARGETS = {"augmentation": 0.15, "pgd": 1.05, "autoattack": 1.05, "sampler_ms": 0.3}


def paired(ours: Callable[[], object], theirs: Callable[[], object], rounds: int) -> tuple[float, float, float]:
    """Median seconds of both, and the median of the ratio pair by pair, after one warm-up of each."""
    ours()
    theirs()
    seconds = [(_seconds(ours), _seconds(theirs)) for _ in range(rounds)]
    left, right = zip(*seconds, strict=True)
    return median(left), median(right), median(a / b for a, b in seconds)


def augmentation(rounds: int) -> tuple[float, float, float]:
    """One batch of 240 crops and flips of 32 x 32 images: whole tensors against torchvision image by image."""
    images = torch.randint(0, 256, (240, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    pictures = [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in images]
    generator = torch.Generator().manual_seed(0)
    one = transforms.Compose(
        [transforms.RandomCrop(32, padding=4), transforms.RandomHorizontalFlip(), transforms.ToTensor()]
    )
    return paired(
        lambda: to_float(random_crop_flip(images, generator=generator)),
        lambda: torch.stack([torch.as_tensor(one(picture)) for picture in pictures]),
        rounds,
    )


def attack(rounds: int, *, steps: int = 20) -> tuple[float, float, float]:
    """PGD against bare forward + input-gradient backward passes; both exclude the final verdict's forward."""
    encoder = build_encoder("resnet18", (3, 32, 32), width=16).eval()
    head = nn.Linear(encoder.embedding_dim, 10)
    model = nn.Sequential(encoder, head).requires_grad_(False)
    images = torch.rand(64, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    labels = torch.zeros(len(images), dtype=torch.long)
    # a margin that no small step can close: every example stays in the batch for all steps
    head.bias[0] = 1e3

    def bare() -> None:
        for _ in range(steps):
            x = images.clone().requires_grad_()
            torch.autograd.grad(nn.functional.cross_entropy(model(x), labels, reduction="sum"), x)

    def ours() -> None:
        found = pgd(model, images, labels, eps=8 / 255, step_size=2 / 255, steps=steps)
        assert int(found.gradients.sum()) == steps * len(images)

    def verdict() -> None:
        with torch.no_grad():
            model(images)

    ours()
    bare()
    rows = [(_seconds(ours) - _seconds(verdict), _seconds(bare)) for _ in range(rounds)]
    return median(a for a, _ in rows), median(b for _, b in rows), median(a / b for a, b in rows)


def whole_autoattack(rounds: int) -> tuple[float, float, float]:
    """AutoAttack through our adapter against the library's own four parts, one after the other on what is left."""
    encoder = build_encoder("small-cnn", (1, 16, 16), width=8).eval()
    model = nn.Sequential(encoder, nn.Linear(encoder.embedding_dim, 5)).requires_grad_(False)
    images = torch.rand(16, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    labels = model(images).argmax(dim=1)

    def library() -> None:
        with torch.random.fork_rng(devices=[]):
            theirs = AutoAttack(model, norm="Linf", eps=0.01, seed=0, version="standard", device=images.device)
            theirs.apgd.loss, theirs.fab.targeted, theirs.fab.n_restarts = "ce", True, 1
            theirs.apgd_targeted.n_target_classes = theirs.fab.n_target_classes = 4
            left, goals = images, labels
            for part in (theirs.apgd, theirs.apgd_targeted, theirs.fab, theirs.square):
                robust = model(part.perturb(left.clone(), goals)).argmax(dim=1) == goals
                left, goals = left[robust], goals[robust]

    return paired(lambda: autoattack(model, images, labels, norm="linf", eps=0.01), library, rounds)


def sampler(rounds: int) -> float:
    """Median seconds of one draw and update at 1,000 clusters and 50,000 examples."""
    random = np.random.default_rng(0)
    centroids = torch.from_numpy(random.normal(size=(1000, 64)))
    clusters = Clusters(centroids, torch.arange(100).repeat_interleave(10), torch.ones(1000))
    batches = ClusterBatches(clusters, torch.from_numpy(random.integers(0, 1000, 50_000)))
    losses = torch.from_numpy(random.random(240))

    def epoch() -> None:
        for batch in batches:
            batches.update(batch.indices, losses[: len(batch.indices)])

    epoch()
    return median(_seconds(epoch) / len(batches) for _ in range(rounds))


def main() -> None:
    """Print every ratio beside its target, and the environment."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    rounds = parser.parse_args().rounds
    torch.set_num_threads(1)
    rows = []
    for name, measure in (("augmentation", augmentation), ("pgd", attack), ("autoattack", whole_autoattack)):
        ours, theirs, ratio = measure(rounds)
        print(f"{name}: {ours * 1e3:.2f} ms against {theirs * 1e3:.2f} ms, ratio {ratio:.3f} (<= {TARGETS[name]})")
        rows.append({"name": f"{name} ratio", "measured": ratio, "target": TARGETS[name]})
    step = sampler(rounds) * 1e3
    print(f"sampler: {step:.3f} ms a step (<= {TARGETS['sampler_ms']})")
    rows.append({"name": "sampler ms a step", "measured": step, "target": TARGETS["sampler_ms"]})
    about = {"rounds": rounds, "threads": 1, "machine": platform.machine(), "torch": torch.__version__}
    records.write_table(records.home() / "results" / "speed.csv", pd.DataFrame(rows).assign(**about))


def _seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
