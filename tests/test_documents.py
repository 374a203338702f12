"""What README.md, CONTRIBUTING.md, index.md and the Makefile send a reader to is there."""

import importlib.util
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = ("README.md", "CONTRIBUTING.md", "index.md")
# where CONTRIBUTING writes a page that a reader is to add, or that a chapter links to
EXAMPLES = {"03-training.ipynb", "notebooks/03-training.ipynb"}


def found(names: tuple[str, ...], pattern: str) -> list[tuple[str, str]]:
    return [(name, match) for name in names for match in re.findall(pattern, (ROOT / name).read_text(encoding="utf-8"))]


@pytest.mark.parametrize(("name", "path"), found((*DOCUMENTS, "Makefile"), r"\b(?:tests|profiles)/[\w./-]*\w"))
def test_files_that_are_named_exist(name: str, path: str) -> None:
    assert (ROOT / path).exists(), f"{name}: expected {path}, got none"


@pytest.mark.parametrize(("name", "link"), found(DOCUMENTS, r"\]\(([^)#:\s]+\.(?:md|ipynb|cff|png))[#)]?"))
def test_links_lead_to_files(name: str, link: str) -> None:
    assert (ROOT / link).exists() or link in EXAMPLES, f"{name}: expected {link}, got none"


@pytest.mark.parametrize(
    ("name", "module"), found((*DOCUMENTS, "Makefile"), r"python -m ((?:tools|benchmarks|clustr_core)[\w.]*)")
)
def test_modules_that_are_called_exist(name: str, module: str) -> None:
    assert importlib.util.find_spec(module), f"{name}: expected a module {module}, got none"


@pytest.mark.parametrize(("name", "target"), found(DOCUMENTS, r"(?:`|\n|    )make ([a-z][a-z-]*)"))
def test_targets_of_make_exist(name: str, target: str) -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert re.search(rf"^{target}:.*##", makefile, re.M), f"{name}: expected a target {target}, got none"
