"""Tell a caller how far the work is, and measure how long each phase takes."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

Progress = Callable[[str, int, int], None]


@dataclass
class Clock:
    """Seconds per phase, in all if a phase is entered several times. tell: called as tell(phase, done, total)."""

    tell: Progress
    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        """Measure the time of the block as part of a phase."""
        start = time.perf_counter()
        yield
        self.seconds[phase] = round(self.seconds.get(phase, 0.0) + time.perf_counter() - start, 4)


def silent(phase: str, done: int, total: int) -> None:
    """Report no progress."""
