"""Held-out curves of a group: what orders the units, what refits, and what measures are kept apart."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import nn

from coreprune import Budget, prune
from coreprune._progress import silent
from coreprune.coreset import held_out_curve
from coreprune.pruning.calibration.calibration import Asked, gather
from coreprune.pruning.calibration.sites import Collect
from coreprune.pruning.calibration.statistics import collect_readers
from coreprune.pruning.layer.read import read_layer
from coreprune.pruning.plans.decide import rank
from coreprune.pruning.plans.error_curves import held_out
from coreprune.pruning.tracing import trace
from coreprune.selectors import L2, Functional
from features import normal, seen
from graph.zoo import randomise


def mlp():
    return randomise(nn.Sequential(nn.Linear(6, 20), nn.ReLU(), nn.Linear(20, 5)))


def ranked(model, x, selector):
    traced = trace(model, x[:1], silent)
    calibration = gather(traced, Asked(x[:1], x, len(x)), 0, silent)
    readers = dict(collect_readers(traced, calibration, Collect(), torch.Generator().manual_seed(0), silent))
    return traced, calibration, rank(traced, selector, readers.items(), 0, silent), readers


def test_the_halves_are_the_moments_of_whole_batches():
    """Two folds, each seen by one and unseen by the other; positions of one image are on one side."""
    model, x = mlp(), normal(64, 6)
    _traced, calibration, _decisions, readers = ranked(model, x, L2())
    (reader,) = readers["0"]
    batches = [seen(model, args[0])["2"][0].double() for args, _ in calibration.batches]
    even, odd = torch.cat(batches[::2]), torch.cat(batches[1::2])
    assert len(even) == len(odd) == 24  # 48 of 64; 16 are held back
    for fold, (a, b) in zip(reader.folds, ((even, odd), (odd, even)), strict=True):
        inside, outside = a - a.mean(0), b - a.mean(0)
        assert torch.allclose(fold.seen, inside.T @ inside / len(a), atol=1e-10)
        assert torch.allclose(fold.unseen, outside.T @ outside / len(b), atol=1e-10)
        assert torch.equal(fold.gram, reader.gram)
    whole = torch.cat([even, odd])
    assert torch.allclose(reader.mean, whole.mean(0), atol=1e-10)
    assert torch.allclose(reader.covariance, (whole - whole.mean(0)).T @ (whole - whole.mean(0)) / 48, atol=1e-10)


def test_an_order_that_goes_by_the_queries_has_not_seen_those_that_measure():
    traced, _, decisions, readers = ranked(mlp(), normal(64, 6), L2())
    decision, used = decisions["0"], []
    layer = dataclasses.replace(read_layer(traced.tensors, traced.captured, decision.group), readers=readers["0"])

    class Spy(Functional):
        def __call__(self, layer, generator):
            used.append(layer.readers[0].covariance)
            return super().__call__(layer, generator)

    found = held_out(decision.group, layer, decision.ranking, Spy(), torch.Generator())
    (reader,) = layer.readers
    assert [torch.equal(u, fold.seen) for u, fold in zip(used, reader.folds, strict=True)] == [True, True]
    orders = [
        Functional()(
            dataclasses.replace(layer, readers=(dataclasses.replace(reader, covariance=u),)), torch.Generator()
        ).order
        for u in used
    ]
    curves = torch.stack([held_out_curve(f, 20, order) for f, order in zip(reader.folds, orders, strict=True)])
    assert torch.allclose(found, curves.mean(0).amin(0).cummin(0).values)


def test_a_single_query_has_no_held_out_curve():
    _, _, decisions, _ = ranked(mlp(), normal(1, 6), Functional())
    assert decisions["0"].curve is not None
    assert decisions["0"].held_out is None


def test_widths_go_by_the_unseen_error():
    """A wide layer on few queries looks free: twelve rows fit twelve units exactly. It is not."""
    model = randomise(nn.Sequential(nn.Linear(6, 24), nn.ReLU(), nn.Linear(24, 200), nn.ReLU(), nn.Linear(200, 5)))
    x = normal(24, 6)
    result = prune(model, x[:1], Budget(error=0.05), queries=x, compare=False)
    wide = next(g for g in result.report.groups if g.channels == 200)
    assert wide.held_out is not None
    assert wide.errors is not None
    assert wide.errors[20] < 0.2 * wide.held_out[20]  # a tenth of the units, on 12 or fewer rows
    assert wide.kept > 60
    assert wide.held_out[wide.kept] <= 0.05


@pytest.mark.parametrize("method", ["l2", "functional"])
def test_the_report_shows_both_errors(method):
    model, x = mlp(), normal(64, 6)
    result = prune(model, x[:1], Budget(keep=0.5), method, queries=x)
    (group,) = [g for g in result.report.groups if g.locked_because is None]
    text, data = str(result.report), result.report.as_dict()
    assert "on unseen queries" in text
    assert (
        data["groups"][0]["held_out"] == list(group.held_out) or tuple(data["groups"][0]["held_out"]) == group.held_out
    )
    certificate = next(c for c in group.certificates if c.theorem == "T10")
    share = group.held_out[group.kept] / certificate.trivial
    assert f"{share:.2%}" in text
    assert f"on unseen queries {100 * share:.3g} %" in certificate.statement


def least_squares(reader, kept: list[int], x: torch.Tensor) -> torch.Tensor:
    """The errors of a reader's outputs, (m, J), after a least-squares refit on some features, with intercept."""
    wanted = x @ reader.weight.T
    a = torch.cat([x[:, kept], torch.ones(len(x), 1, dtype=x.dtype)], dim=1)
    return wanted - a @ torch.linalg.lstsq(a, wanted, driver="gelsd").solution


def test_t10_is_about_weighed_errors_and_no_mean_squared_error():
    """Large outputs: the mean squared error of the refit is far above the bound, which is on the weighed one."""
    model, x = mlp(), normal(64, 6)
    with torch.no_grad():
        model[2].weight *= torch.tensor([1.0, 5.0, 20.0, 50.0, 100.0])[:, None]
    result = prune(model, x[:1], Budget(keep=0.5), "l2", queries=x)
    (group,) = [g for g in result.report.groups if g.locked_because is None]
    (certificate,) = [c for c in group.certificates if c.theorem == "T10"]
    _traced, calibration, _decisions, readers = ranked(model, x, L2())
    (reader,) = readers["0"]
    rows = torch.cat([seen(model, args[0])["2"][0].double() for args, _ in calibration.batches])
    kept = result.rankings["0"].order[:10].tolist()
    off = least_squares(reader, kept, rows)
    inverse = torch.linalg.pinv(reader.weight)
    worth = inverse.T @ reader.gram @ inverse  # G = VᵀWV, and V has more columns than rows
    weighed = float(((off @ worth) * off).sum()) / len(rows)
    wanted = rows @ reader.weight.T
    wanted = wanted - wanted.mean(dim=0)
    assert weighed <= certificate.bound * (1 + 1e-6)
    assert certificate.trivial == pytest.approx(float(((wanted @ worth) * wanted).sum()) / len(rows), rel=1e-3)
    plain, variance = float(off.square().sum(dim=1).mean()), float(wanted.square().sum(dim=1).mean())
    assert plain > 10 * certificate.bound
    assert plain / variance != pytest.approx(certificate.bound / certificate.trivial, rel=0.02)
    told = certificate.statement + " ".join(certificate.assumptions)
    assert "weighed error" in told
    assert "what it does to the model's outputs" in told
    assert "mean squared" not in told
    assert "variance" not in told
    assert "weighed by their effect on the outputs" in str(result.report)


def test_what_is_no_bound_is_not_called_one(monkeypatch):
    """Above `Collect.features` the curve is that of channels, scaled by a sample of patches (T14)."""
    from coreprune.pruning import stages

    model = randomise(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3), nn.Flatten(), nn.Linear(64, 5)))
    x = normal(32, 3, 8, 8)

    def certificate():
        result = prune(model, x[:1], Budget(keep=0.5), "l2", queries=x)
        return next(c for g in result.report.groups if g.name == "0" for c in g.certificates if c.theorem == "T10")

    assert "at most the bound" in certificate().statement
    monkeypatch.setattr(stages, "Collect", lambda: Collect(features=16))
    told = certificate()
    assert "about this number" in told.statement
    assert "at most" not in told.statement
    assert "an estimate, not a bound" in " ".join(told.assumptions)
