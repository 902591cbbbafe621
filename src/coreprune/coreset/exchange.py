"""Exchange: swap a unit that is kept for one that is not, as long as that lowers the error of the refit."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from coreprune._shapes import Float, Int, Tensor
from coreprune.coreset._pivoting import diagonal_blocks
from coreprune.coreset._readers import Moments, ScaledReader, as_readers, features, others

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
    ascending. ridge and errors as in `functional_coreset`. Raises InputError also for a `kept` that names no units.
    """
    return _changes(as_readers(moments, units, ridge), kept, others(units, kept))


def exchanged(
    moments: Sequence[Moments], units: int, kept: Int[Tensor, " k"], *, ridge: float = 1e-4, most: int = 64
) -> Int[Tensor, " k"]:
    """Make the best swap of a kept unit for another one, again and again, until none lowers ê. Returns them, ascending.

    No swap of one unit improves on the result, unless it took `most` swaps. Arguments as in `swap_changes`.
    """
    readers = as_readers(moments, units, ridge)
    kept, rest = kept.sort().values, others(units, kept)
    if not 0 < kept.numel() < units:
        return kept
    least = _LEAST * float(sum((r.root @ r.covariance * r.root).sum() for r in readers))
    for _ in range(most):
        changes = _changes(readers, kept, rest)
        best = int(changes.argmin())
        i, j = divmod(best, rest.numel())
        if not float(changes[i, j]) < -least:
            break
        kept[i] = rest[j]
        kept = kept.sort().values
        rest = others(units, kept)
    return kept


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
    f = (v[:, outside] @ residual).view(-1, m, p)  # (J, m, p)
    roots = torch.linalg.inv(torch.linalg.cholesky(diagonal_blocks(inverse, k))).mT  # Q_ii^{-1/2}, (k, p, p)
    r = torch.einsum("mpkq,kqs->kmps", b.view(m, p, k, p), roots)  # for every pair, (p, p)
    vr = torch.einsum("jkq,kqs->kjs", v[:, inside].view(-1, k, p), roots)
    vr = vr + torch.einsum("jmp,kmps->kjs", v[:, outside].view(-1, m, p), r)
    # HᵀH without H, which has all outputs for every pair.
    mixed = torch.einsum("jmp,kjs->kmps", f, vr) @ r.mT
    inner = torch.einsum("jmp,jmq->mpq", f, f) + mixed + mixed.mT + r @ (vr.mT @ vr)[:, None] @ r.mT
    after = diagonal_blocks(residual, m) + r @ r.mT
    gains = torch.cholesky_solve(inner, torch.linalg.cholesky(after)).diagonal(dim1=-2, dim2=-1).sum(dim=-1)
    return vr.square().sum(dim=(1, 2))[:, None] - gains - reader.charge[kept, None] + reader.charge[rest]
