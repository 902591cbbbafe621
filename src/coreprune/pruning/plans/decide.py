"""From what is known of a model to a plan: rank every free group, allocate widths, cut the rankings."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from coreprune._example import describe_example
from coreprune.coreset import Coreset, FunctionalCoreset, in_order
from coreprune.graph import Captured, CostModel, Group
from coreprune.pruning.allocation.allocate import allocate, balanced, widths_curve
from coreprune.pruning.allocation.budget import Budget
from coreprune.pruning.layer.read import read_layer, tensors_of
from coreprune.pruning.layer.weights import LayerWeights, Reader
from coreprune.pruning.plans.cut_ranking import choose
from coreprune.pruning.plans.plan import GroupPlan, Plan, fingerprint
from coreprune.pruning.selectors import Ranking, Selector
from coreprune.pruning.selectors.functional import moments_of

CURVE_RIDGE = 1e-3  # that of the repair, so that the curves are about what the repair can reach


@dataclass(frozen=True)
class Ranked:
    """One free group, ranked. curve: the error of its order on the queries, by units, or None without queries."""

    group: Group
    layer: LayerWeights
    ranking: Ranking
    curve: FunctionalCoreset | None


@dataclass(frozen=True)
class Choice:
    """A plan, and what led to it."""

    plan: Plan
    ranked: Mapping[str, Ranked]
    coresets: Mapping[str, Coreset]

    @property
    def rankings(self) -> dict[str, Ranking]:
        """By name of the group."""
        return {name: r.ranking for name, r in self.ranked.items()}


def rank(
    model: nn.Module,
    captured: Captured,
    groups: list[Group],
    selector: Selector,
    readers: Mapping[str, tuple[Reader, ...]],
    seed: int,
    tell: Callable[[str, int, int], None],
) -> dict[str, Ranked]:
    """Rank the units of every free group."""
    free = [g for g in groups if g.locked_because is None]
    tensors = tensors_of(model)
    generator = torch.Generator().manual_seed(seed)
    out = {}
    for i, group in enumerate(free):
        tell("select", i, len(free))
        layer = replace(read_layer(tensors, captured, group), readers=readers.get(group.name, ()))
        ranking = selector(layer, generator)
        curve = None
        if layer.readers:
            order = balanced(ranking.order, group)
            curve = in_order(moments_of(layer.readers), group.size // group.unit, order, ridge=CURVE_RIDGE)
        out[group.name] = Ranked(group, layer, ranking, curve)
    return out


def decide(
    model: nn.Module,
    captured: Captured,
    groups: list[Group],
    ranked: Mapping[str, Ranked],
    budget: Budget,
    selector: Selector,
    seed: int,
    tell: Callable[[str, int, int], None],
) -> Choice:
    """Allocate widths under the budget and cut every ranking to its width.

    groups: all of them, with those locked that turned out not to be free. Raises BudgetError.
    """
    free = {g.name: g for g in groups if g.locked_because is None}
    widths = allocate(budget, groups, CostModel(captured, groups), _curves(free, ranked), tell)
    plans: dict[str, GroupPlan] = {}
    coresets: dict[str, Coreset] = {}
    for name, group in free.items():
        plans[name], coresets[name] = choose(group, ranked[name].ranking, widths[name])
    example = describe_example(captured.args, captured.kwargs)
    made = Plan(plans, fingerprint(model), selector.name, seed, asdict(budget), example)
    return Choice(made, {name: ranked[name] for name in free}, coresets)


def _curves(free: Mapping[str, Group], ranked: Mapping[str, Ranked]) -> dict[str, Tensor] | None:
    """Error by width of every free group; None where no group has been seen on queries.

    A group that no linear map reads (q·k) is given the median group's error and a quadratic rise.
    """
    seen = {n: widths_curve(r.curve.errors, free[n]) for n in free if (r := ranked[n]).curve is not None}
    if not seen:
        return None
    typical = float(torch.stack([curve[0] for curve in seen.values()]).median())
    for name, group in free.items():
        if name not in seen:
            steps = len(widths_curve(torch.zeros(group.size // group.unit + 1), group))
            seen[name] = typical * torch.linspace(1, 0, steps, dtype=torch.float64) ** 2
    return seen


def options_of(selector: Selector) -> dict[str, Any]:
    """The plain options of a selector, for the report."""
    return {k: v for k, v in vars(selector).items() if isinstance(v, (int, float, str, bool, type(None)))}
