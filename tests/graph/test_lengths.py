"""The lengths of axes as functions of widths, against the shapes in a model that was really cut."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from coreprune.graph import Traced, capture, extents, find_groups, remove


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out, self.heads = nn.Linear(12, 36), nn.Linear(12, 12), 3
        self.up, self.down = nn.Linear(12, 20), nn.Linear(20, 12)

    def forward(self, x: Tensor) -> Tensor:
        b, t, _ = x.shape
        q, k, v = self.qkv(x).reshape(b, t, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, t, -1))
        return x + self.down(F.gelu(self.up(x)))


class Convolutions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm, self.d = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3, groups=8)
        self.b, self.c = nn.Conv2d(8, 6, 1), nn.Conv2d(8, 10, 1)
        self.g, self.head = nn.Conv2d(16, 8, 1, groups=2), nn.Linear(8 * 4, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.d(F.relu(self.norm(self.a(x))))
        return self.head(self.g(torch.cat([self.b(x), self.c(x)], 1)).flatten(1))


MODELS = {
    "attention": (Attention, torch.zeros(1, 5, 12)),
    "convolutions": (Convolutions, torch.zeros(1, 3, 6, 6)),
}


@pytest.mark.parametrize("name", MODELS)
def test_shapes_after_a_cut(name):
    build, example = MODELS[name]
    model = build().eval()
    captured = capture(model, (example,))
    traced = Traced(model, captured, find_groups(captured))
    nodes = [n for n in captured.graph.graph.nodes if isinstance(n.meta.get("val"), Tensor)]
    found = extents(captured, traced.groups, nodes)
    assert any(e.slopes for node in nodes for e in found[node] or ())
    for name_, group in traced.free.items():
        units = group.units()
        sections = torch.zeros(len(units), dtype=torch.int64) if group.sections is None else group.sections
        stay = torch.cat([(sections == b).nonzero()[:2, 0] for b in range(group.section_count)])
        keep = units[stay].reshape(-1).sort().values
        removed = remove(traced, {name_: keep})
        assert not removed.locked
        widths = {g.name: g.size for g in traced.groups} | {name_: len(keep)}
        cut = capture(removed.model, (example,))
        after = [n for n in cut.graph.graph.nodes if isinstance(n.meta.get("val"), Tensor)]
        assert [n.target for n in after] == [n.target for n in nodes]
        for node, other in zip(nodes, after, strict=True):
            said = found[node]
            assert said is not None, node
            assert tuple(e.at(widths) for e in said) == tuple(other.meta["val"].shape), (name_, node)


def test_groups_of_a_trace_with_one_sample_fit_a_trace_with_several():
    model = Attention().eval()
    one, four = capture(model, (torch.zeros(1, 5, 12),)), capture(model, (torch.zeros(4, 5, 12),), batch=4)
    groups = find_groups(one)
    up = next(n for n in four.graph.graph.nodes if n.name.startswith("gelu"))
    (said,) = extents(four, groups, [up]).values()
    assert said is not None
    assert [e.fixed for e in said[:2]] == [4, 5]
    assert said[2].slopes == (("up", 1.0),)


def test_a_locked_group_changes_no_length():
    captured = capture(Convolutions().eval(), (torch.zeros(1, 3, 6, 6),))
    traced = Traced(Convolutions(), captured, find_groups(captured))
    locked = traced.locking(dict.fromkeys(traced.free, "a reason"))
    found = extents(captured, locked.groups, list(captured.graph.graph.nodes))
    assert not any(e.slopes for said in found.values() for e in said or ())
