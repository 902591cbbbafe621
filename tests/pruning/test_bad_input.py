"""Wrong input: a CoreprunError child that says what to do, and a model that is bit-identical afterwards."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import coreprune
from coreprune import Budget, BudgetError, CoreprunError, InputError, ModelError, Plan, apply_plan, list_groups, prune
from coreprune.selectors import SELECTORS
from small_networks import EXAMPLE, bits, mlp

pytestmark = pytest.mark.usefixtures("unchecked")


def refuse(
    error: type[CoreprunError], match: str, model: nn.Module, example: object = EXAMPLE, **kwargs: object
) -> None:
    before = bits(model) if not any(p.is_meta for p in model.parameters()) else None
    with pytest.raises(error, match=match) as caught:
        prune(model, example, **kwargs)  # type: ignore[arg-type]
    assert isinstance(caught.value, CoreprunError)
    if before is not None:
        assert bits(model) == before


@pytest.mark.parametrize(
    ("kwargs", "match"),
    [
        ({"keep": 0}, "remove every channel"),
        ({"keep": -0.1}, "remove every channel"),
        ({"keep": 1.5}, "more than everything"),
        ({"keep": 50}, "keep=0.5 keeps half"),
        ({"keep": float("nan")}, "must be a number"),
        ({"keep": "half"}, "must be a number"),
        ({"keep": True}, "must be a number"),
        ({"macs": 0}, "remove every channel"),
        ({"macs": 0.5, "params": 0.5}, "macs and params are given"),
        ({"min_width": 0}, "min_width"),
        ({"round_to": 2.5}, "round_to"),
    ],
)
def test_budgets_that_contradict_themselves(kwargs, match):
    with pytest.raises(BudgetError, match=match):
        Budget(**kwargs)


def test_budgets_that_the_model_cannot_meet():
    refuse(BudgetError, "12 units, fewer than min_width=20", mlp(), budget=Budget(min_width=20))
    refuse(BudgetError, "no channels between two layers", nn.Sequential(nn.Linear(8, 3)))
    refuse(InputError, r"Budget\(keep=0.5\)", mlp(), budget=0.5)
    refuse(BudgetError, r"least width .* are left \(3\.1%\)", mlp(), budget=Budget(params=0.01))
    refuse(BudgetError, "no channels between two layers", nn.Sequential(nn.Linear(8, 3)), budget=Budget(macs=0.5))


def test_an_unknown_selector_lists_the_known_ones():
    refuse(InputError, f"known: auto, {', '.join(sorted(SELECTORS))}", mlp(), method="lowner")
    refuse(InputError, "known: auto, bn-scale", mlp(), method=None)


def test_wrong_example_inputs():
    refuse(InputError, "at least one sample", mlp(), EXAMPLE[:0])
    refuse(InputError, "example_inputs is a ndarray", mlp(), EXAMPLE.numpy())
    refuse(ModelError, "cannot capture Sequential", mlp(), torch.zeros(1, 9))
    refuse(InputError, "example_inputs is a str", mlp(), "cat.png")
    refuse(InputError, "model is on cpu, but an example input is on meta", mlp(), EXAMPLE.to("meta"))


def test_whole_numbers_for_a_model_of_reals_are_not_called_an_unreachable_budget():
    """Tracing lets them pass; then every group was locked, because "the pruned model does not run"."""
    wrong = r"does not run on the example inputs \(RuntimeError: .*Long and Float"
    for queries in ("auto", None):
        refuse(ModelError, wrong, mlp(), EXAMPLE.long(), queries=queries)


def test_a_message_of_torch_that_ends_in_a_full_stop_gets_no_second_one():
    refuse(ModelError, r"\[1, 9\] X \[8, 24\]\. Try this: .* on its own\.$", mlp(), torch.zeros(1, 9))


def test_weights_that_cannot_be_read():
    refuse(InputError, "meta device", mlp().to("meta"))
    broken = mlp()
    with torch.no_grad():
        broken[2].weight[0, 0] = float("nan")
    refuse(BudgetError, r"0: 2.weight has a NaN or infinite entry", broken)
    integers = nn.Linear(8, 24)
    integers.weight = nn.Parameter(torch.ones(24, 8, dtype=torch.int8), requires_grad=False)
    integers.bias = None
    refuse(InputError, r"all parameters have dtype torch.int8", integers)
    with pytest.raises(InputError, match=r"'0.weight' has no shape yet"):
        prune(nn.Sequential(nn.LazyLinear(24), nn.Linear(24, 2)), EXAMPLE)
    with torch.inference_mode():
        made_there = mlp()
    refuse(InputError, r"'0.weight' was made in torch.inference_mode", made_there)
    assert list_groups(copy.deepcopy(made_there), EXAMPLE).free_macs_share > 0.5
    refuse(InputError, "TorchScript", torch.jit.trace(mlp(), EXAMPLE))
    refuse(InputError, "nothing to prune", nn.ReLU())
    refuse(InputError, r"Prune model\.module", nn.DataParallel(mlp()))
    refuse(InputError, "dtype torch.float8_e4m3fn", mlp(dtype=torch.float8_e4m3fn), EXAMPLE.to(torch.float8_e4m3fn))
    with pytest.raises(InputError, match=r"torch\.nn\.Module, not dict"):
        prune({}, EXAMPLE)  # type: ignore[arg-type]


class Odd(nn.Module):
    """A parameter that no channel needs to touch."""

    def __init__(self, odd):
        super().__init__()
        self.odd = nn.Parameter(odd, requires_grad=False)
        self.a, self.b = nn.Linear(8, 32), nn.Linear(32, 4)

    def forward(self, x):
        if self.odd.dtype in (torch.long, torch.bool):
            x = x[:, self.odd]
        elif self.odd.is_complex():
            x = x + torch.view_as_real(self.odd).sum()
        else:
            x = x + torch.nan_to_num(self.odd, 0, 0, 0).sum()
        return self.b(torch.relu(self.a(x)))


@pytest.mark.parametrize(
    "odd",
    [
        torch.arange(8),
        torch.ones(8, dtype=torch.bool),
        torch.full((4, 4), -torch.inf).triu(1),
        torch.full((3,), torch.nan),
        torch.randn(4, dtype=torch.cfloat),
    ],
)
def test_one_odd_parameter_does_not_stop_the_others(odd):
    found = list_groups(Odd(odd), EXAMPLE)
    assert [g.name for g in found.groups if g.locked_because is None] == ["a"]
    result = prune(Odd(odd), EXAMPLE, Budget(keep=0.5))
    assert result.model.a.out_features == 16
    assert torch.equal(result.model.odd.nan_to_num(), odd.nan_to_num())


def test_in_inference_mode():
    model = mlp()
    with torch.inference_mode():
        inside = prune(model, EXAMPLE, Budget(keep=0.5))
    outside = prune(model, EXAMPLE, Budget(keep=0.5))
    for a, b in zip(inside.model.parameters(), outside.model.parameters(), strict=True):
        assert torch.equal(a, b)
        assert not a.is_inference()


def test_other_arguments():
    refuse(InputError, "delta", mlp(), delta=0.0)
    refuse(InputError, "delta", mlp(), delta="1 %")
    refuse(InputError, "seed", mlp(), seed="a")
    refuse(InputError, r"Norm\(\)", mlp(), method=coreprune.Norm)
    refuse(InputError, "unknown queries 'sketches'; known: auto, ", mlp(), queries="sketches")
    refuse(InputError, "repair must be True, False or Repair", mlp(), repair="yes")
    refuse(InputError, "distill must be a number of steps", mlp(), distill=True)
    refuse(InputError, "distill needs queries", mlp(), queries=None, distill=10)
    refuse(BudgetError, "Pass queries, or limit macs", mlp(), queries=None, budget=Budget(error=0.1))
    with pytest.raises(InputError, match="must be a Plan"):
        apply_plan(mlp(), {"groups": {}}, EXAMPLE)  # type: ignore[arg-type]


@pytest.mark.parametrize("text", ["", "{}", "[1]", '{"schema": 99}', "[" * 100_000])
def test_plans_that_are_none(text):
    with pytest.raises(InputError):
        Plan.from_json(text)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"kept": [0, 0, 1]}, "distinct, ascending"),
        ({"kept": [0, 99]}, "below 24"),
        ({"kept": []}, "whole numbers"),
        ({"kept": [0, 1.5]}, "whole numbers"),
        ({"factors": [1.0]}, "1 factors for"),
    ],
)
def test_plans_that_were_tampered_with(change, match):
    import json

    raw = json.loads(coreprune.make_plan(mlp(), EXAMPLE, method="norm", queries=None).to_json())
    raw["groups"]["0"].update(change)
    with pytest.raises(InputError, match=match):
        Plan.from_json(json.dumps(raw))


def test_a_failure_inside_surgery_leaves_the_model_bit_identical(monkeypatch):
    """inplace=True, and the very last step fails: the model must be as before."""
    import coreprune.pruning.stages as module

    model = mlp()
    before = bits(model)

    def fail(*args: object) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(module, "pour_", fail)
    with pytest.raises(RuntimeError):
        prune(model, EXAMPLE, method="norm", queries=None, inplace=True)
    assert bits(model) == before


def test_a_model_that_raises_is_left_alone():
    class Broken(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = mlp()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            raise ValueError("no such luck")

    refuse(ModelError, "no such luck", Broken())
