"""Features that have lost channels are compared through a fixed map, so that pruning a residual stream loses none."""

from __future__ import annotations

import copy

import torch
from torch import nn

from coreprune.pruning.distill.block_outputs import Watched, lost_axis, shared_features
from coreprune.pruning.distill.channel_maps import Readout, fit_readouts
from coreprune.pruning.distill.distill import distill_
from coreprune.pruning.distill.options import Distill
from distill_pairs import Rows, random, stream_pair


def test_which_shapes_have_lost_channels():
    size = torch.Size
    assert lost_axis(size((2, 6, 4, 4)), size((2, 8, 4, 4))) == 1
    assert lost_axis(size((2, 5, 6)), size((2, 5, 8))) == 2
    for mine, theirs in (
        ((2, 8), (2, 8)),
        ((2, 9), (2, 8)),
        ((1, 8), (2, 8)),
        ((2, 6, 3), (2, 8, 4)),
        ((2, 6), (2, 8, 4)),
    ):
        assert lost_axis(size(mine), size(theirs)) is None


def test_a_channel_that_others_add_up_to_is_read_from_them():
    teacher = nn.Sequential(nn.Sequential(nn.Conv2d(2, 4, 1)), nn.Flatten(), nn.Linear(4 * 9, 2)).double()
    student = nn.Sequential(nn.Sequential(nn.Conv2d(2, 3, 1)), nn.Flatten(), nn.Linear(3 * 9, 2)).double()
    made, kept = teacher[0][0], student[0][0]
    with torch.no_grad():
        made.weight[3], made.bias[3] = made.weight[:3].sum(0), made.bias[:3].sum() + 5
        kept.weight.copy_(made.weight[:3])
        kept.bias.copy_(made.bias[:3])
    x = torch.randn(40, 2, 3, 3, generator=random(), dtype=torch.float64)
    (found,) = fit_readouts(student, teacher, ["0"], [((part,), {}) for part in x.split(16)])
    assert isinstance(found, Readout)
    assert found.axis == 1
    with torch.no_grad():
        wanted = teacher[0](x)
        apart = found(student[0](x)) - wanted
    assert float(apart.norm() / wanted.norm()) < 0.05  # the ridge
    (same,) = fit_readouts(copy.deepcopy(teacher), teacher, ["0"], [((x,), {})])
    assert same is None


def test_a_narrower_residual_stream_does_not_switch_the_features_off():
    """A ResNet-56 at a quarter of its cost lost one channel of its stream, and with it every feature."""
    student, teacher = stream_pair()
    x = torch.randn(128, 3, 8, 8, generator=random(1))
    names = shared_features(student, teacher, ((x,), {}))
    assert set(names) == {"blocks.0", "blocks"}
    maps = fit_readouts(student, teacher, names, [((x,), {})])

    def apart(model: nn.Module) -> float:
        with torch.no_grad(), Watched(model, names) as mine, Watched(teacher, names) as theirs:
            model(x), teacher(x)
            pairs = zip(maps, mine.take(), theirs.take(), strict=True)
            return sum(float(((m(a) if m else a) - b).square().mean() / b.var()) for m, a, b in pairs)

    before, blind = apart(student), copy.deepcopy(student)
    for model, weight in ((student, 1000.0), (blind, 0.0)):
        distill_(model, teacher, Rows((x,)), Distill(steps=60, lr=2e-2, features=weight), seed=0)
    assert apart(student) < 0.8 * before
    assert apart(student) < 0.9 * apart(blind)
