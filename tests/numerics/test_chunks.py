"""Sizes of chunks: few, named, in one place, and without effect on what is computed."""

import ast
from pathlib import Path

import pytest
import torch

from clustr_core.models.embed import embed_all, predictions
from clustr_core.numerics import chunks
from clustr_core.numerics.chunks import rows_within

PACKAGE = Path(__file__).parents[2] / "clustr_core"


def test_rows_that_fit():
    assert rows_within(1024, torch.float32) == chunks.TABLE_BYTES // 4096
    assert rows_within(1024, torch.float64) == chunks.TABLE_BYTES // 8192
    assert rows_within(chunks.TABLE_BYTES, torch.float64) == 1


def numbers_of_chunks(source: str) -> list[str]:
    """Calls that split by a number, and defaults of batch sizes that are one, instead of a name."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "split":
            found += [ast.unparse(node) for each in node.args[:1] if _is_number(each)]
        if isinstance(node, ast.FunctionDef):
            named = zip(node.args.kwonlyargs, node.args.kw_defaults, strict=True)
            found += [each.arg for each, value in named if each.arg == "batch_size" and _is_number(value)]
    return found


def _is_number(node: ast.expr | None) -> bool:
    return isinstance(node, ast.Constant) and isinstance(node.value, int)


def test_no_size_of_a_chunk_stands_where_it_is_used():
    found = {path.name: numbers_of_chunks(path.read_text(encoding="utf-8")) for path in PACKAGE.rglob("*.py")}
    assert {name: each for name, each in found.items() if each} == {}
    assert numbers_of_chunks("x.split(256)") == ["x.split(256)"]
    assert numbers_of_chunks("def f(*, batch_size: int = 512): ...") == ["batch_size"]
    assert numbers_of_chunks("text.split(',', 1), x.split(rows)") == []


@pytest.mark.parametrize("size", [1, 3, 100])
def test_how_many_images_at_once_changes_nothing(size, monkeypatch):
    torch.manual_seed(0)
    images = torch.randint(256, (10, 1, 4, 4), dtype=torch.uint8)
    network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(16, 5)).double()
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(16, 5))
    network.forward = lambda x, inner=network.forward: inner(x.double())  # pyright: ignore[reportAttributeAccessIssue]
    whole, classes = embed_all(network, images), predictions(model, images)
    monkeypatch.setattr("clustr_core.models.embed.IMAGES_PREDICTED", size)
    torch.testing.assert_close(embed_all(network, images, batch_size=size), whole)
    assert torch.equal(predictions(model, images), classes)
