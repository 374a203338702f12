"""The cost model: arithmetic operations, bytes and seconds of training, refresh, attack and certification.

Pure arithmetic. A multiply-add counts two; what is counted are the leading terms, convolutions and matrix products in
``flops`` (to a few per cent; in float64 twice), elementwise work in ``operations`` (to a small factor). A machine turns
them into seconds by what it can do at best, and by the share of that which a measurement of one size has shown it to
reach.
"""

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

import numpy as np
import pandas as pd
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from clustr_core.certificates.names import Bound
from clustr_core.certificates.soft import BISECTIONS, REFINEMENTS
from clustr_core.measuring.study import method_name
from clustr_core.training.recipes import (
    AdversarialTraining,
    Clustr,
    ClustrQTrades,
    FreeAdversarialTraining,
    FreeClustr,
    Recipe,
    Trades,
    epochs_in_words,
)

Kind = Literal["forward", "gradient", "training", "distances", "kmeans", "certificate"]
FLOAT_BYTES = 4
# activations touched by one layer in a forward pass: its output written, read and written by what follows it
# (normalisation and ReLU in one), and read by the next layer
PASSES_OVER_ACTIVATIONS = 4
# elementwise operations for each pair of an embedding and a cluster: difference, quotient, mask, comparison, ...
_OPERATIONS = 6
# products of weights with Gram matrices, each 2 flops for an embedding, a cluster and an own cluster: one for weights
# that all rival classes share, two for their own, four for the point where an attack is expected
_SOFT_PRODUCTS: dict[str, Callable[[int], int]] = {
    "soft-global": lambda _: 0,
    "soft-local": lambda _: 1,
    "soft-lse": lambda _: 1,
    "soft-dual": lambda per_class: 1 + per_class + 2 * (1 + REFINEMENTS) + 4 * REFINEMENTS,
}


@dataclass(frozen=True)
class Network:
    """An encoder as the cost model sees it; all of one image, but for ``parameters``.

    Args:
        dim: of the embedding.
        forward_flops: of convolutions and matrix products in a forward pass.
        first_flops: of the first layer alone, whose input needs no gradient in training.
        activations: numbers that the layers put out.
    """

    name: str
    dim: int
    forward_flops: float
    first_flops: float
    parameters: int
    activations: int


@dataclass(frozen=True)
class Work:
    """What a computation asks for: ``flops`` in matrix products, elementwise ``operations``, ``bytes`` moved."""

    kind: Kind
    flops: float
    operations: float = 0.0
    bytes: float = 0.0

    def times(self, count: float) -> "Work":
        """The same, so many times."""
        return replace(self, flops=count * self.flops, operations=count * self.operations, bytes=count * self.bytes)


@dataclass(frozen=True)
class Efficiency:
    """The share of a machine's peak that each kind of work reaches, in (0, 1] for an honest peak."""

    forward: float = 1.0
    gradient: float = 1.0
    training: float = 1.0
    distances: float = 1.0
    kmeans: float = 1.0
    certificate: float = 1.0


@dataclass(frozen=True)
class Machine:
    """Peak numbers of one device, and how many of them work side by side.

    Args:
        matrix_flops: of a network's matrix products, a second.
        operations: elementwise and of products in float32, a second.
        bandwidth: bytes a second between a device and its memory; infinite where only arithmetic is modelled.
        link: bytes a second that a device can send to the others.
        efficiency: the share of the peak that is reached.
        source: where the peak numbers are printed.
    Raises:
        ValueError: if a number is not positive.
    """

    name: str
    matrix_flops: float
    operations: float
    bandwidth: float = math.inf
    link: float = math.inf
    devices: int = 1
    efficiency: Efficiency = Efficiency()
    source: str = ""

    def __post_init__(self) -> None:
        """Check the numbers."""
        for name in ("matrix_flops", "operations", "bandwidth", "link", "devices"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}: expected a positive number, got {getattr(self, name)}")


# dense, in TF32 for matrix products and FP32 for the rest, links in one direction: numbers of NVIDIA's data sheets as
# G. Lockwood's notes (glennklockwood.com/garden/processors) print them, which cite the sheets; not measured here
A100 = Machine("A100 80 GB SXM", 156e12, 19.5e12, 2.039e12, 300e9, source="glennklockwood.com/garden/processors/A100")
H100 = Machine("H100 80 GB SXM", 494.7e12, 66.9e12, 3.35e12, 450e9, source="glennklockwood.com/garden/processors/h100")


@dataclass(frozen=True)
class Tariff:
    """What an hour of a device costs; its host, idle time and cooling are not counted.

    Args:
        per_hour: money an hour.
        watts: what the device draws.
    Raises:
        ValueError: if a number is negative or not finite.
    """

    per_hour: float
    watts: float

    def __post_init__(self) -> None:
        """Check the numbers."""
        for name in ("per_hour", "watts"):
            if not 0 <= (value := getattr(self, name)) < math.inf:
                raise ValueError(f"{name}: expected a finite number that is not negative, got {value}")

    def money(self, seconds: float) -> float:
        """Of so many seconds."""
        return self.per_hour * seconds / 3600

    def kilowatt_hours(self, seconds: float) -> float:
        """Of so many seconds."""
        return self.watts * seconds / 3.6e6


def seconds(work: Work, machine: Machine) -> float:
    """max(arithmetic / (share reached x peak), bytes / bandwidth), shared out evenly over the devices.

    Source: the roofline of Williams et al. 2009, matrix products and elementwise work one after the other.
    """
    # networks may use what tensor cores offer; clusters and certificates are computed in the full float32
    products = machine.matrix_flops if work.kind in ("forward", "gradient", "training") else machine.operations
    arithmetic = work.flops / products + work.operations / machine.operations
    reached = getattr(machine.efficiency, work.kind)
    return max(arithmetic / reached, work.bytes / machine.bandwidth) / machine.devices


def calibrated(machine: Machine, work: Work, measured: float) -> Machine:
    """The machine with the share of its peak that this work, which took ``measured`` seconds, has reached.

    Raises:
        ValueError: if the time is not positive, or shorter than the memory traffic alone allows.
    """
    if not measured > 0:
        raise ValueError(f"measured: expected a positive number of seconds, got {measured}")
    ideal = replace(machine, efficiency=Efficiency())
    if work.bytes / machine.bandwidth / machine.devices > measured:
        raise ValueError(
            f"measured: expected more than the traffic of {work.bytes:.4g} bytes takes, got {measured:.4g} s"
        )
    share = seconds(replace(work, bytes=0.0), ideal) / measured
    return replace(machine, efficiency=replace(machine.efficiency, **{work.kind: share}))


def growth_slope(sizes: Sequence[float], times: Sequence[float]) -> float:
    """The slope of log time against log size by least squares: 1 is linear growth, 2 quadratic.

    Raises:
        ValueError: for fewer than two sizes, or a number that is not positive.
    """
    x, y = np.asarray(sizes, dtype=float), np.asarray(times, dtype=float)
    if len(set(x.tolist())) < 2 or x.shape != y.shape or not (x > 0).all() or not (y > 0).all():
        raise ValueError(f"sizes, times: expected two or more positive pairs, got {list(sizes)} and {list(times)}")
    return float(np.polyfit(np.log(x), np.log(y), 1)[0])


def slopes_table(growth: pd.DataFrame) -> pd.DataFrame:
    """`growth_slope` of each kind of work against each size that was changed.

    Args:
        growth: columns ``what parameter size seconds``, as `make bench` writes them.
    Returns:
        a row each kind of work, a column each parameter, two decimals.
    """
    slopes = [
        (*keys, round(growth_slope(rows["size"].tolist(), rows["seconds"].tolist()), 2))  # pyright: ignore
        for keys, rows in growth.groupby(["what", "parameter"], sort=False)
    ]
    table = pd.DataFrame(slopes, columns=["what", "grows with", "slope"])
    return table.pivot(index="what", columns="grows with", values="slope").rename_axis(None, axis=1).reset_index()


# --- networks ---


def resnet18(*, width: int = 64, side: int = 32, channels: int = 3) -> Network:
    """`encoders.ResNet18` by formula: a 3x3 stem, 4 stages of 2 blocks of two 3x3 convolutions; 8 width dimensions."""
    layers = [_Convolution(channels, width, 3, side)]
    inputs = width
    for outputs, stride in ((width, 1), (2 * width, 2), (4 * width, 2), (8 * width, 2)):
        side = -(-side // stride)
        layers += [_Convolution(inputs, outputs, 3, side), *[_Convolution(outputs, outputs, 3, side)] * 3]
        layers += [_Convolution(inputs, outputs, 1, side)] if inputs != outputs else []
        inputs = outputs
    return _network(f"ResNet-18, width {width}", layers, inputs)


def resnet50(*, side: int = 224) -> Network:
    """torchvision's ResNet-50 without its head, by formula: 3 + 4 + 6 + 3 bottlenecks of three; 2,048 dimensions."""
    side = -(-side // 2)
    layers = [_Convolution(3, 64, 7, side)]
    side = -(-side // 2)
    inputs = 64
    for blocks, inner, stride in ((3, 64, 1), (4, 128, 2), (6, 256, 2), (3, 512, 2)):
        for block in range(blocks):
            before, side = side, -(-side // stride) if block == 0 else side
            layers += [_Convolution(inputs, inner, 1, before), _Convolution(inner, inner, 3, side)]
            layers += [_Convolution(inner, 4 * inner, 1, side)]
            layers += [_Convolution(inputs, 4 * inner, 1, side)] if block == 0 else []
            inputs = 4 * inner
    return _network("ResNet-50", layers, inputs)


@dataclass(frozen=True)
class _Convolution:
    """A square convolution without bias, followed by a normalisation with two numbers a channel."""

    inputs: int
    outputs: int
    kernel: int
    side: int

    @property
    def weights(self) -> int:
        return self.inputs * self.outputs * self.kernel**2


def _network(name: str, layers: Sequence[_Convolution], dim: int) -> Network:
    flops = [2.0 * layer.weights * layer.side**2 for layer in layers]
    parameters = sum(layer.weights + 2 * layer.outputs for layer in layers)
    return Network(name, dim, sum(flops), flops[0], parameters, sum(layer.outputs * layer.side**2 for layer in layers))


def counted(name: str, encoder: nn.Module, image_shape: tuple[int, int, int]) -> Network:
    """Any encoder, by counting what a copy of it does with two images more: what a whole batch shares, such as making
    1-Lipschitz weights of free ones, is left out.

    ``activations`` are those of the modules that have a weight and do not normalise.
    """
    encoder = copy.deepcopy(encoder).eval()
    sizes: list[int] = []
    for part in encoder.modules():
        if hasattr(part, "weight") and not isinstance(part, nn.BatchNorm2d):
            part.register_forward_hook(lambda _, __, output: sizes.append(output.numel()))

    def flops(images: int, *, backward: bool, to_image: bool = False) -> int:
        batch = torch.zeros(images, *image_shape, requires_grad=to_image)
        with FlopCounterMode(display=False) as counter:
            embeddings = encoder(batch)
            if backward:
                embeddings.sum().backward()
        return counter.get_total_flops()

    def each(**what: bool) -> float:
        return (flops(4, **what) - flops(2, **what)) / 2

    with torch.no_grad():
        dim = encoder(torch.zeros(1, *image_shape)).shape[1]
    activations = sum(sizes)
    first = each(backward=True, to_image=True) - each(backward=True)
    parameters = sum(parameter.numel() for parameter in encoder.parameters())
    return Network(name, dim, each(backward=False), first, parameters, activations)


# --- what is done with them ---


def forward(network: Network, images: float) -> Work:
    """Forward passes without a graph."""
    return Work("forward", images * network.forward_flops, bytes=images * _traffic(network))


def gradient(network: Network, images: float) -> Work:
    """Input gradients, as an attack takes them: forward, and backward to the image but not to the weights."""
    return Work("gradient", 2 * images * network.forward_flops, bytes=3 * images * _traffic(network))


def training(network: Network, images: float) -> Work:
    """Forward, and backward to the weights: three times a forward pass, less the first layer's input gradient."""
    flops = images * (3 * network.forward_flops - network.first_flops)
    return Work("training", flops, bytes=3 * images * _traffic(network))


def _traffic(network: Network) -> float:
    return FLOAT_BYTES * PASSES_OVER_ACTIVATIONS * network.activations


@dataclass(frozen=True)
class Passes:
    """What one training example costs in passes: ``clean`` forward passes, input ``gradients``, and ``updates``, the
    forward passes that the weights' gradients go back through; ``on_image``: down to the image as well."""

    updates: int
    gradients: int = 0
    clean: int = 0
    on_image: bool = False


def passes(recipe: Recipe) -> Passes:
    """The passes of an example in one epoch of a recipe, its refresh of the clusters apart."""
    if isinstance(recipe, Trades):
        return Passes(2, gradients=recipe.steps, clean=1)
    if isinstance(recipe, AdversarialTraining):
        return Passes(1, gradients=recipe.steps)
    if isinstance(recipe, FreeAdversarialTraining | FreeClustr):
        return Passes(recipe.replays, on_image=True)
    if isinstance(recipe, ClustrQTrades):
        return Passes(2, gradients=1)
    return Passes(1)


def epoch_flops(recipe: Recipe, network: Network) -> float:
    """FLOPs of one training example in one epoch: its passes, and for cluster methods one more for the refresh."""
    each = passes(recipe)
    backward = 3 * network.forward_flops - (0 if each.on_image else network.first_flops)
    refresh = network.forward_flops if isinstance(recipe, Clustr) else 0
    clean = each.clean * network.forward_flops
    return each.updates * backward + gradient(network, each.gradients).flops + clean + refresh


def distances(points: float, clusters: int, dim: int, *, products: int = 1) -> Work:
    """Squared distances of all points to all clusters as matrix products.

    Args:
        products: 1 forward; 2 with the gradient of the points, 3 with that of the centroids too.
    """
    traffic = FLOAT_BYTES * products * (points * dim + clusters * dim)
    return Work("distances", 2.0 * products * points * clusters * dim, products * points * clusters, traffic)


def magnet_flops(batch: int, clusters: int, dim: int) -> float:
    """The four products of a magnet loss forward and backward: the means, the distances, and the gradients of both."""
    return 4 * 2.0 * batch * clusters * dim


def kmeans(points: float, per_class: int, dim: int, *, iterations: int = 20, starts: int = 1) -> Work:
    """Lloyd's iterations of all classes, each point against its own class's centroids: assignment, then the means."""
    rounds = iterations * starts
    flops = 2.0 * rounds * points * per_class * dim
    return Work("kmeans", flops, rounds * points * dim, FLOAT_BYTES * rounds * points * dim)


def certificate(points: float, clusters: int, per_class: int, dim: int, *, bound: Bound) -> Work:
    """Radii from embeddings: distances to the centroids and between them, and what the bound does with each pair.

    nearest: one quotient a pair. pairwise: besides, the own clusters against the few rivals that a lower bound leaves,
    which are not counted. triangle: besides, distances from differences, which no matrix product gives. exact: besides,
    the system of one rival.
    soft-global, soft-local: distances from differences, and the pairs of own and rival votes. soft-lse: a bisection for
    each rival class over its votes. soft-dual: such a bisection for each of the weights that are tried.
    """
    pairs = points * clusters
    # what is in float64 counts twice: the centroids with each other, and all products of the soft bounds
    flops = 2.0 * (pairs + 2 * clusters**2) * dim
    operations: float = _OPERATIONS * pairs
    if bound == "exact":
        flops += points * (2.0 * per_class**2 * dim + per_class**4)
    if bound == "triangle":
        operations += 2.0 * pairs * dim
    if bound == "soft-global":
        operations += 4.0 * clusters**2 * dim
    if bound.startswith("soft"):
        flops += 2 * 2.0 * pairs * per_class * _SOFT_PRODUCTS[bound](per_class)
        reach = pairs * BISECTIONS * _OPERATIONS
        tries = {"soft-lse": 1, "soft-dual": per_class + 2 + REFINEMENTS}.get(bound, 0)
        operations += 4.0 * pairs * dim + pairs * per_class + tries * reach
    return Work("certificate", flops, operations, FLOAT_BYTES * dim * (points + clusters))


def broadcast_bytes(points: int, clusters: int, dim: int) -> int:
    """What the pairwise certificate would hold at once written as a broadcast: differences, and a table of all pairs of
    clusters, for each point."""
    return FLOAT_BYTES * points * (clusters * dim + clusters**2)


def all_reduce_bytes(parameters: int, devices: int) -> float:
    """What each device sends to average one gradient over a ring: 2 (d - 1) / d of the gradient.

    Source: Patarasuk and Yuan 2009.
    """
    return 2 * (devices - 1) / devices * FLOAT_BYTES * parameters


def gathered_bytes(points: int, dim: int, devices: int) -> float:
    """What each device sends so that one of them has all embeddings: its share, unless it is that one."""
    return FLOAT_BYTES * points * dim / devices if devices > 1 else 0.0


# --- a whole study ---


@dataclass(frozen=True)
class Study:
    """A data set, a network and the paper's constants.

    Args:
        per_class: k, clusters of each class.
        batch: examples a step on each device.
        gradients: input gradients that an attack may spend on an image: steps times restarts.
    """

    name: str
    network: Network
    train_images: int
    test_images: int
    classes: int
    per_class: int = 2
    epochs: int = 90
    batch: int = 240
    kmeans_iterations: int = 20
    kmeans_starts: int = 1
    gradients: int = 200

    @property
    def clusters(self) -> int:
        """K = k classes."""
        return self.classes * self.per_class


@dataclass(frozen=True)
class Part:
    """A part of a study: its work on all devices, bytes that each device sends, and seconds."""

    name: str
    flops: float
    bytes: float
    sent: float
    seconds: float


def plan_table(studies: Sequence[Study], machines: Sequence[Machine], devices: Sequence[int]) -> pd.DataFrame:
    """`plan` of each study on each number of each machine.

    Returns:
        columns ``study k machine devices part hours flops``.
    """
    rows = [
        (study.name, study.per_class, machine.name, count, part.name, part.seconds / 3600, part.flops)
        for study in studies
        for machine in machines
        for count in devices
        for part in plan(study, replace(machine, devices=count))
    ]
    return pd.DataFrame(rows, columns=["study", "k", "machine", "devices", "part", "hours", "flops"])


def plan(study: Study, machine: Machine) -> list[Part]:
    """What a study costs on a machine: ideal data parallelism, plus the bytes that must be sent.

    Refresh: embeddings by all devices, gathered; k-means by one of them. Certificates: of all test images, embeddings
    included, for each bound.
    """
    network, dim, train = study.network, study.network.dim, study.train_images
    one = replace(machine, devices=1)
    steps = math.ceil(train / (study.batch * machine.devices))
    sent = steps * all_reduce_bytes(network.parameters, machine.devices)
    embedded = _part("", [forward(network, train)], machine, gathered_bytes(train, dim, machine.devices))
    lloyd = kmeans(train, study.per_class, dim, iterations=study.kmeans_iterations, starts=study.kmeans_starts)
    clustered = _part("", [lloyd, distances(train, study.clusters, dim)], one, 0.0)
    epoch = _part("training, one epoch", [training(network, train)], machine, sent)
    refresh = _sum("refresh, one epoch", [embedded, clustered])
    whole = _sum(f"training, {study.epochs} epochs", [epoch, refresh], study.epochs)
    images = study.test_images
    attack = _part(f"attack, {study.gradients} gradients", [gradient(network, images * study.gradients)], machine, 0.0)
    radii = [
        _part(
            f"certificates, {bound}",
            [forward(network, images), certificate(images, study.clusters, study.per_class, dim, bound=bound)],
            machine,
            0.0,
        )
        for bound in BOUNDS
    ]
    return [epoch, refresh, whole, attack, *radii]


BOUNDS: tuple[Bound, ...] = tuple(bound for part in get_args(Bound) for bound in get_args(part))


def _part(name: str, works: Sequence[Work], machine: Machine, sent: float) -> Part:
    time = sum(seconds(work, machine) for work in works) + sent / machine.link
    return Part(name, sum(work.flops for work in works), sum(work.bytes for work in works), sent, time)


def _sum(name: str, parts: Sequence[Part], count: int = 1) -> Part:
    flops, moved, sent, time = (
        count * sum(getattr(part, field) for part in parts) for field in ("flops", "bytes", "sent", "seconds")
    )
    return Part(name, flops, moved, sent, time)


def training_seconds(recipe: Recipe, an_epoch: Mapping[str, float]) -> float:
    """How long a training takes, that of its start included.

    Args:
        an_epoch: seconds of an epoch of each method.
    Raises:
        ValueError: if a method's is not known.
    """
    if recipe.method not in an_epoch:
        raise ValueError(f"an_epoch: expected the seconds of {recipe.method}, got those of {', '.join(an_epoch)}")
    start = training_seconds(recipe.warm_start, an_epoch) if recipe.warm_start else 0.0
    return start + recipe.epochs * an_epoch[recipe.method]


def bills_table(recipes: Mapping[str, Recipe], an_epoch: Mapping[str, float], tariff: Tariff) -> pd.DataFrame:
    """What each training costs, its start included: a row each method whose epoch was timed."""
    rows = []
    for method, recipe in recipes.items():
        if method in an_epoch:
            taken = training_seconds(recipe, an_epoch)
            rows.append([method_name(method), an_epoch[method], epochs_in_words(recipe), taken / 60,
                         tariff.money(taken), tariff.kilowatt_hours(taken)])  # fmt: skip
    return pd.DataFrame(rows, columns=["method", "s an epoch", "epochs", "minutes", "money", "kWh"])
