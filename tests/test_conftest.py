"""The rules about skips and shapes, tried on a small test run of its own."""

from pathlib import Path

import jaxtyping
import pytest
import shapes
import torch

from clustr_core.numerics.distances import flat_norm, squared_distances

pytest_plugins = ["pytester"]


def test_only_a_gpu_test_may_be_skipped(pytester, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    here = Path(__file__).parent
    pytester.makeconftest((here / "conftest.py").read_text())
    tools = {name: (here.parent / f"{name}.py").read_text() for name in ("tools/__init__", "tools/browser")}
    pytester.makepyfile(shapes=(here / "shapes.py").read_text(), **tools)
    pytester.makeini("[pytest]\nmarkers = gpu: needs a GPU\n")
    pytester.makepyfile(
        test_functions="""
        import pytest

        def test_that_skips():
            pytest.skip("no")

        def test_that_runs():
            pass

        @pytest.mark.gpu
        def test_on_a_gpu():
            assert False
        """,
        test_module="import pytest; pytest.importorskip('no_such_module')",
    )
    result = pytester.runpytest_subprocess("-p", "no:cacheprovider", "--continue-on-collection-errors")
    result.assert_outcomes(failed=1, passed=1, skipped=1, errors=1)
    assert result.ret == pytest.ExitCode.TESTS_FAILED


@pytest.mark.parametrize("after", ["nothing", "another test"])
def test_shapes_are_checked_here(after):
    """In the first calls of each test, and in one of many after these."""
    for _ in range(shapes.FIRST):
        with pytest.raises(jaxtyping.TypeCheckError):
            squared_distances(torch.zeros(2, 3), torch.zeros(2, 4))
    for _ in range(shapes.FIRST, shapes.EVERY - 1):
        with pytest.raises(RuntimeError):
            squared_distances(torch.zeros(2, 3), torch.zeros(2, 4))
    with pytest.raises(jaxtyping.TypeCheckError):
        squared_distances(torch.zeros(2, 3), torch.zeros(2, 4))


def test_and_not_where_they_are_switched_off(as_installed):
    assert flat_norm([torch.zeros(2, 3)][0].bool().float()).shape == (2,)
    with pytest.raises(RuntimeError):
        squared_distances(torch.zeros(2, 3), torch.zeros(2, 4))
