"""What happens where tensors meet: entry by entry, or in a sum of products. Both use one index space, as in einsum."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from coreprune.graph.captured import Captured
from coreprune.graph.ops import op_name, operation
from coreprune.graph.rules.registry import Call
from coreprune.graph.tracer import Read, Statistic, Tracer, Work
from coreprune.graph.values import FIXED, Value, align, axes, merge_kind, place


@dataclass(frozen=True, eq=False)
class Operand:
    """A value inside a joint index space: its id maps, and the axes on which its size is more than 1."""

    maps: tuple[Tensor, ...]
    covers: frozenset[int]
    created: bool = False


def pointwise(
    call: Call, values: Sequence[Value], shape: tuple[int, ...] | None = None, sources: Sequence[object] = ()
) -> Value:
    """The result of an element-wise operation: channels that stand at one place become one channel.

    call: what the rule got. values: the operands, broadcast as torch does it. Parameters among them lose the entries of
        channels that leave. shape: of the result; by default the one that was traced. sources: the nodes that the
        values come from, if they do so unchanged: what they expand follows the sizes of the others.
    """
    shape = call.shape if shape is None else shape
    operands = []
    for v, source in zip(values, sources or [None] * len(values), strict=True):
        loose = stretched(source)
        covers = frozenset(a + len(shape) - len(v.shape) for a, n in enumerate(v.shape) if n > 1 and a not in loose)
        operands.append(Operand(tuple(align(x, len(shape)) for x in v.maps), covers, v.created))
    maps = _meet(call, operands) if operands else ()
    for v in values:
        if v.weight and not all(u.weight for u in values):
            for ids in v.maps:
                call.tracer.play(v, ids, "other")
    weight, created = merge_kind(values)
    return Value(shape, weight=weight, created=created).with_maps(maps)


def contract(
    call: Call,
    values: Sequence[Value],
    where: Sequence[Sequence[int]],
    out: Sequence[int],
    *,
    sources: Sequence[object],
    factor: int = 1,
    whole: bool = False,
) -> tuple[Tensor, ...]:
    """A sum of products in a joint index space, as in einsum; returns the id maps of the result.

    Args:
        call: where the facts go.
        values: the operands.
        where: axis i of operand k is axis where[k][i] of the joint space.
        out: the joint axes of the result, in order; the others are summed over.
        sources: the nodes that the operands come from, for the record of where channels are read.
        factor: multiply-accumulates per element of the joint space (kernel size and positions of a convolution).
        whole: channels that are summed over leave together (the scale of attention depends on their number).
    """
    tracer = call.tracer
    ndim = 1 + max(a for w in where for a in w)
    sizes = [1] * ndim
    operands = []
    for v, w, source in zip(values, where, sources, strict=True):
        for a, n in zip(w, v.shape, strict=True):
            sizes[a] = max(sizes[a], n)
        # A split into heads is in front of what is summed, so that its axes are where the source has them.
        loose = stretched(source) if len(v.shape) > 2 else ()
        covers = frozenset(a for i, (a, n) in enumerate(zip(w, v.shape, strict=True)) if n > 1 and i not in loose)
        operands.append(Operand(tuple(place(x, w, ndim) for x in v.maps), covers, v.created))
    if not all(v.weight for v in values):
        for value, operand in zip(values, operands, strict=True):
            for ids in operand.maps:
                tracer.play(value, ids, "out" if axes(ids) <= set(out) else "in")
    met = _meet(call, operands)
    summed = set(range(ndim)) - set(out)
    if all(v.weight for v in values):
        for ids in met:
            if axes(ids) & summed:
                tracer.lock(ids, f"weights are summed over ({call.node.name})")
    kept = []
    for ids in met:
        over = axes(ids) & summed
        section = bool(over and axes(ids) - summed)  # one section per position that is left: heads
        if section or (over and whole):
            kept.append(tracer.tie(ids, sorted(over)))
        elif not over:
            kept.append(ids)
        if section:
            tracer.heads.append(kept[-1])
    _note_reads(call, values, where, summed, sources)
    free = math.prod(n for a, n in enumerate(sizes) if not any(a in axes(x) for x in met))
    new = {a for v, w in zip(values, where, strict=True) if v.weight for a in w}.intersection(out)
    new -= {a for v, w in zip(values, where, strict=True) if not v.weight for a in w}
    made = next((i for i, ids in enumerate(met) if axes(ids) & new), None)
    tracer.work.append(Work(call.node.name, factor * free, met, made=made))
    return tuple(ids.permute([*out, *sorted(summed)]).reshape([ids.shape[a] for a in out]) for ids in kept)


def stretched(node: Any) -> frozenset[int]:
    """The axes that were expanded from size 1: like those of a created tensor, they usually follow other widths."""
    while isinstance(node, fx.Node) and (operation(node).identity or op_name(node) == "to"):
        node = node.args[0]
    if not isinstance(node, fx.Node) or op_name(node) not in ("expand", "expand_as"):
        return frozenset()
    source: Any = node.args[0]
    old, new = source.meta["val"].shape, node.meta["val"].shape
    more = len(new) - len(old)
    return frozenset(a for a, n in enumerate(new) if n > 1 and (a < more or old[a - more] == 1))


def _note_reads(
    call: Call, values: Sequence[Value], where: Sequence[Sequence[int]], summed: set[int], sources: Sequence[object]
) -> None:
    """Record the operands whose channels are summed over, and the parameter axes that multiply them."""
    if all(v.weight for v in values):
        return
    params = {
        slot
        for v, w in zip(values, where, strict=True)
        if v.weight
        for ids in v.maps
        if {w[a] for a in axes(ids)} & summed
        for slot in call.tracer.origins(ids)
    }
    for v, w, source in zip(values, where, sources, strict=True):
        for ids in () if v.weight else v.maps:
            if len(axes(ids)) == 1 and all(w[a] in summed for a in axes(ids)):
                read(call, source, next(iter(axes(ids))), ids.reshape(-1), params)


def read(call: Call, source: object, axis: int, ids: Tensor, params: set[tuple[str, int]]) -> None:
    """Record that `ids` along `axis` of an argument (a node of the graph) are summed over, weighted by `params`."""
    name = ""
    if isinstance(source, fx.Node):
        name = source.name
        if axis == source.meta["val"].dim() - 1:
            axis = -1  # so that it also holds for the module's input, where the graph has flattened the other axes
    module = owner(call.node, call.tracer.captured)
    call.tracer.reads.append(Read(call.node.name, name, axis, ids, module, tuple(sorted(params))))


def statistic(call: Call, value: Value, over: Sequence[int], reason: str, flag: str | None = None) -> None:
    """Say that an operation mixes the channels along some axes, as a mean or a softmax does.

    Channels on a line along these axes then leave together or stay.

    call: what the rule got. value: the argument that is mixed. over: the axes. reason: why, in the words of a report.
    flag: name of a kind of statistic that may be allowed to change; None for what must not.
    """
    for ids in value.maps:
        along = axes(ids) & {a % len(value.shape) for a in over}
        if along:
            call.tracer.statistics.append(Statistic(ids, along, f"{reason} ({call.node.name})", flag))


def owner(node: fx.Node, captured: Captured) -> str | None:
    """The innermost module in whose forward a node was recorded."""
    stack = node.meta.get("nn_module_stack") or {}
    for path, _ in reversed(list(stack.values())):
        name = str(path).removeprefix("L['self'].").removeprefix("L['self']").split("@")[0]
        if name in captured.module_types:
            return name
    return None


# --- how id maps meet -----------------------------------------------------------------------------------------------
def _meet(call: Call, operands: Sequence[Operand]) -> tuple[Tensor, ...]:
    """The id maps of an element-wise combination of operands that live in one index space."""
    left = operands[0]
    for right in operands[1:]:
        left = _join(call, left, right)
    return left.maps


def _join(call: Call, a: Operand, b: Operand) -> Operand:
    kept: list[Tensor] = []
    met: set[int] = set()
    reason = f"meets a tensor of a fixed size ({call.node.name})"
    for ids in a.maps:
        current, loose = ids, axes(ids)
        for j, other in enumerate(b.maps):
            if axes(ids) & axes(other):
                met.add(j)
                loose -= axes(other)
                current = _meet_maps(call.tracer, current, other, reason)
        if loose & b.covers and not b.created:
            call.tracer.fixed.append((current, loose & b.covers, reason))
        kept.append(current)
    for j, other in enumerate(b.maps):
        loose = (axes(other) & a.covers).difference(*(axes(x) for x in a.maps))
        if loose and not a.created:
            call.tracer.fixed.append((other, loose, reason))
        if j not in met:
            kept.append(other)
    return Operand(tuple(kept), a.covers | b.covers, a.created and b.created)


def _meet_maps(tracer: Tracer, a: Tensor, b: Tensor, reason: str) -> Tensor:
    big, small = (a, b) if len(axes(a)) >= len(axes(b)) else (b, a)
    inner, outer = axes(small), axes(big)
    if inner == outer:
        tracer.unify(big, small, reason)
        # where one side is fixed the other side's ids live on, so that later meetings find them
        return torch.where(big == FIXED, small, big)
    if inner < outer and min(outer) not in inner:
        # Rotary tables meet heads like this: no coupling as long as whole heads leave.
        tracer.partial.append((big, small))
        return big
    # One number per section (the attention of a head) times each channel of the section.
    tracer.tie_to(big, small, reason)
    return big if inner < outer else torch.broadcast_tensors(big, small)[0].contiguous()
