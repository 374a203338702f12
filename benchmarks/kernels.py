"""The GPU kernels beside plain PyTorch, each set timed in turn in one run, and what the kernels compile to.

.venv/bin/python -m benchmarks.kernels             on a CUDA device: writes results/bench/kernels.csv, from which
                                                   `numerics.kernels.MEASURED` is taken
.venv/bin/python -m benchmarks.kernels --compile   anywhere: what each kernel compiles to, held to what it should be

Plain PyTorch runs eagerly and through torch.compile, in the inputs' dtype. A kernel's fraction of a limit is the least
time that the device's peak allows for the arithmetic (or the reads and writes) that the formula needs, over the time
measured; what is computed twice to save memory does not count as needed. Where no peak is known the fraction is empty.
"""

import argparse
import re
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any
from unittest import mock

import pandas as pd
import torch
import triton
from torch import Tensor
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from clustr_core.numerics.kernels import kmeans, tiles
from clustr_core.numerics.kernels.cluster_logits import cluster_logits
from clustr_core.numerics.kernels.pairwise_radius import pairwise_radius
from clustr_core.storage.files import home
from clustr_core.storage.provenance import commit
from clustr_core.storage.tables import write_table
from tools.telling import amount, count, told

# compute capabilities, and the bytes of shared memory that one program may have there
SHARED = {80: 163 * 1024, 86: 99 * 1024, 89: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024, 120: 99 * 1024}
ARCHITECTURES = (80, 90)
# whose products are made by tensor cores; those of a certificate are sums in float32, whose rounding has a bound
PRODUCTS = {"stream_kernel", "distances_kernel", "pull_kernel"}
TYPES = {
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.int64: "*i64",
    torch.int8: "*i8",
    int: "i32",
    float: "fp32",
}
OPTIONS = ("num_warps", "num_stages")
# a product on tensor cores, by one warp or by four together
TENSOR_CORE = re.compile(r"^\s*(?:@\S+\s+)?(?:mma\.sync|wgmma\.mma_async|tcgen05\.mma)\.", re.MULTILINE)
RELATIVE = 1e-4


@dataclass(frozen=True)
class Peak:
    """Bytes a second, and dense floating-point operations a second in float32 (without TF32) and in half precision."""

    bandwidth: float = float("nan")
    float32: float = float("nan")
    half: float = float("nan")


# of the vendor's data sheets and white papers, without sparsity, as collected on glennklockwood.com/garden/processors
# (A100, h100; looked up in November 2026)
PEAKS = {
    "NVIDIA A100-SXM4-40GB": Peak(1.555e12, 19.5e12, 312e12),
    "NVIDIA A100-SXM4-80GB": Peak(2.039e12, 19.5e12, 312e12),
    "NVIDIA H100 80GB HBM3": Peak(3.35e12, 67e12, 989e12),
}


@dataclass(frozen=True)
class Case:
    """One problem: the kernel, the plain form, and the operations and bytes that no way around the formula saves."""

    name: str
    dtype: torch.dtype
    ours: Callable[[], Any]
    plain: Callable[..., Any]
    arguments: tuple[Any, ...]
    operations: float
    bytes: float


def plain_distances(z: Tensor, mu: Tensor) -> Tensor:
    """||z||^2 - 2 <z, mu> + ||mu||^2, which `torch.cdist` has not in half precision."""
    cross = z @ mu.transpose(-1, -2)
    squares = z.square().sum(dim=-1)[..., :, None] + mu.square().sum(dim=-1)[..., None, :]
    return (squares - 2 * cross).clamp_min(0)


def plain_logits(z: Tensor, mu: Tensor, variance: Tensor, classes: int, neighbours: int | None = None) -> Tensor:
    """Cluster logits of clusters that are listed by class, as many in each."""
    distances = plain_distances(z, mu)
    exponents = (-distances / (2 * variance)).view(len(z), classes, -1)
    if neighbours is None:
        return exponents.logsumexp(dim=2)
    votes = torch.zeros_like(distances, dtype=torch.bool)
    votes = votes.scatter(1, distances.topk(neighbours, dim=1, largest=False).indices, True).view_as(exponents)
    logits, has_vote = exponents.masked_fill(~votes, -torch.inf).logsumexp(dim=2), votes.any(dim=2)
    lowest = logits.masked_fill(~has_vote, torch.inf).amin(dim=1, keepdim=True).detach()
    return torch.where(has_vote, logits, torch.minimum(exponents.amax(dim=2), lowest) - 1)


def gradients(logits: Callable[..., Tensor], z: Tensor, mu: Tensor, *others: Any) -> tuple[Tensor, ...]:
    """Logits and the gradients of their sum."""
    return torch.autograd.grad(logits(z, mu, *others).sum(), (z, mu))


def plain_radius(z: Tensor, mu: Tensor, between: Tensor, predicted: Tensor, classes: int) -> Tensor:
    """The "pairwise" radius, less the same rounding, of clusters that are listed by class, as many in each."""
    origin = mu.mean(dim=0)
    points, targets = z - origin, mu - origin
    q = targets.square().sum(dim=1) / 2 - points @ targets.T
    slack = RELATIVE * (points.norm(dim=1)[:, None] + targets.norm(dim=1)).square()
    own = predicted[:, None] * (len(mu) // classes) + torch.arange(len(mu) // classes, device=z.device)
    radii = ((q - slack)[:, None] - (q + slack).gather(1, own)[:, :, None]) / between[own]
    rivals = torch.arange(len(mu), device=z.device) // (len(mu) // classes) != predicted[:, None]
    return radii.amax(dim=1).masked_fill(~rivals, torch.inf).amin(dim=1).clamp_min(0)


def plain_lloyd(points: Tensor, centroids: Tensor) -> tuple[Tensor, Tensor]:
    """One iteration and the assignment after it, of points that are listed by class, as many in each."""
    by_class = points.float().view(len(centroids), -1, points.shape[1])
    slots = plain_distances(by_class, centroids).argmin(dim=2)
    member = torch.nn.functional.one_hot(slots, centroids.shape[1]).to(by_class.dtype)
    means = member.transpose(1, 2) @ by_class / member.sum(dim=1)[:, :, None].clamp_min(1)
    return means, plain_distances(by_class, means).argmin(dim=2).flatten()


def lloyd(points: Tensor, labels: Tensor, centroids: Tensor) -> tuple[Tensor, Tensor]:
    """The same by `kmeans`, its table made anew."""
    (problem,) = kmeans.grouped(points, labels)
    means, slots, _ = kmeans.lloyd(problem, centroids - problem.origins, 1)
    return means + problem.origins, slots.flatten()


def cases(device: str, *, examples: int, classes: int, per_class: int, dim: int, dtype: torch.dtype) -> Iterator[Case]:
    """Every kernel on one data set: embeddings around clusters that are listed by class, as many in each."""
    g = torch.Generator().manual_seed(0)
    clusters, n = classes * per_class, examples // classes * classes
    mu = torch.randn(clusters, dim, generator=g).to(device, dtype)
    classed = torch.arange(n, device=device) // (n // classes)
    slots = torch.randint(per_class, (n,), generator=g).to(device)
    z = mu[classed * per_class + slots] + torch.randn(n, dim, generator=g).to(device, dtype)
    labels = torch.arange(clusters, device=device) // per_class
    variance = torch.full((clusters,), float(dim), device=device)
    product, item = 2.0 * n * clusters * dim, z.element_size()
    moved = item * (n + clusters) * dim + item * n * classes
    case = partial(Case, dtype=dtype)

    leaves = z.clone().requires_grad_(), mu.clone().requires_grad_()
    # the paper's 20 of 1,000 clusters
    for name, neighbours in (("all vote", None), ("some vote", max(1, clusters // 50))):
        ours, plain = (labels, variance, classes, neighbours), (variance, classes, neighbours)
        yield case(f"cluster_logits, {name}", ours=partial(cluster_logits, z, mu, *ours), plain=plain_logits,
                   arguments=(z, mu, *plain), operations=product, bytes=moved)  # fmt: skip
        yield case(f"cluster_logits with gradients, {name}", ours=partial(gradients, cluster_logits, *leaves, *ours),
                   plain=partial(gradients, plain_logits), arguments=(*leaves, *plain), operations=3 * product,
                   bytes=2 * moved)  # fmt: skip
    if dtype == torch.float32:
        between = torch.cdist(mu.double(), mu.double()).float()
        radius = partial(pairwise_radius, z, mu, labels, classed, between, RELATIVE, 0.0)
        yield case("pairwise_radius", ours=radius, plain=plain_radius, arguments=(z, mu, between, classed, classes),
                   operations=product, bytes=moved)  # fmt: skip
    starts = z.view(classes, -1, dim)[:, :per_class].float()
    yield case("kmeans, one iteration", ours=partial(lloyd, z, classed, starts), plain=plain_lloyd,
               arguments=(z, starts), operations=4.0 * n * per_class * dim + 2.0 * n * dim,
               bytes=item * n * dim)  # fmt: skip


def measured(case: Case, peak: Peak, rounds: int) -> dict[str, Any]:
    """Median seconds and the memory that each way needs beyond its inputs."""
    ways = {
        "ours": case.ours,
        "eager": partial(case.plain, *case.arguments),
        "compiled": partial(torch.compile(case.plain), *case.arguments),
    }
    peaks = {way: _peak_bytes(call) for way, call in ways.items()}
    taken = [{way: _seconds(call) for way, call in ways.items()} for _ in range(rounds)]
    seconds = {way: median(row[way] for row in taken) for way in ways}
    rate = peak.float32 if case.dtype == torch.float32 else peak.half
    return {
        "kernel": case.name,
        "dtype": str(case.dtype).removeprefix("torch."),
        "elements": case.arguments[0].numel(),
        **{f"{way}_ms": value * 1e3 for way, value in seconds.items()},
        **{f"{way}_mb": value / 2**20 for way, value in peaks.items()},
        "of_arithmetic_limit": case.operations / rate / seconds["ours"],
        "of_bandwidth_limit": case.bytes / peak.bandwidth / seconds["ours"],
    }


def _seconds(call: Callable[[], object]) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def _peak_bytes(call: Callable[[], object]) -> int:
    """After two calls that compile and warm up."""
    for _ in range(2):
        call()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


@dataclass(frozen=True)
class Launch:
    """One kernel as it would be launched: the dtype of the call that it is part of, its arguments and constants."""

    kernel: Any
    inputs: str
    signature: tuple[tuple[str, str], ...]
    constants: tuple[tuple[str, Any], ...]
    divisible: tuple[int, ...]


def recorded_launches() -> list[Launch]:
    """Every kernel that small calls launch, in each variant, without running any."""
    found: dict[tuple[Any, ...], Launch] = {}

    def record(kernel: Any, grid: tuple[int, ...], *arguments: Any, **constants: Any) -> None:
        names = kernel.arg_names[: len(arguments)]
        given = dict(zip(names, arguments, strict=True))
        # as Triton does: an integer 1 is a constant, and what is divisible by 16 is known to be
        constants |= {name: 1 for name, value in given.items() if type(value) is int and value == 1}
        types = {name: "constexpr" for name in constants if name not in OPTIONS}
        for name, value in given.items():
            types.setdefault(name, TYPES[value.dtype if isinstance(value, Tensor) else type(value)])
        launch = Launch(
            kernel,
            dtype,
            tuple((name, types[name]) for name in kernel.arg_names),
            tuple(sorted(constants.items())),
            tuple(
                place
                for place, value in enumerate(arguments)
                if isinstance(value, Tensor) or (type(value) is int and value % 16 == 0)
            ),
        )
        found.setdefault((kernel.__name__, *launch.signature, *launch.constants), launch)

    with mock.patch.object(tiles, "launch", record):
        for dtype in ("float32", "bfloat16", "float16"):
            for classes, per_class in ((10, 2), (100, 10)):
                sizes = {"examples": 20 * classes, "classes": classes, "per_class": per_class, "dim": 512}
                for case in cases("cpu", dtype=getattr(torch, dtype), **sizes):
                    case.ours()
    return list(found.values())


def compiled(launch: Launch, arch: int) -> dict[str, Any]:
    """Compile for one architecture, with no device, and read from the binary what a program takes of it."""
    constants = {name: value for name, value in launch.constants if name not in OPTIONS}
    source = ASTSource(
        launch.kernel,
        dict(launch.signature),
        constants,
        {(place,): [["tt.divisibility", 16]] for place in launch.divisible},
    )
    options = {name: value for name, value in launch.constants if name in OPTIONS}
    binary = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    with TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(binary.asm["cubin"])
        command = [knobs.nvidia.cuobjdump.path, "--dump-resource-usage", str(path)]
        printed = subprocess.run(command, capture_output=True, encoding="utf-8", check=True).stdout
    usage = dict(field.split(":") for field in printed.split() if field.startswith(("REG:", "STACK:", "LOCAL:")))
    return {
        "kernel": launch.kernel.__name__,
        "inputs": launch.inputs,
        "arch": f"sm_{arch}",
        "registers": int(usage["REG"]),
        "spilled": int(usage["STACK"]) + int(usage["LOCAL"]),
        "shared": binary.metadata.shared,
        "tensor_core": len(TENSOR_CORE.findall(binary.asm["ptx"])),
    }


def faults_of(row: dict[str, Any]) -> list[str]:
    """What is not as it should be in what a kernel compiled to."""
    limit, multiplies = SHARED[int(row["arch"].removeprefix("sm_"))], row["kernel"] in PRODUCTS
    found = {
        f"{row['spilled']} bytes are spilled": row["spilled"] > 0,
        f"{row['shared']} bytes of shared memory, of {limit}": row["shared"] > limit,
        f"{row['tensor_core']} products on tensor cores": (row["tensor_core"] > 0) != multiplies,
    }
    return [f"{row['kernel']}, {row['inputs']}, {row['arch']}: {fault}" for fault, is_so in found.items() if is_so]


def compile_all(architectures: Sequence[int]) -> int:
    """Compile every kernel and print what it takes; the number of faults, which are printed too."""
    rows = [compiled(launch, arch) for launch in recorded_launches() for arch in architectures]
    print(pd.DataFrame(rows).to_string(index=False))
    faults = [fault for row in rows for fault in faults_of(row)]
    for fault in faults:
        print(fault, file=sys.stderr)
    return len(faults)


def main() -> None:
    """Print what was measured or compiled."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--compile", action="store_true", help="compile for sm_80 and sm_90; needs no device")
    parser.add_argument("--architectures", type=int, nargs="+", choices=SHARED, default=ARCHITECTURES)
    parser.add_argument("--rounds", type=count, default=20)
    parser.add_argument("--examples", type=count, default=10_000)
    parser.add_argument("--classes", type=count, default=100)
    parser.add_argument("--per-class", type=count, default=10)
    parser.add_argument("--dim", type=count, default=512)
    for limit in ("bandwidth", "float32", "half"):
        parser.add_argument(f"--peak-{limit}", type=amount, help="of the device, a second; replaces the table's")
    options = parser.parse_args()
    if options.compile:
        sys.exit(min(compile_all(options.architectures), 1))
    if not torch.cuda.is_available():
        print("benchmarks.kernels: expected a CUDA device, found none; --compile needs none", file=sys.stderr)
        sys.exit(2)
    device = torch.cuda.get_device_name()
    given = {limit: getattr(options, f"peak_{limit}") for limit in ("bandwidth", "float32", "half")}
    known = {**vars(PEAKS.get(device, Peak())), **{limit: value for limit, value in given.items() if value}}
    sizes = {name: getattr(options, name) for name in ("examples", "classes", "per_class", "dim")}
    capability = "{}.{}".format(*torch.cuda.get_device_capability())
    about = {"device": device, "capability": capability, "rounds": options.rounds}
    about |= {"torch": torch.__version__, "triton": triton.__version__, "commit": commit(home())}
    rows = []
    for dtype in (torch.float32, torch.bfloat16):
        for case in cases("cuda", dtype=dtype, **sizes):
            rows.append(measured(case, Peak(**known), options.rounds) | sizes | about)
            # after each, so that what is killed has lost one
            write_table(home() / "results/bench" / "kernels.csv", pd.DataFrame(rows))
    print(pd.DataFrame(rows).to_string(index=False))


if __name__ == "__main__":
    sys.exit(told(main))
