"""Set the whole book as one PDF, offline: `_build/pdf/clustr-book.pdf`.

    python -m tools.pdf

The pages are those of the site, with its numbers: `tools.typeset` writes them in Typst, `site/typst/book.typ` says how
they look. Cells that the site folds are left out, and where the site has a widget its static figure stands.
"""

import argparse
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml

from clustr_core.storage.files import home
from tools.telling import told
from tools.typeset import Page, Writer, build, compile_pdf, public, string, targets, text

NAME = "clustr-book"


def make(root: Path, folder: Path, files: Iterable[str] | None = None) -> tuple[Path, Writer]:
    """Set the book, or some of its pages, and return the PDF and what was written.

    Args:
        root: the book's root.
        folder: where the PDF goes.
        files: pages of the table of contents; None for all. References to other pages must not occur.
    Raises:
        RuntimeError: if the engine or Typst refuses a page.
    """
    settings = yaml.safe_load((root / "myst.yml").read_text(encoding="utf-8"))["project"]
    with tempfile.TemporaryDirectory(prefix="clustr-pdf-") as scratch:
        copy = Path(scratch, "book")
        pages = build(root, copy, files or listed(settings))
        writer = Writer(root, public(copy), targets(pages))
        source = document(settings, edition(root), pages, writer)
        return compile_pdf(root, source, writer, folder, NAME), writer


def listed(settings: dict[str, Any]) -> Iterator[str]:
    """The files of the table of contents."""
    yield from (entry["file"] for entry in settings["toc"])


def edition(root: Path) -> str:
    """The book's version, as CITATION.cff has it."""
    return str(yaml.safe_load((root / "CITATION.cff").read_text(encoding="utf-8"))["version"])


def document(settings: dict[str, Any], version: str, pages: Sequence[Page], writer: Writer) -> str:
    """The whole text in Typst."""
    authors = ", ".join(each["name"]["literal"] for each in settings["authors"])
    licenses = f"Text: {settings['license']['content']}; code: {settings['license']['code']}"
    about = ", ".join(
        f"{name}: {value}"
        for name, value in {
            "title": string(settings["title"]),
            "subtitle": string(settings["subtitle"]),
            "authors": string(authors),
            "version": string(version),
            "license": string(licenses),
            "abstract": f"[{text(' '.join(settings['description'].split()))}]",
        }.items()
    )
    written = "\n".join(writer.page(page) for page in pages)
    works = '\n#works("references.bib")\n' if writer.cited else ""
    return f'#import "book.typ": *\n#show: book.with({about})\n\n{written}{works}'


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; prints where the PDF is, and what has no place in it."""
    parser = argparse.ArgumentParser(prog="python -m tools.pdf", description="Set the whole book as one PDF.")
    parser.add_argument("--output", type=Path, help="its folder (_build/pdf)")
    given = parser.parse_args(arguments)
    root = home()
    path, writer = make(root, given.output or root / "_build/pdf")
    for what in sorted(set(writer.left_out)):
        print(f"not in print: {what}")
    print(path)
    return 0


if __name__ == "__main__":
    sys.exit(told(main))
