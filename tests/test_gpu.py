"""The same calls on a CUDA device; skipped only where there is none."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from clustr_core import data
from clustr_core.attacks.autoattack import autoattack, square
from clustr_core.attacks.cells import cell_walk
from clustr_core.attacks.gradient import pgd
from clustr_core.attacks.paper import ScoreModel, paper_pgd
from clustr_core.attacks.temperature import rescaled
from clustr_core.attacks.transfer import transfer
from clustr_core.certificates.ladder import certify
from clustr_core.measuring.attacked import attack_table
from clustr_core.measuring.certified import certificate_table
from clustr_core.measuring.profile import Protocol
from clustr_core.models.classifiers import ClusterClassifier
from clustr_core.models.clusters import fit_clusters
from clustr_core.models.encoders import build_encoder
from clustr_core.numerics.rounding import full_precision
from clustr_core.training.loop import fit
from clustr_core.training.recipes import (
    ClustrQTrades,
    CrossEntropy,
    FreeAdversarialTraining,
    FreeClustr,
    Recipe,
    Trades,
)

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize(
    "recipe",
    [
        CrossEntropy(epochs=2, width=8, train_examples=400, augmentation="crop-flip"),
        ClustrQTrades(epochs=2, width=8, train_examples=400, per_cluster=8, eps=0.1, step_size=0.125),
        Trades(epochs=2, width=8, train_examples=400, eps=0.05, step_size=0.02, steps=2),
        FreeAdversarialTraining(epochs=2, width=8, train_examples=400, eps=0.05, step_size=0.05, replays=2),
        FreeClustr(epochs=2, width=8, train_examples=400, per_cluster=8, eps=0.05, step_size=0.05, replays=2),
        Trades(epochs=2, width=8, train_examples=400, eps=0.05, step_size=0.02, steps=2, precision="bf16-mixed"),
    ],
    ids=lambda recipe: f"{recipe.method} {recipe.precision}",
)
def test_train_attack_certify(recipe: Recipe, tmp_path: Path) -> None:
    run = fit(recipe, folder=tmp_path / "run", device="cuda", progress=False)
    attacks = attack_table(run, Protocol(eps=(0.1,), steps=5, examples=64), device="cuda", progress=False)
    certificates = certificate_table(run, examples=64, device="cuda")
    # two epochs on 400 images: on a card 0.11 was the least of them, and 0.1 is chance
    assert attacks["correct"].mean() > 0.1
    assert (certificates["lipschitz_lower_bound"] <= certificates["lipschitz"]).all()


def test_a_run_trained_on_the_gpu_predicts_alike_on_the_cpu(tmp_path: Path) -> None:
    recipe = CrossEntropy(epochs=2, width=8, train_examples=400)
    run = fit(recipe, folder=tmp_path / "run", device="cuda", progress=False)
    images = data.to_float(data.load_dataset("digits").test_images[:64])
    with torch.no_grad():
        here, there = run.model("cpu")(images), run.model("cuda")(images.cuda()).cpu()
    torch.testing.assert_close(here, there, rtol=1e-3, atol=1e-3)


def test_the_device_follows_the_inputs() -> None:
    embeddings = torch.randn(60, 5, device="cuda")
    clusters, assignments = fit_clusters(embeddings, torch.arange(60, device="cuda") % 3, per_class=2)
    assert clusters.centroids.is_cuda
    assert assignments.is_cuda
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(16, 3)).cuda()
    images, labels = torch.rand(8, 1, 4, 4, device="cuda"), torch.zeros(8, dtype=torch.long, device="cuda")
    assert pgd(model, images, labels, eps=0.1, step_size=0.02, steps=5).adversarial.is_cuda


@pytest.mark.parametrize(
    "protocol",
    [
        Protocol(attack="paper", eps=(0.1,), steps=3, restarts=2, examples=32),
        Protocol(attack="cell-walk", norm="l2", eps=(0.5,), steps=3, restarts=2, examples=32),
        Protocol(attack="transfer", eps=(0.1,), steps=3, examples=32),
        Protocol(attack="square", eps=(0.1,), steps=20, examples=32),
        Protocol(attack="autoattack", eps=(0.3,), examples=4),
    ],
    ids=lambda protocol: protocol.attack,
)
def test_every_attack_measures_on_the_gpu(protocol: Protocol, runs: dict) -> None:
    table = attack_table(runs["clustr"], protocol, source=runs["ce"], device="cuda", progress=False)
    assert len(table) == protocol.examples
    assert table["robust"].mean() <= 1


def test_attacks_stay_on_the_device_of_their_inputs() -> None:
    embeddings = torch.randn(60, 64, device="cuda")
    clusters, _ = fit_clusters(embeddings, torch.arange(60, device="cuda") % 5, per_class=2)
    model = ClusterClassifier(torch.nn.Flatten(), clusters)
    images, labels = torch.rand(8, 1, 8, 8, device="cuda"), torch.arange(8, device="cuda") % 5
    size, state = {"eps": 0.1, "step_size": 0.02, "steps": 3}, torch.cuda.get_rng_state()
    cooled = rescaled(model, images)
    for result in (
        pgd(cooled, images, labels, **size, loss="dlr"),
        cell_walk(model, images, labels, **size),
        transfer(model, cooled, images, labels, **size),
        paper_pgd(ScoreModel(model), images, labels, eps=0.1, steps=3, restarts=2),
        square(cooled, images, labels, norm="linf", eps=0.1, queries=20),
        autoattack(cooled, images, labels, norm="linf", eps=0.1, parts=("apgd-ce", "apgd-t")),
    ):
        assert result.adversarial.is_cuda
        assert result.success.is_cuda
        assert result.gradients.is_cuda
    assert torch.equal(torch.cuda.get_rng_state(), state)


@contextmanager
def coarse() -> Iterator[None]:
    """All that PyTorch has for coarser products, switched on by a caller."""
    cudnn: Any = torch.backends.cudnn
    kept = torch.get_float32_matmul_precision(), cudnn.allow_tf32
    torch.set_float32_matmul_precision("medium")
    cudnn.allow_tf32 = True
    try:
        with torch.autocast("cuda", torch.bfloat16):
            yield
    finally:
        torch.set_float32_matmul_precision(kept[0])
        cudnn.allow_tf32 = kept[1]


def test_a_certificate_is_of_full_precision_whatever_the_caller_has_switched_on() -> None:
    torch.manual_seed(0)
    encoder = build_encoder("lip-cnn", (3, 32, 32), width=48).cuda().eval()
    images = torch.rand(40, 3, 32, 32, generator=torch.Generator().manual_seed(1)).cuda()
    with torch.no_grad(), full_precision(images.device):
        clusters, _ = fit_clusters(encoder(images), torch.arange(40, device="cuda") % 4, per_class=2)
    model = ClusterClassifier(encoder, clusters, rule="nearest")
    plain = certify(model, images)
    with coarse():
        found = certify(model, images)
    # two calls may round otherwise; TF32 would be off by a thousandth
    torch.testing.assert_close(found.radius, plain.radius, rtol=1e-5, atol=1e-6)
    assert torch.equal(found.prediction, plain.prediction)
    assert (plain.radius > 0).any()


def test_one_process_speaks_to_itself_by_nccl(tmp_path: Path) -> None:
    from clustr_core.training.processes import _Gather

    torch.distributed.init_process_group("nccl", init_method=f"file://{tmp_path}/met", rank=0, world_size=1)
    try:
        part = torch.randn(3, 4, device="cuda", requires_grad=True)
        whole = _Gather.apply(part, 0, 1)
        (gradient,) = torch.autograd.grad(whole.square().sum(), part)
        assert torch.equal(whole, part)
        assert torch.equal(gradient, 2 * part)
    finally:
        torch.distributed.destroy_process_group()
