"""Costs are exact polynomials of the widths."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from coreprune.graph import CostModel, Traced, capture, cost, describe, find_groups, remove
from coreprune.graph.values import axes
from graph.oracle import measured_macs, random_halves
from graph.zoo import ZOO, gen


def test_an_mlp_by_hand() -> None:
    model = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 12), nn.ReLU(), nn.Linear(12, 3, bias=False))
    captured = capture(model, torch.randn(4, 6, generator=gen(0)))
    groups = find_groups(captured)
    for a, b in ((16, 12), (5, 12), (16, 1), (3, 2)):
        got = cost(captured, groups, {"0": a, "2": b})
        assert got.macs == 6 * a + a * b + b * 3
        assert got.params == 7 * a + (a + 1) * b + b * 3
        assert got.bytes == 4 * got.params


def test_a_convolution_with_a_norm_by_hand() -> None:
    """Kernels count once per position; running statistics are bytes and no parameters."""
    model = nn.Sequential(nn.Conv2d(3, 8, (3, 2), bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 2, 1))
    captured = capture(model, torch.randn(2, 3, 6, 5, generator=gen(0)))
    groups = find_groups(captured)
    for a in (8, 5, 1):
        got = cost(captured, groups, {"0": a})
        assert got.macs == 4 * 4 * (3 * 6 * a + a * 2)
        assert got.params == 3 * 6 * a + 2 * a + (a * 2 + 2)
        assert got.bytes == 4 * (got.params + 2 * a) + 8  # the number of batches that the norm has seen


def test_a_grouped_and_a_depthwise_convolution_by_hand() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 8, 1),
        nn.Conv2d(8, 8, 3, padding=1, groups=8),
        nn.Conv2d(8, 12, 3, padding=1, groups=4),
        nn.Conv2d(12, 2, 1),
    )
    captured = capture(model, torch.randn(1, 3, 5, 5, generator=gen(0)))
    groups = find_groups(captured)
    for a, b in ((8, 12), (4, 12), (8, 4), (4, 8)):
        got = cost(captured, groups, {"0": a, "2": b})
        assert got.macs == 25 * (3 * a + 9 * a + 9 * a * b // 4 + 2 * b)
        assert got.params == (3 * a + a) + (9 * a + a) + (9 * a * b // 4 + b) + (2 * b + 2)


def test_the_work_of_making_channels_by_hand() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 8, 1),
        nn.Conv2d(8, 8, 3, padding=1, groups=8),
        nn.Conv2d(8, 12, 3, padding=1, groups=4),
        nn.Conv2d(12, 2, 1),
    )
    captured = capture(model, torch.randn(1, 3, 5, 5, generator=gen(0)))
    made = CostModel(captured, find_groups(captured)).making({"0": 4, "2": 8})
    assert made == {"0": 25 * (3 * 4 + 9 * 4), "2": 25 * 9 * 4 * 8 // 4, "3": 25 * 8 * 2}


@pytest.mark.parametrize("name", ["cifar-resnet56-a", "densenet", "mlp-mixer", "resnext", "timm-style-vit"])
def test_every_product_with_a_weight_makes_channels_of_some_group(name: str) -> None:
    entry = ZOO[name]
    captured = capture(entry.build().double(), tuple(entry.inputs(1).values()))
    groups = find_groups(captured)
    costs = CostModel(captured, groups)
    plain = [g for g in groups if g.locked_because is None and g.unit == 1 and g.sections is None]
    for widths in ({}, {g.name: g.size // 2 for g in plain}):
        made, total = sum(costs.making(widths).values()), costs(widths).macs
        # two blocks, each with scores and their product with v: 17 × 17 tokens × 16 channels
        between_activations = 2 * 2 * 17 * 17 * 16 if name == "timm-style-vit" else 0
        assert abs(made + between_activations - total) <= len(groups)


def test_heads_make_attention_cheaper() -> None:
    entry = ZOO["timm-style-vit"]
    captured = capture(entry.build(), entry.inputs(1)["x"].float())
    groups = find_groups(captured)
    heads = next(g for g in groups if "heads" in g.flags)
    costs = CostModel(captured, groups)
    # one of four heads of width 4 at 17 tokens of width 16: q, k, v, output, scores and their product with v
    fewer = costs().macs - costs({heads.name: heads.size - heads.unit}).macs
    assert fewer == 4 * 17 * 16 * 4 + 2 * 17 * 17 * 4


def test_shares_and_table() -> None:
    entry = ZOO["mlp"]
    captured = capture(entry.build(), entry.inputs(1)["x"].float())
    groups = find_groups(captured)
    costs = CostModel(captured, groups)
    shares = costs.shares()
    assert shares["0"] == pytest.approx(1 - costs({"0": 1}).macs / costs().macs)
    assert 0.9 < costs.free_share() < 1
    rows = describe(groups, shares)
    assert [r["group"] for r in rows] == ["0", "2", "4"]
    assert rows[2]["locked_because"] == "model output"
    assert rows[0]["macs_share"] == shares["0"]


def test_a_vector_of_widths_is_as_good_as_a_mapping() -> None:
    entry = ZOO["vgg"]
    captured = capture(entry.build(), entry.inputs(1)["x"].float())
    groups = find_groups(captured)
    costs = CostModel(captured, groups)
    vector = costs.widths({"0": 3})
    assert costs(vector) == costs({"0": 3})
    assert costs.names[0] == "0"


class Windows(nn.Module):
    """Attention in windows of 3 × 3 out of 6 × 6 places, the second time shifted and with a mask for every window."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.proj = (nn.ModuleList(nn.Linear(8, n) for _ in range(2)) for n in (24, 8))
        self.biases = nn.ParameterList(torch.zeros(2, 9, 9) for _ in range(2))
        self.register_buffer("mask", torch.zeros(4, 9, 9))
        self.last, self.head = nn.Linear(8, 8), nn.Linear(8, 6)

    def attend(self, i: int, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv[i](x).reshape(-1, 9, 3, 2, 4).permute(2, 0, 3, 1, 4)
        scores = q @ k.transpose(-1, -2) + self.biases[i]
        if i:
            scores = (scores.view(-1, 4, 2, 9, 9) + self.mask[:, None]).view(-1, 2, 9, 9)
        return x + self.proj[i]((scores.softmax(-1) @ v).transpose(1, 2).reshape(-1, 9, 8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for i in range(2):
            x = x.roll((-i, -i), (1, 2)).view(-1, 2, 3, 2, 3, 8).permute(0, 1, 3, 2, 4, 5)
            x = self.attend(i, x.reshape(-1, 9, 8)).view(-1, 2, 2, 3, 3, 8).permute(0, 1, 3, 2, 4, 5)
            x = x.reshape(-1, 6, 6, 8)
        return self.head(self.last(x).mean((1, 2)))


def test_positions_that_several_tables_have_entries_for_count_once() -> None:
    model = Windows()
    captured = capture(model, torch.randn(2, 6, 6, 8, generator=gen(0)))
    groups = find_groups(captured)
    overlaps = [w for w in captured.channel_ids.work if sum(len(axes(x)) for x in w.maps) > len(w.maps[0].shape)]
    costs = CostModel(captured, groups)
    assert overlaps
    assert costs().macs == measured_macs(model, captured)
    keep = random_halves(groups, gen(1))
    result = remove(Traced(model, captured, groups), keep)
    assert result.kept
    assert costs({n: len(k) for n, k in result.kept.items()}).macs == measured_macs(result.model, captured)
