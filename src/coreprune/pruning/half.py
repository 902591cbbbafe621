"""prune(), make_plan() and apply_plan() of models in half precision on the CPU, by way of float32."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import replace
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from coreprune._example import example_like, normalise_example
from coreprune._plain import computed
from coreprune._single import Single, single
from coreprune._twin import guarded
from coreprune.errors import InputError
from coreprune.graph import adopt
from coreprune.pruning.plans.plan import Plan
from coreprune.pruning.validate import check_exclude, counterparts

P = ParamSpec("P")
R = TypeVar("R")


def in_single_precision(function: Callable[P, R]) -> Callable[P, R]:
    """Compute a model in half precision on the CPU in float32, and return what is made of it in its own dtypes.

    function: takes a model, its example and more, and returns a `Result`, a `Plan` or a smaller model.
    """
    signature = inspect.signature(function)

    @functools.wraps(function)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            given = signature.bind(*args, **kwargs).arguments
        except TypeError:
            return function(*args, **kwargs)  # which says what is wrong
        with guarded(given.get("model")):
            found = _single(given)
        if found is None:
            return function(*args, **kwargs)
        changes = {
            "exclude": lambda x: counterparts(check_exclude(x), found.own, found.model),
            "also": found.up,
            "example_inputs": found.up,
        }
        given.update({name: change(given[name]) for name, change in changes.items() if name in given})
        inplace = given.pop("inplace", False)
        made: Any = function(**{**given, "model": found.model})  # type: ignore[call-arg]
        return _returned(made, found, bool(inplace))

    return wrapped


def _single(given: dict[str, Any]) -> Single | None:
    """The model in float32. An example that the plan tells of is added to what was given."""
    plan = given.get("plan")
    try:
        if given.get("example_inputs") is None and isinstance(plan, Plan) and plan.example is not None:
            given["example_inputs"] = example_like(plan.example)
        found = single(given.get("model"), normalise_example(given.get("example_inputs")))
    except InputError:
        return None  # the function itself says what is wrong
    if found is not None and computed(found.own):  # a plan of such a model is one of its copy with plain weights
        return None
    return found


def _returned(made: Any, found: Single, inplace: bool) -> Any:
    if isinstance(made, Plan):
        return _plan(made, found)
    if isinstance(made, nn.Module):
        return _model(made, found, inplace)
    note = "The model was computed in float32, in which the report's numbers hold. Its weights were rounded after that."
    changed = replace(
        made,
        plan=_plan(made.plan, found),
        report=replace(made.report, notes=(*made.report.notes, note)),
        queries=None if made.queries is None else made.queries.changed(found.as_given),
    )
    return replace(changed, model=_model(made.model, found, inplace))  # last: it may change the user's model


def _model(small: nn.Module, found: Single, inplace: bool) -> nn.Module:
    found.down_(small)
    if not inplace:
        return small
    adopt(found.own, small)
    return found.own


def _plan(plan: Plan, found: Single) -> Plan:
    """The plan with an example in the model's own dtype."""
    real = {x.dtype for x in pytree.tree_leaves(found.example) if isinstance(x, Tensor) and x.is_floating_point()}

    def own(x: Any) -> Any:
        if isinstance(x, dict):
            return {k: own(v) if k != "dtype" or v != "float32" else name for k, v in x.items()}
        return [own(v) for v in x] if isinstance(x, list) else x

    name = str(next(iter(real), torch.float32)).removeprefix("torch.")
    return replace(plan, example=own(plan.example))
