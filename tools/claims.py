r"""Does each number of the prose come from where it says? Level *claims* of `tools.verify`: seconds, no PyTorch.

A measured number in the prose (a percentage, a decimal, points, times, a duration, "x of y", a quotient such as n/255)
must say where it comes from, in a comment before its paragraph, list, table or directive: `<!-- COMMENT -->`, which no
reader sees wherever the page is shown, or a MyST comment, `% COMMENT`. COMMENT is one of

    cell: NUMBER = EXPRESSION                       as it is printed; once for each time that it is printed, in order
    rows: protocols(PROFILE)                        the table that follows holds these rows of `measuring.study`,
    rows: certificates(PROFILE)                     and no others
    not from a table: NUMBER, NUMBER: WHY           in the text that follows
    constants of this page: NUMBER, NUMBER: WHY     anywhere on the page

EXPRESSION is a TERM, TERM - TERM or TERM / TERM, after `NUMBER * ` if the whole is to be multiplied, and TERM one of

    protocol(PROFILE, METHOD, clean|paper|correct|certified[, low|high])  a column of the summary table, in per cent
    certified(PROFILE, METHOD, RADIUS[, low|high])                        in per cent; radius 0 is clean
    sandwich(PROFILE, METHOD, certified|worst|clean, RADIUS)              on the images of the sandwich, in per cent
    table(PATH, COLUMN, KEY=VALUE, ...)                                   the one row with these values
    mean|median|min|max|sum(PATH, COLUMN, KEY=VALUE, ...)                 of all rows with these values
    count(PATH, KEY=VALUE, ...)                                           how many rows have these values
    claim(KEY=VALUE, ...)                                                 the one row of results/claims.csv

PATH lies under results/published, or, where it begins with figures/, under figures/published; it may hold a `*`.
A RADIUS or VALUE may be a fraction. An argument with a comma or a parenthesis stands in double quotes.
"""

import csv
import html
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd

from clustr_core.measuring.accuracy import best_bound, certified_accuracy
from clustr_core.measuring.profile import Profile, load_profile
from clustr_core.measuring.study import Study, as_far_as_published, certified_lines, protocol_lines, summary
from clustr_core.measuring.versions import MEASUREMENT_OF
from clustr_core.measuring.written import asked_of, differing
from clustr_core.storage.files import digest, home, read_json, seal_of
from clustr_core.storage.gate import MB, TENSORS_LIMIT, brief, read_bytes, read_text
from clustr_core.storage.provenance import check_sidecar, profile_of
from clustr_core.storage.tables import read_table
from clustr_core.training.names import DONE, HISTORY, WEIGHTS

# what a run says of its files
SEALED = {"weights_sha256": WEIGHTS, "history_sha256": HISTORY}
# beside the chapters; not api.md, which tools.api writes from docstrings: their numbers are constants of the code
PAGES = ("index.md", "how-to-read.md", "results.md", "notation.md", "README.md", "site/slides.md")

_NUMBER = r"(?:\d+(?:,\d{3})*(?:\.\d+)?|\.\d+)"
# a quotient is one number, a radius such as 8/255; 1/2 and 2/3 are words
_QUOTIENT = rf"{_NUMBER}(?:/\d{{2,}})?"
# a table of a benchmark that a chapter's code reads
_BENCH = re.compile(r"\bbench\(\"([\w-]+)\"")
_COMMENT = re.compile(
    r"\s*(?:%|<!--) *(?P<kind>cell|rows|not from a table|constants of this page): *(?P<text>.*?) *(?:-->)? *"
)
_TERM = r'(?P<{0}>[a-z]+)\((?P<{0}_arguments>(?:[^()"]|"[^"]*")*)\)'
_CELL = re.compile(
    rf"(?P<number>-?{_NUMBER}) = (?:(?P<factor>[\d.]+) \* )?"
    rf"{_TERM.format('left')}(?: (?P<operator>[-/]) {_TERM.format('right')})?"
)
_LISTED = re.compile(rf"(?P<numbers>-?{_QUOTIENT}(?:, -?{_QUOTIENT})*): *(?P<why>\S.*)")
_ROWS = re.compile(r"(?P<kind>protocols|certificates)\((?P<profile>[\w./-]+)\)")

_FENCE = re.compile(r"(?P<fence>`{3,}|:{3,})\{?(?P<name>[\w-]*)(?P<brace>\}?) *(?P<title>.*)")
# what these directives hold is no prose
_SILENT = ("code-cell", "math", "code", "code-block", "mermaid")
# a role whose content is read as it stands
_TEXT_ROLE = re.compile(r"\{(?:strong|emphasis|abbr|sub|sup|u|del|smallcaps)\}`([^`]+)`")
# an inline tag of HTML, as a browser would hide it
_TAG = re.compile(r"</?(?:b|i|u|em|strong|sub|sup|small|span|mark|font|abbr|nobr)(?:\s[^<>]*)?>", re.I)
# what is no measurement: code, other roles, links, options but the alt text, a list's own numbers, an interval's level
_MASKED = re.compile(
    r"^(?P<inner>`{3,}).*?^(?P=inner)|`[^`]+`|\]\([^)\s]*\)|https?://\S+|^:(?!alt|caption)[\w-]+:.*?$|^\s*\d+\.\s"
    r"|\b95\s%\s(?:\w+\s)?(?:intervals?|bands?)\b",
    re.M | re.S,
)
_TOKEN = re.compile(
    rf"(?<![\w./,])(?<![A-Za-z]-)(?:(?<![\w)\]}}])[-−])?(?P<number>{_QUOTIENT})"
    r"(?!(?!x\b)[\w/]|\.\d|,\d{3})"
)
_MEASURED = re.compile(
    rf"(?:(?:,| and| or| to| ?[-–])\s?{_NUMBER})*(?:\s|\\,|\*|_)*"
    r"(?:\\?%|per\s?cent\b|pp\b|(?:percentage\s)?points?\b|[×x](?!\s*\d|\w)|times\b|-?fold\b"
    r"|(?:[CG]PU\s)?(?:ms|s|seconds?|minutes?|hours?)\b|(?:out\s)?of\s(?:the\s|all\s)?\d)"
)


class Comment(NamedTuple):
    """One comment of the grammar above, and the line that it stands in, from 1."""

    line: int
    kind: str
    text: str


class Token(NamedTuple):
    """A number of the prose, as printed, its line from 1, and whether it must say where it comes from."""

    line: int
    number: str
    measured: bool


class Term(NamedTuple):
    """A function of the published tables."""

    function: str
    arguments: tuple[str, ...]


class Cell(NamedTuple):
    """A printed number, and the expression that it is said to be."""

    number: str
    factor: float
    left: Term
    operator: str
    right: Term | None


@dataclass(frozen=True)
class Block:
    """A paragraph, list, table or directive with the comments before it."""

    comments: tuple[Comment, ...]
    lines: tuple[tuple[int, str], ...]

    def tokens(self) -> list[Token]:
        """The numbers of its text, in order."""
        header = next((line for _, line in self.lines if _in_table(line)), "")
        lines = (_with_units(line, header) if _in_table(line) else line for _, line in self.lines)
        text = "\n".join(html.unescape(_TAG.sub("", line)) for line in lines)
        text = _TEXT_ROLE.sub(lambda match: match[1].rjust(len(match[0])), text)
        text = _MASKED.sub(lambda match: re.sub(r"[^\n]", " ", match[0]), text)
        return [self._token(text, match) for match in _TOKEN.finditer(text)]

    def _token(self, text: str, match: re.Match[str]) -> Token:
        measured = not match["number"].replace(",", "").isdecimal() or _MEASURED.match(text, match.end())
        line = self.lines[text.count("\n", 0, match.start())][0]
        return Token(line, match[0].replace("−", "-"), bool(measured))


def _with_units(row: str, header: str) -> str:
    """A table's row with "%" behind the whole numbers that stand alone in cells whose column is headed by "%"."""
    cells, titles = row.split("|"), header.split("|")
    for place in range(min(len(cells), len(titles))):
        if "%" in titles[place] and "%" not in cells[place] and re.fullmatch(r"\W*\d+\W*", cells[place]):
            cells[place] += "%"
    return "|".join(cells)


def parse_cell(text: str) -> Cell:
    """The number and the expression of a comment "cell".

    Raises:
        ValueError: if it is not of the grammar above.
    """
    if (match := _CELL.fullmatch(text)) is None:
        raise ValueError(f"expected 'cell: NUMBER = EXPRESSION', got {text!r}")
    right = Term(match["right"], _arguments(match["right_arguments"])) if match["right"] else None
    left = Term(match["left"], _arguments(match["left_arguments"]))
    return Cell(match["number"], float(match["factor"] or 1), left, match["operator"] or "", right)


def _arguments(text: str) -> tuple[str, ...]:
    return tuple(each.strip() for each in next(csv.reader([text], skipinitialspace=True), []))


def blocks(page: str) -> Iterator[Block]:
    """The prose of a page in Markdown, block by block; front matter, code and displayed equations are left out."""
    comments, lines, fence, silent = [], [], "", False
    for number, line in _body(page):
        opened = None if fence else _FENCE.match(line)
        if comment := _COMMENT.fullmatch(line):
            if lines and not fence:
                yield Block(tuple(comments), tuple(lines))
                comments, lines = [], []
            comments.append(Comment(number, comment["kind"], comment["text"]))
            continue
        if lines and (opened or not (fence or line.strip())):
            yield Block(tuple(comments), tuple(lines))
            comments, lines = [], []
        if opened:
            fence, silent = opened["fence"], not opened["brace"] or opened["name"] in _SILENT
            if opened["title"] and not silent:
                lines.append((number, opened["title"]))
        elif fence and line.strip() == fence:
            yield Block(tuple(comments), tuple(lines))
            comments, lines, fence, silent = [], [], "", False
        elif (fence or line.strip()) and not silent:
            lines.append((number, line))
    if comments or lines:
        yield Block(tuple(comments), tuple(lines))


def _body(page: str) -> Iterator[tuple[int, str]]:
    lines = page.splitlines()
    begin = lines.index("---", 1) + 1 if lines[:1] == ["---"] and "---" in lines[1:] else 0
    yield from enumerate(lines[begin:], start=begin + 1)


def faults(root: Path) -> list[str]:
    """What is wrong with the published tables, and with the numbers of the prose: "file:line: what is wrong"."""
    for cached in (_table, _study, _columns, _best):
        cached.cache_clear()
    return [*sidecar_faults(root), *(fault for page in pages(root) for fault in page_faults(root, page))]


def pages(root: Path) -> list[Path]:
    """The pages whose numbers are held to the tables."""
    return [*(root / name for name in PAGES), *sorted((root / "notebooks").glob("[0-9][0-9]-*.md"))]


def sidecar_faults(root: Path) -> Iterator[str]:
    """Published tables that are not what their sidecars describe, and tables or sidecars that stand alone."""
    published = (root / "results/published", root / "figures/published")
    for table in sorted(path for folder in published for path in folder.rglob("*.csv")):
        if table.parent.parent.name != "weights":
            try:
                made = check_sidecar(table)["made"]
            except (ValueError, OSError) as error:
                yield str(error).replace(f"{root}/", "")
                continue
            if published[0] in table.parents:
                yield from _rows_of_others(root, table, made)
    for folder in sorted(path.parent for path in published[0].glob(f"*/weights/*/{DONE}")):
        yield from _run_faults(root, folder)
    for sidecar in sorted(path for folder in published for path in folder.glob("*/*.json")):
        if not sidecar.with_suffix(".csv").exists():
            yield f"{sidecar.relative_to(root)}: expected the table {sidecar.stem}.csv beside its sidecar, got none"
    for picture in sorted(published[1].glob("*/fig-*.png")):
        if not picture.with_suffix(".csv").exists():
            yield f"{picture.relative_to(root)}: expected the table of the figure beside it, got none"
    for page in sorted((root / "notebooks").glob("*.md")):
        for name in sorted(set(_BENCH.findall(read_text(page, limit=64 * MB)))):
            if not (table := published[0] / "bench" / f"{name}.csv").exists():
                yield f"{table.relative_to(root)}: expected the table that {page.name} reads, got none"


def _run_faults(root: Path, folder: Path) -> Iterator[str]:
    """What a published run is not that it says of itself, or does not say."""
    place = (folder / DONE).relative_to(root)
    try:
        said = read_json(folder / DONE)
        found = {key: digest(read_bytes(folder / name, limit=TENSORS_LIMIT)) for key, name in SEALED.items()}
    except (ValueError, OSError) as error:
        yield str(error).replace(f"{root}/", "")
        return
    found["sha256"] = seal_of({key: value for key, value in said.items() if key != "sha256"})
    for key, value in found.items():
        if said.get(key) != value:
            yield f"{place}: expected {key} {value[:10]}, as its files are, got {brief(said.get(key))}"


def _rows_of_others(root: Path, table: Path, made: dict[str, Any]) -> Iterator[str]:
    """What a published table should be by its place, and is not; what its sidecar leaves open is taken to be so."""
    kind, method = table.stem.partition("-")[::2]
    if kind not in MEASUREMENT_OF:
        return
    name = table.relative_to(root / "results/published").parts[0]
    wanted = {"profile": name, "method": method}
    profile = root / "profiles" / f"{name}.yaml"
    # attacks that are not all there yet lie in a folder of their own
    if table.parent.name == name and profile.exists():
        wanted |= asked_of(_profile(profile, profile.stat().st_mtime_ns), kind, method)
    said = made | {"profile": profile_of(made)}
    if wrong := differing(said, wanted):
        rows = ", ".join(f"{key} {brief(wanted[key])}, got {brief(said[key])}" for key in wrong)
        yield f"{table.relative_to(root)}: expected the rows of {rows}"


@cache
def _profile(path: Path, written: int) -> Profile:
    """A profile as it was written then: asked for by each of its tables."""
    return load_profile(path)


def page_faults(root: Path, page: Path) -> Iterator[str]:
    """Numbers of a page that are not those of the tables, or do not say where they come from."""
    found = list(blocks(page.read_text(encoding="utf-8")))
    where = page.relative_to(root).as_posix()
    constants = [
        (c.line, n) for b in found for c in b.comments if c.kind == "constants of this page" for n in _listed(c)
    ]
    printed = {token.number for block in found for token in block.tokens()}
    for line, number in constants:
        if number not in printed:
            yield f"{where}:{line}: expected {number} on this page, got none"
    for block in found:
        for line, fault in _block_faults(root, block, {number for _, number in constants}):
            yield f"{where}:{line}: {fault}"


def _listed(comment: Comment) -> list[str]:
    """The numbers of a comment that says why they are not from a table; none if it does not."""
    match = _LISTED.fullmatch(comment.text)
    return match["numbers"].split(", ") if match else []


def _block_faults(root: Path, block: Block, constants: set[str]) -> Iterator[tuple[int, str]]:
    tokens, cells, excused = block.tokens(), Counter(), set(constants)
    numbers, read = [token.number for token in tokens], 0
    for comment in block.comments:
        if comment.kind == "cell":
            number = comment.text.partition(" = ")[0]
            cells[number] += 1
            if fault := _cell_fault(root, comment.text):
                yield comment.line, fault
            elif number in numbers[read:]:
                read = numbers.index(number, read) + 1
            else:
                later = " after the cells before" * (number in numbers)
                yield comment.line, f"expected {number} in the text that follows{later}, got none"
        elif comment.kind == "rows":
            yield from _rows_faults(root, comment, block)
            rows = {number for number, line in block.lines if _in_table(line)}
            tokens = [token for token in tokens if token.line not in rows]
        elif not (listed := _listed(comment)):
            yield comment.line, f"expected '{comment.kind}: NUMBER, NUMBER: WHY', got {comment.text!r}"
        elif comment.kind == "not from a table":
            excused.update(listed)
            for number in listed:
                if number not in {token.number for token in tokens}:
                    yield comment.line, f"expected {number} in the text that follows, got none"
    seen = Counter()
    for token in tokens:
        seen[token.number] += 1
        if token.measured and token.number not in excused and seen[token.number] > cells[token.number]:
            yield (
                token.line,
                f"{token.number} does not say where it comes from: expected a comment 'cell: {token.number}"
                f" = ...' or 'not from a table: {token.number}: WHY' before it",
            )


def _cell_fault(root: Path, text: str) -> str:
    """What is wrong with a number and its expression, "" if nothing is."""
    try:
        cell = parse_cell(text)
        said = value_of(root, cell)
    except Exception as error:  # whatever an expression asks of a table
        return f"{text}: {error}"
    digits = len(cell.number.partition(".")[2])
    shown = f"{said:{',' * (',' in cell.number)}.{digits}f}"
    return "" if shown == cell.number else f"the page says {cell.number}, the table {shown}"


def _in_table(line: str) -> bool:
    return line.startswith("|")


def _rows_faults(root: Path, comment: Comment, block: Block) -> Iterator[tuple[int, str]]:
    """A table beside the rows that it is said to hold; the radii of its header beside the profile's."""
    if (match := _ROWS.fullmatch(comment.text)) is None:
        yield (
            comment.line,
            f"expected 'rows: protocols(PROFILE)' or 'rows: certificates(PROFILE)', got {comment.text!r}",
        )
        return
    kind, name = match["kind"], match["profile"]
    study = _study(root, name)
    expected = table_lines(study, kind)
    header, _, *rows = [(n, line) for n, line in block.lines if _in_table(line)] or [(comment.line, ""), (0, "")]
    for line in expected:
        if line not in [row for _, row in rows]:
            yield comment.line, f"expected the line that the rows of {name} give: {line}"
    for number, row in rows:
        if row not in expected:
            yield number, f"expected a line that the rows of {name} give, got {row}"
    printed = [float(Fraction(each)) for each in re.findall(r"\d[\d./]*", header[1])]
    wanted = list(study.radii) if kind == "certificates" else []
    if [f"{each:.6f}" for each in printed] != [f"{each:.6f}" for each in wanted]:
        yield header[0], f"expected the radii of {name}, {wanted}, in the header, got {header[1]}"


def value_of(root: Path, cell: Cell) -> float:
    """What the published tables say.

    Raises:
        ValueError: if there is no such cell, or more than one.
    """
    left = _value(root, cell.left)
    if cell.right is None:
        return cell.factor * left
    right = _value(root, cell.right)
    return cell.factor * (left - right if cell.operator == "-" else left / right)


def _value(root: Path, term: Term) -> float:
    match term.function, term.arguments:
        case "protocol", (profile, method, column, *bound):
            found = _columns(root, profile).set_index(["method", "column"])
            return _one(found, (method, column), bound or ["accuracy"])
        case "certified", (profile, method, radius, *bound):
            found = certified_accuracy(_best(root, profile), [float(Fraction(radius))]).set_index("method")
            return _one(found, method, bound or ["certified_accuracy"])
        case "sandwich", (profile, method, column, radius):
            return _sandwich(_table(root, f"{profile}/sandwich-{method}.csv"), column, float(Fraction(radius)))
        case "claim", conditions:
            return _only(_chosen(read_table(root / "results/claims.csv"), conditions), "value", conditions)
        case "table", (path, column, *conditions):
            return _only(_chosen(_table(root, path), conditions), column, conditions)
        case "count", (path, *conditions):
            return float(len(_chosen(_table(root, path), conditions)))
        case ("mean" | "median" | "min" | "max" | "sum") as name, (path, column, *conditions):
            return float(getattr(_column(_chosen(_table(root, path), conditions), column), name)())
    raise ValueError(f"expected a function of the published tables, got {term.function}({', '.join(term.arguments)})")


def _one(table: pd.DataFrame, key: str | tuple[str, str], column: Sequence[str]) -> float:
    if key not in table.index or list(column) not in (["low"], ["high"], ["accuracy"], ["certified_accuracy"]):
        raise ValueError(f"expected a method and a column of the table, got {key} and {', '.join(column)}")
    return 100 * float(table[column[0]].to_dict()[key])


def _only(rows: pd.DataFrame, column: str, conditions: Sequence[str]) -> float:
    if len(rows) != 1:
        raise ValueError(f"expected one row with {', '.join(conditions)}, got {len(rows)}")
    return float(_column(rows, column).tolist()[0])


def _column(rows: pd.DataFrame, name: str) -> pd.Series:
    if name not in rows:
        raise ValueError(f"expected a column of {', '.join(rows)}, got {name!r}")
    return pd.Series(rows[name])


def _chosen(table: pd.DataFrame, conditions: Sequence[str]) -> pd.DataFrame:
    """The rows with these values; numbers are compared as numbers."""
    for condition in conditions:
        key, equals, value = condition.partition("=")
        if not equals or key not in table:
            raise ValueError(f"expected KEY=VALUE with one of {', '.join(table)}, got {condition!r}")
        column = table[key]
        if column.dtype.kind in "if":
            table = table.loc[(column - float(Fraction(value))).abs() < 1e-6]
        else:
            table = table.loc[column.astype(str) == value]
    return table


def _sandwich(rows: pd.DataFrame, column: str, radius: float) -> float:
    """The share, in per cent, of a sandwich's images that are right and hold at a radius: see `sandwich_curve`."""
    found = rows.groupby("index").agg(correct=("correct", "first"), radius=("radius", "first"), norm=("norm", "min"))
    reach = {
        "certified": found["radius"],
        "worst": found["norm"].clip(lower=found["radius"]),
        "clean": found["radius"].clip(lower=float("inf")),
    }
    if column not in reach:
        raise ValueError(f"expected certified, worst or clean, got {column}")
    return 100 * float((found["correct"] & (reach[column] >= radius)).to_numpy().mean())


@cache
def _table(root: Path, path: str) -> pd.DataFrame:
    folder, name = ("figures", path.removeprefix("figures/")) if path.startswith("figures/") else ("results", path)
    found = sorted((root / folder / "published").glob(name))
    if not found:
        raise ValueError(f"expected a table {folder}/published/{name}, got none")
    return pd.concat([read_table(each) for each in found], ignore_index=True)


@cache
def _study(root: Path, profile: str) -> Study:
    if home().resolve() != root.resolve():
        raise ValueError(f"root: expected the book's own, {home()}, got {root}")
    return as_far_as_published(profile)


@cache
def _columns(root: Path, profile: str) -> pd.DataFrame:
    return summary(_study(root, profile))


@cache
def _best(root: Path, profile: str) -> pd.DataFrame:
    return best_bound(_study(root, profile).certificates)


def table_lines(study: Study, kind: str) -> list[str]:
    """The rows of a table of results.md: "protocols" or "certificates"."""
    return certified_lines(study) if kind == "certificates" else protocol_lines(study)
