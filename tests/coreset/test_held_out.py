"""T12 against explicit refits on explicit rows, and the ridge of T13."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from coreprune.coreset import Fold, Moments, functional_order, held_out_curve
from coreprune.coreset import held_out as held_out_module
from coreprune.coreset.cross_validation import _along, checked
from coreprune.coreset.held_out import RIDGES, least_held_out
from coreprune.coreset.regression import LeastSquares
from coreprune.errors import InputError


def rows(n, f, seed, rank=None):
    """Correlated features with a mean."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(rank or f, f, generator=torch.Generator().manual_seed(99), dtype=torch.float64)
    return torch.randn(n, rank or f, generator=generator, dtype=torch.float64) @ mixing + 3.0


def fold_of(seen, unseen, weight, worth):
    mean = seen.mean(dim=0)
    inside, outside = seen - mean, unseen - mean
    return Fold(inside.T @ inside / len(seen), outside.T @ outside / len(unseen), weight.T @ worth @ weight)


def by_refits(seen, unseen, weight, worth, order, p, ridge):
    """Refit on explicit rows by numpy's lstsq for every k, and measure on the other rows."""
    scale = float((seen - seen.mean(0)).square().mean())
    out = []
    for k in range(len(order) + 1):
        keep = (order[:k, None] * p + torch.arange(p)).flatten().numpy()
        a, b = (seen - seen.mean(0)).numpy(), (unseen - seen.mean(0)).numpy()
        start = weight[:, keep].numpy()
        if math.isinf(ridge):
            new = start
        else:
            lam = math.sqrt(ridge * scale * len(seen))
            left = np.r_[a[:, keep], lam * np.eye(len(keep))]
            right = np.r_[a @ weight.numpy().T, lam * start.T]
            new = np.linalg.lstsq(left, right, rcond=None)[0].T if len(keep) else start
        apart = b @ weight.numpy().T - b[:, keep] @ new.T
        out.append(float(np.einsum("ni,ij,nj->", apart, worth.numpy(), apart) / len(b)))
    return torch.tensor(out, dtype=torch.float64)


@pytest.mark.parametrize("p", [1, 3])
@pytest.mark.parametrize("n", [4, 60])
@pytest.mark.parametrize("unseen_rows", [3, 25])
@pytest.mark.parametrize("block", [2, 5, 256])
def test_t12_is_the_error_of_every_refit_on_rows_that_it_has_not_seen(monkeypatch, p, n, unseen_rows, block):
    """With 4 rows the covariance is singular, and the refit learns them by heart. K' of 3 rows is singular, too."""
    monkeypatch.setattr(held_out_module, "_BLOCK", block)
    f, order = 4 * p, torch.tensor([2, 0, 3, 1])
    seen, unseen = rows(n, f, 0), rows(unseen_rows, f, 1)
    weight = torch.randn(5, f, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    half = torch.randn(5, 5, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    worth = half @ half.T
    ridges = (1e-3, 0.3, 10.0, math.inf)
    found = held_out_curve(fold_of(seen, unseen, weight, worth), 4, order, ridges)
    wanted = torch.stack([by_refits(seen, unseen, weight, worth, order, p, ridge) for ridge in ridges])
    assert torch.allclose(found, wanted, rtol=1e-8, atol=1e-9 * float(wanted.max()))


def test_few_rows_look_perfect_to_those_that_were_fitted_and_not_to_others():
    """The kind of fault: half of 40 units can go for nothing on 8 rows, said the curve."""
    seen, unseen = rows(8, 40, 0), rows(400, 40, 1)
    weight = torch.randn(6, 40, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    fold = fold_of(seen, unseen, weight, torch.eye(6, dtype=torch.float64))
    order = functional_order([Moments(fold.seen, fold.gram)], 40, search="backward")
    variance = float((fold.unseen * fold.gram).sum())
    inside = held_out_curve(Fold(fold.seen, fold.seen, fold.gram), 40, order, (1e-4,))[0, 20]
    outside = held_out_curve(fold, 40, order)[:, 20].min()
    assert float(inside) < 1e-3 * variance
    assert float(outside) > 0.1 * variance


def test_the_best_ridge_falls_as_rows_are_added():
    weight = torch.randn(6, 24, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    best = []
    for n in (8, 64, 4096):
        fold = fold_of(rows(n, 24, 0, rank=40), rows(4000, 24, 1, rank=40), weight, torch.eye(6, dtype=torch.float64))
        best.append(RIDGES[int(held_out_curve(fold, 24, torch.arange(24))[:, 12].argmin())])
    assert best[0] > best[1] > best[2]


@pytest.mark.parametrize("n", [6, 40, 4096])
def test_the_least_error_over_the_ridges_needs_not_all_of_them(n):
    """Few rows want a large ridge, many a small one: neither is the middle of the grid."""
    weight = torch.randn(6, 24, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    eye = torch.eye(6, dtype=torch.float64)
    halves = [rows(n, 24, seed, rank=40) for seed in (0, 1)]
    folds = [fold_of(a, b, weight, eye) for a, b in (halves, halves[::-1])]
    orders = [torch.arange(24), torch.arange(23, -1, -1)]
    every = torch.stack([held_out_curve(f, 24, o) for f, o in zip(folds, orders, strict=True)]).mean(dim=0)
    found = least_held_out(folds, 24, orders)
    assert (found >= every.min(dim=0).values * (1 - 1e-12)).all()
    assert (found <= every.min(dim=0).values * 1.001 + 1e-12 * every.max()).all()
    if n != 40:
        assert (found < 0.98 * every[len(RIDGES) // 2]).any()


@pytest.mark.parametrize("ridge", [0.0, -1.0, math.nan])
def test_a_ridge_that_is_not_positive_is_refused(ridge):
    fold = Fold(*(torch.eye(3, dtype=torch.float64) for _ in range(3)))
    with pytest.raises(InputError, match="above zero"):
        held_out_curve(fold, 3, torch.arange(3), (ridge,))


def test_a_constant_group_has_no_error():
    zero = torch.zeros(3, 3, dtype=torch.float64)
    assert torch.equal(
        held_out_curve(Fold(zero, zero, torch.eye(3, dtype=torch.float64)), 3, torch.arange(3)),
        torch.zeros(len(RIDGES), 4, dtype=torch.float64),
    )


# T13: the ridge of a refit


def problem(n, noise, seed=0, f=12, o=3):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(1, n, f, generator=generator, dtype=torch.float64)
    true = torch.randn(1, o, f, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    y = x @ true.mT + noise * torch.randn(1, n, o, generator=generator, dtype=torch.float64) + 1.0
    return x, y, true


def halves_of(x, y):
    first = LeastSquares()
    first.add(x[:, ::2], y[:, ::2])
    second = first.sibling()
    second.add(x[:, 1::2], y[:, 1::2])
    return first, second


def by_hand(x, y, start, ridge):
    """Both errors of two-fold cross-validation from explicit rows, (o,)."""
    errors = []
    for one, other in ((slice(0, None, 2), slice(1, None, 2)), (slice(1, None, 2), slice(0, None, 2))):
        a, b = x[0, one], y[0, one]
        mx, my = a.mean(0), b.mean(0)
        lam = ridge * (a - mx).square().mean() * len(a)
        left = torch.cat([a - mx, lam.sqrt() * torch.eye(a.shape[1], dtype=a.dtype)])
        right = torch.cat([b - my, lam.sqrt() * start.T])
        weight = torch.linalg.lstsq(left, right).solution.T
        errors.append((y[0, other] - my - (x[0, other] - mx) @ weight.T).square().mean(0))
    return torch.stack(errors).mean(0)


@pytest.mark.parametrize(("n", "noise"), [(10, 1.0), (40, 3.0), (400, 0.1)])
def test_t13_is_the_best_of_the_grid_on_rows_that_were_left_out(n, noise):
    x, y, true = problem(n, noise)
    start = true + 0.3 * torch.randn(true.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    bias = torch.zeros(1, 3, dtype=torch.float64)
    found = checked(halves_of(x, y), start, bias, torch.ones(1, 3, dtype=torch.float64), RIDGES)
    wanted = {ridge: by_hand(x, y, start[0], ridge) for ridge in RIDGES if math.isfinite(ridge)}
    best = min(wanted, key=lambda ridge: float(wanted[ridge].sum()))
    if math.isfinite(found.ridge):
        assert found.ridge == best / 2
        assert torch.allclose(found.after[0], wanted[best])
    before = (y[0] - x[0] @ start[0].T).square()
    assert torch.allclose(found.before[0], (before[::2].mean(0) + before[1::2].mean(0)) / 2)
    assert torch.equal(found.better, found.after < found.before)


def test_outputs_that_a_refit_makes_worse_are_named():
    """The start is the truth for the first output, and nothing for the second."""
    x, y, true = problem(16, 1.0, o=2)
    start = torch.cat([true[:, :1], torch.zeros_like(true[:, 1:])], dim=1)
    worth = torch.ones(1, 2, dtype=torch.float64)
    found = checked(halves_of(x, y), start, torch.ones(1, 2, dtype=torch.float64), worth)
    assert found.better.tolist() == [[False, True]]


def test_every_kind_of_rows_must_gain():
    """T13 with two kinds: each error is that by hand, and an output that only one kind profits from is not better."""
    kinds = [problem(60, 0.5, seed=s)[:2] for s in (0, 1)]
    true = problem(1, 0.0)[2]
    x, y = kinds[1]
    kinds[1] = (x, torch.cat([y[:, :, :1], 2 * x @ true[:, 1:2].mT, y[:, :, 2:]], dim=2))  # its own law for one output
    start = torch.cat([torch.zeros_like(true[:, :1]), true[:, 1:2], torch.zeros_like(true[:, 2:])], dim=1)
    bias, worth = torch.ones(1, 3, dtype=torch.float64), torch.ones(1, 3, dtype=torch.float64)
    first = halves_of(*kinds[0])
    second = (first[0].sibling(), first[0].sibling())
    for half, rows in zip(second, (slice(0, None, 2), slice(1, None, 2)), strict=True):
        half.add(kinds[1][0][:, rows], kinds[1][1][:, rows])
    found = checked(first, start, bias, worth, (1e-2,), others=[second])
    after, before = [], []
    for x, y in kinds:
        ways = []
        for one in (0, 1):
            a, b = (torch.cat([z[:, one::2] for z in pair], dim=1)[0] for pair in zip(*kinds, strict=True))
            mx, my = a.mean(0), b.mean(0)
            lam = (1e-2 * (a - mx).square().mean() * len(a)).sqrt()
            left = torch.cat([a - mx, lam * torch.eye(12, dtype=a.dtype)])
            weight = torch.linalg.lstsq(left, torch.cat([b - my, lam * start[0].T])).solution.T
            ways.append((y[0, 1 - one :: 2] - my - (x[0, 1 - one :: 2] - mx) @ weight.T).square().mean(0))
        after.append(torch.stack(ways).mean(0))
        apart = (y[0] - 1 - x[0] @ start[0].T).square()
        before.append((apart[::2].mean(0) + apart[1::2].mean(0)) / 2)
    gained = torch.stack(after) - torch.stack(before)
    worst = gained.argmax(dim=0)[None]
    assert torch.allclose(found.after[0], torch.stack(after).gather(0, worst)[0])
    assert torch.allclose(found.before[0], torch.stack(before).gather(0, worst)[0])
    assert found.better.tolist() == [[True, False, True]]
    assert float(gained[1, 1]) < 0  # the other kind alone would have taken it


def test_siblings_add_up_to_all_rows():
    x, y, _ = problem(30, 1.0)
    first, second = halves_of(x, y)
    whole = LeastSquares()
    whole.add(x, y)
    for mine, theirs in zip((first + second).moments(), whole.moments(), strict=True):
        assert torch.allclose(mine, theirs, atol=1e-12)
    start = torch.zeros(1, 3, 12, dtype=torch.float64)
    for mine, theirs in zip((first + second).solve(start, 0.1), whole.solve(start, 0.1), strict=True):
        assert torch.allclose(mine, theirs, atol=1e-12)
    weight, bias = whole.solve(start, math.inf)
    assert torch.equal(weight, start)
    assert torch.allclose(bias, y.mean(1))


@pytest.mark.parametrize("intercept", [True, False])
@pytest.mark.parametrize(("g", "f", "o", "n", "constant"), [(1, 12, 5, 60, 0), (1, 9, 40, 12, 2), (3, 6, 2, 30, 0)])
def test_the_errors_along_one_eigendecomposition_are_those_of_every_refit(intercept, g, f, o, n, constant):
    """T13's closed form against a solution for each ridge: groups, two kinds, features without variance."""
    generator = torch.Generator().manual_seed(f)

    def drawn(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    true, start, worth = drawn(g, o, f), drawn(g, o, f), drawn(g, o).abs()
    first, parts = LeastSquares(intercept), []
    for at, kind in enumerate((0, 0, 1, 1)):
        x = drawn(g, n + at, f) * (1 + kind) + kind
        x[..., :constant] = 1.5
        part = first if not at else first.sibling()
        part.add(x, x @ true.mT + (1 + kind) * drawn(g, n + at, o))
        parts.append(part)
    half, unseen = parts[0] + parts[2], [parts[1], parts[3]]
    path = _along(half, unseen, start, worth)
    for ridge in RIDGES:
        weight, bias = half.solve(start, ridge)
        torch.testing.assert_close(path.fit(ridge), (weight, bias), rtol=1e-7, atol=1e-9)
        error = sum(float((worth * other.error(weight, bias)).sum()) for other in unseen)
        assert path.error(ridge) == pytest.approx(error, rel=1e-9)


def test_features_that_never_change_keep_their_weights():
    """XᵀX is zero: no ridge changes anything, and none is a division by zero."""
    half = LeastSquares()
    half.add(torch.ones(1, 6, 3), torch.ones(1, 6, 2))
    other = half.sibling()
    other.add(torch.ones(1, 6, 3), torch.ones(1, 6, 2))
    start = torch.full((1, 2, 3), 0.5, dtype=torch.float64)
    path = _along(half, [other], start, torch.ones(1, 2, dtype=torch.float64))
    for ridge in RIDGES:
        assert torch.equal(path.fit(ridge)[0], start)
        assert path.error(ridge) == pytest.approx(0.0, abs=1e-12)
