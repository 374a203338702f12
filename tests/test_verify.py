"""What is published is held to its tables, sidecars and weights: each kind of tampering is seen."""

import re
import shutil
from pathlib import Path

import pytest

from tools import compare, verify

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """What the checks read, in a copy that a test may tamper with."""
    for name in ("results/published", "notebooks", "profiles"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("*.ipynb"))
    for name in ("index.md", "README.md", "results/claims.csv"):
        shutil.copy(ROOT / name, tmp_path / name)
    return tmp_path


def edit(path: Path, pattern: str, replacement: str) -> None:
    text = path.read_text(encoding="utf-8")
    changed = re.sub(pattern, replacement, text, count=1)
    assert changed != text
    path.write_text(changed, encoding="utf-8")


def test_the_published_claims_hold(copy: Path) -> None:
    assert verify.claims(copy) == []


def test_a_number_of_the_first_page_is_held_to_the_rows(copy: Path) -> None:
    edit(copy / "index.md", r"\| ClusTR-cert \| 66\.9", "| ClusTR-cert | 67.9")
    assert any("index.md" in fault and "66.9" in fault for fault in verify.claims(copy))


def test_a_changed_row_is_seen(copy: Path) -> None:
    edit(copy / "results/published/quick/certificates-ce.csv", "True", "False")
    assert any("certificates-ce.csv" in fault and "sha256" in fault for fault in verify.claims(copy))


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
    assert any("attacks-ce" in fault and words in fault for fault in verify.claims(copy))


def test_a_missing_sidecar_is_seen(copy: Path) -> None:
    (copy / "results/published/bench/bench.json").unlink()
    assert any("bench.json" in fault for fault in verify.claims(copy))


def test_a_changed_weight_is_seen(copy: Path) -> None:
    weights = copy / "results/published/quick/weights/ce/model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-3] ^= 1
    weights.write_bytes(content)
    faults = verify.tables(copy, share=10**6, seed=0)
    assert any("attacks-ce.csv" in fault and "published weights of ce" in fault for fault in faults)


@pytest.mark.parametrize(
    ("cell", "value"),
    [
        ("protocol(cpu-cifar10, clustr, paper)", "27.3"),
        ("certified(cpu-cifar10, clustr-cert, 36/255)", "55.1"),
        ("claim(method=GloRo, dataset=mnist)", "62.8"),
        ("table(bench/bench.csv, target, name=import of clustr_core, suite=whole)", None),
    ],
)
def test_a_number_that_names_its_cell_is_held_to_it(copy: Path, cell: str, value: str | None) -> None:
    page = copy / "index.md"
    text = page.read_text(encoding="utf-8")
    if value is None:
        page.write_text(f"{text}\n% cell: 1.0 = {cell}\n1.0\n", encoding="utf-8")
        assert any("index.md" in fault for fault in verify.claims(copy))
        return
    page.write_text(f"{text}\n% cell: {value} = {cell}\nIt is {value} %.\n", encoding="utf-8")
    assert verify.claims(copy) == []
    page.write_text(f"{text}\n% cell: 99.9 = {cell}\nIt is 99.9 %.\n", encoding="utf-8")
    assert any(f"the page says 99.9, the table {value}" in fault for fault in verify.claims(copy))
    page.write_text(f"{text}\n% cell: {value} = {cell}\nIt is something.\n", encoding="utf-8")
    assert any(f"expected {value} in the text that follows" in fault for fault in verify.claims(copy))


@pytest.mark.parametrize("line", ["% cell: x = clean(cpu, ce)", "% cell: 1 = other(cpu)", "% cell: 1 = table(cpu"])
def test_a_comment_outside_the_grammar_is_refused(line: str) -> None:
    with pytest.raises(ValueError, match="expected '% cell"):
        verify.parse_cell(line)


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
