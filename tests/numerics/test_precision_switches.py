"""Full precision inside a block, whichever of PyTorch's switches allows less, and nothing changed behind it."""

from contextlib import suppress
from typing import Any

import pytest
import torch

from clustr_core.models.classifiers import cluster_logits
from clustr_core.models.clusters import Clusters
from clustr_core.numerics.rounding import full_precision, repeatable_convolutions, tf32

CPU = torch.device("cpu")
B: Any = torch.backends
NEW = {
    "all": B,
    "cuda": B.cudnn,
    "cuda product": B.cuda.matmul,
    "cuda convolution": B.cudnn.conv,
    "cuda recurrence": B.cudnn.rnn,
    "cpu product": B.mkldnn.matmul,
    "cpu convolution": B.mkldnn.conv,
    "cpu recurrence": B.mkldnn.rnn,
}
OPERATIONS = [name for name in NEW if " " in name]


def product(value):
    return lambda: torch.set_float32_matmul_precision(value)


def old(switch, value):
    return lambda: setattr(switch, "allow_tf32", value)


def new(**values):
    return lambda: [setattr(NEW[name.replace("_", " ")], "fp32_precision", value) for name, value in values.items()]


SETTINGS = {
    "as installed": lambda: None,
    "old, high": product("high"),
    "old, medium": product("medium"),
    "old, product": old(B.cuda.matmul, True),
    "old, no convolution": old(B.cudnn, False),
    "new, product": new(cuda_product="tf32"),
    "new, convolution": new(cuda_convolution="ieee", cuda_recurrence="tf32"),
    "new, cuda": new(cuda="tf32", cuda_convolution="none", cuda_recurrence="none"),
    "new, all": new(all="tf32", cuda_convolution="none", cuda_recurrence="none"),
    "new, its own and all": new(all="tf32", cuda="tf32", cuda_product="tf32", cpu_product="tf32"),
    "new, cpu": new(cpu_product="bf16", cpu_convolution="tf32"),
    "both": lambda: (product("high")(), new(cuda_product="ieee")()),
}


def reads():
    """What every switch says, the old ones by an error where PyTorch refuses to tell."""

    def read(function):
        try:
            return function()
        except RuntimeError as refused:
            return str(refused)[:60]

    def now():
        return {name: switch.fp32_precision for name, switch in NEW.items()}

    seen = [now(), read(torch.get_float32_matmul_precision), read(lambda: B.cudnn.allow_tf32)]
    seen += [read(lambda: B.cuda.matmul.allow_tf32), torch.is_autocast_enabled("cpu")]
    return seen


def followers():
    """Which switches follow the one of everything, and which the one of CUDA; this uses them up."""
    seen = []
    for name in ("cuda", "all"):
        for value in ("ieee", "tf32"):
            NEW[name].fp32_precision = value
            seen.append({each: switch.fp32_precision for each, switch in NEW.items()})
        NEW[name].fp32_precision = "none"
    return seen


def reset():
    """All switches as PyTorch starts with them."""
    torch.set_float32_matmul_precision("highest")
    B.cudnn.allow_tf32 = True
    for name, switch in NEW.items():
        switch.fp32_precision = "tf32" if name in ("cuda convolution", "cuda recurrence") else "none"


@pytest.fixture(autouse=True)
def as_before():
    reset()
    yield
    reset()


@pytest.mark.parametrize("setting", SETTINGS.values(), ids=SETTINGS.keys())
def test_inside_nothing_is_coarse_and_behind_it_nothing_has_changed(setting):
    setting()
    before = reads()
    with full_precision(CPU), full_precision(CPU):
        assert not {NEW[name].fp32_precision for name in OPERATIONS} & {"tf32", "bf16"}
        assert not torch.is_autocast_enabled("cpu")
    assert reads() == before
    after = followers()
    reset()
    setting()
    assert after == followers()


@pytest.mark.parametrize("setting", SETTINGS.values(), ids=SETTINGS.keys())
def test_tf32_is_for_gpus_alone_and_behind_it_nothing_has_changed(setting):
    setting()
    before = reads()
    with tf32(CPU):
        assert {NEW[name].fp32_precision for name in OPERATIONS if name.startswith("cuda")} == {"tf32"}
        assert not {NEW[name].fp32_precision for name in OPERATIONS if name.startswith("cpu")} & {"tf32", "bf16"}
        with full_precision(CPU):
            assert not {NEW[name].fp32_precision for name in OPERATIONS} & {"tf32", "bf16"}
    assert reads() == before


@pytest.mark.parametrize("setting", SETTINGS.values(), ids=SETTINGS.keys())
def test_nothing_has_changed_after_an_exception_either(setting):
    setting()
    before = reads()
    with pytest.raises(KeyError), full_precision(CPU):
        raise KeyError
    assert reads() == before


@pytest.mark.parametrize("setting", SETTINGS.values(), ids=SETTINGS.keys())
def test_distances_work_under_every_setting(setting):
    points, clusters = torch.randn(5, 3), Clusters(torch.randn(2, 3), torch.arange(2), torch.ones(2))
    expected = cluster_logits(points, clusters)
    setting()
    assert torch.equal(cluster_logits(points, clusters), expected)


@pytest.mark.parametrize("fastest", [False, True])
@pytest.mark.parametrize("before", [(False, True), (True, False)])
def test_convolutions_repeat_inside_and_behind_it_nothing_has_changed(before, fastest, monkeypatch):
    for name, value in zip(("deterministic", "benchmark"), before, strict=True):
        monkeypatch.setattr(B.cudnn, name, value)
    with suppress(KeyError), repeatable_convolutions(fastest=fastest):
        assert (B.cudnn.deterministic, B.cudnn.benchmark) == (True, fastest)
        raise KeyError
    assert (B.cudnn.deterministic, B.cudnn.benchmark) == before
