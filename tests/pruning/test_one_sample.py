"""Models that take one sample at a time, as programs do that torch.export wrote with its defaults."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from coreprune import Queries, _example, certify
from coreprune._example import largest_batch
from coreprune.pruning.distill.distill import distill_
from coreprune.pruning.distill.options import Distill
from distill_pairs import Rows, conv_pair, mlp_pair, random
from queries.small import Alone


def test_how_many_samples_models_take_at_once():
    model, two = nn.Linear(8, 3), ((torch.zeros(2, 8),), {})
    assert largest_batch(two, 32, model, model) == 32
    assert largest_batch(two, 32, model, Alone(model)) == 1
    one = ((torch.zeros(1, 8),), {})
    assert largest_batch(one, 32, Alone(model)) == 32, "where there is no second sample, nothing is split"


def test_fewer_samples_run_together_where_their_outputs_are_large(monkeypatch):
    """The logits of 32 texts of 512 tokens, in both models, were 6 GB."""
    model, two = nn.Linear(8, 1000), ((torch.zeros(2, 50, 8),), {})
    monkeypatch.setattr(_example, "_ENTRIES", 200_000)
    assert largest_batch(two, 32, nn.Linear(8, 3), model) == 4
    monkeypatch.setattr(_example, "_ENTRIES", 10)
    assert largest_batch(two, 32, model) == 1


def test_the_agreement_of_models_of_one_sample_is_that_of_the_same_models_together():
    """T11 ran 32 samples at once, and ended in the model's own error."""
    student, teacher = mlp_pair()
    x = torch.randn(70, 8, generator=random())
    found, wanted = (
        certify(dense, small, x[:1], x) for dense, small in ((Alone(teacher), Alone(student)), (teacher, student))
    )
    assert found == wanted
    assert 0 < wanted.bound < 1


@pytest.mark.parametrize(("pair", "shape"), [(mlp_pair, (8,)), (conv_pair, (3, 8, 8))])
def test_the_distillation_of_a_model_of_one_sample_is_that_of_the_same_model_together(pair, shape):
    """The distillation ran 64 samples at once. The losses are of whole batches all the same, outputs and features."""
    student, teacher = (m.double() for m in pair())
    x = torch.randn(20, *shape, generator=random(), dtype=torch.float64)
    start = copy.deepcopy(student.state_dict())
    alone, options = copy.deepcopy(student), Distill(steps=3, batch_size=7)
    distill_(student, teacher, Rows((x,)), options, seed=0)
    distill_(Alone(alone), Alone(teacher), Rows((x,)), options, seed=0)
    torch.testing.assert_close(alone.state_dict(), student.state_dict(), rtol=1e-7, atol=1e-9)
    assert any(not torch.equal(t, start[name]) for name, t in student.state_dict().items())


def test_the_distillation_on_a_single_query():
    student, teacher = mlp_pair()
    distill_(student, teacher, Queries((torch.randn(1, 8, generator=random()),), {}, "mine"), Distill(steps=1),
             seed=0)  # fmt: skip
