"""Meaning in numbers: each measure against a plain loop, a closed form, or what chance must give."""

import math
from dataclasses import replace

import pandas as pd
import pytest
import scipy.stats
import torch
from torch import nn

from clustr_core import data
from clustr_core.measuring.accuracy import binomial_interval
from clustr_core.measuring.profile import load_profile
from clustr_core.measuring.semantics import (
    STARTS,
    FeatureNetwork,
    another_image,
    class_directions,
    cosines,
    gradient_rows,
    in_words,
    invert,
    inverted_centroids,
    judged_test_images,
    label_agreement,
    majority,
    nearest_labels,
    neighbour_rows,
    other_targets,
    pixel_judge,
    random_targets,
    rank_correlation,
    raw_pixels,
    saliency_alignment,
    shares,
    starting_images,
    superclass_agreement,
    superclass_chance,
    superclasses_of,
    target_read_off,
    towards_gradients,
    unit_rows,
    untrained,
    with_clusters,
)
from clustr_core.models.classifiers import ClusterClassifier
from clustr_core.models.clusters import Clusters
from clustr_core.models.encoders import build_encoder

CIFAR = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


def drawn(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def labels_of(count, classes, seed=0):
    return torch.randint(classes, (count,), generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def digits():
    """Digits, of which few are compared with."""
    whole = data.load_dataset("digits")
    chosen = whole.training_indices(300)
    return replace(whole, train_images=whole.train_images[chosen], train_labels=whole.train_labels[chosen])


@pytest.fixture(scope="module")
def recipe():
    """Of an untrained network."""
    return load_profile("smoke").recipes["ce"]


# neighbours


def test_neighbours_are_those_of_a_plain_loop():
    queries, gallery, labels = drawn(7, 3), drawn(20, 3, seed=1), labels_of(20, 4)
    found = nearest_labels(queries, gallery, labels, count=5)
    for query, row in zip(queries, found, strict=True):
        order = sorted(range(20), key=lambda n: math.dist(query.tolist(), gallery[n].tolist()))
        assert row.tolist() == [int(labels[n]) for n in order[:5]]


def test_agreement_is_that_of_a_plain_loop():
    found, labels, kinds = labels_of(60, 4, seed=2).view(12, 5), labels_of(12, 4), torch.tensor([0, 1, 0, 1])
    shares_of, shared = label_agreement(found, labels), superclass_agreement(found, labels, kinds)
    for row, label, share, kin in zip(found.tolist(), labels.tolist(), shares_of, shared, strict=True):
        others = [each for each in row if each != label]
        assert share == row.count(label) / 5
        if others:
            assert kin == sum(bool(kinds[each] == kinds[label]) for each in others) / len(others)
        else:
            assert kin.isnan()


def test_a_perfect_embedding_agrees_and_one_that_knows_nothing_agrees_by_chance():
    labels, gallery = labels_of(400, 5), labels_of(500, 5, seed=1)
    one_hot = (nn.functional.one_hot(each, 5).double() for each in (labels, gallery))
    assert label_agreement(nearest_labels(*one_hot, gallery, count=9), labels).mean() == 1
    blind = nearest_labels(drawn(400, 3), drawn(500, 3, seed=1), gallery, count=9)
    assert label_agreement(blind, labels).mean() == pytest.approx(1 / 5, abs=0.04)
    kinds = torch.tensor([0, 0, 0, 1, 1])
    chance = superclass_chance(labels, gallery, kinds)
    assert superclass_agreement(blind, labels, kinds).nanmean() == pytest.approx(float(chance.mean()), abs=0.04)
    # of four other classes two share the superclass of the first three
    assert chance[labels == 0].mean() == pytest.approx(2 / 4, abs=0.1)


def test_all_neighbours_of_the_own_label_leave_no_superclass_to_ask_for():
    assert superclass_agreement(torch.zeros(1, 3).long(), torch.tensor([0]), torch.tensor([0, 0])).isnan().all()


def test_animals_and_vehicles():
    found = superclasses_of(CIFAR)
    assert found is not None
    assert [name for name, kind in zip(CIFAR, found, strict=True) if kind] == [
        "airplane",
        "automobile",
        "ship",
        "truck",
    ]
    assert superclasses_of([str(n) for n in range(10)]) is None


def test_a_tie_goes_to_the_nearest():
    assert majority(torch.tensor([[2, 1, 1, 2, 0], [0, 1, 1, 2, 3]]), 4).tolist() == [2, 1]


# gradients


def linear(classes=4, pixels=6, scale=1.0):
    head = nn.Linear(pixels, classes).double()
    head.weight.data = scale * drawn(classes, pixels, seed=3)
    return nn.Sequential(nn.Flatten(), head)


def test_the_gradient_of_a_linear_model_is_a_difference_of_its_rows():
    model, images = linear(), drawn(9, 1, 2, 3).sigmoid()
    labels = labels_of(9, 4)
    targets = random_targets(labels, 4)
    rows = model[1].weight
    found = towards_gradients(model, images, labels, targets)
    assert torch.allclose(found.flatten(1), rows[targets] - rows[labels], rtol=1e-12)


def test_the_gradient_of_a_network_is_that_of_differences():
    model = nn.Sequential(nn.Flatten(), nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).double()
    images, labels, targets = drawn(4, 1, 2, 3), torch.tensor([0, 1, 2, 0]), torch.tensor([1, 2, 0, 2])
    found, step = towards_gradients(model, images, labels, targets).flatten(1), 1e-6
    with torch.no_grad():
        for pixel in range(6):
            move = step * nn.functional.one_hot(torch.tensor(pixel), 6).double().view(1, 1, 2, 3)
            change = (model(images + move) - model(images - move)) / (2 * step)
            expected = (change.gather(1, targets[:, None]) - change.gather(1, labels[:, None])).squeeze(1)
            assert torch.allclose(found[:, pixel], expected, atol=1e-8)


def test_directions_lead_to_the_nearest_image_of_each_class():
    images, gallery, labels = drawn(5, 4), drawn(30, 4, seed=1), torch.arange(30) % 3
    found = class_directions(images, gallery, labels, 3)
    for n, image in enumerate(images):
        for c in range(3):
            mine = gallery[labels == c]
            nearest = min(mine, key=lambda each: float((each - image).norm()))
            assert torch.allclose(image + found[n, c], nearest)


def test_targets_are_wrong_and_equally_likely():
    labels = labels_of(9000, 4)
    targets = random_targets(labels, 4, seed=1)
    assert (targets != labels).all()
    shifts = torch.bincount((targets - labels) % 4, minlength=4)
    assert shifts[0] == 0
    assert (shifts[1:] - 3000).abs().max() < 200
    others = other_targets(labels, targets, 4)
    assert ((others != labels) & (others != targets)).all()
    assert other_targets(torch.tensor([0]), torch.tensor([1]), 2).tolist() == [1]


def test_a_gradient_that_knows_no_target_reads_it_at_chance_and_one_that_does_always():
    images, gallery = drawn(4000, 8), drawn(50, 8, seed=1)
    labels, classes = labels_of(4000, 5), torch.arange(50) % 5
    targets = random_targets(labels, 5, seed=2)
    directions = class_directions(images, gallery, classes, 5)
    blind = target_read_off(cosines(drawn(4000, 8, seed=3), directions), labels, targets)
    # away from the own class, the same towards every target
    away = target_read_off(cosines(-directions[torch.arange(4000), labels], directions), labels, targets)
    straight = target_read_off(cosines(directions[torch.arange(4000), targets], directions), labels, targets)
    for found in (blind, away):
        low, high = binomial_interval(int(found.sum()), 4000, confidence=0.999)
        assert low < 1 / 4 < high
    assert straight.all()


def test_cosines_of_random_directions_are_small_and_those_of_nothing_zero():
    found = cosines(drawn(2000, 64), drawn(2000, 1, 64, seed=1))
    assert float(found.mean()) == pytest.approx(0, abs=0.01)
    assert float(found.std()) == pytest.approx(64**-0.5, rel=0.1)
    assert cosines(torch.zeros(1, 3), torch.ones(1, 2, 3)).tolist() == [[0, 0]]


def test_a_tiny_gradient_has_a_direction():
    tiny = torch.tensor([[3e-30, 4e-30]])
    assert torch.allclose(unit_rows(tiny), torch.tensor([[0.6, 0.8]]))
    assert unit_rows(torch.zeros(2, 3)).tolist() == [[0, 0, 0]] * 2


def test_saliency_alignment_by_hand():
    images = torch.tensor([[3.0, 4.0], [1.0, 0.0], [1.0, 1.0]])
    gradients = torch.tensor([[-6.0, -8.0], [0.0, 5.0], [1.0, 0.0]])
    assert torch.allclose(saliency_alignment(images, gradients), torch.tensor([1.0, 0.0, 0.5**0.5]))


def test_the_alignment_of_a_linear_classifier_is_its_distance_to_the_border():
    # Etmann et al. 2019: for two classes and no bias |<x, G>| / ||G|| is the distance
    weights, image = drawn(1, 6), drawn(1, 6, seed=1)
    distance = (image @ weights.T).abs() / weights.norm()
    assert torch.allclose(saliency_alignment(image, weights) * image.norm(), distance)


def test_another_image_is_the_next_of_another_class():
    assert another_image(torch.tensor([0, 0, 1, 0])).tolist() == [2, 2, 3, 2]


# inversion


def test_a_linear_encoder_is_inverted_as_the_closed_form_says():
    encoder = nn.Sequential(nn.Flatten(), nn.Linear(6, 6)).double()
    encoder[1].weight.data = torch.linalg.qr(drawn(6, 6))[0] * 2
    truth = torch.rand(5, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    with torch.no_grad():
        goals = encoder(truth)
    starts = torch.full((5, 1, 2, 3), 0.5, dtype=torch.float64)
    found = invert(encoder, goals, starts, steps=400)
    assert torch.allclose(found.images.flatten(1), truth, atol=5e-3)
    # an isometry times two: what is left in the embedding is twice what is left in pixels
    left = (found.images.flatten(1) - truth).norm(dim=1)
    assert torch.allclose(found.distance, 2 * left, atol=1e-9)
    assert torch.allclose(found.start_distance, 2 * (0.5 - truth).norm(dim=1))


def test_a_goal_outside_the_cube_is_met_at_its_nearest_point():
    goal = torch.tensor([[2.0, 0.3, -1.0]])
    found = invert(nn.Flatten(), goal, torch.full((1, 1, 1, 3), 0.5), steps=300)
    assert torch.allclose(found.images.flatten(), torch.tensor([1.0, 0.3, 0.0]), atol=5e-3)


def test_inversion_never_ends_farther_than_it_began_and_leaves_its_arguments_alone():
    encoder = build_encoder("small-cnn", (1, 8, 8), width=4, dataset="digits").eval()
    starts = torch.rand(6, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    kept, goals = starts.clone(), drawn(6, encoder.embedding_dim, dtype=torch.float32)
    found = invert(encoder, goals, starts, steps=5, step_size=10.0)
    assert (found.distance <= found.start_distance).all()
    assert ((found.images >= 0) & (found.images <= 1)).all()
    assert torch.equal(starts, kept)
    with torch.no_grad():
        assert torch.allclose((encoder(found.images) - goals).norm(dim=1), found.distance, rtol=1e-4)


def test_the_first_start_is_grey_and_the_others_follow_the_seed():
    starts = starting_images((1, 2, 2), 3, count=4, seed=1)
    assert starts.shape == (3, 4, 1, 2, 2)
    assert (starts[:, 0] == 0.5).all()
    assert torch.equal(starts, starting_images((1, 2, 2), 3, count=4, seed=1))
    assert not torch.equal(starts[0, 1], starts[1, 1])


# tables


def test_rows_of_raw_pixels_and_of_an_untrained_network(digits, recipe):
    networks = {"prototypes": raw_pixels(recipe, digits), "untrained": untrained(recipe, digits)}
    near = neighbour_rows(networks, digits, count=3, examples=50)
    assert len(near) == 100
    assert near["superclass"].isna().all()
    query, flat = digits.test_images[near["index"][0]].flatten(), digits.train_images.flatten(1)
    nearest = (flat.double() - query.double()).norm(dim=1).topk(3, largest=False).indices
    assert near["share"][0] == float((digits.train_labels[nearest] == near["label"][0]).double().mean())

    slopes = gradient_rows(networks, digits, examples=50)
    assert (slopes["target"] != slopes["label"]).all()
    assert slopes[["aligned", "elsewhere", "between"]].abs().max().max() <= 1 + 1e-6
    # images say which number they are, prototypes too
    assert slopes.groupby("method")["read"].mean()["prototypes"] > 0.4

    judge = pixel_judge(digits)
    found = inverted_centroids(networks, digits, starts=2, steps=60, judge=judge)
    right = found.rows.groupby("method")["right"].mean()
    assert right["prototypes"] == 1
    starts = found.rows[found.rows["method"] == STARTS]
    grey = starts[starts["start"] == 0]
    assert grey["right"].mean() == pytest.approx(1 / 10)
    assert found.images["untrained"].shape == (20, 2, 1, 8, 8)
    assert (found.rows["reached"] <= 1).all()
    assert judged_test_images(judge, digits, examples=100)["right"].mean() > 0.9


def test_of_prototypes_the_centroid_itself_is_found(digits, recipe):
    network = raw_pixels(recipe, digits)
    found = inverted_centroids({"prototypes": network}, digits, starts=1, steps=150, judge=pixel_judge(digits))
    assert torch.allclose(found.images["prototypes"][:, 0].flatten(1), network.clusters.centroids, atol=0.01)


def test_superclasses_reach_the_rows():
    images = torch.randint(256, (40, 3, 4, 4), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    labels = torch.arange(40) % 10
    photographs = data.Dataset("photographs", images, labels, images[:10], labels[:10], CIFAR)
    centroids = data.to_float(images).flatten(1)[:10]
    clusters = Clusters(centroids, torch.arange(10), torch.ones(10))
    pixels = FeatureNetwork(ClusterClassifier(nn.Flatten(), clusters, rule="nearest"), clusters)
    near = neighbour_rows({"prototypes": pixels}, photographs, count=8)
    assert near["superclass"].between(0, 1).all()


def test_the_head_of_clusters_keeps_the_encoder(digits, recipe):
    network = untrained(recipe, digits)
    headed = with_clusters(network)
    assert headed.encoder is network.encoder
    assert headed.model(data.to_float(digits.test_images[:3])).shape == (3, 10)


def test_shares_have_their_interval_and_words_their_percent():
    rows = pd.DataFrame({"method": ["pgd-at"] * 4 + ["ce"] * 2, "yes": [True, True, True, False, False, False]})
    table = shares(rows, "yes")
    assert table["method"].tolist() == ["ce", "pgd-at"]
    assert table.loc[1, ["share", "low", "high"]].tolist() == pytest.approx([0.75, *binomial_interval(3, 4)])
    words = in_words(rows.assign(number=[1, 2, 3, 4, 5, math.nan]), yes_or_no={"yes": "y, %"}, means={"number": "n"})
    assert words["n"].tolist() == [5, 2.5]
    assert words["y, %"][1].startswith("75.0")


def test_ranks_correlate_as_spearman_says():
    left, right = pd.Series([1.0, 2.0, 2.0, 5.0, 3.0]), pd.Series([0.1, 0.4, 0.2, 0.9, 0.9])
    assert rank_correlation(left, right) == pytest.approx(scipy.stats.spearmanr(left, right).statistic)
    assert rank_correlation(left, -(left**3)) == pytest.approx(-1)
    assert math.isnan(rank_correlation(left, pd.Series([0.0] * 5)))


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: nearest_labels(drawn(1, 2), drawn(3, 2), torch.zeros(2).long(), count=1), "labels: .* 3 .* got 2"),
        (lambda: nearest_labels(drawn(1, 2), drawn(3, 2), torch.zeros(3).long(), count=4), "count: expected 1 to 3"),
        (lambda: random_targets(torch.zeros(2).long(), 1), "num_classes: expected at least two, got 1"),
        (
            lambda: towards_gradients(
                linear(pixels=2, scale=math.nan), drawn(1, 1, 1, 2), torch.tensor([0]), torch.tensor([1])
            ),
            "model: expected finite input gradients, got 2",
        ),
        (lambda: class_directions(drawn(1, 2), drawn(1, 2), torch.tensor([0]), 2), r"gallery_labels: .* none of \[1\]"),
        (lambda: another_image(torch.zeros(3).long()), r"labels: expected images of at least two .* \[0\]"),
        (lambda: invert(nn.Flatten(), drawn(2, 4), torch.zeros(1, 1, 2, 2)), "starts: expected one for each of 2"),
        (lambda: invert(nn.Flatten(), drawn(1, 4), torch.full((1, 1, 2, 2), 2.0)), r"starts: .*\[0, 1\], got 2 to 2"),
        (lambda: invert(nn.Flatten(), drawn(1, 4), torch.zeros(1, 1, 2, 2), steps=0), "steps, step_size: .* got 0"),
        (lambda: starting_images((1, 2, 2), 3, count=0), "count: expected at least one start, got 0"),
        (lambda: shares(pd.DataFrame({"method": ["ce"], "yes": [0.5]}), "yes"), "column: expected one of yes and no"),
    ],
)  # fmt: skip
def test_what_cannot_be_measured_is_refused_by_name(call, words):
    with pytest.raises(ValueError, match=words):
        call()
