"""Options of the repair."""

from __future__ import annotations

from dataclasses import dataclass

from coreprune.errors import InputError
from coreprune.pruning.repair.twins import Descent


@dataclass(frozen=True)
class Repair:
    """Options of the repair.

    ridge: λ as a multiple of the mean second moment of the features. None chooses it for every layer on queries that
        the refit has not seen. An output whose refit is then no better than its start is not written.
    producers: whether to refit also layers that lost no input, but whose input has changed.
    rows: at most `rows` positions per layer, sampled evenly: 64 per query, but at least half of `rows` in all. A layer
        of many features gets 16 per feature, even if that is more than `rows`.
    one_sided: at most this many rounds of one-sided targets, for layers that only a ReLU reads. 0 matches the whole
        output. The rounds end when one lowers the error by less than 1 %.
    descent: whether to train the blocks of layers after that, or with which options. None: if it is cheap (`Descent`).
    """

    ridge: float | None = None
    producers: bool = True
    rows: int = 1 << 15
    one_sided: int = 3
    descent: bool | Descent | None = None

    def __post_init__(self) -> None:
        if self.descent is not None and not isinstance(self.descent, (bool, Descent)):
            raise InputError(f"Repair.descent must be True, False, None or Descent(...), not {self.descent!r}.")
