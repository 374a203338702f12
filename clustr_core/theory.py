"""What the theory chapters need beyond the core: proof steps, counterexamples, an oracle, a search.

No certificate lives here. `exact_nearest_rule_distance` is the ground truth that certificates are held against,
`second_nearest_radius_unsound` is a mistake shown for what it is, and the search only ever finds upper bounds on
the distance to another class. Everything runs in float64.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import sympy as sp
import torch
from jaxtyping import Float
from scipy.optimize import nnls
from torch import Tensor

from clustr_core.certify import HARD_BOUNDS, SOFT_BOUNDS, HardBound, certified_radius
from clustr_core.classifiers import Rule, cluster_logits, nearest_logits
from clustr_core.clusters import Clusters
from clustr_core.distances import flat_norm, squared_distances

Encode = Callable[[Tensor], Tensor]


# --- the proof, step by step -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ProofStep:
    """One step of the proof as an algebraic identity: left side minus right side.

    Args:
        name: as the chapter calls it.
        statement: the identity in LaTeX.
        residual: the two sides' difference; the step holds when it simplifies to zero.
    """

    name: str
    statement: str
    residual: sp.Expr

    @property
    def holds(self) -> bool:
        """Whether the residual is identically zero."""
        return sp.cancel(self.residual) == 0


def proof_steps(dim: int = 3) -> tuple[ProofStep, ...]:
    """Every step of the theorem's proof and of its sharpness, on vectors of ``dim`` symbolic coordinates.

    Both sides of each step are sums over coordinates, or over pairs of coordinates, of one and the same expression
    (or follow from such a step by substitution), so ``dim`` = 2 already proves it for every dimension.

    Raises:
        ValueError: if ``dim`` is below 2, where a pair of coordinates does not exist.
    Source: chapter 1, eq-identity to eq-extremal.
    """
    if dim < 2:
        raise ValueError(f"dim: expected at least 2, got {dim}")
    z, v, own, rival = (_vector(name, dim) for name in ("z", "v", "a", "b"))
    w = rival - own
    before, after = (_gap(point, own, rival) for point in (z, z + v))
    crossing = w * before / (2 * w.dot(w))
    minors = sum((v[p] * w[q] - v[q] * w[p]) ** 2 for p in range(dim) for q in range(p))
    inner = (z - own).dot(z - rival)
    return (
        ProofStep(
            "identity",
            r"d_j(z+v)^2 - d_i(z+v)^2 = d_j^2 - d_i^2 - 2\langle v, \mu_j - \mu_i\rangle",
            after - (before - 2 * v.dot(w)),
        ),
        ProofStep(
            "Cauchy-Schwarz",
            r"\|v\|^2\|w\|^2 - \langle v, w\rangle^2 = \sum_{p<q}(v_p w_q - v_q w_p)^2",
            v.dot(v) * w.dot(w) - v.dot(w) ** 2 - minors,
        ),
        ProofStep(
            "law of cosines",
            r"\|\mu_j - \mu_i\|^2 = d_i^2 + d_j^2 - 2\langle z - \mu_i, z - \mu_j\rangle",
            w.dot(w) - ((z - own).dot(z - own) + (z - rival).dot(z - rival) - 2 * inner),
        ),
        _dominance_step(),
        ProofStep(
            "separation minus deviation",
            r"d_j^2 - d_i^2 = \|\mu_j - \mu_i\|^2 - 2\langle z - \mu_i, \mu_j - \mu_i\rangle",
            before - (w.dot(w) - 2 * (z - own).dot(w)),
        ),
        ProofStep(
            "crossing point",
            r"d_j(z+v^*)^2 = d_i(z+v^*)^2,\quad v^* = \frac{d_j^2-d_i^2}{2\|\mu_j-\mu_i\|^2}(\mu_j-\mu_i)",
            _gap(z + crossing, own, rival),
        ),
        ProofStep(
            "its length",
            r"\|v^*\|^2 = \Bigl(\frac{d_j^2-d_i^2}{2\|\mu_j-\mu_i\|}\Bigr)^2",
            crossing.dot(crossing) - before**2 / (4 * w.dot(w)),
        ),
        *_extremal_steps(dim),
    )


def broken_step(dim: int = 3) -> ProofStep:
    """The first identity with a wrong sign: the check must refuse it, or it checks nothing."""
    first = proof_steps(dim)[0]
    v, w = _vector("v", dim), _vector("b", dim) - _vector("a", dim)
    wrong = r"d_j(z+v)^2 - d_i(z+v)^2 = d_j^2 - d_i^2 + 2\langle v, \mu_j - \mu_i\rangle"
    return ProofStep("identity with a wrong sign", wrong, first.residual - 4 * v.dot(w))


def _dominance_step() -> ProofStep:
    near, far, length = sp.symbols("d_i d_j ell", positive=True)
    gain = (far**2 - near**2) / (2 * length) - (far - near) / 2
    return ProofStep(
        "dominance",
        r"\frac{d_j^2-d_i^2}{2\ell} - \frac{d_j-d_i}{2} = \frac{(d_j-d_i)(d_i+d_j-\ell)}{2\ell}",
        gain - (far - near) * (near + far - length) / (2 * length),
    )


def _extremal_steps(dim: int) -> tuple[ProofStep, ProofStep]:
    """f(x) = z + L <u, x - x0> (p - z) / ||p - z||, with unit u: its gain, and where it arrives."""
    z, p, start, moved, along = (_vector(name, dim) for name in ("z", "p", "x", "y", "t"))
    lipschitz = sp.symbols("L", positive=True)
    reach = sp.sqrt((p - z).dot(p - z))
    u = along / sp.sqrt(along.dot(along))

    def f(x: sp.Matrix) -> sp.Matrix:
        return z + lipschitz * u.dot(x - start) * (p - z) / reach

    change, arrived = f(moved) - f(start), f(start + u * reach / lipschitz)
    return (
        ProofStep(
            "the extremal map is L-Lipschitz",
            r"\|f(y) - f(x)\|^2 = L^2\langle u, y - x\rangle^2",
            change.dot(change) - lipschitz**2 * u.dot(moved - start) ** 2,
        ),
        ProofStep(
            "and arrives",
            r"f\bigl(x_0 + \tfrac{1}{L}\|p - z\|\,u\bigr) = p",
            (arrived - p).dot(arrived - p),
        ),
    )


def _vector(name: str, dim: int) -> sp.Matrix:
    return sp.Matrix(sp.symbols(f"{name}1:{dim + 1}", real=True))


def _gap(point: sp.Matrix, own: sp.Matrix, rival: sp.Matrix) -> sp.Expr:
    """d_j^2 - d_i^2 at a point."""
    return (point - rival).dot(point - rival) - (point - own).dot(point - own)


def proof_table(steps: Sequence[ProofStep]) -> pd.DataFrame:
    """One row for each step: its name, the residual after simplification, and whether that is zero."""
    rows = [(step.name, str(sp.cancel(step.residual)), step.holds) for step in steps]
    return pd.DataFrame(rows, columns=["step", "residual", "holds"])


def numeric_table(*, configurations: int, dim: int, seed: int) -> pd.DataFrame:
    """The same steps in float64 on random vectors: the worst relative error of each identity and inequality.

    Errors are relative to the lengths of the configuration. For an inequality it is the excess of the side that
    should be smaller: a negative worst error means that it held every time with room to spare.

    Args:
        configurations: how many draws of (z, v, mu_i, mu_j), with mu_i the nearer centroid.
    """
    generator = torch.Generator().manual_seed(seed)
    shape = (configurations, dim)
    z, v, first, second = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(4))
    swap = flat_norm(z - first) > flat_norm(z - second)
    own = torch.where(swap[:, None], second, first)
    rival = torch.where(swap[:, None], first, second)
    errors = {**_identity_errors(z, v, own, rival), **_inequality_errors(z, v, own, rival)}
    rows = [(name, kind, configurations, float(error.max())) for (name, kind), error in errors.items()]
    return pd.DataFrame(rows, columns=["step", "kind", "configurations", "worst_error"])


def _identity_errors(z: Tensor, v: Tensor, own: Tensor, rival: Tensor) -> dict[tuple[str, str], Tensor]:
    near, far = flat_norm(z - own), flat_norm(z - rival)
    w, length = rival - own, flat_norm(rival - own)
    near_after, far_after = flat_norm(z + v - own), flat_norm(z + v - rival)
    push = (v * w).sum(dim=1)
    radius = (far**2 - near**2) / (2 * length)
    crossing = w * (radius / length)[:, None]
    sides = {
        "identity": (far_after**2 + near**2, near_after**2 + far**2 - 2 * push),
        "law of cosines": (length**2, near**2 + far**2 - 2 * ((z - own) * (z - rival)).sum(dim=1)),
        "separation minus deviation": (far**2 - near**2, length**2 - 2 * ((z - own) * w).sum(dim=1)),
        "crossing point": (flat_norm(z + crossing - rival), flat_norm(z + crossing - own)),
        "its length": (flat_norm(crossing), radius),
    }
    scale = near**2 + far**2 + length**2
    return {
        (name, "identity"): (left - right).abs() / (scale if "point" not in name else length)
        for name, (left, right) in sides.items()
    }


def _inequality_errors(z: Tensor, v: Tensor, own: Tensor, rival: Tensor) -> dict[tuple[str, str], Tensor]:
    near, far, length = flat_norm(z - own), flat_norm(z - rival), flat_norm(rival - own)
    push, largest = (v * (rival - own)).sum(dim=1), flat_norm(v) * length
    triangle, nearest = (far - near) / 2, (far**2 - near**2) / (2 * length)
    return {
        ("Cauchy-Schwarz", "inequality"): (push - largest) / largest,
        ("triangle inequality", "inequality"): (length - near - far) / length,
        ("dominance", "inequality"): (triangle - nearest) / length,
        # the coordinates of z serve as the exponents of one class's votes
        ("logsumexp", "inequality"): z.logsumexp(dim=1) - z.amax(dim=1) - math.log(z.shape[1]),
    }


# --- configurations and the counterexamples ------------------------------------------------------------------------


@dataclass(frozen=True)
class Configuration:
    """Embeddings and the clusters they are classified by."""

    embeddings: Float[Tensor, "batch dim"]
    clusters: Clusters


def planar_example() -> Configuration:
    """The picture of chapter 1: three classes of two clusters each in the plane, and eight points among them."""
    centroids = [[-2.0, -0.2], [0.2, 1.7], [-0.8, -1.9], [1.7, -1.4], [2.2, 0.9], [1.1, 0.0]]
    points = [
        [-2.1, 0.1],
        [-0.95, 1.1],
        [0.3, 2.3],
        [-1.3, -2.0],
        [0.55, -2.3],
        [2.1, -1.7],
        [1.7, 0.4],
        [2.1, 1.45],
    ]
    clusters = Clusters(
        torch.tensor(centroids, dtype=torch.float64),
        torch.tensor([0, 0, 1, 1, 2, 2]),
        torch.full((6,), 0.8, dtype=torch.float64),
    )
    return Configuration(torch.tensor(points, dtype=torch.float64), clusters)


def random_configuration(
    *, classes: int, per_class: int, dim: int, points: int, seed: int, spread: float = 0.5, variance: float = 1.0
) -> Configuration:
    """Standard normal centroids, and points drawn around randomly chosen ones of them.

    Args:
        spread: standard deviation of a point around its centroid, per coordinate, where centroids have 1.
        variance: sigma^2 of the clusters, which only the soft rule looks at.
    Raises:
        ValueError: if there are fewer than two classes, or a size is below one.
    """
    sizes = {"classes": (classes, 2), "per_class": (per_class, 1), "dim": (dim, 1), "points": (points, 1)}
    for name, (size, least) in sizes.items():
        if size < least:
            raise ValueError(f"{name}: expected at least {least}, got {size}")
    generator = torch.Generator().manual_seed(seed)
    count = classes * per_class
    centroids = torch.randn(count, dim, generator=generator, dtype=torch.float64)
    home = torch.randint(count, (points,), generator=generator)
    noise = torch.randn(points, dim, generator=generator, dtype=torch.float64)
    labels = torch.arange(classes).repeat_interleave(per_class)
    clusters = Clusters(centroids, labels, torch.full((count,), variance, dtype=torch.float64))
    return Configuration(centroids[home] + spread * noise, clusters)


def only_second_nearest_example() -> Configuration:
    """CE1: z = 0 between A = 1, B = 3/2 and C = -8/5 of three classes; looking at B alone promises 5/4."""
    return _on_a_line(0.0, [1.0, 1.5, -1.6], [0, 1, 2])


def loose_nearest_example(gap: float, offset: float = 0.01) -> Configuration:
    """CE2: z = -offset, one class at -1 and 1, the rival at 1 + gap.

    "nearest" is gap / 2 + offset, "pairwise" and the truth gap / 2 + 1 + offset: the ratio has no bound.

    Raises:
        ValueError: if ``gap`` or ``offset`` is not positive.
    """
    _check_positive(gap=gap, offset=offset)
    return _on_a_line(-offset, [-1.0, 1.0, 1.0 + gap], [0, 0, 1])


def loose_pairwise_example(depth: float, height: float = 40.0) -> Configuration:
    """CE3: one class at (-1, -depth) and (1, -depth), the rival at the origin, z = (0, -height).

    The truth exceeds "pairwise" by the factor sqrt(1 + depth^2) / depth, whatever the height.

    Raises:
        ValueError: unless 2 height depth > 1 + depth^2 and both are positive: else z belongs to the rival.
    """
    _check_positive(depth=depth, height=height)
    if not 2 * height * depth > 1 + depth**2:
        raise ValueError(f"height: expected more than {(1 + depth**2) / (2 * depth):.6g}, got {height}")
    clusters = Clusters(
        torch.tensor([[-1.0, -depth], [1.0, -depth], [0.0, 0.0]], dtype=torch.float64),
        torch.tensor([0, 0, 1]),
        torch.ones(3, dtype=torch.float64),
    )
    return Configuration(torch.tensor([[0.0, -height]], dtype=torch.float64), clusters)


def hard_radius_soft_rule_example() -> Configuration:
    """CE4: sigma = 1, one class at 1 and 100, both rivals at -1.1, z = 0.4; here the soft rule needs its own radius."""
    return _on_a_line(0.4, [1.0, 100.0, -1.1, -1.1], [0, 0, 1, 1])


def _on_a_line(z: float, centroids: list[float], labels: list[int]) -> Configuration:
    clusters = Clusters(
        torch.tensor(centroids, dtype=torch.float64)[:, None],
        torch.tensor(labels),
        torch.ones(len(centroids), dtype=torch.float64),
    )
    return Configuration(torch.tensor([[z]], dtype=torch.float64), clusters)


def _check_positive(**values: float) -> None:
    for name, value in values.items():
        if not value > 0:
            raise ValueError(f"{name}: expected a positive number, got {value}")


# --- the ground truth, and a mistake -------------------------------------------------------------------------------


def exact_nearest_rule_distance(
    embeddings: Float[Tensor, "batch dim"], clusters: Clusters
) -> tuple[Float[Tensor, " batch"], Float[Tensor, "batch dim"]]:
    """The oracle of these chapters: how far the nearest point of another class's region is, and that point.

    min over rivals j of dist(z, {p : d_j(p) <= d_i(p) for all i in c}), c the class of the nearest centroid. With
    v = p - z each constraint is <v, mu_j - mu_i> >= (d_j^2 - d_i^2) / 2: a least-distance program, solved by
    non-negative least squares. Rivals whose "pairwise" radius is above the best distance so far are not looked at.

    It is the truth that certificates are compared with, up to the solver's rounding, and not a certificate itself.

    Source: Lawson and Hanson 1974, chapter 23 (least distance programming).
    """
    distances = squared_distances(embeddings, clusters.centroids)
    predicted = clusters.labels[distances.argmin(dim=1)]
    found = [
        _nearest_rival_point(z, squares, clusters, int(c))
        for z, squares, c in zip(embeddings, distances, predicted, strict=True)
    ]
    steps = torch.stack([embeddings.new_tensor(step) for step in found])
    return flat_norm(steps), embeddings + steps


def _nearest_rival_point(z: Tensor, squares: Tensor, clusters: Clusters, predicted: int) -> np.ndarray:
    """The shortest step from z into a rival's region."""
    own = (clusters.labels == predicted).numpy()
    centroids, squared = clusters.centroids.numpy(), squares.numpy()
    best, shortest = np.inf, np.full(len(z), np.inf)
    normals = centroids[~own][:, None] - centroids[own]
    gaps = (squared[~own][:, None] - squared[own]) / 2
    lengths = np.linalg.norm(normals, axis=2)
    lower = np.divide(gaps, lengths, out=np.zeros_like(gaps), where=lengths > 0).max(axis=1)
    for j in lower.argsort():
        if lower[j] >= best:
            break
        step = least_distance(normals[j], gaps[j])
        if (length := float(np.linalg.norm(step))) < best:
            best, shortest = length, step
    return shortest


def least_distance(normals: Float[np.ndarray, "k dim"], gaps: Float[np.ndarray, " k"]) -> Float[np.ndarray, " dim"]:
    """The shortest v with <v, N_i> >= g_i for all i.

    With u >= 0 the minimiser of ||E u - f||, E = [N^T; g^T], f = (0, ..., 0, 1), and residual r = E u - f, it is
    v = -r_{1..m} / r_{m+1}.

    Raises:
        ValueError: if no v meets the constraints.
    Source: Lawson and Hanson 1974, chapter 23.
    """
    scale = np.abs(gaps).max()
    if scale == 0:
        return np.zeros(normals.shape[1])
    # the solution scales with the gaps: rescaled, its last residual keeps all of its digits
    lengths = np.linalg.norm(normals, axis=1)
    unit = max(scale / lengths.max(), np.finfo(float).tiny)
    stacked = np.vstack([normals.T * unit, gaps[None]]) / scale
    target = np.zeros(len(stacked))
    target[-1] = 1.0
    weights, _ = nnls(stacked, target)
    residual = stacked @ weights - target
    if -residual[-1] < 1e-12:
        raise ValueError("normals, gaps: expected constraints that some v meets, got none")
    return -residual[:-1] / residual[-1] * unit


def second_nearest_radius_unsound(
    embeddings: Float[Tensor, "batch dim"], clusters: Clusters
) -> Float[Tensor, " batch"]:
    """UNSOUND: (d_B^2 - d_A^2) / (2 ||mu_B - mu_A||) with B only the nearest rival of the nearest centroid A.

    A farther rival can be reached sooner, since its bisector with A may be closer. It is here to be refuted.
    """
    distances = squared_distances(embeddings, clusters.centroids)
    near, own = distances.min(dim=1)
    is_rival = clusters.labels != clusters.labels[own][:, None]
    far, rival = distances.masked_fill(~is_rival, torch.inf).min(dim=1)
    return (far - near) / (2 * flat_norm(clusters.centroids[rival] - clusters.centroids[own]))


def ladder(embeddings: Float[Tensor, "batch dim"], clusters: Clusters) -> pd.DataFrame:
    """One row for each embedding: the bounds of the nearest rule in feature units, and the "oracle"'s distance."""
    columns = {bound: certified_radius(embeddings, clusters, bound=bound).numpy() for bound in HARD_BOUNDS}
    return pd.DataFrame(columns | {"oracle": exact_nearest_rule_distance(embeddings, clusters)[0].numpy()})


# --- the search ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Isometry:
    """f(x) = L (Q x + b), Q with orthonormal rows: every feature direction is reached at the full rate L."""

    rows: Float[Tensor, "dim input"]
    shift: Float[Tensor, " dim"]
    lipschitz: float

    def __call__(self, x: Float[Tensor, "batch input"]) -> Float[Tensor, "batch dim"]:
        """Features."""
        return self.lipschitz * (x @ self.rows.T + self.shift)


@dataclass(frozen=True)
class Folding:
    """f(x) = L (P |Q x + b| + s), P orthogonal, Q with orthonormal rows: not linear, and L-Lipschitz."""

    inner: Isometry
    outer: Float[Tensor, "dim dim"]
    shift: Float[Tensor, " dim"]

    @property
    def lipschitz(self) -> float:
        """The constant of the inner map: folding does not stretch."""
        return self.inner.lipschitz

    def __call__(self, x: Float[Tensor, "batch input"]) -> Float[Tensor, "batch dim"]:
        """Features."""
        return self.inner(x).abs() @ self.outer.T + self.shift


@dataclass(frozen=True)
class ExtremalMap:
    """f(x) = z + L <u, x - x0> (p - z) / ||p - z||, ||u|| = 1: no L-Lipschitz map gets from z to p any sooner."""

    embedding: Float[Tensor, " dim"]
    target: Float[Tensor, " dim"]
    start: Float[Tensor, " input"]
    direction: Float[Tensor, " input"]
    lipschitz: float

    def __call__(self, x: Float[Tensor, "batch input"]) -> Float[Tensor, "batch dim"]:
        """Features, all on the line through z and p."""
        along = self.target - self.embedding
        amount = self.lipschitz * ((x - self.start) @ self.direction)
        return self.embedding + amount[:, None] * along / along.norm()


def isometry_to(
    embedding: Float[Tensor, " dim"], start: Float[Tensor, " input"], *, lipschitz: float, seed: int
) -> Isometry:
    """A random `Isometry` with f(start) = embedding."""
    rows = _orthogonal(len(start), seed)[: len(embedding)]
    return Isometry(rows, embedding / lipschitz - rows @ start, lipschitz)


def folding_to(
    embedding: Float[Tensor, " dim"], start: Float[Tensor, " input"], *, lipschitz: float, seed: int
) -> Folding:
    """A random `Folding` with f(start) = embedding, folding near ``start``."""
    generator = torch.Generator().manual_seed(seed)
    hinge = torch.randn(len(embedding), generator=generator, dtype=torch.float64)
    inner = isometry_to(hinge, start, lipschitz=lipschitz, seed=seed + 1)
    outer = _orthogonal(len(embedding), seed + 2)
    return Folding(inner, outer, embedding - outer @ hinge.abs())


def extremal_map(
    embedding: Float[Tensor, " dim"],
    target: Float[Tensor, " dim"],
    start: Float[Tensor, " input"],
    *,
    lipschitz: float,
    seed: int,
) -> ExtremalMap:
    """The map that takes ``start`` to ``embedding`` and heads for ``target`` along a random input direction.

    Raises:
        ValueError: if the target is the embedding itself, which leaves no direction.
    Source: chapter 1, eq-extremal.
    """
    if torch.equal(embedding, target):
        raise ValueError("target: expected a point other than the embedding, got the embedding")
    direction = random_directions(len(start), 1, seed=seed)[0]
    return ExtremalMap(embedding, target, start, direction, lipschitz)


def _orthogonal(size: int, seed: int) -> Float[Tensor, "size size"]:
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64))[0]


def random_directions(size: int, count: int, *, seed: int) -> Float[Tensor, "count size"]:
    """Unit vectors, uniform on the sphere."""
    generator = torch.Generator().manual_seed(seed)
    normal = torch.randn(count, size, generator=generator, dtype=torch.float64)
    return normal / flat_norm(normal)[:, None]


def geometric_directions(encode: Isometry | ExtremalMap, start: Tensor, clusters: Clusters) -> Float[Tensor, "n input"]:
    """Input directions to every bisecting hyperplane and to the nearest rival region, pulled back through the map.

    On an `Isometry` one of these is the shortest way to another class under the nearest rule.
    """
    z = encode(start[None])
    own = clusters.labels == clusters.labels[squared_distances(z, clusters.centroids).argmin()]
    normals = (clusters.centroids[~own][:, None] - clusters.centroids[own]).flatten(0, 1)
    steps = torch.cat([normals, exact_nearest_rule_distance(z, clusters)[1] - z])
    if isinstance(encode, Isometry):
        back = steps @ encode.rows
    else:
        back = (steps @ (encode.target - encode.embedding))[:, None] * encode.direction
    return _unit(back)


def gradient_directions(
    logits: Encode, start: Float[Tensor, " input"], *, restarts: int, steps: int, scale: float, seed: int
) -> Float[Tensor, "n input"]:
    """Where Newton steps on the margin end up: x <- x + margin grad / ||grad||^2, towards each rival class.

    Args:
        logits: one column a class; differentiable.
        restarts: random starting points for each class, uniform in direction, at distance ``scale``.
    Source: Moosavi-Dezfooli et al. 2016 (DeepFool), with restarts, one run for each rival class.
    """
    clean = logits(start[None])[0]
    own = int(clean.argmax())
    rivals = torch.tensor([c for c in range(len(clean)) if c != own]).repeat(restarts)[:, None]
    x = start + scale * random_directions(len(start), len(rivals), seed=seed)
    for _ in range(steps):
        x = x.detach().requires_grad_(True)
        values = logits(x)
        margin = values[:, own] - values.gather(1, rivals).squeeze(1)
        (slope,) = torch.autograd.grad(margin.sum(), x)
        x = x - (margin / slope.square().sum(dim=1).clamp_min(1e-12))[:, None] * slope
    return _unit(x.detach() - start)


def _unit(vectors: Tensor) -> Tensor:
    lengths = flat_norm(vectors)
    return vectors[lengths > 0] / lengths[lengths > 0][:, None]


# inputs at a time, on the way outwards
SCANNED = 2048


def smallest_flip(
    logits: Encode,
    start: Float[Tensor, " input"],
    directions: Float[Tensor, "n input"],
    *,
    reach: float,
    scan: int = 64,
    passes: int = 8,
) -> float:
    """The smallest input norm at which the class was seen to change along any direction; infinity if none was.

    All rays are scanned at ``scan`` lengths up to ``reach``; then those that change in the first cell in which any does
    are scanned again within that cell, and so on. The end that flips is kept, so the returned norm is one that really
    changes the class.
    """
    rays, low, high, smallest = directions, 0.0, reach, math.inf
    with torch.no_grad():
        own = logits(start[None]).argmax()
        for _ in range(passes):
            lengths = torch.linspace(low, high, scan + 1, dtype=torch.float64)[1:]
            # outwards, a few lengths at a time: beyond the first change nothing counts
            for part in lengths.split(max(1, SCANNED // max(1, len(rays)))):
                inputs = start + part[:, None, None] * rays
                flipped = (logits(inputs.flatten(0, 1)).argmax(dim=1) != own).reshape(len(part), len(rays))
                if flipped.any():
                    break
            else:
                break
            cell = int(flipped.any(dim=1).int().argmax())
            rays, smallest = rays[flipped[cell]], float(part[cell])
            low, high = smallest - (high - low) / scan, smallest
    return smallest


def logits_of(encode: Encode, clusters: Clusters, *, rule: Rule, neighbours: int | None = None) -> Encode:
    """Inputs -> logits under ``rule``, through ``encode``."""
    if rule == "nearest":
        return lambda x: nearest_logits(encode(x), clusters)
    return lambda x: cluster_logits(encode(x), clusters, neighbours=neighbours)


def search_table(
    *,
    configurations: int,
    per_class: Sequence[int],
    seed: int,
    dim: int = 6,
    input_dim: int = 12,
    classes: int = 4,
    directions: int = 200,
    lipschitz: float = 2.0,
) -> pd.DataFrame:
    """Attack random maps of known Lipschitz constant with everything at hand, and note the smallest flip.

    Three maps for each configuration: an isometry, a folding and the extremal map. Three rules: nearest, soft, and
    soft with three voters. One row for each (configuration, map, rule, bound), with the certified radius, the
    smallest flip, and their ratio, which a sound certificate keeps at 1 or above (NaN where the radius is 0).

    Args:
        configurations: drawn anew for each entry of ``per_class``.
        directions: random ones, besides those from gradients and from geometry.
    """
    rows = []
    for k in per_class:
        for index, (z, clusters) in enumerate(_single_points(configurations, classes, k, dim, seed)):
            start = torch.zeros(input_dim, dtype=torch.float64)
            for name, encode in _maps_to(z, clusters, start, lipschitz, seed + index).items():
                for rule, neighbours in _RULES:
                    flip = _attack(encode, start, clusters, rule, neighbours, directions, seed + index)
                    radii = _radii_at(encode, start, clusters, rule, neighbours)
                    rows += [(index, k, name, rule, neighbours or 0, bound, r, flip) for bound, r in radii.items()]
    columns = ["configuration", "per_class", "map", "rule", "neighbours", "bound", "radius", "flip"]
    table = pd.DataFrame(rows, columns=columns)
    return table.assign(ratio=table["flip"] / table["radius"].where(table["radius"] > 0))


def _maps_to(
    z: Tensor, clusters: Clusters, start: Tensor, lipschitz: float, seed: int
) -> dict[str, Isometry | Folding | ExtremalMap]:
    target = exact_nearest_rule_distance(z, clusters)[1][0]
    return {
        "isometry": isometry_to(z[0], start, lipschitz=lipschitz, seed=seed),
        "folding": folding_to(z[0], start, lipschitz=lipschitz, seed=seed),
        "extremal": extremal_map(z[0], target, start, lipschitz=lipschitz, seed=seed),
    }


def _radii_at(
    encode: Isometry | Folding | ExtremalMap, start: Tensor, clusters: Clusters, rule: Rule, neighbours: int | None
) -> dict[HardBound, float]:
    """Radii of the embedding that the map computes, which differs by rounding from the one it was asked for."""
    options = {"lipschitz": encode.lipschitz, "rule": rule, "neighbours": neighbours}
    z = encode(start[None])
    return {bound: float(certified_radius(z, clusters, bound=bound, **options)) for bound in HARD_BOUNDS}


_RULES: tuple[tuple[Rule, int | None], ...] = (("nearest", None), ("soft", None), ("soft", 3))


def _single_points(
    configurations: int, classes: int, per_class: int, dim: int, seed: int
) -> Iterator[tuple[Tensor, Clusters]]:
    for index in range(configurations):
        drawn = random_configuration(
            classes=classes, per_class=per_class, dim=dim, points=1, seed=seed + index, spread=0.4, variance=0.2
        )
        yield drawn.embeddings, drawn.clusters


def _attack(
    encode: Isometry | Folding | ExtremalMap,
    start: Tensor,
    clusters: Clusters,
    rule: Rule,
    neighbours: int | None,
    directions: int,
    seed: int,
) -> float:
    """Random, gradient and (where the map can be inverted) geometric directions together."""
    logits = logits_of(encode, clusters, rule=rule, neighbours=neighbours)
    reach = 4 * float(clusters.centroids.norm(dim=1).max()) / encode.lipschitz
    tried = [
        random_directions(len(start), directions, seed=seed),
        gradient_directions(logits, start, restarts=8, steps=12, scale=0.02 * reach, seed=seed),
    ]
    if not isinstance(encode, Folding):
        tried.append(geometric_directions(encode, start, clusters))
    return smallest_flip(logits, start, torch.cat(tried), reach=reach)


def tightness_table(
    *, configurations: int, per_class: Sequence[int], lipschitz: Sequence[float], seed: int, dim: int = 6
) -> pd.DataFrame:
    """How near the extremal map comes to each radius: (flip - radius) / radius over random configurations.

    Columns: per_class, lipschitz, the configuration's radii ("nearest", "pairwise", "exact"), and "flip", the input
    norm at which the extremal map changes its class.
    """
    rows = []
    for k in per_class:
        for constant in lipschitz:
            for index, (z, clusters) in enumerate(_single_points(configurations, 4, k, dim, seed)):
                start = random_directions(2 * dim, 1, seed=seed + index)[0]
                distance, target = exact_nearest_rule_distance(z, clusters)
                encode = extremal_map(z[0], target[0], start, lipschitz=constant, seed=seed + index)
                logits = logits_of(encode, clusters, rule="nearest")
                reach = 2 * float(distance) / constant
                flip = smallest_flip(logits, start, encode.direction[None], reach=reach)
                radii = [float(certified_radius(z, clusters, bound=b, lipschitz=constant)) for b in HARD_BOUNDS[1:]]
                rows.append((k, constant, index, *radii, flip))
    columns = ["per_class", "lipschitz", "configuration", "nearest", "pairwise", "exact", "flip"]
    return pd.DataFrame(rows, columns=columns)


def soft_tightness_table(*, configurations: int, seed: int, per_class: int = 3, rays: int = 720) -> pd.DataFrame:
    """The soft rule's bounds against the truth in the plane: one row for each bound and configuration.

    Columns: ``bound`` (also "exact", with its correction), ``configuration``, ``radius``, and ``flip``, the least
    length at which the class was seen to change along rays half a degree apart.
    """
    angles = torch.arange(rays, dtype=torch.float64) * (2 * math.pi / rays)
    circle = torch.stack([angles.cos(), angles.sin()], dim=1)
    rows = []
    for index, (z, clusters) in enumerate(_single_points(configurations, 3, per_class, 2, seed)):
        logits = logits_of(lambda x: x, clusters, rule="soft")
        flip = smallest_flip(logits, z[0], circle, reach=4 * float(clusters.centroids.norm(dim=1).max()))
        for bound in ("exact", *SOFT_BOUNDS):
            rows.append((bound, index, float(certified_radius(z, clusters, bound=bound, rule="soft")), flip))
    return pd.DataFrame(rows, columns=["bound", "configuration", "radius", "flip"])


# --- the tables behind the figures ---------------------------------------------------------------------------------


def logit_grid(clusters: Clusters, *, low: float, high: float, resolution: int) -> pd.DataFrame:
    """Both rules' logits on a square grid in the plane: columns x, y, nearest_0, nearest_1, ..., soft_0, soft_1, ..."""
    ticks = torch.linspace(low, high, resolution, dtype=torch.float64)
    points = torch.cartesian_prod(ticks, ticks)
    columns = {"x": points[:, 0].numpy(), "y": points[:, 1].numpy()}
    for name, logits in (("nearest", nearest_logits(points, clusters)), ("soft", cluster_logits(points, clusters))):
        columns |= {f"{name}_{c}": column.numpy() for c, column in enumerate(logits.T)}
    return pd.DataFrame(columns)


def predictions(grid: pd.DataFrame, rule: Rule) -> np.ndarray:
    """The class that ``rule`` predicts in each row of a `logit_grid`."""
    return grid.filter(regex=f"^{rule}_").to_numpy().argmax(axis=1)


def bisector_picture() -> pd.DataFrame:
    """The proof in one picture: an embedding z, its centroid, a rival, and where the bisector is reached first.

    Columns: point ("z", "own", "rival", "crossing"), x, y, and z's two radii, repeated in each row.
    """
    pair = Configuration(
        torch.tensor([[0.5, 1.9]], dtype=torch.float64),
        Clusters(
            torch.tensor([[0.0, 0.0], [3.2, 0.8]], dtype=torch.float64),
            torch.tensor([0, 1]),
            torch.ones(2, dtype=torch.float64),
        ),
    )
    z, clusters = pair.embeddings, pair.clusters
    crossing = exact_nearest_rule_distance(z, clusters)[1]
    places = torch.cat([z, clusters.centroids, crossing]).numpy()
    table = pd.DataFrame({"point": ["z", "own", "rival", "crossing"], "x": places[:, 0], "y": places[:, 1]})
    radii = {bound: float(certified_radius(z, clusters, bound=bound)) for bound in ("triangle", "nearest")}
    return table.assign(**radii)


def planar_radii(configuration: Configuration) -> pd.DataFrame:
    """Each planar point with its class and its ladder of radii: x, y, prediction, triangle, ..., exact."""
    points, clusters = configuration.embeddings, configuration.clusters
    predicted = nearest_logits(points, clusters).argmax(dim=1)
    head = pd.DataFrame({"x": points[:, 0].numpy(), "y": points[:, 1].numpy(), "prediction": predicted.numpy()})
    return pd.concat([head, ladder(points, clusters)], axis=1)


def planar_flips(
    configuration: Configuration, *, directions: int, reach: float, rule: Rule = "nearest"
) -> Float[np.ndarray, " batch"]:
    """The smallest step that changes each planar point's class, over evenly spread directions."""
    angles = torch.arange(directions, dtype=torch.float64) * (2 * math.pi / directions)
    rays = torch.stack([angles.cos(), angles.sin()], dim=1)
    logits = logits_of(lambda x: x, configuration.clusters, rule=rule)
    return np.array([smallest_flip(logits, point, rays, reach=reach, scan=512) for point in configuration.embeddings])


def radii_along(clusters: Clusters, *, begin: Sequence[float], end: Sequence[float], points: int) -> pd.DataFrame:
    """The ladder on a straight walk: "position" is the length walked, "prediction" the class there."""
    first, last = (torch.tensor(list(p), dtype=torch.float64) for p in (begin, end))
    share = torch.linspace(0, 1, points, dtype=torch.float64)[:, None]
    walk = first + share * (last - first)
    position = (share.squeeze(1) * (last - first).norm()).numpy()
    predicted = nearest_logits(walk, clusters).argmax(dim=1).numpy()
    return pd.DataFrame({"position": position, "prediction": predicted}).join(ladder(walk, clusters))


def loose_nearest_table(gaps: Sequence[float], *, offset: float = 0.01) -> pd.DataFrame:
    """CE2 as a family: the ladder for each gap between the near cluster and the rival, and pairwise / nearest."""
    return _family(gaps, "gap", [loose_nearest_example(gap, offset) for gap in gaps], "pairwise", "nearest")


def loose_pairwise_table(depths: Sequence[float], *, height: float = 40.0) -> pd.DataFrame:
    """CE3 as a family: the ladder for each depth, and exact / pairwise."""
    return _family(depths, "depth", [loose_pairwise_example(d, height) for d in depths], "exact", "pairwise")


def _family(values: Sequence[float], name: str, members: list[Configuration], upper: str, lower: str) -> pd.DataFrame:
    table = pd.concat([ladder(member.embeddings, member.clusters) for member in members], ignore_index=True)
    table.insert(0, name, list(values))
    return table.assign(ratio=table[upper] / table[lower])


def random_ladders(
    *, per_class: Sequence[int], dims: Sequence[int], configurations: int, points: int, seed: int, classes: int = 10
) -> pd.DataFrame:
    """The ladder on random configurations: columns dim, per_class, configuration, triangle, ..., exact."""
    rows = []
    for dim in dims:
        for k in per_class:
            for index in range(configurations):
                drawn = random_configuration(classes=classes, per_class=k, dim=dim, points=points, seed=seed + index)
                table = ladder(drawn.embeddings, drawn.clusters)
                rows.append(table.assign(dim=dim, per_class=k, configuration=index))
    return pd.concat(rows, ignore_index=True)


def unsound_share(
    *, classes: Sequence[int], dims: Sequence[int], configurations: int, points: int, seed: int
) -> pd.DataFrame:
    """How often looking at the second nearest centroid alone promises more than the truth (one cluster a class).

    Columns: dim, classes, points, unsound (their share) and overclaim (mean ratio of promise to truth where unsound).
    """
    rows = []
    for dim in dims:
        for count in classes:
            promised, truth = [], []
            for index in range(configurations):
                drawn = random_configuration(classes=count, per_class=1, dim=dim, points=points, seed=seed + index)
                promised.append(second_nearest_radius_unsound(drawn.embeddings, drawn.clusters))
                # with one cluster a class "nearest" is the truth, proved in chapter 1
                truth.append(certified_radius(drawn.embeddings, drawn.clusters, bound="nearest"))
            excess = torch.cat(promised) / torch.cat(truth)
            wrong = excess > 1 + 1e-9
            overclaim = float(excess[wrong].mean()) if wrong.any() else 1.0
            rows.append((dim, count, len(excess), float(wrong.double().mean()), overclaim))
    return pd.DataFrame(rows, columns=["dim", "classes", "points", "unsound", "overclaim"])


def soft_margin_along(configuration: Configuration, *, reach: float, points: int) -> pd.DataFrame:
    """The soft rule's margin g_0 - g_1 (nats) when a one-dimensional embedding moves by "shift".

    Repeated in each row: the shift at which the soft rule flips, and the radius "pairwise" claims under either rule.
    """
    z, clusters = configuration.embeddings, configuration.clusters
    shifts = torch.linspace(-reach, reach, points, dtype=torch.float64)
    logits = cluster_logits(z[0] + shifts[:, None], clusters)
    return pd.DataFrame({"shift": shifts.numpy(), "margin": (logits[:, 0] - logits[:, 1]).numpy()}).assign(
        flip=flip_along_line(configuration, reach=reach, rule="soft"),
        nearest_rule_radius=float(certified_radius(z, clusters, rule="nearest")),
        soft_rule_radius=float(certified_radius(z, clusters, rule="soft")),
    )


def flip_along_line(configuration: Configuration, *, reach: float, rule: Rule) -> float:
    """The smallest shift of a one-dimensional embedding that changes the class under ``rule``."""
    both_ways = torch.tensor([[-1.0], [1.0]], dtype=torch.float64)
    logits = logits_of(lambda x: x, configuration.clusters, rule=rule)
    return smallest_flip(logits, configuration.embeddings[0], both_ways, reach=reach, scan=1024)


def second_nearest_line() -> pd.DataFrame:
    """CE1 as rows to draw: z and the three centroids ("position"), with z's claimed, certified and true radius."""
    example = only_second_nearest_example()
    z, clusters = example.embeddings, example.clusters
    positions = [float(z), *clusters.centroids.flatten().tolist()]
    return pd.DataFrame({"point": ["z", "A", "B", "C"], "position": positions}).assign(
        claimed=float(second_nearest_radius_unsound(z, clusters)),
        certified=float(certified_radius(z, clusters, bound="nearest")),
        flip=flip_along_line(example, reach=2.0, rule="nearest"),
    )


def gain_by_dimension(ladders: pd.DataFrame, *, threshold: float = 1.01) -> pd.DataFrame:
    """For each (dim, per_class): share of points where pairwise > threshold * nearest, and the largest ratio.

    Args:
        ladders: as `random_ladders` makes it.
    """
    ratios = ladders.assign(ratio=ladders["pairwise"] / ladders["nearest"].where(ladders["nearest"] > 0))
    rows = []
    for dim, per_class in ratios[["dim", "per_class"]].drop_duplicates().itertuples(index=False):
        ratio = ratios.query(f"dim == {dim} and per_class == {per_class}")["ratio"].dropna().to_numpy(dtype=float)
        rows.append((dim, per_class, len(ratio), float((ratio > threshold).mean()), float(ratio.max())))
    return pd.DataFrame(rows, columns=["dim", "per_class", "points", "share", "largest"])


def stack_panels(**tables: pd.DataFrame) -> pd.DataFrame:
    """One table for a figure of several panels: a first column "panel" says which rows belong to which."""
    stacked = pd.concat([table.assign(panel=name) for name, table in tables.items()], ignore_index=True)
    stacked.insert(0, "panel", stacked.pop("panel"))
    return stacked
