"""The loss of a batch, one for each recipe."""

from functools import singledispatch
from typing import Any

import torch
from torch import Tensor

from clustr_core.attacks.ball import Ball, Walk, random_point, unchecked_endpoint
from clustr_core.attacks.losses import cross_entropy, kl_divergence
from clustr_core.models.classifiers import ClusterClassifier, LinearClassifier, cluster_logits
from clustr_core.models.embed import evaluating
from clustr_core.training.losses import consistency_loss, margin_cross_entropy, unchecked_certificate_loss
from clustr_core.training.recipes import (
    AdversarialTraining,
    Clustr,
    ClustrCert,
    ClustrQTrades,
    LipschitzMargin,
    Recipe,
    Smoothing,
    Trades,
)
from clustr_core.training.step import Step, Terms


@singledispatch
def objective(recipe: Recipe, step: Step) -> Terms:
    """The loss of a batch; register another implementation for another recipe."""
    return Terms(cross_entropy(step.logits(step.mine(step.images)), step.mine(step.labels)))


@objective.register
def _(recipe: AdversarialTraining, step: Step) -> Terms:
    labels = step.mine(step.labels)
    with evaluating(step.network):
        moved = unchecked_endpoint(
            lambda x: cross_entropy(step.logits(x), labels),
            step.mine(step.images),
            step.mine(random_point(step.images, recipe.eps, "linf", step.generator)),
            *_around(recipe.eps, recipe.step_size, recipe.steps),
        )
    return Terms(cross_entropy(step.logits(moved), labels))


@objective.register
def _(recipe: Trades, step: Step) -> Terms:
    images = step.mine(step.images)
    with evaluating(step.network):
        with torch.no_grad():
            clean = step.logits(images)
        noise = torch.empty_like(step.images).normal_(generator=step.generator)
        moved = unchecked_endpoint(
            lambda x: kl_divergence(clean, step.logits(x)),
            images,
            images + recipe.start_scale * step.mine(noise),
            *_around(recipe.eps, recipe.step_size, recipe.steps),
        )
    logits = step.logits(images)
    divergence = kl_divergence(logits, step.logits(moved))
    return Terms(cross_entropy(logits, step.mine(step.labels)) + recipe.trades_weight * divergence)


@objective.register
def _(recipe: Clustr, step: Step) -> Terms:
    magnet = step.magnet(step.embed(step.mine(step.images)), recipe.gap)
    return Terms(magnet, magnet)


@objective.register
def _(recipe: ClustrQTrades, step: Step) -> Terms:
    assert step.clusters is not None
    clusters, votes = step.clusters, recipe.training_neighbours
    images = step.mine(step.images)
    embeddings = step.embed(images)
    magnet = step.magnet(embeddings, recipe.gap)
    clean = cluster_logits(embeddings, clusters, neighbours=votes).detach()

    def inconsistency(images: Tensor) -> Tensor:
        return consistency_loss(clean, cluster_logits(step.embed(images), clusters, neighbours=votes))

    with evaluating(step.network):
        start = step.mine(random_point(step.images, recipe.eps, "linf", step.generator))
        moved = unchecked_endpoint(inconsistency, images, start, *_around(recipe.eps, recipe.step_size, 1))
    return Terms(magnet + recipe.consistency_weight * inconsistency(moved), magnet)


@objective.register
def _(recipe: ClustrCert, step: Step) -> Terms:
    assert isinstance(step.network, ClusterClassifier)
    embeddings, clusters = step.embed(step.mine(step.images)), step.network.clusters
    return Terms(unchecked_certificate_loss(embeddings, step.mine(step.labels), clusters, **_size(recipe)))


@objective.register
def _(recipe: LipschitzMargin, step: Step) -> Terms:
    assert isinstance(step.network, LinearClassifier)
    head = step.network.linear.weight
    embeddings = step.embed(step.mine(step.images))
    logits = torch.nn.functional.linear(embeddings, head, step.network.linear.bias)
    return Terms(margin_cross_entropy(logits, step.mine(step.labels), head, **_size(recipe)))


@objective.register
def _(recipe: Smoothing, step: Step) -> Terms:
    noise = torch.empty_like(step.images).normal_(generator=step.generator)
    noisy = step.mine(step.images + recipe.noise * noise)
    return Terms(cross_entropy(step.logits(noisy), step.mine(step.labels)))


def _size(recipe: ClustrCert | LipschitzMargin) -> dict[str, Any]:
    """What a loss on certificates takes beside embeddings."""
    kind = {"kind": recipe.loss, "annealing": recipe.annealing}
    return {"margin": recipe.margin, "temperature": recipe.temperature, **kind}


def _around(eps: float, step_size: float, steps: int) -> tuple[Ball, Walk]:
    """Where training's adversary may look, and how it walks, from one start."""
    return Ball(eps, "linf"), Walk(step_size, steps, restarts=1, seed=0)
