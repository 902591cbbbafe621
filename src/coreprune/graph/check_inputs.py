"""Inputs for the check after surgery: drawn for it, because an example of zeros or of equal tokens hides mistakes."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from coreprune._example import random_like
from coreprune.graph.captured import Captured
from coreprune.graph.ops import op_name, operation

BATCH, LENGTH = 3, 5  # what axes of length 1 become: the first axis of a tensor, and the others
STYLES = ("like the example", "normal", "uniform", "whole numbers kept")

# Operations that leave a tensor of indices what it is.
_SAME_INDICES = frozenset(
    """
    view reshape flatten unflatten squeeze unsqueeze expand expand_as repeat slice select permute transpose t contiguous
    clone to _to_copy detach alias index_select chunk split unbind getitem clamp clamp_min clamp_max add sub cat stack
    pad constant_pad_nd where masked_fill rsub roll flip remainder
    """.split()  # noqa: SIM905
)


@dataclass(frozen=True, eq=False)
class Drawing:
    """How to draw inputs like those of an example.

    leaves: of (args, kwargs). tree: how to put them together. rows: for some tensors of whole numbers, by their
    position among the leaves, the number of rows that they choose from. style: one of STYLES. lengths: by (leaf, axis),
    the length of axes that are longer or shorter than in the example.
    """

    leaves: tuple[Any, ...]
    tree: Any
    rows: Mapping[int, int]
    style: str = STYLES[0]
    lengths: Mapping[tuple[int, int], int] = field(default_factory=dict)

    def inputs(self, seed: int, dtype: torch.dtype | None = None) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """(args, kwargs). dtype: of real tensors; their own by default."""
        generator = torch.Generator().manual_seed(seed)
        drawn = [self._drawn(i, x, generator, dtype) for i, x in enumerate(self.leaves)]
        return pytree.tree_unflatten(drawn, self.tree)

    @property
    def entries(self) -> int:
        """How many numbers the inputs hold."""
        return sum(math.prod(self.lengths.get((i, a), n) for a, n in enumerate(x.shape)) for i, x in self._tensors())

    def _tensors(self) -> Iterator[tuple[int, Tensor]]:
        yield from ((i, leaf) for i, leaf in enumerate(self.leaves) if isinstance(leaf, Tensor))

    @property
    def unlike(self) -> str:
        """What a message adds where the inputs have another size than the example."""
        axes = self.axes()
        size = [f"{n} instead of {axes[at]}" for at, n in self.lengths.items() if axes[at] > 1]
        return f", on inputs of another size ({size[0]} positions)" if size else ""

    def single(self) -> Iterator[tuple[int, int]]:
        """(leaf, axis) of the axes of length 1."""
        yield from (at for at, n in self.axes().items() if n == 1)

    def axes(self) -> dict[tuple[int, int], int]:
        """The lengths of the axes in the example, by (leaf, axis)."""
        return {(i, axis): n for i, leaf in self._tensors() for axis, n in enumerate(leaf.shape)}

    def _drawn(self, i: int, leaf: Any, generator: torch.Generator, dtype: torch.dtype | None) -> Any:
        if not isinstance(leaf, Tensor) or leaf.is_complex():
            return leaf
        dtype = dtype or leaf.dtype
        for axis in range(leaf.dim()):
            if (i, axis) in self.lengths:
                at = torch.arange(self.lengths[i, axis], device=leaf.device) % leaf.shape[axis]
                leaf = leaf.index_select(axis, at)
        if leaf.is_floating_point():
            if leaf.dim():
                known = leaf if self.style in (STYLES[0], STYLES[3]) else None
                leaf = random_like(leaf, generator, uniform=self.style == STYLES[2], known=known).to(leaf.device)
            return leaf.to(dtype)
        if leaf.dtype == torch.bool or self.style == STYLES[3] or not leaf.dim():
            return leaf
        if i in self.rows:
            return torch.randint(self.rows[i], leaf.shape, generator=generator).to(leaf)
        return leaf.reshape(-1)[torch.randperm(leaf.numel(), generator=generator)].reshape(leaf.shape)


def drawing(captured: Captured) -> Drawing:
    """How to draw inputs like the example that was traced."""
    leaves, tree = pytree.tree_flatten((captured.args, captured.kwargs))
    placeholders = [
        n
        for n in captured.graph.graph.nodes
        if n.op == "placeholder" and captured.sources.get(n.name, ("input",))[0] == "input"
    ]
    rows = {}
    for i, (leaf, node) in enumerate(zip(leaves, placeholders, strict=False)):
        if isinstance(leaf, Tensor) and not leaf.is_floating_point() and leaf.dtype != torch.bool:
            found = list(_tables(node, {node}))
            if found:
                rows[i] = min(found)
    return Drawing(tuple(leaves), tree, rows)


def _tables(node: fx.Node, seen: set[fx.Node]) -> Iterator[int]:
    """The lengths of the tables that the entries of a node choose from."""
    for user in node.users:
        name = op_name(user.target) if user.op == "call_function" else ""
        kind, (value, chosen) = operation(user).kind, (*user.args, None, None)[:2]
        if kind == "embedding" and chosen is node:
            yield from _length(value, 0)
        elif name == "one_hot" and isinstance(chosen, int):
            yield chosen
        elif name == "index" and isinstance(chosen, (list, tuple)) and value is not node:
            yield from (n for axis, x in enumerate(chosen) if x is node for n in _length(value, axis))
        elif (name == "index_select" or kind == "scatter") and len(user.args) > 2 and user.args[2] is node:
            yield from _length(value, chosen)
        elif name in _SAME_INDICES and user not in seen:
            seen.add(user)
            yield from _tables(user, seen)


def _length(node: Any, axis: Any) -> Iterator[int]:
    value = node.meta.get("val") if isinstance(node, fx.Node) else None
    if isinstance(value, Tensor) and axis < value.dim():
        yield int(value.shape[axis])
