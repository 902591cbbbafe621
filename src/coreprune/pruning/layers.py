"""Read a group of channels as the theory sees it: incoming rows, outgoing columns, and the activation between."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from coreprune.graph import Captured, Group, ParamSlice
from coreprune.pruning.activations import KNOWN, activation
from coreprune.pruning.selectors import LayerWeights

# Ops that hand channels on unchanged (in eval mode), between a layer and the one that reads it.
_TRANSPARENT = {"dropout", "view", "reshape", "flatten", "permute", "transpose", "contiguous", "clone", "_unsafe_view"}
_LINEAR = {"linear", "addmm", "mm", "matmul"}


def tensors_of(model: nn.Module) -> dict[str, Tensor]:
    """Every parameter and buffer by dotted name, detached."""
    return {name: tensor.detach() for name, tensor in model.state_dict(keep_vars=True).items()}


def read_layer(tensors: Mapping[str, Tensor], captured: Captured, group: Group) -> LayerWeights:
    """Collect the weights around a group, one row and one column per unit, in float64.

    A unit of several channels (a head) has the rows of its channels side by side. Several producers or consumers are
    stacked: the unit's response is then a function of all their inputs together.
    """
    units = group.size // group.unit
    made = [(_rows(tensors[s.param], s, group), tensors[s.param].ndim == 1) for s in group.producers]
    # A parameter that both makes and reads channels (a recurrent weight) counts on the incoming side only.
    read = [_rows(tensors[s.param], s, group) for consumer in group.consumers for s in consumer.slices]
    weights = [rows for rows, is_bias in made if not is_bias]
    biases = [rows for rows, is_bias in made if is_bias]
    bias = torch.stack([b.sum(dim=1) for b in biases]).sum(dim=0) if biases and group.unit == 1 else None
    columns = [bias[:, None]] if bias is not None else biases
    incoming = torch.cat([*weights, *columns], dim=1) if weights or columns else torch.zeros(units, 1)
    outgoing = torch.cat(read, dim=1).T if read else torch.ones(1, units)
    return LayerWeights(
        incoming=incoming.double(),
        outgoing=outgoing.double(),
        activation=activation(activation_name(captured, group)),
        bias_columns=sum(c.shape[1] for c in columns),
    )


def plain_linear(captured: Captured, group: Group) -> bool:
    """Whether the theorems apply as written: one linear layer makes the channels, linear layers read them.

    Convolutions are chosen by the same selectors, but the certificates of a k×k consumer sum over positions.
    """
    weights = {s.param for s in group.producers if len(captured.tensors[s.param][0]) > 1}
    readers = [s for consumer in group.consumers for s in consumer.slices]
    return (
        group.unit == 1
        and not group.others
        and len(weights) == 1
        and all(len(captured.tensors[name][0]) == 2 for name in weights)
        and bool(readers)
        and all(len(captured.tensors[s.param][0]) == 2 for s in readers)
        and all(consumer.slices for consumer in group.consumers)
    )


def activation_name(captured: Captured, group: Group) -> str:
    """Name of the activation between the layer and its consumers; "unknown" where there is more than one on the way."""
    nodes = {node.name: node for node in captured.graph.graph.nodes}
    found = set()
    for consumer in group.consumers:
        node, names = nodes.get(consumer.source), []
        while node is not None and node.op == "call_function":
            op = _op_name(node)
            if op in KNOWN:
                names.append(op)
            elif op in _LINEAR:
                break
            elif op not in _TRANSPARENT:
                names.append("unknown")
                break
            node = next(iter(node.all_input_nodes), None)
        found.add(tuple(names) or ("identity",))
    only = found.pop() if len(found) == 1 else ()
    return only[0] if len(only) == 1 else "unknown"


def _op_name(node: torch.fx.Node) -> str:
    """`aten.relu_.default` → `relu`."""
    packet = str(node.target).split(".")
    return (packet[1] if len(packet) > 1 else packet[0]).removesuffix("_")


def _rows(tensor: Tensor, piece: ParamSlice, group: Group) -> Tensor:
    """The entries of one parameter that belong to each unit: (units, entries)."""
    units = group.size // group.unit
    if piece.index.ndim == 2:  # a grouped convolution: block b of axis 0 has its own map
        blocks = tensor.chunk(piece.index.shape[0], dim=0)
        parts = [_gather(block, piece.dim, index) for block, index in zip(blocks, piece.index, strict=True)]
        values, owners = torch.cat([v for v, _ in parts]), torch.cat([o for _, o in parts])
    else:
        values, owners = _gather(tensor, piece.dim, piece.index)
    order = torch.argsort(owners, stable=True)
    return values[order].reshape(units, -1)


def _gather(tensor: Tensor, dim: int, index: Tensor) -> tuple[Tensor, Tensor]:
    rows = tensor.movedim(dim, 0).reshape(tensor.shape[dim], -1)
    live = torch.nonzero(index >= 0).flatten().to(tensor.device)
    return rows[live], index.to(tensor.device)[live]
