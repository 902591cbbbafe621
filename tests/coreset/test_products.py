"""T16: some channels of a product stand in for the others; against least squares on explicit pairs."""

from __future__ import annotations

import math
from itertools import combinations

import pytest
import torch

from coreprune.coreset import Moments, bilinear_map, functional_coreset, in_order


def operands(n=5, tokens=40, seed=0):
    g = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64)  # noqa: E731
    return draw(tokens, n) @ draw(n, n), draw(tokens, n) @ draw(n, n) + draw(n)


def moments(q, k):
    return torch.cov(k.T, correction=0), q.T @ q / len(q)


@pytest.mark.parametrize("kept", [[0, 2], [4, 1, 3], [0], []])
def test_error_is_that_of_least_squares_on_all_pairs_with_a_free_constant_per_query(kept):
    q, k = operands()
    covariance, gram = moments(q, k)
    s = torch.tensor(kept, dtype=torch.int64)
    n = q.shape[1]
    order = torch.tensor([*kept, *(i for i in range(n) if i not in kept)])
    said = in_order([Moments(covariance, gram)], n, order, ridge=0.0).errors[len(kept)]
    # Explicit rows, one for each pair: N enters as q_i ⊗ k_j,S, and each query i has a constant of its own.
    design = torch.einsum("ia,jb->ijab", q, k[:, s]).reshape(len(q) * len(k), -1)
    own = torch.eye(len(q), dtype=q.dtype).repeat_interleave(len(k), dim=0)
    target = (q @ k.T).reshape(-1, 1)
    every = torch.cat([design, own], dim=1)
    left = target - every @ torch.linalg.lstsq(every, target, driver="gelsd").solution
    assert float(said) == pytest.approx(float(left.square().mean()), rel=1e-6)
    into = bilinear_map(covariance, s, 0.0)
    off = q @ k.T - q @ into @ k[:, s].T
    centred = off - off.mean(dim=1, keepdim=True)
    assert float(centred.square().mean()) == pytest.approx(float(said), rel=1e-6)


def test_no_map_of_that_rank_is_below_the_floor():
    q, k = operands(seed=1)
    covariance, gram = moments(q, k)
    found = functional_coreset([Moments(covariance, gram)], 5, ridge=0.0)
    scores = q @ (k - k.mean(dim=0)).T
    values = torch.linalg.svdvals(scores).square() / scores.numel()  # Eckart and Young on the scores themselves
    for m in range(6):
        assert float(found.optimum[m]) == pytest.approx(float(values[m:].sum()), rel=1e-6, abs=1e-9)
        for kept in combinations(range(5), m):
            s = torch.tensor(kept, dtype=torch.int64)
            off = scores - (q @ bilinear_map(covariance, s, 0.0)) @ (k - k.mean(dim=0))[:, s].T
            assert float(off.square().mean()) >= float(found.optimum[m]) * (1 - 1e-9)


def test_softmax_does_not_see_the_constant():
    q, k = operands(seed=2)
    v = operands(seed=3)[0]
    attention = lambda keys: torch.softmax(q @ keys.T / 7, dim=-1) @ v  # noqa: E731
    assert torch.allclose(attention(k), attention(k + torch.arange(5.0, dtype=torch.float64)), atol=1e-12)


def test_map_leaves_kept_channels_and_infinite_ridge_leaves_the_others_out():
    covariance, _ = moments(*operands(seed=4))
    kept = torch.tensor([3, 0])
    into = bilinear_map(covariance, kept, 1e-2)
    assert torch.equal(into[kept], torch.eye(2, dtype=torch.float64))
    none = bilinear_map(covariance, kept, math.inf)
    assert float(none.abs().sum()) == 2.0
    assert float((into[[1, 2, 4]]).abs().min()) > 0
