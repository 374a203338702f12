"""What is timed on a GPU runs at toy size on a CPU: every method's epoch beside the bare loop, and an attack."""

import sys

import pandas as pd
import pytest

from benchmarks import gpu_steps
from benchmarks.gpu_steps import EPOCHS, TOY


def test_every_headline_method_has_its_epoch_and_its_aim(monkeypatch: pytest.MonkeyPatch) -> None:
    # what an epoch does is tested elsewhere; here: that each is timed beside the bare loop, in the same images
    made = []
    assert set(EPOCHS) == {"ce", "clustr", "clustr-qtrades", "pgd-at", "fast-at"}
    monkeypatch.setattr(gpu_steps, "EPOCHS", {"clustr": EPOCHS["clustr"], "ce": EPOCHS["ce"]})
    monkeypatch.setattr(gpu_steps, "_in_turn", lambda ways, size: made.append(ways) or {"ours": 0.3, "bare": 0.1})
    rows = pd.DataFrame(gpu_steps.trainings(TOY))
    assert set(rows["what"]) == {"epoch of clustr", "epoch of ce"}
    ours = made[-1]["ours"]
    assert rows["precision"].iloc[-1] == ours.recipe.precision == "32-true"
    assert rows["seconds"].iloc[-1] == pytest.approx(0.3 * 50_000 / ours.examples)
    assert rows["bare_seconds"].iloc[-1] == pytest.approx(0.1 * 50_000 / (TOY.batch * TOY.batches))
    aimed = rows[rows["what"] == "epoch of ce"].set_index("precision")["target"]
    assert aimed["bf16-mixed"] == 1.15
    assert aimed.drop("bf16-mixed").isna().all()
    before = [weight.clone() for weight in ours.state.network.parameters()]
    ours()
    assert any((old != new).any() for old, new in zip(before, ours.state.network.parameters(), strict=True))


def test_an_attack_takes_all_its_steps_on_every_image() -> None:
    (row,) = gpu_steps.attacks(TOY)
    assert row["ratio"] == row["seconds"] / row["bare_seconds"]


def test_it_needs_a_gpu(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["gpu_steps"])
    monkeypatch.setattr(gpu_steps.torch.cuda, "is_available", lambda: False)
    assert gpu_steps.main() == 2
    assert "expected a CUDA device, found none; --toy needs none" in capsys.readouterr().err


def test_a_gpu_is_timed_as_a_leg_would_train_and_without() -> None:
    size = gpu_steps.Size("cuda")
    ways = {method: gpu_steps.ways_to_train(method, size) for method in EPOCHS}
    assert ways["ce"] == [("bf16-mixed", False), *((each, True) for each in ("bf16-mixed", "tf32", "32-true"))]
    assert ways["pgd-at"] == [("bf16-mixed", True), ("tf32", True)]
