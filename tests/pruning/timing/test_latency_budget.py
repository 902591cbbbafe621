"""Budgets of time, with clocks that count multiplications: what is met, corrected, refused, reported and stored."""

from __future__ import annotations

import json
import logging

import pytest
import torch
from fake_clocks import Clocks
from torch import nn

import coreprune
from coreprune import Budget, BudgetError, InputError, make_plan, prune
from coreprune.artifact import read_plan
from coreprune.pruning.timing import pace
from small_networks import bits

EXAMPLE = torch.zeros(1, 16)


def network(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        layers = [nn.Linear(16, 96), nn.ReLU(), nn.Linear(96, 64), nn.ReLU(), nn.Linear(64, 10)]
        return nn.Sequential(*layers).to(dtype)


def cut(latency: float | str, model: nn.Module | None = None, **more):
    rules = {k: more.pop(k) for k in ("batch", "runtime", "table", "uniform", "round_to") if k in more}
    more = {"method": "l2", "queries": None, **more}
    return prune(network() if model is None else model, EXAMPLE, Budget(latency=latency, **rules), **more)


def test_a_share_of_the_time_is_met_and_reported(install):
    clocks = install(Clocks())
    result = cut(0.5)
    met, dense = result.report.latency_budget, clocks.of(network(), EXAMPLE)
    assert met.before == pytest.approx(dense)
    assert met.limit == pytest.approx(0.5 * dense)
    assert met.after == pytest.approx(clocks.of(result.model, EXAMPLE)), "the time is that of what is returned"
    assert 0.9 * met.limit < met.after <= met.limit
    assert met.predicted == pytest.approx(met.after, rel=0.05), "the fake times are linear, up to the grid"
    assert (met.batch, met.runtime, met.threads) == (1, "eager", torch.get_num_threads())
    text = str(result.report)
    assert f"latency    {1e6 * met.before:.3g} us → {1e6 * met.after:.3g} us a call (batch 1, eager, cpu" in text
    assert json.loads(result.report.to_json())["latency_budget"]["after"] == met.after
    assert result.plan.budget["latency"] == 0.5
    assert "Budget(latency=0.5)" in result.report.settings.call()


@pytest.mark.parametrize("factor", [0.2, 5.0])
@pytest.mark.parametrize("form", ["text", "share"])
def test_a_table_that_is_wrong_by_a_factor_is_put_right(install, factor, form):
    clocks = install(Clocks(piece=lambda t: factor * t))
    dense = clocks.of(network(), EXAMPLE)
    result = cut(f"{1e6 * 0.6 * dense:.6f}us" if form == "text" else 0.6)
    met = result.report.latency_budget
    assert 0.9 * met.limit < clocks.of(result.model, EXAMPLE) <= met.limit
    assert met.limit == pytest.approx(0.6 * dense, rel=1e-4)
    assert met.corrections <= 5


@pytest.mark.parametrize("power", [0.4, 2.5])
def test_a_time_that_is_no_line_in_the_table_is_corrected(install, power):
    """The whole is slower, or faster, than the line between the dense and the narrowest model says."""
    clocks = install(Clocks(whole=lambda t: 1e-6 * (1e6 * t) ** power))
    result = cut(0.5)
    met = result.report.latency_budget
    assert clocks.of(result.model, EXAMPLE) <= met.limit
    assert met.after >= 0.8 * met.limit, "too narrow widths are widened again"
    assert 1 <= met.corrections <= 5


def test_time_that_no_width_changes_is_taken_into_account(install):
    """Half of the time is overhead: to save a quarter of the whole, half of the rest has to go."""
    dense = Clocks().of(network(), EXAMPLE)
    clocks = install(Clocks(whole=lambda t: t + dense))
    result = cut(0.75)
    assert clocks.of(result.model, EXAMPLE) <= 0.75 * 2 * dense
    assert Clocks().of(result.model, EXAMPLE) == pytest.approx(0.5 * dense, rel=0.1)
    assert result.report.latency_budget.corrections == 0


def test_a_budget_out_of_reach_names_the_least_that_was_reached(install):
    dense = Clocks().of(network(), EXAMPLE)
    clocks = install(Clocks(whole=lambda t: t + dense))
    model = network()
    before, wholes = bits(model), clocks.wholes
    with pytest.raises(BudgetError, match=r"still takes .* us \(50\.\d% of the dense model's .*the least that was"):
        cut(0.4, model)
    assert bits(model) == before
    assert clocks.wholes == wholes + 1, "the narrowest model alone shows it"
    with pytest.raises(BudgetError, match=r"latency='1us' allows 1 us .* least width it still takes"):
        cut("1us", model)


def test_when_five_corrections_find_nothing_the_least_is_named(install):
    """Anything but the narrowest model takes nine tenths of the time."""
    least, dense = 1e-6 * (0.002 + 2 * (16 + 1 + 10) / 1000), Clocks().of(network(), EXAMPLE)
    clocks = install(Clocks(whole=lambda t: dense if t == dense else 0.1 * dense if t < 1.5 * least else 0.9 * dense))
    with pytest.raises(BudgetError, match=r"after 5 corrections no widths .* the least that was reached is .*\(10\.0%"):
        cut(0.5)
    assert clocks.wholes == 1 + 6


def test_a_time_that_the_dense_model_takes_anyway_removes_nothing(install):
    install(Clocks())
    result = cut("1s")
    assert result.report.macs[0] == result.report.macs[1]
    assert result.report.latency_budget.corrections == 0


def test_the_same_table_gives_the_same_plan_without_timing_operations_again(install, tmp_path):
    clocks = install(Clocks())
    table = tmp_path / "times.json"
    first = cut(0.5, table=table)
    assert clocks.pieces > 0
    assert first.report.latency_budget.timed > 0

    def never(t: float) -> float:
        pytest.fail("an operation is timed again")

    clocks.piece, wholes = never, clocks.wholes
    second = cut(0.5, table=table)
    assert second.plan == first.plan
    assert second.report.latency_budget.timed == 0
    assert clocks.wholes == wholes + 1, "whether the result is within the limit is measured every time"
    plan = make_plan(network(), EXAMPLE, Budget(latency=0.5, table=str(table)), "l2", queries=None)
    assert plan == first.plan
    with pytest.raises(pytest.fail.Exception, match="timed again"):
        cut(0.5, table=table, batch=3)


def test_a_machine_that_got_faster_or_slower_is_noticed_although_times_are_stored(install, tmp_path):
    """Stored times only say where to begin; a limit in seconds is about what is measured now."""
    clocks = install(Clocks())
    dense = clocks.of(network(), EXAMPLE)
    limit = f"{1e6 * 0.5 * dense:.6f}us"
    first = cut(limit, table=tmp_path / "t.json")
    clocks.whole = lambda t: 1.5 * t
    second = cut(limit, table=tmp_path / "t.json")
    assert clocks.of(second.model, EXAMPLE) <= 0.5 * dense
    assert second.report.macs[1] < first.report.macs[1]
    assert second.report.latency_budget.corrections >= 1


def test_queries_repair_and_the_safety_net_stay_within_the_limit(install):
    clocks = install(Clocks())
    generator = torch.Generator().manual_seed(0)
    result = prune(network(), EXAMPLE, Budget(latency=0.5), queries=torch.randn(64, 16, generator=generator))
    assert len(result.report.compared) > 2, "other cuts were made, each with widths of its own"
    assert clocks.of(result.model, EXAMPLE) <= 0.5 * clocks.of(network(), EXAMPLE)
    assert result.report.latency_budget.after == pytest.approx(clocks.of(result.model, EXAMPLE))
    assert "latency" in result.report.seconds


def test_uniform_widths(install):
    install(Clocks())
    kept = {g.kept / g.channels for g in cut(0.5, uniform=True, round_to=8).report.groups if not g.locked_because}
    assert max(kept) - min(kept) <= 8 / 64


def test_the_batch_is_what_is_timed(install, tmp_path):
    install(Clocks())
    result = cut(0.5, batch=5, table=tmp_path / "t.json")
    assert result.report.latency_budget.batch == 5
    assert "float32[5,16]" in (tmp_path / "t.json").read_text()
    assert result.report.latency_budget.before > 4 * Clocks().of(network(), EXAMPLE)


def test_a_model_without_a_batch_takes_one_example_at_a_time(install):
    install(Clocks())
    assert cut(0.5, batch_axis=None).report.latency_budget.batch == 1
    with pytest.raises(InputError, match="batch=2, but this model has no batch"):
        cut(0.5, batch=2, batch_axis=None)


def test_a_model_in_half_precision_is_timed_in_half_precision(install, tmp_path):
    """It is pruned in float32, whose times say nothing of it."""
    install(Clocks())
    seen = set()

    class Noted(nn.Module):
        def forward(self, x):
            seen.add(x.dtype)
            return x

    model = nn.Sequential(*network(torch.bfloat16), Noted())
    result = prune(
        model, EXAMPLE.bfloat16(), Budget(latency=0.5, table=tmp_path / "t.json"), "l2", queries=None, repair=False
    )
    stored = (tmp_path / "t.json").read_text()
    assert "bfloat16[1,16]" in stored
    assert "float32[1,16]" not in stored.replace("bfloat16", "")
    assert torch.bfloat16 in seen
    assert next(result.model.parameters()).dtype == torch.bfloat16


def test_groups_that_may_not_shrink_are_left_whole(install):
    clocks = install(Clocks())
    result = cut(0.7, exclude="0")
    assert {g.name: g.kept for g in result.report.groups}["0"] == 96
    assert clocks.of(result.model, EXAMPLE) <= 0.7 * clocks.of(network(), EXAMPLE)
    with pytest.raises(BudgetError, match="no group of channels is free"):
        cut(0.7, exclude="*")


def test_a_group_that_turns_out_to_be_locked_leaves_the_others_to_meet_the_limit(install, monkeypatch):
    """Surgery may find that a group has to stay whole, after its width was chosen."""
    from coreprune.pruning import stages

    clocks, real, locked = install(Clocks()), stages.remove, []

    def remove(traced, keep, **more):
        removed = real(traced, keep, **more)
        if not locked:
            locked.append("2")
            object.__setattr__(removed, "locked", {"2": "a reason"})
        return removed

    monkeypatch.setattr(stages, "remove", remove)
    result = cut(0.7)
    assert result.report.locked["2"] == "a reason"
    assert clocks.of(result.model, EXAMPLE) <= 0.7 * clocks.of(network(), EXAMPLE)


def test_an_artifact_says_how_the_time_was_met(install, tmp_path):
    install(Clocks())
    result = cut(0.5, table=tmp_path / "t.json", batch=2)
    coreprune.save(result, tmp_path / "small")
    loaded = coreprune.load(tmp_path / "small", network)
    assert bits(loaded) == bits(result.model)
    plan = read_plan(tmp_path / "small")
    assert plan == result.plan
    assert plan.budget["latency"] == 0.5
    assert plan.budget["batch"] == 2
    report = json.loads((tmp_path / "small" / "report.json").read_text())
    assert report["latency_budget"]["after"] == result.report.latency_budget.after
    assert "The budget was a time of" in (tmp_path / "small" / "report.html").read_text()
    again = coreprune.apply_plan(network(), plan, EXAMPLE)
    assert bits(again) == bits(result.model), "a plan is carried out without a clock"


def test_the_clock_of_this_machine_is_asked_for_medians_in_turn(monkeypatch):
    asked = []
    monkeypatch.setattr(
        pace._timing, "interleaved", lambda calls, *rest: asked.append((calls, rest)) or [[3.0, 1.0, 2.0]]
    )
    assert pace._clock(torch.device("cpu"), 0.5, 7)(["call"]) == [2.0]
    ((calls, (seconds, repeats, _)),) = asked
    assert (calls, seconds, repeats) == (["call"], 0.5, 7)


def test_what_is_tried_is_logged(install, caplog):
    install(Clocks())
    with caplog.at_level(logging.INFO, "coreprune"):
        cut(0.5)
    assert "predicted" in caplog.text
