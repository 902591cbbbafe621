"""Held-out error curves: what a refit on some of the queries makes of queries that it has not seen."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from coreprune._shapes import Float, Int, Tensor
from coreprune._shown import brief
from coreprune.coreset._readers import cholesky, features, lower_root, root_of
from coreprune.errors import InputError

# Twelve ridges, as multiples of the mean variance; the last stands for no refit at all.
RIDGES: tuple[float, ...] = (*(10.0 ** (exponent / 2) for exponent in range(-8, 3)), math.inf)

_BLOCK = 256  # features
_GAIN = 1e-3  # of the error


@dataclass(frozen=True)
class Fold:
    """The moments of one reader on the queries that a refit sees, and on those that it does not see.

    seen: (f, f) the covariance of the features on the one part. unseen: (f, f) their second moment on the other part,
    about the means of the first. gram: (f, f) G = VᵀWV, as in `Moments`. All are float64.
    """

    seen: Float[Tensor, "f f"]
    unseen: Float[Tensor, "f f"]
    gram: Float[Tensor, "f f"]
    __repr__ = brief


def held_out_curve(
    fold: Fold, units: int, order: Int[Tensor, " n"], ridges: Sequence[float] = RIDGES
) -> Float[Tensor, "r m"]:
    """T12: the error, on the unseen part, of the refit on the first k units of `order`, for every ridge and every k.

    Put K for the covariance on the seen part, and K + λ = LLᵀ in the order. Let Z = L⁻¹ K' L⁻ᵀ for the second moment
    K' of the unseen part about the means of the seen one. The refit on the first k units, with intercept and with a
    ridge towards the original weights, has on the unseen part the mean squared error

        e'(k) = Σ_{i,j > k·p} (VL)_i·(VL)_j Z_ij,

    with the weighted inner product of the columns of VL. All k cost one factorisation and one product. At λ = ∞ nothing
    is refitted but the intercept, and L = 1. The proof is in docs/theory.md.

    order: (n,) int64, every unit once. ridges: multiples λ of the mean diagonal of K, above zero.

    Returns (ridges, n+1) float64, in the units of tr(GK'). Raises InputError for a ridge that is not positive, and for
    an indefinite covariance.
    """
    curve = _curves(fold, units, order)
    return torch.stack([curve(ridge) for ridge in ridges])


def least_held_out(
    folds: Sequence[Fold], units: int, orders: Sequence[Int[Tensor, " n"]], ridges: Sequence[float] = RIDGES
) -> Float[Tensor, " m"]:
    """The mean of `held_out_curve` over the folds, at the ridge that is best for each k, (n+1,).

    orders: one for each fold. ridges: ascending. As a function of the ridge the error falls and then rises, so they are
    tried from the middle on, each way until one gains less than a thousandth at every k.
    """
    curves = [_curves(fold, units, order) for fold, order in zip(folds, orders, strict=True)]

    def mean(ridge: float) -> Tensor:
        return torch.stack([curve(ridge) for curve in curves]).mean(dim=0)

    middle = len(ridges) // 2
    best = mean(ridges[middle])
    for way in (ridges[middle + 1 :], ridges[:middle][::-1]):
        for ridge in way:
            found = mean(ridge)
            gained = bool((found < (1 - _GAIN) * best).any())
            best = torch.minimum(best, found)
            if not gained:
                break
    return best


def _curves(fold: Fold, units: int, order: Tensor) -> Callable[[float], Tensor]:
    """The function from a ridge to its curve. What all ridges have in common is computed once."""
    p = fold.seen.shape[0] // units
    keep = features(order, p)
    seen, unseen, gram = (matrix[keep[:, None], keep] for matrix in (fold.seen, fold.unseen, fold.gram))
    scale = float(seen.diagonal().mean())
    scale = scale if scale > 0 else 1.0
    root, half = root_of(gram), _lower(unseen)

    def curve(ridge: float) -> Tensor:
        if not ridge > 0:
            raise InputError(f"a ridge of a held-out curve must be above zero, not {ridge}.")
        factor = None
        if math.isfinite(ridge):
            system = seen.clone()
            system.diagonal().add_(ridge * scale)
            factor = cholesky(system)
        return _tails(root, half, factor)[::p].clamp_min(0)

    return curve


def _lower(second: Float[Tensor, "f f"]) -> Float[Tensor, "f r"]:
    """U with UUᵀ = K', its columns zero above the diagonal. r is the rank of K'."""
    lower = lower_root(second)
    return (
        lower
        if lower is not None
        else torch.linalg.qr(root_of(second, "a second moment of the features"), mode="r").R.mT
    )


def _tails(
    root: Float[Tensor, "J f"], half: Float[Tensor, "f r"], factor: Float[Tensor, "f f"] | None
) -> Float[Tensor, " m"]:
    """e'(k) for p = 1 and k = 0..f, from V, U and L; L = 1 where it is None. In blocks of features, from the last on.

    With C = VL and D = L⁻¹U, Z = DDᵀ and e'(k) = ‖X_k‖², X_k = Σ_{i>k} C_i D_i, for the columns C_i and the rows D_i. A
    row of D ends at the diagonal, so that X_k is needed only up to there.
    """
    f, r = half.shape
    starts = range(0, f, _BLOCK)
    d = half if factor is None else torch.zeros_like(half)
    if factor is not None:
        for s in range(0, r, _BLOCK):
            d[s:, s : s + _BLOCK] = torch.linalg.solve_triangular(factor[s:, s:], half[s:, s : s + _BLOCK], upper=False)
    x = root.new_zeros(root.shape[0], r)
    steps = root.new_zeros(f + 1)
    for s in reversed(starts):
        e = min(s + _BLOCK, f)
        c = root[:, s:e] if factor is None else root[:, s:] @ factor[s:, s:e]
        rows, seen = d[s:e, :e], x[:, :e]
        product = (c.mT @ c) * (rows @ rows.mT)
        # The sum over the lower right corner from feature i on grows by one diagonal entry and one row at a time.
        steps[s:e] = product.diagonal() + 2 * product.triu(1).sum(dim=1) + 2 * ((c.mT @ seen) * rows).sum(dim=1)
        seen.addmm_(c, rows)
    return steps.flip(0).cumsum(0).flip(0)
