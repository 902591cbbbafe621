"""Widths from shares of channels: `Budget(keep=...)`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase

from coreprune._patterns import no_match
from coreprune.errors import BudgetError, InputError
from coreprune.graph import Group
from coreprune.pruning.allocation.budget import Budget
from coreprune.pruning.allocation.ladders import nothing_free, units_of, width_at


def kept_widths(budget: Budget, groups: list[Group]) -> dict[str, int]:
    """The width of every free group.

    Raises InputError for a pattern that no group matches, and BudgetError for a pattern that has no effect.
    """
    keep = budget.keep if isinstance(budget.keep, Mapping) else {"*": budget.limit}
    free = [g for g in groups if g.locked_because is None]
    decides = {g.name: _pattern_of(g.name, keep) for g in groups}
    if isinstance(budget.keep, Mapping):
        _check_patterns(keep, decides, groups)
    elif not free and budget.keep != 1:
        raise BudgetError(nothing_free(groups))
    shares = {g.name: 1.0 if (p := decides[g.name]) is None else keep[p] for g in free}
    return {g.name: units_of(g) if shares[g.name] == 1 else width_at(shares[g.name], budget, g) for g in free}


def left_whole(budget: Budget, groups: Iterable[Group]) -> dict[str, str]:
    """The free groups that stay whole because no share is given for them, with words for it. They need no ranking."""
    if not isinstance(budget.keep, Mapping):
        return {}
    free = [g.name for g in groups if g.locked_because is None]
    shares = {name: budget.keep.get(_pattern_of(name, budget.keep) or "", 1) for name in free}
    return {name: "keep=... gives no share for it" for name, share in shares.items() if share == 1}


def _pattern_of(name: str, keep: Mapping[str, int | float]) -> str | None:
    """The first pattern that matches the name, which decides."""
    return next((p for p in keep if fnmatchcase(name, p)), None)


def _check_patterns(keep: Mapping[str, int | float], decides: Mapping[str, str | None], groups: list[Group]) -> None:
    names = list(decides)
    for pattern in keep:
        matches = [name for name in names if fnmatchcase(name, pattern)]
        if not matches:
            raise InputError(no_match(f"keep={{{pattern!r}: …}}", pattern, names))
        if pattern not in decides.values():
            raise BudgetError(
                f"keep={{{pattern!r}: …}} has no effect, because {decides[matches[0]]!r} comes before it and decides. "
                f"The first pattern that matches a group decides: put {pattern!r} first."
            )
    locked = {g.name: g.locked_because for g in groups if g.locked_because is not None}
    useless = [name for name in locked if keep.get(name, 1) < 1]
    if all(decides[name] is None or name in locked for name in names) and min(keep.values()) < 1:
        useless = [name for name in locked if decides[name] is not None]
    if useless:
        reasons = "; ".join(f"{name}: {locked[name]}" for name in useless[:5])
        raise BudgetError(f"keep=... names groups that have to stay whole ({reasons}). Leave them out.")
