"""Inputs that nobody thought of, for each loader: what it does with them is a property that Hypothesis tries to break.

The property: a file is read, or refused in a short line, within the limits of `tools.torture.forks`, and nothing else
happens. The inputs are good ones with something in them changed. What has a structure is changed in it and sealed
again, so that the change comes to the checks behind the digests: words and values of a profile, values of `run.json`
and of a checkpoint, instructions of a released pickle, headers of tensors. The search climbs towards inputs that take
long or much memory (Hypothesis's targets), and one that breaks the property is made as small as it can be. Another
``--seed`` begins elsewhere.
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

import yaml
from hypothesis import HealthCheck, Phase, given, settings, target
from hypothesis import seed as seeded
from hypothesis import strategies as st

from clustr_core.measuring.profile import load_profile
from clustr_core.models.official import load_official
from clustr_core.storage.files import digest
from clustr_core.storage.images import IMAGE_FORMATS
from clustr_core.storage.tables import read_table
from clustr_core.storage.tensors import read_tensors, write_tensors
from clustr_core.training.loop import fit
from clustr_core.training.names import CHECKPOINT, DONE, HISTORY, WEIGHTS
from clustr_core.training.run import load_run
from tools.torture import images, profiles, released, runs
from tools.torture.forks import Case, Outcome, attempt

EACH = 100
_ODD: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 2**31, 2**63, 10**30, 0.0, -0.5, 1e300, float("inf"), float("nan"), "", "x",
    "x" * 5000, "\0", "../..", "1", [], [[]], {}, {"x": 1}, [0] * 1000, "digits", "cifar10", [1, 8, 8],
)  # fmt: skip
_BITS_OF_YAML = (
    ":", "- ", "[", "]", "{", "}", "&a ", "*a", "<<: ", "!!python/name:os.system ", "#", "'", '"', "\n", "\n  ", "\t",
    "|", "?", ",", "~", "0x10", "010", "1:30", "on", "1e400", ".nan", "---\n", "%YAML 1.1\n", "\u2028", "\ufeff",
)  # fmt: skip


_LEAVES = st.sampled_from(_ODD) | st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=40)
VALUES = st.recursive(
    _LEAVES, lambda inside: st.lists(inside, max_size=4) | st.dictionaries(st.text(max_size=8), inside, max_size=4)
)
# what is done with an input that is made of chance and of a strange value
Made = Callable[[random.Random, Any], Callable[[], object]]


def searched(name: str, folder: Path, canaries: Path, *, inputs: int = EACH, seed: int = 0) -> list[Outcome]:
    """What came of so many inputs for one loader, and of the smaller ones that were made of one that broke it.

    Args:
        name: of `LOADERS`.
        folder: the book of the inputs; if one broke the loader, the smallest that did lies there in the end.
    """
    outcomes: list[Outcome] = []
    made = LOADERS[name](folder)

    @seeded(seed)
    @settings(
        max_examples=inputs,
        deadline=None,
        database=None,
        phases=(Phase.generate, Phase.target, Phase.shrink),
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
    )
    @given(drawn=st.randoms(use_true_random=False), value=VALUES)
    def read_or_refused(drawn: random.Random, value: Any) -> None:
        case = Case("fuzz", f"{name} {len(outcomes)} of seed {seed}", made(drawn, value), "either")
        outcomes.append(outcome := attempt(case, folder, canaries))
        target(outcome.seconds, label="seconds")
        target(outcome.megabytes, label="megabytes")
        if outcome.faults:
            raise AssertionError(outcome.faults)

    try:
        read_or_refused()
    # what Hypothesis raises once it has the smallest: that, or that it broke once and not again
    except Exception:
        if not any(outcome.faults for outcome in outcomes):
            raise
    return outcomes


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


def value_changed(content: Any, drawn: random.Random, value: Any) -> Any:
    """JSON with one or a few of its values, anywhere in it, replaced by ``value``, gone, doubled, or put elsewhere."""
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
            inside[key] = copy.deepcopy(value)
    return changed.get("")


def _places(inside: Any) -> Iterator[tuple[Any, Any]]:
    """Every value inside of lists and dicts: what holds it, and where."""
    keys = list(inside) if isinstance(inside, dict) else range(len(inside))
    for key in keys:
        yield inside, key
        if isinstance(inside[key], dict | list):
            yield from _places(inside[key])


def _profiles(folder: Path) -> Made:
    path = folder / "profiles" / "fuzz.yaml"
    words = re.findall(r"\w+|\s+|[^\w\s]", profiles.GOOD)
    said = yaml.safe_load(profiles.GOOD)

    def text(drawn: random.Random, value: Any) -> str:
        if drawn.randrange(2):
            return yaml.safe_dump(value_changed(said, drawn, value), allow_unicode=bool(drawn.randrange(2)))
        changed = list(words)
        for _ in range(drawn.choice((1, 1, 2, 3, 8))):
            here = drawn.randrange(len(changed))
            new = drawn.choice((drawn.choice(_BITS_OF_YAML), drawn.choice(words), *profiles.VALUES.values()))
            changed[here : here + drawn.randrange(2)] = [new] * drawn.choice((0, 1, 1, 1, 50))
        return "".join(changed)

    def made(drawn: random.Random, value: Any) -> Callable[[], object]:
        content = text(drawn, value).encode(errors="surrogatepass")
        return _reading(
            path, content if drawn.randrange(4) else bytes_changed(content, drawn), lambda: load_profile("fuzz").sha256
        )

    return made


def _reading(path: Path, content: bytes, read: Callable[[], object]) -> Callable[[], object]:
    """Write a file, and read it."""

    def call() -> object:
        path.write_bytes(content)
        return read()

    return call


def _images(folder: Path) -> Made:
    good = [images.good(kind) for kind in IMAGE_FORMATS]

    def made(drawn: random.Random, value: Any) -> Callable[[], object]:
        content = bytes_changed(drawn.choice(good), drawn)
        return lambda: images.read_after(folder, lambda place: (place / images.FIRST).write_bytes(content))

    return made


def _released(folder: Path) -> Made:
    path = folder / "released.pth"
    new, old = released.good(), released.good(_use_new_zipfile_serialization=False)

    def made(drawn: random.Random, value: Any) -> Callable[[], object]:
        content = bytes_changed(old, drawn) if drawn.randrange(3) == 0 else _archive_changed(new, drawn)
        return _reading(path, content, lambda: load_official(path, dataset="cifar10").training)

    return made


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


def _runs(folder: Path) -> Made:
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

    def made(drawn: random.Random, value: Any) -> Callable[[], object]:
        kind = drawn.randrange(5)
        if kind == 0:
            progress = value_changed(said, drawn, value)
            return resumed(progress if isinstance(progress, dict) else said)
        if kind == 1:
            return used(partial(with_weights, _header_changed(weights, drawn, value)))
        if kind == 2:
            return used(partial(with_weights, bytes_changed(weights, drawn)))
        if kind == 3:
            return used(partial(with_history, bytes_changed(history, drawn)))
        changed = value_changed(facts, drawn, value)
        return used(partial(runs.sealed, place, changed if isinstance(changed, dict) else {}))

    return made


def _header_changed(weights: bytes, drawn: random.Random, value: Any) -> bytes:
    """Tensors as safetensors, with what the header says of them changed."""
    (length,) = struct.unpack("<Q", weights[:8])
    header = json.dumps(value_changed(json.loads(weights[8 : 8 + length]), drawn, value)).encode()
    return struct.pack("<Q", len(header)) + header + weights[8 + length :]


def _tables(folder: Path) -> Made:
    path = folder / "table.csv"
    good = b"method,index,robust,eps,loss\n" + b"".join(b"ce,%d,True,0.1,\xc3\xa9\n" % n for n in range(20))

    def made(drawn: random.Random, value: Any) -> Callable[[], object]:
        return _reading(path, bytes_changed(good, drawn), lambda: len(read_table(path)))

    return made


LOADERS: dict[str, Callable[[Path], Made]] = {
    "profile": _profiles,
    "image": _images,
    "released file": _released,
    "run": _runs,
    "table": _tables,
}
