"""Which code runs where, the kernels under Triton's interpreter, and what they compile to; all without a GPU."""

import logging
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from clustr_core.numerics import kernels
from clustr_core.numerics.kernels import dispatch, register

ROOT = Path(__file__).parents[2]


def python(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """A Python of its own, since Triton decides on import whether it compiles or interprets."""
    environment = {
        name: value for name, value in os.environ.items() if name not in ("TRITON_INTERPRET", kernels.VARIABLE)
    } | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, env=environment | variables, capture_output=True, text=True
    )


def fails(*_):
    raise AssertionError("the reference ran")


@pytest.fixture
def chosen(monkeypatch):
    def choose(value):
        monkeypatch.setenv(kernels.VARIABLE, value)

    monkeypatch.delenv(kernels.VARIABLE, raising=False)
    return choose


@pytest.fixture
def registered(monkeypatch):
    """An empty register, whatever other tests have imported."""
    monkeypatch.setattr(kernels, "_KERNELS", {})
    return register


def test_the_device_decides_and_the_variable_overrides(registered, chosen):
    @registered("double", "cpu")
    def on_cpu(value):
        return 2 * value

    here = torch.ones(1)
    assert dispatch("double", fails, here)(3) == 6
    assert dispatch("triple", fails, here) is fails
    chosen("auto")
    assert dispatch("double", fails, here) is on_cpu
    chosen("reference")
    assert dispatch("double", fails, here) is fails


def test_float64_has_the_reference(registered, chosen):
    registered("double", "cpu")(print)
    assert dispatch("double", fails, torch.ones(1).double()) is fails
    chosen("triton")
    assert dispatch("double", fails, torch.ones(1).double()) is fails


@pytest.mark.parametrize("value", ["", "Triton", "cuda"])
def test_an_unknown_choice_names_the_variable(chosen, value):
    chosen(value)
    with pytest.raises(ValueError, match=rf"CLUSTR_KERNELS: expected one of .*'auto'.*, got '{value}'"):
        dispatch("kmeans", fails, torch.ones(1))


def test_triton_compiles_for_no_cpu():
    code = "import torch; from clustr_core.numerics.kernels import dispatch; dispatch('kmeans', print, torch.ones(1))"
    refused = python("-c", code, CLUSTR_KERNELS="triton")
    assert "RuntimeError: CLUSTR_KERNELS: expected a CUDA tensor for 'triton', got one on cpu" in refused.stderr
    assert python("-c", code, CLUSTR_KERNELS="triton", TRITON_INTERPRET="1").returncode == 0


def test_where_triton_is_missing_plain_pytorch_runs_with_one_warning(chosen, monkeypatch, caplog):
    monkeypatch.setattr(kernels, "find_spec", lambda name: None)
    kernels._import_triton_kernels.cache_clear()
    try:
        with FakeTensorMode():
            on_cuda = torch.ones(1, device="cuda")
        with caplog.at_level(logging.WARNING):
            assert [dispatch("kmeans", fails, on_cuda) for _ in range(3)] == [fails] * 3
        assert [record.getMessage() for record in caplog.records] == [
            "Triton is not installed: plain PyTorch runs in place of the GPU kernels"
        ]
        chosen("triton")
        with pytest.raises(RuntimeError, match="CLUSTR_KERNELS: expected Triton to be installed"):
            dispatch("kmeans", fails, on_cuda)
    finally:
        kernels._import_triton_kernels.cache_clear()


def test_nothing_of_triton_is_imported_before_it_is_wanted():
    code = (
        "import sys, torch; before = set(sys.modules); import clustr_core.certificates.ladder;"
        "import clustr_core.training.losses;"
        "from clustr_core.numerics.kernels import dispatch; dispatch('kmeans', print, torch.ones(1));"
        "print([m for m in set(sys.modules) - before if m.split('.')[0] == 'triton' or 'kernels.' in m])"
    )
    assert python("-c", code).stdout.strip() == "[]"


def test_the_kernels_under_the_interpreter():
    done = python("-m", "pytest", "-q", "tests/numerics/interpreted_kernels.py", TRITON_INTERPRET="1")
    assert done.returncode == 0, done.stdout
    assert re.search(r"^\d{3,} passed in", done.stdout, re.MULTILINE), done.stdout


# bytes of shared memory that one program may have
SHARED = {80: 163 * 1024, 90: 227 * 1024}


def test_the_kernels_compile_without_a_spill_for_both_architectures(tmp_path):
    done = python("-m", "benchmarks.kernels", "--compile", TRITON_CACHE_DIR=str(tmp_path))
    assert done.returncode == 0, done.stderr
    header, *rows = [line.split() for line in done.stdout.splitlines()]
    assert header == ["kernel", "inputs", "arch", "registers", "spilled", "shared"]
    kinds = {
        ("stream_kernel", "float32"), ("stream_kernel", "bfloat16"), ("distances_kernel", "float32"),
        ("distances_kernel", "bfloat16"), ("votes_kernel", "float32"), ("weights_kernel", "float32"),
        ("pull_kernel", "float32"), ("pull_kernel", "bfloat16"), ("own_kernel", "float32"),
        ("radius_kernel", "float32"),
        ("assign_kernel", "float32"), ("assign_kernel", "bfloat16"), ("sums_kernel", "float32"),
        ("sums_kernel", "bfloat16"),
        # the others take float16 and bfloat16 alike, in float32
        *((kernel, "float16") for kernel in ("stream_kernel", "distances_kernel", "assign_kernel", "sums_kernel")),
    }  # fmt: skip
    for arch, limit in SHARED.items():
        mine = [row for row in rows if row[2] == f"sm_{arch}"]
        assert {(kernel, inputs) for kernel, inputs, *_ in mine} == kinds
        for kernel, _, _, registers, spilled, shared in mine:
            assert 16 <= int(registers) <= 255, kernel
            assert int(spilled) == 0, kernel
            assert int(shared) <= limit, kernel


def test_the_benchmark_needs_a_device():
    done = python("-m", "benchmarks.kernels", CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 2
    assert done.stderr.strip() == "benchmarks.kernels: expected a CUDA device, found none; --compile needs none"
