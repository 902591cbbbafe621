"""Slow, exact references that share no code with the library."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from scipy.optimize import linprog
from torch import Tensor


def sensitivity_lp(points: Tensor, i: int, one_sided: bool) -> float:
    """sup_x f⟨a_i,x⟩ / Σ_k f⟨a_k,x⟩ as the primal linear program: max ⟨a_i,x⟩ s.t. Σ_k t_k ≤ 1, f⟨a_k,x⟩ ≤ t_k."""
    a = points.double().numpy()
    a = a / np.abs(a).max()
    n, d = a.shape
    rows = np.c_[a, -np.eye(n)]
    if not one_sided:
        rows = np.r_[rows, np.c_[-a, -np.eye(n)]]
    rows = np.r_[rows, [np.r_[np.zeros(d), np.ones(n)]]]
    right = np.r_[np.zeros(len(rows) - 1), 1.0]
    solved = linprog(np.r_[-a[i], np.zeros(n)], A_ub=rows, b_ub=right, bounds=[(None, None)] * d + [(0, None)] * n)
    assert solved.success, solved.message
    return -solved.fun


def linf_lp(points: Tensor, kept: Tensor, i: int, one_sided: bool) -> float:
    """sup_x f⟨p_i,x⟩ subject to max_S f⟨p,x⟩ ≤ 1; infinite when S does not see some x."""
    p = points.double().numpy()
    s = p[kept.numpy()]
    rows = s if one_sided else np.r_[s, -s]
    solved = linprog(-p[i], A_ub=rows, b_ub=np.ones(len(rows)), bounds=[(None, None)] * p.shape[1])
    if solved.status == 3:
        return float("inf")
    assert solved.success, solved.message
    return max(0.0, -solved.fun)


def worst_ratio(
    error: Callable[[Tensor], Tensor], dimension: int, generator: torch.Generator, starts: int = 64
) -> float:
    """sup_x |error(x)| / ‖x‖ by gradient ascent from many starts. `error` maps (batch, d) to (batch, J)."""
    x = torch.randn(starts, dimension, generator=generator, dtype=torch.float64)
    best = 0.0
    x.requires_grad_(True)
    optimizer = torch.optim.Adam([x], lr=0.05)
    for _ in range(60):
        value = error(x).abs().amax(dim=1) / x.norm(dim=1)
        best = max(best, value.max().item())
        optimizer.zero_grad()
        (-value.sum()).backward()
        optimizer.step()
    return best
