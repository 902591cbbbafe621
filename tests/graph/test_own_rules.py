"""Rules for operations that users register with torch.library."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from torch import Tensor, nn

from coreprune import Budget, prune
from coreprune.errors import InputError
from coreprune.graph import (
    Call,
    Traced,
    Value,
    capture,
    find_groups,
    move,
    pointwise,
    probe,
    product,
    remove,
    rule,
    statistic,
)
from coreprune.graph.rules.registry import RULES
from graph.oracle import assert_same, random_halves, zeroed_original


@torch.library.custom_op("ruletest::scale", mutates_args=())
def scale(x: Tensor, weight: Tensor) -> Tensor:
    return x * weight[:, None, None]


@torch.library.custom_op("ruletest::add", mutates_args=())
def add(x: Tensor, weight: Tensor) -> Tensor:
    """Not what aten's add does: every channel gets the mean of all."""
    return x + (x * weight[:, None, None]).mean(1, keepdim=True)


@torch.library.custom_op("ruletest::both", mutates_args=())
def both(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    return x * weight[:, None, None], x.mean((2, 3))


@torch.library.custom_op("ruletest::project", mutates_args=())
def project(x: Tensor, weight: Tensor) -> Tensor:
    return torch.einsum("nchw,oc->nohw", x, weight)


for op in (scale, add):
    op.register_fake(lambda x, weight: torch.empty_like(x))
both.register_fake(lambda x, weight: (torch.empty_like(x), x.new_empty(x.shape[:2])))
project.register_fake(lambda x, weight: x.new_empty((x.shape[0], weight.shape[0], *x.shape[2:])))


class Net(nn.Module):
    """An operation of one's own between two convolutions."""

    def __init__(self, what, *weight: int) -> None:
        super().__init__()
        g = torch.Generator().manual_seed(0)
        self.a, self.b = nn.Conv2d(3, 12, 3), nn.Conv2d(12, 4, 3)
        self.what = lambda x, weight: what(x, weight)  # a function can be copied, an operation of torch.library cannot
        self.weight = nn.Parameter(torch.empty(weight or (12,)))
        for p in self.parameters():
            p.data = torch.randn(p.shape, generator=g)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.relu(self.what(self.a(x), self.weight)))


X = torch.randn(2, 3, 9, 9, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


@pytest.fixture(autouse=True)
def _forgotten(monkeypatch):
    """The rules of one test are not there in the next."""
    before = dict(RULES)
    yield
    RULES.clear()
    RULES.update(before)


def per_channel(weight: Value) -> Value:
    return move(weight, lambda ids: ids[:, None, None])


def scaling(call: Call) -> Value:
    x, weight = call.args
    return pointwise(call, [x, per_channel(weight)])


def found(model: nn.Module):
    captured = capture(model, X)
    return captured, find_groups(captured)


def locked(model: nn.Module, name: str = "a") -> str | None:
    return next(g.locked_because for g in found(model)[1] if g.name == name)


def check(model: nn.Module, freed: set[str]) -> nn.Module:
    """The groups of these names leave by halves, and the result is the original with zeros."""
    captured, groups = found(model)
    assert {g.name for g in groups if g.locked_because is None} == freed
    keep = random_halves(groups, torch.Generator().manual_seed(2))
    removed = remove(Traced(model, captured, groups), keep)
    assert set(removed.kept) == freed
    fresh = torch.randn(3, 3, 11, 7, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    with torch.no_grad():
        assert_same([removed.model(fresh)], [zeroed_original(model, groups, removed.kept)(fresh)])
    return removed.model


def test_without_a_rule_its_channels_stay_and_the_reason_names_it():
    model = Net(scale).double()
    assert locked(model) == "no rule for ruletest::scale (scale)"


def test_with_a_rule_the_result_equals_the_original_with_zeros():
    rule("ruletest::scale")(scaling)
    small = check(Net(scale).double(), {"a"})
    assert small.weight.shape == (6,)


def test_the_whole_of_prune_goes_through_it():
    rule("ruletest::scale")(scaling)
    result = prune(Net(scale), X.float(), Budget(macs=0.5), seed=0)
    assert result.model.weight.shape == (result.model.a.out_channels,) < (12,)


def test_one_that_makes_channels():
    """A matrix product of one's own: its inputs are read, and its outputs made, by the parameter."""

    def projecting(call: Call) -> Value:
        x, weight = call.args
        rows = move(x, lambda ids: ids.movedim(1, -1))
        made = product(call, rows, move(weight, lambda ids: ids.t()))
        return move(made, lambda ids: ids.movedim(-1, 1))

    rule("ruletest::project")(projecting)
    small = check(Net(project, 12, 12).double(), {"a", "weight"})
    assert small.weight.shape == (6, 6)


def test_one_with_several_results():
    @rule("ruletest::both")
    def splitting(call: Call) -> list[Value]:
        x, weight = call.args
        return [pointwise(call, [x, per_channel(weight)]), move(x, lambda ids: ids[:, :, 0, 0])]

    check(Net(lambda x, w: (y := both(x, w))[0] + y[1][:, :, None, None]).double(), {"a"})


def test_a_name_in_another_namespace_is_another_operation():
    assert locked(Net(add).double()) == "no rule for ruletest::add (add)"
    rule("ruletest::add")(scaling)
    assert locked(Net(torch.add, 12, 1, 1).double()) is None


def test_channels_that_are_mixed_stay():
    @rule("ruletest::add")
    def mixing(call: Call) -> Value:
        x, weight = call.args
        statistic(call, x, [1], "enters a mean over channels")
        return pointwise(call, [x, per_channel(weight)])

    assert locked(Net(add).double()) == "enters a mean over channels (add)"


def test_a_rule_that_lies_is_found_out_by_the_check_after_surgery():
    rule("ruletest::add")(scaling)  # but it mixes channels
    model = Net(add).double()
    captured, groups = found(model)
    assert [g.locked_because for g in groups if g.name == "a"] == [None]
    (group,) = [g for g in probe(Traced(model, captured, groups)).groups if g.name == "a"]
    assert "differs from the original with these channels at zero" in str(group.locked_because)


def test_our_rules_are_there_first_so_that_one_of_a_users_own_replaces_them():
    """They were registered at the first trace, over a rule that a user had put in the place of one of them."""
    code = """
from coreprune.graph import rule
from coreprune.graph.rules.registry import RULES
assert {"relu", "softmax", "view", "linear"} <= set(RULES)
"""
    subprocess.run(
        [sys.executable, "-c", code], check=True, env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    )


def test_what_a_rule_does_not_cover_stays():
    rule("ruletest::scale")(lambda call: NotImplemented)
    assert "ruletest::scale" in str(locked(Net(scale).double()))


def test_the_author_can_say_why_channels_stay():
    @rule("ruletest::scale")
    def stay(call: Call) -> Value:
        call.lock("its table has twelve entries")
        return Value(call.shape)

    assert locked(Net(scale).double()) == "its table has twelve entries (scale)"


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda call: 1 / 0, "it raised ZeroDivisionError: division by zero"),
        (lambda call: pointwise(call, call.values()), "an id map of shape"),  # a weight meets the columns of an image
        (
            lambda call: Value((1, 12, 7, 8)),
            r"a Value of shape \(1, 12, 7, 8\), but the result has shape \(1, 12, 7, 7\)",
        ),
        (lambda call: Value(call.shape, (torch.arange(6).reshape(1, 6, 1, 1),)), r"an id map of shape \(1, 6, 1, 1\)"),
        (lambda call: Value(call.shape, (torch.arange(12),)), r"an id map of shape \(12,\)"),
        (lambda call: [call.args[0], call.args[0]], "it returns 2 results of 1"),
        (lambda call: torch.zeros(call.shape), "it returns a Tensor instead of a Value"),
        (lambda call: None, "it returns a NoneType instead of a Value"),
    ],
)
def test_a_wrong_rule_is_told_with_the_names_of_operation_and_node(wrong, message):
    rule("ruletest::scale")(wrong)
    with pytest.raises(
        InputError, match=rf"the rule for ruletest::scale failed at node scale: .*{message}.*Mend the rule"
    ):
        found(Net(scale).double())
