"""Run an exported graph on channel ids instead of numbers.

The rules per operation are in `rules/`; an operation without a rule locks every channel that it reads.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from coreprune.graph.captured import Captured
from coreprune.graph.rules import compute, movement, norm  # noqa: F401 - they register the rules
from coreprune.graph.rules.registry import RULES, Call, values_in
from coreprune.graph.tracer import Tracer
from coreprune.graph.values import Value, axes

log = logging.getLogger(__name__)


def trace(captured: Captured) -> Tracer:
    """Run the graph on ids. `Captured.channel_ids` does so once."""
    tracer = Tracer(captured)
    inputs = [_input(tracer, n) for n in captured.graph.graph.nodes if n.op == "placeholder"]
    result = interpret(tracer, captured.graph, inputs)
    tracer.lock_all(values_in(result), "model output")
    return tracer


def _input(tracer: Tracer, node: fx.Node) -> Value | None:
    kind, name = tracer.captured.sources.get(node.name, ("input", node.name))
    if kind in ("parameter", "buffer"):
        return tracer.parameter(name)
    value = node.meta.get("val")
    return Value(tuple(value.shape), weight=kind == "constant") if isinstance(value, Tensor) else None


def interpret(tracer: Tracer, module: fx.GraphModule, inputs: Sequence[Any]) -> Any:
    """Run one (sub)graph on abstract values."""
    env: dict[fx.Node, Any] = {}
    feed = iter(inputs)
    last = {n: user for user in module.graph.nodes for n in user.all_input_nodes}
    for node in module.graph.nodes:
        if node.op == "placeholder":
            env[node] = next(feed)
        elif node.op == "get_attr":
            attribute = getattr(module, str(node.target))
            env[node] = Value(tuple(attribute.shape), weight=True) if isinstance(attribute, Tensor) else attribute
        else:
            args, kwargs = pytree.tree_map_only(fx.Node, env.__getitem__, (node.args, node.kwargs))
            if node.op == "output":
                return args[0]
            env[node] = _apply(Call(tracer, node, args, kwargs))
        for used in node.all_input_nodes:
            if last[used] is node:
                env.pop(used, None)
    return None


def _apply(call: Call) -> Any:
    name, node, args = call.name, call.node, call.args
    if name == "getitem":
        return args[0][args[1]] if isinstance(args[0], (tuple, list)) else None
    if name.startswith("wrap_with"):
        at = next(i for i, a in enumerate(args) if isinstance(a, fx.GraphModule))
        return interpret(call.tracer, args[at], args[at + 1 :])
    function = RULES.get(name)
    if function is None and isinstance(node.target, torch._ops.OpOverload):
        function = RULES["pointwise"] if torch.Tag.pointwise in node.target.tags else None
    reason = f"no rule for {name}"
    result = NotImplemented
    if function is not None:
        try:
            result = function(call)
        except (TypeError, ValueError, LookupError, RuntimeError, AttributeError) as error:
            # An argument that the rule does not expect: not followed, so locked.
            log.debug("rule for %s failed at %s: %s", name, node.name, error)
            reason = f"unusual arguments of {name}"
    if result is NotImplemented:
        call.lock(reason)
        result = pytree.tree_map(_opaque, node.meta.get("val"))
    for value in values_in(result):
        for ids in value.maps:
            if len(axes(ids)) > 1:
                call.tracer.seen[id(ids)] = ids
    return result


def _opaque(value: Any) -> Any:
    return Value(tuple(value.shape)) if isinstance(value, Tensor) else value
