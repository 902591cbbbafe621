"""Sensitivities over the inputs that a layer can see, some of whose coordinates are never negative (T4″)."""

from __future__ import annotations

import torch

from coreprune._shapes import Bool, Float, Tensor
from coreprune._validate import as_points
from coreprune.coreset._programs import Programs, least
from coreprune.errors import InputError

_ENTRIES = 1 << 22  # of the matrices of the programs that are solved together: 32 MiB each
_NULL = 1e-12  # singular values below this share of the largest, times n, are zero
_SAME = 1e13  # directions that agree to this many parts are the same


def cone_sensitivities(
    points: Float[Tensor, "n d"], nonnegative: Bool[Tensor, " d"], *, one_sided: bool = True
) -> Float[Tensor, " n"]:
    """T4″: bound s_i = sup f⟨a_i, x⟩ / Σ_k f⟨a_k, x⟩ over the x with x_c ≥ 0 where `nonnegative` is true; (n,) float64.

    One-sided (f = relu), s_i = min{s : 0 ≤ v ≤ s, (Aᵀv)_c ≥ a_ic where x_c ≥ 0, (Aᵀv)_c = a_ic elsewhere}. Two-sided
    (f = |·|), −s ≤ v ≤ s, and the larger of the values for a_i and for −a_i counts.
    Proof: this is the dual of max{⟨a_i, x⟩ : Σ_k t_k ≤ 1, t_k ≥ f⟨a_k, x⟩, x in the cone}. Weak duality alone: for such
    a v and such an x, ⟨a_i, x⟩ ≤ ⟨Aᵀv, x⟩ = Σ_k v_k⟨a_k, x⟩ ≤ s Σ_k f⟨a_k, x⟩.

    So every feasible v proves a bound, and the programs need not be solved to the end: a bound is what a v proves that
    satisfies the constraints to 10⁻¹² of the length of a_i. It is within 0.1 % of s_i where the method finds such a v,
    and otherwise 1 (v = e_i). The sensitivities are at most those over all x (T4, T5, T7).

    points: (n, d) a_i = c_i p_i, with the bias as the last column if there is one. nonnegative: (d,) bool. It is true
    everywhere behind a ReLU, and true for the bias of any layer, because x ends in 1 there.

    Takes about 20·n³(n + d) operations, on the points' device. Raises InputError for points that are not finite, and
    for a mask of another shape.
    """
    points = as_points(points)
    n, d = points.shape
    if nonnegative.shape != (d,) or nonnegative.dtype != torch.bool:
        raise InputError(
            f"nonnegative must be ({d},) bool, one entry per column of the points, but it is "
            f"{tuple(nonnegative.shape)} {nonnegative.dtype}."
        )
    out, mask = points.new_zeros(n), nonnegative.to(points.device)
    live = points.abs().amax(dim=1).nonzero().flatten()
    if not len(live):
        return out
    used = points.abs().amax(dim=0) > 0
    rows, mask = points[live][:, used], mask[used]
    lengths = rows.norm(dim=1)
    # Rows of one direction answer as one row of their total length, and share its sensitivity. Apart, the best v lies
    # on a face of the constraints, where there is no interior to walk through.
    _, member = torch.unique((rows / lengths[:, None] * _SAME).round(), dim=0, return_inverse=True)
    m = int(member.max()) + 1
    total = lengths.new_zeros(m).index_add_(0, member, lengths)
    directions = rows.new_zeros(m, rows.shape[1]).index_add_(0, member, rows) / total[:, None]
    null = _null_space(directions[:, ~mask])
    cone = directions[:, mask]
    sees = cone if null is None else null.mT @ cone
    bounds = torch.ones_like(total)
    for part in torch.arange(m, device=rows.device).split(max(1, _ENTRIES // (m * (m + d)))):
        own = torch.eye(m, dtype=rows.dtype, device=rows.device)[part]
        ratio = total / total[part, None]  # v_k ‖a_k‖/‖a_i‖ in place of v_k keeps every program at scale 1
        found = least(Programs(own, ratio, null, sees, not one_sided))
        if not one_sided:
            found = torch.maximum(found, least(Programs(-own, ratio, null, sees, two_sided=True)))
        bounds[part] = found
    out[live] = bounds[member] * lengths / total[member]
    return out


def _null_space(free: Float[Tensor, "n f"]) -> Float[Tensor, "n m"] | None:
    """Orthonormal columns N with freeᵀN = 0: by what v may change. None: by anything."""
    if not free.shape[1]:
        return None
    left, values, _ = torch.linalg.svd(free, full_matrices=True)
    return left[:, int((values > _NULL * len(free) * values[0]).sum()) :]
