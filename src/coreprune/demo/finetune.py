"""Fine-tuning for users who have labels: a plain loop over batches, with warm-up and cosine decay."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from coreprune._progress import Progress
from coreprune.errors import InputError


@dataclass(frozen=True)
class Batches:
    """Batches of (inputs, labels), in a new random order every pass. A DataLoader can be used instead.

    inputs: (N, ...), labels: (N,) int64, both on the model's device.
    """

    inputs: Tensor
    labels: Tensor
    batch_size: int
    generator: torch.Generator

    def __len__(self) -> int:
        return math.ceil(len(self.inputs) / self.batch_size)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        order = torch.randperm(len(self.inputs), generator=self.generator, device=self.generator.device)
        for rows in order.to(self.inputs.device).split(self.batch_size):
            yield self.inputs[rows], self.labels[rows]


def fine_tune_(
    model: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    *,
    epochs: int = 3,
    lr: float = 1e-3,
    warm_up: float = 0.05,
    weight_decay: float = 0.0,
    teacher: nn.Module | None = None,
    temperature: float = 2.0,
    progress: Progress | None = None,
) -> None:
    """Train `model` in place with Adam: linear warm-up, then cosine decay to zero. Its mode is restored at the end.

    batches: a DataLoader or `Batches`: pairs (inputs, integer labels), with a length; can be passed over many times.
    epochs: passes over the batches. lr: the highest learning rate. warm_up: as a share of all steps.
    teacher: the dense model; its softened outputs (Hinton et al. 2015) then count as much as the labels.

    On a GPU the forward pass runs in bfloat16 if the device supports it.

    Raises InputError for settings that make no sense, and if the loss becomes infinite or NaN.
    """
    if epochs < 1 or not lr > 0 or not 0 <= warm_up < 1:
        raise InputError(f"epochs ≥ 1, lr > 0 and 0 ≤ warm_up < 1 are needed, not {epochs}, {lr}, {warm_up}.")
    steps = epochs * len(batches)  # type: ignore[arg-type]
    if steps == 0:
        raise InputError("there are no batches to train on.")
    device = next(model.parameters()).device
    amp = device.type == "cuda" and torch.cuda.is_bf16_supported()
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=weight_decay)
    training = model.training
    model.train()
    step = 0
    try:
        for _ in range(epochs):
            for inputs, labels in batches:
                share = (step + 1) / max(warm_up * steps, 1.0)
                decay = 0.5 * (1 + math.cos(math.pi * step / steps))
                for group in optimizer.param_groups:
                    group["lr"] = lr * min(share, 1.0) * decay
                inputs, labels = inputs.to(device), labels.to(device)  # noqa: PLW2901 - same batch, other place
                with torch.autocast(device.type, torch.bfloat16, enabled=amp):
                    loss = _loss(model(inputs), labels, inputs, teacher, temperature)
                if not bool(torch.isfinite(loss)):
                    raise InputError(f"the loss is {loss.item()} in step {step}. Lower lr ({lr:g}) or check the data.")
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                optimizer.step()
                step += 1
                if progress is not None:
                    progress("fine-tune", step, steps)
    finally:
        model.train(training)
        for parameter in model.parameters():
            parameter.grad = None


def _loss(logits: Tensor, labels: Tensor, inputs: Tensor, teacher: nn.Module | None, temperature: float) -> Tensor:
    loss = nn.functional.cross_entropy(logits, labels)
    if teacher is None:
        return loss
    with torch.no_grad():
        wanted = nn.functional.log_softmax(teacher(inputs) / temperature, dim=1)
    found = nn.functional.log_softmax(logits / temperature, dim=1)
    soft = nn.functional.kl_div(found, wanted, log_target=True, reduction="batchmean")
    return 0.5 * loss + 0.5 * temperature**2 * soft


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
