"""Updates that are repeated as they were recorded: nothing in them waits for a device, and nothing else changes."""

from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from clustr_core.measuring.profile import load_profile
from clustr_core.models.classifiers import ClusterClassifier
from clustr_core.models.clusters import Clusters, Seen
from clustr_core.training import loop
from clustr_core.training.captured import Captured, LateLosses, can_be_captured
from clustr_core.training.loop import batch_updates, fit, of_clusters
from clustr_core.training.recipes import METHODS, AdversarialTraining, Clustr, CrossEntropy, FreeClustr
from clustr_core.training.refresh import clusters_and_sampler
from clustr_core.training.sampling import ClusterBatches
from clustr_core.training.state import new_state

ROOT = Path(__file__).resolve().parents[2]
SMOKE = load_profile(ROOT / "profiles/smoke.yaml").recipes
SMALL = {"width": 4, "train_examples": 200, "learning_rate": 5e-3, "optimiser": "sgd"}


def without_values(clusters: Clusters) -> Clusters:
    """Clusters on the device without values, that have been asked before what only values tell."""
    made = object.__new__(Clusters)
    for name in ("centroids", "labels", "variance"):
        object.__setattr__(made, name, getattr(clusters, name).to("meta"))
    made.__dict__["_by_class"] = (Seen(made.labels), made.labels, tuple(part.to("meta") for part in clusters.by_class))
    made.__dict__["_all_alike"] = (Seen(made.variance), clusters.all_alike)
    return made


@pytest.mark.parametrize("method", METHODS)
def test_an_update_reads_nothing_off_its_device(method, digits, monkeypatch) -> None:
    # tensors of the device "meta" have no values: whoever asks for one fails
    autocast = torch.autocast
    monkeypatch.setattr(torch, "autocast", lambda kind, **on: nullcontext() if kind == "meta" else autocast(kind, **on))
    recipe = replace(SMOKE[method], warm_start=None, augmentation="crop-flip", crop_padding=1, optimiser="sgd")
    images, labels = digits.train_images[:300], digits.train_labels[:300]
    state = new_state(recipe, digits, images, labels, None)
    clusters, sampler = clusters_and_sampler(recipe, state.network.encoder, images, labels, state.generator)
    batch = next(iter(sampler))
    parts = batch.indices, *of_clusters(batch, labels)
    network = state.network.train()
    learnt = network.clusters if isinstance(network, ClusterClassifier) else None
    network.to("meta")
    if learnt is not None:
        network._clusters, network._seen = without_values(learnt), Seen(network.labels, network.variance)
        object.__setattr__(network._clusters, "centroids", network.centroids)
    if state.perturbation is not None:
        state.perturbation = state.perturbation.to("meta")
    known = None if clusters is None else without_values(clusters)
    losses, magnets = batch_updates(
        recipe, state, known, images.to("meta"), labels.to("meta"), *(part.to("meta") for part in parts)
    )
    assert losses.shape == magnets.shape == (getattr(recipe, "replays", 1), len(batch.indices))
    assert losses.is_meta
    # and the check sees one who asks
    with pytest.raises(RuntimeError, match="meta"):
        losses.sum().item()


def test_work_is_recorded_when_shapes_come_again_and_repeated_from_then_on() -> None:
    done, recorded = [], []

    def function(x):
        done.append(len(x))
        return (x * 2,)

    captured = Captured(function, lambda work: recorded.append(len(done)) or work)
    for size, expected in ((3, 1), (5, 2), (3, 3), (5, 4), (3, 5)):
        x = torch.full((size,), float(expected))
        assert torch.equal(captured(x)[0], 2 * x)
        assert len(done) == expected
    assert recorded == [2]


def test_losses_are_told_one_batch_late() -> None:
    told = []
    late = LateLosses(lambda indices, losses: told.append((indices.tolist(), losses.tolist())))
    losses = torch.tensor([1.0, 2.0])
    late.update(torch.tensor([0, 1]), losses)
    # what is told is what it was, whatever is written over it
    losses.zero_()
    assert told == []
    late.update(torch.tensor([2]), torch.tensor([3.0]))
    assert told == [([0, 1], [1.0, 2.0])]


def here(generator: torch.Generator):
    """Records work on a CPU: what repeats it is the work itself."""
    return lambda work: work


def trained(recipe, folder: Path, monkeypatch, record=None, late=LateLosses) -> dict[str, torch.Tensor]:
    """The weights of a training whose updates are recorded by ``record``, and whose losses are told by ``late``."""
    with monkeypatch.context() as patch:
        real = loop.new_state
        patch.setattr(loop, "new_state", lambda *given: real(*given[:-1], record))
        patch.setattr(loop, "LateLosses", late)
        return load_file(fit(recipe, folder=folder, progress=False).path / "model.safetensors")


@pytest.mark.parametrize(
    "recipe",
    [
        CrossEntropy(epochs=2, batch_size=48, **SMALL),
        AdversarialTraining(epochs=1, eps=0.1, step_size=0.05, steps=2, batch_size=50, **SMALL),
    ],
    ids=lambda recipe: recipe.method,
)
def test_recorded_updates_are_those_made_anew(recipe, tmp_path, monkeypatch) -> None:
    plain = trained(recipe, tmp_path / "plain", monkeypatch)
    recorded = trained(recipe, tmp_path / "recorded", monkeypatch, here)
    assert contents_of(recorded) == contents_of(plain)


def contents_of(tensors: dict[str, torch.Tensor]) -> dict[str, list]:
    return {name: tensor.tolist() for name, tensor in tensors.items()}


class AtOnce(LateLosses):
    """Tells of losses as they come."""

    def update(self, indices, losses):
        self._tell(indices, losses)


@pytest.mark.parametrize("kind", [Clustr, FreeClustr], ids=lambda kind: kind.method)
def test_batches_of_clusters_differ_by_losses_that_come_late_and_by_nothing_else(kind, tmp_path, monkeypatch) -> None:
    options = {"eps": 0.1, "step_size": 0.05, "replays": 2} if kind is FreeClustr else {}
    recipe = kind(epochs=2, per_cluster=4, clusters_per_batch=6, **options, **SMALL)
    told, real = [], ClusterBatches.update
    monkeypatch.setattr(ClusterBatches, "update", lambda *given: told.append(given) or real(*given))
    plain = trained(recipe, tmp_path / "plain", monkeypatch)
    count = len(told)
    at_once = trained(recipe, tmp_path / "recorded", monkeypatch, here, AtOnce)
    assert contents_of(at_once) == contents_of(plain)
    assert len(told) == 2 * count
    trained(recipe, tmp_path / "late", monkeypatch, here)
    # the last of each epoch have no batch left that they could choose
    assert len(told) == 3 * count - recipe.epochs


def test_a_cpu_has_no_graphs(tmp_path) -> None:
    with pytest.raises(
        ValueError, match="captured: expected one process on a CUDA device, which alone has graphs, got 1 on cpu"
    ):
        fit(CrossEntropy(epochs=1, **SMALL), folder=tmp_path / "run", device="cpu", captured=True)
    assert not (tmp_path / "run").exists()


def test_layers_that_wait_for_the_device_are_trained_without() -> None:
    assert {method for method, recipe in SMOKE.items() if not can_be_captured(recipe)} == {
        "clustr-lip",
        "clustr-cert",
        "lip-linear",
    }


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["32-true", "tf32", "bf16-mixed"])
@pytest.mark.parametrize("method", sorted(set(METHODS) - {"clustr-lip", "clustr-cert", "lip-linear"}))
def test_a_gpu_repeats_what_it_would_do(method, precision, tmp_path) -> None:
    recipe = replace(SMOKE[method], warm_start=None, epochs=2, encoder="resnet18", width=8, precision=precision)
    runs = [fit(recipe, folder=tmp_path / str(n), device="cuda", captured=True, progress=False) for n in range(2)]
    plain = fit(recipe, folder=tmp_path / "plain", device="cuda", progress=False)
    losses = [run.history["loss"].to_numpy() for run in (*runs, plain)]
    assert runs[0].history.equals(runs[1].history), "two equal calls"
    # fused steps, and in batches of clusters later losses; on a card they were 12 % apart at most
    torch.testing.assert_close(torch.tensor(losses[0]), torch.tensor(losses[2]), rtol=0.2, atol=0.05)


@pytest.mark.gpu
def test_a_captured_training_goes_on_where_it_was_killed(tmp_path) -> None:
    recipe = replace(SMOKE["clustr"], warm_start=None, epochs=3, encoder="resnet18", width=8, precision="bf16-mixed")
    whole = fit(recipe, folder=tmp_path / "whole", device="cuda", captured=True, progress=False)
    begun = []

    def kill():
        begun.append(1)
        if len(begun) == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit(recipe, folder=tmp_path / "killed", device="cuda", captured=True, progress=False, before_epoch=kill)
    resumed = fit(recipe, folder=tmp_path / "killed", device="cuda", captured=True, progress=False)
    assert resumed.history.equals(whole.history)
