"""Datasets: what is loaded is what lies on disk, and what cannot be used is refused by name."""

import errno
import os
import re
import struct
import zlib
from dataclasses import replace
from urllib.error import URLError

import archives
import numpy as np
import pytest
import torch
from disk import files_of_at_most
from PIL import Image
from scipy.stats import chisquare

from clustr_core import cli, data
from clustr_core.storage import files
from clustr_core.storage.tensors import read_tensors, write_tensors


@pytest.fixture(scope="module")
def digits():
    return data.load_dataset("digits")


@pytest.mark.parametrize(
    ("name", "shape", "train", "test"), [("digits", (1, 8, 8), 1437, 360), ("mnist5k", (1, 28, 28), 4000, 1000)]
)
def test_embedded_datasets(name, shape, train, test):
    found, again = data.load_dataset(name), data.load_dataset(name)
    assert found.name == name
    assert found.image_shape == shape
    assert found.num_classes == 10
    assert found.class_names == tuple("0123456789")
    assert (len(found.train_images), len(found.test_images)) == (train, test)
    assert found.train_images.dtype == torch.uint8
    assert found.train_labels.dtype == found.test_labels.dtype == torch.int64
    assert found.train_images.max() == 255
    for part in ("train_images", "train_labels", "test_images", "test_labels"):
        assert torch.equal(getattr(found, part), getattr(again, part))
    shares = torch.bincount(found.test_labels) / torch.bincount(torch.cat([found.train_labels, found.test_labels]))
    assert ((shares - 0.2).abs() < 0.01).all()


def test_the_two_parts_are_disjoint_and_complete(digits):
    from sklearn.datasets import load_digits

    rows = torch.cat([digits.train_images, digits.test_images]).flatten(1)
    original = np.rint(load_digits().data * 255 / 16).astype(np.uint8)
    assert sorted(map(tuple, rows.tolist())) == sorted(map(tuple, original.tolist()))


def test_labels_stay_with_their_images(digits):
    from sklearn.datasets import load_digits

    source = load_digits()
    label_of = {row.tobytes(): y for row, y in zip(source.data.astype(np.uint8), source.target, strict=True)}
    for image, label in zip(digits.test_images, digits.test_labels.tolist(), strict=True):
        assert label_of[(image.numpy() * (16 / 255)).round().astype(np.uint8).tobytes()] == label


def test_bytes_become_floats_in_the_unit_range():
    images = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16)
    floats = data.to_float(images)
    assert floats.dtype == torch.float32
    assert floats.flatten().tolist() == pytest.approx([i / 255 for i in range(256)], rel=1e-7)
    assert images.flatten()[255] == 255


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.int64])
def test_what_is_no_bytes_is_not_converted_twice(as_installed, dtype):
    images = torch.ones(1, 1, 4, 4, dtype=dtype)
    with pytest.raises(ValueError, match=rf"images: expected bytes \(torch.uint8\), got {dtype}"):
        data.to_float(images)
    assert (images == 1).all()


def noise(count, shape=(3, 7, 6), seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randint(1, 256, (count, *shape), generator=g, dtype=torch.uint8)


def crop_of(image, out, padding):
    """(row, column, mirrored) of the one crop of an image that equals ``out``, found by trying all."""
    channels, height, width = image.shape
    padded = np.zeros((channels, height + 2 * padding, width + 2 * padding), dtype=np.uint8)
    padded[:, padding : padding + height, padding : padding + width] = image.numpy()
    found = []
    for row in range(2 * padding + 1):
        for column in range(2 * padding + 1):
            crop = padded[:, row : row + height, column : column + width]
            found += [(row, column, m) for m, c in enumerate((crop, crop[:, :, ::-1])) if np.array_equal(c, out)]
    assert len(found) == 1
    return found[0]


def test_each_image_is_one_of_its_own_crops_evenly_drawn():
    images = noise(600)
    out = data.random_crop_flip(images, generator=torch.Generator().manual_seed(0), padding=2)
    assert out.dtype == torch.uint8
    assert out.shape == images.shape
    found = [crop_of(image, crop.numpy(), 2) for image, crop in zip(images, out, strict=True)]
    for position, values in enumerate((5, 5, 2)):
        assert chisquare(np.bincount([f[position] for f in found], minlength=values)).pvalue > 1e-3
    pairs = np.bincount([5 * row + column for row, column, _ in found], minlength=25)
    assert chisquare(pairs).pvalue > 1e-3


def test_augmentation_follows_its_generator_and_leaves_its_input():
    images = noise(50)
    before = images.clone()
    outs = [data.random_crop_flip(images, generator=torch.Generator().manual_seed(s)) for s in (3, 3, 4)]
    assert torch.equal(outs[0], outs[1])
    assert not torch.equal(outs[0], outs[2])
    assert torch.equal(images, before)


def test_crops_alone_mirror_nothing_and_no_padding_moves_nothing():
    images = noise(80)
    g = torch.Generator().manual_seed(0)
    out = data.random_crop_flip(images, generator=g, padding=1, flip=False)
    assert not any(crop_of(image, crop.numpy(), 1)[2] for image, crop in zip(images, out, strict=True))
    assert torch.equal(data.random_crop_flip(images, generator=g, padding=0, flip=False), images)
    with pytest.raises(ValueError, match="padding: expected 0 or more pixels, got -1"):
        data.random_crop_flip(images, generator=g, padding=-1)


def test_unknown_name():
    with pytest.raises(ValueError, match=r"name: expected one of \['cifar10', .*\] or folder:PATH, got 'imagenet'"):
        data.load_dataset("imagenet")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"class_names": ("a",)}, "expected at least two classes"),
        ({"train_images": torch.zeros(2, 1, 4, 4)}, r"train_images: expected uint8 .* got torch.float32"),
        ({"test_images": torch.zeros(2, 4, 4, dtype=torch.uint8)}, r"test_images: expected uint8 of shape"),
        ({"train_labels": torch.tensor([0.0, 1.0])}, "train_labels: expected integers, got torch.float32"),
        ({"train_labels": torch.tensor([False, True])}, "train_labels: expected integers, got torch.bool"),
        ({"train_labels": torch.tensor([[0], [1]])}, r"train_labels: expected shape \[2\], got \[2, 1\]"),
        ({"train_labels": torch.tensor([0])}, "train_labels: expected one for each of 2 images, got 1"),
        ({"test_labels": torch.tensor([0, 2])}, r"test_labels: expected classes in 0\.\.1, got 0 to 2"),
        ({"test_labels": torch.tensor([0, -1])}, r"test_labels: expected classes in 0\.\.1, got -1 to 0"),
    ],
)
def test_datasets_that_do_not_hold_together(as_installed, changes, message):
    images, labels = torch.zeros(2, 1, 4, 4, dtype=torch.uint8), torch.tensor([0, 1])
    good = data.Dataset("toy", images, labels, images, labels, ("a", "b"))
    with pytest.raises(ValueError, match=message):
        replace(good, **changes)


@pytest.mark.parametrize(
    "dtype", [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.uint16, torch.uint32, torch.uint64]
)
def test_labels_of_any_integers_become_int64(digits, dtype):
    found = replace(digits, train_labels=digits.train_labels.to(dtype), test_labels=digits.test_labels.to(dtype))
    for part in ("train", "test"):
        labels = getattr(found, f"{part}_labels")
        assert labels.dtype == torch.int64
        assert torch.equal(labels, getattr(digits, f"{part}_labels"))
    assert found.train_digest == digits.train_digest


# archives of torchvision's formats, downloaded from a server on this machine


@pytest.mark.parametrize("name", archives.MAKERS)
def test_torchvision_datasets_are_downloaded_once_and_read(name, tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    source, root = tmp_path / "source", tmp_path / "root"
    source.mkdir()
    with archives.served(source) as url:
        splits = archives.MAKERS[name](source, url, monkeypatch)
        found = data.load_dataset(name, root)
    assert "100%" in capfd.readouterr().err
    again = data.load_dataset(name, root)
    for dataset in (found, again):
        assert dataset.name == name
        assert dataset.num_classes == (100 if name == "cifar100" else 10)
        for part, (pixels, labels) in splits.items():
            assert np.array_equal(getattr(dataset, f"{part}_images").numpy(), pixels)
            assert getattr(dataset, f"{part}_labels").tolist() == labels.tolist()


def test_a_damaged_archive_is_not_read(tmp_path, monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with archives.served(tmp_path) as url:
        archives.MAKERS["cifar10"](tmp_path, url, monkeypatch)
        (tmp_path / "cifar-10-python.tar.gz").write_bytes(b"not what it was")
        with pytest.raises(OSError, match=r"cifar10: .*not found or corrupted"):
            data.load_dataset("cifar10", tmp_path / "root")


@pytest.mark.parametrize("how", ["others", "cut", "foreign"])
def test_files_that_are_not_mnists_are_not_taken_for_it(how, tmp_path, monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    source, root = tmp_path / "source", tmp_path / "root"
    source.mkdir()
    with archives.served(source) as url:
        archives.MAKERS["mnist"](source, url, monkeypatch)
        data.load_dataset("mnist", root)
    path = root / "MNIST/raw/train-images-idx3-ubyte"
    content = path.read_bytes()
    path.write_bytes({"others": content[:-1] + bytes([content[-1] ^ 1]), "cut": content[:3], "foreign": b"?" * 99}[how])
    with pytest.raises(OSError, match=r"^mnist: expected "):
        data.load_dataset("mnist", root)


def test_mnist_is_known_by_its_files_and_not_by_tensors():
    images, labels = torch.ones(1, 1, 2, 1, dtype=torch.uint8), torch.tensor([7, 9])
    sizes = [size.to_bytes(4, "big") for size in (1, 2, 1)]
    assert data._as_idx(images) == b"".join([bytes([0, 0, 8, 3]), *sizes, bytes([1, 1])])
    assert data._as_idx(labels) == b"".join([bytes([0, 0, 8, 1]), sizes[1], bytes([7, 9])])


def test_without_the_internet_the_error_says_what_was_tried(tmp_path, monkeypatch):
    def unreachable(*args, **kwargs):
        raise URLError("no route to host")

    monkeypatch.setattr("urllib.request.urlopen", unreachable)
    with pytest.raises(OSError, match=f"cifar10: expected torchvision's archive in {tmp_path} or from the internet"):
        data.load_dataset("cifar10", tmp_path)


def test_downloads_lie_where_the_environment_says(tmp_path, monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setenv("CLUSTR_DATA", str(tmp_path / "elsewhere"))
    (tmp_path / "source").mkdir()
    with archives.served(tmp_path / "source") as url:
        archives.MAKERS["svhn"](tmp_path / "source", url, monkeypatch)
        data.load_dataset("svhn")
    assert {path.name for path in (tmp_path / "elsewhere").iterdir()} == {"train_32x32.mat", "test_32x32.mat"}


# folders of images


def save(path, pixels, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, **options)


def picture(seed, shape=(6, 5, 3)):
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


@pytest.fixture
def folder(tmp_path):
    """Two classes of colour PNGs: two images each to train on, one to test on."""
    names = ("train/cat/a", "train/cat/b", "train/dog/a", "train/dog/b", "test/cat/c", "test/dog/c")
    for seed, name in enumerate(names):
        save(tmp_path / f"{name}.png", picture(seed))
    return tmp_path


def load(folder):
    return data.load_dataset(f"folder:{folder}")


def caches(root):
    return sorted((root / data.CACHE_FOLDER).glob("*")) if (root / data.CACHE_FOLDER).exists() else []


@pytest.fixture(autouse=True)
def root(tmp_path_factory, monkeypatch):
    """Where downloads and decoded images lie, apart from the images."""
    place = tmp_path_factory.mktemp("data")
    monkeypatch.setenv("CLUSTR_DATA", str(place))
    return place


def test_a_folder_of_colour_images(folder):
    found = load(folder)
    assert found.name == f"folder:{folder}"
    assert found.class_names == ("cat", "dog")
    assert found.image_shape == (3, 6, 5)
    assert found.train_labels.tolist() == [0, 0, 1, 1]
    assert found.test_labels.tolist() == [0, 1]
    for row, seed in enumerate(range(4)):
        assert np.array_equal(found.train_images[row].numpy(), picture(seed).transpose(2, 0, 1))
    assert np.array_equal(found.test_images[1].numpy(), picture(5).transpose(2, 0, 1))


def test_nothing_is_written_beside_the_images(folder, root):
    before = sorted(folder.rglob("*"))
    load(folder)
    assert sorted(folder.rglob("*")) == before
    assert len(caches(root)) == 1


def read_only(root, monkeypatch):
    def refuse(dir):
        raise PermissionError(errno.EACCES, "Permission denied", str(dir))

    monkeypatch.setattr(data.tempfile, "TemporaryFile", refuse)


def a_file_in_the_way(root, monkeypatch):
    (root / data.CACHE_FOLDER).touch()


def no_place(root, monkeypatch):
    monkeypatch.setenv("CLUSTR_DATA", "/proc/none/of/it")


@pytest.mark.parametrize("spoilt", [read_only, a_file_in_the_way, no_place])
def test_where_nothing_can_be_written_a_warning_comes_before_the_images_are_decoded(folder, root, monkeypatch, spoilt):
    spoilt(root, monkeypatch)
    events, decode = [], data._decode
    monkeypatch.setattr(data, "_decode", lambda files: (events.append("decoded"), decode(files))[1])
    monkeypatch.setattr(data.warnings, "warn", lambda text, stacklevel: events.append(text))
    assert len(load(folder).train_images) == 4
    warning, decoded = events
    assert re.match(r"folder: decoded images are not kept, .*images-.* cannot be written \(.*\)", warning)
    assert decoded == "decoded"
    assert not caches(root)


def test_a_relative_folder_is_found_in_the_books_root(folder, monkeypatch, tmp_path_factory):
    monkeypatch.setenv("CLUSTR_HOME", str(folder.parent))
    monkeypatch.chdir(tmp_path_factory.mktemp("elsewhere"))
    assert len(data.load_dataset(f"folder:{folder.name}").train_labels) == 4


def test_a_folder_of_grey_images(tmp_path):
    for seed, name in enumerate(("train/0/a", "train/1/a", "test/0/a", "test/1/a")):
        save(tmp_path / f"{name}.png", picture(seed, (6, 5)))
    Image.fromarray(picture(9, (6, 5))).convert("1").save(tmp_path / "train/1/b.png")
    found = load(tmp_path)
    assert found.image_shape == (1, 6, 5)
    assert np.array_equal(found.train_images[0, 0].numpy(), picture(0, (6, 5)))
    assert set(found.train_images[2].unique().tolist()) == {0, 255}


def test_other_formats_among_colour_images(folder):
    save(folder / "train/cat/c.jpg", np.full((6, 5, 3), 200, dtype=np.uint8))
    save(folder / "train/cat/d.png", picture(8, (6, 5)))
    save(folder / "train/cat/e.png", np.dstack([picture(9), np.full((6, 5), 7, dtype=np.uint8)]))
    palette = Image.fromarray(picture(10)).quantize(16)
    palette.save(folder / "train/cat/f.png")
    Image.fromarray(picture(11)).convert("CMYK").save(folder / "train/cat/g.jpg")
    images = load(folder).train_images
    assert len(images) == 9
    assert ((images[2].int() - 200).abs() <= 2).all()
    assert np.array_equal(images[3].numpy(), np.repeat(picture(8, (6, 5))[None], 3, axis=0))
    assert np.array_equal(images[4].numpy(), picture(9).transpose(2, 0, 1))
    assert np.array_equal(images[5].numpy(), np.asarray(palette.convert("RGB")).transpose(2, 0, 1))


def test_a_palette_with_transparency_is_read_without_a_warning(folder):
    palette = Image.fromarray(picture(10)).quantize(16)
    palette.save(folder / "train/cat/c.png", transparency=bytes(range(16)))
    assert np.array_equal(load(folder).train_images[2].numpy(), np.asarray(palette.convert("RGB")).transpose(2, 0, 1))


def test_images_are_decoded_once(folder, monkeypatch):
    first = load(folder)

    def never(files):
        raise AssertionError("decoded twice")

    monkeypatch.setattr(data, "_decode", never)
    again = load(folder)
    assert torch.equal(again.train_images, first.train_images)
    assert torch.equal(again.test_images, first.test_images)


def test_images_of_one_size_and_time_that_change_places_are_decoded_again(folder):
    first, second = folder / "train/cat/x.bmp", folder / "train/dog/x.bmp"
    for seed, path in ((20, first), (21, second)):
        save(path, picture(seed))
        os.utime(path, (10**9, 10**9))
    load(folder)
    first.rename(folder / "aside")
    second.rename(first)
    (folder / "aside").rename(second)
    found = load(folder).train_images
    assert np.array_equal(found[2].numpy(), picture(21).transpose(2, 0, 1))
    assert np.array_equal(found[5].numpy(), picture(20).transpose(2, 0, 1))


@pytest.mark.parametrize("change", ["touched", "added", "removed", "renamed"])
def test_a_stale_cache_is_made_again(folder, change):
    load(folder)
    path = folder / "train/cat/b.png"
    if change == "touched":
        save(path, picture(20))
        os.utime(path, ns=(0, 1))
    elif change == "added":
        save(folder / "train/cat/a0.png", picture(20))
    elif change == "removed":
        path.unlink()
    else:
        path.rename(folder / "train/dog/a0.png")
    images = load(folder).train_images
    expected = {"touched": [0, 20, 2, 3], "added": [0, 20, 1, 2, 3], "removed": [0, 2, 3], "renamed": [0, 2, 1, 3]}
    assert [image.tolist() for image in images] == [picture(s).transpose(2, 0, 1).tolist() for s in expected[change]]


@pytest.mark.parametrize("keep", [0, 4, 60, -1])
def test_a_truncated_cache_is_made_again(folder, root, keep):
    first = load(folder)
    (cache,) = caches(root)
    whole = cache.read_bytes()
    cache.write_bytes(whole[:keep])
    assert torch.equal(load(folder).train_images, first.train_images)
    assert cache.read_bytes() == whole


def lock(cache, monkeypatch):
    def refuse(*given, **options):
        raise PermissionError(errno.EACCES, "Permission denied", str(cache))

    monkeypatch.setattr(data, "read_tensors", refuse)


def drop_a_part(cache, monkeypatch):
    tensors, facts = read_tensors(cache, data.IMAGES)
    del tensors["test_labels"]
    write_tensors(cache, data.IMAGES, tensors, facts)


@pytest.mark.parametrize("spoilt", [lock, drop_a_part])
def test_a_cache_that_cannot_be_read_is_as_good_as_none(folder, root, monkeypatch, spoilt):
    first = load(folder)
    spoilt(*caches(root), monkeypatch)
    assert torch.equal(load(folder).test_labels, first.test_labels)


@pytest.mark.parametrize(
    "change",
    [
        lambda kept: {"test_images": kept["test_images"][:, :, :4]},
        lambda kept: {"test_images": kept["test_images"][:0], "test_labels": kept["test_labels"][:0]},
        lambda kept: {name: kept[name][:, :0] for name in ("train_images", "test_images")},
        lambda kept: {name: kept[name].repeat(2, 1, 1, 1) for name in ("train_images", "test_images")},
    ],
    ids=["another shape", "no tests", "no channels", "twice"],
)
def test_a_cache_of_other_images_than_the_files_is_not_taken_for_them(folder, root, change):
    good = load(folder)
    (cache,) = caches(root)
    tensors, facts = read_tensors(cache, data.IMAGES)
    write_tensors(cache, data.IMAGES, tensors | change(tensors), facts)
    again = load(folder)
    assert torch.equal(again.train_images, good.train_images)
    assert torch.equal(again.test_images, good.test_images)


def test_a_folder_that_changes_while_it_is_decoded_is_refused(folder, root, monkeypatch):
    decode = data._decode

    def meanwhile(files):
        save(folder / "train/cat/b.png", picture(20))
        return decode(files)

    monkeypatch.setattr(data, "_decode", meanwhile)
    with pytest.raises(ValueError, match="folder: expected images that do not change while they are read"):
        load(folder)
    assert caches(root) == []


def test_images_that_no_memory_can_hold_are_named(folder, monkeypatch):
    def full(shape, dtype):
        raise MemoryError

    monkeypatch.setattr(data.np, "empty", full)
    with pytest.raises(ValueError, match="folder: expected images that fit into memory, got 360 bytes"):
        load(folder)


def test_an_image_that_cannot_be_converted_is_named(folder, monkeypatch):
    def refuse(image, mode):
        raise OverflowError("no such colour")

    monkeypatch.setattr(Image.Image, "convert", refuse)
    with pytest.raises(ValueError, match=r"got an unreadable file .*train/cat/a\.png \(no such colour\)"):
        load(folder)


def test_a_home_that_there_is_not_is_named(monkeypatch):
    with pytest.raises(ValueError, match="~no-such-user/images: expected the home of a user"):
        data.load_dataset("folder:~no-such-user/images")


def test_nothing_about_images_ends_in_a_traceback(folder, capsys):
    """The command line says one line, whatever lies in the folder."""
    for bad, content in {"long text": png_of(5, 6, bytes(2**21)), "bomb": png_of(60_000, 60_000)}.items():
        (folder / "train/dog/b.png").write_bytes(content)
        status = cli.main(["train", "--profile", "smoke", "--method", "ce", "--set", f"dataset=folder:{folder}"])
        assert status == 2, bad
        assert re.match(r"clustr: folder: .*train/dog/b\.png", capsys.readouterr().err.splitlines()[-1]), bad


def spoil(folder, case):
    """Make a folder unusable in one way; returns what the message must say."""
    bad = folder / "train/dog/b.png"
    if case == "unreadable":
        bad.write_bytes(b"no image at all")
    elif case == "truncated":
        bad.write_bytes(bad.read_bytes()[:-40])
    elif case == "odd size":
        save(bad, picture(0, (5, 6, 3)))
    elif case == "16 bit":
        save(bad, picture(0, (6, 5)).astype(np.uint16) * 200)
    elif case == "strips":
        # a TIFF whose list of strips has a million entries
        bad.unlink()
        bad = bad.with_suffix(".tiff")
        entry = struct.pack("<HHII", 273, 4, 10**6, 30)
        bad.write_bytes(struct.pack("<2sHI", b"II", 42, 8) + struct.pack("<H", 1) + entry + bytes(8) + bytes(4 * 10**6))
    elif case == "float":
        bad = bad.with_suffix(".tiff")
        save(bad, np.zeros((6, 5), dtype=np.float32))
    return {
        "unreadable": f"expected an image .* got an unreadable file {bad}",
        "truncated": f"expected an image .* got an unreadable file {bad}",
        "odd size": rf"expected every image to be 5 x 6 pixels, got \(6, 5\) in {bad}",
        "16 bit": f"expected 8 bits a channel, got a PNG of 16 in {bad}",
        "strips": f"expected a TIFF of at most 1,000 tags, each of at most 32,768 numbers, got more in {bad}",
        "float": rf"expected 8 bits a channel, got a TIFF of \(32,\) in {bad}",
    }[case]


@pytest.mark.parametrize("case", ["unreadable", "truncated", "odd size", "16 bit", "strips", "float"])
def test_an_image_that_cannot_be_used_is_named_and_nothing_is_cached(folder, root, case):
    with pytest.raises(ValueError, match=f"folder: {spoil(folder, case)}"):
        load(folder)
    assert caches(root) == []


def test_a_colour_image_among_grey_ones_is_refused(folder):
    save(folder / "train/cat/a.png", picture(0, (6, 5)))
    with pytest.raises(ValueError, match=r"folder: expected 8-bit images .* got 'RGB' in .*train/cat/b\.png"):
        load(folder)


def test_the_first_image_may_be_the_bad_one(folder):
    save(folder / "train/cat/a.png", picture(0, (6, 5)).astype(np.uint16) * 200)
    with pytest.raises(ValueError, match=r"folder: expected 8 bits a channel, got a PNG of 16 in .*train/cat/a\.png"):
        load(folder)


def test_an_empty_class(folder):
    for path in (folder / "test/dog").iterdir():
        path.unlink()
    (folder / "test/dog/.hidden").touch()
    with pytest.raises(ValueError, match=f"folder: expected images in {folder / 'test/dog'}, got an empty class"):
        load(folder)


@pytest.mark.parametrize("part", ["train", "test"])
def test_a_class_in_one_part_only(folder, part):
    save(folder / part / "fox/a.png", picture(0))
    with pytest.raises(ValueError, match=r"expected the same classes in train and test, got in one alone \[fox\]"):
        load(folder)


def test_one_class_only(tmp_path):
    save(tmp_path / "train/cat/a.png", picture(0))
    save(tmp_path / "test/cat/a.png", picture(1))
    with pytest.raises(ValueError, match=r"expected at least two class folders in .*train, got \['cat'\]"):
        load(tmp_path)


def test_a_missing_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match=f"folder: expected a directory at {tmp_path / 'none'}"):
        load(tmp_path / "none")
    save(tmp_path / "train/cat/a.png", picture(0))
    with pytest.raises(FileNotFoundError, match=f"folder: expected a directory at {tmp_path / 'test'}"):
        load(tmp_path)


def test_no_room_for_the_cache_leaves_no_part_of_it(tmp_path, root):
    for seed, name in enumerate(("train/cat/a", "train/dog/a", "test/cat/a", "test/dog/a")):
        save(tmp_path / f"{name}.png", picture(seed, (100, 100, 3)))
    with (
        files_of_at_most(50_000),
        pytest.raises(OSError, match=f"File too large: '{root}/{data.CACHE_FOLDER}/images-.*'"),
    ):
        load(tmp_path)
    assert caches(root) == []
    assert len(load(tmp_path).train_images) == 2


def test_hidden_files_and_folders_are_skipped(folder):
    for part in ("train", "test"):
        save(folder / part / ".ipynb_checkpoints/a.png", picture(0))
        save(folder / part / "cat/.ipynb_checkpoints/a.png", picture(0))
        (folder / part / ".DS_Store").touch()
    found = load(folder)
    assert found.class_names == ("cat", "dog")
    assert len(found.train_images) == 4


@pytest.mark.parametrize(
    ("name", "make", "kind"),
    [
        ("train/cat/gone.png", lambda path: path.symlink_to("/gone.png"), "a dangling link"),
        ("test/fox", lambda path: path.symlink_to("/gone"), "a dangling link"),
        ("train/cat/nested", lambda path: path.mkdir(), "a folder"),
        ("train/loose.png", lambda path: path.touch(), "a file"),
    ],
)
def test_what_would_vanish_is_named(folder, name, make, kind):
    make(folder / name)
    with pytest.raises(ValueError, match=f"folder: expected nothing but .* got {kind}, {folder / name}"):
        load(folder)


@pytest.mark.parametrize("name", [b"train/cat/\xe9.png", b"train/\xe9"])
def test_names_that_are_not_utf8_are_refused_by_name(folder, name):
    path = os.path.join(os.fsencode(folder), name)
    if name.endswith(b"png"):
        os.rename(folder / "train/cat/a.png", path)
    else:
        os.mkdir(path)
    with pytest.raises(ValueError, match=r"folder: expected names in UTF-8, got '\\udce9"):
        load(folder)


def png_of(width, height, extra=b""):
    """The bytes of a PNG whose header tells of so many pixels, with other chunks before its own."""

    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    more = chunk(b"zTXt", b"k\0\0" + zlib.compress(extra)) if extra else b""
    return b"\x89PNG\r\n\x1a\n" + header + more + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    "content",
    [png_of(10_000, 10_000), png_of(60_000, 60_000), png_of(5, 6, bytes(2**21)), b"%!PS-Adobe-3.0 EPSF-3.0\n", b""],
    ids=["large", "bomb", "long text", "another format", "empty"],
)
def test_whatever_pillow_says_the_file_is_named(folder, content):
    bad = folder / "train/dog/b.png"
    bad.write_bytes(content)
    with pytest.raises(ValueError, match=f"folder: expected an image .*PNG.* got an unreadable file {bad}"):
        load(folder)


def test_the_same_bytes_in_another_shape_are_other_data():
    """Images whose width and height were swapped."""
    pixels, labels = torch.arange(4 * 128, dtype=torch.uint8), torch.tensor([0, 0, 1, 1])
    wide, tall, square = (pixels[: 4 * h * w].reshape(4, 1, h, w) for h, w in ((8, 16), (16, 8), (8, 8)))
    found = {data.digest_of(images, labels) for images in (wide, tall, square)}
    assert len(found) == 3
    # of square images it is what it always was
    assert data.digest_of(square, labels) == files.digest(square.numpy().tobytes(), labels.numpy().tobytes())


@pytest.mark.parametrize("part", ["train", "test"])
def test_a_digest_is_that_of_the_images_as_they_are(digits, part):
    given = {name: getattr(digits, name).clone() for name in ("train_images", "train_labels", "test_images")}
    own = replace(digits, **given)
    before = getattr(own, f"{part}_digest")
    assert getattr(own, f"{part}_digest") == before == getattr(digits, f"{part}_digest")
    images = getattr(own, f"{part}_images")
    images[:] = 255 - images
    assert getattr(own, f"{part}_digest") == data.digest_of(images, getattr(own, f"{part}_labels")) != before
    with torch.inference_mode():
        seen = replace(own, **{f"{part}_images": images.clone()})
    assert getattr(seen, f"{part}_digest") == getattr(own, f"{part}_digest")
