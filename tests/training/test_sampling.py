"""Batches of clusters: what one holds, which clusters become seeds, and that nothing is left to chance."""

import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare

from clustr_core.models.clusters import Clusters, fit_clusters
from clustr_core.training.losses import magnet_loss
from clustr_core.training.sampling import ClusterBatches, ShuffledBatches


def clusters_on_a_line(positions, labels):
    """One-dimensional centroids: which are nearest can be read off."""
    centroids = torch.tensor(positions, dtype=torch.float64)[:, None]
    return Clusters(centroids, torch.tensor(labels), torch.ones(len(labels), dtype=torch.float64))


def sampler(sizes=(30, 30, 30, 30), labels=(0, 0, 1, 1), positions=None, **options):
    """A sampler over clusters of the given sizes; examples are numbered in shuffled order."""
    assignments = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    assignments = assignments[torch.randperm(len(assignments), generator=torch.Generator().manual_seed(0))]
    clusters = clusters_on_a_line(positions or [float(i) for i in range(len(sizes))], list(labels))
    options = {"clusters_per_batch": 3, "per_cluster": 5} | options
    return ClusterBatches(clusters, assignments, **options), assignments


def all_at(batches, assignments, means):
    """Note for each example the loss that its cluster is to have."""
    batches.update(torch.arange(len(assignments)), torch.tensor(means, dtype=torch.float64)[assignments])


def cluster_order(batch):
    """The clusters of a batch, in the order of their first example."""
    return list(dict.fromkeys(batch.assignments.tolist()))


@pytest.mark.parametrize(("count", "expected"), [(1, 1), (15, 1), (16, 2), (120, 8)])
def test_an_epoch_is_as_many_batches_as_hold_every_example_once(count, expected):
    clusters = clusters_on_a_line([0.0, 1.0], [0, 1])
    assignments = torch.arange(count) % 2
    batches = ClusterBatches(clusters, assignments, clusters_per_batch=3, per_cluster=5)
    assert len(batches) == len(list(batches)) == expected


def test_a_batch_is_a_seed_and_its_nearest_rivals_with_their_own_examples():
    positions = [0.0, 1.0, 10.0, 2.5, 30.0, 4.0]
    labels = [0, 0, 0, 1, 1, 2]
    batches, assignments = sampler([30] * 6, labels, positions, per_cluster=7)
    for batch in [batches.draw() for _ in range(60)]:
        assert torch.equal(assignments[batch.indices], batch.assignments)
        seed, *rivals = cluster_order(batch)
        others = [c for c in range(6) if labels[c] != labels[seed]]
        assert rivals == sorted(others, key=lambda c: abs(positions[c] - positions[seed]))[:2]
        assert torch.bincount(batch.assignments, minlength=6).tolist() == [7 * (c in (seed, *rivals)) for c in range(6)]
        assert len(batch.indices.unique()) == len(batch.indices)


def test_members_are_drawn_evenly():
    batches, _ = sampler(sizes=(12, 12), labels=(0, 1), clusters_per_batch=2, per_cluster=4)
    counts = torch.zeros(24)
    for _ in range(600):
        counts[batches.draw().indices] += 1
    assert chisquare(counts).pvalue > 1e-3


def test_a_small_cluster_gives_all_it_has():
    batches, assignments = sampler(sizes=(2, 30, 3), labels=(0, 1, 1), per_cluster=5)
    seen = set()
    for batch in [batches.draw() for _ in range(40)]:
        counts = torch.bincount(batch.assignments, minlength=3).tolist()
        seen.add(tuple(counts))
        for cluster, count in enumerate(counts):
            assert count in (0, min(5, int((assignments == cluster).sum())))
    assert (2, 5, 3) in seen


def test_fewer_rivals_than_asked_for_give_short_batches():
    batches, _ = sampler(sizes=(30, 30), labels=(0, 1), clusters_per_batch=12, per_cluster=4)
    assert {len(batches.draw().indices) for _ in range(10)} == {8}


def test_classes_with_unequal_numbers_of_clusters():
    batches, _ = sampler([5, 5, 5, 5], [0, 1, 1, 1], clusters_per_batch=4)
    found = {tuple(cluster_order(batches.draw())) for _ in range(50)}
    assert found == {(0, 1, 2, 3), (1, 0), (2, 0), (3, 0)}


def test_seeds_are_uniform_before_there_are_losses_and_where_all_are_zero():
    batches, assignments = sampler()
    assert batches.seed_probabilities().tolist() == [0.25] * 4
    all_at(batches, assignments, [0.0] * 4)
    assert batches.seed_probabilities().tolist() == [0.25] * 4


def test_losses_that_fall_to_zero_leave_uniform_seeds():
    batches, assignments = sampler()
    for means in ([0.1, 0.7, 1e-3, 3.3], [0.3, 0.1, 0.7, 12.9], [0.0] * 4):
        all_at(batches, assignments, means)
    assert batches.seed_probabilities().tolist() == [0.25] * 4


def test_seeds_are_drawn_in_proportion_to_the_mean_loss():
    batches, assignments = sampler(sizes=(10, 40, 20, 30), per_cluster=2)
    means = [1.0, 2.0, 3.0, 4.0]
    all_at(batches, assignments, means)
    torch.testing.assert_close(batches.seed_probabilities(), torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64))
    seeds = [int(batches.draw().assignments[0]) for _ in range(4000)]
    assert chisquare(np.bincount(seeds, minlength=4), 4000 * np.array(means) / 10).pvalue > 1e-3


def test_a_cluster_with_zero_loss_among_others_is_no_seed():
    batches, assignments = sampler()
    all_at(batches, assignments, [1.0, 0.0, 1.0, 0.0])
    assert {int(batches.draw().assignments[0]) for _ in range(200)} == {0, 2}


@given(st.sets(st.integers(0, 119), max_size=60), st.floats(0, 1e6), st.integers(0, 1000))
@settings(max_examples=50, deadline=None)
def test_an_unvisited_cluster_never_has_probability_zero(visited, top, seed):
    batches, assignments = sampler()
    where = torch.tensor(sorted(visited), dtype=torch.int64)
    losses = top * torch.rand(len(where), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    batches.update(where, losses)
    probabilities = batches.seed_probabilities()
    assert probabilities.sum() == pytest.approx(1)
    unvisited = sorted(set(range(4)) - set(assignments[where].tolist()))
    assert all(probabilities[c] == probabilities.max() > 0 for c in unvisited)


@given(st.lists(st.tuples(st.sets(st.integers(0, 119), min_size=1, max_size=30), st.integers(0, 10**6)), max_size=8))
@settings(max_examples=50, deadline=None)
def test_repeated_visits_count_the_latest_loss_of_each_example(visits):
    batches, assignments = sampler()
    latest = {}
    for where, seed in visits:
        losses = 20 * torch.rand(len(where), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        latest |= dict(zip(sorted(where), losses.tolist(), strict=True))
        batches.update(torch.tensor(sorted(where)), losses)
    own = [[loss for i, loss in latest.items() if int(assignments[i]) == c] for c in range(4)]
    means = [math.fsum(losses) / len(losses) if losses else None for losses in own]
    worst = max((mean for mean in means if mean is not None), default=1.0)
    weights = [worst if mean is None else mean for mean in means]
    expected = [weight / math.fsum(weights) for weight in weights]
    assert batches.seed_probabilities().tolist() == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("bad", [-1e-9, math.nan, math.inf])
def test_losses_that_are_negative_or_not_finite_are_refused_and_change_nothing(bad):
    batches, assignments = sampler()
    all_at(batches, assignments, [1.0, 2.0, 3.0, 4.0])
    before = batches.seed_probabilities()
    with pytest.raises(ValueError, match="losses: expected finite values >= 0"):
        batches.update(torch.tensor([0, 1]), torch.tensor([5.0, bad]))
    assert torch.equal(batches.seed_probabilities(), before)


def test_losses_may_carry_a_graph_and_be_float32():
    batches, assignments = sampler()
    batches.update(torch.arange(120), (assignments + 1.0).float().requires_grad_())
    assert batches.seed_probabilities().tolist() == pytest.approx([0.1, 0.2, 0.3, 0.4])


def test_a_saved_state_draws_what_the_sampler_itself_would_have_drawn():
    original, assignments = sampler(seed=3)
    all_at(original, assignments, [1.0, 2.0, 3.0, 4.0])
    for batch in original:
        original.update(batch.indices, 0.25 * batch.assignments + 1.0)
    state = json.loads(json.dumps(original.state_dict()))
    restored, _ = sampler(seed=99)
    restored.update(torch.arange(10), torch.full((10,), 7.0))
    restored.load_state_dict(state)
    for _ in range(30):
        ours, theirs = original.draw(), restored.draw()
        assert torch.equal(ours.indices, theirs.indices)
        for batches in (original, restored):
            batches.update(ours.indices, 0.5 * ours.assignments + 1.0)


def test_the_seed_fixes_every_draw():
    first, again, other = (sampler(seed=s)[0] for s in (5, 5, 6))
    draws = [[batch.indices.tolist() for batch in batches] for batches in (first, again, other)]
    assert draws[0] == draws[1] != draws[2]


def test_an_empty_cluster_is_never_a_seed():
    batches, _ = sampler(sizes=(10, 0, 10, 0), labels=(0, 0, 1, 1))
    assert batches.seed_probabilities().tolist() == [0.5, 0, 0.5, 0]
    assert {int(batches.draw().assignments[0]) for _ in range(50)} == {0, 2}


def test_an_empty_rival_gives_way_to_the_next_nearest_with_examples():
    batches, _ = sampler(sizes=(10, 0, 10), labels=(0, 1, 1), clusters_per_batch=2)
    assert {frozenset(cluster_order(batches.draw())) for _ in range(50)} == {frozenset({0, 2})}


def test_coinciding_points_leave_empty_clusters_and_still_make_batches_to_train_on():
    labels = torch.arange(2).repeat_interleave(20)
    embeddings = torch.linspace(0, 1, 40)[:, None].clamp_max(0.6)
    clusters, assignments = fit_clusters(embeddings, labels, per_class=3)
    batches = ClusterBatches(clusters, assignments, clusters_per_batch=2, per_cluster=5)
    for batch in (batches.draw() for _ in range(20)):
        loss = magnet_loss(embeddings[batch.indices], batch.assignments, labels[batch.indices]).loss
        assert loss.isfinite()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"labels": (0, 0, 0, 0)}, "clusters: expected at least two classes"),
        ({"clusters_per_batch": 1}, "clusters_per_batch, per_cluster: expected at least 2 and 1, got 1 and 5"),
        ({"per_cluster": 0}, "clusters_per_batch, per_cluster: expected at least 2 and 1, got 3 and 0"),
    ],
)
def test_what_cannot_make_batches_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        sampler(**changes)


@pytest.mark.parametrize("assignments", [[0, 4], [-1, 0], []])
def test_assignments_that_name_no_cluster_are_refused(assignments):
    clusters = clusters_on_a_line([0.0, 1.0, 2.0, 3.0], [0, 0, 1, 1])
    with pytest.raises(ValueError, match=r"assignments: expected cluster indices in 0\.\.3"):
        ClusterBatches(clusters, torch.tensor(assignments, dtype=torch.int64))


@given(st.integers(1, 60), st.integers(1, 20), st.integers(0, 100))
@settings(max_examples=40, deadline=None)
def test_shuffled_batches_hold_each_example_once(count, batch_size, seed):
    batches = ShuffledBatches(count, batch_size=batch_size, seed=seed)
    for _ in range(2):
        epoch = list(batches)
        assert len(epoch) == len(batches)
        assert all(batch.assignments is None for batch in epoch)
        assert {len(batch.indices) for batch in epoch[:-1]} <= {batch_size}
        assert sorted(torch.cat([batch.indices for batch in epoch]).tolist()) == list(range(count))


def test_shuffled_batches_differ_between_epochs_and_not_between_runs():
    first, again = (ShuffledBatches(50, batch_size=8, seed=1) for _ in range(2))
    epochs = [[batch.indices.tolist() for batch in batches] for batches in (first, again, again)]
    assert epochs[0] == epochs[1] != epochs[2]


@pytest.mark.parametrize("sizes", [(0, 8), (8, 0)])
def test_shuffled_batches_of_nothing_are_refused(sizes):
    with pytest.raises(ValueError, match="count, batch_size: expected positive"):
        ShuffledBatches(sizes[0], batch_size=sizes[1])
