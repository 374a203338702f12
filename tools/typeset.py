"""Pages as they are built for the site, written in Typst and set as a PDF, offline: what `pdf` and `slides` share.

The book's engine resolves references, numbers, embeds and citations; what it hands to its site (one JSON file a page)
is written here in Typst, in the words of a template of `site/typst/`, and compiled by the wheel `typst`. Nothing is
downloaded: the letters are those that lie in that wheel and in Matplotlib.
"""

import ast
import json
import re
import shutil
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path

import yaml

from clustr_core.storage.files import write_string, written_whole
from tools.book_check import NOT_THE_BOOK, Node, run_engine, walk, write_stub
from tools.typst_math import to_typst

TEMPLATES = Path("site/typst")
# longer words may break behind these
_BREAKABLE = re.compile(r"[/._]")
_LANGUAGES = {"ipython3": "python", "ipython": "python"}
# of a notebook's cell: shown folded on the site, left out in print
_FOLDED = ("hide", "remove")
_IMPORTS = {ast.Import, ast.ImportFrom}
_NO_PROSE = ("captionNumber", "comment", "admonitionTitle", "cardTitle")


class _Table(HTMLParser):
    """The cells of a table in HTML; a cell that spans all columns is a row of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[list[str]] = []
        self.inside = False

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == "tr":
            self.rows.append([])
        elif tag in ("th", "td"):
            self.rows[-1].append("")
            self.inside = True

    def handle_endtag(self, tag: str) -> None:
        if tag in ("th", "td"):
            self.inside = False

    def handle_data(self, data: str) -> None:
        if self.inside:
            self.rows[-1][-1] += data


@dataclass(frozen=True)
class Page:
    """One page as the engine built it."""

    slug: str
    location: str
    title: str
    subtitle: str
    number: str
    tree: Node


@dataclass
class Writer:
    """Writes pages in Typst.

    Args:
        root: the book's root, where the figures lie.
        public: the folder of the images that the engine copied.
        targets: what can be linked to: names of pages and of labels.
        images: filled with the files that the text shows, by the name under which it shows them.
        cited: filled with the keys of the works that are cited.
        left_out: filled with what has no place in print: widgets, and links to files of the repository.
    """

    root: Path
    public: Path
    targets: frozenset[str]
    images: dict[str, Path] = field(default_factory=dict)
    cited: set[str] = field(default_factory=set)
    left_out: list[str] = field(default_factory=list)

    def page(self, page: Page) -> str:
        """A page with its title."""
        body = self.children(page.tree)
        return f"#chapter([{text(page.title)}], number: {string(page.number)})#anchor({string(page.slug)})\n\n{body}\n"

    def children(self, node: Node) -> str:
        """What stands in a node."""
        return "".join(self.write(child) for child in node.get("children") or [])

    def content(self, node: Node) -> str:
        """What stands in a node, as an argument."""
        return f"[{self.children(node).strip()}]"

    def write(self, node: Node) -> str:
        """A node of the engine's tree.

        Raises:
            ValueError: for a kind of node that has no form in print yet.
        """
        kind = node["type"]
        method: Callable[[Node], str] | None = getattr(self, f"_{kind}", None)
        if kind in _NO_PROSE:
            return ""
        if method is None:
            raise ValueError(f"a node {kind!r}: expected one that tools/typeset.py can write, got {list(node)}")
        return method(node)

    def _root(self, node: Node) -> str:
        return self.children(node)

    _include = _root

    def _block(self, node: Node) -> str:
        if node.get("visibility") in _FOLDED:
            return ""
        return self.children(node) + "\n"

    def _text(self, node: Node) -> str:
        return text(re.sub(r"\s+", " ", node["value"]) if node["value"] != "\u00a0" else "\u00a0")

    def _paragraph(self, node: Node) -> str:
        inside = self.children(node).strip()
        leads = words(node).rstrip().endswith(":")
        return f"\n#leading-to[{inside}]\n\n" if leads else f"\n{inside}\n\n"

    def _heading(self, node: Node) -> str:
        anchor = self._anchor(node)
        return f"\n#section({node['depth']}, {self.content(node)}){anchor}\n\n"

    def _anchor(self, node: Node) -> str:
        name = node.get("identifier")
        return f"#anchor({string(name)})" if name in self.targets and not node.get("implicit") else ""

    def _emphasis(self, node: Node) -> str:
        return f"#emph{self.content_kept(node)}"

    def _strong(self, node: Node) -> str:
        return f"#strong{self.content_kept(node)}"

    def content_kept(self, node: Node) -> str:
        """What stands in a node, as an argument, spaces at its ends and all."""
        return f"[{self.children(node)}]"

    def _abbreviation(self, node: Node) -> str:
        return self.children(node)

    def _inlineCode(self, node: Node) -> str:
        return f"#raw({string(node['value'])});"

    def _inlineMath(self, node: Node) -> str:
        return f"${to_typst(node['value'])}$"

    def _math(self, node: Node) -> str:
        number = string(str(node.get("enumerator") or ""))
        return f"\n#equation($ {to_typst(node['value'])} $, number: {number}){self._anchor(node)}\n\n"

    def _link(self, node: Node) -> str:
        inside, url = self.children(node), node["url"]
        name = url.partition("#")[2] or url.strip("/") or "index"
        if node.get("internal") and name in self.targets:
            return f"#within({string(name)})[{inside}]"
        if re.match(r"https?://", url):
            return f"#link({string(url)})[{inside}]"
        self.left_out.append(f"a link to {node.get('urlSource', url)}")
        return inside

    def _crossReference(self, node: Node) -> str:
        name = node["identifier"]
        if name not in self.targets:
            raise ValueError(f"a reference to {name!r}: expected a label of the pages that are set, got none")
        return f"#within({string(name)})[{self.children(node)}]"

    def _citeGroup(self, node: Node) -> str:
        return "".join(self._cite(child) for child in node["children"])

    def _cite(self, node: Node) -> str:
        self.cited.add(node["label"])
        form = ', form: "prose"' * (node.get("kind") == "narrative")
        return f"#cite(label({string(node['label'])}){form});"

    def _list(self, node: Node) -> str:
        items = ", ".join(self.content(item) for item in node["children"])
        start = f"start: {node.get('start') or 1}, " if node.get("ordered") else ""
        return f"\n#{'enum' if node.get('ordered') else 'list'}({start}{items})\n\n"

    def _definitionList(self, node: Node) -> str:
        parts = [
            f"\n#definition({self.content(child)}) " if child["type"] == "definitionTerm" else self.children(child)
            for child in node["children"]
        ]
        return "\n" + "".join(parts) + "\n\n"

    def _code(self, node: Node) -> str:
        if node.get("visibility") in _FOLDED or not node["value"].strip():
            return ""
        code = _without_imports(node["value"]) if node.get("executable") else node["value"]
        if code != node["value"]:
            self.left_out.append("imports")
        if not code.strip():
            return ""
        language = _LANGUAGES.get(node.get("lang") or "", node.get("lang") or "")
        return f"\n#code({string(code)}, {string(language)})\n\n"

    def _admonition(self, node: Node) -> str:
        return f"\n#remark({self._title(node)}, {self.content(node)})\n\n"

    def _proof(self, node: Node) -> str:
        kind, number = string(node["kind"]), string(str(node.get("enumerator") or ""))
        return f"\n#proven({kind}, {number}, {self._title(node)}, {self.content(node)}){self._anchor(node)}\n\n"

    def _exercise(self, node: Node) -> str:
        number = string(str(node.get("enumerator") or ""))
        return f'\n#proven("exercise", {number}, {self._title(node)}, {self.content(node)}){self._anchor(node)}\n\n'

    def _solution(self, node: Node) -> str:
        return f"\n#remark({self._title(node)}, {self.content(node)}){self._anchor(node)}\n\n"

    def _embed(self, node: Node) -> str:
        return self.children(node)

    def _span(self, node: Node) -> str:
        return self.children(node)

    def _superscript(self, node: Node) -> str:
        return f"#super({self.content(node)});"

    def _details(self, node: Node) -> str:
        if node.get("class") != "made":
            raise ValueError(f"a fold {words(node)[:40]!r}: expected one of site/plugin.mjs, which print leaves out")
        self.left_out.append("where a figure or a page comes from")
        return ""

    def _title(self, node: Node) -> str:
        found = [child for child in node["children"] if child["type"] in ("admonitionTitle", "cardTitle")]
        return self.content(found[0]) if found else "none"

    def _grid(self, node: Node) -> str:
        return self.children(node)

    def _card(self, node: Node) -> str:
        return f"\n#card({self._title(node)}, {self.content(node)})\n\n"

    def _anywidget(self, node: Node) -> str:
        self.left_out.append(f"the widget {re.sub(r'-[0-9a-f]{32}', '', Path(node['esm']).stem)}")
        return "" if (node.get("model") or {}).get("replaces") else "\n#elsewhere()\n\n"

    def _thematicBreak(self, node: Node) -> str:
        return "\n#line(length: 100%)\n\n"

    def _break(self, node: Node) -> str:
        return "#linebreak()"

    # pictures and tables

    def _container(self, node: Node) -> str:
        captions = [child for child in node["children"] if child["type"] == "caption"]
        rest = {"children": [child for child in node["children"] if child["type"] != "caption"]}
        caption = self.content(captions[0]) if captions else "none"
        source = (node.get("source") or {}).get("label", "")
        shown = self._published(source, rest) or self.content(rest)
        name = f"{node['kind'].capitalize()} {node['enumerator']}" if node.get("enumerator") else ""
        kind = string(node["kind"])
        return f"\n#shown({kind}, {string(name)}, {shown}, {caption}){self._anchor(node)}\n\n"

    def _published(self, label: str, inside: Node) -> str:
        """The drawing of a figure that is published in lines instead of points, if it is."""
        path = self.root / f"figures/published/quick/{label}.svg"
        if not label or not path.exists():
            return ""
        return self._picture(path, next(filter(None, map(_alt, walk(inside))), ""))

    def _picture(self, path: Path, alt: str) -> str:
        self.images[path.name] = path
        return f"picture({string(f'files/{path.name}')}, {string(alt)})"

    def _image(self, node: Node) -> str:
        given = self.public / node["url"].lstrip("/")
        path = given if node["url"].startswith("/") else self.root / node["url"]
        vector = self.root / "figures/published/quick" / Path(node.get("urlSource", "")).with_suffix(".svg").name
        return f"\n#{self._picture(vector if vector.exists() else path, node.get('alt') or '')}\n\n"

    def _outputs(self, node: Node) -> str:
        return "" if node.get("visibility") in _FOLDED else self.children(node)

    def _output(self, node: Node) -> str:
        made = node.get("jupyter_data")
        if not made:
            return self.children(node)
        if made["output_type"] == "stream":
            return _printed(str(made["text"]))
        data = made.get("data") or {}
        if "image/png" in data:
            path = self.public / data["image/png"]["path"].lstrip("/")
            return f"#{self._picture(path, _alt(node))}"
        if "text/html" in data:
            reader = _Table()
            reader.feed(data["text/html"]["content"])
            return table([[text(cell) for cell in row] for row in reader.rows], reader.rows)
        if "text/latex" in data:
            tex = data["text/latex"]["content"].strip("$ ").removeprefix("\\displaystyle")
            return f"\n#equation($ {to_typst(tex)} $)\n\n"
        return _printed(str(data["text/plain"]["content"]))

    def _table(self, node: Node) -> str:
        rows = [row["children"] for row in node["children"]]
        plain = [[words(cell) for cell in row] for row in rows]
        return table([[self.children(cell).strip() for cell in row] for row in rows], plain)


def table(rows: list[list[str]], plain: list[list[str]]) -> str:
    """A table in Typst that fits its column.

    Args:
        rows: the cells in Typst, the header first; a row of one cell spans all columns.
        plain: their words, of which the longest says how narrow a column can be.
    """
    columns = max(map(len, rows))
    full = [row for row in plain if len(row) == columns]
    longest = [max((word for row in full for word in row[at].split()), key=len, default="") for at in range(columns)]
    written = "".join(f"({''.join(f'[{cell}],' for cell in row)})," for row in rows[1:])
    header = "".join(f"[{cell}]," for cell in rows[0])
    narrowest = "".join(f"{string(word)}," for word in longest)
    return f"\n#fitted({columns}, ({header}), ({written}), ({narrowest}))\n\n"


def words(node: Node) -> str:
    """The text of a node; a formula or code counts as it is written."""
    value = node.get("value")
    return re.sub(r"\s+", " ", value) if value is not None else "".join(map(words, node.get("children") or []))


def _without_imports(code: str) -> str:
    """What a cell does after its imports, which a reader of print does not run; nothing if that is calls alone."""
    body = ast.parse(code).body
    imports = [statement for statement in body if type(statement) in _IMPORTS]
    if not imports:
        return code
    if all(isinstance(statement, ast.Expr) for statement in body if statement not in imports):
        return ""
    last = max(statement.end_lineno or statement.lineno for statement in imports)
    return "\n".join(code.splitlines()[last:]).strip("\n")


def _printed(said: str) -> str:
    return f"\n#printed({string(said.rstrip())})\n\n" if said.strip() else ""


def _alt(node: Node) -> str:
    made = (node.get("jupyter_data") or {}).get("data") or {}
    known = made.get("text/plain", {}).get("content", "") if "image/png" in made else node.get("alt")
    return str(known or "")


def string(value: str) -> str:
    """A text as a string of Typst."""
    escaped = value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n").replace("\t", "\\t")
    return f'"{escaped}"'


def text(value: str) -> str:
    """A text as content: letters that mean something to Typst are none here."""
    kept = re.sub(r"\[[^\[\]]*\]", lambda match: match[0].replace(", ", ",\u00a0"), value)
    kept = re.sub(r"(?<=[<>=]) (?=[\d.])|(?<=\d) (?=%)", "\u00a0", kept)
    return f"#{string(kept)};" if kept else ""


def build(root: Path, copy: Path, files: Iterable[str]) -> list[Page]:
    """Let the book's engine build pages in a copy of the book; returns them in the order of ``files``.

    Args:
        root: the book's root.
        copy: the folder of the copy, which must not exist; `public` says where its images are.
        files: the pages, as the table of contents names them.
    Raises:
        RuntimeError: if they could not be built, with the last lines of the engine.
    """
    wanted = list(files)
    shutil.copytree(root, copy, ignore=shutil.ignore_patterns(*NOT_THE_BOOK))
    write_stub(copy)
    settings = yaml.safe_load((copy / "myst.yml").read_text(encoding="utf-8"))
    settings["project"]["toc"] = [{"file": name} for name in wanted]
    (copy / "myst.yml").write_text(yaml.safe_dump(settings, allow_unicode=True), encoding="utf-8")
    done = run_engine(copy)
    built = {page.location: page for page in map(_read, sorted((copy / "_build/site/content").glob("*.json")))}
    missing = [name for name in wanted if f"/{name}" not in built]
    if done.returncode or missing:
        raise RuntimeError(f"pages {missing} could not be built: {(done.stdout + done.stderr)[-2000:]}")
    return [built[f"/{name}"] for name in wanted]


def _read(path: Path) -> Page:
    content = json.loads(path.read_text(encoding="utf-8"))
    matter = content["frontmatter"]
    return Page(
        slug=content["slug"],
        location=content["location"],
        title=matter["title"],
        subtitle=matter.get("subtitle") or "",
        number=str(matter.get("enumerator") or ""),
        tree=content["mdast"],
    )


def public(copy: Path) -> Path:
    """Where the engine put the images of the pages that `build` built."""
    return copy / "_build/site/public"


def targets(pages: Iterable[Page]) -> frozenset[str]:
    """What links of the pages may lead to: the pages, and what has a label of its own."""
    names: set[str] = set()
    for page in pages:
        names.add(page.slug)
        labelled = (node for node in walk(page.tree) if node.get("identifier") and node["type"] in _LABELLED)
        names |= {node["identifier"] for node in labelled if not node.get("implicit")}
    return frozenset(names)


_LABELLED = ("heading", "math", "container", "proof", "exercise", "solution")


def compile_pdf(root: Path, source: str, writer: Writer, folder: Path, name: str) -> Path:
    """Set a text as ``folder/name.pdf``; its source and pictures stay beside it, in ``folder/name``.

    Raises:
        FileExistsError: if that folder is there, and is not of an earlier call.
        RuntimeError: if Typst refuses the text, or warns: of a missing letter, a label that is not there.
    """
    import matplotlib
    import typst

    work = folder / name
    if work.exists() and not (work / f"{name}.typ").is_file():
        raise FileExistsError(f"--output: expected a folder without {name}/, or with an earlier call's, got {folder}")
    work.mkdir(parents=True, exist_ok=True)
    # also of a call that is killed before its text is there
    write_string(work / f"{name}.typ", source)
    shutil.rmtree(work / "files", ignore_errors=True)
    (work / "files").mkdir()
    for template in (root / TEMPLATES).iterdir():
        shutil.copy(template, work / template.name)
    shutil.copy(root / "references.bib", work / "references.bib")
    for shown, path in writer.images.items():
        shutil.copy(path, work / "files" / shown)
    output = folder / f"{name}.pdf"
    options = {"root": work, "font_paths": [Path(matplotlib.get_data_path(), "fonts/ttf")], "ignore_system_fonts": True}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", typst.TypstWarning)
            content = typst.compile(work / f"{name}.typ", format="pdf", **options)
    except (typst.TypstError, typst.TypstWarning) as error:
        raise RuntimeError(f"{work / name}.typ: {error.diagnostic or error.message}") from error
    with written_whole(output) as temporary:
        temporary.write_bytes(content)
    return output
