"""Random small networks of conv, linear, norm, add, cat, split, reshape, attention and many other blocks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

WORDS = """
    conv act norm add branch_cat split_add split_cat shuffle depthwise grouped gate pool glu pad instance transposed
    tokens shared multiply_const slice_half double attention grouped_query rotary group_norm group_norm_add interleaved
    space_to_depth cache write_space write_channels in_place remembered einsum alias autocast mask second axes fourier
    permuted cumulative
"""
LOCKING = {"cumulative", "write_channels"}  # blocks that mix channels, or write into a part of them
ATTENTION = ("attention", "grouped_query", "rotary", "interleaved")
KINDS = WORDS.split()


def turned(t: Tensor, c: Tensor, s: Tensor) -> Tensor:
    """A rotary embedding of neighbouring entries."""
    even, odd = t[..., ::2], t[..., 1::2]
    return torch.stack([even * c - odd * s, even * s + odd * c], -1).flatten(-2)


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
        elif kind in ("space_to_depth", "write_channels", "in_place", "alias", "autocast", "axes"):
            self.a = nn.Linear(c, c) if kind == "axes" else nn.Conv2d(4 * c if kind == "space_to_depth" else c, c, 1)
        elif kind == "cache":
            self.table: Tensor | None = None
        elif kind == "remembered":
            self.a, self.width, self.out = nn.Conv2d(c, 2 * out, 1), out, out
        elif kind == "einsum":
            self.weight, self.out = nn.Parameter(torch.ones(out, c)), out
        elif kind == "mask":
            self.register_buffer("keep", (torch.arange(c) % 3 > 0).double())
        elif kind == "second":
            self.a = nn.Conv2d(2, c, 1)
        elif kind == "permuted":
            self.register_buffer("order", torch.arange(c).flip(0))
        elif kind in ATTENTION:
            self.d, kv = 4, 2 if kind == "grouped_query" else 4
            self.q, self.k, self.v, self.o = (
                nn.Linear(c, 16),
                nn.Linear(c, 4 * kv),
                nn.Linear(c, 4 * kv),
                nn.Linear(16, c),
            )
            self.register_buffer("angle", torch.arange(2.0))

    def forward(self, x: Tensor, second: Tensor) -> Tensor:
        kind = self.kind
        if kind in NEWER:
            return NEWER[kind](self, x, second)
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
        if kind in ATTENTION:
            n, c, h, w = x.shape
            y = x.flatten(2).transpose(1, 2)
            q, k, v = (f(y).view(n, h * w, -1, self.d).transpose(1, 2) for f in (self.q, self.k, self.v))
            if kind == "rotary":
                turn = torch.arange(h * w, dtype=x.dtype)[:, None] * torch.cat([self.angle, self.angle])
                q, k = (t * turn.cos() + torch.cat([-t[..., 2:], t[..., :2]], -1) * turn.sin() for t in (q, k))
            if kind == "interleaved":
                turn = torch.arange(h * w, dtype=x.dtype)[:, None] * self.angle
                q, k = (turned(t, turn.cos(), turn.sin()) for t in (q, k))
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


def space_to_depth(block: Any, x: Tensor, _: Tensor) -> Tensor:
    corners = [x[..., i::2, j::2] for i in range(2) for j in range(2)]
    return F.interpolate(block.a(torch.cat(corners, 1)), scale_factor=2.0)


def cache(block: Any, x: Tensor, _: Tensor) -> Tensor:
    if block.table is None or block.table.shape != x.shape[-2:]:
        block.table = torch.linspace(0, 1, x.shape[-2] * x.shape[-1], dtype=x.dtype).reshape(x.shape[-2:])
    return x * block.table


def write_space(_block: Any, x: Tensor, _: Tensor) -> Tensor:
    y = torch.zeros_like(x)
    y[:, :, 1:] = x[:, :, :-1]
    return x + y


def write_channels(block: Any, x: Tensor, _: Tensor) -> Tensor:
    y = block.a(x).clone()
    y[:, : y.shape[1] // 2] = F.relu(x)[:, : y.shape[1] // 2]
    return y


def in_place(block: Any, x: Tensor, _: Tensor) -> Tensor:
    y = block.a(x)
    y.add_(1).relu_()
    y *= 2
    return y


def remembered(block: Any, x: Tensor, _: Tensor) -> Tensor:
    a, b = block.a(x).split([block.width, block.width], 1)
    return a * torch.sigmoid(b)


def autocast(block: Any, x: Tensor, _: Tensor) -> Tensor:
    with torch.autocast("cpu", enabled=False):
        return F.relu(block.a(x))


def axes(block: Any, x: Tensor, _: Tensor) -> Tensor:
    return torch.swapdims(block.a(torch.moveaxis(x, 1, -1)), 1, -1).swapaxes(-1, -2)


# name -> (block, input, second input of the network) -> output
NEWER: dict[str, Callable[[Any, Tensor, Tensor], Tensor]] = {
    "space_to_depth": space_to_depth,
    "cache": cache,
    "write_space": write_space,
    "write_channels": write_channels,
    "in_place": in_place,
    "remembered": remembered,
    "einsum": lambda block, x, _: torch.einsum("...chw,dc->...dhw", x, block.weight),
    "alias": lambda block, x, _: torch.subtract(torch.multiply(block.a(x), 0.5), torch.negative(torch.absolute(x))),
    "autocast": autocast,
    "mask": lambda block, x, _: x * block.keep[:, None, None],
    "second": lambda block, x, second: x + block.a(second),
    "axes": axes,
    "fourier": lambda _block, x, _: torch.fft.fft2(x).real + x,
    "permuted": lambda block, x, _: x[:, block.order] + 1,
    "cumulative": lambda _block, x, _: x.cumsum(1),
}


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

    def forward(self, x: Tensor, second: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = block(x, second)
        return self.head(x.flatten(1) if self.flatten else x.mean((2, 3)))
