"""What one certified image costs, method beside method in one run, on one core: only ratios are quoted.

.venv/bin/python -m benchmarks.certification [--profile NAME]

Randomised smoothing is run with as many samples as asked for; its row of 100,000 is that one by proportion of the
forward passes. Weights are random, which changes no cost but one: how often "exact" has to solve for a rival depends on
where the embeddings lie, so the images are noisy copies of as many patterns as there are clusters.
"""

import argparse
import platform
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.utils.flop_counter import FlopCounterMode

from clustr_core.certificates.ladder import certified_radius
from clustr_core.certificates.linear import margin_radius
from clustr_core.certificates.names import HARD_BOUNDS, Bound
from clustr_core.certificates.prototypes import pixel_prototypes
from clustr_core.certificates.smoothing import certify_smoothed
from clustr_core.measuring.profile import load_profile
from clustr_core.models.classifiers import ClusterClassifier, LinearClassifier
from clustr_core.models.clusters import fit_clusters
from clustr_core.models.encoders import build_encoder
from clustr_core.storage.files import home
from clustr_core.storage.tables import write_table
from tools.telling import count, told

SHAPE = (3, 32, 32)
CLASSES = 10
SELECTION = 100
MANY_SAMPLES = 100_000
NOISE = 0.25
# triangle costs what nearest costs
BOUNDS = HARD_BOUNDS[1:]
# (2 flops a multiply-add) of two calls that PyTorch's counter has no formula for
FLOPS = {
    torch.ops.aten._cdist_forward: lambda a, b, *_, **__: 2 * a[-2] * b[-2] * a[-1],
    torch.ops.aten._linalg_solve_ex: lambda a, b, *_, **__: 2 * a[:-2].numel() * (a[-1] ** 3 / 3 + a[-1] ** 2),
}


@dataclass(frozen=True)
class Method:
    """A way to certify a batch of images, and the network whose forward passes it spends, if any."""

    name: str
    certify: Callable[[], object]
    images: int
    network: nn.Module | None = None


def cost_table(
    *,
    encoder: str = "lip-cnn",
    width: int = 64,
    per_class: int = 2,
    base_width: int = 8,
    images: int = 64,
    samples: int = 1000,
    rounds: int = 7,
) -> pd.DataFrame:
    """One row for each method, and first the encoder alone; all are timed in turn in each round.

    Args:
        encoder, width, per_class: of the cluster classifier, whose encoder the linear head shares; the prototypes on
            raw pixels are as many.
        base_width: of the ResNet-18 that is smoothed.
        images: in one batch; smoothing certifies one image.
        samples: with which smoothing is run.
    Returns:
        columns ``method forwards multiply_adds seconds_ratio``, each for one image: forward passes of the network;
        multiply-adds of convolutions, matrix products, distances and linear systems, and of nothing else; median over
        the rounds of the seconds over those of the encoder's forward pass in the same round. What a batch shares, such
        as the distances between the centroids, is divided by its images.
    """
    batch, _ = _patterns(images, per_class)
    train, train_labels = _patterns(8 * CLASSES * per_class, per_class)
    network = build_encoder(encoder, SHAPE, width=width).eval()
    with torch.no_grad():
        clusters, _ = fit_clusters(network(train), train_labels, per_class=per_class)
    pixels = pixel_prototypes((train * 255).byte(), train_labels, per_class=per_class)
    methods = [
        Method("encoder", lambda: _forward(network, batch), images, network),
        *_of_clusters("clusters", ClusterClassifier(network, clusters, rule="nearest"), batch, network),
        _of_linear_head(network, network.embedding_dim, batch),
        _of_smoothing(base_width, batch[:1], samples),
        *_of_clusters("pixels", pixels, batch, None),
    ]
    # orthogonal weights are made of free ones, as training needs it; a trained network has them once and for all
    with parametrize.cached():
        _forward(network, batch)
        spent = [_spent(method) for method in methods]
        ratios = _seconds_ratios(methods, rounds)
    table = pd.DataFrame(spent, columns=["forwards", "multiply_adds"]).assign(seconds_ratio=ratios)
    table.insert(0, "method", [method.name for method in methods])
    return _with_many_samples(table, samples)


def _patterns(count: int, per_class: int) -> tuple[Tensor, Tensor]:
    """Noisy copies of one random pattern for each cluster, in turn, and their classes; the same patterns each time."""
    generator = torch.Generator().manual_seed(0)
    patterns = torch.rand(CLASSES * per_class, *SHAPE, generator=generator)
    which = torch.arange(count) % len(patterns)
    noise = torch.randn(count, *SHAPE, generator=generator)
    return (patterns[which] + 0.1 * noise).clamp(0, 1), which % CLASSES


def _forward(network: nn.Module, images: Tensor) -> Tensor:
    with torch.no_grad():
        return network(images)


def _of_clusters(name: str, model: ClusterClassifier, batch: Tensor, network: nn.Module | None) -> list[Method]:
    def radius(bound: Bound) -> Tensor:
        # the encoder's constants are computed once for a network, not for an image
        return certified_radius(_forward(model.encoder, batch), model.clusters, bound=bound)

    return [Method(f"{name}-{bound}", partial(radius, bound), len(batch), network) for bound in BOUNDS]


def _of_linear_head(network: nn.Module, dim: int, batch: Tensor) -> Method:
    head = LinearClassifier(network, dim, CLASSES).requires_grad_(False)

    def margins() -> Tensor:
        embeddings = _forward(network, batch)
        return margin_radius(embeddings, head.linear)

    return Method("linear-margin", margins, len(batch), network)


def _of_smoothing(width: int, batch: Tensor, samples: int) -> Method:
    encoder = build_encoder("resnet18", SHAPE, width=width)
    model = LinearClassifier(encoder, encoder.embedding_dim, CLASSES).eval()
    options = {"noise": NOISE, "samples": samples, "selection_samples": SELECTION}
    return Method(f"smoothing-{samples}", lambda: certify_smoothed(model, batch, **options), len(batch), model)


def _spent(method: Method) -> tuple[float, float]:
    """Forward passes and multiply-adds for one image, counted while the method runs once."""
    rows: list[int] = []
    hook = method.network and method.network.register_forward_hook(lambda _, inputs, __: rows.append(len(inputs[0])))
    with FlopCounterMode(display=False, custom_mapping=FLOPS) as counter:
        method.certify()
    if hook:
        hook.remove()
    return sum(rows) / method.images, counter.get_total_flops() / 2 / method.images


def _seconds_ratios(methods: Sequence[Method], rounds: int) -> list[float]:
    """Seconds of one image over those of the first method in the same round, median over the rounds."""
    seconds = [[_seconds(method.certify) / method.images for method in methods] for _ in range(rounds)]
    return [median(row[n] / row[0] for row in seconds) for n in range(len(methods))]


def _with_many_samples(table: pd.DataFrame, samples: int) -> pd.DataFrame:
    """After the smoothing that was run, the same with `MANY_SAMPLES`, by proportion of the forward passes."""
    position = table["method"].tolist().index(f"smoothing-{samples}")
    many = table.iloc[[position]].assign(method=f"smoothing-{MANY_SAMPLES}-by-proportion")
    numbers = ["forwards", "multiply_adds", "seconds_ratio"]
    many[numbers] *= (SELECTION + MANY_SAMPLES) / (SELECTION + samples)
    return pd.concat([table.iloc[: position + 1], many, table.iloc[position + 1 :]], ignore_index=True)


def _seconds(call: Callable[[], object]) -> float:
    # once untimed: else each would pay for the caches as the method before it left them
    call()
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def setting_of(profile: str) -> dict[str, Any]:
    """Encoder, width and clusters of each class of a profile's first recipe that certifies clusters.

    Raises:
        ValueError: if it has none.
    """
    for recipe in load_profile(profile).recipes.values():
        if recipe.clustered and recipe.guarantee == "lipschitz":
            return {"encoder": recipe.encoder, "width": recipe.width, "per_class": recipe.per_class}
    raise ValueError(f"profile {profile}: expected a method with clusters and a Lipschitz guarantee, got none")


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the table, and write it with the environment to results/bench/certification-cost.csv."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--profile", help="take encoder, width and clusters of each class from its recipes")
    parser.add_argument("--images", type=count, default=64)
    parser.add_argument("--samples", type=count, default=1000)
    parser.add_argument("--rounds", type=count, default=7)
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    setting = setting_of(given.profile) if given.profile else {"encoder": "lip-cnn", "width": 64, "per_class": 2}
    setting |= {"images": given.images, "samples": given.samples, "rounds": given.rounds}
    table = cost_table(**setting)
    print(table.to_string(index=False))
    about = {**setting, "threads": 1, "machine": platform.machine(), "torch": torch.__version__}
    write_table(home() / "results/bench" / "certification-cost.csv", table.assign(**about))


if __name__ == "__main__":
    sys.exit(told(main))
