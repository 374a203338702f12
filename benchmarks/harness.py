"""Timing in one run: callables in turn, round after round, so that whatever slows the machine slows them all alike.

Only medians and ratios of pairs are reported: a ratio is the median over the rounds of the ratio within a round. Peak
memory is that of a fresh process.
"""

import importlib
import json
import math
import os
import platform
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any, TypeVar

import numpy as np
import torch
from threadpoolctl import threadpool_limits

Call = Callable[[], object]
_T = TypeVar("_T")
STATUS, RESET_PEAK = Path("/proc/self/status"), Path("/proc/self/clear_refs")


@dataclass(frozen=True)
class Effort:
    """How hard to measure: at most ``rounds``, and no new round after ``seconds`` once three are done.

    Args:
        quick: tiny sizes, which show that a suite runs and nothing about speed.
    """

    rounds: int = 11
    seconds: float = 8.0
    quick: bool = False

    def pick(self, full: _T, quick: _T) -> _T:
        """A size for the real measurement, or the one for a smoke test."""
        return quick if self.quick else full


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Args:
        measured: NaN where it could not be measured, and ``setting`` says why.
        target: at most this much; NaN for a row that is for information.
        compared: what the measured number is a quotient of, or is.
    """

    suite: str
    name: str
    measured: float
    unit: str
    compared: str
    setting: str
    target: float = math.nan
    rounds: int = 1

    @property
    def met(self) -> str:
        """Whether the target is met: "yes", "no", or "" where there is none or nothing was measured."""
        if math.isnan(self.target) or math.isnan(self.measured):
            return ""
        return "yes" if self.measured <= self.target else "no"


@dataclass(frozen=True)
class Times:
    """Seconds of each callable in each round."""

    seconds: dict[str, list[float]]

    @property
    def rounds(self) -> int:
        """How many rounds there were."""
        return len(next(iter(self.seconds.values())))

    def median(self, name: str) -> float:
        """The median over the rounds."""
        return median(self.seconds[name])

    def ratio(self, ours: str, theirs: str) -> float:
        """The median over the rounds of the ratio within a round."""
        return median(a / b for a, b in zip(self.seconds[ours], self.seconds[theirs], strict=True))

    def less(self, name: str, other: str, count: float, result: str) -> "Times":
        """With one more: ``name`` without ``count`` times ``other``, round by round."""
        pairs = zip(self.seconds[name], self.seconds[other], strict=True)
        return Times(self.seconds | {result: [a - count * b for a, b in pairs]})


def interleaved(calls: Mapping[str, Call], effort: Effort) -> Times:
    """Run the callables in turn, once unmeasured (not where speed means nothing) and then round after round."""
    if not effort.quick:
        for call in calls.values():
            call()
    times: dict[str, list[float]] = {name: [] for name in calls}
    start = time.perf_counter()
    for done in range(effort.rounds):
        if done >= 3 and time.perf_counter() - start > effort.seconds:
            break
        for name, call in calls.items():
            times[name].append(seconds(call))
    return Times(times)


def seconds(call: Call) -> float:
    """Wall time of one call."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


@contextmanager
def one_thread() -> Iterator[None]:
    """One thread inside the block, PyTorch's, BLAS's and everybody's."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with threadpool_limits(1):
            yield
    finally:
        torch.set_num_threads(threads)


def repeated(call: Call, count: int) -> Call:
    """So many calls as one, for what is too short to time alone."""

    def run() -> None:
        for _ in range(count):
            call()

    return run


def peak_extra_megabytes(job: str, **options: Any) -> float:
    """Peak memory (1e6 bytes) that one call adds to what a fresh process holds; NaN where the kernel does not tell.

    Args:
        job: "module:function". The function takes ``options``, prepares the data and returns the call. Once before, a
            call on ``count=8`` points is made, so that loading libraries is not counted.
    Raises:
        RuntimeError: if the process fails.
    """
    command = [sys.executable, "-c", f"from benchmarks import harness; harness.report_peak({job!r})"]
    given = json.dumps({"threads": torch.get_num_threads(), "options": options})
    root = str(Path(__file__).resolve().parents[1])
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([root, os.environ.get("PYTHONPATH", "")])}
    # glibc raises this as it goes, and then keeps chunks that were freed: what a process holds would depend on chance
    environment |= {"MALLOC_MMAP_THRESHOLD_": "131072"}
    done = subprocess.run(command, input=given, env=environment, capture_output=True, encoding="utf-8", check=False)
    if done.returncode:
        raise RuntimeError(f"job: {job} failed in a fresh process: {done.stderr[-2000:]}")
    return float(done.stdout)


def report_peak(job: str) -> None:
    """In the fresh process: read the options, prepare, call, and print by how much the peak exceeds what was held."""
    given = json.load(sys.stdin)
    torch.set_num_threads(given["threads"])
    module, _, function = job.partition(":")
    prepare = getattr(importlib.import_module(module), function)
    prepare(**given["options"] | {"count": 8})()
    call = prepare(**given["options"])
    if not RESET_PEAK.exists():
        print(math.nan)
        return
    # not getrusage: its peak is inherited from the parent's memory and cannot be set back
    RESET_PEAK.write_text("5", encoding="utf-8")
    before = _kilobytes("VmRSS")
    call()
    print((_kilobytes("VmHWM") - before) * 1024 / 1e6)


def _kilobytes(field: str) -> int:
    (found,) = re.findall(rf"^{field}:\s+(\d+) kB$", STATUS.read_text(encoding="utf-8"), re.M)
    return int(found)


def machine() -> dict[str, Any]:
    """What a reader needs to judge a number: processor, cores, threads, memory, system and versions."""
    found = re.search(r"Math Kernel Library Version (\S+)", torch.__config__.show())
    pages = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_gb": round(pages / 1e9, 1),
        "system": platform.system(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "mkl": found[1] if found else "none",
    }


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    found = re.search(r"^model name\s*:\s*(.+)$", info.read_text(encoding="utf-8"), re.M) if info.exists() else None
    return found[1].strip() if found else platform.processor() or platform.machine()
