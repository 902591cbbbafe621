"""What the teacher says to the inputs of every step. It is kept, because running the teacher costs most of a step."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from coreprune._example import reals
from coreprune.pruning.calibration.padding import NONE, NOWHERE, Ends, Padding
from coreprune.pruning.calibration.rows import Batch, Rows
from coreprune.pruning.distill.block_outputs import Watched

_KEPT = 1 << 30  # bytes


@dataclass(frozen=True, eq=False)
class Watching:
    """A model whose features are collected. A call returns its outputs and its features on one part of a batch."""

    model: nn.Module
    seen: Watched

    def __call__(self, part: Batch) -> tuple[list[Tensor], list[Tensor]]:
        """The floating-point outputs, and the features."""
        args, kwargs = part
        return reals(self.model(*args, **kwargs)), self.seen.take()


@dataclass(frozen=True, eq=False)
class Part:
    """Some inputs of one step that run together, what the teacher computes from them, and their padding."""

    inputs: Batch
    outputs: list[Tensor]
    features: list[Tensor]
    padding: Padding = NONE


class Lessons:
    """The lesson of every step: its inputs in parts of at most `most`. After `copies` passes over the inputs, or what
    fits in 1 GiB, the lessons come again. ends: where texts have padding."""

    def __init__(self, teacher: Watching, rows: Rows, most: int, copies: int, ends: Ends = NOWHERE) -> None:
        self.teacher, self.rows, self.most, self.ends = teacher, rows, most, ends
        self.kept: dict[int, list[Part]] = {}
        each = math.ceil(rows.count / rows.size)  # steps that show every input once
        first = self._make(0)
        size = sum(x.numel() * x.element_size() for part in first for x in (*part.outputs, *part.features))
        self.period = min(copies, _KEPT // (each * max(size, 1))) * each
        if self.period:
            self.kept[0] = first

    def of(self, step: int) -> list[Part]:
        """The lesson of a step."""
        if not self.period:
            return self._make(step)
        step %= self.period
        if step not in self.kept:
            self.kept[step] = self._make(step)
        return self.kept[step]

    def _make(self, step: int) -> list[Part]:
        with torch.no_grad():
            return [Part(part, *self.teacher(part), self.ends.of(part)) for part in self.rows.parts(step, self.most)]
