"""Window attention with masks in a buffer, and norms over the responses of all channels."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from coreprune.graph import Traced, capture, find_groups, probe, remove
from coreprune.graph.kept import positions
from graph.oracle import assert_same, random_halves, zeroed_original
from graph.zoo import gen, randomise


class Windows(nn.Module):
    """Attention in windows of `area` tokens, with a table of relative positions and a mask for each window.

    fused: the mask is repeated for every head before it meets the table, else it is broadcast.
    """

    def __init__(self, dim: int, heads: int, windows: int, area: int, fused: bool) -> None:
        super().__init__()
        self.num_heads, self.area, self.fused, self.scale = heads, area, fused, (dim // heads) ** -0.5
        self.table = nn.Parameter(torch.zeros(2 * area - 1, heads))
        self.register_buffer("index", torch.arange(area)[:, None] - torch.arange(area) + area - 1, persistent=False)
        self.register_buffer("mask", torch.zeros(windows, area, area).bernoulli_(0.2, generator=gen(0)) * -50)
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        places = self.table[self.index.view(-1)].view(n, n, -1).permute(2, 0, 1).unsqueeze(0)
        windows = len(self.mask)
        if self.fused:
            mask = self.mask.view(1, windows, 1, n, n).expand(b // windows, -1, self.num_heads, -1, -1)
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=places + mask.reshape(-1, self.num_heads, n, n))
        else:
            scores = (self.scale * q) @ k.transpose(-1, -2) + places
            scores = scores.view(-1, windows, self.num_heads, n, n) + self.mask.unsqueeze(1).unsqueeze(0)
            y = scores.view(-1, self.num_heads, n, n).softmax(-1) @ v
        return self.proj(y.transpose(1, 2).reshape(b, n, -1))


class Net(nn.Module):
    def __init__(self, fused: bool, heads: int = 4) -> None:
        super().__init__()
        self.stem, self.attention, self.head = nn.Linear(5, 16), Windows(16, heads, 4, 6, fused), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        y = self.stem(x).reshape(b * 4, n // 4, -1)
        return self.head(y + self.attention(y)).reshape(b, n, -1)


class Responses(nn.Module):
    """The global response norm of ConvNeXt V2: every channel's length over the mean of all lengths."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 12, 3, padding=1), nn.Conv2d(12, 4, 1)
        self.scale = nn.Parameter(torch.ones(12, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        h = F.gelu(self.a(x))
        lengths = h.norm(p=2, dim=(2, 3), keepdim=True)
        return self.b(h + self.scale * h * (lengths / (lengths.mean(1, keepdim=True) + 1e-6)))


@pytest.mark.parametrize("fused", [False, True])
def test_heads_leave_with_their_columns_of_the_table(fused: bool) -> None:
    model = randomise(Net(fused))
    x = torch.randn(2, 24, 5, generator=gen(0), dtype=torch.float64)
    captured = capture(model, x)
    traced = probe(Traced(model, captured, find_groups(captured)))
    heads = traced.free["attention.qkv"]
    assert (heads.size // heads.unit, "heads" in heads.flags) == (4, True)
    result = remove(traced, random_halves(list(traced.groups), gen(2)))
    assert result.model.attention.num_heads == 2
    assert result.model.attention.table.shape == (11, 2)
    assert result.model.attention.mask.shape == (4, 6, 6)
    zeros = zeroed_original(model, list(traced.groups), result.kept)
    for inputs in (x, torch.randn(3, 24, 5, generator=gen(1), dtype=torch.float64)):
        assert_same([result.model(inputs)], [zeros(inputs)])


def test_repeated_weights_follow_what_they_meet() -> None:
    """The mask has ids of its own at every head, and its positions stay and leave with them."""
    model = randomise(Net(True))
    captured = capture(model, torch.randn(1, 24, 5, generator=gen(0), dtype=torch.float64))
    groups = find_groups(captured)
    qkv = next(g for g in groups if g.name == "attention.qkv")
    kept = qkv.units()[[1, 3]].reshape(-1).sort().values
    result = remove(Traced(model, captured, groups), {"attention.qkv": kept})
    (node,) = [n for n in captured.graph.graph.nodes if n.name == "expand"]
    ((axis, stay),) = positions(captured, [node], result.masks)[node] or ()
    assert (axis, stay.tolist()) == (2, [1, 3])


class Literal(Net):
    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        return y + self.head.bias.view(1, 1, 3).expand(1, 24, 3)


def test_repeated_weights_elsewhere_lock_nothing() -> None:
    model = randomise(Literal(True))
    captured = capture(model, torch.randn(1, 24, 5, generator=gen(0), dtype=torch.float64))
    assert "attention.qkv" in probe(Traced(model, captured, find_groups(captured))).free


class Repeated(nn.Module):
    """The number of repetitions is a literal, so that the heads have to stay."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(5, 8), nn.Linear(8, 3)
        self.factor = nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.relu(self.a(x)) * self.factor.expand(8))


def test_a_literal_number_of_repetitions_locks() -> None:
    model = randomise(Repeated())
    captured = capture(model, torch.randn(2, 5, generator=gen(0), dtype=torch.float64))
    traced = probe(Traced(model, captured, find_groups(captured)))
    assert "a" not in traced.free


def test_responses_of_all_channels_are_a_statistic() -> None:
    """Exact removal is not possible: the mean of the lengths is over the channels that are left."""
    model = randomise(Responses())
    x = torch.randn(2, 3, 6, 6, generator=gen(0), dtype=torch.float64)
    captured = capture(model, x)
    locked = next(g for g in find_groups(captured) if g.name == "a")
    assert "statistics of a norm" in (locked.locked_because or "")
    groups = find_groups(captured, norm_statistics=True)
    assert "norm-statistics" in next(g for g in groups if g.name == "a").flags
    keep = torch.tensor([0, 2, 3, 7, 11])
    small = remove(Traced(model, captured, groups), {"a": keep}).model
    h = F.gelu(model.a(x)[:, keep])
    lengths = h.norm(p=2, dim=(2, 3), keepdim=True)
    h = h + model.scale[keep] * h * (lengths / (lengths.mean(1, keepdim=True) + 1e-6))
    assert_same([small(x)], [F.conv2d(h, model.b.weight[:, keep], model.b.bias)])
