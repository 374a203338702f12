"""What a model returned: judged right or wrong, and noticed where it is no logits."""

import math
import warnings

import pytest
import torch
from toy_models import SHAPE, Linear, labelled, some_images

from clustr_core.attacks.autoattack import autoattack, square
from clustr_core.attacks.cells import cell_walk
from clustr_core.attacks.gradient import fgsm, pgd
from clustr_core.attacks.result import misclassified, not_logits, warn_unless_logits
from clustr_core.attacks.transfer import transfer
from clustr_core.numerics.checks import check_logits

PROBABILITIES = "all outputs lie in [0, 1] and each row sums to one: they look like probabilities"
SCORES = "all outputs lie in [0, 1]: they look like scores"


def logits(seed=0, scale=1.0, rows=8):
    return scale * torch.randn(rows, 5, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("scale", [1e-3, 0.1, 1.0, 5.0])
@pytest.mark.parametrize("shift", [-30.0, 0.0, 30.0])
def test_ordinary_logits_raise_no_suspicion(scale, shift):
    for seed in range(10):
        assert not_logits(logits(seed, scale) + shift) is None


@pytest.mark.parametrize("scale", [1e-3, 1.0, 100.0])
def test_probabilities_are_noticed(scale):
    reason = not_logits(logits(scale=scale).softmax(dim=1))
    assert reason == PROBABILITIES + "; take their logarithm"
    assert not_logits(logits(scale=min(scale, 5)).log_softmax(dim=1)) is None


def test_scores_are_noticed():
    assert not_logits(logits().sigmoid()) == SCORES + "; take their logarithm"
    # some rows of probabilities are not all
    mixed = logits().softmax(dim=1)
    mixed[0] /= 2
    assert not_logits(mixed) == SCORES + "; take their logarithm"
    mixed[0, 0] = 1.5
    assert not_logits(mixed) is None
    mixed[0, 0] = -0.5
    assert not_logits(mixed) is None


def test_sums_of_scores_are_noticed_by_their_floor():
    """Several clusters of one class add up to more than 1; what is far away leaves 0."""
    sums = 3 * logits().exp().clamp(max=1)
    sums[:, 1] = 1e-5
    assert sums.max() > 1
    assert not_logits(sums).startswith("no output is negative and most rows reach down to 0: they look like scores")
    sums[:4, 1] = 0.5
    assert not_logits(sums) is None
    sums[:, 1] = 1e-5
    sums[0, 0] = -1e-3
    assert not_logits(sums) is None


def test_saturation_is_noticed_where_most_rows_have_lost_their_gradient():
    outputs = logits()
    # float32 rounds 1 - exp(-17) up to 1 when two logits lie 17.4 nats apart
    outputs[:4, 0] = outputs[:4].amax(dim=1) + 20
    assert not_logits(outputs) is None
    outputs[4, 0] = outputs[4].max() + 20
    reason = not_logits(outputs)
    assert reason == ("cross-entropy is saturated: softmax rounds to 1 for 62 % of the images; see attacks.rescaled")
    assert not_logits(outputs.double()) is None
    labels = outputs.argmax(dim=1)[:5]
    assert torch.equal(torch.nn.functional.cross_entropy(outputs[:5], labels, reduction="none"), torch.zeros(5))


def test_too_few_or_empty_outputs_say_nothing():
    assert not_logits(logits(rows=1).softmax(dim=1)) is None
    assert not_logits(torch.zeros(0, 5)) is None
    assert not_logits(torch.zeros(8, 5)) is None
    assert not_logits(logits(rows=2).softmax(dim=1)) is not None


def test_the_warning_says_how_it_was_noticed():
    with pytest.warns(UserWarning, match=r"^model: expected logits, but all outputs lie in \[0, 1\]: they look like"):
        warn_unless_logits(logits().sigmoid())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_unless_logits(logits())


# as attacks say it

CALL = {"eps": 0.05, "step_size": 0.02, "steps": 2}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda g: g.softmax(dim=1), "they look like probabilities; take their logarithm"),
        (lambda g: g.sigmoid(), "they look like scores; take their logarithm"),
        (lambda g: 1000 * g, r"softmax rounds to 1 for \d+ % of the images; see attacks\.rescaled"),
    ],
    ids=["probabilities", "scores", "saturated"],
)
def test_pgd_warns_once_of_what_is_no_logits(change, message):
    model = Linear(5, dtype=torch.float32)
    images = some_images(dtype=torch.float32)
    labels = labelled(model, images)
    with pytest.warns(UserWarning, match=f"model: expected logits, but .*{message}") as caught:
        pgd(lambda x: change(model(x)), images, labels, **CALL, restarts=2)
    assert len(caught) == 1
    with pytest.warns(UserWarning, match=message):
        fgsm(lambda x: change(model(x)), images, labels, eps=0.05)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pgd(model, images, labels, **CALL)


@pytest.mark.parametrize("attack", [square, autoattack])
@pytest.mark.parametrize(("change", "message"), [("softmax", "probabilities"), ("sigmoid", "scores")])
def test_published_attacks_warn_of_what_is_no_logits(attack, change, message):
    model = Linear(5, dtype=torch.float32)
    images = some_images(dtype=torch.float32)
    options = {"queries": 2} if attack is square else {"parts": ["apgd-ce"]}

    def wrapped(x):
        return model(x).softmax(dim=1) if change == "softmax" else model(x).sigmoid()

    with pytest.warns(UserWarning, match=f"model: expected logits, but .* look like {message}"):
        attack(wrapped, images, labelled(model, images), norm="linf", eps=0.05, **options)


def test_a_transfer_warns_of_a_source_without_logits():
    model, images = Linear(5), some_images()
    with pytest.warns(UserWarning, match="source: expected logits, but .* look like probabilities"):
        transfer(lambda x: model(x).softmax(dim=1), model, images, labelled(model, images), **CALL)


def test_a_warning_changes_no_outcome():
    model, images = Linear(5), some_images()
    labels = labelled(model, images)

    def scores(x):
        return model(x).sigmoid()

    with pytest.warns(UserWarning, match="scores"):
        found = pgd(scores, images, labels, **CALL)
    assert torch.equal(found.success, labelled(scores, found.adversarial) != labels)


def test_attacks_without_cross_entropy_do_not_warn():
    model, images = Linear(5), some_images()
    labels = labelled(model, images)
    transfer(model, lambda x: model(x).sigmoid(), images, labels, **CALL)
    with pytest.raises(TypeError, match="model: expected a ClusterClassifier or a LinearClassifier, got Linear"):
        cell_walk(model, images, labels, **CALL)


# verdicts


def test_a_verdict_is_that_of_the_largest_logit():
    model, images = Linear(), some_images(20)
    labels = torch.arange(20) % 3
    assert torch.equal(misclassified(model, images, labels), labelled(model, images) != labels)
    assert misclassified(model, images[:0], labels[:0]).tolist() == []


@pytest.mark.parametrize(
    ("model", "labels", "message"),
    [
        (lambda x: x.flatten(1)[:1], [0, 1], r"model: expected logits \[2, class\], got shape \[1, 16\]"),
        (lambda x: x, [0, 1], r"model: expected logits \[2, class\], got shape \[2, 1, 4, 4\]"),
        (lambda x: torch.full((2, 3), math.nan), [0, 1], "model: expected logits, got NaN"),
        (Linear(), [0, 3], r"labels: expected classes in 0\.\.2, got 0 to 3"),
        (Linear(), [0, -1], r"labels: expected classes in 0\.\.2, got -1 to 0"),
    ],
)
def test_what_cannot_be_judged_is_refused(model, labels, message):
    with pytest.raises(ValueError, match=message):
        misclassified(model, torch.full((2, *SHAPE), 0.5, dtype=torch.float64), torch.tensor(labels))


def test_a_class_without_a_vote_is_a_logit_and_what_ranks_nothing_is_none():
    check_logits(torch.tensor([[0.0, -math.inf]]))
    check_logits(torch.zeros(0, 3))
    with pytest.raises(ValueError, match="got NaN"):
        check_logits(torch.tensor([[0.0, math.nan]]))
    for largest in (math.inf, -math.inf):
        with pytest.raises(ValueError, match="model: expected a finite largest logit in each row"):
            check_logits(torch.tensor([[0.0, 1.0], [largest, -math.inf]]))
