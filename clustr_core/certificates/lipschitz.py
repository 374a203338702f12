"""Lipschitz constants in L2: a sound upper bound, and an empirical lower one. They are not the same thing.

An upper bound turns a feature distance into a certified input radius. A lower bound certifies nothing; it says
how loose the upper one may be.
"""

import math
from collections.abc import Callable
from typing import Any

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
from clustr_core.numerics.chunks import FOURIER_BLOCKS
from clustr_core.numerics.distances import flat_norm, per_item

Shapes = dict[nn.Module, torch.Size]
Rule = Callable[[Any, Shapes], float]
# rows times columns from which singular values would take seconds a layer
LARGE = 128 * 64
# the identity in evaluation mode
DROPOUT = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)


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
        ValueError: if batch norm is in training mode, where it is not even a function of one image, if dropout is on,
            or if a weight is not finite.
        TypeError: for a layer without a known bound; `register_lipschitz` gives a layer of one's own a bound.
    Source: Tsuzuku et al. 2018 (product bound); Sedghi et al. 2019 (convolution by FFT), with the zero padding
        turned into a bound as `convolution_norm` says.
    """
    check_evaluation_mode(encoder)
    check_finite_weights(encoder)
    shapes = input_shapes(encoder, image_shape)
    # the float64 norms carry a relative error near 1e-13 a layer
    return layer_bound(encoder, shapes) * (1 + 1e-9)


def check_evaluation_mode(encoder: nn.Module) -> None:
    """Refuse layers in training mode that make an embedding depend on the whole batch or on chance.

    Raises:
        ValueError: if there is batch norm in training mode, or dropout that is on.
    """
    training = [module for module in encoder.modules() if module.training]
    if any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in training):
        raise ValueError("encoder: expected evaluation mode, got batch norm in training mode")
    if chance := next((type(module).__name__ for module in training if _is_random(module)), None):
        raise ValueError(f"encoder: expected evaluation mode, got {chance} in training mode, which drops at random")


def check_finite_weights(encoder: nn.Module) -> None:
    """Refuse weights that are NaN or infinite, of which a norm says nothing.

    Raises:
        ValueError: if there are any, with the name of the first.
    """
    for name, weight in encoder.state_dict().items():
        if weight.is_floating_point() and not weight.isfinite().all():
            raise ValueError(f"encoder: expected finite weights, got NaN or infinity in {name}")


def _is_random(module: nn.Module) -> bool:
    """Whether a layer in training mode draws random numbers: dropout, of its own or inside, and random slopes."""
    if isinstance(module, nn.modules.dropout._DropoutNd):
        return module.p > 0
    inside = isinstance(module, (nn.RNNBase, nn.MultiheadAttention)) and module.dropout > 0
    return inside or isinstance(module, nn.RReLU)


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
    return _largest_singular_value(_fourier_blocks(weight, size, padding, dilation))


def _fourier_blocks(
    weight: Tensor, size: tuple[int, int], padding: tuple[int, int], dilation: tuple[int, int]
) -> Tensor:
    """The blocks of `convolution_norm`, [height, width // 2 + 1, out, in]: the others are their conjugates."""
    kernel = [d * (k - 1) + 1 for k, d in zip(weight.shape[2:], dilation, strict=True)]
    torus = [max(s + 2 * p, k) for s, p, k in zip(size, padding, kernel, strict=True)]
    spread = weight.new_zeros(*weight.shape[:2], *kernel, dtype=torch.float64)
    spread[:, :, :: dilation[0], :: dilation[1]] = weight.double()
    return torch.fft.rfft2(spread, s=torus).permute(2, 3, 0, 1)


def _largest_singular_value(blocks: Tensor) -> float:
    return float(torch.linalg.matrix_norm(blocks, ord=2).max())


def large_convolution_norm(
    weight: Float[Tensor, "out in kh kw"],
    size: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int] = (1, 1),
) -> float:
    """`convolution_norm` without singular values, of which large blocks take minutes; above it by less than 1e-8.

    The squares are the eigenvalues of the Gram matrices G, of which few are computed: that a Cholesky factorisation of
    T - G succeeds proves that G has none above T. Rounding of G, of its eigenvalues and of the factorisation is at most
    a few times (rows + columns) u tr(G) and n u n T, n the smaller side: ``slack`` is more than all of these.

    Source: Higham 2002, theorem 10.3 (Cholesky) and equation 3.13 (products); Rump 2006 (proof by factorisation).
    """
    if weight.shape[2:] == (1, 1):  # the same block at each frequency
        size, padding = (1, 1), (0, 0)
    blocks = _without_conjugates(_fourier_blocks(weight, size, padding, dilation))
    scale = blocks.abs().max()
    if not 0 < scale < math.inf:
        return float(scale)
    rows, columns = blocks.shape[1:]
    slack = 8 * min(rows, columns) * (rows + columns) * torch.finfo(torch.float64).eps
    largest = 0.0
    for part in (blocks / scale).split(FOURIER_BLOCKS):
        largest = _largest_eigenvalue(part @ part.mH if rows < columns else part.mH @ part, largest, slack)
    return float(scale) * math.sqrt(largest * (1 + 2 * slack))


def _largest_eigenvalue(grams: Tensor, largest: float, slack: float) -> float:
    """The largest eigenvalue of any, or ``largest`` if there is none above it, up to ``slack`` of it."""
    towards = torch.ones_like(grams[:, :, :1])
    for _ in range(10):
        towards = grams @ (towards / towards.norm(dim=1, keepdim=True).clamp_min(torch.finfo(torch.float64).tiny))
    grams = grams[towards.norm(dim=1).squeeze(1).argsort(descending=True)]
    one = torch.eye(grams.shape[1], dtype=grams.dtype, device=grams.device)
    while len(grams):
        failed = torch.linalg.cholesky_ex(largest * (1 + slack) * one - grams).info != 0 if largest else None
        grams = grams if failed is None else grams[failed]
        if len(grams):
            largest = max(largest, float(torch.linalg.eigvalsh(grams[0])[-1]))
            grams = grams[1:]
    return largest


def _without_conjugates(blocks: Tensor) -> Tensor:
    """One of each pair of conjugate blocks: column 0 goes with itself, as does the last one if the width is even.

    The width is not known here: a last column that has no conjugate inside is kept whole.
    """
    half = len(blocks) // 2 + 1
    return torch.cat([blocks[:half, 0], blocks[:, 1:].flatten(0, 1)])


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
    raise TypeError(
        f"encoder: no Lipschitz bound is known for the layer {type(module).__name__}; `register_lipschitz` can give one"
    )


def register_lipschitz(layer: type[nn.Module]) -> Callable[[Rule], Rule]:
    """A decorator that gives a layer of one's own the rule for its Lipschitz bound, wherever bounds are computed.

    The rule is called with the layer and the input shapes of all layers, without the batch (``shapes[layer]``), and
    returns a constant L with ||f(x) - f(x')|| <= L ||x - x'|| in L2. Nothing checks that it is true. A module that was
    changed in place, by a hook or an attribute, or by a subclass with another ``forward``, has no rule.

    Args:
        layer: a subclass of `nn.Module`.
    Raises:
        TypeError: if it is none.
        ValueError: if the layer, or what it inherits its ``forward`` from, has a rule already; and, where a bound is
            computed, if the rule returned something else than a number that is neither negative nor infinite.
    """
    if not (isinstance(layer, type) and issubclass(layer, nn.Module)):
        raise TypeError(f"layer: expected a subclass of nn.Module, got {layer!r}")
    if known := next((kind for kind in _RULES if _inherits(layer, kind)), None):
        raise ValueError(
            f"layer: expected one without a rule, got {layer.__name__}, which has that of {known.__name__}"
        )

    def register(rule: Rule) -> Rule:
        def checked(module: nn.Module, shapes: Shapes) -> float:
            bound = float(rule(module, shapes))
            if not 0 <= bound < math.inf:
                raise ValueError(f"{layer.__name__}: expected a Lipschitz bound that is finite, got {bound}")
            return bound

        if layer in _RULES:  # by the same decorator, twice
            raise ValueError(f"layer: expected one without a rule, got {layer.__name__}")
        _RULES[layer] = checked
        return rule

    return register


def computes(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether a module computes what a kind of layer computes: it is one, and neither a subclass nor an attribute of
    its own nor a hook puts something else in place of that."""
    if not isinstance(module, kind) or module._forward_hooks or module._forward_pre_hooks:
        return False
    return _inherits(type(module), kind) and not {"forward", "_conv_forward"} & vars(module).keys()


def _inherits(layer: type[nn.Module], kind: type[nn.Module]) -> bool:
    """Whether a class is another, or a subclass that computes the same."""
    names = [name for name in ("forward", "_conv_forward") if hasattr(kind, name)]
    return issubclass(layer, kind) and all(getattr(layer, name) is getattr(kind, name) for name in names)


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
    norm = large_convolution_norm if math.prod(weight.shape[:2]) >= LARGE else convolution_norm
    return norm(weight, (height, width), conv.padding, conv.dilation)  # pyright: ignore[reportArgumentType]


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


def _dropout(layer: nn.modules.dropout._DropoutNd, _: Shapes) -> float:
    check_evaluation_mode(layer)
    return 1.0


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


_RULES: dict[type[nn.Module], Rule] = {
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
    **dict.fromkeys(DROPOUT, _dropout),
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
