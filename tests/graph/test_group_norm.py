"""Norms over sections of channels: whole sections leave, and the others do not notice."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from coreprune.graph import Group, Traced, capture, find_groups, probe, remove
from graph.oracle import assert_same, outputs, random_halves, zeroed_original
from graph.zoo import gen, randomise


class FiLM(nn.Module):
    """A residual block of a diffusion UNet. film: the time scales and shifts the second norm; else it is added."""

    def __init__(self, c: int, out: int, groups: int = 4, film: bool = False) -> None:
        super().__init__()
        self.film = film
        self.n1, self.c1 = nn.GroupNorm(groups, c), nn.Conv2d(c, out, 3, 1, 1)
        self.time = nn.Sequential(nn.SiLU(), nn.Linear(6, out * (1 + film)))
        self.n2, self.c2 = nn.GroupNorm(groups, out), nn.Conv2d(out, out, 3, 1, 1)
        self.skip = nn.Conv2d(c, out, 1) if c != out else nn.Identity()

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        h = self.c1(F.silu(self.n1(x)))
        e = self.time(t)[:, :, None, None]
        if self.film:
            scale, shift = e.chunk(2, 1)
            h = self.n2(h) * (1 + scale) + shift
        else:
            h = self.n2(h + e)
        return self.skip(x) + self.c2(F.silu(h))


class Attention(nn.Module):
    """Attention over the pixels, behind a GroupNorm, as in diffusion UNets."""

    def __init__(self, c: int, heads: int = 2, groups: int = 4) -> None:
        super().__init__()
        self.heads, self.width = heads, c // heads
        self.norm, self.qkv, self.out = nn.GroupNorm(groups, c), nn.Conv1d(c, 3 * c, 1), nn.Conv1d(c, c, 1)

    def forward(self, x: Tensor) -> Tensor:
        b, _, h, w = x.shape
        y = self.norm(x).flatten(2)
        q, k, v = self.qkv(y).view(b, 3, self.heads, self.width, h * w).transpose(-1, -2).unbind(1)
        y = F.scaled_dot_product_attention(q, k, v).transpose(-1, -2).reshape(b, -1, h * w)
        return x + self.out(y).unflatten(2, (h, w))


class UNet(nn.Module):
    """Down, middle with attention, up with a concatenation."""

    def __init__(self, film: bool = False) -> None:
        super().__init__()
        self.inp, self.a, self.down = nn.Conv2d(3, 8, 3, 1, 1), FiLM(8, 8, film=film), nn.Conv2d(8, 16, 3, 2, 1)
        self.b, self.attention, self.c = FiLM(16, 16, film=film), Attention(16), FiLM(16, 16, film=film)
        self.up, self.d = nn.Conv2d(16, 16, 3, 1, 1), FiLM(24, 8, film=film)
        self.norm, self.out = nn.GroupNorm(4, 8), nn.Conv2d(8, 3, 3, 1, 1)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        h = self.a(self.inp(x), t)
        m = self.c(self.attention(self.b(self.down(h), t)), t)
        m = self.up(F.interpolate(m, scale_factor=2.0))
        return self.out(F.silu(self.norm(self.d(torch.cat([m, h], 1), t))))


class Case12(nn.Module):
    """Two residual blocks with time embeddings; every convolution stands before a GroupNorm."""

    def __init__(self) -> None:
        super().__init__()
        self.i, self.a, self.b, self.o = (
            nn.Conv2d(3, 32, 3, 1, 1),
            FiLM(32, 32, 8),
            FiLM(32, 32, 8),
            nn.Conv2d(32, 3, 1),
        )

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.o(self.b(self.a(self.i(x), t), t))


class Sum(nn.Module):
    """One residual sum, which norms with sections of 4, 6 and 12 channels read."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 48, 3, padding=1), nn.Conv2d(48, 48, 3, padding=1)
        self.norms = nn.ModuleList(nn.GroupNorm(g, 48) for g in (12, 8, 4))
        self.heads = nn.ModuleList(nn.Conv2d(48, 4, 1) for _ in self.norms)

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        h = h + F.relu(self.b(F.relu(h)))
        return sum(head(torch.tanh(norm(h))) for head, norm in zip(self.heads, self.norms, strict=True))


class Joined(nn.Module):
    """A norm over a concatenation, whose sections do not end where its parts do."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(3, 8, 3, padding=1)
        self.na, self.n, self.out = nn.GroupNorm(8, 16), nn.GroupNorm(4, 24), nn.Conv2d(24, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.tanh(self.n(torch.cat([torch.tanh(self.na(self.a(x))), self.b(x)], 1))))


class Functional(nn.Module):
    """A norm without a module. count: "attribute", "width" (channels of a section), or "literal"."""

    def __init__(self, count: str) -> None:
        super().__init__()
        self.count, self.n_groups = count, 6
        self.a, self.out = nn.Conv2d(3, 24, 3, padding=1), nn.Conv2d(24, 4, 1)
        self.scale, self.shift = nn.Parameter(torch.ones(24)), nn.Parameter(torch.zeros(24))

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        n = {"attribute": self.n_groups, "width": h.shape[1] // 4, "literal": 6}[self.count]
        return self.out(torch.tanh(F.group_norm(h, n, self.scale, self.shift)))


class ByHand(nn.Module):
    """A GroupNorm written with means over a reshaped axis."""

    def __init__(self) -> None:
        super().__init__()
        self.width = 4
        self.a, self.out = nn.Conv2d(3, 24, 3, padding=1), nn.Conv2d(24, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x).unflatten(1, (-1, self.width))
        mean, var = h.mean((2, 3, 4), keepdim=True), h.var((2, 3, 4), keepdim=True, unbiased=False)
        return self.out(torch.tanh(((h - mean) / (var + 1e-5).sqrt()).flatten(1, 2)))


class Float32(nn.GroupNorm):
    """A GroupNorm of a library's own, which computes in another dtype."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.double()).to(x.dtype)


def plain(norm: nn.Module) -> Callable[[], nn.Module]:
    return lambda: nn.Sequential(nn.Conv2d(3, 24, 3, padding=1), norm, nn.Tanh(), nn.Conv2d(24, 4, 1))


IMAGE, LARGER = (2, 3, 8, 8), (3, 3, 12, 10)
# name: (model, whether it takes a time, number of free groups, channels of a unit by group)
CASES: dict[str, tuple[Callable[[], nn.Module], bool, dict[str, int]]] = {
    "two residual blocks with times": (Case12, True, {"i": 4, "a.c1": 4, "b.c1": 4}),
    "a diffusion network": (UNet, True, {"down": 4, "a.c1": 2, "b.c1": 4, "d.c1": 2, "d.c2": 2, "up": 6}),
    "one that scales by the time": (lambda: UNet(film=True), True, {"a.c1": 2, "b.c1": 4, "c.c1": 4, "down": 4}),
    "several counts": (Sum, False, {"a": 12}),
    "a concatenation": (Joined, False, {"a": 6}),
    "an attribute": (lambda: Functional("attribute"), False, {"a": 4}),
    "a width": (lambda: Functional("width"), False, {"a": 4}),
    "by hand": (ByHand, False, {"a": 4}),
    "no scale": (plain(nn.GroupNorm(6, 24, affine=False)), False, {"0": 4}),
    "a subclass": (plain(Float32(3, 24)), False, {"0": 8}),
    "one channel each": (plain(nn.GroupNorm(24, 24)), False, {"0": 1}),
    "one channel each, no scale": (plain(nn.GroupNorm(24, 24, affine=False)), False, {"0": 1}),
    "instance norm": (plain(nn.InstanceNorm2d(24, affine=True)), False, {"0": 1}),
    "two sections": (plain(nn.GroupNorm(2, 24)), False, {"0": 12}),
    "depthwise in front": (
        lambda: nn.Sequential(
            nn.Conv2d(3, 24, 1), nn.Conv2d(24, 24, 3, 1, 1, 1, 24), nn.GroupNorm(6, 24), nn.Conv2d(24, 4, 1)
        ),
        False,
        {"0": 4},
    ),
}


def prepared(name: str) -> tuple[nn.Module, Traced, list[dict[str, Tensor]]]:
    build, timed, _ = CASES[name]
    model = randomise(build())

    def inputs(shape: tuple[int, ...]) -> dict[str, Tensor]:
        x = {"x": torch.randn(shape, generator=gen(shape[2]), dtype=torch.float64)}
        return x | {"t": torch.randn(shape[0], 6, generator=gen(1), dtype=torch.float64)} if timed else x

    example = inputs(IMAGE)
    captured = capture(model, *example.values()) if len(example) == 1 else capture(model, kwargs=example)
    return model, probe(Traced(model, captured, find_groups(captured))), [example, inputs(LARGER)]


@pytest.mark.parametrize("name", CASES)
def test_whole_sections_leave_exactly(name: str) -> None:
    model, traced, examples = prepared(name)
    units = {g.name: g.unit for g in traced.free.values()}
    assert CASES[name][2].items() <= units.items(), units
    for seed in range(3):
        keep = random_halves(list(traced.groups), gen(seed))
        result = remove(traced, keep)
        assert not result.locked
        assert set(CASES[name][2]) <= set(result.kept)
        zeros = zeroed_original(model, list(traced.groups), result.kept)
        for inputs in examples:
            assert_same(outputs(result.model, inputs), outputs(zeros, inputs))


def test_a_section_keeps_its_channels() -> None:
    model, traced, _ = prepared("several counts")
    small = remove(traced, {"a": torch.arange(12, 36)}).model
    assert [(n.num_groups, n.num_channels) for n in small.norms] == [(6, 24), (4, 24), (2, 24)]
    assert [(n.num_groups, n.num_channels) for n in model.norms] == [(12, 48), (8, 48), (4, 48)]


def test_a_literal_count_locks() -> None:
    model = randomise(Functional("literal"))
    captured = capture(model, torch.randn(IMAGE, generator=gen(0), dtype=torch.float64))
    traced = probe(Traced(model, captured, find_groups(captured)))
    assert next(g for g in traced.groups if g.name == "a").locked_because is not None


def test_one_section_is_a_statistic_over_all_channels() -> None:
    model = randomise(plain(nn.GroupNorm(1, 24))())
    x = torch.randn(IMAGE, generator=gen(0), dtype=torch.float64)
    captured = capture(model, x)

    def first(groups: list[Group]) -> Group:
        return next(g for g in groups if g.name == "0")

    assert "statistics of a norm" in (first(find_groups(captured)).locked_because or "")
    groups = find_groups(captured, norm_statistics=True)
    assert "norm-statistics" in first(groups).flags
    keep = torch.tensor([0, 1, 5, 9, 11])
    small = remove(Traced(model, captured, groups), {"0": keep}).model
    h = F.group_norm(model[0](x)[:, keep], 1, model[1].weight[keep], model[1].bias[keep])
    assert_same([small(x)], [F.conv2d(torch.tanh(h), model[3].weight[:, keep], model[3].bias)])
    assert small[1].num_groups == 1


def test_channels_on_another_axis_stay() -> None:
    """The norm's channels are positions here; the features are averaged over."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.n, self.b = nn.Linear(5, 12), nn.GroupNorm(2, 6), nn.Linear(12, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.n(self.a(x)))

    model = randomise(Net())
    captured = capture(model, torch.randn(2, 6, 5, generator=gen(0), dtype=torch.float64))
    assert "statistics of a norm" in (next(g for g in find_groups(captured) if g.name == "a").locked_because or "")
