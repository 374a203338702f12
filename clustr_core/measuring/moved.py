"""What another number of threads moves, and what another seed does: rows of `benchmarks.repeat` side by side."""

import pandas as pd

CHECK = "check "
KEYS = ["profile", "model", "number"]
MOVES = ["by_measuring", "by_training", "by_seed"]


def moved_by(table: pd.DataFrame) -> pd.DataFrame:
    """How far each number of each model is moved.

    Args:
        table: columns ``profile seed trained_by measured_by model number value``: shares, or 1 for a check that fires.
            What the smallest number of threads trained is measured by the others, too; these measure their own.
    Returns:
        one row a model and number: ``value``, the mean over ``seeds`` of them, in per cent; and in points what moved
        it: ``by_measuring`` (the same weights by other threads) and ``by_training`` (trained and measured by others),
        the largest over the seeds where that was tried (NaN where it was not), and ``by_seed``, between the two seeds
        that are furthest apart. All checks of a model are one row, "checks": how many there are, and how many verdicts
        turned.
    """
    first, table = table["trained_by"].min(), table.reset_index(drop=True)
    base = _of_fewest(table)
    others = table.drop(base.index)
    both = others.merge(base, on=[*KEYS, "seed"], suffixes=("", "_of_first"))
    both["apart"] = (both["value"] - both["value_of_first"]).abs()
    both["by"] = ["by_measuring" if threads == first else "by_training" for threads in both["trained_by"]]
    apart = both.pivot_table(index=KEYS, columns="by", values="apart", aggfunc="max").reindex(columns=MOVES[:2])
    of_seeds = base.groupby(KEYS)["value"].agg(["mean", "max", "min", "size"])
    numbers = of_seeds.assign(by_seed=of_seeds["max"] - of_seeds["min"]).join(apart).reset_index()
    numbers = pd.DataFrame(
        numbers.rename(columns={"mean": "value", "size": "seeds"})[[*KEYS, "seeds", "value", *MOVES]]
    )
    is_check = numbers["number"].str.startswith(CHECK)
    shares = pd.DataFrame(numbers.loc[~is_check])
    shares = shares.assign(**{name: 100 * shares[name] for name in ["value", *MOVES]})
    return pd.concat([shares, _checks(pd.DataFrame(numbers.loc[is_check]))], ignore_index=True).sort_values(
        KEYS, ignore_index=True, kind="stable"
    )


def _of_fewest(table: pd.DataFrame) -> pd.DataFrame:
    """The rows that the smallest number of threads trained and measured."""
    fewest = table["trained_by"].min()
    return pd.DataFrame(table[(table["trained_by"] == fewest) & (table["measured_by"] == fewest)])


def _checks(numbers: pd.DataFrame) -> pd.DataFrame:
    """All checks of a model as one row: counts."""
    turned = numbers.assign(
        number="checks", value=1, **{name: numbers[name].gt(0).where(numbers[name].notna()) for name in MOVES}
    )
    counts = dict.fromkeys(["value", *MOVES], lambda values: values.sum(min_count=1))
    counted = turned.groupby(KEYS, as_index=False).agg({"seeds": "min", **counts})
    return pd.DataFrame(counted)


def moved_table(moved: pd.DataFrame) -> pd.DataFrame:
    """`moved_by` in words: accuracies in per cent and points; the checks, which are counts, are left out."""
    shares = moved[moved["number"] != "checks"]
    names = {
        "value": "mean of the seeds, %",
        "by_measuring": "measured by two threads",
        "by_training": "trained by two threads",
        "by_seed": "between two seeds",
    }
    words = pd.DataFrame(shares).rename(columns={"model": "method", **names})
    return pd.DataFrame(words[["method", "number", *names.values()]])


def gap_table(table: pd.DataFrame) -> pd.DataFrame:
    """By how many points the paper's protocol reports more than correct attacks leave: a row a model, a column a seed.

    Args:
        table: as `moved_by` takes it; what the fewest threads trained and measured is taken.
    """
    wide = _of_fewest(table).pivot_table(index=["model", "seed"], columns="number", values="value").reset_index()
    wide["gap"] = 100 * (wide["paper's protocol"] - wide["correct attacks"])
    wide["seed"] = [f"seed {seed}" for seed in wide["seed"]]
    return wide.pivot_table(index="model", columns="seed", values="gap").rename_axis("method").reset_index()
