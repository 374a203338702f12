"""A method of one's own, in one's own file: its recipe is registered with its objective, and is then as ours are."""

import json
from collections.abc import Callable
from dataclasses import fields
from functools import wraps
from typing import Any, TypeVar, get_args

from torch import Tensor

from clustr_core.numerics.checks import check_version, is_name
from clustr_core.training.fields import build
from clustr_core.training.objectives import objective as objectives
from clustr_core.training.recipes import METHODS, Guarantee, Recipe, Smoothing, recipe_to_dict
from clustr_core.training.step import Step, Terms

_Kind = TypeVar("_Kind", bound=type[Recipe])
# the fields that training reads where a method says that it needs them
NEEDED_FIELDS = {
    "cluster_batches": ("clusters_per_batch", "per_cluster", "gap"),
    "persistent_perturbation": ("replays", "eps", "step_size"),
}


# rows of prototypes have no recipe, and those of clusters fitted to a method's embeddings are called METHOD-clusters
RESERVED = ("prototypes",)


def register_recipe(*, objective: Callable[[Any, Step], Terms] | None = None) -> Callable[[_Kind], _Kind]:
    """A class decorator: the recipe's method trains, resumes, loads, attacks, certifies and is tabled like ours.

    The class is a frozen dataclass that derives from `Recipe`, or from one of ours, with a ``method`` of its own and a
    default for every field. What it promises and needs it says in class variables: ``guarantee``, ``clustered``,
    ``rule``, ``cluster_batches``, ``persistent_perturbation``, ``learnable_centroids``, ``orthonormal_head``; and
    ``version``, which whoever owns it raises when it leads to other weights than before. The module must have been
    imported before a run of the method is loaded: a profile names it under ``plugins``.

    Args:
        objective: the loss of a batch, of the recipe and a `Step`; None keeps that of the class it derives from. It
            draws what is random for the whole batch, takes its own rows by `Step.mine`, and passes them through
            `Step.embed` or `Step.logits`: then it works with several processes and in bfloat16. What it returns is
            checked at each step.
    Raises:
        ValueError: if the class could be trained but not read back; what it lacks is named.
    """

    def register(kind: _Kind) -> _Kind:
        _check_class(kind)
        _check_name(kind)
        _check_fields(kind)
        if objective is not None:
            objectives.register(kind, _checked(objective))
        METHODS[kind.method] = kind
        return kind

    return register


def _checked(objective: Callable[[Any, Step], Terms]) -> Callable[[Any, Step], Terms]:
    """An objective whose losses are known to be what training takes them for."""

    @wraps(objective)
    def checked(recipe: Recipe, step: Step) -> Terms:
        terms, count = objective(recipe, step), len(step.mine(step.labels))
        if not isinstance(terms, Terms):
            raise TypeError(f"{recipe.method}: expected Terms from its objective, got {type(terms).__name__}")
        for name, rows in terms._asdict().items():
            if not (isinstance(rows, Tensor) and rows.shape == (count,)) and (rows is not None or name == "loss"):
                got = list(rows.shape) if isinstance(rows, Tensor) else type(rows).__name__
                raise ValueError(f"{recipe.method}: {name}: expected a loss for each of {count} examples, got {got}")
        if not terms.loss.requires_grad:
            raise ValueError(f"{recipe.method}: loss: expected one with a gradient, got one without")
        return terms

    return checked


def _check_class(kind: type[Recipe]) -> None:
    own = vars(kind).get("__annotations__", {})
    forgotten = [name for name, of in own.items() if "ClassVar" not in str(of) and name not in _names(kind)]
    parameters = vars(kind).get("__dataclass_params__")
    if not issubclass(kind, Recipe) or forgotten or (own and parameters is None):
        raise ValueError(f"{kind.__name__}: expected a dataclass(frozen=True, kw_only=True) that derives from Recipe")


def _check_name(kind: type[Recipe]) -> None:
    """The same class may come again, as when a cell of a notebook is run twice."""
    name = vars(kind).get("method")
    if not is_name(name):
        raise ValueError(f"{kind.__name__}.method: expected a name of its own such as 'my-method', got {name!r}")
    if name in RESERVED or name.endswith("-clusters"):
        raise ValueError(f"{kind.__name__}.method: expected a free name, got {name!r}, which tables use for other rows")
    known = METHODS.get(name, kind)
    if (known.__module__, known.__qualname__) != (kind.__module__, kind.__qualname__):
        raise ValueError(f"{kind.__name__}.method: expected a free name, got {name!r}, which is {known.__name__}'s")


def _check_fields(kind: type[Recipe]) -> None:
    name = kind.__name__
    if kind.guarantee not in get_args(Guarantee):
        raise ValueError(f"{name}.guarantee: expected one of {get_args(Guarantee)}, got {kind.guarantee!r}")
    check_version(kind.version, f"{name}.version")
    if (kind.guarantee == "smoothing") != issubclass(kind, Smoothing):
        raise ValueError(
            f"{name}.guarantee: expected smoothing of a class that derives from Smoothing, and of no other"
        )
    words = [item.name for item in fields(kind) if isinstance(item.type, str) and item.name != "warm_start"]
    if words:
        raise ValueError(f"{name}: expected types, got text for {words} (from __future__ import annotations?)")
    for capability, needed in NEEDED_FIELDS.items():
        if getattr(kind, capability) and (missing := sorted(set(needed) - _names(kind))):
            raise ValueError(f"{name}: expected the fields {missing}, which {capability} needs")
    if (kind.cluster_batches or kind.learnable_centroids) and not kind.clustered:
        raise ValueError(f"{name}.clustered: expected True for a method that trains on clusters")
    try:
        example = kind()
        content = json.loads(json.dumps(recipe_to_dict(example)))
        again = build(kind, {key: value for key, value in content.items() if key != "method"}, name)
    except TypeError as error:
        raise ValueError(f"{name}: expected defaults that JSON can hold ({error})") from error
    if again != example:
        raise ValueError(f"{name}: expected fields that are read back as they were, got {again!r} of {example!r}")


def _names(kind: type[Recipe]) -> set[str]:
    return {item.name for item in fields(kind)}
