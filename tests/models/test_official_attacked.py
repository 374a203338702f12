"""A released model from the shell, in both protocols; and the battery from the shell."""

import pandas as pd
import pytest
import torch
from archives import cifar, served
from torchvision import datasets

from clustr_core.cli import main
from clustr_core.data import to_float
from clustr_core.models.classifiers import ClusterClassifier
from clustr_core.models.clusters import Clusters
from clustr_core.models.encoders import PIXEL_STATISTICS, ResNet18
from clustr_core.models.official import load_official, save_official

PROFILE = """\
shared: {dataset: digits, width: 4, train_examples: 150}
methods:
  ce: {epochs: 1}
  clustr: {warm_start: ce, epochs: 1, per_cluster: 4}
attacks:
  linf: {norm: linf, eps: [8/255], steps: 2, losses: [ce, dlr], examples: 6}
  # reduced
  paper: {attack: paper, eps: [8/255], steps: 2, restarts: 2, examples: 6}
  transfer: {attack: transfer, eps: [8/255], steps: 2, examples: 6}
examination: {eps: 0.1, examples: 4, steps: 2, restarts: 1, queries: 2}
"""


@pytest.fixture(autouse=True)
def home(tiny_book):
    """Every test here works in a book of its own."""
    return tiny_book


@pytest.fixture
def cifar10(home, tmp_path, monkeypatch):
    """A few images in the layout of the original, downloaded from this machine."""
    folder = tmp_path / "server"
    folder.mkdir()
    with served(folder) as url:
        yield cifar(datasets.CIFAR10, "labels", 10, folder, url, monkeypatch)


@pytest.fixture
def official(tmp_path):
    """A narrow network in the released layout."""
    torch.manual_seed(0)
    mean, std = PIXEL_STATISTICS["cifar"]
    encoder = ResNet18(width=2, mean=mean, std=std)
    clusters = Clusters(torch.randn(20, 16), torch.arange(20) // 2, torch.full((20,), 4.0))
    path = tmp_path / "model_best.pth"
    save_official(path, ClusterClassifier(encoder, clusters, neighbours=20).eval(), dataset="cifar10")
    return path


def attack(*arguments):
    return main(["attack", "--profile", "tiny", "--device", "cpu", *arguments])


def test_a_released_file_is_measured_in_both_protocols(official, cifar10, home, capsys):
    assert attack("--official", str(official), "--dataset", "cifar10") == 0
    out = capsys.readouterr().out
    assert "each attack" in out
    assert "both protocols" in out
    (path,) = (home / "runs").glob("official-cifar10-*/attacks-*.csv")
    table = pd.read_csv(path)
    # the transfer needs a run of ours
    assert set(table["attack"]) == {"pgd", "paper"}
    assert table["method"].unique().tolist() == ["model_best"]
    assert table.groupby(["attack", "loss"]).size().tolist() == [6, 6, 6]
    pixels, labels = cifar10["test"]
    first = table.drop_duplicates("index").set_index("index")
    model = load_official(official, dataset="cifar10")
    images = torch.from_numpy(pixels)[list(first.index)]
    assert first["label"].tolist() == labels[list(first.index)].tolist()
    assert first["prediction"].tolist() == model(to_float(images)).argmax(dim=1).tolist()


def test_a_second_time_and_on_more_images_only_what_is_new_is_attacked(official, cifar10, home):
    command = ("--official", str(official), "--dataset", "cifar10")
    assert attack(*command) == 0
    kept = {path: path.stat().st_mtime_ns for path in (home / "runs").rglob("tables/*.csv")}
    assert attack(*command) == 0
    assert {path: path.stat().st_mtime_ns for path in (home / "runs").rglob("tables/*.csv")} == kept
    assert attack(*command, "--examples", "3", "--output", "few.csv") == 0
    assert pd.read_csv(home / "few.csv")["index"].nunique() == 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "--method, --official: expected one of the two"),
        (("--method", "ce", "--official", "x.pth"), "--method, --official: expected one of the two"),
        (("--official", "x.pth"), "--dataset: expected one of cifar10, cifar100, svhn with --official, got none"),
        (("--official", "x.pth", "--dataset", "mnist"), "dataset: expected one of"),
        (("--official", "gone.pth", "--dataset", "cifar10"), "gone.pth"),
        (("--official", "x.pth", "--dataset", "cifar10", "--set", "epochs=1"), "--set: expected none with --official"),
        (("--official", "x.pth", "--dataset", "cifar10", "--examples", "0"), "--examples: expected a positive number"),
        (("--method", "ce", "--examples", "4"), "--examples: expected only with --official"),
        (("--method", "ce", "--dataset", "svhn"), "--dataset: expected only with --official"),
    ],
)
def test_what_a_released_file_cannot_be_asked(arguments, message, capsys):
    assert attack(*arguments) == 2
    assert message in capsys.readouterr().err


def test_a_file_of_another_dataset_is_refused(official, capsys):
    assert attack("--official", str(official), "--dataset", "cifar100") == 2
    assert "cifar100" in capsys.readouterr().err


def test_diagnose(home, capsys):
    assert main(["train", "--profile", "tiny", "--method", "ce", "--device", "cpu"]) == 0
    assert main(["diagnose", "--profile", "tiny", "--method", "clustr", "--device", "cpu"]) == 0
    out = capsys.readouterr().out
    assert "the paper's evaluation (reduced: " in out
    assert ") of clustr " in out
    assert set(pd.read_csv(home / "results/tiny/diagnostics-clustr.csv")["method"]) == {"clustr"}
    assert len(pd.read_csv(home / "results/tiny/ablations-clustr.csv")) == 6
