"""One process per measurement, so that memory is its own and a failure costs one row; a journal of finished rows."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Row = dict[str, Any]


def memory() -> dict[str, float]:
    """Resident memory now and at its peak in MiB, of this process alone (Linux; elsewhere empty).

    own: the part of it that no file backs, now. The system can drop pages of files when memory is short.
    """
    status = Path("/proc/self/status")
    if not status.exists():
        return {}
    fields = dict(line.split(":", 1) for line in status.read_text().splitlines())
    found = {name: int(value.split()[0]) / 1024 for name, value in fields.items() if value.strip().endswith("kB")}
    return {"now": found["VmRSS"], "peak": found["VmHWM"], "own": found["RssAnon"] + found["RssShmem"]}


class Sampled:
    """The peak of the memory that no file backs, in MiB, looked at 20 times a second."""

    def __enter__(self) -> Sampled:
        self.peak = memory().get("own", 0.0)
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _look(self) -> None:
        while not self._over.wait(0.05):
            self.peak = max(self.peak, memory().get("own", 0.0))


def measured(work: Callable[[], Any]) -> tuple[Any, Row]:
    """What `work` returns, with its seconds and the peak of the process's memory meanwhile."""
    with contextlib.suppress(OSError):  # forget earlier peaks, where the kernel lets us
        Path("/proc/self/clear_refs").write_text("5")
    before, start = memory(), time.perf_counter()
    with Sampled() as own:
        value = work()
    seconds, after = time.perf_counter() - start, memory()
    found: Row = {"wall_s": round(seconds, 2)}
    if after:
        found |= {"memory_before_mib": round(before["now"]), "peak_memory_mib": round(after["peak"])}
        found["peak_own_mib"] = round(own.peak)
    return value, found


def in_child(script: str, job: Row, limit: float, threads: int) -> Row:
    """Run `script --job JSON` and read the row that it prints last; a failure is a row with "error"."""
    command = [sys.executable, script, "--job", json.dumps(job)]
    env = {**os.environ, "OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=limit, env=env, check=False)
    except subprocess.TimeoutExpired:
        return {"error": f"no result after {limit:g} s"}
    try:
        row = json.loads(done.stdout.splitlines()[-1])
    except (IndexError, ValueError):
        row = None
    if isinstance(row, dict):
        return row
    last = [line for line in done.stderr.splitlines() if line.strip()][-1:]
    return {"error": f"the process ended with {done.returncode}: {' '.join(last)[:300]}"}


def answer(work: Callable[[Row], Row], job: str) -> None:
    """The child's side of `in_child`: print the row, or what went wrong and where."""
    try:
        row = work(json.loads(job))
    except Exception as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        text = " ".join(str(error).split())[:300]
        row = {"error": f"{type(error).__name__}: {text} ({Path(where.filename).name}, {where.name})"}
    print(json.dumps(row, default=str))


@dataclass(frozen=True)
class Journal:
    """Finished rows, one JSON line each. The last line of a key counts; a half-written one is no line."""

    path: Path

    def rows(self) -> dict[str, Row]:
        found = {}
        for line in self.path.read_text().splitlines() if self.path.exists() else ():
            try:
                row = json.loads(line)
            except ValueError:
                continue
            found[row["key"]] = row
        return found

    def add(self, row: Row) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a") as file:
            file.write(json.dumps(row) + "\n")
