"""Layers that no two inputs can be moved apart by: 1-Lipschitz in L2 by construction, whatever their weights.

Convolutions are zero-padded and keep the image's size but for `CayleyConv2d`, which wraps around. That a layer is
1-Lipschitz is not taken on trust anywhere: `lipschitz.lipschitz_upper_bound` computes it from the trained weights.
"""

import math
from typing import TypeVar

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import orthogonal

_Module = TypeVar("_Module", bound=nn.Module)
# of the power iteration of a layer's norm: before anything is trained, and for weights that are evaluated
_FIRST_ITERATIONS = 30
_SETTLING_ITERATIONS = 300


class MaxMin(nn.Module):
    """(max(a, b), min(a, b)) of the two halves a, b of the channels: it sorts pairs, so it loses no gradient.

    Raises:
        ValueError: if the number of channels is odd.
    Source: Anil et al. 2019 (GroupSort of groups of two).
    """

    def forward(self, x: Float[Tensor, "batch channel ..."]) -> Float[Tensor, "batch channel ..."]:
        """Larger halves first."""
        if x.shape[1] % 2:
            raise ValueError(f"x: expected an even number of channels, got {x.shape[1]}")
        a, b = x.chunk(2, dim=1)
        return torch.cat([torch.maximum(a, b), torch.minimum(a, b)], dim=1)


class OrthogonalPointwise(nn.Module):
    """A 1x1 convolution whose matrix has orthonormal rows or columns: it mixes channels, and changes their number.

    Args:
        thin: by `thin_orthogonal_linear`.
    Source: as `orthogonal_linear`.
    """

    def __init__(self, in_channels: int, out_channels: int, *, thin: bool = False) -> None:
        super().__init__()
        self.linear = (thin_orthogonal_linear if thin else orthogonal_linear)(in_channels, out_channels)

    def forward(self, images: Float[Tensor, "batch channel height width"]) -> Float[Tensor, "batch out height width"]:
        """The image with its channels mixed."""
        return F.conv2d(images, self.linear.weight[:, :, None, None], self.linear.bias)


class PadChannels(nn.Module):
    """Zero channels behind the image's own: an isometry.

    Raises:
        ValueError: if the image has more channels than asked for.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.channels = channels

    def forward(
        self, images: Float[Tensor, "batch channel height width"]
    ) -> Float[Tensor, "batch padded height width"]:
        """The image with ``channels`` channels."""
        missing = self.channels - images.shape[1]
        if missing < 0:
            raise ValueError(f"images: expected at most {self.channels} channels, got {images.shape[1]}")
        return F.pad(images, (0, 0, 0, 0, 0, missing))


class SLLConv2d(nn.Module):
    """x - W^T diag(t) relu(W x + b), W a convolution: the SDP-based residual layer, 1-Lipschitz for every W, b and q.

    t_i = 2 / sum_j |W W^T|_ij q_j / q_i, with q = exp(``log_scale``) > 0, makes W^T diag(t) W at most 2, and then no
    slope of the ReLU, all of which lie in [0, 1], can make I - W^T diag(t) diag(slope) W longer than 1.

    Args:
        channels: of the image, in and out.
        kernel_size: odd.
        inner: rows of W; None for as many as ``channels``.
    Source: Araujo et al. 2023, theorem 3 and its convolutional form. For zero padding, |W W^T| summed over all offsets
        is at least every row sum of the matrix, so t is never too large.
    """

    def __init__(self, channels: int, kernel_size: int = 3, *, inner: int | None = None) -> None:
        super().__init__()
        _check_kernel(kernel_size)
        self.kernel_size = kernel_size
        self.weight = nn.Parameter(torch.empty(inner or channels, channels, kernel_size, kernel_size))
        self.bias = nn.Parameter(torch.zeros(inner or channels))
        self.log_scale = nn.Parameter(torch.zeros(inner or channels))
        nn.init.xavier_normal_(self.weight)

    def step(self) -> Float[Tensor, " inner"]:
        """t of each row."""
        overlap = F.conv2d(self.weight, self.weight, padding=self.kernel_size - 1).abs().sum(dim=(2, 3))
        return _sll_step(overlap, self.log_scale)

    def forward(
        self, images: Float[Tensor, "batch channel height width"]
    ) -> Float[Tensor, "batch channel height width"]:
        """The image, moved."""
        padding = self.kernel_size // 2
        inner = F.conv2d(images, self.weight, self.bias, padding=padding).relu() * self.step()[:, None, None]
        return images - F.conv_transpose2d(inner, self.weight, padding=padding)


class CPLConv2d(SLLConv2d):
    """x - (2 / s^2) W^T relu(W x + b), W a convolution and s an estimate of its norm: the convex potential layer.

    The norm is that on a torus into which the image fits with its padding, as the bound of `lipschitz_upper_bound` is:
    the largest norm of any of its Fourier blocks. The estimate is a power iteration's in each block: a step at each
    training pass, and many, once, for weights that are evaluated. It is never above the norm, so the layer may stretch
    a little; that bound says by how much.

    Args:
        channels: of the image, in and out.
        size: height and width of the image.
        kernel_size: odd.
    Source: Meunier et al. 2022, theorem 1. Deviation: power iteration by frequency, where theirs is of the whole
        convolution, which on a torus can never leave the frequencies that it has once lost.
    """

    vectors: Tensor
    waves: Tensor

    def __init__(self, channels: int, size: tuple[int, int], kernel_size: int = 3) -> None:
        super().__init__(channels, kernel_size)
        del self.log_scale
        waves = _waves(size, kernel_size)
        self.register_buffer("waves", waves, persistent=False)
        self.register_buffer("vectors", torch.randn(len(waves), 2, channels))
        self._kept: tuple[object, Tensor] | None = None
        self.vectors = self._iterated(self.vectors, _FIRST_ITERATIONS)

    def step(self) -> Float[Tensor, " inner"]:
        """2 / s^2, once a row."""
        with torch.autocast(self.weight.device.type, enabled=False):
            if self.training:
                # another tensor, since the graph of the last pass may hold the old one
                self.vectors = self._iterated(self.vectors, 1)
            vectors = self.vectors if self.training else self._settled()
            with torch.no_grad():
                longest = _complex_product(self._blocks(self.waves), vectors).square().sum(dim=(1, 2)).argmax()[None]
            squared = _complex_product(self._blocks(self.waves[longest]), vectors[longest]).square().sum()
        return (2 / squared.clamp_min(torch.finfo(squared.dtype).tiny ** 0.5)).expand(len(self.weight))

    def _settled(self) -> Tensor:
        """The vectors after many steps, computed once for the weights as they are."""
        of = (self.weight.data_ptr(), self.weight._version, self.weight.dtype)
        if self._kept is None or self._kept[0] != of:
            self._kept = of, self._iterated(self.vectors, _SETTLING_ITERATIONS)
        return self._kept[1]

    def _blocks(self, waves: Tensor) -> Float[Tensor, "wave two inner channel"]:
        """Real and imaginary parts of the Fourier blocks."""
        return torch.einsum("oik,wtk->wtoi", self.weight.flatten(2), waves)

    @torch.no_grad()
    def _iterated(self, vectors: Tensor, steps: int) -> Tensor:
        """Steps of v <- W^* W v in each block."""
        blocks = self._blocks(self.waves)
        adjoint = torch.stack([blocks[:, 0], -blocks[:, 1]], dim=1).transpose(2, 3)
        for _ in range(steps):
            moved = _complex_product(adjoint, _complex_product(blocks, vectors))
            unit = F.normalize(moved.flatten(1), dim=1, eps=torch.finfo(moved.dtype).tiny).view_as(moved)
            # a block of zeros turns nothing, and leaves its vector for when it is one no more
            vectors = torch.where(moved.square().sum(dim=(1, 2), keepdim=True) > 0, unit, vectors)
        return vectors


class SLLLinear(nn.Module):
    """`SLLConv2d` for vectors: x - W^T diag(t) relu(W x + b).

    Args:
        dim: of the vector, in and out.
        inner: rows of W; None for as many as ``dim``.
    Source: Araujo et al. 2023, theorem 3.
    """

    def __init__(self, dim: int, *, inner: int | None = None) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(inner or dim, dim))
        self.bias = nn.Parameter(torch.zeros(inner or dim))
        self.log_scale = nn.Parameter(torch.zeros(inner or dim))
        nn.init.xavier_normal_(self.weight)

    def step(self) -> Float[Tensor, " inner"]:
        """t of each row."""
        return _sll_step((self.weight @ self.weight.T).abs(), self.log_scale)

    def forward(self, x: Float[Tensor, "batch dim"]) -> Float[Tensor, "batch dim"]:
        """The vector, moved."""
        return x - (F.linear(x, self.weight, self.bias).relu() * self.step()) @ self.weight


class AOLConv2d(nn.Module):
    """W diag(s) x + b with s_i = (sum_j |W^T W|_ij)^(-1/2): a rescaled convolution, almost orthogonal after training.

    Args:
        in_channels, out_channels: of the image before and after.
        kernel_size: odd.
    Source: Prach and Lampert 2022, theorem 2 (zero padding as in `SLLConv2d`).
    """

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int = 3) -> None:
        super().__init__()
        _check_kernel(kernel_size)
        self.kernel_size = kernel_size
        self.weight = nn.Parameter(torch.empty(out_channels, in_channels, kernel_size, kernel_size))
        self.bias = nn.Parameter(torch.zeros(out_channels))
        nn.init.dirac_(self.weight)
        with torch.no_grad():
            self.weight += 1e-3 * torch.randn_like(self.weight)

    def effective_weight(self) -> Float[Tensor, "out in kernel kernel"]:
        """W diag(s)."""
        columns = self.weight.transpose(0, 1)
        overlap = F.conv2d(columns, columns, padding=self.kernel_size - 1).abs().sum(dim=(1, 2, 3))
        return self.weight * _inverse_root(overlap)[:, None, None]

    def forward(self, images: Float[Tensor, "batch channel height width"]) -> Float[Tensor, "batch out height width"]:
        """The convolved image."""
        return F.conv2d(images, self.effective_weight(), self.bias, padding=self.kernel_size // 2)


class AOLLinear(nn.Module):
    """diag(s) W x + b with s_i = (sum_j |W W^T|_ij)^(-1/2): AOL's bound transposed, for few rows and many columns.

    Source: Prach and Lampert 2022, theorem 1, applied to W^T.
    """

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_features, in_features))
        self.bias = nn.Parameter(torch.zeros(out_features))
        nn.init.orthogonal_(self.weight)

    def effective_weight(self) -> Float[Tensor, "out in"]:
        """diag(s) W."""
        return self.weight * _inverse_root((self.weight @ self.weight.T).abs().sum(dim=1))[:, None]

    def forward(self, x: Float[Tensor, "batch in"]) -> Float[Tensor, "batch out"]:
        """The image of the vector."""
        return F.linear(x, self.effective_weight(), self.bias)


class CayleyConv2d(nn.Module):
    """An orthogonal convolution that wraps around the image's edges: in the Fourier basis, (I + A)^-1 (I - A).

    A = V - V^* is skew-Hermitian at each frequency, V the transform of a free weight, so each block is unitary.

    Args:
        channels: of the image, in and out.
        kernel_size: of the free weight; the orthogonal kernel is as large as the image.
    Source: Trockman and Kolter 2021, without their learnt norm of the weight.
    """

    def __init__(self, channels: int, kernel_size: int = 3) -> None:
        super().__init__()
        _check_kernel(kernel_size)
        self.weight = nn.Parameter(torch.empty(channels, channels, kernel_size, kernel_size))
        self.bias = nn.Parameter(torch.zeros(channels))
        nn.init.kaiming_uniform_(self.weight, a=5**0.5)

    def blocks(self, height: int, width: int) -> Tensor:
        """The unitary block of each frequency of a real image, [height, width // 2 + 1, channel, channel]."""
        free = torch.fft.rfft2(self.weight, s=(height, width)).permute(2, 3, 0, 1)
        skew = free - free.mH
        one = torch.eye(free.shape[-1], dtype=free.dtype, device=free.device)
        return torch.linalg.solve(one + skew, one - skew)

    def forward(
        self, images: Float[Tensor, "batch channel height width"]
    ) -> Float[Tensor, "batch channel height width"]:
        """The convolved image."""
        size = images.shape[2:]
        spectrum = torch.fft.rfft2(images).permute(2, 3, 1, 0)
        moved = self.blocks(*size) @ spectrum
        return torch.fft.irfft2(moved.permute(3, 2, 0, 1), s=size) + self.bias[:, None, None]


def orthogonal_linear(in_features: int, out_features: int, *, bias: bool = True) -> nn.Linear:
    """A dense layer with orthonormal rows or columns, by PyTorch's Cayley parametrisation; on the device "meta", where
    there are no numbers, a dense layer of that shape.

    Source: Helfrich et al. 2018, through `torch.nn.utils.parametrizations.orthogonal`.
    """
    linear = nn.Linear(in_features, out_features, bias=bias)
    if linear.weight.is_meta:
        return linear
    return orthogonal(linear, orthogonal_map="cayley")  # pyright: ignore[reportReturnType]


class ThinCayley(nn.Module):
    """[(I - A)(I + A)^-1; -2 V (I + A)^-1], A = U - U^T + V^T V: orthonormal columns from any matrix [U; V].

    A matrix of more columns than rows is turned before and after. One system of the smaller side is solved, where
    PyTorch's own parametrisation solves one of the larger.

    Source: Wang and Manchester 2023, section 4; Trockman and Kolter 2021, for the square part.
    """

    def forward(self, free: Float[Tensor, "row column"]) -> Float[Tensor, "row column"]:
        """The matrix with orthonormal columns, or rows if there are fewer."""
        wide = free.shape[0] < free.shape[1]
        found = _thin_cayley(free.T if wide else free)
        return found.T if wide else found


def thin_orthogonal_linear(in_features: int, out_features: int, *, bias: bool = True) -> nn.Linear:
    """`orthogonal_linear` by `ThinCayley`: as expressive, and cheaper the more its two sides differ."""
    linear = nn.Linear(in_features, out_features, bias=bias)
    tall = torch.empty(max(in_features, out_features), min(in_features, out_features))
    small = tall.shape[1]
    # what is below the square is orthonormal to begin with, so that no input is left out by most of the columns
    nn.init.orthogonal_(tall[small:])
    nn.init.normal_(tall[:small], std=small**-0.5)
    with torch.no_grad():
        linear.weight.copy_(tall if out_features >= in_features else tall.T)
    parametrize.register_parametrization(linear, "weight", ThinCayley())
    return linear


def fold_parametrizations(module: _Module) -> _Module:
    """The module with each parametrised weight computed once and for all, for evaluation: the same function, faster.

    In place, but for what other modules share: a deep copy has its class in common with the original, and tied layers
    their weights, so neither a class nor a tensor is written to (`parametrize.remove_parametrizations` writes to both).
    """
    layers = [layer for layer in module.modules() if parametrize.is_parametrized(layer)]
    # all are computed before any is replaced: one layer's weight may be made of another's
    weights = [
        {name: _folded(layer, made, name) for name, made in layer.parametrizations.items()}  # pyright: ignore[reportCallIssue, reportAttributeAccessIssue]
        for layer in layers
    ]
    for layer, found in zip(layers, weights, strict=True):
        layer.__class__ = parametrize.type_before_parametrizations(layer)
        del layer.parametrizations
        for name, weight in found.items():
            if isinstance(weight, nn.Parameter):
                layer.register_parameter(name, weight)
            else:
                layer.register_buffer(name, weight)
    return module


def _thin_cayley(free: Tensor) -> Tensor:
    top, rest = free[: free.shape[1]], free[free.shape[1] :]
    moved = top - top.T + rest.T @ rest
    one = torch.eye(len(moved), dtype=free.dtype, device=free.device)
    inverse = torch.linalg.inv(one + moved)
    return torch.cat([(one - moved) @ inverse, -2 * rest @ inverse])


def _folded(layer: nn.Module, parametrization: nn.Module, name: str) -> Tensor:
    """A tensor of its own, a parameter if any tensor that it is made of is one."""
    with torch.no_grad():
        weight = getattr(layer, name).clone()
    sources = list(parametrization.parameters(recurse=False))
    return nn.Parameter(weight, any(each.requires_grad for each in sources)) if sources else weight


def _waves(size: tuple[int, int], kernel_size: int) -> Float[Tensor, "wave two tap"]:
    """Cosine and sine of each tap's angle, at each frequency of a real image on a torus with room for the padding."""
    height, width = (side + kernel_size - 1 for side in size)
    taps = torch.cartesian_prod(*[torch.arange(kernel_size, dtype=torch.float64)] * 2)
    turns = torch.cartesian_prod(
        torch.arange(height, dtype=torch.float64) / height, torch.arange(width // 2 + 1, dtype=torch.float64) / width
    )
    angles = 2 * math.pi * (turns @ taps.T)
    return torch.stack([angles.cos(), -angles.sin()], dim=1).to(torch.get_default_dtype())


def _complex_product(
    matrices: Float[Tensor, "wave two row column"], vectors: Float[Tensor, "wave two column"]
) -> Float[Tensor, "wave two row"]:
    """Products of complex matrices and vectors, each given as its real and its imaginary part."""
    real, imaginary = (torch.einsum("wrc,wtc->wtr", matrices[:, part], vectors) for part in (0, 1))
    return torch.stack([real[:, 0] - imaginary[:, 1], real[:, 1] + imaginary[:, 0]], dim=1)


def _sll_step(overlap: Float[Tensor, "inner inner"], log_scale: Float[Tensor, " inner"]) -> Float[Tensor, " inner"]:
    """t of each row; 0 of a row of zeros, or so near to it that t or its gradient could overflow.

    Such a row moves next to nothing, and every smaller t is 1-Lipschitz as well, as every positive scale is: scales are
    kept where neither they nor their sums overflow.
    """
    limits = torch.finfo(overlap.dtype)
    widest = math.log(limits.max) / 4
    scale = log_scale.clamp(-widest, widest).exp()
    total = overlap @ scale
    some = total > min(limits.tiny**0.375, 1e-4) * scale.sqrt()
    return (2 * scale / total.where(some, 1)) * some


def _inverse_root(overlap: Float[Tensor, " row"]) -> Float[Tensor, " row"]:
    return overlap.clamp_min(torch.finfo(overlap.dtype).tiny).rsqrt()


def _check_kernel(kernel_size: int) -> None:
    if kernel_size < 1 or kernel_size % 2 == 0:
        raise ValueError(f"kernel_size: expected an odd number, got {kernel_size}")
