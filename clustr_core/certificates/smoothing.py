"""Randomised smoothing, a rival of the book's certificates: the class that a model gives most often under noise."""

import math
import numbers
from dataclasses import dataclass

import numpy as np
import scipy  # its parts are loaded on first use: statistics take a second
import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm.auto import tqdm

from clustr_core.attacks.ball import Images
from clustr_core.attacks.result import Model
from clustr_core.numerics.checks import check_are_tensors, check_callable, check_logits

ABSTAIN = -1
BATCH = 256


@dataclass(frozen=True)
class SmoothedCertificates:
    """What `certify_smoothed` found, image by image.

    Args:
        predictions: the smoothed classifier's class, or `ABSTAIN`.
        radius: L2, in pixels of [0, 1], in float64; 0 where it abstained.
        counts: how many of the ``samples`` noisy copies the model gave the selected class, abstained or not.
    """

    predictions: Int[Tensor, " batch"]
    radius: Float[Tensor, " batch"]
    counts: Int[Tensor, " batch"]


def certify_smoothed(
    model: Model,
    images: Images,
    *,
    noise: float,
    samples: int,
    selection_samples: int = 100,
    failure_prob: float = 0.001,
    batch_size: int = BATCH,
    seed: int = 0,
    indices: Int[Tensor, " batch"] | None = None,
    progress: bool = False,
) -> SmoothedCertificates:
    """The smoothed classifier's class at each image, and an L2 radius inside which it does not change.

    The smoothed classifier is g(x) = argmax_c P(f(x + e) = c), e ~ N(0, noise^2 I), f the model's class. A first few
    noisy copies select a class c; of n others k fall into it, and with p the one-sided Clopper-Pearson bound, the
    failure_prob quantile of Beta(k, n - k + 1),

        r = noise * Phi^-1(p)  if p > 1/2, else abstain.

    For each image on its own, the probability (over the noise) of a wrong class or of too large a radius is at most
    ``failure_prob``. What is certified is g and not f: f may well answer another class at x. The copies are NOT
    clipped to [0, 1]: the proof is one of unclipped Gaussian noise, and f must take pixels outside.

    Args:
        model: images -> logits; in evaluation mode, which is the caller's business.
        noise: standard deviation, in pixels of [0, 1].
        samples: n, copies that estimate p: forward passes for each image, besides those that select.
        selection_samples: copies that select the class.
        batch_size: copies in one forward pass; a pass never mixes the copies of two images.
        seed: with an image's index, the batch size and the device, fixes its copies, whatever other images there are.
        indices: of each image; None numbers them from 0.
    Raises:
        ValueError: if there is no image, pixels leave [0, 1], ``noise`` or a count is not positive, ``failure_prob``
            is not between 0 and 1, ``seed`` or an index is negative, or the model returns no logits.
    Source: Cohen, Rosenfeld and Kolter 2019, Theorem 1 with p_B = 1 - p_A, and CERTIFY (section 3.2.2). The theorem
        is one of real numbers; what floating point does to it (Voráček and Hein 2023) is not in the radius.
    """
    sizes = {"selection_samples": selection_samples, "samples": samples}
    drawn = _votes(model, images, sizes, noise, failure_prob, batch_size, seed, indices, progress)
    selected = drawn["selection_samples"].argmax(dim=1)
    counts = drawn["samples"].gather(1, selected[:, None]).squeeze(1)
    radius = _radius(counts, samples, noise, failure_prob)
    predictions = selected.masked_fill(radius == 0, ABSTAIN)
    return SmoothedCertificates(*(part.to(images.device) for part in (predictions, radius, counts)))


def predict_smoothed(
    model: Model,
    images: Images,
    *,
    noise: float,
    samples: int,
    failure_prob: float = 0.001,
    batch_size: int = BATCH,
    seed: int = 0,
    indices: Int[Tensor, " batch"] | None = None,
    progress: bool = False,
) -> Int[Tensor, " batch"]:
    """The smoothed classifier's class at each image without a radius, or `ABSTAIN`.

    With n_A >= n_B the two largest counts of ``samples`` noisy copies: the class of n_A, if a two-sided binomial test
    rejects at level ``failure_prob`` that n_A of n_A + n_B are a fair coin's. For each image on its own, the
    probability of a class that is not the smoothed classifier's is at most ``failure_prob``.

    Args and Raises as in `certify_smoothed`.
    Source: Cohen, Rosenfeld and Kolter 2019, PREDICT (section 3.2.1).
    """
    sizes = {"samples": samples}
    drawn = _votes(model, images, sizes, noise, failure_prob, batch_size, seed, indices, progress)
    counts, classes = drawn["samples"].topk(2, dim=1)
    doubts = [scipy.stats.binomtest(first, first + second).pvalue for first, second in counts.tolist()]
    return classes[:, 0].masked_fill(torch.tensor(doubts) > failure_prob, ABSTAIN).to(images.device)


def largest_radius(noise: float, samples: int, failure_prob: float = 0.001) -> float:
    """The most that ``samples`` copies can certify, when all agree: noise * Phi^-1(failure_prob^(1 / samples)).

    0 where even that many agreeing copies leave p at 1/2 or below.

    Raises:
        ValueError: if ``noise`` or ``samples`` is not positive, or ``failure_prob`` not between 0 and 1.
    Source: Cohen, Rosenfeld and Kolter 2019, CERTIFY (section 3.2.2) with n of n votes.
    """
    _check_numbers(noise, failure_prob, samples=samples)
    return float(_radius(torch.tensor([samples]), samples, noise, failure_prob))


def _radius(counts: Int[Tensor, " batch"], samples: int, noise: float, failure_prob: float) -> Float[Tensor, " batch"]:
    """noise * Phi^-1(p), p the one-sided Clopper-Pearson bound; 0 where p <= 1/2."""
    k = counts.numpy()
    # a class without a vote has the bound 0, for which the beta distribution has no parameter
    lower = np.where(k > 0, scipy.stats.beta.ppf(failure_prob, np.maximum(k, 1), samples - k + 1), 0.0)
    return torch.from_numpy(noise * scipy.stats.norm.ppf(np.maximum(lower, 0.5)))


def _votes(
    model: Model,
    images: Tensor,
    sizes: dict[str, int],
    noise: float,
    failure_prob: float,
    batch_size: int,
    seed: int,
    indices: Tensor | None,
    progress: bool,
) -> dict[str, Int[Tensor, "batch class"]]:
    """How often the model gives each class to independent sets of so many noisy copies of each image, on the CPU."""
    check_callable(model)
    _check_numbers(noise, failure_prob, batch_size=batch_size, **sizes)
    _check_images(images, indices, seed)
    numbered = range(len(images)) if indices is None else indices.tolist()
    drawn = {name: [] for name in sizes}
    for image, index in zip(tqdm(images, "smoothing", disable=not progress), numbered, strict=True):
        generator = _generator(seed, index, images.device)
        for name, size in sizes.items():
            drawn[name].append(_votes_on(model, image, size, noise, batch_size, generator))
    return {name: torch.stack(votes) for name, votes in drawn.items()}


def _votes_on(
    model: Model,
    image: Float[Tensor, "channel height width"],
    size: int,
    noise: float,
    batch_size: int,
    generator: torch.Generator,
) -> Int[Tensor, " class"]:
    """How often the model gives each class to ``size`` noisy copies of one image."""
    parts = []
    for start in range(0, size, batch_size):
        shape = (min(batch_size, size - start), *image.shape)
        copies = torch.randn(shape, generator=generator, device=image.device, dtype=image.dtype)
        with torch.no_grad():
            logits = model(copies.mul_(noise).add_(image))
        if logits.dim() != 2 or len(logits) != shape[0] or logits.shape[1] < 2:
            expected = f"logits [{shape[0]}, class] of two classes at least"
            raise ValueError(f"model: expected {expected}, got shape {list(logits.shape)}")
        check_logits(logits)
        parts.append(torch.bincount(logits.argmax(dim=1), minlength=logits.shape[1]))
    return torch.stack(parts).sum(dim=0).cpu()


def _generator(seed: int, index: int, device: torch.device) -> torch.Generator:
    """One stream for each pair; the sum of the two would give neighbouring seeds each other's noise."""
    mixed = np.random.SeedSequence((seed, index)).generate_state(1, np.uint64)
    return torch.Generator(device).manual_seed(int(mixed[0]))


def _check_numbers(noise: float, failure_prob: float, **counts: int) -> None:
    if not isinstance(noise, numbers.Real) or not 0 < noise < math.inf:
        raise ValueError(f"noise: expected a positive finite number, got {noise}")
    if not isinstance(failure_prob, numbers.Real) or not 0 < failure_prob < 1:
        raise ValueError(f"failure_prob: expected a number between 0 and 1, got {failure_prob}")
    for name, count in counts.items():
        if isinstance(count, bool) or not isinstance(count, numbers.Integral) or count < 1:
            raise ValueError(f"{name}: expected a positive whole number, got {count}")


def _check_images(images: Tensor, indices: Tensor | None, seed: int) -> None:
    check_are_tensors(images=images)
    if images.dim() != 4 or not images.is_floating_point() or not len(images):
        raise ValueError(
            "images: expected one at least, a floating dtype and shape [batch, channel, height, width], "
            f"got {images.dtype} of shape {list(images.shape)}"
        )
    if not ((images >= 0) & (images <= 1)).all():
        raise ValueError(f"images: expected pixels in [0, 1], got {images.min():.4g} to {images.max():.4g}")
    if indices is not None and indices.shape != images.shape[:1]:
        raise ValueError(f"indices: expected one for each of {len(images)} images, got shape {list(indices.shape)}")
    if indices is not None and (indices.is_floating_point() or indices.min() < 0):
        raise ValueError("indices: expected whole numbers of at least 0, got negative or non-integer ones")
    if seed < 0:
        raise ValueError(f"seed: expected a whole number of at least 0, got {seed}")
