"""The distance from a point to a polyhedron, from below: any multipliers are sound, the best are exact."""

import torch
from jaxtyping import Float
from torch import Tensor

# block principal pivoting settles in a few rounds; what has not settled by then is still sound
ROUNDS_PER_CONSTRAINT = 8


def least_norm(
    normals: Float[Tensor, "batch constraint dim"], offsets: Float[Tensor, "batch constraint"]
) -> Float[Tensor, " batch"]:
    """A lower bound on min ||v|| over {v : N v >= h}, exact up to rounding on well-posed problems.

    For every lambda >= 0, lambda . h <= lambda . N v <= ||N^T lambda|| ||v||, so lambda . h / ||N^T lambda|| is a bound
    whoever found lambda, and the optimum's lambda reaches it.

    Args:
        normals: N, in float64; a row of zeros is a constraint that is not there.
        offsets: h. Where none is positive, v = 0 is allowed, and the bound is at most 0.
    Returns:
        the larger of the bound by `multipliers` and of the best single constraint's, max_i h_i / ||N_i||; rounded down.
        Minus infinity where there is no constraint.
    Source: this book, chapter 2.
    """
    lengths = normals.norm(dim=2)
    there = lengths > 0
    unit = normals / lengths.where(there, 1)[:, :, None]
    reach = (offsets / lengths.where(there, 1)).masked_fill(~there, -torch.inf)
    alone = torch.nn.functional.one_hot(reach.argmax(dim=1), reach.shape[1]).to(unit)
    found = multipliers(unit @ unit.transpose(1, 2), reach)
    bounds = _bound(torch.stack([alone, found], dim=1), unit, reach.masked_fill(~there, 0))
    return bounds.amax(dim=1).masked_fill(~there.any(dim=1), -torch.inf)


def multipliers(
    gram: Float[Tensor, "batch constraint constraint"], offsets: Float[Tensor, "batch constraint"]
) -> Float[Tensor, "batch constraint"]:
    """lambda >= 0 with N N^T lambda >= h, and equality wherever lambda > 0: the multipliers of the least-norm point.

    Args:
        gram: N N^T, with a diagonal near 1.
        offsets: h; minus infinity for a constraint that is not there, whose multiplier is 0.
    Source: block principal pivoting, Kim and Park 2011.
    """
    batch, count = offsets.shape
    # rows that depend on each other leave a singular block; a ridge so small moves no bound in its first ten digits
    gram = gram + 1e-13 * torch.eye(count, dtype=gram.dtype, device=gram.device)
    absent = offsets.isneginf()
    target = offsets.masked_fill(absent, 0)
    passive = (target == target.amax(dim=1, keepdim=True)) & (target > 0)
    fewest = torch.full((batch,), count + 1, device=gram.device)
    patience = torch.full_like(fewest, 3)
    solution = torch.zeros_like(target)
    for _ in range(ROUNDS_PER_CONSTRAINT * count):
        on = passive.to(gram)
        system = gram * on[:, :, None] * on[:, None, :] + torch.diag_embed(1 - on)
        solution = torch.linalg.solve(system, target * on)
        slack = (gram @ solution[:, :, None]).squeeze(2) - target
        wrong = torch.where(passive, solution < 0, slack < -1e-12 * (1 + target.abs())) & ~absent
        amount = wrong.sum(dim=1)
        if not amount.any():
            break
        # exchange all that are wrong as long as that helps; else only the last of them, which cannot cycle
        better = amount < fewest
        fewest = torch.where(better, amount, fewest)
        patience = torch.where(better, 3, patience - 1)
        last = wrong & (wrong.flip(1).cumsum(dim=1).flip(1) == 1)
        passive = passive ^ torch.where((patience >= 0)[:, None], wrong, last)
    return solution.clamp_min(0).masked_fill(absent, 0)


def _bound(
    candidates: Float[Tensor, "batch candidate constraint"], unit: Tensor, reach: Tensor
) -> Float[Tensor, "batch candidate"]:
    """lambda . h / ||N^T lambda||, the numerator rounded down and the denominator up."""
    rounding = (unit.shape[2] + unit.shape[1] + 8) * torch.finfo(unit.dtype).eps
    products = candidates * reach[:, None]
    numerator = products.sum(dim=2) - rounding * products.abs().sum(dim=2)
    denominator = (candidates @ unit).norm(dim=2) + rounding * candidates.sum(dim=2)
    return numerator / denominator.clamp_min(torch.finfo(unit.dtype).tiny)
