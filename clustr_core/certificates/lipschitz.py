"""Lipschitz constants in L2: a sound upper bound, and an empirical lower one. They are not the same thing.

An upper bound turns a feature distance into a certified input radius. A lower bound certifies nothing; it says
how loose the upper one may be.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn
from tqdm.auto import tqdm

from clustr_core.certificates.convolution import blocks_norm, convolution_norm
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
from clustr_core.numerics.checks import check_are_tensors, check_callable, check_evaluating
from clustr_core.numerics.distances import flat_norm, per_item
from clustr_core.numerics.rounding import full_precision

# the identity in evaluation mode
DROPOUT = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)


class Shapes(dict[nn.Module, torch.Size]):
    """The shape of what each layer is given, without the batch.

    ``dtypes`` has the dtype of each, and ``norms`` the norms of convolutions that were computed already.
    """

    def __init__(self) -> None:
        super().__init__()
        self.dtypes: dict[nn.Module, torch.dtype] = {}
        self.norms: dict[tuple[nn.Module, ...], float] = {}


@dataclass(frozen=True)
class OwnLayer:
    """What `register_lipschitz` was told of a layer.

    Args:
        lipschitz: (layer, shape) -> a Lipschitz constant in L2 on inputs of that shape.
        rounding: (layer, shape, dtype, size) -> how far the computed output of an input of at most that norm may be
            from the exact one; None where nothing is known.
        version: of both.
    """

    lipschitz: Callable[..., float]
    rounding: Callable[..., float] | None
    version: int


OWN_LAYERS: dict[type[nn.Module], OwnLayer] = {}


def own_versions(layers: Iterable[type[nn.Module]]) -> dict[str, dict[str, int]]:
    """The versions of those layers that `register_lipschitz` was told of, by name, as ``own_layers``; none without."""
    asked = set(layers)
    # in the order in which they came: of two of one name, as when a cell is run twice, the last counts
    own = [(layer, own.version) for layer, own in OWN_LAYERS.items() if layer in asked]
    versions = {f"{layer.__module__}.{layer.__qualname__}": version for layer, version in own}
    return {"own_layers": dict(sorted(versions.items()))} if versions else {}


def lipschitz_upper_bound(encoder: nn.Module, image_shape: ImageShape) -> float:
    """A constant L with ||f(x) - f(x')|| <= L ||x - x'|| for all images: the product of the layers' norms.

    Affine neighbours (normalisation, convolution, batch norm) are merged before their norm is taken; a residual
    block counts the sum of its branch and its shortcut; ReLU and MaxMin count 1. The layers of `one_lipschitz` are not
    trusted: their norms are taken from the weights they really use, like all others. Norms are computed in float64 and
    rounded up.

    Args:
        encoder: in evaluation mode, made of the layers of `clustr_core.models`, of common `torch.nn` layers, and of
            those that `register_lipschitz` was told of.
        image_shape: (channels, height, width); the norm of a convolution depends on the size it is applied to.
    Raises:
        ValueError: for a layer in training mode that depends on the whole batch or on chance (`check_evaluation_mode`),
            and for a weight that is not finite.
        TypeError: for a layer without a known bound.
    Source: Tsuzuku et al. 2018 (product bound); Sedghi et al. 2019 (convolution by FFT), with the zero padding
        turned into a bound as `convolution_norm` says.
    """
    check_evaluation_mode(encoder)
    check_finite_weights(encoder)
    with torch.no_grad(), full_precision(example_of(encoder).device):
        return upper_bound(encoder, input_shapes(encoder, image_shape))


def upper_bound(encoder: nn.Module, shapes: Shapes) -> float:
    """`lipschitz_upper_bound`, of the shapes of `input_shapes`."""
    # the float64 norms carry a relative error near 1e-13 a layer
    return layer_bound(encoder, shapes) * (1 + 1e-9)


def check_evaluation_mode(encoder: nn.Module) -> None:
    """Refuse layers in training mode whose output may depend on the whole batch, on chance, or on earlier calls.

    A layer of one's own is refused in training mode whatever it does: its rule holds in evaluation mode.

    Raises:
        ValueError: if there is any; it is named.
    """
    check_evaluating(encoder, "encoder")
    for module in encoder.modules():
        if module.training and type(module) in OWN_LAYERS:
            raise ValueError(f"encoder: expected evaluation mode, got {type(module).__name__} in training mode")


def check_finite_weights(encoder: nn.Module) -> None:
    """Refuse weights that are NaN or infinite, of which a norm says nothing.

    Raises:
        ValueError: if there are any, with the name of the first.
    """
    for name, weight in encoder.state_dict().items():
        if weight.is_floating_point() and not weight.isfinite().all():
            raise ValueError(f"encoder: expected finite weights, got NaN or infinity in {name}")


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
        TypeError: if the encoder cannot be called, or the images are no tensor.
        ValueError: if there is no image or no iteration.
    """
    check_are_tensors(images=images)
    check_callable(encoder, "encoder")
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


def input_shapes(encoder: nn.Module, image_shape: ImageShape, like: Tensor | None = None) -> Shapes:
    """The input shape of every layer, from one forward pass of a blank image.

    Args:
        like: a tensor of the image's dtype and device; None takes those of the encoder's own.
    """
    shapes = Shapes()

    def note(module: nn.Module, inputs: tuple[Tensor, ...], _: Tensor) -> None:
        if not inputs:  # the parametrisation of a weight, which sees no image
            return
        shape = inputs[0].shape[1:]
        if shapes.setdefault(module, shape) != shape:
            raise TypeError(f"encoder: one {type(module).__name__} is used at two sizes, {shapes[module]} and {shape}")
        shapes.dtypes[module] = inputs[0].dtype

    hooks = [module.register_forward_hook(note) for module in encoder.modules()]
    example = example_of(encoder) if like is None else like
    try:
        with torch.no_grad():
            encoder(example.new_zeros(1, *image_shape))
    finally:
        for hook in hooks:
            hook.remove()
    return shapes


def example_of(module: nn.Module) -> Tensor:
    """A tensor of a module's dtype and device."""
    return next(iter([*module.parameters(), *module.buffers()]), torch.zeros(()))


def layer_bound(module: nn.Module, shapes: Shapes) -> float:
    """The Lipschitz bound of one layer, or of a chain, on inputs of the shapes of `input_shapes`.

    Raises:
        TypeError: for a layer without a known bound.
    """
    for kind, rule in RULES.items():
        if computes(module, kind):
            return rule(module, shapes)
    if own := own_layer(module):
        bound = float(own.lipschitz(module, tuple(shapes[module])))
        if not 0 <= bound < math.inf:
            raise ValueError(f"{type(module).__name__}: expected a finite Lipschitz bound of at least 0, got {bound}")
        return bound
    name = type(module).__name__
    raise TypeError(f"encoder: no Lipschitz bound is known for the layer {name}; register_lipschitz can give it one")


def own_layer(module: nn.Module) -> OwnLayer | None:
    """What was registered for a layer's class; nothing of a subclass or where a hook or an attribute changes it."""
    replaced = any(callable(getattr(type(module), name, None)) for name in vars(module))
    if _hooked(module) or replaced:
        return None
    return OWN_LAYERS.get(type(module))


# what runs when a module is called
_CALLED = ("__call__", "_call_impl", "forward", "_conv_forward")


def _hooked(module: nn.Module) -> bool:
    everywhere = nn.modules.module
    return any(
        (
            module._forward_hooks,
            module._forward_pre_hooks,
            everywhere._global_forward_hooks,
            everywhere._global_forward_pre_hooks,
        )
    )


def computes(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether a module computes what a kind of layer does.

    It does not where a subclass has another ``forward``, where an attribute of the module replaces it, or where a hook
    may change what goes in or comes out.
    """
    if not isinstance(module, kind) or _hooked(module):
        return False
    return inherits(type(module), kind) and not {*_CALLED} & vars(module).keys()


def inherits(layer: type[nn.Module], kind: type[nn.Module]) -> bool:
    """Whether a class is another, or a subclass that computes the same."""
    names = [name for name in _CALLED if hasattr(kind, name)]
    return issubclass(layer, kind) and all(getattr(layer, name) is getattr(kind, name) for name in names)


def runs(layers: list[nn.Module]) -> list[list[nn.Module]]:
    """A chain in parts, each convolution together with the scalings beside it."""
    parts, position = [], 0
    while position < len(layers):
        stop = _merged_run(layers, position)
        parts.append(layers[position:stop])
        position = stop
    return parts


def chain_bound(layers: list[nn.Module], shapes: Shapes) -> float:
    """Product over a chain, each convolution merged with the scalings beside it."""
    total = 1.0
    for run in runs(layers):
        total *= run_bound(run, shapes)
    return total


def run_bound(run: list[nn.Module], shapes: Shapes) -> float:
    """The bound of a part that `runs` gives."""
    return _merged_norm(run, shapes) if len(run) > 1 else layer_bound(run[0], shapes)


def _merged_run(layers: list[nn.Module], start: int) -> int:
    """End of the longest run [Normalize] convolution [batch norm] that begins at ``start``."""
    stop = start + (computes(layers[start], Normalize) and start + 1 < len(layers))
    if not computes(layers[stop], nn.Conv2d):
        return start + 1
    stop += 1
    return stop + (stop < len(layers) and computes(layers[stop], nn.BatchNorm2d))


def _merged_norm(run: list[nn.Module], shapes: Shapes) -> float:
    conv = next(layer for layer in run if isinstance(layer, nn.Conv2d))
    weight = grouped_weight(conv)
    if isinstance(run[0], Normalize):
        weight = weight / run[0].std.double().reshape(1, -1, 1, 1)
    if isinstance(run[-1], nn.BatchNorm2d):
        weight = weight * batch_norm_scale(run[-1]).reshape(-1, 1, 1, 1)
    return _convolution_bound(conv, weight, shapes, tuple(run))


def _convolution_bound(conv: nn.Conv2d, weight: Tensor, shapes: Shapes, run: tuple[nn.Module, ...]) -> float:
    """The norm of a convolution with this weight; that of one run of layers is computed once."""
    if conv.padding_mode != "zeros" or isinstance(conv.padding, str):
        raise TypeError(f"encoder: expected zero padding given in pixels, got {conv.padding_mode}, {conv.padding}")
    if run not in shapes.norms:
        height, width = shapes[conv][1:]
        found = convolution_norm(weight, (height, width), conv.padding, conv.dilation)  # pyright: ignore[reportArgumentType]
        shapes.norms[run] = found
    return shapes.norms[run]


def grouped_weight(conv: nn.Conv2d) -> Tensor:
    """The weight of a grouped convolution written out as a full, block-diagonal one, in float64."""
    weight = conv.weight.detach().double()
    if conv.groups == 1:
        return weight
    full = weight.new_zeros(conv.out_channels, conv.in_channels, *weight.shape[2:])
    rows, columns = conv.out_channels // conv.groups, conv.in_channels // conv.groups
    for g in range(conv.groups):
        full[g * rows : (g + 1) * rows, g * columns : (g + 1) * columns] = weight[g * rows : (g + 1) * rows]
    return full


def batch_norm_scale(norm: nn.BatchNorm2d | nn.BatchNorm1d) -> Tensor:
    """|gamma / sqrt(running variance + eps)| of each channel: batch norm in evaluation mode is diagonal."""
    if norm.running_var is None:
        raise TypeError("encoder: expected batch norm with running statistics, got one without")
    gamma = norm.weight.detach().double() if norm.weight is not None else 1.0
    return gamma / (norm.running_var.double() + norm.eps).sqrt()


def _residual_block(block: ResidualBlock, shapes: Shapes) -> float:
    branch = chain_bound([block.conv1, block.bn1], shapes) * chain_bound([block.conv2, block.bn2], shapes)
    return branch + layer_bound(block.shortcut, shapes)


def _resnet18(net: ResNet18, shapes: Shapes) -> float:
    stem = chain_bound([net.normalize, net.conv1, net.bn1], shapes)
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
    return blocks_norm(blocks.flatten(0, 1))


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


# of which layers a bound is known; those of one's own are in `OWN_LAYERS`
RULES: dict[type[nn.Module], Callable[..., float]] = {
    nn.Conv2d: lambda m, shapes: _convolution_bound(m, grouped_weight(m), shapes, (m,)),
    nn.Linear: lambda m, _: float(torch.linalg.matrix_norm(m.weight.detach().double(), ord=2)),
    nn.BatchNorm2d: lambda m, _: float(batch_norm_scale(m).abs().max()),
    nn.BatchNorm1d: lambda m, _: float(batch_norm_scale(m).abs().max()),
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
    **dict.fromkeys(DROPOUT, lambda m, _: 1.0),
    nn.AdaptiveAvgPool2d: _global_average,
    nn.AvgPool2d: _average,
    nn.MaxPool2d: _max,
    ResidualBlock: _residual_block,
    ResNet18: _resnet18,
    SmallCNN: lambda m, shapes: layer_bound(m.layers, shapes),
    LipschitzNet: lambda m, shapes: layer_bound(m.layers, shapes),
    nn.Sequential: lambda m, shapes: chain_bound(list(m), shapes),
}


def check_constants(lipschitz: float, embedding_error: float) -> None:
    """Refuse a Lipschitz constant that is not positive, or an error that is negative."""
    if not (lipschitz > 0 and math.isfinite(lipschitz)):
        raise ValueError(f"lipschitz: expected a positive finite number, got {lipschitz}")
    if not (embedding_error >= 0 and math.isfinite(embedding_error)):
        raise ValueError(f"embedding_error: expected 0 or a positive finite number, got {embedding_error}")
