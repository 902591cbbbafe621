"""Padding: tokens that no other token sees. What a layer computes there is nobody's business, so it is not fitted.

Nothing is known by name. Candidates are runs of one token at the end or at the beginning of a text. They are padding if
nothing else in the outputs changes when other tokens stand there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from coreprune.graph import Captured
from coreprune.graph.execution import Execution, last_uses
from coreprune.pruning.calibration.wider import run_at_start, token_leaves
from coreprune.pruning.layer.linear_maps import Operator, even_rows
from coreprune.pruning.layer.products import Product

Batch = tuple[tuple[Any, ...], dict[str, Any]]
_SAME = 1e-4  # of the largest output; masks are often large negative numbers and not −∞


@dataclass(frozen=True, eq=False)
class Padding:
    """Which tokens of a batch are padding, (texts, tokens) bool, or None if none is."""

    tokens: Tensor | None = None

    def rows(self, operator: Operator | Product, output: Tensor, most: int) -> Tensor | None:
        """At most `most` rows of an operator's output, evenly, without those of padding; None means all."""
        keep = self._left(operator, output)
        if keep is None:
            return even_rows(operator.count(output), most, output.device)
        some = even_rows(len(keep), most, output.device)
        return keep if some is None else keep[some]

    def silent(self, output: Tensor) -> Tensor:
        """The output with zeros where its token is padding."""
        if self.tokens is None or output.shape[:2] != self.tokens.shape:
            return output
        return output * (~self.tokens).to(output).reshape(*self.tokens.shape, *[1] * (output.dim() - 2))

    def _left(self, operator: Operator | Product, output: Tensor) -> Tensor | None:
        if self.tokens is None or operator.kernel or operator.channel_axis != -1:
            return None
        texts, length = self.tokens.shape
        if tuple(output.shape[:-1]) not in ((texts, length), (texts * length,)):
            return None
        return (~self.tokens).flatten().nonzero()[:, 0].to(output.device)


def padding(captured: Captured, tensors: Mapping[str, Tensor], batches: Sequence[Batch]) -> tuple[Padding, ...]:
    """The padding of every batch. captured: traced at their size. Models that look no tokens up have none."""
    none = tuple(Padding() for _ in batches)
    leaves = token_leaves(captured)
    if len(leaves) != 1 or not captured.axes.first:
        return none
    (leaf,) = leaves
    texts = [pytree.tree_leaves(batch)[leaf] for batch in batches]
    if any(not isinstance(ids, Tensor) or ids.dim() != 2 or ids.shape[1] < 2 for ids in texts):
        return none
    found = [torch.zeros_like(ids, dtype=torch.bool) for ids in texts]
    for runs in ([run_at_start(ids.flip(1)).flip(1) for ids in texts], [run_at_start(ids) for ids in texts]):
        first = next((b for b, run in enumerate(runs) if bool(run.any())), None)
        if first is not None and _unseen(captured, tensors, batches[first], leaf, runs[first]):
            found = [a | b for a, b in zip(found, runs, strict=True)]
    return tuple(Padding(each if bool(each.any()) and not bool(each.all()) else None) for each in found)


def _unseen(captured: Captured, tensors: Mapping[str, Tensor], batch: Batch, leaf: int, run: Tensor) -> bool:
    """Whether the rest of the outputs stays if other tokens stand where the run is."""
    leaves, tree = pytree.tree_flatten(batch)
    ids = leaves[leaf]
    other = [*leaves]
    words = ids[~run]
    if not len(words):
        return False
    drawn = words[torch.arange(ids.numel(), device=ids.device) * 7 % len(words)].reshape(ids.shape)  # any other words
    other[leaf] = torch.where(run, drawn, ids)
    before, after = (_outputs(captured, tensors, pytree.tree_unflatten(x, tree)) for x in (leaves, other))
    alone = Padding(run)
    pairs = [(alone.silent(x), alone.silent(y)) for x, y in zip(before, after, strict=True)]
    same = all(float((x - y).abs().max()) <= _SAME * float(x.abs().max()) for x, y in pairs)
    return same and not torch.equal(other[leaf], ids)


@torch.no_grad()
def _outputs(captured: Captured, tensors: Mapping[str, Tensor], batch: Batch) -> list[Tensor]:
    nodes = list(captured.graph.graph.nodes)
    run, uses, result = Execution(captured, tensors, [batch]), last_uses(nodes), None
    for node in nodes:
        result = run.run(node)[0]
        for gone in uses[node]:
            run.values.pop(gone, None)
    return [x for x in pytree.tree_leaves(result) if isinstance(x, Tensor) and x.is_floating_point() and x.numel()]
