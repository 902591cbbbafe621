"""Primal-dual interior-point method for the D-optimal design."""

from __future__ import annotations

import torch

from coreprune._shapes import Float, Tensor
from coreprune.geometry._solvers.fixed_point import fixed_point
from coreprune.geometry._solvers.solution import Solution, whiten


def interior_point(u: Float[Tensor, "n r"], tol: float, max_iter: int, weights: Float[Tensor, " n"]) -> Solution:
    """Mehrotra's predictor-corrector method on max log det M(w) − r Σw, w ≥ 0, after a few fixed-point steps.

    The optimum has Σw = 1 by itself (Σ w_i ω_i = r always). So the constraint is dropped, and the Newton matrix
    G + diag(s/w), with G = (U M⁻¹ Uᵀ)∘² and s = r − ω, stays positive definite, even for duplicated points.
    A step costs n² r + n³/3, and 2 to 8 steps are usual. Memory is 2 n². Stops early where rounding prevents progress.
    """
    n, r = u.shape
    # A Newton step costs as much as (n/r)²/6 + n/2r fixed-point steps, and a better start needs fewer Newton steps.
    best = fixed_point(u, tol, min(max_iter, 6 + n // r), weights)
    if best.gap <= tol:
        return best
    # s = r − ω must be positive at the start. More mass makes ω smaller.
    w = best.weights.clamp_min(1e-9 / n) * (1.1 * (1 + best.gap))
    z = whiten(u, w)
    omega = z.square().sum(dim=0)
    s = r - omega
    for iteration in range(best.iterations, max_iter):
        newton = (z.T @ z).square_()
        newton.diagonal().add_(s / w)
        factor, failed = torch.linalg.cholesky_ex(newton)
        del newton
        if int(failed):
            break
        mu = float(w @ s) / n
        # (G + s/w) dw = rhs gives G dw = rhs − (s/w) dw, so G itself is not needed again.
        dw = torch.cholesky_solve((omega - r)[:, None], factor)[:, 0]
        ds = -s - s / w * dw
        affine = float((w + _step(w, dw) * dw) @ (s + _step(s, ds) * ds)) / n
        sigma = max((affine / mu) ** 3, 1e-4)
        pull = (sigma * mu - dw * ds) / w
        dw = torch.cholesky_solve((pull + omega - r)[:, None], factor)[:, 0]
        ds = pull - s - s / w * dw
        w = w + 0.99 * _step(w, dw) * dw
        s = s + 0.99 * _step(s, ds) * ds
        z = whiten(u, w)
        omega = z.square().sum(dim=0)
        total = w.sum()
        gap = float(omega.max() * total) / r - 1
        if not gap < 0.9 * best.gap and iteration > best.iterations + 5:
            break
        if gap < best.gap:
            best = Solution(w / total, omega * total, gap, iteration + 1)
        if gap <= tol:
            break
    return best


def _step(x: Float[Tensor, " n"], dx: Float[Tensor, " n"]) -> float:
    """The longest step t ≤ 1 that keeps x + t dx ≥ 0."""
    return min(1.0, 1.0 / max(float((-dx / x).max()), 1e-300))
