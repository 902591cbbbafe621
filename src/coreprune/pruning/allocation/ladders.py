"""Which widths a group may have. A width is the number of units that stay in every section of the group."""

from __future__ import annotations

import math

from coreprune.errors import BudgetError
from coreprune.graph import Group
from coreprune.pruning.allocation.budget import Budget

_WIDE = 128  # channels; in such groups a step of 8 channels is at most a sixteenth
_VECTOR = 8  # channels

Ladder = list[int]  # the widths that a group may have, ascending


def sections_of(group: Group) -> int:
    """How many sections a group has; one, if it is not divided."""
    return 1 if group.sections is None else int(group.sections.max()) + 1


def channels_of(group: Group) -> int:
    """How many channels one unit of width stands for: one unit in every section."""
    return group.unit * sections_of(group)


def units_of(group: Group) -> int:
    """The full width."""
    return group.size // channels_of(group)


def multiple_of(budget: Budget, group: Group) -> int:
    """The width of a group is a multiple of this many channels: `budget.round_to`, or what suits the group.

    Libraries lay channels out in blocks: of 8 or 16 on CPUs (oneDNN), and the tensor cores of GPUs want multiples of 8
    in half precision (NVIDIA, Deep Learning Performance). A block that is filled in part costs as much as a full one.
    On one AVX-512 core a 3×3 convolution of 129 channels took as long as one of 144, and 1.3 times as long as one of
    128 (14×14 pixels, batch 4); for linear layers it made no difference there. So the rule is the same on CPUs and
    GPUs. There are two exceptions, in which any width is allowed. In a narrow group a step of 8 is too coarse to meet a
    budget closely or to follow an error curve. And `keep` asks for a number of channels, not for a cost.
    """
    if budget.round_to is not None:
        return budget.round_to
    return _VECTOR if budget.kind != "keep" and group.size >= _WIDE else 1


def ladder_of(budget: Budget, group: Group) -> Ladder:
    """The widths that a group may have, ascending, including the full width.

    Unless `round_to` is given, `min_width` is one of them, so that the default rounding makes no budget unreachable.
    """
    _check_least(budget, group)
    full, step = units_of(group), _step(budget, group)
    least = {budget.min_width} if budget.round_to is None else set()
    return sorted({*least, *range(math.ceil(budget.min_width / step) * step, full, step), full})


def width_at(share: int | float, budget: Budget, group: Group) -> int:
    """The width that keeps a share of a group: the nearest one, rounded up to `round_to`, and at least `min_width`."""
    _check_least(budget, group)
    full, step = units_of(group), _step(budget, group)
    width = max(round(share * full), budget.min_width)
    return min(full, math.ceil(width / step) * step)


def nothing_free(groups: list[Group]) -> str:
    """In words, why no group can shrink."""
    if all(g.locked_because == "model output" for g in groups):
        return "this model has no channels between two layers, so nothing can be removed. Use keep=1."
    reasons = "; ".join(f"{g.name}: {g.locked_because}" for g in groups[:5])
    return f"no group of channels is free to leave ({reasons}), so the budget cannot be met."


def _step(budget: Budget, group: Group) -> int:
    """Units per section between two widths that are multiples of `multiple_of` channels."""
    channels, multiple = channels_of(group), multiple_of(budget, group)
    return multiple // math.gcd(multiple, channels)


def _check_least(budget: Budget, group: Group) -> None:
    if budget.min_width > units_of(group):
        raise BudgetError(
            f"{group.name} has {units_of(group)} units, fewer than min_width={budget.min_width}. "
            f"Lower min_width to {units_of(group)} or less."
        )
