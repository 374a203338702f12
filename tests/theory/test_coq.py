"""The machine-checked proof: nothing is assumed that the reals do not assume, and the checker says so where it is."""

import re
import shutil
from pathlib import Path

import pytest

from clustr_core.theory.coq import AXIOMS_OF_THE_REALS, check, proof_file, statements

SOURCE = (Path(__file__).parents[2] / "proofs/Certificate.v").read_text()
MAIN = {
    "hard_rule_theorems": {
        "identity", "nearest_sound", "pairwise_sound", "dual_sound", "triangle_le_nearest", "nearest_le_pairwise",
        "pairwise_is_one_hot_dual", "nearest_tight", "optimality", "second_nearest_unsound",
    },
    "soft_rule_theorems": {
        "soft_global_sound", "soft_local_sound", "soft_lse_sound", "soft_dual_sound", "soft_log_k_sound",
    },
}  # fmt: skip


def without_comments(source):
    before = None
    while before != source:
        before, source = source, re.sub(r"\(\*(?:(?!\(\*|\*\)).)*\*\)", "", source, flags=re.DOTALL)
    return source


def test_nothing_is_taken_on_trust():
    code = without_comments(SOURCE)
    assert "*)" not in code
    for word in ("Admitted", "admit", "Axiom", "Axioms", "Parameter", "Conjecture", "Hypothesis", "Variable", "Abort"):
        assert not re.search(rf"\b{word}s?\b", code), word
    assert {line.split()[1] for line in re.findall(r"^From \w+ Require.*", code, re.MULTILINE)} == {"Coq"}
    assert not re.findall(r"^Require", code, re.MULTILINE)
    assert code.count("Proof.") == len(re.findall(r"\bQed\.", code)) + len(re.findall(r"\bDefined\.", code))


def test_the_space_is_one_of_laws_only():
    record = re.search(r"Record inner_space.*?\}\.", without_comments(SOURCE), re.DOTALL)[0]
    fields = re.findall(r"^  (\w+) :>?", record, re.MULTILINE)
    assert len(fields) == 19
    assert not {name for name in fields if re.search("norm|dist|cluster|cauchy|schwarz", name)}


@pytest.mark.parametrize("group", MAIN)
def test_the_main_theorems_are_stated_with_prose_and_asked_for_their_axioms(group):
    found = statements(SOURCE)
    assert set(found) >= MAIN[group]
    for name in MAIN[group]:
        assert len(found[name].prose) > 20
        # closed: every name is bound by the statement itself
        assert found[name].text.split()[0] in ("forall", "let")
    definition = re.search(rf"Definition {group} :=\s*\((.*?)\)\.", SOURCE, re.DOTALL)[1]
    assert set(re.findall(r"\w+", definition)) >= MAIN[group]
    assert f"Print Assumptions {group}." in SOURCE


def test_without_the_checker_nothing_is_claimed(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert check(proof_file()) is None


if shutil.which("coqc"):

    def test_the_checker_accepts_the_proof_and_lists_the_axioms_of_the_reals_only():
        found = check(Path(__file__).parents[2] / "proofs/Certificate.v")
        assert set(found.axioms) == set(MAIN)
        assert found.axioms["hard_rule_theorems"] == AXIOMS_OF_THE_REALS - {"Classical_Prop.classic"}
        assert found.axioms["soft_rule_theorems"] == AXIOMS_OF_THE_REALS

    def test_a_false_theorem_is_refused(tmp_path):
        wrong = tmp_path / "Wrong.v"
        wrong.write_text("Theorem wrong : 1 = 2.\nProof. reflexivity. Qed.\n")
        with pytest.raises(ValueError, match=r"Wrong\.v: expected a proof that coqc accepts, got "):
            check(wrong)

    def test_an_added_axiom_is_seen(tmp_path):
        helped = tmp_path / "Helped.v"
        helped.write_text("Axiom magic : 1 = 2.\nTheorem t : 1 = 2.\nProof. exact magic. Qed.\nPrint Assumptions t.\n")
        assert check(helped).axioms == {"t": frozenset({"magic"})}
