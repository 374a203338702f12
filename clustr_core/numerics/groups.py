"""Items by their class, as tables that are padded to the largest."""

import torch
from jaxtyping import Bool, Int
from torch import Tensor


def table_by_class(
    labels: Int[Tensor, " item"], classes: Int[Tensor, " class"] | None = None
) -> tuple[Int[Tensor, "class slot"], Bool[Tensor, "class slot"]]:
    """The indices of the items of each class, in their order, and which slots of the table hold one.

    Args:
        classes: the rows of the table; None for all, 0..C-1.
    """
    counts = torch.bincount(labels)
    starts = counts.cumsum(0) - counts
    if classes is not None:
        counts, starts = counts[classes], starts[classes]
    slots = torch.arange(int(counts.max()), device=counts.device)
    order = labels.argsort(stable=True)
    return order[(starts[:, None] + slots).clamp_max(len(order) - 1)], slots < counts[:, None]
