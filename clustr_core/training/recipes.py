"""What fully determines a run: one frozen dataclass for each training method.

This module reads no tensors, so that a pipeline can ask it for names in no time.
"""

import itertools
import json
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeGuard, get_args, get_origin

from clustr_core.storage.files import digest, home
from clustr_core.storage.gate import brief
from clustr_core.training.fields import as_kept, build, field_values

Augmentation = Literal["none", "crop", "crop-flip"]
Optimiser = Literal["adam", "sgd"]
Schedule = Literal["steps", "triangle"]
Guarantee = Literal["none", "lipschitz", "smoothing"]
Precision = Literal["32-true", "tf32", "bf16-mixed"]
CertificateLoss = Literal["margin", "emma", "annealed"]
# the exponent of annealing that its authors take
ANNEALING = 5.0
# the encoders whose Lipschitz constant is at most 1 by construction, but for CPL's estimate of a norm
ONE_LIPSCHITZ = (
    "lip-mlp", "lip-cnn", "lip-cnn-aol", "lip-cnn-cayley", "lip-mlp-thin", "lip-cnn-thin", "lip-cnn-cpl",
)  # fmt: skip
# those of them whose rounding `rounding.embedding_error` can bound, without which nothing is certified
CERTIFIABLE = tuple(name for name in ONE_LIPSCHITZ if name != "lip-cnn-cayley")
# what training does; raised by one when a recipe leads to other weights than before (`tests/fingerprints.json` notices)
# 1: runs are named by their recipe and this number, and no longer by a digest of source code
TRAINING_VERSION = 1
# raised by one when trainings in a precision lead to other weights than before
PRECISION_VERSIONS: dict[str, int] = {"bf16-mixed": 2}


class UnknownMethod(ValueError):
    """A recipe's method is not registered here; the module that registers it may not have been imported."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What every training method shares. Lengths are in pixels of [0, 1]; times in epochs.

    Args:
        dataset, encoder, width: as `data.load_dataset` and `encoders.build_encoder` take them.
        train_examples: train on so many only, chosen by the seed with each class in its share; None for all.
        augmentation: random crops and mirror images.
        crop_padding: pixels added on each side before a crop.
        schedule: "steps" divides the learning rate by ten at the milestones; "triangle" raises it from 0 over the first
            sixth of the training, holds it until two fifths, and lowers it to 0 at the end.
        milestones: epochs after which the learning rate is divided by ten.
        seed: fixes the initial weights, every batch and every random start.
        precision: of the training, whatever the caller has switched on. "32-true" is float32 without TF32, "tf32" lets
            a GPU round the factors of products and convolutions, and "bf16-mixed" passes images through the network in
            bfloat16 where that is safe. Weights, losses and the finished network's clusters stay in float32.
        snapshots: epochs whose weights are kept beside the final ones (0 is the start).
    Raises:
        ValueError: if a value has no meaning.
    """

    method: ClassVar[str]
    # what a certificate of the method rests on; whether it decides by clusters; by which rule
    guarantee: ClassVar[Guarantee] = "none"
    clustered: ClassVar[bool] = False
    rule: ClassVar[Literal["soft", "nearest"]] = "soft"
    # what training needs beside an objective; `registry.NEEDED_FIELDS` says which fields of the recipe each reads
    # batches are clusters that k-means finds anew each epoch, and only the encoder learns
    cluster_batches: ClassVar[bool] = False
    # each batch is replayed, moved by a perturbation that persists from batch to batch
    persistent_perturbation: ClassVar[bool] = False
    # the centroids are learnt along with the encoder
    learnable_centroids: ClassVar[bool] = False
    # the linear head has orthonormal rows
    orthonormal_head: ClassVar[bool] = False
    # raised by one, by whoever registers a method, when the method leads to other weights than before
    version: ClassVar[int] = 1

    dataset: str = "digits"
    encoder: str = "small-cnn"
    width: int = 32
    train_examples: int | None = None
    augmentation: Augmentation = "none"
    crop_padding: int = 4
    epochs: int = 20
    batch_size: int = 64
    optimiser: Optimiser = "adam"
    learning_rate: float = 1e-3
    weight_decay: float = 0.0
    schedule: Schedule = "steps"
    milestones: tuple[int, ...] = ()
    seed: int = 111
    precision: Precision = "32-true"
    snapshots: tuple[int, ...] = ()
    per_class: int = 2
    kmeans_starts: int = 1
    kmeans_iterations: int = 20
    neighbours: int = 20
    warm_start: "Recipe | None" = None

    def __post_init__(self) -> None:
        """Every value is of its field's kind, as a file gives it back: lists are tuples, and NumPy's numbers Python's.
        Every number must be positive where zero has no meaning, every choice a known one."""
        for item in fields(self):
            value = as_kept(getattr(self, item.name), item.type, item.name)
            object.__setattr__(self, item.name, value)
            if get_origin(item.type) is Literal and value not in get_args(item.type):
                raise ValueError(f"{item.name}: expected one of {get_args(item.type)}, got {brief(value)}")
            if item.name in _POSITIVE and value is not None and not 0 < value < math.inf:
                raise ValueError(f"{item.name}: expected a positive number, got {value}")
            if item.name in LARGEST and value is not None and value > LARGEST[item.name]:
                raise ValueError(f"{item.name}: expected at most {LARGEST[item.name]:,}, got {brief(value)}")
        if not isinstance(self.warm_start, Recipe | None):
            raise ValueError(f"warm_start: expected a recipe or None, got {brief(self.warm_start)}")
        check_warm_starts(self, lambda recipe: recipe.warm_start)
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"seed: expected 0 or more, and less than 2^63, got {brief(self.seed)}")
        if not 0 <= self.weight_decay < math.inf:
            raise ValueError(f"weight_decay: expected 0 or more, got {self.weight_decay}")
        if not getattr(self, "annealing", ANNEALING) >= 1:
            raise ValueError(f"annealing: expected at least 1, got {getattr(self, 'annealing', None)}")
        for name in ("milestones", "snapshots"):
            if late := [epoch for epoch in getattr(self, name) if not 0 <= epoch <= self.epochs]:
                raise ValueError(f"{name}: expected epochs in 0..{self.epochs}, got {late}")
        if self.guarantee == "lipschitz" and self.encoder not in ONE_LIPSCHITZ:
            raise ValueError(f"encoder: expected one of {ONE_LIPSCHITZ} for {self.method}, got {brief(self.encoder)}")
        if self.milestones and self.schedule != "steps":
            raise ValueError(f"milestones: expected none with schedule {self.schedule!r}, got {self.milestones}")
        start = self.warm_start
        if start and "lipschitz" in (self.guarantee, start.guarantee) and start.method != self.method:
            raise ValueError(f"warm_start: expected a recipe of {self.method} itself, got {start.method}")
        if start and self.guarantee == "lipschitz" and start.per_class != self.per_class:
            raise ValueError(f"warm_start: expected per_class={self.per_class} as in the recipe, got {start.per_class}")
        for name in _SAME_NETWORK if self.warm_start else ():
            mine, start = getattr(self, name), getattr(self.warm_start, name)
            if mine != start:
                raise ValueError(f"warm_start: expected {name}={mine!r} as in the recipe itself, got {start!r}")


@dataclass(frozen=True, kw_only=True)
class CrossEntropy(Recipe):
    """Plain cross-entropy on clean images, with a linear head: no defence."""

    method: ClassVar[str] = "ce"


@dataclass(frozen=True, kw_only=True)
class AdversarialTraining(Recipe):
    """Cross-entropy on images that PGD (L-infinity, random start) has moved to raise it.

    Source: Madry et al. 2018 (CIFAR-10: eps 8/255, 7 steps of 2/255).
    """

    method: ClassVar[str] = "pgd-at"

    eps: float = 8 / 255
    step_size: float = 2 / 255
    steps: int = 7


@dataclass(frozen=True, kw_only=True)
class FastAdversarialTraining(AdversarialTraining):
    """Adversarial training with a single step, longer than the radius, from a random start.

    Source: Wong et al. 2020 (CIFAR-10: eps 8/255, one step of 10/255). Deviation: the step is taken in evaluation
        mode, as in every recipe here.
    """

    method: ClassVar[str] = "fast-at"

    step_size: float = 10 / 255
    steps: int = 1


@dataclass(frozen=True, kw_only=True)
class Trades(AdversarialTraining):
    """Cross-entropy on clean images plus the divergence between clean and moved predictions.

    Args:
        trades_weight: beta, the weight of the divergence.
        start_scale: standard deviation of the normal start around the image, in pixels of [0, 1].
    Source: Zhang et al. 2019, equation 5 (CIFAR-10: beta 6, eps 0.031, 10 steps of 0.007).
    """

    method: ClassVar[str] = "trades"

    trades_weight: float = 6.0
    start_scale: float = 1e-3
    eps: float = 0.031
    step_size: float = 0.007
    steps: int = 10


@dataclass(frozen=True, kw_only=True)
class FreeAdversarialTraining(Recipe):
    """Each batch replayed; one backward pass moves both the weights and a perturbation that persists between batches.

    Args:
        replays: updates on each batch (the paper's m). An epoch is a pass over the data, so it costs that many.
        eps, step_size: the ball of the perturbation, and its step.
    Source: Shafahi et al. 2019, algorithm 1 (CIFAR-10: eps 8/255, steps of eps, m = 8, epochs divided by m). Clipping
    to [0, 1] passes the gradient of a pixel at 0 or 1, as the authors' PyTorch did, and clamp does not from 2.14 on.
    """

    method: ClassVar[str] = "free-at"
    version: ClassVar[int] = 2
    persistent_perturbation: ClassVar[bool] = True

    eps: float = 8 / 255
    step_size: float = 8 / 255
    replays: int = 8


@dataclass(frozen=True, kw_only=True)
class Clustr(Recipe):
    """The magnet loss on batches of clusters that k-means finds anew each epoch; no adversary.

    Args:
        per_class: k, clusters of each class.
        clusters_per_batch, per_cluster: a batch is so many clusters with so many examples of each.
        gap: the magnet loss's separation, in nats.
        neighbours: how many nearest centroids vote at evaluation (the paper's L).
        warm_start: the recipe whose encoder is the start (the paper starts from cross-entropy); None for scratch.
    Source: Alfarra et al. 2021.
    """

    method: ClassVar[str] = "clustr"
    clustered: ClassVar[bool] = True
    cluster_batches: ClassVar[bool] = True

    clusters_per_batch: int = 12
    per_cluster: int = 20
    gap: float = 12.5


@dataclass(frozen=True, kw_only=True)
class ClustrQTrades(Clustr):
    """The magnet loss plus one-step consistency: the paper's ClusTR+QTRADES.

    Args:
        consistency_weight: lambda.
        eps, step_size: the ball of the random start, and the one signed-gradient step from it.
        training_neighbours: how many nearest centroids vote in the consistency term (the paper's L in training).
    Source: Alfarra et al. 2021.
    """

    method: ClassVar[str] = "clustr-qtrades"

    consistency_weight: float = 8.0
    eps: float = 8 / 255
    step_size: float = 10 / 255
    training_neighbours: int = 10


@dataclass(frozen=True, kw_only=True)
class FreeClustr(Clustr):
    """The magnet loss with free adversarial training's perturbation: the released code's free variant of ClusTR.

    Args:
        replays, eps, step_size: as in `FreeAdversarialTraining`.
    Source: the released code of Alfarra et al. 2021; the perturbation is Shafahi et al. 2019's.
    """

    method: ClassVar[str] = "free-clustr"
    version: ClassVar[int] = 2
    persistent_perturbation: ClassVar[bool] = True

    eps: float = 8 / 255
    step_size: float = 8 / 255
    replays: int = 8


@dataclass(frozen=True, kw_only=True)
class ClustrLip(Clustr):
    """The magnet loss on a 1-Lipschitz encoder, decided by the nearest cluster: what clustering alone buys.

    Source: this book, chapter 7. Deviations from the paper: the encoder, and the nearest rule in place of the soft one.
    """

    method: ClassVar[str] = "clustr-lip"
    guarantee: ClassVar[Guarantee] = "lipschitz"
    rule: ClassVar[Literal["soft", "nearest"]] = "nearest"

    encoder: str = "lip-mlp"


@dataclass(frozen=True, kw_only=True)
class ClustrCert(Recipe):
    """The certificate itself as the loss, on a 1-Lipschitz encoder with clusters that are learnt along with it.

    Args:
        margin: the certified radius asked for, in pixels of [0, 1] (the loss's m).
        temperature: how sharply radii below the margin are told from those above, in the same units (the loss's tau).
        loss, annealing: which of the losses, and its exponent: ``kind`` and ``annealing`` of `losses.certificate_loss`.
    Source: this book, chapter 7: `losses.certificate_loss`.
    """

    method: ClassVar[str] = "clustr-cert"
    learnable_centroids: ClassVar[bool] = True
    guarantee: ClassVar[Guarantee] = "lipschitz"
    clustered: ClassVar[bool] = True
    rule: ClassVar[Literal["soft", "nearest"]] = "nearest"

    encoder: str = "lip-mlp"
    margin: float = 0.5
    temperature: float = 0.25
    loss: CertificateLoss = "margin"
    annealing: float = ANNEALING


@dataclass(frozen=True, kw_only=True)
class LipschitzMargin(Recipe):
    """A 1-Lipschitz encoder with a linear head of orthonormal rows, trained for its margin: the rival without clusters.

    Args:
        margin: the certified radius asked for, in pixels of [0, 1].
        temperature: what logits are divided by in the cross-entropy, in the same units.
        loss, annealing: as in `ClustrCert`.
    Source: Tsuzuku et al. 2018 (the margin is taken off the label's logit); Leino et al. 2021 (a Lipschitz constant for
        each pair of classes); Prach and Lampert 2022 (the temperature).
    """

    method: ClassVar[str] = "lip-linear"
    orthonormal_head: ClassVar[bool] = True
    guarantee: ClassVar[Guarantee] = "lipschitz"

    encoder: str = "lip-mlp"
    margin: float = 0.5
    temperature: float = 0.25
    loss: CertificateLoss = "margin"
    annealing: float = ANNEALING


@dataclass(frozen=True, kw_only=True)
class Smoothing(Recipe):
    """Cross-entropy on images with Gaussian noise: the base classifier of randomised smoothing.

    Args:
        noise: its standard deviation, in pixels of [0, 1]; the same in training and in the certificate.
    Source: Cohen et al. 2019.
    """

    method: ClassVar[str] = "smoothing"
    guarantee: ClassVar[Guarantee] = "smoothing"

    noise: float = 0.25


METHODS: dict[str, type[Recipe]] = {
    kind.method: kind
    for kind in (
        CrossEntropy, AdversarialTraining, Trades, FreeAdversarialTraining, FastAdversarialTraining,
        Clustr, ClustrQTrades, FreeClustr, ClustrLip, ClustrCert, LipschitzMargin, Smoothing,
    )
}  # fmt: skip
_POSITIVE = {
    "width", "train_examples", "epochs", "batch_size", "learning_rate", "per_class", "kmeans_starts",
    "kmeans_iterations", "neighbours", "eps", "step_size", "steps", "clusters_per_batch", "per_cluster",
    "consistency_weight", "training_neighbours", "gap", "trades_weight", "start_scale", "replays",
    "crop_padding", "margin", "temperature", "annealing", "noise",
}  # fmt: skip
# what nobody trains with, and what would fill the memory or never end before it is noticed
LARGEST = {
    "width": 8192, "epochs": 100_000, "batch_size": 1_000_000, "learning_rate": 1000.0, "weight_decay": 1000.0,
    "crop_padding": 256, "per_class": 100_000, "kmeans_starts": 1000, "kmeans_iterations": 100_000,
    "neighbours": 10_000_000, "steps": 100_000, "replays": 10_000, "clusters_per_batch": 100_000,
    "per_cluster": 1_000_000, "training_neighbours": 10_000_000, "annealing": 1000.0, "eps": 1000.0,
    "step_size": 1000.0, "margin": 1000.0, "temperature": 1000.0, "noise": 1000.0, "start_scale": 1000.0, "gap": 1e6,
    "consistency_weight": 1e6, "trades_weight": 1e6,
}  # fmt: skip
LONGEST_CHAIN = 16
# fields that are younger than runs' names, and at this value not part of them
_YOUNGER = {"loss": "margin", "annealing": ANNEALING}
# what a warm start must share with the run that it starts
_SAME_NETWORK = ("dataset", "encoder", "width")


def has_cluster_batches(recipe: Recipe) -> TypeGuard[Clustr]:
    """Whether a recipe trains on batches of clusters; it then has the fields that those of `Clustr` have."""
    return recipe.cluster_batches


def has_persistent_perturbation(recipe: Recipe) -> TypeGuard[FreeAdversarialTraining]:
    """Whether a recipe replays its batches; it then has the fields that those of `FreeAdversarialTraining` have."""
    return recipe.persistent_perturbation


def check_registered(recipe: Recipe) -> None:
    """Refuse a recipe that could be trained, but not read back.

    Raises:
        ValueError: if its method, or its warm start's, is not registered.
    """
    kind = type(recipe)
    if METHODS.get(getattr(kind, "method", "")) is not kind:
        raise ValueError(
            f"recipe: expected one of a registered method, got {kind.__qualname__}; decorate it with @register_recipe"
        )
    if recipe.warm_start:
        check_registered(recipe.warm_start)


def run_key(recipe: Recipe) -> str:
    """The name of a run's folder: its data, its method, and a digest of the recipe and of `TRAINING_VERSION`.

    Neither Python's version nor a word of the source code is in it. The digest of the data is not either, since a
    pipeline asks for names before the data are there: it is recorded in the run, and checked at every use.
    """
    return _key(recipe, training_version(recipe))


def run_keys(recipe: Recipe) -> list[str]:
    """`run_key`, and the names that earlier versions of the same training gave the run."""
    names, versions = zip(*_versions(recipe), strict=True)
    earlier = itertools.product(*(range(version, 0, -1) for version in versions))
    return [_key(recipe, _in_words([*zip(names, each, strict=True)])) for each in earlier]


def _key(recipe: Recipe, version: str) -> str:
    parts = (json.dumps(_naming(recipe_to_dict(recipe)), sort_keys=True), version)
    dataset = recipe.dataset.rstrip("/").replace(":", "/").rsplit("/", 1)[-1]
    return f"{dataset}-{recipe.method}-{digest(*parts)[:10]}"


def _naming(content: dict[str, Any]) -> dict[str, Any]:
    """The values of a recipe, and of its warm start, that are part of a run's name."""
    values = {key: _naming(value) if isinstance(value, dict) else value for key, value in content.items()}
    return {key: value for key, value in values.items() if key not in _YOUNGER or value != _YOUNGER[key]}


def training_version(recipe: Recipe) -> str:
    """What the weights depend on beside the recipe's values and the data: `TRAINING_VERSION`, the method's own, its
    encoder's where that is one's own, and the precision's."""
    return _in_words(_versions(recipe))


def _versions(recipe: Recipe) -> list[tuple[str, int]]:
    """All versions that the weights depend on, each with what it is of."""
    chain = [recipe]
    while chain[-1].warm_start:
        chain.append(chain[-1].warm_start)
    precisions = sorted({each.precision for each in chain} & set(PRECISION_VERSIONS))
    own = [(each.method, each.version) for each in chain]
    # loaded by whoever registers one
    if encoders := sys.modules.get("clustr_core.models.encoders"):
        own += [(name, encoders.OWN_VERSIONS.get(name, 1)) for name in sorted({each.encoder for each in chain})]
    return [("", TRAINING_VERSION), *own, *((each, PRECISION_VERSIONS[each]) for each in precisions)]


def _in_words(versions: Sequence[tuple[str, int]]) -> str:
    """Versions as a run's name has them: `TRAINING_VERSION`, and those of the others that are not the first."""
    (_, training), *own = versions
    return "+".join([str(training), *(f"{name}-{version}" for name, version in own if version != 1)])


def run_folder(recipe: Recipe) -> Path:
    """Where a run lies: ``runs/<run_key>`` in the book's root."""
    return home() / "runs" / run_key(recipe)


def recipe_to_dict(recipe: Recipe) -> dict[str, Any]:
    """A recipe as JSON-able values, with its method and, nested, its warm start."""
    content = asdict(recipe)
    content["warm_start"] = recipe_to_dict(recipe.warm_start) if recipe.warm_start else None
    return {"method": recipe.method, **content}


def epochs_in_words(recipe: Recipe) -> str:
    """How long a recipe trains, its starts first: "12", or "12 + 5"."""
    before = f"{epochs_in_words(recipe.warm_start)} + " if recipe.warm_start else ""
    return f"{before}{recipe.epochs}"


def check_warm_starts(content: Any, start_of: Callable[[Any], Any]) -> None:
    """Refuse a chain of recipes, each the start of the next, that is longer than anybody trains."""
    for _ in range(LONGEST_CHAIN):
        if not (content := start_of(content)):
            return
    raise ValueError(f"warm_start: expected at most {LONGEST_CHAIN} recipes, one the start of the next, got more")


def recipe_from_dict(content: dict[str, Any]) -> Recipe:
    """The inverse of `recipe_to_dict`.

    Raises:
        ValueError: for an unknown method or field.
    """
    check_warm_starts(content, lambda each: each.get("warm_start") if isinstance(each, dict) else None)
    if not isinstance(content, dict):
        raise ValueError(f"recipe: expected its fields, got {brief(content)}")
    content = dict(content)
    method = content.pop("method", None)
    if not isinstance(method, str) or method not in METHODS:
        raise UnknownMethod(f"method: expected one of {sorted(METHODS)}, got {brief(method)}")
    if content.get("warm_start") is not None:
        content["warm_start"] = recipe_from_dict(content["warm_start"])
    return build(METHODS[method], content, where=str(method))


def override(recipe: Recipe, changes: dict[str, Any]) -> Recipe:
    """A recipe with some fields changed; its warm start follows in what the two must share.

    Raises:
        ValueError: for an unknown field, or a value without meaning.
    """
    changes = field_values(type(recipe), changes, where=recipe.method)
    if not isinstance(start := changes.get("warm_start"), Recipe | None):
        raise ValueError(f"{recipe.method}: warm_start: expected a recipe or None, got {brief(start)}")
    if recipe.warm_start and "warm_start" not in changes:
        followed = {name: value for name, value in changes.items() if name in _SAME_NETWORK}
        changes["warm_start"] = replace(recipe.warm_start, **followed)
    return replace(recipe, **changes)
