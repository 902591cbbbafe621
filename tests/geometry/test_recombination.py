"""Recombination keeps every combination, its signs and its total, with few points."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from coreprune.errors import InputError
from coreprune.geometry import recombine


def cloud(n: int, d: int, seed: int, low_rank: bool = False) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    points = torch.randn(n, d, generator=g, dtype=torch.float64)
    return points[:, :1] @ torch.randn(1, d, generator=g, dtype=torch.float64) if low_rank else points


@given(n=st.integers(1, 40), d=st.integers(1, 8), t=st.integers(1, 4), seed=st.integers(0, 10**6), low=st.booleans())
@settings(max_examples=60)
def test_general_combinations(n, d, t, seed, low):
    points = cloud(n, d, seed, low)
    weights = torch.rand(t, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    weights[:, ::3] = 0  # points that are not in use may not enter
    found = recombine(points, weights)
    assert torch.allclose(found @ points, weights @ points, atol=1e-8 * float(points.abs().max()) * n)
    assert torch.allclose(found.sum(dim=1), weights.sum(dim=1), atol=1e-8 * n)
    assert bool((found >= 0).all())
    assert bool((found[weights == 0] == 0).all())
    rank = 1 if low else min(d, n)
    assert int((found != 0).sum(dim=1).max()) <= rank + 1


@given(n=st.integers(1, 40), d=st.integers(1, 8), seed=st.integers(0, 10**6), low=st.booleans())
@settings(max_examples=60)
def test_signed_combinations(n, d, seed, low):
    points = cloud(n, d, seed, low)
    weights = torch.randn(3, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    found = recombine(points, weights, symmetric=True)
    assert torch.allclose(found @ points, weights @ points, atol=1e-8 * float(points.abs().max()) * n)
    assert bool((found.abs().sum(dim=1) <= weights.abs().sum(dim=1) * (1 + 1e-9)).all())
    assert bool((found * weights >= 0).all())
    assert int((found != 0).sum(dim=1).max()) <= (1 if low else min(d, n))


def test_hundreds_of_points_in_hundreds_of_dimensions_stay_exact():
    points = cloud(260, 120, 0)
    weights = torch.randn(4, 260, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    found = recombine(points, weights, symmetric=True)
    assert float((found @ points - weights @ points).abs().max()) < 1e-8
    assert int((found != 0).sum(dim=1).max()) <= 120


def test_duplicates_and_zero_weights():
    points = torch.ones(5, 2, dtype=torch.float64)
    weights = torch.zeros(2, 5, dtype=torch.float64)
    weights[1] = 0.2
    found = recombine(points, weights)
    assert found[0].tolist() == [0.0] * 5
    assert int((found[1] != 0).sum()) == 1


@pytest.mark.parametrize(
    ("weights", "kwargs", "message"),
    [(torch.ones(1, 3), {}, "one column per point"), (-torch.ones(1, 4), {}, "symmetric=True")],
)
def test_wrong_input_is_explained(unchecked, weights, kwargs, message):
    with pytest.raises(InputError, match=message):
        recombine(cloud(4, 2, 0), weights, **kwargs)
