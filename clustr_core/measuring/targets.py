"""What is attacked: a model with the test set that it is measured on, each loaded once for all measurements."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Literal

import torch
from jaxtyping import Int
from torch import Tensor, nn

from clustr_core import data
from clustr_core.attacks.temperature import Rescaled, rescaled
from clustr_core.measuring.pieces import image_chunks
from clustr_core.measuring.profile import Profile
from clustr_core.models.repeated import Repeated
from clustr_core.training.captured import can_be_captured
from clustr_core.training.recipes import CrossEntropy, Recipe, run_folder
from clustr_core.training.run import Run, load_run

Head = Literal["own", "clusters"]


@dataclass(frozen=True, eq=False)
class AttackTarget:
    """A model under attack, and the test images that it is attacked on.

    Whatever attacks share is computed once: the model, its temperature, its predictions of a chunk of clean images.

    Args:
        name: what its rows are called.
        load: builds the model, on its device, in evaluation mode; called only where something is left to measure.
        identity: changes whenever the model does.
        tables: the folder in which its rows are kept.
        dataset: whose test images are attacked.
        device: where it is attacked.
        check: raises a ValueError if ``load`` would build another model by now.
    """

    name: str
    load: Callable[[], nn.Module]
    identity: str
    tables: Path
    dataset: data.Dataset
    device: str | torch.device = "cpu"
    check: Callable[[], None] = lambda: None
    _clean: dict[tuple[int, ...], Tensor] = field(default_factory=dict, init=False, repr=False)

    @cached_property
    def model(self) -> nn.Module:
        """The model."""
        return self.load()

    @cached_property
    def cooled(self) -> Rescaled:
        """The model at the temperature that the first chunk of test images asks for, whatever is attacked."""
        return rescaled(self.model, self.images(image_chunks(self.dataset, None)[0]))

    def images(self, indices: Int[Tensor, " batch"]) -> Tensor:
        """Test images in [0, 1], on the device."""
        return data.to_float(self.dataset.test_images[indices].to(self.device))

    def labels(self, indices: Int[Tensor, " batch"]) -> Int[Tensor, " batch"]:
        """Their classes, on the device."""
        return self.dataset.test_labels[indices].to(self.device)

    def clean_predictions(self, indices: Int[Tensor, " batch"]) -> Int[Tensor, " batch"]:
        """The model's classes of test images, computed once for each batch: another batch may round otherwise."""
        key = tuple(indices.tolist())
        if key not in self._clean:
            with torch.no_grad():
                self._clean[key] = self.model(self.images(indices)).argmax(dim=1)
        return self._clean[key]


def target_of(
    run: Run,
    dataset: data.Dataset,
    *,
    head: Head = "own",
    device: str | torch.device = "cpu",
    captured: bool = False,
) -> AttackTarget:
    """A run's classifier under attack; with head "clusters" the clusters fitted after training, whatever the method.

    Args:
        captured: let a GPU repeat passes through the encoder as CUDA graphs (`repeated.Repeated`), but for those of a
            Lipschitz guarantee.
    """

    def load() -> nn.Module:
        model = run.model(device) if head == "own" else run.cluster_model(device)
        if captured and can_be_captured(run.recipe):
            model.encoder = Repeated(model.encoder).eval()
        return model

    identity, tables = f"{run.weights_sha256} {head}", run.path / "tables"
    return AttackTarget(name_of(run, head), load, identity, tables, dataset, device, run.check_same)


def check_unchanged(targets: Iterable[AttackTarget | None]) -> None:
    """`AttackTarget.check` of each, once: it reads all weights."""
    for target in {id(each): each for each in targets if each is not None}.values():
        target.check()


def name_of(run: Run, head: Head) -> str:
    """What the rows of a head are called."""
    return run.recipe.method if head == "own" else f"{run.recipe.method}-clusters"


def heads_of(run: Run) -> tuple[Head, ...]:
    """What is measured of a run: cross-entropy also with clusters fitted after training, as "ce-clusters"."""
    return ("own", "clusters") if isinstance(run.recipe, CrossEntropy) else ("own",)


def check_source(recipe: Recipe, profile: Profile, method: str) -> None:
    """Raises a ValueError if the profile's recipe of a method, to transfer attacks from, is of other data."""
    source = profile.recipes.get(method)
    if source is not None and source.dataset != recipe.dataset:
        raise ValueError(
            f"dataset: expected {source.dataset!r}, as of {method} in profile {profile.name}, from which attacks are "
            f"transferred, got {recipe.dataset!r}; put both into a profile of their own"
        )


def source_of(run: Run, profile: Profile, method: str, dataset: data.Dataset) -> Run | None:
    """The profile's run of a method, to transfer attacks from; None for that run itself, or if there is no such run.

    Raises:
        ValueError: as `check_source`; if the run was trained on other images than those of the dataset today.
    """
    check_source(run.recipe, profile, method)
    recipe = profile.recipes.get(method)
    if recipe is None or recipe == run.recipe:
        return None
    source = load_run(run_folder(recipe), expected=recipe)
    source.check_data(dataset)
    return source
