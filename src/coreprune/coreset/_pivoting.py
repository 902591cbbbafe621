"""Pivoting one unit at a time on a pair of matrices. Both greedy searches of `functional.py` use it.

A pair (A, F) describes one reader of n units with p features each. A (n·p, n·p) is positive definite, and F is
(J, n·p). Pivoting on the features B of one unit means

    A ← A − A_:B A_BB⁻¹ A_B:,    F ← F − F_:B A_BB⁻¹ A_B:,    with the gain tr(A_BB⁻¹ F_:Bᵀ F_:B).

Let G = VᵀV. Starting from (K, VK) gives forward selection: A is always the residual R_S, F is V R_S, and the gain
tr(R_BB⁻¹ (R G R)_BB) is the amount by which adding the unit lowers tr(G R_S). Starting from (K⁻¹, V) gives backward
elimination: A is always the inverse of K_SS, F holds the refit weights of the remaining units, and the gain is the
amount by which removing the unit raises tr(G R_S).

With A_BB = LLᵀ, y = L⁻¹A_B: and φ = L⁻¹F_:Bᵀ, the updates are A −= yᵀy, F −= φᵀy. They are collected in a panel and
applied together, as in LAPACK's blocked Cholesky. Each step updates only its own rows and the diagonal blocks of A and
FᵀF, which give all gains.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from coreprune._shapes import Float, Int, Tensor

PANELS = 16  # measured at 64..512 units: 8 to 32 are equally fast
FADED = 1e-6  # when the blocks of FᵀF shrink by this factor within one panel, they are recomputed


class Pair:
    """One reader's A (f, f), F (J, f) and `charge` (n,), which is subtracted from the gains. Pivoting changes it."""

    def __init__(self, a: Float[Tensor, "f f"], f: Float[Tensor, "J f"], charge: Float[Tensor, " n"]):
        self.a, self.f, self.charge = a, f, charge
        self.p = a.shape[0] // charge.numel()
        self._restart()

    def _restart(self) -> None:
        """Start an empty panel, with the diagonal blocks computed from A and F themselves."""
        units, p = self.charge.numel(), self.p
        self.y = self.a.new_zeros(0, self.a.shape[0])
        self.phi = self.a.new_zeros(0, self.f.shape[0])
        self.blocks = diagonal_blocks(self.a, units)
        by_unit = self.f.view(-1, units, p).transpose(0, 1)  # (units, J, p)
        self.grams = by_unit.mT @ by_unit
        self.start = float(self.grams.abs().max())

    @property
    def stale(self) -> bool:
        """Whether the blocks of FᵀF have become so small that they may consist of rounding errors."""
        return float(self.grams.abs().max()) < FADED * self.start

    def pivot(self, unit: int) -> None:
        """Pivot on one unit and store the update in the panel. Its blocks become those of a unit without features."""
        columns = slice(unit * self.p, (unit + 1) * self.p)
        y_old = self.y[:, columns]
        factor = torch.linalg.cholesky(self.blocks[unit])
        y = torch.linalg.solve_triangular(factor, self.a[columns] - y_old.mT @ self.y, upper=False)  # (p, f)
        phi = torch.linalg.solve_triangular(factor, self.f[:, columns].mT - y_old.mT @ self.phi, upper=False)  # (p, J)
        z = phi @ self.f - (phi @ self.phi.mT) @ self.y - 0.5 * (phi @ phi.mT) @ y  # (p, f)
        y_units, z_units = (rows.view(self.p, -1, self.p).transpose(0, 1) for rows in (y, z))  # (units, p, p)
        cross = y_units.mT @ z_units
        self.blocks -= y_units.mT @ y_units
        self.grams -= cross + cross.mT
        self.blocks[unit], self.grams[unit] = torch.eye(self.p, dtype=y.dtype, device=y.device), 0.0
        self.y, self.phi = torch.cat([self.y, y]), torch.cat([self.phi, phi])

    def flush(self, free: Tensor) -> None:
        """Apply the panel, and drop the units that are not free. free: (n,) bool."""
        keep = free.repeat_interleave(self.p).nonzero()[:, 0]
        y = self.y[:, keep]
        self.a = self.a[keep[:, None], keep].addmm_(y.mT, y, alpha=-1)
        self.f = self.f[:, keep].addmm_(self.phi.mT, y, alpha=-1)
        self.charge = self.charge[free]
        self._restart()


def diagonal_blocks(matrix: Float[Tensor, "f f"], units: int) -> Float[Tensor, "n p p"]:
    """Return a copy of the diagonal blocks, one per unit."""
    p = matrix.shape[0] // units
    return matrix.view(units, p, units, p).diagonal(dim1=0, dim2=2).permute(2, 0, 1).clone()


def gain(pair: Pair) -> Float[Tensor, " n"]:
    """Return tr(A_BB⁻¹ (FᵀF)_BB) minus the charge, for every unit."""
    if pair.p == 1:
        return (pair.grams / pair.blocks)[:, 0, 0] - pair.charge
    solved = torch.cholesky_solve(pair.grams, torch.linalg.cholesky_ex(pair.blocks).L)
    return solved.diagonal(dim1=1, dim2=2).sum(dim=1) - pair.charge


def log_det(pair: Pair) -> Float[Tensor, " n"]:
    """Return log det A_BB for every unit."""
    return 2 * torch.linalg.cholesky_ex(pair.blocks).L.diagonal(dim1=1, dim2=2).log().sum(dim=1)


def pivot_all(
    pairs: list[Pair],
    score: Callable[[Pair], Tensor],
    *,
    largest: bool = True,
    layers: Int[Tensor, " n"] | None = None,
) -> Int[Tensor, " n"]:
    """Pivot on the unit with the largest (or smallest) total score until none is left. Return that order, (n,) int64.

    layers: units of a lower layer come before those of a higher one.

    Ties go to the lower index. The pairs are changed. Each step costs O(n·p·(n·p + J)·p), with n the number of
    remaining units.
    """
    units = pairs[0].charge.numel()
    left = torch.arange(units, device=pairs[0].a.device)  # which unit each block of the matrices belongs to
    layers = torch.zeros_like(left) if layers is None else layers
    free = torch.ones_like(left, dtype=torch.bool)
    worst = -torch.inf if largest else torch.inf
    taken: list[Tensor] = []
    since = 0
    for _ in range(units):
        if since and (since * PANELS >= units or any(pair.stale for pair in pairs)):
            for pair in pairs:
                pair.flush(free)
            left, free, since = left[free], free[free], 0
        scores = torch.stack([score(pair) for pair in pairs]).sum(dim=0)
        layer = layers[left]
        scores = torch.where(free & (layer == layer[free].min()), scores, worst)
        unit = int(scores.argmax() if largest else scores.argmin())
        taken.append(left[unit])
        free[unit] = False
        since += 1
        for pair in pairs:
            pair.pivot(unit)
    return torch.stack(taken)
