"""Run an exported graph on channel ids instead of numbers, and write down which ids meet.

Every axis of every parameter gets fresh ids. Two ids that meet element by element are the *same channel* (`same`); ids
that only ever leave together, such as the channels of one attention head, are *tied* (`tied`). What cannot be decided
before the whole graph has been seen is recorded and settled in `resolve.py`. The rules per operation are in
`rules_*.py`; an operation without a rule locks every channel that it reads.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from coreprune.graph.capture import Captured
from coreprune.graph.unionfind import Partition
from coreprune.graph.values import FIXED, Value, align, axes, merge_kind, place


@dataclass(frozen=True, eq=False)
class Slot:
    """One axis of one parameter or buffer, with an id per position.

    ids has shape [n], or [g, n] when axis 0 (`blocked`) falls into g equal blocks and each block has its own ids along
    `dim`: the second axis of a grouped convolution's weight.
    """

    param: str
    dim: int
    ids: Tensor


@dataclass(frozen=True, eq=False)
class Read:
    """A place where channels are contracted away: `ids` along `axis` of the tensor that enters `node` as `source`."""

    node: str
    source: str
    axis: int
    ids: Tensor
    module: str | None
    params: tuple[tuple[str, int], ...]


@dataclass(frozen=True, eq=False)
class Work:
    """Multiply-accumulates of one operation: factor * prod over layers (number of kept elements) // divisor."""

    node: str
    factor: int
    layers: tuple[Tensor, ...]
    divisor: int = 1


@dataclass(frozen=True, eq=False)
class Statistic:
    """A reduction over channels; fine when all ids on each line leave together, otherwise locks or is flagged."""

    ids: Tensor
    axes: frozenset[int]
    reason: str
    flag: str | None = None


@dataclass(frozen=True, eq=False)
class Operand:
    """A value inside a joint index space: its layers, and the axes on which its size is more than 1."""

    layers: tuple[Tensor, ...]
    covers: frozenset[int]
    created: bool = False


Rule = Callable[["Tracer", fx.Node, tuple[Any, ...], dict[str, Any]], Any]
RULES: dict[str, Rule] = {}


def rule(*names: str) -> Callable[[Rule], Rule]:
    """Register a function as the rule for these ATen operations (without the `aten::`)."""

    def register(function: Rule) -> Rule:
        for name in names:
            RULES[name] = function
        return function

    return register


def op_name(node: fx.Node) -> str:
    """`aten.add_.Tensor` -> `add`; other targets by their own name."""
    target = node.target
    if isinstance(target, torch._ops.OpOverload):
        name = target._schema.name.split("::")[-1]
        return name.rstrip("_") if not name.startswith("_") or name.endswith("_") else name
    return getattr(target, "__name__", str(target))


def values_in(*trees: Any) -> list[Value]:
    """Every abstract tensor in the arguments of a node."""
    return [x for x in pytree.tree_leaves(trees) if isinstance(x, Value)]


def out_shape(node: fx.Node) -> tuple[int, ...]:
    """The shape that torch.export found for the result of a node."""
    value = node.meta["val"]
    return tuple(int(n) for n in (value[0] if isinstance(value, (tuple, list)) else value).shape)


@dataclass(eq=False)
class Tracer:
    """What is known after running the graph on ids."""

    captured: Captured
    count: int = 0
    same: Partition = field(default_factory=Partition)
    tied: Partition = field(default_factory=Partition)
    slots: dict[tuple[str, int], Slot] = field(default_factory=dict)
    blocked: list[Slot] = field(default_factory=list)
    roles: dict[tuple[str, int], set[str]] = field(default_factory=dict)
    depthwise: set[str] = field(default_factory=set)
    locks: list[tuple[Tensor, str]] = field(default_factory=list)
    seen: dict[int, Tensor] = field(default_factory=dict)
    partial: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    fixed: list[tuple[Tensor, frozenset[int], str]] = field(default_factory=list)
    statistics: list[Statistic] = field(default_factory=list)
    balanced: list[tuple[Tensor, str]] = field(default_factory=list)
    reads: list[Read] = field(default_factory=list)
    work: list[Work] = field(default_factory=list)
    experts: dict[str, int] = field(default_factory=dict)
    heads: list[Tensor] = field(default_factory=list)
    origin: list[tuple[int, int, str, int]] = field(default_factory=list)

    # --- ids -------------------------------------------------------------------------------------------------------
    def parameter(self, name: str) -> Value:
        """The value of a parameter or buffer: one layer per axis longer than 1."""
        shape, _ = self.captured.tensors[name]
        layers = []
        for dim, n in enumerate(shape):
            if n < 2:
                continue
            if (name, dim) not in self.slots:
                ids = torch.arange(self.count, self.count + n)
                self.slots[name, dim] = Slot(name, dim, ids)
                self.origin.append((self.count, self.count + n, name, dim))
                self.count += n
            layers.append(place(self.slots[name, dim].ids, [dim], len(shape)))
        return Value(shape, tuple(layers), weight=True)

    def origins(self, layer: Tensor) -> set[tuple[str, int]]:
        """The parameter axes whose ids occur in a layer (as written; ids that were united with them do not count)."""
        ids = layer[layer >= 0]
        if not len(ids):
            return set()
        low, high = int(ids.min()), int(ids.max())
        return {
            (name, dim)
            for lo, hi, name, dim in self.origin
            if lo <= high and low < hi and bool(((ids >= lo) & (ids < hi)).any())
        }

    def play(self, value: Value, layer: Tensor, role: str) -> None:
        """Note what role the parameter axes behind a layer of a weight play."""
        if value.weight:
            for slot in self.origins(layer):
                self.roles.setdefault(slot, set()).add(role)

    # --- what the rules say ----------------------------------------------------------------------------------------
    def unify(self, a: Tensor, b: Tensor, reason: str = "meets positions of a fixed size") -> None:
        """The ids of a and b (broadcast) are the same channels; an id that meets a fixed position stays."""
        a, b = torch.broadcast_tensors(a, b)
        self.same.unite(a, b)
        self.lock(a[(b == FIXED) & (a != FIXED)], reason)
        self.lock(b[(a == FIXED) & (b != FIXED)], reason)

    def tie_to(self, a: Tensor, b: Tensor, reason: str) -> None:
        """The ids of a and b (broadcast) leave together, but are different channels."""
        a, b = torch.broadcast_tensors(a, b)
        self.tied.unite(a, b)
        self.lock(a[(b == FIXED) & (a != FIXED)], reason)
        self.lock(b[(a == FIXED) & (b != FIXED)], reason)

    def tie(self, layer: Tensor, along: Sequence[int]) -> Tensor:
        """All ids on each line along these axes leave together; returns the layer without these axes' variation."""
        first = layer
        for a in along:
            first = first.narrow(a, 0, 1)
        self.tied.unite(layer, first)
        mixed = (layer == FIXED) != (first == FIXED)
        if bool(mixed.any()):
            self.lock(layer, "leaves together with positions of a fixed size")
        return first

    def lock(self, ids: Tensor, reason: str) -> None:
        """These channels stay."""
        ids = ids[ids >= 0]
        if len(ids):
            self.locks.append((ids.reshape(-1), reason))

    def lock_all(self, values: Sequence[Value], reason: str) -> None:
        """Every channel of these values stays."""
        for value in values:
            for layer in value.layers:
                self.lock(layer, reason)

    # --- joint index spaces ----------------------------------------------------------------------------------------
    def meet(self, operands: Sequence[Operand], where: str) -> tuple[Tensor, ...]:
        """The layers of an element-wise combination of operands that live in one index space."""
        left = operands[0]
        for right in operands[1:]:
            left = self._join(left, right, where)
        return left.layers

    def _join(self, a: Operand, b: Operand, where: str) -> Operand:
        kept: list[Tensor] = []
        met: set[int] = set()
        reason = f"meets a tensor of a fixed size in {where}"
        for layer in a.layers:
            current, loose = layer, axes(layer)
            for j, other in enumerate(b.layers):
                if not axes(layer) & axes(other):
                    continue
                met.add(j)
                loose -= axes(other)
                current = self._meet_layers(current, other, reason)
            loose &= b.covers
            if loose and not b.created:
                self.fixed.append((current, loose, reason))
            kept.append(current)
        for j, other in enumerate(b.layers):
            loose = axes(other) & a.covers
            for layer in a.layers:
                loose -= axes(layer)
            if loose and not a.created:
                self.fixed.append((other, loose, reason))
            if j not in met:
                kept.append(other)
        return Operand(tuple(kept), a.covers | b.covers, a.created and b.created)

    def _meet_layers(self, a: Tensor, b: Tensor, reason: str) -> Tensor:
        big, small = (a, b) if len(axes(a)) >= len(axes(b)) else (b, a)
        inner, outer = axes(small), axes(big)
        if inner == outer:
            self.unify(big, small, reason)
            return big
        if (
            inner < outer and min(outer) in inner
        ):  # one number per block (attention of a head) times each of its channels
            self.tie_to(big, small, reason)
            return big
        if inner < outer:  # rotary tables meet heads like this: no coupling as long as whole heads leave
            self.partial.append((big, small))
            return big
        self.tie_to(big, small, reason)
        return torch.broadcast_tensors(big, small)[0].contiguous()

    def pointwise(self, node: fx.Node, values: Sequence[Value], shape: tuple[int, ...] | None = None) -> Value:
        """Element-wise combination with broadcasting."""
        shape = out_shape(node) if shape is None else shape
        operands = []
        for v in values:
            covers = frozenset(a + len(shape) - len(v.shape) for a, n in enumerate(v.shape) if n > 1)
            operands.append(Operand(tuple(align(x, len(shape)) for x in v.layers), covers, v.created))
        layers = self.meet(operands, node.name) if operands else ()
        for v in values:
            if v.weight and not all(u.weight for u in values):
                for layer in v.layers:
                    self.play(v, layer, "other")
        weight, created = merge_kind(values)
        return Value(shape, weight=weight, created=created).with_layers(layers)

    def contract(
        self,
        node: fx.Node,
        values: Sequence[Value],
        where: Sequence[Sequence[int]],
        out: Sequence[int],
        factor: int = 1,
        whole: bool = False,
        sources: Sequence[int] = (),
    ) -> tuple[Tensor, ...]:
        """A sum of products in a joint index space, as in einsum; returns the layers of the result.

        Args:
            node: for names.
            values: the operands.
            where: axis i of operand k is axis where[k][i] of the joint space.
            out: the joint axes of the result, in order; the others are summed over.
            factor: multiply-accumulates per element of the joint space (kernel size and positions of a convolution).
            whole: channels that are summed over leave together (the scale of attention depends on their number).
            sources: positions of the operands among node.args, for the record of where channels are read.
        """
        ndim = 1 + max(a for w in where for a in w)
        sizes = [1] * ndim
        operands = []
        for v, w in zip(values, where, strict=True):
            for a, n in zip(w, v.shape, strict=True):
                sizes[a] = max(sizes[a], n)
            layers = tuple(place(x, w, ndim) for x in v.layers)
            operands.append(Operand(layers, frozenset(a for a, n in zip(w, v.shape, strict=True) if n > 1), v.created))
        self._note_roles(values, operands, set(out))
        met = self.meet(operands, node.name)
        summed = set(range(ndim)) - set(out)
        kept = []
        for layer in met:
            over = axes(layer) & summed
            if over and axes(layer) - summed:
                layer = self.tie(layer, sorted(over))  # noqa: PLW2901 - a block that only leaves as a whole
                self.heads.append(layer)
            elif over and whole:
                self.tie(layer, sorted(over))
            if axes(layer) & set(out):
                kept.append(layer)
        self._note_reads(node, values, where, summed, sources)
        free = math.prod(n for a, n in enumerate(sizes) if not any(a in axes(x) for x in met))
        self.work.append(Work(node.name, factor * free, met))
        return tuple(layer.permute([*out, *sorted(summed)]).reshape([layer.shape[a] for a in out]) for layer in kept)

    def _note_roles(self, values: Sequence[Value], operands: Sequence[Operand], out: set[int]) -> None:
        if all(v.weight for v in values):
            return
        for value, operand in zip(values, operands, strict=True):
            for layer in operand.layers:
                self.play(value, layer, "out" if axes(layer) <= out else "in")

    def _note_reads(
        self,
        node: fx.Node,
        values: Sequence[Value],
        where: Sequence[Sequence[int]],
        summed: set[int],
        sources: Sequence[int],
    ) -> None:
        params = {
            slot
            for v, w in zip(values, where, strict=True)
            if v.weight
            for layer in v.layers
            if {w[a] for a in axes(layer)} & summed
            for slot in self.origins(layer)
        }
        if all(v.weight for v in values):
            return
        for v, w, position in zip(values, where, sources, strict=False):
            if v.weight:
                continue
            for layer in v.layers:
                over = [a for a in axes(layer) if w[a] in summed]
                if len(over) == 1 and len(axes(layer)) == 1:
                    self.read(node, position, over[0], layer.reshape(-1), params)

    def read(
        self, node: fx.Node, position: int, axis: int, ids: Tensor, params: set[tuple[str, int]], name: str = ""
    ) -> None:
        """Record that `ids` along `axis` of argument `position` of a node are summed over."""
        source = node.args[position] if position >= 0 else None
        name = source.name if isinstance(source, fx.Node) else name
        self.reads.append(Read(node.name, name, axis, ids, owner(node, self.captured), tuple(sorted(params))))

    def statistic(self, node: fx.Node, value: Value, over: Sequence[int], reason: str, flag: str | None = None) -> None:
        """The channels on each line along these axes have to leave together, or the result would change."""
        for layer in value.layers:
            along = axes(layer) & {a % len(value.shape) for a in over}
            if along:
                self.statistics.append(Statistic(layer, along, f"{reason} in {node.name}", flag))

    # --- the run ---------------------------------------------------------------------------------------------------
    def run(self) -> Tracer:
        """Interpret the whole graph."""
        inputs: dict[str, Value | None] = {}
        for node in self.captured.graph.graph.nodes:
            if node.op == "placeholder":
                inputs[node.name] = self._input(node)
        result = self.interpret(self.captured.graph, list(inputs.values()))
        self.lock_all(values_in(result), "model output")
        return self

    def _input(self, node: fx.Node) -> Value | None:
        kind, name = self.captured.sources.get(node.name, ("input", node.name))
        if kind in ("parameter", "buffer"):
            return self.parameter(name)
        value = node.meta.get("val")
        return Value(tuple(value.shape), weight=kind == "constant") if isinstance(value, Tensor) else None

    def interpret(self, module: fx.GraphModule, inputs: Sequence[Any]) -> Any:
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
                env[node] = self._call(node, args, kwargs)
            for used in node.all_input_nodes:
                if last[used] is node:
                    env.pop(used, None)
        return None

    def _call(self, node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        name = op_name(node)
        if name == "getitem":
            return args[0][args[1]] if isinstance(args[0], (tuple, list)) else None
        if name.startswith("wrap_with"):
            at = next(i for i, a in enumerate(args) if isinstance(a, fx.GraphModule))
            return self.interpret(args[at], args[at + 1 :])
        function = RULES.get(name)
        if function is None and isinstance(node.target, torch._ops.OpOverload):
            function = RULES["pointwise"] if torch.Tag.pointwise in node.target.tags else None
        result = function(self, node, args, kwargs) if function else NotImplemented
        if result is NotImplemented:
            self.lock_all(values_in(args, kwargs), f"no rule for {name} ({node.name})")
            result = pytree.tree_map(_opaque, node.meta.get("val"))
        for value in values_in(result):
            for layer in value.layers:
                if len(axes(layer)) > 1:
                    self.seen[id(layer)] = layer
        return result


def _opaque(value: Any) -> Any:
    return Value(tuple(value.shape)) if isinstance(value, Tensor) else value


def owner(node: fx.Node, captured: Captured) -> str | None:
    """The innermost module in whose forward a node was recorded."""
    stack = node.meta.get("nn_module_stack") or {}
    for path, _ in reversed(list(stack.values())):
        name = str(path).removeprefix("L['self'].").removeprefix("L['self']").split("@")[0]
        if name in captured.module_types:
            return name
    return None


def without_axes(value: Value, drop: Sequence[int]) -> Value:
    """Keep only the layers that do not vary along these axes."""
    gone = {a % len(value.shape) for a in drop}
    return replace(value, layers=tuple(x for x in value.layers if not axes(x) & gone))
