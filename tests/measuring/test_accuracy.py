"""Accuracies from rows: hand-made tables whose answers can be read off."""

import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import beta

from clustr_core.measuring.accuracy import (
    best_bound,
    binomial_interval,
    both_protocols,
    broken_certificates,
    certified_accuracy,
    on_common_images,
    robust_accuracy,
    robust_accuracy_by_loss,
    summary_table,
)


@given(st.integers(1, 2000).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))), st.floats(0.5, 0.999))
@settings(max_examples=60, deadline=None)
def test_intervals_are_clopper_and_pearsons(counts, confidence):
    k, n = counts
    tail = (1 - confidence) / 2
    low = beta.ppf(tail, k, n - k + 1) if k else 0.0
    high = beta.ppf(1 - tail, k + 1, n - k) if k < n else 1.0
    found = binomial_interval(k, n, confidence=confidence)
    assert found == (pytest.approx(low, abs=1e-9), pytest.approx(high, abs=1e-9))
    assert found[0] <= k / n <= found[1]


def test_no_trial_has_no_interval():
    with pytest.raises(ValueError, match="trials: expected at least one, got 0"):
        binomial_interval(0, 0)


def attacks(**losses):
    """Four images, the last misclassified when clean; for each loss and eps, which images stay robust."""
    rows = [
        {"norm": "linf", "eps": eps, "loss": loss, "index": i, "correct": i != 3, "robust": i in robust}
        for loss, by_eps in losses.items()
        for eps, robust in by_eps.items()
        for i in range(4)
    ]
    return pd.DataFrame(rows)


TABLE = attacks(ce={0.1: {0, 1, 2}, 0.2: {0, 1}}, margin={0.1: {0, 2}, 0.2: {2}})


def test_the_worst_loss_of_each_example_counts():
    found = robust_accuracy(TABLE)
    assert list(found) == ["norm", "eps", "robust_accuracy", "low", "high", "examples"]
    assert found["eps"].tolist() == [0.0, 0.1, 0.2]
    # at 0.2 no image survives both losses, though each loss leaves some
    assert found["robust_accuracy"].tolist() == [0.75, 0.5, 0.0]
    assert found["examples"].tolist() == [4, 4, 4]
    for row, successes in zip(found.itertuples(), (3, 2, 0), strict=True):
        assert (row.low, row.high) == binomial_interval(successes, 4)


def test_an_image_that_a_table_has_twice_counts_once_at_its_worst():
    """As that of two attacks of one kind: no interval is narrower for it."""
    broken = TABLE.assign(robust=False)
    for accuracy in (robust_accuracy, robust_accuracy_by_loss):
        once, twice = accuracy(broken), accuracy(pd.concat([TABLE, broken], ignore_index=True))
        rows = once["eps"] > 0
        pd.testing.assert_frame_equal(once[rows], twice[rows])


def test_losses_on_their_own():
    found = robust_accuracy_by_loss(TABLE).set_index(["loss", "eps"])["robust_accuracy"]
    attacked = {("ce", 0.1): 0.75, ("ce", 0.2): 0.5, ("margin", 0.1): 0.5, ("margin", 0.2): 0.25}
    assert found.to_dict() == attacked | {("ce", 0.0): 0.75, ("margin", 0.0): 0.75}


def test_methods_and_norms_are_kept_apart_and_rows_may_come_in_any_order():
    l2 = attacks(ce={0.5: {1}}).assign(norm="l2", method="ce")
    other = attacks(ce={0.1: set(), 0.2: set()}).assign(method="clustr", correct=False)
    table = pd.concat([TABLE.assign(method="ce"), l2, other]).sample(frac=1, random_state=0)
    before = table.copy()
    found = robust_accuracy(table).set_index(["method", "norm", "eps"])["robust_accuracy"]
    assert found.to_dict() == {
        ("ce", "l2", 0.0): 0.75, ("ce", "l2", 0.5): 0.25,
        ("ce", "linf", 0.0): 0.75, ("ce", "linf", 0.1): 0.5, ("ce", "linf", 0.2): 0.0,
        ("clustr", "linf", 0.0): 0.0, ("clustr", "linf", 0.1): 0.0, ("clustr", "linf", 0.2): 0.0,
    }  # fmt: skip
    pd.testing.assert_frame_equal(table, before)


def test_certified_means_correct_and_certified():
    table = pd.DataFrame(
        {
            "bound": ["nearest"] * 4 + ["pairwise"] * 4,
            "correct": [True, True, False, True] * 2,
            "radius": [0.0, 0.5, 9.0, 1.0, 0.25, 0.75, 9.0, 1.0],
            "feature_radius": [0.0, 5.0, 90.0, 10.0] * 2,
        }
    )
    found = certified_accuracy(table, [0.0, 0.5, 0.6]).set_index(["bound", "at"])["certified_accuracy"]
    assert found.to_dict() == {
        ("nearest", 0.0): 0.75, ("nearest", 0.5): 0.5, ("nearest", 0.6): 0.25,
        ("pairwise", 0.0): 0.75, ("pairwise", 0.5): 0.5, ("pairwise", 0.6): 0.5,
    }  # fmt: skip
    feature = certified_accuracy(table, [5.0], column="feature_radius")
    assert feature["certified_accuracy"].tolist() == [0.5, 0.5]


def study(**attacks_by_eps):
    """Rows of named attacks on images 0..5, image 5 misclassified when clean: (attack, loss) -> which stay robust."""
    rows = [
        {
            "method": "m", "attack": attack, "norm": "linf", "eps": eps, "loss": loss, "index": i, "correct": i != 5,
            "robust": i in robust,
        }
        for eps, attacks_made in attacks_by_eps.items()
        for (attack, loss), (seen, robust) in attacks_made.items()
        for i in seen
    ]  # fmt: skip
    table = pd.DataFrame(rows)
    return table.assign(eps=table["eps"].str.removeprefix("e").astype(float) / 10)


STUDY = study(
    e1={
        ("pgd", "ce"): (range(6), {0, 1, 2, 3}),
        ("pgd", "margin"): (range(6), {0, 1, 2, 4}),
        ("autoattack", "standard"): (range(3, 6), {3, 4}),
        ("paper", "ce"): (range(1, 6), {1, 2, 3, 4}),
    },
    e2={("pgd", "ce"): (range(6), {0}), ("paper", "ce"): (range(1, 6), {1, 2})},
    e3={("pgd", "ce"): (range(6), set())},
)


def test_common_images_are_those_that_every_attack_of_an_eps_has_seen():
    found = on_common_images(STUDY).groupby("eps")["index"].agg(lambda s: sorted(set(s)))
    assert found.to_dict() == {0.1: [3, 4, 5], 0.2: [1, 2, 3, 4, 5], 0.3: [0, 1, 2, 3, 4, 5]}
    # a row of each attack on each
    assert on_common_images(STUDY).query("eps == 0.1").groupby("index").size().tolist() == [4, 4, 4]


def test_the_worst_case_over_attacks_is_taken_on_common_images():
    found = robust_accuracy(STUDY[STUDY["attack"] != "paper"]).set_index("eps")
    # images 3, 4, 5: PGD with margin breaks 3, with cross-entropy 4, and 5 is wrong when clean
    assert found.loc[0.1, "robust_accuracy"] == 0
    assert found["examples"].to_dict() == {0.0: 6, 0.1: 3, 0.2: 6, 0.3: 6}


def test_both_protocols_stand_on_the_same_images_at_each_eps_that_they_share():
    found = both_protocols(STUDY).set_index(["protocol", "eps"])
    assert sorted(found.index) == [(p, e) for p in ("correct", "paper") for e in (0.0, 0.1, 0.2)]
    assert found["robust_accuracy"].round(6).to_dict() == {
        ("paper", 0.0): 0.8,
        ("paper", 0.1): round(2 / 3, 6),
        ("paper", 0.2): 0.4,
        ("correct", 0.0): 0.8,
        ("correct", 0.1): 0.0,
        ("correct", 0.2): 0.0,
    }
    assert found["examples"].tolist() == [5, 3, 5, 5, 3, 5]


@pytest.mark.parametrize("attack", ["paper", "pgd"])
def test_one_protocol_alone_is_refused(attack):
    with pytest.raises(ValueError, match="table: expected the attack 'paper' and another one at one eps at least"):
        both_protocols(STUDY[STUDY["attack"] == attack])


def radii(method, bound="pairwise", **of_images):
    rows = [
        {"method": method, "bound": bound, "index": int(image[1:]), "correct": image != "i5", "radius": radius}
        for image, radius in of_images.items()
    ]
    return pd.DataFrame([*rows, {**rows[0], "bound": "triangle", "radius": 9.0}])


def test_the_four_columns_stand_on_one_set_of_images():
    """At 0.1 the common images are 3, 4 and 5; 0 to 2 count in no column, however large their radius.

    An L-infinity ball of 0.1 in four pixels reaches 0.2 in L2: image 4's certificate falls short of it.
    """
    certificates = radii("clustr", i0=1.0, i3=0.201, i4=0.199, i5=1.0)
    found = summary_table(STUDY.assign(method="clustr"), certificates, eps=0.1, pixels=4).set_index("column")
    assert found["accuracy"].round(6).to_dict() == {
        "clean": 0.666667, "paper": 0.666667, "correct": 0.0, "certified": 0.333333,
    }  # fmt: skip
    assert set(found["examples"]) == {3}
    assert set(found["method"]) == {"clustr"}
    assert found["accuracy"].between(found["low"], found["high"]).all()


def in_l2(table):
    return table[table["attack"] != "paper"].assign(norm="l2")


@pytest.mark.parametrize(
    ("pixels", "norm", "certified"),
    [(1, "linf", 2), (4, "linf", 1), (9, "linf", 0), (1, "l2", 2), (4, "l2", 2), (9, "l2", 2)],
)
def test_a_certificate_is_of_an_l2_ball(pixels, norm, certified):
    """Radii of 0.25 and 0.15 at eps 0.1: in L-infinity they are asked for 0.1, 0.2 and 0.3."""
    table = (in_l2(STUDY) if norm == "l2" else STUDY).assign(method="clustr")
    certificates = radii("clustr", i3=0.25, i4=0.15, i5=1.0)
    found = summary_table(table, certificates, eps=0.1, pixels=pixels, norm=norm).set_index("column")["accuracy"]
    assert found["certified"] == pytest.approx(certified / 3)


def test_l2_has_no_paper_protocol():
    """Rows of the other norm count for nothing: in L2 images 3, 4 and 5 are common, and only image 3 falls."""
    l2 = in_l2(STUDY.query("loss != 'margin'"))
    both = pd.concat([STUDY, l2]).assign(method="clustr")
    certificates = radii("clustr", i3=0.1, i4=0.3, i5=1.0)
    found = summary_table(both, certificates, eps=0.1, pixels=4, norm="l2").set_index("column")
    assert found["accuracy"].round(6).to_dict() == {"clean": 0.666667, "correct": 0.333333, "certified": 0.666667}
    assert found["examples"].tolist() == [3, 3, 3]
    linf = summary_table(both, certificates, eps=0.1, pixels=4).set_index("column")["accuracy"]
    assert linf.round(6).to_dict() == {"clean": 0.666667, "paper": 0.666667, "correct": 0.0, "certified": 0.333333}


def test_only_the_best_bound_is_what_is_certified():
    attacked = pd.concat([STUDY.assign(method=name) for name in ("clustr-cert", "lip-linear")])
    weak = radii("clustr-cert", i3=0.1, i4=0.1, i5=0.1)
    strong = radii("clustr-cert", bound="exact", i3=0.3, i4=0.1, i5=0.3)
    linear = radii("lip-linear", bound="margin", i3=0.3, i4=0.3, i5=0.3)
    found = summary_table(attacked, pd.concat([strong, weak, linear]), eps=0.1, pixels=4)
    certified = found.query("column == 'certified'").set_index("method")["accuracy"]
    assert certified.to_dict() == pytest.approx({"clustr-cert": 1 / 3, "lip-linear": 2 / 3})


def test_a_certificate_of_fitted_clusters_is_not_one_of_the_network_without_them():
    attacked = pd.concat([STUDY.assign(method=name) for name in ("ce", "ce-clusters", "pgd-at")])
    certificates = pd.concat([radii(name, i3=0.2, i4=0.2, i5=0.2) for name in ("ce", "pgd-at")])
    found = summary_table(attacked, certificates, eps=0.1, pixels=4)
    assert found.query("column == 'certified'")["method"].tolist() == ["ce-clusters"]
    assert found.groupby("method").size().to_dict() == {"ce": 3, "ce-clusters": 4, "pgd-at": 3}


def test_a_method_with_a_guarantee_or_with_clusters_keeps_its_name():
    kept = ("clustr", "clustr-qtrades", "free-clustr", "clustr-lip", "clustr-cert", "lip-linear", "smoothing")
    attacked = pd.concat([STUDY.assign(method=name) for name in kept])
    certificates = pd.concat([radii(name, bound="margin", i3=0.2, i4=0.2, i5=0.2) for name in (*kept, "prototypes")])
    found = summary_table(attacked, certificates, eps=0.1, pixels=4)
    # prototypes were never attacked
    assert set(found.query("column == 'certified'")["method"]) == set(kept)
    assert (found.groupby("method").size() == 4).all()


def test_four_columns_at_an_eps_without_both_protocols_are_refused():
    with pytest.raises(ValueError, match="expected the attack 'paper' and another one"):
        summary_table(STUDY.assign(method="clustr"), radii("clustr", i3=0.2), eps=0.3, pixels=4)


def test_the_best_bound_of_each_method():
    bounds = {
        "a": ("triangle", "nearest", "pairwise"),
        "b": ("exact", "triangle"),
        "c": ("margin",),
        "d": ("smoothing",),
    }
    table = pd.concat([radii(m, bound=b, i1=1.0, i2=2.0).iloc[:-1] for m, each in bounds.items() for b in each])
    table = table.sample(frac=1, random_state=0, ignore_index=True)
    before = table.copy()
    found = best_bound(table)
    assert found.groupby("method")["bound"].unique().str.join(" ").to_dict() == {
        "a": "pairwise", "b": "exact", "c": "margin", "d": "smoothing",
    }  # fmt: skip
    assert found.groupby("method")["index"].apply(sorted).tolist() == [[1, 2]] * 4
    pd.testing.assert_frame_equal(found, table.loc[found.index])
    pd.testing.assert_frame_equal(table, before)


def test_a_broken_certificate_is_an_attack_that_succeeds_inside_its_ball():
    """Image 2 falls at 0.2 and image 3 at 0.1; image 5 is wrong when clean, and breaks nothing."""
    attacked = study(
        e1={("pgd", "ce"): (range(6), {0, 1, 2, 4}), ("cell-walk", "cells"): (range(6), {0, 1, 2, 3, 4})},
        e2={("pgd", "ce"): (range(6), {0, 1})},
    ).assign(method="m", label=7)
    attacked["adversarial_prediction"] = attacked["robust"].map({True: 7, False: 3})
    held = radii("m", i2=0.39, i3=0.19, i4=0.39, i5=9.0)
    assert broken_certificates(attacked, held, pixels=4).empty
    for image, radius, eps in (("i2", 0.4, 0.2), ("i3", 0.2, 0.1), ("i4", 0.5, 0.2)):
        broken = broken_certificates(attacked, radii("m", **{image: radius}), pixels=4)
        assert broken[["method", "attack", "index", "eps"]].to_numpy().tolist() == [["m", "pgd", int(image[1:]), eps]]
    # in L2 the ball itself counts, whatever the pixels
    l2 = attacked.assign(norm="l2")
    assert broken_certificates(l2, radii("m", i2=0.199, i3=0.099, i4=0.199), pixels=4).empty
    assert len(broken_certificates(l2, radii("m", i2=0.2, i3=0.1, i4=0.2), pixels=4)) == 3
    # another method's certificate, a weaker bound of the same one
    assert broken_certificates(attacked, radii("other", i3=9.0), pixels=4).empty
    assert broken_certificates(attacked, radii("m", i3=0.1), pixels=4).empty
    # what counts is where the image ended up, and not what the attack calls a success: the paper's rule is another
    said = attacked.assign(robust=False, adversarial_prediction=7)
    assert broken_certificates(said, radii("m", i3=9.0), pixels=4).empty
    unsaid = attacked.assign(robust=True)
    assert len(broken_certificates(unsaid, radii("m", i3=0.2), pixels=4)) == 1
