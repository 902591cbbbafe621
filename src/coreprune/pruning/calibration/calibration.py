"""Queries, ready to be run: in batches of one size, with the model traced at that size."""

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

_BATCH = 32  # samples that are run at once
_FRESH = 64  # queries of its own for the agreement, at least
_SPARE = 256  # samples of the user that selection and repair have first; as many again are held back, or a quarter


@dataclass(frozen=True, eq=False)
class Asked:
    """What the caller said of the queries: arguments of `prune` by other names.

    example: the example inputs. spec: what makes or holds them. n: how many, or None. cache: a file, or None.
    """

    example: Any
    spec: Any
    n: int | None = None
    cache: str | Path | None = None


@dataclass(frozen=True, eq=False)
class Calibration:
    """What selection, allocation and repair go by.

    queries: what is used. fresh: others of the same source, which nothing but the agreement sees; None where the user
    gave too few samples. captured: the model traced at the size of the batches. operators: its linear maps, by the name
    of their weight. batches: (args, kwargs) each.
    """

    queries: Queries
    fresh: Queries | None
    captured: Captured
    operators: dict[str, Operator]
    batches: list[tuple[tuple[Any, ...], dict[str, Any]]]


def gather(traced: Traced, asked: Asked, seed: int, tell: Progress) -> Calibration:
    """Make or take the queries. Raises what `make_queries` raises."""
    model, spec, cache = traced.model, asked.spec, asked.cache
    generator = torch.Generator().manual_seed(seed)
    queries = make_queries(model, asked.example, spec, n=asked.n, seed=generator, progress=tell, cache=cache)
    fresh = None
    if is_source(spec):
        count = max(_FRESH, len(queries) // 4)
        again = Path(cache).with_suffix(".fresh.safetensors") if cache is not None else None
        fresh = make_queries(model, asked.example, spec, n=count, seed=generator, progress=tell, cache=again)
    elif queries.source == "samples" and len(queries) > _SPARE:  # inputs made before are used as they are
        held_back = max(_SPARE, len(queries) // 4)
        # at random, because files and loaders are often sorted, and T11 is about samples of one distribution
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
    """Up to 32 samples at once, such that as few as possible are left over."""
    if n <= _BATCH:
        return n
    return min(range(_BATCH, _BATCH // 2 - 1, -1), key=lambda size: n % size)
