"""The battery of checks as a whole: is the robust accuracy that an evaluation reports that of the model?"""

import pandas as pd
import torch
from jaxtyping import Int
from torch import Tensor

from clustr_core.attacks.ball import Images
from clustr_core.attacks.result import Model
from clustr_core.measuring import indicators  # noqa: F401  # its checks register themselves, after those of `checks`
from clustr_core.measuring.checks import CHECKS
from clustr_core.measuring.evaluation import Evaluation, random_state_kept

# the check that needs another model, and is left out without one
TRANSFER, SQUARE = "black box: transfer", "black box: Square"


def examine(
    surface: Model,
    model: Model,
    images: Images,
    labels: Int[Tensor, " batch"],
    *,
    eps: float,
    source: Model | None = None,
    steps: int = 20,
    restarts: int = 2,
    step_size: float | None = None,
    queries: int = 300,
    seed: int = 0,
) -> pd.DataFrame:
    """All checks on one evaluation; the global random state is left as it was.

    Args:
        source: another model, for the transfer; without it that one row is absent.
        queries: for Square.
        surface, model, images, labels, eps, steps, restarts, step_size, seed: as in `Evaluation`.
    Returns:
        columns ``check value threshold flagged source meaning``, one row for each of `CHECKS`, in that order.
    """
    with random_state_kept():
        torch.manual_seed(seed)
        evaluation = Evaluation(surface, model, images, labels, eps, steps, restarts, step_size, seed)
        return ask_all(evaluation, source=source, queries=queries)


def ask_all(evaluation: Evaluation, *, source: Model | None = None, queries: int = 300) -> pd.DataFrame:
    """`examine` of an evaluation that is there already, in the random state that the caller left.

    Args:
        source, queries: as in `examine`.
    """
    options = {SQUARE: {"queries": queries}, TRANSFER: {"source": source}}
    asked = asked_with(source is not None)
    return pd.DataFrame([CHECKS[name].ask(evaluation, **options.get(name, {})) for name in asked])


def asked_with(source: bool) -> list[str]:
    """The names of the checks that are asked, with another model to transfer from or without."""
    return [name for name in CHECKS if source or name != TRANSFER]


def verdict(table: pd.DataFrame) -> bool:
    """Whether the battery as a whole flags the evaluation: one witness decides, else it takes symptoms of two kinds.

    Symptoms of one kind have one cause: a sure network's gradients may underflow in float32 without any attack failing.
    Indicators do not count.

    Args:
        table: of `examine`.
    Raises:
        ValueError: if the table holds a check that is not in `CHECKS`.
    """
    if unknown := sorted(set(table["check"]) - set(CHECKS)):
        raise ValueError(f"table: expected checks of {sorted(CHECKS)}, got {unknown}")
    kinds = {CHECKS[check].kind for check in table.loc[table["flagged"], "check"]} - {"indicator"}
    return "witness" in kinds or len(kinds) >= 2
