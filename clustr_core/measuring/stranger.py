"""A stranger's model under the battery: built by a function of theirs, judged on a page."""

import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from textwrap import wrap

import pandas as pd
import torch
from torch import Tensor, nn

from clustr_core import data
from clustr_core.attacks.gradient import pgd
from clustr_core.attacks.result import Model
from clustr_core.measuring.accuracy import binomial_interval
from clustr_core.measuring.checks import CHECKS
from clustr_core.measuring.diagnostics import verdict
from clustr_core.measuring.evaluation import Evaluation
from clustr_core.measuring.pieces import drawn_order

WIDTH = 88


def built(name: str, device: str | torch.device = "cpu") -> nn.Module:
    """What ``MODULE:FUNCTION`` returns, in evaluation mode; the folder in which one stands is searched first.

    Importing runs the module: it is trusted, as any program that one runs.

    Raises:
        ValueError: if the name has another form; if there is no such module or function; if it fails, or returns no
            module.
    """
    module, _, function = name.partition(":")
    if not (module and function.isidentifier()):
        raise ValueError(f"model: expected MODULE:FUNCTION, such as my_module:build, got {name!r}")
    sys.path.insert(0, str(Path.cwd()))
    try:
        build = getattr(importlib.import_module(module), function)
        model = build()
    except Exception as error:  # whatever a stranger's program does
        raise ValueError(f"model: expected {name} to build a network, got {type(error).__name__}: {error}") from error
    finally:
        sys.path.remove(str(Path.cwd()))
    if not isinstance(model, nn.Module):
        raise ValueError(f"model: expected {name} to return a torch.nn.Module, got {type(model).__name__}")
    return model.to(device).eval().requires_grad_(False)


def evaluation_of(
    model: nn.Module,
    dataset: data.Dataset,
    *,
    eps: float,
    examples: int,
    steps: int = 20,
    restarts: int = 2,
    surface: Model | None = None,
    device: str | torch.device = "cpu",
) -> Evaluation:
    """Plain PGD on the model's own outputs, as most papers report it, on the first test images of the drawn order.

    Args:
        surface: what the attack climbs, if it is not what the model returns.
    Raises:
        ValueError: as `Evaluation`; if the model does not take the data's images, or has other classes.
    """
    indices = drawn_order(dataset)[:examples].sort().values
    images, labels = data.to_float(dataset.test_images[indices].to(device)), dataset.test_labels[indices].to(device)
    try:
        with torch.no_grad():
            outputs: object = model(images[:1])
    except (RuntimeError, ValueError, TypeError) as error:
        shape = ", ".join(map(str, dataset.image_shape))
        raise ValueError(f"model: expected one that takes images of shape [batch, {shape}], got {error}") from error
    if not isinstance(outputs, Tensor) or outputs.shape != (1, dataset.num_classes):
        got = list(outputs.shape) if isinstance(outputs, Tensor) else type(outputs).__name__
        raise ValueError(f"model: expected {dataset.num_classes} outputs an image for {dataset.name}, got {got}")
    step_size = 2.5 * eps / steps
    climbed = model if surface is None else surface
    return Evaluation(climbed, model, images, labels, eps, steps, restarts, step_size, rule=pgd)


def page(title: str, evaluation: Evaluation, table: pd.DataFrame, *, bold: Callable[[str], str] = str) -> list[str]:
    """The verdict in lines of text, fit for a review.

    Args:
        table: of `diagnostics.ask_all` on the evaluation.
        bold: what is done to the verdict itself.
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
    # whose value is by how much the number is too high
    beyond = spoken[(spoken["kind"] == "witness") & (spoken["check"] != "loss disagreement")]
    if verdict(table):
        lines.append(bold("The reported number is not to be trusted."))
    else:
        lines.append(bold("No sign that the reported number is wrong. That is no proof: other attacks may find more."))
    if len(beyond):
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
    low, high = binomial_interval(of, count)
    return f"{100 * of / count:.1f} % [{100 * low:.1f}, {100 * high:.1f}]"
