"""What `test_processes` has two processes do, the recipes that it trains, and what begins these processes.

several.py      reads lines of JSON, each a folder and its tasks, and answers each by how the two processes ended
"""

import json
import multiprocessing
import os
import signal
import socket
import sys
from multiprocessing.connection import wait
from pathlib import Path

import torch

from clustr_core import data
from clustr_core.measuring import attacked, pieces
from clustr_core.measuring.attacked import attacks_of
from clustr_core.measuring.certified import certificates_of
from clustr_core.measuring.profile import Profile, Protocol, SandwichBudget, SmoothingBudget
from clustr_core.measuring.sandwiched import sandwich_of
from clustr_core.models.classifiers import LinearClassifier
from clustr_core.storage.files import digest, write_json
from clustr_core.training import loop, refresh
from clustr_core.training.objectives import objective
from clustr_core.training.processes import Processes, join
from clustr_core.training.recipes import (
    AdversarialTraining,
    Clustr,
    ClustrCert,
    ClustrLip,
    ClustrQTrades,
    CrossEntropy,
    FastAdversarialTraining,
    FreeAdversarialTraining,
    FreeClustr,
    LipschitzMargin,
    Smoothing,
    Trades,
)
from clustr_core.training.run import load_run
from clustr_core.training.step import Step

# 101 examples in batches of 50: the last has one row, so that the second process has nothing but padding
SMALL = {"width": 4, "train_examples": 101, "batch_size": 50, "epochs": 2, "optimiser": "sgd", "learning_rate": 2e-3}
MOVED = {"eps": 0.1, "step_size": 0.05}
# batches of 15 rows
ODD = {"clusters_per_batch": 5, "per_cluster": 3} | SMALL
LIPSCHITZ = {"encoder": "lip-mlp", "schedule": "triangle", "width": 16}
START = CrossEntropy(**SMALL | {"epochs": 1})
RECIPES = {
    "ce": CrossEntropy(augmentation="crop", **SMALL),
    "pgd-at": AdversarialTraining(steps=2, **MOVED, **SMALL),
    "trades": Trades(steps=2, **MOVED, **SMALL),
    "free-at": FreeAdversarialTraining(replays=2, **MOVED, **SMALL),
    "fast-at": FastAdversarialTraining(**MOVED, **SMALL),
    "clustr": Clustr(warm_start=START, snapshots=(0, 2), **ODD),
    "clustr-qtrades": ClustrQTrades(warm_start=START, augmentation="crop-flip", **MOVED, **ODD),
    "free-clustr": FreeClustr(warm_start=START, replays=2, **MOVED, **ODD),
    "clustr-lip": ClustrLip(**ODD | LIPSCHITZ),
    "clustr-cert": ClustrCert(**SMALL | LIPSCHITZ),
    "lip-linear": LipschitzMargin(**SMALL | LIPSCHITZ),
    "clustr-cert, annealed": ClustrCert(loss="annealed", **SMALL | LIPSCHITZ),
    "lip-linear, emma": LipschitzMargin(loss="emma", **SMALL | LIPSCHITZ),
    "smoothing": Smoothing(noise=0.2, **SMALL),
    "clustr, adam": Clustr(**ODD | {"optimiser": "adam", "learning_rate": 1e-3}),
}
BF16 = AdversarialTraining(steps=2, precision="bf16-mixed", **MOVED, **SMALL)
BATCH_NORM = ClustrQTrades(**MOVED, **ODD | {"encoder": "resnet18", "width": 8, "epochs": 1})
LONG = FreeClustr(replays=2, **MOVED, **ODD | {"epochs": 4})
PROFILE = Profile(
    "several",
    {},
    {
        "linf": Protocol(eps=(0.05, 0.1), steps=2, examples=37, losses=("ce", "margin")),
        "walk": Protocol(attack="cell-walk", eps=(0.1,), steps=2, restarts=1, examples=20),
    },
    certified_examples=37,
    sandwich=SandwichBudget(examples=12, steps=2, points=3),
    smoothing=SmoothingBudget(examples=12, samples=20, selection_samples=5, failure_prob=0.1),
)
# seconds that two processes may take
TIMEOUT = 300
MEASURED = ("ce", "clustr", "clustr-cert", "lip-linear", "smoothing")
CHUNK = 5


def fit(recipe, folder: Path):
    return loop.fit(recipe, dataset=data.load_dataset("digits"), folder=folder, device="cpu", progress=False)


def trained(folder: Path, only=None) -> dict:
    """Every recipe, and what each process holds at the end of it."""
    held = {}
    real_finish, real_sampler = loop.finish, refresh.ClusterBatches
    samplers = []

    class Noted(real_sampler):
        def __init__(self, *arguments, **options):
            super().__init__(*arguments, **options)
            samplers.append(self)

    def finish(path, recipe, state, *arguments, **options):
        tensors = [*state.network.state_dict().values(), state.generator.get_state()]
        if state.perturbation is not None:
            tensors.append(state.perturbation)
        states = [json.dumps(sampler.state_dict()) for sampler in samplers]
        held[path.name] = digest(*states, *(tensor.numpy().tobytes() for tensor in tensors))
        held[f"{path.name} samplers"] = len(samplers)
        samplers.clear()
        real_finish(path, recipe, state, *arguments, **options)

    loop.finish, refresh.ClusterBatches = finish, Noted
    several = RECIPES | {"bf16": BF16, "batch-norm": BATCH_NORM, "long": LONG}
    for name, recipe in several.items():
        run = fit(recipe, folder / name)
        held[f"{name} run"] = [str(run.path), digest(run.history.to_csv())]
    loop.finish, refresh.ClusterBatches = real_finish, real_sampler
    return held


def magnet_gradient(processes: Processes, *, penalty: bool = False) -> torch.Tensor:
    """d/dw of the sum of weighted magnet losses of a batch of 7, in double precision, from each process's own rows.

    With a penalty, of the square of that sum's gradient by the images.
    """
    g = torch.Generator().manual_seed(3)
    images, weights = torch.rand(7, 1, 4, 4, generator=g).double(), torch.rand(7, generator=g).double()
    torch.manual_seed(4)
    network = LinearClassifier(torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(16, 3)), 3, 2).double()
    assignments = torch.tensor([0, 0, 1, 1, 2, 2, 3])
    step = Step(network, images.requires_grad_(), assignments // 2, g, assignments, None, processes)
    loss = objective(Clustr(), step).loss
    total = processes.unpadded_shard(loss * step.mine(weights), 7).sum()
    if penalty:
        total = torch.autograd.grad(total, images, create_graph=True)[0].square().sum()
    total.backward(inputs=list(network.encoder.parameters()))
    gradients = [parameter.grad for parameter in network.encoder.parameters()]
    processes.add_up(gradients)
    return torch.cat([gradient.flatten() for gradient in gradients])


def gathered(processes: Processes) -> dict:
    """What parts and wholes are, for more and for fewer rows than processes, and the gradient through a whole."""
    shapes = {}
    for total in (1, 2, 5):
        rows = torch.arange(total).double()[:, None]
        part = processes.shard(rows)
        assert torch.equal(processes.gathered(part, total), rows)
        shapes[str(total)] = [part.flatten().tolist(), processes.unpadded_shard(part, total).flatten().tolist()]
    word = processes.from_first(lambda: f"said by {processes.rank}")
    gradients = {str(penalty): magnet_gradient(processes, penalty=penalty).tolist() for penalty in (False, True)}
    return {"parts": shapes, "word": word, "gradients": gradients}


def tables(folder: Path) -> dict:
    """The table of every measurement of some runs, and which pieces this process made."""
    made, real, chunk = [], pieces.write_table, pieces.CHUNK

    def noted(path, table, **options):
        made.append(str(path))
        real(path, table, **options)

    pieces.write_table, pieces.CHUNK = noted, CHUNK
    found = {}
    for name in MEASURED:
        run = load_run(folder / name)
        asked = {"certificates": certificates_of}
        if name != "smoothing":
            asked["attacks"] = attacks_of
        if run.recipe.guarantee == "lipschitz":
            asked["sandwich"] = sandwich_of
        for kind, measure in asked.items():
            found[f"{kind}-{name}"] = measure(
                run, PROFILE, dataset=data.load_dataset("digits"), progress=False
            ).to_csv()
    pieces.write_table, pieces.CHUNK = real, chunk
    return {"tables": found, "made": made}


def die_in_the_second_epoch(rank: int) -> None:
    real = loop.train_epoch

    def epoch(recipe, state, *arguments):
        if rank == 1 and state.epoch == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(recipe, state, *arguments)

    loop.train_epoch = epoch


def die_after_two_pieces(rank: int) -> None:
    real, made = attacked.attack_rows, []

    def rows(*arguments):
        if rank == 1 and len(made) == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        made.append(1)
        return real(*arguments)

    attacked.attack_rows = rows


def main(folder: Path, tasks: list[str]) -> None:
    torch.set_num_threads(1)
    processes = join("cpu")
    for task in tasks:
        match task:
            case "train":
                told = trained(folder)
            case "gather":
                told = gathered(processes)
            case "measure":
                told = tables(folder)
            case "lose-a-training":
                die_in_the_second_epoch(processes.rank)
                fit(LONG, folder / "lost")
            case "resume":
                told = {"epochs": len(fit(LONG, folder / "lost").history)}
            case "lose-an-attack":
                die_after_two_pieces(processes.rank)
                tables(folder)
        write_json(folder / f"{task}-{processes.rank}.json", told)


def begin(folder: str, tasks: list[str], port: int, rank: int) -> None:
    """One of two processes, with what torchrun gives to each."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "CLUSTR_HOME": f"{folder}/home"}
    output = os.open(f"{folder}/output", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(output, stream)
    main(Path(folder), tasks)


def ended(folder: str, tasks: list[str]) -> list[int | None]:
    """How two processes end that are begun by forking this one; if one fails, or is late, the other ends with it."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    fork = multiprocessing.get_context("fork")
    two = [fork.Process(target=begin, args=(folder, tasks, port, rank)) for rank in (0, 1)]
    for process in two:
        process.start()
    if not wait([process.sentinel for process in two], TIMEOUT) or any(process.exitcode for process in two):
        for process in two:
            process.terminate()
    for process in two:
        process.join(TIMEOUT)
        process.kill()
        process.join()
    return [process.exitcode for process in two]


if __name__ == "__main__":
    import lightning_fabric  # noqa: F401  loaded once, as PyTorch is

    for line in sys.stdin:
        print(json.dumps(ended(*json.loads(line))), flush=True)
