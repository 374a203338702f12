"""Nearest prototypes on raw pixels: what is certified is the distance between images itself."""

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pandas as pd
import pytest
import torch

from clustr_core import data
from clustr_core.certificates.ladder import certify
from clustr_core.certificates.lipschitz import lipschitz_upper_bound
from clustr_core.certificates.names import HARD_BOUNDS
from clustr_core.certificates.prototypes import pixel_prototype_rows, pixel_prototypes
from clustr_core.models.classifiers import nearest_logits
from clustr_core.models.clusters import fit_clusters
from clustr_core.theory.oracle import exact_nearest_rule_distance

COLUMNS = [
    "bound", "index", "label", "prediction", "correct", "feature_radius", "radius", "lipschitz",
    "lipschitz_lower_bound",
]  # fmt: skip
SOME = torch.arange(0, 360, 9)


def model_of(digits, per_class, seed=0):
    return pixel_prototypes(digits.train_images, digits.train_labels, per_class=per_class, seed=seed)


def radii(table, bound):
    return torch.tensor(table.loc[table["bound"] == bound, "radius"].tolist(), dtype=torch.float64)


def test_the_prototypes_are_the_k_means_of_the_pixels(digits):
    model = model_of(digits, 3, seed=4)
    pixels = data.to_float(digits.train_images).flatten(1)
    expected, _ = fit_clusters(pixels, digits.train_labels, per_class=3, seed=4)
    assert torch.equal(model.centroids, expected.centroids)
    assert model.labels.tolist() == sorted(list(range(10)) * 3)
    assert model.rule == "nearest"
    assert ((model.centroids > -1e-6) & (model.centroids < 1 + 1e-6)).all()
    means = torch.stack([pixels[digits.train_labels == c].mean(dim=0) for c in range(10)])
    torch.testing.assert_close(model_of(digits, 1).centroids, means, rtol=0, atol=1e-6)
    assert not torch.equal(model.centroids, model_of(digits, 3, seed=5).centroids)
    assert lipschitz_upper_bound(model.encoder, (1, 8, 8)) == pytest.approx(1, abs=1e-8)


@pytest.mark.parametrize("per_class", [1, 4])
def test_the_rows_are_those_of_the_certificate(digits, per_class):
    table = pixel_prototype_rows(digits, per_class=per_class)
    model, images = model_of(digits, per_class), data.to_float(digits.test_images)
    assert list(table.columns) == COLUMNS
    assert list(table["bound"].unique()) == list(HARD_BOUNDS) == ["triangle", "nearest", "pairwise", "exact"]
    predicted = model(images).argmax(dim=1)
    for bound in HARD_BOUNDS:
        rows = table.loc[table["bound"] == bound]
        assert rows["index"].tolist() == list(range(360))
        assert rows["label"].tolist() == digits.test_labels.tolist()
        assert rows["prediction"].tolist() == predicted.tolist()
        assert rows["correct"].tolist() == (predicted == digits.test_labels).tolist()
        assert rows["radius"].tolist() == pytest.approx(
            certify(model, images, bound=bound, lipschitz=1.0).radius.tolist()
        )
    assert table["correct"].dtype == bool
    assert table["radius"].dtype == np.float64
    assert table["radius"].tolist() == table["feature_radius"].tolist()
    assert set(table["lipschitz"]) == set(table["lipschitz_lower_bound"]) == {1.0}
    assert sum(table["correct"]) > 0.9 * len(table)
    for lower, upper in pairwise(HARD_BOUNDS):
        assert (radii(table, lower) <= radii(table, upper) * (1 + 1e-6) + 1e-6).all()


def test_one_prototype_a_class_certifies_the_distance_to_the_bisector(digits):
    """Straight at each rival's prototype: never over the border inside the radius, and just beyond it once."""
    table = pixel_prototype_rows(digits, per_class=1, indices=SOME)
    clusters = model_of(digits, 1).clusters.to(torch.float64)
    images = data.to_float(digits.test_images[SOME]).double().flatten(1)
    own = nearest_logits(images, clusters).argmax(dim=1)
    rivals = clusters.centroids - clusters.centroids[own][:, None]
    steps = rivals / rivals.norm(dim=2, keepdim=True).masked_fill(rivals.norm(dim=2, keepdim=True) == 0, 1)
    truth = exact_nearest_rule_distance(images, clusters)[0]
    for bound in ("nearest", "pairwise", "exact"):
        radius = radii(table, bound)
        assert (radius <= truth).all()
        assert radius.tolist() == pytest.approx(truth.tolist(), rel=1e-4, abs=1e-4)
        for share, changes in ((1.0, 0), (1 + 1e-3, 1)):
            moved = images[:, None] + share * radius[:, None, None] * steps
            changed = nearest_logits(moved.flatten(0, 1), clusters).argmax(dim=1).reshape(len(SOME), -1) != own[:, None]
            assert (changed.sum(dim=1) == changes).all()


def test_several_prototypes_a_class_certify_no_more_than_the_truth(digits):
    table = pixel_prototype_rows(digits, per_class=4, indices=SOME)
    clusters = model_of(digits, 4).clusters.to(torch.float64)
    images = data.to_float(digits.test_images[SOME]).double().flatten(1)
    truth, nearest = exact_nearest_rule_distance(images, clusters)
    own = nearest_logits(images, clusters).argmax(dim=1)
    for bound in HARD_BOUNDS:
        radius = radii(table, bound)
        assert (radius <= truth).all()
        inside = images + (radius / truth)[:, None] * (nearest - images)
        assert (nearest_logits(inside, clusters).argmax(dim=1) == own).all()
    assert radii(table, "exact").tolist() == pytest.approx(truth.tolist(), rel=1e-4, abs=1e-4)
    assert (radii(table, "nearest") < 0.99 * truth).any()
    beyond = images + 1.001 * (nearest - images)
    assert (nearest_logits(beyond, clusters).argmax(dim=1) != own).all()


def test_any_images_in_any_order_have_the_rows_that_they_have_among_all(digits):
    whole = pixel_prototype_rows(digits, per_class=2, indices=torch.arange(50)).set_index(["bound", "index"])
    chosen = torch.tensor([31, 4, 18])
    some = pixel_prototype_rows(digits, per_class=2, indices=chosen)
    assert some["index"].tolist() == chosen.tolist() * 4
    some = some.set_index(["bound", "index"])
    pd.testing.assert_frame_equal(some, whole.loc[some.index])


def test_a_class_without_training_images_is_named(digits):
    for missing in ("3", "9"):
        keep = digits.train_labels != int(missing)
        less = replace(digits, train_images=digits.train_images[keep], train_labels=digits.train_labels[keep])
        with pytest.raises(
            ValueError, match=rf"dataset: expected training images of every class, got none of \['{missing}'\]"
        ):
            pixel_prototype_rows(less, per_class=1)
    less = digits.train_labels != 3
    with pytest.raises(ValueError, match="class 3 has 0 examples, fewer than per_class=1"):
        pixel_prototypes(digits.train_images[less], digits.train_labels[less], per_class=1)


def test_bad_arguments_are_named(digits, as_installed):
    images, labels = digits.train_images, digits.train_labels
    with pytest.raises(ValueError, match=r"class 0 has \d+ examples, fewer than per_class=500"):
        pixel_prototypes(images, labels, per_class=500)
    with pytest.raises(ValueError, match="per_class: expected a whole number, at least 1, got 0"):
        pixel_prototype_rows(digits, per_class=0)
    with pytest.raises(ValueError, match="labels: expected one for each of 1437 embeddings, got 9"):
        pixel_prototypes(images, labels[:9], per_class=1)
    with pytest.raises(ValueError, match=r"train_images: expected uint8, .* got torch.float32"):
        pixel_prototypes(data.to_float(images), labels, per_class=1)
    with pytest.raises(ValueError, match=r"indices: expected test images in 0\.\.359, got -1 to 360"):
        pixel_prototype_rows(digits, per_class=1, indices=torch.tensor([-1, 5, 360]))
    two = torch.cat([(labels == c).nonzero()[:1, 0] for c in range(10)])
    with pytest.raises(ValueError, match="variance: expected positive finite values"):
        pixel_prototypes(images[two], labels[two], per_class=1)
