"""What a model costs at given widths, and whether the budget allows it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from coreprune.errors import BudgetError, CoreprunError, InputError, first_line
from coreprune.graph import Cost, Group
from coreprune.pruning.allocation.budget import Budget
from coreprune.pruning.allocation.ladders import Ladder, channels_of, nothing_free

Number = int | float
_WORDS = {"macs": " MACs", "params": " parameters", "bytes": " bytes", "cost": ""}


@runtime_checkable
class CostFunction(Protocol):
    """What a model costs at given widths: a function from the channels of every group, by name, to a number.

    The number is a finite one ≥ 0 in any unit, such as milliseconds or joules. The same widths must always give the
    same number, so measure first, and look up here: the function is called thousands of times. It should not fall as
    groups get wider. If it does, the budget still holds, but the widths may be worse than need be.

    The built-in one is `coreprune.graph.CostModel`, which returns a `Cost` of MACs, parameters and bytes.
    """

    def __call__(self, widths: Mapping[str, int], /) -> Any:
        """The cost; `widths` names every group, those that stay whole too."""
        ...


@dataclass(frozen=True)
class Spending:
    """The cost of rungs (positions on the ladders of the free groups, by name), and the limit.

    channels: by name, how many channels a unit of width stands for. whole: the channels of every group of the dense
    model.
    """

    kind: str
    cost_model: CostFunction
    ladders: Mapping[str, Ladder]
    channels: Mapping[str, int]
    whole: Mapping[str, int]
    limit: Number

    def __call__(self, rungs: Mapping[str, int]) -> Number:
        """The cost at these rungs."""
        widths = {name: self.ladders[name][rung] * self.channels[name] for name, rung in rungs.items()}
        return _cost(self.cost_model, self.kind, {**self.whole, **widths})

    def fits(self, rungs: Mapping[str, int]) -> bool:
        """Whether the budget allows these rungs."""
        return self(rungs) <= self.limit


def spending_of(
    budget: Budget, groups: list[Group], cost_model: CostFunction, ladders: Mapping[str, Ladder]
) -> Spending:
    """Turn a budget into a limit. Raises BudgetError if it is out of reach, or if it may be a percentage."""
    whole = {g.name: g.size for g in groups}
    dense = _cost(cost_model, budget.kind, whole)
    channels = {g.name: channels_of(g) for g in groups if g.name in ladders}
    spending = Spending(budget.kind, cost_model, ladders, channels, whole, _limit(budget, dense))
    least = spending(dict.fromkeys(ladders, 0))
    if least > spending.limit:
        raise BudgetError(
            f"{budget.kind}={budget.limit:g} allows {_said(spending.limit)} of the dense model's {_said(dense)}, but "
            f"with every free group at its least width {_said(least)} are left ({least / max(dense, 1e-300):.1%})."
            + ("" if ladders else " " + nothing_free(groups))
            + " Raise the budget, or lower min_width or round_to."
        )
    return spending


def _limit(budget: Budget, dense: Number) -> Number:
    """The largest cost that is allowed."""
    value = budget.limit
    if budget.kind == "error":
        return math.inf
    if budget.absolute or value > 100:
        return value
    if value <= 1:
        return value * dense
    kind, words = budget.kind, _WORDS[budget.kind]
    where = ", or on the command line --absolute" if words else ""  # a cost of one's own is Python's alone
    raise BudgetError(
        f"{value:g}{words} of {_said(dense)}: did you mean {value / 100:g}? A share of the dense model is at most 1. "
        f"For {value:g}{words or ' as an absolute number'}, write Budget({kind}={value:g}, absolute=True){where}."
    )


def _cost(cost_model: CostFunction, kind: str, widths: Mapping[str, int]) -> Number:
    """The cost as one number, of whichever kind."""
    try:
        found = cost_model(widths)
    except CoreprunError:
        raise
    except Exception as error:  # the function is the user's code
        raise InputError(
            f"the cost function failed with {first_line(error)} at the widths {_some(widths)}. It must return a number "
            "for every choice of widths up to the dense model's."
        ) from error
    if isinstance(found, Cost):
        if kind == "cost":
            raise InputError(
                "Budget(cost=...) limits a cost of your own, but none is given. Pass a function from widths to a "
                "number as cost=, or limit macs, params or bytes."
            )
        return getattr(found, "macs" if kind == "error" else kind)
    if kind not in ("cost", "error"):
        raise InputError(f"a cost of your own is given, but the budget limits {kind}. Limit it with Budget(cost=0.5).")
    try:
        value = math.nan if isinstance(found, (bool, str, bytes)) else float(found)
    except (TypeError, ValueError, RuntimeError):
        value = math.nan
    if not math.isfinite(value) or value < 0:
        raise InputError(
            f"the cost function returned {found!r} at the widths {_some(widths)}. It must return a finite number ≥ 0."
        )
    return value


def _some(widths: Mapping[str, int]) -> str:
    """The first few widths."""
    return str(dict(list(widths.items())[:4])) + (" …" if len(widths) > 4 else "")


def _said(number: Number) -> str:
    """A number as text for people; whole numbers in full."""
    return f"{number:,.0f}" if isinstance(number, int) or number >= 1e4 else f"{number:,.4g}"
