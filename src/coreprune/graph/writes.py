"""Writes into parts of tensors, written as concatenations: `y[..., :2] = a` makes a new y of a and the rest of y.

So tracing, selection and repair see where the parts go. This is done where nothing can tell the difference: the tensor
was made in the forward, and no view of it that is older than a write is read after it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import fx
from torch._guards import detect_fake_mode
from torch.fx.node import map_arg

from coreprune.graph.execution import mutates, shares
from coreprune.graph.ops import op_name

_ATEN = torch.ops.aten


@dataclass(frozen=True, eq=False)
class _Write:
    """`node` writes into a part of a tensor, reached by a chain of slices and selections.

    part: by axis, the first position and one past the last; axes of which all is written are left out. picked: the axes
    of which one position is taken, which what is written does not have.
    """

    node: fx.Node
    chain: tuple[fx.Node, ...]
    part: dict[int, tuple[int, int]]
    picked: tuple[int, ...]


def join_writes(module: fx.GraphModule) -> None:
    """Replace writes into parts of tensors by concatenations, in place, where that is the same."""
    found: dict[fx.Node, list[_Write]] = {}
    for node in module.graph.nodes:
        if op_name(node) == "zero" and mutates(node):
            node.target, node.args = _ATEN.fill_.Scalar, (*node.args, 0)
        if op_name(node) in ("copy", "fill") and mutates(node):
            base, write = _traced_back(node)
            if write is not None:
                found.setdefault(base, []).append(write)
    order = {node: i for i, node in enumerate(module.graph.nodes)}
    for base, writes in found.items():
        if base.op == "call_function" and not shares(base) and not mutates(base) and _plain(base, writes, order):
            _rewrite(base, writes, order)
    if found:
        module.graph.lint()
        module.recompile()


def _traced_back(node: fx.Node) -> tuple[fx.Node, _Write | None]:
    """The tensor that a node writes into, and into which part; None if it is not a block."""
    chain: list[fx.Node] = []
    view: Any = node.args[0]
    while isinstance(view, fx.Node) and op_name(view) in ("slice", "select"):
        chain.insert(0, view)
        view = view.args[0]
    if not chain or node.users or any(len(link.users) > 1 for link in chain):
        return view, None
    shape = view.meta["val"].shape
    left, picked, part = list(range(len(shape))), [], {a: (0, int(n)) for a, n in enumerate(shape)}
    for link in chain:
        n = link.args[0].meta["val"].dim()  # pyright: ignore[reportAttributeAccessIssue, reportOptionalMemberAccess]
        args = [*link.args[1:], *(0, None, None, 1)[len(link.args) - 1 :]]
        if not all(a is None or isinstance(a, int) for a in args) or link.kwargs:
            return view, None
        axis = left[args[0] % n]
        start, end = part[axis]
        if op_name(link) == "select":
            at = start + args[1] % (end - start)
            part[axis] = (at, at + 1)
            picked.append(axis)
            left.remove(axis)
        else:
            first, stop, step = slice(args[1], args[2], args[3]).indices(end - start)
            if step != 1:
                return view, None
            part[axis] = (start + first, start + max(first, stop))
    block = {a: span for a, span in part.items() if span != (0, shape[a])}
    empty = any(s == e for s, e in block.values())
    return view, None if empty else _Write(node, tuple(chain), block, tuple(sorted(picked)))


def _plain(base: fx.Node, writes: Sequence[_Write], order: dict[fx.Node, int]) -> bool:
    """Whether every reader sees the tensor as it was when the reader, or the view that it reads, was made."""
    times = [order[w.node] for w in writes]
    known = {w.node for w in writes} | {link for w in writes for link in w.chain}

    def fits(view: fx.Node, made: int | None) -> bool:
        for user in view.users:
            if user in known:
                continue
            if mutates(user) and user.args[0] is view:
                return False
            since = order[user] if made is None else made
            if any(since < t < order[user] for t in times):
                return False
            if shares(user) and not fits(user, since):
                return False
        return True

    return fits(base, None)


def _rewrite(base: fx.Node, writes: Sequence[_Write], order: dict[fx.Node, int]) -> None:
    chains = {link for w in writes for link in w.chain}
    events: list[tuple[int, fx.Node | _Write]] = [(order[u], u) for u in base.users if u not in chains]
    events += [(order[w.node], w) for w in writes]
    current, pending = base, []
    for _, event in sorted(events, key=lambda e: e[0]):
        if not isinstance(event, _Write):
            current, pending = _joined(current, pending, event), []
            event.replace_input_with(base, current)
        elif pending and not _beside([*pending, event]):
            current, pending = _joined(current, pending, event.node), [event]
        else:
            pending.append(event)
    for w in writes:
        base.graph.erase_node(w.node)
        for link in reversed(w.chain):
            base.graph.erase_node(link)
    if not base.users:
        base.graph.erase_node(base)


def _beside(writes: Sequence[_Write]) -> bool:
    """Whether the parts are beside each other along one axis, so that one concatenation is enough."""
    axes = {a for w in writes for a in w.part}
    spans = sorted(s for w in writes for s in w.part.values())
    apart = all(a[1] <= b[0] for a, b in pairwise(spans))
    return len(axes) == 1 and len(spans) == len(writes) and apart


def _joined(current: fx.Node, writes: Sequence[_Write], before: fx.Node) -> fx.Node:
    """The tensor after some writes that are beside each other."""
    if not writes:
        return current
    make = _maker(before, writes[0].node)
    contents = {w: _content(w, current, make) for w in writes}
    if not writes[0].part:
        return contents[writes[0]]
    (axis, _), *inner = writes[0].part.items()
    return _filled(current, axis, [(w.part[axis], dict(inner), contents[w]) for w in writes], make)


def _filled(
    whole: fx.Node, axis: int, parts: list[tuple[tuple[int, int], dict[int, Any], fx.Node]], make: Any
) -> fx.Node:
    """`whole` with other contents at some places along an axis; within each, only at a part of the other axes."""
    pieces, at, length = [], 0, int(whole.meta["val"].shape[axis])
    for (start, end), inner, content in sorted(parts, key=lambda p: p[0]):
        if at < start:
            pieces.append(make(_ATEN.slice.Tensor, whole, axis, at, start))
        if inner:
            (next_axis, span), *rest = inner.items()
            old = make(_ATEN.slice.Tensor, whole, axis, start, end)
            pieces.append(_filled(old, next_axis, [(span, dict(rest), content)], make))
        else:
            pieces.append(content)
        at = end
    if at < length:
        pieces.append(make(_ATEN.slice.Tensor, whole, axis, at, length))
    return make(_ATEN.cat.default, pieces, axis)


def _content(write: _Write, whole: fx.Node, make: Callable[..., fx.Node]) -> fx.Node:
    """What is written, in the dtype of the tensor and the shape of the part."""
    value = whole.meta["val"]
    shape = [int(n) for n in write.chain[-1].meta["val"].shape]
    content: Any = write.node.args[1]
    if not isinstance(content, fx.Node):
        content = make(_ATEN.full.default, shape, content, dtype=value.dtype, device=value.device)
    if content.meta["val"].dtype != value.dtype:
        content = make(_ATEN.to.dtype, content, value.dtype)
    for _ in range(len(shape) - content.meta["val"].dim()):
        content = make(_ATEN.unsqueeze.default, content, 0)
    for axis in write.picked:
        content = make(_ATEN.unsqueeze.default, content, axis)
        shape.insert(axis, 1)
    return content if list(content.meta["val"].shape) == shape else make(_ATEN.expand.default, content, shape)


def _maker(before: fx.Node, like: fx.Node) -> Callable[..., fx.Node]:
    """A function that puts calls before a node, and knows their results."""

    def make(target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        with before.graph.inserting_before(before):
            node = before.graph.call_function(target, args, kwargs)
        given, more = map_arg((args, kwargs), lambda n: n.meta["val"])
        mode = detect_fake_mode([n.meta["val"] for n in (like, before, *node.all_input_nodes) if "val" in n.meta])
        assert mode is not None
        with mode:
            node.meta["val"] = target(*given, **more)
        node.meta.update({k: like.meta[k] for k in ("nn_module_stack", "stack_trace") if k in like.meta})
        return node

    return make
