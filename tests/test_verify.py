"""What is published is held to its tables, sidecars and weights: each kind of tampering is seen."""

import os
import re
import shutil
from pathlib import Path

import pandas as pd
import pytest

from clustr_core.storage.files import digest, read_json, seal_of, write_json
from clustr_core.storage.provenance import check_sidecar, environment, write_sidecar
from clustr_core.storage.tables import read_table, write_table
from tools import claims, compare, recomputed, verify

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What the checks read, in a copy that a test may tamper with."""
    for name in ("results/published", "figures/published", "notebooks", "profiles"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("*.ipynb", "*.png", "*.svg"))
    for name in (*claims.PAGES, "results/claims.csv"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    monkeypatch.setenv("CLUSTR_HOME", str(tmp_path))
    return tmp_path


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of which tests change pages alone, so that what is computed from its tables is computed once."""
    root = tmp_path_factory.mktemp("shared")
    for name in ("results", "profiles"):
        (root / name).symlink_to(ROOT / name)
    return root


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
        ("index.md", r"keeps 24\.2", "keeps 24.3", "24.3 does not say where it comes from"),
        ("index.md", r"keeps 24\.2(.*\n.*) 0\.0", r"keeps 0.0\1 24.3", "expected 24.2 in the text that follows"),
        ("index.md", r"24\.2 = protocol", "24.3 = protocol", "the page says 24.3, the table 24.2"),
        ("index.md", r"36/255 below", "37/255 below", "37/255 does not say where it comes from"),
        (
            "results.md",
            r"\n\*\*The training",
            "\n\nIt gains 3 points.\n\n**The training",
            "3 does not say where it comes from",
        ),
        # a table of the page of results: a number, an interval, a row of another table, a radius
        ("results.md", r"\| ClusTR-cert \| 66\.6", "| ClusTR-cert | 67.6", "66.6"),
        ("results.md", r"66\.6\s\[63\.6", "66.6 [64.6", "expected a line that the rows of cpu-cifar10 give"),
        (
            "results.md",
            r"(\| TRADES \| 10 \| 55.*\n)",
            r"\1| TRADES | 30 | 98.0 [95.5, 99.4] | 95.7 [92.4, 97.8] | – |\n",
            "TRADES | 30 | 98.0",
        ),
        ("results.md", r"certified at 72/255", "certified at 73/255", "expected the radii of cpu-cifar10"),
        ("results.md", r"<!-- rows: certificates\(quick\) -->\n", "", "98.6 does not say where it comes from"),
        # what was claimed by others
        ("results.md", r"\| 74\.04 %", "| 74.14 %", "74.14 does not say where it comes from"),
        # two numbers that have changed places
        (
            "index.md",
            r"55\.1( % of the images at an .*\n.*)58\.6",
            r"58.6\g<1>55.1",
            "expected 58.6 in the text that follows after the cells before",
        ),
        # captions and alternative texts
        (
            "notebooks/03-training.md",
            r"correct and certified at 36/255",
            "correct and certified at 37/255",
            "37/255 does not say",
        ),
        ("notebooks/02-certificate.md", r"half-width 1\.25", "half-width 1.35", "1.35 does not say"),
        ("notebooks/05-embeddings.md", r"\(−1 to 1\)", "(−1 to 1; 93 % of them)", "93 does not say"),
        ("README.md", r"about half an hour", "about 5 minutes", "5 does not say where it comes from"),
    ],
)
def test_a_changed_number_is_seen(
    shared: Path, monkeypatch: pytest.MonkeyPatch, page: str, pattern: str, replacement: str, words: str
) -> None:
    monkeypatch.setenv("CLUSTR_HOME", str(shared))
    (shared / page).parent.mkdir(exist_ok=True)
    shutil.copy(ROOT / page, shared / page)
    edit(shared / page, pattern, replacement)
    faults = list(claims.page_faults(shared, shared / page))
    assert any(fault.startswith(f"{page}:") and words in fault for fault in faults), faults


def test_a_changed_row_is_seen_even_if_its_sidecar_is_made_to_agree(copy: Path) -> None:
    path = copy / "results/published/cpu-cifar10/sandwich-clustr-cert.csv"
    edit(path, r"True,0\.2986\d*", "True,0.01")
    write_sidecar(path, {})
    assert list(claims.sidecar_faults(copy)) == []
    assert any("the page says 55.1, the table 54.7" in fault for fault in claims.faults(copy))


@pytest.mark.parametrize(
    ("path", "pattern", "replacement"),
    [
        ("results/published/quick/certificates-ce.csv", "True", "False"),
        ("figures/published/quick/fig-pairwise-gain.csv", r",0\.015,", ",0.016,"),
    ],
)
def test_a_changed_row_is_seen(copy: Path, path: str, pattern: str, replacement: str) -> None:
    edit(copy / path, pattern, replacement)
    assert any(path in fault and "sha256" in fault for fault in claims.sidecar_faults(copy))


@pytest.mark.parametrize(
    ("pattern", "replacement", "words"),
    [
        (r'"rows": \d+', '"rows": 1', "rows"),
        (r'"made"', '"mode"', "keys table and made"),
        (r'"machine": "', '"machine": "another ', "sha256"),
        (r'"commit": "', '"commit": "0', "sha256"),
        (r'"sha256": "..', '"sha256": "xx', "sha256"),
    ],
)
def test_a_changed_sidecar_is_seen(copy: Path, pattern: str, replacement: str, words: str) -> None:
    edit(copy / "results/published/cpu/attacks-ce.json", pattern, replacement)
    assert any("attacks-ce" in fault and words in fault for fault in claims.sidecar_faults(copy))


@pytest.mark.parametrize(
    ("name", "pattern", "replacement", "words"),
    [
        ("history.csv", r"\n2,0\.77", r"\n2,0.66", "run.json: expected history_sha256"),
        ("run.json", r'"threads": 1', '"threads": 2', "run.json: expected sha256"),
        ("run.json", r'  "history_sha256": .*\n', "", "run.json: expected history_sha256"),
        ("run.json", r"\{", "", "run.json: expected JSON"),
    ],
)
def test_a_changed_training_is_seen(copy: Path, name: str, pattern: str, replacement: str, words: str) -> None:
    edit(copy / "results/published/quick/weights/ce" / name, pattern, replacement)
    assert any(words in fault for fault in claims.sidecar_faults(copy))


def test_a_missing_sidecar_is_seen(copy: Path) -> None:
    (copy / "results/published/bench/bench.json").unlink()
    assert any("bench.json" in fault for fault in claims.sidecar_faults(copy))


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="there are no pipes with names")
def test_what_is_no_file_is_named_and_not_waited_for(copy: Path) -> None:
    weights = copy / "results/published/quick/weights/ce/model.safetensors"
    weights.unlink()
    os.mkfifo(weights)
    assert any(
        "weights/ce/model.safetensors: expected a regular file" in fault for fault in claims.sidecar_faults(copy)
    )


@pytest.mark.parametrize(("key", "value"), [("method", []), ("versions", 3), ("profile", 3), ("sources", {"ce": 3})])
def test_a_sidecar_of_another_kind_is_named(copy: Path, key: str, value: object) -> None:
    table = copy / "results/published/quick/attacks-ce.csv"
    write_sidecar(table, check_sidecar(table)["made"] | {key: value})
    with pytest.raises(ValueError, match=f"attacks-ce.json: made: expected a .* in {key}, got"):
        check_sidecar(table)


def test_a_changed_weight_is_seen(copy: Path) -> None:
    weights = copy / "results/published/quick/weights/ce/model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-3] ^= 1
    weights.write_bytes(content)
    assert any("run.json: expected weights_sha256" in fault for fault in claims.sidecar_faults(copy))
    said = read_json(weights.with_name("run.json")) | {"weights_sha256": digest(bytes(content))}
    del said["sha256"]
    write_json(weights.with_name("run.json"), said | {"sha256": seal_of(said)})
    faults = recomputed.tables(copy, share=10**6, seed=0)
    assert any("attacks-ce.csv" in fault and "published weights of ce" in fault for fault in faults)


def test_rows_computed_again_are_the_published_and_a_changed_one_is_named(
    copy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The cheapest tables, from their weights; then one row otherwise, its sidecar made to agree."""
    path = copy / "results/published/quick/certificates-prototypes.csv"
    assert recomputed.tables(copy, share=10**6, seed=0, methods=["prototypes"]) == []
    out = capsys.readouterr().out
    assert f"certificates-prototypes.csv: {len(read_table(path))} rows computed again" in out
    assert re.search(rf"(every digit of|digits differ in \d+ of) {len(read_table(path))} rows", out)
    made = made_here(path)
    edit(path, r"True,(\d)", r"False,\1")
    write_sidecar(path, made)
    heading, row = recomputed.tables(copy, share=10**6, seed=0, methods=["prototypes"])
    assert heading == f"certificates-prototypes.csv: 1 of {len(read_table(path))} rows differ"
    assert "correct False, now True (feature radius" in row
    assert re.search(r"index \d+: ", row)


def made_here(path: Path) -> dict:
    """What made a published table, as if this machine had: there every digit counts, wherever the tests run."""
    made = {**check_sidecar(path)["made"], **environment("cpu"), "threads": 1}
    write_sidecar(path, made)
    assert recomputed.elsewhere(check_sidecar(path)["made"]) == []
    return made


def with_an_attack(copy: Path) -> tuple[Path, pd.DataFrame]:
    path = copy / "results/published/quick/attacks-clustr.csv"
    return path, read_table(path).query("attack == 'pgd' and norm == 'linf' and loss == 'ce'").reset_index(drop=True)


def test_an_attacked_image_is_named_with_the_eps_between_which_it_falls(copy: Path) -> None:
    path, again = with_an_attack(copy)
    made_here(path)
    assert recomputed.compared(path, again) == []
    row = again[(again["eps"] == 0.1) & again["robust"]].index[0]
    again.loc[row, "robust"] = False
    heading, line = recomputed.compared(path, again)
    assert "1 of" in heading
    assert re.search(r"robust True, now False \(published: robust up to eps 0\.\d+, broken from (0\.\d+|nan)\)", line)


def test_elsewhere_few_differences_are_told_and_many_are_a_fault(
    copy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, again = with_an_attack(copy)
    made = made_here(path)
    write_sidecar(path, {**made, "processor": "another"})
    assert any(
        each.startswith("processor another, here ") for each in recomputed.elsewhere(check_sidecar(path)["made"])
    )
    few = again.assign(gradients=again["gradients"] + 1, robust=again["robust"] ^ (again.index == 7))
    assert recomputed.compared(path, few) == []
    assert "1 differ" in capsys.readouterr().out
    assert recomputed.compared(path, again.assign(robust=~again["robust"]))
    write_sidecar(path, made)
    assert recomputed.compared(path, few)


def test_which_of_the_three_holds_is_said(copy: Path) -> None:
    path, again = with_an_attack(copy)
    made = made_here(path)
    write_sidecar(path, {**made, "processor": "another"})
    changed = {
        f"every digit of {len(again)} rows is the published one": again,
        f"digits differ in {len(again)} of {len(again)} rows": again.assign(gradients=again["gradients"] + 1),
        f"digits differ in 1 of {len(again)} rows and verdicts in 1 (": again.assign(
            robust=again["robust"] ^ (again.index == 7)
        ),
    }
    for words, rows in changed.items():
        recomputed.compared(path, rows, tally := recomputed.Tally())
        assert tally.words().startswith(words)
        assert "on another machine (processor another, here " in tally.words()
    assert "and no verdict does" not in tally.words()


def test_rows_that_were_never_published_are_a_fault(copy: Path) -> None:
    path, again = with_an_attack(copy)
    assert any("0 of them" in fault for fault in recomputed.compared(path, again.assign(index=again["index"] + 10**6)))


@pytest.mark.parametrize("level", ["tables", "models"])
def test_a_method_that_is_not_there_is_refused(level: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert verify.main(["--level", level, "--methods", "nobody"]) == 1
    assert "methods: expected some of ce, pgd-at" in capsys.readouterr().out


def test_a_sidecar_without_its_table_is_seen(copy: Path) -> None:
    (copy / "results/published/cpu/attacks-ce.csv").unlink()
    assert any("attacks-ce.json: expected the table" in fault for fault in claims.sidecar_faults(copy))


@pytest.fixture
def mine(copy: Path) -> Path:
    """A few regenerated tables: the published ones."""
    folder = copy / "results/quick"
    folder.mkdir()
    for name in ("certificates-ce", "certificates-lip-linear", "certificates-clustr-cert", "sandwich-clustr-cert",
                 "diagnostics-ce", "ablations-ce"):  # fmt: skip
        shutil.copy(copy / f"results/published/quick/{name}.csv", folder)
    return folder


def test_regenerated_rows_are_told_from_published_ones(copy: Path, mine: Path) -> None:
    edit(mine / "certificates-lip-linear.csv", "True", "False")
    every = read_table(mine / "sandwich-clustr-cert.csv")
    write_table(mine / "sandwich-clustr-cert.csv", every.assign(norm=0.0))
    edit(mine / "diagnostics-ce.csv", r",False,", ",True,")
    edit(mine / "ablations-ce.csv", r"0\.\d+", "0.123")
    text = (mine / "certificates-clustr-cert.csv").read_text(encoding="utf-8")
    (mine / "certificates-clustr-cert.csv").write_text(text.replace("True", "False"), encoding="utf-8")
    shutil.copy(mine / "certificates-ce.csv", mine / "certificates-mine.csv")
    said = {each.table: each for each in compare.compare(mine, copy / "results/published/quick")}
    verdicts = {
        "certificates-ce.csv": ("identical", "identical"),
        "certificates-lip-linear.csv": ("within", "within the published intervals (largest difference"),
        "certificates-clustr-cert.csv": ("outside", "outside the published intervals: clustr-cert certified at 0: 0.0"),
        "sandwich-clustr-cert.csv": ("outside", "outside the published intervals: clustr-cert left at 0.14: 0.0"),
        "diagnostics-ce.csv": ("differs", "rows; other verdicts: ce"),
        "ablations-ce.csv": ("differs", "differs in 1 of"),
        "certificates-mine.csv": ("not published", "not published"),
        "attacks-ce.csv": ("not regenerated", "published, and not regenerated"),
    }
    for table, (verdict, words) in verdicts.items():
        assert said[table].verdict == verdict
        assert words in said[table].words


@pytest.mark.parametrize(
    ("content", "words"), [("", "cannot be compared (ValueError"), ("method,bound\nce,exact\n", "cannot be compared (")]
)
def test_a_damaged_table_does_not_end_the_comparison(copy: Path, mine: Path, content: str, words: str) -> None:
    (mine / "certificates-ce.csv").write_text(content, encoding="utf-8")
    assert any(words in line for line in compare.report(copy / "results", "quick"))


def test_methods_that_were_not_measured_again_are_named(copy: Path, mine: Path) -> None:
    attacks = read_table(copy / "results/published/quick/attacks-ce.csv")
    write_table(mine / "attacks-ce.csv", attacks.query("method == 'ce'"))
    lines = [line for line in compare.report(copy / "results", "quick") if "attacks-ce.csv" in line]
    assert "ce-clusters linf 0.1: missing" in lines[0]


def test_the_comparison_ends_with_how_many_there_are(copy: Path, mine: Path) -> None:
    *_, last = compare.report(copy / "results", "quick")
    assert last.endswith("a difference is no failure.")
    published = len(list((copy / "results/published/quick").glob("*.csv")))
    assert f"{published} tables: 6 identical, {published - 6} not regenerated" in list(
        compare.report(copy / "results", "quick")
    )


def test_a_profile_that_was_never_published_has_nothing_beside_it(
    copy: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("CLUSTR_HOME", str(copy))
    assert compare.main(["--profile", "smoke"]) == 0
    assert "profile smoke was never published" in capsys.readouterr().out
