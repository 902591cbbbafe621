"""Operations between two layers that have no rule of their own, or only lock what they mix: the rest leaves exactly."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.library import Library

from coreprune.graph import Traced, capture, find_groups, probe, remove
from graph.oracle import assert_same, random_halves, zeroed_original
from graph.zoo import gen, randomise


class Net(nn.Module):
    """A function f(self, x) of [N, 16, 6, 6] between two convolutions."""

    def __init__(self, f: Callable[[Net, Tensor], Tensor]) -> None:
        super().__init__()
        self.f, self.a, self.b, self.o = f, nn.Conv2d(3, 16, 3), nn.Conv2d(16, 12, 3), nn.Linear(12, 4)
        self.p, self.w, self.c = (
            nn.Parameter(torch.ones(16)),
            nn.Linear(16, 16).weight,
            nn.Parameter(torch.ones(16, 6, 4, 2)),
        )
        self.bilinear, self.aux = nn.Bilinear(5, 16, 16), nn.Linear(16, 5)
        self.register_buffer("order", torch.tensor([5, 3, 1, 0, 2, 4]))

    def forward(self, x: Tensor) -> Tensor:
        return self.o(torch.relu(self.b(self.f(self, torch.relu(self.a(x))))).mean((2, 3)))


def last(x: Tensor) -> Tensor:
    return x.movedim(1, -1)


def back(x: Tensor) -> Tensor:
    return x.movedim(-1, 1)


def rows(x: Tensor) -> Tensor:
    return torch.zeros(x.shape, dtype=torch.long)


def per_token(m: Net, x: Tensor) -> Tensor:
    return m.order[None, None, :, None].expand(x.shape[0], x.shape[1], -1, x.shape[3])


FREE: dict[str, Callable[[Net, Tensor], Tensor]] = {
    # products
    "tensordot": lambda m, x: torch.tensordot(x, m.w, dims=([1], [1])).permute(0, 3, 1, 2),
    "tensordot, last axis": lambda m, x: back(torch.tensordot(last(x), m.w.t(), dims=1)),
    "inner": lambda m, x: back(torch.inner(last(x), m.w)),
    "bilinear": lambda m, x: back(m.bilinear(m.aux(last(x)), last(x) * 0 + 1)) * x.mean((2, 3), keepdim=True),
    "addbmm": lambda m, x: x * torch.addbmm(m.w, x[:, :, 0], x[:, :, 0].mT).diagonal()[:, None, None],
    "outer": lambda m, x: x * torch.outer(m.p, m.p).diagonal()[:, None, None],
    "einsum, ellipsis": lambda m, x: back(torch.einsum("...c,dc->...d", last(x), m.w)),
    "einsum, ellipsis behind": lambda m, x: torch.einsum("bc...,dc->bd...", x, m.w),
    "einsum, no arrow": lambda m, x: back(torch.einsum("...c,cd", last(x), m.w.t())),
    "einsum, numbers": lambda m, x: torch.einsum(x, [0, 1, 2, 3], m.w, [4, 1], [0, 4, 2, 3]),
    "einsum of three": lambda m, x: torch.einsum("bchw,dc,d->bdhw", x, m.w, m.p),
    "einsum of three, ellipsis": lambda m, x: torch.einsum("bc...,dc,d->bd...", x, m.w, m.p),
    "einsum of three activations": lambda m, x: torch.einsum("bchw,bchw,dc->bdhw", x, x.exp(), m.w),
    "einsum, trace": lambda m, x: x * torch.einsum("bchh->bc", x)[..., None, None],
    # other names and compositions
    "adjoint": lambda m, x: x.adjoint().mT.mH,
    "fliplr": lambda m, x: x.fliplr(),
    "hstack": lambda m, x: torch.hstack([x, x])[:, : x.shape[1]],
    "dsplit": lambda m, x: torch.dstack(torch.dsplit(x, 2)),
    "kron": lambda m, x: torch.kron(x, torch.ones(1, 1, 2, 2, dtype=x.dtype)),
    "difference": lambda m, x: x.diff(dim=2),
    "trapezoids": lambda m, x: x * torch.trapezoid(x, dim=2)[:, :, None],
    "cosine over space": lambda m, x: x * F.cosine_similarity(x, x.flip(2) + 1, dim=2)[:, :, None],
    "matrix norm": lambda m, x: x / (1 + torch.linalg.matrix_norm(x, keepdim=True)),
    "nanmean": lambda m, x: x - x.nanmean((2, 3), keepdim=True),
    "quantile": lambda m, x: x - x.quantile(0.5, dim=2, keepdim=True),
    "mode": lambda m, x: x - x.mode(2, keepdim=True)[0],
    "cummax": lambda m, x: x.cummax(2)[0],
    "unfold and fold": lambda m, x: F.fold(F.unfold(x, 3, padding=1), x.shape[2:], 3, padding=1),
    "unpooling": lambda m, x: F.max_unpool2d(*F.max_pool2d(x, 2, return_indices=True), 2),
    # places that are computed, along an axis that is not of the channels
    "scatter_add": lambda m, x: torch.zeros_like(x).scatter_add(2, rows(x), x),
    "scatter_add in place": lambda m, x: torch.zeros_like(x).scatter_add_(2, rows(x), x),
    "scatter_add by a buffer": lambda m, x: torch.zeros_like(x).scatter_add(2, per_token(m, x), x),
    "scatter of a number": lambda m, x: x.scatter(3, rows(x), 0.5),
    "scatter of a part": lambda m, x: x.scatter(2, rows(x)[:, :, :2], x.exp()),
    "scatter_reduce": lambda m, x: torch.zeros_like(x).scatter_reduce(2, rows(x), x, "amax"),
    "gather by values": lambda m, x: x.gather(2, x.argsort(2)),
    "gather by a buffer": lambda m, x: x.gather(2, per_token(m, x)),
    "take_along_dim": lambda m, x: x * torch.take_along_dim(x, x.argmax(2, keepdim=True), 2),
    "index_add": lambda m, x: torch.zeros_like(x).index_add(2, m.order, x),
    "index_copy": lambda m, x: x.index_copy(2, m.order[:3], x[:, :, :3]),
    "index_fill": lambda m, x: x.index_fill(2, m.order[:2], 0.0),
    "one hot": lambda m, x: x * F.one_hot(x.argmax(2), 6).to(x).mT,
    # Fourier transforms over space
    "fft": lambda m, x: torch.fft.ifft(torch.fft.fft(x)).real,
    "rfft of one axis": lambda m, x: torch.fft.irfft(torch.fft.rfft(x, dim=2), n=x.shape[2], dim=2),
    "fft2": lambda m, x: torch.fft.ifft2(torch.fft.fft2(x)).real,
    "rfftn": lambda m, x: torch.fft.irfftn(torch.fft.rfftn(x, dim=(2, 3)), s=x.shape[2:], dim=(2, 3)),
    "spectrum": lambda m, x: torch.fft.fftshift(torch.fft.rfft2(x, norm="ortho").abs(), dim=2),
    "global filter": lambda m, x: torch.fft.irfft2(torch.fft.rfft2(x) * torch.view_as_complex(m.c), s=x.shape[2:]),
    "complex numbers": lambda m, x: torch.view_as_real(torch.polar(x, x) * 1j).flatten(-2),
    # what is computed for nothing
    "unused mean": lambda m, x: (x.mean(), x)[1],
    "unused deviation": lambda m, x: ((x - x.mean(1, keepdim=True)) / x.std(1, keepdim=True), x)[1],
    "unused head": lambda m, x: (m.aux(x.mean((2, 3))).softmax(-1), x)[1],
    "unused softmax": lambda m, x: (x.softmax(1).sum(), x)[1],
    "unused operation without a rule": lambda m, x: (torch.linalg.svdvals(x), torch.fft.fft(x, dim=1), x)[2],
    # sizes that follow
    "expanded": lambda m, x: x * m.order.to(x)[None, None, None].expand(1, x.shape[1], 6, -1),
}  # fmt: skip


def pruned(name: str, f: Callable[[Net, Tensor], Tensor]):
    model = randomise(Net(f))
    captured = capture(model, torch.randn(1, 3, 8, 8, generator=gen(0), dtype=torch.float64))
    traced = probe(Traced(model, captured, find_groups(captured)))
    return model, traced, remove(traced, random_halves(list(traced.groups), gen(1)))


@pytest.mark.parametrize("name", FREE)
def test_channels_leave_exactly(name: str) -> None:
    model, traced, result = pruned(name, FREE[name])
    locked = {g.name: g.locked_because for g in traced.groups}
    assert locked["a"] is None, locked
    assert "a" in result.kept, result.locked
    if any("functional" in g.flags for g in traced.groups if g.name in result.kept):
        return  # read without a weight as well; `remove` compares with a replay of the graph
    zeros = zeroed_original(model, list(traced.groups), result.kept)
    for batch in (1, 3):
        x = torch.randn(batch, 3, 8, 8, generator=gen(batch), dtype=torch.float64)
        assert_same([result.model(x)], [zeros(x)])


@pytest.mark.parametrize(
    ("f", "reason"),
    [
        (lambda m, x: torch.fft.fft(x, dim=1).real, "Fourier transform over channels"),
        (lambda m, x: torch.fft.rfftn(x).abs().repeat(1, 1, 1, 2), "Fourier transform over channels"),
        (lambda m, x: x.gather(1, rows(x)), "looked up by index"),
        (lambda m, x: torch.zeros_like(x).index_add(1, torch.arange(16), x), "looked up by index"),
        (lambda m, x: x * torch.linalg.svdvals(x[..., :1, :])[..., None], "no rule for"),
        (lambda m, x: x - F.local_response_norm(x, 3), "channels on a spatial axis"),
        (lambda m, x: (x.mean(1, keepdim=True).sigmoid(), x)[0] * x, "mean over channels"),
    ],
    ids=["fft", "rfftn", "gather", "index_add", "no rule", "neighbours", "used mean"],
)  # fmt: skip
def test_what_mixes_channels_keeps_them(f, reason) -> None:
    groups = find_groups(capture(Net(f).double(), torch.randn(1, 3, 8, 8, dtype=torch.float64)))
    (group,) = [g for g in groups if g.name == "a"]
    assert reason in (group.locked_because or "")


def test_an_operation_is_known_by_its_namespace() -> None:
    """`composed::add` is not torch's add: it is what it is made of, or nothing is known of it."""
    library = Library("composed", "FRAGMENT")
    library.define("add(Tensor x) -> Tensor")
    library.impl("add", lambda x: x * 2 + x.flip(2), "CompositeImplicitAutograd")
    library.define("mul(Tensor x) -> Tensor")
    library.impl("mul", lambda x: x.cumsum(1), "CompositeExplicitAutograd")
    library.impl("mul", torch.empty_like, "Meta")
    model, traced, result = pruned("", lambda m, x: torch.ops.composed.add(x))
    assert "a" in result.kept
    x = torch.randn(3, 3, 8, 8, generator=gen(0), dtype=torch.float64)
    assert_same([result.model(x)], [zeroed_original(model, list(traced.groups), result.kept)(x)])
    groups = find_groups(capture(Net(lambda m, x: torch.ops.composed.mul(x)).double(), x[:1]))
    assert [g.locked_because for g in groups if g.name == "a"] == ["no rule for composed::mul (mul)"]


def test_costs_count_what_the_parts_cost() -> None:
    """An operation that stays unknown costs nothing; its parts do."""
    traced = pruned("", FREE["tensordot"])[1]
    plain = pruned("", lambda m, x: x)[1]
    assert traced.cost_model().macs == plain.cost_model().macs + 36 * 16 * 16
    three = pruned("", FREE["einsum of three"])[1]
    assert three.cost_model().macs == plain.cost_model().macs + 36 * 16 * 16 + 36 * 16
