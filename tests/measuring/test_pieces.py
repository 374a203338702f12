"""Pieces of measurements on disk: whole, or refused by the name of their file."""

import math
import re

import pandas as pd
import pytest

from clustr_core.measuring.pieces import CachedRows, collected, fill_cache
from clustr_core.storage.tables import write_table

ROWS = pd.DataFrame({"bound": ["nearest", "exact", "exact"], "index": [3, 14, 159], "radius": [0.25, 1 / 3, 2e-9]})


def piece(folder, rows=ROWS, count=3, name="attack-1.csv", **options):
    """A piece, and what was computed for it."""
    made = []
    return CachedRows(folder / name, lambda: made.append(name) or rows, count, **options), made


def test_rows_are_computed_once_and_come_back(tmp_path):
    one, made = piece(tmp_path / "tables", digits=17)
    assert not one.kept()
    pd.testing.assert_frame_equal(one.read(), ROWS, check_exact=False, rtol=1e-15)
    assert one.kept()
    pd.testing.assert_frame_equal(collected([one]), one.read())
    assert len(made) == 1


def test_a_piece_that_was_cut_short_at_any_byte_is_refused_by_name(tmp_path):
    one, made = piece(tmp_path)
    one.fill()
    content = one.path.read_bytes()
    asked = (one.kept, one.read, lambda: fill_cache([one]), lambda: collected([one]))
    for length in range(len(content)):
        one.path.write_bytes(content[:length])
        for ask in asked:
            with pytest.raises(ValueError, match=re.escape(f"{one.path}: expected a table as it was written, got")):
                ask()
        assert one.path.read_bytes() == content[:length]
    assert len(made) == 1
    # once it is deleted, as the message says, it is measured again
    one.path.unlink()
    assert len(collected([one])) == 3
    assert one.path.read_bytes() == content


@pytest.mark.parametrize("lines", [[0, 1, 2], [0, 1, 2, 3, 3], [0], [], [1, 2, 3]])
def test_missing_and_doubled_rows_are_refused_by_name(lines, tmp_path):
    one, _ = piece(tmp_path)
    one.fill()
    content = one.path.read_bytes().splitlines(keepends=True)
    one.path.write_bytes(b"".join(content[n] for n in lines))
    with pytest.raises(ValueError, match=re.escape(str(one.path))):
        one.read()


@pytest.mark.parametrize("content", [b"\xff\xfe\n1\n2\n3\n", b"a\n1\n2,3\n4\n", b"\n\n\n\n", b"a,b\n1,2\n\n3,4\n"])
def test_what_is_no_table_of_that_many_rows_is_refused_by_name(content, tmp_path):
    one, _ = piece(tmp_path)
    one.path.write_bytes(content)
    with pytest.raises(ValueError, match=re.escape(str(one.path))):
        one.read()


def test_a_damaged_piece_is_named_before_anything_is_computed(tmp_path):
    first, made = piece(tmp_path, name="attack-0.csv")
    last, _ = piece(tmp_path)
    last.path.write_bytes(b"bound,index\n")
    with pytest.raises(ValueError, match=re.escape(str(last.path))):
        fill_cache([first, last])
    assert not made
    assert not first.path.exists()


def test_another_number_of_rows_than_was_promised_is_not_kept(tmp_path):
    one, _ = piece(tmp_path, count=4)
    with pytest.raises(ValueError, match=r"attack-1.csv: expected 4 rows of this measurement, got 3"):
        one.read()
    assert not one.path.exists()


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"columns": ["a"]}, r"expected the columns of sandwich rows, got \[a\]"),
        ({"norm": "far"}, "expected the columns of sandwich rows, got no number in each cell of norm"),
        ({"correct": math.nan}, "expected the columns of sandwich rows, got no truth in each cell of correct"),
        ({"index": 0.5}, "expected the columns of sandwich rows, got no whole number in each cell of index"),
        ({"attack": 1}, "expected the columns of sandwich rows, got no text in each cell of attack"),
    ],
)
def test_a_sealed_piece_of_other_columns_is_refused_by_name(changed, said, tmp_path):
    row = {"attack": "fmn", "index": 1, "label": 2, "correct": True, "radius": 0.5, "norm": 1.0, "gradients": 9}
    good = pd.DataFrame([row, row])
    one = CachedRows(tmp_path / "sandwich-1.csv", lambda: good, 2, kind="sandwich")
    pd.testing.assert_frame_equal(one.read(), good, check_dtype=False)
    bad = pd.DataFrame({"a": [1, 2]}) if "columns" in changed else good.assign(**changed)
    write_table(one.path, bad, sealed=True)
    with pytest.raises(ValueError, match=f"{one.path}: {said}; delete it"):
        one.read()
