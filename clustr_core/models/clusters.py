"""Clusters of embeddings, and the per-class k-means that finds them."""

import numbers
import warnings
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

from clustr_core.numerics.checks import check_are_tensors
from clustr_core.numerics.distances import squared_distances
from clustr_core.numerics.groups import table_by_class
from clustr_core.numerics.kernels import dispatch
from clustr_core.numerics.rounding import working_dtype
from clustr_core.storage.gate import brief


@dataclass(frozen=True)
class Clusters:
    """K centroids in the embedding space, the class of each and the variance of each.

    Args:
        centroids: mu_1..mu_K, finite.
        labels: the class of each cluster, in 0..C-1; every class has at least one cluster.
        variance: sigma^2 of each cluster, positive; the paper shares one value among all of them.
    Raises:
        ValueError: if a shape, a label or a value is off.
    """

    centroids: Float[Tensor, "cluster dim"]
    labels: Int[Tensor, " cluster"]
    variance: Float[Tensor, " cluster"]

    def __post_init__(self) -> None:
        """Check every field; the message names the field, what came and what was expected."""
        check_are_tensors(centroids=self.centroids)
        if self.centroids.dim() != 2 or not len(self.centroids):
            raise ValueError(f"centroids: expected shape [cluster, dim], got {list(self.centroids.shape)}")
        count = len(self.centroids)
        for name in ("labels", "variance"):
            each = getattr(self, name)
            if isinstance(each, Tensor) and each.device != self.centroids.device:
                raise ValueError(f"{name}: expected the centroids' device {self.centroids.device}, got {each.device}")
            check_are_tensors(**{name: each})
            if each.shape != (count,):
                raise ValueError(
                    f"{name}: expected one entry for each of {count} centroids, got shape {list(each.shape)}"
                )
        if not self.centroids.is_floating_point():
            raise ValueError(f"centroids: expected a floating dtype, got {self.centroids.dtype}")
        if self.variance.dtype != self.centroids.dtype:
            raise ValueError(
                f"variance: expected the centroids' dtype {self.centroids.dtype}, got {self.variance.dtype}"
            )
        if not self.centroids.isfinite().all():
            raise ValueError("centroids: expected finite values, got NaN or infinity")
        if not (self.variance.isfinite() & (self.variance > 0)).all():
            raise ValueError(f"variance: expected positive finite values, got minimum {self.variance.min().item()}")
        if self.labels.dtype != torch.int64:
            # narrow integers wrap around in arithmetic: uint8 would change a certificate in silence
            object.__setattr__(self, "labels", class_indices(self.labels))
        _check_labels(self.labels)

    @property
    def num_classes(self) -> int:
        """C, the number of classes."""
        return len(self.by_class[0])

    @property
    def by_class(self) -> tuple[Int[Tensor, "class slot"], Bool[Tensor, "class slot"]]:
        """The clusters of each class, and which slots are filled (classes may differ in their number).

        Made once, and again, after a check, when the labels were changed in place. On a CPU their values tell (one may
        write to them through NumPy or ``.data``), elsewhere PyTorch's count of writes, for which nothing has to wait.
        """
        kept: tuple[Seen, Tensor, tuple[Tensor, Tensor]] | None = self.__dict__.get("_by_class")
        if kept is None or not (
            torch.equal(kept[1], self.labels) if self.labels.is_cpu else kept[0].unchanged(self.labels)
        ):
            _check_labels(self.labels)
            kept = Seen(self.labels), self.labels.clone(), table_by_class(self.labels)
            self.__dict__["_by_class"] = kept
        return kept[2]

    @property
    def all_alike(self) -> bool:
        """Whether all clusters have the same variance. Looked up once, and again as `by_class` is."""
        kept: tuple[Seen, bool] | None = self.__dict__.get("_all_alike")
        if kept is None or self.variance.is_cpu or not kept[0].unchanged(self.variance):
            kept = Seen(self.variance), bool((self.variance == self.variance[0]).all())
            self.__dict__["_all_alike"] = kept
        return kept[1]

    def gather_by_class(
        self, values: Shaped[Tensor, "batch cluster"], fill: float | bool
    ) -> Shaped[Tensor, "batch class slot"]:
        """Rearrange one value per cluster into [batch, class, slot], with ``fill`` in the empty slots."""
        columns, filled = self.by_class
        return values[:, columns].masked_fill(~filled, fill)

    @property
    def shared_variance(self) -> float:
        """The one sigma^2 of all clusters.

        Raises:
            ValueError: if the clusters have different variances.
        """
        first = self.variance[0]
        if not torch.allclose(self.variance, first, rtol=1e-6, atol=0.0):
            low, high = self.variance.min().item(), self.variance.max().item()
            raise ValueError(f"clusters: expected one shared variance, got values from {low:.6g} to {high:.6g}")
        return float(first)

    def to(self, *args, **kwargs) -> "Clusters":
        """Move or cast, as `torch.Tensor.to`; labels keep their integer dtype."""
        centroids = self.centroids.to(*args, **kwargs)
        if centroids is self.centroids:
            return self
        return replace(
            self,
            centroids=centroids,
            labels=self.labels.to(centroids.device),
            variance=self.variance.to(centroids),
        )


class Seen:
    """Tensors as they were, held so that no new tensor can take the place of an old one in memory."""

    def __init__(self, *tensors: Tensor) -> None:
        self._kept = [(tensor, None if tensor.is_inference() else tensor._version) for tensor in tensors]

    def unchanged(self, *tensors: Tensor) -> bool:
        """Whether these are the same tensors, and nothing was written to them.

        Those made in inference mode count no writes: they always count as changed.
        """
        return all(
            tensor is kept and version is not None and tensor._version == version
            for tensor, (kept, version) in zip(tensors, self._kept, strict=True)
        )


def _check_labels(labels: Int[Tensor, " cluster"]) -> None:
    if labels.min() < 0:
        raise ValueError("labels: expected class indices 0, 1, 2, ..., got negative or non-integer values")
    if missing := sorted(set(range(int(labels.max()) + 1)) - set(labels.tolist())):
        raise ValueError(f"labels: expected a cluster for every class, got none for {missing}")


def class_indices(labels: Tensor) -> Int[Tensor, "..."]:
    """Labels as int64.

    Raises:
        ValueError: if they are no integers.
    """
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise ValueError(f"labels: expected class indices 0, 1, 2, ..., got non-integer values ({labels.dtype})")
    return labels.long()


def check_are_clusters(clusters: object) -> None:
    """Raises a TypeError for anything else."""
    if not isinstance(clusters, Clusters):
        raise TypeError(f"clusters: expected Clusters, as fit_clusters gives them, got {type(clusters).__name__}")


def fit_clusters(
    embeddings: Float[Tensor, "batch dim"],
    labels: Int[Tensor, " batch"],
    *,
    per_class: int,
    n_init: int = 1,
    max_iter: int = 20,
    seed: int = 0,
) -> tuple[Clusters, Int[Tensor, " batch"]]:
    """k-means within each class; returns the clusters and the cluster of each example.

    sigma^2 = sum_n ||z_n - mu(n)||^2 / (N - 1) over all examples, one value shared by all clusters. Clusters
    are ordered by class: those of class c are c * per_class, ..., (c + 1) * per_class - 1. Half precision is computed
    in float32, and the clusters are returned in the embeddings' dtype.

    Args:
        per_class: k, the number of clusters of each class.
        n_init: independent k-means++ starts, of which the best is kept.
        max_iter: Lloyd iterations of each start.
        seed: fixes the starts; the same input and seed give the same clusters.
    Raises:
        TypeError: if embeddings or labels are no tensor.
        ValueError: if an embedding is not finite, or a class has fewer examples than ``per_class``.
    Source: Alfarra et al. 2021, section 3 (clusters and sigma^2); Arthur and Vassilvitskii 2007 (the starts).
    """
    check_are_tensors(embeddings=embeddings, labels=labels)
    if isinstance(per_class, bool) or not isinstance(per_class, numbers.Integral) or per_class < 1:
        raise ValueError(f"per_class: expected a whole number, at least 1, got {brief(per_class)}")
    if len(embeddings) != len(labels):
        raise ValueError(f"labels: expected one for each of {len(embeddings)} embeddings, got {len(labels)}")
    if labels.is_floating_point() or labels.dtype == torch.bool or not len(labels) or labels.min() < 0:
        raise ValueError("labels: expected class indices 0, 1, 2, ..., got none, negative or non-integer ones")
    if not embeddings.isfinite().all():
        bad = int((~embeddings.isfinite().all(dim=1)).sum())
        raise ValueError(f"embeddings: expected finite values, got NaN or infinity in {bad} of {len(embeddings)} rows")
    embeddings, labels = embeddings.detach(), class_indices(labels)
    counts = torch.bincount(labels)
    if len(short := (counts < per_class).nonzero()):
        label = int(short[0])
        raise ValueError(
            f"labels: class {label} has {counts[label]} examples, fewer than per_class={per_class} clusters"
        )
    kmeans = dispatch("kmeans", _sklearn_kmeans, embeddings)
    centroids, assignments = kmeans(embeddings, labels, per_class, n_init, max_iter, seed)
    cluster_labels = torch.arange(len(counts), device=labels.device).repeat_interleave(per_class)
    wide = working_dtype(embeddings.dtype, centroids.dtype)
    variance = (embeddings.to(wide) - centroids.to(wide)[assignments]).square().sum() / max(len(embeddings) - 1, 1)
    return Clusters(centroids, cluster_labels, variance.to(centroids).expand(len(centroids)).clone()), assignments


def _sklearn_kmeans(
    points: Float[Tensor, "point dim"],
    labels: Int[Tensor, " point"],
    per_class: int,
    n_init: int,
    max_iter: int,
    seed: int,
) -> tuple[Float[Tensor, "cluster dim"], Int[Tensor, " point"]]:
    """scikit-learn's Lloyd, the fastest honest choice on a CPU, class by class, each with a seed of its own.

    All fits come between all that PyTorch does: its threads and scikit-learn's go on spinning after each call, and
    disturb each other. Imported here: importing it takes as long as importing PyTorch.
    """
    from sklearn.cluster import KMeans
    from sklearn.exceptions import ConvergenceWarning

    members = [(labels == label).nonzero().squeeze(1) for label in range(int(labels.max()) + 1)]
    # NumPy knows no bfloat16
    wide = working_dtype(points.dtype, points.dtype)
    parts = [points[rows].to(wide) for rows in members]
    centroids = []
    with warnings.catch_warnings():
        # fewer distinct points than clusters: coinciding centroids are a valid (if poor) clustering
        warnings.simplefilter("ignore", ConvergenceWarning)
        for label, part in enumerate(parts):
            kmeans = KMeans(per_class, n_init=n_init, max_iter=max_iter, random_state=seed + label)  # pyright: ignore[reportArgumentType]
            centroids.append(torch.from_numpy(kmeans.fit(part.cpu().numpy()).cluster_centers_).to(points))
    assignments = torch.empty_like(labels)
    for label, (rows, part, own) in enumerate(zip(members, parts, centroids, strict=True)):
        assignments[rows] = squared_distances(part, own).argmin(dim=1) + label * per_class
    return torch.cat(centroids), assignments
