"""Where a number comes from: commit, versions, processor, threads; and the sidecar that says so beside each table."""

import json
import os
import platform
import subprocess
import sys
from collections.abc import Mapping
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

import pandas as pd

from clustr_core.storage.files import digest, home, read_json, seal_of, write_json
from clustr_core.storage.gate import TABLE_LIMIT, brief, decoded, read_bytes
from clustr_core.storage.tables import parsed_table

# names a file that gathers which tables of the book were read, a line each: a headless run of a chapter sets it
READ = "CLUSTR_READ"
VERSIONED = ("torch", "torchvision", "numpy", "scikit-learn", "umap-learn")


def environment(device: str | None = None) -> dict[str, Any]:
    """What a reader needs to judge a number, and what may move it: versions, device, processor, threads, commit.

    ``threads`` is None where nobody has set any, ``commit`` where the book is no git repository.

    Args:
        device: None says "cuda" if this process has used it, else "cpu".
    """
    torch = sys.modules.get("torch")
    if device is None:
        device = "cuda" if torch and torch.cuda.is_initialized() else "cpu"
    return {
        "commit": commit(Path(__file__).resolve().parents[2]),
        "device": device,
        "python": platform.python_version(),
        "machine": platform.machine(),
        "processor": processor(),
        "threads": torch.get_num_threads() if torch else _threads_of_children(),
        "versions": {name: metadata.version(name) for name in VERSIONED},
    }


def order_of_sums(device: object) -> dict[str, Any]:
    """Where numbers are added, as far as that may move a result: on a CPU by how many threads.

    Args:
        device: of PyTorch, or its name.
    """
    kind = str(device).partition(":")[0]
    if kind != "cpu":
        return {"device": kind}
    import torch

    return {"device": kind, "threads": torch.get_num_threads()}


def _threads_of_children() -> int | None:
    """What ``$OMP_NUM_THREADS`` gives to each process begun from here."""
    given = os.environ.get("OMP_NUM_THREADS", "")
    return int(given) if given.isdecimal() else None


@cache
def commit(root: Path) -> str | None:
    """The commit that is checked out at ``root``, with "+changes" if tracked files differ from it.

    Args:
        root: of code that is run anyway: the settings of a git repository may name programs.
    """
    git = ["git", "-C", str(root)]
    quiet = {"capture_output": True, "text": True, "check": True, "env": os.environ | {"GIT_OPTIONAL_LOCKS": "0"}}
    try:
        top = subprocess.run([*git, "rev-parse", "--show-toplevel"], **quiet).stdout.strip()
        if Path(top).resolve() != root:
            return None
        found = subprocess.run([*git, "rev-parse", "HEAD"], **quiet).stdout.strip()
        changed = subprocess.run([*git, "status", "--porcelain", "--untracked-files=no"], **quiet).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
    return f"{found}+changes" if changed else found


@cache
def processor() -> str:
    """The processor's name, as far as the system tells, with family, model and stepping, as in "AMD EPYC (25.17.1)".

    Two generations may have one name, above all in virtual machines, and sum in another order.
    """
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    # of the first of them
    said = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in reversed(lines))}
    numbers = ".".join(said[key] for key in ("cpu family", "model", "stepping") if key in said)
    name = said.get("model name") or platform.processor() or platform.machine()
    return f"{name} ({numbers})" if numbers else name


def sidecar_of(table: Path) -> Path:
    """``X.json`` beside ``X.csv``."""
    return table.with_suffix(".json")


def is_sidecar(path: Path) -> bool:
    """Whether a file says what `write_sidecar` says; one that cannot be read does not."""
    try:
        said = read_json(path)
        return {"table", "note"} <= said.keys() and isinstance(said.get("made"), dict)
    except (ValueError, OSError):
        return False


def write_sidecar(table: Path, made: Mapping[str, Any], *, note: str = "", written: bytes | None = None) -> None:
    """Say beside a table what it holds and how it was made.

    Args:
        table: the CSV, already written.
        made: `environment` and what else decides the rows: seed, profile, run, weights, protocol, version. What is
            not known is None.
        note: in words, what a reader must know beyond that.
        written: what `write_table` wrote: another process may have put its table there since. Else what is there.
    """
    written = read_bytes(table, limit=TABLE_LIMIT) if written is None else written
    content = {"table": _contents(table, written), "made": dict(made), "note": note}
    write_json(sidecar_of(table), content | {"sha256": seal_of(content)})


def check_sidecar(table: Path) -> dict[str, Any]:
    """The sidecar of a table, held against it.

    Raises:
        FileNotFoundError: if a table has no sidecar.
        ValueError: if the table is not the one that the sidecar speaks of, what differs being named, or the sidecar was
            changed after it was written.
    """
    path = sidecar_of(table)
    if not path.exists():
        raise FileNotFoundError(f"{path}: expected a sidecar that says how {table.name} was made, got none")
    return _held(table, read_bytes(table, limit=TABLE_LIMIT))


def read_checked(table: Path) -> pd.DataFrame:
    """A table, held against its sidecar where it has one.

    Raises:
        ValueError: as `check_sidecar` and `read_table`.
    """
    # what is held against it is what is returned, whoever writes meanwhile
    content = read_bytes(table, limit=TABLE_LIMIT)
    if sidecar_of(table).exists():
        _held(table, content)
    note_read(table, content)
    return parsed_table(table, content)


def note_read(place: Path, content: bytes | None = None) -> None:
    """Add a file or folder of the book to what was read, as it was then, where somebody gathers that.

    Args:
        content: of a file; None for a folder, of which `names_in` counts.
    """
    if (gathered := os.environ.get(READ)) and place.is_relative_to(home()):
        name = place.relative_to(home()).as_posix() + ("/" if content is None else "")
        with Path(gathered).open("a", encoding="utf-8") as file:
            file.write(json.dumps([name, digest(names_in(place) if content is None else content)]) + "\n")


def names_in(folder: Path) -> bytes:
    """The names of all tables in a folder and its partial ones; none where there is no folder."""
    tables = [*folder.glob("*.csv"), *folder.glob("*/*.csv")]
    names = sorted(path.relative_to(folder).as_posix() for path in tables)
    return json.dumps(names).encode("utf-8")


def _held(table: Path, written: bytes) -> dict[str, Any]:
    """The sidecar of a table, held against its bytes; as `check_sidecar`."""
    content = read_json(path := sidecar_of(table))
    said, found = content.get("table"), _contents(table, written)
    made = content.get("made")
    if not isinstance(said, dict) or not isinstance(made, dict):
        raise ValueError(f"{path}: expected the keys table and made, got {sorted(content)}")
    nested = [(name, made.get(name) or {}) for name in ("protocol", "sources", "versions")]
    nested += [(name, each) for name, value in nested[1:2] if isinstance(value, dict) for each in value.values()]
    if odd := [name for name, value in nested if not isinstance(value, dict)]:
        raise ValueError(f"{path}: made: expected a mapping in {odd[0]}, got {brief(made[odd[0]])}")
    for name, kinds in {"profile": dict | str | None, "method": str | None}.items():
        if not isinstance(made.get(name), kinds):
            raise ValueError(f"{path}: made: expected a name in {name}, got {brief(made[name])}")
    if wrong := sorted(key for key in found if said.get(key) != found[key]):
        differing = ", ".join(f"{key} {brief(said.get(key))}, found {brief(found[key])}" for key in wrong)
        raise ValueError(f"{table}: expected the table that its sidecar describes: {differing}")
    if content.pop("sha256", None) != seal_of(content):
        raise ValueError(
            f"{path}: expected the sidecar as it was written, got one of another sha256, changed since or of an "
            "earlier version: make the table again"
        )
    return content


def profile_of(made: Mapping[str, Any]) -> str | None:
    """The profile that a sidecar names: of a figure's table by its name alone."""
    said = made.get("profile")
    return said.get("name") if isinstance(said, dict) else said


def _contents(table: Path, written: bytes) -> dict[str, Any]:
    text = decoded(table, written)
    lines = text.splitlines()
    return {
        "sha256": digest(written),
        "rows": len(lines) - 1,
        "columns": lines[0].split(",") if lines else [],
    }
