"""Operations with weights and contractions: where channels are made (out) and read (in)."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx

from coreprune.graph.channels import Slot, Tracer, Work, out_shape, rule
from coreprune.graph.rules_movement import channels_only, move
from coreprune.graph.values import FIXED, Value, align, axes


def _arg(args: tuple[Any, ...], kwargs: dict[str, Any], at: int, name: str, default: Any = None) -> Any:
    return args[at] if len(args) > at else kwargs.get(name, default)


def add_bias(
    tracer: Tracer, node: fx.Node, value: Value, bias: Value | None, axis: int = -1, role: str = "out"
) -> Value:
    """The bias has one number per channel along `axis`; it is made with them (role "out")."""
    if bias is None:
        return value
    ndim = len(value.shape)
    shape = [1] * ndim
    if len(bias.shape) == 1:
        shape[axis] = bias.shape[0]
        layers = tuple(x.reshape([1 if n == 1 else x.numel() for n in shape]) for x in bias.layers)
        bias = replace(bias, shape=tuple(shape), layers=layers)
    for layer in bias.layers:
        tracer.play(bias, layer, role)
    return replace(tracer.pointwise(node, [value, bias], value.shape), weight=value.weight and bias.weight)


def data(value: Value) -> Value:
    """What enters a layer counts as an activation, even if it is a parameter (learned queries)."""
    return replace(value, weight=False)


def product(
    tracer: Tracer, node: fx.Node, a: Value, b: Value, sources: tuple[int, int] = (0, 1), whole: bool = False
) -> Value:
    """Matrix product with batch axes, [..., m, k] @ [..., k, n] -> [..., m, n]; vectors as in torch.matmul."""
    left, right = len(a.shape) == 1, len(b.shape) == 1
    if left:
        a = move(a, lambda ids: ids.unsqueeze(0))
    if right:
        b = move(b, lambda ids: ids.unsqueeze(1))
    batch = max(len(a.shape), len(b.shape)) - 2
    m, k, n = batch, batch + 1, batch + 2
    where_a = [*range(batch + 2 - len(a.shape), batch), m, k]
    where_b = [*range(batch + 2 - len(b.shape), batch), k, n]
    layers = tracer.contract(node, [a, b], [where_a, where_b], [*range(batch), m, n], whole=whole, sources=sources)
    lead = torch.broadcast_shapes(a.shape[:-2], b.shape[:-2])
    result = Value((*lead, a.shape[-2], b.shape[-1]), weight=a.weight and b.weight).with_layers(layers)
    if left:
        result = move(result, lambda ids: ids.squeeze(-2))
    if right:
        result = move(result, lambda ids: ids.squeeze(-1))
    return result


@rule("linear")
def _linear(tracer: Tracer, node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    x, weight, bias = data(args[0]), args[1], _arg(args, kwargs, 2, "bias")
    flipped = move(weight, lambda ids: ids.t())
    return add_bias(tracer, node, product(tracer, node, x, flipped), bias)


@rule("mm", "bmm", "matmul", "mv", "dot")
def _matmul(tracer: Tracer, node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return product(tracer, node, args[0], args[1])


@rule("addmm", "baddbmm")
def _addmm(tracer: Tracer, node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return add_bias(tracer, node, product(tracer, node, data(args[1]), args[2], (1, 2)), args[0])


@rule("_grouped_mm", "grouped_mm_fallback")
def _grouped_mm(tracer: Tracer, node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Tokens sorted by expert times stacked expert weights: [S, k] @ [E, k, n] -> [S, n]."""
    x, weight = data(args[0]), args[1]
    if len(x.shape) != 2 or len(weight.shape) != 3:
        return NotImplemented
    return product(tracer, node, x, one_expert(tracer, node, weight))


@rule("lstm", "gru", "rnn_tanh", "rnn_relu")
def _recurrent(tracer: Tracer, node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Locked; but what it costs is known: every weight matrix once per time step."""
    weights = [v for v in args[2] if isinstance(v, Value) and len(v.shape) == 2]
    steps = math.prod(args[0].shape[:-1])
    tracer.work.append(Work(node.name, steps * sum(math.prod(v.shape) for v in weights), ()))
    return NotImplemented


@rule("einsum")
def _einsum(tracer: Tracer, node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    equation, values = args[0].replace(" ", ""), args[1]
    inputs, _, output = equation.partition("->")
    terms = inputs.split(",")
    if "." in equation or "->" not in equation or any(len(set(t)) != len(t) for t in terms) or len(values) > 2:
        return NotImplemented
    letters = {c: i for i, c in enumerate(sorted(set(inputs) - {","}))}
    where = [[letters[c] for c in t] for t in terms]
    layers = tracer.contract(node, values, where, [letters[c] for c in output])
    if len(values) == 1:
        tracer.work.pop()
    else:
        summed = set(letters) - set(output)
        for k, (value, term) in enumerate(zip(values, terms, strict=True)):
            for layer in () if value.weight else value.layers:
                over = [a for a in axes(layer) if term[a] in summed]
                if axes(layer) == set(over) and len(over) == 1:
                    other = values[1 - k]
                    params = {s for x in other.layers if other.weight for s in tracer.origins(x)}
                    named = node.args[1][k]  # pyright: ignore
                    tracer.read(node, -1, over[0], layer.reshape(-1), params, getattr(named, "name", ""))
    return Value(out_shape(node), weight=all(v.weight for v in values)).with_layers(layers)


@rule("scaled_dot_product_attention")
def _attention(tracer: Tracer, node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """softmax(q kT / sqrt(d) + mask) v: heads leave as a whole, because the scale depends on their width."""
    q, k, v, mask = args[0], args[1], args[2], _arg(args, kwargs, 3, "attn_mask")
    if _arg(args, kwargs, 7, "enable_gqa", False):
        k, v = (move(t, lambda ids, n=q.shape[-3] // t.shape[-3]: ids.repeat_interleave(n, -3)) for t in (k, v))
    scores = product(tracer, node, q, move(k, lambda ids: ids.transpose(-1, -2)), whole=True)
    if mask is not None:
        scores = tracer.pointwise(node, [scores, mask], scores.shape)
    tracer.statistic(node, scores, [-1], "softmax over channels")
    return product(tracer, node, scores, v, (0, 2))


def _conv_io(tracer: Tracer, node: fx.Node, x: Value) -> list[Tensor]:
    """The channel layers of the input of a convolution, one id per channel."""
    return [y for layer in x.layers if (y := channels_only(tracer, node, layer, 1)) is not None]


@rule("conv1d", "conv2d", "conv3d", "convolution", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d")
def _conv(tracer: Tracer, node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    x, weight, bias = data(args[0]), args[1], _arg(args, kwargs, 2, "bias")
    name = str(node.target)
    if "convolution" in name:
        transposed, groups = args[6], args[8]
    else:
        transposed = "transpose" in name
        groups = _arg(args, kwargs, 7 if transposed else 6, "groups", 1)
        if transposed:
            groups = _arg(args, kwargs, 6, "groups", 1)
    shape = out_shape(node)
    if len(x.shape) != len(weight.shape):
        return NotImplemented  # unbatched input
    kernel = math.prod(weight.shape[2:])
    spatial = math.prod(x.shape[2:] if transposed else shape[2:])
    good = _conv_io(tracer, node, x)
    flat = Value((x.shape[0], x.shape[1]), tuple(g.reshape(1, -1) for g in good), x.weight)
    filters = Value(
        (weight.shape[0], weight.shape[1]),
        tuple(w.reshape(w.shape[:2]) for w in weight.layers if not any(a > 1 for a in axes(w))),
        weight=weight.weight,
    )
    # positions of the joint space: 0 batch, 1 in, 2 out
    role = "out"
    if groups == 1:
        where = [1, 2] if transposed else [2, 1]
        layers = tracer.contract(node, [flat, filters], [[0, 1], where], [0, 2], kernel * spatial, sources=(0, 1))
    elif groups == x.shape[1] and weight.shape[1] == 1:
        role = "other"
        layers = _depthwise(tracer, node, flat, filters, shape[1], kernel * spatial * shape[0])
    else:
        layers = _grouped(tracer, node, flat, filters, groups, kernel * spatial * shape[0], transposed)
    ndim = len(shape)
    result = Value(shape, weight=x.weight and weight.weight)
    result = result.with_layers([x.reshape(1, -1, *[1] * (ndim - 2)) for x in layers if x.numel() > 1])
    return add_bias(tracer, node, result, bias, 1, role)


def _depthwise(tracer: Tracer, node: fx.Node, x: Value, weight: Value, n_out: int, factor: int) -> tuple[Tensor, ...]:
    """Each input channel makes its own n_out/n_in outputs: they leave with it."""
    n_in = x.shape[1]
    ids_in = x.layers[0].reshape(-1) if x.layers else torch.full((n_in,), FIXED)
    made = [w.reshape(-1) for w in weight.layers if axes(w) == {0}]
    for layer in weight.layers:
        tracer.play(weight, layer, "other")
        tracer.depthwise.update(name for name, _ in tracer.origins(layer))
    ids_out = made[0] if made else ids_in.repeat_interleave(n_out // n_in)
    spread = ids_in.repeat_interleave(n_out // n_in)
    if n_out == n_in:
        tracer.unify(ids_out, spread)
    else:
        tracer.tied.unite(ids_out, spread)
        tracer.lock(ids_out[spread == FIXED], f"filters an input of a fixed size in {node.name}")
    layer = ids_out.reshape(1, -1)
    tracer.work.append(Work(node.name, factor * (1 if n_out > 1 else n_out), (layer,) if n_out > 1 else ()))
    return (layer,)


def _grouped(
    tracer: Tracer, node: fx.Node, x: Value, weight: Value, groups: int, factor: int, transposed: bool
) -> tuple[Tensor, ...]:
    """A grouped convolution: the same number of inputs and of outputs has to stay in every one of its groups."""
    origins = [o for layer in weight.layers for o in tracer.origins(layer)]
    param = next((name for name, _ in origins), None)
    ids_in = x.layers[0].reshape(-1) if x.layers else torch.full((x.shape[1],), FIXED)
    if transposed or param is None or tracer.captured.tensors[param][0][:2] != weight.shape:
        tracer.lock_all([x, weight], f"grouped convolution of a kind that is not supported ({node.name})")
        tracer.work.append(Work(node.name, factor * math.prod(weight.shape[:2]), ()))
        return ()
    reason = f"{node.name} has {groups} groups of channels"
    ids_out = next((w.reshape(-1) for w in weight.layers if axes(w) == {0}), torch.full((weight.shape[0],), FIXED))
    blocks = ids_in.reshape(groups, -1)
    for layer in weight.layers:
        if axes(layer) == {0}:
            tracer.play(weight, layer, "out")
    tracer.slots.pop((param, 1), None)
    tracer.blocked.append(Slot(param, 1, blocks))
    tracer.balanced += [(blocks, reason), (ids_out.reshape(groups, -1), reason)]
    tracer.read(node, 0, 1, ids_in, {(param, 1)})
    layers = (ids_out.reshape(1, -1), ids_in.reshape(-1, 1))
    tracer.work.append(Work(node.name, factor, layers, groups))
    return (align(ids_out.reshape(1, -1), 2),)
