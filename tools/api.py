"""Write `api.md`, a page of the book: every public name of the package, its signature and its docstring.

    python -m tools.api

What `dir(clustr_core)` offers is read from the sources, without PyTorch. A docstring is written in the house's form
(one line, the equation, then Args, Returns, Raises, Warns, Source); here it becomes Markdown in which nothing of it is
read as MyST, and a name of the package becomes a link.
"""

import argparse
import ast
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from textwrap import dedent

import clustr_core
from clustr_core.storage.files import home, write_string

PAGE = "api.md"
WINGS = {
    "data": "images and labels as tensors",
    "models": "encoders, clusters and classifiers",
    "attacks": "searches for adversarial examples",
    "certificates": "radii within which nothing changes",
    "training": "recipes, losses and runs",
    "measuring": "profiles and protocols",
}
HEAD = """---
title: API
numbering:
  title: false
---

Every public name of `clustr_core`. `import clustr_core as cc` offers them all, and loads each one on first use:

```python
import clustr_core as cc

run = cc.fit(cc.load_profile("quick").recipes["clustr"])
```

Everything else is imported from its module. [Notation and terms](notation.md) explains the words.
"""
_SECTIONS = re.compile(r"(?P<name>Args|Returns|Raises|Warns|Source): *(?P<rest>.*)")
_ITEM = re.compile(r"(?P<name>[\w*]+(?:, [\w*]+)*): (?P<text>.*)", re.S)
_NAMED = ("Args", "Raises", "Warns")
_WIDE = 88
# what MyST would read
_SPECIAL = re.compile(r"([\\`*_$<>\[\]{}~^|#@])")
_OPERATOR = re.compile(r"[-+*/=<>]{1,2}|\.\.")
_LETTERS = re.compile(r"\d+(?:\.\d+)?|[b-zB-Z]|log|exp|max|min|mean|logsumexp|argmax|sqrt\(.*\)")


@dataclass(frozen=True)
class Entry:
    """A public name: the module that it is imported from, and its definition there."""

    name: str
    module: str
    node: ast.FunctionDef | ast.ClassDef

    @property
    def wing(self) -> str:
        """The wing of the package in which it lives."""
        return self.module.split(".")[1]


def entries(root: Path) -> list[Entry]:
    """Every public name, in the order of the wings and of its module."""
    found = []
    for name, home_of in clustr_core._HOME_OF.items():
        module = f"clustr_core.{home_of}"
        path = root / f"{module.replace('.', '/')}.py"
        body = ast.parse(path.read_text(encoding="utf-8")).body
        defined = [node for node in body if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name == name]
        if len(defined) != 1:
            raise ValueError(f"{name}: expected one definition in {module}, got {len(defined)}")
        found.append(Entry(name, module, defined[0]))
    if unknown := {entry.wing for entry in found} - set(WINGS):
        raise ValueError(f"WINGS: expected also {sorted(unknown)}")
    return sorted(found, key=lambda entry: (list(WINGS).index(entry.wing), entry.module, entry.name.lower()))


def page(root: Path) -> str:
    """The whole page."""
    known = entries(root)
    names = {entry.name for entry in known}
    parts = [HEAD]
    for wing, what in WINGS.items():
        mine = [entry for entry in known if entry.wing == wing]
        links = ", ".join(_link(entry.name) for entry in mine)
        parts.append(f"## {wing.capitalize()}\n\n{what.capitalize()}: {links}.\n")
        parts += [_section(entry, names) for entry in mine]
    return re.sub(r"\n{3,}", "\n\n", "\n".join(parts))


def _link(name: str) -> str:
    return f"[`{name}`](#{label(name)})"


def label(name: str) -> str:
    """The label of a name on the page; labels know no capitals, so a class beside a function of its name says so."""
    twin = name != name.lower() and name.lower() in clustr_core._HOME_OF
    return f"api-{name.lower().replace('_', '-')}{'-class' * twin}"


def _section(entry: Entry, names: Iterable[str]) -> str:
    others = set(names) - {entry.name}
    lines = [
        f"({label(entry.name)})=",
        f"### `{entry.name}`",
        "",
        f"From `{entry.module}`{_bases(entry.node, others)}.",
        "",
        "```python",
        signature(entry.node),
        "```",
        "",
        *docstring(ast.get_docstring(entry.node) or "", others),
        *_methods(entry.node, others),
    ]
    return "\n".join(lines) + "\n"


def _bases(node: ast.FunctionDef | ast.ClassDef, names: set[str]) -> str:
    """Where the fields that a class does not list come from."""
    bases = map(ast.unparse, node.bases) if isinstance(node, ast.ClassDef) else ()
    known = [base for base in bases if base in names]
    return f"; has the fields of {_link(known[0])} as well" if known else ""


def signature(node: ast.FunctionDef | ast.ClassDef) -> str:
    """How a function is called, or what a class is made of, with types and defaults."""
    if isinstance(node, ast.FunctionDef):
        return _call(node.name, node.args, node.returns)
    made = [each for each in node.body if isinstance(each, ast.FunctionDef) and each.name == "__init__"]
    if made:
        return _call(node.name, made[0].args, None)
    fields = [
        each for each in node.body if isinstance(each, ast.AnnAssign) and "ClassVar" not in _code(each.annotation)
    ]
    given = [_code(each).replace("=", " = ", 1) if " = " not in _code(each) else _code(each) for each in fields]
    return _folded(node.name, given, "")


def _call(name: str, arguments: ast.arguments, returns: ast.expr | None, *, wide: int = _WIDE) -> str:
    """A call; the first parameter of a method is left out."""
    positional = [*arguments.posonlyargs, *arguments.args]
    defaults = [None] * (len(positional) - len(arguments.defaults)) + list(arguments.defaults)
    given = [
        _parameter(each, default)
        for each, default in zip(positional, defaults, strict=True)
        if each.arg not in ("self", "cls")
    ]
    if arguments.vararg:
        given.append("*" + _parameter(arguments.vararg, None))
    elif arguments.kwonlyargs:
        given.append("*")
    given += [_parameter(*pair) for pair in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True)]
    return _folded(name, given, f" -> {_code(returns)}" if returns else "", wide=wide)


def _parameter(argument: ast.arg, default: ast.expr | None) -> str:
    typed = f"{argument.arg}: {_code(argument.annotation)}" if argument.annotation else argument.arg
    return f"{typed} = {_code(default)}" if default else typed


def _folded(name: str, given: Sequence[str], end: str, *, wide: int = _WIDE) -> str:
    """On one line if it is short, else a line each."""
    line = f"{name}({', '.join(given)}){end}"
    if len(line) <= wide or not given:
        return line
    return "\n".join([f"{name}(", *(f"    {each}," if each != "*" else "    *," for each in given), f"){end}"])


def _code(node: ast.AST) -> str:
    return re.sub(r"'([^'\"]*)'", r'"\1"', ast.unparse(node))


def _methods(node: ast.FunctionDef | ast.ClassDef, names: set[str]) -> Iterator[str]:
    """What a class can do, a line each; what every module has is left out."""
    body = node.body if isinstance(node, ast.ClassDef) else []
    shown = [
        each for each in body if isinstance(each, ast.FunctionDef) and each.name[0] != "_" and each.name != "forward"
    ]
    if shown:
        yield from ("**Methods and properties**", "")
    for each in shown:
        is_property = any(_code(mark).endswith("property") for mark in each.decorator_list)
        called = each.name if is_property else _call(each.name, each.args, None, wide=1000)
        first = (ast.get_docstring(each) or "").split("\n\n")[0].replace("\n", " ")
        yield f"- `{called}`: {prose(first, names)}"
    if shown:
        yield ""


def docstring(text: str, names: Iterable[str] = ()) -> Iterator[str]:
    """A docstring of the house's form as lines of Markdown.

    Args:
        text: as `ast.get_docstring` gives it, without the indentation that it has in the source.
        names: public names, which become links.
    """
    lines = text.splitlines()
    paragraph: list[str] = []
    while lines:
        line = lines.pop(0)
        section = _SECTIONS.fullmatch(line)
        if section or not line.strip() or line.startswith("- "):
            yield from _paragraph(paragraph, names)
            paragraph = []
        if section:
            inside = []
            while lines and (not lines[0].strip() or lines[0].startswith("    ")):
                inside.append(lines.pop(0))
            yield from _titled(section["name"], section["rest"], inside, names)
        elif line.startswith("    "):
            yield from _paragraph(paragraph, names)
            paragraph = []
            block = [line]
            while lines and lines[0].startswith("    "):
                block.append(lines.pop(0))
            yield from ("```text", dedent("\n".join(block)).rstrip(), "```", "")
        elif line.strip():
            paragraph.append(line)
    yield from _paragraph(paragraph, names)


def _paragraph(lines: Sequence[str], names: Iterable[str]) -> Iterator[str]:
    if not lines:
        return
    text = " ".join(line.strip() for line in lines)
    mark = "- " if text.startswith("- ") else ""
    yield mark + prose(text.removeprefix("- "), names)
    if not mark or text.endswith("."):
        yield ""


def _titled(name: str, rest: str, lines: Sequence[str], names: Iterable[str]) -> Iterator[str]:
    """A section: a list where it names what it speaks of, else a paragraph."""
    texts: list[str] = [rest] if rest else []
    for line in filter(str.strip, lines):
        begins = not line.startswith(" " * 8) and (not texts or (name in _NAMED and _ITEM.match(line.strip())))
        if begins:
            texts.append(line.strip())
        else:
            texts[-1] += " " + line.strip()
    if name in _NAMED and all(map(_ITEM.fullmatch, texts)):
        yield from (f"**{name}**", "")
        for text in texts:
            match = _ITEM.fullmatch(text)
            assert match is not None
            called = ", ".join(f"`{each}`" for each in match["name"].split(", "))
            yield f"- {called}: {prose(match['text'], names)}"
    else:
        text = " ".join(texts)
        yield f"**{name}.** {prose(text[0].upper() + text[1:] if text[1:2].islower() else text, names)}"
    yield ""


def prose(text: str, names: Iterable[str] = ()) -> str:
    """A sentence of a docstring: its code and formulas as code, its public names as links, nothing else special."""
    parts = re.split(r"(``[^`]+``|`[^`]+`)", " ".join(text.split()))
    return "".join(_coded(part.strip("`"), names) if part.startswith("`") else _plain(part) for part in parts)


def _coded(code: str, names: Iterable[str]) -> str:
    name = code.rsplit(".", 1)[-1]
    return f"[`{code}`](#{label(name)})" if name in names else f"`{code}`"


def _plain(text: str) -> str:
    """Text without code: runs of words that are formulas become code."""
    words = _words(text)
    result: list[str] = []
    at = 0
    while at < len(words):
        run = _trimmed(_run(words[at:]))
        if run:
            begin, formula, stop = _unwrapped(" ".join(run))
            result.append(f"{begin}`{formula}`{stop}")
        else:
            result.append(_SPECIAL.sub(r"\\\1", words[at]))
        at += max(1, len(run))
    return " ".join(result)


def _run(words: Sequence[str]) -> list[str]:
    """The first words as long as they are of a formula; a comma or a point ends it."""
    run: list[str] = []
    for word in words:
        if not (_is_formula(word) or _joins(word)):
            break
        run.append(word)
        if word[-1:] in (",", ".", ";", ":"):
            break
    return run


def _trimmed(run: list[str]) -> list[str]:
    """Without the letters and signs at its end that belong to the sentence; empty if nothing in it is a formula."""
    while run and not _is_formula(run[-1]):
        joined = len(run) > 1 and bool(_OPERATOR.fullmatch(run[-2]) or run[-2] in ("log", "exp"))
        if joined and not _OPERATOR.fullmatch(run[-1]):
            break
        run = run[:-1]
    return run if any(map(_is_formula, run)) and not _OPERATOR.fullmatch(run[0]) else []


def _unwrapped(text: str) -> tuple[str, str, str]:
    """What stands before a formula, the formula, and the brackets and signs of the sentence behind it."""
    begin = end = ""
    while text and (text[-1] in ",.;:" or (text[-1] == ")" and text.count(")") > text.count("("))):
        text, end = text[:-1], text[-1] + end
    while text.startswith("(") and text.count("(") > text.count(")"):
        text, begin = text[1:], begin + "("
    return begin, text, end


def _words(text: str) -> list[str]:
    """Words between spaces; what stands in brackets within a formula is one of them."""
    words: list[str] = []
    for word in text.split(" "):
        before = words[-1] if words else ""
        opens = sum(map(before.count, "({")) > sum(map(before.count, ")}"))
        if (
            opens
            and re.search(r"[_^{|]|\w\(|^-?\(", before)
            and not re.match(r"\((?!(?:min|max|norm)\b)[a-z]{3,}\b", before)
        ):
            words[-1] += f" {word}"
        else:
            words.append(word)
    return words


def _is_formula(word: str) -> bool:
    return bool(re.search(r"\w[_^][\w{(]|\|\|", word))


def _joins(word: str) -> bool:
    """Whether a word between formulas belongs to them: a sign, a letter, a number, a short bracket."""
    bare = word.rstrip(",.;:")
    short = re.fullmatch(r"\(?\d+[\w*]*|[a-z]\([a-z]\)|\([-+*/ \w.]{1,16}\)", bare)
    return bool(_OPERATOR.fullmatch(bare) or _LETTERS.fullmatch(bare) or (short and not re.search(r"[a-z]{4}", bare)))


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; writes the page."""
    argparse.ArgumentParser(prog="python -m tools.api", description="Write api.md from the docstrings.").parse_args(
        arguments
    )
    root = home()
    write_string(root / PAGE, page(root))
    print(root / PAGE)
    return 0


if __name__ == "__main__":
    sys.exit(main())
