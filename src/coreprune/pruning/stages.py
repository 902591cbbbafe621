"""The stages of prune(), make_plan() and apply_plan()."""

from __future__ import annotations

import fnmatch
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from coreprune._example import check_runs, normalise_example
from coreprune._patterns import no_match, shortened
from coreprune._plain import computed, plain
from coreprune._progress import Clock, Progress
from coreprune.errors import InputError, ModelError, first_line
from coreprune.graph import Captured, Group, Removed, Traced, capture, find_groups, probe, remove
from coreprune.graph.check import IN_TRAINING
from coreprune.pruning.calibration.calibration import Calibration
from coreprune.pruning.calibration.sites import Collect
from coreprune.pruning.calibration.statistics import Read, collect_readers
from coreprune.pruning.plans.decide import Decision, decide, plan_of, rank
from coreprune.pruning.plans.plan import Plan
from coreprune.pruning.plans.weights_after import pour_, weights_after
from coreprune.pruning.repair.descent import Descended, descend
from coreprune.pruning.repair.lockstep import Cut, Refit, Repair, repaired
from coreprune.pruning.repair.products import Mix, mix_of, mixed_start
from coreprune.pruning.repair.twins import Descent, affordable, twins
from coreprune.pruning.reporting.certificates import agreement, embedded, group_report, no_draws
from coreprune.pruning.reporting.little import little
from coreprune.pruning.reporting.report import Compared, GroupReport, Report, versions
from coreprune.pruning.settings import Settings
from coreprune.pruning.validate import REAL, Exclude, check_model, counterparts

log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Pruned:
    """A model after surgery, and what led to it.

    traced: the original. Groups that could not shrink after all are locked in it. plan: the plan that was carried out.
    removed: the smaller model, and which positions stayed. start: the tensors of the smaller model in the original's
    shapes, before any repair. decisions: by name of the group; empty if the plan was made earlier. fits: the repair.
    """

    traced: Traced
    plan: Plan
    removed: Removed
    start: Mapping[str, Tensor]
    decisions: Mapping[str, Decision] = field(default_factory=dict)
    fits: tuple[Refit, ...] = ()
    descended: tuple[Descended, ...] = ()


def trace(
    model: nn.Module,
    example_inputs: Any,
    tell: Progress,
    exclude: Exclude = (),
    also: Sequence[Any] = (),
    batch_axis: Any = "auto",
    norm_statistics: bool = False,
) -> Traced:
    """Trace a model and find its groups.

    Weights that the model computes, and that could shrink, are plain parameters in `Traced.model`. Groups whose pruning
    would make the forward fail are locked, so that the allocation does not count on them. If it would fail in training
    mode, that mode is traced, too. A warning names parameters that nothing reads.

    exclude: names of groups, patterns of names, or modules of the model; these groups are locked too.
    also: further examples, which make other parts of the model run. batch_axis, norm_statistics: as for `prune`.

    Raises InputError if no group belongs to an item of `exclude`.
    """
    tell("capture", 0, 1)
    examples = (example_inputs, *also)
    for example in examples:
        check_model(model, example)
    found = _found(model, examples, batch_axis, norm_statistics)
    exclude = counterparts(exclude, model, found.model)
    traced = _probed(found, exclude)
    if any((group.locked_because or "").startswith(IN_TRAINING) for group in traced.groups):
        training = _in_training(found.model, found.captured)
        if training is not None:
            captured = replace(found.captured, more=(*found.captured.more, training))
            traced = _probed(replace(found, captured=captured, groups=find_groups(captured, norm_statistics)), exclude)
    widths = {group.size for group in traced.free.values()}
    suspects = [n for n in traced.captured.unread if widths & set(traced.tensors[n].shape)]
    if suspects:
        log.warning(
            "nothing reads %s when the model runs on the example. Inputs that use it, such as larger ones, may fail "
            "in the pruned model. Pass examples of them: also=[...].",
            shortened(suspects),
        )
    tell("capture", 1, 1)
    return traced


def _found(model: nn.Module, examples: Sequence[Any], batch_axis: Any, norm_statistics: bool) -> Traced:
    """The groups of a model, or of its copy with plain weights, before a cut was tried."""
    weights = computed(model)
    found = _grouped(model, weights, examples, batch_axis, norm_statistics)
    if weights:
        free = {s.param for g in found.free.values() for s in g.slices}
        if any(name not in free for name in weights):  # these may stay as they are
            left = tuple(name for name in weights if name in free)
            found = _grouped(model, left, examples, batch_axis, norm_statistics)
    return found


def _grouped(
    model: nn.Module, weights: tuple[str, ...], examples: Sequence[Any], batch_axis: Any, norm_statistics: bool
) -> Traced:
    model = plain(model, weights)
    first, *others = (_captured(model, example, batch_axis) for example in examples)
    captured = replace(first, more=tuple(others))
    return Traced(model, captured, find_groups(captured, norm_statistics), plain=weights)


def _captured(model: nn.Module, example_inputs: Any, batch_axis: Any) -> Captured:
    captured = capture(model, *normalise_example(example_inputs), batch_axis=batch_axis)
    # Tracing misses some errors. Without this check they would make every group fail the probe, as if no group of the
    # model could shrink.
    check_runs(model, captured.args, captured.kwargs)
    return captured


def _in_training(model: nn.Module, captured: Captured) -> Captured | None:
    """The model traced in training mode, or None. Batch norms may need two samples for it."""
    for size in (1, 2):
        args, kwargs = captured.axes.repeated((captured.args, captured.kwargs), size)
        try:
            return capture(model, args, kwargs, size, training=True, batch_axis=captured.axes)
        except ModelError as error:
            log.info("training mode cannot be traced with a batch of %d: %s", size, error)
    return None


def _probed(found: Traced, exclude: Exclude) -> Traced:
    return probe(found.locking(odd_weights(found) | excluded(found, exclude)))


def odd_weights(traced: Traced) -> dict[str, str]:
    """The free groups with weights that are no finite real numbers: name -> the reason."""
    reasons: dict[str, str] = {}
    for name, group in traced.free.items():
        for param in dict.fromkeys(s.param for s in group.slices):
            tensor = traced.tensors[param]
            if param in traced.captured.parameters and tensor.dtype not in REAL:
                reasons.setdefault(name, f"{param} has dtype {tensor.dtype}")
            elif tensor.dtype in REAL and not bool(torch.isfinite(tensor).all()):
                reasons.setdefault(name, f"{param} has a NaN or infinite entry")
    return reasons


def excluded(traced: Traced, exclude: Exclude) -> dict[str, str]:
    """The free groups that the caller excludes: name -> the reason. Raises InputError."""
    reasons: dict[str, str] = {}
    for item in exclude:
        if isinstance(item, nn.Module):
            found, why = _made_by(item, traced)
        else:
            found = [g for g in traced.groups if fnmatch.fnmatchcase(g.name, item)]
            why = f"excluded by the caller (pattern {item!r})"
            if not found:
                raise InputError(no_match(f"exclude={item!r}", item, [g.name for g in traced.groups]))
        for group in found:
            if group.locked_because is None:
                reasons.setdefault(group.name, why)
    return reasons


def exclude_names(traced: Traced, exclude: Exclude) -> tuple[str, ...]:
    """The same exclusions, with every module replaced by the names of the groups that it makes."""
    named: list[str] = []
    for item in exclude:
        named += [item] if isinstance(item, str) else [g.name for g in _made_by(item, traced)[0]]
    return tuple(dict.fromkeys(named))


def _made_by(module: nn.Module, traced: Traced) -> tuple[list[Group], str]:
    """The groups that have a channel made by a layer inside `module`, and the reason for excluding them."""
    paths = [path for path, m in traced.model.named_modules(remove_duplicate=False) if m is module]
    kind = type(module).__name__
    if not paths:
        raise InputError(
            f"exclude: a {kind} is given that is not a module of this model. Pass one of its modules, "
            "e.g. exclude=(model.head,), or the names of groups."
        )
    inside = tuple(f"{path}." if path else "" for path in paths)
    found = [g for g in traced.groups if any(p.param.startswith(inside) for p in g.producers)]
    if not found:
        raise InputError(
            f"exclude: no layer inside {paths[0]!r} ({kind}) makes channels, so there is nothing to exclude."
        )
    place = f"module {paths[0]!r}" if paths[0] else "the whole model"
    return found, f"excluded by the caller ({place})"


def prune_to(traced: Traced, settings: Settings, calibration: Calibration | None, clock: Clock) -> Pruned:
    """Select, allocate and cut.

    If the model does not run without some channels of a group, that group stays whole, and the others meet the budget.
    """
    readers: Iterator[Read] = iter(())
    if calibration is not None:
        generator = torch.Generator().manual_seed(settings.seed)
        readers = collect_readers(traced, calibration, Collect(), generator, clock.tell)
    with clock("select"):
        ranked = rank(traced, settings.method, clock.each("statistics", readers), settings.seed, clock.tell)
    while True:
        with clock("allocate"):
            decisions = decide(traced, ranked, settings.budget, settings.cost, clock.tell)
            plan = plan_of(traced, decisions, settings.method, settings.budget, settings.seed)
        with clock("surgery"):
            pruned = carry_out(traced, plan)
        if not pruned.removed.locked:
            return replace(pruned, decisions=decisions)
        traced = traced.locking(pruned.removed.locked)


def carry_out(traced: Traced, plan: Plan) -> Pruned:
    """A smaller copy with re-weighted consumers. `removed.locked` names the groups that had to stay whole after all."""
    keep = {name: torch.tensor(entry.kept, dtype=torch.int64) for name, entry in plan.groups.items()}
    removed = remove(traced, keep)
    start = weights_after(traced, {n: entry for n, entry in plan.groups.items() if n not in removed.locked})
    pour_(removed.model, start, removed.masks)
    return Pruned(traced, plan, removed, start)


def repair_(pruned: Pruned, calibration: Calibration, options: Repair, tell: Progress) -> tuple[Refit, ...]:
    """Refit the pruned model in place."""
    masks, mixes = pruned.removed.masks, _mixes(pruned, calibration)
    start = mixed_start(pruned.start, mixes, calibration.operators)
    after, fits = repaired(Cut(pruned.traced.tensors, start, masks, mixes), calibration, options, tell)
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
    found: dict[str, Mix] = {}
    for decision in pruned.decisions.values():
        if decision.coreset is not None and decision.coreset.merge is None:
            kept = decision.coreset.indices.cpu()
            found |= mix_of(decision.group, decision.readers, kept, calibration.operators)
    return found


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
    generator = torch.Generator().manual_seed(seed)
    try:
        both = twins(pruned.traced, pruned.removed, calibration.queries, chosen, generator)
        if isinstance(both, str):
            log.info("no block descent: %s", both)
            return ()
        changed, done = descend(both, chosen, generator, tell)
    except Exception as error:
        if options.descent is not None:
            raise ModelError(
                f"the block descent fails: {first_line(error)}. Leave it out: Repair(descent=False)."
            ) from error
        log.warning("no block descent: %s", first_line(error))  # nobody asked for it
        return ()
    mine = dict([*pruned.removed.model.named_parameters(), *pruned.removed.model.named_buffers()])
    with torch.no_grad():
        for name, tensor in changed.items():
            mine[name].copy_(tensor)
    return tuple(done)


def make_report(
    pruned: Pruned, settings: Settings, calibration: Calibration | None, compared: Sequence[Compared] = ()
) -> Report:
    """The report: sizes, groups with their certificates, repairs, comparison, agreement."""
    traced, small = pruned.traced, pruned.removed.model
    costs = traced.cost_model
    widths = {name: len(entry.kept) for name, entry in pruned.plan.groups.items()}
    before, after = costs(), costs(widths)
    made, made_after = costs.making(), costs.making(widths)
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
    if entered := [g.name for g in rows if g.kept < g.channels and "norm-statistics" in flags[g.name]]:
        notes.append(
            "Channels left that enter the statistics of a norm, whose mean and variance are now taken over fewer "
            f"channels; the check after surgery ran the model and could not compare it: {shortened(entered)}."
        )
    fresh = calibration.fresh if calibration else None
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
        agreement=agreement(traced.model, small, fresh, settings.delta, max(1, len(compared))) if fresh else None,
        model=type(traced.model).__name__,
        notes=tuple(notes),
        versions=versions(),
        unread=traced.captured.unread,
    )


def _by_depth(captured: Captured, groups: list[Group]) -> list[Group]:
    """The groups, in the order in which the forward first uses a weight that makes their channels."""
    first: dict[str, int] = {}
    for position, node in enumerate(captured.graph.graph.nodes):
        for used in node.all_input_nodes:
            kind, name = captured.sources.get(used.name, ("", ""))
            if kind == "parameter":
                first.setdefault(name, position)
    return sorted(groups, key=lambda g: min((first.get(p.param, 0) for p in g.producers), default=0))
