"""Model folding against the projection C = U(UᵀU)⁻¹Uᵀ and the variance repair, both written out."""

from __future__ import annotations

import dataclasses
import itertools
import math

import pytest
import torch
from torch import nn

from coreprune import Budget, InputError, apply_plan, prune
from coreprune.pruning.selectors.folding import representatives, rows
from coreprune.selectors import Folding
from graph.zoo import ZOO, randomise
from layers_by_hand import cut, layer, layers_of, normal, seeded


def clusters(plan) -> dict[int, list[int]]:
    """Kept channel -> the channels of its cluster."""
    found: dict[int, list[int]] = {k: [] for k in plan.kept}
    for i, t in enumerate(plan.targets):
        found[t].append(i)
    return found


def indicator(plan) -> torch.Tensor:
    """U (n, k)."""
    u = torch.zeros(plan.size, len(plan.kept), dtype=torch.float64)
    for i, t in enumerate(plan.targets):
        u[i, plan.kept.index(t)] = 1
    return u


@pytest.mark.parametrize("act", [nn.Identity, nn.ReLU, nn.GELU])
def test_a_folded_layer_is_the_projection(act, gen):
    """F'(x) = V U φ(M x) + c with M = (UᵀU)⁻¹UᵀW; for the identity V C W x + c."""
    model = randomise(nn.Sequential(nn.Linear(4, 20), act(), nn.Linear(20, 3)))
    result = cut(model, torch.zeros(1, 4).double(), Budget(keep=0.3), Folding())
    u = indicator(result.plan.groups["0"])
    assert u.shape == (20, 6)
    x = torch.randn(9, 5, generator=gen, dtype=torch.float64)
    x[:, 4] = 1
    w = torch.cat([model[0].weight, model[0].bias[:, None]], dim=1)
    means = torch.linalg.inv(u.T @ u) @ u.T @ w
    wanted = act()(x @ means.T) @ (model[2].weight @ u).T + model[2].bias
    assert torch.allclose(result.model(x[:, :4]), wanted, atol=1e-10)
    if act is nn.Identity:
        c = u @ torch.linalg.inv(u.T @ u) @ u.T
        assert torch.allclose(wanted, x @ (model[2].weight @ c @ w).T + model[2].bias, atol=1e-10)


def repaired(conv_rows, bias, gamma, beta, mu, sigma, plan, x, repair: bool):
    """What the folded layer and norm should let out, channel by channel, from the paper's formulas."""
    columns = []
    for members in clusters(plan).values():
        n = len(members)
        gain = 1.0
        if repair and n > 1:
            pairs = list(itertools.permutations(members, 2))
            cosines = [
                float(conv_rows[i] @ conv_rows[j] / (conv_rows[i].norm() * conv_rows[j].norm())) for i, j in pairs
            ]
            gain = n / math.sqrt(n + (n * n - n) * sum(cosines) / len(pairs))
        out = [x @ conv_rows[i] + bias[i] for i in members]
        if repair:
            normalised = sum((out[a] - mu[i]) / sigma[i] for a, i in enumerate(members)) / n
        else:
            variance = sum(sigma[i] ** 2 for i in members) / n
            normalised = (sum(out) / n - sum(mu[i] for i in members) / n) / variance.sqrt()
        scale, shift = sum(gamma[i] for i in members) / n, sum(beta[i] for i in members) / n
        columns.append(gain * scale * normalised + shift)
    return torch.stack(columns, dim=1)


@pytest.mark.parametrize("repair", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_behind_a_norm_it_is_the_papers_mean_and_repair(repair, bias, gen):
    model = randomise(nn.Sequential(nn.Linear(4, 20, bias=bias), nn.BatchNorm1d(20), nn.ReLU(), nn.Linear(20, 3)))
    result = cut(model, torch.zeros(1, 4).double(), Budget(keep=0.3), Folding(repair=repair))
    plan, norm = result.plan.groups["0"], model[1]
    x = torch.randn(9, 4, generator=gen, dtype=torch.float64)
    sigma = (norm.running_var + norm.eps).sqrt()
    own = model[0].bias if bias else torch.zeros(20).double()
    parts = [t.detach() for t in (model[0].weight, own, norm.weight, norm.bias, norm.running_mean, sigma)]
    out = repaired(*parts, plan, x, repair)
    wanted = torch.relu(out) @ (model[3].weight @ indicator(plan)).T + model[3].bias
    assert torch.allclose(result.model(x), wanted, atol=1e-9)
    assert max(len(m) for m in clusters(plan).values()) > 2


def test_the_repair_restores_unit_variance_on_white_inputs():
    """Inputs with identity covariance: the variance of a normalised channel is ‖w‖²/σ² before, and 1 after."""
    model = randomise(
        nn.Sequential(nn.Linear(6, 20, bias=False), nn.BatchNorm1d(20, eps=1e-12), nn.ReLU(), nn.Linear(20, 3))
    )
    with torch.no_grad():
        model[1].running_var.copy_(model[0].weight.square().sum(dim=1))
        model[1].weight.fill_(1.0)
    for repair in (True, False):
        small = cut(model, torch.zeros(1, 6).double(), Budget(keep=0.3), Folding(repair=repair)).model
        slope = small[1].weight / (small[1].running_var + 1e-12).sqrt()
        variance = (small[0].weight * slope[:, None]).square().sum(dim=1)
        if repair:
            assert torch.allclose(variance, torch.ones(6).double(), atol=1e-9)
        else:
            assert float(variance.min()) < 0.9


def test_a_norm_without_scale_is_repaired_too():
    model = randomise(nn.Sequential(nn.Linear(6, 20), nn.BatchNorm1d(20, affine=False), nn.ReLU(), nn.Linear(20, 3)))
    with torch.no_grad():
        model[1].running_var.copy_(model[0].weight.square().sum(dim=1))
    small = cut(model, torch.zeros(1, 6).double(), Budget(keep=0.3), Folding()).model
    variance = small[0].weight.square().sum(dim=1) / (small[1].running_var + 1e-5)
    assert torch.allclose(variance, torch.ones(6).double(), atol=1e-3)


def test_norms_with_a_variance_of_zero_stay_finite():
    model = randomise(nn.Sequential(nn.Linear(6, 20), nn.BatchNorm1d(20), nn.ReLU(), nn.Linear(20, 3)))
    with torch.no_grad():
        model[1].running_var[:7] = 0
        model[0].weight[3:5] = 0
    small = cut(model, torch.zeros(1, 6).double(), Budget(keep=0.3), Folding()).model
    assert all(bool(torch.isfinite(t).all()) for t in small.state_dict().values())


def test_directions_that_cancel_have_a_bounded_gain():
    model = randomise(nn.Sequential(nn.Linear(3, 2, bias=False), nn.BatchNorm1d(2), nn.ReLU(), nn.Linear(2, 2)))
    with torch.no_grad():
        model[0].weight[1] = -model[0].weight[0]
    small = cut(model, torch.zeros(1, 3).double(), Budget(keep=0.5), Folding()).model
    assert float(small[1].weight.abs().max()) <= 1000 * math.sqrt(2) * float(model[1].weight.abs().max())


def twins(model, group):
    """Make the second half of a group's channels copies of the first, in all that makes them."""
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    with torch.no_grad():
        for piece in (*group.producers, *group.others):
            part = tensors[piece.param].movedim(piece.dim, 0)
            where = [piece.index.tolist().index(c) for c in range(group.size)]
            half = group.size // 2
            part[where[half : 2 * half]] = part[where[:half]].clone()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mlp", "resnet-bottleneck", "mobilenet-v1", "inception", "bert"])
def test_twins_are_folded_without_a_trace(name):
    """Dense, residual with several norms, depthwise, concatenated, and the hidden units of a transformer."""
    entry = ZOO[name]
    model = randomise(entry.build())
    for group, made in layers_of(model, entry.inputs(1)).values():
        if not made.no_mean and group.size % 2 == 0:
            twins(model, group)
    example, inputs = entry.inputs(1), entry.inputs(2)
    example = example["x"] if set(example) == {"x"} else example
    result = cut(model, example, Budget(keep=0.5), Folding(outgoing=False))
    plans = {n: p for n, p in result.plan.groups.items() if p.targets is not None and p.size % 2 == 0}
    assert plans
    for plan in plans.values():
        half = plan.size // 2
        assert all(plan.targets[i] == plan.targets[i + half] for i in range(half))
    small = apply_plan(model, dataclasses.replace(result.plan, groups=plans), example)
    with torch.no_grad():
        wanted, found = (m(inputs["x"]) if set(inputs) == {"x"} else m(**inputs)[0] for m in (model, small))
    assert torch.allclose(found, wanted, atol=1e-8)


def test_the_rows_hold_what_the_paper_clusters():
    model = randomise(nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 2)))
    _, made = layers_of(model, {"x": torch.zeros(2, 3).double()})["0"]
    norm = model[1]
    sigma = (norm.running_var + norm.eps).sqrt()[:, None]
    wanted = torch.cat(
        [
            model[0].weight / sigma,
            (model[0].bias - norm.running_mean)[:, None] / sigma,
            norm.weight[:, None],
            norm.bias[:, None],
            model[3].weight.T,
        ],
        dim=1,
    )
    assert torch.allclose(rows(made), wanted, atol=1e-12)
    assert torch.allclose(rows(made, outgoing=False), wanted[:, :-2], atol=1e-12)


def test_depthwise_filters_count_in_the_clustering():
    entry = ZOO["mobilenet-v1"]
    _, made = next(
        (g, made)
        for g, made in layers_of(randomise(entry.build()), entry.inputs(1)).values()
        if made.others is not None
    )
    assert rows(made, outgoing=False).shape[1] == made.incoming.shape[1] + 2 + made.others.shape[1]
    assert made.others.shape[1] >= 9


def test_the_representative_is_the_member_nearest_to_the_mean():
    points = torch.tensor([[0.0], [1.0], [5.0], [10.0], [12.0]], dtype=torch.float64)
    assert representatives(points, torch.tensor([0, 0, 0, 1, 1])).tolist() == [1, 1, 1, 3, 3]


def test_a_width_has_the_same_clusters_whatever_was_asked_before():
    ranking = Folding()(layer(20), seeded(4))
    first = ranking.coreset(5).merge.target
    ranking.coreset(9)
    assert torch.equal(ranking.coreset(5).merge.target, first)
    assert torch.equal(Folding()(layer(20), seeded(4)).coreset(5).merge.target, first)


@pytest.mark.parametrize("k", [1, 2, 11, 12])
def test_exactly_k_channels_stay_also_among_copies(k):
    made = layer(12)
    made.incoming[:] = made.incoming[0]
    made.outgoing[:] = made.outgoing[:, :1]
    coreset = Folding()(made, seeded()).coreset(k)
    assert coreset.indices.numel() == k
    assert coreset.indices.tolist() == sorted(set(coreset.indices.tolist()))


def test_with_queries_the_error_of_an_order_is_not_claimed_for_clusters():
    """T10 is about the first k of an order. Merging keeps those, folding does not."""
    model = randomise(nn.Sequential(nn.Linear(4, 30), nn.ReLU(), nn.Linear(30, 2)))
    x = normal(40, 4)
    for method, claimed in (("merging", True), ("folding", False)):
        result = prune(model, x[:1], Budget(keep=0.5), method, queries=x)
        assert ("T10" in {c.theorem for c in result.report.groups[0].certificates}) == claimed
        assert "T8" in {c.theorem for c in result.report.groups[0].certificates}


def test_a_single_channel():
    assert Folding()(layer(1), seeded()).coreset(1).merge is None


@pytest.mark.parametrize("restarts", [0, -1, 1.5, True])
def test_options_that_mean_nothing_are_refused(unchecked, restarts):
    with pytest.raises(InputError, match="restarts"):
        Folding(restarts=restarts)
