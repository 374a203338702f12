"""The chain certified <= worst case over all attacks <= each attack <= clean, as curves against the radius."""

from collections.abc import Sequence

import pandas as pd

from clustr_core.measuring.accuracy import binomial_interval
from clustr_core.measuring.counterexamples import ROUNDING, CertificateBroken, check_sandwich
from clustr_core.measuring.sandwich import ATTACKS, WITHIN

CERTIFIED, WORST, CLEAN = "certified", "worst case", "clean"


def sandwich_curve(rows: pd.DataFrame, radii: Sequence[float], *, tolerance: float = ROUNDING) -> pd.DataFrame:
    """Accuracies against the radius, from what is certified up to what is clean, with 95 % intervals.

    At radius r an example counts if it is classified correctly and, in the column

        certified    its certified radius is at least r
        worst case   no attack found a misclassified image nearer than r
        <attack>     that attack found none nearer than r
        clean        always

    which is robust accuracy in the open ball, as the certificate is. A norm that is short of the radius by no more than
    ``tolerance`` (see `violations`) counts as the radius, so that the columns are in order at every r. The attacks
    `WITHIN` the certified balls are in the worst case and have no column of their own.

    Args:
        rows: of `sandwich_rows`, of one model, in one or several batches.
        radii: in units of pixels, L2, each at least 0.
    Returns:
        columns ``column at accuracy low high examples``; each column name at every radius.
    Raises:
        CertificateBroken: as `check_sandwich`.
        ValueError: if a radius is negative or named twice, or the attacks have not seen the same examples, once each.
    """
    if not all(0 <= r < float("inf") for r in radii) or len(set(radii)) != len(radii):
        raise ValueError(f"radii: expected different finite numbers of at least 0, got {list(radii)}")
    check_sandwich(rows, tolerance=tolerance)
    reach = _reach(rows)
    parts = []
    for r in radii:
        for column, holds in (reach >= r).sum().items():
            low, high = binomial_interval(holds, len(reach))
            parts.append((column, r, holds / len(reach), low, high, len(reach)))
    return pd.DataFrame(parts, columns=["column", "at", "accuracy", "low", "high", "examples"])


def check_chain(curve: pd.DataFrame) -> None:
    """Refuse a curve that is not certified <= worst case <= each attack <= clean at each of its radii.

    Args:
        curve: of `sandwich_curve`.
    Raises:
        CertificateBroken: names two columns, the first radius at which they are out of order, and both accuracies.
        ValueError: if a column has no value at one of the radii.
    """
    table = curve.pivot(index="at", columns="column", values="accuracy")
    attacks = [name for name in table if name not in (CERTIFIED, WORST, CLEAN)]
    pairs = [(CERTIFIED, WORST), (WORST, CLEAN), *((WORST, name) for name in attacks)]
    missing = {CERTIFIED, WORST, CLEAN} - set(table)
    if missing or table.isna().to_numpy().any():
        raise ValueError(f"curve: expected every column at every radius, got gaps in {sorted(missing) or list(table)}")
    for lower, upper in [*pairs, *((name, CLEAN) for name in attacks)]:
        above = table.loc[table[lower] > table[upper]]
        if len(above):
            low, high = above[lower].iloc[0], above[upper].iloc[0]
            raise CertificateBroken(
                f"at radius {above.index[0]:.6g}: expected {lower} <= {upper}, got {low:.6g} > {high:.6g}"
            )


def _reach(rows: pd.DataFrame) -> pd.DataFrame:
    """Up to which distance each example holds, a column each of the curve; -infinity for a misclassified one."""
    if rows.empty or rows.duplicated(["attack", "index"]).any():
        raise ValueError("rows: expected each attack and index once, and at least one")
    norms = rows.pivot(index="index", columns="attack", values="norm")
    facts = rows[["index", "label", "correct", "radius"]].drop_duplicates().set_index("index").loc[norms.index]
    if norms.isna().to_numpy().any() or len(facts) != len(norms):
        raise ValueError("rows: expected every attack on the same examples, with one label and one radius each")
    norms = norms.clip(lower=facts["radius"], axis=0)
    alone = {name: norms[name] for name in ATTACKS if name in norms and name not in WITHIN}
    reach = pd.DataFrame({CERTIFIED: facts["radius"], WORST: norms.min(axis=1), **alone, CLEAN: float("inf")})
    return reach.where(facts["correct"], float("-inf"))
