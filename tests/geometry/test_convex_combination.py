"""Carathéodory: the combination is checked by multiplying it out."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from coreprune.errors import GeometryError, InputError
from coreprune.geometry import Combination, caratheodory, caratheodory_many, mvee


def cloud(n: int, d: int, seed: int = 0) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).standard_normal((n, d)))


def check(c: Combination, points: torch.Tensor, target: torch.Tensor, symmetric: bool, most: int) -> None:
    assert len(c.indices) <= most
    assert c.indices.dtype == torch.int64
    assert bool((c.indices.diff() > 0).all())
    assert bool((c.weights != 0).all())
    if symmetric:
        assert float(c.weights.abs().sum()) <= 1 + 1e-9
    else:
        assert bool((c.weights > 0).all())
        assert float(c.weights.sum()) == pytest.approx(1)
    off = (c.weights @ points[c.indices] - target).abs()
    size = points.abs().amax(dim=0).clamp_min(1e-300)
    assert float((off / size).max()) <= 1e-8
    assert c.residual <= 1e-9


@given(
    n=st.integers(1, 40),
    d=st.integers(1, 6),
    rank=st.integers(1, 6),
    seed=st.integers(0, 10**6),
    symmetric=st.booleans(),
    spread=st.floats(0, 8),
)
def test_any_point_of_the_hull(n, d, rank, seed, symmetric, spread):
    rank = min(rank, d)
    rng = np.random.default_rng(seed)
    low = rng.standard_normal((n, rank)) @ rng.standard_normal((rank, d)) * 10.0 ** rng.uniform(-spread, spread, d)
    points = torch.from_numpy(low)
    w = rng.dirichlet(np.full(n, 0.5))
    if symmetric:
        w *= rng.choice([-1.0, 1.0], n) * rng.uniform(0, 1)
    target = torch.from_numpy(w) @ points
    check(caratheodory(points, target, symmetric=symmetric), points, target, symmetric, rank + 1)
    check(caratheodory(points, target, torch.from_numpy(w), symmetric), points, target, symmetric, rank + 1)


@pytest.mark.parametrize("symmetric", [True, False])
def test_a_vertex_is_itself(symmetric):
    points = cloud(30, 3)
    i = int(points.norm(dim=1).argmax())
    c = caratheodory(points, points[i], symmetric=symmetric)
    assert c.indices.tolist() == [i]
    assert c.weights.tolist() == pytest.approx([1.0])


def test_the_antipode_of_a_vertex_has_weight_minus_one():
    points = cloud(30, 3)
    i = int(points.norm(dim=1).argmax())
    c = caratheodory(points, -points[i], symmetric=True)
    assert c.indices.tolist() == [i]
    assert c.weights.tolist() == pytest.approx([-1.0])


def test_the_origin_needs_no_weight_in_the_symmetric_case():
    points = cloud(30, 3)
    check(caratheodory(points, torch.zeros(3), symmetric=True), points, torch.zeros(3), True, 4)


def test_axis_endpoints_of_the_ellipsoid():
    """T2's use: y with yᵀM⁻¹y ≤ 1 lies in conv(±P), by the explicit start u_i⟨p_i, M⁻¹y⟩."""
    points = cloud(200, 8)
    e = mvee(points, tol=1e-3)
    values, vectors = torch.linalg.eigh(e.shape)
    ends = (vectors * values.sqrt()).T
    starts = (ends @ e.whitening) @ (points @ e.whitening).T * e.weights
    assert float(starts.abs().sum(dim=1).max()) <= 1 + 1e-9
    for found in (caratheodory_many(points, ends, starts, True), caratheodory_many(points, ends, symmetric=True)):
        assert len(found) == 8
        for c, y in zip(found, ends, strict=True):
            check(c, points, y, True, 9)
    single = caratheodory(points, ends[3], starts[3], symmetric=True)
    assert torch.equal(single.indices, caratheodory_many(points, ends, starts, True)[3].indices)


def test_the_explicit_start_bounds_the_support():
    points = cloud(100, 4)
    w = torch.zeros(100, dtype=torch.float64)
    w[20:40] = 1 / 20
    c = caratheodory(points, w @ points, w)
    assert set(c.indices.tolist()) <= set(range(20, 40))


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("factor", [1.001, 10.0])
def test_outside_the_hull(symmetric, factor):
    points = cloud(30, 3)
    i = int(points.norm(dim=1).argmax())
    with pytest.raises(GeometryError, match=r"outside .* misses it by \d\.\de[-+]\d+"):
        caratheodory(points, points[i] * factor, symmetric=symmetric)


def test_outside_the_span():
    points = cloud(30, 3)
    points[:, 2] = 0
    with pytest.raises(GeometryError, match="outside"):
        caratheodory(points, torch.tensor([0.0, 0.0, 1e-3]))


def test_outside_names_the_target():
    points = cloud(30, 3)
    targets = torch.stack([points.mean(dim=0), 9 * points[0]])
    with pytest.raises(GeometryError, match="target 1"):
        caratheodory_many(points, targets)


@pytest.mark.parametrize("symmetric", [True, False])
def test_one_point(symmetric):
    point = torch.tensor([[1.0, 2.0]])
    c = caratheodory(point, point[0], symmetric=symmetric)
    assert c.indices.tolist() == [0]
    assert c.weights.tolist() == pytest.approx([1.0])
    with pytest.raises(GeometryError):
        caratheodory(point, point[0] * 1.1, symmetric=symmetric)


def test_duplicates_and_zero_rows():
    points = torch.cat([cloud(20, 3), cloud(20, 3), torch.zeros(2, 3, dtype=torch.float64)])
    target = points.mean(dim=0)
    check(caratheodory(points, target), points, target, False, 4)


def test_a_cloud_far_from_the_origin():
    points = cloud(40, 3) + 1e6
    target = points.mean(dim=0)
    check(caratheodory(points, target), points, target, False, 4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.int64])
def test_other_dtypes(dtype):
    points = (cloud(30, 3) * 10).to(dtype)
    c = caratheodory(points, points[3])
    assert c.weights.dtype == torch.float64
    check(c, points.double(), points[3].double(), False, 4)


def test_bad_input(unchecked):
    points = cloud(10, 3)
    broken = points.clone()
    broken[7, 0] = torch.inf
    with pytest.raises(InputError, match="row 7"):
        caratheodory(broken, points[0])
    with pytest.raises(InputError, match="target"):
        caratheodory(points, torch.tensor([0.0, torch.nan, 0.0]))
    with pytest.raises(InputError, match="2 coordinates, but the points have 3"):
        caratheodory(points, torch.zeros(2))
    with pytest.raises(InputError, match="one number per point"):
        caratheodory(points, points[0], torch.ones(3))
    with pytest.raises(InputError, match="symmetric=True"):
        caratheodory(points, points[0], -torch.ones(10))
