"""Nothing is written but whole, and what killed writers leave behind does not stay."""

import ast
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from clustr_core.storage import files
from clustr_core.storage.files import HOST, expanded, home, write_json

ROOT = Path(__file__).parents[2]
KILLED = """
import os, signal, sys
from pathlib import Path
from clustr_core.storage.files import written_whole
with written_whole(Path(sys.argv[1])) as temporary:
    temporary.write_text("half", encoding="utf-8")
    os.kill(os.getpid(), signal.SIGKILL)
"""


def kill_in(path: Path) -> Path:
    """The temporary that a killed writer of ``path`` left."""
    before = set(path.parent.iterdir())
    subprocess.run([sys.executable, "-c", KILLED, str(path)], check=False, cwd=ROOT)
    (left,) = set(path.parent.iterdir()) - before
    return left


@pytest.mark.parametrize("killed", ["a[b]*.txt", "never written again\n.csv"])
def test_what_a_killed_writer_left_goes_at_the_next_write_of_any_file_in_the_folder(tmp_path, killed):
    left = kill_in(tmp_path / killed)
    assert left.read_text(encoding="utf-8") == "half"
    write_json(tmp_path / "a[b]*.txt", {})
    assert set(tmp_path.iterdir()) == {tmp_path / "a[b]*.txt"}


def test_what_a_living_writer_or_another_machine_writes_stays_until_it_is_abandoned(tmp_path):
    path = tmp_path / "a.txt"
    dead = kill_in(path).name
    alive = tmp_path / f".a.txt.{HOST}-{os.getppid()}.tmp"
    foreign = tmp_path / dead.replace(HOST, "elsewhere")
    not_ours = tmp_path / ".a.txt.swp"
    for each in (alive, foreign, not_ours):
        each.touch()
    write_json(path, {})
    assert set(tmp_path.iterdir()) == {path, alive, foreign, not_ours}
    for each in (alive, foreign, not_ours):
        os.utime(each, (0, time.time() - files.ABANDONED - 60))
    write_json(path, {})
    assert set(tmp_path.iterdir()) == {path, not_ours}


# calls that write a file, by their last name
WRITERS = {
    "write_text", "write_bytes", "to_csv", "to_json", "save_file", "savefig", "copyfile", "copy2", "copytree", "dump",
    "save", "savez", "write_notebook",
}  # fmt: skip
# a folder of one's own, which goes with its writer's block
SCRATCH = "TemporaryDirectory"
NOT_A_FILE_THAT_STAYS = {
    ("clustr_core/models/official.py", "save"): "into a buffer in memory",
    ("clustr_core/drawing/verdict.py", "savefig"): "into a buffer in memory",
    ("clustr_core/storage/tables.py", "to_csv"): "into a text in memory",
    ("clustr_core/storage/gate.py", "open"): "a device or a FIFO, which takes what is whole already",
    ("clustr_core/storage/provenance.py", "open"): "a line to what a run gathers, for its own end",
    ("tools/book_check.py", "write_text"): "into the throw-away copy of the book",
    ("tools/page_test.py", "copytree"): "into the throw-away copy of the book",
    ("tools/typeset.py", "copytree"): "into the throw-away copy of the book",
    ("tools/typeset.py", "write_text"): "into the throw-away copy of the book",
    ("tools/recomputed.py", "copytree"): "the published weights, into a scratch home that the caller opened",
}


def writes_outside(path: Path) -> list[tuple[str, str]]:
    """Each writing call that stands in no block of `written_whole`, and in no folder of its own."""
    found = []

    def visit(node: ast.AST, safe: bool) -> None:
        if isinstance(node, ast.With):
            opened = [ast.unparse(item.context_expr) for item in node.items]
            safe = safe or any("written_whole(" in each or SCRATCH in each for each in opened)
        if isinstance(node, ast.Call) and not safe:
            name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            mode = ast.unparse(node)
            if name in WRITERS or (name == "open" and any(f"'{kind}" in mode for kind in ("w", "a", "x"))):
                found.append((str(path.relative_to(ROOT)), name))
        for child in ast.iter_child_nodes(node):
            visit(child, safe)

    visit(ast.parse(path.read_text(encoding="utf-8")), safe=False)
    return found


def test_whatever_the_package_and_its_tools_write_is_written_whole():
    sources = [*(ROOT / "clustr_core").rglob("*.py"), *(ROOT / "tools").glob("*.py")]
    assert len(sources) > 60
    found = {each for source in sources for each in writes_outside(source)}
    assert found - set(NOT_A_FILE_THAT_STAYS) == set()


def test_the_scan_sees_what_is_not_written_whole(tmp_path, monkeypatch):
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    source = tmp_path / "a.py"
    source.write_text(
        "path.write_text(x)\nopen(path, 'wb')\nopen(path)\nwith written_whole(path) as t:\n    save_file(x, t)\n"
        "with tempfile.TemporaryDirectory() as t:\n    copyfile(a, t)\n"
        "with suppress(OSError):\n    table.to_csv(path)\n",
        encoding="utf-8",
    )
    assert [name for _, name in writes_outside(source)] == ["write_text", "open", "to_csv"]


def test_a_home_that_there_is_not_is_named(monkeypatch):
    assert expanded("~/x") == Path.home() / "x"
    with pytest.raises(ValueError, match="~no-such-user/x: expected the home of a user of this machine"):
        expanded("~no-such-user/x")
    monkeypatch.setenv("CLUSTR_HOME", "~no-such-user/x")
    with pytest.raises(ValueError, match="~no-such-user/x: expected the home"):
        home()
