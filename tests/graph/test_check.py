"""The check after surgery sees the same, whatever the example holds; what it cannot see is locked."""

from __future__ import annotations

import math
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from coreprune.graph import Traced, capture, find_groups, probe, remove
from coreprune.graph.check_inputs import BATCH, LENGTH, drawing
from coreprune.graph.check_runs import Runs
from coreprune.graph.verify import compare
from graph.oracle import zeroed_original

WIDTH, HEADS, TIME = 32, 4, 12


class Attention(nn.Module):
    """How the number of heads is remembered decides whether heads can leave; never whether the result is right."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way = way
        self.cfg, self.num_heads = SimpleNamespace(heads=HEADS), HEADS
        self.q, self.k, self.v, self.o = (nn.Linear(WIDTH, WIDTH) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        b, t, _ = x.shape
        heads = {"config": self.cfg.heads, "attribute": self.num_heads, "literal": 4}.get(self.way, self.num_heads)
        q, k, v = (layer(x).view(b, t, heads, -1).transpose(1, 2) for layer in (self.q, self.k, self.v))
        if self.way == "by hand":
            scores = (4 * q @ k.transpose(-1, -2)) / math.sqrt(q.shape[-1])
            mixed = scores.softmax(-1) @ v
        elif self.way == "einsum":
            mixed = torch.einsum("bhij,bhjd->bhid", torch.einsum("bhid,bhjd->bhij", 2 * q, k).softmax(-1), v)
        elif self.way == "linear attention":
            mixed = q.softmax(-1) @ (k.softmax(-2).transpose(-1, -2) @ v)
        elif self.way == "causal":
            mixed = F.scaled_dot_product_attention(4 * q, k, v, is_causal=True)
        else:
            mixed = F.scaled_dot_product_attention(4 * q, k, v)
        return self.o(mixed.transpose(1, 2).reshape(b, t, -1))


WAYS = ("config", "attribute", "literal", "by hand", "einsum", "linear attention", "causal")


class Encoder(nn.Module):
    def __init__(self, way: str, tokens: bool) -> None:
        super().__init__()
        self.enter: nn.Module = nn.Embedding(50, WIDTH) if tokens else nn.Linear(8, WIDTH)
        self.attention, self.leave = Attention(way), nn.Linear(WIDTH, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.leave(self.attention(self.enter(x)))


def made(way: str, tokens: bool = False) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Encoder(way, tokens).eval()


def traced(model: nn.Module, *example: Tensor) -> Traced:
    captured = capture(model, example)
    return Traced(model, captured, find_groups(captured))


def free(model: nn.Module, *example: Tensor) -> list[tuple[str, int, int]]:
    return [(g.name, g.size, g.unit) for g in probe(traced(model, *example)).free.values()]


NORMAL = torch.randn(1, TIME, 8, generator=torch.Generator().manual_seed(0))
DEGENERATE = {
    "zeros": torch.zeros(1, TIME, 8),
    "ones": torch.ones(1, TIME, 8),
    "one step": torch.randn(1, 1, 8, generator=torch.Generator().manual_seed(1)),
    "one step of zeros": torch.zeros(1, 1, 8),
    "equal steps": torch.randn(1, 1, 8, generator=torch.Generator().manual_seed(2)).expand(1, TIME, 8),
    "nan": torch.full((1, TIME, 8), math.nan),
    "infinite": torch.full((1, TIME, 8), math.inf),
    "huge": torch.full((1, TIME, 8), 1e30),
    "tiny": torch.full((1, TIME, 8), 1e-30),
    "several samples": torch.zeros(4, TIME, 8),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", DEGENERATE)
def test_every_example_frees_what_a_random_one_frees(way: str, name: str) -> None:
    wanted, found = free(made(way), NORMAL), free(made(way), DEGENERATE[name])
    if name == "infinite":  # entries of masks stay infinite, and then nothing can be seen
        assert not found
    elif "one step" in name:
        assert {n for n, *_ in found} <= {n for n, *_ in wanted}
        assert ("enter" in {n for n, *_ in found}) == ("enter" in {n for n, *_ in wanted})
    else:
        assert found == wanted


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("tokens", [torch.zeros(1, TIME).long(), torch.full((1, TIME), 7), torch.zeros(1, 1).long()])
def test_equal_tokens_are_like_different_ones(way: str, tokens: Tensor) -> None:
    different = torch.arange(TIME)[None]
    wanted, found = free(made(way, True), different), free(made(way, True), tokens)
    if tokens.shape == different.shape:
        assert found == wanted
    else:
        assert {n for n, *_ in found} <= {n for n, *_ in wanted}


def test_heads_whose_number_is_a_literal_are_not_cut_apart() -> None:
    """In half of the channels four heads of half the size would run, and be wrong."""
    model = made("literal")
    found = traced(model, DEGENERATE["zeros"])
    group = next(g for g in found.groups if "heads" in g.flags)
    locked = {g.name: g.locked_because for g in probe(found).groups}
    assert "differs from the original" in (locked[group.name] or "")


class Behind(nn.Module):
    """A layer behind something that hides it."""

    def __init__(self, hide: str) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 8), nn.Linear(8, 6), nn.Linear(6, 3)
        self.hide, self.scale = hide, nn.Parameter(torch.zeros(() if hide == "zero gain" else 6))

    def forward(self, x: Tensor) -> Tensor:
        h = self.b(torch.relu(self.a(x)))
        if self.hide.startswith("zero"):
            h = self.scale * h
        elif self.hide == "constant":
            h = 0 * h + 1
        elif self.hide == "nan":
            h = h / 0 - h / 0
        return self.c(torch.relu(h))


@pytest.mark.parametrize("hide", ["zero scale", "zero gain"])
def test_a_scale_of_zeros_hides_nothing(hide: str) -> None:
    assert {name for name, *_ in free(Behind(hide), torch.randn(2, 4))} == {"a", "b"}


class Deep(nn.Module):
    """Many layers with small weights and norms without statistics, as before training: little is left of a signal."""

    def __init__(self, gate: bool) -> None:
        super().__init__()
        widths = [4] + [8] * 24
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(a, b), nn.BatchNorm1d(b)) for a, b in pairwise(widths))
        self.head, self.gate = nn.Linear(8, 3), gate
        for p in (p for m in self.modules() if isinstance(m, nn.Linear) for p in m.parameters()):
            nn.init.normal_(p, std=0.02 if p.dim() > 1 else 0.0)

    def forward(self, x: Tensor) -> Tensor:
        for i, layer in enumerate(self.layers):
            x = torch.relu(layer(x))
            if self.gate and i == 11:
                x = x * x.softmax(-1)  # mixes channels: half of them cannot leave
        return self.head(x)


@pytest.mark.parametrize("gate", [False, True])
@pytest.mark.parametrize("samples", [1, 4])
def test_layers_that_let_nothing_through_hide_nothing(gate: bool, samples: int) -> None:
    torch.manual_seed(0)
    model, x = Deep(gate).eval(), torch.randn(samples, 4)
    assert float((model(x) - model(x + 1)).detach().abs().max()) < 1e-6
    expected = {f"layers.{i}.0" for i in range(24) if not (gate and i == 11)}
    assert set(probe(traced(model, x)).free) == expected


@pytest.mark.parametrize("hide", ["constant", "nan"])
def test_what_cannot_be_seen_is_locked(hide: str) -> None:
    found = probe(traced(Behind(hide), torch.randn(2, 4)))
    assert not found.free
    assert all("cannot be checked" in (g.locked_because or "") for g in found.groups if g.name in "ab")


def test_a_part_that_reaches_no_output_is_locked_alone() -> None:
    class Spare(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.used, self.out = nn.Linear(4, 8), nn.Linear(8, 3), nn.Linear(4, 8), nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.out(torch.relu(self.used(x))) + 0 * self.b(torch.relu(self.a(x)))

    found = probe(traced(Spare().eval(), torch.randn(2, 4)))
    assert list(found.free) == ["used"]


def test_one_hidden_group_among_many_is_found() -> None:
    """A forward without gradients, so that all groups have to be tried."""

    class Half(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.enter = nn.ModuleList(nn.Linear(4, 8) for _ in range(7))
            self.leave = nn.ModuleList(nn.Linear(8, 3) for _ in range(7))

        def forward(self, x: Tensor) -> Tensor:
            parts = [b(torch.relu(a(x))) for a, b in zip(self.enter, self.leave, strict=True)]
            with torch.no_grad():
                return sum(h * (i not in (2, 5)) for i, h in enumerate(parts)).detach()  # type: ignore[union-attr]

    found = probe(traced(Half().eval(), torch.randn(2, 4)))
    assert set(found.free) == {f"enter.{i}" for i in (0, 1, 3, 4, 6)}


def test_the_graph_of_the_example_serves_the_check() -> None:
    """Channels read without a weight need the graph; tracing a second time takes as long as the first."""
    model, x = Pairs().eval(), torch.randn(3, 9, 4)
    found = traced(model, x)
    assert {"q", "v"} <= set(probe(found).free)
    runs = found.check.runs
    first = next(inputs for inputs in runs.inputs if not inputs.lengths)
    assert runs.graph(first).graph is found.captured.graph  # type: ignore[union-attr]


class Pairs(nn.Module):
    """Queries and keys that no weight reads."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(*n) for n in ((4, 8), (4, 8), (4, 8), (8, 3)))

    def forward(self, x: Tensor) -> Tensor:
        return self.o((self.q(x) @ self.k(x).transpose(-1, -2)).softmax(-1) @ self.v(x))


def test_outputs_of_whole_numbers_are_compared_too() -> None:
    a = torch.arange(100)
    assert compare([a], [a.clone()]) is None
    assert "whole numbers" in (compare([a], [a.flip(0)]) or "")
    assert compare([a.where(a != 3, 0)], [a]) is None


def test_outputs_without_finite_entries_do_not_agree() -> None:
    x = torch.full((2, 2), math.nan)
    assert "cannot be compared" in (compare([x], [x]) or "")
    assert "cannot be compared" in (compare([], []) or "")


def test_complex_outputs_are_compared() -> None:
    x = torch.randn(4, dtype=torch.complex128)
    assert compare([x], [x]) is None
    assert "differs" in (compare([x], [x.conj()]) or "")


class Logarithm(nn.Module):
    """Takes positive numbers only."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.relu(self.a(torch.log(x).sum(0, keepdim=True).expand_as(x))))


def test_inputs_are_drawn_in_another_way_if_the_first_gives_no_numbers() -> None:
    model = Logarithm()
    assert Runs(model, capture(model, torch.full((1, 4), 0.5))).inputs[0].style == "uniform"
    assert {name for name, *_ in free(model, torch.full((1, 4), 0.5))} == {"a"}


def test_axes_of_length_one_become_longer_where_the_model_takes_it() -> None:
    model = made("attribute")
    (_, longer) = Runs(model, capture(model, torch.zeros(1, 1, 8))).inputs
    assert longer.inputs(0)[0][0].shape == (BATCH, LENGTH, 8)
    convolution = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Conv2d(4, 2, 1))
    (_, shorter, longer) = Runs(convolution, capture(convolution, torch.zeros(1, 1, 6, 6))).inputs
    assert shorter.inputs(0)[0][0].shape == (1, 1, 3, 3)
    assert longer.inputs(0)[0][0].shape == (BATCH, 1, 6, 6)


class Mixed(nn.Module):
    """A reshape without a transposition puts channels on positions: which, depends on how many positions there are."""

    def __init__(self, dims: int) -> None:
        super().__init__()
        layer = nn.Conv1d if dims == 1 else nn.Conv2d
        self.a, self.b, self.c = layer(3, 16, 1), layer(16, 16, 1), layer(16, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.a(x))
        mixed = self.b(h).flatten(2).transpose(1, 2)
        return self.c(h + mixed.reshape(h.shape))


@pytest.mark.parametrize("shape", [(1, 3, 2, 2), (2, 3, 2, 2), (1, 3, 4), (1, 3, 8), (1, 3, 9), (1, 3, 1, 4)])
def test_what_is_right_at_the_size_of_the_example_alone_is_not_cut(shape: tuple[int, ...]) -> None:
    """At the example's own size the cut is exact, so that nothing but another size shows the mistake."""
    torch.manual_seed(0)
    model, example = Mixed(len(shape) - 2).eval(), torch.zeros(shape)
    traced = probe(Traced(model, captured := capture(model, example), find_groups(captured)))
    keep = {g.name: g.units()[::2].flatten().sort().values for g in traced.free}
    small = remove(traced, keep)
    zeros = zeroed_original(model, list(traced.groups), small.kept)
    for length in (3, 5, 12):
        x = torch.randn(2, 3, *[length] * (len(shape) - 2))
        torch.testing.assert_close(small.model(x), zeros(x))


def test_a_locked_group_says_at_which_size_it_differs() -> None:
    torch.manual_seed(0)
    model = Mixed(2).eval()
    traced = probe(Traced(model, captured := capture(model, torch.zeros(1, 3, 2, 2)), find_groups(captured)))
    reasons = [g.locked_because or "" for g in traced.groups]
    assert any("on inputs of another size (1 instead of 2 positions)" in reason for reason in reasons), reasons


def test_a_model_of_one_size_is_compared_at_that_size() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 16, 5)).eval()
    traced = probe(Traced(model, captured := capture(model, torch.zeros(1, 3, 4, 4)), find_groups(captured)))
    assert list(traced.free) == ["0"]
    assert all(axes[at] == 1 for d in Runs(model, captured).inputs for axes in [d.axes()] for at in d.lengths)


def test_tokens_and_their_mask_become_shorter_together() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Embedding(9, 8), nn.Linear(8, 3)

        def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
            return self.b(self.a(ids) * mask[..., None])

    model = Two()
    inputs = Runs(model, capture(model, (torch.ones(1, 7, dtype=torch.int64), torch.ones(1, 7)))).inputs
    assert [tuple(x.shape for x in drawn.inputs(0)[0]) for drawn in inputs] == [
        ((1, 7), (1, 7)),
        ((1, 4), (1, 4)),
        ((BATCH, 7), (BATCH, 7)),
    ]


def test_axes_of_several_inputs_become_longer_together() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 8), nn.Linear(8, 3)

        def forward(self, x: Tensor, mask: Tensor) -> Tensor:
            return self.b(torch.relu(self.a(x)) * mask[..., None]).sum(1)

    model = Two()
    (_, longer) = Runs(model, capture(model, (torch.zeros(1, 1, 4), torch.ones(1, 1)))).inputs
    assert [x.shape for x in longer.inputs(0)[0]] == [(BATCH, LENGTH, 4), (BATCH, LENGTH)]


def test_infinite_entries_of_masks_stay_and_flags_too() -> None:
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(4, 4)

        def forward(self, x: Tensor, mask: Tensor, flags: Tensor) -> Tensor:
            return self.a(x).masked_fill(flags, 0) @ (mask + 0).softmax(-1)

    mask = torch.full((4, 4), -math.inf).triu(1)
    example = (torch.zeros(1, 4), mask, torch.tensor([[False, True, False, False]]))
    (_, got, flags), _ = drawing(capture(Masked(), example)).inputs(0)
    assert torch.equal(torch.isinf(got), torch.isinf(mask))
    assert bool((got[torch.isfinite(got)] != 0).all())
    assert torch.equal(flags, example[2])


@pytest.mark.parametrize("look_up", [nn.Embedding(50, 4), "index", "one hot", "reshaped"])
def test_whole_numbers_are_drawn_from_the_rows_that_they_choose(look_up: nn.Module | str) -> None:
    class Looks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Parameter(torch.randn(50, 4))
            self.embedding = look_up if isinstance(look_up, nn.Module) else None

        def forward(self, x: Tensor) -> Tensor:
            if look_up == "one hot":
                return F.one_hot(x, 50).float() @ self.table
            if look_up == "index":
                return self.table[x]
            if look_up == "reshaped":
                return F.embedding(x.reshape(-1, 2), self.table)
            return look_up(x)  # type: ignore[operator]

    ((ids,), _) = drawing(capture(Looks(), torch.zeros(1, 200).long())).inputs(0)
    assert 40 < len(ids.unique()) <= 50
    assert int(ids.max()) < 50


def test_whole_numbers_of_unknown_range_are_permuted() -> None:
    class Picks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 8), nn.Linear(3, 3)

        def forward(self, x: Tensor, chosen: Tensor) -> Tensor:
            return self.b(torch.relu(self.a(x))[:, :3] * chosen)

    chosen = torch.tensor([[7, 0, 3]])
    ((_, got), _) = drawing(capture(Picks(), (torch.randn(1, 4), chosen))).inputs(3)
    assert not torch.equal(got, chosen)
    assert sorted(got.flatten().tolist()) == [0, 3, 7]


def test_cheap_models_are_compared_in_double_precision_and_half_precision_in_single() -> None:
    small, x = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)), torch.zeros(1, 4)
    assert Runs(small, capture(small, x)).dtype == torch.float64

    class Fixed(nn.Module):  # in single precision whatever the input
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return x.float() @ self.a.weight

    fixed = Fixed()
    assert Runs(fixed, capture(fixed, x)).dtype is None


def test_the_model_is_not_changed_by_the_check() -> None:
    model = Behind("zero scale")
    before = {name: t.clone() for name, t in model.state_dict().items()}
    probe(traced(model, torch.randn(2, 4)))
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
