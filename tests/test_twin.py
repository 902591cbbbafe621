"""Twins and copies: nothing that a forward does reaches the model, and functions of the copy work on the copy."""

from __future__ import annotations

import copy
import functools
import threading
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from coreprune import Budget, ModelError, prune
from coreprune._twin import duplicate, quiet, twin


class Busy(nn.Module):
    """A forward that writes wherever it can, its parameters excepted."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.register_buffer("count", torch.zeros(()))
        self.register_buffer("table", None)
        self.cache, self.seen, self.last, self.config = {}, [], None, SimpleNamespace(use_cache=True)

    def forward(self, x):
        x.add_(1)
        self.count += 1
        if self.table is None:
            self.table = torch.arange(4.0)
        self.last = self.cache["x"] = self.layer(x) + torch.rand(4) + self.table
        self.seen.append(self.last)
        return self.last


def state(model):
    return {name: (id(m), dict(vars(m)), [list(v) for v in vars(m).values() if isinstance(v, (dict, list))])
            for name, m in model.named_modules()}  # fmt: skip


def test_nothing_that_a_forward_writes_reaches_the_model_or_its_inputs_or_the_random_state():
    model, x = Busy().train(), torch.zeros(2, 4)
    before, random = state(model), torch.random.get_rng_state()
    with quiet(model) as still:
        assert not still.training
        assert still.config.use_cache is False
        assert not torch.is_grad_enabled()
        still(x)
        still(x)
        assert int(still.count) == 2
    assert state(model) == before
    assert int(model.count) == 0
    assert not bool(x.any())
    assert torch.equal(torch.random.get_rng_state(), random)
    assert model.training


def test_the_same_after_a_failure():
    model = Busy()
    before, random = state(model), torch.random.get_rng_state()

    def fails():
        with quiet(model) as still:
            still(torch.zeros(2, 4))
            raise RuntimeError("boom")

    with pytest.raises(RuntimeError, match="boom"):
        fails()
    assert state(model) == before
    assert torch.equal(torch.random.get_rng_state(), random)
    assert torch.is_grad_enabled()


def test_a_twin_shares_the_memory_of_the_parameters_and_nothing_else():
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
    model[0].weight.requires_grad_(False)
    model[0].weight.mark = "kept"
    other = twin(model)
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        assert p is not q
        assert p.data_ptr() == q.data_ptr()
        assert p.requires_grad == q.requires_grad
    assert other[0].weight.mark == "kept"
    other[0].weight.data = torch.zeros(3, 3)
    assert bool(model[0].weight.any())
    for p, q in zip(model.buffers(), other.buffers(), strict=True):
        assert p.data_ptr() != q.data_ptr()


class Own(nn.Module):
    """Says itself what of it is copied, and how it is put together again."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.made = nn.Linear(3, 3), "here"

    def __getstate__(self):
        return {k: v for k, v in vars(self).items() if k != "made"}

    def __setstate__(self, state):
        super().__setstate__(state)
        self.made = f"again, with {type(self.layer).__name__}"


class Counted(nn.Linear):
    def __deepcopy__(self, memo):
        new = memo[id(self)] = type(self)(self.in_features, self.out_features)
        new.times = getattr(self, "times", 0) + 1
        return new


def test_a_copy_is_what_deepcopy_makes():
    """With tables that modules share, empty ones too, and classes that say themselves how they are copied."""
    model = nn.Sequential(Own(), nn.Identity(), Counted(3, 3), nn.LSTM(3, 3), nn.ModuleDict({"a": nn.Linear(2, 2)}))
    model.table = model[0].table = {"empty": {}, 3: [model[1]]}
    model.nothing = model[1].nothing = {}
    model[4]["a"].above = [model]
    for copied in (duplicate(model, {}), copy.deepcopy(model)):
        assert copied[0].made == "again, with Linear"
        assert copied[2].times == 1
        assert copied.table is copied[0].table
        assert copied.table is not model.table
        assert copied.table[3][0] is copied[1]
        assert copied.nothing is copied[1].nothing
        assert copied.nothing is not model.nothing
        assert copied[4]["a"].above[0] is copied
        assert [list(vars(m)) for m in copied.modules()] == [list(vars(m)) for m in copy.deepcopy(model).modules()]
        assert copied[3]._flat_weights[0] is copied[3].weight_ih_l0
        assert copied[3](torch.ones(1, 2, 3))[0].equal(model[3](torch.ones(1, 2, 3))[0])


def test_tied_weights_stay_tied():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model[1].weight = model[0].weight
    other = twin(model)
    assert other[1].weight is other[0].weight


HELD: dict[str, nn.Module] = {}


def keep(_module, _given, made):
    HELD["model"].kept["y"] = HELD["model"].last = made


def test_what_a_hook_does_by_a_global_name_is_undone():
    model = HELD["model"] = nn.Linear(2, 2)
    model.kept = kept = {}
    model.register_forward_hook(keep)
    before = state(model)
    with quiet(model) as still:
        still(torch.zeros(1, 2))
        assert kept
    assert state(model) == before
    assert kept == {}


def test_a_hook_that_closes_over_what_the_model_holds_works_on_the_copy():
    model, kept = nn.Linear(2, 2), {}
    model.kept = kept
    model.register_forward_hook(lambda _m, _x, y: kept.__setitem__("y", y))
    with quiet(model) as still:
        still(torch.zeros(1, 2))
        assert "y" in still.kept
        assert kept == {}


def test_activations_with_a_history_can_be_copied():
    model = nn.Linear(2, 2)
    model.kept = {"list": [model(torch.ones(1, 2))]}
    copied = twin(model).kept["list"][0]
    assert torch.equal(copied, model.kept["list"][0])
    assert not copied.requires_grad
    assert model.kept["list"][0].requires_grad


class Wrapped(nn.Module):
    """Functions that close over the module, in several ways."""

    def __init__(self, way):
        super().__init__()
        self.layer = nn.Linear(2, 2)
        layer = self.layer
        if way == "lambda":
            self.run = lambda x: self.layer(x)
        elif way == "inner":
            self.run = lambda x: layer(x)
        elif way == "default":
            self.run = lambda x, m=layer: m(x)
        elif way == "nested":
            first = lambda x: layer(x)  # noqa: E731
            self.run = lambda x: first(x)
        elif way == "partial":
            self.run = functools.partial(nn.Module.__call__, layer)
        elif way == "method":
            self.run = self.inside
        elif way == "in a dict":
            self.runs = {"run": lambda x: layer(x)}

    def inside(self, x):
        return self.layer(x)

    def forward(self, x):
        return self.runs["run"](x) if hasattr(self, "runs") else self.run(x)


@pytest.mark.parametrize("way", ["lambda", "inner", "default", "nested", "partial", "method", "in a dict"])
def test_functions_that_close_over_the_model_work_on_the_copy(way):
    model, x = Wrapped(way), torch.ones(1, 2)
    wanted = model(x)
    other = duplicate(model, {})
    with torch.no_grad():
        other.layer.weight.zero_()
        other.layer.bias.zero_()
    assert not bool(other(x).any())
    assert torch.equal(model(x), wanted)


def test_a_function_that_calls_itself_is_copied_too():
    model = nn.Linear(1, 1)

    def down(n):
        return model.bias.new_zeros(()) if n == 0 else down(n - 1) + model.bias.sum()

    model.down = down
    other = duplicate(model, {})
    with torch.no_grad():
        other.bias.fill_(2.0)
    assert float(other.down(3).detach()) == 6.0


def test_a_lock_is_shared():
    model = nn.Linear(2, 2)
    model.lock, model.module = threading.Lock(), torch
    other = duplicate(model, {})
    assert other.lock is model.lock
    assert other.module is torch


class Stubborn(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(2, 2)

    def __deepcopy__(self, memo):
        raise RuntimeError("not me")


def test_a_module_that_refuses_is_named():
    with pytest.raises(ModelError, match="Stubborn cannot be copied: RuntimeError: not me"):
        twin(Stubborn())


def test_weights_of_inference_mode_become_ordinary_ones():
    with torch.inference_mode():
        model = nn.Linear(2, 2)
    with quiet(model) as still, torch.enable_grad():
        still(torch.ones(1, 2)).sum().backward()
        assert still.weight.grad is not None


def test_hooks_run_in_a_twin():
    model, calls = nn.Linear(2, 2), []
    model.register_forward_pre_hook(lambda _m, x: calls.append(len(x[0])))
    with quiet(model) as still:
        still(torch.zeros(3, 2))
    assert calls == [3]


@dataclass
class Scores:
    logits: Tensor
    name: str = "scores"


class Holder:
    def __init__(self, scores):
        self.scores, self.extra = scores, {"n": 3}


class Returns(nn.Module):
    def __init__(self, make):
        super().__init__()
        self.a, self.b, self.make = nn.Linear(4, 8), nn.Linear(8, 3), make

    def forward(self, x):
        return self.make(self.b(torch.relu(self.a(x))))


@pytest.mark.parametrize(
    ("make", "wanted"),
    [
        (lambda y: Scores(y), {"logits": Tensor, "name": str}),
        (lambda y: [Scores(y), 1], list),
        (lambda y: Holder([Scores(y)]), {"scores": list, "extra": dict}),
        (lambda y: {"a": Scores(y)}, dict),
        (lambda y: y, Tensor),
    ],
)
def test_objects_that_hold_tensors_can_be_returned(make, wanted):
    model, x = Returns(make), torch.randn(1, 4)
    with quiet(model) as still:
        got = still(x)
    if isinstance(wanted, dict):
        assert {key: isinstance(got[key], kind) for key, kind in wanted.items()} == dict.fromkeys(wanted, True)
    else:
        assert isinstance(got, wanted)
    result = prune(model, x, Budget(keep=0.5), "magnitude", queries=None)
    assert result.model.a.out_features == 4
    assert type(result.model(x)) is type(model(x))
