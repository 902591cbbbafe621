"""Operations that make one number out of the numbers at one place."""

from __future__ import annotations

from typing import Any

from torch.utils import _pytree as pytree

from coreprune.graph.ops import of_kind
from coreprune.graph.rules.einsum_space import pointwise
from coreprune.graph.rules.lookup import lines
from coreprune.graph.rules.movement import move
from coreprune.graph.rules.registry import Call, rule
from coreprune.graph.values import Value


@rule(*of_kind("elementwise"))
def element_wise(call: Call) -> Any:
    """The same function at every place. The interpreter takes it also for operations that torch tags as pointwise."""
    leaves = zip(
        *(pytree.tree_leaves(x) for x in ((call.args, call.kwargs), (call.node.args, call.node.kwargs))), strict=True
    )
    pairs = [(value, node) for value, node in leaves if isinstance(value, Value)]
    return pointwise(call, [v for v, _ in pairs], sources=[n for _, n in pairs])


@rule(*of_kind("prelu"))
def _prelu(call: Call) -> Any:
    """One slope for all channels, or one per channel of axis 1."""
    x, weight = call.args[0], call.args[1]
    shape = [1] * len(x.shape)
    if weight.maps:
        shape[1] = weight.shape[0]
    return pointwise(call, [x, Value(tuple(shape), tuple(y.reshape(shape) for y in weight.maps), weight=True)])


@rule(*of_kind("complex"))
def _complex(call: Call) -> Any:
    """[..., 2] -> [...]: the real and the imaginary part leave together."""
    x = call.args[0]
    last = len(x.shape) - 1
    pairs = lines(call, x, {last}, f"both parts of a complex number ({call.node.name})")
    return x.with_maps([ids.squeeze(last) for ids in pairs], call.shape)


@rule(*of_kind("real"))
def _real(call: Call) -> Any:
    """[...] -> [..., 2]: both parts belong to the channel of the complex number."""
    return move(call.args[0], lambda ids: ids.unsqueeze(-1).expand(*ids.shape, 2))
