"""Suites about attacks: PGD beside its bare gradients, the published libraries, AutoAttack, and a whole evaluation."""

import copy
import importlib.util
import math
import sys
import tempfile
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import ModuleType

import torch
from pyautoattack import AutoAttack
from torch import Tensor, nn

from benchmarks.harness import Call, Effort, Row, interleaved
from clustr_core import data
from clustr_core.attacks.autoattack import PARTS, autoattack
from clustr_core.attacks.ball import pgd_path, random_point
from clustr_core.attacks.gradient import pgd
from clustr_core.attacks.losses import cross_entropy
from clustr_core.models.encoders import build_encoder, to_channels_last_frozen
from clustr_core.training.loop import fit
from clustr_core.training.recipes import CrossEntropy

EPS, STEP = 8 / 255, 2 / 255
SURVIVORS = 0.3


def unbreakable(width: int, batch: int) -> tuple[nn.Module, Tensor, Tensor]:
    """A random ResNet-18 whose first class no small step can leave, images and labels: no example is ever dropped.

    Its cross-entropy is small, but not rounded to 0.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        encoder = build_encoder("resnet18", (3, 32, 32), width=width)
        head = nn.Linear(encoder.embedding_dim, 10)
    with torch.no_grad():
        head.weight *= 1e-2
        head.bias[0] = 8.0
    model = nn.Sequential(encoder, head).eval().requires_grad_(False)
    images = torch.rand(batch, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    return model, images, torch.zeros(batch, dtype=torch.long)


def bare_gradients(model: nn.Module, images: Tensor, labels: Tensor, steps: int) -> None:
    """Forward and input gradient, so many times, and nothing else."""
    for _ in range(steps):
        x = images.detach().requires_grad_()
        torch.autograd.grad(cross_entropy(model(x), labels).sum(), x)


def forwards(model: nn.Module, call: Call) -> int:
    """How many forward passes a call makes."""
    made = []
    hook = model.register_forward_hook(lambda *_: made.append(1))
    call()
    hook.remove()
    return len(made)


def _verdict(model: nn.Module, images: Tensor) -> None:
    with torch.no_grad():
        model(images)


def pgd_overhead(effort: Effort) -> list[Row]:
    """PGD beside its bare gradients, in NCHW and in channels_last, its verdicts' forward passes taken off."""
    width, batch, steps = effort.pick((32, 64, 20), (2, 4, 3))
    model, images, labels = unbreakable(width, batch)
    # as `Run.model` lays out a finished network
    beside = copy.deepcopy(model)
    to_channels_last_frozen(beside)

    def ours(network: nn.Module) -> None:
        found = pgd(network, images, labels, eps=EPS, step_size=STEP, steps=steps)
        assert int(found.gradients.sum()) == steps * batch

    verdicts = forwards(model, partial(ours, model)) - steps
    times = interleaved(
        {
            "bare": partial(bare_gradients, model, images, labels, steps),
            "pgd": partial(ours, model),
            "verdict": partial(_verdict, model, images),
            "fast": partial(ours, beside),
            "fast verdict": partial(_verdict, beside, images),
        },
        effort,
    )
    times = times.less("pgd", "verdict", verdicts, "pgd alone").less("fast", "fast verdict", verdicts, "fast alone")
    setting = f"ResNet-18 of width {width}, {batch} images of 3 x 32 x 32, {steps} steps, none broken"
    bare = "bare forward + input gradient"
    without = f"pgd less its {verdicts} verdicts / {bare}"
    return [
        Row("pgd", "pgd", times.ratio("pgd alone", "bare"), "ratio", without, setting, 1.03, times.rounds),
        Row("pgd", "pgd, channels_last", times.ratio("fast alone", "bare"), "ratio",
            f"{without} in NCHW", setting, 0.9, times.rounds),
        Row("pgd", "pgd, verdicts included", times.ratio("pgd", "bare"), "ratio",
            f"pgd / {bare}", setting, rounds=times.rounds),
    ]  # fmt: skip


def adversarial_library() -> ModuleType | None:
    """adv-lib's attacks, if it is installed; it imports visdom, a display, which it does not use here."""
    if not importlib.util.find_spec("adv_lib"):
        return None
    if not importlib.util.find_spec("visdom"):
        sys.modules.setdefault("visdom", ModuleType("visdom")).__dict__.setdefault("Visdom", None)
    with warnings.catch_warnings():
        # of distutils, on import
        warnings.simplefilter("ignore", DeprecationWarning)
        return importlib.import_module("adv_lib.attacks")


def libraries(effort: Effort) -> list[Row]:
    """PGD and APGD, ours and the libraries', whole calls: time of an image-gradient beside a bare one."""
    with warnings.catch_warnings():
        # of a SciPy module, on import
        warnings.simplefilter("ignore", DeprecationWarning)
        import foolbox
        import torchattacks

    width, batch, steps = effort.pick((8, 32, 20), (2, 4, 3))
    model, images, labels = unbreakable(width, batch)
    their = adversarial_library()
    wrapped = foolbox.PyTorchModel(model, bounds=(0, 1), device="cpu")
    of_foolbox = foolbox.attacks.LinfPGD(abs_stepsize=STEP, steps=steps)
    apgd_steps = effort.pick(100, 3)
    calls: dict[str, tuple[int, Call | None]] = {
        "pgd": (steps, partial(pgd, model, images, labels, eps=EPS, step_size=STEP, steps=steps)),
        "pgd of torchattacks": (
            steps, partial(torchattacks.PGD(model, eps=EPS, alpha=STEP, steps=steps), images, labels)),
        "pgd of foolbox": (steps, lambda: of_foolbox(wrapped, images, labels, epsilons=EPS)),
        "pgd of adv-lib": (
            steps, their and partial(their.pgd_linf, model, images, labels, EPS, steps=steps, absolute_step_size=STEP)),
        "apgd": (apgd_steps, partial(_library_apgd, model, images, labels, apgd_steps)),
        "apgd of torchattacks": (
            apgd_steps, partial(torchattacks.APGD(model, eps=EPS, steps=apgd_steps), images, labels)),
        "apgd of adv-lib": (
            apgd_steps, their and partial(their.apgd, model, images, labels, EPS, math.inf, n_iter=apgd_steps,
                                          loss_function="ce")),
    }  # fmt: skip
    present = {name: call for name, (_, call) in calls.items() if call}
    times = interleaved({"bare": partial(bare_gradients, model, images, labels, steps), **present}, effort)
    rows = []
    for name, (count, call) in calls.items():
        setting = f"ResNet-18 of width {width}, {batch} images of 3 x 32 x 32, {count} steps, none broken"
        ratio = times.ratio(name, "bare") * steps / count if call else math.nan
        where = setting if call else "adv-lib is not installed here"
        compared = "whole call for each image-gradient / bare forward + input gradient"
        rows.append(Row("libraries", name, ratio, "ratio", compared, where, rounds=times.rounds))
    return rows


def _library_apgd(model: nn.Module, images: Tensor, labels: Tensor, steps: int) -> Tensor:
    """The APGD that `attacks.autoattack` runs, by its own package, with the number of steps open."""
    with torch.random.fork_rng(devices=[]):
        found = AutoAttack(model, norm="Linf", eps=EPS, seed=0, version="standard", device=images.device)
        found.apgd.loss, found.apgd.n_iter = "ce", steps
        return found.apgd.perturb(images, labels)


def whole_autoattack(effort: Effort) -> list[Row]:
    """AutoAttack through our adapter beside the library's own four parts, one after the other on what is left, and
    beside the authors' own loop around them, which asks first whether the model is random."""
    width, count = effort.pick((8, 16), (2, 2))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        encoder = build_encoder("small-cnn", (1, 16, 16), width=width).eval()
        model = nn.Sequential(encoder, nn.Linear(encoder.embedding_dim, 5)).requires_grad_(False)
    images = torch.rand(count, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    labels, eps = model(images).argmax(dim=1), 0.01
    parts = effort.pick(PARTS["standard"], ("apgd-ce",))

    def made() -> AutoAttack:
        theirs = AutoAttack(model, norm="Linf", eps=eps, seed=0, version="standard", device=images.device)
        theirs.apgd_targeted.n_target_classes = theirs.fab.n_target_classes = 4
        return theirs

    def loop() -> Tensor:
        with torch.random.fork_rng(devices=[]):
            theirs = made()
            theirs.attacks_to_run = list(parts)
            return theirs.run_standard_evaluation(images, labels)[0]

    def library() -> Tensor:
        with torch.random.fork_rng(devices=[]):
            theirs = made()
            theirs.apgd.loss, theirs.fab.targeted, theirs.fab.n_restarts = "ce", True, 1
            attacks = (theirs.apgd, theirs.apgd_targeted, theirs.fab, theirs.square)
            left = torch.arange(len(images))
            for part in attacks[: len(parts)]:
                moved = part.perturb(images[left].clone(), labels[left])
                left = left[model(moved).argmax(dim=1) == labels[left]]
            return left

    ours = partial(autoattack, model, images, labels, norm="linf", eps=eps, parts=parts)
    if (~ours().success).nonzero().flatten().tolist() != library().tolist():
        raise ValueError("autoattack: expected the library's verdicts")
    times = interleaved({"ours": ours, "library": library, "loop": loop}, effort)
    setting = f"small CNN of width {width}, {count} images of 1 x 16 x 16, 5 classes, eps {eps:g}"
    compared = "autoattack / pyautoattack's four parts"
    beside, whole = times.ratio("ours", "library"), times.ratio("ours", "loop")
    return [
        Row("autoattack", "autoattack", beside, "ratio", compared, setting, 1.05, times.rounds),
        Row("autoattack", "autoattack, the authors' own loop", whole, "ratio",
            "autoattack / pyautoattack's run_standard_evaluation", setting, 1.05, times.rounds),
    ]  # fmt: skip


def evaluation(effort: Effort) -> list[Row]:
    """PGD with restarts on a model of which three in ten images survive, beside one that never drops an image."""
    dataset = data.load_dataset(effort.pick("mnist5k", "digits"))
    width, epochs, count = effort.pick((16, 4, 512), (4, 1, 32))
    steps, restarts = effort.pick((20, 10), (3, 2))
    recipe = CrossEntropy(dataset=dataset.name, width=width, epochs=epochs, train_examples=effort.pick(None, 200))
    with tempfile.TemporaryDirectory() as folder:
        model = fit(recipe, dataset=dataset, folder=Path(folder), device="cpu", progress=False).model()
    model.requires_grad_(False)
    images, labels = data.to_float(dataset.test_images[:count]), dataset.test_labels[:count]

    def attack(eps: float, restarts: int = restarts):
        return pgd(model, images, labels, eps=eps, step_size=2.5 * eps / steps, steps=steps, restarts=restarts)

    eps = bisected(lambda eps: float((~attack(eps, 1).success).double().mean()), SURVIVORS)
    whole = {"eps": eps, "step_size": 2.5 * eps / steps, "steps": steps, "restarts": restarts}
    found, every = attack(eps), every_gradient(model, images, labels, **whole)
    agreement = (found.success == every).double().mean()
    if agreement < 0.99:
        raise ValueError(f"pgd: expected the verdicts of the attack that drops nothing, got {agreement:.3f} of them")
    times = interleaved(
        {"ours": partial(attack, eps), "every": partial(every_gradient, model, images, labels, **whole)}, effort
    )
    share = 100 * (~found.success).double().mean()
    setting = (
        f"{dataset.name}, small CNN of width {width}, {count} images, eps {eps:.3f}, {share:.0f} % survive, "
        f"{steps} steps x {restarts} restarts"
    )
    spent = int(found.gradients.sum()) / (steps * restarts * count)
    compared = "pgd / every step of every restart on every image"
    return [
        Row("evaluation", "whole evaluation, seconds", times.ratio("ours", "every"), "ratio",
            compared, setting, 0.35, times.rounds),
        Row("evaluation", "whole evaluation, gradients", spent, "ratio", compared, setting, 0.35),
    ]  # fmt: skip


def bisected(share: Callable[[float], float], wanted: float) -> float:
    """The eps in (0, 0.5) at which a falling share is nearest to what is wanted, in eight halvings."""
    low, high = 0.0, 0.5
    for _ in range(8):
        middle = (low + high) / 2
        low, high = (middle, high) if share(middle) > wanted else (low, middle)
    return (low + high) / 2


def every_gradient(
    model: nn.Module, images: Tensor, labels: Tensor, *, eps: float, step_size: float, steps: int, restarts: int
) -> Tensor:
    """What the same attack breaks, from the same starts, where every gradient is spent on every image."""
    broken = torch.zeros(len(images), dtype=torch.bool)
    generator = torch.Generator().manual_seed(0)

    def climb(x: Tensor) -> Tensor:
        logits = model(x)
        broken.logical_or_(logits.detach().argmax(dim=1) != labels)
        return cross_entropy(logits, labels)

    with torch.no_grad():
        broken |= model(images).argmax(dim=1) != labels
    for _ in range(restarts):
        start = random_point(images, eps, "linf", generator)
        *_, last = pgd_path(climb, images, start, eps=eps, step_size=step_size, steps=steps)
        with torch.no_grad():
            broken |= model(last).argmax(dim=1) != labels
    return broken
