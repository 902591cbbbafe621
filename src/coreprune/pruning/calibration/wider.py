"""More queries than a user's own texts, so that a refit does not forget the rest.

A few hundred texts of one kind use a small part of a vocabulary. Weights that are fitted to them alone get better on
that kind and worse on every other one. So the moments are those of a mixture: the user's texts; as many that keep
their form (lengths, padding, special tokens, masks), but whose words are drawn from the vocabulary; and, where the
model's tokenizer is known, as many texts of this machine. The tokenizer also tells which words are frequent. What a
refit on all loses on one kind is at most what it gains on the others (T17).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from coreprune.graph import Captured, Traced
from coreprune.graph.ops import op_name, operation
from coreprune.queries import MachineText, Queries, Target, make_queries
from coreprune.queries.leaves import drawable
from coreprune.queries.machine_text import has_text
from coreprune.queries.sources.tokens import known, zipf

_OFTEN = 0.9  # of the texts: what so many have in common belongs to their form


def other_kinds(
    traced: Traced, example: Any, queries: Queries, tokenizer: Any, generator: torch.Generator
) -> list[Queries]:
    """As many queries of every other kind. Empty if the model looks no tokens up, or the texts have nothing but form.

    example, tokenizer: the caller's.
    """
    if not _texts(traced.captured, queries):
        return []
    words = _words(traced, tokenizer)
    other = other_words(traced.captured, queries, generator, words)
    if other is None:
        return []
    found = [other]
    if words and has_text():
        more: dict[str, Any] = {"batch_axis": traced.captured.axes, "tokenizer": tokenizer}
        text = make_queries(traced.model, example, MachineText(), n=len(queries), seed=generator, **more)
        if _shapes(text) == _shapes(queries):
            found.append(text)
    return found


def _words(traced: Traced, tokenizer: Any) -> dict[int, Tensor]:
    """The tokens that make up text, the most frequent first, by the position of the input. Empty if no tokenizer is
    known."""
    captured = traced.captured
    leaves = drawable(captured.args, captured.kwargs, captured.axes)
    targets = [Target(traced.model, captured.args, captured.kwargs, i, captured.axes, tokenizer) for i in leaves]
    told = {t.leaf: known(t) for t in targets if t.kind == "tokens"}
    return {leaf: torch.tensor(tokens.words) for leaf, tokens in told.items() if tokens is not None}


def _shapes(queries: Queries) -> list[torch.Size]:
    return [x.shape for x in pytree.tree_leaves((queries.args, queries.kwargs)) if isinstance(x, Tensor)]


def other_words(
    captured: Captured, queries: Queries, generator: torch.Generator, words: Mapping[int, Tensor] | None = None
) -> Queries | None:
    """As many queries with other tokens; None if the model looks no tokens up, or the texts have nothing but form.

    words: the tokens that make up text, the most frequent first, by the position of the input. Without them, those
    between the smallest and the largest one of the texts: most vocabularies are sorted by frequency.
    """
    leaves, words = _texts(captured, queries), words or {}
    if not leaves:
        return None
    given = pytree.tree_leaves((queries.args, queries.kwargs))
    other = queries.changed(lambda i, x: redrawn(x, generator, words.get(i)) if i in leaves else x)
    made = pytree.tree_leaves((other.args, other.kwargs))
    if all(torch.equal(a, b) for a, b in zip(given, made, strict=True) if isinstance(a, Tensor)):
        return None
    return replace(other, source="other words", note="as many of the same form with random tokens")


def _texts(captured: Captured, queries: Queries) -> frozenset[int]:
    """`token_leaves`; empty if these queries do not hold a text (N, T) in each."""
    leaves = token_leaves(captured)
    if queries.whole or (queries.axes is not None and not queries.axes.first):
        return frozenset()
    given = pytree.tree_leaves((queries.args, queries.kwargs))
    texts = all(isinstance(given[i], Tensor) and given[i].dim() == 2 and i not in queries.shared for i in leaves)
    return leaves if texts else frozenset()


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


def redrawn(ids: Tensor, generator: torch.Generator, words: Tensor | None = None) -> Tensor:
    """The same texts (N, T) with other words. What is their form stays: tokens that nearly all texts have, tokens that
    are no words, and padding, which repeats one token at the end or at the beginning.

    words: as for `other_words`, (V,). Every second text has words by Zipf's law, the others words that are all equally
    likely.
    """
    form = _form(ids) if words is None else _form(ids) | ~torch.isin(ids, words.to(ids))
    own = ids[~form].cpu()
    if not len(own):
        return ids
    words = torch.arange(int(own.min()), int(own.max()) + 1) if words is None else words
    places = torch.multinomial(zipf(len(words)), ids.numel(), replacement=True, generator=generator).reshape(ids.shape)
    places[::2] = torch.randint(len(words), tuple(places[::2].shape), generator=generator)
    return torch.where(form, ids, words[places].to(ids))


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
