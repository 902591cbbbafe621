"""Provable filter pruning against the paper's definition, written out as loops."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import nn

from coreprune import Budget, InputError, prune
from coreprune._progress import silent
from coreprune.pruning.calibration.calibration import Asked, gather
from coreprune.pruning.selectors.pfp import sensitivity
from coreprune.pruning.tracing import trace
from coreprune.selectors import Pfp
from graph.zoo import ZOO, randomise
from layers_by_hand import cut, layer, layers_of, normal, reader, seeded, with_readers


def by_definition(weight, samples, units):
    """max over samples, outputs and signs of one unit's share, one number at a time."""
    p = weight.shape[1] // units
    found = [0.0] * units
    for x in samples.tolist():
        for row in weight.tolist():
            for sign_w in (1, -1):
                for sign_a in (1, -1):
                    parts = [max(sign_w * w, 0.0) * max(sign_a * a, 0.0) for w, a in zip(row, x, strict=True)]
                    whole = sum(parts)
                    for i in range(units):
                        if whole > 0:
                            found[i] = max(found[i], sum(parts[i * p : (i + 1) * p]) / whole)
    return torch.tensor(found, dtype=torch.float64)


@pytest.mark.parametrize("p", [1, 3])
@pytest.mark.parametrize("relu", [True, False])
def test_sensitivities_are_the_definition(p, relu):
    units, weight, samples = 6, normal(5, 6 * p), normal(9, 6 * p, seed=1)
    samples = samples.relu() if relu else samples
    found = sensitivity(reader(weight, samples), units)
    assert torch.allclose(found, by_definition(weight, samples, units), atol=1e-12)
    assert float(found.min()) > 0
    assert float(found.max()) <= 1


def test_outputs_are_worked_on_in_pieces(monkeypatch):
    from coreprune.pruning.selectors import pfp

    made = reader(normal(7, 12), normal(9, 12, seed=1))
    whole = sensitivity(made, 6)
    monkeypatch.setattr(pfp, "_AT_ONCE", 2)
    assert torch.equal(sensitivity(made, 6), whole)


def test_a_dead_unit_has_no_sensitivity_and_the_only_one_that_is_read_has_all():
    weight, samples = normal(3, 4).abs(), normal(5, 4, seed=1).abs()
    samples[:, 2] = 0
    assert float(sensitivity(reader(weight, samples), 4)[2]) == 0
    samples[:, [0, 1]] = 0
    assert sensitivity(reader(weight, samples), 4).tolist() == [0, 0, 0, 1]


def test_several_readers_count_with_their_largest():
    readers = tuple(reader(normal(4, 12, seed=s), normal(6, 12, seed=s + 5)) for s in (0, 1))
    both = dataclasses.replace(layer(12), readers=readers)
    scores = Pfp(deterministic=True)(both, seeded()).scores
    wanted = torch.maximum(*(by_definition(r.weight, r.samples, 12) for r in readers))
    assert torch.allclose(scores, wanted, atol=1e-12)


def test_the_deterministic_variant_keeps_the_most_sensitive_with_their_weights():
    made = dataclasses.replace(layer(12), readers=(reader(normal(4, 12), normal(6, 12, seed=5).abs()),))
    ranking = Pfp(deterministic=True)(made, seeded())
    coreset = ranking.coreset(5)
    assert coreset.indices.tolist() == sorted(ranking.scores.topk(5).indices.tolist())
    assert coreset.weights.tolist() == [1.0] * 5


def test_sampling_follows_the_sensitivities_and_is_unbiased():
    """V' = V n_i/(m p_i): the mean over many samples is V, for every channel that can be drawn."""
    made = dataclasses.replace(layer(4, outputs=3), readers=(reader(normal(3, 4), normal(40, 4, seed=5)),))
    ranking = Pfp()(made, seeded())
    assert ranking.stream is not None
    share = ranking.scores / ranking.scores.sum()
    assert torch.allclose(ranking.stream.probabilities, share, atol=1e-12)
    first = torch.zeros(4)
    for s in range(2000):
        first[int(Pfp()(made, seeded(s)).order[0])] += 1 / 2000
    assert torch.allclose(first, share.float(), atol=0.05)


def test_features_that_are_all_zero_are_said_to_be_dead():
    made = dataclasses.replace(layer(12), readers=(reader(normal(4, 12), torch.zeros(3, 12).double()),))
    assert "dead" in Pfp()(made, seeded()).note
    assert Pfp()(made, seeded()).coreset(3).indices.numel() == 3


def test_prune_shows_it_the_features_of_the_queries():
    model = randomise(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 2)))
    x = normal(30, 4)
    result = prune(model, x[:1], Budget(keep=0.5), Pfp(deterministic=True), queries=x, repair=False)
    x = gather(trace(model, x[:1], silent), Asked(x[:1], x), 0, silent).queries.args[0]  # the others are held back
    with torch.no_grad():
        first = torch.relu(model[0](x))
        second = torch.relu(model[2](first))
        wanted = by_definition(model[2].weight, first, 8), by_definition(model[4].weight, second, 6)
    for name, scores in zip(("0", "2"), wanted, strict=True):
        assert torch.allclose(result.rankings[name].scores, scores, atol=1e-9)
        kept = list(result.plan.groups[name].kept)
        assert float(scores[kept].min()) >= float(scores.sort().values[len(scores) - len(kept)]) - 1e-9


def test_without_queries_it_says_what_to_do():
    with pytest.raises(InputError, match="Pass queries"):
        cut(randomise(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))), normal(1, 4), method="pfp")
    with pytest.raises(InputError, match="Pass queries"):
        Pfp()(layer(), seeded())
    empty = dataclasses.replace(layer(12), readers=(reader(normal(4, 12), normal(1, 12)),))
    empty = dataclasses.replace(
        empty, readers=(dataclasses.replace(empty.readers[0], samples=torch.zeros(0, 12).double()),)
    )
    with pytest.raises(InputError, match="no samples"):
        Pfp()(empty, seeded())


@pytest.mark.parametrize("what", ["samples", "weight"])
def test_features_that_are_not_finite_are_refused(what):
    parts = {"weight": normal(4, 12), "samples": normal(6, 12, seed=5)}
    made = reader(**parts)
    bad = parts[what].clone()
    bad[1, 2] = float("inf")
    with pytest.raises(InputError, match="NaN or infinite"):
        sensitivity(dataclasses.replace(made, **{what: bad}), 12)


def test_features_that_fit_no_units_are_refused():
    with pytest.raises(InputError, match="do not belong to 5 units"):
        sensitivity(reader(normal(4, 12), normal(6, 12)), 5)


def test_a_single_channel():
    made = dataclasses.replace(layer(1), readers=(reader(normal(4, 1), normal(6, 1, seed=5)),))
    assert Pfp()(made, seeded()).coreset(1).indices.tolist() == [0]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mlp", "resnet-bottleneck", "mobilenet-v1", "inception", "bert"])
def test_on_the_features_of_real_architectures(name):
    """Dense, residual, depthwise, concatenated, heads: the features that the consumers see, collected by hooks."""
    entry = ZOO[name]
    model = randomise(entry.build())
    for group, made in list(layers_of(model, entry.inputs(1)).values())[:4]:
        made = with_readers(model, entry.inputs(2), group, made)
        units = group.size // group.unit
        ranking = Pfp(deterministic=True)(made, seeded())
        assert sorted(ranking.order.tolist()) == list(range(units))
        wanted = torch.stack([by_definition(r.weight, r.samples, units) for r in made.readers]).amax(dim=0)
        assert torch.allclose(ranking.scores, wanted, atol=1e-10)
