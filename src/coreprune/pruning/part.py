"""prune(), plans and list_groups() of one part of a model, such as the backbone of a detector."""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, ParamSpec, TypeVar

from torch import Tensor, nn
from torch.utils import _pytree as pytree

from coreprune._example import describe_example, device_of, example_like, normalise_example
from coreprune._plain import computed, plain
from coreprune._twin import duplicate, guarded, quiet
from coreprune.errors import InputError, ModelError, first_line
from coreprune.graph import Recipe, adopt, shallow
from coreprune.pruning.allocation.budget import RISKS
from coreprune.pruning.plans.plan import Plan, fingerprint
from coreprune.pruning.settings import EXAMPLES, asked_queries
from coreprune.pruning.validate import check_also, check_architecture, check_model
from coreprune.queries import make_queries
from coreprune.queries.spec import is_source

P = ParamSpec("P")
R = TypeVar("R")
_ALL = sys.maxsize  # inputs of a list of batches
Call = tuple[tuple[Any, ...], dict[str, Any]]


def of_a_part(function: Callable[P, R]) -> Callable[P, R]:
    """Let `part`, or a plan, name a module of the model, and do what `function` does with that module alone.

    The module gets the inputs that reach it when the model runs on the example, on the further examples and on samples.

    function: takes a model, its example and more, and returns a `Result`, a `Plan`, a smaller model, or what is said of
        the module.
    """
    signature = inspect.signature(function)

    @functools.wraps(function)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> R:
        plan = kwargs.get("plan", args[1] if len(args) > 1 else None)
        part = (plan.part or None) if isinstance(plan, Plan) else kwargs.get("part")
        if part is None:
            return function(*args, **kwargs)
        given = signature.bind(*args, **kwargs).arguments
        model, inplace = given["model"], given.pop("inplace", False)
        given.pop("part", None)
        if given.get("example_inputs") is None and isinstance(plan, Plan) and plan.example is not None:
            given["example_inputs"] = example_like(plan.example, device_of(model))
        check_model(model, given.get("example_inputs"))
        if (kind := getattr(given.get("budget"), "kind", "")) in RISKS:
            raise InputError(
                f"a budget of {kind} is about the outputs of the whole model, and does not go with part=. Prune the "
                "part to a size, and test the result with certify()."
            )
        name = _named(model, part)
        _refuse_shared(model, name)
        module = model.get_submodule(name)
        with guarded(model):
            changes = {"model": module, **_inputs(model, name, given)}
            if isinstance(plan, Plan):
                check_architecture(_plain(model, name), plan)
                changes["plan"] = replace(plan, part="", fingerprint=fingerprint(_plain(module)))
            made: Any = function(**{**given, **changes})  # type: ignore[call-arg]
            small = made if isinstance(made, nn.Module) else getattr(made, "model", None)
            if not isinstance(small, nn.Module):
                return _of_the_whole(made, model, model, name, given)
            whole = _put_back(model, name, small, given["example_inputs"])
            told = _of_the_whole(made, model, whole, name, given)
        if inplace:  # the last step
            adopt(module, small)
            whole = model
        returned: Any = whole if made is small else replace(told, model=whole)
        return returned

    return wrapped


def _named(model: nn.Module, part: object) -> str:
    """The dotted name of a part, which is given by its name or as the module itself."""
    modules = dict(model.named_modules())
    name = part if isinstance(part, str) else next((n for n, m in modules.items() if m is part), None)
    if name and name in modules:
        return name
    children = ", ".join(n for n, _ in model.named_children())
    raise InputError(
        f"part must be a module inside of the {type(model).__name__} or its name, such as one of {children}; "
        f"it is {part if isinstance(part, str) else type(part).__name__!r}."
    )


def _refuse_shared(model: nn.Module, name: str) -> None:
    """Raise ModelError if weights of the part are weights of the rest, too."""
    module = model.get_submodule(name)
    inside = {id(m) for m in module.modules()}
    mine = {id(t) for t in [*module.parameters(), *module.buffers()]}
    for path, other in model.named_modules():
        for key, t in [*other.named_parameters(recurse=False), *other.named_buffers(recurse=False)]:
            if id(other) not in inside and id(t) in mine:
                raise ModelError(
                    f"{path + '.' + key if path else key} is a weight of {name!r}, too. A part whose weights the rest "
                    "of the model shares cannot be pruned alone."
                )


def _inputs(model: nn.Module, name: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments about inputs, as the part gets them: its example, its further examples, its queries."""
    axis, module = given.get("batch_axis", "auto"), model.get_submodule(name)
    first, *again = _reaching(model, name, normalise_example(given["example_inputs"]))
    others = [call for x in check_also(given.get("also", ())) for call in _reaching(model, name, normalise_example(x))]
    more = [_as_example(call, module) for call in [*again, *others] if _shapes(call) != _shapes(first)]
    out = {"example_inputs": _as_example(first, module), "batch_axis": "auto", "also": more}
    queries = given.get("queries")
    if queries is None or is_source(queries):
        return out
    calls = []
    made = make_queries(
        model, given["example_inputs"], queries, n=given.get("n_queries"), progress=False, batch_axis=axis
    )
    for batch in made.batches(1):
        found = _reaching(model, name, batch)[0]
        if _shapes(found) != _shapes(first):
            raise InputError(
                f"a sample reaches {name!r} with the shapes {_shapes(found)}, and the example with {_shapes(first)}. "
                "Give samples of one size, that of the example."
            )
        calls.append(_as_example(found, module))
    return {**out, "queries": calls, "n_queries": _ALL}


def _reaching(model: nn.Module, name: str, call: Call) -> list[Call]:
    """The inputs of every call of a part, while the model runs on one input."""
    calls: list[Call] = []

    def keep(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        calls.append(pytree.tree_map(lambda x: x.detach().clone() if isinstance(x, Tensor) else x, (args, kwargs)))

    with quiet(model) as still:
        still.get_submodule(name).register_forward_pre_hook(keep, with_kwargs=True)
        try:
            still(*call[0], **call[1])
        except Exception as error:
            if not calls:
                raise ModelError(
                    f"{type(model).__name__} does not run on the example inputs: {first_line(error)}."
                ) from error
    if not calls:
        raise ModelError(
            f"the forward of {type(model).__name__} does not call {name!r} itself, so it is not known what enters it. "
            "Name a part that the forward calls."
        )
    return calls


def _as_example(call: Call, module: nn.Module) -> Any:
    """What `prune` takes as an example: arguments of one kind, so that positional ones get their names if need be."""
    args, kwargs = call
    return (
        dict(inspect.signature(module.forward).bind(*args, **kwargs).arguments) if args and kwargs else kwargs or args
    )


def _shapes(call: Call) -> list[Any]:
    return [tuple(x.shape) if isinstance(x, Tensor) else x for x in pytree.tree_leaves(call)]


def _put_back(model: nn.Module, name: str, small: nn.Module, example: Any) -> nn.Module:
    """A copy of the model with a smaller part. Raises ModelError if it cannot be there."""
    whole = duplicate(model, {id(model.get_submodule(name)): small})
    args, kwargs = normalise_example(example)
    with quiet(whole) as still:
        try:
            still(*args, **kwargs)
        except Exception as error:
            raise ModelError(
                f"{type(model).__name__} does not run with the smaller {name!r}: {first_line(error)}. The rest of the "
                "model uses what is inside of that part. Name a larger part."
            ) from error
    return whole


def _plain(model: nn.Module, name: str = "") -> nn.Module:
    """The model, with plain weights in its part."""
    weights = computed(model.get_submodule(name))
    return plain(model, [f"{name}.{w}" if name else w for w in weights], values=False)


def _of_the_whole(made: Any, model: nn.Module, whole: nn.Module, name: str, given: Mapping[str, Any]) -> Any:
    """What was made for a part, as the caller gets it for the whole model."""
    if isinstance(made, Plan):
        example = describe_example(*normalise_example(given["example_inputs"]))
        return replace(made, part=name, fingerprint=fingerprint(_plain(model, name)), example=example)
    if not hasattr(made, "recipe"):
        return made
    counts = [f"{sum(p.numel() for p in m.parameters()):,}" for m in (model, whole)]
    note = (
        f"Only {name!r} of {type(model).__name__} was pruned. All numbers here are of that part; the whole model went "
        f"from {counts[0]} to {counts[1]} parameters."
    )
    asked = {
        "also": EXAMPLES if given.get("also") else "",
        "queries": asked_queries(given.get("queries", "auto")),
        "n_queries": given.get("n_queries"),
        "batch_axis": given.get("batch_axis", "auto"),
    }
    settings = replace(made.report.settings, part=name, **asked)
    dropped = tuple(f"{name}.{key}" for key in made.recipe.dropped)
    recipe = Recipe(
        {f"{name}.{key}": value for key, value in made.recipe.shapes.items()},
        {f"{name}.{key}" if key else name: value for key, value in made.recipe.numbers.items()},
        tuple(f"{name}.{key}" for key in made.recipe.plain),
        dropped,
        fingerprint(shallow(_plain(model, name), dropped)) if dropped else "",
    )
    return replace(
        made,
        plan=_of_the_whole(made.plan, model, whole, name, given),
        recipe=recipe,
        report=replace(made.report, settings=settings, notes=(*made.report.notes, note)),
    )
