"""The original and the pruned model side by side, block by block, for the block descent."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.node import map_arg
from torch.utils import _pytree as pytree

from coreprune.errors import InputError, ModelError
from coreprune.graph import Captured, Removed, Traced, capture
from coreprune.graph.blocks import Block, blocks, is_real
from coreprune.graph.execution import largest, mutates, overwritten
from coreprune.graph.kept import Positions, positions
from coreprune.graph.ops import operation
from coreprune.pruning.calibration.padding import NOWHERE, Ends, Padding
from coreprune.pruning.calibration.rows import Batch, Rows
from coreprune.queries import Queries

log = logging.getLogger(__name__)

_FEWEST = 16  # queries; with fewer there is no descent
_SMALLEST, _LARGEST = 8, 32  # queries of one batch, where that is
STEP = 1 << 23  # at most so many entries of the largest value inside a block in one step: 32 MiB in float32
# Multiply-accumulates of the training up to which the descent runs unless the caller says otherwise: one to two minutes
# on two cores.
_LIMIT = 2_000_000_000_000
_LEAST = 16  # queries per step, down to which it goes for that
_VIEWS = (torch.ops.aten.view.default, torch.ops.aten._unsafe_view.default)
_BY_LAYOUT = ("aten.as_strided", "aten.view")  # these read memory as it lies, but for _VIEWS
_HELD = 1 << 28  # entries of the largest value between two blocks, of all queries together: 1 GiB in float32


@dataclass(frozen=True)
class Descent:
    """Options of the block descent.

    steps: of Adam, per block. lr: its rate at the first step, which decays to zero by a cosine; it is relative, as in
    `Distill`. batch_size: queries per step, about. copies: of images, how often each is shown, as it is and varied
    (mirrored, shifted, combined with another).

    A quarter of the queries is held out. Images among them are measured only varied, because the repair has learnt them
    as they are.
    """

    steps: int = 150
    lr: float = 2e-2
    batch_size: int = 64
    copies: int = 4

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "copies"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise InputError(f"Descent.{name} must be a whole number ≥ 1, not {value!r}.")
        good = isinstance(self.lr, (int, float)) and not isinstance(self.lr, bool) and math.isfinite(self.lr)
        if not good or self.lr <= 0:
            raise InputError(f"Descent.lr must be a number > 0, not {self.lr!r}.")


@dataclass(frozen=True, eq=False)
class Twins:
    """The original and the pruned model, traced alike at the size of the batches.

    full, small: their graphs, with the same operations in the same order. original, tensors: their parameters and
    buffers by name. trained: the names that may change. blocks: of `full`, in order. kept: for the exits of the blocks,
    which positions are left. batches: (args, kwargs) of `size` queries each; the last `held` ones are only measured.
    padding: of every batch; what is computed there does not count.
    """

    full: Captured
    small: Captured
    original: Mapping[str, Tensor]
    tensors: Mapping[str, Tensor]
    trained: frozenset[str]
    blocks: Sequence[Block]
    kept: Mapping[fx.Node, Positions]
    batches: Sequence[tuple[tuple[Any, ...], dict[str, Any]]]
    size: int
    held: int
    padding: Sequence[Padding]

    @cached_property
    def twin(self) -> dict[fx.Node, fx.Node]:
        """The node of `small` for every node of `full`."""
        return dict(zip(self.full.graph.graph.nodes, self.small.graph.graph.nodes, strict=True))


def affordable(macs: int, options: Descent, whole: bool = False) -> Descent | None:
    """The descent that is cheap enough to run unasked: with fewer queries per step if need be. None if none is.

    A step costs about three times as much as a forward. Only counts decide, so every machine decides alike.

    macs: of the pruned model, for one query. whole: whether queries are whole examples, which run one at a time; then a
    step has as few as it may.
    """
    most = _LIMIT // (3 * macs * options.steps) if macs else options.batch_size
    most = min(most, _LEAST) if whole else most
    if most >= options.batch_size:
        return options
    return replace(options, batch_size=most) if most >= _LEAST else None


def twins(
    traced: Traced,
    removed: Removed,
    queries: Queries,
    options: Descent,
    generator: torch.Generator,
    ends: Ends = NOWHERE,
) -> Twins | str:
    """Trace both models and make the batches. Returns in words why there is no descent, if there is none.

    ends: where texts have padding.
    """
    if len(queries) < _FEWEST:
        return f"it takes {_FEWEST} queries, and there are {len(queries)}"
    train, held = queries.split(len(queries) - _held_out(len(queries)), generator)
    fit = max(1, STEP // largest(traced.captured, traced.captured.graph.graph.nodes))
    size = 1 if queries.whole else _size(len(train), len(held), min(options.batch_size, fit))
    both = _captured(traced, removed.model, queries, size)
    if both is None:
        size, both = 1, _captured(traced, removed.model, queries, 1)
    if both is None:
        return "the pruned model cannot be traced"
    full, small = both
    nodes, others = (list(c.graph.graph.nodes) for c in both)
    if [(n.op, _name(n)) for n in nodes] != [(n.op, _name(n)) for n in others]:
        return "the two models do not run the same operations"
    tensors, written = _tensors(removed.model), overwritten(nodes)
    # No block may end where a later one writes, and none may write into what is only read.
    kept = {n: p for n, p in _kept(full, small, removed.masks).items() if n not in written}
    found = _blocks(full, small, traced.tensors, tensors, kept)
    filled = any(mutates(n) and n.args[0] in written and not operation(n).identity for n in nodes)
    if filled or any(n in written for block in found for n in block.reads):
        return "the model writes into parts of tensors"
    if not found:
        return "nothing that was changed leads to an output that can be compared"
    widest = max(e.meta["val"].numel() // size for b in found for e in b.exits)
    copies = max(1, min(options.copies, _HELD // (widest * len(queries))))
    seeds = [int(torch.randint(1 << 40, (), generator=generator)) for _ in range(2)]
    shown = [*_whole(train, size), *_copies(train, size, copies - 1, seeds[0])]
    measured = _copies(held, size, copies, seeds[1]) or _whole(held, size)
    batches = [*shown, *measured]
    padding = [ends.of(batch) for batch in batches]
    if all(_any_layout(captured) for captured in both):
        for captured in both:
            _copying_views_(captured)
        batches = [_last(batch) for batch in batches]
    parameters = [(n, p.requires_grad) for n, p in removed.model.named_parameters() if p.is_floating_point()]
    trained = frozenset(n for n, flag in parameters if flag or not any(f for _, f in parameters))
    return Twins(full, small, traced.tensors, tensors, trained, found, kept, batches, size, len(measured), padding)


def _kept(full: Captured, small: Captured, masks: Mapping[tuple[str, int], Tensor]) -> dict[fx.Node, Positions]:
    """The nodes whose values can be compared, with the positions that are left in the pruned model."""
    nodes, others = (list(c.graph.graph.nodes) for c in (full, small))
    known, twin = positions(full, nodes, masks), dict(zip(nodes, others, strict=True))
    real = {n: p for n, p in known.items() if p is not None and is_real(n) and is_real(twin[n])}
    return {n: p for n, p in real.items() if _shape(n, p) == _shape(twin[n], ())}


def _blocks(
    full: Captured,
    small: Captured,
    original: Mapping[str, Tensor],
    tensors: Mapping[str, Tensor],
    kept: Mapping[fx.Node, Positions],
) -> list[Block]:
    """The blocks of what the pruning changed, as far as their exits can be compared."""
    nodes, others = (list(c.graph.graph.nodes) for c in (full, small))
    names = {n: full.sources.get(n.name, ("", ""))[1] for n in nodes if n.op == "placeholder"}
    changed = {n for n, m in names.items() if m in tensors and not _equal(tensors[m], original[m])}
    changed |= {n for n, o in zip(nodes, others, strict=True) if n.op == "call_function" and _numbers(n) != _numbers(o)}
    weights = {n for n, m in names.items() if m in full.parameters and n.meta["val"].dim() > 1}
    found = blocks(nodes, changed, weights.__contains__, kept.__contains__)
    compared = (replace(b, exits=tuple(e for e in b.exits if e in kept)) for b in found)
    return [b for b in compared if b.exits]


def _held_out(n: int) -> int:
    """How many of n queries are only measured: a quarter, at least 16, at most half."""
    return max(n // 4, min(16, n // 2))


def _size(train: int, held: int, most: int) -> int:
    """The size of the batches: at most 32 and `most`, and such that as few queries as possible are left over."""
    largest, least = min(_LARGEST, most, train, held), min(_SMALLEST, most)
    return min(range(largest, least - 1, -1), key=lambda size: train % size + held % size)


def _copies(queries: Queries, size: int, copies: int, seed: int) -> list[Batch]:
    """Batches of images that are varied, so that not even the repair has seen them; empty for other queries."""
    rows = Rows(queries, size, True, seed)
    return [rows.batch(i) for i in range(copies * (len(queries) // size))] if rows.augment else []


def _whole(queries: Queries, size: int) -> list[Batch]:
    """The batches that are full."""
    return list(queries.batches(size))[: len(queries) // size]


def _captured(traced: Traced, pruned: nn.Module, queries: Queries, size: int) -> tuple[Captured, Captured] | None:
    (args, kwargs), axes = next(queries.batches(size)), traced.captured.axes
    try:
        full, small = (capture(m, args, kwargs, size, batch_axis=axes) for m in (traced.model, pruned))
        return full, small
    except ModelError as error:
        log.info("the block descent cannot use batches of %d: %s", size, error)
        return None


def _any_layout(captured: Captured) -> bool:
    """Whether the graph computes the same however its inputs lie in memory, once its views may copy."""
    called = [n for n in captured.graph.graph.nodes if isinstance(n.target, torch._ops.OpOverload)]
    left = (n for n in called if n.target not in _VIEWS)
    return all(n.target.namespace == "aten" and not _name(n).startswith(_BY_LAYOUT) for n in left)


def _copying_views_(captured: Captured) -> None:
    """Make reshapes of the views, which fail on some layouts."""
    for node in captured.graph.graph.nodes:
        if node.target in _VIEWS:
            node.target = torch.ops.aten.reshape.default


def _last(batch: Batch) -> Batch:
    """Images with their channels last in memory: on a CPU, their convolutions train in two thirds of the time."""

    def laid(leaf: Any) -> Any:
        image = isinstance(leaf, Tensor) and leaf.dim() == 4 and leaf.device.type == "cpu"
        return leaf.contiguous(memory_format=torch.channels_last) if image else leaf

    args, kwargs = pytree.tree_map(laid, batch)
    return args, kwargs


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    return {name: t.detach() for name, t in [*model.named_parameters(), *model.named_buffers()]}


def _name(node: fx.Node) -> str:
    return str(node.target) if node.op == "call_function" else ""


def _equal(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and torch.equal(a, b)


def _numbers(node: fx.Node) -> Any:
    """The arguments of a call that are not nodes."""
    return map_arg((node.args, node.kwargs), lambda n: None)  # noqa: ARG005


def _shape(node: fx.Node, kept: Positions) -> list[int]:
    """The shape of a node's value at the positions that are left."""
    shape = list(node.meta["val"].shape)
    for axis, rows in kept:
        shape[axis] = len(rows)
    return shape
