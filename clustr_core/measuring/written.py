"""Tables of a profile as files, each with the sidecar that says how it was made; and whether one is there already."""

import json
import os
import sys
from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from clustr_core.measuring.profile import Profile, reduced_protocol
from clustr_core.measuring.versions import MEASUREMENT_OF, VERSIONS, columns_of
from clustr_core.storage.files import LONGEST_NAME, digest, read_json, written_whole
from clustr_core.storage.gate import TENSORS_LIMIT, brief, is_stream, read_bytes, target_of
from clustr_core.storage.provenance import check_sidecar, environment, is_sidecar, sidecar_of, write_sidecar
from clustr_core.storage.tables import table_bytes
from clustr_core.training.names import DONE, WEIGHTS
from clustr_core.training.recipes import CrossEntropy, Recipe, run_folder, run_key

if TYPE_CHECKING:
    from clustr_core.training.run import Run


def made_by(profile: Profile, kind: str, device: str) -> dict[str, Any]:
    """What decides the rows of a kind of table, whatever the model: for its sidecar.

    Args:
        kind: as `Profile.protocol` takes it.
    """
    return {
        **environment(device),
        "profile": {"name": profile.name, "sha256": profile.sha256},
        "protocol": profile.protocol(kind),
        "version": VERSIONS[MEASUREMENT_OF[kind]],
        "sources": sources_of(profile, kind),
        "data": _data(profile),
        **asked_beside(profile, kind),
    }


def asked_beside(profile: Profile, kind: str) -> dict[str, Any]:
    """What decides the rows of a kind of table beside its protocol: versions of attacks and layers of one's own, and
    how many prototypes a class has, of which no run says it."""
    # loaded by whoever registers one
    attacks, layers = map(sys.modules.get, ("clustr_core.attacks.registry", "clustr_core.certificates.lipschitz"))
    if kind == "attacks" and attacks is not None:
        named = {each.attack for each in profile.attacks.values()} & set(attacks.OWN_ATTACKS)
        versions = {name: attacks.OWN_ATTACKS[name].version for name in sorted(named)}
        return {"own_attacks": versions} if versions else {}
    if kind not in ("certificates", "sandwich"):
        return {}
    own = {} if layers is None else layers.own_versions(layers.OWN_LAYERS)
    if kind == "certificates":
        own["per_class"] = next((recipe.per_class for recipe in profile.recipes.values()), None)
    return own


def _data(profile: Profile) -> str | None:
    """What the profile's data set is called: of prototypes no run says it."""
    return next((recipe.dataset for recipe in profile.recipes.values()), None)


def sources_of(profile: Profile, kind: str) -> dict[str, dict[str, str | None]]:
    """The runs from which attacks of a kind of table are transferred: names, and digests of the weights that are here.

    Args:
        kind: as `Profile.protocol` takes it.
    """
    names: set[str] = {CrossEntropy.method} if kind in ("diagnostics", "ablations") else set()
    if kind == "attacks":
        names = {each.source for each in profile.attacks.values() if each.attack == "transfer"}
    recipes = {name: profile.recipes[name] for name in sorted(names & set(profile.recipes))}
    return {name: {"run": run_key(each), "weights_sha256": _weights(each)} for name, each in recipes.items()}


def made_of(method: str, run: "Run | None") -> dict[str, Any]:
    """Which model the rows are of; None for what needs no run."""
    if run is None:
        return {"method": method} | dict.fromkeys(("run", "weights_sha256", "weights_dtype", "seed", "trained_on"))
    return {
        "method": method,
        "run": run.path.name,
        "weights_sha256": run.weights_sha256,
        "weights_dtype": run.weights_dtype,
        "seed": run.recipe.seed,
        "trained_on": list(run.trained_on),
        "data": run.recipe.dataset,
    }


def check_output(path: Path, name: str = "--output") -> None:
    """Refuse a path that somebody gave for a table, where none can be written or something else would be lost.

    Args:
        name: of the option.
    Raises:
        ValueError: names what is there.
    """
    if is_stream(path):
        return
    target_of(path)
    if path.suffix != ".csv":
        raise ValueError(f"{name}: expected a file name that ends in .csv, since X.json lies beside it, got {path}")
    above = next(each for each in path.absolute().parents if each.exists())
    if not above.is_dir():
        raise ValueError(f"{name}: expected a file in a folder, got {path}, and {above} is none")
    if len(os.fsencode(path.name)) > LONGEST_NAME:
        raise ValueError(f"{name}: expected a file name of at most {LONGEST_NAME} bytes, got {brief(path)}")
    if (beside := sidecar_of(path)).exists() and not is_sidecar(beside):
        raise ValueError(f"{name}: expected at {beside} no file but a table's sidecar, got one that would be lost")
    # a run's history is a CSV, too, and so is what somebody wrote by hand
    if path.exists():
        try:
            check_sidecar(path)
        except (ValueError, OSError) as error:
            raise ValueError(
                f"{name}: expected no file, or a table with its sidecar, got another that would be lost ({error}); "
                "delete it, or take another name"
            ) from error


def write_rows(
    path: Path, table: pd.DataFrame, made: dict[str, Any], *, note: str = "", asked_for: bool = False
) -> None:
    """Write a table and, beside it, the sidecar that says how it was made; to a device or a FIFO the table alone.

    Args:
        asked_for: as in `written_whole`.
    """
    content = table_bytes(table)
    with written_whole(path, asked_for=asked_for) as temporary:
        temporary.write_bytes(content)
        # there is room for both; and before the table, so that none is ever without: what a kill leaves is no table, or
        # one that is not its sidecar's
        if not (asked_for and is_stream(path)):
            write_sidecar(path, made, note=note, written=content)


def is_written(folder: Path, profile: Profile, kind: str, method: str) -> bool:
    """Whether a folder holds a method's table of a kind, as the profile and the package would make it today.

    A table that is not the one of its sidecar, as when its writer was killed between the two, counts as missing.
    """
    try:
        said = check_sidecar(folder / f"{kind}-{method}.csv")
    except (FileNotFoundError, ValueError):
        return False
    return said["table"]["columns"] == columns_of(kind) and is_current(said["made"], profile, kind, method)


def is_current(made: Mapping[str, Any], profile: Profile, kind: str, method: str) -> bool:
    """Whether what a sidecar says is what the profile and the package would make today of a method.

    What it leaves open, as those of the first tables do, is taken to be so.
    """
    recipe = profile.recipes.get(method)
    wanted = asked_of(profile, kind, method)
    # else it is of another training of the same recipe, or of weights that were rounded
    wanted["weights_sha256"] = recipe and _weights(recipe)
    sources = sources_of(profile, kind)
    said = sources if made.get("sources") is None else made["sources"]
    # one source more, or one fewer, is another table
    same = set(said) == set(sources) and not any(differing(said[name], sources[name]) for name in sources)
    return same and not differing(made, wanted)


def asked_of(profile: Profile, kind: str, method: str) -> dict[str, Any]:
    """What the sidecar of a method's table says, whatever the machine, if the profile asks for it today."""
    recipe = profile.recipes.get(method)
    # of a trained method its run says how many
    counts = {} if recipe is None else {"per_class": None}
    return {
        **(asked_beside(profile, kind) | counts),
        "method": method,
        "protocol": json.loads(json.dumps(profile.protocol(kind))),
        "version": VERSIONS[MEASUREMENT_OF[kind]],
        "data": _data(profile),
        "run": recipe and run_key(recipe),
        "seed": recipe and recipe.seed,
    }


def are_of(profile: Profile, said: Mapping[str, Any]) -> bool:
    """Whether each attack that the sidecar of a partial table says is one that the profile asks for today, as it stands
    there or reduced."""
    whole = profile.attacks
    reduced = {name: reduced_protocol(each, profile) for name, each in whole.items()}
    asked = [json.loads(json.dumps(replace(profile, attacks=each).protocol("attacks"))) for each in (whole, reduced)]
    return all(value in [each.get(name) for each in asked] for name, value in said.items())


def differing(said: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
    """The names of what both know, and is another; None is not known."""
    return [name for name, value in wanted.items() if value is not None and said.get(name) not in (None, value)]


def check_weights(recipe: Recipe) -> None:
    """Refuse a finished run whose weights are missing or damaged, before anything of it is made anew.

    Raises:
        ValueError: names the file.
    """
    path, found = run_folder(recipe) / WEIGHTS, _weights(recipe)
    if found is not None and (said := read_json(path.with_name(DONE)).get("weights_sha256")) not in (None, found):
        raise ValueError(f"{path}: expected the file of sha256 {str(said)[:10]}, as {DONE} says, got {found[:10]}")


def _weights(recipe: Recipe) -> str | None:
    """The digest of a finished run's weights; None where there is none."""
    folder = run_folder(recipe)
    if not (folder / DONE).exists():
        return None
    if not (folder / WEIGHTS).exists():
        raise ValueError(f"{folder / WEIGHTS}: expected the weights of a finished run, got none")
    return _digest_of(folder / WEIGHTS, (folder / WEIGHTS).stat().st_mtime_ns)


@cache
def _digest_of(path: Path, written: int) -> str:
    """SHA-256 of a file as it was written then: asked for often, and weights are large."""
    return digest(read_bytes(path, limit=TENSORS_LIMIT))
