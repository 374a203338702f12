"""A bit is flipped, or another file put in its place: each is refused by its name, or nothing that is read changes."""

import random
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from clustr_core import data
from clustr_core.measuring.counterexamples import Counterexample, load_counterexample, save_counterexample
from clustr_core.measuring.pieces import CachedRows
from clustr_core.measuring.profile import Profile, Protocol
from clustr_core.measuring.study import Study
from clustr_core.storage.provenance import sidecar_of, write_sidecar
from clustr_core.storage.tables import write_table
from clustr_core.training.loop import fit
from clustr_core.training.names import CHECKPOINT, DONE, HISTORY, WEIGHTS
from clustr_core.training.recipes import Clustr
from clustr_core.training.run import load_run, snapshot_path
from clustr_core.training.state import checkpoint_facts, load_checkpoint, new_state

FLIPS = 80
RECIPE = Clustr(epochs=2, width=4, train_examples=150, per_cluster=4, snapshots=(1, 2))
ROWS = pd.DataFrame({"method": ["ce"] * 3, "index": [3, 14, 159], "robust": [True, False, True], "eps": 1 / 3})


@pytest.fixture(scope="module")
def run(tmp_path_factory, digits):
    return fit(RECIPE, dataset=digits, folder=tmp_path_factory.mktemp("flips") / "run", progress=False)


def comparable(found: object) -> object:
    """What was read, as something that == compares bit for bit."""
    if isinstance(found, torch.nn.Module):
        return comparable(found.state_dict())
    if isinstance(found, dict):
        return {name: comparable(value) for name, value in found.items()}
    if isinstance(found, torch.Tensor):
        return found.tolist()
    return found.to_csv() if isinstance(found, pd.DataFrame) else found


def refused_or_the_same(path: Path, read: Callable[[], object], *, same: int = 0) -> None:
    """Flip bits of a file one at a time; at most so many of them may leave everything as it was."""
    whole, drawn = path.read_bytes(), random.Random(path.name)
    before, unchanged = comparable(read()), 0
    for bit in drawn.sample(range(8 * len(whole)), min(FLIPS, 8 * len(whole))):
        damaged = bytearray(whole)
        damaged[bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
        found, said = None, ""
        try:
            found = comparable(read())
        except ValueError as error:
            said = str(error)
        assert path.stem in said or found == before, f"bit {bit} of {path.name}: {said}"
        unchanged += not said
    path.write_bytes(whole)
    assert comparable(read()) == before
    assert unchanged <= same


def test_a_runs_files(run, digits):
    def resumed():
        state = new_state(RECIPE, digits, digits.train_images[:150], digits.train_labels[:150], None)
        load_checkpoint(run.path / CHECKPOINT, RECIPE, state)
        return {"network": state.network, "epoch": state.epoch, "history": state.history}

    refused_or_the_same(run.path / WEIGHTS, lambda: load_run(run.path).model())
    refused_or_the_same(run.path / HISTORY, lambda: load_run(run.path).history)
    refused_or_the_same(run.path / CHECKPOINT, resumed)
    refused_or_the_same(snapshot_path(run.path, 1), lambda: load_run(run.path).encoder_at(1))
    # a flip in the name of the digest takes it away, and leaves all else as it was
    refused_or_the_same(run.path / DONE, lambda: vars(load_run(run.path)) | {"weights": run.model()}, same=3)


def test_whole_files_in_the_place_of_others(run, digits, tmp_path):
    """Nothing is flipped: a file of one kind, epoch, run or question stands under the name of another."""
    folder = shutil.copytree(run.path, tmp_path / "run")
    other = fit(replace(RECIPE, seed=1), dataset=digits, folder=tmp_path / "other", progress=False)
    reads = {
        folder / WEIGHTS: lambda: load_run(folder).model(),
        folder / CHECKPOINT: lambda: checkpoint_facts(folder / CHECKPOINT, RECIPE, run.train_data_sha256),
        folder / HISTORY: lambda: load_run(folder).history,
        **{snapshot_path(folder, n): partial(lambda n: load_run(folder).encoder_at(n), n) for n in (1, 2)},
    }
    for path, read in reads.items():
        read()
        theirs = [each for each in [*reads, *(other.path / each.relative_to(folder) for each in reads)] if each != path]
        whole = path.read_bytes()
        for foreign in theirs:
            path.write_bytes(foreign.read_bytes())
            with pytest.raises(ValueError, match=re.escape(str(path))):
                read()
        path.write_bytes(whole)
        read()


def test_a_piece_that_answers_another_question(tmp_path):
    one, two = (CachedRows(tmp_path / f"attack-{n}.csv", lambda: ROWS, 3) for n in (1, 2))
    one.fill()
    shutil.copy(one.path, two.path)
    with pytest.raises(ValueError, match=re.escape(str(two.path))):
        two.read()


def test_a_file_of_another_kind_is_called_by_its_kind(run, tmp_path):
    path = shutil.copy(snapshot_path(run.path, 1), tmp_path / "found.safetensors")
    with pytest.raises(ValueError, match=r"found\.safetensors: expected a counterexample, got a snapshot"):
        load_counterexample(path)


def test_a_piece_of_a_measurement(tmp_path):
    piece = CachedRows(tmp_path / "attack-1.csv", lambda: ROWS, 3)
    piece.fill()
    refused_or_the_same(piece.path, piece.read)


def test_a_table_that_the_book_shows(tmp_path):
    table = tmp_path / "attacks-clustr.csv"
    write_table(table, ROWS)
    write_sidecar(table, {"seed": 1})
    shown = Study(Profile("tiny", {"clustr": RECIPE}, {"linf": Protocol(eps=(0.1,))}), "published", tmp_path)
    for path in (table, sidecar_of(table)):
        refused_or_the_same(path, lambda: Study(shown.profile, "published", tmp_path).attacks)


def test_a_counterexample(tmp_path):
    path, image = tmp_path / "counterexample.safetensors", torch.rand(1, 8, 8)
    save_counterexample(path, Counterexample(image, 1 - image, 3, 17, 0.25, 0.125, "ddn"))
    refused_or_the_same(path, lambda: vars(load_counterexample(path)))


def test_a_cache_of_images_is_made_again(tmp_path, capsys):
    for part in ("train", "test"):
        for label in "ab":
            folder = tmp_path / "images" / part / label
            folder.mkdir(parents=True)
            pixels = np.random.default_rng(ord(label)).integers(0, 255, (4, 4, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / "0.png")

    def load():
        found = data.load_dataset(f"folder:{tmp_path / 'images'}", root=tmp_path)
        return {"train": found.train_images, "test": found.test_images, "labels": found.train_labels}

    load()
    (cache,) = tmp_path.rglob("images-*.safetensors")
    whole = cache.read_bytes()
    refused_or_the_same(cache, load, same=FLIPS)
    assert cache.read_bytes() == whole


def test_the_message_says_what_to_do(tmp_path):
    piece = CachedRows(tmp_path / "attack-1.csv", lambda: ROWS, 3)
    piece.fill()
    piece.path.write_bytes(piece.path.read_bytes().replace(b"14,", b"15,"))
    with pytest.raises(ValueError, match=re.escape(f"{piece.path}: expected a table as it was written")) as caught:
        piece.read()
    assert str(caught.value).endswith("delete it, and the rows are measured again")
