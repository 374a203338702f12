"""All that an epoch changes, and the checkpoint that keeps it."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from clustr_core import data
from clustr_core.models.classifiers import ClusterClassifier, LinearClassifier
from clustr_core.storage.tensors import read_tensors, write_tensors
from clustr_core.training.captured import Recorder
from clustr_core.training.checks import images_in_a_batch
from clustr_core.training.processes import ALONE, Processes
from clustr_core.training.recipes import (
    Recipe,
    has_persistent_perturbation,
    recipe_from_dict,
)
from clustr_core.training.refresh import clustered, embedded
from clustr_core.training.run import (
    CHECKPOINT,
    SNAPSHOT,
    Run,
    check_digest,
    check_version,
    network_tensors,
    new_network,
    other_recipe,
    prefixed,
    progress_facts,
    snapshot_path,
    training_digest,
)


@dataclass
class State:
    """All that an epoch changes."""

    network: LinearClassifier | ClusterClassifier
    optimiser: torch.optim.Optimizer
    generator: torch.Generator
    data_sha256: str
    perturbation: Tensor | None
    processes: Processes = ALONE
    # what records updates, to be repeated; None where they are made anew each time
    record: Recorder | None = None
    # running statistics of batch norm that the processes do not share as they are computed
    local_statistics: list[Tensor] = field(default_factory=list)
    epoch: int = 0
    history: list[dict[str, float]] = field(default_factory=list)


def new_state(
    recipe: Recipe,
    dataset: data.Dataset,
    images: Tensor,
    labels: Tensor,
    start: Run | None,
    processes: Processes = ALONE,
    record: Recorder | None = None,
) -> State:
    """The start of a training: fresh weights, or those of the run that it starts from."""
    network = new_network(recipe, dataset.image_shape, dataset.num_classes)
    if start is not None:
        network.load_state_dict(prefixed(start.weights(), "network."))
    network.to(images.device)
    if record is not None and recipe.precision != "32-true":
        # what tensor cores want; files keep the usual layout
        network.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    local_statistics = processes.prepared(network)
    if isinstance(network, ClusterClassifier) and start is None:
        embeddings = embedded(processes, network.encoder, images)
        clusters, _ = clustered(processes, recipe, embeddings, labels, recipe.seed)
        network.centroids.data.copy_(clusters.centroids)
    trained = network.encoder if recipe.cluster_batches else network
    optimiser = _optimiser(recipe, trained, images.device if record else None)
    generator = torch.Generator(images.device).manual_seed(recipe.seed)
    perturbation = _no_perturbation(recipe, images)
    sha256 = training_digest(recipe, dataset)
    return State(network, optimiser, generator, sha256, perturbation, processes, record, local_statistics)


def _no_perturbation(recipe: Recipe, images: Tensor) -> Tensor | None:
    """Free training's perturbation at the start: zeros for the largest batch."""
    if not has_persistent_perturbation(recipe):
        return None
    return images.new_zeros(images_in_a_batch(recipe), *images.shape[1:], dtype=torch.float32)


def _optimiser(recipe: Recipe, module: nn.Module, recorded_on: torch.device | None) -> torch.optim.Optimizer:
    """The recipe's optimiser; one whose steps are recorded reads its rate on the device, and takes it in one kernel."""
    options: dict[str, Any] = {"lr": recipe.learning_rate, "weight_decay": recipe.weight_decay}
    if recorded_on is not None:
        options |= {"lr": torch.tensor(recipe.learning_rate, device=recorded_on), "fused": recorded_on.type == "cuda"}
    if recipe.optimiser == "sgd":
        return torch.optim.SGD(module.parameters(), **options, momentum=0.9)
    return torch.optim.Adam(module.parameters(), **options, capturable=options.get("fused", False))


def trained_weights(state: State) -> list[Tensor]:
    """What the optimiser moves, in its order."""
    return [weight for group in state.optimiser.param_groups for weight in group["params"]]


def save_progress(folder: Path, recipe: Recipe, state: State) -> None:
    """The snapshot, if this epoch is one, and the checkpoint: one safetensors file that holds all a resume needs."""
    if not state.processes.first:
        return
    about = progress_facts(recipe, state.data_sha256, state.epoch)
    if state.epoch in recipe.snapshots:
        write_tensors(snapshot_path(folder, state.epoch), SNAPSHOT, network_tensors(state.network), about)
    packed = state.optimiser.state_dict()
    tensors = {f"network.{name}": tensor for name, tensor in network_tensors(state.network).items()}
    for index, slots in packed["state"].items():
        tensors |= {f"optimiser.{index}.{name}": tensor for name, tensor in slots.items() if tensor is not None}
    tensors["generator"] = state.generator.get_state()
    if state.perturbation is not None:
        tensors["perturbation"] = state.perturbation
    write_tensors(folder / CHECKPOINT, "a checkpoint", tensors, about | {"history": state.history})


def checkpoint_facts(path: Path, recipe: Recipe, data_sha256: str) -> dict[str, Any]:
    """What a checkpoint says beside its tensors.

    Raises:
        ValueError: if it is damaged, or of another recipe, version or data.
    """
    return _checked(path, recipe, data_sha256)[1]


def _checked(path: Path, recipe: Recipe, data_sha256: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    tensors, facts = read_tensors(path, "a checkpoint")
    found = recipe_from_dict(facts["recipe"])
    if found != recipe:
        raise ValueError(other_recipe(path, found, recipe))
    check_version(path, facts.get("version"), recipe)
    check_digest(path.parent, facts["train_data_sha256"], data_sha256, recipe.dataset)
    return tensors, facts


def epochs_kept(path: Path) -> int:
    """After how many epochs a checkpoint was written.

    Raises:
        ValueError: if it is damaged.
    """
    return read_tensors(path, "a checkpoint")[1]["epoch"]


def load_checkpoint(path: Path, recipe: Recipe, state: State) -> None:
    """Go on from a checkpoint, which must be of this recipe and of these data."""
    tensors, facts = _checked(path, recipe, state.data_sha256)
    state.network.load_state_dict(prefixed(tensors, "network."))
    slots: dict[int, dict[str, Tensor]] = {}
    weights = trained_weights(state)
    for name, tensor in prefixed(tensors, "optimiser.").items():
        index, _, slot = name.partition(".")
        like = weights[int(index)]
        # laid out as its weight is, which a fused step takes for granted
        laid_out = torch.empty_like(like).copy_(tensor) if tensor.shape == like.shape else tensor
        slots.setdefault(int(index), {})[slot] = laid_out
    # of the groups a recipe says all, and the device that trains
    state.optimiser.load_state_dict({"state": slots, "param_groups": state.optimiser.state_dict()["param_groups"]})
    state.generator.set_state(tensors["generator"])
    if state.perturbation is not None:
        state.perturbation.copy_(tensors["perturbation"])
    state.epoch, state.history = facts["epoch"], facts["history"]
