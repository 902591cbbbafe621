"""Make new images from a few: mirror them, shift them, and combine two into one."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from coreprune._shapes import Float

_CHANNELS = 4  # more channels are features, not colours; this also excludes (N, H, W, C)
_SIDE = 8


def is_image(x: Tensor) -> bool:
    """Whether a tensor looks like images (N, C, H, W): real numbers, up to 4 channels, at least 8 pixels a side."""
    return x.is_floating_point() and x.dim() == 4 and x.shape[1] <= _CHANNELS and min(x.shape[2:]) >= _SIDE


def varied(x: Float[Tensor, "n c h w"], generator: torch.Generator) -> Float[Tensor, "n c h w"]:
    """New images: each is mirrored at random, shifted by up to an eighth of its sides, and half get a part of another.

    Zeros fill what a shift leaves empty. The part is a rectangle with a share λ of the area, uniform on (0, 1): CutMix
    (Yun et al. 2019). No label is mixed: the teacher gives the outputs for the new images. Of the n images, the first
    ⌊n/2⌋ get no part of another.

    generator: on the CPU. The same generator gives the same images on every device, up to rounding.
    """
    mirrored = torch.rand(len(x), generator=generator) < 0.5
    x = torch.where(mirrored[:, None, None, None].to(x.device), x.flip(3), x)
    x = _shifted(x, generator)
    other = x[torch.randperm(len(x), generator=generator).to(x.device)]
    part = _rectangles(torch.rand(len(x), generator=generator), x.shape[2], x.shape[3], generator)
    part[: len(x) // 2] = False
    return torch.where(part.to(x.device), other, x)


def _shifted(x: Tensor, generator: torch.Generator) -> Tensor:
    height, width = x.shape[2:]
    up, left = height // 8, width // 8
    framed = pad(x, (left, left, up, up))
    rows = torch.randint(2 * up + 1, (len(x),), generator=generator)[:, None] + torch.arange(height)
    columns = torch.randint(2 * left + 1, (len(x),), generator=generator)[:, None] + torch.arange(width)
    images = torch.arange(len(x))
    # Advanced indices around a slice put the channels last.
    cut = framed[images[:, None, None], :, rows[:, :, None], columns[:, None, :]]  # (n, h, w, c)
    return cut.permute(0, 3, 1, 2).contiguous()


def _rectangles(share: Tensor, height: int, width: int, generator: torch.Generator) -> Tensor:
    """(n, 1, h, w), true inside a rectangle that has the image's proportions and covers the given share of it."""
    inside = []
    for side in (height, width):
        length = (share.sqrt() * side).floor()
        start = (torch.rand(len(share), generator=generator) * (side - length + 1)).floor()
        position = torch.arange(side)
        inside.append((position >= start[:, None]) & (position < (start + length)[:, None]))
    return (inside[0][:, :, None] & inside[1][:, None, :])[:, None]
