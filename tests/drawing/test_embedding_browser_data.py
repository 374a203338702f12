"""The data of the browser of embeddings: what the package measures, thinned out to a size, of images of any shape."""

import json
from base64 import b64decode

import numpy as np
import pandas as pd
import pytest
import torch

from clustr_core.data import Dataset, to_float
from clustr_core.drawing.embedding_browser import PrincipalPlane, data
from clustr_core.measuring.embeddings import nearest_examples, path_table
from clustr_core.measuring.pieces import some_test_images
from clustr_core.training.loop import fit
from clustr_core.training.recipes import CrossEntropy


def size_of(found):
    return len(json.dumps(found, separators=(",", ":")))


def small(runs, digits, **options):
    return data(runs, dataset=digits, **{"eps": 0.2, "steps": 5, "examples": 12} | options)


def test_the_principal_plane_is_that_of_the_singular_vectors():
    z = torch.randn(50, 6, generator=torch.Generator().manual_seed(0)) * torch.tensor([5.0, 1, 3, 1, 1, 1])
    plane = PrincipalPlane.of(z)
    _, values, rows = np.linalg.svd((z - z.mean(dim=0)).double().numpy())
    assert plane.share.tolist() == pytest.approx(values[:2] ** 2 / (values**2).sum())
    assert np.abs(rows[:2] @ plane.axes.numpy()) == pytest.approx(np.eye(2), abs=1e-6)
    assert plane.axes.gather(0, plane.axes.abs().argmax(dim=0, keepdim=True)).min() > 0
    assert (torch.pdist(plane.project(z)) <= torch.pdist(z.double()) + 1e-9).all()


@pytest.mark.parametrize(
    ("z", "message"),
    [(torch.zeros(4, 3), "expected some that differ"), (torch.rand(4, 1), "at least two dimensions for a map, got 1")],
)
def test_embeddings_without_a_plane_are_refused(z, message):
    with pytest.raises(ValueError, match=message):
        PrincipalPlane.of(z)


def test_an_image_is_taken_for_what_its_path_says(runs, digits):
    found = small(runs, digits, examples=1, stops=[0, 1, 5])
    _, images, labels = some_test_images(runs["ce"], digits, 1)
    for method, entry in zip(runs, found["methods"], strict=True):
        steps = path_table(runs[method], images[0], int(labels[0]), eps=0.2, steps=5)
        # row 1 of a path is its random start
        expected = steps["prediction"].iloc[[0, 2, 6]].tolist()
        assert [row[0] for row in entry["prediction"]] == expected
        assert [row[0] < 0 for row in entry["margin"]] == [guess != int(labels[0]) for guess in expected]


def test_neighbours_are_named_by_their_place_among_those_that_are_kept(runs, digits):
    found = small(runs, digits, neighbours=3)
    _, images, _ = some_test_images(runs["clustr"], digits, 12)
    near = nearest_examples(runs["clustr"].model().encoder, images, digits.train_images, count=3)
    kept = np.array(found["train"]["index"])
    assert kept[np.array(found["methods"][1]["neighbours"][0])].tolist() == near.tolist()
    assert found["train"]["label"] == digits.train_labels[kept].tolist()
    assert set(kept) == {kept[n] for each in found["methods"] for n in np.ravel(each["neighbours"])}


def test_images_are_left_out_last_drawn_first_until_the_data_fit(runs, digits):
    whole = small(runs, digits, examples=12)
    limit = size_of(whole) * 2 // 3
    thinned = small(runs, digits, examples=12, limit=limit)
    assert size_of(thinned) <= limit
    kept = thinned["test"]["index"]
    assert 0 < len(kept) < 12
    assert kept == some_test_images(runs["ce"], digits, len(kept))[0].tolist()
    at = [whole["test"]["index"].index(index) for index in kept]
    for all_of_them, some in zip(whole["methods"], thinned["methods"], strict=True):
        for name in ("x", "y", "margin", "prediction"):
            assert np.array(some[name]).tolist() == np.array(all_of_them[name])[:, at].tolist()


def test_colour_images_are_shrunk_and_their_pixels_keep_their_order(tmp_path, monkeypatch):
    monkeypatch.setenv("CLUSTR_HOME", str(tmp_path))
    g = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (24, 3, 32, 32), generator=g, dtype=torch.uint8)
    labels = torch.arange(24) % 2
    dataset = Dataset("cifar10", images, labels, images[:6], labels[:6], ("cat", "dog"))
    run = fit(CrossEntropy(dataset="cifar10", epochs=1, width=2), dataset=dataset, progress=False)
    found = data({"ce": run}, eps=8 / 255, steps=1, examples=6, dataset=dataset)
    assert (found["shape"], found["stops"], len(found["methods"][0]["seen"])) == ([3, 16, 16], [0, 1], 1)
    drawn = np.frombuffer(b64decode(found["test"]["pixels"]), dtype=np.uint8).reshape(6, 16, 16, 3)
    expected = images[:6].float().reshape(6, 3, 16, 2, 16, 2).mean(dim=(3, 5)).permute(0, 2, 3, 1)
    np.testing.assert_allclose(drawn[[found["test"]["index"].index(n) for n in range(6)]], expected, atol=0.51)
    moved = np.frombuffer(b64decode(found["methods"][0]["offsets"]), dtype=np.uint8)
    codes = np.stack([moved >> 4, moved & 15], axis=1)
    assert codes.shape == (6 * 16 * 16 * 3 // 2, 2)
    assert codes.max() <= 14
    assert codes.std() > 1


def test_the_offsets_give_the_attacked_image_back(runs, digits):
    found = small(runs, digits, examples=2, stops=[0, 5])
    clean = np.frombuffer(b64decode(found["test"]["pixels"]), dtype=np.uint8).reshape(2, 64) / 255
    moved = np.frombuffer(b64decode(found["methods"][0]["offsets"]), dtype=np.uint8)
    codes = np.stack([moved >> 4, moved & 15], axis=1).reshape(2, 64).astype(float)
    attacked = clean + (codes - 7) * 0.2 / 7
    model = runs["ce"].model()
    rounded = torch.tensor(attacked, dtype=torch.float32).reshape(2, 1, 8, 8)
    with torch.no_grad():
        assert model(rounded).argmax(dim=1).tolist() == found["methods"][0]["prediction"][-1]
        assert (
            model(to_float(digits.test_images[found["test"]["index"]])).argmax(dim=1).tolist()
            == (found["methods"][0]["prediction"][0])
        )


def test_a_second_map_is_kept_to_four_digits(runs, digits):
    index = some_test_images(runs["ce"], digits, 3)[0].tolist()
    rows = pd.DataFrame({"index": index[::-1], "x": [1.23456, 2.0, 3.0], "y": [-1.0, 0.0, 12345.6]})
    maps = pd.concat([rows.assign(method=method) for method in runs])
    found = small(runs, digits, examples=3, maps=maps)
    assert found["methods"][1]["still"] == [[3.0, 12350.0], [2.0, 0.0], [1.235, -1.0]]
    with pytest.raises(
        ValueError, match=rf"maps: expected one row of clustr for each image, got 0 for image {index[0]}"
    ):
        small(runs, digits, examples=3, maps=maps[maps["method"] == "ce"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"stops": [0, 2, 2]}, r"stops: expected numbers that rise from 0 to at most 5, got \[0, 2, 2\]"),
        ({"stops": [1, 2]}, "stops: expected numbers that rise from 0"),
        ({"stops": [0, 6]}, "stops: expected numbers that rise from 0 to at most 5"),
        ({"limit": 100}, "limit: expected room for at least one image, got 100 bytes"),
    ],
)
def test_what_cannot_be_shown_is_refused(runs, digits, options, message):
    with pytest.raises(ValueError, match=message):
        small(runs, digits, examples=2, **options)


def test_no_method_is_refused(digits):
    with pytest.raises(ValueError, match="runs: expected at least one method, got none"):
        small({}, digits)
