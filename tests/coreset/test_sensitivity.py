"""T4, T5, T7: sensitivities against exact linear programs in primal form."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from coreprune.coreset import linf_coreset, peel, relative_limit, sampling_bound, sensitivities, spectral_ridge
from coreprune.errors import InputError
from oracles import sensitivity_lp


def cloud(n: int, d: int, seed: int) -> torch.Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def exact(points: torch.Tensor, one_sided: bool = False) -> torch.Tensor:
    return torch.tensor([sensitivity_lp(points, i, one_sided) for i in range(len(points))], dtype=torch.float64)


@pytest.mark.parametrize("one_sided", [False, True])
def test_exact_method_equals_the_primal_program(one_sided):
    points = cloud(14, 3, 0)
    found = sensitivities(points, method="exact", one_sided=one_sided)
    assert torch.allclose(found.bounds, exact(points, one_sided), atol=1e-7)


@pytest.mark.parametrize("one_sided", [False, True])
@pytest.mark.parametrize("variant", ["contact", "axes"])
@pytest.mark.parametrize("tight", [False, True])
@given(n=st.integers(1, 36), d=st.integers(1, 4), seed=st.integers(0, 10**6), zeros=st.booleans())
@settings(max_examples=8)
def test_peeling_bounds_the_exact_sensitivity(one_sided, variant, tight, n, d, seed, zeros):
    points = cloud(n, d, seed) * torch.logspace(-2, 2, n, dtype=torch.float64)[:, None]
    if zeros:
        points[0] = 0
    found = sensitivities(points, method="peeling", one_sided=one_sided, variant=variant, tight=tight)
    if zeros:
        assert float(found.bounds[0]) == 0
        points, bounds = points[1:], found.bounds[1:]
    else:
        bounds = found.bounds
    if len(points):
        assert bool((bounds >= exact(points, one_sided) - 1e-6).all())
    assert float(found.bounds.max()) <= 1.0


def test_the_papers_bound_takes_the_worst_factor_so_far():
    """min(1, α/l) with α of all rounds up to l: factors fall towards the end, where few points are left."""
    points = cloud(40, 3, 0)
    left, factors = torch.arange(40), []
    wanted = torch.zeros(40, dtype=torch.float64)
    while len(left):
        found = linf_coreset(points[left])
        factors.append(found.factor)
        wanted[left[found.indices]] = min(1.0, max(factors) / len(factors))
        left = left[~torch.isin(torch.arange(len(left)), found.indices)]
    assert any(now < 0.9 * before for before, now in itertools.pairwise(factors))
    assert torch.allclose(peel(points, tight=False).bounds, wanted, rtol=1e-12)


def test_own_factors_sharpen_the_papers_bound():
    """T4′ is never above T4 and strictly below somewhere, else it would not be worth its proof."""
    points = cloud(300, 3, 1)
    plain, tight = peel(points, tight=False), peel(points, tight=True)
    assert bool((tight.bounds <= plain.bounds + 1e-12).all())
    assert tight.total < 0.9 * plain.total
    assert plain.rounds > 5


def test_peeling_tells_the_outliers_from_the_bulk():
    points = cloud(400, 2, 2)
    points[7] *= 30
    found = peel(points)
    assert float(found.bounds[7]) == 1.0
    assert float(found.bounds.median()) < 0.2


@given(n=st.integers(2, 40), d=st.integers(1, 5), seed=st.integers(0, 10**6))
@settings(max_examples=20)
def test_lewis_weights_bound_the_exact_sensitivity_and_sum_to_the_rank(n, d, seed):
    points = cloud(n, d, seed)
    found = sensitivities(points, method="lewis")
    assert found.total == pytest.approx(found.rank, rel=1e-4)
    assert bool((found.bounds >= exact(points) - 1e-4).all())


def test_lewis_refuses_one_sided_because_the_theorem_does():
    """Two opposite points: the two-sided sensitivity is 1/2, the one-sided one is 1, so τ would be no bound."""
    points = torch.tensor([[1.0], [-1.0]])
    assert sensitivities(points, method="lewis").bounds.tolist() == pytest.approx([0.5, 0.5])
    assert sensitivities(points, method="exact", one_sided=True).bounds.tolist() == pytest.approx([1.0, 1.0])
    with pytest.raises(InputError, match="two-sided"):
        sensitivities(points, method="lewis", one_sided=True)


@pytest.mark.parametrize("method", ["exact", "peeling", "lewis"])
def test_t7_independent_points_are_all_fully_sensitive(method):
    points = cloud(6, 9, 3)
    found = sensitivities(points, method=method)
    assert found.bounds.tolist() == pytest.approx([1.0] * 6, abs=1e-6)
    assert found.vacuous
    assert relative_limit(points).independent


@pytest.mark.parametrize("n", [8, 12, 20])
def test_t7_random_one_sided_weights_follow_wendel_with_the_threshold_at_twice_the_dimension(n):
    """s_i = 1 iff some x is positive on a_i alone; by Wendel (1962) with probability 2^(1−n) Σ_{k<d} C(n−1, k)."""
    d, trials = 6, 12
    full = torch.cat([exact(cloud(n, d, 100 * n + t), one_sided=True) > 1 - 1e-6 for t in range(trials)])
    expected = sum(math.comb(n - 1, k) for k in range(d)) / 2 ** (n - 1)
    assert float(full.double().mean()) == pytest.approx(expected, abs=0.12)
    limit = relative_limit(cloud(n, d, 0))
    assert not limit.independent
    assert limit.ratio == n / d


def test_ridge_bounds_its_own_denominator_and_orders_independent_points(gen):
    """sup |⟨a_i,x⟩| / (Σ_k|⟨a_k,x⟩| + L√λ‖x‖), by gradient-free search over many x, never exceeds the bound."""
    points = cloud(12, 20, 6) * torch.logspace(-1, 1, 12, dtype=torch.float64)[:, None]
    ridge = spectral_ridge(points)
    found = peel(points, ridge=ridge)
    x = torch.cat(
        [torch.randn(20, 4000, generator=gen, dtype=torch.float64), points.T, torch.linalg.pinv(points)], dim=1
    )
    response = (points @ x).abs()
    ratio = response / (response.sum(dim=0) + found.rounds * ridge**0.5 * x.norm(dim=0))
    assert bool((ratio.amax(dim=1) <= found.bounds + 1e-9).all())
    assert float(found.importance[-1]) > 2 * float(found.importance[0]), "the ridge form must tell channels apart"
    assert not found.vacuous
    assert peel(points).vacuous


def test_absolute_importances_are_the_suprema(gen):
    points, c = cloud(8, 5, 7), torch.rand(8, generator=gen, dtype=torch.float64)
    x = torch.nn.functional.normalize(torch.randn(5, 20000, generator=gen, dtype=torch.float64), dim=0)
    norm = sensitivities(points, c, "norm").bounds
    reached = c * (points @ x).abs().amax(dim=1)
    assert bool((reached <= norm + 1e-12).all())
    assert bool((reached >= 0.9 * norm).all())
    tanh = sensitivities(points, c, "mussay", activation=torch.tanh, radius=3.0).bounds
    assert torch.allclose(tanh, c * torch.tanh(3 * points.norm(dim=1)))


def test_scaling_all_weights_changes_no_relative_bound():
    points = cloud(60, 3, 8)
    one = sensitivities(points, method="peeling").bounds
    other = sensitivities(points * 1e-7, torch.full((60,), 1e5), method="peeling").bounds
    assert torch.allclose(one, other, rtol=1e-6)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"method": "magic"}, "known: peeling"),
        ({"weights": torch.ones(3)}, "one entry per point"),
        ({"weights": -torch.ones(4)}, "≥ 0"),
        ({"method": "mussay", "radius": 0.0}, "positive"),
        ({"ridge": -1.0}, "ridge"),
        ({"ridge": 1.0, "one_sided": True}, "two-sided"),
    ],
)
def test_wrong_input_is_explained(unchecked, kwargs, message):
    with pytest.raises(InputError, match=message):
        sensitivities(torch.randn(4, 2, generator=torch.Generator().manual_seed(0)), **kwargs)


def test_a_sensitivity_is_no_share_of_a_single_output():
    """Two equal channels with V_1 = (1, 0.01) and V_2 = (0.01, 1): s = ½ each, and 99 % of output 1 is the first's."""
    points = torch.tensor([[0.6, 0.8], [0.6, 0.8]], dtype=torch.float64)
    outgoing = torch.tensor([[1.0, 0.01], [0.01, 1.0]], dtype=torch.float64)
    c = outgoing.abs().amax(dim=0)
    for method, more in (("exact", {}), ("lewis", {}), ("cone", {"nonnegative": torch.ones(2, dtype=torch.bool)})):
        assert sensitivities(points, c, method, **more).bounds.tolist() == pytest.approx([0.5, 0.5], rel=1e-3)
    x = torch.tensor([0.6, 0.8], dtype=torch.float64)
    shares = outgoing * torch.relu(points @ x) / (outgoing @ torch.relu(points @ x))[:, None]
    assert shares[0].tolist() == pytest.approx([1 / 1.01, 0.01 / 1.01])
    # T6 is one number for all outputs: it says something, and yet exceeds all that a small output can be.
    certificate = sampling_bound(points, torch.cat([outgoing, outgoing / 100]), 10**6)
    most = float((outgoing.abs() / 100 @ points.norm(dim=1)).max())
    assert most < certificate.bound < certificate.trivial
