"""Suites about sizes: how time grows, what channels last and torch.compile pay, what the cost model predicts."""

import copy
import shutil
import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import pandas as pd
import torch
from torch import Tensor, nn

from benchmarks.attacking import EPS, STEP, unbreakable
from benchmarks.certifying import scene
from benchmarks.harness import Call, Effort, interleaved, one_thread
from benchmarks.steps import Trainee
from clustr_core import costs
from clustr_core.attacks.gradient import pgd
from clustr_core.certificates.ladder import certified_radius
from clustr_core.certificates.names import HARD_BOUNDS
from clustr_core.models.classifiers import cluster_logits
from clustr_core.models.clusters import fit_clusters
from clustr_core.models.encoders import build_encoder
from clustr_core.training.recipes import Clustr

# the point around which each size is changed alone: embeddings, classes, clusters of each class, dimensions
CENTRE = {"count": 8192, "classes": 20, "per_class": 10, "dim": 256}
SIZES = {
    "N": [{"count": n} for n in (2048, 8192, 32_768)],
    "K": [{"classes": n} for n in (5, 20, 80)],
    "dim": [{"dim": n} for n in (64, 256, 1024)],
}
SIDES = (16, 32, 64)
ENCODERS = (("small-cnn", 32, (1, 28, 28)), ("resnet18", 8, (3, 32, 32)), ("resnet18", 16, (3, 32, 32)),
            ("resnet18", 64, (3, 32, 32)), ("lip-cnn", 64, (3, 32, 32)))  # fmt: skip


def growth(effort: Effort) -> pd.DataFrame:
    """Seconds at several sizes, one changed at a time: columns ``what parameter size seconds``."""
    rows = []
    for parameter, changes in SIZES.items():
        calls: dict[tuple[str, int], Call] = {}
        for change in changes:
            sizes = CENTRE | change
            if effort.quick:
                sizes = {
                    "count": sizes["count"] // 32,
                    "classes": max(2, sizes["classes"] // 10),
                    "per_class": 3,
                    "dim": sizes["dim"] // 16,
                }
            size = sizes["classes"] * sizes["per_class"] if parameter == "K" else sizes[_name(parameter)]
            for what, call in _on_embeddings(**sizes).items():
                calls[what, size] = call
        rows += _rows(calls, parameter, effort)
    calls = {}
    for side in effort.pick(SIDES, (8, 16)):
        trainee = Trainee(replace(Clustr(), dataset="cifar10", encoder="resnet18", width=8), effort.pick(480, 60))
        trainee.images = torch.nn.functional.interpolate(trainee.images.float(), size=(side, side)).byte()
        calls["training step", side] = trainee.train
        model, _, labels = unbreakable(8, effort.pick(32, 2))
        images = torch.rand(len(labels), 3, side, side, generator=torch.Generator().manual_seed(0))
        calls["pgd step", side] = partial(pgd, model, images, labels, eps=EPS, step_size=STEP, steps=1)
    return pd.DataFrame([*rows, *_rows(calls, "side", effort)])


def _name(parameter: str) -> str:
    return {"N": "count", "dim": "dim"}[parameter]


def _on_embeddings(count: int, classes: int, per_class: int, dim: int) -> dict[str, Call]:
    embeddings, _, clusters = scene(count, classes, per_class, dim)
    # as many of each class, wherever they lie
    labels = torch.arange(count) % classes
    return {
        "cluster logits": partial(cluster_logits, embeddings, clusters),
        **{f"certificate {b}": partial(certified_radius, embeddings, clusters, bound=b) for b in HARD_BOUNDS},
        "k-means refresh": partial(fit_clusters, embeddings, labels, per_class=per_class),
    }


def _rows(calls: dict[tuple[str, int], Call], parameter: str, effort: Effort) -> list[dict[str, object]]:
    # k-means apart: scikit-learn's threads spin for a while after it, and would slow whatever is timed next
    apart = {key: call for key, call in calls.items() if key[0] == "k-means refresh"}
    seconds: dict[tuple[str, int], float] = {}
    for group in (apart, {key: call for key, call in calls.items() if key not in apart}):
        if group:
            times = interleaved(
                {f"{what} {size}": call for (what, size), call in group.items()}, replace(effort, rounds=5)
            )
            seconds |= {(what, size): times.median(f"{what} {size}") for what, size in group}
    return [
        {"what": what, "parameter": parameter, "size": size, "seconds": seconds[what, size]}
        for what, size in sorted(seconds)
    ]


def layouts(effort: Effort) -> pd.DataFrame:
    """Channels last, and torch.compile where there is a C++ compiler, over contiguous weights without either.

    Not for training, which keeps the contiguous layout: see `to_channels_last_frozen`.

    Returns:
        columns ``encoder width pass layout ratio``.
    """
    rows = []
    for name, width, shape in ENCODERS[: effort.pick(len(ENCODERS), 1)]:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            made = build_encoder(name, shape, width=effort.pick(width, 4)).eval().requires_grad_(False)
        variants: dict[str, nn.Module | Callable[..., Tensor]] = {
            "contiguous": copy.deepcopy(made).to(memory_format=torch.contiguous_format),
            "channels last": copy.deepcopy(made).to(memory_format=torch.channels_last),
        }
        if name == "resnet18" and width == 16 and shutil.which("g++") and not effort.quick:
            variants["channels last, compiled"] = torch.compile(variants["channels last"], dynamic=False)
        images = torch.rand(effort.pick(32, 2), *shape, generator=torch.Generator().manual_seed(0))
        for kind, call in {"forward": _forward, "input gradient": _gradient}.items():
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                times = interleaved({v: partial(call, m, images) for v, m in variants.items()}, effort)
            rows += [
                {"encoder": name, "width": width, "pass": kind, "layout": v, "ratio": times.ratio(v, "contiguous")}
                for v in variants
                if v != "contiguous"
            ]
    return pd.DataFrame(rows)


def _forward(encoder, images: Tensor) -> None:
    with torch.no_grad():
        encoder(images)


def _gradient(encoder, images: Tensor) -> None:
    leaf = images.clone().requires_grad_()
    torch.autograd.grad(encoder(leaf).square().sum(), leaf)


def predictions(effort: Effort) -> pd.DataFrame:
    """The cost model beside one thread of this machine: one size of each kind of work calibrates it for the others.

    One thread, as each job of the pipeline has: two libraries' threads, which wait for work by spinning, would fight.

    Returns:
        columns ``what setting predicted measured ratio calibrated threads``, in seconds.
    """
    # memory traffic is left out: on a CPU the caches decide
    machine = costs.Machine("this one", 1e11, 1e11)
    rows = []
    for what, points in _works(effort).items():
        with one_thread():
            times = interleaved({setting: call for setting, (_, call) in points.items()}, effort)
        (first, (work, _)), *_ = points.items()
        here = costs.calibrated(machine, work, times.median(first))
        calibration = costs.seconds(work, here)
        for setting, (work, _) in points.items():
            predicted = costs.seconds(work, here)
            ratio = times.ratio(setting, first) * calibration / predicted
            rows.append(
                {"what": what, "setting": setting, "predicted": predicted, "measured": times.median(setting),
                 "ratio": ratio, "calibrated": setting == first, "threads": 1,
                 "within_a_fifth": "yes" if abs(ratio - 1) <= 0.2 else "no"}
            )  # fmt: skip
    return pd.DataFrame(rows)


def _works(effort: Effort) -> dict[str, dict[str, tuple[costs.Work, Call]]]:
    """What is calibrated and predicted: the first point of each kind is the calibration."""
    width = effort.pick(16, 2)
    network = costs.resnet18(width=width)
    model, images, labels = unbreakable(width, effort.pick(64, 4))
    attack = {"eps": EPS, "step_size": STEP}
    found: dict[str, dict[str, tuple[costs.Work, Call]]] = {
        "encoder forward": {}, "input gradients of pgd": {}, "pairwise certificate": {}, "k-means refresh": {},
        "training step": {},
    }  # fmt: skip
    for count in effort.pick((64, 48, 32), (4, 2)):
        part = images[:count]
        found["encoder forward"][f"{count} images"] = (costs.forward(network, count), partial(_forward, model, part))
    for count, steps in effort.pick(((64, 4), (64, 8), (40, 6)), ((4, 2), (2, 2))):
        # the verdicts before and after are forward passes, a third of a gradient each
        work = costs.gradient(network, count * steps)
        work = replace(work, flops=work.flops + 2 * costs.forward(network, count).flops)
        call = partial(pgd, model, images[:count], labels[:count], steps=steps, **attack)
        found["input gradients of pgd"][f"{count} images, {steps} steps"] = (work, call)
    for count, classes, dim in effort.pick(
        ((20_000, 50, 512), (40_000, 50, 512), (20_000, 100, 512)), ((200, 4, 16), (100, 4, 16))
    ):
        embeddings, _, clusters = scene(count, classes, 10, dim)
        work = costs.certificate(count, classes * 10, 10, dim, bound="pairwise")
        call = partial(certified_radius, embeddings, clusters)
        found["pairwise certificate"][f"{count:,} x {classes * 10:,} x {dim}"] = (work, call)
    for count in effort.pick((10_000, 20_000, 15_000), (200, 100)):
        # pure noise and few iterations, so that they do not settle before their end
        noise = torch.randn(count, effort.pick(256, 8), generator=torch.Generator().manual_seed(0))
        call = partial(fit_clusters, noise, torch.arange(count) % 10, per_class=10, max_iter=5)
        work = costs.kmeans(count, 10, noise.shape[1], iterations=5)
        found["k-means refresh"][f"{count:,} x 10 classes x 10 x {noise.shape[1]}"] = (work, call)
    for per_cluster in effort.pick((15, 20, 10), (4, 2)):
        recipe = Clustr(dataset="cifar10", encoder="resnet18", width=width, per_cluster=per_cluster)
        trainee = Trainee(recipe, effort.pick(2400, 60))
        batch = recipe.clusters_per_batch * per_cluster
        work = costs.training(network, batch)
        found["training step"][f"{batch} images"] = (work, trainee.train)
    return found
