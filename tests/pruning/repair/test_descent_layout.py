"""The block descent trains images with their channels last in memory, where no operation reads memory as it lies."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from coreprune import Budget, Repair, prune
from coreprune.pruning.repair import descent, twins
from features import normal
from graph.zoo import randomise


class Viewed(nn.Module):
    """Flattened by a view, which fails on channels that lie last unless it may copy."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, stride=2, padding=1)
        self.norm, self.inner, self.head = nn.BatchNorm2d(8), nn.Linear(8 * 16, 16), nn.Linear(16, 4)

    def forward(self, x):
        x = torch.relu(self.second(torch.relu(self.norm(self.first(x)))))
        return self.head(torch.relu(self.inner(x.view(x.size(0), -1))))


class Strided(Viewed):
    def forward(self, x):
        return super().forward(x) + x.as_strided((x.size(0), 1), (x.stride(0), 1))  # the first pixel of every image


@torch.library.custom_op("coreprune_tests::taken_as_it_lies", mutates_args=())
def taken_as_it_lies(x: torch.Tensor) -> torch.Tensor:
    return x.clone()


@taken_as_it_lies.register_fake
def _(x):
    return torch.empty_like(x)


class Foreign(Viewed):
    def forward(self, x):
        return super().forward(taken_as_it_lies(x))


def run(monkeypatch, model, **patched):
    """The model after the descent, and the batches that it was trained on."""
    seen, original = [], descent.descend

    def spied(both, *rest):
        seen.append(both.batches)
        return original(both, *rest)

    monkeypatch.setattr("coreprune.pruning.stages.descend", spied)
    for name, value in patched.items():
        monkeypatch.setattr(twins, name, value)
    x = normal(96, 3, 8, 8)
    repair = Repair(descent=twins.Descent(steps=15))
    result = prune(model, x[:1], Budget(keep=0.75), "magnitude", queries=x, repair=repair, compare=False)
    (batches,) = seen
    assert result.report.descended
    return result, [args[0] for args, _ in batches]


def last(x):
    return x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()


def test_images_lie_with_their_channels_last(monkeypatch):
    assert all(last(x) for x in run(monkeypatch, randomise(Viewed()))[1])


@pytest.mark.parametrize("build", [Strided, Foreign])
def test_they_do_not_where_an_operation_may_read_memory_as_it_lies(monkeypatch, build):
    assert all(x.is_contiguous() for x in run(monkeypatch, randomise(build()))[1])


def test_the_layout_changes_no_more_than_the_last_digits(monkeypatch):
    model, x = randomise(Viewed()), normal(50, 3, 8, 8, seed=1)
    (laid, _), (plain, batches) = (
        run(monkeypatch, model, **patched) for patched in ({}, {"_last": lambda batch: batch})
    )
    assert all(x.is_contiguous() for x in batches)
    with torch.no_grad():
        torch.testing.assert_close(laid.model(x), plain.model(x), rtol=1e-3, atol=1e-4)
    for block, same in zip(laid.report.descended, plain.report.descended, strict=True):
        assert (block.weights, block.changed) == (same.weights, same.changed)
        assert block.after == pytest.approx(same.after, rel=1e-3)
