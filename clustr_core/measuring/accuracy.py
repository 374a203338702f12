"""From per-example rows to accuracies with their intervals: everything the book says is derived from rows."""

from functools import cache

import pandas as pd
import scipy  # its parts are loaded on first use

from clustr_core.attacks.names import Norm
from clustr_core.certificates.names import HARD_BOUNDS
from clustr_core.training.recipes import METHODS


def robust_accuracy(table: pd.DataFrame) -> pd.DataFrame:
    """Robust accuracy against eps: the worst case over all of the table's attacks on each image, with its interval.

    At each eps only the images count that every attack of that eps has seen.

    Args:
        table: of `measure`, for one or several methods (column ``method``) and norms.
    Returns:
        columns ``[method] norm eps robust_accuracy low high examples``; eps = 0 is the clean accuracy.
    """
    keys = [name for name in ("method", "norm") if name in table]
    clean = table.drop_duplicates([*keys, "index"]).assign(eps=0.0, robust=lambda t: t["correct"])
    worst = pd.concat([clean, on_common_images(table)]).groupby([*keys, "eps", "index"], sort=True)["robust"].all()
    return _proportions(worst.reset_index(), [*keys, "eps"], "robust", "robust_accuracy")


def robust_accuracy_by_loss(table: pd.DataFrame) -> pd.DataFrame:
    """`robust_accuracy` of each attack loss on its own: losses that should agree, and where they do not; eps = 0 is the
    clean accuracy."""
    keys = [*(name for name in ("method", "attack", "norm") if name in table), "loss"]
    clean = table.drop_duplicates([*keys, "index"]).assign(eps=0.0, robust=lambda t: t["correct"])
    worst = pd.concat([clean, table]).groupby([*keys, "eps", "index"], sort=False)["robust"].all()
    return _proportions(worst.reset_index(), [*keys, "eps"], "robust", "robust_accuracy")


def on_common_images(table: pd.DataFrame) -> pd.DataFrame:
    """The rows of the images that every attack (attack and loss) at that norm and eps has seen, for each method."""
    keys = [name for name in ("method", "norm", "eps") if name in table]
    attack = [name for name in ("attack", "loss") if name in table]
    if not attack:
        return table
    kinds = pd.DataFrame(table[[*keys, *attack]].drop_duplicates().groupby(keys)[attack].count().iloc[:, 0])
    kinds.columns = ["kinds"]
    once = table.drop_duplicates([*keys, *attack, "index"])
    seen = once.assign(seen=1).groupby([*keys, "index"], as_index=False).agg({"seen": "sum"})
    common = seen.merge(kinds.reset_index(), on=keys).query("seen == kinds")
    return table.merge(common[[*keys, "index"]], on=[*keys, "index"])


def at_shared_eps(table: pd.DataFrame) -> pd.DataFrame:
    """The L-infinity rows of `measure` at each eps at which the paper's protocol was run and another attack, too."""
    linf = table.query("norm == 'linf'")
    paper, correct = linf.query("attack == 'paper'"), linf.query("attack != 'paper'")
    return linf.loc[linf["eps"].isin(list(paper["eps"])) & linf["eps"].isin(list(correct["eps"]))]


def both_protocols(table: pd.DataFrame) -> pd.DataFrame:
    """Robust accuracy under the paper's protocol and under all other attacks together, on the same images.

    Args:
        table: of `measure`, L-infinity, with rows of the attack "paper" and of others.
    Returns:
        the columns of `robust_accuracy` with ``protocol`` ("paper" or "correct"), for each eps at which both were run;
        at eps = 0 both are the clean accuracy.
    Raises:
        ValueError: if there is no such eps.
    """
    shared = at_shared_eps(table)
    if shared.empty:
        raise ValueError("table: expected the attack 'paper' and another one at one eps at least, got no such eps")
    common = on_common_images(shared)
    parts = {"paper": common.query("attack == 'paper'"), "correct": common.query("attack != 'paper'")}
    return pd.concat([robust_accuracy(rows).assign(protocol=name) for name, rows in parts.items()], ignore_index=True)


def at_eps(rows: pd.DataFrame, eps: float) -> pd.DataFrame:
    """The rows at an eps, which tables keep in nine digits."""
    return rows.loc[(rows["eps"] - eps).abs() < 1e-6]


def summary_table(
    attacks: pd.DataFrame, certificates: pd.DataFrame, *, eps: float, pixels: int, norm: Norm = "linf"
) -> pd.DataFrame:
    """Clean, under the paper's protocol, correctly attacked, certified: each method at one eps.

    A certificate is of an L2 ball. In L-infinity an image counts as certified if its L2 radius is at least
    eps sqrt(pixels), since the L2 ball of that radius holds the L-infinity ball of radius eps.

    Args:
        attacks: as for `both_protocols`; all columns stand on the images that every attack at ``eps`` has seen.
        certificates: of `certificates_of`, or no rows; the best bound of each method counts. Those of a method that
            promises nothing and has no clusters are of the clusters fitted afterwards.
        eps: in pixels of [0, 1].
        pixels: of an image, channels counted one by one.
        norm: "l2" has no paper's protocol.
    Returns:
        columns ``method column accuracy low high examples``; ``column`` is "clean", "paper" (L-infinity only),
        "correct" and, where the attacks have the method, "certified".
    Raises:
        ValueError: if there are no attacks at eps, or the two protocols do not meet there.
    """
    here = at_eps(attacks.loc[attacks["norm"] == norm], eps)
    if here.empty:
        raise ValueError(f"attacks: expected rows in {norm} at eps {eps:g}, got none")
    both = (
        both_protocols(here) if norm == "linf" else robust_accuracy(on_common_images(here)).assign(protocol="correct")
    )
    both = both.rename(columns={"robust_accuracy": "accuracy"})
    both["column"] = both["protocol"].where(both["eps"] > 0, "clean")
    columns = both.drop_duplicates(["method", "column"])
    if not certificates.empty:
        columns = pd.concat([columns, _certified(here, certificates, eps, pixels, norm)], ignore_index=True)
    return columns.loc[:, ["method", "column", "accuracy", "low", "high", "examples"]]


def _certified(here: pd.DataFrame, certificates: pd.DataFrame, eps: float, pixels: int, norm: Norm) -> pd.DataFrame:
    """The column "certified" of `summary_table`, on the images that the attacks have seen."""
    seen = on_common_images(here)[["method", "index"]].drop_duplicates()
    best = best_bound(certificates).replace({"method": _of_clusters()})
    radius = eps * (pixels**0.5 if norm == "linf" else 1.0)
    certified = certified_accuracy(best.merge(seen, on=["method", "index"]), [radius]).drop(columns="bound")
    return certified.rename(columns={"certified_accuracy": "accuracy"}).assign(column="certified")


def best_bound(certificates: pd.DataFrame) -> pd.DataFrame:
    """Of each method the rows of the best bound that its table has.

    Args:
        certificates: of `certificates_of`.
    Raises:
        ValueError: for another bound than those of its rows.
    """
    order = {bound: rank for rank, bound in enumerate((*HARD_BOUNDS, "margin", "smoothing"))}
    if unknown := sorted(set(certificates["bound"]) - set(order)):
        raise ValueError(f"bound: expected some of {sorted(order)}, got {unknown}")
    ranks = certificates["bound"].map(lambda bound: order[bound])
    return certificates.loc[ranks == ranks.groupby(certificates["method"]).transform("max")]


def broken_certificates(attacks: pd.DataFrame, certificates: pd.DataFrame, *, pixels: int) -> pd.DataFrame:
    """Images that an attack led to another class inside a ball in which they were certified: there must be none.

    What counts is the model's own verdict on the image that the attack ended with, whatever the attack calls a success.
    A ball of L2 radius eps lies in the certified one if eps is at most the radius, an L-infinity ball if eps
    sqrt(pixels) is.

    Args:
        attacks: of `measure`, with the column ``method``.
        certificates: of `certificates_of`, of the same methods; the best bound of each counts.
        pixels: of an image, channels counted one by one.
    """
    reach = attacks["eps"] * attacks["norm"].map(lambda norm: pixels**0.5 if norm == "linf" else 1.0)
    led_away = attacks["adversarial_prediction"] != attacks["label"]
    broken = attacks.assign(reach=reach).loc[attacks["correct"] & led_away]
    radii = best_bound(certificates)[["method", "index", "radius"]]
    return broken.merge(radii, on=["method", "index"]).query("reach <= radius")


def certified_accuracy(table: pd.DataFrame, radii: list[float], *, column: str = "radius") -> pd.DataFrame:
    """Share of test images that are classified correctly and certified at each radius, with its 95 % interval.

    Args:
        table: of `certificate_table`.
        column: "radius" (input units) or "feature_radius".
    """
    keys = [name for name in ("method", "bound") if name in table]
    parts = [table.assign(at=r, certified=table["correct"] & (table[column] >= r)) for r in radii]
    return _proportions(pd.concat(parts), [*keys, "at"], "certified", "certified_accuracy")


@cache
def binomial_interval(successes: int, trials: int, *, confidence: float = 0.95) -> tuple[float, float]:
    """The exact (Clopper-Pearson) interval of a proportion.

    Raises:
        ValueError: if there is no trial.
    Source: Clopper and Pearson 1934: quantiles of two beta distributions.
    """
    if trials < 1:
        raise ValueError(f"trials: expected at least one, got {trials}")
    tail, k, n = (1 - confidence) / 2, int(successes), int(trials)
    low = scipy.special.betaincinv(k, n - k + 1, tail) if k else 0.0
    high = scipy.special.betaincinv(k + 1, n - k, 1 - tail) if k < n else 1.0
    return float(low), float(high)


def _of_clusters() -> dict[str, str]:
    """What a certificate's rows are called in a table of attacks: without a guarantee of its own, a method's
    certificate is that of the cluster rule. Asked for when needed, since methods may be registered at any time."""
    plain = (name for name, recipe in METHODS.items() if recipe.guarantee == "none" and not recipe.clustered)
    return {name: f"{name}-clusters" for name in plain}


def _proportions(table: pd.DataFrame, keys: list[str], column: str, name: str) -> pd.DataFrame:
    counts = table.groupby(keys, sort=True)[column].agg(["sum", "count"]).reset_index()
    intervals = [binomial_interval(s, n) for s, n in zip(counts["sum"], counts["count"], strict=True)]
    counts[name] = counts["sum"] / counts["count"]
    counts["low"], counts["high"] = [low for low, _ in intervals], [high for _, high in intervals]
    counts["examples"] = counts["count"]
    return counts.drop(columns=["sum", "count"])
