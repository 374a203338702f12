"""Joules of the processors: from counters that begin anew, some of which nobody may read."""

import math
import time
from pathlib import Path

import pytest

from benchmarks import energy


def _package(root: Path, name: str, stand: int, most: int = 999_999_999) -> None:
    (root / name).mkdir(exist_ok=True)
    (root / name / "energy_uj").write_text(f"{stand}\n", encoding="utf-8")
    (root / name / "max_energy_range_uj").write_text(f"{most}\n", encoding="utf-8")


@pytest.fixture
def counters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(energy, "COUNTERS", tmp_path)
    return tmp_path


def test_all_packages_are_added_and_their_parts_are_not(counters: Path) -> None:
    for name in ("intel-rapl:0", "intel-rapl:1", "intel-rapl:0:0"):
        _package(counters, name, 5_000_000)
    with energy.measured() as taken:
        _package(counters, "intel-rapl:0", 7_000_000)
        _package(counters, "intel-rapl:1", 5_500_000)
        _package(counters, "intel-rapl:0:0", 9_000_000)
    assert taken.joules == pytest.approx(2.5)


def test_a_counter_that_begins_anew_is_followed(counters: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(energy, "SECONDS_BETWEEN_LOOKS", 0.01)
    _package(counters, "intel-rapl:0", 9_000_000, most=9_999_999)
    with energy.measured() as taken:
        for stand in (4_000_000, 9_000_000, 4_000_000):
            _package(counters, "intel-rapl:0", stand, most=9_999_999)
            time.sleep(0.2)
    assert taken.joules == pytest.approx(15)


def test_what_cannot_be_read_is_no_number(counters: Path) -> None:
    with energy.measured() as taken:
        pass
    assert math.isnan(taken.joules)
    (counters / "intel-rapl:0").mkdir()
    (counters / "intel-rapl:0" / "energy_uj").write_text("no number", encoding="utf-8")
    with energy.measured() as taken:
        pass
    assert math.isnan(taken.joules)
