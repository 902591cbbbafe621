"""How many queries run together: few where outputs are large, and always an even number of batches if possible."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from coreprune import Budget, _example, prune
from coreprune.graph import Traced, capture, find_groups
from coreprune.pruning.calibration.calibration import _batch_size, _in_batches
from coreprune.queries import Queries


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 10)).eval()


@pytest.mark.parametrize("most", [1, 2, 3, 10, 32])
def test_batches_are_no_larger_than_asked_and_leave_few_queries_over(most):
    for n in range(2, 400):
        size = _batch_size(n, most)
        assert 1 <= size <= most
        if n > most:
            assert n % (2 * size) == min(n % (2 * other) for other in range(max(1, (most + 1) // 2), most + 1))
        else:
            assert n // size >= 2


def test_large_outputs_run_few_at_a_time(monkeypatch):
    model, x = net(), torch.randn(24, 4)
    captured = capture(model, x[:1])
    traced = Traced(model, captured, find_groups(captured))
    sizes = []
    for entries in (1 << 25, 35, 1):
        monkeypatch.setattr(_example, "_ENTRIES", entries)
        found = _in_batches(traced, [Queries((x,), {}, "samples", "")], None, None)
        sizes.append(sorted({len(args[0]) for args, _ in found.batches}))
        assert sum(len(args[0]) for args, _ in found.batches) == 24
        assert len(found.batches) % 2 == 0
    assert sizes == [[12], [3], [1]]


def test_pruning_one_query_at_a_time_gives_nearly_the_same_network(monkeypatch):
    model, x = net(), torch.randn(64, 4, generator=torch.Generator().manual_seed(1))
    found = []
    for entries in (1 << 25, 1):
        monkeypatch.setattr(_example, "_ENTRIES", entries)
        small = prune(model, x[:1], Budget(keep=0.5), queries=x, compare=False, progress=False).model
        with torch.no_grad():
            found.append(float((small(x) - model(x)).square().mean() / model(x).var()))
    assert found[1] == pytest.approx(found[0], rel=0.5)
