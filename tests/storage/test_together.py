"""A reader meets a writer: it finds the file as it was before or as it is after, and never a mixture."""

import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest
import torch

from clustr_core.storage.files import alone, read_json, write_json
from clustr_core.storage.provenance import read_checked, write_sidecar
from clustr_core.storage.tables import read_sealed, read_table, write_table
from clustr_core.storage.tensors import read_tensors, write_tensors

READINGS = 300
# puts one file, then the other, in a third one's place, as fast as it can
SWAPS = """
import itertools, os, sys
one, other, path = sys.argv[1:]
for source in itertools.cycle([one, other]):
    os.link(source, path + ".next")
    os.replace(path + ".next", path)
"""


def _write_tensors(path: Path, number: int) -> None:
    write_tensors(path, "a thing", {"numbers": torch.full((1000,), float(number))}, {"number": number})


def _read_tensors(path: Path) -> set[int]:
    tensors, facts = read_tensors(path, "a thing")
    return {facts["number"], *(int(number) for number in tensors["numbers"].unique())}


def _rows(number: int) -> pd.DataFrame:
    return pd.DataFrame({"number": [number] * 1000})


KINDS: dict[str, tuple[Callable[[Path, int], None], Callable[[Path], set[int]]]] = {
    "tensors.safetensors": (_write_tensors, _read_tensors),
    "sealed.csv": (
        lambda path, number: write_table(path, _rows(number), sealed=True),
        lambda path: set(read_sealed(path)["number"]),
    ),
    "table.csv": (
        lambda path, number: write_table(path, _rows(number)),
        lambda path: set(read_table(path)["number"]),
    ),
    "facts.json": (
        lambda path, number: write_json(path, {"numbers": [number] * 1000}),
        lambda path: set(read_json(path)["numbers"]),
    ),
}


@pytest.mark.parametrize("name", KINDS)
def test_a_reader_finds_one_of_the_files_that_were_ever_there(tmp_path, name):
    write, read = KINDS[name]
    for number in (1, 2):
        # by the same name, which a sealed table holds
        (tmp_path / str(number)).mkdir()
        write(tmp_path / str(number) / name, number)
    write(path := tmp_path / name, 1)
    files = [str(tmp_path / "1" / name), str(tmp_path / "2" / name), str(path)]
    with subprocess.Popen([sys.executable, "-c", SWAPS, *files]) as writer:
        try:
            found = [read(path) for _ in range(READINGS)]
            # and as many again until both were found
            deadline = time.monotonic() + 60
            while len(set(map(frozenset, found))) < 2 and time.monotonic() < deadline:
                found += [read(path) for _ in range(READINGS)]
        finally:
            writer.kill()
    assert sorted(set(map(frozenset, found)), key=min) == [{1}, {2}]


def test_a_sidecar_speaks_of_what_its_process_wrote(tmp_path):
    """Two processes write one table; the first one's sidecar comes last."""
    path, first, second = tmp_path / "table.csv", pd.DataFrame({"a": [1, 2]}), pd.DataFrame({"a": [3]})
    written = write_table(path, first)
    assert written == path.read_bytes()
    write_sidecar(path, {"examples": 1}, written=write_table(path, second))
    write_sidecar(path, {"examples": 2}, written=written)
    with pytest.raises(ValueError, match="expected the table that its sidecar describes: rows 2, found 1"):
        read_checked(path)
    write_sidecar(path, {"examples": 2}, written=write_table(path, first))
    assert read_checked(path).equals(first)


def test_what_a_sidecar_says_is_told_in_brief(tmp_path):
    write_sidecar(path := tmp_path / "table.csv", {}, written=write_table(path, pd.DataFrame({"a": [1]})))
    content = read_json(sidecar := tmp_path / "table.json")
    content["table"]["sha256"] = "x" * 3_000_000
    sidecar.write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(ValueError, match="expected the table that its sidecar describes") as refusal:
        read_checked(path)
    assert len(str(refusal.value)) < 900


def test_facts_nested_as_deep_as_can_just_be_read_are_refused(tmp_path):
    """The encoder of JSON gives up before the decoder does."""
    path, limit = tmp_path / "thing", sys.getrecursionlimit()
    write_tensors(path, "a thing", {"numbers": torch.ones(1)}, {"number": 0})
    for depth in range(limit - 80, limit, 3):
        deep = "[" * depth + "]" * depth
        content = f'{{"kind": "a thing", "facts": {{"number": {deep}}}, "sha256": "0"}}'
        header = json.dumps({"__metadata__": {"content": content}}).encode()
        path.write_bytes(len(header).to_bytes(8, "little") + header)
        with pytest.raises(ValueError, match="expected a thing, got a"):
            read_tensors(path, "a thing")


def test_one_at_a_time_is_alone_with_a_folder(tmp_path):
    done = []

    def other():
        with alone(tmp_path):
            done.append("other")

    thread = threading.Thread(target=other)
    with alone(tmp_path):
        thread.start()
        thread.join(0.3)
        done.append("first")
    thread.join(60)
    assert done == ["first", "other"]
