"""Measure how long models take. They run in turn, so that a disturbance of the machine affects all of them equally."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from html import escape
from time import perf_counter
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from coreprune._batch_trials import batch_axes
from coreprune._example import device_of, normalise_example
from coreprune._shown import html_table
from coreprune._timing import describe, interleaved, wait
from coreprune._twin import quiet
from coreprune.errors import InputError, ModelError, first_line
from coreprune.graph.ops import OPERATIONS, UNKNOWN, op_name

_SHORTFALL = 0.8  # a speed-up below this share of the MACs' ratio is explained
_TAKEN = ("batch", "speedup", "repeats")  # the other keys of a row, which no model may have as its name

Inputs = tuple[tuple[Any, ...], dict[str, Any]]


@dataclass(frozen=True)
class Timing:
    """The seconds that one call takes: the median, and the lower and upper quartiles."""

    median: float
    low: float
    high: float


@dataclass(frozen=True)
class LatencyRow:
    """The timings at one batch size.

    batch: samples per call. timings: by the names of the models, in the order given. repeats: how many calls were timed
    for each.
    """

    batch: int
    timings: Mapping[str, Timing]
    repeats: int

    @property
    def speedup(self) -> float:
        """The median of the first model divided by that of the last. It is above 1 if the last one is faster."""
        timings = list(self.timings.values())
        return timings[0].median / timings[-1].median

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON. "speedup" is included if there is more than one model."""
        timings = {name: asdict(t) for name, t in self.timings.items()}
        ratio = {"speedup": self.speedup} if len(timings) > 1 else {}
        return {"batch": self.batch, **timings, **ratio, "repeats": self.repeats}


@dataclass(frozen=True)
class Latency:
    """The result of `measure_latency`.

    device: the device that the models ran on. threads: how many threads torch used on the CPU. rows: one for each batch
    size. note: which batch sizes are missing and why, and why a speed-up is smaller than the reduction of MACs. Empty
    if there is nothing to say.
    """

    device: str
    threads: int
    rows: tuple[LatencyRow, ...]
    note: str = ""

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON, with times in seconds."""
        return {
            "device": self.device,
            "threads": self.threads,
            "rows": [row.as_dict() for row in self.rows],
            "note": self.note,
        }

    def __str__(self) -> str:
        """A table in milliseconds, with the median and quartiles of every model, and the speed-up."""
        cells = self._cells()
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        lines = ["  ".join(cell.rjust(w) for cell, w in zip(line, widths, strict=True)) for line in cells]
        return "\n".join([self._where(), *lines, *([self.note] if self.note else [])])

    def _repr_html_(self) -> str:
        """The same for a notebook."""
        head, *rows = self._cells()
        note = f"<p>{escape(self.note)}</p>" if self.note else ""
        return f"<div><p>{escape(self._where())}</p>{html_table(head, rows, 'time of a call', ())}{note}</div>"

    def _where(self) -> str:
        return f"{self.device}, {self.threads} thread{'s' if self.threads > 1 else ''}; median (quartiles) of a call"

    def _cells(self) -> list[list[str]]:
        names = list(self.rows[0].timings)
        cells = [["batch", *names, *(["speed-up"] if len(names) > 1 else [])]]
        for row in self.rows:
            times = [f"{1e3 * t.median:,.2f} ms ({1e3 * t.low:,.2f}–{1e3 * t.high:,.2f})" for t in row.timings.values()]
            cells.append([str(row.batch), *times, *([f"{row.speedup:.2f}×"] if len(names) > 1 else [])])
        return cells


def measure_latency(
    models: nn.Module | Mapping[str, nn.Module],
    example: Any,
    *,
    batch_sizes: Sequence[int] = (1, 32),
    seconds: float = 1.0,
    min_repeats: int = 5,
    batch_axis: Any = "auto",
) -> Latency:
    """Time the models in turn (A B A B …), in evaluation mode and without gradients.

    models: one model, or several by name, all on the example's device. They are left as they were.
    example: a tensor, a tuple of positional or a dict of keyword arguments. Batches repeat its samples along the batch
        axis. A model without a batch is timed on the whole example, which counts as one sample.
    batch_sizes: samples per call. There is a row for each size. A size that some model does not run with is left out,
        with a note.
    seconds: how long to time every model at every batch size, after a warm-up that lasts until the times are stable.
    min_repeats: how many calls to time at least, however long they take.
    batch_axis: which axis of the inputs holds the samples, as for `prune`.

    Raises InputError for wrong arguments, or if the models run with none of the batch sizes. Raises ModelError if a
    model does not run on the example itself.
    """
    named = {"model": models} if isinstance(models, nn.Module) else dict(models)
    _check(named, batch_sizes, seconds, min_repeats)
    inputs = normalise_example(example)
    if not any(x.dim() and len(x) for x in pytree.tree_leaves(inputs) if isinstance(x, Tensor)):
        raise InputError(
            "the example holds no tensor with samples along axis 0, so there is nothing to make batches of."
        )
    axes, device = batch_axes(next(iter(named.values())), inputs, batch_axis), device_of(next(iter(named.values())))
    own = axes.size(inputs)
    batch_sizes = (1,) if axes.whole else batch_sizes
    rows, missing = [], {}
    with ExitStack() as stack:
        named = {name: stack.enter_context(quiet(m, own_inputs=False)) for name, m in named.items()}
        for batch in batch_sizes:
            args, kwargs = axes.repeated(inputs, batch)
            calls = [lambda m=m, a=args, k=kwargs: m(*a, **k) for m in named.values()]
            try:
                times = interleaved(calls, seconds, min_repeats, lambda: wait(device))
            except Exception as error:  # a model may raise anything; the note shows it to the user
                missing[batch] = first_line(error)
                continue
            timings = {name: _timing(t) for name, t in zip(named, times, strict=True)}
            rows.append(LatencyRow(batch, timings, len(times[0])))
        if missing:
            _check_runs(named, inputs)
    if not rows:
        raise InputError(
            f"the models run on the example with its {own} samples, but not with "
            + ", ".join(f"{batch} ({why})" for batch, why in missing.items())
            + f". Pass batch_sizes=({own},)."
        )
    note = " ".join(f"Batch {batch} is left out: {why}." for batch, why in missing.items())
    return Latency(describe(device), torch.get_num_threads(), tuple(rows), note)


def compare_latency(
    before: nn.Module,
    after: nn.Module,
    example: Any,
    *,
    macs: tuple[int, int] | None = None,
    batch_sizes: Sequence[int] = (1, 32),
    seconds: float = 1.0,
    min_repeats: int = 5,
    batch_axis: Any = "auto",
) -> Latency:
    """Time a model and its pruned copy in turn, and explain a speed-up that falls short of the reduction of MACs.

    macs: the MACs of one sample, before and after, as in `Report.macs`. Where a speed-up is below 0.8 times their
        ratio, both models run again with a clock on every operation. The note then says which share of the time the
        convolutions and matrix products take, and how much faster they and the rest became. Without `macs`, nothing is
        explained.

    Other arguments and errors are as in `measure_latency`.
    """
    axes = batch_axes(before, normalise_example(example), batch_axis)
    found = measure_latency(
        {"before": before, "after": after},
        example,
        batch_sizes=batch_sizes,
        seconds=seconds,
        min_repeats=min_repeats,
        batch_axis=axes,
    )
    if macs is None:
        return found
    inputs = normalise_example(example)
    wanted = macs[0] / max(macs[1], 1)
    notes = [found.note] if found.note else []
    device = device_of(before)
    slow = [row for row in found.rows if row.speedup < _SHORTFALL * wanted]
    with quiet(before, own_inputs=False) as still, quiet(after, own_inputs=False) as small:
        for row in slow:
            batch = axes.repeated(inputs, row.batch)
            notes.append(_shortfall(row, wanted, *(_by_operation(m, batch, device) for m in (still, small))))
    if slow:
        notes += _odd_widths(before, after)
    return replace(found, note=" ".join(notes))


def _timing(seconds: Sequence[float]) -> Timing:
    low, median, high = np.quantile(seconds, (0.25, 0.5, 0.75)).tolist()
    return Timing(median, low, high)


def _shortfall(row: LatencyRow, wanted: float, before: Mapping[str, float], after: Mapping[str, float]) -> str:
    """An explanation for a row whose speed-up falls short. before, after: seconds by operation."""
    text = f"At batch {row.batch} it is {row.speedup:.2f}× as fast, with {wanted:.2f}× fewer MACs."
    a, b = row.timings.values()
    if a.low <= b.high and b.low <= a.high:
        text += " The quartiles of the two overlap: the difference is within the noise."
    products, products_after = (sum(t for n, t in ops.items() if _product(n)) for ops in (before, after))
    rest, rest_after = sum(before.values()) - products, sum(after.values()) - products_after
    if min(products, products_after, rest, rest_after) <= 0:
        return text
    share = products / (products + rest)
    text += f" Convolutions and matrix products take {share:.0%} of the original's time and became "
    text += f"{products / products_after:.2f}× as fast"
    largest = sorted((n for n in before if not _product(n)), key=lambda n: -before[n])[:3]
    return f"{text}; the rest became {rest / rest_after:.2f}× as fast (mostly {', '.join(largest)})."


class _Stopwatch(TorchDispatchMode):
    """While active, adds up the seconds of every ATen operation, by its name."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.device = device
        self.seconds: dict[str, float] = defaultdict(float)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        wait(self.device)
        start = perf_counter()
        out = func(*args, **(kwargs or {}))
        wait(self.device)
        self.seconds[op_name(func)] += perf_counter() - start
        return out


def _by_operation(model: nn.Module, inputs: Inputs, device: torch.device, runs: int = 3) -> dict[str, float]:
    """The seconds of `runs` calls by ATen operation, after one call to warm up."""
    args, kwargs = inputs
    model(*args, **kwargs)
    with _Stopwatch(device) as stopwatch:
        for _ in range(runs):
            model(*args, **kwargs)
    return dict(stopwatch.seconds)


def _product(name: str) -> bool:
    return OPERATIONS.get(name, UNKNOWN).product


def _odd_widths(before: nn.Module, after: nn.Module) -> list[str]:
    """A sentence about the pruned weights whose new width is not a multiple of 8, if there are any."""
    old = dict(before.named_parameters())
    cut = [(p.shape, old[n].shape) for n, p in after.named_parameters() if n in old and p.shape != old[n].shape]
    cut = [pair for pair in cut if len(pair[0]) > 1]
    odd = [new for new, was in cut if any(x != y and x % 8 for x, y in zip(new, was, strict=True))]
    if not odd:
        return []
    return [f"{len(odd)} of {len(cut)} cut weights have a width that is no multiple of 8; round_to=8 rounds it."]


def _check_runs(models: Mapping[str, nn.Module], inputs: Inputs) -> None:
    for name, model in models.items():
        try:
            model(*inputs[0], **inputs[1])
        except Exception as error:
            raise ModelError(
                f"{name!r} does not run on the example: {first_line(error)}. "
                "Check that the example is what its forward expects, on the same device."
            ) from error


def _check(models: Mapping[str, Any], batch_sizes: Sequence[int], seconds: float, min_repeats: int) -> None:
    wrong = [name for name, m in models.items() if not isinstance(m, nn.Module)]
    if not models or wrong:
        raise InputError(f"models must be an nn.Module or several by name, but {wrong or 'none'} is given.")
    if taken := set(models) & set(_TAKEN):
        raise InputError(f"a model cannot be called {', '.join(sorted(taken))}; choose another name.")
    whole = all(isinstance(b, int) and not isinstance(b, bool) and b > 0 for b in (*batch_sizes, min_repeats))
    if not batch_sizes or not whole or not seconds >= 0:
        raise InputError(
            "batch_sizes and min_repeats must be whole numbers ≥ 1 and seconds ≥ 0, e.g. batch_sizes=(1, 32), but they "
            f"are {tuple(batch_sizes)}, {min_repeats!r} and {seconds!r}."
        )
