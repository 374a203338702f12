"""Ctrl-C and SIGTERM, which let the epoch or the piece under way finish where a command has asked for that.

Without `deferred`, as in a notebook, a signal does what Python does with it.
"""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass

NAMES = {signal.SIGINT: "Ctrl-C", signal.SIGTERM: "SIGTERM"}


@dataclass
class _Now:
    """Of this process: how many pieces of work, one in another, are under way; the signal that waits for them."""

    under_way: int = 0
    asked: int | None = None


_NOW = _Now()


@contextmanager
def finished_first() -> Iterator[None]:
    """A piece of work that a first signal lets finish, and that ends the process's work then.

    Raises:
        KeyboardInterrupt: at its end, with the number of the signal that came.
    """
    _NOW.under_way += 1
    try:
        yield
    finally:
        _NOW.under_way -= 1
    if _NOW.under_way == 0 and _NOW.asked is not None:
        raise KeyboardInterrupt(_NOW.asked)


@contextmanager
def deferred(said: str) -> Iterator[None]:
    """A block in which a first signal waits for the work of `finished_first`, and a second one does not.

    Where no such work is under way the first one ends the block. A signal that is ignored stays ignored. Outside of the
    main thread, which alone may catch signals, nothing is changed.

    Args:
        said: what is printed, after the signal's name, when it has to wait.
    Raises:
        KeyboardInterrupt: with the signal's number.
    """

    def ask(number: int, _: object) -> None:
        if not _NOW.under_way or _NOW.asked is not None:
            raise KeyboardInterrupt(number)
        _NOW.asked = number
        # print may be interrupted in the middle of another one; nobody may listen any more
        with suppress(OSError):
            os.write(2, f"\n{said.format(NAMES[signal.Signals(number)])}\n".encode())

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    # what a shell has a job in the background ignore stays ignored; None is a handler that is not Python's
    caught = [number for number in NAMES if signal.getsignal(number) not in (signal.SIG_IGN, None)]
    before = {number: signal.signal(number, ask) for number in caught}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        _NOW.asked = None
