"""Fine-tuning: it learns, leaves modes and gradients as they were, and refuses nonsense."""

from __future__ import annotations

import json

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from coreprune import ArtifactError, InputError
from coreprune.finetune import Batches, Tuning, accuracy, fine_tune_
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
    fine_tune_(model, data, Tuning(20, 1e-2))
    assert accuracy(model, x, y) > max(before, 0.9)
    assert not model.training
    assert all(p.grad is None for p in model.parameters())


def test_a_teacher_outweighs_wrong_labels(gen):
    """The labels are noise; what the student learns of the true ones, it learns from the teacher."""
    x, y = problem(gen)
    teacher = mlp(1)
    fine_tune_(teacher, Batches(x, y, 32, gen), Tuning(20, 1e-2))
    noise = torch.randint(3, (300,), generator=gen)
    frozen = bits(teacher)
    reached = []
    for guide in (None, teacher):
        student = mlp(2)
        fine_tune_(student, Batches(x, noise, 32, gen), Tuning(20, 5e-3), teacher=guide)
        reached.append(accuracy(student, x, y))
    assert reached[1] > reached[0] + 0.2
    assert bits(teacher) == frozen


def test_same_generator_same_weights():
    models = []
    for _ in range(2):
        gen = torch.Generator().manual_seed(0)
        x, y = problem(gen)
        model = mlp()
        fine_tune_(model, Batches(x, y, 32, gen), Tuning(2))
        models.append(bits(model))
    assert models[0] == models[1]


def test_every_sample_comes_once_a_pass(gen):
    batches = Batches(torch.arange(10.0)[:, None], torch.arange(10), 4, gen)
    seen = torch.cat([y for _, y in batches])
    assert len(batches) == 3
    assert sorted(seen.tolist()) == list(range(10))


@pytest.mark.parametrize(
    "wrong",
    [
        {"epochs": 0}, {"epochs": True}, {"lr": 0.0}, {"lr": float("nan")}, {"warm_up": 1.0}, {"temperature": 0},
        {"soft": 2}, {"average": 1.0}, {"clip": -1.0}, {"schedule": "linear"}, {"optimizer": "adam"},
        {"precision": "half"},
        {"weight_decay": -1e-4}, {"lr": "fast"},
    ],
)  # fmt: skip
def test_settings_that_make_no_sense(wrong):
    with pytest.raises(InputError, match=f"Tuning.{next(iter(wrong))}"):
        Tuning(**wrong)


def test_what_cannot_be_trained_is_refused(gen):
    x, y = problem(gen)
    data = Batches(x, y, 32, gen)
    with pytest.raises(InputError, match="Tuning"):
        fine_tune_(mlp(), data, {"epochs": 3})
    with pytest.raises(InputError, match="length"):
        fine_tune_(mlp(), iter(data))
    with pytest.raises(InputError, match="no batches"):
        fine_tune_(mlp(), [])
    with pytest.raises(InputError, match="one of both"):
        fine_tune_(mlp(), data, teacher=mlp(), loss=torch.nn.functional.cross_entropy)
    with pytest.raises(InputError, match="requires a gradient"):
        fine_tune_(mlp().requires_grad_(False), data)


X, Y = torch.zeros(4, 8), torch.zeros(4, dtype=torch.int64)


@pytest.mark.parametrize(
    ("batch", "more", "said"),
    [
        ((X, Y, Y), {}, "tuple of Tensor, Tensor, Tensor"),
        (X, {}, r"tensor of shape \(4, 8\)"),
        (({"x": X}, Y), {}, "tuple of dict, Tensor"),
        ((X, Y.float()), {}, r"\(4,\) torch.float32 of step 0"),
        ((X, Y + 99), {}, "out of bounds"),
        ((X[:, :3], Y), {}, r"\(4, 3\)"),
        ((X, Y), {"teacher": torch.nn.Linear(8, 9)}, "teacher"),
        ((X, Y), {"loss": lambda output, labels: None}, "not a NoneType"),
        ((X, Y), {"loss": lambda output, labels: output}, r"shape \(4, 3\)"),
        ((X, Y), {"loss": lambda output, labels: 1 / 0}, "division by zero"),
        ((X, Y), {"validate": lambda model: "good"}, "not a str"),
    ],
)
def test_batches_and_functions_that_do_not_fit_are_named(batch, more, said):
    model = mlp().train()
    model[0].eval()
    with pytest.raises(InputError, match=said):
        fine_tune_(model, [batch], **more)
    assert model.training
    assert not model[0].training  # every module has its own mode again


def test_a_log_that_cannot_be_written_is_found_before_the_training(tmp_path):
    model = mlp()
    before = bits(model)
    with pytest.raises(ArtifactError, match="cannot write"):
        fine_tune_(model, [(X, Y)], log=tmp_path)
    assert bits(model) == before


def test_a_loss_of_ones_own_and_rows_for_every_epoch(gen, tmp_path):
    x, _ = problem(gen)
    model, seen = mlp(), []
    wanted = torch.randn(300, model(x).shape[1], generator=gen)

    def distance(output, target):
        seen.append(len(output))
        return (output - target).square().mean()

    rows = fine_tune_(
        model, Batches(x, wanted, 100, gen), Tuning(4, 1e-2), loss=distance, validate=lambda m: float(m.training),
        log=tmp_path / "logs" / "run.jsonl",
    )  # fmt: skip
    assert seen == [100] * 12
    assert [row["epoch"] for row in rows] == [1, 2, 3, 4]
    assert rows[-1]["loss"] < rows[0]["loss"]
    assert {row["validation"] for row in rows} == {0.0}  # in evaluation mode
    logged = [json.loads(line) for line in (tmp_path / "logs" / "run.jsonl").read_text().splitlines()]
    assert [{key: row[key] for key in rows[0]} for row in logged] == rows
    assert [(row["phase"], row["done"], row["total"]) for row in logged] == [
        ("fine-tune", 3 * k, 12) for k in range(1, 5)
    ]
    assert all(row["time"] > 0 for row in logged)


def test_the_averaged_weights_are_those_of_the_formula(gen):
    """θ̄ ← d θ̄ + (1 − d) θ with d = min(average, (t + 1)/(t + 10)), recomputed from the weights after every step."""
    x, y = problem(gen)
    model, steps = mlp(), []
    wanted = {n: p.detach().clone() for n, p in model.named_parameters()}

    def note(phase, done, total):
        steps.append({n: p.detach().clone() for n, p in model.named_parameters()})

    fine_tune_(model, Batches(x, y, 100, gen), Tuning(3, 1e-2, average=0.6), progress=note)
    for t, weights in enumerate(steps):
        d = min(0.6, (t + 1) / (t + 10))
        wanted = {n: d * wanted[n] + (1 - d) * weights[n] for n in wanted}
    for name, parameter in model.named_parameters():
        assert torch.allclose(parameter, wanted[name], rtol=1e-5, atol=1e-7)
        assert not torch.equal(parameter, steps[-1][name])


@pytest.mark.parametrize("options", [Tuning(4, 1e-2, average=0.9), Tuning(4, 1e-2, optimizer="sgd", clip=1.0)])
def test_an_interrupted_run_ends_as_an_uninterrupted_one(options, tmp_path):
    def run(stop=None, path=None):
        gen = torch.Generator().manual_seed(0)
        x, y = problem(gen)
        torch.manual_seed(3)
        model = torch.nn.Sequential(mlp(), torch.nn.Dropout(0.2), torch.nn.BatchNorm1d(3))

        def tell(phase, done, total):
            if done == stop:
                raise KeyboardInterrupt

        try:
            fine_tune_(model, Batches(x, y, 50, gen), options, checkpoint=path, progress=tell)
        except KeyboardInterrupt:
            return None
        return bits(model)

    whole, path = run(), tmp_path / "run.safetensors"
    assert run(stop=15, path=path) is None
    assert run(stop=21, path=path) is None
    assert run(path=path) == whole
    assert run(path=path) == whole  # all epochs are done
    gen = torch.Generator().manual_seed(0)
    x, y = problem(gen)
    with pytest.raises(InputError, match="another run"):
        fine_tune_(mlp(), Batches(x, y, 50, gen), options, checkpoint=path)


def test_loaders_are_told_the_epoch(gen):
    x, y = problem(gen)

    class Sampler(torch.utils.data.SequentialSampler):
        epochs: list[int] = []  # noqa: RUF012

        def set_epoch(self, epoch):
            self.epochs.append(epoch)

    data = TensorDataset(x, y)
    fine_tune_(mlp(), DataLoader(data, batch_size=100, sampler=Sampler(data)), Tuning(3))
    assert Sampler.epochs == [0, 1, 2]


def test_weight_decay_spares_biases():
    gen = torch.Generator().manual_seed(0)
    x, y = torch.zeros(64, 8), torch.zeros(64, dtype=torch.int64)
    model = mlp()
    before = [p.detach().clone() for p in model.parameters()]
    flat = lambda output, _: 0.0 * output.sum()  # noqa: E731 - no gradient but that of the decay
    fine_tune_(model, Batches(x, y, 32, gen), Tuning(2, 1e-2, weight_decay=1.0), loss=flat)
    for old, new in zip(before, model.parameters(), strict=True):
        assert torch.equal(old, new) == (old.dim() == 1)


def test_an_exploding_loss_is_named(gen):
    x, y = problem(gen)
    x[0, 0] = float("inf")
    with pytest.raises(InputError, match="Lower lr"):
        fine_tune_(mlp(), Batches(x, y, 300, gen))
