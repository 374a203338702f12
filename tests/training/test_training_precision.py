"""What float32 means in a training and in a measurement, whatever the caller has switched on."""

import pandas as pd
import pytest
import torch

from clustr_core.measuring.pieces import CachedRows
from clustr_core.training.loop import fit
from clustr_core.training.recipes import CrossEntropy


@pytest.fixture(autouse=True)
def coarse():
    """The caller has switched on what is coarsest."""
    torch.set_float32_matmul_precision("medium")
    yield
    torch.set_float32_matmul_precision("highest")


def multiplied():
    """How a GPU multiplies here."""
    return torch.backends.cuda.matmul.fp32_precision


@pytest.mark.parametrize(("precision", "inside"), [("32-true", "ieee"), ("tf32", "tf32"), ("bf16-mixed", "ieee")])
def test_a_training_is_in_the_precision_of_its_recipe(precision, inside, digits, tmp_path):
    before, seen = multiplied(), []
    assert before == "tf32"
    recipe = CrossEntropy(epochs=2, width=4, train_examples=60, precision=precision)
    run = fit(recipe, dataset=digits, folder=tmp_path, progress=False, before_epoch=lambda: seen.append(multiplied()))
    assert seen == [inside, inside]
    assert multiplied() == before
    assert run.recipe.precision == precision


def test_on_a_cpu_tf32_is_float32(digits, tmp_path):
    weights = []
    for precision in ("32-true", "tf32"):
        recipe = CrossEntropy(epochs=1, width=4, train_examples=60, precision=precision)
        weights.append(fit(recipe, dataset=digits, folder=tmp_path / precision, progress=False).weights_sha256)
    assert weights[0] == weights[1]


def test_rows_are_measured_in_float32(tmp_path):
    seen = CachedRows(tmp_path / "rows.csv", lambda: pd.DataFrame({"multiplied": [multiplied()]}), 1).read()
    assert seen["multiplied"].tolist() == ["ieee"]
    assert multiplied() == "tf32"
