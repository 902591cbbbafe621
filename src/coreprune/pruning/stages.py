"""The stages that prune(), plan() and apply() are made of."""

from __future__ import annotations

import difflib
import fnmatch
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from coreprune._example import check_runs, normalise_example
from coreprune._progress import Clock, Progress
from coreprune.errors import InputError, ModelError
from coreprune.graph import Captured, CostModel, Group, capture, find_groups, kept_positions, lock, probe, remove
from coreprune.pruning.allocation.budget import Budget
from coreprune.pruning.calibration.calibration import Calibration
from coreprune.pruning.calibration.statistics import Collect, collect_readers
from coreprune.pruning.layer.read import tensors_of
from coreprune.pruning.plans.decide import Choice, decide, rank
from coreprune.pruning.plans.plan import Plan
from coreprune.pruning.plans.weights_after import pour_, weights_after
from coreprune.pruning.repair.lockstep import Refit, Repair, repaired
from coreprune.pruning.reporting.certificates import agreement, embedded, group_report
from coreprune.pruning.reporting.report import GroupReport, Report, versions
from coreprune.pruning.selectors import Selector
from coreprune.pruning.validate import check_model


def trace(
    model: nn.Module, example_inputs: Any, tell: Progress, exclude: tuple[str, ...] = ()
) -> tuple[Captured, list[Group]]:
    """Groups, with those locked that the forward does not survive, so that no budget is spent on them.

    exclude: glob patterns of names of groups that are locked too. Raises InputError for one that no group matches.
    """
    check_model(model, example_inputs)
    tell("capture", 0, 1)
    captured = capture(model, *normalise_example(example_inputs))
    # Tracing does not see all that is wrong, and then no group would survive the probe, as if the model were at fault.
    check_runs(model, captured.args, captured.kwargs)
    groups = probe(model, captured, locked_by(exclude, find_groups(captured)))
    tell("capture", 1, 1)
    return captured, groups


def locked_by(exclude: tuple[str, ...], groups: list[Group]) -> list[Group]:
    """The groups, with those locked whose names match a pattern. Raises InputError for one that matches none."""
    names = [g.name for g in groups]
    for pattern in exclude:
        if not any(fnmatch.fnmatchcase(name, pattern) for name in names):
            near = difflib.get_close_matches(pattern.replace("*", ""), names, n=5, cutoff=0.3) or names[:5]
            raise InputError(
                f"exclude={pattern!r} matches no group of channels. Groups are called by the first layer that makes "
                f"their channels, e.g. {', '.join(near)}; `list_groups` lists them all."
            )

    def pattern_of(group: Group) -> str | None:
        return next((p for p in exclude if fnmatch.fnmatchcase(group.name, p)), None)

    return [
        lock(g, f"excluded by the caller (pattern {p!r})") if g.locked_because is None and (p := pattern_of(g)) else g
        for g in groups
    ]


def cut_to(
    model: nn.Module,
    captured: Captured,
    groups: list[Group],
    budget: Budget,
    selector: Selector,
    calibration: Calibration | None,
    seed: int,
    clock: Clock,
) -> tuple[Choice, nn.Module, list[Group]]:
    """Select, allocate and cut; what the forward does not survive stays whole, and the others meet the budget."""
    readers = {}
    if calibration is not None:
        with clock("statistics"):
            generator = torch.Generator().manual_seed(seed)
            readers = collect_readers(
                calibration.captured, groups, tensors_of(model), calibration.batches, Collect(), generator, clock.tell
            )
    with clock("select"):
        ranked = rank(model, captured, groups, selector, readers, seed, clock.tell)
    while True:
        with clock("allocate"):
            choice = decide(model, captured, groups, ranked, budget, selector, seed, clock.tell)
        with clock("surgery"):
            small, put_back = cut(model, captured, groups, choice.plan)
        if not put_back:
            return choice, small, groups
        groups = [lock(g, put_back[g.name]) if g.name in put_back else g for g in groups]


def cut(model: nn.Module, captured: Captured, groups: list[Group], plan: Plan) -> tuple[nn.Module, dict[str, str]]:
    """A smaller copy with re-weighted consumers, and the groups that had to be put back, with the reason."""
    removed = remove(model, captured, groups, _keep(plan))
    done = {name: entry for name, entry in plan.groups.items() if name not in removed.locked}
    pour_(removed.model, weights_after(model, groups, done), groups, removed.kept)
    return removed.model, dict(removed.locked)


def _keep(plan: Plan) -> dict[str, Tensor]:
    return {name: torch.tensor(entry.kept, dtype=torch.int64) for name, entry in plan.groups.items()}


def _kept(plan: Plan) -> dict[str, Tensor]:
    """The channels that stay, of the groups that shrink."""
    return {name: keep for name, keep in _keep(plan).items() if len(keep) < plan.groups[name].size}


def repair_(
    small: nn.Module,
    model: nn.Module,
    groups: list[Group],
    plan: Plan,
    calibration: Calibration,
    options: Repair,
    tell: Progress,
) -> tuple[Refit, ...]:
    """Refit the pruned model in place."""
    kept = _kept(plan)
    masks = kept_positions([(g, kept[g.name]) for g in groups if g.name in kept])
    start = weights_after(model, groups, plan.groups)
    before = tensors_of(model)
    after, fits = repaired(calibration.captured, before, start, masks, calibration.batches, options, tell)
    for name, tensor in after.items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise ModelError(
                f"the repair made {name} infinite. Leave it out, or in Python use a larger ridge: Repair(ridge=0.01)."
            )
    pour_(small, after, groups, kept)
    return tuple(fits)


def make_report(
    model: nn.Module,
    small: nn.Module,
    captured: Captured,
    groups: list[Group],
    choice: Choice,
    calibration: Calibration | None,
    fits: tuple[Refit, ...],
    settings: dict[str, Any],
) -> Report:
    """What became of the model: sizes, groups with their certificates, repairs, agreement."""
    model_cost = CostModel(captured, groups)
    widths = {name: len(entry.kept) for name, entry in choice.plan.groups.items()}
    before, after = model_cost(), model_cost(widths)
    made, made_after = model_cost.making(), model_cost.making(widths)
    changed = bool(fits) or settings["distill"] is not None
    refit = embedded(model, small, groups, _kept(choice.plan)) if changed else None
    rows = tuple(
        replace(
            group_report(captured, choice, g, refit, settings["delta"])
            if g.locked_because is None
            else GroupReport(g.name, g.size, g.size, g.unit, locked_because=g.locked_because),
            macs=(made[g.name], made_after[g.name]),
        )
        for g in _by_depth(captured, groups)
    )
    return Report(
        groups=rows,
        parameters=(before.params, after.params),
        macs=(before.macs, after.macs),
        bytes=(before.bytes, after.bytes),
        settings={**settings, "versions": versions()},
        queries=calibration.queries.note if calibration else "",
        refits=fits,
        agreement=agreement(model, small, calibration.fresh, settings["delta"])
        if calibration and calibration.fresh
        else None,
        model=type(model).__name__,
    )


def _by_depth(captured: Captured, groups: list[Group]) -> list[Group]:
    """The groups in the order in which the forward first uses a weight that makes them."""
    first: dict[str, int] = {}
    for position, node in enumerate(captured.graph.graph.nodes):
        for used in node.all_input_nodes:
            kind, name = captured.sources.get(used.name, ("", ""))
            if kind == "parameter":
                first.setdefault(name, position)
    return sorted(groups, key=lambda g: min((first.get(p.param, 0) for p in g.producers), default=0))
