"""One step of training: what an objective sees of a batch, and the update."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from clustr_core import data
from clustr_core.models.classifiers import ClusterClassifier, LinearClassifier
from clustr_core.models.clusters import Clusters
from clustr_core.training.losses import Slots, magnet_of_slots, slots_of
from clustr_core.training.processes import ALONE, Processes
from clustr_core.training.recipes import Recipe


@dataclass(frozen=True)
class Step:
    """What an objective sees of one batch. ``clusters``, ``assignments`` and ``slots`` are for the magnet loss only.

    Every process sees the whole batch and draws what is random for all of it; it computes `mine`, its own part.
    """

    network: LinearClassifier | ClusterClassifier
    images: Float[Tensor, "batch channel height width"]
    labels: Int[Tensor, " batch"]
    generator: torch.Generator
    assignments: Int[Tensor, " batch"] | None = None
    clusters: Clusters | None = None
    processes: Processes = ALONE
    slots: Slots | None = None

    def mine(self, rows: Shaped[Tensor, "batch ..."]) -> Shaped[Tensor, "part ..."]:
        """This process's part of the batch."""
        return self.processes.shard(rows)

    def embed(self, images: Float[Tensor, "part channel height width"]) -> Float[Tensor, "part dim"]:
        """Embeddings, in the precision of the run."""
        return self.processes.computed(self.network.embed, images)

    def logits(self, images: Float[Tensor, "part channel height width"]) -> Float[Tensor, "part class"]:
        """Logits, in the precision of the run."""
        return self.processes.computed(self.network, images)

    def magnet(self, embeddings: Float[Tensor, "part dim"], gap: float) -> Float[Tensor, " part"]:
        """The magnet loss of this process's part: its centroids are means over the whole batch."""
        slots = self.slots
        if slots is None:
            assert self.assignments is not None
            slots = slots_of(self.assignments, self.labels)
        batch = self.processes.gathered(embeddings, len(self.labels))
        return self.mine(magnet_of_slots(batch, slots, gap)[0])


class Terms(NamedTuple):
    """The training loss of each example of a part, and what of it draws the next seed clusters."""

    loss: Float[Tensor, " part"]
    magnet: Float[Tensor, " part"] | None = None


def learning_rate(recipe: Recipe, epoch: float) -> float:
    """The learning rate at a time in epochs, which may lie within one."""
    if recipe.schedule == "triangle":
        progress = epoch / recipe.epochs
        return recipe.learning_rate * min(6 * progress, 1.0, (1 - progress) / 0.6)
    rate = recipe.learning_rate
    for _ in range(sum(milestone <= epoch for milestone in recipe.milestones)):
        rate *= 0.1
    return rate


def augmented(recipe: Recipe, images: Tensor, generator: torch.Generator) -> Tensor:
    """Images as the recipe augments them."""
    if recipe.augmentation == "none":
        return images
    flip = recipe.augmentation == "crop-flip"
    return data.random_crop_flip(images, generator=generator, padding=recipe.crop_padding, flip=flip)
