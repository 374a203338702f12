"""How far the number of threads moves a profile's numbers, beside how far the seed does.

    python -m benchmarks.repeat --profile quick --methods ce pgd-at clustr clustr-cert --seeds 3 --threads 1 2

Each method is trained at each seed by each number of threads and measured by the same number; what the fewest threads
trained is measured by the others, too. So what measuring moves and what training moves stand apart. Adds a
training at a time to results/bench/repeat.csv, and what is moved by how much to moved.csv: killed, run it again.
"""

import argparse
import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context

import pandas as pd
import torch

from benchmarks.growing import add_rows, asked_of_profile, done_at, profile_of, results_of, rows_at
from clustr_core.measuring.attacked import attacks_of
from clustr_core.measuring.certified import certificates_of
from clustr_core.measuring.examination import diagnostics_of
from clustr_core.measuring.moved import moved_by
from clustr_core.measuring.profile import Profile, load_profile
from clustr_core.measuring.seeds import counted
from clustr_core.storage.files import home
from clustr_core.storage.tables import write_table
from clustr_core.training.loop import fit
from clustr_core.training.recipes import Recipe
from clustr_core.training.run import Run
from tools.telling import count, told

KEY = ["profile", "asked", "method", "seed", "trained_by"]
RADIUS = 0.5


def seeded(recipe: Recipe, seed: int) -> Recipe:
    """A recipe, and what it starts from, of another seed."""
    start = recipe.warm_start and seeded(recipe.warm_start, seed)
    return replace(recipe, seed=seed, warm_start=start)


def numbers(run: Run, profile: Profile) -> Iterator[dict[str, object]]:
    """Every number of a run that a page may print: accuracies, in shares, and 1 for each check that fires."""
    promised = run.recipe.guarantee == "lipschitz"
    certificates = certificates_of(run, profile, progress=False) if promised else pd.DataFrame()
    attacks = attacks_of(run, profile, progress=False)
    for row in counted(attacks, certificates, eps=profile.examination.eps, radii=[RADIUS]).to_dict("records"):
        yield {"model": row["model"], "number": row["number"], "value": row["holds"] / row["images"]}
    if run.recipe.method in profile.ordinary:
        for row in diagnostics_of(run, profile).to_dict("records"):
            yield {"model": row["method"], "number": f"check {row['check']}", "value": float(row["flagged"])}


def rows_of(name: str, method: str, seed: int, trained_by: int, measured_by: Sequence[int]) -> pd.DataFrame:
    """All numbers of one training, by each number of threads that measures it."""
    profile = load_profile(name)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        os.environ["CLUSTR_HOME"] = folder
        torch.set_num_threads(trained_by)
        seen = replace(profile, recipes={other: seeded(recipe, seed) for other, recipe in profile.recipes.items()})
        run = fit(seen.recipes[method], device="cpu", progress=False)
        for threads in measured_by:
            torch.set_num_threads(threads)
            # what an attack is transferred from
            fit(seen.recipes["ce"], device="cpu", progress=False)
            rows += [{"measured_by": threads, **row} for row in numbers(run, seen)]
    return pd.DataFrame(rows).assign(
        **dict(zip(KEY, (name, asked_of_profile(profile), method, seed, trained_by), strict=True))
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Train, measure, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--profile", default="quick")
    parser.add_argument("--methods", nargs="+", default=["ce", "pgd-at", "clustr", "clustr-cert"])
    parser.add_argument("--seeds", type=count, default=3)
    parser.add_argument("--threads", type=count, nargs="+", default=[1, 2], help="what the fewest trained, all measure")
    parser.add_argument("--jobs", type=count, default=1, help="trainings side by side")
    options = parser.parse_args(arguments)
    path, counts = home() / "results/bench" / "repeat.csv", sorted(set(options.threads))
    profile = profile_of(parser, options.profile)
    if unknown := set(options.methods) - set(profile.recipes):
        parser.error(f"--methods: expected some of {', '.join(profile.recipes)}, got {', '.join(sorted(unknown))}")
    digest = asked_of_profile(profile)
    asked = [
        (options.profile, digest, method, seed, threads)
        for seed in range(options.seeds)
        for method in options.methods
        for threads in counts
    ]
    done = done_at(path, [*KEY, "measured_by"])
    with ProcessPoolExecutor(options.jobs, mp_context=get_context("spawn"), max_tasks_per_child=1) as pool:
        waiting = [
            pool.submit(rows_of, options.profile, *key[2:], missing)
            for key in asked
            if (missing := [by for by in (counts if key[-1] == counts[0] else [key[-1]]) if (*key, by) not in done])
        ]
        for rows in results_of(waiting):
            add_rows(path, rows[[*KEY, "measured_by", "model", "number", "value"]], [*KEY, "measured_by"])
    found = rows_at(path, KEY)
    moved = moved_by(found[found["asked"] == digest])
    write_table(path.with_name("moved.csv"), moved)
    print(moved.to_string(index=False, float_format="%.1f"))


if __name__ == "__main__":
    sys.exit(told(main))
