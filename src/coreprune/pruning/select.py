"""From rankings and a budget to the channels of one group that stay."""

from __future__ import annotations

import torch
from torch import Tensor

from coreprune.coreset import Coreset
from coreprune.errors import BudgetError
from coreprune.graph import Group
from coreprune.pruning.budget import Budget
from coreprune.pruning.plan import GroupPlan
from coreprune.pruning.selectors import Ranking


def choose(group: Group, ranking: Ranking, budget: Budget) -> tuple[GroupPlan, Coreset]:
    """Cut a ranking of a group's units to the width that the budget gives it.

    Returns the plan of the group and the coreset of units behind it. Raises BudgetError where min_width exceeds the
    group.
    """
    units = group.size // group.unit
    if group.blocks is None:
        coreset = ranking.coreset(budget.width(units, group.name, group.unit))
    else:
        coreset = _balanced(group, ranking, budget)
    channels = group.units()[coreset.indices.cpu()].reshape(-1)
    order = channels.argsort()

    def spread(factors: Tensor | None) -> tuple[float, ...] | None:
        if factors is None or bool((factors == 1).all()):
            return None
        return tuple(factors.cpu().repeat_interleave(group.unit)[order].tolist())

    plan = GroupPlan(
        group.size, tuple(channels[order].tolist()), spread(coreset.weights), spread(coreset.negative_weights)
    )
    return plan, coreset


def _balanced(group: Group, ranking: Ranking, budget: Budget) -> Coreset:
    """The first units of every block, by the ranking's order; kept weights, because T6 has no form for blocks."""
    assert group.blocks is not None
    blocks = group.blocks.cpu()
    sizes = torch.bincount(blocks)
    width = budget.width(int(sizes[0]), group.name, group.unit)
    if int(sizes.min()) != int(sizes.max()):
        raise BudgetError(f"{group.name}: its blocks have different sizes {sizes.tolist()}, so no equal share exists.")
    order = ranking.order.cpu()
    kept = [order[blocks[order] == b][:width] for b in range(len(sizes))]
    indices = torch.cat(kept).sort().values
    return Coreset(indices, torch.ones(indices.numel(), dtype=torch.float64))
