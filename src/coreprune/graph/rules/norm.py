"""Norms, reductions, softmax, pooling and resampling."""

from __future__ import annotations

from typing import Any

from torch import Tensor, fx

from coreprune.graph.ops import of_kind, op_name
from coreprune.graph.rules.einsum_space import owner, pointwise, read, statistic
from coreprune.graph.rules.movement import channels_only, move
from coreprune.graph.rules.registry import Call, results, rule, values_in
from coreprune.graph.tracer import Normed
from coreprune.graph.values import Value, axes

NORM_FLAG = "norm-statistics"


@rule(*of_kind("channel norm"))
def _channel_norm(call: Call) -> Any:
    """One set of numbers per channel; nothing is shared between channels."""
    x = call.args[0]
    shape = [1] * len(x.shape)
    shape[1] = x.shape[1]
    values = [x]
    if call.args[5] is True:  # statistics of the batch; weights are standardised like this
        flag = NORM_FLAG if x.weight else None
        statistic(call, x, [a for a in range(len(shape)) if a != 1], "statistics over channels", flag)
    for p in call.args[1:5]:
        if isinstance(p, Value):
            values.append(Value(tuple(shape), tuple(y.reshape(shape) for y in p.maps), weight=p.weight))
    return results(call, pointwise(call, values, x.shape))


@rule(*of_kind("layer norm"))
def _layer_norm(call: Call) -> Any:
    x, n = call.args[0], len(call.args[1])
    over = list(range(len(x.shape) - n, len(x.shape)))
    statistic(call, x, over, "its channels enter the statistics of a norm", NORM_FLAG)
    params = [p for p in (call.arg(2, "weight"), call.arg(3, "bias")) if isinstance(p, Value)]
    return results(call, pointwise(call, [x, *params], x.shape))


@rule(*of_kind("group norm"))
def _group_norm(call: Call) -> Any:
    """Each section of channels has statistics of its own, so a section leaves as a whole, and the others do not notice.

    With a single section, all channels enter one statistic.
    """
    x, groups = call.args[0], call.args[1]
    for ids in x.maps:
        if groups == 1 or axes(ids) - {0, 1}:
            over = range(1, len(x.shape))
            statistic(call, Value(x.shape, (ids,)), over, "its channels enter the statistics of a norm", NORM_FLAG)
        elif axes(ids) == {1}:
            sections = ids.reshape(groups, -1)
            call.tracer.tie(sections, [1])
            call.tracer.normed.append(Normed(sections, call.node.name, owner(call.node, call.tracer.captured)))
        elif 1 in axes(ids):
            call.lock("channels that differ between samples", Value(x.shape, (ids,)))
    params = [p for p in (call.arg(2, "weight"), call.arg(3, "bias")) if isinstance(p, Value)]
    shape = [1] * len(x.shape)
    shape[1] = x.shape[1]
    scales = [Value(tuple(shape), tuple(y.reshape(shape) for y in p.maps), weight=True) for p in params]
    return pointwise(call, [x, *scales], x.shape)


def _reduced_axes(call: Call, ndim: int, at: int) -> tuple[list[int], bool]:
    """The axes that a reduction is over, and whether they are kept with size 1."""
    names = [a.name for a in call.node.target._schema.arguments]  # pyright: ignore
    dims = call.arg(at, "dim")
    keep = "keepdim" in names and bool(call.arg(names.index("keepdim"), "keepdim", False))
    if dims is None or dims == []:
        return list(range(ndim)), keep
    return [d % ndim for d in (dims if isinstance(dims, (list, tuple)) else [dims])], keep


def _is_norm_statistic(node: fx.Node) -> bool:
    """Whether a mean over channels is the statistic of a norm: it is soon subtracted, divided by, or under a root."""
    frontier = [node]
    for _ in range(4):
        steps = [(n, user) for n in frontier for user in n.users if user.op == "call_function"]
        frontier = [user for _, user in steps]
        for made, n in steps:
            name = op_name(n)
            if name in ("rsqrt", "sqrt", "sub", "reciprocal") or (name == "pow" and n.args[1] in (-1, -0.5, 0.5)):
                return True
            if name == "div" and n.args[1] is made:
                return True
    return False


@rule(*of_kind("sum", "mean", "spread", "vector norm", "reduction"))
def _reduce(call: Call) -> Any:
    """A reduction. A plain sum of activations, and a Euclidean norm, do not notice channels that are zero."""
    x, kind = call.args[0], call.operation.kind
    if len(values_in(call.args)) == 2:
        return pointwise(call, values_in(call.args))
    over, keep = _reduced_axes(call, len(x.shape), call.operation.dim)
    additive = kind == "sum" or (kind == "vector norm" and call.arg(1, "p", call.arg(1, "ord", 2)) == 2)
    flag = NORM_FLAG if kind in ("mean", "spread") and _is_norm_statistic(call.node) else None
    if kind == "spread" and not x.weight:
        flag = NORM_FLAG
    reason = "its channels enter the statistics of a norm" if flag else f"{call.name} over channels"
    if x.weight and kind in ("mean", "spread"):  # by which layers standardise their weight
        flag = NORM_FLAG
    maps = []
    for ids in x.maps:
        along = sorted(axes(ids) & set(over))
        current = ids
        if along and axes(ids) - set(over):
            current = call.tracer.tie(ids, along)
        elif along:
            if not (additive and not x.weight and len(along) == 1):
                statistic(call, Value(x.shape, (ids,)), along, reason, flag)
            else:
                read(call, call.node.args[0], along[0], ids.reshape(-1), set())
            continue
        maps.append(current if keep else _squeeze(current, over))
    values = call.node.meta["val"]
    if isinstance(values, (tuple, list)):
        return [Value(tuple(v.shape), weight=x.weight).with_maps(maps) for v in values]
    return Value(tuple(values.shape), weight=x.weight).with_maps(maps)


def _squeeze(ids: Tensor, over: list[int]) -> Tensor:
    return ids.reshape([n for a, n in enumerate(ids.shape) if a not in over])


@rule(*of_kind("mixing"))
def _along(call: Call) -> Any:
    """Mixes positions along one axis."""
    x = call.args[0]
    axis = call.arg(1, "dim", -1)
    statistic(call, x, [axis], f"{call.name} over channels")
    return results(call, x)


@rule(*of_kind("fourier"))
def _fourier(call: Call) -> Any:
    """A Fourier transform mixes along its axes, and may change their lengths."""
    x, size, over = call.args[0], call.arg(1, "s"), call.arg(call.operation.dim, "dim")
    if over is None:  # by default the last ones
        over = range(-(call.operation.space or len(size or x.shape)), 0)
    along = {a % len(x.shape) for a in (over if isinstance(over, (list, tuple, range)) else [over])}
    statistic(call, x, sorted(along), "Fourier transform over channels")
    lines = [call.tracer.tie(ids, sorted(axes(ids) & along)) for ids in x.maps if axes(ids) - along]
    return Value(call.shape, weight=x.weight).with_maps(lines)


@rule(*of_kind("ranking"))
def _ranked(call: Call) -> Any:
    """Positions are picked by their values, as a router picks experts."""
    x, axis = call.args[0], call.arg(call.operation.dim, "dim", -1)
    statistic(call, x, [axis], f"{call.name} over channels")
    kept = [ids for ids in x.maps if axis % len(x.shape) not in axes(ids)]
    return [Value(tuple(v.shape)).with_maps(kept) for v in call.node.meta["val"]]


@rule(*of_kind("gated"))
def _glu(call: Call) -> Any:
    """First half times sigmoid of the second half."""
    x, axis = call.args[0], call.arg(1, "dim", -1) % len(call.args[0].shape)
    halves = move(x, lambda ids: list(ids.chunk(2, axis)))
    return pointwise(call, halves)


@rule(*of_kind("spatial"))
def _spatial(call: Call) -> Any:
    """Works on each channel's picture alone; the channel axis is where the sizes of input and output agree."""
    x = call.args[0]
    shape = call.shape
    number = call.operation.space or len(shape) - 2
    space = set(range(len(shape) - number, len(shape)))
    maps = []
    for ids in x.maps:
        if not axes(ids) & space:
            maps.append(ids)
        elif (one := channels_only(call, ids, len(shape) - number - 1)) is not None:
            maps.append(one)
    return results(call, Value(shape, weight=x.weight).with_maps(maps))
