"""The gate: regular files of a sane size come in, streams are written to, links are followed, words stay short."""

import os
import socket
import threading
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from disk import contents, files_of_at_most
from hypothesis import given
from hypothesis import strategies as st

from clustr_core.measuring.written import write_rows
from clustr_core.storage import gate
from clustr_core.storage.files import HOST, read_json, write_string, written_whole
from clustr_core.storage.tables import read_table


def made(kind: str, path: Path) -> Path:
    """Something at a path."""
    if kind == "socket":
        # a path of a socket may not be long
        here = Path.cwd()
        os.chdir(path.parent)
        with socket.socket(socket.AF_UNIX) as opened:
            opened.bind(path.name)
        os.chdir(here)
        return path
    makes = {
        "fifo": os.mkfifo,
        "folder": Path.mkdir,
        "loop": lambda path: path.symlink_to(path),
        "device": lambda path: path.symlink_to("/dev/zero"),
        "nothing": lambda path: None,
    }
    makes[kind](path)
    return path


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("fifo", "expected a regular file, got a FIFO"),
        ("folder", "expected a regular file, got a folder"),
        ("device", "expected a regular file, got a device"),
        ("socket", "No such device or address"),
        ("loop", "Too many levels of symbolic links"),
        ("nothing", "No such file or directory"),
    ],
)
@pytest.mark.parametrize("read", [read_table, read_json, lambda path: gate.read_bytes(path, limit=10)])
def test_what_is_no_file_is_named_and_not_read(tmp_path, kind, message, read):
    path = made(kind, tmp_path / "table.csv")
    with pytest.raises((ValueError, OSError), match=message) as error:
        read(path)
    assert "table.csv" in str(error.value)


def test_a_file_is_read_up_to_its_limit_and_no_further(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"x" * gate.MB)
    assert gate.read_bytes(path, limit=gate.MB) == b"x" * gate.MB
    assert gate.read_text(path, limit=gate.MB) == "x" * gate.MB
    with path.open("ab") as file:
        file.write(b"y")
    with pytest.raises(ValueError, match=r"file: expected at most 1 MB, got 1,048,577 bytes$"):
        gate.read_bytes(path, limit=gate.MB)
    # of nothing, by what it says of itself
    with pytest.raises(ValueError, match=r"status: expected at most 0 MB, got more$"):
        gate.read_bytes(Path("/proc/self/status"), limit=8)
    path.write_bytes(b"\xff")
    with pytest.raises(ValueError, match="file: expected text in UTF-8, got"):
        gate.read_text(path, limit=gate.MB)


def test_names_that_are_none(tmp_path):
    with pytest.raises(ValueError, match=r"a\\x00b: expected the name of a file, got"):
        gate.read_bytes(Path("a\0b"), limit=10)
    with pytest.raises(OSError, match="File name too long") as error:
        gate.read_bytes(tmp_path / ("x" * 5000), limit=10)
    assert len(str(error.value)) < 400
    with pytest.raises(ValueError, match="NUL"):
        gate.target_of(Path("a\0b"))


def test_what_a_link_leads_to_stays_unless_the_user_gave_the_path(tmp_path):
    target, link, further = tmp_path / "there" / "target.txt", tmp_path / "link", tmp_path / "further"
    target.parent.mkdir()
    target.write_text("before", encoding="utf-8")
    link.symlink_to(target)
    further.symlink_to(link)
    write_string(further, "after", asked_for=True)
    assert target.read_text(encoding="utf-8") == "after"
    assert link.is_symlink()
    assert further.is_symlink()
    # to nothing yet
    target.unlink()
    write_string(link, "new", asked_for=True)
    assert target.read_text(encoding="utf-8") == "new"
    # one that came with somebody else's run
    write_string(further, "mine")
    assert not further.is_symlink()
    assert (further.read_text(encoding="utf-8"), target.read_text(encoding="utf-8")) == ("mine", "new")
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["further", "link", "target.txt", "there"]


@pytest.mark.parametrize("kind", ["folder", "socket"])
def test_nothing_is_written_in_the_place_of_what_is_no_file(tmp_path, kind):
    path = made(kind, tmp_path / "out")
    with pytest.raises(ValueError, match=f"out: expected a regular file, got a {kind}"), written_whole(path):
        raise AssertionError("not before the block")
    assert [each.name for each in tmp_path.iterdir()] == ["out"]


def test_a_link_that_leads_to_itself_is_not_replaced(tmp_path):
    path = made("loop", tmp_path / "out")
    with pytest.raises(OSError, match="symbolic links"):
        write_string(path, "x", asked_for=True)
    assert path.is_symlink()


@pytest.mark.parametrize("kind", ["fifo", "folder", "socket"])
def test_what_is_no_file_is_not_written_to_unless_the_user_gave_the_path(tmp_path, kind):
    path = made(kind, tmp_path / "out")
    before = path.lstat().st_mode
    with pytest.raises(ValueError, match="out: expected a regular file, got a "):
        write_string(path, "x")
    assert path.lstat().st_mode == before


def test_a_link_to_a_device_takes_nothing_in(tmp_path):
    """Weights that were written to /dev/null would be lost, and the run said to be whole."""
    path = made("device", tmp_path / "out")
    write_string(path, "x")
    assert (path.is_symlink(), path.read_text(encoding="utf-8")) == (False, "x")


def test_what_has_a_temporarys_name_is_no_trouble(tmp_path):
    (tmp_path / f".x.{HOST}-999999999.tmp").mkdir()
    made("loop", tmp_path / ".y.elsewhere-1.tmp")
    write_string(tmp_path / "a", "x")
    assert (tmp_path / "a").read_text(encoding="utf-8") == "x"


def test_a_fifo_and_a_device_are_written_to_if_the_user_gave_them(tmp_path):
    fifo, found = tmp_path / "fifo.csv", []
    os.mkfifo(fifo)
    reader = threading.Thread(target=lambda: found.append(fifo.read_bytes()))
    reader.start()
    import pandas as pd

    write_rows(fifo, pd.DataFrame({"a": range(100_000)}), {}, asked_for=True)
    reader.join(10)
    assert found[0].startswith(b"a\n0\n1\n")
    assert found[0].endswith(b"99999\n")
    write_string(Path("/dev/null"), "x", asked_for=True)
    assert Path("/dev/null").is_char_device()
    assert [path.name for path in tmp_path.iterdir()] == ["fifo.csv"]


def test_the_standard_output_is_written_to(capfdbinary):
    write_string(Path("/dev/stdout"), "table\n", asked_for=True)
    assert capfdbinary.readouterr().out == b"table\n"


bomb: list = ["x"]
for _ in range(60):
    bomb = [bomb, bomb]
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.binary(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner) | st.tuples(inner),
)


@given(values)
def test_a_value_in_a_message_is_short_whatever_it_is(value):
    assert 0 < len(gate.brief(value)) <= gate.VALUE_LIMIT + 60


@pytest.mark.parametrize(
    "value",
    [bomb, "x" * 10**7, 10**5000, dict.fromkeys(range(99), bomb), torch.zeros(9), np.zeros(9), object(), b"x" * 10**7],
    ids=["lists", "text", "digits", "dict", "tensor", "array", "object", "bytes"],
)
def test_even_if_it_would_fill_the_memory(value):
    assert len(gate.brief(value)) <= gate.VALUE_LIMIT + 60


def test_plain_values_are_as_python_prints_them():
    for value in (3, -1.5, "abc", None, True, [1, 2], (1,), {"a": 1}, "with 'quotes'"):
        assert gate.brief(value) == repr(value)
    assert gate.brief(torch.zeros(3)) == "a Tensor"


@given(st.text(), st.integers(20, 600))
def test_a_shortened_text_says_what_is_missing(text, most):
    found = gate.shortened(text, most)
    assert found == text if len(text) <= most else len(found) <= most + 50
    if len(text) > most:
        left_out = int(found.split("[")[-1].split(" characters")[0].replace(",", "")) if "[" not in text else 1
        assert left_out > 0


def test_a_list_of_names_is_cut():
    assert gate.listed(["a", "b"]) == "a, b"
    assert gate.listed(list("abcdef")) == "a, b, c, d and 2 more"
    assert gate.shown("a\nb\x1b[31m") == r"a\nb\x1b[31m"
    assert gate.shown("катя") == "катя"


def test_a_full_disk_leaves_a_table_and_its_sidecar_as_they_were(tmp_path):
    """There may be room for a sidecar and none for its table."""
    path = tmp_path / "table.csv"
    write_rows(path, pd.DataFrame({"a": range(3)}), {"method": "ce"})
    before = contents(tmp_path)
    with files_of_at_most(2_000), pytest.raises(OSError, match="File too large"):
        write_rows(path, pd.DataFrame({"a": range(10_000)}), {"method": "clustr"})
    assert contents(tmp_path) == before
