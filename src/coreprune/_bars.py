"""Bars with the time left, drawn by rich: on standard error in a terminal, in a cell of a notebook."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, Any

from coreprune._progress import Progress

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress as Bars
    from rich.progress import TaskID

_REDRAWN = 0.2  # seconds between two pictures in a notebook


def bars() -> AbstractContextManager[Progress] | None:
    """Bars for where we are. None where nobody would see them: no terminal, no rich, or bars of somebody else."""
    try:
        from rich.console import Console
        from rich.file_proxy import FileProxy
    except ImportError:
        return None
    console = Console(file=sys.stderr)  # this one, whoever puts another in its place for a while
    if console.is_jupyter:
        return _in_a_notebook()
    if isinstance(sys.stderr, FileProxy) or not _is_a_terminal(sys.stderr):
        return None
    return _in_a_terminal(console) if console.is_interactive else None


@contextmanager
def _in_a_terminal(console: Console) -> Iterator[Progress]:
    """A bar per phase until all is done; then they vanish. Printed lines appear above them."""
    with _bars(console=console, transient=True, redirect_stdout=_is_a_terminal(sys.stdout)) as shown:
        yield _told(shown)


@contextmanager
def _in_a_notebook() -> Iterator[Progress]:
    """One output of the cell, which is drawn again as the work goes on. It stays when all is done."""
    from IPython.display import display  # pyright: ignore[reportMissingImports]

    shown = _bars()  # never started: it has no terminal to draw in
    tell, place, last = _told(shown), None, time.monotonic()

    def drawn(phase: str, done: int, total: int) -> None:
        nonlocal place, last
        tell(phase, done, total)
        if place is None:
            place = display(shown, display_id=True)
        elif time.monotonic() - last >= _REDRAWN:
            place.update(shown)
            last = time.monotonic()

    try:
        yield drawn
    finally:
        if place is not None:
            place.update(shown)


def _bars(**options: Any) -> Bars:
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
    from rich.progress import Progress as Bars

    columns = (
        TextColumn("{task.description:<10}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    return Bars(*columns, **options)


def _told(shown: Bars) -> Progress:
    """tell(phase, done, total), which moves the bar of that phase. A phase that begins again has its clock set back."""
    tasks: dict[str, TaskID] = {}

    def tell(phase: str, done: int, total: int) -> None:
        if phase not in tasks:
            tasks[phase] = shown.add_task(phase, total=total)
        elif done < next(task.completed for task in shown.tasks if task.id == tasks[phase]):
            shown.reset(tasks[phase])
        shown.update(tasks[phase], completed=done, total=total)

    return tell


def _is_a_terminal(stream: Any) -> bool:
    """Whether a stream is one. There may be none at all, or one that cannot say."""
    ask: Callable[[], bool] | None = getattr(stream, "isatty", None)
    try:
        return ask is not None and ask()
    except ValueError:  # closed
        return False
