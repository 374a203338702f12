"""Joules that the processors take, where they count them and let everybody read.

Linux shows the counters of each package under /sys/class/powercap (RAPL), of some processors to root alone, and in
virtual machines not at all. They count all that runs on a package, not one process.
"""

import math
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

COUNTERS = Path("/sys/class/powercap")
# a counter begins anew after some minutes at full power: between two looks at most once
SECONDS_BETWEEN_LOOKS = 60.0


@dataclass
class Energy:
    """What was taken since the first look.

    Args:
        joules: of all packages; NaN where no counter can be read.
    """

    joules: float = math.nan
    _last: dict[str, tuple[int, int]] = field(default_factory=dict)

    def look(self) -> None:
        """Add what was taken since the last look."""
        now = _microjoules()
        taken = [(now[name][0] - before) % span for name, (before, span) in self._last.items() if name in now]
        if now and math.isnan(self.joules):
            self.joules = 0.0
        self.joules += sum(taken) / 1e6
        self._last |= now


@contextmanager
def measured() -> Iterator[Energy]:
    """Measure what a block takes."""
    energy, ended = Energy(), threading.Event()
    energy.look()

    def look_now_and_then() -> None:
        while not ended.wait(SECONDS_BETWEEN_LOOKS):
            energy.look()

    thread = threading.Thread(target=look_now_and_then, daemon=True)
    thread.start()
    try:
        yield energy
    finally:
        ended.set()
        thread.join()
        energy.look()


def _microjoules() -> dict[str, tuple[int, int]]:
    """Of each package: where its counter stands, and after how many it begins anew."""
    found = {}
    # parts of a package have another number
    for package in sorted(COUNTERS.glob("intel-rapl:[0-9]*")):
        if package.name.count(":") == 1:
            try:
                stand, most = (
                    int((package / name).read_text(encoding="ascii")) for name in ("energy_uj", "max_energy_range_uj")
                )
            except (OSError, ValueError):
                continue
            found[package.name] = (stand, most + 1)
    return found
