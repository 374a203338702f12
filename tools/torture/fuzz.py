"""Inputs that nobody thought of: good ones, changed at random, for each loader.

What has a structure is changed in it and sealed again, so that the change comes to the checks behind the digests: words
of a profile, values of `run.json` and of a checkpoint, instructions of a released pickle, headers of tensors. Another
``--seed`` gives other inputs.
"""

import copy
import io
import json
import random
import re
import shutil
import struct
import zipfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from clustr_core import data
from clustr_core.measuring.profile import load_profile
from clustr_core.models.official import load_official
from clustr_core.storage.files import digest
from clustr_core.storage.tables import read_table
from clustr_core.storage.tensors import read_tensors, write_tensors
from clustr_core.training.loop import fit
from clustr_core.training.run import CHECKPOINT, DONE, HISTORY, WEIGHTS, load_run
from tools.torture import images, profiles, released, runs
from tools.torture.forks import Case

EACH = 100
_ODD: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 2**31, 2**63, 10**30, 0.0, -0.5, 1e300, float("inf"), float("nan"), "", "x",
    "x" * 5000, "\0", "../..", "1", [], [[]], {}, {"x": 1}, [0] * 1000, "digits", "cifar10", [1, 8, 8],
)  # fmt: skip
_BITS_OF_YAML = (
    ":", "- ", "[", "]", "{", "}", "&a ", "*a", "<<: ", "!!python/name:os.system ", "#", "'", '"', "\n", "\n  ", "\t",
    "|", "?", ",", "~", "0x10", "010", "1:30", "on", "1e400", ".nan", "---\n", "%YAML 1.1\n", "\u2028", "\ufeff",
)  # fmt: skip


def cases(folder: Path, canaries: Path, seed: int = 0) -> Iterator[Case]:
    """So many for each loader."""
    drawn = random.Random(seed)
    for name, make in LOADERS.items():
        for number, call in zip(range(EACH), make(folder, drawn), strict=False):
            yield Case("fuzz", f"{name} {number} of seed {seed}", call, "either")


def bytes_changed(content: bytes, drawn: random.Random) -> bytes:
    """A few bits turned, runs of bytes put in, taken out, doubled, or moved."""
    changed = bytearray(content)
    for _ in range(drawn.choice((1, 1, 2, 4, 16))):
        here, length = drawn.randrange(len(changed) + 1), drawn.choice((1, 2, 4, 8, 64))
        kind = drawn.randrange(6)
        if kind == 0 and here < len(changed):
            changed[here] ^= 1 << drawn.randrange(8)
        elif kind == 1:
            changed[here:here] = drawn.randbytes(length)
        elif kind == 2:
            del changed[here : here + length]
        elif kind == 3:
            changed[here:here] = changed[here : here + length]
        elif kind == 4:
            changed[here : here + length] = drawn.choice((b"\0", b"\xff", b"\x7f")) * length
        else:
            there = drawn.randrange(len(changed) + 1)
            changed[here : here + length] = changed[there : there + length]
    return bytes(changed)


def value_changed(content: Any, drawn: random.Random) -> Any:
    """JSON with one or a few of its values, anywhere in it, replaced, gone, doubled, or put into each other."""
    changed = {"": copy.deepcopy(content)}
    for _ in range(drawn.choice((1, 1, 1, 2, 3))):
        places = list(_places(changed))
        inside, key = drawn.choice(places)
        kind = drawn.randrange(5)
        if kind == 0 and inside is not changed:
            del inside[key]
        elif kind == 1:
            other, place = drawn.choice(places)
            inside[key] = copy.deepcopy(other[place])
        elif kind == 2 and isinstance(inside, dict):
            inside[drawn.choice(("evil", "", "x" * 2000, str(key) + " "))] = copy.deepcopy(inside[key])
        else:
            inside[key] = copy.deepcopy(drawn.choice(_ODD))
    return changed.get("")


def _places(inside: Any) -> Iterator[tuple[Any, Any]]:
    """Every value inside of lists and dicts: what holds it, and where."""
    keys = list(inside) if isinstance(inside, dict) else range(len(inside))
    for key in keys:
        yield inside, key
        if isinstance(inside[key], dict | list):
            yield from _places(inside[key])


def _profiles(folder: Path, drawn: random.Random) -> Iterator[Callable[[], object]]:
    path = folder / "profiles" / "fuzz.yaml"
    words = re.findall(r"\w+|\s+|[^\w\s]", profiles.GOOD)
    while True:
        changed = list(words)
        for _ in range(drawn.choice((1, 1, 2, 3, 8))):
            here = drawn.randrange(len(changed))
            new = drawn.choice((drawn.choice(_BITS_OF_YAML), drawn.choice(words), *profiles.VALUES.values()))
            changed[here : here + drawn.randrange(2)] = [new] * drawn.choice((0, 1, 1, 1, 50))
        text = "".join(changed)
        content = bytes_changed(text.encode(), drawn) if drawn.randrange(4) == 0 else text.encode()

        def call(content: bytes = content) -> object:
            path.write_bytes(content)
            return load_profile("fuzz").sha256

        yield call


def _images(folder: Path, drawn: random.Random) -> Iterator[Callable[[], object]]:
    good = [images.good(kind) for kind in data.IMAGE_FORMATS]
    while True:
        content = bytes_changed(drawn.choice(good), drawn)

        def change(place: Path, content: bytes = content) -> None:
            (place / images.FIRST).write_bytes(content)

        yield partial(images.read_after, folder, change)


def _released(folder: Path, drawn: random.Random) -> Iterator[Callable[[], object]]:
    path = folder / "released.pth"
    new, old = released.good(), released.good(_use_new_zipfile_serialization=False)
    while True:
        content = bytes_changed(old, drawn) if drawn.randrange(3) == 0 else _archive_changed(new, drawn)

        def call(content: bytes = content) -> object:
            path.write_bytes(content)
            return load_official(path, dataset="cifar10").training

        yield call


def _archive_changed(archive: bytes, drawn: random.Random) -> bytes:
    """A released archive with its pickle changed, and its checksums right."""
    written = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(archive)) as source, zipfile.ZipFile(written, "w") as target:
        for record in source.infolist():
            content = source.read(record)
            target.writestr(
                record.filename, bytes_changed(content, drawn) if record.filename[-4:] == ".pkl" else content
            )
    return written.getvalue()


def _runs(folder: Path, drawn: random.Random) -> Iterator[Callable[[], object]]:
    runs.prepared(folder)
    good = next((folder / "good-runs").glob("digits-clustr-*"))
    place, recipe = folder / "runs" / good.name, load_profile("runs").recipes["clustr"]
    facts = json.loads((good / DONE).read_text(encoding="utf-8"))
    tensors, said = read_tensors(good / CHECKPOINT, "a checkpoint")
    weights = (good / WEIGHTS).read_bytes()

    def used(change: Callable[[], object]) -> Callable[[], object]:
        def call() -> object:
            shutil.rmtree(place, ignore_errors=True)
            shutil.copytree(good, place)
            change()
            run = load_run(place)
            len(run.history)
            return run.model() and run.weights_sha256

        return call

    def resumed(content: Any) -> Callable[[], object]:
        def call() -> object:
            shutil.rmtree(place, ignore_errors=True)
            place.mkdir()
            write_tensors(place / CHECKPOINT, "a checkpoint", tensors, content)
            return fit(recipe, progress=False, device="cpu").path

        return call

    def with_weights(content: bytes) -> None:
        (place / WEIGHTS).write_bytes(content)
        runs.sealed(place, facts | {"weights_sha256": digest(content)})

    def with_history(content: bytes) -> None:
        (place / HISTORY).write_bytes(content)
        runs.sealed(place, facts | {"history_sha256": digest(content)})

    history = (good / HISTORY).read_bytes()
    while True:
        kind, changed = drawn.randrange(5), value_changed(facts, drawn)
        if kind == 0:
            progress = value_changed(said, drawn)
            yield resumed(progress if isinstance(progress, dict) else said)
        elif kind == 1:
            yield used(partial(with_weights, _header_changed(weights, drawn)))
        elif kind == 2:
            yield used(partial(with_weights, bytes_changed(weights, drawn)))
        elif kind == 3:
            yield used(partial(with_history, bytes_changed(history, drawn)))
        else:
            yield used(partial(runs.sealed, place, changed if isinstance(changed, dict) else {}))


def _header_changed(weights: bytes, drawn: random.Random) -> bytes:
    """Tensors as safetensors, with what the header says of them changed."""
    (length,) = struct.unpack("<Q", weights[:8])
    header = json.dumps(value_changed(json.loads(weights[8 : 8 + length]), drawn)).encode()
    return struct.pack("<Q", len(header)) + header + weights[8 + length :]


def _tables(folder: Path, drawn: random.Random) -> Iterator[Callable[[], object]]:
    good = b"method,index,robust,eps,loss\n" + b"".join(b"ce,%d,True,0.1,\xc3\xa9\n" % n for n in range(20))
    while True:
        content = bytes_changed(good, drawn)

        def call(content: bytes = content) -> object:
            (path := folder / "table.csv").write_bytes(content)
            return len(read_table(path))

        yield call


LOADERS: dict[str, Callable[[Path, random.Random], Iterator[Callable[[], object]]]] = {
    "profile": _profiles,
    "image": _images,
    "released file": _released,
    "run": _runs,
    "table": _tables,
}
