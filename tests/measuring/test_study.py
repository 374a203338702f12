"""A profile's rows and the tables that the book makes of them."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

from clustr_core.measuring import study, timings
from clustr_core.measuring.accuracy import certified_accuracy
from clustr_core.measuring.profile import load_profile
from clustr_core.measuring.versions import VERSIONS
from clustr_core.storage.provenance import check_sidecar, write_sidecar
from clustr_core.storage.tables import read_table
from clustr_core.training.recipes import run_keys

ROOT = Path(__file__).resolve().parents[2]
LIGHT = "import sys, clustr_core.measuring.{0}; sys.exit('torch' in sys.modules or 'matplotlib' in sys.modules)"


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A book's root with the published rows of profile quick, and nothing regenerated."""
    shutil.copytree(ROOT / "profiles", tmp_path / "profiles")
    shutil.copytree(ROOT / "results/published/quick", tmp_path / "results/published/quick")
    shutil.copy(ROOT / "results/claims.csv", tmp_path / "results")
    monkeypatch.setenv("CLUSTR_HOME", str(tmp_path))
    return tmp_path


@pytest.fixture(scope="module")
def cifar() -> study.Study:
    return study.read_study("cpu-cifar10", published=True)


@pytest.mark.parametrize("module", ["study", "timings"])
def test_rows_are_read_without_pytorch(module: str) -> None:
    subprocess.run([sys.executable, "-c", LIGHT.format(module)], cwd=ROOT, check=True)


def test_regenerated_rows_come_before_published_ones_and_all_or_none(home: Path) -> None:
    assert study.read_study("quick").source == "published"
    shutil.copytree(home / "results/published/quick", home / "results/quick", ignore=shutil.ignore_patterns("weights"))
    (home / "results/quick/sandwich-clustr-cert.csv").unlink()
    # a run that has only begun: two machines' rows do not stand in one table
    assert study.read_study("quick").source == "published"
    shutil.copy(home / "results/published/quick/sandwich-clustr-cert.csv", home / "results/quick")
    table = read_table(home / "results/quick/attacks-ce.csv")
    table.assign(robust=False).to_csv(home / "results/quick/attacks-ce.csv", index=False)
    with pytest.raises(ValueError, match=r"quick/attacks-ce\.csv: expected the table that its sidecar describes"):
        _ = study.read_study("quick").attacks
    (home / "results/quick/attacks-ce.json").unlink()
    mine = study.read_study("quick")
    assert (mine.source, mine.folder) == ("regenerated", home / "results/quick")
    assert not mine.attacks.query("method == 'ce'")["robust"].any()
    theirs = study.read_study("quick", published=True)
    assert theirs.source == "published"
    assert theirs.attacks.query("method == 'ce'")["robust"].any()


def test_rows_of_another_protocol_are_not_those_of_the_profile(home: Path, caplog: pytest.LogCaptureFixture) -> None:
    """As after the profile's attacks were changed; a table that says nothing of its protocol is taken at its word."""
    shutil.copytree(home / "results/published/quick", home / "results/quick", ignore=shutil.ignore_patterns("weights"))
    assert study.read_study("quick").source == "regenerated"
    table = home / "results/quick/attacks-ce.csv"
    made = check_sidecar(table)["made"]
    made["protocol"]["linf"]["steps"] = 5
    write_sidecar(table, made)
    assert study.read_study("quick").source == "published"
    assert f"{table}: expected rows as the profile would measure them today" in caplog.text


def test_what_is_neither_is_measured_when_asked_for(
    home: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    asked = []
    monkeypatch.setattr(
        study, "_measured", lambda profile, kind, method: asked.append(method) or pd.DataFrame({"method": [method]})
    )
    mine = study.read_study("smoke")
    assert (mine.source, mine.folder) == ("measured now", None)
    assert "make figures PROFILE=smoke does it once" in caplog.text
    assert asked == []
    assert list(mine.sandwich["method"]) == asked == [*mine.profile.lipschitz]
    with pytest.raises(
        FileNotFoundError, match=r"published/smoke/attacks-ce\.csv: expected a published table.*make publish"
    ):
        study.read_study("smoke", published=True)


def test_a_study_that_is_published_in_part_is_shown_of_the_methods_that_are_there(
    home: Path, cifar: study.Study
) -> None:
    assert study.studies_in_part() == []
    with pytest.raises(FileNotFoundError, match=r"gpu/attacks-ce\.csv: expected a published table"):
        study.as_far_as_published("gpu")
    there = home / "results/published/gpu"
    there.mkdir()
    for method in ("pgd-at", "clustr", "lip-linear"):
        for kind in ("attacks", "certificates"):
            shutil.copy(ROOT / f"results/published/cpu-cifar10/{kind}-{method}.csv", there)
    # certified, and not attacked yet
    shutil.copy(ROOT / "results/published/cpu-cifar10/certificates-trades.csv", there)
    (part,) = study.studies_in_part()
    assert part == study.as_far_as_published("gpu")
    assert (part.name, part.source) == ("gpu", "published")
    assert part.ordinary == ["pgd-at", "clustr"]
    assert part.data_name == "CIFAR-10 (JPEG), width 64"
    table, whole = study.protocol_table(part), study.protocol_table(cifar)
    assert list(table["method"]) == ["PGD adversarial training", "ClusTR", "1-Lipschitz linear head"]
    same = whole.set_index("method").loc[list(table["method"])].reset_index()
    columns = [*study.HEADINGS.values()]
    pd.testing.assert_frame_equal(table[columns], same[columns])
    assert list(table["epochs"]) == ["15", "18 + 30", "60"]
    assert study.published_profiles() == ["quick"]


def test_rows_of_another_recipe_are_not_shown_as_those_of_the_profile(
    home: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whole or in part; those of an earlier version of the same training are."""
    shutil.copytree(ROOT / "results/published/gpu", home / "results/published/gpu")
    made = check_sidecar(home / "results/published/gpu/partial/attacks-clustr.csv")["made"]
    profile = load_profile("gpu")
    assert made["run"] in run_keys(profile.recipes["clustr"])[1:]
    assert study.as_far_as_published("gpu").ordinary == ["ce", "ce-clusters", "clustr"]
    text = profile.path.read_text(encoding="utf-8")
    profile.path.write_text(text.replace("epochs: 30", "epochs: 300"), encoding="utf-8")
    assert study.as_far_as_published("gpu").ordinary == ["ce", "ce-clusters"]
    assert "attacks-clustr.csv: expected rows of clustr, got those of another run: not shown" in caplog.text
    profile.path.write_text(text.replace("steps: 100, restarts: 10", "steps: 50, restarts: 10"), encoding="utf-8")
    with pytest.raises(FileNotFoundError, match=r"gpu/attacks-ce\.csv: expected a published table"):
        study.as_far_as_published("gpu")
    assert "attacks-ce.csv: expected rows of ce, got those of another protocol: not shown" in caplog.text
    profile.path.write_text(text, encoding="utf-8")
    with monkeypatch.context() as patch:
        patch.setitem(VERSIONS, "attack", VERSIONS["attack"] + 1)
        assert study.studies_in_part() == []
    for path in (home / "results/published/gpu/partial").glob("attacks-clustr.*"):
        path.rename(home / "results/published/gpu" / path.name)
    # whole tables are of all attacks
    assert study.as_far_as_published("gpu").ordinary == ["ce", "ce-clusters"]
    assert "attacks-clustr.csv: expected rows of clustr, got those of another protocol: not shown" in caplog.text


def test_attacks_that_decide_are_shown_before_the_others_are_there() -> None:
    """The rows of the paper's width, as far as they are published, and what chapter 6 says of them."""
    part = study.as_far_as_published("gpu")
    assert part.ordinary == ["ce", "ce-clusters", "clustr"]
    assert set(part.profile.attacks) == {"paper", "transfer", "linf", "autoattack"}
    # one start in place of the profile's ten, at one eps of its four
    assert (part.paper.restarts, part.paper.steps, part.paper.eps) == (1, 100, (8 / 255,))
    assert part.certificates.empty
    table = study.protocol_table(part).set_index("method")
    assert (table["certified, %"] == study.ABSENT).all()
    alone = study.attack_table(part).set_index("method")
    undefended, clustr = alone.loc["cross-entropy, clusters fitted after"], alone.loc["ClusTR"]
    assert undefended["paper's"] > clustr["paper's"] > 10
    assert (undefended[["PGD, ce", "PGD, margin", "PGD, DLR", "AutoAttack"]] == 0).all()
    assert (clustr[["PGD, ce", "PGD, margin", "PGD, DLR"]] > 9).all()
    assert clustr["AutoAttack"] == 0 < clustr["transfer"] < 0.2
    rows = part.attacks.query("method == 'clustr'")
    assert rows["index"].nunique() == 1000
    assert round(100 * study.disagreement(rows, part.eps()), 1) == 24.0


def test_a_published_profile_of_which_a_table_is_missing_is_named(home: Path) -> None:
    (home / "results/published/quick/certificates-ce.csv").unlink()
    with pytest.raises(FileNotFoundError, match=r"certificates-ce\.csv"):
        study.read_study("quick", published=True)


def test_published_rows_of_another_recipe_are_not_the_profiles(home: Path) -> None:
    text = home / "profiles/quick.yaml"
    text.write_text(text.read_text(encoding="utf-8").replace("seed: 111", "seed: 112"), encoding="utf-8")
    expected = r"attacks-ce\.csv: expected rows of profile quick as it is today, got those of another"
    with pytest.raises(ValueError, match=expected):
        study.read_study("quick", published=True)
    assert study.read_study("quick").source == "measured now"
    assert study.published_profiles() == []


def test_rows_that_were_made_anew_stand_in_for_published_ones_of_an_earlier_profile(home: Path) -> None:
    shutil.copytree(home / "results/published/quick", home / "results/quick", ignore=shutil.ignore_patterns("weights"))
    table = home / "results/published/quick/attacks-ce.csv"
    made = check_sidecar(table)["made"]
    made["protocol"]["linf"]["steps"] = 5
    write_sidecar(table, made)
    assert study.read_study("quick", published=True).source == "regenerated"


def test_the_larger_profiles_stand_beside_ones_own() -> None:
    assert list(study.studies_beside(study.read_study("quick", published=True))) == ["quick", "cpu", "cpu-cifar10"]
    assert list(study.studies_beside(study.read_study("cpu", published=True))) == ["cpu", "cpu-cifar10"]


@pytest.mark.parametrize(
    ("name", "data", "pixels", "title", "radii"),
    [
        ("quick", "digits", 64, "digits, eps 0.1", "0.14 0.28 0.5"),
        ("cpu", "mnist5k", 784, "MNIST-5k, eps 0.1", "0.5 1 1.58"),
        ("cpu-cifar10", "cifar10-jpeg", 3072, "CIFAR-10 (JPEG), eps 8/255", "36/255 72/255 108/255"),
    ],
)
def test_each_data_set_is_described_in_its_own_units(name: str, data: str, pixels: int, title: str, radii: str) -> None:
    mine = study.read_study(name, published=True)
    assert (mine.data, mine.pixels, mine.title) == (data, pixels, title)
    assert " ".join(mine.amount(radius) for radius in mine.radii) == radii
    assert mine.amount(0.3) == "0.3"


def test_radii_can_be_given() -> None:
    assert study.read_study("quick", published=True, radii=[0.2]).radii == (0.2,)


def test_the_pixels_of_a_folder_of_images_are_those_of_its_runs(home: Path) -> None:
    text = (home / "profiles/quick.yaml").read_text(encoding="utf-8").replace("dataset: digits", "dataset: folder:mine")
    (home / "profiles/mine.yaml").write_text(text, encoding="utf-8")
    profile = load_profile("mine")
    with pytest.raises(ValueError, match=r"dataset: expected one of .* or a finished run on it, got 'folder:mine'"):
        _ = study.read_study(profile).pixels
    folder = study.run_folder(profile.recipes["ce"])
    folder.mkdir(parents=True)
    (folder / "run.json").write_text('{"image_shape": [3, 9, 7]}', encoding="utf-8")
    assert study.read_study(profile).pixels == 3 * 9 * 7


def test_methods_are_in_the_books_order_and_ones_own_after_them() -> None:
    assert study.in_order({"own", "clustr", "another", "ce"}) == ["ce", "clustr", "another", "own"]
    assert study.method_name("own") == "own"
    assert study.method_name("ce-clusters") == "cross-entropy, clusters fitted after"


def test_intervals_are_printed_in_one_way() -> None:
    assert study.with_interval(0.5514, 0.52, 0.5816) == "55.1\N{NO-BREAK SPACE}[52.0,\N{NO-BREAK SPACE}58.2]"
    table = pd.DataFrame({"low": [0.0], "high": [1.0], "share": [0.5]})
    assert study.with_intervals(table, "share") == [study.with_interval(0.5, 0.0, 1.0)]


def test_no_other_file_prints_intervals() -> None:
    """ "x [low, high]" is printed by `study.with_interval` alone."""
    pattern = re.compile(r"\[\{[^}]*low[^}]*\},(?: |\\N\{NO-BREAK SPACE\})\{[^}]*high[^}]*\}\]")
    files = [path for part in ("clustr_core", "tools", "notebooks") for path in (ROOT / part).rglob("*.*")]
    texts = {p: p.read_text(encoding="utf-8") for p in files if p.suffix in (".py", ".md")}
    assert [path.name for path, text in texts.items() if pattern.search(text)] == ["study.py"]


def test_the_tables_are_the_summary_in_words(cifar: study.Study) -> None:
    table = study.protocol_table(cifar).set_index("method")
    found = study.summary(cifar).set_index(["method", "column"])
    assert list(table.index) == [study.method_name(name) for name in cifar.ordinary + cifar.lipschitz]
    assert table.loc["ClusTR", "paper's protocol, %"] == study.with_interval(
        *found.loc[("clustr", "paper"), ["accuracy", "low", "high"]]
    )
    assert table.loc["ClusTR+QTRADES", "claimed"] == "74.04 % (authors' model)"
    assert table.loc["ClusTR", "claimed"] == "see the paper"
    assert table.loc["TRADES", ["claimed", "certified, %"]].tolist() == [study.ABSENT] * 2
    certified = study.certified_table(cifar, ["clustr-cert"])
    best = cifar.certificates.query("method == 'clustr-cert' and bound == 'exact'")
    shares = certified_accuracy(best, [0.0, *cifar.radii])["certified_accuracy"]
    assert [cell.split()[0] for cell in certified.iloc[0, 1:5]] == [f"{100 * share:.1f}" for share in shares]
    assert certified["images"].tolist() == [1000]


def test_nothing_was_claimed_of_other_data() -> None:
    table = study.protocol_table(study.read_study("quick", published=True))
    assert set(table["claimed"]) == {study.ABSENT}


def test_the_battery_in_words(cifar: study.Study) -> None:
    table = study.battery_table(cifar.diagnostics).set_index("method")
    masked = study.masked_methods(cifar.diagnostics)
    assert set(table.index[table["verdict"] == "masked"]) == set(map(study.method_name, masked))
    checks = study.checks_table(cifar.diagnostics).set_index("check")
    silent = set(study.silent_checks({"": cifar}))
    assert set(checks.index[checks["methods flagged"].str.startswith("0 of")]) == silent
    spoken = {said.split(" (")[0] for line in table["checks that speak (value)"] for said in line.split(", ")}
    assert spoken - {"none"} == set(checks.index) - silent
    rows = cifar.diagnostics[cifar.diagnostics["check"] == "budget"]
    assert checks.loc["budget", "values"] == f"{rows['value'].min():.3g} to {rows['value'].max():.3g}"


def test_curves_and_searches_end_where_the_study_says(cifar: study.Study) -> None:
    curve = study.sandwich_curve(cifar, "clustr-cert", 5)
    assert curve["at"].max() == pytest.approx(2 * cifar.radii[-1])
    assert curve.query("column == 'apgd'")["at"].max() <= max(cifar.profile.sandwich.apgd_eps)
    nearest = study.nearest_found(cifar, "clustr-cert")
    assert (nearest["radius"] <= nearest["norm"]).all()
    rungs = study.ladder_radii(cifar, "clustr-cert")
    means = study.ladder_table(cifar, ["clustr-cert"]).set_index("method").loc["ClusTR-cert"]
    assert means["exact"] == f"{rungs['exact'].mean():.4f}"


def test_what_a_training_buys(cifar: study.Study) -> None:
    found = study.bought(cifar, pd.DataFrame({"method": ["clustr", "own"], "training_ratio": [2.0, 3.0]}))
    assert found["training_ratio"].tolist() == [2.0, 2.0]
    assert [what.split()[-1] for what in found["what"]] == ["8/255", "36/255"]


def test_tables_of_several_data_sets() -> None:
    both = study.beside({"a": pd.DataFrame({"x": [1, 2]}), "b": pd.DataFrame({"x": [3]})})
    assert both.to_dict("list") == {"data": ["a", "a", "b"], "x": [1, 2, 3]}
    assert study.beside({})["data"].tolist() == ["no published rows"]


def test_a_claim_names_a_source_of_the_bibliography() -> None:
    table = study.claims()
    keys = set(re.findall(r"^@\w+\{(\w+),", (ROOT / "references.bib").read_text(encoding="utf-8"), re.M))
    assert set(table["source"]) <= keys
    assert (table["where"] != "").all()
    assert not table.duplicated(["method", "dataset", "norm", "eps", "metric"]).any()
    assert all(re.fullmatch(r"\d+(\.\d+)?", value) for value in table.loc[table["note"] != "see the paper", "value"])
    assert study.claim(method="clustr-qtrades", metric="pgd") == "74.04"
    with pytest.raises(ValueError, match=r"claims.csv: expected one row with .*, got 4"):
        study.claim(method="AOL-Large")


def test_no_claim_of_others_stands_in_a_chapters_code() -> None:
    table = study.claims()
    kin = set(study.KIN) - {"clustr-qtrades"}
    for source in [*(ROOT / "notebooks").glob("0[4-8]*.md"), ROOT / "notebooks/11-after-clustr.md"]:
        # 0.28 of PCL is a radius in other chapters
        theirs = table if source.stem.startswith("11") else table[~table["method"].isin(kin)]
        values = {value for value in theirs["value"] if "." in value}
        code = "\n".join(re.findall(r"^```\{code-cell\}.*?^```$", source.read_text(encoding="utf-8"), re.M | re.S))
        assert not {value for value in values if re.search(rf"(?<![\d.]){re.escape(value)}(?![\d.])", code)}, source


def test_systems_and_ours(cifar: study.Study) -> None:
    table = study.systems_table(cifar)
    assert list(table) == ["system", "clean, %", "36/255, %", "72/255, %", "108/255, %", "source"]
    assert table.iloc[0].tolist()[1:5] == [87.0, 78.1, 66.6, 53.5]
    assert table.iloc[-1, 0] == "ClusTR-cert, profile cpu-cifar10"
    assert table.iloc[-1, 2] == 55.7
    assert len(study.systems_table()) == len(table) - 1


def test_a_benchmark_that_was_not_published_is_named(home: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"bench/growth\.csv: expected a table that make bench wrote"):
        timings.bench("growth")


def test_timings_in_words() -> None:
    targets = timings.targets_table(timings.bench("bench"))
    assert targets["target"].str.startswith("<= ").all()
    assert set(timings.certification_table()["method"]) == set(timings.CERTIFIERS.values())
    assert "ClusTR" in set(timings.price_table(timings.bench("methods-cost"))["method"])
    means = timings.precision_table(timings.bench("precision"))
    assert means["clean, %"].between(0, 100).all()


def attacked(*rows: tuple[str, str, int, str]) -> pd.DataFrame:
    """Rows of attacks at eps 0.1: attack, loss, steps, and for each image whether it stayed robust (1) or not (0)."""
    return pd.DataFrame(
        [
            {"attack": attack, "norm": "linf", "eps": 0.1, "loss": loss, "steps": steps, "index": index,
             "correct": True, "robust": mark == "1"}
            for attack, loss, steps, marks in rows
            for index, mark in enumerate(marks)
        ]
    )  # fmt: skip


def test_one_models_accuracy_attack_by_attack_and_where_the_losses_disagree() -> None:
    rows = attacked(
        ("paper", "ce", 20, "1111"),
        ("paper", "ce", 100, "1110"),
        ("pgd", "ce", 40, "1100"),
        ("pgd", "margin", 40, "1010"),
        ("pgd", "dlr", 40, "1110"),
        ("transfer", "ce", 40, "0000"),
    )
    found = study.by_attack(rows, 0.1).set_index("attack")
    assert found["robust_accuracy"].to_dict() == {
        "paper's protocol": 0.75, "PGD, ce": 0.5, "PGD, margin": 0.5, "PGD, DLR": 0.75,
        "PGD, the worst of the three": 0.25, "transfer": 0.0, "all but the paper's": 0.0,
    }  # fmt: skip
    assert (found["examples"] == 4).all()
    assert (found["low"] <= found["robust_accuracy"]).all()
    assert study.disagreement(rows, 0.1) == 0.5
    with pytest.raises(ValueError, match=r"eps: expected one of \[0.1\], got 0.2"):
        study.by_attack(rows, 0.2)


def test_the_wide_network_measured_again_differs_where_the_source_of_the_transfer_does() -> None:
    """What chapter 6 says of the second measurement."""
    again, first, eps = study.full_width("again"), study.full_width(), 8 / 255
    assert again["index"].nunique() == 64
    assert set(again["index"]) <= set(first["index"])
    assert (again.drop_duplicates("index").set_index("index")["label"]).equals(
        first.drop_duplicates("index").set_index("index")["label"].loc[again["index"].unique()]
    )
    table = study.measured_again(eps).set_index("attack")
    found = study.by_attack(again, eps).set_index("attack")
    assert list(table.index) == list(found.index)[:-1]
    white = [name for name in table.index if name.startswith(("PGD", "cell"))]
    for name in white:
        value, low, high = (100 * found.loc[name, part] for part in ("robust_accuracy", "low", "high"))
        assert table.loc[name, "again"] == f"{value:.1f}\N{NO-BREAK SPACE}[{low:.1f},\N{NO-BREAK SPACE}{high:.1f}]"
        # the first measurement lies in the interval of the second
        assert low <= float(table.loc[name, "first"].split("\N{NO-BREAK SPACE}")[0]) <= high
    assert table.loc["transfer", "first"].startswith("0.0")
    assert found.loc["transfer", "robust_accuracy"] > 0.5


def test_a_narrow_and_a_wide_network_fail_in_different_ways(cifar: study.Study) -> None:
    """What chapter 6 says of the two networks."""
    found = study.widths().set_index(["width", "attack"])["robust_accuracy"]
    narrow, wide = found[8], found[64]
    assert narrow["paper's protocol"] > 0.2
    assert (narrow[["PGD, ce", "PGD, margin", "PGD, DLR"]] == 0).all()
    assert (wide[["PGD, ce", "PGD, margin", "PGD, DLR"]] > 0.16).all()
    assert 0 < wide["PGD, the worst of the three"] < 0.07
    assert wide["transfer"] == wide["AutoAttack"] == 0
    rows, eps = study.full_width(), cifar.eps()
    assert rows["index"].nunique() == 512
    assert round(100 * study.disagreement(rows, eps), 1) == 24.8
    mine = cifar.attacks.query("method == 'clustr'")
    assert study.disagreement(mine, eps) == 0
    bounds = study.full_width("certificates")
    assert bounds["lipschitz"].min() > 1e13 > 50 > bounds["lipschitz_lower_bound"].max()


def test_without_attacks_in_training_nothing_is_left_and_with_them_what_they_give() -> None:
    """What chapter 11 says of what others print."""
    kin = study.kin_table()
    assert list(kin["name"]) == [name for name, _ in study.KIN.values()]
    without = kin[kin["attacks"] != "yes"]
    assert (without["autoattack"] < 0.5).all()
    assert (without["reported"] > 30).all()
    trained = kin[kin["attacks"] == "yes"].set_index("name")
    assert trained["autoattack"].between(40, 60).all()
    gap = trained.loc["TLA", "autoattack"] - trained.loc["adversarial training alone", "autoattack"]
    assert gap == pytest.approx(3.37)


def test_networks_of_others_stand_at_the_gate_beside_each_other() -> None:
    table = study.strangers_table().set_index("attack")
    standard, adversarial = (table[title] for title in study.STRANGERS.values())
    assert standard["AutoAttack"].startswith("0.0")
    left = {name: float(cell.split("\N{NO-BREAK SPACE}")[0]) for name, cell in adversarial.items()}
    assert left["none: clean accuracy"] > 98
    # the black box finds what PGD does not
    assert 90 < left["AutoAttack"] < left["Square"] < 93 < left["PGD, margin"]
