"""Dead leaves: images of objects that cover each other. They have the statistics of natural images."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from coreprune._shapes import Float, Tensor
from coreprune.errors import InputError
from coreprune.queries.sources.base import Target, Tell
from coreprune.queries.sources.image_shape import image_shape
from coreprune.queries.sources.noise import in_range, pink

_FINER = 2  # drawn on a grid this much finer, then averaged: soft edges


def leaves(
    n: int,
    shape: tuple[int, int, int],
    generator: torch.Generator,
    *,
    count: int = 20,
    smallest: float = 0.05,
    largest: float = 1.25,
    colour: float = 0.95,
    texture: float = 0.3,
) -> Float[Tensor, "n c h w"]:
    """Shaded discs and squares of random size, place and colour, one over the other, with 1/f texture.

    This is the dead-leaves model (Lee, Mumford & Huang, IJCV 2001). Besides the 1/f spectrum of natural images it has
    their edges and flat areas, which Gaussian noise lacks.

    shape: (channels, height, width).
    count: number of leaves in an image.
    smallest, largest: limits of their radius, as a share of the image's side. The density is radius⁻².
    colour: correlation between the channels.
    texture: amplitude of the 1/f noise.

    Returns float32 on the CPU, with unit variance over all images.
    """
    c, h, w = shape
    fine = (h * _FINER, w * _FINER)
    y = ((torch.arange(fine[0]) + 0.5) / fine[0])[:, None]
    x = ((torch.arange(fine[1]) + 0.5) / fine[1])[None, :]
    image = _colours(n, c, colour, generator)[:, :, None, None].expand(n, c, *fine).clone()  # the background
    for _ in range(count):
        radius, place_y, place_x, angle, square = torch.rand(5, n, 1, 1, generator=generator)
        narrow = torch.exp(0.25 * torch.randn(n, 1, 1, generator=generator))
        radius = 1 / (1 / smallest + (1 / largest - 1 / smallest) * radius)
        dy, dx = y - (1.4 * place_y - 0.2), x - (1.4 * place_x - 0.2)
        cos, sin = torch.cos(math.pi * angle), torch.sin(math.pi * angle)
        along, across = (dx * cos + dy * sin) * narrow, (dy * cos - dx * sin) / narrow
        round_ = (along.square() + across.square()).sqrt()
        distance = torch.where(square < 0.2, torch.maximum(along.abs(), across.abs()), round_)
        slope = 0.4 * torch.randn(2, n, 1, 1, 1, generator=generator)
        shade = slope[0] * dy[:, None] + slope[1] * dx[:, None]
        fill = _colours(n, c, colour, generator)[:, :, None, None] + shade
        image = torch.where((distance < radius)[:, None], fill, image)
    image = torch.nn.functional.avg_pool2d(image, _FINER) + texture * pink(n, shape, generator, colour=0.9)
    return image / image.square().mean().sqrt()


def _colours(n: int, c: int, colour: float, generator: torch.Generator) -> Tensor:
    """Gaussian colours (n, c) of unit variance, correlated between the channels."""
    shared, own = torch.randn(n, 1, generator=generator), torch.randn(n, c, generator=generator)
    return colour**0.5 * shared + (1 - colour) ** 0.5 * own if c > 1 else own


@dataclass(frozen=True)
class Leaves:
    """Dead leaves: shaded discs and squares that cover each other, with 1/f texture. For images and flat images.

    They have the spectrum, the edges and the flat areas of natural images (Lee, Mumford & Huang, IJCV 2001).

    count: number of leaves in an image.
    colour: correlation between the channels.
    texture: amplitude of the 1/f noise.
    shape, low, high: as for `PinkNoise`.
    """

    count: int = 20
    colour: float = 0.95
    texture: float = 0.3
    shape: tuple[int, ...] | None = None
    low: float | None = None
    high: float | None = None
    name = "leaves"
    kind = "pixels"

    def at_once(self, target: Target) -> int | None:
        """As many as hold about 10⁷ numbers together."""
        return max(1, 10_000_000 // max(1, math.prod(target.shape)))

    def __call__(self, target: Target, n: int, generator: torch.Generator, tell: Tell) -> Tensor:
        """Make n inputs for the target."""
        if self.count < 0 or not 0 <= self.colour <= 1 or self.texture < 0:
            raise InputError(f"count={self.count}, colour={self.colour} or texture={self.texture} is out of range.")
        shape = image_shape(target, self.shape)
        x = leaves(n, shape, generator, count=self.count, colour=self.colour, texture=self.texture)
        tell(1, 1)
        return target.cast(in_range(x, self.low, self.high))
