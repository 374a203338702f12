"""Publish what a run regenerated: rows, figures and, of profile quick, weights and the executed twins of the chapters.

    python -m tools.publish [--profile quick]

A twin is the source's own cells with the run's outputs, and nothing that changes from one run to the next.
"""

import argparse
import copy
import json
import math
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import nbformat
from nbformat import NotebookNode

from clustr_core.measuring.profile import Profile, load_profile
from clustr_core.measuring.versions import MEASUREMENT_OF
from clustr_core.measuring.written import is_written
from clustr_core.storage.files import copy_whole, digest, home, read_json, written_whole
from clustr_core.storage.gate import brief, read_text, shortened
from clustr_core.storage.provenance import check_sidecar, is_sidecar, profile_of, sidecar_of
from clustr_core.training.names import DONE, HISTORY, WEIGHTS
from clustr_core.training.recipes import run_key
from tools import notebooks

LANGUAGE = {
    "codemirror_mode": {"name": "ipython", "version": 3},
    "file_extension": ".py",
    "mimetype": "text/x-python",
    "name": "python",
    "nbconvert_exporter": "python",
    "pygments_lexer": "ipython3",
}
# the profile whose run makes the twins
BOOK = "quick"
WIDGET = "application/vnd.jupyter.widget-view+json"
ADDRESS = re.compile(r"\bat 0x[0-9a-f]{6,}\b")


def twin(source: NotebookNode, executed: NotebookNode, *, stem: str) -> NotebookNode:
    """The source's cells with the executed notebook's outputs.

    Raises:
        ValueError: if ``executed`` was run from other cells, or an output cannot be published.
    """
    run = [cell for cell in executed.cells if not notebooks.has_tag(cell, "injected-parameters")]
    if [cell.source for cell in run] != [cell.source for cell in source.cells]:
        raise ValueError(f"{stem}: the executed notebook has other cells than the source: make figures first")
    alts = {embed.target: embed.alt for embed in notebooks.embeds(source)}
    result = nbformat.v4.new_notebook(metadata=_metadata(source, executed))
    result.cells = [
        _cell(mine, theirs, stem=stem, index=i, alts=alts)
        for i, (mine, theirs) in enumerate(zip(source.cells, run, strict=True), start=1)
    ]
    _number(result.cells)
    return result


def _metadata(source: NotebookNode, executed: NotebookNode) -> dict[str, Any]:
    kept = {key: value for key, value in source.metadata.items() if key not in ("papermill", "trusted")}
    clustr = {key: value for key, value in executed.metadata["clustr"].items() if key not in ("drawn", "outputs")}
    # in whole minutes: seconds are others at every run
    made = clustr["made"] | {"minutes": math.ceil(executed.metadata["papermill"]["duration"] / 60)}
    return kept | {"language_info": LANGUAGE, "clustr": clustr | {"made": made}}


def _cell(mine: NotebookNode, theirs: NotebookNode, *, stem: str, index: int, alts: Mapping[str, str]) -> NotebookNode:
    cell = copy.deepcopy(mine)
    cell.id = f"{stem}-{index:03d}"
    if cell.cell_type == "code":
        alt = alts.get(cell.metadata.get("label", ""), "")
        kept = [output for output in theirs.outputs if not _is_progress(output)]
        cell.outputs = [_output(output, cell.id, alt) for output in _joined(kept)]
    return cell


def _joined(outputs: Sequence[NotebookNode]) -> list[NotebookNode]:
    """Outputs with what was printed on end as one: it comes in as many parts as the machine was busy."""
    joined: list[NotebookNode] = []
    for output in outputs:
        if joined and output.output_type == "stream" and joined[-1].get("name") == output.name:
            joined[-1] = NotebookNode(joined[-1] | {"text": joined[-1].text + output.text})
        else:
            joined.append(output)
    return joined


def _is_progress(output: NotebookNode) -> bool:
    return output.get("name") == "stderr" or WIDGET in output.get("data", {})


def _output(output: NotebookNode, cell_id: str, alt: str) -> NotebookNode:
    if output.output_type == "error":
        raise ValueError(f"{cell_id}: expected a run without errors, got {output.ename}: {output.evalue}")
    output = copy.deepcopy(output)
    data = output.get("data", {})
    if data:
        output.metadata = NotebookNode()
    if "image/png" in data and alt:
        # MyST drops the alt text of a cell shown as a figure; the theme and nbconvert read these two places.
        data["text/plain"] = alt
        output.metadata["image/png"] = NotebookNode(alt=alt)
    if address := ADDRESS.search(str(data.get("text/plain", "")) + str(output.get("text", ""))):
        raise ValueError(f"{cell_id}: an object's address ({address[0]}) changes at every run: end the line with ;")
    return output


def _number(cells: Sequence[NotebookNode]) -> None:
    """Count the code cells from 1, as if nothing had been injected."""
    for count, cell in enumerate((c for c in cells if c.cell_type == "code"), start=1):
        cell.execution_count = count
        for output in cell.outputs:
            if output.output_type == "execute_result":
                output.execution_count = count


def check_portable(text: str, name: str, root: Path) -> None:
    """No path of this machine may be published.

    Raises:
        ValueError: if ``text`` names the project's root or the home directory.
    """
    for place in (root, Path.home()):
        if len(place.parts) > 1 and f"{place}/" in text:
            raise ValueError(f"{name}: expected no path of this machine, got {place}")


def publish(root: Path, profile: str) -> list[Path]:
    """Make what a run regenerated the published: rows with their sidecars, figures and, of profile quick, the twins
    and the weights that the rows were measured on.

    Everything is checked before anything is written.

    Raises:
        ValueError: if a folder of the profile's holds something that is not published; if a chapter was not executed,
            or not from what is there now, or a table of the profile is missing, made otherwise, or not its sidecar's.
        FileNotFoundError: if a table has no sidecar.
    """
    asked = load_profile(root / "profiles" / f"{profile}.yaml")
    profile = asked.name
    for kind, method in asked.tables:
        if not is_written(root / "results" / profile, asked, kind, method):
            raise ValueError(
                f"results/{profile}/{kind}-{method}.csv: expected the table that the profile makes today, got none or "
                "another: make figures first"
            )
    _check_is_its_own(root / "results/published" / profile, profile)
    for source in notebooks.sources(root) if profile == BOOK else []:
        if (path := source.with_suffix(".ipynb")).exists() and not notebooks.is_executed(path):
            raise ValueError(
                f"notebooks/{path.name}: expected a published twin, got a notebook of one's own; move it away"
            )
    executed = _executed(root, profile)
    twins = {source.with_suffix(".ipynb"): _twin_text(root, source, run, profile) for source, run in executed.items()}
    tables = sorted(root / "results" / profile / f"{kind}-{method}.csv" for kind, method in asked.tables)
    figures = _figures(root, profile, executed)
    weights = _weights(root, asked) if profile == BOOK else {}
    for table in (*tables, *(path for path in figures if path.suffix == ".csv")):
        check_sidecar(table)
    # the sidecar first: a table alone would be nobody's
    rows = [path for table in tables for path in (sidecar_of(table), table)]
    places = {root / "results/published" / profile: rows, root / "figures/published" / profile: figures}
    places |= {root / "results/published" / profile / "weights" / method: files for method, files in weights.items()}
    for folder, files in places.items():
        _check_is_made(folder, files)
    for folder, files in places.items():
        _replace(folder, files)
    if profile != BOOK:
        return []
    for path, text in twins.items():
        with written_whole(path) as temporary:
            temporary.write_text(text, encoding="utf-8")
    return list(twins)


def _check_is_its_own(folder: Path, profile: str) -> None:
    """Raises a ValueError if a folder has published tables that are not of a profile of this name, as ``bench`` has."""
    for table in sorted(folder.glob("*.csv")):
        # not held against its table: whoever published last may have been killed between the two
        said = read_json(sidecar_of(table)) if is_sidecar(sidecar_of(table)) else {"made": {}}
        of = profile_of(said["made"])
        if of != profile:
            raise ValueError(
                f"--profile: expected a name under which nothing else is published, got {profile}: {table.name} is of "
                f"{of or 'no profile'}"
            )


def _figures(root: Path, profile: str, executed: Mapping[Path, NotebookNode]) -> list[Path]:
    """What the executed chapters drew, held against what they noted of it."""
    paths = []
    for source, run in executed.items():
        where = _place(profile, source)
        for name, found in run.metadata.clustr.get("drawn", {}).items():
            path = root / "figures" / name
            if not path.exists() or digest(path.read_bytes()) != found:
                raise ValueError(
                    f"figures/{name}: expected the one that {where} drew, got "
                    f"{'another' if path.exists() else 'none'}: make figures first"
                )
            paths.append(path)
    return paths


def _place(profile: str, source: Path) -> str:
    return f"_build/{profile}/{source.stem}.ipynb"


def _executed(root: Path, profile: str) -> dict[Path, NotebookNode]:
    """Every executed chapter, by its source."""
    runs = {}
    for source in notebooks.sources(root):
        path = root / (name := _place(profile, source))
        if not path.exists():
            raise ValueError(f"{name}: expected an executed chapter, got none: make figures first")
        try:
            text = read_text(path, limit=notebooks.NOTEBOOK_LIMIT)
            runs[source] = _as_executed(nbformat.reads(text, as_version=4))
            if runs[source].metadata.clustr["outputs"] != notebooks.outputs_digest(json.loads(text)):
                raise ValueError("its cells show something else than when it was executed: make figures first")
        except Exception as error:  # of many kinds, for what is no notebook
            said = shortened(" ".join(f"{type(error).__name__}: {error}".split()), 200)
            raise ValueError(f"{name}: expected a chapter as tools.execute leaves it, got another ({said})") from error
    return runs


def _as_executed(run: NotebookNode) -> NotebookNode:
    """A notebook, if `tools.execute` noted in it what it notes."""
    nbformat.validate(run)
    said, duration = run.metadata["clustr"], run.metadata["papermill"]["duration"]
    drawn, given = said.get("drawn", {}), said.get("given", [])
    if not (isinstance(said["made"], dict) and isinstance(duration, (int, float)) and 0 <= duration < math.inf):
        raise ValueError(f"made {brief(said['made'])}, duration {brief(duration)}")
    notebooks.changed(Path(), dict(said["published"]))
    if not all(isinstance(name, str) and notebooks.DRAWN.fullmatch(name) for name in dict(drawn)):
        raise ValueError(f"drawn {brief(list(drawn))}")
    if not (isinstance(given, list) and all(isinstance(name, str) for name in given)):
        raise ValueError(f"given {brief(given)}")
    return run


def _check_is_made(folder: Path, files: Sequence[Path]) -> None:
    """Refuse a folder with anything but these files and earlier ones of their kind: it would be removed."""
    names, kinds = {path.name for path in files}, {path.suffix for path in files} | {".csv", ".json"}
    for path in sorted(folder.glob("*")):
        is_made = path.suffix in kinds and _is_published(path)
        if path.is_file() and path.name not in names and not is_made:
            raise ValueError(
                f"{path}: expected nothing beside what is published, got a file of one's own; move it away"
            )


def _is_published(path: Path) -> bool:
    """Whether a file has the name that a figure or a table has here, and a sidecar: one of `--output` has another."""
    if not is_sidecar(beside := sidecar_of(path)):
        return False
    kind, _, method = path.stem.partition("-")
    return kind in ("fig", "widget") or (kind in MEASUREMENT_OF and method == read_json(beside)["made"].get("method"))


def _replace(folder: Path, files: Sequence[Path]) -> None:
    """Make a folder hold copies of these files and no others; its subfolders stay."""
    folder.mkdir(parents=True, exist_ok=True)
    for path in files:
        copy_whole(path, folder / path.name)
    names = {path.name for path in files}
    for path in folder.iterdir():
        if path.is_file() and path.name not in names:
            path.unlink()


def _weights(root: Path, profile: Profile) -> dict[str, list[Path]]:
    """The files of each finished run of a profile, without checkpoints, snapshots and cached rows."""
    files = {}
    for method, recipe in profile.recipes.items():
        run = root / "runs" / run_key(recipe)
        files[method] = [run / name for name in (WEIGHTS, HISTORY, DONE)]
        if not all(path.exists() for path in files[method]):
            raise ValueError(f"{run.relative_to(root)}: expected a finished run of {method}, got none")
    return files


def _twin_text(root: Path, source: Path, run: NotebookNode, profile: str) -> str:
    current = notebooks.provenance(root, source, load_profile(root / "profiles" / f"{profile}.yaml"))
    if given := run.metadata.clustr.get("given"):
        raise ValueError(
            f"{source.stem}: expected it executed with the profile's parameters, got {', '.join(given)}: make figures "
            "first"
        )
    stale = sorted(key for key in current if current[key] != run.metadata.clustr.get(key))
    if stale := stale + notebooks.changed(root, run.metadata.clustr["published"]):
        raise ValueError(f"{source.stem}: {', '.join(stale)} changed since it was executed: make figures first")
    result = twin(notebooks.read_source(source), run, stem=source.stem)
    nbformat.validate(result)
    text = nbformat.writes(result)
    check_portable(text, source.stem, root)
    return text if text.endswith("\n") else text + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; 1 with the reason on stderr if a chapter cannot be published."""
    parser = argparse.ArgumentParser(prog="python -m tools.publish", description="Publish what a run regenerated.")
    parser.add_argument("--profile", default="quick", help="the profile whose run the book shows (quick)")
    options = parser.parse_args(arguments)
    try:
        for path in publish(home().resolve(), options.profile):
            print(path.name)
    except (ValueError, OSError) as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
