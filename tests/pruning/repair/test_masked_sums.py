"""A mask of infinities that is added to a layer's output: there, the layer is matched to its own output."""

import math

import pytest
import torch
from torch import nn

from coreprune import Budget, ModelError, Repair, prune

QUERIES = torch.randn(128, 8, generator=torch.Generator().manual_seed(0))


class Masked(nn.Module):
    """Two layers, and a mask by the input that is added to the second one's output. value: of the masked entries."""

    def __init__(self, value: float, gated: bool = False):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.c = nn.Linear(8, 32), nn.Linear(32, 6), nn.Linear(6, 3)
        self.value, self.gated = value, gated

    def forward(self, x):
        mask = torch.where(x[:, :6] > 1, self.value, 0.0)
        y = self.b(torch.relu(self.a(x))) + mask
        return self.c(torch.relu(y)) if self.gated else torch.softmax(y, -1)


def pruned(model: nn.Module) -> nn.Module:
    # Magnitude chooses the same units whatever is masked, so that the repairs can be compared.
    options = {"queries": QUERIES, "repair": Repair(descent=False), "progress": False}
    return prune(model.eval(), QUERIES[:1], Budget(macs=0.5), "l2", **options).model


def test_the_repair_is_that_without_a_mask():
    # The mask does not depend on what was pruned: nothing in the sum is to be corrected, masked or not.
    with_mask, without = pruned(Masked(-math.inf)), pruned(Masked(0.0))
    for name, tensor in without.named_parameters():
        torch.testing.assert_close(with_mask.get_parameter(name), tensor, rtol=1e-4, atol=1e-5, msg=name)


def test_behind_a_relu():
    model = Masked(-math.inf, gated=True)
    small = pruned(model)
    fresh = torch.randn(512, 8, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        want, got = model(fresh), small(fresh)
        middle = want.mean(0)
    assert bool(got.isfinite().all())
    assert float((got - want).square().mean()) < 0.2 * float((want - middle).square().mean())


def test_not_a_number_is_no_mask():
    with pytest.raises(ModelError, match=r"b\.weight \(6, 32\) cannot be refitted"):
        pruned(Masked(math.nan))
