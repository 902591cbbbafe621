"""Sources that know nothing about the model but the shape of its inputs: white and 1/f noise, blobs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from coreprune._shapes import Float, Tensor
from coreprune.errors import InputError
from coreprune.queries.sources.base import Target, Tell
from coreprune.queries.sources.image_shape import image_shape, inked


def pink(
    n: int, shape: Sequence[int], generator: torch.Generator, *, power: float = 1.0, colour: float = 0.9
) -> Float[Tensor, "n c *space"]:
    """Gaussian noise with amplitude 1/f^power, as natural images have (Field 1987), of unit variance.

    shape: (channels, *space), with one axis of space or more. colour: correlation between any two channels.
    Returns float32 on the CPU. The mean of each is random too: frequency 0, where 1/f would be infinite, counts as a
    half of the lowest one.
    """
    channels, *space = shape
    axes = list(range(2, 2 + len(space)))
    squares = torch.zeros(())
    for i, size in enumerate(space):
        last = i == len(space) - 1
        f = (torch.fft.rfftfreq(size) if last else torch.fft.fftfreq(size)) * size
        squares = squares[..., None] + f.square()
    f = squares.sqrt()
    f[(0,) * len(space)] = 0.5
    own = torch.randn(n, channels, *space, generator=generator)
    shared = torch.randn(n, 1, *space, generator=generator)
    mixed = colour**0.5 * shared + (1 - colour) ** 0.5 * own if channels > 1 else own
    image = torch.fft.irfftn(torch.fft.rfftn(mixed, dim=axes) * f**-power, s=space, dim=axes)
    return image / image.square().mean().sqrt()


@dataclass(frozen=True)
class WhiteNoise:
    """Independent Gaussian numbers. Any shape."""

    mean: float = 0.0
    sd: float = 1.0
    name: ClassVar[str] = "white-noise"

    def at_once(self, target: Target) -> int | None:  # noqa: ARG002
        """Any number."""
        return None

    def __call__(self, target: Target, n: int, generator: torch.Generator, tell: Tell) -> Tensor:
        """Make n inputs."""
        x = self.mean + self.sd * torch.randn(n, *target.shape, generator=generator)
        tell(1, 1)
        return target.cast(x)


@dataclass(frozen=True)
class PinkNoise:
    """1/f noise: images, flat images, and anything else with channels and axes of space (signals, volumes).

    power: amplitude 1/f^power. colour: correlation between the channels. shape: of a flat image.
    low, high: without them zero mean and unit variance, for inputs that are normalised; with them the noise has its
    mean in the middle, a deviation of a quarter of the range, and is clipped to it.
    """

    power: float = 1.0
    colour: float = 0.9
    shape: tuple[int, ...] | None = None
    low: float | None = None
    high: float | None = None
    name: ClassVar[str] = "pink-noise"

    def at_once(self, target: Target) -> int | None:  # noqa: ARG002
        """Any number."""
        return None

    def __call__(self, target: Target, n: int, generator: torch.Generator, tell: Tell) -> Tensor:
        """Make n inputs."""
        spatial = self.shape is None and len(target.shape) in (2, 4)
        shape = target.shape if spatial else image_shape(target, self.shape)
        x = pink(n, shape, generator, power=self.power, colour=self.colour)
        tell(1, 1)
        return target.cast(in_range(x, self.low, self.high))


@dataclass(frozen=True)
class Blobs:
    """Soft-edged blobs of ink on a background: 1/f noise above a threshold. Images and flat images.

    cover: share of the pixels with ink. power: larger gives larger, rounder blobs. soft: width of the edge in standard
    deviations of the noise. shape: of a flat image. low, high: see `levels`.
    """

    cover: float = 0.15
    power: float = 1.5
    soft: float = 0.3
    shape: tuple[int, ...] | None = None
    low: float | None = None
    high: float | None = None
    name: ClassVar[str] = "blobs"

    def at_once(self, target: Target) -> int | None:  # noqa: ARG002
        """Any number."""
        return None

    def __call__(self, target: Target, n: int, generator: torch.Generator, tell: Tell) -> Tensor:
        """Make n inputs."""
        if not 0 < self.cover < 1 or not self.soft > 0:
            raise InputError(f"cover={self.cover} has to be between 0 and 1, and soft={self.soft} above 0.")
        x = pink(n, image_shape(target, self.shape), generator, power=self.power)
        flat = x.flatten(1)
        below = max(1, min(flat.shape[1], round((1 - self.cover) * flat.shape[1])))
        threshold = flat.kthvalue(below, dim=1, keepdim=True).values
        sd = flat.std(dim=1, correction=0, keepdim=True).clamp_min(1e-6)
        ink = torch.sigmoid((flat - threshold) / sd * (4 / self.soft))
        tell(1, 1)
        return inked(target, ink, self.low, self.high)


def in_range(x: Tensor, low: float | None, high: float | None) -> Tensor:
    """Noise of unit variance in [low, high], mean in the middle, deviation a quarter of the range; None: as it is."""
    if low is None and high is None:
        return x
    if low is None or high is None or not math.isfinite(high - low) or not low < high:
        raise InputError(f"low={low} and high={high}: pass both, low < high, or neither for normalised inputs.")
    return ((low + high) / 2 + (high - low) / 4 * x).clamp(low, high)
