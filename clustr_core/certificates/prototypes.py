"""Nearest prototypes on raw pixels: no network, so L = 1 exactly. The floor under every trained certificate."""

import pandas as pd
import torch
from jaxtyping import Int
from torch import Tensor, nn

from clustr_core import data
from clustr_core.certificates.ladder import certified_radius
from clustr_core.certificates.names import HARD_BOUNDS
from clustr_core.models.classifiers import ClusterClassifier, nearest_logits
from clustr_core.models.clusters import fit_clusters


def pixel_prototypes(
    train_images: data.ImageBytes, train_labels: Int[Tensor, " batch"], *, per_class: int, seed: int = 0
) -> ClusterClassifier:
    """The class of the nearest prototype: k-means of the raw pixels in [0, 1], within each class.

    The encoder is a reshape, an isometry: a distance between embeddings is one between images, and L = 1.

    Args:
        per_class: k, the number of prototypes of each class.
        seed: fixes the starts of k-means.
    Raises:
        ValueError: if the images are not uint8, or as `fit_clusters`: if a class below the largest label has fewer
            images than ``per_class``, or every image is a prototype of its own, which leaves no variance.
    """
    if train_images.dtype != torch.uint8:
        raise ValueError(f"train_images: expected uint8, which becomes [0, 1], got {train_images.dtype}")
    clusters, _ = fit_clusters(data.to_float(train_images).flatten(1), train_labels, per_class=per_class, seed=seed)
    return ClusterClassifier(nn.Flatten(), clusters, rule="nearest")


def pixel_prototype_rows(
    dataset: data.Dataset, *, per_class: int, indices: Int[Tensor, " test"] | None = None, seed: int = 0
) -> pd.DataFrame:
    """Certified radii of `pixel_prototypes`: one row for each bound and test image.

    Args:
        indices: of the test images; None takes all of them.
    Returns:
        the columns of `certified.certificate_table`, ``bound index label prediction correct feature_radius radius
        lipschitz lipschitz_lower_bound``, for every bound of the nearest rule; both constants are 1, so that
        ``radius`` is ``feature_radius``, in pixels of [0, 1].
    Raises:
        ValueError: if a class has no training image, an index is no test image's, or as `pixel_prototypes`.
    """
    _check(dataset, indices)
    indices = torch.arange(len(dataset.test_labels)) if indices is None else indices
    model = pixel_prototypes(dataset.train_images, dataset.train_labels, per_class=per_class, seed=seed)
    embeddings, labels = model.embed(data.to_float(dataset.test_images[indices])), dataset.test_labels[indices]
    predicted = nearest_logits(embeddings, model.clusters).argmax(dim=1)
    rows = {"index": indices, "label": labels, "prediction": predicted, "correct": predicted == labels}
    tables = []
    for bound in HARD_BOUNDS:
        radius = certified_radius(embeddings, model.clusters, bound=bound).double()
        tables.append(pd.DataFrame({"bound": bound, **rows, "feature_radius": radius, "radius": radius}))
    return pd.concat(tables, ignore_index=True).assign(lipschitz=1.0, lipschitz_lower_bound=1.0)


def _check(dataset: data.Dataset, indices: Tensor | None) -> None:
    counts = torch.bincount(dataset.train_labels, minlength=dataset.num_classes)
    if missing := [name for name, count in zip(dataset.class_names, counts.tolist(), strict=True) if not count]:
        raise ValueError(f"dataset: expected training images of every class, got none of {missing}")
    tests = len(dataset.test_labels)
    if indices is not None and not ((indices >= 0) & (indices < tests)).all():
        low, high = int(indices.min()), int(indices.max())
        raise ValueError(f"indices: expected test images in 0..{tests - 1}, got {low} to {high}")
