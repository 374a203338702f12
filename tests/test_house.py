"""The house: imports point downward, the face is complete and light, and a wheel carries every wing."""

import ast
import os
import subprocess
import sys
import zipfile
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import clustr_core

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "clustr_core"
# from the ground up; a module imports from its own floor and from those below
FLOORS = (
    "numerics", "storage", "data", "models", "attacks", "certificates", "training", "measuring", "theory", "drawing",
    "costs", "cli", "__main__",
)  # fmt: skip
GROUND = ("numerics", "storage")


def modules() -> dict[str, str]:
    """The source of every module, by its name within the package; wings' and the package's own openings left out."""
    files = [path for path in PACKAGE.rglob("*.py") if path.name != "__init__.py" or path.parent.name == "kernels"]
    names = {path: ".".join(path.relative_to(PACKAGE).with_suffix("").parts) for path in files}
    return {name.removesuffix(".__init__"): path.read_text(encoding="utf-8") for path, name in names.items()}


def imported(source: str, known: set[str]) -> set[str]:
    """The package's modules that a source imports, wherever in it."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "clustr_core":
            base = (node.module or "").removeprefix("clustr_core").lstrip(".")
            names = {f"{base}.{alias.name}".lstrip(".") for alias in node.names}
            found |= {name if name in known else base for name in names}
        elif isinstance(node, ast.Import):
            found |= {alias.name.removeprefix("clustr_core.") for alias in node.names if "clustr_core." in alias.name}
    return found - {""}


def upward(sources: dict[str, str]) -> list[str]:
    """Imports that point to a floor above; the two ground floors know nothing of each other."""
    floor = {name: FLOORS.index(name.split(".")[0]) for name in sources}
    faults = []
    for name, source in sources.items():
        for other in imported(source, set(sources)):
            wing, theirs = name.split(".")[0], other.split(".")[0]
            between_grounds = wing in GROUND and theirs != wing
            if between_grounds or FLOORS.index(theirs) > floor[name]:
                faults.append(f"{name} imports {other}")
    return faults


def test_imports_point_downward() -> None:
    assert upward(modules()) == []


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("models.clusters", "from clustr_core.training.loop import fit"),
        ("numerics.checks", "from clustr_core.storage.files import home"),
        ("measuring.accuracy", "def late():\n    from clustr_core import cli"),
    ],
)
def test_an_import_that_points_upward_is_seen(name: str, line: str) -> None:
    assert len(upward(modules() | {name: line})) == 1


def test_no_module_imports_itself_through_others() -> None:
    sources = modules()
    graph = {name: imported(source, set(sources)) & set(sources) - {name} for name, source in sources.items()}
    # a package's opening and the modules that register themselves with it are one
    kernels = {name for name in graph if name.startswith("numerics.kernels")}
    merged = {
        "kernels" if name in kernels else name: {"kernels" if other in kernels else other for other in others}
        for name, others in graph.items()
        if name not in kernels
    }
    try:
        TopologicalSorter(merged).prepare()
    except CycleError as error:
        pytest.fail(f"modules import each other in a circle: {error.args[1]}")


def test_the_core_knows_neither_tools_nor_notebooks_and_only_the_shell_draws() -> None:
    for name, source in modules().items():
        roots = {
            (node.module if isinstance(node, ast.ImportFrom) else alias.name) or ""
            for node in ast.walk(ast.parse(source))
            if isinstance(node, ast.Import | ast.ImportFrom)
            for alias in node.names
        }
        assert not {root.split(".")[0] for root in roots} & {"tools", "notebooks", "benchmarks", "tests"}, name
        if not name.startswith(("drawing.", "cli", "__main__")):
            assert not any(root.startswith("clustr_core.drawing") for root in roots), name


@pytest.mark.parametrize("name", clustr_core.__all__)
def test_a_public_name_is_there_and_documented(name: str) -> None:
    value = getattr(clustr_core, name)
    assert value.__doc__
    assert name in dir(clustr_core)


def test_an_unknown_name_says_where_to_look() -> None:
    with pytest.raises(AttributeError, match=r"no public name 'pdg'; dir\(clustr_core\)"):
        _ = clustr_core.pdg


def test_importing_the_package_loads_nothing_heavy() -> None:
    heavy = "('torch', 'numpy', 'pandas', 'matplotlib', 'sklearn')"
    code = f"import sys, clustr_core; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_wheel_carries_every_wing(tmp_path: Path) -> None:
    """Built from the project, unpacked elsewhere, and imported with nothing of the project on the path."""
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    source = tmp_path / "source"
    source.mkdir()
    for name in ("clustr_core", "pyproject.toml", "README.md", "LICENSE"):
        (source / name).symlink_to(ROOT / name)
    subprocess.run([*command, "--wheel-dir", str(tmp_path), str(source)], check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(tmp_path / "installed")
    names = [f"clustr_core.{name}" for name in modules() if "kernels." not in name or name.endswith("reference")]
    each = f"[importlib.import_module(name) for name in {names!r}]"
    code = f"import importlib, clustr_core; {each}; print(clustr_core.__file__)"
    environment = os.environ | {"PYTHONPATH": str(tmp_path / "installed")}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert str(tmp_path / "installed") in done.stdout
