"""T15 against the errors of both sets, and exchange against all sets."""

import itertools

import numpy as np
import pytest
import torch

from coreprune.coreset import Moments, exchanged, functional_order, swap_changes
from coreprune.errors import InputError


def drawn(seed: int, units: int, p: int, readers: int = 1, outputs: int = 4) -> list[Moments]:
    g = np.random.default_rng(seed)
    out = []
    for _ in range(readers):
        x = g.normal(size=(40, units * p)) @ (np.eye(units * p) + g.normal(size=(units * p, units * p)) / 2)
        v = g.normal(size=(outputs, units * p))
        out.append(Moments(torch.from_numpy(np.cov(x.T)), torch.from_numpy(v.T @ v)))
    return out


def objective(moments: list[Moments], units: int, kept: list[int], ridge: float) -> float:
    """ê(S) from its definition, reader by reader, with plain inverses."""
    total = 0.0
    for each in moments:
        k, g = each.covariance.numpy(), each.gram.numpy()
        p = len(k) // units
        lam = ridge * np.trace(k) / len(k)
        s = [i * p + a for i in kept for a in range(p)]
        t = [i for i in range(len(k)) if i not in s]
        a = k + lam * np.eye(len(k))
        residual = a - a[:, s] @ np.linalg.solve(a[np.ix_(s, s)], a[s]) if s else a
        total += np.trace(g @ residual) - lam * np.trace(g[np.ix_(t, t)])
    return total


@pytest.mark.parametrize("p", [1, 3])
@pytest.mark.parametrize("readers", [1, 2])
@pytest.mark.parametrize("ridge", [1e-6, 0.3])
def test_every_swap_changes_the_objective_by_what_is_said(p, readers, ridge):
    units, moments = 6, drawn(p, 6, p, readers)
    for kept in ([0], [4, 1], [0, 2, 3, 5]):
        found = swap_changes(moments, units, torch.tensor(kept), ridge=ridge)
        rest = [i for i in range(units) if i not in kept]
        assert found.shape == (len(kept), len(rest))
        for (i, out), (j, into) in itertools.product(enumerate(kept), enumerate(rest)):
            swapped = [u for u in kept if u != out] + [into]
            expected = objective(moments, units, swapped, ridge) - objective(moments, units, kept, ridge)
            assert float(found[i, j]) == pytest.approx(expected, rel=1e-7, abs=1e-9)


def test_no_single_swap_improves_on_the_result_and_it_is_never_worse():
    better = best = 0
    for seed, k in itertools.product(range(40), (1, 2, 3)):
        moments = drawn(seed, 8, 1)
        greedy = functional_order(moments, 8, search="backward")[:k]
        kept = exchanged(moments, 8, greedy)
        assert kept.tolist() == sorted(set(kept.tolist()))
        assert len(kept) == k
        before, after = (objective(moments, 8, s.tolist(), 1e-4) for s in (greedy, kept))
        assert after <= before * (1 + 1e-9)
        assert float(swap_changes(moments, 8, kept).min()) > -1e-8 * before
        least = min(objective(moments, 8, list(s), 1e-4) for s in itertools.combinations(range(8), k))
        better += after < before * (1 - 1e-6)
        best += after <= least * (1 + 1e-9)
        assert after >= least * (1 - 1e-9)
    assert better > 10  # greedy elimination is not optimal where little stays
    assert best > 100  # of 120


def test_nothing_to_swap():
    moments = drawn(0, 5, 1)
    assert exchanged(moments, 5, torch.arange(5)).tolist() == [0, 1, 2, 3, 4]
    assert exchanged(moments, 5, torch.empty(0, dtype=torch.int64)).tolist() == []
    assert exchanged(moments, 5, torch.tensor([4, 0]), most=0).tolist() == [0, 4]
    with pytest.raises(InputError, match="not symmetric"):
        exchanged([Moments(torch.eye(5).double().roll(1, 0), torch.eye(5).double())], 5, torch.tensor([1]))


@pytest.mark.parametrize(("kept", "said"), [([0, 7], "from 0 to 4"), ([-1], "from 0 to 4"), ([1, 1], "at most once")])
def test_units_that_are_none_are_refused(kept, said):
    for work in (swap_changes, exchanged):
        with pytest.raises(InputError, match=said):
            work(drawn(0, 5, 1), 5, torch.tensor(kept))
