"""T6 and T8 in the report of `prune()`, against the formulas written out in numpy from the weights alone."""

from __future__ import annotations

import itertools
import sys

import numpy as np
import pytest
import torch
from torch import nn

from coreprune import Budget, Distill, Loewner, Mussay, Norm, Repair, prune
from coreprune.selectors import Cone, Folding, Lewis, Merging, Uniform
from oracles import lewis_by_iteration, t6, t8

SIZES = (6, 14, 10, 4)
GROUPS = ("0", "2")  # the hidden layers of `network`
DELTA = 0.03


def network(bias: bool = True, act: nn.Module | None = None, seed: int = 0) -> nn.Sequential:
    layers: list[nn.Module] = []
    for inputs, outputs in itertools.pairwise(SIZES):
        layers += [nn.Linear(inputs, outputs, bias=bias), act or nn.ReLU()]
    model = nn.Sequential(*layers[:-1]).double()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(generator=generator)
    return model


def rows(layer: nn.Linear) -> np.ndarray:
    """p_i: the weights that make channel i, with its bias appended where there is one."""
    weight = layer.weight.detach().numpy()
    return weight if layer.bias is None else np.c_[weight, layer.bias.detach().numpy()]


def readers(layer: nn.Linear) -> np.ndarray:
    return layer.weight.detach().numpy()


def certificates(result, name: str) -> dict:
    (group,) = [g for g in result.report.groups if g.name == name]
    return {c.theorem: c for c in group.certificates}


def pruned(model, method, keep=0.5, **more):
    return prune(model, torch.zeros(1, SIZES[0]).double(), Budget(keep=keep), method, delta=DELTA, **more)


def split(v: np.ndarray) -> np.ndarray:
    """Two items per channel, one for each sign of its outgoing weight: (J, 2n)."""
    return np.c_[np.maximum(v, 0), np.maximum(-v, 0)]


def draws_of(entry, q: np.ndarray, signs: bool) -> int:
    """m from the plan: a factor is (times drawn)/(m·q), and the item that ended the sample was drawn once."""
    n, kept = entry.size, list(entry.kept)
    counted = np.array(entry.factors) * q[kept]
    if signs:
        counted = np.r_[counted, np.array(entry.negative_factors) * q[[n + k for k in kept]]]
    m = 1 / counted[counted > 0].min()
    assert m == pytest.approx(round(m), rel=1e-6)
    assert counted.sum() == pytest.approx(1)
    return round(m)


# --- T6 ---------------------------------------------------------------------------------------------------------------
SAMPLED = {
    "norm": (Norm(), nn.ReLU(), 1.0),
    "norm, leaky": (Norm(), nn.LeakyReLU(0.2), 1.0),
    "norm, tanh": (Norm(), nn.Tanh(), 1.0),
    "norm, steep": (Norm(), nn.Hardswish(), 1.5),
    "norm, split": (Norm(sign_split=True), nn.ReLU(), 1.0),
    "mussay, tanh": (Mussay(beta=0.3), nn.Tanh(), 1.0),
    "mussay, tanh, split": (Mussay(beta=0.3, sign_split=True), nn.Tanh(), 1.0),
    "uniform": (Uniform(), nn.ReLU(), 1.0),
    "loewner": (Loewner(), nn.ReLU(), 1.0),
    "lewis": (Lewis(), nn.ReLU(), 1.0),
    "cone": (Cone(), nn.ReLU(), 1.0),
}


def probabilities(method, p: np.ndarray, v: np.ndarray, scores: torch.Tensor) -> np.ndarray:
    """What the selector says that it samples by; for `loewner` and `cone` the scores that it reports."""
    signs = getattr(method, "sign_split", False)
    size = (split(v) if signs else np.abs(v)).max(axis=0)
    norms = np.tile(np.linalg.norm(p, axis=1), 2 if signs else 1)
    match method.name:
        case "norm":
            found = size * norms
        case "mussay":
            found = size * np.abs(np.tanh(method.beta * norms))
        case "uniform":
            found = np.ones_like(size)
        case "lewis":
            found = lewis_by_iteration(size[:, None] * p)
        case _:
            found = scores.numpy()
    return found / found.sum()


def expected_t6(method, lipschitz, p, v, q, draws):
    signs = getattr(method, "sign_split", False)
    items = split(v) if signs else np.abs(v)
    if method.name == "lewis":  # the dual norm is τ_i/c_i
        norms = lewis_by_iteration(items.max(axis=0)[:, None] * p) / items.max(axis=0)
    else:
        norms = np.tile(np.linalg.norm(p, axis=1), 2 if signs else 1)
    return t6(items.max(axis=0) * norms, items * norms, q, draws, DELTA, lipschitz)


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("case", SAMPLED)
def test_t6_is_the_formula_on_the_draws_of_the_plan(case, bias):
    method, act, lipschitz = SAMPLED[case]
    model = network(bias, act)
    result = pruned(model, method, queries=None, seed=3)
    for name in GROUPS:
        at = int(name)
        p, v = rows(model[at]), readers(model[at + 2])
        q = probabilities(method, p, v, result.rankings[name].scores)
        draws = draws_of(result.plan.groups[name], q, getattr(method, "sign_split", False))
        certificate = certificates(result, name)["T6"]
        bound, trivial = expected_t6(method, lipschitz, p, v, q, draws)
        assert certificate.bound == pytest.approx(bound, rel=1e-7)
        assert certificate.trivial == pytest.approx(trivial, rel=1e-7)
        assert certificate.delta == DELTA
        assert certificate.kind == "sampled"
        assert f"{draws} independent draws" in " ".join(certificate.assumptions)


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_t6_of_a_split_sample_sees_items_of_both_signs(sign):
    """The channel with the largest ‖a_i‖/q_i is read with one sign only: the other half alone gives a smaller T."""
    model, method = network(act=nn.Tanh()), Mussay(beta=2.0, sign_split=True)
    with torch.no_grad():
        model[0].weight[4] *= 50  # tanh(β‖p‖) ≤ 1, so a long row is drawn too rarely for its length
        model[2].weight[:, 4] = sign * model[2].weight[:, 4].abs()
    result = pruned(model, method, queries=None, seed=3)
    p, v = rows(model[0]), readers(model[2])
    q = probabilities(method, p, v, result.rankings["0"].scores)
    bound, trivial = expected_t6(method, 1.0, p, v, q, draws_of(result.plan.groups["0"], q, signs=True))
    certificate = certificates(result, "0")["T6"]
    assert (certificate.bound, certificate.trivial) == pytest.approx((bound, trivial), rel=1e-9)
    ratio = split(v).max(axis=0) * np.tile(np.linalg.norm(p, axis=1), 2) / np.where(q > 0, q, np.inf)
    worst = 4 if sign > 0 else 4 + len(p)
    assert ratio.argmax() == worst
    assert np.delete(ratio, worst).max() < 0.5 * ratio.max()


def test_t6_says_nothing_about_weights_that_were_refit():
    model = network()
    x = torch.randn(64, SIZES[0], dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    assert all("T6" not in certificates(pruned(model, "norm", queries=x), name) for name in GROUPS)


# --- T8 ---------------------------------------------------------------------------------------------------------------
def weights_of_plan(p, v, entry):
    """V', p' and the merge's own targets and scales, as `GroupPlan` describes them."""
    kept = list(entry.kept)
    factors = np.ones(len(kept)) if entry.factors is None else np.array(entry.factors)
    negative = factors if entry.negative_factors is None else np.array(entry.negative_factors)
    new = np.where(v[:, kept] >= 0, factors, negative) * v[:, kept]
    made = p[kept].copy()
    if entry.targets is None:
        return made, new, None
    scales = np.ones(entry.size) if entry.scales is None else np.array(entry.scales)
    for column, k in enumerate(kept):
        into = [i for i, target in enumerate(entry.targets) if target == k and i != k]
        new[:, column] += sum((scales[i] * v[:, i] for i in into), np.zeros(len(v)))
        if entry.mean:
            made[column] = p[[k, *into]].mean(axis=0)
    return made, new, (np.array(entry.targets), scales)


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("act", [nn.ReLU(), nn.LeakyReLU(0.2)], ids=["relu", "leaky"])
@pytest.mark.parametrize(
    "method",
    ["magnitude", "norm", "uniform", "lewis", Norm(sign_split=True), Merging(), Merging(threshold=0.0), Folding()],
    ids=str,
)
def test_t8_is_the_formula_on_the_weights_of_the_plan(method, act, bias):
    model = network(bias, act)
    result = pruned(model, method, queries=None, seed=3)
    for name in GROUPS:
        at = int(name)
        p, v = rows(model[at]), readers(model[at + 2])
        entry = result.plan.groups[name]
        made, new, own = weights_of_plan(p, v, entry)
        certificate = certificates(result, name)["T8"]
        bound, trivial = t8(p, v, list(entry.kept), made, new, np.zeros(len(v)), own)
        assert (certificate.bound, certificate.trivial) == pytest.approx((bound, trivial), rel=1e-9)
        assert certificate.kind == "proved"


def spread(values: np.ndarray, kept: list[int], n: int) -> np.ndarray:
    """Columns of the pruned model at their places in the original, zero where an input is gone."""
    out = np.zeros((len(values), n))
    out[:, kept] = values
    return out


def expected_t8_of_the_result(model, result, name):
    """T8 from the two networks' weights alone: outputs that stay, inputs that left read as zero."""
    at, small = int(name), result.model
    kept = list(result.plan.groups[name].kept)
    inputs = list(result.plan.groups[str(at - 2)].kept) if at else list(range(SIZES[0]))
    consumer, new_consumer = model[at + 2], small[at + 2]
    following = result.plan.groups.get(str(at + 2))
    alive = list(following.kept) if following else list(range(SIZES[-1]))
    made = spread(readers(small[at]), inputs, model[at].in_features)
    change = np.zeros(len(alive))
    if consumer.bias is not None:
        made = np.c_[made, small[at].bias.detach().numpy()]
        change = (new_consumer.bias - consumer.bias[alive]).detach().numpy()
    return t8(rows(model[at]), readers(consumer)[alive], kept, made, readers(new_consumer), change), change


AFTER = {
    "repair": {"repair": True},
    "one-sided repair": {"repair": Repair(one_sided=3)},
    "distillation": {"repair": False, "distill": Distill(steps=2)},
    "both": {"repair": True, "distill": Distill(steps=2)},
}


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("after", AFTER)
@pytest.mark.parametrize("method", ["functional", "magnitude", "norm", "folding", "merging"])
def test_t8_after_repair_is_the_formula_on_the_final_weights(method, after, bias):
    """Rows, readers and biases are all read from the network that `prune` returns."""
    model = network(bias)
    x = torch.randn(96, SIZES[0], dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    result = pruned(model, method, queries=x, **AFTER[after])
    for name in GROUPS:
        (bound, trivial), change = expected_t8_of_the_result(model, result, name)
        certificate = certificates(result, name)["T8"]
        assert (certificate.bound, certificate.trivial) == pytest.approx((bound, trivial), rel=1e-9)
        assert not bias or abs(change).max() > 1e-3  # or the biases would not be seen to count


def test_the_change_of_the_biases_counts_in_t8():
    """With the biases as they were, the same weights have a smaller bound."""
    model = network()
    x = torch.randn(96, SIZES[0], dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    result = pruned(model, "functional", queries=x, repair=Repair(descent=False))
    for name in GROUPS:
        at, following = int(name), result.plan.groups.get(str(int(name) + 2))
        alive = list(following.kept) if following else list(range(SIZES[-1]))
        bound = certificates(result, name)["T8"].bound
        with torch.no_grad():
            result.model[at + 2].bias.copy_(model[at + 2].bias[alive])
        (without, _), _ = expected_t8_of_the_result(model, result, name)
        assert without < bound * (1 - 1e-3)


def test_the_rank_of_a_large_layer_is_found_for_coresets_alone(monkeypatch):
    """It costs a singular value decomposition, and T7 is about coresets that are drawn."""
    model = network()
    assert [g.rank for g in pruned(model, "magnitude", queries=None).report.groups if not g.locked_because] == [
        np.linalg.matrix_rank(rows(model[int(name)])) for name in GROUPS
    ]
    monkeypatch.setattr(sys.modules["coreprune.pruning.reporting.certificates"], "_QUICK", 0)
    for method, known in (("magnitude", False), ("loewner", True)):
        groups = pruned(model, method, queries=None).report.groups
        assert {g.rank is not None for g in groups if not g.locked_because} == {known}
