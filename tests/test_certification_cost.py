"""The cost of a certified image, in a tiny setting: what is counted is right, and every method is timed."""

import pytest
import torch

from benchmarks import certification
from clustr_core.storage.tables import read_table

SAMPLES = 20
MODE = "donot_use_mm_for_euclid_dist"
PROFILE = """
shared: {dataset: digits}
methods:
  ce: {width: 8}
  clustr-lip: {encoder: lip-cnn, width: 48, per_class: 3}
"""
METHODS = [
    "encoder", "clusters-nearest", "clusters-pairwise", "clusters-exact", "linear-margin", "smoothing-20",
    "smoothing-100000-by-proportion", "pixels-nearest", "pixels-pairwise", "pixels-exact",
]  # fmt: skip


@pytest.fixture(scope="module")
def table():
    return certification.cost_table(
        encoder="small-cnn", width=4, per_class=2, base_width=2, images=6, samples=SAMPLES, rounds=2
    )


def test_a_row_for_each_method(table):
    assert list(table.columns) == ["method", "forwards", "multiply_adds", "seconds_ratio"]
    assert table["method"].tolist() == METHODS
    assert (table["seconds_ratio"] > 0).all()
    assert table["seconds_ratio"][0] == 1
    assert not table.isna().any(axis=None)


def test_forward_passes_are_counted(table):
    found = table.set_index("method")["forwards"]
    assert found["smoothing-20"] == 100 + SAMPLES
    assert found["smoothing-100000-by-proportion"] == pytest.approx(100 + 100_000)
    assert (found[METHODS[:5]] == 1).all()
    assert (found[METHODS[7:]] == 0).all()


def test_multiply_adds_are_counted(table):
    """Of one image: three convolutions and a linear layer; then distances to 20 centroids, and what is shared.

    The six images share the distances between the centroids, and their mean, taken once in each of two precisions.
    """
    found = dict(zip(table["method"], table["multiply_adds"], strict=True))
    encoder = 9 * (3 * 4 * 32**2 + 4 * 8 * 16**2 + 8 * 8 * 8**2) + 8 * 8**2 * 64
    assert found["encoder"] == encoder
    shared = (20 + 2) * 20 / 6
    assert found["clusters-nearest"] == found["clusters-pairwise"] == pytest.approx(encoder + (20 + shared) * 64)
    assert found["clusters-exact"] >= found["clusters-pairwise"]
    # the logits once for the class, once more for the margin
    assert found["linear-margin"] == pytest.approx(encoder + 2 * 10 * 64 + 10 * 10 * 64 / 6)
    assert found["pixels-nearest"] == pytest.approx((20 + shared) * 3072)
    assert found["smoothing-20"] % 120 == 0
    assert found["smoothing-100000-by-proportion"] == pytest.approx(found["smoothing-20"] * 100_100 / 120)


def test_the_formulas_count_what_the_counter_leaves_out():
    """A distance of dimension d is d multiply-adds, a system of size n about n^3 / 3."""
    points, systems = torch.rand(5, 7), torch.rand(4, 6, 6)
    method = certification.Method("distances", lambda: torch.cdist(points, points[:3], compute_mode=MODE), 1)
    assert certification._spent(method) == (0, 5 * 3 * 7)
    method = certification.Method("systems", lambda: torch.linalg.solve(systems, systems[:, 0]), 2)
    assert certification._spent(method) == (0, pytest.approx(4 * (6**3 / 3 + 6**2) / 2))


def test_the_many_samples_are_the_few_by_proportion(table):
    ratios = table.set_index("method")["seconds_ratio"]
    assert ratios["smoothing-100000-by-proportion"] == pytest.approx(ratios["smoothing-20"] * 100_100 / 120)


def test_the_table_is_written_with_its_setting(tiny_book, capsys):
    certification.main(["--profile", "tiny", "--images", "3", "--samples", "11", "--rounds", "1"])
    written = read_table(tiny_book / "results/bench/certification-cost.csv")
    assert set(written["encoder"]) == {"lip-cnn"}
    for name, value in {"width": 48, "per_class": 3, "images": 3, "samples": 11, "rounds": 1, "threads": 1}.items():
        assert set(written[name]) == {value}
    assert "smoothing-11" in written["method"].tolist()
    assert dict(zip(written["method"], written["forwards"], strict=True))["smoothing-11"] == 111
    assert "smoothing-100000-by-proportion" in capsys.readouterr().out


def test_a_profile_that_certifies_no_clusters_is_refused(tiny_book):
    (tiny_book / "profiles/tiny.yaml").write_text("methods: {ce: {width: 8}}\n")
    with pytest.raises(ValueError, match="profile tiny: expected a method with clusters and a Lipschitz guarantee"):
        certification.setting_of("tiny")
