"""What is on disk is whole, or not there at all."""

import errno
import json
import os
import platform
import sys

import numpy as np
import pandas as pd
import pytest
import torch
from disk import contents, files_of_at_most
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from clustr_core.storage import provenance
from clustr_core.storage.files import digest, home, read_json, write_json, written_whole
from clustr_core.storage.provenance import environment
from clustr_core.storage.tables import read_table, write_table


@pytest.fixture
def path(tmp_path):
    return tmp_path / "deep/down/file.txt"


def test_a_file_takes_its_name_when_it_is_whole(path):
    with written_whole(path) as temporary:
        temporary.write_text("half")
        assert not path.exists()
        assert temporary.parent == path.parent
        temporary.write_text("whole")
    assert contents(path.parent) == {"file.txt": b"whole"}


@pytest.mark.parametrize("error", [ValueError("no"), KeyboardInterrupt(), OSError(errno.ENOSPC, "full")])
def test_an_error_leaves_the_old_file_and_nothing_else(path, error):
    path.parent.mkdir(parents=True)
    path.write_text("old")

    def write():
        with written_whole(path) as temporary:
            temporary.write_text("half")
            raise error

    with pytest.raises(type(error)):
        write()
    assert contents(path.parent) == {"file.txt": b"old"}


def test_a_full_disk_names_the_file_whoever_writes_it(path):
    table = pd.DataFrame({"x": range(9000)})

    def tensors():
        with written_whole(path) as temporary:
            save_file({"x": torch.zeros(9000)}, temporary)

    for write in (
        tensors,
        lambda: write_table(path, table),
        lambda: write_json(path, {"x": "y" * 9000}),
    ):
        with files_of_at_most(5000), pytest.raises(OSError, match=f"File too large: '{path}'") as caught:
            write()
        assert caught.value.errno == errno.EFBIG
        assert contents(path.parent) == {}


def test_an_error_that_knows_its_file_keeps_it(path):
    def write():
        with written_whole(path):
            (path.parent / "none").read_text()

    with pytest.raises(FileNotFoundError, match="none"):
        write()


def test_a_folder_that_cannot_be_made_is_an_error(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="file"):
        write_json(tmp_path / "file/below.json", {})


def test_json_round_trip_is_sorted_and_ends_with_a_line(path):
    content = {"b": [1, 2.5, None], "a": {"x": True}}
    write_json(path, content)
    assert read_json(path) == content
    text = path.read_text()
    assert text.index('"a"') < text.index('"b"')
    assert text.endswith("}\n")


@pytest.mark.parametrize("text", ["", '{"a": ', "nothing", "[1]", "3", "\x00\x01"])
def test_what_is_no_json_object_is_named(path, text):
    path.parent.mkdir(parents=True)
    path.write_text(text)
    with pytest.raises(ValueError, match=f"{path}: expected "):
        read_json(path)


def test_a_missing_file_is_missing(path):
    with pytest.raises(FileNotFoundError):
        read_json(path)


columns = st.floats(allow_nan=False, allow_infinity=False, width=32).map(lambda x: x + 0.0)  # no -0.0


@given(st.lists(st.tuples(columns, st.integers(-(2**53), 2**53), st.booleans()), min_size=1, max_size=20))
@settings(max_examples=20, deadline=None)
def test_a_table_round_trip_keeps_what_float32_knows(tmp_path_factory, rows):
    path = tmp_path_factory.mktemp("tables") / "table.csv"
    table = pd.DataFrame(rows, columns=["value", "index", "correct"])
    write_table(path, table)
    found = read_table(path)
    assert list(found) == list(table)
    assert found["index"].tolist() == table["index"].tolist()
    assert found["correct"].tolist() == table["correct"].tolist()
    assert np.array_equal(found["value"].astype(np.float32), table["value"].astype(np.float32))
    before = path.read_bytes()
    write_table(path, found)
    assert path.read_bytes() == before


def test_a_table_keeps_infinity_text_and_missing_values(path):
    table = pd.DataFrame({"x": [np.inf, np.nan, 0.1], "name": ["a, b", 'say "c"', "é"]})
    write_table(path, table)
    pd.testing.assert_frame_equal(read_table(path), table)
    assert b"\r" not in path.read_bytes()


def test_digests_tell_parts_apart():
    parts = [("ab", "c"), ("a", "bc"), ("abc",), ("abc", ""), (b"ab", "d")]
    assert len({digest(*p) for p in parts}) == len(parts)
    assert digest("é") == digest("é".encode())


def test_the_books_root(tmp_path, monkeypatch):
    (tmp_path / "book/notebooks").mkdir(parents=True)
    (tmp_path / "book/myst.yml").touch()
    (tmp_path / "other").mkdir()
    monkeypatch.delenv("CLUSTR_HOME", raising=False)
    monkeypatch.chdir(tmp_path / "book/notebooks")
    assert home() == tmp_path / "book"
    monkeypatch.setenv("CLUSTR_HOME", str(tmp_path / "other"))
    assert home() == tmp_path / "other"
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("CLUSTR_HOME", "~/other")
    assert home() == tmp_path / "other"


def test_the_environment_is_what_a_reader_needs():
    found = environment("cpu")
    assert found["device"] == "cpu"
    assert found["versions"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert json.loads(json.dumps(found)) == found
    assert os.uname().nodename not in json.dumps(found)
    assert environment() == found


def test_a_processor_has_its_family_model_and_stepping(monkeypatch):
    first = "processor: 0\nmodel name\t: A\ncpu family: 25\nmodel: 17\nstepping: 1\n"
    lines = f"{first}\nprocessor: 1\nmodel name: B\nmodel: 3\n"
    monkeypatch.setattr(provenance.Path, "read_text", lambda *args, **options: lines)
    assert provenance.processor.__wrapped__() == "A (25.17.1)"
    monkeypatch.setattr(provenance.Path, "read_text", lambda *args, **options: "Hardware: C\n")
    assert provenance.processor.__wrapped__() in (platform.processor(), platform.machine())


def test_without_pytorch_the_threads_are_those_of_the_processes_begun_from_here(monkeypatch):
    monkeypatch.delitem(sys.modules, "torch")
    for said, threads in (("3", 3), ("", None), ("3,2", None)):
        monkeypatch.setenv("OMP_NUM_THREADS", said)
        assert environment("cpu")["threads"] == threads


@pytest.mark.parametrize(
    "content",
    [b"", b"\n", b"a,b\n1,2\n1,2,3\n", b"a,b\n1,2,3\n", b'a,b\n"1,2\n', b"a,b\n\xe9,1\n", b"\x00\xff\x80\n"],
    ids=repr,
)
def test_a_damaged_table_is_named(path, content):
    path.parent.mkdir(parents=True)
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"{path}: expected a table, got something empty or damaged"):
        read_table(path)


def test_a_table_of_more_columns_than_any_is_refused(path):
    path.parent.mkdir(parents=True)
    path.write_text(",".join(f"c{n}" for n in range(1001)) + "\n", encoding="utf-8")
    with pytest.raises(ValueError, match="expected a table of at most 1,000 columns, got 1,001"):
        read_table(path)


@pytest.mark.parametrize("header", [b"\n" + b",".join([b"a"] * 1001), b'"x\n",' + b",".join([b"a"] * 1001)])
def test_columns_are_those_of_the_first_row_that_there_is(path, header):
    path.parent.mkdir(parents=True)
    path.write_bytes(header + b"\n")
    with pytest.raises(ValueError, match="expected a table of at most 1,000 columns, got 1,00"):
        read_table(path)


def test_a_table_that_ends_in_a_line_is_cut_off(path):
    path.parent.mkdir(parents=True)
    path.write_bytes(b"a,b\n1,2\n3,Tr")
    with pytest.raises(ValueError, match="expected a table to the end of its last line, got one that is cut off"):
        read_table(path)
