"""Budgets of agreement and of other losses: what they promise, look at, and say when they cannot be met."""

from __future__ import annotations

import math
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

from coreprune import Budget, Repair, apply_plan, certify, load, make_plan, make_queries, prune, save
from coreprune._progress import Clock, silent
from coreprune.errors import BudgetError, InputError
from coreprune.pruning.calibration.calibration import Asked, gather
from coreprune.pruning.controlled import set_aside, smallest
from coreprune.pruning.reporting.figures import figures
from coreprune.pruning.selectors import Magnitude
from coreprune.pruning.settings import Settings
from coreprune.pruning.tracing import trace
from coreprune.risk import upper_bound
from graph.zoo import randomise as randomised


def randomise(model: nn.Module, seed: int = 0) -> nn.Module:
    return randomised(model, seed).float()


QUICK = {"repair": Repair(descent=False)}


def mlp() -> nn.Module:
    return randomise(nn.Sequential(nn.Linear(8, 48), nn.ReLU(), nn.Linear(48, 32), nn.ReLU(), nn.Linear(32, 4)), seed=3)


def samples(n: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, 8, generator=torch.Generator().manual_seed(seed))


def differ(dense, pruned):
    return dense.argmax(1) != pruned.argmax(1)


def far(dense, pruned):
    return (dense.softmax(1) - pruned.softmax(1)).abs().sum(1) / 2


def wrong(dense, pruned, labels):
    return pruned.argmax(1) != labels


def test_the_smallest_model_that_passes_is_returned_with_the_whole_path():
    model, x = mlp(), samples(1600)
    result = prune(model, x[:1], Budget(agreement=0.95), queries=x, **QUICK)
    path = result.report.path
    assert path.samples == 1200
    assert path.level == pytest.approx(0.05)
    assert [s.passed for s in path.steps] == [True] * (len(path.steps) - 1) + [False]
    assert (path.chosen, path.next_one) == (path.steps[-2], path.steps[-1])
    assert [s.macs for s in path.steps] == sorted((s.macs for s in path.steps), reverse=True)
    assert result.report.macs[1] == path.chosen.macs < result.report.macs[0]
    assert sum(p.numel() for p in result.model.parameters()) == path.chosen.parameters
    assert result.report.agreement == path.certificate
    assert path.certificate.theorem == "T19"
    assert path.certificate.bound == pytest.approx(0.05)
    assert figures(result.report)["agreement_at_least"] == pytest.approx(0.95)
    assert f"returned: {path.chosen.macs:,} MACs" in str(result.report)
    assert certify(model, result.model, x[:1], samples(20_000, seed=9)).bound < 0.06  # of other inputs


def test_the_losses_and_bounds_of_the_path_are_those_of_the_models_on_the_samples_that_were_set_aside(monkeypatch):
    model, x, seen = mlp(), samples(900), []
    module = sys.modules["coreprune.pruning.controlled"]
    real = module.Exam.losses
    monkeypatch.setattr(module.Exam, "losses", lambda self, m, s, q: seen.append((s, q)) or real(self, m, s, q))
    result = prune(model, x[:1], Budget(metric=far, loss=0.03), queries=x, **QUICK)
    path = result.report.path
    assert result.report.agreement is None  # a bound on another loss is none on the agreement
    assert "agreement_at_least" not in figures(result.report)
    assert "the expected loss is at most 0.03" in str(result.report)
    tested = [(s, q) for s, q in seen if len(q) == path.samples]
    assert len(tested) == len(path.steps)
    used = {row.numpy().tobytes() for row in result.queries.args[0]}
    for (small, queries), step in zip(tested, path.steps, strict=True):
        rows = queries.args[0]
        assert not used & {row.numpy().tobytes() for row in rows}
        with torch.no_grad():
            loss = far(model(rows), small(rows))
        assert step.risk == pytest.approx(float(loss.double().mean()), abs=1e-6)
        assert step.bound == pytest.approx(upper_bound(loss, 0.01), abs=1e-5)
        assert step.passed == (step.bound <= 0.03)


@pytest.mark.parametrize("repeats", [pytest.param(500, marks=pytest.mark.long), 16])
def test_the_level_is_violated_in_at_most_a_share_delta_of_repetitions(repeats):
    """The whole procedure, samples, rankings, repairs and tests, again and again on new samples.

    Risks are those on 20,000 other inputs.
    """
    model, level, delta = mlp(), 0.1, 0.1
    example, others, used = samples(1), samples(20_000, seed=12345), []
    traced = trace(model, example, silent)
    budget = Budget(agreement=1 - level)
    settings = Settings(budget, Magnitude(), "samples", None, (), Repair(descent=False), None, 0, delta)
    with torch.no_grad():
        answers = model(others).argmax(1)
        violated = []
        for seed in range(repeats):
            asked, exam = set_aside(traced, Asked(example, samples(160, seed)), budget, delta, seed)
            calibration = gather(traced, asked, seed, silent)
            try:
                own = replace(settings, seed=seed)
                pruned, _, _ = smallest(traced, own, calibration, exam, Clock(silent))
            except BudgetError:
                violated.append(False)
                continue
            used.append(pruned.plan)
            violated.append(float((pruned.removed.model(others).argmax(1) != answers).double().mean()) > level)
    assert len(used) > repeats / 2  # it is of use, too
    assert np.mean(violated) <= delta + 3 * math.sqrt(delta * (1 - delta) / repeats)


@pytest.mark.parametrize("form", ["pair", "loader", "dataset", "items", "file", "saved"])
def test_labels_come_with_the_samples(form, tmp_path):
    model, x = mlp(), samples(700)
    labels = model(x).argmax(1).detach()
    np.savez(tmp_path / "samples.npz", inputs=x.numpy(), labels=labels.numpy())
    make_queries(model, x[:1], (x, labels)).save(tmp_path / "kept.safetensors")
    given = {
        "pair": (x, labels),
        "loader": DataLoader(TensorDataset(x, labels), batch_size=50),
        "dataset": TensorDataset(x, labels),
        "items": Items(x, labels),
        "file": tmp_path / "samples.npz",
        "saved": tmp_path / "kept.safetensors",
    }[form]
    found = make_queries(model, x[:1], given)
    assert len(found) == (512 if form in ("loader", "dataset", "items") else 700)
    parts = found.shuffled(5).split(100)
    for queries in (found, found.take(9), *parts, parts[0] + parts[1], found.distinct(), found.sample(50, 1)):
        assert torch.equal(model(queries.args[0]).argmax(1), queries.labels)
    assert (found + make_queries(model, x[:1], "white-noise", n=3)).labels is None


class Items(Dataset):
    """Of plain numbers, as many datasets are."""

    def __init__(self, x, labels):
        self.x, self.labels = x.numpy(), labels.tolist()

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, i):
        return self.x[i], self.labels[i]


def test_a_loss_gets_the_labels_of_its_samples():
    model, x = mlp(), samples(500)
    labels = model(x).argmax(1).detach()
    pair = prune(model, x[:1], Budget(metric=wrong, loss=0.1), queries=(x, labels), **QUICK).report.path
    same = prune(model, x[:1], Budget(metric=differ, loss=0.1), queries=x, **QUICK).report.path
    assert [s.risk for s in pair.steps] == [s.risk for s in same.steps]  # the labels are the model's own answers


def test_without_a_repair_and_with_rules_about_widths():
    model, x = mlp(), samples(600)
    budget = Budget(agreement=0.8, uniform=True, round_to=8, min_width=2)
    result = prune(model, x[:1], budget, "l2", queries=x, repair=False)
    assert not result.report.refits
    assert all(g.kept % 8 == 0 or g.locked_because for g in result.report.groups)
    assert result.report.settings.budget == budget
    again = apply_plan(model, result.plan)
    assert torch.equal(again(x), result.model(x))


def test_the_result_can_be_saved_and_read(tmp_path):
    model, x = mlp(), samples(600)
    result = prune(model, x[:1], Budget(metric=differ, loss=0.1), queries=x, **QUICK)
    save(result, tmp_path / "small")
    assert torch.equal(load(tmp_path / "small", mlp)(x), result.model(x))
    page = (tmp_path / "small" / "report.html").read_text()
    assert "Sizes that were tested" in page
    assert "differ" in page
    assert "metric=differ" in result.report.settings.call() or "metric=your_differ" in result.report.settings.call()


def test_a_cost_of_ones_own_says_what_small_means():
    model, x = mlp(), samples(600)
    seen = []
    result = prune(
        model, x[:1], Budget(agreement=0.9), queries=x, cost=lambda w: seen.append(w) or float(sum(w.values())), **QUICK
    )
    assert seen
    assert result.report.path.steps[0].share == pytest.approx(0.96)


def test_made_queries_are_enough_where_they_are_independent_draws():
    model = mlp()
    result = prune(model, samples(1), Budget(agreement=0.9), queries="propagated-moments", n_queries=128, **QUICK)
    assert result.report.path.source != "the user's data"
    assert result.report.path.source in result.report.agreement.statement


def test_made_inputs_of_the_test_are_other_ones_than_those_that_pruning_uses(monkeypatch):
    """Regression: with the seed of prune() itself the test got the inputs that decide about the training of blocks."""
    module, seen = sys.modules["coreprune.pruning.controlled"], []
    divide, collect = module.set_aside, sys.modules["coreprune.pruning.pipeline"].gather
    monkeypatch.setattr(
        sys.modules["coreprune.pruning.pipeline"],
        "set_aside",
        lambda *a: (found := divide(*a), seen.append({"test": found[1].held_out}))[0],
    )
    monkeypatch.setattr(
        sys.modules["coreprune.pruning.pipeline"],
        "gather",
        lambda *a: (found := collect(*a), seen.append({"given": found.given, "fresh": found.fresh}))[0],
    )
    prune(mlp(), samples(1), Budget(agreement=0.9), queries="white-noise", n_queries=128, seed=3, **QUICK)
    rows = {k: {r.numpy().tobytes() for r in q.args[0]} for part in seen for k, q in part.items()}
    assert len(rows["test"]) > 60
    assert not rows["test"] & (rows["given"] | rows["fresh"])


def test_too_few_samples_are_refused_before_any_work_and_the_message_says_what_they_can_show():
    model, x = mlp(), samples(1000)
    with pytest.raises(InputError, match=r"agreement=0.999 at delta=0.01 needs at least 4,603 .* can show is 0\.99"):
        prune(model, x[:1], Budget(agreement=0.999), queries=x)
    with pytest.raises(InputError, match="needs at least 459"):
        prune(model, x[:1], Budget(agreement=0.99), queries=x[:3])


def test_if_the_first_model_fails_the_error_says_how_and_what_would_help():
    model, x = mlp(), samples(300)
    with pytest.raises(
        BudgetError, match=r"agreement=0\.95 cannot be shown .* (samples of the same kind|above the level)"
    ):
        prune(model, x[:1], Budget(agreement=0.95, round_to=16), "random", queries=x, repair=False)
    always = Budget(metric=lambda dense, pruned: torch.full((len(dense),), 0.5), loss=0.3)
    with pytest.raises(BudgetError, match="above the level"):
        prune(model, x[:1], always, queries=x, **QUICK)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"agreement": 1.0}, "between 0 and 1"),
        ({"agreement": 0}, "agreement"),
        ({"agreement": "0.99"}, "must be a number"),
        ({"metric": differ}, "go together"),
        ({"loss": 0.1}, "go together"),
        ({"metric": 3, "loss": 0.1}, "must be a function"),
        ({"metric": differ, "loss": 1.5}, "between 0 and 1"),
        ({"metric": differ, "loss": 0.1, "macs": 0.5}, "metric"),
        ({"agreement": 0.9, "absolute": True}, "absolute"),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_a_budget_that_makes_no_sense_is_refused(arguments, message):
    with pytest.raises(BudgetError, match=message):
        Budget(**arguments)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"queries": None}, "Pass samples"),
        ({"distill": 5}, "does not go with distill"),
        ({"budget": Budget(metric=wrong, loss=0.1)}, "takes labels"),
        ({"budget": Budget(metric=lambda a, b: a, loss=0.1)}, "one number per sample"),
        ({"budget": Budget(metric=lambda a, b: 1 // 0, loss=0.1)}, "ZeroDivisionError"),
    ],
)
def test_a_call_that_makes_no_sense_is_refused(change, message):
    model, x = mlp(), samples(400)
    call = {"budget": Budget(agreement=0.9), "queries": x, **QUICK, **change}
    with pytest.raises(InputError, match=message):
        prune(model, x[:1], **call)


def test_inputs_that_are_optimised_together_are_refused():
    model = randomise(
        nn.Sequential(
            nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)
        )
    )
    with pytest.raises(InputError, match="optimised together"):
        prune(model, torch.zeros(1, 3, 8, 8), Budget(agreement=0.9), queries="batch-norm-inversion")


def test_a_plan_alone_and_a_part_are_refused():
    model, x = mlp(), samples(100)
    with pytest.raises(InputError, match="its result has the plan"):
        make_plan(model, x[:1], Budget(agreement=0.9), queries=x)
    whole = nn.Sequential(mlp(), nn.Linear(4, 4))
    with pytest.raises(InputError, match="whole model"):
        prune(whole, x[:1], Budget(agreement=0.9), queries=x, part="0")


def test_a_model_without_answers_needs_a_metric():
    model = randomise(nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 1)))
    with pytest.raises(InputError, match="Budget\\(metric="):
        prune(model, samples(1), Budget(agreement=0.9), queries=samples(400))


def test_a_paired_loss_is_bounded_by_hand():
    model, x = mlp(), samples(500)
    labels = torch.randint(0, 4, (500,), generator=torch.Generator().manual_seed(1))
    small = prune(model, x[:1], Budget(macs=0.3), queries=samples(200, seed=4), **QUICK).model

    def errors(output, labels):
        return output.argmax(1) != labels

    found = certify(model, small, x[:1], (x, labels), loss=errors, paired=True, delta=0.05)
    with torch.no_grad():
        change = errors(small(x), labels).double() - errors(model(x), labels).double()
    assert found.bound == pytest.approx(2 * upper_bound((1 + change) / 2, 0.05) - 1, abs=1e-6)
    low, high = found.interval
    assert low <= float(change.mean()) <= found.bound <= high
    alone = certify(model, small, x[:1], (x, labels), loss=wrong, delta=0.05)
    assert alone.bound == pytest.approx(upper_bound(errors(small(x), labels), 0.05))
    with pytest.raises(InputError, match="paired=True needs"):
        certify(model, small, x[:1], x, paired=True)
    with pytest.raises(InputError, match="takes labels"):
        certify(model, small, x[:1], x, loss=wrong)
