"""Shapes are checked while testing: of each function the first calls in every test, and one of many after these.

A check takes longer than a step on a toy model, and a test takes thousands of steps: checking them all is three
quarters of the time of such a test.
"""

import inspect
from collections.abc import Callable
from functools import cache, partial, wraps
from typing import Any

import jaxtyping

# calls of a function that are checked in each test, and of the later ones one in so many
FIRST, EVERY = 5, 100
BEARTYPE = "beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))"

_calls: dict[int, int] = {}


def install(package: str) -> None:
    """Check the functions and dataclasses of a package that is not imported yet; an int is a float."""
    jaxtyping.jaxtyped = partial(_decorated, jaxtyping.jaxtyped)
    jaxtyping.install_import_hook(package, BEARTYPE)


def begin() -> None:
    """Every function's next calls are its first: a test begins."""
    _calls.clear()


def _decorated(jaxtyped: Callable[..., Any], **options: Any) -> Callable[[Any], Any]:
    return lambda target: _checked(jaxtyped(**options), target)


def _checked(check: Callable[[Any], Any], target: Any) -> Any:
    if not inspect.isfunction(target):
        return check(target)
    # inside another function: made anew at each call of that, and a check is compiled each time
    if "<locals>" in target.__qualname__:
        return target
    # made at the first call: a third of the functions are not called by any test of a process
    checked, me = cache(partial(check, target)), id(target)

    @wraps(target)
    def sampled(*args: Any, **kwargs: Any) -> Any:
        done = _calls[me] = _calls.get(me, 0) + 1
        return (checked() if done <= FIRST or done % EVERY == 0 else target)(*args, **kwargs)

    return sampled
