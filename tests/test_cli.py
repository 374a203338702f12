"""The commands, as a reader types them."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType

import pandas as pd
import pytest
import torch
from disk import contents, files_of_at_most

from clustr_core import cli, data
from clustr_core.__main__ import main as command_line
from clustr_core.cli import main
from clustr_core.measuring import certified as certified_module
from clustr_core.measuring import pieces as pieces_module
from clustr_core.measuring.certified import certificate_rows
from clustr_core.measuring.profile import load_profile
from clustr_core.measuring.versions import MEASUREMENT_OF, VERSIONS
from clustr_core.storage.files import LONGEST_NAME, digest, read_json, seal_of, write_json, write_string
from clustr_core.storage.provenance import check_sidecar
from clustr_core.training import loop
from clustr_core.training.names import DONE
from clustr_core.training.processes import TORCHRUN
from clustr_core.training.recipes import CERTIFIABLE, METHODS, override, run_folder
from clustr_core.training.run import load_run
from clustr_core.training.state import epochs_kept

PROFILE = """\
shared: {dataset: digits, width: 4, train_examples: 150}
methods:
  ce: {epochs: 2}
  clustr: {warm_start: ce, epochs: 2, per_cluster: 4}
attacks:
  linf: {norm: linf, eps: [0.05, 0.1], steps: 2, examples: 20}
certified_examples: 20
"""


@pytest.fixture(autouse=True)
def home(tiny_book):
    """Every test here works in a book of its own."""
    return tiny_book


def clustr(*arguments, method="ce", profile="tiny"):
    """A command's status, on the CPU."""
    return main([*arguments, "--profile", profile, "--method", method, "--device", "cpu"])


def recipe(method="ce"):
    return load_profile("tiny").recipes[method]


def test_train_attack_certify(home, capsys):
    assert clustr("train", method="clustr") == 0
    out = capsys.readouterr().out
    assert f"runs/{run_folder(recipe('clustr')).name}: 2 epochs" in out
    assert "variance" in out
    assert {path.name for path in (home / "runs").iterdir()} == {run_folder(recipe(m)).name for m in ("ce", "clustr")}
    assert clustr("attack", method="clustr") == 0
    out = capsys.readouterr().out
    assert "robust_accuracy" in out
    assert "wrote results/tiny/attacks-clustr.csv (80 rows)" in out
    attacks = pd.read_csv(home / "results/tiny/attacks-clustr.csv")
    assert attacks["method"].unique().tolist() == ["clustr"]
    assert clustr("certify", method="clustr") == 0
    assert "wrote results/tiny/certificates-clustr.csv (60 rows)" in capsys.readouterr().out
    assert set(pd.read_csv(home / "results/tiny/certificates-clustr.csv")["bound"]) == {
        "triangle",
        "nearest",
        "pairwise",
    }


CERTIFYING = """\
shared: {dataset: digits, width: 16, train_examples: 150, epochs: 2}
methods:
  ce: {}
  clustr-cert: {encoder: lip-mlp, learning_rate: 0.02, per_class: 1}
  lip-linear: {encoder: lip-mlp, learning_rate: 0.02}
  smoothing: {}
certified_examples: 15
sandwich: {examples: 5, steps: 3, points: 4}
smoothing: {examples: 4, samples: 30, selection_samples: 5, failure_prob: 0.1}
"""


@pytest.fixture
def certifying(home):
    """A second profile, of methods that certify."""
    (home / "profiles/certifying.yaml").write_text(CERTIFYING)
    return home / "results/certifying"


def certifies(*arguments, method="clustr-cert"):
    return clustr(*arguments, method=method, profile="certifying")


@pytest.mark.parametrize(
    ("method", "bounds", "rows"),
    [
        ("clustr-cert", {"triangle", "nearest", "pairwise", "exact"}, 60),
        ("lip-linear", {"margin"}, 15),
        ("smoothing", {"smoothing"}, 4),
        ("ce", {"triangle", "nearest", "pairwise"}, 45),
    ],
)
def test_certify_writes_what_each_method_promises(certifying, capsys, method, bounds, rows):
    assert certifies("certify", method=method) == 0
    out = capsys.readouterr().out
    assert f"wrote results/certifying/certificates-{method}.csv ({rows} rows)" in out
    for word in (*bounds, "feature_radius", "lipschitz_lower_bound"):
        assert word in out
    table = pd.read_csv(certifying / f"certificates-{method}.csv")
    assert set(table["bound"]) == bounds
    assert set(table["method"]) == {method}


def test_prototypes_are_certified_without_training(certifying, home, capsys):
    assert certifies("certify", method="prototypes") == 0
    assert "wrote results/certifying/certificates-prototypes.csv (60 rows)" in capsys.readouterr().out
    table = pd.read_csv(certifying / "certificates-prototypes.csv")
    assert list(table)[:3] == ["method", "bound", "index"]
    assert set(table["method"]) == {"prototypes"}
    assert table.groupby("bound").size().to_dict() == dict.fromkeys(("triangle", "nearest", "pairwise", "exact"), 15)
    assert (table["lipschitz"] == 1).all()
    # the images of every other certificate
    assert certifies("certify") == 0
    assert set(pd.read_csv(certifying / "certificates-clustr-cert.csv")["index"]) == set(table["index"])
    assert not list((home / "runs").glob("*prototypes*"))
    assert certifies("certify", "--output", str(home / "mine.csv"), method="prototypes") == 0
    assert pd.read_csv(home / "mine.csv").equals(table)


@pytest.mark.parametrize("command", ["train", "attack", "diagnose", "sandwich"])
def test_prototypes_are_for_certify_alone(certifying, home, capsys, command):
    message = refused(capsys, command=command, method="prototypes", profile="certifying")
    assert "method: expected one of ['ce', 'clustr-cert', 'lip-linear', 'smoothing'] in certifying" in message
    assert "got 'prototypes'" in message
    assert contents(home / "results") == {}


def test_prototypes_have_no_recipe_to_change(certifying, home, capsys):
    message = refused(capsys, "--set", "width=3", command="certify", method="prototypes", profile="certifying")
    assert message == "clustr: --set: expected none with prototypes, which have no recipe, got ['width=3']\n"
    assert contents(home / "results") == {}


@pytest.mark.parametrize("method", ["clustr-cert", "lip-linear"])
def test_sandwich_writes_what_each_attack_found(certifying, capsys, method):
    assert certifies("sandwich", method=method) == 0
    out = capsys.readouterr().out
    assert f"wrote results/certifying/sandwich-{method}.csv (20 rows)" in out
    table = pd.read_csv(certifying / f"sandwich-{method}.csv")
    assert list(table) == ["method", "attack", "index", "label", "correct", "radius", "norm", "gradients"]
    assert table.groupby("attack").size().to_dict() == dict.fromkeys(("fmn", "ddn", "pgd", "random"), 5)
    right = table[table["correct"]]
    assert (right["norm"] >= right["radius"] - 1e-5).all()
    assert f"no certificate of {right['index'].nunique()} images is broken" in out
    for word in ("fmn", "ddn", "pgd", "random", "radius", "norm", "ratio"):
        assert word in out


@pytest.mark.parametrize("method", ["ce", "smoothing"])
def test_a_sandwich_needs_a_method_that_certifies_what_it_attacks(certifying, home, capsys, method):
    message = refused(capsys, command="sandwich", method=method, profile="certifying")
    assert message == f"clustr: --method: expected one of clustr-cert, lip-linear, which certify, got {method}\n"
    # it was not trained for nothing
    assert contents(home / "results") == contents(home / "runs") == {}


def test_a_sandwich_needs_a_budget(certifying, home, capsys):
    lines = CERTIFYING.splitlines(keepends=True)
    (home / "profiles/certifying.yaml").write_text("".join(line for line in lines if not line.startswith("sandwich")))
    assert certifies("train") == 0
    capsys.readouterr()
    message = refused(capsys, command="sandwich", method="clustr-cert", profile="certifying")
    assert message == "clustr: profile certifying: expected an entry sandwich, got none\n"


def test_a_broken_certificate_is_one_line_and_status_2(certifying, home, capsys, monkeypatch):
    real = certificate_rows
    monkeypatch.setattr(certified_module, "certificate_rows", lambda *a: real(*a).assign(radius=10.0))
    assert certifies("train") == 0
    capsys.readouterr()
    assert certifies("sandwich") == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    # beside the bar of the chunks
    (said,) = [line for line in captured.err.splitlines() if line.startswith("clustr: ")]
    kept = list(home.glob("runs/*/counterexamples/*.safetensors"))
    assert len(kept) == 1
    assert kept[0].name in said
    assert contents(home / "results") == {}
    assert not list(home.glob("runs/*/tables/sandwich-*"))


def test_a_sandwich_of_a_changed_recipe_lies_beside_its_run(certifying, home):
    assert certifies("sandwich", "--set", "epochs=1") == 0
    (table,) = home.glob("runs/*/sandwich-clustr-cert-certifying.csv")
    changed = override(load_profile("certifying").recipes["clustr-cert"], {"epochs": 1})
    assert table.parent == run_folder(changed)
    assert not (home / "results").exists()
    assert certifies("sandwich", "--output", str(home / "mine.csv")) == 0
    assert len(pd.read_csv(home / "mine.csv")) == 20


@pytest.mark.parametrize(
    ("command", "kind"), [("attack", "attacks"), ("certify", "certificates"), ("sandwich", "sandwich")]
)
def test_jobs_that_know_nothing_of_each_other_take_shares(certifying, home, capsys, monkeypatch, command, kind):
    lines = "attacks:\n  linf: {norm: linf, eps: [0.05, 0.1], steps: 2, examples: 15, losses: [ce, margin]}\n"
    with (home / "profiles/certifying.yaml").open("a") as file:
        file.write(lines)
    monkeypatch.setattr(pieces_module, "CHUNK", 4)
    assert certifies(command) == 0
    # a sandwich makes the certificates that it needs as well
    kept = f"runs/*/tables/{MEASUREMENT_OF[kind]}-*.csv"
    pieces = {path.name: path.read_bytes() for path in home.glob(kept)}
    table = (certifying / f"{kind}-clustr-cert.csv").read_bytes()
    for path in [*home.glob("runs/*/tables/*.csv"), certifying / f"{kind}-clustr-cert.csv"]:
        path.unlink()
    capsys.readouterr()
    made = []
    for index in (2, 1, 3):
        assert certifies(command, "--shard", f"{index}/3") == 0
        there = {path.name for path in home.glob(kept)}
        made.append(len(there) - sum(made))
        assert f"share {index} of 3: {made[-1]} of {len(pieces)} pieces are kept" in capsys.readouterr().out
        assert not (certifying / f"{kind}-clustr-cert.csv").exists()
    # shares are even, together they are all, and the last call only puts them together
    assert max(made) - min(made) <= 1
    before = {path: path.stat().st_mtime_ns for path in home.glob(kept)}
    assert certifies(command) == 0
    assert {path: path.stat().st_mtime_ns for path in home.glob(kept)} == before
    assert {path.name: path.read_bytes() for path in before} == pieces
    assert (certifying / f"{kind}-clustr-cert.csv").read_bytes() == table


def test_a_share_has_no_table_and_prototypes_have_no_shares(certifying, home, capsys):
    message = refused(capsys, "--shard", "1/2", command="certify", method="prototypes", profile="certifying")
    assert message == "clustr: --shard: expected none with prototypes, which are certified at once\n"
    arguments = ("--shard", "1/2", "--output", "x.csv")
    message = refused(capsys, *arguments, command="certify", method="clustr-cert", profile="certifying")
    assert message == "clustr: --output: expected none with --shard, which writes no table, got x.csv\n"


@pytest.mark.parametrize("command", ["attack", "certify", "sandwich"])
def test_a_share_trains_nothing(certifying, home, capsys, command):
    message = refused(capsys, "--shard", "1/2", command=command, method="clustr-cert", profile="certifying")
    assert message.startswith("clustr: --shard: expected a finished run, got no runs/digits-clustr-cert-")
    assert message.endswith("/run.json; run clustr train first\n")
    assert not list(home.glob("runs/*"))


@pytest.mark.parametrize("shard", ["3", "0/2", "3/2", "1/0", "a/b", "1/2/3", "-1/2"])
def test_a_share_that_is_none(shard, capsys):
    with pytest.raises(SystemExit):
        main(["attack", "--method", "ce", f"--shard={shard}"])
    assert f"expected I/N with I in 1..N, got '{shard}'" in capsys.readouterr().err


def test_prototypes_of_a_profile_without_methods(home, capsys):
    (home / "profiles/empty.yaml").write_text("certified_examples: 3\n")
    message = refused(capsys, command="certify", method="prototypes", profile="empty")
    assert message == "clustr: profile empty: expected at least one entry under methods, got none\n"


@pytest.mark.parametrize("command", ["train", "certify"])
def test_an_encoder_that_cannot_be_certified_is_not_trained(certifying, home, capsys, command):
    changes = ("--set", "encoder=lip-cnn-cayley")
    message = refused(capsys, *changes, command=command, method="clustr-cert", profile="certifying")
    assert message == (
        f"clustr: encoder: expected one of {CERTIFIABLE} for clustr-cert, since the rounding of "
        "others has no known bound, got 'lip-cnn-cayley'\n"
    )
    assert contents(home / "runs") == {}


def test_precision_is_part_of_the_run(home, capsys):
    assert clustr("certify", "--precision", "bf16-mixed") == 0
    changed = override(recipe(), {"precision": "bf16-mixed"})
    assert json.loads((run_folder(changed) / "run.json").read_text())["recipe"]["precision"] == "bf16-mixed"
    assert (run_folder(changed) / "certificates-ce-tiny.csv").exists()
    assert not run_folder(recipe()).exists()
    assert not (home / "results").exists()


def test_a_diagnosis_is_not_shared_out(capsys, monkeypatch):
    for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        monkeypatch.setenv(name, "2")
    for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "0")
    assert refused(capsys, command="diagnose") == (
        "clustr: diagnose: expected one process, since processes cannot share it, got 2\n"
    )


@pytest.mark.parametrize("command", ["attack", "diagnose"])
def test_attacks_are_not_transferred_from_networks_of_other_data(home, capsys, command):
    text = (home / "profiles/tiny.yaml").read_text(encoding="utf-8")
    transfer = "attacks:\n  transfer: {attack: transfer, eps: [0.1], steps: 2, examples: 4, source: ce}\n"
    (home / "profiles/tiny.yaml").write_text(text.replace("attacks:\n", transfer), encoding="utf-8")
    assert clustr(command, "--set", "dataset=mnist5k", method="clustr") == 2
    assert capsys.readouterr().err.startswith(
        "clustr: dataset: expected 'digits', as of ce in profile tiny, from which"
    )
    assert contents(home / "runs") == {}


@pytest.mark.parametrize("other", ["{norm: l2, eps: [0.1], steps: 2}", "{norm: linf, eps: [0.2], steps: 2}"])
def test_the_papers_protocol_may_meet_no_other_attack(home, capsys, other):
    paper = "paper: {attack: paper, eps: [0.1], steps: 2, restarts: 1, examples: 8}"
    text = "shared: {dataset: digits, encoder: small-cnn, width: 4, train_examples: 64}\nmethods: {ce: {epochs: 1}}\n"
    (home / "profiles/two.yaml").write_text(f"{text}attacks:\n  {paper}\n  other: {other}\n", encoding="utf-8")
    assert clustr("attack", profile="two") == 0
    said = capsys.readouterr().out
    assert "each attack" in said
    assert "both protocols" not in said
    assert (home / "results/two/attacks-ce.csv").exists()


def test_a_second_time_nothing_is_trained(home, capsys):
    assert clustr("train") == 0
    first, before = capsys.readouterr().out, contents(home / "runs")
    assert clustr("train") == 0
    assert capsys.readouterr().out == first
    assert contents(home / "runs") == before


def test_changed_fields_are_another_run_whose_tables_lie_beside_it(home, capsys):
    assert clustr("attack", "--set", "epochs=1", "--set", "learning_rate=1/100", "--set", "snapshots=[0, 1]") == 0
    changed = override(recipe(), {"epochs": 1, "learning_rate": 0.01, "snapshots": (0, 1)})
    assert (run_folder(changed) / "attacks-ce-tiny.csv").exists()
    assert not (home / "results").exists()
    assert not run_folder(recipe()).exists()


def test_a_table_may_go_elsewhere(home):
    assert clustr("certify", "--output", str(home / "mine/table.csv")) == 0
    assert len(pd.read_csv(home / "mine/table.csv")) == 60
    assert not (home / "results").exists()


@pytest.mark.parametrize("output", [None, "mine/table.csv"])
@pytest.mark.parametrize(
    ("command", "kind", "method"),
    [
        ("attack", "attacks", "ce"),
        ("certify", "certificates", "ce"),
        ("certify", "certificates", "prototypes"),
        ("sandwich", "sandwich", "clustr-cert"),
        ("diagnose", "diagnostics", "ce"),
        ("diagnose", "ablations", "ce"),
    ],
)
def test_every_table_has_a_sidecar_with_its_protocol_and_version(certifying, home, command, kind, method, output):
    with (home / "profiles/certifying.yaml").open("a", encoding="utf-8") as file:
        file.write("attacks:\n  linf: {eps: [0.05], steps: 1, examples: 4, losses: [ce]}\n")
        file.write("examination: {eps: 0.1, examples: 3, steps: 1, restarts: 1, queries: 1}\n")
    if command == "diagnose" and output:
        with pytest.raises(SystemExit):
            certifies(command, "--output", output, method=method)
        return
    assert certifies(command, *(["--output", output] if output else []), method=method) == 0
    profile, path = load_profile("certifying"), Path(output or f"results/certifying/{kind}-{method}.csv")
    made = check_sidecar(path)["made"]
    assert made["version"] == VERSIONS[MEASUREMENT_OF[kind]]
    assert made["protocol"] == json.loads(json.dumps(profile.protocol(kind)))
    assert (made["method"], made["profile"]) == (method, {"name": "certifying", "sha256": profile.sha256})
    run = None if method == "prototypes" else load_run(run_folder(profile.recipes[method]))
    assert made["run"] == (run and run.path.name)
    assert made["weights_sha256"] == (run and run.weights_sha256)


@pytest.mark.parametrize("output", ["table", "table.json", "mine/table.txt"])
def test_an_output_that_its_sidecar_would_overwrite_is_refused_before_any_work(home, capsys, output):
    message = refused(capsys, "--output", output, command="certify")
    expected = "--output: expected a file name that ends in .csv, since X.json lies beside it, got"
    assert message == f"clustr: {expected} {output}\n"
    assert contents(home / "runs") == {}


def test_an_output_beside_somebody_elses_json_is_refused_before_any_work(home, capsys):
    (home / "package.json").write_text('{"name": "mine"}', encoding="utf-8")
    message = refused(capsys, "--output", "package.csv", command="certify")
    expected = "--output: expected at package.json no file but a table's sidecar, got one that would be lost"
    assert message == f"clustr: {expected}\n"
    assert (home / "package.json").read_text(encoding="utf-8") == '{"name": "mine"}'
    assert contents(home / "runs") == {}


def test_an_output_over_a_table_that_is_no_such_output_is_refused_before_any_work(home, capsys):
    """A run's history, a kept piece and what somebody wrote by hand are CSV files, too."""
    (home / "history.csv").write_text("epoch,loss\n1,2\n", encoding="utf-8")
    message = refused(capsys, "--output", "history.csv", command="certify")
    expected = "--output: expected no file, or a table with its sidecar, got another that would be lost (history.json: "
    assert message.startswith(f"clustr: {expected}")
    assert (home / "history.csv").read_text(encoding="utf-8") == "epoch,loss\n1,2\n"
    assert contents(home / "runs") == {}


def test_what_comes_to_an_outputs_place_while_rows_are_computed_stays(home, capsys, monkeypatch):
    real = cli.certificates_of

    def certificates_meanwhile(*args, **kwargs):
        (home / "mine.csv").write_text("my,own\n", encoding="utf-8")
        return real(*args, **kwargs)

    monkeypatch.setattr(cli, "certificates_of", certificates_meanwhile)
    assert clustr("certify", "--output", "mine.csv") == 2
    assert "clustr: --output: expected no file, or a table with its sidecar" in capsys.readouterr().err
    assert (home / "mine.csv").read_text(encoding="utf-8") == "my,own\n"


def test_no_cell_of_a_strangers_history_reaches_the_terminal_as_it_is(home, capsys):
    assert clustr("train") == 0
    path = run_folder(recipe()) / "history.csv"
    path.write_text(path.read_text(encoding="utf-8").replace("epoch,", "epoch\x1b[2J,", 1), encoding="utf-8")
    record = read_json(path.parent / "run.json") | {"history_sha256": digest(path.read_bytes())}
    del record["sha256"]
    write_json(path.parent / "run.json", record | {"sha256": seal_of(record)})
    capsys.readouterr()
    assert clustr("train") == 0
    out = capsys.readouterr().out
    assert "\x1b" not in out
    assert r"epoch\x1b[2J" in out


def test_an_output_below_a_file_is_refused_before_any_work(home, capsys):
    (home / "file").write_text("mine", encoding="utf-8")
    message = refused(capsys, "--output", "file/x/table.csv", command="certify")
    there = home / "file"
    assert message == f"clustr: --output: expected a file in a folder, got file/x/table.csv, and {there} is none\n"
    assert contents(home / "runs") == {}


def test_an_output_of_too_long_a_name_is_refused_before_any_work(home, capsys):
    message = refused(capsys, "--output", "x" * 240 + ".csv", command="certify")
    assert message.startswith("clustr: --output: expected a file name of at most ")
    assert contents(home / "runs") == {}
    path = home / ("x" * (LONGEST_NAME - 4) + ".csv")
    write_string(path, "fits")
    assert path.read_text(encoding="utf-8") == "fits"


def test_a_profile_of_no_name_is_not_the_usual_one(home, capsys):
    assert main(["certify", "--profile", "", "--method", "ce"]) == 2
    assert "--profile: expected a name or the path of a YAML file, got an empty one" in capsys.readouterr().err


def test_memory_that_runs_out_is_one_line(home, capsys, monkeypatch):
    def full(options):
        raise MemoryError

    monkeypatch.setattr(cli, "_train", full)
    assert refused(capsys) == "clustr: out of memory; take a device with more memory\n"


@pytest.mark.parametrize("closed", ["0<&-", "1>&-", "2>&-", "0<&- 1>&- 2>&-"])
def test_a_standard_stream_that_is_closed_is_no_trouble(home, closed):
    command = f"{sys.executable} -m clustr_core train --profile tiny --method ce --device cpu {closed}"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    assert subprocess.run(command, shell=True, env=environment, check=False).returncode == 0
    assert (run_folder(recipe("ce")) / DONE).exists()


def test_ctrl_c_before_anything_has_begun_is_one_line(monkeypatch, capsys):
    class Loading(ModuleType):
        """Is asked to end before it is there."""

        def __getattr__(self, name: str) -> None:
            raise KeyboardInterrupt

    monkeypatch.setitem(sys.modules, "clustr_core.cli", Loading("clustr_core.cli"))
    assert command_line() == 130
    assert capsys.readouterr().err == "clustr: ended by Ctrl-C; nothing was begun\n"


def test_what_a_terminal_would_act_on_is_told_by_its_number(capsys):
    message = refused(capsys, "--output", "\x1b]0;pwned\x07.txt", command="certify")
    assert "\\x1b]0;pwned\\x07" in message
    assert message.removesuffix("\n").isprintable()


def test_a_released_model_has_a_table_with_a_sidecar(home, monkeypatch):
    profile = "attacks:\n  linf: {eps: [0.05], steps: 1, examples: 9, losses: [ce]}\n"
    (home / "profiles/one.yaml").write_text(profile, encoding="utf-8")
    (home / "model_best.pth").write_bytes(b"released")
    network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10)).eval()
    digits = data.load_dataset("digits")

    def read_once(written, path, *, dataset):
        # as a training that goes on would
        path.write_bytes(b"another")
        return network

    monkeypatch.setattr(cli, "official_model", read_once)
    monkeypatch.setattr(data, "load_dataset", lambda name: digits)
    given = ["--official", "model_best.pth", "--dataset", "cifar10", "--examples", "4", "--device", "cpu"]
    assert main(["attack", *given, "--profile", "one"]) == 0
    (path,) = home.glob("runs/official-*/attacks-*.csv")
    assert path.name == "attacks-one-4.csv"
    assert len(pd.read_csv(path)) == 4
    made = check_sidecar(path)["made"]
    # as it was run, not as the profile says
    assert made["protocol"]["linf"]["examples"] == 4
    assert (made["method"], made["dataset"], made["version"]) == ("model_best", "cifar10", VERSIONS["attack"])
    assert made["weights_sha256"] == digest(b"released")


@pytest.mark.parametrize("command", ["train", "attack", "diagnose", "certify", "sandwich"])
def test_variables_of_torchrun_that_were_left_behind_are_one_line_of_every_command(home, capsys, monkeypatch, command):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    message = refused(capsys, command=command)
    assert message.startswith("clustr: environment: expected all that torchrun sets, got WORLD_SIZE=2 without LOCAL_")
    for name in TORCHRUN:
        monkeypatch.setenv(name, "0")
    assert refused(capsys, command=command).startswith(
        "clustr: environment: expected LOCAL_RANK in 0..LOCAL_WORLD_SIZE-1"
    )
    assert contents(home / "runs") == contents(home / "results") == {}


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("epochs=010", None),
        ("epochs=1:30", "ce: epochs: expected a number or a fraction, got '1:30'"),
        ("epochs=1_0", "ce: epochs: expected a number or a fraction, got '1_0'"),
        ("epochs=1.5", "ce: epochs: expected a whole number, got 1.5"),
    ],
)
def test_numbers_after_set_are_decimal(home, capsys, given, said):
    if said is None:
        assert cli._changes([given]) == {"epochs": 10}
        return
    assert refused(capsys, "--set", given).startswith(f"clustr: {said}")


def test_a_field_is_changed_once(home, capsys):
    message = refused(capsys, "--set", "epochs=1", "--set", "epochs=2")
    assert message == "clustr: --set: expected each field once, got epochs twice\n"


def test_a_fraction_in_a_chapter_is_a_number(home):
    lines = "chapters:\n  04-pgd: {pictured_eps: 8/255, grid: [2/255, 0.1], name: a/b}\n"
    (home / "profiles/chapters.yaml").write_text(lines, encoding="utf-8")
    found = load_profile("chapters").chapters["04-pgd"]
    assert found == {"pictured_eps": 8 / 255, "grid": [2 / 255, 0.1], "name": "a/b"}


@pytest.mark.parametrize("command", ["attack", "certify", "sandwich"])
def test_a_damaged_piece_is_one_line_that_names_it(certifying, home, capsys, command):
    with (home / "profiles/certifying.yaml").open("a", encoding="utf-8") as file:
        file.write("attacks:\n  linf: {eps: [0.05], steps: 1, examples: 4, losses: [ce]}\n")
    assert certifies(command) == 0
    kept = next(home.glob(f"runs/*/tables/{command.replace('certify', 'certificate')}-*.csv"))
    kept.write_bytes(kept.read_bytes()[:-2])
    capsys.readouterr()
    assert certifies(command) == 2
    (said,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("clustr: ")]
    assert kept.name in said
    assert "got a damaged file" in said


def test_threads_are_set():
    before = torch.get_num_threads()
    try:
        assert clustr("train", "--threads", "2") == 0
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("command", [[], ["train"], ["attack"], ["diagnose"], ["certify"], ["sandwich"]])
def test_help_teaches(command, capsys):
    with pytest.raises(SystemExit) as caught:
        main([*command, "--help"])
    assert caught.value.code == 0
    # lines may break inside a name
    out = "".join(capsys.readouterr().out.split())
    for word in (
        ("--profile", "--method", "--set", ", ".join(METHODS))
        if command
        else (
            "clustr train   --profile quick --method clustr",
            "make figures",
            "train",
            "attack",
            "certify",
            "clustr certify --profile quick --method prototypes",
            "clustr sandwich --profile quick --method clustr-cert",
        )
    ):
        assert "".join(word.split()) in out


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["draw"],
        ["train"],
        ["train", "--method", "ce", "--epochs", "3"],
        ["train", "--method", "ce", "--output", "x"],
    ],
)
def test_what_the_parser_refuses(arguments, capsys):
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    assert "usage: clustr" in capsys.readouterr().err


def refused(capsys, *arguments, command="train", **options):
    """The one line on stderr of a command that ends with status 2."""
    assert clustr(command, *arguments, **options) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("clustr: ")
    assert captured.err.count("\n") == 1
    return captured.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--set", "epochs"], "--set: expected NAME=VALUE, got 'epochs'"),
        (["--set", "epoch=3"], "ce: unknown key ['epoch'], expected some of"),
        (["--set", "epochs=0"], "epochs: expected a positive number, got 0"),
        (["--set", "epochs=many"], "ce: epochs: expected a number or a fraction, got 'many'"),
        (["--set", "milestones=[1,"], "--set: expected YAML after milestones=, got '[1,'"),
        (["--set", "milestones=3"], "ce: milestones: expected a list, got 3"),
        (["--set", "dataset=imagenet"], "name: expected one of"),
        (["--set", "dataset=folder:/none/such"], "folder: expected a directory at /none/such"),
        (["--set", "encoder=vgg"], "encoder: expected one of"),
        (["--device", "abacus"], "--device: expected one that works here, such as cpu, got 'abacus'"),
        (["--device", ""], "--device: expected one that works here, such as cpu, got ''"),
        (["--threads", "0"], "--threads: expected at least 1, got 0"),
    ],
)
def test_bad_input_is_one_line_and_status_2(home, capsys, arguments, message):
    # --device cpu comes first, so that a test may give another
    assert main(["train", "--profile", "tiny", "--method", "ce", "--device", "cpu", *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith(f"clustr: {message}")
    assert captured.err.count("\n") == 1
    assert not (home / "results").exists()
    assert not list(home.rglob("run.json"))


def test_a_method_or_profile_that_is_not_there(capsys):
    assert "expected one of ['ce', 'clustr'] in tiny, got 'pgd-at'" in refused(capsys, method="pgd-at")
    assert "profile: expected one of ['tiny'] or a YAML file, got huge" in refused(capsys, profile="huge")


@pytest.mark.parametrize("command", ["train", "attack", "certify", "sandwich"])
def test_a_profile_that_is_no_yaml_is_one_line(home, capsys, command):
    (home / "profiles/tiny.yaml").write_text("methods:\n  ce: {epochs: [\n  clustr:\n")
    assert "tiny.yaml: expected YAML, got " in refused(capsys, command=command)


def test_damaged_runs_are_one_line(home, capsys):
    assert clustr("train") == 0
    capsys.readouterr()
    folder = run_folder(recipe())
    (folder / "run.json").write_text("{")
    assert "run.json: expected JSON" in refused(capsys)
    (folder / "run.json").unlink()
    (folder / "checkpoint.safetensors").write_bytes(b"half")
    assert "checkpoint.safetensors: expected a checkpoint" in refused(capsys)


def test_a_full_disk_is_one_line_and_leaves_nothing(home, capsys):
    with files_of_at_most(5000):
        message = refused(capsys)
    assert "File too large" in message
    assert "checkpoint.safetensors" in message
    assert contents(home / "runs") == {}


def test_the_installed_command(home):
    command = [sys.executable, "-m", "clustr_core", "train", "--profile", "tiny", "--method", "none"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 2
    assert done.stderr == "clustr: method: expected one of ['ce', 'clustr'] in tiny, got 'none'\n"


@pytest.mark.parametrize(
    ("ended", "status", "name"), [(signal.SIGINT, 130, "Ctrl-C"), (signal.SIGTERM, 143, "SIGTERM")]
)
def test_a_command_that_is_asked_to_end_says_so_in_one_line(ended, status, name, home, capsys, monkeypatch):
    before = signal.getsignal(ended)
    monkeypatch.setattr(cli, "_train", lambda options: os.kill(os.getpid(), ended) or time.sleep(5))
    assert clustr("train") == status
    said = capsys.readouterr().err.splitlines()
    assert said == [f"clustr: ended by {name}; {cli._KEPT}"]
    assert signal.getsignal(ended) is before


@pytest.mark.parametrize(
    ("ended", "status", "name"), [(signal.SIGINT, 130, "Ctrl-C"), (signal.SIGTERM, 143, "SIGTERM")]
)
@pytest.mark.parametrize(("times", "epochs"), [(1, 2), (2, 1)])
def test_an_epoch_under_way_is_finished_unless_it_is_asked_twice(
    times, epochs, ended, status, name, home, capfd, monkeypatch
):
    real, begun = loop.train_epoch, []

    def train_epoch(*given):
        begun.append(1)
        if len(begun) == 2:
            for _ in range(times):
                os.kill(os.getpid(), ended)
        return real(*given)

    monkeypatch.setattr(loop, "train_epoch", train_epoch)
    assert clustr("train", "--set", "epochs=4") == status
    said = [line for line in capfd.readouterr().err.splitlines() if line.startswith("clustr: ")]
    assert said == [cli._WAITS.format(name), f"clustr: ended by {name}; {cli._KEPT}"]
    [checkpoint] = (home / "runs").glob("*/checkpoint.safetensors")
    assert (len(begun), epochs_kept(checkpoint)) == (2, epochs)
    assert clustr("train", "--set", "epochs=4") == 0
    assert len(begun) == 2 + 4 - epochs


def test_a_signal_that_a_shell_has_a_job_ignore_stays_ignored(home, monkeypatch):
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        monkeypatch.setattr(cli, "_train", lambda options: os.kill(os.getpid(), signal.SIGINT))
        assert clustr("train") == 0
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_piece_under_way_is_finished_first(home, capfd, monkeypatch):
    assert clustr("train") == 0
    monkeypatch.setattr(pieces_module, "CHUNK", 4)
    real, begun = pieces_module.write_table, []

    def write_table(*given, **how):
        begun.append(1)
        if len(begun) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(*given, **how)

    monkeypatch.setattr(pieces_module, "write_table", write_table)
    assert clustr("certify") == 143
    assert len(list((home / "runs").glob("*/tables/*.csv"))) == 2
    assert clustr("certify") == 0
    assert "finished first" in capfd.readouterr().err


def test_a_word_of_thousands_of_letters_is_not_said_again(home, capsys):
    with pytest.raises(SystemExit):
        clustr("train", "--threads", "x" * 100_000)
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith("clustr train: error: argument --threads: invalid int value: 'xxx")
    assert len(said) < 800
