"""One recipe, several seeds or lengths: the numbers of each training as counts of images, and all together."""

from collections.abc import Sequence

import pandas as pd

from clustr_core.measuring.accuracy import at_eps, best_bound, binomial_interval, both_protocols, certified_accuracy
from clustr_core.measuring.study import in_order, method_name, with_interval

KEYS = ["profile", "model", "number"]
NAMES = {"paper": "paper's protocol", "correct": "correct attacks"}


def counted(attacks: pd.DataFrame, certificates: pd.DataFrame, *, eps: float, radii: Sequence[float]) -> pd.DataFrame:
    """How many images of one training hold, and of how many.

    Args:
        attacks: of `attacks_of`, with the paper's protocol and another attack at ``eps`` (L-infinity, in pixels of
            [0, 1]).
        certificates: of `certificates_of`; the best bound of each method counts. No rows for methods without a promise.
        radii: L2, at which certified images are counted.
    Returns:
        columns ``model number holds images``; ``number`` is "clean", "paper's protocol", "correct attacks" or
        "certified at R". The first three stand on the images that every attack has seen.
    Raises:
        ValueError: if no two protocols meet at eps.
    """
    both = both_protocols(at_eps(attacks, eps)).rename(columns={"method": "model", "robust_accuracy": "share"})
    both["number"] = both["protocol"].map(NAMES.get).where(both["eps"] > 0, "clean")
    rows = [both.drop_duplicates(["model", "number"])]
    if len(certificates):
        certified = certified_accuracy(best_bound(certificates), list(radii))
        certified["number"] = [f"certified at {radius:g}" for radius in certified["at"]]
        rows += [certified.rename(columns={"method": "model", "certified_accuracy": "share"})]
    found = pd.concat(rows, ignore_index=True).rename(columns={"examples": "images"})
    found["holds"] = (found["share"] * found["images"]).round().astype(int)
    return pd.DataFrame(found[["model", "number", "holds", "images"]])


def pooled(table: pd.DataFrame) -> pd.DataFrame:
    """Each number over its seeds.

    Args:
        table: columns ``profile model number seed holds images``.
    Returns:
        one row a profile, model and number, in their first order: ``seeds``; in per cent ``mean``, ``least`` and
        ``most`` over the seeds, and ``low`` and ``high``, the exact 95 % interval of all seeds' images counted
        together. That interval takes the images for independent trials, though each seed is asked the same ones, and
        the seeds for one network: the spread stands beside it because either alone is too narrow.
    Source: `binomial_interval` (Clopper and Pearson 1934).
    """
    shares = table.assign(share=100 * table["holds"] / table["images"])
    groups = shares.groupby(KEYS, sort=False)
    found = groups["share"].agg(mean="mean", least="min", most="max").reset_index()
    found.insert(len(KEYS), "seeds", groups["seed"].nunique().to_numpy())
    counts = pd.DataFrame(groups[["holds", "images"]].sum())
    both = zip(counts["holds"].tolist(), counts["images"].tolist(), strict=True)
    bounds = [binomial_interval(holds, images) for holds, images in both]
    return found.assign(low=[100 * low for low, _ in bounds], high=[100 * high for _, high in bounds])


def seeds_table(table: pd.DataFrame, numbers: Sequence[str]) -> pd.DataFrame:
    """`pooled` in words: a row a method, of some numbers; the mean with its pooled interval, and the least and the most
    of the seeds."""
    found = pooled(pd.DataFrame(table[table["number"].isin([*numbers])]))
    shares = found[["mean", "low", "high"]] / 100
    words = [with_interval(*row) for row in shares.itertuples(index=False)]
    spread = [f"{least:.1f} to {most:.1f}" for least, most in found[["least", "most"]].itertuples(index=False)]
    found["said"] = [f"{word}, {each}" for word, each in zip(words, spread, strict=True)]
    wide = found.pivot_table(index="model", columns="number", values="said", aggfunc="first")
    models = in_order([str(model) for model in wide.index])
    wide = wide.loc[models, [*numbers]].fillna("–")
    wide.insert(0, "seeds", found.groupby("model")["seeds"].first())
    return wide.rename(index=method_name).rename_axis("method", axis="index").reset_index().rename_axis(None, axis=1)


def budgets_table(table: pd.DataFrame, numbers: Sequence[str]) -> pd.DataFrame:
    """Methods trained for several numbers of epochs: a row each, of some numbers with their intervals, in per cent.

    Args:
        table: columns ``model number epochs holds images``, one training each.
    """
    asked = pd.DataFrame(table[table["number"].isin([*numbers])])
    counts = pd.DataFrame(asked[["holds", "images"]]).itertuples(index=False)
    asked["said"] = [with_interval(holds / images, *binomial_interval(holds, images)) for holds, images in counts]
    wide = asked.pivot(index=["model", "epochs"], columns="number", values="said")[[*numbers]].reset_index()
    models = in_order({str(model) for model in wide["model"]})
    wide = wide.sort_values("model", key=lambda names: names.map(models.index), kind="stable", ignore_index=True)
    wide["model"] = wide["model"].map(method_name)
    return wide.rename(columns={"model": "method"}).rename_axis(None, axis=1)
