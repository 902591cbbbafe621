"""The selector of T4″: which program runs for which layer, and what the draws follow."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import nn

from coreprune import Budget
from coreprune.pruning.selectors import sampling
from coreprune.selectors import Cone, Norm
from layers_by_hand import cut, layer, seeded
from oracles import sensitivity_lp


def exact(given, one_sided: bool, never: list[bool]) -> torch.Tensor:
    rows = given.outgoing_sizes[:, None] * given.effective
    found = [sensitivity_lp(rows, i, one_sided, torch.tensor(never)) for i in range(len(rows))]
    return torch.tensor(found, dtype=torch.float64)


@pytest.mark.parametrize(("act", "one_sided"), [("relu", True), ("unknown", True), ("gelu", False), ("tanh", False)])
@pytest.mark.parametrize("never", [None, [True] * 6, [True, True, False, False, True, True]])
def test_it_samples_by_the_sensitivities_over_the_inputs_of_the_layer(act, one_sided, never):
    given = layer(n=12, d=5, act=act)
    given = dataclasses.replace(given, nonnegative=None if never is None else torch.tensor(never))
    ranking = Cone()(given, seeded())
    wanted = exact(given, one_sided, [False] * 5 + [True] if never is None else never)
    assert torch.allclose(ranking.scores, wanted, rtol=2e-3, atol=1e-6)
    assert torch.allclose(ranking.stream.probabilities, wanted / wanted.sum(), rtol=4e-3)
    assert ("one-sided" if one_sided else "two-sided") in ranking.note


def test_the_note_says_how_much_is_known_of_the_inputs():
    given = layer(n=12, d=20, act="relu")
    known = dataclasses.replace(given, incoming=given.incoming.abs(), nonnegative=torch.ones(21, dtype=torch.bool))
    assert "none of which is negative" in Cone()(known, seeded()).note
    note = Cone()(given, seeded()).note
    assert "1 of which are never negative" in note
    assert "uniform sampling (T7)" in note


def test_layers_whose_programs_would_take_too_long_are_sampled_by_norm(monkeypatch):
    given = layer(n=12, d=5)
    monkeypatch.setattr(sampling, "_MOST_WORK", 12**3 * 18 - 1)
    found, norm = Cone()(given, seeded(3)), Norm()(given, seeded(3))
    assert found.order.equal(norm.order)
    assert "too large" in found.note
    monkeypatch.setattr(sampling, "_MOST_WORK", 12**3 * 18)
    assert "too large" not in Cone()(given, seeded(3)).note


def test_behind_a_relu_it_tells_channels_apart_where_the_papers_bound_does_not():
    """The second layer has more inputs than channels: over all inputs every sensitivity is 1."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 30), nn.ReLU(), nn.Linear(30, 12), nn.ReLU(), nn.Linear(12, 4)).eval()
    with torch.no_grad():
        model[2].weight.abs_()
    result = cut(model, torch.zeros(1, 6), Budget(keep=0.5), "cone")
    first, second = result.report.groups[:2]
    assert "1 of which are never negative" in first.note
    assert "none of which is negative" in second.note
    assert float(result.rankings["2"].scores.max()) < 0.5
    assert {c.theorem for c in second.certificates} == {"T6", "T8"}
