"""Hostile runs, checkpoints and tables: each sealed again, so that no digest tells that it was changed."""

import contextlib
import io
import json
import os
import shutil
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from clustr_core import cli
from clustr_core.measuring.profile import load_profile
from clustr_core.storage.files import digest, seal_of
from clustr_core.storage.tables import read_table
from clustr_core.storage.tensors import read_tensors, write_tensors
from clustr_core.training.loop import fit
from clustr_core.training.names import CHECKPOINT, DONE, HISTORY, WEIGHTS
from clustr_core.training.recipes import Recipe
from clustr_core.training.run import load_run
from tools.torture.forks import Case, Expected

PROFILE = """\
shared: {dataset: digits, width: 4, train_examples: 100, seed: 111}
methods:
  clustr: {epochs: 2, per_cluster: 4, snapshots: [1]}
  free-clustr: {epochs: 2, per_cluster: 4, eps: 0.1, step_size: 0.1, replays: 2}
attacks:
  linf: {norm: linf, eps: [0.1], steps: 1, losses: [ce], examples: 8}
certified_examples: 8
"""
Change = Callable[[Path], object]


def prepared(folder: Path) -> dict[str, Recipe]:
    """Train the two runs of the profile, and give one its table of attacks."""
    (folder / "profiles" / "runs.yaml").write_text(PROFILE, encoding="utf-8")
    recipes = load_profile("runs").recipes
    for recipe in recipes.values():
        fit(recipe, progress=False, device="cpu")
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        assert cli.main(["attack", "--profile", "runs", "--method", "clustr", "--device", "cpu"]) == 0
    shutil.copytree(folder / "runs", folder / "good-runs")
    shutil.copytree(folder / "results", folder / "good-results")
    return recipes


def cases(folder: Path, canaries: Path) -> Iterator[Case]:
    """All of them; each begins with the runs as they were trained."""
    recipes = prepared(folder)
    names = {method: next((folder / "runs").glob(f"digits-{method}-*")).name for method in recipes}

    def case(name: str, change: Change, read: Change, expected: Expected = "refused", method: str = "clustr") -> Case:
        def call() -> object:
            place = folder / "runs" / names[method]
            shutil.rmtree(place, ignore_errors=True)
            shutil.copytree(folder / "good-runs" / names[method], place)
            change(place)
            return read(place)

        return Case("runs", name, call, expected)

    def used(place: Path) -> object:
        run = load_run(place)
        len(run.history)
        run.model()
        run.encoder_at(1)
        return run.weights_sha256

    def resumed(place: Path) -> object:
        for name in (DONE, WEIGHTS, HISTORY):
            (place / name).unlink(missing_ok=True)
        return fit(load_profile("runs").recipes[place.name[7:-11]], progress=False, device="cpu").path

    def attacked(place: Path) -> object:
        return cli.main(["attack", "--profile", "runs", "--method", "clustr", "--device", "cpu"])

    yield case("a good one", lambda place: None, used, "accepted")
    yield case("a good one, resumed", lambda place: None, resumed, "accepted")
    yield case("a good one, attacked", lambda place: None, attacked, "accepted")
    for name, change in _facts().items():
        yield case(f"run.json: {name}", _of_json(change), used)
    for name, change in _tensors().items():
        yield case(f"weights: {name}", _of_weights(change), used)
        yield case(f"weights: {name}, from the shell", _of_weights(change), attacked)
    whole = (folder / "good-runs" / names["clustr"] / WEIGHTS).read_bytes()
    for name, content in _files(whole).items():
        yield case(f"weights: {name}", _bytes_of(WEIGHTS, content), used)
        yield case(f"checkpoint: {name}", _bytes_of(CHECKPOINT, content), resumed)
    for name, change in _progress().items():
        yield case(f"checkpoint: {name}", _of_checkpoint(change), resumed)
    gone = _of_checkpoint(lambda tensors, facts: tensors.pop("perturbation"))
    yield case("checkpoint: without its perturbation", gone, resumed, method="free-clustr")
    for name in (DONE, WEIGHTS, HISTORY, CHECKPOINT, "snapshots/epoch-0001.safetensors"):
        read = resumed if name == CHECKPOINT else used
        for kind, make in _INSTEAD.items():
            # a checkpoint that is not there is a training from the start
            absent = name == CHECKPOINT and kind in ("nothing", "a link to nowhere", "a link to itself")
            yield case(f"{name}: {kind}", _replaced(name, make), read, "either" if absent else "refused")
    yield from _pieces(case, attacked)
    yield from _tables(folder)


def sealed(place: Path, content: dict[str, Any]) -> None:
    """Write what a run says of itself, with a digest that fits."""
    content.pop("sha256", None)
    text = json.dumps(content | {"sha256": seal_of(content)})
    (place / DONE).write_text(text, encoding="utf-8")


def _of_json(change: Callable[[dict[str, Any]], object]) -> Change:
    def changed(place: Path) -> None:
        content = json.loads((place / DONE).read_text(encoding="utf-8"))
        change(content)
        sealed(place, content)

    return changed


def _facts() -> dict[str, Callable[[dict[str, Any]], object]]:
    def put(key: str, value: object) -> Callable[[dict[str, Any]], object]:
        return lambda content: content.update({key: value})

    def recipe(key: str, value: object) -> Callable[[dict[str, Any]], object]:
        return lambda content: content["recipe"].update({key: value})

    def deep(content: dict[str, Any]) -> None:
        inner = dict(content["recipe"])
        for _ in range(300):
            inner = {**content["recipe"], "warm_start": inner}
        content["recipe"] = inner

    odd = ("x" * 100_000, [1], {}, None, -1, 10**18, 1.5, True)
    found: dict[str, Callable[[dict[str, Any]], object]] = {"a warm start of 300": deep}
    for key in ("recipe", "image_shape", "num_classes", "train_data_sha256", "weights_dtype"):
        values = [value for value in odd if not (key.endswith("sha256") and isinstance(value, str))]
        found |= {f"{key} {str(value)[:9]}": put(key, value) for value in values}
        found[f"without {key}"] = lambda content, key=key: content.pop(key)
    del found["without weights_dtype"]
    shapes = ([1, 8], [1, 8, 8, 8], [1, 10**9, 10**9], [1, -8, 8], ["1", 8, 8], [10**6, 8, 8], [0, 8, 8])
    found |= {f"shape {shape}": put("image_shape", shape) for shape in shapes}
    for key in ("method", "dataset", "encoder", "width", "epochs", "per_class", "neighbours", "seed", "snapshots"):
        found |= {f"{key} {str(value)[:9]}": recipe(key, value) for value in odd}
    # a name of data may be any, as long as nothing is read by it
    return {name: change for name, change in found.items() if name not in ("dataset xxxxxxxxx", "snapshots [1]")}


def _of_weights(change: Callable[[dict[str, torch.Tensor]], object]) -> Change:
    def changed(place: Path) -> None:
        tensors = load_file(place / WEIGHTS)
        change(tensors)
        save_file(tensors, place / WEIGHTS)
        content = json.loads((place / DONE).read_text(encoding="utf-8"))
        sealed(place, content | {"weights_sha256": digest((place / WEIGHTS).read_bytes())})

    return changed


def _tensors() -> dict[str, Callable[[dict[str, torch.Tensor]], object]]:
    def put(name: str, make: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[dict[str, torch.Tensor]], object]:
        def change(tensors: dict[str, torch.Tensor]) -> None:
            mine = [each for each in tensors if each.startswith(name)]
            full = max(mine, key=lambda each: tensors[each].dim())
            tensors[full] = make(tensors[full]).contiguous()

        return change

    def add(name: str) -> Callable[[dict[str, torch.Tensor]], object]:
        return lambda tensors: tensors.update({name: torch.ones(1)})

    def drop(name: str) -> Callable[[dict[str, torch.Tensor]], object]:
        return lambda tensors: tensors.pop(next(each for each in tensors if each.startswith(name)))

    first = "network.encoder"
    return {
        "NaN": put(first, lambda tensor: tensor * float("nan")),
        "infinity": put(first, lambda tensor: tensor / 0),
        "another shape": put(first, lambda tensor: tensor[..., :1].clone()),
        "turned": put(first, lambda tensor: tensor.transpose(0, 1).clone()),
        "whole numbers": put(first, torch.Tensor.long),
        "one more": add("network.evil"),
        "one more cluster field": add("clusters.evil"),
        "one less": drop(first),
        **{f"without {name}": drop(f"clusters.{name}") for name in ("centroids", "labels", "variance")},
        "variance 0": put("clusters.variance", torch.zeros_like),
        "variance -1": put("clusters.variance", lambda tensor: -tensor),
        "variance NaN": put("clusters.variance", lambda tensor: tensor * float("nan")),
        "fewer variances": put("clusters.variance", lambda tensor: tensor[:2].clone()),
        "labels + 100": put("clusters.labels", lambda tensor: tensor + 100),
        "labels + 10^9": put("clusters.labels", lambda tensor: tensor + 10**9),
        "labels below 0": put("clusters.labels", lambda tensor: -1 - tensor),
        "labels of floats": put("clusters.labels", torch.Tensor.float),
        "labels of one class": put("clusters.labels", torch.zeros_like),
        "few centroids": put("clusters.centroids", lambda tensor: tensor[:3].clone()),
        "flat centroids": put("clusters.centroids", lambda tensor: tensor[:, :5].clone()),
        "centroids NaN": put("clusters.centroids", lambda tensor: tensor * float("nan")),
        "no centroids": put("clusters.centroids", lambda tensor: tensor[:0].clone()),
    }


def _files(whole: bytes) -> dict[str, bytes]:
    """Files of safetensors that are none."""
    (length,) = struct.unpack("<Q", whole[:8])
    header, body = json.loads(whole[8 : 8 + length]), whole[8 + length :]
    some = next(name for name in header if name != "__metadata__")

    def built(content: object, size: int | None = None) -> bytes:
        text = content if isinstance(content, bytes) else json.dumps(content).encode()
        return struct.pack("<Q", len(text) if size is None else size) + text + body

    def with_entry(**changes: object) -> bytes:
        return built(header | {some: header[some] | changes})

    return {
        "nothing": b"",
        "7 bytes": bytes(7),
        "a header of 2^63": built(header, 2**63),
        "a header of 2^64 - 1": built(header, 2**64 - 1),
        "a header beyond its end": built(header, 10**7),
        "a header of 0": built(b""),
        "no JSON": built(b"\xff" * 100),
        "a list": built([]),
        "50,000 deep": built(b'{"a":' * 50_000 + b"1" + b"}" * 50_000),
        "no tensors": built({}),
        "a negative shape": with_entry(shape=[-1, 1, 3, 3]),
        "a broken shape": with_entry(shape=[1.5]),
        "a huge shape": with_entry(shape=[2**62, 4]),
        "a shape that wraps around": with_entry(shape=[2**33, 2**33]),
        "before its beginning": with_entry(data_offsets=[-4, 0]),
        "behind its end": with_entry(data_offsets=[0, 2**50]),
        "backwards": with_entry(data_offsets=[100, 0]),
        "an unknown dtype": with_entry(dtype="PICKLE"),
        "half": whole[: len(whole) // 2],
        "one byte less": whole[:-1],
        "1,000 bytes more": whole + bytes(1000),
        "100,000 tensors": built(
            {f"t{i}": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for i in range(100_000)}
        ),
        "text": b"hello",
    }


def _bytes_of(name: str, content: bytes) -> Change:
    def changed(place: Path) -> None:
        (place / name).write_bytes(content)
        if name == WEIGHTS:
            said = json.loads((place / DONE).read_text(encoding="utf-8"))
            sealed(place, said | {"weights_sha256": digest(content)})

    return changed


def _of_checkpoint(change: Callable[[dict[str, torch.Tensor], dict[str, Any]], object]) -> Change:
    def changed(place: Path) -> None:
        tensors, facts = read_tensors(place / CHECKPOINT, "a checkpoint")
        # with an epoch to go, so that all of it is used
        facts |= {"epoch": 1, "history": facts["history"][:1]}
        change(tensors, facts)
        write_tensors(place / CHECKPOINT, "a checkpoint", tensors, facts)

    return changed


def _progress() -> dict[str, Callable[[dict[str, torch.Tensor], dict[str, Any]], object]]:
    def say(**facts: object) -> Callable[[dict[str, torch.Tensor], dict[str, Any]], object]:
        return lambda tensors, said: said.update(facts)

    def put(name: str, make: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[dict, dict], object]:
        def change(tensors: dict[str, torch.Tensor], said: dict[str, Any]) -> None:
            for full in [each for each in tensors if each.startswith(name)]:
                tensors[full] = make(tensors[full])

        return change

    def drop(name: str) -> Callable[[dict, dict], object]:
        def change(tensors: dict[str, torch.Tensor], said: dict[str, Any]) -> None:
            for full in [each for each in tensors if each.startswith(name)]:
                del tensors[full]

        return change

    return {
        **{f"epoch {value!r}": say(epoch=value) for value in (-1, 10**9, "2", 1.5, None, True, 2, 0)},
        **{
            f"history {str(value)[:20]}": say(history=value)
            for value in ("x", [], [{"epoch": 1}], [{"x": "y"}], [{"epoch": 9, "loss": 1.0}], [1], None)
        },
        **{
            f"trained on {str(value)[:20]}": say(trained_on=value)
            for value in (
                None,
                "x",
                [],
                [1],
                [{"after_epoch": 7}],
                [{"after_epoch": 1}, {"after_epoch": 0}],
                [{}] * 10**5,
            )
        },
        **{f"recipe {str(value)[:20]}": say(recipe=value) for value in (None, [], {}, {"method": "x"}, "x" * 10_000)},
        "another recipe": lambda tensors, said: said["recipe"].update(epochs=99),
        "other data": say(train_data_sha256="0" * 64),
        "no data": say(train_data_sha256=None),
        "another version": say(version="99"),
        "a short generator": put("generator", lambda tensor: tensor[:10].clone()),
        "a generator of floats": put("generator", torch.Tensor.float),
        "without a generator": drop("generator"),
        "without an optimiser": drop("optimiser."),
        "without a network": drop("network."),
        "half an optimiser": drop("optimiser.0.exp_avg_sq"),
        "one more weight": lambda tensors, said: tensors.update({"optimiser.999999.exp_avg": torch.ones(1)}),
        "an odd slot": lambda tensors, said: tensors.update({"optimiser.evil.exp_avg": torch.ones(1)}),
        "an odd tensor": lambda tensors, said: tensors.update({"evil": torch.ones(1)}),
        "a network of NaN": put("network.encoder", lambda tensor: tensor * float("nan")),
        "a network of another shape": put("network.encoder", lambda tensor: tensor[..., :1].clone()),
        "an optimiser of one number": put("optimiser.", lambda tensor: torch.ones(1)),
        "an optimiser of NaN": put("optimiser.", lambda tensor: tensor * float("nan")),
    }


_INSTEAD: dict[str, Callable[[Path], object]] = {
    "nothing": lambda path: None,
    "a folder": Path.mkdir,
    "a FIFO": os.mkfifo,
    "a link to itself": lambda path: path.symlink_to(path),
    "a link to nowhere": lambda path: path.symlink_to(path.parent / "nowhere"),
    "a link to zeros": lambda path: path.symlink_to("/dev/zero"),
    "a link to memory": lambda path: path.symlink_to("/proc/self/mem"),
    "all bytes": lambda path: path.write_bytes(bytes(range(256))),
}


def _replaced(name: str, make: Callable[[Path], object]) -> Change:
    def changed(place: Path) -> None:
        (place / name).unlink()
        make(place / name)

    return changed


def _pieces(case: Callable[..., Case], attacked: Change) -> Iterator[Case]:
    """Kept rows of a measurement."""
    changes: dict[str, Callable[[Path], object]] = {
        "empty": lambda path: path.write_bytes(b""),
        "its header": lambda path: path.write_bytes(path.read_bytes().partition(b"\n")[0] + b"\n"),
        "half": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
        "all bytes": lambda path: path.write_bytes(bytes(range(256)) * 10),
        "other rows": lambda path: path.write_bytes(path.read_bytes().replace(b"True", b"False") + b"x"),
        "a folder": lambda path: (path.unlink(), path.mkdir()),
        "a FIFO": lambda path: (path.unlink(), os.mkfifo(path)),
        "a link to zeros": lambda path: (path.unlink(), path.symlink_to("/dev/zero")),
    }
    for name, change in changes.items():

        def changed(place: Path, change: Callable[[Path], object] = change) -> None:
            for path in (place / "tables").glob("*.csv"):
                change(path)

        yield case(f"a piece: {name}", changed, attacked)


def _tables(folder: Path) -> Iterator[Case]:
    """Tables of results."""
    contents = {
        "empty": b"",
        "a NUL": b"a,b\n\0,1\n",
        "no UTF-8": b"a,b\n\xff,1\n",
        "a quote": b'a,b\n"1,2\n' * 1000,
        "more fields in a row": b"a\n1\n1,2,3\n",
        "100,000 columns after a blank line": b"\n" + b",".join([b"a"] * 100_000) + b"\n",
        "100,000 columns after a name in two lines": b'"x\n",' + b",".join([b"a"] * 100_000) + b"\n1\n",
        "a last line that is cut off": b"a,b\n1,2\n3,Tr",
        "100,000 columns": b",".join(b"%d" % number for number in range(100_000)) + b"\n",
        "a row of 100,000": b"a\n1\n" + b"1," * 100_000 + b"\n",
        "a first row of 100,000": b"a\n" + b"1," * 100_000 + b"\n",
    }
    for name, content in contents.items():

        def call(content: bytes = content) -> object:
            (path := folder / "table.csv").write_bytes(content)
            return len(read_table(path))

        yield Case("tables", name, call, "either" if name in ("a NUL", "a quote") else "refused")
    for kind, make in _INSTEAD.items():

        def instead(make: Callable[[Path], object] = make) -> object:
            path = folder / "table.csv"
            path.unlink(missing_ok=True)
            make(path)
            return len(read_table(path))

        yield Case("tables", kind, instead)
    yield Case("tables", "an output that is a link", lambda: _through_a_link(folder), "accepted")
    for stream in ("/dev/null", "/dev/stdout"):
        words = ["certify", "--profile", "runs", "--method", "prototypes", "--output", stream]
        yield Case("tables", f"an output to {stream}", lambda words=words: cli.main(words), "accepted")


def _through_a_link(folder: Path) -> object:
    """A link stays one, and what it leads to is written, and written again."""
    target, link = folder / "elsewhere.csv", folder / "link.csv"
    link.symlink_to(target)
    words = ["certify", "--profile", "runs", "--method", "prototypes", "--output", str(link)]
    assert [cli.main(words), cli.main(words)] == [0, 0]
    assert link.is_symlink()
    assert target.read_text(encoding="utf-8").startswith("method,")
    return 0
