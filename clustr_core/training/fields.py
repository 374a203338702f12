"""Values from text: YAML without the surprises of its version 1.1, and the fields of a dataclass from what it says.

This module reads no tensors, so that a pipeline can ask for names in no time.
"""

import math
import numbers
import re
from dataclasses import fields
from typing import Any, ClassVar, Literal, get_args, get_origin

import yaml
from yaml.composer import ComposerError
from yaml.constructor import ConstructorError

from clustr_core.storage.gate import PROFILE_LIMIT, brief, listed, shortened, size_in_words

_NUMBER = r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?"
# the dot of .inf and .nan, which Python writes without
_WORD_DOT = re.compile(r"\.(?=[a-zA-Z])")
# lists and mappings inside each other, and all that aliases stand for: a profile has 4 levels and a thousand values
DEEPEST = 20
MOST_VALUES = 20_000
# no whole number of the book has as many digits
MOST_DIGITS = 18
_FRACTION = re.compile(rf"\s*({_NUMBER})\s*(?:/\s*({_NUMBER})\s*)?")


class _Loader(yaml.SafeLoader):
    """YAML as its version 1.2 reads plain words (the core schema), with fractions, and no key twice.

    Version 1.1 takes ``010`` for 8, ``1:30`` for 90, ``1_0`` for 10, ``no`` for false, and ``1e-3`` for text. What is
    nested deeper, or stands for more values, than anybody writes is refused before it is built.
    """

    yaml_implicit_resolvers: ClassVar[dict] = {}

    def __init__(self, stream: str) -> None:
        super().__init__(stream)
        self.depth = self.composed = 0
        self.weights: dict[yaml.Node, int] = {}

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        """A node, weighed by how many values it and its aliases stand for."""
        is_alias, mark = self.check_event(yaml.AliasEvent), self.peek_event().start_mark
        self.depth += 1
        self.composed += 1
        if self.composed > MOST_VALUES:
            raise ComposerError(None, None, f"expected at most {MOST_VALUES:,} values", mark)
        if self.depth > DEEPEST:
            raise ComposerError(None, None, f"expected at most {DEEPEST} levels", mark)
        node = super().compose_node(parent, index)
        self.depth -= 1
        if node is None:
            return None
        if is_alias and node not in self.weights:
            raise ComposerError(None, None, "expected no value that contains itself", mark)
        if not is_alias:
            self.weights[node] = 1 + sum(self.weights[part] for part in _parts(node))
        if self.weights[node] > MOST_VALUES:
            raise ComposerError(None, None, f"expected at most {MOST_VALUES:,} values, aliases counted", mark)
        return node

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


def _parts(node: yaml.Node) -> list[yaml.Node]:
    """The values, and keys, that a node is made of."""
    if isinstance(node, yaml.MappingNode):
        return [part for pair in node.value for part in pair]
    return node.value if isinstance(node, yaml.SequenceNode) else []


def _integer(loader: _Loader, node: yaml.ScalarNode) -> int:
    if len(node.value) > MOST_DIGITS + 1:
        raise ConstructorError(None, None, f"expected at most {MOST_DIGITS} digits", node.start_mark)
    return int(node.value)


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
_Loader.add_constructor("tag:yaml.org,2002:int", _integer)
_Loader.add_constructor("tag:yaml.org,2002:float", lambda loader, node: float(_WORD_DOT.sub("", node.value)))
_Loader.add_constructor("!fraction", lambda loader, node: _fraction(node.value))


def read_yaml(text: str, where: str) -> Any:
    """What a YAML text says: decimal numbers, fractions such as 8/255, true, false, null, text, lists, mappings.

    Args:
        where: what the text is called in a message.
    Raises:
        ValueError: for what is no YAML, a key that stands twice, or more, deeper or longer than anybody writes; line
            and column are named.
    """
    if len(text) > PROFILE_LIMIT:
        raise ValueError(f"{where}: expected at most {size_in_words(PROFILE_LIMIT)}, got {len(text):,} characters")
    try:
        return yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        raise ValueError(f"{where}: expected YAML, got {shortened(str(error))}") from error
    # what YAML's own tags are made of, as a day that no month has
    except (ValueError, TypeError, AttributeError, KeyError) as error:
        raise ValueError(f"{where}: expected YAML with plain values, got {shortened(str(error))}") from error


def mapping(value: Any, where: str) -> dict[str, Any]:
    """A mapping; nothing at all is an empty one."""
    if value is not None and not isinstance(value, dict):
        raise ValueError(f"{where}: expected keys with values, got {brief(value)}")
    if others := [brief(key) for key in value or {} if not isinstance(key, str)]:
        raise ValueError(f"{where}: expected keys that are text, got [{listed(others)}]")
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
        raise ValueError(
            f"{where}: unknown key [{listed([brief(key) for key in unknown])}], expected some of {sorted(types)}"
        )
    return {name: field_value(value, types[name], f"{where}: {name}") for name, value in values.items()}


def as_kept(value: Any, kind: Any, where: str) -> Any:
    """A value from a program as a file will give it back: lists as tuples, the numbers of NumPy as Python's.

    Raises:
        ValueError: if the field cannot hold it; a text is no number here, nor 2.0 a whole one.
    """
    if get_origin(kind) is tuple:
        if not isinstance(value, list | tuple):
            raise ValueError(f"{where}: expected a list, got {brief(value)}")
        return tuple(as_kept(item, get_args(kind)[0], where) for item in value)
    kinds = {kind, *get_args(kind)}
    if value is None and type(None) in kinds:
        return value
    if str in kinds and not isinstance(value, str):
        raise ValueError(f"{where}: expected a name, got {brief(value)}")
    if not kinds & {float, int}:
        return value
    if isinstance(value, numbers.Real) and float in kinds and not isinstance(value, bool):
        return float(value)
    if isinstance(value, numbers.Integral) and not isinstance(value, bool) and float not in kinds:
        return int(value)
    raise ValueError(f"{where}: expected a {'' if float in kinds else 'whole '}number, got {brief(value)}")


def field_value(value: Any, kind: Any, where: str) -> Any:
    """A value as its field's type: numbers from numbers or fractions, tuples from lists, the rest as it is.

    Raises:
        ValueError: if the field cannot hold it.
    """
    if get_origin(kind) is tuple:
        if not isinstance(value, list | tuple):
            raise ValueError(f"{where}: expected a list, got {brief(value)}")
        return tuple(field_value(item, get_args(kind)[0], where) for item in value)
    if value is None and type(None) in get_args(kind):
        return value
    if get_origin(kind) is Literal and value not in get_args(kind):
        raise ValueError(f"{where}: expected one of {get_args(kind)}, got {brief(value)}")
    if kind is str and not isinstance(value, str):
        raise ValueError(f"{where}: expected a name, got {brief(value)}")
    numeric = {float, int} & {kind, *get_args(kind)}
    if not numeric:
        return value
    number = _number(value, where)
    if float in numeric:
        return number
    if number != int(number):
        raise ValueError(f"{where}: expected a whole number, got {brief(value)}")
    return value if type(value) is int else int(number)


def _number(value: Any, where: str) -> float:
    """A finite number, or a fraction of two such as "25.5/255"."""
    try:
        real = isinstance(value, numbers.Real) and not isinstance(value, bool)
        number = float(value) if real else _quotient(value) if isinstance(value, str) else None
    except OverflowError:
        number = math.inf
    if number is None:
        raise ValueError(f"{where}: expected a number or a fraction, got {brief(value)}")
    if not math.isfinite(number):
        raise ValueError(f"{where}: expected a finite number, got {brief(value)}")
    return number


def _fraction(text: str) -> float | str:
    """A fraction, or the text where it is none."""
    return text if (number := _quotient(text)) is None else number


def _quotient(text: str) -> float | None:
    """A decimal number, or a fraction of two; None for anything else."""
    if not (found := _FRACTION.fullmatch(text)) or (found[2] and float(found[2]) == 0):
        return None
    return float(found[1]) / float(found[2] or 1)
