"""Networks that others trained go through the gate by one command, and what is no such network is named."""

import os
import shutil
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from book_copy import ROOT
from PIL import Image
from torch import nn

from clustr_core.measuring.profile import Protocol
from clustr_core.measuring.study import full_width
from clustr_core.models.classifiers import LinearClassifier
from clustr_core.models.encoders import build_encoder
from clustr_core.storage.provenance import check_sidecar
from clustr_core.storage.tables import read_table
from tools import given_weights, power, strangers


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Weights of a narrow ResNet-18 and of the small network for MNIST, and a folder of photographs of noise."""
    monkeypatch.setenv("CLUSTR_HOME", str(tmp_path / "book"))
    drawn = np.random.default_rng(0)
    for part in ("train", "test"):
        for label in "abcdefghij":
            folder = tmp_path / "photographs" / part / label
            folder.mkdir(parents=True)
            Image.fromarray(drawn.integers(0, 255, (32, 32, 3), dtype=np.uint8)).save(folder / "0.png")
    torch.manual_seed(0)
    encoder = build_encoder("resnet18", (3, 32, 32), width=4, dataset="cifar10")
    network = LinearClassifier(encoder, 32, 10)
    released = {name.removeprefix("encoder."): tensor for name, tensor in network.state_dict().items()}
    torch.save({name: each for name, each in released.items() if "normalize" not in name}, tmp_path / "resnet.pt")
    torch.save(strangers.small_network().state_dict(), tmp_path / "lenet.pt")
    given = {"resnet18": "resnet.pt", "lenet5": "lenet.pt", "data": "photographs", "into": "made"}
    return [part for name, path in given.items() for part in (f"--{name}", str(tmp_path / path))]


def test_two_networks_are_attacked_and_their_tables_say_how(
    files: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(
        strangers, "protocols", lambda eps, examples: [Protocol(eps=(eps,), steps=1, examples=examples)]
    )
    assert strangers.main([*files, "--examples", "4"]) == 0
    for name, eps in (("standard", 8 / 255), ("adversarial", 0.3)):
        table = read_table(tmp_path / f"made/attacks-{name}.csv")
        made = check_sidecar(tmp_path / f"made/attacks-{name}.csv")["made"]
        assert set(table["method"]) == {name}
        assert np.allclose(table["eps"], eps)
        assert table["index"].nunique() == 4
        assert len(made["weights_sha256"]) == 64
    assert "adversarial" in capsys.readouterr().out


def test_the_gate_is_the_books_own() -> None:
    found = {(each.attack, each.climbed) for each in strangers.protocols(0.1, 8)}
    assert ("pgd", ("ce", "margin", "dlr")) in found
    assert {attack for attack, _ in found} == {"paper", "pgd", "square", "autoattack"}


def test_another_file_is_named(files: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "lenet.pt").write_bytes(b"no network")
    assert strangers.main(files) == 2
    assert f"--lenet5: expected a state dict of its layers in {tmp_path / 'lenet.pt'}" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        strangers.main([*files, "--examples", "0"])
    assert "--examples: expected a positive number, got 0" in capsys.readouterr().err


def test_what_lies_there_is_not_replaced_and_a_fifo_is_named(
    files: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mine = tmp_path / "made/attacks-adversarial.csv"
    mine.parent.mkdir()
    mine.write_text("my own,table\n", encoding="utf-8")
    assert strangers.main(files) == 2
    assert "--into: expected no file, or a table with its sidecar, got another" in capsys.readouterr().err
    assert mine.read_text(encoding="utf-8") == "my own,table\n"
    mine.unlink()
    (tmp_path / "lenet.pt").unlink()
    os.mkfifo(tmp_path / "lenet.pt")
    assert strangers.main(files) == 2
    assert "lenet.pt: expected a regular file" in capsys.readouterr().err


def test_given_weights_do_not_take_the_place_of_what_was_given(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = tmp_path / "run.json"
    recipe.write_text("{}", encoding="utf-8")
    os.mkfifo(tmp_path / "weights")
    places = {"weights": "weights", "recipe": "run.json", "data": "data", "source": "weights", "into": "run.csv"}
    given = [part for name, path in places.items() for part in (f"--{name}", str(tmp_path / path))]
    assert given_weights.main(given) == 2
    assert "run.json no file but a table's sidecar, got one that would be lost" in capsys.readouterr().err
    assert recipe.read_text(encoding="utf-8") == "{}"


@pytest.mark.usefixtures("as_installed")
@pytest.mark.parametrize("recipe", ["{}", '{"recipe": 3}', '{"recipe": {"method": ["x"]}}'])
def test_given_weights_of_no_recipe_are_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], recipe: str
) -> None:
    (tmp_path / "run.json").write_text(recipe, encoding="utf-8")
    places = {"weights": "weights", "recipe": "run.json", "data": "data", "source": "weights", "into": "rows.csv"}
    given = [part for name, path in places.items() for part in (f"--{name}", str(tmp_path / path))]
    assert given_weights.main(given) == 2
    said = capsys.readouterr().err
    assert said.startswith(("given_weights: expected", "given_weights: recipe: expected", "given_weights: method: exp"))
    assert said.count("\n") == 1


def test_the_battery_on_given_weights_is_of_those_that_were_attacked(monkeypatch: pytest.MonkeyPatch) -> None:
    """What attacks left is read off the published rows."""
    first = full_width().drop_duplicates("index").sort_values("index").head(40)
    indices, labels = first["index"].tolist(), torch.tensor(first["label"].to_numpy())
    images = torch.zeros(len(first), 3, 32, 32, dtype=torch.uint8)
    check = partial(given_weights._check_published, nn.Identity(), images, device="cpu")
    said = torch.tensor(first["prediction"].to_numpy())
    monkeypatch.setattr(given_weights, "predictions", lambda *_: said)
    check(labels, indices)
    with pytest.raises(ValueError, match="--data: expected with --battery the images of the published rows, got oth"):
        check(labels + 1, indices)
    with pytest.raises(ValueError, match="--examples: expected with --battery at most 512, whose rows are there, got"):
        check(labels, [*indices[1:], 10_000])
    monkeypatch.setattr(given_weights, "predictions", lambda *_: said + 1)
    with pytest.raises(ValueError, match="--weights: expected with --battery those of the published rows, got others"):
        check(labels, indices)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["--seeds", "1", "1"], "--seeds: expected each once, since all are counted, got [1, 1]"),
        (["--widths", "4", "4"], "--widths: expected each once, since all are counted, got [4, 4]"),
        (["--profile", "few"], "--methods: expected some of profile few, which has no clustr, clustr-qtrades,"),
    ],
)
def test_power_counts_nothing_twice_and_asks_for_what_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], given: list[str], said: str
) -> None:
    monkeypatch.setenv("CLUSTR_HOME", str(tmp_path))
    (tmp_path / "profiles").mkdir()
    shutil.copy(ROOT / "profiles/quick.yaml", tmp_path / "profiles")
    (tmp_path / "profiles/few.yaml").write_text("methods: {ce: {dataset: digits}}\n", encoding="utf-8")
    assert power.main(["--eps", "0.1", *given]) == 2
    assert said in capsys.readouterr().err
