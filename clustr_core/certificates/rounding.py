"""How far floating point can carry an embedding from the one that the mathematics means: a bound, not an estimate."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from clustr_core.certificates.convolution import absolute_norm, convolution_norm
from clustr_core.certificates.lipschitz import (
    DROPOUT,
    Shapes,
    batch_norm_scale,
    check_evaluation_mode,
    check_finite_weights,
    computes,
    example_of,
    grouped_weight,
    input_shapes,
    layer_bound,
    own_layer,
    run_bound,
    runs,
)
from clustr_core.models.encoders import ImageShape, LipschitzNet, Normalize, ResidualBlock, ResNet18, SmallCNN
from clustr_core.models.one_lipschitz import AOLConv2d, AOLLinear, MaxMin, OrthogonalPointwise, PadChannels, SLLConv2d
from clustr_core.numerics.rounding import full_precision

# layers that move numbers and change none
_EXACT = (*DROPOUT, MaxMin, PadChannels, nn.Flatten, nn.Identity, nn.PixelUnshuffle, nn.ReLU)


@dataclass(frozen=True)
class _Reached:
    """Bounds on what a layer is given, or returns.

    Args:
        size: of the norm of the exact one.
        error: of how far the computed one is from that.
        pixels: whether all its numbers are known to lie in [0, 1].
    """

    size: float
    error: float
    pixels: bool = False

    @property
    def computed(self) -> float:
        """Of the norm of the computed one."""
        return self.size + self.error


def embedding_error(encoder: nn.Module, image_shape: ImageShape) -> float:
    """A bound E on ||fl(f(x)) - f(x)|| for all images in [0, 1], f being computed in the dtype of its weights.

    A sum of n products is off by at most gamma_n = n u / (1 - n u) times the sum of their absolute values, u half the
    dtype's eps, whatever the order of summation, and by the dtype's smallest normal number for each that underflows. So
    a layer W x + b adds gamma_n (|| |W| || ||x|| + ||b||), and passes on what it is given times its Lipschitz constant.
    Far from tight: the worst case of all roundings at once.

    f is the function of the numbers that its layers use: a weight that is itself computed, such as the step of an SLL
    layer, is what it was computed to be, as in `lipschitz.lipschitz_upper_bound`. The dtype must be what the device
    really computes in: on a GPU, TF32 has to be off. A convolution must be summed up product by product, not by a fast
    transform.

    Two embeddings enter a certificate, that of the image and that of the perturbed image, so it pays 2 E.

    Args:
        encoder: in evaluation mode, of layers that this is known of: the encoders of `clustr_core.models` but for
            "lip-cnn-cayley", chains of common `torch.nn` layers, and those that `register_lipschitz` was told of with
            their rounding.
    Raises:
        TypeError: for an encoder with a layer without such a bound.
        ValueError: if the dtype has so few digits that a sum may lose all of them, a weight is not finite, or a layer
            in training mode depends on the whole batch or on chance.
    Source: Higham 2002, chapter 3, theorem 3.1 and equation 3.13.
    """
    check_evaluation_mode(encoder)
    check_finite_weights(encoder)
    with torch.no_grad(), full_precision(example_of(encoder).device):
        return rounding_bound(encoder, image_shape, input_shapes(encoder, image_shape))


def rounding_bound(encoder: nn.Module, image_shape: ImageShape, shapes: Shapes) -> float:
    """`embedding_error`, of the shapes of `input_shapes`."""
    image = _Reached(math.sqrt(math.prod(image_shape)), 0.0, pixels=True)
    return _through(encoder, shapes, image).error * (1 + 1e-9)


def _through(layer: nn.Module, shapes: Shapes, given: _Reached) -> _Reached:
    """What a layer returns of what it is given."""
    for kind, rule in _RULES.items():
        if computes(layer, kind):
            return rule(layer, shapes, given)
    if own_layer(layer):
        return _through_own(layer, shapes, given)
    name = type(layer).__name__
    raise TypeError(
        f"encoder: no bound on the rounding of the layer {name} is known, without which a certificate may be broken; "
        "register_lipschitz can give it one"
    )


def _through_chain(layers: list[nn.Module], shapes: Shapes, given: _Reached) -> _Reached:
    for run in runs(layers):
        merged = len(run) > 1
        given = _through_affine(run, shapes, given) if merged else _through(run[0], shapes, given)
    return given


def _through_normalize(layer: Normalize, shapes: Shapes, given: _Reached) -> _Reached:
    if not given.pixels:
        return _through_affine([layer], shapes, given)
    # pixels in [0, 1]: the farthest that one can be from the mean
    farthest = torch.maximum(layer.mean.abs(), (1 - layer.mean).abs()).double() / layer.std.double().abs()
    size = float(farthest.max()) * math.sqrt(math.prod(shapes[layer]))
    return _Reached(size, given.error * layer_bound(layer, shapes) + _gamma(2, layer.mean.dtype) * size)


def _through_sll(layer: SLLConv2d, shapes: Shapes, given: _Reached) -> _Reached:
    """x - W^T (t relu(W x + b)): the inner sum's error, carried out by absolute weights, and the outer sum's own."""
    height, width = shapes[layer][1:]
    padding, dtype = (layer.kernel_size // 2, layer.kernel_size // 2), layer.weight.dtype
    absolute = layer.weight.detach().double().abs()
    out = layer.step().detach().double().reshape(-1, 1, 1, 1) * absolute
    inwards, outwards = (convolution_norm(part, (height, width), padding) for part in (absolute, out))
    shift = float(layer.bias.detach().double().norm()) * math.sqrt(height * width)
    inner = inwards * given.computed + shift
    wrong = _gamma(absolute[0].numel() + 2, dtype) * inner
    carried = given.computed + outwards * (inner + wrong)
    local = outwards * wrong + _gamma(len(absolute) * layer.kernel_size**2 + 2, dtype) * carried
    local += (1 + outwards) * 2 * _underflow(layer.weight, height * width)
    lipschitz = layer_bound(layer, shapes)
    return _Reached(lipschitz * given.size + outwards * shift, lipschitz * given.error + local)


@dataclass(frozen=True)
class _Affine:
    """An affine layer W x + b.

    Args:
        terms: how many roundings each of its numbers passes through.
        absolute: the norm of |W|.
        shift: the norm of b, at all places.
        underflow: what products that underflow can add up to.
    """

    terms: int
    dtype: torch.dtype
    absolute: float
    shift: float
    underflow: float


def _through_affine(run: list[nn.Module], shapes: Shapes, given: _Reached) -> _Reached:
    """Affine layers one after the other: each adds its own rounding, and their norm is that of all together."""
    lipschitz = run_bound(run, shapes)
    size, local, shift = given.computed, 0.0, 0.0
    for layer in run:
        part = _affine(layer, shapes)
        added = _gamma(part.terms, part.dtype) * (part.absolute * size + part.shift) + part.underflow
        local = part.absolute * local + added
        size, shift = part.absolute * size + part.shift + added, part.absolute * shift + part.shift
    return _Reached(lipschitz * given.size + shift, lipschitz * given.error + local)


def _affine(layer: nn.Module, shapes: Shapes) -> _Affine:
    if isinstance(layer, Normalize):
        return _of_normalize(layer, shapes)
    if isinstance(layer, nn.BatchNorm1d | nn.BatchNorm2d):
        return _of_batch_norm(layer, shapes)
    if isinstance(layer, nn.AvgPool2d | nn.AdaptiveAvgPool2d):
        return _of_average(layer, shapes)
    weight, bias, places, absolute = _weight_of(layer, shapes)
    shift = float(bias.double().norm()) * math.sqrt(places)
    return _Affine(weight[0].numel() + 1, weight.dtype, absolute, shift, _underflow(weight, places))


def _weight_of(layer: nn.Module, shapes: Shapes) -> tuple[Tensor, Tensor, int, float]:
    """Weight and bias, at how many places they are applied, and the norm of the absolute weights."""
    if isinstance(layer, AOLConv2d):
        weight = layer.effective_weight().detach()
        height, width = shapes[layer][1:]
        padding = (layer.kernel_size // 2, layer.kernel_size // 2)
        norm = convolution_norm(weight.double().abs(), (height, width), padding)
        return weight, layer.bias.detach(), height * width, norm
    if isinstance(layer, nn.Conv2d):
        weight, norm = layer.weight.detach(), absolute_norm(grouped_weight(layer))
        return weight, _bias(layer, weight), _outputs(layer, shapes), norm
    if isinstance(layer, AOLLinear):
        weight, linear = layer.effective_weight().detach(), layer
    else:
        linear = layer.linear if isinstance(layer, OrthogonalPointwise) else layer
        assert isinstance(linear, nn.Linear)
        weight = linear.weight.detach()
    # a pointwise layer mixes channels at every pixel, a linear one the last axis at every place of the others
    shape = shapes[layer]
    places = math.prod(shape[1:] if isinstance(layer, OrthogonalPointwise) else shape[:-1])
    return weight, _bias(linear, weight), places, float(torch.linalg.matrix_norm(weight.double().abs(), ord=2))


def _bias(layer: nn.Linear | nn.Conv2d | AOLLinear, weight: Tensor) -> Tensor:
    return layer.bias.detach() if layer.bias is not None else weight.new_zeros(1)


def _outputs(conv: nn.Conv2d, shapes: Shapes) -> int:
    """At how many places a convolution is applied."""
    sides = zip(shapes[conv][1:], conv.padding, conv.dilation, conv.kernel_size, conv.stride, strict=True)
    return math.prod((n + 2 * int(p) - d * (k - 1) - 1) // s + 1 for n, p, d, k, s in sides)


def _of_normalize(layer: Normalize, shapes: Shapes) -> _Affine:
    places = math.prod(shapes[layer][1:])
    shift = float((layer.mean.double() / layer.std.double()).norm()) * math.sqrt(places)
    # a difference of two numbers, over a third: what is subtracted is rounded as the sum is
    return _Affine(3, layer.mean.dtype, layer_bound(layer, shapes), shift, _underflow(layer.mean, places))


def _of_batch_norm(layer: nn.BatchNorm1d | nn.BatchNorm2d, shapes: Shapes) -> _Affine:
    """x a + (b - m a), or (x - m) a + b, with a = weight / sqrt(variance + eps): a dozen roundings, in any order."""
    scale, mean = batch_norm_scale(layer).abs(), layer.running_mean
    assert mean is not None
    bias = layer.bias.detach().double().abs() if layer.bias is not None else torch.zeros_like(scale)
    places = math.prod(shapes[layer][1:])
    shift = float((mean.double().abs() * scale + bias).norm()) * math.sqrt(places)
    return _Affine(16, mean.dtype, float(scale.max()), shift, 4 * _underflow(mean, places))


def _of_average(layer: nn.AvgPool2d | nn.AdaptiveAvgPool2d, shapes: Shapes) -> _Affine:
    """Sums, each over its number of terms: no weight is negative, so the norm is that of the absolute weights."""
    shape, dtype = shapes[layer], shapes.dtypes[layer]
    terms = math.prod(shape[1:]) + 2
    return _Affine(terms, dtype, layer_bound(layer, shapes), 0.0, math.prod(shape) * torch.finfo(dtype).tiny)


def _through_max(layer: nn.MaxPool2d, shapes: Shapes, given: _Reached) -> _Reached:
    """Each number that comes out went in."""
    lipschitz = layer_bound(layer, shapes)
    return _Reached(lipschitz * given.size, lipschitz * given.error, given.pixels)


def _through_block(block: ResidualBlock, shapes: Shapes, given: _Reached) -> _Reached:
    branch = _through_chain([block.conv1, block.bn1, nn.ReLU(), block.conv2, block.bn2], shapes, given)
    shortcut = _through(block.shortcut, shapes, given)
    added = _gamma(1, shapes.dtypes[block.bn2]) * (branch.computed + shortcut.computed)
    return _Reached(branch.size + shortcut.size, branch.error + shortcut.error + added)


def _through_resnet18(net: ResNet18, shapes: Shapes, given: _Reached) -> _Reached:
    stages = [net.layer1, net.layer2, net.layer3, net.layer4]
    return _through_chain([net.normalize, net.conv1, net.bn1, nn.ReLU(), *stages, net.pool], shapes, given)


def _through_own(layer: nn.Module, shapes: Shapes, given: _Reached) -> _Reached:
    """A registered layer: at a blank input it returns what it returns, and elsewhere its constant bounds it."""
    own, shape, name = own_layer(layer), tuple(shapes[layer]), type(layer).__name__
    assert own is not None
    if own.rounding is None:
        raise TypeError(
            f"encoder: no bound on the rounding of the layer {name} is known, without which a certificate may be "
            "broken; register_lipschitz takes it as rounding="
        )
    dtype, lipschitz = shapes.dtypes[layer], layer_bound(layer, shapes)
    at_zero, local = (float(own.rounding(layer, shape, dtype, size)) for size in (0.0, given.computed))
    if not (0 <= at_zero < math.inf and 0 <= local < math.inf):
        raise ValueError(f"{name}: expected a finite bound on its rounding of at least 0, got {at_zero} and {local}")
    blank = torch.zeros(1, *shape, dtype=dtype, device=example_of(layer).device)
    shift = float(layer(blank).double().norm())
    return _Reached(lipschitz * given.size + shift + at_zero, lipschitz * given.error + local)


_RULES: dict[type[nn.Module], Callable[..., _Reached]] = {
    **dict.fromkeys(_EXACT, lambda layer, shapes, given: given),
    nn.MaxPool2d: _through_max,
    Normalize: _through_normalize,
    SLLConv2d: _through_sll,
    **dict.fromkeys(
        (
            AOLConv2d, AOLLinear, OrthogonalPointwise, nn.Linear, nn.Conv2d, nn.BatchNorm1d, nn.BatchNorm2d,
            nn.AvgPool2d, nn.AdaptiveAvgPool2d,
        ),
        lambda layer, shapes, given: _through_affine([layer], shapes, given),
    ),
    ResidualBlock: _through_block,
    ResNet18: _through_resnet18,
    SmallCNN: lambda net, shapes, given: _through(net.layers, shapes, given),
    LipschitzNet: lambda net, shapes, given: _through(net.layers, shapes, given),
    nn.Sequential: lambda chain, shapes, given: _through_chain(list(chain), shapes, given),
}  # fmt: skip


def _gamma(terms: int, dtype: torch.dtype) -> float:
    """n u / (1 - n u)."""
    spread = terms * torch.finfo(dtype).eps / 2
    if spread >= 0.5:
        raise ValueError(f"encoder: expected a dtype in which a sum of {terms} terms keeps digits, got {dtype}")
    return spread / (1 - spread)


def _underflow(weight: Tensor, places: int) -> float:
    """What products that underflow can add up to."""
    return weight.numel() * math.sqrt(places) * torch.finfo(weight.dtype).tiny
