"""Projected ascent: points that stay in the ball, steps of the length asked for, and inputs that have a meaning."""

import math

import pytest
import torch
from toy_models import NORMS, SHAPE, Linear, labelled, lengths, some_images

from clustr_core.attacks.ball import check_inputs, direction, pgd_endpoint, pgd_path, project, random_point
from clustr_core.attacks.losses import cross_entropy


@pytest.mark.parametrize("norm", NORMS)
def test_random_points_fill_the_ball(norm):
    images = torch.full((2000, 1, 2, 2), 0.5, dtype=torch.float64)
    offsets = random_point(images, 0.2, norm, torch.Generator().manual_seed(0)) - images
    radii = lengths(offsets, norm) / 0.2
    assert radii.max() <= 1 + 1e-12
    # uniform in a ball of dimension 4: P(radius <= r) = r^4
    assert (radii**4).mean().item() == pytest.approx(0.5, abs=0.03)
    torch.testing.assert_close(offsets.mean(dim=0), torch.zeros(1, 2, 2, dtype=torch.float64), atol=0.01, rtol=0)


@pytest.mark.parametrize("norm", NORMS)
def test_random_points_are_images(norm):
    images = torch.tensor([0.0, 1.0]).reshape(2, 1, 1, 1).expand(2, 1, 4, 4).contiguous()
    points = random_point(images, 0.3, norm, torch.Generator().manual_seed(0))
    assert points.min() >= 0
    assert points.max() <= 1
    assert (points != images).any()


@pytest.mark.parametrize("norm", NORMS)
def test_iterates_climb_and_end_where_maximise_does(norm):
    model, images = Linear(), some_images()
    labels = labelled(model, images)

    def objective(x):
        return cross_entropy(model(x), labels)

    options = {"eps": 0.2, "step_size": 0.03, "steps": 5, "norm": norm}
    path = list(pgd_path(objective, images, images, **options))
    assert len(path) == 6
    assert torch.equal(path[0], images)
    values = torch.stack([objective(x) for x in path])
    assert (values.diff(dim=0) > 0).all()
    torch.testing.assert_close(lengths(path[1] - images, norm), torch.full((8,), 0.03, dtype=torch.float64))
    assert torch.equal(pgd_endpoint(objective, images, images, **options), path[-1])
    assert not path[-1].requires_grad
    assert model.weight.grad is None


@pytest.mark.parametrize("norm", NORMS)
def test_the_end_of_a_linear_ascent_is_the_top_of_the_ball(norm):
    weight = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    images = some_images()
    options = {"eps": 0.2, "step_size": 0.05, "steps": 8, "norm": norm}
    top = pgd_endpoint(lambda x: (x * weight).sum(dim=(1, 2, 3)), images, images, **options)
    gain = ((top - images) * weight).sum(dim=(1, 2, 3))
    # the dual norm
    expected = 0.2 * (weight.abs().sum() if norm == "linf" else weight.norm())
    torch.testing.assert_close(gain, expected.expand(8))


@pytest.mark.parametrize("scale", [1e-300, 1e-160, 1.0, 1e160])
def test_an_l2_direction_has_length_one_at_any_scale(scale):
    gradient = torch.randn(3, *SHAPE, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    torch.testing.assert_close(lengths(direction(gradient * scale, "l2"), "l2"), torch.ones(3, dtype=torch.float64))


@pytest.mark.parametrize("norm", NORMS)
def test_a_zero_gradient_has_no_direction(norm):
    assert torch.equal(direction(torch.zeros(2, *SHAPE), norm), torch.zeros(2, *SHAPE))


def test_projection_keeps_what_is_inside_and_shortens_the_rest():
    images = torch.full((2, 1, 1, 2), 0.5)
    points = images + torch.tensor([[[[0.03, 0.04]]], [[[0.3, 0.4]]]])
    expected = images + torch.tensor([[[[0.03, 0.04]]], [[[0.06, 0.08]]]])
    torch.testing.assert_close(project(points, images, 0.1, "l2"), expected)
    clamped = torch.tensor([[[[0.53, 0.54]]], [[[0.6, 0.6]]]])
    torch.testing.assert_close(project(points, images, 0.1, "linf"), clamped)


@pytest.mark.parametrize("norm", NORMS)
def test_projection_leads_into_the_ball_and_into_the_images(norm):
    g = torch.Generator().manual_seed(0)
    images = torch.rand(50, *SHAPE, generator=g, dtype=torch.float64).round(decimals=1)
    points = images + 2 * torch.randn(50, *SHAPE, generator=g, dtype=torch.float64)
    kept = points.clone()
    found = project(points, images, 0.3, norm)
    assert torch.equal(points, kept)
    assert found.min() >= 0
    assert found.max() <= 1
    assert (lengths(found - images, norm) <= 0.3 + 1e-12).all()


# what has no meaning


@pytest.mark.parametrize("name", ["eps", "step_size"])
@pytest.mark.parametrize("value", [0, -1, math.nan, math.inf])
def test_lengths_without_meaning_are_refused(name, value):
    with pytest.raises(ValueError, match=f"{name}: expected a positive number, got {value}"):
        check_inputs(some_images(2), norm="linf", **({"eps": 0.1} | {name: float(value)}))


@pytest.mark.parametrize("name", ["steps", "restarts"])
@pytest.mark.parametrize("value", [0, -1, 2.5, 0.5, 2.0, math.nan, math.inf, True])
def test_counts_without_meaning_are_refused(as_installed, name, value):
    with pytest.raises(ValueError, match=f"{name}: expected a positive whole number, got {value}"):
        check_inputs(some_images(2), norm="linf", eps=0.1, **{name: value})


@pytest.mark.parametrize(
    ("norm", "shape", "largest", "said"),
    [("linf", (3, 4, 4), 1.0, "1"), ("l2", (3, 4, 4), 48**0.5, r"6\.928"), ("l2", (1, 1, 1), 1.0, "1")],
)
def test_an_eps_in_bytes_is_noticed(norm, shape, largest, said):
    images = torch.rand(2, *shape, generator=torch.Generator().manual_seed(0))
    check_inputs(images, norm=norm, eps=largest)
    message = rf"eps: expected at most {said} in {norm} for pixels in \[0, 1\] \(8/255, not 8\), got 8"
    with pytest.raises(ValueError, match=message):
        check_inputs(images, norm=norm, eps=8.0)
    with pytest.raises(ValueError, match="eps: expected at most"):
        check_inputs(images, norm=norm, eps=largest * 1.01)


@pytest.mark.parametrize("norm", ["l1", "Linf", ""])
def test_an_unknown_norm_is_refused(as_installed, norm):
    with pytest.raises(ValueError, match=rf"norm: expected one of \('linf', 'l2'\), got '{norm}'"):
        check_inputs(some_images(2), norm=norm, eps=0.1)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (some_images(2) + 0.6, r"images: expected pixels in \[0, 1\], got values from 0\.9\d+ to 1\.\d+"),
        (some_images(2) - 0.6, r"images: expected pixels in \[0, 1\], got values from -0\.\d+ to 0\.0\d+"),
        (255 * some_images(2), r"images: expected pixels in \[0, 1\]"),
        (torch.full((2, *SHAPE), math.nan), r"images: expected pixels in \[0, 1\], got NaN"),
    ],
)
def test_images_outside_the_pixel_range_are_refused(images, message):
    with pytest.raises(ValueError, match=message):
        check_inputs(images, norm="linf", eps=0.1)
    with pytest.raises(ValueError, match=message):
        pgd_endpoint(lambda x: x.sum(dim=(1, 2, 3)), images, images, eps=0.1, step_size=0.1, steps=1)


def test_the_borders_of_the_pixel_range_belong_to_it():
    check_inputs(torch.tensor([0.0, 1.0]).reshape(2, 1, 1, 1), norm="linf", eps=1.0)


def test_labels_are_one_for_each_image():
    with pytest.raises(ValueError, match="labels: expected one for each of 2 images, got 3"):
        check_inputs(some_images(2), torch.tensor([0, 1, 1]), norm="linf", eps=0.1)


@pytest.mark.parametrize("name", ["eps", "step_size", "steps"])
@pytest.mark.parametrize("value", [0, -1, math.nan, math.inf])
def test_training_is_told_as_well(as_installed, name, value):
    options = {"eps": 0.1, "step_size": 0.1, "steps": 2} | {name: value}
    with pytest.raises(ValueError, match=f"{name}: expected a positive"):
        pgd_endpoint(lambda x: x.sum(), some_images(2), some_images(2), **options)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_each_image_may_have_a_radius_of_its_own(norm):
    images = torch.full((3, 1, 4, 4), 0.5)
    radii = torch.tensor([0.0, 0.05, 0.2])
    points = images + 0.1 * torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
    together = project(points, images, radii, norm)
    for n, eps in enumerate(radii.tolist()):
        alone = project(points[n : n + 1], images[n : n + 1], eps, norm)
        torch.testing.assert_close(together[n : n + 1], alone)
    offsets = (random_point(images, radii, norm, torch.Generator().manual_seed(1)) - images).flatten(1)
    reach = offsets.abs().amax(dim=1) if norm == "linf" else offsets.norm(dim=1)
    assert (reach <= radii * (1 + 1e-5)).all()
    assert (reach[1:] > 0).all()
