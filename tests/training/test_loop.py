"""Training: resume is exact, what is on disk is whole, and neither the test set nor an attack leaves a trace."""

import copy
import errno
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from contextlib import nullcontext
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from disk import contents, files_of_at_most
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.utils import parametrize

from clustr_core import data
from clustr_core.attacks.losses import cross_entropy
from clustr_core.measuring.certified import certificate_table
from clustr_core.measuring.written import made_of
from clustr_core.models import encoders
from clustr_core.models.classifiers import ClusterClassifier, LinearClassifier, cluster_logits
from clustr_core.models.clusters import Clusters, fit_clusters
from clustr_core.models.embed import embed_all, evaluating
from clustr_core.models.encoders import build_encoder
from clustr_core.storage.files import alone, read_json, write_json
from clustr_core.storage.tensors import read_tensors, write_tensors
from clustr_core.training import loop
from clustr_core.training.loop import fit, train_epoch
from clustr_core.training.losses import certificate_loss, full_magnet_loss, magnet_loss, margin_cross_entropy
from clustr_core.training.names import CHECKPOINT, DONE, HISTORY, WEIGHTS
from clustr_core.training.objectives import objective
from clustr_core.training.recipes import (
    METHODS,
    AdversarialTraining,
    Clustr,
    ClustrCert,
    ClustrLip,
    ClustrQTrades,
    CrossEntropy,
    FastAdversarialTraining,
    FreeAdversarialTraining,
    FreeClustr,
    LipschitzMargin,
    Smoothing,
    Trades,
    recipe_to_dict,
    run_folder,
)
from clustr_core.training.refresh import clusters_and_sampler
from clustr_core.training.run import SNAPSHOT, load_run, new_network, prefixed, training_digest, training_part
from clustr_core.training.sampling import ShuffledBatches
from clustr_core.training.state import epochs_kept, new_state
from clustr_core.training.step import Step, learning_rate

SMALL = {"width": 4, "train_examples": 150}
START = CrossEntropy(epochs=1, **SMALL)
# the convolutions of PyTorch 2.14 for CPUs corrupt memory on some processors where channels are few and odd: 8 do not
RESNET = {"encoder": "resnet18", "width": 8, "train_examples": 120}
LIPSCHITZ = {"encoder": "lip-mlp", "width": 8, "train_examples": 150}
CONVOLUTIONAL = {"encoder": "lip-cnn", "width": 16, "train_examples": 120}
RECIPES = {
    "ce, sgd, crop, milestones": CrossEntropy(
        epochs=4, optimiser="sgd", learning_rate=0.05, weight_decay=1e-3, milestones=(1, 3), augmentation="crop",
        **SMALL,
    ),
    "pgd-at, adam": AdversarialTraining(epochs=3, eps=0.1, step_size=0.05, steps=2, snapshots=(1, 3), **SMALL),
    "clustr, warm start": Clustr(
        epochs=4, per_cluster=4, milestones=(2,), warm_start=START, snapshots=(0, 2, 4), kmeans_starts=2, **SMALL
    ),
    "qtrades, batch norm, crop and flip": ClustrQTrades(
        epochs=3, per_cluster=4, eps=0.1, step_size=0.1, augmentation="crop-flip", weight_decay=1e-4, **RESNET
    ),
    "trades, sgd": Trades(
        epochs=3, optimiser="sgd", learning_rate=0.02, eps=0.1, step_size=0.05, steps=2, milestones=(1,), **SMALL
    ),
    # 150 examples in batches of 64: the last one has 22
    "free-at, adam, crop": FreeAdversarialTraining(
        epochs=3, eps=0.1, step_size=0.04, replays=3, augmentation="crop", snapshots=(2,), **SMALL
    ),
    "fast-at, adam": FastAdversarialTraining(epochs=3, eps=0.1, step_size=0.125, **SMALL),
    "free-clustr, warm start": FreeClustr(
        epochs=3, per_cluster=4, eps=0.1, step_size=0.06, replays=2, warm_start=START, milestones=(2,), **SMALL
    ),
    "clustr-lip, triangle": ClustrLip(epochs=3, per_cluster=4, schedule="triangle", snapshots=(0, 3), **LIPSCHITZ),
    "clustr-cert, triangle, crop of one pixel": ClustrCert(
        epochs=3, schedule="triangle", learning_rate=0.01, augmentation="crop", crop_padding=1, snapshots=(0, 2, 3),
        **LIPSCHITZ,
    ),
    "clustr-cert, convolutions, sgd, decay": ClustrCert(
        epochs=3, optimiser="sgd", weight_decay=1e-3, per_class=1, **CONVOLUTIONAL
    ),
    "lip-linear, triangle": LipschitzMargin(
        epochs=3, schedule="triangle", learning_rate=0.01, snapshots=(1,), **LIPSCHITZ
    ),
    "lip-linear, convolutions": LipschitzMargin(epochs=3, milestones=(2,), **CONVOLUTIONAL),
    "smoothing, batch norm": Smoothing(epochs=3, noise=0.3, **RESNET),
}  # fmt: skip
STEADY = ("model.safetensors", "history.csv", "checkpoint.safetensors")
CE = CrossEntropy(epochs=2, **SMALL)
OTHER_DATA = r"run was trained on other data named 'digits' \(\w{10}\) than those given \(\w{10}\); give folder="


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    """Runs lie in a folder of this test's own."""
    monkeypatch.setenv("CLUSTR_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture
def train(digits):
    """`fit` on digits, without a bar."""

    def run(recipe, **options):
        return fit(recipe, **({"dataset": digits, "progress": False} | options))

    return run


@pytest.fixture
def kept(trained, home):
    """A trained run that a test may change, in the folder "run" of its own home."""

    def copied(recipe):
        return load_run(shutil.copytree(trained(recipe).path, home / "run"))

    return copied


@pytest.fixture
def killed(monkeypatch, train):
    """Train, and be killed during an epoch: what it did is lost."""

    def run(recipe, during, **options):
        real, done = train_epoch, []

        def epoch(current, *args):
            row = real(current, *args)
            if current == recipe:
                done.append(row)
            if len(done) == during:
                raise KeyboardInterrupt
            return row

        with monkeypatch.context() as patch:
            patch.setattr(loop, "train_epoch", epoch)
            with pytest.raises(KeyboardInterrupt):
                train(recipe, **options)

    return run


@pytest.fixture
def no_training(monkeypatch):
    """Any epoch from here on is an error."""

    def forbidden(*args):
        raise AssertionError("trained again")

    monkeypatch.setattr(loop, "train_epoch", forbidden)


def test_every_method_is_among_the_recipes():
    assert {recipe.method for recipe in RECIPES.values()} == set(METHODS)


def results(run):
    """The bytes of everything that a resume must not change."""
    found = contents(run.path)
    return {name: found[name] for name in found if name in STEADY or name.startswith("snapshots")}


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES.keys())
def test_resume_equals_uninterrupted_bit_for_bit(recipe, train, killed, home, monkeypatch, caplog, trained):
    torch.manual_seed(1)
    whole = trained(recipe)
    monkeypatch.setenv("CLUSTR_HOME", str(home / "again"))
    torch.manual_seed(2)
    caplog.set_level(logging.INFO)
    killed(recipe, during=1)
    killed(recipe, during=2)
    killed(recipe, during=1)
    resumed = train(recipe)
    assert [r.getMessage().rsplit(":", 1)[1] for r in caplog.records] == [
        f" going on after epoch {n}" for n in (0, 1, 1)
    ]
    assert resumed.path != whole.path
    assert results(resumed) == results(whole)
    assert len(results(whole)) == 3 + len(recipe.snapshots)


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES.keys())
def test_a_fresh_run_is_the_same_whatever_the_global_random_state(recipe, train, home, monkeypatch, trained):
    found = []
    for number, fresh in enumerate((train, trained)):
        torch.manual_seed(number)
        np.random.seed(number)  # noqa: NPY002
        found.append(results(fresh(recipe)))
    assert found[0] == found[1]


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES.keys())
def test_bfloat16_is_for_passes_through_the_network_only(recipe, train):
    recipe = replace(recipe, warm_start=None, epochs=1, milestones=(), snapshots=())
    plain, mixed = train(recipe), train(replace(recipe, precision="bf16-mixed"))
    assert plain.path != mixed.path
    tensors = load_file(mixed.path / "model.safetensors")
    assert {t.dtype for t in tensors.values() if t.is_floating_point()} == {torch.float32}
    assert mixed.history["loss"].tolist() != plain.history["loss"].tolist()
    # eight bits of a number are left, of which a loss is made
    assert mixed.history["loss"].tolist() == pytest.approx(plain.history["loss"].tolist(), rel=0.1)
    if recipe.clustered and not isinstance(recipe, ClustrCert):
        # the clusters are found in float32, of embeddings that passed in bfloat16
        assert mixed.history["variance"].tolist() != plain.history["variance"].tolist()
        assert mixed.history["variance"].tolist() == pytest.approx(plain.history["variance"].tolist(), rel=0.05)


def test_training_in_bfloat16_goes_down_as_in_float32(train):
    # weights that were rounded once and kept so would leave the loss where it was
    recipe = CrossEntropy(epochs=6, width=4, train_examples=400, learning_rate=5e-3)
    runs = [train(replace(recipe, precision=precision)) for precision in ("32-true", "bf16-mixed")]
    plain, mixed = (run.history["loss"].to_numpy() for run in runs)
    assert plain[-1] < 0.5 * plain[0]
    assert mixed == pytest.approx(plain, rel=0.1)


def test_another_seed_is_another_run(trained):
    runs = [trained(replace(CE, seed=seed)) for seed in (1, 2)]
    assert results(runs[0])["model.safetensors"] != results(runs[1])["model.safetensors"]


SCRIPT = """
import json, sys, torch
from pathlib import Path
torch.set_num_threads(1)
from clustr_core.training.loop import fit
from clustr_core.training.recipes import recipe_from_dict
fit(recipe_from_dict(json.loads(sys.argv[2])), folder=Path(sys.argv[1]), device="cpu", progress=False)
"""


def epochs_done(checkpoint):
    return read_tensors(checkpoint, "a checkpoint")[1]["epoch"]


@pytest.mark.parametrize(
    "recipe",
    [FreeAdversarialTraining(epochs=15, eps=0.1, step_size=0.04, replays=2, **SMALL)],
    ids=lambda recipe: recipe.method,
)
def test_a_killed_process_goes_on_where_it_was(recipe, train, home, trained):
    folder, content = home / "killed", json.dumps(recipe_to_dict(recipe))
    command = [sys.executable, "-c", SCRIPT, str(folder), content]
    process = subprocess.Popen(command, env=os.environ | {"OMP_NUM_THREADS": "1"})
    try:
        while not (folder / "checkpoint.safetensors").exists() or epochs_done(folder / "checkpoint.safetensors") < 2:
            assert process.poll() is None
            time.sleep(0.005)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert not (folder / "run.json").exists()
    assert results(train(recipe, folder=folder)) == results(trained(recipe))


def test_a_finished_run_is_loaded_and_not_trained_again(train, no_training_after):
    recipe = RECIPES["clustr, warm start"]
    first = train(recipe)
    before = {path: path.stat().st_mtime_ns for path in first.path.parent.rglob("*")}
    no_training_after()
    assert train(recipe, dataset=None) == first
    assert load_run(first.path) == first
    assert {path: path.stat().st_mtime_ns for path in first.path.parent.rglob("*")} == before


@pytest.fixture
def no_training_after(request):
    """Forbid training from the moment this is called."""
    return lambda: request.getfixturevalue("no_training")


def test_a_run_killed_while_it_was_written_is_finished_without_training(train, monkeypatch, no_training_after):
    def interrupt(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(loop, "write_json", interrupt)
        with pytest.raises(KeyboardInterrupt):
            train(CE)
    assert not (run_folder(CE) / "run.json").exists()
    no_training_after()
    assert len(train(CE).history) == 2


def test_two_processes_that_finish_one_run_at_once_leave_that_of_the_first(train, monkeypatch):
    """Where a file system knows no locks: the other one finishes while this one asks what machine it is on."""
    environment, finished = loop.environment, {}
    monkeypatch.setattr(loop, "alone", lambda folder: nullcontext())

    def meanwhile(device):
        monkeypatch.setattr(loop, "environment", environment)
        finished.update(contents(train(CE).path))
        return environment(device) | {"machine": "another"}

    monkeypatch.setattr(loop, "environment", meanwhile)
    run = train(CE)
    assert finished
    assert contents(run.path) == finished


def test_what_a_run_knows(train, digits):
    recipe = RECIPES["clustr, warm start"]
    run = train(recipe)
    assert run.recipe == recipe
    assert run.path == run_folder(recipe)
    assert (run.num_classes, run.image_shape) == (10, (1, 8, 8))
    history = run.history
    assert list(history) == ["epoch", "loss", "learning_rate", "magnet", "variance", "coverage"]
    assert history["epoch"].tolist() == [1, 2, 3, 4]
    assert history["learning_rate"].tolist() == pytest.approx([1e-3, 1e-3, 1e-4, 1e-4])
    assert (history["loss"] == history["magnet"]).all()
    assert ((history["coverage"] > 0) & (history["coverage"] <= 1)).all()
    content = read_json(run.path / "run.json")
    assert content["train_data_sha256"] == training_digest(recipe, digits) == run.train_data_sha256
    assert content["device"] == "cpu"
    assert {"torch", "scikit-learn"} <= set(content["versions"])


def test_milestones_divide_the_learning_rate_by_ten(trained):
    rates = trained(RECIPES["ce, sgd, crop, milestones"]).history["learning_rate"].tolist()
    assert rates == pytest.approx([0.05, 0.005, 0.005, 0.0005])


@pytest.mark.parametrize("milestones", [(), (3,), (1, 4), (4, 1), (2, 2), (0,), (0, 6), (6,)])
def test_steps_are_those_of_torchs_scheduler(milestones):
    recipe = CrossEntropy(epochs=6, learning_rate=0.3, milestones=milestones)
    optimiser = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.3)
    scheduler = torch.optim.lr_scheduler.MultiStepLR(optimiser, list(milestones), gamma=0.1)
    for epoch in range(6):
        (theirs,) = scheduler.get_last_lr()
        # the same at every batch of an epoch
        for within in (0.0, 0.01, 0.5, 0.999):
            assert learning_rate(recipe, epoch + within) == pytest.approx(theirs, rel=1e-12)
        optimiser.step()
        scheduler.step()


def test_the_triangle_rises_holds_and_falls():
    recipe = CrossEntropy(epochs=30, learning_rate=0.5, schedule="triangle")
    shape = {0: 0, 2.5: 0.5, 5: 1, 8: 1, 12: 1, 16.5: 0.75, 21: 0.5, 29.1: 0.05, 30: 0}
    assert [learning_rate(recipe, t) for t in shape] == pytest.approx([0.5 * share for share in shape.values()])
    rates = [learning_rate(recipe, t / 100) for t in range(3001)]
    assert max(rates) == 0.5
    # no jump anywhere
    assert max(abs(a - b) for a, b in pairwise(rates)) < 0.5 * 0.0021
    # in shares of the training, however long it is
    assert learning_rate(replace(recipe, epochs=3), 0.25) == pytest.approx(0.25)


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES.keys())
def test_every_step_is_taken_at_the_rate_of_its_time(recipe, train, monkeypatch):
    """The middle of its share of the epoch; all replays of a batch at one."""
    rates = []
    for kind in (torch.optim.Adam, torch.optim.SGD):
        real = kind.step

        def step(self, *args, real=real, **options):
            rates.append({group["lr"] for group in self.param_groups})
            return real(self, *args, **options)

        monkeypatch.setattr(kind, "step", step)
    run = train(replace(recipe, warm_start=None))
    replays = getattr(recipe, "replays", 1)
    assert len(rates) % (recipe.epochs * replays) == 0
    batches = len(rates) // recipe.epochs // replays
    times = [e + (n + 0.5) / batches for e in range(recipe.epochs) for n in range(batches) for _ in range(replays)]
    assert rates == [{learning_rate(recipe, time)} for time in times]
    assert batches > 1
    middle = [learning_rate(recipe, epoch + 0.5) for epoch in range(recipe.epochs)]
    assert run.history["learning_rate"].tolist() == pytest.approx(middle, rel=1e-8)
    assert (len({*map(tuple, rates)}) > recipe.epochs) == (recipe.schedule == "triangle")


def test_models_of_a_run(digits, trained):
    linear, clustered = trained(CE), trained(RECIPES["clustr, warm start"])
    images = data.to_float(digits.test_images[:20])
    for run, kind in ((linear, LinearClassifier), (clustered, ClusterClassifier)):
        model = run.model()
        assert isinstance(model, kind)
        assert not any(part.training for part in model.modules())
        assert model(images).shape == (20, 10)
        nearest, soft = run.cluster_model(rule="nearest"), run.cluster_model()
        assert (nearest.rule, nearest.neighbours, soft.rule, soft.neighbours) == ("nearest", None, "soft", 20)
        torch.testing.assert_close(soft.embed(images), model.embed(images))
    images, labels = training_part(clustered.recipe, digits)
    embeddings = embed_all(clustered.model().encoder, images)
    expected, _ = fit_clusters(embeddings, labels, per_class=2, n_init=2, seed=111)
    torch.testing.assert_close(clustered.cluster_model().centroids, expected.centroids)
    assert clustered.cluster_model().clusters.shared_variance == pytest.approx(expected.shared_variance)


CERTIFYING = {name: recipe for name, recipe in RECIPES.items() if recipe.guarantee == "lipschitz"}


@pytest.mark.parametrize("recipe", CERTIFYING.values(), ids=CERTIFYING.keys())
def test_models_of_a_run_that_certifies(recipe, digits, trained):
    """Weights are computed once and for all, and are the ones that were trained; clusters decide by the nearest."""
    run, images = trained(recipe), data.to_float(digits.test_images[:20])
    trained = new_network(recipe, run.image_shape, 10)
    trained.load_state_dict(prefixed(load_file(run.path / "model.safetensors"), "network."))
    assert any(parametrize.is_parametrized(part) for part in trained.modules())
    models = [run.model(), run.cluster_model(), run.cluster_model(rule="nearest")]
    rules = [model.rule for model in models if isinstance(model, ClusterClassifier)]
    if recipe.clustered:
        assert rules == ["nearest"] * 3
        assert models[0].neighbours is None
        # nothing of an evaluated model is learnable but its encoder
        assert not any(name.startswith("centroids") for name, _ in models[0].named_parameters())
    else:
        assert rules == ["soft", "nearest"]
        assert isinstance(models[0], LinearClassifier)
        torch.testing.assert_close(models[0](images), trained(images))
        # orthonormal rows, or columns where the embedding has fewer dimensions than there are classes
        weight = models[0].linear.weight
        few = weight if len(weight) <= weight.shape[1] else weight.T
        torch.testing.assert_close(few @ few.T, torch.eye(len(few)), rtol=0, atol=1e-5)
    for encoder in (*(model.encoder for model in models), *(run.encoder_at(n) for n in recipe.snapshots)):
        assert not any(parametrize.is_parametrized(part) for part in encoder.modules())
        assert not any(part.training for part in encoder.modules())
    for model in models:
        torch.testing.assert_close(model.embed(images), trained.embed(images), rtol=1e-5, atol=1e-6)


def learnt(run):
    """The clusters and the rest of what a run of `ClustrCert` left."""
    tensors = load_file(run.path / "model.safetensors")
    return run.cluster_model().clusters, tensors


@pytest.mark.parametrize("name", ["clustr-cert, triangle, crop of one pixel", "clustr-cert, convolutions, sgd, decay"])
def test_learnable_centroids_start_at_the_k_means_and_move(name, digits, trained):
    recipe = replace(RECIPES[name], snapshots=(0, 3))
    images, labels = training_part(recipe, digits)
    state = new_state(recipe, digits, images, labels, None)
    embeddings = embed_all(state.network.encoder, images)
    expected, _ = fit_clusters(embeddings, labels, per_class=recipe.per_class, seed=recipe.seed)
    assert isinstance(state.network.centroids, nn.Parameter)
    assert torch.equal(state.network.centroids, expected.centroids)
    assert torch.equal(state.network.labels, expected.labels)
    assert any(p is state.network.centroids for group in state.optimiser.param_groups for p in group["params"])
    run = trained(recipe)
    clusters, tensors = learnt(run)
    start = load_file(run.path / "snapshots/epoch-0000.safetensors")
    assert torch.equal(start["centroids"], expected.centroids)
    moved = (clusters.centroids - expected.centroids).norm(dim=1)
    assert (moved > 1e-4).all()
    # the saved clusters are the learnt ones, not a k-means of the final embeddings
    assert torch.equal(clusters.centroids, tensors["network.centroids"])
    assert torch.equal(clusters.centroids, tensors["clusters.centroids"])
    assert torch.equal(clusters.labels, expected.labels)
    final = embed_all(run.model().encoder, images)
    again, _ = fit_clusters(final, labels, per_class=recipe.per_class, seed=recipe.seed)
    assert (clusters.centroids - again.centroids).norm(dim=1).max() > 1e-3


def test_the_variance_of_learnt_centroids_is_that_of_the_examples_around_them(digits, trained):
    run = trained(RECIPES["clustr-cert, triangle, crop of one pixel"])
    clusters, _ = learnt(run)
    images, labels = training_part(run.recipe, digits)
    embeddings = embed_all(run.model().encoder, images).double()
    rows = zip(embeddings.tolist(), labels.tolist(), strict=True)
    centroids = [(c, mu) for c, mu in zip(clusters.labels.tolist(), clusters.centroids.tolist(), strict=True)]
    total = sum(
        min(sum((a - b) ** 2 for a, b in zip(z, mu, strict=True)) for c, mu in centroids if c == y) for z, y in rows
    )
    assert clusters.shared_variance == pytest.approx(total / 149, rel=1e-5)


def test_only_the_cluster_losses_have_clusters_in_their_history(trained):
    plain = ["epoch", "loss", "learning_rate"]
    for name in ("clustr-cert, triangle, crop of one pixel", "lip-linear, triangle", "smoothing, batch norm"):
        assert list(trained(RECIPES[name]).history) == plain
    assert list(trained(RECIPES["clustr-lip, triangle"]).history) == [*plain, "magnet", "variance", "coverage"]


def test_a_run_that_certifies_may_start_from_one_of_its_own_kind(train):
    start = replace(RECIPES["clustr-cert, triangle, crop of one pixel"], snapshots=())
    recipe = replace(start, epochs=1, learning_rate=0.05, snapshots=(0,), warm_start=start)
    run = train(recipe)
    before = load_file(run_folder(start) / "model.safetensors")
    first = load_file(run.path / "snapshots/epoch-0000.safetensors")
    for name, tensor in first.items():
        assert torch.equal(tensor, before[f"network.{name}"])
    assert not torch.equal(learnt(run)[0].centroids, before["network.centroids"])


@pytest.mark.parametrize("padding", [1, 3])
def test_crops_are_padded_as_the_recipe_says(padding, train, monkeypatch):
    seen, real = [], data.random_crop_flip
    monkeypatch.setattr(
        data, "random_crop_flip", lambda *a, **o: seen.append((o["padding"], o["flip"])) or real(*a, **o)
    )
    train(CrossEntropy(epochs=1, augmentation="crop-flip", crop_padding=padding, **SMALL))
    assert set(seen) == {(padding, True)}


def test_snapshots_are_the_weights_after_their_epochs(trained):
    recipe = replace(CE, snapshots=(0, 1, 2))
    run = trained(recipe)
    start, middle, end = (run.encoder_at(epoch).state_dict() for epoch in (0, 1, 2))
    torch.manual_seed(recipe.seed)
    fresh = build_encoder("small-cnn", (1, 8, 8), width=4).state_dict()
    one = trained(replace(CE, epochs=1)).model().encoder.state_dict()
    final = run.model().encoder.state_dict()
    for name in fresh:
        assert torch.equal(start[name], fresh[name])
        assert torch.equal(middle[name], one[name])
        assert torch.equal(end[name], final[name])
        assert not torch.equal(start[name], end[name])
    with pytest.raises(ValueError, match=r"epoch: expected one of the snapshots \(0, 1, 2\), got 3"):
        run.encoder_at(3)


def test_the_snapshot_of_another_training_of_the_recipe_is_refused(home, digits):
    """As after a copy that was cut short: another number of threads leads to other weights."""
    recipe = replace(CE, snapshots=(0, 1))
    stops = Mock(side_effect=[None, KeyboardInterrupt])
    with pytest.raises(KeyboardInterrupt):
        fit(recipe, dataset=digits, folder=home / "run", before_epoch=stops, progress=False)
    run = fit(recipe, dataset=digits, folder=home / "run", progress=False)
    run.encoder_at(0)
    path = run.path / "snapshots/epoch-0001.safetensors"
    tensors, said = read_tensors(path, SNAPSHOT)
    write_tensors(path, SNAPSHOT, {name: 2 * each for name, each in tensors.items()}, said)
    with pytest.raises(ValueError, match="snapshot of epoch 1 of this run, got that of epoch 1 of another training"):
        run.encoder_at(1)
    said = json.loads((run.path / "run.json").read_text(encoding="utf-8"))
    assert set(said.pop("snapshots")) == {"0", "1"}
    del said["sha256"]
    for odd in ([1], {"one": "x"}, {"1": 2}):
        write_json(run.path / "run.json", {**said, "snapshots": odd})
        with pytest.raises(ValueError, match="expected in snapshots a digest of each, got"):
            load_run(run.path)


def test_a_warm_start_begins_with_the_weights_of_that_run(train):
    recipe = Clustr(epochs=1, per_cluster=4, warm_start=START, snapshots=(0,), **SMALL)
    run = train(recipe)
    start = load_run(run_folder(START)).model().encoder.state_dict()
    scratch = train(replace(recipe, warm_start=None)).encoder_at(0).state_dict()
    for name, tensor in run.encoder_at(0).state_dict().items():
        assert torch.equal(tensor, start[name])
        assert not torch.equal(tensor, scratch[name])


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES.keys())
def test_the_test_set_is_never_touched(recipe, train, digits, home, monkeypatch, trained):
    plain = trained(recipe)
    monkeypatch.setenv("CLUSTR_HOME", str(home / "poisoned"))
    poison = replace(digits, test_images=255 - digits.test_images[:7], test_labels=torch.zeros(7, dtype=torch.int64))
    assert results(train(recipe, dataset=poison)) == results(plain)
    monkeypatch.setenv("CLUSTR_HOME", str(home / "none"))
    nothing = replace(digits, test_images=digits.test_images[:0], test_labels=digits.test_labels[:0])
    assert results(train(recipe, dataset=nothing)) == results(plain)


def test_examples_that_were_not_chosen_are_never_touched(train, digits, home, monkeypatch):
    plain, chosen = train(CE), digits.training_indices(CE.train_examples, CE.seed)
    monkeypatch.setenv("CLUSTR_HOME", str(home / "poisoned"))
    images = torch.zeros_like(digits.train_images)
    images[chosen] = digits.train_images[chosen]
    assert results(train(CE, dataset=replace(digits, train_images=images))) == results(plain)
    images[chosen[0]] = 255 - images[chosen[0]]
    monkeypatch.setenv("CLUSTR_HOME", str(home / "changed"))
    changed = train(CE, dataset=replace(digits, train_images=images))
    assert results(changed)["model.safetensors"] != results(plain)["model.safetensors"]


def test_of_sorted_images_every_class_is_chosen(digits, home):
    order = digits.train_labels.argsort(stable=True)
    dataset = replace(digits, train_images=digits.train_images[order], train_labels=digits.train_labels[order])
    run = fit(CE, dataset=dataset, progress=False)
    assert torch.bincount(training_part(CE, dataset)[1], minlength=10).min() >= 14
    assert read_json(run.path / "run.json")["train_examples"] == 150


@pytest.mark.parametrize(
    ("recipe", "forwards"),
    [
        (CrossEntropy(epochs=2, batch_size=50, **RESNET), 3),
        (AdversarialTraining(epochs=2, batch_size=50, eps=0.1, step_size=0.05, steps=3, **RESNET), 3),
        (Clustr(epochs=2, per_cluster=4, **RESNET), 3),
        (ClustrQTrades(epochs=2, per_cluster=4, **RESNET), 6),
        # the clean images and the moved ones
        (Trades(epochs=2, batch_size=50, eps=0.1, step_size=0.05, steps=2, **RESNET), 6),
        (FreeAdversarialTraining(epochs=2, batch_size=50, replays=4, **RESNET), 12),
        (FastAdversarialTraining(epochs=2, batch_size=50, **RESNET), 3),
        (FreeClustr(epochs=2, per_cluster=4, replays=2, **RESNET), 6),
        (Smoothing(epochs=2, batch_size=50, **RESNET), 3),
    ],
    ids=lambda value: getattr(value, "method", None),
)
def test_batch_norm_sees_the_training_batches_and_nothing_else(recipe, forwards, trained):
    state = trained(recipe).model().encoder.state_dict()
    counts = [int(tensor) for name, tensor in state.items() if name.endswith("num_batches_tracked")]
    assert counts == [2 * forwards] * len(counts)
    assert len(counts) == 20


# each method learns

LEARNING = {"width": 8, "train_examples": 500, "learning_rate": 5e-3}


@pytest.mark.parametrize(
    "recipe",
    [
        CrossEntropy(epochs=6, **LEARNING),
        AdversarialTraining(epochs=6, eps=0.05, step_size=0.03, steps=2, **LEARNING),
        Clustr(epochs=8, per_cluster=6, **LEARNING),
        ClustrQTrades(epochs=8, per_cluster=6, eps=0.05, step_size=0.06, **LEARNING),
        Trades(epochs=6, eps=0.05, step_size=0.03, steps=2, **LEARNING),
        FreeAdversarialTraining(epochs=3, eps=0.05, step_size=0.05, replays=3, **LEARNING),
        FastAdversarialTraining(epochs=6, eps=0.05, step_size=0.06, **LEARNING),
        FreeClustr(epochs=6, per_cluster=6, eps=0.05, step_size=0.05, replays=3, **LEARNING),
        ClustrLip(epochs=8, per_cluster=6, schedule="triangle", **LEARNING | {"width": 16}),
        ClustrCert(epochs=8, schedule="triangle", **LEARNING | {"width": 16, "learning_rate": 0.02}),
        LipschitzMargin(epochs=8, schedule="triangle", **LEARNING | {"width": 16, "learning_rate": 0.02}),
        Smoothing(epochs=6, **LEARNING),
    ],
    ids=lambda recipe: recipe.method,
)
def test_every_method_learns(recipe, train, digits):
    run = train(recipe)
    with torch.no_grad():
        predicted = run.model()(data.to_float(digits.test_images)).argmax(dim=1)
    assert (predicted == digits.test_labels).float().mean() > 0.75
    history = run.history
    assert history["loss"].iloc[-1] < 0.95 * history["loss"].iloc[0]


# objectives, one batch at a time


@pytest.fixture(params=["small-cnn", "resnet18"])
def step(request, digits):
    """A batch of four clusters in double precision, on a network in training mode."""
    images, labels = digits.train_images[:200], digits.train_labels[:200]
    torch.manual_seed(0)
    encoder = build_encoder(request.param, (1, 8, 8), width=2)
    network = LinearClassifier(encoder, encoder.embedding_dim, 10).double()
    clusters, assignments = fit_clusters(embed_all_double(encoder, images), labels, per_class=2)
    chosen = torch.cat([(assignments == c).nonzero()[:5, 0] for c in (0, 3, 7, 12)])
    pixels = data.to_float(images[chosen]).double()
    generator = torch.Generator().manual_seed(5)
    return Step(network.train(), pixels, labels[chosen], generator, assignments[chosen], clusters)


def embed_all_double(encoder, images):
    with evaluating(encoder), torch.no_grad():
        return encoder(data.to_float(images).double())


def twin(step):
    """The same step, to be computed in another way."""
    generator = torch.Generator()
    generator.set_state(step.generator.get_state())
    return replace(step, network=copy.deepcopy(step.network), generator=generator)


def assert_same_step(ours, theirs):
    for (name, p), q in zip(ours.network.named_parameters(), theirs.network.parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None), name
        if p.grad is not None:
            torch.testing.assert_close(p.grad, q.grad, msg=lambda text, name=name: f"{name}: {text}")
    for (name, b), c in zip(ours.network.named_buffers(), theirs.network.buffers(), strict=True):
        torch.testing.assert_close(b, c, msg=lambda text, name=name: f"{name}: {text}")
    assert all(part.training for part in ours.network.modules())


def uniform_start(step, eps):
    noise = torch.rand(step.images.shape, generator=step.generator, dtype=torch.float64) * 2 - 1
    return (step.images + eps * noise).clamp(0, 1)


def climb(step, x, eps, step_size, loss):
    """One signed-gradient step, clipped to the ball and to [0, 1]."""
    x = x.clone().requires_grad_()
    gradient = torch.autograd.grad(loss(x), x)[0]
    moved = torch.minimum(torch.maximum(x + step_size * gradient.sign(), step.images - eps), step.images + eps)
    return moved.detach().clamp(0, 1)


def test_qtrades_steps_with_the_gradient_of_its_formula_alone(step):
    recipe = ClustrQTrades(eps=0.1, step_size=0.12, consistency_weight=8.0, training_neighbours=10, gap=9.0)
    manual = twin(step)
    encoder, clusters = manual.network.encoder, manual.clusters
    z = encoder(manual.images)
    magnet = magnet_loss(z, manual.assignments, manual.labels, gap=9.0).per_example
    targets = cluster_logits(z, clusters, neighbours=10).detach().softmax(dim=1)

    def inconsistency(x):
        scores = cluster_logits(encoder(x), clusters, neighbours=10).exp()
        return -(targets * scores.log_softmax(dim=1)).sum(dim=1)

    encoder.eval()
    x = climb(manual, uniform_start(manual, 0.1), 0.1, 0.12, lambda x: inconsistency(x).sum())
    manual.network.train()
    (magnet + 8 * inconsistency(x)).mean().backward()

    terms = objective(recipe, step)
    assert all(p.grad is None for p in step.network.parameters())
    terms.loss.mean().backward()
    assert_same_step(step, manual)
    torch.testing.assert_close(terms.magnet, magnet)
    assert step.network.linear.weight.grad is None


def test_adversarial_training_steps_with_the_gradient_at_the_moved_images_alone(step):
    recipe = AdversarialTraining(eps=0.1, step_size=0.04, steps=4)
    manual = twin(step)
    net, x = manual.network.eval(), uniform_start(manual, 0.1)
    for _ in range(4):
        x = climb(manual, x, 0.1, 0.04, lambda x: cross_entropy(net(x), manual.labels).sum())
    cross_entropy(net.train()(x), manual.labels).mean().backward()

    terms = objective(recipe, step)
    assert all(p.grad is None for p in step.network.parameters())
    terms.loss.mean().backward()
    assert_same_step(step, manual)
    assert terms.magnet is None


def test_fast_adversarial_training_takes_one_long_step_from_a_uniform_start(step):
    manual = twin(step)
    net, start = manual.network.eval(), uniform_start(manual, 8 / 255)
    x = climb(manual, start, 8 / 255, 10 / 255, lambda x: cross_entropy(net(x), manual.labels).sum())
    # longer than the radius, so a part of the steps ends on the wall of the ball and a part does not
    assert 0 < ((x - manual.images).abs() > 8 / 255 - 1e-12).double().mean() < 1
    cross_entropy(net.train()(x), manual.labels).mean().backward()
    terms = objective(FastAdversarialTraining(), step)
    assert all(p.grad is None for p in step.network.parameters())
    terms.loss.mean().backward()
    assert_same_step(step, manual)


def test_trades_steps_with_the_gradient_of_its_formula_alone(step):
    recipe = Trades(eps=0.08, step_size=0.03, steps=4, trades_weight=5.0, start_scale=0.01)
    # a fresh head is so flat that the divergence would hardly count
    with torch.no_grad():
        step.network.linear.weight.mul_(30)
    manual = twin(step)
    net = manual.network.eval()
    clean = net(manual.images).softmax(dim=1).detach()

    def divergence(x):
        # the sum over classes of p log(p / q), written out
        return (clean * (clean.log() - net(x).log_softmax(dim=1))).sum()

    noise = torch.empty(manual.images.shape, dtype=torch.float64).normal_(generator=manual.generator)
    x = manual.images + 0.01 * noise
    for _ in range(4):
        x = climb(manual, x, 0.08, 0.03, divergence)
    net.train()
    p, q = net(manual.images).softmax(dim=1), net(x).softmax(dim=1)
    own = p.gather(1, manual.labels[:, None]).squeeze(1)
    expected = -own.log() + 5 * (p * (p.log() - q.log())).sum(dim=1)
    expected.mean().backward()

    terms = objective(recipe, step)
    assert all(parameter.grad is None for parameter in step.network.parameters())
    terms.loss.mean().backward()
    torch.testing.assert_close(terms.loss, expected)
    assert_same_step(step, manual)
    assert terms.magnet is None
    assert (terms.loss - cross_entropy(net(manual.images), manual.labels)).abs().max() > 1e-4


def certifying_step(recipe, digits, count=20):
    """A batch on the network of a recipe on a 1-Lipschitz encoder, in double precision."""
    images, labels = digits.train_images[:150], digits.train_labels[:150]
    state = new_state(recipe, digits, images, labels, None)
    pixels = data.to_float(images[:count]).double()
    return Step(state.network.double().train(), pixels, labels[:count], torch.Generator().manual_seed(5))


def test_clustr_cert_steps_with_the_certificate_and_moves_the_centroids(digits):
    recipe = ClustrCert(margin=0.7, temperature=0.2, **LIPSCHITZ)
    step = certifying_step(recipe, digits)
    manual = twin(step)
    net = manual.network
    clusters = Clusters(net.centroids, net.labels, net.variance)
    expected = certificate_loss(net.encoder(manual.images), manual.labels, clusters, margin=0.7, temperature=0.2)
    expected.mean().backward()
    terms = objective(recipe, step)
    assert all(p.grad is None for p in step.network.parameters())
    assert terms.magnet is None
    torch.testing.assert_close(terms.loss, expected)
    terms.loss.mean().backward()
    assert_same_step(step, manual)
    assert step.network.centroids.grad.norm() > 1e-3
    assert all(p.grad is not None for p in step.network.parameters())


def test_lip_linear_steps_with_the_margin_of_its_orthonormal_head(digits):
    recipe = LipschitzMargin(margin=0.7, temperature=0.2, **LIPSCHITZ | {"width": 32})
    step = certifying_step(recipe, digits)
    manual = twin(step)
    rows, bias = manual.network.linear.weight, manual.network.linear.bias
    torch.testing.assert_close(rows @ rows.T, torch.eye(10).double(), rtol=0, atol=1e-6)
    logits = manual.network.encoder(manual.images) @ rows.T + bias
    # rows of an orthonormal head are sqrt(2) apart
    other = torch.nn.functional.one_hot(manual.labels, 10) == 0
    margins = logits + 0.7 * 2**0.5 * other
    expected = 0.2 * cross_entropy(margins / 0.2, manual.labels)
    expected.mean().backward()
    terms = objective(recipe, step)
    torch.testing.assert_close(terms.loss, expected, rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(
        terms.loss,
        margin_cross_entropy(logits, manual.labels, rows, margin=0.7, temperature=0.2),
    )
    terms.loss.mean().backward()
    for (name, p), q in zip(step.network.named_parameters(), manual.network.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-5, atol=1e-8, msg=lambda text, name=name: f"{name}: {text}")


def test_smoothing_steps_with_cross_entropy_on_noisy_images_that_are_not_clipped(step):
    manual = twin(step)
    noise = torch.empty(manual.images.shape, dtype=torch.float64).normal_(generator=manual.generator)
    moved = manual.images + 0.4 * noise
    assert moved.min() < 0
    assert moved.max() > 1
    expected = cross_entropy(manual.network(moved), manual.labels)
    expected.mean().backward()
    terms = objective(Smoothing(noise=0.4), step)
    assert all(p.grad is None for p in step.network.parameters())
    torch.testing.assert_close(terms.loss, expected)
    terms.loss.mean().backward()
    assert_same_step(step, manual)
    assert terms.magnet is None


def test_clustr_lip_steps_as_clustr_does(step):
    theirs = twin(step)
    objective(Clustr(gap=9.0), theirs).loss.mean().backward()
    objective(ClustrLip(gap=9.0), step).loss.mean().backward()
    assert_same_step(step, theirs)


# free training, an epoch at a time


def free_state(recipe, digits):
    """A state before its first epoch, with its images and labels."""
    images, labels = digits.train_images[:150], digits.train_labels[:150]
    return new_state(recipe, digits, images, labels, None), images, labels


FREE = {"eps": 0.05, "step_size": 0.02, "replays": 4, "optimiser": "sgd", "learning_rate": 0.05} | SMALL


class Clip(torch.autograd.Function):
    """`clamp` to [0, 1] with the gradient of the algorithm's authors: theirs was 1 at 0 and at 1."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward((x >= 0) & (x <= 1))
        return x.clamp(0, 1)

    @staticmethod
    def backward(ctx, slope):
        (inside,) = ctx.saved_tensors
        return slope * inside


def test_free_training_is_shafahis_algorithm(digits):
    recipe = FreeAdversarialTraining(epochs=2, **FREE)
    state, images, labels = free_state(recipe, digits)
    passes = []
    state.network.register_forward_hook(lambda *_: passes.append(1))
    network, delta = copy.deepcopy(state.network).train(), torch.zeros(64, 1, 8, 8)
    network._forward_hooks.clear()
    momentum = [torch.zeros_like(p) for p in network.parameters()]
    draws = torch.Generator().manual_seed(recipe.seed)
    sizes = []
    for _ in range(2):
        train_epoch(recipe, state, images, labels)
        seed = int(torch.randint(2**31, (), generator=draws))
        for batch in ShuffledBatches(150, batch_size=64, seed=seed):
            pixels, goals = images[batch.indices] / 255, labels[batch.indices]
            sizes.append(len(pixels))
            for _ in range(4):
                part = delta[: len(pixels)].clone().requires_grad_()
                loss = nn.functional.cross_entropy(network(Clip.apply(pixels + part)), goals)
                *slopes, towards = torch.autograd.grad(loss, [*network.parameters(), part])
                with torch.no_grad():
                    for p, m, slope in zip(network.parameters(), momentum, slopes, strict=True):
                        m.mul_(0.9).add_(slope)
                        p.sub_(m, alpha=0.05)
                    delta[: len(pixels)] = (delta[: len(pixels)] + 0.02 * towards.sign()).clamp(-0.05, 0.05)
    assert sizes == [64, 64, 22] * 2
    # one pass forward for each update, so one backward serves both
    assert len(passes) == 4 * len(sizes)
    for ours, theirs in zip(state.network.parameters(), network.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)
    assert ((state.perturbation - delta).abs() < 1e-6).double().mean() > 0.995
    assert state.perturbation.abs().max() == torch.tensor(0.05)
    # a pixel that the image or the wall has already fixed stays, others have moved
    assert (state.perturbation != 0).double().mean() > 0.3


def test_free_clustr_moves_weights_and_perturbation_by_the_magnet_loss(digits, monkeypatch):
    recipe = FreeClustr(epochs=1, per_cluster=4, gap=9.0, **FREE)
    state, images, labels = free_state(recipe, digits)
    assert state.perturbation.shape == (48, 1, 8, 8)
    state.perturbation.uniform_(-0.05, 0.05, generator=torch.Generator().manual_seed(0))
    before = state.perturbation.clone()
    encoder = copy.deepcopy(state.network.encoder).train()
    batches = []

    def noted(*args):
        clusters, sampler = real(*args)
        batches.append(next(iter(sampler)))
        return clusters, One(batches[0])

    class One:
        """A sampler of a single batch, which notes the losses it is told."""

        def __init__(self, batch):
            self.batch, self.told = batch, []

        def __len__(self):
            return 1

        def __iter__(self):
            return iter([self.batch])

        def update(self, indices, losses):
            told.append((indices, losses.detach()))

    real, told = clusters_and_sampler, []
    monkeypatch.setattr(loop, "clusters_and_sampler", noted)
    train_epoch(recipe, state, images, labels)

    (batch,) = batches
    count = len(batch.indices)
    pixels, delta = images[batch.indices] / 255, before.clone()
    momentum = [torch.zeros_like(p) for p in encoder.parameters()]
    for replay in range(4):
        part = delta[:count].clone().requires_grad_()
        found = magnet_loss(encoder(Clip.apply(pixels + part)), batch.assignments, labels[batch.indices], gap=9.0)
        *slopes, towards = torch.autograd.grad(found.loss, [*encoder.parameters(), part])
        with torch.no_grad():
            for p, m, slope in zip(encoder.parameters(), momentum, slopes, strict=True):
                m.mul_(0.9).add_(slope)
                p.sub_(m, alpha=0.05)
            delta[:count] = (delta[:count] + 0.02 * towards.sign()).clamp(-0.05, 0.05)
        assert torch.equal(told[replay][0], batch.indices)
        torch.testing.assert_close(told[replay][1], found.per_example.detach(), rtol=1e-3, atol=1e-3)
    assert len(told) == 4
    for ours, theirs in zip(state.network.encoder.parameters(), encoder.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)
    assert ((state.perturbation - delta).abs() < 1e-6).double().mean() > 0.99
    assert torch.equal(state.perturbation[count:], before[count:])
    assert not torch.equal(state.perturbation[:count], before[:count])


def test_the_perturbation_goes_on_where_the_last_batch_and_the_last_checkpoint_left_it(train, killed, home, trained):
    recipe = RECIPES["free-at, adam, crop"]
    killed(recipe, during=2, folder=home / "run")
    path = home / "run/checkpoint.safetensors"
    kept, facts = read_tensors(path, "a checkpoint")
    assert kept["perturbation"].shape == (64, 1, 8, 8)
    assert 0 < kept["perturbation"].abs().max() <= recipe.eps + 1e-7
    whole = results(trained(recipe))
    # another perturbation in the checkpoint is another run
    write_tensors(path, "a checkpoint", kept | {"perturbation": -kept["perturbation"]}, facts)
    assert results(train(recipe, folder=home / "run"))["model.safetensors"] != whole["model.safetensors"]


def test_a_run_that_was_replaced_meanwhile_is_not_taken_for_the_first(train, home):
    """Rows of the new weights would be kept under the digest of the old."""
    first = train(RECIPES["ce, sgd, crop, milestones"], folder=home / "run")
    first.model()
    train(RECIPES["ce, sgd, crop, milestones"], folder=home / "other", half=True)
    shutil.rmtree(home / "run")
    (home / "other").rename(home / "run")
    with pytest.raises(ValueError, match=r"that were there at first, got .*: the run was replaced meanwhile"):
        first.model()


def test_a_run_says_from_which_weights_it_began_and_if_they_became_others(train, caplog):
    recipe = RECIPES["clustr, warm start"]
    first = train(recipe)
    start = run_folder(recipe.warm_start)
    assert first.start_sha256 == load_run(start).weights_sha256
    train(recipe)
    assert "began from" not in caplog.text
    # as by another number of threads
    shutil.rmtree(start)
    train(recipe.warm_start, half=True)
    assert train(recipe).start_sha256 == first.start_sha256
    assert f"began from the weights {first.start_sha256[:10]} of {start.name}, which are " in caplog.text


def test_a_run_that_goes_on_began_from_where_it_did(train, killed, home):
    recipe = RECIPES["clustr, warm start"]
    killed(recipe, during=2, folder=home / "run")
    began = load_run(start := run_folder(recipe.warm_start)).weights_sha256
    shutil.rmtree(start)
    train(recipe.warm_start, half=True)
    assert train(recipe, folder=home / "run").start_sha256 == began


def test_two_who_train_one_run_do_so_one_after_the_other(train, home):
    """Else the snapshots of one by two threads would stand beside the weights of one by one."""
    recipe, folder, runs = RECIPES["ce, sgd, crop, milestones"], home / "run", []
    folder.mkdir(parents=True)
    other = threading.Thread(target=lambda: runs.append(train(recipe, folder=folder)))
    with alone(folder):
        other.start()
        other.join(0.5)
        assert other.is_alive()
        assert list(folder.iterdir()) == []
    other.join(60)
    assert runs[0].weights_sha256 == load_run(folder).weights_sha256


def test_a_training_that_is_refused_leaves_no_folder(train, home):
    with pytest.raises(ValueError, match="per_class"):
        train(replace(RECIPES["clustr, warm start"], per_class=5000, warm_start=None), folder=home / "run")
    assert not (home / "run").exists()


@pytest.mark.parametrize("given", [True, False], ids=["named", "usual folder"])
@pytest.mark.parametrize("name", [WEIGHTS, HISTORY])
def test_a_file_of_ones_own_is_not_taken_for_a_runs(train, home, name, given):
    recipe = RECIPES["ce, sgd, crop, milestones"]
    folder = home / "mine" if given else run_folder(recipe)
    folder.mkdir(parents=True)
    (folder / name).write_text("mine", encoding="utf-8")
    with pytest.raises(ValueError, match=f"folder: expected a run's or an empty one, got {name} without a run in"):
        train(recipe, folder=folder if given else None)
    assert (folder / name).read_text(encoding="utf-8") == "mine"
    assert [path.name for path in folder.iterdir()] == [name]


def test_links_in_a_run_of_somebody_elses_lead_nowhere(train, home):
    """Only their names are written: a run that is carried about may hold links."""
    (folder := home / "run").mkdir(parents=True)
    outside = home / "diary.txt"
    outside.write_text("mine", encoding="utf-8")
    for name in (CHECKPOINT, WEIGHTS, HISTORY, DONE):
        (folder / name).symlink_to(outside if name in (WEIGHTS, HISTORY) else home / "none")
    train(RECIPES["ce, sgd, crop, milestones"], folder=folder)
    assert outside.read_text(encoding="utf-8") == "mine"
    assert load_run(folder).model() is not None


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES.keys())
def test_only_free_training_has_a_perturbation_and_it_begins_at_nought(recipe, digits):
    state, _, _ = free_state(recipe, digits)
    if "free" not in recipe.method:
        assert state.perturbation is None
    else:
        size = 48 if isinstance(recipe, Clustr) else 64
        assert torch.equal(state.perturbation, torch.zeros(size, 1, 8, 8))


def test_clustr_steps_with_the_magnet_loss_and_cross_entropy_with_its_own(step):
    manual = twin(step)
    magnet_loss(manual.network.encoder(manual.images), manual.assignments, manual.labels).loss.backward()
    terms = objective(Clustr(), step)
    terms.loss.mean().backward()
    assert_same_step(step, manual)
    other, plain = twin(step), twin(step)
    cross_entropy(other.network(other.images), other.labels).mean().backward()
    objective(CrossEntropy(), plain).loss.mean().backward()
    assert_same_step(plain, other)


def test_an_epochs_clusters_come_without_a_graph_and_draw_seeds_by_the_full_loss(digits):
    recipe = Clustr(per_cluster=4, gap=9.0, **SMALL)
    images, labels = training_part(recipe, digits)
    state = new_state(recipe, digits, images, labels, None)
    clusters, sampler = clusters_and_sampler(recipe, state.network.encoder, images, labels, state.generator)
    assert not clusters.centroids.requires_grad
    assert not clusters.variance.requires_grad
    embeddings = embed_all(state.network.encoder, images)
    own = torch.cdist(embeddings, clusters.centroids).masked_fill(clusters.labels != labels[:, None], torch.inf)
    losses = full_magnet_loss(embeddings, labels, clusters, gap=9.0).per_example
    means = [losses[own.argmin(dim=1) == c].double().mean().item() for c in range(20)]
    assert sampler.seed_probabilities().tolist() == pytest.approx((np.array(means) / np.sum(means)).tolist(), rel=1e-5)


def test_embedding_leaves_modes_and_statistics_alone(digits):
    encoder = build_encoder("resnet18", (1, 8, 8), width=2).train()
    encoder.bn1.eval()
    modes, before = [part.training for part in encoder.modules()], copy.deepcopy(encoder.state_dict())
    embeddings = embed_all(encoder, digits.train_images[:50], batch_size=16)
    assert [part.training for part in encoder.modules()] == modes
    assert all(torch.equal(before[name], tensor) for name, tensor in encoder.state_dict().items())
    assert not embeddings.requires_grad
    with torch.no_grad():
        torch.testing.assert_close(embeddings, encoder.eval()(data.to_float(digits.train_images[:50])))


def test_evaluating_gives_every_part_its_mode_back_even_after_an_error():
    module = nn.Sequential(nn.Linear(1, 1), nn.Sequential(nn.BatchNorm1d(1), nn.Dropout())).train()
    module[1][0].eval()

    def fail():
        with evaluating(module):
            assert not any(part.training for part in module.modules())
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert [part.training for part in module.modules()] == [True, True, True, False, True]


# what cannot be used


def test_an_unfinished_run_of_another_recipe_is_refused(train, killed, home):
    killed(CE, during=2, folder=home / "run")
    other = replace(CE, learning_rate=0.5, seed=3)
    before = contents(home / "run")
    with pytest.raises(
        ValueError,
        match=r"checkpoint\.safetensors: expected a run of this recipe, got one with learning_rate = 0\.001, seed",
    ):
        train(other, folder=home / "run")
    assert contents(home / "run") == before


def test_a_checkpoint_of_other_images_is_refused(killed, home, digits, trained):
    killed(CE, during=2, folder=home / "run")
    changed = replace(digits, train_images=255 - digits.train_images)
    with pytest.raises(ValueError, match=OTHER_DATA):
        fit(CE, folder=home / "run", dataset=changed, progress=False)


def test_a_finished_run_of_another_recipe_is_refused(train, kept):
    run = kept(CE)
    with pytest.raises(
        ValueError, match=r"run\.json: expected a run of this recipe, got one with epochs = 2, eps = None, method"
    ):
        train(AdversarialTraining(epochs=3, **SMALL), folder=run.path)


def test_a_checkpoint_that_was_copied_into_another_run_is_refused(train, killed):
    killed(CE, during=2)
    other = replace(CE, seed=3)
    run_folder(other).mkdir(parents=True)
    shutil.copy(run_folder(CE) / "checkpoint.safetensors", run_folder(other))
    with pytest.raises(ValueError, match=r"expected a run of this recipe, got one with seed = 111"):
        train(other)


@pytest.mark.parametrize("keep", [0, 5, 300, 0.5, -1])
def test_a_truncated_checkpoint_is_named_and_kept(train, killed, home, keep):
    killed(CE, during=2, folder=home / "run")
    path = home / "run/checkpoint.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[: int(keep * len(whole)) if isinstance(keep, float) else keep])
    before = contents(home / "run")
    with pytest.raises(ValueError, match=f"{path}: expected a checkpoint, got a truncated or damaged file"):
        train(CE, folder=home / "run")
    assert contents(home / "run") == before


def test_a_checkpoint_of_something_else_is_named(train, home):
    path = home / "run/checkpoint.safetensors"
    path.parent.mkdir(parents=True)
    save_file({"weight": torch.zeros(2)}, path)
    with pytest.raises(ValueError, match=f"{path}: expected a checkpoint"):
        train(CE, folder=home / "run")


@pytest.mark.parametrize("content", ["", '{"recipe": {"met', "[]", "{}", '{"recipe": {"method": "ce"}}'])
def test_a_damaged_run_file_is_named(train, kept, content):
    run = kept(CE)
    path = run.path / "run.json"
    path.write_text(content)
    for load in (lambda: load_run(run.path), lambda: train(CE, folder=run.path)):
        with pytest.raises(ValueError, match=f"{path}: expected "):
            load()


def test_damaged_weights_are_named(kept):
    run = kept(CE)
    path = run.path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-10])
    for load in (run.model, run.cluster_model):
        with pytest.raises(ValueError, match=f"{path}: expected "):
            load()


@pytest.mark.parametrize(
    "changed",
    [{"recipe": {"width": 8192}}, {"image_shape": [1, 4096, 4096]}, {"recipe": {"encoder": "lip-cnn", "width": 8192}}],
)
def test_a_run_that_says_more_than_its_weights_hold_is_refused_before_memory_is_taken(kept, changed):
    """The networks that they speak of take gigabytes."""
    run = kept(CE)
    content = read_json(run.path / "run.json")
    content |= changed | {"recipe": content["recipe"] | changed.get("recipe", {})}
    content.pop("sha256")
    if "encoder" in content["recipe"] and content["recipe"]["encoder"] == "lip-cnn":
        content["image_shape"] = [3, 32, 32]
    write_json(run.path / "run.json", content)
    greedy, message = (
        load_run(run.path),
        r"model\.safetensors: expected the [0-9,]+ numbers of its recipe's network, got",
    )
    with pytest.raises(ValueError, match=message):
        greedy.model()
    if "recipe" in changed:
        with pytest.raises(ValueError, match=message):
            greedy.cluster_model()


def test_no_run_is_no_run(home):
    with pytest.raises(FileNotFoundError, match=r"folder: expected a finished run with run\.json in"):
        load_run(home / "none")


def test_the_dataset_must_be_the_recipes(train, digits, home):
    with pytest.raises(ValueError, match="dataset: expected 'mnist5k' as in the recipe, got 'digits'"):
        train(replace(CE, dataset="mnist5k"))
    assert not home.exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"encoder": "vgg"},
            r"encoder: expected one of \['lip-cnn', .*'resnet18', 'small-cnn'\], got 'vgg'",
        ),
        ({"encoder": "lip-mlp", "width": 7}, "width: expected an even number, since MaxMin sorts pairs, got 7"),
        ({"encoder": "lip-cnn", "width": 2}, r"image_shape, width: expected .* a width of at least \d+, and"),
        ({"dataset": "imagenet"}, r"name: expected one of .* got 'imagenet'"),
        ({"per_class": 50}, r"labels: class \d has \d+ examples, fewer than per_class=50"),
    ],
)
def test_a_recipe_that_cannot_be_trained_leaves_no_run(train, changes, message):
    recipe = replace(Clustr(epochs=1, per_cluster=4, **SMALL), **changes)
    with pytest.raises(ValueError, match=message):
        train(recipe, dataset=None)
    assert not (run_folder(recipe) / "run.json").exists()


def test_a_full_disk_leaves_the_last_checkpoint_whole(train, killed, home, no_training_after, trained):
    recipe, folder = CrossEntropy(epochs=4, snapshots=(0, 2), **SMALL), home / "run"
    killed(recipe, during=2, folder=folder)
    before = contents(folder)
    with files_of_at_most(5000), pytest.raises(OSError, match="File too large") as caught:
        train(recipe, folder=folder)
    assert caught.value.errno == errno.EFBIG
    assert contents(folder) == before
    assert results(train(recipe, folder=folder)) == results(trained(recipe))


def test_a_full_disk_at_the_start_leaves_nothing(train, home):
    with files_of_at_most(5000), pytest.raises(OSError, match=r"File too large: '.*checkpoint\.safetensors'"):
        train(CE, folder=home / "run")
    assert contents(home / "run") == {}


def test_a_checkpoint_cut_short_by_an_error_is_never_seen(train, killed, home, monkeypatch):
    killed(CE, during=2, folder=home / "run")
    before = contents(home / "run")

    def half(path, content):
        with path.open("wb") as file:
            file.write(content[:500])
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", half)
        with pytest.raises(OSError, match="No space left on device"):
            train(CE, folder=home / "run")
    assert contents(home / "run") == before


def test_a_checkpoint_holds_no_more_than_a_resume_needs(trained):
    tensors = load_file(trained(CE).path / "checkpoint.safetensors")
    assert {name.split(".")[0] for name in tensors} == {"network", "optimiser", "generator"}


def test_a_finished_network_lies_with_channels_last_and_takes_no_gradient(tmp_path, digits):
    run = fit(CrossEntropy(epochs=1, snapshots=(1,), **SMALL), dataset=digits, folder=tmp_path / "run", progress=False)
    for network in (run.model(), run.cluster_model(), run.encoder_at(1)):
        weights = [weight for weight in network.parameters() if weight.dim() == 4 and min(weight.shape[1:]) > 1]
        assert weights
        assert all(weight.is_contiguous(memory_format=torch.channels_last) for weight in weights)
        assert not any(weight.requires_grad for weight in network.parameters())
    network = new_network(run.recipe, digits.image_shape, digits.num_classes)
    assert all(weight.is_contiguous() and weight.requires_grad for weight in network.parameters())


def stopped_after(folder, epochs):
    """What raises once a training in a folder has so many epochs."""

    def stop():
        if (folder / CHECKPOINT).exists() and epochs_kept(folder / CHECKPOINT) == epochs:
            raise KeyboardInterrupt

    return stop


@pytest.fixture
def threads():
    """Sets the number of threads, which is put back."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def place(after, threads):
    return {"after_epoch": after, "device": "cpu", "threads": threads, "processes": 1, "captured": False}


def test_a_run_says_where_each_of_its_epochs_was_trained(digits, tmp_path, threads):
    recipe, folder = CrossEntropy(width=4, epochs=4, train_examples=100), tmp_path / "run"
    options = {"dataset": digits, "folder": folder, "progress": False, "device": "cpu"}
    # nothing was trained where it was killed at once; after the second epoch it goes on as it was
    for count, epochs in ((3, 0), (1, 1), (1, 2), (2, 3)):
        threads(count)
        with pytest.raises(KeyboardInterrupt):
            fit(recipe, before_epoch=stopped_after(folder, epochs), **options)
    assert fit(recipe, **options).trained_on == (place(0, 1), place(2, 2))
    threads(1)
    # a finished run stays what it is
    assert fit(recipe, **options).trained_on == (place(0, 1), place(2, 2))
    whole = fit(recipe, dataset=digits, folder=tmp_path / "whole", progress=False, device="cpu")
    assert whole.trained_on == (place(0, 1),)
    assert made_of("ce", whole)["trained_on"] == [place(0, 1)]


@pytest.mark.parametrize(
    "places",
    ["x", [], [1], [place(1.0, 1)], [place(-1, 1)], [place(5, 1)], [place(2, 1), place(1, 1)], [place(0, 1)] * 99],
)
def test_a_run_that_cannot_have_been_trained_where_it_says_is_refused(digits, tmp_path, places):
    recipe = CrossEntropy(width=4, epochs=2, train_examples=100)
    run = fit(recipe, dataset=digits, folder=tmp_path / "run", progress=False)
    content = read_json(run.path / "run.json") | {"trained_on": places}
    content.pop("sha256")
    write_json(run.path / "run.json", content)
    with pytest.raises(ValueError, match=r"run\.json.*expected in trained_on where each of its epochs was"):
        load_run(run.path)


def test_rows_of_another_number_of_threads_are_measured_anew(digits, tmp_path, threads):
    run = fit(CrossEntropy(width=4, epochs=1, train_examples=100), dataset=digits, folder=tmp_path, progress=False)
    kept = []
    for count in (1, 2, 1):
        threads(count)
        certificate_table(run, examples=4, dataset=digits, progress=False)
        kept.append(len(list((tmp_path / "tables").iterdir())))
    assert kept == [1, 2, 2]


def test_a_weight_that_an_encoder_does_not_use_has_no_state_and_the_run_goes_on(digits, tmp_path):
    """As a head that is left from another training."""

    @encoders.register_encoder("half-used")
    def build(image_shape, width, dataset):
        net = encoders.SmallCNN(image_shape, width=width)
        net.unused = nn.Linear(3, 3)
        return net

    recipe = CrossEntropy(encoder="half-used", width=4, epochs=2, train_examples=100)

    stop = stopped_after(tmp_path / "stopped", 1)
    try:
        with pytest.raises(KeyboardInterrupt):
            fit(recipe, dataset=digits, folder=tmp_path / "stopped", progress=False, before_epoch=stop)
        again = fit(recipe, dataset=digits, folder=tmp_path / "stopped", progress=False)
        whole = fit(recipe, dataset=digits, folder=tmp_path / "whole", progress=False)
        assert again.weights_sha256 == whole.weights_sha256
    finally:
        del encoders.ENCODERS["half-used"]


@pytest.mark.parametrize("recipe", [CE, ClustrCert(epochs=1, **LIPSCHITZ)], ids=["small-cnn", "lip-mlp"])
def test_the_sessions_default_dtype_decides_nothing(digits, tmp_path, recipe):
    plain = fit(recipe, dataset=digits, folder=tmp_path / "plain", progress=False)
    rows = certificate_table(plain, examples=8, dataset=digits, progress=False)
    shutil.rmtree(tmp_path / "plain/tables")
    torch.set_default_dtype(torch.float64)
    try:
        again = fit(recipe, dataset=digits, folder=tmp_path / "again", progress=False)
        assert {tensor.dtype for tensor in again.model().state_dict().values()} <= {torch.float32, torch.int64}
        assert certificate_table(plain, examples=8, dataset=digits, progress=False).equals(rows)
    finally:
        torch.set_default_dtype(torch.float32)
    assert again.weights_sha256 == plain.weights_sha256
