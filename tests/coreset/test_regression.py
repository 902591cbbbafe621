"""Least squares from moments, against the same problem solved on explicit rows."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from coreprune.coreset.regression import LeastSquares
from coreprune.errors import GeometryError


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def problem(g: int = 1, rows: int = 60, f: int = 5, o: int = 3, mean: float = 0.0) -> tuple[Tensor, Tensor, Tensor]:
    """Rows, targets, and weights to start from."""
    mix = normal(g, f, f, seed=1)
    return normal(g, rows, f) @ mix + mean, normal(g, rows, o, seed=2) + 3 * mean, normal(g, o, f, seed=3)


def made(x: Tensor, y: Tensor, *, intercept: bool = True, blocks: int = 1) -> LeastSquares:
    fits = LeastSquares(intercept=intercept)
    for a, b in zip(x.tensor_split(blocks, 1), y.tensor_split(blocks, 1), strict=True):
        fits.add(a, b)
    return fits


def explicit(x: Tensor, y: Tensor, start: Tensor, ridge: float, intercept: bool) -> tuple[Tensor, Tensor]:
    """One problem by lstsq: the penalty is f more rows, the intercept one more column that is not penalised."""
    rows, f = x.shape
    centred = x - x.mean(0) if intercept else x
    lam = ridge * float(centred.square().sum(0).mean())  # rows · λ · the mean second moment
    left = torch.cat([torch.cat([x, torch.full((rows, 1), float(intercept)).double()], 1), torch.zeros(f, f + 1)])
    left[rows:, :f] = lam**0.5 * torch.eye(f)
    right = torch.cat([y, lam**0.5 * start.T])
    found = torch.linalg.lstsq(left, right, driver="gelsd").solution
    return found[:f].T, found[f] * float(intercept)


@pytest.mark.parametrize("intercept", [True, False])
@pytest.mark.parametrize("ridge", [1e-12, 1e-3, 1.0])
@pytest.mark.parametrize("g", [1, 3])
def test_the_minimiser_is_that_of_the_explicit_problem(g, ridge, intercept):
    x, y, start = problem(g, mean=0.7)
    weight, bias = made(x, y, intercept=intercept).solve(start, ridge)
    for i in range(g):
        wanted = explicit(x[i], y[i], start[i], ridge, intercept)
        assert torch.allclose(weight[i], wanted[0], atol=1e-8)
        assert torch.allclose(bias[i], wanted[1], atol=1e-8)


@pytest.mark.parametrize("f", [200, 201, 450, 803])
def test_many_features_have_the_same_moments(f):
    x = normal(2, 30, f) + 1.5
    found = made(x, normal(2, 30, 1), blocks=2).moments()[2]
    for i in range(2):
        assert torch.allclose(found[i], torch.cov(x[i].T, correction=0), atol=1e-12)


def test_groups_do_not_see_each_other():
    x, y, start = problem(3)
    whole = made(x, y).solve(start, 1e-2)
    for i in range(3):
        one = made(x[i : i + 1], y[i : i + 1]).solve(start[i : i + 1], 1e-2)
        assert torch.allclose(whole[0][i], one[0][0], atol=1e-12)
        assert torch.allclose(whole[1][i], one[1][0], atol=1e-12)


@pytest.mark.parametrize("intercept", [True, False])
def test_blocks_give_what_one_piece_gives(intercept):
    x, y, start = problem(2, rows=61)
    one, many = (made(x, y, intercept=intercept, blocks=b) for b in (1, 7))
    assert one.rows == many.rows == 61
    for a, b in zip(
        (*one.solve(start, 1e-3), *one.moments()), (*many.solve(start, 1e-3), *many.moments()), strict=True
    ):
        assert torch.allclose(a, b, atol=1e-10)


def test_moments_are_those_of_the_rows():
    x, y, _ = problem(2, mean=2.0)
    mean_x, mean_y, xx, yx = made(x, y, blocks=4).moments()
    for i in range(2):
        both = torch.cov(torch.cat([x[i], y[i]], 1).T, correction=0)
        assert torch.allclose(xx[i], both[:5, :5])
        assert torch.allclose(yx[i], both[5:, :5])
    assert torch.allclose(mean_x, x.mean(1))
    assert torch.allclose(mean_y, y.mean(1))
    raw = made(x, y, intercept=False).moments()
    assert torch.allclose(raw[2], x.mT @ x / x.shape[1])
    assert torch.allclose(raw[3], y.mT @ x / x.shape[1])


def test_large_means_do_not_cancel():
    """Activations behind a bias of 1e6: E[x²] − E[x]² would leave four digits, and a solution that is wrong."""
    x, y, start = problem(1, rows=200)
    wanted = made(x, y).solve(start, 1e-6)[0]
    found, bias = made(x + 1e6, y + 1e6, blocks=5).solve(start, 1e-6)
    assert torch.allclose(found, wanted, atol=1e-8)
    fitted = (x + 1e6) @ found.mT + bias[:, None, :]
    assert torch.allclose(fitted.mean(1), (y + 1e6).mean(1), rtol=1e-12)


def test_a_large_ridge_leaves_the_weights_as_they_were():
    x, y, start = problem()
    weight, bias = made(x, y).solve(start, 1e12)
    assert torch.allclose(weight, start, atol=1e-8)
    assert torch.allclose(bias, (y - x @ start.mT).mean(1), atol=1e-6)


@pytest.mark.parametrize("intercept", [True, False])
def test_dead_features_keep_their_weights(intercept):
    x, y, start = problem()
    x[..., 2] = 0.0
    weight, _ = made(x, y, intercept=intercept).solve(start, 1e-3)
    assert torch.equal(weight[..., 2], start[..., 2])
    assert not torch.allclose(weight[..., 0], start[..., 0])
    x[:] = 0.0
    assert torch.equal(made(x, y, intercept=intercept).solve(start, 1e-3)[0], start)


def test_exact_targets_are_found_again():
    x, _, start = problem(rows=300)
    truth, shift = normal(1, 3, 5, seed=9), normal(1, 3, seed=10)
    fits = made(x, x @ truth.mT + shift[:, None, :], blocks=3)
    weight, bias = fits.solve(start, 1e-12)
    assert torch.allclose(weight, truth, atol=1e-8)
    assert torch.allclose(bias, shift, atol=1e-8)
    assert float(fits.error(weight, bias).max()) < 1e-12


@pytest.mark.parametrize("intercept", [True, False])
def test_the_error_is_that_of_the_rows(intercept):
    x, y, start = problem(2, mean=1.5)
    fits, bias = made(x, y, intercept=intercept, blocks=3), normal(2, 3, seed=7) * float(intercept)
    residual = y - x @ start.mT - bias[:, None, :]
    assert torch.allclose(fits.error(start, bias), residual.square().mean(1))


@pytest.mark.parametrize("intercept", [True, False])
def test_new_targets_give_what_a_new_problem_gives(intercept):
    x, y, start = problem(2, mean=0.4)
    other = normal(2, 60, 3, seed=8) + 5.0
    fits = made(x, y, intercept=intercept, blocks=4)
    before = fits.solve(start, 1e-3)
    again = fits.retarget()
    for a, b in zip(x.tensor_split(3, 1), other.tensor_split(3, 1), strict=True):
        again.add_targets(a, b)
    found, wanted = (m.solve(start, 1e-3) for m in (again, made(x, other, intercept=intercept)))
    for a, b in zip(found, wanted, strict=True):
        assert torch.allclose(a, b, atol=1e-10)
    assert torch.allclose(again.error(*found), made(x, other, intercept=intercept).error(*wanted), atol=1e-10)
    for a, b in zip(fits.solve(start, 1e-3), before, strict=True):
        assert torch.equal(a, b)  # the first problem is as it was


@pytest.mark.parametrize("ridge", [0.0, 1e-2, 1.0])
@pytest.mark.parametrize("share", [1, 3])
def test_what_a_mixture_loses_on_one_kind_it_gains_on_the_other(ridge, share):
    """T17, with kinds that excite different directions: α is share/(share + 1)."""
    scale = torch.tensor([3.0, 3.0, 1e-2, 1e-2, 1.0], dtype=torch.float64)
    kinds = []
    for seed, size in ((1, scale), (2, scale.flip(0))):
        x = normal(1, 50, 5, seed=seed) * size
        kinds.append((x, x @ normal(1, 5, 3, seed=seed + 2) + normal(1, 50, 3, seed=seed + 4)))
    one, other = (made(x, y) for x, y in kinds)
    both = made(*(torch.cat([a] * share + [b], dim=1) for a, b in zip(*kinds, strict=True)))
    start, alpha = normal(1, 3, 5, seed=9), share / (share + 1)
    best = both.solve(start, ridge)
    lam = ridge * float(both.moments()[2].diagonal(dim1=1, dim2=2).mean())

    def size(problem: LeastSquares, found: tuple[Tensor, Tensor]) -> float:
        return float(problem.error(*found).sum())

    for found in (other.solve(start, 1e-3), one.solve(start, 1e-3), (start, torch.zeros(1, 3, dtype=torch.float64))):
        moved = float((found[0] - start).square().sum() - (best[0] - start).square().sum())
        lost = (1 - alpha) * (size(other, best) - size(other, found))
        gained = alpha * (size(one, found) - size(one, best))
        assert lost <= gained + lam * moved + 1e-9 * size(both, found)
    alone = one.solve(start, 1e-3)
    assert size(other, best) < 0.7 * size(other, alone)


def test_half_precision_rows_are_summed_in_double():
    x, y, start = problem(rows=4000)
    fits = made(x.bfloat16(), y.bfloat16(), blocks=9)
    wanted = explicit(x[0].bfloat16().double(), y[0].bfloat16().double(), start[0], 1e-3, True)
    assert torch.allclose(fits.solve(start, 1e-3)[0][0], wanted[0], atol=1e-9)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("side", ["x", "y"])
def test_rows_that_are_not_finite_are_refused(bad, side):
    x, y, start = problem()
    (x if side == "x" else y)[0, 3, 1] = bad
    with pytest.raises(GeometryError, match="not finite"):
        made(x, y).solve(start, 1e-3)
