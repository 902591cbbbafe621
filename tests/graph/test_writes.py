"""Writes into parts of tensors: the graph says the same, without the writes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from coreprune.graph import Traced, capture, find_groups, probe, remove
from coreprune.graph.execution import mutates
from coreprune.graph.replay import replay
from graph.oracle import assert_same, random_halves, zeroed_original
from graph.zoo import gen, randomise


def filled(x: Tensor) -> Tensor:
    out = x.new_empty(x.shape)
    out[..., 2:] = x[..., :-2]
    out[..., :2] = x[..., -2:].exp()
    return out


def corner(x: Tensor) -> Tensor:
    out = torch.zeros(x.shape, dtype=x.dtype)
    out[:, :, :2, 1:3] = x[:, :, :2, 1:3]
    out[:, :, -2:, :1] = x[:, :, -2:, :1].sin()
    return out


def changed(x: Tensor) -> Tensor:
    y = x.sigmoid()
    y[..., 0:2] = y[..., 0:2] * 2 - 0.5
    y[..., 2:4] = (y[..., 2:4] * 2) ** 2
    return y


def selected(x: Tensor) -> Tensor:
    y = x * 2
    y[:, :, 1] = 0.5
    y[:, :, 0, 2] = x[:, :, 0, 0]
    y[..., -1] = x.mean((2, 3))[..., None]
    return y


def everything(x: Tensor) -> Tensor:
    y = torch.ones_like(x)
    y[:] = x.cos()
    return y


def nested(x: Tensor) -> Tensor:
    y = x.exp()
    y[:, :, 1:][:, :, 1:3] = x[:, :, :2]
    return y


def other_dtype(x: Tensor) -> Tensor:
    y = torch.zeros(x.shape, dtype=torch.float64)
    y[..., :3] = x[..., :3].float()
    return y


def twice(x: Tensor) -> Tensor:
    y = x.exp()
    y[..., :3] = x[..., :3]
    z = y * 2
    y[..., 2:] = z[..., 2:]
    return y + z


def zeroed(x: Tensor) -> Tensor:
    y = x.cos()
    y[:, :, 1:3].zero_()
    z = torch.ones_like(y).zero_()
    return y + z.fill_(0.25)


def old_view(x: Tensor) -> Tensor:
    """The view sees what is written after it was made, so that nothing may be replaced."""
    y = x.exp()
    view = y[..., :2]
    y[..., 1:3] = x[..., 1:3]
    return y + view.sum(-1, keepdim=True)


def counted(x: Tensor) -> Tensor:
    y = x.exp()
    y[..., :2] += 1
    y[..., 1:3] = x[..., 1:3]
    return y


def own_input(x: Tensor) -> Tensor:
    x[..., :2] = x[..., 2:4] * 2
    return x * 1


class Between(nn.Module):
    def __init__(self, f) -> None:
        super().__init__()
        self.a, self.b, self.f = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 3), f

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.f(torch.relu(self.a(x)))).mean((2, 3))


JOINED = (filled, corner, changed, selected, everything, nested, other_dtype, twice, zeroed)
LEFT = (old_view, counted)


@pytest.mark.parametrize("f", [*JOINED, *LEFT], ids=lambda f: f.__name__)
def test_the_graph_gives_the_same(f) -> None:
    model = randomise(Between(f))
    x = torch.randn(2, 3, 6, 6, generator=gen(0), dtype=torch.float64)
    captured = capture(model, x, batch=2)
    assert_same(replay(captured, model, {}, {}), [model(x)], 1e-12)
    left = [n for n in captured.graph.graph.nodes if n.op == "call_function" and mutates(n)]
    assert bool(left) == (f in (*LEFT, everything, zeroed))


@pytest.mark.parametrize("f", JOINED, ids=lambda f: f.__name__)
def test_channels_leave_exactly(f) -> None:
    """What is written into a part of a tensor locked its channels."""
    model = randomise(Between(f))
    captured = capture(model, torch.randn(1, 3, 6, 6, generator=gen(0), dtype=torch.float64))
    traced = probe(Traced(model, captured, find_groups(captured)))
    result = remove(traced, random_halves(list(traced.groups), gen(1)))
    assert "a" in result.kept, [g.locked_because for g in traced.groups]
    zeros = zeroed_original(model, list(traced.groups), result.kept)
    for batch in (1, 3):
        x = torch.randn(batch, 3, 6, 6, generator=gen(batch), dtype=torch.float64)
        assert_same([result.model(x)], [zeros(x)])


def test_a_write_into_the_input_is_no_concatenation() -> None:
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(6, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.a(own_input(x))

    captured = capture(Own(), torch.randn(1, 6, generator=gen(0)))
    assert any(n.op == "call_function" and mutates(n) for n in captured.graph.graph.nodes)
