"""What every solver takes and returns."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from coreprune._shapes import Float, Tensor


@dataclass(frozen=True)
class Solution:
    """Weights w on the simplex, their leverages ω_i = p_iᵀ M(w)⁻¹ p_i, and the solver's gap max ω / r − 1."""

    weights: Float[Tensor, " n"]
    leverages: Float[Tensor, " n"]
    gap: float
    iterations: int


# (u, tol, max_iter, weights) -> Solution: maximise log det Σ w_i p_i p_iᵀ over the simplex for the rows p_i of
# u (n, r), rank r, starting from `weights`.
Solver = Callable[[Tensor, float, int, Tensor], Solution]


def whiten(
    u: Float[Tensor, "n r"], weights: Float[Tensor, " k"], part: Float[Tensor, "k r"] | None = None
) -> Float[Tensor, "r n"]:
    """Z = L⁻¹Uᵀ with L Lᵀ = M(w), so that the leverages are the squared norms of Z's columns.

    M(w) = Uᵀ diag(w) U. If only some rows carry weight, pass them as `part`. The result is NaN where M(w) is
    numerically singular. Then every comparison with the gap fails, and a solver keeps its best iterate.
    """
    carrier = u if part is None else part
    factor, failed = torch.linalg.cholesky_ex(carrier.T @ (weights[:, None] * carrier))
    if int(failed):
        return torch.full_like(u.T, torch.nan)
    return torch.linalg.solve_triangular(factor, u.T, upper=False)


def leverages(
    u: Float[Tensor, "n r"], weights: Float[Tensor, " k"], part: Float[Tensor, "k r"] | None = None
) -> Float[Tensor, " n"]:
    """ω_i = p_iᵀ M(w)⁻¹ p_i."""
    return whiten(u, weights, part).square().sum(dim=0)
