"""More queries than a user's own texts, so that a refit does not forget the rest.

A few hundred texts of one kind use a small part of a vocabulary. Weights that are fitted to them alone get better on
that kind and worse on every other one. So the moments are those of a mixture: the user's texts; as many that keep
their form (lengths, padding, special tokens, masks), but whose words are drawn from the vocabulary; and, where the
model's tokenizer is known, as many texts of this machine. What a refit on all loses on one kind is at most what it
gains on the others (T17).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from coreprune.graph import Captured, Traced
from coreprune.graph.ops import op_name, operation
from coreprune.queries import MachineText, Queries, Target, make_queries
from coreprune.queries.leaves import drawn
from coreprune.queries.machine_text import has_text
from coreprune.queries.sources.tokens import known

_OFTEN = 0.9  # of the texts: what so many have in common belongs to their form
_SHIFT = 2.7  # Mandelbrot's, in the frequency of a word by its rank: 1/(rank + shift)


def other_kinds(
    traced: Traced, example: Any, queries: Queries, tokenizer: Any, generator: torch.Generator
) -> list[Queries]:
    """As many queries of every other kind. Empty if the model looks no tokens up, or the texts have nothing but form.

    example, tokenizer: the caller's.
    """
    other = other_words(traced.captured, queries, generator)
    if other is None:
        return []
    found = [other]
    if _has_text(traced, tokenizer):
        more: dict[str, Any] = {"batch_axis": traced.captured.axes, "tokenizer": tokenizer}
        text = make_queries(traced.model, example, MachineText(), n=len(queries), seed=generator, **more)
        if _shapes(text) == _shapes(queries):
            found.append(text)
    return found


def _has_text(traced: Traced, tokenizer: Any) -> bool:
    """Whether this machine has texts that the model could read."""
    captured = traced.captured
    leaves = drawn(captured.args, captured.kwargs, captured.axes)
    targets = (Target(traced.model, captured.args, captured.kwargs, i, captured.axes, tokenizer) for i in leaves)
    return any(t.kind == "tokens" and known(t) is not None for t in targets) and has_text()


def _shapes(queries: Queries) -> list[torch.Size]:
    return [x.shape for x in pytree.tree_leaves((queries.args, queries.kwargs)) if isinstance(x, Tensor)]


def other_words(captured: Captured, queries: Queries, generator: torch.Generator) -> Queries | None:
    """As many queries with other tokens; None if the model looks no tokens up, or the texts have nothing but form.

    Every second one has tokens that are all equally likely; in the others, token i is as likely as the i-th most
    frequent word (Zipf), because most vocabularies are sorted by frequency.
    """
    leaves = token_leaves(captured)
    if not leaves or queries.whole or (queries.axes is not None and not queries.axes.first):
        return None
    given = pytree.tree_leaves((queries.args, queries.kwargs))
    if any(not isinstance(given[i], Tensor) or given[i].dim() != 2 or i in queries.shared for i in leaves):
        return None
    other = queries.changed(lambda i, x: redrawn(x, generator) if i in leaves else x)
    made = pytree.tree_leaves((other.args, other.kwargs))
    if all(torch.equal(a, b) for a, b in zip(given, made, strict=True) if isinstance(a, Tensor)):
        return None
    return replace(other, source="other words", note="as many of the same form with random tokens")


def token_leaves(captured: Captured) -> frozenset[int]:
    """The positions, among the leaves of the inputs, of the tensors that an embedding looks up as a whole."""
    return frozenset(place for _, place in looked_up(captured))


def looked_up(captured: Captured) -> Iterator[tuple[fx.Node, int]]:
    """The embeddings that look up a tensor of the inputs as a whole, and its position among their leaves."""
    inputs = [
        node
        for node in captured.graph.graph.nodes
        if node.op == "placeholder" and captured.sources.get(node.name, ("input",))[0] == "input"
    ]
    for node in captured.graph.graph.nodes:
        if node.op == "call_function" and operation(node).kind == "embedding" and len(node.args) > 1:
            source = node.args[1]
            while isinstance(source, fx.Node) and source.op == "call_function" and _same_numbers(source):
                source = source.args[0]
            if source in inputs:
                yield node, inputs.index(source)


def redrawn(ids: Tensor, generator: torch.Generator) -> Tensor:
    """The same texts (N, T) with other words between the smallest and the largest one. What is their form stays:
    tokens that nearly all texts have, and padding, which repeats one token at the end or at the beginning."""
    form = _form(ids)
    words = ids[~form]
    if not len(words):
        return ids
    low, count = int(words.min()), int(words.max() - words.min()) + 1
    drawn = torch.randint(count, tuple(ids.shape), generator=generator)
    law = 1 / (torch.arange(count, dtype=torch.float64) + _SHIFT)
    frequent = torch.multinomial(law, ids.numel(), replacement=True, generator=generator).reshape(ids.shape)
    drawn[1::2] = frequent[1::2]
    return torch.where(form, ids, (low + drawn).to(ids))


def _form(ids: Tensor) -> Tensor:
    """Which tokens belong to the form of the texts, (N, T) bool."""
    values, places = ids.unique(return_inverse=True)
    texts = torch.zeros(len(values), len(ids), dtype=torch.bool, device=ids.device)
    texts[places.flatten(), torch.arange(len(ids), device=ids.device).repeat_interleave(ids.shape[1])] = True
    common = (texts.sum(dim=1) >= _OFTEN * len(ids))[places]
    return common | run_at_start(ids) | run_at_start(ids.flip(1)).flip(1)


def run_at_start(ids: Tensor) -> Tensor:
    """Which tokens belong to a run of one token, at least two long, at the beginning."""
    same = (ids == ids[:, :1]).to(torch.int8).cummin(dim=1).values.bool()
    return same & (same.sum(dim=1, keepdim=True) > 1)


def _same_numbers(node: fx.Node) -> bool:
    known = operation(node)
    return known.bijective or known.identity or op_name(node) == "to"
