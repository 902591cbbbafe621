"""A table of measured times: what the operations of a model take at any widths of its groups."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from coreprune._progress import Progress
from coreprune.errors import CoreprunError, first_line
from coreprune.graph import Extent, Group
from coreprune.pruning.timing.calls import Call, Lengths, lengths_between
from coreprune.pruning.timing.pieces import fits, prepared
from coreprune.pruning.timing.store import Store

log = logging.getLogger(__name__)

Array = np.ndarray
# The median seconds of every call, which run in turn.
Clock = Callable[[Sequence[Callable[[], Any]]], list[float]]

_SHARES = (0.0, 0.25, 0.5, 0.75, 1.0)  # of the way from the least to the full width
_FEW = (0.0, 0.5, 1.0)  # for a runtime in which every time costs a session
_AT_ONCE = 1 << 26  # numbers in the operands of the calls that are timed in turn
_MOST_AT_ONCE = 64  # calls


@dataclass(frozen=True, eq=False)
class Entry:
    """The times of one operation on a grid of lengths.

    axes: one or two extents that the time depends on, as (fixed, slopes). points: the lengths of each, ascending.
    seconds: (points,) or (points, points). count: how often the model has the operation.
    """

    axes: tuple[tuple[float, Mapping[str, float]], ...]
    points: tuple[Sequence[int | float], ...]
    seconds: Array
    count: int = 1


class LatencyTable:
    """The seconds of all operations at any widths: a cost for the allocation. Evaluated in tens of microseconds.

    Between the measured lengths the time is interpolated linearly, along both axes where two vary; beyond them it is
    that of the nearest one. A narrower operation never counts as slower than a wider one, which the same device can do
    instead.
    """

    def __init__(self, groups: Sequence[Group], entries: Sequence[Entry]) -> None:
        self.names = [g.name for g in groups]
        self.sizes = np.array([g.size for g in groups], dtype=np.float64)
        self.entries = len(entries)
        most = max((len(p) for e in entries for p in e.points), default=2)
        most = max(most, 2)
        columns = {name: i for i, name in enumerate(self.names)}
        self._fixed = np.zeros((2, len(entries)))
        self._slopes = np.zeros((2, len(entries), len(groups)))
        self._points = np.zeros((2, len(entries), most))
        self._seconds = np.zeros((len(entries), most, most))
        for i, entry in enumerate(entries):
            grid = entry.seconds if entry.seconds.ndim == 2 else entry.seconds[:, None]
            grid = _monotone(grid) * entry.count
            self._seconds[i] = np.pad(grid, [(0, most - n) for n in grid.shape], mode="edge")
            for axis in range(2):
                at = entry.points[axis] if axis < len(entry.points) else [0.0]
                self._points[axis, i] = [*at, *(at[-1] + 1 + np.arange(most - len(at)))]
                if axis < len(entry.axes):
                    self._fixed[axis, i], slopes = entry.axes[axis]
                    for name, slope in slopes.items():
                        self._slopes[axis, i, columns[name]] = slope

    def __call__(self, widths: Mapping[str, int], /) -> float:
        """The seconds. widths: channels by name; groups that are not named have their full size."""
        vector = np.array([widths.get(n, size) for n, size in zip(self.names, self.sizes, strict=True)])
        lengths = self._fixed + self._slopes @ vector  # (2, entries)
        at = (self._points[:, :, 1:-1] <= lengths[:, :, None]).sum(2)
        low, high = (np.take_along_axis(self._points, (at + k)[:, :, None], 2)[:, :, 0] for k in (0, 1))
        t, s = np.clip((lengths - low) / (high - low), 0.0, 1.0)
        i, (a, b), grid = np.arange(len(at[0])), at, self._seconds
        near = grid[i, a, b] * (1 - s) + grid[i, a, b + 1] * s
        far = grid[i, a + 1, b] * (1 - s) + grid[i, a + 1, b + 1] * s
        return float((near * (1 - t) + far * t).sum())


def _monotone(grid: Array) -> Array:
    """The least time at this length or any larger one, along both axes."""
    for axis in range(grid.ndim):
        grid = np.flip(np.minimum.accumulate(np.flip(grid, axis), axis), axis)
    return grid


def measured_table(
    calls: Sequence[Call],
    groups: Sequence[Group],
    least: Mapping[str, int],
    runtime: str,
    device: torch.device,
    store: Store,
    clock: Clock,
    tell: Progress,
) -> LatencyTable:
    """Time what the store does not have, and make the table.

    least: the least channels of every group, by name. Calls that torch refuses at some width are left out: their time
    is part of what the table does not say.
    """
    most = {g.name: g.size for g in groups}
    grids: list[tuple[Call, _Grid]] = []
    new: dict[str, tuple[Call, Lengths]] = {}
    for call in calls:
        grid = _Grid.of(call, {**most, **least}, most, _SHARES if runtime != "onnx" else _FEW)
        cells = [lengths for _, lengths in grid.cells()]
        if why := next((w for lengths in cells if (w := fits(call, lengths))), ""):
            log.info("%s is not timed: %s", call.key(cells[-1]), why)
            continue
        grids.append((call, grid))
        new |= {key: (call, x) for x in cells if (key := call.key(x)) not in store.seconds}
    _time_all(new, runtime, device, store, clock, tell)
    entries = []
    for call, grid in grids:
        keys = {at: call.key(lengths) for at, lengths in grid.cells()}
        if not set(keys.values()) <= store.seconds.keys():
            continue
        seconds = np.zeros([len(p) for p in grid.points])
        for at, key in keys.items():
            seconds[at] = store.seconds[key]
        entries.append(Entry(grid.axes, grid.points, seconds, call.count))
    return LatencyTable(groups, entries)


def _time_all(
    new: Mapping[str, tuple[Call, Lengths]],
    runtime: str,
    device: torch.device,
    store: Store,
    clock: Clock,
    tell: Progress,
) -> None:
    """Put the seconds of calls into the store, by key. As many take turns as their operands are not too large for."""
    waiting = list(new.items())
    while waiting:
        tell("latency", len(new) - len(waiting), len(new))
        part: dict[str, tuple[Call, Lengths]] = {}
        held = 0
        while waiting and (not part or (held + _numel(waiting[0]) <= _AT_ONCE and len(part) < _MOST_AT_ONCE)):
            held += _numel(waiting[0])
            key, cell = waiting.pop(0)
            part[key] = cell
        store.put(_seconds(part, runtime, device, clock))
    tell("latency", len(new), max(len(new), 1))


def _seconds(
    part: Mapping[str, tuple[Call, Lengths]], runtime: str, device: torch.device, clock: Clock
) -> dict[str, float]:
    """The seconds of calls, by key. Those that fail are missing."""
    try:
        times = clock(prepared(list(part.values()), device, runtime))
    except CoreprunError:
        raise
    except Exception as error:  # torch or the runtime may raise anything
        items = list(part.items())
        if len(items) > 1:
            halves = (dict(items[: len(items) // 2]), dict(items[len(items) // 2 :]))
            return {k: t for half in halves for k, t in _seconds(half, runtime, device, clock).items()}
        log.info("%s is not timed: %s", items[0][0], first_line(error))
        return {}
    return dict(zip(part, times, strict=True))


def _numel(item: tuple[str, tuple[Call, Lengths]]) -> int:
    call, lengths = item[1]
    return call.numel(lengths)


@dataclass(frozen=True, eq=False)
class _Grid:
    """Where a call is timed: along each of one or two extents; along all of them together, if there are more.

    along: for each axis of the grid, the lengths of extents at each of its points.
    """

    axes: tuple[tuple[float, Mapping[str, float]], ...]
    points: tuple[Sequence[int | float], ...]
    along: tuple[Sequence[Lengths], ...]

    @classmethod
    def of(cls, call: Call, least: Mapping[str, int], most: Mapping[str, int], shares: Sequence[float]) -> _Grid:
        found = list(lengths_between(call, least, most, shares))
        if len(found) <= 2:
            axes = tuple((float(e.fixed), dict(e.slopes)) for e, _ in found)
            return cls(axes, tuple(points for _, points in found), tuple([{e: n} for n in ns] for e, ns in found))
        extents = [e for e, _ in found]
        full = {e: e.at(most) for e in extents}
        steps = [{e: max(1, round(e.at(least) + share * (full[e] - e.at(least)))) for e in extents} for share in shares]
        mean = [float(np.mean([step[e] / full[e] for e in extents])) for step in steps]
        keep = [i for i in range(len(steps)) if i == 0 or mean[i] > mean[i - 1]]
        return cls((_mean(extents, full),), ([mean[i] for i in keep],), ([steps[i] for i in keep],))

    def lengths(self, at: tuple[int, ...]) -> Lengths:
        """The lengths at one cell."""
        return {e: n for steps, i in zip(self.along, at, strict=True) for e, n in steps[i].items()}

    def cells(self) -> Iterator[tuple[tuple[int, ...], Lengths]]:
        """All cells."""
        for at in np.ndindex(*(len(p) for p in self.points)):
            yield at, self.lengths(at)


def _mean(extents: Sequence[Extent], full: Mapping[Extent, int]) -> tuple[float, Mapping[str, float]]:
    """The mean share of the full lengths, as a linear function of widths."""
    n, slopes = len(extents), dict[str, float]()
    for e in extents:
        for name, slope in e.slopes:
            slopes[name] = slopes.get(name, 0.0) + slope / full[e] / n
    return sum(e.fixed / full[e] for e in extents) / n, slopes
