"""Sources that only need the shape of the inputs: white noise, 1/f noise and blobs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from coreprune._shapes import Float, Tensor
from coreprune.errors import InputError
from coreprune.queries.sources.base import Target, Tell
from coreprune.queries.sources.image_shape import image_shape, inked


def pink(
    n: int, shape: Sequence[int], generator: torch.Generator, *, power: float = 1.0, colour: float = 0.9
) -> Float[Tensor, "n c *space"]:
    """Gaussian noise of unit variance whose amplitude falls as 1/f^power, as in natural images (Field 1987).

    shape: (channels, *space), with at least one axis of space.
    colour: correlation between any two channels.

    Returns float32 on the CPU. At frequency 0, where 1/f is infinite, half of the lowest frequency is used. The mean of
    each image is therefore random, too.
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
    """Independent Gaussian numbers, for inputs of any shape.

    mean, sd: mean and standard deviation.
    """

    mean: float = 0.0
    sd: float = 1.0
    name = "white-noise"
    kind = "reals"

    def at_once(self, target: Target) -> int | None:  # noqa: ARG002
        """Any number at once."""
        return None

    def __call__(self, target: Target, n: int, generator: torch.Generator, tell: Tell) -> Tensor:
        """Make n inputs for the target."""
        x = self.mean + self.sd * torch.randn(n, *target.shape, generator=generator)
        tell(1, 1)
        return target.cast(x)


@dataclass(frozen=True)
class PinkNoise:
    """1/f noise for images, flat images, and other inputs with channels and axes of space, such as signals and volumes.

    power: the amplitude at frequency f is 1/f^power.
    colour: correlation between the channels.
    shape: of an image whose pixels the model takes as a flat vector, as for `Strokes`.
    low, high: the range of the inputs. The noise then has its mean in the middle and a standard deviation of a quarter
        of the range, and is clipped. Without them it has zero mean and unit variance, which suits normalised inputs.
    """

    power: float = 1.0
    colour: float = 0.9
    shape: tuple[int, ...] | None = None
    low: float | None = None
    high: float | None = None
    name = "pink-noise"
    kind = "pixels"

    def at_once(self, target: Target) -> int | None:  # noqa: ARG002
        """Any number at once."""
        return None

    def __call__(self, target: Target, n: int, generator: torch.Generator, tell: Tell) -> Tensor:
        """Make n inputs for the target."""
        spatial = self.shape is None and len(target.shape) in (2, 4)
        shape = target.shape if spatial else image_shape(target, self.shape)
        x = pink(n, shape, generator, power=self.power, colour=self.colour)
        tell(1, 1)
        return target.cast(in_range(x, self.low, self.high))


@dataclass(frozen=True)
class Blobs:
    """Blobs of ink with soft edges on a background, made of 1/f noise above a threshold. For images and flat images.

    cover: share of the pixels that are ink.
    power: a larger one gives larger and rounder blobs.
    soft: width of an edge, in standard deviations of the noise.
    shape, low, high: as for `Strokes`.
    """

    cover: float = 0.15
    power: float = 1.5
    soft: float = 0.3
    shape: tuple[int, ...] | None = None
    low: float | None = None
    high: float | None = None
    name = "blobs"
    kind = "pixels"

    def at_once(self, target: Target) -> int | None:  # noqa: ARG002
        """Any number at once."""
        return None

    def __call__(self, target: Target, n: int, generator: torch.Generator, tell: Tell) -> Tensor:
        """Make n inputs for the target."""
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
    """Bring noise of unit variance into [low, high]. Without a range it stays as it is."""
    if low is None and high is None:
        return x
    if low is None or high is None or not math.isfinite(high - low) or not low < high:
        raise InputError(f"low={low} and high={high}: pass both, low < high, or neither for normalised inputs.")
    return ((low + high) / 2 + (high - low) / 4 * x).clamp(low, high)
