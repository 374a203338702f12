"""Shapes are checked while testing, one thread a process, and no skip but that of a missing GPU."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import jaxtyping
import pytest
import shapes
import torch

# before a test imports nbformat, which then starts in a tenth of the time
import tools  # noqa: F401
from tools.browser import CHROMIUM

os.environ.setdefault("MPLBACKEND", "Agg")
torch.set_num_threads(1)

# before anything imports the package: its functions then check the shapes in their signatures
shapes.install("clustr_core")


@pytest.fixture
def as_installed() -> Iterator[None]:
    """Without the shape checks, as users run the package: what it refuses by itself is what they see."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture(scope="session")
def digits():
    """The dataset that lies in the package."""
    from clustr_core import data

    return data.load_dataset("digits")


@pytest.fixture(scope="session")
def trained(tmp_path_factory, digits):
    """Trains a recipe on digits once for all tests: a run that tests read, and copy where they write."""
    from clustr_core.training.loop import fit

    home, runs = tmp_path_factory.mktemp("trained"), {}

    def once(recipe):
        if recipe not in runs:
            with pytest.MonkeyPatch.context() as patch:
                patch.setenv("CLUSTR_HOME", str(home))
                runs[recipe] = fit(recipe, dataset=digits, progress=False)
        return runs[recipe]

    return once


@pytest.fixture(scope="module")
def runs(tmp_path_factory, trained):
    """A linear and a cluster classifier, in copies that one module's tests measure."""
    from clustr_core.training.recipes import Clustr, CrossEntropy
    from clustr_core.training.run import load_run

    small = {"width": 4, "train_examples": 200, "learning_rate": 5e-3}
    recipes = (CrossEntropy(epochs=15, **small), Clustr(epochs=4, per_cluster=4, snapshots=(0, 4), **small))
    home = tmp_path_factory.mktemp("runs")
    return {r.method: load_run(shutil.copytree(trained(r).path, home / r.method)) for r in recipes}


@pytest.fixture
def tiny_book(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A book's root, and the working folder, with one profile: tiny, the PROFILE of the test's module."""
    (tmp_path / "profiles").mkdir()
    (tmp_path / "profiles/tiny.yaml").write_text(request.module.PROFILE)
    monkeypatch.setenv("CLUSTR_HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    return tmp_path


# minutes each, in one process: begun first, so that none is left over when all others are done
LONGEST = (
    "test_smoke_chapters",
    "test_processes",
    "test_cli",
    "test_kernels",
    "test_pipeline",
    "test_bench",
    "test_jobs",
    "test_loop",
    "test_page_test",
    "test_diagnostics",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest modules first; and the one skip that is allowed, a test marked ``gpu`` without a CUDA device."""
    items.sort(key=lambda item: LONGEST.index(item.path.stem) if item.path.stem in LONGEST else len(LONGEST))
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="gpu: no CUDA device here"))


def pytest_report_header() -> str | None:
    """Says so where the tests in a browser are left out."""
    return None if CHROMIUM else "no chromium: the tests in tests/browser are not collected"


def pytest_runtest_setup() -> None:
    """Shapes are checked anew in each test."""
    shapes.begin()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo):
    """Any other skip is a failure: a test that does not run proves nothing."""
    report = yield
    if report.skipped and not item.get_closest_marker("gpu"):
        _fail(report)
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector: pytest.Collector):
    """The same for a whole module that skips itself."""
    report = yield
    if report.skipped:
        _fail(report)
    return report


def _fail(report: pytest.TestReport | pytest.CollectReport) -> None:
    report.outcome = "failed"
    report.longrepr = f"skipped without the gpu marker, which this project does not allow: {report.longrepr}"
