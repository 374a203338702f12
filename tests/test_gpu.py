"""The same calls on a CUDA device; skipped only where there is none."""

from pathlib import Path

import pytest
import torch

from clustr_core import data, evaluation, training
from clustr_core.attacks import pgd
from clustr_core.clusters import fit_clusters
from clustr_core.recipes import ClustrQTrades, CrossEntropy, Protocol, Recipe

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize(
    "recipe",
    [
        CrossEntropy(epochs=2, width=8, train_examples=400, augmentation="crop-flip"),
        ClustrQTrades(epochs=2, width=8, train_examples=400, per_cluster=8, eps=0.1, step_size=0.125),
    ],
    ids=lambda recipe: recipe.method,
)
def test_train_attack_certify(recipe: Recipe, tmp_path: Path) -> None:
    run = training.fit(recipe, folder=tmp_path / "run", device="cuda", progress=False)
    attacks = evaluation.attack_table(run, Protocol(eps=(0.1,), steps=5, examples=64), device="cuda", progress=False)
    certificates = evaluation.certificate_table(run, examples=64, device="cuda")
    assert attacks["correct"].mean() > 0.3
    assert (certificates["lipschitz_lower_bound"] <= certificates["lipschitz"]).all()


def test_a_run_trained_on_the_gpu_predicts_alike_on_the_cpu(tmp_path: Path) -> None:
    recipe = CrossEntropy(epochs=2, width=8, train_examples=400)
    run = training.fit(recipe, folder=tmp_path / "run", device="cuda", progress=False)
    images = data.to_float(data.load("digits").test_images[:64])
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
