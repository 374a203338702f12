"""What is wrong with what a command was given, in one line."""

import argparse
import math
import sys
from collections.abc import Callable

from clustr_core.storage.gate import brief, shortened


def told(main: Callable[[], int | None]) -> int:
    """A command's status: its own, 0 for none, or 2 where what it was given was wrong, which is said."""
    try:
        return main() or 0
    except (OSError, ValueError) as error:
        print(shortened(" ".join(str(error).split())), file=sys.stderr)
        return 2


def count(text: str) -> int:
    """An argument that counts something: at least 1."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"expected at least 1, got {brief(number)}")
    return number


def amount(text: str) -> float:
    """An argument that measures something: above 0."""
    number = float(text)
    if not 0 < number < math.inf:
        raise argparse.ArgumentTypeError(f"expected a finite number above 0, got {brief(number)}")
    return number
