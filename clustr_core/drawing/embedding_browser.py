"""The data of the widget embedding-browser: test images in several methods' embeddings, clean and under attack."""

import json
from base64 import b64encode
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from clustr_core.attacks.ball import pgd_path, random_point
from clustr_core.attacks.losses import cross_entropy, margin_loss
from clustr_core.attacks.names import Norm
from clustr_core.data import Dataset, to_float
from clustr_core.drawing.checks import check_rows
from clustr_core.drawing.looks import COLOURS
from clustr_core.drawing.results import CLASS_MARKERS
from clustr_core.measuring.pieces import dataset_of, drawn_order, some_test_images
from clustr_core.measuring.study import method_name
from clustr_core.models.embed import embed_all
from clustr_core.numerics.distances import nearest_points
from clustr_core.training.run import Run

# the longer side of a thumbnail, in pixels
THUMBNAIL = 16
# an attacked pixel is kept as its offset in eps / LEVELS, from -LEVELS to LEVELS: half a byte
LEVELS = 7
# significant digits: a place at 50 is known to a millionth
DIGITS = 8


@dataclass(frozen=True)
class PrincipalPlane:
    """The plane through the mean of embeddings along which they vary most.

    Args:
        axes: two orthonormal columns; of each, the entry of largest magnitude is positive.
        share: what share of the variance each axis holds.
    """

    mean: Float[Tensor, " dim"]
    axes: Float[Tensor, "dim 2"]
    share: Float[Tensor, " 2"]

    @classmethod
    def of(cls, embeddings: Float[Tensor, "batch dim"]) -> "PrincipalPlane":
        """The plane of embeddings, in float64.

        Raises:
            ValueError: if they are in fewer than two dimensions, or do not vary.
        """
        wide = embeddings.double()
        if wide.shape[1] < 2:
            raise ValueError(f"embeddings: expected at least two dimensions for a map, got {wide.shape[1]}")
        mean = wide.mean(dim=0)
        values, vectors = torch.linalg.eigh((wide - mean).T @ (wide - mean))
        if not values[-1] > 0:
            raise ValueError("embeddings: expected some that differ, got one place")
        axes = vectors[:, -2:].flip(1)
        # an eigenvector's sign is arbitrary, and would differ between machines
        signs = axes.gather(0, axes.abs().argmax(dim=0, keepdim=True)).sign()
        return cls(mean, axes * signs, values[-2:].flip(0).clamp_min(0) / values.sum())

    def project(self, embeddings: Float[Tensor, "*batch dim"]) -> Float[Tensor, "*batch 2"]:
        """Where embeddings lie in the plane: (z - mean) . axes, so that no distance grows."""
        return (embeddings.double() - self.mean) @ self.axes


@dataclass(frozen=True)
class _Walk:
    """What one method makes of the images at each stop of an attack."""

    positions: Float[Tensor, "stop image 2"]
    margins: Float[Tensor, "stop image"]
    predictions: Int[Tensor, "stop image"]
    neighbours: Int[Tensor, "stop image rank"]
    pixels: Float[Tensor, "stop image channel height width"]
    seen: Float[Tensor, " later_stop"]
    plane: PrincipalPlane
    centroids: Float[Tensor, "cluster 2"]
    centroid_labels: Int[Tensor, " cluster"]

    def of(self, chosen: Tensor) -> dict[str, Any]:
        """The part of some images, as JSON has it; neighbours are still indices of training images."""
        x, y = self.positions[:, chosen].unbind(dim=2)
        return {
            "share": _rounded(self.plane.share),
            "seen": _rounded(self.seen),
            "centroids": _rounded(self.centroids),
            "centroid_labels": self.centroid_labels.tolist(),
            "x": _rounded(x),
            "y": _rounded(y),
            "margin": _rounded(self.margins[:, chosen]),
            "prediction": self.predictions[:, chosen].tolist(),
            "neighbours": self.neighbours[:, chosen].tolist(),
        }


@dataclass(frozen=True)
class _Question:
    """What is asked of every method."""

    dataset: Dataset
    images: UInt8[Tensor, "image channel height width"]
    labels: Int[Tensor, " image"]
    norm: Norm
    eps: float
    steps: int
    stops: tuple[int, ...]
    neighbours: int
    seed: int


def data(
    runs: Mapping[str, Run],
    *,
    eps: float,
    steps: int,
    norm: Norm = "linf",
    stops: Sequence[int] | None = None,
    examples: int = 128,
    neighbours: int = 5,
    maps: pd.DataFrame | None = None,
    dataset: Dataset | None = None,
    seed: int = 0,
    limit: int = 400_000,
) -> dict[str, Any]:
    """Test images in each method's embedding along a PGD attack: where they lie, what they are taken for, what is near.

    The attack is that of `measuring.embeddings.path_table`: from a random start, on the cross-entropy of the run's own
    classifier, in steps of 2.5 eps / steps. The map is linear, (z - mean) . axes with the two principal axes of the
    clean training embeddings, so that it places an attacked image as it places a clean one. Numbers have eight
    significant digits. Images are shrunk to at most 16 x 16 pixels; an attacked pixel is kept to eps / 14.

    Args:
        eps: radius of the attack in ``norm``, in units of pixels in [0, 1].
        stops: after how many steps the images are shown, 0 (the clean image) first; None takes five of them.
        examples: at most so many test images, the first in the order drawn once for all methods.
        neighbours: how many of the nearest training images each test image is shown with.
        maps: rows ``method index x y`` of a second map, that cannot move: `measuring.embeddings.embedding_table`'s.
        seed: fixes the random starts.
        limit: images are left out, last drawn first, until the data as JSON have at most so many bytes.
    Raises:
        ValueError: if there is no method, ``stops`` do not rise from 0 to at most ``steps``, ``maps`` lack an image or
            a method, an image has other than one or three channels, or not even one image is within ``limit``.
    Source: Madry et al. 2018 for the attack; principal components as in Pearson 1901.
    """
    if not runs:
        raise ValueError("runs: expected at least one method, got none")
    for run in runs.values():
        dataset = dataset_of(run, dataset)
    assert dataset is not None
    if dataset.image_shape[0] not in (1, 3):
        raise ValueError(f"dataset: expected images of 1 or 3 channels, got {dataset.image_shape[0]}")
    stops = _stops(steps) if stops is None else tuple(stops)
    _check_stops(stops, steps)
    indices, images, labels = some_test_images(next(iter(runs.values())), dataset, examples)
    if maps is not None:
        _check_maps(maps, list(runs), indices)
    question = _Question(dataset, images, labels, norm, eps, steps, stops, neighbours, seed)
    walks = {method: _walk(run, question) for method, run in runs.items()}
    return _within(limit, question, indices, walks, maps)


def _stops(steps: int) -> tuple[int, ...]:
    """Five stops that lie denser at the beginning, where an embedding moves most."""
    return tuple(sorted({0, *(max(round(share * steps), 1) for share in (0.1, 0.25, 0.5, 1))}))


def _check_stops(stops: tuple[int, ...], steps: int) -> None:
    rising = all(a < b for a, b in pairwise(stops))
    if len(stops) < 2 or stops[0] != 0 or stops[-1] > steps or not rising:
        raise ValueError(f"stops: expected numbers that rise from 0 to at most {steps}, got {list(stops)}")


def _check_maps(maps: pd.DataFrame, methods: list[str], indices: Int[Tensor, " image"]) -> None:
    check_rows(maps, "index", "x", "y", words=("method",))
    for method in methods:
        counts = maps.loc[maps["method"] == method, "index"].value_counts()
        if wrong := [index for index in indices.tolist() if counts.get(index, 0) != 1]:
            found = f"{counts.get(wrong[0], 0)} for image {wrong[0]}"
            raise ValueError(f"maps: expected one row of {method} for each image, got {found}")


def _walk(run: Run, question: _Question) -> _Walk:
    """Attack a run's classifier, and keep what it makes of the images at each stop."""
    model, dataset = run.model(), question.dataset
    gallery = embed_all(model.encoder, dataset.train_images)
    plane, clusters = PrincipalPlane.of(gallery), run.cluster_model().clusters
    pixels = _attacked(model, question)
    with torch.no_grad():
        embeddings = torch.stack([model.embed(each) for each in pixels])
        logits = torch.stack([model(each) for each in pixels])
    margins = torch.stack([-margin_loss(each, question.labels) for each in logits])
    nearest = [nearest_points(each, gallery, count=question.neighbours)[1] for each in embeddings]
    return _Walk(
        positions=plane.project(embeddings),
        margins=margins,
        predictions=logits.argmax(dim=2),
        neighbours=torch.stack(nearest),
        pixels=pixels,
        seen=_seen(plane, embeddings),
        plane=plane,
        centroids=plane.project(clusters.centroids),
        centroid_labels=clusters.labels,
    )


def _attacked(model: torch.nn.Module, question: _Question) -> Float[Tensor, "stop image channel height width"]:
    """The images at each stop: as they are, then along `pgd_path`."""
    images, eps, norm = to_float(question.images), question.eps, question.norm
    start = random_point(images, eps, norm, torch.Generator().manual_seed(question.seed))
    walk = pgd_path(
        lambda x: cross_entropy(model(x), question.labels),
        images,
        start,
        eps=eps,
        step_size=2.5 * eps / question.steps,
        steps=question.steps,
        norm=norm,
    )
    kept = {step: points for step, points in enumerate(walk) if step in question.stops}
    return torch.stack([images, *(kept[step] for step in question.stops[1:])])


def _seen(plane: PrincipalPlane, embeddings: Float[Tensor, "stop image dim"]) -> Float[Tensor, " later_stop"]:
    """The share of the attack's squared displacement that lies in the plane, at each stop but the first."""
    displaced = (embeddings[1:] - embeddings[0]).double()
    whole = displaced.square().sum(dim=(1, 2))
    return (displaced @ plane.axes).square().sum(dim=(1, 2)) / whole.clamp_min(torch.finfo(whole.dtype).tiny)


# as JSON


def _within(
    limit: int, question: _Question, indices: Int[Tensor, " image"], walks: dict[str, _Walk], maps: pd.DataFrame | None
) -> dict[str, Any]:
    """The data of as many images as the limit allows."""
    count = len(indices)
    while count:
        chosen = torch.isin(indices, drawn_order(question.dataset)[:count]).nonzero().squeeze(1)
        packed = _packed(question, indices, chosen, walks, maps)
        size = len(json.dumps(packed, separators=(",", ":")))
        if size <= limit:
            return packed
        count = min(count - 1, int(count * limit / size))
    raise ValueError(f"limit: expected room for at least one image, got {limit} bytes")


def _packed(
    question: _Question,
    indices: Int[Tensor, " image"],
    chosen: Int[Tensor, " chosen"],
    walks: dict[str, _Walk],
    maps: pd.DataFrame | None,
) -> dict[str, Any]:
    """The data of some images; of the training images only those that are near one of them."""
    dataset, clean = question.dataset, _shrunk(to_float(question.images[chosen]))
    near = torch.cat([walk.neighbours[:, chosen].flatten() for walk in walks.values()]).unique()
    place = {index: at for at, index in enumerate(near.tolist())}
    methods = []
    for method, walk in walks.items():
        found = walk.of(chosen)
        found["neighbours"] = [[[place[n] for n in row] for row in stop] for stop in found["neighbours"]]
        found["offsets"] = _offsets(walk.pixels[1:, chosen], clean, question.eps)
        if maps is not None:
            found["still"] = _still(maps, method, indices[chosen].tolist())
        methods.append({"id": method, "name": method_name(method), **found})
    return {
        "dataset": dataset.name.removeprefix("folder:").rpartition("/")[2],
        "attack": {"norm": question.norm, "eps": question.eps, "steps": question.steps},
        "stops": list(question.stops),
        "shape": list(clean.shape[1:]),
        "classes": [_class_look(number, name) for number, name in enumerate(dataset.class_names)],
        "test": _pictures(indices[chosen], question.labels[chosen], clean),
        "train": _pictures(near, dataset.train_labels[near], _shrunk(to_float(dataset.train_images[near]))),
        "methods": methods,
    }


def _pictures(
    indices: Int[Tensor, " image"], labels: Int[Tensor, " image"], pixels: Float[Tensor, "image channel height width"]
) -> dict[str, Any]:
    """Which images, their classes, and their bytes, row by row with the channels last."""
    coded = (255 * pixels.permute(0, 2, 3, 1)).round().to(torch.uint8).numpy().tobytes()
    return {"index": indices.tolist(), "label": labels.tolist(), "pixels": b64encode(coded).decode()}


def _shrunk(images: Float[Tensor, "image channel height width"]) -> Float[Tensor, "image channel rows columns"]:
    """Images of at most THUMBNAIL pixels a side: means of equal parts."""
    height, width = images.shape[2:]
    factor = -(-max(height, width) // THUMBNAIL)
    return F.adaptive_avg_pool2d(images, (-(-height // factor), -(-width // factor))) if factor > 1 else images


def _offsets(
    pixels: Float[Tensor, "stop image channel height width"],
    clean: Float[Tensor, "image channel rows columns"],
    eps: float,
) -> str:
    """How far the pixels have moved, in eps / LEVELS, two of them a byte, in the order of `_pictures`."""
    moved = torch.stack([_shrunk(each) for each in pixels]) - clean
    codes = (LEVELS * moved / eps).round().clamp(-LEVELS, LEVELS).add(LEVELS).to(torch.uint8)
    flat = codes.permute(0, 1, 3, 4, 2).flatten().numpy()
    pairs = np.append(flat, np.zeros(len(flat) % 2, dtype=np.uint8)).reshape(-1, 2)
    return b64encode((pairs[:, 0] * 16 + pairs[:, 1]).tobytes()).decode()


def _still(maps: pd.DataFrame, method: str, indices: list[int]) -> list[list[float]]:
    """The rows of a map that cannot move, to four digits."""
    rows = maps[maps["method"] == method].set_index("index").loc[indices]
    return [[float(f"{x:.4g}"), float(f"{y:.4g}")] for x, y in zip(rows["x"], rows["y"], strict=True)]


def _class_look(number: int, name: str) -> dict[str, str]:
    """A class as `results.draw_map` draws it."""
    marker = CLASS_MARKERS[(number + number // len(COLOURS)) % len(CLASS_MARKERS)]
    return {"name": str(name), "color": COLOURS[number % len(COLOURS)], "marker": marker}


def _rounded(values: Tensor) -> Any:
    """A tensor as lists of numbers of eight significant digits."""
    return [_rounded(each) for each in values] if values.dim() else float(f"{float(values):.{DIGITS}g}")
