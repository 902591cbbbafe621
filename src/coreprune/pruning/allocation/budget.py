"""What the pruned model may cost."""

from __future__ import annotations

import math
from dataclasses import dataclass

from coreprune.errors import BudgetError

KINDS = ("keep", "macs", "params", "bytes", "error")


@dataclass(frozen=True)
class Budget:
    """What may stay. At most one of the first five; `Budget()` is `Budget(keep=0.5)`.

    keep: share of the channels of every free group that stays, in (0, 1], rounded to the nearest whole unit.
    macs, params, bytes: what the whole pruned model may cost: a share of the dense model in (0, 1], or an absolute
        number above 1. MACs are those of one sample. The budget is met, never missed, and no group could keep one
        step more: channels, or `round_to` of them (with `uniform`: no class of alike groups could).
    error: the mean squared error of the model's outputs on the queries, relative to their variance, that may be
        predicted (to first order, summed over the groups); the model becomes as cheap in MACs as that allows.
    uniform: every free group gives up about the same share of its units, and alike groups (the same channels, unit and
        sections) get exactly the same width, so that a configuration with one width for all layers can express it. By
        default the queries' error curves decide, where there are queries; the shares are about equal where there are
        none.
    min_width: units that stay in every group (in every section, where a group has sections) at least.
    round_to: widths are multiples of this many channels, or the whole group; `keep` rounds up to them. None: multiples
        of 8 (or `min_width`) in groups of at least 128 channels, which most processors are faster at, and any width in
        narrower groups and for `keep` (`coreprune.pruning.allocation.allocate.multiple_of`).

    Raises BudgetError for values that contradict themselves.
    """

    keep: int | float | None = None
    macs: int | float | None = None
    params: int | float | None = None
    bytes: int | float | None = None
    error: float | None = None
    uniform: bool = False
    min_width: int = 1
    round_to: int | None = None

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
        if kind == "error" and (value >= 1 or self.uniform):
            raise BudgetError(
                "an error budget gives every group the width that its errors ask for, so it does not go with uniform "
                "widths. Leave one of them out."
                if self.uniform
                else f"error={value:g} must lie below 1, which is as bad as a constant output. Use e.g. error=0.05."
            )
        if kind == "keep" and value > 1:
            raise BudgetError(f"keep={value:g} is more than everything. It is a share: keep=0.5 keeps half.")
        for name in ("min_width", "round_to"):
            value = getattr(self, name)
            if name == "round_to" and value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise BudgetError(f"{name} must be a whole number ≥ 1, but it is {value!r}.")

    @property
    def kind(self) -> str:
        """Which of keep, macs, params, bytes and error is limited."""
        return next(kind for kind in KINDS if getattr(self, kind) is not None)
