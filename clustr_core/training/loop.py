"""The one training loop: a checkpoint each epoch, resume."""

import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from safetensors.torch import save
from torch import Tensor
from tqdm.auto import tqdm

from clustr_core import data
from clustr_core.models.clusters import Clusters
from clustr_core.models.encoders import ENCODERS
from clustr_core.storage.files import alone, digest, read_json, seal_of, write_json, written_whole
from clustr_core.storage.gate import brief, listed
from clustr_core.storage.provenance import environment
from clustr_core.storage.tables import write_table
from clustr_core.training.captured import (
    Captured,
    LateLosses,
    beside_the_default_stream,
    can_be_captured,
    check_captured,
    recorder,
    sent,
    set_rate,
)
from clustr_core.training.checks import (
    check_embeddings,
    check_examples,
    check_loss,
    check_smallest_batch,
    naming_batch_that_fits,
    naming_divergence,
    naming_epoch,
)
from clustr_core.training.losses import Slots, slots_of
from clustr_core.training.names import CHECKPOINT, DONE, HISTORY, WEIGHTS
from clustr_core.training.objectives import objective
from clustr_core.training.processes import Processes, join
from clustr_core.training.recipes import (
    Recipe,
    check_registered,
    has_persistent_perturbation,
    recipe_to_dict,
    run_folder,
    training_version,
)
from clustr_core.training.refresh import clusters_and_sampler, final_clusters
from clustr_core.training.run import (
    Run,
    check_stored_dtype,
    load_run,
    round_to_half,
    snapshot_path,
    stored_dtype,
    stored_tensors,
    training_digest,
    training_part,
)
from clustr_core.training.sampling import Batch, ClusterBatches
from clustr_core.training.state import (
    State,
    checkpoint_facts,
    load_checkpoint,
    new_state,
    note_place,
    save_progress,
    trained_weights,
)
from clustr_core.training.step import Step, augmented, learning_rate
from clustr_core.training.stopping import finished_first

log = logging.getLogger(__name__)


def fit(
    recipe: Recipe,
    *,
    dataset: data.Dataset | None = None,
    folder: str | Path | None = None,
    device: str | torch.device | None = None,
    progress: bool = True,
    half: bool = False,
    captured: bool = False,
    before_epoch: Callable[[], None] | None = None,
) -> Run:
    """Train by a recipe, or load what it left on disk: a finished run returns at once, a killed one goes on.

    On a CPU a resumed run equals an uninterrupted one bit for bit. The test set is never looked at.

    Under torchrun the processes share each batch: batches, draws, clusters and the mean loss that a step goes down are
    those of one process, up to the order in which sums are taken (but for batch norm: `Processes.prepared`). They need
    one file system: the first process writes, all read.

    Args:
        dataset: the recipe's dataset if it is in memory already. A finished run is held against the data only where
            they are given: reading them may take longer than loading it.
        folder: where the run lies; default ``runs/<run_key>``.
        device: default the GPU if there is one; of several processes each takes its own.
        half: keep the finished network in half precision (`run.stored_dtype`), from the warm start on.
        captured: let a GPU repeat its updates as CUDA graphs (`captured.Captured`), not waiting for Python.
            Three things differ then: the optimiser's steps are fused, weights have channels last unless the precision
            is "32-true", and seed clusters are drawn by losses that are one batch older. A method on a 1-Lipschitz
            encoder trains as without, since its layers wait for the device.
        before_epoch: called before each epoch, the warm start's too. What it raises ends the training, which a later
            call takes up after the last whole epoch.
    Raises:
        ValueError: if the recipe's method is not registered; with ``captured``, on a CPU or in several processes; if
            the folder holds the run of another recipe, version or data, a damaged checkpoint, files of a run's names
            that no run left there, or with ``half`` a run in full precision; if the finished network could have no
            clusters, which a class with too few examples makes impossible; if the training diverges or collapses, in
            the epoch where it does. What was kept so far stays.
    """
    check_registered(recipe)
    folder = Path(folder or run_folder(recipe))
    _check_nobodys(folder)
    if not isinstance(dataset, data.Dataset | None):
        raise TypeError(f"dataset: expected a Dataset, as load_dataset gives one, got {brief(dataset)}")
    if dataset is not None and dataset.name != recipe.dataset:
        raise ValueError(f"dataset: expected {recipe.dataset!r} as in the recipe, got {dataset.name!r}")
    processes = join(device, recipe.precision)
    if captured:
        check_captured(processes.device, processes.count)
    options = {"progress": progress, "half": half, "captured": captured, "before_epoch": before_epoch}
    with processes.in_precision(), _one_training(folder, processes):
        return _fit(recipe, dataset, folder, processes, **options)


def _check_nobodys(folder: Path) -> None:
    """Refuse a folder with files of a run's names that no run has left there: they would be replaced."""
    # the checkpoint first: who is finishing beside us removes it once the other is there
    if any((folder / name).exists() for name in (CHECKPOINT, DONE)):
        return
    names = [WEIGHTS, HISTORY, *(f"snapshots/{path.name}" for path in folder.glob("snapshots/*"))]
    if lost := [name for name in names if (folder / name).is_file() and not (folder / name).is_symlink()]:
        raise ValueError(f"folder: expected a run's or an empty one, got {listed(lost)} without a run in {folder}")


@contextmanager
def _one_training(folder: Path, processes: Processes) -> Iterator[None]:
    """Others who are asked for the same run wait until it is there, or its training has ended: what two wrote by other
    numbers of threads would not belong together. A finished run needs no waiting, and nothing of it is written."""
    if not processes.first or (folder / DONE).exists():
        yield
        return
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with alone(folder):
            yield
    finally:
        # nothing may have been kept
        with suppress(OSError):
            folder.rmdir()


def _fit(
    recipe: Recipe,
    dataset: data.Dataset | None,
    folder: Path,
    processes: Processes,
    *,
    progress: bool,
    half: bool,
    captured: bool,
    before_epoch: Callable[[], None] | None,
) -> Run:
    if processes.from_first((folder / DONE).exists):
        run = load_run(folder, expected=recipe)
        if half:
            check_stored_dtype(run, half=half)
        if dataset is not None:
            run.check_data(dataset)
        _tell_another_start(run)
        _tell_another_module(run)
        return run
    dataset = dataset or _loaded(recipe, processes)
    resumed = processes.from_first((folder / CHECKPOINT).exists)
    if resumed:
        checkpoint_facts(folder / CHECKPOINT, recipe, training_digest(recipe, dataset))
    images, labels = (part.to(processes.device) for part in training_part(recipe, dataset))
    check_examples(recipe, dataset, labels)
    start = None
    if recipe.warm_start:
        options = {"progress": progress, "half": half, "captured": captured, "before_epoch": before_epoch}
        start = fit(recipe.warm_start, dataset=dataset, device=processes.device, **options)
    record = recorder if captured and can_be_captured(recipe) else None
    state = new_state(recipe, dataset, images, labels, start, processes, record)
    check_smallest_batch(recipe, state.network.encoder, images, processes)
    if not resumed:
        note_place(state)
        save_progress(folder, recipe, state)
        processes.wait()
    if resumed or processes.count > 1:
        # also from the start: another machine may have rounded it differently
        load_checkpoint(folder / CHECKPOINT, recipe, state)
        note_place(state)
    if resumed and processes.first:
        log.info("%s: going on after epoch %d", folder, state.epoch)
    shown = progress and processes.first
    with naming_epoch(folder, state.epoch, state.epoch):
        check_embeddings(state.network.encoder, images)
    with tqdm(range(recipe.epochs), recipe.method, unit="epoch", initial=state.epoch, disable=not shown) as bar:
        while state.epoch < recipe.epochs:
            if before_epoch is not None:
                before_epoch()
            # several processes would not end after the same epoch
            with finished_first() if processes.count == 1 else nullcontext():
                with naming_epoch(folder, state.epoch + 1, state.epoch):
                    row = train_epoch(recipe, state, images, labels)
                    check_loss(row["loss"])
                    check_embeddings(state.network.encoder, images)
                state.history.append(row)
                state.epoch += 1
                save_progress(folder, recipe, state)
            bar.set_postfix(loss=f"{row['loss']:.3f}")
            bar.update()
    finish(folder, recipe, state, dataset, images, labels, half=half)
    processes.wait()
    run = load_run(folder, expected=recipe)
    if half:
        check_stored_dtype(run, half=half)
    return run


def _tell_another_start(run: Run) -> None:
    """Warn where the run that this one started from was trained again since, and became another."""
    if run.start_sha256 is None or run.recipe.warm_start is None:
        return
    folder = run_folder(run.recipe.warm_start)
    if (folder / DONE).exists() and (found := load_run(folder).weights_sha256) != run.start_sha256:
        log.warning(
            "%s: began from the weights %s of %s, which are %s now; delete the run, and it is trained from these",
            run.path, run.start_sha256[:10], folder.name, found[:10],
        )  # fmt: skip


def _modules(recipe: Recipe) -> dict[str, tuple[str, str | None]]:
    """The modules that register the recipe's method and its encoder, by what `run.json` calls their digests: their
    names, and SHA-256 of their files; None of ours, which have versions, and of cells."""
    encoder = getattr(ENCODERS.get(recipe.encoder), "__module__", "")
    names = {"module_sha256": type(recipe).__module__, "encoder_sha256": encoder}
    return {key: (name, _text_digest(name)) for key, name in names.items()}


def _text_digest(name: str) -> str | None:
    path = Path(getattr(sys.modules.get(name), "__file__", None) or "")
    return None if name.startswith("clustr_core.") or not path.is_file() else digest(path.read_bytes())


def _tell_another_module(run: Run) -> None:
    """Warn where the run was made by other words of the method's or the encoder's module than those here."""
    said = read_json(run.path / DONE)
    for key, (name, found) in _modules(run.recipe).items():
        if found is not None and said.get(key) not in (None, found):
            log.warning(
                "%s: trained by another text of the module %s than the one here; if its network or its training is "
                "another, raise the version of what it registers", run.path, name,
            )  # fmt: skip


def _loaded(recipe: Recipe, processes: Processes) -> data.Dataset:
    """The recipe's dataset; the first process alone may have to download it."""
    loaded = data.load_dataset(recipe.dataset) if processes.first else None
    processes.wait()
    return loaded or data.load_dataset(recipe.dataset)


def train_epoch(recipe: Recipe, state: State, images: Tensor, labels: Tensor) -> dict[str, float]:
    """One epoch: its clusters, its batches, its row of the history."""
    clusters, sampler = clusters_and_sampler(
        recipe, state.network.encoder, images, labels, state.generator, state.processes
    )
    state.network.train()
    updates, tell = partial(batch_updates, recipe, state, clusters, images, labels), sampler.update
    if state.record is not None:
        updates = Captured(updates, state.record(state.generator))
        tell = LateLosses(tell).update if isinstance(sampler, ClusterBatches) else tell
    here = labels.cpu()
    totals, count, touched = (
        torch.zeros(2, device=images.device),
        0,
        torch.zeros(len(images), dtype=torch.bool),
    )
    stream = beside_the_default_stream(images.device) if state.record else nullcontext()
    with naming_batch_that_fits(recipe, state.network, images, state.processes), stream, naming_divergence():
        for number, batch in enumerate(sampler):
            set_rate(state.optimiser, learning_rate(recipe, state.epoch + (number + 0.5) / len(sampler)))
            parts = (sent(part, images.device) for part in (batch.indices, *of_clusters(batch, here)))
            for loss, magnet in zip(*updates(*parts), strict=True):
                tell(batch.indices, magnet)
                totals += torch.stack([loss.sum(), magnet.sum()])
                count += len(loss)
            touched[batch.indices] = True
    mean_loss, mean_magnet = (totals / count).tolist()
    row = {"epoch": state.epoch + 1, "loss": mean_loss, "learning_rate": learning_rate(recipe, state.epoch + 0.5)}
    if clusters is not None:
        coverage = float(touched.float().mean())
        row |= {"magnet": mean_magnet, "variance": clusters.shared_variance, "coverage": coverage}
    return row


def of_clusters(batch: Batch, labels: Tensor) -> tuple[Tensor, ...]:
    """Of a batch of clusters each row's cluster, and the two parts of its `Slots`; of a plain batch nothing."""
    if batch.assignments is None:
        return ()
    return batch.assignments, *slots_of(batch.assignments, labels[batch.indices])


def batch_updates(
    recipe: Recipe,
    state: State,
    clusters: Clusters | None,
    images: Tensor,
    labels: Tensor,
    indices: Tensor,
    *parts: Tensor,
) -> tuple[Tensor, Tensor]:
    """All updates on one batch, a row each: the losses of its examples, and of these the magnet terms.

    Nothing is read off the device, so that a GPU may work ahead of Python, and repeat what it did.

    Args:
        parts: `of_clusters`.
    """
    assignments, slots = (parts[0], Slots(*parts[1:])) if parts else (None, None)
    pixels = data.to_float(augmented(recipe, images[indices], state.generator))
    done = []
    for moved in replays(recipe, state, pixels):
        of_batch = (assignments, clusters, state.processes, slots)
        done.append(update(recipe, state, Step(state.network, moved, labels[indices], state.generator, *of_batch)))
    losses, magnets = zip(*done, strict=True)
    return torch.stack(losses), torch.stack(magnets)


def update(recipe: Recipe, state: State, step: Step) -> tuple[Tensor, Tensor]:
    """One step down the batch's mean loss; the loss of each of its examples, and of that the magnet term."""
    processes, count = state.processes, len(step.labels)
    terms = objective(recipe, step)
    state.optimiser.zero_grad(set_to_none=True)
    # what each process adds to the mean; the sum of their gradients is its gradient
    (processes.unpadded_shard(terms.loss, count).sum() / count).backward()
    # not by DDP's hooks: a step has several forward passes, by other methods than `forward`, and parameters that only
    # some recipes use, of which learnable centroids go through no forward pass at all
    processes.add_up(weight.grad for weight in trained_weights(state) if weight.grad is not None)
    state.optimiser.step()
    processes.average(state.local_statistics)
    loss = processes.gathered(terms.loss.detach(), count)
    return loss, loss if terms.magnet is None else processes.gathered(terms.magnet.detach(), count)


def replays(recipe: Recipe, state: State, pixels: Tensor) -> Iterator[Tensor]:
    """The images of each update on one batch: once as they are; under free training, again and again, moved by the
    perturbation, which grows by the very gradient that has just updated the weights."""
    if not has_persistent_perturbation(recipe):
        yield pixels
        return
    assert state.perturbation is not None
    perturbation = state.perturbation[: len(pixels)]
    for _ in range(recipe.replays):
        leaf = perturbation.clone().requires_grad_()
        moved = pixels + leaf
        # as clamp's gradient before PyTorch 2.14; from then on it is 0 at 0 and 1, where most of a digit's pixels are
        yield torch.where((moved >= 0) & (moved <= 1), moved, moved.detach().clamp(0, 1))
        assert leaf.grad is not None
        # each process has the gradient of its own rows, and zeros
        state.processes.add_up([leaf.grad])
        perturbation.add_(leaf.grad.sign(), alpha=recipe.step_size).clamp_(-recipe.eps, recipe.eps)


def finish(
    folder: Path,
    recipe: Recipe,
    state: State,
    dataset: data.Dataset,
    images: Tensor,
    labels: Tensor,
    *,
    half: bool = False,
) -> None:
    """Cluster the final embeddings and write the run; run.json comes last and says that it is whole.

    Args:
        half: as in `fit`; the clusters are those of the rounded network.
    """
    dtype = stored_dtype(recipe, half=half)
    with naming_epoch(folder, state.epoch, state.epoch):
        if dtype == "float16":
            round_to_half(state.network)
        clusters = final_clusters(recipe, state.network, images, labels, state.processes)
    if not state.processes.first:
        return
    tensors = {f"network.{name}": tensor for name, tensor in stored_tensors(state.network, dtype).items()}
    parts = {"centroids": clusters.centroids, "labels": clusters.labels, "variance": clusters.variance}
    tensors |= {f"clusters.{name}": tensor.contiguous() for name, tensor in parts.items()}
    content: dict[str, Any] = {
        "recipe": recipe_to_dict(recipe),
        "module": type(recipe).__module__,
        **{key: found for key, (_, found) in _modules(recipe).items()},
        "version": training_version(recipe),
        "seed": recipe.seed,
        "weights_dtype": dtype,
        "train_examples": len(labels),
        "num_classes": dataset.num_classes,
        "image_shape": list(dataset.image_shape),
        "train_data_sha256": state.data_sha256,
        "processes": state.processes.count,
        "captured": state.record is not None,
        "trained_on": state.trained_on,
        "start_sha256": state.start_sha256,
        "snapshots": state.snapshots,
        **environment(str(images.device)),
    }
    # where a file system knows no locks, another process may have finished the same run: its files belong together
    if (folder / DONE).exists():
        return
    if lost := [epoch for epoch in recipe.snapshots if not snapshot_path(folder, epoch).exists()]:
        log.warning("%s: finished without its snapshots of the epochs %s, which are not there any more", folder, lost)
    with written_whole(folder / WEIGHTS) as temporary:
        temporary.write_bytes(weights := save(tensors))
    content["weights_sha256"] = digest(weights)
    content["history_sha256"] = digest(write_table(folder / HISTORY, pd.DataFrame(state.history)))
    write_json(folder / DONE, content | {"sha256": seal_of(content)})
