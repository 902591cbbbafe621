"""The settings of a call, and the call that makes the same result again."""

from __future__ import annotations

import json
from dataclasses import fields

import pytest
import torch
from torch import nn

from coreprune import Budget, Distill, Functional, InputError, Repair, make_plan, prune
from coreprune.pruning.settings import EXAMPLES, Settings
from coreprune.queries import WhiteNoise

EXAMPLE = torch.zeros(1, 4)


def network() -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 3))


def again(call: str, model: nn.Module, **names: object):
    known = {"model": model, "example_inputs": EXAMPLE, **names}
    exec(call, known)
    return known["result"]


@pytest.mark.parametrize(
    "arguments",
    [
        {"method": "l2", "queries": None},
        {"method": Functional(search="best"), "queries": WhiteNoise(sd=2.0), "repair": False},
        {"method": "functional", "queries": "white-noise", "seed": 3, "repair": Repair(ridge=0.1)},
        {"queries": "white-noise", "n_queries": 50, "exclude": "2"},
        {"queries": "white-noise", "n_queries": 50, "exclude": ("2",), "delta": 0.2, "distill": Distill(steps=2)},
    ],
)
def test_the_call_makes_the_same_result_again(arguments):
    model = network()
    first = prune(model, EXAMPLE, Budget(macs=0.8, round_to=2), **arguments)
    second = again(first.report.settings.call(), model)
    assert second.plan == first.plan
    assert second.report.settings == first.report.settings
    for name, tensor in first.model.state_dict().items():
        assert torch.equal(second.model.state_dict()[name], tensor)


def test_the_call_names_groups_where_modules_were_excluded():
    model = network()
    first = prune(model, EXAMPLE, Budget(macs=0.8, round_to=2), "l2", queries=None, exclude=[model[2]])
    assert first.report.settings.exclude == ("2",)
    assert again(first.report.settings.call(), model).plan == first.plan


def test_every_field_is_in_the_report_and_in_a_call_that_differs_from_the_defaults():
    """`exclude` was lost, because the fields were written out by hand in three places."""
    settings = Settings(
        Budget(macs=0.5),
        Functional(),
        WhiteNoise(),
        7,
        ("a*",),
        Repair(ridge=0.5),
        Distill(steps=3),
        5,
        0.3,
        milliseconds,
        compare=False,
        also=EXAMPLES,
        batch_axis=1,
        part="backbone",
        norm_statistics=True,
        tokenizer="folder",
        memory="8GiB",
        depth=True,
        residual="rotate",
    )
    names = {f.name for f in fields(Settings)}
    assert settings.as_dict().keys() == names
    json.dumps(settings.as_dict())
    assert all(f"    {name}=" in settings.call() for name in names)


def milliseconds(widths):
    return 0.01 * sum(widths.values())


def test_a_cost_of_ones_own_decides_and_is_imported_in_the_call():
    first = prune(network(), EXAMPLE, Budget(cost=0.5), "l2", queries=None, cost=milliseconds)
    kept = sum(g.kept for g in first.report.groups)
    assert kept == 8  # of 17
    assert f"from {__name__} import milliseconds" in first.report.settings.call()
    second = again(first.report.settings.call(), network())
    assert second.plan == first.plan
    made = make_plan(network(), EXAMPLE, Budget(cost=0.5), "l2", queries=None, cost=milliseconds)
    assert made == first.plan


@pytest.mark.parametrize("budget", [Budget(), Budget(macs=0.5)])
def test_a_cost_that_no_budget_limits_is_refused(budget):
    with pytest.raises(InputError, match=f"limits {budget.kind}.*Budget\\(cost=0.5\\)"):
        prune(network(), EXAMPLE, budget, cost=milliseconds)
    with pytest.raises(InputError, match="none is given"):
        make_plan(network(), EXAMPLE, Budget(cost=0.5))


def test_a_cost_is_a_function(unchecked):
    with pytest.raises(InputError, match=r"cost must be a function .* not 3"):
        prune(network(), EXAMPLE, Budget(cost=0.5), cost=3)


class Mine:
    name, reads = "mine", False

    def __call__(self, layer, generator):
        return Functional()(layer, generator)


def test_samples_and_selectors_of_the_callers_are_left_as_names():
    """A user's selector was printed as 'mine', which is no selector's name."""
    samples = torch.rand(40, 4)
    first = prune(network(), EXAMPLE, method=Mine(), queries=samples)
    call = first.report.settings.call()
    assert "queries=your_samples" in call
    assert "method=your_mine" in call
    assert "# your_mine: made by the caller" in call
    assert again(call, network(), your_mine=Mine(), your_samples=samples).plan == first.plan


def test_text_is_quoted_whatever_is_in_it():
    name = "x\"; __import__('os').abort() #\n"
    settings = Settings(Budget(), Functional(), "auto", None, (name,), None, None, 0, 0.01)
    assert f"exclude=({json.dumps(name)},)" in settings.call()


def test_a_name_cannot_leave_its_remark():
    """The remark held the name as it was: a line break in it, and the rest of the name was code."""
    broken = Mine()
    broken.name = "mine\nraise SystemExit"
    settings = Settings(Budget(), broken, "auto", None, (), None, None, 0, 0.01)
    assert "raise SystemExit" not in settings.call()
    compile(settings.call(), "call", "exec")
