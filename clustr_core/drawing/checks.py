"""What every drawing function asks of its table before it draws: rows, the columns it names, finite numbers."""

from collections.abc import Iterable

import numpy as np
import pandas as pd


def check_rows(table: pd.DataFrame, *numbers: str, words: tuple[str, ...] = ()) -> None:
    """Refuse a table of which something could not be seen.

    Args:
        numbers: columns of finite numbers.
        words: columns of names, without gaps.
    Raises:
        ValueError: if there is no row, a column is missing, or a value is no number, NaN, infinite or a gap; the
            column, the value and its row are named.
    """
    if absent := [name for name in (*numbers, *words) if name not in table]:
        raise ValueError(f"table: expected a column {absent[0]!r}, got {list(table.columns)}")
    if table.empty:
        raise ValueError("table: expected rows to draw, got none")
    for name in numbers:
        values = np.asarray(pd.to_numeric(pd.Series(table[name]), errors="coerce"), dtype=float)
        _refuse(name, "finite numbers", pd.Series(table[name]), ~np.isfinite(values))
    for name in words:
        _refuse(name, "a name in each row", pd.Series(table[name]), np.asarray(pd.isna(table[name])))


def check_known(table: pd.DataFrame, column: str, known: Iterable[object]) -> None:
    """Refuse values for which there is no look.

    Raises:
        ValueError: names the values and those that are known.
    """
    names = [str(name) for name in known]
    if unknown := sorted(set(table[column].map(str)) - set(names)):
        raise ValueError(f"{column}: expected some of {names}, got {unknown}")


def check_grid(table: pd.DataFrame, x: str, y: str, *values: str) -> None:
    """Refuse rows that are not a full grid of at least two places along each axis, each place once.

    Raises:
        ValueError: says how many rows came and how many a full grid has; and as `check_rows`.
    """
    check_rows(table, x, y, *values)
    columns, rows = len(set(table[x])), len(set(table[y]))
    if min(columns, rows) < 2 or len(table) != columns * rows or bool(table.duplicated([x, y]).any()):
        raise ValueError(
            f"table: expected a full grid, at least 2 x 2, got {len(table)} rows at {columns} {x} and {rows} {y}"
        )


def _refuse(name: str, expected: str, values: pd.Series, wrong: np.ndarray) -> None:
    if wrong.any():
        first = int(wrong.argmax())
        count = f", the first of {int(wrong.sum())}" * bool(wrong.sum() > 1)
        raise ValueError(f"{name}: expected {expected}, got {values.iloc[first]} in row {first}{count}")
