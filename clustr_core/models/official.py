"""The authors' released models: their file format, in and out.

A clustered file is a dict with ``state_dict`` and the six `CLUSTER_KEYS`, for images normalised outside the model. A
bare state dict is a baseline without clusters, for raw pixels. Both hold a ResNet-18 with its linear head, which a
clustered model does not use.
"""

import io
import operator
import re
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from statistics import mode
from typing import Any, TypeGuard

import torch
from jaxtyping import Float, Int
from torch import Tensor

from clustr_core.models.classifiers import ClusterClassifier, LinearClassifier
from clustr_core.models.clusters import Clusters
from clustr_core.models.encoders import PIXEL_STATISTICS, ResNet18
from clustr_core.storage.files import written_whole
from clustr_core.storage.gate import RELEASED_LIMIT, VALUE_LIMIT, brief, listed, read_bytes, shortened, shown
from clustr_core.storage.pickles import NotPlain, check_pickles

CLUSTER_KEYS = ("cluster_classes", "cluster_centers", "variance", "L", "K", "normalize_probs")
NUM_CLASSES = {"cifar10": 10, "cifar100": 100, "svhn": 10}

_STATISTICS = {
    "cifar10": PIXEL_STATISTICS["cifar"],
    "cifar100": PIXEL_STATISTICS["cifar"],
    "svhn": PIXEL_STATISTICS["svhn"],
}
_RAW_PIXELS = ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
_WRAPPERS = re.compile(r"^(module\.|model\.)+")
_COUNTER = "num_batches_tracked"

# of a class, and voters
MOST_CLUSTERS = 1_000_000
LONGEST_NAME = 1000
# numbers in a message
LISTED = 12

Statistics = tuple[tuple[float, ...], tuple[float, ...]]


def load_official(path: str | Path, *, dataset: str) -> ClusterClassifier | LinearClassifier:
    """A released model as a classifier of images in [0, 1]; reading it never executes pickled code.

    A clustered file gives log-scores g_c(z) = log sum_{j in c} exp(-d_j^2 / (2 sigma_j^2)), with the dataset's pixel
    normalisation folded into the encoder. With ``normalize_probs`` only the ``L`` nearest centroids vote; without
    it the released code computes them and does not use them, so all vote. A bare state dict gives the linear head on
    raw pixels. The model is in evaluation mode, on the CPU, in float32; its width is that of the file. Wrapper
    prefixes (``model.``, ``module.``), metadata beside ``state_dict`` and absent batch counters are all right.

    CIFAR-10 and SVHN files have the same shapes: nothing in the file can tell a wrong ``dataset`` among these two.

    Args:
        dataset: "cifar10", "cifar100" or "svhn"; picks the number of classes and the pixel statistics.
    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the dataset is unknown or has another number of classes; if the file is truncated, damaged or
            wants to run code; if keys, names, shapes or values are off: missing, extra and misshapen ones are listed.
    Source: Alfarra et al. 2021, released code and models. Deviations: logarithms of the scores, finite where these
        underflow (the released code then answers class 0); distances from differences, not from an expansion that
        cancels; where a cluster key is absent the released code takes the file for a baseline, this refuses it. Should
        variances differ between clusters, which the released training never writes, the L voters are the nearest
        centroids, not those of the highest scores.
    """
    return official_model(read_bytes(Path(path), limit=RELEASED_LIMIT), Path(path), dataset=dataset)


def official_model(written: bytes, path: Path, *, dataset: str) -> ClusterClassifier | LinearClassifier:
    """As `load_official`, from the bytes of a file: who tells the file by them tells what was loaded.

    Args:
        path: what the file is called in a message.
    """
    if dataset not in NUM_CLASSES:
        raise ValueError(f"dataset: expected one of {sorted(NUM_CLASSES)}, got {dataset!r}")
    content = saved_content(written, path)
    try:
        return _model(content, dataset).eval()
    except ValueError as error:
        raise ValueError(shortened(f"{shown(path)}: {error}")) from error
    # what PyTorch says of tensors of rare kinds
    except (RuntimeError, NotImplementedError, TypeError) as error:
        raise ValueError(shortened(f"{shown(path)}: expected plain tensors, got others ({error})")) from error


def save_official(path: str | Path, model: ClusterClassifier, *, dataset: str) -> None:
    """Write a cluster classifier as the released code reads it; `load_official` gives the same logits back.

    Clusters are put in the order of their classes, which the released code assumes, and the unused head is zero. L is
    the number of voters, K the clusters of a class, and the pixel normalisation is left out, as it is in these files.

    Args:
        model: a `ResNet18` under the soft rule, with the same number of clusters for each class.
        dataset: the one whose pixel statistics the encoder applies.
    Raises:
        ValueError: if the format has no room for the model.
        OSError: as the file system says, with nothing left behind.
    """
    encoder, per_class = _check_savable(model, dataset)
    order = model.labels.argsort(stable=True)
    count, classes = len(order), NUM_CLASSES[dataset]
    state = {name: value for name, value in encoder.state_dict().items() if not name.startswith("normalize.")}
    state["linear.weight"] = torch.zeros(classes, encoder.embedding_dim)
    state["linear.bias"] = torch.zeros(classes)
    content = {
        "state_dict": {name: value.detach().cpu() for name, value in state.items()},
        "cluster_classes": model.labels[order].cpu(),
        "cluster_centers": model.centroids[order].cpu(),
        "variance": model.variance[order].cpu(),
        "L": min(model.neighbours or count, count),
        "K": per_class,
        "normalize_probs": model.neighbours is not None,
    }
    buffer = io.BytesIO()
    torch.save(content, buffer)
    with written_whole(Path(path), asked_for=True) as temporary:
        temporary.write_bytes(buffer.getvalue())


def _check_savable(model: ClusterClassifier, dataset: str) -> tuple[ResNet18, int]:
    """The encoder and the number of clusters of each class."""
    if dataset not in NUM_CLASSES:
        raise ValueError(f"dataset: expected one of {sorted(NUM_CLASSES)}, got {dataset!r}")
    if model.rule != "soft":
        raise ValueError(f'model: expected rule "soft", the only one of the released code, got {model.rule!r}')
    encoder = model.encoder
    if not isinstance(encoder, ResNet18):
        raise ValueError(f"model: expected a ResNet18 encoder, got {type(encoder).__name__}")
    own = (encoder.normalize.mean, encoder.normalize.std)
    for name, values, expected in zip(("mean", "std"), own, _STATISTICS[dataset], strict=True):
        if not torch.equal(values.flatten().cpu().float(), torch.tensor(expected, dtype=torch.float32)):
            got = [round(v, 6) for v in values.flatten().tolist()]
            raise ValueError(f"dataset: expected an encoder with the {name} of {dataset}, {list(expected)}, got {got}")
    counts = torch.bincount(model.labels).tolist()
    if len(counts) != NUM_CLASSES[dataset] or len(set(counts)) != 1:
        raise ValueError(
            f"model: expected equally many clusters for each of the {NUM_CLASSES[dataset]} classes of {dataset}, "
            f"got {counts}"
        )
    return encoder, counts[0]


def saved_content(data: bytes, path: Path) -> object:
    """What a file of tensors and plain values says, in either format of torch.save.

    NumPy scalars and arrays are refused with all other classes: the format as it is described needs none.
    """
    try:
        is_archive = data.startswith(b"PK\x03\x04")
        # the older format: a magic number, a version, sizes of this machine, the content, the keys of its storages
        keys = None if is_archive else check_pickles(data, 5)
        with warnings.catch_warnings():
            # on the pickle's protocol and the like: whether it can be read is what counts
            warnings.simplefilter("ignore")
            content = torch.load(
                io.BytesIO(_packed_again(data) if is_archive else data), map_location="cpu", weights_only=True
            )
        if keys is not None:
            _check_storages(content, keys, len(data))
        return content
    except NotPlain as error:
        raise ValueError(
            f"{path}: expected only tensors and plain values, got a pickle that asks for "
            f"{shortened(str(error), VALUE_LIMIT)}; refused, nothing of it was executed"
        ) from error
    except Exception as error:  # a damaged stream may raise anything
        raise ValueError(
            f"{path}: expected a file of torch.save with tensors and plain values only, got something truncated, "
            f"damaged or foreign ({type(error).__name__}); nothing of it was executed"
        ) from error


def _packed_again(data: bytes) -> bytes:
    """A file of torch.save with its records as they were looked at: not compressed, none inside another, each with its
    checksum, which torch.load does not compare, and one pickle.

    PyTorch is not given the file itself, in which its own reader might find other records: it takes names without
    regard to case, and the directory from another place.
    """
    packed = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as archive, zipfile.ZipFile(packed, "w") as again:
        records = archive.infolist()
        names = [record.filename.partition("/")[2].lower() for record in records]
        if len(set(names)) < len(names) or names.count("data.pkl") != 1:
            raise zipfile.BadZipFile("records of one name, or no pickle")
        if any(record.compress_type != zipfile.ZIP_STORED for record in records):
            raise zipfile.BadZipFile("compressed records")
        if sum(record.file_size for record in records) > len(data):
            raise zipfile.BadZipFile("records that overlap")
        for name, record in zip(names, records, strict=True):
            # which compares its checksum
            content = archive.read(record)
            if name == "data.pkl":
                check_pickles(content)
            again.writestr(f"archive/{name}", content)
    return packed.getvalue()


def _check_storages(content: object, keys: set[str], size: int) -> None:
    """In the older format a tensor's memory is as large as it says, and stays as it was found unless its key is listed.

    Args:
        keys: of the storages that the file holds.
        size: of the file, in bytes.
    """
    waiting, seen, storages = [content], set(), {}
    while waiting:
        each = waiting.pop()
        if id(each) in seen:
            continue
        seen.add(id(each))
        if isinstance(each, Tensor) and each.layout is torch.strided:
            storages[each.untyped_storage().data_ptr()] = each.untyped_storage().nbytes()
        elif isinstance(each, Mapping):
            waiting += each.values()
        elif isinstance(each, list | tuple | set):
            waiting += each
    if sum(storages.values()) > size or len(storages) > len(keys):
        raise ValueError("tensors that the file does not hold")


def _model(content: object, dataset: str) -> ClusterClassifier | LinearClassifier:
    if not isinstance(content, Mapping):
        raise ValueError(f"checkpoint: expected a dict, got {type(content).__name__}")
    clustered = "state_dict" in content or any(key in content for key in CLUSTER_KEYS)
    if not clustered:
        return _baseline(_released_tensors(content, dataset), dataset)
    missing = [key for key in ("state_dict", *CLUSTER_KEYS) if key not in content]
    if missing:
        raise ValueError(
            f"checkpoint: expected the keys state_dict, {', '.join(CLUSTER_KEYS)} (or a bare state dict), "
            f"missing {', '.join(missing)}"
        )
    tensors = _released_tensors(content["state_dict"], dataset)
    clusters, neighbours = _clusters(content, dataset, tensors["linear.weight"].shape[1])
    return ClusterClassifier(_encoder(tensors, _STATISTICS[dataset]), clusters, neighbours=neighbours)


def _baseline(tensors: dict[str, Tensor], dataset: str) -> LinearClassifier:
    encoder = _encoder(tensors, _RAW_PIXELS)
    with torch.device("meta"):
        model = LinearClassifier(encoder, encoder.embedding_dim, NUM_CLASSES[dataset])
    model.linear.load_state_dict({name: tensors[f"linear.{name}"] for name in ("weight", "bias")}, assign=True)
    return model


def _encoder(tensors: dict[str, Tensor], statistics: Statistics) -> ResNet18:
    """The encoder around these tensors; built without storage, so that no random number is drawn."""
    mean, std = statistics
    with torch.device("meta"):
        encoder = ResNet18(width=len(tensors["conv1.weight"]), mean=mean, std=std)
    own = {name: value for name, value in tensors.items() if not name.startswith("linear.")}
    for name, values in (("mean", mean), ("std", std)):
        own[f"normalize.{name}"] = torch.tensor(values, dtype=torch.float32).reshape(-1, 1, 1)
    encoder.load_state_dict(own, assign=True)
    return encoder


def _released_shapes(width: int, num_classes: int) -> dict[str, torch.Size]:
    """Name and shape of everything in the state dict of a released ResNet-18."""
    with torch.device("meta"):
        own = ResNet18(width=width, mean=_RAW_PIXELS[0], std=_RAW_PIXELS[1]).state_dict()
    shapes = {name: value.shape for name, value in own.items() if not name.startswith("normalize.")}
    return shapes | {
        "linear.weight": torch.Size([num_classes, 8 * width]),
        "linear.bias": torch.Size([num_classes]),
    }


def _released_tensors(state: object, dataset: str) -> dict[str, Tensor]:
    """The tensors of a state dict under their released names, in float32; all of them, and nothing else."""
    named = _unwrapped(state)
    num_classes = NUM_CLASSES[dataset]
    head = named.get("linear.weight")
    if isinstance(head, Tensor) and head.dim() == 2 and len(head) != num_classes:
        raise ValueError(
            f"dataset: expected a model of {num_classes} classes for {dataset}, got a linear head of {len(head)}"
        )
    width = _width(named)
    shapes = _released_shapes(width, num_classes)
    _check_names_and_shapes(named, shapes, width)
    tensors = {name: _cast(named, name) for name in shapes}
    damaged = [name for name, value in tensors.items() if not value.isfinite().all()]
    if damaged:
        raise ValueError(f"state_dict: expected finite values, got NaN or infinity in {listed(damaged)}")
    negative = [name for name, value in tensors.items() if name.endswith("running_var") and (value < 0).any()]
    if negative:
        raise ValueError(f"state_dict: expected variances of at least 0, got negative ones in {listed(negative)}")
    return tensors


def _unwrapped(state: object) -> dict[str, Any]:
    """Names without the prefixes that wrappers put before them."""
    if not isinstance(state, Mapping):
        raise ValueError(f"state_dict: expected a dict of tensors, got {type(state).__name__}")
    named: dict[str, Any] = {}
    for key, value in state.items():
        if not isinstance(key, str) or len(key) > LONGEST_NAME:
            raise ValueError(f"state_dict: expected names, got {brief(key)}")
        name = _WRAPPERS.sub("", key)
        if name in named:
            raise ValueError(f"state_dict: expected each name once, got {name} with and without a prefix")
        named[name] = value
    return named


def _width(named: dict[str, Any]) -> int:
    """The width that most tensors agree on, so that an error names only those that do not."""
    unit = _released_shapes(1, 1)
    lengths = {name: len(v) for name, v in named.items() if name in unit and isinstance(v, Tensor) and v.dim()}
    widths = [length // unit[name][0] for name, length in lengths.items() if not name.startswith("linear.")]
    return max(mode(widths), 1) if widths else 64


def _check_names_and_shapes(named: dict[str, Any], shapes: dict[str, torch.Size], width: int) -> None:
    # files from before torch 0.4.1 have no counters, and evaluation does not use them
    missing = [name for name in shapes if name not in named and not name.endswith(_COUNTER)]
    extra = [name for name in named if name not in shapes]
    misshapen = [
        f"{name} (expected {list(shape)}, got {_describe(named[name])})"
        for name, shape in shapes.items()
        if name in named and not _fits(named[name], shape, integer=name.endswith(_COUNTER))
    ]
    lists = {"missing": missing, "extra": extra, "misshapen": misshapen}
    found = "; ".join(f"{kind} {listed(names)}" for kind, names in lists.items() if names)
    if found:
        raise ValueError(f"state_dict: expected the parameters of a ResNet-18 of width {width}, got {found}")


def _fits(value: object, shape: torch.Size, *, integer: bool = False, repeated: bool = False) -> TypeGuard[Tensor]:
    if not isinstance(value, Tensor) or value.shape != shape:
        return False
    dense = value.layout is torch.strided and value.device.type == "cpu"
    integral = not (value.is_floating_point() or value.is_complex() or value.is_quantized)
    # a few numbers may pass for as many as a shape says, as the released variance does
    held = dense and (repeated or value.numel() * value.element_size() <= value.untyped_storage().nbytes())
    return held and (integral if integer else value.is_floating_point())


def _describe(value: object) -> str:
    if not isinstance(value, Tensor):
        return type(value).__name__
    odd = [] if value.is_floating_point() else [str(value.dtype)]
    odd += [] if value.layout is torch.strided else [str(value.layout)]
    repeated = not odd and value.numel() * value.element_size() > value.untyped_storage().nbytes()
    odd += ["of fewer numbers, repeated"] if repeated else []
    return " ".join([str(list(value.shape)), *odd])


def _cast(named: dict[str, Any], name: str) -> Tensor:
    """A copy of its own, since a file may let tensors share memory; an absent counter is zero."""
    if name.endswith(_COUNTER):
        return torch.tensor(int(named.get(name, 0)))
    return _float32(named[name])


def _float32(value: Tensor) -> Tensor:
    return value.detach().to(torch.float32, copy=True, memory_format=torch.contiguous_format)


def _clusters(content: Mapping[str, Any], dataset: str, dim: int) -> tuple[Clusters, int | None]:
    """The clusters and how many of them vote."""
    num_classes, per_class = NUM_CLASSES[dataset], _positive(content, "K")
    count = num_classes * per_class
    normalize = content["normalize_probs"]
    if not isinstance(normalize, bool):
        raise ValueError(f"normalize_probs: expected True or False, got {brief(normalize)}")
    labels = _cluster_classes(content["cluster_classes"], dataset, per_class, in_order=not normalize)
    centers = content["cluster_centers"]
    if not _fits(centers, torch.Size([count, dim])):
        raise ValueError(
            f"cluster_centers: expected {[count, dim]}, K={per_class} for each of {num_classes} classes in the "
            f"encoder's {dim} dimensions, got {_describe(centers)}"
        )
    if not centers.isfinite().all():
        raise ValueError("cluster_centers: expected finite values, got NaN or infinity")
    if not _float32(centers).square().sum(dim=1).isfinite().all():
        largest = brief(centers.abs().max().item())
        raise ValueError(f"cluster_centers: expected values whose squares single precision holds, got {largest}")
    clusters = Clusters(_float32(centers), labels, _variance(content["variance"], count))
    if not normalize:
        return clusters, None
    neighbours = _positive(content, "L")
    if neighbours > count:
        raise ValueError(f"L: expected at most the number of clusters, {count}, got {neighbours}")
    return clusters, neighbours


def _positive(content: Mapping[str, Any], key: str) -> int:
    try:
        value = operator.index(content[key])
    except TypeError:
        raise ValueError(f"{key}: expected a positive integer, got {brief(content[key])}") from None
    if value < 1:
        raise ValueError(f"{key}: expected a positive integer, got {brief(value)}")
    if value > MOST_CLUSTERS:
        raise ValueError(f"{key}: expected at most {MOST_CLUSTERS:,}, got {brief(value)}")
    return value


def _cluster_classes(value: object, dataset: str, per_class: int, *, in_order: bool) -> Int[Tensor, " cluster"]:
    """The class of each cluster.

    Args:
        in_order: without ``normalize_probs`` the released code goes by position: cluster j is of class j // K.
    """
    num_classes = NUM_CLASSES[dataset]
    count = num_classes * per_class
    if not _fits(value, torch.Size([count]), integer=True):
        raise ValueError(
            f"cluster_classes: expected [{count}] classes, K={per_class} clusters for each of the {num_classes} "
            f"classes of {dataset}, got {_describe(value)}"
        )
    labels = value.to(torch.int64, copy=True, memory_format=torch.contiguous_format)
    expected = torch.arange(num_classes).repeat_interleave(per_class)
    if not torch.equal(labels if in_order else labels.sort().values, expected):
        order = ", in this order (normalize_probs is False)" if in_order else ""
        raise ValueError(
            f"cluster_classes: expected each of 0, ..., {num_classes - 1} {per_class} times{order}, "
            f"got [{listed(labels.tolist(), most=LISTED)}]"
        )
    return labels


def _variance(value: object, count: int) -> Float[Tensor, " cluster"]:
    """sigma^2 of each cluster, from one for each or one for all."""
    try:
        tensor = torch.tensor(float(value)) if isinstance(value, int | float) else value
    except OverflowError:
        raise ValueError(f"variance: expected a number, got {brief(value)}") from None
    shapes = ([], [1], [count])
    if not isinstance(tensor, Tensor) or not any(_fits(tensor, torch.Size(shape), repeated=True) for shape in shapes):
        raise ValueError(f"variance: expected a number or [{count}], one for each cluster, got {_describe(value)}")
    return _float32(tensor.expand(count))
