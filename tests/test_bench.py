"""The benchmarks run, compare what they say they compare, and have every target's row; speed is not asserted."""

import math
import os
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch

from benchmarks import __main__ as entry
from benchmarks import attacking, certifying, growth, harness, steps
from benchmarks.harness import Effort, Row, Times

ROOT = Path(__file__).resolve().parents[1]
QUICK = Effort(rounds=2, seconds=0.1, quick=True)
TARGETS = {
    "pairwise certificate, clusters, float32": 2.0,
    "pairwise certificate, noise, float64": 2.0,
    "peak extra memory, clusters": 256.0,
    "cluster logits, centroids fixed": 1.5,
    "magnet loss": 3.5,
    "pgd": 1.03,
    "pgd, channels_last": 0.9,
    "whole evaluation, seconds": 0.35,
    "autoattack": 1.05,
    "autoattack, the authors' own loop": 1.05,
    "embeddings of a data set": 1.02,
    "import": 1.15,
}


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> Path:
    """What one quick run of everything leaves; the libraries that are not pinned for the tests are hidden from it."""
    folder = tmp_path_factory.mktemp("bench")
    hide = "import sys; sys.modules['faiss'] = None; sys.modules['adv_lib'] = None\n"
    run = "from benchmarks.__main__ import main; raise SystemExit(main(sys.argv[1:]))"
    command = [sys.executable, "-W", "ignore", "-c", hide + run, "--quick", "--threads", "1", "--output", str(folder)]
    done = subprocess.run(command, cwd=ROOT, env=os.environ, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return folder


def test_every_target_has_its_row(written):
    table = pd.read_csv(written / "bench.csv")
    assert list(table.columns[: len(entry.COLUMNS)]) == entry.COLUMNS
    targets = table.dropna(subset="target").set_index("name")
    assert {name: targets.loc[name, "target"] for name in TARGETS} == TARGETS
    assert targets["measured"].notna().all()
    assert set(targets["met"]) <= {"yes", "no"}
    # chapters take too long here
    assert set(table["suite"]) == set(entry.SUITES) - {"chapters"}
    assert {"processor", "cores", "threads", "memory_gb", "torch", "mkl"} <= set(table.columns)
    # what is not installed has a row that says so
    missing = table[table["setting"].str.contains("not installed")]
    assert len(missing) >= 2
    assert missing["measured"].isna().all()


def test_every_other_table_has_its_columns(written):
    columns = {
        "growth": ["what", "parameter", "size", "seconds"],
        "step-parts": ["method", "part", "share", "milliseconds"],
        "methods-cost": ["method", "step_ratio", "steps", "epochs", "training_ratio", "forward_ratio",
                         "certificate_ratio"],
        "layouts": ["encoder", "width", "pass", "layout", "ratio"],
        "predicted": ["what", "setting", "predicted", "measured", "ratio", "calibrated"],
    }  # fmt: skip
    tables = {name: pd.read_csv(written / f"{name}.csv") for name in columns}
    for name, expected in columns.items():
        assert list(tables[name].columns[: len(expected)]) == expected
        assert len(tables[name])
    assert set(columns) == set(entry.TABLES)
    grown = tables["growth"].groupby(["what", "parameter"])["size"].nunique()
    assert (grown >= 2).all()
    assert tables["step-parts"].groupby("method")["share"].sum().tolist() == pytest.approx([1.0] * len(steps.SHOWN))
    cost = tables["methods-cost"].set_index("method")
    assert cost.loc["ce", "training_ratio"] == pytest.approx(1)
    certifying_methods = set(cost.index[cost["certificate_ratio"].notna()])
    assert certifying_methods == {"clustr-lip", "clustr-cert", "lip-linear", "smoothing"}
    # so many forward passes, and more
    assert cost.loc["smoothing", "certificate_ratio"] > 10
    calibrated = tables["predicted"][tables["predicted"]["calibrated"]]
    assert calibrated["ratio"].tolist() == pytest.approx([1.0] * len(calibrated))


def test_only_some_suites_leave_the_other_rows(written):
    before = pd.read_csv(written / "bench.csv")
    arguments = ["--quick", "--threads", "1", "--only", "sampler", "--output", str(written)]
    assert entry.main(arguments) == 0
    after = pd.read_csv(written / "bench.csv")
    assert after["name"].tolist() == before["name"].tolist()
    others = before["suite"] != "sampler"
    pd.testing.assert_frame_equal(after[others], before[others])


def test_a_ratio_is_the_median_within_rounds():
    times = Times({"ours": [2.0, 30.0, 4.0], "theirs": [1.0, 10.0, 4.0]})
    assert times.ratio("ours", "theirs") == 2.0
    assert times.less("ours", "theirs", 1, "rest").median("rest") == 1.0
    assert Row("s", "n", 1.0, "ratio", "", "", 1.0).met == "yes"
    assert Row("s", "n", 1.1, "ratio", "", "", 1.0).met == "no"
    assert Row("s", "n", math.nan, "ratio", "", "", 1.0).met == Row("s", "n", 1.0, "ratio", "", "").met == ""


def test_peak_memory_is_that_of_the_call():
    megabytes = harness.peak_extra_megabytes("tests.memory:allocation", count=64)
    assert 60 <= megabytes <= 80


def test_the_broadcasts_are_the_same_functions():
    embeddings, _, clusters = certifying.scene(30, 4, 3, 6)
    logits = certifying.broadcast_logits(embeddings, clusters)
    torch.testing.assert_close(logits, certifying.cluster_logits(embeddings, clusters), rtol=1e-4, atol=1e-4)
    radius, ours = certifying.broadcast_radius(embeddings, clusters), certifying.certified_radius(embeddings, clusters)
    torch.testing.assert_close(ours, radius, rtol=1e-3, atol=1e-3)
    assert (ours <= radius * (1 + 1e-5)).all()


def test_nothing_is_broken_where_every_gradient_is_counted():
    model, images, labels = attacking.unbreakable(2, 4)
    found = attacking.pgd(model, images, labels, eps=attacking.EPS, step_size=attacking.STEP, steps=3)
    assert not found.success.any()
    assert found.gradients.tolist() == [3] * 4


def test_a_trainee_trains():
    trainee = steps.Trainee(growth.Clustr(width=4), 60)
    before = [weight.clone() for weight in trainee.state.network.encoder.parameters()]
    trainee.train()
    after = list(trainee.state.network.encoder.parameters())
    assert any(not torch.equal(a, b) for a, b in zip(after, before, strict=True))


def test_a_table_of_ones_own_is_not_replaced(tmp_path: Path) -> None:
    mine = tmp_path / "layouts.csv"
    mine.write_text("a,b\n1,2\n", encoding="utf-8")
    with pytest.raises(ValueError, match="--output: expected no table, or one of an earlier call, got another in"):
        entry.main(["--quick", "--threads", "1", "--only", "layouts", "--output", str(tmp_path)])
    assert mine.read_text(encoding="utf-8") == "a,b\n1,2\n"
