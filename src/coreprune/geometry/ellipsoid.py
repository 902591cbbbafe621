"""The Löwner ellipsoid (minimum-volume enclosing ellipsoid), with a gap that is certified on the given points."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from coreprune._shapes import Float, Int, Tensor
from coreprune._validate import as_points
from coreprune.errors import InputError
from coreprune.geometry._solvers import Solution, interior_point
from coreprune.geometry.span import column_scale, span

METHODS = ("auto", "interior-point", "wolfe-atwood", "fixed-point")


@dataclass(frozen=True)
class Status:
    """Whether the gap that was asked for is certified, and what to do where it is not."""

    converged: bool
    message: str

    def __str__(self) -> str:
        return self.message


@dataclass(frozen=True)
class Ellipsoid:
    """{y : (y−c)ᵀ shape⁺ (y−c) ≤ radius_squared} contains all points (Todd & Yıldırım 2007).

    center (d,): c = 0 in the symmetric case, Σ u_i p_i otherwise.
    shape (d, d): Σ u_i (p_i−c)(p_i−c)ᵀ. whitening (d, r): (y−c)ᵀ shape⁺ (y−c) = ‖whiteningᵀ(y−c)‖² on the span;
    use it rather than a pseudo-inverse of `shape`, whose condition number is the square of the points' one.
    weights (n,): u ≥ 0, Σu = 1 (all zero if every point is the origin). support (k,): the indices with u_i > 0.
    distances (n,): (p_i−c)ᵀ shape⁺ (p_i−c).
    gap: ε with distances ≤ (1+ε) r (symmetric) or ≤ r + ε(r+1) (general), rounding included; the volume is then
    within (1+ε)^{r/2} (general: (1+ε)^{(r+1)/2}) of the smallest.
    rank: r, the dimension of the (affine) span. iterations, status: how the solver ended.
    """

    center: Float[Tensor, " d"]
    shape: Float[Tensor, "d d"]
    whitening: Float[Tensor, "d r"]
    weights: Float[Tensor, " n"]
    support: Int[Tensor, " k"]
    distances: Float[Tensor, " n"]
    gap: float
    radius_squared: float
    rank: int
    iterations: int
    status: Status


def mvee(
    points: Float[Tensor, "n d"],
    symmetric: bool = True,
    tol: float = 1e-2,
    max_iter: int | None = None,
    method: str = "auto",
) -> Ellipsoid:
    """The smallest ellipsoid around ±points (centred at 0) or, with symmetric=False, around the points."""
    points = as_points(points)
    if method not in METHODS:
        raise InputError(f"unknown method {method!r}. Known methods: {', '.join(METHODS)}.")
    if not 0 < tol < math.inf:
        raise InputError(f"tol must be positive, but is {tol}.")
    n, d = points.shape
    center = points.new_zeros(d) if symmetric else points[0] + (points - points[0]).mean(dim=0)
    # Differences to one of the points are rounded relative to the spread, not to the offset of the cloud.
    origin = points.new_zeros(d) if symmetric else points[0]
    local = points - origin
    moved = local if symmetric else local - local.mean(dim=0)
    alive = torch.nonzero((moved != 0).any(dim=1) if symmetric else torch.ones(n, dtype=torch.bool))[:, 0]
    sp = span(moved[alive]) if len(alive) else None
    rank = sp.rank if sp is not None else 0
    weights = points.new_zeros(n)
    limit = 100 if max_iter is None else max_iter
    solution = Solution(points.new_zeros(len(alive)), 0, True)
    if sp is not None and (rank > 0 or not symmetric):
        u = sp.coordinates
        if not symmetric:
            u = torch.cat([u, u.new_full((len(alive), 1), len(alive) ** -0.5)], dim=1)
        if u.shape[0] == u.shape[1] or rank == 0:
            solution = Solution(points.new_full((len(alive),), 1.0 / len(alive)), 0, True)
        else:
            solution = interior_point(u, 0.9 * tol, limit)
    w = solution.weights
    w = torch.where(w < 1e-5 / n, 0.0, w)
    weights[alive] = w / w.sum().clamp_min(1e-300)
    # ---- certificate
    scale = column_scale(moved)
    if not symmetric:
        shift = weights @ local
        center, moved = origin + shift, local - shift
    shape = _gram(moved / scale, weights) * scale[:, None] * scale
    gap, distances = 0.0, points.new_zeros(n)
    whitening = points.new_zeros(d, rank)
    if rank and sp is not None:
        base = sp.basis / sp.singular_values
        y = (moved / scale) @ base
        chol = torch.linalg.cholesky(_gram(y, weights))
        h = torch.linalg.solve_triangular(chol, base.T, upper=False).T
        y = (moved / scale) @ h
        error = _gram(y, weights)
        eta = float(torch.linalg.matrix_norm(error - torch.eye(rank, dtype=y.dtype, device=y.device)))
        distances = (y * y).sum(dim=1)
        whitening = h / scale[:, None]
        lift = 0 if symmetric else 1
        gap = max(0.0, (float(distances.max()) + lift) / ((rank + lift) * max(1 - eta, 1e-300)) - 1)
    radius = (1 + gap) * rank if symmetric else rank + gap * (rank + 1)
    if gap <= tol:
        status = Status(True, f"converged: the gap {gap:.1e} is at most {tol:.1e}")
    else:
        status = Status(False, f"not converged: the gap is {gap:.1e}, not {tol:.1e}; raise max_iter above {limit}")
    support = torch.nonzero(weights > 0)[:, 0]
    return Ellipsoid(
        center, shape, whitening, weights, support, distances, gap, radius, rank, solution.iterations, status
    )


def _gram(points: Float[Tensor, "n d"], weights: Float[Tensor, " n"]) -> Tensor:
    return points.T @ (weights[:, None] * points)
