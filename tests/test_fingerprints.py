"""Behaviour is what it was when it was recorded; whoever changes it says so by a version."""

import json
from dataclasses import replace
from pathlib import Path

import fingerprints
import pytest
import torch
from fingerprints import PROTOCOLS, Fingerprint, differences, recipe_of, write

from clustr_core.measuring.versions import VERSIONS
from clustr_core.training.recipes import METHODS

RECORDED = fingerprints.recorded()
HOW = (
    "behaviour changed: raise TRAINING_VERSION (training/recipes.py) or VERSIONS (measuring/versions.py), and run "
    "`python -m tests.fingerprints --write`; or mend it"
)


@pytest.fixture(scope="module")
def found() -> dict[str, Fingerprint]:
    """Everything, computed now."""
    assert torch.get_num_threads() == 1
    return fingerprints.all_found()


@pytest.mark.parametrize("name", RECORDED)
def test_behaviour_is_what_was_recorded(name: str, found: dict[str, Fingerprint]) -> None:
    assert name in found, f"{name} is recorded and no longer computed; run `python -m tests.fingerprints --write`"
    before, now = RECORDED[name], found[name]
    assert before.version == now.version, (
        f"{name}: recorded for another version; `python -m tests.fingerprints --write`"
    )
    if moved := differences(before, now):
        pytest.fail(f"{name}: {', '.join(moved)}\n{HOW}")


def test_everything_that_is_computed_is_recorded(found: dict[str, Fingerprint]) -> None:
    assert list(RECORDED) == list(found)


def test_every_method_and_every_kind_of_measurement_has_a_fingerprint() -> None:
    assert {name.removeprefix("training ") for name in RECORDED if name.startswith("training ")} == set(METHODS)
    with fingerprints.published() as runs:
        assert {kind for kind, _ in fingerprints.measurements(runs).values()} == set(VERSIONS)


# what another behaviour does to them


def changes(method: str) -> dict[str, dict]:
    """What may change a training: a tenth of its learning rate or of a constant of its loss, a batch left out."""
    kind, recipe = METHODS[method], recipe_of(method)
    constants = [name for name in vars(kind)["__annotations__"] if type(getattr(recipe, name)) is float]
    # the exponent of annealing is of a loss that no method has by default
    tenth = {"learning_rate", *constants} - {"eps", "step_size", "annealing"}
    return {name: {name: 1.1 * getattr(recipe, name)} for name in sorted(tenth)} | {"a batch": {"train_examples": 128}}


@pytest.mark.parametrize(("method", "change"), [(method, change) for method in METHODS for change in changes(method)])
def test_another_training_is_noticed(method: str, change: str) -> None:
    recipe = replace(recipe_of(method), **changes(method)[change])
    now = Fingerprint("1", fingerprints.training(recipe))
    assert differences(RECORDED[f"training {method}"], now)


@pytest.fixture(scope="module")
def runs():
    """The published networks."""
    with fingerprints.published() as found:
        yield found


# Square takes no steps of a size, and so many queries that a quarter of them changes little
ATTACK_CHANGES = [(name, change) for name in PROTOCOLS for change in ("step_size", "steps", "eps")]
ATTACK_CHANGES.remove(("square", "step_size"))


@pytest.mark.parametrize(("name", "change"), ATTACK_CHANGES)
def test_another_attack_is_noticed(name: str, change: str, runs: dict) -> None:
    protocol = PROTOCOLS[name]
    (eps,) = protocol.eps
    step_size = protocol.step_size_at(eps)
    fewer = protocol.steps // 4 if name == "square" else protocol.steps - max(1, protocol.steps // 4)
    changed = {
        "eps": {"eps": (1.1 * eps,), "step_size": step_size},
        "steps": {"steps": fewer, "step_size": step_size},
        "step_size": {"step_size": 1.1 * step_size},
    }
    now = Fingerprint("1", fingerprints.attacked("clustr", replace(protocol, **changed[change]), runs))
    assert differences(RECORDED[f"attack {name} of clustr"], now)


# how they are recorded


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A file with one fingerprint."""
    path = tmp_path / "prints.json"
    assert write({"training ce": Fingerprint("1", {"loss of epoch 1": 2.0})}, path) == []
    return path


def test_other_numbers_are_not_recorded_without_another_version(file: Path) -> None:
    before = file.read_bytes()
    other = {"loss of epoch 1": 2.1}
    assert write({"training ce": Fingerprint("1", other)}, file) == ["training ce: loss of epoch 1: 2 -> 2.1"]
    assert write({"training ce": Fingerprint("1", {})}, file) == ["training ce: loss of epoch 1: 2 -> nan"]
    assert file.read_bytes() == before
    assert write({"training ce": Fingerprint("2", other)}, file) == []
    assert json.loads(file.read_text(encoding="utf-8")) == {"training ce": {"version": "2", "numbers": other}}


def test_a_rounding_changes_nothing_that_is_recorded(file: Path) -> None:
    before = file.read_bytes()
    now = {"training ce": Fingerprint("1", {"loss of epoch 1": 2.0001})}
    assert differences(fingerprints.recorded(file)["training ce"], now["training ce"]) == []
    assert write(now, file) == []
    assert file.read_bytes() == before
