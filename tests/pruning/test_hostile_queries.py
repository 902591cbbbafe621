"""Queries that say little or nothing: the result is at worst the cut without its repair, and a warning says so."""

from __future__ import annotations

import json
import logging
from itertools import pairwise

import pytest
import torch
from torch import nn

from coreprune import Budget, prune
from features import normal
from graph.zoo import randomise
from small_networks import bits


def wide_head(width=96) -> nn.Module:
    """A wide layer behind a global pooling: as many rows as queries, for many features."""
    return randomise(
        nn.Sequential(
            *(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU()),
            *(nn.Conv2d(8, width, 1), nn.BatchNorm2d(width), nn.ReLU()),
            *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 10)),
        )
    )


def images(n, seed=0):
    return (
        normal(n, 3, 8, 8)
        if seed == 0
        else torch.randn(n, 3, 8, 8, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    )


@torch.no_grad()
def loss(model, small, x):
    y = model(x)
    return float((small(x) - y).square().mean() / y.var(correction=0))


HOSTILE = {
    "one": lambda: images(1),
    "two equal": lambda: images(1).repeat(2, 1, 1, 1),
    "many equal": lambda: images(1).repeat(64, 1, 1, 1),
    "two": lambda: images(2),
    "zeros": lambda: torch.zeros(64, 3, 8, 8, dtype=torch.float64),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_the_result_is_the_cut_without_repair_and_a_warning_says_why(name, caplog):
    model = wide_head()
    before, x = bits(model), HOSTILE[name]()
    with caplog.at_level(logging.WARNING, "coreprune"):
        result = prune(model, x[:1], Budget(macs=0.6, uniform=True), "l2", queries=x, n_queries=len(x))
    plain = prune(model, x[:1], Budget(macs=0.6, uniform=True), "l2", queries=None, repair=False)
    assert result.plan == plain.plan
    assert bits(result.model) == bits(plain.model)
    assert result.report.refits == ()
    assert any("nothing can be checked" in record.message for record in caplog.records)
    assert bits(model) == before


@pytest.mark.parametrize("name", HOSTILE)
def test_made_queries_join_samples_that_are_too_few(name, caplog):
    model, x, unseen = calibrated(), HOSTILE[name](), images(400, seed=1)
    cut = {"budget": Budget(macs=0.6, uniform=True), "method": "l2", "compare": False}
    with caplog.at_level(logging.WARNING, "coreprune"):
        result = prune(model, x[:1], queries=x, **cut)
    assert any("queries are made beside them" in record.message for record in caplog.records)
    alone = prune(model, x[:1], queries=x, n_queries=len(x), **cut)
    without = prune(model, x[:1], **cut)
    assert loss(model, result.model, unseen) < 0.8 * loss(model, alone.model, unseen)
    assert loss(model, result.model, unseen) < 1.2 * loss(model, without.model, unseen)
    assert "without data" in result.report.queries
    assert "without data" not in alone.report.queries


def test_few_samples_of_a_model_that_takes_no_made_ones_are_used_alone(caplog):
    class Picky(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = wide_head()

        def forward(self, x):
            if not torch.compiler.is_compiling() and bool(((x < 0) | (x > 1)).any()):
                raise ValueError("pixels lie in [0, 1]")
            return self.net(x)

    model, x = Picky().eval(), torch.rand(6, 3, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    before = bits(model)
    with caplog.at_level(logging.WARNING, "coreprune"):
        result = prune(model, x[:1], Budget(macs=0.6), queries=x)
    assert any("pixels lie in" in record.message for record in caplog.records)
    assert "without data" not in result.report.queries
    assert bits(model) == before


def test_copies_are_left_out_and_counted(caplog):
    model, x = wide_head(), images(40)
    with caplog.at_level(logging.WARNING, "coreprune"):
        twice = prune(model, x[:1], Budget(macs=0.6), queries=torch.cat([x, x]))
    assert any("40 of 80 queries are copies" in record.message for record in caplog.records)
    assert bits(twice.model) == bits(prune(model, x[:1], Budget(macs=0.6), queries=x).model)


# Queries from another world


def calibrated():
    """A network whose batch norms have seen `images`."""
    model = wide_head().train()
    for norm in (m for m in model if isinstance(m, nn.BatchNorm2d)):
        norm.momentum = 1.0
    with torch.no_grad():
        model(images(200, seed=3))
    return model.eval()


FOREIGN = {
    "another scale": lambda x: 127 + 128 * x,
    "another mean": lambda x: x + 4,
    "nearly nothing": lambda x: 1e-3 * x,
}


@pytest.mark.parametrize("name", FOREIGN)
def test_queries_from_another_world_are_named_and_the_repair_is_no_worse_than_none(name, caplog):
    model, unseen = calibrated(), images(400, seed=1)
    x = FOREIGN[name](images(64, seed=2))
    cut = {"budget": Budget(macs=0.6, uniform=True), "method": "l2", "queries": x, "compare": False}
    with caplog.at_level(logging.WARNING, "coreprune"):
        result = prune(model, x[:1], **cut)
    assert any("do not look like what the model was trained on" in record.message for record in caplog.records)
    plain = prune(model, x[:1], **cut | {"repair": False})
    assert result.plan == plain.plan
    assert loss(model, result.model, unseen) <= loss(model, plain.model, unseen)
    assert name != "another scale" or result.report.refits == ()


def test_constant_images_do_no_harm():
    model, unseen = calibrated(), images(400, seed=1)
    x = images(64, seed=2)[:, :, :1, :1].expand(64, 3, 8, 8).clone()
    cut = {"budget": Budget(macs=0.6, uniform=True), "method": "l2", "queries": x, "compare": False}
    result, plain = prune(model, x[:1], **cut), prune(model, x[:1], **cut, repair=False)
    assert loss(model, result.model, unseen) <= loss(model, plain.model, unseen)


def test_queries_of_the_same_kind_are_not(caplog):
    model, x = calibrated(), images(64, seed=2)
    with caplog.at_level(logging.WARNING, "coreprune"):
        result = prune(model, x[:1], Budget(macs=0.6), queries=x)
    assert not any("do not look like" in record.message for record in caplog.records)
    assert "batch-norm statistics met to 0." in result.report.queries


class ByKeyword(nn.Module):
    """Its norm is called with a keyword, so that a hook sees no positional argument."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.Linear(16, 4)

    def forward(self, x):
        return self.head(torch.relu(self.norm(input=self.conv(x))).mean((2, 3)))


@pytest.mark.parametrize("queries", ["samples", "auto"])
def test_a_norm_that_is_called_by_keyword_is_measured(queries):
    """It raised IndexError: tuple index out of range."""
    model, x = randomise(ByKeyword()), images(40)
    asked = {"queries": x} if queries == "samples" else {"n_queries": 20}
    result = prune(model, x[:1], Budget(macs=0.6), **asked)
    assert "batch-norm statistics met to" in result.report.queries


def test_an_output_that_is_never_finite_is_left_out_and_named(caplog):
    """It raised "gram of reader 0 has a NaN entry in row 0. Remove that row first"."""

    class Logarithm(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.last = nn.Linear(6, 20), nn.Linear(20, 4)

        def forward(self, x):
            y = self.last(torch.relu(self.first(x)))
            return {"score": y, "log": torch.log(y - 1e9)}

    model, x = randomise(Logarithm()), normal(64, 6)
    with caplog.at_level(logging.WARNING, "coreprune"):
        result = prune(model, x[:1], Budget(macs=0.6), queries=x)
    json.loads(result.report.to_json(), parse_constant=pytest.fail)  # neither NaN nor Infinity, which are no JSON
    assert "error not finite" in str(result.report)
    assert any("an output of the model is not finite" in record.message for record in caplog.records)
    assert all(bool(torch.isfinite(p).all()) for p in result.model.parameters())
    y, small = model(x)["score"], result.model(x)["score"]
    assert float((y - small).square().mean() / y.var()) < 0.5


# A wide head, and more and more queries


def losses(counts, repair=True):
    model, unseen = wide_head(), images(500, seed=1)
    pool = images(max(counts), seed=2)
    found = []
    for n in counts:
        result = prune(model, pool[:1], Budget(macs=0.5), queries=pool[:n], repair=repair)
        found.append(loss(model, result.model, unseen))
    return found


def test_with_a_wide_head_the_loss_does_not_rise_as_queries_are_added():
    """The fault: k followed the number of rows, and the refit learned them by heart."""
    found = losses((16, 32, 64, 128, 256, 1024))
    assert all(more <= 1.1 * less for less, more in pairwise(found)), found
    assert found[-1] < 0.7 * found[0]


def test_sixteen_queries_are_not_worse_than_no_repair():
    model, unseen = wide_head(), images(500, seed=1)
    x = images(16, seed=2)
    result = prune(model, x[:1], Budget(macs=0.5), queries=x)
    plain = prune(model, x[:1], Budget(macs=0.5), "l2", queries=None, repair=False)
    assert loss(model, result.model, unseen) <= loss(model, plain.model, unseen)
