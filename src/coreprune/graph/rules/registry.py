"""One call of an ATen operation on abstract values, and the registry of the rules for such calls."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

from coreprune.graph.tracer import Tracer
from coreprune.graph.values import Value


@dataclass(frozen=True, eq=False)
class Call:
    """What a rule gets: where to write down facts, the node, and its arguments with `Value`s for tensors."""

    tracer: Tracer
    node: fx.Node
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    @property
    def name(self) -> str:
        """The operation: `aten.add_.Tensor` is `add`."""
        return op_name(self.node)

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape that torch.export found for the (first) result."""
        value = self.node.meta["val"]
        return tuple(int(n) for n in (value[0] if isinstance(value, (tuple, list)) else value).shape)

    def arg(self, at: int, name: str, default: Any = None) -> Any:
        """An argument by position or name."""
        return self.args[at] if len(self.args) > at else self.kwargs.get(name, default)

    def values(self) -> list[Value]:
        """Every abstract tensor in the arguments."""
        return values_in(self.args, self.kwargs)

    def lock(self, reason: str, *trees: Any) -> None:
        """The channels in these values (all arguments by default) stay."""
        self.tracer.lock_all(values_in(*trees) if trees else self.values(), f"{reason} ({self.node.name})")


Rule = Callable[[Call], Any]
RULES: dict[str, Rule] = {}


def rule(*names: str) -> Callable[[Rule], Rule]:
    """Register a function as the rule for these operations (as in `Call.name`).

    A rule returns the value (or values) of the node, or NotImplemented, which locks every channel among the arguments.
    """

    def register(function: Rule) -> Rule:
        for name in names:
            RULES[name] = function
        return function

    return register


def op_name(node: fx.Node) -> str:
    """The name of the operation of a node, without namespace, overload, or the underscore of in-place variants."""
    target = node.target
    if isinstance(target, torch._ops.OpOverload):
        name = target._schema.name.split("::")[-1]
        return name.rstrip("_") if not name.startswith("_") else name
    return getattr(target, "__name__", str(target))


def values_in(*trees: Any) -> list[Value]:
    """Every abstract tensor in nested arguments."""
    return [x for x in pytree.tree_leaves(trees) if isinstance(x, Value)]
