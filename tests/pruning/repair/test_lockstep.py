"""The repair: every refit against lstsq on what hooks see, and the walk against the model that it makes."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import nn

from coreprune import Budget, prune
from coreprune._progress import silent
from coreprune.pruning import stages
from coreprune.pruning.calibration.calibration import Asked, gather
from coreprune.pruning.repair.options import Repair
from coreprune.pruning.tracing import trace
from features import normal, patches, rows_of, seen
from graph.zoo import ZOO, randomise
from small_networks import bits
from zoo_examples import call, example


class Residual(nn.Module):
    """Two norms, a layer scale, a shortcut that is computed last, in-place sums."""

    def __init__(self):
        super().__init__()
        self.stem, self.c1 = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1, stride=2, bias=False)
        self.b1, self.c2, self.b2 = nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.down, self.bd = nn.Conv2d(8, 8, 1, stride=2, bias=False), nn.BatchNorm2d(8)
        self.act, self.head = nn.ReLU(inplace=True), nn.Linear(8, 3)

    def forward(self, x):
        x = self.act(self.stem(x))
        out = self.b2(self.c2(self.act(self.b1(self.c1(x)))))
        out += self.bd(self.down(x))
        return self.head(self.act(out).mean((2, 3)))


def mlp() -> nn.Module:
    return randomise(nn.Sequential(nn.Linear(6, 14), nn.ReLU(), nn.Linear(14, 10), nn.Tanh(), nn.Linear(10, 3)))


def optimum(x, y, start, ridge, intercept=True):
    """Ridge least squares by numpy: rows (n, f), targets (n, o), weights to start from (o, f)."""
    mx, my = (x.mean(0), y.mean(0)) if intercept else (0 * x.mean(0), 0 * y.mean(0))
    xc, f = (x - mx).numpy(), x.shape[1]
    lam = ridge * (xc**2).sum(0).mean()
    left = np.r_[xc, lam**0.5 * np.eye(f)]
    right = np.r_[(y - my).numpy(), lam**0.5 * start.numpy().T]
    weight = torch.from_numpy(np.linalg.lstsq(left, right, rcond=None)[0].T)
    return weight, my - weight @ mx


def cut(model, x, keep=0.5, method="magnitude", **more):
    options = Repair(**{"one_sided": 0, "rows": 1 << 20, "descent": False, **more})
    plain = prune(model, x[:1], Budget(keep=keep), method, queries=x, repair=False)
    done = prune(model, x[:1], Budget(keep=keep), method, queries=x, repair=options)
    assert plain.plan == done.plan
    return plain, done


def used(model, x):
    """The queries that selection and repair use; the others are held back."""
    return gather(trace(model, x[:1], silent), Asked(x[:1], x), 0, silent).queries.args[0]


@pytest.mark.parametrize("producers", [False, True])
@pytest.mark.parametrize("ridge", [1e-3, 1e-6])
def test_every_layer_of_an_mlp_is_the_optimum_for_what_it_gets(producers, ridge):
    model, x = mlp(), normal(96, 6)
    plain, done = cut(model, x, ridge=ridge, producers=producers)
    x = used(model, x)
    full, small = seen(model, x), seen(done.model, x)
    rows = {str(i): list(p.kept) for i, p in ((0, done.plan.groups["0"]), (2, done.plan.groups["2"]))}
    for name in ("2", "4"):
        layer, before = done.model.get_submodule(name), plain.model.get_submodule(name)
        target = full[name][1][:, rows[name]] if name in rows else full[name][1]
        weight, bias = optimum(small[name][0], target, before.weight.detach(), ridge)
        assert torch.allclose(layer.weight, weight, atol=1e-9)
        assert torch.allclose(layer.bias, bias, atol=1e-9)
    assert torch.equal(done.model[0].weight, plain.model[0].weight)
    assert [fit.weight for fit in done.report.refits] == ["2.weight", "4.weight"]


def test_residual_convolutions_match_the_sum_and_the_norm_takes_the_intercept():
    model, x = randomise(Residual()), normal(40, 3, 8, 8)
    plain, done = cut(model, x, ridge=1e-4)
    x = used(model, x)
    full, small = seen(model, x), seen(done.model, x)
    kept = {name: list(p.kept) for name, p in done.plan.groups.items()}
    inner, outer = kept["c1"], next(k for name, k in kept.items() if name in ("c2", "down"))
    joined = {fit.weight for fit in done.report.refits if fit.joined}
    assert joined == {"c2.weight"}
    for name, norm, stay in (("c1", "b1", inner), ("down", "bd", outer), ("c2", "b2", outer)):
        conv, bn = done.model.get_submodule(name), done.model.get_submodule(norm)
        first, old = plain.model.get_submodule(name), plain.model.get_submodule(norm)
        scale = bn.weight.detach() / (bn.running_var + bn.eps).sqrt()
        y = rows_of(full[name][1][:, stay])
        if name == "c2":  # the original's sum, less what the pruned shortcut delivers
            join = rows_of((full["b2"][1] + full["bd"][1])[:, stay]) - rows_of(small["bd"][1])
            y = (join - bn.bias.detach() + old.running_mean * scale) / scale
        weight, bias = optimum(patches(conv, small[name][0]), y, first.weight.detach().flatten(1), 1e-4)
        assert torch.allclose(conv.weight.flatten(1), weight, atol=1e-8), name
        assert torch.allclose(bn.running_mean, old.running_mean - bias, atol=1e-8), name
        assert torch.equal(bn.running_var, old.running_var)
        # What leaves the norm has the mean that it is meant to have.
        wanted = rows_of((full["b2"][1] + full["bd"][1])[:, stay]) if name == "c2" else rows_of(full[norm][1][:, stay])
        found = rows_of(small[norm][1]) + (rows_of(small["bd"][1]) if name == "c2" else 0)
        assert torch.allclose(found.mean(0), wanted.mean(0), atol=1e-9)


def test_without_a_bias_and_a_norm_there_is_no_intercept():
    model = randomise(nn.Sequential(nn.Linear(5, 12), nn.ReLU(), nn.Linear(12, 3, bias=False)))
    x = normal(60, 5)
    plain, done = cut(model, x, ridge=1e-3)
    x = used(model, x)
    weight, _ = optimum(
        seen(done.model, x)["2"][0], seen(model, x)["2"][1], plain.model[2].weight.detach(), 1e-3, intercept=False
    )
    assert torch.allclose(done.model[2].weight, weight, atol=1e-9)


def spied(monkeypatch) -> dict:
    """The walk's own tensors, in the original's shapes."""
    held, real = {}, stages.repaired

    def spy(*args):
        held["after"], fits = real(*args)
        return held["after"], fits

    monkeypatch.setattr(stages, "repaired", spy)
    return held


QUICK = ("mlp", "group-norm", "conv1d-glu", "conv3d", "einsum-attention")
SLOW = (
    *("densenet", "resnext", "se-resnet", "shufflenet-v2", "unet", "lstm", "mlp-mixer", "vgg"),
    *("gpt2", "llama-gqa", "swin", "bert", "regnet", "mobilenet-v2", "mixtral"),
)


# A grouped and a depthwise convolution, concatenations, heads and experts; the others are in `make long`.
ALWAYS = ("densenet", "resnext", "se-resnet", "unet", "gpt2", "mixtral", "shufflenet-v2")


@pytest.mark.parametrize(
    "name",
    [
        *QUICK,
        *(
            pytest.param(n, marks=[pytest.mark.slow, *([] if n in ALWAYS else [pytest.mark.long])])
            for n in SLOW
            if n in ZOO
        ),
    ],
)
def test_the_repair_helps_and_the_walk_computes_what_the_small_model_does(name, monkeypatch):
    """Depthwise and grouped convolutions, concatenations, flattenings, heads, addmm: all of them in these networks."""
    held, model = spied(monkeypatch), randomise(ZOO[name].build())
    inputs = ZOO[name].inputs(24)
    full = call(model, inputs)
    plain, done = (
        prune(model, example(ZOO[name].inputs(1)), Budget(keep=0.5), "magnitude", queries=example(inputs), repair=r)
        for r in (False, Repair(descent=False))
    )
    found = call(done.model, inputs)
    wanted = copy.deepcopy(model)
    missing, _ = wanted.load_state_dict(held["after"], strict=False)
    assert all(torch.equal(wanted.state_dict()[n], model.state_dict()[n]) or n in held["after"] for n in missing)
    assert torch.allclose(call(wanted, inputs), found, atol=1e-9)
    assert (found - full).square().mean() <= 0.9 * (call(plain.model, inputs) - full).square().mean()


@pytest.mark.parametrize("name", ["mlp", "shared-and-tied", "conv1d-glu"])
def test_nothing_pruned_nothing_changed(name):
    model, entry = randomise(ZOO[name].build()), ZOO[name]
    result = prune(model, example(entry.inputs(1)), Budget(keep=1.0), queries=example(entry.inputs(16)))
    assert bits(result.model) == bits(model)
    assert result.report.refits == ()


def test_channels_that_others_can_stand_for_cost_nothing():
    """Identity behind the first layer: its channels 6 … 13 are combinations of the others, so half of them suffice."""
    with torch.random.fork_rng([]):
        torch.manual_seed(0)  # with every tenth of all seeds a channel of the second layer is worth less than one here
        layers = nn.Sequential(nn.Linear(6, 14), nn.Dropout(), nn.Linear(14, 10), nn.ReLU(), nn.Linear(10, 3))
    model = layers.double().eval()
    x = normal(80, 6)
    result = prune(model, x[:1], Budget(macs=0.7), queries=x, repair=Repair(ridge=1e-14), method="functional")
    kept = {n: len(p.kept) for n, p in result.plan.groups.items()}
    assert kept["2"] == 10
    assert kept["0"] < 14
    for seed in (0, 5):
        assert torch.allclose(result.model(normal(50, 6, seed=seed)), model(normal(50, 6, seed=seed)), atol=1e-6)


def one_sided(model, result, x, ridge):
    """‖T̂ − relu-equal target‖² + λ‖W − W₀‖² of the second layer, from hooks."""
    full, small = seen(model, x)["2"][1], seen(result.model, x)["2"]
    full = full[:, list(result.plan.groups["2"].kept)]
    lost = torch.where(full > 0, small[1] - full, small[1].clamp(min=0))
    return lost.square().mean(0).sum(), small[0]


@torch.no_grad()
@pytest.mark.parametrize("rounds", [1, 3, 8])
def test_one_sided_rounds_lower_the_one_sided_error(rounds):
    model = randomise(nn.Sequential(nn.Linear(6, 14), nn.ReLU(), nn.Linear(14, 10), nn.ReLU(), nn.Linear(10, 3)))
    x, ridge, values = normal(120, 6), 1e-3, []
    for n in (0, rounds, 2 * rounds):
        plain, done = cut(model, x, ridge=ridge, one_sided=n)
        error, inputs = one_sided(model, done, x, ridge)
        lam = ridge * inputs.var(0, correction=0).mean()
        values.append(float(error + lam * (done.model[2].weight - plain.model[2].weight).square().sum()))
    assert values[1] < values[0] * (1 - 1e-3)
    assert values[2] <= values[1] * (1 + 1e-9)


def test_layers_that_share_a_norm_do_not_move_it():
    """A shared running mean that one layer's intercept went into would shift the other layer's outputs."""

    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.norm = nn.Conv2d(3, 8, 1), nn.BatchNorm2d(4)
            self.a, self.b = nn.Conv2d(8, 4, 1, bias=False), nn.Conv2d(3, 4, 1, bias=False)

        def forward(self, x):
            return self.norm(self.a(torch.relu(self.stem(x)))), self.norm(self.b(x))

    model, x = randomise(Shared()), normal(16, 3, 4, 4)
    result = prune(model, x[:1], Budget(keep=0.5), queries=x)
    assert len(result.plan.groups["stem"].kept) == 4
    assert torch.equal(result.model.norm.running_mean, model.norm.running_mean)
    assert torch.equal(result.model(x)[1], model(x)[1])


def test_an_overwritten_shortcut_is_repaired_like_one_that_is_not():
    class Overwrites(nn.Module):
        def __init__(self, inplace):
            super().__init__()
            self.a, self.b, self.c, self.d = (nn.Linear(*s) for s in ((6, 12), (12, 12), (12, 4), (12, 4)))
            self.inplace = inplace

        def forward(self, x):
            h = torch.relu(self.a(x))
            y, z = self.b(h), self.c(h)
            if self.inplace:
                h += y
            else:
                h = h + y
            return self.d(h) + z

    models = [randomise(Overwrites(inplace)) for inplace in (True, False)]
    x = normal(64, 6)
    one, two = (prune(m, x[:1], Budget(keep=0.5), queries=x).model(x) for m in models)
    assert torch.allclose(one, two, atol=1e-12)
