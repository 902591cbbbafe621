"""prune() on MLPs: smaller, right, repeatable, and the user's model never changes."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import coreprune
from coreprune import Budget, Loewner, Mussay, Norm, Plan, apply_plan, make_plan, prune
from coreprune.selectors import SELECTORS
from oracles import worst_ratio
from small_networks import EXAMPLE, bits, mlp, widths

DATA_FREE = sorted(name for name, make in SELECTORS.items() if not make().reads)


@pytest.mark.parametrize("method", DATA_FREE)
@pytest.mark.parametrize("keep", [0.25, 0.5, 1.0])
def test_every_selector_makes_a_smaller_model_and_leaves_the_given_one_alone(method, keep, gen):
    model = mlp()
    before, training = bits(model), model.training
    result = prune(model, EXAMPLE, Budget(keep=keep), method, queries=None)
    assert widths(result.model) == [int(24 * keep), int(12 * keep), 3]
    assert bits(model) == before
    assert model.training == training
    assert result.model(torch.randn(5, 8, generator=gen)).shape == (5, 3)
    assert result.report.parameters[1] == sum(p.numel() for p in result.model.parameters())
    assert not {p.data_ptr() for p in model.parameters()} & {p.data_ptr() for p in result.model.parameters()}


@pytest.mark.parametrize("method", DATA_FREE)
def test_the_pruned_model_is_the_coreset_formula(method, gen):
    """F'(x) = V Z φ⟨p', x⟩ + b, computed from the plan alone: Z (n, k) holds the factors and scales, p' the means."""
    model = mlp().double()
    result = prune(model, EXAMPLE.double(), Budget(keep=0.5), method, seed=3, queries=None)
    x = torch.randn(7, 8, generator=gen, dtype=torch.float64)
    z, h = torch.eye(8, dtype=torch.float64), x
    for name, layer in (("0", model[0]), ("2", model[2]), ("4", model[4])):
        entry = result.plan.groups.get(name)
        weight, bias = layer.weight @ z, layer.bias
        if entry is None:
            h = h @ weight.T + bias
            continue
        z = torch.zeros(entry.size, len(entry.kept), dtype=torch.float64)
        for column, k in enumerate(entry.kept):
            z[k, column] = entry.factors[column] if entry.factors else 1.0
            for i, target in enumerate(entry.targets or ()):
                if target == k != i:
                    z[i, column] = entry.scales[i] if entry.scales else 1.0
        made = (z > 0).double() / (z > 0).sum(dim=0) if entry.mean else torch.eye(entry.size).double()[:, entry.kept]
        h = torch.relu(h @ (made.T @ weight).T + made.T @ bias)
    assert torch.allclose(result.model(x), h, atol=1e-10)


def test_sampling_selectors_reweight_and_magnitude_does_not():
    model = mlp()
    assert prune(model, EXAMPLE, method="norm", queries=None).plan.groups["0"].factors is not None
    assert prune(model, EXAMPLE, method="magnitude", queries=None).plan.groups["0"].factors is None
    split = prune(model, EXAMPLE, method=Norm(sign_split=True), queries=None).plan.groups["0"]
    assert split.negative_factors is not None
    assert split.negative_factors != split.factors


def test_a_split_sample_scales_the_weights_of_each_sign_by_their_own_factor():
    model = mlp().double()
    result = prune(model, EXAMPLE.double(), method=Norm(sign_split=True), queries=None)
    entry, after = result.plan.groups["0"], list(result.plan.groups["2"].kept)
    weight = model[2].weight[after][:, list(entry.kept)]
    up, down = (torch.tensor(f, dtype=torch.float64) for f in (entry.factors, entry.negative_factors))
    assert torch.allclose(result.model[2].weight, torch.where(weight >= 0, weight * up, weight * down), rtol=1e-12)
    assert not torch.allclose(result.model[2].weight, weight * up, rtol=1e-3)


def test_magnitude_keeps_the_longest_rows():
    model = mlp()
    kept = prune(model, EXAMPLE, Budget(keep=0.25), "magnitude", queries=None).plan.groups["0"].kept
    longest = model[0].weight.detach().norm(dim=1).topk(6).indices.sort().values
    assert list(kept) == longest.tolist()


def test_scores_and_order_are_visible():
    ranking = prune(mlp(), EXAMPLE, method="magnitude", queries=None).rankings["0"]
    assert ranking.scores.shape == (24,)
    assert ranking.order.tolist() == ranking.scores.argsort(descending=True).tolist()
    assert sorted(prune(mlp(), EXAMPLE, method="loewner", queries=None).rankings["2"].order.tolist()) == list(range(12))


def test_mussay_equals_norm_for_relu_and_differs_for_tanh():
    relu = [prune(mlp(), EXAMPLE, method=m, queries=None).plan.groups for m in ("mussay", "norm")]
    assert relu[0] == relu[1]
    tanh = mlp(act=nn.Tanh)
    scores = [prune(tanh, EXAMPLE, method=m, queries=None).rankings["0"].scores for m in (Mussay(beta=3.0), Norm())]
    assert not torch.allclose(scores[0] / scores[0].sum(), scores[1] / scores[1].sum(), atol=1e-3)


def test_loewner_says_which_form_ran_and_the_forms_can_be_compared():
    wide = mlp()  # 24 channels in 9 dimensions: the plain bound; 12 channels in 25: independent
    auto = prune(wide, EXAMPLE, method="loewner", queries=None)
    notes = {g.name: g.note for g in auto.report.groups}
    assert "plain bound" in notes["0"]
    assert "ridge form" in notes["2"]
    plain = prune(wide, EXAMPLE, method=Loewner(ridge=None), queries=None)
    assert "uniform sampling (T7)" in {g.name: g.note for g in plain.report.groups}["2"]
    spread = auto.rankings["2"].scores
    assert float(spread.max() / spread.min()) > 1.05
    assert float(plain.rankings["2"].scores.std()) < 1e-6


def test_wide_layers_use_contact_points_and_say_so(monkeypatch):
    from coreprune.pruning.selectors import sampling

    def notes():
        return [g.note for g in prune(mlp(), EXAMPLE, method="loewner", queries=None).report.groups if g.note]

    assert all("axes" in note for note in notes())
    monkeypatch.setattr(sampling, "_WIDEST_AXES", 9)
    assert ["contact" in note for note in notes()] == [False, True]  # 24 channels in 9 dimensions, 12 in 25


@pytest.mark.parametrize(
    "method",
    [
        *("loewner", "cone", "lewis", "norm", "uniform", "magnitude", "merging", "folding", "random"),
        *(Norm(sign_split=True), Loewner(tight=False)),
    ],
    ids=str,
)
def test_certificates_of_a_layer_hold_against_an_adversary(method, gen):
    """One hidden layer, so that the layer bound is a bound on the network; x has 1 appended."""
    model = nn.Sequential(nn.Linear(5, 16), nn.ReLU(), nn.Linear(16, 3)).double()
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(generator=gen)
    result = prune(model, torch.zeros(1, 5).double(), Budget(keep=0.5), method, queries=None)
    group = result.report.groups[0]
    kinds = {c.theorem: c for c in group.certificates}
    assert kinds["T8"].kind == "proved"
    assert ("T6" in kinds) == (method not in ("magnitude", "merging", "folding", "random"))

    def error(x):
        full = torch.cat([x, torch.ones(len(x), 1, dtype=x.dtype)], dim=1)
        difference = result.model(x) - model(x)
        return difference * (x.norm(dim=1) / full.norm(dim=1))[:, None]

    reached = worst_ratio(error, 5, gen)
    assert 0 < reached <= kinds["T8"].bound
    if "T6" in kinds and method != "lewis":
        assert reached <= kinds["T6"].bound


def test_no_certificate_where_no_theorem_applies():
    report = prune(mlp(act=nn.Sigmoid), EXAMPLE, method="norm", queries=None).report
    assert all(g.certificates == () for g in report.groups)
    tanh = prune(mlp(act=nn.Tanh), EXAMPLE, method="norm", queries=None).report.groups[0].certificates
    assert [c.theorem for c in tanh] == ["T6"]
    assert "ρ" in tanh[0].statement


@pytest.mark.parametrize("act", [nn.LeakyReLU(2.0), nn.LeakyReLU(-1.5), nn.Hardtanh(0.5, 1.0), nn.ELU(3.0)], ids=str)
def test_activations_with_other_parameters_get_no_certificate(act):
    """LeakyReLU(2) is 2-Lipschitz, Hardtanh(0.5, 1) is not 0 at 0: the usual constants would be false."""
    model = nn.Sequential(nn.Linear(8, 24), act, nn.Linear(24, 3))
    assert prune(model, EXAMPLE, method="norm", queries=None).report.groups[0].certificates == ()


def test_usual_parameters_do_get_one():
    model = nn.Sequential(nn.Linear(8, 24), nn.LeakyReLU(0.2), nn.Linear(24, 3))
    assert {c.theorem for c in prune(model, EXAMPLE, method="norm", queries=None).report.groups[0].certificates} == {
        "T6",
        "T8",
    }


def test_consumers_that_sum_over_positions_get_no_certificate():
    """Flattened tokens: the output sums over positions, and a bound for one of them would be too small."""
    model = nn.Sequential(nn.Linear(8, 24), nn.ReLU(), nn.Flatten(), nn.Linear(5 * 24, 3))
    report = prune(model, torch.zeros(1, 5, 8), method="norm", queries=None).report
    assert report.groups[0].kept == 12
    assert report.groups[0].certificates == ()


def test_same_seed_same_bits_and_another_seed_another_sample():
    one, two = (prune(mlp(), EXAMPLE, method="norm", seed=5, queries=None) for _ in range(2))
    assert bits(one.model) == bits(two.model)
    assert one.plan == two.plan
    assert prune(mlp(), EXAMPLE, method="norm", seed=6, queries=None).plan != one.plan


def test_a_plan_survives_json_and_gives_the_same_model():
    model = mlp()
    result = prune(model, EXAMPLE, method=Norm(sign_split=True), queries=None)
    again = Plan.from_json(result.plan.to_json())
    assert again == result.plan
    assert bits(apply_plan(model, again, EXAMPLE)) == bits(result.model)
    assert make_plan(model, EXAMPLE, method=Norm(sign_split=True), queries=None) == result.plan


@pytest.mark.parametrize("method", ["functional", "magnitude"])
def test_plan_and_prune_agree_with_and_without_repair(method):
    """A cost budget is allocated by the queries: make_plan(), which repairs nothing, must allocate like prune(). What
    prune() returns instead where another cut is better (compare=True) is not planned."""
    model, half = mlp(), Budget(params=0.5)
    queries = torch.randn(64, 8, generator=torch.Generator().manual_seed(1))
    made = make_plan(model, EXAMPLE, half, method, queries=queries)
    for repair in (True, False):
        assert made == prune(model, EXAMPLE, half, method, queries=queries, compare=False, repair=repair).plan


def test_a_plan_fits_another_checkpoint_but_not_another_architecture():
    made = make_plan(mlp(0), EXAMPLE, method="magnitude", queries=None)
    assert widths(apply_plan(mlp(1), made, EXAMPLE)) == [12, 6, 3]
    other = nn.Sequential(nn.Linear(8, 20), nn.ReLU(), nn.Linear(20, 3))
    with pytest.raises(coreprune.InputError, match="another architecture"):
        apply_plan(other, made, EXAMPLE)


def test_inplace_shrinks_the_given_model():
    model = mlp()
    result = prune(model, EXAMPLE, Budget(keep=0.5), "magnitude", inplace=True, queries=None)
    assert result.model is model
    assert widths(model) == [12, 6, 3]


def test_half_precision_training_mode_and_frozen_parameters_survive():
    model = mlp(dtype=torch.bfloat16).train()
    model[0].weight.requires_grad_(False)
    pruned = prune(model, EXAMPLE.bfloat16(), method="norm", queries=None).model
    assert pruned[0].weight.dtype == torch.bfloat16
    assert not pruned[0].weight.requires_grad
    assert pruned[2].weight.requires_grad
    assert pruned.training


def test_dead_channels_leave_first():
    model = mlp()
    with torch.no_grad():
        model[2].weight[:, :10] = 0  # ten channels that nothing reads
    for method in ("norm", "loewner", "lewis"):
        kept = prune(model, EXAMPLE, Budget(keep=0.5), method, queries=None).plan.groups["0"].kept
        assert not set(kept) & set(range(10))


def test_keep_counts_are_rounded_and_rounded_up_to_multiples():
    assert widths(prune(mlp(), EXAMPLE, Budget(keep=0.3), "magnitude", queries=None).model) == [7, 4, 3]
    assert widths(prune(mlp(), EXAMPLE, Budget(keep=0.3, round_to=8), "magnitude", queries=None).model) == [8, 8, 3]
    assert widths(prune(mlp(), EXAMPLE, Budget(keep=0.01), "magnitude", queries=None).model) == [1, 1, 3]
    assert widths(prune(mlp(), EXAMPLE, Budget(keep=0.01, min_width=4), "magnitude", queries=None).model) == [4, 4, 3]


def test_progress_is_told():
    seen = []
    prune(mlp(), EXAMPLE, method="magnitude", progress=lambda phase, done, total: seen.append(phase), queries=None)
    assert seen[0] == "capture"
    assert "select" in seen
    assert seen.count("capture") == 2
