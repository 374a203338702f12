"""One recipe, several seeds: how far the numbers of a profile stand from those of the same methods trained again.

    python -m benchmarks.seeds --profile cpu --seeds 111 112 113

Each method is trained at each seed, with what it starts from, and attacked as the profile says at the eps of its
examination; where it certifies, it is certified. Of the profile's own seed the published rows are counted. Adds a
training at a time to results/bench/seeds.csv; runs and measured pieces are kept as always: killed, run it again.
"""

import argparse
import itertools
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context

import pandas as pd
import torch

from benchmarks.growing import (
    add_rows,
    asked_of_profile,
    check_published,
    done_at,
    profile_of,
    results_of,
    rows_at,
)
from benchmarks.repeat import seeded
from clustr_core.measuring.attacked import attacks_of
from clustr_core.measuring.certified import certificates_of
from clustr_core.measuring.profile import Profile, Protocol, load_profile
from clustr_core.measuring.seeds import counted, pooled
from clustr_core.measuring.study import RADII, as_far_as_published
from clustr_core.storage.files import home
from clustr_core.training.loop import fit
from clustr_core.training.run import Run
from tools.telling import count, told

METHODS = ["ce", "pgd-at", "clustr", "clustr-qtrades", "clustr-cert", "lip-linear"]
KEY = ["profile", "asked", "method", "seed"]


def at_one_eps(profile: Profile) -> dict[str, Protocol]:
    """The L-infinity attacks of a profile that are asked at its examination's eps, at that eps alone."""
    eps = profile.examination.eps
    asked = {name: each for name, each in profile.attacks.items() if each.norm == "linf" and eps in each.eps}
    return {name: replace(each, eps=(eps,)) for name, each in asked.items()}


def rows_of(name: str, method: str, seed: int) -> pd.DataFrame:
    """The counts of one training."""
    torch.set_num_threads(1)
    profile = load_profile(name)
    about = dict(zip(KEY, (name, asked_of_profile(profile), method, seed), strict=True))
    radii = profile.sandwich.apgd_eps if profile.sandwich else RADII
    if profile.recipes[method].seed == seed:
        study = as_far_as_published(name)
        attacks, certificates = (of_method(rows, method) for rows in (study.attacks, study.certificates))
    else:
        recipes = {other: seeded(recipe, seed) for other, recipe in profile.recipes.items()}
        seen = replace(profile, recipes=recipes, attacks=at_one_eps(profile))
        run, attacks = attacked_anew(seen, method)
        certificates = certificates_of(run, seen, progress=False)
    if profile.recipes[method].guarantee == "none":
        certificates = certificates.iloc[:0]
    return counted(attacks, certificates, eps=profile.examination.eps, radii=radii).assign(**about)


def attacked_anew(profile: Profile, method: str) -> tuple[Run, pd.DataFrame]:
    """A method's run and the rows of its attacks; it is trained, and what these are transferred from, unless it was."""
    sources = {each.source for each in profile.attacks.values() if each.attack == "transfer"}
    for source in sorted(sources - {method}):
        fit(profile.recipes[source], device="cpu", progress=False)
    run = fit(profile.recipes[method], device="cpu", progress=False)
    return run, attacks_of(run, profile, progress=False)


def of_method(rows: pd.DataFrame, method: str) -> pd.DataFrame:
    """The rows of a method, and of clusters fitted on its network."""
    return pd.DataFrame(rows[rows["method"].isin([method, f"{method}-clusters"])])


def main(arguments: Sequence[str] | None = None) -> None:
    """Train, measure, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--profile", default="cpu")
    parser.add_argument("--methods", nargs="+", default=METHODS)
    parser.add_argument("--seeds", type=int, nargs="+", default=[111, 112, 113])
    parser.add_argument("--jobs", type=count, default=1, help="trainings side by side, a thread each")
    options = parser.parse_args(arguments)
    profile = profile_of(parser, options.profile)
    if profile.examination is None:
        parser.error(f"--profile: expected one with an examination, whose eps is asked, got {profile.name}")
    if unknown := sorted(set(options.methods) - set(profile.attacked)):
        parser.error(f"--methods: expected some of {sorted(profile.attacked)}, got {unknown}")
    path, digest = home() / "results/bench" / "seeds.csv", asked_of_profile(profile)
    done, trainings = done_at(path, KEY), [*itertools.product(options.seeds, options.methods)]
    missing = [(method, seed) for seed, method in trainings if (options.profile, digest, method, seed) not in done]
    if any(profile.recipes[method].seed == seed for method, seed in missing):
        check_published(parser, profile)
    with ProcessPoolExecutor(options.jobs, mp_context=get_context("spawn"), max_tasks_per_child=1) as pool:
        waiting = [pool.submit(rows_of, options.profile, *each) for each in missing]
        for rows in results_of(waiting):
            add_rows(path, pd.DataFrame(rows[[*KEY, "model", "number", "holds", "images"]]), KEY)
    found = rows_at(path, KEY)
    print(pooled(found[found["asked"] == digest]).to_string(index=False, float_format="%.1f"))


if __name__ == "__main__":
    sys.exit(told(main))
