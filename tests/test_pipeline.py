"""The pipeline: one small chapter runs headlessly, profiles are held to the chapters, the DAG is what it should be."""

import json
import math
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import nbformat
import pandas as pd
import pytest
from book_copy import ROOT, called, copy_of_the_book, environment, execute, planned, run

from clustr_core.measuring.profile import load_profile
from clustr_core.measuring.written import write_rows
from clustr_core.storage.files import alone, digest
from clustr_core.training.recipes import run_key
from tools import compare, notebooks, publish
from tools.execute import chosen_parameters, given_parameters
from tools.execute import execute as run_chapter

SOURCES = notebooks.sources(ROOT)
PROFILES = sorted(path.stem for path in (ROOT / "profiles").glob("*.yaml"))
CHAPTER = """\
---
kernelspec: {display_name: Python 3, language: python, name: python3}
---

# A chapter

```{code-cell} ipython3
:tags: [parameters]

rows = 2
```

```{code-cell} ipython3
:label: fig-test
:tags: [hide-cell]

import matplotlib.pyplot as plt
import pandas as pd

from clustr_core.drawing.looks import house_style, save_figure

house_style()
figure, axes = plt.subplots()
axes.plot(range(rows))
save_figure(figure, "fig-test", pd.DataFrame({"row": range(rows)}));
```

```{figure} #fig-test
:name: figure-test
:alt: A line that rises from zero.

A line.
```

```{code-cell} ipython3
import sys

print("rows", rows, file=sys.stderr)
rows
```
"""


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what the pipeline reads, so that the tree stays untouched."""
    return copy_of_the_book(tmp_path_factory.mktemp("home"))


@pytest.fixture
def one_chapter(home: Path, tmp_path: Path) -> Path:
    """A home whose only chapter is a small one."""
    shutil.copytree(home, tmp_path, dirs_exist_ok=True, ignore=shutil.ignore_patterns("notebooks", "runs", "_build"))
    (tmp_path / "notebooks").mkdir()
    (tmp_path / "notebooks/01-test.md").write_text(CHAPTER)
    for profile in ("smoke", "quick"):
        (tmp_path / f"profiles/{profile}.yaml").write_text("chapters:\n  01-test: {rows: 3}\n")
    return tmp_path


@pytest.mark.parametrize("profile", PROFILES)
def test_every_profile_sets_only_what_the_chapters_declare(profile: str) -> None:
    settings = load_profile(ROOT / "profiles" / f"{profile}.yaml")
    assert set(settings.chapters) <= {source.stem for source in SOURCES}
    for source in SOURCES:
        declared = notebooks.declared_parameters(notebooks.read_source(source))
        chosen_parameters(source, declared, settings.chapters.get(source.stem, {}), settings.name)


@pytest.mark.parametrize("profile", PROFILES)
def test_dag(home: Path, tmp_path: Path, profile: str) -> None:
    shutil.copytree(home, tmp_path, dirs_exist_ok=True, ignore=shutil.ignore_patterns("runs", "_build", "results"))
    done = planned(tmp_path, "--cores", "2", "--config", f"profile={profile}")
    assert done.returncode == 0, done.stderr[-4000:]
    jobs = Counter({name: int(n) for name, n in re.findall(r"^(\w+) +(\d+)$", done.stdout + done.stderr, re.M)})
    settings = load_profile(ROOT / "profiles" / f"{profile}.yaml")
    recipes = settings.recipes
    # prototypes are certified without a run
    expected = {"all": 1, "attack": len(settings.attacked), "certify": len(recipes) + 1}
    expected |= {"diagnose": len(settings.ordinary), "sandwich": len(settings.lipschitz)}
    expected["train"] = len({run_key(recipe) for recipe in recipes.values()})
    expected |= {f"chapter_{source.stem.replace('-', '_')}": 1 for source in SOURCES}
    assert jobs - Counter(total=jobs["total"]) == Counter(expected)


def test_a_book_and_a_profile_lie_in_folders_of_any_name(
    one_chapter: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Blanks, brackets and braces: the pipeline runs, and writes under a name of the profile's own."""
    book = tmp_path_factory.mktemp("odd") / "a book (1) c++ [x] {y} it's"
    shutil.copytree(one_chapter, book)
    profile = book / "my profiles/smoke.yaml"
    profile.parent.mkdir()
    profile.write_text("chapters:\n  01-test: {rows: 5}\n", encoding="utf-8")
    done = run(book, "snakemake", "--cores", "1", "--quiet", "rules", "--config", f"profile={profile}")
    assert done.returncode == 0, done.stderr[-4000:]
    (drawn,) = (book / "figures").glob("smoke-*/fig-test.csv")
    assert drawn.read_text(encoding="utf-8") == "row\n0\n1\n2\n3\n4\n"
    assert not (book / "figures/smoke").exists()


@pytest.mark.parametrize("name", ["pics (1)", "pics+v2", "[x] *"])
def test_a_folder_of_images_has_any_name(one_chapter: Path, name: str) -> None:
    text = f"""
shared: {{dataset: "folder:data/{name}", encoder: small-cnn, width: 4}}
methods: {{ce: {{epochs: 1}}, clustr: {{epochs: 1, warm_start: ce}}}}
attacks:
  linf: {{norm: linf, eps: [0.1], steps: 2, examples: 8}}
  transfer: {{attack: transfer, norm: linf, eps: [0.1], steps: 2, examples: 8, source: ce}}
examination: {{eps: 0.1, examples: 8, steps: 5, restarts: 1, queries: 10}}
"""
    (one_chapter / "profiles/own.yaml").write_text(text, encoding="utf-8")
    done = planned(one_chapter, "--cores", "1", "--config", "profile=own")
    assert done.returncode == 0, done.stderr[-4000:]
    for job in ("train", "attack", "diagnose", "certify"):
        assert re.search(rf"^{job} +[23]$", done.stdout + done.stderr, re.M)
    (one_chapter / "profiles/own.yaml").write_text(text.replace(name, f"{name}{{1}}"), encoding="utf-8")
    done = planned(one_chapter, "--cores", "1", "--config", "profile=own")
    said = f"own.yaml: dataset: expected a folder whose name has no braces, got 'folder:data/{name}{{1}}'"
    assert said in done.stdout + done.stderr


def test_a_key_that_the_chapter_does_not_declare_is_an_error(one_chapter: Path) -> None:
    (one_chapter / "profiles/smoke.yaml").write_text("chapters:\n  01-test: {rows: 3, colums: 4}\n")
    done = execute(one_chapter, "01-test")
    assert done.returncode == 1
    assert "colums is not a parameter of 01-test.md, which declares rows" in done.stderr
    assert not list(one_chapter.glob("_build/smoke/**/*.ipynb"))


def test_a_failing_cell_leaves_its_traceback_and_nothing_in_place(one_chapter: Path) -> None:
    source = one_chapter / "notebooks/01-test.md"
    source.write_text(CHAPTER.replace("range(rows))", "range(rows + nothing))", 1))
    done = execute(one_chapter, "01-test")
    assert done.returncode == 1
    assert "name 'nothing' is not defined" in done.stderr
    assert not (one_chapter / "_build/smoke/01-test.ipynb").exists()
    assert (one_chapter / "_build/smoke/failed/01-test.ipynb").exists()


def test_a_chapters_checks_are_made_whatever_the_users_settings_are(
    one_chapter: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither an optimising interpreter nor what a user's kernels begin with decides what a chapter says."""
    settings = tmp_path_factory.mktemp("ipython")
    (settings / "profile_default/startup").mkdir(parents=True)
    (settings / "profile_default/startup/00-mine.py").write_text("rows_of_mine = 7\n", encoding="utf-8")
    monkeypatch.setenv("PYTHONOPTIMIZE", "1")
    monkeypatch.setenv("IPYTHONDIR", str(settings))
    source = one_chapter / "notebooks/01-test.md"
    check = "```{code-cell} ipython3\nassert 'rows_of_mine' in globals()\n```\n"
    source.write_text(CHAPTER + "\n" + check, encoding="utf-8")
    done = execute(one_chapter, "01-test")
    assert done.returncode == 1
    assert "AssertionError" in done.stderr


def test_what_an_earlier_run_left_stays_until_the_next_is_whole(one_chapter: Path) -> None:
    assert execute(one_chapter, "01-test").returncode == 0
    before = (one_chapter / "_build/smoke/01-test.ipynb").read_bytes()
    source = one_chapter / "notebooks/01-test.md"
    drawn = (one_chapter / "figures/smoke/fig-test.csv").read_bytes()
    # it draws, and fails after that
    source.write_text(
        CHAPTER.replace("range(rows))", "range(rows + 1))", 1) + "\n```{code-cell} ipython3\nnothing\n```\n"
    )
    assert execute(one_chapter, "01-test").returncode == 1
    assert (one_chapter / "_build/smoke/01-test.ipynb").read_bytes() == before
    assert (one_chapter / "figures/smoke/fig-test.csv").read_bytes() == drawn


def test_the_pipeline_removes_nothing_that_was_made(one_chapter: Path) -> None:
    command = ("snakemake", "--cores", "1", "--quiet", "rules", "--config", "profile=smoke")
    source, made = one_chapter / "notebooks/01-test.md", ("_build/smoke/01-test.ipynb", "figures/smoke/fig-test.png")
    assert run(one_chapter, *command).returncode == 0
    before = [(one_chapter / name).read_bytes() for name in made]
    failing = CHAPTER + "\n```{code-cell} ipython3\nnothing\n```\n"
    for _ in range(2):  # a failed job is not taken for a done one
        source.write_text(failing, encoding="utf-8")
        done = run(one_chapter, *command)
        assert done.returncode == 1
        assert "name 'nothing' is not defined" in done.stderr
        assert [(one_chapter / name).read_bytes() for name in made] == before
    source.write_text(failing.replace("nothing", "print('more')"), encoding="utf-8")
    assert run(one_chapter, *command).returncode == 0
    assert (one_chapter / made[0]).read_bytes() != before[0]


def test_only_marks_are_outputs_of_rules() -> None:
    """Snakemake deletes the outputs of a job that begins: of a run that somebody else has finished meanwhile, too."""
    outputs = re.findall(r"output:\n +(.*)\n", (ROOT / "Snakefile").read_text(encoding="utf-8"))
    assert len(outputs) == 6
    assert all(re.fullmatch(r'touch\(f"\{MARKS\}/.*"\),', output) for output in outputs)


def test_odd_files_beside_tables_and_marks_stop_nothing(one_chapter: Path) -> None:
    rows, marks = one_chapter / "results/smoke", one_chapter / "_build/smoke/done"
    for folder in (rows, marks):
        folder.mkdir(parents=True, exist_ok=True)
    os.mkfifo(rows / "own.csv")
    (rows / "folder.csv").mkdir()
    (rows / "broken.csv").symlink_to("nowhere")
    (marks / "remarks.txt").write_text("mine", encoding="utf-8")
    (one_chapter / "notebooks/01-test.md").write_text(CHAPTER.replace("rows = 2", "profile = 'smoke'\nrows = 2"))
    done = run(one_chapter, "snakemake", "--cores", "1", "--quiet", "rules", "--config", "profile=smoke")
    assert done.returncode == 0, done.stderr[-4000:]
    assert (marks / "remarks.txt").read_text(encoding="utf-8") == "mine"


def test_an_executed_chapter_that_shows_something_else_is_executed_anew(
    one_chapter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert execute(one_chapter, "01-test", "quick").returncode == 0
    monkeypatch.setenv("CLUSTR_HOME", str(one_chapter))
    executed, profile = one_chapter / "_build/quick/01-test.ipynb", load_profile("quick")
    source, notebook = one_chapter / "notebooks/01-test.md", nbformat.read(executed, as_version=4)
    nbformat.write(notebook, executed)
    assert notebooks.is_current(one_chapter, source, executed, profile)
    notebook.cells[-1].outputs = []
    nbformat.write(notebook, executed)
    assert not notebooks.is_current(one_chapter, source, executed, profile)
    done = called(publish.main, one_chapter, "--profile", "quick")
    assert done.returncode == 1
    assert "its cells show something else than when it was executed" in done.stderr


def test_a_chapter_draws_what_it_labels(one_chapter: Path) -> None:
    source = one_chapter / "notebooks/01-test.md"
    source.write_text(CHAPTER.replace('"fig-test", pd', '"fig-other", pd'), encoding="utf-8")
    done = execute(one_chapter, "01-test")
    assert done.returncode == 1
    assert done.stderr == "notebooks/01-test.md: expected it to draw all that it labels, got no fig-test\n"
    assert not (one_chapter / "figures/smoke").exists()


def test_a_chapter_of_other_words_or_parameters_is_executed_whatever_the_times(one_chapter: Path) -> None:
    """As a copy leaves them: sources older than what was made of earlier ones, and nothing of the pipeline's own."""

    def jobs() -> int:
        done = planned(one_chapter, "--cores", "1", "--config", "profile=smoke")
        assert done.returncode == 0, done.stderr[-4000:]
        return len(set(re.findall(r"^(chapter_01_test) +1$", done.stdout + done.stderr, re.M)))

    source, profile = one_chapter / "notebooks/01-test.md", one_chapter / "profiles/smoke.yaml"
    executed = one_chapter / "_build/smoke/01-test.ipynb"
    assert execute(one_chapter, "01-test").returncode == 0
    assert jobs() == 0
    source.write_text(CHAPTER + "\nMore.\n", encoding="utf-8")
    os.utime(source, (2, 2))
    assert jobs() == 1
    source.write_text(CHAPTER, encoding="utf-8")
    os.utime(source, (2, 2))
    executed.touch()
    assert jobs() == 0
    words = profile.read_text(encoding="utf-8")
    profile.write_text(words.replace("rows: 3", "rows: 4"), encoding="utf-8")
    assert jobs() == 1
    profile.write_text(words, encoding="utf-8")
    (one_chapter / "figures/smoke/fig-test.csv").write_text("row\n", encoding="utf-8")
    executed.touch()
    assert jobs() == 1


def test_an_output_takes_the_place_of_nothing_but_an_executed_chapter(
    one_chapter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, mine = one_chapter / "notebooks/01-test.md", one_chapter / "mine/failed/01-test.ipynb"
    monkeypatch.setenv("CLUSTR_HOME", str(one_chapter))
    mine.parent.mkdir(parents=True)
    nbformat.write(nbformat.v4.new_notebook(), mine)
    with pytest.raises(ValueError, match=r"expected no other notebook than an executed chapter there, got .*failed"):
        run_chapter(source, "smoke", one_chapter / "mine/01-test.ipynb")
    with pytest.raises(ValueError, match="expected another place than the published twin's, got"):
        run_chapter(source, "smoke", source.with_suffix(".ipynb"))


def test_a_chapter_is_not_executed_into_its_source(one_chapter: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = one_chapter / "notebooks/01-test.md"
    monkeypatch.setenv("CLUSTR_HOME", str(one_chapter))
    with pytest.raises(ValueError, match=r"--output: expected a file name that ends in \.ipynb, got .*01-test\.md"):
        run_chapter(source, "smoke", source)
    assert source.read_text() == CHAPTER


def test_a_notebook_of_ones_own_is_not_replaced(one_chapter: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mine = one_chapter / "work.ipynb"
    mine.write_text('{"cells": [], "metadata": {}, "nbformat": 4, "nbformat_minor": 5}', encoding="utf-8")
    before = mine.read_bytes()
    monkeypatch.setenv("CLUSTR_HOME", str(one_chapter))
    with pytest.raises(ValueError, match="--output: expected no other notebook than an executed chapter there, got"):
        run_chapter(one_chapter / "notebooks/01-test.md", "smoke", mine)
    assert mine.read_bytes() == before


def test_nothing_is_published_of_a_profile_whose_tables_are_not_there(one_chapter: Path) -> None:
    profile = one_chapter / "profiles/smoke.yaml"
    profile.write_text(profile.read_text() + "methods:\n  ce: {epochs: 1}\nattacks:\n  linf: {eps: [0.1]}\n")
    assert execute(one_chapter, "01-test").returncode == 0
    done = called(publish.main, one_chapter, "--profile", "smoke")
    assert done.returncode == 1
    assert "results/smoke/attacks-ce.csv: expected the table that the profile makes today, got none" in done.stderr


def test_nothing_is_published_of_a_profile_whose_figures_are_not_there(one_chapter: Path) -> None:
    assert execute(one_chapter, "01-test").returncode == 0
    (one_chapter / "figures/smoke/fig-test.svg").unlink()
    done = called(publish.main, one_chapter, "--profile", "smoke")
    assert done.returncode == 1
    expected = "figures/smoke/fig-test.svg: expected the one that _build/smoke/01-test.ipynb drew, got none"
    assert expected in done.stderr


def test_no_figure_is_published_that_the_executed_chapter_did_not_draw(one_chapter: Path) -> None:
    assert execute(one_chapter, "01-test").returncode == 0
    left = one_chapter / "figures/smoke/old"
    left.mkdir()
    assert called(publish.main, one_chapter, "--profile", "./smoke").returncode == 0
    published = {path.name for path in (one_chapter / "figures/published/smoke").iterdir()}
    assert published == {f"fig-test.{kind}" for kind in ("svg", "png", "csv", "json")}
    (one_chapter / "figures/smoke/fig-test.png").write_bytes(b"another")
    done = called(publish.main, one_chapter, "--profile", "smoke")
    assert done.returncode == 1
    assert (
        "figures/smoke/fig-test.png: expected the one that _build/smoke/01-test.ipynb drew, got another" in done.stderr
    )


def test_a_chapter_is_of_the_committed_tables_that_it_read(one_chapter: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CLUSTR_HOME", str(one_chapter))
    source, table = one_chapter / "notebooks/01-test.md", one_chapter / "results/published/bench/x.csv"
    table.parent.mkdir(parents=True)
    table.write_text("a\n1\n", encoding="utf-8")
    reads = "from clustr_core.measuring.timings import bench\nbench('x')"
    source.write_text(f"{CHAPTER}\n```{{code-cell}} ipython3\n{reads}\n```\n")
    assert execute(one_chapter, "01-test").returncode == 0
    executed = one_chapter / "_build/smoke/01-test.ipynb"
    name, profile = "results/published/bench/x.csv", load_profile("smoke")
    said = json.loads(executed.read_text(encoding="utf-8"))["metadata"]["clustr"]["published"]
    assert said == {name: digest(table.read_bytes())}
    assert notebooks.is_current(one_chapter, source, executed, profile)
    table.write_text("a\n2\n", encoding="utf-8")
    assert not notebooks.is_current(one_chapter, source, executed, profile)
    done = called(publish.main, one_chapter, "--profile", "smoke")
    assert f"01-test: {name} changed since it was executed: make figures first" in done.stderr
    assert not source.with_suffix(".ipynb").exists()
    table.unlink()
    assert notebooks.changed(one_chapter, said) == [name]


READS = """
```{code-cell} ipython3
from pathlib import Path
from clustr_core.measuring.study import published_profiles
from clustr_core.measuring.timings import bench
%s
```
"""
CHANGES = "bench('x'); Path('../results/published/bench/x.csv').write_text('a\\n2\\n');"


@pytest.mark.parametrize("code", [CHANGES, f"{CHANGES} bench('x')"])
def test_a_table_that_changes_while_a_chapter_reads_makes_it_stale(
    one_chapter: Path, monkeypatch: pytest.MonkeyPatch, code: str
) -> None:
    monkeypatch.setenv("CLUSTR_HOME", str(one_chapter))
    source, table = one_chapter / "notebooks/01-test.md", one_chapter / "results/published/bench/x.csv"
    table.parent.mkdir(parents=True)
    table.write_text("a\n1\n", encoding="utf-8")
    source.write_text(CHAPTER + READS % code)
    assert execute(one_chapter, "01-test").returncode == 0
    executed = one_chapter / "_build/smoke/01-test.ipynb"
    assert table.read_text(encoding="utf-8") == "a\n2\n"
    assert not notebooks.is_current(one_chapter, source, executed, load_profile("smoke"))


def test_what_is_published_later_makes_a_chapter_stale_that_looked_for_it(
    one_chapter: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a book that is reached by a link."""
    link = tmp_path_factory.mktemp("links") / "book"
    link.symlink_to(one_chapter)
    monkeypatch.setenv("CLUSTR_HOME", str(link))
    source = link / "notebooks/01-test.md"
    source.write_text(CHAPTER + READS % "published_profiles()")
    assert execute(link, "01-test").returncode == 0
    executed, profile = link / "_build/smoke/01-test.ipynb", load_profile("smoke")
    said = json.loads(executed.read_text(encoding="utf-8"))["metadata"]["clustr"]["published"]
    assert "results/published/smoke/" in said
    assert notebooks.is_current(link, source, executed, profile)
    there = one_chapter / "results/published/smoke/partial/attacks-ce.csv"
    there.parent.mkdir(parents=True)
    there.write_text("a\n", encoding="utf-8")
    assert not notebooks.is_current(link, source, executed, profile)


def test_nothing_of_a_run_with_other_parameters_takes_the_profiles_place(one_chapter: Path) -> None:
    assert execute(one_chapter, "01-test").returncode == 0
    drawn = one_chapter / "figures/smoke/fig-test.csv"
    before = drawn.read_bytes()
    assert execute(one_chapter, "01-test", "smoke", "-p", "rows=7").returncode == 0
    assert drawn.read_bytes() == before
    assert len((one_chapter / "_build/smoke/01-test-figures/smoke/fig-test.csv").read_text().splitlines()) == 8
    done = called(publish.main, one_chapter, "--profile", "smoke")
    assert done.returncode == 1
    assert "01-test: expected it executed with the profile's parameters, got rows=7: make figures first" in done.stderr


def test_a_chapter_that_two_execute_at_once_is_refused_to_the_second(one_chapter: Path) -> None:
    waiting = one_chapter / "_build/smoke/failed/.01-test"
    waiting.mkdir(parents=True)
    with alone(waiting):
        done = execute(one_chapter, "01-test")
    assert done.returncode == 1
    assert "--output: expected one that no other process is making, got _build/smoke/01-test.ipynb" in done.stderr


def test_nothing_is_published_where_a_runs_weights_are_missing(
    one_chapter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    profile = one_chapter / "profiles/quick.yaml"
    profile.write_text(profile.read_text(encoding="utf-8") + "methods:\n  ce: {epochs: 1}\n", encoding="utf-8")
    # its tables are there, as if they had been measured elsewhere
    monkeypatch.setattr(publish, "is_written", lambda *_: True)
    assert execute(one_chapter, "01-test", "quick").returncode == 0
    done = called(publish.main, one_chapter, "--profile", "quick")
    assert done.returncode == 1
    assert "expected a finished run of ce, got none" in done.stderr
    assert not (one_chapter / "figures/published").exists()


def test_what_is_printed_in_parts_is_published_as_one() -> None:
    printed = [
        nbformat.v4.new_output("stream", name=name, text=text) for name, text in (("stdout", "a\n"), ("stdout", "b\n"))
    ]
    table = nbformat.v4.new_output("display_data", data={"text/plain": "t"})
    found = publish._joined([*printed, table, *printed])
    assert [output.get("text", "t") for output in found] == ["a\nb\n", "t", "a\nb\n"]
    assert printed[0].text == "a\n"


def test_two_runs_publish_the_same_bytes(one_chapter: Path) -> None:
    published = []
    for _ in range(2):
        done = execute(one_chapter, "01-test", "quick")
        assert done.returncode == 0, done.stderr
        done = called(publish.main, one_chapter, "--profile", "quick")
        assert done.returncode == 0, done.stderr
        files = [one_chapter / "notebooks/01-test.ipynb", *sorted(one_chapter.glob("figures/published/quick/*"))]
        published.append([path.read_bytes() for path in files])
    assert published[0] == published[1]
    twin = nbformat.reads(published[0][0].decode(), as_version=4)
    assert [cell.id for cell in twin.cells] == [f"01-test-00{i}" for i in range(1, 6)]
    assert twin.cells[1].source == "rows = 2"
    made = twin.metadata.clustr.made
    assert (made.data, made.seeds, made.minutes) == ([], [], 1)
    drawn, shown = twin.cells[2].outputs[0], twin.cells[4].outputs
    assert drawn.data["text/plain"] == drawn.metadata["image/png"]["alt"] == "A line that rises from zero."
    assert [output.data for output in shown] == [{"text/plain": "3"}]
    assert (one_chapter / "figures/published/quick/fig-test.csv").read_text() == "row\n0\n1\n2\n"


def test_a_profile_replaces_no_tables_that_are_published_of_something_else(one_chapter: Path) -> None:
    (one_chapter / "profiles/smoke.yaml").rename(one_chapter / "profiles/race.yaml")
    theirs = one_chapter / "results/published/race"
    theirs.mkdir(parents=True, exist_ok=True)
    write_rows(theirs / "race.csv", pd.DataFrame({"x": [1]}), {"profile": None})
    assert execute(one_chapter, "01-test", "race").returncode == 0
    done = called(publish.main, one_chapter, "--profile", "race")
    assert done.returncode == 1
    assert "--profile: expected a name under which nothing else is published, got race: " in done.stderr
    assert (theirs / "race.csv").exists()


@pytest.mark.parametrize(
    "place",
    [
        "results/published/smoke/NOTES.md",
        "results/published/smoke/attacks-notes.json",
        "figures/published/smoke/fig-test.pdf",
        "figures/published/smoke/my-own.svg",
        "figures/published/smoke/fig-mine.png",
    ],
)
def test_files_of_ones_own_stay_beside_what_is_published(one_chapter: Path, place: str) -> None:
    mine = one_chapter / place
    mine.parent.mkdir(parents=True, exist_ok=True)
    mine.write_text("mine", encoding="utf-8")
    assert execute(one_chapter, "01-test").returncode == 0
    done = called(publish.main, one_chapter, "--profile", "smoke")
    assert done.returncode == 1
    assert f"{mine.name}: expected nothing beside what is published, got a file of one's own" in done.stderr
    assert mine.read_text(encoding="utf-8") == "mine"


@pytest.mark.parametrize("name", ["mine", "attacks-mine", "mine-ce"])
def test_a_table_that_somebody_wrote_there_stays(one_chapter: Path, name: str) -> None:
    """By ``--output``: a sidecar alone does not make it one that was published."""
    folder = one_chapter / "results/published/smoke"
    folder.mkdir(parents=True, exist_ok=True)
    made = {"profile": {"name": "smoke"}, "method": "ce"}
    for stem in (name, "attacks-ce"):
        write_rows(folder / f"{stem}.csv", pd.DataFrame({"x": [1]}), made)
    assert execute(one_chapter, "01-test").returncode == 0
    done = called(publish.main, one_chapter, "--profile", "smoke")
    assert done.returncode == 1
    assert f"{name}.csv: expected nothing beside what is published, got a file of one's own" in done.stderr
    for path in folder.glob(f"{name}.*"):
        path.unlink()
    assert called(publish.main, one_chapter, "--profile", "smoke").returncode == 0
    assert not (folder / "attacks-ce.csv").exists()


def test_a_publishing_that_was_killed_is_done_again(one_chapter: Path) -> None:
    """Between a table and its sidecar."""
    assert execute(one_chapter, "01-test").returncode == 0
    folder = one_chapter / "results/published/smoke"
    folder.mkdir(parents=True, exist_ok=True)
    write_rows(folder / "attacks-ce.csv", pd.DataFrame({"x": [1]}), {"profile": {"name": "smoke"}, "method": "ce"})
    (folder / "attacks-ce.csv").write_text("x\n2\n", encoding="utf-8")
    done = called(publish.main, one_chapter, "--profile", "smoke")
    assert done.returncode == 0, done.stderr
    assert list(folder.glob("*")) == []


def test_a_notebook_of_ones_own_beside_a_chapter_stays(one_chapter: Path) -> None:
    assert execute(one_chapter, "01-test", "quick").returncode == 0
    mine = one_chapter / "notebooks/01-test.ipynb"
    nbformat.write(nbformat.v4.new_notebook(), mine)
    before = mine.read_bytes()
    done = called(publish.main, one_chapter, "--profile", "quick")
    assert done.returncode == 1
    assert done.stderr.startswith("notebooks/01-test.ipynb: expected a published twin, got a notebook of one's own")
    assert mine.read_bytes() == before
    assert not (one_chapter / "figures/published").exists()


HOSTILE: dict[str, Callable[[dict], object]] = {
    "no notebook": lambda _: [],
    "no cells": lambda run: run | {"cells": 3},
    "nothing of ours": lambda run: run | {"metadata": {}},
    "ours a list": lambda run: run | {"metadata": run["metadata"] | {"clustr": [1]}},
    "no papermill": lambda run: run | {"metadata": {"clustr": run["metadata"]["clustr"]}},
    "no duration": lambda run: _with(run, "papermill", duration=None),
    "a duration that is no number": lambda run: _with(run, "papermill", duration=math.nan),
    "nothing made": lambda run: _with(run, "clustr", made=3),
    "given a number": lambda run: _with(run, "clustr", given=3),
    "drawn elsewhere": lambda run: _with(run, "clustr", drawn={"smoke/../../x.png": "0"}),
    "read elsewhere": lambda run: _with(run, "clustr", published={"results/../x.csv": "0"}),
    "drawn a list": lambda run: _with(run, "clustr", drawn=[1]),
    "another output": lambda run: run | {"cells": [run["cells"][1] | {"outputs": [{"output_type": "x"}]}]},
    "an output that is none": lambda run: run | {"cells": [run["cells"][1] | {"outputs": [3]}]},
}


def _with(run: dict, key: str, **changes: object) -> dict:
    return run | {"metadata": run["metadata"] | {key: run["metadata"][key] | changes}}


def test_an_executed_chapter_that_is_none_is_refused_by_name(one_chapter: Path) -> None:
    assert execute(one_chapter, "01-test").returncode == 0
    executed = one_chapter / "_build/smoke/01-test.ipynb"
    run = json.loads(executed.read_text(encoding="utf-8"))
    for name, change in HOSTILE.items():
        executed.write_text(json.dumps(change(run)), encoding="utf-8")
        done = called(publish.main, one_chapter, "--profile", "smoke")
        expected = "_build/smoke/01-test.ipynb: expected a chapter as tools.execute leaves it, got another ("
        assert (done.returncode, done.stderr.count("\n")) == (1, 1), (name, done.stderr)
        assert done.stderr.startswith(expected), (name, done.stderr)
    assert not (one_chapter / "figures/published").exists()


def test_another_profile_publishes_its_figures_and_no_twin(one_chapter: Path) -> None:
    assert execute(one_chapter, "01-test").returncode == 0
    done = called(publish.main, one_chapter, "--profile", "smoke")
    assert done.returncode == 0, done.stderr
    assert (one_chapter / "figures/published/smoke/fig-test.csv").exists()
    assert not (one_chapter / "notebooks/01-test.ipynb").exists()


def test_a_parameter_from_the_command_line_goes_before_the_profiles(one_chapter: Path) -> None:
    done = execute(one_chapter, "01-test", "smoke", "-p", "rows=4")
    assert done.returncode == 0, done.stderr
    shown = nbformat.read(one_chapter / "_build/smoke/01-test.ipynb", as_version=4).cells[-1].outputs
    assert shown[-1].data["text/plain"] == "4"
    done = execute(one_chapter, "01-test", "smoke", "-p", "colums=4")
    assert done.returncode == 1
    assert "NAME one of rows in 01-test.md" in done.stderr


DECLARED = {"eps": 0.1, "rows": 2, "radii": [0.1, 0.2], "sizes": [1, 2], "method": "clustr"}


@pytest.mark.parametrize(
    ("given", "value"),
    [
        ("eps=8/255", 8 / 255),
        ("eps=1", 1.0),
        ("rows=4", 4),
        ("radii=[36/255, 1]", [36 / 255, 1.0]),
        ("sizes=[3]", [3]),
        ("method=pgd-at", "pgd-at"),
        ("method=1", "1"),
    ],
)
def test_a_parameter_is_read_as_a_profile_reads_it(given: str, value: object) -> None:
    (found,) = given_parameters([given], DECLARED, Path("01-test.md")).values()
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize("given", ["eps=one", "eps=[0.1]", "eps=true", "rows=1.5", "radii=0.1", "sizes=[1.5]", "eps="])
def test_a_parameter_of_another_kind_is_refused(given: str) -> None:
    name = given.partition("=")[0]
    with pytest.raises(ValueError, match=f"-p {name}: expected a value such as {re.escape(repr(DECLARED[name]))}, got"):
        given_parameters([given], DECLARED, Path("01-test.md"))


def test_a_parameter_given_twice_is_refused():
    with pytest.raises(ValueError, match="-p rows: expected it once, got 4 and '5'"):
        given_parameters(["rows=4", "rows=5"], DECLARED, Path("01-test.md"))


def test_the_profile_is_no_other_than_the_one_named_for_all():
    with pytest.raises(ValueError, match="-p profile: expected none, since --profile says it, got 'quick'"):
        given_parameters(["profile=quick"], {"profile": "smoke"}, Path("01-test.md"))


def test_a_changed_source_cannot_be_published(one_chapter: Path) -> None:
    assert execute(one_chapter, "01-test").returncode == 0
    (one_chapter / "notebooks/01-test.md").write_text(CHAPTER.replace("A line.", "A straight line."))
    done = called(publish.main, one_chapter, "--profile", "smoke")
    assert done.returncode == 1
    assert "source changed since it was executed" in done.stderr
    assert not (one_chapter / "notebooks/01-test.ipynb").exists()


@pytest.mark.parametrize(
    ("output", "complaint"),
    [
        (
            nbformat.v4.new_output("error", ename="ValueError", evalue="no", traceback=[]),
            "run without errors",
        ),
        (
            nbformat.v4.new_output("execute_result", data={"text/plain": "<Axes at 0x7f00deadbeef>"}),
            "changes at every run",
        ),
    ],
)
def test_an_output_that_cannot_be_published(output: nbformat.NotebookNode, complaint: str) -> None:
    source = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("1")], metadata={})
    executed = nbformat.from_dict(source | {"metadata": {"clustr": {"made": {}}, "papermill": {"duration": 1.0}}})
    executed.cells[0].outputs = [output]
    with pytest.raises(ValueError, match=complaint):
        publish.twin(source, executed, stem="01-test")


def test_a_path_of_this_machine_cannot_be_published() -> None:
    with pytest.raises(ValueError, match="no path of this machine"):
        publish.check_portable(f'"text": "{ROOT}/runs"', "01-test", ROOT)


@pytest.mark.parametrize("code", ["rows = len([1])", "import os", "a, b = 1, 2"])
def test_parameters_are_literals(code: str) -> None:
    cell = nbformat.v4.new_code_cell(code, metadata={"tags": ["parameters"]})
    with pytest.raises(ValueError, match="parameters cell: expected"):
        notebooks.declared_parameters(nbformat.v4.new_notebook(cells=[cell]))


NO_CHAPTERS = {
    "no end in its head": "---\nkernelspec: [\n---\n",
    "a kernel that is none": "---\nkernelspec: 3\n---\n\n```{code-cell} ipython3\n1\n```\n",
    "marks of a conflict in its head": CHAPTER.replace("kernelspec", "<<<<<<< HEAD\nkernelspec", 1),
    "marks of a conflict in its parameters": CHAPTER.replace("rows = 2", "<<<<<<< HEAD\nrows = 2"),
    "no Python in its parameters": CHAPTER.replace("rows = 2", "rows = = 2"),
    "a label that is a number": CHAPTER.replace(":label: fig-test", ":label: 2024"),
    "a tag that is a number": CHAPTER.replace(":tags: [hide-cell]", ":tags: [hide-cell, 3]"),
    "tags that are none": CHAPTER.replace(":tags: [parameters]", ":tags: 3"),
    "no end in its tags": CHAPTER.replace(":tags: [parameters]", ":tags: {"),
}


@pytest.mark.parametrize("words", NO_CHAPTERS.values(), ids=NO_CHAPTERS.keys())
def test_a_chapter_that_is_none_is_one_line(one_chapter: Path, words: str) -> None:
    source = one_chapter / "notebooks/01-test.md"
    source.write_text(words, encoding="utf-8")
    done = execute(one_chapter, "01-test")
    assert done.returncode == 1
    assert done.stderr.startswith("notebooks/01-test.md: 01-test.md: ")
    assert done.stderr.count("\n") == 1
    with pytest.raises(ValueError, match=r"^01-test\.md: "):
        notebooks.read_source(source)


def test_a_chapter_that_became_none_is_one_line(one_chapter: Path) -> None:
    assert execute(one_chapter, "01-test").returncode == 0
    (one_chapter / "notebooks/01-test.md").write_text(NO_CHAPTERS["a label that is a number"], encoding="utf-8")
    done = called(publish.main, one_chapter, "--profile", "smoke")
    assert (done.returncode, done.stderr) == (
        1, "01-test.md: label: expected a name such as fig-radii, got 2024\n"
    )  # fmt: skip
    done = planned(one_chapter, "--cores", "1", "--config", "profile=smoke")
    assert done.returncode == 1
    assert "01-test.md: label: expected a name such as fig-radii, got 2024" in done.stdout + done.stderr
    assert "AttributeError" not in done.stdout + done.stderr


def test_a_chapter_that_begins_with_a_mark_of_its_encoding_is_one(one_chapter: Path) -> None:
    source = one_chapter / "notebooks/01-test.md"
    plain = notebooks.read_source(source)
    source.write_text("\ufeff" + CHAPTER, encoding="utf-8")
    found = notebooks.read_source(source)
    assert [cell.source for cell in found.cells] == [cell.source for cell in plain.cells]
    assert found.metadata == plain.metadata


def test_the_pipeline_is_run_in_its_own_book(one_chapter: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Else it would read the chapters of one, and draw into the other."""
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    command = [sys.executable, "-m", "snakemake", "-n", "--config", "profile=smoke"]
    options = {"cwd": one_chapter, "env": os.environ | environment(one_chapter) | {"CLUSTR_HOME": str(elsewhere)}}
    done = subprocess.run(command, **options, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode != 0
    assert f"CLUSTR_HOME: expected the folder of this book, {one_chapter}, or none, got" in done.stdout + done.stderr


@pytest.mark.parametrize("name", ["007", "1e5", "nan"])
def test_a_profile_has_no_number_for_a_name(one_chapter: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """The pipeline would be asked for profile 7, or 100000."""
    monkeypatch.setenv("CLUSTR_HOME", str(one_chapter))
    (one_chapter / "profiles/smoke.yaml").rename(one_chapter / f"profiles/{name}.yaml")
    with pytest.raises(ValueError, match=f"a name that no command line takes for a number, got {name}"):
        load_profile(name)


def test_a_profile_names_chapters_that_are_there(one_chapter: Path) -> None:
    (one_chapter / "profiles/smoke.yaml").write_text("chapters:\n  01-tset: {rows: 3}\n", encoding="utf-8")
    done = planned(one_chapter, "--cores", "1", "--config", "profile=smoke")
    assert done.returncode != 0
    assert "smoke.yaml: chapters: expected some of ['01-test'], got ['01-tset']" in done.stdout + done.stderr


def test_a_copy_of_a_chapter_draws_over_nothing(one_chapter: Path) -> None:
    (one_chapter / "notebooks/01-test-Copy1.md").write_text(CHAPTER, encoding="utf-8")
    done = planned(one_chapter, "--cores", "1", "--config", "profile=smoke")
    assert done.returncode != 0
    assert "notebooks: expected one chapter to draw fig-test, got 2" in done.stdout + done.stderr
    done = execute(one_chapter, "01-test-Copy1")
    assert done.returncode == 1
    assert "expected labels that no other chapter has, got fig-test, which 01-test.md draws" in done.stderr
    assert not (one_chapter / "figures/smoke").exists()
    assert execute(one_chapter, "01-test-Copy1", "smoke", "-p", "rows=4").returncode == 0


def test_what_is_no_file_ends_no_comparison(one_chapter: Path, capsys: pytest.CaptureFixture[str]) -> None:
    done = called(compare.main, one_chapter, "--profile", "nosuch")
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    mine, theirs = one_chapter / "results/smoke/x.csv", one_chapter / "results/published/smoke/x.csv"
    for folder in (mine.parent, theirs.parent):
        folder.mkdir(parents=True, exist_ok=True)
    theirs.write_text("a\n1\n", encoding="utf-8")
    for folder, words in ((mine.parent, "a,b\n1,2\n"), (theirs.parent, "method,radius\nce,x\n")):
        (folder / "certificates-ce.csv").write_text(words, encoding="utf-8")
    os.mkfifo(mine)
    done = called(compare.main, one_chapter, "--profile", "smoke")
    assert done.returncode == 0
    assert "  certificates-ce.csv: cannot be compared (" in done.stdout
    assert "  x.csv: cannot be compared (ValueError: " in done.stdout
