"""Queries that are ready to run: in batches of equal size, with the model traced at that size."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from coreprune._progress import Progress
from coreprune.errors import ModelError
from coreprune.graph import Captured, Traced, capture
from coreprune.pruning.layer.linear_maps import Operator, operators
from coreprune.queries import Queries, make_queries
from coreprune.queries.spec import is_source

log = logging.getLogger(__name__)

_BATCH = 32  # samples that are run together
_FRESH = 64  # at least this many queries are made for the agreement alone
# Of the user's samples, selection and repair get at least this many. The agreement gets as many, or a quarter of all if
# that is more, as far as there are samples left.
_SPARE = 256


@dataclass(frozen=True, eq=False)
class Asked:
    """What the caller said about the queries, from the arguments of `prune`.

    example: `example_inputs`. spec: `queries`, which makes or holds them. n: `n_queries`, or None. cache: a file, or
    None.
    """

    example: Any
    spec: Any
    n: int | None = None
    cache: str | Path | None = None


@dataclass(frozen=True, eq=False)
class Calibration:
    """The queries that selection, allocation and repair use, and the model traced for them.

    queries: the queries for these steps. fresh: other queries from the same source, which only the agreement uses; None
    if the user gave too few samples. captured: the model, traced at the size of the batches. operators: its linear
    maps, by the name of their weight. batches: the queries in batches, (args, kwargs) each.
    """

    queries: Queries
    fresh: Queries | None
    captured: Captured
    operators: dict[str, Operator]
    batches: list[tuple[tuple[Any, ...], dict[str, Any]]]


def gather(traced: Traced, asked: Asked, seed: int, tell: Progress) -> Calibration:
    """Make the queries, or take those that were given. Raises what `make_queries` raises."""
    model, spec, cache = traced.model, asked.spec, asked.cache
    generator = torch.Generator().manual_seed(seed)
    queries = make_queries(model, asked.example, spec, n=asked.n, seed=generator, progress=tell, cache=cache)
    fresh = None
    if is_source(spec):
        count = max(_FRESH, len(queries) // 4)
        again = Path(cache).with_suffix(".fresh.safetensors") if cache is not None else None
        fresh = make_queries(model, asked.example, spec, n=count, seed=generator, progress=tell, cache=again)
    elif queries.source == "samples" and len(queries) > _SPARE:  # queries that were made earlier are used as they are
        held_back = max(_SPARE, len(queries) // 4)
        # At random, because files and loaders are often sorted, and T11 assumes samples of one distribution.
        queries, fresh = queries.split(max(_SPARE, len(queries) - held_back), generator)
    return _in_batches(traced, queries, fresh)


def _in_batches(traced: Traced, queries: Queries, fresh: Queries | None) -> Calibration:
    found = operators(traced.captured)
    size = _batch_size(len(queries))
    batches = [batch for batch in queries.batches(size)][: len(queries) // size]
    if size > 1:
        try:
            larger = capture(traced.model, *batches[0], batch=size)
        except ModelError as error:
            log.info("the model cannot be traced at batch size %d (%s); samples are run one at a time", size, error)
        else:
            if (at_size := operators(larger)).keys() == found.keys():
                return Calibration(queries, fresh, larger, at_size, batches)
    return Calibration(queries, fresh, traced.captured, found, list(queries.batches(1)))


def _batch_size(n: int) -> int:
    """The size of a batch: at most 32, and such that as few samples as possible are left over."""
    if n <= _BATCH:
        return n
    return min(range(_BATCH, _BATCH // 2 - 1, -1), key=lambda size: n % size)
