"""A layer of one's own: with a Lipschitz constant and a bound on its rounding it is certified as ours are."""

from collections.abc import Callable
from typing import Any, TypeVar

from torch import nn

from clustr_core.certificates.lipschitz import OWN_LAYERS, RULES, OwnLayer, inherits
from clustr_core.numerics.checks import check_version

Shape = tuple[int, ...]
_Lipschitz = TypeVar("_Lipschitz", bound=Callable[[Any, Shape], float])


def register_lipschitz(
    layer: type[nn.Module], *, rounding: Callable[..., float] | None = None, version: int = 1
) -> Callable[[_Lipschitz], _Lipschitz]:
    """A decorator of a layer's Lipschitz rule, for `lipschitz_upper_bound`; with its rounding, for `certify` too.

    The rule is called with the layer and the shape of its input, without the batch. It returns a constant L with
    ||f(x) - f(y)|| <= L ||x - y|| in L2 for all x and y of that shape. Nothing checks that this is true. The rule holds
    for this very class in evaluation mode: a subclass is refused, as is a layer that a hook or an attribute changes.

    Args:
        layer: a subclass of `nn.Module` that computes each image's output from that image alone.
        rounding: called with the layer, the shape, the dtype of its input, and a number that the norm of no input
            exceeds. It returns a bound on the L2 norm of computed minus exact output. With n roundings of each number
            and no cancellation that is about n eps / 2 times the norm of the output, and what can underflow. None:
            nothing is known, and `certify` refuses the layer.
        version: raise it when the rule or its rounding gives other numbers than before: certificates are kept under the
            layer's name and version alone.
    Raises:
        TypeError: if ``layer`` is no subclass of `nn.Module`.
        ValueError: if the version is no integer above 0, or the layer computes what one with a rule of the package
            computes. A layer may be registered again, as when a cell of a notebook is run twice: the last rule counts.
    """
    if not (isinstance(layer, type) and issubclass(layer, nn.Module)):
        raise TypeError(f"layer: expected a subclass of nn.Module, got {layer!r}")
    if known := next((kind for kind in RULES if inherits(layer, kind)), None):
        raise ValueError(
            f"layer: expected one without a rule, got {layer.__name__}, which has that of {known.__name__}"
        )
    check_version(version)

    def register(rule: _Lipschitz) -> _Lipschitz:
        OWN_LAYERS[layer] = OwnLayer(rule, rounding, version)
        return rule

    return register
