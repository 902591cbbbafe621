"""Readers on the queries, checked and scaled. All selections in function space compute with them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch

from coreprune._shapes import Bool, Float, Int, Tensor
from coreprune._shown import brief
from coreprune._validate import as_points
from coreprune.coreset._pivoting import Pair
from coreprune.errors import InputError

EPS = 2.0**-52
LEAST_RIDGE = 1e-9  # times the mean variance; with less, rounding in the inverse of a singular K would pick the units
DEAD = 1e-14  # times the mean variance of a reader; a feature that varies less is constant up to rounding
_ROWS = 256  # of a matrix that are compared with its columns at once
SYMMETRY = 1e-6  # times the largest entry; moments accumulated in float32 are off by less
GRAM = "a gram matrix"


@dataclass(frozen=True)
class Moments:
    """One reader on the queries. Unit i owns the features i·p … (i+1)·p − 1. Readers may differ in p.

    covariance: (n·p, n·p) K, the covariance of the features over the queries. gram: (n·p, n·p) G = VᵀWV, which weighs
    errors of the features by their effect on the reader's outputs.

    Both are symmetric and positive semi-definite. All computation is in float64.
    """

    covariance: Float[Tensor, "f f"]
    gram: Float[Tensor, "f f"]
    __repr__ = brief


@dataclass(frozen=True)
class ScaledReader:
    """One reader after scaling: K has a mean diagonal of 1, and G is scaled inversely, so that tr(GK) is unchanged.

    covariance: (f, f) K, without the ridge. gram: (f, f) G. ridge: λ. units: n, so f = n·p.
    """

    covariance: Float[Tensor, "f f"]
    gram: Float[Tensor, "f f"]
    ridge: float
    units: int

    @property
    def p(self) -> int:
        """The number of features of a unit."""
        return self.covariance.shape[0] // self.units

    @property
    def ridged(self) -> Float[Tensor, "f f"]:
        """K + λ."""
        out = self.covariance.clone()
        out.diagonal().add_(self.ridge)
        return out

    @cached_property
    def factor(self) -> Float[Tensor, "f f"]:
        """L, lower triangular, with K + λ = LLᵀ. Raises InputError where K is not positive semi-definite."""
        return cholesky(self.ridged)

    @cached_property
    def root(self) -> Float[Tensor, "J f"]:
        """V with VᵀV = G, J = rank G."""
        return root_of(self.gram)

    @property
    def alive(self) -> Bool[Tensor, " n"]:
        """Which units have a feature that varies."""
        return (self.covariance.diagonal().view(self.units, self.p) > DEAD).any(dim=1)

    @property
    def charge(self) -> Float[Tensor, " n"]:
        """λ tr(G_BB): the amount that the ridge adds to tr(G R_S) for a unit outside S, whatever the refit."""
        return self.ridge * self.gram.diagonal().view(self.units, self.p).sum(dim=1)

    def restricted(self, units: Int[Tensor, " s"]) -> ScaledReader:
        """The same reader on the given units only, in the given order."""
        if torch.equal(units, torch.arange(self.units, device=units.device)):
            return self
        keep = features(units, self.p)
        covariance, gram = (matrix[keep[:, None], keep] for matrix in (self.covariance, self.gram))
        return ScaledReader(covariance, gram, self.ridge, units.numel())

    def forward(self) -> Pair:
        """The start of forward selection."""
        return Pair(self.ridged, None, self.charge, self.root)

    def backward(self) -> Pair:
        """The start of backward elimination."""
        return Pair(torch.cholesky_inverse(self.factor).contiguous(), self.gram.clone(), self.charge)

    def curve(self, order: Int[Tensor, " n"]) -> Float[Tensor, " m"]:
        """ê(k) for the first k of `order`, (n+1,). If K + λ = LLᵀ in that order, tr(G R_k) = Σ_{j>k·p} ‖V l_j‖²."""
        inside = self.restricted(order)
        loads = self.root[:, features(order, self.p)] @ inside.factor
        return _tails(loads.square().sum(dim=0).view(self.units, self.p).sum(dim=1) - inside.charge)

    def floor(self) -> Float[Tensor, " m"]:
        """T10: the sum of the eigenvalues of VKVᵀ (equally of G^{1/2}KG^{1/2}) beyond the (k·p)-th, (n+1,)."""
        values = torch.linalg.eigvalsh(self.root @ self.covariance @ self.root.mT).clamp_min(0).flip(0)
        padded = values.new_zeros(self.covariance.shape[0])
        padded[: values.numel()] = values
        return _tails(padded.view(self.units, self.p).sum(dim=1))


def features(units: Tensor, p: int) -> Tensor:
    """The features of the given units, in the order of the units."""
    return (units[:, None] * p + torch.arange(p, device=units.device)).flatten()


def others(units: int, kept: Tensor) -> Tensor:
    """The units that are not kept, ascending. Raises InputError unless `kept` names units, each at most once."""
    out = torch.ones(units, dtype=torch.bool, device=kept.device)
    if kept.numel() and not 0 <= int(kept.min()) <= int(kept.max()) < units:
        raise InputError(f"kept must name units from 0 to {units - 1}, not {int(kept.min())} to {int(kept.max())}.")
    out[kept] = False
    rest = out.nonzero()[:, 0]
    if rest.numel() + kept.numel() != units:
        raise InputError("kept must name each unit at most once.")
    return rest


def curve(readers: Sequence[ScaledReader], order: Int[Tensor, " n"]) -> Float[Tensor, " m"]:
    """Σ_readers ê(k) for the first k units of `order`, (n+1,), never increasing.

    Adding a unit can raise ê by a share of the ridge, if the weight of the unit is better set to zero. Then the lower
    value is kept. It belongs to a refit that leaves the unit out, so it is still at or above the least-squares error.
    """
    total = torch.stack([reader.curve(order) for reader in readers]).sum(dim=0)
    return total.clamp_min(0).cummin(dim=0).values


def alive(readers: Sequence[ScaledReader]) -> Bool[Tensor, " n"]:
    """Which units have a feature that varies in some reader, (n,)."""
    return torch.stack([reader.alive for reader in readers]).any(dim=0)


def cholesky(matrix: Float[Tensor, "f f"]) -> Float[Tensor, "f f"]:
    """The Cholesky factor of a covariance with its ridge. Raises InputError where there is none."""
    factor, info = torch.linalg.cholesky_ex(matrix)
    if int(info):
        raise InputError(
            "a covariance is not positive semi-definite: it has a negative eigenvalue that the ridge does not cover. "
            "Accumulate it in float64 from centred features, or raise the ridge."
        )
    return factor


def as_readers(moments: Sequence[Moments], units: int, ridge: float) -> list[ScaledReader]:
    """Check and scale the moments. Readers of the same features are joined into one, which gives a higher floor."""
    if not (math.isfinite(ridge) and ridge >= 0):
        raise InputError(f"ridge must be a finite number ≥ 0, but it is {ridge}.")
    if units < 1 or not moments:
        raise InputError(f"pass at least one unit and one reader, not {units} units and {len(moments)} readers.")
    pairs: list[tuple[Tensor, Tensor]] = []
    for number, each in enumerate(moments):
        covariance = _symmetric(each.covariance, f"covariance of reader {number}", units)
        gram = _symmetric(each.gram, f"gram of reader {number}", units).to(covariance.device)
        if gram.shape != covariance.shape:
            raise InputError(
                f"gram of reader {number} is {tuple(gram.shape)}, its covariance {tuple(covariance.shape)}: "
                "both must be over the same features."
            )
        same = next((i for i, (other, _) in enumerate(pairs) if torch.equal(other, covariance)), None)
        if same is None:
            pairs.append((covariance, gram))
        else:
            pairs[same] = (covariance, pairs[same][1] + gram)
    return [_scaled(covariance, gram, units, ridge) for covariance, gram in pairs]


def _scaled(covariance: Tensor, gram: Tensor, units: int, ridge: float) -> ScaledReader:
    """The reader; overwrites the matrices."""
    size = float(covariance.diagonal().mean())
    size = size if size > 0 else 1.0
    least = max(LEAST_RIDGE, 4 * EPS * covariance.shape[0] ** 2)  # the rounding error of K⁻¹ grows with its size
    _check_semidefinite(gram)
    reader = ScaledReader(covariance.div_(size), gram.mul_(size), max(ridge, least), units)
    reader.factor  # noqa: B018 - raises for an indefinite covariance
    return reader


def _check_semidefinite(gram: Tensor) -> None:
    """Raise InputError if a gram matrix has a negative eigenvalue beyond what rounding makes of a zero."""
    shifted = gram.clone()
    size = float(gram.diagonal().sum()) or float(gram.abs().max())
    shifted.diagonal().add_(SYMMETRY * size or 1.0)
    if int(torch.linalg.cholesky_ex(shifted).info):
        raise _indefinite(GRAM)


def _symmetric(matrix: Tensor, name: str, units: int) -> Tensor:
    matrix = as_points(matrix, name)
    if matrix.shape[0] != matrix.shape[1] or matrix.shape[0] % units:
        raise InputError(
            f"{name} must be square with the same number of features for each of the {units} units, "
            f"but its shape is {tuple(matrix.shape)}."
        )
    slack = SYMMETRY * max(float(matrix.max()), -float(matrix.min()))
    out, apart = torch.empty_like(matrix), 0.0
    for rows, columns, half in zip(matrix.split(_ROWS), matrix.split(_ROWS, dim=1), out.split(_ROWS), strict=True):
        apart = max(apart, float((rows - columns.mT).abs().max()))
        torch.add(rows, columns.mT, out=half).div_(2)
    if apart > slack:
        raise InputError(f"{name} is not symmetric.")
    if float(matrix.diagonal().min()) < -slack:
        raise InputError(f"{name} has a negative diagonal entry, so it is not positive semi-definite.")
    return out


def _indefinite(name: str) -> InputError:
    hint = ": pass VᵀWV with weights W ≥ 0." if name == GRAM else "."
    return InputError(f"{name} is not positive semi-definite{hint}")


def root_of(gram: Tensor, name: str = GRAM) -> Tensor:
    """V (rank, f) with VᵀV = G, by a Cholesky factorisation, with diagonal pivoting if the rank is not full.

    The latter is LAPACK's pstrf, on the CPU. Without pivots it takes a fifth of the time.
    """
    from scipy.linalg import get_lapack_funcs

    if (lower := lower_root(gram)) is not None:
        return lower.mT
    values = gram.cpu().numpy()
    (pstrf,) = get_lapack_funcs(("pstrf",), (values,))
    factor, pivots, rank, _ = pstrf(values, lower=0)
    root = torch.zeros(max(int(rank), 1), gram.shape[0], dtype=torch.float64)
    if rank:
        root[:, torch.from_numpy(pivots.astype("int64")) - 1] = torch.from_numpy(factor[:rank]).triu()
    trace = float(gram.diagonal().sum())
    if abs(float(root.square().sum()) - trace) > SYMMETRY * gram.shape[0] * abs(trace):
        raise _indefinite(name)
    return root.to(gram.device)


def lower_root(matrix: Float[Tensor, "f f"]) -> Float[Tensor, "f f"] | None:
    """L, lower triangular, with LLᵀ = G, or None if G is not positive definite."""
    found = torch.linalg.cholesky_ex(matrix)
    return None if int(found.info) else found.L


def _tails(steps: Tensor) -> Tensor:
    """The sums of the steps from k on, for k = 0..n."""
    return torch.cat([steps.flip(0).cumsum(0).flip(0), steps.new_zeros(1)])
