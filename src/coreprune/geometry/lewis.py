"""Leverage scores and Lewis weights."""

from __future__ import annotations

import torch

from coreprune._shapes import Float, Num, Tensor
from coreprune.errors import GeometryError, InputError
from coreprune.geometry.subspace import span


def leverage_scores(points: Num[Tensor, "n d"]) -> Float[Tensor, " n"]:
    """ℓ2 leverage scores of points (n, d): p_iᵀ(PᵀP)⁺p_i = ‖U_i‖², (n,) float64.

    Their sum is the rank. Zero rows have 0. They are the exact sensitivities sup_x ⟨p_i,x⟩² / Σ_k ⟨p_k,x⟩².

    Raises InputError as `span` does.
    """
    return span(points).coordinates.square().sum(dim=1)


def lewis_weights(
    points: Num[Tensor, "n d"], p: float = 1.0, iterations: int = 100, tol: float = 1e-9
) -> Float[Tensor, " n"]:
    """ℓp Lewis weights of points (n, d), 0 < p < 4: the fixed point of τ_i = (p_iᵀ (Pᵀ diag(τ)^{1−2/p} P)⁺ p_i)^{p/2}.

    Returns (n,) float64 with Στ = rank. Zero rows have 0. For p = 1, τ_i = √(p_iᵀ(Pᵀdiag(τ)⁻¹P)⁺p_i), and τ_i bounds
    the sensitivity sup_x |⟨p_i,x⟩| / Σ_k |⟨p_k,x⟩| (T5). Each round of the iteration contracts log τ by |1 − p/2|
    (Cohen & Peng 2015), so 30 rounds reach 1e-9 at p = 1. It stops when no weight changes by more than tol, relatively.

    Raises InputError for other p and for points that `span` refuses. Raises GeometryError if `iterations` rounds are
    not enough.
    """
    if not 0 < p < 4:
        raise InputError(f"p must lie in (0, 4), where the fixed point contracts, but is {p}.")
    if iterations < 1:
        raise InputError(f"iterations must be at least 1, but is {iterations}.")
    basis = span(points).coordinates
    n, r = basis.shape
    tau = basis.new_zeros(n)
    alive = torch.nonzero((basis != 0).any(dim=1))[:, 0]
    if r == 0 or len(alive) == 0:
        return tau
    u = basis[alive]
    t = torch.full((len(alive),), r / len(alive), dtype=u.dtype, device=u.device)
    moved = float("inf")
    for _ in range(iterations):
        # QR of the re-weighted points, not Cholesky of their Gram matrix: τ^{1−2/p} can span many orders of magnitude.
        q = torch.linalg.qr(t.pow(0.5 - 1 / p)[:, None] * u).Q
        leverage = q.square().sum(dim=1)  # = t^{1-2/p} · u_iᵀ M⁻¹ u_i
        new = (leverage * t.pow(2 / p - 1)).pow(p / 2)
        moved = float((new / t).log().abs().max())
        t = new
        if moved <= tol:
            # The fixed point has Στ = r exactly. This removes the remaining difference.
            tau[alive] = t * (r / t.sum())
            return tau
    raise GeometryError(
        f"the Lewis weights still moved by {moved:.1e} after {iterations} rounds. Raise `iterations` or `tol`."
    )
