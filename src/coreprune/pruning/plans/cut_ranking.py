"""Choose the channels of one group that stay, from its ranking and its width."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from coreprune.coreset import Coreset
from coreprune.graph import Group
from coreprune.pruning.plans.plan import GroupPlan
from coreprune.pruning.selectors import Ranking


def choose(group: Group, ranking: Ranking, width: int) -> tuple[GroupPlan, Coreset]:
    """Cut a ranking of a group's units to `width` units, or to `width` units per section if the group has sections.

    Returns the plan of the group, and the coreset of units that it comes from.
    """
    coreset = ranking.coreset(width) if group.sections is None else _balanced(group.sections, ranking, width)
    channels = group.units()[coreset.indices.cpu()].reshape(-1)
    order = channels.argsort()
    # The norms behind a rotated stream divide by the mean over fewer channels, which hold nearly all of its power.
    level = math.sqrt(group.size / len(channels)) if "rotated" in group.flags else 1.0

    def spread(factors: Tensor | None) -> tuple[float, ...] | None:
        factors = None if factors is None else factors * level
        if factors is None or bool((factors == 1).all()):
            return None
        return tuple(factors.cpu().repeat_interleave(group.unit)[order].tolist())

    plan = GroupPlan(
        group.size,
        tuple(channels[order].tolist()),
        spread(coreset.weights),
        spread(coreset.negative_weights),
        **_merged(group, coreset),
    )
    return plan, coreset


def _merged(group: Group, coreset: Coreset) -> dict[str, Any]:
    """The fields of a plan that say where removed channels go: channel c of a unit goes into channel c of the other."""
    merge = coreset.merge
    if merge is None:
        return {}
    target, unit = merge.target.cpu(), group.unit
    channel = torch.arange(group.size) % unit
    targets = torch.where(target >= 0, target * unit, -1).repeat_interleave(unit)
    scales = None if bool((merge.scale == 1).all()) else tuple(merge.scale.cpu().repeat_interleave(unit).tolist())
    gains = {name: tuple(v.cpu().repeat_interleave(unit).tolist()) for name, v in merge.gains.items()}
    return {
        "targets": tuple(torch.where(targets >= 0, targets + channel, -1).tolist()),
        "scales": scales,
        "mean": merge.mean,
        "gains": gains or None,
    }


def _balanced(sections: Tensor, ranking: Ranking, width: int) -> Coreset:
    """The first units of every section, by the ranking's order. Weights stay, because T6 has no form for sections."""
    order, sections = ranking.order.cpu(), sections.cpu()
    kept = [order[sections[order] == b][:width] for b in range(int(sections.max()) + 1)]
    indices = torch.cat(kept).sort().values
    return Coreset(indices, torch.ones(indices.numel(), dtype=torch.float64))
