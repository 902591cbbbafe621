"""Ridge least squares from accumulated moments. Every repair uses this closed form."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch

from coreprune._shapes import Float, Tensor
from coreprune.errors import GeometryError

_SMALL = 200  # up to this many features, one product is faster than splitting it


@dataclass
class LeastSquares:
    """min over W, b of E‖Y − X Wᵀ − b‖² + λ‖W − W₀‖², for g independent problems, from chunks of rows.

    Only moments are stored, (g, f, f) and (g, o, f) float64, so memory does not depend on the number of rows.

    intercept: False fixes b = 0. rows: how many rows have been added.
    """

    intercept: bool = True
    rows: int = 0
    _shift_x: Tensor = field(default_factory=lambda: torch.zeros(0), repr=False)
    _shift_y: Tensor = field(default_factory=lambda: torch.zeros(0), repr=False)
    _sum_x: Tensor = field(default_factory=lambda: torch.zeros(0), repr=False)
    _sum_y: Tensor = field(default_factory=lambda: torch.zeros(0), repr=False)
    _xx: Tensor = field(default_factory=lambda: torch.zeros(0), repr=False)
    _yx: Tensor = field(default_factory=lambda: torch.zeros(0), repr=False)
    _yy: Tensor = field(default_factory=lambda: torch.zeros(0), repr=False)
    _factor: tuple[float, Tensor, Tensor] | None = field(default=None, repr=False)  # of XᵀX + λ, by ridge

    def add(self, x: Float[Tensor, "g rows f"], y: Float[Tensor, "g rows o"]) -> None:
        """Accumulate a chunk of rows of any floating dtype."""
        if self._shift_x.numel() == 0:
            # Sums are taken around the mean of the first chunk, so that large means cause no cancellation.
            keep = 1.0 if self.intercept else 0.0
            self._shift_x, self._shift_y = (keep * t.mean(1, keepdim=True, dtype=torch.float64) for t in (x, y))
            self._empty(x.shape[2], y.shape[2])
        x, y = _minus(x, self._shift_x), _minus(y, self._shift_y)
        self.rows, self._factor = self.rows + x.shape[1], None
        self._sum_x += x.sum(1, keepdim=True)
        self._sum_y += y.sum(1, keepdim=True)
        _add_gram_(self._xx, x)
        self._yx.baddbmm_(y.mT, x)
        self._yy += y.square().sum(1)

    def _empty(self, f: int, o: int) -> None:
        """Sums over no rows, around the shifts."""
        g, zeros = self._shift_x.shape[0], self._shift_x.new_zeros
        self._sum_x, self._sum_y = torch.zeros_like(self._shift_x), torch.zeros_like(self._shift_y)
        self._xx, self._yx, self._yy = zeros(g, f, f), zeros(g, o, f), zeros(g, o)

    def moments(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Means (g, f) and (g, o), and XᵀX (g, f, f) and YᵀX (g, o, f) per row, central if there is an intercept."""
        mean_x, mean_y = self._sum_x / self.rows, self._sum_y / self.rows
        xx, yx = self._xx / self.rows, self._yx / self.rows
        if self.intercept:
            xx = xx - mean_x.mT @ mean_x
            yx = yx - mean_y.mT @ mean_x
        return (mean_x + self._shift_x)[:, 0], (mean_y + self._shift_y)[:, 0], xx, yx

    def solve(self, start: Float[Tensor, "g o f"], ridge: float) -> tuple[Float[Tensor, "g o f"], Float[Tensor, "g o"]]:
        """Return the minimiser W (g, o, f) and b (g, o), float64.

        start: W₀. ridge: λ as a multiple of the mean diagonal of the second moment of X; ∞ changes the intercept only.

        Raises GeometryError if the moments are not finite.
        """
        _, _, xx, yx = self.moments()
        if not bool(torch.isfinite(xx).all() and torch.isfinite(yx).all()):
            raise GeometryError("the moments of the queries are not finite; check the queries and the activations.")
        start = start.double()
        if math.isinf(ridge):
            return start, self.intercepts(start)
        lam = ridge_of(xx.diagonal(dim1=1, dim2=2).mean(1), ridge)
        if self._factor is None or self._factor[0] != ridge:
            system = xx + lam[:, None, None] * torch.eye(xx.shape[1], dtype=xx.dtype, device=xx.device)
            self._factor = (ridge, *torch.linalg.lu_factor(system))
        change = torch.linalg.lu_solve(*self._factor[1:], (yx - start @ xx).mT).mT
        return start + change, self.intercepts(start + change)

    def intercepts(self, weight: Float[Tensor, "g o f"]) -> Float[Tensor, "g o"]:
        """The best b for these weights."""
        mean_x, mean_y, _, _ = self.moments()
        return mean_y - (weight @ mean_x[:, :, None])[..., 0] if self.intercept else torch.zeros_like(mean_y)

    def variance(self) -> Float[Tensor, "g o"]:
        """Variance of each target, or its second moment if there is no intercept."""
        return self._yy / self.rows - (((self._sum_y / self.rows)[:, 0] ** 2) if self.intercept else 0.0)

    def sibling(self) -> LeastSquares:
        """The same problem without rows, with sums around the same means, so that both can be added up."""
        other = LeastSquares(self.intercept)
        other._shift_x, other._shift_y = self._shift_x, self._shift_y
        for name in ("_sum_x", "_sum_y", "_xx", "_yx", "_yy"):
            setattr(other, name, torch.zeros_like(getattr(self, name)))
        return other

    def __add__(self, other: LeastSquares) -> LeastSquares:
        """The problem with the rows of both. One must be the other's `sibling`."""
        both = LeastSquares(self.intercept, self.rows + other.rows, self._shift_x, self._shift_y)
        for name in ("_sum_x", "_sum_y", "_xx", "_yx", "_yy"):
            setattr(both, name, getattr(self, name) + getattr(other, name))
        return both

    def around_(self, x: Float[Tensor, "g 1 f"], y: Float[Tensor, "g 1 o"]) -> None:
        """Take the sums around other points, x of the features and y of the targets; nothing else changes.

        Sums that were taken around the same points add up. Without an intercept the points are zero.
        """
        if self._shift_x.numel() == 0:
            self._shift_x, self._shift_y = x.clone(), y.clone()
            self._empty(x.shape[2], y.shape[2])
            return
        to_x, to_y = self._shift_x - x, self._shift_y - y
        self._xx += self._sum_x.mT @ to_x + to_x.mT @ self._sum_x + self.rows * (to_x.mT @ to_x)
        self._yx += self._sum_y.mT @ to_x + to_y.mT @ self._sum_x + self.rows * (to_y.mT @ to_x)
        self._yy += (2 * to_y * self._sum_y + self.rows * to_y.square())[:, 0]
        self._sum_x += self.rows * to_x
        self._sum_y += self.rows * to_y
        self._shift_x, self._shift_y, self._factor = x.clone(), y.clone(), None

    @property
    def points(self) -> tuple[Float[Tensor, "g 1 f"], Float[Tensor, "g 1 o"]]:
        """The points around which the sums are taken."""
        return self._shift_x, self._shift_y

    def sums(self, targets_only: bool = False) -> list[Tensor]:
        """The sums themselves. Over parts of the rows, and around the same points, they add up.

        targets_only: without those over X alone.
        """
        of_targets = [self._sum_y, self._yx, self._yy]
        return of_targets if targets_only else [self._sum_x, self._xx, *of_targets]

    def retarget(self) -> LeastSquares:
        """The same X with empty sums over Y, to be filled by `add_targets`."""
        other = LeastSquares(self.intercept, self.rows)
        other._shift_x, other._sum_x, other._xx, other._factor = self._shift_x, self._sum_x, self._xx, self._factor
        other._shift_y = self._shift_y
        other._sum_y, other._yx, other._yy = (torch.zeros_like(t) for t in (self._sum_y, self._yx, self._yy))
        return other

    def add_targets(self, x: Float[Tensor, "g rows f"], y: Float[Tensor, "g rows o"]) -> None:
        """Accumulate YᵀX for rows of X that have been added before."""
        y = _minus(y, self._shift_y)
        total = y.sum(1, keepdim=True)
        self._sum_y += total
        # Σ y (x − s)ᵀ without a shifted copy of x, because this runs once per round of a repair.
        self._yx.baddbmm_(y.mT, x.double()).baddbmm_(total.mT, self._shift_x, alpha=-1)
        self._yy += y.square().sum(1)

    def error(self, weight: Float[Tensor, "g o f"], bias: Float[Tensor, "g o"]) -> Float[Tensor, "g o"]:
        """Mean squared error of each output under (W, b) on the rows added so far."""
        mean_x, mean_y, xx, yx = self.moments()
        residual = self.variance() - 2 * (weight * yx).sum(2) + ((weight @ xx) * weight).sum(2)
        if self.intercept:
            residual = residual + (mean_y - bias - (weight @ mean_x[:, :, None])[..., 0]) ** 2
        return residual.clamp(min=0)


def ridge_of(scale: Float[Tensor, " g"], ridge: float) -> Float[Tensor, " g"]:
    """λ from a multiple of the mean second moment. If all features are constant, any positive λ keeps the weights."""
    return torch.where(scale > 0, ridge * scale, torch.ones_like(scale))


def _minus(x: Tensor, shift: Tensor) -> Tensor:
    """x − shift in float64, with one copy of x instead of two."""
    return x - shift if x.dtype == torch.float64 else x.double().sub_(shift)


def _add_gram_(total: Tensor, x: Tensor) -> None:
    """total (g, f, f) += XᵀX. Blocks off the diagonal are computed once for both sides, which saves up to half."""
    f = x.shape[2]
    if f <= _SMALL:
        total.baddbmm_(x.mT, x)
        return
    half = f // 2
    _add_gram_(total[:, :half, :half], x[:, :, :half])
    _add_gram_(total[:, half:, half:], x[:, :, half:])
    side = x[:, :, :half].mT @ x[:, :, half:]
    total[:, :half, half:] += side
    total[:, half:, :half] += side.mT
