"""Suites about clusters: certificates, cluster logits, the magnet loss and k-means, beside GEMMs and broadcasts."""

import importlib.util
import math
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from benchmarks.harness import Call, Effort, Row, interleaved, peak_extra_megabytes, repeated
from clustr_core.certificates.ladder import certified_radius
from clustr_core.costs import broadcast_bytes
from clustr_core.models.classifiers import cluster_logits
from clustr_core.models.clusters import Clusters, fit_clusters
from clustr_core.numerics.distances import squared_distances
from clustr_core.training.losses import magnet_loss

# spread of the centroids over the spread of the embeddings around them: nearly all embeddings are then nearest to their
# own centroid, among 1,000 in 512 dimensions
SPREAD = 0.28
DTYPES = {"float32": torch.float32, "float64": torch.float64}


def scene(
    count: int, classes: int, per_class: int, dim: int, *, dtype: str = "float32", noise: bool = False
) -> tuple[Tensor, Tensor, Clusters]:
    """Gaussian embeddings, the cluster that each was drawn around, and the clusters.

    Args:
        noise: embeddings know nothing of the clusters: every rival is about as near as any other, the hard case.
    """
    generator = torch.Generator().manual_seed(0)
    kind = DTYPES[dtype]
    centroids = torch.randn(classes * per_class, dim, generator=generator, dtype=kind) * (1.0 if noise else SPREAD)
    embeddings = torch.randn(count, dim, generator=generator, dtype=kind)
    drawn = torch.randint(len(centroids), (count,), generator=generator)
    if not noise:
        embeddings += centroids[drawn]
    labels = torch.arange(classes).repeat_interleave(per_class)
    return embeddings, drawn, Clusters(centroids, labels, torch.full((len(labels),), float(dim), dtype=kind))


def broadcast_radius(embeddings: Tensor, clusters: Clusters) -> Tensor:
    """The pairwise certificate as one writes it down: every embedding with every two clusters, all at once."""
    centroids, labels = clusters.centroids, clusters.labels
    distances = (embeddings[:, None] - centroids).square().sum(dim=2)
    between = (centroids[:, None] - centroids).square().sum(dim=2).sqrt()
    predicted = labels[distances.argmin(dim=1)]
    pairs = (distances[:, None, :] - distances[:, :, None]) / (2 * between)
    own = labels == predicted[:, None]
    best = pairs.masked_fill(~own[:, :, None], -torch.inf).amax(dim=1)
    return best.masked_fill(own, torch.inf).amin(dim=1).clamp_min(0)


def broadcast_logits(embeddings: Tensor, clusters: Clusters) -> Tensor:
    """Cluster logits by differences, for classes of equal size in order."""
    distances = (embeddings[:, None] - clusters.centroids).square().sum(dim=2)
    exponents = -distances / (2 * clusters.variance)
    return exponents.unflatten(1, (clusters.num_classes, -1)).logsumexp(dim=2)


def radius_job(count: int, classes: int, per_class: int, dim: int, form: str, noise: bool = False) -> Call:
    """For a fresh process: what computes all radii once."""
    embeddings, _, clusters = scene(count, classes, per_class, dim, noise=noise)
    if form == "broadcast":
        return lambda: broadcast_radius(embeddings, clusters)
    return lambda: certified_radius(embeddings, clusters, bound="pairwise")


def certificates(effort: Effort) -> list[Row]:
    """The pairwise certificate beside the distance GEMM alone, its memory, and the broadcast where that fits."""
    count, classes, per_class, dim = effort.pick((50_000, 100, 10, 512), (300, 6, 2, 16))
    rows = []
    for noise in (False, True):
        for dtype in DTYPES:
            embeddings, drawn, clusters = scene(count, classes, per_class, dim, dtype=dtype, noise=noise)
            times = interleaved(
                {
                    "ours": partial(certified_radius, embeddings, clusters, bound="pairwise"),
                    "gemm": partial(torch.mm, embeddings, clusters.centroids.T),
                },
                effort,
            )
            right = (squared_distances(embeddings[:1000], clusters.centroids).argmin(dim=1) == drawn[:1000]).double()
            data = "pure noise" if noise else f"clustered, {100 * right.mean():.0f} % nearest to their own centroid"
            setting = f"{count:,} x {len(clusters.centroids):,} x {dim}, {data}"
            name = f"pairwise certificate, {'noise' if noise else 'clusters'}, {dtype}"
            compared = "certified_radius(pairwise) / embeddings @ centroids.T"
            rows.append(
                Row("certificates", name, times.ratio("ours", "gemm"), "ratio", compared, setting, 2.0, times.rounds)
            )
    whole = {"count": count, "classes": classes, "per_class": per_class, "dim": dim}
    for noise in effort.pick((False, True), (False,)):
        peak = peak_extra_megabytes("benchmarks.certifying:radius_job", **whole, form="ours", noise=noise)
        data = "noise" if noise else "clusters"
        setting = f"{count:,} x {classes * per_class:,} x {dim}, float32, fresh process"
        rows.append(Row("certificates", f"peak extra memory, {data}", peak, "MB", "certified_radius", setting, 256.0))
    size = broadcast_bytes(count, classes * per_class, dim) / 1e6
    setting = f"{count:,} x {classes * per_class:,} x {dim}, float32, by arithmetic"
    rows.append(Row("certificates", "the same as a broadcast", size, "MB", "differences and pairs", setting))
    return [*rows, *_beside_broadcast(effort)]


def _beside_broadcast(effort: Effort) -> list[Row]:
    small = effort.pick(
        {"count": 512, "classes": 20, "per_class": 10, "dim": 128},
        {"count": 40, "classes": 5, "per_class": 2, "dim": 8},
    )
    embeddings, _, clusters = scene(**small)
    expected, found = broadcast_radius(embeddings, clusters), certified_radius(embeddings, clusters)
    # ours is rounded down by a bound on all roundings
    if not ((found <= expected * (1 + 1e-5)) & (found >= expected * 0.99 - 1e-2)).all():
        raise ValueError("broadcast_radius: expected the radii of certified_radius")
    times = interleaved(
        {
            "ours": partial(certified_radius, embeddings, clusters),
            "broadcast": partial(broadcast_radius, embeddings, clusters),
        },
        effort,
    )
    shape = f"{small['count']:,} x {len(clusters.centroids):,} x {small['dim']}, float32"
    peaks = {
        form: peak_extra_megabytes("benchmarks.certifying:radius_job", **small, form=form)
        for form in ("ours", "broadcast")
    }
    predicted = broadcast_bytes(small["count"], len(clusters.centroids), small["dim"]) / 1e6
    return [
        Row("certificates", "pairwise beside the broadcast", times.ratio("ours", "broadcast"), "ratio",
            "certified_radius(pairwise) / broadcast in PyTorch", shape, rounds=times.rounds),
        Row("certificates", "peak memory of the broadcast", peaks["broadcast"], "MB", "broadcast in PyTorch",
            f"{shape}; {predicted:.0f} MB in its two largest tables by arithmetic"),
        Row("certificates", "peak memory of ours at that size", peaks["ours"], "MB", "certified_radius", shape),
    ]  # fmt: skip


def logits(effort: Effort) -> list[Row]:
    """Cluster logits forward and backward, beside their GEMMs and the broadcast."""
    count, classes, per_class, dim = effort.pick((4096, 100, 10, 512), (30, 6, 2, 8))
    embeddings, _, clusters = scene(count, classes, per_class, dim)
    upstream = torch.randn(count, classes, generator=torch.Generator().manual_seed(1))
    weights = torch.randn(count, classes * per_class, generator=torch.Generator().manual_seed(2))
    rows = []
    # checked and sorted once, as a model does it
    with_gradient = replace(clusters, centroids=clusters.centroids.clone().requires_grad_())
    for learnt, given in ((False, clusters), (True, with_gradient)):
        times = interleaved(
            {
                "ours": partial(_forward_backward, cluster_logits, embeddings, given, upstream),
                "gemms": partial(_logit_products, embeddings, clusters.centroids, weights, learnt),
            },
            effort,
        )
        products = "z mu', G mu and G' z" if learnt else "z mu' and G mu"
        rows.append(
            Row("logits", f"cluster logits, {'centroids learnt' if learnt else 'centroids fixed'}",
                times.ratio("ours", "gemms"), "ratio", f"cluster_logits forward + backward / {products}",
                f"{count:,} x {classes * per_class:,} x {dim}, float32", 1.5, times.rounds)
        )  # fmt: skip
    few = effort.pick(128, 10)
    part = embeddings[:few]
    torch.testing.assert_close(cluster_logits(part, clusters), broadcast_logits(part, clusters), rtol=1e-4, atol=1e-4)
    times = interleaved(
        {
            form.__name__: partial(_forward_backward, form, part, with_gradient, upstream[:few])
            for form in (cluster_logits, broadcast_logits)
        },
        effort,
    )
    ratio = times.ratio("cluster_logits", "broadcast_logits")
    shape = f"{few:,} x {classes * per_class:,} x {dim}, float32, centroids learnt"
    compared = "forward + backward / the same by broadcast in PyTorch"
    return [*rows, Row("logits", "beside the broadcast", ratio, "ratio", compared, shape, rounds=times.rounds)]


def _forward_backward(form, embeddings: Tensor, clusters: Clusters, upstream: Tensor) -> list[Tensor]:
    """Logits, and their gradients by the embeddings and, if they are learnt, the centroids."""
    points = embeddings.detach().requires_grad_()
    leaves = [points, clusters.centroids] if clusters.centroids.requires_grad else [points]
    return list(torch.autograd.grad(form(points, clusters), leaves, upstream))


def _logit_products(embeddings: Tensor, centroids: Tensor, weights: Tensor, learnt: bool) -> list[Tensor]:
    products = [embeddings @ centroids.T, weights @ centroids]
    return [*products, weights.T @ embeddings] if learnt else products


def magnet(effort: Effort) -> list[Row]:
    """The stochastic magnet loss forward and backward, beside its four GEMMs: bare, and as autograd takes them."""
    clusters, per_cluster, dim = effort.pick((12, 20, 512), (4, 3, 8))
    batch, times_each = clusters * per_cluster, effort.pick(20, 1)
    generator = torch.Generator().manual_seed(0)
    embeddings = torch.randn(batch, dim, generator=generator)
    assignments = torch.arange(clusters).repeat_interleave(per_cluster)
    labels = assignments // 2
    one_hot = torch.nn.functional.one_hot(assignments).float()
    means = one_hot.T @ embeddings / per_cluster
    weights = torch.randn(batch, clusters, generator=generator)

    def ours() -> None:
        points = embeddings.detach().requires_grad_()
        magnet_loss(points, assignments, labels).loss.backward()

    def bare() -> list[Tensor]:
        return [one_hot.T @ embeddings, embeddings @ means.T, weights @ means, weights.T @ embeddings]

    def by_autograd() -> None:
        points = embeddings.detach().requires_grad_()
        # the means' own gradient needs a fifth
        (points @ (one_hot.T @ points).T).backward(weights)

    forms = {"ours": ours, "bare": bare, "by autograd": by_autograd}
    times = interleaved({name: repeated(form, times_each) for name, form in forms.items()}, effort)
    size = f"{batch} x {dim} x {clusters}, float32"
    rows = [
        ("magnet loss", "bare", "one-hot' z, z mu', G mu, G' z", 3.5),
        ("magnet loss, beside autograd", "by autograd", "z (one-hot' z)' forward + backward by autograd", math.nan),
    ]
    return [
        Row(
            "magnet", name, times.ratio("ours", other), "ratio", f"magnet_loss forward + backward / {compared}",
            f"{size}; {1e3 * times.median(other) / times_each:.3f} ms for the GEMMs", target, times.rounds,
        )
        for name, other, compared, target in rows
    ]  # fmt: skip


def kmeans(effort: Effort) -> list[Row]:
    """Per-class k-means beside scikit-learn's and faiss's in a plain loop over the classes, one start each."""
    from sklearn.cluster import KMeans  # two seconds, in each fresh process that measures something else

    count, classes, per_class, dim = effort.pick((20_000, 10, 10, 512), (120, 3, 2, 8))
    points, drawn, clusters = scene(count, classes, per_class, dim)
    labels = clusters.labels[drawn]
    parts = [points[labels == label] for label in range(classes)]

    def ours() -> float:
        return float(fit_clusters(points, labels, per_class=per_class)[0].variance[0]) * (count - 1)

    def sklearn() -> float:
        return sum(
            KMeans(per_class, n_init=1, max_iter=20, random_state=0).fit(part.numpy()).inertia_ for part in parts
        )

    calls: dict[str, Call] = {"fit_clusters": ours, "scikit-learn": sklearn}
    if importlib.util.find_spec("faiss"):
        calls["faiss"] = partial(_faiss_inertia, parts, per_class)
    times = interleaved(calls, effort)
    inertia = {name: call() for name, call in calls.items()}
    setting = f"{count:,} embeddings, {classes} classes, {per_class} clusters each, {dim} dimensions, 20 iterations"
    rows = []
    for name in ("scikit-learn", "faiss"):
        known = name in calls
        for what, unit in (("time", "ratio"), ("inertia", "ratio")):
            found = math.nan
            if known:
                found = times.ratio("fit_clusters", name) if what == "time" else inertia["fit_clusters"] / inertia[name]
            where = setting if known else f"{name} is not installed here"
            compared = f"{what} of fit_clusters / {what} of {name}"
            rows.append(
                Row("kmeans", f"k-means beside {name}, {what}", found, unit, compared, where, rounds=times.rounds)
            )
    return rows


def _faiss_inertia(parts: list[Tensor], per_class: int) -> float:
    import faiss

    faiss.omp_set_num_threads(torch.get_num_threads())
    total = 0.0
    for part in parts:
        fitted = faiss.Kmeans(part.shape[1], per_class, niter=20, seed=1, max_points_per_centroid=len(part))
        fitted.train(part.numpy())
        total += float(fitted.index.search(part.numpy(), 1)[0].sum())
    return total
