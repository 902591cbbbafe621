"""Carathéodory: write a point of a convex hull with at most r+1 of the points."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from coreprune._shapes import Float, Int, Num, Tensor
from coreprune._validate import as_points
from coreprune.errors import GeometryError, InputError
from coreprune.geometry.subspace import column_scale, coordinates

if TYPE_CHECKING:
    import numpy as np


@dataclass(frozen=True)
class Combination:
    """target = Σ_k weights_k · points[indices_k], up to `residual`.

    indices (k,): int64, ascending, k ≤ r+1. weights (k,): float64, not zero; w > 0 and Σw = 1, or in the symmetric case
    signed with Σ|w| ≤ 1. residual: the largest entry of the difference, each column relative to its largest entry.
    """

    indices: Int[Tensor, " k"]
    weights: Float[Tensor, " k"]
    residual: float


def caratheodory(
    points: Num[Tensor, "n d"],
    target: Num[Tensor, " d"],
    weights: Num[Tensor, " n"] | None = None,
    symmetric: bool = False,
    tol: float = 1e-9,
) -> Combination:
    """At most r+1 of the points (n, d) that combine to `target` (d,), r the dimension of the affine span.

    symmetric=True: the target lies in conv(±points); the weights are signed, Σ|w| ≤ 1, and r is the dimension of the
    linear span. Solved as non-negative least squares [Uᵀ; 1ᵀ] w = [y; 1] (Lawson & Hanson 1974), in orthonormal
    coordinates U: its passive set is linearly independent, so no more than r+1 weights are positive. On the CPU.

    weights: an explicit start, any (signed) combination of all points that gives the target; only its support, and
    in the symmetric case its signs, are searched then, which is faster. From an ellipsoid: w_i = u_i ⟨p_i, M⁻¹y⟩ for
    yᵀM⁻¹y ≤ 1 (symmetric), w_i = u_i (1 + (p_i−c)ᵀΣ⁻¹(y−c)) where that is ≥ 0.

    Raises GeometryError when the target is outside the hull by more than `tol` (relative, see `Combination.residual`),
    InputError for points, targets or starts that are no finite real tensors of matching shapes.
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
    """`caratheodory` for every row of `targets` (t, d) and `weights` (t, n).

    The coordinates of the points are computed once, which is most of the work for few points.
    The order of the results is that of the targets; an error names the target's row.
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
    size = n**0.5  # rows of U have a norm near √(r/n): bring them to the size of the row of ones
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
    """Which points, with which sign, the search may use."""
    import numpy as np

    if start is not None:
        columns = start.nonzero()[0]
        return columns, np.sign(start[columns])
    if symmetric:
        return np.concatenate([np.arange(n), np.arange(n)]), np.repeat([1.0, -1.0], n)
    return np.arange(n), np.ones(n)


def _system(rows: np.ndarray, symmetric: bool) -> np.ndarray:
    """[Uᵀ; 1ᵀ]; symmetric: one more column takes up what Σ|w| leaves of 1."""
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
    """Ascending indices; p and −p of one point (only possible when they tie) become one weight."""
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
