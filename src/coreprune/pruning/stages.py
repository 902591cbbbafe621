"""The stages of prune(), make_plan() and apply_plan()."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from coreprune import _ranks
from coreprune._mapped import write_
from coreprune._progress import Clock, Progress
from coreprune.errors import ModelError, first_line
from coreprune.graph import Recipe, Removed, Traced, elements, passing_, recipe_of, remove, shallow, shallow_
from coreprune.graph.members import named
from coreprune.pruning.allocation.budget import Budget
from coreprune.pruning.calibration.calibration import Calibration
from coreprune.pruning.calibration.element_losses import ElementLosses
from coreprune.pruning.calibration.sites import Collect
from coreprune.pruning.calibration.statistics import Read, collect_readers
from coreprune.pruning.plans.decide import decide, plan_of, rank, widths_within
from coreprune.pruning.plans.decision import Decision
from coreprune.pruning.plans.depth import shallower
from coreprune.pruning.plans.other_cuts import (
    Decided,
    other_cuts,
    other_decisions,
    packed_decided,
    unpacked_decided,
)
from coreprune.pruning.plans.plan import Plan, fingerprint
from coreprune.pruning.plans.weights_after import pour_, weights_after
from coreprune.pruning.repair.descent import Descended, descend
from coreprune.pruning.repair.lockstep import repaired
from coreprune.pruning.repair.options import Repair
from coreprune.pruning.repair.products import Mix, mix_of, mixed_start
from coreprune.pruning.repair.refit import Refit
from coreprune.pruning.repair.twins import Descent, affordable, twins
from coreprune.pruning.repair.walk import Cut
from coreprune.pruning.settings import Settings
from coreprune.pruning.timing.pace import MetLatency, Pace
from coreprune.pruning.unfinished import Unfinished

log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Pruned:
    """A model after surgery, and what led to it.

    traced: the original. Groups that could not shrink after all are locked in it. plan: the plan that was carried out.
    removed: the smaller model, and which positions stayed. start: the tensors of the smaller model in the original's
    shapes, before any repair. decisions: by name of the group; empty if the plan was made earlier. fits: the repair.
    pace: what a budget of time goes by, if there is one. met: how this model met it. others: the decisions of
    `other_cuts`, where they were made at once. ranked: the rankings of all groups, before widths were allocated; empty
    if the plan was made earlier. choices: how many models could be here, had other queries been held back (T11).
    """

    traced: Traced
    plan: Plan
    removed: Removed
    start: Mapping[str, Tensor]
    decisions: Mapping[str, Decision] = field(default_factory=dict)
    fits: tuple[Refit, ...] = ()
    descended: tuple[Descended, ...] = ()
    pace: Pace | None = None
    met: MetLatency | None = None
    others: Mapping[str, Mapping[str, Decision] | None] = field(default_factory=dict)
    ranked: Mapping[str, Decision] = field(default_factory=dict)
    choices: int = 1


def prune_to(
    traced: Traced,
    settings: Settings,
    calibration: Calibration | None,
    clock: Clock,
    pace: Pace | None = None,
    state: Unfinished | None = None,
) -> Pruned:
    """Select, allocate and cut. pace: what a budget of time goes by. state: keeps what is decided."""
    state, made = state or Unfinished(), []

    def decided() -> Decided:
        pruned = _decided(traced, settings, calibration, clock, pace, state)
        made.append(pruned)
        stayed = {g.name: g.locked_because or "" for g in pruned.traced.groups if g.locked_because is not None}
        locked = {name: why for name, why in stayed.items() if name in traced.free}
        return Decided(locked, pruned.decisions, {} if state.folder is None else _others(pruned, settings, clock))

    found = state.once(
        "decided", decided, packed_decided, lambda about, tensors: unpacked_decided(traced.free, about, tensors)
    )
    if not made:
        with clock("surgery"):
            again = traced.locking(found.locked)
            plan = plan_of(again, found.decisions, settings.method, settings.budget, settings.seed)
            made.append(replace(carry_out(again, plan), decisions=found.decisions))
    return replace(made[0], others=found.others)


def _decided(
    traced: Traced,
    settings: Settings,
    calibration: Calibration | None,
    clock: Clock,
    pace: Pace | None,
    state: Unfinished,
) -> Pruned:
    readers: Iterator[Read] = iter(())
    losses = ElementLosses()
    if calibration is not None:
        generator = torch.Generator().manual_seed(settings.seed)
        if settings.depth:
            losses = ElementLosses(elements(calibration.captured, traced.model)[0].values())
        readers = collect_readers(traced, calibration, Collect(), generator, clock.tell, losses)
    with clock("select"):
        ranked = rank(traced, settings.method, clock.each("statistics", readers), settings.seed, clock.tell, state)
    if settings.depth:
        with clock("depth"):
            traced = shallower(traced, ranked, losses.found(), settings.budget, clock.tell)
    return cut_to(traced, ranked, settings, clock, pace)


def cut_to(
    traced: Traced, ranked: Mapping[str, Decision], settings: Settings, clock: Clock, pace: Pace | None = None
) -> Pruned:
    """Allocate and cut what is ranked already.

    If the model does not run without some channels of a group, that group stays whole, and the others meet the budget.
    """
    while True:
        pruned = cut_once(traced, ranked, settings, settings.budget, clock, pace)
        if not pruned.removed.locked:
            return replace(pruned, ranked=ranked)
        traced = traced.locking(pruned.removed.locked)


def cut_once(
    traced: Traced,
    ranked: Mapping[str, Decision],
    settings: Settings,
    budget: Budget,
    clock: Clock,
    pace: Pace | None = None,
) -> Pruned:
    """Rankings cut to a budget, without repair. `removed.locked` names the groups that had to stay whole after all.

    Raises BudgetError if the budget cannot be met so.
    """
    met, limited, cost = None, budget, settings.cost
    with clock("allocate"):
        if pace is not None:
            with clock("latency"):
                limited, met = pace.met(
                    traced, lambda b, table: widths_within(traced, ranked, b, table, clock.tell), budget
                )
            cost = pace.table
        decisions = decide(traced, ranked, limited, cost, clock.tell)
        plan = plan_of(traced, decisions, settings.method, budget, settings.seed)
    with clock("surgery"):
        return replace(carry_out(traced, plan), decisions=decisions, pace=pace, met=met)


def _others(pruned: Pruned, settings: Settings, clock: Clock) -> dict[str, dict[str, Decision] | None]:
    """What the comparison at the end will ask for, decided while the moments are there."""
    out: dict[str, dict[str, Decision] | None] = {}
    if settings.compare and settings.repair is not None:
        for name, budget, locked in other_cuts(pruned.traced, pruned.plan, settings.budget):
            out[name] = other_decisions(pruned.traced.locking(locked), pruned.decisions, settings.cost, budget, clock)
    return out


def carry_out(traced: Traced, plan: Plan) -> Pruned:
    """A smaller copy with re-weighted consumers. `removed.locked` names the groups that had to stay whole after all."""
    keep = {name: torch.tensor(entry.kept, dtype=torch.int64) for name, entry in plan.groups.items()}
    removed = remove(traced, keep)
    _ranks.agree("the plans", (plan.to_json(), sorted(removed.locked)))
    start = weights_after(traced, {n: entry for n, entry in plan.groups.items() if n not in removed.locked})
    if traced.dropped:
        passing_(removed.model, [e.name for e in traced.dropped], traced.captured.args, traced.captured.kwargs)
    pour_(removed.model, start, removed.masks)
    return Pruned(traced, plan, removed, start)


def finished(small: nn.Module, traced: Traced, dropped: Sequence[str]) -> tuple[nn.Module, Recipe]:
    """The pruned model without what stands for the elements that have left, and how the dense model becomes it.

    small: is changed in place. dropped: the names of the elements.
    """
    if not dropped:
        return small, replace(recipe_of(traced.model, small), plain=traced.plain)
    dense = shallow(traced.model, dropped)
    small = shallow_(small, dropped)
    return small, replace(recipe_of(dense, small), plain=traced.plain, dropped=tuple(dropped), rest=fingerprint(dense))


def repair_(
    pruned: Pruned, calibration: Calibration, options: Repair, tell: Progress, state: Unfinished | None = None
) -> tuple[Refit, ...]:
    """Refit the pruned model in place. state: keeps every layer as it is refit."""
    masks, mixes = pruned.removed.masks, _mixes(pruned, calibration)
    start = mixed_start(pruned.start, mixes, calibration.operators)
    gone = named(calibration.captured, pruned.traced.model, [e.name for e in pruned.traced.dropped])
    cut = Cut(pruned.traced.tensors, start, masks, mixes, tuple(gone.values()))
    after, fits = repaired(cut, calibration, options, tell, state)
    fits = [*(Refit(name, mix.before, mix.after, joined=False) for name, mix in mixes.items()), *fits]
    for name, tensor in after.items():
        if tensor.is_floating_point() and bool((torch.isfinite(pruned.start[name]) & ~torch.isfinite(tensor)).any()):
            raise ModelError(
                f"the repair made {name} infinite. Leave it out, or in Python use a larger ridge: Repair(ridge=0.01)."
            )
    pour_(pruned.removed.model, after, masks)
    return tuple(fits)


def _mixes(pruned: Pruned, calibration: Calibration) -> dict[str, Mix]:
    """What the layers in front of products (q·k) are to compute. A plan that was made earlier has no statistics."""
    mine: dict[str, dict[str, Mix]] = {}
    for name, decision in pruned.decisions.items():
        if decision.owner == _ranks.rank() and decision.coreset is not None and decision.coreset.merge is None:
            kept = decision.coreset.indices.cpu()
            mine[name] = mix_of(decision.group, decision.readers, kept, calibration.operators)
    everyone = {name: found for each in _ranks.gathered("the products", mine) for name, found in each.items()}
    return {weight: mix for name in pruned.decisions for weight, mix in everyone.get(name, {}).items()}


def descend_(
    pruned: Pruned, calibration: Calibration, options: Repair, seed: int, tell: Progress
) -> tuple[Descended, ...]:
    """Train the pruned model in place, block by block, if that is asked for or cheap. If it fails, nothing changes.

    Raises ModelError if it fails and was asked for.
    """
    if options.descent is False:
        return ()
    chosen = options.descent if isinstance(options.descent, Descent) else Descent()
    if options.descent is None:
        widths = {name: len(entry.kept) for name, entry in pruned.plan.groups.items()}
        cheap = affordable(pruned.traced.cost_model(widths).macs, chosen, calibration.queries.whole)
        if cheap is None:
            log.info("no block descent: it would take long. Ask for it with Repair(descent=True).")
            return ()
        chosen = cheap
    asked = options.descent is not None
    # Its steps follow each other and are small, so of several processes the first one does it for all.
    changed, done = _ranks.from_first("the descent", lambda: _descended(pruned, calibration, chosen, asked, seed, tell))
    mine = dict([*pruned.removed.model.named_parameters(), *pruned.removed.model.named_buffers()])
    for name, tensor in changed.items():
        write_(mine[name], tensor)
    return tuple(done)


def _descended(
    pruned: Pruned, calibration: Calibration, chosen: Descent, asked: bool, seed: int, tell: Progress
) -> tuple[dict[str, Tensor], list[Descended]]:
    """The tensors that changed, and what happened to every block. asked: whether the caller has asked for it."""
    generator = torch.Generator().manual_seed(seed)
    try:
        both = twins(pruned.traced, pruned.removed, calibration.queries, chosen, generator, calibration.ends)
        if not isinstance(both, str):
            return descend(both, chosen, generator, tell)
        log.info("no block descent: %s", both)
    except Exception as error:
        if asked:
            raise ModelError(
                f"the block descent fails: {first_line(error)}. Leave it out: Repair(descent=False)."
            ) from error
        log.warning("no block descent: %s", first_line(error))  # nobody asked for it
    return {}, []
