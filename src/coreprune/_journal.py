"""The log of a run for programs: a file with one JSON object per line."""

from __future__ import annotations

import json
import logging
import math
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

from coreprune._files import refused
from coreprune.errors import InputError

_log = logging.getLogger(__name__)
_EVERY = 1.0  # seconds between two rows of a phase that have nothing but progress to say


def opened(path: object) -> TextIO:
    """The file, to append to; folders are made. Raises InputError for no path, and ArtifactError if the disk refuses.

    Its buffer is one line: whoever reads along, and whoever reads after a kill, finds whole lines.
    """
    if not isinstance(path, (str, Path)) or not str(path):
        raise InputError(f"log must be the path of a file, not {path!r}.")
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        return path.open("a", encoding="utf-8", buffering=1)
    except OSError as error:
        raise refused(path, error) from error


def line(**row: Any) -> str:
    """A row with the time, as one line. Numbers that JSON does not have, such as infinity, become null."""
    return json.dumps({"time": round(time.time(), 3), **_finite(row)}, ensure_ascii=False) + "\n"


def append(path: object, **row: Any) -> None:
    """Append one row to the file. Raises as `opened` does."""
    try:
        with opened(path) as file:
            file.write(line(**row))
    except OSError as error:
        raise refused(Path(str(path)), error) from error


@dataclass(eq=False)
class Journal:
    """Writes rows with what happens. If the disk refuses one, a warning is logged and the file is left as it is."""

    file: TextIO
    _began: float = field(default_factory=time.monotonic)
    _last: dict[str, float] = field(default_factory=dict)
    _works: bool = True

    def step(self, phase: str, done: int, total: int, **figures: float) -> None:
        """Progress of a phase. Without figures: its first row, its last one, and at most one a second between them."""
        now = time.monotonic()
        if figures or done >= total or now - self._last.get(phase, -math.inf) >= _EVERY:
            self._last[phase] = now
            self.note(phase, done=done, total=total, **figures)

    def note(self, phase: str, **figures: Any) -> None:
        """A row with the time, the phase, these figures, and the seconds since the log was opened."""
        if not self._works:
            return
        try:
            self.file.write(line(phase=phase, **figures, seconds=round(time.monotonic() - self._began, 3)))
        except OSError as error:  # hours of work are worth more than their log
            self._works = False
            _log.warning("%s", refused(Path(self.file.name), error))


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
