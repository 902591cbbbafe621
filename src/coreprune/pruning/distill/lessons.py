"""What the teacher says to the inputs of every step. It is kept, because running the teacher costs most of a step."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from coreprune._example import reals
from coreprune.pruning.calibration.rows import Batch, Rows
from coreprune.pruning.distill.block_outputs import Watched

_KEPT = 1 << 30  # bytes


@dataclass(frozen=True, eq=False)
class Watching:
    """A model whose features are collected. A call returns its outputs and its features on the parts of a batch."""

    model: nn.Module
    seen: Watched

    def __call__(self, parts: Sequence[Batch]) -> tuple[list[Tensor], list[Tensor]]:
        """The floating-point outputs, and the features, of all parts together."""
        outputs = [x for args, kwargs in parts for x in reals(self.model(*args, **kwargs))]
        return _joined(outputs, len(parts)), _joined(self.seen.take(), len(parts))


@dataclass(frozen=True, eq=False)
class Lesson:
    """The inputs of one step, and what the teacher computes from them."""

    parts: list[Batch]
    outputs: list[Tensor]
    features: list[Tensor]


class Lessons:
    """The lesson of every step. After `copies` passes over the inputs, or what fits in 1 GiB, they come again."""

    def __init__(self, teacher: Watching, rows: Rows, most: int, copies: int) -> None:
        self.teacher, self.rows, self.most = teacher, rows, most
        self.kept: dict[int, Lesson] = {}
        each = math.ceil(rows.count / rows.size)  # steps that show every input once
        first = self._make(0)
        size = sum(x.numel() * x.element_size() for x in (*first.outputs, *first.features))
        self.period = min(copies, _KEPT // (each * max(size, 1))) * each
        if self.period:
            self.kept[0] = first

    def of(self, step: int) -> Lesson:
        """The lesson of a step."""
        if not self.period:
            return self._make(step)
        step %= self.period
        if step not in self.kept:
            self.kept[step] = self._make(step)
        return self.kept[step]

    def _make(self, step: int) -> Lesson:
        parts = list(self.rows.parts(step, self.most))
        with torch.no_grad():
            return Lesson(parts, *self.teacher(parts))


def _joined(values: list[Tensor], parts: int) -> list[Tensor]:
    """Join the values of all parts of a batch, listed part by part, into the values of the whole batch."""
    if parts == 1:
        return values
    each = len(values) // parts
    return [torch.cat([torch.atleast_1d(x) for x in values[i::each]]) for i in range(each)]
