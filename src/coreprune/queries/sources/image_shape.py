"""Which shape an image has when the model takes it as a flat vector, and how bright it is."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from coreprune._shapes import Float
from coreprune.errors import InputError
from coreprune.queries.sources.base import Target

Shape = tuple[int, int, int]

# Inputs are usually normalised to zero mean and unit variance. Ink on a share p of the pixels then has the levels
# −√(p/(1−p)) and √((1−p)/p); p = 0.15 is what a pen leaves on a small image.
NORMALISED = (-0.42, 2.38)
_BACKGROUND_SHARE = 0.1
_SMOOTH = 0.1
_SHUFFLES = 20


def image_shape(target: Target, asked: tuple[int, ...] | None = None) -> Shape:
    """(channels, height, width) of the target's images.

    asked: (height, width) or (channels, height, width), or None: the example's own shape, or for flat vectors a guess:
    a square with 1 or 3 channels, if the weights that read the vector are smooth in it (`guess_shape`).

    Raises InputError where that is no image.
    """
    shape = target.shape
    size = math.prod(shape)
    if asked is not None:
        full = (1, *asked) if len(asked) == 2 else tuple(asked)
        if len(full) != 3 or math.prod(full) != size:
            raise InputError(
                f"shape={asked} does not hold the {size} numbers of one input (shape {shape}). "
                "Pass (height, width) or (channels, height, width)."
            )
        return full[0], full[1], full[2]
    if len(shape) == 3:
        return shape[0], shape[1], shape[2]
    if len(shape) == 1 and (guess := guess_shape(target)) is not None:
        return guess
    raise InputError(
        f"inputs of shape {shape} are no images as far as can be seen. Take another source, such as white-noise or "
        "propagated-moments; or if they are, in Python say shape=(height, width) or (channels, height, width)."
    )


def guess_shape(target: Target) -> Shape | None:
    """Square image shape of a flat vector: None, unless the weights that read it are smooth in that shape.

    Smooth: neighbouring pixels' weights correlate by more than 0.1, and by more than under any of 20 shuffles.
    """
    if len(target.shape) != 1:
        return None
    d = target.shape[0]
    weight = first_weight(target)
    if weight is None:
        return None
    shuffles = torch.Generator().manual_seed(0)
    for channels in (1, 3):
        side = math.isqrt(d // channels)
        if side < 4 or channels * side * side != d:
            continue
        shape = (channels, side, side)
        chance = (_neighbours(weight[:, torch.randperm(d, generator=shuffles)], shape) for _ in range(_SHUFFLES))
        if _neighbours(weight, shape) > max(_SMOOTH, *chance):
            return shape
    return None


def first_weight(target: Target) -> Float[Tensor, "out d"] | None:
    """Weight of the linear layer that reads the target first, float64 on the CPU, or None."""
    d = target.shape[-1]
    found: list[Tensor] = []

    def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        if not found and args and args[0].shape == target.example.shape and torch.equal(args[0], target.example):
            found.append(module.weight)  # type: ignore[arg-type]

    layers = [m for m in target.model.modules() if isinstance(m, nn.Linear) and m.in_features == d]
    handles = [m.register_forward_pre_hook(hook) for m in layers]
    try:
        target.call(target.example)
    finally:
        for handle in handles:
            handle.remove()
    return found[0].detach().to("cpu", torch.float64) if found else None


def _neighbours(weight: Tensor, shape: Shape) -> float:
    """Correlation of the weights of neighbouring pixels, both directions."""
    rows = (weight - weight.mean(dim=1, keepdim=True)).reshape(-1, *shape)
    power = float(rows.square().mean())
    if power == 0:
        return 0.0
    across = (rows[..., 1:] * rows[..., :-1]).mean() + (rows[..., 1:, :] * rows[..., :-1, :]).mean()
    return float(across) / (2 * power)


def levels(target: Target, low: float | None, high: float | None) -> tuple[float, float]:
    """Values of background and ink.

    Where they are not given: when the example looks like a real image, that is when one value fills more than a tenth
    of it, that value is the background and the extreme farthest from it the ink. Otherwise inputs are taken to be
    normalised to zero mean and unit variance, with ink on 15 % of the pixels: −0.42 and 2.38.

    Raises InputError for levels that are equal or not finite.
    """
    guess = _levels_of(target.example) or NORMALISED
    low, high = (guess[0] if low is None else low), (guess[1] if high is None else high)
    if not math.isfinite(low) or not math.isfinite(high) or low == high:
        raise InputError(f"low={low} and high={high} are the values of background and ink: finite, unequal numbers.")
    return low, high


def _levels_of(example: Tensor) -> tuple[float, float] | None:
    values, counts = example.detach().flatten().to("cpu", torch.float64).unique(return_counts=True)
    if len(values) < 3 or int(counts.max()) < _BACKGROUND_SHARE * example.numel():
        return None
    low = float(values[counts.argmax()])
    ends = (float(values[0]), float(values[-1]))
    return low, max(ends, key=lambda end: abs(end - low))


def inked(target: Target, ink: Tensor, low: float | None, high: float | None) -> Tensor:
    """Ink in [0, 1], (n, c, h, w), as inputs of the target."""
    low, high = levels(target, low, high)
    return target.cast(low + (high - low) * ink)
