"""Set the lecture of `site/slides.md`, offline: `_build/slides/clustr-lecture.pdf`, and the same with notes.

    python -m tools.slides

A heading begins a slide; what stands in a ``note`` is for the speaker. `tools.typeset` writes the slides in Typst,
`site/typst/lecture.typ` says how they look. A slide that is too full is an error.
"""

import argparse
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import yaml

from clustr_core.storage.files import home
from tools.telling import told
from tools.typeset import Node, Page, Writer, build, compile_pdf, public, string, targets

SOURCE = "site/slides.md"
NAME = "clustr-lecture"


class Slide(NamedTuple):
    """Title, body and notes of a slide in Typst, and whether a picture is on it."""

    title: str
    body: str
    notes: str
    pictured: bool

    def written(self) -> str:
        """The slide as an argument of the template."""
        return f"([{self.title}], [{self.body}], [{self.notes}], {str(self.pictured).lower()})"


@dataclass
class SlideWriter(Writer):
    """Writes the slides of a page; what is for the speaker is kept apart."""

    notes: list[str] = field(default_factory=list)

    def _admonition(self, node: Node) -> str:
        if node.get("kind") != "note":
            return super()._admonition(node)
        self.notes.append(self.children({"children": node["children"]}).strip())
        return ""

    def slides(self, page: Page) -> Iterator[Slide]:
        """Each slide, in order.

        Raises:
            ValueError: if something stands before the first heading.
        """
        nodes = [node for block in page.tree["children"] for node in block["children"] if node["type"] != "comment"]
        begins = [at for at, node in enumerate(nodes) if node["type"] == "heading"]
        if begins[:1] != [0]:
            raise ValueError(
                f"{page.location}: expected a heading first, got {nodes[0]['type'] if nodes else 'nothing'}"
            )
        for begin, end in zip(begins, [*begins[1:], len(nodes)], strict=True):
            self.notes.clear()
            inside = nodes[begin + 1 : end]
            body = "".join(map(self.write, inside)).strip()
            pictured = any(node["type"] == "image" for node in inside)
            yield Slide(self.children(nodes[begin]), body, "\n\n".join(self.notes), pictured)


def make(root: Path, folder: Path) -> list[Path]:
    """Set the slides, and the slides with notes, and return both.

    Args:
        root: the book's root.
        folder: where the PDFs go.
    Raises:
        RuntimeError: if the engine or Typst refuses a slide, or one is too full.
    """
    settings = yaml.safe_load((root / "myst.yml").read_text(encoding="utf-8"))["project"]
    authors = ", ".join(each["name"]["literal"] for each in settings["authors"])
    with tempfile.TemporaryDirectory(prefix="clustr-slides-") as scratch:
        copy = Path(scratch, "book")
        pages = build(root, copy, [SOURCE])
        writer = SlideWriter(root, public(copy), targets(pages))
        slides = ",\n".join(slide.written() for slide in writer.slides(pages[0]))
        given = f"title: {string(pages[0].title)}, subtitle: {string(pages[0].subtitle)}, authors: {string(authors)}"
        works = ', works: "references.bib"' if writer.cited else ""
        return [
            compile_pdf(
                root,
                f'#import "lecture.typ": *\n#lecture({given}, notes: {notes}{works}, slides: (\n{slides},\n))\n',
                writer,
                folder,
                name,
            )
            for name, notes in ((NAME, "false"), (f"{NAME}-notes", "true"))
        ]


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; prints where the slides are."""
    parser = argparse.ArgumentParser(prog="python -m tools.slides", description="Set the lecture as PDFs.")
    parser.add_argument("--output", type=Path, help="their folder (_build/slides)")
    given = parser.parse_args(arguments)
    root = home()
    for path in make(root, given.output or root / "_build/slides"):
        print(path)
    return 0


if __name__ == "__main__":
    sys.exit(told(main))
