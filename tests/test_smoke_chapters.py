"""Every chapter runs headlessly, in profile smoke, and draws its figures."""

import shutil
from pathlib import Path

import pytest
from book_copy import ROOT, copy_of_the_book, execute

from tools import notebooks

SOURCES = notebooks.sources(ROOT)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what the pipeline reads; the chapters share its runs."""
    copy = copy_of_the_book(tmp_path_factory.mktemp("home"))
    for name in ("published/bench", "published/cpu-cifar10"):
        shutil.copytree(ROOT / "results" / name, copy / "results" / name)
    shutil.copy(ROOT / "results/claims.csv", copy / "results")
    return copy


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)
def test_every_chapter_runs_in_profile_smoke(home: Path, source: Path) -> None:
    done = execute(home, source.stem)
    assert done.returncode == 0, done.stderr[-6000:]
    assert (home / f"_build/smoke/{source.stem}.ipynb").exists()
    for label in notebooks.figure_labels(notebooks.read_source(source)):
        for suffix in (".svg", ".png", ".csv"):
            assert (home / "figures/smoke" / f"{label}{suffix}").stat().st_size > 0
