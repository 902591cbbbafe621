"""The functional selector swaps units where little stays, and only if unseen queries agree."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from coreprune import Budget, prune
from coreprune.pruning.selectors import functional
from coreprune.selectors import Functional
from features import normal
from graph.zoo import randomise

UNITS = 40


def mlp():
    return randomise(nn.Sequential(nn.Linear(6, UNITS), nn.ReLU(), nn.Linear(UNITS, 12)), seed=3)


def pruned(model, keep, exchange=True):
    x = normal(400, 6)
    return prune(model, x[:1], Budget(keep=keep), Functional(exchange=exchange), queries=x, compare=False, repair=False)


def refitted(model, kept):
    """The error of the best refit on the kept units, on many inputs, as a share of the variance."""
    with torch.no_grad():
        hidden = model[:2](normal(4000, 6, seed=3))
        y = model[2](hidden)
    a = torch.cat([hidden[:, list(kept)], torch.ones(len(hidden), 1)], dim=1)
    return float((y - a @ torch.linalg.lstsq(a, y).solution).square().sum() / (y - y.mean(0)).square().sum())


def kept(result):
    return result.plan.groups["0"].kept


def test_it_finds_better_units_where_little_stays():
    model = mlp()
    plain, swapped = pruned(model, 0.1, exchange=False), pruned(model, 0.1)
    assert len(kept(swapped)) == len(kept(plain)) == 4
    assert refitted(model, kept(swapped)) < refitted(model, kept(plain))


def test_the_certificate_is_about_the_units_that_stay():
    model = mlp()
    result = pruned(model, 0.1)
    assert kept(result) != kept(pruned(model, 0.1, exchange=False))
    group = next(g for g in result.report.groups if g.name == "0")
    (found,) = [c for c in group.certificates if c.theorem == "T10"]
    with torch.no_grad():  # measured on the 300 of the 400 queries that were not held back
        share = found.bound / found.trivial
    assert refitted(model, kept(result)) == pytest.approx(share, rel=0.25)
    plain = next(g for g in pruned(model, 0.1, exchange=False).report.groups if g.name == "0")
    assert found.bound < next(c for c in plain.certificates if c.theorem == "T10").bound


def test_a_swap_that_unseen_queries_do_not_confirm_is_not_made(monkeypatch):
    model = mlp()
    plain = kept(pruned(model, 0.1, exchange=False))
    other = torch.tensor([u for u in range(UNITS) if u not in plain][:4])
    monkeypatch.setattr(functional, "exchanged", lambda *_, **__: other)
    assert kept(pruned(model, 0.1)) == plain


def test_where_much_stays_nothing_is_swapped(monkeypatch):
    monkeypatch.setattr(functional, "exchanged", None)  # a call would raise
    assert len(kept(pruned(mlp(), 0.3))) == 12
