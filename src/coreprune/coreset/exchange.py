"""Exchange: swap a unit that is kept for one that is not, as long as that lowers the error of the refit."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from coreprune._shapes import Float, Int, Tensor
from coreprune.coreset._pivoting import diagonal_blocks
from coreprune.coreset._readers import Moments, ScaledReader, as_readers, features

_LEAST = 1e-9  # of the error with no units; a swap that gains less is rounding


def swap_changes(
    moments: Sequence[Moments], units: int, kept: Int[Tensor, " k"], *, ridge: float = 1e-4
) -> Float[Tensor, "k m"]:
    """T15: what every swap of a kept unit for another one does to ê, exactly, from one factorisation per reader.

    Put A = K + λ, Q = (A_SS)⁻¹, B = A_:S Q, R = A − A_:S Q A_S: and F = VR. Without unit i the residual is
    R + rrᵀ, r = B_:i Q_ii^{-1/2}, which costs δ_i = ‖Vr‖². Unit j then gains γ_ij = tr(P⁻¹ HᵀH), with
    P = R_jj + r_j r_jᵀ and H = F_:j + (Vr) r_jᵀ. With the ridge's charge c = λ tr(G_BB) of a unit outside S, the swap
    changes ê(S) by (δ_i − c_i) − (γ_ij − c_j). The proof is in docs/theory.md.

    kept: (k,) int64, S. Returns (k, n−k) float64: rows in the order of `kept`, columns in that of the other units,
    ascending. ridge and errors as in `functional_coreset`.
    """
    return _changes(as_readers(moments, units, ridge), kept, _rest(units, kept))


def exchanged(
    moments: Sequence[Moments], units: int, kept: Int[Tensor, " k"], *, ridge: float = 1e-4, most: int = 64
) -> Int[Tensor, " k"]:
    """Make the best swap of a kept unit for another one, again and again, until none lowers ê. Returns them, ascending.

    No swap of one unit improves on the result, unless it took `most` swaps. Arguments as in `swap_changes`.
    """
    readers = as_readers(moments, units, ridge)
    kept = kept.sort().values
    if not 0 < kept.numel() < units:
        return kept
    least = _LEAST * float(sum((r.root @ r.covariance * r.root).sum() for r in readers))
    for _ in range(most):
        rest = _rest(units, kept)
        changes = _changes(readers, kept, rest)
        best = int(changes.argmin())
        i, j = divmod(best, rest.numel())
        if not float(changes[i, j]) < -least:
            break
        kept[i] = rest[j]
        kept = kept.sort().values
    return kept


def _rest(units: int, kept: Tensor) -> Tensor:
    out = torch.ones(units, dtype=torch.bool, device=kept.device)
    out[kept] = False
    return out.nonzero()[:, 0]


def _changes(readers: list[ScaledReader], kept: Tensor, rest: Tensor) -> Tensor:
    return torch.stack([_of_reader(reader, kept, rest) for reader in readers]).sum(dim=0)


def _of_reader(reader: ScaledReader, kept: Tensor, rest: Tensor) -> Tensor:
    p, v, k, m = reader.p, reader.root, kept.numel(), rest.numel()
    inside, outside = features(kept, p), features(rest, p)
    ridged = reader.ridged
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(ridged[inside[:, None], inside]))
    across = ridged[outside[:, None], inside]
    b = across @ inverse  # (m·p, k·p); on the kept features themselves, B is the identity
    residual = ridged[outside[:, None], outside] - b @ across.mT
    blocks = diagonal_blocks(residual, m)
    f = (v[:, outside] @ residual).view(-1, m, p).transpose(0, 1)  # (m, J, p)
    roots = torch.linalg.inv(torch.linalg.cholesky(diagonal_blocks(inverse, k))).mT  # Q_ii^{-1/2}, (k, p, p)
    out = v.new_zeros(k, m)
    for i in range(k):
        own = slice(i * p, (i + 1) * p)
        r = b[:, own] @ roots[i]
        vr = v[:, inside[own]] @ roots[i] + v[:, outside] @ r  # (J, p)
        by_unit = r.view(m, p, p)
        after = blocks + by_unit @ by_unit.mT
        h = f + vr @ by_unit.mT
        solved = torch.linalg.solve_triangular(torch.linalg.cholesky(after), h.mT, upper=False)
        out[i] = vr.square().sum() - solved.square().sum(dim=(1, 2))
    return out - reader.charge[kept, None] + reader.charge[rest]
