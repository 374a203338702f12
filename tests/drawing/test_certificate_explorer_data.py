"""The data of the certificate explorer: what the theory's own examples are, and what each preset says is true."""

import json

import pytest
import torch

from clustr_core.certificates.ladder import certified_radius
from clustr_core.certificates.names import HARD_BOUNDS, SOFT_BOUNDS
from clustr_core.drawing.certificate_explorer import Preset, data, presets
from clustr_core.models.clusters import Clusters
from clustr_core.theory.examples import Configuration, planar_example, random_configuration
from clustr_core.theory.oracle import second_nearest_radius_unsound


def radii(preset: dict, rule: str = "nearest") -> dict[str, float]:
    variance = torch.full((len(preset["labels"]),), preset["variance"], dtype=torch.float64)
    clusters = Clusters(
        torch.tensor(preset["centroids"], dtype=torch.float64), torch.tensor(preset["labels"]), variance
    )
    z = torch.tensor([preset["z"]], dtype=torch.float64)
    found = {bound: float(certified_radius(z, clusters, bound=bound, rule=rule)) for bound in HARD_BOUNDS}
    return found | {"second-nearest": float(second_nearest_radius_unsound(z, clusters))}


def test_the_data_are_small_json_and_every_bound_has_a_look_of_its_own():
    made = data()
    assert len(json.dumps(made, allow_nan=False)) < 20_000
    assert {*HARD_BOUNDS, *SOFT_BOUNDS} < set(made["bounds"])
    for group in (HARD_BOUNDS, SOFT_BOUNDS):
        looks = [made["bounds"][bound] for bound in group]
        assert len({look["dash"] for look in looks}) == len({look["color"] for look in looks}) == len(looks)
    assert len({look["marker"] for look in made["classes"]}) == len(made["classes"])
    for preset in made["presets"]:
        assert set(preset["shown"]) <= set(made["bounds"])


def test_each_preset_shows_what_it_says():
    plane, second, nearest, pairwise, votes = data()["presets"]
    assert plane["z"] == planar_example().embeddings[4].tolist()
    found = radii(plane)
    assert found["nearest"] < 0.9 * found["pairwise"]
    found = radii(second)
    assert found["second-nearest"] == pytest.approx(1.25)
    assert found["exact"] == pytest.approx(0.3)
    found = radii(nearest)
    assert found["pairwise"] > 1.9 * found["nearest"]
    found = radii(pairwise)
    assert found["exact"] > 2 * found["pairwise"] > 0
    assert radii(votes)["nearest"] > 3 * radii(votes, "soft")["nearest"] > 0


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ({"classes": 3, "per_class": 3, "dim": 2}, "one: expected 2 to 8 centroids, got 9"),
        ({"classes": 5, "per_class": 1, "dim": 2}, "one: expected 2 to 4 classes, got 5"),
        ({"classes": 2, "per_class": 2, "dim": 3}, "one: expected centroids on a line or in the plane, got 3 dim"),
    ],
)
def test_what_the_widget_cannot_show_is_refused(shape, message):
    start = Preset("one", "", random_configuration(points=1, seed=0, **shape), ("exact",))
    with pytest.raises(ValueError, match=message):
        data([start])


def test_no_preset_and_unequal_variances_are_refused():
    with pytest.raises(ValueError, match="starts: expected at least one preset"):
        data([])
    plane = planar_example()
    unequal = Clusters(plane.clusters.centroids, plane.clusters.labels, torch.linspace(0.5, 1, 6).double())
    with pytest.raises(ValueError, match="one shared variance"):
        data([Preset("one", "", Configuration(plane.embeddings, unequal), ("exact",))])
    assert len(presets()) == 5
