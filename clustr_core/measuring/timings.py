"""What `make bench` measured, as the book prints it: the published tables, ``results/published/bench/``."""

import pandas as pd

from clustr_core.measuring.study import method_name
from clustr_core.storage.files import home
from clustr_core.storage.provenance import read_checked

# what is timed in certification-cost.csv
CERTIFIERS = {
    "encoder": "one forward pass of the encoder",
    "clusters-exact": "clusters, exact",
    "clusters-nearest": "clusters, nearest",
    "clusters-pairwise": "clusters, pairwise",
    "linear-margin": "linear head",
    "smoothing-1000": "smoothing, 1,000 samples",
    "smoothing-100000-by-proportion": "smoothing, 100,000 samples (by proportion)",
    "pixels-nearest": "prototypes on pixels, nearest",
    "pixels-pairwise": "prototypes on pixels, pairwise",
    "pixels-exact": "prototypes on pixels, exact",
}


def bench(name: str) -> pd.DataFrame:
    """A published table of a benchmark.

    Raises:
        FileNotFoundError: if there is none, with its path.
    """
    path = home() / "results/published/bench" / f"{name}.csv"
    if not path.exists():
        raise FileNotFoundError(f"{path}: expected a table that make bench wrote, got none")
    return read_checked(path)


def certification_table() -> pd.DataFrame:
    """What it costs to certify one image: a row each certificate."""
    cost = bench("certification-cost")
    rounded = {name: cost[name].map("{:.2g}".format) for name in ("multiply_adds", "seconds_ratio")}
    cost = cost.assign(method=cost["method"].map(CERTIFIERS.get), **rounded)
    headings = {
        "method": "method",
        "forwards": "forward passes",
        "multiply_adds": "multiply-adds",
        "seconds_ratio": "time / one forward pass",
    }
    return pd.DataFrame(cost[list(headings)]).rename(columns=headings)


def targets_table(suites: pd.DataFrame) -> pd.DataFrame:
    """Every target of ``bench.csv``, what is compared, and whether it is met."""
    rows = suites.dropna(subset=["target"])
    units = rows["unit"].where(rows["unit"] != "ratio", "")
    measured = rows["measured"].map("{:.3g}".format) + " " + units
    shown = rows.assign(measured=measured, target="<= " + rows["target"].map("{:g}".format))
    return pd.DataFrame(shown[["name", "compared", "setting", "measured", "target", "met"]])


def price_table(prices: pd.DataFrame) -> pd.DataFrame:
    """The price of each method in units of cross-entropy's, and of one certified image: a row each method."""
    headings = {
        "method": "method",
        "step_ratio": "one step, an image",
        "epochs": "epochs",
        "training_ratio": "whole training",
        "forward_ratio": "one forward pass",
        "certificate_ratio": "certificate / forward pass",
    }
    named = prices.assign(method=prices["method"].map(method_name))
    return pd.DataFrame(named[list(headings)]).rename(columns=headings).round(2)


def precision_table(halves: pd.DataFrame) -> pd.DataFrame:
    """Means over the seeds of ``precision.csv``, in per cent: a row each method, training and attacked model."""
    headings = {
        "clean": "clean, %",
        "robust": "robust, %",
        "certified": "certified, %",
        "too_much": "radius too large, %",
    }
    groups = halves.groupby(["method", "trained", "climbed"], sort=False)
    means = (100 * pd.DataFrame(groups[list(headings)].mean())).round(1).reset_index()
    return means.rename(columns={"climbed": "attack climbs in", **headings})


def gpu_steps_table() -> pd.DataFrame:
    """What an epoch takes on a GPU at the paper's width beside a bare compiled loop: a row each method and way."""
    rows = bench("gpu-steps")
    ways = ["repeated from a recording" if captured else "made anew" for captured in rows["captured"]]
    return pd.DataFrame(
        {
            "what": rows["what"],
            "precision": rows["precision"],
            "updates": ways,
            "images a step": rows["images"],
            "seconds": rows["seconds"].round(2),
            "over the bare loop": rows["ratio"].round(2),
        }
    )


def kernels_table() -> pd.DataFrame:
    """The GPU kernels beside plain PyTorch on a GPU, in milliseconds: a row each kernel and dtype."""
    rows = bench("kernels")
    milliseconds = {name: rows[f"{name}_ms"].round(2) for name in ("ours", "eager", "compiled")}
    return pd.DataFrame({"kernel": rows["kernel"], "dtype": rows["dtype"], **milliseconds})


def epochs_on_a_gpu() -> dict[str, float]:
    """Seconds that an epoch of each method took on an H200, at the paper's width."""
    return bench("gpu-epochs").set_index("method")["seconds"].to_dict()
