"""Tables as a page shows them: no row numbers, nothing cut short, methods by name, a dash for what is missing."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from html import escape
from numbers import Real

import numpy as np
import pandas as pd

from clustr_core.measuring.study import ABSENT, method_name


@dataclass(frozen=True)
class Shown:
    """A table of texts, as HTML in a page and as aligned columns elsewhere.

    Args:
        groups: what each row belongs to, where rows stand under headings of their own.
    """

    cells: pd.DataFrame
    groups: tuple[str, ...] | None = None

    def _repr_html_(self) -> str:
        head = "".join(f"<th>{escape(str(name))}</th>" for name in self.cells)
        lines = [f"<thead><tr>{head}</tr></thead>", "<tbody>"]
        for name, rows in self._grouped():
            if name is not None:
                lines.append(f'<tr><th colspan="{self.cells.shape[1]}">{escape(name)}</th></tr>')
            for row in rows.itertuples(index=False):
                lines.append(f"<tr>{''.join(f'<td>{escape(str(cell))}</td>' for cell in row)}</tr>")
        return "\n".join(['<table class="dataframe">', *lines, "</tbody>", "</table>"])

    def __repr__(self) -> str:
        texts = []
        for name, rows in self._grouped():
            with pd.option_context("display.max_colwidth", None):
                text = rows.to_string(index=False, justify="left")
            texts.append(text if name is None else f"{name}\n{text}")
        return "\n\n".join(texts)

    def _grouped(self) -> Iterator[tuple[str | None, pd.DataFrame]]:
        if self.groups is None:
            yield None, self.cells
            return
        names = np.array(self.groups)
        for name in dict.fromkeys(self.groups):
            yield name, self.cells.loc[names == name]


def shown(
    table: pd.DataFrame | pd.Series,
    *,
    digits: int = 3,
    columns: Mapping[str, str] | None = None,
    under: str | None = None,
) -> Shown:
    """The table for a page; what its rows are called becomes its first columns.

    Args:
        digits: behind the point of every number that is not whole; a smaller one is written 1.2e-05.
        columns: other headings, with units.
        under: a column whose values become headings of their rows: the data set, in a table of several.
    Raises:
        ValueError: if there is no column ``under``.
    """
    frame = table.to_frame() if isinstance(table, pd.Series) else table
    if any(name is not None for name in frame.index.names):
        frame = frame.reset_index()
    if under is not None and under not in frame:
        raise ValueError(f"under: expected one of {list(frame)}, got {under!r}")
    groups = None if under is None else tuple(map(str, frame[under]))
    frame = frame.drop(columns=[under] if under else [])
    methods = {"method": frame["method"].map(method_name)} if "method" in frame else {}
    cells = frame.assign(**methods).map(lambda value: _text(value, digits))
    named = cells.rename(columns=dict(columns or {}))
    return Shown(named.rename(columns=lambda name: str(name).replace("_", " ")), groups)


def _text(value: object, digits: int) -> str:
    if value is None or value != value:
        return ABSENT
    if isinstance(value, bool | np.bool_) or not isinstance(value, Real):
        return str(value)
    number = float(value)
    if number.is_integer():
        return f"{number:,.0f}" if abs(number) >= 10_000 else f"{number:.0f}"
    return f"{number:,.{digits}f}" if abs(number) >= 0.5 * 10**-digits else f"{number:.1e}"
