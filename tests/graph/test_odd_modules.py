"""One unusual operation between two convolutions: either its channels leave correctly, or they are locked."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from coreprune.graph import Traced, capture, find_groups, remove
from graph.oracle import assert_same, random_halves, zeroed_original
from graph.zoo import gen, randomise


class Fn(nn.Module):
    """A function as a module."""

    def __init__(self, f) -> None:
        super().__init__()
        self.f = f

    def forward(self, x: Tensor) -> Tensor:
        return self.f(x)


class Unpool(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        y, i = F.max_pool2d(x, 2, return_indices=True)
        return F.max_unpool2d(y, i, 2)


class Standardised(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        w = self.weight
        w = (w - w.mean((1, 2, 3), keepdim=True)) / (w.std((1, 2, 3), keepdim=True) + 1e-5)
        return F.conv2d(x, w, self.bias, 1, 1)


class LowRank(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Linear(8, 8, bias=False)
        self.a, self.b = nn.Parameter(torch.zeros(2, 8)), nn.Parameter(torch.zeros(8, 2))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x.movedim(1, -1), self.w.weight + self.b @ self.a).movedim(-1, 1)


class OneHead(nn.Module):
    """Non-local block: the width of q and k is free, because the forward has no scale that depends on it."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = nn.Conv2d(8, 4, 1), nn.Conv2d(8, 4, 1), nn.Conv2d(8, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        n, c, h, w = x.shape
        q, k, v = (f(x).flatten(2) for f in (self.q, self.k, self.v))
        a = (q.transpose(1, 2) @ k).softmax(-1)
        return x + (v @ a.transpose(1, 2)).view(n, c, h, w)


class CrossCovariance(nn.Module):
    """Attention between channels: softmax over channels."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Conv2d(8, 24, 1)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).flatten(2).chunk(3, 1)
        a = (F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).transpose(1, 2)).softmax(-1)
        return (a @ v).view(x.shape)


class SpatialAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.c = nn.Conv2d(2, 1, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(self.c(torch.cat([x.mean(1, keepdim=True), x.amax(1, keepdim=True)], 1)))


class Permutation(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("p", torch.tensor([3, 1, 0, 2, 7, 6, 5, 4]))

    def forward(self, x: Tensor) -> Tensor:
        return x[:, self.p]


class Biases(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.p, self.e = nn.Parameter(torch.zeros(1, 8, 1, 1)), nn.Embedding(3, 8)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.p + self.e(torch.zeros(x.shape[0], dtype=torch.long))[:, :, None, None]


class SpaceToDepth(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        n, c, h, w = x.shape
        return x.view(n, c, h // 2, 2, w // 2, 2).permute(0, 1, 3, 5, 2, 4).reshape(n, c * 4, h // 2, w // 2)


class TiedAutoEncoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.w(x.movedim(1, -1)))
        return F.linear(y, self.w.weight.t()).movedim(-1, 1)


class Writes(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        out[:, :4] = x[:, 4:]
        return out


class SelfAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.m = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        y = x.flatten(2).transpose(1, 2)
        return self.m(y, y, y)[0].transpose(1, 2).reshape(x.shape)


# name -> (what lies between, its output channels, whether the channels in front of it can leave)
CASES = {
    "local response norm": (lambda: nn.LocalResponseNorm(3), 8, False),
    "softmax over channels": (nn.Softmax2d, 8, False),
    "unpooling": (Unpool, 8, True),
    "fold": (lambda: Fn(lambda x: F.fold(F.unfold(x, 3, padding=1), x.shape[2:], 3, padding=1)), 8, True),
    "standardised weights": (lambda: Standardised(8, 8, 3), 8, False),
    "low rank update": (LowRank, 8, False),
    "one head": (OneHead, 8, True),
    "cross covariance": (CrossCovariance, 8, False),
    "spatial attention": (SpatialAttention, 8, False),
    "every second channel": (lambda: Fn(lambda x: torch.cat([x[:, 0::2], x[:, 1::2]], 1)), 8, True),
    "permutation": (Permutation, 8, False),
    "flip": (lambda: Fn(lambda x: x.flip(1) + x), 8, True),
    "roll": (lambda: Fn(lambda x: torch.roll(x, 2, 1)), 8, False),
    "biases and embeddings": (Biases, 8, True),
    "space to depth": (SpaceToDepth, 32, True),
    "pixel unshuffle": (lambda: nn.PixelUnshuffle(2), 32, True),
    "tied autoencoder": (TiedAutoEncoder, 8, True),
    "cumulative sum": (lambda: Fn(lambda x: x.cumsum(1)), 8, False),
    "writes": (Writes, 8, False),
    "channel shuffle": (lambda: nn.ChannelShuffle(2), 8, True),
    "weight norm": (lambda: parametrizations.weight_norm(nn.Conv2d(8, 8, 1)), 8, False),
    "spectral norm": (lambda: parametrizations.spectral_norm(nn.Conv2d(8, 8, 1)), 8, False),
    "reflection": (lambda: nn.Conv2d(8, 8, 3, padding=1, padding_mode="reflect"), 8, True),
    "circular": (lambda: nn.Conv2d(8, 8, 3, padding=1, padding_mode="circular"), 8, True),
    "dropout": (nn.Dropout2d, 8, True),
    "bilinear": (lambda: nn.UpsamplingBilinear2d(scale_factor=2), 8, True),
    "dilated groups": (lambda: nn.Conv2d(8, 8, 3, dilation=2, padding=2, groups=2), 8, True),
    "one group per channel": (lambda: nn.GroupNorm(8, 8), 8, True),
    "torch attention": (SelfAttention, 8, True),
    "maxout": (lambda: Fn(lambda x: x.unflatten(1, (-1, 2)).amax(2)), 4, True),
    "interleave": (lambda: Fn(lambda x: torch.stack([x, -x], 2).flatten(1, 2)), 16, True),
    "cosine": (lambda: Fn(lambda x: F.normalize(x, dim=1)), 8, True),
    "in place": (lambda: Fn(lambda x: x.add_(1).mul_(2).relu_()), 8, True),
}


class Between(nn.Module):
    def __init__(self, middle: nn.Module, out: int) -> None:
        super().__init__()
        self.a, self.middle, self.b = nn.Conv2d(3, 8, 3, padding=1), middle, nn.Conv2d(out, 6, 3, padding=1)
        self.head = nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.b(self.middle(torch.relu(self.a(x))))).mean((2, 3)))


@pytest.mark.parametrize("name", CASES)
def test_correct_or_locked(name: str) -> None:
    build, out, leaves = CASES[name]
    model = Between(build(), out)
    model = randomise(model) if "norm" not in name else model.double().eval()
    x = torch.randn(3, 3, 4, 4, generator=gen(0), dtype=torch.float64)
    captured = capture(model, x)
    groups = find_groups(captured)
    keep = random_halves(groups, gen(1))
    result = remove(Traced(model, captured, groups), keep)
    assert ("a" in result.kept) == leaves, (result.locked, [g.locked_because for g in groups])
    assert "b" in result.kept
    if any("functional" in g.flags for g in groups if g.name in result.kept):
        return  # read without a weight as well; `remove` compares with a replay of the graph
    assert_same([result.model(x)], [zeroed_original(model, groups, result.kept)(x)])


def test_a_channel_norm_reads_its_channels() -> None:
    """F.normalize over channels: zeros do not change the length, so the channels can leave."""
    build, out, _ = CASES["cosine"]
    model = randomise(Between(build(), out))
    x = torch.randn(3, 3, 4, 4, generator=gen(0), dtype=torch.float64)
    captured = capture(model, x)
    keep = torch.tensor([1, 2, 5])
    small = remove(Traced(model, captured, find_groups(captured)), {"a": keep}).model
    h = F.normalize(torch.relu(model.a(x))[:, keep], dim=1)
    h = torch.relu(F.conv2d(h, model.b.weight[:, keep], model.b.bias, padding=1))
    assert_same([small(x)], [model.head(h.mean((2, 3)))])
