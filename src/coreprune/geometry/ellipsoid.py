"""The Löwner ellipsoid (minimum-volume enclosing ellipsoid), with a gap certified on the given points."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from coreprune._shapes import Float, Int, Num, Tensor
from coreprune._shown import brief
from coreprune._validate import as_points
from coreprune.errors import InputError
from coreprune.geometry._solvers.fixed_point import fixed_point
from coreprune.geometry._solvers.interior_point import interior_point
from coreprune.geometry._solvers.solution import Solution, Solver
from coreprune.geometry._solvers.wolfe_atwood import wolfe_atwood
from coreprune.geometry._solvers.working_set import working_set
from coreprune.geometry.subspace import column_scale, coordinates

EPS = 2.0**-52
LARGEST_NEWTON = 16384  # points; the matrices of the interior-point method take 2·n²·8 bytes, here 4 GiB

# The solvers with their default iteration limits.
METHODS: dict[str, tuple[Solver, int]] = {
    "interior-point": (interior_point, 500),
    "wolfe-atwood": (wolfe_atwood, 1_000_000),
    "fixed-point": (fixed_point, 20_000),
}


@dataclass(frozen=True)
class Status:
    """Whether the requested gap is certified, and what to do if it is not."""

    converged: bool
    message: str

    def __str__(self) -> str:
        return self.message


@dataclass(frozen=True)
class Ellipsoid:
    """{y in the affine span : (y−c)ᵀ shape⁺ (y−c) ≤ radius_squared} contains all points. All tensors are float64.

    center: (d,) c = 0 in the symmetric case, Σ u_i p_i otherwise.
    shape: (d, d) Σ u_i (p_i−c)(p_i−c)ᵀ.
    whitening: (d, r) with (y−c)ᵀ shape⁺ (y−c) = ‖whiteningᵀ(y−c)‖² on the span. Use it rather than a pseudo-inverse of
        `shape`, whose condition number is the square of that of the points.
    weights: (n,) u ≥ 0, Σu = 1. All are zero if symmetric and every point is the origin.
    support: (k,) int64, the indices with u_i > 0.
    distances: (n,) (p_i−c)ᵀ shape⁺ (p_i−c) of every given point.
    gap: ε with distances ≤ (1+ε) r (symmetric) or ≤ r + ε(r+1) (general), rounding included. The ellipsoid's volume
        is then within a factor (1+ε)^{r/2} (general: (1+ε)^{(r+1)/2}) of the smallest.
    radius_squared: (1+ε) r (symmetric) or r + ε(r+1) (general).
    rank: r, the dimension of the span (general: of the affine span).
    iterations, status: how the solver ended.
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
    __repr__ = brief


def mvee(
    points: Num[Tensor, "n d"],
    symmetric: bool = True,
    tol: float = 1e-2,
    max_iter: int | None = None,
    method: str = "auto",
) -> Ellipsoid:
    """Find the smallest ellipsoid around ±points, centred at 0, or (symmetric=False) around the points.

    Solves the dual, the D-optimal design max log det Σ u_i p_i p_iᵀ over the simplex (Todd & Yıldırım 2007), until
    the gap max_i p_iᵀ M(u)⁻¹ p_i / r − 1 is at most `tol`. General clouds are lifted to [p, 1]. The gap is then
    recomputed from `points`, with a bound on the rounding error of that computation.

    points: (n, d).
    method: "interior-point", "wolfe-atwood" or "fixed-point". Each runs on a working set that grows until no point
    outside it matters. "auto" takes the interior point, which was the fastest at every shape and both tolerances of
    benchmarks/mvee.py. Where the Newton matrix could take more than 4 GiB, it takes "fixed-point" (tol ≥ 1e-3) or
    "wolfe-atwood".
    max_iter: a limit on the solver's iterations, summed over all rounds.

    Runs on the device of `points`, in float64. `status` says whether the solver converged. Raises InputError for points
    that are not a finite real matrix or whose squares overflow, for an unknown method, and for tol ≤ 0.
    """
    points = as_points(points)
    name = _choose(method, points.shape, tol)
    solver, limit = METHODS[name]
    if max_iter is not None:
        if max_iter < 1:
            raise InputError(f"max_iter must be at least 1, but is {max_iter}.")
        limit = max_iter
    scale = column_scale(points)  # raises where float64 cannot hold the squares
    noise: Tensor | None = None
    origin, local, centred = torch.zeros_like(points[0]), points, points
    if not symmetric:
        # Differences to one of the points are rounded relative to the spread of the cloud, not to its offset. The
        # points themselves were rounded relative to the offset; what this may add to their singular values is noise.
        origin = points[0]
        local = points - origin
        centred = local - local.mean(dim=0)
        scale = column_scale(centred)
        noise = EPS * points.abs().amax(dim=0) / scale
    u, base = coordinates(centred / scale, noise)
    frame = _Frame(origin, local, scale, base)
    solution = _solve(u, symmetric, tol, solver, limit)
    # A tiny weight is rounding, or left over by a solver that stopped early. It is dropped if the gap allows it.
    for cut in (tol**0.5, 1e-3 * tol / points.shape[1], 0.0):
        weights = torch.where(solution.weights < cut / len(points), 0.0, solution.weights)
        weights = weights / weights.sum().clamp_min(1e-300)
        center, shape, whitening, distances, gap = _certify(frame, weights, symmetric)
        if gap <= tol:
            break
    rank = base.shape[1]
    return Ellipsoid(
        center=center,
        shape=shape,
        whitening=whitening,
        weights=weights,
        support=torch.nonzero(weights)[:, 0],
        distances=distances,
        gap=gap,
        radius_squared=(1 + gap) * rank if symmetric else rank + gap * (rank + 1),
        rank=rank,
        iterations=solution.iterations,
        status=_status(name, gap, tol, solution, limit),
    )


def _choose(method: str, shape: torch.Size, tol: float) -> str:
    """The name of the solver to use."""
    if not (isinstance(tol, int | float) and 0 < tol < math.inf):
        raise InputError(f"tol must be a positive number, but is {tol!r}.")
    if method == "auto":
        # A working set grows by 8 r points at a time, and rarely needs more than two rounds.
        if min(shape[0], 16 * shape[1]) <= LARGEST_NEWTON:
            return "interior-point"
        return "fixed-point" if tol >= 1e-3 else "wolfe-atwood"
    if method not in METHODS:
        raise InputError(f"unknown method {method!r}. Known methods: {', '.join(('auto', *METHODS))}.")
    return method


def _solve(u: Float[Tensor, "n r"], symmetric: bool, tol: float, solver: Solver, limit: int) -> Solution:
    """The weights of all points. Cases that need no solver are solved exactly."""
    n = len(u)
    if not symmetric:
        u = torch.cat([u, u.new_full((n, 1), n**-0.5)], dim=1)
    length = u.square().sum(dim=1)
    alive = torch.nonzero(length)[:, 0]  # the origin carries no weight
    k, r = len(alive), u.shape[1]
    weights = u.new_zeros(n)
    gap, iterations = 0.0, 0
    if r == 1:
        # On a line, the longest point decides. In a lifted cloud of rank 0, all points are the same.
        weights[length.argmax()] = 1.0
    elif k == r:
        weights[alive] = 1.0 / max(r, 1)  # independent points: every ω is r
    else:
        # 0.9: the certificate adds its rounding error and the effect of dropped weights. The columns are orthonormal,
        # so the first ω are known.
        part, omega = (u, k * length) if k == n else (u[alive], k * length[alive])
        found = working_set(part, 0.9 * tol, limit, part.new_full((k,), 1.0 / k), solver, omega=omega)
        weights[alive] = found.weights
        gap, iterations = found.gap, found.iterations
    return Solution(weights, weights, gap, iterations)


@dataclass(frozen=True)
class _Frame:
    """The coordinate system: points = origin + local, and (local / scale) @ base is nearly orthonormal."""

    origin: Float[Tensor, " d"]
    local: Float[Tensor, "n d"]
    scale: Float[Tensor, " d"]
    base: Float[Tensor, "d r"]


def _certify(
    frame: _Frame, weights: Float[Tensor, " n"], symmetric: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, float]:
    """Center, shape, whitening, distances and the gap of `weights`, whatever solver they come from.

    Let H be the whitening and y_i = Hᵀ(p_i−c) (lifted: [y_i, 1]). For any injective map H, ω_i = y_iᵀ(I+E)⁻¹y_i ≤
    ‖y_i‖²/(1−‖E‖) with E = Σu_i y_i y_iᵀ − I. This does not assume that H was computed well: a bad H has a large E.
    The rounding errors of the products y and E themselves are bounded and added.
    """
    origin, local, scale, base = frame.origin, frame.local, frame.scale, frame.base
    (d, rank), lift = base.shape, 0 if symmetric else 1
    support = torch.nonzero(weights)[:, 0]
    mass = weights[support][:, None]
    shift = torch.zeros_like(origin) if symmetric else (mass * local[support]).sum(dim=0)
    center = origin + shift
    moved = local if symmetric else local - shift
    carrier = moved[support] / scale
    shape = (carrier.T @ (mass * carrier)) * scale[:, None] * scale
    if rank == 0:
        return center, shape, torch.zeros_like(base), torch.zeros_like(weights), 0.0
    part = carrier @ base
    factor, failed = torch.linalg.cholesky_ex(part.T @ (mass * part))
    if int(failed):  # the support does not span the points
        return center, shape, torch.zeros_like(base), torch.full_like(weights, math.inf), math.inf
    whitening = torch.linalg.solve_triangular(factor, base.T, upper=False).T
    size = float(torch.linalg.matrix_norm(whitening))
    whitening = whitening / scale[:, None]  # exact, because the scale consists of powers of two
    y = moved @ whitening
    distances = y.square().sum(dim=1)
    part = y[support] if symmetric else torch.cat([y[support], torch.ones_like(mass)], dim=1)
    moment = part.T @ (mass * part)
    moment.diagonal().sub_(1.0)
    length = d**0.5 if symmetric else 2 * d**0.5  # scaled coordinates are below 1, and after the shift below 2
    slip = (d + 4) * EPS / 2 * length * size  # ≥ the error of any y_i
    error = float(torch.linalg.matrix_norm(moment)) + 2 * slip + slip**2 + len(support) * EPS * (rank + lift)
    if not error < 1:
        return center, shape, whitening, distances, math.inf
    worst = (float(distances.max()) ** 0.5 + slip) ** 2 + lift
    gap = max(0.0, worst / ((rank + lift) * (1 - error)) - 1)
    return center, shape, whitening, distances, gap


def _status(name: str, gap: float, tol: float, solution: Solution, limit: int) -> Status:
    """What happened, and what to do about it."""
    if gap <= tol:
        return Status(True, f"converged: the gap is {gap:.1e}, at most the {tol:.1e} asked for")
    text = f"not converged: the gap is {gap:.2e}, not the {tol:.2e} asked for, after {solution.iterations} iterations; "
    if solution.iterations >= limit:
        advice = f"raise max_iter above {limit}"
        if name == "fixed-point" and tol < 1e-3:
            advice += ", or use method='interior-point', which reaches small gaps in few iterations"
    elif solution.gap <= tol:
        advice = "the rounding of these points in float64 allows no smaller certificate; raise tol"
    else:
        advice = f"{name} stalled at the limits of float64; raise tol or try method='wolfe-atwood'"
    return Status(False, text + advice)
