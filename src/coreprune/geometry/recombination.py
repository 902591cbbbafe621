"""Recombination: reduce explicit combinations of points to few points, for many combinations of the same points.

`caratheodory` searches for a combination from nothing, whereas this starts from a known one. It follows Carathéodory's
own proof, with one elimination along the null space per superfluous point. The null space is computed once for all
combinations.
"""

from __future__ import annotations

import torch

from coreprune._shapes import Float, Tensor
from coreprune._validate import as_points
from coreprune.errors import InputError
from coreprune.geometry.convex_combination import caratheodory


def recombine(
    points: Float[Tensor, "n d"], weights: Float[Tensor, "t n"], symmetric: bool = False, tol: float = 1e-9
) -> Float[Tensor, "t n"]:
    """Find weights w' with the same combinations, `w' @ points == weights @ points`, and few non-zeros per row.

    With symmetric=False, the weights are ≥ 0. Σw' = Σw, and each row has at most r+1 non-zeros, where r is the
    dimension of the affine span. With symmetric=True, the weights are signed. Σ|w'| ≤ Σ|w|, no weight changes its sign,
    and each row has at most r non-zeros, where r is the dimension of the linear span.

    Each elimination moves along a null vector until a weight vanishes. The result is checked. If the combination of a
    row is off by more than `tol` (relative to the largest entry), `caratheodory` searches for it anew.

    Computed on the CPU; the result is float64, on the device of the points. Raises InputError for wrong shapes and
    signs.
    """
    import numpy as np

    points = as_points(points)
    start = as_points(weights, "weights")
    n = points.shape[0]
    if start.shape[1] != n:
        raise InputError(f"weights must have one column per point ({n}), but the shape is {tuple(start.shape)}.")
    if not symmetric and bool((start < 0).any()):
        raise InputError("weights must not be negative. Pass symmetric=True for signed combinations.")
    lifted = (
        points if symmetric else torch.cat([points, points.new_full((n, 1), float(points.abs().max()) or 1.0)], dim=1)
    )
    system = lifted.cpu().numpy()
    null = _null_space(system)
    goals = start.cpu().numpy() @ system
    size = max(float(np.abs(system).max()), 1e-300)

    out = np.zeros(start.shape)
    for row, first in enumerate(start.cpu().numpy()):
        out[row] = _eliminate(np.abs(first), null * np.where(first < 0, -1.0, 1.0)[:, None]) * np.where(
            first < 0, -1.0, 1.0
        )
        scale = size * max(float(np.abs(first).sum()), 1e-300)
        if np.abs(out[row] @ system - goals[row]).max() > tol * scale:
            total = np.abs(first).sum()
            target = torch.as_tensor(first / total, device=points.device) @ points
            found = caratheodory(points, target, start[row] / total, symmetric=symmetric)
            out[row] = 0.0
            out[row, found.indices.cpu().numpy()] = found.weights.cpu().numpy() * total
    return torch.as_tensor(out, device=points.device)


def _null_space(system):
    """Orthonormal basis (n, n−r) of {z : zᵀ system = 0}."""
    import numpy as np

    u, s, _ = np.linalg.svd(system, full_matrices=True)
    rank = int((s > max(system.shape) * 2.0**-52 * s[0]).sum()) if s.size else 0
    return u[:, rank:]


def _eliminate(weights, null):
    """Reduce one non-negative combination. The arguments weights (n,) and null (n, m) are not to be used afterwards."""
    import numpy as np

    alive = weights > 0
    # A point with zero weight may not enter, so its row of the null space is cleared first.
    rows = np.flatnonzero(alive)
    null = null[rows] if alive.all() else _restricted(null, alive)
    w = weights[rows]
    while null.shape[1]:
        z = null[:, -1]
        if z.sum() > 0:
            z = -z
        falling = np.flatnonzero(z < -1e-14 * max(np.abs(z).max(), 1e-300))
        if falling.size == 0 or not np.abs(z).max() > 0:
            null = null[:, :-1]
            continue
        steps = w[falling] / -z[falling]
        gone = falling[np.argmin(steps)]
        w = w + steps.min() * z
        w[gone] = 0.0
        np.maximum(w, 0.0, out=w)
        null = null[:, :-1] - np.outer(z, null[gone, :-1] / z[gone])
        null[gone] = 0.0
    out = np.zeros(weights.shape)
    out[rows] = w
    return out


def _restricted(null, alive):
    """The null vectors that vanish outside `alive`, restricted to it: null · ker(null[~alive])."""
    import numpy as np

    _, s, vt = np.linalg.svd(null[~alive], full_matrices=True)
    rank = int((s > 1e-10).sum())
    return null[alive] @ vt[rank:].T
