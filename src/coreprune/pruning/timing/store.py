"""A file of measured times, which later runs on the same machine read instead of measuring again."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from coreprune._files import whole_file
from coreprune.errors import ArtifactError, InputError, first_line

log = logging.getLogger(__name__)

SCHEMA = 1


@dataclass
class Store:
    """The times of one environment. seconds: by a text that says what was timed.

    path: the file, which may hold those of other environments, too. where: the environment as text, such as
    "processor, 2 threads, torch 2.9". added: how many times were added. writable: whether the disk takes them.
    """

    path: Path
    where: str
    seconds: dict[str, float] = field(default_factory=dict)
    added: int = 0
    writable: bool = True

    @classmethod
    def open(cls, path: str | Path | None, where: str) -> Store:
        """Read a file, if it is there.

        path: None for the user's cache folder, where a file that cannot be read is replaced.

        Raises InputError for a file that the caller named and that holds something else.
        """
        place = default_path(where) if path is None else Path(path)
        try:
            return cls(place, where, _read(place).get(where, {}))
        except InputError as error:
            if path is not None:
                raise
            log.warning("%s Its times are measured again, and it is replaced.", error)
            return cls(place, where)

    def put(self, seconds: Mapping[str, float]) -> None:
        """Add times, and write the file. A disk that refuses costs the next run time, and this one nothing."""
        self.seconds.update(seconds)
        self.added += len(seconds)
        if not self.writable:
            return
        try:
            everything = _read(self.path)
        except InputError:
            everything = {}
        everything[self.where] = {**everything.get(self.where, {}), **self.seconds}
        try:
            with whole_file(self.path) as temporary:
                temporary.write_text(json.dumps({"schema": SCHEMA, "seconds": everything}, indent=1), encoding="utf-8")
        except ArtifactError as error:
            self.writable = False
            log.warning("measured times are not kept for later runs: %s", error)


def default_path(where: str) -> Path:
    """The file for an environment in the user's cache folder."""
    told = os.environ.get("XDG_CACHE_HOME", "")
    folder = Path(told) if Path(told).is_absolute() else Path.home() / ".cache"  # as the XDG specification says
    return folder / "coreprune" / f"latency-{hashlib.sha256(where.encode()).hexdigest()[:12]}.json"


def _read(path: Path) -> dict[str, dict[str, float]]:
    """The times by environment; empty if there is no file. Raises InputError for anything else than such a file."""
    try:
        raw: Any = json.loads(path.read_text(encoding="utf-8"))
        if raw["schema"] != SCHEMA:
            raise ValueError(f"schema {raw['schema']!r}")
        found = {str(where): dict(times) for where, times in raw["seconds"].items()}
        if not all(_is_time(t) for times in found.values() for t in times.values()):
            raise ValueError("times that are no numbers above 0")
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise InputError(
            f"{path} is no file of measured times ({first_line(error)}). Name another file, or delete it."
        ) from error
    return found


def _is_time(t: Any) -> bool:
    return type(t) in (int, float) and math.isfinite(t) and t > 0
