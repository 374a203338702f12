"""Hostile folders of images."""

import io
import os
import shutil
import struct
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from clustr_core import data
from tools.torture.forks import Case, Expected

FIRST = "train/cat/0.png"


def cases(folder: Path, canaries: Path) -> Iterator[Case]:
    """All of them; each makes a small folder of images in ``folder`` and changes one thing about it."""
    good = _png(_pixels(0))
    for part in (0, 1, 10, 30, 50, 70, 90, 99):
        # the last bytes of a PNG say that it ends, and no more
        yield _file(folder, f"cut at {part} %", good[: len(good) * part // 100], "either" if part == 99 else "refused")
    for place in range(0, len(good), 2):
        for bit in (0, 7):
            flipped = bytearray(good)
            flipped[place] ^= 1 << bit
            yield _file(folder, f"bit {bit} of byte {place}", bytes(flipped), "either")
    yield _folder(folder, "a good one", lambda place: None, "accepted")
    for name, content in _foreign(canaries, good).items():
        yield _file(folder, name, content)
    for name, content in _large().items():
        yield _file(folder, name, content)
    for name, content in _noted().items():
        yield _file(folder, name, content, "accepted" if name.startswith("a few") else "refused")
    remarks = b"P6\n" + b"# remark\n" * 200_000 + b"8 8 255\n" + bytes(192)
    yield _file(folder, "a portable bitmap of remarks", remarks)
    yield _file(folder, "a portable bitmap with a remark", b"P6\n# remark\n8 8 255\n" + bytes(192), "accepted")
    yield _file(folder, "a PNG with a ZIP behind it", good + b"PK\x03\x04" + b"x" * 1000, "accepted")
    for mode in ("L", "1", "RGBA", "LA", "P", "CMYK", "I", "F", "I;16"):
        kind = "TIFF" if mode in ("CMYK", "F", "I", "I;16") else "PNG"
        yield _file(folder, f"mode {mode}", _saved(Image.new(mode, (8, 8)), kind), "either")
    deep = struct.pack(">IIBBBBB", 8, 8, 16, 2, 0, 0, 0)
    yield _file(
        folder,
        "a PNG of 16 bits a channel",
        good[:16] + deep + struct.pack(">I", zlib.crc32(b"IHDR" + deep)) + good[33:],
    )
    for kind in ("JPEG", "GIF", "BMP", "TIFF", "WEBP", "PPM"):
        named = _saved(Image.fromarray(_pixels(1)), kind)
        yield _file(folder, f"{kind} named png", named, "accepted")
        yield _file(folder, f"half a {kind}", named[: len(named) // 2], "either")
    for kind in ("ICO", "PCX", "TGA", "SGI"):
        yield _file(folder, f"{kind} named png", _saved(Image.fromarray(_pixels(1)), kind))
    yield _file(folder, "another size", _png(_pixels(2, 9)))
    yield from _places(folder)


def _file(folder: Path, name: str, content: bytes, expected: Expected = "refused") -> Case:
    """The first image replaced by these bytes."""
    return _folder(folder, name, lambda place: _write(place / FIRST, content), expected)


def _folder(folder: Path, name: str, change: Callable[[Path], object], expected: Expected = "refused") -> Case:
    return Case("images", name, lambda: read_after(folder, change), expected)


def read_after(folder: Path, change: Callable[[Path], object]) -> int:
    """How many images a folder holds in which one thing was changed."""
    place = folder / "images"
    shutil.rmtree(place, ignore_errors=True)
    for part in ("train", "test"):
        for label in ("cat", "dog"):
            for number in range(2):
                _write(place / part / label / f"{number}.png", _png(_pixels(number)))
    change(place)
    return len(data.load_dataset(f"folder:{place}", root=folder / "cache").train_images)


def good(kind: str) -> bytes:
    """An image of a format."""
    return _saved(Image.fromarray(_pixels(0)), kind)


def _foreign(canaries: Path, good: bytes) -> dict[str, bytes]:
    """What is no image of the formats that are read."""
    ghost = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\n"
    return {
        "nothing": b"",
        "text": b"hello",
        "a page": b"<html>" + good,
        "SVG": b"<svg xmlns='http://www.w3.org/2000/svg'/>",
        "EPS": ghost + b"(x) print\n%%EOF\n",
        "EPS that pipes": ghost + b"(%pipe%touch " + str(canaries).encode() + b"/eps) (w) file\n%%EOF\n",
        "PDF": b"%PDF-1.4\n%%EOF",
        "a program": b"\x7fELF" + bytes(200),
        "a pickle": b"cos\nsystem\n(S'touch " + str(canaries).encode() + b"/image'\ntR.",
        "a TIFF without end": b"II*\0\x08\0\0\0\x01\0" + struct.pack("<HHII", 256, 4, 1, 8) + struct.pack("<I", 8),
        "a BMP upside down": b"BM"
        + struct.pack("<IHHI", 100, 0, 0, 54)
        + struct.pack("<IiiHHIIiiII", 40, -8, -8, 1, 24, *[0] * 6),
        "an icon in an icon": b"\0\0\1\0\1\0"
        + struct.pack("<BBBBHHII", 8, 8, 0, 0, 1, 32, 10, 22)
        + b"\x89PNG\r\n\x1a\n",
    }


def _large() -> dict[str, bytes]:
    """Small files that say they are large."""
    return {
        "10,000 x 10,000 by its header": _raw_png(10_000, 10_000),
        "13,000 x 13,000": _raw_png(13_000, 13_000, bytes(13_001 * 13_000)),
        "40,000 x 25,000": _raw_png(40_000, 25_000, bytes(1000)),
        "2^31 x 2^31": _raw_png(2**31 - 1, 2**31 - 1),
        "0 x 0": _raw_png(0, 0),
        "0 x 8": _raw_png(0, 8),
        "1 x 80,000,000": _raw_png(1, 80_000_000, bytes(100_000)),
        "a TIFF of 10^9 x 10^9": b"II*\0\x08\0\0\0\x03\0"
        + struct.pack("<HHII", 256, 4, 1, 10**9)
        + struct.pack("<HHII", 257, 4, 1, 10**9)
        + struct.pack("<HHII", 273, 4, 1, 8)
        + bytes(4),
        "words of 200 MB": _raw_png(8, 8, bytes(72), _chunk(b"zTXt", b"k\0\0" + zlib.compress(bytes(200_000_000), 9))),
        "a grey 8 x 8 among colours, of 300 MB": _raw_png(8, 9, bytes(300_000_000)),
        "2,000 frames": _frames(),
        "a JPEG of 2,000 scans": _scans(),
        "a TIFF of 64 x 64 in a tile of 16,384 x 16,384": _tile(),
        **{
            f"a portable bitmap in text, {kind}": kind.encode() + b"\n1000 1000\n" + b"# remark\n" * 200_000
            for kind in ("P1", "P2", "P3")
        },
    }


def _noted() -> dict[str, bytes]:
    """A few pixels, and many notes."""
    jpeg, gif, png = good("JPEG"), good("GIF"), good("PNG")
    pictures = 13 + (3 << (gif[10] & 7) + 1)
    note = b"\xff\xe1" + struct.pack(">H", 2 + 6 + 40) + b"Exif\0\0" + b"MM\0*" + bytes(36)
    several = _segment(0xE2, b"MPF\0II*\0" + struct.pack("<IHHHII", 8, 1, 0xB001, 4, 1, 2) + bytes(4))
    runs = struct.pack("<IiiHHIIiiII", 40, 4096, 4096, 1, 8, 1, 5_000_000, 0, 0, 1, 1) + bytes(4)
    return {
        "a few notes of a JPEG": jpeg[:2] + note * 3 + jpeg[2:],
        "a few comments of a GIF": gif[:pictures] + b"!\xfe\x05hello\0" * 9 + gif[pictures:],
        "a few chunks of a PNG": png[:33] + _chunk(b"tEXt", b"a\0b") * 9 + png[33:],
        "a JPEG of 100,000 notes": jpeg[:2] + note * 100_000 + jpeg[2:],
        "an MPO of 2,000 scans": (scans := _scans())[:2] + several + scans[2:],
        **{f"a {name}TIFF of 500,000 notes": _further(order, big) for name, order, big in
           (("", "<", False), ("big-endian ", ">", False), ("large ", "<", True), ("large big-endian ", ">", True))},
        "a TIFF whose further directory is its own": _further("<", False, place=8),
        "a PNG of 200,000 chunks": png[:33] + _chunk(b"abCd", b"") * 200_000 + png[33:],
        "a GIF of 100,000 comments": gif[:pictures] + b"!\xfe\1x\0" * 100_000 + gif[pictures:],
        "a GIF of a million other bytes": gif[:pictures] + bytes(1_000_000) + gif[pictures:],
        "a portable bitmap of one remark": b"PyP\n#" + b"x" * 2_000_000 + b"\n8 8\n255\n" + bytes(64),
        "a portable bitmap of 12 bits": b"P6\n600 600\n4095\n" + bytes(6 * 600 * 600),
        "a BMP of 2,500,000 runs": b"BM" + struct.pack("<IHHI", 5_000_058, 0, 0, 58) + runs + b"\1\0" * 2_500_000,
    }  # fmt: skip


def _segment(marker: int, content: bytes) -> bytes:
    return struct.pack(">BBH", 0xFF, marker, 2 + len(content)) + content


def _further(order: str, big: bool, *, place: int = 0) -> bytes:
    """A TIFF of 8 x 8 pixels with a directory of Exif notes, one of which is 500,000 fractions."""
    head, count, entry, end = (16, "Q", "HHQQ", 8) if big else (8, "H", "HHII", 4)

    def directory(*tags: tuple[int, int, int, int]) -> bytes:
        def packed(tag: int, kind: int, number: int, value: int) -> bytes:
            letter = {3: "H", 4: "I"}.get(kind) if number == 1 else None
            field = struct.pack(order + (letter or entry[-1]), value).ljust(end, b"\0")
            return struct.pack(order + entry[:-1], tag, kind, number) + field

        return struct.pack(order + count, len(tags)) + b"".join(packed(*tag) for tag in tags) + bytes(end)

    size = struct.calcsize(order + entry)
    first = struct.calcsize(order + count) + 9 * size + end
    second = struct.calcsize(order + count) + size + end
    pixels = head + first + second
    tags = [
        (256, 3, 1, 8), (257, 3, 1, 8), (258, 3, 1, 8), (259, 3, 1, 1), (262, 3, 1, 1), (273, 4, 1, pixels),
        (278, 3, 1, 8), (279, 4, 1, 64), (34665, 4, 1, place or head + first),
    ]  # fmt: skip
    marks = {"<": b"II", ">": b"MM"}[order] + struct.pack(order + "H", 43 if big else 42)
    begin = marks + (struct.pack(order + "HHQ", 8, 0, 16) if big else struct.pack(order + "I", 8))
    fractions = struct.pack(order + "II", 1, 3) * 500_000
    return begin + directory(*tags) + directory((33434, 5, 500_000, pixels + 64)) + bytes(64) + fractions


def _places(folder: Path) -> Iterator[Case]:
    """What lies in a folder beside images, or in their place."""

    def instead(make: Callable[[Path], object]) -> Callable[[Path], object]:
        def change(place: Path) -> None:
            (place / FIRST).unlink()
            make(place / FIRST)

        return change

    changes: dict[str, tuple[Callable[[Path], object], Expected]] = {
        "no train": (lambda place: shutil.rmtree(place / "train"), "refused"),
        "no test": (lambda place: shutil.rmtree(place / "test"), "refused"),
        "a class in train alone": (lambda place: shutil.rmtree(place / "test/cat"), "refused"),
        "an empty class": (lambda place: [path.unlink() for path in (place / "train/cat").iterdir()], "refused"),
        "a folder in a class": (lambda place: (place / "train/cat/sub").mkdir(), "refused"),
        "a file among classes": (lambda place: _write(place / "train/README.md", b"x"), "refused"),
        "a hidden file": (lambda place: _write(place / "train/cat/.DS_Store", b"x"), "accepted"),
        "thumbs": (lambda place: _write(place / "train/cat/Thumbs.db", b"x"), "refused"),
        "a FIFO": (instead(os.mkfifo), "refused"),
        "a folder for an image": (instead(Path.mkdir), "refused"),
        "a link to itself": (instead(lambda path: path.symlink_to(path)), "refused"),
        "a link to nowhere": (instead(lambda path: path.symlink_to("/nowhere")), "refused"),
        "a link to zeros": (instead(lambda path: path.symlink_to("/dev/zero")), "refused"),
        "a link to passwords": (instead(lambda path: path.symlink_to("/etc/passwd")), "refused"),
        "a link to memory": (instead(lambda path: path.symlink_to("/proc/self/mem")), "refused"),
        "a class that is all": (lambda place: (place / "train/cat/up").symlink_to(place), "refused"),
        "a name that is no UTF-8": (
            lambda place: shutil.copy(place / FIRST, place / "train/cat" / os.fsdecode(b"\xff.png")),
            "refused",
        ),
    }
    for name, (change, expected) in changes.items():
        yield _folder(folder, name, change, expected)
    for name in ("катя", "a\u202eb", "a\nb", " ", "...", "\x1b[31mx", "x" * 250, 'a,"b', "=1+1"):
        copy = _class_named(name)
        yield _folder(folder, f"a class {name[:12]!a}", copy, "either")
    for name in (
        "folder:/",
        "folder:",
        "folder:.",
        "folder:a\0b",
        "folder:~nobody/x",
        "folder:http://x",
        "folder:/proc/self",
        "folder:" + "x" * 5000,
        "folder:" + "a/" * 3000,
        "folder:/dev",
        "FOLDER:x",
        "../../x",
        "",
        "__class__",
    ):
        yield Case("images", f"data named {name[:24]!a}", lambda name=name: len(data.load_dataset(name).train_images))


def _class_named(name: str) -> Callable[[Path], object]:
    return lambda place: [shutil.copytree(place / part / "cat", place / part / name) for part in ("train", "test")]


def _pixels(seed: int, side: int = 8) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8)


def _png(pixels: np.ndarray) -> bytes:
    return _saved(Image.fromarray(pixels), "PNG")


def _saved(image: Image.Image, kind: str) -> bytes:
    content = io.BytesIO()
    image.save(content, format=kind)
    return content.getvalue()


def _write(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


def _chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def _raw_png(width: int, height: int, content: bytes = b"", extra: bytes = b"") -> bytes:
    header = _chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + extra + _chunk(b"IDAT", zlib.compress(content, 9)) + _chunk(b"IEND", b"")


def _scans() -> bytes:
    """A progressive JPEG with its last scan again and again."""
    content = io.BytesIO()
    Image.fromarray(_pixels(0, 256)).save(content, format="JPEG", progressive=True)
    whole = content.getvalue()
    last = whole[whole.rindex(b"\xff\xda") : -2]
    return whole[:-2] + last * 2000 + whole[-2:]


def _tile() -> bytes:
    """A small image in a large tile of zeros, packed."""
    packed = zlib.compress(bytes(16_384 * 16_384))
    tags = (
        (256, 4, 64), (257, 4, 64), (258, 3, 8), (259, 3, 8), (262, 3, 1), (277, 3, 1),
        (322, 4, 16_384), (323, 4, 16_384), (324, 4, 200), (325, 4, len(packed)),
    )  # fmt: skip
    entries = b"".join(struct.pack("<HHII", tag, kind, 1, value) for tag, kind, value in tags)
    head = b"II*\0" + struct.pack("<I", 8) + struct.pack("<H", len(tags)) + entries + bytes(4)
    return head.ljust(200, b"\0") + packed


def _frames() -> bytes:
    frames = [Image.new("P", (9, 8), number % 256) for number in range(2000)]
    content = io.BytesIO()
    frames[0].save(content, format="GIF", save_all=True, append_images=frames[1:])
    return content.getvalue()
