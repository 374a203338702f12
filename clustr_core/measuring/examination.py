"""The diagnostics of finished runs, cached beside them: is the paper's evaluation of this model to be believed?"""

from collections.abc import Callable, Sequence
from dataclasses import asdict

import pandas as pd
import torch
from torch import nn

from clustr_core import data
from clustr_core.attacks.losses import cross_entropy, margin_loss
from clustr_core.attacks.paper import paper_surface
from clustr_core.measuring.diagnostics import Evaluation, ablation_table, examine
from clustr_core.measuring.pieces import (
    cache_path,
    dataset_of,
    heads_of,
    named,
    some_test_images,
    source_of,
    target_of,
)
from clustr_core.measuring.profile import Examination, Profile
from clustr_core.storage.tables import read_table, write_table
from clustr_core.training.recipes import CrossEntropy
from clustr_core.training.run import Run


def diagnostics_of(run: Run, profile: Profile, **options) -> pd.DataFrame:
    """`diagnostics.examine` of the paper's evaluation of a run, as its profile's examination says.

    Returns:
        columns ``method`` and those of `diagnostics.examine`; cross-entropy also as "ce-clusters".
    """
    source = source_of(run, profile, CrossEntropy.method)

    def examined(model: nn.Module, images: torch.Tensor, labels: torch.Tensor, asked: Examination) -> pd.DataFrame:
        climbed = None if source is None else source.model(images.device)
        size = {"steps": asked.steps, "restarts": asked.restarts, "queries": asked.queries}
        return examine(paper_surface(model), model, images, labels, eps=asked.eps, source=climbed, **size)

    return _of_each_head(run, profile, "diagnostics", examined, source, **options)


def ablations_of(run: Run, profile: Profile, **options) -> pd.DataFrame:
    """`diagnostics.ablation_table` of the paper's evaluation of a run.

    Returns:
        columns ``method change robust_accuracy drop``.
    """

    def changed(model: nn.Module, images: torch.Tensor, labels: torch.Tensor, asked: Examination) -> pd.DataFrame:
        budget = {"steps": asked.steps, "restarts": asked.restarts}
        return ablation_table(Evaluation(paper_surface(model), model, images, labels, asked.eps, **budget))

    return _of_each_head(run, profile, "ablation", changed, None, **options)


def _of_each_head(
    run: Run,
    profile: Profile,
    kind: str,
    compute: Callable[[nn.Module, torch.Tensor, torch.Tensor, Examination], pd.DataFrame],
    source: Run | None,
    *,
    dataset: data.Dataset | None = None,
    device: str | torch.device = "cpu",
) -> pd.DataFrame:
    asked = profile.examination
    if asked is None:
        raise ValueError(f"profile {profile.name}: expected an entry examination, got none")
    dataset = dataset_of(run, dataset)
    tables = []
    for head in heads_of(run):
        subject = target_of(run, head=head, device=device)
        what = {**asdict(asked), "head": head, "source": source.weights_sha256 if source else None}
        path = cache_path(run, dataset, kind, what)
        if not path.exists():
            _, images, labels = some_test_images(run, dataset, asked.examples)
            found = compute(subject.model, data.to_float(images.to(device)), labels.to(device), asked)
            write_table(path, named(subject.name, found))
        tables.append(read_table(path))
    return pd.concat(tables, ignore_index=True)


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
