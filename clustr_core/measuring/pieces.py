"""Measurements in pieces that are kept beside the run: which rows are there, and who computes the others."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

import pandas as pd
import torch
from jaxtyping import Int
from torch import Tensor
from tqdm.auto import tqdm

from clustr_core import data
from clustr_core.measuring.versions import COLUMNS, VERSIONS
from clustr_core.numerics.rounding import float32_by_default, full_precision
from clustr_core.storage.files import digest
from clustr_core.storage.gate import check_own, listed
from clustr_core.storage.provenance import order_of_sums
from clustr_core.storage.tables import read_sealed, write_table
from clustr_core.training.processes import device_here, join
from clustr_core.training.run import Run
from clustr_core.training.stopping import finished_first

# images per piece; a temperature is taken from the images of the first one
CHUNK = 128
# and of an attack on a GPU with so many bytes of memory: fewer leave it waiting for Python
GPU_CHUNK, GPU_BYTES = 1024, 70e9
# by pandas' letters
_LETTERS = {"text": "OSUT", "truth": "b", "whole number": "iu", "number": "iuf"}
# the i-th of n shares, counted from 1
Share = tuple[int, int]


@dataclass(frozen=True)
class CachedRows:
    """A part of a measurement that is computed, and kept, at one time: the rows of some images.

    Args:
        path: the file that keeps the rows.
        rows: computes them.
        count: how many rows there are. A file that holds another number of whole rows is damaged.
        digits: how many significant digits of a number the file keeps.
        kind: of measurement, one of `COLUMNS` if the file's columns shall be held against it.
    """

    path: Path
    rows: Callable[[], pd.DataFrame]
    count: int
    digits: int = 9
    kind: str = ""

    def kept(self) -> bool:
        """Whether the file is there.

        Raises:
            ValueError: if it is there and damaged; the file is named.
        """
        if not self.path.exists():
            return False
        self._whole()
        return True

    def fill(self) -> None:
        """Compute the rows and keep them, in float32 without TF32 or autocast, whatever the caller has switched on.

        Raises:
            ValueError: if there are not ``count`` of them.
        """
        check_own(self.path.parent)
        with finished_first():
            with float32_by_default(), full_precision(device_here()):
                table = self.rows()
            if len(table) != self.count:
                raise ValueError(f"{self.path}: expected {self.count} rows of this measurement, got {len(table)}")
            write_table(self.path, table, digits=self.digits, sealed=True)

    def read(self) -> pd.DataFrame:
        """The rows as the file has them, computed first if there is no file.

        Raises:
            ValueError: as `kept` and `fill`.
        """
        if not self.path.exists():
            self.fill()
        return self._whole()

    def _whole(self) -> pd.DataFrame:
        """The rows, refused if any bit of the file has changed."""
        remedy = "delete it, and the rows are measured again"
        try:
            table = read_sealed(self.path)
        except ValueError as error:
            raise ValueError(f"{error}; {remedy}") from error
        if len(table) != self.count:
            raise ValueError(f"{self.path}: expected {self.count} rows, got {len(table)}; {remedy}")
        columns = COLUMNS.get(self.kind)
        if columns is not None and (wrong := _wrong_columns(table, columns)):
            raise ValueError(f"{self.path}: expected the columns of {self.kind} rows, got {wrong}; {remedy}")
        return table


def _wrong_columns(table: pd.DataFrame, columns: Mapping[str, str]) -> str:
    """What is wrong with the columns of a table, in words; nothing where all are what they should be."""
    if list(table) != list(columns):
        return f"[{listed(list(table))}]"
    wrong = [name for name, holds in columns.items() if table[name].dtype.kind not in _LETTERS[holds]]
    return f"no {columns[wrong[0]]} in each cell of {wrong[0]}" if len(table) and wrong else ""


def fill_cache(
    pieces: Sequence[CachedRows],
    *,
    device: str | torch.device = "cpu",
    share: Share = (1, 1),
    title: str = "",
    progress: bool = True,
    before_piece: Callable[[], None] | None = None,
) -> None:
    """Compute and keep those pieces that are not there yet: all of them, or every n-th, beginning with the i-th.

    An interrupted call loses at most one piece a process. Processes that torchrun started take the missing ones in
    turn, and wait for each other; jobs that know nothing of each other take a share each.

    Args:
        share: i and n.
        before_piece: called before each piece that is computed. What it raises ends the call; what is kept stays.
    Raises:
        ValueError: if i is not one of 1..n; if a piece is damaged, before anything is computed.
    """
    index, count = share
    if not 1 <= index <= count:
        raise ValueError(f"share: expected i of n with i in 1..n, got {index} of {count}")
    processes, mine = join(device), pieces[index - 1 :: count]
    # one list for all: a piece that another process has just finished must not move the others' turns
    missing = processes.from_first(lambda: [n for n, piece in enumerate(mine) if not piece.kept()])
    shown = progress and processes.first and len(missing)
    for n in tqdm(missing[processes.rank :: processes.count], title, disable=not shown):
        if before_piece is not None:
            before_piece()
        mine[n].fill()
    processes.wait()


def collected(pieces: Sequence[CachedRows], **options) -> pd.DataFrame:
    """The rows of all pieces, as read back, so that a first and a later call give the same."""
    fill_cache(pieces, **options)
    return pd.concat([piece.read() for piece in pieces], ignore_index=True)


def by_image(table: pd.DataFrame, kind: str) -> pd.DataFrame:
    """Rows of one kind after the other, in the order in which the kinds first come; those of a kind by image."""
    order = pd.factorize(table[kind])[0]
    return table.assign(order=order).sort_values(["order", "index"], ignore_index=True).drop(columns="order")


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


# where rows are kept


def cache_path(run: Run, dataset: data.Dataset, kind: str, what: dict, *, device: str | torch.device = "cpu") -> Path:
    """Where a measurement of a run is kept: beside it, under a digest of its weights and all that was asked."""
    what = {**what, "weights": run.weights_sha256}
    return kept_at(run.path / "tables", kind, what, dataset.test_digest, device=device)


def kept_at(tables: Path, kind: str, what: dict, test: str, *, device: str | torch.device = "cpu") -> Path:
    """Where rows are kept: under a digest of the question, the test set, the measurement's version, and where it is
    computed: rows of another number of threads are other rows."""
    where = order_of_sums(device)
    key = digest(json.dumps(what, sort_keys=True), test, str(VERSIONS[kind]), json.dumps(where, sort_keys=True))
    return tables / f"{kind}-{key[:12]}.csv"


# which images


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


def image_chunks(
    dataset: data.Dataset, examples: int | None, at_once: int | None = None
) -> tuple[Int[Tensor, " chunk"], ...]:
    """The images of each piece: the first ``examples`` in the order drawn once, so many at a time (`CHUNK`)."""
    return drawn_order(dataset)[:examples].split(at_once or CHUNK)


def attacked_at_once(device: str | torch.device) -> int:
    """How many images an attack is given at one time: `CHUNK`, or on a GPU whose memory holds them `GPU_CHUNK`."""
    is_large = torch.device(device).type == "cuda" and torch.cuda.get_device_properties(device).total_memory > GPU_BYTES
    return GPU_CHUNK if is_large else CHUNK


def cached_chunks(
    run: Run,
    dataset: data.Dataset,
    kind: str,
    examples: int | None,
    what: dict,
    rows: Callable[[Tensor], pd.DataFrame],
    *,
    rows_per_image: int,
    digits: int = 9,
    device: str | torch.device = "cpu",
) -> list[CachedRows]:
    """One piece for each chunk of as many test images, in ascending order inside it."""
    chunks = [chunk.sort().values for chunk in image_chunks(dataset, examples)]
    paths = [cache_path(run, dataset, kind, {**what, "chunk": chunk.tolist()}, device=device) for chunk in chunks]
    return [
        CachedRows(path, partial(rows, chunk), rows_per_image * len(chunk), digits, kind)
        for path, chunk in zip(paths, chunks, strict=True)
    ]
