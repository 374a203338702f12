"""The battery on finished runs, cached beside them: is the paper's evaluation of this model to be believed?"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property, partial

import pandas as pd
import torch
from torch import nn

from clustr_core import data
from clustr_core.attacks.losses import cross_entropy, margin_loss
from clustr_core.attacks.paper import paper_surface
from clustr_core.measuring.diagnostics import ask_all, asked_with
from clustr_core.measuring.evaluation import CHANGES, Evaluation, random_state_kept
from clustr_core.measuring.pieces import CachedRows, cache_path, dataset_of, drawn_order, named
from clustr_core.measuring.profile import Examination, Profile
from clustr_core.measuring.targets import AttackTarget, Head, check_unchanged, heads_of, source_of, target_of
from clustr_core.training.recipes import CrossEntropy
from clustr_core.training.run import Run


def diagnostics_of(run: Run, profile: Profile, **options) -> pd.DataFrame:
    """`diagnostics.examine` of the paper's evaluation of a run, as its profile's examination says.

    Returns:
        columns ``method`` and those of `diagnostics.examine`; cross-entropy also as "ce-clusters".
    """
    return examined(run, profile, **options).diagnostics()


def ablations_of(run: Run, profile: Profile, **options) -> pd.DataFrame:
    """`Evaluation.ablations` of the paper's evaluation of a run.

    Returns:
        columns ``method change robust_accuracy drop``.
    """
    return examined(run, profile, **options).ablations()


def examined(
    run: Run, profile: Profile, *, dataset: data.Dataset | None = None, device: str | torch.device = "cpu"
) -> "ExaminedRun":
    """A run under the battery: for its diagnostics and ablations together each model and attack is needed once.

    Raises:
        ValueError: if the profile has no examination.
        FileNotFoundError: if cross-entropy, from which attacks are transferred, was never trained.
    """
    asked = profile.examination
    if asked is None:
        raise ValueError(f"profile {profile.name}: expected an entry examination, got none")
    dataset = dataset_of(run, dataset)
    other = source_of(run, profile, CrossEntropy.method, dataset)
    source = None if other is None else target_of(other, dataset, device=device)
    heads: dict[Head, ExaminedHead] = {
        head: ExaminedHead(target_of(run, dataset, head=head, device=device), source, asked) for head in heads_of(run)
    }
    return ExaminedRun(run, heads, None if other is None else other.weights_sha256)


@dataclass(frozen=True, eq=False)
class ExaminedHead:
    """One model of a run, as the paper evaluates it.

    Args:
        source: the model from which attacks are transferred.
    """

    target: AttackTarget
    source: AttackTarget | None
    asked: Examination

    @cached_property
    def evaluation(self) -> Evaluation:
        """The paper's evaluation, on the images that the profile says."""
        model, asked = self.target.model, self.asked
        indices = drawn_order(self.target.dataset)[: asked.examples].sort().values
        images, labels = self.target.images(indices), self.target.labels(indices)
        return Evaluation(paper_surface(model), model, images, labels, asked.eps, asked.steps, asked.restarts)

    def diagnostics(self) -> pd.DataFrame:
        """The rows of all checks."""
        source = None if self.source is None else self.source.model
        with random_state_kept():
            torch.manual_seed(0)
            found = ask_all(self.evaluation, source=source, queries=self.asked.queries)
        return named(self.target.name, found)

    def ablations(self) -> pd.DataFrame:
        """The rows of all changes."""
        return named(self.target.name, self.evaluation.ablations)


@dataclass(frozen=True, eq=False)
class ExaminedRun:
    """All models of a run, as the paper evaluates them.

    Args:
        source_sha256: of the weights from which attacks are transferred, if there are any.
    """

    run: Run
    heads: dict[Head, ExaminedHead]
    source_sha256: str | None

    def diagnostics(self) -> pd.DataFrame:
        """The rows of `diagnostics_of`."""
        return self._rows(self._diagnostics_pieces())

    def ablations(self) -> pd.DataFrame:
        """The rows of `ablations_of`."""
        return self._rows(self._ablation_pieces())

    def pieces(self) -> list[CachedRows]:
        """All that `diagnostics` and `ablations` need: one for each model and table."""
        return [*self._diagnostics_pieces(), *self._ablation_pieces()]

    def _diagnostics_pieces(self) -> list[CachedRows]:
        count = len(asked_with(self.source_sha256 is not None))
        return self._pieces("diagnostics", ExaminedHead.diagnostics, count, self.source_sha256)

    def _ablation_pieces(self) -> list[CachedRows]:
        return self._pieces("ablation", ExaminedHead.ablations, len(CHANGES), None)

    def _rows(self, pieces: Sequence[CachedRows]) -> pd.DataFrame:
        rows = pd.concat([piece.read() for piece in pieces], ignore_index=True)
        check_unchanged(each for head in self.heads.values() for each in (head.target, head.source))
        return rows

    def _pieces(
        self, kind: str, rows: Callable[[ExaminedHead], pd.DataFrame], count: int, source: str | None
    ) -> list[CachedRows]:
        pieces = []
        for head, each in self.heads.items():
            what = {**asdict(each.asked), "head": head, "source": source}
            path = cache_path(self.run, each.target.dataset, kind, what, device=each.target.device)
            pieces.append(CachedRows(path, partial(rows, each), count, kind=kind))
        return pieces


def plane_of_attacks(
    model: nn.Module, image: torch.Tensor, label: torch.Tensor, ends: Sequence[torch.Tensor], *, points: int = 41
) -> pd.DataFrame:
    """What the paper's attack climbs and what decides, on the plane through an image and the ends of two attacks.

    Args:
        image, label: one of each, in batches of one.
        ends: where two attacks on the image ended.
        points: of the grid, along each axis.
    Returns:
        columns ``a b loss margin`` at x + a (end_1 - x) + b (end_2 - x), clipped to [0, 1]: cross-entropy on the
        paper's surface, and the log-margin of the label, both in nats; the margin is positive where the label is lost.
    """
    steps = torch.linspace(-0.25, 1.25, points)
    grid = torch.cartesian_prod(steps, steps).to(image)
    towards = torch.cat([end - image for end in ends])
    plane = (image + torch.einsum("gk,kchw->gchw", grid, towards)).clamp(0, 1)
    labels = label.expand(len(plane))
    with torch.no_grad():
        loss, margin = cross_entropy(paper_surface(model)(plane), labels), margin_loss(model(plane), labels)
    return pd.DataFrame({"a": grid[:, 0], "b": grid[:, 1], "loss": loss, "margin": margin})
