"""Networks that others trained go through the gate by one command, and what is no such network is named."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from clustr_core.measuring.profile import Protocol
from clustr_core.models.classifiers import LinearClassifier
from clustr_core.models.encoders import build_encoder
from clustr_core.storage.provenance import check_sidecar
from clustr_core.storage.tables import read_table
from tools import given_weights, strangers


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
