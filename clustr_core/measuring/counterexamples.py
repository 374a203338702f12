"""Certificates that are broken: which rows break one, and the pair of images that is kept as the proof."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from clustr_core.storage.files import PROFILE_NAME
from clustr_core.storage.gate import brief, check_own, listed
from clustr_core.storage.tensors import read_tensors, write_tensors

# in units of pixels, L2. A certificate speaks of the real model: the rounding of an image's pixels in float32 (3e-6 for
# 3072 of them) and that inside the encoder move the border that is found.
ROUNDING = 1e-5
_PIXELS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
# what is kept beside the two images
_NUMBERS = {"label": torch.int64, "index": torch.int64, "radius": torch.float64, "norm": torch.float64}


class CertificateBroken(RuntimeError):
    """A misclassified image lies inside a certified ball, or a curve is above one that bounds it."""


@dataclass(frozen=True)
class Counterexample:
    """A misclassified image inside a ball that was certified.

    Args:
        index, label: of the clean image in its test set.
        radius, norm: the certified radius, and the L2 distance of the two images, in units of pixels.
    """

    image: Float[Tensor, "channel height width"]
    adversarial: Float[Tensor, "channel height width"]
    label: int
    index: int
    radius: float
    norm: float
    attack: str


def violations(rows: pd.DataFrame, *, tolerance: float = ROUNDING) -> pd.DataFrame:
    """The rows that break a certificate, those first that lie deepest inside their ball.

    norm < radius - tolerance, strictly, for an example classified correctly. A certified ball is open: a misclassified
    image on its sphere is no contradiction, nor is one that is inside by no more than ``tolerance``: so much rounding
    may explain.

    Args:
        rows: of `sandwich_rows`.
        tolerance: in units of pixels, L2.
    Raises:
        ValueError: if the tolerance is not a number of at least 0, or a norm or radius is NaN.
    """
    if not 0 <= tolerance < float("inf"):
        raise ValueError(f"tolerance: expected a finite number of at least 0, got {tolerance}")
    if rows[["norm", "radius"]].isna().to_numpy().any():
        raise ValueError("rows: expected numbers as norm and radius, got NaN")
    broken = rows.loc[rows["correct"] & (rows["norm"] < rows["radius"] - tolerance)]
    return broken.iloc[(broken["norm"] - broken["radius"]).argsort(kind="stable")]


def check_sandwich(rows: pd.DataFrame, *, tolerance: float = ROUNDING) -> None:
    """Refuse a table in which an attack broke a certificate.

    Args:
        rows, tolerance: as in `violations`.
    Raises:
        CertificateBroken: names attack, index, radius and norm of the worst row.
        ValueError: as `violations`.
    """
    broken = violations(rows, tolerance=tolerance)
    if len(broken):
        worst = broken.iloc[0]
        raise CertificateBroken(_complaint(worst["attack"], int(worst["index"]), worst["radius"], worst["norm"]))


def save_counterexample(path: Path, found: Counterexample) -> None:
    """Write a counterexample as safetensors, whole or not at all.

    Raises:
        OSError: as the file system says.
    """
    tensors = {
        "image": found.image,
        "adversarial": found.adversarial,
        "label": torch.tensor(found.label),
        "index": torch.tensor(found.index),
        "radius": torch.tensor(found.radius, dtype=torch.float64),
        "norm": torch.tensor(found.norm, dtype=torch.float64),
    }
    write_tensors(path, "a counterexample", tensors, {"attack": found.attack})


def load_counterexample(path: Path) -> Counterexample:
    """Read what `save_counterexample` wrote.

    Raises:
        ValueError: if the file is not as it was written.
    """
    tensors, facts = read_tensors(path, "a counterexample")
    if fault := _fault(tensors, facts):
        raise ValueError(f"{path}: expected a counterexample, got {fault}")
    label, index = (int(tensors[name]) for name in ("label", "index"))
    radius, norm = (float(tensors[name]) for name in ("radius", "norm"))
    return Counterexample(tensors["image"], tensors["adversarial"], label, index, radius, norm, facts["attack"])


def _fault(tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> str:
    """What is no counterexample's, in words."""
    if set(tensors) != {"image", "adversarial", *_NUMBERS}:
        return f"tensors called [{listed(sorted(tensors))}]"
    pair = [tensors["image"], tensors["adversarial"]]
    if pair[0].dim() != 3 or pair[0].shape != pair[1].shape or pair[0].dtype != pair[1].dtype:
        return f"images of shapes {[list(each.shape) for each in pair]}"
    if not all(each.dtype in _PIXELS and each.isfinite().all() for each in pair):
        return "pixels that are no finite numbers"
    for name, dtype in _NUMBERS.items():
        value = tensors[name]
        if value.dtype != dtype or value.dim() or not 0 <= value.item() < math.inf:
            return f"{name} {brief(value.tolist())}"
    attack = facts.get("attack")
    return "" if isinstance(attack, str) and PROFILE_NAME.fullmatch(attack) else f"attack {brief(attack)}"


def kept_counterexample(found: Counterexample, folder: Path) -> CertificateBroken:
    """The error to raise, once the counterexample is on the disk; a full disk must not hide a broken certificate."""
    path = folder / f"counterexample-{found.attack}-{found.index}.safetensors"
    complaint = _complaint(found.attack, found.index, found.radius, found.norm)
    try:
        check_own(folder)
        save_counterexample(path, found)
    except (ValueError, OSError) as error:
        return CertificateBroken(f"{complaint}; it could not be kept: {error}")
    return CertificateBroken(f"{complaint}; both images are kept in {path}")


def _complaint(attack: str, index: int, radius: float, norm: float) -> str:
    return (
        f"{attack}: expected no misclassified image nearer to example {index} than its certified radius {radius:.9g}, "
        f"got one at L2 distance {norm:.9g}"
    )
