"""What the pruned model may cost, and the widths that follow from it."""

from __future__ import annotations

import math
from dataclasses import dataclass

from coreprune.errors import BudgetError


@dataclass(frozen=True)
class Budget:
    """What may stay.

    keep: share of the channels of every free group that stays, in (0, 1]. Rounded to the nearest whole unit.
    min_width: units that stay in every group at least.
    round_to: widths are rounded up to a multiple of this many channels (a group that is narrower stays whole).

    Raises BudgetError for values that contradict themselves.
    """

    keep: float = 0.5
    min_width: int = 1
    round_to: int = 1

    def __post_init__(self) -> None:
        """Refuse what no model can meet."""
        if isinstance(self.keep, bool) or not isinstance(self.keep, (int, float)) or not math.isfinite(self.keep):
            raise BudgetError(f"keep must be a number in (0, 1], but it is {self.keep!r}.")
        if self.keep <= 0:
            raise BudgetError(f"keep={self.keep:g} would remove every channel. Use a share in (0, 1], e.g. keep=0.5.")
        if self.keep > 1:
            raise BudgetError(f"keep={self.keep:g} is more than everything. It is a share: keep=0.5 keeps half.")
        for name in ("min_width", "round_to"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise BudgetError(f"{name} must be a whole number ≥ 1, but it is {value!r}.")

    def width(self, size: int, name: str = "a group", unit: int = 1) -> int:
        """Units that stay of a group of `size` units of `unit` channels each.

        Raises BudgetError where min_width exceeds the group.
        """
        if self.min_width > size:
            raise BudgetError(
                f"{name} has {size} units, fewer than min_width={self.min_width}. Lower min_width to {size} or less."
            )
        width = max(round(self.keep * size), self.min_width, 1)
        step = max(1, self.round_to // math.gcd(self.round_to, unit))
        return min(size, math.ceil(width / step) * step)
