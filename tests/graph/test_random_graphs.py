"""Random small graphs of conv, linear, norm, add, cat, split, reshape and depthwise blocks, against the same oracle."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from coreprune.graph import CostModel, Traced, capture, find_groups, remove
from graph.oracle import assert_same, random_halves, zeroed_original
from graph.zoo import gen, randomise

WORDS = """
    conv act norm add branch_cat split_add split_cat shuffle depthwise grouped gate pool glu pad instance transposed
    tokens shared multiply_const slice_half double attention grouped_query rotary group_norm group_norm_add
"""
KINDS = WORDS.split()


class Block(nn.Module):
    """One step of a random network; keeps [N, C, H, W]."""

    def __init__(self, kind: str, c: int, out: int) -> None:
        super().__init__()
        self.kind, self.out = kind, c
        if kind == "conv":
            self.a, self.out = nn.Conv2d(c, out, 3, padding=1), out
        elif kind == "transposed":
            self.a, self.out = nn.ConvTranspose2d(c, out, 3, padding=1), out
        elif kind in ("norm", "instance"):
            self.a = nn.BatchNorm2d(c) if kind == "norm" else nn.InstanceNorm2d(c, affine=True)
        elif kind == "group_norm":
            self.a = nn.GroupNorm(next(g for g in (out // 2, 4, 3, 2, 1) if c % g == 0), c)
        elif kind == "group_norm_add":
            self.a = nn.GroupNorm(next(g for g in (4, 3, 2, 1) if c % g == 0), c)
            self.b, self.c = nn.Conv2d(c, c, 3, padding=1), nn.GroupNorm(2 if c % 2 == 0 else 1, c)
        elif kind == "add":
            self.a, self.b = nn.Conv2d(c, out, 1), nn.Conv2d(out, c, 3, padding=1)
        elif kind == "branch_cat":
            self.a, self.b, self.out = nn.Conv2d(c, out, 1), nn.Conv2d(c, 6, 3, padding=1), out + 6
        elif kind in ("split_add", "slice_half"):
            self.a = nn.Conv2d(c, 8, 1)
            self.out = 4
        elif kind == "split_cat":
            self.a = nn.Conv2d(c, c, 1)
            self.out = c
        elif kind == "depthwise":
            self.a = nn.Conv2d(c, 2 * c, 3, padding=1, groups=c)
            self.out = 2 * c
        elif kind == "grouped":
            self.a, self.b = nn.Conv2d(c, 8, 1), nn.Conv2d(8, 12, 3, padding=1, groups=4)
            self.out = 12
        elif kind == "gate":
            self.a, self.b = nn.Linear(c, 6), nn.Linear(6, c)
        elif kind == "glu":
            self.a, self.out = nn.Conv2d(c, 2 * out, 1), out
        elif kind == "tokens":
            self.a, self.b, self.scale = nn.Linear(c, out), nn.Linear(out, c), nn.Parameter(torch.ones(c))
        elif kind == "shared":
            self.a = nn.Conv2d(c, c, 1)
        elif kind == "double":
            self.out = 2 * c
        elif kind in ("attention", "grouped_query", "rotary"):
            self.d, kv = 4, 2 if kind == "grouped_query" else 4
            self.q, self.k, self.v, self.o = (
                nn.Linear(c, 16),
                nn.Linear(c, 4 * kv),
                nn.Linear(c, 4 * kv),
                nn.Linear(16, c),
            )
            self.register_buffer("angle", torch.arange(2.0))

    def forward(self, x: Tensor) -> Tensor:
        kind = self.kind
        if kind == "group_norm_add":
            return x + self.c(self.b(F.silu(self.a(x))))
        if kind in ("conv", "norm", "group_norm", "instance", "transposed", "depthwise"):
            return self.a(x)
        if kind == "act":
            return F.silu(x)
        if kind == "add":
            return x + self.b(F.relu(self.a(x)))
        if kind == "branch_cat":
            return torch.cat([self.a(x), F.relu(self.b(x))], 1)
        if kind == "split_add":
            a, b = self.a(x).chunk(2, 1)
            return a + torch.tanh(b)
        if kind == "slice_half":
            y = self.a(x)
            half = y.shape[1] // 2
            return y[:, half:] * y[:, :half]
        if kind == "split_cat":
            a, b = self.a(x).chunk(2, 1)
            return torch.cat([b, F.relu(a)], 1)
        if kind == "shuffle":
            n, c, h, w = x.shape
            return x.reshape(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)
        if kind == "grouped":
            return self.b(F.relu(self.a(x)))
        if kind == "gate":
            return x * torch.sigmoid(self.b(F.relu(self.a(x.mean((2, 3))))))[:, :, None, None]
        if kind == "pool":
            return F.max_pool2d(x, 3, 1, 1)
        if kind == "glu":
            return F.glu(self.a(x), 1)
        if kind == "pad":
            return F.pad(x, (1, 1, 1, 1))[:, :, 1:-1, 1:-1]
        if kind == "tokens":
            n, c, h, w = x.shape
            y = x.flatten(2).transpose(1, 2)
            y = y + self.scale * self.b(F.gelu(self.a(y)))
            return y.transpose(1, 2).reshape(n, c, h, w)
        if kind in ("attention", "grouped_query", "rotary"):
            n, c, h, w = x.shape
            y = x.flatten(2).transpose(1, 2)
            q, k, v = (f(y).view(n, h * w, -1, self.d).transpose(1, 2) for f in (self.q, self.k, self.v))
            if kind == "rotary":
                turn = torch.arange(h * w, dtype=x.dtype)[:, None] * torch.cat([self.angle, self.angle])
                q, k = (t * turn.cos() + torch.cat([-t[..., 2:], t[..., :2]], -1) * turn.sin() for t in (q, k))
            if kind == "grouped_query":
                k, v = (t[:, :, None].expand(-1, -1, 2, -1, -1).flatten(1, 2) for t in (k, v))
            if kind == "attention":
                z = (q @ k.transpose(-1, -2) / 2).softmax(-1) @ v
            else:
                z = F.scaled_dot_product_attention(q, k, v)
            y = y + self.o(z.transpose(1, 2).reshape(n, h * w, -1))
            return y.transpose(1, 2).reshape(n, c, h, w)
        if kind == "shared":
            return self.a(F.relu(self.a(x)))
        if kind == "double":
            return torch.cat([x, -x], 1)
        return x * 0.5


class RandomNet(nn.Module):
    def __init__(self, kinds: list[tuple[str, int]], flatten: bool) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        c, blocks = 8, []
        for kind, out in kinds:
            if kind in ("double", "depthwise", "branch_cat") and c > 24:
                continue
            blocks.append(Block(kind, c, out))
            c = blocks[-1].out
        self.blocks, self.flatten = nn.ModuleList(blocks), flatten
        self.head = nn.Linear(c * 16 if flatten else c, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x.flatten(1) if self.flatten else x.mean((2, 3)))


steps = st.lists(st.tuples(st.sampled_from(KINDS), st.sampled_from([4, 6, 8, 10])), min_size=1, max_size=6)


def check(kinds: list[tuple[str, int]], flatten: bool, seed: int, free: bool = False) -> None:
    model = randomise(RandomNet(kinds, flatten), seed)
    x = torch.randn(3, 3, 4, 4, generator=gen(seed), dtype=torch.float64)
    captured = capture(model, x)
    groups = find_groups(captured)
    keep = random_halves(groups, gen(seed + 1))
    result = remove(Traced(model, captured, groups), keep)
    with torch.no_grad():
        want = zeroed_original(model, groups, result.kept)(x)
        assert_same([result.model(x)], [want])
        # What the rules promise also holds without the comparison that `remove` makes: a lock is then the only excuse.
        if not result.locked and keep:
            trusting = remove(Traced(model, captured, groups), keep, check=False)
            assert_same([trusting.model(x)], [want])
    costs = CostModel(captured, groups)({n: len(k) for n, k in result.kept.items()})
    assert costs.params == sum(p.numel() for p in result.model.parameters())
    if free:
        assert not result.locked


@pytest.mark.slow
@settings(max_examples=40)
@given(steps, st.booleans(), st.integers(0, 100))
def test_random_networks_equal_their_zeroed_originals(kinds: list[tuple[str, int]], flatten: bool, seed: int) -> None:
    check(kinds, flatten, seed)


@pytest.mark.slow
@pytest.mark.long
@settings(max_examples=300)
@given(steps, st.booleans(), st.integers(0, 10_000))
def test_many_random_networks(kinds: list[tuple[str, int]], flatten: bool, seed: int) -> None:
    check(kinds, flatten, seed)


@pytest.mark.parametrize("kind", KINDS)
def test_every_block_alone(kind: str) -> None:
    check([("conv", 8), (kind, 6), ("conv", 4)], False, 0, free=True)
