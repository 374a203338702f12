"""How the chapters read: short lines, no logic of their own, and most of their code in sight."""

import ast
from pathlib import Path

import pytest
from nbformat import NotebookNode

from tools import notebooks

ROOT = Path(__file__).resolve().parents[1]
SOURCES = notebooks.sources(ROOT)
WIDTH = 100
SHOWN = 0.6
# a cell that is folded away, whole or without its output
HIDING = {"hide-cell", "remove-cell", "hide-input", "remove-input"}


def code_cells(source: Path) -> list[NotebookNode]:
    return [cell for cell in notebooks.read_source(source).cells if cell.cell_type == "code"]


def local_functions(code: str) -> list[str]:
    """Functions and classes that a cell defines, and lambdas of more than one line."""
    body = "\n".join(line for line in code.splitlines() if not line.startswith(("%", "!")))
    found = []
    for node in ast.walk(ast.parse(body)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            found.append(node.name)
        elif isinstance(node, ast.Lambda) and node.end_lineno != node.lineno:
            found.append(f"lambda in line {node.lineno}")
    return found


def share_shown(cells: list[NotebookNode]) -> float:
    """Of the cells that compute or draw; a table's cell only writes what its {figure} shows, a solution's is folded."""
    shown_elsewhere = ("tab-", "sol-")
    counted = [cell for cell in cells if not cell.metadata.get("label", "").startswith(shown_elsewhere)]
    hidden = [cell for cell in counted if HIDING & set(cell.metadata.get("tags", []))]
    return 1 - len(hidden) / len(counted)


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)
def test_no_line_of_code_is_longer_than_a_page_is_wide(source: Path) -> None:
    lines = [line for cell in code_cells(source) for line in cell.source.splitlines()]
    assert [line for line in lines if len(line) > WIDTH] == []


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)
def test_a_chapter_defines_no_function(source: Path) -> None:
    """But for what a reader would write: something of one's own (`own-`), and the solution of an exercise."""
    cells = [cell for cell in code_cells(source) if not cell.metadata.get("label", "").startswith(("own-", "sol-"))]
    assert [name for cell in cells for name in local_functions(cell.source)] == []


def test_something_of_ones_own_takes_twenty_lines() -> None:
    (source,) = [path for path in SOURCES if path.stem.endswith("-extend")]
    own = {cell.metadata.get("label", ""): cell.source for cell in code_cells(source)}
    own = {label: [line for line in code.splitlines() if line] for label, code in own.items() if "own-" in label}
    assert set(own) == {"own-data", "own-encoder", "own-method", "own-attack"}
    assert {label: len(lines) for label, lines in own.items() if len(lines) > 20} == {}


@pytest.mark.parametrize(
    ("code", "names"),
    [
        ("def f(x):\n    return x", ["f"]),
        ("if True:\n    class A:\n        pass", ["A"]),
        ("t.apply(lambda x: x)", []),
        ("t.apply(lambda x: (\n    x\n))", ["lambda in line 1"]),
    ],
)
def test_a_function_is_seen(code: str, names: list[str]) -> None:
    assert local_functions(code) == names


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)
def test_most_cells_of_a_chapter_are_in_sight(source: Path) -> None:
    assert share_shown(code_cells(source)) >= SHOWN
