import math
from contextlib import nullcontext
from dataclasses import replace
from itertools import product

import pandas as pd
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from clustr_core import costs, data
from clustr_core.certificates.ladder import certified_radius
from clustr_core.measuring.profile import load_profile
from clustr_core.models.clusters import Clusters
from clustr_core.models.encoders import build_encoder
from clustr_core.training.loop import fit
from clustr_core.training.recipes import (
    AdversarialTraining,
    Clustr,
    ClustrQTrades,
    CrossEntropy,
    FreeAdversarialTraining,
    Trades,
)

MACHINE = costs.Machine("a machine", 1e12, 1e11, 1e10, 1e9)


@pytest.mark.parametrize(("width", "side"), [(4, 32), (8, 32), (4, 20)])
def test_the_formula_of_a_resnet_is_what_pytorch_counts(width, side):
    formula = costs.resnet18(width=width, side=side)
    counted = costs.counted(formula.name, build_encoder("resnet18", (3, side, side), width=width), (3, side, side))
    assert formula.forward_flops == counted.forward_flops
    assert formula.first_flops == counted.first_flops
    assert formula.parameters == counted.parameters
    assert formula.activations == counted.activations
    assert formula.dim == counted.dim == 8 * width


def test_the_formula_of_resnet_50_is_torchvisions():
    from torchvision.models import resnet50

    with torch.device("meta"):
        network = resnet50()
    network.fc = torch.nn.Identity()
    formula = costs.resnet50()
    assert formula.parameters == sum(parameter.numel() for parameter in network.parameters())
    with FlopCounterMode(display=False) as counter:
        network.eval()(torch.zeros(1, 3, 224, 224, device="meta"))
    assert counter.get_total_flops() == formula.forward_flops
    assert formula.dim == 2048


@pytest.mark.parametrize(
    "recipe",
    [CrossEntropy(), AdversarialTraining(steps=3), Trades(steps=2), Clustr(), ClustrQTrades(),
     FreeAdversarialTraining(replays=2)],
    ids=lambda recipe: recipe.method,
)  # fmt: skip
def test_an_epochs_flops_are_those_of_its_passes(recipe):
    """By the words of each method: what goes forward, what goes back to the image, what goes back to the weights."""
    network = costs.resnet18(width=4)
    forward, first = network.forward_flops, network.first_flops
    expected = {
        "ce": 3 * forward - first,
        "pgd-at": 3 * 2 * forward + 3 * forward - first,
        "trades": forward + 2 * 2 * forward + 2 * (3 * forward - first),
        "clustr": 3 * forward - first + forward,
        "clustr-qtrades": 2 * forward + 2 * (3 * forward - first) + forward,
        "free-at": 2 * 3 * forward,
    }
    assert costs.epoch_flops(recipe, network) == expected[recipe.method]


class AnyModule(nullcontext):
    """In place of the counter's own tracker of modules, which cannot follow `torch.autograd.grad` to a leaf."""

    parents = frozenset({"Global"})


SMOKE = {name: recipe for name, recipe in load_profile("smoke").recipes.items() if recipe.encoder == "small-cnn"}


@pytest.mark.parametrize("method", SMOKE)
def test_an_epochs_flops_are_those_of_a_real_one(method, tmp_path, monkeypatch):
    """What a second epoch adds to a first, counted by PyTorch; beside the network there is little."""
    # the check after each epoch embeds a few images, as many for 160 examples as for 50,000
    monkeypatch.setattr("clustr_core.training.loop.check_embeddings", lambda *_: None)
    examples, few = 160, {"milestones": (), "snapshots": (), "warm_start": None, "train_examples": 160}
    batches = {"per_cluster": 4, "clusters_per_batch": 8} if SMOKE[method].clustered else {"batch_size": 32}
    digits = data.load_dataset("digits")

    def spent(epochs: int) -> int:
        recipe = replace(SMOKE[method], epochs=epochs, **few, **batches)
        counter = FlopCounterMode(display=False)
        counter.mod_tracker = AnyModule()
        with counter:
            fit(recipe, dataset=digits, folder=tmp_path / str(epochs), device="cpu", progress=False)
        return counter.get_total_flops()

    encoder = build_encoder("small-cnn", digits.image_shape, width=SMOKE[method].width)
    expected = examples * costs.epoch_flops(SMOKE[method], costs.counted("", encoder, digits.image_shape))
    assert spent(2) - spent(1) == pytest.approx(expected, rel=0.02)


def test_products_around_the_network():
    assert costs.distances(5, 7, 3).flops == 2 * 5 * 7 * 3
    assert costs.distances(5, 7, 3, products=3).flops == 3 * 2 * 5 * 7 * 3
    assert costs.magnet_flops(240, 12, 512) == 4 * 2 * 240 * 12 * 512
    z, mu = torch.randn(5, 3), torch.randn(7, 3)
    with FlopCounterMode(display=False) as counter:
        z @ mu.T
    assert counter.get_total_flops() == costs.distances(5, 7, 3).flops
    assert costs.broadcast_bytes(50_000, 1000, 512) > 1e11
    work = {bound: costs.certificate(100, 40, 4, 8, bound=bound) for bound in costs.BOUNDS}
    assert work["exact"].flops > work["pairwise"].flops == work["nearest"].flops
    assert work["soft-dual"].operations > work["soft-lse"].operations > work["soft-local"].operations


@pytest.mark.parametrize("bound", costs.BOUNDS)
@pytest.mark.parametrize(("points", "classes", "per_class", "dim"), [(300, 30, 10, 64), (400, 20, 5, 32)])
def test_certificates_are_the_products_that_pytorch_counts(bound, points, classes, per_class, dim):
    g = torch.Generator().manual_seed(0)
    count = classes * per_class
    centroids = torch.randn(count, dim, generator=g)
    clusters = Clusters(centroids, torch.arange(count) // per_class, torch.full((count,), 1.0))
    z = centroids[torch.arange(points) % count] + 0.3 * torch.randn(points, dim, generator=g)
    with FlopCounterMode(display=False) as counter:
        certified_radius(z, clusters, bound=bound, rule="soft" if bound.startswith("soft") else "nearest")
    counted = counter.get_total_flops()
    # what is in float64 is counted once by PyTorch, and twice here
    embeddings, between = 2 * points * count * dim, 2 * count**2 * dim
    doubled = counted - embeddings if bound.startswith("soft") else between
    assert costs.certificate(points, count, per_class, dim, bound=bound).flops == pytest.approx(
        counted + doubled, rel=0.08
    )


def test_work_of_the_clusters_and_bytes_of_a_pass():
    # twice: three points, each against two centroids of four numbers
    assert costs.kmeans(3, 2, 4, iterations=2).flops == 2 * 3 * 2 * (2 * 4)
    assert costs.kmeans(3, 2, 4, iterations=2, starts=5).flops == 5 * 2 * 3 * 2 * (2 * 4)
    network = costs.resnet18(width=4)
    # written, read and written by what normalises, read by the next layer; in float32
    assert costs.forward(network, 3).bytes == 3 * network.activations * 4 * 4
    assert costs.certificate(10, 4, 2, 3, bound="nearest").bytes == 4 * (10 + 4) * 3


def test_bytes_that_are_sent():
    assert costs.all_reduce_bytes(1000, 1) == costs.gathered_bytes(10, 4, 1) == 0
    assert costs.all_reduce_bytes(1000, 8) == 2 * 7 / 8 * 4000
    assert costs.gathered_bytes(16, 4, 8) == 16 * 4 * 4 / 8


def test_seconds_are_the_slower_of_arithmetic_and_memory():
    work = costs.Work("forward", flops=1e12, operations=1e11, bytes=1e9)
    assert costs.seconds(work, MACHINE) == 2.0
    assert costs.seconds(replace(work, bytes=1e11), MACHINE) == 10.0
    assert costs.seconds(work, replace(MACHINE, devices=4)) == 0.5
    half = costs.calibrated(MACHINE, work, 4.0)
    assert half.efficiency.forward == 0.5
    assert costs.seconds(work.times(3), half) == pytest.approx(12.0)
    # products of clusters are not the tensor cores'
    assert costs.seconds(replace(work, kind="kmeans"), half) == 11.0


@pytest.mark.parametrize("measured", [0.0, -1.0, 0.01])
def test_a_time_that_cannot_be_is_refused(measured):
    with pytest.raises(ValueError, match="measured: expected"):
        costs.calibrated(MACHINE, costs.Work("forward", 1e12, bytes=1e9), measured)


def test_a_machine_without_speed_is_refused():
    with pytest.raises(ValueError, match="bandwidth: expected a positive number, got 0"):
        costs.Machine("none", 1.0, 1.0, bandwidth=0)


def test_the_slope_of_growth():
    sizes = [1.0, 2.0, 4.0, 8.0]
    assert costs.growth_slope(sizes, [3 * size**2 for size in sizes]) == pytest.approx(2)
    assert costs.growth_slope(sizes, [5.0] * 4) == pytest.approx(0, abs=1e-12)
    with pytest.raises(ValueError, match="sizes, times: expected two or more positive pairs"):
        costs.growth_slope([1.0, 1.0], [1.0, 2.0])


def test_slopes_in_a_table():
    sizes = [10.0, 20.0, 40.0]
    kinds = {("k-means", "points"): 1, ("k-means", "clusters"): 2, ("logits", "points"): 0}
    rows = [(*kind, size, 3 * size**power) for kind, power in kinds.items() for size in sizes]
    table = costs.slopes_table(pd.DataFrame(rows, columns=["what", "parameter", "size", "seconds"]))
    assert list(table) == ["what", "clusters", "points"]
    assert table.set_index("what")["points"].to_dict() == {"k-means": 1, "logits": 0}
    assert table["clusters"].tolist()[0] == 2
    assert table["clusters"].isna().tolist() == [False, True]


def test_a_table_of_plans_holds_what_each_plan_says():
    studies = [costs.Study("a", costs.resnet18(width=8), 1000, 100, 10, per_class=k) for k in (1, 5)]
    table = costs.plan_table(studies, (costs.A100, costs.H100), (1, 8))
    assert len(table) == 2 * 2 * 2 * len(costs.plan(studies[0], costs.A100))
    for study, machine, devices in product(studies, (costs.A100, costs.H100), (1, 8)):
        mine = table[(table.k == study.per_class) & (table.machine == machine.name) & (table.devices == devices)]
        parts = costs.plan(study, replace(machine, devices=devices))
        assert mine["part"].tolist() == [part.name for part in parts]
        assert mine["hours"].tolist() == [part.seconds / 3600 for part in parts]
        assert mine["flops"].tolist() == [part.flops for part in parts]


def test_a_plan_for_imagenet():
    study = costs.Study("ImageNet-1k", costs.resnet50(), 1_281_167, 50_000, 1000, per_class=2)
    one = {part.name: part for part in costs.plan(study, costs.A100)}
    eight = {part.name: part for part in costs.plan(study, replace(costs.A100, devices=8))}
    epoch, loop = one["training, one epoch"], one["training, 90 epochs"]
    assert epoch.flops == 1_281_167 * (3 * study.network.forward_flops - study.network.first_flops)
    assert loop.seconds == pytest.approx(90 * (epoch.seconds + one["refresh, one epoch"].seconds))
    # ideal but for what is sent, and for k-means, which is one device's
    assert epoch.seconds / 8 <= eight["training, one epoch"].seconds <= epoch.seconds / 4
    assert eight["attack, 200 gradients"].seconds == pytest.approx(one["attack, 200 gradients"].seconds / 8)
    more = {part.name: part for part in costs.plan(replace(study, per_class=10), costs.A100)}
    assert more["certificates, pairwise"].flops > one["certificates, pairwise"].flops
    assert more["refresh, one epoch"].flops > one["refresh, one epoch"].flops
    assert more["training, one epoch"] == epoch
    assert all(math.isfinite(part.seconds) and part.seconds > 0 for part in one.values())


def test_a_bill_by_hand():
    tariff = costs.Tariff(per_hour=3.0, watts=700)
    assert tariff.money(1800) == 1.5
    assert tariff.kilowatt_hours(1800) == 0.35
    recipes = load_profile("gpu").recipes
    an_epoch = {"ce": 5.0, "clustr": 4.0}
    start, recipe = recipes["ce"], recipes["clustr"]
    taken = 5 * start.epochs + 4 * recipe.epochs
    assert costs.training_seconds(recipe, an_epoch) == taken
    table = costs.bills_table(recipes, an_epoch, tariff).set_index("method")
    assert list(table.index) == ["cross-entropy", "ClusTR"]
    assert table.loc["ClusTR"].tolist() == [
        4.0, f"{start.epochs} + {recipe.epochs}", taken / 60, tariff.money(taken), tariff.kilowatt_hours(taken)
    ]  # fmt: skip
    with pytest.raises(ValueError, match="an_epoch: expected the seconds of ce, got those of clustr"):
        costs.training_seconds(recipe, {"clustr": 4.0})


@pytest.mark.parametrize("name", ["per_hour", "watts"])
@pytest.mark.parametrize("value", [-1.0, float("nan"), float("inf")])
def test_a_tariff_is_finite_and_not_negative(name, value):
    with pytest.raises(ValueError, match=f"{name}: expected a finite number that is not negative, got {value}"):
        costs.Tariff(**({"per_hour": 1.0, "watts": 1.0} | {name: value}))
