"""What a forward has cached does not lock a group, and is made anew by the smaller model."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from coreprune.graph import Traced, capture, find_groups, probe, remove
from graph.oracle import assert_same, random_halves, zeroed_original
from graph.zoo import gen, randomise

N, D, HEADS = 9, 32, 4


class Attention(nn.Module):
    """Attention with a bias per head and distance, which is looked up once."""

    def __init__(self) -> None:
        super().__init__()
        self.heads, self.cache, self.table, self.pair, self.kept = HEADS, {}, None, None, []
        self.enter, self.qkv, self.leave = nn.Linear(8, D), nn.Linear(D, 3 * D), nn.Linear(D, 4)
        self.bias = nn.Parameter(torch.randn(HEADS, N))
        self.register_buffer("distance", (torch.arange(N)[:, None] - torch.arange(N)[None]).abs(), persistent=False)

    def looked_up(self) -> Tensor:
        return self.bias[:, self.distance]

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.enter(x)).view(len(x), N, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        scores = (q @ k.transpose(-1, -2)) / 8**0.5 + self.looked_up()
        return self.leave((scores.softmax(-1) @ v).transpose(1, 2).reshape(len(x), N, -1))


class ByDevice(Attention):
    def looked_up(self) -> Tensor:
        if "cpu" not in self.cache:
            self.cache["cpu"] = super().looked_up()
        return self.cache["cpu"]


class UntilNone(Attention):
    def looked_up(self) -> Tensor:
        if self.table is None:
            self.table = super().looked_up()
        return self.table


class UntilAbsent(Attention):
    def looked_up(self) -> Tensor:
        if not hasattr(self, "later"):
            self.later = super().looked_up()
        return self.later


class InAPair(Attention):
    def looked_up(self) -> Tensor:
        if self.pair is None:
            table = super().looked_up()
            self.pair = (table, table.shape[0])
        return self.pair[0]


class InAList(Attention):
    def looked_up(self) -> Tensor:
        if not self.kept:
            self.kept.append(super().looked_up())
        return self.kept[0]


class Nested(Attention):
    def looked_up(self) -> Tensor:
        tables = self.cache.setdefault("tables", {})
        if N not in tables:
            tables[N] = super().looked_up()
        return tables[N]


class OfTheWidth(Attention):
    """A table as wide as the inner layer, which no parameter makes."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(D, 3 * D), nn.Linear(3 * D, D)
        self.ones: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        h = self.inner(self.enter(x))
        if self.ones is None or self.ones.shape != h.shape[-1:]:
            self.ones = torch.full(h.shape[-1:], 0.5, dtype=h.dtype)
        return self.leave(self.outer(torch.relu(h) * self.ones))


def inputs(n: int) -> Tensor:
    return torch.randn(n, N, 8, dtype=torch.float64, generator=gen(n))


def probed(model: nn.Module) -> Traced:
    captured = capture(model, inputs(1))
    return probe(Traced(model, captured, find_groups(captured)))


CACHED: dict[str, Callable[[], nn.Module]] = {
    c.__name__: c for c in (ByDevice, UntilNone, UntilAbsent, InAPair, InAList, Nested, OfTheWidth)
}


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("name", CACHED)
def test_a_warm_model_is_cut_as_a_cold_one(name: str, inplace: bool) -> None:
    cold = randomise(CACHED[name]())
    warm = copy.deepcopy(cold)
    with torch.no_grad():
        warm(inputs(2))
    plans = [[(g.name, g.size, g.unit, g.locked_because) for g in probed(m).groups] for m in (cold, warm)]
    assert plans[0] == plans[1]
    found = probed(warm)
    assert ("inner" if name == "OfTheWidth" else "qkv") in found.free
    keep = random_halves(list(found.groups), gen(0))
    want = zeroed_original(cold, list(found.groups), keep)(inputs(3))
    before = warm(inputs(3))
    small = remove(found, keep, inplace=inplace).model
    for _ in range(2):  # the second run uses what the first has cached
        assert_same([small(inputs(3))], [want])
    if inplace:
        assert small is warm
    else:
        assert torch.equal(warm(inputs(3)), before)


def test_a_tensor_that_the_forward_does_not_make_stays() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(8, 12), nn.Linear(12, 4)
            self.scale: Tensor | None = torch.tensor(3.0, dtype=torch.float64)
            self.last: Tensor | None = None

        def forward(self, x: Tensor) -> Tensor:
            h = torch.relu(self.a(x))
            self.last = h if self.scale is None else h * self.scale
            return self.b(self.last)

    model = randomise(Scaled())
    model(inputs(2))
    found = probed(model)
    assert [keys for _, keys, _ in found.captured.caches] == [("last",)]
    keep = random_halves(list(found.groups), gen(0))
    small = remove(found, keep).model
    assert small.scale == 3.0
    assert_same([small(inputs(3))], [zeroed_original(copy_without(model), list(found.groups), keep)(inputs(3))])


def copy_without(model: nn.Module) -> nn.Module:
    """The oracle copies with copy.deepcopy, which refuses activations that were kept."""
    model.last = None
    return model
