"""An encoder of one's own trains like ours, and what it lacks is said before anything is trained."""

import importlib
import sys
from unittest.mock import patch

import pytest
import torch
from torch import nn

import clustr_core as cc
from clustr_core.models.encoders import ENCODERS, OWN_VERSIONS, build_encoder
from clustr_core.training.loop import fit
from clustr_core.training.run import load_run

SHAPE = (1, 8, 8)


@pytest.fixture(autouse=True)
def forgotten():
    """What a test registers is forgotten after it."""
    with patch.dict(ENCODERS), patch.dict(OWN_VERSIONS):
        yield


class Flat(nn.Sequential):
    """A dense network that knows the size of its embeddings."""

    def __init__(self, pixels: int, dim: int, said: object = None) -> None:
        super().__init__(nn.Flatten(), nn.Linear(pixels, dim), nn.ReLU(), nn.BatchNorm1d(dim))
        self.embedding_dim = dim if said is None else said


def test_it_trains_and_loads(tmp_path, monkeypatch, digits):
    monkeypatch.setenv("CLUSTR_HOME", str(tmp_path))

    @cc.register_encoder("flat")
    def build(image_shape, width, dataset):
        assert dataset == "digits"
        return Flat(64, width)

    start = cc.CrossEntropy(encoder="flat", width=8, train_examples=150, epochs=1)
    recipe = cc.Clustr(encoder="flat", width=8, train_examples=150, epochs=1, per_cluster=6, warm_start=start)
    run = fit(recipe, dataset=digits, progress=False)
    assert load_run(run.path) == run
    model = run.model()
    assert model.clusters.centroids.shape == (20, 8)
    assert torch.equal(
        model.embed(digits.test_images[:3] / 255.0), load_run(run.path).model().encoder(digits.test_images[:3] / 255.0)
    )


@pytest.mark.parametrize(
    ("build", "complaint"),
    [
        (lambda *given: Flat(64, 5, said=6), r"embeddings of shape \[1, 6\] of one image, got \[1, 5\]"),
        (lambda *given: Flat(64, 5, said="five"), "a positive integer embedding_dim, got 'five'"),
        (lambda *given: nn.Flatten(), "a positive integer embedding_dim, got None"),
        (lambda *given: lambda x: x, "a torch module, got function"),
    ],
)
def test_an_encoder_that_does_not_fit(build, complaint):
    cc.register_encoder("odd")(build)
    with pytest.raises(ValueError, match=f"encoder 'odd': expected {complaint}"):
        build_encoder("odd", SHAPE, width=4)


@pytest.mark.parametrize("name", ["resnet18", "My Net", ""])
def test_names_that_are_refused(name):
    with pytest.raises(ValueError, match="name: expected"):
        cc.register_encoder(name)(Flat)


def test_a_check_leaves_the_network_in_training_mode_and_its_statistics_alone():
    cc.register_encoder("flat")(lambda shape, width, dataset: Flat(64, width))
    encoder = build_encoder("flat", SHAPE, width=4)
    assert encoder.training
    assert int(encoder[3].num_batches_tracked) == 0


def test_another_version_is_another_run(tmp_path, monkeypatch, digits):
    monkeypatch.setenv("CLUSTR_HOME", str(tmp_path))
    cc.register_encoder("flat")(lambda shape, width, dataset: Flat(64, width))
    recipe = cc.CrossEntropy(encoder="flat", width=8, train_examples=150, epochs=1)
    first = fit(recipe, dataset=digits, progress=False)
    cc.register_encoder("flat", version=2)(lambda shape, width, dataset: Flat(64, width))
    second = fit(recipe, dataset=digits, progress=False)
    assert second.path != first.path
    with pytest.raises(ValueError, match="version"):
        load_run(first.path, expected=recipe)
    with pytest.raises(ValueError, match="version: expected an integer above 0, got 0"):
        cc.register_encoder("flat", version=0)


def test_another_text_of_its_module_is_told(tmp_path, monkeypatch, digits, caplog):
    monkeypatch.setenv("CLUSTR_HOME", str(tmp_path))
    monkeypatch.syspath_prepend(str(tmp_path))
    text = (
        "import clustr_core as cc\nfrom torch import nn\n\n\n@cc.register_encoder('of-mine')\n"
        "def build(shape, width, dataset):\n    net = nn.Sequential(nn.Flatten(), nn.Linear(64, width))\n"
        "    net.embedding_dim = width\n    return net\n"
    )
    (tmp_path / "my_encoder.py").write_text(text, encoding="utf-8")
    monkeypatch.delitem(sys.modules, "my_encoder", raising=False)
    importlib.import_module("my_encoder")
    recipe = cc.CrossEntropy(encoder="of-mine", width=8, train_examples=150, epochs=1)
    fit(recipe, dataset=digits, progress=False)
    fit(recipe, dataset=digits, progress=False)
    assert not caplog.text
    (tmp_path / "my_encoder.py").write_text(text + "# edited\n", encoding="utf-8")
    fit(recipe, dataset=digits, progress=False)
    assert "trained by another text of the module my_encoder than the one here" in caplog.text
    assert "raise the version" in caplog.text
