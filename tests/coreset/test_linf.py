"""T1–T3: the factor of an L∞ coreset, against exact linear programs."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from coreprune.coreset import linf_coreset
from coreprune.errors import InputError
from oracles import linf_lp


def cloud(n: int, d: int, seed: int, scale: float = 0.0, offset: float = 0.0) -> torch.Tensor:
    """Gaussian points, columns scaled by 10^±scale, shifted by `offset` along the first axis."""
    g = torch.Generator().manual_seed(seed)
    points = torch.randn(n, d, generator=g, dtype=torch.float64)
    points[:, 0] += offset
    return points * torch.logspace(-scale, scale, d, dtype=torch.float64)


def exact_factors(points: torch.Tensor, kept: torch.Tensor, one_sided: bool) -> torch.Tensor:
    return torch.tensor([linf_lp(points, kept, i, one_sided) for i in range(len(points))], dtype=torch.float64)


@pytest.mark.parametrize("variant", ["contact", "axes"])
@pytest.mark.parametrize("one_sided", [False, True])
@given(n=st.integers(1, 40), d=st.integers(1, 5), seed=st.integers(0, 10**6), offset=st.sampled_from([0.0, 0.5, 5.0]))
@settings(max_examples=25)
def test_factor_is_never_below_the_exact_worst_case(variant, one_sided, n, d, seed, offset):
    points = cloud(n, d, seed, offset=offset)
    found = linf_coreset(points, variant, one_sided)
    exact = exact_factors(points, found.indices, one_sided)
    assert float(exact.max()) <= found.factor * (1 + 1e-6) + 1e-9
    outside = torch.ones(n, dtype=torch.bool)
    outside[found.indices] = False
    assert bool((exact[outside] <= found.gauge[outside] * (1 + 1e-6)).all())


def test_the_factor_of_the_axes_is_that_of_the_proof():
    """T2: f⟨p, x⟩ ≤ √ω_p √(xᵀMx) ≤ √ω_p √r max_C. Clouds rarely come near, so the formula itself is checked."""
    points = cloud(60, 4, 3)
    a = points.numpy()
    u = np.full(60, 1 / 60)
    for _ in range(4_000):  # Titterington's fixed point of the D-optimal weights
        omega = np.einsum("id,de,ie->i", a, np.linalg.inv(a.T @ (u[:, None] * a)), a)
        u *= omega / 4
    assert omega.max() < 4 * 1.005
    gauge = linf_coreset(points, "axes").gauge
    assert gauge.numpy() == pytest.approx(np.sqrt(4 * omega), rel=5e-3)


@pytest.mark.parametrize(("variant", "power"), [("contact", 0.5), ("axes", 1.0)])
def test_factor_has_the_size_that_the_theorem_gives(variant, power):
    points = cloud(200, 6, 1)
    found = linf_coreset(points, variant)
    assert found.factor <= 6**power * 1.01
    assert found.indices.numel() < 60, "a coreset that keeps nearly all points is no coreset"


@pytest.mark.parametrize("variant", ["contact", "axes"])
def test_symmetric_factor_survives_badly_scaled_columns(variant):
    points = cloud(80, 4, 2, scale=8)
    found = linf_coreset(points, variant)
    assert found.factor <= {"contact": 2.0, "axes": 4.0}[variant] * 1.01
    # The exact programs are solved in unscaled columns: the worst case over x does not depend on them.
    exact = exact_factors(cloud(80, 4, 2), found.indices, one_sided=False)
    assert float(exact.max()) <= found.factor * (1 + 1e-6)


def test_one_sided_needs_the_origin_inside():
    """Points on one side of a hyperplane: no finite factor; a cloud around the origin has one."""
    found = linf_coreset(cloud(50, 3, 3, offset=20.0), one_sided=True)
    assert math.isinf(found.factor)
    finite = linf_coreset(cloud(400, 3, 4), one_sided=True)
    assert math.isfinite(finite.factor)
    assert finite.indices.numel() < 100


def test_independent_points_are_all_kept():
    found = linf_coreset(torch.eye(5, dtype=torch.float64))
    assert found.indices.tolist() == [0, 1, 2, 3, 4]
    assert found.factor == 1.0


@pytest.mark.parametrize("one_sided", [False, True])
def test_zero_rows_duplicates_and_tiny_sets(one_sided):
    assert linf_coreset(torch.zeros(3, 2), one_sided=one_sided).indices.numel() == 0
    single = linf_coreset(torch.tensor([[3.0, 4.0]]), one_sided=one_sided)
    assert single.indices.tolist() == [0]
    assert single.factor == 1.0
    points = cloud(30, 3, 5)
    padded = torch.cat([points, torch.zeros(4, 3, dtype=torch.float64), points])
    found = linf_coreset(padded, one_sided=one_sided)
    assert not set(range(30, 34)) & set(found.indices.tolist())
    assert float(exact_factors(padded, found.indices, one_sided).max()) <= found.factor * (1 + 1e-6)


def test_a_row_lost_in_rounding_is_not_certified():
    """A row 1e-30 times the others has direction of its own: some x sees it alone, so its factor must not be finite."""
    points = torch.cat([cloud(40, 3, 6), torch.zeros(40, 1, dtype=torch.float64)], dim=1)
    points = torch.cat([points, torch.tensor([[0.0, 0.0, 1e-30, 1e-30]], dtype=torch.float64)])
    found = linf_coreset(points)
    exact = linf_lp(points * torch.tensor([1, 1, 1, 1e30]), found.indices, 40, one_sided=False)
    assert 40 in found.indices.tolist() or found.factor >= exact * (1 - 1e-6)


def test_wrong_input_is_named(unchecked):
    with pytest.raises(InputError, match="contact"):
        linf_coreset(torch.ones(3, 2), variant="nearest")  # type: ignore[arg-type]
    bad = torch.ones(4, 2)
    bad[2, 1] = float("nan")
    with pytest.raises(InputError, match="row 2"):
        linf_coreset(bad)
