import itertools
import math

import numpy as np
import pytest
import sympy as sp
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from clustr_core.certificates.ladder import certified_radius
from clustr_core.models.classifiers import nearest_logits
from clustr_core.models.clusters import Clusters
from clustr_core.theory.examples import (
    hard_radius_soft_rule_example,
    loose_nearest_example,
    loose_pairwise_example,
    only_second_nearest_example,
    planar_example,
    random_configuration,
)
from clustr_core.theory.oracle import exact_nearest_rule_distance, ladder, least_distance, second_nearest_radius_unsound
from clustr_core.theory.pictures import (
    gain_by_dimension,
    logit_grid,
    planar_flips,
    planar_radii,
    predictions,
    random_ladders,
    second_nearest_line,
    soft_margin_along,
    stack_panels,
    unsound_share,
)
from clustr_core.theory.proof import ProofStep, broken_step, numeric_table, proof_steps, proof_table
from clustr_core.theory.search import (
    extremal_map,
    folding_to,
    geometric_directions,
    gradient_directions,
    isometry_to,
    logits_of,
    random_directions,
    search_table,
    smallest_flip,
    tightness_table,
)


@pytest.mark.parametrize("dim", [2, 3])
def test_every_step_of_the_proof_holds(dim):
    table = proof_table(proof_steps(dim))
    assert table["holds"].all()
    assert (table["residual"] == "0").all()
    assert table["step"].is_unique


def test_a_wrong_step_is_refused():
    assert not broken_step(2).holds
    for step in proof_steps(2):
        symbol = sorted(step.residual.free_symbols, key=str)[0]
        assert not ProofStep(step.name, step.statement, step.residual + symbol).holds


def test_steps_are_about_something():
    # a residual that was zero before any algebra would check nothing
    assert all(not step.residual.is_zero and step.residual.free_symbols for step in proof_steps(2))
    assert all(isinstance(step.residual, sp.Expr) for step in proof_steps(2))


def test_proof_needs_two_coordinates():
    with pytest.raises(ValueError, match="dim: expected at least 2, got 1"):
        proof_steps(1)


def test_numeric_steps():
    table = numeric_table(configurations=2000, dim=5, seed=0)
    assert (table.loc[table["kind"] == "identity", "worst_error"] < 1e-13).all()
    assert (table.loc[table["kind"] == "inequality", "worst_error"] < 1e-15).all()
    assert (table["configurations"] == 2000).all()


def by_enumeration(normals, gaps):
    """The shortest v with N v >= g, over all sets of active constraints."""
    if (gaps <= 0).all():
        return 0.0
    best = math.inf
    for size in range(1, len(gaps) + 1):
        for active in itertools.combinations(range(len(gaps)), size):
            rows = list(active)
            v = np.linalg.lstsq(normals[rows], gaps[rows], rcond=None)[0]
            if (normals @ v >= gaps - 1e-9).all():
                best = min(best, float(np.linalg.norm(v)))
    return best


@given(st.integers(0, 10**6), st.integers(1, 4), st.integers(1, 5), st.floats(1e-6, 1e6))
@settings(max_examples=60, deadline=None)
def test_least_distance_agrees_with_enumeration(seed, constraints, dim, scale):
    rng = np.random.default_rng(seed)
    normals, point = rng.normal(size=(constraints, dim)), rng.normal(size=dim)
    # feasible by construction: some point meets every constraint
    gaps = normals @ point - rng.exponential(size=constraints)
    step = least_distance(normals, gaps * scale)
    assert (normals @ step >= gaps * scale - 1e-8 * scale).all()
    assert np.linalg.norm(step) == pytest.approx(scale * by_enumeration(normals, gaps), rel=1e-7, abs=1e-8 * scale)


def test_least_distance_refuses_a_contradiction():
    with pytest.raises(ValueError, match="constraints that some v meets"):
        least_distance(np.array([[1.0], [-1.0]]), np.array([1.0, 1.0]))
    assert least_distance(np.array([[1.0, 0.0]]), np.array([0.0])).tolist() == [0.0, 0.0]


@given(st.integers(0, 10**6), st.integers(1, 3))
@settings(max_examples=25, deadline=None)
def test_the_oracle_looks_at_every_rival(seed, per_class):
    """Against the same program solved by enumeration for all rivals, without pruning."""
    drawn = random_configuration(classes=3, per_class=per_class, dim=3, points=3, seed=seed)
    mu, labels = drawn.clusters.centroids.numpy(), drawn.clusters.labels.numpy()
    found, targets = exact_nearest_rule_distance(drawn.embeddings, drawn.clusters)
    for z, distance, target in zip(drawn.embeddings.numpy(), found.tolist(), targets.numpy(), strict=True):
        d2 = ((z - mu) ** 2).sum(axis=1)
        own = labels == labels[d2.argmin()]
        each = [by_enumeration(mu[j] - mu[own], (d2[j] - d2[own]) / 2) for j in np.flatnonzero(~own)]
        assert distance == pytest.approx(min(each), rel=1e-7, abs=1e-9)
        assert np.linalg.norm(target - z) == pytest.approx(distance)
        at_target = ((target - mu) ** 2).sum(axis=1)
        assert at_target[~own].min() == pytest.approx(at_target[own].min(), abs=1e-8)


def test_ce1_only_the_second_nearest():
    line = second_nearest_line().iloc[0]
    assert line[["claimed", "certified", "flip"]].to_numpy(dtype=float) == pytest.approx([1.25, 0.3, 0.3])


def test_the_unsound_formula_is_the_theorem_where_there_is_one_rival():
    drawn = random_configuration(classes=2, per_class=1, dim=3, points=30, seed=0)
    unsound = second_nearest_radius_unsound(drawn.embeddings, drawn.clusters)
    torch.testing.assert_close(unsound, certified_radius(drawn.embeddings, drawn.clusters, bound="nearest"))


@pytest.mark.parametrize(("gap", "offset"), [(2.0, 0.01), (0.02, 0.01), (1.0, 0.3)])
def test_ce2_nearest_is_loose(gap, offset):
    example = loose_nearest_example(gap, offset)
    row = ladder(example.embeddings, example.clusters).iloc[0]
    assert row["nearest"] == pytest.approx(gap / 2 + offset)
    assert row["pairwise"] == pytest.approx(gap / 2 + 1 + offset)
    assert row["exact"] == pytest.approx(row["pairwise"])


@pytest.mark.parametrize("depth", [0.02, 0.3, 1.0, 3.0])
def test_ce3_pairwise_is_loose(depth):
    example = loose_pairwise_example(depth)
    row = ladder(example.embeddings, example.clusters).iloc[0]
    assert row["exact"] / row["pairwise"] == pytest.approx(math.sqrt(1 + depth**2) / depth)
    assert row["exact"] == pytest.approx(40 - (1 + depth**2) / (2 * depth))


def test_ce4_a_hard_radius_on_the_soft_rule():
    table = soft_margin_along(hard_radius_soft_rule_example(), reach=1.0, points=11)
    row = table.iloc[0]
    flip = (math.log(2) - 0.105) / 2.1
    assert row["flip"] == pytest.approx(0.4 - flip, abs=1e-9)
    assert row["soft_rule_radius"] == pytest.approx(row["flip"], abs=1e-9)
    assert row["soft_rule_radius"] <= row["flip"] < row["nearest_rule_radius"]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: loose_nearest_example(0.0), "gap: expected a positive number, got 0"),
        (lambda: loose_nearest_example(1.0, -1.0), "offset: expected a positive number"),
        (lambda: loose_pairwise_example(-1.0), "depth: expected a positive number"),
        (lambda: loose_pairwise_example(1.0, 0.5), "height: expected more than 1, got 0.5"),
        (
            lambda: random_configuration(classes=1, per_class=1, dim=1, points=1, seed=0),
            "classes: expected at least 2",
        ),
        (
            lambda: random_configuration(classes=2, per_class=0, dim=1, points=1, seed=0),
            "per_class: expected at least 1",
        ),
        (
            lambda: extremal_map(*[torch.zeros(2).double()] * 3, lipschitz=1.0, seed=0),
            "target: expected a point other",
        ),
    ],
)
def test_bad_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def maps(seed=0, lipschitz=3.0):
    g = torch.Generator().manual_seed(seed)
    z, p = torch.randn(2, 4, generator=g, dtype=torch.float64)
    start = torch.randn(9, generator=g, dtype=torch.float64)
    options = {"lipschitz": lipschitz, "seed": seed}
    return (
        z,
        p,
        start,
        {
            "isometry": isometry_to(z, start, **options),
            "folding": folding_to(z, start, **options),
            "extremal": extremal_map(z, p, start, **options),
        },
    )


@pytest.mark.parametrize("name", ["isometry", "folding", "extremal"])
def test_maps_have_the_constant_they_claim(name):
    z, _, start, found = maps()
    encode = found[name]
    torch.testing.assert_close(encode(start[None])[0], z)
    a, b = torch.randn(2, 3000, 9, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    b = a + 0.1 * b
    gain = (encode(a) - encode(b)).norm(dim=1) / (a - b).norm(dim=1)
    assert gain.max() <= 3 * (1 + 1e-12)
    jacobian = torch.func.jacrev(lambda x: encode(x[None])[0])(start)
    assert float(torch.linalg.matrix_norm(jacobian, ord=2)) == pytest.approx(3)


def test_folding_is_not_linear():
    _, _, start, found = maps()
    fold = found["folding"]
    step = random_directions(9, 50, seed=0) * 5
    bend = fold(start + step) + fold(start - step) - 2 * fold(start[None])
    assert (bend.norm(dim=1) > 1e-3).any()


def test_extremal_map_arrives():
    z, p, start, found = maps()
    encode = found["extremal"]
    arrival = start + encode.direction * (p - z).norm() / 3
    torch.testing.assert_close(encode(arrival[None])[0], p)


def test_smallest_flip_finds_a_known_distance():
    """Two centroids: the border is a hyperplane, and the way there is known."""
    clusters = Clusters(torch.tensor([[0.0, 0.0], [4.0, 0.0]]).double(), torch.tensor([0, 1]), torch.ones(2).double())
    start = torch.tensor([0.5, 1.0], dtype=torch.float64)
    rays = torch.tensor([[1.0, 0.0], [0.6, 0.8], [0.0, 1.0], [-1.0, 0.0]], dtype=torch.float64)

    def logits(x):
        return nearest_logits(x, clusters)

    assert smallest_flip(logits, start, rays, reach=10.0) == pytest.approx(1.5, abs=1e-12)
    assert smallest_flip(logits, start, rays[1:], reach=10.0) == pytest.approx(2.5, abs=1e-12)
    assert smallest_flip(logits, start, rays[2:], reach=10.0) == math.inf
    found = smallest_flip(logits, start, rays, reach=10.0)
    assert logits((start + found * rays[0])[None]).argmax() == 1


def test_smallest_flip_finds_the_first_change_of_many_rays():
    """Another class only between two lengths, along one ray of a thousand: it is neither missed nor overrun."""
    start = torch.zeros(2, dtype=torch.float64)
    angles = torch.linspace(0, 3, 1000, dtype=torch.float64)
    rays = torch.stack([angles.cos(), angles.sin()], dim=1)

    def logits(x):
        length, along = x.norm(dim=1), x @ rays[777]
        slab = (along > length * (1 - 1e-9)) & (length > 2.3) & (length < 2.7)
        return torch.stack([torch.zeros_like(length), torch.where(slab | (length > 8), 1.0, -1.0)], dim=1)

    assert smallest_flip(logits, start, rays, reach=10.0) == pytest.approx(2.3, abs=1e-12)
    assert smallest_flip(logits, start, rays[:700], reach=10.0) == pytest.approx(8, abs=1e-12)
    assert smallest_flip(logits, start, rays[:0], reach=10.0) == math.inf


def test_gradient_directions_find_a_hyperplane():
    clusters = Clusters(torch.tensor([[0.0, 0.0], [4.0, 0.0]]).double(), torch.tensor([0, 1]), torch.ones(2).double())
    start = torch.tensor([0.5, 1.0], dtype=torch.float64)

    def logits(x):
        return nearest_logits(x, clusters)

    rays = gradient_directions(logits, start, restarts=1, steps=1, scale=1e-9, seed=0)
    torch.testing.assert_close(rays, torch.tensor([[1.0, 0.0]], dtype=torch.float64), atol=1e-6, rtol=0)


def test_search_never_beats_a_radius_and_reaches_it():
    table = search_table(configurations=4, per_class=(1, 3), seed=5, directions=60)
    certified = table.dropna(subset=["ratio"])
    assert len(certified) > 100
    assert (certified["ratio"] >= 1).all()
    exact = certified.query("rule == 'nearest' and per_class == 1 and bound == 'nearest' and map != 'folding'")
    assert len(exact) == 8
    assert (exact["ratio"] < 1 + 1e-9).all()
    # the search must be able to succeed: radii a thousandth larger would have been beaten
    assert (certified["ratio"] < 1.001).any()


def test_search_catches_an_unsound_radius():
    """CE1 through an isometry: the flip lies inside the unsound claim."""
    example = only_second_nearest_example()
    start = torch.zeros(5, dtype=torch.float64)
    encode = isometry_to(example.embeddings[0], start, lipschitz=2.0, seed=0)
    logits = logits_of(encode, example.clusters, rule="nearest")
    rays = geometric_directions(encode, start, example.clusters)
    flip = smallest_flip(logits, start, rays, reach=5.0)
    assert flip == pytest.approx(0.15)
    assert flip < float(second_nearest_radius_unsound(example.embeddings, example.clusters)) / 2


def test_tightness_on_the_extremal_map():
    table = tightness_table(configurations=5, per_class=(1, 2), lipschitz=(0.5, 30.0), seed=0)
    assert ((table["flip"] / table["exact"] - 1).abs() < 1e-6).all()
    one = table[table["per_class"] == 1]
    assert (one["flip"] / one["nearest"] - 1).between(0, 1e-6).all()
    assert (table["flip"] >= table["pairwise"]).all()


def test_planar_flips_agree_with_the_oracle():
    example = planar_example()
    radii = planar_radii(example)
    flips = planar_flips(example, directions=360, reach=8.0)
    assert (flips >= radii["pairwise"]).all()
    assert (flips - radii["exact"]).between(-1e-9, 5e-3).all()
    assert (radii["pairwise"] > 1.3 * radii["nearest"]).sum() >= 2


def test_unsound_share_is_measured_against_the_theorem():
    table = unsound_share(classes=(2, 10), dims=(4,), configurations=5, points=30, seed=0)
    two, ten = table.itertuples(index=False)
    assert two.unsound == 0
    assert two.overclaim == 1
    assert ten.unsound > 0.05
    assert ten.overclaim > 1


def test_tables_have_what_the_figures_need():
    grid = logit_grid(planar_example().clusters, low=-1.0, high=1.0, resolution=5)
    assert list(grid) == ["x", "y", *(f"{rule}_{c}" for rule in ("nearest", "soft") for c in range(3))]
    assert len(grid) == 25
    assert predictions(grid, "soft").shape == (25,)
    stacked = stack_panels(a=grid[:2], b=grid[:3].rename(columns={"x": "t"}))
    assert list(stacked["panel"]) == ["a"] * 2 + ["b"] * 3
    ladders = random_ladders(per_class=(1, 2), dims=(2,), configurations=2, points=20, seed=0)
    gain = gain_by_dimension(ladders)
    assert gain["per_class"].tolist() == [1, 2]
    assert gain["share"].tolist()[0] == 0
    assert gain["largest"].tolist()[0] == pytest.approx(1)
    assert gain["points"].tolist() == [40, 40]
