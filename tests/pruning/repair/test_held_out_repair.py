"""The ridge of a repair is chosen on queries that the refit has not seen, and what gets worse is not written."""

from __future__ import annotations

import torch
from torch import nn

from coreprune import Budget, prune
from coreprune.coreset.cross_validation import Checked
from coreprune.pruning.repair import fit
from coreprune.pruning.repair.options import Repair
from features import normal
from graph.zoo import randomise


def wide(width=150):
    return randomise(nn.Sequential(nn.Linear(6, width), nn.ReLU(), nn.Linear(width, 12)))


def loss(model, small, n=2000):
    x = torch.randn(n, 6, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    with torch.no_grad():
        y = model(x)
        return float((small(x) - y).square().mean() / y.var(correction=0))


def repaired(model, x, repair):
    return prune(model, x[:1], Budget(keep=0.3), "magnitude", queries=x, repair=repair, compare=False).model


def test_few_queries_get_a_large_ridge_and_many_a_small_one(monkeypatch):
    model, ridges, real = wide(), {}, fit.checked
    for n in (20, 200, 4000):
        found = []
        monkeypatch.setattr(fit, "checked", lambda *a, to=found: to.append(real(*a)) or to[-1])
        repaired(model, normal(n, 6), Repair(descent=False))
        ridges[n] = found[0].ridge
    assert ridges[20] > ridges[200] >= ridges[4000]


def test_it_is_no_worse_than_a_fixed_ridge_on_other_queries():
    model = wide()
    for n in (20, 60, 400):
        x = normal(n, 6)
        chosen = loss(model, repaired(model, x, Repair(descent=False)))
        fixed = [loss(model, repaired(model, x, Repair(ridge=ridge, descent=False))) for ridge in (1e-3, 1e-1)]
        assert chosen < 1.25 * min(fixed)
        assert chosen < loss(model, repaired(model, x, False))


def test_outputs_that_get_worse_keep_their_weights_and_bias(monkeypatch):
    model, x, real = wide(), normal(60, 6), fit.checked

    def half(*args):
        found = real(*args)
        after = found.after.clone()
        after[:, ::2] = found.before[:, ::2] + 1
        return Checked(found.ridge, found.before, after)

    monkeypatch.setattr(fit, "checked", half)
    small, plain = repaired(model, x, Repair(descent=False)), repaired(model, x, False)
    same = (small[2].weight == plain[2].weight).all(dim=1) & (small[2].bias == plain[2].bias)
    assert same[::2].all()
    assert not same[1::2].any()


def test_the_errors_of_a_report_are_shares_of_the_variance():
    """They were absolute, and two-sided where only a ReLU reads: "621 % → 650 %" on a healthy network."""
    model = randomise(nn.Sequential(nn.Linear(6, 40), nn.ReLU(), nn.Linear(40, 30), nn.ReLU(), nn.Linear(30, 5)))
    model[2].weight.data *= 100  # a scale changes nothing
    model[2].bias.data.zero_().sub_(50)  # most outputs are cut off
    result = prune(model, normal(1, 6), Budget(keep=0.8), queries=normal(400, 6), compare=False)
    gated = next(one for one in result.report.refits if one.weight == "2.weight")
    assert 0 <= gated.after < gated.before < 1
