"""One hostile input at a time, in a fork of one warm process that is watched: what it did, how long, how much memory.

A fork has no more than `SECONDS` and `MEGABYTES` beyond what the warm process holds. An audit hook sees every file that
Python code writes, every process and every connection; a folder of canaries tells of code that ran.
"""

import contextlib
import faulthandler
import io
import json
import os
import resource
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from tqdm.auto import tqdm

SECONDS = 5.0
MEGABYTES = 512
# one line, of a few hundred characters
LONGEST = 900
# a hard stop, so that the machine lives on: address space is more than what is used
_ADDRESS_SPACE = 16 << 30
Expected = Literal["refused", "accepted", "either"]
REFUSALS = (ValueError, TypeError, OSError)
_PROCESSES = ("os.system", "subprocess.Popen", "os.exec", "os.posix_spawn", "os.fork", "pty.spawn", "socket.connect")
_MOVES = ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.link", "os.symlink", "shutil.rmtree")


@dataclass(frozen=True)
class Case:
    """A hostile input.

    Args:
        call: what is done with it; what it raises, or the status that it returns, is the answer.
        expected: "either" where both are right, as long as nothing else happens.
    """

    group: str
    name: str
    call: Callable[[], object]
    expected: Expected = "refused"
    seconds: float = SECONDS


@dataclass(frozen=True)
class Outcome:
    """What came of a case."""

    case: Case
    answer: str
    message: str
    seconds: float
    megabytes: float
    executed: list[str] = field(default_factory=list)
    outside: list[str] = field(default_factory=list)

    @property
    def faults(self) -> list[str]:
        """What is wrong about it; empty if nothing is."""
        found = []
        if self.answer not in ("refused", "accepted"):
            found.append(f"unexplained: {self.answer}")
        elif self.case.expected != "either" and self.answer != self.case.expected:
            found.append(f"unexpected: {self.answer}")
        if self.executed:
            found.append(f"executed: {', '.join(self.executed)}")
        if self.outside:
            found.append(f"outside: {', '.join(self.outside)}")
        if self.seconds > self.case.seconds:
            found.append(f"slow: {self.seconds:.1f} s")
        if self.megabytes > MEGABYTES:
            found.append(f"large: {self.megabytes:.0f} MB")
        if len(self.message) > LONGEST or (self.answer == "refused" and not self.message.strip()):
            found.append(f"message of {len(self.message)} characters")
        return found


def attempt(case: Case, scratch: Path, canaries: Path) -> Outcome:
    """Do what a case says in a fork.

    Args:
        scratch: the only folder that it may write to, beside the system's temporary one.
        canaries: a folder in which code that ran leaves a file.
    """
    before = {path.name for path in canaries.iterdir()}
    read, write = os.pipe()
    start = time.monotonic()
    child = os.fork()
    if child == 0:
        os.close(read)
        _child(case, scratch, write)
    os.close(write)
    report, killed = _report_of(child, read, start + 4 * case.seconds)
    executed = sorted({path.name for path in canaries.iterdir()} - before)
    answer = "killed at its limit" if killed else report.get("answer", "died")
    return Outcome(
        case,
        answer,
        report.get("message", ""),
        # of the call alone: a fork of a large process takes its time
        report.get("seconds", time.monotonic() - start),
        report.get("megabytes", 0.0),
        executed,
        report.get("outside", []),
    )


def _child(case: Case, scratch: Path, write: int) -> None:
    report: dict[str, Any] = {}
    seen: list[str] = []
    # what a fork that is aborted would print is told by its status
    faulthandler.disable()
    try:
        os.setsid()
        # what is written to the standard output, past Python, goes nowhere
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        own_locks()
        held = _resident()
        space = int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (space + _ADDRESS_SPACE, space + _ADDRESS_SPACE))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        sys.addaudithook(_hook((scratch, Path(tempfile.gettempdir())), seen))
        start = time.monotonic()
        report = _answered(case)
        report["seconds"] = time.monotonic() - start
        report["megabytes"] = (_peak() - held) / 2**20
    except BaseException as error:
        report = {"answer": f"broke the harness: {type(error).__name__}", "message": str(error)[:300]}
    report["outside"] = seen[:4]
    with contextlib.suppress(OSError):
        # what a pipe holds
        report["message"] = str(report.get("message", ""))[: 4 * LONGEST]
        os.write(write, json.dumps(report, default=str).encode())
    os._exit(0)


def own_locks() -> None:
    """In a fork: a lock of its own for progress bars. One that all share, held by a fork that is killed, stops all."""
    tqdm.set_lock(threading.RLock())


def _answered(case: Case) -> dict[str, Any]:
    words = io.StringIO()
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(words):
            status = case.call()
    except REFUSALS as error:
        return {"answer": "refused", "message": str(error)}
    except SystemExit as asked:
        # argparse has said it on several lines
        return {"answer": "refused" if asked.code == 2 else f"exit {asked.code}", "message": _last(words.getvalue())}
    except BaseException as error:
        return {"answer": type(error).__name__, "message": str(error)[:300]}
    if status == 2:
        lines = [line for line in words.getvalue().splitlines() if line.startswith("clustr:")]
        return {"answer": "refused" if len(lines) == 1 else "refused on several lines", "message": "".join(lines)}
    return {"answer": "accepted", "message": ""}


def _last(text: str) -> str:
    return text.strip().rpartition("\n")[2]


def _resident() -> int:
    return int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[1]) * resource.getpagesize()


def _peak() -> int:
    """The most memory that was held at one time, in bytes; a fork begins with that of its parent."""
    for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
        if line.startswith("VmHWM"):
            return int(line.split()[1]) * 1024
    return _resident()


def _report_of(child: int, read: int, until: float) -> tuple[dict[str, Any], bool]:
    """What a fork said, and whether it had to be killed."""
    chunks, killed = [], False
    os.set_blocking(read, False)
    while True:
        with contextlib.suppress(BlockingIOError):
            while block := os.read(read, 65_536):
                chunks.append(block)
        if os.waitpid(child, os.WNOHANG)[0]:
            break
        if time.monotonic() > until:
            os.killpg(child, signal.SIGKILL)
            os.waitpid(child, 0)
            killed = True
            break
        time.sleep(0.002)
    with contextlib.suppress(BlockingIOError):
        while block := os.read(read, 65_536):
            chunks.append(block)
    os.close(read)
    try:
        return json.loads(b"".join(chunks)), killed
    except ValueError:
        return {}, killed


def _hook(allowed: tuple[Path, ...], seen: list[str]) -> Callable[[str, tuple], None]:
    places = (*(str(place.resolve()) for place in allowed), "/dev/null", "/proc/self", "/dev/tty")

    def inside(path: str) -> bool:
        return path.startswith(places)

    def hook(event: str, arguments: tuple) -> None:
        path = written(event, arguments)
        if path is not None and not inside(real := os.path.realpath(path)):
            _stop(f"write {real}", seen)
        elif event in _MOVES:
            path = os.fsdecode(arguments[1] if event in ("os.rename", "os.link", "os.symlink") else arguments[0])
            real = os.path.join(os.path.realpath(os.path.dirname(path) or "."), os.path.basename(path))
            if not inside(real) or real.startswith("/dev/"):
                _stop(f"{event} {real}", seen)
        elif event in _PROCESSES and not _is_git(arguments):
            seen.append(f"{event} {str(arguments)[:80]}")

    return hook


def written(event: str, arguments: tuple) -> str | None:
    """The file that an audit event of Python opens for writing, if it is of one."""
    path, mode, flags = (*arguments, None, None, None)[:3]
    text = isinstance(mode, str) and any(kind in mode for kind in "wax+")
    numeric = isinstance(flags, int) and flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
    if event != "open" or not isinstance(path, str | bytes) or not (text or numeric):
        return None
    return os.fsdecode(path)


def _is_git(arguments: tuple) -> bool:
    """The one program that the package itself starts, to note the commit."""
    return bool(arguments) and arguments[0] == "git"


def _stop(what: str, seen: list[str]) -> None:
    seen.append(what)
    raise PermissionError(f"harness: {what}")


@contextlib.contextmanager
def changed_environment(**values: str) -> Iterator[None]:
    """A block with other environment variables."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value
