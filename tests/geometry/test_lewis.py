"""Lewis weights and leverage scores: fixed-point equation, sums, invariance, and what they bound."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from coreprune.errors import GeometryError, InputError
from coreprune.geometry import leverage_scores, lewis_weights


def cloud(n: int, d: int, seed: int = 0) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).standard_t(2, (n, d)))


@given(
    n=st.integers(1, 40),
    d=st.integers(1, 6),
    p=st.floats(0.5, 3.5),
    seed=st.integers(0, 10**6),
)
def test_lewis_weights_solve_their_equation(n, d, p, seed):
    points = cloud(n, d, seed)
    tau = lewis_weights(points, p, iterations=500)
    rank = min(n, d)
    assert float(tau.sum()) == pytest.approx(rank)
    assert bool((tau > 0).all())
    assert bool((tau <= 1 + 1e-9).all())
    if n >= d:
        moment = points.T @ (tau.pow(1 - 2 / p)[:, None] * points)
        right = ((points @ torch.linalg.inv(moment)) * points).sum(dim=1).pow(p / 2)
        assert torch.allclose(tau, right, rtol=1e-4, atol=1e-9)


def test_p_two_is_the_leverage_scores():
    points = cloud(50, 6)
    assert torch.allclose(lewis_weights(points, 2.0), leverage_scores(points))


@pytest.mark.parametrize("function", [lewis_weights, leverage_scores])
def test_invariances(function):
    points = cloud(40, 4)
    order = torch.randperm(40, generator=torch.Generator().manual_seed(0))
    mixing = cloud(4, 4, 1) + 4 * torch.eye(4)
    signs = torch.where(torch.arange(40) % 2 == 0, 1.0, -1.0)[:, None]
    reference = function(points)
    assert torch.allclose(function(points[order]), reference[order])
    assert torch.allclose(function(points @ mixing), reference)
    assert torch.allclose(function(points * torch.logspace(-8, 8, 4)), reference)
    assert torch.allclose(function(points * signs), reference)


@pytest.mark.parametrize("function", [lewis_weights, leverage_scores])
def test_zero_rows_and_rank_deficiency(function):
    points = torch.cat([torch.zeros(3, 4, dtype=torch.float64), cloud(20, 2) @ cloud(2, 4)])
    values = function(points)
    assert values.dtype == torch.float64
    assert not bool(values[:3].any())
    assert float(values.sum()) == pytest.approx(2)
    assert not bool(function(torch.zeros(3, 2)).any())


@pytest.mark.parametrize("function", [lewis_weights, leverage_scores])
def test_independent_points_have_weight_one(function):
    assert torch.allclose(function(cloud(4, 6)), torch.ones(4, dtype=torch.float64))


def test_duplicates_share_the_weight_of_their_sum():
    """ℓ1: two copies of a point count like one of twice the length."""
    points = cloud(20, 3)
    longer = points.clone()
    longer[0] *= 2
    twice = lewis_weights(torch.cat([points, points[:1]]))
    once = lewis_weights(longer)
    assert float(twice[0] + twice[-1]) == pytest.approx(float(once[0]))


def test_lewis_weights_bound_the_l1_sensitivities(gen):
    """T5, against random and aligned directions; exact values are checked in the coreset tests."""
    points = cloud(60, 5)
    tau = lewis_weights(points)
    x = torch.cat([torch.randn(5000, 5, generator=gen, dtype=torch.float64), points, torch.linalg.pinv(points).T])
    responses = (x @ points.T).abs()
    share = responses / responses.sum(dim=1, keepdim=True)
    assert bool((share.amax(dim=0) <= tau * (1 + 1e-9)).all())
    assert bool((share.amax(dim=0) >= tau * 0.3).any())


def test_leverage_scores_are_the_exact_l2_sensitivities():
    points = cloud(30, 4)
    x = points @ torch.linalg.inv(points.T @ points)
    share = (x * points).sum(dim=1).square() / (x @ points.T).square().sum(dim=1)
    assert torch.allclose(share, leverage_scores(points))


@pytest.mark.parametrize("p", [0.0, 4.0, -1.0, float("nan")])
def test_p_out_of_range(p):
    with pytest.raises(InputError, match=r"\(0, 4\)"):
        lewis_weights(cloud(5, 2), p)


def test_not_converged_raises():
    with pytest.raises(GeometryError, match="Raise `iterations`"):
        lewis_weights(cloud(50, 4), iterations=2)
    with pytest.raises(InputError, match="iterations"):
        lewis_weights(cloud(50, 4), iterations=0)


def test_non_finite_points_name_the_row():
    points = cloud(9, 3)
    points[5, 1] = torch.nan
    for function in (lewis_weights, leverage_scores):
        with pytest.raises(InputError, match="row 5"):
            function(points)


def test_float32_and_integers():
    assert lewis_weights(cloud(20, 3).float()).dtype == torch.float64
    assert float(lewis_weights((cloud(20, 3) * 10).to(torch.int64)).sum()) == pytest.approx(3)
