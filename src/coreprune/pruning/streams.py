"""Residual streams: what writes them, the norms that read them, and what has to change before they can be rotated."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import fx, nn

from coreprune.errors import ModelError
from coreprune.graph import Captured, Group, ParamSlice, find_groups
from coreprune.graph.ops import op_name
from coreprune.pruning.layer.linear_maps import Operator, operators

_WHOLE = ("layer_norm", "rms_norm")  # norms that are one operation
_STEPS = 8  # nodes between a layer and the norm that it reads, at most
_FLAG = "norm-statistics"


@dataclass(frozen=True)
class Scale:
    """The scale of one norm: what is computed from a parameter and multiplied by each channel.

    param: its name, or None for a norm without. plus: what the forward adds to it. shift: the name of what is added
    after it, or None. readers: the weights that read the norm, and their axes. module: whose input is the output of the
    norm. axis: of the channels.
    """

    param: str | None
    plus: float
    shift: str | None
    readers: tuple[ParamSlice, ...] = ()
    module: str | None = None
    axis: int = -1


@dataclass(frozen=True, eq=False)
class Stream:
    """One residual stream: its channels, what writes it, the norms that read it.

    written: weights, their biases, embeddings, tokens that are added. branches: the scale of every channel of a branch,
    as in CaiT and DINOv2, and the layer that it may be folded into.
    """

    group: Group
    scales: tuple[Scale, ...]
    written: tuple[ParamSlice, ...]
    branches: tuple[tuple[ParamSlice, Operator], ...]


def streams(captured: Captured) -> list[Group]:
    """The groups that enter a norm and that a basis can be given to. Raises ModelError if there is none."""
    entered = [g for g in find_groups(captured, norm_statistics=True) if _FLAG in g.flags]
    found = [g for g in entered if g.unit == 1 and g.sections is None and g.locked_because is None and _whole(g)]
    if not found:
        which = [f"{g.name} ({g.locked_because or 'single channels of it are used'})" for g in entered[:3]]
        raise ModelError(
            "there is no residual stream to rotate: "
            + (f"{', '.join(which)} cannot be written in another basis" if which else "no channels enter a norm")
            + ". Leave residual out."
        )
    return found


def _whole(group: Group) -> bool:
    """Whether each of its axes holds each channel once, and every reader is a weight."""
    every = torch.arange(group.size)
    return all(s.index.ndim == 1 and torch.equal(s.index.sort().values, every) for s in group.slices) and all(
        consumer.slices for consumer in group.consumers
    )


def like(captured: Captured, group: Group) -> Group:
    """The stream of a trace that is written like that of another trace of the model."""
    wanted = {(s.param, s.dim) for s in group.producers}
    return max(streams(captured), key=lambda g: len(wanted & {(s.param, s.dim) for s in g.producers}))


def stream_of(captured: Captured, group: Group) -> Stream:
    """What is around a group. Raises ModelError if a layer reads it without a norm."""
    scales = _scales(captured, group)
    norms = {name for scale in scales for name in (scale.param, scale.shift)}
    others = [s for s in group.others if s.param not in norms]
    branches = _branches(captured, group, others)
    rest = [s for s in others if s not in [scale for scale, _ in branches]]
    return Stream(group, tuple(scales), (*group.producers, *rest), tuple(branches))


def _scales(captured: Captured, group: Group) -> list[Scale]:
    """The norms that the readers of a stream read, each with its readers."""
    nodes = {node.name: node for node in captured.graph.graph.nodes}
    own = {s.param for s in group.others}
    found: dict[str, Scale] = {}
    for consumer in group.consumers:
        norm = _behind(nodes[consumer.source], captured, own)
        if norm is None:
            raise ModelError(
                f"the residual stream of {group.name} cannot be rotated: {consumer.module or consumer.node} reads it "
                "without a norm. Leave residual out."
            )
        key, scale = norm
        if key not in found and consumer.hookable:  # what this module reads is looked at
            scale = replace(scale, module=consumer.module, axis=consumer.axis)
        before = found.get(key, scale)
        readers = {(s.param, s.dim): s for s in (*before.readers, *consumer.slices)}
        found[key] = replace(before, readers=tuple(readers.values()))
    return list(found.values())


def _behind(node: fx.Node, captured: Captured, own: set[str]) -> tuple[str, Scale] | None:
    """The nearest norm behind a node: what tells it from others, and its scale, without readers."""
    level: list[tuple[fx.Node, ...]] = [(node,)]  # each a way back
    shift = None
    for _ in range(_STEPS):
        ready = (w for w in level if op_name(w[-1]) in _WHOLE or any(_name(captured, n) in own for n in _read(w[-1])))
        way = next(ready, None)
        if way is None:
            level = [(*w, n) for w in level for n in _read(w[-1]) if n.op == "call_function"]
            continue
        params = [name for n in _read(way[-1]) if (name := _name(captured, n)) in own]
        if op_name(way[-1]) in _WHOLE:
            scale, behind = [*params, None, None][:2]
            return scale or way[-1].name, Scale(scale, 0.0, behind)
        sums = [n for n in way if op_name(n) == "add"]
        numbers = [a for n in sums for a in n.args if isinstance(a, (int, float))]
        others = [n for n in _read(way[-1]) if not _name(captured, n)]
        if sums and not numbers and others:  # a shift, which is added behind the scale
            shift, level = params[0], [(others[0],)]
            continue
        return params[0], Scale(params[0], float(sum(numbers)), shift)
    return None


def _read(node: fx.Node) -> list[fx.Node]:
    return node.all_input_nodes if node.op == "call_function" else []


def _name(captured: Captured, node: fx.Node) -> str:
    kind, name = captured.sources.get(node.name, ("", ""))
    return name if node.op == "placeholder" and kind in ("parameter", "buffer") else ""


def _branches(captured: Captured, group: Group, others: Sequence[ParamSlice]) -> list[tuple[ParamSlice, Operator]]:
    makers = {o.node: o for o in operators(captured).values()}
    written = {s.param for s in group.producers}
    found = []
    for piece in others:
        users = [u for n in captured.graph.graph.nodes if _name(captured, n) == piece.param for u in n.users]
        if len(users) != 1 or op_name(users[0]) != "mul":
            continue
        node = next((n for n in _read(users[0]) if _name(captured, n) != piece.param), None)
        for _ in range(_STEPS):
            if node is None or node in makers:
                break
            node = next((n for n in _read(node) if n.op == "call_function"), None)
        if node in makers and makers[node].weight in written:
            found.append((piece, makers[node]))
    return found


def other_forms(model: nn.Module, stream: Stream) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """What has to take another form, by the names that `recast` knows: at first, and after scales are folded."""
    names: dict[str, None] = {}
    modules, group = dict(model.named_modules()), stream.group
    written = {s.param for s in stream.written}
    shifted = {s.param for scale in stream.scales if scale.shift for s in scale.readers}
    for consumer in group.consumers:
        layer = modules.get(consumer.module or "")
        for piece in consumer.slices:
            if piece.param in written:
                names[f"{consumer.module}.weight"] = None
            if piece.param in shifted and layer is not None and layer._parameters.get("bias") is None:
                names[f"{consumer.module}.bias"] = None
    scaled = {f"{scale.param}".removesuffix(".weight") for scale in stream.scales}
    means = [n for n, m in modules.items() if isinstance(m, nn.LayerNorm) and (n in scaled or _bare(m, group))]
    return tuple(names), tuple(means)


def _bare(norm: nn.LayerNorm, group: Group) -> bool:
    return not norm.elementwise_affine and tuple(norm.normalized_shape) == (group.size,)
