"""What is published is held to its tables, sidecars and weights: each kind of tampering is seen."""

import re
import shutil
from pathlib import Path

import pytest

from clustr_core.storage.provenance import write_sidecar
from tools import claims, compare, verify

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What the checks read, in a copy that a test may tamper with."""
    for name in ("results/published", "notebooks", "profiles"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("*.ipynb"))
    for name in ("index.md", "README.md"):
        shutil.copy(ROOT / name, tmp_path / name)
    monkeypatch.setenv("CLUSTR_HOME", str(tmp_path))
    return tmp_path


def edit(path: Path, pattern: str, replacement: str) -> None:
    text = path.read_text(encoding="utf-8")
    changed = re.sub(pattern, replacement, text, count=1)
    assert changed != text
    path.write_text(changed, encoding="utf-8")


@pytest.mark.parametrize("page", [path.relative_to(ROOT).as_posix() for path in claims.pages(ROOT)])
def test_the_numbers_of_a_page_are_those_of_the_tables(page: str) -> None:
    assert list(claims.page_faults(ROOT, ROOT / page)) == []


def test_every_published_table_is_the_one_that_its_sidecar_describes() -> None:
    assert list(claims.sidecar_faults(ROOT)) == []


@pytest.mark.parametrize(
    ("page", "pattern", "replacement", "words"),
    [
        # a number of the prose
        ("index.md", r"\(27\.3 and", "(27.4 and", "27.4 does not say where it comes from"),
        ("index.md", r"\(27\.3 and 16\.4", "(16.4 and 27.4", "expected 27.3 in the text that follows"),
        ("index.md", r"27\.3 = protocol", "27.4 = protocol", "the page says 27.4, the table 27.3"),
        ("index.md", r"36/255, not|36/255, and", "37/255, and", "37/255 does not say where it comes from"),
        (
            "index.md",
            r"\n\*\*The training",
            "\n\nIt gains 3 points.\n\n**The training",
            "3 does not say where it comes from",
        ),
        # a table of the first page: a number, an interval, a row of another table, a radius
        ("index.md", r"\| ClusTR-cert \| 66\.9", "| ClusTR-cert | 67.9", "66.9"),
        ("index.md", r"66\.9 \[63\.9", "66.9 [64.9", "expected a line that the rows of cpu-cifar10 give"),
        (
            "index.md",
            r"(\| TRADES \| 46.*\n)",
            r"\1| TRADES | 98.0 [95.5, 99.4] | 95.7 [92.4, 97.8] | – |\n",
            "TRADES | 98.0",
        ),
        ("index.md", r"certified at 72/255", "certified at 73/255", "expected the radii of cpu-cifar10"),
        ("index.md", r"<!-- rows: certificates\(quick\) -->\n", "", "98.6 does not say where it comes from"),
        # what was claimed by others
        ("index.md", r"\| 74\.04 %", "| 74.14 %", "74.14 does not say where it comes from"),
        # captions and alternative texts
        ("notebooks/03-training.md", r"certified at 36/255", "certified at 37/255", "37/255 does not say"),
        ("notebooks/02-certificate.md", r"half-width 1\.25", "half-width 1.35", "1.35 does not say"),
        ("notebooks/05-embeddings.md", r"\(−1 to 1\)", "(−1 to 1; 93 % of them)", "93 does not say"),
        ("README.md", r"under 15 minutes", "under 5 minutes", "5 does not say where it comes from"),
    ],
)
def test_a_changed_number_is_seen(copy: Path, page: str, pattern: str, replacement: str, words: str) -> None:
    edit(copy / page, pattern, replacement)
    faults = list(claims.page_faults(copy, copy / page))
    assert any(fault.startswith(f"{page}:") and words in fault for fault in faults), faults


def test_a_changed_row_is_seen_even_if_its_sidecar_is_made_to_agree(copy: Path) -> None:
    path = copy / "results/published/cpu-cifar10/sandwich-clustr-cert.csv"
    edit(path, r"True,0\.2246\d*", "True,0.01")
    write_sidecar(path, {})
    assert list(claims.sidecar_faults(copy)) == []
    assert any("the page says 54.7, the table 54.3" in fault for fault in claims.faults(copy))


def test_a_changed_row_is_seen(copy: Path) -> None:
    edit(copy / "results/published/quick/certificates-ce.csv", "True", "False")
    assert any("certificates-ce.csv" in fault and "sha256" in fault for fault in claims.sidecar_faults(copy))


@pytest.mark.parametrize(
    ("pattern", "replacement", "words"),
    [
        (r'"rows": \d+', '"rows": 1', "rows"),
        (r'"made"', '"mode"', "keys table and made"),
        (r'"sha256": "..', '"sha256": "xx', "sha256"),
    ],
)
def test_a_changed_sidecar_is_seen(copy: Path, pattern: str, replacement: str, words: str) -> None:
    edit(copy / "results/published/cpu/attacks-ce.json", pattern, replacement)
    assert any("attacks-ce" in fault and words in fault for fault in claims.sidecar_faults(copy))


def test_a_missing_sidecar_is_seen(copy: Path) -> None:
    (copy / "results/published/bench/bench.json").unlink()
    assert any("bench.json" in fault for fault in claims.sidecar_faults(copy))


def test_a_changed_weight_is_seen(copy: Path) -> None:
    weights = copy / "results/published/quick/weights/ce/model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-3] ^= 1
    weights.write_bytes(content)
    faults = verify.tables(copy, share=10**6, seed=0)
    assert any("attacks-ce.csv" in fault and "published weights of ce" in fault for fault in faults)


def test_a_sidecar_without_its_table_is_seen(copy: Path) -> None:
    (copy / "results/published/cpu/attacks-ce.csv").unlink()
    assert any("attacks-ce.json: expected the table" in fault for fault in claims.sidecar_faults(copy))


def test_regenerated_rows_are_told_from_published_ones(copy: Path, tmp_path: Path) -> None:
    published = copy / "results/published/quick"
    mine = tmp_path / "mine"
    mine.mkdir()
    for name in ("certificates-ce.csv", "certificates-clustr-cert.csv", "certificates-lip-linear.csv"):
        shutil.copy(published / name, mine / name)
    edit(mine / "certificates-lip-linear.csv", "True", "False")
    text = (mine / "certificates-clustr-cert.csv").read_text(encoding="utf-8")
    (mine / "certificates-clustr-cert.csv").write_text(text.replace("True", "False"), encoding="utf-8")
    said = dict(line.split(": ", 1) for line in compare.compare(mine, published))
    assert said["certificates-ce.csv"] == "identical"
    assert said["certificates-lip-linear.csv"].startswith("within the published intervals")
    assert said["certificates-clustr-cert.csv"].startswith(
        "outside the published intervals: clustr-cert certified at 0"
    )
