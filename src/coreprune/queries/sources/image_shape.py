"""The shape of images that the model takes as flat vectors, and the values of background and ink."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from coreprune._shapes import Float
from coreprune.errors import InputError
from coreprune.queries.sources.base import Target

Shape = tuple[int, int, int]

# Inputs are usually normalised to zero mean and unit variance. If a share p of the pixels is ink, background and ink
# then have the values −√(p/(1−p)) and √((1−p)/p). p = 0.15 is usual for a pen on a small image.
NORMALISED = (-0.42, 2.38)
_BACKGROUND_SHARE = 0.1
_SMOOTH = 0.1
_SHUFFLES = 20


def image_shape(target: Target, asked: tuple[int, ...] | None = None) -> Shape:
    """(channels, height, width) of the target's images.

    asked: (height, width) or (channels, height, width). When None, it is the example's own shape. For a flat vector it
        is then guessed: a square with 1 or 3 channels, if the weights that read the vector are smooth in it.

    Raises InputError if that is no image.
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
        f"inputs of shape {shape} do not look like images. Choose another source, such as white-noise or "
        "propagated-moments. If they are images, give shape=(height, width) or (channels, height, width) in Python."
    )


def guess_shape(target: Target) -> Shape | None:
    """A square image shape for a flat vector. None unless the weights that read the vector are smooth in that shape.

    They are smooth if the weights of neighbouring pixels correlate by more than 0.1, and by more than after any of 20
    random shuffles.
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
    """Weight of the linear layer that reads the target first, in float64 on the CPU. None if there is none."""
    d = target.shape[-1]
    found: list[Tensor] = []

    def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        if not found and args and args[0].shape == target.given.shape and torch.equal(args[0], target.given):
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
    """Mean correlation of the weights of neighbouring pixels, in both directions."""
    rows = (weight - weight.mean(dim=1, keepdim=True)).reshape(-1, *shape)
    power = float(rows.square().mean())
    if power == 0:
        return 0.0
    across = (rows[..., 1:] * rows[..., :-1]).mean() + (rows[..., 1:, :] * rows[..., :-1, :]).mean()
    return float(across) / (2 * power)


def levels(target: Target, low: float | None, high: float | None) -> tuple[float, float]:
    """Values of background and ink.

    If they are not given, the example may tell: when one value fills more than a tenth of it, this is the background,
    and the extreme farthest from it is the ink. Otherwise the inputs are taken to be normalised to zero mean and unit
    variance with ink on 15 % of the pixels: −0.42 and 2.38.

    Raises InputError for values that are equal or not finite.
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
    """Inputs of the target from ink between 0 and 1, (n, c, h, w)."""
    low, high = levels(target, low, high)
    return target.cast(low + (high - low) * ink)
