"""Every exercise has one solution, and every solution's cell stands where a reader finds it: folded, and once."""

import re
from collections.abc import Iterator
from pathlib import Path

import jupytext
import pytest
from nbformat import NotebookNode

from tools import notebooks

ROOT = Path(__file__).resolve().parents[1]
CHAPTERS = notebooks.sources(ROOT)
HEADING = "## Exercises"

SOUND = """\
## Exercises

:::{exercise} A title
:label: exercise-toy-1
The task.
:::

```{code-cell} ipython3
:label: sol-toy-1
:tags: [remove-cell]

print(1)
```

:::{solution} exercise-toy-1
:class: dropdown

The answer, and what follows from it.

```{embed} #sol-toy-1
```
:::

:::{exercise} Another title
:label: exercise-toy-2
The task.
:::

:::{solution} exercise-toy-2
:class: dropdown

The answer, in words.
:::
"""
SECOND = SOUND[SOUND.index(":::{solution} exercise-toy-2") :]
EMBED = "```{embed} #sol-toy-1\n```\n"
CELL = SOUND[SOUND.index("```{code-cell}") : SOUND.index(":::{solution} exercise-toy-1")]

# what is replaced in the sound page, by what -> words of the complaint
BROKEN = {
    "no solution": (SECOND, "", "expected exercise-toy-1, sol-toy-1, solution of exercise-toy-1, exercise-toy-2, sol"),
    "two solutions": (SECOND, 2 * SECOND, "got exercise-toy-1, sol-toy-1, solution of exercise-toy-1, exercise-toy-2,"),
    "another's": ("{solution} exercise-toy-2", "{solution} exercise-toy-1", "solution of exercise-toy-2, got"),
    "no exercise": (":::{exercise} Another title\n:label: exercise-toy-2\nThe task.\n:::\n", "", "expected exercise"),
    "a gap": ("toy-2", "toy-3", "solution of exercise-toy-2, got"),
    "another topic": ("exercise-toy", "exercise-play", "expected exercise-toy-1"),
    "cell of another": ("sol-toy-1", "sol-toy-2", "expected exercise-toy-1, solution of exercise-toy-1"),
    "cell after all": (CELL, "", "exercise-toy-1: its solution embeds sol-toy-1, and has no cell"),
    "no title": ("{exercise} A title", "{exercise}", "exercise-toy-1: expected a title"),
    "no task": ("exercise-toy-1\nThe task.", "exercise-toy-1", "exercise-toy-1: expected a text"),
    "open": (":class: dropdown\n", "", "exercise-toy-1: expected :class: dropdown"),
    "in sight": ("[remove-cell]", "[hide-cell]", "sol-toy-1: expected the tag remove-cell"),
    "not embedded": (EMBED, "", "exercise-toy-1: its solution embeds nothing, and has the cell sol-toy-1"),
    "embedded twice": ("The task.\n:::\n\n:::", f"The task.\n{EMBED}:::\n\n:::", "sol-toy-1: expected one embed"),
    "a figure": ("print(1)", 'save_figure(1, "fig-a", 1)', "sol-toy-1: expected no save_figure"),
    "a list": ("in words.\n:::\n", "in words.\n:::\n\n1. A task.\n", "expected no numbered list"),
    "elsewhere": (HEADING, "## Questions", f"expected the exercises under {HEADING}"),
}


def faults(notebook: NotebookNode, topic: str) -> Iterator[str]:
    """What is wrong with a chapter's exercises."""
    parts = list(notebooks.exercise_parts(notebook))
    blocks = [part for part in parts if isinstance(part, notebooks.Block)]
    cells = {part.metadata["label"]: part for part in parts if not isinstance(part, notebooks.Block)}
    count = sum(block.kind == "exercise" for block in blocks)
    found, wanted = [name_of(part) for part in parts], in_order(topic, count, set(cells))
    if found != wanted:
        yield f"expected {', '.join(wanted)}, got {', '.join(found)}"
    for block in blocks:
        yield from _block_faults(block, set(cells))
    embedded = notebooks.embedded_cells(notebook)
    for label, cell in cells.items():
        if not notebooks.has_tag(cell, "remove-cell"):
            yield f"{label}: expected the tag remove-cell, since its solution shows it"
        if (times := embedded.count(label)) != 1:
            yield f"{label}: expected one embed, got {times}"
        if "save_figure" in cell.source:
            yield f"{label}: expected no save_figure"
    yield from _section_faults(notebook)


def in_order(topic: str, count: int, cells: set[str]) -> list[str]:
    """The parts of so many exercises as they have to stand; a solution in words has no cell."""
    wanted = []
    for n in range(1, count + 1):
        wanted += [f"exercise-{topic}-{n}", f"sol-{topic}-{n}", f"solution of exercise-{topic}-{n}"]
    return [name for name in wanted if not name.startswith("sol-") or name in cells]


def name_of(part: notebooks.Block | NotebookNode) -> str:
    """A part as `in_order` names it."""
    if not isinstance(part, notebooks.Block):
        return part.metadata["label"]
    return part.label if part.kind == "exercise" else f"solution of {part.argument}"


def _block_faults(block: notebooks.Block, cells: set[str]) -> Iterator[str]:
    if not block.body:
        yield f"{block.label or block.argument}: expected a text"
    if block.kind == "exercise":
        if not block.argument:
            yield f"{block.label}: expected a title"
        return
    if block.css_class != "dropdown":
        yield f"{block.argument}: expected :class: dropdown for its solution, got {block.css_class!r}"
    own = block.argument.replace("exercise-", "sol-", 1)
    if block.embedded != ((own,) if own in cells else ()):
        has = f"has the cell {own}" if own in cells else "has no cell"
        yield f"{block.argument}: its solution embeds {', '.join(block.embedded) or 'nothing'}, and {has}"


def _section_faults(notebook: NotebookNode) -> Iterator[str]:
    """Exercises stand under their heading, and nothing there is a list of tasks."""
    prose = "\n\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")
    after = prose.partition(f"{HEADING}\n")[2]
    section = re.split(r"^## ", after, maxsplit=1, flags=re.M)[0]
    if prose.count(":::{exercise}") != section.count(":::{exercise}"):
        yield f"expected the exercises under {HEADING}, got some elsewhere"
    if re.search(r"^\d+\. ", re.sub(r"^:::\{.*?^:::$", "", section, flags=re.M | re.S), re.M):
        yield f"expected no numbered list under {HEADING}"


def toy(text: str) -> NotebookNode:
    return jupytext.reads(text, fmt="md:myst")


@pytest.mark.parametrize("source", CHAPTERS, ids=lambda path: path.stem)
def test_exercises_and_solutions_go_together(source: Path) -> None:
    topic = source.stem.partition("-")[2]
    assert list(faults(notebooks.read_source(source), topic)) == []


def test_a_sound_page_has_no_faults() -> None:
    assert list(faults(toy(SOUND), "toy")) == []


@pytest.mark.parametrize("kind", BROKEN)
def test_each_fault_of_an_exercise_is_seen(kind: str) -> None:
    old, new, words = BROKEN[kind]
    assert old in SOUND
    found = list(faults(toy(SOUND.replace(old, new)), "toy"))
    assert any(words in fault for fault in found), found
