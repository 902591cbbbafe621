"""Choose the width of every group under a budget."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Mapping

from torch import Tensor

from coreprune._progress import Progress
from coreprune.errors import BudgetError
from coreprune.graph import Group
from coreprune.pruning.allocation.budget import Budget
from coreprune.pruning.allocation.curves import hull
from coreprune.pruning.allocation.keeps import kept_widths
from coreprune.pruning.allocation.ladders import Ladder, ladder_of, sections_of
from coreprune.pruning.allocation.spending import CostFunction, Spending, spending_of

Class = tuple[str, ...]  # names of groups that change their widths together
Rungs = dict[str, int]  # by name of a free group, a position on its ladder


def allocate(
    budget: Budget,
    groups: list[Group],
    cost_model: CostFunction,
    curves: Mapping[str, Tensor] | None = None,
    tell: Progress | None = None,
) -> dict[str, int]:
    """The width of every free group: units that stay in each of its sections, or in the whole group if it has none.

    groups: all of them, the locked ones included. cost_model: what widths cost: a `CostModel`, or your own function if
    the budget limits that. curves: by name of a free group, the error at every width, (units per section + 1,), from
    `widths_curve`. Without them, or with `budget.uniform`, all groups give up about the same share.

    The limit is never exceeded; widening any group by one step would exceed it. Raises BudgetError for a budget that
    cannot be met, and says what can.
    """
    if budget.keep is not None:
        return kept_widths(budget, groups)
    if budget.error is not None and curves is None:
        raise BudgetError(
            "an error budget goes by what the queries show, and there are none. Pass queries, or limit macs instead."
        )
    free = [g for g in groups if g.locked_because is None]
    ladders = {g.name: ladder_of(budget, g) for g in free}
    spending = spending_of(budget, groups, cost_model, ladders)
    if curves is None or budget.uniform:
        rungs = _equal_shares(spending, _alike(free) if budget.uniform else _single(ladders))
    else:
        rungs = _by_error(spending, {name: curves[name] for name in ladders}, budget.error, tell)
    return {name: ladders[name][rung] for name, rung in rungs.items()}


def _equal_shares(spending: Spending, classes: list[Class]) -> Rungs:
    """The largest common share of all widths that fits. What is left over goes to the narrowest groups."""
    ladders, low, high = spending.ladders, 0.0, 1.0
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if spending.fits(_rungs(ladders, middle)) else (low, middle)
    whole = _rungs(ladders, 1.0)
    rungs = whole if spending.fits(whole) else _rungs(ladders, low)
    return _filled(rungs, spending, classes, lambda name, rung: ladders[name][rung] / ladders[name][-1])


def _by_error(
    spending: Spending,
    curves: Mapping[str, Tensor],
    most: float | None,
    tell: Progress | None,
) -> Rungs:
    """Start at full width, and always take the step that adds the least error per unit of cost, until the limit holds.

    The price of a step is taken from the lower convex hull of the curve, so that an expensive step does not hide a
    cheap one behind it. most: if given, go on as long as the sum of the errors is at most this.
    """
    ladders = spending.ladders
    errors = {n: [max(float(curves[n][w]), 0.0) for w in ladder] for n, ladder in ladders.items()}
    hulls = {n: hull(ladder, errors[n]) for n, ladder in ladders.items()}
    rungs = {n: len(ladder) - 1 for n, ladder in ladders.items()}
    spent = before = spending(rungs)
    total = sum(errors[n][rung] for n, rung in rungs.items())

    def next_step(name: str) -> tuple[float, int, int | float]:
        """The price of the group's next step, the rung that it leads to, and the cost of the model there.

        The step goes down to the first rung that saves something: a latency may fall only with every eighth channel.
        """
        at = to = rungs[name]
        less = spent
        while less >= spent and to > 0:
            to -= 1
            less = spending({**rungs, name: to})
        if less >= spent:  # no rung saves anything
            to, less = at - 1, spending({**rungs, name: at - 1})
        return (hulls[name][to] - hulls[name][at]) / max(spent - less, 1e-15 * before), to, less

    queue = [(next_step(n)[0], n) for n, rung in rungs.items() if rung > 0]
    heapq.heapify(queue)
    while queue and (most is not None or spent > spending.limit):
        _, name = heapq.heappop(queue)
        # A step saves less as other groups shrink. So an old price is a lower bound, and is computed again before use.
        price, to, less = next_step(name)
        if queue and price > queue[0][0] + 1e-12 * abs(queue[0][0]):
            heapq.heappush(queue, (price, name))
            continue
        adds = errors[name][to] - errors[name][rungs[name]]
        if most is not None and total + adds > most:
            continue  # this group is done; others may still have cheaper steps
        rungs[name], total, spent = to, total + adds, less
        if tell is not None and before > spending.limit:
            tell("allocate", min(1000, round(1000 * (before - spent) / (before - spending.limit))), 1000)
        if to > 0:
            heapq.heappush(queue, (next_step(name)[0], name))
    if most is not None:
        return rungs
    return _filled(rungs, spending, _single(ladders), lambda name, rung: hulls[name][rung + 1] - hulls[name][rung])


def _filled(rungs: Rungs, spending: Spending, classes: list[Class], order: Callable[[str, int], float]) -> Rungs:
    """Widen classes step by step, those with the least `order(name, rung)` first, until no step of any class fits.

    All groups of a class are on the same rung of the same ladder.
    """
    ladders, raised = spending.ladders, True
    while raised:
        raised = False
        open_ = [c for c in classes if rungs[c[0]] + 1 < len(ladders[c[0]])]
        for names in sorted(open_, key=lambda c: (order(c[0], rungs[c[0]]), c)):
            wider = {**rungs, **{n: rungs[n] + 1 for n in names}}
            if spending.fits(wider):
                rungs, raised = wider, True
    return rungs


def _single(ladders: Mapping[str, Ladder]) -> list[Class]:
    """Every group is a class of its own."""
    return [(name,) for name in ladders]


def _alike(free: list[Group]) -> list[Class]:
    """Groups with the same number of channels, unit and sections are one class."""
    classes: dict[tuple[int, int, int], Class] = {}
    for g in free:
        key = (g.size, g.unit, sections_of(g))
        classes[key] = (*classes.get(key, ()), g.name)
    return list(classes.values())


def _rungs(ladders: Mapping[str, Ladder], share: float) -> Rungs:
    """On every ladder, the widest rung of at most `share` of the full width; the lowest rung if there is none."""
    return {name: max(sum(w <= share * ladder[-1] for w in ladder) - 1, 0) for name, ladder in ladders.items()}
