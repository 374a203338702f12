"""A finished run on disk."""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args

import pandas as pd
import torch
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor, nn

from clustr_core import data
from clustr_core.models.classifiers import ClusterClassifier, LinearClassifier, Rule
from clustr_core.models.clusters import Clusters
from clustr_core.models.encoders import build_encoder, to_channels_last_frozen
from clustr_core.models.one_lipschitz import fold_parametrizations
from clustr_core.numerics.rounding import float32_by_default, full_precision
from clustr_core.storage.files import digest, read_json, seal_of
from clustr_core.storage.gate import TENSORS_LIMIT, VALUE_LIMIT, brief, listed, read_bytes, shortened
from clustr_core.storage.images import MOST_PIXELS_A_SIDE
from clustr_core.storage.tables import read_table
from clustr_core.storage.tensors import read_tensors
from clustr_core.training.names import DONE, HISTORY, WEIGHTS
from clustr_core.training.recipes import (
    Recipe,
    UnknownMethod,
    recipe_from_dict,
    recipe_to_dict,
    training_version,
)

_Network = TypeVar("_Network", bound=nn.Module)
WeightsDtype = Literal["float32", "float16"]
SNAPSHOT = "a snapshot"
# in an entry of `Run.trained_on`: after how many epochs it begins
AFTER = "after_epoch"
MOST_CLASSES = 100_000
_DTYPES = (torch.float32, torch.float16, torch.float64, torch.bfloat16, torch.int64, torch.int32, torch.uint8)
# what a file of weights may hold
_NAMES = re.compile(r"network\.(encoder\.|linear\.|(centroids|labels|variance)$)|clusters\.")


@dataclass(frozen=True)
class Run:
    """A finished run on disk.

    Args:
        weights_dtype: "float16" if the network was rounded when it was finished (`stored_dtype`); what is measured is
            the rounded network, computed in float32.
        trained_on: where it was trained, one entry and one more for each change: ``after_epoch``, ``device``,
            ``threads`` (of a CPU), ``processes``, ``captured``. Each of them sums in its own order, so a training that
            went on elsewhere is one that no single command repeats. A warm start's own run says where that was
            trained; a training that went on elsewhere before its first epoch ended is of there. Empty for runs that do
            not say.
        start_sha256: of the weights that it began from, of a run with a warm start; None for runs that do not say.
        snapshots: SHA-256 of the files of its snapshots, by the number of the epoch in digits; None for runs that do
            not say.
    """

    path: Path
    recipe: Recipe
    num_classes: int
    image_shape: tuple[int, int, int]
    train_data_sha256: str
    weights_dtype: WeightsDtype = "float32"
    trained_on: tuple[dict[str, Any], ...] = ()
    start_sha256: str | None = None
    snapshots: dict[str, str] | None = None

    @cached_property
    def weights_sha256(self) -> str:
        """SHA-256 of the file of weights: by this, rows that are measured know the model.

        Raises:
            ValueError: as `weights`.
        """
        return digest(self._as_written(WEIGHTS, "weights_sha256"))

    def check_data(self, dataset: data.Dataset) -> None:
        """Refuse data of the same name with other contents.

        Raises:
            ValueError: if these are not the training images and labels that the run saw.
        """
        check_digest(self.path, self.train_data_sha256, training_digest(self.recipe, dataset), dataset.name)

    def check_same(self) -> None:
        """Refuse a run that another took the place of, since its weights were first read.

        Raises:
            ValueError: if its weights are others, or damaged.
        """
        self._weights_file()

    @property
    def history(self) -> pd.DataFrame:
        """One row an epoch: ``epoch``, ``loss``, ``learning_rate``, and for cluster methods ``magnet``
        (the magnet term alone), ``variance`` (sigma^2 at its start) and ``coverage`` (share of the images it saw).

        Raises:
            ValueError: as `weights`.
        """
        self._as_written(HISTORY, "history_sha256")
        return read_table(self.path / HISTORY)

    def model(self, device: str | torch.device = "cpu") -> LinearClassifier | ClusterClassifier:
        """The classifier as its method defines it, in evaluation mode."""
        if self.recipe.clustered:
            return self.cluster_model(device)
        tensors = prefixed(self.weights(), "network.")
        _check_size(tensors, self.recipe, self.image_shape, self.num_classes, self.path / WEIGHTS)
        net = new_network(self.recipe, self.image_shape, self.num_classes)
        load_tensors(net, tensors, self.path / WEIGHTS)
        assert isinstance(net, LinearClassifier)
        return finished(net, device)

    def cluster_model(self, device: str | torch.device = "cpu", *, rule: Rule | None = None) -> ClusterClassifier:
        """The run's encoder with clusters of its training embeddings, whatever the method, in evaluation mode.

        Args:
            rule: None for the method's own, which is "soft" for a method without clusters.
        """
        rule = self.recipe.rule if rule is None else rule
        network = cluster_network(self.recipe, self.image_shape, self.weights(), rule, self.path / WEIGHTS)
        if network.clusters.num_classes != self.num_classes:
            found = network.clusters.num_classes
            raise ValueError(f"{self.path / WEIGHTS}: expected clusters of {self.num_classes} classes, got {found}")
        return finished(network, device)

    def encoder_at(self, epoch: int, device: str | torch.device = "cpu") -> nn.Module:
        """The encoder as it was after ``epoch`` epochs, for the epochs in ``recipe.snapshots``.

        Raises:
            ValueError: if the recipe kept no such snapshot, or the file is damaged, or of another epoch or run.
        """
        if epoch not in self.recipe.snapshots:
            raise ValueError(f"epoch: expected one of the snapshots {self.recipe.snapshots}, got {epoch}")
        path = snapshot_path(self.path, epoch)
        if not path.exists():
            raise FileNotFoundError(f"{path}: expected the snapshot of epoch {epoch}, got none: train the run again")
        tensors, facts = read_tensors(path, SNAPSHOT)
        said = (self.snapshots or {}).get(str(epoch))
        is_another = said not in (None, digest(read_bytes(path, limit=TENSORS_LIMIT)))
        if is_another or seal_of(facts) != seal_of(progress_facts(self.recipe, self.train_data_sha256, epoch)):
            found = f"epoch {facts.get('epoch')}" + ("" if facts.get("epoch") != epoch else " of another training")
            raise ValueError(f"{path}: expected the snapshot of epoch {epoch} of this run, got that of {found}")
        _check_size(tensors, self.recipe, self.image_shape, self.num_classes, path)
        net = new_network(self.recipe, self.image_shape, self.num_classes)
        load_tensors(net, tensors, path)
        return finished(net.encoder, device)

    def weights(self) -> dict[str, Tensor]:
        """All tensors of the file of weights: ``network.*`` and ``clusters.*``.

        Raises:
            ValueError: if it is damaged, or not the one that ``run.json`` speaks of.
        """
        content = self._weights_file()
        try:
            tensors = load(content)
        except (SafetensorError, KeyError, RuntimeError) as error:
            why = shortened(str(error))
            raise ValueError(f"{self.path / WEIGHTS}: expected weights, got a damaged file ({why})") from error
        if odd := [name for name in tensors if not _NAMES.match(name)]:
            raise ValueError(f"{self.path / WEIGHTS}: expected a network and its clusters, got {listed(odd)} besides")
        return tensors

    def _weights_file(self) -> bytes:
        """The file by which rows that are measured know the model: the same as long as this run is at hand."""
        content = self._as_written(WEIGHTS, "weights_sha256")
        # where the property is kept
        first = vars(self).setdefault("weights_sha256", found := digest(content))
        if found != first:
            raise ValueError(
                f"{self.path / WEIGHTS}: expected the weights {first[:10]} that were there at first, got {found[:10]}: "
                "the run was replaced meanwhile"
            )
        return content

    def _as_written(self, name: str, key: str) -> bytes:
        """A file of the run, held against what ``run.json`` says of it; runs of before say nothing of some."""
        said, content = read_json(self.path / DONE).get(key), read_bytes(self.path / name, limit=TENSORS_LIMIT)
        if said is not None and said != (found := digest(content)):
            raise ValueError(
                f"{self.path / name}: expected the file of sha256 {str(said)[:10]}, as {DONE} says, got {found[:10]}"
            )
        return content


# a network of such a width, for such images, with so many rows of a head, takes little memory whatever its file holds;
# and PyTorch takes seconds to get ready to plan some of them without numbers
SMALL_WIDTH, SMALL_IMAGE, SMALL_HEAD = 128, 3 * 64 * 64, 10_000


def _check_size(
    tensors: Mapping[str, Tensor],
    recipe: Recipe,
    image_shape: tuple[int, int, int],
    num_classes: int,
    where: Path | str,
) -> None:
    """Refuse a file with fewer numbers than a recipe's network has, before much memory is taken for that.

    Args:
        num_classes: 0 for an encoder alone.
    Raises:
        ValueError: if there are fewer.
    """
    rows = num_classes * (recipe.per_class if recipe.learnable_centroids else 1)
    if recipe.width <= SMALL_WIDTH and math.prod(image_shape) <= SMALL_IMAGE and rows <= SMALL_HEAD:
        return
    try:
        with torch.device("meta"):
            encoder = build_encoder(recipe.encoder, image_shape, width=recipe.width, dataset=recipe.dataset)
    except (RuntimeError, ValueError, TypeError):
        # one of somebody's own, which looks at its numbers as it is built
        return
    dim: int = encoder.embedding_dim  # pyright: ignore[reportAssignmentType]
    wanted = sum(tensor.numel() for tensor in encoder.state_dict().values()) + rows * dim
    if wanted > (found := sum(tensor.numel() for tensor in tensors.values())):
        raise ValueError(f"{where}: expected the {wanted:,} numbers of its recipe's network, got {found:,}")


def load_tensors(module: nn.Module, tensors: Mapping[str, Tensor], where: Path | str) -> None:
    """Give a module its tensors, which must be its own: no name more or less, each of its shape, all numbers finite.

    Args:
        where: the file that they come from.
    Raises:
        ValueError: if one is not; the file and the tensor are named, and the module stays as it was.
    """
    own = module.state_dict()
    if missing := sorted(own.keys() - tensors.keys()):
        raise ValueError(f"{where}: expected the tensors of its recipe, got none named {listed(missing)}")
    if more := sorted(tensors.keys() - own.keys()):
        raise ValueError(f"{where}: expected the tensors of its recipe, got {listed(more)} besides")
    for name, expected in own.items():
        check_tensor(tensors[name], expected, f"{where}: {name}")
    module.load_state_dict(tensors)


def check_tensor(found: Tensor, expected: Tensor, where: str) -> None:
    """Refuse a tensor of another shape or kind than the one that it is for, or with numbers that are not finite."""
    if found.shape != expected.shape or found.is_floating_point() != expected.is_floating_point():
        asked, got = ([str(each.dtype), list(each.shape)] for each in (expected, found))
        raise ValueError(f"{where}: expected a tensor like {asked[0]} {asked[1]}, got {got[0]} {got[1]}")
    if found.dtype not in _DTYPES:
        raise ValueError(f"{where}: expected one of {[str(dtype) for dtype in _DTYPES]}, got {found.dtype}")
    # as it will be used: a number may be too large for the dtype that takes it
    if found.is_floating_point() and not found.to(expected.dtype).isfinite().all():
        raise ValueError(f"{where}: expected finite numbers, got NaN or infinity")


def cluster_network(
    recipe: Recipe, image_shape: tuple[int, int, int], tensors: dict[str, Tensor], rule: Rule, where: Path | str
) -> ClusterClassifier:
    """The encoder and the clusters of a file of weights, in float32 whatever the file keeps, in training mode.

    Raises:
        ValueError: if they are not the recipe's; ``where`` begins the message.
    """
    own = prefixed(tensors, "network.encoder.")
    _check_size(own, recipe, image_shape, 0, where)
    with float32_by_default():
        encoder = build_encoder(recipe.encoder, image_shape, width=recipe.width, dataset=recipe.dataset)
    load_tensors(encoder, own, where)
    clusters = _clusters(prefixed(tensors, "clusters."), where)
    dim: int = encoder.embedding_dim  # pyright: ignore[reportAssignmentType]
    if clusters.centroids.shape[1] != dim:
        raise ValueError(f"{where}: expected centroids of {dim} dimensions, got {clusters.centroids.shape[1]}")
    return ClusterClassifier(encoder, clusters, rule=rule, neighbours=recipe.neighbours if rule == "soft" else None)


def _clusters(tensors: dict[str, Tensor], where: Path | str) -> Clusters:
    """The clusters of a file: as many labels as centroids and variances, and no class without one."""
    names = {"centroids", "labels", "variance"}
    if tensors.keys() != names:
        raise ValueError(f"{where}: expected clusters of {sorted(names)}, got {listed(sorted(tensors))}")
    centroids, labels = tensors["centroids"], tensors["labels"]
    if centroids.dim() != 2 or labels.dim() != 1 or len(centroids) != len(labels):
        raise ValueError(
            f"{where}: expected a label for each centroid, got {list(labels.shape)}, {list(centroids.shape)}"
        )
    check_tensor(centroids, torch.empty_like(centroids, dtype=torch.float32), f"{where}: centroids")
    check_tensor(tensors["variance"], torch.empty(len(labels)), f"{where}: variance")
    check_tensor(labels, torch.empty(len(labels), dtype=torch.int64), f"{where}: labels")
    # a label of 10^9 would ask for as many logits
    if not len(labels) or not 0 <= int(labels.min()) <= int(labels.max()) < len(labels):
        raise ValueError(f"{where}: expected clusters of classes from 0, none of them empty, got others")
    try:
        return Clusters(**tensors)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


def finished(network: _Network, device: str | torch.device) -> _Network:
    """A network as it is attacked and certified: in evaluation mode, and with channels last."""
    with full_precision(torch.device("cpu")):
        to_channels_last_frozen(fold_parametrizations(network))
    return network.to(device).eval()


def training_part(recipe: Recipe, dataset: data.Dataset) -> tuple[Tensor, Tensor]:
    """The training images and labels that a recipe takes: all, or ``train_examples`` of them, chosen by its seed."""
    if recipe.train_examples is None:
        return dataset.train_images, dataset.train_labels
    chosen = dataset.training_indices(recipe.train_examples, recipe.seed)
    return dataset.train_images[chosen], dataset.train_labels[chosen]


def training_digest(recipe: Recipe, dataset: data.Dataset) -> str:
    """SHA-256 of the training images and labels that a recipe takes: by this, a run knows its data."""
    if recipe.train_examples is None:
        return dataset.train_digest
    images, labels = training_part(recipe, dataset)
    return data.digest_of(images, labels)


def check_digest(path: Path, trained_on: str, found: str, name: str) -> None:
    """Refuse to use what was trained on other data of the same name.

    Raises:
        ValueError: if the two digests differ.
    """
    if trained_on != found:
        raise ValueError(
            f"{path} was trained on other data named {name!r} ({trained_on[:10]}) than those given ({found[:10]}); "
            "give folder= or move it away"
        )


def load_run(folder: str | Path, *, expected: Recipe | None = None) -> Run:
    """A finished run.

    Raises:
        FileNotFoundError: if there is none.
        ValueError: if it is of another recipe than ``expected``, or of another version of its training; if its method
            is not registered here; if the file is damaged.
    """
    folder = Path(folder)
    if not (folder / DONE).exists():
        made_by = "make figures, clustr train or fit(recipe) makes one"
        raise FileNotFoundError(f"folder: expected a finished run with {DONE} in {folder}, got none: {made_by}")
    content = read_json(folder / DONE)
    if (seal := content.pop("sha256", None)) is not None and seal != seal_of(content):
        raise ValueError(f"{folder / DONE}: expected the file as it was written, got a damaged one (another sha256)")
    try:
        recipe = recipe_from_dict(content["recipe"])
        channels, height, width = content["image_shape"]
        shape, dtype = (channels, height, width), content.get("weights_dtype", "float32")
        _check_facts(shape, content["num_classes"], content["train_data_sha256"], dtype)
        places = content.get("trained_on")
        if places is not None:
            check_places(places, recipe.epochs, folder / DONE)
        if not isinstance(start := content.get("start_sha256"), str | None):
            raise ValueError(f"start_sha256: expected a digest, got {brief(start)}")
        check_snapshots(snapshots := content.get("snapshots"), folder / DONE)
        facts = (content["num_classes"], shape, content["train_data_sha256"], dtype, tuple(places or ()), start)
        run = Run(folder, recipe, *facts, snapshots)
    except UnknownMethod as error:
        module = shortened(str(content.get("module")), VALUE_LIMIT)
        raise ValueError(f"{folder / DONE}: {error}; import {module}, which registers it") from error
    except (KeyError, TypeError, ValueError) as error:
        why = shortened(f"{type(error).__name__}: {error}", 300)
        raise ValueError(f"{folder / DONE}: expected a finished run, got a damaged file ({why})") from error
    if expected is not None and recipe != expected:
        raise ValueError(other_recipe(folder / DONE, recipe, expected))
    if expected is not None:
        check_version(folder / DONE, content.get("version"), expected)
    return run


def check_places(found: Any, epochs: int, where: Path) -> None:
    """Refuse what `Run.trained_on` cannot be.

    Raises:
        ValueError: if it is no list of places, each after more epochs than the one before.
    """
    places = found if isinstance(found, list) and len(found) <= epochs + 1 else [None]
    after = [place.get(AFTER) if isinstance(place, dict) else None for place in places]
    numbers = [number for number in after if type(number) is int and 0 <= number <= epochs]
    if numbers[:1] != [0] or numbers != after or numbers != sorted(set(numbers)):
        raise ValueError(f"{where}: expected in trained_on where each of its epochs was trained, got {brief(found)}")


def check_snapshots(found: Any, where: Path) -> None:
    """Refuse what `Run.snapshots` cannot be.

    Raises:
        ValueError: if it is not None, and no mapping of epochs to digests.
    """
    if found is not None and not (
        isinstance(found, dict) and all(key.isdecimal() and isinstance(value, str) for key, value in found.items())
    ):
        raise ValueError(f"{where}: expected in snapshots a digest of each, got {brief(found)}")


def _check_facts(shape: tuple[Any, ...], num_classes: Any, sha256: Any, dtype: Any) -> None:
    """What a run says of its data, before a network of that size is built."""
    counts = [("image_shape", side, MOST_PIXELS_A_SIDE) for side in shape] + [
        ("num_classes", num_classes, MOST_CLASSES)
    ]
    for name, count, most in counts:
        if type(count) is not int or not 1 <= count <= most:
            raise ValueError(f"{name}: expected whole numbers from 1 to {most:,}, got {brief(count)}")
    if not isinstance(sha256, str):
        raise ValueError(f"train_data_sha256: expected text, got {brief(sha256)}")
    if dtype not in get_args(WeightsDtype):
        raise ValueError(f"weights_dtype: expected one of {get_args(WeightsDtype)}, got {brief(dtype)}")


def new_network(
    recipe: Recipe, image_shape: tuple[int, int, int], num_classes: int
) -> LinearClassifier | ClusterClassifier:
    """The recipe's encoder, initialised from its seed, with what is trained along: a linear head, which the magnet loss
    leaves unused, or learnable centroids, still at 0."""
    with float32_by_default(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        encoder = build_encoder(recipe.encoder, image_shape, width=recipe.width, dataset=recipe.dataset)
        if next(encoder.parameters(), None) is None:
            raise ValueError(f"encoder: expected one with parameters to train, got {recipe.encoder!r} without")
        dim: int = encoder.embedding_dim  # pyright: ignore[reportAssignmentType]
        if not recipe.learnable_centroids:
            return LinearClassifier(encoder, dim, num_classes, orthonormal=recipe.orthonormal_head)
        labels = torch.arange(num_classes).repeat_interleave(recipe.per_class)
        blank = Clusters(torch.zeros(len(labels), dim), labels, torch.ones(len(labels)))
        return ClusterClassifier(encoder, blank, rule=recipe.rule, learnable=True)


def check_version(path: Path, found: str | None, recipe: Recipe) -> None:
    """Refuse to use what another version of the training left (files of version 1 may not say so).

    Raises:
        ValueError: if the version is not the recipe's today.
    """
    if (found or "1") != (expected := training_version(recipe)):
        got = shortened(str(found or 1), VALUE_LIMIT)
        raise ValueError(f"{path}: expected version {expected} of the training, got {got}; move it away")


def network_tensors(network: nn.Module) -> dict[str, Tensor]:
    """Everything that makes the network, laid out as a file wants it."""
    return {name: tensor.contiguous() for name, tensor in network.state_dict().items()}


def stored_dtype(recipe: Recipe, *, half: bool) -> WeightsDtype:
    """In which dtype a finished network's matrices and convolutions are kept; vectors, such as biases and the
    statistics of batch norm, and the clusters stay in float32.

    A method on a 1-Lipschitz encoder keeps all of it in float32, since rounded matrices are no longer orthonormal.
    """
    return "float16" if half and recipe.guarantee != "lipschitz" else "float32"


def check_stored_dtype(run: Run, *, half: bool) -> None:
    """Refuse a finished run whose weights are kept otherwise than asked for: rows of both would stand in one table.

    Raises:
        ValueError: if they are.
    """
    if run.weights_dtype != (expected := stored_dtype(run.recipe, half=half)):
        raise ValueError(
            f"half: expected {expected} weights with half={half}, got a finished run with {run.weights_dtype} in "
            f"{run.path}; move it away"
        )


@torch.no_grad()
def round_to_half(network: nn.Module) -> None:
    """Round a network's matrices and convolutions to half precision, in place; their dtype stays.

    Raises:
        ValueError: if a number is too large for half precision.
    """
    for name, tensor in network.state_dict().items():
        if _is_halved(tensor):
            tensor.copy_(tensor.half())
            if not tensor.isfinite().all():
                raise ValueError(f"half: expected weights of at most 65504 in size, got a larger one in {name}")


def stored_tensors(network: nn.Module, dtype: WeightsDtype) -> dict[str, Tensor]:
    """`network_tensors` of a network that `round_to_half` has rounded, or of any in float32, as they are kept."""
    tensors = network_tensors(network)
    if dtype == "float32":
        return tensors
    return {name: tensor.half() if _is_halved(tensor) else tensor for name, tensor in tensors.items()}


def _is_halved(tensor: Tensor) -> bool:
    return tensor.is_floating_point() and tensor.dim() >= 2


def progress_facts(recipe: Recipe, data_sha256: str, epoch: int) -> dict[str, Any]:
    """What a checkpoint or a snapshot is of."""
    about = {"recipe": recipe_to_dict(recipe), "version": training_version(recipe)}
    return {**about, "train_data_sha256": data_sha256, "epoch": epoch}


def snapshot_path(folder: Path, epoch: int) -> Path:
    """Where the weights after an epoch are kept."""
    return folder / "snapshots" / f"epoch-{epoch:04d}.safetensors"


def prefixed(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors whose names begin with a prefix, by the rest of their names."""
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def other_recipe(path: Path, found: Recipe, expected: Recipe) -> str:
    """What to say of a file that is of another recipe: the fields in which it differs."""
    left, right = recipe_to_dict(found), recipe_to_dict(expected)
    names = sorted(set(left) | set(right))
    differing = [f"{n} = {brief(left.get(n))}" for n in names if left.get(n) != right.get(n)]
    return f"{path}: expected a run of this recipe, got one with {shortened(', '.join(differing))}"
