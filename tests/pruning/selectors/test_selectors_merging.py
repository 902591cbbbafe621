"""Neuron merging against the paper's decomposition, written out channel by channel."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import nn

from coreprune import Budget, InputError, apply_plan
from coreprune.pruning.selectors.merging import decompose
from coreprune.selectors import L1, Fpgm, Merging
from graph.zoo import ZOO, randomise
from layers_by_hand import cut, layer, layers_of, normal, seeded


def cosine(a, b) -> float:
    return float(a @ b / (a.norm() * b.norm()))


def by_definition(rows, kept, threshold):
    """Z of W ≈ Z W_S without a norm, (n, k)."""
    z = torch.zeros(len(rows), len(kept), dtype=torch.float64)
    for i in range(len(rows)):
        if i in kept:
            z[i, kept.index(i)] = 1
            continue
        similar = [cosine(rows[i], rows[k]) for k in kept]
        best = max(range(len(kept)), key=lambda k: similar[k])
        if similar[best] >= threshold:
            z[i, best] = rows[i].norm() / rows[kept[best]].norm()
    return z


def by_definition_behind_a_norm(w, gamma, beta, mu, sigma, kept, threshold, balance):
    """The same with the scale S and the bias distance |B|/S of a batch norm."""
    z = torch.zeros(len(w), len(kept), dtype=torch.float64)
    for i in range(len(w)):
        if i in kept:
            z[i, kept.index(i)] = 1
            continue
        scales, distances = [], []
        for k in kept:
            scale = float(w[i].norm() / w[k].norm() * (gamma[i] / gamma[k]) * (sigma[k] / sigma[i]))
            loose = beta[i] - gamma[i] * mu[i] / sigma[i] - scale * (beta[k] - gamma[k] * mu[k] / sigma[k])
            scales.append(scale)
            distances.append(abs(float(loose)) / scale)
        low, high = min(distances), max(distances)
        scores = [
            balance * (1 - cosine(w[i], w[k])) + (1 - balance) * (d - low) / (high - low)
            for k, d in zip(kept, distances, strict=True)
        ]
        best = scores.index(min(scores))
        if cosine(w[i], w[kept[best]]) >= threshold:
            z[i, best] = scales[best]
    return z


def matrix(target, scale, kept):
    """Z from what `decompose` found."""
    z = torch.zeros(len(target), len(kept), dtype=torch.float64)
    for i, (t, s) in enumerate(zip(target.tolist(), scale.tolist(), strict=True)):
        if t >= 0:
            z[i, kept.index(t)] = s
    return z


@pytest.mark.parametrize("threshold", [0.0, 0.45, 0.9, None])
@pytest.mark.parametrize("seed", range(4))
def test_without_a_norm_it_is_the_papers_decomposition(threshold, seed):
    made, kept = layer(n=20, d=3, seed=seed), [1, 4, 5, 11, 17]
    target, scale = decompose(made, torch.tensor(kept), threshold)
    wanted = by_definition(made.incoming, kept, 0.45 if threshold is None else threshold)
    assert torch.allclose(matrix(target, scale, kept), wanted, atol=1e-12)
    assert 5 <= int((wanted > 0).sum()) <= 20


def behind_norm(model, x):
    _, made = layers_of(model, {"x": x})["0"]
    norm = model[1]
    numbers = (norm.weight, norm.bias, norm.running_mean, (norm.running_var + norm.eps).sqrt())
    return made, [t.detach() for t in numbers]


@pytest.mark.parametrize("threshold", [0.1, 0.5, None])
@pytest.mark.parametrize("balance", [0.85, 0.3, 1.0])
def test_behind_a_norm_it_is_the_papers_decomposition(threshold, balance):
    model = randomise(
        nn.Sequential(nn.Conv2d(2, 20, 3, bias=False), nn.BatchNorm2d(20), nn.ReLU(), nn.Conv2d(20, 2, 1))
    )
    with torch.no_grad():
        model[1].weight.abs_()
    made, numbers = behind_norm(model, torch.zeros(1, 2, 5, 5).double())
    kept = [1, 4, 5, 11, 17]
    target, scale = decompose(made, torch.tensor(kept), threshold, balance)
    w = model[0].weight.detach().flatten(1)
    wanted = by_definition_behind_a_norm(w, *numbers, kept, 0.1 if threshold is None else threshold, balance)
    assert torch.allclose(matrix(target, scale, kept), wanted, atol=1e-10)
    assert int((wanted > 0).sum()) > 5


def test_opposite_signs_of_gamma_are_not_merged():
    """S < 0: a ReLU of the one is no multiple of a ReLU of the other."""
    model = randomise(nn.Sequential(nn.Linear(3, 2, bias=False), nn.BatchNorm1d(2), nn.ReLU(), nn.Linear(2, 2)))
    with torch.no_grad():
        model[0].weight[1] = 2 * model[0].weight[0]
        model[1].weight.copy_(torch.tensor([1.0, -1.0]))
    made, _ = behind_norm(model, torch.zeros(2, 3).double())
    assert decompose(made, torch.tensor([0]))[0].tolist() == [0, -1]
    with torch.no_grad():
        model[1].weight.copy_(torch.tensor([-1.0, -1.0]))
    made, _ = behind_norm(model, torch.zeros(2, 3).double())
    assert decompose(made, torch.tensor([0]))[0].tolist() == [0, 0]


def test_the_pruned_network_is_the_composition_with_z(gen):
    """F'(x) = V Z φ(W_S x + b_S) + c, with Z from the paper's definition."""
    model = randomise(nn.Sequential(nn.Linear(4, 20), nn.ReLU(), nn.Linear(20, 3)))
    result = cut(model, torch.zeros(1, 4).double(), Budget(keep=0.3), Merging(by="l2"))
    rows = torch.cat([model[0].weight, model[0].bias[:, None]], dim=1).detach()
    kept = sorted(rows.norm(dim=1).topk(6).indices.tolist())
    assert list(result.plan.groups["0"].kept) == kept
    z = by_definition(rows, kept, 0.45)
    x = torch.randn(9, 5, generator=gen, dtype=torch.float64)
    x[:, 4] = 1
    wanted = torch.relu(x @ rows[kept].T) @ (model[2].weight @ z).T + model[2].bias
    assert torch.allclose(result.model(x[:, :4]), wanted, atol=1e-10)
    assert int((z > 0).sum()) > 6


def multiples(model, name: str, norm: str | None, factors) -> None:
    """Make the second half of a layer's channels multiples of the first, before the activation, norm included."""
    modules = dict(model.named_modules())
    conv, half = modules[name], len(modules[name].weight) // 2
    with torch.no_grad():
        shape = (-1, *[1] * (conv.weight.ndim - 1))
        conv.weight[half:] = conv.weight[:half] * factors.reshape(shape)
        if norm is None:
            conv.bias[half:] = conv.bias[:half] * factors
            return
        bn = modules[norm]
        bn.weight.abs_()
        sigma = (bn.running_var + bn.eps).sqrt()
        scale = factors * (bn.weight[half:] / bn.weight[:half]) * (sigma[:half] / sigma[half:])
        base = bn.bias[:half] - bn.weight[:half] * bn.running_mean[:half] / sigma[:half]
        bn.bias[half:] = bn.weight[half:] * bn.running_mean[half:] / sigma[half:] + scale * base


@pytest.mark.parametrize("by", ["l1", "l2", "gm"])
@pytest.mark.parametrize("norm", [False, True])
def test_multiples_of_kept_channels_are_lost_without_a_trace(by, norm):
    middle = [nn.BatchNorm2d(12)] if norm else []
    layers = [nn.Conv2d(3, 12, 3, bias=not norm), *middle, nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(108, 4)]
    model = randomise(nn.Sequential(*layers))
    multiples(model, "0", "1" if norm else None, torch.rand(6, generator=seeded()).double() * 0.02 + 0.001)
    x = normal(5, 3, 8, 8)
    result = cut(model, x[:1], Budget(keep=0.5), Merging(by=by))
    if by != "gm":  # the distance to the others does not put every original first
        assert list(result.plan.groups["0"].kept) == list(range(6))
        assert torch.allclose(result.model(x), model(x), atol=1e-9)
    assert not torch.allclose(cut(model, x[:1], Budget(keep=0.5), Fpgm()).model(x), model(x), atol=1e-3)


@pytest.mark.slow
def test_a_residual_stream_is_merged_as_one():
    """Every branch that meets in the stream has the same multiples, and so has the stream."""
    entry = ZOO["resnet-bottleneck"]
    model = randomise(entry.build())
    factors = torch.rand(8, generator=seeded()).double() * 0.02 + 0.001
    for conv, norm in (("1.body.2.0", "1.body.2.1"), ("1.short.0", "1.short.1"), ("2.body.2.0", "2.body.2.1")):
        multiples(model, conv, norm, factors)
        bn = dict(model.named_modules())[norm]
        with torch.no_grad():  # one factor for the whole stream: γ/σ of a pair agree
            bn.weight[8:], bn.running_var[8:] = bn.weight[:8], bn.running_var[:8]
        multiples(model, conv, norm, factors)
    x = entry.inputs(2)["x"]
    example = entry.inputs(1)["x"]
    plan = cut(model, example, Budget(keep=0.5), Merging()).plan.groups["1.body.2.0"]
    assert plan.targets == (*range(8), *range(8))
    assert plan.scales == pytest.approx((*[1.0] * 8, *factors.tolist()))
    whole = cut(model, example, Budget(keep=0.5), Merging()).plan
    alone = dataclasses.replace(whole, groups={n: g for n, g in whole.groups.items() if n == "1.body.2.0"})
    assert torch.allclose(apply_plan(model, alone, example)(x), model(x), atol=1e-9)


def test_nothing_is_merged_above_the_threshold_and_then_it_is_the_plain_ranking(gen):
    model = randomise(nn.Sequential(nn.Linear(4, 20), nn.ReLU(), nn.Linear(20, 3)))
    example, x = torch.zeros(1, 4).double(), torch.randn(5, 4, generator=gen, dtype=torch.float64)
    merged = cut(model, example, Budget(keep=0.3), Merging(threshold=1.0)).model(x)
    assert torch.equal(merged, cut(model, example, Budget(keep=0.3), L1(bias=True)).model(x))


def test_merging_helps_where_channels_are_similar(gen):
    model = randomise(nn.Sequential(nn.Linear(4, 40), nn.ReLU(), nn.Linear(40, 3)))
    with torch.no_grad():  # ten directions, each at four lengths, roughly
        rows = nn.functional.normalize(normal(10, 5, seed=8)).repeat(4, 1) + 0.05 * normal(40, 5, seed=9)
        rows *= torch.tensor([1.0, 0.7, 0.5, 0.4]).repeat_interleave(10)[:, None]
        model[0].weight.copy_(rows[:, :4])
        model[0].bias.copy_(rows[:, 4])
    example, x = torch.zeros(1, 4).double(), torch.randn(200, 4, generator=gen, dtype=torch.float64)

    def error(method):
        return (cut(model, example, Budget(keep=0.5), method).model(x) - model(x)).norm().item()

    assert error(Merging()) < 0.5 * error(L1(bias=True))


def test_channels_with_no_weights_neither_merge_nor_are_merged_into():
    made = layer(n=6)
    made.incoming[2] = 0
    target, scale = decompose(made, torch.tensor([2, 3]), 0.0)
    assert 2 not in [t for i, t in enumerate(target.tolist()) if i != 2]
    assert bool(torch.isfinite(scale).all())
    assert decompose(made, torch.tensor([0, 1]), 0.0)[0][2] == -1


def test_one_channel_and_all_channels():
    assert Merging()(layer(1), seeded()).coreset(1).merge is None
    coreset = Merging()(layer(6), seeded()).coreset(1)
    assert coreset.merge is not None
    assert coreset.indices.numel() == 1
    assert Merging()(layer(6), seeded()).coreset(6).merge is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"by": "l3"}, "known: l1, l2, gm"),
        ({"threshold": 1.5}, "cosine"),
        ({"threshold": float("nan")}, "cosine"),
        ({"balance": -0.1}, "balance"),
    ],
)
def test_options_that_mean_nothing_are_refused(unchecked, options, message):
    with pytest.raises(InputError, match=message):
        Merging(**options)
