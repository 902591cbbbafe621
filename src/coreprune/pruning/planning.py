"""make_plan(): which channels stay, and what prune() also does before it has queries."""

from __future__ import annotations

import logging
from collections.abc import Collection, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from coreprune._progress import Clock
from coreprune._telling import Wanted, telling
from coreprune._twin import guarded
from coreprune.errors import InputError
from coreprune.graph import Traced
from coreprune.pruning.allocation.allocate import allocate
from coreprune.pruning.allocation.budget import RISKS, Budget
from coreprune.pruning.allocation.keeps import left_whole
from coreprune.pruning.allocation.spending import CostFunction
from coreprune.pruning.calibration.calibration import Asked, gather
from coreprune.pruning.configured import unsaid
from coreprune.pruning.controlled import first_size
from coreprune.pruning.half import in_single_precision
from coreprune.pruning.memory import bytes_of
from coreprune.pruning.offloaded import of_offloaded
from coreprune.pruning.over_ranks import agree_on, over_ranks, refuse_over_ranks
from coreprune.pruning.part import of_a_part
from coreprune.pruning.plans.depth import without_any
from coreprune.pruning.plans.plan import Plan
from coreprune.pruning.selectors import Method, Selector, resolve
from coreprune.pruning.settings import Settings, asked_queries
from coreprune.pruning.stages import prune_to
from coreprune.pruning.timing.pace import Pace, pace_of
from coreprune.pruning.tracing import exclude_names, trace
from coreprune.pruning.validate import (
    check_also,
    check_cost,
    check_count,
    check_depth,
    check_exclude,
    check_settings,
    counterparts,
)
from coreprune.queries.spec import is_source

log = logging.getLogger(__name__)


@of_offloaded
@over_ranks
@of_a_part
@in_single_precision
def make_plan(
    model: nn.Module,
    example_inputs: Any,
    budget: Budget | None = None,
    method: Method = "auto",
    *,
    queries: Any = "auto",
    n_queries: int | None = None,
    exclude: str | nn.Module | Collection[str | nn.Module] = (),
    also: Sequence[Any] = (),
    seed: int = 0,
    cost: CostFunction | None = None,
    cache: str | Path | None = None,
    progress: Wanted = None,
    batch_axis: Any = "auto",
    part: str | nn.Module | None = None,
    norm_statistics: bool = False,
    stock: bool = False,
    tokenizer: Any = None,
    memory: int | str | None = None,
    depth: bool = False,
) -> Plan:
    """Decide which channels stay, without changing any weight. Arguments and errors are those of `prune`."""
    del part  # `of_a_part` has done what it asks for
    budget, selector = check_settings(budget, seed, 0.01), resolve(method, queries is not None, queries is not None)
    refuse_over_ranks(False, budget)
    check_count(n_queries, "n_queries")
    check_cost(cost, budget)
    if budget.kind in RISKS:
        raise InputError(f"a budget of {budget.kind} tests pruned models. Call prune(); its result has the plan.")
    check_depth(depth, budget, queries)
    most = bytes_of(memory)
    excluded, others = check_exclude(exclude), check_also(also)
    with telling(progress) as tell, guarded(model):
        clock = Clock(tell)
        traced = trace(model, example_inputs, clock.tell, excluded, others, batch_axis, norm_statistics)
        excluded = counterparts(excluded, model, traced.model)
        if stock:
            odd, budget = unsaid(traced), replace(budget, uniform=True)
            traced, excluded = traced.locking(odd), (*excluded, *odd)
        pace = affordable(budget, traced, cost, clock, depth)
        traced = traced.locking(left_whole(budget, traced.groups))
        names = exclude_names(traced, excluded)
        settings = Settings(budget, selector, asked_queries(queries), n_queries, names, None, None, seed, 0.01, cost)
        more: dict[str, Any] = {"tokenizer": tokenizer, "memory": memory, "depth": depth}
        settings = replace(settings, batch_axis=batch_axis, norm_statistics=norm_statistics, **more)
        agree_on(traced, settings.as_dict())
        calibration = None
        if queries is not None and (depth or by_queries(selector, budget)):
            asked = Asked(example_inputs, queries, n_queries, cache, tokenizer, most)
            calibration = gather(traced, asked, seed, clock.tell)
        return prune_to(traced, settings, calibration, clock, pace).plan


def say_what_queries_are_for(selector: Selector, queries: Any) -> None:
    """Warn that queries will be made, which may take minutes, if nothing but the allocation needs them."""
    if not selector.reads and is_source(queries):
        log.warning(
            "queries are made for the allocation of widths alone, because %s needs none and nothing is repaired. "
            "With queries=None, or Budget(..., uniform=True), none are made, and all groups give up about the same "
            "share.",
            selector.name,
        )


def by_queries(selector: Selector, budget: Budget) -> bool:
    """Whether the plan depends on queries, through the selector or through the allocation."""
    allocates = budget.kind in ("error", *RISKS) or (budget.kind != "keep" and not budget.uniform)
    return allocates or getattr(selector, "reads", False)


def affordable(
    budget: Budget, traced: Traced, cost: CostFunction | None, clock: Clock, depth: bool = False
) -> Pace | None:
    """Raise BudgetError if the budget cannot be met. This runs before queries are made, which may take long.

    Returns what was measured for it, if it is one of time.
    """
    if budget.latency is not None:
        with clock("latency"):
            return pace_of(budget, traced, clock.tell)
    if budget.kind in RISKS:
        budget = first_size(budget, cost)
    if depth and without_any(traced):
        log.warning("depth=True changes nothing: %s", without_any(traced))
        depth = False
    if budget.kind != "error" and not depth:  # what remains without some blocks is known later
        allocate(budget, list(traced.groups), cost or traced.cost_model)
    return None
