"""The data of the widget two-hills: a plane where the truth is known, and the two attacks that walk on it."""

from typing import Any

import torch

from clustr_core.attacks.names import PAPER_EPS, PAPER_RESTARTS, PAPER_STEP_SIZE, PAPER_STEPS
from clustr_core.theory.toys import SPACING, TOY_EPS, Toy

# wide enough for the ball of the paper's 16/255 around an image of any class
SPAN = 4 * SPACING
# the correct attack, as chapter 6 runs it on the toy
PGD_STEPS, PGD_STEP_OF_EPS = 20, 1 / 8
# so many pixels along each side have the toy's images of 512 dimensions
WIDE_SIDE = 16


def data(toy: Toy, *, eps: float = TOY_EPS, seed: int = 1) -> dict[str, Any]:
    """What the widget computes everything from: the clusters, an image of each class, and both attacks' budgets.

    Its starts are the draws in [0, 1) of ``paper_pgd`` and of ``pgd`` with this seed, for one image in double
    precision: there the widget takes the same steps as they do. Centroids and variance are written with all their
    digits, since a gradient is a difference of centroids over a variance of 1e-4.

    Args:
        toy: of one pixel a channel, ``cluster_toy(side=1)``; the first image of each class is shown.
        eps: radius of the L-inf ball at first, in pixels of [0, 1], at most 16/255.
        seed: of the starts.
    Raises:
        ValueError: if the images have more than one pixel a channel, a class has not exactly one cluster or no image,
            the variances differ, or ``eps`` is outside its range.
    Source: this book, chapter 6; the steps, their size and the restarts are `names`' constants of the paper's protocol.
    """
    clusters, largest = toy.model.clusters, PAPER_EPS[2]
    if toy.images.shape[1:] != (2, 1, 1):
        raise ValueError(f"toy: expected images of one pixel in each of 2 channels, got {list(toy.images.shape[1:])}")
    if clusters.labels.tolist() != list(range(clusters.num_classes)):
        raise ValueError(f"toy: expected one cluster a class, in their order, got {clusters.labels.tolist()}")
    if not 0 < eps <= largest:
        raise ValueError(f"eps: expected a number above 0 and at most {largest:.4f} (8/255, not 8), got {eps}")
    generator = torch.Generator().manual_seed(seed)
    starts = [torch.rand(2, generator=generator, dtype=torch.float64).tolist() for _ in range(PAPER_RESTARTS)]
    return {
        "centroids": clusters.centroids.tolist(),
        "variance": clusters.shared_variance,
        "images": [_first_image(toy, label) for label in range(clusters.num_classes)],
        "view": [round(0.5 - SPAN / 2, 4), round(0.5 + SPAN / 2, 4)],
        "eps": eps,
        "largest_eps": largest,
        "paper_steps": PAPER_STEPS[0],
        "paper_step_size": PAPER_STEP_SIZE,
        "pgd_steps": PGD_STEPS,
        "pgd_step_of_eps": PGD_STEP_OF_EPS,
        "starts": [[round(draw, 12) for draw in start] for start in starts],
        "seed": seed,
        "wide_side": WIDE_SIDE,
    }


def _first_image(toy: Toy, label: int) -> list[float]:
    of_class = (toy.labels == label).nonzero().flatten()
    if not len(of_class):
        raise ValueError(f"toy: expected an image of each class, got none of class {label}")
    return toy.images[of_class[0]].flatten().tolist()
