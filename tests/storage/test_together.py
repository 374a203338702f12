"""A reader meets a writer: it finds the file as it was before or as it is after, and never a mixture."""

import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest
import torch

from clustr_core.storage.files import read_json, write_json
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
