"""What would fail after a training is refused before it; what goes wrong in it is said at once, and nothing is lost."""

import logging
import re
from dataclasses import replace

import pytest
import torch
from disk import contents

from clustr_core.data import Dataset
from clustr_core.models.encoders import SmallCNN
from clustr_core.training import loop, recipes
from clustr_core.training.loop import fit, train_epoch
from clustr_core.training.recipes import METHODS, Clustr, ClustrCert, CrossEntropy
from clustr_core.training.run import load_run

SMALL = {"width": 8, "epochs": 3}


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    """Runs lie in a folder of this test's own."""
    monkeypatch.setenv("CLUSTR_HOME", str(tmp_path))
    return tmp_path


@pytest.fixture
def no_epoch(monkeypatch):
    """Any epoch is an error."""
    monkeypatch.setattr(loop, "train_epoch", lambda *_: pytest.fail("trained before it was checked"))


def some(digits: Dataset, *per_class: int) -> Dataset:
    """Digits with so many training images of each class."""
    kept = torch.cat([(digits.train_labels == c).nonzero()[:n, 0] for c, n in enumerate(per_class)])
    return replace(digits, train_images=digits.train_images[kept], train_labels=digits.train_labels[kept])


def small(kind, **changes):
    """A short recipe of a method."""
    return kind(**SMALL | ({"per_cluster": 4} if kind.cluster_batches else {}) | changes)


@pytest.mark.parametrize("kind", METHODS.values())
def test_too_few_examples_of_a_class_are_refused_by_every_method_before_it_trains(kind, digits, home, no_epoch):
    """Clusters of the finished network's embeddings belong to every run."""
    for counts, said in (((9, 9, 9, 1, *[9] * 6), "class 3 has 1 examples"), ((*[9] * 9, 0), "class 9 has 0 examples")):
        dataset = some(digits, *counts)
        with pytest.raises(ValueError, match=rf"labels: {said}, fewer than per_class=2 clusters \(class '\d'"):
            fit(small(kind), dataset=dataset, progress=False)
    assert contents(home) == {}


@pytest.mark.parametrize("kind", [CrossEntropy, Clustr, ClustrCert])
def test_clusters_of_one_example_each_are_refused(kind, digits, home, no_epoch):
    with pytest.raises(ValueError, match=r"train_examples: expected more than the 20 clusters .* got 20"):
        fit(small(kind), dataset=some(digits, *[2] * 10), progress=False)
    assert contents(home) == {}


def test_one_example_more_than_clusters_is_enough(digits):
    assert len(fit(small(CrossEntropy), dataset=some(digits, 3, *[2] * 9), progress=False).history) == 3


@pytest.mark.parametrize("count", [65, 129])
def test_a_last_batch_of_one_is_refused_where_batch_norm_would_fail(count, digits, home, no_epoch):
    recipe = CrossEntropy(encoder="resnet18", width=8, epochs=1, train_examples=count)
    said = f"batch_size: {count} examples in batches of 64 leave a process with one, which batch norm cannot normalise"
    with pytest.raises(ValueError, match=said):
        fit(recipe, dataset=digits, progress=False)
    assert contents(home) == {}


def test_a_last_batch_of_one_is_welcome_where_nothing_fails(digits):
    assert len(fit(CrossEntropy(width=8, epochs=1, train_examples=65), dataset=digits, progress=False).history) == 1
    # of larger images, batch norm still sees several pixels
    sides = {name: getattr(digits, name).repeat(1, 1, 2, 2) for name in ("train_images", "test_images")}
    recipe = CrossEntropy(encoder="resnet18", width=8, epochs=1, train_examples=33, batch_size=32)
    assert len(fit(recipe, dataset=replace(digits, **sides), progress=False).history) == 1


def test_a_batch_of_a_single_cluster_is_refused(digits, home, no_epoch):
    with pytest.raises(ValueError, match="clusters_per_batch: expected at least 2, of different classes, got 1"):
        fit(small(Clustr, clusters_per_batch=1), dataset=digits, progress=False)
    assert contents(home) == {}


@pytest.mark.parametrize(("asked", "warned"), [(19, False), (20, True)])
def test_more_clusters_a_batch_than_there_can_be_are_said(asked, warned, digits, caplog):
    recipe = Clustr(width=8, epochs=1, per_cluster=4, train_examples=100, clusters_per_batch=asked)
    with caplog.at_level(logging.WARNING):
        fit(recipe, dataset=digits, progress=False)
    expected = ["clusters_per_batch: a batch has 19 (a seed and all of other classes), not 20"] if warned else []
    assert [record.getMessage() for record in caplog.records] == expected


@pytest.fixture
def spoilt(monkeypatch):
    """Training in which the weights are spoilt at the end of an epoch."""

    def spoil(epoch, value):
        def spoiling(recipe, state, *args):
            row = train_epoch(recipe, state, *args)
            if state.epoch == epoch - 1:
                for weight in state.network.parameters():
                    weight.data.fill_(value)
            return row

        monkeypatch.setattr(loop, "train_epoch", spoiling)

    return spoil


@pytest.mark.parametrize("recipe", [CrossEntropy(**SMALL), Clustr(per_cluster=4, **SMALL)], ids=lambda r: r.method)
@pytest.mark.parametrize(("value", "said"), [(0.0, "the training collapsed"), (torch.nan, "the training diverged")])
def test_a_collapse_is_said_in_its_epoch_and_nothing_is_lost(recipe, value, said, digits, home, spoilt, monkeypatch):
    recipe = replace(recipe, train_examples=150)
    spoilt(2, value)
    with pytest.raises(ValueError, match=f"{said}: .* the checkpoint after epoch 1 is kept$") as caught:
        fit(recipe, dataset=digits, folder=home / "run", progress=False)
    assert str(caught.value).startswith(f"{home / 'run'}: epoch 2: ")
    assert "\n" not in str(caught.value)
    # from the checkpoint, an unspoilt training is what it would have been
    monkeypatch.undo()
    monkeypatch.setenv("CLUSTR_HOME", str(home))
    after = fit(recipe, dataset=digits, folder=home / "run", progress=False)
    plain = fit(recipe, dataset=digits, folder=home / "plain", progress=False)
    assert after.weights_sha256 == plain.weights_sha256


def test_a_loss_that_is_not_finite_is_said_in_its_epoch(digits, home, monkeypatch):
    monkeypatch.setitem(recipes.LARGEST, "learning_rate", 1e30)
    recipe = CrossEntropy(optimiser="sgd", learning_rate=1e30, train_examples=150, **SMALL)
    with pytest.raises(ValueError, match=r"epoch 1: the training diverged: .* the checkpoint after epoch 0 is kept"):
        fit(recipe, dataset=digits, folder=home / "run", progress=False)


def test_images_that_are_all_alike_are_refused_at_the_start(digits, home, no_epoch):
    dataset = replace(digits, train_images=torch.full_like(digits.train_images, 7))
    with pytest.raises(ValueError, match="epoch 0: the training collapsed: all embeddings are equal"):
        fit(CrossEntropy(**SMALL), dataset=dataset, folder=home / "run", progress=False)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32])
def test_labels_of_any_integer_dtype_train_to_the_end(dtype, digits, home):
    cast = {name: getattr(digits, name).to(dtype) for name in ("train_labels", "test_labels")}
    recipe = CrossEntropy(train_examples=150, **SMALL)
    run = fit(recipe, dataset=replace(digits, **cast), folder=home / "cast", progress=False)
    assert run.train_data_sha256 == fit(recipe, dataset=digits, folder=home / "plain", progress=False).train_data_sha256


# other data


@pytest.fixture
def other(digits) -> Dataset:
    """Data of the same name in which one label differs."""
    labels = digits.train_labels.clone()
    labels[0] = (labels[0] + 1) % 10
    return replace(digits, train_labels=labels)


def refused(run, trained_on, dataset):
    return (
        f"{re.escape(str(run))} was trained on other data named 'digits' "
        rf"\({trained_on.train_digest[:10]}\) than those given \({dataset.train_digest[:10]}\); give folder= or move"
    )


def test_a_finished_run_of_other_data_is_not_returned(digits, other, home, no_epoch, monkeypatch):
    recipe, folder = CrossEntropy(**SMALL), home / "run"
    with monkeypatch.context() as patch:
        patch.setattr(loop, "train_epoch", train_epoch)
        fit(recipe, dataset=digits, folder=folder, progress=False)
    with pytest.raises(ValueError, match=refused(folder, digits, other)):
        fit(recipe, dataset=other, folder=folder, progress=False)
    with pytest.raises(ValueError, match=refused(folder, digits, other)):
        load_run(folder).check_data(other)


def test_a_checkpoint_of_other_data_is_refused_before_any_work(digits, home, monkeypatch):
    recipe, folder = Clustr(per_cluster=4, train_examples=150, **SMALL), home / "run"
    fit(recipe, dataset=digits, folder=folder, progress=False)
    (folder / "run.json").unlink()
    monkeypatch.setattr(loop, "new_state", lambda *_: pytest.fail("worked before it was checked"))
    with pytest.raises(ValueError, match=r"run was trained on other data named 'digits' \(\w{10}\) than those given"):
        fit(recipe, dataset=replace(digits, train_images=255 - digits.train_images), folder=folder, progress=False)


def test_a_run_of_another_version_is_refused(digits, home, monkeypatch):
    recipe, folder = CrossEntropy(train_examples=150, **SMALL), home / "run"
    fit(recipe, dataset=digits, folder=folder, progress=False)
    monkeypatch.setattr("clustr_core.training.recipes.TRAINING_VERSION", 99)
    for name in ("run.json", "checkpoint.safetensors"):
        with pytest.raises(ValueError, match=rf"{name}: expected version 99 of the training, got 1; move it away"):
            fit(recipe, dataset=digits, folder=folder, progress=False)
        (folder / "run.json").unlink(missing_ok=True)


def test_weights_that_are_not_those_of_the_run_are_refused(digits, home):
    recipe = CrossEntropy(train_examples=150, **SMALL)
    run = fit(recipe, dataset=digits, folder=home / "run", progress=False)
    second = fit(replace(recipe, seed=5), dataset=digits, folder=home / "other", progress=False)
    (run.path / "model.safetensors").write_bytes((second.path / "model.safetensors").read_bytes())
    with pytest.raises(
        ValueError, match=r"model\.safetensors: expected the file of sha256 \w{10}, as run\.json says, got"
    ):
        load_run(run.path).model()


@pytest.mark.parametrize(
    ("recipe", "asked", "said"),
    [
        (
            CrossEntropy(epochs=2, width=4, train_examples=200, batch_size=100),
            40,
            "batch_size: batches of 100 images do not fit into the memory of cpu; about 25 images fit",
        ),
        (
            Clustr(epochs=2, width=4, train_examples=200, clusters_per_batch=5, per_cluster=8),
            20,
            "clusters_per_batch, per_cluster: batches of 40 images do not fit .*; about 20 images fit",
        ),
        (
            CrossEntropy(epochs=2, width=4, train_examples=200, batch_size=50),
            0,
            "batch_size: .*; not even two images fit: take a smaller width",
        ),
    ],
    ids=["plain", "clusters", "none"],
)
def test_what_does_not_fit_into_memory_says_what_does(recipe, asked, said, digits, tmp_path, monkeypatch):
    real = SmallCNN.forward

    def limited(self, images):
        if self.training and len(images) > asked:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return real(self, images)

    monkeypatch.setattr(SmallCNN, "forward", limited)
    with pytest.raises(ValueError, match=rf"epoch 1: {said}.*; the checkpoint after epoch 0 is kept"):
        fit(recipe, dataset=digits, folder=tmp_path / "run", progress=False)
    assert (tmp_path / "run/checkpoint.safetensors").exists()


def test_losses_that_a_sampler_refuses_say_that_the_training_diverged(digits, tmp_path, monkeypatch):
    monkeypatch.setitem(recipes.LARGEST, "learning_rate", 1e30)
    recipe = Clustr(epochs=2, width=4, train_examples=200, per_cluster=4, optimiser="sgd", learning_rate=1e30)
    with pytest.raises(ValueError, match=r"epoch 1: the training diverged: .*; try a smaller learning_rate; the check"):
        fit(recipe, dataset=digits, folder=tmp_path / "run", progress=False)
