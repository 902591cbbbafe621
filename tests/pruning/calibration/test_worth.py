"""What an error is worth at the model's outputs (`Collect.worth`): curves are shares of their variance."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from coreprune import Budget, prune
from coreprune.pruning.calibration import sites
from small_networks import EXAMPLE, mlp


def errors(queries):
    report = prune(mlp(), EXAMPLE, Budget(keep=0.5), "functional", queries=queries, repair=False).report
    return {g.name: torch.tensor(g.errors) for g in report.groups if g.errors is not None}


@pytest.mark.parametrize("n", [32, 512])
def test_a_constant_answer_loses_the_share_of_the_variance_that_the_outputs_have_on_the_queries(n, gen):
    """The last group's readers are the outputs: nothing is of first order there. Used to grow with the queries."""
    x = torch.randn(n, 8, generator=gen)
    said = mlp()(x).detach().double()
    share = float(said.var(dim=0, correction=0).mean() / said.var(correction=0))
    assert float(errors(x)["2"][0]) == pytest.approx(share, rel=0.6 if n == 32 else 0.2)


def test_curves_do_not_depend_on_how_often_the_queries_are_repeated(gen):
    x = torch.randn(256, 8, generator=gen)
    once, often = errors(x), errors(x.repeat(4, 1))
    for name in once:
        assert float(often[name][0]) == pytest.approx(float(once[name][0]), rel=0.3)


@torch.library.custom_op("worthtest::halved", mutates_args=())
def halved(x: Tensor) -> Tensor:
    return x / 2


halved.register_fake(torch.empty_like)


def test_without_a_gradient_errors_weigh_the_same_and_a_warning_says_so(gen, caplog):
    """torch's "no autograd formula was registered" reached the user."""

    class Halved(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = mlp()

        def forward(self, x):
            return halved(self.net(x))

    result = prune(Halved(), EXAMPLE, Budget(macs=0.5), "functional", queries=torch.randn(64, 8, generator=gen))
    assert result.report.macs[1] <= result.report.macs[0] / 2
    assert caplog.text.count("the model has no gradient") == 1


def test_the_worth_over_features_is_that_over_outputs(gen, monkeypatch):
    """A reader of many outputs, such as a vocabulary: W would have as many rows, and VᵀWV is all that is read of it."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 40), nn.Tanh(), nn.Linear(40, 5)).double()
    queries = torch.randn(96, 8, generator=gen, dtype=torch.float64)

    def curves():
        asked = {"exclude": "2", "queries": queries, "repair": False, "compare": False}
        report = prune(model, queries[:1], Budget(keep=0.5), "functional", **asked).report
        return {g.name: torch.tensor(g.errors) for g in report.groups if g.errors is not None}

    over_outputs = curves()
    monkeypatch.setattr(sites, "_OUTPUTS", 10)
    seen = []
    inside = sites.Site.over_features
    monkeypatch.setattr(sites.Site, "over_features", lambda *a: seen.append(inside(*a)) or seen[-1])
    over_features = curves()
    assert any(seen)
    assert over_features.keys() == over_outputs.keys()
    for name, errors_ in over_outputs.items():
        assert torch.allclose(over_features[name], errors_, rtol=1e-9)
