"""Widths and numbers of heads that modules remember, wherever and under whatever name, follow a cut."""

from __future__ import annotations

import copy
from collections import OrderedDict, namedtuple
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from coreprune.graph import Traced, capture, find_groups, probe, rebuilt, recipe_of, remove
from coreprune.graph.recipe import named_tensors
from graph.oracle import assert_same, random_halves, zeroed_original
from graph.zoo import gen, randomise


def conv(i: int, o: int, k: int = 1) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(i, o, k, 1, k // 2), nn.BatchNorm2d(o), nn.SiLU())


def image_net(block: nn.Module, i: int = 32, o: int = 32) -> nn.Module:
    return nn.Sequential(conv(3, i, 3), block, conv(o, 8))


def token_net(block: nn.Module, d: int = 32) -> nn.Module:
    return nn.Sequential(nn.Linear(8, d), block, nn.Linear(d, 4))


class C2f(nn.Module):
    def __init__(self, i: int = 32, o: int = 32) -> None:
        super().__init__()
        self.c = o // 2
        self.cv1, self.m, self.cv2 = conv(i, o), conv(self.c, self.c, 3), conv(3 * self.c, o)

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.cv1(x).split((self.c, self.c), 1)
        return self.cv2(torch.cat([a, b, self.m(b)], 1))


class Sliced(nn.Module):
    """Slices up to a number and from it on, also counted from the end."""

    def __init__(self, c: int = 12, d: int = 20) -> None:
        super().__init__()
        self.part, self.rest = c, d
        self.enter, self.a, self.leave = conv(32, c + d), conv(c, d, 3), conv(c + 3 * d, 32)

    def forward(self, x: Tensor) -> Tensor:
        h = self.enter(x)
        first, rest, same = h[:, : self.part], h[:, self.part :], h[:, -self.rest :]
        return self.leave(torch.cat([first, rest, self.a(first), same], 1))


class Sizes(nn.Module):
    """Sizes in a tuple, of which the last is a sum of the others."""

    def __init__(self, c: int = 16) -> None:
        super().__init__()
        self.sizes = (c, c, 2 * c)
        self.enter, self.m, self.leave = conv(32, sum(self.sizes)), conv(c, c, 3), conv(4 * c, 32)

    def forward(self, x: Tensor) -> Tensor:
        a, b, c = self.enter(x).split(self.sizes, 1)
        return self.leave(torch.cat([a, self.m(b), c], 1))


class PConv(nn.Module):
    """FasterNet: a convolution of the first quarter of the channels, and layers of a wider block."""

    def __init__(self, c: int = 32) -> None:
        super().__init__()
        self.dim_conv, self.dim_untouched = c // 4, c - c // 4
        self.partial = nn.Conv2d(self.dim_conv, self.dim_conv, 3, padding=1, bias=False)
        self.mlp = nn.Sequential(conv(c, 2 * c), nn.Conv2d(2 * c, c, 1, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        a, b = torch.split(x, [self.dim_conv, self.dim_untouched], dim=1)
        return x + self.mlp(torch.cat((self.partial(a), b), 1))


class Annotated(nn.Module):
    """The names of the Annotated Transformer."""

    def __init__(self, d: int = 32, h: int = 4) -> None:
        super().__init__()
        self.h, self.d_k, self.linears = h, d // h, nn.ModuleList(nn.Linear(d, d) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (f(x).view(len(x), -1, self.h, self.d_k).transpose(1, 2) for f in self.linears[:3])
        y = F.scaled_dot_product_attention(q, k, v)
        return self.linears[3](y.transpose(1, 2).contiguous().view(len(x), -1, self.h * self.d_k))


class ZeroBias(nn.Module):
    """The cross attention of T5: a new tensor of zeros for every head is added to the scores."""

    def __init__(self, new: Callable[[Tensor, tuple[int, ...]], Tensor], d: int = 32, n: int = 4) -> None:
        super().__init__()
        self.n, self.each, self.new = n, d // n, new
        self.q, self.k, self.v, self.o = (nn.Linear(d, d) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (f(x).view(*x.shape[:2], -1, self.each).transpose(1, 2) for f in (self.q, self.k, self.v))
        scores = q @ k.transpose(-1, -2) + self.new(x, (1, self.n, x.shape[1], x.shape[1]))
        return self.o((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))


@dataclass(frozen=True)
class Frozen:
    how_many: int = 4
    each: int = 8


class Slots:
    __slots__ = ("each", "how_many")

    def __init__(self, how_many: int = 4, each: int = 8) -> None:
        self.how_many, self.each = how_many, each


class Nested:
    def __init__(self) -> None:
        self.attention = Frozen()


def split_heads(x: Tensor, n: int) -> Tensor:
    return x.view(x.shape[0], x.shape[1], n, -1).transpose(1, 2)


Split = namedtuple("Split", "n each")

# where a number of heads is kept -> (what holds it, how it is read)
PLACES: dict[str, tuple[Callable[[], Any], Callable[[Any], int]]] = {
    "namespace": (lambda: SimpleNamespace(n=4, eps=1e-5), lambda c: c.n),
    "dict": (lambda: {"n": 4, "name": "attention"}, lambda c: c["n"]),
    "ordered dict": (lambda: OrderedDict(n=4), lambda c: c["n"]),
    "list": (lambda: [1, 4, 8], lambda c: c[1]),
    "tuple": (lambda: (4, 8), lambda c: c[0]),
    "named tuple": (lambda: Split(4, 8), lambda c: c.n),
    "pairs": (lambda: (("h", 4), ("d", 8)), lambda c: dict(c)["h"]),
    "frozen dataclass": (Frozen, lambda c: c.how_many),
    "slots": (Slots, lambda c: c.how_many),
    "nested": (Nested, lambda c: c.attention.how_many),
    "dict of lists": (lambda: {"sizes": [4, 8]}, lambda c: c["sizes"][0]),
    "torch.Size": (lambda: torch.Size((4, 8)), lambda c: c[0]),
    "width": (lambda: {"width": 32}, lambda c: c["width"] // 8),
    "argument": (lambda: partial(split_heads, n=4), lambda c: c.keywords["n"]),
}


class Kept(nn.Module):
    """Attention that finds its number of heads in some place."""

    def __init__(self, place: str, cfg: Any = None) -> None:
        super().__init__()
        make, self.read = PLACES[place]
        self.zz = make() if cfg is None else cfg
        self.qkv, self.o = nn.Linear(32, 96), nn.Linear(32, 32)

    def forward(self, x: Tensor) -> Tensor:
        n = self.read(self.zz)
        q, k, v = self.qkv(x).view(x.shape[0], x.shape[1], 3, n, 8).permute(2, 0, 3, 1, 4)
        return self.o(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Mix(nn.Module):
    """A layer of one's own."""

    def __init__(self, i: int, o: int) -> None:
        super().__init__()
        self.in_features, self.out_features, self.w = i, o, nn.Parameter(torch.randn(o, i))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x.reshape(-1, self.in_features), self.w).reshape(*x.shape[:-1], self.out_features)


class Quiet(nn.Module):
    """A layer of one's own that only shows its sizes."""

    def __init__(self, i: int, o: int) -> None:
        super().__init__()
        self.i, self.o, self.w = i, o, nn.Parameter(torch.randn(o, i))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.w)

    def extra_repr(self) -> str:
        return f"{self.i}, {self.o}"


class Loop(nn.Module):
    """A number that no function of torch gets: heads are counted by a loop."""

    def __init__(self, d: int = 32, n: int = 4) -> None:
        super().__init__()
        self.n, self.each = n, d // n
        self.q, self.k, self.v, self.o = (nn.Linear(d, d) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v, e = self.q(x), self.k(x), self.v(x), self.each
        parts = []
        for i in range(self.n):
            at = slice(i * e, (i + 1) * e)
            parts.append((q[..., at] @ k[..., at].transpose(1, 2)).softmax(-1) @ v[..., at])
        return self.o(torch.cat(parts, -1))


class TwoOfOneWidth(nn.Module):
    """Two numbers of one value, for layers that keep different numbers of channels."""

    def __init__(self, c: int = 16) -> None:
        super().__init__()
        self.left_size, self.right_size = c, c
        self.left, self.right = nn.Linear(32, c), nn.Linear(32, c)
        self.a, self.b = nn.Linear(c, 32), nn.Linear(c, 32)

    def forward(self, x: Tensor) -> Tensor:
        left = self.left(x).view(-1, self.left_size).relu()
        right = self.right(x).view(-1, self.right_size).tanh()
        return (self.a(left) + self.b(right)).view(*x.shape[:-1], -1)


class OneNumberForTwo(TwoOfOneWidth):
    """One number for two layers: it can follow only if both keep as many channels."""

    def forward(self, x: Tensor) -> Tensor:
        left = self.left(x).view(-1, self.left_size).relu()
        right = self.right(x).view(-1, self.left_size).tanh()
        return (self.a(left) + self.b(right)).view(*x.shape[:-1], -1)


class Coincidence(nn.Module):
    """As many steps in time as channels, and a number of both names."""

    def __init__(self, c: int = 16) -> None:
        super().__init__()
        self.steps, self.width, self.seed = c, c, c
        self.up, self.down = nn.Linear(32, c), nn.Linear(c, 32)

    def forward(self, x: Tensor) -> Tensor:
        h = self.up(x[:, : self.steps]).reshape(-1, self.width)
        return self.down(h.relu()).view(x.shape[0], self.steps, 32)


class Flat(nn.Module):
    """The flattening of LeNet."""

    def __init__(self) -> None:
        super().__init__()
        self.features, self.flat, self.cls = conv(3, 12, 3), 12 * 36, nn.Linear(12 * 36, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.cls(self.features(x).view(-1, self.flat))


class Unflat(nn.Module):
    """Layers of torch without weights that remember heads."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(32, 32) for _ in range(4))
        self.split, self.join = nn.Unflatten(-1, (4, 8)), nn.Flatten(2)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (self.split(f(x)).transpose(1, 2) for f in (self.q, self.k, self.v))
        return self.o(self.join(F.scaled_dot_product_attention(q, k, v).transpose(1, 2)))


class Depthwise(nn.Module):
    """A depthwise convolution of one's own, with the number of its groups."""

    def __init__(self, c: int = 16) -> None:
        super().__init__()
        self.count = c
        self.enter, self.leave = conv(32, c), conv(c, 32)
        self.kernel = nn.Parameter(torch.randn(c, 1, 3, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.leave(F.conv2d(self.enter(x), self.kernel, padding=1, groups=self.count))


class Repeated(nn.Module):
    """Grouped queries: more heads for queries than for keys and values."""

    def __init__(self, d: int = 32, n: int = 4, m: int = 2) -> None:
        super().__init__()
        self.a, self.b, self.c = n, m, d // n
        self.q, self.kv, self.o = nn.Linear(d, d), nn.Linear(d, 2 * m * self.c), nn.Linear(d, d)

    def forward(self, x: Tensor) -> Tensor:
        q = self.q(x).view(*x.shape[:2], self.a, self.c).transpose(1, 2)
        k, v = self.kv(x).split([self.b * self.c, self.b * self.c], -1)
        k, v = (t.view(*x.shape[:2], self.b, self.c).transpose(1, 2) for t in (k, v))
        k, v = (t.repeat_interleave(self.a // self.b, 1) for t in (k, v))
        return self.o(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class RestOfShape(nn.Module):
    """RAFT: the first channels are a state, the rest of the tensor's shape is what enters every step."""

    def __init__(self, length: Callable[[Tensor], int], state: int = 12, rest: int = 20) -> None:
        super().__init__()
        self.state, self.length = state, length
        self.enter, self.step, self.leave = conv(32, state + rest), conv(state + rest, state), conv(state, 32)

    def forward(self, x: Tensor) -> Tensor:
        h = self.enter(x)
        h, x = torch.split(h, [self.state, self.length(h) - self.state], 1)
        for _ in range(2):
            h = h + self.step(torch.cat([h, x], 1))
        return self.leave(h)


def images(n: int) -> Tensor:
    return torch.randn(n, 3, 6, 6, dtype=torch.float64, generator=gen(n))


def tokens(n: int) -> Tensor:
    return torch.randn(n, 6, 8, dtype=torch.float64, generator=gen(n))


# name -> (model, inputs, groups that have to be free)
MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[int], Tensor], set[str]]] = {
    "C2f": (lambda: image_net(C2f()), images, {"0.0", "1.cv1.0", "1.m.0", "1.cv2.0"}),
    "two C2f": (lambda: image_net(nn.Sequential(C2f(), C2f())), images, {"1.0.cv1.0", "1.1.cv1.0", "1.1.m.0"}),
    "slices": (lambda: image_net(Sliced()), images, {"1.enter.0", "1.a.0"}),
    "sizes": (lambda: image_net(Sizes()), images, {"1.m.0"}),
    "rest of a shape": (lambda: image_net(RestOfShape(lambda h: h.shape[1])), images, {"1.enter.0"}),
    "rest of a size": (lambda: image_net(RestOfShape(lambda h: h.size(dim=1))), images, {"1.enter.0"}),
    "PConv": (lambda: image_net(PConv()), images, {"1.mlp.0.0"}),
    "Annotated": (lambda: token_net(Annotated()), tokens, {"0", "1.linears.0", "1.linears.3"}),
    "zeros": (lambda: token_net(ZeroBias(lambda x, size: torch.zeros(size, dtype=x.dtype))), tokens, {"1.q"}),
    "new zeros": (lambda: token_net(ZeroBias(lambda x, size: x.new_zeros(size))), tokens, {"1.q"}),
    "layers": (lambda: nn.Sequential(Mix(8, 64), nn.ReLU(), Mix(64, 64), nn.ReLU(), Mix(64, 4)), tokens, {"0", "2"}),
    "loop": (lambda: token_net(Loop()), tokens, {"1.q"}),
    "two of one width": (lambda: token_net(TwoOfOneWidth()), tokens, {"1.left", "1.right"}),
    "coincidence": (lambda: token_net(Coincidence(6)), tokens, {"1.up"}),
    "flat": (Flat, images, {"features.0"}),
    "unflatten": (lambda: token_net(Unflat()), tokens, {"1.q"}),
    "depthwise": (lambda: image_net(Depthwise()), images, {"1.enter.0"}),
    "grouped queries": (lambda: token_net(Repeated()), tokens, {"1.q"}),
    **{f"heads in {place}": (lambda place=place: token_net(Kept(place)), tokens, {"1.qkv"}) for place in PLACES},
}


def traced(model: nn.Module, x: Tensor) -> Traced:
    captured = capture(model, x)
    return Traced(model, captured, find_groups(captured))


def numbers_of(model: nn.Module) -> dict[str, str]:
    return {name: repr({k: v for k, v in vars(m).items() if k[0] != "_"}) for name, m in model.named_modules()}


class OfTheClass(nn.Module):
    """The number of heads is the same for all instances, until one of them is cut."""

    many = 4

    def __init__(self) -> None:
        super().__init__()
        self.v, self.o = nn.Linear(32, 32), nn.Linear(32, 32)
        self.q = nn.Linear(32, 32)

    def forward(self, x: Tensor) -> Tensor:
        q, v = (f(x).view(*x.shape[:2], self.many, 8).transpose(1, 2) for f in (self.q, self.v))
        return self.o(F.scaled_dot_product_attention(q, q, v).transpose(1, 2).flatten(2))


MODELS["of the class"] = (lambda: token_net(nn.Sequential(OfTheClass(), OfTheClass())), tokens, {"1.0.v", "1.1.v"})


@pytest.mark.parametrize("name", MODELS)
def test_remembered_numbers_follow(name: str) -> None:
    build, inputs, wanted = MODELS[name]
    model = randomise(build())
    before = numbers_of(model)
    found = probe(traced(model, inputs(1)))
    assert wanted <= set(found.free), {g.name: g.locked_because for g in found.groups}
    for seed in (1, 2):
        keep = random_halves(list(found.groups), gen(seed))
        if seed == 2:  # other shares for every group
            keep = {n: k if i % 2 else k[: max(1, len(k) // 2)] for i, (n, k) in enumerate(keep.items())}
            keep = {n: k for n, k in keep.items() if next(g for g in found.groups if g.name == n).legal(k) is None}
        result = remove(found, keep)
        assert not result.locked
        if any("functional" in g.flags for g in found.free.values()):
            return  # read without a weight as well; `remove` compares with a replay of the graph
        want = zeroed_original(model, list(found.groups), result.kept)
        assert_same([result.model(inputs(3))], [want(inputs(3))])
        again = rebuilt(build().double().eval(), recipe_of(model, result.model), dict(named_tensors(result.model)))
        assert_same([again(inputs(3))], [want(inputs(3))])
    assert numbers_of(model) == before
    other = copy.deepcopy(model)
    small = remove(Traced(other, found.captured, found.groups), keep, inplace=True).model
    assert small is other
    assert_same([other(inputs(3))], [want(inputs(3))])


def test_nothing_remembered_takes_one_attempt_and_what_is_remembered_no_more() -> None:
    for name in ("flat", "C2f", "Annotated", "heads in namespace"):
        build, inputs, _ = MODELS[name]
        found = traced(randomise(build()), inputs(1))
        assert remove(found, random_halves(list(found.groups), gen(0))).runs == 1


def test_one_number_for_two_layers_is_right_or_locked() -> None:
    model = randomise(token_net(OneNumberForTwo()))
    found = probe(traced(model, tokens(1)))
    for left, right in ((8, 8), (8, 4), (4, 12)):
        keep = {"1.left": torch.arange(left), "1.right": torch.arange(right)}
        result = remove(found, keep)
        want = zeroed_original(model, list(found.groups), result.kept)
        assert_same([result.model(tokens(3))], [want(tokens(3))])
        assert not result.locked or left != right


def test_a_coincidence_stays() -> None:
    found = traced(randomise(token_net(Coincidence(6))), tokens(1))
    small = remove(found, {"1.up": torch.arange(2)}).model
    assert (small[1].steps, small[1].width, small[1].seed) == (6, 2, 6)


def test_a_number_that_no_one_reads_is_no_width_by_chance() -> None:
    class Chance(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.image_size, self.conv, self.out = 12, nn.Conv2d(3, 12, 1), nn.Conv2d(12, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.out(self.conv(x).relu())

    found = traced(randomise(Chance()), images(1))
    assert remove(found, {"conv": torch.arange(5)}).model.image_size == 12


class OneHead(nn.Module):
    """One head, and the widths of q, k and v as numbers."""

    def __init__(self, d: int = 32, qk: int = 8, v: int = 12) -> None:
        super().__init__()
        self.qk, self.v = qk, v
        self.norm, self.qkv, self.out = nn.LayerNorm(d), nn.Linear(d, 2 * qk + v), nn.Linear(v, d)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm(x)).split([self.qk, self.qk, self.v], dim=-1)
        return x + self.out((q @ k.transpose(-1, -2) / 3).softmax(-1) @ v)


def test_numbers_follow_in_every_one_of_many_blocks() -> None:
    """What is not read by a weight is looked at one by one; the ninth block was one too many (SHViT)."""
    model = randomise(token_net(nn.Sequential(*(OneHead() for _ in range(11))))).eval()
    captured = capture(model, torch.zeros(2, 5, 8, dtype=torch.float64))
    traced = probe(Traced(model, captured, find_groups(captured)))
    assert not [g.name for g in traced.groups if g.locked_because and "qkv" in g.name]


class Reads(nn.Module):
    """One configuration for all layers."""

    def __init__(self) -> None:
        super().__init__()
        self.cfg = SimpleNamespace(n=4)
        self.first, self.second = Kept("namespace", self.cfg), Kept("namespace", self.cfg)
        self.enter, self.leave = nn.Linear(8, 32), nn.Linear(32, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.leave(self.second(self.first(self.enter(x))))


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("heads", [(2, 2), (2, 3), (2, None)])
def test_a_shared_configuration_is_changed_for_no_one_else(heads: tuple[int, int | None], inplace: bool) -> None:
    model = randomise(Reads())
    cfg, found = model.cfg, probe(traced(model, tokens(1)))
    groups = [g for g in found.groups if "heads" in g.flags]
    keep = {g.name: g.units()[:n].reshape(-1) for g, n in zip(groups, heads, strict=True) if n}
    want = zeroed_original(model, list(found.groups), keep)(tokens(3))
    result = remove(found, keep, inplace=inplace)
    assert not result.locked
    small = result.model
    assert_same([small(tokens(3))], [want])
    assert cfg.n == 4
    assert (small.first.zz.n, small.second.zz.n) == (heads[0], heads[1] or 4)
    assert (small.first.zz is small.second.zz) == (heads[0] == heads[1])
    if not inplace:
        recipe = recipe_of(model, small)
        assert recipe.numbers["first"]["zz/n"] == (4, heads[0])
        assert model.first.zz is model.second.zz is cfg


def test_numbers_that_are_only_shown_stay_true() -> None:
    model = randomise(nn.Sequential(Quiet(8, 24), nn.ReLU(), Quiet(24, 24), nn.ReLU(), Quiet(24, 4)))
    found = traced(model, tokens(1))
    small = remove(found, {"0": torch.arange(10), "2": torch.arange(7)}).model
    assert [small[i].extra_repr() for i in (0, 2, 4)] == ["8, 10", "10, 7", "7, 4"]


class RepVGG(nn.Module):
    """A block that becomes one convolution when it is deployed."""

    def __init__(self, i: int, o: int) -> None:
        super().__init__()
        self.in_channels, self.out_channels, self.groups = i, o, 1
        self.identity = nn.BatchNorm2d(i) if i == o else None
        self.dense = nn.Sequential(OrderedDict(conv=nn.Conv2d(i, o, 3, 1, 1, bias=False), bn=nn.BatchNorm2d(o)))
        self.point = nn.Sequential(OrderedDict(conv=nn.Conv2d(i, o, 1, bias=False), bn=nn.BatchNorm2d(o)))
        self.deployed: nn.Module | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.deployed is not None:
            return F.relu(self.deployed(x))
        return F.relu(self.dense(x) + self.point(x) + (0 if self.identity is None else self.identity(x)))

    def switch_to_deploy(self) -> None:
        new = nn.Conv2d(self.in_channels, self.out_channels, 3, 1, 1).to(self.dense.conv.weight)
        unit = torch.zeros(self.in_channels, self.in_channels // self.groups, 3, 3).to(new.weight)
        unit[torch.arange(self.in_channels), torch.arange(self.in_channels) % unit.shape[1], 1, 1] = 1
        parts = [(self.dense.conv.weight, self.dense.bn), (F.pad(self.point.conv.weight, [1] * 4), self.point.bn)]
        parts += [] if self.identity is None else [(unit, self.identity)]
        weight, bias = torch.zeros_like(new.weight), torch.zeros_like(new.bias)
        for kernel, norm in parts:
            scale = norm.weight / (norm.running_var + norm.eps).sqrt()
            weight += kernel * scale.reshape(-1, 1, 1, 1)
            bias += norm.bias - norm.running_mean * scale
        new.weight.data, new.bias.data = weight, bias
        self.deployed = new


def test_blocks_can_be_deployed_after_a_cut() -> None:
    model = randomise(nn.Sequential(RepVGG(3, 16), RepVGG(16, 16), RepVGG(16, 24), RepVGG(24, 8)))
    found = probe(traced(model, images(1)))
    result = remove(found, random_halves(list(found.groups), gen(3)))
    assert len(result.kept) == 2
    assert not result.locked
    small, want = result.model, zeroed_original(model, list(found.groups), result.kept)(images(2))
    assert_same([small(images(2))], [want])
    with torch.no_grad():
        for block in small:
            block.switch_to_deploy()
    assert_same([small(images(2))], [want], 1e-6)
