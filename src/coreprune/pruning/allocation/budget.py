"""Budget: what the pruned model may cost."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from coreprune.errors import BudgetError

KINDS = ("keep", "macs", "params", "bytes", "cost", "error")


@dataclass(frozen=True)
class Budget:
    """How much of the model may stay. Give at most one of the first six; `Budget()` is `Budget(keep=0.5)`.

    keep: the share of channels that stays in every free group, in (0, 1], rounded to the nearest whole unit. Or shares
        by names or patterns of groups, e.g. `{"layer1.*": 0.8, "*": 0.5}`: the first pattern that matches a group
        decides, and a group that none matches stays whole. `list_groups` lists the names.
    macs, params, bytes: what the whole pruned model may cost. Numbers up to 1 are shares of the dense model, larger
        ones are absolute. MACs are those of one sample. The limit is never exceeded; widening any group by one step
        would exceed it. A step is one unit, or `round_to` channels; with `uniform` equal groups take it together.
    cost: the same, in a cost of your own, which goes into `prune(cost=...)` (`CostFunction`).
    error: the largest error that may be predicted for the model's outputs on the queries. It is the mean squared error
        relative to the variance of the outputs, to first order and summed over the groups. The model becomes as cheap
        as that allows.
    uniform: take about the same share from every free group, and leave equal widths in equal groups (those with the
        same channels, unit and sections), so that a config.json with one width for all layers can express it. By
        default the errors on the queries decide; without queries the shares are about equal.
    min_width: at least this many units stay in every group, or in every section of it.
    round_to: widths are multiples of this many channels, or whole groups; `keep` rounds up to them. None means
        multiples of 8 (or `min_width`) in groups of at least 128 channels, which is faster on most processors, and any
        width in narrower groups and with `keep`.
    absolute: take macs, params, bytes or cost as an absolute number. A number between 1 and 100 is refused without it,
        because a percentage may be meant; larger ones are absolute anyway.

    Raises BudgetError for values that contradict each other.
    """

    keep: int | float | Mapping[str, int | float] | None = field(default=None, hash=False)
    macs: int | float | None = None
    params: int | float | None = None
    bytes: int | float | None = None
    cost: int | float | None = None
    error: float | None = None
    uniform: bool = False
    min_width: int = 1
    round_to: int | None = None
    absolute: bool = False

    def __post_init__(self) -> None:
        """Raise BudgetError for values that contradict each other, or that no model can meet."""
        given = [kind for kind in KINDS if getattr(self, kind) is not None]
        if len(given) > 1:
            raise BudgetError(f"{' and '.join(given)} are given, but a budget has one of {', '.join(KINDS)}.")
        if not given:
            object.__setattr__(self, "keep", 0.5)
        if isinstance(self.keep, Mapping):
            object.__setattr__(self, "keep", _shares(self.keep))
        else:
            _check_limit(self.kind, getattr(self, self.kind))
        if self.kind == "error" and self.uniform:
            raise BudgetError(
                "an error budget gives every group the width that its errors ask for, so it does not go with uniform "
                "widths. Leave one of them out."
            )
        self._check_absolute()
        for name in ("min_width", "round_to"):
            value = getattr(self, name)
            if name == "round_to" and value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise BudgetError(f"{name} must be a whole number ≥ 1, but it is {value!r}.")

    def _check_absolute(self) -> None:
        if not isinstance(self.absolute, bool):
            raise BudgetError(f"absolute must be True or False, but it is {self.absolute!r}.")
        if not self.absolute:
            return
        if self.kind in ("keep", "error"):
            raise BudgetError(
                f"absolute=True goes with macs, params, bytes or cost; {self.kind} is always a share. Leave it out."
            )
        if self.kind != "cost" and self.limit <= 1:
            raise BudgetError(
                f"{self.kind}={self.limit:g} is a share of the dense model, so it does not go with absolute=True. "
                "Leave absolute out, or give a number above 1."
            )

    @property
    def kind(self) -> str:
        """Which of keep, macs, params, bytes, cost and error is limited."""
        return next(kind for kind in KINDS if getattr(self, kind) is not None)

    @property
    def limit(self) -> Any:
        """The value of the limit."""
        return getattr(self, self.kind)


def _check_limit(kind: str, value: Any) -> None:
    """Raise BudgetError unless the value is a number in the range of its kind."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise BudgetError(f"{kind} must be a number, e.g. {kind}=0.5, but it is {value!r}.")
    if value <= 0:
        raise BudgetError(f"{kind}={value:g} would remove every channel. Use a share in (0, 1], e.g. {kind}=0.5.")
    if kind == "error" and value >= 1:
        raise BudgetError(
            f"error={value:g} must lie below 1, which is as bad as a constant output. Use e.g. error=0.05."
        )
    if kind == "keep" and value > 1:
        raise BudgetError(f"keep={value:g} is more than everything. It is a share: keep=0.5 keeps half.")


def _shares(keep: Mapping[Any, Any]) -> dict[str, int | float]:
    """A copy of the shares by pattern. Raises BudgetError unless patterns and shares are valid."""
    if not keep or not all(isinstance(pattern, str) and pattern for pattern in keep):
        raise BudgetError(
            f"keep must be a share, or shares by names or patterns, e.g. {{'layer1.*': 0.8}}, not {keep!r}."
        )
    for pattern, share in keep.items():
        try:
            _check_limit("keep", share)
        except BudgetError as error:
            raise BudgetError(f"groups {pattern!r}: {error}") from None
    return dict(keep)
