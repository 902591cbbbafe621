"""Layers with more outputs than features, such as those of a vocabulary, are fitted block by block."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from coreprune import Budget, Repair, prune
from coreprune.pruning.repair import refit
from coreprune.pruning.repair.fit import Fit, joined
from features import normal
from graph.zoo import randomise


def net(bias: bool) -> nn.Module:
    last = nn.Linear(10, 64, bias=bias)
    return randomise(nn.Sequential(nn.Linear(6, 24), nn.ReLU(), nn.Linear(24, 10), nn.GELU(), last))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("rows", [200, 60])
def test_blocks_give_what_the_whole_layer_gives(bias: bool, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """With one ridge for all. 60 rows are fewer than three quarters of the features times the folds."""
    x, options = normal(rows, 6), Repair(ridge=0.01, descent=False)

    def cut() -> tuple[nn.Module, list]:
        result = prune(net(bias), x[:1], Budget(keep=0.5), "magnitude", queries=x, repair=options, compare=False)
        return result.model, list(result.report.refits)

    whole, fits = cut()
    made: list[int] = []
    fitted = refit.fitted

    def counted(batches, start, *args, **more):
        made.append(start.shape[1])
        return fitted(batches, start, *args, **more)

    monkeypatch.setattr(refit, "fitted", counted)
    monkeypatch.setattr(refit, "_BLOCK", 64)  # weights; the last layer has 64 × 10 or fewer
    parts, again = cut()
    assert max(made) < 64
    assert sum(made) > 64  # the last layer in parts, and the one before
    for a, b in zip(whole.parameters(), parts.parameters(), strict=True):
        assert torch.allclose(a, b, rtol=0, atol=1e-9)
    for one, other in zip(fits, again, strict=True):
        assert one.weight == other.weight
        assert [one.before, one.after] == pytest.approx([other.before, other.after], rel=1e-6)


def test_errors_are_joined_by_the_variance() -> None:
    """Against the definition: the mean of the errors of all outputs over the mean of their variances."""
    errors, sizes = normal(2, 9).abs(), normal(9).abs()
    blocks = [slice(0, 4), slice(4, 5), slice(5, 9)]
    fits = [
        Fit(
            torch.zeros(1, len(sizes[b]), 3),
            torch.zeros(1, len(sizes[b])),
            *(float(e[b].mean() / sizes[b].mean()) for e in errors),
            float(sizes[b].mean()),
        )
        for b in blocks
    ]
    found = joined(fits)
    assert found.weight.shape == (1, 9, 3)
    assert [found.before, found.after] == pytest.approx([float(e.mean() / sizes.mean()) for e in errors])
    assert found.variance == pytest.approx(float(sizes.mean()))
    still = Fit(torch.ones(1, 2, 3), torch.ones(1, 2), 0.0, 0.0, 0.0)  # a block that is left as it was
    again = joined([fits[0], still, *fits[1:]])
    assert (again.before, again.after, again.variance) == (found.before, found.after, found.variance)
    assert torch.equal(again.weight[:, 4:6], torch.ones(1, 2, 3))
