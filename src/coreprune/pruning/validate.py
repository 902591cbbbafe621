"""What prune() and its relatives refuse before any work is done."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from coreprune._example import normalise_example
from coreprune.errors import InputError
from coreprune.pruning.allocation.budget import Budget


def check_model(model: object, example_inputs: Any) -> None:
    """Refuse models that no method here can read: nothing trainable, non-float weights, several devices."""
    if not isinstance(model, nn.Module):
        raise InputError(f"model must be a torch.nn.Module, not {type(model).__name__}.")
    if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
        raise InputError(f"the model is wrapped in {type(model).__name__}. Prune model.module, and wrap the result.")
    devices = set()
    for name, tensor in model.named_parameters():
        if tensor.dtype not in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
            raise InputError(
                f"parameter {name!r} has dtype {tensor.dtype}; only real floating-point weights can be pruned. "
                "Prune the model before it is quantised."
            )
        if tensor.is_meta:
            raise InputError(f"parameter {name!r} is on the meta device and has no values. Load the weights first.")
        if not bool(torch.isfinite(tensor).all()):
            raise InputError(f"parameter {name!r} has a NaN or infinite entry. Prune a checkpoint that is finite.")
        devices.add(tensor.device)
    if not devices:
        raise InputError(f"{type(model).__name__} has no parameters, so there is nothing to prune.")
    args, kwargs = normalise_example(example_inputs)
    for leaf in pytree.tree_leaves((args, kwargs)):
        if isinstance(leaf, Tensor) and leaf.numel() == 0:
            raise InputError(f"an example input is empty: its shape is {tuple(leaf.shape)}. Pass at least one sample.")
        if isinstance(leaf, Tensor) and leaf.device not in devices:
            place = ", ".join(sorted(map(str, devices)))
            raise InputError(
                f"the model is on {place}, but an example input is on {leaf.device}. "
                "Move the example to the model's device."
            )


def check_settings(budget: object, seed: object, delta: object) -> Budget:
    """The budget, or the default one. Raises InputError for settings of the wrong kind."""
    budget = Budget() if budget is None else budget
    if not isinstance(budget, Budget):
        raise InputError(f"budget must be a Budget, e.g. Budget(keep=0.5), not {budget!r}.")
    if not isinstance(delta, (int, float)) or not 0 < delta < 1:
        raise InputError(f"delta must be a number between 0 and 1, but it is {delta!r}.")
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise InputError(f"seed must be a whole number, but it is {seed!r}.")
    return budget


def check_patterns(exclude: object) -> tuple[str, ...]:
    """Patterns of names; one on its own is a list of one. Raises InputError for anything else."""
    patterns = (exclude,) if isinstance(exclude, str) else exclude
    if not isinstance(patterns, (tuple, list, set, frozenset)) or not all(isinstance(p, str) and p for p in patterns):
        raise InputError(f"exclude must be names or patterns of groups, e.g. ('*attention*',), not {exclude!r}.")
    return tuple(sorted(patterns) if isinstance(patterns, (set, frozenset)) else patterns)
