import pytest
import reference
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from clustr_core.numerics.distances import flat_norm, per_item, squared_distances


def draw(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@given(st.integers(0, 10**6), st.integers(1, 6), st.integers(1, 5), st.integers(1, 9), st.floats(1e-3, 1e3))
@settings(max_examples=50, deadline=None)
def test_squared_distances_match_the_loops(seed, points, centroids, dim, scale):
    a, b = draw(seed, points, dim) * scale, draw(seed + 1, centroids, dim) * scale
    expected = torch.tensor(reference.squared_distances(a.tolist(), b.tolist()), dtype=torch.float64)
    torch.testing.assert_close(squared_distances(a, b), expected, rtol=1e-12, atol=0)


def test_a_small_distance_far_from_the_origin_keeps_its_digits():
    # representable in float32 after the shift: the distance is exactly 2^-6
    a = torch.full((1, 8), 1000.0)
    b = a.clone()
    b[0, 3] += 2.0**-6
    assert float(squared_distances(a, b)) == pytest.approx(2.0**-12, rel=1e-6)
    assert float(squared_distances(a, a)) == 0


def test_squared_distances_gradient():
    a, b = draw(0, 4, 3).requires_grad_(), draw(1, 5, 3).requires_grad_()
    assert torch.autograd.gradcheck(squared_distances, (a, b))


def test_gradient_at_zero_distance_is_zero():
    a = draw(0, 2, 3).requires_grad_()
    squared_distances(a, a.detach()[:1].clone()).sum().backward()
    assert a.grad is not None
    assert torch.equal(a.grad[0], torch.zeros(3, dtype=torch.float64))


def test_flat_norm_and_per_item():
    batch = draw(0, 3, 2, 4, 5)
    norms = flat_norm(batch)
    expected = [float(item.square().sum().sqrt()) for item in batch]
    assert norms.tolist() == pytest.approx(expected)
    torch.testing.assert_close(flat_norm(batch / per_item(norms, batch)), torch.ones(3, dtype=torch.float64))
