"""Find out which axis of the inputs holds the samples.

An axis holds samples if the model runs on one and on two of them, and computes for each what it computes for it alone.
Nodes of a graph, time steps and channels are none: they influence each other, or their number is fixed.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cached_property
from itertools import islice, product
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from coreprune._alive import enlivened
from coreprune._batch import BatchAxes, Inputs, said_axes, usual
from coreprune._example import random_like, reals
from coreprune._single import answering
from coreprune.errors import first_line

log = logging.getLogger(__name__)

AUTO = "auto"
_WAYS = 12  # to choose the axes of the other tensors for one axis of a tensor
_TRIALS = 40
_SEED = 0
# Differences relative to the largest output: below the first they are rounding, above the second they are not. What
# lies between is computed again with more digits.
_ROUNDING, _APART = 1e-5, {torch.float64: 1e-5, torch.float32: 3e-2}
_HALF_APART = 0.2  # the second of dtypes with 16 bits
_AGAIN, _NO_DIGITS = {torch.float64: 1e-9, torch.float32: 1e-4}, 1e-3
_FLIPPED = 0.02  # share of the whole numbers of an output that rounding may change


def batch_axes(model: nn.Module, inputs: Inputs, said: Any = AUTO) -> BatchAxes:
    """Which axis of the inputs holds the samples.

    model: it is not changed. inputs: (args, kwargs).
    said: "auto" finds it out: the axes along which the model runs with one and with two samples and gives the same
        outputs for them. A number is the axis of all tensors. A dict gives a number or None for each input, by its
        position or keyword; inputs that it does not name have no such axis. None: there is no batch. `BatchAxes` found
        before are taken as they are.

    Raises InputError if what was said does not fit the inputs.
    """
    if isinstance(said, BatchAxes):
        return said
    if isinstance(said, str) and said == AUTO:
        return _found(model, inputs)
    axes = said_axes(inputs, said)
    outputs = None if axes.whole else _Trials(model, inputs).outputs(axes)
    return axes if outputs is None else replace(axes, outputs=outputs)


def _found(model: nn.Module, inputs: Inputs) -> BatchAxes:
    """The axes that hold samples, by evidence."""
    likely = usual(inputs)
    if likely.whole:
        return likely
    trials = _Trials(model, inputs)
    for axes in trials.first():
        if (outputs := trials.outputs(axes)) is not None:
            return replace(axes, outputs=outputs)
    # A model that takes one sample, or a program exported for one size, does not run on others.
    if trials.never_ran and (likely.size(inputs) == 1 or isinstance(model, fx.GraphModule)):
        return likely
    for axes in trials.others():
        if (outputs := trials.outputs(axes)) is not None:
            log.info("the samples lie along the axes %s of the inputs", axes.inputs)
            return replace(axes, outputs=outputs)
    if not trials.example_runs():  # whoever runs it will say why
        return likely
    log.info("no axis of the inputs holds samples; a query is a whole example")
    return replace(likely, inputs=(None,) * len(likely.inputs))


class _Trials:
    """Runs of a model on one and on two samples along supposed axes.

    Weights that hide what is behind them, because they are all equal, such as a scale of zero, are replaced by random
    ones: a layer of attention that starts at zero would make time steps look like samples.
    """

    def __init__(self, model: nn.Module, inputs: Inputs) -> None:
        self.model = model
        self.leaves, self.tree = pytree.tree_flatten(inputs)
        self.never_ran = True
        self.count = 0

    @cached_property
    def _alive(self) -> dict[str, Tensor]:
        return enlivened(self.model)

    def first(self) -> Iterator[BatchAxes]:
        """Axis 0 of the first tensor that has axes."""
        return self._ways(self._leads()[0], 0)

    def others(self) -> Iterator[BatchAxes]:
        """The other axes of that tensor, then those of the other tensors."""
        leads = self._leads()
        for lead in leads:
            for axis in range(self.leaves[lead].dim()):
                if (lead, axis) != (leads[0], 0):
                    for axes in self._ways(lead, axis):
                        if self.count < _TRIALS:
                            yield axes

    def _leads(self) -> list[int]:
        return [i for i, x in enumerate(self.leaves) if isinstance(x, Tensor) and x.dim()]

    def _ways(self, lead: int, axis: int) -> Iterator[BatchAxes]:
        """The axes of the other tensors that may go with this one: first the same, if it is as long.

        If the samples lie along axis 0, the first guess is that tensors of another length have none.
        """
        length, options = self.leaves[lead].shape[axis], []
        for i, x in enumerate(self.leaves):
            alike = [a for a, n in enumerate(x.shape) if n == length] if isinstance(x, Tensor) else []
            likely = [axis] if axis in alike else [None] * (axis == 0)
            options.append([axis] if i == lead else list(dict.fromkeys([*likely, *alike, None])))
        return (BatchAxes(tuple(way)) for way in islice(product(*options), _WAYS))

    def outputs(self, axes: BatchAxes) -> tuple[int | None, ...] | None:
        """The axes of the outputs that hold the samples; None if the inputs hold none along `axes`.

        Whole numbers and 0-dimensional outputs (losses) may depend on all samples, and so may what has an axis for
        each of two samples, such as similarities.
        """
        self.count += 1
        for style in ("drawn", "uniform", "own"):
            two = self._samples(axes, style)
            try:
                runs = self._three(axes, two)
            except Exception as error:  # a model may raise anything
                log.debug("no samples along %s: %s", axes.inputs, first_line(error))
                if style == "own":
                    return None
                continue
            self.never_ran = False
            if style == "own" or any(bool(torch.isfinite(x).any()) for x in runs[0]):
                return self._verdict(axes, two, runs)
        return None

    def example_runs(self) -> bool:
        """Whether the model runs on the example."""
        try:
            self._run(self.leaves)
        except Exception as error:
            log.debug("the model does not run on its example: %s", first_line(error))
            return False
        return True

    def _samples(self, axes: BatchAxes, style: str) -> list[Any]:
        """Two samples, of the kind of the example's."""
        generator = torch.Generator().manual_seed(_SEED)
        out = []
        for x, axis in zip(self.leaves, axes.inputs, strict=True):
            if axis is None:
                out.append(x)
                continue
            places = torch.arange(2, device=x.device) % x.shape[axis]
            out.append(_drawn(x.detach().index_select(axis, places), x.detach(), style, generator))
        return out

    def _three(self, axes: BatchAxes, two: list[Any], dtype: torch.dtype | None = None) -> list[list[Tensor]]:
        """The outputs for both samples, for the first, and for the second."""
        alone = [
            [x if axis is None else x.narrow(axis, k, 1) for x, axis in zip(two, axes.inputs, strict=True)]
            for k in range(2)
        ]
        return [self._run(leaves, dtype=dtype) for leaves in (two, *alone)]

    def _run(self, leaves: list[Any], seed: int = _SEED, dtype: torch.dtype | None = None) -> list[Tensor]:
        if dtype is not None:
            leaves = [x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() else x for x in leaves]
        args, kwargs = pytree.tree_unflatten(leaves, self.tree)
        with answering(self.model) as still:
            named = dict(still.named_parameters())
            for name, value in self._alive.items():
                named[name].data = value
            if dtype is not None:
                still.to(dtype)
            torch.manual_seed(_SEED + seed)
            result = still(*args, **kwargs)
        found = reals(result)
        return found or [x for x in pytree.tree_leaves(result) if isinstance(x, Tensor)]

    def _verdict(self, axes: BatchAxes, two: list[Any], runs: list[list[Tensor]]) -> tuple[int | None, ...] | None:
        if not any(runs):
            return ()  # nothing to compare
        found = _places(runs)
        if found is None or all(a is None for a in found):
            return None
        off, dtype = _difference(runs, found), max((x.dtype for x in runs[0]), key=lambda d: d.itemsize)
        if off > _ROUNDING and (self._draws(two) or self._writes(two)):
            return found  # the model draws random numbers, or counts what it sees: only the shapes can tell
        if _ROUNDING < off <= _APART.get(dtype, _HALF_APART):
            more = torch.float64 if dtype in _APART else torch.float32
            try:
                off = _difference(self._three(axes, two, more), found) - _AGAIN[more]
            except Exception as error:  # a forward may insist on a dtype
                log.debug("the model does not run in %s: %s", more, first_line(error))
                off -= _NO_DIGITS
            return found if off <= 0 else None
        return found if off <= _ROUNDING else None

    def _writes(self, two: list[Any]) -> bool:
        """Whether a forward changes a buffer, such as a mean of all that was seen."""
        args, kwargs = pytree.tree_unflatten(two, self.tree)
        with answering(self.model) as still:
            before = {name: b.clone() for name, b in still.named_buffers()}
            still(*args, **kwargs)
            after = dict(still.named_buffers())
        return any(n in after and not torch.equal(b.nan_to_num(), after[n].nan_to_num()) for n, b in before.items())

    def _draws(self, two: list[Any]) -> bool:
        """Whether the outputs change with the seed."""
        a, b = (self._run(two, seed) for seed in (_SEED, _SEED + 1))
        return any(
            x.shape != y.shape or not torch.equal(x.nan_to_num(), y.nan_to_num()) for x, y in zip(a, b, strict=False)
        )


def _drawn(x: Tensor, every: Tensor, style: str, generator: torch.Generator) -> Tensor:
    """New values for samples x. every: the values of the whole example."""
    if style == "own" or x.dtype == torch.bool or x.is_complex() or not x.numel():
        return x
    if not x.is_floating_point():
        values = every.reshape(-1)
        if bool((values == values[0]).all()):  # there surely is a token beside this one, below it or at 1
            values = torch.stack([values[0], values[0] - 1 if int(values[0]) > 1 else 1 - values[0]])
        chosen = torch.randint(len(values), x.shape, generator=generator).to(x.device)
        return values[chosen]
    uniform = style == "uniform"
    return random_like(x, generator, uniform=uniform, known=None if uniform else every).to(x)


def _places(runs: list[list[Tensor]]) -> tuple[int | None, ...] | None:
    """The axis along which each output of two samples holds those of one. None if the outputs do not fit together."""
    if len({len(run) for run in runs}) > 1:
        return None
    found: list[int | None] = []
    for both, one, other in zip(*runs, strict=True):
        if one.shape != other.shape or both.dim() != one.dim():
            return None
        grown = [a for a in range(both.dim()) if both.shape[a] != one.shape[a]]
        if any(both.shape[a] != 2 * one.shape[a] for a in grown):
            return None
        found.append(grown[0] if len(grown) == 1 else None)
    return tuple(found)


def _difference(runs: list[list[Tensor]], places: Sequence[int | None]) -> float:
    """How far the outputs for two samples are from those for each alone, relative to the largest of them."""
    worst = 0.0
    for both, one, other, axis in zip(*runs, places, strict=True):
        if axis is None and (not both.dim() or both.shape != one.shape):
            continue
        wanted = [torch.cat([one, other], axis)] if axis is not None else [one, other]
        worst = max(worst, *(_off(both, x) for x in wanted))
    return worst


def _off(x: Tensor, y: Tensor) -> float:
    if not x.numel():
        return 0.0
    if not x.is_floating_point():
        return 0.0 if float((x != y).double().mean()) <= _FLIPPED else math.inf
    if not torch.equal(torch.isfinite(x), torch.isfinite(y)):
        return math.inf
    a, b = (t.detach().double().nan_to_num(0, 0, 0) for t in (x, y))
    return float((a - b).abs().max()) / max(float(b.abs().max()), 1e-30)
