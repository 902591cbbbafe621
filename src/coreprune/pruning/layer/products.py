"""Products of two activations that read a group, such as q·k of attention, seen as linear maps (T16).

One operand is taken as what is read, like the input of a linear layer, and the other one plays the part of the weights.
If a softmax over the tokens of an operand follows, that operand is read: the softmax does not see what is added to all
of its tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from coreprune.graph import Captured, Group
from coreprune.graph.groups import Consumer
from coreprune.graph.ops import op_name, operation
from coreprune.pruning.layer.linear_maps import Operator

_PRODUCTS = ("matmul", "attention")
_KEYS = 1  # the position of the keys among the arguments of both


@dataclass(frozen=True, eq=False)
class Product:
    """An operand of a product whose channels are summed over. It has the interface of an `Operator` of weight one.

    node: the operand. reader: the product. axis: of the channels, from the end. centred: whether a constant that is
    added to all tokens of one sample changes nothing. partner: the weight of the layer that makes the other operand and
    nothing else, or "". index: the channel of the group at every position.
    """

    node: fx.Node
    reader: fx.Node
    axis: int
    centred: bool
    partner: str
    index: Tensor
    kernel: tuple[int, ...] = ()
    groups: int = 1
    taps: int = 1

    @property
    def source(self) -> fx.Node:
        """What is read."""
        return self.node

    @property
    def weight(self) -> str:
        """A name for messages."""
        return f"the product {self.reader.name}"

    @property
    def channel_axis(self) -> int:
        """The axis of the channels."""
        return self.axis

    def features(self, x: Tensor, rows: Tensor | None = None) -> Tensor:
        """What is summed over, (1, rows, n), less its mean over the tokens where that changes nothing."""
        x = x.movedim(self.axis, -1)
        return self._flat(x - x.mean(dim=-2, keepdim=True) if self.centred else x, rows)

    def outputs(self, y: Tensor, rows: Tensor | None = None) -> Tensor:
        """A tensor of the shape of the operand, such as its gradient, as (1, rows, n)."""
        return self._flat(y.movedim(self.axis, -1), rows)

    def count(self, y: Tensor) -> int:
        """How many rows there are."""
        return y.numel() // y.shape[self.axis]

    @staticmethod
    def _flat(x: Tensor, rows: Tensor | None) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])
        return (flat if rows is None else flat[rows])[None]


def products_of(group: Group, captured: Captured, operators: Mapping[str, Operator]) -> list[Product]:
    """The products that read a group, one for each node that multiplies two activations.

    captured: traced at the size of the batches, with the node names that the group speaks of. operators: its linear
    maps.
    """
    nodes = {node.name: node for node in captured.graph.graph.nodes}
    makers = {o.node: o for o in operators.values()}
    by_reader: dict[str, list[Consumer]] = {}
    for consumer in group.consumers:
        if not consumer.slices and consumer.index.ndim == 1:
            by_reader.setdefault(consumer.node, []).append(consumer)
    found = []
    for name, consumers in by_reader.items():
        reader = nodes.get(name)
        if reader is None or operation(reader).kind not in _PRODUCTS or len(reader.args) <= _KEYS:
            continue
        keys = next((c for c in consumers if nodes.get(c.source) is reader.args[_KEYS]), None)
        consumer = keys or consumers[0]
        node = nodes.get(consumer.source)
        if node is None or node.meta["val"].dim() < 2:
            continue
        axis = consumer.axis if consumer.axis < 0 else consumer.axis - node.meta["val"].dim()
        other: Any = reader.args[1 - _KEYS] if keys else None
        centred = keys is not None and axis >= -2 and _softmaxed(reader)
        partner = "" if other is None or other is node else _maker(other, makers, group)
        found.append(Product(node, reader, axis, centred, partner, consumer.index))
    return found


def _softmaxed(product: fx.Node) -> bool:
    """Whether a softmax over the last axis follows, after steps that keep what is constant along that axis constant."""
    node = product
    if operation(node).kind == "attention":
        return True
    while len(node.users) == 1:
        (user,) = node.users
        name = op_name(user)
        if name in ("softmax", "log_softmax"):
            return len(user.args) > 1 and user.args[1] in (-1, node.meta["val"].dim() - 1)
        shifted = name in ("add", "sub") and user.args[0] is node and not user.kwargs
        if not (shifted or _by_number(user) or (operation(user).identity and operation(user).holds_for(user))):
            return False
        node = user
    return False


def _by_number(node: fx.Node) -> bool:
    return op_name(node) in ("mul", "div") and not node.kwargs and not isinstance(node.args[1], fx.Node)


def _maker(operand: fx.Node, makers: Mapping[fx.Node, Operator], group: Group) -> str:
    """The weight of the linear map whose output the operand is, in another layout or times a number; or ""."""
    node = operand
    while node not in makers:
        known = operation(node)
        if (
            not (_by_number(node) or known.bijective or (known.identity and known.holds_for(node)))
            or len(node.users) != 1
        ):
            return ""
        node = node.all_input_nodes[0]
    operator = makers[node]
    made = any((s.param, s.dim) == (operator.weight, operator.out_dim) for s in group.producers)
    return operator.weight if made and len(node.users) == 1 and operator.groups == 1 else ""


def rows_of(operator: Operator, group: Group) -> Tensor:
    """The channel of the group that every output of an operator is, or −1."""
    return next(s.index for s in group.producers if (s.param, s.dim) == (operator.weight, operator.out_dim))


def mixing(index: Tensor, n: int, into: Tensor, kept: Tensor) -> Tensor:
    """The map of a layer's outputs (o, o) that replaces those of the kept channels by `into`ᵀ of all n channels.

    index: the channel of every output, or −1. into: (n, k), from `bilinear_map`.
    """
    live = (index >= 0).nonzero()[:, 0]
    place = torch.empty(n, dtype=torch.int64)
    place[index[live]] = live
    out = torch.eye(len(index), dtype=into.dtype, device=into.device)
    out[live] = 0.0
    out[place[kept][:, None], place[None, :]] = into.mT
    return out
