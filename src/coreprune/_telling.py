"""Tell the user how far the work is: bars, lines in the log, a function of the user's own, a file for programs."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

from coreprune._bars import bars
from coreprune._heap import tidy
from coreprune._journal import Journal, opened
from coreprune._progress import Progress, silent
from coreprune.errors import InputError, first_line

Wanted = bool | Progress | None  # what public functions take as `progress`

_log = logging.getLogger("coreprune.progress")
_EVERY = 60.0  # seconds between two lines
_INSIDE: ContextVar[bool] = ContextVar("whether a call further out shows its progress", default=False)


@dataclass(frozen=True, eq=False)
class Told:
    """Called as tell(phase, done, total, **figures): a display gets the first three, a log for programs gets all."""

    show: Progress
    journal: Journal | None = None

    def __call__(self, phase: str, done: int, total: int, **figures: float) -> None:
        """Say how far a phase is. Between two steps is also the time to give freed memory back."""
        tidy()
        self.show(phase, done, total)
        if self.journal is not None:
            self.journal.step(phase, done, total, **figures)

    def note(self, phase: str, **figures: Any) -> None:
        """Write a row into the log for programs, if there is one."""
        if self.journal is not None:
            self.journal.note(phase, **figures)


@dataclass(eq=False)
class Lines:
    """One line when a phase is first heard of, then at most one a minute. say: takes a line. clock: in seconds."""

    say: Callable[[str], None]
    clock: Callable[[], float] = time.monotonic
    _began: dict[str, tuple[float, int]] = field(default_factory=dict)
    _before: dict[str, int] = field(default_factory=dict)
    _last: float = 0.0

    def __call__(self, phase: str, done: int, total: int) -> None:
        """Say a line, if it is time for one."""
        now, first = self.clock(), phase not in self._began
        if first or done < self._before[phase]:  # it begins, or begins again
            self._began[phase] = now, done
        self._before[phase] = done
        if not first and now - self._last < _EVERY:
            return
        self._last = now
        began, start = self._began[phase]
        text = phase if total == 1 else f"{phase}: {done:,} of {total:,}"
        if done > start:
            spent, left = now - began, (now - began) / (done - start) * (total - done)
            text += f", {_clock(spent)} so far, about {_clock(left)} left"
        self.say(text)


@contextmanager
def telling(progress: Wanted = None, log: str | Path | None = None) -> Iterator[Told]:
    """Show how far the block is. Yields what the block has to call.

    progress: as the user gave it. True: bars; where they cannot be drawn, lines on standard error. None: bars; where
        they cannot be drawn, lines in the log of coreprune.progress. Inside of another block, None shows nothing.
        False shows nothing. A function is called as progress(phase, done, total).
    log: a file to which rows are appended; the last one says so if the block fails.

    Raises InputError if an argument is something else, and ArtifactError if the file cannot be written.
    """
    if isinstance(progress, Told):
        yield progress
        return
    with ExitStack() as stack:
        display = _display(progress)
        stack.callback(_INSIDE.reset, _INSIDE.set(True))
        journal = None if log is None else Journal(stack.enter_context(opened(log)))
        tell = Told(stack.enter_context(display), journal)
        try:
            yield tell
        except BaseException as error:
            tell.note("failed", error=first_line(error))
            raise


def _display(progress: Wanted) -> AbstractContextManager[Progress]:
    if progress is not None and not isinstance(progress, bool):
        if not callable(progress):
            raise InputError(
                f"progress must be True, False, None or a function of (phase, done, total), not {progress!r}."
            )
        return nullcontext(progress)
    if progress is False or (progress is None and _INSIDE.get()):
        return nullcontext(silent)
    return bars() or nullcontext(Lines(_on_stderr if progress else _log.info))


def _on_stderr(text: str) -> None:
    if sys.stderr is not None:
        sys.stderr.write(text + "\n")
        sys.stderr.flush()


def _clock(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds)))
