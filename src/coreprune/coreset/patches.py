"""Convolutions whose patches have too many features: what the error of a map between channels is over whole patches."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from coreprune._shapes import Float, Int, Tensor
from coreprune._shown import brief
from coreprune.coreset._readers import cholesky, others


@dataclass(frozen=True)
class Patches:
    """Some patches, as a convolution reads them, less the means of their channels.

    rows: (m, c, t): c channels at t kernel taps. weight: (J, c, t), V. worth: (J, J), W: what errors of the outputs
    count.
    """

    rows: Float[Tensor, "m c t"]
    weight: Float[Tensor, "J c t"]
    worth: Float[Tensor, "J J"]
    __repr__ = brief


def map_errors(
    patches: Patches, covariance: Float[Tensor, "c c"], kept: Int[Tensor, " k"], ridge: float
) -> tuple[float, float]:
    """T14: the error of a map between channels, over whole patches and as the sum over single taps; float64.

    M (c, k) is the ridge regression of all channels on the kept ones, from the covariance of the channels over all
    taps. With M at every tap, a patch x has the residual r_t = x_t − M x_t,kept, and the outputs have the error
    Σ_t V_t r_t. The first number is its weighted variance over the patches, tr(W Cov(Σ_t V_t r_t)). The weights
    V_t M are one choice of the weights on the kept channels, so no least-squares refit on these patches, with
    intercept, has a larger error. The second number, Σ_t tr(W Cov(V_t r_t)), is what the moments of channels know.
    It is not a bound: the residuals of neighbouring taps are alike, and Var(Σ_t z_t) may be up to t times Σ_t Var(z_t).

    covariance: (c, c). kept: int64. ridge: λ as a multiple of the mean diagonal of the covariance. Raises InputError
    for an indefinite covariance, and for a `kept` that names no channels or one twice.
    """
    x = patches.rows.double()
    rest = others(x.shape[1], kept)
    if kept.numel():
        system = covariance[kept[:, None], kept].clone()
        system.diagonal().add_(ridge * (float(covariance.diagonal().mean()) or 1.0))
        into = torch.cholesky_solve(covariance[kept[:, None], rest], cholesky(system)).mT
        residual = x[:, rest] - torch.einsum("rk,mkt->mrt", into, x[:, kept])
    else:
        residual = x[:, rest]
    by_tap = torch.einsum("jrt,mrt->tmj", patches.weight.double()[:, rest], residual)
    return _size(by_tap.sum(dim=0), patches.worth), sum(_size(tap, patches.worth) for tap in by_tap)


def _size(errors: Float[Tensor, "m J"], worth: Float[Tensor, "J J"]) -> float:
    """The weighted variance."""
    centred = errors - errors.mean(dim=0)
    return float(((centred @ worth.double()) * centred).sum() / len(errors))
