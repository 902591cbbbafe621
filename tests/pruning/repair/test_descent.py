"""The block descent: what it may change, what it must not, and that it never raises the held-out error."""

from __future__ import annotations

from dataclasses import asdict, replace

import pytest
import torch
from torch import nn

from coreprune import Budget, Descent, InputError, ModelError, Repair, apply_plan, prune
from coreprune.pruning.repair import descent, twins
from features import normal
from graph.zoo import ZOO, randomise
from small_networks import bits
from zoo_examples import call, example


class Net(nn.Module):
    """A stem, two residual blocks with norms, a head."""

    def __init__(self):
        super().__init__()
        self.stem, self.head = nn.Conv2d(3, 8, 3, padding=1), nn.Linear(8, 4)
        self.convs = nn.ModuleList(nn.Conv2d(8, 8, 3, padding=1, bias=False) for _ in range(4))
        self.norms = nn.ModuleList(nn.BatchNorm2d(8) for _ in range(4))

    def forward(self, x):
        x = torch.relu(self.stem(x))
        for i in (0, 2):
            y = torch.relu(self.norms[i](self.convs[i](x)))
            x = torch.relu(x + self.norms[i + 1](self.convs[i + 1](y)))
        return self.head(x.mean((2, 3)))


def net() -> nn.Module:
    return randomise(Net())


def pruned(model, x, options=True, keep=0.75, **more):
    """Without and with the descent."""
    return tuple(
        prune(model, x[:1], Budget(keep=keep), "magnitude", queries=x, repair=Repair(descent=d), compare=False, **more)
        for d in (False, options)
    )


def test_every_block_is_better_on_queries_held_out_and_the_output_on_new_ones():
    model, x = net(), normal(192, 3, 8, 8)
    plain, done = pruned(model, x)
    blocks = done.report.descended
    assert [b.weights[0] for b in blocks] == ["stem.weight", "convs.2.weight", "head.weight"]
    assert all(b.after < b.before if b.changed else b.after == b.before for b in blocks)
    assert any(b.changed for b in blocks)
    fresh = normal(200, 3, 8, 8, seed=7)
    with torch.no_grad():
        errors = [float((r.model(fresh) - model(fresh)).square().mean()) for r in (plain, done)]
    assert errors[1] < 0.95 * errors[0]
    assert plain.report.descended == ()
    assert plain.plan == done.plan


def test_the_report_says_what_was_descended():
    _, done = pruned(net(), normal(64, 3, 8, 8))
    text = str(done.report)
    assert "descent" in text
    assert f"{len(done.report.descended)} blocks" in text
    assert "descend" in done.report.seconds
    assert done.report.as_dict()["descended"][0]["weights"][0] == "stem.weight"
    assert "Repair(descent=True)" in done.report.settings.call()


def test_a_step_that_raises_the_held_out_error_is_not_taken(monkeypatch):
    """With such rates every block ends worse than it began. The model then has the bits of the repair."""
    monkeypatch.setattr(descent, "_RIDGES", (-0.9999,))
    plain, done = pruned(net(), normal(64, 3, 8, 8), Descent(steps=3, lr=1e4))
    assert done.report.descended
    assert not any(b.changed for b in done.report.descended)
    assert bits(done.model) == bits(plain.model)


def test_a_loss_that_is_not_a_number_leaves_the_block_as_it_was(monkeypatch):
    real = descent._Task.error

    def broken(task, rows, tensors):
        found = real(task, rows, tensors)
        return found * float("nan") if found.requires_grad else found

    monkeypatch.setattr(descent._Task, "error", broken)
    monkeypatch.setattr(descent, "_RIDGES", (float("nan"),))
    plain, done = pruned(net(), normal(64, 3, 8, 8))
    assert bits(done.model) == bits(plain.model)
    assert not any(b.changed for b in done.report.descended)


def test_an_error_in_the_descent_costs_nobody_the_result(monkeypatch, caplog):
    def broken(*_):
        raise RuntimeError("no such kernel")

    monkeypatch.setattr(descent._Task, "error", broken)
    model, x = net(), normal(64, 3, 8, 8)
    before = bits(model)
    plain, done = pruned(model, x, None)
    assert bits(done.model) == bits(plain.model)
    assert done.report.descended == ()
    assert "no such kernel" in caplog.text
    with pytest.raises(ModelError, match="no such kernel"):
        pruned(model, x, True)
    assert bits(model) == before


def test_the_given_model_and_what_is_no_parameter_stay_as_they_are():
    model, x = net(), normal(64, 3, 8, 8)
    before = bits(model)
    plain, done = pruned(model, x)
    assert bits(model) == before
    for name, value in done.model.named_buffers():
        assert torch.equal(value, plain.model.get_buffer(name)), name
    assert [p.requires_grad for p in done.model.parameters()] == [p.requires_grad for p in model.parameters()]
    assert all(p.grad is None for p in done.model.parameters())
    assert {n: p.shape for n, p in done.model.named_parameters()} == {
        n: p.shape for n, p in plain.model.named_parameters()
    }


def test_frozen_parameters_are_not_trained():
    model, x = net(), normal(192, 3, 8, 8)
    for i in (0, 1):
        model.convs[i].requires_grad_(False)
    plain, done = pruned(model, x)
    for i in (0, 1):
        assert torch.equal(done.model.convs[i].weight, plain.model.convs[i].weight)
        assert not done.model.convs[i].weight.requires_grad
    assert not torch.equal(done.model.stem.weight, plain.model.stem.weight)


def test_a_model_that_is_frozen_whole_is_trained():
    model = net().requires_grad_(False)
    plain, done = pruned(model, normal(64, 3, 8, 8))
    assert not torch.equal(done.model.stem.weight, plain.model.stem.weight)


def test_a_weight_that_two_blocks_share_is_not_trained():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(6, 6) for _ in range(6))
            self.layers[4].weight = self.layers[1].weight

        def forward(self, x):
            for layer in self.layers:
                x = torch.relu(layer(x))
            return x

    model, x = randomise(Tied()), normal(64, 6)
    plain, done = pruned(model, x)
    assert torch.equal(done.model.layers[1].weight, plain.model.layers[1].weight)
    assert done.model.layers[4].weight is done.model.layers[1].weight
    assert any(b.changed for b in done.report.descended)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_weights_of_few_bits_are_trained_and_keep_their_type(dtype):
    model, x = net().to(dtype), normal(64, 3, 8, 8).to(dtype)
    plain, done = pruned(model, x)
    assert {p.dtype for p in done.model.parameters()} == {dtype}
    assert all(bool(torch.isfinite(p).all()) for p in done.model.parameters())
    changed = [b for b in done.report.descended if b.changed]
    assert changed
    assert all(b.after < b.before for b in changed)
    assert bits(done.model) != bits(plain.model)


def test_one_seed_one_result():
    model, x = net(), normal(64, 3, 8, 8)
    one, two, other = (pruned(model, x, seed=s)[1].model for s in (0, 0, 1))
    assert bits(one) == bits(two)
    assert bits(one) != bits(other)


def test_other_random_numbers_are_left_alone():
    model, x = net(), normal(64, 3, 8, 8)
    state = torch.get_rng_state()
    pruned(model, x)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("n", [1, 2, 15])
def test_with_few_queries_there_is_no_descent(n):
    plain, done = pruned(net(), normal(n, 3, 8, 8), n_queries=n)
    assert done.report.descended == ()
    assert bits(done.model) == bits(plain.model)


@pytest.mark.parametrize("n", [32, 33, 40, 100, 131])
def test_sixteen_queries_beside_those_that_are_held_back_are_enough(n):
    assert pruned(net(), normal(n, 3, 8, 8), Descent(steps=2))[1].report.descended


@pytest.mark.parametrize("n", range(16, 300, 7))
def test_a_quarter_is_held_out_and_most_queries_are_used(n):
    held = twins._held_out(n)
    size = twins._size(n - held, held, 64)
    assert held >= n // 4
    assert held >= min(16, n // 2)
    assert 8 <= size <= 32
    assert (n - held) % size + held % size <= max(5, n // 10)


def test_no_query_is_both_trained_on_and_held_out(monkeypatch):
    parts = []

    class Rows(twins.Rows):
        def __init__(self, queries, *rest):
            parts.append(queries.args[0])
            super().__init__(queries, *rest)

    monkeypatch.setattr(twins, "Rows", Rows)
    pruned(net(), normal(64, 3, 8, 8), Descent(steps=1))
    train, held = parts
    assert len(held) == 16
    assert len(train) >= 32
    assert not any(torch.equal(a, b) for a in train for b in held)


def test_if_the_output_does_not_improve_every_block_goes_back(monkeypatch):
    """Blocks that improve on their own may leave later layers with inputs that they were not refit to."""
    real = descent._Task.lost

    def flattered(task, exits, rows):
        whole = isinstance(rows, range)
        return real(task, exits, rows) * (0.0 if whole else 1.0)

    monkeypatch.setattr(descent._Task, "lost", flattered)
    plain, done = pruned(net(), normal(64, 3, 8, 8))
    assert bits(done.model) == bits(plain.model)
    assert done.report.descended
    assert all(not b.changed and b.after == b.before for b in done.report.descended)


def test_nothing_pruned_nothing_trained():
    model, x = net(), normal(32, 3, 8, 8)
    result = prune(model, x[:1], Budget(keep=1.0), queries=x, repair=Repair(descent=True))
    assert bits(result.model) == bits(model)
    assert result.report.descended == ()


def test_a_cheap_descent_runs_unasked_and_an_expensive_one_does_not(monkeypatch):
    model, x = net(), normal(32, 3, 8, 8)
    asked = prune(model, x[:1], Budget(keep=0.5), "magnitude", queries=x, repair=Repair(descent=True))
    unasked = prune(model, x[:1], Budget(keep=0.5), "magnitude", queries=x)
    assert bits(asked.model) == bits(unasked.model)
    monkeypatch.setattr(twins, "_LIMIT", 1)
    dear = prune(model, x[:1], Budget(keep=0.5), "magnitude", queries=x)
    assert dear.report.descended == ()
    again = prune(model, x[:1], Budget(keep=0.5), "magnitude", queries=x, repair=Repair(descent=Descent()))
    assert bits(again.model) == bits(asked.model)


def test_only_counts_decide_whether_it_is_cheap():
    asked = Descent(steps=10, batch_size=64)
    limit = twins._LIMIT // (3 * 10)
    assert twins.affordable(1000, asked) is asked
    assert twins.affordable(0, asked) is asked
    assert twins.affordable(limit // 64, asked) is asked
    assert twins.affordable(limit // 32, asked) == replace(asked, batch_size=32)
    assert twins.affordable(limit // 16, asked) == replace(asked, batch_size=16)
    assert twins.affordable(limit // 15, asked) is None
    few = Descent(steps=10, batch_size=4)
    assert twins.affordable(limit // 4, few) is few
    assert twins.affordable(limit // 3, few) is None


def test_a_plan_that_is_applied_is_descended_too():
    model, x = net(), normal(64, 3, 8, 8)
    done = pruned(model, x)[1]
    again = apply_plan(model, done.plan, x[:1], queries=x, repair=Repair(descent=True))
    assert bits(again) == bits(done.model)


@pytest.mark.parametrize("name", ["mlp", "conv1d-glu", "einsum-attention", "group-norm", "vgg", "densenet", "gpt2"])
def test_the_descent_runs_on_other_architectures(name):
    """Concatenations, attention, group norms, no narrow place."""
    if name not in ZOO:
        pytest.skip("this architecture needs transformers")
    model, x, fresh = randomise(ZOO[name].build()), example(ZOO[name].inputs(64)), ZOO[name].inputs(3)
    plain, done = (
        prune(model, example(ZOO[name].inputs(1)), Budget(keep=0.5), "magnitude", queries=x, repair=Repair(descent=d))
        for d in (False, Descent(steps=20))
    )
    assert done.report.descended
    assert all(b.after <= b.before for b in done.report.descended)
    changed = {n for n, p in done.model.named_parameters() if not torch.equal(p, plain.model.get_parameter(n))}
    assert bool(changed) == any(b.changed for b in done.report.descended)
    assert bool(torch.isfinite(call(done.model, fresh)).all())


@pytest.mark.parametrize(
    "wrong",
    [
        {"steps": 0},
        {"steps": 1.5},
        {"steps": True},
        {"lr": 0.0},
        {"lr": float("nan")},
        {"lr": "1"},
        {"lr": True},
        {"batch_size": 0},
        {"copies": 0},
    ],
)
def test_wrong_options_are_refused(wrong, unchecked):
    with pytest.raises(InputError, match=rf"Descent\.{next(iter(wrong))}"):
        Descent(**wrong)


@pytest.mark.parametrize("wrong", [1, 0, "yes", 150.0])
def test_a_wrong_descent_is_refused(wrong, unchecked):
    with pytest.raises(InputError, match="descent"):
        Repair(descent=wrong)


def test_options_are_plain_values():
    assert asdict(Repair(descent=Descent(steps=7)))["descent"]["steps"] == 7


@torch.no_grad()
def test_the_last_layer_is_the_least_squares_fit_to_what_it_gets(monkeypatch):
    monkeypatch.setattr(descent, "_RIDGES", (1e-12,))
    model, shown = net(), []

    class Batched(twins.Twins):
        def __init__(self, *args):
            super().__init__(*args)
            shown[:] = [args[0][0] for args in self.batches[: -self.held]]

    monkeypatch.setattr(twins, "Twins", Batched)
    _, done = pruned(model, normal(192, 3, 8, 8))
    assert done.report.descended[-1].changed
    head, x = done.model.head, torch.cat(shown)
    inputs = []
    handle = head.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    done.model(x)
    handle.remove()
    design = torch.cat([inputs[0], torch.ones(len(x), 1).double()], 1)
    best = torch.linalg.lstsq(design, model(x)).solution
    assert torch.allclose(head.weight, best[:-1].T, atol=1e-6)
    assert torch.allclose(head.bias, best[-1], atol=1e-6)
