"""Values from text: YAML without the surprises of its version 1.1, and the fields of a dataclass from what it says.

This module reads no tensors, so that a pipeline can ask for names in no time.
"""

import math
import re
from dataclasses import fields
from typing import Any, ClassVar, get_args, get_origin

import yaml
from yaml.composer import ComposerError

_NUMBER = r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?"
# the dot of .inf and .nan, which Python writes without
_WORD_DOT = re.compile(r"\.(?=[a-zA-Z])")
_FRACTION = re.compile(rf"\s*({_NUMBER})\s*(?:/\s*({_NUMBER})\s*)?")


class _Loader(yaml.SafeLoader):
    """YAML as its version 1.2 reads plain words (the core schema), with fractions, and no key twice.

    Version 1.1 takes ``010`` for 8, ``1:30`` for 90, ``1_0`` for 10, ``no`` for false, and ``1e-3`` for text.
    """

    yaml_implicit_resolvers: ClassVar[dict] = {}

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        """A mapping, in which no key may stand twice."""
        node = super().compose_mapping_node(anchor)
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if (key.tag, key.value) in seen:
                    raise ComposerError(None, None, f"the key {key.value!r} stands twice", key.start_mark)
                seen.add((key.tag, key.value))
        return node


_DIGITS = list("-+.0123456789")
for _tag, _pattern, _first in (
    ("tag:yaml.org,2002:bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("tag:yaml.org,2002:null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("tag:yaml.org,2002:merge", r"<<", ["<"]),
    ("tag:yaml.org,2002:int", r"[-+]?[0-9]+", _DIGITS),
    ("tag:yaml.org,2002:float", rf"{_NUMBER}|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)", _DIGITS),
    ("!fraction", rf"{_NUMBER}/{_NUMBER}", _DIGITS),
):
    _Loader.add_implicit_resolver(_tag, re.compile(rf"^(?:{_pattern})$"), _first)
_Loader.add_constructor("tag:yaml.org,2002:int", lambda loader, node: int(node.value))
_Loader.add_constructor("tag:yaml.org,2002:float", lambda loader, node: float(_WORD_DOT.sub("", node.value)))
_Loader.add_constructor("!fraction", lambda loader, node: _quotient(node.value) or node.value)


def read_yaml(text: str, where: str) -> Any:
    """What a YAML text says: decimal numbers, fractions such as 8/255, true, false, null, text, lists, mappings.

    Args:
        where: what the text is called in a message.
    Raises:
        ValueError: for what is no YAML, or a key that stands twice; the line is named.
    """
    try:
        return yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        raise ValueError(f"{where}: expected YAML, got {error}") from error


def mapping(value: Any, where: str) -> dict[str, Any]:
    """A mapping; nothing at all is an empty one."""
    if value is not None and not isinstance(value, dict):
        raise ValueError(f"{where}: expected keys with values, got {value!r}")
    return value or {}


def build(kind: type, values: dict[str, Any], where: str) -> Any:
    """A dataclass from the values of its fields.

    Raises:
        ValueError: for an unknown field, or a value without meaning; ``where`` begins the message.
    """
    try:
        return kind(**field_values(kind, values, where))
    except ValueError as error:
        raise ValueError(f"{where}: {error}" if not str(error).startswith(where) else str(error)) from error


def field_values(kind: type, values: dict[str, Any], where: str) -> dict[str, Any]:
    """Known fields only, each value cast to what its field says.

    Raises:
        ValueError: for an unknown field, or a value that its field cannot hold.
    """
    types = {item.name: item.type for item in fields(kind)}
    if unknown := sorted(set(values) - set(types), key=str):
        raise ValueError(f"{where}: unknown key {unknown}, expected some of {sorted(types)}")
    return {name: field_value(value, types[name], f"{where}: {name}") for name, value in values.items()}


def field_value(value: Any, kind: Any, where: str) -> Any:
    """A value as its field's type: numbers from numbers or fractions, tuples from lists, the rest as it is.

    Raises:
        ValueError: if the field cannot hold it.
    """
    if get_origin(kind) is tuple:
        if not isinstance(value, list | tuple):
            raise ValueError(f"{where}: expected a list, got {value!r}")
        return tuple(field_value(item, get_args(kind)[0], where) for item in value)
    if value is None and type(None) in get_args(kind):
        return value
    if kind is str and not isinstance(value, str):
        raise ValueError(f"{where}: expected a name, got {value!r}")
    numeric = {float, int} & {kind, *get_args(kind)}
    if not numeric:
        return value
    number = _number(value, where)
    if float in numeric:
        return number
    if number != int(number):
        raise ValueError(f"{where}: expected a whole number, got {value!r}")
    return value if type(value) is int else int(number)


def _number(value: Any, where: str) -> float:
    """A finite number, or a fraction of two such as "25.5/255"."""
    number = float(value) if type(value) in (int, float) else _quotient(str(value))
    if number is None:
        raise ValueError(f"{where}: expected a number or a fraction, got {value!r}")
    if not math.isfinite(number):
        raise ValueError(f"{where}: expected a finite number, got {value!r}")
    return number


def _quotient(text: str) -> float | None:
    """A decimal number, or a fraction of two; None for anything else."""
    if not (found := _FRACTION.fullmatch(text)) or (found[2] and float(found[2]) == 0):
        return None
    return float(found[1]) / float(found[2] or 1)
