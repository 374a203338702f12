"""Slow rewrites of the core in plain loops over Python floats (double precision): the truth that tests hold it to."""

import math
from collections.abc import Sequence

Vector = Sequence[float]


def squared_distance(a: Vector, b: Vector) -> float:
    """||a - b||^2."""
    return math.fsum((x - y) ** 2 for x, y in zip(a, b, strict=True))


def squared_distances(points: Sequence[Vector], centroids: Sequence[Vector]) -> list[list[float]]:
    """One row a point, one column a centroid."""
    return [[squared_distance(z, mu) for mu in centroids] for z in points]


def logsumexp(values: Sequence[float]) -> float:
    """log sum exp, -inf for no values."""
    if not values:
        return -math.inf
    top = max(values)
    return top + math.log(math.fsum(math.exp(v - top) for v in values))


def cluster_logits(
    z: Vector,
    centroids: Sequence[Vector],
    labels: Sequence[int],
    variance: Sequence[float],
    neighbours: int | None = None,
) -> list[float]:
    """g_c(z) of one embedding; -inf for a class without a vote."""
    d2 = [squared_distance(z, mu) for mu in centroids]
    voters = sorted(range(len(d2)), key=d2.__getitem__)[: neighbours or len(d2)]
    return [logsumexp([-d2[j] / (2 * variance[j]) for j in voters if labels[j] == c]) for c in range(max(labels) + 1)]


def certified_radius(
    z: Vector,
    centroids: Sequence[Vector],
    labels: Sequence[int],
    *,
    bound: str,
    lipschitz: float = 1.0,
    predicted: int | None = None,
    correction: Sequence[float] | None = None,
) -> float:
    """The radius of one embedding, from the formulas as they are written in chapter 1.

    Args:
        predicted: the class to certify; None takes that of the nearest centroid.
        correction: what to subtract from (d_j^2 - d_i^2) / 2, for each rival j.
    """
    d2 = [squared_distance(z, mu) for mu in centroids]
    if predicted is None:
        predicted = labels[min(range(len(d2)), key=d2.__getitem__)]
    own = [i for i in range(len(d2)) if labels[i] == predicted]
    if bound != "pairwise":
        own = [min(own, key=d2.__getitem__)]
    radii = []
    for j in range(len(d2)):
        if labels[j] == predicted:
            continue
        best = -math.inf
        for i in own:
            length = math.sqrt(squared_distance(centroids[i], centroids[j]))
            if bound == "triangle":
                length = math.sqrt(d2[i]) + math.sqrt(d2[j])
            if length > 0:
                gap = (d2[j] - d2[i]) / 2 - (correction[j] if correction else 0.0)
                best = max(best, gap / (lipschitz * length))
        radii.append(best)
    return max(min(radii), 0.0)


def magnet_loss(
    embeddings: Sequence[Vector], assignments: Sequence[int], labels: Sequence[int], gap: float
) -> tuple[float, list[float], float]:
    """The stochastic magnet loss of a batch: mean, per example, variance."""
    members = {a: [n for n, b in enumerate(assignments) if b == a] for a in assignments}
    dim = range(len(embeddings[0]))
    means = {a: [math.fsum(embeddings[n][p] for n in rows) / len(rows) for p in dim] for a, rows in members.items()}
    class_of = {a: labels[rows[0]] for a, rows in members.items()}
    own = [squared_distance(z, means[a]) for z, a in zip(embeddings, assignments, strict=True)]
    variance = math.fsum(own) / (len(embeddings) - 1)
    losses = []
    for z, label, d2 in zip(embeddings, labels, own, strict=True):
        rivals = [-squared_distance(z, means[a]) / (2 * variance) for a in means if class_of[a] != label]
        losses.append(max(0.0, d2 / (2 * variance) + gap + logsumexp(rivals)))
    return math.fsum(losses) / len(losses), losses, variance


def full_magnet_loss(
    embeddings: Sequence[Vector],
    labels: Sequence[int],
    centroids: Sequence[Vector],
    cluster_labels: Sequence[int],
    variance: float,
    gap: float,
) -> list[float]:
    """The full-set form: fixed centroids, own = the nearest of the own class, rivals = all of other classes."""
    losses = []
    for z, label in zip(embeddings, labels, strict=True):
        d2 = [squared_distance(z, mu) for mu in centroids]
        own = min(d for d, c in zip(d2, cluster_labels, strict=True) if c == label)
        rivals = [-d / (2 * variance) for d, c in zip(d2, cluster_labels, strict=True) if c != label]
        losses.append(max(0.0, own / (2 * variance) + gap + logsumexp(rivals)))
    return losses


def certificate_loss(
    embeddings: Sequence[Vector],
    labels: Sequence[int],
    centroids: Sequence[Vector],
    cluster_labels: Sequence[int],
    margin: float,
    temperature: float,
    kind: str = "margin",
    annealing: float = 5.0,
) -> list[float]:
    """tau log(1 + sum_j exp((m - r_j) / tau)), r_j the signed distance to the bisector of own cluster and rival."""
    losses = []
    for z, label in zip(embeddings, labels, strict=True):
        d2 = [squared_distance(z, mu) for mu in centroids]
        own = min((j for j, c in enumerate(cluster_labels) if c == label), key=d2.__getitem__)
        radii = [
            (d2[j] - d2[own]) / (2 * math.sqrt(squared_distance(centroids[j], centroids[own])))
            for j, c in enumerate(cluster_labels)
            if c != label
        ]
        short = [(asked(r, margin, kind) - r) / temperature for r in radii]
        losses.append(annealed(temperature * logsumexp([0.0, *short]), temperature, kind, annealing))
    return losses


def asked(radius: float, margin: float, kind: str) -> float:
    """The radius that a loss asks for against one rival."""
    return min(max(radius, margin / 100), margin) if kind == "emma" else margin


def annealed(loss: float, temperature: float, kind: str, annealing: float) -> float:
    """(1 - p)^gamma times the loss -tau log p."""
    return (1 - math.exp(-loss / temperature)) ** annealing * loss if kind == "annealed" else loss


def margin_cross_entropy(
    logits: Sequence[Vector],
    labels: Sequence[int],
    weight: Sequence[Vector],
    margin: float,
    temperature: float,
    kind: str = "margin",
    annealing: float = 5.0,
) -> list[float]:
    """tau log(1 + sum_j exp((m ||w_y - w_j|| - (g_y - g_j)) / tau)) over the other classes j."""
    losses = []
    for g, y in zip(logits, labels, strict=True):
        lengths = [math.sqrt(squared_distance(weight[y], row)) for row in weight]
        others = [j for j in range(len(g)) if j != y]
        ahead = [(g[y] - g[j], lengths[j]) for j in others]
        short = [(asked(a / length, margin, kind) * length - a) / temperature for a, length in ahead]
        losses.append(annealed(temperature * logsumexp([0.0, *short]), temperature, kind, annealing))
    return losses


def shared_variance(embeddings: Sequence[Vector], assignments: Sequence[int], centroids: Sequence[Vector]) -> float:
    """sigma^2 = sum_n ||z_n - mu(n)||^2 / (N - 1)."""
    total = math.fsum(squared_distance(z, centroids[a]) for z, a in zip(embeddings, assignments, strict=True))
    return total / (len(embeddings) - 1)
