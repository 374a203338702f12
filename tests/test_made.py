"""Each figure and each chapter says on its page where it comes from; with one setting, where it can be opened."""

import json
import shutil
from pathlib import Path

import pytest

from clustr_core.storage.provenance import sidecar_of
from tools.book_check import Node, run_engine, walk, write_stub

ROOT = Path(__file__).resolve().parents[1]
CHAPTER = "04-pgd"
FIGURES = ROOT / "figures/published/quick"
PUBLISHED = (f"notebooks/{CHAPTER}.ipynb", "profiles/quick.yaml", "references.bib", "site/plugin.mjs")
TABLES = ("fig-robust-accuracy", "fig-loss-agreement")


def words(node: Node) -> str:
    return "".join(each.get("value", "") for each in walk(node))


def built(folder: Path, setting: str = "") -> Node:
    """The page of one chapter, in a book that has no other; one of its figures was never published."""
    for name in PUBLISHED:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, folder / name)
    (folder / "figures/published/quick").mkdir(parents=True)
    for label in TABLES:
        for path in (FIGURES / f"{label}.csv", sidecar_of(FIGURES / f"{label}.csv")):
            shutil.copy(path, folder / "figures/published/quick")
    runs = ROOT / "results/published/quick/weights"
    shutil.copytree(runs / "ce", folder / "results/published/quick/weights/ce")
    toc = f"  toc:\n    - file: notebooks/{CHAPTER}.ipynb\n"
    project = f"version: 1\nproject:\n{setting}  plugins:\n    - site/plugin.mjs\n{toc}"
    (folder / "myst.yml").write_text(f"{project}site:\n  template: book-theme\n", encoding="utf-8")
    write_stub(folder)
    done = run_engine(folder)
    (page,) = (folder / "_build/site/content").glob("*.json")
    assert "plugin.mjs) loaded" in done.stdout + done.stderr
    return json.loads(page.read_text(encoding="utf-8"))["mdast"]


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> tuple[Node, Path]:
    folder = tmp_path_factory.mktemp("made")
    return built(folder), folder


def folds(page: Node, title: str) -> list[Node]:
    return [each for each in walk(page) if each["type"] == "details" and words(each).startswith(title)]


def test_a_figure_says_its_command_its_table_and_its_runs(page: tuple[Node, Path]) -> None:
    mdast, folder = page
    found = folds(mdast, "Made from")
    assert len(found) == len(TABLES)  # and none under the figure that was not published
    for fold, label in zip(found, TABLES, strict=True):
        assert f"make chapter NAME={CHAPTER}" in words(fold)
        urls = [each["url"] for each in walk(fold) if each["type"] == "link"]
        kept = [folder / "_build/site/public" / url.lstrip("/") for url in urls]
        table, sidecar, *runs = [path.read_bytes() for path in kept]
        assert table == (FIGURES / f"{label}.csv").read_bytes()
        assert sidecar == (FIGURES / f"{label}.json").read_bytes()
        methods = json.loads(sidecar)["made"]["methods"]["quick"]
        assert all(f"{method}" in words(fold) for method in methods)
        assert [json.loads(run)["recipe"]["method"] for run in runs] == ["ce"]  # of the others no run is there


def test_a_fold_stands_right_under_its_figure(page: tuple[Node, Path]) -> None:
    for parent in walk(page[0]):
        kinds = [child["type"] for child in parent.get("children", [])]
        for place, child in enumerate(parent.get("children", [])):
            if child["type"] == "details" and words(child).startswith("Made from"):
                assert kinds[place - 1] == "container"


def test_the_foot_says_what_the_twin_records(page: tuple[Node, Path]) -> None:
    (foot,) = folds(page[0], "How this page was made")
    twin = json.loads((ROOT / f"notebooks/{CHAPTER}.ipynb").read_text(encoding="utf-8"))["metadata"]["clustr"]
    made = twin["made"]
    said = words(foot)
    assert made["data"] == ["digits"]
    for fact in (
        "Trained methods on: digits",
        f"Seed of trainings and of the page: {made['seeds'][0]}",
        f"Python {made['python']}",
        made["processor"],
        made["commit"],
    ):
        assert fact in said
    assert f"torch {made['versions']['torch']}" in said
    assert f"at most {made['minutes']} min" in said
    assert f"its {len(twin['tables'])} tables" in said
    assert "Binder" not in said


@pytest.mark.parametrize(
    "setting", ["  github: https://github.com/someone/some-book\n", '  github: "someone/some-book"\n']
)
def test_one_setting_offers_to_open_the_chapter(tmp_path: Path, setting: str) -> None:
    (foot,) = folds(built(tmp_path, setting), "How this page was made")
    urls = [each["url"] for each in walk(foot) if each["type"] == "link" and each["url"].startswith("https")]
    binder, colab = urls
    assert binder == f"https://mybinder.org/v2/gh/someone/some-book/HEAD?urlpath=lab/tree/notebooks/{CHAPTER}.ipynb"
    assert colab == f"https://colab.research.google.com/github/someone/some-book/blob/HEAD/notebooks/{CHAPTER}.ipynb"
    commands = [each["value"] for each in walk(foot) if each["type"] == "inlineCode"][-2:]
    assert commands == [
        "!git clone -q https://github.com/someone/some-book && pip install -q ./some-book",
        "%cd some-book/notebooks",
    ]
