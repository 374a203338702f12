"""Lipschitz constants in L2: a sound upper bound, and an empirical lower one. They are not the same thing.

An upper bound turns a feature distance into a certified input radius. A lower bound certifies nothing; it says
how loose the upper one may be.
"""

import math
from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor, nn
from tqdm.auto import tqdm

from clustr_core.models.encoders import ImageShape, LipschitzNet, Normalize, ResidualBlock, ResNet18, SmallCNN
from clustr_core.models.one_lipschitz import (
    AOLConv2d,
    AOLLinear,
    CayleyConv2d,
    MaxMin,
    OrthogonalPointwise,
    PadChannels,
    SLLConv2d,
    SLLLinear,
)
from clustr_core.numerics.distances import flat_norm, per_item

Shapes = dict[nn.Module, torch.Size]


def lipschitz_upper_bound(encoder: nn.Module, image_shape: ImageShape) -> float:
    """A constant L with ||f(x) - f(x')|| <= L ||x - x'|| for all images: the product of the layers' norms.

    Affine neighbours (normalisation, convolution, batch norm) are merged before their norm is taken; a residual
    block counts the sum of its branch and its shortcut; ReLU and MaxMin count 1. The layers of `one_lipschitz` are not
    trusted: their norms are taken from the weights they really use, like all others. Norms are computed in float64 and
    rounded up.

    Args:
        encoder: in evaluation mode, made of the layers of `clustr_core.encoders` and of common `torch.nn` layers.
        image_shape: (channels, height, width); the norm of a convolution depends on the size it is applied to.
    Raises:
        ValueError: if batch norm is in training mode, where it is not even a function of one image.
        TypeError: for a layer without a known bound.
    Source: Tsuzuku et al. 2018 (product bound); Sedghi et al. 2019 (convolution by FFT), with the zero padding
        turned into a bound as `convolution_norm` says.
    """
    check_evaluation_mode(encoder)
    shapes = input_shapes(encoder, image_shape)
    # the float64 norms carry a relative error near 1e-13 a layer
    return layer_bound(encoder, shapes) * (1 + 1e-9)


def check_evaluation_mode(encoder: nn.Module) -> None:
    """Refuse batch norm in training mode, where an embedding depends on the whole batch.

    Raises:
        ValueError: if there is any.
    """
    if any(m.training for m in encoder.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)):
        raise ValueError("encoder: expected evaluation mode, got batch norm in training mode")


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
    spread = weight.new_zeros(*weight.shape[:2], *kernel, dtype=torch.float64)
    spread[:, :, :: dilation[0], :: dilation[1]] = weight.double()
    blocks = torch.fft.rfft2(spread, s=torus).permute(2, 3, 0, 1)
    return float(torch.linalg.matrix_norm(blocks, ord=2).max())


def lipschitz_lower_bound(
    encoder: nn.Module,
    images: Float[Tensor, "batch channel height width"],
    *,
    iterations: int = 20,
    seed: int = 0,
    progress: bool = False,
) -> float:
    """The largest gain ||J v|| / ||v|| of the encoder's Jacobian that power iteration finds at the given images.

    It is reached, to first order, by a real pair of neighbouring images, so no Lipschitz constant is smaller.

    Args:
        iterations: steps of v <- J^T J v at each image, from a random start.
    Raises:
        ValueError: if there is no image or no iteration.
    """
    if not len(images) or iterations < 1:
        raise ValueError(f"images, iterations: expected at least one of each, got {len(images)} and {iterations}")
    generator = torch.Generator(images.device).manual_seed(seed)
    v = torch.randn(images.shape, generator=generator, device=images.device, dtype=images.dtype)
    gain = images.new_zeros(len(images))
    for _ in tqdm(range(iterations), desc="power iteration", disable=not progress):
        v = v / per_item(flat_norm(v), v).clamp_min(torch.finfo(v.dtype).tiny)
        pushed = torch.as_tensor(torch.autograd.functional.jvp(encoder, images, v)[1])
        gain = flat_norm(pushed).maximum(gain)
        v = torch.as_tensor(torch.autograd.functional.vjp(encoder, images, pushed)[1])
    return float(gain.max())


def input_shapes(encoder: nn.Module, image_shape: ImageShape) -> Shapes:
    """The input shape of every layer, from one forward pass of a blank image."""
    shapes: Shapes = {}

    def note(module: nn.Module, inputs: tuple[Tensor, ...], _: Tensor) -> None:
        if not inputs:  # the parametrisation of a weight, which sees no image
            return
        shape = inputs[0].shape[1:]
        if shapes.setdefault(module, shape) != shape:
            raise TypeError(f"encoder: one {type(module).__name__} is used at two sizes, {shapes[module]} and {shape}")

    hooks = [module.register_forward_hook(note) for module in encoder.modules()]
    example = next(iter([*encoder.parameters(), *encoder.buffers()]), torch.zeros(()))
    try:
        with torch.no_grad():
            encoder(example.new_zeros(1, *image_shape))
    finally:
        for hook in hooks:
            hook.remove()
    return shapes


def layer_bound(module: nn.Module, shapes: Shapes) -> float:
    """The Lipschitz bound of one layer, or of a chain, on inputs of the shapes of `input_shapes`.

    Raises:
        TypeError: for a layer without a known bound.
    """
    for kind, rule in _RULES.items():
        if computes(module, kind):
            return rule(module, shapes)
    raise TypeError(f"encoder: no Lipschitz bound is known for the layer {type(module).__name__}")


def computes(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether a module computes what a kind of layer computes: it is one, and neither a subclass nor an attribute of
    its own nor a hook puts something else in place of that."""
    if not isinstance(module, kind) or module._forward_hooks or module._forward_pre_hooks:
        return False
    names = [name for name in ("forward", "_conv_forward") if hasattr(kind, name)]
    return all(name not in vars(module) and getattr(type(module), name) is getattr(kind, name) for name in names)


def _chain(layers: list[nn.Module], shapes: Shapes) -> float:
    """Product over a chain, each convolution or linear layer merged with the scalings beside it."""
    total, position = 1.0, 0
    while position < len(layers):
        stop = _merged_run(layers, position)
        run = layers[position:stop]
        total *= _merged_norm(run, shapes) if len(run) > 1 else layer_bound(run[0], shapes)
        position = stop
    return total


def _merged_run(layers: list[nn.Module], start: int) -> int:
    """End of the longest run [Normalize] convolution [batch norm] that begins at ``start``."""
    stop = start + (computes(layers[start], Normalize) and start + 1 < len(layers))
    if not computes(layers[stop], nn.Conv2d):
        return start + 1
    stop += 1
    return stop + (stop < len(layers) and computes(layers[stop], nn.BatchNorm2d))


def _merged_norm(run: list[nn.Module], shapes: Shapes) -> float:
    conv = next(layer for layer in run if isinstance(layer, nn.Conv2d))
    weight = _grouped_weight(conv)
    if isinstance(run[0], Normalize):
        weight = weight / run[0].std.double().reshape(1, -1, 1, 1)
    if isinstance(run[-1], nn.BatchNorm2d):
        weight = weight * _batch_norm_scale(run[-1]).reshape(-1, 1, 1, 1)
    return _convolution_bound(conv, weight, shapes)


def _convolution_bound(conv: nn.Conv2d, weight: Tensor, shapes: Shapes) -> float:
    if conv.padding_mode != "zeros" or isinstance(conv.padding, str):
        raise TypeError(f"encoder: expected zero padding given in pixels, got {conv.padding_mode}, {conv.padding}")
    height, width = shapes[conv][1:]
    return convolution_norm(weight, (height, width), conv.padding, conv.dilation)  # pyright: ignore[reportArgumentType]


def _grouped_weight(conv: nn.Conv2d) -> Tensor:
    """The weight of a grouped convolution written out as a full, block-diagonal one, in float64."""
    weight = conv.weight.detach().double()
    if conv.groups == 1:
        return weight
    full = weight.new_zeros(conv.out_channels, conv.in_channels, *weight.shape[2:])
    rows, columns = conv.out_channels // conv.groups, conv.in_channels // conv.groups
    for g in range(conv.groups):
        full[g * rows : (g + 1) * rows, g * columns : (g + 1) * columns] = weight[g * rows : (g + 1) * rows]
    return full


def _batch_norm_scale(norm: nn.BatchNorm2d | nn.BatchNorm1d) -> Tensor:
    """|gamma / sqrt(running variance + eps)| of each channel: batch norm in evaluation mode is diagonal."""
    if norm.running_var is None:
        raise TypeError("encoder: expected batch norm with running statistics, got one without")
    gamma = norm.weight.detach().double() if norm.weight is not None else 1.0
    return gamma / (norm.running_var.double() + norm.eps).sqrt()


def _residual_block(block: ResidualBlock, shapes: Shapes) -> float:
    branch = _chain([block.conv1, block.bn1], shapes) * _chain([block.conv2, block.bn2], shapes)
    return branch + _chain(list(block.shortcut), shapes)


def _resnet18(net: ResNet18, shapes: Shapes) -> float:
    stem = _chain([net.normalize, net.conv1, net.bn1], shapes)
    stages = [layer_bound(stage, shapes) for stage in (net.layer1, net.layer2, net.layer3, net.layer4)]
    return stem * math.prod(stages) * layer_bound(net.pool, shapes)


def _global_average(pool: nn.AdaptiveAvgPool2d, shapes: Shapes) -> float:
    if pool.output_size not in (1, (1, 1)):
        raise TypeError(f"encoder: expected adaptive pooling to 1 x 1, got {pool.output_size}")
    return 1 / math.sqrt(math.prod(shapes[pool][1:]))


def _sll(layer: SLLConv2d | SLLLinear, shapes: Shapes) -> float:
    """||I - M^T D M|| for every diagonal 0 <= D <= 1 is at most max(1, ||M||^2 - 1), M = diag(t)^(1/2) W."""
    step, weight = layer.step().detach().double(), layer.weight.detach().double()
    rows = step.sqrt().reshape(-1, *[1] * (weight.dim() - 1)) * weight
    return max(1.0, _norm_of(rows, layer, shapes) ** 2 - 1)


def _aol(layer: AOLConv2d | AOLLinear, shapes: Shapes) -> float:
    return _norm_of(layer.effective_weight().detach().double(), layer, shapes)


def _cayley(layer: CayleyConv2d, shapes: Shapes) -> float:
    """This convolution does wrap around, so its blocks at the image's own size are all of it."""
    height, width = shapes[layer][1:]
    blocks = layer.blocks(height, width).detach().to(torch.complex128)
    return float(torch.linalg.matrix_norm(blocks, ord=2).max())


def _norm_of(weight: Tensor, layer: nn.Module, shapes: Shapes) -> float:
    """The norm of a matrix, or of a zero-padded convolution that keeps the size of what the layer was given."""
    if weight.dim() == 2:
        return float(torch.linalg.matrix_norm(weight, ord=2))
    height, width = shapes[layer][1:]
    padding = weight.shape[2] // 2
    return convolution_norm(weight, (height, width), (padding, padding))


def _average(pool: nn.AvgPool2d, shapes: Shapes) -> float:
    if pool.ceil_mode or pool.divisor_override or not pool.count_include_pad:
        raise TypeError("encoder: expected average pooling with its plain divisor")
    kernel = torch.full((1, 1, *_pair(pool.kernel_size)), 1 / math.prod(_pair(pool.kernel_size)), dtype=torch.float64)
    if _pair(pool.kernel_size) == _pair(pool.stride):
        return float(kernel.norm())
    height, width = shapes[pool][1:]
    return convolution_norm(kernel, (height, width), _pair(pool.padding))


def _max(pool: nn.MaxPool2d, shapes: Shapes) -> float:
    """Each input enters at most prod ceil(kernel / stride) windows, and each window is 1-Lipschitz."""
    if _pair(pool.dilation) != (1, 1):
        raise TypeError(f"encoder: expected max pooling without dilation, got {pool.dilation}")
    overlap = [-(-k // s) for k, s in zip(_pair(pool.kernel_size), _pair(pool.stride), strict=True)]
    return math.sqrt(math.prod(overlap))


def _pair(value: int | tuple[int, ...]) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else (value[0], value[1])


_RULES: dict[type[nn.Module], Callable[..., float]] = {
    nn.Conv2d: lambda m, shapes: _convolution_bound(m, _grouped_weight(m), shapes),
    nn.Linear: lambda m, _: float(torch.linalg.matrix_norm(m.weight.detach().double(), ord=2)),
    nn.BatchNorm2d: lambda m, _: float(_batch_norm_scale(m).abs().max()),
    nn.BatchNorm1d: lambda m, _: float(_batch_norm_scale(m).abs().max()),
    Normalize: lambda m, _: float(1 / m.std.double().abs().min()),
    nn.ReLU: lambda m, _: 1.0,
    MaxMin: lambda m, _: 1.0,
    PadChannels: lambda m, _: 1.0,
    nn.PixelUnshuffle: lambda m, _: 1.0,
    SLLConv2d: _sll,
    SLLLinear: _sll,
    AOLConv2d: _aol,
    AOLLinear: _aol,
    CayleyConv2d: _cayley,
    OrthogonalPointwise: lambda m, shapes: layer_bound(m.linear, shapes),
    nn.Tanh: lambda m, _: 1.0,
    nn.Identity: lambda m, _: 1.0,
    nn.Flatten: lambda m, _: 1.0,
    nn.AdaptiveAvgPool2d: _global_average,
    nn.AvgPool2d: _average,
    nn.MaxPool2d: _max,
    ResidualBlock: _residual_block,
    ResNet18: _resnet18,
    SmallCNN: lambda m, shapes: layer_bound(m.layers, shapes),
    LipschitzNet: lambda m, shapes: layer_bound(m.layers, shapes),
    nn.Sequential: lambda m, shapes: _chain(list(m), shapes),
}


def check_constants(lipschitz: float, embedding_error: float) -> None:
    """Refuse a Lipschitz constant that is not positive, or an error that is negative."""
    if not (lipschitz > 0 and math.isfinite(lipschitz)):
        raise ValueError(f"lipschitz: expected a positive finite number, got {lipschitz}")
    if not (embedding_error >= 0 and math.isfinite(embedding_error)):
        raise ValueError(f"embedding_error: expected 0 or a positive finite number, got {embedding_error}")
