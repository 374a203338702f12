"""The data of the widget two-hills: the toy's own numbers, and the draws of the package's attacks."""

import json
from dataclasses import replace

import pytest
import torch

from clustr_core.attacks.names import PAPER_RESTARTS, PAPER_STEP_SIZE
from clustr_core.drawing import two_hills
from clustr_core.theory.toys import TOY_EPS, cluster_toy


@pytest.fixture(scope="module")
def toy():
    return cluster_toy(side=1, examples=8)


def test_the_data_are_plain_values_and_lose_no_digit(toy):
    data = json.loads(json.dumps(two_hills.data(toy), allow_nan=False))
    assert torch.equal(torch.tensor(data["centroids"]), toy.model.clusters.centroids)
    assert data["variance"] == toy.model.clusters.shared_variance
    assert torch.equal(torch.tensor(data["images"]), toy.images[:4].flatten(1))
    assert (data["eps"], data["paper_step_size"]) == (TOY_EPS, PAPER_STEP_SIZE)


def test_the_starts_are_the_draws_of_an_attack_on_one_image(toy):
    data = two_hills.data(toy, seed=3)
    generator = torch.Generator().manual_seed(3)
    for start in data["starts"]:
        noise = torch.rand(1, 2, 1, 1, generator=generator, dtype=torch.float64)
        assert start == pytest.approx(noise.flatten().tolist(), abs=1e-12)
    assert len(data["starts"]) == PAPER_RESTARTS
    assert data["starts"] != two_hills.data(toy, seed=4)["starts"]


def test_every_ball_that_the_slider_offers_is_in_view(toy):
    data = two_hills.data(toy)
    low, high = data["view"]
    for image in data["images"]:
        assert all(low <= value - data["largest_eps"] and value + data["largest_eps"] <= high for value in image)


@pytest.mark.parametrize("eps", [0.0, -0.1, 8.0, float("nan")])
def test_an_eps_outside_the_slider_is_refused(toy, eps):
    with pytest.raises(ValueError, match=r"eps: expected a number above 0 and at most 0\.0627"):
        two_hills.data(toy, eps=eps)


def test_a_toy_of_many_pixels_is_refused():
    with pytest.raises(ValueError, match=r"toy: expected images of one pixel in each of 2 channels, got \[2, 4, 4\]"):
        two_hills.data(cluster_toy(side=4, examples=8))


def test_a_class_without_an_image_is_refused(toy):
    with pytest.raises(ValueError, match="toy: expected an image of each class, got none of class 3"):
        two_hills.data(replace(toy, images=toy.images[:3], labels=toy.labels[:3]))


def test_classes_in_another_order_are_refused(toy):
    model = cluster_toy(side=1, examples=8).model
    turned = replace(model.clusters, labels=torch.tensor([1, 0, 2, 3]))
    with pytest.raises(ValueError, match=r"toy: expected one cluster a class, in their order, got \[1, 0, 2, 3\]"):
        two_hills.data(replace(toy, model=type(model)(model.encoder, turned)))
