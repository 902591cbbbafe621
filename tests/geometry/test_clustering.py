"""k-means against every partition of few points, scikit-learn, and what must not change it."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from coreprune.errors import InputError
from coreprune.geometry import kmeans


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def cloud(n: int, d: int, seed: int) -> torch.Tensor:
    return torch.randn(n, d, generator=seeded(seed), dtype=torch.float64)


def cost(points, labels, k) -> float:
    parts = [points[torch.tensor(labels) == c] for c in range(k)]
    return sum(float((p - p.mean(dim=0)).square().sum()) for p in parts)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("k", [2, 3])
def test_it_finds_the_best_partition_of_few_points(seed, k):
    points = cloud(7, 3, seed)
    best = min(cost(points, p, k) for p in itertools.product(range(k), repeat=7) if len(set(p)) == k)
    found = kmeans(points, k, seeded(seed), restarts=30)
    assert found.inertia == pytest.approx(best, rel=1e-9)
    assert found.inertia == pytest.approx(cost(points, found.labels.tolist(), k), rel=1e-9)


def test_it_is_as_good_as_scikit_learn():
    cluster = pytest.importorskip("sklearn.cluster")
    points = cloud(120, 5, 0) + 4 * cloud(6, 5, 1).repeat_interleave(20, dim=0)
    theirs = cluster.KMeans(6, n_init=10, random_state=0).fit(points.numpy()).inertia_
    assert kmeans(points, 6, seeded(0)).inertia <= theirs * 1.001


@given(n=st.integers(1, 25), d=st.integers(1, 40), copies=st.integers(1, 5), seed=st.integers(0, 10**6), data=st.data())
@settings(max_examples=60)
def test_exactly_k_clusters_with_their_means(n, d, copies, seed, data):
    points = cloud(-(-n // copies), d, seed).repeat(copies, 1)[:n]
    k = data.draw(st.integers(1, n))
    found = kmeans(points, k, seeded(seed), restarts=2)
    assert sorted(set(found.labels.tolist())) == list(range(k))
    means = torch.stack([points[found.labels == c].mean(dim=0) for c in range(k)])
    assert torch.allclose(found.centres, means, atol=1e-9)


@pytest.mark.parametrize("rounds", [1, 2, 3])
@pytest.mark.parametrize("k", [3, 4, 5])
def test_a_cluster_that_gives_a_point_away_does_not_run_empty(k, rounds):
    """Two distinct points: every further cluster takes one of their copies, and 300 rounds may hide a wrong one."""
    points = torch.tensor([3.0, 3.0, -2.0, -2.0, -2.0], dtype=torch.float64)[:, None]
    for seed in range(4):
        found = kmeans(points, k, seeded(seed), restarts=1, rounds=rounds)
        assert sorted(set(found.labels.tolist())) == list(range(k))
        assert found.inertia == 0


def test_copies_share_a_cluster():
    points = cloud(8, 4, 0)
    found = kmeans(torch.cat([points, points]), 8, seeded(0), restarts=30)
    assert found.labels[:8].tolist() == found.labels[8:].tolist()
    assert found.inertia < 1e-20


def test_moving_and_turning_the_points_changes_nothing():
    points = cloud(30, 4, 2)
    turn = torch.linalg.qr(cloud(4, 4, 3)).Q
    one = kmeans(points, 5, seeded(1), restarts=20)
    two = kmeans(3 * points @ turn + 7, 5, seeded(1), restarts=20)
    assert two.inertia == pytest.approx(9 * one.inertia, rel=1e-6)


def test_the_same_seed_gives_the_same_clusters():
    points = cloud(30, 4, 2)
    assert torch.equal(kmeans(points, 5, seeded(1)).labels, kmeans(points, 5, seeded(1)).labels)


@pytest.mark.parametrize(
    ("points", "options", "message"),
    [
        (torch.ones(3, 2), {"k": 0}, "k must be"),
        (torch.ones(3, 2), {"k": 4}, "between 1 and 3"),
        (torch.ones(3, 2), {"k": True}, "k must be"),
        (torch.ones(3, 2), {"k": 2, "restarts": 0}, "restarts"),
        (torch.ones(3, 2), {"k": 2, "rounds": 0}, "rounds"),
        (torch.tensor([[1.0], [float("nan")]]), {"k": 1}, "row 1"),
        (torch.ones(3), {"k": 1}, "one point per row"),
    ],
)
def test_wrong_input_is_explained(unchecked, points, options, message):
    with pytest.raises(InputError, match=message):
        kmeans(points, seed=0, **options)
