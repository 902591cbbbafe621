"""More queries than a user's own texts, so that a refit does not forget the rest.

A few hundred texts of one kind use a small part of a vocabulary. Weights that are fitted to them alone get better on
that kind and worse on every other one. So the moments are those of a mixture: the user's texts; as many that keep
their form (lengths, padding, special tokens, masks), but whose words are drawn from the vocabulary; and as many texts
that need no data: of this machine where the model's tokenizer is known, otherwise what a language model writes itself.
Few texts of the user do not make the other kinds few. The tokenizer also tells which words are frequent. What a refit
on all loses on one kind is at most what it gains on the others (T17).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from coreprune._twin import guarded
from coreprune.graph import Captured, Traced
from coreprune.graph.ops import op_name, operation
from coreprune.queries import MachineText, Queries, Target, make_queries
from coreprune.queries.leaves import drawable
from coreprune.queries.machine_text import has_text
from coreprune.queries.sources.base import Source, untouched
from coreprune.queries.sources.self_generated import SelfGenerated
from coreprune.queries.sources.token_mixture import TEMPERATURES
from coreprune.queries.sources.tokens import is_causal, known, zipf

_OFTEN = 0.9  # of the texts: what so many have in common belongs to their form


def other_kinds(
    traced: Traced, example: Any, queries: Queries, tokenizer: Any, generator: torch.Generator, least: int = 0
) -> list[Queries]:
    """As many queries of every other kind, and at least `least`. Empty if the model looks no tokens up, or the texts
    have nothing but form.

    example, tokenizer: the caller's.
    """
    if not _texts(traced.captured, queries):
        return []
    n = max(len(queries), least)
    with guarded(traced.model), untouched(traced.model) as still:
        targets = _targets(still, traced.captured, tokenizer)
        words = {t.leaf: torch.tensor(told.words) for t in targets if (told := known(t)) is not None}
        source = _without_data(targets, words)
    other = other_words(traced.captured, queries, generator, words, n)
    if other is None:
        return []
    if source is None:
        return [other]
    more: dict[str, Any] = {"batch_axis": traced.captured.axes, "tokenizer": tokenizer}
    text = make_queries(traced.model, example, source, n=n, seed=generator, **more)
    return [other, text] if rows(text) == rows(queries) else [other]


def _targets(model: nn.Module, captured: Captured, tokenizer: Any) -> list[Target]:
    """The inputs that hold tokens."""
    leaves = drawable(captured.args, captured.kwargs, captured.axes)
    targets = [Target(model, captured.args, captured.kwargs, i, captured.axes, tokenizer) for i in leaves]
    return [t for t in targets if t.kind == "tokens"]


def _without_data(targets: Sequence[Target], words: Mapping[int, Tensor]) -> Source | None:
    """A source of whole texts: this machine's where a tokenizer is known, otherwise the model's own, if it writes."""
    if words and has_text():
        return MachineText()
    return SelfGenerated(temperature=TEMPERATURES) if targets and all(map(is_causal, targets)) else None


def rows(queries: Queries) -> list[torch.Size]:
    """The shape of every input, without its first axis."""
    return [x.shape[1:] for x in pytree.tree_leaves((queries.args, queries.kwargs)) if isinstance(x, Tensor)]


def other_words(
    captured: Captured,
    queries: Queries,
    generator: torch.Generator,
    words: Mapping[int, Tensor] | None = None,
    n: int | None = None,
) -> Queries | None:
    """Queries with other tokens; None if the model looks no tokens up, or the texts have nothing but form.

    words: the tokens that make up text, the most frequent first, by the position of the input. Without them, those
    between the smallest and the largest one of the texts: most vocabularies are sorted by frequency. n: how many; as
    many as there are texts by default, and more take the form of each text more than once.
    """
    leaves, words = _texts(captured, queries), words or {}
    if not leaves:
        return None
    queries = queries.repeated(n or len(queries))
    given = pytree.tree_leaves((queries.args, queries.kwargs))
    other = queries.changed(lambda i, x: redrawn(x, generator, words.get(i)) if i in leaves else x)
    made = pytree.tree_leaves((other.args, other.kwargs))
    if all(torch.equal(a, b) for a, b in zip(given, made, strict=True) if isinstance(a, Tensor)):
        return None
    return replace(other, source="other words", note=f"{len(other)} of the same form with random tokens")


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
