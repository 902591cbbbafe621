"""Checks of arguments and models. prune() and related functions run them before any work is done."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.ao.quantization import FakeQuantizeBase, ObserverBase
from torch.nn.parameter import is_lazy
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from coreprune._example import normalise_example
from coreprune._seed import check_seed
from coreprune.errors import InputError
from coreprune.pruning.allocation.budget import RISKS, Budget
from coreprune.pruning.plans.plan import Plan, fingerprint
from coreprune.pruning.repair.options import Repair

Exclude = tuple[str | nn.Module, ...]
REAL = frozenset({torch.float16, torch.bfloat16, torch.float32, torch.float64})


def check_model(model: object, example_inputs: Any) -> None:
    """Raise InputError for a model or example inputs that cannot be pruned.

    Examples: no real parameters, parameters without values, a wrapper for several devices, an example input that is
    empty or on another device.
    """
    if not isinstance(model, nn.Module):
        raise InputError(f"model must be a torch.nn.Module, not {type(model).__name__}.")
    if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
        raise InputError(f"the model is wrapped in {type(model).__name__}. Prune model.module, and wrap the result.")
    if isinstance(model, torch.jit.ScriptModule):
        raise InputError(
            f"the model is a {type(model).__name__} of TorchScript, which torch.export cannot trace. Prune the Python "
            "module that it was made from, and script or trace the result."
        )
    if found := _quantised(model):
        raise InputError(f"{found}, so the model is quantised. Prune first, then quantise the result.")
    devices, dtypes = set(), set()
    for name, tensor in model.named_parameters():
        if is_lazy(tensor):
            raise InputError(f"parameter {name!r} has no shape yet. Run the model once on an example, then prune it.")
        if tensor.is_meta:
            raise InputError(f"parameter {name!r} is on the meta device and has no values. Load the weights first.")
        if tensor.is_inference():
            raise InputError(
                f"parameter {name!r} was made in torch.inference_mode(), where no gradient can follow. Pass "
                "copy.deepcopy(model), made outside of it."
            )
        devices.add(tensor.device)
        dtypes.add(tensor.dtype)
    if not devices:
        raise InputError(f"{type(model).__name__} has no parameters, so there is nothing to prune.")
    if not dtypes & REAL:
        raise InputError(
            f"all parameters have dtype {', '.join(sorted(map(str, dtypes)))}; only real floating-point weights can be "
            "pruned. Prune the model before it is quantised."
        )
    args, kwargs = normalise_example(example_inputs)
    for leaf in pytree.tree_leaves((args, kwargs)):
        if isinstance(leaf, Tensor) and (leaf.layout != torch.strided or leaf.is_nested):
            kind = "nested" if leaf.is_nested else str(leaf.layout).removeprefix("torch.")
            dense = "x.to_padded_tensor(0)" if leaf.is_nested else "x.to_dense()"
            raise InputError(f"an example input is a {kind} tensor. Pass a dense one, e.g. {dense}.")
        if isinstance(leaf, Tensor) and leaf.numel() == 0:
            raise InputError(f"an example input is empty: its shape is {tuple(leaf.shape)}. Pass at least one sample.")
        if isinstance(leaf, Tensor) and leaf.device not in devices:
            place = ", ".join(sorted(map(str, devices)))
            raise InputError(
                f"the model is on {place}, but an example input is on {leaf.device}. "
                "Move the example to the model's device."
            )


def _quantised(model: nn.Module) -> str:
    """What shows that a model is quantised, or prepared for it, or "" if nothing does."""
    for name, module in model.named_modules():
        if isinstance(module, (FakeQuantizeBase, ObserverBase)):
            return f"{name} is a {type(module).__name__}"
        if type(module).__module__.startswith(("torch.ao.nn.quantized", "torch.ao.nn.intrinsic.quantized")):
            return f"{name or 'the model'} is a quantised {type(module).__name__}"
    for name, tensor in model.named_parameters():
        # Subclasses hold their integers inside (torchao), or are integers with a scale beside them (bitsandbytes).
        inner: list[Any] = [tensor] if type(tensor) is not nn.Parameter else []
        if is_traceable_wrapper_subclass(tensor):
            inner = [getattr(tensor, key) for key in tensor.__tensor_flatten__()[0]]
        kinds = [x.dtype for x in inner if isinstance(x, Tensor) and not is_lazy(x)]
        if tensor.is_quantized or any(dtype not in REAL and not dtype.is_complex for dtype in kinds):
            return f"parameter {name!r} is a {type(tensor).__name__} of {kinds[0] if kinds else tensor.dtype}"
    return ""


def check_settings(budget: object, seed: object, delta: object) -> Budget:
    """The budget, or the default one. Raises InputError if an argument has the wrong type or range."""
    budget = Budget() if budget is None else budget
    if not isinstance(budget, Budget):
        raise InputError(f"budget must be a Budget, e.g. Budget(keep=0.5), not {budget!r}.")
    if not isinstance(delta, (int, float)) or not 0 < delta < 1:
        raise InputError(f"delta must be a number between 0 and 1, but it is {delta!r}.")
    check_seed(seed)
    return budget


def check_cost(cost: object, budget: Budget) -> None:
    """Refuse a cost that cannot be called, or that the budget has no use for. Raises InputError."""
    if cost is None:
        return
    if not callable(cost):
        raise InputError(f"cost must be a function from the widths of all groups to a number, not {cost!r}.")
    if budget.kind not in ("cost", "error", *RISKS):
        raise InputError(f"a cost of your own is given, but the budget limits {budget.kind}. Use Budget(cost=0.5).")


def check_risk(budget: Budget, queries: object, distill: bool) -> None:
    """Raise InputError for a budget of risk that cannot be tested."""
    if budget.kind not in RISKS:
        return
    if queries is None:
        raise InputError(f"a budget of {budget.kind} is tested on samples, and queries=None gives none. Pass samples.")
    if distill:
        raise InputError(
            f"a budget of {budget.kind} does not go with distill, which would change the model after its test. Leave "
            "it out, or prune to a size, distill, and test the result with certify() on samples of its own."
        )


def check_exclude(exclude: object) -> Exclude:
    """Patterns of names and modules, as a tuple; a single one becomes a tuple of one. Raises InputError otherwise."""
    items = (exclude,) if isinstance(exclude, (str, nn.Module)) else exclude
    if not isinstance(items, (tuple, list, set, frozenset)) or not all(
        isinstance(item, nn.Module) or (isinstance(item, str) and item) for item in items
    ):
        raise InputError(
            "exclude must be names or patterns of groups, or modules of the model, e.g. ('*attention*', model.head), "
            f"not {exclude!r}."
        )
    return tuple(sorted(items, key=str) if isinstance(items, (set, frozenset)) else items)


def check_also(also: object) -> tuple[Any, ...]:
    """The further examples as a tuple. Raises InputError if they are not several, but perhaps one."""
    if not isinstance(also, (tuple, list)):
        raise InputError(f"also must be a list of examples, such as also=[example], not a {type(also).__name__}.")
    for example in also:
        normalise_example(example)
    return tuple(also)


def check_architecture(model: nn.Module, plan: Plan) -> None:
    """Raise InputError if a plan was made for another architecture."""
    found = fingerprint(model)
    if found != plan.fingerprint:
        raise InputError(
            f"this plan was made for another architecture (fingerprint {plan.fingerprint}, this model has {found}): "
            "names, shapes and dtypes of all parameters must agree. Make a plan for this model."
        )


def counterparts(exclude: Exclude, model: nn.Module, plain: nn.Module) -> Exclude:
    """The same, with the modules of a copy in place of those of the model."""
    paths = {id(m): path for path, m in model.named_modules()}
    return tuple(plain.get_submodule(paths[id(x)]) if plain is not model and id(x) in paths else x for x in exclude)  # pyright: ignore


def refuse_plain(inplace: bool, weights: tuple[str, ...]) -> None:
    """Raise InputError for a model that cannot be shrunk in place, because it computes some of its weights."""
    if inplace and weights:
        raise InputError(
            f"inplace=True keeps the parameters of the model, but {weights[0]} is computed from other tensors, and "
            "would become a parameter itself. Leave inplace out, or first make the weight plain "
            "(torch.nn.utils.parametrize.remove_parametrizations)."
        )


def check_count(n: object, name: str) -> None:
    """Raise InputError unless n is None or a whole number of at least one."""
    if n is not None and (isinstance(n, bool) or not isinstance(n, int) or n < 1):
        raise InputError(f"{name} must be a whole number of queries, at least one, not {n!r}.")


def repair_options(repair: bool | Repair) -> Repair | None:
    """The options of the repair, or None for no repair. Raises InputError."""
    if not isinstance(repair, (bool, Repair)):
        raise InputError(f"repair must be True, False or Repair(...), not {repair!r}.")
    return repair if isinstance(repair, Repair) else Repair() if repair else None


def check_depth(depth: object, budget: Budget, queries: Any, inplace: bool = False, resume: bool = False) -> None:
    """Raise InputError unless blocks may leave under this budget, with these queries."""
    if not isinstance(depth, bool):
        raise InputError(f"depth must be True or False, not {depth!r}.")
    if not depth:
        return
    if budget.kind not in ("macs", "params", "bytes"):
        raise InputError(
            f"depth=True weighs the error of a block against what it costs, so it needs a budget of macs, params or "
            f"bytes, not of {budget.kind}. Use e.g. Budget(params=0.7)."
        )
    if queries is None:
        raise InputError(
            "depth=True goes by what the queries show, and there are to be none. Have them made (queries='auto'), or "
            "pass samples."
        )
    if inplace:
        raise InputError("depth=True takes modules out of a copy of the model. Leave inplace out, and use the result.")
    if resume:
        raise InputError("depth=True keeps no state of an unfinished run. Leave resume out; cache keeps the queries.")
