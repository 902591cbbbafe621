"""Run an exported graph on channel ids instead of numbers.

The rules for the operations are in `rules/`. If an operation has no rule, every channel that it reads is locked.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from coreprune.errors import InputError, first_line
from coreprune.graph.captured import Captured
from coreprune.graph.execution import mutates
from coreprune.graph.rules.elementwise import element_wise
from coreprune.graph.rules.registry import RULES, Call, Rule, values_in
from coreprune.graph.tracer import Tracer
from coreprune.graph.values import Value, axes

log = logging.getLogger(__name__)


def trace(captured: Captured) -> Tracer:
    """Run the graph on ids, and then those of the other traces. `Captured.channel_ids` calls this once.

    All of them say which channels belong together. Costs are those of the first one, and so are the nodes that read
    channels, except for weights that it does not read.
    """
    tracer = Tracer(captured)
    _run(tracer, captured)
    reads, work = list(tracer.reads), list(tracer.work)
    known = {param for read in reads for param in read.params}
    for other in captured.more:
        tracer.reads.clear()
        _run(tracer, other)
        new = [r for r in tracer.reads if r.params and not known & set(r.params)]
        known.update(param for read in new for param in read.params)
        reads += new
    tracer.reads[:], tracer.work[:] = reads, work
    return tracer


def _run(tracer: Tracer, captured: Captured) -> None:
    inputs = [_input(tracer, captured, n) for n in captured.graph.graph.nodes if n.op == "placeholder"]
    tracer.lock_all(values_in(interpret(tracer, captured.graph, inputs)), "model output")


def _input(tracer: Tracer, captured: Captured, node: fx.Node) -> Value | None:
    kind, name = captured.sources.get(node.name, ("input", node.name))
    if kind in ("parameter", "buffer"):
        return tracer.parameter(name)
    value = node.meta.get("val")
    return Value(tuple(value.shape), weight=kind == "constant") if isinstance(value, Tensor) else None


def values_of(captured: Captured, nodes: Collection[fx.Node]) -> tuple[Tracer, dict[fx.Node, Any]]:
    """The abstract values of some nodes of the graph, and the records of the run that made them."""
    tracer, found = Tracer(captured), dict.fromkeys(nodes)
    inputs = [_input(tracer, captured, n) for n in captured.graph.graph.nodes if n.op == "placeholder"]
    interpret(tracer, captured.graph, inputs, found)
    return tracer, found


def interpret(
    tracer: Tracer, module: fx.GraphModule, inputs: Sequence[Any], found: dict[fx.Node, Any] | None = None
) -> Any:
    """Run one (sub)graph on abstract values. found: filled with the values of the nodes that it names."""
    env: dict[fx.Node, Any] = {}
    feed = iter(inputs)
    last = {n: user for user in module.graph.nodes for n in user.all_input_nodes}
    needed = _needed(module.graph)
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
            statistics, reads = len(tracer.statistics), len(tracer.reads)
            env[node] = _apply(Call(tracer, node, args, kwargs), node in needed)
            if node not in needed:
                del tracer.statistics[statistics:]
                tracer.reads[reads:] = [r for r in tracer.reads[reads:] if r.params]
        if found is not None and node in found:
            found[node] = env[node]
        for used in node.all_input_nodes:
            if last[used] is node:
                env.pop(used, None)
    return None


def _needed(graph: fx.Graph) -> set[fx.Node]:
    """The nodes whose numbers reach the output or a write.

    What is computed for nothing still has to run, so the sizes that it asks for count; what it does with the numbers
    does not.
    """
    needed: set[fx.Node] = set()
    for node in reversed(graph.nodes):
        if node.op == "output" or node in needed or mutates(node):
            needed.update((node, *node.all_input_nodes))
    return needed


def _apply(call: Call, needed: bool) -> Any:
    name, node, args = call.name, call.node, call.args
    kind = call.operation.kind
    if kind == "getitem":
        return args[0][args[1]] if isinstance(args[0], (tuple, list)) else None
    function = RULES.get(name)
    if function is None and torch.Tag.pointwise in getattr(node.target, "tags", ()):
        function = element_wise
    reason = f"no rule for {name}"
    result = NotImplemented
    if function is not None:
        result, problem = _outcome(function, call)
        if problem and not getattr(function, "__module__", "").startswith("coreprune."):
            raise InputError(
                f"the rule for {name} failed at node {node.name}: {problem}. "
                "Mend the rule, or let it return NotImplemented, which keeps every channel of the arguments."
            )
        if problem:  # our rule does not expect these arguments, so their channels are locked
            log.debug("rule for %s failed at %s: %s", name, node.name, problem)
            reason = f"unusual arguments of {name}"
    if result is NotImplemented:
        if needed:
            call.lock(reason)
        result = pytree.tree_map(_opaque, node.meta.get("val"))
    for value in values_in(result):
        for ids in value.maps:
            if len(axes(ids)) > 1:
                call.tracer.seen[id(ids)] = ids
    return result


def _outcome(function: Rule, call: Call) -> tuple[Any, str]:
    """What a rule returns, and in words what is wrong with it. If anything is wrong, the result is NotImplemented."""
    try:
        result = function(call)
    except Exception as error:  # whatever the error is, the rule did not handle the call
        return NotImplemented, f"it raised {first_line(error)}"
    problem = "" if result is NotImplemented else _mismatch(result, call.node.meta.get("val"))
    return (NotImplemented, problem) if problem else (result, "")


def _mismatch(result: Any, real: Any) -> str:
    """In words, how the form of a rule's result differs from that of the real result; empty if it does not differ."""
    given, wanted = pytree.tree_leaves(result), pytree.tree_leaves(real)
    if len(given) != len(wanted):
        return f"it returns {len(given)} results of {len(wanted)}"
    for value, tensor in zip(given, wanted, strict=True):
        if not isinstance(tensor, Tensor):
            continue
        if not isinstance(value, Value):
            return f"it returns a {type(value).__name__} instead of a Value"
        shape = tuple(tensor.shape)
        if not all(isinstance(n, int) for n in shape):  # a size that depends on the data
            continue
        if tuple(value.shape) != shape:
            return f"it returns a Value of shape {tuple(value.shape)}, but the result has shape {shape}"
        for ids in value.maps:
            if ids.dim() != len(shape) or any(m not in (1, n) for m, n in zip(ids.shape, shape, strict=True)):
                return f"it returns an id map of shape {tuple(ids.shape)} for a result of shape {shape}"
    return ""


def _opaque(value: Any) -> Any:
    return Value(tuple(value.shape)) if isinstance(value, Tensor) else value
