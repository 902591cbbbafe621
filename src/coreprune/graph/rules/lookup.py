"""Look-ups by position: embeddings, indexing, scattering, one-hot vectors."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from coreprune.graph.ops import of_kind
from coreprune.graph.rules.einsum_space import pointwise
from coreprune.graph.rules.movement import move
from coreprune.graph.rules.registry import Call, results, rule, values_in
from coreprune.graph.values import Value, align, axes, compact


@rule(*of_kind("embedding"))
def _embedding(call: Call) -> Any:
    """Rows of a table, or the sum, mean or maximum of several of them."""
    table = call.args[0]
    shape = call.shape
    call.tracer.lock_all(values_in(call.args[1:], call.kwargs), f"used as an index ({call.node.name})")
    maps = []
    for ids in table.maps:
        if axes(ids) == {1}:
            call.tracer.play(table, ids, "out")
            maps.append(align(ids[0], len(shape)))
        else:
            call.tracer.lock(ids, f"rows are looked up by index ({call.node.name})")
    return results(call, Value(shape).with_maps(maps))


@rule(*of_kind("index"))
def _index(call: Call) -> Any:
    """Indexing with computed positions. Channels along other axes are not affected."""
    value = call.args[0]
    rest = pytree.tree_map_only(Value, lambda v: torch.zeros(v.shape, dtype=torch.int64), (call.args[1:], call.kwargs))
    if call.name == "index":
        picked = {a for a, i in enumerate(call.args[1]) if i is not None}
    else:
        picked = {call.args[1] % len(value.shape)}
    call.tracer.lock_all(values_in(call.args[1:]), f"used as an index ({call.node.name})")
    chosen = value.weight and picked == {0} and not all(v.weight for v in values_in(call.args[1:]))
    if chosen and len(value.shape) > 1:
        for ids in value.maps:
            for name, _ in call.tracer.origins(ids) if 0 not in axes(ids) else ():
                call.tracer.experts[name] = value.shape[0]
    shape = call.shape
    maps = []
    for ids in lines(call, value, picked, f"looked up by index ({call.node.name})"):
        one = ids.expand([1 if a in picked else n for a, n in enumerate(value.shape)])
        maps.append(compact(call.node.target(one, *rest[0], **rest[1])))  # pyright: ignore[reportCallIssue]
        if chosen and len(value.shape) == 2:
            call.tracer.play(value, ids, "out")  # a look-up table makes its columns, like an embedding
    return Value(shape, weight=value.weight and not (chosen and len(value.shape) == 2)).with_maps(maps, shape)


@rule(*of_kind("one hot"))
def _one_hot(call: Call) -> Any:
    """Every number becomes a place along a new last axis, whose length is written in the forward."""
    shape = call.shape
    return replace(move(call.args[0], lambda ids: ids.unsqueeze(-1).expand(shape)), weight=False, created=False)


def lines(call: Call, value: Value, along: set[int], reason: str) -> list[Tensor]:
    """The id maps of a value with size 1 along some axes, where it is not known which position goes where.

    Ids on one line along these axes leave together. Ids that vary along no other axis are locked.
    """
    found = []
    for ids in value.maps:
        if not axes(ids) - along:
            call.tracer.lock(ids, reason)
        else:
            found.append(call.tracer.tie(ids, sorted(axes(ids) & along)))
    return found


@rule(*of_kind("scatter"))
def _scatter(call: Call) -> Any:
    """Positions along one axis that are computed. Along the other axes, everything meets at the same place."""
    x, shape, ndim = call.args[0], call.shape, len(call.shape)
    axis = call.args[1] % ndim
    reason = f"looked up by index ({call.node.name})"
    whole = [v for v in values_in(call.args[:1], call.args[2:], call.kwargs) if len(v.shape) == ndim]
    if x.weight and not all(v.weight for v in whole):
        return NotImplemented
    call.tracer.lock_all([v for v in values_in(call.args[2:]) if len(v.shape) != ndim], reason)
    other = set(range(ndim)) - {axis}
    partly = {a for a in other if any(v.shape[a] != shape[a] for v in whole)}  # only the first positions are meant
    operands = []
    for v in whole:
        for ids in v.maps:
            if axes(ids) & partly:
                call.tracer.lock(ids, reason)
        maps = [m for m in lines(call, v, {axis}, reason) if not axes(m) & partly]
        covered = other - partly
        if v is call.args[2]:  # an index is taken to follow the widths, as a created tensor is
            covered = {a for m in maps for a in axes(m)}
        size = tuple(n if a in covered else 1 for a, n in enumerate(v.shape))
        operands.append(Value(size, tuple(maps), v.weight, v.created))
    return Value(shape, weight=all(v.weight for v in whole)).with_maps(pointwise(call, operands, shape).maps)
