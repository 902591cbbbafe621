"""Carathéodory: write a point of a convex hull with at most r+1 of the points."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from coreprune._shapes import Float, Int, Tensor
from coreprune._validate import as_points
from coreprune.errors import GeometryError, InputError


@dataclass(frozen=True)
class Combination:
    """target ≈ Σ_k weights_k · points[indices_k]; `residual` is how far off, relative to the largest point."""

    indices: Int[Tensor, " k"]
    weights: Float[Tensor, " k"]
    residual: float


def caratheodory(
    points: Float[Tensor, "n d"],
    target: Float[Tensor, " d"],
    weights: Float[Tensor, " n"] | None = None,
    symmetric: bool = False,
    tol: float = 1e-9,
) -> Combination:
    """At most r+1 points whose convex combination is `target` (r: dimension of the affine span).

    General: w ≥ 0, Σw = 1. symmetric=True: signed weights with Σ|w| ≤ 1, the target lies in conv(±points).
    `weights` is an explicit start, any such combination of all points; only its support is searched then.
    Solved as non-negative least squares [Pᵀ;1ᵀ]w = [y;1] (Lawson & Hanson), whose passive set is linearly
    independent, so at most r+1 weights are non-zero.

    Raises GeometryError when the target is outside the hull, InputError for bad points, targets or starts.
    """
    import numpy as np
    from scipy.optimize import nnls

    points = as_points(points)
    device = points.device
    y = as_points(target[None] if target.ndim == 1 else target, "target")[0]
    if y.shape[0] != points.shape[1]:
        raise InputError(f"target has {y.shape[0]} coordinates, the points have {points.shape[1]}.")
    keep = torch.arange(points.shape[0], device=device)
    if weights is not None:
        keep = torch.nonzero(weights.to(device) != 0)[:, 0]
    p = points[keep].cpu().numpy()
    size = max(float(np.abs(p).max(initial=0)), float(y.abs().max()), 1e-300)
    p, b = p / size, y.cpu().numpy() / size
    k = len(p)
    # Symmetric: one slack column takes up what Σ|w| leaves of 1.
    system = np.concatenate([p.T, -p.T, np.zeros((p.shape[1], 1))], axis=1) if symmetric else p.T
    system = np.concatenate([system, np.ones((1, system.shape[1]))])
    w, _ = nnls(system, np.append(b, 1.0))
    total = w.sum()
    w = w[:k] - w[k : 2 * k] if symmetric else w / max(total, 1e-300)
    residual = float(np.linalg.norm(p.T @ w - b))
    if residual > max(tol, 1e-15 * k):
        raise GeometryError(
            f"the target is outside the convex hull{' of ±points' if symmetric else ''}: the nearest combination found "
            f"misses it by {residual:.1e} of the largest entry. "
            f"Scale the target down or raise tol above {residual:.1e}."
        )
    chosen = torch.from_numpy(np.flatnonzero(w))
    return Combination(keep[chosen.to(device)], torch.from_numpy(w[w != 0]).to(device), residual)
