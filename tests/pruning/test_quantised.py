"""Quantised models are refused with one sentence, whatever quantised them."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn
from torch.testing._internal.two_tensor import TwoTensor

from coreprune import InputError, prune

X = torch.randn(2, 4, generator=torch.Generator().manual_seed(0))


def net() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))


def prepared() -> nn.Module:
    from torch.ao import quantization as q

    model = net().train()
    model.qconfig = q.get_default_qat_qconfig("fbgemm")  # type: ignore[assignment]
    return q.prepare_qat(model).eval()


def inside() -> nn.Module:
    """Weights that hold integers inside, as those of torchao do."""
    model = net()
    whole = torch.zeros(8, 4, dtype=torch.int8)
    model[0].weight = nn.Parameter(TwoTensor(whole, whole), requires_grad=False)
    return model


class Packed(nn.Parameter):
    """Integers with a scale beside them, as those of bitsandbytes."""


def packed() -> nn.Module:
    model = net()
    model[0].weight = Packed(torch.zeros(16, 1, dtype=torch.uint8), requires_grad=False)
    return model


@pytest.mark.parametrize("make", [prepared, inside, packed])
def test_quantised_models_are_refused(make) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch deprecates its own quantisation
        model = make()
    with pytest.raises(InputError, match="Prune first, then quantise"):
        prune(model, X, queries=None)
    assert prune(net(), X, queries=None).model(X).shape == (2, 2)
