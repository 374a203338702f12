"""Run one chapter headlessly through papermill, whole or not at all.

python -m tools.execute notebooks/03-training.md --profile quick --output _build/quick/03-training.ipynb
"""

import argparse
import json
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import nbformat
import papermill
from papermill.exceptions import PapermillExecutionError

from clustr_core.measuring.profile import Profile, load_profile
from clustr_core.storage.files import FIGURES, alone, copy_whole, digest, home, write_string
from clustr_core.storage.gate import read_text
from clustr_core.storage.provenance import READ, environment
from clustr_core.training.fields import field_value, read_yaml
from tools import notebooks

INLINE = "module://matplotlib_inline.backend_inline"
STARTS = 4
ANSI = re.compile(r"\x1b\[[0-9;]*m")


def chosen_parameters(
    source: Path, declared: Mapping[str, Any], chapter: Mapping[str, Any], profile: str
) -> dict[str, Any]:
    """What papermill injects: the profile's values for this chapter, and the profile's name where declared.

    Raises:
        ValueError: if the profile sets a name that the notebook does not declare.
    """
    if unknown := sorted(set(chapter) - set(declared)):
        raise ValueError(
            f"profile {profile!r}, chapters: {source.stem}: {', '.join(unknown)} is not a parameter "
            f"of {source.name}, which declares {', '.join(sorted(declared)) or 'none'}"
        )
    return dict(chapter) | ({"profile": profile} if "profile" in declared else {})


def given_parameters(pairs: Sequence[str], declared: Mapping[str, Any], source: Path) -> dict[str, Any]:
    """Parameters from a command line: NAME=VALUE, the value as a profile would hold it (8/255 is a number).

    Raises:
        ValueError: for a name that the chapter does not declare, or a value of another kind than its default's.
    """
    given = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if name == "profile":
            raise ValueError(f"-p profile: expected none, since --profile says it, got {value!r}")
        if not equals or name not in declared:
            raise ValueError(
                f"-p: expected NAME=VALUE, NAME one of {', '.join(declared) or 'none'} in {source.name}, got {pair!r}"
            )
        if name in given:
            raise ValueError(f"-p {name}: expected it once, got {given[name]!r} and {value!r}")
        try:
            given[name] = _alike(value, declared[name], f"-p {name}")
        except ValueError as error:
            raise ValueError(f"-p {name}: expected a value such as {declared[name]!r}, got {value!r}") from error
    return given


def drawn_from(profile: Profile, given: Mapping[str, Any], declared: Mapping[str, Any]) -> dict[str, list[Any]]:
    """Data and seeds of the trained methods that a chapter reads, and its own parameter seed.

    What a chapter draws or reads beside these, its cells say.
    """
    recipes = list(profile.recipes.values()) if "profile" in declared else []
    own = [{**declared, **given}["seed"]] if "seed" in declared else []
    return {
        "data": sorted({recipe.dataset for recipe in recipes}),
        "seeds": sorted({*own, *(recipe.seed for recipe in recipes)}),
    }


def _alike(text: str, default: Any, where: str) -> Any:
    """A text as a value of its default's kind."""
    if isinstance(default, str):
        return text
    value = read_yaml(text, where)
    if isinstance(default, list):
        return list(field_value(value, tuple[type(default[0]) if default else object, ...], where))
    if isinstance(value, list) or isinstance(value, bool) != isinstance(default, bool):
        raise ValueError(f"{where}: expected no {type(value).__name__}")
    return field_value(value, type(default), where)


def execute(source: Path, profile_name: str, output: Path, given: Sequence[str] = ()) -> None:
    """Execute ``source`` under the profile into ``output``; a failed run is kept in ``failed/`` beside it.

    What the chapter draws is put in place once it is whole: into the book's ``figures/``, or with other parameters
    than the profile's into ``NAME-figures/`` beside the output ``NAME.ipynb``.

    Args:
        given: parameters as NAME=VALUE, over those of the profile.

    Raises:
        ValueError: for a profile key that the notebook does not declare, an output that is no notebook, one that
            another process is making, or one where something of another's would be lost.
        PapermillExecutionError: if a cell raises.
    """
    if output.suffix != ".ipynb":
        raise ValueError(f"--output: expected a file name that ends in .ipynb, got {output}")
    root, source = home().resolve(), source.resolve()
    running = (output.parent / "failed" / output.name).absolute()
    for path in (output, running):
        if path.exists() and not notebooks.is_executed(path):
            raise ValueError(f"--output: expected no other notebook than an executed chapter there, got {path}")
    if output.resolve() == source.with_suffix(".ipynb"):
        raise ValueError(f"--output: expected another place than the published twin's, got {output}")
    profile = load_profile(profile_name)
    notebook = notebooks.read_source(source)
    declared = notebooks.declared_parameters(notebook)
    labels = notebooks.figure_labels(notebook)
    if not given:
        _check_drawn_here(labels, source, root)
    parameters = chosen_parameters(source, declared, profile.chapters.get(source.stem, {}), profile.name)
    parameters |= given_parameters(given, declared, source)
    made_from = notebooks.provenance(root, source, profile)
    made = environment("cpu") | drawn_from(profile, parameters, declared)
    notebook.metadata["clustr"] = made_from | {"made": made} | ({"given": list(given)} if given else {})
    # of a name that nobody gives to a folder of his own
    beside = running.with_name(f".{running.stem}")
    beside.mkdir(parents=True, exist_ok=True)
    with alone(beside, busy=f"--output: expected one that no other process is making, got {output}"):
        drawn = beside / "figures"
        shutil.rmtree(drawn, ignore_errors=True)
        write_string(_gathered(drawn), "")
        _run(notebook, running, parameters, folder=source.parent, drawn=drawn, profile=profile.name)
        figures = output.with_name(f"{output.stem}-figures") if given else root / "figures"
        if missing := [label for label in labels if not _is_drawn(label, drawn, profile.name)]:
            raise ValueError(f"expected it to draw all that it labels, got no {', '.join(missing)}")
        note_files(running, drawn)
        for path in _files_under(drawn):
            copy_whole(path, figures / path.relative_to(drawn))
        running.replace(output)
        shutil.rmtree(drawn, ignore_errors=True)


def _check_drawn_here(labels: Sequence[str], source: Path, root: Path) -> None:
    """Raises a ValueError if another chapter draws one of a chapter's figures: it would be replaced."""
    for other in notebooks.sources(root):
        drawn = set() if other == source else {*notebooks.figure_labels(notebooks.read_source(other))}
        if twice := [label for label in labels if label in drawn]:
            raise ValueError(f"expected labels that no other chapter has, got {twice[0]}, which {other.name} draws")


def note_files(executed: Path, drawn: Path) -> None:
    """Note in an executed notebook the SHA-256 of each file that it drew into a folder, as ``drawn``, and of each
    committed table that it read, as it was then, as ``published``: empty where it read two; and that of what its cells
    show, as ``outputs``."""
    notebook = nbformat.read(executed, as_version=4)
    notebook.metadata.clustr["drawn"] = {
        path.relative_to(drawn).as_posix(): digest(path.read_bytes()) for path in _files_under(drawn)
    }
    read: dict[str, str] = {}
    for name, found in map(json.loads, sorted(read_text(_gathered(drawn), limit=notebooks.SOURCE_LIMIT).splitlines())):
        if notebooks.PUBLISHED.fullmatch(name):
            read[name] = found if read.get(name, found) == found else ""
    notebook.metadata.clustr["published"] = read
    notebook.metadata.clustr["outputs"] = notebooks.outputs_digest(json.loads(nbformat.writes(notebook)))
    nbformat.write(notebook, executed)


def _is_drawn(label: str, drawn: Path, profile: str) -> bool:
    return all((drawn / profile / f"{label}{kind}").is_file() for kind in (".svg", ".png", ".csv", ".json"))


def _gathered(drawn: Path) -> Path:
    """Where the kernel gathers which tables were read: beside the folder that it draws into."""
    return drawn.with_name("read.txt")


def _files_under(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _run(
    notebook: nbformat.NotebookNode,
    running: Path,
    parameters: dict[str, Any],
    *,
    folder: Path,
    drawn: Path,
    profile: str,
) -> None:
    # The kernel is this interpreter's, its cells show their figures whatever the caller's shell says, and a chapter
    # without parameters still draws under the profile's name.
    os.environ |= {
        "CLUSTR_HOME": str(home().resolve()),
        "CLUSTR_PROFILE": profile,
        FIGURES: str(drawn),
        READ: str(_gathered(drawn)),
    }
    os.environ |= {"JUPYTER_PREFER_ENV_PATH": "1", "MPLBACKEND": INLINE}
    # checks stay in
    os.environ.pop("PYTHONOPTIMIZE", None)
    with tempfile.TemporaryDirectory() as scratch:
        # nothing of what a user's kernels begin with
        os.environ["IPYTHONDIR"] = str(Path(scratch, "ipython"))
        converted = Path(scratch, running.name)
        nbformat.write(notebook, converted)
        for attempt in reversed(range(STARTS)):
            try:
                papermill.execute_notebook(
                    str(converted),
                    # which papermill formats with the parameters
                    str(running).replace("{", "{{").replace("}", "}}"),
                    parameters=parameters,
                    kernel_name="python3",
                    cwd=str(folder),
                    progress_bar=sys.stderr.isatty(),
                )
                return
            except RuntimeError as error:
                # kernels that start side by side may pick the same port: the one that loses dies before its first cell
                if not attempt or "Kernel died before replying" not in str(error):
                    raise


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; 0 when the executed notebook is in place, 1 with the reason on stderr."""
    parser = argparse.ArgumentParser(prog="python -m tools.execute", description="Run one chapter headlessly.")
    parser.add_argument("source", type=Path, help="the chapter, notebooks/NN-topic.md")
    parser.add_argument("--profile", required=True, help="a name in profiles/: smoke, quick, cpu, paper")
    parser.add_argument("--output", type=Path, required=True, help="the executed .ipynb")
    parser.add_argument("-p", dest="given", action="append", default=[], metavar="NAME=VALUE", help="another parameter")
    options = parser.parse_args(arguments)
    try:
        execute(options.source, options.profile, options.output, options.given)
    except PapermillExecutionError as error:
        failed = options.output.parent / "failed" / options.output.name
        print(f"{options.source}: cell {error.cell_index} failed, see {failed}\n", file=sys.stderr)
        print(ANSI.sub("", "\n".join(error.traceback)), file=sys.stderr)
        return 1
    except (ValueError, OSError, RuntimeError) as error:
        print(f"{options.source}: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
