"""Other cuts under the same budget, with which the result is compared, and all decisions of a run for its state."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from torch import Tensor

from coreprune._progress import Clock
from coreprune.errors import BudgetError
from coreprune.graph import Group, Traced
from coreprune.pruning.allocation.budget import Budget
from coreprune.pruning.allocation.spending import CostFunction
from coreprune.pruning.plans.decide import decide
from coreprune.pruning.plans.decision import Decision, packed_all, unpacked_all
from coreprune.pruning.plans.plan import Plan
from coreprune.pruning.unfinished import Packed


def other_cuts(traced: Traced, plan: Plan, budget: Budget) -> list[tuple[str, Budget, dict[str, str]]]:
    """Their names, their budgets, and the groups that stay whole in them. `keep` says itself what stays."""
    cuts = [("the cut with the widest groups whole", budget, _widest(traced, plan))] if budget.kind != "keep" else []
    if budget.kind not in ("keep", "error"):
        cuts.append(("the cut spread evenly", replace(budget, uniform=True), {}))
    return cuts


def _widest(traced: Traced, plan: Plan) -> dict[str, str]:
    """The groups that are the widest of the model, and were cut."""
    free = [g for g in traced.free.values() if len(plan.groups[g.name].kept) < g.size]
    most = max((g.size for g in traced.groups), default=0)
    return {g.name: "one of the widest groups, which the safety net left whole" for g in free if 2 * g.size > most}


def other_decisions(
    traced: Traced, ranked: Mapping[str, Decision], cost: CostFunction | None, budget: Budget, clock: Clock
) -> dict[str, Decision] | None:
    """Rankings cut to a budget; None if the budget cannot be met so."""
    try:
        with clock("allocate"):
            return decide(traced, ranked, budget, cost, clock.tell)
    except BudgetError:
        return None


@dataclass(frozen=True, eq=False)
class Decided:
    """All that a run has decided before the repair.

    locked: groups that had to stay whole after all, with the reasons. decisions: by name of the group. others: those of
    other cuts, by their names; None where the budget cannot be met.
    """

    locked: Mapping[str, str]
    decisions: Mapping[str, Decision]
    others: Mapping[str, Mapping[str, Decision] | None]


def packed_decided(found: Decided) -> Packed | None:
    """For the disk; None where a decision needs moments."""
    sets = {"": found.decisions, **{name: d for name, d in found.others.items() if d is not None}}
    parts = {name: packed_all(decisions) for name, decisions in sets.items()}
    tensors: dict[str, Tensor] = {}
    about = {}
    for i, (name, part) in enumerate(parts.items()):
        if part is None:
            return None
        about[name] = dict(part[0])
        tensors |= {f"{i} {key}": value for key, value in part[1].items()}
    impossible = [name for name, decisions in found.others.items() if decisions is None]
    return {"locked": dict(found.locked), "sets": about, "impossible": impossible}, tensors


def unpacked_decided(groups: Mapping[str, Group], about: Mapping, tensors: Mapping[str, Tensor]) -> Decided:
    """The inverse of `packed_decided`."""
    sets = {}
    for i, (name, mine) in enumerate(about["sets"].items()):
        own = {key.partition(" ")[2]: value for key, value in tensors.items() if key.startswith(f"{i} ")}
        sets[name] = unpacked_all(groups, mine, own)
    others = {**{name: d for name, d in sets.items() if name}, **dict.fromkeys(about["impossible"])}
    return Decided(about["locked"], sets[""], others)
