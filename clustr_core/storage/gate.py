"""The one gate for files and for what is said of them: regular files of a sane size come in, short words go out."""

import os
import reprlib
import stat
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from io import BufferedReader
from pathlib import Path
from typing import Any

MB = 2**20
GB = 2**30
# the largest of each kind that is read. Nothing of the book's is a tenth as large; what is larger is another file by
# mistake, or was made to fill the memory
PROFILE_LIMIT = MB
JSON_LIMIT = 8 * MB
TABLE_LIMIT = 2 * GB
# a ResNet-18 of width 64 has 45 MB; its checkpoint, with the optimiser's state, three times as many
RELEASED_LIMIT = GB
TENSORS_LIMIT = 16 * GB
# CIFAR-10 has 184 MB, decoded
IMAGES_LIMIT = 256 * GB
# of a message, in characters, and of a value inside one
MESSAGE_LIMIT = 600
VALUE_LIMIT = 120
_OPEN = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)
_KINDS = {
    stat.S_ISDIR: "a folder",
    stat.S_ISFIFO: "a FIFO",
    stat.S_ISCHR: "a device",
    stat.S_ISBLK: "a device",
    stat.S_ISSOCK: "a socket",
}
_BLOCK = 16 * MB
_STREAMS = ("/dev/stdout", "/dev/fd/1", "/proc/self/fd/1")


@contextmanager
def opened(path: Path, *, limit: int) -> Iterator[BufferedReader]:
    """A regular file, open for reading; a link is followed.

    Args:
        limit: bytes, at most.
    Raises:
        ValueError: if it is something else, or larger; the file is named. Nothing of it has been read.
        OSError: as the file system says, as where there is no such file or links lead in a circle.
    """
    with named(path):
        descriptor = os.open(path, _OPEN)
    try:
        check_regular(path, found := os.fstat(descriptor))
    except ValueError:
        os.close(descriptor)
        raise
    with os.fdopen(descriptor, "rb") as file:
        if found.st_size > limit:
            raise ValueError(f"{shown(path)}: expected at most {size_in_words(limit)}, got {found.st_size:,} bytes")
        yield file


def read_bytes(path: Path, *, limit: int) -> bytes:
    """All of a file.

    Raises:
        ValueError, OSError: as `opened`; also if a file that says it is empty, or grows, has more than ``limit`` bytes.
    """
    parts, total = [], 0
    with opened(path, limit=limit) as file, named(path):
        # what it says that it holds at once, so that there is one copy of it; what comes beyond that in blocks
        asked = min(os.fstat(file.fileno()).st_size, limit) or _BLOCK
        while total <= limit and (block := file.read(asked)):
            parts.append(block)
            total += len(block)
            asked = _BLOCK
    content = b"".join(parts)
    if total > limit:
        raise ValueError(f"{shown(path)}: expected at most {size_in_words(limit)}, got more")
    return content


def read_text(path: Path, *, limit: int) -> str:
    """All of a text file, in UTF-8.

    Raises:
        ValueError, OSError: as `read_bytes`; ValueError if it is not in UTF-8.
    """
    return decoded(path, read_bytes(path, limit=limit))


def decoded(path: Path, content: bytes) -> str:
    """The text that a file's bytes are.

    Raises:
        ValueError: if it is not in UTF-8.
    """
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{shown(path)}: expected text in UTF-8, got {error}") from error


def check_file(path: Path, *, limit: int) -> None:
    """`opened`, for a library that opens the file itself.

    Raises:
        ValueError, OSError: as `opened`.
    """
    with opened(path, limit=limit):
        pass


def check_regular(path: Path, found: os.stat_result) -> None:
    """Raises a ValueError unless what was found at a path is a regular file."""
    if not stat.S_ISREG(found.st_mode):
        kind = next((kind for test, kind in _KINDS.items() if test(found.st_mode)), "something else")
        raise ValueError(f"{shown(path)}: expected a regular file, got {kind}")


def is_stream(path: Path) -> bool:
    """Whether a path is a device, a FIFO or the standard output, which is written to and not replaced."""
    if str(path) in _STREAMS:
        return True
    try:
        mode = path.stat().st_mode
    except (OSError, ValueError):
        return False
    return stat.S_ISCHR(mode) or stat.S_ISFIFO(mode)


def pour(content: Path, stream: Path) -> None:
    """Write a file's content to a device, a FIFO, or the standard output."""
    if str(stream) in _STREAMS:
        with content.open("rb") as source:
            while block := source.read(MB):
                _write_all(1, block)
        return
    with content.open("rb") as source, stream.open("wb", buffering=0) as target:
        while block := source.read(MB):
            _write_all(target.fileno(), block)


def target_of(path: Path) -> Path:
    """Where a file is written: a link stays, and what it leads to is replaced.

    Raises:
        ValueError: if there is something there that is no regular file; nothing is written.
        OSError: if links lead in a circle.
    """
    with named(path):
        # pathlib takes such a name for one that is not there
        if "\0" in str(path):
            raise ValueError("one with a NUL in it")
        target = Path(os.path.realpath(path)) if path.is_symlink() else path
        if target.is_symlink():
            # what a circle is resolved to
            os.stat(target)
        if os.path.lexists(target):
            check_regular(path, target.stat())
    return target


def named_place(path: Path) -> Path:
    """The path itself, if there is nothing, a link or a regular file: whatever has the name is replaced.

    Raises:
        ValueError: if something else is there.
    """
    if not path.is_symlink() and os.path.lexists(path):
        check_regular(path, path.lstat())
    return path


def check_own(folder: Path) -> None:
    """Raises a ValueError if a folder of the book is a link: what came with somebody else's run would lead outside."""
    if folder.is_symlink():
        raise ValueError(f"{shown(folder)}: expected a folder, got a link, which may lead outside of the book")


def brief(value: object) -> str:
    """``repr`` of a value, of bounded length and in bounded time, whatever it is."""
    return shortened(_BRIEF.repr(value), VALUE_LIMIT)


def printable(text: str) -> str:
    """A text without characters that a terminal would act on: each is told by its number."""
    return "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in text)


def shown(path: str | os.PathLike[str]) -> str:
    """A path in a message: in full unless it is very long, without characters that a terminal would act on."""
    return shortened(printable(os.fspath(path)), 2 * VALUE_LIMIT)


def listed(names: Sequence[object], most: int = 4) -> str:
    """Names in a message: some, and how many more there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(shortened(str(name), VALUE_LIMIT) for name in names[:most]) + more


def shortened(text: str, most: int = MESSAGE_LIMIT) -> str:
    """A text, or its beginning and end with what is left out counted."""
    if len(text) <= most:
        return text
    head, tail = most * 2 // 3, most // 4
    return f"{text[:head]} [{len(text) - head - tail:,} characters left out] {text[-tail:]}"


def size_in_words(count: int) -> str:
    """As in "64 MB"."""
    return f"{count // GB:,} GB" if count >= GB else f"{count // MB:,} MB"


class _Brief(reprlib.Repr):
    """Of few items and levels; a tensor by its shape."""

    def __init__(self) -> None:
        super().__init__()
        self.maxlevel, self.maxlist, self.maxtuple, self.maxdict, self.maxset = 2, 4, 4, 4, 4
        self.maxstring = self.maxother = self.maxlong = 80

    def repr_int(self, x: int, level: int) -> str:
        """Without the digits of a number of thousands of them."""
        return repr(x) if x.bit_length() < 256 else f"an integer of {x.bit_length():,} bits"

    def repr_instance(self, x: Any, level: int) -> str:
        """By its kind where it is neither a number nor a word."""
        if isinstance(x, float | complex | bool | type(None) | os.PathLike):
            return super().repr_instance(x, level)
        return f"a {type(x).__name__}"


_BRIEF = _Brief()


@contextmanager
def named(path: Path) -> Iterator[None]:
    """A block in which what a file system says of a name that is too long, or has a NUL in it, is said shortly."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{shown(path)}: expected the name of a file, got {error}") from error
    except OSError as error:
        if len(str(path)) <= 2 * VALUE_LIMIT:
            raise
        raise OSError(error.errno, error.strerror, shown(path)) from error


def _write_all(descriptor: int, block: bytes) -> None:
    view = memoryview(block)
    while view:
        view = view[os.write(descriptor, view) :]
