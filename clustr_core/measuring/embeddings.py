"""What the embedding space looks like: maps, purity and separation, neighbours, and the path of an attack."""

from contextlib import suppress
from functools import cache, partial
from types import ModuleType

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from sklearn.metrics import silhouette_score
from torch import Tensor, nn

from clustr_core import data
from clustr_core.attacks.ball import pgd_path, random_point
from clustr_core.attacks.losses import cross_entropy, margin_loss
from clustr_core.attacks.names import Norm
from clustr_core.measuring.pieces import CachedRows, cache_path, dataset_of, some_test_images
from clustr_core.models.clusters import Clusters, fit_clusters
from clustr_core.models.embed import embed_all, predictions
from clustr_core.numerics.chunks import IMAGES_PREDICTED
from clustr_core.numerics.distances import nearest_points, squared_distances
from clustr_core.training.run import Run, training_part

# a map in the plane is begun from three eigenvectors of the graph of neighbours
UMAP_POINTS = 4


def umap_map(
    embeddings: Float[Tensor, "batch dim"], *, neighbours: int = 15, min_dist: float = 0.5, seed: int = 0
) -> Float[np.ndarray, "batch 2"]:
    """A UMAP of embeddings in the plane. Neighbourhoods mean something; distances between groups do not.

    Args:
        neighbours: at most one less than there are points is taken.
        min_dist: larger spreads the points of a group (umap-learn's default, 0.1, draws a tight cluster as a dot).
    Raises:
        ValueError: if there are fewer than four points.
    Source: McInnes et al. 2018, through umap-learn.
    """
    _check_points(len(embeddings))
    umap = _umap()
    neighbours = min(neighbours, len(embeddings) - 1)
    threads = torch.get_num_threads()
    mapper = umap.UMAP(n_neighbors=neighbours, min_dist=min_dist, random_state=seed, n_jobs=1)
    found = np.asarray(mapper.fit_transform(embeddings.cpu().numpy()), dtype=np.float64)
    # its compiler sets the threads of the whole process, PyTorch's among them
    torch.set_num_threads(threads)
    return found


@cache
def _umap() -> ModuleType:
    """umap-learn, whose machine code is kept on disk from here on: each process would compile it for 20 seconds."""
    import umap
    import umap.distances
    import umap.layouts
    import umap.utils
    from numba.core.dispatcher import Dispatcher

    modules = (umap.umap_, umap.utils, umap.layouts, umap.distances)
    compiled = [each for module in modules for each in vars(module).values() if isinstance(each, Dispatcher)]
    # where no folder may be written, numba compiles as it did
    with suppress(RuntimeError):
        for function in compiled:
            function.enable_caching()
    return umap


def _check_points(count: int) -> None:
    """Refuse what is too little for a map, before anything is embedded."""
    if count < UMAP_POINTS:
        raise ValueError(f"examples: expected at least {UMAP_POINTS} images, which a UMAP needs, got {count}")


def embedding_table(run: Run, *, examples: int | None = None, dataset: data.Dataset | None = None) -> pd.DataFrame:
    """Test images in the plane: ``index label prediction correct cluster x y``, UMAP coordinates last."""
    dataset = dataset_of(run, dataset)
    path, count = cache_path(run, dataset, "embedding", {"examples": examples}), _shown(dataset, examples)
    return CachedRows(path, lambda: _embedding_rows(run, dataset, examples), count).read()


def _embedding_rows(run: Run, dataset: data.Dataset, examples: int | None) -> pd.DataFrame:
    model = run.model()
    indices, images, labels = some_test_images(run, dataset, examples)
    embeddings = embed_all(model.encoder, images)
    cluster = squared_distances(embeddings, run.cluster_model().centroids).argmin(dim=1)
    predicted = predictions(model, images)
    x, y = umap_map(embeddings).T
    table = {"index": indices, "label": labels, "prediction": predicted, "correct": predicted == labels}
    return pd.DataFrame({**table, "cluster": cluster, "x": x, "y": y})


def _shown(dataset: data.Dataset, examples: int | None) -> int:
    """How many test images a map shows."""
    count = len(dataset.test_labels[:examples])
    _check_points(count)
    return count


def formation_table(run: Run, *, examples: int | None = None, dataset: data.Dataset | None = None) -> pd.DataFrame:
    """How clusters form: test images at each snapshot of a run.

    Returns:
        columns ``epoch index label x y own_distance rival_distance variance margin``: distances to the nearest
        centroid of the own class and of any other, of clusters fitted on that epoch's training embeddings;
        margin = (rival_distance^2 - own_distance^2) / (2 sigma^2), which the magnet loss asks to exceed the gap.
    """
    dataset = dataset_of(run, dataset)
    path, epochs = cache_path(run, dataset, "formation", {"examples": examples}), run.recipe.snapshots

    def rows() -> pd.DataFrame:
        return pd.concat([_formation_rows(run, epoch, dataset, examples) for epoch in epochs], ignore_index=True)

    return CachedRows(path, rows, len(epochs) * _shown(dataset, examples)).read()


def cluster_purity(embeddings: Float[Tensor, "batch dim"], labels: Int[Tensor, " batch"], clusters: Clusters) -> float:
    """Share of examples that belong to the majority class of the cluster they are nearest to."""
    nearest = squared_distances(embeddings, clusters.centroids).argmin(dim=1)
    counts = torch.zeros(len(clusters.centroids), int(labels.max()) + 1, device=labels.device)
    counts.index_put_((nearest, labels), torch.ones(len(labels), device=labels.device), accumulate=True)
    return float(counts.amax(dim=1).sum() / len(labels))


def separation(
    embeddings: Float[Tensor, "batch dim"], labels: Int[Tensor, " batch"], clusters: Clusters
) -> Float[Tensor, " batch"]:
    """Half the distance from each example's cluster to the nearest rival centroid, over its cluster's deviation.

    A cluster with centroid mu_A, root-mean-square deviation s and nearest rival at Delta keeps a mean feature radius
    between Delta / 2 - s and Delta / 2, so a ratio above 1 leaves something to certify. The cluster is the nearest one
    of the example's own class, the deviation that of the given examples.
    """
    distances = squared_distances(embeddings, clusters.centroids)
    own = distances.masked_fill(clusters.labels != labels[:, None], torch.inf).argmin(dim=1)
    squared = distances.gather(1, own[:, None]).squeeze(1)
    counts = torch.bincount(own, minlength=len(clusters.centroids)).clamp_min(1)
    deviation = (torch.zeros(len(counts)).to(squared).index_add(0, own, squared) / counts).sqrt()
    between = squared_distances(clusters.centroids, clusters.centroids).sqrt()
    nearest = between.masked_fill(clusters.labels[:, None] == clusters.labels, torch.inf).amin(dim=1)
    return (nearest / 2 / deviation.clamp_min(torch.finfo(squared.dtype).tiny))[own]


def geometry_table(runs: dict[str, Run], *, dataset: data.Dataset | None = None) -> pd.DataFrame:
    """Purity, silhouette and separation of each method's test embeddings, one row a method.

    Returns:
        columns ``method purity silhouette separation accuracy``: the silhouette of the true classes (-1 to 1), the
        median of `separation`, and the accuracy of the nearest-cluster rule.
    """
    rows = []
    for method, run in runs.items():
        mine = dataset_of(run, dataset)
        piece = CachedRows(cache_path(run, mine, "geometry", {}), partial(_geometry_row, run, mine), 1)
        rows.append(piece.read().assign(method=method))
    table = pd.concat(rows, ignore_index=True)
    return pd.DataFrame(table[["method", "purity", "silhouette", "separation", "accuracy"]])


def nearest_examples(
    encoder: nn.Module, queries: Tensor, gallery: Tensor, *, count: int = 5
) -> Int[Tensor, "query count"]:
    """Indices of the gallery's byte images whose embeddings lie nearest to each query's, nearest first."""
    return nearest_points(embed_all(encoder, queries), embed_all(encoder, gallery), count=count)[1]


def path_table(
    run: Run,
    image: Tensor,
    label: int,
    *,
    eps: float,
    steps: int,
    norm: Norm = "linf",
    seed: int = 0,
) -> pd.DataFrame:
    """Where an attack leads an embedding, seen between the own centroid and the rival centroid it ends nearest to.

    PGD climbs the cross-entropy of the run's own classifier. ``along`` is the position on the line from the own
    centroid (0) to the rival (1): the nearest-cluster decision flips where it crosses 1/2. ``across`` is the
    distance from that line, in the same unit.

    Returns:
        columns ``step along across loss prediction``.
    """
    model = run.model()
    clusters = run.cluster_model().clusters
    x = data.to_float(image[None])
    goal = torch.tensor([label])
    generator = torch.Generator().manual_seed(seed)
    points = list(
        pgd_path(
            lambda z: cross_entropy(model(z), goal),
            x,
            random_point(x, eps, norm, generator),
            eps=eps,
            step_size=2.5 * eps / steps,
            steps=steps,
            norm=norm,
        )
    )
    with torch.no_grad():
        pixels = torch.cat([x, *points])
        embeddings, logits = model.embed(pixels), model(pixels)
        losses = cross_entropy(logits, goal.expand(len(pixels)))
    own, rival = _own_and_rival(embeddings, label, clusters)
    line = rival - own
    length = line.norm()
    along = (embeddings - own) @ line / length.square()
    across = (embeddings - own - along[:, None] * line).norm(dim=1) / length
    columns = {"step": range(len(pixels)), "along": along, "across": across, "loss": losses}
    return pd.DataFrame({**columns, "prediction": logits.argmax(dim=1)})


def _own_and_rival(
    embeddings: Float[Tensor, "point dim"], label: int, clusters: Clusters
) -> tuple[Float[Tensor, " dim"], Float[Tensor, " dim"]]:
    """The own centroid nearest to the start, and the rival centroid nearest to the end."""
    distances = squared_distances(embeddings, clusters.centroids)
    is_own = clusters.labels == label
    own = distances[0].masked_fill(~is_own, torch.inf).argmin()
    rival = distances[-1].masked_fill(is_own, torch.inf).argmin()
    return clusters.centroids[own], clusters.centroids[rival]


def _formation_rows(run: Run, epoch: int, dataset: data.Dataset, examples: int | None) -> pd.DataFrame:
    encoder, recipe = run.encoder_at(epoch), run.recipe
    train_images, train_labels = training_part(recipe, dataset)
    train = embed_all(encoder, train_images)
    clusters, _ = fit_clusters(
        train,
        train_labels,
        per_class=recipe.per_class,
        n_init=recipe.kmeans_starts,
        max_iter=recipe.kmeans_iterations,
        seed=recipe.seed,
    )
    indices, images, labels = some_test_images(run, dataset, examples)
    embeddings = embed_all(encoder, images)
    distances = squared_distances(embeddings, clusters.centroids)
    is_own = clusters.labels == labels[:, None]
    own = distances.masked_fill(~is_own, torch.inf).amin(dim=1)
    rival = distances.masked_fill(is_own, torch.inf).amin(dim=1)
    x, y = umap_map(embeddings).T
    variance = clusters.shared_variance
    columns = {"index": indices, "label": labels, "x": x, "y": y}
    distances_of = {"own_distance": own.sqrt(), "rival_distance": rival.sqrt(), "variance": variance}
    return pd.DataFrame({"epoch": epoch, **columns, **distances_of, "margin": (rival - own) / (2 * variance)})


def _geometry_row(run: Run, dataset: data.Dataset) -> pd.DataFrame:
    model = run.cluster_model(rule="nearest")
    _, images, labels = some_test_images(run, dataset, 2000)
    embeddings, clusters = embed_all(model.encoder, images), model.clusters
    predicted = clusters.labels[squared_distances(embeddings, clusters.centroids).argmin(dim=1)]
    found = {
        "purity": cluster_purity(embeddings, labels, clusters),
        "silhouette": float(silhouette_score(embeddings.numpy(), labels.numpy())),
        "separation": float(separation(embeddings, labels, clusters).median()),
        "accuracy": float((predicted == labels).float().mean()),
    }
    return pd.DataFrame([found])


def hardest(model: nn.Module, images: Tensor, labels: Int[Tensor, " batch"], *, count: int) -> Int[Tensor, " count"]:
    """Indices of the byte images with the smallest margin of the true class, hardest first."""
    with torch.no_grad():
        logits = torch.cat([model(data.to_float(part)) for part in images.split(IMAGES_PREDICTED)])
    return margin_loss(logits, labels).topk(count).indices
