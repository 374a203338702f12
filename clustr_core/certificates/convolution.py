"""Norms of convolutions: the largest singular value of many matrices, one for each frequency of a torus."""

import math
from collections.abc import Iterable

import torch
from jaxtyping import Complex, Float
from torch import Tensor

from clustr_core.numerics.chunks import FOURIER_BLOCKS

# rows times columns: smaller matrices have their singular values computed, larger ones a bound that is quicker to prove
LARGE = 128 * 64
# of the iteration that says which block to try first
_POWER_STEPS = 3


def convolution_norm(
    weight: Float[Tensor, "out in kh kw"],
    size: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int] = (1, 1),
) -> float:
    """An upper bound on the operator norm of a zero-padded (and possibly strided) convolution on ``size`` images.

    Zero padding embeds the image isometrically into a torus of size + 2 padding; there the convolution is
    circular, block-diagonal in the Fourier basis, and its norm is the largest singular value of any block. The
    zero-padded result is a part of the circular one, and a stride keeps a part of that: neither raises the norm.
    """
    kernel = [d * (k - 1) + 1 for k, d in zip(weight.shape[2:], dilation, strict=True)]
    torus = [max(s + 2 * p, k) for s, p, k in zip(size, padding, kernel, strict=True)]
    if weight.shape[:2].numel() >= LARGE:
        return _large_convolution_norm(weight.double(), torus, dilation)
    spread = weight.new_zeros(*weight.shape[:2], *kernel, dtype=torch.float64)
    spread[:, :, :: dilation[0], :: dilation[1]] = weight.double()
    return blocks_norm(torch.fft.rfft2(spread, s=torus).permute(2, 3, 0, 1).flatten(0, 1))


def _large_convolution_norm(
    weight: Float[Tensor, "out in kh kw"], torus: list[int], dilation: tuple[int, int]
) -> float:
    """`convolution_norm` by one product with the waves of the torus, so that each block lies in one piece."""
    peak = float(weight.abs().max())
    if not math.isfinite(peak):
        raise ValueError("encoder: expected finite weights, got a convolution with some that are not")
    if peak == 0:
        return 0.0
    taps = (weight / peak).permute(2, 3, 0, 1).flatten(2).flatten(0, 1)
    angles = _angles(list(weight.shape[2:]), torus, dilation).to(weight)
    parts = (torch.complex(part.cos() @ taps, part.sin() @ taps) for part in angles.split(FOURIER_BLOCKS))
    return peak * _proven_norm(part.unflatten(1, weight.shape[:2]) for part in parts)


def _angles(kernel: list[int], torus: list[int], dilation: tuple[int, int]) -> Float[Tensor, "block tap"]:
    """The angle of each tap at each frequency; one frequency of two whose blocks are conjugates, so of equal norm."""
    # a kernel of one tap has the same block at every frequency
    sides = [range(1 if k == 1 else n) for k, n in zip(kernel, torus, strict=True)]
    pairs = [(a, b) for a in sides[0] for b in sides[1] if (a, b) <= (-a % torus[0], -b % torus[1])]
    waves = torch.tensor(pairs, dtype=torch.float64) * (2 * math.pi) / torch.tensor(torus, dtype=torch.float64)
    places = torch.cartesian_prod(*(torch.arange(k) * d for k, d in zip(kernel, dilation, strict=True)))
    return waves @ places.double().T


def absolute_norm(weight: Float[Tensor, "out in kh kw"]) -> float:
    """An upper bound on the operator norm of the convolution with |W|, on images of any size.

    No entry of the block of any frequency is larger than that of frequency 0, whose entries are the sums over the
    kernel, and a matrix of larger entries, none negative, has no smaller norm.
    """
    return float(torch.linalg.matrix_norm(weight.double().abs().sum(dim=(2, 3)), ord=2))


def blocks_norm(blocks: Complex[Tensor, "block out in"]) -> float:
    """The largest singular value of any block; of large blocks a bound that exceeds it by less than 1e-8 of itself."""
    if blocks.shape[1:].numel() < LARGE:
        return float(torch.linalg.matrix_norm(blocks, ord=2).max())
    return _proven_norm(blocks.split(FOURIER_BLOCKS))


def _proven_norm(parts: Iterable[Complex[Tensor, "block out in"]]) -> float:
    """A bound on the largest singular value of many large matrices, few of which have any computed.

    The squares are the eigenvalues of the Gram matrices G. That the Cholesky factorisation of T - G succeeds proves
    that G has none above T, in a tenth of the time that its eigenvalues take. The rounding of G, of eigenvalues and of
    the factorisation is at most a few n (rows + columns) u T, n the smaller side: ``slack`` is more than their sum.

    Args:
        parts: the matrices, all of one shape, some at a time.
    Source: Higham 2002, theorem 10.3 (Cholesky) and equation 3.13 (products); Rump 2006 (proof by factorisation).
    """
    largest, slack = 0.0, 0.0
    for blocks in parts:
        rows, columns = blocks.shape[1:]
        slack = 8 * min(rows, columns) * (rows + columns) * torch.finfo(torch.float64).eps
        # the most promising one first, so that few eigenvalues have to be computed
        for i in _power_estimates(blocks).argsort(descending=True).tolist():
            gram = blocks[i] @ blocks[i].mH if rows < columns else blocks[i].mH @ blocks[i]
            below = gram.neg()
            below.diagonal().add_(largest)
            if not largest or torch.linalg.cholesky_ex(below).info:
                largest = max(largest, float(torch.linalg.eigvalsh(gram)[-1]) * (1 + slack))
    return math.sqrt(largest * (1 + slack))


def _power_estimates(blocks: Complex[Tensor, "block out in"]) -> Float[Tensor, " block"]:
    """About the largest singular value of each: which one is tried first depends on it, and no bound does."""
    towards = blocks.sum(dim=1, keepdim=True).mH
    for _ in range(_POWER_STEPS):
        pushed = blocks @ (towards / towards.norm(dim=1, keepdim=True).clamp_min(torch.finfo(torch.float64).tiny))
        # not blocks.mH @ pushed, which would copy all blocks
        towards = (pushed.mH @ blocks).mH
    return pushed.flatten(1).norm(dim=1)
