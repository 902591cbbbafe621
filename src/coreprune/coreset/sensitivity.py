"""How much a channel can matter to the next layer, over every possible input.

Notation of docs/theory.md: channel i responds with a_i(x) = φ⟨p_i, x⟩, its largest outgoing weight is c_i, the
a_i = c_i p_i are the rows of A, and r = rank A. There are two kinds of values, which are never mixed:

relative:  s_i = sup_x f⟨a_i, x⟩ / Σ_k f⟨a_k, x⟩        (f = |·|, or relu when one-sided)
absolute:  sup_{‖x‖ ≤ β} c_i |φ⟨p_i, x⟩|                 (the importances of T6 and of Mussay et al. 2020)
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import torch

from coreprune._shapes import Bool, Float, Tensor
from coreprune._shown import brief
from coreprune._validate import as_points
from coreprune.coreset.cone import cone_sensitivities
from coreprune.coreset.linf import Variant, linf_coreset
from coreprune.errors import GeometryError, InputError
from coreprune.geometry import lewis_weights, span

Method = Literal["peeling", "lewis", "cone", "norm", "mussay", "exact"]
METHODS: tuple[Method, ...] = ("peeling", "lewis", "cone", "norm", "mussay", "exact")


@dataclass(frozen=True)
class Sensitivities:
    """Upper bounds (or exact values) of the channels' sensitivities.

    bounds: (n,) float64, non-negative. Zero rows have 0.
    importance: (n,) float64, the values to sample by. They equal the bounds, except that peeling gives them before
        cutting them off at 1. Like the paper's α/l, they still tell early rounds from late ones where all exceed 1.
    total: the sum of the bounds. The theory asks for about total²/ε² (absolute) or total/ε² (relative) draws.
    method: the method that ran.
    kind: "relative" (at most 1 each) or "absolute" (in units of the response).
    vacuous: (as in T7) whether the bound of every non-zero channel is 1, so that the bounds do not tell channels apart.
        Absolute values are never vacuous in this sense.
    rank: r, the dimension of the span of the weighted points.
    rounds: the number of peeling rounds; 0 for other methods.
    ridge: λ of the ridge form of peeling; 0.0 when it did not run.
    """

    bounds: Float[Tensor, " n"]
    importance: Float[Tensor, " n"]
    total: float
    method: Method
    kind: Literal["relative", "absolute"]
    vacuous: bool
    rank: int
    rounds: int = 0
    ridge: float = 0.0
    __repr__ = brief


def sensitivities(
    points: Float[Tensor, "n d"],
    weights: Float[Tensor, " n"] | None = None,
    method: Method = "peeling",
    *,
    one_sided: bool = False,
    variant: Variant = "contact",
    tight: bool = True,
    ridge: float = 0.0,
    activation: Callable[[Tensor], Tensor] = torch.relu,
    radius: float = 1.0,
    nonnegative: Bool[Tensor, " d"] | None = None,
) -> Sensitivities:
    """Bound the sensitivity of every channel.

    What is bounded is the share of c_i f⟨p_i, x⟩ in the sum over all channels, with c_i the *largest* outgoing weight.
    It is no bound on the share of a single output: of two equal channels with V_1 = (1, 0.01) and V_2 = (0.01, 1), each
    has s = ½, and the first makes 99 % of output 1.

    points: (n, d). Row i is p_i, the incoming weights with the bias appended.
    weights: (n,) c_i = max_j |V_ji| ≥ 0. By default they are ones.
    method:
        "peeling"  T4, relative: remove L-infinity coresets S_1, S_2, … with factors α_1, α_2, … in turn.
        "lewis"    T5, relative: ℓ1 Lewis weights τ_i, Σ τ_i = r. Two-sided only.
        "cone"     T4″, relative: like "exact", over the inputs with x_c ≥ 0 where `nonnegative` is true.
        "norm"     absolute: ‖a_i‖, the supremum of |⟨a_i, x⟩| over ‖x‖ ≤ 1.
        "mussay"   absolute: c_i |φ(β‖p_i‖)| (Mussay et al. 2020), β = `radius`, φ = `activation`.
        "exact"    relative, over all x, by n linear programs with n variables each. An oracle for small n.
    one_sided: f = relu instead of |·|. For relative methods only.
    variant, tight, ridge: for peeling, see `peel`. nonnegative: (d,) bool, for "cone".

    Raises InputError for an unknown method, bad points or weights, and for one_sided with "lewis" (T5 is two-sided).
    Raises GeometryError where a linear program of "exact" cannot be solved.
    """
    points = as_points(points)
    n = points.shape[0]
    c = points.new_ones(n) if weights is None else _as_weights(weights, points)
    weighted = c[:, None] * points
    if method == "norm":
        return _absolute(weighted.norm(dim=1), method, weighted)
    if method == "mussay":
        if not radius > 0:
            raise InputError(f"radius must be positive (it bounds the norm of the inputs), but it is {radius}.")
        return _absolute(c * activation(radius * points.norm(dim=1)).abs(), method, weighted)
    if method == "peeling":
        return peel(weighted, one_sided=one_sided, variant=variant, tight=tight, ridge=ridge)
    if method == "lewis":
        if one_sided:
            raise InputError("Lewis weights bound two-sided sensitivities only (T5). Use method='peeling' or 'exact'.")
        return _relative(lewis_weights(weighted).clamp(0.0, 1.0), method, weighted)
    if method == "cone":
        if nonnegative is None:
            raise InputError("method 'cone' needs nonnegative, (d,) bool: which inputs are never negative.")
        return _relative(cone_sensitivities(weighted, nonnegative, one_sided=one_sided), method, weighted)
    if method == "exact":
        return _relative(_exact(weighted, one_sided), method, weighted)
    raise InputError(f"unknown method {method!r}; known: {', '.join(METHODS)}.")


def peel(
    weighted: Float[Tensor, "n d"],
    *,
    one_sided: bool = False,
    variant: Variant = "contact",
    tight: bool = True,
    ridge: float = 0.0,
) -> Sensitivities:
    """Bound relative sensitivities by peeling (T4; Tukan et al. 2022, after Varadarajan & Xiao 2012).

    T4: remove L-infinity coresets S_1, S_2, … with factor α in turn. A point removed in round l has s_i ≤ min(1, α/l).
    (s_i is about the largest weight c_i, and not about each output: see `sensitivities`.)
    tight=True uses each point's own factor α_it of every round (T4′, docs/theory.md):
        s_i ≤ 1 / (1 + Σ_{t<l} 1/α_it),  because Σ_k f⟨a_k,x⟩ ≥ Σ_{t≤l} max_{S_t} f⟨·,x⟩ and the sets are disjoint.
    tight=False is the paper's α/l with the worst factor of the rounds so far.

    ridge: λ ≥ 0. With λ > 0, the points ±√λ e_j (an orthonormal basis) are added in every round. This bounds
        sup_x |⟨a_i,x⟩| / (Σ_k |⟨a_k,x⟩| + L√λ‖x‖) instead, where L is the number of rounds, and tells channels apart
        where the plain bound is constant (n ≤ r, T7). Two-sided only.
    """
    if ridge < 0:
        raise InputError(f"ridge must be ≥ 0, but it is {ridge}.")
    if ridge > 0 and one_sided:
        raise InputError("the ridge form is two-sided; use one_sided=False or ridge=0.")
    n, d = weighted.shape
    # An isometry, so that √λ keeps its meaning. It leaves no more columns than there are points.
    points = torch.linalg.qr(weighted.mT).R.mT if n < d else weighted
    extra = ridge**0.5 * torch.eye(points.shape[1], dtype=points.dtype, device=points.device)
    if ridge == 0:
        extra = extra[:0]

    bounds, importance = points.new_zeros(n), points.new_zeros(n)
    gained = points.new_zeros(n)  # Σ_{t<l} 1/α_it
    left = torch.nonzero(points.abs().amax(dim=1) > 0).flatten()
    worst, rounds = 1.0, 0
    while left.numel():
        rounds += 1
        found = linf_coreset(torch.cat([points[left], extra]), variant=variant, one_sided=one_sided)
        gauge = found.gauge[: left.numel()]
        chosen = found.indices[found.indices < left.numel()]
        own = gauge.clone()
        own[chosen] = own[chosen].clamp(max=1.0)  # a point of S_l stands in for itself
        out = torch.zeros(left.numel(), dtype=torch.bool, device=points.device)
        out[chosen] = True
        if chosen.numel() == 0 or found.factor == math.inf:
            out[:] = True  # Nothing more can be certified, so the others keep the bounds from the rounds so far.
        leaving = left[out]
        if tight:
            bounds[leaving] = 1.0 / (gained[leaving] + 1.0 / own[out])
            importance[leaving] = 1.0 / (gained[leaving] + 1.0 / gauge[out].clamp(min=1.0))
            gained[left] += 1.0 / gauge
        else:
            worst = max(worst, found.factor)
            bounds[leaving] = importance[leaving] = worst / rounds
        left = left[~out]
    bounds = bounds.clamp(max=1.0)
    if not bool(torch.isfinite(importance).all()):
        importance = bounds
    found = _relative(bounds, "peeling", points)
    return replace(found, importance=importance, rounds=rounds, ridge=float(ridge))


def spectral_ridge(weighted: Float[Tensor, "n d"]) -> float:
    """λ for the ridge form: the mean eigenvalue of the Gram matrix A Aᵀ, which is the mean squared norm of the points.

    About half of the points then lie inside the ball of the added points, and peeling orders the others.
    """
    return float(weighted.to(torch.float64).square().sum(dim=1).mean())


def _as_weights(weights: Tensor, points: Tensor) -> Tensor:
    n = points.shape[0]
    c = torch.as_tensor(weights, dtype=torch.float64, device=points.device)
    if c.shape != (n,):
        raise InputError(f"weights must have one entry per point ({n}), but the shape is {tuple(c.shape)}.")
    if not bool(torch.isfinite(c).all()) or bool((c < 0).any()):
        raise InputError("weights must be finite and ≥ 0: they are c_i = max_j |V_ji|.")
    return c


def _relative(bounds: Tensor, method: Method, weighted: Tensor) -> Sensitivities:
    nonzero = weighted.abs().amax(dim=1) > 0
    bounds = torch.where(nonzero, bounds, 0.0)
    vacuous = bool((bounds[nonzero] >= 1.0 - 1e-9).all())
    return Sensitivities(bounds, bounds, float(bounds.sum()), method, "relative", vacuous, span(weighted).rank)


def _absolute(bounds: Tensor, method: Method, weighted: Tensor) -> Sensitivities:
    return Sensitivities(bounds, bounds, float(bounds.sum()), method, "absolute", False, span(weighted).rank)


def _exact(weighted: Tensor, one_sided: bool) -> Tensor:
    """s_i = min{‖v‖∞ : Aᵀv = a_i} (v ≥ 0 when one-sided), the dual of the supremum, by HiGHS."""
    import numpy as np
    from scipy.optimize import linprog

    # Sensitivities do not depend on the basis, so orthonormal coordinates u_k can be used. With w_k = v_k ‖u_k‖/‖u_i‖
    # and directions û, the program is: minimise s with Σ w_k û_k = û_i and |w_k| ≤ s ‖u_k‖/‖u_i‖. Then w = e_i, s = 1
    # is feasible at unit scale, however much the lengths of the points differ.
    rows = span(weighted).coordinates.cpu().numpy()
    n, r = rows.shape
    lengths = np.linalg.norm(rows, axis=1)
    live = np.flatnonzero(lengths)
    directions = rows[live] / lengths[live, None]
    k = live.size
    values = np.zeros(n)
    objective = np.r_[np.zeros(k), 1.0]
    bounds = [(0.0 if one_sided else None, None)] * k + [(0.0, None)]
    for i, direction in zip(live, directions, strict=True):
        ratio = lengths[live] / lengths[i]
        upper = np.c_[np.eye(k), -ratio]
        inequality = upper if one_sided else np.r_[upper, np.c_[-np.eye(k), -ratio]]
        solved = linprog(
            objective,
            A_ub=inequality,
            b_ub=np.zeros(len(inequality)),
            A_eq=np.c_[directions.T, np.zeros(r)],
            b_eq=direction,
            bounds=bounds,
            method="highs",
        )
        if not solved.success:
            raise GeometryError(
                f"the linear program of channel {i} did not solve: the lengths of the points are too far apart. "
                "Use method='peeling' or 'lewis', which need no solver."
            )
        values[i] = min(1.0, solved.fun)
    return torch.as_tensor(values, dtype=weighted.dtype, device=weighted.device)
