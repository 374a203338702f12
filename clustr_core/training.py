"""The one training loop: an objective and a sampler for each recipe, a checkpoint each epoch, resume."""

import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import singledispatch
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import pandas as pd
import torch
from jaxtyping import Float, Int, Shaped, UInt8
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm.auto import tqdm

from clustr_core import data, records
from clustr_core.ascent import maximise, random_point
from clustr_core.classifiers import ClusterClassifier, LinearClassifier, Rule, cluster_logits
from clustr_core.clusters import Clusters, fit_clusters
from clustr_core.distances import rows_within, squared_distances
from clustr_core.encoders import build_encoder, lay_out
from clustr_core.losses import (
    certificate_loss,
    consistency_loss,
    cross_entropy,
    full_magnet_loss,
    kl_divergence,
    magnet_loss,
    margin_cross_entropy,
)
from clustr_core.one_lipschitz import bake
from clustr_core.parallel import Processes, join
from clustr_core.recipes import (
    AdversarialTraining,
    Clustr,
    ClustrCert,
    ClustrQTrades,
    FreeAdversarialTraining,
    FreeClustr,
    LipschitzMargin,
    Recipe,
    Smoothing,
    Trades,
    recipe_from_dict,
    recipe_to_dict,
    run_folder,
)
from clustr_core.sampling import ClusterBatches, ShuffledBatches

_Network = TypeVar("_Network", bound=nn.Module)
log = logging.getLogger(__name__)
ALONE = Processes(torch.device("cpu"))
CHECKPOINT, WEIGHTS, HISTORY, DONE = "checkpoint.safetensors", "model.safetensors", "history.csv", "run.json"


@dataclass(frozen=True)
class Run:
    """A finished run on disk."""

    path: Path
    recipe: Recipe
    num_classes: int
    image_shape: tuple[int, int, int]
    train_images_sha256: str

    @property
    def history(self) -> pd.DataFrame:
        """One row an epoch: ``epoch``, ``loss``, ``learning_rate``, and for cluster methods ``magnet``
        (the magnet term alone), ``variance`` (sigma^2 at its start) and ``coverage`` (share of the images it saw)."""
        return records.read_table(self.path / HISTORY)

    def model(self, device: str | torch.device = "cpu") -> LinearClassifier | ClusterClassifier:
        """The classifier as its method defines it, in evaluation mode."""
        if self.recipe.clustered:
            return self.cluster_model(device)
        net = _new_network(self.recipe, self.image_shape, self.num_classes)
        net.load_state_dict(_prefixed(self._weights(), "network."))
        assert isinstance(net, LinearClassifier)
        return _finished(net, device)

    def cluster_model(self, device: str | torch.device = "cpu", *, rule: Rule | None = None) -> ClusterClassifier:
        """The run's encoder with clusters of its training embeddings, whatever the method, in evaluation mode.

        Args:
            rule: None for the method's own, which is "soft" for a method without clusters.
        """
        rule = rule or self.recipe.rule
        tensors = self._weights()
        encoder = build_encoder(
            self.recipe.encoder, self.image_shape, width=self.recipe.width, dataset=self.recipe.dataset
        )
        encoder.load_state_dict(_prefixed(tensors, "network.encoder."))
        clusters = Clusters(**_prefixed(tensors, "clusters."))
        neighbours = self.recipe.neighbours if rule == "soft" else None
        return _finished(ClusterClassifier(encoder, clusters, rule=rule, neighbours=neighbours), device)

    def encoder_at(self, epoch: int, device: str | torch.device = "cpu") -> nn.Module:
        """The encoder as it was after ``epoch`` epochs, for the epochs in ``recipe.snapshots``.

        Raises:
            ValueError: if the recipe kept no such snapshot.
        """
        if epoch not in self.recipe.snapshots:
            raise ValueError(f"epoch: expected one of the snapshots {self.recipe.snapshots}, got {epoch}")
        net = _new_network(self.recipe, self.image_shape, self.num_classes)
        net.load_state_dict(load_file(_snapshot_path(self.path, epoch)))
        return _finished(net.encoder, device)

    def _weights(self) -> dict[str, Tensor]:
        try:
            return load_file(self.path / WEIGHTS)
        except SafetensorError as error:
            raise ValueError(f"{self.path / WEIGHTS}: expected weights, got a damaged file ({error})") from error


def _finished(network: _Network, device: str | torch.device) -> _Network:
    """A network as it is attacked and certified: in evaluation mode, and `lay_out`."""
    lay_out(bake(network))
    return network.to(device).eval()


@dataclass
class _State:
    """All that an epoch changes."""

    network: LinearClassifier | ClusterClassifier
    optimiser: torch.optim.Optimizer
    generator: torch.Generator
    images_sha256: str
    perturbation: Tensor | None
    processes: Processes = ALONE
    # running statistics of batch norm that the processes do not share as they are computed
    local_statistics: list[Tensor] = field(default_factory=list)
    epoch: int = 0
    history: list[dict[str, float]] = field(default_factory=list)


@dataclass(frozen=True)
class Step:
    """What an objective sees of one batch. ``clusters`` and ``assignments`` are there for the magnet loss only.

    Every process sees the whole batch and draws what is random for all of it; it computes `mine`, its own part.
    """

    network: LinearClassifier | ClusterClassifier
    images: Float[Tensor, "batch channel height width"]
    labels: Int[Tensor, " batch"]
    generator: torch.Generator
    assignments: Int[Tensor, " batch"] | None = None
    clusters: Clusters | None = None
    processes: Processes = ALONE

    def mine(self, rows: Shaped[Tensor, "batch ..."]) -> Shaped[Tensor, "part ..."]:
        """This process's part of the batch."""
        return self.processes.part(rows)

    def embed(self, images: Float[Tensor, "part channel height width"]) -> Float[Tensor, "part dim"]:
        """Embeddings, in the precision of the run."""
        return self.processes.computed(self.network.embed, images)

    def logits(self, images: Float[Tensor, "part channel height width"]) -> Float[Tensor, "part class"]:
        """Logits, in the precision of the run."""
        return self.processes.computed(self.network, images)

    def magnet(self, embeddings: Float[Tensor, "part dim"], gap: float) -> Float[Tensor, " part"]:
        """The magnet loss of this process's part: its centroids are means over the whole batch."""
        assert self.assignments is not None
        batch = self.processes.whole(embeddings, len(self.labels))
        return self.mine(magnet_loss(batch, self.assignments, self.labels, gap=gap).per_example)


class Terms(NamedTuple):
    """The training loss of each example of a part, and what of it draws the next seed clusters."""

    loss: Float[Tensor, " part"]
    magnet: Float[Tensor, " part"] | None = None


@singledispatch
def objective(recipe: Recipe, step: Step) -> Terms:
    """The loss of a batch; register another implementation for another recipe."""
    return Terms(cross_entropy(step.logits(step.mine(step.images)), step.mine(step.labels)))


@objective.register
def _(recipe: AdversarialTraining, step: Step) -> Terms:
    labels = step.mine(step.labels)
    with evaluating(step.network):
        moved = maximise(
            lambda x: cross_entropy(step.logits(x), labels),
            step.mine(step.images),
            step.mine(random_point(step.images, recipe.eps, "linf", step.generator)),
            eps=recipe.eps,
            step_size=recipe.step_size,
            steps=recipe.steps,
        )
    return Terms(cross_entropy(step.logits(moved), labels))


@objective.register
def _(recipe: Trades, step: Step) -> Terms:
    images = step.mine(step.images)
    with evaluating(step.network):
        with torch.no_grad():
            clean = step.logits(images)
        noise = torch.empty_like(step.images).normal_(generator=step.generator)
        moved = maximise(
            lambda x: kl_divergence(clean, step.logits(x)),
            images,
            images + recipe.start_scale * step.mine(noise),
            eps=recipe.eps,
            step_size=recipe.step_size,
            steps=recipe.steps,
        )
    logits = step.logits(images)
    divergence = kl_divergence(logits, step.logits(moved))
    return Terms(cross_entropy(logits, step.mine(step.labels)) + recipe.trades_weight * divergence)


@objective.register
def _(recipe: Clustr, step: Step) -> Terms:
    magnet = step.magnet(step.embed(step.mine(step.images)), recipe.gap)
    return Terms(magnet, magnet)


@objective.register
def _(recipe: ClustrQTrades, step: Step) -> Terms:
    assert step.clusters is not None
    clusters, votes = step.clusters, recipe.training_neighbours
    images = step.mine(step.images)
    embeddings = step.embed(images)
    magnet = step.magnet(embeddings, recipe.gap)
    clean = cluster_logits(embeddings, clusters, neighbours=votes).detach()

    def inconsistency(images: Tensor) -> Tensor:
        return consistency_loss(clean, cluster_logits(step.embed(images), clusters, neighbours=votes))

    with evaluating(step.network):
        start = step.mine(random_point(step.images, recipe.eps, "linf", step.generator))
        moved = maximise(inconsistency, images, start, eps=recipe.eps, step_size=recipe.step_size, steps=1)
    return Terms(magnet + recipe.consistency_weight * inconsistency(moved), magnet)


@objective.register
def _(recipe: ClustrCert, step: Step) -> Terms:
    assert isinstance(step.network, ClusterClassifier)
    embeddings, clusters = step.embed(step.mine(step.images)), step.network.clusters
    size = {"margin": recipe.margin, "temperature": recipe.temperature}
    return Terms(certificate_loss(embeddings, step.mine(step.labels), clusters, **size))


@objective.register
def _(recipe: LipschitzMargin, step: Step) -> Terms:
    assert isinstance(step.network, LinearClassifier)
    head = step.network.linear.weight
    embeddings = step.embed(step.mine(step.images))
    logits = torch.nn.functional.linear(embeddings, head, step.network.linear.bias)
    size = {"margin": recipe.margin, "temperature": recipe.temperature}
    return Terms(margin_cross_entropy(logits, step.mine(step.labels), head, **size))


@objective.register
def _(recipe: Smoothing, step: Step) -> Terms:
    noise = torch.empty_like(step.images).normal_(generator=step.generator)
    noisy = step.mine(step.images + recipe.noise * noise)
    return Terms(cross_entropy(step.logits(noisy), step.mine(step.labels)))


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Evaluation mode inside the block; each submodule's own mode afterwards."""
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for part, mode in modes:
            part.training = mode


def fit(
    recipe: Recipe,
    *,
    dataset: data.Dataset | None = None,
    folder: Path | None = None,
    device: str | torch.device | None = None,
    progress: bool = True,
) -> Run:
    """Train by a recipe, or load what it left on disk: a finished run returns at once, a killed one goes on.

    On a CPU a resumed run equals an uninterrupted one bit for bit. The test set is never looked at.

    Under torchrun the processes share each batch: batches, draws, clusters and the mean loss that a step goes down are
    those of one process, up to the order in which sums are taken (but for batch norm: `Processes.prepared`). They need
    one file system: the first process writes, all read.

    Args:
        dataset: the recipe's dataset if it is in memory already.
        folder: where the run lies; default ``runs/<run_key>``.
        device: default the GPU if there is one; of several processes each takes its own.
    Raises:
        ValueError: if ``folder`` holds another recipe's run, a checkpoint is damaged, or ``dataset`` is another one.
    """
    folder = folder or run_folder(recipe)
    if dataset is not None and dataset.name != recipe.dataset:
        raise ValueError(f"dataset: expected {recipe.dataset!r} as in the recipe, got {dataset.name!r}")
    processes = join(device, recipe.precision)
    if processes.from_first((folder / DONE).exists):
        return load_run(folder, expected=recipe)
    device = processes.device
    start = fit(recipe.warm_start, dataset=dataset, device=device, progress=progress) if recipe.warm_start else None
    # the first alone, for it may have to download it
    if dataset is None and processes.first:
        dataset = data.load(recipe.dataset)
    processes.wait()
    dataset = dataset or data.load(recipe.dataset)
    images = dataset.train_images[: recipe.train_examples].to(device)
    labels = dataset.train_labels[: recipe.train_examples].to(device)
    state = _new_state(recipe, dataset, images, labels, start, processes)
    resumed = processes.from_first((folder / CHECKPOINT).exists)
    if not resumed:
        _save_progress(folder, recipe, state)
        processes.wait()
    if resumed or processes.count > 1:
        # also from the start: another machine may have rounded it differently
        _load_checkpoint(folder / CHECKPOINT, recipe, state)
    if resumed and processes.first:
        log.info("%s: going on after epoch %d", folder, state.epoch)
    shown = progress and processes.first
    with tqdm(range(recipe.epochs), recipe.method, unit="epoch", initial=state.epoch, disable=not shown) as bar:
        while state.epoch < recipe.epochs:
            row = _train_epoch(recipe, state, images, labels)
            state.history.append(row)
            state.epoch += 1
            _save_progress(folder, recipe, state)
            bar.set_postfix(loss=f"{row['loss']:.3f}")
            bar.update()
    _finish(folder, recipe, state, dataset, images, labels)
    processes.wait()
    return load_run(folder, expected=recipe)


def load_run(folder: Path, *, expected: Recipe | None = None) -> Run:
    """A finished run.

    Raises:
        FileNotFoundError: if there is none.
        ValueError: if it is of another recipe than ``expected``.
    """
    if not (folder / DONE).exists():
        raise FileNotFoundError(f"folder: expected a finished run with {DONE} in {folder}")
    content = records.read_json(folder / DONE)
    try:
        recipe = recipe_from_dict(content["recipe"])
        channels, height, width = content["image_shape"]
        run = Run(folder, recipe, content["num_classes"], (channels, height, width), content["train_images_sha256"])
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{folder / DONE}: expected a finished run, got a damaged file ({error!r})") from error
    if expected is not None and recipe != expected:
        raise ValueError(_other_recipe(folder / DONE, recipe, expected))
    return run


def embed_all(
    encoder: nn.Module, images: UInt8[Tensor, "batch channel height width"], *, batch_size: int = 512
) -> Float[Tensor, "batch dim"]:
    """Embeddings of byte images, in evaluation mode and without a graph, on the encoder's device."""
    device = next(encoder.parameters()).device
    with evaluating(encoder), torch.no_grad():
        return torch.cat([encoder(data.to_float(part.to(device))) for part in images.split(batch_size)])


def _train_epoch(recipe: Recipe, state: _State, images: Tensor, labels: Tensor) -> dict[str, float]:
    clusters, sampler = _clusters_and_sampler(recipe, state, images, labels)
    state.network.train()
    totals, count, touched = (
        torch.zeros(2, device=images.device),
        0,
        torch.zeros(len(images), dtype=torch.bool),
    )
    for number, batch in enumerate(sampler):
        rate = learning_rate(recipe, state.epoch + (number + 0.5) / len(sampler))
        for group in state.optimiser.param_groups:
            group["lr"] = rate
        indices = batch.indices.to(images.device)
        pixels = data.to_float(_augmented(recipe, images[indices], state.generator))
        assignments = None if batch.assignments is None else batch.assignments.to(images.device)
        for moved in _replays(recipe, state, pixels):
            step = Step(state.network, moved, labels[indices], state.generator, assignments, clusters, state.processes)
            loss, magnet = _update(recipe, state, step)
            sampler.update(batch.indices, magnet)
            totals += torch.stack([loss.sum(), magnet.sum()])
            count += len(loss)
        touched[batch.indices] = True
    mean_loss, mean_magnet = (totals / count).tolist()
    row = {"epoch": state.epoch + 1, "loss": mean_loss, "learning_rate": learning_rate(recipe, state.epoch + 0.5)}
    if clusters is not None:
        coverage = float(touched.float().mean())
        row |= {"magnet": mean_magnet, "variance": clusters.shared_variance, "coverage": coverage}
    return row


def _update(recipe: Recipe, state: _State, step: Step) -> tuple[Tensor, Tensor]:
    """One step down the batch's mean loss; the loss of each of its examples, and of that the magnet term."""
    processes, count = state.processes, len(step.labels)
    terms = objective(recipe, step)
    state.optimiser.zero_grad(set_to_none=True)
    # what each process adds to the mean; the sum of their gradients is its gradient
    (processes.own(terms.loss, count).sum() / count).backward()
    # not by DDP's hooks: a step has several forward passes, by other methods than `forward`, and parameters that only
    # some recipes use, of which learnable centroids go through no forward pass at all
    weights = [weight for group in state.optimiser.param_groups for weight in group["params"]]
    processes.add_up(weight.grad for weight in weights if weight.grad is not None)
    state.optimiser.step()
    processes.average(state.local_statistics)
    loss = processes.whole(terms.loss.detach(), count)
    return loss, loss if terms.magnet is None else processes.whole(terms.magnet.detach(), count)


def learning_rate(recipe: Recipe, epoch: float) -> float:
    """The learning rate at a time in epochs, which may lie within one."""
    if recipe.schedule == "triangle":
        progress = epoch / recipe.epochs
        return recipe.learning_rate * min(6 * progress, 1.0, (1 - progress) / 0.6)
    rate = recipe.learning_rate
    for _ in range(sum(milestone <= epoch for milestone in recipe.milestones)):
        rate *= 0.1
    return rate


def _replays(recipe: Recipe, state: _State, pixels: Tensor) -> Iterator[Tensor]:
    """The images of each update on one batch: once as they are; under free training, again and again, moved by the
    perturbation, which grows by the very gradient that has just updated the weights."""
    if not isinstance(recipe, FreeAdversarialTraining | FreeClustr):
        yield pixels
        return
    assert state.perturbation is not None
    perturbation = state.perturbation[: len(pixels)]
    for _ in range(recipe.replays):
        leaf = perturbation.clone().requires_grad_()
        yield (pixels + leaf).clamp(0, 1)
        assert leaf.grad is not None
        # each process has the gradient of its own rows, and zeros
        state.processes.add_up([leaf.grad])
        perturbation.add_(leaf.grad.sign(), alpha=recipe.step_size).clamp_(-recipe.eps, recipe.eps)


def _clusters_and_sampler(
    recipe: Recipe, state: _State, images: Tensor, labels: Tensor
) -> tuple[Clusters | None, ClusterBatches | ShuffledBatches]:
    """This epoch's clusters (from evaluation-mode embeddings) and a sampler that knows their losses."""
    seed = int(torch.randint(2**31, (), generator=state.generator, device=images.device))
    if not isinstance(recipe, Clustr):
        return None, ShuffledBatches(len(images), batch_size=recipe.batch_size, seed=seed)
    processes = state.processes
    embeddings = _embed_shared(processes, state.network.encoder, images)
    clusters, assignments = _cluster(processes, recipe, embeddings, labels, seed)
    sampler = ClusterBatches(
        clusters,
        assignments,
        clusters_per_batch=recipe.clusters_per_batch,
        per_cluster=recipe.per_cluster,
        seed=seed,
    )
    mine = full_magnet_loss(processes.part(embeddings), processes.part(labels), clusters, gap=recipe.gap)
    sampler.update(torch.arange(len(images)), processes.whole(mine.per_example, len(images)))
    return clusters, sampler


def _embed_shared(processes: Processes, encoder: nn.Module, images: Tensor) -> Tensor:
    """`embed_all`, of which each process does its part."""
    return processes.whole(embed_all(encoder, processes.part(images)), len(images))


def _cluster(
    processes: Processes, recipe: Recipe, embeddings: Tensor, labels: Tensor, seed: int
) -> tuple[Clusters, Tensor]:
    """The k-means of the first process, for all of them."""

    def fitted() -> tuple[Clusters, Tensor]:
        clusters, assignments = fit_clusters(
            embeddings,
            labels,
            per_class=recipe.per_class,
            n_init=recipe.kmeans_starts,
            max_iter=recipe.kmeans_iterations,
            seed=seed % 2**31,
        )
        return clusters.to("cpu"), assignments.cpu()

    clusters, assignments = processes.from_first(fitted)
    return clusters.to(embeddings.device), assignments.to(embeddings.device)


def _augmented(recipe: Recipe, images: Tensor, generator: torch.Generator) -> Tensor:
    if recipe.augmentation == "none":
        return images
    flip = recipe.augmentation == "crop-flip"
    return data.random_crop_flip(images, generator=generator, padding=recipe.crop_padding, flip=flip)


def _new_network(
    recipe: Recipe, image_shape: tuple[int, int, int], num_classes: int
) -> LinearClassifier | ClusterClassifier:
    """The recipe's encoder, initialised from its seed, with what is trained along: a linear head, which the magnet loss
    leaves unused, or learnable centroids, still at 0."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        encoder = build_encoder(recipe.encoder, image_shape, width=recipe.width, dataset=recipe.dataset)
        if not isinstance(recipe, ClustrCert):
            orthonormal = isinstance(recipe, LipschitzMargin)
            return LinearClassifier(encoder, encoder.embedding_dim, num_classes, orthonormal=orthonormal)
        labels = torch.arange(num_classes).repeat_interleave(recipe.per_class)
        blank = Clusters(torch.zeros(len(labels), encoder.embedding_dim), labels, torch.ones(len(labels)))
        return ClusterClassifier(encoder, blank, rule=recipe.rule, learnable=True)


def _new_state(
    recipe: Recipe,
    dataset: data.Dataset,
    images: Tensor,
    labels: Tensor,
    start: Run | None,
    processes: Processes = ALONE,
) -> _State:
    network = _new_network(recipe, dataset.image_shape, dataset.num_classes)
    if start is not None:
        network.load_state_dict(_prefixed(load_file(start.path / WEIGHTS), "network."))
    network.to(images.device)
    local_statistics = processes.prepared(network)
    if isinstance(network, ClusterClassifier) and start is None:
        embeddings = _embed_shared(processes, network.encoder, images)
        clusters, _ = _cluster(processes, recipe, embeddings, labels, recipe.seed)
        network.centroids.data.copy_(clusters.centroids)
    trained = network.encoder if isinstance(recipe, Clustr) else network
    optimiser = _optimiser(recipe, trained)
    generator = torch.Generator(images.device).manual_seed(recipe.seed)
    digest = records.digest(images.cpu().numpy().tobytes())
    perturbation = _no_perturbation(recipe, images)
    return _State(network, optimiser, generator, digest, perturbation, processes, local_statistics)


def _no_perturbation(recipe: Recipe, images: Tensor) -> Tensor | None:
    """Free training's perturbation at the start: zeros for the largest batch."""
    if isinstance(recipe, FreeClustr):
        return images.new_zeros(recipe.clusters_per_batch * recipe.per_cluster, *images.shape[1:], dtype=torch.float32)
    if isinstance(recipe, FreeAdversarialTraining):
        return images.new_zeros(recipe.batch_size, *images.shape[1:], dtype=torch.float32)
    return None


def _optimiser(recipe: Recipe, module: nn.Module) -> torch.optim.Optimizer:
    rate, decay = recipe.learning_rate, recipe.weight_decay
    if recipe.optimiser == "sgd":
        return torch.optim.SGD(module.parameters(), lr=rate, weight_decay=decay, momentum=0.9)
    return torch.optim.Adam(module.parameters(), lr=rate, weight_decay=decay)


def _save_progress(folder: Path, recipe: Recipe, state: _State) -> None:
    """The snapshot, if this epoch is one, and the checkpoint: one safetensors file that holds all a resume needs."""
    if not state.processes.first:
        return
    if state.epoch in recipe.snapshots:
        with records.written_whole(_snapshot_path(folder, state.epoch)) as temporary:
            save_file(_network_tensors(state.network), temporary)
    packed = state.optimiser.state_dict()
    tensors = {f"network.{name}": tensor for name, tensor in _network_tensors(state.network).items()}
    for index, slots in packed["state"].items():
        tensors |= {f"optimiser.{index}.{name}": tensor for name, tensor in slots.items() if tensor is not None}
    tensors["generator"] = state.generator.get_state()
    if state.perturbation is not None:
        tensors["perturbation"] = state.perturbation
    facts = {
        "recipe": recipe_to_dict(recipe),
        "train_images_sha256": state.images_sha256,
        "epoch": state.epoch,
        "history": state.history,
        "param_groups": packed["param_groups"],
    }
    with records.written_whole(folder / CHECKPOINT) as temporary:
        save_file(tensors, temporary, metadata={"facts": json.dumps(facts)})


def _load_checkpoint(path: Path, recipe: Recipe, state: _State) -> None:
    try:
        tensors = load_file(path)
        with safe_open(path, framework="pt") as file:
            facts = json.loads(file.metadata()["facts"])
    except (SafetensorError, KeyError, TypeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path}: expected a checkpoint, got a truncated or damaged file ({error})") from error
    found = recipe_from_dict(facts["recipe"])
    if found != recipe:
        raise ValueError(_other_recipe(path, found, recipe))
    if facts["train_images_sha256"] != state.images_sha256:
        raise ValueError(f"{path}: expected a checkpoint trained on these images; {recipe.dataset} has changed since")
    state.network.load_state_dict(_prefixed(tensors, "network."))
    slots: dict[int, dict[str, Tensor]] = {}
    for name, tensor in _prefixed(tensors, "optimiser.").items():
        index, _, slot = name.partition(".")
        slots.setdefault(int(index), {})[slot] = tensor
    state.optimiser.load_state_dict({"state": slots, "param_groups": facts["param_groups"]})
    state.generator.set_state(tensors["generator"])
    if state.perturbation is not None:
        state.perturbation.copy_(tensors["perturbation"])
    state.epoch, state.history = facts["epoch"], facts["history"]


def _finish(folder: Path, recipe: Recipe, state: _State, dataset: data.Dataset, images: Tensor, labels: Tensor) -> None:
    """Cluster the final embeddings and write the run; run.json comes last and says that it is whole."""
    clusters = _final_clusters(recipe, state, images, labels)
    if not state.processes.first:
        return
    tensors = {f"network.{name}": tensor for name, tensor in _network_tensors(state.network).items()}
    parts = {"centroids": clusters.centroids, "labels": clusters.labels, "variance": clusters.variance}
    tensors |= {f"clusters.{name}": tensor.contiguous() for name, tensor in parts.items()}
    with records.written_whole(folder / WEIGHTS) as temporary:
        save_file(tensors, temporary)
    records.write_table(folder / HISTORY, pd.DataFrame(state.history))
    content: dict[str, Any] = {
        "recipe": recipe_to_dict(recipe),
        "num_classes": dataset.num_classes,
        "image_shape": list(dataset.image_shape),
        "train_images_sha256": state.images_sha256,
        "processes": state.processes.count,
        "threads": torch.get_num_threads(),
        **records.environment(str(images.device)),
    }
    records.write_json(folder / DONE, content)


def _final_clusters(recipe: Recipe, state: _State, images: Tensor, labels: Tensor) -> Clusters:
    """k-means of the final embeddings; learnt centroids stay where they are, and only their variance is measured."""
    network = state.network
    embeddings = _embed_shared(state.processes, network.encoder, images)
    if not isinstance(network, ClusterClassifier):
        return _cluster(state.processes, recipe, embeddings, labels, recipe.seed)[0]
    centroids = network.centroids.detach().clone()
    rows = rows_within(len(centroids), embeddings.dtype)
    own = torch.cat(
        [
            squared_distances(part, centroids).masked_fill(network.labels != of[:, None], torch.inf).amin(dim=1)
            for part, of in zip(embeddings.split(rows), labels.split(rows), strict=True)
        ]
    )
    return Clusters(
        centroids, network.labels.clone(), (own.sum() / max(len(own) - 1, 1)).expand(len(centroids)).clone()
    )


def _network_tensors(network: nn.Module) -> dict[str, Tensor]:
    """Everything that makes the network, laid out as a file wants it."""
    return {name: tensor.contiguous() for name, tensor in network.state_dict().items()}


def _snapshot_path(folder: Path, epoch: int) -> Path:
    return folder / "snapshots" / f"epoch-{epoch:04d}.safetensors"


def _prefixed(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def _other_recipe(path: Path, found: Recipe, expected: Recipe) -> str:
    left, right = recipe_to_dict(found), recipe_to_dict(expected)
    names = sorted(set(left) | set(right))
    differing = [f"{n} = {left.get(n)!r}" for n in names if left.get(n) != right.get(n)]
    return f"{path}: expected a run of this recipe, got one with {', '.join(differing)}"
