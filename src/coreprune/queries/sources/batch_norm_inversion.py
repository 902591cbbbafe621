"""Batch-norm inversion: inputs with the statistics inside the network that it saw in training."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from coreprune._example import ANY_BATCH
from coreprune._seed import as_generator
from coreprune._telling import Wanted, telling
from coreprune.errors import InputError, ModelError
from coreprune.queries.sources.base import Target, Tell, draw, untouched
from coreprune.queries.sources.norm_statistics import mismatch, norms, reached, sigma
from coreprune.queries.sources.starting import Start, begin, crops, fitted
from coreprune.queries.sources.work import work

_SMALL = 64  # images up to this side are cheap, and were probably padded and cropped in training
_BATCH = 128
_PIXELS = _BATCH * _SMALL**2  # in a batch: more need gigabytes, and no longer fit into a processor's caches

_FITTED = 32  # inputs that choose the start

_STEPS, _FEWEST = 60, 4
_WORK = 20e9  # `work` for one input, counted in forward passes (a step costs two to three). Half a second of a core.

_PATIENCE, _GAIN = 10, 0.99  # stop if this many steps do not win one percent
_MET = 0.005  # or at this distance, in σ


@dataclass(frozen=True)
class BatchNormInversion:
    """Inputs for which the mean and standard deviation in every batch norm match its running statistics.

    Yin et al., Dreaming to Distill, CVPR 2020, without labels. The loss is the sum over the batch norms of the mean
    over channels of ((μ − μ_running)/σ_running)² + (σ/σ_running − 1)², plus a penalty for rough images. Adam starts
    from dead leaves, drawings, blobs or 1/f noise for images, and from noise for other inputs. The kind, contrast,
    brightness and range of the start are those that fit the running statistics best, and the inputs are kept within
    this range. On EfficientNet-Lite0 the range matters more than the number of steps. Optimising smaller images and
    enlarging them does not work: enlarged images fit no better than dead leaves.

    Running statistics are those of *augmented* training images. Small images are often padded with zeros and cropped
    at random. That changes the statistics more than the optimisation does, so the images are cropped in the same way
    when they are measured. On a ResNet-56 for CIFAR this halves the error of the hidden covariances.

    steps: of Adam, for each batch. None: 60. If the example is on the CPU and one input costs much, fewer, so that the
        work for an input is limited, but at least 4. Then the steps are counted from the model's operations, and the
        inputs do not depend on the speed of the machine. The optimisation ends earlier when the statistics are met,
        or come no closer.
    lr: learning rate, in standard deviations of the starting inputs, with cosine decay.
    smoothness: weight of the penalty, the mean squared difference of neighbouring pixels.
    batch: number of images that are made together and whose statistics match. None: 128, and fewer for images with more
        than 64 pixels a side, down to 4.
    padding: of the random crops; 0 for none. When None, an eighth of the side is used if the side is at most 64 and
        the starting images then match the running statistics better.
    time: seconds for each input, so that n inputs take about n · time. The steps end there even if fewer were done. The
        inputs then depend on the speed of the machine, and the same seed need not give the same inputs. None: no limit.
    """

    steps: int | None = None
    lr: float = 0.08
    smoothness: float = 0.01
    batch: int | None = None
    padding: int | None = None
    time: float | None = None
    jointly = True
    name = "batch-norm-inversion"
    kind = "reals"

    def at_once(self, target: Target) -> int | None:
        """The batch whose statistics match."""
        pixels = math.prod(target.shape[1:]) if len(target.shape) > 2 else 1
        return self.batch or max(4, min(_BATCH, _PIXELS // max(1, pixels)))

    def __call__(self, target: Target, n: int, generator: torch.Generator, tell: Tell) -> Tensor:
        """Make n inputs for the target."""
        self._check(target)
        start = self.start(target)
        x = begin(target, start, n, generator)
        return target.cast(self._descend(target, x, start, generator, tell))

    def _check(self, target: Target) -> None:
        numbers = (1 if self.steps is None else self.steps, self.lr, 1 if self.time is None else self.time)
        if not all(0 < x < math.inf for x in numbers) or self.smoothness < 0 or (self.padding or 0) < 0:
            raise InputError(
                f"{self}: steps, lr and time have to be positive numbers, smoothness and padding not negative."
            )
        if not target.example.is_floating_point():
            raise InputError(f"batch-norm inversion optimises real numbers; these inputs are {target.example.dtype}.")
        if not norms(target.model):
            raise InputError(
                "the model has no batch norm with running statistics, so there is nothing to invert. "
                "Choose another source: auto, leaves, pink-noise, strokes or white-noise."
            )
        if not reached(target):
            raise ModelError(
                "no batch norm runs as a module on the example inputs (exported programs have no modules), so there is "
                "nothing to invert. Choose another source: leaves, pink-noise, strokes or white-noise."
            )
        if not target.together:
            raise InputError(
                "batch-norm inversion needs statistics over many inputs at once, but this model takes one at a time. "
                f"If it is an exported program, {ANY_BATCH}. Or choose another source: leaves, pink-noise, white-noise."
            )

    def start(self, target: Target) -> Start:
        """What the optimisation starts from. The same for all batches."""
        n = min(_FITTED, max(2, (self.at_once(target) or _BATCH) // 2))
        side = max(target.shape[1:]) if len(target.shape) == 3 else 0
        if self.padding is not None or not 0 < side <= _SMALL:
            return fitted(target, n, (self.padding or 0) if side else 0)
        plain, cropped = (fitted(target, n, padding) for padding in (0, max(1, side // 8)))
        return min(plain, cropped, key=lambda start: start.off)

    def remark(self, target: Target, x: Tensor) -> str:
        """How well the statistics are met by inputs x that were made for the target, for the report."""
        start, size = self.start(target), self.at_once(target) or _BATCH
        before = begin(target, start, len(x[:size]), torch.Generator().manual_seed(0))
        met, first = (sigma(_measured(target, inputs[:size].float(), start)) for inputs in (x, before))
        return f"batch-norm statistics met to {met:.2g} σ (root mean square), {first:.2g} σ at the start"

    def _descend(self, target: Target, x: Tensor, start: Start, generator: torch.Generator, tell: Tell) -> Tensor:
        """Run Adam on all inputs at once. After each step, values out of range are set to its ends."""
        if x.dim() == 4:
            x = x.contiguous(memory_format=torch.channels_last)  # half of the time of a step on a CPU
        scale = float(x.std(correction=0))
        x.requires_grad_()
        optimiser = torch.optim.Adam([x], lr=self.lr, betas=(0.5, 0.9))
        steps = self.steps or _steps(target)
        found: list[float] = []
        done = 0
        for step, share in self._shares(steps, len(x)):
            with torch.enable_grad():
                off = _measured(target, x, start, generator)
                loss = off.sum() + self.smoothness * _variation(x / scale)
            if not off.requires_grad:
                raise ModelError(
                    "no gradient reaches the inputs from the batch norms, because the model cuts it. Choose another "
                    "source of queries, such as leaves or pink-noise, or pass samples."
                )
            (x.grad,) = torch.autograd.grad(loss, [x])
            optimiser.param_groups[0]["lr"] = self.lr * scale * (0.05 + 0.95 * (1 + math.cos(math.pi * share)) / 2)
            optimiser.step()
            with torch.no_grad():
                x.clamp_(*start.range)
            done = max(step + 1, int(share * steps))
            tell(done, steps)
            found.append(float(off.sum()))
            if sigma(off) < _MET or _stalled(found):
                break
        if done < steps:
            tell(steps, steps)
        return x.detach().contiguous()

    def _shares(self, steps: int, n: int) -> Iterator[tuple[int, float]]:
        """Count the steps up, each with the share of the optimisation that is over: of the steps, or of the time."""
        begun = time.monotonic()
        for step in range(steps):
            spent = 0.0 if self.time is None else (time.monotonic() - begun) / (self.time * n)
            if step and spent >= 1:
                return
            yield step, min(1.0, max(step / steps, spent))


def _steps(target: Target) -> int:
    """As many steps as the work that one input may cost."""
    if target.example.device.type != "cpu":
        return _STEPS
    return max(_FEWEST, min(_STEPS, round(_WORK / max(1.0, work(target)))))


def _measured(target: Target, x: Tensor, start: Start, generator: torch.Generator | None = None) -> Tensor:
    """The mismatch of inputs in crops as in training."""
    if start.padding:
        x = crops(x, start.padding, generator or torch.Generator().manual_seed(0))
    return mismatch(target, x)


def _stalled(found: list[float]) -> bool:
    """Whether the last steps brought the mismatch no lower than it was before."""
    return len(found) > _PATIENCE and min(found[-_PATIENCE:]) > _GAIN * min(found[:-_PATIENCE])


def _variation(x: Tensor) -> Tensor:
    """Mean squared difference of neighbouring pixels, summed over the axes of space."""
    return sum((x.diff(dim=axis).square().mean() for axis in range(2, x.dim()) if x.shape[axis] > 1), x.new_zeros(()))


def invert(
    model: nn.Module,
    shape: tuple[int, ...],
    n: int = 256,
    *,
    steps: int | None = None,
    seed: int | torch.Generator = 0,
    progress: Wanted = None,
    **options: Any,
) -> Tensor:
    """Run `BatchNormInversion` on a model with one input. Returns (n, *shape) on the model's device, in its dtype.

    model: it stays as it is.
    shape: of one input.
    n: number of inputs.
    steps: of Adam, for each batch; None as for `BatchNormInversion`.
    seed: of all randomness; a number, or a generator to draw from.
    progress: as for `prune`. A function is called as progress("queries", done, total) after every step.
    options: further fields of `BatchNormInversion`.

    Raises InputError if the model has no batch norm with running statistics.
    """
    place = next((t for t in [*model.parameters(), *model.buffers()] if t.is_floating_point()), torch.zeros(()))
    example = (torch.zeros(1, *shape, device=place.device, dtype=place.dtype),)
    with telling(progress) as tell, untouched(model) as still:
        return draw(
            BatchNormInversion(steps=steps, **options),
            Target(still, example, {}, 0),
            n,
            as_generator(seed),
            lambda done, total: tell("queries", done, total),
        )
