"""Validate the whole book offline: build a throw-away copy with a stub of the theme, then read the pages.

    python -m tools.book_check

MyST's strict mode lets several faults through (an embed of a missing cell, a link to a missing page), so the
built pages are scanned as well. Prints what is wrong and where; exit status 1 if anything is.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from clustr_core.storage.files import home

NOT_THE_BOOK = (".*", "_build", "runs", "data", "tests", "node_modules", "__pycache__", "*.egg-info", "logs")
STUB = "myst: v1\nkind: site\ntitle: stub\nversion: 1.0.0\noptions: []\nparts: []\n"
COMPLAINT = re.compile(r"^\s*(?:- )?[⛔⚠]")
SCHEME = re.compile(r"^[a-z][a-z0-9+.-]*:", re.I)
LEFT_OVER = {
    "mystDirective": "directive",
    "mystRole": "role",
    "include": "include",
    "embed": "embed",
    "_lift": "embed",
}
ELEMENT = re.compile(r"^<.*>$", re.S)

Node = dict[str, Any]


def check(root: Path) -> list[str]:
    """Everything that is wrong with the book at ``root``, as "page: complaint"; empty when it is sound."""
    with tempfile.TemporaryDirectory(prefix="clustr-book-") as scratch:
        copy = Path(scratch, "book")
        shutil.copytree(root, copy, ignore=shutil.ignore_patterns(*NOT_THE_BOOK))
        write_stub(copy)
        complaints = _build(copy)
        pages = sorted((copy / "_build/site/content").glob("*.json"))
        if not pages:
            return [*complaints, "no page was built"]
        return complaints + [fault for page in pages for fault in page_faults(page, copy / "_build/site/public")]


def write_stub(copy: Path) -> None:
    """A theme without files, so that the engine downloads none."""
    stub = copy / "_build/templates/site/myst/book-theme/template.yml"
    stub.parent.mkdir(parents=True)
    stub.write_text(STUB, encoding="utf-8")


def run_engine(copy: Path, *options: str, kind: str = "site") -> subprocess.CompletedProcess[str]:
    """Let the book's engine build a copy, whatever the environment says: the pages' "site", or their "html"."""
    command = [sys.executable, "-m", "jupyter_book", "build", f"--{kind}", "--ci", *options]
    environment = {k: v for k, v in os.environ.items() if k not in ("BASE_URL", "HOST", "CLUSTR_HOME")}
    environment |= {"NO_COLOR": "1", "FORCE_COLOR": "0"}
    return subprocess.run(
        command, cwd=copy, env=environment, capture_output=True, encoding="utf-8", timeout=600, check=False
    )


def _build(copy: Path) -> list[str]:
    done = run_engine(copy, "--strict")
    lines = (done.stderr + "\n" + done.stdout).splitlines()
    # The summary at the end repeats the faults with a dash; the lines above it say where.
    complaints = [line.strip() for line in lines if COMPLAINT.match(line) and not line.strip().startswith("-")]
    if done.returncode and not complaints:
        return [f"jupyter-book exited with status {done.returncode}: {lines[-5:]}"]
    return [line.replace(f"{copy}", ".") for line in complaints]


def page_faults(page: Path, public: Path) -> list[str]:
    """Faults in one built page that the build itself does not report."""
    content = json.loads(page.read_text(encoding="utf-8"))
    where = content.get("location", page.name).lstrip("/")
    return [f"{where}: {fault}" for node in walk(content["mdast"]) for fault in _faults(node, public)]


def walk(node: Node) -> Iterator[Node]:
    """A node of the engine's tree and all below it, in the order of the page."""
    yield node
    for child in node.get("children") or []:
        yield from walk(child)


def _faults(node: Node, public: Path) -> Iterator[str]:
    kind = node.get("type", "")
    name = node.get("label") or node.get("name") or node.get("urlSource") or node.get("file") or ""
    if kind in LEFT_OVER and not node.get("children"):
        target = (node.get("source") or {}).get("label") or name
        yield f"unresolved {LEFT_OVER[kind]}: {target!r} does not exist"
    elif kind == "crossReference":
        yield from _reference_faults(node, name)
    elif kind == "cite" and node.get("error"):
        yield f"citation {name!r} is not in references.bib"
    elif kind == "link" and _is_dangling(node):
        yield f"broken local link: {name or node.get('url')!r} is not a page of the book, nor a file"
    elif kind == "image":
        yield from _image_faults(node, public)
    elif kind == "container" and node.get("kind") in ("figure", "table"):
        yield from _container_faults(node)
    elif node.get("error"):
        yield f"{kind}: {node.get('message') or node['error']}"


def _reference_faults(node: Node, name: str) -> Iterator[str]:
    if not node.get("resolved"):
        yield f"unresolved reference: {name!r} is not a label of the book"
    elif str(node.get("kind", "")).startswith("block"):
        yield f"reference to the cell {name!r}: refer to the figure's :name: instead, which has a number"


def _is_dangling(node: Node) -> bool:
    known = node.get("internal") or node.get("static")
    return not known and not SCHEME.match(node.get("url", ""))


def _image_faults(node: Node, public: Path) -> Iterator[str]:
    url = node.get("url", "")
    if url.startswith("/") and not (public / url.lstrip("/")).exists():
        yield f"missing image: {node.get('urlSource', url)!r}"
    if not node.get("alt") or (node.get("data") or {}).get("altTextIsAutoGenerated"):
        yield f"image {node.get('urlSource', url)!r} has no alt text"


def _container_faults(node: Node) -> Iterator[str]:
    inner = list(walk(node))
    name = node.get("label") or (node.get("source") or {}).get("label") or "without a name"
    if not node.get("label"):
        yield f"{node['kind']} {name!r} has no :name:, so no number and nothing to refer to"
    if not any(child.get("type") == "caption" for child in inner):
        yield f"{node['kind']} {name!r} has no caption"
    media = [child for child in inner if child.get("type") in ("image", "output", "table", "iframe", "anywidget")]
    if not media:
        yield f"{node['kind']} {name!r} shows nothing: its cell does not exist or has no output"
    if any(child.get("visibility") == "remove" for child in inner):
        yield f"{node['kind']} {name!r} is hidden: tag its cell hide-cell, not remove-output"
    if node["kind"] == "figure":
        yield from (f"figure {name!r} {fault}" for child in media for fault in _alt_faults(child))


def _alt_faults(output: Node) -> Iterator[str]:
    data = (output.get("jupyter_data") or {}).get("data") or {}
    alt = str((data.get("text/plain") or {}).get("content", ""))
    if any(mime.startswith("image/") for mime in data) and (not alt.strip() or ELEMENT.match(alt.strip())):
        yield f"has no alt text (got {alt!r})"


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; prints every fault."""
    parser = argparse.ArgumentParser(prog="python -m tools.book_check", description="Validate the whole book offline.")
    parser.add_argument("root", type=Path, nargs="?", help="the book's root (found from here)")
    root = (parser.parse_args(arguments).root or home()).resolve()
    faults = list(dict.fromkeys(check(root)))
    print(
        "\n".join(faults) if faults else "The book is sound: every reference, embed, link, image and citation resolves."
    )
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
