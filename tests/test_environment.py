"""environment.yml says what pyproject.toml says, in conda's words; the brief's eight packages are used."""

import ast
import os
import re
import tomllib
from functools import cache
from itertools import chain
from pathlib import Path

import jupytext
import pytest
import yaml
from packaging.requirements import Requirement
from rattler import MatchSpec

ROOT = Path(__file__).resolve().parents[1]

# conda name -> PyPI name, where they differ; every other name is the same in both
RENAMED = {"pytorch": "torch", "snakemake-minimal": "snakemake"}
# what only conda needs to name: the interpreter, its installer, and the book builder's runtime
CONDA_ONLY = {"python", "pip", "nodejs"}
# the brief's eight, and how the repository shows that each is used: an import, or a command
EIGHT = {
    "torch": "torch",
    "torchvision": "torchvision",
    "jupyterlab": r"-m tools\.lab",
    "jupytext": "jupytext",
    "matplotlib": "matplotlib",
    "seaborn": "seaborn",
    "umap-learn": "umap",
    "papermill": "papermill",
}


def conda_specs() -> dict[str, MatchSpec]:
    """Name -> spec, each parsed strictly."""
    specs = [MatchSpec(line, strict=True) for line in conda_lines() if isinstance(line, str)]
    return {spec.name.normalized: spec for spec in specs}


def conda_lines() -> list:
    """The entries of environment.yml: conda's specs, and one list for pip."""
    return yaml.safe_load((ROOT / "environment.yml").read_text())["dependencies"]


def conda_pip_requirements() -> dict[str, Requirement]:
    """What environment.yml leaves to pip: packages that conda's channels do not have."""
    (lines,) = [line["pip"] for line in conda_lines() if isinstance(line, dict)]
    return {item.name: item for item in map(Requirement, lines)}


def pip_requirements() -> dict[str, Requirement]:
    """Name -> requirement, of the package and its extras, without itself."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = chain(project["dependencies"], *project["optional-dependencies"].values())
    found = [Requirement(line) for line in lines]
    return {item.name: item for item in found if item.name != project["name"]}


def canonical(version: str) -> frozenset[str]:
    """A range as a set of bounds, whatever their order."""
    return frozenset(part.strip() for part in version.split(",") if part.strip())


def test_conda_names_the_same_packages_as_pip() -> None:
    conda = {RENAMED.get(name, name) for name in set(conda_specs()) - CONDA_ONLY}
    assert not conda & set(conda_pip_requirements())
    assert conda | set(conda_pip_requirements()) == set(pip_requirements())


def test_conda_asks_for_the_same_versions_as_pip() -> None:
    wanted = {name: canonical(str(item.specifier)) for name, item in pip_requirements().items()}
    conda = {RENAMED.get(n, n): canonical(str(s.version)) for n, s in conda_specs().items() if n not in CONDA_ONLY}
    from_pip = {name: canonical(str(item.specifier)) for name, item in conda_pip_requirements().items()}
    assert conda | from_pip == wanted


def test_interpreter_and_node() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    specs = conda_specs()
    assert str(specs["python"].version) == project["requires-python"]
    assert str(specs["nodejs"].version) == ">=20"


def test_constraints_pin_every_requirement_inside_its_range() -> None:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = [Requirement(line) for line in lines if line and not line.startswith("#")]
    pinned = {re.sub(r"[-_.]+", "-", pin.name).lower(): str(pin.specifier).removeprefix("==") for pin in pins}
    for name, item in pip_requirements().items():
        assert item.specifier.contains(pinned[name]), f"{name}: {pinned[name]} is outside {item.specifier}"


@cache
def imported_modules() -> set[str]:
    """Top-level modules that the package, the tools and the chapters import."""
    scripts = [p.read_text() for folder in ("clustr_core", "tools") for p in (ROOT / folder).rglob("*.py")]
    chapters = [jupytext.read(path, fmt="md:myst") for path in (ROOT / "notebooks").glob("*.md")]
    scripts += [cell.source for chapter in chapters for cell in chapter.cells if cell.cell_type == "code"]
    trees = [ast.parse(re.sub(r"^\s*[%!].*$", "", script, flags=re.M)) for script in scripts]
    nodes = [node for tree in trees for node in ast.walk(tree)]
    plain = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    return {name.split(".")[0] for name in plain | {n.module or "" for n in nodes if isinstance(n, ast.ImportFrom)}}


@pytest.mark.parametrize("package", EIGHT)
def test_each_of_the_eight_is_required_and_used(package: str) -> None:
    conda = {RENAMED.get(name, name) for name in conda_specs()}
    assert package in conda
    evidence = EIGHT[package]
    assert evidence in imported_modules() or re.search(evidence, (ROOT / "Makefile").read_text())


def test_binder_takes_the_environment_and_adds_the_package() -> None:
    folder = ROOT / ".binder"
    assert (folder / "environment.yml").resolve() == ROOT / "environment.yml"
    assert os.access(folder / "postBuild", os.X_OK)
    assert "pip install --no-deps -e ." in (folder / "postBuild").read_text(encoding="utf-8")
