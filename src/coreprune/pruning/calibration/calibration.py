"""Queries, ready to be run: in batches of one size, with the model traced at that size."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from coreprune.errors import ModelError
from coreprune.graph import Captured, capture
from coreprune.pruning.layer.linear_maps import operators
from coreprune.queries import Queries, make_queries

log = logging.getLogger(__name__)

_BATCH = 32  # samples that are run at once
_FRESH = 64  # queries of its own for the agreement, at least
_SPARE = 256  # samples of the user that selection and repair have first; as many again are held back, or a quarter


@dataclass(frozen=True, eq=False)
class Calibration:
    """What selection, allocation and repair go by.

    queries: what is used. fresh: others of the same source, which nothing but the agreement sees; None where the user
    gave too few samples. captured: the model traced at the size of the batches. batches: (args, kwargs) each.
    """

    queries: Queries
    fresh: Queries | None
    captured: Captured
    batches: list[tuple[tuple[Any, ...], dict[str, Any]]]


def gather(
    model: nn.Module,
    example_inputs: Any,
    captured: Captured,
    spec: Any,
    seed: int,
    tell: Callable[[str, int, int], None],
    cache: str | Path | None = None,
) -> Calibration:
    """Make or take the queries. Arguments as in `prune`; raises what `make_queries` raises."""
    generator = torch.Generator().manual_seed(seed)
    queries = make_queries(model, example_inputs, spec, generator=generator, progress=tell, cache=cache)
    fresh = None
    if is_source(spec):
        count = max(_FRESH, len(queries) // 4)
        again = Path(cache).with_suffix(".fresh.safetensors") if cache is not None else None
        fresh = make_queries(model, example_inputs, spec, n=count, generator=generator, progress=tell, cache=again)
    elif queries.source == "samples" and len(queries) > _SPARE:  # inputs made before are used as they are
        held_back = max(_SPARE, len(queries) // 4)
        # at random, because files and loaders are often sorted, and T11 is about samples of one distribution
        queries, fresh = queries.split(max(_SPARE, len(queries) - held_back), generator)
    return _in_batches(model, captured, queries, fresh)


def is_source(spec: Any) -> bool:
    """Whether `spec` names something that makes queries, so that it can make more of them; False for samples."""
    return callable(spec) or (isinstance(spec, str) and not spec.endswith((".npz", ".safetensors")))


def _in_batches(model: nn.Module, captured: Captured, queries: Queries, fresh: Queries | None) -> Calibration:
    size = _batch_size(len(queries))
    batches = [batch for batch in queries.batches(size)][: len(queries) // size]
    if size > 1:
        try:
            larger = capture(model, *batches[0], batch=size)
        except ModelError as error:
            log.info("the model cannot be traced at batch size %d (%s); samples are run one at a time", size, error)
        else:
            if operators(larger).keys() == operators(captured).keys():
                return Calibration(queries, fresh, larger, batches)
    return Calibration(queries, fresh, captured, list(queries.batches(1)))


def _batch_size(n: int) -> int:
    """Up to 32 samples at once, such that as few as possible are left over."""
    if n <= _BATCH:
        return n
    return min(range(_BATCH, _BATCH // 2 - 1, -1), key=lambda size: n % size)
