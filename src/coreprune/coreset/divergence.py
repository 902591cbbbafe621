"""What changes of logits do to the probabilities that are made of them."""

from __future__ import annotations

import torch

from coreprune._shapes import Float, Tensor


def divergence_noise(logits: Float[Tensor, "m v"], normal: Float[Tensor, "m v"]) -> Float[Tensor, "m v"]:
    """T21: noise whose covariance is, row by row, the curvature F = diag(p) − ppᵀ of the divergence at p = softmax(z).

    For ξ ~ N(0, I), n = √p∘ξ − p⟨√p, ξ⟩ has the covariance F, so E⟨n, δ⟩² = δᵀFδ, the variance of δ under p.
    Statement and proof are in docs/theory.md.

    logits: (m, v), z. normal: (m, v), ξ. Returns (m, v) in the dtype of `normal`.
    """
    p = logits.softmax(dim=-1).to(normal)
    root = p.sqrt()
    drawn = root.mul_(normal)
    return drawn.sub_(p.mul_(drawn.sum(dim=-1, keepdim=True)))


def kl_divergence(logits: Float[Tensor, "m v"], other: Float[Tensor, "m v"]) -> Float[Tensor, " m"]:
    """KL(softmax(z) ‖ softmax(z′)), row by row. logits: (m, v), z. other: (m, v), z′. In their dtype."""
    wanted = logits.log_softmax(dim=-1)
    return (wanted.exp() * (wanted - other.log_softmax(dim=-1))).sum(dim=-1)


def divergence_bounds(
    logits: Float[Tensor, "m v"], change: Float[Tensor, "m v"]
) -> tuple[Float[Tensor, " m"], Float[Tensor, " m"]]:
    """T21: bounds on KL(softmax(z) ‖ softmax(z + δ)), row by row.

    With s² = δᵀFδ and R = max δ − min δ: s²(e^{−R} + R − 1)/R² ≤ KL ≤ min(R, s²(e^R − R − 1)/R²). Both are s²/2 near
    R = 0. Statement and proof are in docs/theory.md.

    logits: (m, v), z. change: (m, v), δ. Both float64; so are the bounds.
    """
    spread = change.amax(dim=-1) - change.amin(dim=-1)
    variance = variance_under(logits, change)
    # fmin: e^R overflows from R = 710 on, and 0·∞ is NaN.
    return variance * _curve(-spread), torch.fmin(variance * _curve(spread), spread)


def variance_under(logits: Float[Tensor, "m v"], values: Float[Tensor, "m v"]) -> Float[Tensor, " m"]:
    """δᵀFδ, row by row: the variance of the values δ under softmax(z). logits: (m, v). values: (m, v), δ."""
    p = logits.softmax(dim=-1)
    centred = values - (p * values).sum(dim=-1, keepdim=True)
    return (p * centred.square()).sum(dim=-1)


def _curve(t: Tensor) -> Tensor:
    """(e^t − t − 1)/t², which is ½ + t/6 + t²/24 + … near 0."""
    near = t.abs() < 1e-2
    series = 0.5 + t / 6 + t.square() / 24 + t.pow(3) / 120 + t.pow(4) / 720
    far = torch.where(near, 1.0, t)
    return torch.where(near, series, (torch.expm1(far) - far) / far.square())
