"""Clocks that run every call once, and say what it would take by the multiplications that it does."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from coreprune.pruning.timing import pace


def work(call: Callable[[], Any]) -> float:
    """Microseconds: one for each thousand flops, and a little for the call."""
    with FlopCounterMode(display=False) as counter:
        call()
    return 1e-6 * (0.001 + counter.get_total_flops() / 1000)


class Clocks:
    """In place of the clock of this machine. whole, piece: what is made of the seconds of `work`."""

    def __init__(self, whole: Callable[[float], float] = lambda t: t, piece: Callable[[float], float] = lambda t: t):
        self.whole, self.piece = whole, piece
        self.wholes = self.pieces = 0

    def __call__(self, device: torch.device, seconds: float, repeats: int) -> pace.Clock:
        return self._pieces if (seconds, repeats) == pace._PIECE else self._wholes

    def _pieces(self, calls: Sequence[Callable[[], Any]]) -> list[float]:
        self.pieces += len(calls)
        return [self.piece(work(c)) for c in calls]

    def _wholes(self, calls: Sequence[Callable[[], Any]]) -> list[float]:
        self.wholes += 1
        return [self.whole(work(c)) for c in calls]

    def of(self, model: nn.Module, example: Any) -> float:
        """What a model takes."""
        return self.whole(work(torch.no_grad()(lambda: model.eval()(example))))
