"""Measurements of finished runs: tables with one row for each example, cached beside the run."""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property, partial
from itertools import product
from pathlib import Path
from typing import Literal

import pandas as pd
import torch
from jaxtyping import Int
from torch import Tensor, nn
from tqdm.auto import tqdm

from clustr_core import attacks, data, records
from clustr_core.accuracy import best_bound
from clustr_core.attacks import AttackResult
from clustr_core.certify import HARD_BOUNDS, HardBound, certified_radius, margin_radius
from clustr_core.classifiers import ClusterClassifier, LinearClassifier, cluster_logits, nearest_logits
from clustr_core.lipschitz import lipschitz_lower_bound, lipschitz_upper_bound
from clustr_core.paper import paper_pgd, paper_surface
from clustr_core.parallel import join
from clustr_core.prototypes import pixel_prototype_rows
from clustr_core.recipes import (
    ATTACK_CODE,
    CERTIFICATE_CODE,
    SANDWICH_CODE,
    CrossEntropy,
    Profile,
    Protocol,
    Recipe,
    SandwichBudget,
    Smoothing,
    SmoothingBudget,
    code_digest,
    run_folder,
)
from clustr_core.rounding import embedding_error
from clustr_core.sandwich import measure_sandwich
from clustr_core.smoothing import certify_smoothed
from clustr_core.training import Run, load_run

# of a certificate that is vacuous anyway; of one that is meant to hold, all
BOUNDS: tuple[HardBound, ...] = ("triangle", "nearest", "pairwise")
BATCH = 256
# so many examples are measured, and kept, at one time; a temperature is taken from so many
CHUNK = 128
# images at which a lower bound on the Lipschitz constant is looked for
PROBES = 64

Head = Literal["own", "clusters"]
# the i-th of n shares, counted from 1
Share = tuple[int, int]


@dataclass(frozen=True)
class Piece:
    """A part of a measurement that is computed, and kept, at one time: the rows of some images."""

    path: Path
    rows: Callable[[], pd.DataFrame]


def compute(
    pieces: Sequence[Piece],
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
        records.write_table(mine[n].path, mine[n].rows())
    processes.wait()


def _collected(pieces: Sequence[Piece], **options) -> pd.DataFrame:
    """The rows of all pieces, as read back, so that a first and a later call give the same."""
    compute(pieces, **options)
    return pd.concat([records.read_table(piece.path) for piece in pieces], ignore_index=True)


def _by_image(table: pd.DataFrame, kind: str) -> pd.DataFrame:
    """Rows of one kind after the other, in the order in which the kinds first come; those of a kind by image."""
    order = pd.factorize(table[kind])[0]
    return table.assign(order=order).sort_values(["order", "index"], ignore_index=True).drop(columns="order")


@dataclass(frozen=True)
class Subject:
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
    source: "Subject | None" = None
    device: str | torch.device = "cpu"

    @cached_property
    def model(self) -> nn.Module:
        """The model, loaded once."""
        return self.load()


def subject_of(
    run: Run, *, head: Head = "own", source: Run | None = None, device: str | torch.device = "cpu"
) -> Subject:
    """A run's classifier as a subject; with head "clusters" the clusters fitted after training, whatever the method."""
    name = run.recipe.method if head == "own" else f"{run.recipe.method}-clusters"
    load = (lambda: run.model(device)) if head == "own" else (lambda: run.cluster_model(device))
    from_ = subject_of(source, device=device) if source is not None else None
    return Subject(name, load, f"{run.path.name} {head}", run.path / "tables", from_, device)


def measure(subject: Subject, protocol: Protocol, dataset: data.Dataset, *, progress: bool = True) -> pd.DataFrame:
    """One attack on one model: one row for each eps, loss and test image.

    Images are attacked in chunks of an order drawn once, each chunk's rows are kept as soon as it is done, so an
    interrupted measurement goes on, one on more images or another grid computes only the chunks that are new, and
    several processes or jobs share them (`compute`).

    Returns:
        columns ``attack norm eps loss steps restarts index label prediction correct adversarial_prediction robust
        gradients``. ``robust`` says that the attack did not succeed; it is false for an image misclassified when clean,
        but for the paper's rule, which does not ask. Predictions are those of the log-domain logits. ``gradients`` are
        the input gradients spent on the image. AutoAttack has no one number of steps: ``steps`` and ``restarts`` are 0.
    """
    title = f"{subject.name} {protocol.attack} {protocol.norm}"
    pieces = measure_pieces(subject, protocol, dataset)
    table = _collected(pieces, device=subject.device, title=title, progress=progress)
    return table.sort_values(["eps", "loss", "index"], ignore_index=True)


def measure_pieces(subject: Subject, protocol: Protocol, dataset: data.Dataset) -> list[Piece]:
    """All that `measure` needs, for jobs that `compute` a share of it each."""
    chunks = _drawn_order(dataset)[: protocol.examples].split(CHUNK)
    test = _test_digest(dataset)
    return [
        Piece(
            _rows_path(subject, protocol, eps, loss, chunk, test),
            partial(_attack_rows, subject, dataset, chunk, protocol, eps, loss),
        )
        for eps, loss, chunk in product(protocol.eps, protocol.climbed, chunks)
    ]


def attack_table(
    run: Run,
    protocol: Protocol,
    *,
    head: Head = "own",
    source: Run | None = None,
    dataset: data.Dataset | None = None,
    device: str | torch.device = "cpu",
    progress: bool = True,
) -> pd.DataFrame:
    """`measure` of a run's classifier.

    Args:
        head: "own" for the classifier as its method defines it, "clusters" for clusters fitted afterwards.
        source: for the attack "transfer", the run whose model is climbed.
    """
    subject = subject_of(run, head=head, source=source, device=device)
    return measure(subject, protocol, dataset_of(run, dataset), progress=progress)


def attacks_of(
    run: Run,
    profile: Profile,
    *,
    dataset: data.Dataset | None = None,
    device: str | torch.device = "cpu",
    progress: bool = True,
) -> pd.DataFrame:
    """`measure` of a run's `heads_of` under every attack of a profile; the method comes first.

    No attack is transferred from a model to itself.
    """
    dataset = dataset_of(run, dataset)
    attacked = _attacked(run, profile, device)
    tables = [named(each.name, measure(each, protocol, dataset, progress=progress)) for each, protocol in attacked]
    return pd.concat(tables, ignore_index=True)


def attack_pieces(
    run: Run, profile: Profile, *, dataset: data.Dataset | None = None, device: str | torch.device = "cpu"
) -> list[Piece]:
    """All that `attacks_of` needs, for jobs that `compute` a share of it each."""
    dataset = dataset_of(run, dataset)
    attacked = _attacked(run, profile, device)
    return [piece for each, protocol in attacked for piece in measure_pieces(each, protocol, dataset)]


def _attacked(run: Run, profile: Profile, device: str | torch.device) -> list[tuple[Subject, Protocol]]:
    """A run's models, each under every attack of a profile."""
    if not profile.attacks:
        raise ValueError(f"profile {profile.name}: expected at least one entry under attacks, got none")
    pairs = []
    for head, protocol in product(heads_of(run), profile.attacks.values()):
        source = source_of(run, profile, protocol.source) if protocol.attack == "transfer" else None
        if protocol.attack != "transfer" or source is not None:
            pairs.append((subject_of(run, head=head, source=source, device=device), protocol))
    return pairs


def certificates_of(run: Run, profile: Profile, **options) -> pd.DataFrame:
    """`certificate_table` of a run on as many images as a profile says; the method comes first."""
    budget = {"examples": profile.certified_examples, "smoothing": profile.smoothing}
    return named(run.recipe.method, certificate_table(run, **budget, **options))


def certificate_pieces(
    run: Run, profile: Profile, *, dataset: data.Dataset | None = None, device: str | torch.device = "cpu"
) -> list[Piece]:
    """All that `certificates_of` needs, for jobs that `compute` a share of it each."""
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
    dataset, per_class = dataset or data.load(some.dataset), some.per_class
    indices = _drawn_order(dataset)[: profile.certified_examples].sort().values
    return named("prototypes", pixel_prototype_rows(dataset, per_class=per_class, indices=indices))


def sandwich_of(run: Run, profile: Profile, **options) -> pd.DataFrame:
    """`sandwich_table` of a run with the budget of a profile; the method comes first."""
    return named(run.recipe.method, sandwich_table(run, _sandwich_budget(profile), **options))


def _sandwich_budget(profile: Profile) -> SandwichBudget:
    if profile.sandwich is None:
        raise ValueError(f"profile {profile.name}: expected an entry sandwich, got none")
    return profile.sandwich


def sandwich_table(
    run: Run,
    budget: SandwichBudget,
    *,
    dataset: data.Dataset | None = None,
    device: str | torch.device = "cpu",
    progress: bool = True,
) -> pd.DataFrame:
    """What the attacks that search for the nearest misclassified image find, beside what is certified.

    Certificates are computed in float64, attacks run on the model in float32.

    Returns:
        the columns of `sandwich.sandwich_rows`: one row for each attack and image.
    Raises:
        CertificateBroken: if an attack breaks a certificate; the example is kept in the run's ``counterexamples/``.
        ValueError: if the run is of a method that certifies nothing.
    """
    dataset = dataset_of(run, dataset)
    pieces = _sandwich_pieces(run, budget, dataset, device)
    table = _collected(pieces, device=device, title=f"{run.recipe.method} sandwich", progress=progress)
    return _by_image(table, "attack")


def sandwich_pieces(
    run: Run, profile: Profile, *, dataset: data.Dataset | None = None, device: str | torch.device = "cpu"
) -> list[Piece]:
    """All that `sandwich_of` needs, for jobs that `compute` a share of it each."""
    return _sandwich_pieces(run, _sandwich_budget(profile), dataset_of(run, dataset), device)


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
    table = _collected(pieces, device=device, title=f"{run.recipe.method} certificates", progress=progress)
    return _by_image(table, "bound")


def dataset_of(run: Run, dataset: data.Dataset | None) -> data.Dataset:
    """The run's dataset, loaded unless given.

    Raises:
        ValueError: if it is another one, or its training images are no longer those that the run saw.
    """
    dataset = dataset or data.load(run.recipe.dataset)
    if dataset.name != run.recipe.dataset:
        raise ValueError(f"dataset: expected {run.recipe.dataset!r} as in the run, got {dataset.name!r}")
    seen = dataset.train_images[: run.recipe.train_examples]
    if records.digest(seen.numpy().tobytes()) != run.train_images_sha256:
        raise ValueError(
            f"dataset: expected the images that {run.path.name} was trained on; {dataset.name} has changed"
        )
    return dataset


def cache_path(run: Run, dataset: data.Dataset, kind: str, what: dict, code: tuple[str, ...]) -> Path:
    """Where a measurement is kept: beside its run, under a digest of the question, the test set and the code."""
    return _kept_at(run.path / "tables", kind, what, _test_digest(dataset), code)


def _kept_at(tables: Path, kind: str, what: dict, test: str, code: tuple[str, ...]) -> Path:
    key = records.digest(json.dumps(what, sort_keys=True), test, code_digest(code))
    return tables / f"{kind}-{key[:12]}.csv"


def some_test_images(
    run: Run, dataset: data.Dataset | None, examples: int | None
) -> tuple[Int[Tensor, " batch"], Tensor, Int[Tensor, " batch"]]:
    """The first ``examples`` test images in an order drawn once for all methods: indices, bytes, labels."""
    dataset = dataset or data.load(run.recipe.dataset)
    indices = _drawn_order(dataset)[:examples].sort().values
    return indices, dataset.test_images[indices], dataset.test_labels[indices]


def predictions(model: nn.Module, images: Tensor, device: str | torch.device = "cpu") -> Int[Tensor, " batch"]:
    """Predicted classes of byte images, on the CPU."""
    with torch.no_grad():
        return torch.cat([model(data.to_float(part.to(device))).argmax(dim=1).cpu() for part in images.split(BATCH)])


def _drawn_order(dataset: data.Dataset) -> Int[Tensor, " test"]:
    return torch.randperm(len(dataset.test_labels), generator=torch.Generator().manual_seed(0))


def _test_digest(dataset: data.Dataset) -> str:
    return records.digest(dataset.test_images.numpy().tobytes(), dataset.test_labels.numpy().tobytes())


def _rows_path(subject: Subject, protocol: Protocol, eps: float, loss: str, chunk: Tensor, test: str) -> Path:
    """The file of one chunk's rows, under a digest of all that they depend on."""
    asked = replace(protocol, eps=(eps,), losses=(), examples=None, step_size=protocol.step_size_at(eps))
    source = subject.source.identity if subject.source and protocol.attack == "transfer" else None
    what = {**asdict(asked), "loss": loss, "model": subject.identity, "source": source, "chunk": chunk.tolist()}
    return _kept_at(subject.tables, "attack", what, test, ATTACK_CODE)


def _attack_rows(
    subject: Subject, dataset: data.Dataset, indices: Tensor, protocol: Protocol, eps: float, loss: str
) -> pd.DataFrame:
    """The rows of one chunk."""
    model = subject.model
    device = next(iter([*model.parameters(), *model.buffers()])).device
    images = data.to_float(dataset.test_images[indices].to(device))
    labels = dataset.test_labels[indices].to(device)
    sample = data.to_float(dataset.test_images[_drawn_order(dataset)[:CHUNK]].to(device))
    result = run_attack(model, images, labels, protocol, eps=eps, loss=loss, sample=sample, source=subject.source)
    with torch.no_grad():
        before, after = model(images).argmax(dim=1), model(result.adversarial).argmax(dim=1)
    settled = protocol.attack == "autoattack"
    columns = {
        "index": indices,
        "label": labels,
        "prediction": before,
        "correct": before == labels,
        "adversarial_prediction": after,
        "robust": ~result.success,
        "gradients": result.gradients,
    }
    return pd.DataFrame(
        {
            "attack": protocol.attack,
            "norm": protocol.norm,
            "eps": eps,
            "loss": loss,
            "steps": 0 if settled else protocol.steps,
            "restarts": 0 if settled else protocol.restarts,
            **{name: column.cpu() for name, column in columns.items()},
        }
    )


def run_attack(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    protocol: Protocol,
    *,
    eps: float,
    loss: str,
    sample: Tensor,
    source: Subject | None = None,
) -> AttackResult:
    """One attack of a protocol on one batch.

    Args:
        sample: clean images from which the temperature of the logits is taken, the same for every batch.
        source: for "transfer", the model that is climbed.
    Raises:
        ValueError: if "transfer" has no source.
    """
    size = {"eps": eps, "step_size": protocol.step_size_at(eps), "steps": protocol.steps, "seed": protocol.seed}
    if protocol.attack == "paper":
        return paper_pgd(paper_surface(model), images, labels, restarts=protocol.restarts, loss=loss, **size)
    if protocol.attack == "cell-walk":
        return attacks.cell_walk(model, images, labels, rivals=protocol.restarts, norm=protocol.norm, **size)
    if protocol.attack == "transfer":
        if source is None:
            raise ValueError("source: expected a model to transfer from, got none")
        return attacks.transfer(
            source.model, model, images, labels, restarts=protocol.restarts, norm=protocol.norm, loss=loss, **size
        )
    cooled = attacks.rescaled(model, sample)
    if protocol.attack == "pgd":
        return attacks.pgd(cooled, images, labels, restarts=protocol.restarts, norm=protocol.norm, loss=loss, **size)
    reach = {"norm": protocol.norm, "eps": eps, "seed": protocol.seed}
    if protocol.attack == "square":
        return attacks.square(cooled, images, labels, queries=protocol.steps, **reach)
    return attacks.autoattack(cooled, images, labels, **reach)


@dataclass(frozen=True)
class _Certified:
    """A run's model and the constants of its certificates: each computed once, and only if an image needs it.

    Where a certificate is meant to hold, everything is computed in float64.
    """

    run: Run
    dataset: data.Dataset
    device: str | torch.device

    @cached_property
    def model(self) -> LinearClassifier | ClusterClassifier:
        recipe = self.run.recipe
        clustered = recipe.clustered or recipe.guarantee == "none"
        model = self.run.cluster_model(self.device) if clustered else self.run.model(self.device)
        return model.double() if recipe.guarantee == "lipschitz" else model

    @cached_property
    def error(self) -> float:
        """What rounding can do to an embedding."""
        meant = self.run.recipe.guarantee == "lipschitz"
        return embedding_error(self.model.encoder, self.run.image_shape) if meant else 0.0

    @cached_property
    def lipschitz(self) -> tuple[float, float]:
        """An upper bound, and what is reached at the first images."""
        probes = self.pixels(_drawn_order(self.dataset)[:PROBES])
        upper = lipschitz_upper_bound(self.model.encoder, self.run.image_shape)
        return upper, lipschitz_lower_bound(self.model.encoder, probes)

    def pixels(self, indices: Tensor) -> Tensor:
        return data.to_float(self.dataset.test_images[indices].to(self.device)).to(next(self.model.parameters()))


def _certificate_pieces(
    run: Run,
    examples: int | None,
    smoothing: SmoothingBudget | None,
    dataset: data.Dataset,
    device: str | torch.device,
) -> list[Piece]:
    """The chunks of `certificate_table`."""
    if run.recipe.guarantee == "smoothing":
        if smoothing is None:
            raise ValueError(f"smoothing: expected a budget in the profile for {run.recipe.method}, got none")
        budget = asdict(replace(smoothing, examples=None))
        rows = partial(_smoothing_rows, subject_of(run, device=device), run.recipe, smoothing, dataset)
        return _pieces(run, dataset, "certificate", smoothing.examples, budget, CERTIFICATE_CODE, rows)
    rows = partial(_certificate_rows, _Certified(run, dataset, device))
    return _pieces(run, dataset, "certificate", examples, {}, CERTIFICATE_CODE, rows)


def _pieces(
    run: Run,
    dataset: data.Dataset,
    kind: str,
    examples: int | None,
    what: dict,
    code: tuple[str, ...],
    rows: Callable[[Tensor], pd.DataFrame],
) -> list[Piece]:
    """One piece for each chunk of as many test images, in the order drawn once."""
    chunks = [chunk.sort().values for chunk in _drawn_order(dataset)[:examples].split(CHUNK)]
    test = _test_digest(dataset)
    paths = [_kept_at(run.path / "tables", kind, {**what, "chunk": chunk.tolist()}, test, code) for chunk in chunks]
    return [Piece(path, partial(rows, chunk)) for path, chunk in zip(paths, chunks, strict=True)]


def _certificate_rows(certified: _Certified, indices: Tensor) -> pd.DataFrame:
    """One row for each bound and image."""
    model, labels = certified.model, certified.dataset.test_labels[indices]
    with torch.no_grad():
        embeddings = model.embed(certified.pixels(indices))
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


def _smoothing_rows(
    subject: Subject, recipe: Recipe, budget: SmoothingBudget, dataset: data.Dataset, indices: Tensor
) -> pd.DataFrame:
    """Certificates of the smoothed classifier; an image on which it abstains has the prediction -1 and no radius."""
    assert isinstance(recipe, Smoothing)
    images = data.to_float(dataset.test_images[indices].to(subject.device))
    labels = dataset.test_labels[indices]
    found = certify_smoothed(
        subject.model, images, indices=indices, noise=recipe.noise, samples=budget.samples,
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


def _sandwich_pieces(
    run: Run, budget: SandwichBudget, dataset: data.Dataset, device: str | torch.device
) -> list[Piece]:
    """The chunks of `sandwich_table`."""
    if run.recipe.guarantee != "lipschitz":
        raise ValueError(f"run: expected a method on a 1-Lipschitz encoder, got {run.recipe.method}")
    what = asdict(replace(budget, examples=None))
    rows = partial(_sandwich_rows, _Certified(run, dataset, device), subject_of(run, device=device), budget)
    return _pieces(run, dataset, "sandwich", budget.examples, what, SANDWICH_CODE, rows)


def _sandwich_rows(certified: _Certified, subject: Subject, budget: SandwichBudget, indices: Tensor) -> pd.DataFrame:
    """One row for each attack and image: the attacks see the model in float32."""
    run, dataset, model = certified.run, certified.dataset, subject.model
    table = _certificate_rows(certified, indices).assign(method=run.recipe.method)
    radii = torch.tensor(best_bound(table).set_index("index").loc[indices.tolist(), "radius"].tolist())
    sample = data.to_float(dataset.test_images[_drawn_order(dataset)[:CHUNK]].to(subject.device))
    pixels = data.to_float(dataset.test_images[indices].to(subject.device))
    return measure_sandwich(
        model, pixels, dataset.test_labels[indices].to(subject.device), radii.to(pixels), budget, indices=indices,
        folder=run.path / "counterexamples", temperature=attacks.rescaled(model, sample).temperature,
    )  # fmt: skip
