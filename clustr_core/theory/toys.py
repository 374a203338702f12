"""A toy on which the truth about robustness is known in closed form: brightness in a plane, one cluster a class."""

from collections.abc import Iterable
from dataclasses import dataclass

import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from clustr_core.attacks.ball import check_inputs
from clustr_core.attacks.losses import cross_entropy, margin_loss
from clustr_core.attacks.paper import paper_surface
from clustr_core.measuring.checks import CHECKS
from clustr_core.measuring.diagnostics import examine
from clustr_core.models.classifiers import ClusterClassifier
from clustr_core.models.clusters import Clusters

# the border between two neighbours lies about 0.025 from either, a little inside a ball of TOY_EPS
SPACING = 0.05
JITTER = 0.003
SPREAD = 0.003
TOY_EPS = 8 / 255
# sigma of the clusters, in units of brightness. The scores exp(-d^2 / 2 sigma^2) at the first are nearly linear, and
# honest; at the second a hill that leads away from everything. At the third the logits lie so far apart that
# cross-entropy rounds to 0, and its gradient with it.
LINEAR_STD, HILL_STD, VANISHED_STD = 0.2, 0.01, 0.003


@dataclass(frozen=True)
class Toy:
    """Images of two channels, each of one brightness, and the cluster classifier of their mean brightness.

    Args:
        model: log-domain logits; with one cluster a class and one variance their differences are linear in the image.
    """

    model: ClusterClassifier
    images: Float[Tensor, "batch 2 side side"]
    labels: Int[Tensor, " batch"]

    def largest_margin(self, eps: float) -> Float[Tensor, " batch"]:
        """The largest log-margin, max_c g_c - g_label over the other classes c, that any image of the L-inf ball has.

        g_c - g_y = sum_k w_k z_k + b with w = (mu_c - mu_y) / sigma^2, z_k the mean of channel k: each pixel moves by
        itself, up to eps or to the wall at 0 or 1. Positive: not robust.

        Raises:
            ValueError: if ``eps`` is not positive.
        """
        check_inputs(self.images, norm="linf", eps=eps)
        variance = self.model.clusters.shared_variance
        centroids, own = self.model.centroids, self.model.centroids[self.labels]
        weights = (centroids[None] - own[:, None]) / variance
        offsets = (own.square().sum(dim=1)[:, None] - centroids.square().sum(dim=1)) / (2 * variance)
        up = (1 - self.images).clamp_max(eps).mean(dim=(2, 3))[:, None]
        down = self.images.clamp_max(eps).mean(dim=(2, 3))[:, None]
        brightness = self.images.mean(dim=(2, 3))[:, None]
        best = torch.where(weights > 0, weights * (brightness + up), weights * (brightness - down))
        margins = best.sum(dim=2) + offsets
        return margins.scatter(1, self.labels[:, None], -torch.inf).amax(dim=1)

    def robust(self, eps: float) -> Bool[Tensor, " batch"]:
        """Which images no image of their ball, of radius ``eps`` in L-inf and within [0, 1], leads to another class."""
        return self.largest_margin(eps) < 0


def cluster_toy(*, seed: int = 0, examples: int = 128, std: float = HILL_STD, side: int = 16) -> Toy:
    """Four classes around grey, at the corners of a square in the plane of the two channels' mean brightness.

    A picture of the plane shows everything, and yet an image has 2 side^2 pixels: in two dimensions some random start
    would land in a rival's cell, and luck would hide what a loss does. With side = 1 the encoder is the identity.

    Args:
        seed: draws the centroids, which leave the corners by up to `JITTER`, and the examples around them.
        std: sigma of the clusters, in units of brightness; see `LINEAR_STD`, `HILL_STD`, `VANISHED_STD`. Log-domain
            logits lie about SPACING^2 / 2 std^2 nats apart.
    Raises:
        ValueError: if a size is not positive.
    Source: this book, chapter 6.
    """
    for name, size in (("examples", examples), ("std", std), ("side", side)):
        if not size > 0:
            raise ValueError(f"{name}: expected a positive number, got {size}")
    g = torch.Generator().manual_seed(seed)
    corners = torch.tensor([[-1.0, -1.0], [-1.0, 1.0], [1.0, -1.0], [1.0, 1.0]]) * SPACING / 2
    centroids = 0.5 + corners + JITTER * (2 * torch.rand(4, 2, generator=g) - 1)
    labels = torch.arange(examples) % 4
    points = centroids[labels] + SPREAD * torch.randn(examples, 2, generator=g)
    images = points[:, :, None, None].expand(-1, -1, side, side).contiguous()
    clusters = Clusters(centroids, torch.arange(4), torch.full((4,), std**2))
    encoder = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
    return Toy(ClusterClassifier(encoder, clusters).eval(), images, labels)


def gradient_field(
    surface: nn.Module, toy: Toy, *, label: int = 0, span: float = 2.6 * SPACING, points: int = 27
) -> pd.DataFrame:
    """What an attack sees of a surface around grey: cross-entropy and its gradient on a grid of the plane.

    Args:
        surface: images -> outputs, such as the toy's model or its scores.
        label: the class that the attack wants to leave.
        span, points: the grid's side, in units of brightness, and its points along each axis.
    Returns:
        columns ``x y loss dx dy margin``: (x, y) the two channels, ``loss`` in nats, its gradient in nats per unit, and
        the toy's log-margin of the label, positive where it is not predicted.
    """
    steps = torch.linspace(0.5 - span / 2, 0.5 + span / 2, points)
    plane = torch.cartesian_prod(steps, steps)[:, :, None, None].requires_grad_()
    labels = torch.full((len(plane),), label)
    loss = cross_entropy(surface(plane), labels)
    (gradient,) = torch.autograd.grad(loss.sum(), plane)
    with torch.no_grad():
        margin = margin_loss(toy.model(plane), labels)
    columns = {"x": plane[:, 0], "y": plane[:, 1], "loss": loss, "dx": gradient[:, 0], "dy": gradient[:, 1]}
    return pd.DataFrame({name: value.detach().flatten() for name, value in {**columns, "margin": margin}.items()})


def toy_thresholds(seeds: Iterable[int] = range(3)) -> pd.DataFrame:
    """What each check says where the truth is known, beside its threshold.

    Two evaluations of the toy are honest: on its logits, and on scores of clusters so wide that they are nearly linear.
    Two are masked: "hill", scores that lead away from everything, and "vanished", logits so far apart that
    cross-entropy on them rounds to 0. At TOY_EPS no image is robust.

    Args:
        seeds: of the toy; the transfer comes from the toy of another seed.
    Returns:
        columns ``check honest hill vanished threshold``: the largest value of the honest ones, the smallest of the
        masked ones.
    """
    kinds = {
        "logits": (HILL_STD, False), "linear scores": (LINEAR_STD, True), "hill": (HILL_STD, True),
        "vanished": (VANISHED_STD, False),
    }  # fmt: skip
    tables = []
    for seed in seeds:
        source = cluster_toy(seed=seed + 1000, std=LINEAR_STD).model
        for kind, (std, scores) in kinds.items():
            toy = cluster_toy(seed=seed, std=std)
            surface = paper_surface(toy.model) if scores else toy.model
            found = examine(surface, toy.model, toy.images, toy.labels, eps=TOY_EPS, source=source, seed=seed)
            tables.append(found.assign(kind=kind))
    values = pd.concat(tables).groupby(["check", "kind"], sort=False)["value"].agg(["min", "max"]).unstack("kind")
    honest = values["max"][["logits", "linear scores"]].max(axis=1)
    columns = {"honest": honest, "hill": values["min"]["hill"], "vanished": values["min"]["vanished"]}
    table = pd.DataFrame(columns).rename_axis("check").reset_index()
    return table.assign(threshold=[CHECKS[check].threshold for check in table["check"]])
