"""A slice of `make torture`: every tenth hostile input, some kills; and that the harness sees what it is there for."""

import os
import time
from pathlib import Path

import pytest

from tools.torture import fuzz, kills, trouble
from tools.torture.__main__ import GROUPS, faults, hostile, summary, unthought_of
from tools.torture.forks import Case, attempt

AT_SOME_TIME = ("Ctrl-C", "SIGTERM", "files dated fifty years off")
pytestmark = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux: /proc, and forks")


@pytest.fixture
def places(tmp_path, monkeypatch):
    """A scratch folder and one of canaries; the process comes back to where it was."""
    (canaries := tmp_path / "canaries").mkdir()
    (scratch := tmp_path / "scratch").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CLUSTR_HOME", str(tmp_path))
    return scratch, canaries


@pytest.mark.parametrize("name", GROUPS)
def test_every_tenth_hostile_input(tmp_path, monkeypatch, as_installed, name):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CLUSTR_HOME", str(tmp_path))
    outcomes = hostile([name], tmp_path / "torture", every=10)
    assert faults(outcomes) == []
    assert len(outcomes) >= 15
    assert summary(outcomes)[-1] == "faults: none"
    assert {each.answer for each in outcomes} == {"refused", "accepted"} or name == "released"


def test_inputs_that_nobody_thought_of(tmp_path, monkeypatch, as_installed):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CLUSTR_HOME", str(tmp_path))
    outcomes = unthought_of(tmp_path / "torture", each=12, keep=tmp_path / "kept")
    assert faults(outcomes) == []
    assert len(outcomes) == 12 * len(fuzz.LOADERS)
    assert {each.answer for each in outcomes} == {"refused", "accepted"}
    assert not (tmp_path / "kept").exists()


def reads_all_but_long_lists(folder):
    """A loader with a fault, for the search to find."""

    def made(drawn, value):
        def call():
            (folder / "input").write_text(repr(value), encoding="utf-8")
            if isinstance(value, list) and len(value) > 1:
                raise KeyError(value)

        return call

    return made


def test_what_breaks_a_loader_is_found_and_kept_as_small_as_can_be(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CLUSTR_HOME", str(tmp_path))
    monkeypatch.setattr(fuzz, "LOADERS", {"faulty": reads_all_but_long_lists})
    outcomes = unthought_of(tmp_path / "torture", keep=tmp_path / "kept")
    assert any("unexplained: KeyError" in line for line in faults(outcomes))
    smallest = (tmp_path / "kept/fuzz-faulty/input").read_text(encoding="utf-8")
    assert len(eval(smallest)) == 2
    assert len(smallest) < 20


def test_kills_at_writes_and_at_random_times(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CLUSTR_HOME", str(tmp_path))
    found = kills.tried(tmp_path / "kills", 8)
    assert found.lost == []
    assert (found.at_writes, found.at_times) == (4, 4)


def test_troubles(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CLUSTR_HOME", str(tmp_path))
    found = trouble.tried(tmp_path / "troubles", 1)
    assert found.wrong == []
    assert found.tried == dict.fromkeys(trouble.TROUBLES, 1)
    # these may come too late; the others strike at once
    assert all(found.reached[kind] for kind in trouble.TROUBLES if kind not in AT_SOME_TIME)


def says_nothing_and_leaves_half(place, drawn, seconds):
    (place / "results/killed").mkdir(parents=True)
    (place / "results/killed/certificates-clustr.csv.half").write_text("half", encoding="utf-8")
    return ["status 99"], True


def test_trouble_that_is_not_got_over_is_seen(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CLUSTR_HOME", str(tmp_path))
    monkeypatch.setattr(trouble, "TROUBLES", {"harm": says_nothing_and_leaves_half})
    found = trouble.tried(tmp_path / "troubles", 1)
    assert found.wrong == [
        "harm, number 0: status 99",
        "harm, number 0: differs in ['results/killed/certificates-clustr.csv.half']",
    ]


def test_what_is_lost_is_seen(tmp_path, monkeypatch):
    """A second run that leaves other bytes is another result."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CLUSTR_HOME", str(tmp_path))
    real, calls = kills._forked, []

    def forked(place, **how):
        calls.append(how)
        status = real(place, **how)
        if not how:
            next((place / "results").rglob("*.csv")).write_text("other", encoding="utf-8")
        return status

    monkeypatch.setattr(kills, "_forked", forked)
    found = kills.tried(tmp_path / "kills", 1)
    assert len(found.lost) == 1
    assert "results" in found.lost[0]


def fills_the_memory():
    return len(bytearray(700 << 20))


def writes_outside(folder):
    (folder / "file").write_text("x", encoding="utf-8")


@pytest.mark.parametrize(
    ("call", "fault"),
    [
        (lambda: 1 // 0, "unexplained: ZeroDivisionError"),
        (lambda: 0, "unexpected: accepted"),
        (fills_the_memory, "large: 7"),
        (lambda: time.sleep(0.4), "slow: 0.4 s"),
        (lambda: time.sleep(30), "unexplained: killed at its limit"),
        (lambda: os.abort(), "unexplained: died"),
        (lambda: exec("raise ValueError('x' * 5000)"), "message of 3600 characters"),
        (lambda: exec("raise ValueError"), "message of 0 characters"),
        (lambda: os.system("true"), "outside: os.system"),
        (lambda: Path("/nowhere").mkdir(), "outside: os.mkdir /nowhere"),
    ],
)
def test_the_harness_sees_what_is_wrong(places, call, fault):
    scratch, canaries = places
    # short where time is what is wrong, and else as long as a busy machine may take
    seconds = 0.3 if fault.startswith(("slow", "unexplained: killed")) else 60.0
    outcome = attempt(Case("group", "name", call, seconds=seconds), scratch, canaries)
    assert any(found.startswith(fault) for found in outcome.faults), outcome


def test_the_harness_sees_code_that_ran(places):
    scratch, canaries = places
    outcome = attempt(Case("group", "name", lambda: (canaries / "ran").touch(), "either"), scratch, canaries)
    assert "executed: ran" in outcome.faults
    assert attempt(Case("group", "name", lambda: None, "accepted"), scratch, canaries).faults == []
    assert attempt(Case("group", "name", lambda: int("x"), "refused"), scratch, canaries).faults == []
