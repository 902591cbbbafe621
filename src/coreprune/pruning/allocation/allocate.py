"""From a budget to the width of every group."""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from coreprune.errors import BudgetError
from coreprune.graph import CostModel, Group
from coreprune.pruning.allocation.budget import Budget

_WIDE = 128  # channels; 8 of them are a step of at most a sixteenth
_VECTOR = 8  # channels

Class = tuple[str, ...]  # names of groups that change their widths together


def allocate(
    budget: Budget,
    groups: list[Group],
    model_cost: CostModel,
    curves: Mapping[str, Tensor] | None = None,
    tell: Callable[[str, int, int], None] | None = None,
) -> dict[str, int]:
    """Units that stay in every section of every free group (in the whole group, where it has no sections).

    groups: all of them, the locked ones included. curves: per free group the error of every width, (units per section +
    1,), from `widths_curve`; without them, or with `budget.uniform`, all groups give up about the same share.

    Raises BudgetError where the budget cannot be met, and says what can.
    """
    free = [g for g in groups if g.locked_because is None]
    if budget.keep is not None:
        if not free and budget.keep < 1:
            raise BudgetError(_nothing_free(groups))
        return {g.name: _nearest(budget, g) for g in free}
    ladders = {g.name: _ladder(budget, g) for g in free}
    cost = _Spending(budget, groups, model_cost, ladders)
    if budget.error is not None and curves is None:
        raise BudgetError(
            "an error budget goes by what the queries show, and there are none. Pass queries, or limit macs instead."
        )
    if curves is None or budget.uniform:
        rungs = _equal_shares(ladders, cost, _alike(free) if budget.uniform else _single(ladders))
    else:
        rungs = _by_error(budget, ladders, cost, {name: curves[name] for name in ladders}, tell)
    return {name: ladders[name][rung] for name, rung in rungs.items()}


class _Spending:
    """What a choice of rungs costs, and whether the budget allows it."""

    def __init__(
        self, budget: Budget, groups: list[Group], model_cost: CostModel, ladders: dict[str, list[int]]
    ) -> None:
        self.kind = "macs" if budget.error is not None else budget.kind
        self.model_cost, self.ladders = model_cost, ladders
        self.channels = {g.name: g.unit * _sections(g) for g in groups if g.name in ladders}
        self.at = {name: i for i, name in enumerate(model_cost.names)}
        dense = getattr(model_cost(), self.kind)
        value = math.inf if budget.error is not None else getattr(budget, budget.kind)
        self.limit = value * dense if value <= 1 else value
        least = self(dict.fromkeys(ladders, 0))
        if least > self.limit:
            raise BudgetError(
                f"{self.kind}={value:g} allows {self.limit:,.0f} of the dense model's {dense:,}, but with every free "
                f"group at its least width {least:,} are left ({least / dense:.1%})."
                + ("" if ladders else " " + _nothing_free(groups))
                + " Raise the budget, or lower min_width or round_to."
            )

    def vector(self, rungs: Mapping[str, int]) -> Any:
        """Widths in channels, as the cost model takes them."""
        return self.model_cost.widths({n: self.ladders[n][r] * self.channels[n] for n, r in rungs.items()})

    def __call__(self, rungs: Mapping[str, int]) -> int:
        """The cost at these rungs."""
        return getattr(self.model_cost(self.vector(rungs)), self.kind)

    def fits(self, rungs: Mapping[str, int]) -> bool:
        """Whether the budget allows them."""
        return self(rungs) <= self.limit


def _equal_shares(ladders: dict[str, list[int]], cost: _Spending, classes: list[Class]) -> dict[str, int]:
    """The largest common share of all widths that fits; what is left over goes to the narrowest classes of groups."""
    low, high = 0.0, 1.0
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if cost.fits(_rungs(ladders, middle)) else (low, middle)
    rungs = _rungs(ladders, 1.0) if cost.fits(_rungs(ladders, 1.0)) else _rungs(ladders, low)
    return _filled(rungs, ladders, cost, classes, lambda name, rung: ladders[name][rung] / ladders[name][-1])


def _by_error(
    budget: Budget,
    ladders: dict[str, list[int]],
    cost: _Spending,
    curves: Mapping[str, Tensor],
    tell: Callable[[str, int, int], None] | None,
) -> dict[str, int]:
    """From the top down: the step that adds least error per unit of cost goes first, until the budget holds.

    Steps are priced on the lower convex hull of each curve, so that a cheap step behind a dear one is seen.
    """
    errors = {n: [max(float(curves[n][w]), 0.0) for w in ladder] for n, ladder in ladders.items()}
    hulls = {n: _hull([w for w in ladders[n]], errors[n]) for n in ladders}
    rungs = {n: len(ladder) - 1 for n, ladder in ladders.items()}
    spent = before = cost(rungs)
    total = sum(errors[n][rungs[n]] for n in ladders)

    def price(name: str) -> tuple[float, int]:
        less = cost({**rungs, name: rungs[name] - 1})
        return (hulls[name][rungs[name] - 1] - hulls[name][rungs[name]]) / max(spent - less, 1e-9), less

    queue = [(price(n)[0], n) for n in ladders if rungs[n] > 0]
    heapq.heapify(queue)
    while queue and (budget.error is not None or spent > cost.limit):
        _, name = heapq.heappop(queue)
        # Costs only fall as other groups shrink, so an old price is a lower bound: check it before acting on it.
        now, less = price(name)
        if queue and now > queue[0][0] + 1e-12 * abs(queue[0][0]):
            heapq.heappush(queue, (now, name))
            continue
        adds = errors[name][rungs[name] - 1] - errors[name][rungs[name]]
        if budget.error is not None and total + adds > budget.error:
            continue  # this group is done; others may still have cheaper steps
        rungs[name] -= 1
        total, spent = total + adds, less
        if tell is not None and before > cost.limit:
            tell("allocate", int(before - spent), int(before - cost.limit))
        if rungs[name] > 0:
            heapq.heappush(queue, (price(name)[0], name))
    if budget.error is not None:
        return rungs
    return _filled(rungs, ladders, cost, _single(ladders), lambda name, rung: hulls[name][rung + 1] - hulls[name][rung])


def _filled(
    rungs: dict[str, int],
    ladders: dict[str, list[int]],
    cost: _Spending,
    classes: list[Class],
    order: Callable[[str, int], float],
) -> dict[str, int]:
    """Raise classes by a step, those with the least `order(name, rung)` first, until no step of any class fits.

    All groups of a class are on the same rung of the same ladder.
    """
    raised = True
    while raised:
        raised = False
        open_ = [c for c in classes if rungs[c[0]] + 1 < len(ladders[c[0]])]
        for names in sorted(open_, key=lambda c: (order(c[0], rungs[c[0]]), c)):
            wider = {**rungs, **{n: rungs[n] + 1 for n in names}}
            if cost.fits(wider):
                rungs, raised = wider, True
    return rungs


def _single(ladders: Mapping[str, list[int]]) -> list[Class]:
    """Every group is a class of its own."""
    return [(name,) for name in ladders]


def _alike(free: list[Group]) -> list[Class]:
    """Groups with the same number of channels, unit and sections are one class."""
    classes: dict[tuple[int, int, int], Class] = {}
    for g in free:
        key = (g.size, g.unit, _sections(g))
        classes[key] = (*classes.get(key, ()), g.name)
    return list(classes.values())


def widths_curve(errors: Tensor, group: Group) -> Tensor:
    """Error of every width, (units per section + 1,), from the error of the first k units of a balanced order."""
    return errors[:: _sections(group)]


def balanced(order: Tensor, group: Group) -> Tensor:
    """The same order with the sections in turn, so that its first w·sections units are the first w of every section."""
    if group.sections is None:
        return order
    sections = group.sections.to(order.device)[order]
    turns = torch.zeros_like(order)
    for b in range(_sections(group)):
        turns[sections == b] = torch.arange(int((sections == b).sum()), device=order.device)
    return order[torch.argsort(turns, stable=True)]


def _hull(x: list[int], y: list[float]) -> list[float]:
    """The lower convex hull of the points (x, y), evaluated at every x."""
    corners: list[int] = []
    for i in range(len(x)):
        while len(corners) > 1:
            a, b = corners[-2], corners[-1]
            if (y[b] - y[a]) * (x[i] - x[a]) < (y[i] - y[a]) * (x[b] - x[a]):
                break
            corners.pop()
        corners.append(i)
    return np.interp(x, [x[c] for c in corners], [y[c] for c in corners]).tolist()


def _sections(group: Group) -> int:
    return 1 if group.sections is None else int(group.sections.max()) + 1


def _units(group: Group) -> int:
    """Units per section."""
    return group.size // group.unit // _sections(group)


def multiple_of(budget: Budget, group: Group) -> int:
    """How many channels the width of a group is a multiple of: `budget.round_to`, or what suits the group.

    Libraries lay channels out in blocks: on CPUs of 8 or 16 (oneDNN), and the tensor cores of GPUs want multiples of 8
    in half precision (NVIDIA, Deep Learning Performance). Channels that fill no block cost as much as the block:
    on one AVX-512 core a 3×3 convolution of 129 channels took as long as one of 144, 1.3 times as long as one of 128
    (14×14 pixels, batch 4); linear layers did not care there. So the rule is the same on CPUs and GPUs. In a narrow
    group a step of 8 is too coarse to meet a budget closely or to follow an error curve, and `keep` asks for a number
    of channels, not for a cost: both are free in their widths.
    """
    if budget.round_to is not None:
        return budget.round_to
    return _VECTOR if budget.kind != "keep" and group.size >= _WIDE else 1


def _step(budget: Budget, group: Group) -> int:
    """Units per section between two widths that are multiples of `multiple_of` channels."""
    channels, multiple = group.unit * _sections(group), multiple_of(budget, group)
    return multiple // math.gcd(multiple, channels)


def _ladder(budget: Budget, group: Group) -> list[int]:
    """The widths that a group may have, ascending, the full one included.

    Unless `round_to` was asked for, the least width is one of them: no budget is out of reach because we round.
    """
    size, step = _units(group), _step(budget, group)
    _check_least(budget, group)
    least = {budget.min_width} if budget.round_to is None else set()
    return sorted({*least, *range(math.ceil(budget.min_width / step) * step, size, step), size})


def _rungs(ladders: dict[str, list[int]], share: float) -> dict[str, int]:
    """The widest rung of every ladder that is at most `share` of the full width, or the lowest."""
    return {name: max(sum(w <= share * ladder[-1] for w in ladder) - 1, 0) for name, ladder in ladders.items()}


def _nearest(budget: Budget, group: Group) -> int:
    _check_least(budget, group)
    size, step = _units(group), _step(budget, group)
    width = max(round((budget.keep or 0.0) * size), budget.min_width)
    return min(size, math.ceil(width / step) * step)


def _check_least(budget: Budget, group: Group) -> None:
    if budget.min_width > _units(group):
        raise BudgetError(
            f"{group.name} has {_units(group)} units, fewer than min_width={budget.min_width}. "
            f"Lower min_width to {_units(group)} or less."
        )


def _nothing_free(groups: list[Group]) -> str:
    if all(g.locked_because == "model output" for g in groups):
        return "this model has no channels between two layers, so nothing can be removed. Use keep=1."
    reasons = "; ".join(f"{g.name}: {g.locked_because}" for g in groups[:5])
    return f"no group of channels is free to leave ({reasons}), so the budget cannot be met."
