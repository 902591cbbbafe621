"""Padding: tokens that no other token sees. What a model computes there is nobody's business: it is neither fitted nor
compared.

Nothing is known by name. Candidates are runs of one token at the end or at the beginning of texts: the one that most
texts with a repeated token there repeat. They are padding if no other output changes when other tokens stand there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from coreprune._batch import BatchAxes, usual
from coreprune._example import reals
from coreprune.graph import Captured
from coreprune.graph.execution import Execution, last_uses
from coreprune.pruning.calibration.wider import repeated, run_of, token_leaves
from coreprune.pruning.layer.linear_maps import Operator, even_rows
from coreprune.pruning.layer.products import Product
from coreprune.queries import Queries
from coreprune.queries.leaves import drawable

Batch = tuple[tuple[Any, ...], dict[str, Any]]
_FEW = 8  # queries that run together to see where there is padding
_SAME = 1e-4  # of the largest output; masks are often large negative numbers and not −∞


@dataclass(frozen=True, eq=False)
class Padding:
    """Which tokens of a batch are padding, (texts, tokens) bool, or None if none is.

    flat: whether values of two axes (texts, tokens) hold a number for every token, and not for every class.
    """

    tokens: Tensor | None = None
    flat: bool = False

    def rows(self, operator: Operator | Product, output: Tensor, most: int) -> Tensor | None:
        """At most `most` rows of an operator's output, evenly, without those of padding; None means all."""
        keep = self._left(operator, output)
        if keep is None:
            return even_rows(operator.count(output), most, output.device)
        some = even_rows(len(keep), most, output.device)
        return keep if some is None else keep[some]

    def levelled(self, operator: Operator | Product, value: Tensor) -> Tensor:
        """An operand of a product, of which the mean over the tokens is subtracted, with the mean of the others where
        its token is padding: the softmax does not see padding. What other operators read, as it is."""
        if self.tokens is None or not isinstance(operator, Product) or not operator.centred:
            return value
        moved = value.movedim(operator.axis, -1)
        counting = self._counting(moved.shape[:-1])
        if counting is None:
            return value
        there = counting[..., None]
        mean = torch.where(there, moved, 0.0).sum(-2, keepdim=True) / there.sum(-2, keepdim=True).clamp_min(1)
        return torch.where(there, moved, mean).movedim(-1, operator.axis)

    def silent(self, output: Tensor) -> Tensor:
        """The output with zeros where its token is padding."""
        tokens = self.places(output)
        if tokens is None:
            return output
        return output * (~tokens).to(output).reshape(*tokens.shape, *[1] * (output.dim() - 2))

    def without(self, value: Tensor) -> Tensor:
        """The entries (K, ...) of a value whose tokens are no padding; the value itself if it has none for every
        token."""
        tokens = self.places(value)
        return value if tokens is None else value[~tokens.to(value.device)]

    def of_text(self, value: Tensor, text: int) -> Tensor:
        """`without` for one text: a value (tokens, ...) of it. All of it, if the text is nothing but padding."""
        if self.tokens is None or value.shape[:1] != self.tokens.shape[1:] or (value.dim() == 1 and not self.flat):
            return value
        keep = ~self.tokens[text].to(value.device)
        return value[keep] if bool(keep.any()) else value

    def places(self, value: Tensor) -> Tensor | None:
        """Which entries (texts, tokens) of a value are padding; None if it does not have them for every token."""
        if self.tokens is None or value.shape[:2] != self.tokens.shape or (value.dim() == 2 and not self.flat):
            return None
        return self.tokens

    def _left(self, operator: Operator | Product, output: Tensor) -> Tensor | None:
        if self.tokens is None or operator.kernel:
            return None
        if isinstance(operator, Product):
            counting = self._counting(output.movedim(operator.axis, -1).shape[:-1])
        elif operator.channel_axis == -1 and output.shape[:-1] in (self.tokens.shape, self.tokens.flatten().shape):
            counting = ~self.tokens
        else:
            return None
        return None if counting is None else counting.flatten().nonzero()[:, 0].to(output.device)

    def _counting(self, shape: torch.Size) -> Tensor | None:
        """Which rows of an operand are no padding: (texts, tokens), (texts, heads, tokens), (texts · heads, tokens);
        None for other shapes."""
        assert self.tokens is not None
        texts, length = self.tokens.shape
        if len(shape) < 2 or shape[-1] != length or shape[0] % texts:
            return None
        rows = (~self.tokens).repeat_interleave(shape[0] // texts, dim=0)
        return rows.reshape(shape[0], *[1] * (len(shape) - 2), length).expand(shape)


NONE = Padding()


@dataclass(frozen=True)
class Ends:
    """At which ends of a model's texts there is padding, and which token it is.

    leaf: the position of the tokens among the leaves of the inputs. last, first: the token that pads texts at their
    end and at their beginning, or None. flat: as in `Padding`.
    """

    leaf: int = -1
    last: int | None = None
    first: int | None = None
    flat: bool = False

    def of(self, batch: Batch) -> Padding:
        """The padding of a batch. None if nothing else is left of it."""
        if self.last is None and self.first is None:
            return NONE
        ids = pytree.tree_leaves(batch)[self.leaf]
        found = run_of(ids, self.last, True) | run_of(ids, self.first, False)
        return Padding(found, self.flat) if bool(found.any()) and not bool(found.all()) else NONE


NOWHERE = Ends()


def ends(captured: Captured, tensors: Mapping[str, Tensor], batches: Sequence[Batch]) -> Ends:
    """Where the batches have padding. captured: traced at their size. Models that look no tokens up have none."""
    leaves = token_leaves(captured)
    if len(leaves) != 1 or not captured.axes.first:
        return NOWHERE
    return ends_of(lambda batch: _outputs(captured, tensors, batch), next(iter(leaves)), batches)


@torch.no_grad()
def ends_in(model: nn.Module, batches: Iterable[Batch], axes: BatchAxes | None) -> Ends:
    """The same for a model that is not traced, in evaluation mode. axes: where the inputs have their samples."""
    batches = iter(batches)
    first = next(batches)
    axes, leaves = axes or usual(first), pytree.tree_leaves(first)
    tokens = [i for i in drawable(*first, axes) if not leaves[i].is_floating_point()] if axes.first else []
    if len(tokens) != 1:
        return NOWHERE
    return ends_of(lambda batch: reals(model(*batch[0], **batch[1])), tokens[0], [first, *batches])


def ends_on(model: nn.Module, queries: Queries) -> Ends:
    """The same for queries."""
    return ends_in(model, queries.batches(_FEW), queries.axes)


def ends_of(run: Callable[[Batch], list[Tensor]], leaf: int, batches: Sequence[Batch]) -> Ends:
    """The same for a function from a batch to outputs, and for the position of the tokens (texts, tokens)."""
    texts = [pytree.tree_leaves(batch)[leaf] for batch in batches]
    if any(not isinstance(ids, Tensor) or ids.dim() != 2 or ids.shape[1] < 2 for ids in texts):
        return NOWHERE
    found, flat = list[int | None](), False
    for at_end in (True, False):
        token = repeated(texts, at_end)
        places = [run_of(ids, token, at_end) for ids in texts]
        b = next((b for b, run in enumerate(places) if bool(run.any())), None)
        unseen, by_token = (False, False) if b is None else _unseen(run, batches[b], leaf, places[b])
        found.append(token if unseen else None)
        flat |= unseen and by_token
    return Ends(leaf, *found, flat=flat)


def _unseen(run: Callable[[Batch], list[Tensor]], batch: Batch, leaf: int, places: Tensor) -> tuple[bool, bool]:
    """Whether the rest of the outputs stays if other tokens stand at the places, and whether an output of two axes has
    a number for every token: those at the places change."""
    leaves, tree = pytree.tree_flatten(batch)
    ids = leaves[leaf]
    other = [*leaves]
    words = ids[~places]
    if not len(words):
        return False, False
    drawn = words[torch.arange(ids.numel(), device=ids.device) * 7 % len(words)].reshape(ids.shape)  # any other words
    other[leaf] = torch.where(places, drawn, ids)
    if torch.equal(other[leaf], ids):
        return False, False
    same, flat = True, False
    for x, y in zip(*(run(pytree.tree_unflatten(each, tree)) for each in (leaves, other)), strict=True):
        by_token = x.dim() == 2 and x.shape == ids.shape and not _alike(x[places], y[places], x)
        alone = Padding(places, by_token)
        same &= _alike(alone.silent(x), alone.silent(y), x)
        flat |= by_token
    return same, flat


def _alike(x: Tensor, y: Tensor, whole: Tensor) -> bool:
    return float((x - y).abs().max()) <= _SAME * float(whole.abs().max())


@torch.no_grad()
def _outputs(captured: Captured, tensors: Mapping[str, Tensor], batch: Batch) -> list[Tensor]:
    nodes = list(captured.graph.graph.nodes)
    run, uses, result = Execution(captured, tensors, [batch]), last_uses(nodes), None
    for node in nodes:
        result = run.run(node)[0]
        for gone in uses[node]:
            run.values.pop(gone, None)
    return [x for x in reals(result) if x.numel()]
