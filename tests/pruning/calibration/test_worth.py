"""What an error is worth at the model's outputs (`Collect.worth`): curves are shares of their variance."""

from __future__ import annotations

import pytest
import torch

from coreprune import Budget, prune
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
