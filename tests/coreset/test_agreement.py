import math

import numpy as np
import pytest
from scipy.special import gammaln

from coreprune.coreset import agreement_bound
from coreprune.errors import InputError


def tail(n, p, k):
    """P(Binomial(n, p) ≤ k), term by term."""
    if p in {0.0, 1.0}:
        return float(p == 0.0 or k == n)
    i = np.arange(k + 1)
    log = gammaln(n + 1) - gammaln(i + 1) - gammaln(n - i + 1) + i * math.log(p) + (n - i) * math.log1p(-p)
    return float(np.exp(log).sum())


def inverted(n, k, delta):
    low, high = 0.0, 1.0
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if tail(n, middle, k) > delta else (low, middle)
    return low


@pytest.mark.parametrize("delta", [0.5, 0.05, 0.01, 1e-6])
@pytest.mark.parametrize(
    ("k", "n"), [(0, 1), (0, 10), (1, 2), (3, 10), (9, 10), (0, 10_000), (17, 10_000), (999, 1000)]
)
def test_the_bound_inverts_the_binomial_tail(k, n, delta):
    assert agreement_bound(k, n, delta).bound == pytest.approx(inverted(n, k, delta), rel=1e-9)


def test_no_disagreement_and_nothing_else():
    assert agreement_bound(0, 50, 0.05).bound == pytest.approx(1 - 0.05 ** (1 / 50), rel=1e-12)
    certificate = agreement_bound(50, 50, 0.05)
    assert certificate.bound == 1.0
    assert certificate.vacuous


def test_the_bound_covers_every_rate_with_the_stated_probability():
    """Exact coverage, not a simulation: the sum of the binomial weights of the k whose bound is below p."""
    n, delta = 60, 0.05
    bounds = np.array([agreement_bound(k, n, delta).bound for k in range(n + 1)])
    assert (np.diff(bounds) > 0).all()
    nearest = 1.0
    for p in np.concatenate([np.linspace(0.001, 0.999, 331), bounds[:-1] - 1e-9]):
        weights = np.diff([0.0] + [tail(n, p, k) for k in range(n + 1)])
        miss = weights[bounds < p].sum()
        assert miss <= delta * (1 + 1e-9)
        nearest = min(nearest, delta - miss)
    assert nearest < 1e-4 * delta + 1e-3  # it is nowhere far looser than stated: some rate is missed with nearly δ


def test_simulated_coverage():
    draw = np.random.default_rng(0)
    for p in (0.003, 0.05, 0.4):
        k = draw.binomial(200, p, size=4000)
        bounds = {int(value): agreement_bound(int(value), 200, 0.1).bound for value in np.unique(k)}
        missed = np.mean([bounds[int(value)] < p for value in k])
        assert missed <= 0.1 + 4 * math.sqrt(0.1 * 0.9 / 4000)


def test_the_certificate_says_what_it_is():
    certificate = agreement_bound(2, 1000, 0.01, trivial=0.9, source="the user's samples")
    assert (certificate.theorem, certificate.kind, certificate.delta) == ("T11", "sampled", 0.01)
    assert certificate.trivial == 0.9
    assert not certificate.vacuous
    assert "the user's samples" in certificate.statement
    assert f"{math.floor((1 - certificate.bound) * 1e6) / 1e6:.6f}" in certificate.statement
    assert agreement_bound(950, 1000, trivial=0.9).vacuous


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((-1, 10), "disagreements"),
        ((0, 0), "queries"),
        ((11, 10), "only 10"),
        ((1.5, 10), "whole number"),
        ((True, 10), "whole number"),
        ((1, 10, 0.0), "delta"),
        ((1, 10, 1.0), "delta"),
        ((1, 10, float("nan")), "delta"),
    ],
)
def test_bad_counts_are_refused(arguments, message):
    with pytest.raises(InputError, match=message):
        agreement_bound(*arguments)


def test_a_bad_trivial_rate_is_refused():
    with pytest.raises(InputError, match="trivial"):
        agreement_bound(1, 10, trivial=1.5)


def test_a_choice_among_several_networks_is_paid_for():
    one, three = agreement_bound(3, 40, 0.05), agreement_bound(3, 40, 0.05, candidates=3)
    assert three.bound == pytest.approx(inverted(40, 3, 0.05 / 3), rel=1e-9)
    assert three.bound > one.bound
    assert three.delta == 0.05
    assert "the choice among 3 is accounted for" in three.assumptions[1]
    with pytest.raises(InputError, match="candidates must be a whole number"):
        agreement_bound(3, 40, 0.05, candidates=0)


def test_the_chosen_network_keeps_the_promise():
    """The best of 20 useless networks on 30 queries looks good; the bound with 20 candidates still holds."""
    generator = np.random.default_rng(0)
    p, networks, queries, rounds = 0.3, 20, 30, 2000
    wrong = generator.binomial(queries, p, (rounds, networks)).min(axis=1)
    bounds = {k: agreement_bound(int(k), queries, 0.1, candidates=networks).bound for k in set(wrong.tolist())}
    alone = {k: agreement_bound(int(k), queries, 0.1).bound for k in set(wrong.tolist())}
    assert np.mean([bounds[k] < p for k in wrong.tolist()]) <= 0.1
    assert np.mean([alone[k] < p for k in wrong.tolist()]) > 0.3  # without it, the promise is broken
