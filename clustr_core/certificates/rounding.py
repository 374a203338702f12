"""How far floating point can carry an embedding from the one that the mathematics means: a bound, not an estimate."""

import math

import torch
from torch import Tensor, nn

from clustr_core.certificates.lipschitz import (
    DROPOUT,
    Shapes,
    check_evaluation_mode,
    computes,
    convolution_norm,
    input_shapes,
    layer_bound,
)
from clustr_core.models.encoders import ImageShape, LipschitzNet, Normalize
from clustr_core.models.one_lipschitz import AOLConv2d, MaxMin, OrthogonalPointwise, PadChannels, SLLConv2d

# layers that move numbers and change none
_EXACT = (*DROPOUT, MaxMin, PadChannels, nn.Flatten, nn.Identity, nn.PixelUnshuffle, nn.ReLU)
# those whose sums are bounded below
_SUMS = (AOLConv2d, Normalize, OrthogonalPointwise, SLLConv2d, nn.Linear)


class NoRoundingBound(TypeError):
    """No bound on the rounding of a layer is known: of an encoder with such a layer nothing is known either."""


def embedding_error(encoder: nn.Module, image_shape: ImageShape) -> float:
    """A bound E on ||fl(f(x)) - f(x)|| for all images in [0, 1], f being computed in the dtype of its weights.

    A sum of n products is off by at most gamma_n = n u / (1 - n u) times the sum of their absolute values, u half the
    dtype's eps, whatever the order of summation, and by the dtype's smallest normal number for each that underflows. So
    a layer W x + b adds gamma_n (|| |W| || ||x|| + ||b||), and passes on what it is given times its Lipschitz constant.
    Far from tight: the worst case of all roundings at once.

    f is the function of the numbers that its layers use: a weight that is itself computed, such as the step of an SLL
    layer, is what it was computed to be, as in `lipschitz.lipschitz_upper_bound`. The dtype must be what the device
    really computes in: on a GPU, TF32 has to be off.

    Two embeddings enter a certificate, that of the image and that of the perturbed image, so it pays 2 E.

    Args:
        encoder: a `LipschitzNet`, or a layer or `nn.Sequential` of the same layers.
    Raises:
        NoRoundingBound: a TypeError, for an encoder with a layer without such a bound.
        TypeError: if one layer is used at two sizes.
        ValueError: if the dtype has so few digits that a sum may lose all of them.
    Source: Higham 2002, chapter 3, theorem 3.1 and equation 3.13.
    """
    layers = _layers(encoder)
    for layer in layers:
        if not any(computes(layer, kind) for kind in (*_EXACT, *_SUMS)):
            raise NoRoundingBound(f"encoder: no bound on the rounding of the layer {type(layer).__name__} is known")
    check_evaluation_mode(encoder)
    shapes = input_shapes(encoder, image_shape)
    size, error = math.sqrt(math.prod(image_shape)), 0.0
    for layer in layers:
        if not any(computes(layer, kind) for kind in _EXACT):
            size, error = _through(layer, shapes, size, error)
    return error * (1 + 1e-9)


def _layers(encoder: nn.Module) -> list[nn.Module]:
    if computes(encoder, LipschitzNet):
        return _layers(encoder.layers)  # pyright: ignore[reportArgumentType]
    if computes(encoder, nn.Sequential):
        return [layer for child in encoder.children() for layer in _layers(child)]
    return [encoder]


def _through(layer: nn.Module, shapes: Shapes, size: float, error: float) -> tuple[float, float]:
    """Bounds on the norm of what a layer returns, and on its error, from those of what it is given."""
    if isinstance(layer, Normalize) and computes(layer, Normalize):
        # pixels in [0, 1]: the farthest that one can be from the mean
        farthest = torch.maximum(layer.mean.abs(), (1 - layer.mean).abs()).double() / layer.std.double().abs()
        size = float(farthest.max()) * math.sqrt(math.prod(shapes[layer]))
        return size, error * layer_bound(layer, shapes) + _gamma(2, layer.mean) * size
    if isinstance(layer, SLLConv2d) and computes(layer, SLLConv2d):
        return _through_sll(layer, shapes, size, error)
    weight, bias, places, absolute = _affine(layer, shapes)
    lipschitz = layer_bound(layer, shapes)
    shift = float(bias.double().norm()) * math.sqrt(places)
    local = _gamma(weight[0].numel() + 1, weight) * (absolute * (size + error) + shift) + _underflow(weight, places)
    return lipschitz * size + shift, lipschitz * error + local


def _through_sll(layer: SLLConv2d, shapes: Shapes, size: float, error: float) -> tuple[float, float]:
    """x - W^T (t relu(W x + b)): the inner sum's error, carried out by absolute weights, and the outer sum's own."""
    height, width = shapes[layer][1:]
    padding = (layer.kernel_size // 2, layer.kernel_size // 2)
    absolute = layer.weight.detach().double().abs()
    out = layer.step().detach().double().reshape(-1, 1, 1, 1) * absolute
    inwards, outwards = (convolution_norm(part, (height, width), padding) for part in (absolute, out))
    shift = float(layer.bias.detach().double().norm()) * math.sqrt(height * width)
    inner = inwards * (size + error) + shift
    wrong = _gamma(absolute[0].numel() + 2, layer.weight) * inner
    carried = size + error + outwards * (inner + wrong)
    local = outwards * wrong + _gamma(len(absolute) * layer.kernel_size**2 + 2, layer.weight) * carried
    local += (1 + outwards) * 2 * _underflow(layer.weight, height * width)
    lipschitz = layer_bound(layer, shapes)
    return lipschitz * size + outwards * shift, lipschitz * error + local


def _affine(layer: nn.Module, shapes: Shapes) -> tuple[Tensor, Tensor, int, float]:
    """Weight and bias of an affine layer, at how many places it is applied, and the norm of its absolute weights."""
    if isinstance(layer, AOLConv2d) and computes(layer, AOLConv2d):
        weight = layer.effective_weight().detach()
        height, width = shapes[layer][1:]
        padding = (layer.kernel_size // 2, layer.kernel_size // 2)
        norm = convolution_norm(weight.double().abs(), (height, width), padding)
        return weight, layer.bias.detach(), height * width, norm
    pointwise = isinstance(layer, OrthogonalPointwise) and computes(layer, OrthogonalPointwise)
    linear = layer.linear if pointwise else layer
    if not isinstance(linear, nn.Linear) or not computes(linear, nn.Linear):
        raise NoRoundingBound(f"encoder: no bound on the rounding of the layer {type(layer).__name__} is known")
    weight = linear.weight.detach()
    bias = linear.bias.detach() if linear.bias is not None else weight.new_zeros(1)
    places = math.prod(shapes[layer][1:]) if pointwise else 1
    return weight, bias, places, float(torch.linalg.matrix_norm(weight.double().abs(), ord=2))


def _gamma(terms: int, like: Tensor) -> float:
    """n u / (1 - n u)."""
    spread = terms * torch.finfo(like.dtype).eps / 2
    if spread >= 0.5:
        raise ValueError(f"encoder: expected a dtype in which a sum of {terms} terms keeps digits, got {like.dtype}")
    return spread / (1 - spread)


def _underflow(weight: Tensor, places: int) -> float:
    """What products that underflow can add up to."""
    return weight.numel() * math.sqrt(places) * torch.finfo(weight.dtype).tiny
