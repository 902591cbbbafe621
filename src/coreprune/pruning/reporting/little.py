"""In words, that a budget of channels removed almost nothing, and why."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence

from coreprune.pruning.allocation.budget import Budget
from coreprune.pruning.reporting.report import GroupReport

_LITTLE = 0.2  # of the MACs in free groups, or of the share that was asked for
_MOST = 5  # reasons that are named
_NODE = re.compile(r" \([\w#.]+\)$")  # the place in the graph, which differs from group to group


def little(budget: Budget, groups: Sequence[GroupReport], macs: tuple[int, int], free: float) -> str:
    """What to tell a caller who asked for a share of the channels and lost almost no MACs; empty if that is not so.

    Budgets of another kind are met exactly, or refused.

    groups: with their MACs before and after. macs: of the model, before and after. free: the share of the MACs that the
        free groups can save at most.
    """
    if budget.keep is None or not macs[0]:
        return ""
    by_pattern = isinstance(budget.keep, Mapping)
    asked = 1 - min(budget.keep.values() if isinstance(budget.keep, Mapping) else [budget.keep])
    saved = 1 - macs[1] / macs[0]
    few = free < _LITTLE
    if asked <= 0 or (saved > 0 and (by_pattern or not (few or saved < _LITTLE * asked))):
        return ""
    share = f"{free:.1%} of them are in groups that can shrink"
    text = f"{1 - saved:.1%} of the MACs are left, {'because only' if few else 'although'} {share}"
    held = _held(groups, macs[0])
    return f"{text}. What stays whole, by its share of the MACs: {held}." if held else f"{text}."


def _held(groups: Sequence[GroupReport], macs: int) -> str:
    """Why groups stayed whole, with the share of the MACs that make their channels; the largest share comes first."""
    members: dict[str, list[GroupReport]] = defaultdict(list)
    for g in groups:
        if g.kept == g.channels and g.macs is not None and g.macs[0]:
            kept = f"the budget keeps all of its {g.channels // g.unit} units of {g.unit} channels"
            members[_NODE.sub("", g.locked_because) if g.locked_because else kept].append(g)
    cost = {reason: sum(g.macs[0] for g in found if g.macs) for reason, found in members.items()}
    parts = []
    for reason in sorted(cost, key=lambda r: -cost[r])[:_MOST]:
        more = f" and {len(members[reason]) - 1} more" if len(members[reason]) > 1 else ""
        parts.append(f"{cost[reason] / macs:.1%}, {reason} ({members[reason][0].name}{more})")
    return "; ".join(parts)
