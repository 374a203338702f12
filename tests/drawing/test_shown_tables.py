"""Tables of a page: no row numbers, nothing cut short, each number as it is read."""

import numpy as np
import pandas as pd
import pytest

from clustr_core.drawing.tables import shown


def test_numbers_texts_and_gaps() -> None:
    table = pd.DataFrame(
        {"method": ["ce", "my-own"], "share": [0.12345, np.nan], "count": [48, 123456], "tiny": [1.2e-9, 0.0]}
    )
    text = repr(shown(table))
    assert text.splitlines()[0].split() == ["method", "share", "count", "tiny"]
    assert text.splitlines()[1].split() == ["cross-entropy", "0.123", "48", "1.2e-09"]
    assert text.splitlines()[2].split() == ["my-own", "–", "123,456", "0"]


def test_what_rows_are_called_becomes_columns_and_headings_read_as_words() -> None:
    means = pd.Series([1.0, 2.5], index=pd.Index(["nearest", "exact"], name="bound"), name="mean_radius")
    lines = repr(shown(means, columns={"bound": "bound, L2"})).splitlines()
    assert [line.split() for line in lines] == [
        ["bound,", "L2", "mean", "radius"],
        ["nearest", "1"],
        ["exact", "2.500"],
    ]


def test_long_texts_are_not_cut_and_html_is_escaped() -> None:
    html = shown(pd.DataFrame({"a": ["x" * 200], "b": ["<b>&"]}))._repr_html_()
    assert "x" * 200 in html
    assert "&lt;b&gt;&amp;" in html
    assert html.count("<tr>") == 2


def test_rows_stand_under_their_data() -> None:
    table = pd.DataFrame(
        {"data": ["digits", "digits", "MNIST"], "method": ["ce", "clustr", "ce"], "x": [True, False, True]}
    )
    found = shown(table, under="data")
    html = found._repr_html_()
    assert '<th colspan="2">digits</th>' in html
    assert html.index("digits") < html.index("ClusTR") < html.index("MNIST")
    assert repr(found).split("\n\n")[1].startswith("MNIST\n")
    with pytest.raises(ValueError, match=r"under: expected one of \['data', 'method', 'x'\], got 'profile'"):
        shown(table, under="profile")
