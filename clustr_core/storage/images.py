"""Image files of strangers: held against what an image of the book can be before a pixel is decoded.

Pillow reads a file's header, notes and tags in Python, byte by byte in places, and keeps them all: over 20 MB that hold
eight by eight pixels it may take minutes and a gigabyte. What pixels do not need is counted here first, or left out.
"""

import io
import math
import re
import struct
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from PIL import Image

from clustr_core.storage.gate import MB, brief, read_bytes, shortened

IMAGE_FORMATS = ("PNG", "JPEG", "BMP", "GIF", "TIFF", "WEBP", "PPM")
IMAGE_FILE_LIMIT = 64 * MB
# a photograph of the largest camera has as many; of an image of the book it would be the side of a wall
MOST_PIXELS_A_SIDE = 4096
# portable bitmaps in text, which Pillow takes minutes over where they are mostly comments; those in bytes
_IN_TEXT, _IN_BYTES = (b"P1", b"P2", b"P3"), (b"P0", b"P4", b"P5", b"P6", b"Pf", b"Py")
LONGEST_HEADER = 4096
# of a progressive JPEG; encoders write some ten
MOST_SCANS = 100
# between a file's beginning and its pixels: of a JPEG, and of a GIF, whose blocks have 255 bytes
MOST_SEGMENTS, MOST_BLOCKS = 1000, 10_000
# Exif, colour profiles, previews and comments of a JPEG: all but what its colours need
_JPEG_NOTES = {*range(0xE1, 0xEE), 0xEF, 0xFE}
_JPEG_BARE, _JPEG_PIXELS = {0x01, *range(0xD0, 0xD8)}, (0xD9, 0xDA)
# the largest image in chunks of 8 kB has 8,192
MOST_CHUNKS = 100_000
# what Pillow reads in Python: run lengths of a BMP, and pixels of a portable bitmap whose largest is not 255
LARGEST_RUNS, MOST_SCALED = 4 * MB, 512 * 512
# a line of pixels may be a strip of its own, in each of a few bands
MOST_TAGS, MOST_NUMBERS = 1000, 8 * MOST_PIXELS_A_SIDE
# kinds of a TIFF's numbers that are kept as bytes; tags that hold the place of another directory, which Pillow reads
# with the pixels; kinds of such a place, and their bytes
_TIFF_BYTES, _TIFF_FURTHER, _TIFF_PLACES = (1, 2, 6, 7), (34665, 34853, 40965), {4: 4, 13: 4, 16: 8, 18: 8}
MOST_DIRECTORIES = 10
# a tile's sides are multiples of 16, and often 256 or 512 whatever the image's
_BITS, _TILES, LARGEST_MARGIN = 258, {"TileWidth": 322, "TileLength": 323}, 512


class NotUsable(Exception):
    """What was expected of an image, and what came."""


@contextmanager
def decoded(path: Path) -> Iterator[Image.Image]:
    """A decoded image; Pillow raises errors of many kinds, in decoding and converting, none of which names the file.

    Raises:
        ValueError: if the file is no image of `IMAGE_FORMATS`, or one that nobody would make; the file is named.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            content = read_bytes(path, limit=IMAGE_FILE_LIMIT)
            for begins, check in _CHECKS.items():
                if content.startswith(begins):
                    content = check(content)
            with Image.open(io.BytesIO(content), formats=IMAGE_FORMATS) as image:
                _check_sides(image.size)
                _check_parts(image, content)
                image.load()
                yield image
    except Exception as error:
        if isinstance(error, NotUsable):
            raise ValueError(f"folder: expected {error} in {path}") from None
        raise ValueError(
            f"folder: expected an image ({', '.join(IMAGE_FORMATS)}), got an unreadable file {path} "
            f"({shortened(str(error), 200)})"
        ) from error


def _check_sides(size: tuple[int, int]) -> None:
    """What the header says."""
    if max(size) > MOST_PIXELS_A_SIDE:
        raise NotUsable(f"an image of at most {MOST_PIXELS_A_SIDE:,} pixels a side, got {size[0]:,} x {size[1]:,},")


def _check_parts(image: Image.Image, content: bytes) -> None:
    """What would be decoded beside the pixels that the header promises."""
    tags = getattr(image, "tag_v2", {})
    for name, side in zip(("TileWidth", "TileLength"), image.size, strict=True):
        tile = tags.get(_TILES[name], 0)
        if not isinstance(tile, int) or tile > side + LARGEST_MARGIN:
            raise NotUsable(f"tiles of a TIFF that are not larger than it, got {name} {brief(tile)}")
    bits = tags.get(_BITS, 8)
    if any(isinstance(each, int) and each > 8 for each in (bits if isinstance(bits, tuple) else (bits,))):
        raise NotUsable(f"8 bits a channel, got a TIFF of {brief(bits)}")
    decoders = {part[0] for part in getattr(image, "tile", ())}
    if "ppm" in decoders and math.prod(image.size) > MOST_SCALED:
        raise NotUsable(
            f"255 as the largest value of a portable bitmap of more than {MOST_SCALED:,} pixels, got another"
        )
    if "bmp_rle" in decoders and len(content) > LARGEST_RUNS:
        raise NotUsable(f"a BMP of run lengths of at most {LARGEST_RUNS:,} bytes, got {len(content):,}")


# each kind by how it begins: what comes back is decoded; what is no such file after all, Pillow says


def _jpeg(content: bytes) -> bytes:
    """A JPEG without its notes, which Pillow strings together one by one; an MPO's first picture is a JPEG then."""
    if content.count(b"\xff\xda") > MOST_SCANS:
        raise NotUsable(f"a JPEG of at most {MOST_SCANS} scans, got more")
    kept, at, segments = [content[:2]], 2, 0
    while content[at : at + 1] == b"\xff" and at + 4 <= len(content) and content[at + 1] not in _JPEG_PIXELS:
        marker = content[at + 1]
        length = (
            0 if marker in _JPEG_BARE else -1 if marker == 0xFF else int.from_bytes(content[at + 2 : at + 4], "big")
        )
        if marker not in _JPEG_NOTES:
            kept.append(content[at : at + 2 + length])
        at, segments = at + 2 + length, segments + 1
        if segments > MOST_SEGMENTS:
            raise NotUsable(f"a JPEG of at most {MOST_SEGMENTS:,} segments before its pixels, got more")
    return b"".join([*kept, content[at:]])


def _png(content: bytes) -> bytes:
    # of colours Pillow keeps the upper byte
    if content[24:25] == b"\x10":
        raise NotUsable("8 bits a channel, got a PNG of 16")
    at, chunks = 8, 0
    while at + 8 <= len(content):
        at, chunks = at + 12 + int.from_bytes(content[at : at + 4], "big"), chunks + 1
        if chunks > MOST_CHUNKS:
            raise NotUsable(f"a PNG of at most {MOST_CHUNKS:,} chunks, got more")
    return content


def _gif(content: bytes) -> bytes:
    """Extensions before the first picture, and whatever else is skipped there."""
    colours = content[10] if len(content) > 10 else 0
    at, blocks = 13 + (3 << (colours & 7) + 1 if colours & 128 else 0), 0
    while at < len(content) and content[at : at + 1] not in (b",", b";"):
        # an extension is a mark, a kind, and blocks that say their length, up to an empty one
        at += 2 if content[at : at + 1] == b"!" else 0
        at += 1 + (content[at] if at < len(content) else 0)
        blocks += 1
        if blocks > MOST_BLOCKS:
            raise NotUsable(f"a GIF of at most {MOST_BLOCKS:,} blocks before its first picture, got more")
    return content


def _in_text(content: bytes) -> bytes:
    raise NotUsable("a portable bitmap in bytes, got one in text,")


def _in_bytes(content: bytes) -> bytes:
    words = re.sub(rb"#[^\r\n]*", b"", content[:LONGEST_HEADER]).split(None, 4)
    if len(content) > LONGEST_HEADER and len(words) < 4:
        raise NotUsable(f"a portable bitmap whose header has at most {LONGEST_HEADER:,} bytes, got a longer one")
    return content


def _tiff(content: bytes) -> bytes:
    """An entry of a TIFF's directory may say that it has millions of numbers, which Pillow reads one by one."""
    order, big = {b"II": "<", b"MM": ">"}[content[:2]], content[2:4] in (b"+\0", b"\0+")
    places = [content[8:16] if big else content[4:8]]
    for number, place in enumerate(places):
        said = _entries(content, int.from_bytes(place, "little" if order == "<" else "big"), order, big)
        if len(said) > MOST_TAGS or any(count > MOST_NUMBERS for _, kind, count, _ in said if kind not in _TIFF_BYTES):
            raise NotUsable(f"a TIFF of at most {MOST_TAGS:,} tags, each of at most {MOST_NUMBERS:,} numbers, got more")
        further = [each for each in said if each[0] in _TIFF_FURTHER]
        if number >= MOST_DIRECTORIES or any(kind not in _TIFF_PLACES for _, kind, _, _ in further):
            raise NotUsable(f"a TIFF of at most {MOST_DIRECTORIES} directories, whose places are whole numbers")
        places += [place[: _TIFF_PLACES[kind]] for _, kind, _, place in further]
    return content


def _entries(content: bytes, start: int, order: str, big: bool) -> list[tuple[int, int, int, bytes]]:
    """Tag, kind, count and value or place of a directory's entries; none where it is cut off: Pillow says so."""
    length, entry = (f"{order}Q", f"{order}HHQ8s") if big else (f"{order}H", f"{order}HHI4s")
    try:
        (entries,) = struct.unpack_from(length, content, start)
        first, step = start + struct.calcsize(length), struct.calcsize(entry)
        return [struct.unpack_from(entry, content, first + step * each) for each in range(min(entries, MOST_TAGS + 1))]
    except (struct.error, OverflowError):
        return []


_CHECKS = {
    b"\xff\xd8": _jpeg,
    b"\x89PNG\r\n\x1a\n": _png,
    b"GIF8": _gif,
    **dict.fromkeys(_IN_TEXT, _in_text),
    **dict.fromkeys(_IN_BYTES, _in_bytes),
    **dict.fromkeys((b"II*\0", b"II+\0", b"MM\0*", b"MM\0+"), _tiff),
}
