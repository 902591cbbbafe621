"""Carathéodory: write a point of a convex hull as a combination of at most r+1 of the points."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from coreprune._shapes import Float, Int, Num, Tensor
from coreprune._shown import brief
from coreprune._validate import as_points
from coreprune.errors import GeometryError, InputError
from coreprune.geometry.subspace import column_scale, coordinates

if TYPE_CHECKING:
    import numpy as np


@dataclass(frozen=True)
class Combination:
    """target = Σ_k weights_k · points[indices_k], up to `residual`.

    indices: (k,) int64, ascending, k ≤ r+1. weights: (k,) float64, not zero. w > 0 and Σw = 1, or in the symmetric case
    signed with Σ|w| ≤ 1. residual: the largest entry of the difference, each column relative to its largest entry.
    """

    indices: Int[Tensor, " k"]
    weights: Float[Tensor, " k"]
    residual: float
    __repr__ = brief


def caratheodory(
    points: Num[Tensor, "n d"],
    target: Num[Tensor, " d"],
    weights: Num[Tensor, " n"] | None = None,
    symmetric: bool = False,
    tol: float = 1e-9,
) -> Combination:
    """Find at most r+1 of the points (n, d) that combine to `target` (d,). r is the dimension of the affine span.

    With symmetric=True, the target lies in conv(±points), the weights are signed with Σ|w| ≤ 1, and r is the dimension
    of the linear span. The problem is solved on the CPU as non-negative least squares [Uᵀ; 1ᵀ] w = [y; 1] (Lawson &
    Hanson 1974), in orthonormal coordinates U. The passive set is linearly independent, so at most r+1 weights are
    positive.

    weights: (n,) an explicit start: any (signed) combination of all points that gives the target. The search is then
    restricted to its support, and in the symmetric case to its signs, which is faster. An ellipsoid gives such a start:
    w_i = u_i ⟨p_i, M⁻¹y⟩ for yᵀM⁻¹y ≤ 1 (symmetric), or w_i = u_i (1 + (p_i−c)ᵀΣ⁻¹(y−c)) where that is ≥ 0.

    Raises GeometryError when the target is outside the hull by more than `tol` (relative, see `Combination.residual`).
    Raises InputError for points, targets or starts that are not finite real tensors of matching shapes.
    """
    target = torch.as_tensor(target)
    start = None if weights is None else torch.as_tensor(weights)[None]
    return caratheodory_many(points, target[None], start, symmetric, tol)[0]


def caratheodory_many(
    points: Num[Tensor, "n d"],
    targets: Num[Tensor, "t d"],
    weights: Num[Tensor, "t n"] | None = None,
    symmetric: bool = False,
    tol: float = 1e-9,
) -> list[Combination]:
    """Run `caratheodory` for every row of `targets` (t, d) and `weights` (t, n).

    The coordinates of the points are computed only once. For few points, this is most of the work. The results are in
    the order of the targets, and an error names the row of the target.
    """
    from scipy.optimize import nnls

    points = as_points(points)
    device, (n, d) = points.device, points.shape
    targets = as_points(targets, "target").to(device)
    if targets.shape[1] != d:
        raise InputError(f"the target has {targets.shape[1]} coordinates, but the points have {d}.")
    if weights is not None:
        weights = as_points(weights, "weights").to(device)
        if weights.shape != (len(targets), n):
            raise InputError(f"weights must hold one number per point, but its shape is {tuple(weights.shape)}.")
        if not symmetric and bool((weights < 0).any()):
            raise InputError("weights must not be negative. Pass symmetric=True for signed combinations.")
    origin = torch.zeros_like(points[0]) if symmetric else points[0]
    local = points - origin
    scale = column_scale(local)
    middle = torch.zeros_like(origin) if symmetric else local.mean(dim=0)
    scaled, goals = (local - middle) / scale, (targets - origin - middle) / scale
    u, base = coordinates(scaled)
    size = n**0.5  # rows of U have a norm near √(r/n); scale them to the size of the row of ones
    u_np, goals_np, y_np = _numpy(u * size), _numpy(goals), _numpy(goals @ base * size)
    scaled_np = _numpy(scaled)
    starts = None if weights is None else _numpy(weights)

    found = []
    for row, y in enumerate(y_np):
        columns, signs = _columns(None if starts is None else starts[row], n, symmetric)
        try:
            system = _system(u_np[columns] * signs[:, None], symmetric)
            w = nnls(system, _append_one(y), maxiter=30 * system.shape[1])[0][: len(columns)]
        except RuntimeError as error:
            raise GeometryError(
                f"the least-squares search for target {row} did not end. Pass an explicit start in `weights`."
            ) from error
        w[w < 1e-14 * w.max(initial=0.0)] = 0.0  # rounding
        if not symmetric and w.any():
            w = w / w.sum()
        used = w.nonzero()[0]
        miss = abs(scaled_np[columns[used]].T @ (w[used] * signs[used]) - goals_np[row]).max()
        if not miss <= tol:
            hull = "conv(±points)" if symmetric else "the convex hull of the points"
            where = "" if starts is None else " that its starting weights span"
            raise GeometryError(
                f"target {row} is outside {hull}{where}: the nearest combination misses it by {miss:.1e}, relative to "
                f"the largest entry of the column. Move the target inwards, or raise tol ({tol:.1e}) if that is close."
            )
        found.append(_merge(columns[used], w[used] * signs[used], float(miss), device))
    return found


def _columns(start: np.ndarray | None, n: int, symmetric: bool) -> tuple[np.ndarray, np.ndarray]:
    """Which points the search may use, and with which signs."""
    import numpy as np

    if start is not None:
        columns = start.nonzero()[0]
        return columns, np.sign(start[columns])
    if symmetric:
        return np.concatenate([np.arange(n), np.arange(n)]), np.repeat([1.0, -1.0], n)
    return np.arange(n), np.ones(n)


def _system(rows: np.ndarray, symmetric: bool) -> np.ndarray:
    """[Uᵀ; 1ᵀ]. In the symmetric case, one more column takes up 1 − Σ|w|."""
    import numpy as np

    k, r = rows.shape
    system = np.zeros((r + 1, k + symmetric))
    system[:r, :k] = rows.T
    system[r] = 1.0
    return system


def _append_one(y: np.ndarray) -> np.ndarray:
    import numpy as np

    return np.append(y, 1.0)


def _merge(columns: np.ndarray, weights: np.ndarray, residual: float, device: torch.device) -> Combination:
    """Sort the indices. If a point is used both as p and as −p (possible only in a tie), join the two weights."""
    import numpy as np

    indices, position = np.unique(columns, return_inverse=True)
    total = np.bincount(position, weights, minlength=len(indices))
    keep = total != 0
    return Combination(
        torch.from_numpy(indices[keep].astype(np.int64)).to(device),
        torch.from_numpy(total[keep]).to(device),
        residual,
    )


def _numpy(x: Tensor) -> np.ndarray:
    return x.detach().cpu().numpy()
