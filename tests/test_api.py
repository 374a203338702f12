"""api.md is what the docstrings say, has every public name, and shows none of their signs raw."""

import re
from pathlib import Path

import pytest

import clustr_core
from tools import api

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / api.PAGE).read_text(encoding="utf-8")


def rendered(docstring: str) -> str:
    return "\n".join(api.docstring(docstring, {"pgd"})).strip()


def test_the_page_is_current() -> None:
    assert api.page(ROOT) == PAGE, "stale: make api (python -m tools.api)"


def test_every_public_name_has_its_section_and_a_label_of_its_own() -> None:
    headings = re.findall(r"^### `(\w+)`$", PAGE, re.M)
    labels = re.findall(r"^\(([\w-]+)\)=$", PAGE, re.M)
    assert sorted(headings) == sorted(clustr_core.__all__)
    assert len(set(labels)) == len(labels) == len(headings)
    assert {"api-pgd", "api-rescaled", "api-rescaled-class"} <= set(labels)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("Of ``success`` and `pgd`.", "Of `success` and [`pgd`](#api-pgd)."),
        ("As `gradient.pgd` does.", "As [`gradient.pgd`](#api-pgd) does."),
        ("In [0, 1], a<b> $5 {x}.", r"In \[0, 1\], a\<b\> \$5 \{x\}."),
        ("With mu_c its mean.", "With `mu_c` its mean."),
        ("So s = d_j^2 / (2 L), half of it.", "So `s = d_j^2 / (2 L)`, half of it."),
        (
            "One line.\n\nArgs:\n    a, b: two\n        lines.\n    c: one.",
            "**Args**\n\n- `a`, `b`: two lines.\n- `c`: one.",
        ),
        ("One line.\n\nSource: the book.", "**Source.** The book."),
        ("One line:\n\n    r = a * b\n", "```text\nr = a * b\n```"),
    ],
)
def test_what_a_docstring_becomes(text: str, shown: str) -> None:
    assert rendered(text).removeprefix("One line.\n\n").removeprefix("One line:\n\n") == shown


def test_outside_code_no_sign_is_left_that_the_book_would_read() -> None:
    prose = re.sub(r"```.*?```|\]\([^)]*\)", "", PAGE.split("\n---\n", 1)[1], flags=re.S)
    for line in prose.splitlines():
        plain = re.sub(r"`[^`]*`|\\.|\*\*[^*]+\*\*", "", line).removeprefix("- ")
        if not re.match(r"\([\w-]+\)=|#", line):
            assert not re.search(r"[`*_$<>{}~^|#]", plain), line


def test_fields_and_defaults_of_a_recipe_are_in_its_signature() -> None:
    section = PAGE.split("### `Clustr`")[1].split("### ")[0]
    assert "has the fields of [`Recipe`](#api-recipe)" in section
    assert "gap: float = 12.5" in section
    assert "ClassVar" not in PAGE
