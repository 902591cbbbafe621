"""Weights as initialisation leaves them are told from trained ones."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from coreprune._untrained import _one_scale, untrained
from graph.zoo import gen


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(20, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 16))


def trained_for(steps: int) -> nn.Sequential:
    torch.manual_seed(0)
    model, teacher, g = mlp(), torch.randn(20, 16, generator=gen(1)), gen(2)
    adam = torch.optim.Adam(model.parameters(), 3e-3)
    for _ in range(steps):
        x = torch.randn(64, 20, generator=g)
        loss = nn.functional.cross_entropy(model(x), (x @ teacher).argmax(1))
        adam.zero_grad()
        loss.backward()
        adam.step()
    return model


INITIALISATIONS = {
    "as it comes": lambda _: None,
    "kaiming normal": nn.init.kaiming_normal_,
    "xavier uniform": nn.init.xavier_uniform_,
    "truncated normal": lambda w: nn.init.trunc_normal_(w, std=0.02),
    "orthogonal": nn.init.orthogonal_,
    "sparse": lambda w: w.data.mul_(torch.rand(w.shape, generator=gen(3)) < 0.5),
    "heavy tails": lambda w: w.data.copy_(torch.empty(w.shape).exponential_(generator=gen(4))),
}


@pytest.mark.parametrize("name", INITIALISATIONS)
def test_whatever_distribution_the_entries_are_drawn_from(name):
    for seed in range(5):
        torch.manual_seed(seed)
        model = mlp()
        with torch.no_grad():
            for layer in model[::2]:
                INITIALISATIONS[name](layer.weight)
        assert untrained(model)


def test_training_shows():
    assert untrained(trained_for(0))
    assert not untrained(trained_for(600))


def test_batch_norms_show_training_by_their_statistics():
    model = nn.Sequential(nn.Conv2d(3, 32, 3), nn.BatchNorm2d(32), nn.Conv2d(32, 32, 3))
    assert untrained(model)
    model(torch.randn(4, 3, 8, 8))
    assert not untrained(model)
    without = nn.Sequential(nn.Conv2d(3, 32, 3), nn.BatchNorm2d(32, track_running_stats=False), nn.Conv2d(32, 32, 3))
    assert untrained(without)


def test_scaling_a_few_outputs_shows():
    torch.manual_seed(0)
    rows = torch.randn(64, 256, dtype=torch.float64)
    assert _one_scale(rows)
    assert not _one_scale(rows * torch.linspace(0.5, 1.5, 64, dtype=torch.float64)[:, None])


def test_the_variance_of_row_variances():
    """The formula, against many drawn matrices."""
    g, n = gen(5), 24
    rows = torch.rand(200_000, n, generator=g, dtype=torch.float64)
    variance, kurtosis = 1 / 12, 1.8  # of the uniform distribution
    expected = variance**2 * (kurtosis - (n - 3) / (n - 1)) / n
    assert math.isclose(float(rows.var(1).var()), expected, rel_tol=0.02)


@pytest.mark.parametrize("model", [nn.Linear(3, 2), nn.ReLU(), nn.Conv2d(1, 1, 3)])
def test_too_small_to_tell(model):
    assert not untrained(model)
