"""Slow, exact references that share no code with the library."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from scipy.optimize import linprog
from torch import Tensor


def sensitivity_lp(points: Tensor, i: int, one_sided: bool, nonnegative: Tensor | None = None) -> float:
    """sup_x f⟨a_i,x⟩ / Σ_k f⟨a_k,x⟩ as the primal linear program: max ⟨a_i,x⟩ s.t. Σ_k t_k ≤ 1, f⟨a_k,x⟩ ≤ t_k.

    nonnegative: (d,) bool, x_c ≥ 0 where it is true. Then ⟨a_i,x⟩ < 0 is no mirror image of ⟨a_i,x⟩ > 0.
    """
    a = points.double().numpy()
    a = a / np.abs(a).max()
    n, d = a.shape
    rows = np.c_[a, -np.eye(n)]
    if not one_sided:
        rows = np.r_[rows, np.c_[-a, -np.eye(n)]]
    rows = np.r_[rows, [np.r_[np.zeros(d), np.ones(n)]]]
    right = np.r_[np.zeros(len(rows) - 1), 1.0]
    never = [False] * d if nonnegative is None else nonnegative.tolist()
    bounds = [(0 if c else None, None) for c in never] + [(0, None)] * n
    found = []
    for side in (1,) if one_sided or not any(never) else (1, -1):
        for method in ("highs", "highs-ds", "highs-ipm"):  # each gives up on a few programs
            solved = linprog(np.r_[-side * a[i], np.zeros(n)], A_ub=rows, b_ub=right, bounds=bounds, method=method)
            if solved.success:
                break
        assert solved.success, solved.message
        found.append(-solved.fun)
    return max(found)


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


def lewis_by_iteration(a: np.ndarray, rounds: int = 300) -> np.ndarray:
    """The fixed point of τ_i = √(a_iᵀ (Aᵀ diag(τ)⁻¹ A)⁺ a_i), from τ = 1."""
    tau = np.ones(len(a))
    for _ in range(rounds):
        inverse = np.linalg.pinv(a.T @ (a / tau[:, None]), hermitian=True)
        tau = np.sqrt(np.einsum("id,de,ie->i", a, inverse, a))
    return tau


def t6(
    sizes: np.ndarray, response: np.ndarray, q: np.ndarray, draws: int, delta: float, lipschitz: float = 1.0
) -> tuple[float, float]:
    """T6 of a stopped sample and the trivial bound, as docs/theory.md states them.

    sizes: ‖a_i‖* of every item. response: (J, items) |V_ji| ‖p_i‖*. q: the probabilities. draws: m, the draw at which
    the last channel appeared, so δ is spread as δ/(m(m+1)).
    """
    total = max(s / p for s, p in zip(sizes, q, strict=True) if s > 0)
    share = delta / (draws * (draws + 1))
    root = 4 + np.sqrt(2 * np.log(len(response) / share))
    return lipschitz * total * root / np.sqrt(draws), lipschitz * response.sum(axis=1).max()


def t8(
    points: np.ndarray,
    outgoing: np.ndarray,
    kept: list[int],
    new_points: np.ndarray,
    new_outgoing: np.ndarray,
    bias_change: np.ndarray,
    own: tuple[np.ndarray, np.ndarray] | None = None,
) -> tuple[float, float]:
    """T8 in its general form, and the trivial bound, channel by channel and output by output.

    new_points: (k, d) p'_k, the rows that make the kept channels now. new_outgoing: (J, k) V'. own: a merge's target
    (a kept channel or −1) and scale of every channel, whose bound counts where it is the smaller one.
    """
    unchanged = np.array_equal(new_points, points[kept])
    nearest = []
    for i, p in enumerate(points):
        if unchanged and i in kept:
            nearest.append((kept.index(i), 1.0))
            continue
        scales = [max(0.0, p @ c / (c @ c)) if c.any() else 0.0 for c in new_points]
        gaps = [np.linalg.norm(p - s * c) for s, c in zip(scales, new_points, strict=True)]
        place = int(np.argmin(gaps))
        nearest.append((place, scales[place]))
    alone = [(0, 0.0)] * len(points)
    for place, i in enumerate(kept):
        c = new_points[place]
        alone[i] = (place, 1.0 if unchanged else max(0.0, points[i] @ c / (c @ c)) if c.any() else 0.0)
    assignments = [alone, nearest]
    if own is not None:
        assignments.append(
            [(kept.index(t), s) if t >= 0 else (0, 0.0) for t, s in zip(own[0].tolist(), own[1].tolist(), strict=True)]
        )
    bounds, trivial = [], []
    for v, new, change in zip(outgoing, new_outgoing, bias_change, strict=True):
        found = []
        for assignment in assignments:
            d = np.zeros(len(kept))
            bound = abs(change)
            for p, weight, (place, scale) in zip(points, v, assignment, strict=True):
                d[place] += scale * weight
                bound += abs(weight) * np.linalg.norm(p - scale * new_points[place])
            found.append(bound + np.abs(new - d) @ np.linalg.norm(new_points, axis=1))
        bounds.append(min(found))
        trivial.append(np.abs(v) @ np.linalg.norm(points, axis=1))
    return max(bounds), max(trivial)
