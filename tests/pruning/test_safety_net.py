"""The safety net: the best of what could be returned, on queries that were held back, and the report says which."""

from __future__ import annotations

import dataclasses
import logging
import math
import weakref

import pytest
import torch
from scipy import stats
from torch import nn

from coreprune import Budget, Distill, prune
from coreprune.pruning import pipeline, safety_net, stages
from coreprune.pruning.repair.options import Repair
from coreprune.pruning.reporting.comparison import Apart
from features import normal
from graph.zoo import randomise
from small_networks import bits


def network():
    return randomise(
        nn.Sequential(
            *(nn.Linear(6, 24), nn.ReLU(), nn.Linear(24, 40), nn.ReLU(), nn.Linear(40, 30), nn.ReLU()),
            nn.Linear(30, 4),
        )
    )


def test_the_cuts_that_were_not_chosen_are_not_kept(monkeypatch):
    """Each holds the weights once more: of a language model, half a gigabyte."""
    alive, most, real = weakref.WeakSet(), [], safety_net.apart_from

    def apart(traced, small, queries, ends):
        alive.add(small)
        most.append(len(alive))
        return real(traced, small, queries, ends)

    monkeypatch.setattr(safety_net, "apart_from", apart)
    result = prune(network(), torch.zeros(1, 6, dtype=torch.float64), Budget(macs=0.5), queries=normal(400, 6), seed=0)
    assert len(names(result)) >= 3
    assert max(most) == 2, "the chosen one, and the one that it is compared with"


def names(result):
    return [one.name for one in result.report.compared]


def chosen(result):
    (one,) = [one for one in result.report.compared if one.chosen]
    return one


def spoiled(monkeypatch, first_only):
    """Repairs that turn the weights upside down: all of them, or only the first."""
    real, calls = stages.repair_, []

    def repair_(pruned, calibration, options, tell, state=None):
        fits = real(pruned, calibration, options, tell)
        if not (first_only and calls):
            with torch.no_grad():
                for p in pruned.removed.model.parameters():
                    p.mul_(-3)
        calls.append(1)
        return fits

    for module in (pipeline, safety_net):
        monkeypatch.setattr(module, "repair_", repair_)


def test_a_good_repair_is_returned_and_everything_is_listed():
    model, x = network(), normal(256, 6)
    result = prune(model, x[:1], Budget(macs=0.6), queries=x)
    assert chosen(result).name == "the repaired cut"
    assert {"the cut without repair", "magnitude pruning"} < set(names(result))
    assert len(set(names(result))) == len(names(result))
    assert "on held-back queries, returned: the repaired cut" in str(result.report)
    assert [c["name"] for c in result.report.as_dict()["compared"]] == names(result)


def test_a_broken_repair_is_not_returned(monkeypatch, caplog):
    spoiled(monkeypatch, first_only=False)
    model, x = network(), normal(256, 6)
    before = bits(model)
    with caplog.at_level(logging.WARNING, "coreprune"):
        result = prune(model, x[:1], Budget(macs=0.6), "functional", queries=x)
    assert chosen(result).name == "the cut without repair"
    assert result.report.refits == ()
    assert any("is returned instead of the repaired cut" in record.message for record in caplog.records)
    plain = prune(model, x[:1], Budget(macs=0.6), "functional", queries=x, repair=False)
    assert result.plan == plain.plan
    assert bits(result.model) == bits(plain.model)
    assert bits(model) == before


def test_another_cut_takes_the_place_of_a_broken_one(monkeypatch):
    spoiled(monkeypatch, first_only=True)
    model, x = network(), normal(256, 6)
    result = prune(model, x[:1], Budget(macs=0.6), queries=x)
    assert chosen(result).name in ("the cut with the widest groups whole", "the cut spread evenly")
    assert result.report.refits
    assert result.report.macs[1] <= 0.6 * result.report.macs[0]
    widths = {name: len(entry.kept) for name, entry in result.plan.groups.items()}
    linears = [m for m in result.model if isinstance(m, nn.Linear)]
    assert list(widths.values()) == [m.out_features for m in linears[:-1]][: len(widths)] or len(widths) < 3
    assert min(one.error for one in result.report.compared) == chosen(result).error


@pytest.mark.parametrize(("large", "broken"), [(True, False), (True, True), (False, False)])
def test_where_a_repair_takes_long_and_the_first_is_good_no_other_cut_gets_one(large, broken, monkeypatch):
    if broken:
        spoiled(monkeypatch, first_only=True)
    monkeypatch.setattr(safety_net, "_LARGE", 0 if large else 10**9)
    model, x, repaired = network(), normal(256, 6), []
    real = safety_net.repair_
    monkeypatch.setattr(safety_net, "repair_", lambda *args: repaired.append(args) or real(*args))
    result = prune(model, x[:1], Budget(macs=0.8), "functional", queries=x)
    first = result.report.compared[0].error
    skipped = [name for name in names(result) if name.endswith(", without repair")]
    assert (first <= safety_net._GOOD) != broken
    assert bool(skipped) == (large and not broken)
    assert bool(repaired) != bool(skipped)
    assert not {name.removesuffix(", without repair") for name in skipped} & set(names(result))


@pytest.mark.parametrize("more", [-50.0, 50.0])
def test_where_a_repair_takes_long_a_cut_that_is_far_off_without_it_gets_none(more, monkeypatch):
    monkeypatch.setattr(safety_net, "_LARGE", 0)
    monkeypatch.setattr(safety_net, "_MORE", more)
    monkeypatch.setattr(safety_net, "_GOOD", 0.0)
    model, x = network(), normal(256, 6)
    result = prune(model, x[:1], Budget(macs=0.3), "functional", queries=x)
    others = {name for name in names(result) if name.startswith(("the cut with the widest", "the cut spread"))}
    assert others
    assert {name.endswith(", without repair") for name in others} == {more < 0}


@pytest.mark.parametrize(
    ("first", "unrepaired", "reach"),  # a repair that takes off 4 orders of magnitude could take off 5
    [(0.1, 1000.0, 10_000.0), (0.2, 0.2, 0.2), (0.3, 0.2, 0.3), (math.inf, 0.2, math.inf), (0.1, math.inf, math.inf)],
)
def test_how_far_off_a_cut_may_be_for_a_repair_to_make_up_for_it(first, unrepaired, reach):
    apart = [Apart(torch.tensor([error], dtype=torch.float64), None) for error in (first, unrepaired)]
    for other in (0.5 * reach, 0.999 * reach, 1.001 * reach, 2 * reach):
        found = Apart(torch.tensor([other], dtype=torch.float64), None)
        assert safety_net._in_reach(found, *apart) == (other <= reach)


@pytest.mark.parametrize("large", [False, True])
def test_the_agreement_counts_every_model_that_could_have_been_returned(large, monkeypatch):
    """Each of the cuts, with its blocks trained or not, distilled or not; in large networks some with or without their
    repair. Which it is depends on the queries of the certificate."""
    monkeypatch.setattr(safety_net, "_LARGE", 0 if large else 10**9)
    model, x = network(), normal(256, 6)
    for asked, trainings in (({}, 1), ({"repair": Repair(descent=False)}, 0), ({"distill": 2}, 2)):
        result = prune(model, x[:1], Budget(macs=0.6), "functional", queries=x, **asked)
        cuts = [name for name in names(result) if not name.endswith((", distilled", ", with its blocks trained"))]
        twice = sum(name.startswith(("the cut with the widest", "the cut spread")) for name in cuts)
        assert twice
        among = (len(cuts) + large * twice) * 2**trainings
        certificate, n = result.report.agreement, 64
        assert f"the choice among {among} is accounted for" in certificate.assumptions[1]
        different = round((1 - chosen(result).agreement) * n)
        bound = stats.beta.ppf(1 - 0.01 / among, different + 1, n - different)
        assert certificate.bound == pytest.approx(bound)


def test_the_error_shown_is_that_of_the_model_on_the_held_back_queries(monkeypatch):
    model, x = network(), normal(120, 6)
    seen = []
    real = safety_net.apart_from
    monkeypatch.setattr(safety_net, "apart_from", lambda t, s, q, ends: seen.append((s, q)) or real(t, s, q, ends))
    result = prune(model, x[:1], Budget(macs=0.6), queries=x)
    small, fresh = seen[0]
    assert small is result.model
    assert len(fresh) == 30
    with torch.no_grad():
        y, z = model(fresh.args[0]), small(fresh.args[0])
    assert chosen(result).error == pytest.approx(float((y - z).square().mean() / y.var(correction=0)))
    assert chosen(result).agreement == float((y.argmax(1) == z.argmax(1)).double().mean())
    assert "30 queries" in result.report.agreement.statement


class Writer(nn.Module):
    """Tokens (N, T) to logits (N, T, 40), all of which move together, far more than apart."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.words, self.up, self.down = nn.Embedding(40, 8), nn.Linear(8, 24), nn.Linear(24, 8)
        self.head, self.shift = nn.Linear(8, 40), nn.Linear(8, 1)

    def forward(self, ids):
        x = self.words(ids)
        x = x + self.down(torch.relu(self.up(x)))
        return self.head(x) + 100 * self.shift(x)


def test_a_language_model_is_compared_by_the_probabilities_of_its_words(monkeypatch):
    model, ids = Writer(), torch.randint(40, (120, 12), generator=torch.Generator().manual_seed(1))
    seen = []
    real = safety_net.apart_from
    monkeypatch.setattr(safety_net, "apart_from", lambda t, s, q, ends: seen.append((s, q)) or real(t, s, q, ends))
    result = prune(model, ids[:1], Budget(params=0.8), queries=ids, repair=Repair(descent=False))
    small, fresh = seen[0]
    assert small is result.model
    with torch.no_grad():
        y, z = (m(fresh.args[0]).double() for m in (model, small))
    kl = torch.distributions.kl_divergence(*(torch.distributions.Categorical(logits=x) for x in (y, z))).mean()
    centred = y - y.mean(1, keepdim=True)
    p = y.softmax(-1)
    varies = (p * (centred - (p * centred).sum(-1, keepdim=True)).square()).sum(-1).mean()
    assert chosen(result).error == pytest.approx(float(2 * kl / varies))
    assert chosen(result).error != pytest.approx(float((y - z).square().mean() / y.var(correction=0)), rel=0.1)


def test_without_repair_the_callers_method_stays(caplog):
    """A baseline is what it is; but when magnitude pruning agrees more often, that is said."""
    model, x = network(), normal(256, 6)
    result = prune(model, x[:1], Budget(macs=0.4), "random", queries=x, repair=False)
    assert chosen(result).name == "the cut"
    assert names(result) == ["the cut", "magnitude pruning"]


def test_a_result_worse_than_magnitude_is_not_silent(caplog):
    def worst(layer):
        return -layer.weights.norm(dim=1) * layer.outgoing.norm(dim=0)

    model, x = network(), normal(256, 6)
    with caplog.at_level(logging.WARNING, "coreprune"):
        prune(model, x[:1], Budget(macs=0.5), worst, queries=x, repair=False)
    assert any("magnitude pruning at the same budget is closer" in record.message for record in caplog.records)


@pytest.mark.parametrize("options", [{"compare": False}, {"queries": None, "repair": False}])
def test_it_can_be_left_out(options):
    model, x = network(), normal(64, 6)
    result = prune(model, x[:1], Budget(macs=0.6), "l2", **({"queries": x} | options))
    assert result.report.compared == ()
    assert "held-back" not in str(result.report)


def test_shares_by_name_are_kept():
    """`keep` is what the caller wants of every group, so no other widths are tried."""
    model, x = network(), normal(64, 6)
    result = prune(model, x[:1], Budget(keep={"0": 0.5, "*": 1.0}), queries=x)
    assert "the cut spread evenly" not in names(result)
    assert "the cut with the widest groups whole" not in names(result)


# Training of blocks after the choice


def test_training_that_pays_is_one_more_line_and_is_returned():
    model, x = network(), normal(256, 6)
    result = prune(model, x[:1], Budget(macs=0.4), queries=x, repair=Repair(ridge=100.0, descent=True))
    assert any(block.changed for block in result.report.descended)
    assert chosen(result).name.endswith(", with its blocks trained")
    start = next(one for one in result.report.compared if f"{one.name}, with its blocks trained" == chosen(result).name)
    assert chosen(result).error < start.error


def test_training_that_harms_is_taken_back(monkeypatch, caplog):
    real = safety_net.descend_

    def harmful(pruned, *rest):
        blocks = real(pruned, *rest)
        with torch.no_grad():
            for p in pruned.removed.model.parameters():
                p.mul_(-3)
        return tuple(dataclasses.replace(block, changed=True) for block in blocks)

    model, x = network(), normal(256, 6)
    monkeypatch.setattr(safety_net, "descend_", harmful)
    with caplog.at_level(logging.WARNING, "coreprune"):
        result = prune(model, x[:1], Budget(macs=0.4), queries=x, repair=Repair(descent=True))
    assert any("model as it was before is returned" in record.message for record in caplog.records)
    assert result.report.descended
    assert not any(block.changed for block in result.report.descended)
    assert not chosen(result).name.endswith("trained")
    monkeypatch.undo()
    plain = prune(model, x[:1], Budget(macs=0.4), queries=x, repair=Repair(descent=False))
    assert bits(result.model) == bits(plain.model)


# Distillation


def test_distillation_that_pays_is_one_more_line_and_is_returned():
    model, x = network(), normal(256, 6)
    asked = {"queries": x, "repair": Repair(ridge=100.0, descent=False)}
    plain = prune(model, x[:1], Budget(macs=0.4), **asked)
    result = prune(model, x[:1], Budget(macs=0.4), distill=200, **asked)
    assert chosen(result).name == f"{chosen(plain).name}, distilled"
    assert chosen(result).error < 0.9 * chosen(plain).error
    assert [one.name for one in result.report.compared if not one.chosen] == names(plain)
    assert bits(result.model) != bits(plain.model)


def test_distillation_that_harms_is_taken_back(caplog):
    model, x = network(), normal(256, 6)
    asked = {"queries": x, "repair": Repair(descent=False)}
    plain = prune(model, x[:1], Budget(macs=0.6), **asked)
    with caplog.at_level(logging.WARNING, "coreprune"):
        result = prune(model, x[:1], Budget(macs=0.6), distill=Distill(steps=5, lr=0.5), **asked)
    assert bits(result.model) == bits(plain.model)
    assert chosen(result) == chosen(plain)
    assert result.report.compared[-1].name.endswith(", distilled")
    assert any("model as it was before is returned" in record.message for record in caplog.records)


def test_distillation_is_not_checked_where_nothing_is_compared():
    model, x = network(), normal(256, 6)
    asked = {"queries": x, "compare": False, "repair": False}
    plain = prune(model, x[:1], Budget(macs=0.6), "l2", **asked)
    result = prune(model, x[:1], Budget(macs=0.6), "l2", distill=Distill(steps=5, lr=0.5), **asked)
    assert result.report.compared == ()
    assert bits(result.model) != bits(plain.model)
