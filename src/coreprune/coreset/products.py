"""Products of two activations, such as q·k of attention: which channels stand in for the others."""

from __future__ import annotations

import torch

from coreprune._shapes import Float, Int, Tensor
from coreprune.coreset._readers import cholesky, others


def bilinear_map(covariance: Float[Tensor, "n n"], kept: Int[Tensor, " k"], ridge: float) -> Float[Tensor, "n k"]:
    """T16: N, with which the channels S of a product s_ij = ⟨q_i, k_j⟩ stand in for all: s'_ij = ⟨Nᵀq_i, k_j,S⟩.

    N is the identity on S, and the ridge regression of the other channels of k on those in S. If a softmax over j
    follows, and K is the covariance of k, the mean squared error of s' over independent q and k, up to what the softmax
    does not see, is tr(E[qqᵀ] R_S): that of T10 with q as the weights. No product over k channels has less than the
    floor of T10. Statement and proof are in docs/theory.md.

    covariance: (n, n) float64, K. ridge: λ as a multiple of its mean diagonal; ∞ leaves the others out.
    """
    n = covariance.shape[0]
    rest = others(n, kept)
    found = covariance.new_zeros(n, len(kept))
    found[kept, torch.arange(len(kept), device=kept.device)] = 1.0
    if rest.numel() and kept.numel() and ridge != torch.inf:
        system = covariance[kept[:, None], kept].clone()
        system.diagonal().add_(ridge * (float(covariance.diagonal().mean()) or 1.0))
        found[rest] = torch.cholesky_solve(covariance[kept[:, None], rest], cholesky(system)).mT
    return found
