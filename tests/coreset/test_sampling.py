"""Sampling: exact in distribution, unbiased, nested, with the sizes that were asked for."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from coreprune.coreset import draw_stream, from_stream, sample
from coreprune.errors import InputError


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


IMPORTANCE = torch.tensor([5.0, 1.0, 0.0, 2.0, 0.5, 1.5], dtype=torch.float64)


def scattered(coreset, n: int) -> torch.Tensor:
    out = torch.zeros(n, dtype=torch.float64)
    out[coreset.indices] = coreset.weights
    return out


@pytest.mark.parametrize("replacement", [True, False])
def test_factors_are_unbiased(replacement):
    """The mean factor of every channel that can be drawn is 1, within five standard errors."""
    m = 4 if replacement else 3
    factors = torch.stack(
        [scattered(sample(IMPORTANCE, m, seeded(s), unit="draws", replacement=replacement), 6) for s in range(4000)]
    )
    live = IMPORTANCE > 0
    error = factors.std(dim=0) / len(factors) ** 0.5
    assert bool(((factors.mean(dim=0) - 1).abs() <= 5 * error + 1e-9)[live].all())
    assert float(factors[:, ~live].abs().max()) == 0


@pytest.mark.parametrize("m", [1, 2, 4])
def test_factors_of_a_stopped_sample_are_counts_over_draws_and_probabilities(m):
    """n_k/(draws·q_k), not over the number of distinct channels: the counts add up to all draws, and one came last."""
    q = IMPORTANCE / IMPORTANCE.sum()
    repeats = 0
    for seed in range(20):
        coreset = sample(IMPORTANCE, m, seeded(seed))
        counts = coreset.weights * coreset.draws * q[coreset.indices]
        assert counts.tolist() == pytest.approx(counts.round().tolist(), abs=1e-9)
        assert float(counts.sum()) == pytest.approx(coreset.draws)
        assert int(counts.round().min()) == 1
        repeats += coreset.draws - m
    assert repeats > 0 or m == 1


def test_stream_has_the_distribution_of_naive_draws():
    """Order, number of draws and counts at 3 distinct items, against a loop that really draws."""
    q = (IMPORTANCE / IMPORTANCE.sum()).numpy()
    rng = np.random.default_rng(0)
    naive, ours = [], []
    for s in range(4000):
        counts, draws = np.zeros(6), 0
        while (counts > 0).sum() < 3:
            counts[rng.choice(6, p=q)] += 1
            draws += 1
        naive.append([draws, *counts])
        stream = draw_stream(IMPORTANCE, seeded(s))
        found, total = stream.cut(3)
        row = np.zeros(6)
        row[stream.order[:3].numpy()] = found.numpy()
        ours.append([total, *row])
    naive, ours = np.array(naive), np.array(ours)
    error = np.sqrt((naive.var(0) + ours.var(0)) / len(naive))
    assert np.all(np.abs(naive.mean(0) - ours.mean(0)) <= 5 * error + 1e-9)
    assert np.isclose(naive[:, 0].std(), ours[:, 0].std(), rtol=0.1)


@given(n=st.integers(1, 40), seed=st.integers(0, 10**6), decades=st.sampled_from([0, 3, 12]))
@settings(max_examples=30)
def test_nested_and_exactly_as_many_distinct_channels_as_asked(n, seed, decades):
    importance = torch.logspace(-decades, 0, n, dtype=torch.float64)
    stream = draw_stream(importance, seeded(seed))
    before: set[int] = set()
    for k in range(1, n + 1):
        coreset = from_stream(stream, k, n)
        now = set(coreset.indices.tolist())
        assert len(now) == k
        assert before < now
        assert bool((coreset.weights > 0).all())
        assert bool(torch.isfinite(coreset.weights).all())
        before = now
    assert coreset.weights.tolist() == [1.0] * n, "all channels: nothing is estimated"


def test_dead_channels_are_only_taken_when_nothing_else_is_left():
    coreset = sample(IMPORTANCE, 5, seeded(0))
    assert 2 not in coreset.indices.tolist()
    assert sample(IMPORTANCE, 6, seeded(0)).indices.tolist() == list(range(6))


@pytest.mark.parametrize("replacement", [True, False])
def test_sign_split_keeps_the_signs_apart_and_is_unbiased(replacement, gen):
    outgoing = torch.randn(3, 5, generator=gen, dtype=torch.float64)
    both = torch.stack([outgoing.clamp(min=0).amax(dim=0), (-outgoing).clamp(min=0).amax(dim=0)])
    total = torch.zeros(3, 5, dtype=torch.float64)
    trials = 4000
    for s in range(trials):
        coreset = sample(both, 3, seeded(s), unit="draws", sign_split=True, replacement=replacement)
        new = coreset.outgoing(outgoing)
        assert bool((new * outgoing[:, coreset.indices] >= 0).all())
        total[:, coreset.indices] += new
    assert torch.allclose(total / trials, outgoing, atol=0.12)
    assert sample(both, 3, seeded(1), sign_split=True).indices.numel() == 3


def test_same_seed_same_coreset_and_global_seed_untouched():
    state = torch.get_rng_state()
    one, two = sample(IMPORTANCE, 3, seeded(7)), sample(IMPORTANCE, 3, seeded(7))
    assert torch.equal(one.indices, two.indices)
    assert torch.equal(one.weights, two.weights)
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize(
    ("importance", "m", "kwargs", "message"),
    [
        (IMPORTANCE, 0, {}, "≥ 1"),
        (IMPORTANCE, 7, {}, "only 6"),
        (IMPORTANCE, 2.5, {}, "whole number"),
        (IMPORTANCE, True, {}, "whole number"),
        (IMPORTANCE, 2, {"unit": "channels"}, "known: distinct, draws"),
        (-IMPORTANCE, 2, {}, "≥ 0"),
        (IMPORTANCE * float("nan"), 2, {}, "finite"),
        (IMPORTANCE * 0, 2, {}, "nothing to sample by"),
        (IMPORTANCE, 2, {"sign_split": True}, r"shape \(2, n\)"),
        (IMPORTANCE[None], 2, {}, r"shape \(n,\)"),
    ],
)
def test_wrong_input_is_explained(unchecked, importance, m, kwargs, message):
    with pytest.raises(InputError, match=message):
        sample(importance, m, seeded(0), **kwargs)


def test_a_number_seeds_as_a_generator_with_it_does(unchecked):
    by_number, by_generator = sample(IMPORTANCE, 2, 3), sample(IMPORTANCE, 2, seeded(3))
    assert torch.equal(by_number.indices, by_generator.indices)
    assert torch.equal(by_number.weights, by_generator.weights)
    assert torch.equal(draw_stream(IMPORTANCE, 3).order, draw_stream(IMPORTANCE, seeded(3)).order)
    for seed in (0.5, -1, None):
        with pytest.raises(InputError, match="seed must"):
            sample(IMPORTANCE, 2, seed)  # type: ignore[arg-type]
