"""Primal-dual interior point for the D-optimal design."""

from __future__ import annotations

import torch

from coreprune._shapes import Float, Tensor
from coreprune.geometry._solvers.solution import Solution


def leverages(u: Float[Tensor, "n r"], weights: Float[Tensor, " n"]) -> tuple[Tensor, Tensor]:
    """ω_i = p_iᵀ M(w)⁻¹ p_i and Z = L⁻¹Uᵀ (r, n), where L Lᵀ = M(w) = Uᵀ diag(w) U."""
    m = u.T @ (weights[:, None] * u)
    z = torch.linalg.solve_triangular(torch.linalg.cholesky(m), u.T, upper=False)
    return (z * z).sum(dim=0), z


def interior_point(u: Float[Tensor, "n r"], tol: float, max_iter: int) -> Solution:
    """Mehrotra predictor-corrector on max log det M(w) − r Σw, w ≥ 0.

    At the optimum Σw = 1 by itself, so the constraint is dropped and the Newton matrix stays positive definite:
    G + diag(s/w), G = (U M⁻¹ Uᵀ)∘². Cost n²r + n³/3 an iteration, 2 to 8 iterations. Memory 2 n².
    """
    n, r = u.shape
    w = torch.full((n,), 1.0 / n, dtype=u.dtype, device=u.device)
    for _ in range(10):
        omega, _ = leverages(u, w)
        w = w * omega / r
    omega, _ = leverages(u, w)
    w = w * (1.1 * float(omega.max()) / r)
    omega, z = leverages(u, w)
    s = r - omega
    for iteration in range(max_iter):
        gap = float(omega.max() * w.sum()) / r - 1
        if gap <= tol:
            return Solution(w / w.sum(), iteration, True)
        g = (z.T @ z).square_()
        factor, failed = torch.linalg.cholesky_ex(g + torch.diag(s / w))
        if bool(failed):
            break
        mu = float(w @ s) / n
        residual = omega + s - r
        dw = torch.cholesky_solve((omega - r)[:, None], factor)[:, 0]
        ds = g @ dw - residual
        affine = float((w + _step(w, dw) * dw) @ (s + _step(s, ds) * ds)) / n
        sigma = max((affine / mu) ** 3, 1e-4)
        dw = torch.cholesky_solve((sigma * mu / w + omega - r - dw * ds / w)[:, None], factor)[:, 0]
        ds = g @ dw - residual
        w = w + 0.99 * _step(w, dw) * dw
        s = s + 0.99 * _step(s, ds) * ds
        omega, z = leverages(u, w)
    return Solution(w / w.sum(), max_iter, False)


def _step(x: Float[Tensor, " n"], dx: Float[Tensor, " n"]) -> float:
    """The longest step t ≤ 1 that keeps x + t dx ≥ 0."""
    return min(1.0, 1.0 / max(float((-dx / x).max()), 1e-300))
