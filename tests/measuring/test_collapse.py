"""Neural collapse: closed forms, a plain loop, and attacks that end where they were sent."""

import numpy as np
import pytest
import torch
from torch import nn

from clustr_core.measuring.collapse import angles, class_means, collapse_table, variability
from clustr_core.measuring.semantics import FeatureNetwork
from clustr_core.models.classifiers import ClusterClassifier
from clustr_core.models.clusters import fit_clusters


def test_classes_on_a_line_have_a_closed_form() -> None:
    for spread in (0.0, 0.1, 0.5):
        points = torch.tensor([[-1 - spread], [-1 + spread], [1 - spread], [1 + spread]])
        assert variability(points, torch.tensor([0, 0, 1, 1]), 2) == pytest.approx(spread**2, abs=1e-7)


def test_variability_is_the_plain_loops_and_forgets_scale_and_rotation() -> None:
    generator = torch.Generator().manual_seed(0)
    points, labels = torch.randn(60, 7, generator=generator).double(), torch.arange(60) % 4
    points += 3 * torch.nn.functional.one_hot(labels, 7)
    means = np.stack([points[labels == c].mean(dim=0).numpy() for c in range(4)])
    middle, within, between = means.mean(axis=0), np.zeros((7, 7)), np.zeros((7, 7))
    for point, label in zip(points.numpy(), labels.tolist(), strict=True):
        within += np.outer(point - means[label], point - means[label]) / 60
    for mean in means:
        between += np.outer(mean - middle, mean - middle) / 4
    expected = np.trace(within @ np.linalg.pinv(between, hermitian=True))
    assert variability(points, labels, 4) == pytest.approx(expected)
    turned, _ = torch.linalg.qr(torch.randn(7, 7, generator=generator).double())
    assert variability(5 * points @ turned - 2, labels, 4) == pytest.approx(expected)


def test_angles_are_between_centred_means() -> None:
    means = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 2.0], [0.0, -2.0]])
    assert angles(means, 3 * means + 5).max() < 0.1
    torch.testing.assert_close(angles(means, -means), torch.full((4,), 180.0))
    torch.testing.assert_close(angles(means, means @ torch.tensor([[0.0, 1.0], [-1.0, 0.0]])), torch.full((4,), 90.0))


def test_a_class_without_examples_and_equal_means_are_named() -> None:
    with pytest.raises(ValueError, match=r"labels: expected examples of each of 3 classes, got counts \[1, 0, 1\]"):
        class_means(torch.zeros(2, 1), torch.tensor([0, 2]), 3)
    with pytest.raises(ValueError, match="embeddings: expected class means that differ, got equal ones"):
        variability(torch.ones(4, 2), torch.tensor([0, 0, 1, 1]), 2)


def test_images_are_led_to_the_next_class_and_away_from_their_own() -> None:
    # each class has a pixel of its own: an attack of the whole range can go anywhere, a small one nowhere
    labels = torch.arange(40) % 4
    images = 0.5 * torch.nn.functional.one_hot(labels, 4).float().view(40, 1, 2, 2) + 0.25
    noise = torch.rand(images.shape, generator=torch.Generator().manual_seed(1))
    images = images + 0.02 * (noise - 0.5)
    clusters, _ = fit_clusters(images.flatten(1), labels, per_class=1)
    network = FeatureNetwork(ClusterClassifier(nn.Flatten(), clusters).eval(), clusters)
    still, far = (
        collapse_table({"pixels": network}, images, labels, eps=eps, step_size=eps / 4, steps=12).iloc[0]
        for eps in (0.01, 0.9)
    )
    assert (still["nearest"], still["nearest_attacked"], still["reached"]) == (1, 1, 0)
    assert still["stay"] < 5
    assert (far["nearest_attacked"], far["reached"]) == (0, 1)
    assert far["leap"] < 30 < far["stay"]
    assert far["nc1"] == pytest.approx(still["nc1"])
    assert far["nc1"] < 0.01
