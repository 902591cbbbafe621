"""One call of an operation on abstract values, and the registry of the rules for such calls."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

from coreprune.errors import InputError
from coreprune.graph.ops import OPERATIONS, Operation, canonical, op_name, operation
from coreprune.graph.tracer import Tracer
from coreprune.graph.values import Value


@dataclass(frozen=True, eq=False)
class Call:
    """What a rule gets: one call of its operation, with a `Value` in place of every tensor.

    Attributes:
        tracer: where facts about channels are written down.
        node: the node of the exported graph; `node.meta["val"]` has the shape of the real result.
        args, kwargs: the arguments of the call.
    """

    tracer: Tracer
    node: fx.Node
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    @property
    def name(self) -> str:
        """The operation: `aten.add_.Tensor` is `add`, somebody's own is `mylib::scale`."""
        return op_name(self.node)

    @property
    def operation(self) -> Operation:
        """What the table says about the operation."""
        return operation(self.node)

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape that torch.export found for the result, or for the first of several."""
        value = self.node.meta["val"]
        return tuple(int(n) for n in (value[0] if isinstance(value, (tuple, list)) else value).shape)

    def arg(self, at: int, name: str, default: Any = None) -> Any:
        """An argument by position or name."""
        return self.args[at] if len(self.args) > at else self.kwargs.get(name, default)

    def values(self) -> list[Value]:
        """Every abstract tensor in the arguments."""
        return values_in(self.args, self.kwargs)

    def lock(self, reason: str, *trees: Any) -> None:
        """Keep every channel of these values, of all arguments by default; `reason` is what the report says."""
        self.tracer.lock_all(values_in(*trees) if trees else self.values(), f"{reason} ({self.node.name})")


Rule = Callable[[Call], Any]
RULES: dict[str, Rule] = {}


def rule(*names: str) -> Callable[[Rule], Rule]:
    """Make a function the rule for these operations, all overloads of each.

    names: "namespace::name", as in torch.library; without a namespace, operations of ATen. A rule that is already there
        is replaced.

    The function gets a `Call` and returns a `Value`, or a list of them where the operation has several results. It may
    return NotImplemented, which keeps every channel of the arguments. Without a rule the same happens.

    Raises InputError for a name without a namespace that ATen does not have.
    """
    for name in names:
        if not isinstance(name, str):
            raise InputError("rule takes names of operations: write @rule('mylib::scale') above the function.")
        if "::" not in name and canonical(name) not in OPERATIONS and not hasattr(torch.ops.aten, name):
            raise InputError(
                f"torch has no operation {name!r}. Name one of your own with its namespace: rule('mylib::{name}')."
            )

    def register(function: Rule) -> Rule:
        for name in names:
            RULES[canonical(name)] = function
        return function

    return register


def results(call: Call, first: Value) -> Value | list[Value]:
    """What a rule returns that knows the first result only: the others have shapes, and no channels."""
    values = call.node.meta["val"]
    if not isinstance(values, (tuple, list)):
        return first
    return [first, *(Value(tuple(v.shape)) for v in values[1:])]


def values_in(*trees: Any) -> list[Value]:
    """Every abstract tensor in nested arguments."""
    return [x for x in pytree.tree_leaves(trees) if isinstance(x, Value)]
