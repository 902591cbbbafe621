"""Held-out error curves: what a refit on some of the queries makes of queries that it has not seen."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from coreprune._shapes import Float, Int, Tensor
from coreprune.coreset._readers import cholesky, features, root_of
from coreprune.errors import InputError

# Twelve ridges, as multiples of the mean variance; the last stands for no refit at all.
RIDGES: tuple[float, ...] = (*(10.0 ** (exponent / 2) for exponent in range(-8, 3)), math.inf)


@dataclass(frozen=True)
class Fold:
    """The moments of one reader on the queries that a refit sees, and on those that it does not see.

    seen: (f, f) the covariance of the features on the one part. unseen: (f, f) their second moment on the other part,
    about the means of the first. gram: (f, f) G = VᵀWV, as in `Moments`. All are float64.
    """

    seen: Float[Tensor, "f f"]
    unseen: Float[Tensor, "f f"]
    gram: Float[Tensor, "f f"]


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
    keep = features(order, fold.seen.shape[0] // units)
    seen, unseen, gram = (matrix[keep[:, None], keep] for matrix in (fold.seen, fold.unseen, fold.gram))
    scale = float(seen.diagonal().mean())
    scale = scale if scale > 0 else 1.0
    root = root_of(gram)
    curves = []
    for ridge in ridges:
        if not ridge > 0:
            raise InputError(f"a ridge of a held-out curve must be above zero, not {ridge}.")
        loads, inner = root, unseen
        if math.isfinite(ridge):
            system = seen.clone()
            system.diagonal().add_(ridge * scale)
            factor = cholesky(system)
            loads = root @ factor
            inner = torch.linalg.solve_triangular(factor, unseen, upper=False)
            inner = torch.linalg.solve_triangular(factor, inner.mT, upper=False)
        product = (loads.mT @ loads) * inner
        # The sum over the lower right corner from feature k on grows by one diagonal entry and one row at a time.
        steps = product.diagonal() + 2 * product.triu(1).sum(dim=1)
        tails = torch.cat([steps.flip(0).cumsum(0).flip(0), steps.new_zeros(1)])
        curves.append(tails[:: fold.seen.shape[0] // units].clamp_min(0))
    return torch.stack(curves)
