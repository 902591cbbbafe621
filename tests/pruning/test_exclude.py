"""exclude=: groups that the caller wants whole."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from coreprune import Budget, BudgetError, InputError, Plan, apply_plan, make_plan, prune
from small_networks import bits

pytestmark = pytest.mark.usefixtures("unchecked")
EXAMPLE = torch.randn(2, 8, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    """Groups stem, body.0 and body.1; the head is the output."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(8, 16)
        self.body = nn.ModuleList([nn.Linear(16, 12), nn.Linear(12, 10)])
        self.head = nn.Linear(10, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x).relu()
        for layer in self.body:
            x = layer(x).relu()
        return self.head(x)


def net() -> Net:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Net().eval()


def quick(exclude: Any, budget: Budget | None = None) -> Any:
    return prune(net(), EXAMPLE, budget or Budget(keep=0.5), "magnitude", queries=None, exclude=exclude)


@pytest.mark.parametrize(
    ("exclude", "whole"),
    [
        ((), set()),
        (("stem",), {"stem"}),
        ("stem", {"stem"}),
        (["body.*"], {"body.0", "body.1"}),
        (("body.?", "stem"), {"stem", "body.0", "body.1"}),
        (("*1",), {"body.1"}),
        ({"body.[0]"}, {"body.0"}),
    ],
)
def test_groups_that_match_stay_whole(exclude: Any, whole: set[str]) -> None:
    if len(whole) == 3:
        with pytest.raises(BudgetError, match=r"no group of channels is free to leave .*excluded by the caller"):
            quick(exclude)
        return
    result = quick(exclude)
    assert set(result.plan.groups) == {"stem", "body.0", "body.1"} - whole
    rows = {g.name: g for g in result.report.groups}
    for name in ("stem", "body.0", "body.1"):
        assert (rows[name].kept == rows[name].channels) == (name in whole)
        assert ("excluded by the caller (pattern " in (rows[name].locked_because or "")) == (name in whole)
    assert result.report.settings.exclude == ((exclude,) if isinstance(exclude, str) else tuple(exclude))
    assert result.model.stem.out_features == (16 if "stem" in whole else 8)


def test_the_reason_names_the_pattern_and_an_output_keeps_its_own() -> None:
    report = quick(("body*", "head")).report
    assert report.locked["body.0"] == "excluded by the caller (pattern 'body*')"
    assert report.locked["head"] == "model output"


def test_a_cost_budget_is_met_by_the_others() -> None:
    result = quick(("stem",), Budget(params=0.6))
    assert result.model.stem.out_features == 16
    assert result.report.parameters[1] <= 0.6 * result.report.parameters[0]
    with pytest.raises(BudgetError, match="least width"):
        quick(("stem",), Budget(params=0.2))


def test_plans_exclude_too_and_apply_needs_no_patterns() -> None:
    made = make_plan(net(), EXAMPLE, method="magnitude", queries=None, exclude=("body.0",))
    assert set(made.groups) == {"stem", "body.1"}
    small = apply_plan(net(), Plan.from_json(made.to_json()), EXAMPLE)
    assert bits(small) == bits(quick(("body.0",)).model)


@pytest.mark.parametrize(
    ("exclude", "match"),
    [
        (("boddy.0",), r"exclude='boddy.0' matches no group .* e\.g\. body\.0"),
        (("stem", "zzz*"), r"exclude='zzz\*' matches no group .* e\.g\. stem"),
        (("Stem",), "e.g. stem"),
        (("",), "must be names or patterns"),
        ((3,), "must be names or patterns"),
        (None, "must be names or patterns"),
        (3, "must be names or patterns"),
        ({"stem": True}, "must be names or patterns"),
    ],
)
def test_patterns_that_are_wrong(exclude: Any, match: str) -> None:
    with pytest.raises(InputError, match=match):
        quick(exclude)
    with pytest.raises(InputError, match=match):
        make_plan(net(), EXAMPLE, method="magnitude", queries=None, exclude=exclude)
