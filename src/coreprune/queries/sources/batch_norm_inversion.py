"""Batch-norm inversion: inputs whose statistics inside the network are those that it saw in training."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from coreprune._example import ANY_BATCH
from coreprune._shapes import Float
from coreprune.errors import InputError, ModelError
from coreprune.queries.sources.base import Progress, Target, Tell, draw, untouched
from coreprune.queries.sources.dead_leaves import leaves
from coreprune.queries.sources.noise import pink

_SMALL = 64  # side up to which images were likely cropped after padding in training, and are cheap


def norms(model: nn.Module) -> list[Any]:
    """The batch norms of a model that hold running statistics, frozen ones too, as they are registered."""
    return [m for m in model.modules() if _running(m) and not isinstance(m, nn.modules.instancenorm._InstanceNorm)]


def reached(target: Target) -> bool:
    """Whether a batch norm with running statistics runs on the example."""
    seen: list[Any] = []
    handles = [m.register_forward_pre_hook(lambda m, args: seen.append(m)) for m in norms(target.model)]  # noqa: ARG005
    try:
        target.call(target.example)
    finally:
        for handle in handles:
            handle.remove()
    return bool(seen)


def _running(module: nn.Module) -> bool:
    found = [getattr(module, name, None) for name in ("running_mean", "running_var")]
    return all(isinstance(t, Tensor) and not isinstance(t, nn.UninitializedBuffer) for t in found)


@dataclass(frozen=True)
class BatchNormInversion:
    """Inputs for which every batch norm's batch mean and standard deviation match its running ones.

    Adam, from dead leaves (images) or noise (anything else), on the sum over the batch norms of the mean over channels
    of ((μ − μ_running)/σ_running)² + (σ/σ_running − 1)², plus a total-variation term: Yin et al., Dreaming to Distill,
    CVPR 2020, without labels.

    Running statistics are those of *augmented* training images. The commonest augmentation of small images, a random
    crop after padding with zeros, shifts them by more than the optimisation leaves, so the images are cropped at
    random in the same way when they are measured. On a CIFAR ResNet-56 this halves the error of the hidden
    covariances.

    steps: of Adam, per batch. lr: its rate, with cosine decay. smoothness: weight of the total variation.
    batch: images made together, over which the statistics match; None: 128, and 32 beyond 64 pixels a side.
    padding: of the random crops; 0: none; None: an eighth of the side if the side is at most 64 and the statistics of
    the starting images come closer to the running ones with it, otherwise none.
    """

    steps: int = 60
    lr: float = 0.1
    smoothness: float = 0.01
    batch: int | None = None
    padding: int | None = None
    name: ClassVar[str] = "batch-norm-inversion"

    def at_once(self, target: Target) -> int | None:
        """The batch over which the statistics match."""
        small = len(target.shape) < 3 or max(target.shape[1:]) <= _SMALL
        return self.batch or (128 if small else 32)

    def __call__(self, target: Target, n: int, generator: torch.Generator, tell: Tell) -> Tensor:
        """Make n inputs."""
        if self.steps < 1 or not self.lr > 0 or self.smoothness < 0 or (self.padding or 0) < 0:
            raise InputError(f"{self}: steps and lr have to be positive, smoothness and padding not negative.")
        if not target.example.is_floating_point():
            raise InputError(f"batch-norm inversion optimises real numbers; these inputs are {target.example.dtype}.")
        if not norms(target.model):
            raise InputError(
                "the model has no batch norm with running statistics, so there is nothing to invert. "
                "Take another source: auto, leaves, pink-noise, strokes or white-noise."
            )
        if not reached(target):
            raise ModelError(
                "no batch norm runs as a module on the example inputs (exported programs have no modules), so there is "
                "nothing to invert. Take another source: leaves, pink-noise, strokes or white-noise."
            )
        if not target.together:
            raise InputError(
                "batch-norm inversion goes by statistics over many inputs at once, and this model takes one at a time. "
                f"If it is an exported program, {ANY_BATCH}; or take another source: leaves, pink-noise, white-noise."
            )
        image = len(target.shape) == 3
        if image:
            start = leaves(n, _three(target.shape), generator)
        elif len(target.shape) > 1:
            start = pink(n, target.shape, generator)
        else:
            start = torch.randn(n, *target.shape, generator=generator)
        x = start.to(target.example.device, torch.float32)
        padding = self._padding(target, x, generator) if image else 0
        return target.cast(self._descend(target, x, padding, generator, tell))

    def _padding(self, target: Target, start: Tensor, generator: torch.Generator) -> int:
        side = max(target.shape[1:])
        if self.padding is not None or side > _SMALL:
            return self.padding or 0
        padding = max(1, side // 8)
        with torch.no_grad():
            plain, cropped = (_mismatch(target, x) for x in (start, crops(start, padding, generator)))
        return padding if cropped < plain else 0

    def _descend(self, target: Target, start: Tensor, padding: int, generator: torch.Generator, tell: Tell) -> Tensor:
        """Adam with a cosine schedule, all inputs at once."""
        x = start.requires_grad_()
        optimiser = torch.optim.Adam([x], lr=self.lr, betas=(0.5, 0.9))
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, self.steps, eta_min=self.lr / 20)
        for step in range(self.steps):
            with torch.enable_grad():
                mismatch = _mismatch(target, crops(x, padding, generator) if padding else x)
                loss = mismatch + self.smoothness * _variation(x)
            if not mismatch.requires_grad:
                raise ModelError(
                    "no gradient reaches the inputs from the batch norms: the model cuts it before them. Take another "
                    "source of queries, such as leaves or pink-noise, or pass samples."
                )
            (x.grad,) = torch.autograd.grad(loss, [x])
            optimiser.step()
            schedule.step()
            tell(step + 1, self.steps)
        return x.detach()


def _mismatch(target: Target, x: Tensor) -> Tensor:
    """How far the batch's means and deviations are from the running ones, in running deviations, over all norms."""
    losses: list[Tensor] = []

    def hook(norm: Any, args: tuple[Tensor, ...]) -> None:
        values = args[0].float()
        var, mean = torch.var_mean(values, dim=[0, *range(2, values.dim())], correction=0)
        eps = getattr(norm, "eps", 1e-5)
        sd = (norm.running_var + eps).sqrt()
        off = ((mean - norm.running_mean) / sd).square().mean() + ((var + eps).sqrt() / sd - 1).square().mean()
        losses.append(off)

    handles = [norm.register_forward_pre_hook(hook) for norm in norms(target.model)]
    try:
        target.call(x.to(target.example.dtype))
    finally:
        for handle in handles:
            handle.remove()
    return torch.stack(losses).sum()


def _variation(x: Tensor) -> Tensor:
    """Mean squared difference of neighbours, summed over the axes of space."""
    return sum((x.diff(dim=axis).square().mean() for axis in range(2, x.dim()) if x.shape[axis] > 1), x.new_zeros(()))


def crops(x: Float[Tensor, "n c h w"], padding: int, generator: torch.Generator) -> Float[Tensor, "n c h w"]:
    """Every image moved by up to `padding` pixels along each axis, zeros where nothing is left."""
    n, c, h, w = x.shape
    offsets = torch.randint(0, 2 * padding + 1, (2, n, 1, 1, 1), generator=generator).to(x.device)
    places = [torch.arange(size, device=x.device) for size in (n, c, h, w)]
    rows, columns = offsets[0] + places[2][:, None], offsets[1] + places[3]
    return pad(x, (padding,) * 4)[places[0][:, None, None, None], places[1][:, None, None], rows, columns]


def _three(shape: tuple[int, ...]) -> tuple[int, int, int]:
    return shape[0], shape[1], shape[2]


def invert(
    model: nn.Module,
    shape: tuple[int, ...],
    n: int = 256,
    *,
    steps: int = 60,
    generator: torch.Generator,
    progress: Progress | None = None,
    **options: Any,
) -> Tensor:
    """`BatchNormInversion` for a model with one input: (n, *shape) float32 on the model's device.

    shape: of one input. options: further ones of `BatchNormInversion`. progress("queries", done, total) is called after
    every step. Raises InputError where the model holds no batch norm with running statistics.
    """
    place = next((t for t in [*model.parameters(), *model.buffers()] if t.is_floating_point()), torch.zeros(()))
    target = Target(model, (torch.zeros(1, *shape, device=place.device, dtype=place.dtype),), {}, 0)
    tell: Callable[[int, int], None] = (lambda done, total: progress("queries", done, total)) if progress else _silent
    with untouched(model):
        return draw(BatchNormInversion(steps=steps, **options), target, n, generator, tell)


def _silent(done: int, total: int) -> None:
    pass
