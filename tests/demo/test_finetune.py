"""Fine-tuning: it learns, leaves modes and gradients as they were, and refuses nonsense."""

from __future__ import annotations

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from coreprune import InputError
from coreprune.demo.finetune import Batches, accuracy, fine_tune_
from small_networks import bits, mlp


def problem(gen: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    x = torch.randn(300, 8, generator=gen)
    return x, (x[:, 0] > 0).long() + (x[:, 1] > 0).long()


@pytest.mark.parametrize("source", ["batches", "loader"])
def test_it_learns_and_ends_in_the_mode_it_began_in(source, gen):
    x, y = problem(gen)
    data = Batches(x, y, 32, gen) if source == "batches" else DataLoader(TensorDataset(x, y), batch_size=32)
    model = mlp().eval()
    before = accuracy(model, x, y)
    fine_tune_(model, data, epochs=20, lr=1e-2)
    assert accuracy(model, x, y) > max(before, 0.9)
    assert not model.training
    assert all(p.grad is None for p in model.parameters())


def test_a_teacher_outweighs_wrong_labels(gen):
    """The labels are noise; what the student learns of the true ones, it learns from the teacher."""
    x, y = problem(gen)
    teacher = mlp(1)
    fine_tune_(teacher, Batches(x, y, 32, gen), epochs=20, lr=1e-2)
    noise = torch.randint(3, (300,), generator=gen)
    frozen = bits(teacher)
    reached = []
    for guide in (None, teacher):
        student = mlp(2)
        fine_tune_(student, Batches(x, noise, 32, gen), epochs=20, lr=5e-3, teacher=guide)
        reached.append(accuracy(student, x, y))
    assert reached[1] > reached[0] + 0.2
    assert bits(teacher) == frozen


def test_same_generator_same_weights():
    models = []
    for _ in range(2):
        gen = torch.Generator().manual_seed(0)
        x, y = problem(gen)
        model = mlp()
        fine_tune_(model, Batches(x, y, 32, gen), epochs=2)
        models.append(bits(model))
    assert models[0] == models[1]


def test_every_sample_comes_once_a_pass(gen):
    batches = Batches(torch.arange(10.0)[:, None], torch.arange(10), 4, gen)
    seen = torch.cat([y for _, y in batches])
    assert len(batches) == 3
    assert sorted(seen.tolist()) == list(range(10))


@pytest.mark.parametrize("kwargs", [{"epochs": 0}, {"lr": 0.0}, {"warm_up": 1.0}])
def test_settings_that_make_no_sense(kwargs, gen):
    x, y = problem(gen)
    with pytest.raises(InputError, match="needed"):
        fine_tune_(mlp(), Batches(x, y, 32, gen), **kwargs)


def test_an_exploding_loss_is_named(gen):
    x, y = problem(gen)
    x[0, 0] = float("inf")
    with pytest.raises(InputError, match="Lower lr"):
        fine_tune_(mlp(), Batches(x, y, 300, gen))
