"""Which code runs where, the kernels under Triton's interpreter, and what they compile to; all without a GPU."""

import logging
import os
import re
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from benchmarks.kernels import faults_of
from clustr_core.numerics import kernels
from clustr_core.numerics.kernels import dispatch, register
from tools.compilers import OLD_NUMPY

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


COLUMNS = "kernel,dtype,ours_ms,eager_ms,compiled_ms,elements,capability"


@pytest.fixture
def measured(monkeypatch, tmp_path):
    """Another table of what was measured."""

    def write(*rows):
        path = tmp_path / "measured.csv"
        path.write_text("\n".join((COLUMNS, *rows)) + "\n", encoding="utf-8")
        monkeypatch.setattr(kernels, "MEASURED", path)
        kernels._crossovers.cache_clear()

    yield write
    kernels._crossovers.cache_clear()


def on_gpu(elements, dtype=torch.float32):
    return torch.ones(elements, dtype=dtype).as_subclass(OnGPU)


def test_a_kernel_is_used_from_where_it_was_measured_to_be_faster(registered, chosen, monkeypatch, measured):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    registered("cluster_logits", "cpu")(print)
    monkeypatch.setattr(kernels, "_import_kernels", lambda: "")
    assert kernels.crossover("cluster_logits", torch.ones(10**6)) == float("inf")
    measured(
        '"cluster_logits, all vote",float32,1.0,2.0,1.5,100,9.0',
        '"cluster_logits with gradients, all vote",float32,1.0,2.0,1.5,100,9.0',
        '"cluster_logits, all vote",float32,1.0,2.0,,50,9.0',
        # faster than eager, and not than compiled
        '"cluster_logits with gradients, all vote",float32,1.0,2.0,0.9,50,9.0',
        '"cluster_logits, all vote",float32,1.0,2.0,1.5,20,9.0',
        '"cluster_logits, all vote",bfloat16,1.0,1.0,,100,9.0',
        "pairwise_radius,float32,1.0,2.0,,100,8.0",
    )
    chosen("auto")
    picked = {size: dispatch("cluster_logits", fails, on_gpu(size)) is print for size in (20, 50, 99, 100, 1000)}
    assert picked == {20: False, 50: False, 99: False, 100: True, 1000: True}
    # measured on another GPU, in another dtype, or not at all
    for name, dtype in (
        ("cluster_logits", torch.bfloat16),
        ("cluster_logits", torch.float16),
        ("pairwise_radius", None),
    ):
        assert kernels.crossover(name, on_gpu(10**4, dtype or torch.float32)) == float("inf")


def test_the_dispatcher_never_picks_what_was_measured_slower(monkeypatch):
    rows = pd.read_csv(kernels.MEASURED)
    slower = rows[rows["ours_ms"] >= rows[["eager_ms", "compiled_ms"]].min(axis=1)]
    for row in slower.itertuples():
        capability = tuple(int(part) for part in str(row.capability).split("."))
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, found=capability: found)
        name = row.kernel.partition(",")[0].removesuffix(" with gradients")
        assert name in kernels._TRITON_MODULES
        assert kernels.crossover(name, on_gpu(1, getattr(torch, row.dtype))) > row.elements


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


@pytest.mark.parametrize(
    ("name", "value", "lacking"),
    [
        ("find_spec", None, "Triton is not installed"),
        ("triton_version", "3.3.1", "Triton 3.3.1 is installed, older than 3.6"),
    ],
)
def test_without_a_triton_that_will_do_plain_pytorch_runs_with_one_warning(
    chosen, registered, monkeypatch, caplog, name, value, lacking
):
    monkeypatch.setattr(kernels, name, lambda *_: value)
    monkeypatch.delitem(sys.modules, "clustr_core.numerics.kernels.kmeans", raising=False)
    kernels._import_kernels.cache_clear()
    try:
        with FakeTensorMode():
            on_cuda = torch.ones(1, device="cuda")
        with caplog.at_level(logging.WARNING):
            assert [dispatch("cluster_logits", fails, on_cuda) for _ in range(3)] == [fails] * 3
            # which needs no Triton
            assert dispatch("kmeans", fails, on_cuda) is not fails
        assert [record.getMessage() for record in caplog.records] == [
            f"plain PyTorch runs in place of the GPU kernels: {lacking}"
        ]
        chosen("triton")
        with pytest.raises(RuntimeError, match=rf"CLUSTR_KERNELS: 'triton' needs Triton 3.6 or newer, and {lacking}"):
            dispatch("cluster_logits", fails, on_cuda)
    finally:
        kernels._import_kernels.cache_clear()


def test_nothing_of_triton_is_imported_before_it_is_wanted():
    code = (
        "import sys, torch; before = set(sys.modules); import clustr_core.certificates.ladder;"
        "import clustr_core.training.losses;"
        "from clustr_core.numerics.kernels import dispatch; dispatch('kmeans', print, torch.ones(1));"
        "print([m for m in set(sys.modules) - before if m.split('.')[0] == 'triton' or 'kernels.' in m])"
    )
    assert python("-c", code).stdout.strip() == "[]"


def test_the_kernels_under_the_interpreter():
    quiet = ("-W", f"ignore:{OLD_NUMPY}:DeprecationWarning")
    done = python("-m", "pytest", "-q", *quiet, "tests/numerics/interpreted_kernels.py", TRITON_INTERPRET="1")
    assert done.returncode == 0, done.stdout
    assert re.search(r"^\d{3,} passed in", done.stdout, re.MULTILINE), done.stdout


def test_the_kernels_compile_on_tensor_cores_and_without_a_spill(tmp_path):
    """For one architecture; `make test-compilers` takes all of them."""
    done = python("-m", "benchmarks.kernels", "--compile", "--architectures", "90", TRITON_CACHE_DIR=str(tmp_path))
    assert done.returncode == 0, done.stderr
    header, *rows = [line.split() for line in done.stdout.splitlines()]
    assert header == ["kernel", "inputs", "arch", "registers", "spilled", "shared", "tensor_core"]
    kinds = {
        ("stream_kernel", "float32"), ("stream_kernel", "bfloat16"), ("distances_kernel", "float32"),
        ("distances_kernel", "bfloat16"), ("votes_kernel", "float32"), ("weights_kernel", "float32"),
        ("pull_kernel", "float32"), ("pull_kernel", "bfloat16"), ("own_kernel", "float32"),
        ("radius_kernel", "float32"),
        # the others take float16 and bfloat16 alike, in float32
        *((kernel, "float16") for kernel in ("stream_kernel", "distances_kernel")),
    }  # fmt: skip
    assert {(kernel, inputs, where) for kernel, inputs, where, *_ in rows} == {(*kind, "sm_90") for kind in kinds}
    assert all(16 <= int(registers) <= 255 for _, _, _, registers, *_ in rows)


SOUND = {"kernel": "stream_kernel", "inputs": "float32", "arch": "sm_86", "spilled": 0, "shared": 0, "tensor_core": 4}


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({}, None),
        ({"kernel": "radius_kernel", "tensor_core": 0}, None),
        ({"spilled": 8}, "8 bytes are spilled"),
        ({"shared": 102_400}, "102400 bytes of shared memory, of 101376"),
        ({"tensor_core": 0}, "0 products on tensor cores"),
        ({"kernel": "radius_kernel"}, "4 products on tensor cores"),
    ],
)
def test_what_compiled_otherwise_than_it_should_is_told(changed, said):
    row = SOUND | changed
    assert faults_of(row) == ([f"{row['kernel']}, float32, sm_86: {said}"] if said else [])


def test_the_benchmark_needs_a_device():
    done = python("-m", "benchmarks.kernels", CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 2
    assert done.stderr.strip() == "benchmarks.kernels: expected a CUDA device, found none; --compile needs none"


class OnGPU(torch.Tensor):
    """A tensor that says it is on a GPU."""

    is_cuda = True


def test_an_older_gpu_is_named_and_has_plain_pytorch(monkeypatch, measured):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
    measured('"cluster_logits, all vote",float32,1.0,2.0,1.5,1,7.5')
    first = torch.zeros(3, 2).as_subclass(OnGPU)
    monkeypatch.setenv(kernels.VARIABLE, "triton")
    with pytest.raises(RuntimeError, match=r"'triton' needs compute capability 8\.0 or newer, and Tesla T4 has 7\.5"):
        kernels.dispatch("cluster_logits", None, first)
    monkeypatch.setenv(kernels.VARIABLE, "auto")
    assert kernels.dispatch("cluster_logits", None, first) is None
