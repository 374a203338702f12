"""Every chapter runs headlessly, in profile smoke, and draws its figures; what they measure is measured alike anew."""

import shutil
from pathlib import Path

import nbformat
import pytest
from book_copy import ROOT, copy_of_the_book, execute

from clustr_core import cli
from clustr_core.measuring.profile import load_profile
from clustr_core.training.recipes import METHODS
from tools import execute as executing
from tools import notebooks, publish

SOURCES = notebooks.sources(ROOT)
COMMANDS = {"attacks": "attack", "certificates": "certify", "sandwich": "sandwich"}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what the pipeline reads; the chapters share its runs."""
    copy = copy_of_the_book(tmp_path_factory.mktemp("home"))
    for name in ("bench", "cpu-cifar10", "full-width", "gpu", "strangers"):
        shutil.copytree(ROOT / "results/published" / name, copy / "results/published" / name)
    shutil.copy(ROOT / "results/claims.csv", copy / "results")
    return copy


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)
def test_every_chapter_runs_in_profile_smoke(home: Path, source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # a figure is drawn for its files; that pages show theirs is tested where they are published
    monkeypatch.setattr(executing, "INLINE", "agg")
    done = execute(home, source.stem)
    assert done.returncode == 0, done.stderr[-6000:]
    assert (home / f"_build/smoke/{source.stem}.ipynb").exists()
    for label in notebooks.figure_labels(notebooks.read_source(source)):
        for suffix in (".svg", ".png", ".csv"):
            assert (home / "figures/smoke" / f"{label}{suffix}").stat().st_size > 0
    # else the pipeline would execute it again and again, and nothing could be published of it
    assert notebooks.is_current(home, source, home / f"_build/smoke/{source.stem}.ipynb", load_profile("smoke"))
    assert published_of(home, source) >= READ.get(source.stem, set())
    executed = publish._as_executed(nbformat.read(home / f"_build/smoke/{source.stem}.ipynb", as_version=4))
    for cell in filter(notebooks.is_solution, executed.cells):
        # what is printed twice may come in two parts
        assert {kind_of(output) for output in cell.outputs} == {"text"}, cell.metadata["label"]


# some of what chapters read beside their profile's rows
READ = {
    "06-is-it-real": {"results/published/bench/seeds.csv", "results/published/cpu-cifar10/attacks-clustr.csv"},
    "08-cost": {"results/published/bench/bench.csv", "results/published/cpu-cifar10/certificates-clustr-cert.csv"},
    "11-after-clustr": {"results/claims.csv", "results/published/strangers/attacks-standard.csv"},
}


def published_of(home: Path, source: Path) -> set[str]:
    executed = nbformat.read(home / f"_build/smoke/{source.stem}.ipynb", as_version=4)
    return set(executed.metadata.clustr.published)


def kind_of(output: nbformat.NotebookNode) -> str:
    """ "text" for what is printed and for tables, "image", or the name of another stream."""
    if output.output_type == "stream":
        return "text" if output.name == "stdout" else output.name
    return "image" if any(mime.startswith("image/") for mime in output.data) else "text"


def tables(root: Path) -> dict[str, bytes]:
    """Tables of a home by the commands of the pipeline, each with its sidecar."""
    profile = load_profile("smoke")
    assert set(profile.recipes) == set(METHODS)
    for kind, command in COMMANDS.items():
        for method in profile.measured[kind]:
            assert cli.main([command, "--profile", "smoke", "--method", method, "--device", "cpu"]) == 0
    return {path.name: path.read_bytes() for path in (root / "results/smoke").iterdir()}


def test_two_fresh_runs_give_identical_tables(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every method, trained and measured from nothing: in the chapters' kernels, and here."""
    shutil.copytree(home / "profiles", tmp_path / "profiles")
    found = []
    for root in (home, tmp_path):
        monkeypatch.setenv("CLUSTR_HOME", str(root))
        found.append(tables(root))
    assert len(found[0]) == 2 * (11 + 13 + 3)
    assert found[0] == found[1]
