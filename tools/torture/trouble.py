"""Trouble that a machine makes: it asks to end, files cannot grow, a folder is locked, dates are off, two at once.

A fork of the warm process trains, attacks and certifies while it is troubled. What must come: a status that says what
happened, at most one line, nothing half written; and then, untroubled, the results of a run that had no trouble.
"""

import contextlib
import fcntl
import os
import random
import resource
import shutil
import signal
import stat
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from clustr_core import cli
from clustr_core.storage.gate import MB
from tools.torture.forks import own_locks
from tools.torture.kills import COMMANDS, WORDS, book_at, commands, contents_of, lost

NOBODY = 65534
# a century either way
CENTURY = 100 * 365 * 24 * 3600


@dataclass
class Troubled:
    """What was tried, and what came of it."""

    tried: Counter[str] = field(default_factory=Counter)
    reached: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)

    def lines(self) -> list[str]:
        """In words."""
        told = [f"{count} times {kind} ({self.reached[kind]} were struck)" for kind, count in self.tried.items()]
        return [*told, f"lost or unexplained: {', '.join(self.wrong[:5]) or 'nothing'}"]


@dataclass
class _Child:
    """A fork at work."""

    pid: int
    # the end of a pipe from which it is read what the fork said
    pipe: int
    text: str = ""

    def status(self) -> int:
        """Its exit status, negative if a signal ended it."""
        status = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        with os.fdopen(self.pipe, "rb") as said:
            self.text = said.read().decode("utf-8", "replace")
        return status

    def lines(self) -> list[str]:
        """What it said, but for bars of progress."""
        return [line for line in self.text.replace("\r", "\n").splitlines() if line.strip() and "|" not in line]


def tried(folder: Path, count: int) -> Troubled:
    """So many troubles of each kind, in a book of its own."""
    folder.mkdir(parents=True)
    # once here, so that no fork has anything left to import
    commands(folder / "warm")
    start = time.monotonic()
    if _begun(folder / "whole").status():
        raise RuntimeError("trouble: expected a run without trouble to end well")
    seconds, expected = time.monotonic() - start, contents_of(folder / "whole")
    found, drawn = Troubled(), random.Random(0)
    for kind, trouble in TROUBLES.items():
        for number in range(count):
            place = folder / "troubled"
            shutil.rmtree(place, ignore_errors=True)
            found.tried[kind] += 1
            name = f"{kind}, number {number}"
            wrong, struck = trouble(place, drawn, seconds)
            found.reached[kind] += struck
            found.wrong += [f"{name}: {each}" for each in wrong]
            last = _begun(place)
            if (status := last.status()) != 0:
                found.wrong.append(f"{name}: status {status} without trouble: {last.lines()[-1:]}")
            if differing := lost(contents_of(place), expected):
                found.wrong.append(f"{name}: differs in {differing[:3]}")
    return found


def _begun(place: Path, before: Callable[[], object] = lambda: None) -> _Child:
    """A fork that runs all commands in a book at a place, after a call of ``before`` in it."""
    book_at(place)
    # not a file, which a full disk would end; with room for all that is said, since it is read at the end
    said, end = os.pipe()
    fcntl.fcntl(end, fcntl.F_SETPIPE_SZ, MB)
    pid = os.fork()
    if pid == 0:
        status = 99
        try:
            status = _work(place, end, before)
        except KeyboardInterrupt as asked:
            status = 128 + (asked.args[0] if asked.args else signal.SIGINT)
        finally:
            os._exit(status)
    os.close(end)
    return _Child(pid, said)


def _work(place: Path, said: int, before: Callable[[], object]) -> int:
    signal.signal(signal.SIGTERM, lambda number, _: os._exit(128 + number))
    os.dup2(said, 2)
    sys.stderr = os.fdopen(2, "w", buffering=1, encoding="utf-8", closefd=False)
    own_locks()
    os.environ["CLUSTR_HOME"] = str(place)
    os.chdir(place)
    before()
    with open(os.devnull, "w", encoding="utf-8") as nowhere, contextlib.redirect_stdout(nowhere):
        for command in COMMANDS:
            if status := cli.main([command, *WORDS]):
                return status
    return 0


_Answer = tuple[list[str], bool]


def _unexplained(child: _Child, status: int, allowed: Sequence[int]) -> list[str]:
    """What is wrong with how a fork ended: another status, or more than a line about it and one about the wait."""
    ours = [line for line in child.lines() if line.startswith("clustr: ")]
    wrong = [] if status in (0, *allowed) else [f"status {status}: {child.lines()[-1:]}"]
    wrong += ["a traceback"] * any("Traceback" in line for line in child.lines())
    return wrong + [f"{len(ours)} lines"] * (len(ours) > (2 if status > 2 else 1))


def _asked(number: signal.Signals) -> Callable[[Path, random.Random, float], _Answer]:
    def trouble(place: Path, drawn: random.Random, seconds: float) -> _Answer:
        child = _begun(place)
        time.sleep(drawn.uniform(0.02, seconds))
        with contextlib.suppress(ProcessLookupError):
            os.kill(child.pid, number)
        status = child.status()
        return _unexplained(child, status, (128 + number,)), status != 0

    return trouble


def _cannot_grow(place: Path, drawn: random.Random, seconds: float) -> _Answer:
    size = drawn.choice((0, 10, 500, 2000, 10_000, 30_000))
    child = _begun(place, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size)))
    status = child.status()
    half = [path for path in contents_of(place) if path.endswith(".tmp")]
    return [*_unexplained(child, status, (2,)), *half], status != 0


def _locked(place: Path, drawn: random.Random, seconds: float) -> _Answer:
    folders = [place, place / "runs", place / "results"]
    book_at(place)
    for folder in folders:
        folder.mkdir(exist_ok=True)
    locked = folders[drawn.randrange(len(folders))]
    for folder in folders:
        folder.chmod(0o777)
    locked.chmod(0o555)
    before = contents_of(place)

    def as_somebody() -> None:
        if os.getuid() == 0:
            os.setgid(NOBODY)
            os.setuid(NOBODY)

    child = _begun(place, as_somebody)
    status = child.status()
    wrong = _unexplained(child, status, (2,))
    if locked == place / "runs" and contents_of(place) != before:
        wrong.append("written where nothing may be")
    for folder in folders:
        folder.chmod(stat.S_IRWXU)
    return wrong, status != 0


def _dated(place: Path, drawn: random.Random, seconds: float) -> _Answer:
    """Kill it, and let its files be fifty years older or younger, as after a clock was set."""
    child = _begun(place)
    time.sleep(drawn.uniform(0.02, seconds))
    os.kill(child.pid, signal.SIGKILL)
    status, then = child.status(), time.time() + drawn.choice((-1, 1)) * CENTURY / 2
    for path in place.rglob("*"):
        os.utime(path, (then, then))
    return [], status != 0


def _together(count: int) -> Callable[[Path, random.Random, float], _Answer]:
    def trouble(place: Path, drawn: random.Random, seconds: float) -> _Answer:
        children = []
        for _ in range(count):
            children.append(_begun(place))
            time.sleep(drawn.uniform(0, seconds / 4))
        ends = [(child, child.status()) for child in children]
        return [wrong for child, status in ends for wrong in _unexplained(child, status, ())], True

    return trouble


TROUBLES: dict[str, Callable[[Path, random.Random, float], _Answer]] = {
    "Ctrl-C": _asked(signal.SIGINT),
    "SIGTERM": _asked(signal.SIGTERM),
    "files that cannot grow": _cannot_grow,
    "a locked folder": _locked,
    "files dated fifty years off": _dated,
    "two at once": _together(2),
    "three at once": _together(3),
}
