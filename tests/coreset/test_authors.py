"""Peeling as in the first author's public code: which points leave, when it ends, and what they get."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.optimize import linprog

from coreprune.coreset import authors, authors_importance
from coreprune.errors import InputError
from coreprune.selectors import Loewner
from layers_by_hand import layer, seeded


def cloud(n: int, d: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, d, generator=seeded(seed), dtype=torch.float64) + 0.5


def khachiyan(p: np.ndarray, rounds: int = 20_000) -> tuple[np.ndarray, np.ndarray]:
    """Centre and matrix Σ u (p−c)(p−c)ᵀ of the general Löwner ellipsoid."""
    q, u = np.c_[p, np.ones(len(p))], np.full(len(p), 1 / len(p))
    k = q.shape[1]
    for _ in range(rounds):
        m = np.einsum("ij,jk,ik->i", q, np.linalg.inv(q.T @ (q * u[:, None])), q)
        j = m.argmax()
        step = (m[j] - k) / (k * (m[j] - 1))
        u *= 1 - step
        u[j] += step
    c = u @ p
    return c, (p * u[:, None]).T @ p - np.outer(c, c)


@pytest.mark.parametrize("seed", range(3))
def test_the_ends_of_all_axes_lie_in_the_hull_of_what_leaves(seed):
    """c ± e of the ellipsoid that Khachiyan's algorithm finds, scaled by 1/r; a linear program for the hull."""
    points = cloud(40, 3, seed)
    gone = authors._round(points).numpy()
    p = points.numpy()
    c, shape = khachiyan(p)
    values, axes = np.linalg.eigh(shape)
    assert len(gone) <= 2 * 3 * 4  # r + 1 for each end
    assert len(gone) < 40
    for value, axis in zip(values, axes.T, strict=True):
        for end in (c + 0.97 * axis * (value / 3) ** 0.5, c - 0.97 * axis * (value / 3) ** 0.5):
            system = np.r_[p[gone].T, np.ones((1, len(gone)))]
            assert linprog(np.zeros(len(gone)), A_eq=system, b_eq=np.r_[end, 1.0]).status == 0


def test_values_fall_as_alpha_over_the_round_until_few_points_are_left():
    points = torch.cat([cloud(60, 2, 1), torch.zeros(2, 2, dtype=torch.float64)])
    found, rounds = authors_importance(points)
    alpha = 4 * 2**1.5
    assert rounds > 3
    assert found[-2:].tolist() == [0.0, 0.0]
    times = (alpha / found[:60]).round().long()
    assert torch.allclose(found[:60], alpha / times.double())
    assert set(times.tolist()) == set(range(1, rounds + 1))
    left, order = torch.arange(60), 0
    while len(left) > 2 * (2 + 1):  # the same points, round by round
        order += 1
        gone = left[authors._round(authors._within_span(points[left]))]
        assert set(times[gone].tolist()) == {order}
        left = left[~torch.isin(left, gone)]
    assert order == rounds
    assert set(times[left].tolist()) <= {rounds}


@pytest.mark.parametrize(("n", "rounds"), [(8, 0), (9, 1)])
def test_few_points_are_not_peeled(n, rounds):
    """2(r + 1) = 8 in three dimensions, wherever they lie in ten."""
    points = cloud(n, 3) @ cloud(3, 10, 5)
    found, ran = authors_importance(points)
    assert min(ran, 1) == rounds
    assert found.max() == pytest.approx(4 * 3**1.5)
    if rounds == 0:
        assert len(found.unique()) == 1


def test_on_a_line_the_ends_leave():
    points = torch.tensor([[3.0], [-1.0], [2.0], [0.5], [7.0]], dtype=torch.float64)
    found, rounds = authors_importance(points)
    assert rounds == 1
    assert found.tolist() == [4.0] * 5
    assert authors._round(points).tolist() == [1, 4]


def test_the_preset_says_what_ran_and_takes_no_other_options(unchecked):
    given = layer(n=40, d=3)
    ranking = Loewner(preset="authors")(given, seeded(2))
    expected, rounds = authors_importance(given.outgoing_sizes[:, None] * given.effective)
    assert torch.equal(ranking.scores, expected)
    assert f"{rounds} rounds" in ranking.note
    assert "uniform sampling" in Loewner(preset="authors")(layer(n=8, d=5), seeded(2)).note
    with pytest.raises(InputError, match="known: authors"):
        Loewner(preset="editors")
    for option in ({"ridge": None}, {"variant": "axes"}, {"tight": False}):
        with pytest.raises(InputError, match="leave them out"):
            Loewner(preset="authors", **option)
