"""What the certificates need to know of an activation function."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Activation:
    """φ between a layer and its consumers.

    lipschitz: smallest known L with |φ(s)−φ(t)| ≤ L|s−t|; infinite when unknown.
    homogeneous: φ(λs) = λφ(s) for λ ≥ 0. zero: φ(0) = 0.
    """

    name: str
    function: Callable[[Tensor], Tensor]
    lipschitz: float
    homogeneous: bool = False
    zero: bool = True


_F = torch.nn.functional
# GELU, SiLU, Mish and Hardswish are steeper than 1; their largest slopes are rounded up.
KNOWN = {
    a.name: a
    for a in (
        Activation("identity", lambda x: x, 1.0, homogeneous=True),
        Activation("relu", torch.relu, 1.0, homogeneous=True),
        Activation("leaky_relu", _F.leaky_relu, 1.0, homogeneous=True),
        Activation("relu6", _F.relu6, 1.0),
        Activation("hardtanh", _F.hardtanh, 1.0),
        Activation("tanh", torch.tanh, 1.0),
        Activation("elu", _F.elu, 1.0),
        Activation("gelu", _F.gelu, 1.1290),
        Activation("silu", _F.silu, 1.0999),
        Activation("mish", _F.mish, 1.0887),
        Activation("hardswish", _F.hardswish, 1.5),
        Activation("sigmoid", torch.sigmoid, 0.25, zero=False),
        Activation("softplus", _F.softplus, 1.0, zero=False),
    )
}


def activation(name: str) -> Activation:
    """Return the known activation of that name, or one about which nothing is certified."""
    return KNOWN.get(name, Activation(name, torch.relu, math.inf, zero=False))
