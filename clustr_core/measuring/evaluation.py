"""An evaluation that is judged: an attack on a surface of a model, and what else it would have found."""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property

import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from clustr_core.attacks.ball import Images, check_inputs
from clustr_core.attacks.gradient import pgd
from clustr_core.attacks.losses import cross_entropy
from clustr_core.attacks.names import PAPER_STEP_SIZE
from clustr_core.attacks.paper import paper_pgd
from clustr_core.attacks.result import AttackResult, Model, misclassified
from clustr_core.attacks.temperature import rescaled

# (surface, images, labels, eps, steps, step_size, restarts, loss, seed, watch) -> what was found; all but the first
# three by name, as `paper.paper_pgd` and `gradient.pgd` take them
Rule = Callable[..., AttackResult]
# the rule as it is, with one ingredient put right, and with all of them
CHANGES = ("released", "surface", "bookkeeping", "steps", "target", "all")


@dataclass(frozen=True)
class Evaluation:
    """An evaluation to be judged: a rule (L-inf), climbing cross-entropy on a surface, on some images.

    Args:
        surface: what the attack climbs, such as `paper.paper_surface` of the model.
        model: the same classifier's log-domain logits.
        eps: radius of the ball, in units of pixels in [0, 1].
        steps, restarts: the evaluation's budget.
        step_size: None is the released 2/255 where that many steps of it lead from the centre to the ball's border,
            else 2.5 eps / steps: what is judged is a surface and a rule, not a step far too short for the ball.
        rule: the attack; the released one unless given.
    Raises:
        ValueError: as `gradient.pgd`; or if surface and model differ in their classes, or there is no image.
    """

    surface: Model
    model: Model
    images: Images
    labels: Int[Tensor, " batch"]
    eps: float
    steps: int = 20
    restarts: int = 2
    step_size: float | None = None
    seed: int = 0
    rule: Rule = paper_pgd

    def __post_init__(self) -> None:
        """Check sizes, pixels, labels and outputs."""
        given = 1.0 if self.step_size is None else self.step_size
        check_inputs(
            self.images, self.labels, norm="linf", eps=self.eps, step_size=given, steps=self.steps,
            restarts=self.restarts,
        )  # fmt: skip
        if not len(self.images):
            raise ValueError("images: expected at least one, got none")
        misclassified(self.model, self.images[:1], self.labels[:1])
        misclassified(self.surface, self.images[:1], self.labels[:1])
        theirs, ours = (outputs_of(model, self.images[:1]).shape[1] for model in (self.surface, self.model))
        if theirs != ours:
            raise ValueError(f"surface: expected the model's {ours} classes, got {theirs}")

    @property
    def step(self) -> float:
        """The step that is taken, in units of pixels."""
        if self.step_size is not None:
            return self.step_size
        return PAPER_STEP_SIZE if self.steps * PAPER_STEP_SIZE >= self.eps else 2.5 * self.eps / self.steps

    @cached_property
    def logits(self) -> Model:
        """The model at a temperature at which cross-entropy has a gradient."""
        return rescaled(self.model, self.images)

    @property
    def attacked(self) -> AttackResult:
        """What the evaluation's attack did."""
        return self._followed[0]

    @property
    def path(self) -> "Path":
        """How it came there."""
        return self._followed[1]

    @cached_property
    def _followed(self) -> "tuple[AttackResult, Path]":
        path = Path(self.labels)
        return self.released(watch=path.add), path

    @property
    def robust(self) -> Bool[Tensor, " batch"]:
        """Which images the evaluation calls robust."""
        return ~self.attacked.success

    @property
    def robust_accuracy(self) -> float:
        """The number that the evaluation reports."""
        return share(self.robust)

    def released(self, surface: Model | None = None, **changed) -> AttackResult:
        """The evaluation's attack, on another surface or with other options of its rule."""
        options = {"eps": self.eps, "steps": self.steps, "step_size": self.step, "restarts": self.restarts}
        on = self.surface if surface is None else surface
        with _no_logits_allowed():
            return self.rule(on, self.images, self.labels, seed=self.seed, **{**options, **changed})

    def pgd(self, surface: Model, loss: str, eps: float, *, step_size: float | None = None) -> AttackResult:
        """`gradient.pgd` with the evaluation's steps and restarts; the step is 2.5 eps / steps unless given."""
        step_size = 2.5 * eps / self.steps if step_size is None else step_size
        with _no_logits_allowed():
            return pgd(
                surface, self.images, self.labels, eps=eps, step_size=step_size, steps=self.steps,
                restarts=self.restarts, loss=loss, seed=self.seed,
            )  # fmt: skip

    @cached_property
    def ablations(self) -> pd.DataFrame:
        """The rule, put right one ingredient at a time, and all at once.

        surface: cooled log-domain logits. bookkeeping: any success is kept, and the start is clipped (`gradient.pgd`).
        steps: 100 of 2.5 eps / 100. target: margin in place of cross-entropy.

        Returns:
            columns ``change robust_accuracy drop``, one row for each of `CHANGES`; ``drop`` is from "released".
        """
        many = 100
        fine = {"steps": many, "step_size": 2.5 * self.eps / many}
        results = {
            "released": self.attacked,
            "surface": self.released(self.logits),
            "bookkeeping": self.pgd(self.surface, "ce", self.eps, step_size=self.step),
            "steps": self.released(**fine),
            "target": self.released(loss="margin"),
            "all": replace(self, surface=self.logits, **fine).pgd(self.logits, "margin", self.eps),
        }
        accuracies = [share(~results[change].success) for change in CHANGES]
        table = pd.DataFrame({"change": CHANGES, "robust_accuracy": accuracies})
        return table.assign(drop=self.robust_accuracy - table["robust_accuracy"])


@dataclass(frozen=True, eq=False)
class Path:
    """What an attack saw on its way: of each image and pass of a restart, its loss and whether it was misclassified.

    Args:
        labels: of the images.
    """

    labels: Int[Tensor, " batch"]
    _passes: list[tuple[int, Tensor, Tensor, Tensor]] = field(default_factory=list)

    def add(self, restart: int, which: Int[Tensor, " active"], outputs: Float[Tensor, "active class"]) -> None:
        """Note a pass, as `result.Watch` is told of it."""
        goals = self.labels.to(which.device)[which]
        self._passes.append((restart, which, cross_entropy(outputs, goals), outputs.argmax(dim=1) != goals))

    @cached_property
    def runs(self) -> list[tuple[Float[Tensor, "step batch"], Bool[Tensor, "step batch"]]]:
        """Of each restart, the losses (NaN where an image was not seen any more), and where it was misclassified."""
        found = []
        for restart in sorted({restart for restart, *_ in self._passes}):
            passes = [seen for first, *seen in self._passes if first == restart]
            losses = torch.full((len(passes), len(self.labels)), torch.nan, dtype=torch.float64)
            wrong = torch.zeros_like(losses, dtype=torch.bool)
            for step, (which, loss, missed) in enumerate(passes):
                losses[step, which.cpu()], wrong[step, which.cpu()] = loss.double().cpu(), missed.cpu()
            found.append((losses, wrong))
        return found


def outputs_of(model: Model, images: Images) -> Float[Tensor, "batch class"]:
    """What a model returns, without gradients."""
    with torch.no_grad():
        return model(images)


def share(which: Bool[Tensor, " batch"]) -> float:
    """Of how many images something holds, in [0, 1]."""
    return which.double().mean().item()


@contextmanager
def _no_logits_allowed() -> Iterator[None]:
    """That surfaces are no logits is a finding here, and reported as one."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="model: expected logits", category=UserWarning)
        yield


@contextmanager
def random_state_kept() -> Iterator[None]:
    """For surfaces that draw: the global generators of the CPU and of every GPU are put back."""
    gpus = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    with torch.random.fork_rng(devices=list(gpus)):
        yield
