"""Tell a caller how far the work is, and measure how long each phase takes."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

Progress = Callable[[str, int, int], None]
Item = TypeVar("Item")
_END = object()


@dataclass
class Clock:
    """Seconds per phase, in all if a phase is entered several times. tell: called as tell(phase, done, total).

    peaks: per phase, the most bytes of memory that the process had held when the phase ended.

    A phase that is entered inside another one interrupts that.
    """

    tell: Progress
    seconds: dict[str, float] = field(default_factory=dict)
    peaks: dict[str, int] = field(default_factory=dict)
    _start: float = field(default=0.0, repr=False)
    _phases: list[str] = field(default_factory=list, repr=False)

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        """Measure the time of the block as part of a phase."""
        self._lap()
        self._phases.append(phase)
        yield
        self._lap()
        self._phases.pop()
        if peak := peak_bytes():
            self.peaks[phase] = peak

    def each(self, phase: str, items: Iterator[Item]) -> Iterator[Item]:
        """The same items; the time of making them is part of a phase."""
        while True:
            with self(phase):
                item = next(items, _END)
            if item is _END:
                return
            yield item  # type: ignore[misc]

    def _lap(self) -> None:
        """Give the time since the last lap to the phase that runs."""
        now = time.perf_counter()
        if self._phases:
            phase = self._phases[-1]
            self.seconds[phase] = round(self.seconds.get(phase, 0.0) + now - self._start, 4)
        self._start = now


def silent(phase: str, done: int, total: int) -> None:
    """Report no progress."""


def peak_bytes() -> int:
    """The most memory that this process has held so far; 0 where the system does not say."""
    with suppress(OSError, StopIteration, ValueError, IndexError):
        lines = Path("/proc/self/status").read_text().splitlines()
        return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:"))
    return 0
