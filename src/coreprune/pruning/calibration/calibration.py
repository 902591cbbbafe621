"""Queries that are ready to run: in batches of equal size, with the model traced at that size."""

from __future__ import annotations

import functools
import logging
import operator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from coreprune import _ranks
from coreprune._example import fitting
from coreprune._progress import Progress
from coreprune.errors import ModelError
from coreprune.graph import Captured, Traced, capture
from coreprune.pruning.calibration.familiar import familiar
from coreprune.pruning.calibration.padding import NOWHERE, Ends, Padding, ends
from coreprune.pruning.calibration.wider import accompanied
from coreprune.pruning.layer.linear_maps import Operator, operators
from coreprune.pruning.memory import Shelf
from coreprune.queries import Queries, make_queries
from coreprune.queries.spec import is_source

log = logging.getLogger(__name__)

Batch = tuple[tuple[Any, ...], dict[str, Any]]

_BATCH = 32  # samples that are run together; fewer where their outputs are large, such as the logits of texts
_FRESH = 64  # at least this many queries are made for the comparison at the end alone
_LEAST = 16  # at least this many samples are held back for it, but never more than half
_SPARE = 256  # of many samples as many are held back as are used, up to this number


@dataclass(frozen=True, eq=False)
class Asked:
    """What the caller said about the queries, from the arguments of `prune`.

    example: `example_inputs`. spec: `queries`, which makes or holds them. n: `n_queries`, or None. cache: a file, or
    None. tokenizer: the caller's, or None. memory: how much the run may take, in bytes; None for no limit.
    """

    example: Any
    spec: Any
    n: int | None = None
    cache: str | Path | None = None
    tokenizer: Any = None
    memory: int | None = None


@dataclass(frozen=True, eq=False)
class Calibration:
    """The queries that selection, allocation and repair use, and the model traced for them.

    queries: the queries for these steps, in random order. fresh: other queries from the same source, which only the
    comparison at the end uses; None if there is but one. captured: the model, traced at the size of the batches.
    operators: its linear maps, by the name of their weight. batches: the queries in batches, (args, kwargs) each.
    given: all that were made for these steps, or given by the caller. useful: whether weights may be fitted on them.
    ends: where texts have padding. kinds: which kind of queries is in every batch, from 0 on; empty if there is one.
    shelf: keeps what the model computes on the queries.
    """

    queries: Queries
    fresh: Queries | None
    captured: Captured
    operators: dict[str, Operator]
    batches: list[Batch]
    given: Queries | None = None
    useful: bool = True
    ends: Ends = NOWHERE
    kinds: tuple[int, ...] = ()
    shelf: Shelf = field(default_factory=Shelf)

    def padding_of(self, b: int) -> Padding:
        """Which tokens of a batch are padding."""
        return self._padding[b]

    @functools.cached_property
    def _padding(self) -> tuple[Padding, ...]:
        return tuple(map(self.ends.of, self.batches))


def gather(traced: Traced, asked: Asked, seed: int, tell: Progress) -> Calibration:
    """Make the queries, or take those that were given. Raises what `make_queries` raises.

    Of several processes, the first one does this for all.
    """
    made = _ranks.from_first("the queries", lambda: _made(traced, asked, seed, tell))
    found = _in_batches(traced, [made.queries, *made.others], made.fresh, made.given)
    _ranks.agree("the batches", (len(found.batches), tuple(found.operators)))
    if (idle := _ranks.world() - len(found.batches)) > 0 and _ranks.rank() == 0:
        log.warning(
            "%d of %d processes have no queries to run, because there are %d batches. Use fewer processes, or more "
            "queries.",
            idle, _ranks.world(), len(found.batches),
        )  # fmt: skip
    return replace(
        found,
        queries=made.mixture,
        useful=made.useful,
        ends=_ranks.from_first("the padding", lambda: ends(found.captured, traced.tensors, found.batches)),
        shelf=Shelf(asked.memory),
    )


@dataclass(frozen=True, eq=False)
class _Made:
    """Queries, before they are in batches.

    others: at least as many of every other kind. mixture: of all kinds, in random order. The rest is as in
    `Calibration`.
    """

    queries: Queries
    fresh: Queries | None
    others: list[Queries]
    mixture: Queries
    given: Queries
    useful: bool


def _made(traced: Traced, asked: Asked, seed: int, tell: Progress) -> _Made:
    model, spec, cache = traced.model, asked.spec, asked.cache
    generator = torch.Generator().manual_seed(seed)
    axes = traced.captured.axes
    same: dict[str, Any] = {"seed": generator, "progress": tell, "batch_axis": axes, "tokenizer": asked.tokenizer}
    given = make_queries(model, asked.example, spec, n=asked.n, cache=cache, **same)
    useful = True
    if given.source == "samples":
        given, useful = familiar(model, given)
    queries, fresh, others = given.distinct(), None, []
    if len(queries) < len(given):  # a copy on the other side of a division would make what is seen look unseen
        level = logging.WARNING if given.source == "samples" else logging.INFO  # made ones are nobody's mistake
        log.log(level, "%d of %d queries are copies of others and are left out.", len(given) - len(queries), len(given))
    if is_source(spec):
        count = max(_FRESH, len(queries) // 4)
        again = Path(cache).with_suffix(".fresh.safetensors") if cache is not None else None
        fresh = make_queries(model, asked.example, spec, n=count, cache=again, **same)
    else:
        # In random order, because files and loaders are often sorted. T11 assumes samples of one distribution, and so
        # does the comparison of one half of the batches with the other.
        if len(queries) > 1:
            queries, fresh = queries.shuffled(generator).split(len(queries) - _held_back(len(queries)))
        make = functools.partial(make_queries, model, asked.example, cache=cache, **same)
        queries, *others = accompanied(
            model, traced.captured, asked.example, queries, asked.n, asked.tokenizer, generator,
            make if given.source == "samples" and useful else None,
        )  # fmt: skip
    if len(queries) < 2:
        log.warning(
            "with a single query nothing can be checked on another one, so no layer is refitted. Pass more queries."
        )
    mixture = functools.reduce(operator.add, others, queries).shuffled(generator) if others else queries
    return _Made(queries, fresh, others, mixture, given, useful)


def _held_back(n: int) -> int:
    """How many of n samples are used neither for selection nor for repair."""
    return min(n // 2, max(_LEAST, n // 4, min(_SPARE, n - _SPARE)))


def _in_batches(traced: Traced, parts: list[Queries], fresh: Queries | None, given: Queries) -> Calibration:
    """parts: the queries of every kind. The kinds take turns, so that each is in both halves of the batches."""
    found, queries = operators(traced.captured), parts[0]
    size = 1 if queries.whole else _batch_size(len(queries), fitting(_BATCH, _entries(traced.captured)))
    batches, kinds = _in_turn(parts, size)
    if size > 1:
        try:
            larger = capture(traced.model, *batches[0], size, batch_axis=traced.captured.axes)
        except ModelError as error:
            log.info("the model cannot be traced at batch size %d (%s); samples are run one at a time", size, error)
        else:
            if (at_size := operators(larger)).keys() == found.keys():
                return Calibration(queries, fresh, larger, at_size, batches, given, kinds=kinds)
    batches, kinds = _in_turn(parts, 1)
    return Calibration(queries, fresh, traced.captured, found, batches, given, kinds=kinds)


def _in_turn(parts: list[Queries], size: int) -> tuple[list[Batch], tuple[int, ...]]:
    """Batches of one kind each, and their kinds: two of the first kind, two of the second, …, and again, as long as
    there are some.

    What does not fill a batch is left out.
    """
    each = [list(part.batches(size))[: len(part) // size] for part in parts]
    found = [
        (batch, kind)
        for start in range(0, max(map(len, each)), 2)
        for kind, batches in enumerate(each)
        for batch in batches[start : start + 2]
    ]
    return [batch for batch, _ in found], tuple(kind for _, kind in found)


def _batch_size(n: int, most: int) -> int:
    """The size of a batch: at most `most`, and such that an even number of batches leaves as few samples as possible
    over.

    The batches fall into two halves of the queries, which are checked against each other.
    """
    if n <= most:
        return max(1, n // 2)
    return min(range(most, (most - 1) // 2, -1), key=lambda size: n % (2 * size))


def _entries(captured: Captured) -> int:
    """How many entries the outputs of one sample have."""
    (output,) = captured.graph.graph.find_nodes(op="output")
    found = (node.meta.get("val") for node in output.all_input_nodes)
    return sum(value.numel() for value in found if isinstance(value, Tensor))
