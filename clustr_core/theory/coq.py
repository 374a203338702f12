"""The machine-checked proof: its statements beside their prose, and a run of the checker where there is one."""

import re
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

from clustr_core.storage.files import home

# Coq's own reals rest on the first three; its lemmas on exp and ln on the fourth as well
AXIOMS_OF_THE_REALS = {
    "ClassicalDedekindReals.sig_not_dec",
    "ClassicalDedekindReals.sig_forall_dec",
    "FunctionalExtensionality.functional_extensionality_dep",
    "Classical_Prop.classic",
}


@dataclass(frozen=True)
class Statement:
    """A theorem as it stands in the proof: its name, the prose above it, and the Coq text of the statement."""

    name: str
    prose: str
    text: str


@dataclass(frozen=True)
class Check:
    """What the checker said: the axioms that each named group of theorems rests on, and the checker's version."""

    version: str
    axioms: dict[str, frozenset[str]]


def proof_file() -> Path:
    """proofs/Certificate.v in the book's root."""
    return home() / "proofs" / "Certificate.v"


def statements(source: str) -> dict[str, Statement]:
    """Every theorem of a Coq text that has prose above it, by name."""
    pattern = r"\(\*\* ((?:(?!\*\)).)*?) ?\*\)\s*Theorem (\w+)\s*:(.*?)\.\s*\nProof\."
    found = re.findall(pattern, source, flags=re.DOTALL)
    return {name: Statement(name, re.sub(r"\s+", " ", prose), text.strip()) for prose, name, text in found}


def check(path: Path) -> Check | None:
    """Compile a proof with `coqc`, in a folder of its own; None where there is no `coqc`.

    Raises:
        ValueError: if the proof does not compile, with what the checker said.
    """
    coqc = shutil.which("coqc")
    if coqc is None:
        return None
    printed = subprocess.run([coqc, "--print-version"], capture_output=True, encoding="utf-8", check=True)
    version = printed.stdout.split()[0]
    source = path.read_text(encoding="utf-8")
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / path.name
        copy.write_text(source, encoding="utf-8")
        done = subprocess.run([coqc, copy.name], cwd=folder, capture_output=True, encoding="utf-8", check=False)
    if done.returncode:
        raise ValueError(f"{path.name}: expected a proof that coqc accepts, got {done.stderr.strip() or done.stdout}")
    groups = re.findall(r"^Print Assumptions (\w+)\.", source, flags=re.MULTILINE)
    answers = re.split(r"^(?:Axioms:|Closed under the global context)\s*$", done.stdout, flags=re.MULTILINE)[1:]
    names = [frozenset(re.findall(r"^(\S+)\s*(?::|$)", answer, flags=re.MULTILINE)) for answer in answers]
    return Check(version, dict(zip(groups, names, strict=True)))
