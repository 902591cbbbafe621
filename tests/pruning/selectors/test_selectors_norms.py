"""Rankings by the channels' own weights, and the batch norm that is read with them."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import nn

from coreprune import Budget, InputError, Magnitude
from coreprune.pruning.selectors import ranking_of
from coreprune.selectors import L1, L2, SELECTORS, BnScale, Fpgm, Norm, Random
from graph.zoo import ZOO, randomise
from layers_by_hand import cut, layer, layers_of, normal, seeded

OWN = ("l1", "l2", "magnitude", "fpgm", "bn-scale", "random")


def test_l1_and_l2_are_norms_of_the_raw_weights_without_the_bias():
    made = layer()
    rows = made.incoming[:, :-1].tolist()
    for selector, power in ((L1(), 1), (L2(), 2)):
        wanted = [sum(abs(w) ** power for w in row) ** (1 / power) for row in rows]
        assert selector(made, seeded()).scores.tolist() == pytest.approx(wanted)
    with_bias = L1(bias=True)(made, seeded()).scores - L1()(made, seeded()).scores
    assert torch.allclose(with_bias, made.incoming[:, -1].abs())


def test_magnitude_is_l2_by_another_name():
    made = layer()
    assert torch.equal(Magnitude()(made, seeded()).order, L2()(made, seeded()).order)
    assert torch.equal(Magnitude(p=1.0)(made, seeded()).order, L1()(made, seeded()).order)


def test_fpgm_removes_what_lies_nearest_to_the_geometric_median():
    """The score is the objective that the median minimises (Weiszfeld's algorithm finds the median itself)."""
    made = layer(n=30, d=3)
    rows = made.incoming[:, :-1]
    wanted = [sum(float((a - b).norm()) for b in rows) for a in rows]
    ranking = Fpgm()(made, seeded())
    assert ranking.scores.tolist() == pytest.approx(wanted)
    median = rows.mean(dim=0)
    for _ in range(500):
        near = 1 / (rows - median).norm(dim=1)
        median = (near[:, None] * rows).sum(dim=0) / near.sum()
    least = ranking.scores.min()
    assert float((rows - median).norm(dim=1).sum()) <= float(least)
    assert int(ranking.order[-1]) in (rows - median).norm(dim=1).topk(3, largest=False).indices.tolist()


def test_random_is_uniform_and_keeps_the_weights():
    made, counts = layer(n=6), torch.zeros(6)
    for s in range(1200):
        coreset = Random()(made, seeded(s)).coreset(2)
        assert coreset.weights.tolist() == [1.0, 1.0]
        counts[coreset.indices] += 1
    assert float((counts / 400 - 1).abs().max()) < 0.2
    assert torch.equal(Random()(made, seeded(3)).order, Random()(made, seeded(3)).order)


def test_bn_scale_ranks_by_gamma_and_adds_where_branches_meet():
    entry = ZOO["resnet-bottleneck"]
    model = randomise(entry.build())
    found = layers_of(model, entry.inputs(1))
    tensors = dict(model.named_parameters())
    _, inner = found["1.body.0.0"]
    ranking = BnScale()(inner, seeded())
    assert torch.equal(ranking.scores, tensors["1.body.0.1.weight"].detach().abs())
    assert ranking.note == ""
    _, joined = found["1.body.2.0"]
    names = ("1.body.2.1.weight", "1.short.1.weight", "2.body.2.1.weight")
    assert torch.allclose(BnScale()(joined, seeded()).scores, sum(tensors[n].detach().abs() for n in names))


def test_bn_scale_says_so_where_no_norm_follows():
    ranking = BnScale()(layer(), seeded())
    assert torch.equal(ranking.order, L2()(layer(), seeded()).order)
    assert "no batch norm" in ranking.note


def test_bn_scale_of_a_norm_without_scale_falls_back():
    model = nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8, affine=False), nn.ReLU(), nn.Linear(8, 2)).double()
    _, made = layers_of(model, {"x": torch.zeros(2, 3).double()})["0"]
    assert made.norm is not None
    assert "no batch norm" in BnScale()(made, seeded()).note


@pytest.mark.parametrize("bias", [False, True])
def test_effective_rows_make_what_the_norm_lets_out(bias):
    """x ↦ ⟨p̃_i, (x, 1)⟩ is the layer and its norm, run by torch in evaluation mode."""
    model = randomise(nn.Sequential(nn.Linear(3, 8, bias=bias), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 2)))
    x = normal(5, 3)
    _, made = layers_of(model, {"x": x})["0"]
    rows = made.effective
    assert rows.shape == (8, 4)
    assert torch.allclose(x @ rows[:, :-1].T + rows[:, -1], model[1](model[0](x)), atol=1e-12)
    assert torch.equal(made.weights, model[0].weight)
    assert made.norm is not None
    assert torch.equal(made.norm.scale, model[1].weight)
    assert torch.equal(made.norm.variance, model[1].running_var)


def test_effective_rows_of_convolutions_and_of_a_residual_sum():
    """The oracle runs the modules on an input of one kernel, whose output is one position."""
    entry = ZOO["resnet-bottleneck"]
    model = randomise(entry.build())
    found = layers_of(model, entry.inputs(1))
    _, made = found["1.body.1.0"]
    x = normal(4, 8, 3, 3)
    wanted = model[1].body[1][1](model[1].body[1][0](x))[:, :, 1, 1]
    rows = made.effective
    assert torch.allclose(x.reshape(4, -1) @ rows[:, :-1].T + rows[:, -1], wanted, atol=1e-10)
    _, joined = found["1.body.2.0"]
    parts = [normal(4, 8, 1, 1, seed=s) for s in range(3)]
    layers = (model[1].body[2], model[1].short, model[2].body[2])
    wanted = sum(layer(x)[:, :, 0, 0] for layer, x in zip(layers, parts, strict=True))
    rows = joined.effective
    assert joined.norm is None
    assert len(joined.norms) == 3
    stacked = torch.cat([x.reshape(4, -1) for x in parts], dim=1)
    assert torch.allclose(stacked @ rows[:, :-1].T + rows[:, -1], wanted, atol=1e-10)


@pytest.mark.parametrize(
    "middle",
    [
        nn.Sequential(nn.ReLU(), nn.BatchNorm2d(8)),  # the norm does not read the layer directly
        nn.BatchNorm2d(8, track_running_stats=False),  # it has no statistics of its own
        nn.InstanceNorm2d(8, affine=True),
    ],
    ids=["behind", "no-statistics", "instance-norm"],
)
def test_other_norms_are_not_folded(middle):
    model = nn.Sequential(nn.Conv2d(3, 8, 1), middle, nn.ReLU(), nn.Conv2d(8, 2, 1)).double().eval()
    (_, made), *_ = layers_of(model, {"x": torch.zeros(2, 3, 4, 4).double()}).values()
    assert made.norms == ()
    assert torch.equal(made.effective, made.incoming)


def test_a_layer_that_is_used_twice_has_no_norm():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.n, self.b = nn.Linear(3, 8), nn.BatchNorm1d(8), nn.Linear(8, 2)

        def forward(self, x):
            return self.b(torch.relu(self.n(self.a(x))) + torch.relu(self.n(self.a(2 * x))))

    _, made = layers_of(Twice().double(), {"x": torch.zeros(2, 3).double()})["a"]
    assert made.norms == ()


def test_coreset_selectors_see_the_folded_weights_and_l1_does_not():
    """γ = 0 kills a channel whatever its weights: `norm` never draws it, `l1` keeps it."""
    model = randomise(nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 2)))
    with torch.no_grad():
        model[0].weight[0] = 100
        model[1].weight[0], model[1].bias[0] = 0, 0
    example = torch.zeros(1, 3).double()
    assert 0 not in cut(model, example, Budget(keep=0.5), Norm()).plan.groups["0"].kept
    assert 0 in cut(model, example, Budget(keep=0.5), "l1").plan.groups["0"].kept


@pytest.mark.parametrize("method", OWN)
def test_single_channels_and_copies(method):
    selector = SELECTORS[method]()
    assert selector(layer(1), seeded()).coreset(1).indices.tolist() == [0]
    same = dataclasses.replace(layer(), incoming=layer().incoming[:1].expand(12, -1).contiguous())
    assert selector(same, seeded()).coreset(5).indices.numel() == 5


@pytest.mark.parametrize(
    "method", ["l1", "l2", "magnitude", "fpgm", "bn-scale", "merging", "folding", "norm", "loewner"]
)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(method, value):
    made = layer()
    made.incoming[3, 1] = value
    with pytest.raises(InputError, match=r"finite|NaN"):
        ranking_of(SELECTORS[method](), made, seeded())
