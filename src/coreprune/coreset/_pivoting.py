"""Pivoting one unit at a time on a pair of matrices. Both greedy searches of `functional.py` use it.

A pair (A, H) describes one reader of n units with p features each. Both are (n·p, n·p), A is positive definite and
H = FᵀF for a matrix F that is never formed. Pivoting on the features B of one unit means

    A ← A − A_:B A_BB⁻¹ A_B:,    F ← F − F_:B A_BB⁻¹ A_B:,    with the gain tr(A_BB⁻¹ H_BB).

Let G = VᵀV. Starting from (K, KGK) gives forward selection: A is always the residual R_S, F is V R_S, and the gain
tr(R_BB⁻¹ (R G R)_BB) is the amount by which adding the unit lowers tr(G R_S). Starting from (K⁻¹, G) gives backward
elimination: A is always the inverse of K_SS, F holds the refit weights of the remaining units, and the gain is the
amount by which removing the unit raises tr(G R_S).

With A_BB = LLᵀ, y = L⁻¹A_B: and z = L⁻¹H_B: − ½ L⁻¹H_BB L⁻ᵀ y, the updates are A −= yᵀy, H −= yᵀz + zᵀy. They are
collected in a panel and applied together, as in LAPACK's blocked Cholesky. So nearly all work is in products of
matrices, one to two times (n·p)³ operations in all. Each step computes only its own rows of A and H, and keeps their
diagonal blocks up to date, which give all gains.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import reduce

import torch

from coreprune._shapes import Bool, Float, Int, Tensor

PANEL = 192  # rows; measured at 300 to 4,096 features: 192 and 256 are equally fast, and the fastest
FADED = 1e-6  # when the blocks of H have shrunk by this factor, and H can be computed afresh, it is
_ROWS = 256  # that are copied at once
_FEW = 4096  # features; up to here an accelerator's steps are too short for it, and the CPU takes them
_SMALL = 512  # features; smaller updates are one product. Measured: to halve them gains nothing, at 4,096 a sixth


class Pair:
    """One reader's A and H, and `charge` (n,), which is subtracted from the gains. Pivoting overwrites them.

    h: None stands for zero. root: V, if H is always A VᵀV A. H falls to rounding errors where A does, and is then
    computed from A.
    """

    def __init__(
        self,
        a: Float[Tensor, "f f"],
        h: Float[Tensor, "f f"] | None,
        charge: Float[Tensor, " n"],
        root: Float[Tensor, "J f"] | None = None,
    ):
        if a.shape[0] <= _FEW:
            a, charge = a.cpu(), charge.cpu()
            h, root = (None if x is None else x.cpu() for x in (h, root))
        self.a, self.h, self.charge, self.root = a, h, charge, root
        self.p = a.shape[0] // charge.numel()
        self.panel = max(1, PANEL // self.p)  # units
        if h is None and root is not None:
            self._renew()
        self._restart()
        # A_BB falls as units are pivoted on, so an inverse of an earlier A_BB gives a gain that is not too large.
        self.inverse = 1 / self.blocks if self.p == 1 else torch.cholesky_inverse(torch.linalg.cholesky(self.blocks))

    def _renew(self) -> None:
        assert self.root is not None
        f = self.root @ self.a
        self.h = f.mT @ f

    def _restart(self) -> None:
        """Start an empty panel, with the diagonal blocks computed from A and H themselves."""
        units, features = self.charge.numel(), self.a.shape[0]
        self.used = 0
        self.y, self.z = (self.a.new_empty(self.panel * self.p, features) for _ in range(2))
        self.blocks = diagonal_blocks(self.a, units)
        self.grams = torch.zeros_like(self.blocks) if self.h is None else diagonal_blocks(self.h, units)
        self.start = float(self.grams.abs().max())

    @property
    def stale(self) -> bool:
        """Whether the blocks of H have become so small that they may consist of rounding errors."""
        return self.root is not None and float(self.grams.abs().max()) < FADED * self.start

    def pivot(self, unit: int) -> None:
        """Pivot on one unit and store the update in the panel. Its blocks become those of a unit without features."""
        p, used, columns = self.p, self.used, slice(unit * self.p, (unit + 1) * self.p)
        y_old, z_old = self.y[:used], self.z[:used]
        y_here, z_here = y_old[:, columns], z_old[:, columns]
        factor = torch.linalg.cholesky(self.blocks[unit])
        both = torch.cat([y_here, z_here], dim=1).mT @ y_old  # (2p, f), so that y is read once
        y = torch.linalg.solve_triangular(factor, self.a[columns] - both[:p], upper=False)  # (p, f)
        self.blocks -= _by_unit(y, y)
        self.blocks[unit] = torch.eye(p, dtype=y.dtype, device=y.device)
        if self.h is not None:
            rows = torch.addmm(self.h[columns] - both[p:], y_here.mT, z_old, alpha=-1)
            rows = torch.linalg.solve_triangular(factor, rows, upper=False)
            inner = torch.linalg.solve_triangular(factor, rows[:, columns].mT, upper=False)  # L⁻¹H_BB L⁻ᵀ
            z = torch.addmm(rows, inner, y, alpha=-0.5)
            cross = _by_unit(y, z)
            self.grams -= cross + cross.mT
            self.grams[unit] = 0.0
            self.z[used : used + p] = z
        self.y[used : used + p] = y
        self.used += p

    def flush(self, free: Bool[Tensor, " n"]) -> None:
        """Apply the panel, and drop the units that are not free."""
        keep = free.repeat_interleave(self.p).nonzero()[:, 0]
        y, z, renew = self.y[: self.used, keep], self.z[: self.used, keep], self.stale
        self.a = _less(_kept(self.a, keep), y, y)
        self.charge, self.inverse = self.charge[free], self.inverse[free]
        self.root = None if self.root is None else self.root[:, keep]
        if renew:
            self._renew()
        elif self.h is not None:
            self.h = _less(_kept(self.h, keep), torch.cat([y, z]), torch.cat([z, y]))
        self._restart()

    def bounds(self) -> Float[Tensor, " n"]:
        """A lower bound of the gain of every unit, which is the gain itself if p = 1."""
        if self.p == 1:
            return gain(self)
        return (self.inverse * self.grams).sum(dim=(1, 2)) - self.charge

    def sharpened(self, units: Int[Tensor, " m"]) -> Float[Tensor, " m"]:
        """The gains of some units."""
        self.inverse[units] = torch.cholesky_inverse(torch.linalg.cholesky_ex(self.blocks[units]).L)
        return (self.inverse[units] * self.grams[units]).sum(dim=(1, 2)) - self.charge[units]


def _by_unit(y: Float[Tensor, "p f"], z: Float[Tensor, "p f"]) -> Float[Tensor, "n p p"]:
    """The diagonal blocks of yᵀz."""
    if len(y) == 1:
        return (y * z).view(-1, 1, 1)
    y, z = (rows.view(len(rows), -1, len(rows)).transpose(0, 1) for rows in (y, z))  # (n, p, p)
    return y.mT @ z


def _less(matrix: Float[Tensor, "f f"], left: Float[Tensor, "q f"], right: Float[Tensor, "q f"]) -> Tensor:
    """matrix −= leftᵀ right in place, where both are symmetric: blocks off the diagonal are computed once."""
    f = matrix.shape[0]
    if f <= _SMALL:
        return matrix.addmm_(left.mT, right, alpha=-1)
    half = f // 2
    _less(matrix[:half, :half], left[:, :half], right[:, :half])
    _less(matrix[half:, half:], left[:, half:], right[:, half:])
    matrix[half:, :half].addmm_(left[:, half:].mT, right[:, :half], alpha=-1)
    matrix[:half, half:] = matrix[half:, :half].mT
    return matrix


def _kept(matrix: Float[Tensor, "f f"], keep: Int[Tensor, " m"]) -> Float[Tensor, "m m"]:
    """Some rows and columns, ascending, in the memory of the matrix: fresh memory costs as much time as the copy."""
    out = matrix.view(-1)[: keep.numel() ** 2].view(keep.numel(), -1)
    for part, into in zip(keep.split(_ROWS), out.split(_ROWS), strict=True):
        into.copy_(matrix[part[:, None], keep])  # row i lies no later in `out` than the row that it comes from
    return out


def diagonal_blocks(matrix: Float[Tensor, "f f"], units: int) -> Float[Tensor, "n p p"]:
    """Return a copy of the diagonal blocks, one per unit."""
    p = matrix.shape[0] // units
    return matrix.view(units, p, units, p).diagonal(dim1=0, dim2=2).permute(2, 0, 1).clone()


def gain(pair: Pair) -> Float[Tensor, " n"]:
    """Return tr(A_BB⁻¹ H_BB) minus the charge, for every unit."""
    if pair.p == 1:
        return (pair.grams / pair.blocks)[:, 0, 0] - pair.charge
    solved = torch.cholesky_solve(pair.grams, torch.linalg.cholesky_ex(pair.blocks).L)
    return solved.diagonal(dim1=1, dim2=2).sum(dim=1) - pair.charge


def log_det(pair: Pair) -> Float[Tensor, " n"]:
    """Return log det A_BB for every unit."""
    return 2 * torch.linalg.cholesky_ex(pair.blocks).L.diagonal(dim1=1, dim2=2).log().sum(dim=1)


Pick = Callable[[list[Pair], Int[Tensor, " m"], Bool[Tensor, " m"]], int]


def largest(score: Callable[[Pair], Tensor], layers: Int[Tensor, " n"] | None = None) -> Pick:
    """Pick the unit with the largest total score. Units of a lower layer come before those of a higher one."""

    def pick(pairs: list[Pair], left: Tensor, free: Tensor) -> int:
        first = free
        if layers is not None:
            layer = layers.to(left.device)[left]
            first = free & (layer == layer[free].min())
        return int(torch.where(first, _total(score(pair) for pair in pairs), -torch.inf).argmax())

    return pick


def least_gain(pairs: list[Pair], left: Tensor, free: Tensor) -> int:  # noqa: ARG001 (one signature)
    """Pick the unit with the smallest total gain. Of units of several features, only few gains are computed."""
    bounds = torch.where(free, _total(pair.bounds() for pair in pairs), torch.inf)
    least = bounds.argmin()
    if all(pair.p == 1 for pair in pairs):
        return int(least)
    reached = _total(pair.sharpened(least[None]) for pair in pairs)
    close = bounds <= reached  # no other unit can have a gain as small
    close[least] = True  # where rounding has put its bound above its gain
    close = close.nonzero()[:, 0]
    return int(close[_total(pair.sharpened(close) for pair in pairs).argmin()])


def _total(scores: Iterable[Tensor]) -> Tensor:
    return reduce(torch.add, scores)


def pivot_all(pairs: list[Pair], pick: Pick) -> Int[Tensor, " n"]:
    """Pivot on the unit that `pick` names until none is left. Return that order, (n,) int64.

    pick: gets the pairs, which unit each of their m blocks belongs to, and which of them are free. It names the block.
    Ties go to the lower index. The pairs are changed.
    """
    units = pairs[0].charge.numel()
    left = torch.arange(units, device=pairs[0].a.device)
    free = torch.ones_like(left, dtype=torch.bool)
    panel = min(pair.panel for pair in pairs)
    taken: list[Tensor] = []
    since = 0
    for _ in range(units):
        if since == panel or (since and any(pair.stale for pair in pairs)):
            for pair in pairs:
                pair.flush(free)
            left, free, since = left[free], free[free], 0
        unit = pick(pairs, left, free)
        taken.append(left[unit])
        free[unit] = False
        since += 1
        for pair in pairs:
            pair.pivot(unit)
    return torch.stack(taken)
