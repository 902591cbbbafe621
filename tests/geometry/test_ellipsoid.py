"""The oracle is the optimality conditions, recomputed here without the library, at small sizes in 50 digits."""

from __future__ import annotations

import mpmath
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from coreprune.errors import InputError
from coreprune.geometry import Ellipsoid, mvee
from coreprune.geometry.ellipsoid import _certify, _Frame
from coreprune.geometry.subspace import column_scale, coordinates

METHODS = ("interior-point", "wolfe-atwood", "fixed-point")


def cloud(n: int, d: int, seed: int = 0, heavy: bool = False) -> torch.Tensor:
    rng = np.random.default_rng(seed)
    return torch.from_numpy(rng.standard_t(2, (n, d)) if heavy else rng.standard_normal((n, d)))


def lifted(points: torch.Tensor, symmetric: bool) -> torch.Tensor:
    return points if symmetric else torch.cat([points, torch.ones_like(points[:, :1])], dim=1)


def true_gap(points: torch.Tensor, weights: torch.Tensor, symmetric: bool) -> float:
    """max ω / r − 1 by a QR decomposition of the weighted points; for well-conditioned clouds of full rank."""
    p = lifted(points, symmetric)
    _, r = torch.linalg.qr(weights.sqrt()[:, None] * p)
    omega = torch.linalg.solve_triangular(r.T, p.T, upper=False).square().sum(dim=0)
    return float(omega.max()) / p.shape[1] - 1


def exact_gap(points: torch.Tensor, weights: torch.Tensor, symmetric: bool) -> float:
    """The same in 50 digits, for any conditioning."""
    with mpmath.workdps(50):
        p = mpmath.matrix(lifted(points, symmetric).tolist())
        u = weights.tolist()
        n, d = p.rows, p.cols
        moment = mpmath.matrix(d, d)
        for i in range(n):
            if u[i]:
                moment += mpmath.mpf(u[i]) * p[i, :].T * p[i, :]
        moment /= mpmath.fsum(u)
        inverse = moment**-1
        return float(max((p[i, :] * inverse * p[i, :].T)[0] for i in range(n)) / d - 1)


def check(e: Ellipsoid, points: torch.Tensor, symmetric: bool, tol: float) -> None:
    """What every converged result must satisfy, whatever the cloud."""
    n, d = points.shape
    assert e.status.converged, e.status.message
    assert 0 <= e.gap <= tol
    assert e.weights.shape == e.distances.shape == (n,)
    assert e.shape.shape == (d, d)
    assert e.whitening.shape == (d, e.rank)
    assert bool((e.weights >= 0).all())
    assert float(e.weights.sum()) == pytest.approx(1)
    assert torch.equal(e.support, torch.nonzero(e.weights)[:, 0])
    assert float(e.distances.max()) <= e.radius_squared
    if symmetric:
        assert e.radius_squared == pytest.approx((1 + e.gap) * e.rank)
        assert not bool(e.center.any())
    else:
        assert e.radius_squared == pytest.approx(e.rank + e.gap * (e.rank + 1))
    moved = points - e.center
    assert torch.allclose(e.shape, moved.T @ (e.weights[:, None] * moved), rtol=1e-8, atol=1e-300)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("n", "d"), [(8, 5), (60, 5), (90, 30), (700, 4)])
def test_every_method_meets_the_tolerance(n, d, method, symmetric):
    points = cloud(n, d)
    e = mvee(points, symmetric, 1e-2, method=method)
    check(e, points, symmetric, 1e-2)
    assert true_gap(points, e.weights, symmetric) == pytest.approx(e.gap, abs=1e-9)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("method", ["interior-point", "wolfe-atwood"])
@pytest.mark.parametrize("heavy", [False, True])
@pytest.mark.parametrize(("n", "d"), [(60, 5), (90, 30), (700, 4)])
def test_tight_tolerances(n, d, heavy, method, symmetric):
    points = cloud(n, d, heavy=heavy)
    e = mvee(points, symmetric, 1e-7, method=method)
    check(e, points, symmetric, 1e-7)
    assert true_gap(points, e.weights, symmetric) <= e.gap <= 1e-7


@pytest.mark.parametrize("symmetric", [True, False])
def test_methods_agree_on_the_ellipsoid(symmetric):
    """The shape is unique even where the weights are not."""
    points = cloud(200, 6)
    shapes = [mvee(points, symmetric, tol, method=m).shape for m, tol in zip(METHODS, (1e-9, 1e-9, 1e-4), strict=True)]
    assert torch.allclose(shapes[0], shapes[1], rtol=1e-6, atol=1e-7)
    assert torch.allclose(shapes[0], shapes[2], rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("symmetric", [True, False])
def test_against_cvxpy(symmetric):
    """The primal, solved by somebody else: the largest log det A with ‖A p + b‖ ≤ 1."""
    cp = pytest.importorskip("cvxpy")
    d = 3
    points = cloud(25, d, seed=3)
    a, b = cp.Variable((d, d), PSD=True), cp.Variable(d)
    centre = 0 if symmetric else cp.reshape(b, (1, d), order="C")
    constraints = [cp.norm(points.numpy() @ a + (centre if symmetric else np.ones((25, 1)) @ centre), axis=1) <= 1]
    cp.Problem(cp.Maximize(cp.log_det(a)), constraints).solve(solver="CLARABEL")
    theirs = np.linalg.inv(a.value @ a.value)  # {y: (y−c)ᵀ theirs⁻¹ (y−c) ≤ 1}
    e = mvee(points, symmetric, 1e-9)
    assert np.allclose(e.shape.numpy() * d, theirs, rtol=1e-4, atol=1e-4)
    if not symmetric:
        assert np.allclose(e.center.numpy(), -np.linalg.solve(a.value, b.value), atol=1e-4)


@given(
    n=st.integers(1, 40),
    d=st.integers(1, 8),
    rank=st.integers(1, 8),
    seed=st.integers(0, 10**6),
    symmetric=st.booleans(),
    exponent=st.floats(-8, 8),
)
def test_any_shape_rank_and_scale(n, d, rank, seed, symmetric, exponent):
    rank = min(rank, d)
    rng = np.random.default_rng(seed)
    low = rng.standard_normal((n, rank)) @ rng.standard_normal((rank, d))
    points = torch.from_numpy(low) * 10.0**exponent
    e = mvee(points, symmetric)
    check(e, points, symmetric, 1e-2)
    assert e.rank == min(rank, n if symmetric else n - 1)


@given(seed=st.integers(0, 10**6), symmetric=st.booleans(), shift=st.floats(-1e6, 1e6))
def test_affine_equivariance(seed, symmetric, shift):
    """The ellipsoid of the image is the image of the ellipsoid: the same weights, the same distances."""
    rng = np.random.default_rng(seed)
    points = torch.from_numpy(rng.standard_normal((40, 4)))
    mixing = torch.from_numpy(rng.standard_normal((4, 4)) + 3 * np.eye(4))
    moved = points @ mixing + (0 if symmetric else shift)
    a, b = mvee(points, symmetric, 1e-8), mvee(moved, symmetric, 1e-8)
    assert torch.allclose(a.distances, b.distances, atol=1e-5)
    assert torch.allclose(mixing.T @ a.shape @ mixing, b.shape, rtol=1e-5, atol=1e-5)
    assert torch.allclose(a.center @ mixing + (0 if symmetric else shift), b.center, rtol=1e-9, atol=1e-5)


@pytest.mark.parametrize("symmetric", [True, False])
def test_column_scaling_by_powers_of_two_changes_no_bit(symmetric):
    points = cloud(50, 6)
    scale = torch.tensor([2.0**-27, 2.0**27, 1.0, 2.0**-10, 2.0**3, 2.0**26], dtype=torch.float64)
    a, b = mvee(points, symmetric), mvee(points * scale, symmetric)
    assert torch.equal(a.weights, b.weights)
    assert torch.equal(a.distances, b.distances)


@pytest.mark.parametrize("symmetric", [True, False])
def test_badly_scaled_columns(symmetric):
    scale = torch.logspace(-8, 8, 5, dtype=torch.float64)
    points = cloud(30, 5) * scale
    e = mvee(points, symmetric, 1e-7)
    check(e, points, symmetric, 1e-7)
    assert e.rank == 5
    assert exact_gap(points, e.weights, symmetric) <= e.gap


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("condition", [1e3, 1e6, 1e9, 1e12])
@pytest.mark.parametrize("tol", [1e-2, 1e-7])
def test_the_gap_is_true_however_bad_the_conditioning(condition, tol, symmetric):
    """Hidden in a rotation, bad scaling cannot be undone: the result is certified truthfully or not at all."""
    rng = np.random.default_rng(1)
    mixing = np.linalg.qr(rng.standard_normal((5, 5)))[0] * np.geomspace(1 / condition, 1, 5)
    points = torch.from_numpy(rng.standard_normal((30, 5)) @ mixing.T @ np.linalg.qr(rng.standard_normal((5, 5)))[0])
    e = mvee(points, symmetric, tol)
    assert e.rank == 5
    assert exact_gap(points, e.weights, symmetric) <= e.gap
    assert e.status.converged == (e.gap <= tol)
    if 1e-13 * condition <= tol:
        assert e.status.converged, e.status.message


@pytest.mark.parametrize("symmetric", [True, False])
def test_permutation(symmetric):
    points = cloud(80, 5)
    order = torch.randperm(80, generator=torch.Generator().manual_seed(1))
    a, b = mvee(points, symmetric, 1e-9), mvee(points[order], symmetric, 1e-9)
    assert torch.allclose(a.shape, b.shape, rtol=1e-6, atol=1e-8)
    assert torch.allclose(a.distances[order], b.distances, atol=1e-5)


@pytest.mark.parametrize("method", ["interior-point", "wolfe-atwood"])
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_duplicates_and_antipodal_duplicates(method, sign):
    points = cloud(40, 5)
    twice = torch.cat([points, sign * points, points])
    a, b = mvee(points, tol=1e-8, method=method), mvee(twice, tol=1e-8, method=method)
    check(b, twice, True, 1e-8)
    assert torch.allclose(a.shape, b.shape, rtol=1e-5, atol=1e-6)


def test_duplicates_in_a_general_cloud():
    points = cloud(40, 5)
    a, b = mvee(points, False, 1e-8), mvee(points.repeat(3, 1), False, 1e-8)
    assert torch.allclose(a.shape, b.shape, rtol=1e-5, atol=1e-6)
    assert torch.allclose(a.center, b.center, atol=1e-6)


def test_an_antipodal_cloud_has_its_general_ellipsoid_at_the_origin():
    points = cloud(40, 4)
    both = torch.cat([points, -points])
    general, centred = mvee(both, False, 1e-9), mvee(points, True, 1e-9)
    assert float(general.center.abs().max()) < 1e-4
    assert torch.allclose(general.shape, centred.shape, rtol=1e-3, atol=1e-4)


def test_many_copies_of_few_directions():
    """The working set must not starve a direction that all other points are orthogonal to."""
    axes = torch.eye(3, dtype=torch.float64)
    points = torch.cat([axes[0].repeat(2000, 1), axes[1].repeat(2000, 1) * 0.5, axes[2].repeat(3, 1) * 7])
    e = mvee(points, tol=1e-6)
    check(e, points, True, 1e-6)
    assert torch.allclose(e.shape, torch.diag(torch.tensor([1.0, 0.25, 49.0], dtype=torch.float64)) / 3, atol=1e-4)


def test_zero_rows_carry_no_weight():
    points = cloud(30, 4)
    padded = torch.cat([torch.zeros(5, 4, dtype=torch.float64), points])
    a, b = mvee(points, tol=1e-6), mvee(padded, tol=1e-6)
    check(b, padded, True, 1e-6)
    assert not bool(b.weights[:5].any())
    assert not bool(b.distances[:5].any())
    assert torch.allclose(a.shape, b.shape, rtol=1e-5, atol=1e-6)


def test_all_zero_rows():
    e = mvee(torch.zeros(4, 3))
    assert (e.rank, e.gap, e.radius_squared, len(e.support)) == (0, 0.0, 0.0, 0)
    assert e.status.converged
    assert not bool(e.weights.any())


@pytest.mark.parametrize("offset", [0.1, 1e-9, 12345.678, 1e8])
def test_identical_points_are_a_point(offset):
    e = mvee(torch.full((7, 3), offset, dtype=torch.float64), symmetric=False)
    assert (e.rank, e.gap, e.radius_squared) == (0, 0.0, 0.0)
    assert torch.equal(e.center, torch.full((3,), offset, dtype=torch.float64))


def test_one_point():
    point = torch.tensor([[3.0, 4.0]])
    e = mvee(point)
    check(e, point.double(), True, 1e-2)
    assert e.rank == 1
    assert e.weights.tolist() == [1.0]
    assert e.distances.tolist() == pytest.approx([1.0])


def test_one_dimension():
    points = torch.tensor([[1.0], [-3.0], [2.0]], dtype=torch.float64)
    e = mvee(points)
    assert e.weights.tolist() == [0, 1, 0]
    assert float(e.shape) == pytest.approx(9)
    g = mvee(points, symmetric=False, tol=1e-9)
    assert float(g.center) == pytest.approx(-0.5)
    assert float(g.shape) * g.radius_squared == pytest.approx(2.5**2)


@pytest.mark.parametrize("n", [1, 3, 6])
def test_independent_points_have_equal_weights(n):
    """n ≤ r: every ω is n exactly, whatever the points."""
    points = cloud(n, 6)
    e = mvee(points, tol=1e-9)
    check(e, points, True, 1e-9)
    assert torch.allclose(e.weights, torch.full((n,), 1.0 / n, dtype=torch.float64))
    assert e.iterations == 0


def test_simplex_in_general_position():
    points = cloud(6, 5)
    e = mvee(points, symmetric=False, tol=1e-9)
    check(e, points, False, 1e-9)
    assert torch.allclose(e.center, points.mean(dim=0))


def test_a_cloud_far_from_the_origin():
    points = cloud(50, 3) + 1e7
    e = mvee(points, symmetric=False, tol=1e-6)
    check(e, points, False, 1e-6)
    assert e.rank == 3


def test_a_flat_cloud_far_from_the_origin_stays_flat():
    """Rounding the offset points is not a dimension."""
    rng = np.random.default_rng(0)
    flat = torch.from_numpy(rng.standard_normal((50, 2)) @ rng.standard_normal((2, 5))) + 1e6
    assert mvee(flat, symmetric=False).rank == 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.int64])
def test_other_dtypes(dtype):
    points = (cloud(40, 4) * 10).to(dtype)
    e = mvee(points)
    assert e.shape.dtype == torch.float64
    check(e, points.double(), True, 1e-2)


def test_gradients_are_not_tracked():
    assert not mvee(cloud(20, 3).requires_grad_()).shape.requires_grad


@pytest.mark.parametrize("method", METHODS)
def test_not_converged_says_what_to_do(method):
    points = cloud(200, 5)
    e = mvee(points, tol=1e-6, max_iter=1, method=method)
    assert not e.status.converged
    assert e.gap > 1e-6
    assert "raise max_iter above 1" in e.status.message
    assert str(e.status) == e.status.message
    assert true_gap(points, e.weights, True) <= e.gap
    assert float(e.distances.max()) <= e.radius_squared


def test_an_impossible_tolerance_is_not_claimed():
    e = mvee(cloud(100, 5), tol=1e-16)
    assert not e.status.converged
    assert 0 < e.gap < 1e-6
    assert "raise tol" in e.status.message


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_non_finite_points_name_the_row(bad):
    points = cloud(9, 3)
    points[4, 1] = bad
    with pytest.raises(InputError, match="row 4"):
        mvee(points)


@pytest.mark.parametrize("size", [1e200, 1e-200])
def test_points_whose_squares_leave_float64(size):
    points = cloud(9, 3)
    points[:, 1] *= size
    with pytest.raises(InputError, match="column 1"):
        mvee(points)


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"method": "simplex"}, "auto, interior-point, wolfe-atwood, fixed-point"),
        ({"tol": 0.0}, "tol must be"),
        ({"tol": -1.0}, "tol must be"),
        ({"tol": float("nan")}, "tol must be"),
        ({"max_iter": 0}, "max_iter must be"),
    ],
)
def test_bad_arguments(keywords, message):
    with pytest.raises(InputError, match=message):
        mvee(cloud(9, 3), **keywords)


@pytest.mark.parametrize("points", [torch.zeros(3), torch.zeros(0, 3), torch.zeros(3, 0), torch.eye(2).bool()])
def test_no_matrix_of_numbers(unchecked, points):
    with pytest.raises(InputError, match="points"):
        mvee(points)


@pytest.mark.parametrize("method", METHODS)
def test_a_grid_of_few_directions(method):
    """Regression: the points with the largest ω were copies of one, and Wolfe-Atwood died on their singular moment."""
    points = torch.from_numpy(np.random.default_rng(4).integers(-1, 2, (83, 2))).double()
    e = mvee(points, tol=1e-3, method=method)
    check(e, points, True, 1e-3)
    assert torch.allclose(e.shape, torch.eye(2, dtype=torch.float64), atol=1e-2)


def test_a_column_of_rounding_takes_no_other_column_with_it():
    """Regression: with one noise level for all, a jitter in the last bit of one column cut the cloud to a point."""
    points = cloud(40, 3)
    points[:, 2] = 1 + 2.0**-52 * torch.randint(0, 2, (40,), generator=torch.Generator().manual_seed(0))
    e = mvee(points, symmetric=False, tol=1e-6)
    flat = mvee(points[:, :2], symmetric=False, tol=1e-6)
    assert e.rank >= 2
    assert float(e.distances.max()) <= e.radius_squared
    assert torch.allclose(e.shape[:2, :2], flat.shape, rtol=0.5)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(
    ("condition", "careless"), [(1e3, True), (1e7, True), (1e7, False), (1e11, False), (1e13, False)]
)
def test_the_certificate_bounds_its_own_rounding(condition, careless, symmetric):
    """Any weights, any basis: a badly chosen one may cost sharpness, never truth.

    Uniform weights have one largest ω, so that rounding pushes it down as often as up.
    """
    for seed in range(12):
        rng = np.random.default_rng(seed)
        left, right = (np.linalg.qr(rng.standard_normal((3, 3)))[0] for _ in range(2))
        points = torch.from_numpy(rng.standard_normal((10, 3)) @ (left * np.geomspace(1 / condition, 1, 3)) @ right)
        origin = torch.zeros(3, dtype=torch.float64) if symmetric else points[0]
        local = points - origin
        scale = column_scale(local)
        base = torch.eye(3, dtype=torch.float64) if careless else coordinates(local / scale)[1]
        weights = torch.full((10,), 0.1, dtype=torch.float64)
        gap = _certify(_Frame(origin, local, scale, base), weights, symmetric)[-1]
        truth = exact_gap(points, weights, symmetric)
        assert truth <= gap
        if condition <= 1e7 and not careless:
            assert gap == pytest.approx(truth, abs=1e-5)  # and it is still worth something
