"""Operations that only move numbers: the same operation is run on the ids. Also creation, joining and writes."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from coreprune.graph.execution import shares
from coreprune.graph.ops import of_kind
from coreprune.graph.rules.einsum_space import pointwise, stretched
from coreprune.graph.rules.registry import Call, rule
from coreprune.graph.values import FIXED, Value, align, axes, compact, merge_kind, place

VIEWS = (torch.ops.aten.view.default, torch.ops.aten._unsafe_view.default)


def move(value: Value, function: Callable[[Tensor], Any]) -> Any:
    """The result of an operation that only moves numbers, found by moving the channel ids in the same way.

    value: the argument. function: the movement; it gets a tensor of whole numbers in the shape of the argument.

    Returns one Value, or a list of them where the function returns several tensors.
    """
    results = [function(ids.expand(value.shape)) for ids in value.maps]
    if not results:
        # The shape still has to be known; a meta tensor costs nothing.
        result = function(torch.empty(value.shape, dtype=torch.int64, device="meta"))
        return pytree.tree_map_only(Tensor, lambda x: value.with_maps((), x.shape), result)
    if isinstance(results[0], Tensor):
        return value.with_maps([compact(r) for r in results], results[0].shape)
    return [value.with_maps([compact(r[i]) for r in results], results[0][i].shape) for i in range(len(results[0]))]


@rule(*of_kind("move"))
def _move(call: Call) -> Any:
    value = call.args[0]
    if not isinstance(value, Value):
        return NotImplemented
    _note_steps(call, value)
    rest = pytree.tree_map_only(Value, lambda v: torch.empty(v.shape), (call.args[1:], call.kwargs))
    # The ids are broadcast, so their strides differ from the real ones.
    target = torch.reshape if call.node.target in VIEWS else call.node.target
    result = move(value, lambda ids: target(ids, *rest[0], **rest[1]))  # pyright: ignore[reportCallIssue]
    pieces = [v for v in result if isinstance(v, Value)] if isinstance(result, (list, tuple)) else []
    if len(pieces) > 1 and call.name != "unbind":
        _equal_pieces(call, value, pieces)
    if call.name == "expand" and value.weight and isinstance(result, Value):
        return _widened(call, value, result)
    return result


def _widened(call: Call, value: Value, result: Value) -> Value:
    """A weight repeated along an axis, such as a mask for every head, has ids of its own there.

    They become those of the channels that they meet. Whether the number of repetitions follows is for the check to say.
    """
    ndim = len(result.shape)
    before = (1,) * (ndim - len(value.shape)) + value.shape
    new = [place(call.tracer.fresh([n]), [a], ndim) for a, n in enumerate(result.shape) if n > 1 and before[a] == 1]
    return result.with_maps([*result.maps, *new])


def _note_steps(call: Call, value: Value) -> None:
    """A slice with a step, or a shift, picks other channels once some of its axis have left.

    It picks the same ones if what leaves does not vary along the axis (whole heads), or leaves in whole steps.
    """
    ndim = len(value.shape)
    if call.name == "slice" and (step := call.arg(4, "step", 1)) != 1:
        axis, start, end = call.arg(1, "dim", 0) % ndim, call.arg(2, "start") or 0, call.arg(3, "end")
        n = value.shape[axis]
        if 0 <= start < step and n % step == 0 and (end is None or end >= n):  # as in x[..., ::2] and x[..., 1::2]
            for ids in value.maps:
                if axis in axes(ids):
                    call.tracer.tie(ids.unflatten(axis, (n // step, step)), [axis + 1])
            return
        touched = {axis}
    elif call.name == "roll":
        dims = call.arg(2, "dims", ())
        touched = {d % ndim for d in (dims if isinstance(dims, (list, tuple)) else [dims])} or set(range(ndim))
    else:
        return
    reason = f"{call.name} with a fixed step along the channels ({call.node.name})"
    call.tracer.fixed += [(ids, axes(ids) & touched, reason) for ids in value.maps if axes(ids) & touched]


def _equal_pieces(call: Call, value: Value, pieces: list[Value]) -> None:
    """Where a channel axis is cut into equal pieces, the same number of channels must stay in each."""
    cut = next((a for a, n in enumerate(value.shape) if pieces[0].shape[a] != n), None)
    if cut is None or any(p.shape != pieces[0].shape for p in pieces):
        return
    for ids in value.maps:
        if axes(ids) == {cut}:
            call.tracer.balanced.append(
                (
                    ids.reshape(len(pieces), -1),
                    f"the same number has to stay in each of {len(pieces)} pieces ({call.node.name})",
                )
            )


@rule(*of_kind("like"))
def _like(call: Call) -> Any:
    value = call.args[0]
    return Value(value.shape, value.maps, value.weight, value.created)


@rule(*of_kind("creation", "creation like"))
def _create(call: Call) -> Any:
    value = call.node.meta.get("val")
    if not isinstance(value, Tensor):
        return value
    model = call.args[0] if call.operation.kind == "creation like" else None
    if isinstance(model, Value) and model.shape == tuple(value.shape):
        return Value(model.shape, model.maps, created=not model.maps)
    return Value(tuple(value.shape), created=True)


@rule(*of_kind("check"))
def _nothing(_: Call) -> Any:
    """A check has no result."""


@rule(*of_kind("pad"))
def _pad(call: Call) -> Any:
    """Padded positions stay: their number is written in the forward."""
    value, widths = call.args[0], list(call.args[1])
    shape = call.shape
    mode = call.args[2] if len(call.args) > 2 and isinstance(call.args[2], str) else call.kwargs.get("mode", "constant")
    ndim = len(value.shape)
    if mode == "constant":
        maps = []
        for ids in value.maps:  # an axis without ids stays so: a padded row belongs to its channel like any other
            own = [n if ids.shape[ndim - 1 - i // 2] > 1 else 0 for i, n in enumerate(widths)]
            maps.append(torch.ops.aten.constant_pad_nd(ids, own, FIXED))
        return value.with_maps(maps, shape)
    padded = {ndim - 1 - i // 2 for i, n in enumerate(widths) if n}
    for ids in value.maps:
        if axes(ids) & padded:
            call.tracer.lock(ids, f"channels are padded by {mode} ({call.node.name})")
    return value.with_maps([x for x in value.maps if not axes(x) & padded], shape)


@rule(*of_kind("cat"))
def _cat(call: Call) -> Any:
    nodes: Any = call.node.args[0]
    parts = [(v, n) for v, n in zip(call.args[0], nodes, strict=True) if len(v.shape) > 1 or v.shape != (0,)]
    values = [v for v, _ in parts]
    axis = call.arg(1, "dim", 0) % len(values[0].shape)
    return join_along(call, values, axis, [stretched(n) for _, n in parts])


@rule(*of_kind("stack"))
def _stack(call: Call) -> Any:
    ndim = len(call.args[0][0].shape) + 1
    axis = call.arg(1, "dim", 0) % ndim
    values = [move(v, lambda ids: ids.unsqueeze(axis)) for v in call.args[0]]
    return join_along(call, values, axis)


def join_along(call: Call, values: list[Value], axis: int, loose: Sequence[frozenset[int]] = ()) -> Value:
    """Concatenation. Ids along the axis are strung together; ids along the other axes meet.

    loose: for every value, the axes whose sizes follow those of the others (`stretched`).
    """
    shape = call.shape
    flat = (*shape[:axis], 1, *shape[axis + 1 :])
    weight, created = merge_kind(values)
    # Layers of different operands belong together when they vary along the same other axes.
    strung = {axes(x) - {axis} for v in values for x in v.maps if axis in axes(x)}
    loose = loose or [frozenset()] * len(values)
    values = [_followed(call, v, axis, a, strung) for v, a in zip(values, loose, strict=True)]
    strung = {axes(x) - {axis} for v in values for x in v.maps if axis in axes(x)}
    across = [
        Value(
            tuple(1 if a == axis or a in follows else n for a, n in enumerate(v.shape)),
            tuple(x for x in v.maps if axes(x) - {axis} not in strung),
            v.weight,
            v.created,
        )
        for v, follows in zip(values, loose, strict=True)
    ]
    maps = list(pointwise(call, across, flat).maps) if any(v.maps for v in across) else []
    for key in strung:
        parts = []
        for v in values:
            mine = [x for x in v.maps if axes(x) - {axis} == key]
            for extra in mine[1:]:
                call.tracer.lock(extra, f"two kinds of channels on one axis ({call.node.name})")
            ids = mine[0] if mine else torch.full((1,) * len(shape), FIXED)
            parts.append(ids.expand([n if a in key | {axis} else 1 for a, n in enumerate(v.shape)]))
        maps.append(compact(torch.cat(parts, axis)))
    return Value(shape, weight=weight, created=created).with_maps(maps)


def _followed(call: Call, value: Value, axis: int, loose: Collection[int], strung: Collection[frozenset[int]]) -> Value:
    """A part that has no ids along the axes of a split (heads), and follows the others there, gets ids of its own.

    So does what all heads share: a part of the keys that is the same for every head.
    """
    for key in sorted(strung, key=len, reverse=True):
        mine = [x for x in value.maps if axis in axes(x)]
        follows = key and (value.created or key <= set(loose)) and all(value.shape[a] > 1 for a in key)
        if follows and not value.weight and all(axes(x) == {axis} for x in mine) and len(mine) < 2:
            ids = call.tracer.fresh([n if a in key | {axis} else 1 for a, n in enumerate(value.shape)])
            call.tracer.tie(ids, [axis])
            call.tracer.partial += [(ids, x) for x in mine]
            return value.with_maps([ids, *(x for x in value.maps if axis not in axes(x))])
    return value


def channels_only(call: Call, ids: Tensor, axis: int) -> Tensor | None:
    """The id map reduced to the channel axis, or None where it does not vary along this axis.

    The ids that one channel has at several places leave together.
    """
    if axis not in axes(ids):
        call.tracer.lock(ids, f"channels on a spatial axis ({call.node.name})")
        return None
    return call.tracer.tie(ids, sorted(axes(ids) - {axis}))


def one_expert(call: Call, stacked: Value) -> Value:
    """One of several weights that are stacked along axis 0. The data picks which one, so no expert can leave."""
    maps = []
    for ids in stacked.maps:
        if 0 in axes(ids):
            call.tracer.lock(ids, f"experts are picked by the data ({call.node.name})")
            continue
        for name, _ in call.tracer.origins(ids):
            call.tracer.experts[name] = stacked.shape[0]
        maps.append(ids[0])
    return Value(stacked.shape[1:], tuple(maps), stacked.weight)


@rule(*of_kind("expand as"))
def _expand_as(call: Call) -> Any:
    """Axes of size 1 grow to the size of another tensor, and shrink with it."""
    value, other = call.args[0], call.args[1]
    ndim = len(other.shape)
    own = [align(x, ndim) for x in value.maps]
    grown = {a for a, n in enumerate(other.shape) if n > 1 and ((1,) * ndim + value.shape)[-ndim:][a] == 1}
    return value.with_maps([*own, *(x for x in other.maps if axes(x) <= grown)], other.shape)


@rule(*of_kind("channel shuffle"))
def _channel_shuffle(call: Call) -> Any:
    """[N, g k, ...] seen as [g, k] and transposed: the k-th channels of all groups leave together."""
    value, groups = call.args[0], call.args[1]
    maps = []
    for ids in value.maps:
        one = channels_only(call, ids, 1)
        if one is not None:
            sections = one.reshape(groups, -1)
            call.tracer.tie(sections, [0])
            maps.append(sections.t().reshape(one.shape))
    return value.with_maps(maps)


@rule(*of_kind("pixel shuffle"))
def _pixel_shuffle(call: Call) -> Any:
    """[..., C r^2, H, W] -> [..., C, rH, rW]: r^2 channels make one."""
    value, r = call.args[0], call.args[1]
    maps = []
    for ids in value.maps:
        one = channels_only(call, ids, len(value.shape) - 3)
        if one is not None:
            sections = one.reshape(-1, r * r)
            maps.append(call.tracer.tie(sections, [1]).reshape(*one.shape[:-3], -1, 1, 1))
    return value.with_maps(maps, call.shape)


@rule(*of_kind("write"))
def _write(call: Call) -> Any:
    """A write into a part of a tensor. Ids are not followed through it, unless all of the tensor is written."""
    if call.name == "copy" and isinstance(call.node.args[0], fx.Node) and not shares(call.node.args[0]):
        return pointwise(call, call.values())
    call.tracer.lock_all(call.values(), f"written into a part of a tensor ({call.node.name})")
    return Value(call.shape)


@rule(*of_kind("patches"))
def _im2col(call: Call) -> Any:
    """Patches [N, C, H, W] -> [N, C*kh*kw, L]: each channel fills a run of kh*kw rows."""
    value, kernel = call.args[0], call.args[1]
    shape = call.shape
    maps = []
    for ids in value.maps:
        if axes(ids) == {1}:
            maps.append(ids.reshape(1, -1, 1).repeat_interleave(kernel[0] * kernel[1], 1))
        else:
            call.tracer.lock(ids, f"channels on a spatial axis ({call.node.name})")
    return value.with_maps(maps, shape)


@rule(*of_kind("folding"))
def _col2im(call: Call) -> Any:
    """And back, [N, C*kh*kw, L] -> [N, C, H, W]: a channel is a run of kh*kw rows, which leave together."""
    value, kernel, ndim = call.args[0], call.args[2], len(call.shape)
    maps = []
    for ids in value.maps:
        one = channels_only(call, ids, len(value.shape) - 2)
        if one is not None:
            runs = one.reshape(*[1] * (ndim - 3), -1, kernel[0] * kernel[1], 1)
            maps.append(call.tracer.tie(runs, [ndim - 2]))
    return value.with_maps(maps, call.shape)
