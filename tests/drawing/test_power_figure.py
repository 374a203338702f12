"""The picture of what the checks are worth, and the page of a verdict."""

import matplotlib.pyplot as plt
import pandas as pd
import pytest
import torch
from torch import nn

from clustr_core.attacks.gradient import pgd
from clustr_core.drawing.power import power_figure
from clustr_core.drawing.verdict import verdict_page
from clustr_core.measuring.evaluation import Evaluation


@pytest.fixture
def spoken() -> pd.DataFrame:
    columns = {
        "a": ("protocol", "ce, paper's", 0.0),
        "b": ("correct", "PGD on all", 0.1),
        "c": ("failure", "lost", 1.0),
    }
    return pd.DataFrame(
        [
            {"check": check, "evaluation": name, "kind": kind, "share": share, "broken": broken}
            for check, shares in {"one": (0.0, 0.2, 1.0), "two": (1.0, 1.0, 1.0)}.items()
            for share, (kind, name, broken) in zip(shares, columns.values(), strict=True)
        ]
    )


@pytest.fixture
def rates() -> pd.DataFrame:
    rows = [("two", "broken", 0.5), ("two", "honest", 1.0), ("one", "broken", 1.0), ("one", "honest", 0.0)]
    table = pd.DataFrame(rows, columns=["check", "truth", "share"])
    return table.assign(low=(table["share"] - 0.1).clip(0), high=(table["share"] + 0.1).clip(upper=1))


def test_checks_stand_by_their_hits_and_evaluations_by_their_kind(spoken, rates):
    figure = power_figure(spoken, rates)
    left, right = figure.axes
    assert [text.get_text() for text in left.get_yticklabels()] == ["one", "two"]
    names = [text.get_text() for text in left.get_xticklabels()]
    assert names == ["cross-entropy (0 %)", "PGD on all (10 %)", "lost (100 %)"]
    assert left.images[0].get_array().tolist() == [[0.0, 0.2, 1.0], [1.0, 1.0, 1.0]]
    hits, alarms = right.get_lines()
    assert hits.get_xdata().tolist() == [1.0, 0.5]
    assert alarms.get_xdata().tolist() == [0.0, 1.0]
    plt.close(figure)


def test_a_gap_is_refused(spoken, rates):
    with pytest.raises(ValueError, match="share: expected finite numbers, got nan in row 0"):
        power_figure(spoken.assign(share=spoken["share"].where(spoken.index > 0)), rates)


@pytest.mark.parametrize(("eps", "robust"), [(0.5, False), (1e-4, True)])
def test_a_page_has_its_pictures_whether_images_are_robust_or_not(eps: float, robust: bool):
    g = torch.Generator().manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 4)).eval().requires_grad_(False)
    images = torch.rand(8, 1, 8, 8, generator=g)
    labels = model(images).argmax(dim=1)
    evaluation = Evaluation(model, model, images, labels, eps, steps=20, restarts=1, step_size=eps / 4, rule=pgd)
    assert evaluation.robust.all() == robust
    assert evaluation.robust.any() == robust
    rows = {"check": "it", "value": 0.5, "threshold": 0.1, "flagged": True, "meaning": "a < b", "source": "here"}
    before = torch.get_rng_state()
    page = verdict_page("a & b", ["a & b", "x < y"], evaluation, pd.DataFrame([rows]))
    assert torch.equal(torch.get_rng_state(), before)
    assert page.startswith("<!doctype html>")
    assert page.count("<img ") == page.count("<figcaption>") == 3
    assert "<h1>a &amp; b</h1>" in page
    assert "<pre>x &lt; y</pre>" in page
    assert "a &lt; b" in page
    assert plt.get_fignums() == []
