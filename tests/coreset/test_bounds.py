"""T6 and T8 against adversarial inputs, and the certificates as values."""

from __future__ import annotations

import math
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from coreprune.coreset import Coreset, Merge, importance, merge_bound, merged_outgoing, sample, sampling_bound
from coreprune.errors import InputError
from oracles import worst_ratio


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def layer(n: int, d: int, outputs: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    g = seeded(seed)
    points = torch.randn(n, d, generator=g, dtype=torch.float64)
    return points, torch.randn(outputs, n, generator=g, dtype=torch.float64)


def error_of(points, outgoing, coreset, phi):
    """x (batch, d) → F'(x) − F(x) (batch, J)."""
    new = coreset.outgoing(outgoing)
    return lambda x: phi(x @ points[coreset.indices].T) @ new.T - phi(x @ points.T) @ outgoing.T


@pytest.mark.slow
@pytest.mark.parametrize("seeds", [50, pytest.param(200, marks=pytest.mark.long)])
@pytest.mark.parametrize("metric", ["euclidean", "lewis"])
@pytest.mark.parametrize("phi", [torch.relu, torch.nn.functional.leaky_relu])
def test_t6_holds_for_every_input_in_many_samples(metric, phi, seeds):
    """Far more often than 1−δ; the reached errors must also come within two decades, or the test shows nothing."""
    points, outgoing = layer(60, 4, 3, 0)
    importances = importance(points, outgoing, metric=metric)
    draws, delta, broken, closest = 30, 0.2, 0, 0.0
    bound = sampling_bound(points, outgoing, draws, delta, metric=metric).bound
    if metric == "lewis":
        weighted = outgoing.abs().amax(dim=0)[:, None] * points
        norm = (weighted.T @ (weighted / importances[:, None])).contiguous()
        root = torch.linalg.cholesky(norm)  # ‖x‖_W = ‖rootᵀ x‖
        to_x = torch.linalg.inv(root)
    else:
        to_x = torch.eye(4, dtype=torch.float64)
    for s in range(seeds):
        coreset = sample(importances, draws, seeded(s), unit="draws")
        error = error_of(points, outgoing, coreset, phi)
        reached = worst_ratio(lambda y, error=error: error(y @ to_x), 4, seeded(1000 + s), starts=16)
        broken += reached > bound
        closest = max(closest, reached / bound)
    assert broken <= delta * seeds
    assert closest > 0.01


def test_t6_linear_activation_has_a_closed_form():
    """For φ = id the worst x is known: ‖Σ_i (V'−V)_ji p_i‖. 300 seeds, none may exceed the bound at δ = 1/1000."""
    points, outgoing = layer(50, 6, 4, 1)
    importances = importance(points, outgoing)
    for unit, size in (("draws", 40), ("distinct", 20)):
        for s in range(300):
            coreset = sample(importances, size, seeded(s), unit=unit)
            exact = (coreset.outgoing(outgoing) @ points[coreset.indices] - outgoing @ points).norm(dim=1).max()
            bound = sampling_bound(points, outgoing, coreset.draws, 1e-3, stopped=unit == "distinct")
            assert float(exact) <= bound.bound


def test_t6_other_probabilities_use_their_own_total():
    points, outgoing = layer(50, 6, 4, 2)
    matching = importance(points, outgoing)
    same = sampling_bound(points, outgoing, 10, probabilities=matching / matching.sum())
    assert same.bound == pytest.approx(sampling_bound(points, outgoing, 10).bound)
    uniform = torch.full((50,), 1 / 50, dtype=torch.float64)
    assert sampling_bound(points, outgoing, 10, probabilities=uniform).bound > same.bound
    uniform[3] = 0
    assert math.isinf(sampling_bound(points, outgoing, 10, probabilities=uniform).bound)


def test_t6_query_metric_is_the_euclidean_one_in_whitened_inputs(gen):
    points, outgoing = layer(30, 5, 2, 3)
    root = torch.randn(5, 5, generator=gen, dtype=torch.float64)
    moved = sampling_bound(points, outgoing, 20, metric="queries", second_moment=root @ root.T)
    assert moved.bound == pytest.approx(sampling_bound(points @ root, outgoing, 20).bound)


def test_t6_for_tanh_holds_on_a_ball_and_says_so():
    """tanh is not homogeneous: the bound with ρ in place of ‖x‖ holds for ‖x‖ ≤ ρ, and the statement names ρ."""
    points, outgoing = layer(40, 4, 2, 4)
    importances = importance(points, outgoing)
    certificate = sampling_bound(points, outgoing, 25, 0.01, homogeneous=False)
    assert "ρ" in certificate.statement
    for rho in (0.1, 1.0, 10.0):
        for s in range(10):
            error = error_of(points, outgoing, sample(importances, 25, seeded(s), unit="draws"), torch.tanh)
            x = rho * torch.nn.functional.normalize(torch.randn(2000, 4, generator=seeded(s), dtype=torch.float64))
            assert float(error(x).abs().max()) <= certificate.bound * rho


@given(
    n=st.integers(2, 24), d=st.integers(1, 5), k=st.integers(1, 24), seed=st.integers(0, 10**6), clones=st.booleans()
)
@settings(max_examples=25)
def test_t8_is_never_exceeded_by_an_adversary(n, d, k, seed, clones):
    points, outgoing = layer(n, d, 3, seed)
    if clones:  # near-duplicates, where the bound is sharp
        points = points[torch.arange(n) // 2 * 2] * torch.linspace(0.5, 2, n, dtype=torch.float64)[:, None]
    kept = torch.randperm(n, generator=seeded(seed))[: min(k, n)].sort().values
    new = merged_outgoing(points, outgoing, kept)
    new = new + 0.1 * torch.randn(new.shape, generator=seeded(seed + 1), dtype=torch.float64)
    bias = 0.1 * torch.randn(3, generator=seeded(seed + 2), dtype=torch.float64)
    certificate = merge_bound(points, outgoing, kept, new, bias_change=bias)
    for phi in (torch.relu, lambda t: torch.nn.functional.leaky_relu(t, 0.3)):

        def error(x, phi=phi):
            # x carries the appended 1 in its last place, so the bias change is worth |b'−b| ≤ |b'−b|·‖x‖.
            return phi(x @ points[kept].T) @ new.T - phi(x @ points.T) @ outgoing.T + bias * x[:, -1:]

        assert worst_ratio(error, d, seeded(seed + 3), starts=24) <= certificate.bound * (1 + 1e-9)


@pytest.mark.parametrize("large", ["_LARGE", "_HUGE"])
def test_t8_of_a_large_layer(large, monkeypatch):
    """The nearest rays are found in single precision, or not looked for: the formula, written out for both."""
    points, outgoing = layer(30, 6, 3, 5)
    points[15:] = points[:15] * (0.5 + torch.rand(15, 1, generator=seeded(6), dtype=torch.float64))
    kept = torch.arange(15)
    new = merged_outgoing(points, outgoing, kept) + 0.1
    usual = merge_bound(points, outgoing, kept, new).bound
    monkeypatch.setattr(sys.modules["coreprune.coreset.bounds"], large, 0)
    bound = merge_bound(points, outgoing, kept, new).bound
    if large == "_LARGE":
        assert bound == pytest.approx(usual, rel=1e-6)
        return
    norms = points.norm(dim=1)
    alone = outgoing[:, 15:].abs() @ norms[15:] + (new - outgoing[:, kept]).abs() @ norms[:15]
    assert bound == pytest.approx(float(alone.max()), rel=1e-12)
    assert bound > 2 * usual


def test_t8_is_zero_when_the_removed_channels_are_multiples_and_the_weights_are_merged():
    points, outgoing = layer(4, 6, 3, 5)
    points = torch.cat([points, 2.5 * points])
    outgoing = torch.cat([outgoing, outgoing * 0.3], dim=1)
    kept = torch.arange(4)
    merged = merged_outgoing(points, outgoing, kept)
    assert merge_bound(points, outgoing, kept, merged).bound < 1e-12
    assert merge_bound(points, outgoing, kept, outgoing[:, :4]).bound > 0.1


def merged(points, kept, mean, seed, n):
    """A coreset whose removed channels go to kept ones at random, some nowhere, with random scales."""
    target = kept[torch.randint(len(kept), (n,), generator=seeded(seed))]
    target[torch.rand(n, generator=seeded(seed + 1)) < 0.2] = -1
    scale = torch.rand(n, generator=seeded(seed + 2), dtype=torch.float64) * 2
    target[kept], scale[kept] = kept, 1.0
    return Coreset(kept, torch.ones(len(kept), dtype=torch.float64), merge=Merge(target, scale, mean=mean))


@given(n=st.integers(2, 20), d=st.integers(1, 4), k=st.integers(1, 20), seed=st.integers(0, 10**6), mean=st.booleans())
@settings(max_examples=12)
def test_t8_holds_for_merged_coresets_against_an_adversary(n, d, k, seed, mean):
    """V' and the averaged rows are written out in loops; the adversary looks for the worst input."""
    points, outgoing = layer(n, d, 3, seed)
    kept = torch.randperm(n, generator=seeded(seed))[: min(k, n)].sort().values
    coreset = merged(points, kept, mean, seed + 3, n)
    target, scale = coreset.merge.target.tolist(), coreset.merge.scale
    new, rows = outgoing[:, kept].clone(), points[kept].clone()
    for column, c in enumerate(kept.tolist()):
        into = [i for i in range(n) if target[i] == c and i != c]
        new[:, column] += sum(scale[i] * outgoing[:, i] for i in into)
        if mean:
            rows[column] = torch.stack([points[i] for i in (c, *into)]).mean(dim=0)
    assert torch.allclose(coreset.outgoing(outgoing), new, atol=1e-12)
    assert torch.allclose(coreset.incoming(points), rows, atol=1e-12)
    certificate = merge_bound(points, outgoing, coreset)
    for phi in (torch.relu, lambda t: torch.nn.functional.leaky_relu(t, 0.3)):

        def error(x, phi=phi):
            return phi(x @ rows.T) @ new.T - phi(x @ points.T) @ outgoing.T

        assert worst_ratio(error, d, seeded(seed + 3), starts=24) <= certificate.bound * (1 + 1e-9)


@pytest.mark.parametrize("mean", [False, True])
def test_t8_of_a_merge_without_loss_is_zero(mean):
    points, outgoing = layer(4, 6, 3, 5)
    points, outgoing = torch.cat([points, points]), torch.cat([outgoing, outgoing * 0.3], dim=1)
    target = torch.arange(4).repeat(2)
    coreset = Coreset(torch.arange(4), torch.ones(4).double(), merge=Merge(target, torch.ones(8).double(), mean=mean))
    assert merge_bound(points, outgoing, coreset).bound < 1e-12


def test_the_merges_own_scales_can_give_the_smaller_bound():
    """Kim et al. scale by ‖p_i‖/‖p_k‖, not by the projection: with the projection alone, D would differ from V'."""
    points = torch.tensor([[1.0, 0.0], [0.8, 0.6]], dtype=torch.float64)
    outgoing = torch.ones(1, 2, dtype=torch.float64)
    kept = torch.tensor([0])
    coreset = Coreset(kept, torch.ones(1).double(), merge=Merge(torch.tensor([0, 0]), torch.ones(2).double()))
    by_projection = merge_bound(points, outgoing, kept, coreset.outgoing(outgoing)).bound
    assert by_projection == pytest.approx(0.6 + 0.2)
    assert merge_bound(points, outgoing, coreset).bound == pytest.approx(0.4**0.5)


def test_t8_is_attained_by_one_removed_channel():
    """One output, one removed channel orthogonal to the rest: the adversary reaches the bound exactly."""
    points, outgoing = torch.eye(3, dtype=torch.float64), torch.tensor([[1.0, -2.0, 0.5]], dtype=torch.float64)
    kept = torch.tensor([0, 2])
    certificate = merge_bound(points, outgoing, kept, outgoing[:, kept])
    assert certificate.bound == pytest.approx(2.0)
    assert certificate.trivial == pytest.approx(3.5)
    assert not certificate.vacuous


def test_opposite_rays_are_not_merged():
    """λ ≥ 0: relu of the opposite direction is no multiple, so the residual is the whole of the point."""
    points = torch.tensor([[1.0, 0.0], [-1.0, 0.0]], dtype=torch.float64)
    outgoing = torch.ones(1, 2, dtype=torch.float64)
    assert merge_bound(points, outgoing, torch.tensor([0]), torch.ones(1, 1, dtype=torch.float64)).bound == 1.0


def test_certificates_are_plain_values_and_flag_the_vacuous():
    points, outgoing = layer(40, 4, 2, 6)
    certificate = sampling_bound(points, outgoing, 5)
    assert certificate.vacuous
    assert certificate.kind == "sampled"
    assert not sampling_bound(points, outgoing, 100_000).vacuous
    infinite = sampling_bound(points, outgoing, 5, lipschitz=math.inf)
    assert infinite.as_dict()["bound"] is None
    assert infinite.vacuous


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda p, v: sampling_bound(p, v, 0), "draws"),
        (lambda p, v: sampling_bound(p, v, 5, 1.5), "delta"),
        (lambda p, v: sampling_bound(p, v, 5, metric="manhattan"), "known: euclidean"),
        (lambda p, v: sampling_bound(p, v, 5, metric="queries"), "second_moment"),
        (lambda p, v: sampling_bound(p, v.T, 5), "one column per point"),
        (lambda p, v: sampling_bound(p, v, 5, probabilities=torch.ones(3)), "one entry per channel"),
        (lambda p, v: merge_bound(p, v, torch.tensor([50]), torch.zeros(2, 1)), "lie in 0..4"),
        (lambda p, v: merge_bound(p, v, torch.tensor([0, 1])), "pass new_outgoing"),
        (
            lambda p, v: merge_bound(p, v, Coreset(torch.tensor([0]), torch.ones(1)), torch.ones(2, 2)),
            "new_outgoing must",
        ),
    ],
)
def test_wrong_input_is_explained(unchecked, call, message):
    with pytest.raises(InputError, match=message):
        call(*layer(5, 3, 2, 7))
