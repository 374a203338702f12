"""Numbers of the prose say where they come from: what is a measured number, what is prose, and what a comment says."""

import shutil
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

from clustr_core.measuring.chain import sandwich_curve
from clustr_core.storage.tables import read_table
from tools import claims
from tools.claims import Term, blocks, page_faults, parse_cell

ROOT = Path(__file__).resolve().parents[1]
TABLE = "bench/convolutions.csv"
CERTIFIED = f"100 * table({TABLE}, certified_36_255, convolution=SLL)"


@pytest.fixture
def page(tmp_path: Path) -> Path:
    """An empty page of a book with one published table."""
    shutil.copytree(ROOT / "results/published/bench", tmp_path / "results/published/bench")
    return tmp_path / "page.md"


def said_of(page: Path, text: str) -> list[str]:
    page.write_text(text, encoding="utf-8")
    claims._table.cache_clear()
    return list(page_faults(page.parent, page))


def measured(text: str) -> list[str]:
    return [token.number for block in blocks(text) for token in block.tokens() if token.measured]


@pytest.mark.parametrize(
    ("text", "numbers"),
    [
        ("It certifies 40.3 % and 39 %.", ["40.3", "39"]),
        ("It certifies 40 and 39 %, or 4 to 5 points more, 12 times as fast.", ["40", "39", "4", "5", "12"]),
        ("93\nper cent", ["93"]),
        (r"In mathematics, $r = 0.45$ and $-1.5$, $8/255$, $12\,\%$.", ["0.45", "-1.5", "8/255", "12"]),
        ("A drop of −0.3 [−0.5, 0.1]", ["-0.3", "-0.5", "0.1"]),
        ("It breaks 3 of 256 images, 1,234 of the 2,000.", ["3", "1,234"]),
        ("It takes 12 minutes, 40 ms, 3 CPU hours.", ["12", "40", "3"]),
        ("| 27.3 [22.0, 33.2] | – |", ["27.3", "22.0", "33.2"]),
        ("Eight methods on 256 images of 8 x 8 pixels, with 95 % intervals and 95 % binomial intervals.", []),
        ("1. In chapter 3, ResNet-18, CIFAR-10, 1e-4, CC-BY-4.0, `eps=0.1`, [page](a-0.5.md) {cite:p}`Hu2.0`", []),
        ("```{figure} #fig-x\n:name: figure-1.5\n:alt: It falls to 0.3.\n\nA share of 12 %.\n```\n", ["0.3", "12"]),
        (":::{note}\nIt is 1.5.\n\n`0.1` and 2.5.\n:::\n", ["1.5", "2.5"]),
        ("```{code-cell} ipython3\nx = 0.5\n\ny = 0.6\n```\n\n```{math}\n0.5\n```\n", []),
        ("```bash\n0.1\n```\n", []),
        (":::{admonition} Robust to 99.9 %\n:class: tip\nText.\n:::\n", ["99.9"]),
        (
            "{strong}`99.9 %`, **98** %, 97 **%**, .96, 95× and 94x, 93-fold",
            ["99.9", "98", "97", ".96", "95", "94", "93"],
        ),
        ("90 pp, 80/100 images, 70 out of 100; 8 x 8, 16 × 16, 1/2", ["90", "80/100", "70"]),
        ("---\ntitle: 0.5\n---\n\n0.7", ["0.7"]),
        ("It keeps 93&nbsp;% and <b>92</b> %, 91&#160;<em>%</em>, H<sub>2</sub>O.", ["93", "92", "91"]),
        (
            "| method | clean, % | images |\n| --- | --- | --- |\n| ce of 8 | 93 | 256 |\n| b | **7** | 64 |",
            ["93", "7"],
        ),
    ],
)
def test_measured_numbers(text: str, numbers: list[str]) -> None:
    assert measured(text) == numbers


def test_a_number_is_named_with_its_line() -> None:
    (block,) = blocks("\nA line\nand 0.5\n")
    assert [(token.line, token.number) for token in block.tokens()] == [(3, "0.5")]


@pytest.mark.parametrize(
    "text",
    [
        f"% cell: 40.3 = {CERTIFIED}\nIt certifies 40.3 %.\n",
        f"<!-- cell: 40.3 = {CERTIFIED} -->\nIt certifies 40.3 %.\n",
        f"% cell: 40.3 = {CERTIFIED}\n% cell: 40.3 = {CERTIFIED}\n40.3 and again 40.3.\n",
        f"% cell: 40.3 = {CERTIFIED}\n\n```{{figure}} #fig-x\n:alt: x\n\nA caption\n\nof 40.3 %\n```\n",
        f"% cell: 2,000 = max({TABLE}, examples)\nOf 2,000 images\n",
        f"% cell: 0.85 = {CERTIFIED} - table({TABLE}, certified_36_255, convolution=AOL)\n0.85\n",
        "% not from a table: 80/100, .5: an example's\n80/100 of the images, or .5\n",
        "% not from a table: 0.5, 8/255: the paper's\n0.5 and again 0.5, at 8/255\n",
        "It is 8/255.\n\n% constants of this page: 8/255, 0.5: the paper's\nIt is 0.5.\n\n- 8/255\n",
    ],
)
def test_numbers_that_say_where_they_come_from(page: Path, text: str) -> None:
    assert said_of(page, text) == []


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("It certifies 40.3 %.\n", "page.md:1: 40.3 does not say where it comes from"),
        (f"% cell: 40.3 = {CERTIFIED}\n40.3 and\n40.3\n", "page.md:3: 40.3 does not say where it comes from"),
        (f"% cell: 40.4 = {CERTIFIED}\n40.4\n", "page.md:1: the page says 40.4, the table 40.3"),
        (f"% cell: 40.3 = {CERTIFIED}\n40.4\n", "page.md:2: 40.4 does not say where it comes from"),
        (f"% cell: 40.3 = {CERTIFIED}\n40.4\n", "page.md:1: expected 40.3 in the text that follows, got none"),
        ("% cell: 40.3 = certain(x)\n40.3\n", "expected a function of the published tables, got certain(x)"),
        ("% cell: 40.3 = table(x\n40.3\n", "expected 'cell: NUMBER = EXPRESSION', got '40.3 = table(x'"),
        ("% cell: 1 = table(no.csv, x)\n1\n", "expected a table results/published/no.csv, got none"),
        (f"% cell: 1 = table({TABLE}, epochs)\n1\n", "expected one row with , got 3"),
        (f"% cell: 1 = table({TABLE}, epochs, what=SLL)\n1\n", "expected KEY=VALUE with one of convolution, epochs"),
        (f"% cell: 1 = count({TABLE}, epochs=few)\n1\n", "Invalid literal for Fraction"),
        (f"% cell: 1 = table({TABLE}, epoch, convolution=SLL)\n1\n", "expected a column of convolution, epochs"),
        ("% not from a table: 0.5\n0.5\n", "expected 'not from a table: NUMBER, NUMBER: WHY', got '0.5'"),
        ("% not from a table: 0.5: the paper's\n0.6\n", "page.md:1: expected 0.5 in the text that follows, got none"),
        ("% not from a table: 0.5: the paper's\n0.5\n\n0.5\n", "page.md:4: 0.5 does not say where it comes from"),
        ("% constants of this page: 8/255: the paper's\n7/255\n", "page.md:1: expected 8/255 on this page, got none"),
        ("% rows: everything(cpu)\n| 1 |\n", "expected 'rows: protocols(PROFILE)'"),
    ],
)
def test_what_is_wrong_is_said(page: Path, text: str, fault: str) -> None:
    assert any(fault in each for each in said_of(page, text)), said_of(page, text)


def test_arguments_with_commas_and_parentheses_stand_in_quotes() -> None:
    cell = parse_cell('1.0 = 100 * table(bench/bench.csv, target, "name=import (of a, b)", suite=whole) / count(x)')
    assert cell.left == Term("table", ("bench/bench.csv", "target", "name=import (of a, b)", "suite=whole"))
    assert (cell.number, cell.factor, cell.operator, cell.right) == ("1.0", 100, "/", Term("count", ("x",)))


@pytest.mark.parametrize("profile", ["quick", "cpu-cifar10"])
def test_the_sandwich_is_that_of_the_curve(profile: str) -> None:
    rows = read_table(ROOT / f"results/published/{profile}/sandwich-clustr-cert.csv")
    curve = sandwich_curve(rows, [0.0, 36 / 255, 0.5]).query("column in ('certified', 'worst case', 'clean')")
    assert len(curve) == 9
    for column, radius, accuracy in curve[["column", "at", "accuracy"]].itertuples(index=False):
        word = str(column).removesuffix(" case")
        assert claims._sandwich(rows, word, radius) == pytest.approx(100 * accuracy, abs=1e-9)


def test_functions_of_many_rows(page: Path) -> None:
    table = pd.read_csv(page.parent / "results/published" / TABLE)
    for name in ("mean", "median", "min", "max", "sum"):
        cell = parse_cell(f"1 = {name}(bench/convol*.csv, cpu_seconds)")
        assert claims.value_of(page.parent, cell) == pytest.approx(table["cpu_seconds"].agg(name))
    assert claims.value_of(page.parent, parse_cell(f"1 = count({TABLE}, epochs=3)")) == (table["epochs"] == 3).sum()


def test_claims_of_others_are_read_from_their_table(page: Path) -> None:
    (page.parent / "results/claims.csv").write_text("method,eps,value\nx,8/255,74.04\nx,,91.03\n", encoding="utf-8")
    assert said_of(page, "% cell: 74.04 = claim(method=x, eps=8/255)\nIt is 74.04 %.\n") == []
    assert any("the table 74.04" in fault for fault in said_of(page, "% cell: 74.05 = claim(eps=8/255)\n74.05\n"))


def test_rows_of_another_method_under_a_methods_name_are_named(tmp_path: Path) -> None:
    folder = tmp_path / "results/published/quick"
    folder.mkdir(parents=True)
    for kind in ("csv", "json"):
        shutil.copy(ROOT / f"results/published/quick/diagnostics-trades.{kind}", folder / f"diagnostics-pgd-at.{kind}")
    fault = "results/published/quick/diagnostics-pgd-at.csv: expected the rows of method 'pgd-at', got 'trades'"
    assert list(claims.sidecar_faults(tmp_path)) == [fault]
    (folder.parent / "quick").rename(folder.parent / "cpu")
    fault = (
        "results/published/cpu/diagnostics-pgd-at.csv: expected the rows of profile 'cpu', got 'quick', method 'pgd-at'"
    )
    assert list(claims.sidecar_faults(tmp_path)) == [fault + ", got 'trades'"]


def test_rows_of_another_protocol_than_the_profiles_are_named(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "results/published/quick", tmp_path / "results/published/quick")
    (tmp_path / "profiles").mkdir()
    text = (ROOT / "profiles/quick.yaml").read_text(encoding="utf-8")
    (tmp_path / "profiles/quick.yaml").write_text(text, encoding="utf-8")
    assert list(claims.sidecar_faults(tmp_path)) == []
    (tmp_path / "profiles/quick.yaml").write_text(text.replace("steps: 40", "steps: 41"), encoding="utf-8")
    faults = list(claims.sidecar_faults(tmp_path))
    assert len(faults) > 10
    assert all("expected the rows of protocol " in fault for fault in faults)


def test_the_check_needs_no_torch() -> None:
    code = "import sys; from tools import verify; verify.main(['--level', 'claims']); sys.exit('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, encoding="utf-8", check=False)
    assert done.returncode == 0, done.stderr
    assert "claims: " in done.stdout


def test_a_table_that_is_gone_with_its_sidecar_is_missed(tmp_path: Path) -> None:
    """As after a bad merge, or from a backup that lacks a folder."""
    figures, chapter = tmp_path / "figures/published/quick", tmp_path / "notebooks/01-x.md"
    figures.mkdir(parents=True)
    chapter.parent.mkdir()
    (figures / "fig-x.png").write_bytes(b"")
    chapter.write_text('```{code-cell} ipython3\nprice = timings.bench("methods-cost")\n```\n', encoding="utf-8")
    assert list(claims.sidecar_faults(tmp_path)) == [
        "figures/published/quick/fig-x.png: expected the table of the figure beside it, got none",
        "results/published/bench/methods-cost.csv: expected the table that 01-x.md reads, got none",
    ]
