"""Slices of the balls around images, through an attack's direction and a random one: to be searched, and drawn."""

import pandas as pd
import torch

from clustr_core.attacks.ball import Images, project
from clustr_core.attacks.losses import cross_entropy, margin_loss
from clustr_core.measuring.evaluation import Evaluation, outputs_of
from clustr_core.numerics.distances import per_item


def slice_table(evaluation: Evaluation, *, points: int = 21) -> pd.DataFrame:
    """What the attack climbs and what decides, on a slice through each image's ball: to be drawn.

    Returns:
        columns ``index a b loss margin``: cross-entropy on the surface, and the model's log-margin, in nats, which is
        positive where the image is misclassified; the rows with b = 0 run along the attack's direction.
    Raises:
        ValueError: as `square_grid`.
    """
    tables, axes = [], slice_axes(evaluation)
    for a, b in square_grid(points):
        moved = on_slice(evaluation, axes, a, b)
        loss = cross_entropy(outputs_of(evaluation.surface, moved), evaluation.labels)
        margin = margin_loss(outputs_of(evaluation.model, moved), evaluation.labels)
        tables.append(pd.DataFrame({"a": a, "b": b, "loss": loss.cpu(), "margin": margin.cpu()}))
    return pd.concat(tables).rename_axis("index").reset_index().sort_values(["index", "a", "b"], ignore_index=True)


def slice_axes(evaluation: Evaluation) -> tuple[Images, Images]:
    """Each image's direction of attack, scaled to largest entry 1 (0 where it did not move), and random signs."""
    offsets = evaluation.attacked.adversarial - evaluation.images
    largest = per_item(offsets.flatten(1).abs().amax(dim=1), offsets)
    generator = torch.Generator(offsets.device).manual_seed(evaluation.seed)
    random = torch.randint(2, offsets.shape, generator=generator, device=offsets.device)
    return offsets / largest.where(largest > 0, 1), 2 * random.to(offsets) - 1


def on_slice(evaluation: Evaluation, axes: tuple[Images, Images], a: float, b: float) -> Images:
    """x + eps (a u + b v), projected into the ball and into [0, 1]; u is the attack's direction, v the random one."""
    attack, random = axes
    moved = evaluation.images + evaluation.eps * (a * attack + b * random)
    return project(moved, evaluation.images, evaluation.eps, "linf")


def square_grid(points: int) -> list[tuple[float, float]]:
    """The square [-1, 1]^2, in rows of so many points.

    Raises:
        ValueError: if there are fewer than two points along an axis.
    """
    if points < 2:
        raise ValueError(f"points: expected at least 2 along each axis, got {points}")
    line = torch.linspace(-1, 1, points, dtype=torch.float64).tolist()
    return [(a, b) for a in line for b in line]
