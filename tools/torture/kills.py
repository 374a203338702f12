"""Kill a training and its measurements, at each write and at random times; go on, and compare byte for byte.

SIGKILL strikes a fork of the warm process: before the n-th thing that it does to the file system, for every n, and at
times drawn between its start and its end. Another fork then runs the same commands. What is lost is what differs from a
run that nobody killed.
"""

import contextlib
import io
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from clustr_core import cli
from clustr_core.storage.files import digest, write_string
from tools.torture.forks import own_locks, written

PROFILE = """\
shared: {dataset: digits, width: 2, train_examples: 40, seed: 111}
methods:
  clustr: {epochs: 2, per_class: 1, per_cluster: 4, snapshots: [1]}
attacks:
  linf: {norm: linf, eps: [0.1], steps: 1, losses: [ce], examples: 4}
certified_examples: 4
"""
COMMANDS = ("train", "attack", "certify")
WORDS = ("--profile", "killed", "--method", "clustr", "--device", "cpu")
_WRITES = ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.link", "os.symlink")


@dataclass
class Killed:
    """What was tried, and what came of it."""

    at_writes: int = 0
    at_times: int = 0
    leftovers: int = 0
    lost: list[str] = field(default_factory=list)

    def lines(self) -> list[str]:
        """In words."""
        return [
            f"{self.at_writes + self.at_times} kills: {self.at_writes} at writes, {self.at_times} at random times",
            f"lost: {', '.join(self.lost[:5]) or 'nothing'}",
            f"temporary files left, which a later write beside them removes: {self.leftovers}",
        ]


def tried(folder: Path, count: int) -> Killed:
    """So many kills in a book of its own: one at each write first, as far as they go, then at random times."""
    # once here, so that no fork has anything left to import
    commands(folder / "warm")
    expected, writes, seconds = _undisturbed(folder / "whole")
    found, drawn = Killed(), random.Random(0)
    for number in range(count):
        place = folder / "killed"
        shutil.rmtree(place, ignore_errors=True)
        if number < min(writes, count // 2):
            found.at_writes += 1
            how = f"write {number}"
            _forked(place, kill_at=number)
        else:
            found.at_times += 1
            after = drawn.uniform(0, seconds)
            how = f"after {after:.3f} s"
            _forked(place, kill_after=after)
        status = _forked(place)
        contents = contents_of(place)
        found.leftovers += sum(name.endswith(".tmp") for name in contents)
        differing = lost(contents, expected)
        if status != 0 or differing:
            found.lost.append(f"{how}: status {status}, {differing[:3]}")
    return found


def _undisturbed(place: Path) -> tuple[dict[str, str], int, float]:
    """What a run leaves that nobody kills, how often it writes, and how long it takes."""
    count = place.parent / "writes"
    start = time.monotonic()
    if _forked(place, counted=count):
        raise RuntimeError("kills: expected a run that nobody kills to end well")
    seconds = time.monotonic() - start
    return contents_of(place), int(count.read_text(encoding="utf-8")), seconds


def lost(contents: dict[str, str], expected: dict[str, str]) -> list[str]:
    """The files, temporary ones left out, that are not what they should be."""
    kept = {name: each for name, each in contents.items() if not name.endswith(".tmp")}
    return sorted(name for name in kept.keys() | expected.keys() if kept.get(name) != expected.get(name))


def contents_of(place: Path) -> dict[str, str]:
    """A digest of each file below a folder."""
    files = (path for path in place.rglob("*") if path.is_file())
    return {str(path.relative_to(place)): digest(path.read_bytes()) for path in files}


def _forked(
    place: Path, *, kill_at: int | None = None, kill_after: float | None = None, counted: Path | None = None
) -> int:
    """The status of all commands in a fork; negative where it was killed."""
    place.mkdir(parents=True, exist_ok=True)
    child = os.fork()
    if child == 0:
        status = 99
        try:
            status = _work(place, kill_at, counted)
        finally:
            os._exit(status)
    if kill_after is not None:
        time.sleep(kill_after)
        os.kill(child, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def _work(place: Path, kill_at: int | None, counted: Path | None) -> int:
    own_locks()
    seen = [0]
    sys.addaudithook(_counter(place, seen, kill_at))
    status = commands(place)
    if counted is not None:
        counted.write_text(str(seen[0]), encoding="utf-8")
    return status


def commands(place: Path) -> int:
    """The largest status of all commands in a book at ``place``; what they say goes nowhere."""
    book_at(place)
    os.environ["CLUSTR_HOME"] = str(place)
    os.chdir(place)
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        return max(cli.main([command, *WORDS]) for command in COMMANDS)


def book_at(place: Path) -> None:
    """A book with the one profile that is tried."""
    (place / "profiles").mkdir(parents=True, exist_ok=True)
    (place / "myst.yml").touch()
    # once: another one may be reading it
    if not (profile := place / "profiles" / "killed.yaml").exists():
        write_string(profile, PROFILE)


def _counter(place: Path, seen: list[int], kill_at: int | None) -> Callable[[str, tuple], None]:
    within = str(place.resolve())

    def hook(event: str, arguments: tuple) -> None:
        path = written(event, arguments) or (os.fsdecode(arguments[0]) if event in _WRITES else None)
        if path is None or not os.path.abspath(path).startswith(within):
            return
        if seen[0] == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        seen[0] += 1

    return hook
