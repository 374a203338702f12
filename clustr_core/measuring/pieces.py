"""Measurements in pieces that are kept beside the run: who computes what, what is measured, on which images."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, cached_property, partial
from pathlib import Path
from typing import Literal

import pandas as pd
import torch
from jaxtyping import Int
from torch import Tensor, nn
from tqdm.auto import tqdm

from clustr_core import data
from clustr_core.measuring.profile import Profile
from clustr_core.measuring.versions import VERSIONS
from clustr_core.storage.files import digest
from clustr_core.storage.tables import read_table, write_table
from clustr_core.training.processes import join
from clustr_core.training.recipes import (
    CrossEntropy,
    run_folder,
)
from clustr_core.training.run import Run, load_run

# so many examples are measured, and kept, at one time; a temperature is taken from so many
CHUNK = 128
Head = Literal["own", "clusters"]
# the i-th of n shares, counted from 1
Share = tuple[int, int]


@dataclass(frozen=True)
class CachedRows:
    """A part of a measurement that is computed, and kept, at one time: the rows of some images."""

    path: Path
    rows: Callable[[], pd.DataFrame]


def fill_cache(
    pieces: Sequence[CachedRows],
    *,
    device: str | torch.device = "cpu",
    share: Share = (1, 1),
    title: str = "",
    progress: bool = True,
) -> None:
    """Compute and keep those pieces that are not there yet: all of them, or every n-th, beginning with the i-th.

    An interrupted call loses at most one piece a process. Processes that torchrun started take the missing ones in
    turn, and wait for each other; jobs that know nothing of each other take a share each.

    Args:
        share: i and n.
    Raises:
        ValueError: if i is not one of 1..n.
    """
    index, count = share
    if not 1 <= index <= count:
        raise ValueError(f"share: expected i of n with i in 1..n, got {index} of {count}")
    processes, mine = join(device), pieces[index - 1 :: count]
    # one list for all: a piece that another process has just finished must not move the others' turns
    missing = processes.from_first(lambda: [n for n, piece in enumerate(mine) if not piece.path.exists()])
    shown = progress and processes.first and len(missing)
    for n in tqdm(missing[processes.rank :: processes.count], title, disable=not shown):
        write_table(mine[n].path, mine[n].rows())
    processes.wait()


def collected(pieces: Sequence[CachedRows], **options) -> pd.DataFrame:
    """The rows of all pieces, as read back, so that a first and a later call give the same."""
    fill_cache(pieces, **options)
    return pd.concat([read_table(piece.path) for piece in pieces], ignore_index=True)


def by_image(table: pd.DataFrame, kind: str) -> pd.DataFrame:
    """Rows of one kind after the other, in the order in which the kinds first come; those of a kind by image."""
    order = pd.factorize(table[kind])[0]
    return table.assign(order=order).sort_values(["order", "index"], ignore_index=True).drop(columns="order")


@dataclass(frozen=True)
class AttackTarget:
    """A model under attack.

    Args:
        name: what its rows are called.
        load: builds the model, on its device, in evaluation mode; called only where something is left to measure.
        identity: changes whenever the model does.
        tables: the folder in which its rows are kept.
        source: another subject, for the attack that transfers from it.
        device: where it is attacked.
    """

    name: str
    load: Callable[[], nn.Module]
    identity: str
    tables: Path
    source: "AttackTarget | None" = None
    device: str | torch.device = "cpu"

    @cached_property
    def model(self) -> nn.Module:
        """The model, loaded once."""
        return self.load()


def target_of(
    run: Run, *, head: Head = "own", source: Run | None = None, device: str | torch.device = "cpu"
) -> AttackTarget:
    """A run's classifier as a subject; with head "clusters" the clusters fitted after training, whatever the method."""
    name = run.recipe.method if head == "own" else f"{run.recipe.method}-clusters"
    load = (lambda: run.model(device)) if head == "own" else (lambda: run.cluster_model(device))
    from_ = target_of(source, device=device) if source is not None else None
    return AttackTarget(name, load, f"{run.weights_sha256} {head}", run.path / "tables", from_, device)


def heads_of(run: Run) -> tuple[Head, ...]:
    """What is measured of a run: cross-entropy also with clusters fitted after training, as "ce-clusters"."""
    return ("own", "clusters") if isinstance(run.recipe, CrossEntropy) else ("own",)


def source_of(run: Run, profile: Profile, method: str) -> Run | None:
    """The profile's run of a method, to transfer attacks from; None for that run itself, or if there is no such run."""
    recipe = profile.recipes.get(method)
    return None if recipe is None or recipe == run.recipe else load_run(run_folder(recipe), expected=recipe)


def named(name: str, table: pd.DataFrame) -> pd.DataFrame:
    """The table with a first column ``method``."""
    return pd.DataFrame({"method": name, **table})


def dataset_of(run: Run, dataset: data.Dataset | None) -> data.Dataset:
    """The run's dataset, loaded unless given.

    Raises:
        ValueError: if it is another one, or its training images are no longer those that the run saw.
    """
    dataset = dataset or data.load_dataset(run.recipe.dataset)
    if dataset.name != run.recipe.dataset:
        raise ValueError(f"dataset: expected {run.recipe.dataset!r} as in the run, got {dataset.name!r}")
    run.check_data(dataset)
    return dataset


def cache_path(run: Run, dataset: data.Dataset, kind: str, what: dict) -> Path:
    """Where a measurement of a run is kept: beside it, under a digest of its weights and all that was asked."""
    return kept_at(run.path / "tables", kind, {**what, "weights": run.weights_sha256}, dataset.test_digest)


def kept_at(tables: Path, kind: str, what: dict, test: str) -> Path:
    """Where rows are kept: under a digest of the question, the test set and the measurement's version."""
    key = digest(json.dumps(what, sort_keys=True), test, str(VERSIONS[kind]))
    return tables / f"{kind}-{key[:12]}.csv"


def some_test_images(
    run: Run, dataset: data.Dataset | None, examples: int | None
) -> tuple[Int[Tensor, " batch"], Tensor, Int[Tensor, " batch"]]:
    """The first ``examples`` test images in an order drawn once for all methods: indices, bytes, labels."""
    dataset = dataset or data.load_dataset(run.recipe.dataset)
    indices = drawn_order(dataset)[:examples].sort().values
    return indices, dataset.test_images[indices], dataset.test_labels[indices]


def drawn_order(dataset: data.Dataset) -> Int[Tensor, " test"]:
    """The order of the test images that is drawn once for all methods and measurements."""
    return _permutation(len(dataset.test_labels))


@cache
def _permutation(count: int) -> Int[Tensor, " count"]:
    return torch.randperm(count, generator=torch.Generator().manual_seed(0))


def cached_chunks(
    run: Run,
    dataset: data.Dataset,
    kind: str,
    examples: int | None,
    what: dict,
    rows: Callable[[Tensor], pd.DataFrame],
) -> list[CachedRows]:
    """One piece for each chunk of as many test images, in the order drawn once."""
    chunks = [chunk.sort().values for chunk in drawn_order(dataset)[:examples].split(CHUNK)]
    paths = [cache_path(run, dataset, kind, {**what, "chunk": chunk.tolist()}) for chunk in chunks]
    return [CachedRows(path, partial(rows, chunk)) for path, chunk in zip(paths, chunks, strict=True)]
