"""Packs: the same bytes come back, every file is of bounded size, and what is missing or damaged is named."""

import hashlib
import json
import subprocess
import zipfile
from pathlib import Path

import pytest
from disk import contents, files_of_at_most

from clustr_core.storage import pack as pack_module
from clustr_core.storage.files import read_json, write_json
from clustr_core.storage.pack import INDEX, SMALLEST_PART, Bounds, Member, pack, parse_size, read_index, unpack

# without a pattern that compression would find
NOISE = bytes((i * i * 2654435761 >> 13) % 256 for i in range(70_000))
FILES = {
    "runs/a/model.safetensors": NOISE,
    "runs/a/run.json": b'{"epochs": 3}\n',
    "results/p/attacks-a.csv": b"index,robust\n" + b"1,True\n" * 9000,
    "results/p/nothing.csv": b"",
}
BOUNDS = Bounds(SMALLEST_PART)


@pytest.fixture
def members(tmp_path: Path) -> list[list[Member]]:
    """The files, each a group of its own."""
    groups = []
    for name, content in FILES.items():
        path = tmp_path / "home" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        groups.append([Member(name, path)])
    return groups


def parts(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.part"))


def test_a_part_may_be_as_large_as_anybody_says(members, tmp_path):
    assert pack(tmp_path / "pack", members, Bounds(10**20), {}).files == 2


def test_the_same_bytes_come_back_from_files_of_bounded_size(members, tmp_path):
    folder = tmp_path / "pack"
    packed = pack(folder, members, BOUNDS, {"profile": "p"})
    sizes = [path.stat().st_size for path in folder.iterdir()]
    assert len(parts(folder)) >= 3
    assert max(sizes) <= BOUNDS.size
    assert (packed.files, packed.total, packed.left_out) == (len(sizes), sum(sizes), ())
    assert read_index(folder)["profile"] == "p"
    unpack(folder, tmp_path / "again")
    assert contents(tmp_path / "again") == FILES


def test_the_parts_are_an_archive_without_this_module(members, tmp_path):
    pack(tmp_path / "pack", members, BOUNDS, {})
    subprocess.run("cat pack/*.part > archive.zip", shell=True, cwd=tmp_path, check=True)
    with zipfile.ZipFile(tmp_path / "archive.zip") as archive:
        assert {name: archive.read(name) for name in archive.namelist()} == FILES


def test_the_same_files_are_the_same_parts_and_others_replace_them(members, tmp_path):
    folder = tmp_path / "pack"
    pack(folder, members, BOUNDS, {})
    before = contents(folder)
    pack(folder, members, BOUNDS, {})
    assert contents(folder) == before
    pack(folder, members[1:], BOUNDS, {})
    unpack(folder, tmp_path / "again")
    assert contents(tmp_path / "again") == {name: FILES[name] for name in list(FILES)[1:]}
    assert len(parts(folder)) == len(read_index(folder)["parts"]) == 1


def test_what_does_not_fit_is_left_out_with_its_group_and_named(members, tmp_path):
    (model,), *others = members
    (record,) = others[0]
    folder = tmp_path / "pack"
    packed = pack(folder, [[model, record], *others[1:]], Bounds(SMALLEST_PART, files=3), {})
    assert packed.left_out == ("runs/a/model.safetensors",)
    assert read_index(folder)["left_out"] == ["runs/a/model.safetensors"]
    assert packed.files <= 3
    unpack(folder, tmp_path / "again")
    assert set(contents(tmp_path / "again")) == {"results/p/attacks-a.csv", "results/p/nothing.csv"}


def test_many_files_that_do_not_fit_leave_the_index_small(tmp_path):
    path = tmp_path / "x.safetensors"
    path.write_bytes(NOISE)
    groups = [[Member(f"runs/{'a' * 80}-{n}", path)] for n in range(500)]
    packed = pack(tmp_path / "pack", groups, Bounds(SMALLEST_PART, files=2), {})
    assert len(packed.left_out) == 500
    assert read_index(tmp_path / "pack")["left_out"][-1] == "and 480 more"
    assert (tmp_path / "pack" / INDEX).stat().st_size <= SMALLEST_PART
    # as many parts as an index of that size lists
    most = Bounds(SMALLEST_PART).parts
    listed = [{"name": f"{n:04d}-{'0' * 16}.part", "bytes": SMALLEST_PART, "sha256": "0" * 64} for n in range(most)]
    assert len(json.dumps({"parts": listed}, indent=2)) <= SMALLEST_PART - 4000


@pytest.mark.parametrize("when", ["parts", "index"])
def test_a_writing_that_is_cut_short_leaves_the_old_pack(members, tmp_path, monkeypatch, when):
    folder = tmp_path / "pack"
    pack(folder, members[:2], BOUNDS, {"pack": "old"})
    if when == "parts":
        with files_of_at_most(10_000), pytest.raises(OSError, match="File too large"):
            pack(folder, members[::-1], BOUNDS, {"pack": "new"})
    else:

        def killed(*_):
            raise KeyboardInterrupt

        monkeypatch.setattr(pack_module, "write_json", killed)
        with pytest.raises(KeyboardInterrupt):
            pack(folder, members[::-1], BOUNDS, {"pack": "new"})
        monkeypatch.undo()
    assert read_index(folder)["pack"] == "old"
    unpack(folder, tmp_path / "again")
    assert contents(tmp_path / "again") == {name: FILES[name] for name in list(FILES)[:2]}
    # what was left behind is gone after the next one
    pack(folder, members[2:], BOUNDS, {"pack": "new"})
    assert len(parts(folder)) == len(read_index(folder)["parts"])


def damaged(folder: Path, how: str) -> None:
    path = parts(folder)[1]
    content = path.read_bytes()
    if how == "missing":
        path.unlink()
    elif how == "cut":
        path.write_bytes(content[:-1])
    else:
        path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("missing", r"--into: expected part 2 of \d, 0002-\w{16}\.part, in .*pack, got no such file"),
        ("cut", r"--into: expected part 2 of \d, 0002-\w{16}\.part, of 32000 bytes with SHA-256 .*, got 31999 bytes"),
        (
            "flipped",
            r"--into: expected part 2 of \d, 0002-\w{16}\.part, of 32000 bytes .*, got 32000 bytes with \w{10}",
        ),
    ],
)
def test_a_part_that_is_missing_or_damaged_is_named_before_anything_is_written(members, tmp_path, how, message):
    folder = tmp_path / "pack"
    pack(folder, members, BOUNDS, {})
    damaged(folder, how)
    with pytest.raises(ValueError, match=message):
        unpack(folder, tmp_path / "again")
    assert not (tmp_path / "again").exists()


def archive_of(kind: str, path: Path) -> None:
    """An archive that `pack` would not write."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        if kind == "one that grows":
            archive.writestr("runs/a/model.safetensors", bytes(10 << 20))
        elif kind == "many that are empty":
            archive.writestr("a", b"")
            archive.filelist *= 5000
        elif kind == "nameless":
            archive.writestr(zipfile.ZipInfo(""), b"x")
        else:
            archive.writestr("a", NOISE[:999], {"lzma": zipfile.ZIP_LZMA, "bzip2": zipfile.ZIP_BZIP2}.get(kind, 0))
    if kind == "longer than it is":
        content = path.read_bytes()
        size = (999).to_bytes(4, "little")
        # before its first header there is room for what the directory claims
        path.write_bytes(NOISE[:9000] + content.replace(size, (8000).to_bytes(4, "little")))


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("one that grows", "members that grow more than 100 times"),
        ("many that are empty", "members that overlap"),
        ("nameless", "members without a name, or compressed otherwise than by deflate"),
        ("lzma", "members without a name, or compressed otherwise than by deflate"),
        ("bzip2", "members without a name, or compressed otherwise than by deflate"),
        ("longer than it is", "expected a pack in .*, got a damaged one"),
    ],
)
def test_an_archive_that_pack_would_not_write_is_refused(tmp_path, kind, message):
    (folder := tmp_path / "pack").mkdir()
    archive_of(kind, folder / "archive")
    content = (folder / "archive").read_bytes()
    name = f"0001-{hashlib.sha256(content).hexdigest()[:16]}.part"
    (folder / "archive").rename(folder / name)
    pack(tmp_path / "good", [], BOUNDS, {})
    index = read_json(tmp_path / "good" / INDEX)
    index["parts"] = [{"name": name, "bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}]
    write_json(folder / INDEX, index)
    with pytest.raises(ValueError, match=message):
        unpack(folder, tmp_path / "again")


def test_an_index_that_is_missing_or_damaged_is_named(members, tmp_path):
    folder = tmp_path / "pack"
    assert read_index(folder) is None
    unpack(folder, tmp_path / "again")
    assert not (tmp_path / "again").exists()
    pack(folder, members, BOUNDS, {})
    (folder / INDEX).write_text("{", encoding="utf-8")
    with pytest.raises(ValueError, match=r"pack\.json: expected JSON, got something truncated or damaged"):
        read_index(folder)
    (folder / INDEX).write_text("{}", encoding="utf-8")
    with pytest.raises(ValueError, match=r"--into: expected an index that lists parts in .*pack\.json, got keys \[\]"):
        read_index(folder)
    (folder / INDEX).unlink()
    message = r"--into: expected an empty folder or one with pack\.json, got 0001-\w{16}\.part alone"
    with pytest.raises(ValueError, match=message):
        read_index(folder)
    (tmp_path / "a.txt").touch()
    with pytest.raises(ValueError, match=r"--into: expected a folder, got a file .*a\.txt"):
        read_index(tmp_path / "a.txt")


@pytest.mark.parametrize(
    ("text", "size"),
    [("15MB", 15_000_000), ("500 kB", 500_000), ("16MiB", 2**24), ("70000", 70_000), ("1.5gb", 15 * 10**8)],
)
def test_sizes_are_read(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "MB", "15 parsec", "-3MB", "1e6", "15MB each"])
def test_what_is_no_size_is_refused(text):
    with pytest.raises(ValueError, match=r"--pack: expected a size such as 15MB, 500kB or 16MiB, got "):
        parse_size(text)


@pytest.mark.parametrize(
    ("size", "files", "message"),
    [
        (SMALLEST_PART - 1, None, r"--pack: expected at least 32kB, got 31999 bytes"),
        (SMALLEST_PART, 1, r"--files: expected at least 2, the index and a part, got 1"),
    ],
)
def test_bounds_into_which_nothing_fits_are_refused(size, files, message):
    with pytest.raises(ValueError, match=message):
        Bounds(size, files)
