"""T14: the error of a map between channels over whole patches bounds the least-squares refit."""

import itertools

import numpy as np
import pytest
import torch

from coreprune.coreset import Patches, map_errors


def by_hand(x: np.ndarray, v: np.ndarray, w: np.ndarray, k: np.ndarray, kept: list[int], ridge: float):
    """Both numbers with loops over taps. x: (m, c, t), centred by channel."""
    lam = ridge * np.trace(k) / len(k)
    into = (
        k[:, kept] @ np.linalg.inv(k[np.ix_(kept, kept)] + lam * np.eye(len(kept))) if kept else np.zeros((len(k), 0))
    )
    into[kept] = np.eye(len(kept))  # a kept channel stays itself
    taps = []
    for t in range(x.shape[2]):
        taps.append((x[:, :, t] - x[:, kept, t] @ into.T) @ v[:, :, t].T)
    size = lambda e: float(np.trace(w @ np.cov(e.T, bias=True).reshape(len(w), len(w))))  # noqa: E731
    return size(sum(taps)), sum(size(e) for e in taps)


def least_squares(x: np.ndarray, v: np.ndarray, w: np.ndarray, kept: list[int]) -> float:
    """The error of the best weights on the kept channels of the patches, with intercept."""
    y = np.einsum("jct,mct->mj", v, x)
    a = np.concatenate([np.ones((len(x), 1)), x[:, kept].reshape(len(x), -1)], axis=1)
    e = y - a @ np.linalg.lstsq(a, y, rcond=None)[0]
    return float(np.trace(w @ (e.T @ e)) / len(x))


def drawn(seed: int, m: int = 90, c: int = 5, t: int = 3, j: int = 4):
    """Patches whose taps and channels are correlated, weights, a worth, and a covariance of the channels."""
    g = np.random.default_rng(seed)
    x = g.normal(size=(m, c, t)) @ g.normal(size=(t, t)) + g.normal(size=(m, 1, 1)) * g.uniform(0, 2)
    x = np.einsum("dc,mct->mdt", g.normal(size=(c, c)), x)
    x = x - x.mean(axis=(0, 2))[:, None]
    root = g.normal(size=(j, j))
    flat = x.transpose(0, 2, 1).reshape(-1, c)
    return x, g.normal(size=(j, c, t)), root @ root.T, flat.T @ flat / len(flat)


def ours(x, v, w, k, kept, ridge):
    patches = Patches(*(torch.from_numpy(each) for each in (x, v, w)))
    return map_errors(patches, torch.from_numpy(k), torch.tensor(kept, dtype=torch.int64), ridge)


@pytest.mark.parametrize("seed", range(8))
def test_equals_the_sums_by_hand(seed):
    x, v, w, k = drawn(seed)
    for kept in ([], [0], [3, 1], [0, 1, 2, 4], [0, 1, 2, 3, 4]):
        assert ours(x, v, w, k, kept, 1e-3) == pytest.approx(by_hand(x, v, w, k, kept, 1e-3), rel=1e-9, abs=1e-9)


def test_no_refit_on_the_patches_is_worse():
    for seed, size in itertools.product(range(60), range(6)):
        x, v, w, k = drawn(seed)
        kept = np.random.default_rng(seed).permutation(5)[:size].tolist()
        assert least_squares(x, v, w, kept) <= ours(x, v, w, k, kept, 1e-4)[0] * (1 + 1e-9) + 1e-9


def test_the_sum_over_taps_is_no_bound():
    below = 0
    for seed in range(60):
        x, v, w, k = drawn(seed)
        below += ours(x, v, w, k, [0, 1], 1e-4)[1] < least_squares(x, v, w, [0, 1])
    assert below > 5  # so it cannot be printed as one
    # Equal taps: the errors of t taps add up, and their variance is t times the sum over the taps.
    x, v, w, k = drawn(0)
    x, v = np.repeat(x[:, :, :1], 3, axis=2), np.repeat(v[:, :, :1], 3, axis=2)
    whole, known = ours(x, v, w, k, [0, 1], 1e-4)
    assert whole == pytest.approx(3 * known)
