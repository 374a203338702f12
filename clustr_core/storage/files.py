"""Files: where the book's lie, how they are written whole or not at all, and what they are known by."""

import hashlib
import json
import logging
import os
import platform
import re
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from clustr_core.storage.gate import JSON_LIMIT, brief, is_stream, named_place, pour, read_text, shortened, target_of

log = logging.getLogger(__name__)
# the variable in which a headless run says where figures wait until its chapter is whole
FIGURES = "CLUSTR_FIGURES"
PROFILE_NAME = re.compile(r"[A-Za-z0-9_-]+")


def _pid_space() -> str:
    """Which numbers of processes these are: two containers of one name may share a file system."""
    try:
        return re.sub(r"\D", "", os.readlink("/proc/self/ns/pid"))
    except OSError:
        return ""


HOST = re.sub(r"\W", "_", platform.node()) + _pid_space()
# no file of the book takes an hour to write: a week leaves room for clocks that differ
ABANDONED = 7 * 24 * 3600
# with what a temporary's name has beside it, a name is at most 255 bytes
LONGEST_NAME = 255 - len(f"..{HOST}-{2**22}.tmp".encode())
_TEMPORARY = re.compile(r"\..+\.(?P<host>\w*)-(?P<pid>\d+)\.tmp", re.DOTALL)


def home() -> Path:
    """The book's root: ``$CLUSTR_HOME``, else the nearest folder upwards that holds myst.yml, else here."""
    if given := os.environ.get("CLUSTR_HOME"):
        return expanded(given)
    here = Path.cwd()
    return next((folder for folder in (here, *here.parents) if (folder / "myst.yml").exists()), here)


def figure_folder(profile: str | None = None) -> Path:
    """Where figures are written: figures/<profile> in the book, or in the folder that `FIGURES` names.

    Args:
        profile: None takes ``$CLUSTR_PROFILE``, or "quick".
    Raises:
        ValueError: if it is no name of a profile.
    """
    profile = profile or os.environ.get("CLUSTR_PROFILE") or "quick"
    if not PROFILE_NAME.fullmatch(profile):
        raise ValueError(f"profile: expected a name of letters, digits, - and _, got {brief(profile)}")
    return Path(os.environ.get(FIGURES) or home() / "figures", profile)


def expanded(path: str | Path) -> Path:
    """The path with its ``~`` or ``~name`` replaced by that home.

    Raises:
        ValueError: if there is no such home.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise ValueError(f"{path}: expected the home of a user of this machine ({error})") from error


@contextmanager
def written_whole(path: Path, *, asked_for: bool = False) -> Iterator[Path]:
    """A temporary path beside ``path`` that takes its name at the end, and vanishes on any error.

    What killed writers left behind in the same folder is removed first. A link that has the name is replaced, and what
    it leads to stays: it may have come with somebody else's run.

    Args:
        asked_for: the user gave the path, as any program's output: what a link leads to is replaced, and a device, a
            FIFO or the standard output written to.
    Raises:
        ValueError: if anything else than a file is there.
        OSError: as the file system says (no space, no permission), with nothing left behind.
    """
    if asked_for and is_stream(path):
        with tempfile.TemporaryDirectory() as folder:
            yield (temporary := Path(folder, "content"))
            pour(temporary, path)
        return
    target = target_of(path) if asked_for else named_place(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    _remove_stale(target.parent)
    temporary = target.with_name(f".{target.name}.{HOST}-{os.getpid()}.tmp")
    try:
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(target)
    except Exception as error:
        if reason := _os_error(error, path):
            raise reason from error
        raise
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def alone(folder: Path, *, busy: str = "") -> Iterator[None]:
    """A block that one process at a time runs for a folder; the others wait.

    Where a file system or an operating system knows no such locks, nobody waits.

    Args:
        busy: what an error says at once, instead of waiting.
    Raises:
        ValueError: with the words of ``busy``, if another process is there.
    """
    try:
        import fcntl
    except ImportError:  # Windows
        yield
        return
    opened = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            if busy:
                raise ValueError(busy) from error
            log.info("%s: waiting for another process that is at work there", folder)
            fcntl.flock(opened, fcntl.LOCK_EX)
        except OSError:
            pass
        yield
    finally:
        os.close(opened)


def copy_whole(source: Path, path: Path) -> None:
    """Copy a file's content, as `written_whole`."""
    with written_whole(path) as temporary:
        shutil.copyfile(source, temporary)


def _remove_stale(folder: Path) -> None:
    """Remove the temporaries of dead writers, of any file in the folder.

    Only this machine (and, in a container, this one) knows whether its writers live; another's temporary is taken for
    abandoned once nothing was written to it for `ABANDONED` seconds.
    """
    for entry in folder.iterdir():
        found = _TEMPORARY.fullmatch(entry.name)
        # of what cannot be tidied the write itself will tell, if it matters to it
        with suppress(OSError):
            if found and ((found["host"] == HOST and not _is_alive(int(found["pid"]))) or _is_abandoned(entry)):
                entry.unlink()


def _is_abandoned(temporary: Path) -> bool:
    return time.time() - temporary.lstat().st_mtime > ABANDONED


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    return True


def _os_error(error: Exception, path: Path) -> OSError | None:
    """What the file system said, and of which file; safetensors wraps it in an error of its own."""
    # as newer and as older versions of it say
    found = re.search(r"(?:\(os error |Os \{ code: )(\d+)", str(error))
    number = int(found[1]) if found else getattr(error, "errno", None)
    if number is None or getattr(error, "filename", None):
        return None
    return OSError(number, os.strerror(number), str(path))


def write_string(path: Path, text: str, *, asked_for: bool = False) -> None:
    """Write a text, whole or not at all; ``asked_for`` as in `written_whole`."""
    with written_whole(path, asked_for=asked_for) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write sorted, indented JSON, whole or not at all."""
    write_string(path, json.dumps(content, indent=2, sort_keys=True) + "\n")


def read_json(path: Path) -> dict[str, Any]:
    """Read JSON.

    Raises:
        ValueError: if the file is no JSON object, with its path.
    """
    text = read_text(path, limit=JSON_LIMIT)
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        why = shortened(str(error))
        raise ValueError(f"{path}: expected JSON, got something truncated or damaged ({why})") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected a JSON object, got {type(content).__name__}")
    return content


def seal_of(content: Mapping[str, Any]) -> str:
    """A digest of all that JSON says, whatever its layout."""
    return digest(json.dumps(content, sort_keys=True))


def digest(*parts: bytes | str) -> str:
    """SHA-256 over the parts, in hexadecimal."""
    total = hashlib.sha256()
    for part in parts:
        encoded = part.encode() if isinstance(part, str) else part
        total.update(len(encoded).to_bytes(8, "little"))
        total.update(encoded)
    return total.hexdigest()
