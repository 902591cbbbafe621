"""A forward that writes into its parameters does not write into the user's, and what is pruned equals the oracle."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import coreprune
from coreprune.graph import Traced, capture, find_groups, probe, remove
from graph.oracle import assert_same, masked_activations, random_halves
from graph.zoo import gen, randomise


class Writing(nn.Linear):
    """Changes its weight in place, in one of several ways."""

    how = ""

    def forward(self, x: Tensor) -> Tensor:
        weight, rows = self.weight, {"dim": 1, "keepdim": True}
        with torch.no_grad():
            if self.how == "scaled":
                weight.mul_(0.9)
            elif self.how == "normalised rows":
                weight.div_(weight.norm(**rows))
            elif self.how == "normalised columns":
                weight.div_(weight.norm(dim=0, keepdim=True))
            elif self.how == "copied":
                weight.copy_(weight / weight.abs().sum(**rows))
            elif self.how == "clipped":
                weight.clamp_(-0.3, 0.3)
            elif self.how == "clipped in training" and self.training:
                weight.data.clamp_(-0.3, 0.3)
        return super().forward(x)


WAYS = ("scaled", "normalised rows", "normalised columns", "copied", "clipped", "clipped in training")


def network() -> nn.Module:
    return randomise(nn.Sequential(Writing(6, 12), nn.Tanh(), Writing(12, 10), nn.Tanh(), nn.Linear(10, 3)))


@pytest.mark.parametrize("how", WAYS)
def test_writes_reach_neither_the_model_nor_the_pruned_one(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Writing, "how", how)
    model, x = network(), torch.randn(2, 6, dtype=torch.float64, generator=gen(0))
    before = copy.deepcopy(model.state_dict())
    traced = probe(Traced(model, captured := capture(model, x), find_groups(captured)))
    groups = list(traced.groups)
    result = remove(traced, random_halves(groups, gen(1)))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert "2" in result.kept or how == "normalised columns"
    for name, value in result.model.state_dict().items():
        whole = before[name]
        for dim in range(whole.dim()):
            if (name, dim) in result.masks:
                whole = whole.index_select(dim, result.masks[name, dim].nonzero()[:, 0])
        assert torch.equal(value, whole)
    fresh, original = torch.randn(4, 6, dtype=torch.float64, generator=gen(2)), copy.deepcopy(model)
    with masked_activations(original, groups, result.kept), torch.no_grad():
        assert_same([result.model(fresh)], [original(fresh)])


@pytest.mark.parametrize("how", WAYS)
def test_the_public_functions_leave_the_weights_alone(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Writing, "how", how)
    model, x = network().float(), torch.randn(2, 6, generator=gen(0))
    before = copy.deepcopy(model.state_dict())
    coreprune.list_groups(model, x)
    coreprune.prune(model, x, method="magnitude", queries=None)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_weight_that_data_is_assigned_to_is_refused_in_words() -> None:
    class Assigning(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            self.weight.data = self.weight.data.clamp(-0.2, 0.2)
            return super().forward(x)

    model, x = nn.Sequential(Assigning(6, 12), nn.Linear(12, 3)), torch.randn(2, 6)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(coreprune.ModelError, match="cannot capture"):
        coreprune.list_groups(model, x)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
