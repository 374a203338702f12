"""The sandwich of finished runs: attacks that search for the nearest misclassified images, beside what is certified."""

from collections.abc import Mapping
from dataclasses import asdict, replace
from functools import partial

import pandas as pd
import torch
from torch import Tensor

from clustr_core import data
from clustr_core.certificates.lipschitz import own_versions
from clustr_core.measuring.accuracy import best_bound
from clustr_core.measuring.certified import certified_target, cluster_pieces
from clustr_core.measuring.pieces import (
    CachedRows,
    by_image,
    cached_chunks,
    collected,
    dataset_of,
    image_chunks,
    named,
)
from clustr_core.measuring.profile import Profile, SandwichBudget
from clustr_core.measuring.sandwich import chosen_attacks, measure_sandwich
from clustr_core.measuring.targets import AttackTarget
from clustr_core.training.run import Run


def sandwich_of(run: Run, profile: Profile, **options) -> pd.DataFrame:
    """`sandwich_table` of a run with the budget of a profile; the method comes first."""
    asked = {"budget": _budget(profile), "certified_examples": profile.certified_examples}
    return named(run.recipe.method, sandwich_table(run, **asked, **options))


def sandwich_pieces(
    run: Run, profile: Profile, *, dataset: data.Dataset | None = None, device: str | torch.device = "cpu"
) -> list[CachedRows]:
    """All that `sandwich_of` needs, for jobs that compute a share of it each."""
    return _pieces(run, _budget(profile), profile.certified_examples, dataset_of(run, dataset), device)


def sandwich_table(
    run: Run,
    budget: SandwichBudget,
    *,
    certified_examples: int | None = 0,
    dataset: data.Dataset | None = None,
    device: str | torch.device = "cpu",
    progress: bool = True,
) -> pd.DataFrame:
    """What the attacks that search for the nearest misclassified image find, beside what is certified.

    Certified radii are those of the run's certificate table: its pieces are read where they are, and computed and kept
    where they are not. Certificates are computed in float64, attacks run on the model in float32.

    Args:
        certified_examples: how many images that table has, as in `certificate_table`; None for all.
    Returns:
        the columns of `sandwich.sandwich_rows`: one row for each attack and image.
    Raises:
        CertificateBroken: if an attack breaks a certificate; the example is kept in the run's ``counterexamples/``.
        ValueError: if the run is of a method that certifies nothing.
    """
    pieces = _pieces(run, budget, certified_examples, dataset_of(run, dataset), device)
    table = collected(pieces, device=device, title=f"{run.recipe.method} sandwich", progress=progress)
    return by_image(table, "attack")


def _budget(profile: Profile) -> SandwichBudget:
    if profile.sandwich is None:
        raise ValueError(f"profile {profile.name}: expected an entry sandwich, got none")
    return profile.sandwich


def _pieces(
    run: Run,
    budget: SandwichBudget,
    certified_examples: int | None,
    dataset: data.Dataset,
    device: str | torch.device,
) -> list[CachedRows]:
    """The chunks of `sandwich_table`."""
    if run.recipe.guarantee != "lipschitz":
        raise ValueError(f"run: expected a method on a 1-Lipschitz encoder, got {run.recipe.method}")
    target = certified_target(run, dataset, device)
    # chunks grow with the number of images: those of the longer table hold those of the other
    lengths = [count for count in (certified_examples, budget.examples) if count is not None]
    longer = max(lengths) if len(lengths) == 2 else None
    chunks = zip(image_chunks(dataset, longer), cluster_pieces(run, target, longer), strict=True)
    certificates = {index: piece for chunk, piece in chunks for index in chunk.tolist()}
    rows = partial(_rows, run, target, certificates, budget)
    own = own_versions(map(type, target.model.modules()))
    what, attacks = asdict(replace(budget, examples=None)) | own, chosen_attacks(budget)
    return cached_chunks(
        run, dataset, "sandwich", budget.examples, what, rows, rows_per_image=len(attacks), device=device
    )


def _rows(
    run: Run, target: AttackTarget, certificates: Mapping[int, CachedRows], budget: SandwichBudget, indices: Tensor
) -> pd.DataFrame:
    """One row for each attack and image: the attacks see the model in float32."""
    table = certificates[int(indices[0])].read().assign(method=run.recipe.method)
    radii = torch.tensor(best_bound(table).set_index("index").loc[indices.tolist(), "radius"].tolist())
    images = target.images(indices)
    return measure_sandwich(
        target.model, images, target.labels(indices), radii.to(images), budget, indices=indices,
        folder=run.path / "counterexamples", temperature=target.cooled.temperature,
    )  # fmt: skip
