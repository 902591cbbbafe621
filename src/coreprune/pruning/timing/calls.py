"""The operations of a traced graph whose times depend on widths, and calls of them at given widths."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from coreprune.graph import Captured, Extent, Group, extents
from coreprune.graph.ops import OPERATIONS, UNKNOWN, op_name

# Kinds that do arithmetic. The others move numbers, or none: views, look-ups, shapes.
_TIMED = {
    *("linear", "matmul", "addmm", "grouped matmul", "conv", "transposed conv", "einsum", "attention"),
    *("elementwise", "like", "prelu", "channel norm", "layer norm", "group norm", "sum", "mean", "spread"),
    *("vector norm", "reduction", "mixing", "gated", "spatial", "cat", "pad"),
}
_FUSED = {"elementwise", "like", "prelu", "channel norm"}  # compilers join them with the operation in front
Lengths = Mapping[Extent, int]


@dataclass(frozen=True)
class Operand:
    """A tensor that an operation reads. extents: of its axes. last: whether its channels come last in memory."""

    extents: tuple[Extent, ...]
    dtype: torch.dtype
    last: bool
    weight: bool

    def tensor(self, lengths: Lengths, device: torch.device) -> Tensor:
        """One of random numbers, at these lengths of its axes. The random state is not touched."""
        shape = [lengths.get(e, e.fixed) for e in self.extents]
        if self.dtype == torch.bool:
            return torch.ones(shape, dtype=self.dtype, device=device)
        generator = None if device.type == "meta" else torch.Generator(device).manual_seed(0)
        made = torch.randn(shape, generator=generator, device=device).to(self.dtype)
        layout = {4: torch.channels_last, 5: torch.channels_last_3d}.get(len(shape)) if self.last else None
        return made if layout is None else made.contiguous(memory_format=layout)

    def text(self, lengths: Lengths) -> str:
        """Its dtype and shape, for the key of a time."""
        shape = ",".join(str(lengths.get(e, e.fixed)) for e in self.extents)
        flags = ("last" if self.last else "") + ("weight" if self.weight else "")
        return f"{str(self.dtype).removeprefix('torch.')}[{shape}]{flags}"


@dataclass(frozen=True, eq=False)
class Call:
    """An operation with operands in place of tensors. count: how often the graph has it, with these very operands."""

    target: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    count: int = 1

    @property
    def operands(self) -> list[Operand]:
        """All of them, in order."""
        return [x for x in pytree.tree_leaves((self.args, self.kwargs)) if isinstance(x, Operand)]

    @property
    def varying(self) -> tuple[Extent, ...]:
        """The extents of its operands that depend on widths, each once."""
        return tuple(dict.fromkeys(e for o in self.operands for e in o.extents if e.slopes))

    def numel(self, lengths: Lengths) -> int:
        """How many numbers its operands hold."""
        return sum(math.prod(lengths.get(e, e.fixed) for e in o.extents) for o in self.operands)

    def key(self, lengths: Lengths) -> str:
        """What is timed, as text: the operation with shapes, dtypes and numbers."""
        args, kwargs = self.arguments(lengths, [o.text(lengths) for o in self.operands])
        return f"{self.target}{args}{kwargs or ''}"

    def arguments(self, lengths: Lengths, values: Sequence[Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments with values in place of the operands, and with sizes that fit these lengths."""
        feed = iter(values)

        def put(x: Any) -> Any:
            return pytree.tree_map_only(Operand, lambda _: next(feed), x)

        args = [put(x) for x in self.args]
        kwargs = {k: put(v) for k, v in self.kwargs.items()}
        for name, number in self._sizes(lengths).items():
            if name in kwargs:
                kwargs[name] = number
            else:
                args[self._names.index(name)] = number
        return tuple(args), kwargs

    @property
    def _names(self) -> list[str]:
        return [a.name for a in self.target._schema.arguments]

    def _sizes(self, lengths: Lengths) -> dict[str, Any]:
        """Arguments that follow the widths: the groups of a convolution, the shape that a layer norm is over."""
        given = {**dict(zip(self._names, self.args, strict=False)), **self.kwargs}
        first = next(iter(self.operands), None)
        if first is None:
            return {}
        shape = [lengths.get(e, e.fixed) for e in first.extents]
        if "normalized_shape" in given:
            return {"normalized_shape": shape[-len(given["normalized_shape"]) :]}
        weight = given.get("weight")
        if given.get("groups", 1) != 1 and isinstance(weight, Operand):
            per_group = lengths.get(weight.extents[1], weight.extents[1].fixed)
            axis = len(shape) - (len(weight.extents) - 1)  # the channels; before them lies the batch, if there is one
            return {"groups": shape[axis] // max(per_group, 1)}
        return {}


def calls_of(
    captured: Captured, groups: Sequence[Group], runtime: str, dtypes: Mapping[torch.dtype, torch.dtype]
) -> list[Call]:
    """The operations whose times depend on the widths of free groups. Equal ones are counted together.

    captured: the trace with the samples of one call. dtypes: what to time in place of a dtype.
    """
    kinds = _TIMED - (set() if runtime == "eager" else _FUSED)
    chosen = [n for n in captured.graph.graph.nodes if n.op == "call_function" and _kind(n) in kinds]
    read = {a for n in chosen for a in n.all_input_nodes}
    found = extents(captured, groups, read)
    weights = {n for n in read if captured.sources.get(n.name, ("", ""))[0] in ("parameter", "buffer")}
    calls: dict[Any, Call] = {}
    for node in chosen:
        call = _call(node, found, weights, dtypes)
        if call is None or not call.varying or all(o.weight for o in call.operands):
            continue
        key = (call.key({}), tuple(o.extents for o in call.operands))
        before = calls.get(key)
        calls[key] = Call(call.target, call.args, call.kwargs, 1 + (before.count if before else 0))
    return list(calls.values())


def _kind(node: fx.Node) -> str:
    operation = OPERATIONS.get(op_name(node.target), UNKNOWN)
    return "" if operation.identity or not hasattr(node.target, "_schema") else operation.kind


def _call(
    node: fx.Node,
    found: Mapping[fx.Node, tuple[Extent, ...] | None],
    weights: set[fx.Node],
    dtypes: Mapping[torch.dtype, torch.dtype],
) -> Call | None:
    """A node as a call; None if one of its inputs cannot be made up, such as places to look up."""
    leaves, tree = pytree.tree_flatten((node.args, node.kwargs), is_leaf=lambda x: isinstance(x, fx.Node))
    given: list[Any] = []
    for leaf in leaves:
        if not isinstance(leaf, fx.Node):
            given.append(leaf)
            continue
        value, shape = leaf.meta.get("val"), found.get(leaf)
        if isinstance(value, Tensor) and shape is None and value.dim() == 0:
            shape = ()
        if not isinstance(value, Tensor) or shape is None:
            return None
        if not value.is_floating_point() and value.dtype != torch.bool:
            return None
        given.append(Operand(shape, dtypes.get(value.dtype, value.dtype), _last(value), leaf in weights))
    args, kwargs = pytree.tree_unflatten(given, tree)
    return Call(node.target, tuple(args), dict(kwargs))


def _last(value: Tensor) -> bool:
    layout = {4: torch.channels_last, 5: torch.channels_last_3d}.get(value.dim())
    return layout is not None and not value.is_contiguous() and value.is_contiguous(memory_format=layout)


def lengths_between(
    call: Call, least: Mapping[str, int], most: Mapping[str, int], shares: Sequence[float]
) -> Iterator[tuple[Extent, list[int]]]:
    """For everything that varies in a call, lengths to time it at, ascending: `shares` of the way from least to most.

    They are multiples of 8 where the axis is long enough for that, as the widths are that are chosen.
    """
    for extent in call.varying:
        low, high = extent.at(least), extent.at(most)
        between = [low + share * (high - low) for share in shares if 0 < share < 1]
        step = 8 if high >= 64 else 1
        yield extent, sorted({low, high, *(min(high, max(low, step * round(n / step))) for n in between)})
