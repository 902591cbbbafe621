"""Random pen strokes, as in handwriting and line drawings."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from coreprune._shapes import Float, Tensor
from coreprune.errors import InputError
from coreprune.queries.sources.base import Target, Tell
from coreprune.queries.sources.image_shape import image_shape, inked

_DENSE = 12  # points on the curve between two control points, close enough for the thinnest pen
_AT_ONCE = 256 * 32 * 32  # pixels of the drawings whose distances to the curves are in memory together


@dataclass(frozen=True)
class Strokes:
    """Smooth strokes of a round pen on a background. The drawing is centred, and the same in every channel.

    A stroke is a Catmull-Rom spline through a few control points. They are the steps of a walk that keeps turning to
    the same side, so that hooks, arcs and loops are as common as in writing. Lengths are shares of the image's side.

    count: least and largest number of strokes in a drawing.
    points: least and largest number of control points of a stroke.
    turn: typical turn at a control point, in radians.
    radius: least and largest radius of the pen.
    margin: what stays empty at every edge.
    soft: width of the ink's edge.
    shape: (height, width) or (channels, height, width) of an image whose pixels the model takes as a flat vector. When
        None, it is guessed from the weights that read the vector.
    low, high: values of background and ink. When None, they are taken from the example if it looks like a real image,
        and are otherwise −0.42 and 2.38, which suits inputs of zero mean and unit variance.
    """

    count: tuple[int, int] = (1, 3)
    points: tuple[int, int] = (3, 4)
    turn: float = 0.75
    radius: tuple[float, float] = (0.035, 0.06)
    margin: float = 0.15
    soft: float = 0.015
    shape: tuple[int, ...] | None = None
    low: float | None = None
    high: float | None = None
    name = "strokes"
    kind = "pixels"

    def at_once(self, target: Target) -> int | None:  # noqa: ARG002
        """Any number at once."""
        return None

    def __call__(self, target: Target, n: int, generator: torch.Generator, tell: Tell) -> Tensor:
        """Make n inputs for the target."""
        if not 1 <= self.count[0] <= self.count[1] or not 2 <= self.points[0] <= self.points[1]:
            raise InputError(f"count={self.count} and points={self.points} are ranges that start at 1 and 2 or above.")
        if not 0 < self.radius[0] <= self.radius[1] or not self.soft > 0 or not 0 <= self.margin < 0.5:
            raise InputError(f"radius={self.radius}, soft={self.soft} and margin={self.margin} leave no room to draw.")
        c, h, w = image_shape(target, self.shape)
        parts = []
        size = max(1, min(256, _AT_ONCE // (h * w)))
        for start in range(0, n, size):
            parts.append(self._draw(min(size, n - start), h, w, generator))
            tell(min(n, start + size), n)
        ink = torch.cat(parts)[:, None].expand(n, c, h, w)
        return inked(target, ink, self.low, self.high)

    def _draw(self, n: int, h: int, w: int, generator: torch.Generator) -> Float[Tensor, "n h w"]:
        """Ink between 0 and 1."""
        curves, drawn = self._curves(n, generator)  # (n, strokes, dense, 2), (n, strokes)
        curves = _centred(curves, drawn, (1 - 2 * self.margin) * _uniform(generator, 0.8, 1.0, n, 1, 1, 1))
        curves = curves.masked_fill(~drawn[:, :, None, None], 1e3)  # far away: a stroke that is not drawn
        radius = _uniform(generator, *self.radius, n, 1)
        y, x = (torch.arange(h) + 0.5) / h, (torch.arange(w) + 0.5) / w
        pixels = torch.cartesian_prod(y, x).expand(n, -1, -1)  # (n, hw, 2)
        distance = torch.cdist(pixels, curves.flatten(1, 2)).amin(dim=2)  # (n, hw)
        return torch.sigmoid(1.7 * (radius - distance) / self.soft).reshape(n, h, w)

    def _curves(self, n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Curves (n, strokes, dense, 2), and which strokes are drawn (n, strokes)."""
        strokes, points = self.count[1], self.points[1]
        size = (n, strokes)
        drawn = torch.arange(strokes) < torch.randint(self.count[0], strokes + 1, (n, 1), generator=generator)
        last = torch.randint(self.points[0] - 1, points, size, generator=generator)  # index of the last control point
        bend = self.turn * torch.randn(*size, 1, generator=generator)
        jitter = 0.5 * self.turn * torch.randn(*size, points, generator=generator)
        angle = _uniform(generator, 0.0, 2 * math.pi, *size, 1) + torch.cumsum(bend + jitter, dim=2)
        length = _uniform(generator, 0.1, 0.4, *size, 1) * _uniform(generator, 0.7, 1.3, *size, points)
        control = torch.cumsum(torch.stack([angle.sin(), angle.cos()], -1) * length[..., None], dim=2)
        control = control - control.mean(dim=2, keepdim=True) + 0.2 * torch.randn(*size, 1, 2, generator=generator)
        index = torch.minimum(torch.arange(points), last[..., None])[..., None].expand(*size, points, 2)
        return _spline(control.gather(2, index)), drawn


def _spline(control: Float[Tensor, "n s p 2"]) -> Float[Tensor, "n s dense 2"]:
    """Catmull-Rom splines through the control points. The end points count twice."""
    pieces = control.shape[2] - 1
    p = torch.cat([control[:, :, :1], control, control[:, :, -1:]], dim=2)
    a, b, c, d = (p[:, :, j : j + pieces, None] for j in range(4))
    t = torch.linspace(0, 1, _DENSE)[:, None]
    curve = b + 0.5 * ((c - a) * t + (2 * a - 5 * b + 4 * c - d) * t**2 + (3 * b - a - 3 * c + d) * t**3)
    return curve.flatten(2, 3)


def _centred(curves: Tensor, drawn: Tensor, size: Tensor) -> Tensor:
    """Move every drawing to the middle of the unit square, and scale the longer side of its bounding box to `size`."""
    hidden = ~drawn[:, :, None, None]
    low = curves.masked_fill(hidden, math.inf).amin(dim=(1, 2), keepdim=True)
    high = curves.masked_fill(hidden, -math.inf).amax(dim=(1, 2), keepdim=True)
    longer = (high - low).amax(dim=3, keepdim=True).clamp_min(0.05)
    return (curves - (low + high) / 2) * (size / longer) + 0.5


def _uniform(generator: torch.Generator, low: float, high: float, *size: int) -> Tensor:
    return low + (high - low) * torch.rand(*size, generator=generator)
