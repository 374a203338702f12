"""A stranger's model under the battery: built by a function of theirs, judged on a page."""

import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from textwrap import wrap

import pandas as pd
import torch
from torch import Tensor, nn

from clustr_core import data
from clustr_core.attacks.ball import Images
from clustr_core.attacks.gradient import pgd
from clustr_core.measuring.accuracy import binomial_interval
from clustr_core.measuring.checks import CHECKS
from clustr_core.measuring.diagnostics import verdict
from clustr_core.measuring.evaluation import Evaluation
from clustr_core.measuring.pieces import drawn_order
from clustr_core.measuring.study import with_interval
from clustr_core.storage.gate import shortened

WIDTH = 88
# by which a page that was written earlier is known
MARK = '<meta name="generator" content="clustr diagnose">'


class Stranger(nn.Module):
    """A stranger's model, of which nothing is expected: what goes wrong in it is said in a line that names it, and
    images and outputs are copied, so that one which works in place changes none of ours."""

    def __init__(self, model: nn.Module, argument: str) -> None:
        super().__init__()
        self.model, self.argument = model, argument
        self.classes: int | None = None

    def forward(self, images: Images) -> Tensor:
        """What the model returns.

        Raises:
            ValueError: if it fails.
        """
        shape = ", ".join(map(str, images.shape[1:]))
        with named_here(f"{self.argument}: expected one that takes images of shape [batch, {shape}]"):
            outputs: object = self.model(images.clone())
        # a nested tensor has no shape that could be asked for
        if isinstance(outputs, Tensor) and outputs.is_nested:
            outputs = list(outputs.unbind())
        if not isinstance(outputs, Tensor) or outputs.dim() != 2 or len(outputs) != len(images):
            got = list(outputs.shape) if isinstance(outputs, Tensor) else type(outputs).__name__
            raise Failed(f"{self.argument}: expected outputs of shape [{len(images)}, class], got {got}")
        if self.classes not in (None, outputs.shape[1]):
            got = f"{self.classes}, then {outputs.shape[1]}"
            raise Failed(f"{self.argument}: expected as many classes at each call, got {got}")
        self.classes = outputs.shape[1]
        dense = outputs.layout == torch.strided and outputs.device == images.device and not outputs.is_quantized
        if not dense or not outputs.is_floating_point():
            got = f"{outputs.layout} {outputs.dtype} on {outputs.device}"
            raise Failed(f"{self.argument}: expected outputs that are dense real numbers on {images.device}, got {got}")
        # copied, since it may be a buffer of the model's, written again at the next call; NumPy has no bfloat16
        return outputs.clone() if outputs.dtype in (torch.float32, torch.float64) else outputs.to(torch.float32)


class Failed(ValueError):
    """What a stranger's program did in place of what was expected of it."""


@contextmanager
def named_here(expected: str) -> Iterator[None]:
    """Whatever a stranger's program does ends as a `Failed` that says what was expected of it."""
    try:
        yield
    except Failed:
        raise
    except (Exception, SystemExit) as error:
        said = shortened(" ".join([f"{type(error).__name__}:", *str(error).split()]))
        raise Failed(f"{expected}, got {said.removesuffix(':')}") from error


def built(name: str, device: str | torch.device = "cpu", *, argument: str = "model") -> nn.Module:
    """What ``MODULE:FUNCTION`` returns, in evaluation mode; the folder in which one stands is searched first.

    Importing runs the module: it is trusted, as any program that one runs.

    Args:
        argument: what it is called in errors.
    Raises:
        ValueError: if the name has another form; if there is no such module or function; if it fails, or returns no
            module.
    """
    module, _, function = name.partition(":")
    if not (module and function.isidentifier()):
        raise ValueError(f"{argument}: expected MODULE:FUNCTION, such as my_module:build, got {name!r}")
    before = list(sys.path)
    sys.path.insert(0, str(Path.cwd()))
    try:
        with named_here(f"{argument}: expected {name} to build a network"):
            model = getattr(importlib.import_module(module), function)()
    finally:
        sys.path[:] = before
    if not isinstance(model, nn.Module):
        raise ValueError(f"{argument}: expected {name} to return a torch.nn.Module, got {type(model).__name__}")
    with named_here(f"{argument}: expected a network that can be put on {device} for evaluation"):
        return Stranger(model, argument).to(device).eval().requires_grad_(False)


def evaluation_of(
    model: nn.Module,
    dataset: data.Dataset,
    *,
    eps: float,
    examples: int,
    steps: int = 20,
    restarts: int = 2,
    surface: nn.Module | None = None,
    device: str | torch.device = "cpu",
) -> Evaluation:
    """Plain PGD on the model's own outputs, as most papers report it, on the first test images of the drawn order.

    Args:
        surface: what the attack climbs, if it is not what the model returns.
    Raises:
        ValueError: as `Evaluation`; if model or surface does not take the data's images, has other classes, or has no
            gradient to climb; if the two call more than a tenth of the clean images by other classes.
    """
    indices = drawn_order(dataset)[:examples].sort().values
    images, labels = data.to_float(dataset.test_images[indices].to(device)), dataset.test_labels[indices].to(device)
    outputs = _asked("model", model, images, dataset)
    if surface is not None:
        theirs = _asked("surface", surface, images, dataset)
        other = int((theirs.argmax(dim=1) != outputs.argmax(dim=1)).sum())
        if other > len(images) / 10:
            raise ValueError(
                f"surface: expected the classes that the model gives to clean images, got others for {other} of "
                f"{len(images)}: an attack on it says nothing of the model"
            )
    climbed = model if surface is None else surface
    name = "model" if surface is None else "surface"
    if not _has_gradient(name, climbed, images):
        raise ValueError(
            f"{name}: expected outputs with a gradient in the image, got none: PGD has nothing to climb, and whatever "
            "it reports is no robustness"
        )
    return Evaluation(climbed, model, images, labels, eps, steps, restarts, 2.5 * eps / steps, rule=pgd)


def _asked(name: str, model: nn.Module, images: Images, dataset: data.Dataset) -> Tensor:
    """What a network says of the images, if it is what a classifier of these data would say."""
    count = dataset.num_classes
    with torch.no_grad():
        outputs = model(images)
    if (got := list(outputs.shape)) != [len(images), count]:
        raise ValueError(f"{name}: expected outputs of shape [{len(images)}, {count}] for {dataset.name}, got {got}")
    return outputs


def _has_gradient(name: str, model: nn.Module, images: Images) -> bool:
    """Whether there is anything to climb: a first step is tried."""
    leaf = images.clone().requires_grad_()
    outputs = model(leaf)
    if not outputs.requires_grad:
        return False
    with named_here(f"{name}: expected outputs with a gradient in the image"):
        (towards,) = torch.autograd.grad(outputs.sum(), leaf, allow_unused=True)
    return towards is not None


def page(title: str, evaluation: Evaluation, table: pd.DataFrame) -> list[str]:
    """The verdict in lines of text, fit for a review.

    Args:
        table: of `diagnostics.ask_all` on the evaluation.
    """
    count, kept = len(evaluation.labels), int(evaluation.robust.sum())
    clean = int(evaluation.attacked.clean_correct.sum())
    spoken = pd.DataFrame(table[table["flagged"].astype(bool)]).assign(
        kind=lambda rows: [CHECKS[check].kind for check in rows["check"]]
    )
    lines = [
        title,
        f"{count} test images, L-infinity {evaluation.eps:.4g}; PGD, {evaluation.steps} steps x {evaluation.restarts}",
        f"clean {_share(clean, count)}; robust as reported {_share(kept, count)}",
        "",
    ]
    symptoms = spoken[~spoken["kind"].isin(["witness", "indicator"])]
    if verdict(table):
        lines.append("The reported number is not to be trusted.")
    elif len(symptoms):
        lines.append("One kind of symptom: not enough to call the number wrong, and worth a look.")
    else:
        lines.append("No sign that the reported number is wrong. That is no proof: other attacks may find more.")
    # what a network that draws calls an image is another thing at the next pass
    drawn = "randomised" in set(spoken["check"])
    # whose value is by how much the number is too high
    beyond = spoken[(spoken["kind"] == "witness") & (spoken["check"] != "loss disagreement")]
    if len(beyond) and not drawn:
        at_most = 100 * (kept / count - beyond["value"].max())
        lines.append(f"At most {at_most:.1f} % of these images are robust: the others were broken by a check.")
    heading_of = {"witness": "Witnesses", "indicator": "Indicators of others"}
    headings = spoken["kind"].map(lambda kind: heading_of.get(kind, "Symptoms"))
    for heading in ("Witnesses", "Symptoms", "Indicators of others"):
        chosen = spoken[headings == heading]
        if len(chosen):
            lines += ["", f"{heading}:"]
        for check, value, meaning in zip(chosen["check"], chosen["value"], chosen["meaning"], strict=True):
            lines += wrap(f"{check}: {value:.3g} ({meaning})", WIDTH, initial_indent="  ", subsequent_indent="    ")
    silent = [check for check in table["check"] if check not in set(spoken["check"])]
    lines += ["", *wrap(f"Silent: {', '.join(silent) or 'none'}.", WIDTH)]
    return lines


def _share(of: int, count: int) -> str:
    return with_interval(of / count, *binomial_interval(of, count)).replace("[", "% [")
