"""Small archives in the formats of MNIST, CIFAR and SVHN, and a server to download them from."""

import gzip
import hashlib
import io
import pickle
import tarfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import scipy.io
from torchvision import datasets

from clustr_core import data
from tools.browser import served as served

Splits = dict[str, tuple[np.ndarray, np.ndarray]]


def pixels_and_labels(seed: int, count: int, shape: tuple[int, ...], classes: int) -> tuple[np.ndarray, np.ndarray]:
    """Random images (NCHW) and labels."""
    random = np.random.default_rng(seed)
    return random.integers(0, 256, (count, *shape), dtype=np.uint8), random.integers(0, classes, count)


def md5(path: Path) -> str:
    """What torchvision compares."""
    return hashlib.md5(path.read_bytes(), usedforsecurity=False).hexdigest()


class Python2Array:
    """Pickles as the arrays inside the original CIFAR archives do: their dtype was written by Python 2's NumPy."""

    class Dtype:
        """numpy.dtype("u1", 0, 1)."""

        def __reduce__(self):
            return np.dtype, ("u1", 0, 1), (3, "|", None, None, None, -1, -1, 0)

    def __init__(self, array: np.ndarray):
        self.array = array

    def __reduce__(self):
        state = (1, self.array.shape, self.Dtype(), False, self.array.tobytes())
        return np.arange(0).__reduce__()[0], (np.ndarray, (0,), b"b"), state


def mnist(folder: Path, url: str, patch: pytest.MonkeyPatch) -> Splits:
    """Four gzipped IDX files."""
    splits = {"train": pixels_and_labels(0, 30, (1, 28, 28), 10), "test": pixels_and_labels(1, 10, (1, 28, 28), 10)}
    resources = []
    for prefix, (pixels, labels) in zip(("train", "t10k"), splits.values(), strict=True):
        sizes = b"".join(size.to_bytes(4, "big") for size in (len(pixels), 28, 28))
        contents = {
            f"{prefix}-images-idx3-ubyte.gz": b"\x00\x00\x08\x03" + sizes + pixels.tobytes(),
            f"{prefix}-labels-idx1-ubyte.gz": b"\x00\x00\x08\x01" + sizes[:4] + labels.astype(np.uint8).tobytes(),
        }
        for name, content in contents.items():
            (folder / name).write_bytes(gzip.compress(content))
            resources.append((name, md5(folder / name)))
            part = f"{'train' if prefix == 'train' else 'test'}_{name.split('-')[1]}"
            patch.setitem(data._MNIST_MD5, part, hashlib.md5(content).hexdigest())
    patch.setattr(datasets.MNIST, "mirrors", [f"{url}/"])
    patch.setattr(datasets.MNIST, "resources", resources)
    return splits


def cifar(kind: type, label_key: str, classes: int, folder: Path, url: str, patch: pytest.MonkeyPatch) -> Splits:
    """A gzipped tar of pickles, as Python 2 wrote them."""
    parts = {"train": [name for name, _ in kind.train_list], "test": [name for name, _ in kind.test_list]}
    content, splits = {}, {}
    for part, names in parts.items():
        found = [pixels_and_labels(len(name) + i, 12, (3, 32, 32), classes) for i, name in enumerate(names)]
        splits[part] = tuple(np.concatenate(arrays) for arrays in zip(*found, strict=True))
        for name, (pixels, labels) in zip(names, found, strict=True):
            content[name] = {"data": Python2Array(pixels.reshape(len(pixels), -1)), label_key: labels.tolist()}
    content[kind.meta["filename"]] = {kind.meta["key"]: [f"class {c}" for c in range(classes)]}
    folder.joinpath("raw").mkdir()
    with tarfile.open(folder / kind.filename, "w:gz") as archive:
        for name, value in content.items():
            raw = pickle.dumps(value, protocol=2).replace(b"numpy._core.multiarray", b"numpy.core.multiarray")
            (folder / "raw" / name).write_bytes(raw)
            entry = tarfile.TarInfo(f"{kind.base_folder}/{name}")
            entry.size = len(raw)
            archive.addfile(entry, io.BytesIO(raw))
    patch.setattr(kind, "url", f"{url}/{kind.filename}")
    patch.setattr(kind, "tgz_md5", md5(folder / kind.filename))
    for part, names in parts.items():
        patch.setattr(kind, f"{part}_list", [[name, md5(folder / "raw" / name)] for name in names])
    patch.setattr(kind, "meta", kind.meta | {"md5": md5(folder / "raw" / kind.meta["filename"])})
    return splits


def svhn(folder: Path, url: str, patch: pytest.MonkeyPatch) -> Splits:
    """Two MATLAB files, in which the digit 0 has the label 10."""
    splits = {"train": pixels_and_labels(0, 30, (3, 32, 32), 10), "test": pixels_and_labels(1, 12, (3, 32, 32), 10)}
    files = {}
    for part, (pixels, labels) in splits.items():
        path = folder / f"{part}_32x32.mat"
        y = np.where(labels == 0, 10, labels).astype(np.uint8)[:, None]
        scipy.io.savemat(path, {"X": pixels.transpose(2, 3, 1, 0), "y": y})
        files[part] = [f"{url}/{path.name}", path.name, md5(path)]
    patch.setattr(datasets.SVHN, "split_list", files)
    return splits


MAKERS: dict[str, Callable[[Path, str, pytest.MonkeyPatch], Splits]] = {
    "mnist": mnist,
    "cifar10": partial(cifar, datasets.CIFAR10, "labels", 10),
    "cifar100": partial(cifar, datasets.CIFAR100, "fine_labels", 100),
    "svhn": svhn,
}
