"""Residual streams through LayerNorm, on request: the original whose norms only look at the channels that stay."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from coreprune.graph import CostModel, Group, Traced, capture, find_groups, remove
from graph.oracle import assert_same, outputs, random_halves, zeroed_original
from graph.zoo import ZOO, gen, randomise
from layers_that_compute_weights import Scaled, Standardised

NAMES = [n for n in ("timm-style-vit", "mlp-mixer", "bert", "gpt2", "vit", "deit", "swin", "convnext") if n in ZOO]


def norm_masks(model: nn.Module, groups: list[Group], kept: dict[str, Tensor]) -> dict[int, Tensor]:
    """id of a norm's weight -> which of its positions stay."""
    params = dict(model.named_parameters())
    masks = {}
    for g in groups:
        if g.name in kept:
            stays = torch.zeros(g.size + 1, dtype=torch.bool)
            stays[kept[g.name]] = True
            stays[-1] = True
            masks |= {id(params[s.param]): stays[s.index] for s in g.others if s.param.endswith("weight")}
    return masks


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_layer_norm_over_the_channels_that_stay(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    entry = ZOO[name]
    model = randomise(entry.build())
    inputs = entry.inputs(2)
    captured = capture(model, inputs["x"]) if set(inputs) == {"x"} else capture(model, kwargs=inputs)
    locked = {g.name for g in find_groups(captured) if g.locked_because}
    groups = find_groups(captured, norm_statistics=True)
    flagged = [g for g in groups if "norm-statistics" in g.flags and g.locked_because is None]
    assert flagged
    assert {g.name for g in flagged} <= locked
    result = remove(Traced(model, captured, groups), random_halves(groups, gen(3)))
    assert {g.name for g in flagged} <= set(result.kept)
    costs = CostModel(captured, groups)({n: len(k) for n, k in result.kept.items()})
    assert costs.params == sum(p.numel() for p in result.model.parameters())

    zeros = zeroed_original(copy.deepcopy(model), groups, result.kept)
    masks = norm_masks(zeros, groups, result.kept)
    plain = F.layer_norm

    def over_kept(x: Tensor, shape: object, weight: Tensor, bias: Tensor, eps: float = 1e-5) -> Tensor:
        mask = masks.get(id(weight))
        if mask is None:
            return plain(x, shape, weight, bias, eps)
        out = torch.zeros_like(x)
        out[..., mask] = plain(x[..., mask], (int(mask.sum()),), weight[mask], bias[mask], eps)
        return out

    with torch.no_grad():
        got = outputs(result.model, entry.inputs(3))
        monkeypatch.setattr(F, "layer_norm", over_kept)
        assert_same(got, outputs(zeros, entry.inputs(3)))


def test_a_later_group_does_not_switch_off_the_comparison() -> None:
    """A silent fault in one group was once hidden by a flagged group in the same call."""

    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 12), nn.Linear(6, 8)
            self.n, self.c = nn.LayerNorm(8), nn.Linear(8, 2)

        def forward(self, x: Tensor) -> Tensor:
            y = self.a(x)
            return self.c(self.n(self.b(F.relu(y[:, :6] * y[:, 3:9]))))

    model = randomise(Both())
    captured = capture(model, torch.randn(2, 4, dtype=torch.float64, generator=gen(0)))
    groups = find_groups(captured, norm_statistics=True)
    keep = random_halves(groups, gen(0))
    assert "b" in keep
    result = remove(Traced(model, captured, groups), keep)
    assert "b" in result.kept
    assert not any(n.startswith("a") for n in result.kept), "the boundaries are literals: nothing of a can leave"


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("layer", [Standardised, Scaled])
def test_what_a_standardised_weight_reads_is_known_without_a_trial(layer: type[nn.Conv2d], groups: int) -> None:
    """Regression: in groups, only the comparison after the cut showed it, after a search for the groups that differ."""
    model = randomise(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), layer(8, 12, 3, groups=groups), nn.Conv2d(12, 4, 1)))
    x = torch.randn(2, 3, 9, 9, generator=gen(0), dtype=torch.float64)
    captured = capture(model, x)
    before = {g.name: g.locked_because for g in find_groups(captured)}
    assert "statistics" in str(before["0"]) or "over channels" in str(before["0"])
    assert before["2"] is None
    found = find_groups(captured, norm_statistics=True)
    on_request = {g.name: g for g in found}
    assert on_request["0"].locked_because is None
    assert "norm-statistics" in on_request["0"].flags
    keep = random_halves([on_request["0"]], gen(1))
    small = remove(Traced(model, captured, found), keep)
    assert small.locked == {}
    # The oracle: the weight that is left, standardised over the inputs that are left.
    alone = nn.Sequential(*copy.deepcopy(list(model)))
    rows = keep["0"]
    alone[0].weight.data, alone[0].bias.data = model[0].weight[rows], model[0].bias[rows]
    inside = rows.reshape(groups, -1) - torch.arange(groups)[:, None] * (8 // groups)
    parts = zip(model[2].weight.chunk(groups), inside, strict=True)
    alone[2].weight.data = torch.cat([part[:, i] for part, i in parts])
    assert_same([small.model(x)], [alone(x)])
