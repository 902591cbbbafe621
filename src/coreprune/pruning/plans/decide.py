"""Make the decisions of a plan: rank the units of every free group, allocate widths, cut the rankings."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace

import torch
from torch import Tensor

from coreprune._example import describe_example
from coreprune._progress import Progress
from coreprune.coreset import Coreset, FunctionalCoreset
from coreprune.graph import Group, Traced
from coreprune.pruning.allocation.allocate import allocate
from coreprune.pruning.allocation.budget import Budget
from coreprune.pruning.allocation.curves import widths_curve
from coreprune.pruning.allocation.spending import CostFunction
from coreprune.pruning.layer.read import read_layer
from coreprune.pruning.layer.weights import LayerWeights, Reader
from coreprune.pruning.plans.cut_ranking import choose
from coreprune.pruning.plans.error_curves import held_out, on_queries
from coreprune.pruning.plans.plan import GroupPlan, Plan, fingerprint
from coreprune.pruning.selectors import Ranking, Selector, ranking_of


@dataclass(frozen=True, eq=False)
class Decision:
    """The decision about one free group, and what it is based on.

    group, layer: its channels, and the weights around them. ranking: the selector's ranking of its units.
    curve: for every k, the error on the queries if the first k units of that order are kept; None without queries.
    held_out: (n+1,) the same on queries that the order and the refit have not seen; None with fewer than two queries.
    entry, coreset: what stays at the allocated width; None as long as no width is allocated.
    """

    group: Group
    layer: LayerWeights
    ranking: Ranking
    curve: FunctionalCoreset | None
    held_out: Tensor | None = None
    entry: GroupPlan | None = None
    coreset: Coreset | None = None


def rank(
    traced: Traced, selector: Selector, readers: Mapping[str, tuple[Reader, ...]], seed: int, tell: Progress
) -> dict[str, Decision]:
    """Rank the units of every free group. readers: by name of the group, from the queries; empty without queries."""
    generator = torch.Generator().manual_seed(seed)
    out = {}
    for i, (name, group) in enumerate(traced.free.items()):
        tell("select", i, len(traced.free))
        layer = read_layer(traced.tensors, traced.captured, group)
        layer = replace(layer, name=name, readers=readers.get(name, ()))
        ranking = ranking_of(selector, layer, generator)
        unseen = held_out(group, layer, ranking, selector, generator)
        out[name] = Decision(group, layer, ranking, on_queries(group, layer, ranking), unseen)
    return out


def decide(
    traced: Traced,
    ranked: Mapping[str, Decision],
    budget: Budget,
    cost: CostFunction | None = None,
    tell: Progress | None = None,
) -> dict[str, Decision]:
    """Allocate widths under the budget, and cut the ranking of every free group to its width. Raises BudgetError.

    ranked: from `rank`. Groups that were locked after that are left out. cost: the caller's own, if there is one.
    """
    curves = _error_by_width(traced.free, ranked)
    widths = allocate(budget, list(traced.groups), cost or traced.cost_model, curves, tell)
    decided = {}
    for name, group in traced.free.items():
        entry, coreset = choose(group, ranked[name].ranking, widths[name])
        decided[name] = _measured(replace(ranked[name], group=group, entry=entry, coreset=coreset))
    return decided


def _measured(decision: Decision) -> Decision:
    """With the curve of an order that starts with the units that stay, if they are not the first of the ranking's."""
    group, ranking, coreset = decision.group, decision.ranking, decision.coreset
    assert coreset is not None
    if decision.curve is None or ranking.rule is None or coreset.merge is not None or group.sections is not None:
        return decision
    if ranking.order[: coreset.indices.numel()].sort().values.equal(coreset.indices):
        return decision
    rest = ranking.order[~torch.isin(ranking.order, coreset.indices)]
    again = replace(ranking, order=torch.cat([coreset.indices, rest]))
    return replace(decision, curve=on_queries(group, decision.layer, again))


def plan_of(traced: Traced, decisions: Mapping[str, Decision], selector: Selector, budget: Budget, seed: int) -> Plan:
    """The decisions as a plan, which can be saved."""
    entries = {name: d.entry for name, d in decisions.items() if d.entry is not None}
    example = describe_example(traced.captured.args, traced.captured.kwargs)
    return Plan(entries, fingerprint(traced.model), selector.name, seed, asdict(budget), example)


def _error_by_width(free: Mapping[str, Group], ranked: Mapping[str, Decision]) -> dict[str, Tensor] | None:
    """The error of every free group at every width; None if there are no errors on queries for any group.

    It is the held-out error, where there is one: on a few queries, a refit of many units looks perfect.
    A group without readers (only a sum reads it) gets the median of the groups' largest errors, falling quadratically.
    """
    seen = {
        n: widths_curve(r.curve.errors if r.held_out is None else r.held_out, free[n])
        for n in free
        if (r := ranked[n]).curve is not None
    }
    if not seen:
        return None
    typical = float(torch.stack([curve[0] for curve in seen.values()]).median())
    for name, group in free.items():
        if name not in seen:
            steps = len(widths_curve(torch.zeros(group.size // group.unit + 1), group))
            seen[name] = typical * torch.linspace(1, 0, steps, dtype=torch.float64) ** 2
    return seen
