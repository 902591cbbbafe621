"""prune(), make_plan() and apply_plan() over several processes: every process calls them, with the same arguments."""

from __future__ import annotations

import functools
import zlib
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from coreprune import _ranks
from coreprune._example import describe_example
from coreprune.errors import InputError
from coreprune.graph import Traced
from coreprune.pruning.allocation.budget import Budget

P = ParamSpec("P")
R = TypeVar("R")


def over_ranks(function: Callable[P, R]) -> Callable[P, R]:
    """Let all processes of an initialised process group of torch.distributed work on one call.

    function: takes a model first. It is called in every process, and must do the same in all of them.

    Raises InputError, in every process, if their models differ, and RankError if another process fails.
    """

    @functools.wraps(function)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> R:
        model = args[0] if args else kwargs.get("model")
        with _ranks.together(_device(model)):
            if _ranks.world() > 1:
                _refuse_other_models(model)
            return function(*args, **kwargs)

    return wrapped


def refuse_over_ranks(distill: bool, budget: Budget) -> None:
    """Raise InputError for what several processes cannot share."""
    if _ranks.world() == 1:
        return
    if distill:
        raise InputError("distill trains in one process. Leave it out here, and train the pruned model as you like.")
    if budget.kind == "latency":
        raise InputError(
            "a budget of time is measured by one process that has the machine for itself. Plan in one process "
            "(make_plan), and give several the plan (apply_plan)."
        )


def agree_on(traced: Traced, asked: Mapping[str, Any]) -> None:
    """Raise InputError, in every process, if their arguments or examples differ, and RankError if their groups do.

    asked: the arguments, as plain values.
    """
    if _ranks.world() == 1:
        return
    asked = {**asked, "example_inputs": describe_example(traced.captured.args, traced.captured.kwargs)}
    told = _ranks.gathered("the arguments", {name: repr(value) for name, value in asked.items()})
    for name in told[0]:
        if odd := [r for r, one in enumerate(told) if one.get(name) != told[0][name]]:
            raise InputError(
                f"the processes have different arguments: {name} is {told[0][name]} in process 0 and "
                f"{told[odd[0]].get(name)} in process {odd[0]}. Give all of them the same."
            )
    _ranks.agree("the groups", [(g.name, g.size, g.locked_because) for g in traced.groups])


def agree_on_weights(model: nn.Module) -> None:
    """Raise RankError if a model that all processes have made is not the same in all of them."""
    if _ranks.world() > 1:
        _ranks.agree("the weights", _sums(model))


def _refuse_other_models(model: Any) -> None:
    told = _ranks.gathered("the models", (type(model).__name__, _sums(model)))
    for r, (kind, sums) in enumerate(told):
        first, known = told[0]
        if kind != first or sums.keys() != known.keys():
            raise InputError(f"the models differ: process 0 has a {first}, and process {r} another {kind}.")
        if odd := [name for name in sums if sums[name] != known[name]]:
            raise InputError(
                f"the models differ: {odd[0]} in process {r} is not what it is in process 0, and so are {len(odd) - 1} "
                "more of its tensors. Load the same checkpoint in every process, or draw random weights from one seed."
            )


def _sums(model: Any) -> dict[str, tuple[Any, ...]]:
    """A checksum of every parameter and buffer, by name; none of what is no module."""
    if not isinstance(model, nn.Module):
        return {}
    tensors = [*model.named_parameters(), *model.named_buffers()]
    return {name: (tuple(t.shape), str(t.dtype), _checksum(t)) for name, t in tensors if not is_lazy(t)}


def _checksum(tensor: Tensor) -> int:
    with suppress(RuntimeError, TypeError, NotImplementedError):  # a tensor without such a memory, e.g. quantised
        flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        data: Any = flat.numpy()  # a buffer, which its type does not say in Python 3.11
        return zlib.crc32(data)
    return 0


def _device(model: Any) -> torch.device | None:
    """Where a model is; None if it says nothing about that."""
    parameters = model.parameters() if isinstance(model, nn.Module) else iter(())
    return next((p.device for p in parameters), None)
