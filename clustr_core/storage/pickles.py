"""What a pickle would do, read off its instructions before anything reads it for good.

PyTorch's restricted reader runs nothing that is not on its own list; what it does run may still ask for all memory
(`bytearray` of a number), or take for ever (the hash of a tuple that holds another twice, which holds another twice).
"""

import io
import pickletools
import re
from typing import Any

# a released ResNet-18 has some 6,000 instructions in 20 KB
MOST_BYTES, MOST_INSTRUCTIONS = 64 * 2**20, 500_000
# how many values are visited where hashes are taken, in all
MOST_VISITS = 1_000_000
# what a dict of tensors and plain values is built with
_BUILDERS = {
    ("collections", "OrderedDict"), ("collections", "Counter"), ("builtins", "set"), ("__builtin__", "set"),
    ("torch", "Size"), ("torch", "device"), ("torch._utils", "_rebuild_parameter"),
    ("torch._utils", "_rebuild_tensor"), ("torch._utils", "_rebuild_tensor_v2"),
    ("torch._utils", "_rebuild_sparse_tensor"), ("torch.serialization", "_get_layout"),
}  # fmt: skip
# a dtype, and what a tensor's numbers lie in
_KIND = re.compile(r"(u?int|float|bfloat|complex)\d+|bool|[A-Z][A-Za-z0-9]*(?<!Untyped)(?<!Typed)Storage")
_TEXT = {"GLOBAL", "INST"}
_GROWING = {"APPEND", "APPENDS", "SETITEM", "SETITEMS", "ADDITEMS", "BUILD"}
_HASHING = {"SETITEM", "SETITEMS", "ADDITEMS", "DICT", "FROZENSET", "REDUCE", "BUILD"}
_WORDS = {"UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "STRING", "BINSTRING", "SHORT_BINSTRING"}
_OTHER_CALLS = {"STACK_GLOBAL", "OBJ", "NEWOBJ", "NEWOBJ_EX", "EXT1", "EXT2", "EXT4"}


class NotPlain(ValueError):
    """A pickle that asks for something else than tensors and plain values; its name, or in words."""


def check_pickles(content: bytes, count: int = 1) -> set[str]:
    """Refuse pickles that hold more than tensors and plain values, or that a reader would take too long over.

    Args:
        content: so many pickles, one after the other; what follows is not looked at.
    Returns:
        the words of the last one.
    Raises:
        NotPlain: if one asks for anything else.
        ValueError: if one is damaged, or too large.
    """
    if count == 1 and len(content) > MOST_BYTES:
        raise ValueError(f"a pickle of {len(content):,} bytes")
    stream, seen, words = io.BytesIO(content), 0, set[str]()
    for _ in range(count):
        values = _Values()
        words.clear()
        for instruction, argument, position in pickletools.genops(stream):
            seen += 1
            if seen > MOST_INSTRUCTIONS or (position or 0) > MOST_BYTES:
                raise ValueError(f"a pickle of more than {MOST_INSTRUCTIONS:,} instructions")
            _check_call(instruction.name, argument)
            values.take(instruction, argument)
            if instruction.name in _WORDS:
                words.add(str(argument))
    return words


def _check_call(name: str, argument: Any) -> None:
    if name in _OTHER_CALLS:
        raise NotPlain(f"the instruction {name}")
    if name not in _TEXT:
        return
    module, _, attribute = str(argument).partition(" ")
    if (module, attribute) not in _BUILDERS and not (module == "torch" and _KIND.fullmatch(attribute)):
        raise NotPlain(f"{module}.{attribute}")


class _Values:
    """The stack of a reader, of each value only how many values its hash would visit, in a cell that memo and stack
    share; and how many all hashes together may."""

    def __init__(self) -> None:
        self.stack: list[list[int] | None] = []
        self.kept: dict[int, list[int]] = {}
        self.total = 0

    def take(self, instruction: pickletools.OpcodeInfo, argument: Any) -> None:
        """Do one instruction."""
        name = instruction.name
        if name.endswith("GET"):
            self.stack.append(self.kept.get(int(argument), [1]))
        elif name.endswith("PUT"):
            self.kept[int(argument)] = self._top()
        elif name == "MEMOIZE":
            self.kept[len(self.kept)] = self._top()
        elif name == "MARK":
            self.stack.append(None)
        else:
            self._work(name, self._taken(instruction), len(instruction.stack_after))

    def _top(self) -> list[int]:
        if not self.stack or self.stack[-1] is None:
            raise ValueError("a pickle that keeps what there is not")
        return self.stack[-1]

    def _taken(self, instruction: pickletools.OpcodeInfo) -> list[list[int]]:
        """What an instruction takes from the stack, the lowest last."""
        before, taken = instruction.stack_before, []
        several = pickletools.markobject in before
        count = before.index(pickletools.markobject) if several else len(before)
        if several:
            while True:
                if not self.stack:
                    raise ValueError("a pickle without a mark")
                if (value := self.stack.pop()) is None:
                    break
                taken.append(value)
        for _ in range(count):
            if not self.stack or (value := self.stack.pop()) is None:
                raise ValueError("a pickle that takes what there is not")
            taken.append(value)
        return taken

    def _work(self, name: str, taken: list[list[int]], times: int) -> None:
        visits = 1 + sum(value[0] for value in taken)
        self.total += visits * (name in _HASHING)
        if max(visits, self.total) > MOST_VISITS:
            raise NotPlain("values in values, more than could be looked at")
        if name in _GROWING and taken:
            # what grows is what it was, wherever else it is kept
            taken[-1][0] = visits
            self.stack.append(taken[-1])
        else:
            self.stack.extend([visits] for _ in range(times))
