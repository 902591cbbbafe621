"""Show query images on one contact sheet."""

from __future__ import annotations

import base64
import io
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from PIL.Image import Image

_SMALLEST = 8  # pixels a side; anything smaller is a vector whose length happens to be a square
_LARGEST = 56  # pixels a side on the sheet
_HEAVY = 300_000  # bytes; noise in full colour does not compress, and 256 colours are enough for it


@dataclass(frozen=True)
class Sheet:
    """A contact sheet.

    uri: the PNG as a data URI. shown, total: how many images are on it, and how many there are. width, height: of the
    sheet, in pixels.
    """

    uri: str
    shown: int
    total: int
    width: int
    height: int


def contact_sheet(images: Tensor, most: int = 64) -> Sheet | None:
    """Up to `most` images side by side; None if the tensor does not hold images.

    images: (N, C, H, W) with C in {1, 3} and at least 8 pixels a side, or (N, d) with d the square of at least 8; real
        numbers on any device. The values of queries have no fixed range. So every channel of every image is stretched
        such that its own 1 % quantile is black and its 99 % quantile is full. Large images are made smaller.
    """
    from PIL import Image

    x = _as_images(images)
    if x is None:
        return None
    chosen = x[:most]
    scale = min(1.0, _LARGEST / max(chosen.shape[2:]))
    high, wide = (max(1, round(side * scale)) for side in chosen.shape[2:])
    columns = math.ceil(math.sqrt(len(chosen)))
    rows = math.ceil(len(chosen) / columns)
    size = (columns * (wide + 1) - 1, rows * (high + 1) - 1)
    sheet = Image.new("RGB", size, (128, 128, 128))
    for i, image in enumerate(chosen):
        tile = Image.fromarray(_stretched(image, (high, wide)))
        sheet.paste(tile, (i % columns * (wide + 1), i // columns * (high + 1)))
    png = _png(sheet)
    if len(png) > _HEAVY:
        png = _png(sheet.quantize(256))
    return Sheet("data:image/png;base64," + base64.b64encode(png).decode(), len(chosen), len(x), *size)


def _as_images(x: Tensor) -> Tensor | None:
    """The tensor as images (N, C, H, W), or None if it does not hold images."""
    if not x.is_floating_point() or x.dim() < 2 or len(x) == 0:
        return None
    if x.dim() == 2:
        side = math.isqrt(x.shape[1])
        x = x.reshape(len(x), 1, side, side) if side * side == x.shape[1] else x
    return x.detach() if x.dim() == 4 and x.shape[1] in (1, 3) and min(x.shape[2:]) >= _SMALLEST else None


def _stretched(image: Tensor, size: tuple[int, int]) -> np.ndarray:
    """(height, width, 3) uint8. The image is resized before the stretch, so the range is that of the shown pixels."""
    real = torch.nan_to_num(image.to("cpu", torch.float32), 0.0, 0.0, 0.0)
    pixels = torch.nn.functional.adaptive_avg_pool2d(real, size).numpy()  # (c, h, w)
    low, high = np.quantile(pixels, (0.01, 0.99), axis=(1, 2), keepdims=True)
    grey = np.where(high > low, (pixels - low) / np.maximum(high - low, 1e-30), 0.5)
    shades = (255 * grey.clip(0, 1)).round().astype(np.uint8)
    return np.ascontiguousarray(shades.repeat(3 // len(shades), axis=0).transpose(1, 2, 0))


def _png(image: Image) -> bytes:
    out = io.BytesIO()
    image.save(out, format="PNG", optimize=True)
    return out.getvalue()
