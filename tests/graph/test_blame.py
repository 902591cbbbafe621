"""Groups that make a module fail are found in one run, and no others."""

from __future__ import annotations

import re

import pytest
import torch
from torch import Tensor, nn

from coreprune.graph import Traced, capture, find_groups, probe, remove
from graph.oracle import assert_same, random_halves, zeroed_original
from graph.zoo import gen, randomise


class Fixed(nn.Module):
    """A hidden layer whose width is a literal in the forward, beside one whose width is not."""

    def __init__(self, d: int = 8) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(d, 12), nn.Linear(12, d)
        self.c, self.d = nn.Linear(d, 10), nn.Linear(10, d)

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(self.a(x)).reshape(*x.shape[:-1], 12)
        return x + self.b(hidden) + self.d(torch.tanh(self.c(x)))


class Held(nn.Module):
    """Blocks that some container holds. twice: all are called twice."""

    def __init__(self, blocks: nn.Module, twice: bool = False) -> None:
        super().__init__()
        self.first, self.blocks, self.last, self.twice = nn.Linear(4, 8), blocks, nn.Linear(8, 3), twice

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.first(x))
        for block in [*self.blocks.children()] * (2 if self.twice else 1):
            x = block(x)
        return self.last(x)


class Inner(nn.Module):
    """A module that calls one that fails, with a group of its own around it."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.fixed, self.down = nn.Linear(8, 6), Fixed(6), nn.Linear(6, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.fixed(torch.tanh(self.up(x))))


def traced(model: nn.Module) -> Traced:
    captured = capture(model, torch.randn(2, 4, dtype=torch.float64, generator=gen(0)))
    return Traced(model, captured, find_groups(captured))


@pytest.mark.parametrize("twice", [False, True])
@pytest.mark.parametrize("n", [3, 30])
def test_three_runs_however_many_blocks_fail(n: int, twice: bool) -> None:
    model = randomise(Held(nn.ModuleList(Fixed() for _ in range(n)), twice))
    found = traced(model)
    result = remove(found, random_halves(list(found.groups), gen(1)))
    assert set(result.locked) == {f"blocks.{i}.a" for i in range(n)}
    assert all("does not run: RuntimeError: shape" in why for why in result.locked.values())
    line = "hidden = torch.tanh(self.a(x)).reshape(*x.shape[:-1], 12)"  # what the reader has to change
    assert all(re.search(rf"\(test_blame\.py:\d+: {re.escape(line)}\)$", why) for why in result.locked.values())
    assert result.runs == 3
    x = torch.randn(5, 4, dtype=torch.float64, generator=gen(2))
    assert_same([result.model(x)], [zeroed_original(model, list(found.groups), result.kept)(x)])


def test_a_module_inside_another_is_to_blame_and_not_that_one() -> None:
    model = randomise(Held(nn.Sequential(Inner(), Inner())))
    locked = {g.name: g.locked_because for g in probe(traced(model)).groups}
    failing = {name for name, why in locked.items() if "does not run" in (why or "")}
    assert failing == {"blocks.0.fixed.a", "blocks.1.fixed.a"}
    assert locked["blocks.0.up"] is None
    assert locked["blocks.0.fixed.c"] is None


def test_several_that_only_fail_together_stay() -> None:
    class Pair(nn.Module):
        """Two hidden layers of which each alone may be narrower, as the sum of their widths only has a least value."""

        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c, self.d = nn.Linear(8, 6), nn.Linear(6, 8), nn.Linear(8, 6), nn.Linear(6, 8)

        def forward(self, x: Tensor) -> Tensor:
            a, c = torch.tanh(self.a(x)), torch.tanh(self.c(x))
            torch.cat([a, c], -1).narrow(-1, 0, 9)
            return self.b(a) + self.d(c)

    model = randomise(Held(nn.Sequential(Pair())))
    found = traced(model)
    result = remove(found, random_halves(list(found.groups), gen(1)))
    assert len({"blocks.0.a", "blocks.0.c"} & set(result.kept)) == 1
    x = torch.randn(5, 4, dtype=torch.float64, generator=gen(2))
    assert_same([result.model(x)], [zeroed_original(model, list(found.groups), result.kept)(x)])


def test_what_works_with_another_number_is_not_to_blame() -> None:
    class Number(Fixed):
        def __init__(self) -> None:
            super().__init__()
            self.wide = 12

        def forward(self, x: Tensor) -> Tensor:
            hidden = torch.tanh(self.a(x)).reshape(*x.shape[:-1], self.wide)
            return x + self.b(hidden) + self.d(torch.tanh(self.c(x)))

    model = randomise(Held(nn.Sequential(Number(), Fixed(), Number())))
    assert {g.name for g in probe(traced(model)).groups if "does not run" in (g.locked_because or "")} == {"blocks.1.a"}
