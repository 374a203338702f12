"""The clusters of an epoch, and those of the finished network."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from clustr_core.models.classifiers import ClusterClassifier, LinearClassifier
from clustr_core.models.clusters import Clusters, fit_clusters
from clustr_core.models.embed import embed_all
from clustr_core.numerics.chunks import rows_within
from clustr_core.numerics.distances import squared_distances
from clustr_core.training.losses import full_magnet_loss
from clustr_core.training.processes import ALONE, Processes
from clustr_core.training.recipes import Recipe, has_cluster_batches
from clustr_core.training.sampling import ClusterBatches, ShuffledBatches


def clusters_and_sampler(
    recipe: Recipe,
    encoder: nn.Module,
    images: Tensor,
    labels: Tensor,
    generator: torch.Generator,
    processes: Processes = ALONE,
) -> tuple[Clusters | None, ClusterBatches | ShuffledBatches]:
    """This epoch's clusters (from evaluation-mode embeddings) and a sampler that knows their losses.

    Images pass as the training passes them, in the precision of `processes`.
    """
    seed = int(torch.randint(2**31, (), generator=generator, device=images.device))
    if not has_cluster_batches(recipe):
        return None, ShuffledBatches(len(images), batch_size=recipe.batch_size, seed=seed)
    embeddings = embedded(processes, encoder, images, processes.computed)
    clusters, assignments = clustered(processes, recipe, embeddings, labels, seed)
    sampler = ClusterBatches(
        clusters,
        assignments,
        clusters_per_batch=recipe.clusters_per_batch,
        per_cluster=recipe.per_cluster,
        seed=seed,
    )
    mine = full_magnet_loss(processes.shard(embeddings), processes.shard(labels), clusters, gap=recipe.gap)
    sampler.update(torch.arange(len(images)), processes.gathered(mine.per_example, len(images)))
    return clusters, sampler


def embedded(
    processes: Processes,
    encoder: nn.Module,
    images: Tensor,
    passed: Callable[[nn.Module, Tensor], Tensor] | None = None,
) -> Tensor:
    """`embed_all`, of which each process does its part."""
    return processes.gathered(embed_all(encoder, processes.shard(images), passed=passed), len(images))


def clustered(
    processes: Processes, recipe: Recipe, embeddings: Tensor, labels: Tensor, seed: int
) -> tuple[Clusters, Tensor]:
    """The k-means of the first process, for all of them."""

    def fitted() -> tuple[Clusters, Tensor]:
        clusters, assignments = fit_clusters(
            embeddings,
            labels,
            per_class=recipe.per_class,
            n_init=recipe.kmeans_starts,
            max_iter=recipe.kmeans_iterations,
            seed=seed % 2**31,
        )
        return clusters.to("cpu"), assignments.cpu()

    clusters, assignments = processes.from_first(fitted)
    return clusters.to(embeddings.device), assignments.to(embeddings.device)


def final_clusters(
    recipe: Recipe,
    network: LinearClassifier | ClusterClassifier,
    images: Tensor,
    labels: Tensor,
    processes: Processes = ALONE,
) -> Clusters:
    """k-means of the final embeddings, in float32; of learnt centroids, which stay, only the variance is measured."""
    embeddings = embedded(processes, network.encoder, images)
    if not isinstance(network, ClusterClassifier):
        return clustered(processes, recipe, embeddings, labels, recipe.seed)[0]
    centroids = network.centroids.detach().clone()
    rows = rows_within(len(centroids), embeddings.dtype)
    own = torch.cat(
        [
            squared_distances(part, centroids).masked_fill(network.labels != of[:, None], torch.inf).amin(dim=1)
            for part, of in zip(embeddings.split(rows), labels.split(rows), strict=True)
        ]
    )
    return Clusters(
        centroids, network.labels.clone(), (own.sum() / max(len(own) - 1, 1)).expand(len(centroids)).clone()
    )
