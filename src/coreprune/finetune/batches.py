"""Labelled samples in memory: batches of them, and the accuracy on them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

from coreprune._seed import as_generator
from coreprune._shown import brief


@dataclass(frozen=True)
class Batches:
    """Batches of (inputs, labels), in a new random order every pass. A DataLoader can be used instead.

    inputs: (N, ...), labels: (N,) int64, both on the model's device. seed: of the orders; a number, or a generator to
    draw from.
    """

    inputs: Tensor
    labels: Tensor
    batch_size: int
    seed: int | torch.Generator = 0
    __repr__ = brief

    @cached_property
    def generator(self) -> torch.Generator:
        """What the orders are drawn from."""
        return as_generator(self.seed)

    def __len__(self) -> int:
        return math.ceil(len(self.inputs) / self.batch_size)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        order = torch.randperm(len(self.inputs), generator=self.generator, device=self.generator.device)
        for rows in order.to(self.inputs.device).split(self.batch_size):
            yield self.inputs[rows], self.labels[rows]


@torch.no_grad()
def accuracy(model: nn.Module, inputs: Tensor, labels: Tensor, batch_size: int = 2000) -> float:
    """Share of `inputs` (N, ...) whose largest output is the label (N,), in evaluation mode; the mode is restored."""
    training = model.training
    model.eval()
    try:
        parts = zip(inputs.split(batch_size), labels.split(batch_size), strict=True)
        right = sum(int((model(x).argmax(dim=1) == y).sum()) for x, y in parts)
    finally:
        model.train(training)
    return right / len(labels)
