"""What the checks are worth: evaluations of which the truth is known, and how often each check speaks of them."""

import pandas as pd
import pytest
import torch
from torch import nn

from clustr_core.data import to_float
from clustr_core.measuring import power
from clustr_core.measuring.checks import CHECKS
from clustr_core.measuring.power import by_evaluation, evaluations_of, labelled, measured, pairs, planted_found, rates
from clustr_core.models.classifiers import ClusterClassifier, LinearClassifier
from clustr_core.models.clusters import fit_clusters

EPS = 0.15


@pytest.fixture(scope="module")
def networks(digits):
    """A small network trained for seconds, with its own head and with clusters fitted afterwards."""
    torch.manual_seed(0)
    images, labels = to_float(digits.train_images), digits.train_labels
    ce = LinearClassifier(nn.Sequential(nn.Flatten(), nn.Linear(64, 48), nn.ReLU()), 48, 10)
    optimiser = torch.optim.Adam(ce.parameters(), lr=1e-2)
    for _ in range(150):
        optimiser.zero_grad()
        nn.functional.cross_entropy(ce(images), labels).backward()
        optimiser.step()
    ce.eval().requires_grad_(False)
    clusters, _ = fit_clusters(ce.embed(images), labels, per_class=2)
    return {"ce": ce, "ce-clusters": ClusterClassifier(ce.encoder, clusters).eval()}


@pytest.fixture(scope="module")
def judged(networks, digits):
    images, labels = to_float(digits.test_images[:24]), digits.test_labels[:24]
    return {each.name: each for each in evaluations_of(networks, images, labels, eps=EPS, steps=10, restarts=1)}


@pytest.fixture(scope="module")
def gaps(judged, networks):
    """By how much each evaluation is too high."""
    found = {}
    for name, each in judged.items():
        worst = power.share(power.worst_case(each, networks["ce-clusters"]))
        found[name] = each.evaluation.robust_accuracy - worst
    return found


def test_every_network_has_the_papers_protocol_and_a_correct_attack_and_ce_the_failures(judged):
    kinds = {name: each.kind for name, each in judged.items()}
    assert [name for name, kind in kinds.items() if kind == "protocol"] == ["ce, paper's", "ce-clusters, paper's"]
    assert [name for name, kind in kinds.items() if kind == "correct"] == ["ce, PGD", "ce-clusters, PGD"]
    assert [name for name, kind in kinds.items() if kind == "failure"] == [
        "quantised inputs", "saturating head", "step too small", "stochastic layer", "detached preprocessing",
        "lost success",
    ]  # fmt: skip
    assert not any(module.training for each in judged.values() for module in each.evaluation.model.modules())


@pytest.mark.parametrize("name", ["quantised inputs", "saturating head", "step too small", "lost success"])
def test_a_failure_reports_more_than_is_left(name, gaps):
    assert gaps[name] > 0.2


def test_the_correct_attack_reports_what_is_left(gaps):
    assert gaps["ce, PGD"] < 0.1


def test_a_surface_of_a_failure_classifies_as_its_model_does(judged):
    for name in ("quantised inputs", "saturating head", "step too small", "detached preprocessing", "lost success"):
        evaluation = judged[name].evaluation
        outputs = [model(evaluation.images).argmax(dim=1) for model in (evaluation.surface, evaluation.model)]
        assert torch.equal(*outputs), name


def test_lost_successes_were_passed(judged):
    found = CHECKS["silent success"].ask(judged["lost success"].evaluation)
    assert found.flagged
    # and what is returned is right, but where the random start was wrong
    attacked = judged["lost success"].evaluation.attacked
    assert (attacked.success & attacked.clean_correct).sum() <= 2


def test_the_walk_that_is_judged_once_is_judged_where_it_ends(judged):
    evaluation = judged["ce, PGD"].evaluation
    size = {"eps": EPS, "steps": 10, "step_size": 0.03, "restarts": 1, "seed": 0}
    result = power.last_point(evaluation.model, evaluation.images, evaluation.labels, **size)
    assert torch.equal(result.prediction, evaluation.model(result.adversarial).argmax(dim=1))
    assert (result.adversarial - evaluation.images).abs().max() <= EPS + 1e-6
    assert (result.gradients == 10).all()


def test_a_row_says_what_a_check_found_and_what_it_cost(judged, networks):
    table = measured(judged["quantised inputs"], source=networks["ce-clusters"], queries=30).set_index("check")
    assert list(table.index) == list(CHECKS)
    assert set(table["kind"]) == {"failure"}
    assert (table["images"] == 24).all()
    assert table.loc["zero gradients", "value"] == 1
    # a pass and a gradient of each image, which is none here since the rounding has no gradient to give back
    assert table.loc["zero gradients", "gradients"] == pytest.approx(1)
    assert table.loc["silent success", "gradients"] == 0
    # on another network, as many steps as the evaluation has, and the passes that judge
    assert table.loc["black box: transfer", "gradients"] > 10
    assert table["flagged"].dtype == bool


def test_the_book_finds_what_is_planted(networks, digits):
    images, labels = to_float(digits.test_images[:8]), digits.test_labels[:8]
    found = planted_found(networks["ce"], images, labels, eps=EPS)
    assert found["images"] == 8
    assert 0 < found["found"] <= found["found_in_ten"] <= found["planted"] <= 8


# tables


def rows_of(*evaluations) -> pd.DataFrame:
    """Of (evaluation, kind, reported, worst, {check: (flagged, gradients)})."""
    return pd.DataFrame(
        [
            {
                "seed": 0, "evaluation": name, "kind": kind, "images": 100, "reported": reported, "worst": worst,
                "check": check, "value": float(flagged), "flagged": flagged, "gradients": cost,
            }
            for name, kind, reported, worst, checks in evaluations
            for check, (flagged, cost) in checks.items()
        ]
    )  # fmt: skip


@pytest.fixture
def rows() -> pd.DataFrame:
    return rows_of(
        (
            "a, paper's",
            "protocol",
            0.5,
            0.2,
            {"ablation": (True, 1.0), "budget": (False, 5.0), "incomplete optimisation": (True, 3.0)},
        ),
        (
            "b",
            "failure",
            0.9,
            0.2,
            {"ablation": (False, 1.0), "budget": (True, 5.0), "incomplete optimisation": (False, 3.0)},
        ),
        (
            "a, PGD",
            "correct",
            0.21,
            0.2,
            {"ablation": (False, 1.0), "budget": (False, 5.0), "incomplete optimisation": (True, 3.0)},
        ),
        (
            "b, PGD",
            "correct",
            0.24,
            0.2,
            {"ablation": (True, 1.0), "budget": (True, 5.0), "incomplete optimisation": (True, 3.0)},
        ),
        (
            "c, PGD",
            "correct",
            0.1,
            0.2,
            {"ablation": (True, 1.0), "budget": (True, 5.0), "incomplete optimisation": (True, 3.0)},
        ),
    )


def test_the_truth_is_what_is_reported_beside_what_is_left(rows):
    truth = labelled(rows).drop_duplicates("evaluation").set_index("evaluation")["truth"]
    assert dict(truth) == {
        "a, paper's": "broken", "b": "broken", "a, PGD": "honest", "b, PGD": "unclear", "c, PGD": "unclear"
    }  # fmt: skip


def test_rates_count_what_is_broken_and_what_is_honest(rows):
    found = rates(rows).set_index(["check", "truth"])
    assert found.loc[("ablation", "broken"), ["spoke", "of"]].tolist() == [1, 2]
    assert found.loc[("ablation", "honest"), ["spoke", "of"]].tolist() == [0, 1]
    assert found.loc[("incomplete optimisation", "honest"), "share"] == 1
    assert (found["low"] <= found["share"]).all()
    assert (found["share"] <= found["high"]).all()
    # the battery as a whole: a witness is enough, an indicator never
    assert found.loc[("the battery", "broken"), ["spoke", "of"]].tolist() == [2, 2]
    assert found.loc[("the battery", "honest"), ["spoke", "of"]].tolist() == [0, 1]
    # exact: of one, none
    assert found.loc[("ablation", "honest"), "high"] == pytest.approx(0.975)


def test_the_best_pair_comes_first(rows):
    best = pairs(rows).iloc[0]
    assert {best["first"], best["second"]} == {"ablation", "budget"}
    assert (best["hits"], best["broken"], best["alarms"], best["honest"]) == (2, 2, 0, 1)
    assert best["gradients"] == 6


def test_correct_attacks_are_one_column(rows):
    found = by_evaluation(rows).set_index(["evaluation", "check"])
    assert found.loc[("PGD on all", "ablation"), ["spoke", "of"]].tolist() == [2, 3]
    assert found.loc[("PGD on all", "ablation"), "broken"] == 0
    assert found.loc[("b", "budget"), "share"] == 1


def test_the_table_has_the_most_telling_first_and_one_price_a_check(rows):
    table = power.rates_table(rows)
    assert table["check"].iloc[0] == "the battery"
    assert table["check"].iloc[-1] == "incomplete optimisation"
    row = table.set_index("check").loc["ablation"]
    assert (row["broken"], row["honest"], row["gradients"]) == ("1 of 2", "0 of 1", "1")


def test_rates_want_broken_and_honest_ones(rows):
    with pytest.raises(ValueError, match=r"rows: expected broken and honest evaluations, got \['broken'\]"):
        rates(rows[rows["kind"] == "failure"])
