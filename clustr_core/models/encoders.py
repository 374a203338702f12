"""Encoders: images in [0, 1] -> embeddings. Pixel normalisation is their first layer, so that it is counted."""

import itertools
import math
from collections.abc import Callable, Sequence
from numbers import Integral
from typing import TypeVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from clustr_core.models.one_lipschitz import (
    AOLConv2d,
    CayleyConv2d,
    CPLConv2d,
    MaxMin,
    OrthogonalPointwise,
    PadChannels,
    SLLConv2d,
    orthogonal_linear,
    thin_orthogonal_linear,
)
from clustr_core.numerics.checks import check_version, is_name
from clustr_core.storage.gate import brief

ImageShape = tuple[int, int, int]
_Dense = Callable[[int, int], nn.Module]

PIXEL_STATISTICS = {
    "cifar": ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)),
    "svhn": ((0.4378, 0.4439, 0.4729), (0.1980, 0.2011, 0.1971)),
}


class Normalize(nn.Module):
    """(x - mean) / std, one value a channel, inside the model: its 1 / min(std) is part of the Lipschitz bound."""

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        if len(mean) != len(std) or min(std) <= 0:
            raise ValueError(f"std: expected one positive value for each of {len(mean)} means, got {list(std)}")
        self.register_buffer("mean", torch.tensor(mean).reshape(-1, 1, 1))
        self.register_buffer("std", torch.tensor(std).reshape(-1, 1, 1))

    def forward(
        self, images: Float[Tensor, "batch channel height width"]
    ) -> Float[Tensor, "batch channel height width"]:
        """Normalised images."""
        return (images - self.mean) / self.std


class SmallCNN(nn.Module):
    """Three 3x3 convolutions (width, 2 width, 2 width channels; strides 1, 2, 2), ReLU, and a linear embedding."""

    def __init__(self, image_shape: ImageShape, *, width: int = 32, embedding_dim: int = 64) -> None:
        super().__init__()
        channels, height, width_px = image_shape
        if min(height, width_px) < 4:
            raise ValueError(f"image_shape: expected at least 4 x 4 pixels, got {height} x {width_px}")
        self.embedding_dim = embedding_dim
        cells = -(-height // 4) * -(-width_px // 4)
        self.layers = nn.Sequential(
            nn.Conv2d(channels, width, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(width, 2 * width, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Conv2d(2 * width, 2 * width, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(2 * width * cells, embedding_dim),
        )

    def forward(self, images: Float[Tensor, "batch channel height width"]) -> Float[Tensor, "batch dim"]:
        """Embeddings."""
        return self.layers(images)


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions with batch norm, and a shortcut: ResNet-18's basic block, with the released names."""

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.shortcut = nn.Sequential()
        if stride != 1 or in_channels != channels:
            self.shortcut = nn.Sequential(
                nn.Conv2d(in_channels, channels, 1, stride=stride, bias=False), nn.BatchNorm2d(channels)
            )

    def forward(self, x: Float[Tensor, "batch channel height width"]) -> Float[Tensor, "batch out h w"]:
        """relu(branch(x) + shortcut(x))."""
        branch = self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x)))))
        return torch.relu(branch + self.shortcut(x))


class ResNet18(nn.Module):
    """The CIFAR ResNet-18 of the paper: a 3x3 stem without pooling, 4 x 2 basic blocks, global average pooling.

    Args:
        width: channels of the stem; the embedding has 8 * width dimensions (the paper: 64, hence 512).
        mean, std: pixel statistics of each channel, applied inside the model.
    Source: He et al. 2016; parameter names as in the paper's released code.
    """

    def __init__(self, *, width: int = 64, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.embedding_dim = 8 * width
        self.normalize = Normalize(mean, std)
        self.conv1 = nn.Conv2d(len(mean), width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.layer1 = _stage(width, width, stride=1)
        self.layer2 = _stage(width, 2 * width, stride=2)
        self.layer3 = _stage(2 * width, 4 * width, stride=2)
        self.layer4 = _stage(4 * width, 8 * width, stride=2)
        self.pool = nn.AdaptiveAvgPool2d(1)

    def forward(self, images: Float[Tensor, "batch channel height width"]) -> Float[Tensor, "batch dim"]:
        """Embeddings: the globally averaged features of the last stage."""
        x = torch.relu(self.bn1(self.conv1(_channels_first(self.normalize(images)))))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.pool(x).flatten(1)


def _channels_first(images: Tensor) -> Tensor:
    """Images of one channel, whose strides may be those of channels last too, in the layout that is safe to train in
    (`to_channels_last_frozen`)."""
    return images.reshape(-1).view(images.shape) if images.shape[1] == 1 else images


def to_channels_last_frozen(module: nn.Module) -> None:
    """Lay a finished network's weights out with channels last, in which convolutions are faster (benchmarks).

    They take no gradient any more: PyTorch 2.14 on a CPU writes past its memory where it takes that of a strided 1x1
    convolution in this layout. So training keeps the other layout.
    """
    module.requires_grad_(False).to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]


def _stage(in_channels: int, channels: int, stride: int) -> nn.Sequential:
    return nn.Sequential(ResidualBlock(in_channels, channels, stride), ResidualBlock(channels, channels, 1))


class LipschitzNet(nn.Module):
    """A chain of 1-Lipschitz layers, so 1-Lipschitz itself: pixels around grey, no further normalisation.

    ``layers`` is all there is to it; `lipschitz.lipschitz_upper_bound` says what the trained weights make of it.
    """

    def __init__(self, layers: Sequence[nn.Module], embedding_dim: int) -> None:
        super().__init__()
        self.embedding_dim = embedding_dim
        self.layers = nn.Sequential(*layers)

    def forward(self, images: Float[Tensor, "batch channel height width"]) -> Float[Tensor, "batch dim"]:
        """Embeddings."""
        return self.layers(images)


def _small_cnn(image_shape: ImageShape, width: int, dataset: str) -> SmallCNN:
    return SmallCNN(image_shape, width=width)


def _resnet18(image_shape: ImageShape, width: int, dataset: str) -> ResNet18:
    channels = image_shape[0]
    if dataset == "svhn":
        mean, std = PIXEL_STATISTICS["svhn"]
    elif channels == 3:
        mean, std = PIXEL_STATISTICS["cifar"]
    else:
        mean, std = (0.5,) * channels, (0.5,) * channels
    return ResNet18(width=width, mean=mean, std=std)


def _lip_mlp(dense: _Dense) -> "_Build":
    """Three dense orthogonal layers of width, width and width / 2, MaxMin between them."""

    def build(image_shape: ImageShape, width: int, dataset: str) -> LipschitzNet:
        _check_even(width)
        sizes = (math.prod(image_shape), width, width, width // 2)
        layers = [m for n, out in itertools.pairwise(sizes) for m in (dense(n, out), MaxMin())]
        return LipschitzNet([_grey(image_shape), nn.Flatten(), *layers[:-1]], sizes[-1])

    return build


def _lip_cnn(kind: str, *, thin: bool = False) -> "_Build":
    """Patches of 4 x 4 pixels become channels; four convolutions; 2 x 2 of the places become channels, which an
    orthogonal 1x1 convolution mixes and thins out; two dense orthogonal layers."""
    dense = thin_orthogonal_linear if thin else orthogonal_linear

    def build(image_shape: ImageShape, width: int, dataset: str) -> LipschitzNet:
        _check_even(width)
        channels, height, width_px = image_shape
        flat = width // 2 * (height // 8) * (width_px // 8)
        if height % 8 or width_px % 8 or 16 * channels > width or flat % 2:
            raise ValueError(
                f"image_shape, width: expected sides that are multiples of 8, a width of at least {16 * channels}, and "
                f"an even number of features (width / 2 for each 8 x 8 pixels), got {image_shape} and {width}"
            )
        layers: list[nn.Module] = [_grey(image_shape), nn.PixelUnshuffle(4), PadChannels(width)]
        for _ in range(4):
            layers += _convolution(kind, width, (height // 4, width_px // 4))
        layers += [nn.PixelUnshuffle(2), OrthogonalPointwise(4 * width, width // 2, thin=thin), nn.Flatten()]
        layers += [dense(flat, flat), MaxMin(), dense(flat, 4 * width)]
        return LipschitzNet(layers, 4 * width)

    return build


def _convolution(kind: str, channels: int, size: tuple[int, int]) -> list[nn.Module]:
    """A 1-Lipschitz convolution that keeps the shape, with its non-linearity: SLL and CPL have theirs inside."""
    if kind == "sll":
        return [SLLConv2d(channels)]
    if kind == "cpl":
        return [CPLConv2d(channels, size)]
    return [AOLConv2d(channels, channels) if kind == "aol" else CayleyConv2d(channels), MaxMin()]


def _grey(image_shape: ImageShape) -> Normalize:
    return Normalize((0.5,) * image_shape[0], (1.0,) * image_shape[0])


def _check_even(width: int) -> None:
    if width % 2:
        raise ValueError(f"width: expected an even number, since MaxMin sorts pairs, got {width}")


_Build = Callable[[ImageShape, int, str], nn.Module]
_Builder = TypeVar("_Builder", bound=_Build)
ENCODERS: dict[str, _Build] = {
    "small-cnn": _small_cnn,
    "resnet18": _resnet18,
    "lip-mlp": _lip_mlp(orthogonal_linear),
    "lip-mlp-thin": _lip_mlp(thin_orthogonal_linear),
    "lip-cnn": _lip_cnn("sll"),
    "lip-cnn-aol": _lip_cnn("aol"),
    "lip-cnn-cayley": _lip_cnn("cayley"),
    "lip-cnn-thin": _lip_cnn("sll", thin=True),
    "lip-cnn-cpl": _lip_cnn("cpl", thin=True),
}


_OURS = frozenset(ENCODERS)
# of encoders of one's own
OWN_VERSIONS: dict[str, int] = {}


def register_encoder(name: str, *, version: int = 1) -> Callable[[_Builder], _Builder]:
    """A decorator: a recipe may then name the encoder that the function builds, ``encoder="my-net"``.

    The function is called with the shape of an image (channels, height, width), the recipe's width and the name of its
    data. It returns a module from images in [0, 1] to embeddings [batch, dim] that has ``embedding_dim``. Its random
    weights come from the recipe's seed. A run is named by the encoder's name and version: another network needs another
    one. The module must have been imported before a run of it is loaded: a profile lists it under ``plugins``.

    Args:
        version: to be raised by one when the function builds another network than before: runs of the earlier one are
            not loaded as its own.
    Raises:
        ValueError: if the name is not one such as "my-net", or is an encoder of the package; if the version is no
            positive integer. An encoder may be registered again, as when a cell of a notebook is run twice: the last
            one counts.
    """
    check_version(version)
    if not is_name(name):
        raise ValueError(f"name: expected one such as 'my-net', got {name!r}")
    if name in _OURS:
        raise ValueError(f"name: expected a free one, got {name!r}, which is an encoder of the package")

    def register(build: _Builder) -> _Builder:
        ENCODERS[name], OWN_VERSIONS[name] = build, version
        return build

    return register


def build_encoder(name: str, image_shape: ImageShape, *, width: int, dataset: str = "") -> nn.Module:
    """A fresh encoder by name, for images of shape (channels, height, width).

    Args:
        name: "small-cnn" (8x8 and 28x28 images) or "resnet18" (the paper's); "lip-mlp" (dense), "lip-cnn" (SLL
            convolutions), "lip-cnn-aol", "lip-cnn-cayley", "lip-mlp-thin", "lip-cnn-thin" (the first two with cheaper
            dense layers) or "lip-cnn-cpl" (such with CPL convolutions), which are 1-Lipschitz, the last up to its
            estimate of a norm; or one of `register_encoder`.
        width: channels of the first layer; of "lip-mlp" its units.
        dataset: picks the pixel statistics of "resnet18": SVHN's for "svhn", CIFAR's for other colour images,
            0.5 and 0.5 otherwise.
    Raises:
        ValueError: if the name is unknown, or the width is not positive or does not suit the encoder; if an encoder of
            one's own is no module, has no ``embedding_dim``, or embeds an image in another shape.
    """
    if name not in ENCODERS:
        raise ValueError(f"encoder: expected one of {sorted(ENCODERS)}, got {brief(name)}")
    if width < 1:
        raise ValueError(f"width: expected at least 1, got {width}")
    encoder = ENCODERS[name](image_shape, width, dataset)
    if name not in _OURS:
        _check_own(name, encoder, image_shape)
    return encoder


def _check_own(name: str, encoder: object, image_shape: ImageShape) -> None:
    """Before anything is trained, one grey image must become one embedding."""
    if not isinstance(encoder, nn.Module):
        raise ValueError(f"encoder {name!r}: expected a torch module, got {type(encoder).__name__}")
    dim = getattr(encoder, "embedding_dim", None)
    if not isinstance(dim, Integral) or dim < 1:
        raise ValueError(f"encoder {name!r}: expected a positive integer embedding_dim, got {dim!r}")
    modes = {module: module.training for module in encoder.modules()}
    try:
        with torch.no_grad():
            found = encoder.eval()(torch.full((1, *image_shape), 0.5))
    except RuntimeError as error:
        raise ValueError(
            f"encoder {name!r}: expected one for float32 images of shape {image_shape}: {error}"
        ) from error
    for module, training in modes.items():
        module.training = training
    shape = list(found.shape) if isinstance(found, Tensor) else type(found).__name__
    if shape != [1, dim]:
        raise ValueError(f"encoder {name!r}: expected embeddings of shape [1, {dim}] of one image, got {shape}")
