"""Tensors as files that know what they hold: a digest of every name, shape and number is checked at every read."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from clustr_core.storage.files import digest, seal_of, written_whole
from clustr_core.storage.gate import TENSORS_LIMIT, read_bytes, shortened

ENTRY = "content"
# how safetensors begins: the length of its header, in JSON, which holds under this name what is said of the tensors
_LENGTH, _SAID = 8, "__metadata__"


def write_tensors(path: Path, kind: str, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> str:
    """Write tensors, and what is said of them, as safetensors: whole or not at all, with a digest of all of it.

    Args:
        kind: what the file is, as "a checkpoint".
        facts: JSON-able.
    Returns:
        the SHA-256 of the file.
    Raises:
        OSError: as the file system says.
    """
    kept, said = _apart(tensors), dict(facts)
    # one entry, since safetensors writes several in any order
    content = {"kind": kind, "facts": said, "sha256": _digest_of(kind, kept, said)}
    with written_whole(path) as temporary:
        # not by save_file, which begins a file of its own beside it, and leaves it there if it is killed
        temporary.write_bytes(written := save(kept, metadata={ENTRY: json.dumps(content)}))
    return digest(written)


def _apart(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """On the CPU, each in memory of its own, as safetensors wants them."""
    kept, places = {}, set()
    for name, tensor in tensors.items():
        here = tensor.detach().cpu().contiguous()
        place = here.untyped_storage().data_ptr()
        kept[name] = here.clone() if place in places else here
        places.add(place)
    return kept


def read_tensors(path: Path, kind: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What `write_tensors` wrote: the tensors, on the CPU, and the facts.

    Raises:
        ValueError: if it is of another kind, truncated, or in any bit not what was written; the file is named.
    """
    # by one opening of it: a file that is opened by its name once more may be the next one by then
    written = read_bytes(path, limit=TENSORS_LIMIT)
    try:
        tensors = load(written)
        header = json.loads(written[_LENGTH : _LENGTH + int.from_bytes(written[:_LENGTH], "little")])
        content = json.loads(header[_SAID][ENTRY])
        found, facts, said = content["kind"], content["facts"], content["sha256"]
        if not isinstance(found, str) or not isinstance(facts, dict):
            raise TypeError("something else")
        # in here: what is nested as deep as can just be read may be too deep to be written
        computed = _digest_of(found, tensors, facts)
    except (SafetensorError, KeyError, TypeError, ValueError, RuntimeError) as error:
        raise ValueError(
            f"{path}: expected {kind}, got a truncated or damaged file ({shortened(str(error))})"
        ) from error
    if said != computed:
        raise ValueError(f"{path}: expected {kind}, got a damaged file (its sha256 is another)")
    if found != kind:
        raise ValueError(f"{path}: expected {kind}, got {shortened(str(found))}")
    return tensors, facts


def _digest_of(kind: str, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> str:
    parts: list[bytes | str] = [kind, seal_of(facts)]
    for name in sorted(tensors):
        tensor = tensors[name]
        parts += [f"{name} {tensor.dtype} {list(tensor.shape)}", _bytes(tensor)]
    return digest(*parts)


def _bytes(tensor: Tensor) -> bytes:
    return tensor.reshape(-1).view(torch.uint8).numpy().tobytes()
