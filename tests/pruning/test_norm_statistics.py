"""Channels that a norm takes its statistics over may leave on request; the repair does the rest."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import coreprune
from coreprune import Budget
from graph.zoo import gen


class Stream(nn.Module):
    """A residual stream through LayerNorms."""

    def __init__(self, d: int = 32) -> None:
        super().__init__()
        self.stem, self.head = nn.Linear(12, d), nn.Linear(d, 5)
        self.norms = nn.ModuleList(nn.LayerNorm(d) for _ in range(2))
        self.up = nn.ModuleList(nn.Linear(d, 24) for _ in range(2))
        self.down = nn.ModuleList(nn.Linear(24, d) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for norm, up, down in zip(self.norms, self.up, self.down, strict=True):
            x = x + down(torch.relu(up(norm(x))))
        return self.head(x)


def model() -> Stream:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Stream().eval()


def error(small: nn.Module, x: Tensor) -> float:
    with torch.no_grad():
        want, got = model()(x), small(x)
    return float((got - want).square().mean() / want.var())


def test_the_stream_leaves_only_on_request_and_the_repair_does_the_rest() -> None:
    x, samples = torch.randn(2, 12, generator=gen(0)), torch.randn(512, 12, generator=gen(1))
    asked = {"budget": Budget(keep={"stem": 0.75}), "method": "magnitude", "queries": samples, "compare": False}
    assert {g.name: g.locked_because for g in coreprune.list_groups(model(), x).groups}["stem"]
    free = coreprune.list_groups(model(), x, norm_statistics=True)
    assert {g.name: g.locked_because for g in free.groups}["stem"] is None

    cut = coreprune.prune(model(), x, repair=False, norm_statistics=True, **asked)
    result = coreprune.prune(model(), x, norm_statistics=True, **asked)
    assert result.model.norms[0].normalized_shape == (24,)
    fresh = torch.randn(512, 12, generator=gen(2))
    assert error(result.model, fresh) < 0.5 * error(cut.model, fresh)
    assert "norm_statistics=True" in result.report.settings.call()
    assert any("statistics of a norm" in note and "stem" in note for note in result.report.notes)


class Padded(nn.Conv2d):
    """Standardises its weight, and pads its input, so that the weight cannot be made plain."""

    by_hand = False

    def forward(self, x: Tensor) -> Tensor:
        w = self.weight
        if self.by_hand:
            w = (w - w.mean((1, 2, 3), keepdim=True)) / (w.var((1, 2, 3), keepdim=True) + 1e-5).sqrt()
        else:
            w = F.batch_norm(w.reshape(1, len(w), -1), None, None, training=True).reshape_as(w)
        return F.conv2d(F.pad(x, (0, 1, 0, 1)), w, self.bias, self.stride)


@pytest.mark.parametrize("by_hand", [False, True])
def test_what_a_standardised_weight_reads_leaves_on_request(by_hand: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Padded, "by_hand", by_hand)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        parts = Padded(3, 16, 2), nn.ReLU(), Padded(16, 16, 2), nn.ReLU(), nn.Conv2d(16, 4, 1)
    net = nn.Sequential(*parts).eval()
    x = torch.randn(2, 3, 8, 8, generator=gen(0))
    assert {g.name: g.locked_because for g in coreprune.list_groups(net, x).groups}["0"]
    asked = {"budget": Budget(keep={"0": 0.5}), "method": "magnitude", "norm_statistics": True, "compare": False}
    samples = torch.randn(64, 3, 8, 8, generator=gen(1))
    fresh = torch.randn(64, 3, 8, 8, generator=gen(2))
    with torch.no_grad():
        want = net(fresh)
        cut = coreprune.prune(net, x, repair=False, queries=samples, **asked).model
        small = coreprune.prune(net, x, queries=samples, **asked).model
        assert cut[2].weight.shape == (16, 8, 2, 2)
        assert (small(fresh) - want).square().mean() < (cut(fresh) - want).square().mean()


def test_a_plan_for_the_stream_needs_the_same_request() -> None:
    x = torch.randn(2, 12, generator=gen(0))
    budget = Budget(keep={"stem": 0.5})
    plan = coreprune.make_plan(model(), x, budget, "magnitude", queries=None, norm_statistics=True)
    assert len(plan.groups["stem"].kept) == 16
    assert coreprune.apply_plan(model(), plan, x, norm_statistics=True)(x).shape == (2, 5)
    with pytest.raises(coreprune.InputError, match=r"channels of stem leave.*norm_statistics=True"):
        coreprune.apply_plan(model(), plan, x)
