"""Norms of convolutions: those of large ones are proven, not computed, and are the same but for 1e-8."""

import math

import pytest
import torch
import torch.nn.functional as F

from clustr_core.certificates import convolution
from clustr_core.certificates.convolution import absolute_norm, blocks_norm, convolution_norm

CASES = {
    "plain": ((6, 4, 3, 3), (6, 6), (1, 1), (1, 1)),
    "wide": ((4, 6, 3, 3), (5, 8), (1, 1), (1, 1)),
    "odd torus": ((5, 5, 3, 3), (5, 5), (1, 1), (1, 1)),
    "no padding": ((4, 4, 5, 5), (7, 6), (0, 0), (1, 1)),
    "dilated": ((4, 4, 3, 3), (7, 8), (2, 2), (2, 2)),
    "one row": ((4, 4, 1, 3), (4, 6), (0, 1), (1, 1)),
    "one tap": ((6, 4, 1, 1), (6, 5), (0, 0), (1, 1)),
    "larger than the image": ((4, 4, 5, 5), (2, 2), (1, 1), (1, 1)),
}
# the layers of the full-width ResNet-18: channels out, in, kernel, side, stride
LAYERS = [(128, 64, 3, 16, 2), (128, 128, 3, 8, 1), (256, 128, 1, 8, 2), (512, 256, 3, 4, 2)]


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture(params=[64, 3])
def all_large(monkeypatch, request):
    """Every matrix is large, and taken with all others or a few at a time."""
    monkeypatch.setattr(convolution, "LARGE", 1)
    monkeypatch.setattr(convolution, "FOURIER_BLOCKS", request.param)


def both(monkeypatch, weight, *where):
    """The singular values' answer, and the proven one."""
    monkeypatch.setattr(convolution, "LARGE", math.inf)
    computed = convolution_norm(weight, *where)
    monkeypatch.setattr(convolution, "LARGE", 1)
    return computed, convolution_norm(weight, *where)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("scale", [1.0, 1e-200, 1e200])
def test_a_proven_norm_is_the_computed_one(name, scale, monkeypatch):
    shape, *where = CASES[name]
    for seed in range(5):
        weight = scale * torch.randn(shape, generator=seeded(seed), dtype=torch.float64)
        computed, proven = both(monkeypatch, weight, *where)
        assert computed * (1 - 1e-14) <= proven <= computed * (1 + 1e-8)


def waves(shape, frequency, side):
    """A kernel as large as the torus that stretches one frequency only."""
    places = torch.arange(side, dtype=torch.float64)
    wave = torch.cos(2 * math.pi * (frequency[0] * places[:, None] + frequency[1] * places) / side)
    matrix = torch.linalg.qr(torch.randn(shape, generator=seeded(), dtype=torch.float64))[0]
    return matrix[:, :, None, None] * wave


@pytest.mark.parametrize("side", [4, 5])
def test_no_frequency_is_forgotten(side, monkeypatch):
    """One of two conjugate frequencies is left out, of an even and an odd torus; each one alone is the largest once."""
    for a in range(side):
        for b in range(side):
            weight = waves((3, 3), (a, b), side)
            weight = weight + 0.1 * torch.randn(weight.shape, generator=seeded(1), dtype=torch.float64)
            computed, proven = both(monkeypatch, weight, (side, side), (0, 0))
            assert computed * (1 - 1e-14) <= proven <= computed * (1 + 1e-8)


def hidden_peak():
    """Twenty alike matrices of norm 1, and one whose norm 3 lies where no power iteration from their sum looks."""
    blocks = torch.linalg.qr(torch.randn(21, 8, 8, generator=seeded(), dtype=torch.complex128))[0]
    start = blocks[7].sum(dim=0).conj()
    other = torch.randn(8, generator=seeded(1), dtype=torch.complex128)
    other = other - start * (start.conj() @ other) / start.norm() ** 2
    # along one singular vector that is orthogonal to where the iteration starts: it stays so
    unit = other / other.norm()
    blocks[7] = blocks[7] + 2 * (blocks[7] @ unit)[:, None] * unit.conj()
    assert float(torch.linalg.matrix_norm(blocks[7], ord=2)) == pytest.approx(3)
    return blocks


def test_a_norm_that_power_iteration_misses_is_proven(all_large):
    assert 3 * (1 - 1e-14) <= blocks_norm(hidden_peak()) <= 3 * (1 + 1e-8)


def test_the_factorisation_is_what_proves_it(all_large, monkeypatch):
    """So the test above can fail: had each factorisation succeeded, the peak would have been missed."""
    done = torch.linalg.cholesky_ex(torch.eye(8, dtype=torch.complex128))
    monkeypatch.setattr(torch.linalg, "cholesky_ex", lambda matrix: done)
    monkeypatch.setattr(convolution, "_power_estimates", lambda blocks: -torch.arange(len(blocks)).double())
    assert blocks_norm(hidden_peak()) < 1.1


@pytest.mark.parametrize("layer", LAYERS, ids=str)
def test_a_large_layer_is_bounded_and_closely(layer):
    """Above what power iteration of the real, zero-padded layer reaches, and not far above it."""
    out, channels, kernel, side, stride = layer
    weight = torch.randn(out, channels, kernel, kernel, generator=seeded(), dtype=torch.float64)
    assert weight.shape[:2].numel() >= convolution.LARGE
    bound, padding = convolution_norm(weight, (side, side), (kernel // 2, kernel // 2)), kernel // 2
    x = torch.randn(1, channels, side, side, generator=seeded(1), dtype=torch.float64)
    for _ in range(40):
        pushed = F.conv2d(x / x.norm(), weight, stride=stride, padding=padding)
        extra = (side + 2 * padding - kernel) % stride
        x = F.conv_transpose2d(pushed, weight, stride=stride, padding=padding, output_padding=extra)
    # a stride drops three of four outputs: up to a factor of two
    assert pushed.norm() <= bound <= 1.2 * stride * pushed.norm()


def test_nothing_and_no_number(all_large):
    assert convolution_norm(torch.zeros(3, 3, 3, 3), (4, 4), (1, 1)) == 0
    for bad in (math.nan, math.inf):
        with pytest.raises(ValueError, match="expected finite weights, got a convolution with some that are not"):
            convolution_norm(torch.full((3, 3, 3, 3), bad), (4, 4), (1, 1))


def test_hard_weights_are_proven_too(monkeypatch):
    """All blocks alike, so that every one is a rival; one channel that is far from the others."""
    alike = torch.zeros(128, 64, 3, 3, dtype=torch.float64)
    alike[:, :, 1, 1] = torch.randn(128, 64, generator=seeded(0), dtype=torch.float64)
    scaled = torch.randn(128, 64, 3, 3, generator=seeded(1), dtype=torch.float64)
    scaled[0] *= 1e12
    for weight in (alike, scaled, scaled * 1e-200):
        computed, proven = both(monkeypatch, weight, (4, 4), (1, 1))
        assert computed * (1 - 1e-14) <= proven <= computed * (1 + 1e-8)


@pytest.mark.parametrize("name", CASES)
def test_the_norm_of_absolute_weights_is_that_of_their_sums(name):
    shape, *where = CASES[name]
    weight = torch.randn(shape, generator=seeded(), dtype=torch.float64)
    assert absolute_norm(weight) == pytest.approx(convolution_norm(weight.abs(), *where))
    assert absolute_norm(weight) >= convolution_norm(weight, *where)
