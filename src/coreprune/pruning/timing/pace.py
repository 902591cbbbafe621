"""Budgets of time: widths by a table of measured times, corrected by the time of the whole model until that is met."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from coreprune import _timing
from coreprune._example import device_of
from coreprune._progress import Progress
from coreprune._runtimes import check_runtime, runner, versions_of
from coreprune.errors import BudgetError
from coreprune.graph import Traced, remove
from coreprune.pruning.allocation.budget import Budget
from coreprune.pruning.allocation.durations import as_time, seconds_of
from coreprune.pruning.allocation.ladders import channels_of, ladder_of, nothing_free
from coreprune.pruning.allocation.spending import CostFunction
from coreprune.pruning.plans.plan import fingerprint
from coreprune.pruning.timing.calls import calls_of
from coreprune.pruning.timing.line import Line, Point
from coreprune.pruning.timing.models import as_stored, as_timed, at_batch, first_units, timed_dtypes
from coreprune.pruning.timing.store import Store
from coreprune.pruning.timing.table import Clock, LatencyTable, measured_table

log = logging.getLogger(__name__)

_CORRECTIONS = 5
_AIM = 0.98  # of the limit: two measurements of one model differ by about this much
_CLOSE = 0.95  # a model that takes at least this share of the limit is not widened any more
_WHOLE = (1.0, 7)  # seconds and calls that each of two models is timed for
_PIECE = (0.004, 5)  # the same for an operation

Widths = Mapping[str, int]  # units per section that stay, by name of a free group


@dataclass(frozen=True)
class MetLatency:
    """How a budget of time was met. Times are in seconds.

    limit: of one call. before, after: medians of the dense and the pruned model, timed in turn. predicted: what the
    table, with what was known of the whole model by then, said of the pruned one. corrections: how often widths were
    chosen again because of a measurement. batch: samples per call. runtime: "eager", "compile" or "onnx". device,
    threads: what it ran on. table: the file of times. timed: how many operations were timed for it in this run, at some
    widths; 0 if all times were known.
    """

    limit: float
    before: float
    after: float
    predicted: float
    corrections: int
    batch: int
    runtime: str
    device: str
    threads: int
    table: str
    timed: int


@dataclass(eq=False)
class Pace:
    """A budget of time for one model: its table, and what is known of the time of the whole so far.

    traced: the dense model, on whose machine times are measured. inputs: of one call. line: its times are shares of the
    dense model's time if the budget is a share, otherwise seconds.
    """

    traced: Traced
    budget: Budget
    inputs: tuple[tuple[Any, ...], dict[str, Any]]
    table: LatencyTable
    store: Store
    clock: Clock
    line: Line
    before: float = 0.0
    _dense: Callable[[], Any] | None = None

    def met(
        self, traced: Traced, allocated: Callable[[Budget, CostFunction], Widths], budget: Budget
    ) -> tuple[Budget, MetLatency]:
        """The budget on the table with which the whole is within the limit, and what was measured.

        traced: the model; groups that had to stay whole are locked in it. allocated: gives widths for a budget of cost.
        budget: how widths are chosen (`uniform`, `min_width`, `round_to`).

        Raises BudgetError if no model within the limit was found.
        """
        least = self._reached(traced, budget)
        best: tuple[Point, Budget, MetLatency] | None = None
        tried: dict[tuple[tuple[str, int], ...], Point] = {}
        target, aim, corrections = self.line.target(_AIM, least.table, self._dense_cost), _AIM, 0
        while True:
            limited = _on_table(budget, target)
            widths = allocated(limited, self.table)
            key = tuple(sorted(widths.items()))
            new = key not in tried
            if new:
                cost = self.table(self._channels(traced, widths))
                told = self._seconds(self.line.predicted(cost))
                point, before, after = self._timed(traced, widths, cost)
                tried[key] = point
                log.info("table %s, predicted %s, measured %s", as_time(cost), as_time(told), as_time(after))
                if self.line.met(point) and (best is None or point.table > best[0].table):
                    best = (point, limited, self._found(before, after, told, corrections))
            if best is not None and (
                not new or best[0].time >= _CLOSE * self.line.limit or self._whole(traced, widths)
            ):
                break
            if corrections == _CORRECTIONS:
                break
            corrections += 1
            aim = aim if new else aim * _AIM  # the ladders have no widths in between
            target = self.line.target(aim, least.table, self._dense_cost)
        if best is None:
            closest = min(p.time for p in (*tried.values(), least))
            raise BudgetError(
                f"after {_CORRECTIONS} corrections no widths were found with which a call takes at most "
                f"{self._said(self.line.limit)}; the least that was reached is {self._said(closest)}. Raise the "
                "budget, or measure on a machine that does nothing else."
            )
        return best[1], replace(best[2], corrections=corrections)

    def check(self) -> None:
        """Raise BudgetError if even the narrowest model takes too long. This runs before queries are made.

        The times of the dense and the narrowest model are kept in the table's file: where they are known, later runs
        start from the very same line, and so from the same widths. Whether the result is within the limit is measured
        in every run.
        """
        about = f"model {fingerprint(self.traced.model)} {self._shapes()}"
        keys = [f"{about} dense", f"{about} {self._rules()}"]
        dense, least = (self.store.seconds.get(key) for key in keys)
        if dense is not None and least is not None:
            self._note_dense(dense)
            self.line.points.append(Point(self.table(self._least(self.traced, self.budget)), self._time(least, dense)))
            self._reached(self.traced, self.budget)
            return
        point = self._reached(self.traced, self.budget)
        self.store.put(dict(zip(keys, (self.before, self._seconds(point.time)), strict=True)))

    def _rules(self) -> str:
        free = f"{len(self.traced.free)} groups at their least widths"
        return f"{free}, min_width={self.budget.min_width}, round_to={self.budget.round_to}"

    def _shapes(self) -> str:
        return " ".join(str(tuple(x.shape)) for x in pytree.tree_leaves(self.inputs) if isinstance(x, Tensor))

    def _time(self, seconds: float, before: float) -> float:
        """Seconds in the unit of the line. before: those of the dense model."""
        return seconds if isinstance(self.budget.latency, str) else seconds / before

    def _seconds(self, time: float) -> float:
        return time if isinstance(self.budget.latency, str) else time * self.before

    def _note_dense(self, seconds: float) -> None:
        self.before = seconds
        if not any(p.table == self._dense_cost for p in self.line.points):
            self.line.points.append(Point(self._dense_cost, self._time(seconds, seconds)))

    def _least(self, traced: Traced, budget: Budget) -> dict[str, int]:
        """The least channels of every free group."""
        return {name: ladder_of(budget, g)[0] * channels_of(g) for name, g in traced.free.items()}

    def _reached(self, traced: Traced, budget: Budget) -> Point:
        """The narrowest model. Raises BudgetError if it takes too long."""
        widths = {name: ladder_of(budget, g)[0] for name, g in traced.free.items()}
        cost = self.table(self._channels(traced, widths))
        if (known := self.line.within(cost)) is not None:
            return replace(known, table=cost)
        point = self._timed(traced, widths, cost)[0]
        if not self.line.met(point):
            nothing = "" if traced.free else " " + nothing_free(list(traced.groups))
            raise BudgetError(
                f"latency={self.budget.latency!r} allows {self._said(self.line.limit)} for a call of the model, but "
                f"with every free group at its least width it still takes {self._said(point.time)}, the least that "
                f"was reached.{nothing} Raise the budget, or lower min_width or round_to."
            )
        return point

    def _timed(self, traced: Traced, widths: Widths, cost: float) -> tuple[Point, float, float]:
        """Cut to these widths, and time the whole in turn with the dense model. Returns the medians of both, too."""
        keep = {name: first_units(traced.free[name], width) for name, width in widths.items()}
        small = remove(traced, keep).model
        with as_stored(self.traced.model, self.traced) as dense, as_stored(small, self.traced) as cut:
            runtime = self.budget.runtime
            first = self._dense or runner(runtime, dense, self.inputs)
            if runtime != "eager":
                self._dense = first  # a program of its own, which need not be compiled again
            before, after = self.clock([first, runner(runtime, cut, self.inputs)])
        self._note_dense(before)
        point = Point(cost, self._time(after, before))
        self.line.points.append(point)
        return point, before, after

    @property
    def _dense_cost(self) -> float:
        return self.table({})

    def _channels(self, traced: Traced, widths: Widths) -> dict[str, int]:
        return {name: width * channels_of(traced.free[name]) for name, width in widths.items()}

    def _whole(self, traced: Traced, widths: Widths) -> bool:
        return all(n == traced.free[name].size for name, n in self._channels(traced, widths).items())

    def _said(self, time: float) -> str:
        if isinstance(self.budget.latency, str):
            return as_time(time)
        return f"{as_time(time * self.before)} ({time:.1%} of the dense model's {as_time(self.before)})"

    def _found(self, before: float, after: float, predicted: float, corrections: int) -> MetLatency:
        device = device_of(self.traced.model)
        return MetLatency(
            limit=self._seconds(self.line.limit),
            before=before,
            after=after,
            predicted=predicted,
            corrections=corrections,
            batch=self.budget.batch,
            runtime=self.budget.runtime,
            device=_timing.describe(device),
            threads=torch.get_num_threads(),
            table=str(self.store.path),
            timed=self.store.added,
        )


def pace_of(
    budget: Budget, traced: Traced, tell: Progress, piece: Clock | None = None, whole: Clock | None = None
) -> Pace | None:
    """Time what a budget of time needs; None for any other budget.

    piece, whole: the clocks for single operations and for models; by default those of this machine.

    Raises BudgetError if the budget is out of reach, and InputError if the model does not run as the budget asks.
    """
    if budget.latency is None:
        return None
    if not traced.free:
        raise BudgetError(nothing_free(list(traced.groups)))
    device = device_of(traced.model)
    check_runtime(budget.runtime, device)
    captured, dtypes = at_batch(traced, budget.batch), timed_dtypes(traced)
    store = Store.open(budget.table, _where(budget, device))
    least = {name: ladder_of(budget, g)[0] * channels_of(g) for name, g in traced.free.items()}
    calls = calls_of(captured, traced.groups, budget.runtime, dtypes)
    piece, whole = piece or _clock(device, *_PIECE), whole or _clock(device, *_WHOLE)
    table = measured_table(calls, traced.groups, least, budget.runtime, device, store, piece, tell)
    if not table.entries:
        raise BudgetError(
            "none of the operations whose widths may change can be timed, so no time can be a budget. Limit macs."
        )
    limit = seconds_of(budget.latency) if isinstance(budget.latency, str) else float(budget.latency)
    inputs = pytree.tree_map_only(Tensor, lambda x: as_timed(x, dtypes), (captured.args, captured.kwargs))
    pace = Pace(traced, budget, inputs, table, store, whole, Line(limit))
    pace.check()
    return pace


def _clock(device: torch.device, seconds: float, repeats: int) -> Clock:
    return lambda calls: _timing.medians(calls, device, seconds, repeats)


def _on_table(budget: Budget, seconds: float) -> Budget:
    """The same rules for widths, with so many seconds of the table as the limit."""
    return replace(budget.sized("cost", seconds), absolute=True)


def _where(budget: Budget, device: torch.device) -> str:
    """What times depend on besides the operations themselves."""
    import platform

    threads = f"{torch.get_num_threads()} threads"
    versions = [f"{name} {v}" for name, v in versions_of(budget.runtime).items()]
    python = f"python {platform.python_version()}"
    return ", ".join([_timing.processor(device), threads, *versions, python, budget.runtime])
