"""Operations that make one number out of the numbers at one place."""

from __future__ import annotations

from typing import Any

from coreprune.graph.ops import of_kind
from coreprune.graph.rules.einsum_space import pointwise
from coreprune.graph.rules.registry import Call, rule
from coreprune.graph.values import Value


@rule(*of_kind("elementwise"))
def element_wise(call: Call) -> Any:
    """The same function at every place. The interpreter takes it also for operations that torch tags as pointwise."""
    return pointwise(call, call.values())


@rule(*of_kind("prelu"))
def _prelu(call: Call) -> Any:
    """One slope for all channels, or one per channel of axis 1."""
    x, weight = call.args[0], call.args[1]
    shape = [1] * len(x.shape)
    if weight.maps:
        shape[1] = weight.shape[0]
    return pointwise(call, [x, Value(tuple(shape), tuple(y.reshape(shape) for y in weight.maps), weight=True)])
