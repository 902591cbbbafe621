"""A layer that computes NaN or infinity cannot be refitted: the error names it, and the model stays as it was."""

import copy
import math

import pytest
import torch
from torch import nn

from coreprune import Budget, ModelError, prune


def dense() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4)).eval()


def conv() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 4, 3)
    ).eval()


@pytest.mark.parametrize("name", ["4.weight", "4.bias"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("build", [dense, conv])
def test_the_error_names_the_layer_and_the_tensor(build, name, value):
    model = build()
    with torch.no_grad():
        model.get_parameter(name).view(-1)[3] = value
    before = copy.deepcopy(model.state_dict())
    queries = torch.randn(32, *((8,) if build is dense else (3, 6, 6)), generator=torch.Generator().manual_seed(0))
    with pytest.raises(ModelError, match=rf"4\.weight \(4, .*cannot be refitted: {name} has a NaN or infinite entry"):
        prune(model, queries[:1], Budget(macs=0.6), "l2", queries=queries, progress=False)
    for key, tensor in model.state_dict().items():
        assert torch.equal(tensor.nan_to_num(7.0), before[key].nan_to_num(7.0)), key


def test_finite_weights_whose_outputs_overflow():
    model = dense()
    with torch.no_grad():
        model[4].weight.mul_(1e38)
    queries = 100 * torch.randn(32, 8, generator=torch.Generator().manual_seed(0))
    with pytest.raises(ModelError, match=r"4\.weight \(4, 16\) cannot be refitted: what it reads or is to compute"):
        prune(model, queries[:1], Budget(macs=0.6), "l2", queries=queries, progress=False)


def test_without_repair_the_other_groups_are_cut():
    model = dense()
    with torch.no_grad():
        model[4].weight[0, 3] = math.nan
    small = prune(model, torch.zeros(1, 8), Budget(macs=0.6), "l2", queries=None, repair=False, progress=False).model
    assert small[0].out_features < 16
    assert small[2].out_features == 16
    assert torch.equal(small[4].weight.nan_to_num(7.0), model[4].weight.nan_to_num(7.0))
