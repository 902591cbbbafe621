"""prune() with queries: whatever form they have, whatever goes wrong, and what the report says of the result."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from coreprune import Budget, certify, prune
from coreprune._progress import silent
from coreprune.errors import CoreprunError, InputError
from coreprune.pruning.calibration.calibration import Asked, gather
from coreprune.pruning.tracing import trace
from coreprune.queries import (
    BatchNormInversion,
    ClassImpressions,
    Mixture,
    PinkNoise,
    Queries,
    WhiteNoise,
    make_queries,
)
from coreprune.risk import upper_bound
from coreprune.selectors import SELECTORS
from graph.zoo import randomise
from oracles import worst_ratio
from queries.small import assert_same, state


def convnet() -> nn.Module:
    return randomise(
        nn.Sequential(
            *(nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(inplace=True)),
            *(nn.Conv2d(8, 6, 3, padding=1), nn.ReLU(inplace=True), nn.AdaptiveAvgPool2d(1), nn.Flatten()),
            nn.Linear(6, 4),
        )
    )


def images(n: int = 24, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, 3, 6, 6, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def same(one: nn.Module, two: nn.Module) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), two.state_dict().values(), strict=True))


@pytest.mark.slow
def test_every_form_of_the_same_samples_gives_the_same_model(tmp_path):
    model, x = convnet(), images()
    np.savez(tmp_path / "x.npz", x=x.numpy())
    made = prune(model, x[:1], queries=x)
    made.queries.save(tmp_path / "x.safetensors")
    labels = torch.zeros(len(x))
    for form in (
        DataLoader(TensorDataset(x, labels), batch_size=7),
        [(x[:10], labels[:10]), (x[10:], labels[10:])],
        str(tmp_path / "x.npz"),
        tmp_path / "x.safetensors",
        Queries((x,), {}, "mine"),
        made.queries,
    ):
        result = prune(model, x[:1], queries=form)
        assert result.plan == made.plan
        torch.testing.assert_close(result.model.state_dict(), made.model.state_dict(), rtol=1e-9, atol=1e-9)
        assert len(result.queries) == len(x)


@pytest.mark.slow
@pytest.mark.parametrize("repair", [False, True])
@pytest.mark.parametrize("method", sorted(SELECTORS))
def test_every_selector_meets_the_budget_and_repair_helps(method, repair):
    model, x = convnet(), images()
    before = state(model)
    result = prune(model, x[:1], Budget(macs=0.5), method, queries=x, repair=repair)
    assert_same(before, state(model))
    assert result.report.macs[1] <= 0.5 * result.report.macs[0]
    assert result.report.parameters[1] == sum(p.numel() for p in result.model.parameters())
    assert bool(result.report.refits) == repair
    found, wanted = result.model(x), model(x)
    assert bool(torch.isfinite(found).all())
    if repair:
        plain = prune(model, x[:1], Budget(macs=0.5), method, queries=x, repair=False)
        assert (found - wanted).square().mean() <= (plain.model(x) - wanted).square().mean()


@pytest.mark.parametrize("repair", [False, True])
def test_the_same_seed_gives_the_same_plan_and_weights(repair):
    one, two = (
        prune(convnet(), images(1), Budget(macs=0.5), queries="white-noise", repair=repair, seed=3) for _ in range(2)
    )
    assert one.plan == two.plan
    assert same(one.model, two.model)
    assert torch.equal(one.queries.args[0], two.queries.args[0])
    other = prune(convnet(), images(1), Budget(macs=0.5), queries="white-noise", repair=repair, seed=4)
    assert not torch.equal(one.queries.args[0], other.queries.args[0])


PHASES = ("capture", "queries", "statistics", "select", "repair", pytest.param("distill", marks=pytest.mark.slow))


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("phase", PHASES)
def test_an_interruption_leaves_the_model_as_it_was(phase, inplace):
    model, reached = convnet().train(), []
    before = state(model)

    def stop(name, done, total):
        reached.append(name)
        if name == phase:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prune(model, images(1), queries="white-noise", distill=3, inplace=inplace, progress=stop)
    assert reached[-1] == phase
    assert_same(before, state(model))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_activations_that_are_not_finite_are_an_error_that_names_the_layer(bad):
    model, x = convnet(), images()
    with torch.no_grad():
        model[1].bias[2] = bad
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(CoreprunError, match=r"finite|infinite|NaN"):
        prune(model, x[:1], queries=x)
    torch.testing.assert_close(dict(model.state_dict()), before, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize(
    ("queries", "match"),
    [
        (torch.zeros(5, 3, 7, 7).double(), "shape"),
        (torch.zeros(5, 1, 6, 6).double(), "shape"),
        (torch.zeros(3, 6, 6).double(), "shape"),
        (torch.zeros(0, 3, 6, 6).double(), "empty"),
        (torch.zeros(5, 3, 6, 6, dtype=torch.uint8), "uint8"),
        (torch.full((5, 3, 6, 6), float("nan")).double(), "NaN"),
        (torch.zeros(5, 3, 6, 6, dtype=torch.complex64), "complex"),
        ([], "empty"),
        ("no-such-source", "unknown queries"),
        ("missing.npz", "no file"),
        (7, "unknown queries"),
        (Queries((torch.zeros(4, 3, 5, 5).double(),), {}, "mine"), "structure, shapes and dtypes"),
        (Queries((torch.zeros(4, 3, 6, 6, dtype=torch.int64),), {}, "mine"), "structure, shapes and dtypes"),
    ],
)
def test_queries_that_do_not_fit_are_refused(queries, match):
    model = convnet()
    before = state(model)
    with pytest.raises(InputError, match=match):
        prune(model, images(1), queries=queries)
    assert_same(before, state(model))


def test_samples_of_another_device_and_precision_are_brought_over():
    model, x = convnet(), images()
    one, two = (prune(model, x[:1], queries=q) for q in (x.float(), x.float().double()))
    assert same(one.model, two.model)


def test_an_example_on_another_device_is_refused():
    model = convnet()
    with pytest.raises(CoreprunError, match="device"):
        prune(model, images(1).to("meta"), queries=images())


@pytest.mark.slow
def test_a_cache_survives_an_interruption_and_is_read_again(tmp_path):
    cache, model = tmp_path / "queries.safetensors", convnet()

    def stop(name, done, total):
        if name == "statistics":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prune(model, images(1), queries="white-noise", cache=cache, progress=stop)
    assert cache.is_file()
    drawn = []

    def watch(name, done, total):
        if name == "queries":
            drawn.append((done, total))

    again = prune(model, images(1), queries="white-noise", cache=cache, progress=watch)
    assert drawn == []
    fresh = prune(model, images(1), queries="white-noise")
    assert same(again.model, fresh.model)
    assert torch.equal(again.queries.args[0], fresh.queries.args[0])


@pytest.mark.parametrize(
    ("n", "spared"), [(1, 0), (2, 1), (20, 10), (64, 16), (256, 64), (300, 75), (512, 256), (800, 256), (1200, 300)]
)
def test_fresh_queries_are_none_of_those_that_were_used(n, spared):
    model, x = convnet(), images(n)
    found = gather(trace(model, x[:1], silent), Asked(x[:1], x, n), 0, silent)
    assert len(found.queries) == n - spared
    assert (0 if found.fresh is None else len(found.fresh)) == spared
    used = {row.numpy().tobytes() for row in found.queries.args[0]}
    run = {row.numpy().tobytes() for args, _ in found.batches for row in args[0]}
    fresh = set() if found.fresh is None else {row.numpy().tobytes() for row in found.fresh.args[0]}
    assert len(used) == n - spared
    assert run <= used
    assert not used & fresh
    assert len({len(args[0]) for args, _ in found.batches}) == 1


@pytest.mark.parametrize(("n", "used"), [(1, 1), (2, 1), (6, 3), (14, 7), (16, 8)])
def test_queries_are_made_beside_very_few_samples(n, used):
    model, x = convnet(), images(n)
    found = gather(trace(model, x[:1], silent), Asked(x[:1], x), 0, silent)
    own = {row.numpy().tobytes() for row in x}
    run = [row.numpy().tobytes() in own for args, _ in found.batches for row in args[0]]
    made = len(found.queries) - used
    assert made == (256 if used < 8 else 0)
    assert sum(run) >= used - 2  # what fills no batch is left out
    assert set(found.kinds) == {0}  # so few are none of their own
    assert {len(args[0]) for args, _ in found.batches} <= (set(range(20, 33)) if used < 8 else {4})
    assert (0 if found.fresh is None else len(found.fresh)) == n // 2
    assert found.fresh is None or found.fresh.source == "samples"
    alone = gather(trace(model, x[:1], silent), Asked(x[:1], x, n), 0, silent)
    assert len(alone.queries) == used


def test_nothing_is_made_beside_queries_that_were_made():
    model, x = convnet(), images(6)
    traced = trace(model, x[:1], silent)
    made = make_queries(model, x[:1], "white-noise", n=6, seed=0)
    assert len(gather(traced, Asked(x[:1], made), 0, silent).queries) == 3
    both = make_queries(model, x[:1], x, seed=0) + made
    assert len(gather(traced, Asked(x[:1], both), 0, silent).queries) == 6


def test_what_is_held_back_of_sorted_samples_is_like_what_is_used():
    """The last ones were held back; of a file that is sorted by class, those are classes that nothing else has seen."""
    model, x = convnet(), images(600)
    x[:300] += 100
    found = gather(trace(model, x[:1], silent), Asked(x[:1], x), 0, silent)
    shares = [float((q.args[0].mean((1, 2, 3)) > 50).double().mean()) for q in (found.queries, found.fresh)]
    assert all(0.4 < share < 0.6 for share in shares)


def test_a_loader_gives_enough_samples_for_the_agreement():
    model, x = convnet(), images(800)
    found = gather(trace(model, x[:1], silent), Asked(x[:1], DataLoader(x, batch_size=100)), 0, silent)
    assert (len(found.queries), len(found.fresh)) == (256, 256)


def test_a_source_makes_other_queries_for_the_agreement():
    model, x = convnet(), images(1)
    found = gather(trace(model, x, silent), Asked(x, "white-noise"), 0, silent)
    assert found.fresh is not None
    used, fresh = ({row.numpy().tobytes() for row in q.args[0]} for q in (found.queries, found.fresh))
    assert not used & fresh


def test_the_agreement_is_a_lower_bound_of_the_share_that_agrees():
    model, x = convnet(), images(400)
    result = prune(model, x[:1], Budget(keep=0.75), queries=x)
    certificate = result.report.agreement
    assert certificate is not None
    assert certificate.theorem == "T11"
    assert certificate.statement.startswith("on queries from the user's data the two networks")
    assert certificate.assumptions[0].endswith("are independent draws from the user's data"), "not from queries from it"
    fresh = x[300:]
    apart = (model(fresh).argmax(1) != result.model(fresh).argmax(1)).double().mean()
    assert float(apart) < certificate.bound < 1
    assert prune(model, x[:1], Budget(keep=0.75), queries=x[:1]).report.agreement is None


@pytest.mark.parametrize("seed", [0, 1, 2**32])
def test_certify_with_the_seed_of_prune_sees_other_inputs(seed, monkeypatch):
    """It drew the inputs that pruning went by, so T11 was not about fresh ones."""
    model, seen = convnet(), []
    module = sys.modules["coreprune.pruning.reporting.certify"]
    real = module.agreement
    monkeypatch.setattr(module, "agreement", lambda m, p, fresh, delta: seen.append(fresh) or real(m, p, fresh, delta))
    result = prune(model, images(1), Budget(keep=0.5), "l2", queries="white-noise", seed=seed)
    for _ in range(2):
        certify(model, result.model, images(1), "white-noise", seed=seed)
    used, found, again = ({row.numpy().tobytes() for row in q.args[0]} for q in (result.queries, *seen))
    assert not used & found
    assert found == again


@pytest.mark.parametrize("method", ["functional", "loewner", "magnitude", "folding"])
@pytest.mark.parametrize("depth", [1, 2])
def test_the_bound_of_a_refitted_layer_holds_against_an_adversary(method, depth, gen):
    """T8 after the repair: every deployed layer against the original one, on inputs that are made to break it."""
    layers = [nn.Linear(5, 16), nn.ReLU(), *(() if depth == 1 else (nn.Linear(16, 10), nn.ReLU()))]
    model = randomise(nn.Sequential(*layers, nn.Linear(16 if depth == 1 else 10, 3)), seed=depth)
    x = torch.randn(64, 5, generator=gen, dtype=torch.float64)
    result = prune(model, x[:1], Budget(keep=0.5), method, queries=x)
    assert result.report.refits
    stays = {name: torch.tensor(p.kept) for name, p in result.plan.groups.items()}
    for group in result.report.groups[:depth]:
        (bound,) = (c for c in group.certificates if c.theorem == "T8")
        at = int(group.name)
        outputs = stays.get(str(at + 2), torch.arange(3))
        inputs = stays.get(str(at - 2), torch.arange(5))

        def error(full, at=at, outputs=outputs, inputs=inputs):
            """Both networks' two layers on x with 1 appended; its last entry scales the bias."""
            y, one = full[:, :-1], full[:, -1:]
            old, new = model, result.model
            made = torch.relu(y @ old[at].weight.T + one * old[at].bias)
            less = torch.relu(y[:, inputs] @ new[at].weight.T + one * new[at].bias)
            a = made @ old[at + 2].weight[outputs].T
            return less @ new[at + 2].weight.T - a

        # The biases of the consumer differ by a constant, which the bound holds for ‖x‖ ≥ 1.
        constant = (result.model[at + 2].bias - model[at + 2].bias[outputs]).abs().max().item()
        reached = worst_ratio(error, model[at].in_features + 1, gen)
        assert 0 < reached <= bound.bound
        assert constant < bound.bound


def test_auto_selects_by_function_only_where_a_repair_follows():
    model, x = convnet(), images()
    assert prune(model, x[:1], queries=x).plan.method == "functional"
    assert prune(model, x[:1], queries=x, repair=False).plan.method == "folding"
    alone = prune(model, x[:1], queries=None)
    assert alone.plan.method == "folding"
    assert alone.plan.groups["0"].mean  # merged, not removed


def test_auto_without_queries_keeps_more_of_the_answers_than_norms_do():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 3))
    with torch.no_grad():  # every neuron twice, as k-means can see and norms cannot
        model[0].weight[6:], model[0].bias[6:] = model[0].weight[:6], model[0].bias[:6]
    x = torch.randn(50, 8)
    folded, cut = (prune(model, x[:1], Budget(keep=0.5), m, queries=None).model for m in ("auto", "magnitude"))
    assert (folded(x) - model(x)).norm() < 1e-4 * model(x).norm() < (cut(x) - model(x)).norm()


def normed():
    return randomise(
        nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(),
                      nn.Linear(32, 4))
    ).eval()  # fmt: skip


def test_inputs_that_are_optimised_together_are_no_draws():
    """One batch of inverted batch norms is one draw: 64 answers on it are no 64 independent ones (T11)."""
    model, x = normed(), images(1)
    result = prune(model, x, Budget(keep=0.5), queries=BatchNormInversion(steps=4), n_queries=16)
    assert result.report.agreement is None
    assert any(one.agreement is not None for one in result.report.compared)  # it is measured, and not certified
    assert "optimised together" in str(result.report)
    with pytest.raises(InputError, match="no independent draws"):
        certify(model, result.model, x, BatchNormInversion(steps=4), n=8)
    assert certify(model, result.model, x, "pink-noise", n=8).theorem == "T11"
    assert "optimised together" not in str(prune(model, x, Budget(keep=0.5), queries="pink-noise", n_queries=16).report)


@pytest.mark.parametrize(
    ("source", "jointly"),
    [
        (BatchNormInversion(steps=1), True),
        (Mixture((BatchNormInversion(steps=1), PinkNoise())), True),
        (ClassImpressions(BatchNormInversion(steps=1)), True),
        (Mixture((WhiteNoise(), PinkNoise())), False),
        (ClassImpressions(), False),
    ],
    ids=["inversion", "mixture", "impressions of inversions", "noise", "impressions"],
)
def test_queries_know_whether_they_are_draws(source, jointly, tmp_path):
    model, x = normed(), images(1)
    queries = make_queries(model, x, source, n=4)
    noise = make_queries(model, x, "white-noise", n=4)
    assert queries.jointly is jointly
    assert (noise + queries).jointly is (queries + noise).jointly is jointly
    assert all(part.jointly is jointly for part in (*queries.split(2), queries.shuffled(), queries.distinct()))
    queries.save(tmp_path / "q.safetensors")
    assert make_queries(model, x, tmp_path / "q.safetensors").jointly is jointly


def other_answer(dense, pruned):
    return dense.argmax(1) != pruned.argmax(1)


def distance(dense, pruned):
    return (1 - torch.cosine_similarity(dense, pruned)) / 2


def test_any_bounded_loss_is_certified_with_an_interval():
    """T18: for other answers it is T11's bound; for a distance it is that of `coreprune.risk` on the same numbers."""
    model, x = convnet(), images(300)
    small = prune(model, images(1), Budget(keep=0.75), queries="white-noise", n_queries=64).model
    counted = certify(model, small, x[:1], x, loss=other_answer, delta=0.05)
    assert counted.bound == pytest.approx(certify(model, small, x[:1], x, delta=0.05).bound)
    found = certify(model, small, x[:1], x, loss=distance, delta=0.05)
    with torch.no_grad():
        losses = distance(model(x), small(x))
    assert found.bound == pytest.approx(upper_bound(losses, 0.05), rel=1e-4)
    low, high = found.interval
    assert low <= float(losses.mean()) <= found.bound <= high
    assert (found.theorem, found.kind, found.delta) == ("T18", "sampled", 0.05)
    assert "the user's data" in found.statement


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (lambda a, b: (a - b).abs(), "one number per sample"),
        (lambda a, b: 0.5, "one number per sample"),
        (lambda a, b: a.argmax(1), "bool or real numbers"),
        (lambda a, b: a.sum(1) * 0 + 2, "in \\[0, 1\\]"),
        (lambda a, b: 1 // 0, r"loss fails on the outputs of a batch .*ZeroDivisionError"),
    ],
)
def test_a_loss_that_does_not_fit_is_explained(loss, message):
    model, x = convnet(), images(40)
    with pytest.raises(InputError, match=message):
        certify(model, model, x[:1], x, loss=loss)
