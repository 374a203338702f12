"""The per-example tables."""

import csv
import io
import warnings
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from clustr_core.storage.files import digest, written_whole
from clustr_core.storage.gate import MB, TABLE_LIMIT, read_bytes, shortened

# the last line of a sealed table: this, and the digest of all before it
_SEAL = b"sha256,"
# the widest table of the book has some 30, and pandas needs a minute for 100,000
MOST_COLUMNS = 1000


def write_table(path: Path, table: pd.DataFrame, *, digits: int = 9, sealed: bool = False) -> bytes:
    """Write a table as CSV with so many significant digits, whole or not at all.

    Args:
        sealed: end it with a digest of the file's name and of what stands before, for `read_sealed`.

    Returns:
        What was written: by the time that the file is read again it may be another's.
    """
    content = table_bytes(table, digits=digits)
    with written_whole(path) as temporary:
        temporary.write_bytes(content := content + _seal(path, content) if sealed else content)
    return content


def table_bytes(table: pd.DataFrame, *, digits: int = 9) -> bytes:
    """What `write_table` writes."""
    return table.to_csv(index=False, float_format=f"%.{digits}g", lineterminator="\n", encoding="utf-8").encode()


def read_table(path: Path, *, as_text: Sequence[str] = ()) -> pd.DataFrame:
    """Read a table that `write_table` wrote.

    Args:
        as_text: columns that stay text where all of it looks like numbers, as digests may.
    Raises:
        ValueError: if the file is empty, no CSV or not in UTF-8, with its path.
    """
    return parsed_table(path, read_bytes(path, limit=TABLE_LIMIT), as_text=as_text)


def read_sealed(path: Path) -> pd.DataFrame:
    """Read a sealed table.

    Raises:
        ValueError: if any bit of it is another than was written, or it was written under another name, with its path.
    """
    text, found, _ = (content := read_bytes(path, limit=TABLE_LIMIT)).rpartition(_SEAL)
    if not found or content != text + _seal(path, text):
        raise ValueError(f"{path}: expected a table as it was written, got a damaged file (its sha256 is another)")
    return parsed_table(path, text)


def _seal(path: Path, text: bytes) -> bytes:
    return _SEAL + digest(path.name, text).encode() + b"\n"


def parsed_table(path: Path, content: bytes, *, as_text: Sequence[str] = ()) -> pd.DataFrame:
    """The table that a file's bytes are; nothing but an empty cell is missing, whatever word stands in one.

    Args:
        as_text: as in `read_table`.
    Raises:
        ValueError: as `read_table`.
    """
    if (columns := _columns(content)) > MOST_COLUMNS:
        raise ValueError(f"{path}: expected a table of at most {MOST_COLUMNS:,} columns, got {columns:,}")
    if content and not content.endswith(b"\n"):
        raise ValueError(f"{path}: expected a table to the end of its last line, got one that is cut off")
    try:
        with warnings.catch_warnings():
            # rows with more fields than the header, the first of which pandas would take for names of the rows
            warnings.simplefilter("error", pd.errors.ParserWarning)
            options = {"encoding": "utf-8", "index_col": False, "keep_default_na": False, "na_values": [""]}
            return pd.read_csv(io.BytesIO(content), dtype=dict.fromkeys(as_text, str), **options)
    except (ValueError, pd.errors.ParserWarning) as error:  # pandas' own errors and UnicodeDecodeError are among them
        why = shortened(str(error))
        raise ValueError(f"{path}: expected a table, got something empty or damaged ({why})") from error


def _columns(content: bytes) -> int:
    """Of the first row that is not blank, as far as its first megabyte says; its cells may hold ends of lines."""
    head = content[:MB].decode("utf-8", "replace")
    try:
        return len(next(filter(None, csv.reader(io.StringIO(head))), []))
    except csv.Error:
        # one that pandas will name
        return head.count(",")
