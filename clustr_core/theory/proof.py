"""The proof's steps in sympy, and by numbers."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import pandas as pd
import sympy as sp
import torch
from torch import Tensor

from clustr_core.numerics.distances import flat_norm


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
