"""L-infinity coresets: a few points whose largest response bounds the largest response of all points.

For points P and every query x,  max_P f⟨p, x⟩ ≤ factor · max_S f⟨p, x⟩  with f = |·| (symmetric) or relu (one-sided).
Peeling (`sensitivity.py`) removes such sets one after another.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

import torch

from coreprune._shapes import Float, Int, Tensor
from coreprune._shown import brief
from coreprune._validate import as_points
from coreprune.errors import InputError
from coreprune.geometry import Ellipsoid, mvee, recombine, span

Variant = Literal["axes", "contact"]


@dataclass(frozen=True)
class LinfCoreset:
    """Points S that stand in for all points, with a certified factor.

    indices: (k,) int64, rows of the points, ascending.
    factor: max_P f⟨p, x⟩ ≤ factor · max_S f⟨p, x⟩ for every x. It is `math.inf` where nothing can be certified.
    gauge: (n,) float64, the factor of each single point: f⟨p_i, x⟩ ≤ gauge[i] · max_S f⟨p, x⟩, from the ellipsoid.
        A point of S also stands in for itself, with factor 1. Zero rows have 0.
    variant, one_sided: as they were passed.
    rank: the dimension of the span of the points.
    """

    indices: Int[Tensor, " k"]
    factor: float
    gauge: Float[Tensor, " n"]
    variant: Variant
    one_sided: bool
    rank: int
    __repr__ = brief


def linf_coreset(
    points: Float[Tensor, "n d"], variant: Variant = "contact", one_sided: bool = False, tol: float = 1e-2
) -> LinfCoreset:
    """Return an L-infinity coreset of `points` from their Löwner ellipsoid.

    T1 (contact points, symmetric): with u the D-optimal weights, M = Σ u_i p_i p_iᵀ, S = supp(u) and certified gap ε,
        max_P |⟨p, x⟩| ≤ √((1+ε) r) · max_S |⟨p, x⟩|  for every x.
        Proof: ⟨p, x⟩² ≤ (pᵀM⁻¹p)(xᵀMx) ≤ (1+ε) r · Σ u_i⟨p_i, x⟩² and Σ u_i = 1 on S.
    T2 (axes; Tukan, Mualem & Maalouf 2022, symmetric form): the endpoints y_k = √λ_k e_k of {yᵀM⁻¹y ≤ 1} lie in
        conv(±P), and the union C of their Carathéodory points has factor r·√(1+ε).
    T3 (one-sided): take the general ellipsoid (c, Σ, R² = r + ε(r+1)) and τ = √(cᵀΣ⁻¹c). If τ < 1/R, S = supp(u) has
        factor (R+τ)/(1/R−τ) for relu. Otherwise no finite factor is certified. For `variant="axes"`, the inner
        ellipsoid's endpoints replace S, and 1/R becomes 1/(R√r).

    points: (n, d), any real dtype, any device. The computation is in float64, in the span of the points.
    variant: "contact" (fewer points, smaller factor) or "axes" (the paper's construction).
    one_sided: False for |·|, True for relu.
    tol: the gap to which the ellipsoid is solved. The factor uses the gap that is certified in the end.

    Raises InputError for an unknown variant, and for points that are non-finite or have a wrong shape.
    """
    if variant not in get_args(Variant):
        raise InputError(f"unknown variant {variant!r}; known: {', '.join(get_args(Variant))}.")
    points = as_points(points)
    n = points.shape[0]
    nonzero = torch.nonzero(points.abs().amax(dim=1) > 0).flatten()
    if nonzero.numel() == 0:
        empty = torch.zeros(0, dtype=torch.int64, device=points.device)
        return LinfCoreset(empty, 1.0, points.new_zeros(n), variant, one_sided, 0)

    coordinates = span(points[nonzero]).coordinates
    rank = coordinates.shape[1]
    build = _one_sided if one_sided else _symmetric
    local, local_gauge = build(coordinates, variant, tol)
    # A point much shorter than the rounding errors of the others has no coordinates in their span, so no factor.
    lost = coordinates.abs().amax(dim=1) == 0
    gauge = points.new_zeros(n)
    gauge[nonzero] = torch.where(lost, math.inf, local_gauge)
    answered = torch.ones_like(local_gauge, dtype=torch.bool)
    answered[local] = False
    others = gauge[nonzero][answered]
    factor = max(1.0, float(others.max())) if others.numel() else 1.0
    return LinfCoreset(nonzero[local], factor, gauge, variant, one_sided, rank)


def _symmetric(points: Tensor, variant: Variant, tol: float) -> tuple[Tensor, Tensor]:
    """T1 or T2 in coordinates of full column rank: (indices, factor of each point)."""
    rank = points.shape[1]
    ellipsoid = mvee(points, symmetric=True, tol=min(tol, _CONTACT_TOL))
    if variant == "contact":
        # Per point: |⟨p, x⟩| ≤ √ω_p · √(xᵀMx), and √(xᵀMx) ≤ max_S|⟨·, x⟩| because the weights on S sum to one.
        for support in (_contact_points(ellipsoid), ellipsoid.support):
            factor, failed = torch.linalg.cholesky_ex(_moment(points, ellipsoid.weights, support))
            if not int(failed):  # it fails where the points with more than negligible weight no longer span
                return support, torch.linalg.solve_triangular(factor, points.mT, upper=False).norm(dim=0)
        return torch.arange(len(points), device=points.device), points.new_ones(len(points))
    gauge = ellipsoid.distances.clamp(min=0.0).sqrt()
    eigenvalues, axes = torch.linalg.eigh(ellipsoid.shape)
    endpoints = (axes * eigenvalues.sqrt()).mT
    # T2: y = Σ a_i p_i with a_i = u_i⟨p_i, M⁻¹y⟩ and Σ|a_i| ≤ √(yᵀM⁻¹y) ≤ 1.
    support = ellipsoid.support
    dual = endpoints @ axes / eigenvalues @ axes.mT
    start = (points[support] @ dual.mT).mT * ellipsoid.weights[support]
    return support[_used(points[support], start, symmetric=True)], gauge * math.sqrt(rank) * _ROUNDING


# Interior iterates keep a little weight on every point. At this gap the contact points stand out by orders of
# magnitude, and points below this share of the mean weight can be dropped. The factor is recomputed without them.
_CONTACT_TOL, _NEGLIGIBLE = 1e-5, 1e-2

# Recombination is exact to 1e-9, relative to its points. The factor is enlarged to cover that.
_ROUNDING = 1.0 + 1e-8

# The one-sided endpoints are moved inwards a little, so that rounding makes no weight negative. The factor covers it.
_INSIDE = 1.0 - 1e-9


def _contact_points(ellipsoid: Ellipsoid) -> Tensor:
    weights = ellipsoid.weights
    return torch.nonzero(weights > _NEGLIGIBLE / weights.numel()).flatten()


def _moment(points: Tensor, weights: Tensor, support: Tensor) -> Tensor:
    """Σ_S u_i p_i p_iᵀ with the weights on S scaled to sum to one."""
    u = weights[support] / weights[support].sum()
    return points[support].mT @ (u[:, None] * points[support])


def _one_sided(points: Tensor, variant: Variant, tol: float) -> tuple[Tensor, Tensor]:
    """T3 in coordinates of full column rank: (indices, factor of each point)."""
    n, rank = points.shape
    if n <= rank:
        # Independent points: for each of them, some x is positive on it alone, so all of them are needed (T7).
        return torch.arange(n, device=points.device), points.new_ones(n)
    ellipsoid = mvee(points, symmetric=False, tol=min(tol, _CONTACT_TOL))
    support = _contact_points(ellipsoid)
    u = ellipsoid.weights[support] / ellipsoid.weights[support].sum()
    center = u @ points[support]
    centred = points - center
    eigenvalues, axes = torch.linalg.eigh(_moment(centred, ellipsoid.weights, support))
    if float(eigenvalues[0]) <= 1e-12 * float(eigenvalues[-1]):
        # The affine hull misses the origin: τ is infinite.
        return support, points.new_full((n,), math.inf)
    whitening = axes / eigenvalues.sqrt()
    distances = (centred @ whitening).norm(dim=1)
    radius, tau = float(distances.max()), float((center @ whitening).norm())
    # With s² = xᵀΣx:  ⟨p, x⟩ ≤ (dist_p + τ)·s,  and  max_S⟨p, x⟩ ≥ (inner − τ)·s.
    inner = 1.0 / radius if variant == "contact" else _INSIDE / (radius * math.sqrt(rank))
    if tau >= inner:
        return support, points.new_full((n,), math.inf)
    factors = (distances + tau) / (inner - tau)
    if variant == "contact":
        return support, factors
    return support[_axes(points[support], u, centred[support] @ whitening / radius)], factors


def _axes(points: Tensor, u: Tensor, ends: Tensor) -> Tensor:
    """Rows of `points` in the Carathéodory sets of c ± e, for all axes e of an ellipsoid inside their hull.

    u: weights with c = Σ u_i p_i. ends: (n, axes) (p_i − c)ᵀΣ⁻¹e, at most 1. Then c ± e = Σ u_i (1 ± (p_i−c)ᵀΣ⁻¹e) p_i.
    """
    half = ends * _INSIDE
    return _used(points, torch.cat([1.0 + half.mT, 1.0 - half.mT]) * u, symmetric=False)


def _used(points: Tensor, start: Tensor, symmetric: bool) -> Tensor:
    """Rows of `points` that some combination still needs after recombination, ascending."""
    return torch.nonzero((recombine(points, start, symmetric) != 0).any(dim=0)).flatten()
