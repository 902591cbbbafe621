"""Multiplicative fixed-point iteration for the D-optimal design."""

from __future__ import annotations

from coreprune._shapes import Float, Tensor
from coreprune.geometry._solvers.solution import Solution, leverages


def fixed_point(
    u: Float[Tensor, "n r"],
    tol: float,
    max_iter: int,
    weights: Float[Tensor, " n"],
    omega: Float[Tensor, " n"] | None = None,
) -> Solution:
    """w ← w·(ω/r)^{3/2}, normalised (Titterington 1978; Cohen, Cousins, Lee, Yang, COLT 2019, with exponent 1).

    Near the optimum, a step with exponent λ multiplies the error by 1 − λμ, 0 ≤ μ ≤ 1. With 3/2 instead of 1, the slow
    modes shrink 1.5 times as fast, and the fastest one is still halved. The best iterate is returned, because only
    exponents up to 1 are known to be monotone. A step costs n r², and memory is n r. The gap falls like 1/steps, which
    is enough for 1e-2 but not for 1e-7.

    omega: the leverages under `weights`, if the caller knows them.
    """
    r = u.shape[1]
    omega = leverages(u, weights) if omega is None else omega
    best = Solution(weights, omega, float("inf"), 0)
    for iteration in range(max_iter + 1):
        gap = float(omega.max()) / r - 1
        if gap < best.gap:
            best = Solution(weights, omega, gap, iteration)
        if gap <= tol or iteration == max_iter:
            return Solution(best.weights, best.leverages, best.gap, iteration)
        ratio = omega / r
        weights = weights * ratio * ratio.sqrt()
        weights = weights / weights.sum()
        omega = leverages(u, weights)
    return best
