"""Run an exported graph node by node, on several batches of inputs together."""

from __future__ import annotations

import operator
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.node import map_arg
from torch.utils import _pytree as pytree

from coreprune.graph.captured import Captured

# A value has one entry per batch, or just one entry if it does not depend on the inputs.
Value = list[Any]


class Execution:
    """The values of the nodes of one captured graph, for one set of parameters.

    Args:
        captured: traced at the batch size of the batches.
        tensors: parameters and buffers by canonical name. They are read when a node needs them, so they may be changed
            in between.
        batches: (args, kwargs) per batch, shaped like the example of the capture.
        keep: called with every value that an operation makes, for one batch; what it returns takes the value's place.
        instead: what computes some nodes in the place of their own operation.
    """

    def __init__(
        self,
        captured: Captured,
        tensors: Mapping[str, Tensor],
        batches: Sequence[tuple[tuple[Any, ...], dict[str, Any]]],
        keep: Callable[[Any], Any] | None = None,
        instead: Mapping[fx.Node, Callable[..., Any]] | None = None,
    ) -> None:
        self.captured = captured
        self.tensors = tensors
        self.batches = len(batches)
        self.values: dict[fx.Node, Value] = {}
        self._keep, self._instead = keep, instead or {}
        self._inputs: dict[fx.Node, Value] = {}
        self._overwritten = overwritten(captured.graph.graph.nodes)
        feeds = [iter(pytree.tree_leaves(batch)) for batch in batches]
        for node in captured.graph.graph.nodes:
            if node.op == "placeholder" and captured.sources.get(node.name, ("input",))[0] == "input":
                self._inputs[node] = [next(feed) for feed in feeds]

    def run(self, node: fx.Node) -> Value:
        """Compute one node. Its inputs must have been computed; parameters are read at this moment."""
        if node.op == "placeholder":
            value = self._inputs.get(node) or [self._tensor(node)]
            if node in self._overwritten:
                value = [v.clone() for v in value]
        elif node.op == "get_attr":
            value = [getattr(self.captured.graph, str(node.target))]
        elif node.op == "output":
            value = self._call(lambda *a: a[0], node)
        else:
            value = self._call(self._instead.get(node, node.target), node)
            if node in self._overwritten and not shares(node) and not mutates(node) and torch.is_grad_enabled():
                value = [v.clone() if isinstance(v, Tensor) else v for v in value]  # the operation may have kept it
        self.values[node] = value
        return value

    def batch(self, node: fx.Node, b: int) -> Any:
        """The value of a node for one batch."""
        if node.op == "placeholder" and node not in self._inputs and node not in self._overwritten:
            return self._tensor(node)
        value = self.values[node]
        return value[b if len(value) > 1 else 0]

    def _tensor(self, node: fx.Node) -> Any:
        kind, name = self.captured.sources[node.name]
        return self.captured.constants[node.name] if kind == "constant" else self.tensors[name]

    def _call(self, function: Any, node: fx.Node) -> Value:
        used = node.all_input_nodes
        varies = any(len(self.values[n]) > 1 for n in used if n in self.values)
        out = []
        # Memory that nodes share has to stay shared.
        keep = None if node in self._overwritten or shares(node) or mutates(node) else self._keep
        for b in range(self.batches if varies else 1):
            args, kwargs = map_arg((node.args, node.kwargs), lambda n, b=b: self.batch(n, b))
            if mutates(node) and isinstance(args[0], Tensor) and node.args[0] not in self._overwritten:
                # Other nodes may hold the same tensor. Later nodes of the graph read the result of this one.
                args = (args[0].clone(), *args[1:])
            out.append(keep(function(*args, **kwargs)) if keep else function(*args, **kwargs))
        return out


def dependents(nodes: Iterable[fx.Node], on: Collection[fx.Node]) -> set[fx.Node]:
    """The nodes whose values depend on those of some nodes, and these."""
    found: set[fx.Node] = set()
    for node in nodes:
        if node in on or any(n in found for n in node.all_input_nodes):
            found.add(node)
    return found


def varying(captured: Captured) -> set[fx.Node]:
    """The nodes whose values depend on the inputs."""
    nodes = captured.graph.graph.nodes
    given = {n for n in nodes if n.op == "placeholder" and captured.sources.get(n.name, ("input",))[0] == "input"}
    return dependents(nodes, given)


def alive(
    nodes: Sequence[fx.Node], counts: Callable[[fx.Node], bool]
) -> Iterator[tuple[fx.Node, Mapping[fx.Node, None]]]:
    """Every node, and the nodes so far whose values later nodes read, in order; behind the output, what it returns.

    counts: which nodes are looked at.
    """
    uses, live = last_uses(nodes), dict[fx.Node, None]()
    for node in nodes:
        if counts(node):
            live[node] = None
        for gone in uses[node] if node.op != "output" else ():
            live.pop(gone, None)
        yield node, live


def largest(captured: Captured, nodes: Iterable[fx.Node]) -> int:
    """The entries of the largest value, among those of `nodes` that depend on the inputs; at least 1."""
    moving = varying(captured)
    values = (n.meta.get("val") for n in nodes if n in moving)
    return max((v.numel() for v in values if isinstance(v, Tensor)), default=1) or 1


def mutates(node: fx.Node) -> bool:
    """Whether a node writes into its first argument."""
    return isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable


def overwritten(nodes: Iterable[fx.Node]) -> set[fx.Node]:
    """Nodes whose memory is written into through a view (`x[:, 0] = …`): all that share it, back to its base.

    A node that reads one of them later reads the new content, although the graph does not show that.
    """
    out: set[fx.Node] = set()
    for node in nodes:
        shared = node.args[0] if mutates(node) else None
        if not isinstance(shared, fx.Node):
            continue
        same = mutates(shared) and shared.args[0] in out
        if shares(shared) or same or any(shares(user) for user in shared.users):
            while isinstance(shared, fx.Node) and shared not in out:
                out.add(shared)
                shared = shared.args[0] if shares(shared) or mutates(shared) else None
    return out


def shares(node: fx.Node) -> bool:
    """Whether a node's result may share the memory of its first argument."""
    if isinstance(node.target, torch._ops.OpOverload):
        return not mutates(node) and any(r.alias_info is not None for r in node.target._schema.returns)
    return node.target is operator.getitem


def last_uses(nodes: Sequence[fx.Node]) -> dict[fx.Node, list[fx.Node]]:
    """For every node, the nodes whose values nothing reads after it."""
    seen: set[fx.Node] = set()
    out: dict[fx.Node, list[fx.Node]] = {}
    for node in reversed(nodes):
        out[node] = [n for n in dict.fromkeys(node.all_input_nodes) if n not in seen]
        seen.update(out[node])
        if node not in seen and node.op != "output":
            out[node].append(node)
    return out
