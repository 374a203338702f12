"""What is no tensor, no clusters or no network is refused by every public function, and the argument named."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import clustr_core as cc

GENERATOR = torch.Generator().manual_seed(0)
pytestmark = pytest.mark.usefixtures("as_installed")
IMAGES = torch.rand(2, 1, 8, 8, generator=GENERATOR)
LABELS = torch.tensor([0, 1])
EMBEDDINGS = torch.randn(12, 6, generator=GENERATOR)
ROWS = torch.arange(12) % 3
CLUSTERS, ASSIGNED = cc.fit_clusters(EMBEDDINGS, ROWS, per_class=2)
NETWORK = nn.Sequential(nn.Flatten(), nn.Linear(64, 3)).eval()
ENCODER = nn.Sequential(nn.Flatten(), nn.Linear(64, 6)).eval()
CLASSIFIER = cc.ClusterClassifier(ENCODER, CLUSTERS, rule="nearest").eval()
ATTACKED = {"model": NETWORK, "images": IMAGES, "labels": LABELS}
WALKED = {"eps": 0.1, "step_size": 0.05, "steps": 1}

CALLS: dict[Callable[..., object], dict[str, Any]] = {
    cc.fit_clusters: {"embeddings": EMBEDDINGS, "labels": ROWS, "per_class": 2},
    cc.Clusters: {"centroids": CLUSTERS.centroids, "labels": CLUSTERS.labels, "variance": CLUSTERS.variance},
    cc.ClusterClassifier: {"encoder": ENCODER, "clusters": CLUSTERS},
    cc.cluster_logits: {"embeddings": EMBEDDINGS, "clusters": CLUSTERS},
    cc.nearest_logits: {"embeddings": EMBEDDINGS, "clusters": CLUSTERS},
    cc.certified_radius: {"embeddings": EMBEDDINGS, "clusters": CLUSTERS},
    cc.certify: {"model": CLASSIFIER, "images": IMAGES},
    cc.fgsm: {**ATTACKED, "eps": 0.1},
    cc.pgd: {**ATTACKED, **WALKED},
    cc.cell_walk: {**ATTACKED, "model": CLASSIFIER, **WALKED},
    cc.transfer: {**ATTACKED, "source": NETWORK, **WALKED},
    cc.paper_pgd: {**ATTACKED, "model": CLASSIFIER, "eps": 0.1, "steps": 1},
    cc.square: {**ATTACKED, "eps": 0.1, "norm": "linf", "queries": 2},
    cc.ddn: {**ATTACKED, "steps": 1},
    cc.fmn: {**ATTACKED, "steps": 1},
    cc.rescaled: {"model": NETWORK, "images": IMAGES},
    cc.certify_smoothed: {"model": NETWORK, "images": IMAGES, "noise": 0.1, "samples": 10},
    cc.predict_smoothed: {"model": NETWORK, "images": IMAGES, "noise": 0.1, "samples": 10},
    cc.lipschitz_lower_bound: {"encoder": ENCODER, "images": IMAGES, "iterations": 1},
    cc.magnet_loss: {"embeddings": EMBEDDINGS, "assignments": ASSIGNED, "labels": ROWS},
    cc.full_magnet_loss: {"embeddings": EMBEDDINGS, "labels": ROWS, "clusters": CLUSTERS},
    cc.certificate_loss: {
        "embeddings": EMBEDDINGS, "labels": ROWS, "clusters": CLUSTERS, "margin": 1.0, "temperature": 1.0,
    },
}  # fmt: skip
CASES = [
    (function, name)
    for function, given in CALLS.items()
    for name, value in given.items()
    if isinstance(value, Tensor | cc.Clusters | nn.Module)
    and not (function is cc.ClusterClassifier and name == "encoder")
]


def instead_of(value: object) -> list[object]:
    """What might be given in place of a value, and is not it."""
    if isinstance(value, Tensor):
        return [None, value.numpy(), value.tolist(), value.to(torch.complex64), value.to_sparse()]
    return [None, "a name", [1, 2], object()]


@pytest.mark.parametrize("function", CALLS, ids=lambda function: function.__name__)
def test_what_is_changed_below_is_accepted_as_it_stands(function):
    function(**CALLS[function])


@pytest.mark.parametrize(("function", "name"), CASES, ids=lambda part: getattr(part, "__name__", part))
def test_the_argument_is_named(function, name):
    given = CALLS[function]
    for other in instead_of(given[name]):
        with pytest.raises((TypeError, ValueError), match=f"^{name}: expected "):
            function(**{**given, name: other})


@pytest.mark.parametrize("name", [None, 5, ["digits"]])
def test_a_data_set_has_a_name(name):
    with pytest.raises(ValueError, match=r"^name: expected one of .* or folder:PATH, got "):
        cc.load_dataset(name)


@pytest.mark.parametrize("dataset", ["digits", 5])
def test_a_data_set_is_loaded_before_it_is_given(dataset, tmp_path):
    with pytest.raises(TypeError, match=r"^dataset: expected a Dataset, as load_dataset gives one, got "):
        cc.fit(cc.CrossEntropy(), dataset=dataset, folder=tmp_path)
