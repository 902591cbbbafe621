"""What the pruned model may cost, and the widths that follow from it."""

from __future__ import annotations

import math
from dataclasses import dataclass

from coreprune.errors import BudgetError
from coreprune.graph import CostModel, Group

KINDS = ("keep", "macs", "params", "bytes")


@dataclass(frozen=True)
class Budget:
    """What may stay. At most one of the first four; `Budget()` is `Budget(keep=0.5)`.

    keep: share of the channels of every free group that stays, in (0, 1], rounded to the nearest whole unit.
    macs, params, bytes: what the whole pruned model may cost: a share of the dense model in (0, 1], or an absolute
        number above 1. MACs are those of one sample. Every free group gives up about the same share of its units. The
        budget is met, never missed, and no group could keep one step more.
    min_width: units that stay in every group (in every block, where a group has blocks) at least.
    round_to: widths are multiples of this many channels, or the whole group; `keep` rounds up to them.

    Raises BudgetError for values that contradict themselves.
    """

    keep: int | float | None = None
    macs: int | float | None = None
    params: int | float | None = None
    bytes: int | float | None = None
    min_width: int = 1
    round_to: int = 1

    def __post_init__(self) -> None:
        """Refuse what no model can meet."""
        given = [kind for kind in KINDS if getattr(self, kind) is not None]
        if len(given) > 1:
            raise BudgetError(f"{' and '.join(given)} are given, but a budget has one of {', '.join(KINDS)}.")
        if not given:
            object.__setattr__(self, "keep", 0.5)
        kind = self.kind
        value = getattr(self, kind)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
            raise BudgetError(f"{kind} must be a number, e.g. {kind}=0.5, but it is {value!r}.")
        if value <= 0:
            raise BudgetError(f"{kind}={value:g} would remove every channel. Use a share in (0, 1], e.g. {kind}=0.5.")
        if kind == "keep" and value > 1:
            raise BudgetError(f"keep={value:g} is more than everything. It is a share: keep=0.5 keeps half.")
        for name in ("min_width", "round_to"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise BudgetError(f"{name} must be a whole number ≥ 1, but it is {value!r}.")

    @property
    def kind(self) -> str:
        """Which of keep, macs, params and bytes is limited."""
        return next(kind for kind in KINDS if getattr(self, kind) is not None)


def allocate(budget: Budget, groups: list[Group], model_cost: CostModel) -> dict[str, int]:
    """Units that stay in every block of every free group (in the whole group, where it has no blocks).

    groups: all of them, the locked ones included. Raises BudgetError where the budget cannot be met, and says what can.
    """
    free = [g for g in groups if g.locked_because is None]
    if budget.keep is not None:
        if not free and budget.keep < 1:
            raise BudgetError(_nothing_free(groups))
        return {g.name: _nearest(budget, g) for g in free}

    dense = getattr(model_cost(), budget.kind)
    value = getattr(budget, budget.kind)
    limit = value * dense if value <= 1 else value
    ladders = {g.name: _ladder(budget, g) for g in free}
    channels = {g.name: g.unit * _blocks(g) for g in free}

    def spent(rungs: dict[str, int]) -> int:
        widths = {name: ladders[name][rung] * channels[name] for name, rung in rungs.items()}
        return getattr(model_cost(widths), budget.kind)

    least = spent(dict.fromkeys(ladders, 0))
    if least > limit:
        raise BudgetError(
            f"{budget.kind}={value:g} allows {limit:,.0f} of the dense model's {dense:,}, but with every free group at "
            f"its least width {least:,} are left ({least / dense:.1%})."
            + ("" if free else " " + _nothing_free(groups))
            + " Raise the budget, or lower min_width or round_to."
        )
    low, high = 0.0, 1.0  # the largest common share that fits, to the width of any ladder
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if spent(_rungs(ladders, middle)) <= limit else (low, middle)
    rungs = _rungs(ladders, 1.0) if spent(_rungs(ladders, 1.0)) <= limit else _rungs(ladders, low)
    # What is left over goes to the narrowest groups first, a step at a time, until no step fits.
    raised = True
    while raised:
        raised = False
        for name in sorted(rungs, key=lambda n: (ladders[n][rungs[n]] / ladders[n][-1], n)):
            if rungs[name] + 1 < len(ladders[name]):
                wider = {**rungs, name: rungs[name] + 1}
                if spent(wider) <= limit:
                    rungs, raised = wider, True
    return {name: ladders[name][rung] for name, rung in rungs.items()}


def _blocks(group: Group) -> int:
    return 1 if group.blocks is None else int(group.blocks.max()) + 1


def _units(group: Group) -> int:
    """Units per block."""
    return group.size // group.unit // _blocks(group)


def _step(budget: Budget, group: Group) -> int:
    """Units per block between two widths that are multiples of round_to channels."""
    channels = group.unit * _blocks(group)
    return max(1, budget.round_to // math.gcd(budget.round_to, channels))


def _ladder(budget: Budget, group: Group) -> list[int]:
    """The widths that a group may have, ascending, the full one included."""
    size, step = _units(group), _step(budget, group)
    _check_least(budget, group)
    widths = range(math.ceil(budget.min_width / step) * step, size, step)
    return [*widths, size]


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
        return "this model has no channels between two layers, so nothing can be removed. Use Budget(keep=1.0)."
    reasons = "; ".join(f"{g.name}: {g.locked_because}" for g in groups[:5])
    return f"no group of channels is free to leave ({reasons}), so the budget cannot be met."
