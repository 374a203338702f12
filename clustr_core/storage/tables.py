"""The per-example tables."""

from pathlib import Path

import pandas as pd

from clustr_core.storage.files import written_whole


def write_table(path: Path, table: pd.DataFrame, *, digits: int = 9) -> None:
    """Write a table as CSV with so many significant digits, whole or not at all."""
    with written_whole(path) as temporary:
        table.to_csv(temporary, index=False, encoding="utf-8", float_format=f"%.{digits}g", lineterminator="\n")


def read_table(path: Path) -> pd.DataFrame:
    """Read a table that `write_table` wrote.

    Raises:
        ValueError: if the file is empty, no CSV or not in UTF-8, with its path.
    """
    try:
        return pd.read_csv(path, encoding="utf-8")
    except ValueError as error:  # pandas' own errors and UnicodeDecodeError are among them
        raise ValueError(f"{path}: expected a table, got something empty or damaged ({error})") from error
