"""Measure the battery: every check on evaluations that are broken, and on honest ones, at several widths and seeds.

    python -m tools.power [--profile quick] [--widths 16 32] [--seeds 111 112 113] [--examples 64] [--into DIR]

The networks are those of a profile's recipes, of other widths and seeds; each is trained once, and kept like any run.
The evaluations and what is known of them are in `clustr_core.measuring.power`. The rows of each evaluation are kept in
``runs/power``, so a killed call goes on, and calls for other seeds may run side by side; the table is of all that were
asked for.
"""

import argparse
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import pandas as pd
import torch
from torch import Tensor, nn

from clustr_core import data
from clustr_core.attacks.ball import Images, check_counts
from clustr_core.measuring import power
from clustr_core.measuring.diagnostics import asked_with
from clustr_core.measuring.pieces import CachedRows, drawn_order, kept_at
from clustr_core.measuring.profile import Profile, load_profile
from clustr_core.measuring.written import check_output, write_rows
from clustr_core.numerics.checks import check_positive
from clustr_core.storage.files import home
from clustr_core.storage.provenance import environment
from clustr_core.training.loop import fit
from clustr_core.training.recipes import Recipe
from clustr_core.training.run import Run
from tools.telling import count

# of the paper, and whose accuracy under attack is honest
METHODS = ("ce", "clustr", "clustr-qtrades", "free-clustr", "pgd-at", "trades", "fast-at")
TABLES = ("battery", "planted")


def recipe_of(recipe: Recipe, **changed: object) -> Recipe:
    """The recipe, and that from which it starts, with other fields."""
    start = getattr(recipe, "warm_start", None)
    more = {} if start is None else {"warm_start": recipe_of(start, **changed)}
    return replace(recipe, **changed, **more)  # pyright: ignore[reportArgumentType]


class Linear(nn.Module):
    """A linear model of the pixels, which masks nothing: least squares on a data set's training images."""

    def __init__(self, dataset: data.Dataset) -> None:
        super().__init__()
        pixels = data.to_float(dataset.train_images).flatten(1).double()
        targets = nn.functional.one_hot(dataset.train_labels, dataset.num_classes).double()
        ones = torch.ones(len(pixels), 1, dtype=torch.float64)
        matrix = torch.cat([pixels, ones], dim=1)
        ridge = len(pixels) * 1e-2 * torch.eye(matrix.shape[1], dtype=torch.float64)
        solved = torch.linalg.solve(matrix.T @ matrix + ridge, matrix.T @ targets)
        self.linear = nn.Linear(pixels.shape[1], dataset.num_classes)
        with torch.no_grad():
            # in units in which cross-entropy has a gradient
            self.linear.weight.copy_(10 * solved[:-1].T)
            self.linear.bias.copy_(10 * solved[-1])

    def forward(self, images: Images) -> Tensor:
        """Logits."""
        return self.linear(images.flatten(1))


Pieces = Iterator[tuple[str, dict[str, object], CachedRows]]


def pieces(options: argparse.Namespace, dataset: data.Dataset) -> Pieces:
    """What is measured, and of which networks, which are trained as they are reached: of the table "battery" or
    "planted"."""
    profile = load_profile(options.profile)
    indices = drawn_order(dataset)[: options.examples].sort().values
    images, labels = data.to_float(dataset.test_images[indices]), dataset.test_labels[indices]
    asked = {"eps": _eps(options, profile), "steps": options.steps, "restarts": options.restarts}
    for width in options.widths:
        for seed in options.seeds:
            runs = {
                method: fit(recipe_of(profile.recipes[method], width=width, seed=seed), dataset=dataset, progress=False)
                for method in options.methods
            }
            networks: dict[str, nn.Module] = {name: run.model() for name, run in runs.items()}
            networks = {"ce": networks.pop("ce"), "ce-clusters": runs["ce"].cluster_model(), **networks}
            networks["linear"] = Linear(dataset).eval().requires_grad_(False)
            about = {"data": dataset.name, "width": width, "seed": seed}
            for judged in power.evaluations_of(networks, images, labels, **asked):
                source = networks["pgd-at" if judged.network is networks["ce"] else "ce"]
                rows = partial(power.measured, judged, source=source)
                path = _kept_at(runs, judged.name, dataset, {**asked, "examples": options.examples})
                yield "battery", about, CachedRows(path, rows, len(asked_with(source=True)))
            for name, network in networks.items():
                rows = partial(_planted, name, network, images, labels, asked["eps"])
                size = {"eps": asked["eps"], "examples": options.examples}
                path = _kept_at(runs, f"planted in {name}", dataset, size)
                yield "planted", about, CachedRows(path, rows, 1)


def _eps(options: argparse.Namespace, profile: Profile) -> float:
    if options.eps is not None:
        return options.eps
    if profile.examination is None:
        raise ValueError(f"--eps: expected one, since profile {profile.name} has no examination, got none")
    return profile.examination.eps


def _planted(name: str, network: nn.Module, images: Images, labels: Tensor, eps: float) -> pd.DataFrame:
    return pd.DataFrame([{"network": name, **power.planted_found(network, images, labels, eps=eps)}])


def _kept_at(runs: dict[str, Run], name: str, dataset: data.Dataset, asked: dict[str, object]) -> Path:
    what = {
        "weights": {method: run.weights_sha256 for method, run in runs.items()},
        "of": name,
        "power": power.VERSION,
        **asked,
    }
    path = kept_at(home() / "runs/power", "diagnostics", what, dataset.test_digest)
    return path.with_name(path.name.replace("diagnostics", name.replace(" ", "-").replace(",", "")))


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; 0 when the tables are there: battery.csv, and planted.csv."""
    parser = argparse.ArgumentParser(prog="python -m tools.power", description="Measure the battery of checks.")
    parser.add_argument("--profile", default="quick", help="whose recipes are trained (quick)")
    parser.add_argument("--widths", type=count, nargs="+", default=[16, 32])
    parser.add_argument("--seeds", type=int, nargs="+", default=[111, 112, 113])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    parser.add_argument("--examples", type=int, default=64, help="test images (64)")
    parser.add_argument("--eps", type=float, help="the profile's examination's, unless given")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--restarts", type=int, default=2)
    parser.add_argument("--into", type=Path, help="a folder (results/bench)")
    options = parser.parse_args(arguments)
    if {"ce", "pgd-at"} - set(options.methods):
        parser.error("methods: expected ce and pgd-at among them, from which images are transferred")
    try:
        return _measured(options)
    except (OSError, ValueError) as error:
        print(f"power: {' '.join(str(error).split())}", file=sys.stderr)
        return 2


def _measured(options: argparse.Namespace) -> int:
    folder = options.into or home() / "results/bench"
    for name in TABLES:
        check_output(folder / f"{name}.csv", "--into")
    check_counts(**{name: getattr(options, name) for name in ("examples", "steps", "restarts")})
    profile = load_profile(options.profile)
    check_positive(eps=_eps(options, profile))
    if lacking := [method for method in options.methods if method not in profile.recipes]:
        raise ValueError(f"--methods: expected some of profile {profile.name}, which has no {', '.join(lacking)}")
    for name in ("widths", "seeds", "methods"):
        given = getattr(options, name)
        if len(set(given)) < len(given):
            raise ValueError(f"--{name}: expected each once, since all are counted, got {given}")
    # as the pipeline does: rows do not depend on how many there are here
    torch.set_num_threads(1)
    dataset = data.load_dataset(next(iter(load_profile(options.profile).recipes.values())).dataset)
    tables: dict[str, list[pd.DataFrame]] = {name: [] for name in TABLES}
    for table, about, piece in pieces(options, dataset):
        rows = piece.read()
        print(f"{about} {' '.join(map(str, rows.iloc[0, :5]))}", flush=True)
        tables[table].append(pd.DataFrame({**about, **rows}))
    asked = {name: str(value) for name, value in vars(options).items() if name != "into"}
    made = environment("cpu") | {"profile": {"name": options.profile, "sha256": None}, "asked": asked}
    for name, rows in tables.items():
        note = "The battery measured, by python -m tools.power."
        write_rows(folder / f"{name}.csv", pd.concat(rows, ignore_index=True), made, note=note)
    return 0


if __name__ == "__main__":
    sys.exit(main())
