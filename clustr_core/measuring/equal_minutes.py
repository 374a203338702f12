"""What encoders, heads and losses certify at equal CPU minutes: rows of `benchmarks.race` and `benchmarks.heads`."""

from collections.abc import Sequence

import numpy as np
import pandas as pd
from scipy import stats

from clustr_core.measuring import study

# what one training of `benchmarks.heads` is
TRAINING = ["dataset", "head", "loss", "margin", "temperature", "seed"]
# of a race: accuracy, and certified accuracy at radii in 255ths
SHARES = ("clean", "at_36", "at_72", "at_108")
HEAD_NAMES = {"linear": "linear", "clusters-1": "1 cluster", "clusters-2": "2 clusters", "clusters-4": "4 clusters"}


def radii_of(table: pd.DataFrame) -> list[str]:
    """The columns of certified accuracy, which are named by their radius, in ascending order."""
    named = [str(name) for name in table if str(name).replace(".", "", 1).isdigit()]
    return sorted(named, key=float)


def best_bounds(table: pd.DataFrame) -> pd.DataFrame:
    """One row a training: that of the bound with the largest mean radius."""
    best = sorted(table.groupby(TRAINING)["mean_radius"].idxmax().tolist())
    return pd.DataFrame(table.loc[best]).reset_index(drop=True)


def chosen_losses(settings: pd.DataFrame) -> dict[str, str]:
    """The loss of each head with the largest mean radius on images held out, under a seed of its own."""
    best = best_bounds(settings)
    chosen = best.loc[best.groupby("head")["mean_radius"].idxmax()]
    return dict(zip(chosen["head"].astype(str), chosen["loss"].astype(str), strict=True))


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Mean and half the width of Student's 95 % interval over seeds.

    Raises:
        ValueError: for less than two of them, which tell of no spread.
    """
    if len(values) < 2:
        raise ValueError(f"values: expected at least two seeds, got {len(values)}")
    spread = float(np.std(values, ddof=1)) / len(values) ** 0.5
    return float(np.mean(values)), float(stats.t.ppf(0.975, len(values) - 1)) * spread


def heads_table(table: pd.DataFrame, settings: pd.DataFrame, radii: Sequence[float]) -> pd.DataFrame:
    """Clean and certified accuracy in per cent, and mean radius, of each head and loss: mean and interval over seeds.

    Args:
        radii: at which certified accuracy is printed; each must be a column of the table.
    """
    best, chosen = best_bounds(table), chosen_losses(settings)
    columns = {"clean": "0", **{f"r = {radius:g}": f"{radius:.6g}" for radius in radii}}
    rows = []
    for head in HEAD_NAMES:
        for loss, some in best[best["head"] == head].groupby("loss", sort=False):
            row = {"head": HEAD_NAMES[head], "loss": str(loss), "margin": float(np.min(some["margin"]))}
            for title, column in columns.items():
                mean, half = interval((100 * some[column]).tolist())
                row[title] = f"{mean:.1f} ± {half:.1f}"
            mean, half = interval(some["mean_radius"].tolist())
            row["mean radius"] = f"{mean:.3f} ± {half:.3f}"
            row["chosen"] = "yes" if chosen[head] == loss else ""
            rows.append(row)
    return pd.DataFrame(rows)


def against_linear(table: pd.DataFrame, settings: pd.DataFrame) -> pd.DataFrame:
    """By how many points each head with clusters is ahead of the linear one at each radius, seed by seed.

    Each head has the loss that was chosen for it on images held out.

    Returns:
        columns ``head radius gain low high``: mean and 95 % interval of the difference over seeds, in points.
    """
    best, chosen = best_bounds(table), chosen_losses(settings)
    radii = radii_of(table)
    curves = {
        head: pd.DataFrame(best.query("head == @head and loss == @loss").set_index("seed")[radii])
        for head, loss in chosen.items()
    }
    rows = []
    for head in (name for name in HEAD_NAMES if name != "linear" and name in curves):
        points = (100 * (curves[head] - curves["linear"])).dropna()
        for radius in radii:
            mean, half = interval(points[radius].tolist())
            rows.append({"head": head, "radius": float(radius), "gain": mean, "low": mean - half, "high": mean + half})
    return pd.DataFrame(rows)


def beside_published(race: pd.DataFrame) -> pd.DataFrame:
    """Certified accuracy against minutes of training: a race's trainings on a CPU, and what others trained on a GPU.

    Args:
        race: of `benchmarks.race`; only what was measured on test images is taken.
    Returns:
        columns ``kind system minutes clean at_36 at_72 at_108``, shares in 0 to 1. Of the others, whose sizes are
        kinds, minutes are those between the times that their logs give to the first and the last epoch.
    Source: Prach et al. 2024, logs of their repository (`study.claims`, metrics "certified in a day" and "minutes").
    """
    names = dict(zip(("0", "36/255", "72/255", "108/255"), SHARES, strict=True))
    printed = study.claims(metric="certified in a day").assign(value=lambda rows: rows["value"].astype(float) / 100)
    wide = printed.pivot(index="method", columns="eps", values="value").rename(columns=names)
    minutes = study.claims(metric="minutes", source="Prach2024").set_index("method")["value"].astype(float)
    wide = wide.assign(minutes=minutes, kind=[f"size {name.rpartition('-')[2]}, on a GPU" for name in wide.index])
    mine = race[race["images"] == "test"].assign(kind="this page, on two CPU cores")
    columns = ["kind", "system", "minutes", *SHARES]
    # as they were added: from the smallest size on
    theirs = wide.loc[list(dict.fromkeys(printed["method"]))].rename_axis("system").reset_index()
    both = [mine.rename(columns={"candidate": "system"})[columns], theirs[columns]]
    return pd.DataFrame(pd.concat(both, ignore_index=True))


def race_table(table: pd.DataFrame) -> pd.DataFrame:
    """Every training of a race, the longest first and then by the mean of its three certified accuracies."""
    ranked = table.assign(score=table[list(SHARES[1:])].mean(axis=1))
    ranked = ranked.sort_values(["minutes", "images", "score"], ascending=[False, False, False], kind="stable")
    named = {"at_36": "36/255", "at_72": "72/255", "at_108": "108/255", "minutes": "CPU minutes"}
    kept = ["candidate", "minutes", "images", "seed", "epochs", *SHARES, "lipschitz"]
    per_cent = {name: 100 * ranked[name] for name in SHARES}
    return pd.DataFrame(ranked.assign(**per_cent)[kept]).rename(columns=named).reset_index(drop=True)
