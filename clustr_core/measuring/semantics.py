"""Do features mean what people see? Neighbours, input gradients and inverted centroids, each judged by held-out labels.

Each measure has a control that says what it is worth: raw pixels for neighbours, wrong classes and other images for
gradients, the starts and an untrained network for inversion.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor, nn

from clustr_core import data
from clustr_core.certificates.prototypes import pixel_prototypes
from clustr_core.measuring.accuracy import binomial_interval
from clustr_core.measuring.pieces import drawn_order
from clustr_core.measuring.profile import Profile
from clustr_core.measuring.study import in_order, where, with_intervals
from clustr_core.models.classifiers import ClusterClassifier, LinearClassifier
from clustr_core.models.clusters import Clusters, fit_clusters
from clustr_core.models.embed import embed_all
from clustr_core.numerics.chunks import IMAGES_PREDICTED
from clustr_core.numerics.distances import nearest_points, squared_distances
from clustr_core.training.loop import fit
from clustr_core.training.recipes import Recipe
from clustr_core.training.run import Run, finished, new_network, training_part

# the photographs of CIFAR-10 that show vehicles; the others show animals
VEHICLES = frozenset({"airplane", "automobile", "ship", "truck"})
ANIMALS = frozenset({"bird", "cat", "deer", "dog", "frog", "horse"})
# networks that nothing was trained for, and rows of the table of inversion that no network made
UNTRAINED, UNTRAINED_LIPSCHITZ = "untrained network", "untrained, 1-Lipschitz"
STARTS, TEST_IMAGES = "the starts themselves", "test images"


@dataclass(frozen=True, eq=False)
class FeatureNetwork:
    """A classifier whose features are looked at, and clusters of its training embeddings.

    Args:
        model: logits from images in [0, 1]; its ``encoder`` gives the embeddings.
        clusters: the method's own, or fitted after training.
    """

    model: ClusterClassifier | LinearClassifier
    clusters: Clusters

    @property
    def encoder(self) -> nn.Module:
        """Embeddings from images in [0, 1]."""
        return self.model.encoder


def networks_of(profile: Profile, dataset: data.Dataset) -> dict[str, FeatureNetwork]:
    """The networks of a profile by method, those without a guarantee first; then raw pixels, and untrained encoders of
    both kinds. What is not trained yet is."""
    recipes = {**profile.ordinary, **profile.lipschitz}
    found = {method: network_of(fit(recipes[method])) for method in in_order(recipes)}
    plain, *_ = profile.ordinary.values()
    found |= {"prototypes": raw_pixels(plain, dataset), UNTRAINED: untrained(plain, dataset)}
    for recipe in list(profile.lipschitz.values())[:1]:
        found[UNTRAINED_LIPSCHITZ] = untrained(recipe, dataset)
    return found


def network_of(run: Run) -> FeatureNetwork:
    """A finished run: its own classifier, and its clusters, fitted after training if the method has none."""
    return FeatureNetwork(run.model(), run.cluster_model().clusters)


def with_clusters(network: FeatureNetwork) -> FeatureNetwork:
    """The same encoder, whose clusters decide by the soft rule: the head of ClusTR on any features."""
    model = ClusterClassifier(network.encoder, network.clusters, rule="soft")
    return FeatureNetwork(finished(model, "cpu"), network.clusters)


def untrained(recipe: Recipe, dataset: data.Dataset) -> FeatureNetwork:
    """The recipe's encoder as it is before training, with clusters of its training embeddings."""
    encoder = finished(new_network(recipe, dataset.image_shape, dataset.num_classes), "cpu").encoder
    images, labels = training_part(recipe, dataset)
    clusters, _ = fit_clusters(embed_all(encoder, images), labels, per_class=recipe.per_class, seed=recipe.seed)
    return FeatureNetwork(finished(ClusterClassifier(encoder, clusters), "cpu"), clusters)


def raw_pixels(recipe: Recipe, dataset: data.Dataset) -> FeatureNetwork:
    """The image itself as the embedding, with clusters: `prototypes.pixel_prototypes`."""
    images, labels = training_part(recipe, dataset)
    model = pixel_prototypes(images, labels, per_class=recipe.per_class, seed=recipe.seed)
    return FeatureNetwork(model, model.clusters)


# neighbours


def nearest_labels(
    queries: Float[Tensor, "query dim"],
    gallery: Float[Tensor, "gallery dim"],
    labels: Int[Tensor, " label"],
    *,
    count: int,
) -> Int[Tensor, "query count"]:
    """The labels of the ``count`` points of the gallery that are nearest to each query, nearest first.

    Raises:
        ValueError: if ``count`` is not in 1..gallery, or there is not one label for each point.
    """
    if len(gallery) != len(labels):
        raise ValueError(f"labels: expected one for each of {len(gallery)} points of the gallery, got {len(labels)}")
    return labels[nearest_points(queries, gallery, count=count)[1]]


def label_agreement(found: Int[Tensor, "query count"], labels: Int[Tensor, " query"]) -> Float[Tensor, " query"]:
    """Share of each query's neighbours that have its label: a(x) = #{i <= k : y_(i) = y} / k."""
    return (found == labels[:, None]).double().mean(dim=1)


def superclass_agreement(
    found: Int[Tensor, "query count"], labels: Int[Tensor, " query"], superclasses: Int[Tensor, " class"]
) -> Float[Tensor, " query"]:
    """Among the neighbours of *another class* than the query's, the share that has its superclass.

    s(x) = #{i <= k : y_(i) != y, S(y_(i)) = S(y)} / #{i <= k : y_(i) != y}. Training never saw a superclass, so
    that this asks for a meaning that no loss has put into the features.

    Args:
        superclasses: S, the superclass of each class.
    Returns:
        NaN for a query all of whose neighbours have its own label.
    """
    other = found != labels[:, None]
    shared = other & (superclasses[found] == superclasses[labels][:, None])
    return shared.sum(dim=1).double() / other.sum(dim=1)


def superclass_chance(
    labels: Int[Tensor, " query"], gallery_labels: Int[Tensor, " gallery"], superclasses: Int[Tensor, " class"]
) -> Float[Tensor, " query"]:
    """`superclass_agreement` of neighbours that are drawn at random among the gallery's points of other classes."""
    return superclass_agreement(gallery_labels.expand(len(labels), -1), labels, superclasses)


def superclasses_of(class_names: Sequence[str]) -> Int[Tensor, " class"] | None:
    """1 for the vehicles among the classes of CIFAR-10 and 0 for its animals; None for other classes."""
    if set(class_names) != VEHICLES | ANIMALS:
        return None
    return torch.tensor([int(name in VEHICLES) for name in class_names])


def majority(found: Int[Tensor, "query count"], num_classes: int) -> Int[Tensor, " query"]:
    """The label that most neighbours have; of equally many, that of the nearest neighbour among them."""
    votes = nn.functional.one_hot(found, num_classes).sum(dim=1)
    leading = votes.gather(1, found) == votes.amax(dim=1, keepdim=True)
    return found.gather(1, leading.int().argmax(dim=1, keepdim=True)).squeeze(1)


# input gradients


def random_targets(labels: Int[Tensor, " batch"], num_classes: int, *, seed: int = 0) -> Int[Tensor, " batch"]:
    """A wrong class for each image, each equally likely: whatever does not know it finds it once in C - 1 times.

    Raises:
        ValueError: if there are fewer than two classes.
    """
    if num_classes < 2:
        raise ValueError(f"num_classes: expected at least two, got {num_classes}")
    generator = torch.Generator().manual_seed(seed)
    return (labels + torch.randint(1, num_classes, labels.shape, generator=generator)) % num_classes


def other_targets(
    labels: Int[Tensor, " batch"], targets: Int[Tensor, " batch"], num_classes: int
) -> Int[Tensor, " batch"]:
    """For each image the next wrong class after its target, round and round; of two classes there is no other."""
    following = (targets + 1) % num_classes
    return torch.where(following == labels, (targets + 2) % num_classes, following)


def towards_gradients(
    model: nn.Module,
    images: Float[Tensor, "batch channel height width"],
    labels: Int[Tensor, " batch"],
    targets: Int[Tensor, " batch"],
) -> Float[Tensor, "batch channel height width"]:
    """The input gradient of the target's logit less the label's: G_t(x) = grad_x (g_t(x) - g_y(x)).

    Raises:
        ValueError: if a gradient is not finite.
    """
    parts = []
    for x, y, t in zip(*(each.split(IMAGES_PREDICTED) for each in (images, labels, targets)), strict=True):
        pixels = x.detach().clone().requires_grad_()
        logits = model(pixels)
        difference = logits.gather(1, t[:, None]) - logits.gather(1, y[:, None])
        parts.append(torch.autograd.grad(difference.sum(), pixels)[0])
    found = torch.cat(parts)
    if not found.isfinite().all():
        raise ValueError(f"model: expected finite input gradients, got {int((~found.isfinite()).sum())} that are not")
    return found


def class_directions(
    images: Float[Tensor, "batch pixel"],
    gallery: Float[Tensor, "gallery pixel"],
    gallery_labels: Int[Tensor, " gallery"],
    num_classes: int,
) -> Float[Tensor, "batch class pixel"]:
    """D_c(x): from each image to the nearest image of each class in the gallery, in pixels.

    Raises:
        ValueError: if a class has no image in the gallery.
    """
    counts = torch.bincount(gallery_labels, minlength=num_classes)
    if missing := (counts[:num_classes] == 0).nonzero().flatten().tolist():
        raise ValueError(f"gallery_labels: expected images of every class, got none of {missing}")
    directions = []
    for label in range(num_classes):
        mine = gallery[gallery_labels == label]
        directions.append(mine[squared_distances(images, mine).argmin(dim=1)] - images)
    return torch.stack(directions, dim=1)


def cosines(
    gradients: Float[Tensor, "batch pixel"], directions: Float[Tensor, "batch class pixel"]
) -> Float[Tensor, "batch class"]:
    """cos(G(x), D_c(x)) for each class; 0 where either is 0. A random direction of n pixels has 0 +- 1 / sqrt(n)."""
    one, other = unit_rows(gradients), unit_rows(directions)
    return (one[:, None] * other).sum(dim=2)


def target_read_off(
    aligned: Float[Tensor, "batch class"], labels: Int[Tensor, " batch"], targets: Int[Tensor, " batch"]
) -> Bool[Tensor, " batch"]:
    """Whether the gradient towards a target points more to it than to any other wrong class.

    t = argmax_{c != y} cos(G_t(x), D_c(x)). Whatever the images, a gradient that says nothing of a target drawn by
    `random_targets` is right once in C - 1 times.

    Args:
        aligned: of `cosines`, of gradients towards ``targets``.
    Source: after the perceptually aligned gradients of Tsipras et al. 2019 and Ganz et al. 2023; this count, which
        has an exact chance level, is this book's.
    """
    wrong = aligned.scatter(1, labels[:, None], -torch.inf)
    return wrong.argmax(dim=1) == targets


def saliency_alignment(
    images: Float[Tensor, "batch pixel"], gradients: Float[Tensor, "batch pixel"]
) -> Float[Tensor, " batch"]:
    """|<x, G(x)>| / (||x|| ||G(x)||), between 0 and 1; 0 where either is 0.

    Args:
        gradients: of the predicted class's logit less the runner-up's, or with the other sign.
    Source: Etmann et al. 2019, the alignment of the binarised classifier. Theirs is |<x, G>| / ||G||; divided by
        ||x|| it can be compared with the alignment of another image.
    """
    return (unit_rows(images) * unit_rows(gradients)).sum(dim=1).abs()


def unit_rows(values: Float[Tensor, "*batch pixel"]) -> Float[Tensor, "*batch pixel"]:
    """Each row divided by its length; a row of zeros stays one."""
    # by its largest entry first: the square of a small gradient underflows
    largest = values.abs().amax(dim=-1, keepdim=True)
    scaled = values / torch.where(largest > 0, largest, 1)
    length = scaled.norm(dim=-1, keepdim=True)
    return scaled / torch.where(length > 0, length, 1)


def another_image(labels: Int[Tensor, " batch"]) -> Int[Tensor, " batch"]:
    """For each image the place of the next one of another class, round and round.

    Raises:
        ValueError: if all are of one class.
    """
    if len(kinds := labels.unique()) < 2:
        raise ValueError(f"labels: expected images of at least two classes, got those of {kinds.tolist()}")
    count = len(labels)
    later = (torch.arange(count)[:, None] + torch.arange(1, count)) % count
    first = (labels[later] != labels[:, None]).int().argmax(dim=1)
    return later.gather(1, first[:, None]).squeeze(1)


# inversion of centroids


@dataclass(frozen=True, eq=False)
class Inversion:
    """What was found for each goal: images in [0, 1], and how far from the goal they and their starts are embedded."""

    images: Float[Tensor, "batch channel height width"]
    distance: Float[Tensor, " batch"]
    start_distance: Float[Tensor, " batch"]


def invert(
    encoder: nn.Module,
    goals: Float[Tensor, "batch dim"],
    starts: Float[Tensor, "start channel height width"],
    *,
    steps: int = 100,
    step_size: float = 0.1,
) -> Inversion:
    """An image whose embedding is near a goal: min_x ||f(x) - mu||^2 over [0, 1]^n, by projected gradient descent.

    x <- clip(x - eta_t sqrt(n) grad / ||grad||, 0, 1), with eta_t falling linearly to 0. The best image on the way is
    kept, so that the distance never exceeds the start's. No prior makes the image look natural.

    Args:
        goals: mu, for instance the centroids of clusters.
        starts: where each descent begins.
        step_size: eta_0, the root mean square change of a pixel in the first step.
    Raises:
        ValueError: if a start is outside [0, 1], there is not one for each goal, or a number is not positive.
    Source: Mahendran and Vedaldi 2015 (inversion of features); Engstrom et al. 2019 (without a prior, from any start,
        with steps of normalised gradients).
    """
    if len(goals) != len(starts):
        raise ValueError(f"starts: expected one for each of {len(goals)} goals, got {len(starts)}")
    if not ((starts >= 0) & (starts <= 1)).all():
        raise ValueError(f"starts: expected pixels in [0, 1], got {float(starts.min()):g} to {float(starts.max()):g}")
    if steps < 1 or step_size <= 0:
        raise ValueError(f"steps, step_size: expected positive numbers, got {steps} and {step_size}")
    x, best, found = starts.detach().clone(), starts.detach().clone(), torch.full((len(goals),), torch.inf).to(goals)
    begun, reach = found.clone(), step_size * starts[0].numel() ** 0.5
    for step in range(steps + 1):
        pixels = x.detach().requires_grad_()
        squared = (encoder(pixels) - goals).square().sum(dim=1)
        (gradient,) = torch.autograd.grad(squared.sum(), pixels)
        squared = squared.detach()
        begun = squared if step == 0 else begun
        nearer = squared < found
        found, best = torch.where(nearer, squared, found), torch.where(nearer[:, None, None, None], x, best)
        move = unit_rows(gradient.flatten(1)).view_as(x)
        x = (x - reach * (1 - step / steps) * move).clamp(0, 1)
    return Inversion(best, found.sqrt(), begun.sqrt())


def starting_images(
    shape: Sequence[int], goals: int, *, count: int, seed: int = 0
) -> Float[Tensor, "goal start channel height width"]:
    """For each goal a grey image, 1/2 everywhere, and ``count - 1`` of independent uniform pixels.

    Raises:
        ValueError: if there is no start.
    """
    if count < 1:
        raise ValueError(f"count: expected at least one start, got {count}")
    grey = torch.full((goals, 1, *shape), 0.5)
    return torch.cat([grey, torch.rand(goals, count - 1, *shape, generator=torch.Generator().manual_seed(seed))], dim=1)


@dataclass(frozen=True, eq=False)
class PixelJudge:
    """Says what an image shows, from training images in raw pixels alone: it knows no network.

    Args:
        images: training images in [0, 1], flat.
        labels: what they show.
        count: k, how many of the nearest vote.
    """

    images: Float[Tensor, "train pixel"]
    labels: Int[Tensor, " train"]
    num_classes: int
    count: int = 5

    def labels_of(self, images: Float[Tensor, "batch channel height width"]) -> Int[Tensor, " batch"]:
        """The majority of the nearest training images."""
        near = nearest_labels(images.flatten(1), self.images, self.labels, count=self.count)
        return majority(near, self.num_classes)

    def distances(self, images: Float[Tensor, "batch channel height width"]) -> Float[Tensor, " batch"]:
        """L2 distance in pixels to the nearest training image: how far an image is from all that exist."""
        return nearest_points(images.flatten(1), self.images, count=1)[0].squeeze(1).sqrt()


def pixel_judge(dataset: data.Dataset, *, count: int = 5) -> PixelJudge:
    """The judge that has seen all training images."""
    return PixelJudge(data.to_float(dataset.train_images).flatten(1), dataset.train_labels, dataset.num_classes, count)


# tables: rows of images, and their summaries


def neighbour_rows(
    networks: Mapping[str, FeatureNetwork], dataset: data.Dataset, *, count: int, examples: int | None = None
) -> pd.DataFrame:
    """The neighbours of test images among all training images, in the embedding of each network.

    Returns:
        columns ``method index label share all superclass``: `label_agreement`, whether it is 1, and
        `superclass_agreement` (NaN where there are no superclasses).
    """
    indices = drawn_order(dataset)[:examples].sort().values
    labels, superclasses, tables = dataset.test_labels[indices], superclasses_of(dataset.class_names), []
    for method, network in networks.items():
        gallery, queries = (_embedded(network, each) for each in (dataset.train_images, dataset.test_images[indices]))
        found = nearest_labels(queries, gallery, dataset.train_labels, count=count)
        share = label_agreement(found, labels)
        shared = np.nan if superclasses is None else superclass_agreement(found, labels, superclasses)
        columns = {"index": indices, "label": labels, "share": share, "all": share == 1, "superclass": shared}
        tables.append(pd.DataFrame({"method": method, **columns}))
    return pd.concat(tables, ignore_index=True)


def gradient_rows(
    networks: Mapping[str, FeatureNetwork], dataset: data.Dataset, *, examples: int | None = None, seed: int = 0
) -> pd.DataFrame:
    """The input gradients of test images, for each network.

    Returns:
        columns ``method index label target aligned elsewhere between read own other higher``: the cosine of the
        gradient towards a random target with the nearest training image of that class, the mean cosine with those of
        the other wrong classes, the cosine with the gradient towards another wrong class, and `target_read_off`;
        `saliency_alignment` of the gradient between the two likeliest classes with the image itself and with another
        image of another class, and whether the first is the larger.
    """
    indices = drawn_order(dataset)[:examples].sort().values
    images, labels = data.to_float(dataset.test_images[indices]), dataset.test_labels[indices]
    targets, flat = random_targets(labels, dataset.num_classes, seed=seed), images.flatten(1)
    gallery = data.to_float(dataset.train_images).flatten(1)
    directions = class_directions(flat, gallery, dataset.train_labels, dataset.num_classes)
    elsewhere = torch.ones(len(labels), dataset.num_classes, dtype=torch.bool)
    elsewhere = elsewhere.scatter(1, torch.stack([labels, targets], dim=1), False)
    swapped, tables = another_image(labels), []
    others = other_targets(labels, targets, dataset.num_classes)
    for method, network in networks.items():
        towards, away = (
            towards_gradients(network.model, images, labels, goal).flatten(1) for goal in (targets, others)
        )
        aligned = cosines(towards, directions)
        with torch.no_grad():
            first, second = network.model(images).topk(2, dim=1).indices.T
        saliency = towards_gradients(network.model, images, first, second).flatten(1)
        own, other = (saliency_alignment(each, saliency) for each in (flat, flat[swapped]))
        columns = {
            "index": indices,
            "label": labels,
            "target": targets,
            "aligned": aligned.gather(1, targets[:, None]).squeeze(1),
            "elsewhere": torch.where(elsewhere, aligned, torch.nan).nanmean(dim=1),
            "between": cosines(towards, away[:, None]).squeeze(1),
            "read": target_read_off(aligned, labels, targets),
            "own": own,
            "other": other,
            "higher": own > other,
        }
        tables.append(pd.DataFrame({"method": method, **columns}))
    return pd.concat(tables, ignore_index=True)


@dataclass(frozen=True, eq=False)
class Inverted:
    """The inverted centroids of all networks: their rows, and their images by method, [cluster, start, ...]."""

    rows: pd.DataFrame
    images: dict[str, Float[Tensor, "cluster start channel height width"]]


def inverted_centroids(
    networks: Mapping[str, FeatureNetwork],
    dataset: data.Dataset,
    *,
    starts: int,
    steps: int,
    judge: PixelJudge,
    seed: int = 0,
) -> Inverted:
    """Each centroid of each network inverted from each start, and judged.

    Returns:
        rows ``method cluster label start judged right reached pixel_distance``: what the judge says, whether that is
        the cluster's class, the distance in the embedding over that of the start, and the distance in pixels to the
        nearest training image. The rows of method `STARTS` are those of the starts themselves.
    """
    images, tables = {}, []
    for method, network in networks.items():
        clusters = network.clusters
        begun = starting_images(dataset.image_shape, len(clusters.centroids), count=starts, seed=seed)
        goals, flat = clusters.centroids.repeat_interleave(starts, dim=0), begun.flatten(0, 1)
        found = invert(network.encoder, goals, flat, steps=steps)
        images[method] = found.images.unflatten(0, begun.shape[:2])
        reached = found.distance / found.start_distance
        if not tables:
            tables.append(_judged(STARTS, flat, clusters, torch.ones_like(reached), judge))
        tables.append(_judged(method, found.images, clusters, reached, judge))
    return Inverted(pd.concat(tables, ignore_index=True), images)


def _judged(
    method: str, images: Tensor, clusters: Clusters, reached: Float[Tensor, " batch"], judge: PixelJudge
) -> pd.DataFrame:
    starts = len(images) // len(clusters.labels)
    cluster, start = (torch.arange(len(images)) // starts, torch.arange(len(images)) % starts)
    label, judged = clusters.labels[cluster], judge.labels_of(images)
    columns = {"cluster": cluster, "label": label, "start": start, "judged": judged, "right": judged == label}
    far = {"reached": reached, "pixel_distance": judge.distances(images)}
    return pd.DataFrame({"method": method, **columns, **far})


def judged_test_images(judge: PixelJudge, dataset: data.Dataset, *, examples: int | None = None) -> pd.DataFrame:
    """The judge on test images, in the columns of `inverted_centroids`: what it is worth, and how far test images are
    from training images."""
    indices = drawn_order(dataset)[:examples].sort().values
    images, label = data.to_float(dataset.test_images[indices]), dataset.test_labels[indices]
    judged = judge.labels_of(images)
    columns = {"label": label, "judged": judged, "right": judged == label, "pixel_distance": judge.distances(images)}
    return pd.DataFrame({"method": TEST_IMAGES, **columns})


def shares(rows: pd.DataFrame, column: str) -> pd.DataFrame:
    """The share of each method's rows for which a column holds, with its 95 % interval, in the book's order.

    Returns:
        columns ``method share low high rows``.
    Raises:
        ValueError: if the column is not one of yes and no.
    """
    if rows[column].dtype != bool:
        raise ValueError(f"column: expected one of yes and no, got {column!r} of {rows[column].dtype}")
    methods = in_order(set(rows["method"]))
    answers = [rows.loc[rows["method"] == method, column] for method in methods]
    held, counts = [int(each.sum()) for each in answers], [len(each) for each in answers]
    low, high = zip(*map(binomial_interval, held, counts), strict=True)
    found = {"share": np.divide(held, counts), "low": low, "high": high, "rows": counts}
    return pd.DataFrame({"method": methods, **found})


def in_words(rows: pd.DataFrame, *, yes_or_no: Mapping[str, str], means: Mapping[str, str]) -> pd.DataFrame:
    """A row a method: shares in per cent with their intervals, and means.

    Args:
        yes_or_no: column -> heading, of columns of yes and no.
        means: column -> heading, of columns of numbers; what is missing is left out of the mean.
    """
    methods = in_order(set(rows["method"]))
    each_method = [where(rows, rows["method"] == method) for method in methods]
    averages = {heading: [mine[column].mean() for mine in each_method] for column, heading in means.items()}
    words = {heading: with_intervals(shares(rows, column), "share") for column, heading in yes_or_no.items()}
    return pd.DataFrame({"method": methods, **averages, **words})


def rank_correlation(left: pd.Series, right: pd.Series) -> float:
    """Spearman's: the correlation of ranks, equal values sharing theirs; NaN where all of one column are equal."""
    ranks = [each.rank() for each in (left, right)]
    if any(each.nunique() < 2 for each in ranks):
        return float("nan")
    return float(np.corrcoef(np.stack(ranks))[0, 1])


def _embedded(network: FeatureNetwork, images: data.ImageBytes) -> Shaped[Tensor, "batch dim"]:
    """Embeddings of byte images; raw pixels, which have no weights and so no device, as they are."""
    if not any(True for _ in network.encoder.parameters()):
        return network.encoder(data.to_float(images))
    return embed_all(network.encoder, images)
