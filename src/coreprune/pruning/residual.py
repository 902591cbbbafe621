"""prune(residual="rotate"): the streams of a copy are rotated first, and shrink like any other group."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, ParamSpec, TypeVar, cast

from torch import nn

from coreprune._recast import repeated
from coreprune.errors import InputError
from coreprune.pruning.allocation.budget import Budget
from coreprune.pruning.rotation import Rotated, rotate_residual
from coreprune.pruning.validate import check_exclude, counterparts

P = ParamSpec("P")
R = TypeVar("R")

_ALONE = ("part", "inplace", "stock", "resume")  # arguments that do not go with it
_SHARED = ("queries", "n_queries", "seed", "batch_axis", "tokenizer", "progress")


def with_residual(function: Callable[P, R]) -> Callable[P, R]:
    """Let `residual="rotate"` prune a copy whose residual streams lie on their principal axes.

    function: takes a model, its example and more, and returns a `Result`.

    Raises InputError for another value, and for arguments that do not go with it.
    """
    signature = inspect.signature(function)

    @functools.wraps(function)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> R:
        if (asked := kwargs.get("residual")) is None:
            return function(*args, **kwargs)
        if asked != "rotate" and not isinstance(asked, Rotated):
            raise InputError(f"residual must be None, 'rotate' or a Rotated, not {asked!r}.")
        given = dict(signature.bind(*args, **kwargs).arguments)
        if other := next((name for name in _ALONE if given.get(name)), None):
            raise InputError(
                f"residual='rotate' makes a rotated copy of the whole model, and does not go with {other}=."
            )
        model = given["model"]
        shared = {name: given[name] for name in _SHARED if name in given}
        turned = asked if isinstance(asked, Rotated) else rotate_residual(model, given.get("example_inputs"), **shared)
        if isinstance(asked, Rotated) and model is not asked.model:
            raise InputError("residual is a Rotated of another model. Prune its own: prune(rotated.model, …).")
        if "exclude" in given:
            given["exclude"] = counterparts(check_exclude(given["exclude"]), model, turned.model)
        sizes = _sizes(model)
        changed = {"model": turned.model, "norm_statistics": True, "residual": turned}
        if isinstance(given.get("budget"), Budget):
            changed["budget"] = _of_the_given(given["budget"], sizes)
        made: Any = function(**{**given, **changed})  # type: ignore[call-arg]
        found = [f"{name}, half of its power on {_half(s)} of {len(s)} axes" for name, s in turned.shares.items()]
        note = (
            "The residual stream was rotated to its principal axes first, in a copy that computes the same function: "
            f"{'; '.join(found)}."
        )
        if apart := repeated(model) - repeated(turned.model):
            note += (
                f" Weights that were tied have values of their own there, {apart:,} parameters more. Under a "
                "budget of parameters or bytes as many more have to leave, because it is that of the model as it was."
            )
        recipe = replace(made.recipe, recast=turned.names)
        told = {kind: (size, getattr(made.report, kind)[1]) for kind, size in sizes.items()}
        report = replace(made.report, notes=(*made.report.notes, note), **told)
        return cast(R, replace(made, recipe=recipe, report=report))

    return wrapped


def _sizes(model: nn.Module) -> dict[str, int]:
    """What the given model has: weights that are tied in it are counted once, and in the rotated copy twice."""
    parameters = list(model.parameters())
    held = sum(t.numel() * t.element_size() for t in [*parameters, *model.buffers()])
    return {"parameters": sum(p.numel() for p in parameters), "bytes": held}


def _of_the_given(budget: Budget, sizes: Mapping[str, int]) -> Budget:
    """The budget, with a share of parameters or bytes as a number of the given model's."""
    return budget.in_numbers({"params": sizes["parameters"], "bytes": sizes["bytes"]})


def _half(shares: Any) -> int:
    """On how many axes half of the power lies."""
    return int((shares.cumsum(0) < 0.5).sum()) + 1
