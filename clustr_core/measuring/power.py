"""What the battery is worth: how often each check speaks of evaluations that are wrong, and of honest ones.

An evaluation is called *broken* or *honest* by what it reports beside what correct attacks leave of the same images,
and not by what it is: see `labelled`. None of the checks is told.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import combinations

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from clustr_core.attacks.autoattack import square
from clustr_core.attacks.ball import Images, pgd_endpoint, pgd_path, random_point
from clustr_core.attacks.cells import cell_walk
from clustr_core.attacks.gradient import pgd
from clustr_core.attacks.losses import LOSSES
from clustr_core.attacks.paper import paper_surface
from clustr_core.attacks.result import AttackResult, Watch, predicted
from clustr_core.attacks.temperature import rescaled
from clustr_core.attacks.transfer import transfer
from clustr_core.measuring import indicators
from clustr_core.measuring.accuracy import binomial_interval
from clustr_core.measuring.checks import CHECKS, MATERIAL
from clustr_core.measuring.diagnostics import SQUARE, TRANSFER, asked_with, verdict
from clustr_core.measuring.evaluation import Evaluation, Rule, outputs_of, random_state_kept, share
from clustr_core.measuring.study import with_intervals
from clustr_core.models.classifiers import ClusterClassifier, LinearClassifier

# raised by one when other rows come of the same networks
VERSION = 1
# grey levels of the quantised input, the noise of the stochastic layer, and how often it is drawn for its mean
LEVELS, DEVIATION, DRAWS = 4, 0.3, 16
SATURATED = 1e4
ALL_CORRECT, WHOLE = "PGD on all", "the battery"
# what tells evaluations apart, as far as a table has it
IDENTITY = ("data", "width", "seed", "evaluation")


@dataclass(frozen=True)
class Judged:
    """An evaluation, under a name, of one of three kinds: "protocol" (the paper's), "correct", or "failure".

    Args:
        network: the module that all passes go through: its passes are what a check costs.
    """

    name: str
    kind: str
    evaluation: Evaluation
    network: nn.Module


def evaluations_of(
    networks: Mapping[str, nn.Module],
    images: Images,
    labels: Int[Tensor, " batch"],
    *,
    eps: float,
    steps: int = 20,
    restarts: int = 2,
    seed: int = 0,
) -> Iterator[Judged]:
    """The evaluations by which the checks are measured.

    Of each network the paper's protocol, and a correct attack: PGD on cooled logits, steps of 2.5 eps / steps,
    successes kept. Of the network "ce", if it is there, the failures of `failures`.

    Args:
        networks: by name; logits from images in [0, 1], in evaluation mode.
    """
    size = {"eps": eps, "steps": steps, "restarts": restarts, "seed": seed}
    step_size = 2.5 * eps / steps
    for name, network in networks.items():
        paper = Evaluation(paper_surface(network), network, images, labels, **size)
        yield Judged(f"{name}, paper's", "protocol", paper, network)
        cooled = rescaled(network, images)
        correct = Evaluation(cooled, network, images, labels, **size, step_size=step_size, rule=pgd)
        yield Judged(f"{name}, PGD", "correct", correct, network)
    if "ce" in networks:
        for name, (surface, model, rule, step) in failures(
            networks["ce"], images, eps=eps, step_size=step_size
        ).items():
            evaluation = Evaluation(surface.eval(), model.eval(), images, labels, **size, step_size=step, rule=rule)
            yield Judged(name, "failure", evaluation, networks["ce"])


def failures(
    network: nn.Module, images: Images, *, eps: float, step_size: float
) -> dict[str, tuple[nn.Module, nn.Module, Rule, float]]:
    """Classic failures, made on purpose: what is climbed, what it should have been, the rule, and its step.

    "quantised inputs": rounded to 4 levels, whose gradient is 0 (correct: the rounding is passed straight through).
    "saturating head": logits times 10,000, whose softmax rounds to 1. "step too small": eps / 400. "stochastic layer":
    noise of deviation 0.3 on the input, drawn anew at each pass, judged once at the end and never averaged (correct:
    the mean of 16 draws, which stay). "detached preprocessing": a blur, whose gradient is taken for that of the
    identity. "lost success": the attack stops at a success, and returns the point before it.
    """
    cooled = rescaled(network, images)
    noise = torch.randn(DRAWS, *images.shape[1:], generator=torch.Generator().manual_seed(1)).to(images)
    return {
        "quantised inputs": (_Before(network, _rounded), _Before(network, _straight_through), pgd, step_size),
        "saturating head": (_Before(network, scale=SATURATED), network, pgd, step_size),
        "step too small": (cooled, network, pgd, eps / 400),
        "stochastic layer": (_Noisy(cooled, None), _Noisy(network, noise), last_point, step_size),
        "detached preprocessing": (_Before(cooled, _blurred_unseen), _Before(network, _blurred), pgd, step_size),
        "lost success": (cooled, network, one_step_behind, step_size),
    }


class _Before(nn.Module):
    """A network behind something else."""

    def __init__(
        self, network: nn.Module, before: Callable[[Images], Images] | None = None, scale: float = 1.0
    ) -> None:
        super().__init__()
        self.network, self.before, self.scale = network, before, scale

    def forward(self, images: Images) -> Float[Tensor, "batch class"]:
        """Its logits."""
        return self.scale * self.network(images if self.before is None else self.before(images))

    def embed(self, images: Images) -> Float[Tensor, "batch dim"]:
        """Its embedding."""
        embed = indicators.embedding_of(self.network)
        assert embed is not None
        return embed(images if self.before is None else self.before(images))


class _Noisy(nn.Module):
    """A network that sees noise: new at each pass, or the mean of what it says at some that stays."""

    def __init__(self, network: nn.Module, noise: Float[Tensor, "draw channel height width"] | None) -> None:
        super().__init__()
        self.network, self.noise = network, noise

    def forward(self, images: Images) -> Float[Tensor, "batch class"]:
        """Its logits."""
        if self.noise is None:
            return self.network(images + DEVIATION * torch.randn_like(images))
        return torch.stack([self.network(images + DEVIATION * each) for each in self.noise]).mean(dim=0)

    def embed(self, images: Images) -> Float[Tensor, "batch dim"]:
        """Its embedding, seen through the same noise."""
        embed = indicators.embedding_of(self.network)
        assert embed is not None
        if self.noise is None:
            return embed(images + DEVIATION * torch.randn_like(images))
        return torch.stack([embed(images + DEVIATION * each) for each in self.noise]).mean(dim=0)


def _rounded(images: Images) -> Images:
    return (images * (LEVELS - 1)).round() / (LEVELS - 1)


def _straight_through(images: Images) -> Images:
    return images + (_rounded(images) - images).detach()


def _blurred(images: Images) -> Images:
    return F.avg_pool2d(images, 3, stride=1, padding=1, count_include_pad=False)


def _blurred_unseen(images: Images) -> Images:
    return images + (_blurred(images) - images).detach()


def _rule(*, keeps: bool) -> Callable[[Callable[..., Images]], Rule]:
    """A decorator: a rule that judges one point of each restart, that which the function returns.

    The function is called as ``end_of(model, images, labels, start, climb, told, **walk)``: ``climb`` is the loss,
    ``told`` is told of outputs, and the walk is that of `ball.pgd_path`.

    Args:
        keeps: a success of an earlier restart stays; else the last restart counts.
    """

    def made(end_of: Callable[..., Images]) -> Rule:
        def rule(
            model: nn.Module,
            images: Images,
            labels: Int[Tensor, " batch"],
            *,
            eps: float,
            steps: int,
            step_size: float,
            restarts: int,
            seed: int,
            loss: str = "ce",
            watch: Watch | None = None,
        ) -> AttackResult:
            result = AttackResult.before(images, labels, predicted(model, images, labels))
            generator = torch.Generator(images.device).manual_seed(seed)
            everything = torch.arange(len(images), device=images.device)
            for restart in range(restarts):
                start = random_point(images, eps, "linf", generator)
                told = partial(watch, restart, everything) if watch is not None else lambda outputs: None
                walk = {"eps": eps, "step_size": step_size, "steps": steps}
                points = end_of(model, images, labels, start, LOSSES[loss], told, **walk)
                found = predicted(model, points, labels)
                where = everything[~result.success] if keeps else everything
                result.note(where, points[where], found[where], (found != labels)[where])
            result.gradients.fill_(steps * restarts)
            return result

        rule.__name__, rule.__doc__ = end_of.__name__, end_of.__doc__
        return rule

    return made


@_rule(keeps=True)
def one_step_behind(model, images, labels, start, climb, told, **walk) -> Images:
    """A rule that loses its successes: it stops at one, and returns the point from which the last step was taken."""
    kept, done = start.clone(), torch.zeros_like(labels, dtype=torch.bool)
    for points in pgd_path(lambda x: climb(model(x), labels), images, start, **walk):
        outputs = outputs_of(model, points)
        told(outputs)
        done |= outputs.argmax(dim=1) != labels
        kept[~done] = points[~done]
    return kept


@_rule(keeps=False)
def last_point(model, images, labels, start, climb, told, **walk) -> Images:
    """A rule that judges once: where the walk of each restart ends, right or wrong, whatever it passed."""

    def climbed(x: Images) -> Tensor:
        outputs = model(x)
        told(outputs.detach())
        return climb(outputs, labels)

    return pgd_endpoint(climbed, images, start, **walk)


def worst_case(judged: Judged, source: nn.Module | None = None) -> Bool[Tensor, " batch"]:
    """Which images all correct attacks leave: PGD by each of three losses on cooled logits (50 steps, 2 restarts), cell
    walk where there are cells, Square (1,000 queries), and images of another network."""
    evaluation = judged.evaluation
    model, images, labels, eps = evaluation.model, evaluation.images, evaluation.labels, evaluation.eps
    cooled = rescaled(model, images)
    size = {"eps": eps, "step_size": 2.5 * eps / 50, "steps": 50, "seed": 1}
    found = [pgd(cooled, images, labels, restarts=2, loss=loss, **size) for loss in LOSSES]
    found.append(square(cooled, images, labels, norm="linf", eps=eps, queries=1000, seed=1))
    if isinstance(model, ClusterClassifier | LinearClassifier):
        found.append(cell_walk(model, images, labels, rivals=3, **size))
    if source is not None:
        found.append(transfer(source, model, images, labels, **size))
    return ~torch.stack([each.success for each in found]).any(dim=0)


def measured(
    judged: Judged, *, source: nn.Module | None = None, queries: int = 300, worst: float | None = None
) -> pd.DataFrame:
    """Every check on one evaluation.

    Args:
        source: another network, to transfer from.
        queries: for Square.
        worst: what correct attacks leave of these images, where that is known; None measures it (`worst_case`).
    Returns:
        columns ``evaluation kind images reported worst check value flagged gradients``: robust accuracies in [0, 1] as
        reported and as correct attacks leave it, and what the check cost, in input gradients for each image (a pass
        without gradient is a third of one), beyond the evaluation itself; binarisation tries 32 images, and all share
        its price.
    """
    evaluation = judged.evaluation
    worst = share(worst_case(judged, source)) if worst is None else worst
    options = {SQUARE: {"queries": queries}, TRANSFER: {"source": source}}
    rows = []
    with random_state_kept():
        torch.manual_seed(0)
        reported = evaluation.robust_accuracy
        for name in asked_with(source is not None):
            others = [source] if name == TRANSFER and source is not None else []
            with _Passes(judged.network, *others) as passes:
                found = CHECKS[name].ask(evaluation, **options.get(name, {}))
            rows.append((name, found.value, found.flagged, passes.gradients / len(evaluation.labels)))
    table = pd.DataFrame(rows, columns=["check", "value", "flagged", "gradients"])
    first = {"evaluation": judged.name, "kind": judged.kind, "images": len(evaluation.labels)}
    return pd.DataFrame({**first, "reported": reported, "worst": worst, **table})


class _Passes:
    """Counts the images that pass through networks within a block: a third of a gradient each, or one with it."""

    def __init__(self, *networks: nn.Module) -> None:
        self.networks, self.gradients = networks, 0.0
        self._hooks: list[RemovableHandle] = []

    def __enter__(self) -> "_Passes":
        through = [getattr(network, "encoder", network) for network in self.networks]
        self._hooks = [each.register_forward_hook(self._count) for each in through]
        return self

    def __exit__(self, *_: object) -> None:
        for hook in self._hooks:
            hook.remove()

    def _count(self, module: nn.Module, given: object, outputs: Tensor) -> None:
        self.gradients += len(outputs) / 3
        if outputs.requires_grad:
            outputs.register_hook(self._count_backward)

    def _count_backward(self, gradient: Tensor) -> None:
        self.gradients += 2 * len(gradient) / 3


def planted_found(network: nn.Module, images: Images, labels: Int[Tensor, " batch"], *, eps: float) -> dict[str, int]:
    """In how many images an adversarial one can be planted (`indicators.planted`), and at how many the book's PGD finds
    it: on cooled logits, by cross-entropy and margin, 40 steps, 2 restarts; where it does not, 10 restarts.

    Returns:
        ``images planted found found_in_ten``.
    """
    evaluation = Evaluation(rescaled(network, images), network, images, labels, eps, rule=pgd)
    counts = {"images": len(images), "planted": 0, "found": 0, "found_in_ten": 0}
    for each in indicators.planted(evaluation, count=len(images)):
        at_once = _finds(each, restarts=2)
        counts["planted"] += 1
        counts["found"] += at_once
        counts["found_in_ten"] += at_once or _finds(each, restarts=10)
    return counts


def _finds(evaluation: Evaluation, *, restarts: int) -> bool:
    """Whether the book's PGD breaks the one image of an evaluation."""
    cooled = rescaled(evaluation.model, evaluation.images)
    size = {"eps": evaluation.eps, "step_size": evaluation.eps / 16, "steps": 40, "restarts": restarts}
    tried = (pgd(cooled, evaluation.images, evaluation.labels, loss=loss, **size) for loss in ("ce", "margin"))
    return any(bool(result.success) for result in tried)


# tables


def labelled(rows: pd.DataFrame) -> pd.DataFrame:
    """The rows with a column ``truth``: "broken" if more than 5 points are reported too much, "honest" if at most one
    image is, or too little, else "unclear"."""
    gap = rows["reported"] - rows["worst"]
    truth = np.select([gap > MATERIAL, gap.abs() < 1.5 / rows["images"]], ["broken", "honest"], "unclear")
    return rows.assign(truth=truth)


def judged_whole(rows: pd.DataFrame) -> pd.DataFrame:
    """The rows with one more for each evaluation: the battery's own verdict, as the check "the battery"."""
    identity = [name for name in IDENTITY if name in rows]
    wholes = []
    for _, found in rows.groupby(identity, sort=False):
        spoke = verdict(pd.DataFrame(found))
        whole = {"check": WHOLE, "value": float(spoke), "flagged": spoke, "gradients": found["gradients"].sum()}
        wholes.append(pd.DataFrame(found.iloc[:1]).assign(**whole))
    return pd.concat([rows, *wholes], ignore_index=True)


def rates(rows: pd.DataFrame) -> pd.DataFrame:
    """How often each check, and the battery as a whole, speaks of broken evaluations, and of honest ones, with 95 %
    intervals (which take evaluations for independent), and what it costs.

    Args:
        rows: of `measured`, of many evaluations, with columns that tell them apart.
    Returns:
        columns ``check truth spoke of share low high gradients``, a row for each check and truth.
    Raises:
        ValueError: unless there are broken evaluations and honest ones.
    """
    known = labelled(judged_whole(rows)).query("truth != 'unclear'")
    if set(known["truth"]) != {"broken", "honest"}:
        raise ValueError(f"rows: expected broken and honest evaluations, got {sorted(set(known['truth']))}")
    costs = pd.Series(known.groupby("check")["gradients"].median()).to_dict()
    found = known.groupby(["check", "truth"], sort=False).agg(spoke=("flagged", "sum"), of=("flagged", "size"))
    found = found.reset_index()
    bounds = [binomial_interval(spoke, of) for spoke, of in zip(found["spoke"], found["of"], strict=True)]
    low, high = zip(*bounds, strict=True)
    priced = found.assign(share=found["spoke"] / found["of"], low=low, high=high)
    return priced.assign(gradients=[costs[check] for check in priced["check"]])


def by_evaluation(rows: pd.DataFrame) -> pd.DataFrame:
    """How often each check, and the battery, speaks of each evaluation, over widths and seeds: the paper's protocol on
    each network, the correct attacks on all of them together, and each failure.

    Returns:
        columns ``check evaluation kind spoke of share broken``; ``broken`` is the share of those evaluations that are.
    """
    known = labelled(judged_whole(rows))
    together = known["evaluation"].where(known["kind"] != "correct", ALL_CORRECT)
    known = known.assign(evaluation=together, is_broken=known["truth"] == "broken")
    groups = known.groupby(["evaluation", "kind", "check"], sort=False)
    found = groups.agg(spoke=("flagged", "sum"), of=("flagged", "size"), broken=("is_broken", "mean")).reset_index()
    return found.assign(share=found["spoke"] / found["of"])


def rates_table(rows: pd.DataFrame) -> pd.DataFrame:
    """`rates` in words: a row each check, the most telling first (its share of broken evaluations less that of honest
    ones), with "k of n" and intervals in per cent, and what it costs."""
    found = rates(rows)
    cells = found.assign(
        counts=[f"{spoke} of {of}" for spoke, of in zip(found["spoke"], found["of"], strict=True)],
        shares=with_intervals(found, "share"),
    )
    wide = cells.pivot(index="check", columns="truth", values=["counts", "shares", "share"])
    telling = pd.Series(wide["share"]["broken"] - wide["share"]["honest"], index=wide.index)
    order = telling.sort_values(ascending=False, kind="stable").index
    wide, costs = wide.loc[order], found.drop_duplicates("check").set_index("check")["gradients"].loc[order]
    return pd.DataFrame(
        {
            "check": order,
            "broken": wide["counts"]["broken"].to_numpy(),
            "of broken, %": wide["shares"]["broken"].to_numpy(),
            "honest": wide["counts"]["honest"].to_numpy(),
            "of honest, %": wide["shares"]["honest"].to_numpy(),
            "gradients": [f"{cost:,.0f}" if cost >= 1 else f"{cost:.1g}" for cost in costs],
        }
    )


def pairs(rows: pd.DataFrame) -> pd.DataFrame:
    """Pairs of checks, of which one speaking is enough: what they catch, and at what cost; the best first.

    Args:
        rows: as `rates`; a check that was not asked of an evaluation is silent about it.
    Returns:
        columns ``first second hits broken alarms honest gradients``, by most hits less alarms, then by least cost.
    """
    known = labelled(rows).query("truth != 'unclear'")
    identity = [name for name in IDENTITY if name in rows]
    said = known.pivot_table(index=[*identity, "truth"], columns="check", values="flagged", aggfunc="max", sort=False)
    said = said.fillna(False).astype(bool)
    cost = known.groupby("check")["gradients"].median()
    broken = np.array(said.index.get_level_values("truth") == "broken")
    rows_of = []
    for first, second in combinations(said.columns, 2):
        spoke = (said[first] | said[second]).to_numpy()
        hits, alarms = int((spoke & broken).sum()), int((spoke & ~broken).sum())
        counts = (hits, int(broken.sum()), alarms, int((~broken).sum()))
        rows_of.append((first, second, *counts, cost[first] + cost[second]))
    table = pd.DataFrame(rows_of, columns=["first", "second", "hits", "broken", "alarms", "honest", "gradients"])
    return (
        table.assign(best=table["hits"] / table["broken"] - table["alarms"] / table["honest"])
        .sort_values(["best", "gradients"], ascending=[False, True], ignore_index=True)
        .drop(columns="best")
    )
