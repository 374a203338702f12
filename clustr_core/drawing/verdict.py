"""The battery's verdict on a model, as one HTML page with its pictures: nothing else is needed to read it."""

import base64
import io
from collections.abc import Sequence
from html import escape

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from clustr_core.drawing.looks import PAGE
from clustr_core.drawing.results import draw_image
from clustr_core.drawing.tables import shown
from clustr_core.measuring.checks import loss_table
from clustr_core.measuring.evaluation import Evaluation
from clustr_core.measuring.slices import slice_table
from clustr_core.measuring.stranger import MARK

STYLE = (
    "body{font:16px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem}"
    "body{color:#111;background:#fff}"
    "pre{white-space:pre-wrap}img{max-width:100%}table{border-collapse:collapse;font-size:.85rem}"
    "td,th{padding:.2rem .6rem;text-align:left;vertical-align:top;border-bottom:1px solid #ddd}"
    ".wide{overflow-x:auto}@media(prefers-color-scheme:dark){body{color:#eee;background:#161616}"
    "img{background:#fff}td,th{border-color:#444}}"
)
# images of which the slices are drawn
PICTURED = 4


def verdict_page(title: str, lines: Sequence[str], evaluation: Evaluation, table: pd.DataFrame) -> str:
    """The page: the verdict's lines, three pictures, and every check with its source.

    Args:
        lines: of `stranger.page`.
        table: of `diagnostics.ask_all`.
    """
    pictures = {
        "Robust accuracy as the ball grows, by what is climbed: the curves should fall together, at 0.5 to the images "
        "that have the class of plain grey.": _curves,
        "What the attack climbed, step by step, of the images that its last restart saw.": _paths,
        "Some images called robust, and the loss and the margin along the attack's direction. A margin above 0 is "
        "another class.": _slices,
    }
    # the first line is the title
    text = "\n".join(lines[1:])
    body = [f"<h1>{escape(title)}</h1>", f"<pre>{escape(text)}</pre>"]
    for caption, draw in pictures.items():
        body.append(f'<figure><img alt="{escape(caption)}" src="{_source(draw(evaluation))}">')
        body.append(f"<figcaption>{escape(caption)}</figcaption></figure>")
    columns = ["check", "value", "threshold", "flagged", "meaning", "source"]
    body.append(f'<div class="wide">{shown(table[columns])._repr_html_()}</div>')
    head = f'<meta charset="utf-8">{MARK}<title>{escape(title)}</title><style>{STYLE}</style>'
    head += '<meta name="viewport" content="width=device-width">'
    return f'<!doctype html><html lang="en"><head>{head}</head><body>{"".join(body)}</body></html>\n'


def _source(figure: Figure) -> str:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None}, bbox_inches="tight", dpi=120)
    plt.close(figure)
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _curves(evaluation: Evaluation) -> Figure:
    grid = sorted({min(factor * evaluation.eps, 0.5) for factor in (0.25, 0.5, 1, 2, 4)} | {0.5})
    found = loss_table(evaluation, grid)
    figure, ax = plt.subplots(figsize=(PAGE, 3.2), layout="constrained")
    looks = iter(("-o", "--s", "-.D", ":^"))
    for surface in ("evaluation", "logits"):
        for loss in ("ce", "margin"):
            rows = found.query("surface == @surface and loss == @loss")
            ax.plot(rows["eps"], rows["robust_accuracy"], next(looks), markersize=5, label=f"{loss} on {surface}")
    ax.set(xlabel="eps, L-infinity", ylabel="robust accuracy", ylim=(-0.03, 1.03))
    ax.legend()
    return figure


def _paths(evaluation: Evaluation) -> Figure:
    figure, ax = plt.subplots(figsize=(PAGE, 3.2), layout="constrained")
    for losses, _ in evaluation.path.runs[-1:]:
        ax.plot(np.arange(len(losses)), losses.numpy(), color="0.4", linewidth=0.7, alpha=0.6)
    ax.set(xlabel="step", ylabel="cross-entropy on what is climbed")
    return figure


def _slices(evaluation: Evaluation) -> Figure:
    robust = evaluation.robust.nonzero().flatten()[:PICTURED].tolist()
    rows = max(len(robust), 1)
    size = (PAGE, 1.7 * rows)
    figure, axes = plt.subplots(rows, 2, figsize=size, layout="constrained", squeeze=False, width_ratios=(1, 3))
    if not robust:
        for ax in axes[0]:
            ax.axis("off")
        axes[0, 1].text(0.5, 0.5, "none is called robust", ha="center")
        return figure
    table = slice_table(evaluation, points=21)
    along = table[table["b"].abs() < 1e-9]
    for row, index in enumerate(robust):
        draw_image(axes[row, 0], evaluation.images[index].cpu().numpy(), f"class {int(evaluation.labels[index])}")
        line = along[along["index"] == index]
        axes[row, 1].plot(line["a"], line["margin"], label="margin")
        axes[row, 1].plot(line["a"], line["loss"], "--", label="loss")
        axes[row, 1].axhline(0, color="0.6", linewidth=0.8)
    axes[0, 1].legend()
    axes[-1, 1].set_xlabel("along the attack's direction, in eps")
    return figure
