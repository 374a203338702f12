"""Hostile files of the released format."""

import collections
import io
import os
import pickle
import pickletools
import random
import shutil
import struct
import subprocess
import warnings
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from clustr_core.models.encoders import ResNet18
from clustr_core.models.official import load_official
from tools.torture.forks import Case, Expected


class _Runs:
    """A value whose pickle calls a function when it is read."""

    def __init__(self, function: Callable, *arguments: object) -> None:
        self.function, self.arguments = function, arguments

    def __reduce__(self) -> tuple[Callable, tuple]:
        """What the pickle calls."""
        return self.function, self.arguments


def cases(folder: Path, canaries: Path) -> Iterator[Case]:
    """All of them; the files lie in ``folder``."""
    whole = good()

    def case(name: str, content: bytes, expected: Expected = "refused") -> Case:
        def call() -> object:
            (path := folder / "released.pth").write_bytes(content)
            return load_official(path, dataset="cifar10").training

        return Case("released", name, call, expected)

    yield case("a good one", whole, "accepted")
    yield case("a bare one", _bytes(_state()), "accepted")
    yield case("an old one", good(_use_new_zipfile_serialization=False), "accepted")
    for name, content in _payloads(canaries).items():
        yield case(name, content)
    for part in (0, 1, 5, 10, 25, 50, 75, 90, 99):
        yield case(f"cut at {part} %", whole[: len(whole) * part // 100])
    drawn = random.Random(3)
    for number in range(60):
        flipped = bytearray(whole)
        flipped[drawn.randrange(len(whole))] ^= 1 << drawn.randrange(8)
        yield case(f"bit {number}", bytes(flipped), "either")
    for name, content in _archives(whole, canaries).items():
        yield case(name, content)
    # what is loaded is what was looked at
    yield case("two directories", _two_directories(whole), "accepted")
    for name, content in _values().items():
        yield case(name, _bytes(content))
    for name, (make, expected) in _places(folder).items():
        yield Case("released", name, make, expected)


def _state(width: int = 2, classes: int = 10) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    network = ResNet18(width=width, mean=(0.0, 0, 0), std=(1.0, 1, 1))
    state = {name: value.clone() for name, value in network.state_dict().items() if not name.startswith("normalize.")}
    return state | {"linear.weight": torch.randn(classes, 8 * width), "linear.bias": torch.randn(classes)}


def _clustered(**changes: Any) -> dict[str, Any]:
    content = {
        "state_dict": _state(),
        "cluster_classes": torch.arange(10).repeat_interleave(2),
        "cluster_centers": torch.randn(20, 16),
        "variance": torch.ones(20),
        "L": 5,
        "K": 2,
        "normalize_probs": True,
    }
    return content | changes


def good(**how: Any) -> bytes:
    """A released file, written as `torch.save` is told."""
    return _bytes(_clustered(), **how)


def _bytes(content: object, **how: Any) -> bytes:
    written = io.BytesIO()
    torch.save(content, written, **how)
    return written.getvalue()


def _payloads(canaries: Path) -> dict[str, bytes]:
    def touch(name: str) -> _Runs:
        return _Runs(os.system, f"touch {canaries}/{name}")

    calls = {
        "eval": _Runs(eval, f"open('{canaries}/eval', 'w')"),
        "exec": _Runs(exec, f"open('{canaries}/exec', 'w')"),
        "Popen": _Runs(subprocess.Popen, ["touch", f"{canaries}/popen"]),
        "open": _Runs(open, f"{canaries}/open", "w"),
        "mkdir": _Runs(os.mkdir, f"{canaries}/folder"),
        "getattr": _Runs(getattr, "x", "upper"),
        "rmtree": _Runs(shutil.rmtree, f"{canaries}/nothing"),
        "a module": torch.nn.Linear(2, 2),
    }
    found = {f"calls {name}": _bytes(_clustered(x=call)) for name, call in calls.items()}
    for protocol in range(6):
        found[f"a pickle of protocol {protocol}"] = pickle.dumps({"state_dict": touch(f"p{protocol}")}, protocol)
    for protocol in range(2, 6):
        for new in (True, False):
            how = {"pickle_protocol": protocol, "_use_new_zipfile_serialization": new}
            found[f"calls, protocol {protocol}, {new}"] = _bytes(_clustered(x=touch(f"s{protocol}{new}")), **how)
    place = str(canaries).encode()
    return found | {
        "calls in the state": _bytes(_clustered(state_dict=_state() | {"conv1.weight": touch("state")})),
        "calls alone": _bytes(touch("alone")),
        "by hand": b"cos\nsystem\n(S'touch " + place + b"/hand'\ntR.",
        "by hand, an instance": b"(S'touch " + place + b"/instance'\nios\nsystem\n.",
        "an extension": b"\x80\x02\x82\x01.",
        "a persistent name": b"Pfoo\n.",
        "a frame of 2^62": b"\x80\x04\x95" + struct.pack("<Q", 2**62) + b".",
        "bytes of 2^40": b"\x80\x04\x8e" + struct.pack("<Q", 2**40) + b"abc.",
        "a number of 2^31 bytes": b"\x80\x02\x8b" + struct.pack("<i", 2**31 - 1) + b"\x01.",
        "a memo of 2^31": b"\x80\x02}r" + struct.pack("<I", 2**31) + b".",
        "200,000 lists": b"\x80\x02" + b"]" * 200_000 + b"a" * 199_999 + b".",
        **{f"a hash of 2^60 steps, {name}": content for name, content in _hash_bombs().items()},
        "a bytearray of 2^40": _called("builtins", "bytearray", b"\x8a\x06" + (2**40).to_bytes(6, "little")),
        "a tensor of 2^40": _called("torch", "Tensor", b"\x8a\x06" + (2**40).to_bytes(6, "little")),
        "a storage of 2^40": _called("torch.storage", "UntypedStorage", b"\x8a\x06" + (2**40).to_bytes(6, "little")),
        "text of 2^30 in hexadecimal": b"\x80\x02c_codecs\nencode\nq\x00X\x04\0\0\0abcd"
        + b"q\x01h\x00h\x01X\x03\0\0\0hex\x86R" * 28
        + b".",
        "a thousand hashes of 2^18 steps": _hashes(),
        "an older file without its storages": _without_storages(),
        "a name of 10^5": _called("x" * 100_000, "y", b"N"),
        "10^7 instructions": b"\x80\x02" + b"N0" * 5_000_000 + b"}.",
        "text": b"hello",
        "a page": b"<!DOCTYPE html><html>404</html>",
        "a pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n",
        "safetensors": struct.pack("<Q", 2) + b"{}",
    }


def _called(module: str, name: str, argument: bytes) -> bytes:
    """A pickle that calls a function of one argument."""
    return b"\x80\x02c" + f"{module}\n{name}\n".encode() + argument + b"\x85R."


def _hashes() -> bytes:
    """One tuple of 2^18 leaves, the key of a thousand dicts."""
    doubled = b"".join(b"q" + bytes([level]) + b"h" + bytes([level]) + b"\x86" for level in range(18))
    return b"\x80\x02)" + doubled + b"q\xff0]" + b"}h\xffNsa" * 1000 + b"."


def _without_storages() -> bytes:
    """A file of the older format that lists no storage at its end, and holds none."""
    old = good(_use_new_zipfile_serialization=False)
    stream = io.BytesIO(old)
    for _ in range(4):
        collections.deque(pickletools.genops(stream), maxlen=0)
    return old[: stream.tell()] + pickle.dumps([], 2)


def _hash_bombs() -> dict[str, bytes]:
    """Tuples that hold another twice, 60 deep, as a key; alone, and as the pickle of an archive."""
    doubled = b"".join(b"q" + bytes([level]) + b"h" + bytes([level]) + b"\x86" for level in range(60))
    alone = b"\x80\x02})" + doubled + b"Ns."
    magic = pickle.dumps(0x1950A86A20F9469CFC6C, 2) + pickle.dumps(1001, 2)
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as target:
        target.writestr("archive/data.pkl", alone)
        target.writestr("archive/version", b"3\n")
    old = magic + pickle.dumps({"little_endian": True}, 2) + alone + pickle.dumps([], 2)
    return {"in an archive": archive.getvalue(), "as of old": old, "bare": alone}


def _archives(whole: bytes, canaries: Path) -> dict[str, bytes]:
    def again(
        change: Callable[[str, bytes], bytes], kind: int = zipfile.ZIP_STORED, extra: dict[str, bytes] | None = None
    ) -> bytes:
        written = io.BytesIO()
        with zipfile.ZipFile(io.BytesIO(whole)) as source, zipfile.ZipFile(written, "w", kind) as target:
            for info in source.infolist():
                target.writestr(info.filename, change(info.filename, source.read(info.filename)))
            for name, content in (extra or {}).items():
                target.writestr(name, content)
        return written.getvalue()

    zeros, deflated = bytes(600_000_000), zipfile.ZIP_DEFLATED
    runs = pickle.dumps(_Runs(os.system, f"touch {canaries}/archive"), 2)
    return {
        "compressed": again(lambda name, content: content, deflated),
        "a bomb beside": again(lambda name, content: content, deflated, {"archive/data/999": zeros}),
        "a bomb of a tensor": again(lambda name, content: zeros if name.endswith("data/0") else content, deflated),
        "a bomb of a pickle": again(
            lambda name, content: content + zeros if name.endswith("data.pkl") else content, deflated
        ),
        "no pickle": again(lambda name, content: b"" if name.endswith("data.pkl") else content),
        "another pickle": again(lambda name, content: runs if name.endswith("data.pkl") else content),
        "a short tensor": again(
            lambda name, content: content[: len(content) // 2] if name.endswith("data/0") else content
        ),
        "records in each other": _overlapping(),
        "a pickle that zipfile does not see": _beside(whole, "archive/DATA.PKL"),
        "two pickles": _beside(whole, "archive/data.pkl"),
        "a pickle elsewhere": _beside(whole, "other/data.pkl"),
    }


def _two_gigabytes() -> bytes:
    return _called("builtins", "bytearray", b"J" + (2_000_000_000).to_bytes(4, "little"))


def _beside(whole: bytes, name: str) -> bytes:
    """A good file with a pickle more that asks for 2 GB."""
    written = io.BytesIO(whole)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with zipfile.ZipFile(written, "a") as target:
            target.writestr(name, _two_gigabytes())
    return written.getvalue()


def _two_directories(whole: bytes) -> bytes:
    """A file in which a reader that goes by the end finds a good one, and one that goes by places another."""
    other = io.BytesIO()
    with zipfile.ZipFile(other, "w") as target:
        target.writestr("archive/data.pkl", _two_gigabytes())
        target.writestr("archive/version", b"3\n")
    end = other.getvalue().rindex(b"PK\5\6")
    return other.getvalue()[:end] + whole


def _overlapping() -> bytes:
    """2,000 records that are one."""
    inner = bytes(10 << 20)
    packer = zlib.compressobj(9, zlib.DEFLATED, -15)
    packed, check = packer.compress(inner) + packer.flush(), zlib.crc32(inner)
    sizes = (check, len(packed), len(inner), 1, 0)
    local = struct.pack("<4sHHHHHIIIHH", b"PK\3\4", 20, 0, 8, 0, 0, *sizes) + b"a" + packed
    record = struct.pack("<4sHHHHHHIIIHHHHHII", b"PK\1\2", 20, 20, 0, 8, 0, 0, *sizes, 0, 0, 0, 0, 0) + b"a"
    central = record * 2000
    return local + central + struct.pack("<4sHHHHIIH", b"PK\5\6", 0, 0, 2000, 2000, len(central), len(local), 0)


def _values() -> dict[str, Any]:
    state, one = _state(), torch.ones(1)
    first = state["conv1.weight"]

    def with_state(**changes: torch.Tensor) -> dict[str, Any]:
        return _clustered(state_dict=state | {name.replace("__", "."): value for name, value in changes.items()})

    with torch.device("meta"):
        wide = ResNet18(width=2048, mean=(0.0, 0, 0), std=(1.0, 1, 1)).state_dict()
    expanded = {
        name: torch.ones(()).long() if not value.dim() else one.expand(value.shape)
        for name, value in wide.items()
        if not name.startswith("normalize.")
    } | {"linear.weight": one.expand(10, 8 * 2048), "linear.bias": one.expand(10)}
    bomb: list = ["x"]
    for _ in range(40):
        bomb = [bomb, bomb]
    itself: dict = {}
    itself["state_dict"] = itself
    many = 10**7
    found = {
        **{
            f"weights of {dtype}": with_state(conv1__weight=first.to(dtype))
            for dtype in (torch.int8, torch.int64, torch.bool, torch.complex64)
        },
        **{
            f"{value} in {name}": with_state(**{name: torch.full_like(state[name.replace("__", ".")], value)})
            for value in (float("nan"), float("inf"))
            for name in ("conv1__weight", "bn1__running_var", "linear__bias")
        },
        "sparse": with_state(linear__weight=state["linear.weight"].to_sparse()),
        "without numbers": with_state(linear__weight=torch.empty(10, 16, device="meta")),
        "negative variances of batch norm": with_state(bn1__running_var=-torch.ones(2)),
        "weights beyond float32": with_state(conv1__weight=first.double() * 1e300),
        "2,048 wide, of one number": expanded,
        "10^7 clusters of one number": _clustered(
            K=many,
            cluster_classes=torch.zeros(1).long().expand(10 * many),
            cluster_centers=one.expand(10 * many, 16),
            variance=1.0,
        ),
        "a tensor of 10^12 rows of one number": with_state(conv1__weight=one.expand(10**12, 3, 3, 3)),
        "20,000 names": state | {f"x{i}": one for i in range(20_000)},
        "a name of 10 MB": state | {"y" * 10_000_000: one},
        "a prefix of 200,000": {"module." * 200_000 + "z": one} | state,
        "itself": itself,
        "a list": [1, 2, 3],
        "a number": 7,
        "nothing": {},
        "a name with and without a prefix": state | {"module.conv1.weight": first},
        "100 classes": _clustered(state_dict=_state(classes=100)),
    }
    odd = {
        "cluster_centers": (torch.full((20, 16), float("nan")), torch.randn(16, 20), [[0.0] * 16] * 20),
        "variance": (torch.zeros(20), -torch.ones(20), float("nan"), "1", 10**400, bomb),
        "K": (0, -1, 10**18, 10**5000, 2.0, "2", bomb),
        "L": (10**9, 0, float("nan")),
        "normalize_probs": ("yes", 1, None, bomb, "x" * 50_000_000),
        "cluster_classes": (torch.arange(20), -torch.ones(20).long(), torch.ones(20), torch.ones(20).bool()),
        "state_dict": (
            [1, 2],
            None,
            {},
            {"state_dict": state},
            dict.fromkeys(state, "x"),
            dict(enumerate(state.values())),
        ),
    }
    for name, values in odd.items():
        found |= {f"{name}, the {number}. oddity": _clustered(**{name: value}) for number, value in enumerate(values)}
        found[f"without {name}"] = {key: value for key, value in _clustered().items() if key != name}
    return found


def _places(folder: Path) -> dict[str, tuple[Callable[[], object], Expected]]:
    """What stands where a file is expected."""

    def made(make: Callable[[Path], object]) -> Callable[[], object]:
        def call() -> object:
            path = folder / "place"
            path.unlink(missing_ok=True)
            make(path)
            return load_official(path, dataset="cifar10")

        return call

    def at(path: str) -> Callable[[], object]:
        return lambda: load_official(path, dataset="cifar10")

    return {
        "a FIFO": (made(os.mkfifo), "refused"),
        "a link to itself": (made(lambda path: path.symlink_to(path)), "refused"),
        "a link to zeros": (made(lambda path: path.symlink_to("/dev/zero")), "refused"),
        **{
            f"the file {path[:20]!a}": (at(path), "refused")
            for path in (
                "/dev/null",
                "/dev/zero",
                "/proc/self/mem",
                "/bin/ls",
                "/",
                "/nothing.pth",
                str(folder / ("x" * 5000)),
                f"{folder}/a\0b",
            )
        },
        "data outside": (lambda: load_official(folder / "released.pth", dataset="../../etc"), "refused"),
    }
