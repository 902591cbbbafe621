"""Budgets are met, never missed, and never by more than one step: of one group, or of alike groups together."""

from __future__ import annotations

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from coreprune import Budget, prune
from coreprune.graph import CostModel, Traced, capture, find_groups, normalise_example, probe
from graph.zoo import ZOO
from small_networks import EXAMPLE, mlp, widths
from sweeps import in_turn
from zoo_examples import example

LIMITS = (("macs", 0.5), ("params", 0.6), ("bytes", 0.5), ("macs", 0.8))
NAMES = ("mlp", "vgg", "resnext", "shufflenet-v2", "densenet", "llama-gqa")


def counted(model: torch.nn.Module, inputs, kind: str) -> int:
    """The cost of a real model, counted without any of ours."""
    if kind == "params":
        return sum(p.numel() for p in model.parameters())
    if kind == "bytes":
        tensors = {id(t): t for t in (*model.parameters(), *model.buffers())}
        return sum(t.numel() * t.element_size() for t in tensors.values())
    args, kwargs = normalise_example(inputs)
    # The fused attention of the CPU is not counted by torch, its plain form with gradients is.
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.enable_grad():
        model(*args, **kwargs)
    return counter.get_total_flops() // 2


@pytest.mark.slow
@pytest.mark.parametrize(("name", "limit"), in_turn(NAMES, LIMITS))
def test_met_and_no_group_could_keep_one_step_more(name, limit):
    kind, share = limit
    model, inputs = ZOO[name].build().double().eval(), example(ZOO[name].inputs(1))
    result = prune(model, inputs, Budget(**{kind: share}), "magnitude", queries=None)
    limit = share * counted(model, inputs, kind)
    assert counted(result.model, inputs, kind) <= limit
    assert getattr(result.report, {"params": "parameters"}.get(kind, kind))[1] == counted(result.model, inputs, kind)

    captured = capture(model, *normalise_example(inputs))
    groups = probe(Traced(model, captured, find_groups(captured))).groups
    cost = CostModel(captured, groups)
    kept = {g.name: len(result.plan.groups[g.name].kept) for g in groups if g.locked_because is None}
    for g in groups:
        if g.name in kept and kept[g.name] < g.size:
            step = g.unit * (1 if g.sections is None else int(g.sections.max()) + 1)
            assert getattr(cost({**kept, g.name: kept[g.name] + step}), kind) > limit, g.name


def test_shares_and_absolute_numbers_agree():
    dense = sum(p.numel() for p in mlp().parameters())
    share = prune(mlp(), EXAMPLE, Budget(params=0.5), "magnitude", queries=None).plan.groups
    assert prune(mlp(), EXAMPLE, Budget(params=dense // 2), "magnitude", queries=None).plan.groups == share


def test_the_whole_model_is_a_budget_too():
    assert widths(prune(mlp(), EXAMPLE, Budget(macs=1.0), "magnitude", queries=None).model) == [24, 12, 3]
    assert widths(prune(mlp(), EXAMPLE, Budget(params=10**9), "magnitude", queries=None).model) == [24, 12, 3]


def test_every_group_gives_up_about_the_same_share():
    first, second, _ = widths(prune(mlp(), EXAMPLE, Budget(macs=0.4), "magnitude", queries=None).model)
    assert abs(first / 24 - second / 12) <= 1 / 12


@pytest.mark.parametrize("limit", [{"macs": 0.5}, {"keep": 0.4}, {"bytes": 0.5}])
def test_widths_are_multiples_of_round_to(limit):
    found = widths(prune(mlp(), EXAMPLE, Budget(**limit, round_to=4), "magnitude", queries=None).model)
    assert [w % 4 for w in found[:2]] == [0, 0]


def test_min_width_holds_under_a_cost_budget():
    found = widths(prune(mlp(), EXAMPLE, Budget(macs=0.3, min_width=6), "magnitude", queries=None).model)
    assert min(found[:2]) >= 6


@pytest.mark.slow
@pytest.mark.parametrize(("name", "share"), in_turn(["bert", "vit", "llama-gqa", "swin"], [0.5, 0.7]))
def test_uniform_layers_of_a_transformer_have_one_width(name, share):
    """A stock configuration knows one width for all layers; two alike layers a step apart cannot be written in it."""
    model, inputs = ZOO[name].build().eval(), ZOO[name].inputs(1)
    inputs = {k: v.float() if v.is_floating_point() else v for k, v in inputs.items()}
    result = prune(model, inputs, Budget(macs=share, uniform=True), "magnitude", queries=None)
    assert counted(result.model, inputs, "macs") <= share * counted(model, inputs, "macs")
    widths = {}
    for g in result.report.groups:
        if g.locked_because is None:
            widths.setdefault((g.channels, g.unit), set()).add(g.kept)
    assert all(len(kept) == 1 for kept in widths.values())
    assert any(kept != {channels} for (channels, _), kept in widths.items())


def test_wide_layers_get_multiples_of_8_by_default():
    model = torch.nn.Sequential(torch.nn.Linear(5, 130), torch.nn.ReLU(), torch.nn.Linear(130, 7))
    dense = 130 * (5 + 7)
    for limit in (400, 700, 1000):
        (kept, _) = widths(prune(model, torch.zeros(1, 5), Budget(macs=limit), "magnitude", queries=None).model)
        assert kept % 8 == 0
        assert 12 * kept <= limit < 12 * (kept + 8)
    assert widths(prune(model, torch.zeros(1, 5), Budget(macs=dense), "magnitude", queries=None).model) == [130, 7]
