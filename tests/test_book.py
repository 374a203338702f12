"""The book as published: it validates, each fault is caught, pairs are in step and twins are current."""

import re
import shutil
from collections import Counter
from pathlib import Path

import nbformat
import pytest
from jupytext.cli import jupytext

from clustr_core.drawing import widgets
from clustr_core.measuring.profile import load_profile
from tools import notebooks, publish
from tools.book_check import NOT_THE_BOOK, check

ROOT = Path(__file__).resolve().parents[1]
SOURCES = notebooks.sources(ROOT)
chapters = pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)

# what is appended to index.md -> words of the complaint
BROKEN = {
    "reference": ("See [](#figure-of-nothing).", "figure-of-nothing"),
    "numbered reference": ("See {numref}`figure-of-nothing`.", "figure-of-nothing"),
    "equation": ("By {eq}`eq-of-nothing`.", "eq-of-nothing"),
    "anchor": ("See [there](notebooks/01-geometry.ipynb#nothing-of-the-kind).", "nothing-of-the-kind"),
    "citation": ("As shown by {cite:t}`Nobody1999`.", "Nobody1999"),
    "directive": ("```{nonsense}\nbody\n```", "unknown directive: nonsense"),
    "role": ("A {nonsense}`role`.", "unknown role: nonsense"),
    "embed": ("```{figure} #fig-of-nothing\n:name: figure-b\n:alt: words\n\nCaption.\n```", "fig-of-nothing"),
    "embedded cell": ("```{embed} #fig-of-nothing\n```", "fig-of-nothing"),
    "link": ("See [this](notebooks/99-nothing.ipynb).", "notebooks/99-nothing.ipynb"),
    "linked file": ("See [this](clustr_core/nothing.py).", "clustr_core/nothing.py"),
    "image": ("![words](figures/nothing.png)", "figures/nothing.png"),
    "alt text": ("![](picture.png)", "no alt text"),
    "label": ("(twice)=\n## One\n\n(twice)=\n## Two", "Duplicate identifier"),
    "mathematics": ("$$\n\\frac{a}{\n$$", "frac"),
    "include": ("```{include} nothing.md\n```", "nothing.md"),
}


# what is replaced in the prose of a twin of its own, or in its images' text -> words of the complaint
BROKEN_FIGURES = {
    "01-geometry": (r":name: figure-[a-z0-9-]+\n", "", "has no :name:"),
    "02-certificate": (r"(```\{figure\} #fig-[a-z0-9-]+\n(?::.*\n)+)\n(?:(?!```).*\n)+", r"\1", "has no caption"),
    "03-training": (r"\{figure\} #fig-", "{figure} #fig-no-", "shows nothing"),
}
UNDESCRIBED = "04-pgd"


@pytest.fixture(scope="module")
def faults(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """What the check says of one copy of the book in which everything is broken, each fault in a page of its own."""
    copy = tmp_path_factory.mktemp("book") / "copy"
    shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(*NOT_THE_BOOK))
    shutil.copy(next((ROOT / "figures").rglob("*.png")), copy / "picture.png")
    settings = (copy / "myst.yml").read_text(encoding="utf-8")
    pages = "".join(f"    - file: {page_of(kind)}\n" for kind in BROKEN)
    (copy / "myst.yml").write_text(settings.replace("  toc:\n", f"  toc:\n{pages}", 1), encoding="utf-8")
    for kind, (text, _) in BROKEN.items():
        (copy / page_of(kind)).write_text(f"# A page\n\n{text}\n", encoding="utf-8")
    for stem, (pattern, replacement, _) in BROKEN_FIGURES.items():
        change_twin(copy / f"notebooks/{stem}.ipynb", pattern, replacement, in_outputs=False)
    change_twin(copy / f"notebooks/{UNDESCRIBED}.ipynb", r".+", "<Figure size 640x480 with 1 Axes>", in_outputs=True)
    return check(copy)


def page_of(kind: str) -> str:
    """The page in which a fault of the prose is made."""
    return f"broken-{kind.replace(' ', '-')}.md"


def change_twin(path: Path, pattern: str, replacement: str, *, in_outputs: bool) -> None:
    """Change a twin's prose, or the text of its images."""
    twin = nbformat.read(path, as_version=4)
    for cell in twin.cells:
        if cell.cell_type == "markdown" and not in_outputs:
            cell.source = re.sub(pattern, replacement, cell.source)
        for output in cell.get("outputs", []) if in_outputs else []:
            if "image/png" in output.get("data", {}):
                output.data["text/plain"] = re.sub(pattern, replacement, output.data["text/plain"])
    nbformat.write(twin, path)


def test_the_book_is_sound_and_checking_it_leaves_no_stub_of_the_theme() -> None:
    assert check(ROOT) == []
    assert not [p for p in ROOT.glob("_build/templates/site/**/template.yml") if "stub" in p.read_text()]


@pytest.mark.parametrize("kind", BROKEN)
def test_each_fault_is_caught(faults: list[str], kind: str) -> None:
    mine = [fault for fault in faults if page_of(kind) in fault]
    assert any(BROKEN[kind][1] in fault for fault in mine), mine


@pytest.mark.parametrize("stem", BROKEN_FIGURES)
def test_each_fault_of_a_figure_is_caught(faults: list[str], stem: str) -> None:
    mine = [fault for fault in faults if stem in fault]
    assert any(BROKEN_FIGURES[stem][2] in fault for fault in mine), mine


def test_an_output_without_alt_text_is_caught(faults: list[str]) -> None:
    assert any("has no alt text" in fault and UNDESCRIBED in fault for fault in faults), faults


def test_pages_that_are_not_broken_have_no_faults(faults: list[str]) -> None:
    broken = {*map(page_of, BROKEN), *BROKEN_FIGURES, UNDESCRIBED}
    assert not [fault for fault in faults if not any(page in fault for page in broken)]


def test_every_chapter_is_in_the_table_of_contents() -> None:
    listed = re.findall(r"file: notebooks/(\S+)\.ipynb", (ROOT / "myst.yml").read_text())
    assert listed == [source.stem for source in SOURCES]


@chapters
def test_jupytext_pairs_source_and_twin(source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    jupytext(["--paired-paths", str(source)])
    assert capsys.readouterr().out.split() == [str(source.with_suffix(".ipynb"))]


@chapters
def test_pair_is_in_step(source: Path) -> None:
    mine, theirs = notebooks.read_source(source), read_twin(source)
    assert [(c.cell_type, c.source, c.metadata) for c in theirs.cells] == [
        (c.cell_type, c.source, c.metadata) for c in mine.cells
    ]


@chapters
def test_twin_is_current(source: Path) -> None:
    twin = read_twin(source)
    profile = twin.metadata.clustr.profile.name
    current = notebooks.provenance(
        ROOT, source, load_profile(ROOT / "profiles" / f"{profile}.yaml"), results="results/published"
    )
    stale = [key for key in current if current[key] != twin.metadata.clustr.get(key)]
    assert profile == "quick"
    stale += notebooks.changed(ROOT, twin.metadata.clustr.published)
    assert not stale, f"{stale} changed since {source.stem} was published: make publish"


@chapters
def test_twin_is_a_clean_run(source: Path) -> None:
    twin, text = read_twin(source), source.with_suffix(".ipynb").read_text()
    nbformat.validate(twin)
    publish.check_portable(text, source.stem, ROOT)
    assert not re.search(r"(?<![\w.])/(?:home|Users|root|tmp)/\w", text), "an absolute path of some machine"
    outputs = [output for cell in twin.cells for output in cell.get("outputs", [])]
    assert not [output for output in outputs if output.output_type == "error" or output.get("name") == "stderr"]
    assert "Traceback (most recent call last)" not in text
    assert all(cell.execution_count for cell in twin.cells if cell.cell_type == "code")
    assert not {"papermill", "widgets", "trusted"} & set(twin.metadata)


@chapters
def test_every_figure_is_labelled_captioned_and_described(source: Path) -> None:
    notebook, twin = notebooks.read_source(source), read_twin(source)
    shown = {embed.target: embed for embed in notebooks.embeds(notebook)}
    for cell in twin.cells:
        images = [o for o in cell.get("outputs", []) if any(m.startswith("image/") for m in o.get("data", {}))]
        label = cell.metadata.get("label", "")
        if not images and not label.startswith("fig-"):
            continue
        assert notebooks.FIGURE_LABEL.fullmatch(label), f"{cell.id} draws: expected :label: fig-..., got {label!r}"
        assert len(images) == len(cell.outputs) == 1, f"{label}: expected one image and nothing else"
        assert label in shown, f"{label}: expected a {{figure}} #{label} in the prose"
        embed = shown[label]
        assert embed.name == label.replace("fig-", "figure-", 1)
        assert embed.caption
        assert len(embed.alt) > 20
        assert images[0].data["text/plain"] == embed.alt
        for suffix in (".svg", ".png", ".csv"):
            assert (ROOT / "figures/published/quick" / f"{label}{suffix}").exists()


def test_labels_are_unique_and_nothing_else_lies_in_figures() -> None:
    labels = [label for source in SOURCES for label in notebooks.figure_labels(notebooks.read_source(source))]
    assert not [label for label, count in Counter(labels).items() if count > 1]
    shown = {f"widget-{name}" for name in widgets.names()}
    assert {path.stem for path in (ROOT / "figures/published/quick").iterdir()} == {*labels, *shown}


@pytest.mark.parametrize("name", widgets.names())
def test_a_widget_stands_on_a_page_as_its_sources_are(name: str) -> None:
    published = ROOT / f"notebooks/widgets/{name}.mjs"
    assert published.read_text(encoding="utf-8") == widgets.module(name), "stale: python -m tools.widgets"
    assert len(published.read_bytes()) <= 60 * 1024
    fragment = f"figures/published/quick/widget-{name}.md"
    assert (ROOT / fragment).stat().st_size <= 500_000
    pages = [ROOT / "results.md", *SOURCES]
    assert any(f"{fragment}\n" in page.read_text(encoding="utf-8") for page in pages)


def read_twin(source: Path) -> nbformat.NotebookNode:
    """The executed notebook beside a source."""
    return nbformat.read(source.with_suffix(".ipynb"), as_version=4)
