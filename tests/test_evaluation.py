"""Measurements of runs: one row an example, done once, and going on where they were interrupted."""

import shutil
from dataclasses import replace

import pandas as pd
import pytest
import torch

from clustr_core import data, evaluation
from clustr_core.accuracy import robust_accuracy
from clustr_core.attacks import pgd
from clustr_core.certify import certified_radius
from clustr_core.evaluation import attack_table, attacks_of, certificate_table, certificates_of, some_test_images
from clustr_core.recipes import Clustr, CrossEntropy, Profile, Protocol
from clustr_core.training import embed_all, fit

SMALL = {"width": 4, "train_examples": 200, "learning_rate": 5e-3}
PROTOCOL = Protocol(eps=(0.05, 0.3), steps=4, restarts=2, examples=40)
COLUMNS = ["norm", "eps", "loss", "steps", "restarts", "index", "label", "prediction", "correct"]
ROW = ["bound", *COLUMNS[5:]]
COLUMNS += ["adversarial_prediction", "robust"]


@pytest.fixture(scope="module")
def digits():
    return data.load("digits")


@pytest.fixture(scope="module")
def runs(tmp_path_factory, digits):
    """A linear and a cluster classifier."""
    home = tmp_path_factory.mktemp("runs")
    recipes = (CrossEntropy(epochs=15, **SMALL), Clustr(epochs=4, per_cluster=4, **SMALL))
    return {r.method: fit(r, dataset=digits, folder=home / r.method, progress=False) for r in recipes}


@pytest.fixture(params=["ce", "clustr"])
def run(request, runs):
    """A run that has not been measured yet."""
    shutil.rmtree(runs[request.param].path / "tables", ignore_errors=True)
    return runs[request.param]


@pytest.fixture
def measure(digits):
    """`attack_table` on digits, without a bar."""
    return lambda run, protocol=PROTOCOL: attack_table(run, protocol, dataset=digits, progress=False)


@pytest.fixture
def attacks_made(monkeypatch):
    """Counts attacks: one entry for each call, (eps, loss)."""
    made = []

    def counted(*args, **options):
        made.append((options["eps"], options["loss"]))
        return pgd(*args, **options)

    monkeypatch.setattr(evaluation, "pgd", counted)
    return made


def tables(run):
    return {path: path.stat().st_mtime_ns for path in (run.path / "tables").iterdir()}


def test_rows_of_an_attack(run, measure, digits):
    table = measure(run)
    assert list(table) == COLUMNS
    assert len(table) == 2 * 2 * 40
    assert (table["norm"] == "linf").all()
    assert (table["steps"] == 4).all()
    assert (table["restarts"] == 2).all()
    for _, rows in table.groupby(["eps", "loss"]):
        assert rows["label"].tolist() == digits.test_labels[rows["index"].tolist()].tolist()
        with torch.no_grad():
            clean = run.model()(data.to_float(digits.test_images[rows["index"].tolist()])).argmax(dim=1)
        assert rows["prediction"].tolist() == clean.tolist()
    assert (table["correct"] == (table["prediction"] == table["label"])).all()
    assert (table["robust"] == (table["adversarial_prediction"] == table["label"])).all()
    assert not (table["robust"] & ~table["correct"]).any()
    assert (table["robust"] != table["correct"]).any()
    accuracy = robust_accuracy(table)["robust_accuracy"]
    assert accuracy[0] >= accuracy[1] >= accuracy[2]


def test_a_row_is_what_the_attack_on_its_image_found(run, measure, digits):
    table = measure(run).query("eps == 0.3 and loss == 'margin'")
    where = table["index"].tolist()
    images, labels = data.to_float(digits.test_images[where]), digits.test_labels[where]
    expected = pgd(run.model(), images, labels, eps=0.3, step_size=2.5 * 0.3 / 4, steps=4, restarts=2, loss="margin")
    assert (~expected.success).tolist() == table["robust"].tolist()


def test_a_second_call_attacks_nothing(run, measure, attacks_made):
    first = measure(run)
    before = tables(run)
    assert len(attacks_made) == len(before) == 4
    pd.testing.assert_frame_equal(measure(run), first)
    assert len(attacks_made) == 4
    assert tables(run) == before


def test_an_interrupted_measurement_goes_on(run, measure, monkeypatch, attacks_made):
    def interrupted(*args, **options):
        if len(attacks_made) == 2:
            raise KeyboardInterrupt
        return counted(*args, **options)

    counted = evaluation.pgd
    with monkeypatch.context() as patch:
        patch.setattr(evaluation, "pgd", interrupted)
        with pytest.raises(KeyboardInterrupt):
            measure(run)
    before = tables(run)
    assert len(before) == 2
    table = measure(run)
    assert attacks_made == [(0.05, "ce"), (0.05, "margin"), (0.3, "ce"), (0.3, "margin")]
    assert before.items() <= tables(run).items()
    shutil.rmtree(run.path / "tables")
    pd.testing.assert_frame_equal(measure(run), table)


def test_a_larger_grid_attacks_only_what_is_new(run, measure, attacks_made):
    measure(run)
    table = measure(run, replace(PROTOCOL, eps=(0.05, 0.1, 0.3)))
    assert attacks_made[4:] == [(0.1, "ce"), (0.1, "margin")]
    assert table["eps"].unique().tolist() == [0.05, 0.1, 0.3]


@pytest.mark.parametrize(
    "changes",
    [{"steps": 3}, {"restarts": 1}, {"step_size": 0.01}, {"examples": 30}, {"seed": 1}, {"norm": "l2"}],
    ids=lambda changes: next(iter(changes)),
)
def test_any_other_protocol_is_another_measurement(runs, measure, attacks_made, changes):
    measure(runs["ce"])
    before = len(attacks_made)
    measure(runs["ce"], replace(PROTOCOL, **changes))
    assert len(attacks_made) == before + 4


def test_the_order_of_the_examples_is_the_same_for_all_and_grows(runs, digits):
    few, images, labels = some_test_images(runs["ce"], digits, 20)
    more, _, _ = some_test_images(runs["clustr"], digits, 60)
    every, _, _ = some_test_images(runs["clustr"], digits, None)
    assert set(few.tolist()) < set(more.tolist())
    assert few.tolist() == sorted(few.tolist())
    assert every.tolist() == list(range(len(digits.test_labels)))
    assert torch.equal(images, digits.test_images[few])
    assert torch.equal(labels, digits.test_labels[few])
    assert few.tolist() != list(range(20))


def test_batches_do_not_change_a_measurement(runs, measure, monkeypatch):
    protocol = replace(PROTOCOL, eps=(0.05,), losses=("ce",))
    shutil.rmtree(runs["ce"].path / "tables", ignore_errors=True)
    whole = measure(runs["ce"], protocol)
    shutil.rmtree(runs["ce"].path / "tables")
    monkeypatch.setattr(evaluation, "BATCH", 16)
    parts = measure(runs["ce"], protocol)
    pd.testing.assert_frame_equal(parts.drop(columns=["robust", "adversarial_prediction"]), whole[COLUMNS[:-2]])


def test_rows_of_a_certificate(run, digits):
    table = certificate_table(run, examples=50, dataset=digits)
    assert list(table) == [*ROW, "feature_radius", "radius", "lipschitz", "lipschitz_lower_bound"]
    by_bound = table.pivot(index="index", columns="bound", values="feature_radius")
    assert len(by_bound) == 50
    assert (by_bound["triangle"] <= by_bound["nearest"] + 1e-6).all()
    assert (by_bound["nearest"] <= by_bound["pairwise"] + 1e-6).all()
    assert (table["radius"] - table["feature_radius"] / table["lipschitz"]).abs().max() < 1e-7
    assert table["lipschitz"].nunique() == table["lipschitz_lower_bound"].nunique() == 1
    assert (table["lipschitz_lower_bound"] <= table["lipschitz"]).all()
    assert (table["lipschitz_lower_bound"] > 0).all()
    rows = table.query("bound == 'nearest'")
    where, model = rows["index"].tolist(), run.cluster_model()
    embeddings = embed_all(model.encoder, digits.test_images[where])
    expected = certified_radius(embeddings, model.clusters, bound="nearest", rule="soft", neighbours=20)
    assert rows["feature_radius"].tolist() == pytest.approx(expected.tolist(), rel=1e-5, abs=1e-6)
    assert (rows["correct"] == (rows["prediction"] == rows["label"])).all()


def test_a_certificate_is_computed_once(run, digits, monkeypatch):
    first = certificate_table(run, examples=20, dataset=digits)

    def forbidden(*args, **options):
        raise AssertionError("certified again")

    monkeypatch.setattr(evaluation, "certified_radius", forbidden)
    pd.testing.assert_frame_equal(certificate_table(run, examples=20, dataset=digits), first)
    with pytest.raises(AssertionError, match="certified again"):
        certificate_table(run, examples=21, dataset=digits)


def test_tables_of_a_profile_begin_with_the_method(run, digits):
    l2 = Protocol(norm="l2", eps=(0.5,), steps=2, examples=10, losses=("ce",))
    linf = replace(l2, norm="linf")
    profile = Profile("tiny", {}, {"linf": linf, "l2": l2}, certified_examples=15)
    attacked = attacks_of(run, profile, dataset=digits, progress=False)
    assert list(attacked) == ["method", *COLUMNS]
    assert attacked["method"].unique().tolist() == [run.recipe.method]
    assert attacked["norm"].tolist() == ["linf"] * 10 + ["l2"] * 10
    certified = certificates_of(run, profile, dataset=digits)
    assert certified.columns[0] == "method"
    assert len(certified) == 3 * 15


def test_a_profile_without_attacks_is_refused(runs):
    with pytest.raises(ValueError, match="profile bare: expected at least one entry under attacks, got none"):
        attacks_of(runs["ce"], Profile("bare", {}, {}))


def test_a_changed_dataset_is_noticed(runs, digits):
    run, protocol = runs["ce"], Protocol(eps=(0.1,), steps=2, examples=10)
    fewer = replace(digits, test_images=digits.test_images[:20], test_labels=digits.test_labels[:20])
    every = replace(protocol, examples=None)
    assert len(attack_table(run, every, dataset=fewer, progress=False)) == 40
    assert len(attack_table(run, every, dataset=digits, progress=False)) == 2 * len(digits.test_labels)
    with pytest.raises(ValueError, match=r"expected the images that .* was trained on; digits has changed"):
        attack_table(run, protocol, dataset=replace(digits, train_images=255 - digits.train_images))
    with pytest.raises(ValueError, match=r"dataset: expected 'digits' as in the run, got 'other'"):
        attack_table(run, protocol, dataset=replace(digits, name="other"))
