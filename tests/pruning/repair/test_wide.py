"""Layers with more features than least squares can take: a map between channels, or the span of the rows."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from coreprune import Budget, prune
from coreprune.pruning.calibration.sites import Collect
from coreprune.pruning.repair import fit, refit
from coreprune.pruning.repair.options import Repair
from features import normal
from graph.zoo import randomise

PLAIN = Repair(descent=False)


def convolutions(bias=True, groups=1):
    return randomise(
        nn.Sequential(
            nn.Conv2d(3, 12, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(12, 8, 3, padding=1, bias=bias, groups=groups),
            nn.Flatten(),
            nn.Linear(8 * 36, 5),
        )
    )


def images(n, seed=0):
    """Smooth ones, so that neighbouring positions are alike."""
    small = torch.randn(n, 3, 3, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return nn.functional.interpolate(small, size=(6, 6), mode="bilinear")


def loss(model, small, x):
    with torch.no_grad():
        y = model(x)
        return float((small(x) - y).square().mean() / y.var(correction=0))


def pruned(model, x, repair=PLAIN, **more):
    arguments = {"budget": Budget(keep=0.5), "method": "magnitude", "queries": x, "compare": False}
    return prune(model, x[:1], repair=repair, exclude=("2",), **{**arguments, **more})


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("bias", [True, False])
def test_a_wide_convolution_gets_better_without_its_patches(monkeypatch, bias, groups):
    model, x, unseen = convolutions(bias, groups), images(64), images(200, 1)
    monkeypatch.setattr(refit, "WIDEST", 0)
    only = Repair(descent=False, producers=False)
    before, after = (loss(model, pruned(model, x, repair).model, unseen) for repair in (False, only))
    assert after < 0.9 * before


def test_the_weights_are_those_of_the_original_behind_one_map_between_channels(monkeypatch):
    """Recomputed from the activations: the map by ridge regression of all channels on the kept ones, tap by tap."""
    model, x = convolutions(), images(40)
    monkeypatch.setattr(refit, "WIDEST", 0)
    small = pruned(model, x, Repair(ridge=1e-3, rows=1 << 20, descent=False, producers=False)).model
    kept = [int((model[0].weight == row).flatten(1).all(1).nonzero()[0, 0]) for row in small[0].weight]
    with torch.no_grad():
        patches = nn.functional.unfold(model[:2](x[:40]), 3, padding=1)
    taps = patches.reshape(len(x), 12, 9, -1).permute(0, 3, 2, 1).reshape(-1, 12).numpy()
    # A quarter of the 40 samples, and at least 16, were held back; which ones is random, so the map is only close.
    centred = taps - taps.mean(axis=0)
    second = centred.T @ centred / len(taps)
    lam = 1e-3 * np.trace(second[np.ix_(kept, kept)]) / len(kept)
    start = np.eye(12)[:, kept]
    system = second[np.ix_(kept, kept)] + lam * np.eye(len(kept))
    into = start + (second[:, kept] - start @ second[np.ix_(kept, kept)]) @ np.linalg.inv(system)
    expected = np.einsum("ocxy,ck->okxy", model[2].weight.detach().numpy(), into)
    found = small[2].weight.detach().numpy()
    assert np.abs(found - expected).max() < 0.15 * np.abs(expected).max()
    # Exactly: all weights come from one map, so stacked they have rank at most 12 in the original's weights.
    original = np.moveaxis(model[2].weight.detach().numpy(), 1, -1).reshape(-1, 12)
    new = np.moveaxis(found, 1, -1).reshape(-1, len(kept))
    solved = np.linalg.lstsq(original, new, rcond=None)[0]
    assert np.abs(original @ solved - new).max() < 1e-9


def test_channels_that_are_multiples_of_others_cost_nothing(monkeypatch):
    model, x = convolutions(), images(40)
    with torch.no_grad():
        model[0].weight[6:] = 0.5 * model[0].weight[:6]
        model[0].bias[6:] = 0.5 * model[0].bias[:6]
    monkeypatch.setattr(refit, "WIDEST", 0)
    repair = Repair(ridge=1e-9, descent=False)
    assert loss(model, pruned(model, x, False).model, images(50, 2)) > 0.01
    assert loss(model, pruned(model, x, repair).model, images(50, 2)) < 1e-6


def test_a_large_ridge_leaves_the_weights_of_the_cut(monkeypatch):
    model, x = convolutions(), images(40)
    monkeypatch.setattr(refit, "WIDEST", 0)
    plain, held = (pruned(model, x, repair).model[2] for repair in (False, Repair(ridge=1e9, descent=False)))
    torch.testing.assert_close(held.weight, plain.weight)


@pytest.mark.parametrize("rounds", [None, 3])
@pytest.mark.parametrize("ridge", [1e-3, 0.5, None])
def test_more_features_than_rows_give_the_same_fit_in_the_span_of_the_rows(monkeypatch, rounds, ridge):
    x = [normal(6, 40)[None] for _ in range(2)]
    x[1] = x[1].flip(2) + 1
    y = [torch.einsum("grf,of->gor", each, normal(3, 40)) for each in x]
    batches = [(a, b, torch.zeros_like(b)) for a, b in zip(x, y, strict=True)]
    start, bias, worth = normal(3, 40)[None].flip(2), torch.zeros(1, 3).double(), torch.ones(1, 3).double()

    def found():
        return fit.fitted(batches, start, bias, worth, intercept=True, ridge=ridge, rounds=rounds)

    plain = found()
    monkeypatch.setattr(fit, "_MANY", 20)
    again = found()
    assert plain is not None
    assert again is not None
    torch.testing.assert_close(again.weight, plain.weight)
    torch.testing.assert_close(again.bias, plain.bias)
    assert (again.before, again.after) == pytest.approx((plain.before, plain.after))


def test_the_curve_of_a_wide_convolution_is_that_of_whole_patches(monkeypatch):
    """Of channels alone it was too low, because errors at neighbouring positions add up."""
    model, x = convolutions(), images(120)
    with torch.no_grad():  # taps of a kernel are often alike
        model[2].weight.copy_(model[2].weight.mean(dim=(2, 3), keepdim=True) + 0.2 * model[2].weight)
    monkeypatch.setattr("coreprune.pruning.stages.Collect", lambda: Collect(worth=False))
    exact = pruned(model, x, False, budget=Budget(macs=0.7)).report.as_dict()["groups"][0]
    monkeypatch.setattr("coreprune.pruning.stages.Collect", lambda: Collect(worth=False, features=20))
    near = pruned(model, x, False, budget=Budget(macs=0.7)).report.as_dict()["groups"][0]
    monkeypatch.setattr("coreprune.pruning.plans.error_curves.over_patches", lambda *_: 1.0)
    low = pruned(model, x, False, budget=Budget(macs=0.7)).report.as_dict()["groups"][0]
    for k in range(1, 12):  # a map between channels is one choice of the weights, so its error bounds the least
        assert near["errors"][k] >= 0.98 * exact["errors"][k]
    assert sum(low["errors"][k] < 0.98 * exact["errors"][k] for k in range(1, 12)) > 5
