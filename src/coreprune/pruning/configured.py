"""The configurations of pruned Hugging Face models, so that `save_pretrained` writes what `from_pretrained` reads."""

from __future__ import annotations

import functools
import inspect
import logging
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import reduce
from typing import Any, NoReturn, ParamSpec, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from coreprune._example import device_of, example_like, normalise_example
from coreprune._twin import quiet
from coreprune.errors import InputError, first_line
from coreprune.graph import Traced
from coreprune.pruning.fewer_layers import with_fewer_layers
from coreprune.pruning.stock import Path, on_meta, said, scopes, stock_config

log = logging.getLogger(__name__)

P = ParamSpec("P")
R = TypeVar("R")


@dataclass(frozen=True)
class Refuses:
    """Stands for `save_pretrained` of a pruned model that no configuration describes. why: the reason."""

    why: str

    def __call__(self, *_: object, **__: object) -> NoReturn:
        """Raise InputError."""
        raise InputError(
            f"from_pretrained could not read what save_pretrained would write of this pruned model: {self.why} To save "
            "it as it is, use coreprune.save(result, folder), and read it with coreprune.load(folder)."
        )


@dataclass(frozen=True)
class Held:
    """A model of transformers in the user's model, by its name, and where its modules keep its configuration."""

    name: str
    config: Any
    places: tuple[tuple[str, str, Path], ...]  # (module, attribute, path inside of the configuration)


def is_pretrained(model: object) -> bool:
    """Whether a model is a `transformers.PreTrainedModel`. If transformers has not been imported, no model is."""
    transformers = sys.modules.get("transformers")
    return transformers is not None and isinstance(model, transformers.PreTrainedModel)


def with_true_config(function: Callable[P, R]) -> Callable[P, R]:
    """Let the configuration of a pruned model of transformers say the widths that are left.

    The configuration of the given model stays as it was. Where none can say the widths, the pruned model keeps a copy
    of it, and its `save_pretrained` refuses.

    function: takes a model, its example or a plan, and more, and returns a `Result` or a smaller model.
    """
    signature = inspect.signature(function)

    @functools.wraps(function)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> R:
        model = args[0] if args else kwargs.get("model")
        held = held_by(model) if isinstance(model, nn.Module) else []
        made: Any = function(*args, **kwargs)
        if not held:
            return made
        given = signature.bind(*args, **kwargs).arguments
        small, plan = (made, given["plan"]) if isinstance(made, nn.Module) else (made.model, made.plan)
        example = given.get("example_inputs")
        example = example_like(plan.example, device_of(small)) if example is None else example
        groups = [f"{plan.part}.{name}" if plan.part else name for name in plan.groups]
        recipe = getattr(made, "recipe", None)
        dropped = tuple(f"{plan.part}.{name}" if plan.part else name for name in plan.dropped)
        after = {one.name: one.places for one in held_by(small)} if dropped else {}
        for one in held:
            now = replace(one, places=after.get(one.name, one.places))
            configure_(small, now, groups, recipe.plain if recipe is not None else (), example, dropped)
        if given.get("stock") and (refused := vars(small).get("save_pretrained")):
            log.warning("stock=True: no configuration says the widths that were chosen: %s", refused.why)
        if not isinstance(made, nn.Module) and held[0].name == "":
            return cast(Any, replace)(made, config=held[0].config)
        return cast(R, made)

    return wrapped


def unsaid(traced: Traced) -> dict[str, str]:
    """The free groups of a model of transformers whose size its configuration cannot say: name -> the reason.

    Raises InputError for other models.
    """
    if not is_pretrained(traced.model):
        raise InputError(
            f"stock=True is for models of transformers, whose configuration says their widths; this is a "
            f"{type(traced.model).__name__}. Leave stock out."
        )
    says, own = said(traced.model), type(traced.model.config).__name__
    return {
        name: f"{own} has no number for its size (stock=True)"
        for name, group in traced.free.items()
        if not all((s.param, s.dim) in says for s in group.slices if s.param in traced.model.state_dict())
    }


def put_refusal(model: nn.Module, why: str) -> None:
    """Let `save_pretrained` of this model refuse for the given reason, or work as ever if there is none."""
    vars(model).pop("save_pretrained", None)
    if why:
        vars(model)["save_pretrained"] = Refuses(why)


def held_by(model: nn.Module) -> list[Held]:
    """The outermost models of transformers in a model, with their configurations."""
    outer: list[str] = []
    found: list[Held] = []
    for name, module in model.named_modules():
        if not is_pretrained(module) or any(name.startswith(f"{other}.") or not other for other in outer):
            continue
        outer.append(name)
        paths = {id(scope): at for at, scope in scopes(module.config)}
        places = [
            (path, key, paths[id(value)])
            for path, inner in module.named_modules()
            for key, value in vars(inner).items()
            if id(value) in paths
        ]
        found.append(Held(name, module.config, tuple(places)))
    return found


def configure_(
    small: nn.Module,
    held: Held,
    groups: Iterable[str],
    plain: tuple[str, ...] = (),
    example: Any = None,
    dropped: tuple[str, ...] = (),
) -> None:
    """Give a pruned model of transformers in `small` its configuration, or a `save_pretrained` that refuses.

    held: what the dense model held. groups: names of the pruned groups. plain: parameters that the dense model
    computes. example: on this the model and one made by its class from the configuration must agree. Without, the
    shapes are compared alone. dropped: names of the elements of lists that have left.
    """
    put_refusal(small.get_submodule(held.name), _configured(small, held, groups, plain, example, dropped))


def _configured(
    small: nn.Module, held: Held, groups: Iterable[str], plain: tuple[str, ...], example: Any, dropped: tuple[str, ...]
) -> str:
    """Why there is no configuration, or "" if the model has it now."""
    model = small.get_submodule(held.name)
    dot = f"{held.name}." if held.name else ""
    if any(name.startswith(dot) for name in plain):
        return f"stock transformers computes weights that are plain parameters here, such as {plain[0]}."
    was = [(path, key, vars(model.get_submodule(path))[key]) for path, key, _ in held.places]
    try:  # the model is pruned by now: whatever its configuration does, that is not lost
        gone = [name.removeprefix(dot) for name in dropped if name.startswith(dot)]
        config, why = with_fewer_layers(type(model), held.config, gone)
        if config is None:
            return why
        config, why = stock_config(model, [g.removeprefix(dot) for g in groups if g.startswith(dot)], config)
        if config is None:
            return why
        before = None if example is None else outputs(small, example)
        for path, key, at in held.places:
            vars(model.get_submodule(path))[key] = reduce(getattr, at, config)
        if before is None or (
            same(outputs(small, example), before) and same(_stock_outputs(small, held.name, config, example), before)
        ):
            return ""
        why = "with the same weights, the stock class gives other outputs than the pruned model."
    except Exception as error:  # models raise all kinds of errors for configurations
        why = f"no configuration could be tried ({first_line(error)})."
    for path, key, value in was:
        vars(model.get_submodule(path))[key] = value
    return why


def _stock_outputs(small: nn.Module, name: str, config: Any, example: Any) -> list[Tensor]:
    """The outputs with a model made by its class in the place of the pruned one, with the weights of that."""
    model = small.get_submodule(name)
    stock = on_meta(type(model), config).train(model.training)
    stock.load_state_dict(model.state_dict(), assign=True)
    for (_, theirs), (_, ours) in zip(stock.named_modules(), model.named_modules(), strict=True):
        for key in theirs._non_persistent_buffers_set:  # these follow from the configuration alone
            if theirs._buffers[key] is not None:
                theirs._buffers[key] = _of_shape(ours._buffers[key], theirs._buffers[key], key)
    if not name:
        return outputs(stock, example)
    parent, _, child = name.rpartition(".")
    holder = small.get_submodule(parent)._modules
    try:
        holder[child] = stock
        return outputs(small, example)
    finally:
        holder[child] = model


def _of_shape(ours: Tensor | None, theirs: Tensor | None, key: str) -> Tensor | None:
    if ours is None or theirs is None or ours.shape != theirs.shape:
        raise InputError(f"its buffer {key} has another shape")
    return ours


def outputs(model: nn.Module, example_inputs: Any) -> list[Tensor]:
    """The tensors that a model returns for an example."""
    args, kwargs = normalise_example(example_inputs)
    with quiet(model) as still:
        torch.manual_seed(0)
        result = still(*args, **kwargs)
    return [x for x in pytree.tree_leaves(result) if isinstance(x, Tensor)]


def same(first: list[Tensor], second: list[Tensor]) -> bool:
    """Whether outputs are equal up to rounding. Kernels may compute differently for other places in memory."""
    return len(first) == len(second) and all(map(_same, first, second))


def _same(x: Tensor, y: Tensor) -> bool:
    if x.shape != y.shape or x.dtype != y.dtype or not x.is_floating_point():
        return x.dtype == y.dtype and torch.equal(x, y)
    rounding = 64 * torch.finfo(y.dtype).eps * float(y.double().abs().nan_to_num(posinf=0).amax()) if y.numel() else 0
    return torch.allclose(x.double(), y.double(), rtol=0, atol=rounding, equal_nan=True)
