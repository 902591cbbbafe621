"""What the certificates need to know about an activation function."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from coreprune.graph.ops import OPERATIONS


@dataclass(frozen=True)
class Activation:
    """The function φ between a layer and its consumers.

    lipschitz: the smallest known L with |φ(s)−φ(t)| ≤ L|s−t|, infinite when unknown.
    homogeneous: φ(λs) = λφ(s) for λ ≥ 0. zero: φ(0) = 0.
    """

    name: str
    function: Callable[[Tensor], Tensor]
    lipschitz: float
    homogeneous: bool = False
    zero: bool = True


def activation(name: str) -> Activation:
    """Look an activation up in the table of operations. For a name that is not there, nothing is certified.

    name: of an operation, or "identity" if there is no activation between the layers.
    """
    if name == "identity":
        return Activation(name, lambda x: x, 1.0, homogeneous=True)
    known = OPERATIONS.get(name)
    if known is None or known.function is None:
        return Activation(name, torch.relu, math.inf, zero=False)
    return Activation(name, known.function, known.lipschitz, known.homogeneous, known.zero)
