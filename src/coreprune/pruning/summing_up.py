"""The report of one run, from what its stages have left."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace

from coreprune._patterns import shortened
from coreprune.graph import Captured, Group, Traced
from coreprune.pruning.calibration.calibration import Calibration
from coreprune.pruning.plans.depth import without_any
from coreprune.pruning.reporting.certificates import embedded, group_report
from coreprune.pruning.reporting.certify import agreement, no_draws
from coreprune.pruning.reporting.little import little
from coreprune.pruning.reporting.report import Compared, GroupReport, Report, TestedPath, versions
from coreprune.pruning.settings import Settings
from coreprune.pruning.stages import Pruned

log = logging.getLogger(__name__)


def make_report(
    pruned: Pruned,
    settings: Settings,
    calibration: Calibration | None,
    compared: Sequence[Compared] = (),
    path: TestedPath | None = None,
) -> Report:
    """The report: sizes, groups with their certificates, repairs, comparison, agreement.

    path: what a budget of risk has tested. The queries that are held back for the agreement are not unseen then,
    because they helped to decide which models are tested.
    """
    traced, small = pruned.traced, pruned.removed.model
    costs = traced.cost_model
    widths = {name: len(entry.kept) for name, entry in pruned.plan.groups.items()}
    dense = costs if traced.whole is None else traced.whole.cost_model
    before, after = dense(), costs(widths)
    made, made_after = dense.making(), costs.making(widths)
    change = None
    if calibration is not None and (pruned.fits or settings.distill is not None):
        change = embedded(traced, pruned.removed, calibration.operators)
    rows = tuple(
        replace(
            group_report(traced, pruned.decisions[g.name], change, settings.delta)
            if g.locked_because is None
            else GroupReport(g.name, g.size, g.size, g.unit, locked_because=g.locked_because),
            macs=(made[g.name], made_after[g.name]),
        )
        for g in _by_depth(traced.captured, list(traced.groups))
    )
    notes = []
    flags = {g.name: g.flags for g in traced.groups}
    if few := little(settings.budget, rows, (before.macs, after.macs), costs.free_share()):
        log.warning("almost nothing was removed: %s", few)
        notes.append(f"Almost nothing was removed: {few}")
    if traced.plain:
        notes.append(
            "Weights that the original computes (weight norm, weight standardisation, a parametrization) are plain "
            f"parameters in the pruned model, which training changes directly: {shortened(traced.plain)}."
        )
    if settings.depth:
        notes.append(_of_depth(traced))
    if entered := [g.name for g in rows if g.kept < g.channels and "norm-statistics" in flags[g.name]]:
        notes.append(
            "Channels left that enter the statistics of a norm, whose mean and variance are now taken over fewer "
            f"channels; the check after surgery ran the model and could not compare it: {shortened(entered)}."
        )
    fresh = calibration.fresh if calibration and path is None else None
    shown = path.certificate if path is not None and settings.budget.kind == "agreement" else None
    if fresh is not None and (reason := no_draws(fresh)):
        notes.append(reason)
    return Report(
        groups=rows,
        parameters=(before.params, after.params),
        macs=(before.macs, after.macs),
        bytes=(before.bytes, after.bytes),
        settings=settings,
        queries=calibration.queries.note if calibration else "",
        refits=pruned.fits,
        descended=pruned.descended,
        compared=tuple(compared),
        agreement=agreement(traced.model, small, fresh, settings.delta, pruned.choices) if fresh else shown,
        path=path,
        model=type(traced.model).__name__,
        notes=tuple(notes),
        versions=versions(),
        unread=traced.captured.unread,
        latency_budget=pruned.met,
        dropped=pruned.plan.dropped,
    )


def _of_depth(traced: Traced) -> str:
    """Which blocks were left out whole, or why none was."""
    if traced.dropped:
        gone = shortened([e.name for e in traced.dropped])
        return f"Left out whole, {len(traced.dropped)} of {len(traced.elements[0])} blocks: {gone}."
    why = without_any(traced)
    return f"No block was left out whole: {why or 'narrower layers have a smaller predicted error, or were better.'}"


def _by_depth(captured: Captured, groups: list[Group]) -> list[Group]:
    """The groups, in the order in which the forward first uses a weight that makes their channels."""
    first: dict[str, int] = {}
    for position, node in enumerate(captured.graph.graph.nodes):
        for used in node.all_input_nodes:
            kind, name = captured.sources.get(used.name, ("", ""))
            if kind == "parameter":
                first.setdefault(name, position)
    return sorted(groups, key=lambda g: min((first.get(p.param, 0) for p in g.producers), default=0))
