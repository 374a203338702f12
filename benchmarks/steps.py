"""Suites about training: augmentation, the sampler, embeddings, where a step's time goes, what a method costs."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial

import numpy as np
import pandas as pd
import torch
from PIL import Image
from torch import Tensor

from benchmarks.harness import Call, Effort, Row, Times, interleaved, seconds
from clustr_core import data
from clustr_core.certificates.ladder import certified_radius
from clustr_core.certificates.linear import margin_radius
from clustr_core.certificates.smoothing import certify_smoothed
from clustr_core.data import random_crop_flip, to_float
from clustr_core.measuring.profile import load_profile
from clustr_core.models.classifiers import ClusterClassifier
from clustr_core.models.clusters import Clusters
from clustr_core.models.embed import embed_all
from clustr_core.models.encoders import build_encoder
from clustr_core.training.checks import images_in_a_batch
from clustr_core.training.loop import replays, update
from clustr_core.training.objectives import objective
from clustr_core.training.recipes import Recipe, Smoothing
from clustr_core.training.refresh import clusters_and_sampler
from clustr_core.training.sampling import ClusterBatches
from clustr_core.training.state import new_state
from clustr_core.training.step import Step, augmented

PARTS = ("sampling", "augmentation", "forward", "loss", "backward", "optimiser", "refresh")
SHOWN = ("ce", "clustr", "clustr-qtrades", "clustr-cert")


def augmentation(effort: Effort) -> list[Row]:
    """One batch of crops and flips: whole tensors beside torchvision image by image."""
    from torchvision import transforms  # two seconds

    count = effort.pick(240, 6)
    images = torch.randint(0, 256, (count, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    pictures = [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in images]
    generator = torch.Generator().manual_seed(0)
    one = transforms.Compose(
        [transforms.RandomCrop(32, padding=4), transforms.RandomHorizontalFlip(), transforms.ToTensor()]
    )
    times = interleaved(
        {
            "ours": lambda: to_float(random_crop_flip(images, generator=generator)),
            "torchvision": lambda: torch.stack([torch.as_tensor(one(picture)) for picture in pictures]),
        },
        effort,
    )
    ratio = times.ratio("ours", "torchvision")
    compared = "random_crop_flip of a batch / torchvision's transforms image by image"
    setting = f"{count} images of 3 x 32 x 32"
    return [Row("augmentation", "augmentation", ratio, "ratio", compared, setting, 0.15, times.rounds)]


def sampler(effort: Effort) -> list[Row]:
    """One draw of a batch of clusters and the update of its losses."""
    count, examples = effort.pick((1000, 50_000), (20, 400))
    random = np.random.default_rng(0)
    centroids = torch.from_numpy(random.normal(size=(count, 64)))
    clusters = Clusters(
        centroids, torch.arange(count // 10).repeat_interleave(10), torch.ones(count, dtype=torch.float64)
    )
    batches = ClusterBatches(clusters, torch.from_numpy(random.integers(0, count, examples)))
    losses = torch.from_numpy(random.random(240))

    def epoch() -> None:
        for batch in batches:
            batches.update(batch.indices, losses[: len(batch.indices)])

    times = interleaved({"epoch": epoch}, effort)
    setting = f"{count:,} clusters, {examples:,} examples, batches of 12 x 20"
    step = 1e3 * times.median("epoch") / len(batches)
    return [Row("sampler", "sampler", step, "ms", "one draw and update", setting, 0.3, times.rounds)]


def embeddings(effort: Effort) -> list[Row]:
    """The embeddings of a data set beside the forward passes alone."""
    width, count = effort.pick((16, 1024), (2, 12))
    encoder = build_encoder("resnet18", (3, 32, 32), width=width).eval()
    images = torch.randint(0, 256, (count, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    ready = [to_float(part) for part in images.split(512)]

    def forward() -> None:
        with torch.no_grad():
            for part in ready:
                encoder(part)

    times = interleaved({"ours": partial(embed_all, encoder, images), "forward": forward}, effort)
    setting = f"ResNet-18 of width {width}, {count:,} images of 3 x 32 x 32, batches of 512"
    ratio, compared = times.ratio("ours", "forward"), "embed_all, from bytes / forward passes, of numbers at hand"
    return [Row("embeddings", "embeddings of a data set", ratio, "ratio", compared, setting, 1.02, times.rounds)]


def drawn_dataset(recipe: Recipe, count: int) -> data.Dataset:
    """Random images of a recipe's shape and name: what a step costs does not depend on what they show."""
    generator = torch.Generator().manual_seed(0)
    shape = (1, 8, 8) if recipe.dataset == "digits" else (1, 28, 28) if recipe.dataset == "mnist5k" else (3, 32, 32)
    images = torch.randint(0, 256, (count, *shape), dtype=torch.uint8, generator=generator)
    labels = torch.arange(count) % 10
    return data.Dataset(recipe.dataset, images, labels, images[:20], labels[:20], tuple("0123456789"))


class Trainee:
    """A recipe about to train: what `loop.fit` has in hand before its first epoch."""

    def __init__(self, recipe: Recipe, count: int) -> None:
        self.recipe = replace(recipe, warm_start=None)
        drawn = drawn_dataset(recipe, count)
        self.images, self.labels = drawn.train_images, drawn.train_labels
        self.state = new_state(self.recipe, drawn, self.images, self.labels, None)
        self.clusters, self.sampler = self.refresh()
        self.state.network.train()

    def refresh(self) -> tuple:
        """Embeddings and k-means, where the method has clusters of its own."""
        return clusters_and_sampler(
            self.recipe, self.state.network.encoder, self.images, self.labels, self.state.generator
        )

    @property
    def batch(self) -> int:
        """Images of a step."""
        return images_in_a_batch(self.recipe)

    def step(self) -> Step:
        """One batch, augmented."""
        batch = next(iter(self.sampler))
        pixels = to_float(augmented(self.recipe, self.images[batch.indices], self.state.generator))
        labels = self.labels[batch.indices]
        return Step(self.state.network, pixels, labels, self.state.generator, batch.assignments, self.clusters)

    def train(self) -> None:
        """One batch: an update, or several under free training."""
        step = self.step()
        for moved in replays(self.recipe, self.state, step.images):
            update(self.recipe, self.state, replace(step, images=moved))


def step_parts(effort: Effort, profile: str = "cpu-cifar10") -> pd.DataFrame:
    """Where a training step's time goes: one row for each method shown and part, columns ``method part share
    milliseconds``; the refresh of the clusters is shared out over the steps of an epoch of 50,000 images."""
    recipes, count = load_profile(profile).recipes, effort.pick(2400, 120)
    rows = []
    for method in SHOWN:
        trainee = Trainee(recipes[method], count)
        spent: dict[str, list[float]] = {part: [] for part in PARTS}
        for n in range(effort.pick(16, 2)):
            one = _one_step(trainee)
            if n:
                for part, time in one.items():
                    spent[part].append(time)
        refreshed = [seconds(trainee.refresh) for _ in range(effort.pick(3, 1))] if trainee.clusters else [0.0]
        # both the embeddings and k-means grow with the images
        spent["refresh"] = [time * trainee.batch / count for time in refreshed]
        milliseconds = {part: 1e3 * float(np.median(times)) for part, times in spent.items()}
        whole = sum(milliseconds.values())
        rows += [{"method": method, "part": p, "share": t / whole, "milliseconds": t} for p, t in milliseconds.items()]
    return pd.DataFrame(rows)


def _one_step(trainee: Trainee) -> dict[str, float]:
    """Seconds of the parts of one step; what an objective does beside the encoder's forward passes counts as loss."""
    spent: dict[str, float] = {}
    made: list = []
    state = trainee.state

    def timed(part: str, call) -> None:
        spent[part] = seconds(lambda: made.append(call()))

    timed("sampling", lambda: next(iter(trainee.sampler)))
    batch = made[-1]
    timed(
        "augmentation",
        lambda: to_float(augmented(trainee.recipe, trainee.images[batch.indices], state.generator)),
    )
    labels = trainee.labels[batch.indices]
    step = Step(state.network, made[-1], labels, state.generator, batch.assignments, trainee.clusters)
    # once unmeasured: the first pass of a step would pay for what the last one left in the caches
    step.embed(step.images)
    with _passes(state.network.encoder) as passes:
        timed("loss", lambda: objective(trainee.recipe, step).loss.mean())
    spent["forward"] = sum(passes)
    spent["loss"] -= spent["forward"]
    loss = made[-1]
    state.optimiser.zero_grad(set_to_none=True)
    timed("backward", lambda: loss.backward())
    timed("optimiser", state.optimiser.step)
    return spent


@contextmanager
def _passes(encoder: torch.nn.Module) -> Iterator[list[float]]:
    """The seconds of each forward pass of the encoder inside the block."""
    found: list[float] = []
    starts: list[float] = []
    hooks = [
        encoder.register_forward_pre_hook(lambda *_: starts.append(time.perf_counter())),
        encoder.register_forward_hook(lambda *_: found.append(time.perf_counter() - starts.pop())),
    ]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


def methods_cost(effort: Effort) -> pd.DataFrame:
    """What each method of profile cpu-cifar10 costs beside cross-entropy; of profile smoke in a quick run.

    Returns:
        one row a method: ``step_ratio``, one training step over one of ce, for each image of the batch; ``steps`` in an
        epoch of 50,000 images and ``epochs``; ``training_ratio``, the whole training with its refreshes, and with that
        which it starts from, over ce's; ``forward_ratio``, one image through its model over one through ce's;
        ``certificate_ratio``, one certified image over one forward pass of the same encoder, NaN for an ordinary one:
        "exact" for clusters, the margin of a linear head, 1,000 samples (and 100 to select) for smoothing.
    """
    recipes, images = load_profile(effort.pick("cpu-cifar10", "smoke")).recipes, 50_000
    count = effort.pick(1200, 120)
    trainees = {method: Trainee(recipe, count) for method, recipe in recipes.items()}
    trained = interleaved({method: trainee.train for method, trainee in trainees.items()}, effort)
    refreshed = interleaved(
        {method: trainee.refresh for method, trainee in trainees.items()}, replace(effort, rounds=3)
    )
    pixels = {name: to_float(each.images[: effort.pick(128, 8)]) for name, each in trainees.items()}
    for trainee in trainees.values():
        trainee.state.network.eval()
    forward = interleaved(
        {method: partial(_forward, trainee, pixels[method]) for method, trainee in trainees.items()}, effort
    )
    cost = {}
    rows = []
    for method, trainee in trainees.items():
        recipe, batch = trainee.recipe, trainee.batch
        each_image = trained.median(method) / batch + (refreshed.median(method) / count if trainee.clusters else 0.0)
        start = recipes[method].warm_start
        cost[method] = each_image * recipe.epochs + (cost[start.method] if start else 0.0)
        rows.append(
            {
                "method": method,
                "step_ratio": trained.median(method) / batch / (trained.median("ce") / recipes["ce"].batch_size),
                "steps": -(-images // batch),
                "epochs": recipe.epochs,
                "training_ratio": cost[method] / cost["ce"],
                "forward_ratio": forward.ratio(method, "ce"),
                "certificate_ratio": _certificate_ratio(trainee, pixels[method], effort),
            }
        )
    return pd.DataFrame(rows)


def _forward(trainee: Trainee, images: Tensor) -> None:
    with torch.no_grad():
        trainee.state.network(images)


def _certificate_ratio(trainee: Trainee, images: Tensor, effort: Effort) -> float:
    certified, count = _certified(trainee, images, samples=effort.pick(1000, 20))
    if certified is None:
        return float("nan")

    def forward() -> None:
        with torch.no_grad():
            trainee.state.network.embed(images)

    times: Times = interleaved({"certified": certified, "forward": forward}, effort)
    return times.ratio("certified", "forward") * len(images) / count


def _certified(trainee: Trainee, images: Tensor, *, samples: int) -> tuple[Call | None, int]:
    """What certifies images as the method promises, and how many of them; None where it promises nothing."""
    recipe, network = trainee.recipe, trainee.state.network
    if isinstance(recipe, Smoothing):
        return partial(certify_smoothed, network, images[:1], noise=recipe.noise, samples=samples), 1
    if recipe.guarantee != "lipschitz":
        return None, 0
    clusters = network.clusters if isinstance(network, ClusterClassifier) else trainee.clusters

    def radii() -> None:
        with torch.no_grad():
            embeddings = network.embed(images)
            if clusters is None:
                margin_radius(embeddings, network.linear)
            else:
                certified_radius(embeddings, clusters, bound="exact")

    return radii, len(images)
