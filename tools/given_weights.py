"""Attack anew a cluster network whose weights came from elsewhere: rows as `attacks` of a run has them.

    python -m tools.given_weights --weights clustr-w64-half.safetensors --recipe clustr-run.json --data FOLDER \\
        --source model_test.pt --into results/published/full-width/again-clustr.csv

The weights are a run's file (`network.*` and `clusters.*`), the recipe that file's ``run.json``, whatever version of
the package wrote them. The source of transferred images is a network that the package did not train: the ResNet-18 for
CIFAR-10 that lies in the wheel of AutoAttack's authors, `pyautoattack/examples/model_test.pt`. Rows are kept piece by
piece in ``runs/given-<digest of the weights>``, so a killed call goes on.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import pandas as pd
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from clustr_core import data
from clustr_core.measuring.attacked import measure
from clustr_core.measuring.profile import Protocol
from clustr_core.measuring.targets import AttackTarget
from clustr_core.models.classifiers import ClusterClassifier
from clustr_core.models.clusters import Clusters
from clustr_core.models.encoders import build_encoder
from clustr_core.models.official import load_official
from clustr_core.storage.files import digest, home, read_json
from clustr_core.storage.provenance import environment, write_sidecar
from clustr_core.storage.tables import write_table
from clustr_core.training.run import prefixed

EPS = 8 / 255
# the attacks of profile gpu that end within minutes on two cores; the paper's protocol has one restart
PROTOCOLS = {
    "paper": Protocol(attack="paper", eps=(EPS,), steps=100, restarts=1),
    "pgd": Protocol(eps=(EPS,), steps=40, losses=("ce", "margin", "dlr")),
    "walk": Protocol(attack="cell-walk", eps=(EPS,), steps=40, restarts=9),
    "transfer": Protocol(attack="transfer", eps=(EPS,), steps=40, losses=("ce",)),
}


def network(weights: Path, recipe: dict, shape: tuple[int, int, int]) -> nn.Module:
    """The cluster network of a run's file, in float32 and evaluation mode."""
    tensors = load_file(weights)
    encoder = build_encoder(recipe["encoder"], shape, width=recipe["width"], dataset=recipe["dataset"])
    parts = prefixed(tensors, "network.encoder.")
    encoder.load_state_dict({name: each.float() if each.is_floating_point() else each for name, each in parts.items()})
    clusters = Clusters(*(tensors[f"clusters.{name}"] for name in ("centroids", "labels", "variance")))
    return ClusterClassifier(encoder, clusters, neighbours=recipe["neighbours"]).eval()


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; 0 when the table is there."""
    parser = argparse.ArgumentParser(prog="python -m tools.given_weights", description="Attack given weights anew.")
    for name in ("weights", "recipe", "data", "source", "into"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--examples", type=int, default=64, help="test images, the first of the drawn order (64)")
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args(arguments)
    try:
        return _measured(options)
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        said = f"expected {error} in it" if isinstance(error, KeyError) else " ".join(str(error).split())
        print(f"given_weights: {said}; --weights and --recipe are a run's files", file=sys.stderr)
        return 2


def _measured(options: argparse.Namespace) -> int:
    recipe = read_json(options.recipe)["recipe"]
    dataset, sha256 = data.load_dataset(f"folder:{options.data}"), digest(options.weights.read_bytes())
    kept = home() / "runs" / f"given-{sha256[:10]}" / "tables"
    target = AttackTarget(
        recipe["method"], lambda: network(options.weights, recipe, dataset.image_shape).to(options.device), sha256,
        kept, dataset, options.device,
    )  # fmt: skip
    other = digest(options.source.read_bytes())
    source = AttackTarget(
        "source", lambda: load_official(options.source, dataset="cifar10").to(options.device), other, kept, dataset,
        options.device,
    )  # fmt: skip
    parts = []
    for name, protocol in PROTOCOLS.items():
        asked = Protocol(**{**vars(protocol), "examples": options.examples})
        parts.append(measure(target, asked, source=source if name == "transfer" else None))
        print(parts[-1].groupby("loss")["robust"].mean().rename(name), flush=True)
    table = pd.concat(parts, ignore_index=True).assign(method=recipe["method"])
    write_table(options.into, table)
    facts = {"weights_sha256": sha256, "source_sha256": other, "recipe": recipe}
    made = environment(options.device) | {"profile": {"name": None, "sha256": None}} | facts
    write_sidecar(options.into, made, note="Attacks on given weights, by python -m tools.given_weights.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
