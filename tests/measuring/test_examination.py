"""The battery on finished runs: computed once, on the images that the profile says, for each head."""

import pandas as pd
import pytest
import torch

from clustr_core.attacks.cells import cell_walk
from clustr_core.attacks.losses import margin_loss
from clustr_core.attacks.paper import ScoreModel, paper_pgd, paper_surface
from clustr_core.data import to_float
from clustr_core.measuring import examination
from clustr_core.measuring.checks import CHECKS
from clustr_core.measuring.diagnostics import examine
from clustr_core.measuring.examination import ExaminedHead, ablations_of, diagnostics_of, plane_of_attacks
from clustr_core.measuring.pieces import some_test_images
from clustr_core.measuring.profile import Examination, Profile
from clustr_core.training.loop import fit
from clustr_core.training.recipes import run_folder

ASKED = Examination(eps=0.1, examples=6, steps=2, restarts=1, queries=3)


@pytest.fixture(scope="module")
def book(tmp_path_factory, digits):
    """Two finished runs where a profile looks for them."""
    from clustr_core.training.recipes import Clustr, CrossEntropy

    patch = pytest.MonkeyPatch()
    patch.setenv("CLUSTR_HOME", str(tmp_path_factory.mktemp("book")))
    small = {"width": 4, "train_examples": 150}
    recipes = {"ce": CrossEntropy(epochs=2, **small), "clustr": Clustr(epochs=1, per_cluster=4, **small)}
    runs = {name: fit(recipe, dataset=digits, progress=False) for name, recipe in recipes.items()}
    yield Profile("tiny", recipes, {}, None, ASKED), runs
    patch.undo()


def test_a_cluster_run_is_examined_on_its_scores_with_the_transfer_from_cross_entropy(book, digits):
    profile, runs = book
    found = diagnostics_of(runs["clustr"], profile, dataset=digits)
    assert found["method"].unique().tolist() == ["clustr"]
    assert set(found["check"]) == set(CHECKS)
    model, (_, images, labels) = runs["clustr"].model(), some_test_images(runs["clustr"], digits, 6)
    expected = examine(
        paper_surface(model), model, to_float(images), labels, eps=0.1, source=runs["ce"].model(), steps=2, restarts=1,
        queries=3,
    )  # fmt: skip
    pd.testing.assert_frame_equal(found.drop(columns="method"), expected, check_dtype=False, atol=1e-7)
    assert isinstance(paper_surface(model), ScoreModel)


def test_cross_entropy_is_examined_as_it_is_and_with_clusters_and_without_a_transfer_from_itself(book, digits):
    profile, runs = book
    found = diagnostics_of(runs["ce"], profile, dataset=digits)
    assert found["method"].unique().tolist() == ["ce", "ce-clusters"]
    assert "black box: transfer" not in set(found["check"])
    assert found.loc[found["check"] == "no logits"].set_index("method")["flagged"].to_dict() == {
        "ce": False,
        "ce-clusters": True,
    }


def test_ablations(book, digits):
    profile, runs = book
    found = ablations_of(runs["clustr"], profile, dataset=digits)
    assert found["change"].tolist() == ["released", "surface", "bookkeeping", "steps", "target", "all"]
    assert found["robust_accuracy"].between(0, 1).all()


def test_both_are_computed_once(book, digits, monkeypatch):
    profile, runs = book
    first = [compute(runs["clustr"], profile, dataset=digits) for compute in (diagnostics_of, ablations_of)]

    def forbidden(*args, **options):
        raise AssertionError("computed again")

    monkeypatch.setattr(examination, "ask_all", forbidden)
    monkeypatch.setattr(ExaminedHead, "ablations", forbidden)
    again = [compute(runs["clustr"], profile, dataset=digits) for compute in (diagnostics_of, ablations_of)]
    for one, other in zip(first, again, strict=True):
        pd.testing.assert_frame_equal(one, other)
    more = Profile("tiny", profile.recipes, {}, None, Examination(eps=0.1, examples=7, steps=2, restarts=1))
    with pytest.raises(AssertionError, match="computed again"):
        ablations_of(runs["clustr"], more, dataset=digits)


def test_a_profile_without_an_examination_is_refused(book):
    profile, runs = book
    with pytest.raises(ValueError, match="profile bare: expected an entry examination, got none"):
        ablations_of(runs["ce"], Profile("bare", profile.recipes, {}))


def test_a_missing_cross_entropy_run_is_named(book, digits, monkeypatch, tmp_path):
    profile, runs = book
    monkeypatch.setenv("CLUSTR_HOME", str(tmp_path))
    with pytest.raises(FileNotFoundError, match=run_folder(profile.recipes["ce"]).name):
        diagnostics_of(runs["clustr"], profile, dataset=digits)


def test_the_plane_of_two_attacks_meets_the_image_and_both_ends(book, digits):
    _, runs = book
    model, (_, images, labels) = runs["clustr"].model(), some_test_images(runs["clustr"], digits, 1)
    pixels = to_float(images)
    ends = (
        paper_pgd(paper_surface(model), pixels, labels, eps=0.1, steps=3, restarts=1).adversarial,
        cell_walk(model, pixels, labels, eps=0.1, step_size=0.03, steps=3).adversarial,
    )
    table = plane_of_attacks(model, pixels, labels, ends, points=7).round({"a": 6, "b": 6}).set_index(["a", "b"])
    assert len(table) == 49
    for place, at in (((0.0, 0.0), pixels), ((1.0, 0.0), ends[0].clamp(0, 1)), ((0.0, 1.0), ends[1])):
        with torch.no_grad():
            margin = margin_loss(model(at), labels).item()
            loss = torch.nn.functional.cross_entropy(paper_surface(model)(at), labels).item()
        assert table.loc[place, "margin"] == pytest.approx(margin, rel=1e-3, abs=1e-3)
        assert table.loc[place, "loss"] == pytest.approx(loss, abs=1e-4)
