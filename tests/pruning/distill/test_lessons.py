"""What the teacher says is kept for some passes over the inputs, and is what it would say again."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import nn

from coreprune import Distill, InputError
from coreprune.pruning.calibration.rows import Rows
from coreprune.pruning.distill import lessons
from coreprune.pruning.distill.block_outputs import Watched, spread
from coreprune.pruning.distill.distill import distill_
from coreprune.pruning.distill.lessons import Lessons, Watching
from coreprune.queries import Queries
from small_networks import mlp


class Counting(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model, self.calls = model, 0

    def forward(self, x):
        self.calls += 1
        return self.model(x)


def inputs(n=10):
    return Queries((torch.randn(n, 8, generator=torch.Generator().manual_seed(0)),), {}, "mine")


def taught(teacher, rows, copies, steps):
    with Watched(teacher, ["model.0"]) as seen:
        every = Lessons(Watching(teacher, seen), rows, rows.size, copies)
        return every, [every.of(step) for step in range(steps)]


def test_after_the_copies_the_lessons_come_again():
    teacher, rows = Counting(mlp()), Rows(inputs(), 5, True, 0)
    every, found = taught(teacher, rows, 3, 20)
    assert every.period == 6
    assert teacher.calls == 6
    assert all(found[i] is found[i % 6] for i in range(20))
    assert len({id(lesson) for lesson in found}) == 6


def test_without_copies_the_teacher_runs_in_every_step():
    teacher, rows = Counting(mlp()), Rows(inputs(), 5, True, 0)
    every, found = taught(teacher, rows, 0, 20)
    assert every.period == 0
    assert len({id(lesson) for lesson in found}) == 20


def test_a_lesson_is_what_the_teacher_says_to_its_inputs():
    teacher, rows = Counting(mlp()), Rows(inputs(), 4, True, 0)
    _, found = taught(teacher, rows, 2, 9)
    for (part,) in found:
        (x,) = part.inputs[0]
        with torch.no_grad():
            assert torch.equal(part.outputs[0], teacher.model(x))
            assert torch.equal(part.features[0], teacher.model[0](x))


def test_what_does_not_fit_is_not_kept(monkeypatch):
    teacher, rows = Counting(mlp()), Rows(inputs(), 5, True, 0)
    one = 5 * (3 + 24) * 4  # bytes of one lesson: outputs, and the feature
    for room, period in ((one * 5, 4), (one * 4, 4), (one * 4 - 1, 2), (one * 2 - 1, 0)):
        monkeypatch.setattr(lessons, "_KEPT", room)
        assert taught(teacher, rows, 8, 0)[0].period == period


def test_the_teacher_runs_no_more_often_than_there_are_lessons():
    teacher = Counting(mlp(1))
    distill_(Counting(mlp(0)), teacher, inputs(10), Distill(steps=30, batch_size=5, copies=2, features=0.0), seed=0)
    assert teacher.calls <= 4 + 2  # and once to try a batch


def test_at_most_eight_features_are_compared_evenly_over_the_depth():
    names = [str(i) for i in range(27)]
    chosen = spread(names)
    assert len(chosen) == 8
    assert chosen[-1] == "26"
    gaps = [int(b) - int(a) for a, b in pairwise(chosen)]
    assert set(gaps) <= {3, 4}
    assert spread(names[:8]) == names[:8]
    assert spread([]) == []


@pytest.mark.parametrize("wrong", [-1, 1.5, True, "8"])
def test_wrong_copies_are_refused(wrong, unchecked):
    with pytest.raises(InputError, match=r"Distill\.copies"):
        Distill(copies=wrong)
