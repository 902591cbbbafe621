"""More queries than a user's own texts, so that a refit does not forget the rest.

A few hundred texts of one kind use a small part of a vocabulary. Weights that are fitted to them alone get better on
that kind and worse on every other one. So the moments are those of a mixture: the user's texts; as many that keep
their form (lengths, padding, special tokens, masks), but whose words are drawn from the vocabulary; and as many texts
that need no data: of this machine where the model's tokenizer is known, otherwise what a language model writes itself.
The tokenizer also tells which words are frequent. What a refit on all loses on one kind is at most what it gains on the
others (T17). Few texts do not make the other kinds few, and beside very few samples of any form queries are made.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from coreprune._twin import guarded
from coreprune.errors import first_line
from coreprune.graph import Captured
from coreprune.graph.ops import op_name, operation
from coreprune.queries import MachineText, Queries, Target, make_queries
from coreprune.queries.leaves import drawable
from coreprune.queries.machine_text import has_text
from coreprune.queries.sources.base import Source, untouched
from coreprune.queries.sources.self_generated import SelfGenerated
from coreprune.queries.sources.token_mixture import TEMPERATURES
from coreprune.queries.sources.tokens import is_causal, known, zipf

log = logging.getLogger(__name__)

_FEW = 8  # beside fewer samples, queries are made
_OTHERS = 96  # at least so many queries of every other kind, unless the number of samples is said
_OFTEN = 0.9  # of the texts: what so many have equally often belongs to their form


def accompanied(
    model: nn.Module,
    captured: Captured,
    example: Any,
    samples: Queries,
    n: int | None,
    tokenizer: Any,
    generator: torch.Generator,
    make: Callable[[], Queries] | None,
) -> list[Queries]:
    """The samples, and the other kinds of queries that go with them; each a kind of its own if there are enough.

    example, n, tokenizer: the caller's; with a number of samples there are as many of each other kind. make: makes
    queries without data, which join samples that are too few to say anything of other inputs; or None.
    """
    others = other_kinds(model, captured, example, samples, tokenizer, generator, _OTHERS if n is None else 0)
    if n is not None or len(samples) >= _FEW:
        return [samples, *others]
    if not others and make is not None and not samples.whole:
        others = _beside(samples, make)
    if not others:
        return [samples]
    return [(samples + others[0]).shuffled(generator), *others[1:]]  # nothing can be checked on so few


def _beside(samples: Queries, make: Callable[[], Queries]) -> list[Queries]:
    """Made queries, once each. Empty if they cannot be made, or have another form than the samples."""
    try:
        made = make().distinct()
    except Exception as error:  # of the model: not every input is one for it, and the samples are
        log.warning("few samples can be used for the repair, and none can be made beside them: %s", first_line(error))
        return []
    if len(made) < 2 or _rows(made) != _rows(samples):
        return []
    log.warning(
        "few samples can be used for the repair (%d), so %d queries are made beside them. Pass more samples, or say "
        "with n_queries how many to take.",
        len(samples), len(made),
    )  # fmt: skip
    return [made]


def other_kinds(
    model: nn.Module,
    captured: Captured,
    example: Any,
    queries: Queries,
    tokenizer: Any,
    generator: torch.Generator,
    least: int = 0,
) -> list[Queries]:
    """As many queries of every other kind, and at least `least`. Empty if the model looks no tokens up, or these are no
    texts. There are none with other words if the texts have nothing but form.

    example, tokenizer: the caller's.
    """
    if not _texts(captured, queries):
        return []
    n = max(len(queries), least)
    with guarded(model), untouched(model) as still:
        targets = _targets(still, captured, tokenizer)
        words = {t.leaf: torch.tensor(told.words) for t in targets if (told := known(t)) is not None}
        source = _without_data(targets, words)
    found = [other_words(captured, queries, generator, words, n)]
    if source is not None:
        more: dict[str, Any] = {"batch_axis": captured.axes, "tokenizer": tokenizer}
        found.append(make_queries(model, example, source, n=n, seed=generator, **more))
    return [one for one in found if one is not None and _rows(one) == _rows(queries)]


def _targets(model: nn.Module, captured: Captured, tokenizer: Any) -> list[Target]:
    """The inputs that hold tokens."""
    leaves = drawable(captured.args, captured.kwargs, captured.axes)
    targets = [Target(model, captured.args, captured.kwargs, i, captured.axes, tokenizer) for i in leaves]
    return [t for t in targets if t.kind == "tokens"]


def _without_data(targets: Sequence[Target], words: Mapping[int, Tensor]) -> Source | None:
    """A source of whole texts: this machine's where a tokenizer is known, otherwise the model's own, if it writes."""
    if words and has_text():
        return MachineText()
    writes = bool(targets) and all(is_causal(t) and _alone(t) for t in targets)
    return SelfGenerated(temperature=TEMPERATURES) if writes else None


def _alone(target: Target) -> bool:
    """Whether nothing else is said of every token but a mask that is known: the example's would not fit other texts."""
    leaves = pytree.tree_leaves((target.args, target.kwargs))
    like = [i for i, x in enumerate(leaves) if isinstance(x, Tensor) and x.shape == target.given.shape]
    return set(like) <= {target.leaf, target.mask}


def _rows(queries: Queries) -> list[torch.Size]:
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
    """The same texts (N, T) with other words.

    What is their form stays: tokens that nearly all texts have equally often, tokens that are no words, and padding,
    which repeats one token at the end or at the beginning.

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
    """Which tokens belong to the form of the texts, (N, T) bool: padding, and tokens that nearly all texts have equally
    often, as special tokens are. In small vocabularies every text has all words, but not equally often."""
    values, places = ids.unique(return_inverse=True)
    counts = torch.zeros(len(ids), len(values), dtype=torch.int64, device=ids.device)
    counts.scatter_add_(1, places, torch.ones_like(places))
    usual = counts.mode(dim=0).values
    common = ((usual > 0) & ((counts == usual).sum(dim=0) >= _OFTEN * len(ids)))[places]
    return common | run_of(ids, repeated([ids], True), True) | run_of(ids, repeated([ids], False), False)


def repeated(texts: Sequence[Tensor], at_end: bool) -> int | None:
    """The token that most of the texts with a repeated token at this end repeat there; None if there is none. Words
    that are repeated by chance are different ones."""
    if any(ids.shape[1] < 2 for ids in texts):
        return None
    pairs = torch.cat([ids[:, -2:] if at_end else ids[:, :2] for ids in texts])
    tokens, counts = pairs[pairs[:, 0] == pairs[:, 1], 0].unique(return_counts=True)
    if not len(tokens) or 2 * int(counts.max()) <= int(counts.sum()):
        return None
    return int(tokens[counts.argmax()])


def run_of(ids: Tensor, token: int | None, at_end: bool) -> Tensor:
    """Where texts (texts, tokens) have nothing but this token up to their end, or from their beginning on."""
    if token is None:
        return torch.zeros_like(ids, dtype=torch.bool)
    same = (ids == token).to(torch.int8)
    return (same.flip(1).cummin(dim=1).values.flip(1) if at_end else same.cummin(dim=1).values).bool()


def _same_numbers(node: fx.Node) -> bool:
    known = operation(node)
    return known.bijective or known.identity or op_name(node) == "to"
