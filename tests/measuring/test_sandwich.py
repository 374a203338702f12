"""The sandwich: true certificates hold, false ones are caught and the proof is kept, and the curves are in order."""

import math

import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from toy_models import Linear, cluster_model, labelled, some_images

from clustr_core.attacks.autoattack import autoattack
from clustr_core.certificates.ladder import certified_radius
from clustr_core.certificates.linear import linear_radius
from clustr_core.measuring import counterexamples, sandwich
from clustr_core.measuring.accuracy import binomial_interval
from clustr_core.measuring.chain import check_chain, sandwich_curve
from clustr_core.measuring.counterexamples import (
    ROUNDING,
    CertificateBroken,
    Counterexample,
    check_sandwich,
    load_counterexample,
    save_counterexample,
    violations,
)
from clustr_core.measuring.profile import SandwichBudget
from clustr_core.measuring.sandwich import measure_sandwich, sandwich_rows
from clustr_core.models.classifiers import ClusterClassifier
from clustr_core.models.clusters import Clusters
from clustr_core.storage.tables import read_table, write_table
from clustr_core.storage.tensors import read_tensors, write_tensors

BUDGET = SandwichBudget(steps=20, restarts=5, points=60)
COLUMNS = ["attack", "index", "label", "correct", "radius", "norm", "gradients"]


def linear(count=12, dtype=torch.float64):
    """A linear model, images, labels of which two are wrong, and exact radii."""
    model, images = Linear(4, dtype=dtype), some_images(60, dtype=dtype)
    labels = labelled(model, images)
    radii = linear_radius(model.weight.detach(), model.bias.detach(), images.flatten(1), labels)
    keep = (radii > 2e-2) & (radii < 0.3)
    images, labels, radii = images[keep][:count], labels[keep][:count], radii[keep][:count]
    labels[:2] = (labels[:2] + 1) % 4
    return model, images, labels, radii


def nearest(count=12, dtype=torch.float64):
    """The identity and one centroid a class, whose exact certificate is the distance; two labels are wrong."""
    clusters = Clusters(some_images(5, 3).flatten(1).to(dtype), torch.arange(5), torch.full((5,), 0.05, dtype=dtype))
    model, images = ClusterClassifier(nn.Flatten(), clusters, rule="nearest"), some_images(40, dtype=dtype)
    labels = labelled(model, images)
    radii = certified_radius(model.embed(images), model.clusters, bound="exact")
    keep = (radii > 2e-2) & (radii < 0.3)
    images, labels, radii = images[keep][:count], labels[keep][:count], radii[keep][:count]
    labels[:2] = (labels[:2] + 1) % 5
    return model, images, labels, radii


def measured(problem, folder, *, scale=1.0, budget=BUDGET, **options):
    model, images, labels, radii = problem
    indices = 100 + torch.arange(len(images))
    return measure_sandwich(model, images, labels, scale * radii, budget, indices=indices, folder=folder, **options)


def a_table(norms, radii, correct=None, attacks=("fmn",)):
    """Rows by hand: one list of norms for each attack."""
    n = len(radii)
    correct = [True] * n if correct is None else correct
    facts = {"index": range(n), "label": 0, "correct": correct, "radius": radii}
    tables = [
        pd.DataFrame({"attack": attack, **facts, "norm": norm, "gradients": 1})
        for attack, norm in zip(attacks, norms, strict=True)
    ]
    return pd.concat(tables, ignore_index=True)


@pytest.mark.parametrize("problem", [linear, nearest])
def test_a_true_certificate_holds_and_is_tight(problem, tmp_path):
    model, images, labels, radii = problem()
    budget = SandwichBudget(steps=40, restarts=5, points=60)
    rows = measured((model, images, labels, radii), tmp_path, budget=budget)
    assert list(rows.columns) == COLUMNS
    assert rows["attack"].unique().tolist() == ["fmn", "ddn", "pgd", "random"]
    assert rows.groupby("attack")["index"].apply(list).tolist() == [list(range(100, 100 + len(images)))] * 4
    assert rows.groupby("attack")["label"].apply(list).tolist() == [labels.tolist()] * 4
    right = rows.query("correct")
    assert len(rows) - len(right) == 2 * 4
    assert (rows.query("not correct")[["radius", "norm", "gradients"]] == 0).all(axis=None)
    for attack in ("fmn", "ddn"):
        found = right.loc[right["attack"] == attack]
        ratio = found["norm"] / found["radius"]
        assert ratio.min() >= 1 - 1e-9
        assert ratio.max() <= 1.001
    assert right.query("attack == 'fmn'")["gradients"].eq(40 * 5).all()
    assert right.query("attack == 'pgd'")["gradients"].eq(2 * 40 * 5).all()
    # nothing lies inside a certified ball, but for the rounding of its radius
    assert (right["norm"] >= right["radius"] * (1 - 1e-12)).all()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("problem", [linear, nearest])
@pytest.mark.parametrize("attack", ["fmn", "ddn", "pgd"])
def test_a_false_certificate_is_caught_and_the_proof_kept(problem, attack, tmp_path):
    model, images, labels, radii = problem()
    with pytest.raises(CertificateBroken, match=rf"^{attack}: expected no misclassified image nearer .* kept in ") as e:
        measured((model, images, labels, radii), tmp_path, scale=1.05, attacks=[attack])
    (path,) = tmp_path.iterdir()
    assert str(path) in str(e.value)
    found = load_counterexample(path)
    assert path.name == f"counterexample-{attack}-{found.index}.safetensors"
    assert f"example {found.index} " in str(e.value)
    assert f"{found.radius:.9g}" in str(e.value)
    assert f"{found.norm:.9g}" in str(e.value)
    n = found.index - 100
    assert torch.equal(found.image, images[n])
    assert found.label == labels[n]
    assert found.attack == attack
    assert found.radius == pytest.approx(1.05 * radii[n].item())
    assert found.norm == (found.adversarial.double() - found.image.double()).norm().item()
    assert radii[n] * (1 - 1e-9) <= found.norm < found.radius - ROUNDING
    assert labelled(model, found.image[None]) == found.label
    assert labelled(model, found.adversarial[None]) != found.label
    assert 0 <= found.adversarial.min() <= found.adversarial.max() <= 1


def test_random_search_catches_a_certificate_that_is_far_too_large(tmp_path):
    # directions that are not chosen need a longer way than the shortest one
    with pytest.raises(CertificateBroken, match=r"^random: .* kept in "):
        measured(linear(), tmp_path, scale=6.0, attacks=["random"])


def test_the_worst_of_all_attacks_is_the_one_that_is_kept(tmp_path):
    model, images, labels, radii = linear()
    budget = SandwichBudget(steps=10, restarts=2, points=10)
    with pytest.raises(CertificateBroken):
        measured((model, images, labels, radii), tmp_path, scale=1.2, budget=budget)
    rows = sandwich_rows(model, images, labels, 1.2 * radii, budget, indices=100 + torch.arange(12))
    (path,) = tmp_path.iterdir()
    found, worst = load_counterexample(path), violations(rows).iloc[0]
    assert (found.attack, found.index) == (worst["attack"], worst["index"])
    assert worst["radius"] - worst["norm"] == (rows["radius"] - rows["norm"])[rows["correct"]].max()


def test_a_full_disk_does_not_hide_a_broken_certificate(tmp_path, monkeypatch):
    def full(*args, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(counterexamples, "write_tensors", full)
    with pytest.raises(CertificateBroken, match=r"it could not be kept: .*No space left on device"):
        measured(nearest(), tmp_path, scale=1.05, attacks=["fmn"])
    assert not list(tmp_path.iterdir())


def test_apgd_reports_the_distance_it_needs(tmp_path):
    model, images, labels, radii = linear(8, torch.float32)
    eps = tuple((1.01 * radii.sort().values[[6, 2, 4]]).tolist())
    rows = measured((model, images, labels, radii), tmp_path, budget=SandwichBudget(apgd_eps=eps), attacks=["apgd"])
    right, found = torch.tensor(rows["correct"].tolist()), torch.tensor(rows["norm"].tolist())
    assert right.sum() == 6
    alone = autoattack(model, images, labels, norm="l2", eps=eps[2], parts=["apgd-ce", "apgd-t"])
    assert torch.equal(found <= eps[2], alone.success)
    reached = (radii < max(eps)) & right
    assert 1 < reached.sum() < 6
    assert torch.equal(found[right].isfinite(), reached[right])
    ratio = found[reached] / radii[reached]
    assert ratio.min() >= 1 - 1e-4
    assert ratio.max() <= 1.2
    assert (rows.query("correct")["gradients"] > 0).all()


def test_apgd_does_without_its_targeted_part_below_four_classes(tmp_path, monkeypatch):
    asked = []
    real = autoattack

    def recorded(*args, parts, eps, **options):
        asked.append((parts, eps, len(args[1])))
        return real(*args, parts=parts, eps=eps, **options)

    monkeypatch.setattr(sandwich, "autoattack", recorded)
    model, images = Linear(2, dtype=torch.float32), some_images(4, dtype=torch.float32)
    labels = labelled(model, images)
    budget = SandwichBudget(apgd_eps=(2.0, 1.0))
    rows = measured((model, images, labels, torch.zeros(4)), tmp_path, budget=budget, attacks=["apgd"])
    # all are broken at the smaller one, and nothing is left for the larger
    assert asked == [(["apgd-ce"], 1.0, 4)]
    assert (rows["norm"] <= 1.0).all()
    with pytest.raises(ValueError, match=r"images: expected float32, got torch\.float64"):
        measured((Linear(2), images.double(), labels, torch.zeros(4)), tmp_path, budget=budget, attacks=["apgd"])


def test_logits_far_apart_are_cooled_for_cross_entropy(tmp_path):
    model, images = cluster_model(0, 1, "nearest", variance=1e-5, classes=4), some_images(30)
    labels = labelled(model, images)
    radii = certified_radius(model.embed(images), model.clusters, bound="exact")
    options = {"budget": SandwichBudget(steps=60, restarts=1), "attacks": ["ddn"]}
    rows = measured((model, images, labels, radii), tmp_path, **options)
    assert rows["norm"].lt(1.5 * rows["radius"]).all()
    hot = measured((model, images, labels, radii), tmp_path, **options, temperature=1e-3)
    assert (hot["norm"] == math.inf).sum() > 10
    with pytest.raises(ValueError, match="temperature: expected a positive number, got 0"):
        measured((model, images, labels, radii), tmp_path, temperature=0.0)


def test_seeds_repeat(tmp_path):
    budget = SandwichBudget(steps=5, restarts=2, points=10)
    once, again = (measured(nearest(), tmp_path, budget=budget, seed=3) for _ in range(2))
    pd.testing.assert_frame_equal(once, again)


def test_no_images_no_rows(tmp_path):
    model, images, labels, radii = nearest()
    rows = measured((model, images[:0], labels[:0], radii[:0]), tmp_path)
    assert list(rows.columns) == COLUMNS
    assert len(rows) == 0
    check_sandwich(rows)


# what breaks a certificate, and what does not


@pytest.mark.parametrize(
    ("norm", "radius", "correct", "tolerance", "broken"),
    [
        (0.5, 0.5, True, 0.0, False),
        (math.nextafter(0.5, 0), 0.5, True, 0.0, True),
        (0.5 - 0.9 * ROUNDING, 0.5, True, ROUNDING, False),
        (0.5 - 1.1 * ROUNDING, 0.5, True, ROUNDING, True),
        (math.inf, 0.5, True, 0.0, False),
        (0.0, 0.5, True, ROUNDING, True),
        (0.0, 0.5, False, ROUNDING, False),
        (0.0, 0.0, True, 0.0, False),
    ],
)
def test_only_what_is_strictly_inside_breaks_a_certificate(norm, radius, correct, tolerance, broken):
    rows = a_table([[1.0, norm]], [0.1, radius], [True, correct], attacks=["ddn"])
    assert violations(rows, tolerance=tolerance).index.tolist() == ([1] if broken else [])
    if not broken:
        check_sandwich(rows, tolerance=tolerance)
        return
    with pytest.raises(CertificateBroken, match=r"^ddn: .* example 1 .* radius 0\.5, got one at L2 distance"):
        check_sandwich(rows, tolerance=tolerance)


def test_violations_are_sorted_by_depth_whatever_the_rows_are_called():
    rows = a_table([[0.4, 0.1, 1.0], [0.3, 0.45, 0.45]], [0.5, 0.5, 0.5], attacks=["fmn", "pgd"])
    rows.index = [7] * 6
    assert violations(rows)["norm"].tolist() == [0.1, 0.3, 0.4, 0.45, 0.45]


def test_what_cannot_be_compared_is_refused():
    with pytest.raises(ValueError, match="rows: expected numbers as norm and radius, got NaN"):
        check_sandwich(a_table([[math.nan]], [0.1]))
    for tolerance in (-1e-9, math.nan, math.inf):
        with pytest.raises(ValueError, match="tolerance: expected a finite number of at least 0"):
            check_sandwich(a_table([[1.0]], [0.1]), tolerance=tolerance)


def test_a_counterexample_comes_back(tmp_path):
    image = torch.rand(3, 2, 2)
    path = tmp_path / "deep" / "one.safetensors"
    save_counterexample(path, Counterexample(image, 1 - image, 4, 77, 0.1, 0.05, "fmn"))
    found = load_counterexample(path)
    assert torch.equal(found.image, image)
    assert torch.equal(found.adversarial, 1 - image)
    assert (found.label, found.index, found.radius, found.norm, found.attack) == (4, 77, 0.1, 0.05, "fmn")


# curves


def test_a_curve_by_hand():
    rows = a_table(
        [[0.3, 0.6, math.inf, 0.0], [0.4, 0.5, 0.9, 0.0], [math.inf, 0.55, 0.3, 0.0]],
        [0.2, 0.5, 0.1, 0.0],
        [True, True, True, False],
        attacks=["ddn", "fmn", "random"],
    )
    curve = sandwich_curve(rows, [0.0, 0.2, 0.35, 0.5, 0.52, 2.0])
    assert list(curve.columns) == ["column", "at", "accuracy", "low", "high", "examples"]
    assert curve["column"].unique().tolist() == ["certified", "worst case", "fmn", "ddn", "clean"]
    found = {name: part["accuracy"].tolist() for name, part in curve.groupby("column")}
    assert found == {
        "certified": [0.75, 0.5, 0.25, 0.25, 0.0, 0.0],
        "worst case": [0.75, 0.75, 0.25, 0.25, 0.0, 0.0],
        "fmn": [0.75, 0.75, 0.75, 0.5, 0.25, 0.0],
        "ddn": [0.75, 0.75, 0.5, 0.5, 0.5, 0.25],
        "clean": [0.75] * 6,
    }
    row = curve.query("column == 'fmn' and at == 0.5").iloc[0]
    assert (row["low"], row["high"]) == binomial_interval(2, 4)
    assert (curve["examples"] == 4).all()
    check_chain(curve)


@given(st.data())
@settings(max_examples=12, deadline=None)
def test_the_chain_holds_wherever_no_certificate_is_broken(data):
    n = data.draw(st.integers(1, 6))
    radii = data.draw(st.lists(st.floats(0, 1), min_size=n, max_size=n))
    correct = data.draw(st.lists(st.booleans(), min_size=n, max_size=n))
    # down to the rounding that is allowed for, and up to infinity
    beyond = st.sampled_from([-0.99 * ROUNDING, 0.0, 1e-12, 0.1, math.inf])
    attacks = ("fmn", "ddn", "apgd", "pgd", "random")
    norms = [
        [max(0, r + data.draw(beyond)) if c else 0.0 for r, c in zip(radii, correct, strict=True)] for _ in attacks
    ]
    rows = a_table(norms, [r if c else 0.0 for r, c in zip(radii, correct, strict=True)], correct, attacks)
    between = {0.0, *radii, *(r - ROUNDING / 2 for r in radii if r > ROUNDING), 2.0}
    check_chain(sandwich_curve(rows, sorted(between)))


def test_batches_are_put_together_and_survive_the_disk(tmp_path):
    model, images, labels, radii = nearest()
    parts = [
        sandwich_rows(model, images[i], labels[i], radii[i], BUDGET, indices=i, attacks=["fmn", "random"])
        for i in torch.arange(len(images)).split(7)
    ]
    write_table(tmp_path / "rows.csv", pd.concat(parts))
    rows = read_table(tmp_path / "rows.csv")
    assert rows["norm"].max() == math.inf
    curve = sandwich_curve(rows, [0.0, 0.05, 0.1])
    check_chain(curve)
    write_table(tmp_path / "curve.csv", curve)
    check_chain(read_table(tmp_path / "curve.csv"))
    assert curve["column"].unique().tolist() == ["certified", "worst case", "fmn", "clean"]
    assert curve["accuracy"].iloc[0] == pytest.approx((len(images) - 2) / len(images))


def test_a_curve_is_not_drawn_over_a_broken_certificate():
    with pytest.raises(CertificateBroken, match=r"^fmn: expected no misclassified image nearer to example 0"):
        sandwich_curve(a_table([[0.1]], [0.2]), [0.0])


@pytest.mark.parametrize(
    ("column", "value", "message"),
    [
        ("certified", 0.9, r"^at radius 0.5: expected certified <= worst case, got 0.9 > 0.5"),
        ("worst case", 0.6, r"^at radius 0.5: expected worst case <= fmn, got 0.6 > 0.5"),
        ("fmn", 1.0, r"^at radius 0.5: expected fmn <= clean, got 1 > 0.75"),
        ("clean", 0.25, r"^at radius 0.5: expected worst case <= clean, got 0.5 > 0.25"),
    ],
)
def test_a_chain_out_of_order_is_refused(column, value, message):
    curve = sandwich_curve(a_table([[0.6, 0.7, 0.4, 0.0]], [0.1, 0.2, 0.3, 0.0], [True] * 3 + [False]), [0.05, 0.5])
    curve.loc[(curve["column"] == column) & (curve["at"] == 0.5), "accuracy"] = value
    with pytest.raises(CertificateBroken, match=message):
        check_chain(curve)


def test_a_chain_with_gaps_is_refused():
    curve = sandwich_curve(a_table([[0.6, 0.7]], [0.1, 0.2]), [0.05, 0.5])
    with pytest.raises(ValueError, match=r"curve: expected every column at every radius, got gaps in \['clean'\]"):
        check_chain(curve.query("column != 'clean'"))
    with pytest.raises(ValueError, match="curve: expected every column at every radius"):
        check_chain(curve.iloc[1:])


def test_rows_that_do_not_belong_together_are_refused():
    rows = a_table([[0.6, 0.7], [0.6, 0.7]], [0.1, 0.2], attacks=["fmn", "ddn"])
    with pytest.raises(ValueError, match="rows: expected each attack and index once"):
        sandwich_curve(pd.concat([rows, rows]), [0.1])
    with pytest.raises(ValueError, match="rows: expected each attack and index once, and at least one"):
        sandwich_curve(rows.iloc[:0], [0.1])
    with pytest.raises(ValueError, match="rows: expected every attack on the same examples"):
        sandwich_curve(rows.iloc[:3], [0.1])
    with pytest.raises(
        ValueError, match="rows: expected every attack on the same examples, with one label and one rad"
    ):
        sandwich_curve(rows.assign(radius=[0.1, 0.2, 0.1, 0.25]), [0.1])
    for radius in (-0.1, math.nan, math.inf, 0.1):
        with pytest.raises(ValueError, match="radii: expected different finite numbers of at least 0"):
            sandwich_curve(rows, [0.1, radius])


# what is refused


def test_wrong_arguments_are_refused(as_installed, tmp_path):
    model, images, labels, radii = nearest()
    on, indices = (model, images, labels), torch.arange(len(images))

    def call(radius=radii, budget=BUDGET, indices=indices, **options):
        sandwich_rows(*on, radius, budget, indices=indices, **options)

    with pytest.raises(ValueError, match="indices: expected one for each of 12 images, got shape"):
        call(indices=indices[1:])
    with pytest.raises(ValueError, match="radius: expected floating, one for each of 12 images"):
        call(radii[1:])
    with pytest.raises(ValueError, match="radius: expected finite values of at least 0, got -"):
        call(-radii)
    with pytest.raises(ValueError, match="steps: expected a positive number, got 0"):
        call(budget=SandwichBudget(steps=0))
    with pytest.raises(ValueError, match="points: expected a positive number, got 0"):
        call(budget=SandwichBudget(points=0), attacks=["random"])
    for attacks in ([], ["fmn", "fmn"], ["square"], "fmn"):
        with pytest.raises(ValueError, match="attacks: expected different ones of"):
            call(attacks=attacks)
    with pytest.raises(ValueError, match="attacks: expected apgd_eps in the budget"):
        call(attacks=["apgd"])
    with pytest.raises(ValueError, match="model: expected logits, got NaN"):
        sandwich_rows(lambda x: model(x) * math.nan, images, labels, radii, BUDGET, indices=indices)


@pytest.mark.parametrize(
    ("changes", "got"),
    [
        ({"image": torch.zeros(1, 3, 3)}, r"images of shapes \[\[1, 3, 3\], \[1, 2, 2\]\]"),
        ({"image": torch.full((1, 2, 2), math.nan)}, "pixels that are no finite numbers"),
        ({"image": torch.zeros(1, 2, 2, dtype=torch.int64)}, "images of shapes"),
        ({"label": torch.tensor(1.5)}, "label 1.5"),
        ({"label": torch.tensor(-3)}, "label -3"),
        ({"index": torch.tensor([1, 2])}, r"index \[1, 2\]"),
        ({"radius": torch.tensor(math.nan, dtype=torch.float64)}, "radius nan"),
        ({"norm": torch.tensor(-1.0, dtype=torch.float64)}, r"norm -1\.0"),
        ({"more": torch.zeros(1)}, r"tensors called \[adversarial, image, index, label and 3 more\]"),
        ({"attack": [1]}, r"attack \[1\]"),
        ({"attack": "../../x"}, r"attack '\.\./\.\./x'"),
    ],
)
def test_what_is_no_counterexample(tmp_path, changes, got):
    path, pixels = tmp_path / "c.safetensors", torch.zeros(1, 2, 2)
    # the two images may be one tensor
    save_counterexample(path, Counterexample(pixels, pixels, 3, 17, 0.25, 0.125, "ddn"))
    tensors, facts = read_tensors(path, "a counterexample")
    facts["attack"] = changes.pop("attack", "ddn")
    write_tensors(path, "a counterexample", tensors | changes, facts)
    with pytest.raises(ValueError, match=rf"c\.safetensors: expected a counterexample, got {got}"):
        load_counterexample(path)
