"""What would fail after a training is refused before it; what goes wrong in it is said in its epoch."""

import copy
import logging
import math
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from clustr_core import data
from clustr_core.models.classifiers import ClusterClassifier, LinearClassifier
from clustr_core.models.embed import embed_all
from clustr_core.training.processes import Processes
from clustr_core.training.recipes import Recipe, has_cluster_batches
from clustr_core.training.sampling import BadLosses

log = logging.getLogger(__name__)
# so many images tell whether all embeddings may be equal
PROBED = 64


def check_examples(recipe: Recipe, dataset: data.Dataset, labels: Tensor) -> None:
    """Refuse training examples of which the clusters of the finished network cannot be made, whatever the method.

    Raises:
        ValueError: if a class has fewer examples than clusters, or every cluster would have one example only.
    """
    counts = torch.bincount(labels.cpu(), minlength=dataset.num_classes)
    for name, label, count in zip(dataset.class_names, range(len(counts)), counts.tolist(), strict=True):
        if count < recipe.per_class:
            raise ValueError(
                f"labels: class {label} has {count} examples, fewer than per_class={recipe.per_class} clusters "
                f"(class {name!r}, among {len(labels)} training examples)"
            )
    if len(labels) <= (clusters := dataset.num_classes * recipe.per_class):
        raise ValueError(
            f"train_examples: expected more than the {clusters} clusters (per_class={recipe.per_class}), whose "
            f"variance would be 0, got {len(labels)}"
        )
    _check_clusters_per_batch(recipe, dataset.num_classes)


def _check_clusters_per_batch(recipe: Recipe, classes: int) -> None:
    if not has_cluster_batches(recipe):
        return
    if (asked := recipe.clusters_per_batch) < 2:
        raise ValueError(f"clusters_per_batch: expected at least 2, of different classes, got {asked}")
    if asked > (most := 1 + (classes - 1) * recipe.per_class):
        log.warning("clusters_per_batch: a batch has %d (a seed and all of other classes), not %d", most, asked)


def check_smallest_batch(recipe: Recipe, encoder: nn.Module, images: Tensor, processes: Processes) -> None:
    """Refuse a last batch of one example where batch norm would have a single value to normalise.

    Raises:
        ValueError: if it has; another batch size mends it.
    """
    alone = processes.count == 1 or processes.device.type == "cpu"
    last = len(images) % recipe.batch_size or recipe.batch_size
    rows = -(-last // processes.count)
    if recipe.cluster_batches or not alone or rows > 1:
        return
    if not any(isinstance(layer, _BatchNorm) for layer in encoder.modules()):
        return
    try:
        with torch.no_grad():
            copy.deepcopy(encoder).train()(data.to_float(images[:1]))
    except ValueError as error:
        raise ValueError(
            f"batch_size: {len(images)} examples in batches of {recipe.batch_size} leave a process with one, which "
            f"batch norm cannot normalise ({error}); take another batch_size"
        ) from error


def check_embeddings(encoder: nn.Module, images: Tensor) -> None:
    """Refuse to go on with an encoder that embeds all training images alike, or not at all.

    Raises:
        ValueError: if it does: clusters would have variance 0.
    """
    probe = embed_all(encoder, images[:: max(1, len(images) // PROBED)][:PROBED])
    if not probe.isfinite().all():
        raise ValueError("the training diverged: embeddings are NaN or infinite; try a smaller learning_rate")
    if _equal(probe) and _equal(embed_all(encoder, images)):
        raise ValueError("the training collapsed: all embeddings are equal (variance 0); try a smaller learning_rate")


@contextmanager
def naming_divergence() -> Iterator[None]:
    """Say of losses that a sampler refuses what became of the training.

    Raises:
        ValueError: in place of the sampler's.
    """
    try:
        yield
    except BadLosses as error:
        raise ValueError(f"the training diverged: {error}; try a smaller learning_rate") from error


def check_loss(loss: float) -> None:
    """Refuse to go on with a loss that is not finite.

    Raises:
        ValueError: if it is not.
    """
    if not math.isfinite(loss):
        raise ValueError(f"the training diverged: the mean loss is {loss}; try a smaller learning_rate")


@contextmanager
def naming_batch_that_fits(
    recipe: Recipe, network: LinearClassifier | ClusterClassifier, images: Tensor, processes: Processes
) -> Iterator[None]:
    """Say of a device whose memory a batch exceeds about how many images would fit; of several processes, only that.

    Raises:
        ValueError: in place of PyTorch's error.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        sizes = "clusters_per_batch, per_cluster" if has_cluster_batches(recipe) else "batch_size"
        asked = images_in_a_batch(recipe)
        said = f"{sizes}: batches of {asked} images do not fit into the memory of {images.device}"
        if processes.count == 1:
            # what the batch took is held by the frames in which it did not suffice
            traceback.clear_frames(error.__traceback__)
            fitting = batch_that_fits(network, images, asked)
            said += f"; about {fitting} images fit" if fitting else "; not even two images fit: take a smaller width"
        raise ValueError(said) from error


def images_in_a_batch(recipe: Recipe) -> int:
    """So many at most."""
    return recipe.clusters_per_batch * recipe.per_cluster if has_cluster_batches(recipe) else recipe.batch_size


def batch_that_fits(network: LinearClassifier | ClusterClassifier, images: Tensor, most: int) -> int:
    """The largest half, quarter, ... of ``most`` images, two at least, of which one forward and backward pass fits into
    memory; 0 if there is none. What a method needs beyond that, such as a second pass, is not in it."""
    size = most // 2
    while size > 1:
        network.zero_grad(set_to_none=True)
        torch.cuda.empty_cache()
        try:
            network.embed(data.to_float(images[:size])).sum().backward()
        except torch.OutOfMemoryError:
            size //= 2
        else:
            return size
    return 0


@contextmanager
def naming_epoch(folder: Path, epoch: int, kept: int) -> Iterator[None]:
    """Say of an error in which run and epoch it happened, and after which epoch the checkpoint is that is kept.

    Args:
        epoch, kept: counted from 1; 0 is the start.
    """
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{folder}: epoch {epoch}: {error}; the checkpoint after epoch {kept} is kept") from error


def _equal(embeddings: Tensor) -> bool:
    return bool((embeddings == embeddings[0]).all())
