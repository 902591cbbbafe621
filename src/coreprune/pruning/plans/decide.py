"""Make the decisions of a plan: rank the units of every free group, allocate widths, cut the rankings."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from itertools import chain, islice

import torch
from torch import Tensor

from coreprune import _ranks
from coreprune._example import describe_example
from coreprune._progress import Progress
from coreprune.coreset import Coreset
from coreprune.errors import RankError
from coreprune.graph import Group, Traced
from coreprune.pruning.allocation.allocate import allocate
from coreprune.pruning.allocation.budget import Budget
from coreprune.pruning.allocation.curves import widths_curve
from coreprune.pruning.allocation.spending import CostFunction
from coreprune.pruning.calibration.statistics import Read, owners
from coreprune.pruning.layer.read import read_layer
from coreprune.pruning.layer.weights import LayerWeights, Reader
from coreprune.pruning.plans.cut_ranking import choose
from coreprune.pruning.plans.decision import Decision, packed, unpacked
from coreprune.pruning.plans.error_curves import held_out, on_queries
from coreprune.pruning.plans.plan import Plan, fingerprint
from coreprune.pruning.selectors import Ranking, Selector, ranking_of
from coreprune.pruning.unfinished import Unfinished


@dataclass(frozen=True)
class _Elsewhere:
    """Stands for the rule of a ranking that another process has made, and that stays there."""

    owner: int

    def __call__(self, k: int) -> Coreset:
        """Raise RankError."""
        raise RankError(f"process {self.owner} has made this ranking, so it cannot be cut to {k} units here.")


def rank(
    traced: Traced,
    selector: Selector,
    readers: Iterable[Read],
    seed: int,
    tell: Progress,
    state: Unfinished | None = None,
) -> dict[str, Decision]:
    """Rank the units of every free group.

    readers: names of groups and what reads them, from the queries, one after the other; empty without queries. If a
    group comes twice, the second time counts. Of several processes, each ranks the groups that are its own (`owners`),
    some at a time, so that none waits for another one's group. At the end they tell each other. state: keeps the
    decision of every group as it is made, in a single process.
    """
    state = state if state and _ranks.world() == 1 else Unfinished()  # which of several has a group may change
    generator = torch.Generator().manual_seed(seed)
    # Who needs no queries draws in the order of the groups, whatever the order in which the readers come.
    early = {} if selector.reads else {n: ranking_of(selector, _layer(traced, n), generator) for n in traced.free}
    out: dict[str, Decision | None] = {}
    others = ((name, ()) for name in traced.free if name not in out)
    owner = owners(traced.free)
    for name, found in chain(_some_at_a_time(iter(readers)), others):
        tell("select", len(out), len(traced.free))
        if found is None or owner[name] != _ranks.rank():
            out[name] = None
            continue
        group, first = traced.free[name], early.get(name)
        one, after = state.once(
            "group",
            lambda name=name, found=found, first=first: (
                _ranked(traced, selector, name, found, first, generator),
                generator.get_state(),
            ),
            lambda made: packed(*made),
            lambda about, tensors, group=group: unpacked(group, about, tensors),
        )
        out[name] = replace(one, owner=owner[name])
        generator.set_state(after)
    tell("select", len(out), len(traced.free))
    return _shared({name: out[name] for name in traced.free}, traced.free)


def _some_at_a_time(readers: Iterator[Read]) -> Iterator[Read]:
    """The same. With several processes, the walk over the queries, for which all of them meet, goes ahead until each
    has about two groups to rank."""
    if _ranks.world() == 1:
        yield from readers
        return
    while waiting := list(islice(readers, 2 * _ranks.world())):
        while waiting:
            yield waiting.pop(0)


def _shared(mine: Mapping[str, Decision | None], free: Mapping[str, Group]) -> dict[str, Decision]:
    """The decisions of all processes. Those of others come without what only the owner needs."""
    told = {}
    for name, one in mine.items():
        if one is not None:
            rule = one.ranking.rule and _Elsewhere(one.owner)
            ranking = replace(one.ranking, rule=rule)
            told[name] = (ranking, one.curve, one.held_out, one.estimated, (), one.owner)
    everyone = {name: parts for each in _ranks.gathered("the rankings", told) for name, parts in each.items()}
    return {name: one or Decision(free[name], *everyone[name]) for name, one in mine.items()}


def _ranked(
    traced: Traced,
    selector: Selector,
    name: str,
    found: tuple[Reader, ...],
    ranking: Ranking | None,
    generator: torch.Generator,
) -> Decision:
    group, layer = traced.free[name], _layer(traced, name, found)
    if ranking is None:
        ranking = ranking_of(selector, layer, generator)
    unseen = held_out(group, layer, ranking, selector, generator)
    again = ranking.rule is not None or any(reader.partner for reader in found)
    return Decision(
        group,
        ranking,
        on_queries(group, found, ranking),
        unseen,
        any(reader.patches is not None for reader in found),
        found if again else (),
    )


def _layer(traced: Traced, name: str, readers: tuple[Reader, ...] = ()) -> LayerWeights:
    layer = read_layer(traced.tensors, traced.captured, traced.free[name])
    return replace(layer, name=name, readers=readers)


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
    widths = widths_within(traced, ranked, budget, cost, tell)
    told = {}
    for name, group in traced.free.items():
        if ranked[name].owner == _ranks.rank():
            entry, coreset = choose(group, ranked[name].ranking, widths[name])
            one = _measured(replace(ranked[name], group=group, entry=entry, coreset=coreset))
            told[name] = {"entry": entry, "coreset": coreset, "curve": one.curve}
    everyone = {name: parts for each in _ranks.gathered("the cuts", told) for name, parts in each.items()}
    return {name: replace(ranked[name], group=group, **everyone[name]) for name, group in traced.free.items()}


def widths_within(
    traced: Traced,
    ranked: Mapping[str, Decision],
    budget: Budget,
    cost: CostFunction | None = None,
    tell: Progress | None = None,
) -> dict[str, int]:
    """The widths that `decide` cuts to: by name of a free group, units that stay in each of its sections."""
    curves = _error_by_width(traced.free, ranked)
    budget = _of_the_whole(budget, traced)
    # The caller's cost may be measured, so that it differs from process to process.
    return _ranks.from_first(
        "the widths", lambda: allocate(budget, list(traced.groups), cost or traced.cost_model, curves, tell)
    )


def error_of(traced: Traced, ranked: Mapping[str, Decision], budget: Budget) -> float:
    """The sum of the errors on queries at the widths that the budget gives. Raises BudgetError."""
    curves = _error_by_width(traced.free, ranked) or {}
    widths = widths_within(traced, ranked, budget)
    return sum(float(curves[name][width]) for name, width in widths.items() if name in curves)


def _of_the_whole(budget: Budget, traced: Traced) -> Budget:
    """The budget as a number, if elements are to leave: its share is one of the model with all of them."""
    return budget if traced.whole is None else budget.in_numbers(asdict(traced.whole.cost_model()))


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
    return replace(decision, curve=on_queries(group, decision.readers, again))


def plan_of(traced: Traced, decisions: Mapping[str, Decision], selector: Selector, budget: Budget, seed: int) -> Plan:
    """The decisions as a plan, which can be saved."""
    entries = {name: d.entry for name, d in decisions.items() if d.entry is not None}
    example = describe_example(traced.captured.args, traced.captured.kwargs)
    dropped = tuple(element.name for element in traced.dropped)
    rotated = any("rotated" in group.flags for group in traced.groups)
    made_by = (fingerprint(traced.model), selector.name, seed, asdict(budget))
    return Plan(entries, *made_by, example, dropped=dropped, rotated=rotated)


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
