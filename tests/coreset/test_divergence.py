"""T21: what changes of logits do to a softmax. The oracle is the divergence itself, with 50 digits."""

from __future__ import annotations

import mpmath
import numpy as np
import pytest
import torch

from coreprune.coreset import divergence_bounds, divergence_noise, variance_under

mpmath.mp.dps = 50


def divergence(z, d):
    """KL(softmax(z) ‖ softmax(z + δ)) of one row, by its definition."""
    z, w = (
        [mpmath.mpf(float(v)) for v in z],
        [mpmath.mpf(float(v)) + mpmath.mpf(float(c)) for v, c in zip(z, d, strict=True)],
    )
    first, second = (mpmath.fsum(mpmath.exp(v) for v in row) for row in (z, w))
    return mpmath.fsum(
        mpmath.exp(a) / first * (a - mpmath.log(first) - b + mpmath.log(second)) for a, b in zip(z, w, strict=True)
    )


def rows(seed, m=6, v=7, sharp=3.0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(m, v, generator=g, dtype=torch.float64) * sharp, torch.randn(
        m, v, generator=g, dtype=torch.float64
    )


def test_the_noise_has_exactly_the_curvature_as_its_covariance():
    z, _ = rows(0, m=1)
    every = torch.eye(7, dtype=torch.float64)
    linear = torch.stack([divergence_noise(z, unit[None])[0] for unit in every], dim=1)  # what it does to ξ
    p = np.exp(z[0].numpy() - z[0].numpy().max())
    p /= p.sum()
    assert np.allclose((linear @ linear.T).numpy(), np.diag(p) - np.outer(p, p), atol=1e-15)


@pytest.mark.parametrize("size", [1e-4, 0.01, 0.3, 2.0, 20.0, 1e4])
@pytest.mark.parametrize("sharp", [0.1, 3.0, 30.0])
def test_no_change_breaks_the_bounds(size, sharp):
    for seed in range(4):
        z, d = rows(seed, sharp=sharp)
        low, high = divergence_bounds(z, size * d)
        for i in range(len(z)):
            found = divergence(z[i], size * d[i])
            assert float(low[i]) * (1 - 1e-9) - 1e-30 <= found <= float(high[i]) * (1 + 1e-9) + 1e-30


def test_an_ascent_does_not_break_them():
    """Logits and changes that make the divergence as large, or as small, as possible beside its bound."""
    for sign in (1, -1):
        z, d = (x.requires_grad_() for x in rows(5, m=4))
        step = torch.optim.Adam([z, d], lr=0.05)
        for _ in range(300):
            p, q = z.log_softmax(-1), (z + d).log_softmax(-1)
            ratio = ((p.exp() * (p - q)).sum(-1) / divergence_bounds(z, d)[0 if sign < 0 else 1]).log()
            step.zero_grad()
            (-sign * ratio.sum()).backward()
            step.step()
            z.data.clamp_(-25, 25)
            d.data.clamp_(-6, 6)
        low, high = divergence_bounds(z.detach(), d.detach())
        for i in range(4):
            found = divergence(z[i].detach(), d[i].detach())
            assert float(low[i]) * (1 - 1e-9) <= found <= float(high[i]) * (1 + 1e-9)


@pytest.mark.parametrize("spread", [0.5, 4.0])
def test_both_bounds_are_reached_in_the_limit_of_a_rare_class(spread):
    rare = torch.tensor([[0.0, -30.0]], dtype=torch.float64)
    for change, which in (([0.0, spread], 1), ([spread, 0.0], 0)):
        d = torch.tensor([change], dtype=torch.float64)
        assert float(divergence_bounds(rare, d)[which]) == pytest.approx(float(divergence(rare[0], d[0])), rel=1e-6)


def test_the_formula_with_many_digits():
    z, d = rows(3)
    d = d * torch.logspace(-8, 1, 6, dtype=torch.float64)[:, None]
    low, high = divergence_bounds(z, d)
    for i in range(len(z)):
        e = [mpmath.exp(mpmath.mpf(float(v))) for v in z[i]]
        p = [v / mpmath.fsum(e) for v in e]
        c = [mpmath.mpf(float(v)) for v in d[i]]
        mean = mpmath.fsum(a * b for a, b in zip(p, c, strict=True))
        variance = mpmath.fsum(a * (b - mean) ** 2 for a, b in zip(p, c, strict=True))
        r = max(c) - min(c)
        assert float(variance_under(z, d)[i]) == pytest.approx(float(variance), rel=1e-9)
        for bound, t in ((low, -r), (high, r)):
            wanted = variance * (mpmath.exp(t) - t - 1) / t**2
            assert float(bound[i]) == pytest.approx(float(min(wanted, r)), rel=1e-9)


def test_no_change_and_a_constant_change_do_nothing():
    z, _ = rows(1)
    for d in (torch.zeros_like(z), torch.full_like(z, 3.0)):
        low, high = divergence_bounds(z, d)
        assert torch.equal(low.abs() < 1e-25, torch.ones(6, dtype=torch.bool))
        assert float(high.abs().max()) < 1e-25
    assert float(divergence_noise(z, torch.ones_like(z)).sum(1).abs().max()) < 1e-14


def test_changes_that_overflow_are_bounded_by_their_spread():
    """A certain class and a change by more than e can be raised to: the second-order bound is 0·∞."""
    z = torch.tensor([[0.0, -2000.0], [0.0, 0.0]], dtype=torch.float64)
    d = torch.tensor([[0.0, 1000.0], [0.0, 1000.0]], dtype=torch.float64)
    low, high = divergence_bounds(z, d)
    for i in range(2):
        assert float(low[i]) - 1e-30 <= divergence(z[i], d[i]) <= float(high[i]) == 1000.0  # 50 digits
