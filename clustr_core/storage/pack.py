"""A folder of parts of bounded size, in which files travel: one zip archive, cut, and an index with digests.

``cat`` of the parts that the index lists puts the archive together again, without this module.
"""

import hashlib
import os
import re
import tempfile
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from clustr_core.storage.files import read_json, write_json, written_whole
from clustr_core.storage.gate import TENSORS_LIMIT, brief, listed, opened, read_bytes, shortened, size_in_words

INDEX = "pack.json"
# an index of a few hundred parts fits into this
SMALLEST_PART = 32_000
_PART = re.compile(r"\d{4}-[0-9a-f]{16}\.part")
_UNITS = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 2**10, "mib": 2**20, "gib": 2**30}
# of the index: what one part's line takes, and room for the rest
_PART_LINE, _REST = 200, 6_000
# of a zip archive: its end, and what a file's two headers take beside its name
_ZIP_END, _ZIP_HEADERS = 98, 160
_BLOCK = 2**20
# of a member, before its name
_HEADER = 30
# a study has some thousand pieces
_MOST_MEMBERS = 20_000
# a table shrinks to a tenth or a twentieth
_TEXT = 100


@dataclass(frozen=True)
class Member:
    """A file to be packed.

    Args:
        name: in the archive, relative, with forward slashes.
        path: where it lies.
    """

    name: str
    path: Path

    @property
    def compressed(self) -> bool:
        """Whether it is worth compressing: weights are not."""
        return self.path.suffix != ".safetensors"


@dataclass(frozen=True)
class Bounds:
    """How large a pack may be.

    Args:
        size: of each file, in bytes.
        files: how many there may be, the index among them; None for any number.
    Raises:
        ValueError: if nothing could be packed so; the option of the command is named.
    """

    size: int
    files: int | None = None

    def __post_init__(self) -> None:
        """Check the numbers."""
        if self.size < SMALLEST_PART:
            raise ValueError(f"--pack: expected at least {SMALLEST_PART // 1000}kB, got {self.size} bytes")
        if self.files is not None and self.files < 2:
            raise ValueError(f"--files: expected at least 2, the index and a part, got {self.files}")

    @property
    def parts(self) -> int:
        """How many parts there may be, so that the index, too, is of bounded size."""
        listed = (self.size - _REST) // _PART_LINE
        return listed if self.files is None else min(self.files - 1, listed)

    @property
    def total(self) -> int:
        """Bytes of the whole archive."""
        return self.size * self.parts


@dataclass(frozen=True)
class Packed:
    """What `pack` wrote.

    Args:
        files: how many, the index among them.
        total: their bytes.
        left_out: the first member of each group that did not fit.
    """

    files: int
    total: int
    left_out: tuple[str, ...]


def parse_size(text: str) -> int:
    """Bytes, from "15MB", "500kB", "16MiB" or a plain number of bytes.

    Raises:
        ValueError: for anything else.
    """
    found = re.fullmatch(r"\s*(\d{1,15}(?:\.\d{1,15})?)\s*([a-z]*)\s*", text, re.I)
    if found is None or found[2].lower() not in _UNITS:
        raise ValueError(f"--pack: expected a size such as 15MB, 500kB or 16MiB, got {brief(text)}")
    return int(float(found[1]) * _UNITS[found[2].lower()])


def pack(folder: Path, groups: Sequence[Sequence[Member]], bounds: Bounds, facts: Mapping[str, Any]) -> Packed:
    """Replace what a folder holds by a pack of these files.

    Parts are named by their digests and written before the index, which is replaced at once: whenever the writing is
    killed, the folder holds the old pack or the new one.

    Args:
        groups: what travels together or not at all, the most important first. Where not all fits, a later group that
            does is taken.
        facts: what the index says beside the parts.
    Raises:
        OSError: as the file system says; the old pack stays.
    """
    with tempfile.TemporaryFile() as archive:
        left_out = _write_archive(archive, groups, bounds.total)
        parts = _cut(archive, folder, bounds.size)
    index = {**facts, "parts": parts, "left_out": _shortened(left_out)}
    write_json(folder / INDEX, index)
    kept = {part["name"] for part in parts}
    for path in folder.iterdir():
        if _PART.fullmatch(path.name) and path.name not in kept and not path.is_dir():
            path.unlink()
    total = sum(part["bytes"] for part in parts) + (folder / INDEX).stat().st_size
    return Packed(len(parts) + 1, total, left_out)


def read_index(folder: Path) -> dict[str, Any] | None:
    """What a pack's index says; None for a folder that is empty, or not there.

    Raises:
        ValueError: if the folder holds something else, or the index is damaged.
    """
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"--into: expected a folder, got a file {folder}")
    path = folder / INDEX
    if path.exists():
        index = read_json(path)
        if not _are_parts(index.get("parts")):
            raise ValueError(
                f"--into: expected an index that lists parts in {path}, got keys [{listed(sorted(index))}]"
            )
        return index
    entries = folder.iterdir() if folder.exists() else ()
    if others := sorted(entry.name for entry in entries if not entry.name.startswith(".")):
        raise ValueError(f"--into: expected an empty folder or one with {INDEX}, got {others[0]} alone in {folder}")
    return None


def _is_part(said: object) -> bool:
    """Whether an index says of a part what is needed, and of one that lies beside it."""
    if not isinstance(said, dict):
        return False
    name, size, digest = (said.get(key) for key in ("name", "bytes", "sha256"))
    return isinstance(name, str) and bool(_PART.fullmatch(name)) and type(size) is int and isinstance(digest, str)


def _are_parts(said: object) -> bool:
    """Whether an index lists parts, each once, and together no more than a leg can have."""
    if not isinstance(said, list) or not all(map(_is_part, said)):
        return False
    total = sum(part["bytes"] for part in said)
    return len({part["name"] for part in said}) == len(said) and total <= TENSORS_LIMIT


def unpack(folder: Path, into: Path) -> None:
    """Write the files of a pack into an empty folder.

    Raises:
        ValueError: if a part is missing or damaged, before anything is written; it is named.
    """
    index = read_index(folder)
    if index is None:
        return
    with tempfile.TemporaryFile() as archive:
        for number, part in enumerate(index["parts"], start=1):
            _append(archive, folder / part["name"], part, f"part {number} of {len(index['parts'])}")
        archive.seek(0)
        try:
            with zipfile.ZipFile(archive) as members:
                _check_members(members)
                members.extractall(into)
        except (
            zipfile.BadZipFile, zlib.error, EOFError, RuntimeError, NotImplementedError, NotADirectoryError,
            FileExistsError, IsADirectoryError,
        ) as error:  # fmt: skip
            why = shortened(str(error))
            raise ValueError(f"--into: expected a pack in {folder}, got a damaged one ({why})") from error


def _check_members(archive: zipfile.ZipFile) -> None:
    """Members as `pack` writes them, none inside another, none that grows beyond what text can, and all of a size that
    a leg can have."""
    members = archive.infolist()
    kinds = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
    if others := [each.filename for each in members if not each.filename or each.compress_type not in kinds]:
        raise zipfile.BadZipFile(f"members without a name, or compressed otherwise than by deflate: {listed(others)}")
    if bombs := [each.filename for each in members if each.file_size > _TEXT * each.compress_size + _BLOCK]:
        raise zipfile.BadZipFile(f"members that grow more than {_TEXT} times: {listed(bombs)}")
    # each has a header of its own, an empty one too
    headers = sum(_HEADER + len(member.orig_filename.encode()) for member in members)
    if headers + sum(member.compress_size for member in members) > archive.start_dir:
        raise zipfile.BadZipFile("members that overlap")
    if len(members) > _MOST_MEMBERS:
        raise zipfile.BadZipFile(f"{len(members):,} members, where {_MOST_MEMBERS:,} are the most")
    if (total := sum(member.file_size for member in members)) > TENSORS_LIMIT:
        raise zipfile.BadZipFile(f"{total:,} bytes, where {size_in_words(TENSORS_LIMIT)} are the most")


def _append(archive: IO[bytes], path: Path, said: Mapping[str, Any], which: str) -> None:
    """Add a part to the archive, held against what the index says of it."""
    if not path.exists():
        raise ValueError(f"--into: expected {which}, {path.name}, in {path.parent}, got no such file")
    found, size = hashlib.sha256(), 0
    with opened(path, limit=TENSORS_LIMIT) as file:
        while block := file.read(_BLOCK):
            found.update(block)
            size += len(block)
            archive.write(block)
    if (size, found.hexdigest()) != (said["bytes"], said["sha256"]):
        expected = f"{said['bytes']} bytes with SHA-256 {said['sha256'][:10]}"
        got = f"{size} bytes with {found.hexdigest()[:10]}"
        raise ValueError(f"--into: expected {which}, {path.name}, of {expected} in {path.parent}, got {got}")


def _write_archive(archive: IO[bytes], groups: Sequence[Sequence[Member]], total: int) -> tuple[str, ...]:
    """Write the groups that fit; the others by their first members' names."""
    left_out, spent = [], _ZIP_END
    with zipfile.ZipFile(archive, "w") as target:
        for group in groups:
            cost = sum(map(_cost, group))
            if spent + cost > total:
                left_out.append(group[0].name)
                continue
            spent += cost
            for member in group:
                _write_member(target, member)
    return tuple(left_out)


def _write_member(target: zipfile.ZipFile, member: Member) -> None:
    # without the time of the file, so that the same files are the same bytes
    info = zipfile.ZipInfo(member.name)
    info.compress_type = zipfile.ZIP_DEFLATED if member.compressed else zipfile.ZIP_STORED
    target.writestr(info, read_bytes(member.path, limit=TENSORS_LIMIT))


def _cost(member: Member) -> int:
    """At most so many bytes a member takes of an archive."""
    if member.compressed:
        size = len(zlib.compress(read_bytes(member.path, limit=TENSORS_LIMIT)))
    else:
        size = member.path.stat().st_size
    return size + 2 * len(member.name.encode()) + _ZIP_HEADERS


def _cut(archive: IO[bytes], folder: Path, size: int) -> list[dict[str, Any]]:
    """Write the parts of an archive that are not there yet, and say what each of them is."""
    # a larger part is all of it: so much memory is taken for one
    size = min(size, archive.seek(0, os.SEEK_END) or 1)
    archive.seek(0)
    parts = []
    while content := archive.read(size):
        sha256 = hashlib.sha256(content).hexdigest()
        name = f"{len(parts) + 1:04d}-{sha256[:16]}.part"
        path = folder / name
        if not _holds(path, content):
            with written_whole(path) as temporary:
                temporary.write_bytes(content)
        parts.append({"name": name, "bytes": len(content), "sha256": sha256})
    return parts


def _holds(path: Path, content: bytes) -> bool:
    try:
        return read_bytes(path, limit=len(content)) == content
    except (ValueError, OSError):
        return False


def _shortened(names: Sequence[str], most: int = 20) -> list[str]:
    """The first names, and how many there are beyond them."""
    beyond = len(names) - most
    return [*names[:most], *([f"and {beyond} more"] if beyond > 0 else [])]
