"""The book and the lecture are set offline, whole and with their numbers; what is lost or too wide is refused."""

import re
from pathlib import Path

import pytest
import typst
from matplotlib import get_data_path
from matplotlib.ft2font import FT2Font

from tools import pdf, slides, typeset
from tools.notebooks import figure_labels, read_source, sources
from tools.typst_math import FENCES, FUNCTIONS, SYMBOLS, to_typst

ROOT = Path(__file__).resolve().parents[1]
TEMPLATES = sorted((ROOT / typeset.TEMPLATES).glob("*.typ"))
WIDGETS = {f"the widget {path.stem}" for path in (ROOT / "notebooks/widgets").glob("*.mjs")}


@pytest.fixture(scope="module")
def book(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, typeset.Writer]:
    return pdf.make(ROOT, tmp_path_factory.mktemp("pdf"))


@pytest.fixture(scope="module")
def lecture(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return slides.make(ROOT, tmp_path_factory.mktemp("slides"))


def source_of(path: Path) -> str:
    return (path.with_suffix("") / f"{path.stem}.typ").read_text(encoding="utf-8")


def set_in(template: str, body: str, folder: Path) -> Path:
    """A few lines in one of the templates."""
    writer = typeset.Writer(ROOT, folder, frozenset())
    return typeset.compile_pdf(ROOT, f'#import "{template}.typ": *\n{body}\n', writer, folder, "few")


def test_a_folder_of_ones_own_is_not_replaced(tmp_path: Path) -> None:
    """As of a clone that lies there under the same name."""
    mine = tmp_path / "few/runs/model.safetensors"
    mine.parent.mkdir(parents=True)
    mine.write_text("mine", encoding="utf-8")
    with pytest.raises(FileExistsError, match="--output: expected a folder without few/, or with an earlier call's"):
        set_in("book", "text", tmp_path)
    assert mine.read_text(encoding="utf-8") == "mine"


def test_the_book_is_one_pdf_with_every_page_and_figure(book: tuple[Path, typeset.Writer]) -> None:
    path, writer = book
    assert path.read_bytes().startswith(b"%PDF")
    titles = re.findall(r"^#chapter\(\[(.*?)\], number: \"(\d*)\"\)", source_of(path), re.M)
    assert [number for _, number in titles if number] == [str(n + 1) for n in range(len(sources(ROOT)))]
    assert len(titles) == (ROOT / "myst.yml").read_text(encoding="utf-8").count("- file:")
    drawn = {f"{label}.svg" for source in sources(ROOT) for label in figure_labels(read_source(source))}
    assert drawn == set(writer.images)


def test_only_widgets_and_files_of_the_repository_are_left_out_of_it(book: tuple[Path, typeset.Writer]) -> None:
    left = set(book[1].left_out)
    files = {f"a link to {name}" for name in ("CITATION.cff", "CONTRIBUTING.md")}
    assert left >= WIDGETS
    assert left - WIDGETS - files == {"imports", "where a figure or a page comes from"}


def test_every_citation_of_the_chapters_is_in_its_references(book: tuple[Path, typeset.Writer]) -> None:
    prose = "".join(path.read_text(encoding="utf-8") for path in sources(ROOT))
    keys = {key for group in re.findall(r"\{cite:[pt]\}`([^`]+)`", prose) for key in group.split(",")}
    assert keys <= book[1].cited


def test_no_directive_and_no_role_is_printed_as_it_is_written(book: tuple[Path, typeset.Writer]) -> None:
    shown = re.sub(r"#code\(.*?\)$", "", source_of(book[0]), flags=re.M)
    assert not re.search(r"\{(?:cite|eq|numref|ref|figure|table|include|math|code-cell|prf)[:\w]*\}|:::|\[\]\(#", shown)


def test_every_letter_of_it_is_in_a_font_that_lies_with_the_tools(book: tuple[Path, typeset.Writer]) -> None:
    known = set(FT2Font(str(Path(get_data_path(), "fonts/ttf/DejaVuSans.ttf"))).get_charmap())
    assert {letter for letter in source_of(book[0]) if ord(letter) not in known} <= {"\n"}


def test_the_lecture_is_set_with_and_without_notes(lecture: list[Path]) -> None:
    plain, noted = lecture
    text = (ROOT / slides.SOURCE).read_text(encoding="utf-8")
    headings = re.findall(r"^## ", text, re.M)
    assert 18 <= len(headings) <= 25
    assert text.count(":::{note}") == len(headings)
    assert "notes: false" in source_of(plain)
    assert "notes: true" in source_of(noted)
    # the title and the references are pages as well
    folder = plain.with_suffix("")
    assert len(typst.compile(folder / f"{plain.stem}.typ", format="svg", root=folder)) == len(headings) + 2


def test_every_picture_of_the_lecture_is_a_published_figure() -> None:
    text = (ROOT / slides.SOURCE).read_text(encoding="utf-8")
    shown = re.findall(r"\{image\} (\S+)\n:alt: (.+)", text)
    assert len(shown) == text.count("{image}") >= 8
    for path, alt in shown:
        assert (ROOT / "site" / path).exists(), f"expected {path}, got none"
        assert (ROOT / "site" / path).with_suffix(".svg").exists()
        assert len(alt) > 20


def test_a_slide_that_is_too_full_is_refused(tmp_path: Path) -> None:
    body = "#lorem(200)"
    with pytest.raises(RuntimeError, match="slide 1 is too full"):
        set_in("lecture", f"#lecture(slides: (([A], [{body}], [], false),))", tmp_path)


def test_a_table_and_a_formula_that_are_too_wide_are_refused(tmp_path: Path) -> None:
    long = "W" * 60
    wide = [[f"[{long}]", f"[{long}]"]]
    with pytest.raises(RuntimeError, match="too wide"):
        set_in("book", typeset.table(wide, [[long, long]]), tmp_path)
    with pytest.raises(RuntimeError, match="too wide"):
        set_in("book", f"#equation(${' + '.join(['x'] * 200)}$)", tmp_path)


def test_a_link_to_nothing_and_an_unknown_work_are_refused(tmp_path: Path) -> None:
    for body in ('#within("nothing")[there]', '#cite(label("Nobody1999"))\n#works("references.bib")'):
        with pytest.raises(RuntimeError, match=r"does not exist|is not present"):
            set_in("book", body, tmp_path)
    writer = typeset.Writer(ROOT, tmp_path, frozenset({"known"}))
    with pytest.raises(ValueError, match="nothing"):
        writer.write({"type": "crossReference", "identifier": "nothing", "children": []})
    with pytest.raises(ValueError, match="novelty"):
        writer.write({"type": "novelty"})


@pytest.mark.parametrize(
    ("tex", "typst"),
    [
        (r"\frac12", "frac(1, 2)"),
        (r"\tfrac94", "inline(frac(9, 4))"),
        (r"x_{t+1}'", "x'_(t + 1)"),
        (r"\|v\|^2", 'class("opening", bar.v.double) v class("closing", bar.v.double)^(2)'),
        (r"0.25", "0.25"),
        (r"\text{for all } x", '"for all "x'),
        (r"\bigl(a\bigr)", "lr(paren.l a paren.r, size: #1.2em)"),
        (r"\operatorname{dist}(z, R)", r'op("dist") \( z \, R \)'),
    ],
)
def test_what_a_formula_becomes(tex: str, typst: str) -> None:
    assert to_typst(tex) == typst


@pytest.mark.parametrize("tex", [r"\nonsense", r"\frac{a}{", "a}", r"\bigl(a", r"\begin{array}x\end{array}"])
def test_a_formula_that_is_not_understood_is_refused(tex: str) -> None:
    with pytest.raises(ValueError, match="formula"):
        to_typst(tex)


def test_every_command_that_is_known_is_one_of_typst(tmp_path: Path) -> None:
    symbols = " ".join(f"a {each} b" for each in {*SYMBOLS.values(), *(sign for _, sign in FENCES.values())})
    functions = " ".join(f"{each}(x)" for each in FUNCTIONS.values())
    set_in("book", f"$ {symbols} $\n$ {functions} $", tmp_path)


@pytest.mark.parametrize("template", TEMPLATES, ids=lambda path: path.stem)
def test_a_template_hides_no_name_of_formulas_and_needs_no_download(template: Path) -> None:
    text = template.read_text(encoding="utf-8")
    used = {value.split(".")[0] for value in (*SYMBOLS.values(), *FUNCTIONS.values())}
    assert not set(re.findall(r"^#let ([\w-]+)", text, re.M)) & {*used, "frac", "op", "lr", "class", "cases"}
    assert "@preview" not in text


def test_a_cell_is_printed_without_its_imports(tmp_path: Path) -> None:
    writer = typeset.Writer(ROOT, tmp_path, frozenset())
    cell = {"type": "code", "executable": True, "lang": "ipython3"}
    assert writer.write({**cell, "value": "import a\n\nb = a.b\n"}) == '\n#code("b = a.b", "python")\n\n'
    assert writer.write({**cell, "value": "import a\na.style()\n"}) == ""
    assert "import a" in writer.write({**cell, "executable": False, "value": "import a\na.b()"})


def test_tables_keep_intervals_together_and_set_groups_apart() -> None:
    assert typeset.text("80.9 [75.5, 85.5]") == '#"80.9 [75.5,\u00a085.5]";'
    written = typeset.table([["a", "b"], ["group"], ["1", "2"]], [["a", "b"], ["group"], ["1", "long words"]])
    assert '([group],),([1],[2],),), ("a","words",)' in written
