"""Text is read and written in UTF-8, whatever the locale."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = [path for place in ("clustr_core", "tools", "benchmarks") for path in sorted((ROOT / place).rglob("*.py"))]
TEXT_METHODS = ("read_text", "write_text", "read_csv", "to_csv")


def is_text_without_encoding(call: ast.Call) -> bool:
    """Whether a call opens a file, or a process's output, as text of the locale's encoding."""
    named = {word.arg: word.value for word in call.keywords}
    if "encoding" in named or None in named:
        return False
    if "text" in named or "universal_newlines" in named:
        return True
    if isinstance(call.func, ast.Name):
        return call.func.id == "open" and not is_binary(call.args[1:2], named)
    if not isinstance(call.func, ast.Attribute):
        return False
    if call.func.attr in TEXT_METHODS:
        return True
    owner = call.func.value.id if isinstance(call.func.value, ast.Name) else ""
    return call.func.attr in ("open", "fdopen") and owner not in ("Image", "os") and not is_binary(call.args[:2], named)


def is_binary(mode: list[ast.expr], named: dict) -> bool:
    values = [*mode, *([named["mode"]] if "mode" in named else [])]
    return any(isinstance(value, ast.Constant) and "b" in str(value.value) for value in values)


def offences(source: str) -> list[int]:
    calls = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)]
    return [call.lineno for call in calls if is_text_without_encoding(call)]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_text_is_in_utf8(path):
    assert offences(path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    ("line", "wrong"),
    [
        ("p.read_text()", True),
        ("p.write_text(x)", True),
        ("open(p)", True),
        ("open(p, 'w')", True),
        ("p.open()", True),
        ("subprocess.run(c, text=True)", True),
        ("pd.read_csv(p)", True),
        ("p.read_text(encoding='utf-8')", False),
        ("open(p, 'rb')", False),
        ("p.open('rb')", False),
        ("p.open(mode='wb')", False),
        ("Image.open(p)", False),
        ("safe_open(p)", False),
    ],
)
def test_the_check_can_fail(line, wrong):
    assert bool(offences(line)) == wrong
