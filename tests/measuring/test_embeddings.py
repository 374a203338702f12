"""The embedding space in numbers, on layouts whose answers can be read off."""

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

from clustr_core import data
from clustr_core.measuring import embeddings
from clustr_core.measuring.embeddings import (
    cluster_purity,
    embedding_table,
    formation_table,
    geometry_table,
    hardest,
    nearest_examples,
    path_table,
    separation,
    umap_map,
)
from clustr_core.measuring.pieces import some_test_images
from clustr_core.models.clusters import Clusters
from clustr_core.models.embed import embed_all


def line(*positions):
    return torch.tensor(positions, dtype=torch.float64)[:, None]


def clusters(positions, labels):
    return Clusters(line(*positions), torch.tensor(labels), torch.ones(len(labels), dtype=torch.float64))


def test_purity_counts_the_majority_of_each_cluster():
    found = clusters([0.0, 10.0], [0, 1])
    z = line(0, 1, -1, 0, 9, 10)
    assert cluster_purity(z, torch.tensor([0, 0, 0, 0, 1, 1]), found) == 1
    # three of four around 0, and one of two around 10; which class a cluster calls its own plays no part
    assert cluster_purity(z, torch.tensor([2, 2, 2, 0, 1, 0]), found) == pytest.approx(4 / 6)


def test_separation_is_half_the_gap_over_the_deviation():
    found = clusters([0.0, 100.0, 8.0, 3.0], [0, 0, 1, 2])
    z, labels = line(-1, 1, 8.5, 7.5, 3.0), torch.tensor([0, 0, 1, 1, 2])
    expected = [1.5 / 1, 1.5 / 1, 2.5 / 0.5, 2.5 / 0.5]
    assert separation(z, labels, found)[:4].tolist() == pytest.approx(expected)
    assert separation(z, labels, found)[4] > 1e100


def test_nearest_examples_come_nearest_first():
    encoder = nn.Sequential(nn.Flatten(), nn.Linear(1, 1))
    nn.init.ones_(encoder[1].weight)
    nn.init.zeros_(encoder[1].bias)
    gallery = torch.tensor([10, 200, 90, 100, 0], dtype=torch.uint8).reshape(-1, 1, 1, 1)
    queries = torch.tensor([98, 1], dtype=torch.uint8).reshape(-1, 1, 1, 1)
    assert nearest_examples(encoder, queries, gallery, count=3).tolist() == [[3, 2, 0], [4, 0, 2]]


def test_the_hardest_have_the_smallest_margin():
    model = nn.Sequential(nn.Flatten(), nn.Linear(1, 2))
    model.load_state_dict({"1.weight": torch.tensor([[1.0], [0.0]]), "1.bias": torch.tensor([0.0, 0.5])})
    images = torch.tensor([255, 0, 130, 100], dtype=torch.uint8).reshape(-1, 1, 1, 1)
    assert hardest(model, images, torch.zeros(4, dtype=torch.int64), count=3).tolist() == [1, 3, 2]


@pytest.mark.filterwarnings("ignore:Tensorflow not installed:ImportWarning")
def test_a_map_follows_its_seed_and_keeps_neighbours():
    g = torch.Generator().manual_seed(0)
    labels = torch.arange(3).repeat_interleave(15)
    z = 30 * torch.eye(3, 8)[labels] + torch.randn(45, 8, generator=g)
    threads = torch.get_num_threads()
    first, again = (umap_map(z, neighbours=8, seed=1) for _ in range(2))
    assert np.array_equal(first, again)
    assert first.shape == (45, 2)
    gaps = np.linalg.norm(first[:, None] - first[None], axis=2) + np.diag(np.full(45, np.inf))
    assert (labels.numpy()[gaps.argmin(axis=1)] == labels.numpy()).all()
    assert torch.get_num_threads() == threads


@pytest.fixture
def flat_maps(monkeypatch):
    """Maps that are made at once, so that the tables around them can be looked at; counts them."""
    made = []

    def flat(z, **options):
        made.append(len(z))
        return z[:, :2].double().numpy()

    monkeypatch.setattr(embeddings, "umap_map", flat)
    return made


@pytest.mark.parametrize("count", [0, 1, 2, 3])
def test_too_few_points_for_a_map_are_refused_before_any_work(count, runs, digits, monkeypatch):
    said = f"examples: expected at least 4 images, which a UMAP needs, got {count}"
    with pytest.raises(ValueError, match=said):
        umap_map(torch.rand(count, 8))
    monkeypatch.setattr(embeddings, "embed_all", None)
    for table in (embedding_table, formation_table):
        with pytest.raises(ValueError, match=said):
            table(runs["clustr"], examples=count, dataset=digits)


@pytest.mark.filterwarnings("ignore:Tensorflow not installed:ImportWarning")
@pytest.mark.parametrize("count", [4, 5])
def test_as_few_points_as_a_map_needs(count):
    found = umap_map(torch.rand(count, 8, generator=torch.Generator().manual_seed(0)))
    assert found.shape == (count, 2)
    assert np.isfinite(found).all()


def test_rows_of_a_map(runs, digits, flat_maps):
    run = runs["clustr"]
    table = embedding_table(run, examples=60, dataset=digits)
    assert list(table) == ["index", "label", "prediction", "correct", "cluster", "x", "y"]
    indices, images, labels = some_test_images(run, digits, 60)
    assert table["index"].tolist() == indices.tolist()
    assert table["label"].tolist() == labels.tolist()
    z, model = embed_all(run.model().encoder, images), run.cluster_model()
    assert table["cluster"].tolist() == torch.cdist(z, model.centroids).argmin(dim=1).tolist()
    assert table["x"].tolist() == pytest.approx(z[:, 0].tolist(), rel=1e-6)
    pd.testing.assert_frame_equal(embedding_table(run, examples=60, dataset=digits), table)
    assert flat_maps == [60]


def test_rows_of_how_clusters_form(runs, digits, flat_maps):
    run = runs["clustr"]
    table = formation_table(run, examples=50, dataset=digits)
    columns = ["epoch", "index", "label", "x", "y"]
    assert list(table) == [*columns, "own_distance", "rival_distance", "variance", "margin"]
    assert table["epoch"].value_counts().to_dict() == {0: 50, 4: 50}
    assert flat_maps == [50, 50]
    margin = (table["rival_distance"] ** 2 - table["own_distance"] ** 2) / (2 * table["variance"])
    assert (margin - table["margin"]).abs().max() < 1e-4
    # training raises what the magnet loss asks for
    medians = table.groupby("epoch")["margin"].median()
    assert medians[4] > medians[0]
    # the final snapshot with the run's own clusters
    model, rows = run.cluster_model(), table.query("epoch == 4")
    z = embed_all(model.encoder, digits.test_images[rows["index"].tolist()])
    own = model.labels != torch.tensor(rows["label"].tolist())[:, None]
    expected = torch.cdist(z, model.centroids).masked_fill(own, torch.inf).amin(dim=1)
    assert rows["own_distance"].tolist() == pytest.approx(expected.tolist(), rel=1e-3)


def test_geometry_of_methods(runs, digits):
    table = geometry_table(runs, dataset=digits)
    assert list(table) == ["method", "purity", "silhouette", "separation", "accuracy"]
    assert table["method"].tolist() == list(runs)
    for row, run in zip(table.itertuples(), runs.values(), strict=True):
        with torch.no_grad():
            logits = run.cluster_model(rule="nearest")(data.to_float(digits.test_images))
        assert row.accuracy == pytest.approx((logits.argmax(dim=1) == digits.test_labels).double().mean().item())
        assert row.accuracy <= row.purity <= 1
        assert -1 <= row.silhouette <= 1
        assert row.separation > 0
    before = {path: path.stat().st_mtime_ns for run in runs.values() for path in run.path.rglob("*")}
    pd.testing.assert_frame_equal(geometry_table(runs, dataset=digits), table)
    assert {path: path.stat().st_mtime_ns for run in runs.values() for path in run.path.rglob("*")} == before


@pytest.mark.parametrize("method", ["ce", "clustr"])
def test_the_path_of_an_attack(runs, digits, method):
    run, image, label = runs[method], digits.test_images[3], int(digits.test_labels[3])
    table = path_table(run, image, label, eps=0.3, steps=6)
    assert list(table) == ["step", "along", "across", "loss", "prediction"]
    # the image itself, the random start, then each step
    assert table["step"].tolist() == list(range(8))
    with torch.no_grad():
        logits = run.model()(data.to_float(image[None]))
    assert table["prediction"][0] == logits.argmax()
    assert table["loss"][0] == pytest.approx(
        nn.functional.cross_entropy(logits, torch.tensor([label])).item(), rel=1e-4
    )
    assert table["loss"].iloc[-1] > table["loss"][0]
    assert table["along"].iloc[-1] > table["along"][0]
    assert (table["across"] >= 0).all()
    pd.testing.assert_frame_equal(path_table(run, image, label, eps=0.3, steps=6), table)


def test_a_path_stays_in_the_ball_of_its_norm(runs, digits):
    run, image, label = runs["ce"], digits.test_images[3], int(digits.test_labels[3])
    linf, l2 = (path_table(run, image, label, eps=0.3, steps=6, norm=norm) for norm in ("linf", "l2"))
    # 64 pixels: a ball of the same radius that is much smaller
    assert l2["loss"].iloc[-1] - l2["loss"][0] < 0.5 * (linf["loss"].iloc[-1] - linf["loss"][0])


def test_the_position_on_the_line_is_where_the_two_distances_meet(runs, digits):
    run, image, label = runs["clustr"], digits.test_images[3], int(digits.test_labels[3])
    row = path_table(run, image, label, eps=0.3, steps=6).iloc[0]
    model = run.cluster_model()
    with torch.no_grad():
        z = model.embed(data.to_float(image[None]))
    distances = torch.cdist(z.double(), model.centroids.double())[0]
    own = distances.masked_fill(model.labels != label, torch.inf).argmin()
    lengths = torch.cdist(model.centroids.double(), model.centroids.double())[own]
    # the cosine rule, for each rival that the line may lead to
    along = (distances[own] ** 2 + lengths**2 - distances**2) / (2 * lengths**2)
    across = (distances[own] ** 2 / lengths**2 - along**2).sqrt()
    misses = (along - row["along"]).abs() + (across - row["across"]).abs()
    assert misses[model.labels != label].min() < 1e-4
    assert abs(row["along"]) > 1e-2
