"""Read chapters: sources, parameters, figures, exercises, and the hashes of what a run was made from."""

import ast
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jupytext
import nbformat
from nbformat import NotebookNode

from clustr_core.measuring.profile import Profile
from clustr_core.storage.files import digest
from clustr_core.storage.gate import MB, TABLE_LIMIT, brief, read_bytes, read_text, shortened
from clustr_core.storage.provenance import names_in

FIGURE_LABEL = re.compile(r"fig-[a-z0-9]+(?:-[a-z0-9]+)*")
_DIRECTIVE = re.compile(
    r"^(?P<fence>`{3,}|:{3,})\{figure\}[ \t]*(?P<target>\S*)[ \t]*\n(?P<body>.*?)^(?P=fence)[ \t]*$",
    re.M | re.S,
)
# of a chapter's source or a figure's file, and of an executed chapter
SOURCE_LIMIT, NOTEBOOK_LIMIT = 64 * MB, 256 * MB
# what a chapter draws: files of figures and widgets in its profile's folder
DRAWN = re.compile(r"[\w-]+/[\w-]+\.[a-z]+")
# what a chapter may read beside its profile's rows
PUBLISHED = re.compile(r"results/(published/[\w-]+/(partial/)?([\w-]+\.csv)?|claims\.csv)")
_OPTION = re.compile(r":(?P<key>[\w-]+):[ \t]*(?P<value>.*)")
_EXERCISE = re.compile(
    r"^(?P<fence>:{3,})\{(?P<kind>exercise|solution)\}[ \t]*(?P<argument>.*?)[ \t]*\n(?P<body>.*?)^(?P=fence)[ \t]*$",
    re.M | re.S,
)
_EMBED = re.compile(r"^`{3,}\{embed\}[ \t]*#(\S+)", re.M)


@dataclass(frozen=True)
class Embed:
    """One ``{figure}`` directive: what it shows, what it is called, and its words."""

    target: str
    name: str
    alt: str
    kind: str
    caption: str


@dataclass(frozen=True)
class Block:
    """One ``{exercise}`` or ``{solution}`` of the prose: its title or its exercise, and the cells that it embeds."""

    kind: str
    argument: str
    label: str
    css_class: str
    embedded: tuple[str, ...]
    body: str


def sources(root: Path) -> list[Path]:
    """The chapters' sources, in the order of their numbers."""
    return sorted((root / "notebooks").glob("[0-9][0-9]-*.md"))


def read_source(path: Path) -> NotebookNode:
    """A chapter's MyST source as a notebook without outputs, metadata as written.

    Raises:
        ValueError: if it is none; the chapter is named.
    """
    # some editors begin a file with a mark of its encoding
    text = read_text(path, limit=SOURCE_LIMIT).removeprefix("\ufeff")
    try:
        notebook = jupytext.reads(text, fmt="md:myst")
        notebook.metadata.get("jupytext", {}).pop("default_lexer", None)
        nbformat.validate(notebook)
    except Exception as error:  # of many kinds, for what is no chapter
        said = shortened(" ".join(f"{type(error).__name__}: {error}".split()), 200)
        raise ValueError(f"{path.name}: expected a chapter in MyST Markdown, got another file ({said})") from error
    try:
        for cell in notebook.cells:
            _check_names(cell.metadata)
        declared_parameters(notebook)
    except ValueError as error:
        raise ValueError(f"{path.name}: {error}") from error
    return notebook


def _check_names(metadata: Mapping[str, Any]) -> None:
    """Raises a ValueError if the label of a cell or one of its tags is no text."""
    if not isinstance(label := metadata.get("label", ""), str):
        raise ValueError(f"label: expected a name such as fig-radii, got {brief(label)}")
    if odd := [tag for tag in metadata.get("tags", []) if not isinstance(tag, str)]:
        raise ValueError(f"tags: expected names, got {brief(odd[0])}")


def has_tag(cell: NotebookNode, tag: str) -> bool:
    """Whether the cell carries the tag."""
    return tag in cell.metadata.get("tags", [])


def declared_parameters(notebook: NotebookNode) -> dict[str, Any]:
    """Names and defaults in the cell tagged "parameters", none if there is no such cell.

    Raises:
        ValueError: if a line of that cell is not ``name = literal``.
    """
    cells = [cell for cell in notebook.cells if cell.cell_type == "code" and has_tag(cell, "parameters")]
    return dict(pair for cell in cells for pair in _assignments(cell.source))


def _assignments(code: str) -> Iterator[tuple[str, Any]]:
    try:
        statements = ast.parse(code).body
    except SyntaxError as error:
        raise ValueError(f"parameters cell: expected Python, got {brief(error.text or error.msg)}") from error
    for statement in statements:
        match statement:
            case ast.Assign(targets=[ast.Name(id=name)], value=value):
                pass
            case ast.AnnAssign(target=ast.Name(id=name), value=ast.expr() as value):
                pass
            case _:
                raise ValueError(f"parameters cell: expected name = literal, got {ast.unparse(statement)!r}")
        try:
            yield name, ast.literal_eval(value)
        except ValueError as error:
            raise ValueError(f"parameters cell: expected a literal for {name}, got {ast.unparse(value)!r}") from error


# kinds of tables that a chapter's code names where it reads them
NAMED_WHERE_READ = {"diagnostics": "diagnostics", "ablations": "ablation"}
# code with one of these may go through all methods; other code reads the rows of those that it names
ALL_METHODS = re.compile(r"read_study|studies_|published|\.ordinary|(\.lipschitz|\brecipes)\b(?!\[| import)")


def uses_tables(notebook: NotebookNode) -> bool:
    """Whether the chapter reads the trained methods: it declares a parameter called profile."""
    return "profile" in declared_parameters(notebook)


def labels(notebook: NotebookNode) -> list[str]:
    """Labels of code cells, in order."""
    return [cell.metadata["label"] for cell in notebook.cells if cell.cell_type == "code" and "label" in cell.metadata]


def figure_labels(notebook: NotebookNode) -> list[str]:
    """Labels of the cells that draw a figure."""
    return [label for label in labels(notebook) if label.startswith("fig-")]


def embeds(notebook: NotebookNode) -> list[Embed]:
    """Every ``{figure}`` in the chapter's prose."""
    prose = [cell.source for cell in notebook.cells if cell.cell_type == "markdown"]
    return [_embed(match) for text in prose for match in _DIRECTIVE.finditer(text)]


def _embed(match: re.Match[str]) -> Embed:
    options, text = _options(match["body"])
    return Embed(
        target=match["target"].removeprefix("#"),
        name=options.get("name", options.get("label", "")),
        alt=options.get("alt", ""),
        kind=options.get("kind", "figure"),
        caption=text,
    )


def _options(body: str) -> tuple[dict[str, str], str]:
    """The options at the head of a directive's body, and what follows them."""
    lines, options = body.splitlines(), {}
    while lines and (option := _OPTION.fullmatch(lines[0].strip())):
        options[option["key"]] = option["value"].strip()
        lines.pop(0)
    return options, "\n".join(lines).strip()


def is_solution(cell: NotebookNode) -> bool:
    """Whether a code cell computes the solution of an exercise."""
    return cell.cell_type == "code" and cell.metadata.get("label", "").startswith("sol-")


def exercise_parts(notebook: NotebookNode) -> Iterator[Block | NotebookNode]:
    """Exercises, the cells of their solutions, and the solutions, in the order of the page."""
    for cell in notebook.cells:
        if is_solution(cell):
            yield cell
        elif cell.cell_type == "markdown":
            yield from map(_block, _EXERCISE.finditer(cell.source))


def _block(match: re.Match[str]) -> Block:
    options, body = _options(match["body"])
    return Block(
        kind=match["kind"],
        argument=match["argument"],
        label=options.get("label", ""),
        css_class=options.get("class", ""),
        embedded=tuple(_EMBED.findall(body)),
        body=body,
    )


def embedded_cells(notebook: NotebookNode) -> list[str]:
    """Labels of the cells that the prose embeds, each as often as it does."""
    return [label for cell in notebook.cells if cell.cell_type == "markdown" for label in _EMBED.findall(cell.source)]


def provenance(root: Path, source: Path, profile: Profile, *, results: str = "results") -> dict[str, Any]:
    """Hashes of what makes a twin stale: its source, its profile, and that profile's rows, under ``results``.

    The package is not among them: a mended docstring makes no picture stale, and a change of behaviour is another
    `TRAINING_VERSION`, other `VERSIONS`, and so other rows. Nor are the rows of the battery, where no code names them,
    or those of methods that are not named, where code names methods one by one. Committed tables that a chapter reads
    beside them, of benchmarks and of other profiles, are noted when it is executed (``published``, see `changed`).

    Args:
        results: the folder of folders of rows: "results" after a run, "results/published" of what is committed.
    """
    name, notebook = profile.name, read_source(source)
    code = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "code")
    everything = bool(ALL_METHODS.search(code))

    def is_read(kind: str, method: str) -> bool:
        return NAMED_WHERE_READ.get(kind, "") in code and (everything or f'"{method}"' in code)

    read = [f"{kind}-{method}.csv" for kind, method in profile.tables if is_read(kind, method)]
    tables = [root / results / name / table for table in sorted(read)] if uses_tables(notebook) else []
    return {
        "profile": {"name": name, "sha256": profile.sha256},
        "source": digest(source.read_bytes()),
        "tables": {path.name: digest(read_bytes(path, limit=TABLE_LIMIT)) for path in tables if path.exists()},
    }


def changed(root: Path, published: Mapping[str, str]) -> list[str]:
    """The tables that an executed chapter has read of which there are others now.

    Raises:
        ValueError: if one is no table that a chapter reads.
    """
    if other := [name for name in published if not PUBLISHED.fullmatch(name)]:
        raise ValueError(f"published: expected tables in results/published, got {brief(other[0])}")
    return [name for name, then in published.items() if then != _digest_now(root, name)]


def _digest_now(root: Path, name: str) -> str | None:
    """The SHA-256 of a file, None if it is not there; of a folder, which a slash ends, of the names of its tables."""
    if name.endswith("/"):
        return digest(names_in(root / name))
    return digest((root / name).read_bytes()) if (root / name).is_file() else None


def outputs_digest(notebook: Mapping[str, Any]) -> str:
    """The SHA-256 of what the cells of a notebook show, as a file holds it."""
    shown = [cell.get("outputs", []) for cell in notebook["cells"]]
    return digest(json.dumps(shown, sort_keys=True).encode("utf-8"))


def is_executed(path: Path) -> bool:
    """Whether a file is a notebook that `tools.execute` has made."""
    try:
        return "clustr" in json.loads(read_text(path, limit=NOTEBOOK_LIMIT))["metadata"]
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        return False


def is_current(root: Path, source: Path, executed: Path, profile: Profile) -> bool:
    """Whether an executed chapter is of its source, its profile, that profile's rows and the committed tables as they
    are now, shows what it showed, and what it drew is there."""
    try:
        notebook = json.loads(read_text(executed, limit=NOTEBOOK_LIMIT))
        said, shown = notebook["metadata"]["clustr"], outputs_digest(notebook)
        drawn = all(
            DRAWN.fullmatch(name) and digest(read_bytes(root / "figures" / name, limit=SOURCE_LIMIT)) == found
            for name, found in said["drawn"].items()
        )
        others = changed(root, said["published"])
        made_from = provenance(root, source, profile)
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return False
    return (
        drawn
        and not others
        and said.get("outputs") == shown
        and "given" not in said
        and all(said.get(key) == value for key, value in made_from.items())
    )
