"""Attack anew a cluster network whose weights came from elsewhere: rows as `attacks` of a run has them.

    python -m tools.given_weights --weights clustr-w64-half.safetensors --recipe clustr-run.json --data FOLDER \\
        --source model_test.pt --into results/published/full-width/again-clustr.csv

The weights are a run's file (`network.*` and `clusters.*`), the recipe that file's ``run.json``, whatever version of
the package wrote them. The source of transferred images is a network that the package did not train: the ResNet-18 for
CIFAR-10 that lies in the wheel of AutoAttack's authors, `pyautoattack/examples/model_test.pt`. Rows are kept piece by
piece in ``runs/given-<digest of the weights>``, so a killed call goes on.

With ``--battery`` (and, on a CPU, ``--examples 16``) the checks of the battery judge single-loss PGD and the paper's
protocol on that network, beside what the published attacks on it left of the same images: rows of `power.measured`.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor, nn

from clustr_core import data
from clustr_core.measuring import power
from clustr_core.measuring.attacked import measure
from clustr_core.measuring.pieces import drawn_order
from clustr_core.measuring.profile import Protocol
from clustr_core.measuring.study import full_width
from clustr_core.measuring.targets import AttackTarget
from clustr_core.measuring.written import check_output, write_rows
from clustr_core.models.embed import predictions
from clustr_core.models.official import load_official
from clustr_core.numerics.checks import check_positive
from clustr_core.storage.files import digest, home, read_json
from clustr_core.storage.gate import TENSORS_LIMIT, read_bytes
from clustr_core.storage.provenance import environment
from clustr_core.training.recipes import Recipe, recipe_from_dict, recipe_to_dict
from clustr_core.training.run import cluster_network

EPS = 8 / 255
# the attacks of profile gpu that end within minutes on two cores; the paper's protocol has one restart
PROTOCOLS = {
    "paper": Protocol(attack="paper", eps=(EPS,), steps=100, restarts=1),
    "pgd": Protocol(eps=(EPS,), steps=40, losses=("ce", "margin", "dlr")),
    "walk": Protocol(attack="cell-walk", eps=(EPS,), steps=40, restarts=9),
    "transfer": Protocol(attack="transfer", eps=(EPS,), steps=40, losses=("ce",)),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; 0 when the table is there."""
    parser = argparse.ArgumentParser(prog="python -m tools.given_weights", description="Attack given weights anew.")
    for name in ("weights", "recipe", "data", "source", "into"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--examples", type=int, default=64, help="test images, the first of the drawn order (64)")
    parser.add_argument("--battery", action="store_true", help="the checks of the battery in place of attacks")
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args(arguments)
    try:
        return _measured(options)
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        said = f"expected {error} in it" if isinstance(error, KeyError) else " ".join(str(error).split())
        print(f"given_weights: {said}; --weights and --recipe are a run's files", file=sys.stderr)
        return 2


def _measured(options: argparse.Namespace) -> int:
    check_output(options.into, "--into")
    recipe = recipe_from_dict(read_json(options.recipe)["recipe"])
    content, source = (read_bytes(path, limit=TENSORS_LIMIT) for path in (options.weights, options.source))
    dataset, sha256 = data.load_dataset(f"folder:{options.data}"), digest(content)
    kept = home() / "runs" / f"given-{sha256[:10]}" / "tables"
    target_of = partial(AttackTarget, tables=kept, dataset=dataset, device=options.device)
    # the rule, and what pixels are centred by, are the recipe's
    asked_of = digest(sha256, json.dumps(recipe_to_dict(recipe), sort_keys=True))

    def network() -> nn.Module:
        return (
            cluster_network(recipe, dataset.image_shape, load(content), recipe.rule, options.weights)
            .eval()
            .to(options.device)
        )

    other = digest(source)
    facts = {"weights_sha256": sha256, "source_sha256": other, "recipe": recipe_to_dict(recipe)}

    def stranger() -> nn.Module:
        network = load_official(options.source, dataset="cifar10").to(options.device)
        _check_same(options.source, other)
        return network

    if options.battery:
        check_positive(examples=options.examples)
        return _battery(options, recipe, dataset, network(), stranger(), facts)
    target, transferred = target_of(recipe.method, network, asked_of), target_of("source", stranger, other)
    parts = []
    for name, protocol in PROTOCOLS.items():
        asked = replace(protocol, examples=options.examples)
        parts.append(measure(target, asked, source=transferred if name == "transfer" else None))
        print(parts[-1].groupby("loss")["robust"].mean().rename(name), flush=True)
    table = pd.concat(parts, ignore_index=True).assign(method=recipe.method)
    made = environment(options.device) | {"profile": {"name": None, "sha256": None}} | facts
    write_rows(options.into, table, made, note="Attacks on given weights, by python -m tools.given_weights.")
    return 0


def _check_same(path: Path, sha256: str) -> None:
    """Rows are kept under the digest of what was there at first."""
    if (found := digest(read_bytes(path, limit=TENSORS_LIMIT))) != sha256:
        raise ValueError(f"{path}: expected the file of sha256 {sha256[:10]} that was there at first, got {found[:10]}")


# of the published rows' predictions; rounding weights to half precision moves a few
SAME_PREDICTIONS = 0.95


def _check_published(network: nn.Module, images: Tensor, labels: Tensor, indices: Sequence[int], device: str) -> None:
    """What attacks left is read off the published rows: they must be of this network and these images.

    Raises:
        ValueError: if they are not.
    """
    rows = full_width().drop_duplicates("index").set_index("index")
    if not set(indices) <= set(rows.index):
        raise ValueError(
            f"--examples: expected with --battery at most {len(rows)}, whose rows are there, got {len(indices)}"
        )
    published = rows.loc[list(indices)]
    if published["label"].tolist() != labels.tolist():
        raise ValueError("--data: expected with --battery the images of the published rows, got others")
    same = np.mean(published["prediction"].to_numpy() == predictions(network, images, device).numpy())
    if same < SAME_PREDICTIONS:
        raise ValueError(
            "--weights: expected with --battery those of the published rows, got others, of whose predictions "
            f"{same:.0%} are the same"
        )


def _battery(
    options: argparse.Namespace,
    recipe: Recipe,
    dataset: data.Dataset,
    network: nn.Module,
    stranger: nn.Module,
    facts: dict[str, object],
) -> int:
    """The checks on single-loss PGD and on the paper's protocol, beside what the published attacks left."""
    indices = drawn_order(dataset)[: options.examples].sort().values
    images = data.to_float(dataset.test_images[indices]).to(options.device)
    labels = dataset.test_labels[indices].to(options.device)
    _check_published(
        network, dataset.test_images[indices], dataset.test_labels[indices], indices.tolist(), options.device
    )
    rows = full_width()
    at_eps = pd.DataFrame(rows[(rows["norm"] == "linf") & (rows["eps"] <= EPS + 1e-6)])
    robust = pd.Series(at_eps.groupby("index")["robust"].min())
    worst = float(np.mean([bool(robust[index]) for index in indices.tolist()]))
    size = {"eps": EPS, "steps": 10, "restarts": 1}
    tables = [
        power.measured(judged, source=stranger, queries=100, worst=worst)
        for judged in power.evaluations_of({recipe.method: network}, images, labels, **size)
    ]
    about = {"data": dataset.name, "width": recipe.width, "seed": recipe.seed}
    table = pd.DataFrame({**about, **pd.concat(tables, ignore_index=True)})
    made = environment(options.device) | {"profile": {"name": None, "sha256": None}} | facts
    note = "The battery on given weights, by python -m tools.given_weights --battery."
    write_rows(options.into, table, made, note=note)
    return 0


if __name__ == "__main__":
    sys.exit(main())
