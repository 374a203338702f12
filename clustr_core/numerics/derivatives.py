"""Gradients computed by hand, which can be differentiated again."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from clustr_core.numerics.rounding import full_precision

Gradients = tuple[Tensor | None, ...]


def gradients_of(
    formula: Callable[..., Tensor | tuple[Tensor, ...]],
    inputs: Sequence[Tensor],
    above: Sequence[Tensor],
    by_hand: Callable[..., Gradients],
) -> Gradients:
    """What the backward pass of an autograd function returns: gradients by hand, with derivatives of every order.

    The gradients themselves are always those computed by hand, bit for bit. Only where they are differentiated again
    (gradient penalties, Hessians) is ``formula`` computed, and autograd differentiates it. Without this a function that
    is marked ``once_differentiable`` yields a gradient that counts as constant, and second derivatives of 0 in silence.

    Args:
        formula: the function in differentiable PyTorch, of ``inputs``.
        inputs: what the function was called with, as ``save_for_backward`` returns it.
        above: the gradients of the function's outputs.
        by_hand: ``above`` to the gradients of ``inputs``; None where one is not wanted.
    """
    if not torch.is_grad_enabled():
        return by_hand(*above)
    return _ByHand.apply(by_hand, formula, len(inputs), *inputs, *above)  # pyright: ignore[reportReturnType]


class _ByHand(torch.autograd.Function):
    """The gradients by hand as a function of inputs and of what comes from above, with the formula's derivatives."""

    @staticmethod
    def forward(
        ctx: Any, by_hand: Callable[..., Gradients], formula: Callable, count: int, *given: Tensor
    ) -> Gradients:
        ctx.formula, ctx.count = formula, count
        ctx.save_for_backward(*given)
        return by_hand(*given[count:])

    @staticmethod
    def backward(ctx: Any, *over: Tensor | None) -> tuple[Tensor | None, ...]:
        again, given = torch.is_grad_enabled(), ctx.saved_tensors
        with torch.enable_grad(), full_precision(given[0].device):
            # what comes from above depends on the inputs too: a node of its own for each keeps the two apart
            leaves = [each.view_as(each) if each.requires_grad else each.detach().requires_grad_() for each in given]
            inputs, above = leaves[: ctx.count], leaves[ctx.count :]
            gradients = torch.autograd.grad(ctx.formula(*inputs), inputs, above, create_graph=True)
            asked = [i for i, each in enumerate(over) if each is not None]
            wanted = [leaf for leaf, needed in zip(leaves, ctx.needs_input_grad[3:], strict=True) if needed]
            found = torch.autograd.grad(
                [gradients[i] for i in asked], wanted, [over[i] for i in asked], create_graph=again, allow_unused=True
            )
        each = iter(found)
        return None, None, None, *(next(each) if needed else None for needed in ctx.needs_input_grad[3:])
