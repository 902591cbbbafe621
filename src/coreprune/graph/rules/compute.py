"""Layers and matrix products, where channels are made (out) and read (in)."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from coreprune.graph.equations import equation_terms
from coreprune.graph.ops import of_kind
from coreprune.graph.rules.einsum_space import contract, pointwise, read, statistic
from coreprune.graph.rules.movement import channels_only, move, one_expert
from coreprune.graph.rules.registry import Call, rule
from coreprune.graph.tracer import Slot, Statistic, Work
from coreprune.graph.values import FIXED, Value, axes


def add_bias(call: Call, value: Value, bias: Value | None, axis: int = -1, *, role: str = "out") -> Value:
    """The bias has one number per channel along `axis`; it is made with them (role "out")."""
    if bias is None:
        return value
    ndim = len(value.shape)
    shape = [1] * ndim
    if len(bias.shape) == 1:
        shape[axis] = bias.shape[0]
        maps = tuple(x.reshape([1 if n == 1 else x.numel() for n in shape]) for x in bias.maps)
        bias = replace(bias, shape=tuple(shape), maps=maps)
    for ids in bias.maps:
        call.tracer.play(bias, ids, role)
    return replace(pointwise(call, [value, bias], value.shape), weight=value.weight and bias.weight)


def data(value: Value) -> Value:
    """What enters a layer counts as an activation, even if it is a parameter (learned queries)."""
    return replace(value, weight=False)


def product(call: Call, a: Value, b: Value, *, at: tuple[int, int] = (0, 1), whole: bool = False) -> Value:
    """The result of a matrix product, [..., m, k] @ [..., k, n] -> [..., m, n], with vectors as in torch.matmul.

    This is where channels are read (k) and made (n, if b is a parameter).

    call: what the rule got. a, b: the factors. at: the positions of a and b among the arguments of the call. whole:
        whether the channels that are summed over leave together, because the result depends on their number.
    """
    left, right = len(a.shape) == 1, len(b.shape) == 1
    if left:
        a = move(a, lambda ids: ids.unsqueeze(0))
    if right:
        b = move(b, lambda ids: ids.unsqueeze(1))
    batch = max(len(a.shape), len(b.shape)) - 2
    m, k, n = batch, batch + 1, batch + 2
    where_a = [*range(batch + 2 - len(a.shape), batch), m, k]
    where_b = [*range(batch + 2 - len(b.shape), batch), k, n]
    sources = [call.node.args[i] for i in at]
    maps = contract(call, [a, b], [where_a, where_b], [*range(batch), m, n], sources=sources, whole=whole)
    lead = torch.broadcast_shapes(a.shape[:-2], b.shape[:-2])
    result = Value((*lead, a.shape[-2], b.shape[-1]), weight=a.weight and b.weight).with_maps(maps)
    if left:
        result = move(result, lambda ids: ids.squeeze(-2))
    if right:
        result = move(result, lambda ids: ids.squeeze(-1))
    return result


@rule(*of_kind("linear"))
def _linear(call: Call) -> Any:
    x, weight, bias = data(call.args[0]), call.args[1], call.arg(2, "bias")
    flipped = move(weight, lambda ids: ids.t())
    return add_bias(call, product(call, x, flipped), bias)


@rule(*of_kind("matmul"))
def _matmul(call: Call) -> Any:
    return product(call, call.args[0], call.args[1])


@rule(*of_kind("addmm"))
def _addmm(call: Call) -> Any:
    return add_bias(call, product(call, data(call.args[1]), call.args[2], at=(1, 2)), call.args[0])


@rule(*of_kind("grouped matmul"))
def _grouped_mm(call: Call) -> Any:
    """Tokens sorted by expert times stacked expert weights: [S, k] @ [E, k, n] -> [S, n]."""
    x, weight = data(call.args[0]), call.args[1]
    if len(x.shape) != 2 or len(weight.shape) != 3:
        return NotImplemented
    return product(call, x, one_expert(call, weight))


@rule(*of_kind("recurrent"))
def _recurrent(call: Call) -> Any:
    """Recurrent layers stay whole. Their cost is known: every weight matrix once per time step."""
    weights = [v for v in call.args[2] if isinstance(v, Value) and len(v.shape) == 2]
    steps = math.prod(call.args[0].shape[:-1])
    call.tracer.work.append(Work(call.node.name, steps * sum(math.prod(v.shape) for v in weights), ()))
    call.lock("recurrent layers stay whole")
    return [Value(tuple(v.shape)) for v in call.node.meta["val"]]


@rule(*of_kind("einsum"))
def _einsum(call: Call) -> Any:
    """At most two operands: the graph has a chain of such sums where the forward has more."""
    values = list(call.args[1])
    terms, output = equation_terms(call.args[0], [len(v.shape) for v in values])
    if len(values) > 2:
        return NotImplemented
    for i in range(len(terms)):
        term = terms[i]
        while repeated := next((c for c in term if term.count(c) > 1), None):  # a diagonal, which comes last
            first = term.index(repeated)
            second = term.index(repeated, first + 1)
            values[i] = move(values[i], lambda ids, a=first, b=second: ids.diagonal(0, a, b))
            term = [*term[:first], *term[first + 1 : second], *term[second + 1 :], repeated]
        terms[i] = term
    letters = {c: i for i, c in enumerate(sorted({c for term in terms for c in term}))}
    where = [[letters[c] for c in t] for t in terms]
    sources = list(call.node.args[1])  # pyright: ignore[reportArgumentType]
    maps = contract(call, values, where, [letters[c] for c in output], sources=sources)
    if len(values) == 1:
        call.tracer.work.pop()  # a sum or a permutation, no products
    return Value(call.shape, weight=all(v.weight for v in values)).with_maps(maps)


@rule(*of_kind("attention"))
def _attention(call: Call) -> Any:
    """softmax(q kT / sqrt(d) + mask) v: heads leave as a whole, because the scale depends on their width."""
    q, k, v, mask = call.args[0], call.args[1], call.args[2], call.arg(3, "attn_mask")
    if call.arg(7, "enable_gqa", False):
        k, v = (move(t, lambda ids, n=q.shape[-3] // t.shape[-3]: ids.repeat_interleave(n, -3)) for t in (k, v))
    scores = product(call, q, move(k, lambda ids: ids.transpose(-1, -2)), whole=True)
    if mask is not None:
        scores = pointwise(call, [scores, mask], scores.shape)
    statistic(call, scores, [-1], "softmax over channels")
    return product(call, scores, v, at=(0, 2))


@rule(*of_kind("conv", "transposed conv"))
def _conv(call: Call) -> Any:
    x, weight, bias = data(call.args[0]), call.args[1], call.arg(2, "bias")
    transposed = call.operation.kind == "transposed conv"
    groups = call.arg(6, "groups", 1)
    shape = call.shape
    kernel = math.prod(weight.shape[2:])
    axis = len(x.shape) - len(weight.shape) + 1  # of the channels: 0 for one image without a batch axis
    batch = math.prod(x.shape[:axis])
    spatial = math.prod((x.shape if transposed else shape)[axis + 1 :])
    good = [y for ids in x.maps if (y := channels_only(call, ids, axis)) is not None]
    flat = Value(x.shape[: axis + 1], tuple(g.reshape([1] * axis + [-1]) for g in good), x.weight)
    filters = Value(
        (weight.shape[0], weight.shape[1]),
        tuple(w.reshape(w.shape[:2]) for w in weight.maps if not any(a > 1 for a in axes(w))),
        weight=weight.weight,
    )
    # positions of the joint space: 0 batch, 1 in, 2 out
    role = "out"
    if groups == 1:
        where = [1, 2] if transposed else [2, 1]
        maps = contract(
            call,
            [flat, filters],
            [[0, 1][1 - axis :], where],
            [0, 2][1 - axis :],
            sources=call.node.args[:2],
            factor=kernel * spatial,
        )
    elif groups == x.shape[axis] and weight.shape[1] == 1:
        role = "other"
        maps = _depthwise(call, flat, filters, shape[axis], kernel * spatial * batch)
    else:
        maps = _grouped(call, flat, filters, groups, kernel * spatial * batch)
    place = [-1 if a == axis else 1 for a in range(len(shape))]
    result = Value(shape, weight=x.weight and weight.weight)
    result = result.with_maps([x.reshape(place) for x in maps if x.numel() > 1])
    return add_bias(call, result, bias, axis, role=role)


def _depthwise(call: Call, x: Value, weight: Value, n_out: int, factor: int) -> tuple[Tensor, ...]:
    """Each input channel makes its own n_out/n_in outputs: they leave with it."""
    n_in = x.shape[-1]
    ids_in = x.maps[0].reshape(-1) if x.maps else torch.full((n_in,), FIXED)
    made = [w.reshape(-1) for w in weight.maps if axes(w) == {0}]
    for ids in weight.maps:
        call.tracer.play(weight, ids, "other")
        call.tracer.depthwise.update(name for name, _ in call.tracer.origins(ids))
    ids_out = made[0] if made else ids_in.repeat_interleave(n_out // n_in)
    spread = ids_in.repeat_interleave(n_out // n_in)
    if n_out == n_in:
        call.tracer.unify(ids_out, spread)
    else:
        call.tracer.tied.unite(ids_out, spread)
        call.tracer.lock(ids_out[spread == FIXED], f"filters an input of a fixed size ({call.node.name})")
    ids = ids_out.reshape(1, -1)
    call.tracer.work.append(Work(call.node.name, factor, (ids,), made=0))
    return (ids,)


def _grouped(call: Call, x: Value, weight: Value, groups: int, factor: int) -> tuple[Tensor, ...]:
    """A grouped convolution: the same number of inputs and of outputs has to stay in every one of its groups."""
    tracer, node = call.tracer, call.node
    param = next((name for ids in weight.maps for name, _ in tracer.origins(ids)), None)
    plain = param is not None and tracer.captured.tensors[param][0][:2] == weight.shape
    if call.operation.kind == "transposed conv" or not plain:
        tracer.lock_all([x, weight], f"grouped convolution of a kind that is not supported ({node.name})")
        tracer.work.append(Work(node.name, factor * math.prod(weight.shape), ()))
        return ()
    assert param is not None
    reason = f"the same number has to stay in each of {groups} groups ({node.name})"
    ids_in = x.maps[0].reshape(-1) if x.maps else torch.full((x.shape[-1],), FIXED)
    ids_out = next((w.reshape(-1) for w in weight.maps if axes(w) == {0}), torch.full((weight.shape[0],), FIXED))
    for ids in weight.maps:
        if axes(ids) == {0}:
            tracer.play(weight, ids, "out")
    sections = ids_in.reshape(groups, -1)
    before = tracer.slots.pop((param, 1), None)
    if before is not None:  # the weight may be standardised over its inputs, which are other channels in every group
        met = [s for s in tracer.statistics if bool(torch.isin(s.ids, before.ids).any())]
        tracer.statistics += [Statistic(sections, frozenset({1}), s.reason, s.flag) for s in met]
    known = next((s for s in tracer.sectioned if s.param == param), None)
    if known is None:
        tracer.sectioned.append(Slot(param, 1, sections))
    else:  # the same weight is used twice
        tracer.unify(known.ids, sections)
    tracer.balanced += [(sections, reason), (ids_out.reshape(groups, -1), reason)]
    read(call, node.args[0], len(x.shape) - 1, ids_in, {(param, 1)})
    tracer.work.append(Work(node.name, factor, (ids_out.reshape(1, -1), ids_in.reshape(-1, 1)), groups, made=0))
    return (ids_out.reshape(1, -1),)
