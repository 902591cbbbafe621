"""A budget that removes almost nothing says so, with the reasons."""

from __future__ import annotations

import logging

import pytest
import torch
from torch import nn

from coreprune import Budget, prune
from coreprune.pruning.reporting.little import little
from coreprune.pruning.reporting.report import GroupReport


def norms() -> nn.Module:
    """Nearly all MACs are in layers before a layer norm."""
    layers = [nn.Linear(8, 32), nn.LayerNorm(32), nn.ReLU(), nn.Linear(32, 64), nn.LayerNorm(64), nn.Linear(64, 6)]
    return nn.Sequential(*layers, nn.ReLU(), nn.Linear(6, 5)).eval()


def units() -> nn.Module:
    """Two units of 16 channels."""
    return nn.Sequential(nn.Conv2d(3, 32, 3), nn.GroupNorm(2, 32), nn.ReLU(), nn.Conv2d(32, 5, 1)).eval()


def test_locked_groups_that_hold_most_of_the_macs_are_named(caplog):
    with caplog.at_level(logging.WARNING, "coreprune"):
        report = prune(norms(), torch.randn(2, 8), Budget(keep=0.5), queries=None).report
    assert "almost nothing was removed" in caplog.text
    (note,) = report.notes
    assert "only 12.7% of them" in note
    assert "84.8%, its channels enter the statistics of a norm (0 and 1 more)" in note
    assert note in str(report)
    assert note in report._repr_html_()
    assert report.as_dict()["notes"] == [note]


def test_units_that_are_too_wide_are_named():
    (note,) = prune(units(), torch.randn(2, 3, 8, 8), Budget(keep=0.8), queries=None).report.notes
    assert "although 50.0% of them" in note
    assert "all of its 2 units of 16 channels (0)" in note


@pytest.mark.parametrize("budget", [Budget(keep=0.5), Budget(keep=1.0), Budget(macs=0.9), Budget(keep={"0": 0.5})])
def test_nothing_is_said_where_the_budget_did_what_it_says(budget, caplog):
    with caplog.at_level(logging.WARNING, "coreprune"):
        report = prune(units(), torch.randn(2, 3, 8, 8), budget, queries=None).report
    assert not report.notes
    assert "almost nothing" not in caplog.text


def rows(*macs: tuple[str | None, int]) -> list[GroupReport]:
    return [GroupReport(f"g{i}", 8, 8, locked_because=why, macs=(n, n)) for i, (why, n) in enumerate(macs)]


def test_reasons_are_added_up_without_the_place_in_the_graph():
    groups = rows(("a norm (norm_1)", 30), ("model output", 40), ("a norm (norm_2)", 20), (None, 10))
    told = little(Budget(keep=0.5), groups, (100, 100), 0.1)
    assert told.index("50.0%, a norm (g0 and 1 more)") < told.index("40.0%, model output (g1)")
    assert told.index("40.0%") < told.index("10.0%, the budget keeps all of its 8 units of 1 channels (g3)")


@pytest.mark.parametrize(
    ("keep", "after", "free", "said"),
    [
        (0.5, 70, 0.9, False),
        (0.5, 95, 0.9, True),  # a tenth of the half that was asked for
        (0.5, 85, 0.15, True),
        (0.99, 99, 0.9, False),
        ({"g0": 0.5}, 95, 0.9, False),  # the caller named the groups
        ({"g0": 0.9}, 100, 0.9, True),
        (1, 100, 0.0, False),
    ],
)
def test_how_little_is_too_little(keep, after, free, said):
    assert bool(little(Budget(keep=keep), rows(("locked", 50)), (100, after), free)) == said
