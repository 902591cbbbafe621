"""Selectors that users write: a function from a layer to scores is enough."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from coreprune.errors import InputError
from coreprune.pruning.layer.weights import LayerWeights


@dataclass(frozen=True)
class Own:
    """A user's selector behind the interface of ours (`Selector`); `ranking_of` checks what it returns.

    function: `f(layer)` or `f(layer, generator)`; it returns scores, (n,), or a `Ranking`. name, reads: see `own`.
    registered: whether an installed package registers it under its name.
    """

    function: Callable[..., Any]
    name: str
    reads: bool = False
    registered: bool = False

    def __call__(self, layer: LayerWeights, generator: torch.Generator) -> Any:
        """Call the function, with the generator if it takes one."""
        args, kwargs = _arguments(self.function, layer, generator)
        return self.function(*args, **kwargs)


def own(function: Any, registered: str | None = None) -> Own:
    """Take in a user's selector.

    function: a function or another callable. Its name is its attribute `name`, or else its `__name__`. Its attribute
    `reads`, if there is one, says whether it needs queries.
    registered: the name under which an installed package registers it, which goes first.

    Raises InputError for what cannot be called with a layer, and for a name or `reads` that is not usable.
    """
    if isinstance(function, type):
        raise InputError(f"method is the class {function.__name__}; pass an object of it: {function.__name__}().")
    if not callable(function):
        raise InputError(f"a selector must be callable, but {function!r} is of type {type(function).__name__}.")
    name = registered or getattr(function, "name", getattr(function, "__name__", None))
    if not isinstance(name, str) or not name.strip() or not name.isprintable() or ":" in name:
        raise InputError(
            f"the selector {function!r} needs a name for plans and reports, without a colon, but its name is {name!r}. "
            "Set its attribute `name`, e.g. selector.name = 'mine'."
        )
    reads = getattr(function, "reads", False)
    if not isinstance(reads, bool):
        raise InputError(f"`reads` of the selector {name!r} must be True (it needs queries) or False, not {reads!r}.")
    _arguments(function, None, None, name)
    return Own(function, name, reads, registered is not None)


def _arguments(
    function: Callable[..., Any], layer: Any, generator: Any, name: str = ""
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """What to call a selector with: the generator by its name, or as a second argument that has no default.

    A second argument with a default and another name is an option, and is left alone. Raises InputError for a function
    that takes neither (layer) nor (layer, generator).
    """
    try:
        signature = inspect.signature(function)
    except ValueError:  # written in C, which often says nothing of its arguments
        return (layer,), {}
    named = signature.parameters.get("generator")
    choices = [((layer,), {}), ((layer, generator), {})]
    if named is not None and named.kind is not named.POSITIONAL_ONLY:
        choices.insert(0, ((layer,), {"generator": generator}))
    for args, kwargs in choices:
        try:
            signature.bind(*args, **kwargs)
        except TypeError:
            continue
        return args, kwargs
    raise InputError(
        f"the selector {name!r} must take (layer) or (layer, generator), but its signature is {signature}."
    )
