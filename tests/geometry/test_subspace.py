"""Span, and the rank decision."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from coreprune.errors import InputError
from coreprune.geometry import span
from coreprune.geometry.subspace import coordinates


@given(
    n=st.integers(1, 30),
    d=st.integers(1, 30),
    rank=st.integers(0, 30),
    seed=st.integers(0, 10**6),
    spread=st.floats(0, 8),
)
def test_span_factors_the_points(n, d, rank, seed, spread):
    rank = min(n, d, rank)
    rng = np.random.default_rng(seed)
    scale = 10.0 ** rng.uniform(-spread, spread, d)
    points = torch.from_numpy(rng.standard_normal((n, rank)) @ rng.standard_normal((rank, d)) * scale)
    s = span(points)
    assert s.rank == rank
    assert torch.allclose(s.coordinates.T @ s.coordinates, torch.eye(rank, dtype=torch.float64), atol=1e-12)
    assert torch.allclose(s.basis.T @ s.basis, torch.eye(rank, dtype=torch.float64), atol=1e-12)
    back = s.coordinates * s.singular_values @ s.basis.T
    assert torch.allclose(back, points / s.scale, atol=1e-12)
    assert bool((s.singular_values.diff() <= 0).all())
    # What was cut is rounding, so the whitening maps the points to their coordinates up to the conditioning.
    if rank:
        slack = 1e-13 * float(s.singular_values[0] / s.singular_values[-1])
        assert torch.allclose(points @ s.whitening, s.coordinates, atol=max(slack, 1e-12))


def test_units_are_not_rounding():
    """Without equilibration a column in other units would be cut, and the ellipsoid would lose a dimension."""
    points = torch.from_numpy(np.random.default_rng(0).standard_normal((50, 3)))
    points[:, 0] *= 1e-20
    points[:, 2] *= 1e20
    assert span(points).rank == 3


def test_a_direction_below_rounding_is_cut():
    points = torch.from_numpy(np.random.default_rng(0).standard_normal((50, 3)))
    points[:, 2] = points[:, 0] + points[:, 1]
    assert span(points).rank == 2
    points[:, 2] += 1e-12 * torch.arange(50)
    assert span(points).rank == 3


@pytest.mark.parametrize("condition", [1e0, 1e4, 1e6, 1e12])
@pytest.mark.parametrize("shape", [(40, 6), (6, 6), (4, 6)])
def test_fast_and_careful_coordinates_agree(shape, condition):
    rng = np.random.default_rng(0)
    a = torch.from_numpy(rng.standard_normal(shape) @ np.linalg.qr(rng.standard_normal((6, 6)))[0])
    u, s, vt = torch.linalg.svd(a, full_matrices=False)
    a = u * torch.logspace(0, -np.log10(condition), len(s), dtype=torch.float64) @ vt
    u, base = coordinates(a)
    assert torch.allclose(a @ base, u, atol=1e-15 * condition + 1e-10)
    assert torch.allclose(u.T @ u, torch.eye(u.shape[1], dtype=torch.float64), atol=1e-5)


def test_empty_span():
    s = span(torch.zeros(4, 3))
    assert s.rank == 0
    assert s.coordinates.shape == (4, 0)
    assert s.whitening.shape == (3, 0)


def test_non_finite_points_name_the_row():
    points = torch.zeros(4, 3)
    points[2, 0] = torch.nan
    with pytest.raises(InputError, match="row 2"):
        span(points)
