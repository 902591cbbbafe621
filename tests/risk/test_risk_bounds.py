"""T18 against exact binomial tails, against the definition in plain numpy, and by coverage."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.stats import binom, binomtest

from coreprune.errors import InputError
from coreprune.risk import bounds, interval, lower_bound, needed, shown_by, upper_bound


def losses(n: int, k: int) -> torch.Tensor:
    return torch.arange(n) < k


@pytest.mark.parametrize(("n", "k"), [(1, 0), (10, 0), (10, 3), (50, 49), (200, 7)])
def test_of_losses_of_zero_and_one_the_bound_inverts_the_binomial_tail(n, k):
    for delta in (0.01, 0.2):
        assert binom.cdf(k, n, upper_bound(losses(n, k), delta)) == pytest.approx(delta, rel=1e-6)
    assert upper_bound(losses(n, n)) == 1.0
    assert lower_bound(losses(n, 0)) == 0.0


@pytest.mark.parametrize("delta", [0.01, 0.1])
@pytest.mark.parametrize("seed", range(4))
def test_the_betting_bound_is_where_the_wealth_reaches_one_over_delta(seed, delta):
    """W(m) as products, in plain numpy, on a fine grid."""
    x = np.random.default_rng(seed).beta(0.5, 3, size=25)
    m = np.linspace(x.mean(), 1, 20_001)[:-1]
    wealth = np.mean([np.prod(1 + c * (m[:, None] - x) / (1 - m[:, None]), axis=1) for c in bounds._BETS], axis=0)
    assert (np.diff(wealth) > 0).all()
    found = upper_bound(torch.tensor(x), delta)
    assert found == pytest.approx(float(m[np.argmax(wealth >= 1 / delta)]), abs=2e-4)
    assert upper_bound(torch.tensor(x[::-1].copy()), delta) == pytest.approx(found, abs=1e-12)


LAWS = {
    "few losses": lambda r, n: np.where(r.random(n) < 0.03, r.random(n), 0.0),
    "halves": lambda r, n: np.where(r.random(n) < 0.1, 0.5, 0.0),
    "many": lambda r, n: r.beta(2, 2, n),
    "zero and one as numbers": lambda r, n: (r.random(n) < 0.05).astype(float),
}
MEANS = {"few losses": 0.015, "halves": 0.05, "many": 0.5, "zero and one as numbers": 0.05}


@pytest.mark.parametrize("law", LAWS)
def test_bounds_fail_in_at_most_a_share_delta_of_repetitions(law):
    rng, delta, repeats = np.random.default_rng(5), 0.2, 500
    found = [interval(torch.tensor(LAWS[law](rng, 40)), delta) for _ in range(repeats)]
    one = delta / 2 + 3 * math.sqrt(delta / 2 * (1 - delta / 2) / repeats)
    assert np.mean([i.high < MEANS[law] for i in found]) <= one
    assert np.mean([i.low > MEANS[law] for i in found]) <= one


def test_the_betting_bound_is_near_the_exact_one_and_better_where_the_variance_is_small():
    """Without a loss it pays for the list of bets; where losses are all alike, it beats the bound of Hoeffding."""
    n = 400
    exact, bet = upper_bound(losses(n, 0)), upper_bound(losses(n, 0).double())
    assert exact <= bet <= exact + math.log(len(bounds._BETS)) / n
    alike = 0.3 + 0.02 * torch.linspace(-1, 1, n, dtype=torch.float64)
    hoeffding = math.sqrt(math.log(100) / (2 * n))
    assert 0 < upper_bound(alike) - 0.3 < 0.4 * hoeffding


def test_how_many_samples_a_level_needs():
    assert needed(0.001, 0.01) == 4603
    assert shown_by(500, 0.01) == pytest.approx(0.00917, abs=1e-5)
    for level in (0.3, 0.01, 0.0017):
        n = needed(level)
        assert upper_bound(losses(n, 0)) <= level < upper_bound(losses(n - 1, 0))
        assert shown_by(n) == pytest.approx(upper_bound(losses(n, 0)), rel=1e-9)


@pytest.mark.parametrize("x", [[1.0, 1.0], [0.0], [1.0], [0.5, 1.0]])
def test_extremes_are_defined(x):
    found = interval(torch.tensor(x))
    assert 0 <= found.low <= found.mean <= found.high <= 1


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: upper_bound(torch.zeros(0)), "n ≥ 1"),
        (lambda: upper_bound(torch.zeros(2, 2)), "one per sample"),
        (lambda: upper_bound(torch.tensor([0.5, 1.2])), "largest that is possible"),
        (lambda: upper_bound(torch.tensor([math.nan])), "largest that is possible"),
        (lambda: upper_bound(torch.zeros(3), 1.0), "delta"),
        (lambda: needed(1.0), "level and delta"),
        (lambda: shown_by(0), "at least 1"),
    ],
)
def test_wrong_input_is_explained(unchecked, call, message):
    with pytest.raises(InputError, match=message):
        call()


@pytest.mark.parametrize(("k", "n"), [(0, 20), (3, 50), (50, 50), (200, 1000)])
def test_the_interval_of_losses_of_zero_and_one_is_that_of_clopper_and_pearson(k, n):
    found = interval(torch.arange(n) < k, 0.05)
    exact = binomtest(k, n).proportion_ci(confidence_level=0.95, method="exact")
    assert (found.low, found.high) == pytest.approx((exact.low, exact.high), abs=1e-9)


def test_the_kind_of_bound_goes_by_the_dtype():
    """A loss that is 0 or 1 on these samples may lie between them on others: the exact bound would be too low then."""
    lost = torch.arange(200) < 5
    assert upper_bound(lost.double(), 0.05) > upper_bound(lost, 0.05) + 1e-3
