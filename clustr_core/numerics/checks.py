"""One check of each kind of value: images, labels, logits, a model's mode, embeddings, lengths."""

import inspect
import math
import numbers
import re
from typing import TypeGuard

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn


def is_name(name: object) -> TypeGuard[str]:
    """Whether it is a name such as "my-method": words of small letters and digits, with hyphens between them, and none
    that a table's reader takes for a number or a truth value, such as "1e5", "inf" or "true"."""
    if not isinstance(name, str) or not re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", name):
        return False
    return not re.fullmatch(r"[0-9-]+(e[0-9-]+)?|inf|infinity|nan|true|false", name)


def check_version(version: object, name: str = "version") -> None:
    """Raises a ValueError unless it counts from 1, as whoever owns an attack, a layer or a method raises it."""
    if type(version) is not int or version < 1:
        raise ValueError(f"{name}: expected an integer above 0, got {version!r}")


def check_are_tensors(**values: object) -> None:
    """Raises a TypeError unless each is a dense tensor of real numbers, on whichever device."""
    for name, value in values.items():
        if not isinstance(value, Tensor):
            raise TypeError(f"{name}: expected a tensor, got {_described(value)}")
        if value.layout != torch.strided or value.is_complex():
            raise TypeError(f"{name}: expected a dense tensor of real numbers, got {value.dtype}, {value.layout}")


def check_finite(embeddings: Float[Tensor, "batch dim"]) -> None:
    """Raises a ValueError unless every number is finite."""
    # two numbers tell of all; each alone, since autocast refuses to stack some dtypes
    if embeddings.numel() and not all(bool(each.isfinite()) for each in embeddings.detach().aminmax()):
        raise ValueError("embeddings: expected finite values, got NaN or infinity")


def check_positive(**lengths: float | Tensor) -> None:
    """Raises a ValueError unless every number is positive and finite, be it alone or in a tensor."""
    for name, length in lengths.items():
        if isinstance(length, Tensor):
            for i, each in enumerate(length.flatten().tolist()):
                if not (each > 0 and math.isfinite(each)):
                    raise ValueError(f"{name}: expected positive numbers, got {each!r} for example {i}")
        elif isinstance(length, bool) or not isinstance(length, numbers.Real) or not 0 < length < math.inf:
            raise ValueError(f"{name}: expected a positive number, got {length!r}")


def check_images(images: Tensor) -> None:
    """Refuse what is no batch of images.

    Raises:
        TypeError: if it is no tensor.
        ValueError: unless images are floating, of shape [batch, channel, height, width], with pixels in [0, 1].
    """
    check_image_shape(images)
    if not ((images >= 0) & (images <= 1)).all():
        raise ValueError(f"images: expected pixels in [0, 1], got {_range_of(images)}")


def check_image_shape(images: Tensor) -> None:
    """The part of `check_images` that reads no pixel."""
    check_are_tensors(images=images)
    if images.dim() != 4 or not images.is_floating_point():
        raise ValueError(
            "images: expected a floating dtype and shape [batch, channel, height, width], "
            f"got {images.dtype} of shape {list(images.shape)}"
        )


def check_labels(labels: Tensor, count: int) -> None:
    """Refuse what is not one integer for each of ``count`` images, in whichever integer dtype.

    Raises:
        TypeError: if it is no tensor.
        ValueError: with what came.
    """
    check_are_tensors(labels=labels)
    if labels.shape != (count,):
        got = len(labels) if labels.dim() == 1 else f"shape {list(labels.shape)}"
        raise ValueError(f"labels: expected one for each of {count} images, got {got}")
    if labels.dtype == torch.bool or labels.is_floating_point() or labels.is_complex():
        raise ValueError(f"labels: expected integers, got {labels.dtype}")


def check_classes(labels: Int[Tensor, " batch"], num_classes: int) -> None:
    """Raises a ValueError unless every label is a class of a model of ``num_classes``."""
    if len(labels) and (labels.min() < 0 or labels.max() >= num_classes):
        low, high = int(labels.min()), int(labels.max())
        raise ValueError(f"labels: expected classes in 0..{num_classes - 1}, got {low} to {high}")


def checked_outputs(outputs: object, rows: int, name: str = "model") -> Float[Tensor, "batch class"]:
    """What a model returned for ``rows`` images, as logits; narrower dtypes than float32 are widened to it.

    No value is read: `check_logits` does that.

    Raises:
        TypeError: if it is no tensor.
        ValueError: if its shape is not [rows, class].
    """
    if not isinstance(outputs, Tensor):
        raise TypeError(f"{name}: expected a tensor of logits [{rows}, class], got {_described(outputs)}")
    if outputs.dim() != 2 or len(outputs) != rows:
        raise ValueError(f"{name}: expected logits [{rows}, class], got shape {list(outputs.shape)}")
    return outputs if outputs.dtype == torch.float64 else outputs.float()


def check_logits(logits: Float[Tensor, "batch class"], name: str = "model", *, masks: bool = True) -> None:
    """Refuse NaN, which argmax would call the largest, and rows without a finite largest logit, which rank nothing.

    Args:
        masks: whether -inf, as a class that is masked out has, is a logit.
    Raises:
        ValueError: with what came.
    """
    if logits.isnan().any():
        raise ValueError(f"{name}: expected logits, got NaN for {_examples(logits.isnan().any(dim=1))}")
    if logits.numel() and not (largest := logits.amax(dim=1).isfinite()).all():
        where = _examples(~largest)
        raise ValueError(f"{name}: expected a finite largest logit in each row, got an infinite one for {where}")
    if not masks and logits.isneginf().any():
        masked = logits.isneginf().any(dim=0).nonzero().flatten().tolist()
        raise ValueError(
            f"{name}: expected finite logits, got -inf (a mask?) for the classes {masked}; "
            "a large negative number such as -1e4 masks a class too"
        )


def _examples(which: Bool[Tensor, " batch"]) -> str:
    """The first of them by number, and how many there are."""
    found = which.nonzero().flatten().tolist()
    return f"example {found[0]}" if len(found) == 1 else f"{len(found)} of {len(which)} examples, first {found[0]}"


def check_callable(model: object, name: str = "model") -> None:
    """Raises a TypeError for what cannot be called on images."""
    if not callable(model):
        raise TypeError(f"{name}: expected a module, or a function of images, got {_described(model)}")


def check_evaluating(model: object, name: str = "model") -> None:
    """Refuse a model that is not a function of one image, since a layer of it is in training mode.

    Layers whose output does not depend on the mode may be in either. A layer depends on it where its code asks for
    ``self.training``, unless it is dropout of probability 0 or batch norm that keeps no running statistics.

    Raises:
        TypeError: if it cannot be called.
        ValueError: that names the first such layer. A plain function is not looked into.
    """
    check_callable(model, name)
    if not isinstance(model, nn.Module):
        return
    for path, module in model.named_modules():
        if module.training and _depends_on_mode(module):
            where = f' "{path}"' if path else ""
            raise ValueError(
                f"{name}: expected evaluation mode, got {type(module).__name__}{where} in training mode, whose output "
                f"depends on chance or on the batch; call {name}.eval() first"
            )


def _depends_on_mode(module: nn.Module) -> bool:
    if isinstance(module, nn.modules.batchnorm._NormBase):
        return module.track_running_stats
    # a probability of dropout, of the layer or inside it
    if any(getattr(module, name, None) == 0 for name in ("p", "drop_prob", "dropout")):
        return False
    # a hook may ask too: spectral norm improves its estimate at each call in training
    calls = [type(module).forward, *(type(hook).__call__ for hook in module._forward_pre_hooks.values())]
    codes = [getattr(inspect.unwrap(call), "__code__", None) for call in calls]
    return any("training" in code.co_names for code in codes if code)


def _range_of(images: Tensor) -> str:
    if images.isnan().any():
        return "NaN"
    return f"values from {_telling(images.min())} to {_telling(images.max())}"


def _telling(pixel: Tensor) -> str:
    """A pixel with four digits, or so many more that what is outside [0, 1] does not seem to lie on its border."""
    value = pixel.item()
    written = (f"{value:.{digits}g}" for digits in range(4, 18))
    return next(text for text in written if (float(text) > 1, float(text) < 0) == (value > 1, value < 0))


def _described(outputs: object) -> str:
    """What came in place of a tensor, with the parts of a collection."""
    kind = type(outputs).__name__
    if isinstance(outputs, dict):
        return f"a {kind} with the keys {list(outputs)}"
    if isinstance(outputs, tuple | list):
        parts = [f"shape {list(part.shape)}" if isinstance(part, Tensor) else type(part).__name__ for part in outputs]
        return f"a {kind} of {len(parts)} ({', '.join(parts)})"
    return f"a {kind}"
