"""T19: the whole procedure, repeated; and what it looks at."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from coreprune.errors import InputError
from coreprune.risk import fixed_sequence, upper_bound


def path(rng: np.random.Generator, risks: np.ndarray, n: int, binary: bool) -> list:
    """Nested models on the same samples: a sample that a model loses is lost by all smaller ones."""
    u = torch.tensor(rng.random(n))
    size = torch.tensor(rng.random(n)) if not binary else torch.ones(n)
    found = [u < (risk if binary else 2 * risk) for risk in risks]  # half of a lost sample is lost on average
    return [lambda lost=lost: lost if binary else lost.double() * size for lost in found]


@pytest.mark.parametrize("binary", [True, False])
@pytest.mark.parametrize("risks", [np.linspace(0.02, 0.4, 20), np.array([0.05, 0.101, 0.102, 0.3]), np.array([0.101])])
def test_the_level_is_violated_in_at_most_a_share_delta_of_repetitions(binary, risks):
    """The samples are drawn anew, and the whole procedure runs, 500 times. Even where many steps lie just above."""
    rng, level, delta, repeats = np.random.default_rng(7), 0.1, 0.1, 500
    chosen = [fixed_sequence(path(rng, risks, 120, binary), level, delta).chosen for _ in range(repeats)]
    violated = np.mean([c is not None and risks[c] > level for c in chosen])
    assert violated <= delta + 3 * math.sqrt(delta * (1 - delta) / repeats)
    if len(risks) == 20 and binary:
        assert np.mean([c is not None and risks[c] > 0.03 for c in chosen]) > 0.5  # it is of use, too


def test_it_stops_at_the_first_that_fails_and_looks_no_further():
    asked = []

    def model(k, lost):
        return lambda: asked.append(k) or (torch.arange(200) < lost)

    found = fixed_sequence([model(0, 0), model(1, 3), model(2, 90), model(3, 0)], 0.1, 0.05)
    assert asked == [0, 1, 2]
    assert found.chosen == 1
    assert [step.passed for step in found.steps] == [True, True, False]
    assert found.steps[1].bound == upper_bound(torch.arange(200) < 3, 0.05)
    assert found.steps[2].risk == pytest.approx(0.45)


def test_if_the_first_fails_none_is_chosen():
    assert fixed_sequence([lambda: torch.ones(5, dtype=torch.bool)], 0.5).chosen is None
    assert fixed_sequence([], 0.5).steps == ()
    with pytest.raises(InputError, match="level"):
        fixed_sequence([], 1.0)
