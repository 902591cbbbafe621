"""Solve on the points that can matter, check the solution on all points, and add those that were missed."""

from __future__ import annotations

import math

import torch

from coreprune._shapes import Float, Tensor
from coreprune.geometry._solvers.fixed_point import fixed_point
from coreprune.geometry._solvers.solution import Solution, Solver, leverages
from coreprune.geometry._solvers.wolfe_atwood import wolfe_atwood

WARM_UP = 4  # fixed-point steps; after them, 99 to 100 % of the optimal support had ω ≥ 0.9 r on every layer we tried
CUT = 0.9
WIDEST = 8  # points per dimension that the innermost working set adds at a time
DIRECT = 2 * WIDEST  # up to this many points per dimension, the solver runs without another working set
TALL = 4 * DIRECT  # beyond, a step on all points costs more than the better guess is worth
MANY = 4096  # with more points, a working set of nearly all of them would need an n×n matrix for no gain


def support_threshold(gap: float, r: int) -> float:
    """A threshold in multiples of r: points with a smaller ω are in no optimal support (Harman & Pronzato 2007).

    The eigenvalues λ of M^{-1/2} M* M^{-1/2} have Σλ ≤ r(1 + gap) and Σ1/λ ≤ r, and a support point has ω ≥ r·min λ.
    The smallest min λ that both allow (all others equal) is 1 + e/2 − √(e(4 + e − 4/r))/2, with e = r·gap = max ω − r.
    """
    e = gap * r
    return 1 + e / 2 - (e * (4 + e - 4 / r)) ** 0.5 / 2


def working_set(
    u: Float[Tensor, "n r"],
    tol: float,
    max_iter: int,
    weights: Float[Tensor, " n"],
    solver: Solver,
    *,
    omega: Float[Tensor, " n"] | None = None,
) -> Solution:
    """Run `solver` on a working set until no point outside it has ω > (1 + tol) r.

    Points outside the support only cost time. They are guessed (ω < 0.9 r after a few fixed-point steps) or proved
    (`support_threshold`). Wrong guesses come back as violators in the next round, so the result is the solution for
    all points. In very tall clouds (n ≫ r), the working set has a working set of its own.

    omega: the leverages under `weights`, if the caller knows them.
    """
    n, r = u.shape
    tall = n > TALL * r
    best = fixed_point(u, tol, 0 if tall else min(max_iter, WARM_UP), weights, omega)
    if best.gap == math.inf:  # the points do not span the space
        return best
    spent = best.iterations
    most = max(WIDEST * r, n // 8)
    cut = 0.0 if tall else max(CUT, support_threshold(max(best.gap, 0.0), r))
    inside = _largest(best.leverages, best.leverages >= cut * r, most)
    start = best.weights
    while best.gap > tol and spent < max_iter:
        work = torch.nonzero(inside)[:, 0]
        if len(work) > 0.9 * n:
            last_resort = wolfe_atwood if n > max(DIRECT * r, MANY) else solver
            last = last_resort(u, tol, max_iter - spent, start / start.sum())
            return Solution(last.weights, last.leverages, last.gap, spent + last.iterations)
        args = u[work], 0.7 * tol, max_iter - spent, start[work] / start[work].sum()
        part = solver(*args) if len(work) <= DIRECT * r else working_set(*args, solver)
        spent += max(part.iterations, 1)
        full = torch.zeros_like(weights)
        full[work] = part.weights
        omega = leverages(u, part.weights, u[work])
        gap = float(omega.max()) / r - 1
        if not gap >= 0:
            # The working set does not span the space. Add points: those in rare directions have a large ω, and an even
            # sample contains the common directions.
            even = torch.zeros_like(inside).index_fill_(0, torch.arange(0, n, max(1, n // most), device=u.device), True)
            start = weights
            inside = even | inside if bool((even & ~inside).any()) else torch.ones_like(inside)
            continue
        if gap < best.gap:
            best = Solution(full, omega, gap, spent)
        missed = ~inside & (omega > (1 + 0.7 * tol) * r)
        if not bool(missed.any()):
            break
        missed = _largest(omega, missed, most)
        inside = (inside & (full > 1e-6 / n)) | missed
        start = torch.where(missed, 1.0 / n, full)
    return Solution(best.weights, best.leverages, best.gap, spent)


def _largest(values: Float[Tensor, " n"], mask: Tensor, most: int) -> Tensor:
    """`mask`, restricted to its `most` largest values."""
    if int(mask.sum()) <= most:
        return mask
    chosen = torch.topk(torch.where(mask, values, -torch.inf), most).indices
    return torch.zeros_like(mask).index_fill_(0, chosen, True)
