"""Certificates of finished runs: one row for each bound and test image."""

import copy
from dataclasses import asdict, dataclass, replace
from functools import cached_property, partial

import pandas as pd
import torch
from torch import Tensor, nn

from clustr_core import data
from clustr_core.certificates.ladder import certified_radius
from clustr_core.certificates.linear import margin_radius
from clustr_core.certificates.lipschitz import lipschitz_lower_bound, lipschitz_upper_bound, own_versions
from clustr_core.certificates.names import HARD_BOUNDS, HardBound
from clustr_core.certificates.prototypes import pixel_prototype_rows
from clustr_core.certificates.rounding import embedding_error
from clustr_core.certificates.smoothing import certify_smoothed
from clustr_core.measuring.pieces import (
    CachedRows,
    by_image,
    cached_chunks,
    collected,
    dataset_of,
    drawn_order,
    named,
)
from clustr_core.measuring.profile import Profile, SmoothingBudget
from clustr_core.measuring.targets import AttackTarget, target_of
from clustr_core.models.classifiers import ClusterClassifier, LinearClassifier, cluster_logits, nearest_logits
from clustr_core.numerics.rounding import full_precision
from clustr_core.training.recipes import Recipe, Smoothing
from clustr_core.training.run import Run

# ordinary networks: three bounds, which are vacuous anyway; 1-Lipschitz networks: all of them
BOUNDS: tuple[HardBound, ...] = ("triangle", "nearest", "pairwise")
# images at which a lower bound on the Lipschitz constant is looked for
PROBES = 64
# what rounding in float32 may add to a lower bound, in shares of it
SLACK = 1e-3
# a radius is kept with all of its bits, since the sandwich searches in the very ball that was certified
DIGITS = 17


def certificates_of(run: Run, profile: Profile, **options) -> pd.DataFrame:
    """`certificate_table` of a run on as many images as a profile says; the method comes first."""
    budget = {"examples": profile.certified_examples, "smoothing": profile.smoothing}
    return named(run.recipe.method, certificate_table(run, **budget, **options))


def certificate_pieces(
    run: Run, profile: Profile, *, dataset: data.Dataset | None = None, device: str | torch.device = "cpu"
) -> list[CachedRows]:
    """All that `certificates_of` needs, for jobs that compute a share of it each."""
    dataset = dataset_of(run, dataset)
    return _certificate_pieces(run, profile.certified_examples, profile.smoothing, dataset, device)


def prototype_certificates(profile: Profile, dataset: data.Dataset | None = None) -> pd.DataFrame:
    """The rows of `certificates_of` for the floor that needs no training: nearest prototypes on raw pixels.

    Args:
        dataset: the profile's dataset if it is in memory already.
    """
    if not profile.recipes:
        raise ValueError(f"profile {profile.name}: expected at least one entry under methods, got none")
    some = next(iter(profile.recipes.values()))
    dataset, per_class = dataset or data.load_dataset(some.dataset), some.per_class
    indices = drawn_order(dataset)[: profile.certified_examples].sort().values
    return named("prototypes", pixel_prototype_rows(dataset, per_class=per_class, indices=indices))


def certificate_table(
    run: Run,
    *,
    examples: int | None = None,
    smoothing: SmoothingBudget | None = None,
    dataset: data.Dataset | None = None,
    device: str | torch.device = "cpu",
    progress: bool = True,
) -> pd.DataFrame:
    """Certified radii of a run's classifier: one row for each bound and test image.

    Of an ordinary encoder, those of clusters, fitted afterwards if need be: "triangle", "nearest", "pairwise". Of a
    1-Lipschitz one, in float64 and less all rounding: "exact" as well, or "margin" for a linear head. Of a base
    classifier of randomised smoothing: "smoothing".

    Args:
        smoothing: what the last may spend, on images of its own number.
    Returns:
        columns ``bound index label prediction correct feature_radius radius lipschitz lipschitz_lower_bound``:
        ``feature_radius`` in the embedding space, ``radius`` = feature_radius / lipschitz in pixels of [0, 1].
        Smoothing has no Lipschitz constant, and the prediction -1 where it abstains.
    """
    pieces = _certificate_pieces(run, examples, smoothing, dataset_of(run, dataset), device)
    table = collected(pieces, device=device, title=f"{run.recipe.method} certificates", progress=progress)
    return by_image(table, "bound")


def bounds_of(recipe: Recipe) -> tuple[str, ...]:
    """The bounds that are valid for a method's classifier: one row each for an image."""
    if recipe.guarantee == "smoothing":
        return ("smoothing",)
    if recipe.guarantee == "none":
        return BOUNDS
    return HARD_BOUNDS if recipe.clustered else ("margin",)


@dataclass(frozen=True)
class CertifiedRun:
    """A run's model and the constants of its certificates: each computed once, and only if an image needs it.

    Where a certificate is meant to hold, everything is computed in float64.

    Args:
        target: the model that attacks see, in float32.
    """

    run: Run
    target: AttackTarget

    @cached_property
    def model(self) -> LinearClassifier | ClusterClassifier:
        """The model whose embeddings are certified."""
        model = self.target.model
        assert isinstance(model, LinearClassifier | ClusterClassifier)
        return copy.deepcopy(model).double() if self.run.recipe.guarantee == "lipschitz" else model

    @cached_property
    def error(self) -> float:
        """What rounding can do to an embedding; 0 where the method promises nothing: its rows are of real numbers."""
        meant = self.run.recipe.guarantee == "lipschitz"
        return embedding_error(self.model.encoder, self.run.image_shape) if meant else 0.0

    @cached_property
    def lipschitz(self) -> tuple[float, float]:
        """An upper bound, and what is reached at the first images.

        Raises:
            ValueError: if that is more, by more than rounding: the rule of some layer is wrong.
        """
        probes = self.pixels(drawn_order(self.target.dataset)[:PROBES])
        upper = lipschitz_upper_bound(self.model.encoder, self.run.image_shape)
        lower = lipschitz_lower_bound(self.model.encoder, probes)
        if lower > upper * (1 + SLACK):
            raise ValueError(f"encoder: expected a Lipschitz constant of at most {upper:g}, got {lower:g} at an image")
        return upper, lower

    def pixels(self, indices: Tensor) -> Tensor:
        """Test images in [0, 1], in the model's dtype and on its device."""
        return self.target.images(indices).to(next(self.model.parameters()))


def _certificate_pieces(
    run: Run,
    examples: int | None,
    smoothing: SmoothingBudget | None,
    dataset: data.Dataset,
    device: str | torch.device,
) -> list[CachedRows]:
    """The chunks of `certificate_table`."""
    target = certified_target(run, dataset, device)
    if run.recipe.guarantee != "smoothing":
        return cluster_pieces(run, target, examples)
    if smoothing is None:
        raise ValueError(f"smoothing: expected a budget in the profile for {run.recipe.method}, got none")
    budget = asdict(replace(smoothing, examples=None))
    rows = partial(_smoothing_rows, target, run.recipe, smoothing)
    return cached_chunks(run, dataset, "certificate", smoothing.examples, budget, rows, rows_per_image=1, device=device)


def certified_target(run: Run, dataset: data.Dataset, device: str | torch.device) -> AttackTarget:
    """The classifier that is certified: the method's own, or clusters fitted afterwards where it promises nothing."""
    own = run.recipe.clustered or run.recipe.guarantee != "none"
    return target_of(run, dataset, head="own" if own else "clusters", device=device)


def cluster_pieces(run: Run, target: AttackTarget, examples: int | None) -> list[CachedRows]:
    """The chunks of a certificate that goes by embeddings."""
    rows = partial(certificate_rows, CertifiedRun(run, target))
    own = own_versions(map(type, target.model.modules()))
    return cached_chunks(
        run, target.dataset, "certificate", examples, own, rows,
        rows_per_image=len(bounds_of(run.recipe)), digits=DIGITS, device=target.device,
    )  # fmt: skip


def certificate_rows(certified: CertifiedRun, indices: Tensor) -> pd.DataFrame:
    """One row for each bound and image."""
    model, labels = certified.model, certified.target.dataset.test_labels[indices]
    pixels = certified.pixels(indices)
    with torch.no_grad(), full_precision(pixels.device):
        embeddings = model.embed(pixels)
        predicted = _logits(model, embeddings).argmax(dim=1).cpu()
    rows = {"index": indices, "label": labels, "prediction": predicted, "correct": predicted == labels}
    tables = []
    for bound, radius in _feature_radii(certified.run, model, embeddings, certified.error).items():
        tables.append(pd.DataFrame({"bound": bound, **rows, "feature_radius": radius.double().cpu()}))
    table, (upper, lower) = pd.concat(tables, ignore_index=True), certified.lipschitz
    return table.assign(radius=table["feature_radius"] / upper, lipschitz=upper, lipschitz_lower_bound=lower)


def _logits(model: LinearClassifier | ClusterClassifier, embeddings: Tensor) -> Tensor:
    """What the model makes of embeddings that are there already."""
    if isinstance(model, LinearClassifier):
        return model.linear(embeddings)
    if model.rule == "nearest":
        return nearest_logits(embeddings, model.clusters)
    return cluster_logits(embeddings, model.clusters, neighbours=model.neighbours)


def _feature_radii(run: Run, model: nn.Module, embeddings: Tensor, error: float) -> dict[str, Tensor]:
    """The feature radius of each bound that is valid for the model."""
    if isinstance(model, LinearClassifier):
        return {"margin": margin_radius(embeddings, model.linear, embedding_error=error)}
    assert isinstance(model, ClusterClassifier)
    options = {"rule": model.rule, "neighbours": model.neighbours, "embedding_error": error}
    bounds = BOUNDS if run.recipe.guarantee == "none" else HARD_BOUNDS
    return {bound: certified_radius(embeddings, model.clusters, bound=bound, **options) for bound in bounds}


def _smoothing_rows(target: AttackTarget, recipe: Recipe, budget: SmoothingBudget, indices: Tensor) -> pd.DataFrame:
    """Certificates of the smoothed classifier; an image on which it abstains has the prediction -1 and no radius."""
    assert isinstance(recipe, Smoothing)
    labels = target.dataset.test_labels[indices]
    found = certify_smoothed(
        target.model, target.images(indices), indices=indices, noise=recipe.noise, samples=budget.samples,
        selection_samples=budget.selection_samples, failure_prob=budget.failure_prob,
    )  # fmt: skip
    predicted, radius = found.predictions.cpu(), found.radius.double().cpu()
    return pd.DataFrame(
        {
            "bound": "smoothing",
            "index": indices,
            "label": labels,
            "prediction": predicted,
            "correct": predicted == labels,
            "feature_radius": radius,
            "radius": radius,
            "lipschitz": float("nan"),
            "lipschitz_lower_bound": float("nan"),
        }
    )
