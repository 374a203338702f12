"""All that an epoch changes, and the checkpoint that keeps it."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from clustr_core import data
from clustr_core.models.classifiers import ClusterClassifier, LinearClassifier
from clustr_core.storage.gate import brief, check_own, listed, shortened
from clustr_core.storage.provenance import order_of_sums
from clustr_core.storage.tensors import read_tensors, write_tensors
from clustr_core.training.captured import Recorder
from clustr_core.training.checks import images_in_a_batch
from clustr_core.training.names import CHECKPOINT, WEIGHTS
from clustr_core.training.processes import ALONE, Processes
from clustr_core.training.recipes import (
    Recipe,
    has_persistent_perturbation,
    recipe_from_dict,
)
from clustr_core.training.refresh import clustered, embedded
from clustr_core.training.run import (
    AFTER,
    SNAPSHOT,
    Run,
    check_digest,
    check_places,
    check_snapshots,
    check_tensor,
    check_version,
    load_tensors,
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
    # where it was trained, from which epoch on: one entry, and one more for each change
    trained_on: list[dict[str, Any]] = field(default_factory=list)
    # of the weights of the run that it started from
    start_sha256: str | None = None
    # SHA-256 of each snapshot so far, by its epoch in digits, as JSON has it
    snapshots: dict[str, str] = field(default_factory=dict)


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
        load_tensors(network, prefixed(start.weights(), "network."), start.path / WEIGHTS)
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
    state = State(network, optimiser, generator, sha256, perturbation, processes, record, local_statistics)
    state.start_sha256 = start and start.weights_sha256
    return state


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


def note_place(state: State) -> None:
    """Note where the training goes on from here: another number of threads or processes sums in another order."""
    sums = order_of_sums(state.processes.device)
    here = {**sums, "processes": state.processes.count, "captured": state.record is not None}
    before = [place for place in state.trained_on if place[AFTER] < state.epoch]
    goes_on = bool(before) and before[-1] == {**before[-1], **here}
    state.trained_on = before if goes_on else [*before, {AFTER: state.epoch, **here}]


def save_progress(folder: Path, recipe: Recipe, state: State) -> None:
    """The snapshot, if this epoch is one, and the checkpoint: one safetensors file that holds all a resume needs."""
    if not state.processes.first:
        return
    about = progress_facts(recipe, state.data_sha256, state.epoch)
    if state.epoch in recipe.snapshots:
        check_own(snapshot_path(folder, state.epoch).parent)
        path = snapshot_path(folder, state.epoch)
        state.snapshots[str(state.epoch)] = write_tensors(path, SNAPSHOT, network_tensors(state.network), about)
    packed = state.optimiser.state_dict()
    tensors = {f"network.{name}": tensor for name, tensor in network_tensors(state.network).items()}
    for index, slots in packed["state"].items():
        tensors |= {f"optimiser.{index}.{name}": tensor for name, tensor in slots.items() if tensor is not None}
    tensors["generator"] = state.generator.get_state()
    if state.perturbation is not None:
        tensors["perturbation"] = state.perturbation
    names = ("history", "trained_on", "start_sha256", "snapshots")
    progress = {name: getattr(state, name) for name in names}
    write_tensors(folder / CHECKPOINT, "a checkpoint", tensors, about | progress)


def checkpoint_facts(path: Path, recipe: Recipe, data_sha256: str) -> dict[str, Any]:
    """What a checkpoint says beside its tensors.

    Raises:
        ValueError: if it is damaged, or of another recipe, version or data.
    """
    return _checked(path, recipe, data_sha256)[1]


def check_checkpoint(path: Path, recipe: Recipe) -> None:
    """Refuse what is no checkpoint of a recipe, of whatever data.

    Raises:
        ValueError: if it is damaged, or of another recipe or version.
    """
    _check_progress(path, recipe, _of_recipe(path, recipe)[1])


def _checked(path: Path, recipe: Recipe, data_sha256: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    tensors, facts = _of_recipe(path, recipe)
    check_digest(path.parent, str(facts.get("train_data_sha256")), data_sha256, recipe.dataset)
    return tensors, facts


def _of_recipe(path: Path, recipe: Recipe) -> tuple[dict[str, Tensor], dict[str, Any]]:
    tensors, facts = read_tensors(path, "a checkpoint")
    try:
        found = recipe_from_dict(facts["recipe"])
    except (KeyError, TypeError, ValueError) as error:
        why = shortened(f"{type(error).__name__}: {error}", 300)
        raise ValueError(f"{path}: expected a checkpoint of a recipe, got a damaged file ({why})") from error
    if found != recipe:
        raise ValueError(other_recipe(path, found, recipe))
    check_version(path, facts.get("version"), recipe)
    return tensors, facts


def _check_progress(path: Path, recipe: Recipe, facts: dict[str, Any]) -> None:
    """After as many epochs as a recipe has at most, with a row of numbers for each."""
    epoch, history = facts.get("epoch"), facts.get("history")
    if type(epoch) is not int or not 0 <= epoch <= recipe.epochs:
        raise ValueError(f"{path}: expected an epoch in 0..{recipe.epochs}, got {brief(epoch)}")
    if not isinstance(history, list) or len(history) != epoch:
        raise ValueError(f"{path}: expected a history of {epoch} epochs, got {brief(history)}")
    for number, row in enumerate(history, start=1):
        numeric = isinstance(row, dict) and all(type(value) in (int, float) for value in row.values())
        if not numeric or row.get("epoch") != number or "loss" not in row:
            raise ValueError(f"{path}: expected numbers of epoch {number} in its history, got {brief(row)}")

    check_places(facts.get("trained_on"), epoch, path)
    if not isinstance(start := facts.get("start_sha256"), str | None):
        raise ValueError(f"{path}: expected in start_sha256 a digest, got {brief(start)}")
    check_snapshots(facts.get("snapshots"), path)


def _check_rest(path: Path, state: State, tensors: dict[str, Tensor], epoch: int) -> None:
    """Beside the network: the generator's state, free training's perturbation, and the optimiser's of each weight that
    it has moved, all of it; one that an encoder does not use has none."""
    expected = {"generator": state.generator.get_state()}
    if state.perturbation is not None:
        expected["perturbation"] = state.perturbation
    momenta = ("momentum_buffer",) if isinstance(state.optimiser, torch.optim.SGD) else ("exp_avg", "exp_avg_sq")
    weights = dict(enumerate(trained_weights(state) if epoch else ()))
    moved = [index for index in weights if any(name.startswith(f"optimiser.{index}.") for name in tensors)]
    for index in moved or weights:
        expected |= {f"optimiser.{index}.{name}": weights[index] for name in momenta}
        if len(momenta) > 1:
            expected[f"optimiser.{index}.step"] = torch.tensor(0.0)
    found = {name: tensor for name, tensor in tensors.items() if not name.startswith("network.")}
    if missing := sorted(expected.keys() - found.keys()):
        raise ValueError(f"{path}: expected the state of its recipe, got none of {listed(missing)}")
    if more := sorted(found.keys() - expected.keys()):
        raise ValueError(f"{path}: expected the state of its recipe, got {listed(more)} besides")
    for name, tensor in found.items():
        check_tensor(tensor, expected[name], f"{path}: {name}")
    steps = {float(found[f"optimiser.{index}.step"]) for index in moved if f"optimiser.{index}.step" in found}
    if len(steps) > 1 or any(step < epoch or step != int(step) for step in steps):
        raise ValueError(f"{path}: expected one number of updates, at least {epoch}, got {listed(sorted(steps))}")


def data_kept(path: Path) -> str:
    """The digest of the training data of a checkpoint.

    Raises:
        ValueError: if it is damaged.
    """
    return str(read_tensors(path, "a checkpoint")[1].get("train_data_sha256"))


def epochs_kept(path: Path) -> int:
    """After how many epochs a checkpoint was written.

    Raises:
        ValueError: if it is damaged.
    """
    epoch = read_tensors(path, "a checkpoint")[1].get("epoch")
    if type(epoch) is not int:
        raise ValueError(f"{path}: expected the number of an epoch, got {brief(epoch)}")
    return epoch


def load_checkpoint(path: Path, recipe: Recipe, state: State) -> None:
    """Go on from a checkpoint, which must be of this recipe and of these data."""
    tensors, facts = _checked(path, recipe, state.data_sha256)
    _check_progress(path, recipe, facts)
    _check_rest(path, state, tensors, facts["epoch"])
    load_tensors(state.network, prefixed(tensors, "network."), path)
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
    try:
        state.generator.set_state(tensors["generator"])
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"{path}: expected the state of a generator, got another ({shortened(str(error))})") from error
    if state.perturbation is not None:
        state.perturbation.copy_(tensors["perturbation"])
    state.epoch, state.history, state.trained_on = facts["epoch"], facts["history"], facts["trained_on"]
    # whatever is here of that name now; checkpoints of before do not say
    state.start_sha256, state.snapshots = facts.get("start_sha256"), facts.get("snapshots") or {}
