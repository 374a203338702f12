"""Batches made of clusters: a seed, the rivals nearest to it, and a few examples of each."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from clustr_core.models.clusters import Clusters
from clustr_core.numerics.distances import squared_distances


class BadLosses(ValueError):
    """Losses that draw no seed cluster, being negative or not finite."""


class Batch(NamedTuple):
    """Indices of examples, and the cluster of each (None for batches that know no clusters)."""

    indices: Int[Tensor, " batch"]
    assignments: Int[Tensor, " batch"] | None


class ShuffledBatches:
    """One epoch of plain batches: every example once, in random order; the last batch may be short."""

    def __init__(self, count: int, *, batch_size: int, seed: int = 0) -> None:
        if count < 1 or batch_size < 1:
            raise ValueError(f"count, batch_size: expected positive numbers, got {count} and {batch_size}")
        self.count, self.batch_size = count, batch_size
        self._random = np.random.default_rng(seed)

    def __len__(self) -> int:
        return -(-self.count // self.batch_size)

    def __iter__(self) -> Iterator[Batch]:
        order = torch.from_numpy(self._random.permutation(self.count))
        return (Batch(indices, None) for indices in order.split(self.batch_size))

    def update(self, indices: Int[Tensor, " batch"], losses: Float[Tensor, " batch"]) -> None:
        """Losses do not change plain batches."""


class ClusterBatches:
    """One epoch of ceil(N / (clusters_per_batch * per_cluster)) batches of clusters.

    A batch is a seed cluster, drawn in proportion to the mean of its examples' last losses; the
    clusters_per_batch - 1 clusters of other classes with the nearest centroids; and up to ``per_cluster`` examples
    of each, without replacement. A cluster with fewer examples gives all of them.

    A cluster without a loss yet counts as much as the worst one seen; where all losses are 0, or none is known,
    seeds are uniform. So no unvisited cluster ever has probability zero.

    Args:
        assignments: the cluster of each example; batches index into these examples.
        seed: fixes every draw.
    Raises:
        ValueError: if an assignment names no cluster, a size is not positive, or there are fewer than two classes.
    Source: Rippel et al. 2016, section 3.2. Deviation from the paper's released code: there an unvisited cluster
        has probability zero, so most clusters are never seeds.
    """

    def __init__(
        self,
        clusters: Clusters,
        assignments: Int[Tensor, " example"],
        *,
        clusters_per_batch: int = 12,
        per_cluster: int = 20,
        seed: int = 0,
    ) -> None:
        self._assignments = assignments.cpu().numpy()
        count = len(clusters.centroids)
        if clusters_per_batch < 2 or per_cluster < 1:
            raise ValueError(
                "clusters_per_batch, per_cluster: expected at least 2 and 1, "
                f"got {clusters_per_batch} and {per_cluster}"
            )
        if not len(self._assignments) or self._assignments.min() < 0 or self._assignments.max() >= count:
            raise ValueError(f"assignments: expected cluster indices in 0..{count - 1}, one for each example")
        if clusters.num_classes < 2:
            raise ValueError("clusters: expected at least two classes, so that a cluster has rivals, got one")
        self.clusters_per_batch, self.per_cluster = clusters_per_batch, per_cluster
        self._members = np.argsort(self._assignments, kind="stable")
        self._sizes = np.bincount(self._assignments, minlength=count)
        self._rivals = _nearest_rivals(clusters, self._sizes > 0, clusters_per_batch - 1)
        self._starts = np.cumsum(self._sizes) - self._sizes
        self._losses = np.full(len(self._assignments), np.nan)
        self._loss_sums, self._seen = np.zeros(count), np.zeros(count, dtype=np.int64)
        self._random = np.random.default_rng(seed)

    def __len__(self) -> int:
        return -(-len(self._assignments) // (self.clusters_per_batch * self.per_cluster))

    def __iter__(self) -> Iterator[Batch]:
        return (self.draw() for _ in range(len(self)))

    def draw(self) -> Batch:
        """One batch."""
        cumulative = np.cumsum(self._seed_weights())
        seed = int(np.searchsorted(cumulative, self._random.random() * cumulative[-1], side="right"))
        chosen = [self._some_members(c) for c in (seed, *self._rivals[seed].tolist())]
        indices = np.concatenate(chosen)
        return Batch(torch.from_numpy(indices), torch.from_numpy(self._assignments[indices]))

    def update(self, indices: Int[Tensor, " batch"], losses: Float[Tensor, " batch"]) -> None:
        """Note the latest losses of some examples (each index at most once).

        Raises:
            BadLosses: if one is.
        """
        where, new = indices.cpu().numpy(), losses.detach().double().cpu().numpy()
        if not (np.isfinite(new) & (new >= 0)).all():
            raise BadLosses(f"losses: expected finite values >= 0, got {losses.min():.4g} to {losses.max():.4g}")
        old, count = self._losses[where], len(self._sizes)
        known, cluster = ~np.isnan(old), self._assignments[where]
        self._loss_sums += np.bincount(cluster, weights=new - np.where(known, old, 0), minlength=count)
        self._seen += np.bincount(cluster[~known], minlength=count)
        self._losses[where] = new

    def seed_probabilities(self) -> Float[Tensor, " cluster"]:
        """The probability of each cluster to be the next seed."""
        weights = self._seed_weights()
        return torch.from_numpy(weights / weights.sum())

    def state_dict(self) -> dict[str, Any]:
        """Everything that the next draw depends on, beside the constructor's arguments."""
        return {"random": self._random.bit_generator.state, "losses": self._losses.tolist()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state_dict`."""
        self._random.bit_generator.state = state["random"]
        losses = np.array(state["losses"])
        seen = np.flatnonzero(~np.isnan(losses))
        self._losses[:] = np.nan
        self._loss_sums[:], self._seen[:] = 0, 0
        self.update(torch.from_numpy(seen), torch.from_numpy(losses[seen]))

    def _seed_weights(self) -> np.ndarray:
        means = np.maximum(self._loss_sums, 0) / np.maximum(self._seen, 1)
        worst = means.max()
        # sums of differences may leave a rounding error where every loss is exactly zero
        if worst <= 1e-12:
            return (self._sizes > 0).astype(float)
        return np.where(self._seen > 0, means, worst) * (self._sizes > 0)

    def _some_members(self, cluster: int) -> np.ndarray:
        start, size = self._starts[cluster], self._sizes[cluster]
        if size <= self.per_cluster:
            return self._members[start : start + size]
        picked = self._random.choice(size, self.per_cluster, replace=False, shuffle=False)
        return self._members[start + picked]


def _nearest_rivals(clusters: Clusters, filled: np.ndarray, most: int) -> list[np.ndarray]:
    """For each cluster the clusters of other classes that have examples, nearest centroid first."""
    distances = squared_distances(clusters.centroids, clusters.centroids).cpu().numpy()
    labels = clusters.labels.cpu().numpy()
    usable = (labels[:, None] != labels) & filled
    order = np.where(usable, distances, np.inf).argsort(axis=1, kind="stable")
    return [row[: min(most, count)] for row, count in zip(order, usable.sum(axis=1), strict=True)]
