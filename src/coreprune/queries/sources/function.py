"""A plain function as a source of queries: (n, generator) → inputs."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from coreprune.errors import CoreprunError, InputError, first_line
from coreprune.queries.check import as_tensor, fitting, number_kind
from coreprune.queries.describe import shown
from coreprune.queries.leaves import batched, by_keyword, title
from coreprune.queries.sources.base import Source, Target, Tell, meant


@dataclass(frozen=True)
class FromFunction:
    """Inputs that a function returns.

    function: called once as function(n, generator). It returns a tensor with n rows for the one input that is drawn.
        Where the model takes several inputs, it returns a tuple of tensors in the order of the example inputs, or a
        dict of tensors by keyword. A tensor, or a dict of some of the inputs, leaves the others to "auto".
    name: for reports and messages.

    A tensor fills the input that has its shape and its kind of numbers. If the function has an attribute `kind`, as
    sources have, the tensor fills the input of that kind.
    """

    function: Callable[[int, torch.Generator], Any]
    name: str

    def __repr__(self) -> str:
        return shown(self.function)

    @property
    def kind(self) -> str:
        """The function's attribute `kind`, or reals if it has none."""
        return self._declared or "reals"

    @property
    def _declared(self) -> str | None:
        return getattr(self.function, "kind", None)

    def at_once(self, target: Target) -> int | None:  # noqa: ARG002
        """Any number at once."""
        return None

    def __call__(self, target: Target, n: int, generator: torch.Generator, tell: Tell) -> Tensor:
        """Make n inputs for one target, as a part of a mixture does."""
        made = self._made(n, generator)
        tell(1, 1)
        return fitting(made, target.example, f"{self._where}, {target.title}", n)

    def fill(self, targets: Sequence[Target], n: int, generator: torch.Generator) -> dict[int, Tensor]:
        """Call the function once. Returns its tensors by their positions among the leaves of the example.

        targets: the inputs of the model that are to be drawn.
        Raises InputError if the function cannot be called, fails, or returns what does not fit the example.
        """
        made = self._made(n, generator)
        args, kwargs, axes = targets[0].args, targets[0].kwargs, targets[0].axes
        if isinstance(made, Mapping):
            given = self._named(made, batched(args, kwargs, axes), by_keyword(args, kwargs))
        elif isinstance(made, (tuple, list)):
            given = self._listed(made, targets)
        else:
            given = {self._meant(made, targets).leaf: made}
        like = {i: axes.stored(i, x) for i, x in enumerate(pytree.tree_leaves((args, kwargs))) if i in given}
        return {i: fitting(x, like[i], f"{self._where}, {title(args, kwargs, i)}", n) for i, x in given.items()}

    def _made(self, n: int, generator: torch.Generator) -> Any:
        try:
            signature = inspect.signature(self.function)
        except (TypeError, ValueError):  # some builtins have none
            signature = None
        try:
            if signature is not None:
                signature.bind(n, generator)
        except TypeError as error:
            raise InputError(
                f"{self._where}: it cannot be called with (n, generator) ({error}). It must take the number of inputs "
                "and a torch.Generator, and nothing else."
            ) from error
        try:
            made = self.function(n, generator)
        except CoreprunError:
            raise
        except Exception as error:  # the code of somebody else
            raise InputError(
                f"{self._where} failed ({first_line(error)}). Call it by itself with ({n}, torch.Generator())."
            ) from error
        return as_tensor(made, self._where) if isinstance(made, np.ndarray) else made

    @property
    def _where(self) -> str:
        return f"the source {self.name!r}"

    def _named(self, made: Mapping[Any, Any], inputs: list[int], names: dict[str, int]) -> dict[int, Any]:
        places = {name: i for name, i in names.items() if i in inputs}
        if not made or not set(made) <= set(places):
            wanted = f"named {', '.join(places)}" if places else "positional, so it must return a tuple in their order"
            raise InputError(
                f"{self._where} returned inputs named {', '.join(map(str, made)) or 'nothing'}, but the example "
                f"inputs are {wanted}."
            )
        return {places[name]: x for name, x in made.items()}

    def _listed(self, made: Sequence[Any], targets: Sequence[Target]) -> dict[int, Any]:
        drawn = [target.leaf for target in targets]
        for wanted in (drawn, batched(targets[0].args, targets[0].kwargs, targets[0].axes)):
            if len(made) == len(wanted):
                return dict(zip(wanted, made, strict=True))
        raise InputError(
            f"{self._where} returned {len(made)} tensors, but these inputs are to be drawn: {_forms(targets)}. "
            "Return one tensor for each, in this order."
        )

    def _meant(self, made: Any, targets: Sequence[Target]) -> Target:
        """The one input that a tensor is for."""
        found = meant(self._declared, targets) if self._declared is not None else list(targets)
        if len(found) > 1 and isinstance(made, Tensor):
            found = [t for t in found if tuple(made.shape[1:]) == t.shape and _alike(made, t.example)]
        if len(found) == 1:
            return found[0]
        what = f"shape {tuple(made.shape)}, {made.dtype}" if isinstance(made, Tensor) else f"a {type(made).__name__}"
        why = "which could be any of several inputs" if found else "which is none of the inputs"
        raise InputError(
            f"{self._where} returned one tensor ({what}), {why} of the model: {_forms(targets)}. Return a tuple with "
            "one tensor for each, in this order."
        )


def as_source(found: Any, name: str | None = None) -> Source:
    """A source as it is, an object of a class of sources, or a function as a source.

    name: what a function is called; by default its own name. Raises InputError for anything else.
    """
    if isinstance(found, type):
        try:
            found = found()
        except TypeError as error:
            raise InputError(f"the source {shown(found)} cannot be made without arguments ({error}).") from error
    if isinstance(found, Source):
        return found
    if callable(found) and hasattr(found, "at_once"):
        lacks = [part for part in ("name", "kind") if not hasattr(found, part)]
        raise InputError(f"the source {shown(found)} lacks {' and '.join(lacks)}. See coreprune.queries.Source.")
    if callable(found):
        return FromFunction(found, name or getattr(found, "__name__", type(found).__name__))
    raise InputError(f"{shown(found)} is no source of queries: neither a function (n, generator) nor a Source.")


def _alike(x: Tensor, like: Tensor) -> bool:
    return number_kind(x.dtype) == number_kind(like.dtype)


def _forms(targets: Sequence[Target]) -> str:
    """Names, shapes and dtypes of the inputs, in words."""
    return ", ".join(
        f"{t.title} of shape (n, {', '.join(map(str, t.shape))}) and dtype {t.example.dtype}" for t in targets
    )
