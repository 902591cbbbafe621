"""The solvers on their own, below `mvee`."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from coreprune.geometry import mvee
from coreprune.geometry._solvers.fixed_point import fixed_point
from coreprune.geometry._solvers.interior_point import interior_point
from coreprune.geometry._solvers.solution import leverages
from coreprune.geometry._solvers.wolfe_atwood import wolfe_atwood
from coreprune.geometry._solvers.working_set import support_threshold, working_set

SOLVERS = (interior_point, wolfe_atwood, fixed_point)


def orthonormal(n: int, r: int, seed: int = 0, heavy: bool = False) -> torch.Tensor:
    rng = np.random.default_rng(seed)
    points = rng.standard_t(1.5, (n, r)) if heavy else rng.standard_normal((n, r))
    return torch.linalg.qr(torch.from_numpy(points)).Q


def uniform(n: int) -> torch.Tensor:
    return torch.full((n,), 1.0 / n, dtype=torch.float64)


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("heavy", [False, True])
@pytest.mark.parametrize(("n", "r"), [(5, 2), (50, 10), (300, 6)])
def test_a_solution_is_what_it_says(n, r, heavy, solver):
    u = orthonormal(n, r, heavy=heavy)
    start = uniform(n)
    found = solver(u, 1e-2, 100_000, start)
    assert torch.equal(start, uniform(n))  # solvers never write into their arguments
    assert float(found.weights.sum()) == pytest.approx(1)
    assert bool((found.weights >= 0).all())
    assert torch.allclose(found.leverages, leverages(u, found.weights), rtol=1e-8)
    assert found.gap == pytest.approx(float(found.leverages.max()) / r - 1, abs=1e-8)
    assert found.gap <= 1e-2


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("limit", [1, 2, 7])
def test_iteration_limits_are_kept(limit, solver):
    found = solver(orthonormal(100, 8), 1e-12, limit, uniform(100))
    assert found.iterations <= limit
    assert found.gap > 1e-12


@pytest.mark.parametrize("solver", SOLVERS)
def test_the_gap_is_the_best_one_seen(solver):
    """More iterations never return a worse answer."""
    u = orthonormal(80, 7, heavy=True)
    gaps = [solver(u, 1e-12, limit, uniform(80)).gap for limit in (1, 3, 10, 30)]
    assert gaps == sorted(gaps, reverse=True)


def test_away_steps_drop_points():
    """Without them Frank–Wolfe would never reach a weight of exactly zero."""
    found = wolfe_atwood(orthonormal(100, 3), 1e-9, 100_000, uniform(100))
    assert found.gap <= 1e-9
    assert int((found.weights == 0).sum()) > 50


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(("n", "r"), [(60, 4), (200, 10)])
def test_the_screening_rule_never_drops_a_support_point(n, r, seed):
    """Harman & Pronzato 2007: checked against the support at 1e-10, from designs of every quality."""
    u = orthonormal(n, r, seed, heavy=seed % 2 == 1)
    best = interior_point(u, 1e-10, 500, uniform(n))
    assert best.gap <= 1e-10
    support = best.weights > 1e-5 / n
    dropped = 0
    for steps in (1, 3, 10, 30, 100, 3000):
        design = fixed_point(u, 1e-5, steps, uniform(n))
        out = design.leverages < support_threshold(design.gap, r) * r * (1 - 1e-12)
        assert not bool((out & support).any())
        dropped = int(out.sum())
    assert dropped > 0  # and it does drop some


@pytest.mark.parametrize("r", [2, 5, 300])
@pytest.mark.parametrize("gap", [1e-6, 1e-2, 1.0])
def test_the_screening_threshold_is_the_extreme_eigenvalue(gap, r):
    """Regression: with e = gap instead of r·gap it drops support points, but so rarely that no random test sees it."""
    low = support_threshold(gap, r)
    rest = (r * (1 + gap) - low) / (r - 1)
    assert 0 < low < 1
    assert 1 / low + (r - 1) / rest == pytest.approx(r)


def test_the_screening_threshold_of_the_optimum():
    assert support_threshold(0.0, 5) == 1


@pytest.mark.parametrize("solver", SOLVERS)
def test_a_tall_cloud_needs_nested_working_sets(solver):
    u = orthonormal(6000, 3)
    found = working_set(u, 1e-3, 10_000, uniform(6000), solver)
    assert found.gap <= 1e-3
    assert float(leverages(u, found.weights).max()) <= 3 * (1 + 1.1e-3)


def test_a_working_set_that_does_not_span_grows():
    """The points with the largest ω all lie on one axis; the other directions come from the rest."""
    rng = np.random.default_rng(0)
    line = np.zeros((500, 4))
    line[:, 0] = 1
    rest = rng.standard_normal((60, 4)) * [1e-3, 1, 1, 1]
    u = torch.from_numpy(np.concatenate([line, rest]))
    found = working_set(u, 1e-6, 10_000, uniform(560), interior_point)
    assert found.gap <= 1e-6


def test_wrong_guesses_come_back():
    """Even a working set of the least likely points ends at the right answer."""
    u = orthonormal(3000, 5)
    lies = 5 + 1 / u.square().sum(dim=1)  # the shortest points first
    found = working_set(u, 1e-6, 10_000, uniform(3000), interior_point, omega=lies)
    assert found.gap <= 1e-6
    assert float(leverages(u, found.weights).max()) <= 5 * (1 + 1.1e-6)


def test_auto_leaves_the_newton_matrix_when_it_would_not_fit(monkeypatch):
    from coreprune.geometry import ellipsoid

    monkeypatch.setattr(ellipsoid, "LARGEST_NEWTON", 10)
    points = orthonormal(200, 3)
    assert mvee(points, tol=1e-2).status.converged
    assert mvee(points, tol=1e-6).status.converged
    assert ellipsoid._choose("auto", points.shape, 1e-2) == "fixed-point"
    assert ellipsoid._choose("auto", points.shape, 1e-6) == "wolfe-atwood"


@pytest.mark.slow
@pytest.mark.parametrize("tol", [1e-2, 1e-7])
def test_at_the_size_of_a_layer(tol):
    """512 channels of 64 inputs: the support is most of the points."""
    points = torch.from_numpy(np.random.default_rng(0).standard_normal((512, 64)))
    for symmetric in (True, False):
        e = mvee(points, symmetric, tol)
        assert e.status.converged
        assert e.gap <= tol
        assert e.iterations <= 60
