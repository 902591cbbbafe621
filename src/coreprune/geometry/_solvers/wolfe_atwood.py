"""Frank–Wolfe with away steps for the D-optimal design."""

from __future__ import annotations

import math

import torch

from coreprune._shapes import Float, Tensor
from coreprune.geometry._solvers.solution import Solution, leverages

REFRESH = 200  # rank-one updates between two recomputations, because their rounding errors add up


def wolfe_atwood(u: Float[Tensor, "n r"], tol: float, max_iter: int, weights: Float[Tensor, " n"]) -> Solution:
    """Move weight towards the point with the largest ω, or away from the one with the smallest (Todd & Yıldırım 2007).

    M ← (1−t)M + t p pᵀ with the t that maximises log det, t = (ω/r − 1)/(ω − 1), cut at −w/(1−w), where the point has
    no weight left. ω and M⁻¹ follow by rank-one updates, so a step costs n r, and memory is n r. Converges linearly, in
    thousands of cheap steps. Needs r ≥ 2.
    """
    r = u.shape[1]
    weights = weights.clone()
    omega, inverse = _refresh(u, weights)
    best = Solution(weights.clone(), omega, math.inf, 0)
    for iteration in range(max_iter + 1):
        i = int(omega.argmax())
        gap = float(omega[i]) / r - 1
        if not gap > tol or iteration % REFRESH == 0 or iteration == max_iter:
            # Only a fresh ω may end the loop.
            omega, inverse = _refresh(u, weights)
            i = int(omega.argmax())
            gap = float(omega[i]) / r - 1
            if gap < best.gap:
                best = Solution(weights.clone(), omega, gap, iteration)
            if not tol < gap < math.inf or iteration == max_iter:  # done, or M(w) is numerically singular
                return Solution(best.weights, best.leverages, best.gap, iteration)
        j = int(torch.where(weights > 0, omega, torch.inf).argmin())
        top, low, mass = float(omega[i]), float(omega[j]), float(weights[j])
        if gap >= 1 - low / r:
            step = gap / (top - 1)
            weights *= 1 - step
            weights[i] += step
        else:
            i, top = j, low
            most = mass / (1 - mass)
            # Below ω = 1, log det grows until the point has no weight.
            step = -min((1 - low / r) / (low - 1), most) if low > 1 else -most
            weights *= 1 - step
            weights[i] = 0.0 if step == -most else weights[i] + step
        q = inverse @ u[i]
        beta = step / (1 - step + step * top)
        omega = (omega - beta * (u @ q).square()) / (1 - step)
        inverse = (inverse - beta * torch.outer(q, q)) / (1 - step)
    return best


def _refresh(u: Float[Tensor, "n r"], weights: Float[Tensor, " n"]) -> tuple[Tensor, Tensor]:
    """Compute ω and M⁻¹ from scratch. They are NaN where M is numerically singular."""
    weights /= weights.sum()
    factor, failed = torch.linalg.cholesky_ex(u.T @ (weights[:, None] * u))
    inverse = torch.cholesky_inverse(factor)
    return leverages(u, weights), torch.full_like(inverse, torch.nan) if int(failed) else inverse
