"""What an optimisation of inputs starts from: which kind of input, and its contrast, brightness and range.

The network was trained on inputs of some range, such as [−1, 1], [0, 1] or that of normalised colours, and of some
kind, such as photos or writing. Its batch norms tell which: the starting inputs are those whose statistics are closest
to the running ones.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from coreprune._shapes import Float
from coreprune.queries.sources.base import Target
from coreprune.queries.sources.dead_leaves import leaves
from coreprune.queries.sources.noise import Blobs, pink
from coreprune.queries.sources.norm_statistics import mismatch
from coreprune.queries.sources.strokes import Strokes

_LOOSE = 2.0  # standard deviations: the first range that is tried
# Contrasts and brightnesses of usual inputs, in deviations: normalised ones, [0, 1] and [0, 255], all centred or not.
_USUAL = tuple((gain, offset) for gain in (1.0, 0.25, 64.0) for offset in (0.0, 2.0))
_BETTER = 0.99  # a change has to win one percent
_HOPEFUL = 2.0  # another kind is adapted only if it starts out less than this many times as far off
_TRIES = 300
# Leaves have harder edges than photos, so that a range somewhat too narrow fits them best. In the optimisation it is
# wider. The ranges of two networks for photos, [−1, 1] and [−2.1, 2.6], then come out as ±1.0 and ±2.1.
_WIDER = 1.4
_DRAWN = (Strokes(low=0.0, high=1.0), Blobs(low=0.0, high=1.0))


@dataclass(frozen=True)
class Start:
    """How the starting inputs are made: gain · (offset + clamp(x, ±limit)), with x of zero mean and unit variance.

    kind: a name in `kinds`. padding: of the random crops in which the inputs are measured. off: the
    mismatch of the statistics, summed over the batch norms.
    """

    kind: str
    gain: float = 1.0
    offset: float = 0.0
    limit: float = _LOOSE
    padding: int = 0
    off: float = field(default=math.inf, compare=False)

    def scaled(self, x: Tensor) -> Tensor:
        """Inputs with this contrast, brightness and range, from standardised ones."""
        return self.gain * (self.offset + x.clamp(-self.limit, self.limit))

    @property
    def range(self) -> tuple[float, float]:
        """Plausible values lie between these two."""
        half, middle = abs(self.gain) * _WIDER * self.limit, self.gain * self.offset
        return middle - half, middle + half

    def moves(self) -> Iterator[Callable[[Start], Start]]:
        """Changes of contrast, of brightness, of the range, and of the contrast inside the same range."""
        for factor in (2**0.5, 0.5**0.5):
            yield lambda s, f=factor: replace(s, gain=s.gain * f, offset=s.offset / f)
            yield lambda s, f=factor: replace(s, gain=s.gain * f, offset=s.offset / f, limit=s.limit / f)
            yield lambda s, f=factor: replace(s, limit=s.limit * f)
        for step in (0.5, -0.5):
            yield lambda s, d=step: replace(s, offset=s.offset + d)


def kinds(target: Target) -> dict[str, Callable[[int, torch.Generator], Tensor]]:
    """Functions (n, generator) that make starting inputs of zero mean and unit variance, (n, *target.shape)."""
    shape = target.shape
    if len(shape) == 3:
        image = (shape[0], shape[1], shape[2])
        drawn = {s.name: (lambda n, g, s=s: _standard(s(target, n, g, _silent))) for s in _DRAWN}
        return {"leaves": lambda n, g: leaves(n, image, g), "pink-noise": lambda n, g: pink(n, shape, g), **drawn}
    if len(shape) > 1:
        return {"pink-noise": lambda n, g: pink(n, shape, g)}
    return {"white-noise": lambda n, g: torch.randn(n, *shape, generator=g)}


def _standard(x: Tensor) -> Tensor:
    x = x.to("cpu", torch.float32)
    return (x - x.mean()) / x.std(correction=0).clamp_min(1e-6)


def _silent(done: int, total: int) -> None:
    """Report no progress."""


def begin(target: Target, start: Start, n: int, generator: torch.Generator) -> Float[Tensor, "n ..."]:
    """n starting inputs, in float32 on the example's device."""
    return start.scaled(kinds(target)[start.kind](n, generator).to(target.example.device, torch.float32))


def crops(x: Float[Tensor, "n c h w"], padding: int, generator: torch.Generator) -> Float[Tensor, "n c h w"]:
    """Move every image by up to `padding` pixels along each axis. Zeros fill the gap."""
    n, c, h, w = x.shape
    offsets = torch.randint(0, 2 * padding + 1, (2, n, 1, 1, 1), generator=generator).to(x.device)
    places = [torch.arange(size, device=x.device) for size in (n, c, h, w)]
    rows, columns = offsets[0] + places[2][:, None], offsets[1] + places[3]
    padded = torch.nn.functional.pad(x, (padding,) * 4)
    return padded[places[0][:, None, None, None], places[1][:, None, None], rows, columns]


_FOUND: WeakKeyDictionary[Target, dict[tuple[int, int], Start]] = WeakKeyDictionary()


def fitted(target: Target, n: int, padding: int = 0) -> Start:
    """The start whose statistics, over n inputs, are closest to the running ones. Nothing is optimised.

    From dead leaves (noise, if the inputs are no images) of a usual range, contrast, brightness and range are changed
    by steps as long as this helps. Other kinds of images are tried at the contrast and brightness that were found, and
    those that are not far off are adapted in the same way. The result is the same every time, and remembered for the
    target.
    """
    found = _FOUND.setdefault(target, {})
    if (n, padding) not in found:
        with torch.no_grad():
            fit = _Fit(target, n, padding)
            found[n, padding] = fit.climb(replace(fitted(target, n), padding=padding)) if padding else fit.best()
    return found[n, padding]


class _Fit:
    """The inputs of every kind, drawn once, and the mismatch of the starts that were tried."""

    def __init__(self, target: Target, n: int, padding: int) -> None:
        self.target, self.padding = target, padding
        self.made = {
            name: make(n, torch.Generator().manual_seed(1)).to(target.example.device, torch.float32)
            for name, make in kinds(target).items()
        }
        self.tried: dict[Start, float] = {}

    def off(self, start: Start) -> float:
        if start not in self.tried:
            x = start.scaled(self.made[start.kind])
            x = crops(x, self.padding, torch.Generator().manual_seed(2)) if self.padding else x
            found = float(mismatch(self.target, x).sum())
            self.tried[start] = found if math.isfinite(found) else math.inf
        return self.tried[start]

    def best(self) -> Start:
        first, *others = self.made
        start = self.climb(min((Start(first, gain, offset) for gain, offset in _USUAL), key=self.off))
        found = [start]
        for kind in others:
            signs = [replace(start, kind=kind, gain=gain, offset=offset) for gain, offset in _signs(start)]
            glance = min(signs + [replace(s, limit=2 * _LOOSE) for s in signs], key=self.off)
            if self.off(glance) < _HOPEFUL * start.off:
                found.append(self.climb(glance))
        return min(found, key=lambda s: s.off)

    def climb(self, start: Start) -> Start:
        """Take every move as often as it helps, until none does."""
        while True:
            before = start
            for move in start.moves():
                while len(self.tried) < _TRIES and self.off(after := move(start)) < _BETTER * self.off(start):
                    start = after
            if start == before:
                return replace(start, off=self.off(start))


def _signs(start: Start) -> tuple[tuple[float, float], tuple[float, float]]:
    """Gain and offset for bright ink on dark ground, and for dark ink on bright ground."""
    return (start.gain, start.offset), (-start.gain, -start.offset)
