"""In place or not: the same network comes out."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from coreprune import Budget, Descent, Distill, Repair, apply_plan, make_plan, prune

SAMPLES = torch.randn(80, 3, 6, 6, generator=torch.Generator().manual_seed(1))


class Net(nn.Module):
    """Layers that lose channels, and others that the repair changes although their shapes stay."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm, self.b = nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.Conv2d(16, 12, 3, padding=1)
        self.skip, self.head = nn.Conv2d(3, 12, 1), nn.Linear(12, 5)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.head((self.b(torch.relu(self.norm(self.a(x)))) + self.skip(x)).mean((2, 3)))


def network() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Net()


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: t.clone() for name, t in [*model.named_parameters(), *model.named_buffers()]}


WAYS: dict[str, dict[str, Any]] = {
    "repaired": {"repair": Repair(descent=False)},
    "descended": {"repair": Repair(descent=Descent(steps=20)), "compare": False},
    "distilled": {"distill": Distill(steps=3), "repair": False},
    "neither": {"repair": False},
}


@pytest.mark.parametrize("way", WAYS)
def test_the_result_in_place_is_that_of_a_copy(way: str) -> None:
    model = network()
    given, own = copy.deepcopy(model), {id(p) for p in model.parameters()}
    small = prune(given, SAMPLES[:1], Budget(keep=0.5), queries=SAMPLES, **WAYS[way]).model
    got = prune(model, SAMPLES[:1], Budget(keep=0.5), queries=SAMPLES, inplace=True, **WAYS[way]).model
    assert got is model
    assert {id(p) for p in model.parameters()} == own
    mine, theirs = state(model), state(small)
    assert mine.keys() == theirs.keys()
    assert [n for n in mine if not torch.equal(mine[n], theirs[n])] == []
    if way != "neither":  # not only what has shrunk has changed
        before = state(given)
        assert any(mine[n].shape == before[n].shape and not torch.equal(mine[n], before[n]) for n in mine)


def test_a_plan_in_place_is_that_of_a_copy() -> None:
    model, given = network(), network()
    plan = make_plan(model, SAMPLES[:1], Budget(keep=0.5), "magnitude", queries=None)
    small = apply_plan(given, plan, queries=SAMPLES)
    apply_plan(model, plan, queries=SAMPLES, inplace=True)
    mine, theirs = state(model), state(small)
    assert [n for n in mine if not torch.equal(mine[n], theirs[n])] == []
